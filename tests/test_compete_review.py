"""Readers that compete, where something happens between two accesses: what messages, turns and sleepers survive."""

from __future__ import annotations

import pickle
import threading

import pytest
from conftest import DEADLINE

from shmring import Ring, RingClosed, RingCorrupted, RingTimeout, _layout
from shmring import _ring as ring_module


@pytest.fixture
def ring(name):
    """A handle that writes, to one lane."""
    with Ring.create(name, 4096, writers=1, readers="compete", max_readers=4, spin=0) as ring:
        yield ring


@pytest.fixture
def opened(ring):
    """Makes more handles of it."""
    made = []

    def make():
        made.append(Ring.open(ring.name, spin=0))
        return made[-1]

    yield make
    for each in made:
        each.close()


def raises(error):
    def do(*args):
        raise error

    return do


class Interrupt(BaseException):
    pass


# ---------------------------------------------------------------- messages in place


def test_the_first_message_that_a_handle_borrows_is_out_for_the_others(ring, opened):
    one, two = opened(), opened()
    ring.write_many([b"1", b"2"])
    with one.borrow() as view:
        assert two.try_read() == b"2"
        assert view == b"1"


def test_a_message_that_is_borrowed_after_one_that_could_not_be_released_is_out_for_the_others(ring, opened):
    one, two = opened(), opened()
    ring.write_many([b"1", b"2", b"3"])
    with pytest.raises(BufferError), one.borrow() as view:
        used = pickle.PickleBuffer(view)
    used.release()
    with one.borrow() as view:
        assert two.try_read() == b"3"
        assert view == b"2"


def test_a_message_that_is_owed_by_the_time_of_an_exception_is_not_owed_twice(ring, opened):
    """Before CPython 3.10 a signal handler may run right after a store to an attribute."""
    one = opened()
    ring.write_many([b"1", b"2"])
    one.join()
    reader = one._reader

    def store(self, messages):
        self.__dict__["owed"] = messages
        if messages:
            reader.__class__ = Storing.__base__
            reader._owed = messages
            raise Interrupt

    class Storing(type(reader)):
        _owed = property(lambda self: self.__dict__["owed"], store)

    reader.__dict__["owed"] = reader.__dict__.pop("_owed")
    reader.__class__ = Storing
    with pytest.raises(Interrupt):
        one.borrow().__enter__()
    assert reader.__class__ is not Storing
    assert [one.try_read(), one.try_read(), one.try_read()] == [b"1", b"2", None]


# ---------------------------------------------------------------- handles that are closed meanwhile


class Closing:
    """The time module, by which another thread closes a handle at the first look at the clock."""

    def __init__(self, ring):
        self._ring, self.sleep = ring, ring_module.time.sleep
        self._clock = ring_module.time.perf_counter

    def perf_counter(self):
        ring, self._ring = self._ring, None
        if ring is not None:
            thread = threading.Thread(target=ring.close)
            thread.start()
            thread.join()
        return self._clock()


@pytest.mark.parametrize("readers", ["one", "compete", "broadcast"])
def test_a_handle_that_is_closed_while_a_thread_spins_says_so(name, monkeypatch, readers):
    with Ring.create(name, 4096, readers=readers, spin=0) as ring:
        ring.join()
        monkeypatch.setattr(ring_module, "time", Closing(ring))
        with pytest.raises(RingClosed):
            ring.read(timeout=DEADLINE)


def test_a_handle_that_is_closed_while_a_thread_waits_for_its_doorbell_says_so(ring, opened):
    one = opened()
    one.join()
    ring.write(b"x")
    nothing = one._reader.nothing

    def close_and_look():
        thread = threading.Thread(target=one.close)
        thread.start()
        thread.join()
        return nothing()

    one._reader.nothing = close_and_look
    with pytest.raises(RingClosed):
        one.wait_doorbell(DEADLINE)


# ---------------------------------------------------------------- who is refused


def read_in_a_thread(ring, *args, **kwargs):
    """What a read raises, or returns; a handle that is closed ends it."""
    outcome = []

    def read():
        try:
            outcome.append(ring.read(*args, **kwargs))
        except BaseException as error:
            outcome.append(type(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(DEADLINE / 10)
    if thread.is_alive():
        ring.close()
        thread.join(DEADLINE)
    return outcome


def test_a_time_out_is_kept_by_who_was_refused_before_an_exception(ring, opened):
    one, two = opened(), opened()
    ring.write(b"x")
    two.join()
    assert two._reader._take()
    assert next(one._messages) is None and one._reader.was_refused
    one._reader._is_left = raises(Interrupt)
    with pytest.raises(Interrupt):
        one.read(max_len=9)
    del one._reader._is_left
    two._reader._give()
    assert two.read() == b"x"
    assert one.try_read() is None
    assert read_in_a_thread(one, timeout=0.01) == [RingTimeout]


def test_who_takes_over_in_vain_looks_once_more_for_those_that_it_has_kept_from_it(ring, opened):
    """Who was inside has left, and has rung nobody; who was refused meanwhile has gone to sleep."""
    one, two, three = opened(), opened(), opened()
    for each in (one, two, three):
        each.join()
    ring.write(b"x")
    assert one._reader._take()
    is_inside, refused = two._reader._is_inside, []

    def look(turn):
        two._reader._is_inside = is_inside
        assert is_inside(turn)
        one._reader._give()
        thread = threading.Thread(target=lambda: refused.append(three._reader.nothing()))
        thread.start()
        thread.join()
        return True

    two._reader._is_inside = look
    assert two.try_read() == b"x"
    assert refused == [True]


# ---------------------------------------------------------------- damage


def test_a_write_pos_that_is_damaged_is_found_by_who_was_refused_before(ring, opened):
    one, two = opened(), opened()
    ring.write_many([b"x"] * 9)
    assert one.read() == two.read() == b"x"  # it is the turn of the second
    words = ring._segment.words
    words[(ring._segment.layout.lane_block(0) + _layout.WRITE_POS) >> 3] += 1 << 40
    with pytest.raises(RingCorrupted, match="write_pos"):
        one.try_read()


# ---------------------------------------------------------------- order, where the machine has none


class Telling:
    """Words that tell what is stored in one of them."""

    def __init__(self, words, index, log):
        self._words, self._index, self._log = words, index, log

    def __getitem__(self, index):
        return self._words[index]

    def __setitem__(self, index, value):
        if index == self._index:
            self._log.append(value)
        self._words[index] = value


def test_steps_that_begin_after_an_exception_leave_the_turn_after_what_was_stored_in_it(ring, opened):
    """The last ones may have come to R3, and two exceptions have kept them from T4."""
    one, log = opened(), []
    one.join()
    reader, segment = one._reader, one._segment
    reader._is_left = raises(Interrupt)
    with pytest.raises(Interrupt):
        one.read(max_len=9)
    del reader._is_left
    reader._order = lambda: log.append("order")
    segment.words, words = Telling(segment.words, reader._inside, log), segment.words
    assert one.try_read() is None
    segment.words = words
    assert log[:2] == ["order", 0]
