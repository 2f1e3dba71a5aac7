"""One process goes through one operation, and something happens to it before the k-th bytecode.

A `Case` is an operation and its scene. `sweep` runs it for one k after another until the operation
is over before k is reached, each time with a ring of its own and with one of four events:

- "kill": the victim kills itself with SIGKILL. A process that did not take part then looks at what is left.
- "instruction": SIGKILL within the k-th bytecode that may change something, before some instruction of the
  processor: from the bytecode on the victim is single-stepped by ptrace(2).
- "stop": it stops itself with SIGSTOP. The others go on meanwhile; then it is continued, and finishes.
- "interrupt": KeyboardInterrupt is raised in it. Its handle has to work on.

Only bytecodes of the package count (`Trace`). The processes of a sweep:

    pytest - supervisor (three of them share the ks)                has all handles but the victim's,
              |                                                      its threads are those who sleep
              template, warmed up and without any handle: forks, and reaps, a victim for each k

The supervisors are small interpreters of their own: forking is most of the time.

An interrupted victim is the supervisor itself. No wait has a time-out of its own, and no sleep is
sliced (`SLICE`), so nothing stands in for the protocol; a trial that hangs is ended by SIGALRM.
To look again after a while (`MOURNING`) is part of it where somebody dies, and only there: else it is after an hour.

Windows has no forks and no such signals: there it is `windows_harness.py` that has the victims and the sweep.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import gc
import itertools
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path

from support import DEADLINE, ROOT, SIGKILL, WINDOWS, descriptors, wait_until

from shmring import MessagesLost, Ring, RingBusy, RingTimeout, _competing, _layout, _ring
from shmring._backend import os_backend

PACKAGE = str(Path(_layout.__file__).parent) + os.sep
MONITORING = getattr(sys, "monitoring", None)  # from 3.12 on; sys.settrace misses bytecodes there
TOOL = 4  # of 0 to 5
ALL_PLACES = bool(os.environ.get("SHMRING_ALL_PLACES"))  # see `Trace`
EXACT = sys.version_info >= (3, 11)  # before, a signal handler may run wherever it pleases
NEVER = 1 << 60
SUPERVISORS = 3
MOST_FAILURES = int(os.environ.get("SHMRING_FAILURES") or 4)  # after which a sweep ends
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9  # <sys/ptrace.h>
INSTRUCTIONS = 4000  # stepped at most; some 1,800 lead out of the trace function and to the bytecode's effect
SETTLED = 0.02  # seconds after which an announced sleep counts as one where the system does not tell
if not WINDOWS:
    LIBC = ctypes.CDLL(None, use_errno=True)
    ptrace = LIBC["ptrace"]  # long ptrace(enum request, pid_t, void *addr, void *data)
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    ptrace.restype = ctypes.c_long


# ---------------------------------------------------------------- messages, and who has seen them


@functools.cache
def message(tag, number, size):
    """A message that tells who wrote it, which one it is and how long, all over its length."""
    head = b"%s %d %d " % (tag.encode(), number, size)
    assert size >= len(head)
    return (head * (size // len(head) + 1))[:size]


def identify(data):
    """The tag and the number of a whole message."""
    data = bytes(data)
    tag, number, size, *_ = data.split(b" ", 3)
    assert data == message(tag.decode(), int(number), int(size)), f"a torn message: {data!r}"
    return tag.decode(), int(number)


class Ledger:
    """What was written and read, and by whom, as lines.

    "try v 3 4" somebody is about to write these messages of v's in one call; "ack v 3 4" the call has
    returned; "not v 3" it said that they were not written; "got v 3" somebody's reading call returned it.
    """

    def __init__(self, ordered=True):
        """`ordered` is false where readers share the messages: there each gets its own in order, see `Actor.took`."""
        self.ordered = ordered
        self.calls = defaultdict(list)  # of each tag, the numbers of each writing call
        self.acked = defaultdict(set)
        self.refused = defaultdict(set)
        self.got = defaultdict(list)

    def note(self, line):
        what, tag, *numbers = line.split()
        numbers = [int(number) for number in numbers]
        if what == "try":
            self.calls[tag].append(numbers)
        else:
            {"ack": self.acked[tag].update, "not": self.refused[tag].update, "got": self.got[tag].extend}[what](numbers)

    def check(self, may_be_lost=0):
        """Everything acknowledged was read once and in order, and of the rest nothing that cannot be."""
        lost = []
        for tag, calls in list(self.calls.items()):
            got = self.got[tag] if self.ordered else sorted(self.got[tag])
            assert got == sorted(set(got)), f"{tag}'s messages came twice or out of order: {got}"
            strange = set(got) - {number for call in calls for number in call}
            assert not strange, f"nobody wrote {tag}'s messages {strange}"
            assert not self.refused[tag] & set(got), f"{tag}'s refused message came: {got}"
            lost += [(tag, number) for number in sorted(self.acked[tag] - set(got))]
            for call in calls:
                there = [number in got for number in call if number not in self.acked[tag]]
                assert there == sorted(there, reverse=True), f"a batch with a gap: of {call} came {got}"
        assert set(self.got) <= set(self.calls) | {tag for tag, got in self.got.items() if not got}
        assert len(lost) <= may_be_lost, f"acknowledged, but not read: {lost}; at most {may_be_lost} may be"


class Actor:
    """A handle whose every call is noted, before and after."""

    def __init__(self, name, tag, note, ring=None):
        self.name, self.tag, self.note, self.ring = name, tag, note, ring
        self.trace = None
        self.seen = None  # the message that it read last
        self._last = {}  # of each tag, the number that it read last
        self._next = 0

    def open(self):
        self.ring = Ring.open(self.name, spin=0)
        return self

    def close(self):
        if self.ring is not None:
            self.ring.close()

    def _try(self, *sizes):
        first, self._next = self._next, self._next + len(sizes)
        numbers = " ".join(map(str, range(first, self._next)))
        self.note(f"try {self.tag} {numbers}")
        return [message(self.tag, first + i, size) for i, size in enumerate(sizes)], f"{self.tag} {numbers}"

    def write(self, size=40):
        (data,), which = self._try(size)
        self.ring.write(data)
        self.note(f"ack {which}")

    def try_write(self, size=40):
        (data,), which = self._try(size)
        written = self.ring.try_write(data)
        self.note(f"{'ack' if written else 'not'} {which}")
        return written

    def write_many(self, *sizes):
        messages, which = self._try(*sizes)
        assert self.ring.write_many(messages) == len(messages)
        self.note(f"ack {which}")

    def write_gathered(self, size=40):
        (data,), which = self._try(size)
        self.ring.writev([data[:10], memoryview(data)[10:]])
        self.note(f"ack {which}")

    def write_in_place(self, size=40, spare=0):
        (data,), which = self._try(size)
        room = self.ring.reserve(size + spare)
        with room as view:
            view[:size] = data
            if spare:
                room.commit(size)
        self.note(f"ack {which}")

    async def write_async(self, size=40):
        (data,), which = self._try(size)
        await self.ring.write_async(data)
        self.note(f"ack {which}")

    async def read_async(self):
        self.took(await self.ring.read_async())

    def fill(self, size):
        while self.try_write(size):
            pass

    def took(self, *messages):
        for self.seen in map(identify, messages):
            tag, number = self.seen
            assert number > self._last.get(tag, -1), f"{tag}'s message {number} came after {self._last[tag]}"
            self._last[tag] = number
            self.note(f"got {tag} {number}")

    def read(self):
        data = self.ring.read()
        self.took(data)
        return data

    def read_into(self, room=2048):
        buffer = bytearray(room)
        size = self.ring.read(buffer)
        self.took(buffer[:size])

    def read_in_place(self):
        data = None
        try:
            with self.ring.borrow() as view:
                data = bytes(view)
        finally:
            if data is not None:
                self.took(data)  # an exception that comes at the end of the block takes it out as well

    def try_read(self):
        data = self.ring.try_read()
        if data is not None:
            self.took(data)
        return data

    def read_when_rung(self):
        """As an event loop does it: take what is there, and wait for the doorbell when there is nothing."""
        while True:
            data = self.try_read()
            if data is not None:
                return data
            select.select([self.ring], [], [])

    def read_many(self, most=None):
        self.took(*self.ring.read_many(most))

    def iterate(self, number):
        for data in self.ring:
            self.took(data)
            number -= 1
            if not number:
                break

    def drain(self):
        with contextlib.suppress(RingTimeout):
            while True:
                self.took(*self.ring.read_many(timeout=0))

    def drain_or_lose(self):
        """`drain` where messages may be lost; how many came, and how many are said to be lost."""
        came = lost = 0
        while True:
            try:
                data = self.ring.try_read()
            except MessagesLost as error:
                lost += error.count
            else:
                if data is None:
                    return came, lost
                self.took(data)
                came += 1

    @contextlib.contextmanager
    def aside(self):
        """What is done in here does not count as part of the operation."""
        self.trace.paused = True
        try:
            yield
        finally:
            self.trace.paused = False


# ---------------------------------------------------------------- before the k-th bytecode


# What moves values within a frame: a process that is killed or stopped after it has left the world outside as
# before. All else may call, store to shared memory, or drop the last reference to something that closes.
WITHIN = {
    number for name, number in dis.opmap.items()
    if name.startswith(("LOAD_", "POP_JUMP_", "JUMP_", "BINARY_", "UNARY_", "COMPARE_", "BUILD_"))
    or name in ("NOP", "RESUME", "CACHE", "EXTENDED_ARG", "PRECALL", "PUSH_NULL", "KW_NAMES", "COPY", "SWAP", "IS_OP",
                "CONTAINS_OP", "DUP_TOP", "ROT_TWO", "ROT_THREE", "UNPACK_SEQUENCE", "TO_BOOL")
}  # fmt: skip


class Trace:
    """Calls `hit()` before the k-th bytecode that this thread runs in frames of the package, generators included.

    Unless `all_places`, only some count: for a kill or a stop, those before which something may have changed
    outside of this process; within an instruction, those that may change something; for an interrupt, those
    where the interpreter itself would run a signal handler.
    """

    def __init__(self, k, hit, event, all_places=ALL_PLACES):
        self.left = k
        self.paused = False
        self.where = None  # it was hit
        self.handler_runs = False  # there: the interpreter itself would run a signal handler
        self._before = None  # the frame that ran the bytecode before, and that bytecode
        self._hit = hit
        self._counts = _everywhere if all_places else COUNTS[event]

    def __enter__(self):
        self._thread = threading.get_ident()
        if MONITORING:
            MONITORING.use_tool_id(TOOL, "kill")
            MONITORING.register_callback(TOOL, MONITORING.events.INSTRUCTION, self._instruction)
            MONITORING.set_events(TOOL, MONITORING.events.INSTRUCTION)
        else:
            sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        if MONITORING:
            MONITORING.set_events(TOOL, 0)
            MONITORING.free_tool_id(TOOL)
        else:
            sys.settrace(None)

    def _instruction(self, code, offset):
        if not code.co_filename.startswith(PACKAGE):
            return MONITORING.DISABLE
        if threading.get_ident() == self._thread:
            self._count(sys._getframe(1))
        return None

    def _call(self, frame, event, arg):
        if self.paused or self.where or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._opcode

    def _opcode(self, frame, event, arg):
        if event == "opcode":
            self._count(frame)
        return self._opcode

    def _count(self, frame):
        if self.paused:
            return
        code = frame.f_code
        opcode = _bytecode(code)[frame.f_lasti]
        before, self._before = self._before, (id(frame), opcode)  # not the frame: it must go as it would otherwise
        if not self._counts(before, self._before):
            return
        self.left -= 1
        if self.left == 0:
            self.handler_runs = _handler_runs(before, self._before)
            self.where = (
                f"{code.co_filename[len(PACKAGE) :]}:{frame.f_lineno} {code.co_name} before {dis.opname[opcode]}"
                f"{' (a signal handler may run here)' if self.handler_runs else ''}"
            )
            self._hit(self.where)


@functools.cache
def _bytecode(code):
    return code.co_code


def _everywhere(before, now):
    return True


def _may_differ(before, now):
    """May the world be another one than before the last bytecode?"""
    return before is None or before[1] not in WITHIN


def _may_make_a_difference(before, now):
    """May the world be another one after this bytecode?"""
    return now[1] not in WITHIN


def _handler_runs(before, now):
    """Would the interpreter run a signal handler between these two bytecodes?"""
    if before is None:
        return False
    if not EXACT:
        return True  # nearly everywhere
    opcode = dis.opname[before[1]]
    if "CALL" in opcode and "INTRINSIC" not in opcode:
        # After a function in C that returned; one in Python begins with RESUME.
        return before[0] == now[0] and opcode != "PRECALL" and dis.opname[now[1]] != "PUSH_EXC_INFO"
    return opcode in ("RESUME", "JUMP_BACKWARD")


COUNTS = {
    "kill": _may_differ, "stop": _may_differ, "interrupt": _handler_runs, "instruction": _may_make_a_difference
}  # fmt: skip


# ---------------------------------------------------------------- one operation and its scene


class Case:
    """One operation. The methods are called in this order, each in the process that its argument belongs to.

    `Stage` is the supervisor's: it has the ring open, and its threads sleep. `me`, an `Actor`, is the victim.
    """

    capacity = 4096
    writers = 1
    options = {}  # of `Ring.create`, besides
    holder = True  # the supervisor creates the ring, and has it open all the time
    role = None  # "writer" or "reader": the victim has it before and after the operation
    in_a_call = 0  # messages that a call may have taken and not returned when its process dies

    def scene(self, stage):
        """Before the victim is there."""

    def prepare(self, me):
        """Before the operation, and not counted."""
        me.open()

    def ready(self, stage):
        """The victim is prepared."""

    def operate(self, me):
        """The operation, counted."""
        raise NotImplementedError

    def asleep(self, stage):
        """The victim sleeps; let there be what it waits for."""
        raise AssertionError("the victim sleeps")

    def epoch(self, stage):
        """Of the victim's sleep; 0 if it is awake. Where others sleep nobody waits for the victim's."""
        return 0 if stage.sleepers else stage.parked()

    def interrupted(self, stage):
        """The victim has left the operation, and does nothing yet; the others are not affected."""

    def meanwhile(self, stage):
        """The victim is stopped; the others are not affected."""
        rival = stage.actor("r")
        writers, readers = stage.words_claimed()
        for role, claimed, act in (("writer", writers, rival.try_write), ("reader", readers, rival.try_read)):
            try:
                act()
            except RingBusy:
                assert claimed, f"nobody has the {role}'s role, and yet it is taken"
            else:
                assert not claimed, f"a stopped process lost its role as a {role}"
            assert claimed or role != self.role, f"a stopped process lost its role as a {role}"
        rival.close()

    def go_on(self, me):
        """After the operation, whether it was interrupted or not: the handle works on."""

    def end(self, stage):
        """Nothing is lost, and everything goes on with others. The victim has closed its handle or is dead."""
        stage.recover()

    @property
    def name(self):
        return type(self).__name__


class Stage:
    """One ring, everybody who takes part but the victim, and the ledger."""

    def __init__(self, case, name):
        self.case, self.name = case, name
        self.ledger = Ledger(ordered=case.options.get("readers") != "compete")
        self.may_be_lost = 0
        self.finished = False  # the victim's operation
        self.sleepers = []
        self.kept = False  # the ring was made with keep=True
        self._actors = []
        self._rung = 0
        self.holder = None
        if case.holder:
            self.holder = Ring.create(name, case.capacity, writers=case.writers, spin=0, **case.options)
        case.scene(self)

    def actor(self, tag):
        """One more who takes part."""
        self._actors.append(Actor(self.name, tag, self.ledger.note).open())
        return self._actors[-1]

    def sleeper(self, function, *args):
        """Run this in a thread, and come back when it sleeps."""
        self.sleepers.append(Sleeper(function, *args))
        wait_until(lambda: self.parked(), "the sleep of a sleeper")

    def parked(self):
        """The epochs of those who sleep, or are about to, all in one number; 0 if nobody does."""
        words, layout = self.holder._segment.words, self.holder._segment.layout
        blocks = [layout.lane_block(lane) + _layout.WRITER_PARKED for lane in range(layout.writers)]
        blocks += [layout.reader_block(slot) + _layout.READER_PARKED for slot in range(layout.slots)]
        epochs = [words[block >> 3] for block in blocks]
        return sum(epoch << 16 * i for i, epoch in enumerate(epochs) if epoch & 1)

    def look(self, pid):
        """Call the case's `asleep`, once each time when the victim has fallen asleep."""
        if self.holder is not None:
            epoch = self.case.epoch(self)
            if epoch and epoch != self._rung and is_asleep(pid):
                self._rung = epoch
                self.case.asleep(self)

    def words_claimed(self):
        """Are all lanes taken, and is there a reader, by the kernel's word?"""
        stats = self.holder.stats()
        return stats.lanes_in_use == stats.lanes, bool(stats.readers)

    def all_read(self, tag):
        """Wait until somebody has read all acknowledged messages of `tag`."""
        what = f"that a sleeper has read what {tag} wrote"
        wait_until(lambda: self.ledger.acked[tag] <= set(self.ledger.got[tag]), what)

    def wake(self, reader=None):
        """Whoever slept is awake, and comes to its end; what it writes may have to be read for that."""

        def over():
            if reader:
                reader.drain()
            return not any(sleeper.is_alive() for sleeper in self.sleepers)

        wait_until(over, "that a sleeper was woken")
        for sleeper in self.sleepers:
            sleeper.join()
        self.sleepers.clear()

    def recover(self, reader=None, writer=None):
        """Somebody who did not take part reads what is there, a new writer and a new reader get their roles."""
        reader = reader or self.actor("x")
        reader.drain()
        self.wake(reader)
        reader.drain()
        writer = writer or self.actor("n")
        for size in (16, 40, 1500):
            writer.write(size)
            reader.read()
        self.ledger.check(self.may_be_lost)
        a_thousand_pass(writer.ring, reader.ring)
        assert not self.parked(), "somebody who is awake or gone is announced as asleep"
        segment = self.holder._segment
        self.close()
        assert not is_there(segment), "somebody who is gone still has the ring open"
        assert not doorbells(self.name), "a doorbell is left although nobody has the ring open"

    def close(self):
        for actor in self._actors:
            actor.close()
        if self.holder is not None:
            if self.kept:
                self.holder.unlink()
            self.holder.close()


