"""How a ring comes to be, who finds it, and when it is gone. All in one process, but for crashes."""

from __future__ import annotations

import gc
import os
import stat
import threading
import time

import pytest
from conftest import DARWIN, DEADLINE, KILLED, WINDOWS, descriptors, segments, wait_until
from support import kill_yourself

import shmring
from shmring import Ring, RingBusy, RingClosed, RingCorrupted, RingIncompatible, RingTimeout

needs_files = pytest.mark.skipif(WINDOWS or DARWIN, reason="rings are no files here")
needs_root = pytest.mark.skipif(
    DARWIN or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to another user"
)
needs_kept = pytest.mark.skipif(WINDOWS, reason="rings cannot be kept here")


def path(name):
    return f"/dev/shm/shmring.{name}"


def exists(name):
    """Is there a ring of this name? Where rings are files, one that nobody can open may still be left; not here."""
    try:
        Ring.open(name).close()
    except FileNotFoundError:
        assert f"shmring.{name}" not in segments()
        return False
    return True


def status(name):
    """What must not change about a file that is no ring."""
    result = os.lstat(path(name))
    return result.st_ino, result.st_mode, result.st_size, result.st_mtime_ns


@pytest.fixture
def remove(name):
    """Removes what the test itself put under the name."""
    yield
    if os.path.lexists(path(name)):
        (os.rmdir if os.path.isdir(path(name)) and not os.path.islink(path(name)) else os.unlink)(path(name))


def kill_yourself_with_open(name, **kwargs):
    with Ring.create(name, 4096, **kwargs) as ring:
        ring.write(b"left")
        kill_yourself()


@pytest.fixture
def crash(name, children):
    """Leaves a ring behind as a crash of everybody does."""

    def crash(**kwargs):
        assert children.join(children.start(lambda: kill_yourself_with_open(name, **kwargs))) == KILLED
        assert WINDOWS or f"shmring.{name}" in segments()

    return crash


# ---------------------------------------------------------------- creating


@pytest.mark.parametrize("asked, capacity", [(1, 4096), (4096, 4096), (4097, 8192), (100_000, 102_400)])
def test_capacity_is_the_real_value(name, asked, capacity):
    with Ring.create(name, asked) as ring, Ring.open(name) as other:
        assert ring.capacity == other.capacity == capacity
        assert ring.max_message == other.max_message == capacity - 8
        assert ring.name == other.name == name


@pytest.mark.parametrize("kwargs, error", [
    ({"capacity": 0}, ValueError), ({"capacity": 1 << 41}, ValueError), ({"capacity": 4096.0}, TypeError),
    ({"writers": 0}, ValueError), ({"writers": 5000}, ValueError), ({"readers": "several"}, ValueError),
    ({"mode": 0o400}, ValueError), ({"mode": 0o1600}, ValueError), ({"mode": "rw"}, ValueError),
])  # fmt: skip
def test_a_wrong_argument_of_create_leaves_nothing(name, kwargs, error):
    with pytest.raises(error, match=next(iter(kwargs))):
        Ring.create(name, **kwargs)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)


@pytest.mark.parametrize("bad", ["", "a/b", "x" * 201, "ö", None])
def test_every_way_in_checks_the_name(bad):
    for call in (Ring.create, Ring.open, shmring.unlink):
        with pytest.raises((ValueError, TypeError), match="name"):
            call(bad)


@pytest.mark.parametrize("name_", ["..", ".", "x" * 200, "a%b:c", "-"])
def test_odd_names_work(name_, name):
    with Ring.create(f"{name}{name_}"[-200:]) as ring, Ring.open(ring.name) as other:
        other.write(b"x")
        assert ring.read() == b"x"


@needs_files
@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777])
def test_mode_is_what_was_asked_whatever_the_umask(name, mode, umask):
    before = os.umask(umask)
    try:
        ring = Ring.create(name, mode=mode)
    finally:
        os.umask(before)
    with ring:
        assert stat.S_IMODE(os.stat(path(name)).st_mode) == mode


