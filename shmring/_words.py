"""The shared words: the only file that loads or stores one, and the owner of every ordering claim.

What one aligned 8-byte access through ``memoryview.cast("Q")`` gives:

                     x86-64                            arm64
    whole            yes                               yes
    store, store     in order                          nothing: `order` between them
    load, load       in order                          nothing: `order`
    load, store      in order                          nothing: `order`
    store, load      nothing: `full`, or the other     the same
                     side's membarrier

Python has no compare-and-swap and no fence of its own, only calls that imply one. `order` and `full`
are one cycle of a ``threading.Lock`` on x86-64 (a locked instruction; `order` is None there, nothing
to do). On arm64 a cycle is a full barrier from CPython 3.13.1 on, two compare-and-swaps that are
sequentially consistent; before, glibc acquires and then releases, so two cycles in a row are needed
(derived from the sources, not run). ``struct.pack_into`` clears its target before it packs, so it
never touches a word that the other side may be reading; it does write records nobody may look at yet.

A message's way, and how the two sides fall asleep and wake each other. Everything is drawn for a
reader that sleeps; a writer that waits for room is the same with the columns changed:

    writer                                     reader
    W1  look at read_pos: is there room        R1  look at write_pos: is there a record
    W2  store the record                       R2  copy the record
    W3  store write_pos: it is published       R3  store read_pos: its bytes are free
    W4  fence                                  R4  fence
    W5  reader_parked odd? ring its bell       R5  writer_parked odd? ring its bell

                                               S1  note bell
                                               S2  make reader_parked odd: a new epoch
                                               S3  fence, and make every waker fence
                                               S4  look again at every lane
                                               S5  sleep while bell is as noted
                                               S6  make reader_parked even

W3 before R1 before R2, W2 before W3: the reader copies only whole records. R2 before R3 before W1
before W2: the writer never writes over bytes that are still being copied. W3 W4 W5 against S2 S3 S4:
either the writer sees the epoch, or the reader sees the record; take one fence away and both can
miss. A waker never writes the sleeper's word, it adds to `bell`: if it cleared the word, a kill
between clearing and waking, or a late clear that hits the next epoch, would lose a wake-up. It rings
once per epoch and remembers which. A waker that dies between W3 and W5 is made good by whoever takes
its role next: a claimant first rings everybody parked on the other side (C1).

The locked instruction of W4 and R4 would cost more than all the rest, so where the system can make
the other side fence (S3: Linux, membarrier) wakers that have registered leave theirs out.
"""

from __future__ import annotations

import mmap
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any, Final, NamedTuple, Optional, Protocol

from . import _layout
from ._errors import BufferTooSmall, MessageTooLarge, RingBusy, RingCorrupted
from ._layout import PADDING, RECORD_HEADER, Layout, place, record_bytes
from ._monitor import Monitor, Raised, unwrap

PACKED: Final = 1024  # bytes; messages up to this go in by struct, one call for length and payload
JOINED: Final = 16384  # bytes; longer ones are not worth joining, which copies them once more
BURST: Final = 65536  # bytes that are published, or copied out, in one go at most
BLOCK: Final = 32  # records that one struct takes apart: half the time of one at a time

_LENGTH = struct.Struct("=Q")
_GAPS = tuple(bytes(-size & 7) for size in range(8))

Fence = Optional[Callable[[], None]]


class Segment(Protocol):
    """What the protocol needs of the operating system. `_backend.py` says what it promises."""

    name: str
    layout: Layout
    map: mmap.mmap
    words: memoryview
    bells: memoryview
    order: Fence

    def claim(self, byte: int) -> bool: ...
    def release(self, byte: int) -> None: ...
    def reserve(self, offset: int, nbytes: int) -> None: ...
    def waker_fence(self) -> Fence: ...
    def sleeper_fence(self) -> bool: ...
    def ring(self, bell: int) -> None: ...
    def wait(self, bell: int, seen: int, deadline: float | None) -> None: ...


