"""Looking at a ring without a part in it: all of it is seen, nothing is taken, and nothing torn is shown."""

from __future__ import annotations

import random
import struct

import pytest
from fakes import FakeSegment, ask, batch, hooks_end

from shmring import RingCorrupted, _layout
from shmring._layout import record_bytes
from shmring._looking import lanes_used, peek, survey
from shmring._reading import Reader
from shmring._requests import ReadBatch
from shmring._writing import Writer

__all__ = ["hooks_end"]


def numbered(number):
    """A message that shows if it is torn or another one, and looks like records: a length of 8, and its number."""
    return struct.pack("=QQ", 8, number) * (number * 5 % 19) + bytes(number * 3 % 8)


class Lane:
    """A ring of one lane with its writer, its reader and who looks, each with a handle of its own."""

    def __init__(self, order=False):
        self.writing = FakeSegment(writers=1)
        self.reading = FakeSegment(peer=self.writing)
        self.looking = FakeSegment(peer=self.writing, order=order)
        self.writer, self.reader = Writer(self.writing), Reader(self.reading)
        self.count = 0  # messages ever written
        self.begins = [0]  # where each of them begins, and the next one will
        self.numbers = {0: 0}  # of the message that comes next, by position; there are two where there is padding

    def write(self, most=1000):
        """As many of the next messages as there is room for, at most so many; whole lanes of them."""
        for _ in range(most):
            if ask(self.writer, numbered(self.count)) is not None:
                return
            end = self.writing.peek("write_pos")
            self.begins[-1] = end - record_bytes(len(numbered(self.count)))  # after padding, if there was any
            self.numbers[self.begins[-1]] = self.count
            self.count += 1
            self.numbers[end] = self.count
            self.begins.append(end)

    def take(self, count):
        if count:
            ask(self.reader, ReadBatch(count))

    def look(self, pos):
        return peek(self.looking, 0, pos)

    def check(self, seen, pos):
        """These are consecutive messages up to where to go on, and what was missed are all before them."""
        first = self.numbers[seen.pos] - len(seen.messages)
        assert seen.messages == [numbered(first + number) for number in range(len(seen.messages))]
        assert first == self.numbers[pos + seen.missed] >= self.numbers[pos]


@pytest.mark.parametrize("order", [False, True])
def test_all_that_is_there_is_seen_in_its_order_and_nothing_is_taken_or_stored(order):
    lane = Lane(order)
    for _ in range(10):
        lane.write()
        waiting = lane.count - lane.reading.peek("messages_out")
        before = bytes(memoryview(lane.looking.map))
        pos = lane.reading.peek("read_pos")
        seen = lane.look(pos)
        assert seen.messages == [numbered(lane.count - waiting + number) for number in range(waiting)]
        assert seen.pos == lane.writing.peek("write_pos") and seen.missed == 0
        assert lane.look(seen.pos) == ([], seen.pos, 0, lane.count - waiting)
        assert bytes(memoryview(lane.looking.map)) == before
        lane.take(random.randrange(1, waiting + 1))
    assert all(event.startswith(("load", "order")) for event in lane.looking.log)


def test_a_look_goes_on_where_the_one_before_has_ended_and_tells_what_it_missed():
    lane = Lane()
    lane.write(3)
    seen = lane.look(0)
    assert seen.messages == [numbered(number) for number in range(3)]
    lane.write(4)
    lane.take(5)
    assert lane.look(seen.pos) == ([numbered(5), numbered(6)], lane.begins[7], lane.begins[5] - lane.begins[3], 5)
    lane.take(2)
    assert lane.look(lane.begins[7]) == ([], lane.begins[7], 0, 7)


def test_loads_are_kept_in_order_where_the_machine_does_not():
    """R1 before R2: write_pos, then read_pos, then the records; and read_pos again after all of them."""
    lane = Lane(order=True)
    lane.write(2)
    lane.look(0)
    log = lane.looking.log
    assert log[:3] == ["load write_pos", "order", "load read_pos"] and log[-3:-1] == ["order", "load read_pos"]
    assert set(log[3:-3]) == {"load length", "load record"}


