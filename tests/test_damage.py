"""Damaged shared bytes: nobody crashes, hangs or raises what is not documented, wherever the damage is.

A damaged lane is reported once to each reader, and what the other lanes hold arrives whole and in order.
The fuzz runs in child interpreters, which a signal would end. SHMRING_SEED repeats a run of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from support import DEADLINE, SIGKILL, WINDOWS

from shmring import BufferTooSmall, Ring, RingCorrupted, RingIncompatible, RingTimeout, _layout
from shmring._lanes import BURST

WORD = (1 << 64) - 1
SCALE = 5 if WINDOWS else 1  # how many times fewer cases


# ---------------------------------------------------------------- fuzz: what it is made of


def boundaries(capacity):
    sizes = [0, 1, 7, 8, capacity - 8, capacity, capacity + 8]
    return [*sizes, 1 << 31, (1 << 32) - 1, (1 << 63) - 8, 1 << 63, (1 << 64) - 8, (1 << 64) - 1]


def other_word(rng, old, capacity):
    """A value to put in the place of `old`: a boundary, at a boundary's distance, with a bit flipped, or random."""
    step = rng.choice(boundaries(capacity))
    return rng.choice([step, old + step & WORD, old - step & WORD, old ^ 1 << rng.randrange(64), rng.getrandbits(64)])


def message(lane, number, size):
    """Some `size` bytes that can be told from any other message, and from a torn one."""
    body = struct.pack("=II", lane, number) + bytes([number * 7 + lane & 255]) * max(0, size - 12)
    return body + struct.pack("=I", zlib.crc32(body))


def sender(data):
    """The lane that `message` made this for; None for anything else."""
    whole = len(data) >= 12 and zlib.crc32(data[:-4]) == struct.unpack("=I", data[-4:])[0]
    return struct.unpack_from("=I", data)[0] if whole else None


def sound(segment, lane):
    """Do a lane's positions, as they are in the shared words, fit together?"""
    read_pos, write_pos = positions(segment, lane)
    aligned = not (read_pos | write_pos) & 7
    return aligned and write_pos < 1 << 63 and read_pos <= write_pos <= read_pos + segment.layout.capacity


def positions(segment, lane):
    layout = segment.layout
    return segment.words[layout.cursor(lane) >> 3], segment.words[layout.lane_block(lane) >> 3]


def expected(segment, lane):
    """The messages that a reader who comes now gets out of a lane, and whether it finds damage after them."""
    capacity, first = segment.layout.capacity, segment.layout.lane_bytes(lane)
    pos, end = positions(segment, lane)
    if pos == end or not sound(segment, lane):
        return [], pos != end
    found = []
    while pos < end:
        at = first + pos % capacity
        published = min(end - pos, capacity - pos % capacity)
        (size,) = struct.unpack_from("=Q", segment.map, at)
        if size == WORD and published == capacity - pos % capacity:
            pos += published
        elif 8 + (size + 7 & -8) <= published:
            found.append(segment.map[at + 8 : at + 8 + size])
            pos += 8 + (size + 7 & -8)
        else:
            return found, True
    return found, False


def records(segment, lane):
    """Where the lengths of a lane's unread messages are."""
    capacity, first = segment.layout.capacity, segment.layout.lane_bytes(lane)
    pos, end = positions(segment, lane)
    while pos < end:
        at = first + pos % capacity
        yield at
        size = segment.words[at >> 3]
        pos += capacity - pos % capacity if size == WORD else 8 + (size + 7 & -8)


def _read_into(ring, rng, got):
    buffer = bytearray(rng.choice([0, 8, 100, ring.max_message]))
    got.append(bytes(buffer[: ring.read(buffer, timeout=0)]))


def _iterate(ring, rng, got):
    for data in itertools.islice(ring.messages(timeout=0), rng.randrange(1, 9)):
        got.append(data)


READS = [
    lambda ring, rng, got: got.append(ring.read(timeout=rng.choice([0, 0.0005]))),
    lambda ring, rng, got: got.append(ring.read(max_len=rng.choice([0, 50, ring.max_message]), timeout=0)),
    lambda ring, rng, got: got.extend(ring.read_many(timeout=rng.choice([0, 0.0005]))),
    lambda ring, rng, got: got.extend(ring.read_many(rng.randrange(1, 5), timeout=0)),
    lambda ring, rng, got: got.extend(filter(lambda data: data is not None, [ring.try_read()])),
    _read_into,
    _iterate,
]


