"""What comes from outside is never trusted: strange things in a ring's place, a full system. Damage: `test_damage.py`.

- What is no ring of ours is refused by an error with the ring's name, and left as it was.
- When the system refuses something, the error has the ring's name, nothing is left behind, a ring that is open is not
  disturbed, and the same call succeeds as soon as the system allows it.
"""

from __future__ import annotations

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the errors of the system that are shown here are those of Linux", allow_module_level=True)

import contextlib
import errno
import gc
import itertools
import mmap
import os
import resource
import socket
import stat
import struct
import zlib
from pathlib import Path

from conftest import descriptors, namespaces
from support import GIL
from test_damage import check_stats, damaged_header, fuzz, run_cases
from test_linux import descriptors_left

from shmring import Ring, RingBusy, RingCorrupted, RingError, RingIncompatible, _layout, _linux, unlink

WORD = (1 << 64) - 1
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


def path_of(name):
    return f"/dev/shm/shmring.{name}"


# ---------------------------------------------------------------- fuzz: the header


def fuzz_headers(name, seed, cases):
    """See `test_open_takes_a_damaged_header_for_a_ring_only_where_nothing_depends_on_it`."""
    with Ring.create(name, 4096, writers=2, keep=True) as ring:
        layout = ring._segment.layout
        file = os.open(path_of(name), os.O_RDWR)
        whole = os.pread(file, layout.segment_bytes, 0)
        header = whole[: _layout.HEADER_BYTES]
        opened = 0

        def case(rng):
            nonlocal opened
            data = damaged_header(rng, header, layout)
            said = struct.unpack_from("=Q", data, 16)[0]
            longest = 1 << 50
            size = rng.choice([layout.segment_bytes, min(said, longest), rng.randrange(layout.segment_bytes)])
            os.pwrite(file, data, 0)
            os.ftruncate(file, size)
            try:
                other = Ring.open(name)
            except (RingCorrupted, RingIncompatible) as error:
                assert name in str(error)
            except OSError as error:
                assert error.errno == errno.ENOMEM and error.filename == name, error
                assert (size, said) != (layout.segment_bytes, layout.segment_bytes)
            else:
                opened += 1
                with other:
                    check_stats(other)
                    assert other._segment.layout.segment_bytes == size == said
                    assert data[:16] == header[:16] and zlib.crc32(data[:120]) == struct.unpack("=Q", data[120:128])[0]
                    if size == layout.segment_bytes:
                        if other._segment.layout.broadcast:  # all sizes of one that has one reader fit that too
                            other.join()
                        other.write(b"x", timeout=0)
                        assert other.read(timeout=0) == b"x"
            finally:
                os.ftruncate(file, layout.segment_bytes)
                os.pwrite(file, whole, 0)

        run_cases(cases, seed, case)
        assert opened > cases // 100, "most cases should fail, but not all"
        ring.unlink()
        os.close(file)


def test_open_takes_a_damaged_header_for_a_ring_only_where_nothing_depends_on_it(name, children, seed):
    fuzz(children, fuzz_headers, name, seed, 1000)


@pytest.mark.stress
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("function, cases", [
    (fuzz_headers, 10_000),
])  # fmt: skip
def test_much_more_of_the_same(name, children, seed, function, cases, part):
    fuzz(children, function, name, f"{seed}-{part}", cases)


# ---------------------------------------------------------------- what lies in the place of a ring


def kept_ring(name, pokes=(), checksum=True):
    """The bytes of a kept ring with an unread message; (offset, format, value) pokes go into its header."""
    with Ring.create(name, 4096, writers=1, keep=True) as ring:
        ring.write(b"unread")
        data = bytearray(Path(path_of(name)).read_bytes())
        ring.unlink()
    for offset, form, value in pokes:
        struct.pack_into(form, data, offset, value)
    if checksum:
        struct.pack_into("=Q", data, 120, zlib.crc32(data[:120]))
    return bytes(data)


def bind_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


