"""Hold what the backends say of C against each system's headers and libraries: ``python tools/check_abi.py``.

No such system is needed, but the compiler that the package ``ziglang`` brings (``pip install ziglang``) with the
headers and lists of symbols of all of them. Each backend's own source is run, once for each target, with
stand-ins for `sys`, `os`, `sysconfig` and the loaders of `ctypes` that play the target and take down what the code
looks up and assigns. Out of that comes a C file of `_Static_assert`s and calls, which is compiled, and one for each
library that names the functions the code takes out of it, which is linked. What is checked, and by which rules:

constant    A block of lines (up to an empty one) with ``<header.h>`` in a comment is a header's. Each name in it that
            is `Final` is the header's name, and has its value. A name outside must not be one of the headers' macros.
structure   Each `Structure`. The docstring begins with ``struct name of <header.h>``, or with ``<header.h>``: then
            the class is named as in C. Size, and each field's offset, size and kind.
format      A `struct.Struct` in a header's block: ``struct name of <header.h>: type field, field; type field``.
function    Its declaration is in a comment, above the first use at best. The compiler holds it against the header's.
            `restype` and each of `argtypes` are of the kind that is declared. What is called without `argtypes`, or
            goes beyond the fixed arguments of a variadic function, is a ready-made object of ctypes, and no shorter
            than int. `argtypes` of a variadic function are its fixed arguments. The library has the function.

A kind is an integer's size and signedness, a pointer (`c_char_p` and `c_wchar_p`: to such characters; `POINTER`: to
such a thing), or void. An enumeration may be signed or not. A pointer may be taken as an integer of its size: so is
macOS's `sem_t *`, which is a number.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import ctypes
import importlib.util
import os
import re
import shlex
import struct
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Final

PACKAGE: Final = Path(__file__).resolve().parent.parent / "shmring"
ZIG: Final = "SHMRING_ZIG"  # environment variable: how zig is called, if it is not this Python's package
BACKENDS: Final = {"linux": "_linux", "darwin": "_darwin", "win32": "_windows"}  # by sys.platform


@dataclass(frozen=True)
class Target:
    """A system and a machine: what zig calls them, and what Python does there."""

    zig: str
    platform: str  # sys.platform
    machine: str  # os.uname().machine
    wheel: str  # sysconfig.get_platform()

    @property
    def long(self) -> type[Any]:
        """What a C long is there."""
        return ctypes.c_int32 if self.platform == "win32" else ctypes.c_int64


# For glibc the oldest that has both machines: what links with it links with all.
TARGETS: Final = (
    Target("x86_64-linux-gnu.2.17", "linux", "x86_64", "linux-x86_64"),
    Target("aarch64-linux-gnu.2.17", "linux", "aarch64", "linux-aarch64"),
    Target("x86_64-linux-musl", "linux", "x86_64", "linux-x86_64"),
    Target("aarch64-linux-musl", "linux", "aarch64", "linux-aarch64"),
    Target("x86_64-macos", "darwin", "x86_64", "macosx-11.0-x86_64"),
    Target("aarch64-macos", "darwin", "arm64", "macosx-11.0-arm64"),
    Target("x86_64-windows-gnu", "win32", "AMD64", "win-amd64"),
    Target("aarch64-windows-gnu", "win32", "ARM64", "win-arm64"),
)

# Besides the headers that a module's comments name.
HEADERS: Final = {
    "linux": ("unistd.h", "fcntl.h"),
    "darwin": ("unistd.h", "fcntl.h", "sys/mman.h"),
    "win32": ("windows.h",),
}
HEADER: Final = re.compile(r"<([\w/.-]+\.h)>")

PROLOGUE: Final = """\
#define _GNU_SOURCE
#define WIN32_LEAN_AND_MEAN
{includes}
#include <stddef.h>
#include <wchar.h>

enum of_unsigned {{ AN_UNSIGNED }};
enum of_signed {{ A_SIGNED = -1 }};

static void *anything;
#define VALUE(T) (*(__typeof__(T) *)anything)

// An enumeration is compatible with the integer that it is made of, but with no other enumeration.
#define SAME(T, U) __builtin_types_compatible_p(__typeof__(T), U)
#define IS_ENUM(T) \\
    ((SAME(T, unsigned) && !SAME(T, enum of_unsigned)) || (SAME(T, int) && !SAME(T, enum of_signed)))

