"""Signal handlers that run in the middle of an operation: those that raise, and those that use the ring."""

from __future__ import annotations

import _thread
import contextlib
import queue
import random
import signal
import sys
import threading
import time

import pytest
from conftest import DEADLINE, WINDOWS

from shmring import Ring, RingClosed

# Before 3.11 the interpreter runs signal handlers between a call's return and the use of its result,
# so that an exception can lose what any function returns.
EXACT = sys.version_info >= (3, 11)
SECONDS = 1.5 if WINDOWS else 0.6
ENOUGH = 10  # interrupts
MANY = 2000 if WINDOWS else 100  # messages in a round, which lasts longer than the timer takes to come
TIMES = 20 if WINDOWS else 100  # interrupts of a wait, which may take a slice each


class Timer:
    """Has the system send a signal after some time."""

    number = getattr(signal, "SIGALRM", None)

    def start(self, seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self):
        signal.setitimer(signal.ITIMER_REAL, 0)


class ThreadAsTimer:
    """The same where the system has no such timer: a thread has the interpreter run SIGINT's handler."""

    number = signal.SIGINT

    def __init__(self):
        self._delays = queue.SimpleQueue()  # in C: an exception in the midst of it leaves nothing locked
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-3)  # the least that there is: it gets its turn at any moment
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        for delay in iter(self._delays.get, None):
            if not self._delays.empty():
                continue  # it was set anew
            end = time.perf_counter() + delay
            while time.perf_counter() < end:
                time.sleep(0)
            _thread.interrupt_main()

    def start(self, seconds):
        self._delays.put(seconds)

    def stop(self):
        self._delays.put(None)
        self._thread.join(DEADLINE)
        sys.setswitchinterval(self._interval)