def look(path):
    """What lies at a path: its kind, owner and mode, and every byte of it."""
    status = os.lstat(path)
    kind, content = stat.S_IFMT(status.st_mode), None
    if kind == stat.S_IFREG:
        content = Path(path).read_bytes()
    elif kind == stat.S_IFLNK:
        content = os.readlink(path), look(path) if os.path.islink(os.readlink(path)) else None
    elif kind == stat.S_IFDIR:
        content = os.listdir(path)
    return status.st_mode, status.st_uid, status.st_ino, status.st_size, status.st_mtime_ns, content


@pytest.fixture
def place(name):
    """The path of a ring's file; what is left there is removed after the test."""
    path = path_of(name)
    yield path
    if os.path.isdir(path) and not os.path.islink(path):
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


NO_RINGS = {
    "one byte": lambda path, ring: Path(path).write_bytes(ring[:1]),
    "seven bytes of a ring": lambda path, ring: Path(path).write_bytes(ring[:7]),
    "zeros": lambda path, ring: Path(path).write_bytes(bytes(len(ring))),
    "a ring without its magic": lambda path, ring: Path(path).write_bytes(b"shmrinG\0" + ring[8:]),
    "a Unix socket": lambda path, ring: bind_socket(path),
    "a link to /etc/passwd": lambda path, ring: os.symlink("/etc/passwd", path),
    "a link to itself": lambda path, ring: os.symlink(path, path),
    "a directory that is not empty": lambda path, ring: (os.mkdir(path), os.mkfifo(path + "/fifo")),
    "a character device": lambda path, ring: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5)),
}


@pytest.mark.parametrize("kind", NO_RINGS)
def test_what_is_no_ring_is_refused_by_name_and_left_alone(name, place, kind):
    ring = kept_ring(name)
    passwd = look("/etc/passwd")
    try:
        NO_RINGS[kind](place, ring)
    except PermissionError as error:
        pytest.skip(f"cannot make this here: {error}")
    try:
        before = os.lstat(place) if kind == "a link to itself" else look(place)
        with pytest.raises((RingIncompatible, OSError), match=name) as caught:
            Ring.open(name)
        assert not isinstance(caught.value, FileNotFoundError)
        for replace in (False, True):
            with pytest.raises(FileExistsError, match=name) as caught:
                Ring.create(name, replace=replace)
            assert caught.value.filename == name
        assert (os.lstat(place) if kind == "a link to itself" else look(place)) == before
        assert look("/etc/passwd") == passwd
    finally:
        with contextlib.suppress(OSError):
            os.unlink(place + "/fifo")


def test_a_link_to_a_living_ring_is_not_followed(name, place):
    with Ring.create(name + "-real") as ring:
        os.symlink(f"shmring.{name}-real", place)
        ring.write(b"mine")
        with pytest.raises(OSError, match=name) as caught:
            Ring.open(name)
        assert caught.value.errno == errno.ELOOP
        for replace in (False, True):
            with pytest.raises(FileExistsError, match=name):
                Ring.create(name, replace=replace)
        with pytest.raises(OSError, match=name):
            unlink(name)
        assert os.readlink(place) == f"shmring.{name}-real"
        assert ring.read() == b"mine"


BROKEN_RINGS = {
    "8 bytes": (lambda name: kept_ring(name)[:8], RingIncompatible),
    "51 bytes": (lambda name: kept_ring(name)[:51], RingCorrupted),
    "52 bytes": (lambda name: kept_ring(name)[:52], RingCorrupted),
    "127 bytes": (lambda name: kept_ring(name)[:127], RingCorrupted),
    "511 bytes": (lambda name: kept_ring(name)[:511], RingCorrupted),
    "512 bytes": (lambda name: kept_ring(name)[:512], RingCorrupted),
    "4095 bytes": (lambda name: kept_ring(name)[:4095], RingCorrupted),
    "a byte too few": (lambda name: kept_ring(name)[:-1], RingCorrupted),
    "a byte too many": (lambda name: kept_ring(name) + b"\0", RingCorrupted),
    "a lane too many": (lambda name: kept_ring(name) + bytes(4096), RingCorrupted),
    "a later layout": (lambda name: kept_ring(name, [(8, "=I", _layout.LAYOUT_VERSION + 1)]), RingIncompatible),
    "a later layout with another checksum": (
        lambda name: kept_ring(name, [(8, "=I", _layout.LAYOUT_VERSION + 1)], False),
        RingIncompatible,
    ),
    "layout 0": (lambda name: kept_ring(name, [(8, "=I", 0)]), RingIncompatible),
    "an unknown machine": (lambda name: kept_ring(name, [(12, "=I", 99)]), RingIncompatible),
    "another byte order": (lambda name: kept_ring(name, [(8, ">I", _layout.LAYOUT_VERSION)]), RingIncompatible),
    "another checksum": (lambda name: kept_ring(name, [(127, "=B", 1)], False), RingCorrupted),
    "another capacity": (lambda name: kept_ring(name, [(24, "=Q", 8192)]), RingCorrupted),
    "no lanes": (lambda name: kept_ring(name, [(32, "=I", 0)]), RingCorrupted),
    "unknown readers": (lambda name: kept_ring(name, [(36, "=I", 3)]), RingIncompatible),
}


