"""What `_backend.py` promises of a segment, held against every backend that runs here."""

from __future__ import annotations

import _thread
import contextlib
import errno
import faulthandler
import itertools
import linecache
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import DARWIN, DEADLINE, KILLED, WINDOWS, Line, descriptors, segments, wait_until
from support import kill_yourself

from shmring import RingBusy, _backend, _layout, _ring, _words
from shmring._backend import os_backend

SEGMENTS = [os_backend.Segment]
if sys.platform == "linux" and not DARWIN:
    import darwin_on_linux

    SEGMENTS.append(darwin_on_linux.load().Segment)  # as it stands on macOS

LANE = _layout.LANE
NOTHING = ("try:", "finally:")  # lines at which nothing is done, and the interpreter looks for no signals
IDLE = 0.05 if WINDOWS else 0.005  # seconds of processor time; Windows counts them in ticks of 16 ms

needs_exec = pytest.mark.skipif(not hasattr(os, "fork"), reason="exec does not keep the process here")
needs_stopping = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no signal stops a process here")
needs_kept = pytest.mark.skipif(WINDOWS, reason="rings cannot be kept here")


@pytest.fixture(params=SEGMENTS, ids=lambda cls: cls.__module__.rpartition(".")[2])
def backend(request):
    _ring._set_hooks()  # a forked child has handles of its own, as if there were rings
    return request.param


@pytest.fixture
def endless(backend, monkeypatch):
    """No slices: nothing but the bells, deadlines and signals ends a wait. Started processes inherit it."""
    monkeypatch.setattr(sys.modules[backend.__module__], "SLICE", None)


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
    opened.clear()  # pytest still holds the fixtures when leaks are looked for


@pytest.fixture
def segment(create):
    return create()


@pytest.fixture
def other(backend, segment, create):
    """A second handle of the same segment, in the same process."""
    create.opened.append(backend.open(segment.name, False))
    return create.opened[-1]


def bell_of(segment):
    return segment.layout.readers_offset + _layout.READER_BELL


def word_of(segment, lane=0):
    """The index of a word for a test's own use, in memory that is there from the beginning."""
    return (segment.layout.lane_block(lane) + _layout.WRITER_WANTED) >> 3


def sleep_until(segment, happened, deadline=None):
    """Wait as the ring does: note, look, wait, and again after every return; how often it waited."""
    for calls in itertools.count():
        noted = segment.note(bell_of(segment))
        if happened() or (deadline is not None and time.perf_counter() >= deadline):
            return calls
        segment.wait(bell_of(segment), noted, deadline)


def sleep_until_told(segment, lane=0):
    """Wait until the word says that there was something to ring for."""
    return sleep_until(segment, lambda: segment.words[word_of(segment, lane)])


def tell(segment, lane=0):
    """Set that word, and ring."""
    segment.words[word_of(segment, lane)] = 1
    segment.ring(bell_of(segment))


def never():
    return False


def in_thread(function, *args):
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def ends(thread):
    thread.join(DEADLINE)
    return not thread.is_alive()


class Stopped:
    """A thread that calls a function and stops at a moment of it, that is, before a line; then it is let go.

    Attributes:
        there: Has it come to that moment?
        returned: Has the function returned?
    """

    def __init__(self, function, moment, then=None, *args):
        self._code, self._call, self._then = function.__code__, (function, args), then
        self._left = moment + 1
        self.there, self._go, self.returned = threading.Event(), threading.Event(), threading.Event()
        self._thread = in_thread(self._run)

    def _run(self):
        function, args = self._call
        sys.settrace(lambda frame, event, arg: self._trace if frame.f_code is self._code else None)
        with contextlib.suppress(Interrupted):
            function(*args)
        sys.settrace(None)
        self.returned.set()

    def _trace(self, frame, event, arg):
        if event == "line" and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() not in NOTHING:
            self._left -= 1
            if not self._left:
                self.there.set()
                self._go.wait(DEADLINE)
                if self._then:
                    self._then()
        return self._trace

    def come_there_or_sleep(self):
        """Give it the time. Where it comes only after the sleep, it is asleep now."""
        self.there.wait(0.05)

    def ends(self):
        self._go.set()
        return ends(self._thread)


