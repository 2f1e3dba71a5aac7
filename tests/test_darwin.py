"""What is peculiar to the macOS backend, on its stand-in; and that the stand-in keeps XNU's rules."""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the stand-in for macOS is made of Linux", allow_module_level=True)

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import threading
from ctypes import byref, c_uint

import darwin_on_linux
from conftest import DEADLINE, wait_until

from shmring import RingBusy, RingIncompatible, _layout, _ring

darwin = darwin_on_linux.load()
LANE = _layout.LANE
BELL = _layout.HEADER_BYTES + _layout.WRITER_BELL


@pytest.fixture(autouse=True)
def hooks():
    """A child forked by a test is to have handles of its own, as if there were rings."""
    _ring._set_hooks()


@pytest.fixture
def create(name):
    opened = []

    def make(keep=False, replace=False, name=name):
        opened.append(darwin.Segment.create(name, _layout.new_layout(4096, 2, "one", keep), 0o600, replace))
        return opened[-1]

    make.opened = opened
    yield make
    for segment in opened:
        segment.close()
    opened.clear()


@pytest.fixture
def system_name(name):
    """A name for shared memory and semaphores, and nothing of it afterwards."""
    yield b"/" + name.encode()[-20:]
    darwin._shm_unlink(b"/" + name.encode()[-20:])
    darwin._sem_unlink(b"/" + name.encode()[-20:])


@pytest.fixture
def memory(system_name):
    fd = darwin._shm_open(system_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, c_uint(0o600))
    assert fd >= 0
    yield fd
    os.close(fd)


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDWR | os.O_NONBLOCK)
    yield fd
    darwin.os.close(fd)


@pytest.fixture
def bell(fifo):
    return darwin._Bell(fifo)


def events(queue, seconds=0):
    """The filters of the events that a queue gives."""
    found = darwin._Two()
    count = darwin._sleep(queue, None, 0, found, 2, byref(darwin.timespec(0, int(seconds * 1e9))))
    return [event.filter for event in found[:count]] if count >= 0 else ctypes.get_errno()


# ---------------------------------------------------------------- the stand-in's rules


def test_names_have_a_limit_that_the_backend_keeps(name):
    """Fact: shm at most 31 bytes with the slash, sem at most 30."""
    flags = os.O_RDWR | os.O_CREAT
    assert darwin._shm_open(b"/" + b"x" * 31, flags, c_uint(0o600)) == -1
    assert ctypes.get_errno() == errno.ENAMETOOLONG
    assert darwin._sem_open(b"/" + b"x" * 30, flags, c_uint(0o600), c_uint(1)) == darwin.SEM_FAILED == -1
    assert ctypes.get_errno() == errno.ENAMETOOLONG
    passing = darwin.Segment(name)
    passing._is(darwin._Entry(name, bytes(range(240, 256)), False))
    assert len(passing._system_name) <= 30


@pytest.mark.parametrize("length, size", [(0, 0), (1, 16384), (16384, 16384), (16385, 32768)])
def test_shared_memory_gets_its_size_once_and_in_pages_of_16_KiB(memory, length, size):
    """Fact: one ftruncate in its life, also to 0; until then its size is 0."""
    assert darwin.os.fstat(memory).st_size == 0
    darwin.os.ftruncate(memory, length)
    assert darwin.os.fstat(memory).st_size == size
    with pytest.raises(OSError) as caught:
        darwin.os.ftruncate(memory, length)
    assert caught.value.errno == errno.EINVAL


def test_shared_memory_has_no_identity_no_times_no_locks_and_is_not_read(memory):
    """Fact: inode and times are 0; no flock on it."""
    status = darwin.os.fstat(memory)
    assert (status.st_ino, status.st_dev, status.st_mtime, status.st_ctime) == (0, 0, 0, 0)
    assert status.st_uid == os.geteuid() and status.st_mode == 0o600
    for call in (lambda: darwin.fcntl.flock(memory, fcntl.LOCK_SH), lambda: darwin.os.pread(memory, 1, 0)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOTSUP


def test_a_semaphores_handle_may_be_0_and_it_is_not_released_by_death(system_name, children):
    """Fact: a `sem_t *` is a descriptor number, 0 is one; named semaphores are not released by death."""
    gate = darwin._sem_open(system_name, os.O_CREAT, c_uint(0o600), c_uint(1))
    assert gate == 0
    assert children.join(children.fork(lambda: darwin._sem_trywait(gate) and os._exit(1))) == 0
    assert darwin._sem_trywait(gate) == -1 and ctypes.get_errno() == errno.EAGAIN
    assert darwin._sem_post(gate) == 0 == darwin._sem_trywait(gate)
    assert darwin._sem_close(gate) == 0 and darwin._sem_post(gate) == -1


def test_a_prototype_that_would_go_wrong_on_arm64_fails(system_name):
    """Fact: variadic arguments go another way there; `argtypes` has the fixed ones, the rest is c_uint."""
    for wrong in (0o600, ctypes.c_ushort(0o600), ctypes.c_int(0o600)):
        with pytest.raises(AssertionError, match="variadic"):
            darwin._shm_open(system_name, os.O_CREAT | os.O_RDWR, wrong)
    function = darwin._libsystem.quick["shm_open"]
    with pytest.raises(AssertionError, match="prototype"):
        function(system_name, 0)
    function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_int, c_uint), ctypes.c_int
    with pytest.raises(AssertionError):
        function(system_name, 0, c_uint(0o600))