@pytest.mark.parametrize("kind", BROKEN_RINGS)
def test_a_broken_or_foreign_ring_is_refused_and_left_alone_until_replaced(name, place, kind):
    make, error = BROKEN_RINGS[kind]
    Path(place).write_bytes(make(name))
    before = look(place)
    with pytest.raises(error, match=name):
        Ring.open(name)
    with pytest.raises(FileExistsError, match=f"replace=True.*{name}"):
        Ring.create(name)
    assert look(place) == before
    with Ring.create(name, replace=True) as ring:
        ring.write(b"new")
        assert ring.read() == b"new"


@pytest.mark.parametrize("kind", ["a later layout", "an unknown machine"])
def test_a_ring_of_another_version_that_somebody_has_open_is_not_replaced(name, place, kind):
    """Presence is told by the same lock in every version."""
    Path(place).write_bytes(BROKEN_RINGS[kind][0](name))
    before = look(place)
    with open(place, "rb") as file:
        assert _linux._lock(file.fileno(), _linux.fcntl.F_RDLCK, _layout.PRESENCE)
        with pytest.raises(RingBusy, match=name):
            Ring.create(name, replace=True)
    assert look(place) == before


def as_nobody(function):
    """`function` with no more rights than anybody has."""

    def run():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        function()

    return run


@as_root
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
@pytest.mark.parametrize("what", ["a ring left by a crash", "a kept ring", "a text"])
def test_what_another_user_left_is_not_opened_and_not_replaced(name, place, children, what, mode):
    data = kept_ring(name, [(48, "=I", 0)] if what == "a ring left by a crash" else ())
    Path(place).write_bytes(b"some text" if what == "a text" else data)
    os.chmod(place, mode)
    os.chown(place, 12345, -1)
    before = look(place)

    def nobody():
        for any_owner in (False, True):
            try:
                Ring.open(name, any_owner=any_owner).close()
            except (OSError, RingError) as error:
                assert name in str(error), error
            else:
                assert (any_owner, mode, what) == (True, 0o666, "a kept ring")
        for replace in (False, True):
            try:
                Ring.create(name, replace=replace)
            except (FileExistsError, PermissionError) as error:
                assert error.filename == name, error
            else:
                raise AssertionError("it was replaced")
        assert len(descriptors()) == many

    many = len(descriptors())
    assert children.join(children.fork(as_nobody(nobody))) == 0
    assert look(place) == before


@as_root
def test_the_last_to_close_need_not_be_allowed_to_remove_the_name(name, children):
    """In a sticky directory only the owner may. What stays counts as not there."""
    told, tell = os.pipe()
    ready, say = os.pipe()

    def nobody():
        many = len(descriptors())
        mine = Ring.open(name)
        mine.write(b"1")
        os.write(say, b"x")
        os.read(told, 1)
        mine.close()
        assert mine.closed
        del mine
        assert len(descriptors()) == many
        try:
            Ring.open(name)
        except FileNotFoundError as error:
            assert name in str(error)
        else:
            raise AssertionError("it counts as there")

    ring = Ring.create(name, mode=0o666)
    pid = children.fork(lambda: (ring._segment.close(keep=True), as_nobody(nobody)()))
    os.read(ready, 1)
    assert ring.read() == b"1"
    ring.close()
    os.write(tell, b"x")
    assert children.join(pid) == 0
    with Ring.create(name) as ring:
        assert ring.try_read() is None
    for end in (told, tell, ready, say):
        os.close(end)


