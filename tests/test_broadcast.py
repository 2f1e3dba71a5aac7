"""Several readers that each read everything, and what happens when one of them lags."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
import threading
import time
import zlib

import pytest
from conftest import DEADLINE, KILLED, WINDOWS, Line, Words, wait_until
from support import GIL, in_place, kill_yourself

from shmring import MessagesLost, MessageTooLarge, Ring, RingBusy, RingClosed, RingTimeout


@pytest.fixture
def ring(name):
    """The writer's handle."""
    with Ring.create(name, 4096, writers=2, readers="broadcast", max_readers=3, spin=0) as ring:
        yield ring


@pytest.fixture
def dropping(name):
    """The writer's handle where writers do not wait."""
    with Ring.create(name, 4096, writers=2, readers="broadcast", max_readers=3, lag="drop", spin=0) as ring:
        yield ring


@pytest.fixture
def reader(name):
    """Makes readers that have joined."""
    made = []

    def make():
        made.append(Ring.open(name, spin=0))
        made[-1].join()
        return made[-1]

    yield make
    for ring in made:
        ring.close()


def into_buffer(ring):
    buffer = bytearray(4096)
    return bytes(buffer[: ring.read(buffer)])


WAYS = {
    "read": lambda ring: ring.read(),
    "try_read": lambda ring: ring.try_read(),
    "read_many": lambda ring: ring.read_many(1)[0],
    "iterated": lambda ring: next(iter(ring)),
    "into a buffer": into_buffer,
    "in place": in_place,
    "awaited": lambda ring: asyncio.run(ring.read_async()),
}


# ---------------------------------------------------------------- everybody reads everything


def test_each_reader_reads_what_is_written_after_it_has_joined(ring, reader):
    ring.write(b"before")
    first = reader()
    ring.write(b"one")
    second = reader()
    ring.write_many([b"two", b"three"])
    assert first.read_many() == [b"one", b"two", b"three"]
    assert second.read_many() == [b"two", b"three"]
    assert first.try_read() is None and second.try_read() is None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lag", ["block", "drop"])
def test_every_way_to_read_reads_each_message_once(name, lag, way):
    rng = random.Random(7)
    messages = [bytes([i]) * rng.choice([0, 8, 100, 700]) for i in range(200)]
    with Ring.create(name, 8192, writers=1, readers="broadcast", lag=lag) as ring, Ring.open(name) as other:
        ring.join()
        other.join()
        got = []
        for i, message in enumerate(messages):
            ring.write(message)
            if i % 3 == 2:  # some lie there, and some are awaited
                got += [WAYS[way](other) for _ in range(3)]
                assert ring.read_many() == got[-3:]
        assert got == messages[: len(got)] and len(got) == 198
        assert other.read() == messages[198] and other.read_many() == messages[199:]


def test_two_writers_messages_come_in_each_ones_order(ring, name, reader):
    readers = [reader(), reader()]
    with Ring.open(name) as second:
        for number in range(10):
            ring.write(b"a%d" % number)
            second.write(b"b%d" % number)
        for each in readers:
            got = each.read_many()
            for letter in b"ab":
                assert [int(message[1:]) for message in got if message[0] == letter] == list(range(10))


def test_joining_again_does_nothing_and_reading_joins(ring, reader):
    one = reader()
    ring.write(b"1")
    one.join()
    assert one.read() == b"1"
    assert ring.try_read() is None  # the writer's handle reads as well: what comes from now on
    ring.write(b"2")
    assert ring.read() == one.read() == b"2"
    one.close()
    with pytest.raises(RingClosed):
        one.join()


def test_a_reader_counts_as_alive_from_when_it_gets_what_is_written(ring, name, monkeypatch):
    """Who waits for one writes then."""
    from shmring._reading import Reader

    end_of, seen = Reader._end_of, []

    def while_joining(self, lane):
        seen.append(ring.readers_alive())
        return end_of(self, lane)

    monkeypatch.setattr(Reader, "_end_of", while_joining)
    with Ring.open(name) as one:
        one.join()
        assert seen == [0, 0] and ring.readers_alive() == one.readers_alive() == 1
    assert ring.readers_alive() == 0


def test_one_message_wakes_all_that_sleep(ring, reader, endless):
    readers = [reader() for _ in range(3)]
    got = []
    for round_ in range(20):
        threads = [threading.Thread(target=lambda one=one: got.append(one.read(timeout=DEADLINE))) for one in readers]
        for thread in threads:
            thread.start()
        wait_until(lambda: ring.stats().readers_parked == 3, "that all sleep")
        ring.write(b"%d" % round_)
        for thread in threads:
            thread.join(DEADLINE)
        assert got == [b"%d" % round_] * 3
        got.clear()


