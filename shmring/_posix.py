"""What the two POSIX backends share: descriptors that no exception loses, and handles that follow forks.

A lock of an open file description lives as long as any copy of its descriptor, so a forked child has to
close those that it inherits, and to open its own. Each segment of this process is known here, with the
descriptors that are its own, and has its three methods called around a fork.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    raise ImportError("shmring's POSIX backends are not for Windows")

import contextlib
import errno
import os
import stat
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Segment(Protocol):
    """What a fork needs of a backend's segment."""

    _children: dict[int, list[int]]  # by forking thread: the descriptors for its child

    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self) -> None: ...


def is_of(fd: int, identity: tuple[int, int] | None) -> bool:
    """Is this descriptor open, and of the file with this device and inode?"""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == identity


def note_open(noted: list[int], path: str, flags: int, mode: int = 0o600) -> int:
    """os.open whose descriptor is noted in one call in C: an exception of a signal handler cannot lose it."""
    noted.extend(map(os.open, [path], [flags], [mode]))
    return noted[-1]


class Doorbell:
    """A FIFO that is written to when a bell is rung: event loops can wait for it. See fifo(7).

    Both ends are open wherever it is: who comes and goes changes nothing, and nobody gets SIGPIPE. It goes with the
    last reference, or by `close`.
    """

    # Here for `close` of one that an exception kept from being whole.
    _noted: list[int] = []  # its descriptor
    _identity: tuple[int, int] | None = None  # of the file, once it is known

    def __init__(
        self, path: str, trusts: Callable[[os.stat_result], bool], mode: int | None = None, uid: int = -1, gid: int = -1
    ) -> None:
        """Open it if `trusts` says so. With a `mode`, first make it where there is none.

        It gets that mode, and this user and group as far as may be: who may open the ring is to be able to ring.
        """
        self._noted: list[int] = []
        self._path = path
        if mode is not None:
            with contextlib.suppress(FileExistsError):  # left by who was killed: nobody else has this role now
                os.mkfifo(path, mode)
        fd = note_open(self._noted, path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        status = os.fstat(fd)
        self._identity = status.st_dev, status.st_ino
        if not stat.S_ISFIFO(status.st_mode) or not trusts(status):
            what = f"{path} is to be a FIFO of a user who may be trusted; it is left alone"
            raise PermissionError(errno.EPERM, what, path)
        if mode is not None:
            for user in (uid, -1):  # the first is for root alone
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, user, gid)
            with contextlib.suppress(PermissionError):  # another user's, who has done it
                os.fchmod(fd, mode)  # whatever the umask, also where its maker was killed before this

    def fileno(self) -> int:
        """Its descriptor.

        Raises:
            OSError: EBADF: it is closed, or was closed behind our back.
        """
        for fd in self._noted:  # one, or none
            if is_of(fd, self._identity):
                return fd
        raise OSError(errno.EBADF, "this doorbell was closed, maybe behind its back", self._path)

    def ring(self) -> bool:
        """Make it readable; False if somebody closed it."""
        try:
            os.write(self.fileno(), b"!")
        except BlockingIOError:
            pass  # it is full: readable
        except OSError:
            return False
        return True

    def heard(self) -> bool:
        """Make it unreadable; was it readable? If it was rung some hundred times it may be readable yet."""
        try:
            return bool(os.read(self.fileno(), 512))
        except BlockingIOError:
            return False

    def remove(self) -> None:
        """Remove its name, while its role is held. Who has it open does not notice."""
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(self._path)

    def close(self) -> None:
        """Close it. Its name stays."""
        while self._noted:
            # Nobody else can have it before its identity is known.
            if self._identity is None or is_of(self._noted[0], self._identity):
                any(map(os.close, map(self._noted.pop, [0])))  # in one call in C, as it was noted
            else:
                self._noted.pop()

    __del__ = close


class Doorbells:
    """Those of a ring's sleepers, as who rings them has them: by bell, with the number that each had."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[int, Doorbell]] = {}

    def ring(
        self, bell: int, number: int, where: Callable[[int], tuple[str, Callable[[os.stat_result], bool]]]
    ) -> bool:
        """Ring the one of this number, if it is there: `where` gives what `Doorbell` takes. False: not now."""
        known, doorbell = self._open.get(bell, (0, None))
        if doorbell is None or known != number or not doorbell.ring():
            try:
                doorbell = Doorbell(*where(bell))
            except OSError as error:
                # It has just gone; or it is not what we are to write to; or there is no descriptor left. The message
                # is published: to raise now would have its writer write it again.
                return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
            self._open[bell] = number, doorbell
            doorbell.ring()
        return True

    def close(self) -> None:
        """Close all."""
        self._open.clear()


living_segments: dict[int, weakref.ref[Segment]] = {}
# Which segment has a descriptor, and of which file: a second handle of a ring could get a lost one's number.
owners: dict[int, tuple[int, tuple[int, int] | None]] = {}
_followed = [True]  # has this process done what there is to do after the fork that it comes from?
forking: dict[int, list[Segment]] = {}  # by thread; held, so that one that another thread closes is tidied up too


def _living() -> list[Segment]:
    """A list of references made in one step, because other threads open and close meanwhile."""
    return [segment for segment in [reference() for reference in list(living_segments.values())] if segment is not None]


def to_the_end(work: Callable[[], None]) -> Callable[[], None]:
    """Have work in a fork's hook done, also if a signal handler raises: the interpreter drops that, and goes on."""

    def done() -> None:
        failure: BaseException | None = None
        for _ in range(100):
            try:
                work()
                break
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    return done


def follow_forks(take_up: Callable[[], None]) -> None:
    """Have handles follow forks; `take_up` is called in each child when their claims are gone."""

    def in_child() -> None:
        _after_fork_in_child()
        to_the_end(take_up)()

    for _ in range(2):  # the first may end at once by a signal handler's exception, which the interpreter drops
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=in_child)


@to_the_end
def _before_fork() -> None:
    _followed[0] = False  # for the child; the parent never asks
    segments = forking[threading.get_ident()] = _living()
    for segment in segments:
        with contextlib.suppress(OSError):  # no descriptor left: the child tries again
            segment.before_fork()


@to_the_end
def _after_fork_in_parent() -> None:
    thread = threading.get_ident()
    for segment in forking.get(thread, ()):
        segment.after_fork_in_parent()
    forking.pop(thread, None)


def _after_fork_in_child() -> None:
    """Calling it again is harmless."""
    segments = [] if _followed[0] else _living()
    # Those last, to be taken first, that have their descriptor: this frees the parent's.
    thread = threading.get_ident()
    segments.sort(key=lambda segment: bool(segment._children.get(thread)))
    to_the_end(partial(_free_the_child, segments, {id(segment) for segment in segments}))()


def _free_the_child(segments: list[Segment], living: set[int]) -> None:
    if _followed[0]:
        return
    while segments:
        # One that another thread opened after `_before_fork`, or that got no descriptor then, gets it now.
        with contextlib.suppress(OSError):
            segments[-1].before_fork()
        segments[-1].after_fork_in_child()
        segments.pop()
    # The collector takes the weak references away before it finalizes, in the parent's other thread just then.
    for fd, (owner, identity) in list(owners.items()):
        if owner not in living:
            owners.pop(fd, None)
            if is_of(fd, identity):
                os.close(fd)
    forking.clear()
    _followed[0] = True
