"""What is peculiar to Linux: files in /dev/shm, locks of open file descriptions, futexes, membarrier, forks."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the Linux backend is for Linux", allow_module_level=True)

import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import platform
import re
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

from conftest import DEADLINE, descriptors, namespaces, segments, wait_until
from support import GIL

from shmring import Ring, RingBusy, RingTimeout, _layout, _linux, _ring, unlink

LANE = _layout.LANE


@pytest.fixture
def endless(monkeypatch):
    """No slices: nothing but the bell, the deadline and signals ends a wait. Forked children inherit it."""
    monkeypatch.setattr(_linux, "SLICE", None)


def path_of(name):
    return f"/dev/shm/shmring.{name}"


# ---------------------------------------------------------------- numbers and sizes


def imported_on(children, machine, then):
    return children.python(
        f"""
        import os, sys
        real = os.uname()
        os.uname = lambda: os.uname_result((*real[:4], {machine!r}))
        {then}
        """
    )


@pytest.mark.parametrize("machine, futex, membarrier", [("x86_64", 202, 324), ("aarch64", 98, 283)])
def test_system_calls_have_the_numbers_of_the_machine(children, machine, futex, membarrier):
    show = "from shmring import _linux; print(_linux.SYS_futex, _linux.SYS_membarrier)"
    process = imported_on(children, machine, show)
    assert children.output(process).split() == [str(futex), str(membarrier)]


@pytest.mark.parametrize("machine", ["riscv64", "i686", "ppc64le", "armv7l", ""])
def test_an_unknown_machine_is_refused_by_name(children, machine):
    process = imported_on(children, machine, "import shmring")
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert re.search(rf"ImportError: .*\b{machine}", errors)


@pytest.mark.skipif(not Path("/usr/include/linux/futex.h").exists(), reason="the kernel's headers are not installed")
def test_constants_are_those_of_the_kernels_headers():
    found = {}
    for header in ("linux/futex.h", "linux/membarrier.h", "asm-generic/unistd.h"):
        text = Path("/usr/include", header).read_text()
        defines = re.findall(r"#define\s+(\w+)\s+(\(?\w[\w<> ]*\)?)", text)
        for name, value in defines + re.findall(r"(\w+)\s*= \(?([^,/\n]+?)\)?,", text):
            with contextlib.suppress(ValueError, SyntaxError, NameError):
                found[name] = eval(value, {}, {})
    for name in ("FUTEX_WAKE_OP", "FUTEX_WAIT", "FUTEX_WAIT_BITSET", "FUTEX_BITSET_MATCH_ANY", "FUTEX_OP_ADD"):
        assert getattr(_linux, name) == found[name], name
    for name in ("MEMBARRIER_CMD_GLOBAL_EXPEDITED", "MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED"):
        assert getattr(_linux, name) == found[name], name
    assert (found["__NR_futex"], found["__NR_membarrier"]) == (98, 283)
    for header in Path("/usr/include").glob("x86_64-linux-*/asm/unistd_64.h"):
        numbers = dict(re.findall(r"#define (\w+) (\d+)", header.read_text()))
        assert (numbers["__NR_futex"], numbers["__NR_membarrier"]) == ("202", "324")


def test_structures_have_the_sizes_and_offsets_of_64_bit_linux():
    timespec = _linux._Timespec
    assert (ctypes.sizeof(timespec), timespec.tv_sec.offset, timespec.tv_nsec.offset) == (16, 0, 8)
    assert ctypes.sizeof(ctypes.c_long) == ctypes.sizeof(ctypes.c_void_p) == 8
    packed = _linux._FLOCK.pack(1, 2, 3, 4, 5)
    assert len(packed) == 32
    fields = (0, 2), (2, 4), (8, 16), (16, 24), (24, 28)
    words = [int.from_bytes(packed[start:stop], sys.byteorder) for start, stop in fields]
    assert words == [1, 2, 3, 4, 5]
    # FUTEX_OP(op, oparg, cmp, cmparg) of <linux/futex.h>: op and oparg, nothing compared
    assert _linux._ADD_ONE.value == (_linux.FUTEX_OP_ADD & 0xF) << 28 | (1 & 0xFFF) << 12
    assert ctypes.c_uint32(_linux._ANY.value).value == _linux.FUTEX_BITSET_MATCH_ANY


def test_functions_of_libc_are_our_own():
    assert ctypes.CDLL(None).syscall is not _linux._waiting
    assert _linux._waiting is not _linux._quick
    assert _linux._waiting.restype is _linux._quick.restype is ctypes.c_long


# ---------------------------------------------------------------- the file and its name


def test_a_name_appears_only_when_the_ring_is_whole(name, monkeypatch):
    link = os.link

    def checked(source, *args, **kwargs):
        assert not os.path.exists(path_of(name)), "the file had a name before"
        data = Path(source).read_bytes()
        assert _layout.parse_header(data[:512], len(data), _linux.MACHINE, name).capacity == 4096
        link(source, *args, **kwargs)
        Ring.open(name).close()

    monkeypatch.setattr(_linux.os, "link", checked)
    with Ring.create(name, 4096):
        assert os.stat(path_of(name)).st_nlink == 1


def test_a_creator_that_dies_before_the_link_leaves_nothing(name, monkeypatch, children):
    monkeypatch.setattr(_linux.os, "link", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    assert children.join(children.fork(Ring.create, name)) == -signal.SIGKILL
    monkeypatch.undo()
    assert f"shmring.{name}" not in segments()
    Ring.create(name).close()


def test_a_creator_whose_link_fails_leaves_nothing(name, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = descriptors(), segments()
    monkeypatch.setattr(_linux.os, "link", fail)
    with pytest.raises(OSError) as caught:
        Ring.create(name)
    assert caught.value.errno == errno.ENOSPC
    del caught
    gc.collect()
    assert (descriptors(), segments()) == before


def test_the_mode_is_what_was_asked_for_whatever_the_umask(name):
    before = os.umask(0o777)
    try:
        for mode in (0o600, 0o660, 0o666, 0o640):
            with Ring.create(name, mode=mode):
                assert os.stat(path_of(name)).st_mode & 0o7777 == mode
    finally:
        os.umask(before)


def test_two_last_handles_that_close_at_the_same_time_leave_no_name(name, monkeypatch):
    """The second one closes in the very moment when the first has found that it is not the last."""
    first, second = Ring.create(name), Ring.open(name)
    lock = _linux._lock

    def interleaved(fd, kind, byte):
        result = lock(fd, kind, byte)
        if (kind, byte, result) == (fcntl.F_WRLCK, _layout.PRESENCE, False):
            monkeypatch.undo()
            second.close()
        return result

    monkeypatch.setattr(_linux, "_lock", interleaved)
    first.close()
    second.close()
    assert f"shmring.{name}" not in segments()


def test_create_clears_away_what_a_crash_of_everybody_left(name, children):
    def crash():
        ring = Ring.create(name, writers=1)
        ring.write(b"unread")
        os.kill(os.getpid(), signal.SIGKILL)

    assert children.join(children.fork(crash)) == -signal.SIGKILL
    assert os.path.exists(path_of(name))
    with pytest.raises(FileNotFoundError, match=name):
        Ring.open(name)
    with Ring.create(name, writers=3) as ring:
        assert ring.try_read() is None
        assert ring.stats().lanes == 3


# ---------------------------------------------------------------- claims are locks of open file descriptions


def test_a_claim_ends_at_close_although_the_memory_is_held(name):
    with Ring.create(name, writers=1) as ring:
        writer = Ring.open(name)
        writer.write(b"1")
        view, kept = memoryview(writer._segment.map), writer._segment.map
        with pytest.raises(RingBusy):
            ring.write(b"2")
        writer.close()
        ring.write(b"2")
        assert ring.read_many() == [b"1", b"2"]
        assert len(view) == len(kept), "mmap holds a duplicate of its descriptor, not of the one with the locks"


# ---------------------------------------------------------------- forks


def gone(pid):
    """Has the kernel torn this process down? It need not be our child, and nobody need have waited for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def family(children, name, roles):
    """A forked parent with the given roles of a ring, and its forked child. (parent's pid, what ends the child)"""
    ready, say = os.pipe()
    told, tell = os.pipe()

    def parent():
        os.close(tell), os.close(ready)
        ring = Ring.open(name)
        roles(ring)
        if os.fork() == 0:
            try:
                signal.alarm(int(DEADLINE))
                os.write(say, b"%d" % os.getpid())
                os.read(told, 1)
            finally:
                os._exit(0)
        os.read(told, 1)

    pid = children.fork(parent)
    orphan = int(os.read(ready, 99))
    for end in (told, say, ready):
        os.close(end)

    def end():
        assert not gone(orphan)
        os.close(tell)
        wait_until(lambda: gone(orphan), "the end of the orphan")

    return pid, end