# ---------------------------------------------------------------- the system at its limits


class Healthy:
    """A ring that is open while something else goes wrong, with a message in it, and all its roles taken."""

    def __init__(self, name):
        self.ring = Ring.create(f"{name}-healthy", 4096, writers=2)
        self.writer = Ring.open(self.ring.name)
        self.writer.write(b"0")
        assert self.ring.read() == b"0"
        self.writer.write(b"1")

    def check(self):
        """It has what it had: its message and its claims."""
        with Ring.open(self.ring.name) as other:
            try:
                other.try_read()
            except RingBusy:
                pass
            else:
                raise AssertionError("the reader's role was lost")
            assert other.stats().lanes_in_use == 1 and other.stats().readers == 1
        assert self.ring.read(timeout=0) == b"1"
        self.writer.write(b"1")

    def close(self):
        self.writer.close()
        self.ring.close()


@pytest.fixture
def healthy(name):
    ring = Healthy(name)
    ring.check()
    yield ring
    ring.check()
    ring.close()


def maps():
    """How many mappings of rings this process has."""
    text = Path("/proc/self/maps").read_text()
    return text.count("/dev/shm/shmring") + text.count("/dev/shm/#")


def holdings(name):
    """What this process holds, and the segments of this test."""
    gc.collect()
    return descriptors(), maps(), {entry for entry in os.listdir("/dev/shm") if entry.startswith(f"shmring.{name}")}


def crashed(name):
    """Leave behind what a ring is when all its processes were killed."""
    Path(path_of(name)).write_bytes(kept_ring(name, [(48, "=I", 0)]))


def kept(name):
    Path(path_of(name)).write_bytes(kept_ring(name))


CALLS = {
    "create": (lambda name: None, Ring.create),
    "create over a crashed ring": (crashed, Ring.create),
    "replace": (kept, lambda name: Ring.create(name, replace=True)),
    "open": (kept, Ring.open),
    "unlink": (kept, unlink),
}


@pytest.mark.parametrize("left", range(11))
@pytest.mark.parametrize("call", CALLS)
def test_without_descriptors_a_call_says_so_and_succeeds_once_there_are_some(name, place, healthy, call, left):
    prepare, function = CALLS[call]
    prepare(name)
    before = holdings(name)
    failed = None
    with descriptors_left(left):
        try:
            ring = function(name)
        except OSError as error:
            failed = error.errno, str(error)
    if failed:
        assert failed[0] == errno.EMFILE and name in failed[1], failed
        assert holdings(name) == before
        healthy.check()
        ring = function(name)
    assert bool(failed) == (left < {"open": 3, "unlink": 2, "create": 3}.get(call, 5))
    if ring:
        ring.write(b"x")
        assert ring.read_many()[-1] == b"x"
        ring.unlink()
        ring.close()


@pytest.mark.parametrize("left", range(5))
def test_without_descriptors_a_forked_child_has_no_claim_of_its_parents(name, children, monkeypatch, left):
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: None)
    rings = [Ring.create(f"{name}-{number}", 4096, writers=1) for number in range(3)]
    for ring in rings:
        ring.write(b"1")
        assert ring.read() == b"1"

    def child():
        for ring in rings:
            for use in (lambda ring=ring: ring.write(b"2"), ring.try_read):
                try:
                    use()
                except (OSError, RingBusy) as error:
                    assert ring.name in str(error)
                else:
                    raise AssertionError(f"{ring.name}: the parent's role was there to take")
            ring.close()

    before = holdings(name)
    with descriptors_left(left):
        pid = children.fork(child)
    assert children.join(pid) == 0
    assert holdings(name) == before
    for ring in rings:
        ring.write(b"3")
        assert ring.read() == b"3"
    assert children.join(children.fork(child)) == 0
    for ring in rings:
        ring.close()


