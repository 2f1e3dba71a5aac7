"""Several processes at one ring: by spawn, by fork where there are forks, killed, and interrupted."""

from __future__ import annotations

import _thread
import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest
from conftest import DEADLINE, KILLED, WINDOWS, Line, Words, segments, wait_until
from support import kill_yourself

from shmring import Ring, RingBusy, RingTimeout, unlink
from shmring._backend import os_backend

needs_kept = pytest.mark.skipif(WINDOWS, reason="rings cannot be kept here")

# Where there are no forks, each process costs a new interpreter.
ROUNDS, WRITERS = (3, 2) if WINDOWS else (25, 10)
IDLE = 0.05 if WINDOWS else 0.005  # seconds of processor time; Windows counts them in ticks of 16 ms

NUMBERED = struct.Struct("<IQ")  # writer, number


def message(writer, number):
    """A message that tells who wrote it, and whether it is whole; its size is different each time."""
    size = number * 2654435761 % (1 << 32) % 900
    return NUMBERED.pack(writer, number) + bytes([(writer + number) % 251]) * size


class Account:
    """Takes messages of many writers; each has to be whole, once, and in its writer's order."""

    def __init__(self):
        self.next = {}

    def take(self, data):
        writer, number = NUMBERED.unpack_from(data)
        assert data == message(writer, number), f"message {number} of writer {writer} is damaged"
        expected = self.next.setdefault(writer, 0)
        assert number == expected, f"writer {writer}: {number} came instead of {expected}"
        self.next[writer] += 1


def join_all(children, started):
    for child in started:
        if isinstance(child, int):
            assert children.join(child) == 0
        else:
            child.join(DEADLINE * 2)
            assert child.exitcode == 0


def opens(name):
    try:
        Ring.open(name).close()
    except FileNotFoundError:
        return False
    return True


def gone(name):
    """Is there neither a ring of this name nor, where rings are files, what is left of one?"""
    return not opens(name) and f"shmring.{name}" not in segments()


# ---------------------------------------------------------------- who writes what


def write_numbered(ring, writer, count, batch=1):
    for number in range(0, count, batch):
        if batch == 1:
            ring.write(message(writer, number))
        else:
            ring.write_many([message(writer, n) for n in range(number, min(number + batch, count))])


def read_each(ring, count):
    for _ in range(count):
        yield ring.read(timeout=DEADLINE)


def read_batches(ring, count):
    while count:
        batch = ring.read_many(100, timeout=DEADLINE)
        count -= len(batch)
        yield from batch


def read_by_iteration(ring, count):
    for _, data in zip(range(count), ring.messages(timeout=DEADLINE)):
        yield data


def read_into_buffer(ring, count):
    buffer = bytearray(1000)
    for _ in range(count):
        yield bytes(buffer[: ring.read(buffer, timeout=DEADLINE)])