@needs_files
def test_the_default_mode_is_for_the_owner_alone(name):
    with Ring.create(name):
        assert stat.S_IMODE(os.stat(path(name)).st_mode) == 0o600


def test_creating_over_a_living_ring_fails_and_leaves_it(name):
    with Ring.create(name) as ring:
        ring.write(b"mine")
        with pytest.raises(FileExistsError, match=name):
            Ring.create(name)
        with pytest.raises(RingBusy, match=name):
            Ring.create(name, replace=True)
        with Ring.open(name) as other:
            assert other.read() == b"mine"


# ---------------------------------------------------------------- opening


def test_a_ring_that_is_not_there_is_not_found_in_time(name):
    for timeout in (0, -1, 0.05):
        begin = time.perf_counter()
        with pytest.raises(FileNotFoundError, match=name) as caught:
            Ring.open(name, timeout=timeout)
        assert time.perf_counter() - begin >= timeout and caught.value.filename == name
    with pytest.raises(ValueError, match="NaN"):
        Ring.open(name, timeout=float("nan"))


def test_open_waits_for_a_ring_to_come(name):
    opened = []
    thread = threading.Thread(target=lambda: opened.append(Ring.open(name, timeout=DEADLINE)))
    thread.start()
    time.sleep(0.02)
    with Ring.create(name) as ring:
        thread.join()
        opened.pop().write(b"found")
        assert ring.read() == b"found"


FOREIGN = {
    "another file": (lambda p: _write(p, b"some text\n" * 1000), RingIncompatible),
    "a short file": (lambda p: _write(p, b"shmring"), RingIncompatible),
    "an empty file": (lambda p: _write(p, b""), RingIncompatible),
    "a directory": (os.mkdir, OSError),
    "a symbolic link": (lambda p: os.symlink("/dev/shm/nowhere", p), OSError),
    "a link to a ring": (lambda p: os.symlink("shmring.no-such-ring", p), OSError),
    "a FIFO": (lambda p: os.mkfifo(p), OSError),
}


def _write(path, data):
    with open(path, "wb") as file:
        file.write(data)


@needs_files
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_ring_is_not_opened_not_replaced_and_not_touched(name, kind, remove):
    make, error = FOREIGN[kind]
    make(path(name))
    before = status(name)
    with pytest.raises(error, match=name) as caught:
        Ring.open(name)
    assert not isinstance(caught.value, FileNotFoundError)
    for replace in (False, True):
        with pytest.raises(FileExistsError, match=name):
            Ring.create(name, replace=replace)
    assert status(name) == before


@needs_files
@pytest.mark.parametrize("cut", [0, 8, 16, 511, 512, 4096, -1])
def test_a_truncated_ring_is_not_opened_and_not_touched(name, cut, remove):
    with Ring.create(name, 4096) as ring:
        with open(path(name), "rb") as file:
            whole = file.read()
        ring.unlink()
        _write(path(name), whole[:cut])
        before = status(name)
        with pytest.raises(RingCorrupted if cut not in (0, 8) else RingIncompatible, match=name):
            Ring.open(name)
        assert status(name) == before


@pytest.mark.parametrize(
    "offset, error", [(0, RingIncompatible), (8, RingIncompatible), (12, RingIncompatible), (24, RingCorrupted)]
)
def test_a_ring_with_a_foreign_header_is_not_opened(name, offset, error):
    with Ring.create(name, 4096) as ring:
        ring._segment.map[offset] = 0x77
        with pytest.raises(error, match=name):
            Ring.open(name)
        with pytest.raises(FileExistsError, match=name):
            Ring.create(name)