def test_a_dead_owners_forked_child_keeps_no_role(name, children):
    with Ring.create(name, writers=1) as ring:
        pid, end = family(children, name, lambda mine: (mine.write(b"1"), mine.try_read(), mine.write(b"2")))
        with pytest.raises(RingBusy):
            ring.write(b"3")
        with pytest.raises(RingBusy):
            ring.try_read()
        os.kill(pid, signal.SIGKILL)
        children.join(pid)
        ring.write(b"3")
        assert ring.read_many() == [b"2", b"3"]
        end()


def test_a_forked_child_is_present(name, children):
    ring = Ring.create(name)
    pid, end = family(children, name, lambda mine: None)
    os.kill(pid, signal.SIGKILL)
    children.join(pid)
    ring.close()
    Ring.open(name).close()  # the orphan has it open yet
    end()
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    unlink(name)  # it went without closing


def test_a_forked_child_has_a_handle_that_works_and_no_role(name, children):
    with Ring.create(name, writers=2) as ring:
        ring.write(b"parent 1")
        assert ring.read() == b"parent 1"

        def child():
            with pytest.raises(RingBusy):
                ring.try_read()
            ring.write(b"child 1")
            assert ring.stats().lanes_in_use == 2

        assert children.join(children.fork(child)) == 0
        ring.write(b"parent 2")
        assert sorted(ring.read_many()) == [b"child 1", b"parent 2"]
        assert ring.stats().lanes_in_use == 1


