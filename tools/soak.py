"""Hours of use: writers and readers come, go, are killed, stopped and continued at random.

Every message carries its writer's number, its own number and a checksum. Writers note in a shared
ledger what `write` has acknowledged, readers what they got; at the end stands a table of what was sent,
received and lost. A message that a killed reader had taken and not yet noted is counted on its own: it
is what shmring does not promise, at most the messages of one call for each kill.

``python3 tools/soak.py --minutes 20``; the exit code is 0 if nothing was lost, doubled, torn or stuck.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shmring import Ring, RingBusy

CALL = 20  # messages that one call writes or reads at most
WRITERS, READERS = 6, 2  # processes at a time; the second reader waits for the role
CAPACITY, LARGEST = 1 << 16, 9000
STUCK = 30.0  # seconds without a message that count as a hang

# The ledger: words of the readers' first, then two for each writer that ever was.
RECEIVED, TAKEN, DOUBLED, TORN, LAST_READER, FIRST = range(6)


class Ledger:
    """A file of 8-byte words that outlives whoever writes them; each word has one writer at a time."""

    def __init__(self, path: str, writers: int = 0) -> None:
        with open(path, "r+b") as file:
            if writers:
                file.truncate(8 * (FIRST + 2 * writers))
            self.words = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")

    def acknowledged(self, writer: int) -> int:
        return FIRST + 2 * writer

    def received(self, writer: int) -> int:
        return FIRST + 2 * writer + 1


def payload(writer: int, number: int, size: int) -> bytes:
    """Writer, number, checksum, and bytes that are different in every message."""
    body = writer.to_bytes(4, "little") + number.to_bytes(8, "little")
    body += (number * 31 + writer & 0xFF).to_bytes(1, "little") * size
    return zlib.crc32(body).to_bytes(4, "little") + body


def write_for_a_while(name: str, ledger: Ledger, writer: int, seed: int) -> None:
    """A writer's life: calls of every kind, and an end of its own if nobody kills it."""
    dice = random.Random(seed)
    acknowledged = ledger.acknowledged(writer)
    number = 0
    with Ring.open(name) as ring:
        for _ in range(dice.randrange(100, 20000)):
            size = dice.choice((0, 8, 64, 64, 64, dice.randrange(LARGEST)))
            if dice.random() < 0.2:
                count = dice.randrange(1, CALL + 1)
                written = ring.write_many([payload(writer, number + i + 1, size) for i in range(count)])
            elif dice.random() < 0.1:
                written = int(ring.try_write(payload(writer, number + 1, size)))
            else:
                ring.write(payload(writer, number + 1, size))
                written = 1
            number += written
            ledger.words[acknowledged] = number


def read_for_a_while(name: str, ledger: Ledger, seed: int) -> None:
    """A reader's life, once it has the role: check and note every message."""
    dice = random.Random(seed)
    words = ledger.words
    end = time.monotonic() + dice.uniform(0.5, 10)
    with Ring.open(name) as ring:
        while time.monotonic() < end or words[LAST_READER]:
            try:
                messages = ring.read_many(CALL, timeout=0.2) if dice.random() < 0.5 else [ring.read(timeout=0.2)]
            except RingBusy:
                time.sleep(0.005)
                continue
            except TimeoutError:
                if words[LAST_READER]:
                    return
                continue
            for message in messages:
                note(words, ledger, message)


def note(words: memoryview, ledger: Ledger, message: bytes) -> None:
    """Hold a message against what the ledger has of its writer."""
    if zlib.crc32(message[4:]).to_bytes(4, "little") != message[:4]:
        words[TORN] += 1
        return
    received = ledger.received(int.from_bytes(message[4:8], "little"))
    number = int.from_bytes(message[8:16], "little")
    if number <= words[received]:
        words[DOUBLED] += 1
        return
    words[TAKEN] += number - words[received] - 1  # the reader before us took these, and was killed
    words[received] = number
    words[RECEIVED] += 1