def make_fence(tso: bool) -> Callable[[], None]:
    """A full barrier for one thread at a time (a lock of its own: nobody can hold it meanwhile)."""
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def once() -> None:
        # Never waits: if an exception once came between the two, the release alone is the barrier.
        acquire(False)
        release()

    def twice() -> None:
        once()
        once()

    return once if tso or sys.version_info >= (3, 13, 1) else twice


# ---------------------------------------------------------------- requests to the two monitors


class WriteBatch:
    """Write these messages, as many as there is room for. `done` counts them.

    `size` is their size, or -1 if they have several.
    """

    __slots__ = ("done", "messages", "size")

    def __init__(self, messages: list[Any], size: int) -> None:
        self.messages = messages
        self.size = size
        self.done = 0

    def __len__(self) -> int:
        return sys.maxsize  # no message is as long: it leaves the writer's fast path by its length


class ReadBatch(NamedTuple):
    """Take up to so many messages, from every lane what it had when looked at."""

    max_messages: int


class ReadInto(NamedTuple):
    """Take one message of at most `room` bytes, into `view` if there is one."""

    view: memoryview | None
    room: int


class GiveBack(NamedTuple):
    """A message that was handed out but did not reach the caller."""

    message: bytes


# ---------------------------------------------------------------- framing, of bytes nobody else looks at


def join_run(messages: list[Any], size: int) -> bytes:
    """Messages that all have this `size`, as records. In C, at some 30 ns a message."""
    header, gap = _LENGTH.pack(size), _GAPS[size & 7]
    return header + (gap + header).join(messages) + gap


def join_mixed(messages: list[Any], start: int, room: int) -> tuple[bytes, int]:
    """As many of ``messages[start:]`` as fit into `room` bytes, as records, and how many these are."""
    parts: list[Any] = []
    taken = 0
    for message in islice(messages, start, None):
        size = len(message)
        room -= record_bytes(size)
        if room < 0:
            break
        parts += _LENGTH.pack(size), message, _GAPS[size & 7]
        taken += 1
    return b"".join(parts), taken


def split_run(burst: bytes, size: int) -> list[bytes]:
    """The messages in consecutive records that all have this `size`. In C, at some 40 ns a message."""
    messages: list[bytes] = []
    block = BLOCK * record_bytes(size)
    whole = len(burst) - len(burst) % block
    if whole:
        unpack = _records(size, BLOCK).unpack_from
        for at in range(0, whole, block):
            messages += unpack(burst, at)
    messages += chain.from_iterable(_records(size, 1).iter_unpack(burst[whole:]))
    return messages


@lru_cache(maxsize=256)
def _records(size: int, number: int) -> struct.Struct:
    return struct.Struct(f"{RECORD_HEADER}x{size}s{-size & 7}x" * number)


# ---------------------------------------------------------------- falling asleep and waking up


