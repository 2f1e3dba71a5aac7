"""Runs the macOS backend, `shmring/_darwin.py` itself, on Linux: a stand-in for what only macOS has.

What both systems have is real: flock, FIFOs, links, shared memory, semaphores, and every kill -9. Played are
`kqueue` and `kevent` (on epoll), and rules of XNU's that Linux does not have, each named where it is kept, with
the source it is read in. `test_darwin.py` tests each of them. Two places are changed for it, and both only here:

- ``shmring._libsystem``, the module that hands out macOS's functions, is replaced before `_darwin` is imported.
- `_darwin` sees `os` and `fcntl` through `Os` and `Fcntl`, which know about shared memory and queues.

`load()` returns the backend's module. `take_over()` has the whole package stand on it in this process, which
`conftest.py` does if SHMRING_TEST_BACKEND is "darwin"; processes started by spawn come here through it too.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import struct
import sys
import tempfile
import termios
import threading
import types
from ctypes import CDLL, PyDLL, c_int, c_int16, c_int64, c_uint, c_uint16, c_uint32, c_uint64, c_void_p

PAGE = 16384
SHM_NAME, SEM_NAME = 31, 30  # bytes with the slash, at most
SEM_FAILED = -1
CACHE = "SHMRING_TEST_CACHE"  # the folder that plays the user's cache; child processes inherit it

EVFILT_READ, EVFILT_USER = -1, -10
EV_ADD, EV_CLEAR, NOTE_TRIGGER = 0x1, 0x20, 0x01000000

_real = {"quick": PyDLL(None, use_errno=True), "waiting": CDLL(None, use_errno=True)}


def _symbol(library, name):
    try:
        return _real[library][name]
    except AttributeError:  # glibc before 2.34 has them apart
        return CDLL({"shm": "librt.so.1"}.get(name[:3], "libpthread.so.0"), use_errno=True)[name]


class Kevent(ctypes.Structure):
    """<sys/event.h>, by its offsets."""

    _fields_ = (
        ("ident", c_uint64), ("filter", c_int16), ("flags", c_uint16), ("fflags", c_uint32), ("data", c_int64),
        ("udata", c_void_p),
    )  # fmt: skip


assert [getattr(Kevent, name).offset for name, _ in Kevent._fields_] == [0, 8, 10, 12, 16, 24]


class Failure(Exception):
    """A call fails with this errno."""

    def __init__(self, number):
        self.number = number


class Function:
    """A function of the library, with the rules by which ctypes has to be told of it."""

    VARIADIC = {"open": (2, 1), "shm_open": (2, 1), "sem_open": (2, 2)}  # fixed arguments, others at most
    FAILS_AS = {"sem_open": SEM_FAILED, "confstr": 0}
    argtypes = restype = "never set"

    def __init__(self, name, function):
        self.name, self._function = name, function

    def __call__(self, *args):
        assert self.argtypes != "never set" and self.restype != "never set", f"{self.name} has no prototype"
        fixed, more = self.VARIADIC.get(self.name, (len(self.argtypes), 0))
        # On arm64 the arguments after the fixed ones go on the stack: ctypes has to know which they are, and takes
        # them as they are given; a bare int, or a mode_t, would be promoted in a way of its own.
        assert len(self.argtypes) == fixed <= len(args) <= fixed + more, f"{self.name}{args}"
        assert all(type(arg) is c_uint for arg in args[fixed:]), f"{self.name}: the variadic part is c_uint, {args}"
        converted = []
        for type_, arg in zip(self.argtypes, args):
            type_.from_param(arg)  # raises where ctypes would
            converted.append(arg.value if isinstance(arg, c_int) else arg)
        try:
            result = self._function(*converted, *args[fixed:])
        except Failure as failure:
            ctypes.set_errno(failure.number)
            result = self.FAILS_AS.get(self.name, -1)
        assert (result is None) == (self.restype is None)
        return self.restype(result) if self.restype not in (None, c_int, ctypes.c_size_t, ctypes.c_ssize_t) else result


class Library:
    def __init__(self, kind):
        self._kind = kind

    def __getitem__(self, name):
        if name == "open":
            return _real[self._kind][name]  # ctypes' own: a signal handler's exception cannot come in the middle of it
        return Function(name, FUNCTIONS[name](self._kind))  # a new one each time, as ctypes makes them


# ---------------------------------------------------------------- shared memory


def is_memory(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/dev/shm/")
    except OSError:
        return False


def _checked(name, most):
    """ENAMETOOLONG: PSHMNAMLEN in bsd/kern/posix_shm.c, PSEMNAMLEN in bsd/kern/posix_sem.c, both 31.

    Some versions count the final zero as well: 30 with the slash are right for all.
    """
    if len(name) > most:
        raise Failure(errno.ENAMETOOLONG)
    assert name.startswith(b"/")


def _ours(name):
    """Where it really is: each run of the tests has shared memory and semaphores of its own."""
    return b"/%s.%s" % (os.path.basename(os.environ[CACHE]).encode(), name[1:])


def _called(function, *args):
    result = function(*args)
    if result == -1:
        raise Failure(ctypes.get_errno())
    return result


def shm_open(kind):
    real = _symbol("quick", "shm_open")

    def shm_open(name, flags, mode=None):
        _checked(name, SHM_NAME)
        if flags & os.O_TRUNC:  # bsd/kern/posix_shm.c, shm_open
            raise Failure(errno.EINVAL)
        fd = _called(real, _ours(name), flags, mode or c_uint(0))
        if flags & os.O_CREAT:  # bsd/kern/posix_shm.c knows no umask; the sticky bit is our mark: see ftruncate
            os.fchmod(fd, mode.value & 0o777)
        return fd

    return shm_open


def shm_unlink(kind):
    real = _symbol("quick", "shm_unlink")

    def shm_unlink(name):
        _checked(name, SHM_NAME)
        return _called(real, _ours(name))

    return shm_unlink


# ---------------------------------------------------------------- semaphores

_semaphores = {}  # by the handle that is given out: the address of the real one


def sem_open(kind):
    real = _symbol("quick", "sem_open")
    real.restype = c_void_p

    def sem_open(name, flags, mode=None, value=None):
        _checked(name, SEM_NAME)
        address = real(_ours(name), flags, mode, value) if flags & os.O_CREAT else real(_ours(name), flags)
        if not address:
            raise Failure(ctypes.get_errno())
        # A sem_t * is a descriptor number there (bsd/kern/posix_sem.c, sem_open), so the first one may be 0.
        number = next(number for number in range(1 << 20) if number not in _semaphores)
        _semaphores[number] = address
        return number

    return sem_open


def _on_semaphore(name):
    real = _symbol("quick", name)
    real.argtypes = (c_void_p,)

    def call(number):
        if number not in _semaphores:
            raise Failure(errno.EBADF)
        result = _called(real, _semaphores[number])
        if name == "sem_close":
            del _semaphores[number]
        return result

    return lambda kind: call


def sem_unlink(kind):
    real = _symbol("quick", "sem_unlink")

    def sem_unlink(name):
        _checked(name, SEM_NAME)
        return _called(real, _ours(name))

    return sem_unlink


# ---------------------------------------------------------------- queues

EPOLLIN, EPOLLET = 0x1, 1 << 31
EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD = 1, 2, 3
_EVENT = struct.Struct("=Iq" if os.uname().machine == "x86_64" else "@Iq")  # struct epoll_event, packed on x86-64
_queues = {}  # by descriptor: {(filter, ident): descriptor in the epoll}


def close_queue(fd):
    for (kind, _), number in _queues.pop(fd).items():
        if kind == EVFILT_USER:
            os.close(number)
    os.close(fd)


def _queues_die_at_a_fork():
    """A kqueue is not inherited: FP_CLOFORK in bsd/kern/kern_event.c, kqueue_internal; its number is free there."""
    for fd in list(_queues):
        with contextlib.suppress(OSError):
            close_queue(fd)


os.register_at_fork(after_in_child=_queues_die_at_a_fork)


def kqueue(kind):
    def kqueue():
        fd = _called(_real["quick"].epoll_create1, 0x80000)  # EPOLL_CLOEXEC
        _queues[fd] = {}
        return fd

    return kqueue


def _change(queue, fd, change):
    key = change.filter, change.ident
    if change.filter not in (EVFILT_READ, EVFILT_USER):
        raise Failure(errno.EINVAL)
    if change.flags & EV_ADD:
        # EV_CLEAR: an event is given once for each time that it comes; it is looked at anew when it is given, so
        # that it counts only while there is something to read (bsd/kern/kern_event.c, knote_process; and
        # filt_vnode_common in bsd/vfs/vfs_vnops.c, which every write to a FIFO comes to). What is there already
        # when it is added is an event. All that is what EPOLLET does.
        edge = EPOLLET if change.flags & EV_CLEAR else 0
        if key in queue:
            operation, number = EPOLL_CTL_MOD, queue[key]
        elif change.filter == EVFILT_USER:
            operation, number = EPOLL_CTL_ADD, os.eventfd(0, os.EFD_NONBLOCK) if EVENTFD else _eventfd()
        else:
            operation, number = EPOLL_CTL_ADD, change.ident
            if change.ident >= 1 << 31:
                raise Failure(errno.EBADF)
        _called(_real["quick"].epoll_ctl, fd, operation, number, _EVENT.pack(EPOLLIN | edge, number))
        queue[key] = number
    if key not in queue:
        raise Failure(errno.ENOENT)
    if change.filter == EVFILT_USER and change.fflags & NOTE_TRIGGER:
        os.write(queue[key], struct.pack("=Q", 1))


EVENTFD = hasattr(os, "eventfd")  # from 3.10 on


def _eventfd():
    return _called(_real["quick"].eventfd, 0, 0x80800)  # EFD_CLOEXEC | EFD_NONBLOCK


def _at(pointer, count):
    if pointer is None:
        return []
    first = ctypes.cast(pointer, ctypes.POINTER(Kevent))
    return [first[i] for i in range(count)]


def kevent(kind):
    library = _real[kind]
    wait = library["epoll_wait"]

    def kevent(fd, changes, nchanges, events, nevents, timeout):
        queue = _queues.get(fd)
        if queue is None:
            raise Failure(errno.EBADF)
        for change in _at(changes, nchanges):
            _change(queue, fd, change)
        if not nevents:
            return 0
        milliseconds = -1
        if timeout is not None:
            seconds, nanoseconds = ctypes.cast(timeout, ctypes.POINTER(c_int64))[0:2]
            assert 0 <= nanoseconds < 10**9 and 0 <= seconds <= 10**8  # EINVAL: itimerfix in bsd/kern/kern_time.c
            milliseconds = min(seconds * 1000 + -(-nanoseconds // 10**6), (1 << 31) - 1)
        buffer = ctypes.create_string_buffer(_EVENT.size * nevents)
        count = _called(wait, fd, buffer, nevents, milliseconds)  # EINTR is left to the caller
        keys = {number: key for key, number in list(queue.items())}  # others may change it meanwhile
        ready = [keys.get(_EVENT.unpack_from(buffer, i * _EVENT.size)[1]) for i in range(count)]
        ready = [key for key in ready if key is not None]  # the others were closed meanwhile
        found = ctypes.cast(events, ctypes.POINTER(Kevent))
        for i, (filter_, ident) in enumerate(ready):
            found[i] = Kevent(ident, filter_)
            if filter_ == EVFILT_READ:  # how much there is to read
                with contextlib.suppress(OSError):
                    found[i].data = struct.unpack("i", fcntl.ioctl(ident, termios.FIONREAD, bytes(4)))[0]
        return len(ready)

    return kevent


# ---------------------------------------------------------------- the rest of the library


def confstr(kind):
    def confstr(number, buffer, size):
        if number != 65538:  # _CS_DARWIN_USER_CACHE_DIR
            raise Failure(errno.EINVAL)
        value = os.environ[CACHE].encode() + b"/\0"
        buffer[: len(value)] = value
        return len(value)

    return confstr


def memory_barrier(kind):
    """On x86-64 a lock's cycle is a full barrier, on arm64 two are (shmring/_words.py)."""
    lock = threading.Lock()

    def memory_barrier():
        for _ in range(2):
            lock.acquire(False)
            with contextlib.suppress(RuntimeError):  # another thread has it, or has just released it
                lock.release()

    return memory_barrier


