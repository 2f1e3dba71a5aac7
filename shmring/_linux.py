"""Linux: a segment in /dev/shm, claims by open-file-description locks, sleep and wake by futex.

A ring is a file in /dev/shm. It is made without a name (O_TMPFILE), filled, and then linked: who sees
the name sees a whole ring. Every handle opens the file twice: one description is mapped (mmap keeps
it, for as long as the map lives), the other is never mapped and carries the handle's locks; so a claim
ends exactly when it is unlocked, closed, or its process dies, whatever still holds the memory.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"this is the Linux backend of shmring, not one for {sys.platform}")

import contextlib
import errno
import fcntl
import math
import mmap
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Callable
from ctypes import CDLL, PyDLL, Structure, addressof, byref, c_char, c_char_p, c_int, c_long, c_void_p, get_errno
from functools import lru_cache, partial
from itertools import chain
from typing import Final

from . import _layout
from ._errors import RingBusy, naming
from ._layout import Layout
from ._posix import Doorbell, Doorbells, is_of, note_open
from ._posix import follow_forks as follow_forks  # part of what a backend offers
from ._posix import forking as _forking  # noqa: F401 - what tests count, beside the other two
from ._posix import living_segments as _segments
from ._posix import owners as _owners
from ._words import Fence, make_fence

MACHINE: Final = os.uname().machine
if sys.maxsize <= 2**32 or MACHINE not in ("x86_64", "aarch64"):
    bits = sys.maxsize.bit_length() + 1
    raise ImportError(f"shmring knows 64-bit x86_64 and aarch64 Linux, not a {bits}-bit Python on {MACHINE}")

DIRECTORY = "/dev/shm"
PREFIX: Final = "shmring."
DOORBELLS: Final = "shmbell."  # what the name of a doorbell's FIFO begins with
REMOVER_TRIES: Final = 1000  # milliseconds that `create` gives another process to finish removing the name
SLICE: float | None = 1.0  # seconds that a thread sleeps at most before it looks for signals

# <sys/syscall.h>
SYS_futex: Final = {"x86_64": 202, "aarch64": 98}[MACHINE]
SYS_membarrier: Final = {"x86_64": 324, "aarch64": 283}[MACHINE]

# <linux/futex.h>; without FUTEX_PRIVATE_FLAG: the others are in other processes
FUTEX_WAKE_OP: Final = 5
FUTEX_WAIT: Final = 0  # its time-out is a length of time
FUTEX_WAIT_BITSET: Final = 9  # its time-out is a point on CLOCK_MONOTONIC, which is Python's time.perf_counter
FUTEX_BITSET_MATCH_ANY: Final = 0xFFFFFFFF
FUTEX_OP_ADD: Final = 1

# <limits.h>
INT_MAX: Final = 0x7FFFFFFF

# <linux/membarrier.h>
MEMBARRIER_CMD_GLOBAL_EXPEDITED: Final = 1 << 1
MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2

# struct flock of <fcntl.h>: short l_type, l_whence; off_t l_start, l_len; pid_t l_pid
_FLOCK = struct.Struct("hhqqi4x")


class _Timespec(Structure):
    """struct timespec of <time.h>, 64-bit: seconds and nanoseconds."""

    _fields_ = (("tv_sec", c_long), ("tv_nsec", c_long))


def _timespec(seconds: float) -> _Timespec:
    nanoseconds = math.ceil(seconds * 1e9)
    return _Timespec(nanoseconds // 10**9, nanoseconds % 10**9)


_slice = lru_cache(maxsize=1)(_timespec)  # one is the same as the next: to make it is a third of a wait's bytecodes

# long syscall(long number, ...). All arguments are passed ready-made: conversion would double the cost.
_waiting = CDLL(None, use_errno=True)["syscall"]  # lets go of the interpreter: for calls that may sleep
_waiting.restype = c_long
_quick = PyDLL(None, use_errno=True)["syscall"]
_quick.restype = c_long

# int open(const char *pathname, int flags, ...); the mode is for O_CREAT, which we do not use
_quick_open = PyDLL(None, use_errno=True)["open"]
_quick_open.argtypes = (c_char_p, c_int)
_quick_open.restype = c_int

_FUTEX = c_long(SYS_futex)
_WAIT = c_int(FUTEX_WAIT)
_WAIT_UNTIL = c_int(FUTEX_WAIT_BITSET)
_WAKE = c_int(FUTEX_WAKE_OP)
_ALL = c_int(INT_MAX)
_NONE = c_long(0)
_ZERO = c_int(0)
_ANY = c_int(FUTEX_BITSET_MATCH_ANY - (1 << 32))
_ADD_ONE = c_int((FUTEX_OP_ADD << 28) | (1 << 12))
_MEMBARRIER = c_long(SYS_membarrier)
_EXPEDITE = c_int(MEMBARRIER_CMD_GLOBAL_EXPEDITED)
_REGISTER = c_int(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED)

TSO: Final = MACHINE == "x86_64"  # stores stay in order, and loads


class _Membarrier:
    """Whether this process can make others fence, and be made to. Found out at the first claim."""

    def __init__(self) -> None:
        self.registered: bool | None = None
        self.unregistered = ""  # why not
        self.unreached = ""  # why others cannot be made to fence

    def register(self) -> bool:
        """Have this process pass a full barrier whenever a sleeper asks for one. Inherited by fork."""
        if self.registered is None:
            # int membarrier(int cmd, unsigned int flags, int cpu_id); since Linux 4.16
            self.registered = _waiting(_MEMBARRIER, _REGISTER, c_int(0), c_int(0)) == 0
            if not self.registered:
                self.unregistered = errno.errorcode.get(get_errno(), str(get_errno()))
        return self.registered

    def expedite(self) -> bool:
        """Pass a full barrier, here and in every registered process. False: only here, if at all."""
        if _quick(_MEMBARRIER, _EXPEDITE, _ZERO, _ZERO) == 0:
            return True
        self.unreached = errno.errorcode.get(get_errno(), str(get_errno()))
        return False


_membarrier = _Membarrier()


def describe() -> str:
    """What `Ring.backend` says."""
    slower = []
    if _membarrier.unregistered:
        slower.append(f"no membarrier ({_membarrier.unregistered}): a fence with every message")
    if _membarrier.unreached:
        slower.append(f"no membarrier ({_membarrier.unreached}): sleepers look again every millisecond")
    return "; ".join(["linux: futex, OFD locks", *slower] if slower else ["linux: futex, OFD locks, membarrier"])


yield_processor = os.sched_yield  # sched_yield(2): whoever waits for this processor goes first


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0))


def _lock(fd: int, kind: int, byte: int) -> bool:
    """fcntl(2), F_OFD_SETLK: lock or unlock one byte for this open file description, without waiting."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _holder(fd: int, byte: int) -> int:
    """fcntl(2), F_OFD_GETLK: the kind of lock that another description has on a byte; F_UNLCK if none."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    return int(_FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0])


def _count_holders(fd: int, first: int, count: int) -> int:
    """F_OFD_GETLK: how many of `count` bytes other descriptions have locked; a question for each, and for each gap."""
    found, spans = 0, [(first, first + count)]
    while spans:
        begin, end = spans.pop()
        if begin == end:
            continue  # to ask for no bytes is to ask for all
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
        kind, _, start, length, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
        if kind != fcntl.F_UNLCK:
            start, stop = max(begin, start), min(end, start + length) if length else end
            found += stop - start
            spans += (begin, start), (stop, end)
    return found


def _path(name: str) -> str:
    return f"{DIRECTORY}/{PREFIX}{name}"


def _doorbells(name: str, nonce: bytes) -> str:
    """What the names of the FIFOs of this ring begin with."""
    return f"{DOORBELLS}{name}.{nonce.hex()}."


def _remove_doorbells(name: str, nonce: bytes) -> None:
    """Remove what killed processes left, when nobody has the ring open."""
    prefix = _doorbells(name, nonce)
    with contextlib.suppress(OSError):  # no descriptor left: they harm nobody
        for entry in os.listdir(DIRECTORY):
            if entry.startswith(prefix):
                with contextlib.suppress(OSError):  # another user's
                    os.unlink(f"{DIRECTORY}/{entry}")


def _keep(path: str, fd: int) -> bool:
    """flock(2): have `strays` leave this doorbell alone while somebody has this description. False: it is at it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return _leads_to(path, fd)


