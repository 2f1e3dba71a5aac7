"""What `_backend.py` promises of a segment, held against every backend that runs here."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import DEADLINE, descriptors, segments, wait_until

from shmring import RingBusy, _backend, _layout
from shmring._backend import os_backend

SEGMENTS = [os_backend.Segment]

LANE = _layout.LANE


@pytest.fixture(params=SEGMENTS, ids=lambda cls: cls.__module__.rpartition(".")[2])
def backend(request):
    return request.param


@pytest.fixture
def create(backend, name):
    """Creates segments of one name, and closes them and whatever else was put into its list."""
    opened = []

    def make(capacity=4096, writers=2, keep=False, replace=False):
        segment = backend.create(name, _layout.new_layout(capacity, writers, "one", keep), 0o600, replace)
        opened.append(segment)
        return segment

    make.opened = opened
    yield make
    for segment in opened:
        segment.close()
        segment.words.release()
        segment.bells.release()
        segment.map.close()  # pytest still holds the fixtures when leaks are looked for


@pytest.fixture
def segment(create):
    return create()


@pytest.fixture
def other(backend, segment, create):
    """A second handle of the same segment, in the same process."""
    create.opened.append(backend.open(segment.name, False))
    return create.opened[-1]


@pytest.fixture
def endless(monkeypatch):
    """No slices: nothing but the bell, the deadline and signals ends a wait."""
    monkeypatch.setattr(os_backend, "SLICE", None)


def bell_of(segment):
    return segment.layout.readers_offset + _layout.READER_BELL


def sleep_until_rung(segment, seen, deadline=None):
    """Wait as the ring does, again after every early return; how often it was called."""
    calls = 0
    while segment.bells[bell_of(segment) >> 2] == seen and (deadline is None or time.monotonic() < deadline):
        segment.wait(bell_of(segment), seen, deadline)
        calls += 1
    return calls


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def ends(thread):
    thread.join(DEADLINE)
    return not thread.is_alive()


# ---------------------------------------------------------------- waiting


def test_every_promise_of_the_docstring_has_its_tests_here():
    promises = [line for line in _backend.__doc__.splitlines() if line.startswith("- ")]
    assert len(promises) == 7, "the contract has changed: see that each line has a test, then adjust this number"


@pytest.mark.parametrize("ahead", [0.0, 0.001, 0.05, 0.3])
@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_wait_ends_when_the_monotonic_clock_has_come_to_its_deadline(segment, endless, ahead, main):
    calls = []

    def wait():
        calls.append(sleep_until_rung(segment, 0, time.monotonic() + ahead))

    if main:
        wait()
    else:
        assert ends(in_thread(wait))
    assert calls[0] < 20, "a wait may return early, but not for ever: that would be polling"


def test_wait_with_a_deadline_long_past_returns_at_once(segment, endless):
    for deadline in (time.monotonic() - 1000, 0.0, -1.0):
        assert ends(in_thread(segment.wait, bell_of(segment), 0, deadline))


def test_wait_without_a_deadline_returns_when_the_bell_was_rung_before(segment, endless):
    seen = segment.bells[bell_of(segment) >> 2]
    segment.ring(bell_of(segment))
    assert ends(in_thread(segment.wait, bell_of(segment), seen, None))


def test_wait_without_a_deadline_returns_when_the_bell_is_rung_meanwhile(segment, other, endless):
    thread = in_thread(sleep_until_rung, segment, 0)
    thread.join(0.05)
    assert thread.is_alive()
    other.ring(bell_of(other))
    assert ends(thread)


@pytest.mark.parametrize("seen", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_wait_sleeps_and_wakes_at_every_value_of_the_bell(segment, endless, seen):
    segment.bells[bell_of(segment) >> 2] = seen
    thread = in_thread(sleep_until_rung, segment, seen)
    thread.join(0.02)
    assert thread.is_alive()
    segment.ring(bell_of(segment))
    assert ends(thread)
    assert segment.bells[bell_of(segment) >> 2] == (seen + 1) & 0xFFFFFFFF


def test_one_ring_wakes_everybody_who_sleeps_on_the_bell(segment, other, children, endless):
    threads = [in_thread(sleep_until_rung, handle, 0) for handle in (segment, other) * 2]
    forked = [children.fork(sleep_until_rung, segment, 0) for _ in range(3)]
    threads[0].join(0.1)
    segment.ring(bell_of(segment))
    assert all([ends(thread) for thread in threads])
    assert [children.join(pid) for pid in forked] == [0, 0, 0]


def test_another_bell_wakes_nobody_for_good(segment, endless):
    thread = in_thread(sleep_until_rung, segment, 0)
    segment.ring(segment.layout.lane_block(0) + _layout.WRITER_BELL)
    thread.join(0.05)
    assert thread.is_alive()
    segment.ring(bell_of(segment))
    assert ends(thread)


def test_a_signal_ends_a_wait_so_that_its_handler_runs(segment, endless):
    class Handled(Exception):
        pass

    def handler(number, frame):
        raise Handled

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(Handled):
            # Again and again: a signal that comes just before the system call does not interrupt it.
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            sleep_until_rung(segment, 0, time.monotonic() + DEADLINE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_sleeping_process_uses_no_processor_time(segment, children, endless):
    def sleep():
        before = time.process_time()
        sleep_until_rung(segment, 0)
        assert time.process_time() - before < 0.005

    pid = children.fork(sleep)
    time.sleep(0.5)
    segment.ring(bell_of(segment))
    assert children.join(pid) == 0


# ---------------------------------------------------------------- ringing


def test_a_ring_with_nobody_asleep_changes_nothing_but_the_bell(segment):
    before = bytes(segment.map)
    for _ in range(1000):
        segment.ring(bell_of(segment))
    assert segment.bells[bell_of(segment) >> 2] == 1000
    segment.bells[bell_of(segment) >> 2] = 0
    assert bytes(segment.map) == before


def test_rings_of_many_processes_are_all_remembered(segment, other, children):
    def ring(handle):
        for _ in range(20_000):
            handle.ring(bell_of(handle))

    assert [children.join(pid) for pid in [children.fork(ring, handle) for handle in (segment, other)]] == [0, 0]
    assert segment.bells[bell_of(segment) >> 2] == 40_000


def test_bells_rung_while_others_fall_asleep_are_never_missed(segment, other, children, endless):
    """Two processes call each other to and fro: one bell that is missed, and both sleep for ever."""
    mine, its = (segment.layout.lane_block(lane) + _layout.WRITER_BELL for lane in (0, 1))

    def play(handle, answered, rung):
        for turn in range(2000):
            while handle.bells[answered >> 2] == turn:
                handle.wait(answered, turn, None)
            handle.ring(rung)

    pid = children.fork(play, other, its, mine)
    segment.ring(its)
    play(segment, mine, its)
    assert children.join(pid) == 0
    assert segment.bells[mine >> 2] == 2000


def test_the_memory_is_one_for_all_handles(segment, other, children):
    segment.words[-1] = 0x0123456789ABCDEF
    assert other.words[-1] == 0x0123456789ABCDEF
    offset = (len(other.words) - 1) * 8
    assert bytes(other.map[offset : offset + 8]) == (0x0123456789ABCDEF).to_bytes(8, sys.byteorder)

    def change():
        other.words[-1] += 1

    assert children.join(children.fork(change)) == 0
    assert segment.words[-1] == 0x0123456789ABCDF0


def test_fences_are_callable_as_often_as_anybody_wants(segment):
    fence = segment.waker_fence()
    for _ in range(3):
        assert segment.sleeper_fence() in (True, False)
        if fence is not None:
            fence()
        order = segment.order_fence()
        if order is not None:
            order()


# ---------------------------------------------------------------- making and finding


def test_create_fails_if_the_name_exists_and_leaves_everything_as_it_was(create):
    segment = create()
    segment.words[-1] = 42
    before = descriptors(), segments()
    with pytest.raises(FileExistsError, match=segment.name):
        create()
    assert (descriptors(), segments()) == before
    assert segment.words[-1] == 42


def test_create_fails_in_another_process_too(create, children):
    create()

    def try_it():
        with pytest.raises(FileExistsError):
            create()

    assert children.join(children.fork(try_it)) == 0


def test_create_never_replaces_a_segment_that_somebody_has_open(create):
    kept = create(keep=True)
    with pytest.raises(RingBusy, match=kept.name):
        create(keep=True, replace=True)
    kept.unlink()


def test_of_many_processes_that_create_one_name_at_once_one_succeeds(backend, name, children):
    gate, opened = os.pipe()
    enough, done = os.pipe()

    def race():
        os.close(opened), os.close(done)
        os.read(gate, 1)
        try:
            segment = backend.create(name, _layout.new_layout(4096, 1, "one", False), 0o600, False)
        except FileExistsError:
            os._exit(7)
        os.read(enough, 1)  # till all have tried
        segment.close()

    pids = [children.fork(race) for _ in range(6)]
    os.close(opened), os.close(gate)
    answers = []

    def losers_are_back():
        for pid in pids:
            if pid not in [known for known, _ in answers]:
                status = children._poll(pid)
                if status:
                    answers.append((pid, status[0]))
        return len(answers) == 5

    wait_until(losers_are_back, "the end of all but one")
    os.close(done), os.close(enough)
    assert [status for _, status in answers] == [7] * 5
    (winner,) = set(pids) - {pid for pid, _ in answers}
    assert children.join(winner) == 0


def test_open_fails_if_the_name_does_not_exist_and_leaves_nothing(backend, name):
    before = descriptors(), segments()
    with pytest.raises(FileNotFoundError, match=name) as caught:
        backend.open(name, False)
    assert caught.value.errno == errno.ENOENT
    assert (descriptors(), segments()) == before


def test_open_after_the_last_close_fails(backend, create):
    segment = create()
    segment.close()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)


def test_unlink_takes_the_name_and_leaves_the_handles(backend, segment, other, create):
    segment.unlink()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)
    other.words[-1] = 5
    assert segment.words[-1] == 5
    assert other.claim(LANE) and not segment.claim(LANE)
    successor = create()
    segment.unlink()  # the name is another segment's now
    assert backend.open(successor.name, False).close() is None


def test_no_descriptor_survives_exec(segment, other):
    assert other.claim(LANE)
    witness, end = os.pipe()
    os.set_inheritable(witness, True)
    code = """if True:
        import os
        for number in os.listdir("/proc/self/fd"):
            try:
                print(number, os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                pass  # what listdir itself had open
    """
    listing = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE, text=True, timeout=DEADLINE, check=True
    ).stdout
    assert f"{witness} pipe:" in listing, "an inheritable one does survive"
    assert "/dev/shm" not in listing
    os.close(witness), os.close(end)


def test_a_process_that_replaces_itself_by_exec_gives_up_its_claims(backend, segment, children):
    told, tell = os.pipe()
    os.set_inheritable(tell, True)

    def become_another():
        assert backend.open(segment.name, False).claim(LANE)
        code = f"import os, time; os.write({tell}, b'x'); time.sleep({DEADLINE})"
        os.execv(sys.executable, [sys.executable, "-c", code])

    pid = children.fork(become_another)
    assert os.read(told, 1) == b"x"
    assert segment.claim(LANE)
    assert children._poll(pid) is None, "the process is still there, the claim is not"
    os.kill(pid, signal.SIGKILL)
    assert children.join(pid) == -signal.SIGKILL
    os.close(told), os.close(tell)


# ---------------------------------------------------------------- claims


def test_a_claim_is_exclusive_among_the_handles_of_one_process(segment, other):
    assert segment.claim(LANE)
    assert not other.claim(LANE)
    assert segment.claim(LANE), "taking it again is fine"
    assert other.claim(LANE + 1), "another role is free"
    assert not segment.claim(LANE + 1)
    assert other.is_claimed(LANE) and segment.is_claimed(LANE + 1)
    assert not segment.is_claimed(LANE), "is_claimed asks about the others"


def test_a_claim_is_exclusive_among_threads_that_have_a_handle_each(backend, segment, create):
    create.opened += [backend.open(segment.name, False) for _ in range(8)]
    won = []
    gate = threading.Barrier(8)

    def race(handle):
        gate.wait(DEADLINE)
        won.append(handle.claim(LANE))

    threads = [in_thread(race, handle) for handle in create.opened[1:]]
    assert all([ends(thread) for thread in threads])
    assert sorted(won) == [False] * 7 + [True]


def claims_in_child(backend, name, children, end):
    """A child that opens the segment, claims lane 0, says so, and ends by `end` when it is told to. (pid, tell)"""
    told, tell = os.pipe()
    ready, say = os.pipe()

    def hold():
        os.close(tell)
        mine = backend.open(name, False)
        os.write(say, b"+" if mine.claim(LANE) else b"-")
        os.read(told, 1)
        end(mine)

    pid = children.fork(hold)
    os.close(told), os.close(say)
    answer = os.read(ready, 1)
    os.close(ready)
    return pid, answer, tell


ENDS = {
    "release": lambda mine: mine.release(LANE),
    "close": lambda mine: mine.close(),
    "return": lambda mine: None,
    "os._exit": lambda mine: os._exit(0),
    "kill -9": lambda mine: os.kill(os.getpid(), signal.SIGKILL),
    "kill -9 with a thread asleep": lambda mine: (
        in_thread(mine.wait, bell_of(mine), 0, None).join(0.05), os.kill(os.getpid(), signal.SIGKILL)
    ),
    "abort": lambda mine: (signal.signal(signal.SIGABRT, signal.SIG_DFL), os.kill(os.getpid(), signal.SIGABRT)),
    "segmentation fault": lambda mine: (
        signal.signal(signal.SIGSEGV, signal.SIG_DFL), ctypes.string_at(mmap.PAGESIZE // 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_claim_of_another_process_ends_with(backend, segment, children, how):
    pid, answer, tell = claims_in_child(backend, segment.name, children, ENDS[how])
    assert answer == b"+"
    assert segment.is_claimed(LANE) and not segment.claim(LANE)
    os.close(tell)
    status = children.join(pid)
    assert (status < 0) == ("kill" in how or "abort" in how or "fault" in how)
    assert not segment.is_claimed(LANE)
    assert segment.claim(LANE)


def test_a_claim_ends_by_release_and_by_close_while_its_process_lives(backend, segment, create):
    for give_up in (lambda mine: mine.release(LANE), lambda mine: mine.close()):
        mine = backend.open(segment.name, False)
        create.opened.append(mine)
        assert mine.claim(LANE) and not segment.claim(LANE)
        give_up(mine)
        assert segment.claim(LANE)
        segment.release(LANE)


def test_of_many_processes_that_claim_one_role_at_once_one_gets_it(backend, segment, children):
    for _ in range(5):
        gate, opened = os.pipe()
        results, say = os.pipe()

        def race(gate=gate, opened=opened, say=say):
            os.close(opened)
            mine = backend.open(segment.name, False)
            os.read(gate, 1)
            won = mine.claim(LANE)
            os.write(say, b"+" if won else b"-")
            os.read(gate, 1)
            if won:
                time.sleep(DEADLINE)

        pids = [children.fork(race) for _ in range(6)]
        os.close(opened), os.close(gate), os.close(say)
        answers = b""
        while len(answers) < 6:
            answers += os.read(results, 6)
        os.close(results)
        assert sorted(answers) == sorted(b"+-----")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            children.join(pid)
        assert segment.claim(LANE)
        segment.release(LANE)


def test_a_stopped_process_keeps_its_claim(backend, segment, children):
    pid, _, tell = claims_in_child(backend, segment.name, children, lambda mine: None)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert not segment.claim(LANE)
    os.kill(pid, signal.SIGKILL)
    assert children.join(pid) == -signal.SIGKILL
    assert segment.claim(LANE)
    os.close(tell)


def test_release_of_what_is_not_held_does_nothing(segment, other):
    assert segment.claim(LANE)
    other.release(LANE)
    other.release(LANE + 1)
    assert not other.claim(LANE)
    segment.release(LANE)
    segment.release(LANE)
    assert other.claim(LANE)


def test_close_twice_is_once(backend, create):
    segment = create()
    segment.close()
    successor = create()
    assert successor.claim(LANE)
    segment.close()
    segment.release(LANE)
    other = backend.open(successor.name, False)
    assert not other.claim(LANE), "closing again took nothing from anybody"
    other.close()
    other.close()


def test_the_memory_stays_until_its_last_view_goes(create):
    segment = create()
    view = memoryview(segment.map)
    segment.close()
    view[-1] = 7
    assert segment.map[-1] == 7
    segment.ring(bell_of(segment))  # a thread that sleeps in a closed handle is woken like this


# ---------------------------------------------------------------- memory


def test_reserve_takes_memory_for_good_and_changes_no_byte(create):
    segment = create(capacity=1 << 20, writers=2)
    path = f"{os_backend.DIRECTORY}/shmring.{segment.name}"
    start, capacity = segment.layout.lane_bytes(0), segment.layout.capacity
    segment.map[start] = 9
    blocks = os.stat(path).st_blocks
    for _ in range(2):
        segment.reserve(start, capacity)
        assert os.stat(path).st_blocks == blocks + (capacity - mmap.PAGESIZE) // 512
    assert segment.map[start : start + capacity] == b"\x09" + bytes(capacity - 1)


def test_the_contract_is_what_every_backend_class_has(backend):
    public = {name for name, value in vars(_backend.Segment).items() if callable(value) and not name.startswith("_")}
    public |= {"claim", "release", "reserve", "waker_fence", "sleeper_fence", "ring", "wait", "create", "open"}
    assert all(callable(getattr(backend, name, None)) for name in public)