def test_a_forked_child_outlives_a_parent_that_closes_at_once(name, children):
    ring = Ring.create(name)
    told, tell = os.pipe()

    def child():
        os.read(told, 1)  # the parent has closed
        ring.write(b"still here")
        with Ring.open(name) as other:
            assert other.read() == b"still here"
        ring.close()
        assert f"shmring.{name}" not in segments(), "the child was the last holder"

    pid = children.fork(child)
    ring.close()
    os.write(tell, b"x")
    assert children.join(pid) == 0
    os.close(told), os.close(tell)


def test_a_forked_child_that_closes_takes_nothing_from_its_parent(name, children):
    with Ring.create(name, writers=1) as ring, Ring.open(name) as other:
        ring.write(b"1")
        assert ring.read() == b"1"
        assert children.join(children.fork(ring.close)) == 0
        assert children.join(children.fork(lambda: None)) == 0
        with pytest.raises(RingBusy):
            other.write(b"2")
        with pytest.raises(RingBusy):
            other.try_read()
        Ring.open(name).close()


def test_generations_of_forks_each_have_a_handle_of_their_own(name, children):
    with Ring.create(name, writers=8) as ring:

        def descend(depth):
            ring.write(b"%d" % depth)
            if depth:
                pid = os.fork()
                if pid == 0:
                    descend(depth - 1)
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0

        assert children.join(children.fork(descend, 5)) == 0
        assert sorted(ring.read_many()) == [b"%d" % depth for depth in range(6)]
        assert ring.stats().lanes_in_use == 0


def test_a_forked_child_that_goes_on_iterating_takes_nothing_of_its_parents(name, children):
    messages = [b"%d" % number for number in range(100)]
    with Ring.create(name, writers=1) as ring, Ring.open(name) as writer:
        writer.write_many(messages)
        iterator = iter(ring)
        seen = [next(iterator) for _ in range(3)]

        def child():
            with pytest.raises(RingBusy):
                next(iterator)

        assert children.join(children.fork(child)) == 0
        seen += [next(iterator) for _ in range(97)]
        assert seen == messages


# These scripts' own hook is registered before the ring's: `before` hooks run in reverse order, so after it.

FORK_SCRIPT = """
import gc, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
signal.alarm(20)
name = sys.argv[1]
before = lambda: None
os.register_at_fork(before=lambda: before())
from shmring import Ring, RingBusy, RingTimeout, _linux
_linux.SLICE = None

def started(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread

def wait_until(condition):
    while not condition():
        time.sleep(0.001)

def shared_memory():
    gc.collect()
    open_files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            open_files.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass  # what listdir itself had open
    return [path for path in open_files if "/dev/shm" in path]
"""


def test_a_forked_child_does_not_announce_that_its_parents_reader_is_awake(name, children):
    """What the child inherited of its parent's state goes away, whenever that is, and touches no shared word."""
    process = children.python(
        FORK_SCRIPT
        + """if True:
        with Ring.create(name, spin=0) as ring, Ring.open(name) as writer:
            writer.write(b"0")
            assert ring.read() == b"0"
            gc.disable()
            if os.fork() == 0:
                writer.write(b"1")  # a claim, which rings in any case
                wait_until(lambda: writer.stats().messages_out == 2 and writer.stats().readers_parked)
                gc.collect()
                writer.write(b"2")
                os._exit(0)
            assert ring.read() == b"1"
            assert ring.read() == b"2"
            assert os.wait()[1] == 0
        """,
        name,
    )
    children.output(process)


def test_a_forked_child_does_not_announce_that_its_parents_writer_is_awake(name, children):
    process = children.python(
        FORK_SCRIPT
        + """if True:
        with Ring.create(name, 4096, writers=1, spin=0) as ring, Ring.open(name) as reader:
            while ring.try_write(bytes(1000)):
                pass
            gc.disable()
            if os.fork() == 0:
                assert reader.read() == bytes(1000)  # a claim, which rings in any case
                wait_until(lambda: reader.stats().messages_in == 5 and reader.stats().writers_parked)
                gc.collect()
                assert reader.read() == bytes(1000)
                os._exit(0)
            ring.write(bytes(1000))
            ring.write(bytes(1000))
            assert os.wait()[1] == 0
        """,
        name,
    )
    children.output(process)


def test_a_thread_that_sleeps_during_a_fork_is_woken_afterwards(name, children):
    process = children.python(
        FORK_SCRIPT
        + """if True:
        with Ring.create(name, spin=0) as ring, Ring.open(name) as writer:
            got = []
            thread = started(lambda: got.append(ring.read()))
            wait_until(lambda: ring.stats().readers_parked)
            if os.fork() == 0:
                gc.collect()
                writer.write(b"from the child")
                os._exit(0)
            thread.join()
            assert got == [b"from the child"]
            assert os.wait()[1] == 0
        """,
        name,
    )
    children.output(process)