def _leads_to(path: str, fd: int) -> bool:
    """Is the file under this name the one that is open here?"""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(fd))


def _open(name: str, noted: list[int], access: int = os.O_RDWR) -> int:
    """Open what lies under a ring's name, if it is a regular file; O_NONBLOCK so that a FIFO does not block."""
    try:
        fd = note_open(noted, _path(name), access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", name) from None
    except OSError as error:
        raise OSError(error.errno, f"cannot open the ring's file {_path(name)}: {error.strerror}", name) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EINVAL, f"{_path(name)} is no regular file, so no ring", name)
    return fd


def _remove(name: str, fd: int) -> None:
    """Remove the name if it leads to the file open as `fd`.

    Whoever removes a name holds the lock NAME of the file it leads to; who finds it held leaves the
    removing to the other. So nobody removes a name that was given to another file in between.
    """
    if _lock(fd, fcntl.F_WRLCK, _layout.NAME):
        try:
            if _leads_to(_path(name), fd):
                os.unlink(_path(name))
        except OSError as error:
            raise OSError(error.errno, f"cannot remove {_path(name)}: {error.strerror}", name) from error
        finally:
            _lock(fd, fcntl.F_UNLCK, _layout.NAME)


def unlink(name: str) -> None:
    """Remove a ring's name; FileNotFoundError if there is none. Open handles stay as they are."""
    passing = Segment(name)
    noted: list[int] = []
    try:
        fd = _open(name, noted)
        passing._open_locks(fd)  # a descriptor that forks know of: a child would keep the lock
        _remove(name, passing._locks)
        if _lock(passing._locks, fcntl.F_WRLCK, _layout.PRESENCE):
            _remove_doorbells(name, _layout.nonce_of(os.pread(fd, _layout.HEADER_BYTES, 0)))
    finally:
        for number in noted:
            os.close(number)
        passing._give_up_locks()


