"""What tests need that must not import pytest: `harness.py` forks thousands of processes, which have to be small."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import marshal
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout itself is what is tested, installed or not

WINDOWS = sys.platform == "win32"
# The macOS backend over a stand-in, in this process and in those that it starts.
DARWIN = sys.platform == "linux" and os.environ.get("SHMRING_TEST_BACKEND") == "darwin"
if DARWIN:
    import darwin_on_linux

    darwin_on_linux.take_over()
GIL = getattr(sys, "_is_gil_enabled", lambda: True)()
DEADLINE = 60.0 if WINDOWS else 30.0  # seconds that anything a test waits for may take
ERROR_INTERNAL_ERROR = 1359  # <winerror.h>
SIGKILL = 9  # there is none on Windows, where os.kill ends a process with any number as its exit code


def load_tool(name):
    """A program of tools/ as a module: that is no package, and not on the path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_until(condition, what="the condition"):
    """Wait until `condition()` is true and return what it returned; fail after DEADLINE."""
    end = time.monotonic() + DEADLINE
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"{what} did not come true in {DEADLINE} s"
        time.sleep(0.001)


def descriptors():
    """The descriptors open in this process, with what they lead to; none on Windows, which has handles."""
    if WINDOWS:
        return {}
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}


def in_place(ring):
    """The next message, read in place."""
    with ring.borrow() as view:
        return bytes(view)


def kill_yourself():
    """End this process at once, as SIGKILL does; nothing more runs in it."""
    os.kill(os.getpid(), SIGKILL)
    time.sleep(DEADLINE)  # Windows ends it when it gets to it


KILLED = SIGKILL if WINDOWS else -SIGKILL  # what `Children.join` returns then


def popen(command, **kwargs):
    """subprocess.Popen, once more where Wine could not: its CreateProcess fails now and then on a busy machine."""
    try:
        return subprocess.Popen(command, **kwargs)
    except OSError as error:
        if getattr(error, "winerror", None) != ERROR_INTERNAL_ERROR:
            raise
        return subprocess.Popen(command, **kwargs)


# ---------------------------------------------------------------- between processes


class Line:
    """A line between processes: what is said on it is heard in order, each byte once by each who listens.

    It travels to other processes, started in whatever way, and may be made before them.
    """

    def __init__(self):
        fd, self.path = tempfile.mkstemp(prefix="shmring-line-")
        os.close(fd)
        self._heard = 0

    def say(self, data=b"x"):
        with open(self.path, "ab", buffering=0) as file:
            file.write(data)

    def hear(self, count=1):
        """The next bytes, in time."""
        wait_until(lambda: os.path.getsize(self.path) >= self._heard + count, f"that {count} bytes are said")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._heard)
            data = file.read(count)
        self._heard += count
        return data

    def remove(self):
        os.unlink(self.path)


class Words:
    """Words that a test's processes share, outside of any ring."""

    def __init__(self, count=8):
        fd, self.path = tempfile.mkstemp(prefix="shmring-words-")
        os.ftruncate(fd, count * 8)
        self._map(fd)

    def _map(self, fd):
        self.map = mmap.mmap(fd, 0)
        os.close(fd)
        self.words = memoryview(self.map).cast("Q")

    def __getitem__(self, index):
        return self.words[index]

    def __setitem__(self, index, value):
        self.words[index] = value

    def __getstate__(self):
        return self.path

    def __setstate__(self, path):
        self.path = path
        self._map(os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0)))

    def remove(self):
        self.words.release()
        self.map.close()
        os.unlink(self.path)


# ---------------------------------------------------------------- functions that travel


class _Packer(pickle.Pickler):
    """Pickles also what only a fork would carry along: functions within functions, and segments."""

    def reducer_override(self, value):
        if isinstance(value, types.FunctionType) and ("<locals>" in value.__qualname__ or "<lambda>" in value.__name__):
            cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
            code = marshal.dumps(value.__code__)
            return _function, (code, value.__module__, value.__defaults__, value.__kwdefaults__, cells)
        if isinstance(value, os_backend().Segment):
            return os_backend().Segment.open, (value.name, True)
        return NotImplemented


def _function(code, module, defaults, kwdefaults, cells):
    names = importlib.import_module(module).__dict__
    function = types.FunctionType(marshal.loads(code), names, None, defaults, tuple(map(types.CellType, cells)))
    function.__kwdefaults__ = kwdefaults
    return function


def os_backend():
    from shmring._backend import os_backend

    return os_backend


def pack(function, args):
    """A call as bytes, with what a forked child would have inherited besides."""
    data = io.BytesIO()
    pickle.dump(sys.path, data)
    _Packer(data).dump((os_backend().SLICE, function, args))
    return data.getvalue()


def run_packed():
    """Make the call that comes on standard input: the whole life of a process."""
    sys.path[:] = pickle.load(sys.stdin.buffer)  # it leads to the modules of the rest
    os_backend().SLICE, function, args = pickle.load(sys.stdin.buffer)
    function(*args)
