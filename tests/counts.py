"""What this process has of everything that can leak. Without pytest, for scripts in interpreters of their own too."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

from shmring import _linux, _ring

MEMORY = 4 << 20  # bytes that the process may grow for other reasons


def mappings():
    """How many mappings of rings this process has."""
    return Path("/proc/self/maps").read_text().count(" /dev/shm/")


def counts():
    """How much there is of everything, by name, after a garbage collection."""
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": mappings(),
        "threads": len(os.listdir("/proc/self/task")),
        "thread objects": threading.active_count(),
        "segments": len(_linux._segments),
        "owners": len(_linux._owners),
        "forking": len(_linux._forking),
        "open rings": len(_ring._open_rings),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
    }


def grown(work, times, warm_up=30):
    """What there is more of each time `work()` was done so many times, after a warm-up; {} is as it should be."""
    for _ in range(warm_up):
        work()
    for _ in range(3):  # what leaks does so each time, what only settles does not
        before = counts()
        for _ in range(times):
            work()
        found = leaked(before, times)
        if not found:
            break
    return found


def leaked(before, times):
    """What there is more of now than `before`, if it is as much as something that was done so many times leaves."""
    after = counts()
    slack = {"objects": times // 4, "blocks": times * 9 // 10, "memory": MEMORY}
    return {
        what: f"{before[what]:,} to {after[what]:,} after {times:,} times"
        for what in after
        if after[what] - before[what] > slack.get(what, 0)
    }