// An integer's size, negative if it is signed; 100: a pointer, 200: something else, 0: void.
#define KIND(T) \\
    _Generic((__typeof__(T) *)0, void *: 0, char *: (char)-1 < 0 ? -1 : 1, signed char *: -1, unsigned char *: 1, \\
             _Bool *: 1, short *: -2, unsigned short *: 2, int *: -4, unsigned *: 4, long *: -(int)sizeof(long), \\
             unsigned long *: (int)sizeof(long), long long *: -8, unsigned long long *: 8, \\
             default: __builtin_classify_type(VALUE(T)) == 5 ? 100 : 200)

// The kind that is asked for, or one that is as good.
#define ALLOWED(T, kind) \\
    (IS_ENUM(T) && KIND(T) == -(kind) ? KIND(T) : ((kind) == 8 || (kind) == -8) && KIND(T) == 100 ? 100 : (kind))
#define IS_STRING(T, C) _Generic(VALUE(T), C *: 1, const C *: 1, default: 0)
"""

FLAGS: Final = (
    "-std=gnu11", "-Wall", "-Werror", "-ferror-limit=0", "-fno-caret-diagnostics", "-Wno-unused-function",
    "-Wno-void-ptr-dereference",
    "-Wno-inconsistent-dllimport", "-Wno-deprecated-declarations",
)  # fmt: skip


# ---------------------------------------------------------------- stand-ins, and what they take down

UNSAID: Final = object()  # a prototype that was never assigned


class Function:
    """What a library gives for a name; the code assigns its prototype."""

    def __init__(self, library: str | None, symbol: str, file: str, line: int) -> None:
        self.library = library
        self.symbol = symbol
        self.file = file
        self.line = line
        self.argtypes: Any = None
        self.restype: Any = UNSAID
        self.errcheck: Any = None


class Library:
    """In place of `CDLL`, `PyDLL`, `WinDLL`."""

    functions: list[Function]  # of all libraries of one reading

    def __init__(self, name: str | None, *_: object, **__: object) -> None:
        self._name = name

    def __getitem__(self, symbol: str) -> Function:
        caller = sys._getframe(1)
        while caller.f_code.co_filename == __file__:
            assert caller.f_back is not None
            caller = caller.f_back
        function = Function(self._name, symbol, caller.f_code.co_filename, caller.f_lineno)
        self.functions.append(function)
        return function

    def __getattr__(self, symbol: str) -> Function:
        if symbol.startswith("__"):
            raise AttributeError(symbol)
        function = self[symbol]
        setattr(self, symbol, function)
        return function


def _like(module: ModuleType, **changes: object) -> ModuleType:
    """A module that has all that this one has, but for the changes."""
    made = ModuleType(f"{module.__name__}, played")
    vars(made).update({**vars(module), **changes})
    return made


def _on_the_target_alone(*_: object) -> Any:
    raise RuntimeError("called while the module is read")


class World:
    """One target as Python sees it, in which the package's modules are run."""

    def __init__(self, package: Path, target: Target) -> None:
        self.package = package
        self.target = target
        self.functions: list[Function] = []
        self.modules: dict[str, ModuleType] = {}
        loader = type("Library", (Library,), {"functions": self.functions})
        unsigned = ctypes.c_uint32 if target.long is ctypes.c_int32 else ctypes.c_uint64
        uname = SimpleNamespace(machine=target.machine, sysname={"darwin": "Darwin"}.get(target.platform, "Linux"))
        played = _like(
            ctypes, CDLL=loader, PyDLL=loader, WinDLL=loader, c_long=target.long, c_ulong=unsigned,
            get_last_error=_on_the_target_alone, set_last_error=_on_the_target_alone,
            FormatError=_on_the_target_alone, WinError=_on_the_target_alone,
        )  # fmt: skip
        for name in ("wintypes", "cdll", "pydll", "windll", "c_wchar"):  # of this system's sizes, or not taken down
            vars(played).pop(name, None)
        self._played = {
            "ctypes": played,
            "sys": _like(sys, platform=target.platform),
            "os": _like(os, uname=lambda: uname),
            "sysconfig": _like(sysconfig, get_platform=lambda: target.wheel),
        }

    def _import(
        self,
        name: str,
        globals_: Mapping[str, object] | None = None,
        locals_: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if level:
            return self.load(name) if name else SimpleNamespace(**{each: self.load(each) for each in fromlist or ()})
        # _layout is what ctypes itself imports for a Structure, from Python 3.14 on; it goes by the fields' types.
        if name.partition(".")[0] == "ctypes" and name not in ("ctypes", "ctypes._layout"):
            raise ImportError(f"{name} has this system's sizes: name what the target has")
        return self._played.get(name) or builtins.__import__(name, globals_, locals_, fromlist or (), level)

    def load(self, name: str) -> ModuleType:
        """Run one of the package's modules, once."""
        if name not in self.modules:
            path = self.package / f"{name}.py"
            module = self.modules[name] = ModuleType(f"{self.package.name}.{name}")
            vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import}
            exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
        return self.modules[name]


