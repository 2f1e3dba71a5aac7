"""Whoever is killed, stopped or interrupted, wherever: nothing is lost, nobody hangs, every role is free again.

First before every bytecode of every operation (`harness.py` says how), then at random moments from outside.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

if not hasattr(os, "fork"):
    pytest.skip("the processes are forked here, from ones that have come to the operation", allow_module_level=True)

from harness import NEVER, WITHIN, Actor, Stage, Trace, sweep
from operations import CASES
from support import DEADLINE, ROOT

from shmring import _layout, _linux

# Before every 12th bytecode that counts (see `Trace`), from a random one on; SHMRING_EVERY=1 is before each. With
# SHMRING_ALL_PLACES=1 all bytecodes count. Every second operation, others each day; SHMRING_CASES=1 is each.
EVERY = int(os.environ.get("SHMRING_EVERY") or 12)
CASES_EVERY = int(os.environ.get("SHMRING_CASES") or 2)
TODAYS = list(CASES)[int(time.time()) // 86400 % CASES_EVERY :: CASES_EVERY]
once = pytest.mark.once


@pytest.mark.parametrize("event", [*(pytest.param(event, marks=once) for event in ("kill", "stop")), "interrupt"])
@pytest.mark.parametrize("case", TODAYS)
def test_at_every_bytecode(case, event, children, seed):
    """See the case's docstring in `operations.py`."""
    first = random.Random(seed).randrange(EVERY) + 1
    reached = sweep(children, case, event, EVERY, first)
    print(f"{event} in {case}: every {EVERY} of {reached} from {first} on")


ROLES = [_layout.PRESENCE, _layout.NAME, _layout.READER, *range(_layout.LANE, _layout.LANE + 3)]


class Watch(Trace):
    """Looks at everything outside of this process that is the ring's, before each bytecode."""

    def __init__(self, name):
        super().__init__(NEVER, None, "kill", all_places=True)
        self.path = _linux._path(name)
        self.places, self.changes, self.wrong = 0, 0, []
        self._seen = None

    def _count(self, frame):
        before = self._before
        super()._count(frame)
        try:
            with open(self.path, "r+b") as file:
                seen = file.read(), [_linux._holder(file.fileno(), byte) for byte in ROLES]
        except FileNotFoundError:
            seen = ()
        self.places += 1
        if self._seen not in (None, seen):
            self.changes += 1
            if before[1] in WITHIN:
                self.wrong.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        self._seen = seen


QUIET = ["Write", "WriteManyPads", "Read", "ReadMany", "Create", "Close", "CloseLast", "Unlink"]  # nobody else acts


@pytest.mark.parametrize("case", QUIET)
def test_where_a_bytecode_does_not_count_the_world_is_as_before(case, name):
    """The ring's bytes, its name and its locks, which is all that a kill leaves to others."""
    case = CASES[case]
    stage = Stage(case, name)
    me = Actor(name, "v", stage.ledger.note)
    case.prepare(me)
    case.ready(stage)
    with Watch(name) as me.trace:
        case.operate(me)
    stage.finished = True
    me.close()
    case.end(stage)
    assert not me.trace.wrong
    assert me.trace.places > 100 and me.trace.changes


@once
@pytest.mark.parametrize("case", TODAYS)
def test_within_bytecodes(case, children, seed):
    """Killed at some instruction of the processor within one that acts; a sample, because stepping there takes long."""
    every = 40 * EVERY
    first = random.Random(seed).randrange(every) + 1
    reached = sweep(children, case, "instruction", every, first)
    print(f"within bytecodes of {case}: every {every} of {reached} from {first} on")


@pytest.mark.parametrize("minutes", [0.05, pytest.param(10, marks=pytest.mark.stress)])
def test_at_random_moments(minutes, seed):
    """Four writers and two readers in turn, killed, stopped and succeeded: some 200 kills a minute."""
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--minutes", str(minutes), "--seed", str(seed)]
    end = minutes * 60 + DEADLINE
    soak = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=end)
    print(soak.stdout)
    assert soak.returncode == 0