@needs_files
@needs_root
def test_another_users_ring_is_opened_only_when_told_so(name):
    with Ring.create(name) as ring:
        os.chown(path(name), 12345, -1)
        with pytest.raises(PermissionError, match="12345.*any_owner"):
            Ring.open(name)
        with Ring.open(name, any_owner=True) as other:
            other.write(b"trusted")
        assert ring.read() == b"trusted"


# ---------------------------------------------------------------- the end


def test_the_last_close_removes_the_name(name):
    ring = Ring.create(name)
    others = [Ring.open(name) for _ in range(3)]
    ring.close()
    for other in others:
        assert exists(name)
        other.close()
    assert not exists(name)


def test_a_handle_that_is_forgotten_is_closed(name):
    ring = Ring.create(name)
    assert ring.try_read() is None and ring.try_write(b"")
    del ring
    gc.collect()
    assert not exists(name)


def test_a_closed_handle_that_is_kept_holds_no_descriptor_and_no_memory(name):
    """Also if it has written, read, waited, and raised."""
    with Ring.create(name, 4096, writers=2) as other:
        before = descriptors()
        ring = Ring.open(name)
        ring.write(b"one")
        assert ring.read() == b"one" and list(ring.messages(timeout=0)) == []
        with pytest.raises(ValueError):
            ring.write(bytes(5000))
        with pytest.raises(RingTimeout):
            ring.read(timeout=0.001)
        loop = ring.messages()
        ring.write(b"two")
        assert next(loop) == b"two"
        mapped = maps(name)
        ring.close()
        assert descriptors() == before and len(maps(name)) == max(0, len(mapped) - 1)
        for use in (ring.read, ring.try_read, ring.read_many, ring.stats, ring.unlink, ring.__enter__):
            with pytest.raises(RingClosed):
                use()
        assert list(loop) == [] and (ring.name, ring.capacity) == (name, 4096)
        ring.close()
        other.write(b"three")
        assert other.read() == b"three"


def maps(name):
    """The mappings of a ring that was opened, not created; none where they are not listed."""
    if WINDOWS:
        return []
    with open("/proc/self/maps") as lines:
        return [line for line in lines if line.rstrip().endswith(path(name))]


@needs_kept
def test_a_kept_ring_stays_with_its_messages_until_unlink(name):
    with Ring.create(name, 4096, keep=True) as ring:
        ring.write(b"kept")
    with pytest.raises(FileExistsError, match="kept"):
        Ring.create(name)
    with Ring.open(name) as ring:
        assert ring.read() == b"kept"
        ring.write(b"on")
    with Ring.open(name) as ring:
        assert ring.stats().messages_in == 2 and ring.read() == b"on"
    shmring.unlink(name)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    with pytest.raises(FileNotFoundError, match=name):
        shmring.unlink(name)


@pytest.mark.skipif(not WINDOWS, reason="rings can be kept here")
def test_where_rings_cannot_be_kept_create_says_so_before_anything_is_made(name):
    with pytest.raises(NotImplementedError, match="keep"):
        Ring.create(name, keep=True)
    assert not exists(name)
    with Ring.create(name) as ring:
        with pytest.raises(NotImplementedError, match="keep"):
            Ring.create(name, keep=True, replace=True)
        ring.write(b"untouched")
        assert ring.read() == b"untouched"


def test_replace_is_no_more_than_create_where_nothing_is_to_be_replaced(name):
    with Ring.create(name, 4096, replace=True) as ring:
        with pytest.raises(RingBusy, match=name):
            Ring.create(name, 8192, replace=True)
        with Ring.open(name) as other:
            other.write(b"mine")
        assert ring.read() == b"mine"
    assert not exists(name)


def test_successors_of_a_name_are_rings_of_their_own_while_old_handles_live(name):
    rings = []
    for number in range(5):
        rings.append(Ring.create(name, 4096))
        with Ring.open(name) as other:
            other.write(b"%d" % number)
        if number % 2:
            shmring.unlink(name)
        else:
            rings[-1].unlink()
        assert not exists(name)
    with Ring.create(name) as last:
        for number, ring in enumerate(rings):
            assert ring.read_many() == [b"%d" % number]
            ring.close()
            assert exists(name), "what an old handle does is not about the new ring"
        assert last.try_read() is None
    assert not exists(name)