def test_any_of_many_readers_is_woken(name, endless):
    """Their bytes in the asleep table take more than a word."""
    with Ring.create(name, 4096, writers=1, readers="broadcast", max_readers=20, spin=0) as ring:
        readers = [Ring.open(name, spin=0) for _ in range(20)]
        for each in readers:
            each.join()
        with pytest.raises(RingBusy, match="20 living readers.*max_readers"):
            ring.join()
        for each in (readers[19], readers[8], readers[0]):
            got = []
            thread = threading.Thread(target=lambda each=each, got=got: got.append(each.read(timeout=DEADLINE)))
            for other in readers:
                while other.try_read() is not None:
                    pass
            thread.start()
            wait_until(lambda: ring.stats().readers_parked == 1, "that one sleeps")
            ring.write(b"wake")
            thread.join(DEADLINE)
            assert got == [b"wake"]
        for each in readers:
            each.close()


def test_a_slot_is_free_again_when_its_reader_has_closed_or_died(ring, reader, children):
    readers = [reader() for _ in range(3)]
    name = ring.name
    with pytest.raises(RingBusy):
        reader()
    readers[1].close()

    def die():
        taken = Ring.open(name)
        taken.join()
        kill_yourself()

    assert children.join(children.start(die)) == KILLED
    late = reader()
    ring.write(b"x")
    assert [each.read_many() for each in (readers[0], readers[2], late)] == [[b"x"]] * 3
    assert ring.stats().readers == 3


def test_a_handle_that_is_forked_or_travels_joins_anew(ring, reader, children, shared):
    line = shared(Line)
    mine = reader()

    def other():
        mine.join()
        line.say()
        assert mine.read(timeout=DEADLINE) == b"for both"

    ring.write(b"mine alone")
    pid = children.start(other)
    line.hear()
    ring.write(b"for both")
    assert children.join(pid) == 0
    assert mine.read_many() == [b"mine alone", b"for both"]


def test_tasks_of_one_loop_read_all(ring, name):
    async def read(number, joined):
        got = []
        with Ring.open(name) as each:
            each.join()
            joined.release()
            async for message in each:
                if message == b"end":
                    return got
                got.append(message)

    async def run():
        joined = asyncio.Semaphore(0)
        tasks = [asyncio.ensure_future(read(number, joined)) for number in range(3)]
        for _ in tasks:
            await joined.acquire()
        messages = [b"%d" % number for number in range(1000)]
        for message in [*messages, b"end"]:
            await ring.write_async(message)
        for task in tasks:
            assert await asyncio.wait_for(task, DEADLINE) == messages

    asyncio.run(run())


@pytest.mark.skipif(WINDOWS, reason="selectors take sockets alone there")
def test_each_reader_has_a_doorbell_of_its_own(ring, reader):
    import select

    readers = [reader(), reader()]
    for each in readers:
        each.attach_doorbell()
        assert each.try_read() is None
    assert select.select(readers, [], [], 0)[0] == []
    ring.write(b"x")
    assert select.select(readers, [], [], DEADLINE)[0] == readers
    assert readers[0].read_many() == [b"x"] and readers[0].try_read() is None
    assert select.select(readers, [], [], 0)[0] == readers[1:]


def test_stats_tell_of_the_slowest_reader(ring, reader):
    ring.write(b"x" * 8)
    stats = ring.stats()
    assert (stats.readers, stats.messages_in, stats.messages_out, stats.fill) == (0, 1, 1, 0.0)
    quick, slow = reader(), reader()
    ring.write_many([b"x" * 8] * 64)
    quick.read_many()
    stats = ring.stats()
    assert (stats.readers, stats.messages_in, stats.messages_out, stats.fill) == (2, 65, 1, 0.25)
    slow.read_many(63)
    assert ring.stats().messages_out == 64
    slow.close()
    assert ring.stats().messages_out == 65


# ---------------------------------------------------------------- writers wait for the slowest


def fill(ring, size=100):
    """Write until there is no room; how many."""
    return sum(1 for _ in itertools.takewhile(lambda _: ring.try_write(bytes(size)), itertools.count()))


def test_nobody_waits_for_nobody(ring):
    for number in range(1000):
        ring.write(b"%d" % number, timeout=0)
    assert ring.stats().bytes_in == 16_000


def test_the_slowest_reader_decides_what_room_there_is(ring, reader):
    quick, slow = reader(), reader()
    assert fill(ring) == 36
    assert len(quick.read_many()) == 36
    assert not ring.try_write(bytes(100))
    with pytest.raises(RingTimeout):
        ring.write(bytes(100), timeout=0.01)
    slow.read()
    assert ring.try_write(bytes(100)) and not ring.try_write(bytes(100))


