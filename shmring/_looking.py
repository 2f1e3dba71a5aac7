"""Looking at a ring without a part in it: nobody waits for that, and nothing changes by it."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from . import _layout
from ._errors import RingCorrupted
from ._lanes import BURST
from ._layout import PADDING, RECORD_HEADER, Layout, record_bytes
from ._words import POSITIONS, Fence


class Seen(Protocol):
    """What a look needs: memory that is only read, and no role. A `Segment` will do as well."""

    name: str
    layout: Layout
    map: mmap.mmap
    words: memoryview

    def order_fence(self) -> Fence: ...
    def claimed(self, first: int, count: int) -> int: ...


class Survey(NamedTuple):
    """All words that tell what a ring is like. Lists have an entry for each lane."""

    written: list[int]  # write_pos
    put: list[int]  # messages_in
    read: list[int]  # read_pos, of the slowest reader; of a broadcast ring with none, write_pos
    taken: list[int]  # messages_out, likewise
    writers_parked: list[int]  # 1: asleep or about to be
    writer_parks: list[int]
    readers_parked: int
    reader_parks: int

    def fill(self, layout: Layout) -> float:
        """How full the fullest lane is, 0.0 to 1.0."""
        return min(1.0, max(0, *(end - pos for pos, end in zip(self.read, self.written))) / layout.capacity)


def joined_slots(segment: Seen, ours: int = -1) -> list[int]:
    """Those of a broadcast ring's living readers that have joined; `ours` is the slot of our own."""
    layout, words = segment.layout, segment.words
    return [
        slot
        for slot in range(layout.slots)
        if words[(layout.reader_block(slot) + _layout.JOINED) >> 3] & 2
        and (slot == ours or segment.claimed(_layout.READER + slot, 1))
    ]


def survey(segment: Seen, ours: int = -1) -> Survey:
    """Look at the whole ring, one word after the other while it goes on; `ours` is the slot of our own reader."""
    layout, words = segment.layout, segment.words
    lanes = [layout.lane_block(lane) for lane in range(layout.writers)]
    readers = [layout.reader_block(slot) for slot in range(layout.slots)]
    slots = joined_slots(segment, ours) if layout.broadcast else [0]

    def column(blocks: Iterable[int], offset: int) -> list[int]:
        return [words[(block + offset) >> 3] for block in blocks]

    def consumed(offset: int) -> list[int]:
        rows = [column((layout.cursor(lane, slot) for lane in range(layout.writers)), offset) for slot in slots]
        return list(map(min, zip(*rows)))

    # What is consumed first: what is written may have grown since then, and never falls below.
    read, taken = consumed(_layout.READ_POS), consumed(_layout.MESSAGES_OUT)
    written, put = column(lanes, _layout.WRITE_POS), column(lanes, _layout.MESSAGES_IN)
    return Survey(
        written=written,
        put=put,
        read=read or written,
        taken=taken or put,
        writers_parked=[epoch & 1 for epoch in column(lanes, _layout.WRITER_PARKED)],
        writer_parks=column(lanes, _layout.WRITER_PARKS),
        readers_parked=sum(epoch & 1 for epoch in column(readers, _layout.READER_PARKED)),
        reader_parks=sum(column(readers, _layout.READER_PARKS)),
    )


def lanes_used(segment: Seen) -> int:
    """How many lanes there are up to the last one that was ever claimed."""
    used, writers = segment.layout.used_offset, segment.layout.writers
    unused = segment.map.find(b"\0", used, used + writers)
    return unused - used if unused >= 0 else writers


class Peeked(NamedTuple):
    """What `peek` saw of a lane."""

    messages: list[bytes]
    pos: int  # where to go on
    missed: int  # bytes that were consumed before they could be copied
    consumed: int  # messages_out then. If some were missed, so many messages come before these, give or take a few


def peek(segment: Seen, lane: int, pos: int) -> Peeked:
    """Copy what a lane holds from `pos` on, some 64 KiB or one message, and take nothing.

    `pos` is a read_pos, or where an earlier look ended. Nobody waits for a look: while it copies the reader may
    consume the records and the writer write over them. So what was copied counts only if read_pos is not beyond it
    afterwards; nothing that is torn is returned.

    Raises:
        RingCorrupted: What was published is no run of records.
    """
    layout, words, order = segment.layout, segment.words, segment.order_fence()
    capacity, first = layout.capacity, layout.lane_bytes(lane)
    read_pos, messages_out = (
        (layout.cursor(lane) + offset) >> 3 for offset in (_layout.READ_POS, _layout.MESSAGES_OUT)
    )
    end = words[(layout.lane_block(lane) + _layout.WRITE_POS) >> 3]  # R1
    if order:
        order()  # ORDER R1 before R2; and before read_pos, which then is no older: the two are at most a lane apart
    free = words[read_pos]
    if max(end, free) >= POSITIONS or (end | free) & 7 or end - free > capacity:
        what = f"was written to {end:,} and read to {free:,}, which a capacity of {capacity:,} does not allow"
        raise RingCorrupted(f"ring {segment.name!r}: lane {lane} {what}")
    start = at = max(pos, free)
    found: list[tuple[int, bytes | None]] = []  # each record's position; None is padding
    length = 0
    while at < end and at - start < BURST:
        offset = at % capacity
        room = min(end - at, capacity - offset)
        length = words[(first + offset) >> 3]
        if length == PADDING and room == capacity - offset:
            found.append((at, None))
            at += room
        elif length <= room - RECORD_HEADER and record_bytes(length) <= room:
            body = first + offset + RECORD_HEADER
            found.append((at, segment.map[body : body + length]))  # R2
            at += record_bytes(length)
        else:
            break
    if order:
        order()  # ORDER R2 before this load: a writer that wrote over what we copied had seen its R3 before (W1)
    free, consumed = words[read_pos], words[messages_out]
    if free > start:
        # Lengths before it may be of other records already, and so lead anywhere. It is where a record begins itself:
        # what was found there, and by going on from there, is whole.
        places = [place for place, _ in found]
        found = found[places.index(free) :] if free in places else []
        if not found:
            at = free
    elif at < end and at - start < BURST:
        what = f"a length of {length:,} where {end - at:,} bytes were published"
        raise RingCorrupted(f"ring {segment.name!r}: lane {lane} is damaged at position {at:,}: {what}")
    messages = [message for _, message in found if message is not None]
    return Peeked(messages, at, max(0, max(start, free) - pos), consumed)
