"""One process goes through one operation and ends before the k-th bytecode, where no process can be forked.

The operations and their scenes are those of `operations.py`, and `harness.py` says what a trial is; "kill" is
the only event here. In the place of forks:

    pytest - supervisor, one for all the operations           has all handles but the victim's, its
              |                                                threads are those who sleep
              victims: interpreters that were started ahead, each for one trial: they have imported
              everything, and wait to be told which operation and which k

A victim ends by TerminateProcess or by os._exit, in turn. A start is most of the time of a trial, so only such ks
are tried before which the world outside of the victim has changed (`Watch`), and of these a sample. No wait has a
time-out of its own or is sliced, as there; a trial that hangs ends its processes, after they have said on stderr
where.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import mmap
import os
import queue
import random
import subprocess
import sys
import threading
import time
import traceback
import types
import weakref
import zlib

from harness import NEVER, Actor, Trace, kill_or_stop, message
from operations import CASES as ALL
from operations import Create
from support import DEADLINE, ROOT, SIGKILL, kill_yourself, popen

from shmring import Ring, RingBusy, _layout
from shmring._backend import os_backend

HARMLESS = {"_open_mutex", "_get_token_information", "_get_kernel_object_security"}  # of the calls into the system
AHEAD = 2  # victims that are being started while another one is at work
SOON = 1.0  # seconds after a process's end within which its roles are free


def name_page(name):
    """The page that says which ring has this name; not by the code that is tested."""
    return mmap.mmap(-1, _layout.PAGE, tagname=f"{os_backend._prefix()}name-{name}")


def name_lock(name):
    """A handle of the mutex that whoever changes that has to have."""
    return os_backend._create_mutex(None, False, f"{os_backend._prefix()}lock-{name}")


class CreateOverAbandoned(Create):
    """In the place of a ring of which only the name is left: somebody who is still there has the name's page open."""

    def scene(self, stage):
        stage.former = Ring.create(stage.name, 4096)
        stage.former.unlink()

    def prepare(self, me):
        code = """if True:
            import os, sys
            from shmring import Ring
            ring = Ring.create(sys.argv[1], 8192)
            ring.write(b"nobody can want this")
            os._exit(0)
        """
        subprocess.run([sys.executable, "-S", "-c", code, me.name], stdin=subprocess.DEVNULL, check=True)
        with name_page(me.name) as page:
            assert any(page[:16]), "not even the name is left"

    def end(self, stage):
        super().end(stage)
        stage.former.close()


CASES = {
    name: case for name, case in ALL.items()
    if not getattr(case, "keep", False)  # Windows has no such thing
} | {"CreateOverAbandoned": CreateOverAbandoned()}  # fmt: skip


# ---------------------------------------------------------------- a victim


class Watch(Trace):
    """Notes before which bytecodes the world outside of this process is another one than before the last.

    All the others are as good as one of these: what a kill leaves to others is the same. The world is what is in
    the shared memory, and what kernel objects are there and set; for these the calls are counted that may change them.
    """

    def __init__(self):
        super().__init__(NEVER, None, "kill")
        self.places = []
        self._calls = 0
        self._segments = []
        self._seen = self._world()
        for name, function in vars(os_backend).copy().items():
            if isinstance(function, ctypes._CFuncPtr) and name not in HARMLESS:
                setattr(os_backend, name, self._counting(function))
        os_backend.mmap = types.SimpleNamespace(mmap=self._counting(os_backend.mmap.mmap))
        begin = os_backend.Segment.__init__

        def noted(segment, *args):
            self._segments.append(weakref.ref(segment))
            begin(segment, *args)

        os_backend.Segment.__init__ = noted

    def know(self, ring):
        """Have a look also at a ring that was there before."""
        if ring is not None:
            self._segments.append(weakref.ref(ring._segment))
            self._seen = self._world()

    def _counting(self, function):
        def counted(*args, **kwargs):
            self._calls += 1
            return function(*args, **kwargs)

        return counted

    def _world(self):
        world = [self._calls]
        for segment in [reference() for reference in self._segments]:
            page = getattr(segment, "_name_page", None)
            world.append((segment is None, page and page[:]))
            if hasattr(segment, "words"):
                layout = segment.layout
                world.append(segment.map[: layout.lanes_offset])
                for lane in range(layout.writers):
                    if segment.words[(layout.lane_block(lane) + _layout.WRITE_POS) >> 3]:  # else it may have no memory
                        first = layout.lane_bytes(lane)
                        world.append(zlib.crc32(segment.map[first : first + layout.capacity]))
        return world

    def _count(self, frame):
        left = self.left
        super()._count(frame)
        if self.left != left:
            world = self._world()
            if world != self._seen:
                self._seen = world
                self.places.append(NEVER - self.left)