def test_what_a_name_led_to_stays_reachable_for_those_who_have_it_open_in_other_processes(name, children):
    with Ring.create(name, 4096) as ring, Ring.create(f"{name}-back", 4096) as back:

        def answer():
            back.write(b"here")
            back.write(ring.read(timeout=DEADLINE))

        pid = children.start(answer)
        assert back.read(timeout=DEADLINE) == b"here"
        ring.unlink()
        with Ring.create(name, 4096) as successor:
            ring.write(b"to the old one")
            assert back.read(timeout=DEADLINE) == b"to the old one"
            assert children.join(pid) == 0
            assert successor.stats().messages_in == 0 and exists(name)


@needs_kept
def test_replace_takes_the_place_of_a_kept_ring_that_nobody_has_open(name):
    with Ring.create(name, 4096, keep=True) as ring:
        ring.write(b"old")
        with pytest.raises(RingBusy, match=name):
            Ring.create(name, replace=True)
    with Ring.create(name, 8192, replace=True) as ring:
        assert ring.capacity == 8192 and ring.try_read() is None
    assert not exists(name)


def test_unlink_removes_the_name_and_leaves_the_handles(name):
    with Ring.create(name, 4096) as ring, Ring.open(name) as other:
        ring.unlink()
        with pytest.raises(FileNotFoundError):
            Ring.open(name)
        other.write(b"still works")
        assert ring.read() == b"still works"
        with Ring.create(name, 8192) as successor:
            ring.unlink(), other.unlink()  # of that name, but not of this ring
            with Ring.open(name) as found:
                assert found.capacity == 8192
            ring.close(), other.close()
            Ring.open(name).close()
            successor.write(b"")
    assert not exists(name)


def test_the_module_function_unlinks_a_living_ring(name):
    with Ring.create(name) as ring:
        shmring.unlink(name)
        with pytest.raises(FileNotFoundError):
            Ring.open(name)
        ring.write(b"x")
        assert ring.read() == b"x"


def test_what_a_crash_left_is_not_found_and_is_replaced_by_create(name, crash):
    crash()
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    with Ring.create(name, 8192) as ring:
        assert ring.try_read() is None and ring.capacity == 8192
    crash()
    if WINDOWS:  # nothing was left
        with pytest.raises(FileNotFoundError):
            shmring.unlink(name)
    else:
        shmring.unlink(name)
    assert not exists(name)


@needs_kept
def test_a_kept_ring_outlives_a_crash_of_everybody(name, crash):
    crash(keep=True)
    with Ring.open(name) as ring:
        assert ring.read() == b"left"
        assert ring.stats().lanes_in_use == 0
    shmring.unlink(name)


def test_the_roles_of_a_process_that_died_are_free(name, children):
    with Ring.create(name, 4096, writers=1) as ring:

        def die():
            with Ring.open(name) as mine:
                mine.write_many([b"1", b"2"])
                assert mine.read() == b"1"
                kill_yourself()

        assert children.join(children.start(die)) == KILLED
        ring.write(b"3")
        assert ring.read_many() == [b"2", b"3"]


def test_closing_while_closing_is_fine(name):
    ring = Ring.create(name)
    threads = [threading.Thread(target=ring.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ring.closed and not exists(name)
    with pytest.raises(RingClosed):
        ring.stats()


def test_many_rings_come_and_go_without_a_trace(name):
    before = len(descriptors())
    for _ in range(200):
        with Ring.create(name, 4096) as ring, Ring.open(name) as other:
            other.write(b"x")
            assert ring.read() == b"x"
        assert not exists(name)
    del ring, other
    gc.collect()
    wait_until(lambda: len(descriptors()) == before, "the descriptors' end")