@as_root
def test_a_fork_that_fails_leaves_nothing_and_the_handle_as_it_was(name, children):
    def nobody():
        ring = Ring.create(name, 4096, writers=1)
        ring.write(b"1")
        assert ring.read() == b"1"
        before = descriptors()
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        for _ in range(3):
            try:
                pid = os.fork()
            except BlockingIOError:
                continue
            if not pid:
                os._exit(0)
            raise AssertionError("there was room for a process")
        assert descriptors() == before
        ring.write(b"2")
        assert ring.read() == b"2"
        with Ring.open(name) as other:
            try:
                other.write(b"3")
            except RingBusy:
                pass
            else:
                raise AssertionError("the lane was lost")
        ring.close()

    assert children.join(children.fork(as_nobody(nobody))) == 0


@contextlib.contextmanager
def limit(which, value):
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("call", ["create", "open"])
def test_without_address_space_a_call_says_so_and_succeeds_once_there_is_some(name, children, call):
    size = 1 << 30
    with Ring.create(name, size, writers=1, keep=True) as ring:

        def child():
            healthy = Healthy(name)
            before = holdings(name)
            which = f"{name}-2" if call == "create" else name
            with limit(resource.RLIMIT_AS, address_space() + (64 << 20)):
                try:
                    Ring.create(which, size, writers=1) if call == "create" else Ring.open(which)
                except OSError as error:
                    failed = error.errno, error.filename, str(error)
                else:
                    raise AssertionError("there was address space")
                healthy.check()
            assert failed[:2] == (errno.ENOMEM, which) and "map" in failed[2], failed
            assert holdings(name) == before
            (Ring.create(which, size, writers=1) if call == "create" else Ring.open(which)).close()
            healthy.check()
            healthy.close()

        assert children.join(children.fork(child)) == 0
        ring.unlink()


@pytest.mark.skipif(not GIL, reason="without a GIL Python has taken more addresses than it uses")
@pytest.mark.parametrize("way", [Ring.read, Ring.try_read, Ring.read_many, lambda ring: next(iter(ring))],
                         ids=["read", "try_read", "read_many", "iteration"])  # fmt: skip
def test_a_message_for_which_there_is_no_memory_stays(name, children, way):
    def child():
        with Ring.create(name, 256 << 20, writers=1) as ring:
            size = 128 << 20
            ring.write(b"before")
            ring.write(bytes(size))
            assert ring.read() == b"before"
            for _ in range(3):
                with limit(resource.RLIMIT_AS, address_space() + (64 << 20)):
                    try:
                        way(ring)
                    except MemoryError:
                        pass
                    else:
                        raise AssertionError("there was memory")
            got = way(ring)
            assert len(got[0] if isinstance(got, list) else got) == size
            assert ring.try_read() is None and ring.stats().messages_out == 2

    assert children.join(children.fork(child)) == 0


def test_with_small_files_only_create_and_the_first_write_say_so_and_succeed_later(name, children):
    """Python ignores the signal that a file which grows too large would send."""

    def child():
        healthy = Healthy(name)
        before = holdings(name)
        for size in (0, 4096, 65536):
            with limit(resource.RLIMIT_FSIZE, size):
                try:
                    Ring.create(name, 1 << 20, writers=4)
                except OSError as error:
                    failed = error.errno, error.filename
                else:
                    raise AssertionError("the file was small enough")
                healthy.check()
            assert failed == (errno.EFBIG, name)
            assert holdings(name) == before
        with Ring.create(name, 1 << 20, writers=4) as ring, Ring.open(name) as other:
            with limit(resource.RLIMIT_FSIZE, 4096):
                ring.write(b"1")  # the file is as large as it has to be already
                assert other.read() == b"1"
        del ring, other
        assert holdings(name) == before
        healthy.close()

    assert children.join(children.fork(child)) == 0


def test_without_inodes_create_says_so_and_succeeds_once_there_are_some(children):
    process = children.python(
        """
        import errno, os, subprocess
        from shmring import Ring
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=3", "tmpfs", "/dev/shm"], check=True)
        with Ring.create("small-1", 4096, writers=1) as ring, Ring.open("small-1") as other:
            other.write(b"1")
            os.close(os.open("/dev/shm/filler", os.O_CREAT))
            try:
                Ring.create("small-2", 4096)
            except OSError as error:
                assert (error.errno, error.filename) == (errno.ENOSPC, "small-2"), error
            else:
                raise AssertionError("there was an inode")
            assert sorted(os.listdir("/dev/shm")) == ["filler", "shmring.small-1"]
            other.write(b"2")
            assert ring.read_many() == [b"1", b"2"]
            os.unlink("/dev/shm/filler")
            Ring.create("small-2", 4096).close()
        assert os.listdir("/dev/shm") == []
        """,
        prefix=namespaces("-m"),
    )
    children.output(process)


