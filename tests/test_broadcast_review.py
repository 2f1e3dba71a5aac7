"""Rings that broadcast, where something happens between two accesses: what readers, writers and claims survive."""

from __future__ import annotations

import os

import pytest
from conftest import DARWIN, WINDOWS
from fakes import FakeSegment, ask, batch, hooks_end  # noqa: F401 - a fixture

from shmring import MessagesLost, Ring, RingCorrupted, _layout
from shmring._lanes import BURST
from shmring._layout import RECORD_HEADER, record_bytes
from shmring._reading import Reader
from shmring._requests import GiveBack, ReadBatch
from shmring._writing import Writer


def joined(segment):
    """A reader on memory that a handle of its own has."""
    reader = Reader(FakeSegment(peer=segment))
    ask(reader, ReadBatch(1))
    return reader


def drain(reader):
    return list(iter(lambda: ask(reader, None), None))


def once(segment, event, do):
    """Have something happen at the next such access."""

    def hook():
        segment.hooks.clear()
        do()

    segment.hooks[event] = hook


class Interrupt(BaseException):
    pass


def interrupt():
    raise Interrupt


# ---------------------------------------------------------------- who lags loses


def test_a_length_that_was_overwritten_is_not_taken_for_padding():
    segment = FakeSegment(writers=1, capacity=1 << 18, slots=1, drop=True)
    writer, reader = Writer(segment), joined(segment)
    long = segment.layout.capacity - 2 * record_bytes(81_000) - RECORD_HEADER  # its length is looked at on its own
    ask(writer, batch([b"-" * 81_000] * 2)), ask(writer, b"-" * long)
    assert long > BURST and len(ask(reader, ReadBatch(2))) == 2  # what is left ends where the lane does

    # A lap of bytes that say that the lane goes on at its beginning.
    lap = [b"\xff" * segment.layout.max_message] * 2
    once(reader._segment, "load length", lambda: ask(writer, batch(lap)))
    with pytest.raises(MessagesLost) as lost:
        ask(reader, ReadBatch(9))
    assert lost.value.count == 1
    assert ask(reader, ReadBatch(9)) == lap


def test_what_is_owed_comes_before_the_loss_of_what_came_after_it():
    segment = FakeSegment(writers=1, slots=1, drop=True)
    writer, reader = Writer(segment), joined(segment)
    ask(writer, batch([b"-" * 56] * 8))
    ask(reader, GiveBack(ask(reader, ReadBatch(3))))
    ask(writer, batch([b"-" * 56] * 64))
    assert ask(reader, ReadBatch(9)) == [b"-" * 56] * 3
    with pytest.raises(MessagesLost):
        ask(reader, ReadBatch(9))


def test_a_position_that_is_damaged_does_not_keep_a_reader_from_joining():
    segment = FakeSegment(writers=2, slots=1, drop=True)
    writers = [Writer(FakeSegment(peer=segment)) for _ in range(2)]
    for writer in writers:
        ask(writer, b"before")
    segment.poke("given_up", 1 << 60)
    reader = joined(segment)
    ask(writers[1], b"after")
    with pytest.raises(RingCorrupted, match="lane 0"):
        ask(writers[0], batch([b"more"]))
    assert drain(reader) == [b"after"]


def test_counting_again_after_an_exception_hides_no_damage():
    segment = FakeSegment(writers=1, slots=1, drop=True)
    writer, reader = Writer(segment), joined(segment)
    ask(writer, batch([b"x"] * 40))
    assert ask(reader, None) == b"x"
    marks = segment.layout.marks(0) >> 3
    for word in range(2 * _layout.MARKS):
        segment.words.view[marks + word] = 3
    reader._segment.hooks["store read_pos"] = interrupt
    with pytest.raises(Interrupt):
        ask(reader, None)
    reader._segment.hooks.clear()
    assert len(drain(reader)) == 39  # it was not overtaken, so it needs no marks


# ---------------------------------------------------------------- who comes and goes


def test_closing_again_leaves_the_slots_next_reader_alone():
    segment = FakeSegment(writers=1, slots=1)
    first = joined(segment)
    first.close()
    joined(segment)
    number = segment.peek("joined")
    first.close()  # as after an exception in between
    assert segment.peek("joined") == number and number & 1


def test_a_reader_that_was_interrupted_while_joining_leaves_when_it_is_closed():
    segment = FakeSegment(writers=1, slots=1)
    reader = Reader(FakeSegment(peer=segment))
    reader._segment.hooks["sleeper_fence"] = interrupt
    with pytest.raises(Interrupt):
        ask(reader, None)
    assert segment.peek("joined") & 1
    reader.close()
    assert not segment.peek("joined") & 1


def test_a_slot_that_was_tried_is_another_ones():
    """An exception right after a claim that failed must not make a dead reader's slot count as our own."""
    segment = FakeSegment(writers=1, slots=1)
    there = joined(segment)
    ours = FakeSegment(peer=segment)
    reader = Reader(ours)
    writer = Writer(ours, reader)
    claim = ours.claim

    def claim_and_interrupt(byte):
        if not claim(byte):
            raise Interrupt
        return True

    ours.claim = claim_and_interrupt
    with pytest.raises(Interrupt):
        ask(reader, None)
    while ask(writer, b"x" * 1000) is None:
        pass
    there._segment.release(_layout.READER)  # it was killed
    assert ask(writer, b"x" * 1000) is None


def test_a_reader_that_is_joining_is_its_own_handles_too():
    segment = FakeSegment(writers=1, slots=1)
    reader = Reader(segment)
    writer = Writer(segment, reader)

    def fill():
        assert segment.peek("joined") & 1
        assert ask(writer, batch([b"x" * 1000] * 9)) is not None

    once(segment, "sleeper_fence", fill)
    assert ask(reader, None) is None
    written = segment.peek("write_pos")
    ask(writer, batch([b"y" * 1000] * 9))
    assert segment.peek("write_pos") - written <= 4096


@pytest.mark.skipif(WINDOWS or DARWIN, reason="claims are locks of a descriptor on Linux alone")
def test_a_writer_that_has_lost_its_claims_takes_nobody_for_dead(name):
    """Who closes all descriptors closes those with the claims; the kernel says that nobody has any then."""
    with Ring.create(name, 4096, readers="broadcast") as ring, Ring.open(name) as other:
        other.join()
        while ring.try_write(b"x" * 1000):
            pass
        os.close(ring._segment._locks)
        with pytest.raises(OSError, match="behind its back"):
            ring.try_write(b"x" * 1000)
        assert len(other.read_many()) == 4


def test_messages_out_is_what_was_in_when_a_reader_joined():
    segment = FakeSegment(writers=1, slots=2)
    writer, later = Writer(segment), FakeSegment(peer=segment)
    ask(writer, b"before")
    once(later, "load messages_in", lambda: ask(writer, batch([b"meanwhile"] * 5)))
    reader = Reader(later)
    assert ask(reader, None) in (None, b"meanwhile")
    drain(reader)
    layout = segment.layout
    assert segment.words.view[(layout.cursor(0, 0) + _layout.MESSAGES_OUT) >> 3] == segment.peek("messages_in") == 6