def test_structures_have_the_sizes_and_offsets_of_the_headers():
    """Fact: struct kevent 32 bytes: ident 0, filter 8, flags 10, fflags 12, data 16, udata 24; timespec 16."""
    assert ctypes.sizeof(darwin.kevent) == 32 and ctypes.sizeof(darwin.timespec) == 16
    offsets = [getattr(darwin.kevent, field).offset for field, _ in darwin.kevent._fields_]
    assert offsets == [0, 8, 10, 12, 16, 24]
    assert (darwin.EVFILT_READ, darwin.EVFILT_USER, darwin.EV_ADD, darwin.EV_CLEAR) == (-1, -10, 1, 0x20)
    assert darwin.NOTE_TRIGGER == 0x01000000


def test_each_queue_remembers_each_byte_for_itself_and_gives_it_once(bell):
    """EV_CLEAR, on a FIFO that is never emptied."""
    first, second = bell.new_queue("x"), bell.new_queue("x")
    assert events(first) == events(second) == []
    for _ in range(3):
        os.write(bell.fd, b"!")
        for queue in (first, second):
            assert events(queue) == [darwin.EVFILT_READ]
            assert events(queue) == []
    assert events(bell.new_queue("x")) == [darwin.EVFILT_READ], "what is there when it is added is an event"


def test_an_event_whose_bytes_are_gone_is_none(bell):
    queue = bell.new_queue("x")
    os.write(bell.fd, b"!")
    os.read(bell.fd, 1)
    assert events(queue) == []


def test_an_alarm_ends_a_wait_in_another_thread(bell):
    queue = bell.new_queue("x")
    alarm = darwin.kevent(0, darwin.EVFILT_USER, 0, darwin.NOTE_TRIGGER)
    found = []
    thread = threading.Thread(target=lambda: found.append(events(queue, 0.999)))
    thread.start()
    darwin._change(queue, byref(alarm), 1, None, 0, None)
    thread.join(DEADLINE)
    assert found == [[darwin.EVFILT_USER]] and events(queue) == []


def test_a_queue_dies_at_a_fork(bell, children):
    """Fact: a kqueue is per process, and does not survive fork; its number is free in the child."""
    queue = bell.new_queue("x")

    def child():
        assert events(queue) == errno.EBADF
        with pytest.raises(OSError):
            os.fstat(queue.value)

    assert children.join(children.fork(child)) == 0
    os.write(bell.fd, b"!")
    assert events(queue) == [darwin.EVFILT_READ]


def test_a_fifo_is_not_locked_and_tells_of_its_readers(fifo, tmp_path):
    with pytest.raises(OSError) as caught:
        darwin.fcntl.flock(fifo, fcntl.LOCK_SH)
    assert caught.value.errno == errno.ENOTSUP
    os.mkfifo(tmp_path / "another")
    assert darwin._has_reader(str(tmp_path / "fifo"))
    assert not darwin._has_reader(str(tmp_path / "another")) and not darwin._has_reader(str(tmp_path / "none"))


# ---------------------------------------------------------------- the backend


def home(segment):
    return os.listdir(segment._home)


def test_the_folder_of_rings_is_nobody_elses(name, monkeypatch, tmp_path):
    monkeypatch.setenv(darwin_on_linux.CACHE, str(tmp_path))
    darwin.Segment(name)
    folder = tmp_path / "shmring"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o750)
    with pytest.raises(PermissionError, match="nobody else"):
        darwin.Segment(name)
    folder.rmdir()
    folder.symlink_to("/")
    with pytest.raises(PermissionError):
        darwin.Segment(name)


def test_a_rings_file_tells_its_name_and_nonce(create, name):
    segment = create()
    with open(segment._named, "rb") as file:
        entry = darwin._Entry.read(file.fileno())
    assert entry == (name, segment.layout.nonce, False)
    assert os.path.samefile(segment._named, f"{segment._home}/ring")


def test_what_is_no_rings_file_is_not_opened_not_replaced_and_not_touched(name):
    path = darwin.Segment(name)._named
    with open(path, "w") as file:
        file.write("something else\n")
    try:
        with pytest.raises(RingIncompatible, match=name):
            darwin.Segment.open(name, False)
        for replace in (False, True):
            with pytest.raises(FileExistsError, match="left alone"):
                darwin.Segment.create(name, _layout.new_layout(4096, 1, "one", False), 0o600, replace)
        with open(path) as file:
            assert file.read() == "something else\n"
    finally:
        os.unlink(path)


