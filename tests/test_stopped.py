"""Stopped is not dead, and dead is dead: who holds a role is the kernel's word, not a pid's and not a clock's.

A stopped process keeps what it has for as long as it is stopped. One that was killed has nothing from
that moment on, whatever its forked children are about.
"""

from __future__ import annotations

import signal

import pytest

if not hasattr(signal, "SIGSTOP"):
    pytest.skip("no signal stops a process here", allow_module_level=True)

import os
import random
import select
import struct
import subprocess
import sys

from conftest import DEADLINE, segments, wait_until
from test_processes import Account, message, opens, read_each, read_numbered, write_numbered

from shmring import Ring, RingBusy, RingTimeout
from shmring._backend import os_backend


@pytest.fixture
def pipe():
    """Makes pipes, which are closed after the test."""
    made = []

    def make():
        made.extend(os.pipe())
        return made[-2:]

    yield make
    for number in made:
        os.close(number)


def hear(descriptor, count=1):
    """Read bytes from a pipe, in time."""
    data = b""
    while len(data) < count:
        assert select.select([descriptor], [], [], DEADLINE)[0], f"nothing was said in {DEADLINE} s"
        data += os.read(descriptor, count - len(data))
    return data


def kill(children, pid):
    os.kill(pid, signal.SIGKILL)
    assert children.join(pid) == -signal.SIGKILL


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])


def resume(pid):
    os.kill(pid, signal.SIGCONT)


