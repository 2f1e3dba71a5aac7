"""Several readers that compete: each message to one of them, whatever happens to the others."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import random
import signal
import struct
import threading
import time

import pytest
from conftest import DEADLINE, KILLED, WINDOWS, Line, Words, wait_until
from support import in_place, kill_yourself

from shmring import BufferTooSmall, Ring, RingBusy, RingClosed, RingTimeout, _layout
from shmring import _ring as ring_module
from shmring._competing import HAS, PATIENCE
from shmring._parking import Parking

HOUR = 3600.0
needs_selectors = pytest.mark.skipif(WINDOWS, reason="selectors wait for nothing but sockets here")
needs_stop = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")


@pytest.fixture
def ring(name):
    """A handle that writes; it may read as well."""
    with Ring.create(name, 8192, writers=4, readers="compete", max_readers=4, spin=0) as ring:
        yield ring


@pytest.fixture
def opened(ring):
    """Makes more handles of it."""
    made = []

    def make(join=True):
        made.append(Ring.open(ring.name, spin=0))
        if join:
            made[-1].join()
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def unhelped(endless, monkeypatch):
    """Nobody looks again, and no wait is sliced: a wake-up that is lost is a test that hangs."""
    monkeypatch.setattr(ring_module, "MOURNING", HOUR)


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
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


def has_written(ring):
    """Its first message rings everybody, because a writer before may not have come to it."""
    ring.write(b"first")
    assert ring.try_read() == b"first"


def asleep(ring, count):
    wait_until(lambda: ring.stats().readers_parked == count, f"that {count} readers sleep")


def rings_first(ring, reader):
    """Have the ring's writer ring this reader, of those that sleep."""
    bells, slot = ring._writer._bells, reader._reader.slot
    entries = sorted(bells._entries or bells._all())
    bells._entries = entries[slot:] + entries[:slot]


def drain(ring):
    return list(iter(ring.try_read, None))


# ---------------------------------------------------------------- each message to one


@pytest.mark.parametrize("lane", [0, 1])
def test_try_read_finds_what_was_written_to_a_lane_that_it_has_just_served(ring, opened, lane):
    """What it has looked at before is old: others have taken the rest meanwhile."""
    one, two = opened(), opened()
    writers = ring, opened(join=False)
    for number, writer in enumerate(writers):
        writer.write(b"%d" % number)
    one.read()  # and it knows that there was another one
    assert len(two.read_many()) == 1
    writers[lane].write(b"late")
    assert one.try_read() == b"late"
    assert one.try_read() is two.try_read() is None


@pytest.mark.parametrize("sizes", [(100,), (100, 20, 3, 700)], ids=["equal", "mixed"])
def test_what_was_copied_ahead_counts_only_while_it_is_there(ring, opened, sizes):
    """Between the copy and the turn another one takes it all, and the writer writes over it, with other sizes."""
    one, two = opened(), opened()
    ring.write(b"first")
    assert one.read() == b"first"  # and it is its turn
    old = [bytes([number]) * sizes[number % len(sizes)] for number in range(20)]
    ring.write_many(old)
    reader, new = one._reader, []

    def copy_and_be_late(lane, most):
        del reader._copy_ahead
        copied = reader._copy_ahead(lane, most)
        assert len(copied[1]) > 1
        assert two.read_many() == old
        for number in itertools.count():
            new.append(bytes([number % 251]) * (number % 90))
            if not ring.try_write(new[-1]):
                new.pop()
                return copied

    reader._copy_ahead = copy_and_be_late
    assert one.read() == new[0]
    assert drain(one) == new[1:]
    assert len(new) > 100
    assert drain(two) == []


