"""Doorbells, and tasks that wait in event loops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import glob
import os
import selectors
import stat
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DEADLINE, KILLED, WINDOWS, descriptors, segments, wait_until
from support import DARWIN, kill_yourself

from shmring import Doorbell, Ring, RingBusy, RingClosed, RingTimeout, _layout, unlink
from shmring._backend import os_backend
from shmring._loop import BUSY

with contextlib.suppress(ImportError):
    import fcntl

    from shmring import _posix

ON_LINUX = sys.platform == "linux" and not DARWIN
needs_selectors = pytest.mark.skipif(WINDOWS, reason="selectors wait for nothing but sockets here")
needs_fifos = pytest.mark.skipif(WINDOWS, reason="doorbells are events there, which go with their processes")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def ring(name):
    with Ring.create(name, 4096, writers=4, spin=0) as ring:
        yield ring


@pytest.fixture
def other(ring):
    with Ring.open(ring.name, spin=0) as other:
        yield other


def run(coroutine):
    """Run it, and fail if it takes too long."""
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE))


def is_rung(ring):
    """Is the doorbell readable, on POSIX as a selector sees it?"""
    if WINDOWS:
        return os_backend._poll(ring.fileno(), 0) == os_backend.WAIT_OBJECT_0
    return bool(ready(ring, 0))


def ready(ring, timeout):
    with selectors.DefaultSelector() as selector:
        selector.register(ring.fileno(), selectors.EVENT_READ)
        return selector.select(timeout)


def writes(name, *messages):
    with Ring.open(name) as ring:
        for message in messages:
            ring.write(message)


# ---------------------------------------------------------------- the doorbell


def test_it_rings_once_there_was_nothing_and_not_again_before(ring, other):
    doorbell = ring.attach_doorbell()
    assert isinstance(doorbell, Doorbell) and doorbell.fileno() == ring.fileno()
    assert not is_rung(ring)
    other.write(b"1")
    assert is_rung(ring)
    assert ring.try_read() == b"1" and is_rung(ring), "only who finds nothing makes it silent"
    assert ring.try_read() is None and not is_rung(ring)
    assert ring.try_read() is None
    other.write(b"2")
    other.write(b"3")
    assert is_rung(ring)
    assert [ring.try_read() for _ in range(3)] == [b"2", b"3", None]
    assert not is_rung(ring)


def test_attaching_looks_for_what_is_there_already(ring, other):
    other.write(b"1")
    ring.attach_doorbell()
    assert ring.wait_doorbell(0)
    assert ring.read() == b"1" and ring.try_read() is None
    other.write(b"2")
    assert is_rung(ring)


@pytest.mark.parametrize("read", [
    lambda ring: ring.read(timeout=0), lambda ring: ring.read_many(timeout=0),
    lambda ring: ring.read(bytearray(9), timeout=0),
], ids=["read", "read_many", "read into"])  # fmt: skip
def test_a_read_that_is_out_of_time_announces_as_well(ring, other, read):
    ring.attach_doorbell()
    for _ in range(3):
        other.write(b"message")
        assert is_rung(ring)
        read(ring)
        with pytest.raises(RingTimeout):
            read(ring)
        assert not is_rung(ring)


def test_each_writer_rings_it_once_per_sleep(ring):
    rung = []
    with Ring.open(ring.name) as first, Ring.open(ring.name) as second:
        for writer in (first, second):
            writer.write(b"")  # the claims ring as well
            actual = writer._segment.ring
            writer._segment.ring = lambda bell, actual=actual: (rung.append(bell), actual(bell))
        ring.attach_doorbell()
        while ring.try_read() is not None:
            pass
        for number in range(1, 4):
            for _ in range(5):
                first.write(b"1")
                second.write(b"2")
            assert len(rung) == 2 * number
            assert is_rung(ring)
            while ring.try_read() is not None:
                pass


@needs_selectors
def test_a_selector_is_woken_by_another_process(ring, children, endless):
    with selectors.DefaultSelector() as selector:
        selector.register(ring, selectors.EVENT_READ)
        for number in range(5):
            assert ring.try_read() is None
            pid = children.start(writes, ring.name, b"%d" % number, b"")
            assert selector.select(DEADLINE)
            wait_until(lambda number=number: ring.stats().messages_in == 2 * number + 2)
            assert [ring.try_read(), ring.try_read(), ring.try_read()] == [b"%d" % number, b"", None]
            assert children.join(pid) == 0


def test_waiting_takes_nothing_and_needs_no_doorbell(ring, other, children):
    assert not ring.wait_doorbell(0)
    begin = time.perf_counter()
    assert not ring.wait_doorbell(0.02)
    assert time.perf_counter() - begin >= 0.02
    pid = children.start(writes, ring.name, b"1")
    assert ring.wait_doorbell(DEADLINE) and ring.attach_doorbell().wait(DEADLINE)
    assert ring.read() == b"1"
    assert children.join(pid) == 0


def test_threads_that_sleep_and_the_doorbell_are_both_rung(ring, other):
    ring.attach_doorbell()
    assert ring.try_read() is None
    got = []
    thread = threading.Thread(target=lambda: got.append(ring.read()))
    thread.start()
    wait_until(lambda: ring.stats().reader_parks >= 2)
    time.sleep(0.02)
    other.write(b"1")
    thread.join(DEADLINE)
    assert got == [b"1"] and is_rung(ring)
    assert ring.try_read() is None and not is_rung(ring)
    other.write(b"2")
    assert is_rung(ring)


def test_the_role_is_needed_and_closed_handles_have_none(ring, other):
    assert other.try_read() is None
    for use in (ring.attach_doorbell, ring.fileno, lambda: ring.wait_doorbell(0)):
        with pytest.raises(RingBusy):
            use()
    doorbell = other.attach_doorbell()
    other.close()
    for use in (other.attach_doorbell, other.fileno, doorbell.fileno, doorbell.wait):
        with pytest.raises(RingClosed):
            use()


def test_the_next_reader_has_one_of_its_own(ring, children):
    with Ring.open(ring.name) as writer:
        for number in range(4):
            with Ring.open(ring.name) as reader:
                reader.attach_doorbell()
                assert reader.try_read() is None and not is_rung(reader)
                writer.write(b"%d" % number)
                assert is_rung(reader)
                assert reader.read() == b"%d" % number


def attach_and_die(name):
    ring = Ring.open(name)
    ring.attach_doorbell()
    kill_yourself()


def test_the_successor_of_a_killed_reader_hears_its_own(ring, children):
    with Ring.open(ring.name) as writer:
        for number in range(3):
            assert children.join(children.start(attach_and_die, ring.name)) == KILLED
            writer.write(b"lost?")  # rings nobody, or what the dead one left
            with Ring.open(ring.name) as reader:
                reader.attach_doorbell()
                assert reader.try_read() == b"lost?"
                assert reader.try_read() is None and not is_rung(reader)
                writer.write(b"%d" % number)
                assert is_rung(reader) and reader.try_read() == b"%d" % number


def fifos(name):
    """The doorbells of a ring of this name that are there, also of processes that were killed."""
    if ON_LINUX:
        return glob.glob(f"{os_backend.DIRECTORY}/{os_backend.DOORBELLS}{name}.*")
    found = Path(os_backend._folder()).glob("ring-*/doorbell-*")
    return [path for path in found if path.with_name("ring").read_text().endswith(f"\n{name}\n")]


def create_and_die(name, keep=False):
    ring = Ring.create(name, 4096, keep=keep)
    ring.attach_doorbell()
    kill_yourself()


@needs_fifos
def test_what_a_killed_reader_leaves_goes_with_the_ring(name, children):
    with Ring.create(name, 4096):
        assert children.join(children.start(attach_and_die, name)) == KILLED
        assert len(fifos(name)) == 1
        with Ring.open(name) as reader:
            reader.attach_doorbell()
            assert len(fifos(name)) == 1
        assert not fifos(name)
        assert children.join(children.start(attach_and_die, name)) == KILLED
    assert not fifos(name)
    assert children.join(children.start(create_and_die, name)) == KILLED
    assert len(fifos(name)) == 1
    Ring.create(name, 4096).close()
    assert not fifos(name) and not segments()


@needs_fifos
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
def test_what_a_killed_reader_leaves_goes_with_the_name_of_a_ring_that_nobody_has(name, children, keep):
    assert children.join(children.start(create_and_die, name, keep)) == KILLED
    assert len(fifos(name)) == 1
    unlink(name)
    assert not fifos(name)


@needs_fifos
def test_what_a_killed_reader_leaves_goes_when_a_kept_ring_is_replaced_or_unlinked_by_a_handle(name, children):
    assert children.join(children.start(create_and_die, name, True)) == KILLED
    with Ring.create(name, 4096, keep=True, replace=True):
        assert not fifos(name)
        assert children.join(children.start(attach_and_die, name)) == KILLED
    assert len(fifos(name)) == 1, "the ring is kept, with what its next reader would take"
    with Ring.open(name) as ring, Ring.open(name) as last:
        ring.unlink()
        ring.close()
        assert len(fifos(name)) == 1 and last.try_read() is None
    assert not fifos(name)


@needs_fifos
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
def test_the_doorbell_of_a_ring_whose_name_was_removed_rings_on(name, keep):
    """Whoever has the ring open is not to lose its doorbell with the name: its writers may not have opened it yet."""
    with Ring.create(name, 4096, keep=keep) as reader, Ring.open(name) as writer:
        reader.attach_doorbell()
        assert reader.try_read() is None
        unlink(name)
        assert len(fifos(name)) == 1
        writer.write(b"1")
        assert is_rung(reader) and reader.try_read() == b"1"
    assert not fifos(name)


@pytest.mark.skipif(not ON_LINUX, reason="no locks of open file descriptions")
def test_a_creator_waits_for_who_removes_what_is_left_of_a_ring(name, children, monkeypatch):
    """A lock that only keeps others from coming in must not look like somebody who has the ring open."""
    assert children.join(children.start(create_and_die, name, True)) == KILLED
    with open(f"{os_backend.DIRECTORY}/{os_backend.PREFIX}{name}", "r+b") as removing:
        assert os_backend._lock(removing.fileno(), fcntl.F_WRLCK, _layout.PRESENCE)
        monkeypatch.setattr(time, "sleep", lambda seconds: removing.close())
        Ring.create(name, 4096, replace=True).close()
    assert not fifos(name)


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere a ring is one user's")
def test_a_doorbell_gets_the_rings_mode_also_where_its_maker_was_killed_before(name, children):
    """What the umask leaves of the mode must not stay: writers of other users could not open it."""

    def make_and_die():
        os.umask(0o077)
        os.fchmod = lambda fd, mode: kill_yourself()
        attach_and_die(name)

    with Ring.create(name, 4096, mode=0o666) as ring:
        assert children.join(children.start(make_and_die)) == KILLED
        assert stat.S_IMODE(os.stat(*fifos(name)).st_mode) == 0o600
        ring.attach_doorbell()
        assert stat.S_IMODE(os.stat(*fifos(name)).st_mode) == 0o666


@pytest.mark.skipif(not ON_LINUX or os.geteuid(), reason="changes users")
@pytest.mark.parametrize("mode, owner, reader, writer", [
    (0o666, 0, 12345, 12346), (0o660, 0, 12345, 12346), (0o666, 12347, 12345, 12346), (0o600, 12345, 0, 12345),
    (0o600, 12345, 12345, 0),
], ids=["others", "group", "owned by a third", "read by root", "written by root"])  # fmt: skip
def test_who_may_use_a_ring_can_ring_its_reader_whoever_that_is(name, children, mode, owner, reader, writer):
    """A reader that is another user than the ring's owner must not sleep on because writers cannot ring."""
    group = 4321

    def become(user):
        os.setgroups([group])
        os.setgid(user)
        os.setuid(user)

    def read():
        become(reader)
        with Ring.open(name, any_owner=True) as ring:
            ring.attach_doorbell()
            assert ring.try_read() is None
            assert ready(ring, DEADLINE)

    def write():
        become(writer)
        with Ring.open(name, any_owner=True) as ring:
            ring.write(b"1")

    with Ring.create(name, 4096, mode=mode) as ring:
        os.chown(f"{os_backend.DIRECTORY}/{os_backend.PREFIX}{name}", owner, group)
        reading = children.start(read)
        wait_until(lambda: ring.stats().reader_parks)
        assert children.join(children.start(write)) == 0
        assert children.join(reading) == 0


