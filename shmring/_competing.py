"""The reading side of a handle whose ring is a work queue: T1 to T7, and X1 to X6."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from typing import Any, Final

from . import _layout
from ._errors import RingBusy
from ._lanes import PACKED, Lane, run_of, split_mixed, split_run
from ._layout import RECORD_HEADER, record_bytes
from ._parking import ReaderBells
from ._reading import Reader
from ._requests import PROBE, Borrow, GiveBack, ReadRequest
from ._words import POSITIONS, WORD, Segment, can_be

PATIENCE: Final = 200  # times that a competing reader leaves the turn to another one, one after another
IDLE: Final = 10  # of these, each time that the other one has not taken anything meanwhile
AHEAD: Final = 64  # messages that a competing reader copies before it knows whether it gets them
AHEAD_BYTES: Final = 16384  # that these take at most, where they are several
NOWHERE: Final = WORD + 1  # no lane comes to it, however damaged
HAS: Final = 1  # in `turn`: who wanted it has it


class CompetingReader(Reader):
    """One of several readers that share a cursor on every lane, and take by turns; T1 to T6, X1 to X6.

    What it knows of a lane may be old when it takes again: read_pos tells, which is loaded each time.
    """

    def __init__(self, segment: Segment) -> None:
        layout = segment.layout
        self._turn = (layout.turn_offset + _layout.TURN) >> 3
        self._before = (layout.turn_offset + _layout.TURN_BEFORE) >> 3
        self._inside = -1
        self._ours = 0  # `turn` when it is ours
        self._refused = 0  # how often, one time after another, and without trying hard
        self._bells = ReaderBells(segment)
        self._asleep, self._asleep_at = self._bells.asleep()
        super().__init__(segment)

    def _join(self) -> None:
        layout, words = self._segment.layout, self._segment.words
        block = layout.reader_block(self.slot)
        self._inside = (block + _layout.INSIDE) >> 3
        words[self._inside] = 0
        self._bells.ours = (block + _layout.READER_PARKED) >> 3
        self.joined = words[(block + _layout.JOINED) >> 3] % (POSITIONS // _layout.MAX_COMPETING // 2) + 1
        words[(block + _layout.JOINED) >> 3] = self.joined
        self._ours = (self.joined * _layout.MAX_COMPETING + self.slot) << 1 | HAS

    def _can_take(self) -> bool:
        """Is there something, and our turn to be had?"""
        self._refused = PATIENCE  # who falls asleep has had it: the message that it is rung for is its own to take
        if not self._is_left():
            return False
        if self.monitor.enter(PROBE):
            return True
        self._refuse_reentry()
        return False

    def _refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside by another handle, further up its stack, and waits for itself."""
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code is CompetingReader._steps.__code__:
                reader = frame.f_locals["self"]
                if reader is not self and reader._segment.layout.nonce == self._segment.layout.nonce:
                    name = self._segment.name
                    raise RuntimeError(f"this thread is inside a read of ring {name!r} already, by another handle")
            frame = frame.f_back

    @property
    def was_refused(self) -> bool:  # type: ignore[override]
        """As for other readers."""
        return 0 < self._refused < PATIENCE

    def _is_left(self) -> bool:
        """Is there a message in a lane, or a lane that is not known yet? Whosever turn it is."""
        return self._another_used() or any(map(self._holds, self._lanes))

    def _holds(self, lane: Lane) -> bool:
        """Is there a message in this lane, as far as can be told from outside of a turn?"""
        words = self._segment.words
        return words[lane.read_pos] != words[lane.write_pos] and not lane.damage

    def pass_on(self) -> None:
        """T6, for who leaves a wait without a message, and may have been rung for one."""
        if self.parking is not None:
            self._segment.sleeper_fence()  # a waker that saw us asleep had published before; have it arrive
            if self._is_left():
                self._bells.ring()

    def _leave(self) -> None:
        self.pass_on()

    def _take(self) -> bool:
        """T1 to T3: is it our turn, or can it be? Then we are inside."""
        words = self._segment.words
        while words[self._turn] == self._ours or self._take_over():
            words[self._inside] = 1  # T1
            if self._fence:
                self._fence()  # T2
            if words[self._turn] == self._ours:  # T3
                if self._order:
                    self._order()  # ORDER T3 before R1
                self._refused = 0
                return True
            words[self._inside] = 0
        return False

    def _take_over(self) -> bool:
        """X1 to X6: have the turn, unless somebody is inside, or takes it over as well."""
        segment, words = self._segment, self._segment.words
        self._refused = 0
        while segment.claim(_layout.TURN_CLAIM):  # X1
            try:
                if words[self._turn] & HAS:
                    words[self._before] = words[self._turn]  # X2
                    if self._order:
                        self._order()  # ORDER turn_before before turn
                words[self._turn] = self._ours & ~HAS  # X2
                if not segment.sleeper_fence():  # X3
                    time.sleep(0.01)  # nobody can make the others fence: what they have stored has arrived after that
                before = words[self._before]
                if not self._is_inside(before):  # X4
                    if self._order:
                        self._order()  # ORDER X4 before R1
                    words[self._turn] = self._ours  # X4
                    return True
            finally:
                segment.release(_layout.TURN_CLAIM)  # X5
            if self._is_inside(before):  # X6
                break
        return False

    def _is_inside(self, turn: int) -> bool:
        """Is the reader whose turn this was inside, as far as can be told, and alive?"""
        segment, layout, words = self._segment, self._segment.layout, self._segment.words
        joined, slot = divmod(turn >> 1, _layout.MAX_COMPETING)
        if slot >= layout.slots or slot == self.slot:
            return False
        block = layout.reader_block(slot)
        if words[(block + _layout.INSIDE) >> 3] == 0 or words[(block + _layout.JOINED) >> 3] != joined:
            return False
        return segment.is_claimed(_layout.READER + slot)

    def _give(self) -> None:
        """T4 to T6."""
        if self._order:
            self._order()  # ORDER R3 before T4
        self._segment.words[self._inside] = 0  # T4
        if self._fence:
            self._fence()  # T5
        if self._asleep[self._asleep_at] and self._is_left():  # T6
            self._bells.ring()

    def _end_turn(self) -> None:
        """Have neither the turn nor the claim to it, if an exception has left us one of them."""
        if self._order:
            self._order()  # ORDER R3 before T4
        self._segment.words[self._inside] = 0  # T4
        self._segment.release(_layout.TURN_CLAIM)  # X5

    def _candidates(self) -> list[Lane]:
        """The lanes that seem to have something, the first to be served at the end."""
        self._take_up_lanes()
        found = list(filter(self._holds, self._lanes))
        if len(found) > 1:
            self._take_turns(found)
        return found

    def _copy_ahead(self, lane: Lane, most: int) -> tuple[int, Sequence[bytes], int]:
        """R2 before T1, so that a turn is short: copy up to so many messages that may come to be ours.

        What is taken of them is what read_pos then says: as long as it does not go beyond a message's position, nothing
        was written over that record, so it was whole when it was copied. What others take in the meantime may be torn.

        Returns:
            The position of the first, the messages, and the bytes that each takes, or 0 if these are not the same.
            No message where there is something else, or nothing: `_look_inside` tells.
        """
        layout, words, ring = self._segment.layout, self._segment.words, self._segment.map
        pos = words[lane.read_pos]
        end = words[lane.write_pos]  # R1
        if self._order:
            self._order()  # ORDER R1 before R2
        if not lane.backed or pos == end or not can_be(pos, end, layout.capacity):
            return pos, (), 0
        at = lane.first + pos % layout.capacity
        limit = min(at + end - pos, lane.top)
        size = words[at >> 3]
        step = record_bytes(size)
        after = at + step
        messages: Sequence[bytes]
        if after > limit:
            return pos, (), 0
        if after == limit or size > PACKED or most == 1:
            messages = (ring[at + RECORD_HEADER : at + RECORD_HEADER + size],)  # R2
        else:
            limit = min(limit, at + AHEAD_BYTES)
            if words[after >> 3] == size:
                run = run_of(words, at, size, min(most, (limit - at) // step))
                messages = split_run(ring, at, run, size)  # R2
            else:
                messages, _ = split_mixed(words, ring, at, limit, limit, most)  # R2
                step = 0
        if self._order:
            self._order()  # ORDER R2 before read_pos, by which they are taken
        return pos, messages, step

    def _look_inside(self, lane: Lane) -> None:
        """What there is instead of a message, while nobody else takes: padding, which is consumed, or damage."""
        words = self._segment.words
        pos, lane.end = words[lane.read_pos], words[lane.write_pos]  # R1
        if self._order:
            self._order()  # ORDER R1 before R2
        if pos != lane.end:
            self._check(lane, pos)
            after, size = self._record(lane, pos)
            if size < 0:
                raise self._bad_length(lane, after)
            if after != pos:
                self._free(lane, after, words[lane.messages_out] & WORD >> 1)

    def _serve(self, request: Any) -> Any:
        """Requests that are not for one message as it comes. An exception leaves us inside, for who catches it."""
        if request is PROBE:
            if not self._take():
                return False
            self._give()  # somebody may have been refused in between
            return True
        if type(request) is GiveBack or type(request) is Borrow and request.ends:
            return super()._serve(request)
        if self._borrowed is not None and self._is_borrowed():
            return None
        if self._owed:
            return super()._serve(request)  # it needs nobody's turn
        if type(request) is Borrow:
            return None  # another thread has just left its message; asked again, there is one taken out
        if not self._is_left() or not self._take():
            return None
        words = self._segment.words
        for lane in self._lanes:
            lane.pos, lane.count = words[lane.read_pos], words[lane.messages_out] & WORD >> 1
            lane.end = lane.pos  # it is looked at anew: whether that is so, and whether it has memory
        answer = super()._serve(request)
        self._give()
        return answer

    def _steps(self) -> Generator[Any, Any, None]:
        words, ring, order = self._segment.words, self._segment.map, self._order
        sleepers, asleep, turn = self._asleep, self._asleep_at, self._turn
        lane = Lane(self._segment.layout, 0)
        turns: list[Lane] = []
        held = True  # maybe there is a message owed, or in place
        answer: list[Any] = []
        message: Any = None
        seen = -1  # how far the lane was read when it was another one's turn
        until = NOWHERE  # how far `lane` is read once `message` is out of it, and not handed over
        request = yield
        try:
            if self.parking is None:
                self._claim()
            self._refused = 0  # else `was_refused` would say so until there is something to be refused
            self._end_turn()  # an exception may have come while the last one was dealt with
            self._make_good()
            fence, inside, ours = self._fence, self._inside, self._ours
            while True:
                if request is not None:
                    # What is borrowed is taken out first: nobody can have a message in place while the others go on.
                    if type(request) is Borrow and not request.ends:
                        held = self._borrowed is not None and self._is_borrowed() or bool(self._owed)
                    else:
                        held = True
                    if held:
                        answer.append(self._serve(request))
                        request = None
                        held = bool(self._owed) or self._borrowed is not None
                        request = yield answer.pop()
                        continue
                elif held:
                    if self._borrowed is not None and self._is_borrowed():
                        request = yield None
                        continue
                    if self._owed:
                        message, self._owed = self._owed[0], self._owed[1:]
                        request = yield message
                        continue
                    held = False
                if not turns:
                    turns = self._candidates()
                    if not turns:
                        self._refused = 0  # there is nothing left that we could be refused
                        request = yield None
                        continue
                lane = turns[-1]
                if words[turn] != ours:  # a first look, which T3 repeats
                    if not self._holds(lane):
                        turns.pop()  # others were faster
                        continue
                    pos = words[lane.read_pos]
                    self._refused += 1 if pos != seen else IDLE
                    seen = pos
                    if request is None and self._refused < PATIENCE or not self._take():
                        request = yield None
                        continue
                most = AHEAD if request is None else 1
                pos, copies, step = self._copy_ahead(lane, most)
                if not copies:
                    if not self._take():
                        self._give()  # who had taken over was inside already, and another one may wait for that
                        turns.pop()
                        request = yield None
                        continue
                    self._look_inside(lane)
                    pos, copies, step = self._copy_ahead(lane, most)
                    if not copies:
                        turns.pop()
                        self._give()
                        continue
                read_pos, messages_out, parked = lane.read_pos, lane.messages_out, lane.parked << 3
                count = -1
                for message in copies:
                    words[inside] = 1  # T1
                    if fence:
                        fence()  # T2
                    mine = words[turn] == ours  # T3
                    if order:
                        order()  # ORDER T3 before R1
                    if not mine or words[read_pos] != pos:
                        self._give()  # others have taken it, or are about to
                        break
                    if count < 0:
                        count = words[messages_out] & WORD >> 1
                    until = pos + (step or record_bytes(len(message)))
                    words[read_pos] = pos = until  # R3
                    words[messages_out] = count = count + 1
                    if order:
                        order()  # ORDER R3 before T4
                    words[inside] = 0  # T4
                    if fence:
                        fence()  # T5, R4
                    if ring[parked] and (pos >= lane.held or words[lane.parked] != lane.seen):  # R5
                        self._ring(lane, pos)
                    if sleepers[asleep] and self._is_left():  # T6
                        self._bells.ring()
                    if request is not None:
                        self._owed, until, held = [message], NOWHERE, True
                        break
                    until = NOWHERE
                    request = yield message
                    if request is not None:
                        break
                if count >= 0:  # the others come next, however many were taken
                    turns.pop()
                    self._last = lane.number
        except (GeneratorExit, RingBusy):
            raise
        except BaseException:
            # While nobody else can be inside: if we were, then nobody else has moved read_pos.
            if type(message) is bytes and words[lane.read_pos] >= until and not self._owed:
                self._owed = [message]  # out of the ring, but not handed over; nothing is taken while there is one
            if isinstance(request, ReadRequest):
                request.settle(words, self._owed)
            # It may have come between T1 and T4, R3 and R5, or T4 and T6.
            if self.parking is not None:
                self._end_turn()
                self._make_good()
                self.pass_on()
            raise
