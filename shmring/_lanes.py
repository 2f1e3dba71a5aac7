"""What lies in a lane: records, as they are put together and taken apart, and marks; and what a reader knows of one.

Functions over bytes that nobody else looks at, or that do not change any more: nothing in here is about order, but for
the marks.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from . import _layout
from ._layout import MARKS, PADDING, RECORD_HEADER, Layout, record_bytes
from ._words import Fence

PACKED: Final = 1024  # bytes; messages up to this go in by struct, one call for length and payload
JOINED: Final = 4096  # bytes; longer ones are not worth joining, which copies them once more
BURST: Final = 65536  # bytes that are published, or copied out, in one go at most
LENGTHS: Final = 1024  # of records that are looked at in one go
FIRST: Final = 64  # of these, the first time: most runs are long, or short
BLOCKS: Final = (64, 32, 16, 8, 4, 2, 1)  # records that one struct takes apart: one at a time takes five times as long

_LENGTH = struct.Struct("=Q")
_GAPS = tuple(bytes(-size & 7) for size in range(8))


# ---------------------------------------------------------------- records


def join_run(messages: list[Any], size: int) -> bytes:
    """Messages that all have this `size`, as records. In C, at some 30 ns a message."""
    header, gap = _LENGTH.pack(size), _GAPS[size & 7]
    return header + (gap + header).join(messages) + gap


def split_run(buffer: Any, at: int, run: int, size: int) -> list[bytes]:
    """The messages in `run` records from `at` on that all have this `size`. In C, at some 25 ns a message."""
    messages: list[bytes] = []
    step = record_bytes(size)
    for number in BLOCKS:
        if run >= number:
            unpack = _records(size, number)
            while run >= number:
                messages += unpack(buffer, at)
                at += number * step
                run -= number
            if not run:
                break
    return messages


def split_mixed(words: memoryview, buffer: Any, at: int, stop: int, limit: int, most: int) -> tuple[list[bytes], int]:
    """The messages in the records from `at` on, at most `most`, and how many bytes they take.

    It ends with one that begins before `stop`, and before what is no record that ends at `limit` or before.
    """
    messages: list[bytes] = []
    start, stop = at, min(stop, limit)
    while at < stop and len(messages) < most:
        size = words[at >> 3]
        after = at + RECORD_HEADER + (size + 7 & ~7)  # written out, as this is done for each message
        if after > limit:
            break
        step = after - at
        eighth = at + 7 * step
        # A run of fewer than eight is quicker one by one. What is no header at `eighth` is for run_of to find out.
        if eighth < stop and words[after >> 3] == size == words[eighth >> 3]:
            run = run_of(words, at, size, min(most - len(messages), (stop - at) // step))
            messages += split_run(buffer, at, run, size)
            at += run * step
        else:
            messages.append(buffer[at + RECORD_HEADER : at + RECORD_HEADER + size])
            at = after
    return messages, at - start


def run_of(words: memoryview, at: int, size: int, most: int) -> int:
    """How many records from `at` on, at most `most`, have this `size`, as the first one has."""
    start, stride = at >> 3, record_bytes(size) >> 3
    run, some, same = 0, FIRST, _lengths(size)
    while run < most:
        some = min(some, most - run)
        lengths = words[start + run * stride : start + (run + some) * stride : stride]
        if lengths != same[:some]:  # half of the time that it takes to make numbers of them and to count these
            return run + next((i for i, other in enumerate(lengths) if other != size), some)
        run += some
        some = LENGTHS
    return run


@lru_cache(maxsize=32)
def _lengths(size: int) -> array[int]:
    # Not a view: threads that slice the same one count its slices wrong where there is no GIL (CPython 3.14).
    return array("Q", [size]) * LENGTHS


@lru_cache(maxsize=PACKED + 1)
def packer(size: int) -> Callable[..., None]:
    """What puts a record's length and payload in, in one call instead of two stores: a fifth of a small write."""
    return struct.Struct(f"=Q{size}s").pack_into


@lru_cache(maxsize=256)
def record_of(size: int) -> Callable[[mmap.mmap, int], tuple[int, bytes]]:
    """What takes a record's length and payload out, in one call."""
    return struct.Struct(f"=Q{size}s").unpack_from


@lru_cache(maxsize=512)
def _records(size: int, number: int) -> Callable[[Any, int], tuple[bytes, ...]]:
    return struct.Struct(f"{RECORD_HEADER}x{size}s{-size & 7}x" * number).unpack_from


# ---------------------------------------------------------------- marks, where who lags loses messages


def find_mark(words: memoryview, layout: Layout, lane: int, pos: int, order: Fence = None) -> tuple[int, int, int]:
    """The last mark of a lane that is at `pos` or before it: the number of its part, its position, and its count."""
    marks = layout.marks(lane) >> 3
    for number in range(pos // layout.part, max(-1, pos // layout.part - MARKS), -1):
        mark = marks + number % MARKS * (_layout.MARK_BYTES >> 3)
        mark_pos = words[mark + (_layout.MARK_POS >> 3)]
        if order:
            order()  # ORDER mark_pos before mark_count, as they were stored
        if number * layout.part <= mark_pos <= pos:
            return number, mark_pos, words[mark + (_layout.MARK_COUNT >> 3)]
    return -1, pos, 0


def count_records(words: memoryview, layout: Layout, lane: int, start: int, stop: int) -> int:
    """How many messages lie from one position in a lane to another; -1 if these are no records."""
    count, first, capacity = 0, layout.lane_bytes(lane), layout.capacity
    while start < stop:
        size = words[(first + start % capacity) >> 3]
        if size == PADDING:
            start += capacity - start % capacity
        else:
            start += record_bytes(size)
            count += 1
    return count if start == stop else -1


# ---------------------------------------------------------------- what a reader knows


class Lane:
    """One lane as its reader sees it: where its words are, and how far it has been read."""

    __slots__ = (
        "backed", "bell", "count", "damage", "end", "first", "given_up", "held", "messages_out", "number", "parked",
        "pos", "read_pos", "rung", "seen", "top", "wanted", "write_pos",
    )  # fmt: skip

    def __init__(self, layout: Layout, number: int, slot: int = 0) -> None:
        block, cursor = layout.lane_block(number), layout.cursor(number, slot if layout.broadcast else 0)
        self.number = number
        self.write_pos = (block + _layout.WRITE_POS) >> 3
        self.given_up = (block + _layout.GIVEN_UP) >> 3
        self.parked = (block + _layout.WRITER_PARKED) >> 3
        self.wanted = (block + _layout.WRITER_WANTED) >> 3
        self.bell = block + _layout.WRITER_BELL
        self.read_pos = (cursor + _layout.READ_POS) >> 3
        self.messages_out = (cursor + _layout.MESSAGES_OUT) >> 3
        self.first = layout.lane_bytes(number)
        self.top = self.first + layout.capacity
        self.rung = 0  # the writer's epoch that this handle last rang
        self.damage = ""  # what is wrong with it; it is left alone then
        self.backed = False  # it is sure to have memory
        self.seen = self.held = 0  # the writer's epoch that waits for more than there was, and for how much
        self.pos = self.end = self.count = 0