@pytest.mark.skipif(not ON_LINUX, reason="elsewhere a ring is one user's")
@pytest.mark.parametrize("mode, gid, trusted", [
    (0o600, 0, False), (0o644, 0, False), (0o660, 1, False), (0o660, 0, True), (0o602, 1, True)
])  # fmt: skip
def test_a_strangers_doorbell_is_trusted_only_where_strangers_may_write_to_the_ring(name, mode, gid, trusted):
    with Ring.create(name, 4096, mode=mode) as ring:
        status = os.stat(f"{os_backend.DIRECTORY}/{os_backend.PREFIX}{name}")
        stranger = SimpleNamespace(st_uid=status.st_uid + 1, st_gid=status.st_gid + gid)
        assert ring._segment._trusts(stranger) is trusted
        assert ring._segment._trusts(status) and ring._segment._trusts(SimpleNamespace(st_uid=0, st_gid=gid))


@needs_fork
def test_a_forked_child_has_no_doorbell_of_its_parents(ring, other, children):
    ring.attach_doorbell()
    number = ring.fileno()

    def child():
        with pytest.raises(OSError):
            os.read(number, 1)
        with pytest.raises(RingBusy):
            ring.attach_doorbell()
        ring.write(b"from the child")

    assert ring.try_read() is None
    assert children.join(children.start(child)) == 0
    assert is_rung(ring) and ring.try_read() == b"from the child"


