"""Hours of use: writers and readers come, go, are killed, stopped and continued at random.

Every message carries its writer's number, its own number and a checksum. Writers note in a shared
ledger what `write` has acknowledged, readers what they got; at the end stands a table of what was sent,
received and lost. What a killed reader had taken, but not yet noted, is counted on its own: it is what
shmring does not promise. It can be no more than its last call asked for, and that is noted as well.

There are as many lanes as writers, so each new writer needs the one of the writer whose place it takes. No
wait has a time-out, and none is cut into slices (`SLICE`): a lost wake-up would last for ever, and show.
Windows has no way to stop a process, so there none is.

With ``--readers compete`` there are four readers at a time, each of which notes in a file of its own what it got. Those
look again after a while, so a wake-up that is lost without anybody's death shows here only as time that it takes.

``python3 tools/soak.py --minutes 20``; the exit code is 0 if nothing was lost, doubled, torn or stuck.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shmring import Ring, RingBusy, RingTimeout
from shmring._backend import os_backend

if sys.platform == "win32":  # which stops no process
    STOP = CONTINUE = None
else:
    STOP, CONTINUE = signal.SIGSTOP, signal.SIGCONT
CALL = 20  # messages that one call writes or reads at most
WRITERS, READERS = 4, 2  # processes at a time; the second reader waits for the role
COMPETING = 4  # readers at a time, of those that compete
CAPACITY, LARGEST = 1 << 16, 9000
STUCK = 30.0  # seconds without a message that count as a hang
REST = 0.03  # seconds between two events

# The ledger: these words of the readers', then some for each process that ever was.
RECEIVED, DOUBLED, TORN, FIRST = range(4)
ACKNOWLEDGED, COUNT, LAST, CALLING, EACH = range(5)  # of a writer; CALLING is a reader's


class Ledger:
    """A file of 8-byte words that outlives whoever writes them; each word has one writer at a time."""

    def __init__(self, path: str, processes: int = 0) -> None:
        with open(path, "w+b" if processes else "r+b") as file:
            if processes:
                file.truncate(8 * (FIRST + EACH * processes))
            self._map = mmap.mmap(file.fileno(), 0)
        self.words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Let go of the file, which only then can be removed on Windows."""
        self.words.release()
        self._map.close()

    def of(self, process: int, what: int) -> int:
        """The word of a process that has this, by its index in `words`."""
        return FIRST + EACH * process + what

    def missing(self, writer: int) -> int:
        """Messages of a writer that were sent, and that no reader noted."""
        acknowledged, count, last = (self.words[self.of(writer, what)] for what in (ACKNOWLEDGED, COUNT, LAST))
        return max(acknowledged, last) - count


def payload(writer: int, number: int, size: int) -> bytes:
    """Writer, number, checksum, and bytes that are different in every message."""
    body = writer.to_bytes(4, "little") + number.to_bytes(8, "little")
    body += (number * 31 + writer & 0xFF).to_bytes(1, "little") * size
    return zlib.crc32(body).to_bytes(4, "little") + body


def write_for_a_while(name: str, ledger: Ledger, writer: int, seed: int) -> None:
    """A writer's life: calls of every kind, and an end of its own if nobody kills it."""
    dice = random.Random(seed)
    acknowledged = ledger.of(writer, ACKNOWLEDGED)
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


def read_for_a_while(name: str, ledger: Ledger, reader: int, seed: int) -> None:
    """A reader's life, once it has the role: check and note every message."""
    dice = random.Random(seed)
    words, calling = ledger.words, ledger.of(reader, CALLING)
    end = time.monotonic() + dice.uniform(0.5, 10)
    with Ring.open(name) as ring:
        while time.monotonic() < end:
            many = dice.random() < 0.3
            words[calling] = CALL if many else 1
            try:
                messages = ring.read_many(CALL) if many else [ring.read()]
            except RingBusy:
                time.sleep(0.005)
                continue
            for message in messages:
                note(words, ledger, message)
            words[calling] = 0


