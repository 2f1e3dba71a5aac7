"""macOS: a segment in POSIX shared memory; claims and presence by flock, sleep and wake by kqueue and FIFOs.

Shared memory has names there, but can neither be listed nor locked, and has no identity. So each ring has a
folder of its own, in a folder of this user's beside the system's caches (0700, so other users' rings are not
found; that folder is the system's own choice, `confstr`, and survives its restart):

    name-HASH            a file; which ring has this name now. A second link of the ring's own file
    ring-NONCE/ring      that file: the ring's name, nonce, and whether it is kept
                         locked: shared by each open handle, exclusive by who is alone and removes the ring
    ring-NONCE/present   FIFO; each open handle has its reading end open
    ring-NONCE/name      locked: who is about to take the name away from the ring
    ring-NONCE/claim-N   locked: the role with this number is taken
    ring-NONCE/held-N    FIFO; who has taken the role has its reading end open
    ring-NONCE/bell-N    FIFO; a byte into it rings the bell at this offset of the segment

and /shmring.NONCE, cut to what the system allows, is its memory, and the semaphore before its name's lock.

A ring gets its name only when it is whole, by link(2). The locks decide. A FIFO whose reading end somebody
has open tells others that there is somebody, without a lock, which would make a free role look taken for a
moment, or a ring that nobody has any more look alive: to open it for writing fails if there is nobody. The
kernel takes both back when their holder dies. What a process leaves behind that dies in the middle of a
creation, or was the last to have a ring open, is cleared away by whoever creates the next ring, any ring.

A bell's FIFO is never emptied: each sleeper has a queue of its own (EV_CLEAR) that remembers for itself
whether there was a byte since it looked. So no sleeper can take the signal that was another one's, not
even a thread of a handle that has just given up the role. `os_sync_wait_on_address`, a true shared futex,
is not used where it exists (14.4): it waits for one word and nothing else, so a handle's own threads and
event loops would need the FIFO all the same; and there is no machine here to show it on.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("this is the macOS backend of shmring, not one for Windows")

import contextlib
import errno
import fcntl
import hashlib
import math
import mmap
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from ctypes import (
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int16,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    create_string_buffer,
    get_errno,
)  # fmt: skip
from functools import partial
from itertools import chain
from typing import Final, NamedTuple

from . import _layout, _libsystem
from ._errors import RingBusy, RingCorrupted, RingIncompatible, naming
from ._layout import Layout
from ._posix import Doorbell, Doorbells, is_of, note_open
from ._posix import follow_forks as follow_forks  # part of what a backend offers
from ._posix import forking as _forking  # noqa: F401 - what tests count, beside the other two
from ._posix import living_segments as _segments
from ._posix import owners as _owners
from ._words import Fence, make_fence

MACHINE: Final = os.uname().machine  # of the interpreter: under Rosetta, x86_64 with x86_64's order of stores
if sys.maxsize <= 2**32 or MACHINE not in _layout.MACHINES:
    bits = sys.maxsize.bit_length() + 1
    raise ImportError(f"shmring knows 64-bit x86_64 and arm64 macOS, not a {bits}-bit Python on {MACHINE}")
TSO: Final = MACHINE == "x86_64"  # stores stay in order, and loads

FOLDER: Final = "shmring"  # within the user's cache folder
PREFIX: Final = b"/shmring."
MOST_IN_NAME: Final = 29  # bytes in the name of shared memory or a semaphore; 30 with the slash are allowed
REGISTRY: Final = "shmring ring, registry version 1"  # how a ring's file begins, whatever the version of its layout
LOCK_SECONDS: Final = 1.0  # that a change of a name waits for another one
TRIES: Final = 1000  # milliseconds that `create` gives another process to finish removing the name
TRIM: Final = 64  # bytes that are taken out of a full FIFO; it holds some thousands, and must never run empty
LONGEST: Final = 1e6  # seconds in one wait; the ring looks again after it
SLICE: float | None = 1.0  # seconds that the main thread sleeps at most before it looks for signals

# <sys/event.h>
EVFILT_READ: Final = -1
EVFILT_USER: Final = -10
EV_ADD: Final = 0x0001
EV_CLEAR: Final = 0x0020
NOTE_TRIGGER: Final = 0x01000000

# <sys/semaphore.h>: (sem_t *)-1; a semaphore is a descriptor number there, and 0 is one
SEM_FAILED: Final = -1

# <unistd.h>
_CS_DARWIN_USER_CACHE_DIR: Final = 65538


class kevent(Structure):
    """<sys/event.h>: a change to make in a queue, or an event that is in it."""

    _fields_ = (
        ("ident", c_uint64),  # uintptr_t: a descriptor, or a number of our own
        ("filter", c_int16),
        ("flags", c_uint16),
        ("fflags", c_uint32),
        ("data", c_int64),  # intptr_t
        ("udata", c_void_p),
    )


class timespec(Structure):
    """<time.h>, 64-bit: seconds and nanoseconds."""

    _fields_ = (("tv_sec", c_int64), ("tv_nsec", c_int64))


class Kqueue(c_int):
    """A queue of events that is closed when the last reference to it goes.

    A function with this restype returns an instance made within the same call in C, so that no exception
    of a signal handler can come between the system's answer and its keeper. A forked child does not have
    the queue: there the number is set to -1, before it is somebody else's.
    """

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self.value >= 0 and not finalizing():
            with contextlib.suppress(OSError):
                os.close(self.value)


# Prototypes of variadic functions list the fixed arguments alone; the others go as c_uint(...) each, because on
# arm64 they are passed in another way.

# int open(const char *path, int oflag, ...);
_open = _libsystem.quick["open"]
_open.argtypes = (c_char_p, c_int)
_open.restype = c_int

# int shm_open(const char *name, int oflag, ...);
_shm_open = _libsystem.quick["shm_open"]
_shm_open.argtypes = (c_char_p, c_int)
_shm_open.restype = c_int

# int shm_unlink(const char *name);
_shm_unlink = _libsystem.quick["shm_unlink"]
_shm_unlink.argtypes = (c_char_p,)
_shm_unlink.restype = c_int

# sem_t *sem_open(const char *name, int oflag, ...);
_sem_open = _libsystem.quick["sem_open"]
_sem_open.argtypes = (c_char_p, c_int)
_sem_open.restype = c_ssize_t  # as a pointer, 0 would come as None

# int sem_trywait(sem_t *sem);
_sem_trywait = _libsystem.quick["sem_trywait"]
_sem_trywait.argtypes = (c_void_p,)
_sem_trywait.restype = c_int

# int sem_post(sem_t *sem);
_sem_post = _libsystem.quick["sem_post"]
_sem_post.argtypes = (c_void_p,)
_sem_post.restype = c_int

# int sem_close(sem_t *sem);
_sem_close = _libsystem.quick["sem_close"]
_sem_close.argtypes = (c_void_p,)
_sem_close.restype = c_int

# int sem_unlink(const char *name);
_sem_unlink = _libsystem.quick["sem_unlink"]
_sem_unlink.argtypes = (c_char_p,)
_sem_unlink.restype = c_int

# int kqueue(void);
_kqueue = _libsystem.quick["kqueue"]
_kqueue.argtypes = ()
_kqueue.restype = Kqueue

# int kevent(int kq, const struct kevent *changelist, int nchanges, struct kevent *eventlist, int nevents,
#     const struct timespec *timeout);
_change = _libsystem.quick["kevent"]  # with no time to wait
_change.argtypes = (c_int, c_void_p, c_int, c_void_p, c_int, c_void_p)
_change.restype = c_int
_sleep = _libsystem.waiting["kevent"]
_sleep.argtypes = (c_int, c_void_p, c_int, c_void_p, c_int, c_void_p)
_sleep.restype = c_int
_Two = kevent * 2

# size_t confstr(int name, char *buf, size_t len);
_confstr = _libsystem.quick["confstr"]
_confstr.argtypes = (c_int, c_char_p, c_size_t)
_confstr.restype = c_size_t

# void OSMemoryBarrier(void); <libkern/OSAtomic.h>. Deprecated in favour of C11's atomic_thread_fence, which is
# exported too, but takes an argument: it costs more.
_barrier = _libsystem.quick["OSMemoryBarrier"]
_barrier.argtypes = ()
_barrier.restype = None


def describe() -> str:
    """What `Ring.backend` says."""
    return "macos: kqueue on FIFOs, flock; a fence with every message"


yield_processor: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))


def processors() -> int:
    """How many this process may run on."""
    return os.cpu_count() or 1


def _failure(what: str, name: str) -> OSError:
    """The error of the last call, as an exception that names the ring."""
    number = get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}", name)


def _lock(fd: int, kind: int) -> bool:
    """flock(2), without waiting: lock the file for this open file description, or see that another has it locked."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: str, fd: int) -> bool:
    """Is the file at this path the one that is open here?"""
    try:
        found = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(found, os.fstat(fd))