READINGS = [read_each, read_batches, read_by_iteration, read_into_buffer]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("capacity", [4096, 65536])
def test_of_many_writers_every_message_arrives_once_and_in_its_writers_order(
    name, children, endless, reading, batch, capacity
):
    count = 400
    total = WRITERS * count
    with Ring.create(name, capacity, writers=WRITERS) as ring:
        pids = [children.start(write_numbered, ring, writer, count, batch) for writer in range(WRITERS)]
        account = Account()
        for data in reading(ring, total):
            account.take(data)
        join_all(children, pids)
        assert account.next == {writer: count for writer in range(WRITERS)}
        assert ring.try_read() is None
        stats = ring.stats()
        assert (stats.messages_in, stats.messages_out, stats.bytes_in) == (total, total, stats.bytes_out)
        assert stats.lanes_in_use == 0


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_of_many_spawned_writers_every_message_arrives_once_and_in_its_writers_order(name, children, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    count = 300
    with Ring.create(name, 8192, writers=WRITERS) as ring:
        started = [children.spawn(write_numbered, ring, writer, count, method=method) for writer in range(WRITERS)]
        account = Account()
        for data in ring.messages(timeout=DEADLINE):
            account.take(data)
            if sum(account.next.values()) == WRITERS * count:
                break
        join_all(children, started)
        assert account.next == {writer: count for writer in range(WRITERS)}


def test_a_spawned_reader_gets_what_writers_started_otherwise_write(name, children):
    with Ring.create(name, 4096, writers=3) as ring:
        reader = children.spawn(read_numbered, ring, {writer: 200 for writer in range(3)})
        pids = [children.start(write_numbered, ring, writer, 200) for writer in range(3)]
        join_all(children, [*pids, reader])


def read_numbered(ring, expected):
    account = Account()
    for data in read_each(ring, sum(expected.values())):
        account.take(data)
    assert account.next == expected


def test_more_writers_than_lanes_are_refused_and_get_their_turn_later(name, children, shared):
    told, ready = [shared(Line) for _ in range(3)], shared(Line)
    with Ring.create(name, writers=3) as ring:

        def hold(line):
            ring.write(b"held")
            ready.say()
            line.hear()

        pids = [children.start(hold, line) for line in told]
        ready.hear(3)
        with pytest.raises(RingBusy, match=r"3 lanes .*writers=3"):
            ring.write(b"one too many")
        told[0].say()
        wait_until(lambda: ring.stats().lanes_in_use == 2)
        ring.write(b"now")
        told[1].say(), told[2].say()
        join_all(children, pids)
        assert sorted(ring.read_many()) == [b"held"] * 3 + [b"now"]


def test_four_generations_of_writers_overlap_on_four_lanes(name, children, seed):
    rng = random.Random(seed)
    with Ring.create(name, 4096, writers=4) as ring:
        account, pids, started, number = Account(), [], 0, 9 if WINDOWS else 80
        while started < number or pids:
            while started < number and len(pids) < 4:
                pids.append(children.start(write_numbered, ring, started, rng.randrange(1, 60)))
                started += 1
            for data in iter(ring.try_read, None):
                account.take(data)
            for pid in pids[:]:
                status = children._poll(pid)
                if status:
                    assert status == (0,)
                    pids.remove(pid)
        for data in iter(ring.try_read, None):
            account.take(data)
        assert sorted(account.next) == list(range(number))
        assert sum(account.next.values()) == ring.stats().messages_in


# ---------------------------------------------------------------- asleep and awake


def test_a_blocked_writer_is_woken_by_the_reader(name, children, endless):
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        pid = children.start(write_numbered, ring, 1, 200)
        account = Account()
        for turn in range(200):
            if turn % 10 == 0 and ring.stats().messages_in < 200:
                wait_until(lambda: ring.stats().writers_parked or ring.stats().messages_in == 200)
            account.take(ring.read(timeout=DEADLINE))
        assert children.join(pid) == 0


def test_a_blocked_reader_is_woken_by_each_of_several_writers(name, children, shared, endless):
    told = shared(Line)
    with Ring.create(name, 4096, writers=5, spin=0) as ring:

        def read():
            for data in ring:
                told.say(data)

        def write_when_told(writer, line):
            while line.hear() == b"x":
                ring.write(b"%d" % writer)

        reader = children.start(read)
        lines = [shared(Line) for _ in range(5)]
        pids = [children.start(write_when_told, writer, line) for writer, line in enumerate(lines)]
        for writer in [0, 1, 2, 3, 4, 4, 3, 2, 1, 0, 0, 2, 4, 1, 3] * 4:
            wait_until(lambda: ring.stats().readers_parked, "the reader's sleep")
            lines[writer].say(b"x")
            assert told.hear() == b"%d" % writer
        for line in lines:
            line.say(b".")
        join_all(children, pids)
        children.kill(reader)


@pytest.mark.parametrize("spin", [0, None, 0.01])
def test_ping_pong_between_two_processes(name, children, endless, spin):
    with Ring.create(f"{name}-to", 4096, spin=spin) as to, Ring.create(f"{name}-back", 4096, spin=spin) as back:
        pid = children.start(echo, to, back, 2000)
        for number in range(2000):
            to.write(message(0, number))
            assert back.read(timeout=DEADLINE) == message(0, number)
        assert children.join(pid) == 0


def echo(to, back, count):
    for _ in range(count):
        back.write(to.read(timeout=DEADLINE))


def test_ping_pong_with_a_spawned_process(name, children):
    with Ring.create(f"{name}-to", 4096) as to, Ring.create(f"{name}-back", 4096) as back:
        process = children.spawn(echo, to, back, 500)
        for number in range(500):
            to.write(message(0, number))
            assert back.read(timeout=DEADLINE) == message(0, number)
        join_all(children, [process])


def test_full_lanes_in_both_directions_block_nobody_for_good(name, children, endless):
    """Each process has a thread that reads and one that writes, and lanes too small for what is under way."""
    with Ring.create(f"{name}-to", 4096, spin=0) as to, Ring.create(f"{name}-back", 4096, spin=0) as back:

        def both(mine, yours):
            thread = threading.Thread(target=write_numbered, args=(mine, 1, 1000))
            thread.start()
            read_numbered(yours, {1: 1000})
            thread.join(DEADLINE)
            assert not thread.is_alive()

        pid = children.start(both, to, back)
        both(back, to)
        assert children.join(pid) == 0


# ---------------------------------------------------------------- kill -9


def stream(ring, acknowledged, batch, start):
    """Write for ever; after each call, and not before, tell how far it has come."""
    number = start
    while True:
        if batch == 1:
            ring.write(message(1, number))
        else:
            ring.write_many([message(1, n) for n in range(number, number + batch)])
        number += batch
        acknowledged[0] = number


@pytest.mark.parametrize("batch, capacity", [(1, 4096), (1, 1 << 20), (20, 65536)])
def test_what_a_killed_writer_had_written_is_read_once_and_whole(
    name, children, shared, seed, endless, batch, capacity
):
    rng = random.Random(seed)
    with Ring.create(name, capacity, writers=1) as ring:
        account = Account()
        account.next[1] = 0
        for _ in range(ROUNDS):
            acknowledged = shared(Words)
            start = acknowledged[0] = account.next[1]
            pid = children.start(stream, ring, acknowledged, batch, start)
            for _ in range(rng.choice([0, 1, 3, rng.randrange(300)])):
                account.take(ring.read(timeout=DEADLINE))
            children.kill(pid)
            with Ring.open(name) as successor:
                end = acknowledged[0]
                for data in iter(ring.try_read, None):
                    account.take(data)
                assert end <= account.next[1] <= end + batch
                assert successor.try_write(message(1, account.next[1])), "its lane is free at once"
                account.take(ring.read(timeout=DEADLINE))
        assert ring.stats().bytes_in == ring.stats().bytes_out


def test_a_reader_asleep_is_woken_by_the_successor_of_a_killed_writer(name, children, endless):
    with Ring.create(name, 4096, writers=1, spin=0) as ring, Ring.open(name) as successor:

        def die():
            ring._segment.ring = lambda bell: kill_yourself()
            ring.write(b"")

        def read():
            assert ring.read() == b"1"
            assert ring.read() == b"2"

        reader = children.start(read)
        wait_until(lambda: ring.stats().readers_parked)
        assert children.join(children.start(die)) == KILLED
        successor.write(b"1")
        wait_until(lambda: ring.stats().readers_parked and ring.stats().messages_out == 1)
        successor.write(b"2")
        assert children.join(reader) == 0


def consume(ring, acknowledged, how):
    """Read for ever; after each message, and not before, tell which one is next."""
    for data in iter(ring.read, None) if how == "read" else ring:
        number = NUMBERED.unpack_from(data)[1]
        assert data == message(1, number)
        if acknowledged[1] == 0:
            acknowledged[1] = number + 1  # the first one, plus 1
        else:
            assert number == acknowledged[0]
        acknowledged[0] = number + 1


@pytest.mark.parametrize("how", ["read", "iteration"])
@pytest.mark.parametrize("capacity", [4096, 65536])
def test_the_next_reader_goes_on_where_a_killed_one_was(name, children, shared, seed, endless, how, capacity):
    """One message may be gone: taken by the dead one, and not yet returned to its caller."""
    rng = random.Random(seed)
    with Ring.create(name, capacity, writers=1) as ring:
        writer = children.start(stream, ring, shared(Words), 1, 0)
        following = 0
        for _ in range(ROUNDS):
            acknowledged = shared(Words)
            pid = children.start(consume, ring, acknowledged, how)
            enough = rng.choice([1, 2, 20, rng.randrange(1, 400)])
            wait_until(lambda words=acknowledged, least=enough: words[1] and words[0] - words[1] + 1 >= least)
            children.kill(pid)
            assert acknowledged[1] - 1 in (following, following + 1)
            following = acknowledged[0]
        children.kill(writer)
        for data in iter(ring.try_read, None):
            number = NUMBERED.unpack_from(data)[1]
            assert number in (following, following + 1)
            following = number + 1


def test_a_writer_on_a_full_lane_is_woken_when_a_killed_readers_successor_frees_room(name, children, shared, endless):
    told = shared(Line)
    with Ring.create(name, 4096, writers=1, spin=0) as ring:

        def read_one():
            assert ring.read() == message(1, 0)
            told.say()
            time.sleep(DEADLINE)

        writer = children.start(write_numbered, ring, 1, 100)
        reader = children.start(read_one)
        told.hear()
        wait_until(lambda: ring.stats().writers_parked)
        with pytest.raises(RingBusy):
            ring.try_read()
        children.kill(reader)
        account = Account()
        account.next[1] = 1
        for data in read_each(ring, 99):
            account.take(data)
        assert children.join(writer) == 0


def test_a_reader_killed_before_it_rings_is_made_good_by_the_next_one(name, children, endless):
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        writer = children.start(write_numbered, ring, 1, 1000)
        wait_until(lambda: ring.stats().writers_parked)

        def die():
            ring.try_read()  # the claim rings

            ring._segment.ring = lambda bell: kill_yourself()
            while True:
                time.sleep(0.002)  # a writer that is on its way from one sleep to the next is not rung
                ring.read()

        assert children.join(children.start(die)) == KILLED
        taken = ring.stats().messages_out
        wait_until(lambda: ring.stats().writers_parked)
        first = NUMBERED.unpack_from(ring.read(timeout=DEADLINE))[1]
        assert first - taken in (0, 1), "message counts may lag by one"
        account = Account()
        account.next[1] = first + 1
        for data in read_each(ring, 999 - first):
            account.take(data)
        assert children.join(writer) == 0


def test_readers_and_writers_killed_at_random_lose_nothing_acknowledged(name, children, shared, seed, endless):
    """Four writers that are killed and succeeded, one reader that is not."""
    rng = random.Random(seed)
    with Ring.create(name, 4096, writers=4) as ring:
        words = shared(Words)

        def write(slot, start):
            number = start
            while True:
                ring.write(message(slot, number))
                number += 1
                words[slot] = number

        account = Account()
        account.next = {slot: 0 for slot in range(4)}
        pids = [children.start(write, slot, 0) for slot in range(4)]
        for _ in range(6 if WINDOWS else 60):
            for _ in range(rng.randrange(100)):
                account.take(ring.read(timeout=DEADLINE))
            slot = rng.randrange(4)
            children.kill(pids[slot])
            acknowledged = words[slot]
            others = {other: words[other] for other in range(4)}
            while any(account.next[other] < others[other] for other in range(4)):
                account.take(ring.read(timeout=DEADLINE))
            for data in ring.read_many() if account.next[slot] == acknowledged and ring.stats().messages_in else []:
                account.take(data)
            assert account.next[slot] - acknowledged in (0, 1)
            words[slot] = account.next[slot]
            pids[slot] = children.start(write, slot, account.next[slot])
        for pid in pids:
            children.kill(pid)


def test_a_ring_whose_processes_were_all_killed_counts_as_not_there(name, children, shared):
    ready = shared(Line)

    def hold(make):
        with make(name) as ring:
            ring.write(b"unread")
            ready.say()
            time.sleep(DEADLINE)

    pids = [children.start(hold, Ring.create)]
    ready.hear()
    pids += [children.start(hold, Ring.open) for _ in range(2)]
    ready.hear(2)
    for pid in pids:
        assert opens(name)
        children.kill(pid)
    assert not opens(name)
    with Ring.create(name) as ring:
        assert ring.try_read() is None
        assert opens(name)
    assert gone(name)


@needs_kept
def test_a_kept_ring_and_its_messages_survive_that_everybody_was_killed(name, children):
    def die():
        ring = Ring.create(name, keep=True)
        ring.write_many([b"1", b"2", b"3"])
        assert ring.read() == b"1"
        kill_yourself()

    assert children.join(children.start(die)) == KILLED
    with pytest.raises(FileExistsError):
        Ring.create(name)
    with Ring.open(name) as ring:
        assert ring.read_many() == [b"2", b"3"]
        ring.unlink()


# ---------------------------------------------------------------- Ctrl-C


WAITS = {
    "read": lambda ring: ring.read(),
    "read into": lambda ring: ring.read(bytearray(10)),
    "read_many": lambda ring: ring.read_many(),
    "iteration": lambda ring: next(iter(ring)),
    "read with a timeout": lambda ring: ring.read(timeout=1e6),
    "write": lambda ring: write_numbered(ring, 1, 1000),
    "write_many": lambda ring: write_numbered(ring, 1, 1000, 50),
    "open": lambda ring: Ring.open(ring.name + "-that-never-comes", timeout=None),
}


@contextlib.contextmanager
def interruptible(line):
    """In a process that has no signals from others: a thread that waits for a word, and does as Ctrl-C does."""
    if not WINDOWS:
        yield
        return

    def interrupt():
        line.hear()
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    thread.join(DEADLINE)


def interrupt(pid, line):
    """What Ctrl-C does to a process that is `interruptible`."""
    if WINDOWS:
        line.say()
    else:
        os.kill(pid, signal.SIGINT)


@pytest.mark.parametrize("threads", [0, 3], ids=["alone", "with threads"])
@pytest.mark.parametrize("what", WAITS)
def test_control_c_ends_a_wait_with_keyboard_interrupt_and_the_handle_works_on(
    name, children, shared, what, threads
):
    ready, line = shared(Line), shared(Line)
    with Ring.create(name, 4096, writers=2) as ring, Ring.open(name) as other:

        def wait():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            done = threading.Event()
            others = [threading.Thread(target=done.wait) for _ in range(threads)]
            for thread in others:
                thread.start()
            try:
                with interruptible(line):
                    ready.say()
                    WAITS[what](ring)
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("it was not interrupted")
            finally:
                done.set()
            for thread in others:
                thread.join(DEADLINE)
            if "write" in what:
                assert not ring.try_write(bytes(4000))
            elif what != "open":
                assert ring.try_read() is None
            ring.close()

        pid = children.start(wait)
        ready.hear()
        if what == "open":
            threading.Event().wait(0.05)  # only makes it likelier that it waits
        else:
            wait_until(lambda: ring.stats().readers_parked or ring.stats().writers_parked)
        interrupt(pid, line)
        assert children.join(pid) == 0
        other.write(b"the others go on")
        assert b"the others go on" in other.read_many()


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="before 3.11 a handler may run between a call's return and its result's use"
)
@pytest.mark.parametrize("reading", READINGS)
def test_control_c_at_random_moments_inside_read_loses_no_message_and_doubles_none(
    name, children, shared, seed, reading
):
    rng = random.Random(seed)
    inside = os.path.dirname(os_backend.__file__)
    with Ring.create(name, 4096, writers=1) as ring:
        words = shared(Words)  # how often it was interrupted, and how many messages there are to be
        armed = []
        words[1] = 1000 if WINDOWS else 3000

        def write():
            number = 0
            while number < words[1]:
                ring.write(message(1, number))
                number += 1

        def interrupted(signum, frame):
            # Once `read` has returned the message is the caller's; only what is raised inside it is the ring's affair.
            # And one at a time: a second one, while the first one's message is handed back, may lose it.
            if armed and frame.f_code.co_filename.startswith(inside):
                words[0] += 1
                armed.clear()
                raise KeyboardInterrupt

        def read():
            account = Account()
            account.next[1] = 0
            while account.next[1] < words[1]:
                armed.append(True)
                try:
                    for data in reading(ring, words[1] - account.next[1]):
                        account.take(data)
                        if words[0] < 10 and words[1] - account.next[1] < 100:  # the writer is not so far ahead
                            words[1] += 100
                except KeyboardInterrupt:
                    pass

        def read_and_interrupt():
            """No other process can: so a thread does."""
            signal.signal(signal.SIGINT, interrupted)
            done = threading.Event()

            def interrupt():
                while not done.is_set():
                    time.sleep(rng.random() / 2000)
                    _thread.interrupt_main()

            thread = threading.Thread(target=interrupt)
            thread.start()
            read()
            done.set()
            thread.join(DEADLINE)

        if WINDOWS:
            reader = children.start(read_and_interrupt)
            writer = children.start(write)
            status = (children.join(reader),)
        else:
            previous = signal.signal(signal.SIGINT, interrupted)  # inherited: there from the child's first moment
            reader = children.start(read)
            signal.signal(signal.SIGINT, previous)
            writer = children.start(write)
            status = None
            while status is None:
                time.sleep(rng.random() / 2000)
                os.kill(reader, signal.SIGINT)
                status = children._poll(reader)
        assert status == (0,), f"after {words[0]} interrupts inside"
        assert children.join(writer) == 0