class Interrupted(Exception):
    """What a signal handler raises."""


def raise_interrupted():
    raise Interrupted


# ---------------------------------------------------------------- waiting


def test_every_promise_of_the_docstring_has_its_tests_here():
    promises = [line for line in _backend.__doc__.splitlines() if line.startswith("- ")]
    assert len(promises) == 10, "the contract has changed: see that each line has a test, then adjust this number"


@pytest.mark.parametrize("ahead", [0.0, 0.001, 0.05, 0.3])
@pytest.mark.parametrize("main", [True, False], ids=["main thread", "another thread"])
def test_wait_ends_when_the_clock_has_come_to_its_deadline(segment, endless, ahead, main):
    calls = []

    def wait():
        calls.append(sleep_until(segment, never, time.perf_counter() + ahead))

    if main:
        wait()
    else:
        assert ends(in_thread(wait))
    assert calls[0] < 20, "a wait may return early, but not for ever: that would be polling"


def test_wait_with_a_deadline_long_past_returns_at_once(segment, endless):
    for deadline in (time.perf_counter() - 1000, 0.0, -1.0):
        assert ends(in_thread(segment.wait, bell_of(segment), segment.note(bell_of(segment)), deadline))


def test_wait_without_a_deadline_returns_when_the_bell_was_rung_since_it_was_noted(segment, other, endless):
    for handle in (segment, other):
        noted = segment.note(bell_of(segment))
        handle.ring(bell_of(handle))
        assert ends(in_thread(segment.wait, bell_of(segment), noted, None))


def test_a_bell_that_another_process_rings_between_note_and_wait_is_remembered(segment, children, shared, endless):
    """Also when that process has ended since."""
    line, answer = shared(Line), shared(Line)

    def sleep():
        noted = segment.note(bell_of(segment))
        line.say()
        answer.hear()
        segment.wait(bell_of(segment), noted, None)

    sleeper = children.start(sleep)
    line.hear()
    assert children.join(children.start(segment.ring, bell_of(segment))) == 0
    answer.say()
    assert children.join(sleeper) == 0


def test_wait_without_a_deadline_returns_when_the_bell_is_rung_meanwhile(segment, other, endless):
    thread = in_thread(sleep_until_told, segment)
    thread.join(0.05)
    assert thread.is_alive()
    tell(other)
    assert ends(thread)


def test_one_ring_wakes_all_threads_of_the_handle_that_sleeps(segment, other, endless):
    threads = [in_thread(sleep_until_told, segment) for _ in range(6)]
    threads[0].join(0.1)
    assert all([thread.is_alive() for thread in threads])
    tell(other)
    assert all([ends(thread) for thread in threads])


def test_one_ring_wakes_all_threads_of_another_process(segment, children, shared, endless):
    line = shared(Line)

    def sleep():
        threads = [in_thread(sleep_until_told, segment) for _ in range(4)]
        threads[0].join(0.1)
        line.say()
        assert all([ends(thread) for thread in threads])

    pid = children.start(sleep)
    line.hear()
    tell(segment)
    assert children.join(pid) == 0


def test_one_ring_reaches_all_threads_that_noted_before_it_also_those_that_come_to_wait_only_later(
    segment, other, endless
):
    bell = bell_of(segment)
    noted = [segment.note(bell) for _ in range(3)]
    asleep = [in_thread(segment.wait, bell, segment.note(bell), None) for _ in range(2)]
    other.ring(bell)
    assert all([ends(thread) for thread in asleep])
    for each in noted:
        assert ends(in_thread(segment.wait, bell, each, None)), "it is told to all of them, not to the first"


def test_one_ring_wakes_all_threads_of_a_handle_wherever_in_the_wait_they_are(segment, other, endless):
    """One is stopped before each line of `wait` in turn, and the other one sleeps, or has just noted."""
    bell = bell_of(segment)
    for moment in itertools.count():
        noted = [segment.note(bell) for _ in range(3)]
        first = Stopped(type(segment).wait, moment, None, segment, bell, noted[0], None)
        first.come_there_or_sleep()
        second = in_thread(segment.wait, bell, noted[1], None)
        other.ring(bell)
        third = in_thread(segment.wait, bell, noted[2], None)
        assert first.ends() and ends(second) and ends(third), f"one that slept was not told, {moment=}"
        if not first.there.is_set():
            break
    assert moment > 2, "there were none to stop at"