@pytest.mark.parametrize("ending", ["read", "close"])
def test_a_writer_that_sleeps_is_woken_when_the_slowest_reads_or_leaves(ring, reader, endless, monkeypatch, ending):
    monkeypatch.setattr("shmring._ring.MOURNING", 3600)
    quick, slow = reader(), reader()
    fill(ring)
    quick.read_many()
    done = []
    thread = threading.Thread(target=lambda: done.append(ring.write(bytes(100), timeout=DEADLINE)))
    thread.start()
    wait_until(lambda: ring.stats().writers_parked, "that the writer sleeps")
    time.sleep(0.02)
    assert not done
    (slow.read_many if ending == "read" else slow.close)()
    thread.join(DEADLINE)
    assert done == [None]
    assert len(quick.read_many()) == 1


def test_nobody_waits_for_a_reader_that_was_killed(ring, reader, children, shared):
    name, line = ring.name, shared(Line)

    def lag():
        lagging = Ring.open(name)
        lagging.join()
        line.say()
        time.sleep(DEADLINE)

    other = reader()
    pid = children.start(lag)
    line.hear()
    filled = fill(ring)
    other.read_many()
    assert not ring.try_write(bytes(100))
    timer = threading.Timer(0.05, children.kill, [pid])
    timer.start()
    ring.write(bytes(100), timeout=DEADLINE)  # it sleeps by now, and nobody rings
    timer.join()
    for _ in range(2 * filled):
        ring.write(bytes(100), timeout=0)
        other.read()
    other.read()
    assert ring.stats().readers == 1


def test_a_writers_own_reading_side_counts_as_alive(ring):
    """A handle's own claims are not what it is told of when it asks for those of others."""
    ring.join()
    filled = fill(ring)
    with pytest.raises(RingTimeout):
        ring.write(bytes(100), timeout=0.3)
    assert len(ring.read_many()) == filled


def test_a_reader_in_a_dead_ones_place_is_waited_for(ring, reader, children):
    """A writer that has found the dead one takes it for nobody else."""
    name = ring.name

    def lag():
        lagging = Ring.open(name)
        lagging.join()
        kill_yourself()

    for _ in range(3):
        assert children.join(children.start(lag)) == KILLED
        for _ in range(100):
            ring.write(bytes(100), timeout=DEADLINE)
        late = reader()
        filled = fill(ring)
        assert filled < 40
        assert len(late.read_many()) == filled
        late.close()


def test_a_message_in_place_is_not_written_over_while_any_reader_has_it(ring, reader):
    quick, slow = reader(), reader()
    ring.write(b"kept" * 500)
    with slow.borrow() as view:
        assert quick.read() == b"kept" * 500
        while ring.try_write(b"else" * 100):
            quick.read()
        assert view == b"kept" * 500
    assert ring.try_write(b"else" * 100)


# ---------------------------------------------------------------- who lags loses


def check_lost(ring, read, written):
    """Read to the end: the messages are numbered, and what is missing is what is said to be lost."""
    due = lost = 0
    while due < written:
        try:
            message = read(ring)
        except MessagesLost as error:
            assert error.lane == 0 and error.count > 0
            due += error.count
            lost += error.count
            continue
        number, checksum = struct.unpack_from("=QI", message)
        assert number == due and zlib.crc32(message[12:]) == checksum
        due += 1
    assert due == written and ring.try_read() is None
    return lost


def numbered(number, size):
    body = random.Random(number).randbytes(size)
    return struct.pack("=QI", number, zlib.crc32(body)) + body


@pytest.mark.parametrize("way", WAYS)
def test_what_is_lost_is_counted_exactly_and_said_once(dropping, reader, way, seed):
    rng = random.Random(seed)
    one = reader()
    written = 0
    for count in rng.sample([1, 30, 300] * 10, 30):  # in any order: with a choice each time there might be hardly any
        for _ in range(count):
            dropping.write(numbered(written, rng.choice([0, 4, 60, 60, 60, 300, 2000])), timeout=0)
            written += 1
        if rng.random() < 0.5:
            batch = [numbered(written + i, rng.choice([4, 40])) for i in range(rng.choice([3, 200]))]
            written += dropping.write_many(batch)
        for _ in range(rng.choice([0, 5])):
            room = dropping.reserve(1000)
            with room as view:
                message = numbered(written, 30)
                view[: len(message)] = message
                room.commit(len(message))
            written += 1
    assert check_lost(one, WAYS[way], written) > 1000


