"""Processes of Windows' Python, run by Wine, that Linux kills: SIGKILL from outside, in whatever they are doing.

The tests on Windows itself end processes as Windows does. This needs both systems at once, so it runs on Linux, with
the environment variable SHMRING_WINPYTHON naming a launcher that is called like python, or with `winpython` on the
PATH. The launcher has to become the process that it starts, if that one's output goes to pipes: its pid is what is
killed.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import DEADLINE, ROOT, wait_until

if sys.platform != "linux":
    pytest.skip("Wine, and SIGKILL from outside of it", allow_module_level=True)

WINPYTHON = os.environ.get("SHMRING_WINPYTHON") or shutil.which("winpython")
if not WINPYTHON:
    what = "no Windows Python here: SHMRING_WINPYTHON does not name one, and there is no winpython on the PATH"
    pytest.skip(what, allow_module_level=True)

# What a process there runs: it does what it is told, line by line.
THERE = """if True:
    import json, sys, time
    sys.path.insert(0, "Z:" + sys.argv[1])
    from shmring import Ring, RingBusy, RingTimeout, _windows, unlink
    _windows.SLICE = None  # no wait ends of itself

    def say(*what):
        print(*what, flush=True)

    def soon(act):
        # Try for a second after somebody's end.
        late = time.perf_counter() + 1
        while True:
            is_late = time.perf_counter() > late
            try:
                return act()
            except RingBusy:
                if is_late:
                    raise

    def gone_soon(name):
        late = time.perf_counter() + 1
        while True:
            is_late = time.perf_counter() > late
            try:
                Ring.open(name).close()
            except FileNotFoundError:
                return True
            if is_late:
                return False

    def drain(ring):
        messages = []
        try:
            while True:
                messages += ring.read_many(timeout=0)
        except RingTimeout:
            return messages

    def payload(number, size=0):
        return b"%d " % number * max(1, size // len(b"%d " % number))

    def number(data):
        first = int(data.split()[0])
        assert data == payload(first, len(data)), data
        return first

    def write_for_ever(ring, size):
        i = 0
        while True:
            ring.write(payload(i, size))
            say(i)
            i += 1

    def read_for_ever(ring):
        while True:
            say(number(ring.read()))

    for line in sys.stdin:
        code, is_value = json.loads(line)
        try:
            if is_value:
                say("=", repr(eval(code)))
            else:
                exec(code)
        except Exception as error:
            say("!", type(error).__name__, error)
"""


class Raised(Exception):
    """What a process there got."""


class There:
    """A process of Windows' Python."""

    def __init__(self):
        # Without site, a start takes half of the time. Its output goes to one pipe: see above.
        self._process = subprocess.Popen(
            [WINPYTHON, "-S", "-c", THERE, str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def tell(self, code, is_value=False):
        """Have it do something, and do not wait for that."""
        self._process.stdin.write(json.dumps([code, is_value]) + "\n")
        self._process.stdin.flush()

    def hear(self):
        """The next line that it says."""
        line = self._process.stdout.readline().rstrip()
        assert line, "it ended"
        if line.startswith("!"):
            raise Raised(line[2:])
        return line

    def do(self, code):
        """Have it do something; its value, or Raised."""
        self.tell(code, is_value=True)
        line = self.hear()
        assert line.startswith("= "), line
        return ast.literal_eval(line[2:])

    def have(self, code):
        """Have it do something that has no value."""
        self.tell(code)
        assert self.do("None") is None

    def kill(self):
        """SIGKILL, and what it had said until then, as numbers."""
        assert b"python.exe" in Path(f"/proc/{self._process.pid}/cmdline").read_bytes(), "this is only the launcher"
        os.kill(self._process.pid, signal.SIGKILL)
        said = self._process.stdout.read().split("\n")
        assert self._process.wait(DEADLINE) == -signal.SIGKILL
        return [int(line) for line in said[:-1]]  # the last one has no end

    def end(self):
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


@pytest.fixture(scope="module", autouse=True)
def session():
    """Wine begins its session with the first process, which may take a while."""
    command = [WINPYTHON, "-c", "import shmring"]
    subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=5 * DEADLINE, check=True)


@pytest.fixture
def there(in_time):
    """Starts processes there."""
    started = []

    def start(code=""):
        started.append(There())
        started[-1].have(code or "pass")
        return started[-1]

    yield start
    for process in started:
        process.end()


def stream(process, call, lines):
    """Tell it to begin a call that says a number for each message, and hear so many; these."""
    process.tell(call)
    return [int(process.hear()) for _ in range(lines)]


def a_thousand_pass(writer, reader):
    writer.have("for i in range(1000): ring.write(payload(i))")
    assert reader.do("[number(data) for data in drain(ring)] == list(range(1000))")


def test_roles_are_free_within_a_second_and_what_was_acknowledged_is_there(there, name):
    """The survivor of two takes both roles, and finds what the other one had written."""
    survivor = there(f"ring = Ring.create({name!r}, 1 << 16, writers=1)")
    victim = there(f"ring = Ring.open({name!r})")
    victim.have("ring.write(b'one'); ring.write_many([b'two', b'three'])")
    assert victim.do("ring.read()") == b"one"
    for act in ("ring.try_write(b'no')", "ring.try_read()"):
        with pytest.raises(Raised, match="RingBusy"):
            survivor.do(act)
    victim.kill()
    assert survivor.do("soon(ring.try_read)") == b"two"
    assert survivor.do("soon(lambda: ring.try_write(b'four'))")
    assert survivor.do("drain(ring)") == [b"three", b"four"]
    a_thousand_pass(survivor, survivor)


@pytest.mark.parametrize("size", [0, 2000])
def test_a_writer_killed_in_a_stream_loses_nothing_it_had_acknowledged(size, there, name, seed):
    """Of what it was about to write, there is the next message or nothing. Its lane is the next one's."""
    dice = random.Random(seed)
    reader = there(f"ring = Ring.create({name!r}, 1 << 20, writers=1)")
    for _ in range(2):
        victim = there(f"ring = Ring.open({name!r})")
        acknowledged = stream(victim, f"write_for_ever(ring, {size})", dice.randrange(1, 300))
        acknowledged += victim.kill()
        got = reader.do("[number(data) for data in drain(ring)]")
        assert acknowledged == list(range(len(acknowledged)))
        assert got == list(range(len(got)))
        assert 0 <= len(got) - len(acknowledged) <= 1
    a_thousand_pass(there(f"ring = Ring.open({name!r})"), reader)


def test_a_reader_killed_in_a_stream_takes_no_more_with_it_than_the_message_on_its_way(there, name, seed):
    """The next one reads on after it."""
    dice = random.Random(seed)
    writer = there(f"ring = Ring.create({name!r}, 1 << 16, writers=1)")
    writer.have("ring.write_many(map(payload, range(2000)))")
    got, lost = [], 0
    for _ in range(2):
        victim = there(f"ring = Ring.open({name!r})")
        got += stream(victim, "read_for_ever(ring)", dice.randrange(1, 300))
        got += victim.kill()
        lost += 1
    got += there(f"ring = Ring.open({name!r})").do("[number(data) for data in drain(ring)]")
    assert got == sorted(set(got))
    assert 2000 - lost <= len(got) <= 2000
    assert set(got) <= set(range(2000))


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_who_is_killed_in_its_sleep_leaves_its_role_to_one_that_sleeps_and_is_woken(role, there, name):
    """The one that was killed is announced as asleep for ever; that does not keep the next one awake."""
    survivor = there(f"ring = Ring.create({name!r}, 4096, writers=1, spin=0)")

    def sleeper(parks):
        process = there(f"ring = Ring.open({name!r}, spin=0)")
        if role == "writer" and not parks:
            process.have("ring.write(bytes(4000))")
        process.tell("len(ring.read())" if role == "reader" else "ring.write(bytes(4000))", is_value=True)
        stats = f"ring.stats().{role}s_parked and ring.stats().{role}_parks > {parks}"
        wait_until(lambda: survivor.do(stats), f"that the {role} sleeps")
        return process

    sleeper(0).kill()
    successor = sleeper(survivor.do(f"ring.stats().{role}_parks"))
    survivor.have("ring.write(bytes(5))" if role == "reader" else "ring.read()")
    assert successor.hear() == ("= 5" if role == "reader" else "= None")
    assert survivor.do(f"ring.stats().{role}s_parked") == 0


def test_who_is_killed_with_the_lock_of_a_name_blocks_nobody(there, name):
    """Whoever waits for it gets it at once, as abandoned; and so does who comes later."""
    survivor = there("made = []")
    lock = f"_windows._create_mutex(None, False, _windows._prefix() + 'lock-{name}')"
    for victim in [there(f"lock = {lock}") for _ in range(2)]:
        assert victim.do("_windows._wait(lock, _windows.INFINITE) == _windows.WAIT_OBJECT_0")
        survivor.have("_windows.LOCK_SECONDS = 0.1")
        with pytest.raises(Raised, match="RingBusy"):
            survivor.do(f"Ring.create({name!r})")
        survivor.have("_windows.LOCK_SECONDS = 1000.0")
        survivor.tell(f"with Ring.create({name!r}): say('it has it')")
        victim.kill()
        assert survivor.hear() == "it has it"


def test_a_ring_is_gone_when_all_who_had_it_are_killed(there, name):
    """With everything that is in it; the name is free."""
    owners = [there(f"ring = Ring.create({name!r}, 8192)")]
    owners += [there(f"ring = Ring.open({name!r}); ring.write(b'for nobody')") for _ in range(2)]
    stranger = there()
    assert stranger.do(f"Ring.open({name!r}).stats().messages_in") == 2
    for owner in owners:
        assert stranger.do(f"Ring.open({name!r}).capacity") == 8192
        owner.kill()
    assert stranger.do(f"gone_soon({name!r})")
    assert stranger.do(f"Ring.create({name!r}, 4096).stats().messages_in") == 0
