"""Writer and Reader step by step, on memory of this process: what is in the ring after each step."""

from __future__ import annotations

import errno
import gc
import random
import signal
import sys
import threading
import weakref
from contextlib import suppress

import pytest
from conftest import DEADLINE, WINDOWS
from fakes import FakeSegment, ask, batch, hooks_end  # noqa: F401 - a fixture

from shmring import BufferTooSmall, MessageTooLarge, Ring, RingBusy, RingCorrupted, _layout
from shmring._lanes import BURST
from shmring._layout import PADDING
from shmring._monitor import Monitor, MonitorClosed
from shmring._reading import Reader
from shmring._requests import GiveBack, ReadBatch, ReadOne
from shmring._writing import Writer


def drain(reader):
    return list(iter(lambda: ask(reader, None), None))


# ---------------------------------------------------------------- lanes


def test_nothing_is_claimed_before_the_first_request():
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    assert not segment.claims and writer.lane == -1 and not reader.claimed
    ask(writer, b"")
    ask(reader, None)
    assert set(segment.claims) == {_layout.LANE, _layout.READER} and writer.lane == 0 and reader.claimed


def test_a_lane_and_the_reader_role_are_given_back_at_close():
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, b"x"), ask(reader, None)
    writer.close(), reader.close()
    assert not segment.claims
    writer.close(), reader.close()
    with pytest.raises(MonitorClosed):
        ask(writer, b"x")


def test_a_claimant_takes_the_emptiest_free_lane_rather_one_with_memory():
    segment = FakeSegment(writers=4)
    for lane, written, read in [(0, 64, 0), (1, 160, 128), (2, 0, 0), (3, 256, 256)]:
        suffix = f" {lane}" if lane else ""
        segment.poke("write_pos" + suffix, written)
        segment.poke("read_pos" + suffix, read)
    writers = [Writer(FakeSegment(peer=segment)) for _ in range(4)]
    for writer in writers:
        ask(writer, batch([]))
    assert [writer.lane for writer in writers] == [3, 2, 1, 0]
    assert [writer._segment.log.count("reserve") for writer in writers] == [0, 1, 0, 0]


def test_a_lane_that_cannot_have_memory_is_given_back():
    segment = FakeSegment(writers=1)

    def full():
        segment.hooks.clear()
        raise OSError(errno.ENOSPC, "no memory")

    segment.hooks["reserve"] = full
    writer = Writer(segment)
    with pytest.raises(OSError, match="no memory"):
        ask(writer, b"x")
    assert not segment.claims and segment.peek("write_pos") == 0
    ask(writer, b"x")
    assert segment.peek("write_pos") == 16


def test_one_writer_more_than_lanes_is_told_how_many_there_are():
    segment = FakeSegment(writers=2)
    writers = [Writer(FakeSegment(peer=segment)) for _ in range(3)]
    ask(writers[0], b"0"), ask(writers[1], b"1")
    with pytest.raises(RingBusy, match=r"2 lanes.*writers="):
        ask(writers[2], b"2")
    writers[1].close()
    ask(writers[2], b"2")
    assert writers[2].lane == 1
    assert sorted(drain(Reader(segment))) == [b"0", b"1", b"2"]


def test_a_second_reader_is_refused_until_the_first_is_gone():
    segment = FakeSegment()
    first, second = Reader(segment), Reader(FakeSegment(peer=segment))
    ask(Writer(segment), b"x")
    ask(first, None)
    with pytest.raises(RingBusy, match="reader"):
        ask(second, None)
    second.close()  # must not give back what is not its own
    assert segment.claims[_layout.READER] is segment
    first.close()
    assert ask(Reader(FakeSegment(peer=segment)), None) is None


def test_no_lane_starves_another():
    segment = FakeSegment(writers=3)
    writers = [Writer(FakeSegment(peer=segment)) for _ in range(3)]
    reader = Reader(segment)
    for writer, letter in zip(writers, (b"a", b"b", b"c")):
        ask(writer, batch([letter] * 2))
    got = [ask(reader, None) for _ in range(3)]
    ask(writers[0], batch([b"a"] * 50))  # comes after what the others had
    got += [ask(reader, None) for _ in range(3)]
    assert sorted(got) == [b"a", b"a", b"b", b"b", b"c", b"c"]


