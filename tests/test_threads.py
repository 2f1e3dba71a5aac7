"""Threads of one process on one handle: everything accounted for, and whoever waits is woken."""

from __future__ import annotations

import _thread
import signal
import threading
import time

import pytest
from conftest import DEADLINE, wait_until

from shmring import Ring, RingClosed, RingTimeout, _reading, _ring, _writing
from shmring._backend import os_backend


@pytest.fixture(autouse=True)
def no_periodic_look(endless):
    """The protocol alone has to wake who sleeps."""


@pytest.fixture(params=[0.0, None], ids=["no spin", "spin"])
def ring(name, request):
    with Ring.create(name, 4096, writers=8, spin=request.param) as ring:
        yield ring


class Thread(threading.Thread):
    """Hands its function's result, or exception, over at `result`."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self._call = function, args, kwargs
        self.start()

    def run(self):
        function, args, kwargs = self._call
        try:
            self._result = function(*args, **kwargs)
        except BaseException as error:
            self._result = error

    def result(self):
        self.join(DEADLINE)
        assert not self.is_alive(), "a thread is stuck"
        return self._result


def parked(ring, readers=0, writers=0):
    wait_until(lambda: ring.stats().readers_parked >= readers and ring.stats().writers_parked >= writers, "parking")


# ---------------------------------------------------------------- everything accounted for


@pytest.mark.parametrize("writers, readers", [(4, 1), (1, 4), (3, 3)])
def test_threads_share_a_handle_and_everything_is_accounted_for(ring, writers, readers):
    number, size = 1500, 100

    def write(writer):
        for i in range(number):
            ring.write(b"%d %d" % (writer, i) + bytes(i % size))

    def read():
        got = []
        while (message := ring.read()) != b"end":
            got.append(message)
        return got

    reading = [Thread(read) for _ in range(readers)]
    for thread in [Thread(write, writer) for writer in range(writers)]:
        assert thread.result() is None
    for _ in reading:
        ring.write(b"end")
    got = [thread.result() for thread in reading]
    expected = {b"%d %d" % (writer, i) + bytes(i % size) for writer in range(writers) for i in range(number)}
    assert sorted(message for some in got for message in some) == sorted(expected)
    for some in got:  # each writer's messages come in their order, to each reader
        numbers = [tuple(map(int, message.rstrip(b"\0").split())) for message in some]
        for writer in range(writers):
            of_this = [i for w, i in numbers if w == writer]
            assert of_this == sorted(of_this)


def test_threads_write_and_read_many_at_once(ring):
    def write(writer):
        for start in range(0, 3000, 100):
            assert ring.write_many([b"%d %d" % (writer, i) for i in range(start, start + 100)]) == 100

    def read():
        while True:
            got.extend(ring.read_many())
            if len(got) == 6000:
                return

    got = []
    reading = Thread(read)
    for thread in [Thread(write, writer) for writer in range(2)]:
        assert thread.result() is None
    assert reading.result() is None
    assert sorted(got) == sorted(b"%d %d" % (writer, i) for writer in range(2) for i in range(3000))


def test_threads_with_a_ring_each_do_not_meet(name):
    """What batches of one size share is the process's: without a GIL a view of it would be counted wrong."""
    failures = []

    def work(number):
        batch = [bytes([number]) * 8] * 100
        try:
            with Ring.create(f"{name}-{number}", 1 << 16, writers=1) as ring:
                for _ in range(3000):
                    ring.write_many(batch)
                    assert ring.read_many() == batch
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_ping_pong_of_sleepers_loses_no_wake_up(name):
    with Ring.create(name, 4096, spin=0) as there, Ring.create(name + "-back", 4096, spin=0) as back:

        def answer():
            for message in there:
                back.write(message)

        thread = Thread(answer)
        for i in range(2000):
            there.write(b"%d" % i)
            assert back.read(timeout=DEADLINE) == b"%d" % i
        there.close()
        assert thread.result() is None