def test_where_nothing_can_be_removed_a_ring_works_and_closes(children):
    process = children.python(
        """
        import os, subprocess
        from shmring import Ring
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        ring, other = Ring.create("small", 4096, writers=2), Ring.open("small")
        ring.write(b"1")
        subprocess.run(["mount", "--bind", "/dev/shm", "/dev/shm"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", "/dev/shm"], check=True)
        other.write(b"2")
        assert sorted(other.read_many()) == [b"1", b"2"]
        for what in (ring.unlink, lambda: Ring.open("small"), lambda: Ring.create("small")):
            try:
                what()
            except OSError as error:
                assert error.filename == "small", error
            else:
                raise AssertionError("it was not read-only")
        many = len(os.listdir("/proc/self/fd"))
        other.close(), ring.close(), ring.close()
        assert ring.closed and len(os.listdir("/proc/self/fd")) == many - 4
        assert os.listdir("/dev/shm") == ["shmring.small"]
        subprocess.run(["mount", "-o", "remount,bind,rw", "/dev/shm"], check=True)
        try:
            Ring.open("small")
        except FileNotFoundError as error:
            assert error.filename == "small"
        else:
            raise AssertionError("it counts as there")
        Ring.create("small").close()
        assert os.listdir("/dev/shm") == []
        """,
        prefix=namespaces("-m"),
    )
    assert children.output(process) == ""


@pytest.mark.parametrize("missing", ["/dev", "/proc"])
def test_where_a_directory_is_missing_an_open_ring_works_and_new_ones_come_later(children, missing):
    process = children.python(
        """
        import ctypes, os, subprocess, sys
        from shmring import Ring, RingBusy, unlink
        missing = sys.argv[1]
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        ring, other = Ring.create("small", 4096, writers=1), Ring.open("small")
        ring.write(b"1")
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", missing], check=True)
        for what in (Ring.create, Ring.open) if missing == "/proc" else (Ring.create, Ring.open, unlink):
            try:
                what("small")
            except FileNotFoundError as error:
                assert error.filename == "small", error
            else:
                raise AssertionError("where?")
        assert other.read() == b"1"
        try:
            other.write(b"2")
        except RingBusy:
            pass
        else:
            raise AssertionError("the lane was lost")
        ring.write(b"3")
        assert ctypes.CDLL(None).umount2(missing.encode(), 2) == 0  # umount(8) needs /proc itself
        with Ring.open("small") as third, Ring.create("small-2") as fourth:
            assert other.read() == b"3"
        other.close(), ring.close()
        assert os.listdir("/dev/shm") == []
        """,
        missing, prefix=namespaces("-m"),
    )  # fmt: skip
    assert children.output(process) == ""


# ---------------------------------------------------------------- calls that fail one by one

REFUSED = {
    "os": ["open", "ftruncate", "posix_fallocate", "fchmod", "link", "pread", "stat", "unlink"],
    "fcntl": ["fcntl"],
    "mmap": ["mmap"],
}


class Failing:
    """Has the call number `which` of a backend's calls into the system fail. `count`: how many there were."""

    def __init__(self, monkeypatch, which):
        self.count, self.which = 0, which
        for module, names in REFUSED.items():
            for function in names:
                self._wrap(monkeypatch, getattr(_linux, module), function)

    def _wrap(self, monkeypatch, module, function):
        real = getattr(module, function)

        def call(*args, **kwargs):
            self.count += 1
            if self.count == self.which:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, call)


def opened(name):
    kept(name)
    return Ring.open(name)


def opened_and_empty(name):
    return Ring.create(name, 4096, writers=1, keep=True)


USES = {
    **CALLS,
    "first write": (opened_and_empty, lambda ring: ring.write(b"x")),
    "first read": (opened, Ring.read_many),
}