def test_nothing_torn_is_seen_whatever_happens_between_two_accesses_of_a_look():
    """Before each access in turn: so many messages are taken, and the lane is written full over them."""
    dropped = whole = 0
    for laps in (0, 1, 3):
        for taken in (1, 2, 5, 12, 1000):
            access = 1
            while True:
                lane = Lane()
                for _ in range(laps):
                    lane.write()
                    lane.take(lane.count)
                lane.write()
                pos = lane.reading.peek("read_pos")

                def meanwhile(lane=lane, taken=taken):
                    lane.take(taken)
                    lane.write()

                lane.looking.hooks[access] = meanwhile
                seen = lane.look(pos)
                lane.check(seen, pos)
                dropped += seen.missed > 0
                whole += len(seen.messages)
                after = lane.look(seen.pos)
                lane.check(after, seen.pos)
                if access > len(lane.looking.log):
                    break
                access += 1
    assert dropped > 100 and whole > 100, "it has been tried"


def test_nothing_torn_is_seen_when_the_ring_goes_on_at_each_access(seed):
    chance = random.Random(seed)
    lane = Lane()
    pos = shown = missed = 0

    def meanwhile():
        lane.take(chance.choice([0] * 20 + [1, 2, 30]))
        lane.write(chance.choice([0] * 10 + [1, 2, 30]))

    for _ in range(300):
        lane.looking.log.clear()
        lane.looking.hooks.update(dict.fromkeys(range(1, 100), meanwhile))
        seen = lane.look(pos)
        lane.check(seen, pos)
        shown, missed, pos = shown + len(seen.messages), missed + seen.missed, seen.pos
    assert shown and missed, "both have happened"


@pytest.mark.parametrize(
    "field, value",
    [("write_pos", 1 << 63), ("write_pos", 4104), ("write_pos", 12), ("read_pos", 4), ("read_pos", 1 << 63)],
)
def test_positions_that_cannot_be_are_told(field, value):
    lane = Lane()
    lane.write(1)
    lane.looking.poke(field, value)
    with pytest.raises(RingCorrupted, match="'fake': lane 0"):
        lane.look(0)


def test_a_length_that_cannot_be_is_told_unless_the_record_is_gone_by_then():
    for gone in (False, True):
        lane = Lane()
        lane.write(3)
        lane.looking.words.view[(lane.looking.layout.lane_bytes(0) + lane.begins[1]) >> 3] = 1 << 40

        def consumed(lane=lane):
            lane.looking.poke("read_pos", lane.begins[3])

        if gone:
            lane.looking.hooks["load record"] = consumed
            assert lane.look(0) == ([], lane.begins[3], lane.begins[3], 0)
        else:
            with pytest.raises(RingCorrupted, match=f"position {lane.begins[1]}: a length of 1,099,511,627,776"):
                lane.look(0)


def test_a_survey_has_each_lanes_words():
    segment = FakeSegment(writers=2)
    writers = [Writer(segment), Writer(FakeSegment(peer=segment))]
    for number, writer in enumerate(writers):
        ask(writer, batch([bytes(8)] * (number + 1)))
    ask(Reader(FakeSegment(peer=segment)), ReadBatch(1))
    for field, value in {"writer_parked 1": 257, "writer_parks 1": 5, "reader_parked": 513, "reader_parks": 9}.items():
        segment.poke(field, value)
    seen = survey(segment)
    assert seen == ([16, 32], [1, 2], [0, 16], [0, 1], [0, 1], [0, 5], 1, 9)
    assert lanes_used(segment) == 2 and lanes_used(FakeSegment()) == 0
    assert seen.fill(segment.layout) == 16 / segment.layout.capacity
    assert _layout.PAGE == segment.layout.capacity