def test_a_writer_that_waits_for_room_for_long_messages_is_woken_each_time(ring):
    messages = [bytes([i]) * (1 + i * 523 % 4088) for i in range(250)]

    def write():
        for message in messages:
            ring.write(message)

    thread = Thread(write)
    assert [ring.read(timeout=DEADLINE) for _ in messages] == messages
    assert thread.result() is None


# ---------------------------------------------------------------- waking


def test_close_wakes_a_blocked_read_and_a_blocked_write(ring):
    ring_b = Ring.open(ring.name)
    calls = [
        lambda: ring.read(), lambda: ring.read(bytearray(9)), lambda: ring.read_many(), lambda: ring.read(timeout=1e6),
    ]  # fmt: skip
    readers = [Thread(call) for call in calls]
    parked(ring, readers=1)
    wait_until(lambda: ring.stats().reader_parks >= 4, "parking of all")
    ring.close()
    assert [type(thread.result()) for thread in readers] == [RingClosed] * 4
    ring_b.write(bytes(4000))
    writers = [Thread(ring_b.write, bytes(4000)), Thread(ring_b.write_many, [bytes(4000)] * 2)]
    parked(ring_b, writers=1)
    wait_until(lambda: ring_b.stats().writer_parks >= 2, "parking of all")
    ring_b.close()
    assert [type(thread.result()) for thread in writers] == [RingClosed] * 2


def test_a_loop_ends_quietly_when_another_thread_closes_the_handle(ring):
    thread = Thread(lambda: list(ring))
    ring.write(b"1")
    ring.write(b"2")
    wait_until(lambda: ring.stats().messages_out == 2 and ring.stats().readers_parked, "parking")
    ring.close()
    assert thread.result() == [b"1", b"2"]


def test_nobody_waits_for_a_thread_that_sleeps(ring):
    thread = Thread(ring.read)
    parked(ring, readers=1)
    assert ring.try_read() is None
    with pytest.raises(RingTimeout):
        ring.read(timeout=0)
    with pytest.raises(RingTimeout):
        ring.read_many(timeout=0.01)
    ring.write(b"x")
    assert thread.result() == b"x"

    ring.write(bytes(4000))
    thread = Thread(ring.write, bytes(3000))
    parked(ring, writers=1)
    assert not ring.try_write(bytes(3001))
    assert ring.try_write(bytes(8))  # there is room for this one
    with pytest.raises(RingTimeout):
        ring.write_many([bytes(3002)], timeout=0.01)
    assert ring.read() == bytes(4000)
    assert thread.result() is None
    assert sorted(map(len, ring.read_many())) == [8, 3000]


def test_threads_that_wait_have_deadlines_of_their_own(ring):
    patient = Thread(ring.read)
    hasty = [Thread(ring.read, timeout=timeout) for timeout in (0.01, 0.02, 0.03)]
    assert [type(thread.result()) for thread in hasty] == [RingTimeout] * 3
    assert patient.is_alive()
    ring.write(b"x")
    assert patient.result() == b"x"


def test_every_sleeping_thread_gets_its_message(ring):
    threads = [Thread(ring.read) for _ in range(8)]
    wait_until(lambda: ring.stats().reader_parks >= 8, "parking of all")
    other = Ring.open(ring.name)
    for i in range(8):
        other.write(b"%d" % i)
    assert sorted(thread.result() for thread in threads) == [b"%d" % i for i in range(8)]
    other.close()


def test_a_handler_that_closes_what_another_thread_closes_is_refused(name, monkeypatch):
    """The other one waits for this thread to leave the writer, and must not be waited for in there."""
    ring = Ring.create(name, 4096)
    ring.write(b"")
    closing, refused = [], []
    real = _writing.record_bytes

    def record_bytes(size):  # called inside the writer's monitor, as a signal handler may be
        if size == 77:
            closing.append(Thread(ring.close))
            wait_until(lambda: ring._writer.monitor._closed, "the other thread in close")
            with pytest.raises(RuntimeError, match="signal handler"):
                ring.close()
            refused.append(True)
        return real(size)

    monkeypatch.setattr(_writing, "record_bytes", record_bytes)
    ring.write(bytes(77))
    assert closing[0].result() is None and refused == [True] and ring.closed


