"""Whoever is ended, wherever: nothing is lost, nobody hangs, every role is free again. For Windows.

First before bytecodes of every operation (`windows_harness.py` says how), then at random moments from outside,
and at the moments that matter most.
"""

from __future__ import annotations

import os
import sys

import pytest

if sys.platform != "win32":
    pytest.skip("TerminateProcess, and claims by named events", allow_module_level=True)

import json
import random
import threading
import time

import windows_harness as there  # also what runs in other processes, which need not import pytest for it
from support import DEADLINE, KILLED, Line, Words, wait_until
from windows_harness import CASES, SOON, Account

from shmring import BufferTooSmall, MessageTooLarge, Ring, RingBusy, _windows, unlink

# At how many places of each operation it is ended, at random; SHMRING_EVERY=7 is at each 7th.
TRIALS = 2
EVERY = int(os.environ.get("SHMRING_EVERY") or 0)


class Supervisor:
    """The process that does the trials; another one after a failure."""

    def __init__(self):
        self._process = None

    def order(self, **order):
        if self._process is None:
            self._process = there.start("supervise")
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()  # it ends if it hangs
        said = json.loads(line) if line else {"failure": "the supervisor ended; on stderr it says why"}
        if "failure" in said:
            self.close()
        return said

    def close(self):
        if self._process is not None:
            self._process.communicate(timeout=DEADLINE)
            self._process = None


@pytest.fixture(scope="module")
def supervisor():
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.mark.parametrize("case", CASES)
def test_before_bytecodes(case, supervisor, name, seed):
    """See the case's docstring in `operations.py`."""
    said = supervisor.order(case=case, name=name, seed=seed, trials=TRIALS, every=EVERY)
    assert "failure" not in said, said["failure"]
    print("{}: before bytecodes {tried} of {bytecodes}, of which {places} change something".format(case, **said))
    assert said["tried"] or EVERY


# ---------------------------------------------------------------- at random moments, from outside

WRITERS, READERS = 3, 2  # at a time; the second reader waits for the role


@pytest.mark.parametrize("kills", [8, pytest.param(500, marks=pytest.mark.stress)])
def test_at_random_moments(kills, name, children, shared, endless, seed):
    """Each new writer needs the lane of the one whose place it takes, and no wait ends of itself."""
    dice = random.Random(seed)
    account = Account(shared(Words, 100 + 3 * kills), readers=READERS + kills)
    alive = {"writer": {}, "reader": {}}  # pids by number
    started = {"writer": 0, "reader": 0}
    may_be_taken = 0

    def start(role):
        number = started[role]
        started[role] += 1
        live = there.write_for_ever if role == "writer" else there.read_for_ever
        alive[role][number] = children.start(live, ring, account, number, dice.getrandbits(32))

    def received():
        return sum(account.seen(writer)[0] for writer in range(started["writer"]))

    def kill(role):
        number = dice.choice(list(alive[role]))
        children.kill(alive[role].pop(number))
        late = time.monotonic() + SOON
        while True:  # who lives may not have taken its role yet
            is_late, stats = time.monotonic() > late, ring.stats()
            if stats.lanes_in_use <= len(alive["writer"]) and stats.readers <= len(alive["reader"]):
                break
            assert not is_late, f"a dead process still has a role after {SOON} s: {stats}"
        return account[account.calling(number)] if role == "reader" else 0

    with Ring.create(name, 1 << 15, writers=WRITERS) as ring:
        for role, number in (("writer", WRITERS), ("reader", READERS)):
            for _ in range(number):
                start(role)
        for _ in range(kills):
            before = received()
            wait_until(lambda before=before: received() > before, "that the messages go on")
            time.sleep(dice.uniform(0, 0.2))
            role = dice.choice(("writer", "reader"))
            may_be_taken += kill(role)
            start(role)
        before = received()
        wait_until(lambda: received() > before, "that the messages go on")
        for role, living in alive.items():
            while living:
                may_be_taken += kill(role)
        with Ring.open(name) as last:
            while (data := last.try_read()) is not None:
                account.note(data)
        lost = 0
        for writer in range(started["writer"]):
            acknowledged, (seen, skipped) = account[account.acknowledged(writer)], account.seen(writer)
            assert seen <= acknowledged + there.CALL
            lost += skipped + max(acknowledged - seen, 0)
        print(f"{received()} received, {lost} taken by readers that were killed, whose calls were for {may_be_taken}")
        assert (account[Account.TORN], account[Account.DOUBLED]) == (0, 0)
        assert lost <= may_be_taken