def test_who_took_over_and_loses_the_turn_before_it_takes_is_not_inside_any_more(ring, opened):
    """Else it sleeps inside, and all others wait for it."""
    one, two = opened(), opened()
    ring.write(b"x")
    reader, words = one._reader, one._segment.words

    def lose_the_turn(lane, most):
        """Another one has it half, and is not done with that."""
        del reader._copy_ahead
        assert words[reader._turn] == reader._ours and words[reader._inside] == 1
        assert two._segment.claim(_layout.TURN_CLAIM)
        words[reader._before], words[reader._turn] = reader._ours, two._reader._ours & ~HAS
        return 0, (), 0

    assert one.try_read() == b"x"
    assert two._reader._take()
    two._reader._give()
    ring.write(b"y")
    reader._copy_ahead, reader._refused = lose_the_turn, PATIENCE
    assert next(one._messages) is None
    assert words[reader._inside] == 0
    two._segment.release(_layout.TURN_CLAIM)
    assert two.read(timeout=DEADLINE) == b"y"


# ---------------------------------------------------------------- signal handlers that use another handle


def in_a_turn(ring, do):
    """Have `do` called once in the next turn of this handle to take one, as a signal handler is."""
    reader = ring._reader

    def check(*args):
        del reader._check
        do()
        return reader._check(*args)

    reader._check = check


def raised(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


BLOCKING = {
    "read": lambda ring: ring.read(),
    "read_many": lambda ring: ring.read_many(),
    "into a buffer": lambda ring: ring.read(bytearray(8192)),
    "in place": lambda ring: ring.borrow().__enter__(),
    "doorbell": lambda ring: ring.wait_doorbell() or pytest.fail("no message"),
    "loop": lambda ring: next(iter(ring)),
}


@pytest.mark.parametrize("way", BLOCKING)
def test_a_handler_that_reads_with_another_handle_in_a_turn_is_refused_and_leaves_the_turn_alone(
    ring, opened, in_time, way
):
    one, two, three = opened(), opened(), opened()
    outcome = []

    def handle():
        outcome.append(raised(BLOCKING[way], two))
        outcome.append(Thread(three.try_read).result())

    in_a_turn(one, handle)
    ring.write_many([b"1", b"2"])
    assert one.read() == b"1"
    assert outcome == [RuntimeError, None], "it is refused, and others are as well, as before"
    assert two.read() == b"2"
    assert one.try_read() is two.try_read() is three.try_read() is None


def test_a_handler_that_only_tries_finds_nothing(ring, opened, in_time):
    one, two = opened(), opened()
    outcome = []
    in_a_turn(one, lambda: outcome.append(raised(two.try_read)))
    ring.write_many([b"1", b"2"])
    assert one.read() == b"1"
    assert outcome == [None]
    assert two.read() == b"2"


# ---------------------------------------------------------------- who is woken


@needs_selectors
def test_who_takes_by_its_doorbell_and_works_on_has_another_woken_for_what_is_left(ring, opened, unhelped):
    """Not itself: it is awake, although it has announced itself."""
    import select

    readers = [opened(), opened()]
    has_written(ring)
    for each in readers:
        each.attach_doorbell()
        assert each.try_read() is None
    ring.write_many([b"1", b"2"])
    first = select.select(readers, [], [], DEADLINE)[0]
    assert len(first) == 1
    assert first[0].try_read() == b"1"  # and now it has to do
    (other,) = set(readers) - set(first)
    assert select.select([other], [], [], DEADLINE)[0] == [other]
    assert other.try_read() == b"2"


def read_for(ring, timeout):
    async def main():
        with contextlib.suppress(asyncio.TimeoutError, RingTimeout):
            await asyncio.wait_for(ring.read_async(timeout=timeout), 0.01)

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [0.001, DEADLINE], ids=["its time is up", "it is cancelled"])
def test_a_handle_whose_loop_is_over_is_not_rung(ring, opened, unhelped, timeout):
    one, two = opened(), opened()
    has_written(ring)
    read_for(one, timeout)
    thread = Thread(two.read)
    asleep(ring, 1)
    ring.write(b"x")
    assert thread.result() == b"x"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt], ids=["its time is up", "interrupted"])