# ---------------------------------------------------------------- the source text


@dataclass
class Block:
    """Lines of a module without an empty one between them, and what the comments in it say."""

    first: int
    last: int
    comment: str = ""

    @property
    def headers(self) -> list[str]:
        return HEADER.findall(self.comment)


@dataclass
class Declaration:
    """A function's, as a comment has it."""

    text: str
    line: int
    arguments: list[tuple[str, str]]  # type alone, and as it is written
    variadic: bool


def _without_name(text: str) -> str:
    """The type of a parameter or a field that may have a name."""
    tokens = re.findall(r"\w+|\*", text)
    words = {"int", "char", "long", "short", "unsigned", "signed", "void", "double", "float"}
    before = [token for token in tokens[:-1] if token not in ("const", "volatile", "restrict")]
    named = before and before[-1] not in ("struct", "union", "enum") and tokens[-1] not in words | {"*"}
    return " ".join(tokens[:-1] if named else tokens)


class Source:
    """A module's text, and the names that it has when it has run."""

    def __init__(self, path: Path, module: ModuleType) -> None:
        self.path = path
        self.shown = f"{path.parent.name}/{path.name}"
        self.names = vars(module)
        text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.comments: list[Block] = []  # those that have lines of their own
        self.blocks: list[Block] = []
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                if not self.blocks or self.blocks[-1].last != number - 1:
                    self.blocks.append(Block(number, number))
                self.blocks[-1].last = number
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT:
                    said, number = token.string.lstrip("# "), token.start[0]
                    block = self.block(number)
                    block.comment += f" {said}"
                    if lines[number - 1].lstrip().startswith("#"):
                        if not self.comments or self.comments[-1].last != number - 1:
                            self.comments.append(Block(number, number))
                        self.comments[-1].last = number
                        self.comments[-1].comment += f" {said}"

    def block(self, line: int) -> Block:
        return next(block for block in self.blocks if block.first <= line <= block.last)

    @property
    def headers(self) -> list[str]:
        """All that are named in comments and docstrings, in order."""
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        said = [ast.get_docstring(node) or "" for node in ast.walk(self.tree) if isinstance(node, documented)]
        return HEADER.findall(" ".join([*(block.comment for block in self.blocks), *said]))

    def assigned(self) -> Iterator[tuple[ast.stmt, str, bool]]:
        """Each name that is assigned outside classes and functions, and whether as `Final`."""
        for node in ast.walk(self.tree):
            if self.is_within(node, ast.FunctionDef, ast.Lambda, ast.ClassDef):
                continue
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                yield node, node.target.id, ast.unparse(node.annotation).partition("[")[0].endswith("Final")
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                            yield node, name.id, False

    def is_within(self, node: ast.AST, *kinds: type[ast.AST]) -> bool:
        """Is this node in one of these kinds?"""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, kinds):
                return True
        return False

    def value(self, node: ast.AST) -> object:
        """What a name, dotted perhaps, stands for; None if for nothing that is known."""
        if isinstance(node, ast.Attribute):
            base = self.value(node.value)
            return None if isinstance(base, Library) else getattr(base, node.attr, None)
        return self.names.get(node.id) if isinstance(node, ast.Name) else None

    def declaration(self, symbol: str, line: int) -> Declaration | None:
        """Of this function; if there are several, the last one before this line."""
        found = []
        for comment in self.comments:
            match = re.search(rf"(?:^|[.:;>] )\s*([\w* ]*?\b\w[\w* ]*?[ *]){symbol}\(([^()]*)\)", comment.comment)
            if match:
                arguments = [part.strip() for part in match[2].split(",")]
                variadic = arguments[-1] == "..."
                arguments = arguments[:-1] if variadic else arguments if arguments not in ([""], ["void"]) else []
                text = f"{match[1].strip()} {symbol}({match[2]});"
                typed = [(_without_name(argument), argument) for argument in arguments]
                found.append(Declaration(text, comment.first, typed, variadic))
        above = [declaration for declaration in found if declaration.line <= line]
        return above[-1] if above else found[0] if found else None

    def uses(self, name: str) -> Iterator[tuple[int, list[ast.expr] | None]]:
        """The arguments of each call of a function that has this name here; None: it is handed on."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                parent = self.parents[node]
                if isinstance(parent, ast.Attribute):
                    continue  # its prototype
                if isinstance(parent, ast.Call) and parent.func is node:
                    keywords = [keyword.value for keyword in parent.keywords]
                    yield node.lineno, [*parent.args, *keywords]
                elif isinstance(parent, ast.Call) and ast.unparse(parent.func) == "map" and parent.args[0] is node:
                    each = [given.elts for given in parent.args[1:] if isinstance(given, ast.List)]
                    once = len(each) == len(parent.args) - 1 and all(len(elements) == 1 for elements in each)
                    yield node.lineno, [elements[0] for elements in each] if once else None
                else:
                    yield node.lineno, None

    def ready_made(self, argument: ast.expr) -> list[Any]:
        """The types of ctypes that an argument's value can have; none if that cannot be told, or it has another."""
        if isinstance(argument, ast.Constant) and argument.value is None:
            return [ctypes.c_void_p]
        if isinstance(argument, ast.IfExp):
            either = [self.ready_made(argument.body), self.ready_made(argument.orelse)]
            return sum(either, []) if all(either) else []
        if isinstance(argument, ast.Call) and isinstance(argument.func, (ast.Name, ast.Attribute)):
            made = self.value(argument.func)
            if made in (ctypes.byref, ctypes.pointer):
                return [ctypes.c_void_p]
            return [made] if isinstance(made, type) and issubclass(made, ctypes._SimpleCData) else []
        if isinstance(argument, ast.Name):
            function: ast.AST = self.parents[argument]
            while not isinstance(function, (ast.FunctionDef, ast.Module)):
                function = self.parents[function]
            values = [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == argument.id
            ]
            if isinstance(function, ast.FunctionDef) and values:
                all_types = [[] if isinstance(value, ast.Name) else self.ready_made(value) for value in values]
                return sum(all_types, []) if all(all_types) else []
            value = self.names.get(argument.id)
            return [type(value)] if isinstance(value, ctypes._SimpleCData) else []
        return []