def test_who_looks_whether_it_may_sleep_sees_a_lane_that_another_thread_takes_up_meanwhile(ring):
    """It has looked at the lanes that the handle knew, and then it is not new to the handle any more."""

    class Lanes(list):
        """At the end of the first look at them, another thread has taken one up, and one of its two messages."""

        looked = False

        def __iter__(self):
            yield from super().__iter__()
            if not self.looked:
                self.looked = True
                assert Thread(ring.try_read).result() == b"1"

    ring.join()
    ring._reader._lanes = Lanes()
    ring.write_many([b"1", b"2"])
    assert not ring._reader.nothing()


def test_a_message_that_another_thread_reads_before_an_interrupted_call_gives_it_back_comes_once(ring, monkeypatch):
    got, real_free, real_give_back = [], _reading.Reader._free, _reading.Reader.give_back

    def free(self, *args):
        monkeypatch.setattr(_reading.Reader, "_free", real_free)
        raise KeyboardInterrupt  # it is noted as taken, but not yet out of the ring

    def give_back(self, request):
        got.append(Thread(ring.read, timeout=DEADLINE).result())
        real_give_back(self, request)

    monkeypatch.setattr(_reading.Reader, "_free", free)
    monkeypatch.setattr(_reading.Reader, "give_back", give_back)
    ring.write(b"once")
    with pytest.raises(KeyboardInterrupt):
        ring.read(max_len=100)
    assert got == [b"once"] and ring.try_read() is None


def test_stats_beside_a_close_say_how_it_is_or_that_it_is_closed(name):
    for _ in range(100):
        ring = Ring.create(name, 4096, writers=20)

        def look(ring=ring):
            try:
                while True:
                    ring.stats()
            except RingClosed:
                return "closed"

        threads = [Thread(look) for _ in range(2)]
        ring.write(b"")
        ring.close()
        assert [thread.result() for thread in threads] == ["closed"] * 2


def test_stats_of_a_reader_that_is_closed_in_the_midst_of_them_say_how_it_is_or_that_it_is_closed(name, monkeypatch):
    ring = Ring.create(name, 4096)
    ring.write(b"")
    ring.read()
    claimed = _reading.Reader.claimed

    def close_after(reader):
        answer = claimed.fget(reader)
        ring.close()  # as another thread would
        return answer

    monkeypatch.setattr(_reading.Reader, "claimed", property(close_after))
    with pytest.raises(RingClosed):
        ring.stats()


def test_a_writer_whose_handle_is_closed_before_it_knows_when_to_look_again_is_told_so(name, monkeypatch):
    ring = Ring.create(name, 4096)
    ring.write(bytes(4000))
    parking, close = ring._writer.parking, ring.close

    class Layout:
        compete = False

        @property
        def broadcast(self):
            close()  # as another thread would
            return False

    monkeypatch.setattr(ring, "_segment", SegmentWith(ring._segment, Layout()))
    ring._look_again(parking, None)
    assert ring.closed


class SegmentWith:
    """A segment with another layout."""

    def __init__(self, segment, layout):
        self._segment, self.layout = segment, layout

    def __getattr__(self, name):
        return getattr(self._segment, name)