def test_an_exception_of_a_signal_handler_in_a_wait_takes_the_ring_from_no_other_thread(segment, other, endless):
    bell = bell_of(segment)
    for moment in itertools.count():
        noted = segment.note(bell), segment.note(bell)
        first = Stopped(type(segment).wait, moment, raise_interrupted, segment, bell, noted[0], None)
        first.come_there_or_sleep()
        second = in_thread(segment.wait, bell, noted[1], None)
        other.ring(bell)
        assert first.ends() and ends(second), f"the other one was not told, {moment=}"
        if not first.there.is_set():
            break


def test_a_ring_says_whether_a_doorbell_is_to_be_tried_again(segment, other, monkeypatch):
    bell = bell_of(segment)
    state = (bell + _layout.DOORBELL) >> 3
    doorbell = segment.doorbell(bell)

    def none_left(*_):
        raise OSError(errno.EMFILE, "no descriptor left")

    assert other.ring(bell) is True, "none is attached"
    segment.words[state] = 1 << 2 | _layout.ATTACHED
    with monkeypatch.context() as patched:
        if WINDOWS:
            patched.setattr(type(other), "doorbell", none_left)
        else:
            patched.setattr(sys.modules[type(doorbell).__module__], "note_open", none_left)
        assert other.ring(bell) is False and not doorbell.heard()
    assert other.ring(bell) is True and doorbell.heard()
    doorbell.remove()
    assert segment.ring(bell) is True, "it has gone: there is nobody to be rung"
    doorbell.close()


def test_another_bell_wakes_nobody_for_good(segment, other, endless):
    thread = in_thread(sleep_until_told, segment)
    for handle in (segment, other):
        handle.ring(handle.layout.lane_block(0) + _layout.WRITER_BELL)
    thread.join(0.05)
    assert thread.is_alive()
    tell(other)
    assert ends(thread)


def test_wake_reaches_this_handles_threads_asleep_and_those_that_noted_before_and_wait_after(segment, endless):
    bell = bell_of(segment)
    noted = [segment.note(bell) for _ in range(3)]
    asleep = [in_thread(segment.wait, bell, segment.note(bell), None) for _ in range(3)]
    asleep[0].join(0.05)
    segment.wake(bell)
    assert all([ends(thread) for thread in asleep])
    assert all([ends(in_thread(segment.wait, bell, each, None)) for each in noted])


def test_wake_reaches_a_thread_wherever_in_the_wait_it_is(segment, endless):
    bell = bell_of(segment)
    for moment in itertools.count():
        thread = Stopped(type(segment).wait, moment, None, segment, bell, segment.note(bell), None)
        thread.come_there_or_sleep()
        segment.wake(bell)
        assert thread.ends(), f"{moment=}"
        if not thread.there.is_set():
            break


def test_a_thread_of_a_closed_handle_takes_no_ring_from_the_next_one_that_has_its_role(
    backend, segment, other, create, endless
):
    """It has been told that its handle closes, and got no further than to some line of `wait`."""
    bell = bell_of(segment)
    for moment in itertools.count():
        former = backend.open(segment.name, False)
        create.opened.append(former)
        assert former.claim(_layout.READER)
        thread = Stopped(backend.wait, moment, None, former, bell, former.note(bell), None)
        thread.come_there_or_sleep()
        former.wake(bell)
        former.close()
        assert segment.claim(_layout.READER)
        noted = segment.note(bell)
        other.ring(bell)
        gone_on = thread.ends()
        assert ends(in_thread(segment.wait, bell, noted, None)), f"the ring was lost, {moment=}"
        assert gone_on
        segment.release(_layout.READER)
        if not thread.there.is_set():
            break