STEPS = ["mkdir", "ftruncate", "link", "mkfifo", "write"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_creator_killed_at_a_step_leaves_nothing_that_the_next_creation_does_not_clear(
    create, name, children, monkeypatch, step, after
):
    def die():
        call = getattr(darwin.os, step)

        def killed(*args, **kwargs):
            if after:
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(darwin.os, step, killed, raising=False)
        create()

    before = darwin_on_linux.left()
    assert children.join(children.fork(die)) == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        darwin.Segment.open(name, False)
    create(name=f"{name}-another").close()
    if (step, after) != ("link", True):
        assert darwin_on_linux.left() == before, "by whoever creates any ring"
    create().close()
    assert darwin_on_linux.left() == before


def test_a_kept_ring_whose_memory_went_with_a_restart_is_not_there_and_is_cleared_by_create(create, name):
    kept = create(keep=True)
    memory = kept._system_name
    kept.close()
    darwin.Segment.open(name, False).close()
    darwin._shm_unlink(memory)
    with pytest.raises(FileNotFoundError, match="restarted"):
        darwin.Segment.open(name, False)
    create().close()
    assert not [entry for entry in darwin_on_linux.left() if name in entry]


def test_looking_and_sweeping_take_nothing_from_a_kept_ring(create, name):
    create(keep=True).close()
    create(name=f"{name}-another").close()
    found = darwin.Segment.open(name, False)
    found.unlink()
    found.close()


def test_the_lock_of_a_name_decides_and_the_gate_may_be_wrong(create, name, children):
    segment = create()

    def die():
        mine = darwin.Segment.open(name, False)
        with mine._changing_the_name(1.0) as locked:
            assert locked
            os.kill(os.getpid(), signal.SIGKILL)

    def hold():
        with segment._changing_the_name(1.0):
            pass

    assert children.join(children.fork(die)) == -signal.SIGKILL
    with open(f"{segment._home}/name", "rb") as file:
        assert file.read() == b"!", "the record of an owner that died"
    other = darwin.Segment.open(name, False)
    create.opened.append(other)
    for _ in range(2):  # the gate was left shut; the first holder opens it
        with segment._changing_the_name(1.0) as locked:
            assert locked
            with other._changing_the_name(0.02) as also:
                assert not also
    gate = darwin._sem_open(segment._system_name, 0)
    assert darwin._sem_trywait(gate) == 0
    darwin._sem_close(gate)  # shut for ever
    with other._changing_the_name(1.0) as locked:
        assert locked
        with pytest.raises(RingBusy):
            segment._remove_name(0.02)
    segment.unlink()


def test_a_bell_that_is_full_still_wakes(create):
    segment = create()
    for _ in range(70_000):
        segment.ring(BELL)
    for _ in range(3):
        while True:  # until it sleeps in truth
            noted = segment.note(BELL)
            begin = darwin.time.perf_counter()
            segment.wait(BELL, noted, begin + 0.02)
            if darwin.time.perf_counter() >= begin + 0.02:
                break
        thread = threading.Thread(target=segment.wait, args=(BELL, segment.note(BELL), None))
        thread.start()
        wait_until(lambda: segment._bells[BELL].asleep, "the sleep")
        segment.ring(BELL)
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_forked_child_keeps_no_claim_and_takes_none(create, name, children):
    segment = create()
    assert segment.claim(LANE)
    told, tell = os.pipe()
    ready, say = os.pipe()

    def child():
        os.close(tell)
        assert not segment.claim(LANE) and segment.is_claimed(LANE)
        os.write(say, b"x")
        os.read(told, 1)

    pid = children.fork(child)
    os.close(say)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    segment.release(LANE)
    other = darwin.Segment.open(name, False)
    create.opened.append(other)
    assert other.claim(LANE), "although the child lives"
    segment.close(), other.close()
    darwin.Segment.open(name, False).close()  # the child is present
    os.close(tell), os.close(told)
    assert children.join(pid) == 0
    with pytest.raises(FileNotFoundError):
        darwin.Segment.open(name, False)
    create().close()


def test_memory_that_is_mapped_survives_its_name(create):
    segment = create()
    segment.unlink()
    segment.words[-1] = 7
    assert segment.words[-1] == 7 and isinstance(segment.map, mmap.mmap)


def test_a_claim_ends_with_its_process_although_a_forked_child_of_that_lives_on(create, name, children):
    """The child closed its copy of the descriptor, or the lock would live as long."""
    segment = create()
    told, tell = os.pipe()
    ready, say = os.pipe()

    def parent():
        os.close(tell)
        mine = darwin.Segment.open(name, False)
        assert mine.claim(LANE)
        if os.fork() == 0:
            os.write(say, b"x")
            os.read(told, 1)
            os._exit(0)
        os.read(told, 1)

    pid = children.fork(parent)
    os.close(say)
    assert os.read(ready, 1) == b"x"
    assert not segment.claim(LANE)
    os.kill(pid, signal.SIGKILL)
    assert children.join(pid) == -signal.SIGKILL
    assert segment.claim(LANE) and not segment.is_claimed(LANE)
    for end in (tell, told, ready):
        os.close(end)
    segment.close()
    wait_until(lambda: not darwin._has_reader(f"{segment._home}/present"), "the end of the child")
    create().close()  # clears away what it left