def real(name):
    return lambda kind: _real[kind][name]


FUNCTIONS = {
    "open": real("open"), "shm_open": shm_open, "shm_unlink": shm_unlink, "sem_open": sem_open,
    "sem_trywait": _on_semaphore("sem_trywait"), "sem_post": _on_semaphore("sem_post"),
    "sem_close": _on_semaphore("sem_close"), "sem_unlink": sem_unlink, "kqueue": kqueue, "kevent": kevent,
    "confstr": confstr, "OSMemoryBarrier": memory_barrier,
}  # fmt: skip


class Through:
    """A module, with some functions of our own."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


class Os(Through):
    ALLOCATED = stat.S_ISVTX  # our mark on shared memory whose size was set

    def ftruncate(self, fd, length):
        """Shared memory: once in its life, also to 0, and then in whole pages (pshm_truncate in posix_shm.c)."""
        if is_memory(fd):
            mode = os.fstat(fd).st_mode
            if mode & self.ALLOCATED:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            os.fchmod(fd, stat.S_IMODE(mode) | self.ALLOCATED)
            length = -(-length // PAGE) * PAGE
        os.ftruncate(fd, length)

    def fstat(self, fd):
        """Shared memory: mode without a kind, owner and size; no inode, no times (pshm_stat in posix_shm.c)."""
        status = os.fstat(fd)
        if is_memory(fd):
            mode = stat.S_IMODE(status.st_mode) & ~self.ALLOCATED
            return os.stat_result((mode, 0, 0, 0, status.st_uid, status.st_gid, status.st_size, 0, 0, 0))
        return status

    def close(self, fd):
        """What is closed is in no queue any more (knote_fdclose in bsd/kern/kern_event.c)."""
        for number, queue in list(_queues.items()):
            if queue.pop((EVFILT_READ, fd), None) is not None:
                _real["quick"].epoll_ctl(number, EPOLL_CTL_DEL, fd, None)
        close_queue(fd) if fd in _queues else os.close(fd)

    def _not_on_memory(name):  # noqa: N805 - makes methods
        def call(self, fd, *args):
            """Shared memory is mapped, never read or written (pshm_read, pshm_write in posix_shm.c)."""
            if is_memory(fd):
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            return getattr(os, name)(fd, *args)

        return call

    read, write = _not_on_memory("read"), _not_on_memory("write")
    pread, pwrite = _not_on_memory("pread"), _not_on_memory("pwrite")
    fchmod = _not_on_memory("fchmod")  # it is no vnode


class Fcntl(Through):
    def flock(self, fd, operation):
        """Files alone. ENOTSUP for a FIFO: fifo_advlock, fifo_vnops.c; for shared memory: flock, kern_descrip.c."""
        if is_memory(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(fd, operation)


def load():
    """The macOS backend's module, on this stand-in."""
    if CACHE not in os.environ:
        os.environ[CACHE] = folder = tempfile.mkdtemp(prefix="shmring-cache-")
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and (clear(), shutil.rmtree(folder, ignore_errors=True)))
    name = "shmring._libsystem"
    if name not in sys.modules:
        import shmring  # noqa: F401 - the package comes first, or it would come in the middle

        libsystem = types.ModuleType(name)
        libsystem.quick, libsystem.waiting = Library("quick"), Library("waiting")
        sys.modules[name] = libsystem
        shmring._libsystem = libsystem
        from shmring import _darwin

        _darwin.os, _darwin.fcntl = Os(os), Fcntl(fcntl)
    from shmring import _darwin

    return _darwin


def take_over():
    """Have the package stand on it, in this process."""
    module = load()
    from shmring import _backend, _ring

    _backend.os_backend = _ring.os_backend = module


def left():
    """What there is of rings: "shmring." and the name of each, and each folder, shared memory and semaphore."""
    folder = os.environ.get(CACHE)
    if folder is None:
        return set()
    root = os.path.join(folder, "shmring")
    found = set(os.listdir(root)) if os.path.isdir(root) else set()
    for entry in list(found):
        if entry.startswith("name-"):
            with contextlib.suppress(FileNotFoundError, IndexError), open(os.path.join(root, entry)) as file:
                found.add(f"shmring.{file.read().split(chr(10))[3]}")
    return found | {entry for entry in os.listdir("/dev/shm") if os.path.basename(folder) in entry}


def clear():
    """Remove all that."""
    for entry in left():
        with contextlib.suppress(OSError):
            os.unlink(f"/dev/shm/{entry}")
    shutil.rmtree(os.path.join(os.environ[CACHE], "shmring"), ignore_errors=True)