def test_who_waits_for_the_doorbell_and_leaves_has_another_woken(ring, opened, unhelped, monkeypatch, error):
    """It was rung, and finds out that it was as it leaves."""
    one, two = opened(), opened()
    park = Parking.park

    def rung(self, *args):
        if self is not one._reader.parking:
            return park(self, *args)

        def last_look():
            ring.write(b"x")
            if error:
                raise error
            return True

        park(self, last_look, 0, time.perf_counter())
        raise RingTimeout("as if it had come too late to be seen")

    has_written(ring)
    assert one.try_read() is None  # it knows the lane
    thread = Thread(two.read)
    asleep(ring, 1)
    monkeypatch.setattr(Parking, "park", rung)
    rings_first(ring, one)
    if error:
        with pytest.raises(error):
            one.wait_doorbell(DEADLINE)
    else:
        assert not one.wait_doorbell(DEADLINE)
    assert thread.result() == b"x"


def test_a_message_wakes_one_and_each_in_turn(ring, opened, unhelped):
    """The writer rings who is next: all of them, by turns, where they sleep again each time."""
    got, rung, waiting = [], [], []

    def read(reader):
        while (message := reader.read(timeout=DEADLINE)) != b"end":
            got.append(message)

    def wait_for_all():
        # In the wait itself: who announces itself and looks once more may find the message, and ring for it.
        wait_until(lambda: len(waiting) == 3, "that all of them sleep")

    has_written(ring)
    readers = [opened() for _ in range(3)]
    for each in (ring, *readers):

        def ring_bell(bell, actual=each._segment.ring):
            rung.append(bell)
            return actual(bell)

        def wait(bell, noted, deadline, actual=each._segment.wait):
            waiting.append(bell)
            try:
                actual(bell, noted, deadline)
            finally:
                waiting.remove(bell)

        each._segment.ring, each._segment.wait = ring_bell, wait
    threads = [Thread(read, reader) for reader in readers]
    for number in range(12):
        wait_for_all()
        if number == 3:
            rung.clear()  # a bell may be one that was rung before they slept, which ends a first wait at once
        ring.write(b"%d" % number)
        wait_until(lambda due=number + 1: len(got) == due, "that one has read")
    wait_for_all()
    assert rung == rung[:3] * 3 and len(set(rung)) == 3
    ring.write_many([b"end"] * 3)
    for thread in threads:
        thread.result()


def test_a_batch_wakes_as_many_as_there_are_messages(ring, opened, unhelped):
    has_written(ring)
    threads = [Thread(opened().read) for _ in range(3)]
    asleep(ring, 3)
    ring.write_many([b"1", b"2"])
    wait_until(lambda: ring.stats().messages_out == 3, "that two are read")
    asleep(ring, 1)
    ring.write(b"3")
    assert sorted(thread.result() for thread in threads) == [b"1", b"2", b"3"]


def test_a_reader_that_works_long_on_its_message_holds_nobody_up(ring, opened, unhelped):
    slow, quick = opened(), opened()
    has_written(ring)
    done = threading.Event()

    def work():
        message = slow.read()
        done.wait(DEADLINE)
        return message

    worker = Thread(work)
    asleep(ring, 1)
    ring.write(b"long")
    wait_until(lambda: ring.stats().messages_out == 2, "that it is read")
    for number in range(50):
        reader = Thread(quick.read)
        if number % 2:
            asleep(ring, 1)
        ring.write(b"%d" % number)
        assert reader.result() == b"%d" % number
    done.set()
    assert worker.result() == b"long"


