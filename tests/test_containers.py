"""Processes of two containers at one ring: own PID and mount namespaces, and /dev/shm in common.

Each is process 1 of its namespace, so that nothing that goes by pids could tell them apart. Skipped, and
visibly so, where namespaces are not allowed.
"""

from __future__ import annotations

import select
import shutil
import subprocess

import pytest
from conftest import DEADLINE, namespaces, segments, wait_until
from test_processes import opens

from shmring import Ring, RingBusy, RingTimeout

REMOTE = """
import os, sys
from shmring import *
from shmring import _backend
_backend.os_backend.SLICE = None
for line in sys.stdin:
    try:
        answer = eval(line)
    except Exception as error:
        answer = type(error)
    print(repr(answer), flush=True)
"""


class Container:
    """A Python that is process 1 of its PID namespace and does what it is told."""

    def __init__(self, children, prefix):
        self.process = children.python(REMOTE, prefix=prefix)
        assert self.ask("os.getpid()") == "1"

    def tell(self, expression):
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self):
        assert select.select([self.process.stdout], [], [], DEADLINE)[0], f"no answer in {DEADLINE} s"
        return self.process.stdout.readline().strip()

    def ask(self, expression):
        self.tell(expression)
        return self.answer()

    def kill(self):
        """SIGKILL for process 1: unshare, which is killed, passes it on, and dies after it or at once."""
        self.process.kill()
        self.process.wait(DEADLINE)
        assert self.process.stdout.read() == "", "its output ends with it"