def test_the_oldest_message_that_is_there_comes_next(dropping, reader):
    one = reader()
    for number in range(1000):
        dropping.write(b"%08d" % number)
    with pytest.raises(MessagesLost) as caught:
        one.read()
    left = one.read_many()
    assert left == [b"%08d" % number for number in range(caught.value.count, 1000)]
    assert 240 <= len(left) <= 256  # of 16 bytes each; a sixteenth of the lane is given up at a time


def test_nobody_who_keeps_up_loses_anything(dropping, reader):
    one, two = reader(), reader()
    for number in range(2000):
        dropping.write(b"%08d" % number)
        assert one.read() == b"%08d" % number
        if number % 200 == 199:
            assert len(two.read_many()) == 200


def test_a_lane_that_was_lost_from_leaves_the_others_alone(dropping, name, reader):
    one = reader()
    with Ring.open(name) as second:
        dropping.write(b"a")
        for number in range(1000):
            second.write(b"%08d" % number)
        got, lost = [], []
        while len(got) + sum(lost) < 1001:
            try:
                got += one.read_many()
            except MessagesLost as error:
                assert error.lane == 1
                lost.append(error.count)
        assert len(lost) == 1 and sorted(got) == [b"%08d" % number for number in range(lost[0], 1000)] + [b"a"]


@pytest.mark.parametrize("size", [2040, 2039, 1900, 2033])
def test_the_longest_messages_after_one_another(dropping, reader, size):
    assert dropping.max_message == 2040
    with pytest.raises(MessageTooLarge):
        dropping.write(bytes(2041))
    one = reader()
    due = 0
    for number in range(50):
        dropping.write(numbered(number, size - 12))
        if number % 5 == 4:
            left = 0
            while due <= number:
                try:
                    assert one.read() == numbered(due, size - 12)
                    left += 1
                    due += 1
                except MessagesLost as error:
                    due += error.count
            assert due == number + 1 and 1 <= left <= 2


def test_a_message_in_place_is_a_copy_where_writers_do_not_wait(dropping, reader):
    one = reader()
    dropping.write(b"here")
    with one.borrow() as view:
        for _ in range(1000):
            dropping.write(b"gone")
        assert view == b"here" and view.readonly


def test_a_killed_writers_successor_goes_on_counting(dropping, reader, children):
    name = dropping.name
    one = reader()
    due = 0

    def write(start, count):
        with Ring.open(name) as ring:
            for number in range(start, start + count):
                ring.write(numbered(number, 20))
            kill_yourself()

    for count in (10, 700, 3, 400):
        assert children.join(children.start(write, due, count)) == KILLED
        due += count
    assert check_lost(one, Ring.read, due) > 700


def test_nothing_torn_comes_from_a_writer_at_full_speed(name, children, shared, seed):
    """In one lane, of which most is lost."""
    words = shared(Words)
    seconds = 1.0
    with Ring.create(name, 8192, writers=1, readers="broadcast", lag="drop") as ring:
        ring.join()

        def write():
            rng = random.Random(seed)
            with Ring.open(name) as ring:
                # Who comes too late finds a lane that it does not know, which counts as something, and no message.
                wait_until(lambda: ring.readers_alive() == 4, "that all readers have joined")
                bodies = [rng.randbytes(rng.choice([0, 5, 50, 50, 400, 3000])) for _ in range(50)]
                sums = [zlib.crc32(body) for body in bodies]
                number, end = 0, time.monotonic() + seconds
                while time.monotonic() < end:
                    for i in range(50):
                        ring.write(struct.pack("=QI", number, sums[i]) + bodies[i])
                        number += 1
                words[0] = number
                words[1] = 1

        def read(way):
            due = lost = 0
            with Ring.open(name) as ring:
                ring.join()
                first = None
                while True:
                    is_over = words[1]  # before the look: what came before the end is there then
                    try:
                        message = WAYS[way](ring) if ring.wait_doorbell(0.05) else None
                    except MessagesLost as error:
                        due += error.count
                        lost += error.count
                        continue
                    if message is None:
                        if is_over:
                            break
                        continue
                    number, checksum = struct.unpack_from("=QI", message)
                    if first is None:
                        first = due = number - due
                        due += lost
                    assert (number, checksum) == (due, zlib.crc32(message[12:]))
                    due += 1
            assert due == words[0] or first is None

        readers = [children.start(read, way) for way in ("read", "in place", "into a buffer")]
        writer = children.start(write)
        for pid in [writer, *readers]:
            assert children.join(pid) == 0
        lost = got = 0
        while lost + got < words[0]:
            try:
                got += len(ring.read_many(timeout=0))
            except MessagesLost as error:
                lost += error.count
        assert lost + got == words[0] and ring.try_read() is None