def is_there(segment):
    """Does anybody have this ring open, by the kernel's word? Those who close it remove its file."""
    if WINDOWS:
        return os_backend._exists(segment._of("present"))
    return os.path.exists(os_backend._path(segment.name))


def doorbells(name):
    """The FIFOs beside Linux's rings of this name."""
    if not hasattr(os_backend, "DOORBELLS"):
        return []
    return [entry for entry in os.listdir(os_backend.DIRECTORY) if entry.startswith(f"{os_backend.DOORBELLS}{name}.")]


THOUSAND = [[message(tag, number, size) for number in range(500)] for tag, size in (("s", 16), ("l", 60))]


def a_thousand_pass(writer, reader):
    """Some at a time, so few that none is lost where nobody waits."""
    for messages in THOUSAND:
        written, read = 0, []
        while len(read) < len(messages):
            if written < len(messages):
                with contextlib.suppress(RingTimeout):
                    written += writer.write_many(messages[written : written + 30], timeout=0)
            read += reader.read_many(timeout=0)
        assert read == messages
    assert reader.try_read() is None


class Sleeper(threading.Thread):
    """A thread of the supervisor that is to fall asleep, and whose failure is not overlooked."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self._function, self._args = function, args
        self._error = None
        self.start()

    def run(self):
        try:
            self._function(*self._args)
        except BaseException as error:
            self._error = error

    def join(self):
        super().join()
        if self._error:
            raise self._error


def is_asleep(pid):
    """Is this process, or thread, in a system call that waits?"""
    if WINDOWS:
        time.sleep(SETTLED)  # it has announced it; if it is not there yet, it will not stay long
        return True
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "S"


# ---------------------------------------------------------------- the victims of a supervisor


def die_with_parent():
    LIBC["prctl"](PR_SET_PDEATHSIG, signal.SIGKILL)


class Victims:
    """Forks a victim for each k from a process that never had a handle. Tells by lines how it goes with it."""

    def __init__(self, case, event):
        self.pid = 0  # of the victim that was started last
        self.place = []
        self._case, self._event = case, event
        self._lines = []
        told, self._tell = os.pipe()
        self._heard, say = os.pipe()
        self._template = os.fork()
        if not self._template:
            die_with_parent()
            os.close(self._tell), os.close(self._heard)
            try:
                self._fork_all(told, lambda line: os.write(say, line.encode() + b"\n"))
            finally:
                os._exit(1)
        os.close(told), os.close(say)

    def close(self):
        os.close(self._tell), os.close(self._heard)
        os.kill(self._template, signal.SIGKILL)
        os.waitpid(self._template, 0)

    def _fork_all(self, told, say):
        gc.freeze()
        gc.disable()  # each victim runs the same bytecodes
        while True:
            k, name = os.read(told, 999).decode().split()
            pid = os.fork()
            if not pid:
                die_with_parent()
                self._be_victim(int(k), Actor(name, "v", say), told, say)
            say(f"pid {pid}")
            status = 0x7F
            if self._event == "instruction":
                status = self._step_and_kill(pid, int(k), say)
                say(f"ended {status}")
            while os.WIFSTOPPED(status):
                _, status = os.waitpid(pid, os.WUNTRACED)
                say(f"ended {status}" if not os.WIFSTOPPED(status) else "stopped")

    def _step_and_kill(self, pid, k, say):
        """Let a victim come to its bytecode, and some instructions further, and kill it; its status."""
        _, status = os.waitpid(pid, os.WUNTRACED)
        steps = random.Random(k).randrange(INSTRUCTIONS)
        for _ in range(steps):
            if not os.WIFSTOPPED(status):
                break
            ptrace(PTRACE_SINGLESTEP, pid, None, None)
            _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return status  # it was over before
        say(f"at instruction {steps} from there")
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def _be_victim(self, k, me, told, say):
        def hit(where):
            say(f"at {where}")
            if self._event == "instruction":
                assert ptrace(PTRACE_TRACEME, 0, None, None) == 0, os.strerror(ctypes.get_errno())
            os.kill(os.getpid(), signal.SIGKILL if self._event == "kill" else signal.SIGSTOP)

        try:
            self._case.prepare(me)
            say("ready")
            os.read(told, 999)
            with Trace(k, hit, self._event) as me.trace:
                self._case.operate(me)
            say("finished")
            if self._event == "stop":
                self._case.go_on(me)
                me.close()
            os._exit(0)
        except BaseException:
            say("failed " + json.dumps(traceback.format_exc()))
        finally:
            os._exit(1)

    def start(self, k, name, place):
        self.pid, self.place = 0, place
        os.write(self._tell, f"{k} {name}".encode())

    def go(self):
        os.write(self._tell, b"go")

    def hear(self, stage, *awaited):
        """Wait until the victim, or its parent, says one of these; note everything it says before. The line."""
        while True:
            while self._lines:
                line = self._lines.pop(0)
                what, _, rest = line.partition(" ")
                if what == "pid":
                    self.pid = int(rest)
                elif what == "at":
                    self.place.append(rest)
                elif what == "failed":
                    raise AssertionError(f"the victim failed:\n{json.loads(rest)}")
                elif what == "finished":
                    stage.finished = True
                elif what not in ("ready", "stopped", "ended"):
                    stage.ledger.note(line)
                if what in awaited:
                    return line
            while not select.select([self._heard], [], [], 0.001)[0]:
                if self.pid:
                    stage.look(self.pid)
            data = b""
            while not data.endswith(b"\n"):
                more = os.read(self._heard, 65536)
                assert more, "the victim's parent has ended"
                data += more
            self._lines += data.decode().splitlines()


def kill_or_stop(case, victims, k, name, place, stop):
    """One trial. Was the operation over before its k-th bytecode?"""
    stage = Stage(case, name)
    victims.start(k, name, place)
    victims.hear(stage, "ready")
    case.ready(stage)
    victims.go()
    line = victims.hear(stage, "stopped", "ended")
    hit = line == "stopped" if stop else line == f"ended {SIGKILL}"
    if stop and hit:
        case.meanwhile(stage)
        os.kill(victims.pid, signal.SIGCONT)
        line = victims.hear(stage, "ended")
    assert hit or line == "ended 0", line
    assert not stop or stage.finished
    stage.may_be_lost = 0 if stage.finished else case.in_a_call
    case.end(stage)
    return not hit


def interrupt(case, k, name, place, swallowed=()):
    """One trial in this process. Was the operation over before its k-th bytecode?

    An interrupt that comes in a finalizer the interpreter reports and drops; then it is in `swallowed`.

    Where a signal handler really can run nothing may be lost. Elsewhere, and before 3.11, where handlers run between a
    function's return and the use of what it returned, what is just being handed over may be lost:
    the messages of that call; and operations on the handle itself are not interrupted there.
    """

    def hit(where):
        place.append(where)
        if exact(me.trace) or case.role or case.in_a_call:
            raise KeyboardInterrupt

    opened = descriptors()
    stage = Stage(case, name)
    me = Actor(name, "v", stage.ledger.note)
    case.prepare(me)
    case.ready(stage)
    over = threading.Event()
    sleeps = type(case).asleep is not Case.asleep
    helper = Sleeper(_look_until, stage, over) if sleeps else None
    interrupted = False
    try:
        with Trace(k, hit, "interrupt") as me.trace:
            case.operate(me)
    except KeyboardInterrupt:
        interrupted = True
        if not exact(me.trace):
            stage.may_be_lost = case.in_a_call
    try:
        if interrupted:
            case.interrupted(stage)
        assert interrupted or swallowed or not exact(me.trace), "the interrupt got lost"
        gc.collect()  # what was not handed over is gone, also if it was in a cycle
        stage.finished = True
        case.go_on(me)
        over.set()
        if helper:
            helper.join()
        me.close()
        case.end(stage)
        me.trace = me.ring = None
        stage = helper = None
        gc.collect()
        left = {number: target for number, target in descriptors().items() if opened.get(number) != target}
        assert not left, f"descriptors are left open: {left}"
    finally:
        over.set()
    return not place


def exact(trace):
    """Did it come to the event, and where nothing may be lost?"""
    return EXACT and trace.handler_runs


def _look_until(stage, over):
    while not over.wait(0.001):
        stage.look(threading.main_thread().native_id)


# ---------------------------------------------------------------- all k, in two processes


def main(cases):
    """What a supervisor runs: a case, an event, a ring's name, the first k and the distance to the next.

    Tries one k after another until the operation ends before. Prints each as JSON, and how the last one failed.
    """
    name_of_case, event, name, first, every = sys.argv[1:]
    case = cases[name_of_case]
    die_with_parent()
    gc.freeze()
    os_backend.SLICE = None
    _competing.PATIENCE = 0  # it is spinning, and how often is a matter of time
    if event in ("stop", "interrupt"):
        _ring.MOURNING = 3600.0
    unraisable, swallowed = [], []

    def ignored(what):
        # From 3.14 on it is the message that names what is called.
        finalizer = hasattr(what.object, "gi_code") or "__del__" in f"{what.err_msg} {what.object!r}"
        kind = swallowed if what.exc_type is KeyboardInterrupt and finalizer else unraisable
        kind.append(f"{what.err_msg} {what.object!r}: {what.exc_value!r}")

    sys.unraisablehook = ignored
    victims = None

    def say(**what):
        print(json.dumps(what), flush=True)

    def hangs(*_):
        signal.alarm(0)
        raise AssertionError("the trial hangs")

    signal.signal(signal.SIGALRM, hangs)
    for k in itertools.chain([NEVER], itertools.count(int(first), int(every))):  # first a rehearsal: it fills caches
        say(k=k)
        place = []  # where it came to the event
        swallowed.clear()
        signal.alarm(int(DEADLINE))
        try:
            if event == "interrupt" or k == NEVER:
                over = interrupt(case, k, name, place, swallowed)
            else:
                victims = victims or Victims(case, event)
                over = kill_or_stop(case, victims, k, name, place, stop=event == "stop")
            assert not unraisable, unraisable
        except BaseException:
            say(failure=traceback.format_exc(), where=(place or ["after the operation"])[0])
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os_backend._path(name))
            break
        if over and k != NEVER:
            say(over=k)
            break
    signal.alarm(0)
    if victims:
        victims.close()


def sweep(children, case, event, every=1, first=1):
    """Let `event` come before every k-th bytecode, for k in first, first + every, ...; how many there are."""
    failures, reached = [], 0
    step = every * SUPERVISORS
    running = [_start(children, case, event, first + i * every, step) for i in range(SUPERVISORS)]
    while running:
        process = running.pop(0)
        k = over = 0
        failure = None
        for line in process.stdout:
            said = json.loads(line)
            k, over = said.get("k", k), said.get("over", over)
            failure = said if "failure" in said else failure
        errors = process.stderr.read()
        if not over:
            failure = failure or {"failure": f"the supervisor ended: {errors}", "where": "?"}
            failures.append(f"{event} in {case}, k={k}, {failure['where']}\n{failure['failure']}")
            if len(failures) < MOST_FAILURES and k != NEVER:
                running.append(_start(children, case, event, k + step, step))
        reached = max(reached, k)
    assert not failures, "\n\n".join([f"{len(failures)} failures", *failures])
    return reached


def _start(children, case, event, first, step):
    """A small process: it is forked from for each k."""
    name = f"test-{os.getpid()}-{case}-{first}"
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "from operations import CASES, main; main(CASES)"
    return children.python(code, case, event, name, first, step, options=["-S"], env=path)
