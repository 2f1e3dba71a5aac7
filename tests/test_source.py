"""House rules, read from the source text of the package."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

import shmring
from shmring import _words

PACKAGE = Path(shmring.__file__).parent
SOURCES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

# Imports go up this list only; modules of one row do not import each other.
ORDER = [
    ["_errors", "_monitor", "_posix", "_libsystem", "_ntdll"], ["_layout"], ["_words"],
    ["_lanes"], ["_requests", "_parking"], ["_reading"], ["_competing", "_writing", "_looking"],
    ["_linux", "_darwin", "_windows"], ["_backend"], ["_loop"], ["_ring"], ["__init__"], ["bench"], ["selftest"],
    ["_view"], ["_doctor"], ["_cli"], ["__main__"],
]  # fmt: skip
STEPS = ["_parking", "_reading", "_competing", "_writing"]  # the modules that take the protocol's steps
PROTOCOL = ["_words", "_lanes", "_requests", *STEPS, "_looking"]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


@pytest.fixture(params=SOURCES)
def tree(request):
    return TREES[request.param]


def where(node):
    return f"line {node.lineno}: {ast.unparse(node)}"


def names_used(tree):
    """Each attribute and imported name of a module, dotted as far as it goes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{node.module or ''}.{alias.name}"


# ---------------------------------------------------------------- imports


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_up_only(module):
    assert module in RANK, "give the new module its place in ORDER"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, where(node)
            found = [node.module] if node.module else [alias.name for alias in node.names]
            for name in found:
                name = name if name in RANK else "__init__"
                assert RANK[name] < RANK[module], f"{where(node)}: {name} does not come before {module}"


def test_nothing_is_imported_but_the_standard_library_and_the_package_itself(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots = [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            roots = [node.module.partition(".")[0]]
        else:
            continue
        for root in roots:
            assert root != "shmring", f"{where(node)}: relative imports only, or a vendored copy finds another one"
            assert root in getattr(sys, "stdlib_module_names", {root}), f"{where(node)}: standard library only"


def test_the_packages_own_name_is_in_no_lookup(tree):
    """A vendored copy has another one: no import, logger, metadata or pickle may go by it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if re.search(r"import_module|__import__|getLogger|version|files|find_spec|distribution|resource", function):
                strings = [
                    arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                ]
                assert not any(string.partition(".")[0] == "shmring" for string in strings), where(node)
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert not any(ast.unparse(target).endswith("__module__") for target in targets), where(node)


# ---------------------------------------------------------------- banned, and kept in one place


def test_struct_pack_into_is_for_bytes_that_nobody_looks_at_yet():
    """It clears its target before it packs: another process reads the zero. Records in `_lanes` alone."""
    found = {name for name, tree in TREES.items() for _, used in names_used(tree) if used.endswith("pack_into")}
    assert found <= {"_lanes"}
    lines = [line for line in SOURCES["_lanes"].read_text().splitlines() if "pack_into" in line.partition("#")[0]]
    assert all("Struct(" in line or "``" in line for line in lines), lines


def test_ctypes_libraries_are_our_own(tree):
    """ctypes.cdll.x and the like are shared: other packages' prototypes would land on ours."""
    for node, used in names_used(tree):
        assert used.rpartition(".")[2] not in ("cdll", "windll", "oledll", "pydll"), where(node)


def test_only_the_steps_store_a_shared_word():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
                continue
            for target in targets:
                if isinstance(target, ast.Subscript) and re.search(
                    r"(^|[._])(words|bells)$", ast.unparse(target.value)
                ):
                    assert name in STEPS, f"{name}: {where(node)}"


def test_only_the_protocol_loads_a_shared_word_but_a_bell():
    for name, tree in TREES.items():
        loading = {
            function.name
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Subscript) and re.search(r"(^|[._])(words|bells)$", ast.unparse(node.value))
        }
        assert name in PROTOCOL or loading <= {"note", "ring"}, (name, loading)


# ---------------------------------------------------------------- the public face


def test_all_is_what_is_documented():
    assert shmring.__all__ == sorted(shmring.__all__)
    assert set(shmring.__all__) == {
        "Ring", "RingStats", "unlink", "RingError", "RingTimeout", "RingClosed", "RingBusy", "RingCorrupted",
        "RingIncompatible", "MessageTooLarge", "BufferTooSmall", "MessagesLost", "Reservation", "Borrowed", "Doorbell",
    }  # fmt: skip
    public = {name for name, value in vars(shmring).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert public == set(shmring.__all__)


def test_ring_has_the_documented_methods():
    public = {name for name in vars(shmring.Ring) if not name.startswith("_")}
    assert public == {
        "create", "open", "write", "try_write", "read", "try_read", "write_many", "read_many", "messages", "close",
        "unlink", "name", "capacity", "max_message", "closed", "backend", "stats", "writev", "reserve", "borrow",
        "attach_doorbell", "wait_doorbell", "fileno", "read_async", "read_many_async", "write_async",
        "join", "writers_alive", "readers_alive", "wait_for_writer", "wait_for_reader",
    }  # fmt: skip
    assert hasattr(shmring.Ring, "__iter__") and hasattr(shmring.Ring, "__enter__")


def functions(tree, inside=""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{inside}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{inside}{node.name}.")


def test_every_function_is_annotated(tree):
    for name, function in functions(tree):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        bare = [arg.arg for arg in every if arg and arg.annotation is None and arg.arg not in ("self", "cls")]
        assert not bare, f"{name}({', '.join(bare)})"
        assert function.returns is not None, f"{name} -> ?"


def test_every_module_public_class_and_public_function_has_a_docstring():
    for name, path in SOURCES.items():
        assert ast.get_docstring(TREES[name]), f"{path.name}"
    for exported in shmring.__all__:
        assert getattr(shmring, exported).__doc__, exported
    for name, function in functions(TREES["_ring"]):
        overloaded = any(ast.unparse(decorator) == "overload" for decorator in function.decorator_list)
        if not any(part.startswith("_") for part in name.split(".")) and not overloaded:
            assert ast.get_docstring(function), name


def test_what_can_be_raised_is_documented_where_a_caller_looks():
    for method in ("create", "open", "write", "read", "write_many", "read_many", "unlink", "stats"):
        assert "Raises:" in getattr(shmring.Ring, method).__doc__, method


# ---------------------------------------------------------------- memory order

LABELS = [
    *(f"{side}{number}" for side in "WR" for number in range(1, 6)),
    *(f"S{number}" for number in range(1, 7)),
    "C1",
]


def commented_lines(path):
    """``{line number: comment}`` of the comments beside or above code, and docstrings of functions."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [token.string for token in tokens if token.type == tokenize.COMMENT]
    found += [ast.get_docstring(function) or "" for _, function in functions(ast.parse(text))]
    return found


def test_each_label_is_in_the_diagram_at_a_line_and_in_a_test():
    here = Path(__file__).parent
    places = {
        "the diagram": [_words.__doc__],
        "a line of the protocol": [text for name in PROTOCOL for text in commented_lines(SOURCES[name])],
        "a test": [text for name in ("test_order.py", "test_words.py") for text in commented_lines(here / name)],
    }
    for place, texts in places.items():
        for label in LABELS:
            assert any(re.search(rf"\b{label}\b", text) for text in texts), f"{label} is not in {place}"


def test_no_label_is_used_that_the_diagram_does_not_have():
    for name in PROTOCOL:
        for text in commented_lines(SOURCES[name]):
            assert set(re.findall(r"\b[WRSC]\d\b", text)) <= set(LABELS), text