def test_a_ring_that_is_kept_goes_on_where_it_was(name):
    if WINDOWS:
        pytest.skip("nothing is kept there")
    with Ring.create(name, 4096, readers="broadcast", lag="drop", keep=True) as ring:
        for number in range(1000):
            ring.write(numbered(number, 20))
    with Ring.open(name) as ring:
        ring.join()
        for number in range(1000, 1500):
            ring.write(numbered(number, 20))
        with pytest.raises(MessagesLost) as caught:
            ring.read()
        assert ring.read() == numbered(1000 + caught.value.count, 20)
        ring.unlink()


def test_an_exception_anywhere_leaves_the_counts_exact(dropping, reader):
    """A signal handler's exception between the position and the count of a message."""
    one = reader()
    for number in range(300):
        dropping.write(numbered(number, 20))
    words = one._segment.words
    with pytest.raises(MessagesLost) as caught:
        one.read()
    assert one.read() == numbered(caught.value.count, 20)
    layout = one._segment.layout
    out = (layout.cursor(0, one._reader.slot) + 8) >> 3
    words[out] -= 1  # as if it had come there
    written = (layout.lane_block(0) + 8) >> 3
    words[written] -= 1
    for side in (one._reader, dropping._writer):
        with pytest.raises(KeyboardInterrupt):
            (side.monitor.steps if GIL else side.monitor.steps._generator).throw(KeyboardInterrupt)
    for number in range(300, 900):
        dropping.write(numbered(number, 20))
    due = caught.value.count + 1
    with pytest.raises(MessagesLost) as caught:
        one.read()
    assert one.read() == numbered(due + caught.value.count, 20)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"lag": "drop"}, "readers='one'"),
        ({"readers": "all"}, "readers='all'"),
        ({"readers": "broadcast", "lag": "maybe"}, "lag='maybe'"),
        ({"max_readers": 0}, "max_readers is 1 to 64, not 0"),
        ({"readers": "broadcast", "max_readers": 65}, "not 65"),
    ],
)
def test_wrong_arguments_make_no_ring(name, wrong, error):
    with pytest.raises(ValueError, match=error):
        Ring.create(name, **wrong)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)


def test_join_where_there_is_one_reader_takes_its_role(name):
    with Ring.create(name, 4096) as ring, Ring.open(name) as other:
        ring.write(b"stays")
        other.join()
        with pytest.raises(RingBusy):
            ring.join()
        assert other.read() == b"stays"


def test_what_is_overwritten_while_it_is_copied_from_behind_padding_is_lost(name, monkeypatch):
    """The reader goes back to where the padding begins, which is in the lap before."""
    with Ring.create(name, 65536, writers=1, readers="broadcast", lag="drop") as ring, Ring.open(name) as other:
        other.join()
        messages = [bytes([number]) * size for number, size in enumerate([20000, 20000, 30000])]
        for message in messages[:2]:
            ring.write(message)
            assert other.read() == message
        ring.write(messages[2])
        record, lapped = other._reader._record, other._reader._lapped

        def found(*args):
            monkeypatch.setattr(other._reader, "_record", record)
            monkeypatch.setattr(other._reader, "_lapped", overtaken)
            return record(*args)

        def overtaken(*args):
            """Only after it was seen that the record is there still."""
            monkeypatch.setattr(other._reader, "_lapped", lapped)
            gone = lapped(*args)
            ring.write_many([bytes(30000)] * 8)
            return gone

        monkeypatch.setattr(other._reader, "_record", found)
        with pytest.raises(MessagesLost) as lost:
            other.try_read()
        left = other.read_many()
        assert lost.value.count + len(left) == 9 and set(left) == {bytes(30000)}


@pytest.mark.parametrize("when", ["before R3", "after R3"])
def test_an_interrupt_does_not_keep_a_loss_from_being_told(name, monkeypatch, when):
    with Ring.create(name, 4096, readers="broadcast", lag="drop") as ring, Ring.open(name) as other:
        other.join()
        ring.write_many([bytes([number]) * 100 for number in range(200)])
        free = other._reader._free

        def interrupted(*args):
            monkeypatch.setattr(other._reader, "_free", free)
            if when == "after R3":
                free(*args)
            raise KeyboardInterrupt

        monkeypatch.setattr(other._reader, "_free", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.try_read()
        with pytest.raises(MessagesLost) as lost:
            other.try_read()
        assert lost.value.count + len(other.read_many()) == 200
        assert other.try_read() is None