def test_a_handle_that_is_closed_while_another_thread_forks_leaves_nothing(name, children):
    process = children.python(
        FORK_SCRIPT
        + """if True:
        ring = Ring.create(name)
        forking, closed = threading.Event(), threading.Event()

        def before():
            forking.set()
            closed.wait(10)

        def fork():
            if os.fork() == 0:
                os._exit(0)
            os.wait()

        thread = started(fork)
        forking.wait()
        started(lambda: (ring.close(), closed.set())).join(1)  # it may wait for the fork, or not
        closed.set()
        thread.join()
        ring.close()
        del ring
        assert shared_memory() == [], shared_memory()
        try:
            Ring.open(name)
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("somebody still seems to have the ring open")
        """,
        name,
    )
    try:
        children.output(process)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unlink(name)  # the child went without closing


def test_two_threads_that_fork_at_once_make_children_with_a_handle_each(name, children):
    process = children.python(
        FORK_SCRIPT
        + """if True:
        ring = Ring.create(name, writers=1)
        forking, forked = threading.Event(), threading.Event()
        first_told, first_tell = os.pipe()
        second_told, second_tell = os.pipe()
        statuses = {}

        def before():
            if threading.current_thread() is first:
                forking.set()
                forked.wait(10)

        def fork_first():
            pid = os.fork()
            if pid == 0:
                try:
                    ring.write(b"first")
                except RingBusy:
                    os._exit(7)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            statuses["first"] = os.waitpid(pid, 0)[1] >> 8

        def fork_second():
            pid = os.fork()
            if pid == 0:
                try:
                    ring.write(b"second")
                    os.write(first_tell, b"x")
                    os.read(second_told, 1)
                    os._exit(7)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os.write(first_tell, b"x")
                os._exit(1)
            os.read(first_told, 1)
            forked.set()
            first.join()
            os.write(second_tell, b"x")
            statuses["second"] = os.waitpid(pid, 0)[1] >> 8

        first, second = threading.Thread(target=fork_first), threading.Thread(target=fork_second)
        first.start()
        forking.wait()
        second.start()
        second.join(2)  # it may have to wait for the first one's fork
        forked.set()
        second.join()
        print(statuses)
        assert set(statuses.values()) == {7}, statuses
        ring.close()
        del ring
        assert shared_memory() == [], shared_memory()
        """,
        name,
    )
    try:
        children.output(process)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unlink(name)


# ---------------------------------------------------------------- descriptors


def test_no_descriptor_survives_exec(segment):
    other = _linux.Segment.open(segment.name, False)
    assert other.claim(LANE)
    witness, end = os.pipe()
    os.set_inheritable(witness, True)
    code = """if True:
        import os
        for number in os.listdir("/proc/self/fd"):
            try:
                print(number, os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                pass  # what listdir itself had open
    """
    listing = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE, text=True, timeout=DEADLINE, check=True
    ).stdout
    assert f"{witness} pipe:" in listing, "an inheritable one does survive"
    assert "/dev/shm" not in listing
    os.close(witness), os.close(end)
    other.close()


def test_closerange_over_a_live_handle_gives_a_clear_error_and_spares_the_descriptors_of_others(name, children):
    def child():
        ring = Ring.create(name)
        ring.write(b"1")
        os.closerange(3, 256)
        strangers = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
        with pytest.raises(OSError, match=name) as caught:
            ring.read()  # has to claim the reader's role
        assert caught.value.errno == errno.EBADF
        ring.close()
        for stranger in strangers:
            os.fstat(stranger)
        assert ring.closed

    assert children.join(children.fork(child)) == 0
    unlink(name)  # whoever lost its descriptor cannot remove the name


def test_after_closerange_a_new_handle_of_the_same_ring_is_spared(name, children):
    with Ring.create(name, writers=1):

        def child():
            os.closerange(3, 256)
            lost = Ring.open(name)
            os.closerange(3, 256)
            mine = Ring.open(name)  # gets the same numbers
            mine.write(b"1")
            lost.close()
            with Ring.open(name) as other, pytest.raises(RingBusy):
                other.write(b"2")

        assert children.join(children.fork(child)) == 0


