"""The reading side of a handle: R1 to R5; J1 to J3, where all read everything, and D2, where writers do not wait."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, Final

from . import _layout
from ._errors import BufferTooSmall, MessagesLost, RingBusy, RingCorrupted
from ._lanes import BURST, PACKED, Lane, count_records, find_mark, record_of, run_of, split_mixed, split_run
from ._layout import MARKS, PADDING, RECORD_HEADER, record_bytes
from ._monitor import Monitor, MonitorClosed
from ._parking import Parking
from ._requests import Borrow, Exporter, GiveBack, ReadBatch, ReadOne, ReadRequest, still_used
from ._words import POSITIONS, WORD, Fence, Segment, can_be

KEPT: Final = 1 << 24  # bytes; the most that `_keep_memory` asks for
COUNTED: Final = 100  # times that a reader who joins tries to have a position and a count that belong together

_kept = 1 << 17  # bytes; what malloc does not give back, to begin with


def _keep_memory(nbytes: int) -> None:
    """Have malloc keep what a batch of so many bytes takes, for the next one. Only where it is glibc's.

    It gives what is free at the heap's end back to the system, and each page of it is a fault when it is taken anew:
    batches of long messages took two to five times as long. It keeps twice the largest block, up to 32 MiB, that was
    ever mapped and freed (mallopt(3), "dynamic mmap threshold"): this one, which nobody touches. Larger each time,
    because one that is not would come from the heap by now.
    """
    global _kept
    if _kept < KEPT:
        _kept = min(1 << nbytes.bit_length(), KEPT)
        with suppress(MemoryError):
            bytes(_kept)


class Reader:
    """The reading side of a handle, for all lanes. The role is claimed at the first request.

    Requests to `monitor`: None takes one message, or see `ReadOne`, `ReadBatch`, `GiveBack`. Answers: the
    message (bytes; its size if it went to a view; a list for `ReadBatch`), or None when there is nothing.

    Attributes:
        was_refused: Was it another one's turn, of those that compete, and is it to be left to that one a little longer?
        looks: For each of these the next request looks once more before its answer is that there is nothing.
    """

    was_refused = False
    looks: Sequence[int] = ()

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lanes: list[Lane] = []  # those that have ever been claimed, from the first on
        self._last = 0  # the lane that was served last
        self._owed: list[bytes] = []  # out of the ring, but not handed over; replaced, never changed
        self._untold: tuple[Lane, int, int] | None = None  # where a lane goes on after that many lost; not said yet
        self._bytes = memoryview(segment.map)
        self._exporter: Exporter | None = None  # from the first message in place on
        self._borrowed: Borrow | None = None  # nothing else is read meanwhile
        self._fence: Fence = None
        self._order = segment.order_fence()
        self._drops = segment.layout.drop
        self.slot = -1  # also while a claim is tried
        self.joined = 0  # with which number we did; no reader before or after has it
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps, undo=lambda message: GiveBack([message]))

    @property
    def claimed(self) -> bool:
        """Is the reader's role ours?"""
        return self.parking is not None

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        self.monitor.refuse_reentry()
        if self.parking is not None:
            self.parking.refuse_reentry()

    def close(self) -> Any:
        """Wait until no thread is inside, end it, and give the role back.

        Returns:
            What goes once nothing may read any more, so that the role is kept until then. None if nothing may.
        """
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None and not borrowed.released():
            return borrowed.remains()
        if self.slot >= 0:
            self._leave()
            self._segment.release(_layout.READER + self.slot)
        return None

    def nothing(self) -> bool:
        """Is there nothing to take? For S4, which looks from outside the monitor; in doubt it says no."""
        borrowed = self._borrowed
        if borrowed is not None:
            return not borrowed.left
        return not self._owed and not self._can_take()

    def _can_take(self) -> bool:
        """Is there something in the ring? For `nothing`."""
        if self._another_used():  # first: another thread may have taken up a lane when we have looked at those we knew
            return True
        words = self._segment.words
        for lane in self._lanes:
            if words[lane.write_pos] not in (lane.pos, words[lane.read_pos]) and not lane.damage:
                return True
        return False

    def _another_used(self) -> bool:
        """Has a lane come into use that is not known yet?"""
        layout, known = self._segment.layout, len(self._lanes)
        return known < layout.writers and self._segment.map[layout.used_offset + known] != 0

    def pass_on(self) -> None:
        """Who calls leaves a wait without a message. Readers that compete have another one woken for it."""

    def give_back(self, request: ReadRequest) -> None:
        """An exception kept the answer to `request` from the caller: the next one gets it."""
        words = self._segment.words
        before, owed = request.owed
        lost = owed if before is not None and before is not self._owed else []
        for lane, pos, messages in request.taken:
            if words[lane.read_pos] >= pos:
                lost = lost + [bytes(message) for message in messages]  # from the caller's buffer, or as it is
        if lost:
            with suppress(MonitorClosed):  # nobody is left to get them
                self.monitor.enter(GiveBack(lost))

    def _take_owed(self, request: ReadRequest, most: int) -> list[bytes]:
        before = self._owed
        owed = before[:most]
        request.owed = before, owed
        self._owed = before[most:]
        return owed

    def _claim(self) -> None:
        segment, layout = self._segment, self._segment.layout
        for slot in range(max(0, self.slot), layout.slots):
            self.slot = slot
            if segment.claim(_layout.READER + slot):
                break
        else:
            self.slot = -1
            if layout.readers == "one":
                raise RingBusy(f"ring {segment.name!r} has a living reader, and was made for one (readers='one')")
            raise RingBusy(
                f"ring {segment.name!r} has {layout.slots} living readers; "
                f"close one, or create the ring with a larger max_readers= (it was max_readers={layout.slots})"
            )
        self._fence = segment.waker_fence()
        if layout.readers != "one":
            self._join()
        reader = layout.reader_block(self.slot)
        asleep = layout.asleep_offset + self.slot if layout.readers != "one" else 0
        self.parking = Parking(
            segment,
            reader + _layout.READER_PARKED,
            reader + _layout.READER_PARKS,
            reader + _layout.READER_BELL,
            asleep=asleep,
        )

    def _join(self) -> None:
        """Have the writers of a broadcast ring wait for us, for what is published from now on."""
        segment, layout, words = self._segment, self._segment.layout, self._segment.words
        joined = (layout.reader_block(self.slot) + _layout.JOINED) >> 3
        self.joined = (words[joined] | 3) + 2 & WORD
        words[joined] = self.joined  # J1
        if not segment.sleeper_fence():  # J2
            time.sleep(0.01)  # nobody can make the writers fence: what they have stored has arrived after that
        for number in range(layout.writers):
            lane = Lane(layout, number, self.slot)
            pos, count = self._end_of(lane)
            with suppress(RingCorrupted):  # said when it is read
                while self._drops:
                    count = self._count(lane, pos)
                    if count >= 0:
                        break
                    before, pos = pos, words[lane.write_pos]
                    if pos == before:
                        break  # damage: nobody gives up the last mark before write_pos
            words[lane.messages_out] = max(0, count)
            words[lane.read_pos] = pos  # J3
        words[joined] = self.joined | 2  # only now are we there, for who waits for us to write

    def _end_of(self, lane: Lane) -> tuple[int, int]:
        """Where a lane ends, and how many messages came before; with a writer that never pauses, maybe a few more."""
        words = self._segment.words
        messages_in = (self._segment.layout.lane_block(lane.number) + _layout.MESSAGES_IN) >> 3
        pos = count = 0
        for _ in range(COUNTED):
            pos = words[lane.write_pos]  # J3
            count = words[messages_in]
            if pos == words[lane.write_pos]:
                break
        return pos, count

    def _count(self, lane: Lane, pos: int) -> int:
        """Where writers do not wait: how many messages there were before `pos`, exactly; -1 if that is lost already."""
        words, layout = self._segment.words, self._segment.layout
        if self._order:
            self._order()  # ORDER write_pos before mark_pos
        number, mark_pos, count = find_mark(words, layout, lane.number, pos, self._order)
        more = count_records(words, layout, lane.number, mark_pos, pos)
        if self._lapped(lane, mark_pos):
            given_up = words[lane.given_up]
            if self._order:
                self._order()  # given_up before write_pos: the one is never a lane ahead of the other
            if given_up > words[lane.write_pos] + layout.capacity:
                raise self._damaged(lane, pos, f"it was given up to {given_up:,}")
            return -1
        if number < 0 or more < 0 or count + more >= POSITIONS:
            raise self._damaged(lane, pos, "it has no mark before")
        return count + more

    def _recount(self) -> None:
        """An exception may have come between a read_pos and the count of it."""
        words = self._segment.words
        for lane in self._lanes:
            if not lane.damage:
                try:
                    count = self._count(lane, words[lane.read_pos])
                except RingCorrupted:
                    lane.damage = ""  # who reads it finds out, and says so
                else:
                    if count >= 0:
                        words[lane.messages_out] = count

    def _leave(self) -> None:
        """Have no writer of a broadcast ring wait for us any longer."""
        words = self._segment.words
        joined = (self._segment.layout.reader_block(self.slot) + _layout.JOINED) >> 3
        if self.joined:
            if words[joined] | 2 == self.joined | 2:  # else this is done again, and the slot may be another's by now
                words[joined] = (self.joined | 3) + 1 & WORD
            self._make_good()  # also if an exception came before it the last time

    def _lapped(self, lane: Lane, pos: int) -> bool:
        """Where writers do not wait: may what lies at `pos` have been written over, when it had been copied?"""
        if self._order:
            self._order()  # ORDER R2 before D2
        return self._segment.words[lane.given_up] > pos + self._segment.layout.capacity  # D2

    def _pass_over(self, lane: Lane, pos: int, count: int) -> bool:
        """Go on with the oldest message that is there, if what lies at `pos` is not. Was that so?

        Raises:
            MessagesLost: There were messages in between.
        """
        if not self._lapped(lane, pos):
            return False
        layout, words = self._segment.layout, self._segment.words
        while True:
            given_up = words[lane.given_up]
            if self._order:
                self._order()  # ORDER given_up before mark_pos; the mark is stored anew once it was given up as well
            mark = (layout.marks(lane.number) + given_up // layout.part % MARKS * _layout.MARK_BYTES) >> 3
            mark_pos, mark_count = words[mark + (_layout.MARK_POS >> 3)], words[mark + (_layout.MARK_COUNT >> 3)]
            if not self._lapped(lane, given_up - layout.capacity):
                break
        if not pos < mark_pos <= given_up or not count <= mark_count < POSITIONS or mark_pos & 7:
            raise self._damaged(lane, pos, f"its mark at {mark_pos:,} cannot be")
        if mark_count > count:
            self._untold = lane, mark_pos, mark_count - count
        self._free(lane, mark_pos, mark_count)
        if mark_count > count:
            raise MessagesLost(self._segment.name, mark_count - count, lane.number)
        return True

    def _make_good(self) -> None:
        """C1: the reader before, or this one before an exception, may have ended between R3 and R5."""
        segment, layout = self._segment, self._segment.layout
        if self._fence:
            self._fence()
        for number in range(layout.writers):
            block = layout.lane_block(number)
            if segment.words[(block + _layout.WRITER_PARKED) >> 3] & 1:
                segment.ring(block + _layout.WRITER_BELL)
        if self._owed and self.parking is not None:
            self.parking.wake()

    def _damaged(self, lane: Lane, pos: int, what: str) -> RingCorrupted:
        """Leave this lane alone from now on, which is to be said once."""
        lane.damage = what
        return RingCorrupted(
            f"ring {self._segment.name!r}: lane {lane.number} is damaged at position {pos:,}: {what}. "
            f"It is skipped from now on, the other lanes are read on"
        )

    def _look(self) -> list[Lane]:
        """R1 for every lane: those that have something, the first to be served at the end."""
        segment, lanes = self._segment, self._lanes
        words = segment.words
        if segment.map[segment.layout.used_offset + len(lanes)]:  # written out: it is a part of each look's time
            self._take_up_lanes()
        if self._untold is not None:
            lane, pos, lost = self._untold
            if words[lane.read_pos] >= pos:
                raise MessagesLost(segment.name, lost, lane.number)
            self._untold = None  # it did not come to R3, and is found out once more
        turns = []
        for lane in lanes:
            lane.end = words[lane.write_pos]  # R1
            if lane.end != lane.pos and not lane.damage:
                while self._drops and self._pass_over(lane, lane.pos, lane.count):
                    lane.end = words[lane.write_pos]  # it may have been overtaken again by now
                if not lane.backed:
                    self._check(lane, lane.pos)
                turns.append(lane)
        if len(turns) > 1:
            self._take_turns(turns)
        if self._order:
            self._order()  # ORDER R1 before R2, else we copy what was there before the record
        return turns

    def _take_up_lanes(self) -> None:
        """Know the lanes that have come into use."""
        words = self._segment.words
        while self._another_used():
            lane = Lane(self._segment.layout, len(self._lanes), self.slot)
            lane.pos, lane.count = words[lane.read_pos], words[lane.messages_out] & WORD >> 1
            self._lanes.append(lane)

    def _take_turns(self, lanes: list[Lane]) -> None:
        """Turn these round, so that the first after the one that was served last is at the end."""
        last = self._last
        before = len([lane for lane in lanes if lane.number <= last])
        lanes[:] = lanes[before:] + lanes[:before]
        lanes.reverse()

    def _check(self, lane: Lane, pos: int) -> None:
        """Raise RingCorrupted if the lane cannot have been published so far."""
        capacity = self._segment.layout.capacity
        if not can_be(pos, lane.end, capacity):
            what = f"its write_pos is {lane.end:,}, which a capacity of {capacity:,} does not allow"
            raise self._damaged(lane, pos, what)
        if not lane.backed:
            self._segment.back(lane.first, capacity)
            lane.backed = True

    def _record(self, lane: Lane, pos: int) -> tuple[int, int]:
        """The position and size of the record at `pos`, after padding; position ``lane.end`` if there is none.

        A size of -1 is damage: say `_bad_length` once everything before it has been handed over.
        """
        capacity = self._segment.layout.capacity
        while pos != lane.end:
            offset = pos % capacity
            room = min(lane.end - pos, capacity - offset)
            size = self._segment.words[(lane.first + offset) >> 3]
            if RECORD_HEADER + (size + 7 & ~7) <= room:  # as in split_mixed
                return pos, size
            if size != PADDING or room != capacity - offset:
                return pos, -1
            pos += room
        return pos, 0

    def _bad_length(self, lane: Lane, pos: int) -> RingCorrupted:
        length = self._segment.words[(lane.first + pos % self._segment.layout.capacity) >> 3]
        return self._damaged(lane, pos, f"a length of {length:,} where {lane.end - pos:,} bytes were published")

    def _free(self, lane: Lane, pos: int, count: int) -> None:
        """R3 to R5: everything before `pos` is consumed."""
        words = self._segment.words
        if self._order:
            self._order()  # ORDER R2 before R3, else the writer overwrites what is still being copied
        words[lane.read_pos] = lane.pos = pos  # R3
        words[lane.messages_out] = lane.count = count
        if self._fence:
            self._fence()  # R4
        if words[lane.parked] & 1:  # R5
            self._ring(lane, pos)

    def _ring(self, lane: Lane, pos: int) -> None:
        """R5, when the lane's writer is asleep and has the room it waits for."""
        words = self._segment.words
        epoch = words[lane.parked]
        if epoch & 1 and epoch != lane.rung:
            if self._order:
                self._order()  # ORDER epoch before wanted, as they were stored
            wanted = words[lane.wanted]
            if pos >= wanted:
                rung = self._segment.ring(lane.bell)
                lane.rung = epoch if rung else 0
            else:
                lane.seen, lane.held = epoch, wanted

    def _first(self) -> tuple[Lane, int, int] | None:
        """The lane whose turn it is and that has a record, with the record's position and size; padding is consumed."""
        lanes = self._lanes
        if len(lanes) == 1 and not self._drops and not lanes[0].damage:
            # To look no further takes a quarter of a borrow's time.
            pos, size = self._record(lanes[0], lanes[0].pos)
            if size >= 0 and pos != lanes[0].end:
                return lanes[0], pos, size
        for lane in reversed(self._look()):
            self._check(lane, lane.pos)
            pos, size = self._record(lane, lane.pos)
            if self._drops and self._lapped(lane, lane.pos):
                return self._first()
            if size < 0:
                raise self._bad_length(lane, pos)
            if pos != lane.end:
                return lane, pos, size
            self._free(lane, pos, lane.count)  # nothing but padding
        return None

    def _read_one(self, request: ReadOne) -> bytes | int | None:
        segment, capacity = self._segment, self._segment.layout.capacity
        if self._owed:
            return self._read_owed(request)
        found = self._first()
        if found is None:
            return None
        lane, pos, size = found
        if size > request.room:
            raise BufferTooSmall(segment.name, size, request.room)
        body = lane.first + pos % capacity + RECORD_HEADER
        message: Any
        if request.view is None:
            message = segment.map[body : body + size]  # R2
        else:
            message = request.view[:size]
            message[:] = self._bytes[body : body + size]  # R2
        if self._drops and self._lapped(lane, lane.pos):
            return self._read_one(request)
        pos += record_bytes(size)
        request.taken = [(lane, pos, [message])]
        self._last = lane.number
        self._free(lane, pos, lane.count + 1)
        return message if request.view is None else size

    def _is_borrowed(self) -> bool:
        """Does another thread have a message in place? RingBusy if this one has."""
        borrowed = self._borrowed
        if borrowed is not None:
            if not borrowed.is_over(self._segment.name):
                return True
            self._return(borrowed)
        return False

    def _borrow(self, request: Borrow) -> memoryview | None:
        """What the caller does with the view is the copy of the record that comes before R3."""
        segment, capacity = self._segment, self._segment.layout.capacity
        if self._owed:
            request.owed, request.behind = self._owed[0], len(self._owed)
            request.view = memoryview(request.owed)
            self._borrowed = request
            return request.view
        found = self._first()
        if found is None:
            return None
        lane, pos, size = found
        body = lane.first + pos % capacity + RECORD_HEADER
        request.lane, request.pos, request.count = lane, pos + record_bytes(size), lane.count + 1
        if self._drops:
            # A copy, because nobody waits for the end of the block.
            request.view = memoryview(segment.map[body : body + size])  # R2
            if self._lapped(lane, lane.pos):
                return self._borrow(request)
        else:
            if self._exporter is None:
                self._exporter = Exporter(segment.map)
            request.exporter = self._exporter
            request.view = self._exporter.view(body, body + size).toreadonly()
        self._borrowed = request
        self._last = lane.number
        return request.view

    def _return(self, borrowed: Borrow) -> None:
        """Doing it again, because an exception came in between, is harmless."""
        if self._borrowed is not borrowed:
            return
        if not borrowed.released():
            raise BufferError(still_used(self._segment.name))
        if borrowed.given and borrowed.lane is not None:
            self._free(borrowed.lane, borrowed.pos, borrowed.count)
        elif borrowed.given:
            at = len(self._owed) - borrowed.behind  # what was given back meanwhile is in front of it
            if at >= 0 and self._owed[at] is borrowed.owed:
                self._owed = self._owed[:at] + self._owed[at + 1 :]
        self._borrowed = None
        assert self.parking is not None
        self.parking.wake()  # this handle's other threads, which waited for it

    def _read_owed(self, request: ReadOne) -> bytes | int:
        message = self._owed[0]
        if len(message) > request.room:
            raise BufferTooSmall(self._segment.name, len(message), request.room)
        if request.view is not None:
            request.view[: len(message)] = message
        self._take_owed(request, 1)
        return message if request.view is None else len(message)

    def _read_batch(self, request: ReadBatch) -> list[bytes] | None:
        segment, capacity, most = self._segment, self._segment.layout.capacity, request.most
        if self._owed:
            return self._take_owed(request, most)  # and no more: the rest may raise, and these be owed once more
        words, ring = segment.words, segment.map
        batch: list[bytes] = []
        request.taken = []  # of an earlier try there is at most padding
        for lane in reversed(self._look()):
            if not most:
                break
            self._check(lane, lane.pos)
            pos, end = lane.pos, lane.end
            messages: list[bytes] = []
            size = 0  # of the record at `pos`, if that was looked at on its own; -1 if it is damaged
            while pos != end and most:
                at = lane.first + pos % capacity
                stop, limit = at + BURST, min(at + end - pos, lane.top)
                if self._drops:
                    # Writers wait for nobody: copied as it is first, which takes a hundredth of the time.
                    records = ring[at : min(max(stop, at + record_bytes(size)), limit)]  # R2
                    if self._lapped(lane, pos):
                        break
                    nbytes = len(records)
                    several, nbytes = split_mixed(memoryview(records).cast("Q"), records, 0, nbytes, nbytes, most)
                else:
                    several, nbytes = split_mixed(words, ring, at, stop, limit, most)  # R2
                if several:
                    messages += several
                    most -= len(several)
                    pos += nbytes
                    continue
                start = pos
                pos, size = self._record(lane, pos)  # after padding, or one that is longer than a burst, or damaged
                if self._drops and self._lapped(lane, start):
                    pos, size = start, 0  # it was looked at too late
                    break
                if size < 0:
                    break
            if self._drops and self._lapped(lane, pos) and not batch and not messages:
                return self._read_batch(request)
            if size < 0 and not batch and not messages:
                raise self._bad_length(lane, pos)  # only once everything whole has been handed over
            batch += messages
            request.taken.append((lane, pos, messages))
        nbytes = 0
        for lane, pos, messages in request.taken:
            nbytes += pos - lane.pos
            self._last = lane.number
            self._free(lane, pos, lane.count + len(messages))
        if nbytes > _kept:
            _keep_memory(nbytes)
        return batch or None

    def _serve(self, request: Any) -> Any:
        """Requests that are not for one message as it comes."""
        kind = type(request)
        if kind is Borrow and request.ends:
            return self._return(request)
        if self._borrowed is not None and kind is not GiveBack and self._is_borrowed():
            return None
        if kind is Borrow:
            return self._borrow(request)
        if kind is ReadBatch:
            return self._read_batch(request)
        if kind is ReadOne:
            return self._read_one(request)
        assert kind is GiveBack
        self._owed = request.messages + self._owed  # they were taken before those
        self._make_good()
        return None

    def _steps(self) -> Generator[Any, Any, None]:
        segment, capacity = self._segment, self._segment.layout.capacity
        words, ring, order = segment.words, segment.map, self._order
        another_used = segment.layout.used_offset + 1  # a byte that stays zero where there is one lane
        none = lane = Lane(segment.layout, 0)
        drops = self._drops
        turns: list[Lane] = []
        answer: list[Any] = []
        alone = False  # there is one lane in use, and it is `lane`: no need to go round
        # Of the lane that is being read: its words, and how far it is read, published and handed over.
        write_pos = read_pos = messages_out = parked = 0
        pos = end = given = count = base = last = 0
        limit = 0  # where the records end that are published in this lap, once that was checked
        size, step = -1, 0  # of the last record
        unpack: Any = None  # what takes one of that size out, once a second one is there
        message = yield
        try:
            if self.parking is None:
                self._claim()
            self._make_good()
            fence = self._fence
            for known in self._lanes:
                known.pos, known.count = words[known.read_pos], words[known.messages_out] & WORD >> 1
            while True:
                if message is not None:
                    if lane is not none:
                        lane.pos, lane.count = pos, count
                        lane, pos, alone = none, end, False
                    turns = []
                    answer.append(self._serve(message))
                    message = None  # the caller's buffer is not ours to hold meanwhile, nor is the answer
                    message = yield answer.pop()
                    continue
                if pos == end:
                    if alone:
                        end, limit = words[write_pos], 0  # R1
                        if pos == end and self.looks:
                            looks, self.looks = self.looks, ()
                            for _ in looks:
                                end = words[write_pos]  # R1
                                if pos != end:
                                    break
                        if order:
                            order()  # ORDER R1 before R2, as in _look
                        if ring[another_used]:
                            alone = False
                        elif pos == end:
                            lane.pos, lane.count = pos, count
                            message = yield None
                            continue
                    if not alone:
                        lane.pos, lane.count = pos, count
                        lane, pos = none, end
                        if self._borrowed is not None and self._is_borrowed():
                            message = yield None
                            continue
                        if self._owed:
                            message, self._owed = self._owed[0], self._owed[1:]
                            message = yield message
                            continue
                        if not turns:
                            turns = self._look()
                            if not turns:
                                message = yield None
                                continue
                        lane = turns.pop()
                        self._last = lane.number
                        alone = len(self._lanes) == 1
                        pos = given = lane.pos
                        end, limit, count = lane.end, 0, lane.count
                        write_pos, read_pos, messages_out, parked = (
                            lane.write_pos, lane.read_pos, lane.messages_out, lane.parked << 3
                        )  # fmt: skip
                        base = pos - pos % capacity - lane.first  # the position of the segment's byte 0 in this lap
                        last = lane.top - step  # up to here a record like the last one fits
                at = pos - base
                if end - pos == step:
                    following = end
                elif size > PACKED and step < end - pos <= capacity:
                    following = pos + step
                else:
                    following = 0
                if following and at <= last:
                    # One more like the last one, and that is all there is, or it is too long for bursts: the way of a
                    # message that is awaited, written out for its latency. What is no such record is looked at below.
                    if unpack is None:
                        unpack = record_of(size)
                    length, message = unpack(ring, at)  # R2
                    if length == size and not (drops and self._lapped(lane, pos)):
                        if order:
                            order()  # ORDER R2 before R3, as in _free
                        words[read_pos] = pos = following  # R3
                        words[messages_out] = count = count + 1
                        if fence:
                            fence()  # R4
                        if ring[parked]:  # R5
                            self._ring(lane, pos)
                        given = pos
                        message = yield message
                        continue
                    message = None
                if drops and end - pos > capacity and self._pass_over(lane, pos, count):
                    lane, pos, turns, alone = none, end, [], False
                    continue
                start = pos
                if not limit:
                    lane.end = end
                    self._check(lane, pos)
                    limit = min(lane.top, end - base)
                found = PADDING if at >= limit else words[at >> 3]
                after = at + RECORD_HEADER + (found + 7 & ~7)
                if after > limit:
                    # Padding, or damage, or what may have been written over meanwhile.
                    pos, found = self._record(lane, pos)
                    if drops and self._pass_over(lane, start, count):
                        lane, pos, turns, alone = none, end, [], False
                        continue
                    if found < 0:
                        raise self._bad_length(lane, pos)
                    if pos == end:
                        given = pos
                        self._free(lane, pos, count)  # nothing but padding
                        size, step = -1, 0  # what comes next is not like the last one
                        continue
                    base = pos - pos % capacity - lane.first
                    at, limit = pos - base, min(lane.top, end - base)
                    after = at + record_bytes(found)
                if found != size:
                    size, step, unpack = found, after - at, None
                last = lane.top - step
                stop, fourth = min(limit, at + BURST), at + 3 * step  # as in split_mixed; one by one takes longer here
                if fourth < stop and words[after >> 3] == size == words[fourth >> 3]:
                    run = run_of(words, at, size, (stop - at) // step)
                    burst: Sequence[bytes] = split_run(ring, at, run, size)  # R2
                else:
                    burst = (ring[at + RECORD_HEADER : at + RECORD_HEADER + size],)  # R2
                if drops and self._pass_over(lane, start, count):
                    lane, pos, turns, alone = none, end, [], False
                    continue
                for message in burst:
                    if order:
                        order()  # ORDER R2 before R3, as in _free
                    words[read_pos] = pos = pos + step  # R3
                    words[messages_out] = count = count + 1
                    if fence:
                        fence()  # R4
                    if ring[parked] and (pos >= lane.held or words[lane.parked] != lane.seen):  # R5
                        self._ring(lane, pos)
                    given = pos
                    message = yield message
                    if message is not None:
                        break
        except MessagesLost:
            self._untold = None
            raise
        except (GeneratorExit, BufferTooSmall, RingBusy):
            raise
        except BaseException:
            if lane is not none and words[lane.read_pos] != given and type(message) is bytes:
                self._owed = [*self._owed, message]  # out of the ring, but not handed over
            if isinstance(message, ReadRequest):
                message.settle(words, self._owed)
            # It may have come between R3 and R5. If another one comes here, the next operation does C1.
            if self.parking is not None:
                self._make_good()
                if drops:
                    self._recount()
            raise