def start(function):
    """An interpreter that runs a function of this module; its standard input and output are pipes."""
    return popen(
        [sys.executable, "-S", "-c", f"import windows_harness; windows_harness.{function}()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )  # fmt: skip


def watch():
    """From now on the process ends if this is not called again in time."""
    faulthandler.dump_traceback_later(DEADLINE, exit=True)


def be_victim():
    """What a victim runs: one operation, up to its k-th bytecode that counts."""
    os_backend.SLICE = None

    def say(line):
        os.write(1, line.encode() + b"\n")

    order = os.read(0, 999).decode().split()
    if not order:
        os._exit(0)  # not needed any more
    watch()
    gc.freeze()
    gc.disable()  # each victim runs the same bytecodes
    case, k, name, means = order
    case, me = CASES[case], Actor(name, "v", say)

    def hit(where):
        say(f"at {where}")
        if means == "os._exit":
            os._exit(SIGKILL)
        kill_yourself()

    try:
        case.prepare(me)
        say("ready")
        os.read(0, 999)
        if int(k) == NEVER:
            me.trace = Watch()
            me.trace.know(me.ring)
        else:
            me.trace = Trace(int(k), hit, "kill")
        with me.trace:
            case.operate(me)
        say("finished")
        if int(k) == NEVER:
            say(f"places {json.dumps([NEVER - me.trace.left, me.trace.places])}")
        os._exit(0)
    except BaseException:
        say("failed " + json.dumps(traceback.format_exc()))
    finally:
        os._exit(1)


# ---------------------------------------------------------------- the supervisor


class Victim:
    """A victim, seen from the supervisor. It says lines; the last one is "ended", with its exit code."""

    def __init__(self):
        self.lines = queue.Queue()
        self._process = start("be_victim")
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self._process.stdout:
            self.lines.put(line.rstrip())
        self.lines.put(f"ended {self._process.wait()}")
        self._process.stdout.close()

    def tell(self, line):
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def end(self):
        self._process.stdin.close()
        self._process.wait()


class Victims:
    """Gives each trial one of the victims that were started ahead. For `kill_or_stop`: see there."""

    def __init__(self):
        self.case, self.means = "", ""
        self.found = 0, []  # bytecodes in all, and before which of them the world has changed
        self.place = []
        self._victim = None
        self._idle = [Victim() for _ in range(AHEAD)]

    @property
    def pid(self):
        return self._victim._process.pid

    def start(self, k, name, place):
        self.place = place
        self._victim = self._idle.pop(0)
        self._victim.tell(f"{self.case} {k} {name} {self.means}\n")
        self._idle.append(Victim())

    def go(self):
        self._victim.tell("go\n")

    def hear(self, stage, *awaited):
        """Wait until the victim says one of these; note everything it says before. The line."""
        while True:
            try:
                line = self._victim.lines.get(timeout=0.001)
            except queue.Empty:
                stage.look(self.pid)
                continue
            what, _, rest = line.partition(" ")
            if what == "at":
                self.place.append(rest)
            elif what == "failed":
                raise AssertionError(f"the victim failed:\n{json.loads(rest)}")
            elif what == "finished":
                stage.finished = True
            elif what == "places":
                self.found = json.loads(rest)
            elif what == "ended":
                self._victim.end()
                free_soon(stage)
            elif what != "ready":
                stage.ledger.note(line)
            if what in awaited:
                return line

    def close(self):
        for victim in self._idle:
            victim.end()


def free_soon(stage):
    """A process has just ended. Wait until nobody has a role, by the kernel's word, but who lives and took one."""
    late = time.monotonic() + SOON
    while stage.holder is not None:
        is_late = time.monotonic() > late
        living = [actor.ring for actor in stage._actors]
        lanes, readers = sum(ring._writer.lane >= 0 for ring in living), sum(ring._reader.claimed for ring in living)
        stats = stage.holder.stats()
        if (stats.lanes_in_use, stats.readers) == (lanes, readers):
            break
        assert not is_late, f"a dead process still has a role after {SOON} s: {stats}"


def supervise():
    """What the supervisor runs: an order is a case, a ring's name, a seed, and how many trials or how dense.

    Prints one JSON line for each order. After a failure it ends: who knows what is left.
    """
    os_backend.SLICE = None
    gc.freeze()
    victims = Victims()
    for line in sys.stdin:
        order = json.loads(line)
        trial = {}
        try:
            said = sweep(victims, trial=trial, **order)
        except BaseException:
            where = (victims.place or ["after the operation"])[0]
            said = {"failure": f"{trial}, {where}\n{traceback.format_exc()}"}
        print(json.dumps(said), flush=True)
        if "failure" in said:
            break
    victims.close()
    os._exit(0)  # threads of a failed trial may still sleep


def sweep(victims, case, name, seed, trials, every, trial):
    """Run an operation to its end, and then end it at some of its places: each `every`-th, or so many."""
    dice = random.Random(f"{case} {seed}")  # not the same places in each case

    def attempt(k, means):
        watch()
        trial.update(k=k, means=means)
        victims.case, victims.means = case, means
        return kill_or_stop(CASES[case], victims, k, name, [], stop=False)

    assert attempt(NEVER, "none"), "it came to an end that cannot be"
    bytecodes, places = victims.found
    ks = places[dice.randrange(every) :: every] if every else dice.sample(places, len(places))
    tried = []
    for k in ks:
        if every or len(tried) < trials:
            over = attempt(k, ("TerminateProcess", "os._exit")[(len(tried) + seed) % 2])
            tried += [] if over else [k]  # it may have slept once less than the first time
    faulthandler.cancel_dump_traceback_later()
    return {"bytecodes": bytecodes, "places": len(places), "tried": tried}


# ---------------------------------------------------------------- killed from outside, at random moments


CALL = 10  # messages that one call writes or reads at most


class Account:
    """What was sent and received, in words (`support.Words`) that outlive whoever writes them; each has one writer.

    What a killed reader had taken and not yet noted is what shmring does not promise: no more than its last
    call asked for, `calling`. Of a writer the last number received and how many were skipped are one word, so that a
    reader that is killed has noted both or nothing.
    """

    TORN, DOUBLED, FIRST = range(3)

    def __init__(self, words, readers):
        self._words, self._readers = words, readers

    def calling(self, reader):
        return self.FIRST + reader

    def acknowledged(self, writer):
        return self.FIRST + self._readers + 2 * writer

    def seen(self, writer):
        """The last one received, and how many were skipped before it."""
        word = self[self.acknowledged(writer) + 1]
        return word & 0xFFFFFFFF, word >> 32

    def note(self, data):
        writer, number, size, *_ = data.split(b" ", 3)
        writer, number = int(writer), int(number)
        if data != payload(writer, number, int(size)):
            self[self.TORN] += 1
            return
        last, skipped = self.seen(writer)
        if number <= last:
            self[self.DOUBLED] += 1
            return
        self[self.acknowledged(writer) + 1] = number | skipped + number - last - 1 << 32

    def __getitem__(self, index):
        return self._words[index]

    def __setitem__(self, index, value):
        self._words[index] = value


def payload(writer, number, size):
    return message.__wrapped__(str(writer), number, size)  # there are too many to be kept


def write_for_ever(ring, account, writer, seed):
    dice, number = random.Random(seed), 0
    while True:
        size = dice.choice((16, 64, 64, dice.randrange(40, 2000)))
        if dice.random() < 0.3:
            many = dice.randrange(1, CALL + 1)
            ring.write_many([payload(writer, number + 1 + i, size + 20) for i in range(many)])
            number += many
        else:
            ring.write(payload(writer, number + 1, size + 20))
            number += 1
        account[account.acknowledged(writer)] = number


def read_for_ever(ring, account, reader, seed):
    dice = random.Random(seed)
    while True:
        many = dice.random() < 0.5
        account[account.calling(reader)] = CALL if many else 1
        try:
            messages = ring.read_many(CALL) if many else [ring.read()]
        except RingBusy:
            account[account.calling(reader)] = 0  # it waits for the role
            time.sleep(0.01)
            continue
        for data in messages:
            account.note(data)
        account[account.calling(reader)] = 0


# ---------------------------------------------------------------- killed at the moments that matter most


def end_by(means):
    if means == "os._exit":
        os._exit(SIGKILL)
    elif means == "TerminateProcess":
        kill_yourself()
    else:
        time.sleep(DEADLINE)  # from outside


def take_both_roles(ring, told, means):
    ring.write(b"one")
    assert ring.read() == b"one"
    ring.write_many([b"two", b"three"])
    told.say()
    end_by(means)


def hold_the_lock(name, told, ask, means, half_done):
    """Be about to change the ring's name, and get no further."""
    mutex = name_lock(name)
    assert os_backend._wait(mutex, os_backend.INFINITE) == os_backend.WAIT_OBJECT_0
    if half_done:
        with name_page(name) as page:
            page[:8] = b"\xaa" * 8
    told.say()
    ask.hear()
    if means:
        end_by(means)
    os_backend._release_mutex(mutex)


def read_messages(ring, told, number):
    for _ in range(number):
        ring.read()
        told.say()


def write_messages(ring, told, number, size):
    for _ in range(number):
        ring.write(bytes(size))
        told.say()


def write_and_die_before_the_bell(ring, told, ask):
    ring.write(b"one")
    told.say()
    ask.hear()
    ring._segment.ring = lambda bell: kill_yourself()
    ring.write(b"two")


def read_and_die_before_the_bell(ring, told, ask):
    assert ring.try_read() is None
    told.say()
    ask.hear()
    ring._segment.ring = lambda bell: kill_yourself()
    ring.read()