def drain(ring, rng, got):
    """Read until there is nothing, in all ways; the damages that were reported."""
    damages, idle = [], 0
    while idle < 3:
        before = len(got)
        try:
            rng.choice(READS)(ring, rng, got)
        except RingCorrupted as error:
            damages.append(str(error))
            idle = 0
        except (BufferTooSmall, RingTimeout) as error:
            assert ring.name in str(error)
            idle += isinstance(error, RingTimeout)
        else:
            idle = 0 if len(got) > before else idle + 1
    return damages


def write_somehow(ring, rng, data):
    """Write once in some way, or three times; how many messages went in."""
    how = rng.randrange(6)
    if how == 0:
        return int(ring.try_write(data))
    try:
        if how == 3:
            return ring.write_many([data] * 3, timeout=0)
        if how == 4:
            with ring.reserve(len(data), timeout=0) as view:
                view[:] = data
        elif how == 5:
            ring.writev([data[:7], data[7:]], timeout=0)
        else:
            ring.write(data, timeout=0 if how == 1 else 0.0005)
        return 1
    except RingTimeout as error:
        assert ring.name in str(error)
        return 0


def picture(segment, *but):
    """All bytes of a segment, but those in the given (start, length) ranges."""
    data = bytearray(memoryview(segment.map))
    for start, length in but:
        data[start : start + length] = bytes(length)
    return data


def check_stats(ring):
    stats = ring.stats()
    assert 0 <= stats.fill <= 1, stats
    assert 0 <= stats.lanes_in_use <= stats.lanes and min(stats) >= 0, stats


def of_reader(layout):
    """The ranges that a reader may write: its own words, the cursors, and the writers' bells."""
    bells = [(layout.lane_block(lane) + _layout.WRITER_BELL, 4) for lane in range(layout.writers)]
    return [(layout.readers_offset, layout.used_offset - layout.readers_offset), *bells]


def of_writer(layout, lane):
    """The ranges that the writer of a lane may write: the lane and its words, the used table, and the reader's bell."""
    block, own = (layout.lane_block(lane), _layout.LANE_BYTES), (layout.lane_bytes(lane), layout.capacity)
    return [block, own, (layout.used_offset, layout.writers), (layout.readers_offset + _layout.READER_BELL, 4)]


def run_cases(cases, seed, case):
    """Run `case(rng)` many times; one that takes too long ends the interpreter, with its stack in the output."""
    for number in range(cases):
        faulthandler.dump_traceback_later(DEADLINE / 2, exit=True)
        print(f"case {number} of SHMRING_SEED={seed}", file=sys.stderr)
        case(random.Random(f"{seed}/{number}"))
    faulthandler.cancel_dump_traceback_later()