class Crowd:
    """The processes, and what is done to them."""

    def __init__(self, name: str, ledger: Ledger, path: str, seed: int) -> None:
        self.name, self.ledger, self.path = name, ledger, path
        self.dice = random.Random(seed)
        self.writers = 0
        self.alive: dict[subprocess.Popen[bytes], str] = {}
        self.stopped: dict[subprocess.Popen[bytes], float] = {}
        self.counts = dict.fromkeys(
            ("writers started", "readers started", "writers killed", "readers killed", "stopped"), 0
        )

    def start(self, role: str) -> None:
        """One more process of this role."""
        number = self.writers if role == "writer" else -1
        self.writers += role == "writer"
        command = [sys.executable, __file__, "--as", role, self.name, self.path, str(number)]
        self.alive[subprocess.Popen([*command, str(self.dice.getrandbits(32))])] = role
        self.counts[f"{role}s started"] += 1

    def step(self) -> list[str]:
        """Reap, replace, and do something to one of them; what went wrong."""
        failures = []
        for process, role in list(self.alive.items()):
            if process.poll() is not None:
                del self.alive[process]
                self.stopped.pop(process, None)
                if process.returncode not in (0, -signal.SIGKILL):
                    failures.append(f"a {role} ended with {process.returncode}")
        for process, until in list(self.stopped.items()):
            if time.monotonic() > until:
                del self.stopped[process]
                process.send_signal(signal.SIGCONT)
        for role, number in (("writer", WRITERS), ("reader", READERS)):
            for _ in range(number - sum(other == role for other in self.alive.values())):
                self.start(role)
        process = self.dice.choice(list(self.alive))
        chance = self.dice.random()
        if chance < 0.15:
            process.kill()
            self.counts[f"{self.alive[process]}s killed"] += 1
        elif chance < 0.25 and process not in self.stopped:
            process.send_signal(signal.SIGSTOP)
            self.stopped[process] = time.monotonic() + self.dice.uniform(0, 1)
            self.counts["stopped"] += 1
        return failures

    def end(self) -> None:
        """Kill and reap them all."""
        for process, role in self.alive.items():
            process.kill()
            self.counts[f"{role}s killed"] += 1
        for process in self.alive:
            process.wait()


def soak(minutes: float, seed: int) -> int:
    """Run the crowd, and print the table."""
    name = f"soak-{os.getpid()}"
    end = time.monotonic() + minutes * 60
    failures: list[str] = []
    with tempfile.NamedTemporaryFile() as file, Ring.create(name, CAPACITY, writers=WRITERS + 4) as ring:
        ledger = Ledger(file.name, writers=int(minutes * 60 * 60) + 100)
        words = ledger.words
        crowd = Crowd(name, ledger, file.name, seed)
        before, since = 0, time.monotonic()
        try:
            while time.monotonic() < end and not failures and crowd.writers < int(minutes * 3600):
                failures += crowd.step()
                time.sleep(0.03)
                if words[RECEIVED] != before or crowd.stopped:
                    before, since = words[RECEIVED], time.monotonic()
                elif time.monotonic() - since > STUCK:
                    failures.append(f"nothing received for {STUCK:.0f} s; {ring.stats()}")
        finally:
            crowd.end()
        words[LAST_READER] = 1
        read_for_a_while(name, ledger, seed)
        for writer in range(crowd.writers):
            missing = words[ledger.acknowledged(writer)] - words[ledger.received(writer)]
            words[TAKEN] += max(missing, 0)
            if -missing > CALL:
                failures.append(f"writer {writer}: {-missing} messages more received than sent")
        allowed = crowd.counts["readers killed"] * CALL
        lost = max(words[TAKEN] - allowed, 0)
        rows = {
            "seed": seed,
            "minutes": minutes,
            **crowd.counts,
            "messages acknowledged": sum(words[ledger.acknowledged(w)] for w in range(crowd.writers)),
            "messages received": words[RECEIVED],
            "taken by a reader that was killed": words[TAKEN] - lost,
            "received twice": words[DOUBLED],
            "torn or foreign": words[TORN],
            "lost": lost,
        }
    for what, value in rows.items():
        print(f"| {what} | {value:,} |" if what != "seed" else f"| seed | {seed} |")
    for failure in failures:
        print(failure)
    return int(bool(failures or rows["lost"] or rows["received twice"] or rows["torn or foreign"]))


def main() -> int:
    """Parse the arguments; `--as` is how the workers are started."""
    parser = argparse.ArgumentParser(description="Use a ring for a long time, kill at random, and count.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--as", dest="role", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.role:
        return soak(arguments.minutes, arguments.seed)
    role, name, path, number, seed = arguments.role
    ledger = Ledger(path)
    if role == "writer":
        write_for_a_while(name, ledger, int(number), int(seed))
    else:
        read_for_a_while(name, ledger, int(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
