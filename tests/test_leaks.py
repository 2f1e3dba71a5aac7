"""Nothing is left behind, however handles come to be, are used, forked, dropped and closed, thousands of times.

Counted are descriptors or kernel handles, mappings, threads, memory, Python's objects, and the package's own
registries.
"""

from __future__ import annotations

import array
import contextlib
import gc
import mmap
import multiprocessing
import os
import pickle
import random
import select
import signal
import threading

import pytest
from conftest import DEADLINE, KILLED, ROOT, WINDOWS, wait_until
from counts import counts, grown, is_left, leaked, mappings, opened
from support import kill_yourself

from shmring import BufferTooSmall, MessageTooLarge, Ring, RingBusy, RingClosed, RingError, RingTimeout, unlink
from shmring._backend import os_backend

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_keep = pytest.mark.skipif(WINDOWS, reason="keep=True is not possible here: no ring outlives its last handle")
LESS = 3 if WINDOWS else 1  # times less often, where each call into the system may be a round trip to a server

# ---------------------------------------------------------------- one process


def once(name):
    """A handle's whole life beside one that stays."""
    with Ring.open(name, spin=0) as ring:
        ring.write(b"x" * 100)
        assert ring.read() == b"x" * 100


@pytest.mark.parametrize("times", [10_000 // LESS, pytest.param(200_000, marks=pytest.mark.stress)])
def test_ten_thousand_times_open_write_read_and_close_leave_nothing(name, times):
    with Ring.create(name, 4096, writers=2):
        assert grown(lambda: once(name), times) == {}


def create_and_close(name):
    with Ring.create(name, 4096) as ring:
        ring.write(b"x")
        assert ring.read() == b"x"


def use_everything(name):
    buffer = bytearray(100)
    with Ring.create(name, 4096, spin=0) as ring, Ring.open(name) as other:
        assert other.write_many([b"1", bytearray(2000), b"", b"4"]) == 4
        assert ring.read(max_len=5) == b"1"
        with pytest.raises(BufferTooSmall):
            ring.read(buffer)
        assert [len(message) for message in ring.read_many(2)] == [2000, 0]
        assert (ring.read(memoryview(buffer)[3:]), ring.try_read()) == (1, None)
        assert list(ring.messages(timeout=0)) == []
        other.write(b"5"), other.write(b"6")
        assert next(iter(ring)) == b"5"
        ring.stats(), repr(ring), ring.backend
        with pytest.raises(RingTimeout):
            ring.write(bytes(4088), timeout=0), ring.write(b"", timeout=1e-6)
        with pytest.raises(RingBusy):
            other.try_read()
        ring.unlink()


def leave_unread(name):
    ring = Ring.create(name, 4096, keep=True)
    ring.write(b"unread")
    ring.close()
    Ring.create(name, 4096, keep=True, replace=True).close()
    unlink(name)


def suspend_iterators(name):
    ring = Ring.create(name, 4096)
    ring.write_many([b"1", b"2", b"3"])
    iterators = [iter(ring) for _ in range(3)]
    assert [next(iterator) for iterator in iterators] == [b"1", b"2", b"3"]
    ring.close()


def sleep_and_be_closed(name):
    ring = Ring.create(name, 4096, spin=0)
    thread = threading.Thread(target=lambda: list(ring))
    thread.start()
    wait_until(lambda: ring.stats().readers_parked)
    ring.close()
    thread.join(DEADLINE)


def pickled(name):
    with Ring.create(name, 4096) as ring, pickle.loads(pickle.dumps(ring)) as copy:
        copy.write(b"x")
        assert ring.read() == b"x"
        ring.unlink()
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickle.dumps(ring))
        with Ring.create(name), pytest.raises(RingError):
            pickle.loads(pickle.dumps(ring))


def fail_to_come(name):
    """Constructors that fail, at several places."""
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    with Ring.create(name, 4096) as ring:
        for replace in (False, True):
            with pytest.raises((FileExistsError, RingBusy)):
                Ring.create(name, replace=replace)
        ring._segment.map[:1] = b"?"
        with pytest.raises(RingError):
            Ring.open(name)
        assert ring.stats().readers == 0


LIVES = [
    create_and_close, use_everything, pytest.param(leave_unread, marks=needs_keep), suspend_iterators,
    sleep_and_be_closed, pickled, fail_to_come,
]  # fmt: skip


@pytest.mark.parametrize("life", LIVES)
def test_lives_of_all_kinds_leave_nothing(name, life):
    assert grown(lambda: life(name), 300 // LESS) == {}
    assert not is_left(name)


class Nuisance(Exception):
    pass


# What tells a constructor who is there, and keeps others away meanwhile.
LOCKS = {Ring.create: "_wait", Ring.open: "_exists"} if WINDOWS else {Ring.create: "_lock", Ring.open: "_lock"}


@pytest.mark.parametrize("make", LOCKS)
@pytest.mark.parametrize("where", ["mmap", "lock", "take up"])
def test_a_constructor_that_is_interrupted_leaves_nothing(name, monkeypatch, make, where):
    lock = getattr(os_backend, LOCKS[make])
    armed = []

    def fail(*args):
        if where != "lock" or armed:
            armed.clear()  # what tidies up locks and unlocks, too
            raise Nuisance
        return lock(*args)

    def attempt():
        armed.append(True)
        with pytest.raises(Nuisance):
            make(name)

    with Ring.create(name, 4096) if make == Ring.open else contextlib.nullcontext():
        if where == "mmap":
            monkeypatch.setattr(os_backend.Segment, "_attach", fail)
        elif where == "lock":
            monkeypatch.setattr(os_backend, LOCKS[make], fail)
        else:
            monkeypatch.setattr(Ring, "_take_up", fail)
        assert grown(attempt, 200 // LESS) == {}
        monkeypatch.undo()
    assert not is_left(name)


def in_a_cycle(name):
    ring = Ring.open(name)
    ring.write(b"x")
    ring.itself = [ring]


def dropped(name):
    ring = Ring.open(name)
    ring.write(b"x")
    assert ring.read() == b"x"


def dropped_in_an_iterator(name):
    ring = Ring.open(name)
    ring.write(b"x")
    iterator = ring.messages()
    del ring
    assert next(iterator) == b"x"


@pytest.mark.parametrize("life", [in_a_cycle, dropped, dropped_in_an_iterator])
def test_a_handle_that_is_never_closed_is_collected_with_its_roles(name, life):
    with Ring.create(name, 4096, writers=1) as ring:

        def live():
            life(name)
            gc.collect()
            assert (ring.stats().lanes_in_use, ring.stats().readers) == (0, 0)
            with Ring.open(name) as reader:
                assert len(list(reader.messages(timeout=0))) == (life == in_a_cycle)

        assert grown(live, 50) == {}


def test_a_handle_that_is_closed_needs_no_garbage_collector_to_go(name):
    with Ring.create(name, 4096, writers=1):
        gc.collect()
        gc.disable()
        try:
            before = opened()
            for _ in range(20):
                once(name)
                suspend_iterators(f"{name}-other")
            assert opened() == before
        finally:
            gc.enable()


REFUSED = {
    "no lane": (RingBusy, lambda ring, other: other.write(b"")),
    "no role": (RingBusy, lambda ring, other: other.try_read()),
    "too small a buffer": (BufferTooSmall, lambda ring, other: ring.read(bytearray(3))),
    "too small a limit": (BufferTooSmall, lambda ring, other: ring.read(max_len=3)),
    "too large": (MessageTooLarge, lambda ring, other: ring.write(bytes(5000))),
    "no room": (RingTimeout, lambda ring, other: ring.write(bytes(4088), timeout=0)),
    "a late deadline": (RingTimeout, lambda ring, other: ring.write(bytearray(4088), timeout=1e-6)),
    "no buffer": (TypeError, lambda ring, other: ring.write("text")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_a_thousand_times_grows_nothing_in_the_handle(name, what):
    """Each refusal ends the generator that does the handle's work, and another one takes its place."""
    error, operation = REFUSED[what]

    def refused():
        with pytest.raises(error):
            operation(ring, other)

    with Ring.create(name, 4096, writers=1, spin=0) as ring, Ring.open(name, spin=0) as other:
        ring.write(b"stays")
        assert ring.stats().messages_out == 0
        with pytest.raises(BufferTooSmall):
            ring.read(max_len=0)
        assert grown(refused, 1000 // LESS) == {}
        for handle in (ring, other):
            for monitor in (handle._writer.monitor, handle._reader.monitor):
                assert len(monitor._heirs) <= 1
        assert ring.read() == b"stays"


# ---------------------------------------------------------------- buffers


BUFFERS = {
    "bytearray": bytearray,
    "array": lambda size: array.array("B", bytes(size)),
    "mmap": lambda size: mmap.mmap(-1, size),
}


def resize(buffer):
    """BufferError if somebody still has a view of it."""
    if isinstance(buffer, mmap.mmap):
        buffer.close()
    else:
        buffer.extend(b"more")


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("end", ["read", "too small", "timeout", "closed before", "closed while it waits"])
def test_a_buffer_to_read_into_is_free_when_read_is_over_and_stays_whole_after_close(name, kind, end):
    buffer = BUFFERS[kind](100)
    view = memoryview(buffer)[10:60]
    ring = Ring.create(name, 4096, spin=0)
    if end == "read":
        ring.write(b"m" * 50)
        assert ring.read(view) == 50
    elif end == "too small":
        ring.write(b"m" * 51)
        with pytest.raises(BufferTooSmall):
            ring.read(view)
    elif end == "timeout":
        with pytest.raises(RingTimeout):
            ring.read(view, timeout=0.001)
    elif end == "closed while it waits":

        def close(ring=ring):
            wait_until(lambda: ring.stats().readers_parked)
            ring.close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(RingClosed):
            ring.read(view)
        closing.join(DEADLINE)
    ring.close()
    with pytest.raises(RingClosed):
        ring.read(view)
    del ring
    gc.collect()
    assert bytes(view) == (b"m" if end == "read" else b"\0") * 50
    assert bytes(memoryview(buffer)[:10]) + bytes(memoryview(buffer)[60:]) == bytes(50), "beside the view"
    view.release()
    resize(buffer)


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_that_was_read_into_is_free_while_its_handle_lives(name, kind):
    buffer = BUFFERS[kind](100)
    with Ring.create(name, 4096, spin=0) as ring:
        ring.write(b"m" * 50)
        assert ring.read(buffer) == 50
        with pytest.raises(RingTimeout):
            ring.read(buffer, timeout=0.001)
        resize(buffer)


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("size", [10, 2000, 4088])
@pytest.mark.parametrize("end", ["written", "no room", "too large", "closed"])
def test_a_buffer_that_is_written_is_free_when_write_is_over(name, kind, size, end):
    buffer = BUFFERS[kind](5000 if end == "too large" else size)
    ring = Ring.create(name, 4096, spin=0)
    if end == "no room":
        ring.write(bytes(4080))
        with pytest.raises(RingTimeout):
            ring.write(buffer, timeout=0.001)
        assert not ring.try_write(buffer)
        with pytest.raises(RingTimeout):
            ring.write_many([buffer], timeout=0)
    elif end == "too large":
        for write in (ring.write, lambda data: ring.write_many([data])):
            with pytest.raises(MessageTooLarge):
                write(buffer)
    elif end == "closed":
        ring.close()
        with pytest.raises(RingClosed):
            ring.write(buffer)
    else:
        ring.write(buffer)
        assert ring.read() == bytes(size)
        assert ring.write_many([buffer]) == 1
    resize(buffer)  # while the handle is there
    ring.close()


def test_messages_outlive_their_ring(name):
    gc.collect()
    before = mappings()
    ring = Ring.create(name, 4096)
    ring.write_many([b"%d" % number * 100 for number in range(5)])
    messages = [ring.read(), *ring.read_many(2), next(iter(ring)), ring.try_read()]
    views = [memoryview(message) for message in messages]
    ring.close()
    del ring
    gc.collect()
    assert mappings() == before and (WINDOWS or not before)
    assert [bytes(view) for view in views] == [b"%d" % number * 100 for number in range(5)]


# ---------------------------------------------------------------- threads


def test_thousands_of_handles_in_threads_leave_nothing(name):
    count, each = 6, 500 // LESS

    def live(number):
        for turn in range(each):
            with Ring.open(name) as mine:
                mine.write(b"%d" % (number * each + turn), timeout=DEADLINE)

    def round():
        threads = [threading.Thread(target=live, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        got = [int(ring.read(timeout=DEADLINE)) for _ in range(count * each)]
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(got) == list(range(count * each))

    with Ring.create(name, 4096, writers=count) as ring:
        round()
        before = counts()
        round()
        assert leaked(before, count * each) == {}
        assert ring.stats().lanes_in_use == 0


# ---------------------------------------------------------------- processes

FORKS = f"""
import os, signal, sys, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
warnings.simplefilter("ignore")
signal.alarm(300)
from shmring import Ring
from counts import counts, grown, leaked
name, whose, end, times = *sys.argv[1:4], int(sys.argv[4])
"""


@needs_fork
@pytest.mark.parametrize("times", [30, pytest.param(2000, marks=pytest.mark.stress)])
@pytest.mark.parametrize("end", ["exit", "close and exit", "_exit", "SIGKILL"])
@pytest.mark.parametrize("whose", ["inherited", "own"])
def test_a_process_that_forks_children_that_use_the_ring_keeps_nothing_of_them(name, children, whose, end, times):
    process = children.python(
        FORKS + """if True:
        ring, bystander = Ring.create(name, 4096, writers=1), Ring.open(name)
        assert ring.try_read() is None

        def once():
            pid = os.fork()
            if pid == 0:
                mine = ring if whose == "inherited" else Ring.open(name)
                mine.write(b"x")
                if end == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                if end == "_exit":
                    os._exit(7)
                if end == "close and exit":
                    mine.close()
                sys.exit(7)
            status = os.waitpid(pid, 0)[1]
            assert status == (signal.SIGKILL if end == "SIGKILL" else 7 << 8), status
            assert ring.try_read() == b"x"
            stats = ring.stats()
            assert (stats.lanes_in_use, stats.readers) == (0, 1), stats

        assert grown(once, times, warm_up=10) == {}
        ring.close(), bystander.close()
        """,
        name, whose, end, times,
    )  # fmt: skip
    assert children.output(process) == ""
    assert not is_left(name)


@needs_fork
def test_twenty_generations_of_forks_pile_nothing_up(name, children):
    """Each child closes and drops what it inherited but for one handle, opens two more, and forks the next one."""
    process = children.python(
        FORKS + """if True:
        keep = Ring.create(name, 4096, writers=1)
        extra = [Ring.open(name), Ring.open(name)]
        for generation in range(20):
            pid = os.fork()
            if pid:
                break
            for ring in extra:
                ring.close()
            del ring, extra
            found = counts()
            exact = [found[what] for what in ("descriptors", "mappings", "segments", "owners", "open rings", "forking")]
            if generation:
                assert exact == first, (generation, exact, first)
            first = exact
            assert found["open rings"] == found["owners"] == found["segments"] == 1, found
            extra = [Ring.open(name), Ring.open(name)]
        else:
            keep.write(b"the last one")
            assert keep.read() == b"the last one"
            sys.exit(0)
        sys.exit(os.waitpid(pid, 0)[1] >> 8)
        """,
        name, "", "", 0,
    )  # fmt: skip
    assert children.output(process) == ""
    assert not is_left(name)


def live_in_a_spawned_process(ring, times):
    """With a handle that was pickled, and its copies."""
    with ring:
        ring.write(b"pickled")
    with Ring.open(ring.name):
        assert grown(lambda: once_more(ring.name), times) == {}


def once_more(name):
    with Ring.open(name) as ring:
        ring.write(b"own", timeout=DEADLINE)


SPAWNS = [method for method in ("spawn", "forkserver") if method in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", SPAWNS)
def test_spawned_processes_leave_nothing(name, children, method):
    count, times = 3, 100 // LESS
    with Ring.create(name, 4096, writers=2 * count) as ring:
        before = counts()
        started = [children.spawn(live_in_a_spawned_process, ring, times, method=method) for _ in range(count)]
        wanted = count * (1 + times + 30)
        got = [ring.read(timeout=DEADLINE) for _ in range(wanted)]
        assert sorted(set(got)) == [b"own", b"pickled"] and got.count(b"pickled") == count
        for process in started:
            process.join(DEADLINE)
            assert process.exitcode == 0
        assert ring.stats().lanes_in_use == 0
        after = counts()
        kinds = [what for what in ("mappings", "segments", "owners", "open rings", "asleep") if what in after]
        assert [after[what] - before[what] for what in kinds] == [0] * len(kinds)


def test_three_hundred_writers_one_after_another_on_four_lanes_reach_a_slow_reader(name, children):
    """It reads only while a writer sleeps for want of room. A third closes, a third just ends, a third is killed."""
    count = 12 if WINDOWS else 300

    def write(writer):
        mine = Ring.open(name, spin=0)
        for number in range(3):
            mine.write(b"%d %d " % (writer, number) + bytes(writer * 37 * (300 // count) % 1500))
        if writer % 3 == 0:
            mine.close()
        elif writer % 3 == 1:
            kill_yourself()
        os._exit(0)

    got = []
    with Ring.create(name, 4096, writers=4) as ring:
        assert ring.try_read() is None
        for writer in range(count):
            pid = children.start(write, writer)

            def over(pid=pid):
                if ring.stats().writers_parked:
                    got.extend(filter(None, [ring.try_read()]))
                return children._poll(pid)

            assert wait_until(over, "the writer's end") == (KILLED if writer % 3 == 1 else 0,)
        got.extend(ring.messages(timeout=0))
        assert ring.stats().lanes_in_use == 0
        assert ring.stats().writer_parks, "the lanes were never full"
    numbers = [tuple(map(int, message.split()[:2])) for message in got]
    assert sorted(numbers) == [(writer, number) for writer in range(count) for number in range(3)]
    for writer in range(count):
        assert [number for who, number in numbers if who == writer] == [0, 1, 2]


# ---------------------------------------------------------------- forks beside other threads

# This script's own hook is registered before the ring's: `before` hooks run in reverse order, so after it.
ORPHANS = """
import os, resource, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")
signal.alarm(60)
name = sys.argv[1]
before = lambda: None
os.register_at_fork(before=lambda: before())
from shmring import Ring, RingBusy, _linux, unlink
made = []

def make():
    made.append(Ring.open(name))
    made[0].write(b"parent")

def orphan(use=lambda: None):
    '''Fork a child that says that it is there, and uses the ring when it is told to.'''
    if os.fork() == 0:
        try:
            os.write(1, b"+")
            use(os.read(0, 1) == b"x")
        except BaseException as error:
            os.write(1, (type(error).__name__ + chr(10)).encode())
        finally:
            os._exit(0)
"""


class Orphans:
    """A parent that forks, says so by a line, and is killed; and its children, which are told what to do."""

    def __init__(self, children, name, code):
        # Its output is a pipe for all of them: when that ends, they are all gone.
        self._process = children.python(ORPHANS + code, name)

    def ready(self, count):
        """Wait until the parent and so many children are ready."""
        said = self.hear(count + 1)
        assert sorted(said) == sorted(b"!" + b"+" * count), said

    def kill_parent(self):
        self._process.kill()
        self._process.wait(DEADLINE)

    def say(self, what, count):
        """Tell so many children to go on."""
        os.write(self._process.stdin.fileno(), what * count)

    def hear(self, count):
        """So many bytes of what they say."""
        said = b""
        while len(said) < count:
            assert select.select([self._process.stdout], [], [], DEADLINE)[0], f"nothing was said in {DEADLINE} s"
            some = os.read(self._process.stdout.fileno(), count - len(said))
            assert some, f"{said} {self._process.stderr.read()}"
            said += some
        return said

    def tell(self, what, count):
        """Tell so many children, the last ones, to go on; what they say until they are all gone."""
        self.say(what, count)
        return self._process.stdout.read()


@needs_fork
def test_a_handle_opened_while_another_thread_forks_gives_the_child_none_of_its_claims(name, children):
    """Opened after the ring's hook has run and before the fork itself."""
    orphans = Orphans(
        children,
        name,
        """if True:
        def before():
            make()
            assert made[0].try_read() == b"parent"

        def use(_):
            try:
                made[0].write(b"child")
            except RingBusy:
                os.write(1, b"busy")

        Ring.open(name).close()  # the hooks
        orphan(use)
        before = None
        os.write(1, b"!")
        time.sleep(60)
        """,
    )
    with Ring.create(name, 4096, writers=1) as ring:
        orphans.ready(1)
        with pytest.raises(RingBusy):
            ring.write(b"")
        orphans.kill_parent()
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (0, 0), "free at once"
        assert orphans.tell(b"x", 1) == ""
        assert ring.read_many() == [b"child"]


@needs_fork
def test_a_lane_is_not_shared_with_a_child_forked_while_its_handle_was_opened(name, children):
    orphans = Orphans(
        children,
        name,
        """if True:
        before = make

        def use(_):
            try:
                made[0].write(b"child")
                os.write(1, b"done")
            except RingBusy:
                os.write(1, b"busy")

        Ring.open(name).close()
        orphan(use)
        os.write(1, b"!")
        time.sleep(60)
        """,
    )
    with Ring.create(name, 4096, writers=1) as ring:
        orphans.ready(1)
        orphans.say(b"x", 1)
        assert orphans.hear(4) == b"busy", "two processes write to one lane"
        assert ring.read_many() == [b"parent"]
        orphans.kill_parent()
        assert orphans.tell(b"", 0) == ""


@needs_fork
@pytest.mark.parametrize("remove", ["Ring.create(name)", "unlink(name)"])
def test_a_child_forked_while_a_name_is_removed_keeps_no_lock_on_it(name, children, remove):
    """The parent is killed in the middle, with what a crash left locked by it alone."""
    crash = children.fork(lambda: (Ring.create(name), os.kill(os.getpid(), signal.SIGKILL)))
    assert children.join(crash) == -signal.SIGKILL
    orphans = Orphans(
        children,
        name,
        f"""if True:
        keep = Ring.create(name + "-other")  # the hooks
        inside = threading.Event()
        os.unlink = lambda *_: (inside.set(), time.sleep(60))
        threading.Thread(target=lambda: {remove}, daemon=True).start()
        assert inside.wait(30)
        orphan()
        os.write(1, b"!")
        time.sleep(60)
        """,
    )
    orphans.ready(1)
    orphans.kill_parent()
    Ring.create(name, 4096).close()
    orphans.tell(b".", 1)
    unlink(name + "-other")


@needs_fork
def test_a_child_forked_without_descriptors_left_keeps_no_claim_of_any_handle(name, children):
    orphans = Orphans(
        children,
        name,
        """if True:
        sys.unraisablehook = lambda _: None  # the fork says that it could not give each handle a descriptor
        first, second, third = (Ring.open(name) for _ in range(3))
        first.write(b""), second.write(b""), third.try_read()
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
        fillers = []
        try:
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        orphan()
        os.write(1, b"!")
        time.sleep(60)
        """,
    )
    with Ring.create(name, 4096, writers=2) as ring:
        orphans.ready(1)
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (2, 1)
        orphans.kill_parent()
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (0, 0)
        orphans.tell(b".", 1)


@needs_fork
def test_a_child_that_has_dropped_handles_and_forks_keeps_nothing_of_its_dead_children(name, children):
    """The numbers of the parent's descriptors come back, for a descriptor of another handle."""

    def child(all_numbers):
        for ring in rings[:-1]:
            ring.close()
        ring = rings.pop()
        rings.clear()
        gc.collect()
        fillers = []
        while not fillers or fillers[-1] < max(all_numbers):
            fillers.append(os.open("/dev/null", os.O_RDONLY))
        for number in all_numbers:
            # Whatever the grandchild's description gets for a number, it was another handle's once.
            if number != ring._segment._locks:
                with contextlib.suppress(OSError):
                    os.close(number)
                before = counts()
                grandchild = os.fork()
                if grandchild == 0:
                    ring.write(b"grandchild")
                    os._exit(0)
                assert os.waitpid(grandchild, 0)[1] == 0
                assert counts()["descriptors"] == before["descriptors"]
                assert ring.stats().lanes_in_use == 0
                fillers.append(os.open("/dev/null", os.O_RDONLY))

    rings = [Ring.create(name, 4096, writers=1), *(Ring.open(name) for _ in range(4))]
    numbers = [ring._segment._locks for ring in rings]
    assert children.join(children.fork(child, numbers)) == 0
    for ring in rings:
        ring.close()
    del ring
    rings.clear()


@needs_fork
@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=pytest.mark.stress)])
def test_children_forked_while_other_threads_open_write_and_close_keep_no_claim_of_a_dead_parent(
    name, children, seed, rounds
):
    count = 20
    rng = random.Random(seed)
    for _ in range(rounds):
        with Ring.create(name, 4096, writers=16) as ring:
            orphans = Orphans(
                children,
                name,
                f"""
sys.setswitchinterval({rng.choice([1e-6, 1e-5, 1e-4])})
count = {count}
if True:"""
                + """
                over = threading.Event()

                def use(wanted):
                    if wanted:
                        mine.write(b"child")

                def live():
                    while not over.is_set():
                        with Ring.open(name) as ring:
                            ring.try_write(b"thread")

                def read():
                    while not over.is_set():
                        with Ring.open(name) as ring:
                            ring.read_many(timeout=10)

                mine = Ring.open(name)
                mine.write(b"parent")
                threads = [threading.Thread(target=target, daemon=True) for target in (live, live, live, read)]
                forks = [threading.Thread(target=lambda: [orphan(use) for _ in range(count // 2)]) for _ in range(2)]
                for thread in threads + forks:
                    thread.start()
                for thread in forks:
                    thread.join()
                os.write(1, b"!")
                time.sleep(60)
                """,
            )
            orphans.ready(count)
            orphans.kill_parent()
            stats = ring.stats()
            assert (stats.lanes_in_use, stats.readers) == (0, 0), "a child keeps what its parent had claimed"
            list(ring.messages(timeout=0))
            orphans.say(b"x", 10)
            assert orphans.tell(b".", count - 10) == ""
            assert ring.read_many() == [b"child"] * 10