def compete_for_a_while(name: str, path: str, ledger: Ledger, reader: int, seed: int) -> None:
    """The life of a reader of several: note each message's number in a file, in the order in which they came."""
    dice = random.Random(seed)
    words, calling, count = ledger.words, ledger.of(reader, CALLING), ledger.of(reader, COUNT)
    end = time.monotonic() + dice.uniform(0.5, 10)
    with Ring.open(name) as ring, open(f"{path}.{reader}", "ab", buffering=0) as notes:
        while time.monotonic() < end:
            way = dice.choice(("read", "read", "many", "soon", "try", "borrow"))
            words[calling] = CALL if way == "many" else 1
            messages: list[Any] = []
            if way == "many":
                messages = ring.read_many(CALL)
            elif way == "borrow":
                with ring.borrow() as view:
                    messages = [bytes(view)]
            elif way == "try":
                messages = [ring.try_read()]
            else:
                with contextlib.suppress(RingTimeout):
                    messages = [ring.read(timeout=0.001 if way == "soon" else None)]
            found = [message for message in messages if message is not None]
            torn = [message for message in found if zlib.crc32(message[4:]).to_bytes(4, "little") != message[:4]]
            assert not torn, torn
            notes.write(b"".join(message[4:16] for message in found))
            words[count] += len(found)
            words[calling] = 0


def tally(path: str, ledger: Ledger, readers: int, writers: list[int]) -> int:
    """Enter into the ledger what competing readers have noted; how many messages that were acknowledged are missing."""
    words, acknowledged = ledger.words, {writer: ledger.words[ledger.of(writer, ACKNOWLEDGED)] for writer in writers}
    seen = {writer: bytearray(number + CALL + 1) for writer, number in acknowledged.items()}
    for reader in range(readers):
        with contextlib.suppress(FileNotFoundError), open(f"{path}.{reader}", "rb") as file:
            notes, last = file.read(), dict.fromkeys(writers, 0)
            for at in range(0, len(notes), 12):
                writer = int.from_bytes(notes[at : at + 4], "little")
                number = int.from_bytes(notes[at + 4 : at + 12], "little")
                words[RECEIVED] += 1
                words[DOUBLED] += seen[writer][number]
                words[TORN] += number <= last[writer]  # out of order, for one reader
                seen[writer][number], last[writer] = 1, number
    return sum(seen[writer].count(0, 1, number + 1) for writer, number in acknowledged.items())


def read_the_rest(name: str, ledger: Ledger) -> None:
    """Note what is left, when everybody else is dead."""
    with Ring.open(name) as ring:
        try:
            while True:
                note(ledger.words, ledger, ring.read(timeout=0))
        except RingTimeout:
            pass


def note(words: memoryview, ledger: Ledger, message: bytes) -> None:
    """Hold a message against what the ledger has of its writer."""
    if zlib.crc32(message[4:]).to_bytes(4, "little") != message[:4]:
        words[TORN] += 1
        return
    writer, number = int.from_bytes(message[4:8], "little"), int.from_bytes(message[8:16], "little")
    if number <= words[ledger.of(writer, LAST)]:
        words[DOUBLED] += 1
        return
    words[ledger.of(writer, COUNT)] += 1
    words[ledger.of(writer, LAST)] = number
    words[RECEIVED] += 1


class Worker:
    """One process of the crowd."""

    def __init__(self, role: str, number: int, command: list[str]) -> None:
        self.role, self.number = role, number
        self.process = subprocess.Popen(command)
        self.stopped_until = 0.0
        self.progress = 0  # what it had acknowledged
        self.since = time.monotonic()  # when


