"""Random operations against a `collections.deque` for each lane. SHMRING_SEED repeats a failure."""

from __future__ import annotations

import random
import time
from collections import deque

import pytest

from shmring import BufferTooSmall, Ring, RingTimeout
from shmring._layout import record_bytes

CAPACITY = 4096
SECONDS = 2.0
LANES = 4


class Model:
    """Four writers' handles, which close and come back on any lane, and one reader."""

    def __init__(self, ring, rng):
        self.ring, self.random = ring, rng
        self.writers = [None] * LANES
        self.lanes = [deque() for _ in range(LANES)]
        self.written = self.read = 0

    def message(self, lane):
        """The first byte tells the lane; only lane 0 has empty ones."""
        size = self.random.choice([0, 1, 2, 8, self.random.randrange(64), self.random.randrange(CAPACITY - 7)])
        if self.random.random() < 0.02:
            size = CAPACITY - 8
        return (bytes([lane]) + self.random.getrandbits(64).to_bytes(8, "little") * (size // 8 + 1))[
            : max(size, lane > 0)
        ]

    def writer(self):
        index = self.random.randrange(LANES)
        if self.writers[index] is None:
            self.writers[index] = Ring.open(self.ring.name)
            self.writers[index].write_many([])  # claims a lane
        handle = self.writers[index]
        return handle, handle._writer.lane

    # Operations

    def write(self):
        handle, lane = self.writer()
        message = self.message(lane)
        before = self.fill(lane)
        if handle.try_write(message):
            self.lanes[lane].append(message)
            self.written += 1
            assert before + record_bytes(len(message)) <= CAPACITY
        else:
            assert before + record_bytes(len(message)) > CAPACITY // 2 or self.lanes[lane] or before == 0

    def write_many(self):
        handle, lane = self.writer()
        messages = [
            self.message(lane)[: self.random.choice([1, 9, 40, CAPACITY])] for _ in range(self.random.randrange(1, 30))
        ]
        if self.random.random() < 0.5:
            messages = [messages[0]] * len(messages)
        try:
            done = handle.write_many(messages, timeout=0)
        except RingTimeout:
            done = 0
        self.lanes[lane].extend(messages[:done])
        self.written += done

    def reopen(self):
        index = self.random.randrange(LANES)
        if self.writers[index] is not None:
            self.writers[index].close()
            self.writers[index] = None

    def try_read(self):
        message = self.ring.try_read()
        self.take([] if message is None else [message])

    def read_many(self):
        try:
            self.take(self.ring.read_many(self.random.choice([None, 1, 2, 5, 20]), timeout=0))
        except RingTimeout:
            self.take([])

    def read_into(self):
        buffer = bytearray(self.random.choice([0, 1, 8, 100, CAPACITY]))
        try:
            size = self.ring.read(buffer, timeout=0)
        except RingTimeout:
            self.take([])
        except BufferTooSmall as error:
            assert error.needed in {len(lane[0]) for lane in self.lanes if lane} and error.needed > len(buffer)
        else:
            self.take([bytes(buffer[:size])])

    def iterate(self):
        most = self.random.randrange(1, 30)
        got = []
        for message in self.ring.messages(timeout=0):
            got.append(message)
            if len(got) == most:
                break
        self.take(got)

    # What must hold

    def fill(self, lane):
        return sum(record_bytes(len(message)) for message in self.lanes[lane])

    def take(self, got):
        for message in got:
            lane = self.lanes[message[0] if message else 0]
            assert lane and message == lane.popleft()
            self.read += 1
        if not got:
            assert not any(self.lanes), "there was something to read"

    def check(self):
        stats = self.ring.stats()
        assert (stats.messages_in, stats.messages_out) == (self.written, self.read)
        assert stats.bytes_in - stats.bytes_out >= sum(map(self.fill, range(LANES)))
        assert stats.lanes_in_use == sum(handle is not None for handle in self.writers)


@pytest.mark.parametrize("writing", [0.35, 0.5, 0.65], ids=["mostly empty", "even", "mostly full"])
def test_random_operations_do_what_a_deque_for_each_lane_does(name, seed, writing):
    rng = random.Random(seed)
    with Ring.create(name, CAPACITY, writers=LANES) as ring:
        model = Model(ring, rng)
        writes = [model.write] * 6 + [model.write_many] * 3
        reads = [model.try_read] * 5 + [model.read_many] * 2 + [model.read_into] * 3 + [model.iterate]
        end, operations = time.monotonic() + SECONDS, 0
        while time.monotonic() < end and operations < 20_000:
            for _ in range(200):
                rng.choice(writes if rng.random() < writing else reads)()
                if rng.random() < 0.01:
                    model.reopen()
                operations += 1
            model.check()
        model.take([*ring.messages(timeout=0)])
        model.take([])
        model.check()
        assert model.written == model.read > 0
        for handle in model.writers:
            if handle is not None:
                handle.close()


def test_a_seed_repeats_its_operations(name):
    def run():
        with Ring.create(name, CAPACITY, writers=LANES) as ring:
            model = Model(ring, random.Random(5))
            for _ in range(300):
                model.random.choice([model.write, model.write_many, model.try_read, model.iterate])()
            left = list(map(list, model.lanes))
            for handle in filter(None, model.writers):
                handle.close()
            return left

    assert run() == run()