# ---------------------------------------------------------------- from the code to C


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_simple(type_: object, codes: str) -> bool:
    return isinstance(type_, type) and issubclass(type_, ctypes._SimpleCData) and getattr(type_, "_type_", "") in codes


def _kind(type_: Any) -> int | None:
    """As the macro KIND has it; None: nothing that can be passed."""
    if type_ is None:
        return 0
    if _is_simple(type_, "PzZ") or (isinstance(type_, type) and issubclass(type_, ctypes._Pointer)):
        return 100
    if _is_simple(type_, "bhilq"):
        return -ctypes.sizeof(type_)
    return ctypes.sizeof(type_) if _is_simple(type_, "BHILQ?") else None


def _in_words(kind: int) -> str:
    if abs(kind) < 100:
        return f"{'a signed' if kind < 0 else 'an unsigned'} integer of {abs(kind)} bytes" if kind else "void"
    return "a pointer" if kind == 100 else "something else"


@dataclass
class Check:
    """What is to be checked for one target, and what was found before any compiler ran."""

    target: Target
    shown: str = ""
    code: list[str] = field(default_factory=list)
    headers: dict[str, None] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)  # their names
    structures: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def problem(self, source: Source, line: int, what: str) -> None:
        self.problems.append(f"{source.shown}:{line}: {what}")

    def emit(self, source: Source, line: int, code: str) -> None:
        self.code.append(f'#line {line} "{source.shown}"\n{code}')

    def number(self, source: Source, line: int, c: str, value: int, what: str) -> None:
        """The constant expression has this value."""
        number = f"{value}LL" if value < 1 << 63 else f"(long long){value}ULL"
        message = f"{what} is {value} here, {{number}} in the header"
        self.emit(source, line, f"_Static_assert((long long)({c}) == {number}, {_quoted(message)});")

    def kind(self, source: Source, line: int, c: str, type_: Any, what: str) -> None:
        """The C type is what this type of ctypes stands for."""
        kind = _kind(type_)
        name = getattr(type_, "__name__", str(type_))
        if kind is None:
            return self.problem(source, line, f"{what} is {name} here, which cannot be checked")
        message = f"{what} is {name} here, {_in_words(kind)}; in C it is {{kind}}"
        self.emit(source, line, f"_Static_assert(KIND({c}) == ALLOWED({c}, {kind}), {_quoted(message)});")
        characters = "char" if _is_simple(type_, "z") else "wchar_t" if _is_simple(type_, "Z") else ""
        if characters:
            message = f"{what} is {name} here; in C it is no pointer to {characters}"
            self.emit(source, line, f"_Static_assert(IS_STRING({c}, {characters}), {_quoted(message)});")
        elif isinstance(type_, type) and issubclass(type_, ctypes._Pointer):
            to, pointee = type_._type_, f"__typeof__(*VALUE({c}))"
            if issubclass(to, ctypes.Structure):
                message = f"{what} is {name} here; in C it is no pointer to that"
                tag = f"struct {to.__name__.lstrip('_')}" if to.__name__.islower() else to.__name__
                self.emit(source, line, f"_Static_assert(SAME({pointee}, {tag}), {_quoted(message)});")
            else:
                self.kind(source, line, pointee, to, f"what {what} points to")

    # ------------------------------------------------------------ one kind of thing each

    def constant(self, source: Source, line: int, name: str, headers: list[str]) -> None:
        value = source.names[name]
        if isinstance(value, ctypes._SimpleCData):
            value = value.value or 0
        if not isinstance(value, int) or isinstance(value, bool):
            return self.problem(source, line, f"{name} is under <{headers[0]}>, but is no number")
        self.constants.append(name)
        self.number(source, line, name, value, name)

    def structure(self, source: Source, node: ast.ClassDef, class_: type[ctypes.Structure | ctypes.Union]) -> None:
        said = ast.get_docstring(node) or ""
        match = re.match(rf"(?:((?:struct |union )?\w+) of )?{HEADER.pattern}", said)
        if not match:
            what = f"{node.name}: its docstring does not begin with <header.h>, or with struct name of <header.h>"
            return self.problem(source, node.lineno, what)
        c = match[1] or (f"struct {node.name}" if node.name.islower() else node.name)
        self.structures.append(node.name)
        self.number(source, node.lineno, f"sizeof({c})", ctypes.sizeof(class_), f"the size of {c}")
        lines = {
            element.elts[0].value: element.lineno
            for element in ast.walk(node)
            if isinstance(element, ast.Tuple) and element.elts and isinstance(element.elts[0], ast.Constant)
        }
        for name, type_, *bits in class_._fields_:
            line = lines.get(name, node.lineno)
            if bits:
                self.problem(source, line, f"{node.name}.{name}: bit fields cannot be checked")
                continue
            descriptor = getattr(class_, name)
            self._field(source, line, c, name, descriptor.offset, ctypes.sizeof(type_))
            if _kind(type_) is not None:
                self.kind(source, line, f"(({c} *)0)->{name}", type_, f"{c}.{name}")

    def _field(self, source: Source, line: int, c: str, name: str, offset: int, size: int) -> None:
        self.fields.append(name)
        self.number(source, line, f"offsetof({c}, {name})", offset, f"the offset of {c}.{name}")
        self.number(source, line, f"sizeof((({c} *)0)->{name})", size, f"the size of {c}.{name}")

    def format(self, source: Source, line: int, name: str, comment: str) -> None:
        packed: struct.Struct = source.names[name]
        match = re.search(rf"((?:struct |union )?\w+) of {HEADER.pattern}: ([^.]*)", comment)
        letters = packed.format
        items = re.findall(r"(\d*)([a-zA-Z?])", letters)
        if not match or re.search("[sp]", letters):
            what = f"{name} is under a header: its comment says no struct name of <header.h>: type field, ..."
            return self.problem(source, line, what)
        if self.target.platform == "win32" and re.match("@?[^=<>!]*[lL]", letters):
            return self.problem(source, line, f"{name}: a long is shorter there")
        c = match[1]
        declared = []
        for part in match[3].split(";"):
            first, *more = part.split(",")
            if first.strip():
                type_ = _without_name(first)
                declared += [(type_, field.split()[-1].strip("*")) for field in (first, *more)]
        order = letters[0] if letters[0] in "@=<>!" else "@"
        before, offsets = order, []
        for count, letter in items:
            for _ in range(int(count or 1)):
                before += letter
                size = struct.calcsize(order + letter)
                if letter != "x":
                    offsets.append((struct.calcsize(before) - size, size, letter))
        if len(offsets) != len(declared):
            return self.problem(source, line, f"{name} has {len(offsets)} fields, its comment {len(declared)}")
        self.structures.append(name)
        self.number(source, line, f"sizeof({c})", packed.size, f"the size of {c} ({name})")
        for (type_, each), (offset, size, letter) in zip(declared, offsets):
            self._field(source, line, c, each, offset, size)
            kind, found = -size if letter.islower() and letter not in "cnx" else size, f"(({c} *)0)->{each}"
            message = f"{c}.{each} is {letter!r} here, {_in_words(kind)}; in C it is {{kind}}"
            self.emit(source, line, f"_Static_assert(KIND({found}) == ALLOWED({found}, {kind}), {_quoted(message)});")
            message = f"{c}.{each} is not what the comment declares, {type_}"
            self.emit(source, line, f"_Static_assert(SAME({found}, {type_}), {_quoted(message)});")

    def function(self, source: Source, function: Function) -> None:
        self.functions.append(function)
        symbol, line = function.symbol, function.line
        names = [name for name, value in source.names.items() if value is function]
        declared = source.declaration(symbol, line)
        if function.restype is UNSAID:
            self.problem(source, line, f"{symbol} has no restype: say None for void")
        if declared is None:
            return self.problem(source, line, f"{symbol}: no comment has its declaration, type {symbol}(type, ...)")
        # First the header's: without one ours would prove nothing. The name in the library is the one that the
        # code looks up: a header that leads to another one says so, and the two differ.
        label = f"__asm__({_quoted(('_' if self.target.platform == 'darwin' else '') + symbol)})"
        self.emit(source, line, f"extern __typeof__({symbol}) {symbol};")
        self.emit(source, declared.line, f"{declared.text.rstrip(';')} {label};")
        given = ", ".join(f"VALUE({type_})" for type_, _ in declared.arguments)
        call = f"{symbol}({given})"
        self.emit(source, declared.line, f"static void call_{len(self.code)}(void) {{ (void){call}; }}")
        if function.restype is not UNSAID:
            self.kind(source, line, f"__typeof__({call})", function.restype, f"the result of {symbol}")
        if function.argtypes is not None:
            if len(function.argtypes) != len(declared.arguments):
                fixed = "fixed arguments, it is variadic" if declared.variadic else "arguments"
                what = f"{symbol} has {len(declared.arguments)} {fixed}, but {len(function.argtypes)} argtypes"
                return self.problem(source, line, what)
            for position, (type_, said) in enumerate(declared.arguments):
                what = f"argument {position + 1} of {symbol}, {said},"
                self.kind(source, line, type_, function.argtypes[position], what)
        for name in names:
            for at, arguments in source.uses(name):
                self._call(source, at, function, declared, arguments)

    def _call(
        self, source: Source, line: int, function: Function, declared: Declaration, arguments: list[ast.expr] | None
    ) -> None:
        """What this call passes unconverted is of the right kind, and it passes as much as there is to pass."""
        symbol, fixed = function.symbol, len(declared.arguments)
        if function.argtypes is not None and not declared.variadic:
            if arguments is not None and not any(isinstance(argument, ast.Starred) for argument in arguments):
                if len(arguments) != fixed:
                    self.problem(source, line, f"{symbol} is called with {len(arguments)} arguments, it has {fixed}")
            return
        if arguments is None:
            return self.problem(source, line, f"{symbol} is handed on: what it is called with cannot be checked")
        if len(arguments) < fixed or (len(arguments) > fixed and not declared.variadic):
            return self.problem(source, line, f"{symbol} is called with {len(arguments)} arguments, it has {fixed}")
        for position, argument in enumerate(arguments):
            what = f"argument {position + 1} of {symbol}, {ast.unparse(argument)},"
            if position < fixed and function.argtypes is not None:
                continue
            types = source.ready_made(argument)
            if not types:
                self.problem(source, line, f"{what} is no ready-made object of ctypes, and no argtypes convert it")
            for type_ in types:
                if position < fixed:
                    self.kind(source, line, declared.arguments[position][0], type_, what)
                elif abs(_kind(type_) or 0) < 4:
                    self.problem(source, line, f"{what} is {type_.__name__}: C passes nothing shorter than int there")

    # ------------------------------------------------------------ all of a module

    def module(self, source: Source) -> None:
        for header in source.headers:
            self.headers[header] = None
        for node, name, final in source.assigned():
            block, value = source.block(node.lineno), source.names.get(name)
            if isinstance(value, (Function, Library)) or name not in source.names:  # not here on this target
                continue
            if block.headers and isinstance(value, struct.Struct):
                self.format(source, node.lineno, name, block.comment)
            elif block.headers and final:
                self.constant(source, node.lineno, name, block.headers)
            elif block.headers and isinstance(value, (int, ctypes._SimpleCData)):
                self.problem(source, node.lineno, f"{name} is under <{block.headers[0]}>, but not Final")
            elif re.fullmatch("[A-Z][A-Z0-9_]*", name):
                message = f"{name} is a name of the headers, but stands in no block with a header's name"
                self.emit(source, node.lineno, f"#ifdef {name}")
                self.emit(source, node.lineno, f"_Static_assert(0, {_quoted(message)});\n#endif")
        for inner in ast.walk(source.tree):
            if isinstance(inner, ast.ClassDef):
                class_ = source.names.get(inner.name)
                if isinstance(class_, type) and issubclass(class_, (ctypes.Structure, ctypes.Union)):
                    self.structure(source, inner, class_)
                elif any(ast.unparse(base).rpartition(".")[2] in ("Structure", "Union") for base in inner.bases):
                    self.problem(source, inner.lineno, f"{inner.name} is not at the top of the module")
            elif isinstance(inner, (ast.Name, ast.Attribute)) and source.is_within(inner, ast.FunctionDef, ast.Lambda):
                used = source.value(inner)
                if isinstance(used, Library) or (isinstance(used, type) and issubclass(used, Library)):
                    self.problem(source, inner.lineno, f"{ast.unparse(inner)} in a function: its uses are not seen")

    def text(self) -> str:
        """The C file."""
        first = [header for header in HEADERS[self.target.platform] if header not in self.headers]
        includes = "\n".join(f"#include <{header}>" for header in [*first, *self.headers])
        return "\n".join([PROLOGUE.format(includes=includes), *self.code, ""])

    def links(self) -> dict[str, str]:
        """By library, a C file that needs of it what the code takes out of it."""
        files: dict[str, str] = {}
        prefix = "_" if self.target.platform == "darwin" else ""
        for library in {function.library for function in self.functions}:
            symbols = sorted({function.symbol for function in self.functions if function.library == library})
            code = [f"extern char at_{symbol}[] __asm__({_quoted(prefix + symbol)});" for symbol in symbols]
            code.append(f"char *const used[] = {{{', '.join(f'at_{symbol}' for symbol in symbols)}}};")
            code.append("int DllMainCRTStartup(void) { return used[0] != 0; }")  # where Windows' libraries begin
            files[library or "c"] = "\n".join([*code, ""])
        return files