# ---------------------------------------------------------------- whatever ends a process

MEANS = ["from outside", "TerminateProcess", "os._exit"]


def end(children, victim, means):
    """See a victim's end, which is its own doing or ours."""
    if means == "from outside":
        children.kill(victim)
    else:
        assert children.join(victim) == KILLED


@pytest.mark.parametrize("means", MEANS)
def test_roles_are_free_within_a_second_and_what_was_acknowledged_is_there(means, name, children, shared):
    """Taken by one who was not there, from a process that held both."""
    told = shared(Line)
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        victim = children.start(there.take_both_roles, ring, told, means)
        told.hear()
        if means == "from outside":
            for act in (lambda: ring.try_write(b"no"), ring.try_read):
                with pytest.raises(RingBusy):
                    act()
        end(children, victim, means)
        late = time.monotonic() + SOON
        messages, wrote = [], False
        while not messages:
            is_late = time.monotonic() > late
            try:
                wrote = wrote or ring.try_write(b"four")
                messages = ring.read_many()
            except RingBusy:
                assert not is_late, f"a dead process still has a role after {SOON} s"
        assert messages == [b"two", b"three", b"four"]


@pytest.mark.parametrize("means", MEANS)
def test_a_ring_goes_with_the_last_process_that_had_it(means, name, children, shared):
    """Nothing is left: no name, no presence, no memory."""
    told = shared(Line)
    ring = Ring.create(name, 4096, writers=1, spin=0)
    objects = [ring._segment._of(kind) for kind in ("present", "ring")]
    victim = children.start(there.take_both_roles, ring, told, means)
    told.hear()
    ring.close()
    if means == "from outside":
        Ring.open(name).close()  # it lives on in the other process
    end(children, victim, means)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    assert not any(map(_windows._exists, objects))
    with Ring.create(name, 8192) as ring:
        assert ring.try_read() is None


# ---------------------------------------------------------------- the lock of a name


@pytest.fixture
def outcomes(monkeypatch):
    """What the waits for a mutex came to; and they begin when the list is no longer empty."""
    found, wait = [], _windows._wait

    def noted(handle, milliseconds):
        found.append("waits")
        found[-1] = outcome = wait(handle, milliseconds)
        return outcome

    monkeypatch.setattr(_windows, "_wait", noted)
    return found


@pytest.mark.parametrize(
    "means, half_done", [("from outside", True), ("TerminateProcess", False), ("os._exit", False), ("os._exit", True)]
)
def test_who_dies_with_the_lock_of_a_name_blocks_nobody(means, half_done, name, children, shared, outcomes):
    """The next one gets it as abandoned. A name that was half written leads nowhere."""
    told, ask = shared(Line), shared(Line)
    with Ring.create(name) as former:  # has the page of the name open, which stays so
        former.unlink()
        mutex = there.name_lock(name)  # it outlives its holder
        outcomes.clear()
        victim = children.start(there.hold_the_lock, name, told, ask, means, half_done)
        told.hear()
        ask.say()
        end(children, victim, means)
        with pytest.raises(FileNotFoundError):
            Ring.open(name)
        with there.name_page(name) as page:
            assert any(page[:16]) == half_done
        with Ring.create(name) as ring, Ring.open(name) as other:
            other.write(b"new")
            assert ring.read() == b"new"
            assert outcomes == [_windows.WAIT_ABANDONED]
            with pytest.raises(FileExistsError):
                Ring.create(name)
            assert outcomes == [_windows.WAIT_ABANDONED, _windows.WAIT_OBJECT_0]
        del mutex


def test_who_waits_for_the_lock_gets_it_when_its_holder_dies(name, children, shared, outcomes, monkeypatch):
    """At once, and not when the time is up."""
    monkeypatch.setattr(_windows, "LOCK_SECONDS", 2 * DEADLINE)
    told, ask = shared(Line), shared(Line)
    victim = children.start(there.hold_the_lock, name, told, ask, "from outside", False)
    told.hear()
    made = []
    waiting = threading.Thread(target=lambda: made.append(Ring.create(name)), daemon=True)
    waiting.start()
    wait_until(lambda: outcomes == ["waits"], "that somebody waits for the lock")
    children.kill(victim)
    waiting.join(DEADLINE)
    assert outcomes == [_windows.WAIT_ABANDONED]
    with made[0], Ring.open(name):
        pass