def state(pid):
    """The kernel's letter for what a process does, X if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def refused(*operations):
    """Each is refused, again and again, with RingBusy."""
    for _ in range(20):
        for operation in operations:
            with pytest.raises(RingBusy):
                operation()


@pytest.fixture
def any_time(monkeypatch):
    """Makes this process's clocks leap ahead by a day: no time-out of anybody's else would outlast it."""

    def leap():
        for clock in ("monotonic", "perf_counter", "time"):
            now = getattr(os_backend.time, clock)
            monkeypatch.setattr(os_backend.time, clock, lambda now=now: now() + 86400)

    yield leap
    monkeypatch.undo()


# ---------------------------------------------------------------- writers


def hold(ring, say, *roles):
    """Take roles, say so, and wait to be killed."""
    if "writer" in roles:
        ring.write(b"held")
    if "reader" in roles:
        ring.try_read()
    os.write(say, b"x")
    while True:
        signal.pause()


def test_a_stopped_writer_that_was_doing_nothing_keeps_its_lane(name, children, pipe, any_time):
    ready, say = pipe()
    with Ring.create(name, 4096, writers=2) as ring, Ring.open(name) as late:
        pids = [children.fork(hold, ring, say, "writer") for _ in range(2)]
        hear(ready, 2)
        for pid in pids:
            stop(pid)
        any_time()
        refused(lambda: late.try_write(b""), lambda: ring.write(b"", timeout=0))
        assert ring.stats().lanes_in_use == 2
        assert ring.read_many() == [b"held"] * 2
        kill(children, pids[0])
        late.write(b"in its place")
        refused(lambda: ring.try_write(b""))
        kill(children, pids[1])
        ring.write(b"too")
        assert sorted(ring.read_many()) == [b"in its place", b"too"]


def test_a_writer_stopped_while_parked_on_a_full_ring_keeps_its_lane_and_goes_on(name, children, endless):
    with Ring.create(name, 4096, writers=1, spin=0) as ring, Ring.open(name) as late:
        pid = children.fork(write_numbered, ring, 1, 60)
        account = Account()
        for turn in range(5):
            wait_until(lambda: ring.stats().writers_parked or ring.stats().messages_in == 60)
            stop(pid)
            refused(lambda: late.try_write(b""))
            before = ring.stats()
            if turn % 2:  # it is woken while it is stopped
                for data in iter(ring.try_read, None):
                    account.take(data)
                assert ring.stats().messages_in == before.messages_in
                assert ring.stats().fill == 0
                with pytest.raises(RingTimeout):
                    ring.read(timeout=0.001)
            resume(pid)
            if not turn % 2:
                account.take(ring.read(timeout=DEADLINE))
        for data in read_each(ring, 60 - account.next[1]):
            account.take(data)
        assert children.join(pid) == 0
        assert late.try_write(b"")


@pytest.mark.parametrize("stops", [12, pytest.param(1000, marks=pytest.mark.stress)])
@pytest.mark.parametrize("batch, capacity", [(1, 4096), (1, 1 << 20), (20, 1 << 16)])
def test_a_writer_stopped_at_random_moments_of_a_stream_loses_and_overwrites_nothing(
    name, children, seed, endless, batch, capacity, stops
):
    rng = random.Random(seed)

    def stream():
        writer, number = Ring.open(name), 0
        while True:
            many = [message(1, n) for n in range(number, number + batch)]
            assert writer.write_many(many) == batch if batch > 1 else writer.write(many[0]) is None
            number += batch

    with Ring.create(name, capacity, writers=1) as ring, Ring.open(name) as late:
        pid = children.fork(stream)
        account = Account()
        account.take(ring.read(timeout=DEADLINE))
        for _ in range(stops):
            for data in read_each(ring, rng.choice([0, 1, 5, rng.randrange(300)])):
                account.take(data)
            stop(pid)
            refused(lambda: late.try_write(b""))
            for data in ring.messages(timeout=0):
                account.take(data)
            assert ring.try_read() is None
            refused(lambda: late.try_write(b""))
            resume(pid)
            account.take(ring.read(timeout=DEADLINE))
        stop(pid)
        kill(children, pid)
        for data in ring.messages(timeout=0):
            account.take(data)
        assert late.try_write(message(1, account.next[1])), "killed while it was stopped: its lane is free at once"
        account.take(ring.read(timeout=DEADLINE))


# ---------------------------------------------------------------- readers


def test_a_stopped_reader_keeps_its_role_and_writers_fill_their_lanes_and_wait(name, children, pipe, endless, any_time):
    count = 120
    with Ring.create(name, 4096, writers=2, spin=0) as ring, Ring.open(name) as late:
        reader = children.fork(read_numbered, ring, {1: count, 2: count})
        wait_until(lambda: ring.stats().readers_parked)
        stop(reader)
        writers = [children.fork(write_numbered, ring, writer, count) for writer in (1, 2)]

        def for_good():
            """Each the second time: at first they sleep for more than a message's room, and not for long."""
            stats = ring.stats()
            return stats.writers_parked == 2 and stats.writer_parks >= 4

        wait_until(for_good, "the lanes are full, and both writers sleep")
        any_time()
        refused(ring.try_read, late.try_read, lambda: late.read(timeout=0), late.read_many)
        stats = ring.stats()
        assert (stats.readers, stats.writers_parked, stats.messages_out) == (1, 2, 0)
        resume(reader)
        for pid in [*writers, reader]:
            assert children.join(pid) == 0
        assert late.try_read() is None


@pytest.mark.parametrize("stops", [12, pytest.param(1000, marks=pytest.mark.stress)])
def test_a_reader_stopped_at_random_moments_of_a_stream_takes_each_message_once(name, children, seed, endless, stops):
    rng = random.Random(seed)

    def read():
        reader, account = Ring.open(name), Account()
        while True:
            data = reader.read()
            if data == b"end":
                break
            account.take(data)

    with Ring.create(name, 4096, writers=1) as ring, Ring.open(name) as late:
        pid = children.fork(read)
        wait_until(lambda: ring.stats().readers, "the reader's role")
        number = 0
        for _ in range(stops):
            for _ in range(rng.choice([1, 5, rng.randrange(1, 300)])):
                ring.write(message(1, number), timeout=DEADLINE)
                number += 1
            stop(pid)
            refused(late.try_read)
            while ring.try_write(message(1, number)):
                number += 1
            with pytest.raises(RingTimeout):
                ring.write(bytes(3000), timeout=0.001)
            refused(late.try_read)
            resume(pid)
        ring.write(b"end", timeout=DEADLINE)
        assert children.join(pid) == 0
        assert ring.stats().messages_out == number + 1
        assert late.try_read() is None