FLAGS = ["--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]


def with_user_namespaces():
    """The command that makes a container with user namespaces too, even for root."""
    command = ["unshare", "--user", "--map-root-user", *FLAGS]
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    probe = subprocess.run([*command, "true"], capture_output=True, text=True, timeout=DEADLINE)
    if probe.returncode:
        pytest.skip(f"no user namespaces here: {probe.stderr.strip()}")
    return command


@pytest.fixture(params=["", "with user namespaces"])
def containers(request, children):
    prefix = with_user_namespaces() if request.param else namespaces(*FLAGS)
    return [Container(children, prefix) for _ in range(2)]


def test_processes_of_two_containers_talk_sleep_and_wake_each_other(name, containers):
    reader, writer = containers
    for kind in ("pid", "mnt"):
        assert reader.ask(f"os.readlink('/proc/self/ns/{kind}')") != writer.ask(f"os.readlink('/proc/self/ns/{kind}')")
    assert "Ring" in reader.ask(f"globals().update(ring=Ring.create({name!r}, 4096, writers=1, spin=0)) or ring")
    assert "Ring" in writer.ask(f"globals().update(ring=Ring.open({name!r}, spin=0)) or ring")
    with Ring.open(name) as ring:
        for turn in range(20):
            reader.tell("ring.read()")
            wait_until(lambda: ring.stats().readers_parked, "the reader's sleep")
            assert writer.ask(f"ring.write(b'{turn}')") == "None"
            assert reader.answer() == repr(b"%d" % turn)
        for _ in range(10):
            writer.tell("[ring.write(bytes(1000)) for _ in range(8)]")
            wait_until(lambda: ring.stats().writers_parked, "the writer's sleep")
            assert reader.ask("sum(len(ring.read()) for _ in range(8))") == "8000"
            assert writer.answer() == repr([None] * 8)
        assert reader.ask("ring.close()") == writer.ask("ring.close()") == "None"


def test_claims_are_exclusive_across_containers_and_end_with_them(name, containers):
    reader, writer = containers
    with Ring.create(name, 4096, writers=1) as ring:
        for container in containers:
            assert "Ring" in container.ask(f"globals().update(ring=Ring.open({name!r})) or ring")
        assert writer.ask("ring.write(b'1')") == "None"
        assert "RingBusy" in reader.ask("ring.write(b'2')")
        assert reader.ask("ring.try_read()") == repr(b"1")
        assert "RingBusy" in writer.ask("ring.try_read()")
        for take in (lambda: ring.try_write(b"3"), ring.try_read):
            with pytest.raises(RingBusy):
                take()
        assert (ring.stats().lanes_in_use, ring.stats().readers) == (1, 1)
        assert writer.ask("ring.write(b'2')") == "None"
        writer.kill()
        wait_until(lambda: ring.stats().lanes_in_use == 0, "the death of the writer")
        ring.write(b"3")
        assert reader.ask("ring.read()") == repr(b"2")
        reader.kill()
        wait_until(lambda: ring.stats().readers == 0, "the death of the reader")
        assert ring.read() == b"3"


def test_a_container_that_is_killed_in_its_sleep_leaves_the_ring_to_the_other(name, containers):
    first, second = containers
    with Ring.create(name, 4096, writers=1, spin=0) as ring:
        for container in containers:
            assert "Ring" in container.ask(f"globals().update(ring=Ring.open({name!r}, spin=0)) or ring")
        first.tell("ring.read()")
        wait_until(lambda: ring.stats().readers_parked)
        first.kill()
        wait_until(lambda: ring.stats().readers == 0, "the death of the reader")
        second.tell("ring.read()")
        wait_until(lambda: ring.stats().readers == 1 and ring.stats().readers_parked)
        ring.write(b"for the second")
        assert second.answer() == repr(b"for the second")
        assert second.ask("ring.close()") == "None"


def test_everybody_in_all_containers_gone_the_ring_is_gone(name, containers):
    first, second = containers
    assert "Ring" in first.ask(f"globals().update(ring=Ring.create({name!r})) or ring")
    assert "Ring" in second.ask(f"globals().update(ring=Ring.open({name!r})) or ring")
    first.kill()
    assert second.ask("ring.write(b'1'), ring.read()") == repr((None, b"1"))
    assert opens(name)
    second.kill()
    wait_until(lambda: not opens(name), "the end of the ring")
    Ring.create(name).close()
    assert f"shmring.{name}" not in segments()


def test_one_container_creates_what_the_other_opens_and_the_last_close_of_any_removes_the_name(name, containers):
    first, second = containers
    second.tell(f"globals().update(ring=Ring.open({name!r}, timeout=None)) or ring")
    assert "Ring" in first.ask(f"globals().update(ring=Ring.create({name!r}, 4096, mode=0o666)) or ring")
    assert "Ring" in second.answer()
    assert "FileExistsError" in second.ask(f"Ring.create({name!r})")
    for closing, staying in ((first, second), (second, first)):
        assert closing.ask("ring.write(b'left'), ring.close()") == repr((None, None))
        assert opens(name) and f"shmring.{name}" in segments()
        assert "FileExistsError" in closing.ask(f"Ring.create({name!r})")
        assert staying.ask("ring.read(timeout=0)") == repr(b"left")
        assert "Ring" in closing.ask(f"globals().update(ring=Ring.open({name!r})) or ring")
        assert staying.ask("ring.close()") == "None"
        assert "Ring" in staying.ask(f"globals().update(ring=Ring.open({name!r})) or ring")
    assert first.ask("ring.close()") == second.ask("ring.close()") == "None"
    assert not opens(name) and f"shmring.{name}" not in segments()
    assert "FileNotFoundError" in second.ask(f"Ring.open({name!r})")


def test_a_forked_child_of_a_containers_process_1_dies_with_it_and_leaves_its_roles(name, containers):
    first, second = containers
    with Ring.create(name, 4096, writers=2) as ring:
        assert "Ring" in first.ask(f"globals().update(ring=Ring.open({name!r})) or ring.write(b'1')  or ring")
        child = "ring.write(b'2') or ring.try_read() and __import__('signal').pause()"
        first.tell(f"[os.fork() or ({child})]")
        wait_until(lambda: ring.stats().lanes_in_use == 2 and ring.stats().readers == 1, "the child's roles")
        assert "RingBusy" in second.ask(f"globals().update(ring=Ring.open({name!r})) or ring.write(b'')")
        first.process.kill()
        wait_until(lambda: (ring.stats().lanes_in_use, ring.stats().readers) == (0, 0), "the death of both")
        assert second.ask("ring.write(b'3')") == "None"
        assert b"3" in ring.read_many()
        assert second.ask("ring.close()") == "None"


def test_readers_of_two_containers_compete_and_one_is_killed_in_its_sleep_or_in_its_turn(name, containers):
    """Both are process 1: it is no number of theirs by which the turn is had, or is free."""
    first, second = containers
    with Ring.create(name, 4096, writers=1, readers="compete", max_readers=2, spin=0) as ring:
        for container in containers:
            assert "Ring" in container.ask(f"globals().update(ring=Ring.open({name!r}, spin=0)) or ring")
            assert container.ask("ring.join()") == "None"
        for turn in range(20):
            ring.write(b"%d" % turn)
            assert containers[turn % 2].ask("ring.read()") == repr(b"%d" % turn)
        for container in containers:
            container.tell("ring.read()")
        wait_until(lambda: ring.stats().readers_parked == 2, "the sleep of both")
        first.kill()
        wait_until(lambda: ring.stats().readers == 1, "the death of the first")
        ring.write(b"for the second")
        assert second.answer() == repr(b"for the second")
        ring.write(b"again")
        assert second.ask("ring._reader._take()") == "True"
        with pytest.raises(RingTimeout):
            ring.read(timeout=0)
        second.kill()
        wait_until(lambda: ring.stats().readers == 1, "the death of the second")
        assert ring.read(timeout=DEADLINE) == b"again"
