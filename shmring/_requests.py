"""What is asked of the two monitors of a handle, the writer's and the reader's: notes of what is to be done and was.

A request outlives the steps that it was given to. If an exception ends these, it still tells what came of it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from ._errors import RingBusy
from ._lanes import Lane
from ._words import WORD

RESERVED: Final = WORD  # the read_pos that is wanted where another thread's reservation is what stands in the way


class WriteRequest:
    """What is asked of a writer besides to write one message as it comes."""

    # No message is as long: it leaves the writer's fast path by its length. In C, because it is asked for twice.
    __len__ = sys.maxsize.__index__


class WriteBatch(WriteRequest):
    """Write these messages, as many as there is room for. `done` counts them.

    `size` is their size, or -1 if they have several.
    """

    def __init__(self, messages: list[Any], size: int) -> None:
        self.messages = messages
        self.size = size
        self.done = 0


class Gather(WriteRequest):
    """Write these buffers, of so many bytes together, as one message."""

    def __init__(self, buffers: list[Any], size: int) -> None:
        self.buffers = buffers
        self.size = size


class Exporter:
    """A segment's bytes, for one message in place after the other; and whether anything uses them.

    To release a view tells no more than that nothing got hold of that very view. What is made of a memoryview (a slice,
    NumPy's array) holds on to what lies below: an object of ours, whose references can be counted.
    """

    def __init__(self, buffer: Any) -> None:
        self._bytes: Any = (ctypes.c_ubyte * len(buffer)).from_buffer(buffer)
        self._unused = sys.getrefcount(self._bytes)

    def view(self, start: int, stop: int) -> memoryview:
        return memoryview(self._bytes).cast("B")[start:stop]

    def is_used(self) -> bool:
        """Is a view left, or something made of one?"""
        return sys.getrefcount(self._bytes) > self._unused

    def give_up(self) -> Any:
        """Make no more views. What this returns is referred to by those that are there."""
        remains, self._bytes = self._bytes, None
        return remains


class InPlace:
    """A message's bytes in the ring, as a view that a caller has for a while.

    Meanwhile the side of the handle that it belongs to does nothing else: other threads wait. If the view
    cannot be released in the end, because something else still uses it, the side is refused to everybody.

    Attributes:
        ends: It was asked for, and this is its end. To ask for that again is harmless.
        left: The caller has left: with an end that is done, or without one, and then only the view stands in the way.
        holder: Until then, a reference to whose it is that tells if that is gone without an end.
        thread: Whose it is, once it was asked for. That one must not wait for itself.
    """

    view: memoryview | None = None
    exporter: Exporter | None = None  # of the view; none if it is of a copy
    ends = left = False
    holder: weakref.ref[Any] | None = None
    thread = 0

    def released(self) -> bool:
        """Release the view; is that all there was? Else something still uses it."""
        try:
            if self.view is not None:
                self.view.release()
        except BufferError:
            return False
        return self.exporter is None or not self.exporter.is_used()

    def remains(self) -> Any:
        """What is gone once nothing uses the view any more; for who will never ask again."""
        return self.view if self.exporter is None else self.exporter.give_up()

    def is_over(self, name: str) -> bool:
        """Has its caller left, and is the view released? False: another thread still works on it.

        Raises:
            RingBusy: The view cannot be released, or it is this very thread's.
        """
        if not self.left:
            if self.thread == threading.get_ident():
                raise RingBusy(f"this thread has a message of ring {name!r} in place; leave its `with` block first")
            return False
        if not self.released():
            raise RingBusy(still_used(name))
        return True


def still_used(name: str) -> str:
    what = "delete what was made from it (an array, another view) before leaving the `with` block"
    return f"the view of a message in place in ring {name!r} is still in use: {what}"


class Reserve(WriteRequest, InPlace):
    """Make room for a message of `size` bytes and give a `view` of it, at the lane's `pos`.

    At the end: publish the first `commit` bytes, or, if it is None, nothing.
    """

    pos = at = 0
    commit: int | None = None

    def __init__(self, size: int) -> None:
        self.size = size


class ReadRequest:
    """What a read asks for, and what it got out of the ring: noted before it happens.

    So nothing is lost if an exception keeps the answer from the caller; see `Reader.give_back`.

    Attributes:
        taken: Of each lane, what its read_pos comes to, and the messages that are out of the ring once it has.
        owed: The list of owed messages before, and those taken from it.
    """

    taken: Sequence[tuple[Lane, int, list[bytes]]] = ()
    owed: tuple[list[bytes] | None, list[bytes]] = None, []

    def settle(self, words: memoryview, owed: list[bytes]) -> None:
        """Forget what did not happen, while nobody else can make it happen."""
        self.taken = [entry for entry in self.taken if words[entry[0].read_pos] >= entry[1]]
        if self.owed[0] is owed:
            self.owed = None, []


class ReadBatch(ReadRequest):
    """Take up to so many messages, from every lane what it had when looked at."""

    def __init__(self, most: int) -> None:
        self.most = most


class ReadOne(ReadRequest):
    """Take one message of at most `room` bytes, into `view` if there is one."""

    def __init__(self, room: int, view: memoryview | None = None) -> None:
        self.room = room
        self.view = view


class Borrow(InPlace):
    """Give a `view` of the next message; it stays in its `lane`, or owed.

    Attributes:
        given: The caller has the view: it is consumed in the end, whatever comes. Else it stays.
        pos, count: What is read of the lane, and how many messages, once it is consumed.
        behind: Or how many are owed, with it.
    """

    lane: Lane | None = None
    pos = count = behind = 0
    owed: bytes | None = None
    given = False


PROBE: Final = object()  # to a competing reader's monitor: is it nobody's turn?


class GiveBack(NamedTuple):
    """Messages that are out of the ring but did not reach the caller."""

    messages: list[bytes]