def test_handles_that_are_closed_under_running_threads_end_them(name):
    """Whatever a thread is doing, it gets RingClosed, and close returns."""
    for turn in range(30):
        ring = Ring.create(name, 4096)

        def stream(ring=ring, turn=turn):
            try:
                while True:
                    ring.write(b"x" * turn), ring.try_read(), ring.write_many([b"y"] * 3), ring.read_many()
            except RingClosed:
                return "closed"

        threads = [Thread(stream) for _ in range(3)]
        wait_until(lambda ring=ring: ring.stats().messages_out > 20, "messages")
        ring.close()
        assert [thread.result() for thread in threads] == ["closed"] * 3


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("block", ["read", "read_many", "loop", "write"])
@pytest.mark.parametrize("others", [0, 3])
def test_ctrl_c_ends_a_wait_also_with_other_threads_about(name, block, others, monkeypatch):
    monkeypatch.setattr(os_backend, "SLICE", 0.2)  # a signal just before the system call is noticed only then
    with Ring.create(name, 4096, spin=0) as ring:
        calls = {
            "read": lambda: ring.read(timeout=DEADLINE),
            "read_many": lambda: ring.read_many(timeout=DEADLINE),
            "loop": lambda: list(ring.messages(timeout=DEADLINE)),
            "write": lambda: ring.write(bytes(4000), timeout=DEADLINE),
        }
        if block == "write":
            ring.write(bytes(4000))
        about = [Thread(calls[block]) for _ in range(others)]
        expecting = threading.Event()

        def parks():
            return ring.stats().writer_parks if block == "write" else ring.stats().reader_parks

        def interrupt():
            expecting.wait()
            before = parks()  # the others may park several times
            wait_until(lambda: parks() > before + others, "parking")
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            else:
                _thread.interrupt_main()  # what Ctrl-C does, and no more: it ends no system call

        interrupting = Thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            expecting.set()
            calls[block]()
        assert interrupting.result() is None
        assert all(thread.is_alive() for thread in about)
        if block == "write":
            assert ring.read() == bytes(4000)
            assert ring.stats().messages_in >= 1
        else:
            ring.write(b"still works")
            assert others or ring.read() == b"still works"
        ring.close()
        for thread in about:
            thread.result()


# ---------------------------------------------------------------- a full lane


@pytest.fixture
def endless_patience(monkeypatch):
    """A writer waits for its share of the lane to be free for as long as that takes."""
    monkeypatch.setattr(_ring, "PATIENCE", 1e6)


def test_the_longest_message_after_the_longest_finds_room_at_every_offset(name, endless_patience):
    """What a full writer waits for is never more than what is free once everything is read, padding too."""
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        longest = bytes(ring.max_message)
        sent = [message for _ in range(4096 // 8) for message in (longest, longest, b"", b"x" * 40)]
        thread = Thread(lambda: [ring.write(message, timeout=DEADLINE) for message in sent])
        for message in sent:
            assert ring.read(timeout=DEADLINE) == message
        thread.result()


def test_a_full_writer_is_woken_for_a_share_of_its_lane_not_for_each_message(name, endless_patience):
    """Else the two sides would wait for each other with every message."""
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        ring.write(b"")
        ring.read()  # whoever claims the reader's role rings the writers
        while ring.try_write(bytes(56)):
            pass
        full = ring.stats().messages_in
        thread = Thread(ring.write, bytes(56), timeout=DEADLINE)
        wait_until(lambda: ring.stats().writers_parked, "the writer sleeps")
        for _ in range(4096 // 4 // 64):
            time.sleep(0.01)  # time for what must not happen
            assert ring.stats().messages_in == full
            ring.read()
        ring.read()  # a quarter, and the room that it needs
        thread.result()
        assert ring.stats().messages_in == full + 1


def test_a_full_writer_has_patience_for_a_moment_and_then_takes_what_it_needs(name):
    """A reader that takes one message and then none for long lets a writer on that needs no more."""
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        while ring.try_write(bytes(56)):
            pass
        thread = Thread(ring.write, bytes(56), timeout=DEADLINE)
        wait_until(lambda: ring.stats().writers_parked, "the writer sleeps")
        ring.read()
        thread.result()


def test_a_writer_with_patience_keeps_to_its_time_and_to_the_room_it_needs(name, endless_patience):
    """When its time is up it takes the room that there is; with none it raises."""
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        while ring.try_write(bytes(56)):
            pass
        ring.read()
        with pytest.raises(RingTimeout):
            for _ in range(2):
                ring.write(bytes(56), timeout=0.05)
        assert ring.stats().writer_parks <= 2
