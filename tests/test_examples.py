"""README's examples: each program runs as it stands there, in a file of its own, and prints what stands below it."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import DARWIN, DEADLINE, ROOT, WINDOWS
from support import popen

EXAMPLES = [
    "A work queue", "A server and ten clients", "Fan-in with asyncio", "NumPy frames in place",
    "Telemetry with loss counts", "Two programs that know a name", "To another machine, with ZeroMQ",
]  # fmt: skip

if WINDOWS:
    HANDLE = ctypes.c_void_p
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel32.CreateJobObjectW.restype = HANDLE

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Examples\n(.*?)^## ", README, re.M | re.S)[1]


def blocks(text):
    """The fenced blocks of some Markdown, as (language, content)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def examples():
    """The blocks below each of the section's headings, by heading."""
    parts = re.split(r"^### (.*)\n", SECTION, flags=re.M)
    return {title: blocks(text) for title, text in zip(parts[1::2], parts[2::2])}


def test_these_examples_are_there_and_each_program_is_followed_by_what_it_prints():
    assert list(examples()) == EXAMPLES
    for title, found in examples().items():
        languages = [language for language, _ in found]
        assert found and languages == ["python", "text"] * (len(found) // 2), title
    assert sum(map(len, examples().values())) == len(blocks(SECTION)) == SECTION.count("```") // 2


@pytest.fixture
def env(tmp_path):
    """The environment of a program that imports the checkout, and on macOS' stand-in stands on it too."""
    path = [str(ROOT)]
    if DARWIN:
        begin = tmp_path / "begin"
        begin.mkdir()
        code = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import support\n"
        (begin / "sitecustomize.py").write_text(code)
        path.insert(0, str(begin))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


class Program:
    """A Python that runs a file, and can be ended together with all that it has started."""

    def __init__(self, path, env):
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, path.name]
        self.process = popen(command, cwd=path.parent, env=env, start_new_session=not WINDOWS, **streams)
        if WINDOWS:  # what it starts is in the same job
            self.job = HANDLE(kernel32.CreateJobObjectW(None, None))
            assert kernel32.AssignProcessToJobObject(self.job, HANDLE(int(self.process._handle)))

    def output(self):
        """What it prints, there and as errors, and its exit code, once nobody is left who has its output."""
        return (*self.process.communicate(timeout=2 * DEADLINE), self.process.returncode)

    def end(self):
        if not self.process.stdout.closed:  # it was not read to its end: somebody is left
            if WINDOWS:
                kernel32.TerminateJobObject(self.job, 1)
            else:
                with contextlib.suppress(OSError):  # a Mac's word for a group that has just died
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        if WINDOWS:
            kernel32.CloseHandle(self.job)


@pytest.mark.parametrize("title", examples())
def test_an_example_prints_what_stands_below_it_and_leaves_nothing(title, name, tmp_path, env):
    """All of it is README's but the rings' names, which are this test's own."""
    found = [content for _, content in examples()[title]]
    paths = []
    for number, code in enumerate(found[::2]):
        for node in ast.walk(ast.parse(code)):
            for alias in node.names if isinstance(node, ast.Import) else ():
                if importlib.util.find_spec(alias.name) is None:
                    pytest.skip(f"{alias.name} is not installed")
        own, names = re.subn(r'\b(Ring\.(?:create|open)\(f?")', rf"\g<1>{name}-", code)
        assert names == len(re.findall(r"\bRing\.(?:create|open)\b", code)) > 0
        comment = re.match(r"# (\w+\.py)\n", code)
        paths.append(tmp_path / (comment[1] if comment else f"example{number}.py"))
        paths[-1].write_text(own, encoding="utf-8")
    programs = []
    try:
        for path in paths:
            programs.append(Program(path, env))
        for program, expected in zip(programs, found[1::2]):
            output, errors, status = program.output()
            assert (output, errors, status) == (expected, "", 0), errors
    finally:
        for program in programs:
            program.end()