def _has_reader(path: str) -> bool:
    """Has somebody the reading end of this FIFO open? Else it cannot be opened for writing, without waiting."""
    noted: list[int] = []
    try:
        note_open(noted, path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    finally:
        for fd in noted:
            os.close(fd)
    return True


def _folder() -> str:
    """This user's folder of rings, made if there is none; nobody else can have a hand in it."""
    buffer = create_string_buffer(1024)  # PATH_MAX of <sys/syslimits.h>
    size = _confstr(_CS_DARWIN_USER_CACHE_DIR, buffer, len(buffer))
    if not 0 < size <= len(buffer):
        raise OSError(get_errno() or errno.ENOENT, "the system names no cache folder of this user, where rings are")
    path = os.path.join(os.fsdecode(buffer.value), FOLDER)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # whatever the umask
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        what = f"{path} is to be a folder of this user's, which nobody else may enter"
        raise PermissionError(errno.EPERM, what, path)
    return path


def _name_path(root: str, name: str) -> str:
    """Where the file is that says which ring has this name."""
    return f"{root}/name-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


class _Entry(NamedTuple):
    """What a ring's file says."""

    name: str
    nonce: bytes
    keep: bool

    def packed(self) -> bytes:
        return "\n".join((REGISTRY, self.nonce.hex(), "kept" if self.keep else "not kept", self.name, "")).encode()

    @classmethod
    def read(cls, fd: int) -> _Entry | None:
        """None: it is no ring's file, or its creator has died before it was whole."""
        lines = os.pread(fd, 1024, 0).decode("ascii", "replace").split("\n")
        if len(lines) != 5 or lines[0] != REGISTRY:
            return None
        try:
            nonce = bytes.fromhex(lines[1])
        except ValueError:
            return None
        return cls(lines[3], nonce, lines[2] == "kept") if len(nonce) == 16 else None


def unlink(name: str) -> None:
    """Remove a ring's name; FileNotFoundError if there is none. Open handles stay as they are."""
    passing = Segment(name)
    try:
        passing._find()
        passing._remove_name(LOCK_SECONDS)
        passing._remove_if_alone()
    finally:
        passing._let_go_of_all()


class _Bell:
    """A bell as one handle has it: its FIFO, and the queues on which its threads sleep."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.heard: object = None  # another object each time that it was heard, or the threads were woken
        self.asleep: dict[int, Kqueue] = {}  # the queues of who may be waiting, by number
        self.idle: list[Kqueue] = []  # that nobody uses now

    def new_queue(self, name: str) -> Kqueue:
        """A queue that hears this bell, from now on and also if it was ever rung, and a thread's own alarm."""
        queue: Kqueue = _kqueue()
        changes = _Two(
            kevent(self.fd, EVFILT_READ, EV_ADD | EV_CLEAR), kevent(0, EVFILT_USER, EV_ADD | EV_CLEAR)
        )  # fmt: skip
        if queue.value < 0 or _change(queue, changes, 2, None, 0, None) < 0:
            raise _failure("cannot make a queue of events", name)
        return queue


class Segment:
    """The shared memory of one handle, its locks and its FIFOs. See `_backend.Segment` for what it promises."""

    # Here for `__del__` of one that was never finished.
    _held: dict[int, list[int]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Layout
        self.map: mmap.mmap
        self.words: memoryview
        self._keep = False
        self._home = ""  # the ring's folder
        # What was opened for a role (its number in `_layout`; the file that is locked first, then the FIFO that
        # shows it) or a bell (its offset). In here as soon as there is one, so that a fork knows of it.
        self._held = {}
        self._bells: dict[int, _Bell] = {}
        self._doorbells = Doorbells()
        self._whole = False  # is `create` or `open` done?
        self._closed = False
        self._children: dict[int, list[int]] = {}  # by forking thread: what its child has for its presence
        # In C, with the reference as pop's default: an interrupt in a callback in Python would be swallowed.
        _segments[id(self)] = weakref.ref(self, partial(_segments.pop, id(self)))
        self._root = _folder()
        self._named = _name_path(self._root, name)

    @classmethod
    def create(cls, name: str, layout: Layout, mode: int, replace: bool) -> Segment:
        """Make the ring's folder and memory, and give it its name."""
        self = cls(name)
        self.layout = layout
        noted: list[int] = []
        try:
            _sweep(self._root)
            self._make_home()
            fd = self._open_memory(noted, os.O_CREAT | os.O_EXCL, mode)
            try:
                os.ftruncate(fd, layout.segment_bytes)  # the only time in its life that its size may be set
            except OSError as error:
                what = f"cannot have shared memory of {layout.segment_bytes:,} bytes: {error.strerror}"
                raise OSError(error.errno, what, name) from error
            self._attach(fd)
            header = _layout.pack_header(layout, MACHINE)
            self.map[8 : len(header)] = header[8:]
            self.map[0:8] = header[:8]
            for _ in range(TRIES):
                try:
                    os.link(f"{self._home}/ring", self._named)
                    self._whole = True
                    return self
                except FileExistsError:
                    if not _clear_the_way(name, replace):
                        time.sleep(0.001)
            raise RingBusy(f"ring {name!r} is being removed by another process, which does not get on with it")
        except BaseException:
            with contextlib.suppress(RingBusy):
                self.unlink()  # if it came to that
            self.close()
            raise
        finally:
            _close_all(noted)

    @classmethod
    def open(cls, name: str, any_owner: bool) -> Segment:
        """Attach to a ring that somebody has open, or that is kept."""
        self = cls(name)
        noted: list[int] = []
        present = False
        try:
            fd, entry = self._find()
            self._trust(os.fstat(fd), any_owner)
            # Somebody who has the ring open shows; if nobody does, it is what a crash of everybody left behind.
            if not entry.keep and not _has_reader(f"{self._home}/present"):
                raise FileNotFoundError(errno.ENOENT, "there is no ring of this name that anybody has open", name)
            # Shown first, then locked: who comes later must not think that there is nobody.
            try:
                self._open_file("present", os.O_RDONLY, _layout.PRESENCE)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "the ring of this name was just removed", name) from None
            present = _lock(fd, fcntl.LOCK_SH)
            if not present or not _leads_to(self._named, fd):
                raise FileNotFoundError(errno.ENOENT, "the ring of this name was just removed", name)
            try:
                fd = self._open_memory(noted, 0, 0)
            except FileNotFoundError:
                what = "the ring of this name has no memory any more (was the system restarted?)"
                raise FileNotFoundError(errno.ENOENT, what, name) from None
            status = os.fstat(fd)
            self._trust(status, any_owner)
            if status.st_size < _layout.HEADER_BYTES:
                raise RingCorrupted(f"ring {name!r} has {status.st_size:,} bytes, too few for a header")
            with mmap.mmap(fd, _layout.HEADER_BYTES) as header:  # it cannot be read in another way
                self.layout = layout = _layout.parse_header(header[:], None, MACHINE, name)
            if status.st_size < layout.segment_bytes:  # it is in whole pages
                raise RingCorrupted(
                    f"ring {name!r} is {status.st_size:,} bytes long, its header says {layout.segment_bytes:,}"
                )
            if layout.nonce != entry.nonce:
                raise RingCorrupted(f"ring {name!r}: its nonce is not the one in its file")
            self._attach(fd)
            self._whole = True
        except BaseException:
            self.close(keep=not present)
            raise
        finally:
            _close_all(noted)
        return self

    # ------------------------------------------------------------ its folder, its memory, its descriptors

    def _find(self) -> tuple[int, _Entry]:
        """Open the file that has the ring's name, for its lock, and read it."""
        try:
            fd = self._open_path(self._named, os.O_RDONLY, _layout.PRESENCE)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", self.name) from None
        except OSError as error:
            what = f"cannot open the ring's file {self._named}: {error.strerror}"
            raise OSError(error.errno, what, self.name) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, f"{self._named} is no regular file, so no ring", self.name)
        entry = _Entry.read(fd)
        if entry is None or entry.name != self.name:
            raise RingIncompatible(f"{self.name!r} is no shmring ring: {self._named} is not the file of one")
        self._is(entry)
        return fd, entry

    def _is(self, entry: _Entry) -> None:
        self._home, self._keep = f"{self._root}/ring-{entry.nonce.hex()}", entry.keep
        self._system_name = (PREFIX + entry.nonce.hex().encode())[:MOST_IN_NAME]

    def _make_home(self) -> None:
        """Make the ring's folder, and be present."""
        entry = _Entry(self.name, self.layout.nonce, self.layout.keep)
        self._is(entry)
        for _ in range(TRIES):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.mkdir(self._home, 0o700)
                os.chmod(self._home, 0o700)  # whatever the umask
            with contextlib.suppress(FileNotFoundError):
                fd = self._open_file("ring", os.O_RDWR | os.O_CREAT, _layout.PRESENCE)
                if _lock(fd, fcntl.LOCK_SH) and _leads_to(f"{self._home}/ring", fd):
                    break
            # Somebody clears away what others left behind, and came between two of these calls.
            self._let_go(_layout.PRESENCE)
            time.sleep(0.001)
        else:
            raise RingBusy(f"the folder of ring {self.name!r} is being removed by another process, again and again")
        os.write(fd, entry.packed())
        self._make_fifo("present")
        self._open_file("present", os.O_RDONLY, _layout.PRESENCE)

    def _open_memory(self, noted: list[int], flags: int, mode: int) -> int:
        noted.extend(map(_shm_open, [self._system_name], [os.O_RDWR | flags], [c_uint(mode)]))
        if noted[-1] < 0:
            noted.pop()
            raise _failure("cannot open the ring's shared memory", self.name)
        os.set_inheritable(noted[-1], False)
        return noted[-1]

    def _attach(self, fd: int) -> None:
        try:
            self.map = mmap.mmap(fd, self.layout.segment_bytes)
        except OSError as error:
            what = f"cannot map the ring's {self.layout.segment_bytes:,} bytes: {error.strerror}"
            raise OSError(error.errno, what, self.name) from error
        self.words = memoryview(self.map).cast("Q")

    def _trust(self, status: os.stat_result, any_owner: bool) -> None:
        if not any_owner and status.st_uid not in (os.geteuid(), 0):
            what = f"the ring belongs to user {status.st_uid}; any_owner=True (--any-owner) trusts that user"
            raise PermissionError(errno.EPERM, what, self.name)

    def _open_file(self, name: str, flags: int, role: int) -> int:
        return self._open_path(f"{self._home}/{name}", flags, role)

    def _open_path(self, path: str, flags: int, role: int) -> int:
        """A new description of a file, whose descriptor is in `_held` as soon as there is one.

        No other thread forks between the two, as it would while os.open lets go of the interpreter: its
        child would not know the descriptor, and hold our claims for as long as it lives.
        """
        return self._open_into(self._held.setdefault(role, []), path, flags)

    def _open_into(self, held: list[int], path: str, flags: int) -> int:
        encoded, flags = os.fsencode(path), flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            held.extend(map(_open, [encoded], [flags], [c_uint(0o600)]))
            fd = held[-1]
            if fd >= 0:
                status = os.fstat(fd)
                _owners[fd] = id(self), (status.st_dev, status.st_ino)
                if flags & os.O_CREAT and status.st_mode & 0o600 != 0o600:
                    os.fchmod(fd, 0o600)  # the umask took it away
                return fd
            number = get_errno()
            held.pop()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), path)

    def _make_fifo(self, name: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(f"{self._home}/{name}", 0o600)
            os.chmod(f"{self._home}/{name}", 0o600)  # whatever the umask

    def _own(self, fd: int) -> bool:
        """Is this remembered descriptor still ours? After os.closerange the number may be a stranger's."""
        if fd not in _owners:  # opened, and not yet noted there
            try:
                return os.fstat(fd).st_ino != 0
            except OSError:
                return False
        owner, identity = _owners[fd]
        return owner == id(self) and is_of(fd, identity)

    def _close_descriptor(self, fd: int) -> None:
        """Close a descriptor if it is ours."""
        if self._own(fd):
            entry = _owners.get(fd)
            os.close(fd)
            # Not before: if an exception comes in between, `_let_go_of_all` finds it there.
            if _owners.get(fd) is entry:  # else another thread has the number by now
                _owners.pop(fd, None)

    def _let_go(self, role: int) -> None:
        """Give up what was opened for a role or a bell: what shows it first, then the lock."""
        held = self._held.get(role, [])
        while held:
            fd = held[-1]
            if len(held) == 1 and role >= _layout.PRESENCE and self._own(fd):
                _lock(fd, fcntl.LOCK_UN)  # if an exception leaves the descriptor open, it holds nothing
            held.pop()  # before another thread gets the number
            self._close_descriptor(fd)
        self._held.pop(role, None)

    def _let_go_of_all(self) -> None:
        for role in list(self._held):
            self._let_go(role)
        for fd, entry in list(_owners.items()):
            if entry[0] == id(self) and not any(fd in noted for noted in list(self._children.values())):
                self._close_descriptor(fd)  # an exception came before it was closed, or right after
                if _owners.get(fd) is entry:
                    _owners.pop(fd, None)

    def _presence(self) -> int:
        """The descriptor that carries our presence, -1 if there is none (any more)."""
        held = self._held.get(_layout.PRESENCE)
        return held[0] if held and self._own(held[0]) else -1

    # ------------------------------------------------------------ the name

    @contextlib.contextmanager
    def _changing_the_name(self, seconds: float) -> Iterator[bool]:
        """Hold the lock of this ring's name; False: another process has it, and does not give it back in time.

        The lock of the file decides. The semaphore keeps a crowd away from it, which asks only now and then
        while the gate is shut; it may be wrong, because nobody opens it for a holder who died. That one's
        record is found in the file, and its gate is opened by the next holder. If it died in the middle
        there is nothing to repair: the name leads to the ring, or it does not.
        """
        deadline = time.perf_counter() + seconds
        gate = SEM_FAILED
        admitted = locked = False
        fd = self._open_file("name", os.O_RDWR | os.O_CREAT, _layout.NAME)
        try:
            gate = _sem_open(self._system_name, os.O_CREAT, c_uint(0o600), c_uint(1))
            if gate == SEM_FAILED:
                raise _failure("cannot open the semaphore of the ring's name", self.name)
            tries = 0
            while True:
                admitted = admitted or _sem_trywait(gate) == 0
                if admitted or tries % 8 == 0:
                    locked = _lock(fd, fcntl.LOCK_EX)
                if locked or time.perf_counter() >= deadline:
                    break
                tries += 1
                time.sleep(0.001)
            if locked:
                died = os.pread(fd, 1, 0) == b"!"
                admitted = admitted or died
                os.pwrite(fd, b"!", 0)
            yield locked
        finally:
            if locked:
                os.pwrite(fd, b".", 0)
            if admitted:
                _sem_post(gate)
            if gate != SEM_FAILED:
                _sem_close(gate)
                if not os.path.exists(self._home):
                    _sem_unlink(self._system_name)  # the ring was removed before we made it
            self._let_go(_layout.NAME)  # which unlocks it

    def _remove_name(self, seconds: float) -> None:
        """Take the name away from this ring, if it has it. Whoever does that has the lock of the ring's name.

        So nobody removes a name that was given to another ring in between. Its memory cannot be opened after
        that, and goes with the last handle.
        """
        fd = self._held[_layout.PRESENCE][0]
        try:
            with self._changing_the_name(seconds) as mine:
                if not mine:
                    what = "is being changed by another process, which does not get on with it"
                    raise RingBusy(f"the name of ring {self.name!r} {what}")
                if _leads_to(self._named, fd):
                    os.unlink(self._named)
                _shm_unlink(self._system_name)  # EINVAL or ENOENT if it has gone
        except FileNotFoundError:
            # Without its folder nobody gets the lock of its name, so who is alone with its file is alone.
            if not self._whole and _lock(fd, fcntl.LOCK_EX) and _leads_to(self._named, fd):
                os.unlink(self._named)

    def unlink(self) -> None:
        """Remove the ring's name if it still is this ring's."""
        if self._presence() >= 0:
            with naming(self.name):
                self._remove_name(LOCK_SECONDS)

    # ------------------------------------------------------------ claims

    def claim(self, byte: int) -> bool:
        """Take a role for this handle, if no living handle has it. Taking it again is fine."""
        if self._presence() < 0:
            what = "the descriptor of this ring's presence was closed behind its back, or there was none left at a fork"
            raise OSError(errno.EBADF, what, self.name)
        with naming(self.name):
            held = self._held.setdefault(byte, [])
            number = byte - _layout.PRESENCE
            if not held:
                self._open_file(f"claim-{number}", os.O_RDWR | os.O_CREAT, byte)
            if not _lock(held[0], fcntl.LOCK_EX):
                self._let_go(byte)
                return False
            if len(held) < 2:
                self._make_fifo(f"held-{number}")
                self._open_file(f"held-{number}", os.O_RDONLY, byte)
            return True

    def release(self, byte: int) -> None:
        """Give a role back. Not held: nothing happens."""
        self._let_go(byte)

    def is_claimed(self, byte: int) -> bool:
        """Does another handle hold this role now, by the kernel's word?"""
        return byte not in self._held and _has_reader(f"{self._home}/held-{byte - _layout.PRESENCE}")

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles other handles hold now, by the kernel's word."""
        return sum(map(self.is_claimed, range(first, first + count)))

    def reserve(self, offset: int, nbytes: int) -> None:
        """The system gives memory page by page, when it is touched, and has no call that takes it before."""

    def back(self, offset: int, nbytes: int) -> None:
        """What was never touched reads as zeros."""

    # ------------------------------------------------------------ sleeping and waking

    def order_fence(self) -> Fence:
        """What keeps loads and stores in order, for one monitor; None where the machine does.

        On arm64 the system's barrier, not a cycle of a lock: what a lock of Python's comes to there depends on
        the version of CPython and on how the system makes mutexes, and two cycles cost no less.
        """
        return None if TSO else _barrier

    def waker_fence(self) -> Fence:
        """What a waker does between publishing and looking for sleepers."""
        return make_fence(TSO) if TSO else _barrier

    def sleeper_fence(self) -> bool:
        """A full barrier here; wakers have their own."""
        _barrier()
        return True

    def _bell(self, number: int) -> _Bell:
        bell = self._bells.get(number)
        if bell is None and self._closed:
            return _Bell(-1)
        if bell is None:
            with naming(self.name):
                self._make_fifo(f"bell-{number}")
                fd = self._open_file(f"bell-{number}", os.O_RDWR, number)  # with its reading end: never SIGPIPE
            bell = self._bells.setdefault(number, _Bell(fd))
        return bell

    def ring(self, bell: int) -> bool:
        """Wake who sleeps on a bell, or is about to; each one's queue remembers it."""
        rung = True
        if self._closed:
            return rung
        _barrier()  # ORDER epoch before doorbell, as they were stored
        state = self.words[(bell + _layout.DOORBELL) >> 3]
        if state & _layout.ATTACHED:  # each is told by itself, so that it does not matter which is first
            rung = self._doorbells.ring(bell, state >> 2, self._doorbell_place)
            if state & _layout.ALONE:
                return rung
        try:
            mine = self._bell(bell)
            if not self._own(mine.fd):  # somebody closed our descriptors; the number may be a stranger's
                mine.fd = self._open_file(f"bell-{bell}", os.O_RDWR, bell)
        except FileNotFoundError:
            return rung  # at the end of the process: this handle has left, and nobody else was there
        while True:
            try:
                os.write(mine.fd, b"!")
                return rung
            except BlockingIOError:
                # Full, and what was there before wakes nobody any more. A kill between the two is one before the ring.
                with contextlib.suppress(BlockingIOError):
                    os.read(mine.fd, TRIM)

    def doorbell(self, bell: int) -> Doorbell:
        """Make what event loops can wait for, and `ring` rings too while the word beside the bell says so."""
        with naming(self.name):
            return Doorbell(*self._doorbell_place(bell), 0o600)

    def _doorbell_place(self, bell: int) -> tuple[str, Callable[[os.stat_result], bool]]:
        return f"{self._home}/doorbell-{bell}", lambda status: status.st_uid == os.geteuid()

    def note(self, bell: int) -> object:
        """To be given to `wait`, which then returns also if the bell is rung before it is called."""
        return self._bell(bell).heard

    def wait(self, bell: int, noted: object, deadline: float | None) -> None:
        """Sleep until the bell is rung, or `deadline` (time.perf_counter), or less."""
        mine = self._bell(bell)
        try:
            queue = mine.idle.pop()
        except IndexError:
            try:
                queue = mine.new_queue(self.name)
            except OSError:
                if self._closed:
                    return  # there is nothing to wait for
                raise
        number = queue.value
        heard = False
        try:
            mine.asleep[number] = queue  # before the look at `heard`, as `wake` does the two the other way round
            if mine.heard is noted:
                events, timeout = _Two(), _timeout(deadline)
                heard = True  # an exception after the call would hide that this queue has forgotten the ring
                outcome = _sleep(queue, None, 0, events, 2, timeout)
                heard = any(event.filter == EVFILT_READ for event in events[: max(0, outcome)])
                if outcome < 0 and get_errno() != errno.EINTR:
                    raise _failure("cannot wait for an event", self.name)
        finally:
            mine.asleep.pop(number, None)
            if heard:
                mine.heard = object()  # for who has noted before, and uses this queue next
            mine.idle.append(queue)

    def wake(self, bell: int) -> None:
        """Have this handle's own threads return from `wait`, now or when they come to it."""
        mine = self._bells.get(bell)
        if mine is not None:
            mine.heard = object()
            alarm = kevent(0, EVFILT_USER, 0, NOTE_TRIGGER)
            for queue in list(mine.asleep.values()):
                _change(queue, byref(alarm), 1, None, 0, None)

    # ------------------------------------------------------------ life and death

    def _remove_if_alone(self) -> None:
        """With no lock: if nobody is present, remove the ring, unless it is kept and has its name."""
        fd = self._held[_layout.PRESENCE][0]
        if not _lock(fd, fcntl.LOCK_EX):
            return
        try:
            if self._keep and _leads_to(self._named, fd):
                return
            if _leads_to(self._named, fd):
                self._remove_name(0)
            _shm_unlink(self._system_name)
            _sem_unlink(self._system_name)
            _clear(self._home)
            _sem_unlink(self._system_name)  # who came for the name's lock meanwhile has made it anew
        except (OSError, RingBusy):
            pass  # somebody else is at it; or it stays, and counts as not there
        finally:
            _lock(fd, fcntl.LOCK_UN)

    def leave(self) -> None:
        """Give up the presence, and remove the ring if nobody else is present and it is not to be kept.

        The roles and the memory stay with us: for the end of a process, whose other threads still run.
        """
        fd = self._presence()
        if fd >= 0:
            held = self._held[_layout.PRESENCE]
            while len(held) > 1:
                self._close_descriptor(held.pop())
            # First let go, then see: of two that leave at once, each would see the other still there.
            _lock(fd, fcntl.LOCK_UN)
            self._remove_if_alone()

    def close(self, keep: bool = False) -> None:
        """Leave, and give up all claims; with `keep` the name stays.

        The memory goes when the last reference to the map does: a thread may still be about to wait.
        """
        if not keep:
            self.leave()
        self._closed = True
        self._doorbells.close()
        self._let_go_of_all()
        for bell in list(self._bells.values()):
            bell.idle.clear()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A handle that an exception kept from ever reaching its caller; all others are closed by now.
        try:
            if self._held:
                self.close(keep=not self._whole)
        except Exception:
            if not finalizing():  # else the modules' names may be gone, and the system closes it
                raise

    # ------------------------------------------------------------ forks

    def before_fork(self) -> None:
        """Open the child's own descriptions, and be present for it before the parent can go away."""
        noted = self._children.setdefault(threading.get_ident(), [])
        if self._whole and self._presence() >= 0:
            if len(noted) < 2 or noted[-1] < 0:
                for fd in noted:
                    self._close_descriptor(fd)
                noted.clear()
                self._open_into(noted, f"{self._home}/ring", os.O_RDONLY)
                self._open_into(noted, f"{self._home}/present", os.O_RDONLY)
            _lock(noted[0], fcntl.LOCK_SH)

    def after_fork_in_parent(self) -> None:
        """The child has its descriptions now."""
        thread = threading.get_ident()
        for fd in self._children.get(thread, ()):
            self._close_descriptor(fd)
        self._children.pop(thread, None)

    def after_fork_in_child(self) -> None:
        """Hold no claim of the parent's: its locks live as long as any copy of their descriptor.

        Closed, never unlocked, which would unlock the parent's.
        """
        mine = self._children.get(threading.get_ident(), [])
        for bell in self._bells.values():
            for queue in (*bell.idle, *bell.asleep.values()):
                queue.value = -1  # a queue does not survive a fork
        self._bells = {}
        for fd in chain(*self._held.values(), *self._children.values()):  # again, if an exception comes
            if fd not in mine:
                self._close_descriptor(fd)
        self._held = {_layout.PRESENCE: mine} if mine else {}
        self._children.clear()


def _timeout(deadline: float | None) -> object:
    """How long to wait, rounded up; in the main thread not beyond the slice. None is for ever."""
    seconds = None if deadline is None else min(max(0.0, deadline - time.perf_counter()), LONGEST)
    if SLICE is not None and threading.get_ident() == threading.main_thread().ident:
        # A signal that comes just before the call does not interrupt it.
        seconds = SLICE if seconds is None else min(seconds, SLICE)
    if seconds is None:
        return None
    nanoseconds = math.ceil(seconds * 1e9)
    return byref(timespec(nanoseconds // 10**9, nanoseconds % 10**9))


def _close_all(noted: list[int]) -> None:
    for fd in noted:
        with contextlib.suppress(OSError):  # EINVAL: shared memory that never had a size
            os.close(fd)


def _clear(home: str) -> None:
    """Remove a ring's folder. Its file is the last: with it goes the lock that keeps others from doing the same."""
    for name in sorted(os.listdir(home), key=lambda name: name == "ring"):
        os.unlink(f"{home}/{name}")
    os.rmdir(home)


def _sweep(root: str) -> None:
    """Clear away what was left behind by processes that died: rings that nobody has open, and unfinished ones."""
    for entry in os.listdir(root):
        if entry.startswith("ring-"):
            with contextlib.suppress(OSError, RingBusy, ValueError):  # somebody else is at it
                _sweep_one(f"{root}/{entry}", bytes.fromhex(entry[5:]))


def _sweep_one(home: str, nonce: bytes) -> None:
    if _has_reader(f"{home}/present"):
        return
    passing = Segment("?")
    try:
        passing._is(_Entry("?", nonce, False))
        # Made if there is none, because its creator may be about to: the lock of the file that is there decides.
        fd = passing._open_file("ring", os.O_RDWR | os.O_CREAT, _layout.PRESENCE)
        found = _Entry.read(fd)
        if found is not None:
            passing.name, passing._keep = found.name, found.keep
            passing._named = _name_path(passing._root, found.name)
            if found.keep and _leads_to(passing._named, fd):
                return  # not even locked: who opens it would find it locked
        if _leads_to(f"{home}/ring", fd):
            passing._remove_if_alone()
    finally:
        passing._let_go_of_all()


def _clear_the_way(name: str, replace: bool) -> bool:
    """Make room for a new ring of this name, or say why there is none. False: somebody else is at it."""
    passing = Segment(name)
    noted: list[int] = []
    try:
        try:
            fd, entry = passing._find()
        except FileNotFoundError:
            return True
        except (OSError, RingIncompatible) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it says nothing about what lies there
            what = f"{passing._named} exists and is no ring's; it is left alone"
            raise FileExistsError(errno.EEXIST, what, name) from error
        kept = entry.keep
        if kept:
            try:
                passing._open_memory(noted, 0, 0)
            except FileNotFoundError:
                kept = False  # it went with the system's restart
        if kept and not replace:
            what = "a kept ring of this name exists; open it, unlink it, or pass replace=True"
            raise FileExistsError(errno.EEXIST, what, name)
        if not _lock(fd, fcntl.LOCK_EX):
            if not kept and not _has_reader(f"{passing._home}/present"):
                return False  # it is being removed
            if replace:
                raise RingBusy(f"ring {name!r} cannot be replaced: somebody has it open")
            raise FileExistsError(errno.EEXIST, "a ring of this name exists and somebody has it open", name)
        passing._remove_name(0)
        passing._remove_if_alone()
        return not _leads_to(passing._named, fd)
    except RingBusy:
        if replace and _has_reader(f"{passing._home}/present"):
            raise
        return False
    finally:
        _close_all(noted)
        passing._let_go_of_all()


# ---------------------------------------------------------------- looking from outside, and tidying up


def _read_entry(path: str) -> _Entry | None:
    """What the file of a ring says that lies here, if there is one."""
    noted: list[int] = []
    try:
        fd = note_open(noted, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        return _Entry.read(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        _close_all(noted)


def names() -> list[str]:
    """The names of this user's rings, in alphabetical order."""
    root = _folder()
    entries = [_read_entry(f"{root}/{file}") for file in os.listdir(root) if file.startswith("name-")]
    return sorted(entry.name for entry in entries if entry is not None and _layout.is_name(entry.name))


class Look:
    """A ring as it is seen from outside; see `_backend.Look`. It locks nothing, and shows nowhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Layout
        self.map: mmap.mmap
        self.words: memoryview
        self.size: int | None = None  # it is in whole pages
        self.memory: int | None = None
        self.owner: int | None = os.geteuid()  # whose folder it is
        self.mode: int | None = 0o600
        self.header = b""
        self._noted: list[int] = []
        root = _folder()
        named = _name_path(root, name)
        entry = _read_entry(named)
        if entry is None or entry.name != name:
            if not os.path.lexists(named):
                raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", name)
            self.where = named
            return  # it is no ring's file
        self.where = f"{root}/ring-{entry.nonce.hex()}"
        system_name = (PREFIX + entry.nonce.hex().encode())[:MOST_IN_NAME]
        self._noted.extend(map(_shm_open, [system_name], [os.O_RDONLY]))
        if self._noted[-1] < 0:
            self._noted.pop()
            raise _failure("cannot open the ring's shared memory", name)
        try:
            os.set_inheritable(self._noted[-1], False)
            if os.fstat(self._noted[-1]).st_size >= _layout.HEADER_BYTES:
                with mmap.mmap(self._noted[-1], _layout.HEADER_BYTES, prot=mmap.PROT_READ) as header:
                    self.header = header[:]
        except BaseException:
            self.close()
            raise

    def attach(self, layout: Layout, nbytes: int) -> None:
        """Map the first `nbytes` for reading."""
        if os.fstat(self._noted[-1]).st_size < layout.segment_bytes:
            raise RingCorrupted(f"ring {self.name!r} is shorter than the {layout.segment_bytes:,} bytes that it says")
        self.layout = layout
        self.map = mmap.mmap(self._noted[-1], nbytes, prot=mmap.PROT_READ)
        self.words = memoryview(self.map).cast("Q")

    def is_open(self) -> bool:
        """Has anybody the ring open?"""
        return _has_reader(f"{self.where}/present")

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles are held now, by the kernel's word."""
        numbers = range(first - _layout.PRESENCE, first - _layout.PRESENCE + count)
        return sum(_has_reader(f"{self.where}/held-{number}") for number in numbers)

    def order_fence(self) -> Fence:
        """What keeps loads in order; None where the machine does."""
        return None if TSO else _barrier

    def close(self) -> None:
        """Look no more."""
        _close_all(self._noted)
        self._noted.clear()


def collect(name: str, kept: bool) -> bool:
    """Remove a ring that nobody has open, in the way in which `create` makes room; a kept one only if `kept` says so.

    Returns:
        False if it stays: it is in use, kept, or no ring.
    """
    try:
        return _clear_the_way(name, kept)
    except (FileExistsError, RingBusy):
        return False


def strays(dry: bool) -> list[str]:
    """The folders of rings that have lost their name, or never had one, and that nobody has: their paths.

    They are removed, as each `create` does, unless it is a `dry` run.
    """
    root, found = _folder(), []
    for entry in sorted(os.listdir(root)):
        home = f"{root}/{entry}"
        with contextlib.suppress(OSError, RingBusy, ValueError):  # somebody else is at it
            if entry.startswith("ring-") and not _has_reader(f"{home}/present") and not _is_named(root, home):
                if not dry:
                    _sweep_one(home, bytes.fromhex(entry[5:]))
                if dry or not os.path.exists(home):
                    found.append(home)
    return found


def _is_named(root: str, home: str) -> bool:
    """Does its name lead to the ring in this folder?"""
    entry = _read_entry(f"{home}/ring")
    if entry is None:
        return False
    try:
        return os.path.samefile(_name_path(root, entry.name), f"{home}/ring")
    except FileNotFoundError:
        return False