class Bursts:
    """A timer whose signals come at random moments; `handle` runs in the midst of things."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.handle = None
        self.count = 0

    def fire(self):
        # Mostly soon, and now and then so late that even a long operation gets to its end.
        self._timer.start(self.random.uniform(2e-6, self.random.choice([150e-6, 20e-3])))

    def go_on(self, end, count):
        """Is it not yet time to end, or have there been too few interrupts, and it is not late?"""
        now = time.monotonic()
        return now < end or (count <= ENOUGH and now < end + DEADLINE)

    def _handler(self, *_):
        handle, self.handle = self.handle, None  # once, until it is armed again
        if handle:
            self.count += 1
            handle()

    def __enter__(self):
        self._timer = Timer() if hasattr(signal, "setitimer") else ThreadAsTimer()
        self._before = signal.signal(self._timer.number, self._handler)
        return self

    def __exit__(self, *_):
        self.handle = None
        self._timer.stop()
        signal.signal(self._timer.number, self._before)

    def interrupted(self, function):
        """Call `function` until a KeyboardInterrupt ends it, or it returns; was it interrupted?"""
        try:
            self.handle = self._raise
            self.fire()
            try:
                function()
            finally:
                self.handle = None  # also after an exception: what it raises is not for who called
            return False
        except KeyboardInterrupt:
            return True

    @staticmethod
    def _raise():
        raise KeyboardInterrupt


@pytest.fixture
def bursts(seed):
    with Bursts(seed) as bursts:
        yield bursts


@pytest.fixture(params=[1, 5000], ids=["short", "long"])
def size(request):
    return request.param


def message(number, size):
    """One that can be told from a torn one."""
    body = b"%08d" % number
    return body * (1 + number % 7 * size // 40)


def number_of(some):
    assert some[:8] * (len(some) // 8) == some, "torn"
    return int(some[:8])


WRITES = {
    "write": lambda ring, many: [ring.write(one, timeout=0) for one in many],
    "try_write": lambda ring, many: [ring.try_write(one) or pytest.fail("no room") for one in many],
    "write_many": lambda ring, many: ring.write_many(many, timeout=0),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_write_that_is_interrupted_has_written_its_message_once_or_not_at_all(name, bursts, size, way):
    with Ring.create(name, 1 << 20) as ring, Ring.open(name) as reader:
        number, end, hit = 0, time.monotonic() + SECONDS, 0
        while bursts.go_on(end, hit):
            sent, sure = [message(number + i, size) for i in range(20)], []

            def write(sent=sent, sure=sure):
                if way == "write_many":
                    sure.append(WRITES[way](ring, sent))
                else:
                    for one in sent:
                        WRITES[way](ring, [one])
                        sure.append(1)

            hit += bursts.interrupted(write)
            got = [number_of(one) for one in reader.messages(timeout=0)]
            assert got == list(range(number, number + len(got)))
            assert sum(sure) <= len(got) <= (sum(sure) + 1 if way != "write_many" else 20)
            number += 20
            if len(got) < 20:
                ring.write_many(sent[len(got) :])
                assert len(reader.read_many()) == 20 - len(got)
        assert hit > ENOUGH
        assert ring.stats().messages_in >= ring.stats().messages_out - hit


READS = {
    "read": lambda ring, timeout: [ring.read(timeout=timeout)],
    "read max_len": lambda ring, timeout: [ring.read(max_len=1 << 20, timeout=timeout)],
    "read_many": lambda ring, timeout: ring.read_many(timeout=timeout),
    "read_many(3)": lambda ring, timeout: ring.read_many(3, timeout=timeout),
    "try_read": lambda ring, timeout: [one] if (one := ring.try_read()) is not None else [],
}


def account(got, total, hit):
    """Everything once and in order; where Python itself loses results, only that nothing is doubled."""
    numbers = [number_of(one) for one in got]
    assert len(set(numbers)) == len(numbers), "doubled"
    assert numbers == sorted(numbers), "out of order"
    missing = sorted(set(range(total)) - set(numbers))
    assert not (missing and EXACT), f"{len(missing)} of {total} lost with {hit} interrupts: {missing[:10]}"
    assert hit > ENOUGH


@pytest.mark.parametrize("way", READS)
def test_a_read_that_is_interrupted_does_not_lose_its_message(name, bursts, size, way):
    """Filled before, so that each read finds something."""
    got, total, hit = [], 0, 0
    with Ring.create(name, 1 << 21) as ring:

        def read():
            with contextlib.suppress(TimeoutError):
                while True:
                    some = READS[way](ring, 0)
                    if not some:  # no walrus in the `while`: a signal handler may run after it
                        return
                    got.extend(some)

        end = time.monotonic() + SECONDS
        while bursts.go_on(end, hit):
            total += ring.write_many([message(total + i, size) for i in range(MANY)], timeout=0)
            while bursts.interrupted(read):
                hit += 1
        account(got, total, hit)


@pytest.mark.parametrize("way", ["read", "read max_len", "read_many", "loop"])
def test_a_read_that_waits_and_is_interrupted_does_not_lose_its_message(name, bursts, way):
    """Another thread writes, one message after the other, so that each read waits for a moment."""
    got, hit, total = [], 0, 0
    end, over = time.monotonic() + 2 * SECONDS, threading.Event()
    with Ring.create(name, 1 << 20, spin=0) as ring:

        def write():
            nonlocal total
            while not over.is_set():
                ring.write(message(total, 1), timeout=DEADLINE)
                total += 1
                time.sleep(20e-6)

        def read():
            while bursts.go_on(end, hit):
                if way == "loop":
                    for one in ring.messages(timeout=0.01):
                        got.append(one)
                else:
                    got.extend(READS[way](ring, 0.01))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            while bursts.go_on(end, hit):
                with contextlib.suppress(TimeoutError):
                    hit += bursts.interrupted(read)
        finally:
            bursts.handle = None
            over.set()
            thread.join()
        got.extend(ring.messages(timeout=0))
        account(got, total, hit)


def test_a_loop_that_is_interrupted_loses_no_message(name, bursts, size):
    got, total, hit = [], 0, 0
    with Ring.create(name, 1 << 21) as ring:
        end = time.monotonic() + SECONDS
        while bursts.go_on(end, hit):
            total += ring.write_many([message(total + i, size) for i in range(MANY)], timeout=0)

            def read():
                for one in ring.messages(timeout=0):
                    got.append(one)

            while bursts.interrupted(read):
                hit += 1
        account(got, total, hit)


def test_an_interrupted_wait_leaves_a_handle_that_works(name, bursts):
    with Ring.create(name, 4096, spin=0) as ring, Ring.open(name, spin=0) as writer:
        writer.write(bytes(4000))
        for _ in range(TIMES):
            assert bursts.interrupted(lambda: writer.write(bytes(4000), timeout=DEADLINE))
        assert ring.read() == bytes(4000)
        for _ in range(TIMES):
            assert bursts.interrupted(lambda: ring.read(timeout=DEADLINE))
        assert ring.stats().messages_in == ring.stats().messages_out == 1
        writer.write(b"works")
        assert ring.read() == b"works"


# ---------------------------------------------------------------- handlers that use the ring


@pytest.mark.parametrize("others", [0, 2])
def test_a_handler_that_uses_the_ring_succeeds_or_is_refused_but_never_hangs(name, bursts, others):
    """Everything that was acknowledged is accounted for, whoever did it."""
    wrote, got, refused = [], [], []
    stop = threading.Event()
    with Ring.create(name, 1 << 16) as ring:

        def use():
            for operation in (
                lambda: ring.try_write(b"handler") and wrote.append(b"handler"),
                lambda: (one := ring.try_read()) is None or got.append(one),
                lambda: got.extend(ring.read_many(timeout=0)),
                lambda: ring.write_many([b"many"] * 2, timeout=0) and wrote.extend([b"many"] * 2),
            ):
                try:
                    operation()
                except RuntimeError as error:
                    assert "signal handler" in str(error)
                    refused.append(error)
                except TimeoutError:
                    pass

        def stream():
            while not stop.is_set():
                if ring.try_write(b"thread"):
                    wrote.append(b"thread")
                if (one := ring.try_read()) is not None:
                    got.append(one)

        threads = [threading.Thread(target=stream) for _ in range(others)]
        for thread in threads:
            thread.start()
        try:
            end = time.monotonic() + SECONDS
            while bursts.go_on(end, bursts.count if refused or others else 0):
                bursts.handle = use
                bursts.fire()
                for _ in range(40):
                    with contextlib.suppress(TimeoutError):
                        ring.write(b"main", timeout=0)
                        wrote.append(b"main")
                    with contextlib.suppress(TimeoutError):
                        got.append(ring.read(timeout=0))
                    with contextlib.suppress(TimeoutError):
                        got.extend(ring.read_many(timeout=0))
        finally:
            bursts.handle = None
            stop.set()
            for thread in threads:
                thread.join(DEADLINE)
        assert not any(thread.is_alive() for thread in threads)
        got.extend(ring.messages(timeout=0))
    assert bursts.count > ENOUGH and (refused or others)
    assert sorted(got) == sorted(wrote)


def test_a_handler_that_closes_the_ring_closes_it_or_is_refused(name, bursts):
    closed = 0
    for _ in range(2 * TIMES):
        ring = Ring.create(name, 4096)
        outcome = []

        def close(ring=ring, outcome=outcome):
            try:
                ring.close()
                outcome.append("closed")
            except RuntimeError:
                outcome.append("refused")

        bursts.handle = close
        bursts.fire()
        try:
            while not outcome:
                ring.write(b"x")
                ring.read()
        except RingClosed:
            pass
        assert ring.closed == (outcome == ["closed"])
        closed += ring.closed
        if not ring.closed:
            ring.write(b"works")
            while ring.read() != b"works":
                pass
        ring.close()
        ring.close()
    assert closed