def test_threads_of_a_handle_that_is_closed_beside_rings_leave_them_to_the_next_one(
    backend, segment, other, create, endless
):
    """The same at moments that nobody chose, with several threads."""
    bell = bell_of(segment)
    for _ in range(20 if WINDOWS else 100):
        former = backend.open(segment.name, False)
        create.opened.append(former)
        monitor, closed = threading.Lock(), []

        def sleep(former=former, monitor=monitor, closed=closed):
            while True:
                with monitor:  # as the ring has one, which is closed before the threads are woken
                    if closed:
                        return
                    noted = former.note(bell)
                former.wait(bell, noted, None)

        threads = [in_thread(sleep) for _ in range(3)]
        other.ring(bell)
        with monitor:
            closed.append(True)
        former.wake(bell)
        former.close()
        noted = segment.note(bell)
        other.ring(bell)
        assert ends(in_thread(segment.wait, bell, noted, None))
        assert all([ends(thread) for thread in threads])


@contextlib.contextmanager
def signals(number):
    """Have this signal come to the main thread again and again: one just before a system call does not end it."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return
    done = threading.Event()

    def send():
        while not done.wait(0.05):
            _thread.interrupt_main()

    thread = in_thread(send)
    try:
        yield
    finally:
        done.set()
        assert ends(thread)


def test_a_signal_ends_a_wait_so_that_its_handler_runs(backend, segment, monkeypatch):
    raised = []

    def handler(number, frame):
        if not raised:  # the next signal may come before the first one's exception is where it is waited for
            raised.append(number)
            raise Interrupted

    number = getattr(signal, "SIGALRM", signal.SIGINT)
    if number != signal.SIGINT:
        slices = sys.modules[backend.__module__]
        monkeypatch.setattr(slices, "SLICE", None)  # nothing but the signal ends it; elsewhere a slice has to
    before = signal.signal(number, handler)
    try:
        with pytest.raises(Interrupted), signals(number):
            sleep_until(segment, never, time.perf_counter() + DEADLINE)
    finally:
        signal.signal(number, before)


def test_a_sleeping_process_uses_no_processor_time(segment, children, shared, endless):
    line = shared(Line)

    def sleep():
        segment.wait(bell_of(segment), segment.note(bell_of(segment)), 0.0)  # what the first time costs
        line.say()
        before = time.process_time()
        sleep_until_told(segment)
        assert time.process_time() - before < IDLE

    pid = children.start(sleep)
    line.hear()
    time.sleep(0.5)
    tell(segment)
    assert children.join(pid) == 0


# ---------------------------------------------------------------- ringing


def test_a_ring_with_nobody_asleep_changes_nothing_but_the_bell(segment):
    def memory():
        found = bytearray(segment.map[: segment.layout.lanes_offset])
        found[bell_of(segment) : bell_of(segment) + 8] = bytes(8)
        return found

    before = memory()
    for _ in range(1000):
        segment.ring(bell_of(segment))
    assert memory() == before


def test_rings_that_nobody_waited_for_keep_nobody_awake(segment, other, endless):
    for _ in range(1000):
        other.ring(bell_of(segment))
    assert sleep_until(segment, never, time.perf_counter() + 0.2) < 20


def test_a_process_that_dies_anywhere_in_a_ring_has_rung_or_has_not(backend, segment, children, shared, endless):
    """If the bell is remembered, whoever slept was woken; and the next ring is as good as any."""
    # There each sleeper's queue remembers for itself, also what came before: an early return of one tells of no other.
    apart = backend.__module__.endswith("_darwin")
    bell = bell_of(segment)

    def die(moment):
        left = [moment + 1]

        def trace(frame, event, arg):
            if event == "line" and frame.f_code is code:
                left[0] -= 1
                if not left[0]:
                    kill_yourself()
            return trace

        code = type(segment).ring.__code__
        sys.settrace(trace)
        segment.ring(bell)
        sys.settrace(None)

    for moment in itertools.count():
        noted = segment.note(bell)
        sleeper = in_thread(segment.wait, bell, noted, None)
        sleeper.join(0.05)
        status = children.join(children.start(die, moment))
        assert status == (0 if status != KILLED else KILLED)
        deadline = time.perf_counter() + 0.2
        segment.wait(bell, noted, deadline)
        if (time.perf_counter() < deadline and not apart) or status == 0:
            assert ends(sleeper), "it is remembered, but it woke nobody"
        segment.ring(bell)
        assert ends(sleeper)
        if status == 0:
            break
    assert moment > 0, "it never died"


def test_bells_rung_while_others_fall_asleep_are_never_missed(segment, other, children, endless):
    """Two processes call each other to and fro: one bell that is missed, and both sleep for ever."""
    turns = 500 if WINDOWS else 2000
    bells = [segment.layout.lane_block(lane) + _layout.WRITER_BELL for lane in (0, 1)]
    words = [word_of(segment, lane) for lane in (0, 1)]

    def play(handle, me):
        for turn in range(turns):
            while True:
                noted = handle.note(bells[me])
                if handle.words[words[me]] > turn:
                    break
                handle.wait(bells[me], noted, None)
            handle.words[words[1 - me]] += 1
            handle.ring(bells[1 - me])

    pid = children.start(play, other, 1)
    segment.words[words[1]] = 1
    segment.ring(bells[1])
    play(segment, 0)
    assert children.join(pid) == 0
    assert [segment.words[word] for word in words] == [turns, turns + 1]


def test_the_memory_is_one_for_all_handles(segment, other, children):
    for handle in (segment, other):
        handle.reserve(handle.layout.lane_bytes(1), handle.layout.capacity)
    segment.words[-1] = 0x0123456789ABCDEF
    assert other.words[-1] == 0x0123456789ABCDEF
    offset = (len(other.words) - 1) * 8
    assert bytes(other.map[offset : offset + 8]) == (0x0123456789ABCDEF).to_bytes(8, sys.byteorder)

    def change():
        other.words[-1] += 1

    assert children.join(children.start(change)) == 0
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
    segment.words[word_of(segment)] = 42
    before = descriptors(), segments()
    with pytest.raises(FileExistsError, match=segment.name):
        create()
    assert (descriptors(), segments()) == before
    assert segment.words[word_of(segment)] == 42


def test_create_fails_in_another_process_too(backend, segment, children):
    def try_it():
        with pytest.raises(FileExistsError):
            backend.create(segment.name, _layout.new_layout(4096, 2, "one", False), 0o600, False)

    assert children.join(children.start(try_it)) == 0


@needs_kept
def test_create_never_replaces_a_kept_segment_that_somebody_has_open(create):
    kept = create(keep=True)
    with pytest.raises(RingBusy, match=kept.name):
        create(keep=True, replace=True)
    kept.unlink()


def test_create_never_replaces_a_segment_that_somebody_has_open(segment, other, create):
    segment.words[word_of(segment)] = 42
    segment.close()
    with pytest.raises(RingBusy, match=segment.name):
        create(replace=True)
    assert other.words[word_of(other)] == 42


def test_of_many_processes_that_create_one_name_at_once_one_succeeds(backend, name, children, shared):
    gate, ready = shared(Line), shared(Line)

    def race():
        ready.say()
        gate.hear()
        try:
            segment = backend.create(name, _layout.new_layout(4096, 1, "one", False), 0o600, False)
        except FileExistsError:
            os._exit(7)
        gate.hear()  # till all have tried
        segment.close()

    number = 4 if WINDOWS else 6
    pids = [children.start(race) for _ in range(number)]
    ready.hear(number)
    gate.say()
    answers = []

    def losers_are_back():
        for pid in pids:
            if pid not in [known for known, _ in answers]:
                status = children._poll(pid)
                if status:
                    answers.append((pid, status[0]))
        return len(answers) == number - 1

    wait_until(losers_are_back, "the end of all but one")
    gate.say()
    assert [status for _, status in answers] == [7] * (number - 1)
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


def test_attempts_that_fail_leave_no_presence_and_no_claim(backend, segment, create):
    """Whoever holds something makes the last close not the last."""
    for _ in range(3):
        with pytest.raises(FileExistsError):
            create()
    segment.unlink()
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            backend.open(segment.name, False)
    segment.close()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)
    successor = create()
    assert not successor.is_claimed(LANE) and successor.claim(LANE)
    successor.close()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)


def test_unlink_takes_the_name_and_leaves_the_handles(backend, segment, other, create):
    segment.unlink()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)
    other.words[word_of(other)] = 5
    assert segment.words[word_of(segment)] == 5
    assert other.claim(LANE) and not segment.claim(LANE)
    successor = create()
    segment.unlink()  # the name is another segment's now
    assert backend.open(successor.name, False).close() is None


def test_a_new_process_inherits_neither_claims_nor_presence(backend, segment, other):
    """Not even one that is to inherit whatever can be inherited."""
    assert other.claim(LANE)
    code = "import sys; print('here', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], close_fds=False, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline().strip() == b"here"
        other.close()
        assert segment.claim(LANE)
        segment.close()
        with pytest.raises(FileNotFoundError):
            backend.open(segment.name, False)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@needs_exec
def test_a_process_that_replaces_itself_by_exec_gives_up_its_claims(backend, segment, children, shared):
    line = shared(Line)

    def become_another():
        assert backend.open(segment.name, False).claim(LANE)
        code = f"import time; open({line.path!r}, 'ab').write(b'x'); time.sleep({DEADLINE})"
        os.execv(sys.executable, [sys.executable, "-c", code])

    pid = children.fork(become_another)
    assert line.hear() == b"x"
    assert segment.claim(LANE)
    assert children._poll(pid) is None, "the process is still there, the claim is not"
    children.kill(pid)


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
    for _ in range(20):
        won = []
        gate = threading.Barrier(8)

        def race(handle, won=won, gate=gate):
            gate.wait(DEADLINE)
            won.append(handle.claim(LANE))

        threads = [in_thread(race, handle) for handle in create.opened[1:]]
        assert all([ends(thread) for thread in threads])
        assert sorted(won) == [False] * 7 + [True]
        for handle in create.opened:
            handle.release(LANE)


def test_looking_at_a_claim_takes_it_from_nobody(segment, other):
    """Who claims while others look, and fail to claim, still gets what is free."""
    done = []

    def look():
        while not done:
            segment.is_claimed(LANE)

    threads = [in_thread(look) for _ in range(2)]
    for _ in range(200):
        assert other.claim(LANE)
        other.release(LANE)
    done.append(True)
    assert all([ends(thread) for thread in threads])


def claims_in_child(backend, name, children, shared, end):
    """A child that opens the segment, claims lane 0, says so, and ends by `end` when it is told to. (pid, answer, line)

    It is told on the line that is returned.
    """
    told, said = shared(Line), shared(Line)

    def hold():
        mine = backend.open(name, False)
        said.say(b"+" if mine.claim(LANE) else b"-")
        told.hear()
        end(mine)

    pid = children.start(hold)
    return pid, said.hear(), told


ENDS = {
    "release": lambda mine: mine.release(LANE),
    "close": lambda mine: mine.close(),
    "return": lambda mine: None,
    "os._exit": lambda mine: os._exit(0),
    "kill -9": lambda mine: kill_yourself(),
    "kill -9 with a thread asleep": lambda mine: (
        in_thread(sleep_until, mine, never).join(0.05), kill_yourself()
    ),
    "abort": lambda mine: (faulthandler.disable(), os.abort()),
    "segmentation fault": lambda mine: (
        faulthandler.disable(), getattr(faulthandler, "_read_null", faulthandler._sigsegv)()  # until Python 3.14
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_claim_of_another_process_ends_with(backend, segment, children, shared, how):
    pid, answer, told = claims_in_child(backend, segment.name, children, shared, ENDS[how])
    assert answer == b"+"
    assert segment.is_claimed(LANE) and not segment.claim(LANE)
    told.say()
    status = children.join(pid)
    assert status != 1, "it failed"
    assert (status != 0) == ("kill" in how or "abort" in how or "fault" in how)
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


def test_of_many_processes_that_claim_one_role_at_once_one_gets_it(backend, segment, children, shared):
    number = 3 if WINDOWS else 6
    for _ in range(2 if WINDOWS else 5):
        gate, ready, results = shared(Line), shared(Line), shared(Line)

        def race(gate=gate, ready=ready, results=results):
            mine = backend.open(segment.name, False)
            ready.say()
            gate.hear()
            results.say(b"+" if mine.claim(LANE) else b"-")
            time.sleep(DEADLINE)

        pids = [children.start(race) for _ in range(number)]
        ready.hear(number)
        gate.say()
        assert sorted(results.hear(number)) == sorted(b"+" + b"-" * (number - 1))
        assert not segment.claim(LANE)
        for pid in pids:
            children.kill(pid)
        assert segment.claim(LANE)
        segment.release(LANE)


@needs_stopping
def test_a_stopped_process_keeps_its_claim(backend, segment, children, shared):
    pid, _, _ = claims_in_child(backend, segment.name, children, shared, lambda mine: None)
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    assert not segment.claim(LANE)
    children.kill(pid)
    assert segment.claim(LANE)


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
    backend.open(successor.name, False).close()


def test_who_leaves_keeps_the_roles_and_the_memory_but_not_the_name(backend, segment):
    assert segment.claim(LANE)
    other = backend.open(segment.name, False)
    segment.leave()
    assert not other.claim(LANE)
    other.close()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)
    segment.words[word_of(segment)] = 3
    segment.leave()
    segment.close()


def test_the_memory_stays_until_its_last_view_goes(create):
    segment = create()
    view = memoryview(segment.map)
    segment.close()
    view[word_of(segment) << 3] = 7
    assert segment.map[word_of(segment) << 3] == 7
    noted = segment.note(bell_of(segment))
    segment.ring(bell_of(segment))  # a thread that sleeps in a closed handle is woken like this
    assert ends(in_thread(segment.wait, bell_of(segment), noted, None))


# ---------------------------------------------------------------- memory


def test_reserve_takes_memory_for_good_and_changes_no_byte(create, backend):
    segment = create(capacity=1 << 20, writers=2)
    other = backend.open(segment.name, False)
    create.opened.append(other)
    start, capacity = segment.layout.lane_bytes(0), segment.layout.capacity
    segment.reserve(start, capacity)
    assert other.map[start : start + capacity] == bytes(capacity)
    segment.map[start] = segment.map[start + capacity - 1] = 9
    for handle in (segment, other):
        handle.reserve(start, capacity)
        assert handle.map[start : start + capacity] == b"\x09" + bytes(capacity - 2) + b"\x09"
    create.opened.remove(segment)
    segment.close()
    assert other.map[start] == 9, "for all, not for who took it"


def test_what_is_backed_can_be_used_whether_it_was_reserved_or_not(segment):
    """Else a damaged word that tells of a lane without memory would end the process that believes it."""
    start, capacity = segment.layout.lane_bytes(1), segment.layout.capacity
    segment.back(start, capacity)
    assert not any(segment.map[start : start + capacity])
    segment.map[start] = 9
    segment.back(start, capacity)
    assert segment.map[start] == 9


def test_the_contract_is_what_every_backend_class_has(backend):
    members = {**vars(_words.Segment), **vars(_backend.Segment)}
    methods = {name for name, value in members.items() if callable(value) or isinstance(value, classmethod)}
    public = {name for name in methods if not name.startswith("_")}
    assert {"back", "claim", "note", "wait", "ring", "wake", "create", "open", "unlink"} <= public
    assert all(callable(getattr(backend, name, None)) for name in public)


# ---------------------------------------------------------------- looking from outside, and tidying up


@pytest.fixture
def module(backend):
    return sys.modules[backend.__module__]


@pytest.fixture
def look(module, segment):
    with contextlib.closing(module.Look(segment.name)) as look:
        yield look


def test_what_is_seen_from_outside_is_this_ring_its_words_and_who_has_which_role(module, segment, other, look):
    assert segment.name in module.names()
    assert _layout.parse_header(look.header, look.size, module.MACHINE, segment.name).nonce == segment.layout.nonce
    assert look.is_open()
    look.attach(segment.layout, segment.layout.lanes_offset)
    segment.words[word_of(segment)] = 7
    assert look.words[word_of(segment)] == 7
    with pytest.raises(TypeError):
        look.words[word_of(segment)] = 8
    for claimed, handle in enumerate((segment, other)):
        assert look.claimed(LANE, segment.layout.writers) == claimed and not look.claimed(_layout.READER, 1)
        assert handle.claim(LANE + claimed)
    assert look.claimed(LANE, 2) == 2 and look.claimed(LANE, 1) == look.claimed(LANE + 1, 1) == 1
    assert segment.claimed(LANE, 2) == 1, "the others' alone"


def test_claims_are_counted_with_gaps_between_them_and_beside_them(create):
    lanes = 3 if WINDOWS else 300
    segment = create(writers=lanes)
    taken = [0, lanes - 1] if WINDOWS else [3, 4, 5, 7, 90, 91, 298, 299]
    for number in (_layout.READER, *(LANE + lane for lane in taken)):
        assert segment.claim(number)
    with contextlib.closing(sys.modules[type(segment).__module__].Look(segment.name)) as look:
        assert look.claimed(LANE, lanes) == len(taken)
        assert look.claimed(LANE + 1, lanes - 2) == len([lane for lane in taken if 0 < lane < lanes - 1])
        assert look.claimed(LANE, 0) == 0


def test_a_look_changes_no_byte_and_takes_no_role(module, segment, other):
    before = segment.map[:]
    for _ in range(3):
        with contextlib.closing(module.Look(segment.name)) as look:
            look.attach(segment.layout, segment.layout.segment_bytes)
            assert look.map[:] == before and look.is_open() and not look.claimed(LANE, 2)
            assert segment.claim(LANE) and other.claim(LANE + 1) and other.claim(_layout.READER)
            segment.release(LANE)
            other.release(LANE + 1)
            other.release(_layout.READER)
    assert segment.map[:] == before


def test_a_ring_goes_with_its_last_handle_also_while_somebody_looks(module, backend, segment, look):
    look.attach(segment.layout, segment.layout.lanes_offset)
    segment.close()
    with pytest.raises(FileNotFoundError):
        backend.open(segment.name, False)
    with pytest.raises(FileNotFoundError):
        module.Look(segment.name)
    assert not look.is_open() and segment.name not in module.names()
    assert look.words[0] == int.from_bytes(_layout.MAGIC, sys.byteorder), "it is still what is seen"


def test_looks_leave_no_descriptor(module, segment):
    before = descriptors()
    for _ in range(3):
        module.Look(segment.name).close()
        module.names()
        module.strays(True)
        with pytest.raises(FileNotFoundError):
            module.Look(f"{segment.name}-not")
    assert descriptors() == before


def test_what_is_in_use_or_does_not_exist_is_not_collected(module, backend, segment):
    for kept in (False, True):
        assert not module.collect(segment.name, kept)
    backend.open(segment.name, False).close()
    assert not [stray for stray in module.strays(False) if segment.name in stray or segment.layout.nonce.hex() in stray]


@needs_kept
def test_what_is_kept_is_collected_only_if_that_is_asked_for(module, backend, create, name):
    create(keep=True).close()
    assert not module.collect(name, False)
    backend.open(name, False).close()
    assert module.collect(name, True)
    with pytest.raises(FileNotFoundError):
        backend.open(name, False)


@needs_kept
def test_what_a_crash_of_everybody_left_is_collected(module, backend, children, name):
    def create_and_die():
        segment = backend.create(name, _layout.new_layout(4096, 1, "one", False), 0o600, False)
        assert segment.claim(LANE)
        kill_yourself()

    assert children.join(children.start(create_and_die)) == KILLED
    with contextlib.closing(module.Look(name)) as look:
        assert name in module.names() and not look.is_open()
    assert module.collect(name, False)
    assert name not in module.names()


def test_who_creates_and_opens_meanwhile_loses_nothing_to_who_collects(module, backend, name):
    """What exists when `create` has returned can be opened, whatever is collected at that time."""
    done, failed = [], []

    def tidy_up():
        try:
            while not done:
                module.collect(name, True)
                module.strays(False)
        except BaseException as error:
            failed.append(error)

    threads = [in_thread(tidy_up) for _ in range(2)]
    try:
        for _ in range(5 if WINDOWS else 100):
            segment = backend.create(name, _layout.new_layout(4096, 1, "one", False), 0o600, True)
            backend.open(name, False).close()
            segment.close()
    finally:
        done.append(True)
        assert all([ends(thread) for thread in threads])
    assert not failed
