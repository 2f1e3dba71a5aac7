"""What tests need that must not import pytest: `harness.py` forks thousands of processes, which have to be small."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout itself is what is tested, installed or not

DEADLINE = 30.0  # seconds that anything a test waits for may take


def wait_until(condition, what="the condition"):
    """Wait until `condition()` is true and return what it returned; fail after DEADLINE."""
    end = time.monotonic() + DEADLINE
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, f"{what} did not come true in {DEADLINE} s"
        time.sleep(0.001)


def descriptors():
    """The descriptors open in this process, with what they lead to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return {number: target for number, target in found.items() if not target.startswith("/proc/")}