class Segment:
    """The shared memory of one handle, and its locks. See `_backend.Segment` for what it promises."""

    # Here for `__del__` of one that was never finished.
    _locks = -1  # the descriptor that carries our locks
    _opening: list[int] = []  # it, until it is in `_locks`

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Layout  # before the first descriptor: `close` asks it whether the name is to stay
        self.map: mmap.mmap
        self.words: memoryview
        self._whole = False  # is `create` or `open` done?
        self._identity: tuple[int, int] | None = None  # of the file, in case somebody closed our descriptors
        self._opening = []
        self._doorbells = Doorbells()
        self._children: dict[int, list[int]] = {}  # by forking thread: the same descriptor for its child
        # In C, with the reference as pop's default: an interrupt in a callback in Python would be swallowed.
        _segments[id(self)] = weakref.ref(self, partial(_segments.pop, id(self)))

    @classmethod
    def create(cls, name: str, layout: Layout, mode: int, replace: bool) -> Segment:
        """Make the ring's file and give it its name."""
        self = cls(name)
        self.layout = layout
        noted: list[int] = []
        try:
            try:
                fd = note_open(noted, DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
                os.ftruncate(fd, layout.segment_bytes)
                os.posix_fallocate(fd, 0, layout.lanes_offset)
            except OSError as error:
                raise OSError(error.errno, f"cannot create a ring in {DIRECTORY}: {error.strerror}", name) from error
            self._open_locks(fd)
            os.fchmod(fd, mode)
            _lock(self._locks, fcntl.F_RDLCK, _layout.PRESENCE)
            self._attach(fd)
            header = _layout.pack_header(layout, MACHINE)
            self.map[8 : len(header)] = header[8:]
            self.map[0:8] = header[:8]
            for _ in range(REMOVER_TRIES):
                try:
                    # Given a descriptor, which an absolute path makes it ignore, this is linkat(2): it follows
                    # the link in /proc, which link(2) does not.
                    os.link(f"/proc/self/fd/{fd}", _path(name), src_dir_fd=fd, follow_symlinks=True)
                    self._whole = True
                    return self
                except FileExistsError:
                    if not _clear_the_way(name, replace):
                        time.sleep(0.001)
            raise RingBusy(f"ring {name!r} is being removed by another process, which does not get on with it")
        except BaseException:
            self.unlink()  # if it came to that
            self.close(keep=True)
            raise
        finally:
            for number in noted:
                os.close(number)

    @classmethod
    def open(cls, name: str, any_owner: bool) -> Segment:
        """Attach to a ring that somebody has open, or that is kept."""
        self = cls(name)
        noted: list[int] = []
        try:
            fd = _open(name, noted)
            status = os.fstat(fd)
            if not any_owner and status.st_uid not in (os.geteuid(), 0):
                what = f"the ring belongs to user {status.st_uid}; any_owner=True (--any-owner) trusts that user"
                raise PermissionError(errno.EPERM, what, name)
            header = os.pread(fd, _layout.HEADER_BYTES, 0)
            self.layout = layout = _layout.parse_header(header, status.st_size, MACHINE, name)
            self._open_locks(fd)
            # Somebody who has the ring open shows as a shared lock. An exclusive one is a remover at
            # work; none at all is what a crash of everybody left behind, unless the ring is kept.
            kind = _holder(fd, _layout.PRESENCE)
            if kind == fcntl.F_WRLCK or (kind == fcntl.F_UNLCK and not layout.keep):
                raise FileNotFoundError(errno.ENOENT, "there is no ring of this name that anybody has open", name)
            if not _lock(self._locks, fcntl.F_RDLCK, _layout.PRESENCE) or not _leads_to(_path(name), fd):
                raise FileNotFoundError(errno.ENOENT, "the ring of this name was just removed", name)
            self._attach(fd)
            self._whole = True
        except BaseException:
            self.close(keep=True)
            raise
        finally:
            for number in noted:
                os.close(number)
        return self

    def _open_locks(self, fd: int) -> None:
        """Open the file once more, for the locks alone."""
        status = os.fstat(fd)
        self._identity = status.st_dev, status.st_ino
        try:
            self._locks = self._open_again(fd, self._opening)
        except OSError as error:
            what = f"cannot open the ring's file again, for its locks: {error.strerror}"
            raise OSError(error.errno, what, self.name) from error
        self._opening.clear()

    def _open_again(self, fd: int, noted: list[int]) -> int:
        """A new description of the file that is open as `fd`, whose descriptor is noted as soon as there is one.

        No other thread forks between the two, as it would while os.open lets go of the interpreter: its
        child would not know the descriptor, and hold our claims for as long as it lives.
        """
        path = b"/proc/self/fd/%d" % fd
        while True:
            # One call in C opens and notes.
            noted.extend(map(_quick_open, [path], [os.O_RDWR | os.O_CLOEXEC]))
            if noted[-1] >= 0:
                _owners[noted[-1]] = id(self), self._identity
                return noted[-1]
            number = get_errno()
            noted.pop()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def _attach(self, fd: int) -> None:
        try:
            self.map = mmap.mmap(fd, self.layout.segment_bytes)
        except OSError as error:
            what = f"cannot map the ring's {self.layout.segment_bytes:,} bytes: {error.strerror}"
            raise OSError(error.errno, what, self.name) from error
        self._file = os.fstat(fd)
        self.words = memoryview(self.map).cast("Q")
        self._bells = memoryview(self.map).cast("I")
        self._address = addressof(c_char.from_buffer(self.map))

    # ------------------------------------------------------------ claims

    def _own(self, fd: int) -> bool:
        """Is this remembered descriptor still ours? After os.closerange the number may be a stranger's."""
        if fd < 0 or _owners.get(fd, (id(self),))[0] != id(self):
            return False
        return is_of(fd, self._identity)

    def claim(self, byte: int) -> bool:
        """Take a role for this handle, if no living handle has it. Taking it again is fine."""
        if not self._own(self._locks):
            what = "the descriptor with this ring's claims was closed behind its back, or there was none left at a fork"
            raise OSError(errno.EBADF, what, self.name)
        with naming(self.name):
            return _lock(self._locks, fcntl.F_WRLCK, byte)

    def release(self, byte: int) -> None:
        """Give a role back. Not held: nothing happens."""
        if self._own(self._locks):
            _lock(self._locks, fcntl.F_UNLCK, byte)

    def is_claimed(self, byte: int) -> bool:
        """Does another handle hold this role now, by the kernel's word?"""
        return self.claimed(byte, 1) > 0

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles other handles hold now, by the kernel's word."""
        fd = self._locks
        try:
            return _count_holders(fd, first, count) if self._own(fd) else 0
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return 0  # another thread has just closed it

    def reserve(self, offset: int, nbytes: int) -> None:
        """Have memory for these bytes of the segment, for good; ENOSPC if there is none."""
        try:
            os.posix_fallocate(self._locks, offset, nbytes)
        except OSError as error:
            what = f"no memory for a lane of {nbytes:,} bytes: {error.strerror}"
            raise OSError(error.errno, what, self.name) from error

    def back(self, offset: int, nbytes: int) -> None:
        """See that these bytes can be used, which a lane's words say were reserved. Here a hole reads as zeros."""

    # ------------------------------------------------------------ sleeping and waking

    def order_fence(self) -> Fence:
        """What keeps loads and stores in order, for one monitor; None where the machine does."""
        return None if TSO else make_fence(TSO)

    def waker_fence(self) -> Fence:
        """What a waker does between publishing and looking for sleepers: nothing where sleepers do it for it."""
        return None if _membarrier.register() else make_fence(TSO)

    def sleeper_fence(self) -> bool:
        """A full barrier here and in all wakers. False: only here."""
        if _membarrier.expedite():
            return True
        make_fence(TSO)()
        return False

    def ring(self, bell: int) -> bool:
        """Add 1 to a bell and wake who sleeps on it, in one call: a kill cannot come in between."""
        rung = True
        state = self.words[(bell + _layout.DOORBELL) >> 3]
        if state & _layout.ATTACHED:  # each is told by itself, so that it does not matter which is first
            rung = self._doorbells.ring(bell, state >> 2, self._doorbell_place)
            if state & _layout.ALONE:
                return rung
        address = c_void_p(self._address + bell)
        # long futex(uint32_t *uaddr, FUTEX_WAKE_OP, int wake, int wake2, uint32_t *uaddr2, int op); futex(2)
        _quick(_FUTEX, address, _WAKE, _ALL, _NONE, address, _ADD_ONE)
        return rung

    def note(self, bell: int) -> int:
        """What the bell is now, for `wait`."""
        return self._bells[bell >> 2]

    def wait(self, bell: int, noted: int, deadline: float | None) -> None:
        """Sleep while the bell is as `noted`, until `deadline` (time.perf_counter), or a signal, or less."""
        # A signal that comes just before the call does not interrupt it, so each call ends after a SLICE.
        address = c_void_p(self._address + bell)
        value = c_int(noted)
        if deadline is None:
            timeout = None if SLICE is None else byref(_slice(SLICE))
            # long futex(uint32_t *uaddr, FUTEX_WAIT, uint32_t val, const struct timespec *timeout)
            _waiting(_FUTEX, address, _WAIT, value, timeout)
            return
        until = byref(_timespec(deadline if SLICE is None else min(deadline, time.perf_counter() + SLICE)))
        # long futex(uint32_t *uaddr, FUTEX_WAIT_BITSET, uint32_t val, const struct timespec *abs, NULL, uint32_t bits)
        _waiting(_FUTEX, address, _WAIT_UNTIL, value, until, _NONE, _ANY)

    wake = ring  # this handle's own threads sleep as all others do

    def doorbell(self, bell: int) -> Doorbell:
        """Make what event loops can wait for, and `ring` rings too while the word beside the bell says so."""
        with naming(self.name):
            file = os.fstat(self._locks)
            path, trusts = self._doorbell_place(bell)
            for _ in range(REMOVER_TRIES):
                with contextlib.suppress(FileNotFoundError):  # `strays` has just removed what somebody else had left
                    doorbell = Doorbell(path, trusts, stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid)
                    if _keep(path, doorbell.fileno()):
                        return doorbell
                    doorbell.close()
                time.sleep(0.001)
            raise RingBusy(f"a doorbell of ring {self.name!r} is being removed by another process, which does not end")

    def _doorbell_place(self, bell: int) -> tuple[str, Callable[[os.stat_result], bool]]:
        """Its path, and whether it is one to be trusted."""
        return f"{DIRECTORY}/{_doorbells(self.name, self.layout.nonce)}{bell}", self._trusts

    def _trusts(self, doorbell: os.stat_result) -> bool:
        """Is it of somebody who may write to the ring, and so could break that as well?"""
        ring = self._file
        if ring.st_mode & stat.S_IWOTH or doorbell.st_uid in (os.geteuid(), 0, ring.st_uid):
            return True
        # To give a file to a group one has to be in it.
        return bool(ring.st_mode & stat.S_IWGRP) and doorbell.st_gid == ring.st_gid

    # ------------------------------------------------------------ life and death

    def unlink(self) -> None:
        """Remove the ring's name if it still is this ring's."""
        if self._own(self._locks):
            _remove(self.name, self._locks)

    def leave(self) -> None:
        """Give up the presence, and remove what is left if nobody else is present: not a name that is to be kept.

        The roles and the memory stay with us: for the end of a process, whose other threads still run.
        """
        fd = self._locks
        if self._own(fd):
            # First let go, then see: of two that leave at once, each would see the other still there.
            _lock(fd, fcntl.F_UNLCK, _layout.PRESENCE)
            kept = self.layout.keep and _leads_to(_path(self.name), fd)
            if not kept and _lock(fd, fcntl.F_WRLCK, _layout.PRESENCE):
                try:
                    _remove_doorbells(self.name, self.layout.nonce)
                    _remove(self.name, fd)
                except OSError:
                    pass  # another user's name, or read-only: it stays, and counts as not there
                finally:
                    _lock(fd, fcntl.F_UNLCK, _layout.PRESENCE)

    def close(self, keep: bool = False) -> None:
        """Leave, and give up all claims; with `keep` the name stays.

        The memory goes when the last reference to the map does: a thread may still sleep on a bell.
        """
        if not keep:
            self.leave()
        self._doorbells.close()
        self._give_up_locks()

    def _give_up_locks(self) -> None:
        for fd in (self._locks, *self._opening):
            if self._own(fd):
                # The locks first: if an exception leaves the descriptor open, it holds nothing.
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
                self._close(fd)
        self._locks = -1
        self._opening.clear()

    def _close(self, fd: int) -> None:
        """Close a descriptor if it is ours."""
        if self._own(fd):
            _owners.pop(fd, None)  # before another thread gets the number
            os.close(fd)

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A handle that an exception kept from ever reaching its caller; all others are closed by now.
        try:
            self.close(keep=not hasattr(self, "layout"))
        except Exception:
            if not finalizing():  # else the modules' names may be gone, and the system closes it
                raise

    # ------------------------------------------------------------ forks

    def before_fork(self) -> None:
        """Open the child's own description, and be present for it before the parent can go away."""
        thread = threading.get_ident()
        noted = self._children.setdefault(thread, [])
        if self._whole and self._own(self._locks):
            if not noted or noted[0] < 0:
                noted.clear()
                self._open_again(self._locks, noted)
            _lock(noted[0], fcntl.F_RDLCK, _layout.PRESENCE)

    def after_fork_in_parent(self) -> None:
        """The child has its description now."""
        thread = threading.get_ident()
        for fd in self._children.get(thread, ()):
            self._close(fd)
        self._children.pop(thread, None)

    def after_fork_in_child(self) -> None:
        """Hold no claim of the parent's: its locks live as long as any copy of their descriptor."""
        mine = self._children.get(threading.get_ident(), [])
        # The parent's own, and children's of its other threads.
        for fd in (self._locks, *self._opening, *chain.from_iterable(self._children.values())):
            if fd not in mine:
                self._close(fd)
        self._locks = mine[0] if mine else -1
        self._opening.clear()
        self._children.clear()


def _clear_the_way(name: str, replace: bool) -> bool:
    """Make room for a new ring of this name, or say why there is none. False: somebody else is at it."""
    passing = Segment(name)
    noted: list[int] = []
    try:
        try:
            fd = _open(name, noted)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # it says nothing about what lies there
            raise FileExistsError(errno.EEXIST, error.strerror, name) from error
        if os.pread(fd, len(_layout.MAGIC), 0) != _layout.MAGIC:
            raise FileExistsError(errno.EEXIST, f"{_path(name)} exists and is no ring; it is left alone", name)
        header = os.pread(fd, _layout.HEADER_BYTES, 0)
        kept = _layout.is_kept(header)
        if kept and not replace:
            what = "a kept ring of this name exists; open it, unlink it, or pass replace=True"
            raise FileExistsError(errno.EEXIST, what, name)
        passing._open_locks(fd)  # a descriptor that forks know of: a child would keep the locks
        if not _lock(passing._locks, fcntl.F_WRLCK, _layout.PRESENCE):
            if _holder(passing._locks, _layout.PRESENCE) != fcntl.F_RDLCK:
                return False  # who removes what is left of it: nobody has it open
            if replace:
                raise RingBusy(f"ring {name!r} cannot be replaced: somebody has it open")
            raise FileExistsError(errno.EEXIST, "a ring of this name exists and somebody has it open", name)
        _remove_doorbells(name, _layout.nonce_of(header))
        _remove(name, passing._locks)
        return not _leads_to(_path(name), fd)
    finally:
        for number in noted:
            os.close(number)
        passing._give_up_locks()


# ---------------------------------------------------------------- looking from outside, and tidying up


def names() -> list[str]:
    """What may be rings, of whatever user, in alphabetical order."""
    entries = [entry[len(PREFIX) :] for entry in os.listdir(DIRECTORY) if entry.startswith(PREFIX)]
    return sorted(filter(_layout.is_name, entries))


class Look:
    """A ring as it is seen from outside; see `_backend.Look`. By a description of its own that never locks anything."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.where = _path(name)
        self.layout: Layout
        self.map: mmap.mmap
        self.words: memoryview
        self._noted: list[int] = []
        try:
            self._fd = _open(name, self._noted, os.O_RDONLY)
            status = os.fstat(self._fd)
            self.size: int | None = status.st_size
            self.memory: int | None = status.st_blocks * 512  # stat(2): in units of 512 bytes
            self.owner: int | None = status.st_uid
            self.mode: int | None = stat.S_IMODE(status.st_mode)
            self.header = os.pread(self._fd, _layout.HEADER_BYTES, 0)
        except BaseException:
            self.close()
            raise

    def attach(self, layout: Layout, nbytes: int) -> None:
        """Map the first `nbytes` for reading."""
        self.layout = layout
        self.map = mmap.mmap(self._fd, nbytes, prot=mmap.PROT_READ)
        self.words = memoryview(self.map).cast("Q")

    def is_open(self) -> bool:
        """Has anybody the ring open? A remover's lock is another one."""
        return _holder(self._fd, _layout.PRESENCE) == fcntl.F_RDLCK

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles are held now, by the kernel's word."""
        return _count_holders(self._fd, first, count)

    def order_fence(self) -> Fence:
        """What keeps loads in order; None where the machine does."""
        return None if TSO else make_fence(TSO)

    def close(self) -> None:
        """Look no more."""
        while self._noted:
            os.close(self._noted.pop())


def collect(name: str, kept: bool) -> bool:
    """Remove a ring that nobody has open, in the way in which `create` makes room; a kept one only if `kept` says so.

    Returns:
        False if it stays: it is in use, kept, another user's, or no ring.
    """
    try:
        return _clear_the_way(name, kept)
    except (FileExistsError, RingBusy):
        return False


def strays(dry: bool) -> list[str]:
    """The doorbells of rings that are gone, which nobody has: their paths. They are removed, unless it is a `dry` run.

    The ring may have lost its name only, and still be in use. So the lock of a doorbell decides, which who is to hear
    it holds: it is taken here, and who comes meanwhile waits for that, and makes another one.
    """
    found = []
    for entry in sorted(os.listdir(DIRECTORY)):
        if entry.startswith(DOORBELLS):
            with contextlib.suppress(OSError, ValueError):  # another user's, gone meanwhile, or no doorbell
                name, nonce, _ = entry[len(DOORBELLS) :].rsplit(".", 2)
                if not _has_nonce(name, bytes.fromhex(nonce)) and _remove_stray(f"{DIRECTORY}/{entry}", dry):
                    found.append(f"{DIRECTORY}/{entry}")
    return found


def _has_nonce(name: str, nonce: bytes) -> bool:
    """Is the ring that has this name the one with this nonce?"""
    noted: list[int] = []
    try:
        return _layout.nonce_of(os.pread(_open(name, noted, os.O_RDONLY), _layout.HEADER_BYTES, 0)) == nonce
    except FileNotFoundError:
        return False
    finally:
        for fd in noted:
            os.close(fd)


def _remove_stray(path: str, dry: bool) -> bool:
    """Remove a FIFO that nobody has open, or locked by the time that it is locked here."""
    noted: list[int] = []
    flags = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if not stat.S_ISFIFO(os.stat(path, follow_symlinks=False).st_mode):
            return False
        try:
            note_open(noted, path, os.O_WRONLY | flags)
            return False
        except OSError as error:
            if error.errno != errno.ENXIO:  # fifo(7): nobody has it open for reading
                return False
        if dry:
            return True
        fd = note_open(noted, path, os.O_RDONLY | flags)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _leads_to(path, fd):
            return False
        os.unlink(path)
        return True
    finally:
        for fd in noted:
            os.close(fd)