# ---------------------------------------------------------------- names and their end


@pytest.mark.parametrize("order", [("ring", "child"), ("child", "ring")], ids="then".join)
@pytest.mark.parametrize("start", ["start", "spawn"])
def test_the_last_close_in_any_process_removes_the_name(name, children, order, start):
    ring = Ring.create(name)
    back = Ring.create(f"{name}-back")
    child = getattr(children, start)(close_when_told, ring, back)
    assert back.read(timeout=DEADLINE) == b"open"
    closers = {"ring": ring.close, "child": lambda: (back_to.write(b"close"), join_all(children, [child]))}
    with Ring.open(f"{name}-back-to", timeout=DEADLINE) as back_to:
        closers[order[0]]()
        assert opens(name) and (WINDOWS or f"shmring.{name}" in segments())
        closers[order[1]]()
        assert gone(name)
    back.close()


def close_when_told(ring, back):
    with Ring.create(f"{back.name}-to") as to:
        back.write(b"open")
        assert to.read(timeout=DEADLINE) == b"close"
        ring.close()


def test_a_process_that_ends_without_close_closes_by_itself(name, children):
    thread = "import threading; threading.Thread(target=ring.stats).start()"
    for code in ("pass", "raise SystemExit(0)", thread):
        code = f"import sys; from shmring import Ring; ring = Ring.create(sys.argv[1]); {code}"
        process = children.python(code, name)
        children.output(process)
        assert gone(name)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_multiprocessing_child_that_was_the_last_holder_removes_the_name(name, children, shared, method):
    """A forked one leaves by os._exit, where atexit does not come."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    told, ready = shared(Line), shared(Line)
    ring = Ring.create(name)
    process = children.spawn(hold_until_told, ring if method != "fork" else None, told, ready, method=method)
    ready.hear()
    ring.close()
    assert opens(name)
    told.say()
    join_all(children, [process])
    assert gone(name)


def hold_until_told(ring, told, ready):
    ready.say()
    told.hear()


def test_the_last_close_of_two_processes_at_once_removes_the_name(name, children, shared):
    for _ in range(3 if WINDOWS else 150):
        gate, ready = shared(Line), shared(Line)
        ring = Ring.create(name)

        def close(ring=ring, gate=gate, ready=ready):
            ready.say()
            gate.hear()
            ring.close()

        pids = [children.start(close) for _ in range(3)]
        ready.hear(3)
        ring.close()
        assert opens(name)
        gate.say()
        join_all(children, pids)
        assert gone(name)


@pytest.mark.parametrize("with_unlink", [False, True], ids=["without unlink", "with unlink"])
def test_processes_racing_for_one_name_get_no_error_but_the_documented_ones(name, children, seed, with_unlink):
    def race(seed):
        def change(way, *args, **kwargs):
            begin = time.perf_counter()
            try:
                return way(*args, **kwargs)
            except RingBusy:  # the system lets nobody run for a second, of all moments in the middle of a change
                assert time.perf_counter() - begin > 0.9

        rng = random.Random(seed)
        handles, end = [], time.perf_counter() + 1
        while time.perf_counter() < end:
            what = rng.randrange(6 if with_unlink else 5)
            if what == 0 and len(handles) < 5:
                try:
                    made = change(Ring.create, name, 4096, writers=2)
                except FileExistsError:
                    pass
                else:
                    handles += [made] if made else []
            elif what == 1 and len(handles) < 5:
                try:
                    handles.append(Ring.open(name))
                except FileNotFoundError:
                    pass
            elif what == 2 and handles:
                try:
                    handles[-1].try_write(b"x")
                except RingBusy:
                    pass
            elif what in (3, 4) and handles:
                handles.pop(rng.randrange(len(handles))).close()
            elif what == 5:
                try:
                    change(unlink, name)
                except FileNotFoundError:
                    pass
        for handle in handles:
            handle.close()

    join_all(children, [children.start(race, seed + number) for number in range(3)])
    assert gone(name)


# ---------------------------------------------------------------- nobody idle works


def idle_time(wait):
    before = time.process_time()
    with pytest.raises(RingTimeout):
        wait()
    return time.process_time() - before


@pytest.mark.parametrize("what", ["reader", "writer"])
def test_who_is_parked_uses_no_processor_time(name, children, what):
    with Ring.create(name, 4096, writers=1) as ring:

        def wait():
            while what == "writer" and ring.try_write(bytes(100)):
                pass
            parks = {"reader": lambda: ring.read(timeout=0.5), "writer": lambda: ring.write(bytes(100), timeout=0.5)}
            # What interrupts a processor is counted for who runs there, but not each time.
            assert any(idle_time(parks[what]) < IDLE for _ in range(5))

        assert children.join(children.start(wait)) == 0


def counted(words, slot, replace=setattr):
    """Count in words that this process shares with others how often a handle rings and waits."""
    segment = os_backend.Segment
    ring, wait = segment.ring, segment.wait

    def count_ring(self, bell):
        words[slot] += 1
        return ring(self, bell)

    def count_wait(self, bell, noted, deadline):
        words[slot + 1] += 1
        wait(self, bell, noted, deadline)

    replace(segment, "ring", count_ring)
    replace(segment, "wait", count_wait)


def test_nobody_calls_the_system_while_nobody_sleeps(name, children, shared, monkeypatch):
    """The reader reads what is there, the writer writes where there is room: neither ever parks."""
    words = shared(Words)
    with Ring.create(name, 1 << 20, writers=1) as ring:
        assert ring.try_read() is None

        def write():
            counted(words, 0)
            write_numbered(ring, 1, 1500)
            assert (words[0], words[1]) == (1, 0), "the claim rings"

        assert children.join(children.start(write)) == 0
        counted(words, 2, monkeypatch.setattr)
        read_numbered(ring, {1: 1500})
        assert (words[2], words[3]) == (0, 0)
        monkeypatch.undo()


def test_each_sleep_is_ended_by_one_ring_of_each_writer(name, children, shared, monkeypatch, endless):
    words = shared(Words)
    with Ring.create(name, 4096, writers=2) as ring:

        def write(slot):
            counted(words, slot)
            write_numbered(ring, slot, 3000)

        pids = [children.start(write, slot) for slot in (0, 2)]
        counted(words, 4, monkeypatch.setattr)
        read_numbered(ring, {0: 3000, 2: 3000})
        join_all(children, pids)
        stats = ring.stats()
        assert words[0] + words[2] <= 2 * stats.reader_parks + 2, "writers ring once for each sleep, and at the claim"
        assert words[4] <= stats.writer_parks + 2, "the reader too"
        assert words[5] <= stats.reader_parks and words[1] + words[3] <= stats.writer_parks
        monkeypatch.undo()


STREAM = """
import os, sys
from shmring import Ring
count = 20_000
name, together = sys.argv[1], sys.argv[2] == "together"
ring = Ring.create(name, 1 << 16 if together else 4 << 20, writers=1)
told, tell = os.pipe()
done, do = os.pipe()
pid = os.fork()
if pid == 0:
    ring.write(b"0")
    os.write(do, b"x")
    os.read(told, 1)
    os.getpgid(0)
    for number in range(count):
        ring.write(b"x" * 64)
    os.getpgid(0)
    os.write(do, b"x")
    os._exit(0)