def fuzz(children, function, name, seed, cases):
    """Run a function of this file in a child interpreter, which a signal, an exception or a hang makes fail."""
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import {function.__module__} as tests
        tests.{function.__name__}({name!r}, {seed!r}, {max(cases // SCALE, 3)})
        """
    process = children.python(code, options=["-X", "faulthandler"])
    _, errors = process.communicate(timeout=4 * DEADLINE)
    assert process.returncode == 0, f"exit code {process.returncode}\n{errors[-5000:]}"


# ---------------------------------------------------------------- fuzz: lanes, words and records


class Scene:
    """A ring with four lanes, three of which have a writer, and some messages in them."""

    def __init__(self, name, rng):
        self.rng = rng
        self.ring = Ring.create(name, rng.choice([4096, 8192]), writers=4, spin=0)
        self.segment = self.ring._segment
        self.writers = [Ring.open(name, spin=0) for _ in range(3)]
        self.numbers = [0] * 4
        self.sent = [[] for _ in range(4)]  # written and not yet read, by lane
        self.biggest = rng.choice([20, 600, 3000])

    def close(self):
        for ring in (self.ring, *self.writers):
            ring.close()

    def new_message(self, lane):
        self.numbers[lane] += 1
        return message(lane, self.numbers[lane], self.rng.randrange(12, self.biggest))

    def fill(self, lanes, most=12):
        """Have some writers write something, if there is room."""
        for _ in range(self.rng.randrange(1, most)):
            lane = self.rng.choice(lanes)
            data = self.new_message(lane)
            self.sent[lane] += [data] * write_somehow(self.writers[lane], self.rng, data)

    def warm_up(self):
        """Each has its lane, and positions are not at the beginning any more."""
        for lane in range(3):
            first = self.new_message(lane)
            self.writers[lane].write(first)
            assert self.writers[lane]._writer.lane == lane
            self.sent[lane].append(first)
        for _ in range(self.rng.randrange(4)):
            self.check_read(drain(self.ring, self.rng, got := []), got)
            self.fill([0, 1, 2])
        if self.rng.random() < 0.3:
            # A second lap, so that positions are beyond the capacity.
            for _ in range(30):
                self.fill([0, 1, 2])
                self.check_read(drain(self.ring, self.rng, got := []), got)

    def check_read(self, damages, got):
        assert not damages
        self.check_healthy(got, ())

    def check_healthy(self, got, bad):
        """Everything that was sent through lanes that are not `bad` is there, in order; what else there is."""
        others = [data for data in got if sender(data) in (None, *bad)]
        by_lane = [[data for data in got if sender(data) == lane] for lane in range(4)]
        for lane in range(4):
            if lane not in bad:
                assert by_lane[lane] == self.sent[lane], f"lane {lane}"
            self.sent[lane] = []
        assert bad or not others
        return others

    def new_reader(self):
        self.ring.close()
        self.ring = Ring.open(self.ring.name, spin=0)
        self.segment = self.ring._segment

    def damage(self, lane):
        """Change something of a lane, or of what no message depends on; what was done, for a failure."""
        rng, words, layout = self.rng, self.segment.words, self.segment.layout
        done = []

        def poke(offset, what, value=None):
            if value is None:
                value = other_word(rng, words[offset >> 3], layout.capacity)
            done.append(f"{what}: {words[offset >> 3]:,} -> {value:,}")
            words[offset >> 3] = value

        block, cursor, first = layout.lane_block(lane), layout.cursor(lane), layout.lane_bytes(lane)
        for _ in range(rng.choice([1, 1, 2, 4])):
            kind = rng.randrange(9)
            if kind == 0:
                poke(block + _layout.WRITE_POS, "write_pos")
            elif kind == 1:
                poke(cursor + _layout.READ_POS, "read_pos")
            elif kind == 2:
                poke(block + rng.randrange(8, _layout.LANE_BYTES, 8), "a word of the lane")
                poke(cursor + rng.randrange(8, _layout.CURSOR_BYTES, 8), "a word of the cursor")
            elif kind == 3:
                poke(layout.readers_offset + rng.randrange(0, _layout.READER_BYTES, 8), "a word of the reader")
                self.segment.map[layout.used_offset + rng.randrange(layout.writers + 1)] = rng.randrange(1, 256)
            elif kind == 4 and sound(self.segment, lane) and (lengths := list(records(self.segment, lane))):
                poke(rng.choice(lengths), "a length")
            elif kind == 5:
                start = first + rng.randrange(layout.capacity)
                length = rng.randrange(1, min(64, first + layout.capacity - start) + 1)
                self.segment.map[start : start + length] = rng.getrandbits(8 * length).to_bytes(length, "little")
                done.append(f"{length} bytes of the lane")
            elif kind == 6:
                for offset in (
                    block + _layout.MESSAGES_IN, block + _layout.WRITER_PARKS, block + _layout.WRITER_PARKED,
                    block + _layout.WRITER_WANTED, cursor + _layout.MESSAGES_OUT,
                    layout.readers_offset + _layout.READER_PARKED, layout.readers_offset + _layout.READER_PARKS,
                ):  # fmt: skip
                    if rng.random() < 0.7:
                        poke(offset, f"word {offset}", rng.choice([None, WORD, WORD - 1]))
            elif kind == 7:
                step = rng.choice([1 << 63, layout.capacity, rng.choice(boundaries(layout.capacity))])
                for offset in (block + _layout.WRITE_POS, cursor + _layout.READ_POS):
                    poke(offset, "a position, with the other one", words[offset >> 3] + step & WORD)
            elif kind == 8 and rng.random() < 0.2:
                self.segment.map[first : first + layout.capacity] = rng.getrandbits(8 * layout.capacity).to_bytes(
                    layout.capacity, "little"
                )
                done.append("the whole lane")
        return done


def fuzz_lanes(name, seed, cases):
    """See `test_a_damaged_lane_is_reported_once_and_the_others_are_read_whole`."""

    def case(rng):
        scene = Scene(name, rng)
        scene.warm_up()
        bad, fresh = rng.randrange(3), rng.random() < 0.5
        if rng.random() < 0.5:
            scene.fill([0, 1, 2], 30)
        elif rng.random() < 0.5:
            scene.ring.try_read()  # a reader that is in the middle of something
        scene.sent = [expected(scene.segment, lane)[0] for lane in range(4)]
        if fresh:
            scene.new_reader()
        if rng.random() < 0.3:
            scene.writers[bad].close()
        print("damaged:", scene.damage(bad), file=sys.stderr)
        check_stats(scene.ring)
        plan = expected(scene.segment, bad)
        mine = of_reader(scene.segment.layout)
        before = picture(scene.segment, *mine)
        damages = drain(scene.ring, rng, got := [])
        assert picture(scene.segment, *mine) == before, "a reader wrote what is not its own"
        if fresh:
            from_bad = [data for data in got if sender(data) in (None, bad)]
            assert (from_bad, len(damages)) == (plan[0], int(plan[1])), damages
        scene.check_healthy(got, [bad])
        check_stats(scene.ring)

        healthy = [lane for lane in range(3) if lane != bad]
        scene.fill(healthy)
        write_to_damaged(scene, bad)
        newcomer = Ring.open(name, spin=0)
        scene.writers.append(newcomer)
        newcomer.write(b"claim", timeout=0)  # lane 3 is free, whole and empty
        assert newcomer._writer.lane in (bad, 3)
        if newcomer._writer.lane == 3:
            scene.fill([3])
        check_stats(scene.ring)
        damages += drain(scene.ring, rng, got := [])
        scene.check_healthy(got, [bad])
        assert len(damages) <= 1 and all(name in text and f"lane {bad} " in text for text in damages), damages

        scene.new_reader()
        scene.fill(healthy)
        again = drain(scene.ring, rng, got := [])
        scene.check_healthy(got, [bad])
        assert len(again) <= 1 and all(name in text and f"lane {bad} " in text for text in again), again
        scene.close()
        with pytest.raises(FileNotFoundError):
            Ring.open(name)

    run_cases(cases, seed, case)


def write_to_damaged(scene, lane):
    """The lane's own writer writes, or says that the lane is damaged; elsewhere it changes nothing."""
    ring, rng, segment = scene.writers[lane], scene.rng, scene.segment
    if ring.closed:
        return
    mine = of_writer(segment.layout, lane)
    for _ in range(rng.randrange(4)):
        was_sound, before, where = sound(segment, lane), picture(segment, *mine), positions(segment, lane)
        batch, looked_at = rng.random() < 0.5, ring._writer._known
        try:
            if batch:
                ring.write_many([scene.new_message(lane) for _ in range(rng.randrange(1, 9))], timeout=0)
            else:
                write_somehow(ring, rng, scene.new_message(lane))
        except RingTimeout:
            pass
        except RingCorrupted as error:
            assert ring.name in str(error) and f"lane {lane} " in str(error)
            assert positions(segment, lane) == where
        else:
            # One by one it may know the position better than the word does, and put that right. A batch may go into
            # room that an earlier look found, whatever read_pos has come to say.
            assert was_sound or not batch or where[1] == looked_at, f"a batch was written from {where}"
        assert picture(segment, *mine) == before, "a writer wrote what is not its own"
    check_stats(ring)


def fuzz_claims(name, seed, cases):
    """See `test_a_damaged_lane_is_never_claimed_and_a_whole_one_is`."""

    def case(rng):
        scene = Scene(name, rng)
        scene.warm_up()
        scene.writers[2].close()
        bad = rng.sample([0, 1, 2, 3], rng.randrange(1, 5))
        for lane in bad:
            if lane < 2:
                scene.writers[lane].close()
            print("damaged:", scene.damage(lane), file=sys.stderr)
        free = [lane for lane in range(4) if lane > 1 or lane in bad]
        whole = [lane for lane in free if sound(scene.segment, lane)]
        check_stats(scene.ring)
        with Ring.open(name, spin=0) as newcomer:
            try:
                write_somehow(newcomer, rng, b"x")
            except RingCorrupted as error:
                assert not whole and f"{len(free)} of its 4 lanes are damaged" in str(error) and name in str(error)
            else:
                assert newcomer._writer.lane in whole
            held = 4 - len(free) + (newcomer._writer.lane >= 0)
            assert scene.ring.stats().lanes_in_use == held, "only the lane that was claimed is held"
        scene.close()

    run_cases(cases, seed, case)


@contextlib.contextmanager
def scribbling(scene, lane):
    """Somebody scribbles over a lane meanwhile: another process, or, where there are no forks, a thread."""
    if hasattr(os, "fork"):
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(DEADLINE))
            scribble(scene, lane, lambda: False)
        try:
            yield
        finally:
            os.kill(pid, SIGKILL)
            os.waitpid(pid, 0)
    else:
        enough = threading.Event()
        thread = threading.Thread(target=scribble, args=(scene, lane, enough.is_set))
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join()


def scribble(scene, lane, enough):
    """Change a lane's positions and lengths as fast as it goes, also to what could be."""
    rng, words, layout = scene.rng, scene.segment.words, scene.segment.layout
    read_pos, write_pos, first = layout.cursor(lane) >> 3, layout.lane_block(lane) >> 3, layout.lane_bytes(lane) >> 3
    lap = words[write_pos] // layout.capacity * layout.capacity
    while not enough():
        start = lap + rng.randrange(0, 64, 8)
        words[read_pos], words[write_pos] = start, start + rng.randrange(0, layout.capacity, 8)
        for _ in range(rng.randrange(200)):
            words[first + rng.randrange(16)] = rng.choice([0, 8, 8, 8, 9, 64])
        if rng.random() < 0.1:
            scene.damage(lane)


def fuzz_while_working(name, seed, cases):
    """See `test_bytes_that_change_under_their_users_hurt_nobody_else`."""

    def read_a_little(scene, got):
        """As `drain`, but it may be that there is always something."""
        try:
            scene.rng.choice(READS)(scene.ring, scene.rng, got)
        except RingCorrupted as error:
            return [str(error)]
        except (BufferTooSmall, RingTimeout):
            pass
        return []

    def case(rng):
        scene = Scene(name, rng)
        scene.warm_up()
        drain(scene.ring, rng, [])
        scene.sent = [[] for _ in range(4)]
        bad = rng.randrange(3)
        damages, got = [], []
        with scribbling(scene, bad):
            end = time.monotonic() + 0.15
            while time.monotonic() < end:
                scene.fill([lane for lane in range(3) if lane != bad])
                with contextlib.suppress(RingCorrupted):
                    write_somehow(scene.writers[bad], rng, scene.new_message(bad))
                for _ in range(20):
                    damages += read_a_little(scene, got)
                check_stats(scene.ring)
                if damages:
                    assert len(damages) == 1 and name in damages[0] and f"lane {bad} " in damages[0], damages
                    scene.new_reader()
                    damages = []
        drain(scene.ring, rng, got)
        scene.check_healthy(got, [bad])
        scene.close()

    run_cases(cases, seed, case)


def test_a_damaged_lane_is_reported_once_and_the_others_are_read_whole(name, children, seed):
    fuzz(children, fuzz_lanes, name, seed, 150)


def test_a_damaged_lane_is_never_claimed_and_a_whole_one_is(name, children, seed):
    fuzz(children, fuzz_claims, name, seed, 100)


def test_bytes_that_change_under_their_users_hurt_nobody_else(name, children, seed):
    fuzz(children, fuzz_while_working, name, seed, 8)


@pytest.mark.parametrize("writers", [1, 2])
def test_a_write_pos_that_goes_back_after_padding_alone_is_damage(name, writers):
    """The reader has seen no record yet whose size it could compare with."""
    with Ring.create(name, 4096, writers=writers) as ring:
        ring.write(bytes(1000))
        with Ring.open(name) as other:
            other.read()
        assert not ring.try_write(bytes(4000)), "it fits neither before the lane's end nor after it"
        with Ring.open(name) as other:
            assert other.try_read() is None
            ring._segment.words[ring._segment.layout.lane_block(0) >> 3] -= 1
            with pytest.raises(RingCorrupted, match=f"{name}.*lane 0"):
                other.try_read()
            assert other.try_read() is None


@pytest.mark.parametrize("write", [
    lambda ring, data: ring.write_many([data]),
    lambda ring, data: ring.write_many([data, data + b"x"]),
    lambda ring, data: (ring.write_many([]), ring.write(data)),
], ids=["one size", "two sizes", "one by one"])  # fmt: skip
def test_a_writer_whose_write_pos_is_between_records_says_so_and_does_not_write(name, write):
    with Ring.create(name, 4096, writers=1) as ring:
        ring.write(b"12345678")
        ring._segment.words[ring._segment.layout.lane_block(0) >> 3] += 3
        before = picture(ring._segment)
        with pytest.raises(RingCorrupted, match=f"{name}.*lane 0"):
            write(ring, b"12345678")
        bell = ring._segment.layout.readers_offset + _layout.READER_BELL
        after = picture(ring._segment)
        before[bell] = after[bell]
        assert after == before


@pytest.mark.parametrize("value", [4096 + 11, 4096 - 8, 4096 + 16 - 8192])
def test_no_message_is_put_in_place_where_a_damaged_write_pos_says(name, value):
    """Where it has been before there was room, but that lies at the end of a lane, before another one's bytes."""
    with Ring.create(name, 4096, writers=2) as ring:
        for size in (4088, 8):
            with ring.reserve(size):
                pass
            ring.read()
        words, write_pos = ring._segment.words, ring._segment.layout.lane_block(0) >> 3
        assert words[write_pos] == 4096 + 16
        words[write_pos] = value & WORD
        bell = ring._segment.layout.readers_offset + _layout.READER_BELL, 4
        before = picture(ring._segment, bell)
        with pytest.raises(RingCorrupted, match=f"{name}.*lane 0"), ring.reserve(100) as view:
            view[:] = bytes(100)
        assert picture(ring._segment, bell) == before


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("value", boundaries(4096), ids=hex)
def test_stats_of_damaged_positions_have_a_fill_of_0_to_1(name, lanes, value):
    with Ring.create(name, 4096, writers=lanes) as ring:
        layout = ring._segment.layout
        for read_pos, write_pos in ((value, 0), (0, value), (value, value)):
            for lane in range(lanes):
                ring._segment.words[layout.cursor(lane) >> 3] = read_pos
                ring._segment.words[layout.lane_block(lane) >> 3] = write_pos
            check_stats(ring)


def test_nothing_of_a_batch_of_several_bursts_is_written_where_read_pos_is_damaged(name):
    with Ring.create(name, 4 * BURST, writers=1) as ring:
        ring.write_many([b"an earlier look"])
        ring._segment.words[ring._segment.layout.cursor(0) >> 3] = 1 << 40
        before = positions(ring._segment, 0)
        with pytest.raises(RingCorrupted):
            ring.write_many([bytes(1000)] * 200, timeout=0)
        assert positions(ring._segment, 0) == before


@pytest.mark.parametrize("value", [1, 8, 4096, 1 << 31, (1 << 63) - 8, (1 << 64) - 1], ids=hex)
@pytest.mark.parametrize("word", ["write_pos", "read_pos", "reader_parked", "writer_parked", "writer_wanted", "used"])
@pytest.mark.parametrize("side", ["reader", "writer"])
def test_who_waits_at_damaged_words_uses_no_processor_time(name, side, word, value):
    with Ring.create(name, 4096, writers=2, spin=0) as ring, Ring.open(name, spin=0) as other:
        layout = ring._segment.layout
        for _ in range(3):
            ring.write(bytes(900))
            other.read()
        if side == "writer":
            while ring.try_write(bytes(900)):
                pass
        offset = {
            "write_pos": layout.lane_block(0) + _layout.WRITE_POS,
            "read_pos": layout.cursor(0) + _layout.READ_POS,
            "reader_parked": layout.readers_offset + _layout.READER_PARKED,
            "writer_parked": layout.lane_block(0) + _layout.WRITER_PARKED,
            "writer_wanted": layout.lane_block(0) + _layout.WRITER_WANTED,
            "used": layout.used_offset,
        }[word]
        ring._segment.words[offset >> 3] = value
        used = time.thread_time()
        for _ in range(3):
            try:
                while True:
                    other.read(timeout=0.02) if side == "reader" else ring.write(bytes(900), timeout=0.02)
            except (RingTimeout, RingCorrupted):
                pass
        assert time.thread_time() - used < 0.02


# ---------------------------------------------------------------- fuzz: the header


FIELDS = struct.Struct("=8sIIQQIIIIIIQ16s40x")

def damaged_header(rng, header, layout):
    """A header with something changed, under a checksum that may fit nevertheless."""
    data = bytearray(header)
    for _ in range(rng.choice([1, 1, 2, 8])):
        kind = rng.randrange(4)
        if kind == 0:
            data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            words = [(offset, "=I") for offset in (8, 12, 32, 36, 40, 44, 48, 52)]
            offset, form = rng.choice(words + [(offset, "=Q") for offset in (16, 24, 56, 120)])
            (old,) = struct.unpack_from(form, data, offset)
            value = other_word(rng, old, layout.capacity) & (1 << 8 * struct.calcsize(form)) - 1
            data[offset : offset + struct.calcsize(form)] = struct.pack(form, value)
        elif rng.random() < 0.2:
            data[:] = rng.getrandbits(8 * len(data)).to_bytes(len(data), "little")
    if rng.random() < 0.3:
        # Another shape, with all sizes as they belong to it.
        capacity, writers = rng.choice([4096, 1 << 20, 1 << 40, 1 << 41]), rng.choice([0, 1, 4096, 4097])
        shape = _layout.Layout(capacity, writers, True, bytes(16))
        fields = list(FIELDS.unpack_from(header))
        fields[3:6], fields[11] = [shape.segment_bytes & WORD, capacity, writers], shape.lanes_offset
        data[: FIELDS.size] = FIELDS.pack(*fields)
    if rng.random() < 0.7:
        data[120:128] = struct.pack("=Q", zlib.crc32(data[:120]))
    return bytes(data)


def fuzz_headers_of_a_living_ring(name, seed, cases):
    """See `test_open_takes_no_damaged_header_of_a_living_ring`."""
    with Ring.create(name, 4096, writers=2) as ring:
        layout, memory = ring._segment.layout, ring._segment.map
        header = memory[: _layout.HEADER_BYTES]
        refused = 0

        def case(rng):
            nonlocal refused
            data = damaged_header(rng, header, layout)
            memory[: len(data)] = data
            try:
                Ring.open(name).close()
            except (RingCorrupted, RingIncompatible) as error:
                assert name in str(error)
                refused += 1
            else:
                assert data[:16] == header[:16] and zlib.crc32(data[:120]) == struct.unpack("=Q", data[120:128])[0]
            finally:
                memory[: len(header)] = header

        run_cases(cases, seed, case)
        assert cases // 2 < refused, "most headers should be refused"
        with Ring.open(name) as other:
            other.write(b"whole again")
            assert ring.read() == b"whole again"


def test_open_takes_no_damaged_header_of_a_living_ring(name, children, seed):
    fuzz(children, fuzz_headers_of_a_living_ring, name, seed, 1000)


@pytest.mark.stress
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("function, cases", [(fuzz_lanes, 1000), (fuzz_claims, 1500), (fuzz_while_working, 60)])
def test_much_more_of_the_same(name, children, seed, function, cases, part):
    fuzz(children, function, name, f"{seed}-{part}", cases)
