"""The writing side of a handle: W1 to W5, and D1 where writers do not wait."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from . import _layout
from ._errors import MessageTooLarge, RingBusy, RingCorrupted
from ._lanes import BURST, JOINED, PACKED, count_records, find_mark, join_run, packer
from ._layout import MARKS, PADDING, RECORD_HEADER, place, record_bytes, round_up
from ._monitor import Monitor
from ._parking import Parking, ReaderBells
from ._reading import Reader
from ._requests import RESERVED, Exporter, Gather, Reserve, WriteBatch, WriteRequest, still_used
from ._words import POSITIONS, WORD, Fence, Segment, can_be


class Writer:
    """The writing side of a handle: a lane of its own, claimed at the first request.

    Requests to `monitor`: a message (bytes, or a flat memoryview of bytes), or a `WriteRequest`. Answers:
    None when all of it is done, or the read_pos that is wanted for more room, an int (maybe `RESERVED`).
    """

    def __init__(self, segment: Segment, reader: Reader | None = None) -> None:
        """`reader` is the same handle's, whose claim is no other handle's."""
        self._segment = segment
        self._reader = reader
        self._lane = -1  # also while a claim is tried: an exception right after it must not lose it
        self._bells = ReaderBells(segment)
        self._asleep, self._asleep_at = self._bells.asleep()
        self._gone = [0] * segment.layout.slots  # `joined` of each reader that was found dead
        self._marked = -1  # the last part of the lane that has its mark
        # Of the claimed lane: where its bytes begin, and the indices of its words.
        self._first = self._write_pos = self._messages_in = self._read_pos = 0
        self._exporter: Exporter | None = None  # from the first message in place on
        self._known = self._free = 0  # from here to there messages in place may go without another look
        self._reserved: Reserve | None = None  # nothing else is written meanwhile
        self._fence: Fence = None
        self._order = segment.order_fence()
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps)

    @property
    def lane(self) -> int:
        """The lane claimed, -1 if none is."""
        return self._lane if self.parking is not None else -1

    @property
    def read_pos(self) -> int:
        """How far the reader, or the slowest, has come in the claimed lane, in bytes."""
        if self._segment.layout.broadcast:
            return self._slowest(self._lane, self.write_pos)
        return self._segment.words[self._read_pos]

    @property
    def write_pos(self) -> int:
        """How far the claimed lane is written, in bytes."""
        return self._segment.words[self._write_pos]

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        self.monitor.refuse_reentry()
        if self.parking is not None:
            self.parking.refuse_reentry()

    def nothing(self, wanted: int) -> bool:
        """Is there still no room? For S4, which looks from outside the monitor; in doubt it says no."""
        return self._reserved is not None if wanted == RESERVED else self.read_pos < wanted

    def close(self) -> Any:
        """Wait until no thread is inside, end it, and give the lane back.

        Returns:
            What goes once nothing may write any more, so that the lane is kept until then. None if nothing may.
        """
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        reserved, self._reserved = self._reserved, None
        if reserved is not None and not reserved.released():
            return reserved.remains()
        if self._lane >= 0:
            self._segment.release(_layout.LANE + self._lane)
        return None

    def _claim(self) -> None:
        """Take the emptiest free lane, rather one that has its memory."""
        segment, layout = self._segment, self._segment.layout
        ranked = []
        for lane in range(layout.writers):
            read_pos, write_pos = self._positions(lane)
            ranked.append((lane != self._lane, write_pos - read_pos, write_pos == 0, lane))
        damaged = 0
        failure: OSError | None = None
        for _, _, _, lane in sorted(ranked):
            self._lane = lane
            if not segment.claim(_layout.LANE + lane):
                continue
            # Only now do they stand still enough to be judged. read_pos first: it may still grow.
            read_pos, write_pos = self._positions(lane)
            if not can_be(read_pos, write_pos, layout.capacity):
                damaged += 1
            else:
                try:
                    # Memory first: without any the first store would be a crash, this is ENOSPC.
                    (segment.back if write_pos else segment.reserve)(layout.lane_bytes(lane), layout.capacity)
                    break
                except OSError as error:
                    failure = error
            segment.release(_layout.LANE + lane)
        else:
            self._lane = -1
            if failure is not None:
                raise failure
            if damaged:
                raise RingCorrupted(
                    f"ring {segment.name!r}: {damaged} of its {layout.writers} lanes are damaged, the others are taken"
                )
            raise RingBusy(
                f"ring {segment.name!r}: each of its {layout.writers} lanes has a living writer; "
                f"close one, or create the ring with a larger writers= (it was writers={layout.writers})"
            )
        self._fence = segment.waker_fence()
        # Before the first W3, and from lane 0 on: the reader looks for the first 0 here, and no further.
        for number in range(lane + 1):
            segment.map[layout.used_offset + number] = 1
        block = layout.lane_block(lane)
        self._first = layout.lane_bytes(lane)
        self._write_pos, self._messages_in = (block + _layout.WRITE_POS) >> 3, (block + _layout.MESSAGES_IN) >> 3
        self._read_pos = (layout.cursor(lane) + _layout.READ_POS) >> 3
        self.parking = Parking(
            segment,
            block + _layout.WRITER_PARKED,
            block + _layout.WRITER_PARKS,
            block + _layout.WRITER_BELL,
            block + _layout.WRITER_WANTED,
        )

    def _positions(self, lane: int) -> tuple[int, int]:
        """The read_pos and then the write_pos of any lane."""
        words, layout = self._segment.words, self._segment.layout
        write_pos = (layout.lane_block(lane) + _layout.WRITE_POS) >> 3
        if layout.broadcast:
            pos = words[write_pos]
            return self._slowest(lane, pos), pos
        read_pos = words[(layout.cursor(lane) + _layout.READ_POS) >> 3]
        return read_pos, words[write_pos]

    @property
    def is_mute(self) -> bool:
        """Was there no descriptor left for a doorbell? Then it is to be rung with what comes next, be it a wait."""
        return self._bells.are_mute

    def _slowest(self, lane: int, pos: int) -> int:
        """Of a broadcast ring: how far its slowest reader has come in a lane that is written to `pos`."""
        words, layout = self._segment.words, self._segment.layout
        slowest = pos  # with nobody there, nobody misses anything
        if not layout.drop:
            for slot, gone in enumerate(self._gone):
                joined = words[(layout.reader_block(slot) + _layout.JOINED) >> 3]
                if joined & 1 and joined != gone:
                    if self._order:
                        self._order()  # ORDER joined before read_pos, as they were stored
                    read_pos = words[(layout.cursor(lane, slot) + _layout.READ_POS) >> 3]
                    slowest = min(slowest, read_pos)
        # One that takes a dead one's place has that one's read_pos for a moment.
        return max(slowest, pos - layout.capacity)

    def _bury(self) -> bool:
        """Find out which readers have died, to wait for them no more. Was there one?"""
        words, layout = self._segment.words, self._segment.layout
        found = False
        for slot in range(layout.slots):
            joined = words[(layout.reader_block(slot) + _layout.JOINED) >> 3]
            ours = self._reader is not None and (self._reader.slot, self._reader.joined | 2) == (slot, joined | 2)
            if joined & 1 and joined != self._gone[slot] and not ours:
                # It joined with the claim in hand, and gives it up after it has left.
                if not self._segment.is_claimed(_layout.READER + slot):
                    # Or our descriptor was closed behind our back: this says so, in an OSError.
                    self._segment.claim(_layout.LANE + self._lane)
                    self._gone[slot] = joined
                    found = True
        return found

    def _make_good(self) -> None:
        """C1: the writer before, or this one before an exception, may have ended between W3 and W5."""
        if self._fence:
            self._fence()  # the doorbell's state is looked at after what was published
        layout = self._segment.layout
        for slot in range(layout.slots):
            self._segment.ring(layout.reader_block(slot) + _layout.READER_BELL)

    def _publish(self, pos: int, messages: int) -> None:
        """W3 to W5: all before `pos` may be read, `messages` more than before."""
        words = self._segment.words
        if self._order:
            self._order()  # ORDER W2 before W3, else the reader copies what was never written
        words[self._write_pos] = self._known = pos  # W3
        words[self._messages_in] = words[self._messages_in] + messages & WORD
        if self._fence:
            self._fence()  # W4
        if self._asleep[self._asleep_at]:  # W5
            self._bells.ring()

    def _room(self, pos: int, step: int) -> tuple[int, int, int]:
        """Look for room at `pos` for a record of `step` bytes, after padding where the lane ends.

        Returns:
            Where the record goes; up to where this lap is free; 0, or the read_pos that is wanted.
        """
        segment, capacity = self._segment, self._segment.layout.capacity
        if self._reserved is not None:
            if not self._reserved.is_over(segment.name):
                return pos, pos, RESERVED
            self._reserved = None
        if segment.layout.drop:
            return self._give_up(pos, step)
        read_pos = self.read_pos  # W1, STALE OK: too small only makes us wait once more
        if self._order:
            self._order()  # ORDER W1 before W2, else we write over what is still being copied
        if not can_be(read_pos, pos, capacity):
            raise RingCorrupted(
                f"ring {segment.name!r}: lane {self._lane} was written to {pos:,} and read to {read_pos:,}, "
                f"which a capacity of {capacity:,} does not allow"
            )
        padding, wanted = place(pos, read_pos, step, capacity)
        if wanted:
            if segment.layout.broadcast and self._bury():
                return self._room(pos, step)
            if self.is_mute:
                self._bells.ring()
        if padding:
            segment.words[(self._first + pos % capacity) >> 3] = PADDING  # W2
            pos += padding
            self._publish(pos, 0)
        self._known, self._free = pos, min(read_pos + capacity, pos - pos % capacity + capacity)
        return pos, self._free, wanted

    def _give_up(self, pos: int, step: int) -> tuple[int, int, int]:
        """`_room` where writers do not wait: what was written a lane's length before is no more.

        It leaves `_free` alone: of what may go here less may be published, and then the next part begin there.
        """
        capacity, part = self._segment.layout.capacity, self._segment.layout.part
        given_up = self._segment.words[(self._segment.layout.lane_block(self._lane) + _layout.GIVEN_UP) >> 3]
        unmarked = pos // part - self._marked  # a message takes less than a lane, so there are never many
        if not pos <= given_up <= pos + capacity or pos & 7 or pos >= POSITIONS or unmarked > 2 * MARKS:
            raise RingCorrupted(
                f"ring {self._segment.name!r}: lane {self._lane} was written to {pos:,} and given up to {given_up:,}, "
                f"with its last mark in part {self._marked:,}, which a capacity of {capacity:,} does not allow"
            )
        tail = capacity - pos % capacity
        if step > tail:
            self._announce(pos, tail)
            self._segment.words[(self._first + pos % capacity) >> 3] = PADDING  # W2
            pos += tail
            self._publish(pos, 0)
        self._announce(pos, step)
        # Who begins in another part comes here again: for its mark.
        return pos, max(pos + step, round_up(pos + 1, part)), 0

    def _announce(self, pos: int, nbytes: int) -> None:
        """Before so many bytes at `pos` are written: give up what was there, and mark the part that begins here."""
        words, layout, order = self._segment.words, self._segment.layout, self._order
        given_up = (layout.lane_block(self._lane) + _layout.GIVEN_UP) >> 3
        until = round_up(pos + nbytes, layout.part)
        if words[given_up] < until:
            words[given_up] = until  # D1
            if order:
                order()  # ORDER D1 before W2 and the marks, else a reader takes what is new for what was there
        number = pos // layout.part
        while self._marked < number:
            mark = (layout.marks(self._lane) + (self._marked + 1) % MARKS * _layout.MARK_BYTES) >> 3
            words[mark + (_layout.MARK_COUNT >> 3)] = words[self._messages_in]
            if order:
                order()  # ORDER mark_count before mark_pos, by which a reader knows the mark
            words[mark + (_layout.MARK_POS >> 3)] = pos
            self._marked += 1

    def _take_up_marks(self) -> None:
        """Go on where the lane's last writer ended, wherever that was: with its marks, and with an exact count."""
        words, layout = self._segment.words, self._segment.layout
        pos = words[self._write_pos]
        self._marked, mark_pos, count = find_mark(words, layout, self._lane, pos)
        more = count_records(words, layout, self._lane, mark_pos, pos)
        if self._marked < 0 or more < 0 or count + more >= POSITIONS:
            raise RingCorrupted(f"ring {self._segment.name!r}: lane {self._lane} has no mark before {pos:,}")
        words[self._messages_in] = count + more

    def _gather(self, request: Any) -> int | None:
        assert type(request) is Gather
        pos, _, wanted = self._room(self._segment.words[self._write_pos], record_bytes(request.size))
        if wanted:
            return wanted
        at = self._first + pos % self._segment.layout.capacity
        self._segment.words[at >> 3] = request.size  # W2
        at += RECORD_HEADER
        for buffer in request.buffers:
            self._segment.map[at : at + len(buffer)] = buffer  # W2
            at += len(buffer)
        self._publish(pos + record_bytes(request.size), 1)
        return None

    def _write_batch(self, batch: WriteBatch) -> int | None:
        segment, messages, size = self._segment, batch.messages, batch.size
        first, capacity = self._first, segment.layout.capacity
        done, count = batch.done, len(messages)
        step = record_bytes(size) if size >= 0 else 0
        pos = free = segment.words[self._write_pos]  # no room, until it is looked for
        # The last look will do if it found enough for all of a burst: else damage would be found in its midst.
        if step and pos == self._known and self._reserved is None and count * step <= min(self._free - pos, BURST):
            free = self._free
        while done < count:
            if size < 0:
                step = record_bytes(len(messages[done]))
            if pos == free:
                pos, free, wanted = self._room(pos, step)
                if wanted:
                    return wanted
            at = first + pos % capacity
            stop = at + min(free - pos, max(BURST, step))
            if 0 <= size <= JOINED:
                run = messages[done : done + (stop - at) // step]
                records, taken = join_run(run, size), len(run)
                nbytes = len(records)
                segment.map[at : at + nbytes] = records  # W2
            else:
                taken, nbytes = self._store(messages, done, at, stop)
            pos = free = pos + nbytes
            self._publish(pos, taken)
            batch.done = done = done + taken
        return None

    def _store(self, messages: list[Any], first: int, at: int, stop: int) -> tuple[int, int]:
        """Store ``messages[first:]`` from one place in the segment to another, as many as fit.

        One by one: to join them takes longer where they have several sizes, or are long.

        Returns:
            How many, and how many bytes these take.
        """
        words, ring = self._segment.words, self._segment.map
        number, start = first, at
        while number < len(messages):
            message = messages[number]
            size = len(message)
            after = at + RECORD_HEADER + (size + 7 & ~7)  # as in split_mixed
            if after > stop:
                break
            words[at >> 3] = size  # W2
            ring[at + RECORD_HEADER : at + RECORD_HEADER + size] = message  # W2
            number += 1
            at = after
        return number - first, at - start

    def _steps(self) -> Generator[Any, Any, None]:
        segment = self._segment
        layout, words, ring, order = segment.layout, segment.words, segment.map, self._order
        capacity, max_message = layout.capacity, layout.max_message
        sleepers, asleep = self._asleep, self._asleep_at
        data = yield
        try:
            if self.parking is None:
                self._claim()
            assert self.parking is not None
            if layout.drop:
                self._take_up_marks()
            self._make_good()
            fence = self._fence
            write_pos, messages_in, first = self._write_pos, self._messages_in, self._first
            while True:
                if type(data) is Reserve:
                    # Written out, because little but this is a message's time that is written in place.
                    wanted = 0
                    if not data.ends:
                        pos, size = words[write_pos], data.size
                        after = pos + RECORD_HEADER + size
                        if after > self._free or pos != self._known or self._reserved is not None:
                            pos, _, wanted = self._room(pos, record_bytes(size))
                        if not wanted:
                            at = first + pos % capacity
                            data.pos, data.at = pos, at
                            if self._exporter is None:
                                self._exporter = Exporter(ring)
                            data.exporter = self._exporter
                            data.view = data.exporter.view(at + RECORD_HEADER, at + RECORD_HEADER + size)
                            self._reserved = data
                    elif self._reserved is data:
                        if not data.released():
                            raise BufferError(still_used(segment.name))
                        if data.commit is not None:
                            words[data.at >> 3] = data.commit  # W2 is this, and what the caller did to the view
                            self._publish(data.pos + record_bytes(data.commit), 1)
                        self._reserved = None
                        self.parking.wake()  # this handle's other threads, which waited for it
                    data = None
                    data = yield wanted or None
                    continue
                if isinstance(data, WriteRequest):
                    answer = self._write_batch(data) if type(data) is WriteBatch else self._gather(data)
                    data = None
                    data = yield answer
                    continue
                pos, count = words[write_pos], words[messages_in] & WORD >> 1
                at = stop = first + pos % capacity  # records go from here to there: no room until looked for
                base = pos - at  # the position that the segment's byte 0 would have in this lap
                size = -1
                while True:
                    if len(data) != size:
                        if isinstance(data, WriteRequest):
                            break
                        if len(data) > max_message:
                            raise MessageTooLarge(segment.name, len(data), max_message)
                        size = len(data)
                        step = record_bytes(size)
                        pack = packer(size) if size <= PACKED else None
                    end = at + step
                    if end > stop:
                        pos, free, wanted = self._room(base + at, step)
                        at = first + pos % capacity
                        base = pos - at
                        stop = free - base
                        if wanted:
                            data = None  # the caller's buffer is not ours to hold meanwhile
                            data = yield wanted
                            continue
                        end = at + step
                    if pack is not None:
                        pack(ring, at, size, data)  # W2
                    else:
                        words[at >> 3] = size
                        ring[at + RECORD_HEADER : at + RECORD_HEADER + size] = data  # W2
                    if order:
                        order()  # ORDER W2 before W3, as in _publish
                    words[write_pos] = base + end  # W3
                    at = end
                    words[messages_in] = count = count + 1
                    if fence:
                        fence()  # W4
                    if sleepers[asleep]:  # W5
                        self._bells.ring()
                    data = None
                    data = yield None
        except (GeneratorExit, MessageTooLarge, RingBusy):
            raise
        except BaseException:
            # It may have come between W3 and W5. If another one comes here, the next operation does C1.
            if self.parking is not None:
                self._make_good()
            raise
