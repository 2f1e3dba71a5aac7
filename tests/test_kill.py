"""Whoever is killed, stopped or interrupted, wherever: nothing is lost, nobody hangs, every role is free again.

First before every bytecode of every operation (`harness.py` says how), then at random moments from outside.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("SIGKILL, SIGSTOP and open-file-description locks", allow_module_level=True)

from harness import sweep
from operations import CASES
from support import DEADLINE, ROOT

# Before every 7th bytecode, from a random one on; SHMRING_EVERY=1 is before each.
EVERY = int(os.environ.get("SHMRING_EVERY") or 7)


@pytest.mark.parametrize("event", ["kill", "stop", "interrupt"])
@pytest.mark.parametrize("case", CASES)
def test_at_every_bytecode(case, event, children, seed):
    """See the case's docstring in `operations.py`."""
    first = random.Random(seed).randrange(EVERY) + 1
    reached = sweep(children, case, event, EVERY, first)
    print(f"{event} in {case}: every {EVERY} of {reached} from {first} on")


@pytest.mark.parametrize("minutes", [0.1, pytest.param(10, marks=pytest.mark.stress)])
def test_at_random_moments(minutes, seed):
    """Four writers and two readers in turn, killed, stopped and succeeded: some 200 kills a minute."""
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--minutes", str(minutes), "--seed", str(seed)]
    end = minutes * 60 + DEADLINE
    soak = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=end)
    print(soak.stdout)
    assert soak.returncode == 0
