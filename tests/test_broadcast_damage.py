"""Broadcast rings whose tables were overwritten: a documented error, in time."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random

import pytest
from conftest import DEADLINE, WINDOWS

from shmring import (
    BufferTooSmall,
    MessagesLost,
    Ring,
    RingBusy,
    RingCorrupted,
    RingTimeout,
    _layout,
)

CAPACITY = 4096
WORD = (1 << 64) - 1
SEED = int(os.environ.get("SHMRING_SEED", "1"))
DOCUMENTED = BufferTooSmall, MessagesLost, RingBusy, RingCorrupted, RingTimeout


@pytest.fixture(autouse=True)
def in_time():
    """What takes too long ends the interpreter: nothing else ends a loop that asks for no time."""
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def ring(name):
    with Ring.create(name, CAPACITY, writers=2, readers="broadcast", max_readers=3, lag="drop", spin=0) as ring:
        yield ring


def word(ring, lane, offset):
    return (ring._segment.layout.lane_block(lane) + offset) >> 3


@pytest.mark.parametrize("given_up", [1 << 20, 1 << 62, WORD - 7], ids=hex)
def test_a_reader_joins_where_all_seems_to_be_given_up(ring, name, given_up):
    """It reads the other lanes; of this one it says that it is damaged."""
    ring.write(b"before")
    with Ring.open(name) as reader, Ring.open(name) as other:
        other.write(b"before")
        ring._segment.words[word(ring, 0, _layout.GIVEN_UP)] = given_up
        reader.join()
        ring.write(b"damaged")
        other.write(b"sound")
        with pytest.raises(RingCorrupted, match="lane 0 is damaged"):
            reader.read(timeout=0)
        assert reader.read(timeout=0) == b"sound"


def test_a_reader_joins_where_the_marks_are_no_marks(ring, name):
    ring.write(b"before")
    marks = ring._segment.layout.marks(0)
    ring._segment.map[marks : marks + _layout.MARKS * _layout.MARK_BYTES] = b"\xff" * _layout.MARKS * _layout.MARK_BYTES
    with Ring.open(name) as reader:
        reader.join()
        ring.write(b"after")
        assert reader.read(timeout=0) == b"after"


@pytest.mark.parametrize("write_pos", [1 << 40, (1 << 63) - 8, (1 << 63) + 8, WORD - 7, 12], ids=hex)
def test_a_writer_whose_write_pos_jumps_says_so(ring, write_pos):
    """Not after it has made a mark for each part in between."""
    ring.write(b"before")
    ring._segment.words[word(ring, 0, _layout.WRITE_POS)] = write_pos
    with pytest.raises(RingCorrupted, match="lane 0"), ring.reserve(100, timeout=0) as view:
        view[:] = bytes(100)
    with pytest.raises(RingCorrupted, match="lane 0"):
        ring.write_many([b"x" * 100], timeout=0)


def set_counts(ring, count):
    first = ring._segment.layout.marks(0) >> 3
    for number in range(_layout.MARKS):
        ring._segment.words[first + 2 * number] = count


@pytest.mark.parametrize("count", [1 << 63, WORD], ids=hex)
def test_a_reader_that_lags_is_sent_to_a_mark_with_too_high_a_count(ring, name, count):
    ring.write(b"one")
    with Ring.open(name) as reader:
        reader.join()
        for _ in range(100):
            ring.write(bytes(100))
        set_counts(ring, count)
        with pytest.raises(RingCorrupted, match="lane 0 is damaged"):
            reader.read(timeout=0)


def test_a_reader_joins_after_a_mark_with_too_high_a_count(ring, name):
    ring.write(b"one")
    set_counts(ring, WORD)
    with Ring.open(name) as reader:
        reader.join()
        ring.write(b"two")
        assert reader.read(timeout=0) == b"two"


def test_a_writer_goes_on_from_a_mark_with_too_high_a_count(ring, name):
    with Ring.open(name) as before:
        before.write(b"one")
    ring._segment.words[ring._segment.layout.marks(0) >> 3] = WORD
    with pytest.raises(RingCorrupted, match="lane 0 has no mark"):
        ring.write(b"two")


def test_a_writer_whose_positions_are_both_far_away_does_not_mark_all_parts_in_between(ring):
    ring.write(b"one")
    block = ring._segment.layout.lane_block(0)
    for offset in (_layout.WRITE_POS, _layout.GIVEN_UP):
        ring._segment.words[(block + offset) >> 3] = 1 << 60
    with pytest.raises(RingCorrupted, match="lane 0 was written to"):
        ring.write_many([b"two"])


def test_an_interrupt_where_the_marks_are_damaged_stays_an_interrupt(ring, monkeypatch):
    ring.join()
    ring.write(b"one")
    assert ring.read() == b"one"
    marks = ring._segment.layout.marks(0)
    ring._segment.map[marks : marks + _layout.MARKS * _layout.MARK_BYTES] = b"\xff" * _layout.MARKS * _layout.MARK_BYTES

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ring._reader, "_look", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ring.read_many(timeout=0)


# ---------------------------------------------------------------- fuzz


def tables(layout):
    """Where the words are that everybody relies on."""
    for lane in range(layout.writers):
        block = layout.lane_block(lane)
        for offset in (
            _layout.WRITE_POS, _layout.MESSAGES_IN, _layout.GIVEN_UP, _layout.WRITER_PARKED, _layout.WRITER_WANTED,
            _layout.WRITER_DOORBELL,
        ):  # fmt: skip
            yield block + offset
        if layout.drop:
            yield from range(layout.marks(lane), layout.marks(lane) + _layout.MARKS * _layout.MARK_BYTES, 8)
    for slot in range(layout.slots):
        block = layout.reader_block(slot)
        for offset in (_layout.READER_PARKED, _layout.JOINED, _layout.READER_DOORBELL):
            yield block + offset
        for lane in range(layout.writers):
            yield layout.cursor(lane, slot) + _layout.READ_POS
            yield layout.cursor(lane, slot) + _layout.MESSAGES_OUT
    yield layout.asleep_offset
    yield layout.asleep_offset + 8


def other_word(rng, old):
    step = rng.choice([1, 8, 256, CAPACITY - 8, CAPACITY, 1 << 31, 1 << 62, (1 << 63) - 8, 1 << 63, WORD - 7, WORD])
    flipped = old ^ 1 << rng.randrange(64)
    return rng.choice([0, step, old + step & WORD, old - step & WORD, flipped, rng.getrandbits(64)])


def borrow(ring, rng, timeout):
    with ring.borrow(timeout=timeout) as view:
        bytes(view)


def reserve(ring, rng, timeout):
    room = ring.reserve(rng.choice([10, 1000, ring.max_message]), timeout=timeout)
    with room:
        room.commit(rng.randrange(10))


def iterate(ring, rng, timeout):
    for _ in zip(range(20), ring.messages(timeout=timeout)):
        pass


OPERATIONS = [
    lambda ring, rng, timeout: ring.write(bytes(rng.choice([0, 5, 100, 1000, ring.max_message])), timeout=timeout),
    lambda ring, rng, timeout: ring.write_many([bytes(rng.choice([3, 100]))] * rng.randrange(1, 50), timeout=timeout),
    lambda ring, rng, timeout: ring.read(timeout=timeout),
    lambda ring, rng, timeout: ring.read(bytearray(rng.choice([5, CAPACITY])), timeout=timeout),
    lambda ring, rng, timeout: ring.read_many(rng.choice([None, 3]), timeout=timeout),
    lambda ring, rng, timeout: ring.try_read(),
    lambda ring, rng, timeout: ring.join(),
    lambda ring, rng, timeout: ring.stats(),
    reserve,
    borrow,
    iterate,
]


@pytest.mark.skipif(WINDOWS, reason="hundreds of rings take minutes there, and it is not about the platform's code")
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("lag", ["block", "drop"])
def test_damage_is_a_documented_error_in_time(name, lag, part):
    for case in range(60):
        rng = random.Random(f"{SEED}/{lag}/{part}/{case}")
        print(f"case {case} of SHMRING_SEED={SEED}")
        slots, writers = rng.choice([2, 3, 10]), rng.choice([1, 2])
        with contextlib.ExitStack() as stack:
            ring = stack.enter_context(
                Ring.create(name, CAPACITY, writers=writers, readers="broadcast", max_readers=slots, lag=lag, spin=0)
            )
            rings = [ring, *(stack.enter_context(Ring.open(name, spin=0)) for _ in range(2))]
            words, places = ring._segment.words, list(tables(ring._segment.layout))
            for _ in range(rng.randrange(30)):
                with contextlib.suppress(MessagesLost, RingBusy):
                    rng.choice(rings).try_read() if rng.random() < 0.1 else ring.try_write(bytes(rng.randrange(300)))
            for _ in range(rng.randrange(30)):
                if rng.random() < 0.3:
                    place = rng.choice(places) >> 3
                    words[place] = other_word(rng, words[place])
                with contextlib.suppress(*DOCUMENTED):
                    rng.choice(OPERATIONS)(rng.choice(rings), rng, rng.choice([0, 0, 0.001]))
                if rng.random() < 0.1:
                    closed = rng.randrange(1, 3)
                    rings[closed].close()
                    rings[closed] = stack.enter_context(Ring.open(name, spin=0))