class Parking:
    """Where the threads of one handle sleep that wait for the other side of a ring.

    They all sleep on one bell; `parked` is odd while there is one. An entry that an exception left
    behind in `sleepers` keeps it odd, which costs each waker one ring and nothing else.
    """

    def __init__(self, segment: Segment, parked: int, parks: int, bell: int, wanted: int = 0) -> None:
        self._segment = segment
        self._bell = bell
        self._monitor = Monitor(self._steps(parked >> 3, parks >> 3, bell >> 2, wanted >> 3))

    def _steps(self, parked: int, parks: int, bell: int, wanted: int) -> Generator[Any, Any, None]:
        words, bells, order = self._segment.words, self._segment.bells, self._segment.order
        sleepers: dict[int, int] = {}
        words[parked] += words[parked] & 1  # the role's last holder may have died asleep; epochs go on from there
        answer: Any = None
        while True:
            try:
                thread, needs = yield answer
                if needs is None:
                    sleepers.pop(thread, None)
                    if not sleepers:
                        words[parked] += words[parked] & 1  # S6
                    answer = None
                else:
                    answer = bells[bell]  # S1
                    sleepers[thread] = needs
                    if wanted:
                        words[wanted] = min(sleepers.values())
                        if order:
                            order()  # ORDER before S2: who sees the epoch sees what it waits for
                    words[parks] += 1
                    words[parked] = words[parked] + 1 | 1  # S2: the next odd number
            except GeneratorExit:
                words[parked] += words[parked] & 1
                return
            except BaseException as error:
                answer = Raised(error)

    def park(self, nothing: Callable[[], bool], needs: int, deadline: float | None) -> None:
        """Sleep if there is `nothing` to do, until rung, or `deadline`, or for no reason at all."""
        thread = threading.get_ident()
        seen = unwrap(self._monitor.enter((thread, needs)))
        try:
            fenced = self._segment.sleeper_fence()  # S3
            if nothing():  # S4
                if not fenced:
                    # Wakers that count on our membarrier cannot be made to fence: look again soon.
                    soon = time.monotonic() + 0.001
                    deadline = soon if deadline is None else min(soon, deadline)
                self._segment.wait(self._bell, seen, deadline)  # S5
        finally:
            unwrap(self._monitor.enter((thread, None)))

    def close(self) -> None:
        """Wake this handle's threads, and never write the words again."""
        self._monitor.close()
        self._segment.ring(self._bell)


# ---------------------------------------------------------------- writing


