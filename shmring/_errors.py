"""What can go wrong, as exception classes.

Each concrete class also derives from the builtin that a caller would expect, so that code which
meets two vendored copies of this package can catch what both share. Failures of the operating
system stay ``OSError`` with their errno and the ring's name in ``filename``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class RingError(Exception):
    """Base class of every error that shmring itself raises."""


class RingTimeout(RingError, TimeoutError):
    """What was waited for did not happen within ``timeout`` seconds. Nothing was changed."""


class RingClosed(RingError, ValueError):
    """The handle was closed, here or in another thread."""


class RingBusy(RingError):
    """A role that only one handle can hold is taken by a living process."""


class RingCorrupted(RingError):
    """The shared bytes contradict themselves: no shmring process wrote them like this."""


class RingIncompatible(RingError):
    """The segment belongs to another layout version or another kind of machine, or is no ring at all."""


class MessageTooLarge(RingError, ValueError):
    """The message can never fit. Nothing was written.

    Attributes:
        size: Bytes in the message.
        max_message: Bytes that the ring takes at most.
    """

    def __init__(self, name: str, size: int, max_message: int) -> None:
        super().__init__(f"message of {size:,} bytes; ring {name!r} takes at most max_message={max_message:,}")
        self.name = name
        self.size = size
        self.max_message = max_message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.size, self.max_message)


class BufferTooSmall(RingError, ValueError):
    """The next message is longer than the room given for it. It stays in the ring.

    Attributes:
        needed: Bytes in the message.
        room: Bytes that were offered.
    """

    def __init__(self, name: str, needed: int, room: int) -> None:
        super().__init__(f"next message of ring {name!r} has {needed:,} bytes, room for {room:,} was given")
        self.name = name
        self.needed = needed
        self.room = room

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.needed, self.room)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Have the system's errors say which ring they are about."""
    try:
        yield
    except OSError as error:
        if error.filename == name:
            raise
        raise OSError(error.errno, error.strerror, name) from error


class MessagesLost(RingError):
    """Messages were overwritten before this reader came to them. Raised once; the next read goes on after them.

    Attributes:
        count: How many, of one lane.
        lane: Which.
    """

    def __init__(self, name: str, count: int, lane: int) -> None:
        super().__init__(f"{count:,} messages of lane {lane} in ring {name!r} were overwritten before they were read")
        self.name = name
        self.count = count
        self.lane = lane

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.count, self.lane)