def test_a_successor_goes_on_where_the_lane_and_the_cursor_stand():
    segment = FakeSegment(writers=1)
    for number in range(300):  # several laps
        writer, reader = Writer(FakeSegment(peer=segment)), Reader(FakeSegment(peer=segment))
        ask(writer, b"%d" % number * 7)
        ask(writer, b"second")
        assert ask(reader, None) == b"%d" % number * 7
        writer.close(), reader.close()
        successor = Reader(FakeSegment(peer=segment))
        assert drain(successor) == [b"second"]
        successor.close()
    assert segment.peek("write_pos") == segment.peek("read_pos") > 2 * 4096
    assert segment.peek("messages_in") == segment.peek("messages_out") == 600


# ---------------------------------------------------------------- the writer stopped half-way


class Killed(BaseException):
    pass


def kill_at(segment, event):
    def kill():
        segment.hooks.clear()
        raise Killed

    segment.hooks[event] = kill


@pytest.mark.parametrize("message", [b"small", bytes(2000)])
def test_what_is_stored_but_not_published_is_not_there(message):
    """Between W2 and W3."""
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, b"before")
    kill_at(segment, "store write_pos")
    with pytest.raises(Killed):
        ask(writer, message)
    assert drain(reader) == [b"before"]
    ask(writer, b"after")
    assert drain(reader) == [b"after"]


def test_a_batch_that_stops_half_way_is_there_up_to_where_it_was_published():
    segment = FakeSegment(capacity=3 * BURST)
    writer = Writer(segment)
    messages = [bytes([i]) * 1000 for i in range(1, 190)]
    request = batch(messages)
    published = []

    def count():
        published.append(1)
        if len(published) == 2:
            kill_at(segment, "load reader_parked")

    segment.hooks["store write_pos"] = count
    with pytest.raises(Killed):
        ask(writer, request)
    got = ask(Reader(segment), ReadBatch(1000))
    assert got == messages[: len(got)] and request.done <= len(got) < len(messages)


def test_a_generator_keeps_neither_the_exception_nor_the_frames_it_hung_on():
    segment = FakeSegment()
    writer = Writer(segment)

    class Big(bytearray):
        pass

    def attempt():
        local = Big()
        with pytest.raises(MessageTooLarge):
            ask(writer, bytes(4089))
        return weakref.ref(local)

    gone = attempt()
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------- framing


@pytest.mark.parametrize("sizes", [[5], [8] * 9, [0] * 4, [1, 2, 3], [16, 16, 8], [1000] * 100, [70000]])
def test_joined_records_are_those_written_one_by_one(sizes):
    messages = [bytes([i % 255 + 1]) * size for i, size in enumerate(sizes)]
    one, many = FakeSegment(capacity=1 << 18), FakeSegment(capacity=1 << 18)
    writer = Writer(one)
    for message in messages:
        ask(writer, message)
    request = batch(messages)
    assert ask(Writer(many), request) is None and request.done == len(messages)
    end = one.peek("write_pos")
    assert many.peek("write_pos") == end and one.lane_bytes(0, end) == many.lane_bytes(0, end)
    assert many.peek("messages_in") == len(messages)


@pytest.mark.parametrize("sizes", [[8] * 600, [0, 9, 8, 1] * 100, [1, *[8] * 400], [4088] * 3, [2040] * 5, [0] * 600])
def test_a_batch_takes_as_many_as_fit_and_goes_on_when_there_is_room(sizes):
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    messages = [bytes([i % 255 + 1]) * size for i, size in enumerate(sizes)]
    request, got = batch(messages), []
    while (wanted := ask(writer, request)) is not None:
        used = segment.peek("write_pos") - segment.peek("read_pos")
        following = _layout.record_bytes(sizes[request.done])
        assert used + following > 4096 or segment.peek("write_pos") % 4096 + following > 4096
        assert segment.peek("messages_in") == request.done
        while segment.peek("read_pos") < wanted:
            got += ask(reader, ReadBatch(7)) or []
    assert got + drain(reader) == messages