@pytest.mark.parametrize("use", USES)
def test_whichever_call_into_the_system_fails_the_error_names_the_ring_and_nothing_is_left(
    name, place, healthy, monkeypatch, use
):
    prepare, function = USES[use]
    for which in itertools.count(1):
        if os.path.exists(place):
            os.unlink(place)
        ring = prepare(name)
        before = holdings(name)
        with monkeypatch.context() as patch:
            failing = Failing(patch, which)
            try:
                result, failed = function(ring or name), ""
            except OSError as error:
                result, failed = None, str(error)
        if failed:
            assert name in failed, f"call {which}: {failed}"
            assert holdings(name)[:2] == before[:2], f"call {which}"
            healthy.check()
            if ring:
                result = function(ring)
        for handle in (ring, result):
            if isinstance(handle, Ring):
                handle.close()
        if failing.count < which:
            break
    assert which > 1 and not failed


# ---------------------------------------------------------------- no membarrier

SECCOMP = """
import ctypes, errno, os, signal, struct, sys, time
from shmring import Ring, _linux
signal.alarm(30)
_linux.SLICE = None  # nothing but a bell ends a wait
REGISTER, EXPEDITE = _linux.MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, _linux.MEMBARRIER_CMD_GLOBAL_EXPEDITED

def refuse(error, *commands):
    for command in commands:
        steps = [
            (0x20, 0, 0, 0), (0x15, 0, 3, _linux.SYS_membarrier),  # the number of the call
            (0x20, 0, 0, 16), (0x15, 0, 1, command),  # the low half of its first argument
            (0x06, 0, 0, 0x00050000 | error),  # SECCOMP_RET_ERRNO
            (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        ]
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
        program = struct.pack("@HP", len(steps), ctypes.addressof(code))
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.c_char_p(program), 0, 0):  # NO_NEW_PRIVS; SECCOMP, FILTER
            print("no seccomp here:", os.strerror(ctypes.get_errno()))
            sys.exit()

def backend(error, commands):
    code, slower = errno.errorcode[error], []
    if REGISTER in commands:
        slower.append(f"no membarrier ({code}): a fence with every message")
    if EXPEDITE in commands:
        slower.append(f"no membarrier ({code}): sleepers look again every millisecond")
    return "; ".join(["linux: futex, OFD locks", *slower]) if slower else "linux: futex, OFD locks, membarrier"

error = getattr(errno, sys.argv[2])
probe = os.fork()
if not probe:
    refuse(error, REGISTER)
    os._exit(0)
assert os.waitpid(probe, 0)[1] == 0
"""


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_without_membarrier_on_any_side_messages_pass_and_both_sides_are_woken(name, children, error):
    process = children.python(
        SECCOMP + """if True:
        def side(commands, role, turns):
            pid = os.fork()
            if pid:
                return pid
            signal.alarm(20)
            refuse(error, *commands)
            ring = Ring.open(sys.argv[1], spin=0)
            role(ring, turns)
            if ring.backend != backend(error, commands):
                sys.exit(ring.backend)
            os._exit(0)

        def writer(ring, turns):
            for number in range(turns):
                while number < turns / 2 and not ring.stats().readers_parked:
                    time.sleep(0.0005)
                ring.write(b"%d" % number + bytes(1500))  # the lane is full after two

        def reader(ring, turns):
            for number in range(turns):
                while turns / 2 <= number < turns - 3 and not ring.stats().writers_parked:
                    time.sleep(0.0005)
                assert ring.read()[:-1500] == b"%d" % number

        for at_writer in ([], [REGISTER], [EXPEDITE], [REGISTER, EXPEDITE]):
            for at_reader in ([], [REGISTER], [EXPEDITE], [REGISTER, EXPEDITE]):
                with Ring.create(sys.argv[1], 4096, writers=1) as ring:
                    pids = [side(at_writer, writer, 40), side(at_reader, reader, 40)]
                    for pid in pids:
                        status = os.waitpid(pid, 0)[1]
                        assert status == 0, (at_writer, at_reader, pid == pids[0], status)
                    stats = ring.stats()
                    assert stats.messages_in == stats.messages_out == 40
                    assert stats.reader_parks and stats.writer_parks, "both slept"
        print("all")
        """,
        name, error,
    )  # fmt: skip
    output = children.output(process)
    if "no seccomp here" in output:
        pytest.skip(output)
    assert output == "all\n"