@pytest.mark.parametrize("leaving", ["close", "its time is up", "interrupted", "cancelled"])
def test_who_was_rung_and_leaves_has_another_woken(ring, opened, unhelped, leaving):
    """It is awake for the message, which somebody else gets instead, at once."""
    one, two = opened(), opened()
    has_written(ring)
    rung, looks, go = threading.Event(), threading.Event(), threading.Event()
    enter = one._enter_reader

    def last_look(request):
        """Rung, it does not come to its next look in time."""
        if rung.is_set():
            looks.set()
            go.wait(DEADLINE)
            if leaving == "interrupted":
                raise KeyboardInterrupt
            return None
        return enter(request)

    ring_bell = ring._segment.ring
    bell = ring._segment.layout.reader_block(one._reader.slot) + _layout.READER_BELL

    def tell_and_ring(which):
        if which == bell:
            rung.set()
        return ring_bell(which)

    ring._segment.ring = tell_and_ring
    one._enter_reader = last_look
    rings_first(ring, one)
    if leaving == "cancelled":
        leaver = Thread(asyncio.run, cancelled_as_it_is_rung(one, rung, go))
    else:
        leaver = Thread(one.read, max_len=9, timeout=0.5 if leaving == "its time is up" else DEADLINE)
    asleep(ring, 1)
    other = Thread(two.read)
    asleep(ring, 2)
    ring.write(b"x")
    assert rung.wait(DEADLINE)
    if leaving == "its time is up":
        time.sleep(0.5)
    if leaving == "close":
        assert looks.wait(DEADLINE)  # or it would still take the message
        del one._enter_reader
        one.close()
    go.set()
    assert other.result() == b"x"
    with pytest.raises((RingClosed, RingTimeout, KeyboardInterrupt)):
        leaver.result()
    with contextlib.suppress(AttributeError):
        del one._enter_reader


async def cancelled_as_it_is_rung(ring, rung, go):
    """A task is cancelled in the same round of its loop in which it is told."""
    task = asyncio.ensure_future(ring.read_async())
    await asyncio.sleep(0)
    watch = ring._watches[ring._reader]
    heard = watch._heard

    def hear():
        heard()
        task.cancel()
        rung.set()

    if WINDOWS:
        watch._heard = hear
    else:
        asyncio.get_running_loop().add_reader(watch._doorbell.fileno(), hear)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    raise RingTimeout("cancelled")


# ---------------------------------------------------------------- all ways to read


def into_buffer(ring):
    buffer = bytearray(1 << 16)
    size = ring.read(buffer)
    return [bytes(buffer[:size])]


def after_doorbell(ring):
    assert ring.wait_doorbell(DEADLINE)
    return [ring.try_read()]