def test_a_reader_killed_while_it_is_stopped_leaves_its_role_at_once(name, children, pipe, endless):
    ready, say = pipe()
    with Ring.create(name, 4096, writers=1) as ring:
        for _ in range(5):
            pid = children.fork(hold, ring, say, "reader")
            hear(ready)
            stop(pid)
            ring.write(b"x")
            refused(ring.try_read)
            kill(children, pid)
            with Ring.open(name) as successor:
                assert successor.read(timeout=DEADLINE) == b"x"


def test_a_sleeper_that_is_stopped_and_continued_is_still_woken(name, children, endless):
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        pid = children.fork(read_numbered, ring, {1: 20})
        for number in range(20):
            wait_until(lambda: ring.stats().readers_parked)
            stop(pid)
            if number % 2:
                ring.write(message(1, number))
            resume(pid)
            if not number % 2:
                ring.write(message(1, number))
            wait_until(lambda least=number: ring.stats().messages_out > least)
        assert children.join(pid) == 0


# ---------------------------------------------------------------- the ring itself


def test_a_stopped_process_that_has_the_last_handle_keeps_the_ring_alive(name, children, pipe, any_time):
    ready, say = pipe()
    ring = Ring.create(name, 4096)
    ring.write(b"unread")
    pid = children.fork(hold, ring, say)
    hear(ready)
    stop(pid)
    ring.close()
    any_time()
    for _ in range(20):
        with pytest.raises(FileExistsError):
            Ring.create(name)
        with pytest.raises(RingBusy):
            Ring.create(name, replace=True, keep=True)
        assert f"shmring.{name}" in segments()
    child = children.fork(lambda: Ring.open(name).write(b"found"))  # which does not close it
    assert children.join(child) == 0
    kill(children, pid)
    assert not opens(name), "killed while it was stopped: the ring is gone at once"
    with Ring.create(name) as ring:
        assert ring.try_read() is None


# ---------------------------------------------------------------- forked children of dead owners


def sleeping(ring, ready, told):
    """Do nothing at all."""
    os.write(ready, b"%08d" % os.getpid())
    os.read(told, 1)


def using(ring, ready, told):
    """Use the handle for what is free: statistics, and refused operations."""
    for operation in (lambda: ring.try_write(b""), ring.try_read):
        with pytest.raises(RingBusy):
            operation()
    ring.stats()
    sleeping(ring, ready, told)


def forking(ring, ready, told):
    """Have a grandchild, and go; one that stayed for a moment would keep the ring's name for ever, at an `os._exit`."""
    parent = os.getpid()
    if os.fork() == 0:
        wait_until(lambda: os.getppid() != parent, "the end of the child in between")
        sleeping(ring, ready, told)


def executing(ring, ready, told):
    """Become another program."""
    code = "import os, sys; os.write(int(sys.argv[1]), b'%08d' % os.getpid()); os.read(int(sys.argv[2]), 1)"
    os.set_inheritable(ready, True), os.set_inheritable(told, True)
    os.execv(sys.executable, [sys.executable, "-c", code, str(ready), str(told)])


def opening(ring, ready, told):
    """Have a handle of its own, without a role."""
    with Ring.open(ring.name):
        sleeping(ring, ready, told)


def closing(ring, ready, told):
    """Close the handle."""
    ring.close()
    sleeping(ring, ready, told)