@contextlib.contextmanager
def descriptors_left(count):
    """Let this process open `count` more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(descriptors()) + 20, hard))
    fillers = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(count):
            os.close(fillers.pop())
        yield
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", range(8))
def test_without_descriptors_create_says_so_and_leaves_nothing(name, left):
    gc.collect()
    before = descriptors(), segments()
    failed = None
    with descriptors_left(left):
        try:
            Ring.create(name).close()
        except OSError as error:
            failed = error.errno, str(error)
    gc.collect()
    assert (descriptors(), segments()) == before
    if left < 3 or failed:
        assert failed[0] == errno.EMFILE and name in failed[1], failed
    assert not failed or left < 7


@pytest.mark.parametrize("left", range(7))
def test_without_descriptors_open_says_so_and_leaves_nothing(name, left):
    with Ring.create(name) as ring:
        gc.collect()
        before = descriptors(), segments()
        failed = None
        with descriptors_left(left):
            try:
                Ring.open(name).close()
            except OSError as error:
                failed = error.errno, str(error)
        gc.collect()
        assert (descriptors(), segments()) == before
        if left < 3 or failed:
            assert failed[0] == errno.EMFILE and name in failed[1], failed
        assert not failed or left < 6
        ring.write(b"untouched")
        assert ring.read() == b"untouched"


@pytest.mark.parametrize("left", range(3))
def test_without_descriptors_an_open_ring_works_and_closes(name, left):
    with Ring.create(name) as ring, Ring.open(name) as other, descriptors_left(left):
        other.write(b"1")
        assert ring.read() == b"1"
        with pytest.raises(RingTimeout):
            ring.read(timeout=0.01)
    assert f"shmring.{name}" not in segments()


def test_without_descriptors_a_forked_child_gets_clear_errors_and_its_parent_works_on(name, children, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: unraisable.append(str(hook.exc_value)))
    with Ring.create(name, writers=2) as ring:
        ring.write(b"1")

        def child():
            for use in (lambda: ring.write(b"2"), ring.read):
                with pytest.raises(OSError, match=name) as caught:
                    use()
                assert caught.value.errno in (errno.EBADF, errno.EMFILE)
            ring.close()

        with descriptors_left(0):
            pid = children.fork(child)
        assert children.join(pid) == 0
        assert ring.read() == b"1"
        with Ring.open(name) as other:
            other.write(b"2")
        assert ring.read() == b"2"
    assert all(str(errno.EMFILE) in text for text in unraisable), "a fork that goes wrong may say so, and why"


# ---------------------------------------------------------------- memory


def test_reserve_takes_memory_for_good_and_changes_no_byte(segment):
    start, capacity = segment.layout.lane_bytes(0), segment.layout.capacity
    segment.map[start] = 9
    blocks = os.stat(path_of(segment.name)).st_blocks
    for _ in range(2):
        segment.reserve(start, capacity)
        assert os.stat(path_of(segment.name)).st_blocks == blocks + (capacity - mmap.PAGESIZE) // 512
    assert segment.map[start : start + capacity] == b"\x09" + bytes(capacity - 1)


SMALL = """
import errno, os, signal, subprocess, sys
from shmring import Ring, RingTimeout, unlink
signal.alarm(30)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", "/dev/shm"], check=True)

def refused(function, *args):
    try:
        function(*args)
    except OSError as error:
        assert error.errno == errno.ENOSPC and "small" in str(error), error
    else:
        raise AssertionError(f"{function} had memory")

