"""Shows on this machine that a ring works here: ``python -m shmring.selftest``.

It takes some seconds, needs nothing but this package, and prints one paragraph for a report. The exit code
is 0 if all of it held. For who has a machine of a kind that the package's own tests have not run on.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import platform
import select
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from . import __version__
from ._backend import os_backend
from ._ring import Ring
from .bench import system

fcntl: Any = None
if sys.platform != "win32":
    import fcntl

ROUNDS = 2000  # round trips between two processes
KILLS = 5
SECONDS = 2.0  # for the litmus of the fence
PATIENCE = 60.0  # seconds that anything here may take


def check_constants() -> str:
    """The numbers that the backend has of its own are those of this system's own modules, as far as they know them."""
    wrong, right = [], 0
    for name, ours in vars(os_backend).items():
        if not isinstance(ours, int) or not name.strip("_").isupper():
            continue
        known = {"KQ_" + name.replace("EVFILT_", "FILTER_"), name} if "_" in name.strip("_") else {name}
        for module in (select, os, errno, fcntl):
            for value in [vars(module)[each] for each in known if module is not None and each in vars(module)]:
                right += ours == value
                if ours != value:
                    wrong.append(f"{name} is {value} here, not {ours}")
    if wrong:
        raise AssertionError("; ".join(wrong))
    return f"{right} constants as in select, os, errno and fcntl"


@contextlib.contextmanager
def _started(function: Callable[..., object], *args: object) -> Iterator[multiprocessing.process.BaseProcess]:
    """Another process, in an interpreter of its own; it is gone afterwards."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(PATIENCE)


def _echo(there: Ring, back: Ring) -> None:
    with there, back:
        for message in there.messages(timeout=PATIENCE):
            if not message:
                return
            back.write(message)


def _stream(ring: Ring) -> None:
    number = 0
    while True:
        ring.write(b"%d" % number)
        number += 1


def check_round_trips() -> str:
    """Two processes, of which the second is started anew, answer each other; first asleep, then spinning."""
    medians = []
    for spin in (0.0, None):
        name = f"selftest-{uuid.uuid4().hex[:12]}"
        to, fro = f"{name}-to", f"{name}-fro"
        with Ring.create(to, 4096, spin=spin) as there, Ring.create(fro, 4096, spin=spin) as back:
            taken = []
            with _started(_echo, there, back) as process:
                for number in range(ROUNDS):
                    message = b"%d" % number * (1 + number % 50)
                    begin = time.perf_counter()
                    there.write(message, timeout=PATIENCE)
                    if back.read(timeout=PATIENCE) != message:
                        raise AssertionError(f"round trip {number} came back with another message")
                    taken.append(time.perf_counter() - begin)
                there.write(b"")
                process.join(PATIENCE)
                if process.exitcode != 0:
                    raise AssertionError(f"the other process ended with {process.exitcode}")
        medians.append(sorted(taken)[len(taken) // 2] / 2 * 1e6)
    return f"{2 * ROUNDS:,} round trips, one way {medians[0]:.1f} us asleep and {medians[1]:.1f} us spinning (medians)"


def check_kills() -> str:
    """A writer is killed in mid-stream: what it wrote comes once and in order, and its lane is free."""
    messages = 0
    for _ in range(KILLS):
        name = f"selftest-{uuid.uuid4().hex[:12]}"
        with Ring.create(name, 8192, writers=1) as ring:
            number = 0
            with _started(_stream, ring):
                for number in range(500):
                    if ring.read(timeout=PATIENCE) != b"%d" % number:
                        raise AssertionError(f"message {number} came not, or in another order")
            rest = list(ring.messages(timeout=0))
            if rest != [b"%d" % later for later in range(number + 1, number + 1 + len(rest))]:
                raise AssertionError("what the killed writer left is not what it wrote")
            with Ring.open(name) as successor:
                successor.write(b"next", timeout=0)
            if ring.read(timeout=PATIENCE) != b"next":
                raise AssertionError("the killed writer's successor was not heard")
            messages += 500 + len(rest)
        try:
            Ring.open(name).close()
        except FileNotFoundError:
            pass
        else:
            raise AssertionError("the ring is still there after its last close")
    return f"{KILLS} writers killed, {messages:,} messages accounted for"


def _litmus(ring: Ring, back: Ring) -> None:
    """The other side of `check_fence`."""
    with ring, back:
        _store_and_load(ring, back, 0, 0.0)


def _store_and_load(ring: Ring, back: Ring, side: int, seconds: float) -> tuple[int, int]:
    """Again and again: store a word of one's own, fence, load the other's. Both must not miss each other.

    Side 1 says in its word of each round whether that is the last one.

    Returns:
        How often it was tried, and how often both missed each other.
    """
    segment = ring._segment
    cells = segment.words  # of a lane that nobody reads or writes
    lane = segment.layout.lane_bytes(0) >> 3
    mine, other, seen, theirs, ready, their_ready = (
        lane + 16 * place for place in ((0, 1, 2, 3, 4, 5) if side else (1, 0, 3, 2, 5, 4))
    )
    fence = segment.sleeper_fence

    def of_this_round(cell: int) -> int:
        """The other side's flag of this round, which it does not change before we have shown ours."""
        patience = time.perf_counter() + PATIENCE
        while cells[cell] >> 1 != rounds:
            if time.perf_counter() > patience:
                raise AssertionError("the other process of the litmus does not answer")
        return cells[cell] & 1

    end = 0.0
    rounds = missed = last = 0
    while not last:
        rounds += 1
        last = int(bool(side and rounds > 1 and time.perf_counter() > end))
        cells[ready] = rounds << 1 | last
        last |= of_this_round(their_ready)
        if rounds == 1:
            end = time.perf_counter() + seconds  # from now on: the other process took its time to start
        cells[mine] = rounds  # a word of this round
        fence()
        cells[seen] = (cells[other] == rounds) | rounds << 1
        missed += not of_this_round(theirs) and not cells[seen] & 1
    return rounds, missed