@pytest.mark.parametrize("end", ["killed", "killed while stopped", "killed beside a stopped child"])
@pytest.mark.parametrize("child", [sleeping, using, forking, executing, opening, closing])
def test_the_forked_child_of_a_dead_owner_keeps_none_of_its_roles(name, children, pipe, child, end):
    heard, ready = pipe()
    told, tell = pipe()

    def own():
        mine = Ring.open(name)
        mine.write(b"owner")
        assert mine.try_read() == b"owner"
        if os.fork() == 0:
            status = 1
            try:
                signal.alarm(int(DEADLINE))
                child(mine, ready, told)
                status = 0
            finally:
                os._exit(status)
        os.read(told, 1)

    with Ring.create(name, 4096, writers=1) as ring:
        owner = children.fork(own)
        orphan = int(hear(heard, 8))
        refused(lambda: ring.write(b""), ring.try_read)
        if end == "killed while stopped":
            stop(owner)
        if end == "killed beside a stopped child":
            os.kill(orphan, signal.SIGSTOP)
            wait_until(lambda: state(orphan) == "T", "the child's stop")
        kill(children, owner)
        ring.write(b"free at once")
        assert ring.read_many() == [b"free at once"]
        assert state(orphan) not in "XZ"
        resume(orphan)
        os.write(tell, b"x" * 3)
        wait_until(lambda: state(orphan) in "XZ", "the orphan's end")


def test_a_program_that_a_dead_owner_started_keeps_neither_its_roles_nor_the_ring(name, children, pipe):
    heard, ready = pipe()
    told, tell = pipe()
    code = "import os, sys; os.write(int(sys.argv[1]), b'%08d' % os.getpid()); os.read(int(sys.argv[2]), 1)"

    def own():
        mine = Ring.open(name)
        mine.write(b"owner")
        assert mine.try_read() == b"owner"
        os.set_inheritable(ready, True), os.set_inheritable(told, True)
        subprocess.Popen([sys.executable, "-c", code, str(ready), str(told)], close_fds=False)
        signal.pause()

    with Ring.create(name, 4096, writers=1) as ring:
        owner = children.fork(own)
        program = int(hear(heard, 8))
        refused(lambda: ring.write(b""), ring.try_read)
        kill(children, owner)
        ring.write(b"free at once")
        assert ring.read_many() == [b"free at once"]
        assert state(program) not in "XZ"
    assert not opens(name) and f"shmring.{name}" not in segments()
    os.write(tell, b"x")
    wait_until(lambda: state(program) in "XZ", "the program's end")


def test_a_child_that_took_roles_of_its_own_keeps_them_when_its_parent_dies(name, children, pipe):
    heard, ready = pipe()
    told, tell = pipe()

    def child(mine):
        mine.write(b"child")
        with pytest.raises(RingBusy):
            mine.try_read()
        os.write(ready, struct.pack("i", os.getpid()))
        os.read(told, 1)  # the parent is dead
        got = [mine.read(), mine.read()]  # the reader's role is free for the child
        assert sorted(got) == [b"child", b"parent"], got
        os.write(ready, b"x")
        os.read(told, 1)

    def own():
        mine = Ring.open(name)
        mine.write(b"parent")
        with Ring.open(name) as reader:
            assert reader.try_read() == b"parent"
            mine.write(b"parent")
            if os.fork() == 0:
                try:
                    signal.alarm(int(DEADLINE))
                    child(mine)
                finally:
                    os._exit(0)
            os.read(told, 1)

    with Ring.create(name, 4096, writers=2) as ring:
        owner = children.fork(own)
        (orphan,) = struct.unpack("i", hear(heard, 4))
        refused(lambda: ring.write(b""))
        kill(children, owner)
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (1, 0)
        os.write(tell, b"x")
        hear(heard)
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (1, 1)
        ring.write(b"the parent's lane")
        refused(ring.try_read)
        os.kill(orphan, signal.SIGKILL)
        wait_until(lambda: state(orphan) in "XZ", "the orphan's end")
        assert ring.read_many() == [b"the parent's lane"]
        assert ring.stats().lanes_in_use == 1
