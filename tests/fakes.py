"""A segment without an operating system: memory in this process, and a log of every access to it.

Each load, store, fence and call is told to the log before it happens, as a string such as
"store write_pos" (lane 0) or "store write_pos 1". `hooks` run then, so that a test can do something
at that very point, or raise.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref

import pytest

from shmring import _layout
from shmring._layout import Layout
from shmring._requests import WriteBatch

_alive = weakref.WeakSet()


@pytest.fixture(autouse=True)
def hooks_end():
    """Generators that are collected after a test still store words; its hooks must not see them."""
    yield
    for segment in _alive:
        segment.hooks.clear()


def ask(side, request):
    """The answer of a Writer or Reader."""
    return side.monitor.enter(request)


def batch(messages):
    """A request to write these messages, as `Ring.write_many` makes it."""
    sizes = set(map(len, messages))
    return WriteBatch(messages, sizes.pop() if len(sizes) == 1 else -1)


class Words:
    """A cast view of the memory that tells of each access."""

    def __init__(self, segment, format_, shift):
        self._segment = segment
        self.view = memoryview(segment.map).cast(format_)
        self._shift = shift

    def _tell(self, what, index):
        word = index.start if isinstance(index, slice) else index
        self._segment.tell(f"{what} {self._segment.place(word << self._shift)}")

    def __getitem__(self, index):
        self._tell("load", index)
        return self.view[index]

    def __setitem__(self, index, value):
        self._tell("store", index)
        self.view[index] = value


class Map(mmap.mmap):
    """The bytes. What is stored with `pack_into` is not told: hooks look at the bytes for it."""

    segment = None

    def __getitem__(self, index):
        self._tell("load", index)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        self._tell("store", index)
        super().__setitem__(index, value)

    def _tell(self, what, index):
        offset = index.start if isinstance(index, slice) else index
        layout = self.segment.layout
        place = "record" if offset >= layout.lanes_offset else "used"
        if offset < layout.used_offset:  # one byte of a word
            place = self.segment.place(offset)
        self.segment.tell(f"{what} {place}")


class FakeSegment:
    """One handle's segment; with `peer`, another handle's on the same memory and with the same claims."""

    name = "fake"

    def __init__(self, writers=2, capacity=4096, order=False, fence=False, others_fence=True, peer=None,
                 slots=0, drop=False):  # fmt: skip
        """`slots` are those of a ring that broadcasts."""
        if peer is None:
            self.layout = Layout(capacity, writers, False, bytes(16), slots, drop)
            with tempfile.TemporaryFile() as file:
                file.truncate(self.layout.segment_bytes)
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
            self.claims = {}
        else:
            self._peer, self.layout, self._file, self.claims = peer, peer.layout, peer._file, peer.claims
        self.map = Map(self._file, self.layout.segment_bytes)
        self.map.segment = self
        self.words, self.bells = Words(self, "Q", 3), memoryview(self.map).cast("I")
        self._order = (lambda: self.tell("order")) if order else None
        self._fence = (lambda: self.tell("fence")) if fence else None
        self._others_fence = others_fence
        self.log = []
        self.hooks = {}
        _alive.add(self)
        self.waits = []  # (bell as noted, bell now, deadline)
        self._places = dict(self._name_words())

    def _name_words(self):
        layout = self.layout
        for lane in range(layout.writers):
            suffix = f" {lane}" if lane else ""
            for field in ("WRITE_POS", "MESSAGES_IN", "WRITER_PARKS", "WRITER_PARKED", "WRITER_WANTED", "WRITER_BELL"):
                yield layout.lane_block(lane) + getattr(_layout, field), field.lower() + suffix
            yield layout.lane_block(lane) + _layout.GIVEN_UP, "given_up" + suffix
            for field in ("READ_POS", "MESSAGES_OUT"):
                yield layout.cursor(lane) + getattr(_layout, field), field.lower() + suffix
        for field in ("READER_PARKED", "READER_PARKS", "READER_BELL", "JOINED"):
            yield layout.readers_offset + getattr(_layout, field), field.lower()

    def place(self, offset):
        return self._places.get(offset) or ("length" if offset >= self.layout.lanes_offset else f"byte {offset}")

    def tell(self, event):
        self.log.append(event)
        hook = self.hooks.get(event) or self.hooks.get(len(self.log))
        if hook:
            hook()

    def peek(self, field):
        """A word's value, without a trace in the log."""
        offset = next(offset for offset, name in self._places.items() if name == field)
        return self.bells[offset >> 2] if "bell" in field else self.words.view[offset >> 3]

    def poke(self, field, value):
        offset = next(offset for offset, name in self._places.items() if name == field)
        self.words.view[offset >> 3] = value

    def lane_bytes(self, start, stop, lane=0):
        first = self.layout.lane_bytes(lane)
        return bytes(memoryview(self.map)[first + start : first + stop])

    # What a backend does

    def claim(self, byte):
        self.tell(f"claim {byte - _layout.LANE if byte >= _layout.LANE else 'reader'}")
        return self.claims.setdefault(byte, self) is self

    def is_claimed(self, byte):
        return self.claims.get(byte, self) is not self

    def release(self, byte):
        if self.claims.get(byte) is self:
            del self.claims[byte]

    def reserve(self, offset, nbytes):
        self.tell("reserve")

    def back(self, offset, nbytes):
        pass

    def order_fence(self):
        return self._order

    def waker_fence(self):
        return self._fence

    def sleeper_fence(self):
        self.tell("sleeper_fence")
        return self._others_fence

    def ring(self, bell):
        self.tell(f"ring {self.place(bell)}")
        self.bells[bell >> 2] += 1
        return True

    def note(self, bell):
        self.tell(f"load {self.place(bell)}")
        return self.bells[bell >> 2]

    def wait(self, bell, noted, deadline):
        self.tell(f"wait {self.place(bell)}")
        self.waits.append((noted, self.bells[bell >> 2], deadline))

    def wake(self, bell):
        self.tell(f"wake {self.place(bell)}")
        self.bells[bell >> 2] += 1