def check(package: Path, target: Target) -> Check | None:
    """Read what a package's backend for this target says; None if it has none."""
    checked = Check(target)
    backend = BACKENDS[target.platform]
    if not (package / f"{backend}.py").exists():
        return None
    world = World(package, target)
    checked.shown = f"{package.name}/{backend}.py"
    world.load(backend)
    sources = {}
    for name, module in world.modules.items():
        path = package / f"{name}.py"
        if re.search(r"^\s*(import|from) ctypes\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            sources[str(path)] = Source(path, module)
            checked.module(sources[str(path)])
    for function in world.functions:
        if function.file in sources:
            checked.function(sources[function.file], function)
        else:
            checked.problems.append(f"{function.file}:{function.line}: {function.symbol}: the module has no ctypes")
    return checked


# ---------------------------------------------------------------- from C to an answer


def find_zig() -> list[str] | None:
    """How zig is called here; None: it is not here."""
    if os.environ.get(ZIG):
        return shlex.split(os.environ[ZIG])
    return [sys.executable, "-m", "ziglang"] if importlib.util.find_spec("ziglang") else None


def _in_our_words(output: str) -> list[str]:
    """The compiler's errors, with what it found in place of what it was asked."""
    found: list[str] = []
    for line in output.splitlines():
        match = re.match(r"(.+?:\d+):\d+: (?:fatal )?(error|note): (.*)", line)
        if not match:
            continue
        where, level, text = match.groups()
        where = where.rpartition("/include/")[2]
        evaluated = re.match(r"expression evaluates to '(-?\d+) == ", text)
        asserted = re.match(r"static assertion failed(?: due to requirement '.*')?: (.*)", text)
        if level == "error":
            found.append(f"{where}: {asserted[1] if asserted else text}")
        elif evaluated and found:
            value = int(evaluated[1])
            found[-1] = found[-1].replace("{number}", str(value)).replace("{kind}", _in_words(value))
        elif found and "previous" in text:
            found[-1] += f" ({text.replace('here', where)})"
    return found


def build(checked: Check, zig: list[str], directory: Path, cache: Path) -> list[str]:
    """Compile and link; returns what is wrong."""
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    target, problems = checked.target, list(checked.problems)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*zig, *arguments], cwd=directory, env=environment, capture_output=True, text=True, errors="replace"
        )
        return f"{done.stdout}{done.stderr}" if done.returncode else ""

    (directory / "abi.c").write_text(checked.text(), encoding="utf-8")
    failed = run("cc", "-target", target.zig, *FLAGS, "-c", "abi.c", "-o", "abi.o")
    if failed:
        problems += _in_our_words(failed) or [failed]
    for library, text in checked.links().items():
        name = library.lower().removesuffix(".dll")
        (directory / f"{name}.c").write_text(text, encoding="utf-8")
        # Without the runtime libraries, which would have to be built for each target, and which nothing here needs.
        failed = run(
            "build-lib", "-target", target.zig, "-dynamic", "-fno-compiler-rt", "-fno-ubsan-rt", "-fPIC", "-z", "defs",
            f"-femit-bin={name}.out", "-cflags", "-fno-sanitize=undefined", "--", f"{name}.c", f"-l{name}",
        )  # fmt: skip
        missing = set(re.findall(r"undefined symbol: (\S+)", failed))
        for function in checked.functions:
            if (function.library or "c") == library and {function.symbol, f"_{function.symbol}"} & missing:
                shown = "/".join(Path(function.file).parts[-2:])
                problems.append(f"{shown}:{function.line}: {function.symbol} is not in the library {name}")
        if failed and not missing:
            problems.append(failed)
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Check every backend on every target, or what is asked for; 0 if all is right."""
    parser = argparse.ArgumentParser(description="Check what the backends say of C against headers and libraries.")
    parser.add_argument("--package", type=Path, default=PACKAGE, help="the folder of the package (the one here)")
    parser.add_argument("--target", action="append", default=[], help="only targets with this in their name")
    parser.add_argument("--zig", help=f"how zig is called, else {ZIG} or this Python's package ziglang")
    parser.add_argument("--cache", type=Path, help="a folder for what zig keeps (a temporary one)")
    parser.add_argument("--keep", type=Path, help="a folder for the C files (a temporary one)")
    arguments = parser.parse_args(argv)
    zig = shlex.split(arguments.zig) if arguments.zig else find_zig()
    if zig is None:
        parser.error(f"there is no package ziglang here: pip install ziglang, or say --zig or {ZIG}")
    wanted = arguments.target or [""]
    targets = [target for target in TARGETS if any(part in target.zig for part in wanted)]
    if not targets:
        parser.error(f"the targets are {', '.join(target.zig for target in TARGETS)}")

    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary, "cache")).resolve()

        def answer(target: Target) -> tuple[Target, Check | None, list[str]]:
            checked = check(arguments.package.resolve(), target)
            directory = (arguments.keep or Path(temporary)).resolve() / target.zig
            directory.mkdir(parents=True, exist_ok=True)
            return target, checked, build(checked, zig, directory, cache) if checked else []

        wrong = False
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for target, checked, problems in pool.map(answer, targets):
                if checked is None:
                    print(f"{arguments.package.name} has no backend for {target.zig}")
                    continue
                print(
                    f"{checked.shown} on {target.zig}: {len(checked.constants)} constants, "
                    f"{len(checked.structures)} structures with {len(checked.fields)} fields, "
                    f"{len(checked.functions)} functions: {'WRONG' if problems else 'right'}"
                )
                for problem in dict.fromkeys(problems):
                    print(f"  {problem}")
                wrong = wrong or bool(problems)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
