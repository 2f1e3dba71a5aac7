"""The end of the interpreter: however a program ends, it says nothing, does not hang, and its rings' names are gone.

Each program runs in an interpreter of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import textwrap

import pytest
from conftest import DEADLINE, WINDOWS, segments
from counts import is_left
from support import GIL

BEGIN = """
import atexit, builtins, contextvars, faulthandler, gc, multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
signal.alarm(60) if hasattr(signal, "alarm") else faulthandler.dump_traceback_later(60, exit=True)
from shmring import Ring, RingClosed, RingTimeout
from shmring._backend import os_backend
name = sys.argv[1]

def used(name=name, **kwargs):
    '''A ring with both roles taken.'''
    ring = Ring.create(name, 4096, spin=0, **kwargs)
    ring.write(b"used")
    assert ring.read() == b"used"
    return ring

def wait_until(condition):
    while not condition():
        time.sleep(0.001)

def parked(ring):
    return ring.stats().readers_parked or ring.stats().writers_parked

def full(ring):
    while ring.try_write(bytes(1000)):
        pass
    return ring

def replaced(other):
    '''Have something else remove a ring's name, or leave it where that removes it; what did it before.'''
    where, what = os_backend, "_remove"
    if not hasattr(where, what):
        where, what = os_backend.Segment, "leave"
    before = getattr(where, what)
    setattr(where, what, other)
    return before
