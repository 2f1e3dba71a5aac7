"""What every test gets: a name of its own, children that are reaped, and a check that nothing is left."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from support import DARWIN, DEADLINE, KILLED, ROOT, SIGKILL, WINDOWS, Line, Words, descriptors, pack, popen, wait_until

from shmring import _ring
from shmring._backend import os_backend

__all__ = [
    "DEADLINE", "KILLED", "ROOT", "WINDOWS", "Line", "Words", "descriptors", "namespaces", "segments", "wait_until"
]  # fmt: skip

_numbers = itertools.count()


def segments():
    """The names of the files of this run's rings and doorbells: other programs have theirs. Windows has no files."""
    if WINDOWS:
        return set()
    played = sys.modules["darwin_on_linux"].left() if "darwin_on_linux" in sys.modules else set()
    ours = f"shmring.test-{os.getpid()}-", f"shmbell.test-{os.getpid()}-"
    return played | {entry for entry in os.listdir("/dev/shm") if entry.startswith(ours)}


def namespaces(*flags):
    """What has to stand before a command to run it in new Linux namespaces; skips where that is not allowed."""
    errors = []
    for command in (["unshare", *flags], ["unshare", "-r", *flags]):
        try:
            mount = [*command, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
            probe = subprocess.run(mount, stderr=subprocess.PIPE, text=True, timeout=DEADLINE)
        except OSError as error:
            errors.append(str(error))
        else:
            if probe.returncode == 0:
                return command
            errors.append(probe.stderr.strip())
    pytest.skip(f"no namespaces here: {errors}")


@pytest.fixture
def name():
    """A ring's name that no other test uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def seed():
    """What random tests begin with; printed with a failure, and SHMRING_SEED=... repeats it."""
    number = int(os.environ.get("SHMRING_SEED") or random.randrange(1 << 32))
    print(f"SHMRING_SEED={number}")
    return number


@pytest.fixture
def in_time():
    """A test of one thread that hangs fails after DEADLINE."""

    if WINDOWS:
        faulthandler.dump_traceback_later(DEADLINE, exit=True)
        yield
        faulthandler.cancel_dump_traceback_later()
        return

    late = []

    def too_late(*_):
        late.append(True)
        raise AssertionError

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert not late, f"the test hung for {DEADLINE} s"


_contract = {"collected": 0, "passed": 0}  # tests that hold this platform's backend to its contract


def pytest_runtest_logreport(report):
    _contract["passed"] += report.when == "call" and report.passed and "test_backend_contract" in report.nodeid


def pytest_sessionfinish(session):
    """A run that skips its own backend shows nothing, and fails."""
    if _contract["collected"] and not _contract["passed"] and not session.exitstatus:
        print("\nno test of this platform's own backend has passed")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_finish(session):
    """What there is by now is no test's garbage: looking through it after each test would take half of the time."""
    _contract["collected"] = sum("test_backend_contract" in item.nodeid for item in session.items)
    gc.collect()
    gc.freeze()


class Children:
    """Starts processes, and kills and reaps whatever is left of them."""

    def __init__(self):
        self._forked = []
        self._packed = {}  # by pid
        self._others = []

    def start(self, function, *args):
        """Run `function(*args)` in a process of its own, which ends with 0 if it returns; its pid.

        A forked child, or, where there are no forks, a new interpreter that gets what the function refers to
        pickled: rings, segments, `Line`s and `Words` are the same ones there, all else is a copy, as after a fork.
        """
        if not WINDOWS:
            return self.fork(function, *args)
        code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); from support import run_packed; run_packed()"
        process = popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        self._packed[process.pid] = process
        process.stdin.write(pack(function, args))
        process.stdin.close()
        return process.pid

    def kill(self, pid):
        """End a process that `start` or `fork` started, at once and from outside."""
        os.kill(pid, SIGKILL)
        assert self.join(pid) == KILLED

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
        """Wait for a process that `start` or `fork` started; its exit status, negative for a signal."""
        status = wait_until(lambda: self._poll(pid), f"the end of child {pid}")[0]
        return status

    def _poll(self, pid):
        if pid in self._packed:
            return self._packed[pid].poll() is not None and (self._packed.pop(pid).wait(),)
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
        """Start a Python that runs `code` (dedented), its output in pipes, as text; `prefix` is a command before it."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
        begin = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import support\n" if DARWIN else ""
        code = begin + textwrap.dedent(code)
        command = [*kwargs.pop("prefix", []), sys.executable, *kwargs.pop("options", []), "-c", code]
        process = popen(
            [*command, *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs,
        )  # fmt: skip
        self._others.append(process)
        return process

    def output(self, process, status=0):
        """Wait for a process that `python` started, which must end with `status`; what it printed."""
        output, errors = process.communicate(timeout=DEADLINE * 2)
        assert process.returncode == status, f"exit code {process.returncode}\n{output}{errors}"
        return output

    def stop_all(self):
        for pid in list(self._forked):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for process in (*self._packed.values(), *self._others):
            process.kill()
            if isinstance(process, subprocess.Popen):
                process.wait() if process.stdin and process.stdin.closed else process.communicate()
            else:
                process.join(DEADLINE)
                process.close()
        for started in (self._forked, self._packed, self._others):
            started.clear()


@pytest.fixture
def endless(monkeypatch):
    """No slices: nothing but the bells, deadlines and signals ends a wait. Started processes inherit it."""
    monkeypatch.setattr(os_backend, "SLICE", None)


@pytest.fixture
def shared(children):
    """Makes what processes share besides rings, `shared(Line)` or `shared(Words)`, and removes it after the test."""
    made = []

    def make(kind, *args):
        made.append(kind(*args))
        return made[-1]

    yield make
    children.stop_all()
    for thing in made:
        thing.remove()


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
    if WINDOWS:
        return
    from multiprocessing import forkserver, resource_tracker

    for helper in (forkserver._forkserver, resource_tracker._resource_tracker):
        with contextlib.suppress(Exception):
            helper._stop()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """No test leaves a segment, a descriptor, a thread or a child."""
    before = segments(), descriptors(), set(threading.enumerate()), len(_ring._open_rings)
    yield
    request.node.funcargs.clear()  # pytest still holds what the fixtures gave
    gc.collect()
    _stop_helpers_of_multiprocessing()
    wait_until(lambda: set(threading.enumerate()) <= before[2], "the end of the test's threads")
    assert len(_ring._open_rings) <= before[3], "the test left open handles"
    left = segments() - before[0]
    for entry in left:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{entry}")
    if left and "darwin_on_linux" in sys.modules:
        sys.modules["darwin_on_linux"].clear()
    assert not left, f"the test left segments: {left}"
    opened = {number: target for number, target in descriptors().items() if before[1].get(number) != target}
    assert not opened, f"the test left descriptors: {opened}"
    if not WINDOWS:
        with pytest.raises(ChildProcessError):
            assert os.waitpid(-1, os.WNOHANG) == "a child is left"