class Crowd:
    """The processes, and what is done to them."""

    def __init__(self, name: str, ledger: Ledger, path: str, seed: int, compete: bool) -> None:
        self.name, self.ledger, self.path = name, ledger, path
        self.reader, self.readers = ("competitor", COMPETING) if compete else ("reader", READERS)
        self.dice = random.Random(seed)
        self.started = 0
        self.writers: list[int] = []  # the numbers of all that ever were
        self.alive: list[Worker] = []
        self.received, self.since = 0, time.monotonic()
        self.may_be_taken = 0
        self.counts = dict.fromkeys(
            (f"{role}s {what}" for what in ("started", "killed") for role in ("writer", self.reader)), 0
        )
        self.counts["stopped and continued"] = 0

    def start(self, role: str) -> None:
        """One more process of this role."""
        command = [sys.executable, __file__, "--as", role, self.name, self.path, str(self.started)]
        self.alive.append(Worker(role, self.started, [*command, str(self.dice.getrandbits(32))]))
        if role == "writer":
            self.writers.append(self.started)
        self.started += 1
        self.counts[f"{role}s started"] += 1

    def kill(self, worker: Worker) -> None:
        """Kill a process, and note what may have died with it."""
        worker.process.kill()
        worker.process.wait()
        self.alive.remove(worker)
        self.counts[f"{worker.role}s killed"] += 1
        if worker.role != "writer":
            self.may_be_taken += self.ledger.words[self.ledger.of(worker.number, CALLING)]

    def step(self) -> list[str]:
        """Reap, replace, and do something to one of them; what went wrong."""
        failures = []
        now = time.monotonic()
        for worker in list(self.alive):
            if worker.process.poll() is not None:
                self.alive.remove(worker)
                if worker.process.returncode:
                    failures.append(f"{worker.role} {worker.number} ended with {worker.process.returncode}")
            elif CONTINUE and worker.stopped_until and now > worker.stopped_until:
                worker.stopped_until = 0
                worker.process.send_signal(CONTINUE)
        failures += self.stuck(now)
        for role, number in (("writer", WRITERS), (self.reader, self.readers)):
            for _ in range(number - sum(worker.role == role for worker in self.alive)):
                self.start(role)
        worker = self.dice.choice(self.alive)
        chance = self.dice.random()
        if chance < 0.15:
            self.kill(worker)
        elif STOP and chance < 0.25 and not worker.stopped_until:
            worker.process.send_signal(STOP)
            worker.stopped_until = now + self.dice.uniform(0, 1)
            self.counts["stopped and continued"] += 1
        return failures

    def stuck(self, now: float) -> list[str]:
        """Who has come no further for too long. Nobody is stopped for as long as that."""
        words = self.ledger.words
        received = words[RECEIVED] + sum(words[self.ledger.of(worker.number, COUNT)] for worker in self.alive)
        if received != self.received:
            self.received, self.since = received, now
        failures = [f"nothing received for {STUCK:.0f} s"] if now - self.since > STUCK else []
        for worker in self.alive:
            progress = words[self.ledger.of(worker.number, ACKNOWLEDGED)]
            if worker.role != "writer" or progress != worker.progress:
                worker.progress, worker.since = progress, now
            elif now - worker.since > STUCK:
                failures.append(f"writer {worker.number} has written nothing for {STUCK:.0f} s")
        return failures


def soak(minutes: float, seed: int, compete: bool) -> int:
    """Run the crowd, and print the table."""
    name = f"soak-{os.getpid()}"
    end = time.monotonic() + minutes * 60
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "ledger")
        options: dict[str, Any] = {"readers": "compete", "max_readers": COMPETING + 1} if compete else {}
        ring = stack.enter_context(Ring.create(name, CAPACITY, writers=WRITERS, **options))
        ledger = stack.enter_context(contextlib.closing(Ledger(path, processes=2 * int(minutes * 60 / REST) + 100)))
        words = ledger.words
        crowd = Crowd(name, ledger, path, seed, compete)
        try:
            while time.monotonic() < end and not failures:
                failures += crowd.step()
                time.sleep(REST)
            if failures:
                failures.append(str(ring.stats()))
        finally:
            for worker in list(crowd.alive):
                crowd.kill(worker)
        if compete:
            with open(f"{path}.{crowd.started}", "wb") as notes, contextlib.suppress(RingTimeout):
                while True:
                    notes.write(ring.read(timeout=0)[4:16])
            missing = tally(path, ledger, crowd.started + 1, crowd.writers)
        else:
            read_the_rest(name, ledger)
            missing = sum(ledger.missing(writer) for writer in crowd.writers)
        lost = max(missing - crowd.may_be_taken, 0)
        rows: dict[str, Any] = {
            "minutes": minutes,
            "seed": str(seed),
            **crowd.counts,
            "messages acknowledged": sum(words[ledger.of(writer, ACKNOWLEDGED)] for writer in crowd.writers),
            "messages received": words[RECEIVED],
            "taken by readers that were killed": missing - lost,
            "that their last calls asked for": crowd.may_be_taken,
            "received twice": words[DOUBLED],
            "torn or foreign": words[TORN],
            "lost": lost,
        }
    for what, value in rows.items():
        print(f"| {what} | {value if isinstance(value, str) else format(value, ',')} |")
    for failure in failures:
        print(failure)
    return int(bool(failures or lost or rows["received twice"] or rows["torn or foreign"]))


def main() -> int:
    """Parse the arguments; `--as` is how the workers are started."""
    parser = argparse.ArgumentParser(description="Use a ring for a long time, kill at random, and count.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--readers", choices=("one", "compete"), default="one")
    parser.add_argument("--as", dest="role", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.role:
        return soak(arguments.minutes, arguments.seed, arguments.readers == "compete")
    role, name, path, number, seed = arguments.role
    os_backend.SLICE = None
    if role == "competitor":
        compete_for_a_while(name, path, Ledger(path), int(number), int(seed))
    else:
        live = write_for_a_while if role == "writer" else read_for_a_while
        live(name, Ledger(path), int(number), int(seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