@pytest.mark.parametrize("sizes", [[8] * 40, [8] * 5 + [9] + [8] * 5, [1, 2, 3, 4], [0] * 10 + [5], [500] * 7])
def test_every_way_of_reading_gives_the_same_messages(sizes):
    messages = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    view = memoryview(bytearray(600))
    ways = {
        "one": lambda reader: ask(reader, None),
        "batch": lambda reader: (ask(reader, ReadBatch(1)) or [None])[0],
        "limit": lambda reader: ask(reader, ReadOne(600)),
        "into": lambda reader: None if (n := ask(reader, ReadOne(600, view))) is None else bytes(view[:n]),
    }
    for turn in range(4):  # alone, and each in turn with the others
        for way in ways:
            segment = FakeSegment()
            reader, got = Reader(segment), []
            ask(Writer(segment), batch(messages))
            names = [way] if not turn else list(ways)[turn:] + [way]
            while len(got) < 100:
                message = ways[names[len(got) % len(names)]](reader)
                if message is None:
                    break
                got.append(message)
            assert got == messages


@pytest.mark.parametrize(
    "sizes",
    [
        *([64] * 5 + [64 + kind] * length + [64] * 5 for length in (1, 2, 3, 4, 9, 130) for kind in (1, 8)),
        [size for size in range(20) for _ in range(size)],
        [size for number in range(40) for size in (16, 24, 16)],
        *([size] * 6 for size in (1016, 1024, 1025, 16376, 16384, 65528, 65536, 70000, 1 << 17)),
        [65536, 8, 65536, 65536, 65536, 65536, 8, 8, 8, 8, 8, 0],
    ],
    ids=lambda sizes: f"{len(sizes)} of {sorted(set(sizes))}",
)
def test_runs_of_all_lengths_are_taken_apart_into_their_messages(sizes):
    """Again and again, so that they lie over the end of the lane as well."""
    messages = [(number.to_bytes(2, "big") * size)[:size] for number, size in enumerate(sizes)]
    segment = FakeSegment(capacity=1 << 20)
    writer, reader = Writer(segment), Reader(segment)
    ways = (lambda: [ask(reader, None)], lambda: ask(reader, ReadBatch(7)), lambda: ask(reader, ReadBatch(1000)))
    for takes in ways * 3:
        assert ask(writer, batch(messages)) is None
        got = []
        while len(got) < len(messages):
            got += takes()
        assert got == messages
        assert ask(writer, bytes(300_000)) is None and len(drain(reader)) == 1


def test_what_was_given_back_comes_first_and_was_never_out():
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, batch([b"1", b"2", b"3"]))
    assert ask(reader, None) == b"1"
    ask(reader, GiveBack([b"1"]))
    assert not reader.nothing()
    with pytest.raises(BufferTooSmall):
        ask(reader, ReadOne(0))
    assert ask(reader, ReadOne(1, memoryview(bytearray(1)))) == 1
    ask(reader, GiveBack([b"1"]))
    assert ask(reader, ReadBatch(2)) == [b"1"]  # and nothing of the ring beside it
    assert ask(reader, ReadBatch(1)) == [b"2"]
    ask(reader, GiveBack([b"2"]))
    assert drain(reader) == [b"2", b"3"]


def test_what_is_given_back_once_more_comes_before_what_is_still_owed():
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, batch([b"1", b"2", b"3", b"4"]))
    assert ask(reader, ReadBatch(3)) == [b"1", b"2", b"3"]
    ask(reader, GiveBack([b"1", b"2", b"3"]))
    assert ask(reader, None) == b"1"
    ask(reader, GiveBack([b"1"]))
    assert ask(reader, ReadBatch(2)) == [b"1", b"2"]
    ask(reader, GiveBack([b"1", b"2"]))
    assert drain(reader) == [b"1", b"2", b"3", b"4"]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("read", [lambda: None, lambda: ReadBatch(99), lambda: ReadOne(99)])
