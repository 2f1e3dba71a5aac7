"""Handles that travel to other processes, as a name and the ring's nonce."""

from __future__ import annotations

import multiprocessing
import os
import pickle

import pytest
from conftest import DARWIN, DEADLINE, segments

from shmring import Ring, RingClosed, RingError


def answer(ring, back):
    with ring, back:
        for message in ring.messages(timeout=DEADLINE):
            if message == b"end":
                break
            back.write(message[::-1])


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_handle_goes_to_another_process(name, children, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    with Ring.create(name, 4096) as there, Ring.create(name + "-back", 4096) as back:
        process = children.spawn(answer, there, back, method=method)
        there.write_many([b"12", b"", b"abc" * 100, b"end"])
        assert [back.read(timeout=DEADLINE) for _ in range(3)] == [b"21", b"", b"cba" * 100]
        process.join(DEADLINE)
        assert process.exitcode == 0


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_opens_the_same_ring_and_owns_no_role(name, protocol):
    with Ring.create(name, 4096, spin=0.5, writers=2) as ring:
        ring.write(b"1")
        with pickle.loads(pickle.dumps(ring, protocol)) as copy:
            assert copy is not ring and (copy.name, copy.capacity) == (ring.name, ring.capacity)
            copy.write(b"2")
            assert ring.stats().lanes_in_use == 2
            assert sorted(copy.read_many()) == [b"1", b"2"]
        assert not ring.closed


def test_a_subclass_comes_back_as_itself(name):
    with Special.create(name) as ring, pickle.loads(pickle.dumps(ring)) as copy:
        assert type(copy) is Special


class Special(Ring):
    pass


def test_a_pickle_refuses_another_ring_of_that_name(name):
    with Ring.create(name) as ring:
        data = pickle.dumps(ring)
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)
    with Ring.create(name) as another:
        with pytest.raises(RingError, match=name):
            pickle.loads(data)
        another.write(b"unharmed")
        assert another.read() == b"unharmed"
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    assert f"shmring.{name}" not in segments()


def test_a_closed_handle_is_not_pickled(name):
    ring = Ring.create(name)
    ring.close()
    with pytest.raises(RingClosed, match=name):
        pickle.dumps(ring)


@pytest.mark.skipif(
    DARWIN or not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to another user"
)
def test_a_pickle_trusts_whom_its_original_trusted(name):
    with Ring.create(name) as ring:
        os.chown(f"/dev/shm/shmring.{name}", 12345, -1)
        with pytest.raises(PermissionError):
            pickle.loads(pickle.dumps(ring))
        with Ring.open(name, any_owner=True) as other, pickle.loads(pickle.dumps(other)) as copy:
            copy.write(b"trusted")
            assert ring.read() == b"trusted"