assert ring.read() == b"0"
os.read(done, 1)
os.write(tell, b"x")
if not together:
    os.read(done, 1)
before = ring.stats()
os.getpgid(0)
for number in range(count):
    ring.read()
os.getpgid(0)
assert os.waitpid(pid, 0)[1] == 0
stats = ring.stats()
print(stats.reader_parks + stats.writer_parks)
ring.close()
"""


@pytest.fixture
def strace(tmp_path):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=DEADLINE)
    if probe.returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr.strip()}")
    return tmp_path / "trace"


def calls_between_marks(trace):
    """The system calls of all processes between each one's two calls of getpgid."""
    inside, calls = {}, []
    for line in trace.read_text().splitlines():
        pid, _, text = line.partition(" ")
        call = re.match(r"\s*(\w+)\(", text)
        if not call or "resumed>" in text:
            continue
        if call[1] == "getpgid":
            inside[pid] = inside.get(pid, 0) + 1
        elif inside.get(pid) == 1:
            calls.append(call[1])
    assert set(inside.values()) == {2}, inside
    return calls


def test_by_strace_no_system_call_is_made_for_a_message_while_both_sides_are_awake(name, children, strace):
    process = children.python(STREAM, name, "in turn", prefix=["strace", "-f", "-o", str(strace)])
    assert children.output(process).split() is not None
    calls = calls_between_marks(strace)
    assert len(calls) < 100, f"{len(calls)} calls for 20,000 messages: {sorted(set(calls))}"
    assert not {"futex", "membarrier"} & set(calls)


def test_by_strace_system_calls_are_as_many_as_sleeps(name, children, strace):
    process = children.python(STREAM, name, "together", prefix=["strace", "-f", "-o", str(strace)])
    parks = int(children.output(process))
    calls = calls_between_marks(strace)
    # For each: the fence, the sleep, the ring that ends it, and a look at the clock where that is a call.
    wanted = [call for call in calls if call in ("futex", "membarrier", "write", "fcntl")]
    assert len(wanted) <= 3 * parks + 20, f"{len(wanted)} calls for {parks} sleeps"