class Writer:
    """The writing side of a handle: a lane of its own, claimed at the first request.

    Requests to `monitor`: a message (bytes, or a flat memoryview of bytes), or a `WriteBatch`. Answers:
    None when all of it is written; the read_pos that is wanted for more room, an int; a `Raised`.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lane = -1  # also while a claim is tried: an exception right after it must not lose it
        self._rung = 0  # the reader's epoch that this handle last rang
        self._fence: Fence = None
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps())

    @property
    def lane(self) -> int:
        """The lane claimed, -1 if none is."""
        return self._lane if self.parking is not None else -1

    @property
    def read_pos(self) -> int:
        """How far the reader has come in the claimed lane, in bytes."""
        cursor = self._segment.layout.cursor(self._lane)
        return int(self._segment.words[(cursor + _layout.READ_POS) >> 3])

    def close(self) -> None:
        """Wait until no thread is inside, end it, and give the lane back."""
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        if self._lane >= 0:
            self._segment.release(_layout.LANE + self._lane)

    def _claim(self) -> None:
        """Take the emptiest free lane, rather one that has its memory."""
        segment, layout, words = self._segment, self._segment.layout, self._segment.words
        ranked = []
        for lane in range(layout.writers):
            write_pos = words[(layout.lane_block(lane) + _layout.WRITE_POS) >> 3]
            fill = write_pos - words[(layout.cursor(lane) + _layout.READ_POS) >> 3]
            if 0 <= fill <= layout.capacity and not (write_pos | fill) & 7:
                ranked.append((lane != self._lane, fill, write_pos == 0, lane))
        for _, _, unused, lane in sorted(ranked):  # noqa: B007 - used after the loop
            self._lane = lane
            if segment.claim(_layout.LANE + lane):
                break
        else:
            self._lane = -1
            damaged = layout.writers - len(ranked)
            if damaged:
                raise RingCorrupted(
                    f"ring {segment.name!r}: {damaged} of its {layout.writers} lanes are damaged, the others are taken"
                )
            raise RingBusy(
                f"ring {segment.name!r}: each of its {layout.writers} lanes has a living writer; "
                f"close one, or create the ring with a larger writers= (it was writers={layout.writers})"
            )
        if unused:
            # Memory first: on a full /dev/shm the first store would be SIGBUS, this is ENOSPC.
            try:
                segment.reserve(layout.lane_bytes(lane), layout.capacity)
            except BaseException:
                segment.release(_layout.LANE + lane)
                raise
        self._fence = segment.waker_fence()
        # Before the first W3, and from lane 0 on: the reader looks for the first 0 here, and no further.
        for number in range(lane + 1):
            segment.map[layout.used_offset + number] = 1
        segment.ring(layout.readers_offset + _layout.READER_BELL)  # C1
        block = layout.lane_block(lane)
        self.parking = Parking(
            segment,
            block + _layout.WRITER_PARKED,
            block + _layout.WRITER_PARKS,
            block + _layout.WRITER_BELL,
            block + _layout.WRITER_WANTED,
        )

    def _ring(self) -> None:
        """W5, when the reader is asleep."""
        layout = self._segment.layout
        epoch = self._segment.words[(layout.readers_offset + _layout.READER_PARKED) >> 3]
        if epoch & 1 and epoch != self._rung:
            self._segment.ring(layout.readers_offset + _layout.READER_BELL)
            self._rung = epoch  # after it: an exception in between rings twice, which harms nobody

    def _publish(self, pos: int, messages: int) -> None:
        """W3 to W5: all before `pos` may be read, `messages` more than before."""
        segment = self._segment
        words, block = segment.words, segment.layout.lane_block(self._lane)
        if segment.order:
            segment.order()  # ORDER W2 before W3, else the reader copies what was never written
        words[(block + _layout.WRITE_POS) >> 3] = pos  # W3
        words[(block + _layout.MESSAGES_IN) >> 3] += messages
        if self._fence:
            self._fence()  # W4
        self._ring()  # W5

    def _room(self, pos: int, step: int) -> tuple[int, int, int]:
        """Look for room at `pos` for a record of `step` bytes, after padding where the lane ends.

        Returns:
            Where the record goes; up to where this lap is free; 0, or the read_pos that is wanted.
        """
        segment, capacity = self._segment, self._segment.layout.capacity
        read_pos = self.read_pos  # W1, STALE OK: too small only makes us wait once more
        if segment.order:
            segment.order()  # ORDER W1 before W2, else we write over what is still being copied
        if not 0 <= pos - read_pos <= capacity or read_pos & 7:
            raise RingCorrupted(
                f"ring {segment.name!r}: lane {self._lane} was written to {pos:,} and read to {read_pos:,}, "
                f"which a capacity of {capacity:,} does not allow"
            )
        padding, wanted = place(pos, read_pos, step, capacity)
        if padding:
            segment.words[(segment.layout.lane_bytes(self._lane) + pos % capacity) >> 3] = PADDING
            pos += padding
            self._publish(pos, 0)
        return pos, min(read_pos + capacity, pos - pos % capacity + capacity), wanted

    def _write_batch(self, batch: WriteBatch) -> int | None:
        segment, messages = self._segment, batch.messages
        first, capacity = segment.layout.lane_bytes(self._lane), segment.layout.capacity
        pos = segment.words[(segment.layout.lane_block(self._lane) + _layout.WRITE_POS) >> 3]
        while batch.done < len(messages):
            size = len(messages[batch.done])
            step = record_bytes(size)
            pos, free, wanted = self._room(pos, step)
            if wanted:
                return wanted
            at = first + pos % capacity
            room = min(free - pos, BURST)
            if size > JOINED:
                taken, nbytes = 1, step
                segment.words[at >> 3] = size
                segment.map[at + RECORD_HEADER : at + RECORD_HEADER + size] = messages[batch.done]  # W2
            else:
                if batch.size >= 0:
                    run = messages[batch.done : batch.done + room // step]
                    records, taken = join_run(run, size), len(run)
                else:
                    records, taken = join_mixed(messages, batch.done, room)
                nbytes = len(records)
                segment.map[at : at + nbytes] = records  # W2
            pos += nbytes
            self._publish(pos, taken)
            batch.done += taken
        return None

    def _steps(self) -> Generator[Any, Any, None]:
        segment = self._segment
        layout, words, ring, order = segment.layout, segment.words, segment.map, segment.order
        capacity, max_message = layout.capacity, layout.max_message
        reader_parked = (layout.readers_offset + _layout.READER_PARKED) >> 3
        answer: Any = None
        while True:
            try:
                data = yield answer
                if self.parking is None:
                    self._claim()
                fence = self._fence
                write_pos = (layout.lane_block(self._lane) + _layout.WRITE_POS) >> 3
                messages_in = (layout.lane_block(self._lane) + _layout.MESSAGES_IN) >> 3
                first = layout.lane_bytes(self._lane)
                while True:
                    pos, count = words[write_pos], words[messages_in]
                    at = stop = first + pos % capacity  # records go from here to there: no room until looked for
                    base = pos - at  # the position that the segment's byte 0 would have in this lap
                    size = -1
                    while True:
                        if len(data) != size:
                            if type(data) is WriteBatch:
                                break
                            size = len(data)
                            if size > max_message:
                                raise MessageTooLarge(segment.name, size, max_message)
                            step = record_bytes(size)
                            # One call for length and payload instead of two stores: a fifth of a small write.
                            pack = struct.Struct(f"=Q{size}s").pack_into if size <= PACKED else None
                        end = at + step
                        if end > stop:
                            pos, free, wanted = self._room(base + at, step)
                            at = first + pos % capacity
                            base = pos - at
                            stop = free - base
                            if wanted:
                                data = yield wanted
                                continue
                            end = at + step
                        if pack is not None:
                            pack(ring, at, size, data)  # W2
                        else:
                            words[at >> 3] = size
                            ring[at + RECORD_HEADER : at + RECORD_HEADER + size] = data
                        if order:
                            order()  # ORDER W2 before W3, as in _publish
                        words[write_pos] = base + end  # W3
                        at = end
                        words[messages_in] = count = count + 1
                        if fence:
                            fence()  # W4
                        if words[reader_parked] & 1:  # W5
                            self._ring()
                        data = yield None
                    data = yield self._write_batch(data)
            except GeneratorExit:
                return
            except BaseException as error:
                if self.parking is not None:
                    self._ring()  # it may have come between W3 and W5
                answer = Raised(error)


# ---------------------------------------------------------------- reading


def _column(offset: int, stride: int, rows: int) -> slice:
    """One word of each row of a table, as a slice of the shared words."""
    return slice(offset >> 3, (offset + rows * stride) >> 3, stride >> 3)


class _Lane:
    """One lane as its reader sees it: where its words are, and how far it has been read."""

    __slots__ = (
        "base", "bell", "count", "end", "first", "messages_out", "number", "parked", "pos", "read_pos", "rung", "top",
        "wanted", "write_pos",
    )  # fmt: skip

    def __init__(self, layout: Layout, number: int) -> None:
        block, cursor = layout.lane_block(number), layout.cursor(number)
        self.number = number
        self.write_pos = (block + _layout.WRITE_POS) >> 3
        self.parked = (block + _layout.WRITER_PARKED) >> 3
        self.wanted = (block + _layout.WRITER_WANTED) >> 3
        self.bell = block + _layout.WRITER_BELL
        self.read_pos = (cursor + _layout.READ_POS) >> 3
        self.messages_out = (cursor + _layout.MESSAGES_OUT) >> 3
        self.first = layout.lane_bytes(number)
        self.top = self.first + layout.capacity
        self.rung = 0  # the writer's epoch that this handle last rang
        self.pos = self.end = self.count = 0

    def load(self, words: memoryview) -> None:
        """Take up what the shared words say, as a successor of the last reader would."""
        self.pos = self.end = words[self.read_pos]
        self.count = words[self.messages_out]


class Reader:
    """The reading side of a handle, for all lanes. The role is claimed at the first request.

    Requests to `monitor`: None takes one message, or see `ReadInto`, `ReadBatch`, `GiveBack`. Answers: the
    message (bytes; its size for `ReadInto` a view; a list for `ReadBatch`), None when there is nothing, a `Raised`.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lanes: list[_Lane] = []  # those that have ever been claimed
        self._damaged: set[int] = set()
        self._last = 0  # the lane that was served last
        self._owed: deque[bytes] = deque()  # taken out of the ring, but not handed over
        self._fence: Fence = None
        self._tried = False
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps())

    def close(self) -> None:
        """Wait until no thread is inside, end it, and give the role back."""
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        if self._tried:
            self._segment.release(_layout.READER)

    @property
    def claimed(self) -> bool:
        """Is the reader's role ours?"""
        return self.parking is not None

    def nothing(self) -> bool:
        """Is every lane empty that is not damaged? For S4, which may look from outside the monitor."""
        words, layout = self._segment.words, self._segment.layout
        lanes = range(layout.writers)
        written = words[_column(layout.lane_block(0) + _layout.WRITE_POS, _layout.LANE_BYTES, layout.writers)].tolist()
        read = words[_column(layout.cursor(0) + _layout.READ_POS, _layout.CURSOR_BYTES, layout.writers)].tolist()
        if self._owed:
            return False
        return written == read or all(written[i] == read[i] or i in self._damaged for i in lanes)

    def _claim(self) -> None:
        segment, layout = self._segment, self._segment.layout
        self._tried = True
        if not segment.claim(_layout.READER):
            self._tried = False
            raise RingBusy(f"ring {segment.name!r} has a living reader, and was made for one (readers='one')")
        self._fence = segment.waker_fence()
        for lane in range(layout.writers):
            block = layout.lane_block(lane)
            if segment.words[(block + _layout.WRITER_PARKED) >> 3] & 1:
                segment.ring(block + _layout.WRITER_BELL)  # C1
        reader = layout.readers_offset
        self.parking = Parking(
            segment, reader + _layout.READER_PARKED, reader + _layout.READER_PARKS, reader + _layout.READER_BELL
        )

    def _damage(self, lane: _Lane, pos: int, what: str) -> None:
        """Leave this lane alone from now on, and say so once."""
        self._damaged.add(lane.number)
        raise RingCorrupted(
            f"ring {self._segment.name!r}: lane {lane.number} is damaged at position {pos:,}: {what}. "
            f"It is skipped from now on, the other lanes are read on"
        )

    def _look(self) -> list[_Lane]:
        """R1 for every lane: those that have something, the first to be served at the end."""
        layout, words, used = self._segment.layout, self._segment.words, self._segment.map
        while used[layout.used_offset + len(self._lanes)]:
            lane = _Lane(layout, len(self._lanes))
            lane.load(words)
            self._lanes.append(lane)
        capacity = layout.capacity
        turns = []
        for lane in self._lanes:
            lane.end = words[lane.write_pos]
            if lane.end != lane.pos and lane.number not in self._damaged:
                if not lane.pos <= lane.end <= lane.pos + capacity or (lane.pos | lane.end) & 7:
                    self._damage(lane, lane.pos, f"its write_pos is {lane.end:,} with a capacity of {capacity:,}")
                turns.append(lane)
        if len(turns) > 1:
            turns.sort(key=lambda lane: (lane.number <= self._last, lane.number), reverse=True)
        if self._segment.order:
            self._segment.order()  # ORDER R1 before R2, else we copy what was there before the record
        return turns

    def _record(self, lane: _Lane, pos: int) -> tuple[int, int]:
        """The position and size of the record at `pos`, after padding; position ``lane.end`` if there is none."""
        capacity = self._segment.layout.capacity
        while pos != lane.end:
            offset = pos % capacity
            room = min(lane.end - pos, capacity - offset)
            size = self._segment.words[(lane.first + offset) >> 3]
            if size == PADDING and room == capacity - offset:
                pos += room
            elif size <= room - RECORD_HEADER and record_bytes(size) <= room:
                return pos, size
            else:
                self._damage(lane, pos, f"a length of {size:,} where {room:,} bytes were published")
        return pos, 0

    def _run(self, lane: _Lane, pos: int, size: int, most: int) -> int:
        """How many records from `pos` on, at most `most`, have this `size`: at least 1. Costs one call in C."""
        step = record_bytes(size)
        at = lane.first + pos % self._segment.layout.capacity
        most = min(most, min(lane.end - pos, lane.top - at, BURST) // step)
        if most < 2 or self._segment.words[(at + step) >> 3] != size:
            return 1
        sizes = self._segment.words[at >> 3 : (at + most * step) >> 3 : step >> 3].tolist()
        return most if sizes.count(size) == most else next(i for i, other in enumerate(sizes) if other != size)

    def _free(self, lane: _Lane, pos: int, count: int, messages: Sequence[bytes]) -> None:
        """R3 to R5: everything before `pos` is consumed, and `messages` are on their way to the caller."""
        segment = self._segment
        try:
            if segment.order:
                segment.order()  # ORDER R2 before R3, else the writer overwrites what is still being copied
            segment.words[lane.read_pos] = pos  # R3
            segment.words[lane.messages_out] = count
            lane.pos, lane.count = pos, count
            if self._fence:
                self._fence()  # R4
            self._ring(lane, pos)  # R5
        except BaseException:
            if segment.words[lane.read_pos] == pos:
                self._owed.extend(messages)  # out of the ring already, so the next call gets them
            raise

    def _ring(self, lane: _Lane, pos: int) -> None:
        """R5, when the lane's writer is asleep and has the room it waits for."""
        words = self._segment.words
        epoch = words[lane.parked]
        if epoch & 1 and epoch != lane.rung:
            if self._segment.order:
                self._segment.order()  # ORDER epoch before wanted, as they were stored
            if pos >= words[lane.wanted]:
                self._segment.ring(lane.bell)
                lane.rung = epoch

    def _read_into(self, request: ReadInto) -> bytes | int | None:
        segment, capacity = self._segment, self._segment.layout.capacity
        owed, lane, body = self._owed, None, 0
        if owed:
            size = len(owed[0])
        else:
            for lane in reversed(self._look()):
                pos, size = self._record(lane, lane.pos)
                if pos != lane.end:
                    break
                self._free(lane, pos, lane.count, ())  # nothing but padding
            else:
                return None
            body = lane.first + pos % capacity + RECORD_HEADER
        if size > request.room:
            raise BufferTooSmall(segment.name, size, request.room)
        message = owed[0] if lane is None else segment.map[body : body + size]  # R2
        if request.view is not None:
            request.view[:size] = message
        if lane is None:
            owed.popleft()
        else:
            self._last = lane.number
            self._free(lane, pos + record_bytes(size), lane.count + 1, (message,))
        return message if request.view is None else size

    def _read_batch(self, most: int) -> list[bytes] | None:
        segment, capacity = self._segment, self._segment.layout.capacity
        messages = [*islice(self._owed, most)]
        owed = len(messages)
        taken = []
        for lane in reversed(self._look()):
            pos, count, start = lane.pos, lane.count, len(messages)
            while len(messages) < most:
                pos, size = self._record(lane, pos)
                if pos == lane.end:
                    break
                run = self._run(lane, pos, size, most - len(messages))
                at, nbytes = lane.first + pos % capacity, run * record_bytes(size)
                if run > 1:
                    messages += split_run(segment.map[at : at + nbytes], size)  # R2
                else:
                    messages.append(segment.map[at + RECORD_HEADER : at + RECORD_HEADER + size])  # R2
                pos += nbytes
                count += run
            taken.append((lane, pos, count, start, len(messages)))
        for lane, pos, count, start, stop in taken:
            self._last = lane.number
            self._free(lane, pos, count, messages[start:stop])
        for _ in range(owed):
            self._owed.popleft()
        return messages or None

    def _serve(self, request: Any) -> Any:
        """Requests that are not for one message as it comes."""
        if type(request) is ReadBatch:
            return self._read_batch(request.max_messages)
        if type(request) is ReadInto:
            return self._read_into(request)
        assert type(request) is GiveBack
        self._owed.appendleft(request.message)
        return None

    def _steps(self) -> Generator[Any, Any, None]:
        segment, capacity = self._segment, self._segment.layout.capacity
        words, ring, order = segment.words, segment.map, segment.order
        used_offset = segment.layout.used_offset
        answer: Any = None
        none = lane = _Lane(segment.layout, 0)
        message: Any = None
        # Of the lane that is being read: its words, and how far it is read, published and handed over.
        write_pos = read_pos = messages_out = parked = next_used = 0
        pos = end = given = count = base = last = 0
        while True:
            try:
                message = yield answer
                if self.parking is None:
                    self._claim()
                fence = self._fence
                for known in self._lanes:
                    known.load(words)
                lane = none
                turns: list[_Lane] = []
                pos = end = 0
                alone = False  # there is one lane in use: no need to go round
                size = step = -1
                while True:
                    if message is not None:
                        lane.pos, lane.count = pos, count
                        lane, pos, turns, alone = none, end, [], False
                        message = yield self._serve(message)
                        continue
                    if pos == end:
                        if alone:
                            end = words[write_pos]  # R1
                            if order:
                                order()  # ORDER R1 before R2, as in _look
                            if pos == end:
                                if ring[next_used]:
                                    alone = False  # another lane is in use now
                                else:
                                    message = yield None
                                continue
                        else:
                            lane.pos, lane.count = pos, count
                            lane = none
                            if self._owed:
                                message = yield self._owed.popleft()
                                continue
                            if not turns:
                                turns = self._look()
                                if not turns:
                                    message = yield None
                                    continue
                            lane = turns.pop()
                            self._last = lane.number
                            alone, next_used = len(self._lanes) == 1, used_offset + len(self._lanes)
                            pos = given = lane.pos
                            end, count = lane.end, lane.count
                            write_pos, read_pos, messages_out, parked = (
                                lane.write_pos, lane.read_pos, lane.messages_out, lane.parked
                            )  # fmt: skip
                            base = pos - pos % capacity - lane.first  # the position of the segment's byte 0 in this lap
                            last = lane.top - step  # up to here a record like the last one fits
                    at = pos - base
                    if end - pos == step and at <= last and words[at >> 3] == size:
                        # One more like the last one, and that is all there is: the way of a message that is
                        # awaited, written out for its latency.
                        at += RECORD_HEADER
                        message = ring[at : at + size]  # R2
                        if order:
                            order()  # ORDER R2 before R3, as in _free
                        words[read_pos] = pos = end  # R3
                        words[messages_out] = count = count + 1
                        if fence:
                            fence()  # R4
                        if words[parked] & 1:
                            self._ring(lane, pos)  # R5
                        try:
                            message = yield message
                        finally:
                            given = pos
                        continue
                    lane.end = end
                    if not pos < end <= pos + capacity or end & 7:
                        self._damage(lane, pos, f"its write_pos is {end:,} with a capacity of {capacity:,}")
                    given = pos
                    message = None
                    pos, size = self._record(lane, pos)
                    if pos == end:
                        given = pos
                        self._free(lane, pos, count, ())  # nothing but padding
                        continue
                    step = record_bytes(size)
                    base = pos - pos % capacity - lane.first
                    last = lane.top - step
                    at = pos - base
                    run = self._run(lane, pos, size, BURST)
                    if run > 3:
                        burst: Sequence[bytes] = split_run(ring[at : at + run * step], size)  # R2
                    else:
                        burst = (ring[at + RECORD_HEADER : at + RECORD_HEADER + size],)  # R2
                    for message in burst:
                        if order:
                            order()  # ORDER R2 before R3, as in _free
                        words[read_pos] = pos = pos + step  # R3
                        words[messages_out] = count = count + 1
                        if fence:
                            fence()  # R4
                        if words[parked] & 1:
                            self._ring(lane, pos)  # R5
                        try:
                            message = yield message
                        finally:
                            given = pos
                        if message is not None:
                            break
            except GeneratorExit:
                return
            except BaseException as error:
                if lane is not none and words[lane.read_pos] != given and type(message) is bytes:
                    self._owed.append(message)  # out of the ring, but it did not reach the caller
                answer = Raised(error)