WAYS = {
    "read": lambda ring: [ring.read()],
    "try_read": lambda ring: [ring.try_read()],
    "read_many": lambda ring: ring.read_many(1),
    "iterated": lambda ring: [next(iter(ring))],
    "max_len": lambda ring: [ring.read(max_len=1 << 16)],
    "into a buffer": into_buffer,
    "in place": lambda ring: [in_place(ring)],
    "after its doorbell": after_doorbell,
    "awaited": lambda ring: [asyncio.run(ring.read_async())],
    "awaited, many": lambda ring: asyncio.run(ring.read_many_async(1)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_takes_each_message_once(name, way, seed):
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        ring = stack.enter_context(Ring.create(name, 8192, writers=2, readers="compete"))
        second, one, two = (stack.enter_context(Ring.open(name)) for _ in range(3))
        numbers, got = {ring: itertools.count(), second: itertools.count()}, {one: [], two: []}
        sizes = [0, 8, 8, 8, 100, 1024, 1025, 4000, ring.max_message - 12]
        total = 0
        for _ in range(150):
            size, count = rng.choice(sizes), rng.choice([1, 1, 3, 8])
            for writer in (ring, second):
                for _ in range(count if size < 600 else 1):
                    head = struct.pack("=IQ", 0 if writer is ring else 1, next(numbers[writer]))
                    total += writer.try_write(head + b"-" * size) or next_is_not(numbers, writer)
            for _ in range(rng.choice([0, count])):
                reader = rng.choice([one, two])
                if sum(map(len, got.values())) < total:
                    got[reader] += WAYS[way](reader)
        for reader in itertools.cycle(got):
            if sum(map(len, got.values())) == total:
                break
            got[reader] += WAYS[way](reader)
        assert one.try_read() is two.try_read() is None
        everything = [message[:12] for messages in got.values() for message in messages]
        expected = [struct.pack("=IQ", w, n) for w, each in enumerate(numbers.values()) for n in range(next(each))]
        assert sorted(everything) == sorted(expected)
        for messages in got.values():
            for writer in range(2):
                mine = [struct.unpack_from("=IQ", message)[1] for message in messages if message[0] == writer]
                assert mine == sorted(mine), "each reader gets each writer's in their order"
        assert ring.stats().messages_out == ring.stats().messages_in == total


def next_is_not(numbers, writer):
    """There was no room: the number comes again."""
    numbers[writer] = itertools.count(next(numbers[writer]) - 1)
    return 0


def test_a_message_that_is_too_long_for_one_stays_for_others(ring, opened):
    one, two = opened(), opened()
    ring.write_many([b"long" * 100, b"x"])
    for attempt in (lambda: one.read(max_len=399), lambda: one.read(bytearray(399))):
        with pytest.raises(BufferTooSmall) as caught:
            attempt()
        assert caught.value.needed == 400
    assert two.read(max_len=400) == b"long" * 100
    assert one.read(max_len=1) == b"x"


def test_a_message_in_place_is_out_for_the_others_at_once_whatever_comes_of_it(ring, opened):
    one, two = opened(), opened()
    ring.write_many([b"1", b"2", b"3", b"4"])
    with one.borrow() as view:
        assert two.read() == b"2"
        assert view == b"1"
        with pytest.raises(RingBusy, match="in place"):
            one.try_read()
    with pytest.raises(ZeroDivisionError), one.borrow() as view:
        assert view == b"3" and view.readonly
        raise ZeroDivisionError
    with pytest.raises(BufferError), one.borrow() as view:
        used = pickle.PickleBuffer(view)
    with pytest.raises(RingBusy):
        one.try_read()
    assert two.try_read() is None and bytes(used) == b"4"
    used.release()
    ring.write(b"5")
    assert one.read() == b"5"
    with pytest.raises(RingTimeout), one.borrow(timeout=0):
        pass


def test_a_handle_that_is_closed_in_the_block_leaves_its_slot_when_the_view_is_gone(ring, opened):
    one = opened()
    ring.write(b"1")
    with one.borrow() as view:
        used = pickle.PickleBuffer(view)
        one.close()
    assert bytes(used) == b"1"
    used.release()
    del view, used
    wait_until(lambda: ring.readers_alive() == 0, "that its slot is free")


@needs_selectors
def test_doorbells_in_selectors(ring, opened, unhelped):
    import select

    readers = [opened() for _ in range(3)]
    got = []
    for each in readers:
        each.attach_doorbell()
    has_written(ring)
    for number in range(30):
        for each in readers:
            while (message := each.try_read()) is not None:
                got.append(message)
        ring.write(b"%d" % number)
        ready = select.select(readers, [], [], DEADLINE)[0]
        assert len(ready) == 1
        got.append(ready[0].try_read())
    assert got == [b"%d" % number for number in range(30)]


@pytest.mark.parametrize("loops", [1, 2])
def test_tasks_of_one_and_of_two_loops(ring, unhelped, loops):
    got = []

    async def read(count):
        with Ring.open(ring.name) as each:
            async for message in each:
                if message == b"end":
                    return
                got.append(message)
                if len(got) % 7 == 0:
                    await asyncio.sleep(0)

    async def main(count):
        await asyncio.wait_for(asyncio.gather(*(read(count) for _ in range(count))), DEADLINE)

    threads = [Thread(asyncio.run, main(4 // loops)) for _ in range(loops)]
    messages = [b"%d" % number for number in range(2000)]
    for message in messages:
        ring.write(message, timeout=DEADLINE)
    for _ in range(4):
        ring.write(b"end", timeout=DEADLINE)
    for thread in threads:
        thread.result()
    assert sorted(got) == sorted(messages)


# ---------------------------------------------------------------- processes

CROWD = 4  # writers, and readers


def take_part(name, reader, counts):
    """Note each message that comes, until the end does; each reader in its own way."""
    way = [WAYS["read"], WAYS["in place"], lambda ring: ring.read_many(3), WAYS["into a buffer"]][reader]
    with Ring.open(name) as ring:
        ring.join()
        while True:
            for message in way(ring):
                if not message:
                    return
                (number,) = struct.unpack_from("=I", message)
                assert message == struct.pack("=I", number) * (len(message) // 4)
                counts[number] += 1
                counts[len_of(counts) - CROWD + reader] += 1


def len_of(counts):
    return len(counts.words)


@pytest.mark.parametrize("spin", [None, 0])
def test_a_crowd_of_processes_takes_each_message_once_and_nobody_starves(name, children, spin):
    each = 100
    counts = Words(CROWD * each + CROWD)

    def write(writer):
        with Ring.open(name, spin=spin) as ring:
            for number in range(each):
                number += writer * each
                ring.write(struct.pack("=I", number) * (1 + number % 7 * 50))

    try:
        with Ring.create(name, 8192, writers=CROWD + 1, readers="compete", max_readers=CROWD, spin=spin) as ring:
            readers = [children.start(take_part, name, reader, counts) for reader in range(CROWD)]
            wait_until(lambda: ring.readers_alive() == CROWD, "the readers")
            for writer in [children.start(write, writer) for writer in range(CROWD)]:
                assert children.join(writer) == 0
            # Some of them may have had nothing yet: it goes on until each has.
            wait_until(lambda: sum(counts.words[: CROWD * each]) == CROWD * each, "that all is taken")
            assert set(counts.words[: CROWD * each]) == {1}
            extra = struct.pack("=I", 0)

            def share():
                ring.write_many([extra] * 20)
                return min(counts.words[CROWD * each :])

            wait_until(share, "that each gets one")
            wait_until(lambda: ring.stats().messages_in == ring.stats().messages_out, "that all is taken")
            # A batch may have several of these.
            wait_until(lambda: not ring.readers_alive() or ring.try_write(b"") and False, "that all have ended")
            assert [children.join(pid) for pid in readers] == [0] * CROWD
    finally:
        counts.remove()


@pytest.mark.parametrize("with_message", [True, False])
def test_who_is_killed_in_its_turn_holds_nobody_up(name, children, with_message):
    """Inside, or when it had just taken the turn over by half."""
    with Ring.create(name, 4096, writers=1, readers="compete", max_readers=2) as ring:
        ring.join()
        ring.write(b"first")
        assert ring.read() == b"first"  # it is our turn

        def die():
            with Ring.open(name) as other:
                other.join()
                reader = other._reader
                if with_message:
                    assert reader._take()
                else:
                    reader._is_inside = lambda before: kill_yourself()
                    reader._take()
                kill_yourself()

        assert children.join(children.start(die)) == KILLED
        ring.write(b"second")
        assert ring.read(timeout=DEADLINE) == b"second"
        assert ring.try_read() is None


@needs_stop
def test_who_is_stopped_in_its_turn_holds_the_others_up_without_work_for_them(name, children, shared):
    told = shared(Line)

    def stop():
        with Ring.open(name) as other:
            other.join()
            assert other._reader._take()
            told.say()
            os.kill(os.getpid(), signal.SIGSTOP)
            other._reader._give()

    with Ring.create(name, 4096, writers=1, readers="compete", max_readers=2) as ring:
        pid = children.start(stop)
        told.hear()
        ring.write(b"it waits")
        before = time.process_time()
        with pytest.raises(RingTimeout):
            ring.read(timeout=1)
        assert time.process_time() - before < 0.5, "a wait works"
        os.kill(pid, signal.SIGCONT)
        assert ring.read(timeout=DEADLINE) == b"it waits"
        assert children.join(pid) == 0