"""

STRICT = ["-X", "dev", "-W", "error"]


@pytest.fixture
def run(name, children):
    """Run a program to its end, which leaves no name; what it printed. What else it says is an error."""

    def run(code, status=0, stderr="", options=STRICT):
        process = children.python(BEGIN + textwrap.dedent(code), name, options=options)
        output, errors = process.communicate(timeout=DEADLINE * 3)
        assert (process.returncode, bool(re.fullmatch(stderr, errors, re.DOTALL))) == (status, True), errors
        return output

    yield run
    assert not [entry for entry in segments() if entry.startswith(f"shmring.{name}")]
    assert not any(map(is_left, (name, f"{name}-late", f"{name}-child", f"{name}-never")))


# ---------------------------------------------------------------- where a ring is

PLACES = {
    "a global": "ring = used()",
    "a global of a module": "import types; sys.modules['some'] = some = types.ModuleType('some'); some.ring = used()",
    "an attribute of a builtin module": "sys.ring = used()",
    "the builtins": "builtins.ring = used()",
    "a cycle": "ring = used(); ring.itself = [ring]; del ring",
    "a cycle with a finalizer": """
        class Owner:
            def __init__(self): self.ring, self.itself = used(), self
            def __del__(self): self.ring.close()
        Owner()
    """,
    "a class attribute": "class Owner: ring = used()",
    "a finalizer of a global": """
        class Owner:
            def __init__(self): self.ring = used()
            def __del__(self): self.ring.stats(), self.ring.close()
        owner = Owner()
    """,
    "a thread-local": "local = threading.local(); local.ring = used()",
    "a thread-local of a builtin module": "sys.local = threading.local(); sys.local.ring = used()",
    "a context variable": "variable = contextvars.ContextVar('ring'); variable.set(used())",
    "a hook of the interpreter": "ring = used(); sys.excepthook = lambda *_, ring=ring: None; del ring",
    "a hook that has an iterator": """
        ring = used()
        ring.write_many([b"1", b"2"])
        iterator = iter(ring)
        next(iterator)
        sys.excepthook = lambda *_, iterator=iterator: None
        del ring, iterator
    """,
    "a trace function": "sys.settrace(lambda *_, ring=used(): None)",
    "a default argument": "def function(ring=used()): pass",
    "a closure of an atexit handler": "atexit.register(lambda ring: None, used())",
    "two handles of one ring": "ring, other = used(), Ring.open(name)",
    "a closed handle": "ring = used(); ring.close()",
    "a full ring": "ring = full(Ring.create(name, 4096)); sys.ring = ring",
    "a handle in a traceback": """
        try:
            used().read(timeout=0)
        except RingTimeout as error:
            sys.error = error
    """,
    "a suspended generator": """
        def generate():
            with used() as ring:
                yield ring
        sys.generator = generate()
        next(sys.generator)
    """,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_ring_that_is_open_at_the_end(run, place):
    if not GIL and place == "a finalizer of a global":
        pytest.skip("without a GIL the ring's own finalizer may come first, and it is closed then")
    assert run(PLACES[place]) == ""


def test_a_finalizer_that_closes_the_ring_may_come_at_any_moment_of_the_end(run):
    """Here the collector is made to run while the ring leaves."""
    assert (
        run("""
        def remove_slowly(*args):
            many = [[] for _ in range(5000)]
            remove(*args)
            more = [[] for _ in range(5000)]
        remove = replaced(remove_slowly)

        class Owner:
            def __init__(self): self.ring, self.itself = used(), self
            def __del__(self): self.ring.close()
        atexit.register(gc.enable)
        gc.disable()
        Owner()
    """)
        == ""
    )


def test_a_thread_that_closes_the_ring_while_the_interpreter_ends(run):
    """It closes the descriptor, and opens another ring, which may get the number."""
    assert (
        run("""
        inside, go_on = threading.Event(), []
        def remove_slowly(*args):
            if threading.current_thread() is threading.main_thread():
                inside.set()
                time.sleep(0.2)  # the time in which it goes wrong, if it does
            remove(*args)
        remove = replaced(remove_slowly)

        def close():
            inside.wait()
            ring.close()
            go_on.append(Ring.create(name + "-late", 4096))
            go_on.pop().close()
        closing = threading.Thread(target=close, daemon=True)
        atexit.register(closing.join)  # after the ring's own handler; the other ring must not be left half-way
        ring = used()
        closing.start()
    """)
        == ""
    )


@pytest.mark.parametrize("place", [
    pytest.param(place, marks=() if "hook" in place or "builtin" in place else pytest.mark.stress) for place in PLACES
])  # fmt: skip
def test_a_ring_that_is_open_at_the_end_of_an_interpreter_without_options(run, place):
    assert run(PLACES[place], options=[]) == ""


# ---------------------------------------------------------------- threads

THREADS = {
    "read": "ring.read()",
    "read with a timeout": "ring.read(timeout=1e6)",
    "read into a buffer": "ring.read(bytearray(10))",
    "read_many": "ring.read_many()",
    "iteration": "[message for message in ring]",
    "write": "full(ring), ring.write(bytes(4000))",
    "write_many": "ring.write_many([bytes(1000)] * 10)",
    "open": "ready.append(1), Ring.open(name + '-never', timeout=None)",
}


@pytest.mark.parametrize("what", THREADS)
def test_a_daemon_thread_that_waits(run, what):
    assert (
        run(f"""
        ready = []
        def wait(ring):
            {THREADS[what]}
        thread = threading.Thread(target=wait, args=(used(),), daemon=True)
        thread.start()
        with Ring.open(name) as other:
            wait_until(lambda: parked(other) or ready)
    """)
        == ""
    )


@pytest.mark.parametrize("rounds", [1, pytest.param(30, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    "end", ["", "ring.close()", "del ring", "atexit.register(ring.close)", "sys.exit()", "late = Late()"]
)
def test_daemon_threads_that_are_inside_in_the_end(run, rounds, end):
    """Where they are when the interpreter stops them is a matter of chance."""
    for _ in range(rounds):
        assert (
            run(f"""
        class Late:
            def __init__(self): self.ring = ring
            def __del__(self): self.ring.close()

        def stream(ring):
            try:
                while True:
                    ring.write_many([b"x" * 100] * 2), ring.try_read(), list(ring.messages(timeout=0))
            except RingClosed:
                pass

        ring = Ring.create(name, 4096)
        for _ in range(2):
            threading.Thread(target=stream, args=(ring,), daemon=True).start()
        wait_until(lambda: ring.stats().messages_out > 100)
        {end}
    """)
            == ""
        )


def test_a_thread_that_still_uses_the_ring_when_the_main_thread_is_done(run):
    assert (
        run("""
        def use(ring):
            threading.main_thread().join()
            for number in range(1000):
                ring.write(b"%d" % number)
                assert ring.read() == b"%d" % number
            print("done")
        threading.Thread(target=use, args=(used(),)).start()
    """)
        == "done\n"
    )


@pytest.mark.parametrize("close", ["atexit", "explicit", "shutdown first"])
def test_a_pool_of_threads_whose_worker_is_blocked(run, close):
    """The executor waits for its workers at the end; closing the ring is what ends them."""
    closing = {
        "atexit": "threading._register_atexit(ring.close)",  # runs before the executor's own, which came earlier
        "explicit": "ring.close()",
        "shutdown first": "pool.shutdown(wait=False), ring.close()",
    }
    assert (
        run(f"""
        ring = used()
        pool = ThreadPoolExecutor(2)
        futures = [pool.submit(ring.read) for _ in range(2)]
        wait_until(lambda: parked(ring))
        {closing[close]}
    """)
        == ""
    )


def test_a_worker_of_a_pool_that_reads_to_the_end(run):
    assert (
        run("""
        ring = used()
        pool = ThreadPoolExecutor(1)
        future = pool.submit(lambda: [message for message in iter(ring.read, b"end")])
        ring.write_many([b"1", b"2", b"end"])
        future.add_done_callback(lambda future: print(future.result()))
    """)
        == "[b'1', b'2']\n"
    )


def test_sys_exit_in_a_thread_ends_the_thread_alone(run):
    assert (
        run("""
        def leave(ring):
            ring.write(b"left")
            sys.exit(3)
        ring = used()
        thread = threading.Thread(target=leave, args=(ring,))
        thread.start()
        thread.join()
        print(ring.read())
    """)
        == "b'left'\n"
    )


# ---------------------------------------------------------------- ways to end

BY_CTRL_C = 0xC000013A if WINDOWS else -signal.SIGINT  # STATUS_CONTROL_C_EXIT, <winnt.h>
ENDS = {
    "sys.exit": ("sys.exit(3)", 3, ""),
    "sys.exit with a text": ("sys.exit('that is all')", 1, "that is all\n"),
    "an exception": ("raise LookupError('on purpose')", 1, r"Traceback .*LookupError: on purpose\n"),
    "an error of the ring": ("ring.read(timeout=0)", 1, r"Traceback .*RingTimeout: [^\n]*\n"),
    "an exception inside with": ("with ring: 1 / 0", 1, r"Traceback .*ZeroDivisionError[^\n]*\n"),
    "Ctrl-C": ("signal.raise_signal(signal.SIGINT)", BY_CTRL_C, r"Traceback .*KeyboardInterrupt\n"),
    "a deleted module": ("del sys.modules['shmring'], sys.modules['shmring._ring']", 0, ""),
    "a full garbage collection that is off": ("gc.disable(); ring.itself = ring; del ring", 0, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_that_ends(run, end):
    code, status, stderr = ENDS[end]
    assert run(f"ring = used()\n{code}", status, stderr) == ""


def test_os_exit_says_nothing_and_leaves_the_name_as_a_crash_does(run, name):
    assert run("ring = used(); os._exit(4)", 4) == ""
    assert run("ring = used(); ring.unlink()") == "", "it counts as not there"


SIGNALS = {
    "read": "ring.read()", "read_many": "ring.read_many()", "iteration": "list(ring)",
    "write": "full(ring).write(bytes(4000))",
}  # fmt: skip


@pytest.mark.parametrize("first", ["", "ring.close(); "])
@pytest.mark.parametrize("what", SIGNALS)
def test_a_signal_handler_that_calls_sys_exit_ends_a_wait_and_the_program(name, children, what, first):
    """Also if it closes the ring before. Where no other process can send a signal, a thread has the handler called."""
    number, send = ("SIGINT", "_thread.interrupt_main()") if WINDOWS else ("SIGTERM", "None")
    again = send if WINDOWS else "signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)"
    code = f"""
        import _thread
        def leave(*_):
            try:
                {first}sys.exit(5)
            except RuntimeError:  # on the way from one sleep to the next, in the middle of an operation
                repeat = lambda: (wait_until(lambda: parked(watch)), {again})
                threading.Thread(target=repeat, daemon=True).start()
        signal.signal(signal.{number}, leave)
        ring = used()
        watch = Ring.open(name)
        tell = lambda: (wait_until(lambda: parked(watch)), print("waits", flush=True), {send})
        threading.Thread(target=tell, daemon=True).start()
        {SIGNALS[what]}
    """
    process = children.python(BEGIN + textwrap.dedent(code), name, options=STRICT)
    assert process.stdout.readline() == "waits\n", process.stderr.read()
    if not WINDOWS:
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=DEADLINE * 3)
    assert (process.returncode, output, errors) == (5, "", "")
    assert not is_left(name)


# ---------------------------------------------------------------- atexit


def test_a_ring_works_in_handlers_of_atexit_that_came_before_it_and_after_it(run):
    """Handlers run in reverse order: the second before the ring's own, the first one after it."""
    assert (
        run("""
        def use(when):
            ring.write(b"%d" % when)
            print(ring.read(), ring.stats().lanes_in_use)
        atexit.register(use, 1)
        ring = used()
        atexit.register(use, 2)
    """)
        == "b'2' 1\nb'1' 1\n"
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_atexit_may_close_the_ring(run, when):
    lines = ["atexit.register(lambda: ring.close())", "ring = used()"]
    assert run("\n".join(lines if when == "before" else lines[::-1])) == ""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_atexit_may_make_a_ring(run, when):
    lines = ["atexit.register(lambda: made.append(used(name + '-late')))", "ring = used()"]
    assert run("\n".join(["made = []", *(lines if when == "before" else lines[::-1])])) == ""


# ---------------------------------------------------------------- processes of multiprocessing


METHODS = [method for method in ("fork", "spawn", "forkserver") if method in multiprocessing.get_all_start_methods()]

WORK = """
import atexit, os, sys, threading
from shmring import Ring

kept = []

def leave_open(ring, own):
    '''A ring and a handle stay open in a global, and a daemon thread waits in the handle.'''
    kept.extend([ring, Ring.create(own, 4096)])
    ring.write(b"from a child")
    threading.Thread(target=kept[1].read, daemon=True).start()

def leave_by_exit(ring, own):
    leave_open(ring, own)
    sys.exit(0)

def prepare(ring):
    kept.append(ring)

def write(number):
    kept[0].write(b"%d" % number)
    return number
"""


@pytest.mark.parametrize("leave", ["leave_open", "leave_by_exit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_child_of_multiprocessing_that_leaves_rings_open(run, tmp_path, method, leave):
    (tmp_path / "work.py").write_text(WORK)
    assert (
        run(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import work
        context = multiprocessing.get_context({method!r})
        ring = Ring.create(name, 4096)
        process = context.Process(target=work.{leave}, args=(ring, name + "-child"))
        process.start()
        process.join()
        print(process.exitcode, ring.read(), ring.stats().lanes_in_use)
        files = [] if sys.platform == "win32" else os.listdir("/dev/shm")
        print([entry for entry in files if entry.startswith(f"shmring.{{name}}-child")])
    """)
        == "0 b'from a child' 0\n[]\n"
    )


@pytest.mark.parametrize("end", ["pool.close(), pool.join()", "pool.terminate(), pool.join()"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_processes_that_write_to_a_ring(run, tmp_path, method, end):
    (tmp_path / "work.py").write_text(WORK)
    assert (
        run(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import work
        ring = Ring.create(name, 4096, writers=2)
        assert ring.try_read() is None
        pool = multiprocessing.get_context({method!r}).Pool(2, work.prepare, (ring,))
        assert pool.map(work.write, range(100), 5) == list(range(100))
        print(sorted(map(int, ring.read_many())) == list(range(100)))
        {end}
        print(ring.stats().lanes_in_use)
    """)
        == "True\n0\n"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_ring_in_a_process_that_was_forked_leaves_by_sys_exit(run):
    assert (
        run("""
        ring = used()
        pid = os.fork()
        if pid == 0:
            sys.exit(6)
        print(os.waitpid(pid, 0)[1] >> 8)
    """)
        == "6\n"
    )