def test_who_holds_the_lock_and_does_not_get_on_makes_the_ring_busy(name, children, shared, monkeypatch):
    """Changes are refused after a second, and nothing is changed; everything that is no change of the name goes on."""
    told, ask = shared(Line), shared(Line)
    with Ring.create(name) as ring:
        stuck = children.start(there.hold_the_lock, name, told, ask, "", False)
        told.hear()
        began = time.perf_counter()
        with pytest.raises(RingBusy, match="does not get on"):
            unlink(name)
        assert time.perf_counter() - began > 0.9 * _windows.LOCK_SECONDS
        monkeypatch.setattr(_windows, "LOCK_SECONDS", 0.05)
        for change in (ring.unlink, lambda: Ring.create(name), lambda: Ring.create(name, replace=True)):
            with pytest.raises(RingBusy, match="does not get on"):
                change()
        with Ring.open(name) as other:
            other.write(b"as before")
            assert ring.read() == b"as before"
        monkeypatch.undo()
        ask.say()
        assert children.join(stuck) == 0
        with pytest.raises(FileExistsError):
            Ring.create(name)
        unlink(name)
        with pytest.raises(FileNotFoundError):
            Ring.open(name)


# ---------------------------------------------------------------- while others sleep


def test_a_sleeping_reader_is_woken_by_the_successor_of_a_writer_that_died_before_its_bell(
    name, children, shared, endless
):
    """C1: the message is published, and its writer was the only one who would have rung."""
    told, heard, ask = shared(Line), shared(Line), shared(Line)
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        reader = children.start(there.read_messages, ring, heard, 2)
        victim = children.start(there.write_and_die_before_the_bell, ring, told, ask)
        told.hear(), heard.hear()
        wait_until(lambda: ring.stats().readers_parked, "that the reader sleeps")
        ask.say()
        assert children.join(victim) == KILLED
        stats = ring.stats()
        assert (stats.messages_in, stats.messages_out, stats.readers_parked) == (2, 1, 1)
        with Ring.open(name) as successor:
            with pytest.raises(MessageTooLarge):
                successor.write(bytes(successor.max_message + 1))  # claims the lane, and writes nothing
            heard.hear()
        assert children.join(reader) == 0


def test_a_sleeping_writer_is_woken_by_the_successor_of_a_reader_that_died_before_its_bell(
    name, children, shared, endless
):
    """C1: there is room, and its reader was the only one who would have rung."""
    told, heard, ask = shared(Line), shared(Line), shared(Line)
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        victim = children.start(there.read_and_die_before_the_bell, ring, told, ask)
        told.hear()
        writer = children.start(there.write_messages, ring, heard, 9, 500)
        heard.hear(8)
        # The second time: at first it waits for more than a message's room, and one read does not wake it.
        wait_until(lambda: ring.stats().writer_parks >= 2, "that the writer sleeps for one message's room")
        wait_until(lambda: ring.stats().writers_parked, "that the writer sleeps")
        ask.say()
        assert children.join(victim) == KILLED
        stats = ring.stats()
        assert (stats.messages_in, stats.messages_out, stats.writers_parked) == (8, 1, 1)
        with Ring.open(name) as successor:
            with pytest.raises(BufferTooSmall):
                successor.read(max_len=0)  # claims the role, and takes nothing
            heard.hear()
        assert children.join(writer) == 0


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_who_is_killed_in_its_sleep_leaves_its_role_and_its_bell_to_the_next_one(
    role, name, children, shared, endless
):
    """It is announced as asleep for ever, until somebody takes its role; that one sleeps and is woken as usual."""
    heard = shared(Line)
    with Ring.create(name, 4096, writers=1, spin=0) as ring:

        def sleep():
            if role == "reader":
                return children.start(there.read_messages, ring, heard, 1)
            return children.start(there.write_messages, ring, heard, 9 - ring.stats().messages_in, 500)

        def asleep():
            stats = ring.stats()
            return (stats.readers_parked, stats.reader_parks) if role == "reader" else (
                stats.writers_parked, stats.writer_parks
            )  # fmt: skip

        times = {"reader": 1, "writer": 2}[role]  # a writer sleeps at first for more than its message's room
        victim = sleep()
        wait_until(lambda: asleep() == (1, times), f"that the {role} sleeps")
        children.kill(victim)
        assert asleep() == (1, times)
        successor = sleep()
        wait_until(lambda: asleep() == (1, 2 * times), f"that the next {role} sleeps")
        if role == "reader":
            ring.write(b"here it is")
        else:
            heard.hear(8)
            ring.read()
        assert children.join(successor) == 0
        assert asleep()[0] == 0