def check_fence() -> str:
    """Two processes each store a word and load the other's, with the backend's fence in between: one sees the other."""
    name = f"selftest-{uuid.uuid4().hex[:12]}"
    with Ring.create(name, 4096, writers=1) as ring, Ring.create(f"{name}-back", 4096) as back:
        ring.write(b"")  # the lane's memory
        if ring.read() != b"":
            raise AssertionError("the first message did not come")
        with _started(_litmus, ring, back):
            rounds, missed = _store_and_load(ring, back, 1, SECONDS)
    if missed:
        raise AssertionError(f"the fence does not hold: {missed:,} of {rounds:,} times both missed each other")
    return f"the fence held {rounds:,} times"


CHECKS: list[Callable[[], str]] = [check_constants, check_round_trips, check_kills, check_fence]


def main() -> int:
    """Run all checks and print the paragraph; 0 if all held."""
    told, failed = [], []
    watchdog = threading.Timer(6 * PATIENCE, lambda: (print("selftest: hangs", flush=True), os._exit(1)))
    watchdog.daemon = True
    watchdog.start()
    for check in CHECKS:
        try:
            told.append(check())
        except Exception as error:
            failed.append(f"{check.__name__}: {type(error).__name__}: {error}")
    watchdog.cancel()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    gil = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", no GIL"
    here = system()
    wine = f", under Wine {here['wine']}" if "wine" in here else ""
    where = f"{python}{gil}, {here['system']}{wine}, {os_backend.processors()} processors"
    print(f"shmring {__version__} selftest on {where}; {os_backend.describe()}: {'; '.join(told)}.")
    for failure in failed:
        print(f"FAILED {failure}")
    print("FAILED" if failed else "All held.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