@pytest.mark.parametrize("what, value", [
    ("length", 17), ("length", PADDING), ("length", PADDING - 1), ("length", 1 << 40), ("length", 9),
    ("write_pos", 8192), ("write_pos", 17), ("write_pos", (1 << 64) - 8),
])  # fmt: skip
def test_a_damaged_lane_is_told_once_and_the_others_go_on(what, value, read):
    segment = FakeSegment(writers=2)
    bad, good = Writer(segment), Writer(FakeSegment(peer=segment))
    reader = Reader(segment)
    ask(bad, b"12345678"), ask(good, b"good")
    if what == "length":
        segment.words.view[segment.layout.lanes_offset >> 3] = value
    else:
        segment.poke(what, value)
    got, damages = [], 0
    for _ in range(6):
        try:
            answer = ask(reader, read())
        except RingCorrupted as error:
            assert "lane 0" in str(error)
            damages += 1
        else:
            got += answer if isinstance(answer, list) else [answer] if answer else []
    assert damages == 1 and got == [b"good"]
    ask(good, b"more")
    assert ask(reader, read()) in (b"more", [b"more"])
    assert reader.nothing()


@pytest.mark.parametrize("field, value", [("read_pos", 24), ("read_pos", 3), ("read_pos", (1 << 64) - 8)])
def test_a_writer_whose_room_cannot_be_says_so_and_does_not_write(field, value):
    segment = FakeSegment()
    writer = Writer(segment)
    ask(writer, b"12345678")
    segment.poke(field, value)
    with pytest.raises(RingCorrupted, match="lane 0"):
        ask(writer, batch([b"x"]))
    assert segment.peek("write_pos") == 16


def test_a_damaged_lane_is_not_claimed():
    segment = FakeSegment(writers=2)
    segment.poke("read_pos", 8)
    writer = Writer(segment)
    ask(writer, b"x")
    assert writer.lane == 1
    with pytest.raises(RingCorrupted, match="1 of (its )?2 lanes are damaged"):
        ask(Writer(FakeSegment(peer=segment)), b"x")


# ---------------------------------------------------------------- monitors


def test_a_monitor_refuses_its_own_thread_and_starts_anew_after_an_exception():
    started = []

    def steps():
        started.append(True)
        answer = None
        while True:
            request = yield answer
            answer = request()

    monitor = Monitor(steps)
    with pytest.raises(RuntimeError, match="signal handler"):
        monitor.enter(lambda: monitor.enter(lambda: 1))
    with pytest.raises(ZeroDivisionError):
        monitor.enter(lambda: 1 // 0)
    assert monitor.enter(lambda: 5) == 5
    assert len(started) == 3
    monitor.close()
    monitor.close()
    with pytest.raises(MonitorClosed):
        monitor.enter(lambda: 1)


@pytest.fixture
def no_gil(monkeypatch):
    """Monitors are as where there is no GIL."""
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)


class Lock:
    """An RLock at which something happens once: before or after it is acquired or released."""

    def __init__(self, when, what):
        self._lock, self._when, self._what = threading.RLock(), when, what
        self._is_owned = self._lock._is_owned

    def _now(self, when):
        if when == self._when:
            self._when = None
            self._what()

    def acquire(self, *args):
        self._now("before it is acquired")
        acquired = self._lock.acquire(*args)
        self._now("after it is acquired")
        return acquired

    def release(self):
        self._now("before it is released")
        self._lock.release()
        self._now("after it is released")


def interrupt():
    raise KeyboardInterrupt


