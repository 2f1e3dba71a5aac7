"""What every test gets: a name of its own, children that are reaped, and a check that nothing is left."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout itself is what is tested, installed or not

DEADLINE = 30.0  # seconds that anything a test waits for may take
_numbers = itertools.count()


def wait_until(condition, what="the condition"):
    """Wait until `condition()` is true and return what it returned; fail after DEADLINE."""
    end = time.monotonic() + DEADLINE
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"{what} did not come true in {DEADLINE} s"
        time.sleep(0.001)


def segments():
    """The names of all rings' files."""
    return {entry for entry in os.listdir("/dev/shm") if entry.startswith("shmring.")}


def descriptors():
    """The descriptors open in this process, with what they lead to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}


@pytest.fixture
def name():
    """A ring's name that no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


class Children:
    """Starts processes, and kills and reaps whatever is left of them."""

    def __init__(self):
        self._forked = []
        self._others = []

    def fork(self, function, *args):
        """Run `function(*args)` in a forked child, which ends with 0 if it returns; the child's pid."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(int(DEADLINE) * 2)
                function(*args)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        self._forked.append(pid)
        return pid

    def join(self, pid):
        """Wait for a forked child; its exit status, negative for a signal."""
        status = wait_until(lambda: self._poll(pid), f"the end of child {pid}")[0]
        return status

    def _poll(self, pid):
        waited, status = os.waitpid(pid, os.WNOHANG)
        if not waited:
            return None
        self._forked.remove(pid)
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),)

    def spawn(self, function, *args, method="spawn"):
        """Start `function(*args)` in a new interpreter through multiprocessing."""
        process = multiprocessing.get_context(method).Process(target=function, args=args)
        process.start()
        self._others.append(process)
        return process

    def python(self, code, *args, **kwargs):
        """Start a Python that runs `code` (dedented), with its output in pipes, as text."""
        env = dict(os.environ, PYTHONPATH=str(ROOT), **kwargs.pop("env", {}))
        process = subprocess.Popen(
            [sys.executable, *kwargs.pop("options", []), "-c", textwrap.dedent(code), *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs,
        )  # fmt: skip
        self._others.append(process)
        return process

    def stop_all(self):
        for pid in list(self._forked):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for process in self._others:
            process.kill()
            if isinstance(process, subprocess.Popen):
                process.communicate()
            else:
                process.join(DEADLINE)
                process.close()


@pytest.fixture
def children():
    """Start processes with this; what is left of them is killed and reaped after the test."""
    started = Children()
    try:
        yield started
    finally:
        started.stop_all()


def _stop_helpers_of_multiprocessing():
    """Its resource tracker and fork server stay otherwise; they are not a test's own leftovers."""
    from multiprocessing import forkserver, resource_tracker

    for helper in (forkserver._forkserver, resource_tracker._resource_tracker):
        with contextlib.suppress(Exception):
            helper._stop()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No test leaves a segment, a descriptor, a thread or a child."""
    before = segments(), descriptors(), set(threading.enumerate())
    yield
    gc.collect()
    _stop_helpers_of_multiprocessing()
    wait_until(lambda: set(threading.enumerate()) <= before[2], "the end of the test's threads")
    left = segments() - before[0]
    for entry in left:
        os.unlink(f"/dev/shm/{entry}")
    assert not left, f"the test left segments: {left}"
    opened = {number: target for number, target in descriptors().items() if before[1].get(number) != target}
    assert not opened, f"the test left descriptors: {opened}"
    with pytest.raises(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == "a child is left"