def fill():
    with open("/dev/shm/filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
    assert os.statvfs("/dev/shm").f_bfree == 0
"""


def test_without_memory_create_says_so_and_leaves_nothing(children):
    process = children.python(
        SMALL
        + """if True:
        def create():
            return Ring.create("small", 4096, writers=4096)  # its control words alone are more than there is
        refused(create)
        assert os.listdir("/dev/shm") == []
        fill()
        refused(Ring.create, "small")
        assert os.listdir("/dev/shm") == ["filler"]
        os.unlink("/dev/shm/filler")
        Ring.create("small").close()
        refused(create)
        assert os.listdir("/dev/shm") == []
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_without_memory_the_first_write_says_so_and_everything_goes_on(children):
    process = children.python(
        SMALL
        + """if True:
        with Ring.create("small", 65536, writers=4) as first, Ring.open("small") as second, \\
                Ring.open("small") as third, Ring.open("small") as fourth:
            first.write(b"1")
            second.write(b"2")
            assert sorted(first.read_many()) == [b"1", b"2"]
            free = os.statvfs("/dev/shm").f_bfree
            for attempt in (third.write, third.try_write, lambda data: third.write_many([data])) * 2:
                refused(attempt, b"3")
                assert first.stats().lanes_in_use == 2, "the lane stays free"
                assert os.statvfs("/dev/shm").f_bfree == free, "what there was is not taken"
            for number in range(5000):  # several times round
                first.write(b"%d" % number + bytes(100))
                second.write(b"%d" % number + bytes(100))
                assert sorted(first.read_many()) == [b"%d" % number + bytes(100)] * 2
            second.close()
            third.write(b"3")  # the lane that has its memory already
            assert first.read() == b"3"
            refused(fourth.write, b"4")
            subprocess.run(["mount", "-o", "remount,size=1m", "/dev/shm"], check=True)
            fourth.write(b"4")
            assert first.read() == b"4"
            assert first.stats().lanes_in_use == 3
        assert os.listdir("/dev/shm") == []
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_without_memory_whoever_writes_no_message_needs_none(children):
    process = children.python(
        SMALL
        + """if True:
        with Ring.create("small", 65536, writers=2, spin=0) as ring:
            fill()
            with Ring.open("small") as other:
                assert other.try_read() is None
                try:
                    other.read(timeout=0.01)
                except RingTimeout:
                    pass
                assert other.stats().messages_in == 0
                refused(ring.write, b"1")
                os.unlink("/dev/shm/filler")
                ring.write(b"1")
                assert other.read() == b"1"
                fill()  # the lane has its memory for good
                for size in (0, 1, 4095, 65000, 20000, ring.max_message):
                    message = bytes([size % 251]) * size
                    while not ring.try_write(message):
                        assert other.try_read() is None  # padding
                    assert other.read() == message
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_without_memory_a_reader_that_sleeps_is_woken_by_those_who_have_some(children):
    process = children.python(
        SMALL
        + """if True:
        import threading
        from shmring import _linux
        _linux.SLICE = None
        with Ring.create("small", 65536, writers=4, spin=0) as ring, \\
                Ring.open("small") as first, Ring.open("small") as second:
            first.write(b"0")
            assert ring.read() == b"0"
            fill()
            got = []
            thread = threading.Thread(target=lambda: got.append(ring.read()))
            thread.start()
            while not ring.stats().readers_parked:
                pass
            refused(second.write, b"2")
            first.write(b"1")
            thread.join()
            assert got == [b"1"]
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_a_read_only_directory_is_a_clear_error(children):
    process = children.python(
        SMALL
        + """if True:
        ring = Ring.create("small", 4096)
        ring.write(b"1")
        subprocess.run(["mount", "--bind", "/dev/shm", "/dev/shm"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", "/dev/shm"], check=True)
        for function, name in ((Ring.create, "small-2"), (Ring.open, "small"), (unlink, "small")):
            try:
                function(name)
            except OSError as error:
                assert error.errno == errno.EROFS and repr(name) in str(error), error
            else:
                raise AssertionError("it was not read-only")
        assert ring.read() == b"1"
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_a_missing_directory_is_a_clear_error(children):
    process = children.python(
        SMALL
        + """if True:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev"], check=True)
        for function, text in ((Ring.create, "/dev/shm"), (Ring.open, "small"), (unlink, "small")):
            try:
                function("small")
            except FileNotFoundError as error:
                assert text in str(error) and "small" in str(error), error
            else:
                raise AssertionError("where?")
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


# ---------------------------------------------------------------- sleeping and waking


@pytest.fixture
def segment(name):
    segment = _linux.Segment.create(name, _layout.new_layout(1 << 20, 2, "one", False), 0o600, False)
    yield segment
    segment.close()


def bell_of(segment):
    return segment.layout.readers_offset + _layout.READER_BELL


def value(segment):
    """What a bell is: a futex."""
    return segment._bells[bell_of(segment) >> 2]


def sleep_while(segment, seen):
    """Sleep as long as the bell has this value."""
    while value(segment) == seen:
        segment.wait(bell_of(segment), seen, None)


def in_threads(function, *args, number=1):
    threads = [threading.Thread(target=function, args=args, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    return threads


def end(threads):
    for thread in threads:
        thread.join(DEADLINE)
    return not any([thread.is_alive() for thread in threads])


@pytest.mark.parametrize("seen", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_wait_sleeps_and_wakes_at_every_value_of_the_bell(segment, endless, seen):
    segment._bells[bell_of(segment) >> 2] = seen
    assert segment.note(bell_of(segment)) == seen
    threads = in_threads(sleep_while, segment, seen)
    threads[0].join(0.02)
    assert threads[0].is_alive()
    segment.ring(bell_of(segment))
    assert end(threads)
    assert value(segment) == (seen + 1) & 0xFFFFFFFF


def test_one_ring_wakes_everybody_who_sleeps_on_the_bell_whatever_the_handle(segment, children, endless):
    other = _linux.Segment.open(segment.name, False)
    threads = [*in_threads(sleep_while, segment, 0, number=2), *in_threads(sleep_while, other, 0, number=2)]
    forked = [children.fork(sleep_while, segment, 0) for _ in range(3)]
    threads[0].join(0.1)
    segment.ring(bell_of(segment))
    assert end(threads)
    assert [children.join(pid) for pid in forked] == [0, 0, 0]
    other.close()


def test_rings_are_counted_and_change_nothing_else(segment):
    before = bytes(segment.map)
    for _ in range(1000):
        segment.ring(bell_of(segment))
    assert value(segment) == 1000
    segment._bells[bell_of(segment) >> 2] = 0
    assert bytes(segment.map) == before


def test_rings_of_many_processes_are_all_remembered(segment, children):
    other = _linux.Segment.open(segment.name, False)

    def ring(handle):
        for _ in range(20_000):
            handle.ring(bell_of(handle))

    assert [children.join(pid) for pid in [children.fork(ring, handle) for handle in (segment, other)]] == [0, 0]
    assert value(segment) == 40_000
    other.close()


def without_membarrier(monkeypatch, *which):
    """Have the given commands fail in this process and its forked children, as under a strict seccomp profile."""
    monkeypatch.setattr(_linux, "_membarrier", _linux._Membarrier())
    for command in which:
        monkeypatch.setattr(_linux, command, ctypes.c_int(1 << 30))


def wake_each_other(name, children, turns=30):
    """A reader that sleeps before each message, and a writer in another process that sleeps before each answer."""
    with Ring.create(f"{name}-to", spin=0) as to, Ring.create(f"{name}-from", 4096, spin=0) as back:

        def answer():
            for _ in range(turns):
                back.write(to.read())

        pid = children.fork(answer)
        for number in range(turns):
            if not number % 5:
                wait_until(lambda: to.stats().readers_parked, "the sleep of the other")
            to.write(b"%d" % number)
            assert back.read(timeout=DEADLINE) == b"%d" % number
        assert children.join(pid) == 0


@pytest.mark.parametrize("which", [(), ("_REGISTER",), ("_EXPEDITE",), ("_REGISTER", "_EXPEDITE")], ids="+".join)
def test_messages_wake_sleepers_whether_membarrier_works_or_not(name, children, endless, monkeypatch, which):
    without_membarrier(monkeypatch, *which)
    wake_each_other(name, children)
    assert ("no membarrier (EINVAL)" in _linux.describe()) == bool(which)


def test_a_missing_membarrier_is_in_the_rings_backend(name, monkeypatch):
    without_membarrier(monkeypatch)
    monkeypatch.setattr(_linux, "_MEMBARRIER", ctypes.c_long(100_000))
    with Ring.create(name, spin=0) as ring:
        assert ring.backend == "linux: futex, OFD locks, membarrier"
        ring.write(b"1")
        assert ring.read() == b"1"

        def waits_in_vain():
            with pytest.raises(RingTimeout):
                ring.read(timeout=0.01)
            return "no membarrier (ENOSYS)" in ring.backend

        wait_until(waits_in_vain, "the fence of a sleep")  # if the time is up before it is let run, it does not sleep


def test_who_cannot_register_fences_by_himself(name, monkeypatch):
    without_membarrier(monkeypatch, "_REGISTER")
    with Ring.create(name) as ring:
        fence = ring._segment.waker_fence()
        assert callable(fence)
        ring.write(b"1")
        ring.read()
        assert callable(ring._writer._fence) and callable(ring._reader._fence)


def test_who_cannot_make_others_fence_looks_again_by_himself(name, children, endless, monkeypatch):
    """What the sleeper cannot see for lack of a fence is a bell that does not ring: here none does."""
    with Ring.create(name, 4096, writers=2, spin=0) as ring:

        def write_unheard():
            monkeypatch.setattr(_linux.Segment, "ring", lambda segment, bell: None)
            ring.write(b"1")  # its claim would ring
            wait_until(lambda: ring.stats().readers_parked)
            ring.write(b"2")

        without_membarrier(monkeypatch, "_EXPEDITE")
        pid = children.fork(write_unheard)
        assert ring.read(timeout=DEADLINE) == b"1"
        assert ring.read() == b"2"
        assert children.join(pid) == 0


def test_membarrier_is_registered_once_and_inherited_by_forks(name, monkeypatch, children):
    without_membarrier(monkeypatch)
    with Ring.create(name, writers=3) as ring, Ring.open(name) as other:
        assert _linux._membarrier.registered is None, "not before the first claim"
        ring.write(b"1")
        registered = _linux._membarrier.registered
        assert registered is not None
        monkeypatch.setattr(_linux, "_waiting", None)  # a second call would fail
        other.write(b"2")

        def child():
            ring.write(b"3")
            # EPERM would mean that this process is not registered: private commands say so, this one does not.
            assert _linux._membarrier.registered is registered

        assert children.join(children.fork(child)) == 0


def test_endless_waits_are_woken_in_both_directions(name, children, endless):
    wake_each_other(name, children, 200)


def test_slices_serve_signals_only(name, children, endless):
    """Blocked writers and readers with no slices, no deadline and no spinning: only the bells move them."""
    messages = [b"%d" % number + bytes(900) for number in range(3000)]
    with Ring.create(name, 4096, writers=1, spin=0) as ring:

        def write():
            for message in messages:
                ring.write(message)

        pid = children.fork(write)
        assert [ring.read() for _ in messages] == messages
        assert children.join(pid) == 0


def test_nobody_spins_on_one_processor_unless_told_to(name, children, monkeypatch):
    monkeypatch.setattr(_ring, "SPIN", 0.2)

    def child():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with Ring.create(name) as ring, Ring.create(f"{name}-2", spin=0.2) as told:
            assert (ring._read_spin.seconds(), told._read_spin.seconds()) == (0, 0.2)
            before = time.process_time()
            with pytest.raises(RingTimeout):
                ring.read(timeout=0.3)
            assert time.process_time() - before < 0.02

    assert children.join(children.fork(child)) == 0


def test_two_processes_on_one_processor_talk(name, children, endless):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        wake_each_other(name, children, 200)
    finally:
        os.sched_setaffinity(0, before)


def test_a_lane_in_use_is_never_taken_for_a_damaged_one(name, children):
    """A claimant looks at words that move while it looks."""
    with Ring.create(name, 4096, writers=1) as ring, Ring.open(name) as late:
        told, tell = os.pipe()

        def write():
            ring.write(b"x")
            os.write(tell, b"x")
            while True:
                ring.write(b"x" * 100)

        pid = children.fork(write)
        os.read(told, 1)

        def read():
            while True:
                ring.read()

        reader = children.fork(read)
        try:
            for _ in range(20_000):
                with pytest.raises(RingBusy):
                    late.try_write(b"y")
        finally:
            for child in (pid, reader):
                os.kill(child, signal.SIGKILL)
                children.join(child)
            os.close(told), os.close(tell)


def test_importing_starts_nothing_and_touches_nothing(children):
    process = children.python(
        """
        import os, threading
        before = os.listdir("/proc/self/fd")
        registered = []
        os.register_at_fork = lambda **hooks: registered.append(hooks)
        import shmring
        assert os.listdir("/proc/self/fd") == before
        assert not shmring._linux._segments
        assert threading.active_count() == 1
        assert registered == []
        assert shmring._linux._membarrier.registered is None
        """
    )
    children.output(process)


# ---------------------------------------------------------------- tidying up doorbells


def doorbells(name):
    return [f"/dev/shm/{entry}" for entry in os.listdir("/dev/shm") if entry.startswith(f"shmbell.{name}.")]


def test_a_doorbell_is_a_stray_once_its_ring_has_gone_and_nobody_has_it(name, children):
    def ring_unlink_and_die():
        ring = Ring.create(name, 4096)
        ring.attach_doorbell()
        ring.unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    assert children.join(children.fork(ring_unlink_and_die)) == -signal.SIGKILL
    (path,) = doorbells(name)
    assert path in _linux.strays(True) and doorbells(name), "a dry run removes nothing"
    assert path in _linux.strays(False) and not doorbells(name)
    assert path not in _linux.strays(False)


def test_a_doorbell_of_a_ring_that_is_there_is_no_stray(name):
    with Ring.create(name, 4096, keep=True) as ring:
        ring.attach_doorbell()
        (path,) = doorbells(name)
        for dry in (True, False):
            assert path not in _linux.strays(dry)
    with Ring.open(name) as ring:
        os.mkfifo(path)  # as who was killed would have left it
        for dry in (True, False):
            assert path not in _linux.strays(dry)
        ring.unlink()
    assert not doorbells(name)


def test_a_doorbell_of_a_ring_that_lost_its_name_rings_on_whoever_tidies_up(name):
    with Ring.create(name, 4096) as ring, Ring.open(name) as other:
        ring.attach_doorbell()
        ring.unlink()
        for dry in (True, False):
            assert not set(doorbells(name)) & set(_linux.strays(dry))
        assert ring.try_read() is None
        other.write(b"x")
        assert ring.wait_doorbell(DEADLINE) and os.read(ring.fileno(), 1) == b"!"


def test_a_doorbell_that_is_made_while_somebody_tidies_up_is_a_new_one_if_need_be(name, monkeypatch):
    """The FIFO is removed after it was opened, or before; or somebody who removes it is stopped in the middle of it."""
    real = _linux._keep
    removed = []

    def keep(path, fd):
        if len(removed) < 3:
            removed.append(path)
            os.unlink(path)
        return real(path, fd)

    monkeypatch.setattr(_linux, "_keep", keep)
    with Ring.create(name, 4096) as ring:
        ring.attach_doorbell()
        assert len(removed) == 3 and os.path.samestat(os.stat(doorbells(name)[0]), os.fstat(ring.fileno()))

    with Ring.create(name, 4096) as ring:
        path = _linux.DIRECTORY + "/" + _linux._doorbells(name, ring._segment.layout.nonce)
        path += str(ring._segment.layout.readers_offset + _layout.READER_BELL)
        os.mkfifo(path)
        with open(os.open(path, os.O_RDWR), "rb", buffering=0) as stopped:
            fcntl.flock(stopped, fcntl.LOCK_EX)
            monkeypatch.setattr(_linux, "REMOVER_TRIES", 10)
            with pytest.raises(RingBusy, match="doorbell"):
                ring.attach_doorbell()
        ring.attach_doorbell()


def test_a_doorbell_that_is_attached_between_the_look_and_the_removal_stays(name, monkeypatch):
    """Its FIFO was left by who was killed: nobody has it open, until somebody has it locked."""
    real = _linux.note_open
    with Ring.create(name, 4096) as ring:
        ring.attach_doorbell()
        (path,) = doorbells(name)
    with Ring.create(name, 4096) as ring:
        path = path.replace(path.split(".")[-2], ring._segment.layout.nonce.hex())
        os.mkfifo(path)
        ring.unlink()

        def note_open(noted, opened, flags, *more):
            if opened == path and not flags & os.O_WRONLY:
                ring.attach_doorbell()
            return real(noted, opened, flags, *more)

        monkeypatch.setattr(_linux, "note_open", note_open)
        assert path not in _linux.strays(False) and doorbells(name) == [path]
        assert os.path.samestat(os.stat(path), os.fstat(ring.fileno()))


def test_what_only_looks_like_a_doorbell_is_left_alone(name):
    for entry in (f"shmbell.{name}", f"shmbell.{name}.no-hex.0", f"shmbell.{name}.{bytes(16).hex()}.0"):
        Path("/dev/shm", entry).write_text("")
    try:
        assert not [path for path in _linux.strays(False) if name in path]
    finally:
        for entry in os.listdir("/dev/shm"):
            if entry.startswith(f"shmbell.{name}"):
                os.unlink(f"/dev/shm/{entry}")


# ---------------------------------------------------------------- memory of messages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not GIL, reason="another malloc than glibc's")
def test_a_batch_of_long_messages_takes_the_memory_of_the_last_one(children, name):
    """Given back to the system in between, each page of it is a fault: 256 a message."""
    process = children.python(
        """
        import resource, sys
        from shmring import Ring
        ring = Ring.create(sys.argv[1], 4 << 20, writers=1)
        message, kept = bytes(1_000_000), []
        for lap in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            ring.write_many([message] * 4)
            kept = ring.read_many()
            assert kept == [message] * 4
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
            if lap >= 10:
                print(faults)
        """,
        name,
    )
    assert max(map(int, children.output(process).split())) < 256