def test_where_there_is_no_gil_an_exception_at_the_lock_loses_no_answer(no_gil):
    segment = FakeSegment()
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, batch([b"1", b"2"]))
    assert next(iter(reader.monitor.steps)) == b"1"
    reader.monitor.steps._lock = Lock("after it is released", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(reader.monitor.steps)
    assert drain(reader) == [b"2"]
    reader.monitor.close()
    with pytest.raises(StopIteration):
        next(reader.monitor.steps)


def test_where_there_is_no_gil_who_fails_to_come_in_does_not_let_others_in(no_gil):
    """It is inside already, by a call of the same thread further up."""
    lock = Lock("", interrupt)
    owned = []

    def steps():
        request = yield
        lock._when = "before it is acquired"
        with pytest.raises(KeyboardInterrupt):
            monitor.enter(request)
        owned.append(lock._is_owned())
        yield

    monitor = Monitor(steps)
    monitor.steps._lock = lock
    monitor.enter(1)
    assert owned == [True] and not lock._is_owned()


@pytest.mark.parametrize("when", ["after it is acquired", "before it is released"])
def test_where_there_is_no_gil_who_is_about_to_enter_or_leave_is_inside(no_gil, when):
    """Else two threads that close would wait for each other: one in a signal handler there, one for it to leave."""

    def steps():
        while True:
            yield

    def use():
        with pytest.raises(RuntimeError, match="signal handler"):
            monitor.close()
        refused.append(True)

    refused = []
    monitor = Monitor(steps)
    monitor.steps._lock = Lock(when, use)
    monitor.enter(1)
    assert refused == [True]
    monitor.close()


def test_where_there_is_no_gil_what_is_closed_says_so_though_its_lock_is_held(no_gil):
    """As in a forked child, whose parent had another thread in it."""

    def steps():
        yield

    monitor = Monitor(steps)
    monitor.close()
    thread = threading.Thread(target=monitor.steps._lock.acquire)
    thread.start()
    thread.join()
    with pytest.raises(MonitorClosed):
        monitor.enter(1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before 3.11 a handler may run between any two bytecodes")
@pytest.mark.skipif(WINDOWS, reason="no timers that raise signals")
@pytest.mark.parametrize("way", ["as it comes", "by a request", "many"])
def test_where_there_is_no_gil_a_signal_at_any_moment_leaves_nothing_locked_and_loses_nothing(name, no_gil, way):
    class Interrupt(Exception):
        """A signal handler's."""

    armed, interrupted, written = False, 0, 0

    def handler(*_):
        nonlocal armed, interrupted
        if armed:
            armed, interrupted = False, interrupted + 1
            raise Interrupt

    def take(due, got):
        nonlocal armed
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-6, 3e-4))
        armed = True
        while len(got) < len(due):
            if way == "many":
                got += ring.read_many(7)
            else:
                got += [ring.read() if way == "as it comes" else ring.read(max_len=9)]
        armed = False

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with Ring.create(name, 4096) as ring:
            while interrupted < 300:
                due = [b"%d" % number for number in range(written, written + 20)]
                written += ring.write_many(due)
                got = []
                while len(got) < len(due):
                    with suppress(Interrupt):
                        take(due, got)
                assert got == due
                assert not ring._reader.monitor.steps.is_ours()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_heir_that_another_thread_just_started_is_used_and_not_doubled():
    def steps():
        request = None
        while True:
            request = yield request

    monitor = Monitor(steps)
    dead = monitor.steps
    dead.close()
    monitor._start_anew(dead)
    heir = monitor.steps
    monitor._start_anew(dead)
    assert monitor.steps is heir
    assert monitor.enter(1) == 1


def test_close_waits_for_who_is_inside_also_if_a_dead_generator_was_put_back():
    """A slow thread that started an heir puts it back after this heir has ended and has heirs of its own."""
    inside, leave, left = threading.Event(), threading.Event(), []

    def steps():
        while True:
            request = yield
            request()

    def stay():
        inside.set()
        assert leave.wait(DEADLINE)
        left.append(True)

    monitor = Monitor(steps)
    dead = monitor.steps
    with pytest.raises(ZeroDivisionError):
        monitor.enter(lambda: 1 // 0)
    thread = threading.Thread(target=monitor.enter, args=(stay,))
    thread.start()
    assert inside.wait(DEADLINE)
    monitor.steps = dead
    threading.Timer(0.05, leave.set).start()
    monitor.close()
    assert left
    thread.join()


def test_a_monitor_that_is_closed_while_an_heir_is_started_ends_it():
    def steps():
        while True:
            yield

    monitor = Monitor(steps)
    dead = monitor.steps
    dead.close()
    start, heirs = monitor._start, []

    def start_late():
        heirs.append(start())
        monitor.close()  # as another thread would, right here
        return heirs[0]

    monitor._start = start_late
    with pytest.raises(MonitorClosed):
        monitor._start_anew(dead)
    assert getattr(heirs[0], "_generator", heirs[0]).gi_frame is None