@needs_fork
def test_a_doorbell_that_cannot_be_opened_is_rung_with_the_next_message(name, children):
    """A waker with no descriptor left must neither fail after it has published, nor count the doorbell as rung."""

    def alone():
        import resource

        def without_descriptors(work):
            taken, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
            with pytest.raises(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            work()
            for fd in taken:
                os.close(fd)

        with Ring.create(name, 4096, spin=0) as ring, Ring.open(name, spin=0) as other:
            other.write(b"claimed")
            doorbell = ring.attach_doorbell()
            assert [ring.try_read(), ring.try_read()] == [b"claimed", None]
            without_descriptors(lambda: other.write(b"1"))
            assert not is_rung(ring)
            other.write(b"2")
            assert is_rung(ring) and doorbell.wait(0)
            while other.try_write(bytes(400)):
                pass
            parking = other._writer.parking
            room = parking.attach()
            wanted = other._writer.read_pos + 8
            assert parking.arm(lambda: other._writer.nothing(wanted), wanted)
            without_descriptors(lambda: ring.read())
            assert not room.heard()
            assert ring.read() == b"2" and room.heard()

    assert children.join(children.start(alone)) == 0


@needs_fork
@pytest.mark.skipif(DARWIN, reason="there a writer that sleeps needs a descriptor itself")
def test_a_writer_that_waits_rings_the_doorbell_that_it_could_not_open(name, children, endless):
    """Its next message may never come, because there is no room, and the reader does not know of any."""

    def alone():
        import resource

        with Ring.create(name, 4096, spin=0) as ring, Ring.open(name, spin=0) as other:
            other.write(b"claimed")
            ring.attach_doorbell()
            assert [ring.try_read(), ring.try_read()] == [b"claimed", None]
            taken, limits = [], resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
            with pytest.raises(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            while other.try_write(bytes(400)):
                pass
            assert not ring._reader.parking.doorbell.heard()
            writing = threading.Thread(target=other.write, args=(bytes(399), DEADLINE))
            writing.start()
            wait_until(lambda: ring.stats().writers_parked)
            for fd in taken:
                os.close(fd)
            wait_until(lambda: is_rung(ring), "the doorbell")
            while len(ring.read(timeout=DEADLINE)) != 399:
                pass
            writing.join(DEADLINE)

    assert children.join(children.start(alone)) == 0


# ---------------------------------------------------------------- tasks


def test_a_task_waits_while_others_run(ring, other):
    async def main():
        reading = asyncio.ensure_future(ring.read_async())
        for _ in range(3):
            await asyncio.sleep(0.001)
        assert not reading.done()
        other.write(b"1")
        assert await reading == b"1"
        await other.write_async(b"2")
        assert await ring.read_async() == b"2"
        for _ in range(3):
            other.write(b"3")
        assert await ring.read_many_async() == [b"3"] * 3
        other.write(b"4")
        assert await ring.read_many_async(1) == [b"4"]
        with pytest.raises(ValueError):
            await ring.read_many_async(0)

    run(main())


def test_messages_between_processes_come_once_and_in_order(name, children, endless):
    with Ring.create(f"{name}-to", 4096, spin=0) as there, Ring.create(f"{name}-fro", 4096, spin=0) as back:

        async def echo():
            async for message in there:
                if message == b"end":
                    return
                await back.write_async(message)

        pid = children.start(lambda: asyncio.run(echo()))

        async def main():
            async def feed():
                for number in range(2000):
                    await there.write_async(b"%d" % number * (1 + number % 40))
                await there.write_async(b"end")

            feeding = asyncio.ensure_future(feed())
            for number in range(2000):
                assert await back.read_async() == b"%d" % number * (1 + number % 40)
            await feeding

        run(main())
        assert children.join(pid) == 0


def test_several_rings_in_one_loop(name, children, endless):
    rings = [Ring.create(f"{name}-{i}", 4096, spin=0) for i in range(5)]
    try:
        pids = [
            children.start(writes, ring.name, *[b"%d" % (i + number) for number in range(100)])
            for i, ring in enumerate(rings)
        ]

        async def read(ring, first):
            for number in range(100):
                assert await ring.read_async() == b"%d" % (first + number)

        async def main():
            await asyncio.gather(*[read(ring, i) for i, ring in enumerate(rings)])

        run(main())
        for pid in pids:
            assert children.join(pid) == 0
    finally:
        for ring in rings:
            ring.close()


def test_tasks_that_wait_for_one_ring_each_get_their_messages(ring, other):
    async def main():
        tasks = [asyncio.ensure_future(ring.read_async()) for _ in range(10)]
        await asyncio.sleep(0.01)
        for number in range(10):
            await other.write_async(b"%d" % number)
            await asyncio.sleep(0)
        assert sorted(await asyncio.gather(*tasks)) == [b"%d" % number for number in range(10)]

    run(main())


@pytest.mark.parametrize("when", ["asleep", "rung", "running"])
def test_a_task_that_is_cancelled_has_taken_nothing(ring, other, when):
    async def main():
        got = []

        async def read():
            got.append(await ring.read_async())

        for number in range(50):
            task = asyncio.ensure_future(read())
            if when != "running":
                await asyncio.sleep(0.001)
            if when != "asleep":
                other.write(b"%d" % number)
            if when == "rung":
                for _ in range(number % 4):
                    await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
        rest = iter(ring.try_read, None)
        sent = [] if when == "asleep" else [b"%d" % number for number in range(50)]
        assert [*got, *rest] == sent or sorted([*got, *rest]) == sorted(sent)

    run(main())


@pytest.fixture
def patient(ring):
    """A handle whose tasks look again and again for long before they sleep."""
    with Ring.open(ring.name, spin=1) as patient:
        yield patient


@pytest.mark.parametrize("read", ["read_async", "read_many_async"])
def test_a_task_that_spins_lets_others_run_and_takes_what_comes_without_a_bell(patient, other, read):
    async def main():
        waiting = asyncio.ensure_future(getattr(patient, read)())
        for _ in range(10):
            await asyncio.sleep(0)
            assert not waiting.done()
        other.write(b"1")
        await asyncio.sleep(0)
        assert waiting.done() and waiting.result() in (b"1", [b"1"])
        assert patient.stats().reader_parks == 0

    run(main())


def test_a_task_that_spun_in_vain_sleeps(patient, other):
    patient._read_spin._now = patient._read_spin._most = 0.001

    async def main():
        waiting = asyncio.ensure_future(patient.read_async())
        while not patient.stats().reader_parks:
            await asyncio.sleep(0)
        assert patient._watches[patient._reader]._waiting and patient._read_spin._now == 0.0005
        other.write(b"1")
        assert await waiting == b"1"
        # Rung, it did not learn from that how long to spin.
        assert patient._read_spin._now == 0.0005

    run(main())


def test_a_task_that_spins_has_its_time_and_is_cancelled_with_nothing_taken(patient, other):
    async def main():
        begin = time.perf_counter()
        with pytest.raises(RingTimeout):
            await patient.read_async(timeout=0.02)
        assert time.perf_counter() - begin >= 0.02
        waiting = asyncio.ensure_future(patient.read_async())
        await asyncio.sleep(0)
        other.write(b"1")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert patient.stats().reader_parks == 1  # armed when the time was up
        assert await patient.read_async() == b"1"

    run(main())


@pytest.mark.parametrize("timeout", [0, 0.001])
def test_the_doorbell_is_sure_to_ring_after_a_task_that_spun_had_its_time(patient, other, timeout):
    async def main():
        with pytest.raises(RingTimeout):
            await patient.read_async(timeout=timeout)
        assert not is_rung(patient)
        other.write(b"1")
        assert is_rung(patient)

    run(main())


def test_a_task_learns_that_to_spin_was_in_vain(patient, other, monkeypatch):
    spin = patient._read_spin
    perf_counter = time.perf_counter

    async def main():
        waiting = asyncio.ensure_future(patient.read_async(timeout=DEADLINE))
        for _ in range(3):
            await asyncio.sleep(0)
        # Not by waiting: on a slow machine the time can be up before the first look, and then there was no spin.
        with monkeypatch.context() as later, pytest.raises(RingTimeout):
            later.setattr(time, "perf_counter", lambda: perf_counter() + DEADLINE)
            await waiting
        assert spin._now == 0.5
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(patient.read_async(), 0.001)
        assert spin._now == 0.25
        spin._now = 0.001
        waiting = asyncio.ensure_future(patient.read_async())
        await asyncio.sleep(0)
        time.sleep(0.002)  # as if another process had this processor: the next look comes too late to count
        other.write(b"1")
        assert await waiting == b"1" and spin._now == 0.0005

    run(main())


@pytest.mark.parametrize("read", ["read_async", "read_many_async"])
def test_an_exception_between_a_spin_that_paid_and_its_caller_loses_nothing(patient, other, read):
    class Interrupt(Exception):
        """As a signal handler's."""

    class Spin(type(patient._read_spin)):
        def learn(self, paid):
            raise Interrupt

    async def main():
        learns, patient._read_spin = patient._read_spin, Spin(1)
        waiting = asyncio.ensure_future(getattr(patient, read)())
        await asyncio.sleep(0)
        other.write(b"1")
        with pytest.raises(Interrupt):
            await waiting
        patient._read_spin = learns
        other.write(b"2")
        assert [await patient.read_async(), await patient.read_async()] == [b"1", b"2"]

    run(main())


def test_a_handle_that_is_closed_while_a_task_spins_is_closed(patient):
    async def main():
        waiting = asyncio.ensure_future(patient.read_async())
        await asyncio.sleep(0)
        patient.close()
        with pytest.raises(RingClosed):
            await waiting

    run(main())


def test_waiting_has_its_time(ring, other):
    async def main():
        for read in (ring.read_async, ring.read_many_async):
            begin = time.perf_counter()
            with pytest.raises(RingTimeout):
                await read(timeout=0.02)
            assert time.perf_counter() - begin >= 0.02
            with pytest.raises(RingTimeout):
                await read(timeout=0)
        while other.try_write(bytes(100)):
            pass
        begin = time.perf_counter()
        with pytest.raises(RingTimeout):
            await other.write_async(bytes(100), timeout=0.02)
        assert time.perf_counter() - begin >= 0.02
        count = ring.stats().messages_in
        assert len(await ring.read_many_async()) == count

    run(main())


def test_a_full_ring_is_waited_for(ring, other):
    async def main():
        async def write():
            for number in range(300):
                await other.write_async(b"%03d" % number * 100)

        writing = asyncio.ensure_future(write())
        await asyncio.sleep(0.01)
        assert not writing.done()
        for number in range(300):
            assert await ring.read_async() == b"%03d" % number * 100
        await writing

    run(main())


def test_tasks_that_wait_for_room_of_different_sizes_all_get_it(ring, other):
    async def main():
        while other.try_write(bytes(500)):
            pass
        sizes = [3000, 10, 600, 2000]
        writing = [asyncio.ensure_future(other.write_async(bytes(size))) for size in sizes]
        await asyncio.sleep(0.01)
        got = []
        while len(got) < len(sizes):
            got += [len(m) for m in await ring.read_many_async() if len(m) != 500]
        assert sorted(got) == sorted(sizes)
        await asyncio.gather(*writing)

    run(main())


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("does", ["reads", "writes"])
def test_a_task_that_never_waits_lets_others_run(ring, other, does, waited):
    async def main():
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        if waited:
            with pytest.raises(RingTimeout):
                await ring.read_async(timeout=0)
            with pytest.raises(RingTimeout):
                while True:
                    await other.write_async(bytes(1000), timeout=0.01)
            ring.read_many()
        counting = asyncio.ensure_future(count())
        for _ in range(50):
            for _ in range(40):
                await other.write_async(b"x") if does == "writes" else other.write(b"x")
            for _ in range(40):
                await ring.read_async() if does == "reads" else ring.read()
        assert turns > 10
        counting.cancel()

    run(main())


@pytest.mark.parametrize("wait", ["read", "iterate", "write"])
def test_closing_ends_what_waits(ring, wait):
    async def main(close):
        handle = Ring.open(ring.name, spin=0)
        if wait == "write":
            while handle.try_write(bytes(400)):
                pass
            task = asyncio.ensure_future(handle.write_async(bytes(400)))
        elif wait == "read":
            task = asyncio.ensure_future(handle.read_async())
        else:

            async def iterate():
                return [message async for message in handle]

            task = asyncio.ensure_future(iterate())
        await asyncio.sleep(0.01)
        assert not task.done()
        close(handle)
        if wait == "iterate":
            assert await task == []
        else:
            with pytest.raises(RingClosed):
                await task
        with pytest.raises(RingClosed):
            await (handle.write_async(b"") if wait == "write" else handle.read_async())
    def elsewhere(handle):
        thread = threading.Thread(target=handle.close)
        thread.start()
        thread.join(DEADLINE)

    run(main(Ring.close))
    if wait != "write":
        run(main(elsewhere))


def test_a_handle_goes_from_one_loop_to_the_next(ring, other):
    async def main(number):
        reading = asyncio.ensure_future(ring.read_async())
        await asyncio.sleep(0.001)
        other.write(b"%d" % number)
        assert await reading == b"%d" % number

    for number in range(3):
        run(main(number))
        gc.collect()


def test_loops_of_several_threads_wait_for_one_handle(ring, other):
    got = []

    async def main():
        for _ in range(50):
            got.append(await ring.read_async())

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(150):
        other.write(b"%d" % number)
        if number % 10 == 0:
            time.sleep(0.002)
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(got, key=int) == [b"%d" % number for number in range(150)]


def test_a_killed_writer_leaves_a_task_that_its_successor_wakes(ring, children):
    with Ring.open(ring.name) as last:

        def write_and_die():
            writer = Ring.open(ring.name)
            writer._segment.ring = lambda bell: None  # killed before it rings
            writer.write(b"1")
            kill_yourself()

        async def main():
            reading = asyncio.ensure_future(ring.read_async())
            await asyncio.sleep(0.01)
            assert children.join(children.start(write_and_die)) == KILLED
            await asyncio.sleep(0.01)
            last.write(b"2")  # the claim rings
            assert {await reading, await ring.read_async()} == {b"1", b"2"}

        run(main())


def test_an_idle_loop_costs_nothing_and_a_busy_one_is_rung_seldom(ring, other):
    async def main():
        reading = asyncio.ensure_future(ring.read_async())
        await asyncio.sleep(0.01)
        begin = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - begin < 0.1
        rung = []
        actual = other._segment.ring
        other._segment.ring = lambda bell: (rung.append(bell), actual(bell))
        other.write(b"")
        await reading
        rung.clear()
        for _ in range(100):
            for _ in range(10):
                other.write(b"x")
            for _ in range(10):
                await ring.read_async()
        assert len(rung) <= 1, "while there is something nobody has to ring"

    run(main())


@pytest.mark.skipif(not WINDOWS, reason="elsewhere each loop will do")
def test_another_loop_on_windows_is_refused(ring):
    async def main():
        with pytest.raises(NotImplementedError, match="ProactorEventLoop, not in a"):
            await ring.read_async()

    loop = asyncio.SelectorEventLoop()
    loop.run_until_complete(main())
    loop.close()


def test_where_wakers_cannot_be_made_to_fence_there_is_no_doorbell_but_tasks_look_again(ring, other, monkeypatch):
    monkeypatch.setattr(os_backend.Segment, "sleeper_fence", lambda self: False)
    with pytest.raises(OSError, match="not sure here"):
        ring.attach_doorbell()

    async def main():
        reading = asyncio.ensure_future(ring.read_async())
        await asyncio.sleep(0.01)
        other._segment.ring = lambda bell: None
        other.write(b"1")
        assert await reading == b"1"

    run(main())


def test_the_states_of_a_doorbell_are_told_in_the_ring(ring, other):
    word = (ring._segment.layout.readers_offset + _layout.READER_DOORBELL) >> 3
    words = ring._segment.words
    assert words[word] == 0
    ring.attach_doorbell()
    assert ring.try_read() is None
    assert words[word] & 3 == _layout.ATTACHED | _layout.ALONE
    first = words[word] >> 2
    ring.close()
    other.attach_doorbell()
    words = other._segment.words
    assert words[word] & _layout.ATTACHED and words[word] >> 2 == first + 1


# ---------------------------------------------------------------- what a review found


def test_a_task_that_has_no_room_lets_one_run_whose_room_is_there(ring, in_time):
    """A task that needs more must not look again and again while another one's smaller need is met."""

    async def main():
        while ring.try_write(bytes(1000)):
            pass
        small = asyncio.ensure_future(ring.write_async(bytes(500)))
        await asyncio.sleep(0.01)
        assert not small.done()
        assert ring.try_read() is not None  # room for the small one, which has not run yet
        large = asyncio.ensure_future(ring.write_async(bytes(3000)))
        await small
        assert len(await ring.read_many_async()) == 4
        await large

    run(main())


def in_thread(loops):
    """A running loop in a thread of its own, both to be ended by `end`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    loops.append((loop, thread))
    return loop, thread


@pytest.fixture
def loops():
    started = []
    yield started
    for loop, thread in started:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE)
        loop.close()


def test_a_loop_that_hears_does_not_take_the_ring_of_an_epoch_begun_meanwhile(ring, other, loops, monkeypatch):
    """What one thread's loop hears must not leave another's task asleep in an epoch that was rung already."""
    (first, hearing), (second, arming) = in_thread(loops), in_thread(loops)
    submit = asyncio.run_coroutine_threadsafe
    listens = submit(ring.read_async(), first)
    watch = wait_until(lambda: ring._watches.get(ring._reader))
    wait_until(lambda: watch._waiting and watch.parking._armed[0] == 0)
    listens.cancel()
    wait_until(lambda: not watch._waiting)  # the first loop listens yet, for nobody
    armed, emptied, got, reading = threading.Event(), threading.Event(), [], []
    parking = watch.parking
    actual_heard, actual_arm = parking.doorbell.heard, parking.arm

    async def read():
        for _ in range(3):
            got.append(await ring.read_async())

    def heard():
        if threading.current_thread() is not hearing or armed.is_set():
            return actual_heard()
        reading.append(submit(read(), second))
        assert armed.wait(DEADLINE)  # it has taken the first message
        other.write(b"2")
        answer = actual_heard()
        emptied.set()
        return answer

    def arm(*args):
        answer = actual_arm(*args)
        if threading.current_thread() is arming and not armed.is_set():
            armed.set()
            assert emptied.wait(DEADLINE)
        return answer

    monkeypatch.setattr(parking.doorbell, "heard", heard)
    monkeypatch.setattr(parking, "arm", arm)
    other.write(b"1")
    wait_until(lambda: len(got) == 2 and watch._waiting and parking._armed[0] == 0)
    other.write(b"3")
    assert reading[0].result(DEADLINE) is None and got == [b"1", b"2", b"3"]


def test_a_stream_does_not_end_the_announcement_of_a_task_that_waits(ring, other, loops, monkeypatch):
    """A task that never waits must not have writers leave out the ring that another one sleeps for."""
    other.write(b"claimed")
    assert ring.try_read() == b"claimed"
    loop, _ = in_thread(loops)
    published, may_ring = threading.Event(), threading.Event()
    actual = other._writer._bells.ring

    def late():
        published.set()
        assert may_ring.wait(DEADLINE)
        actual()

    async def main():
        sleeping = asyncio.ensure_future(ring.read_async(timeout=DEADLINE))
        await asyncio.sleep(0.01)
        monkeypatch.setattr(other._writer._bells, "ring", late)
        writing = threading.Thread(target=other.write_many, args=([b"%d" % number for number in range(8)],))
        writing.start()
        assert published.wait(DEADLINE)
        for number in range(BUSY + 1):
            assert await ring.read_async() == b"%d" % number
        may_ring.set()
        begin = time.perf_counter()
        assert await sleeping == b"%d" % (BUSY + 1)
        assert time.perf_counter() - begin < DEADLINE / 2
        writing.join(DEADLINE)

    asyncio.run_coroutine_threadsafe(main(), loop).result(DEADLINE)


def test_who_takes_messages_by_hand_does_not_take_a_tasks_ring(ring, other, monkeypatch):
    """`try_read` hears the doorbell for a task of the same handle as well, which must not sleep on."""

    async def main():
        sleeping = asyncio.ensure_future(ring.read_async())
        await asyncio.sleep(0.01)
        doorbell = ring._reader.parking.doorbell
        actual = doorbell.heard

        def heard():
            monkeypatch.setattr(doorbell, "heard", actual)
            other.write(b"1")  # both come between `try_read`'s look and its announcement
            other.write(b"2")
            return actual()

        monkeypatch.setattr(doorbell, "heard", heard)
        assert ring.try_read() == b"1"
        assert await sleeping == b"2"

    run(main())


@needs_selectors
def test_a_descriptor_that_has_become_a_strangers_is_left_alone(ring):
    """A doorbell that was closed behind its back must not be read from, nor written to: the number is not ours."""
    number = ring.fileno()
    assert ring.try_read() is None
    os.close(number)
    end, writing = os.pipe()
    os.write(writing, b"a stranger's")
    if end != number:
        os.dup2(end, number)
    os.set_blocking(number, False)
    with pytest.raises(OSError, match="closed, maybe behind its back"):
        ring.try_read()
    assert not ring._reader.parking.doorbell.ring()
    assert os.read(number, 100) == b"a stranger's"
    ring.close()
    os.close(writing)
    for fd in {end, number}:
        os.close(fd)  # not closed by the handle


@needs_fifos
def test_an_exception_as_soon_as_a_doorbell_is_open_leaves_no_descriptor(ring, monkeypatch):
    """A signal handler's, before it is known which file that is."""
    before = descriptors()
    place = ring._segment._doorbell_place(0)

    def interrupted(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(_posix.os, "fstat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _posix.Doorbell(*place, 0o600)
    gc.collect()
    assert descriptors() == before


def test_a_handle_that_another_thread_closes_before_a_task_sleeps_is_closed(ring):
    """Between a task's look and its sleep the doorbell may go: that is RingClosed, not an error of a descriptor."""

    async def main():
        actual = ring._take

        def take():
            answer = actual()
            thread = threading.Thread(target=ring.close)
            thread.start()
            thread.join(DEADLINE)
            return answer

        ring._take = take
        with pytest.raises(RingClosed):
            await ring.read_async(timeout=DEADLINE)

    run(main())


WAKING = ["_loop", "_parking"]  # the modules


def interrupted_at(number, work):
    """Do `work`, with an exception at the line of that number that wakes and closes. False: it has fewer."""
    left = number
    files = {sys.modules[f"{Ring.__module__.rpartition('.')[0]}.{name}"].__file__ for name in WAKING}

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.mark.parametrize("what", ["close", "hear"])
def test_an_exception_while_tasks_are_woken_leaves_none_asleep(name, what):
    """A signal handler's exception at any line of it must not lose the wake-up: `close` is called again, or the loop
    hears the doorbell once more."""
    for number in range(1, 400):
        loop = asyncio.new_event_loop()
        with Ring.create(name, 4096, spin=0) as ring, Ring.open(name) as other:
            task = loop.create_task(ring.read_async())
            loop.run_until_complete(asyncio.sleep(0))
            watch = ring._watches[ring._reader]
            assert watch._waiting
            if what == "close":
                more = interrupted_at(number, ring.close)
                ring.close()
            else:
                other.write(b"1")
                more = interrupted_at(number, watch._heard)
            loop.run_until_complete(asyncio.wait([task], timeout=DEADLINE))
            assert task.done(), f"asleep after an exception at line {number}"
            assert task.exception() is None if what == "hear" else isinstance(task.exception(), RingClosed)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        if not more:
            return
    raise AssertionError("there is no end to it")
