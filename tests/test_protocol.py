"""The sleep and wake protocol of `_words.py` in every interleaving, and the losses without each part of it.

The programs below have a step for each access to a shared word on a message's way, in the code's order and
under the code's labels, which is checked against the source. `model.py` explains how they run, and what "lost"
means. Left out are the counters of messages and parks, and the framing: a position is a number of
messages, a record a word. The run of a failed test shows the shortest way to the loss; so does ``-s`` for
the losses that are meant to be found.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from typing import NamedTuple

import pytest

from conftest import ROOT
from model import Model, lines

SOURCE = (ROOT / "shmring" / "_words.py").read_text()

# ---------------------------------------------------------------- the programs

PARK = """
    S1      noted = [{me}_bell{lane}]
            {announce}
    <S2     order
            epoch = epoch + 1 | 1
    S2      [{me}_parked{lane}] = epoch
    S3      membarrier
            {look}
    S5      wait [{me}_bell{lane}] noted
    awake:
            epoch = epoch + 1
    S6      [{me}_parked{lane}] = epoch
            goto next
"""

WRITER = """
            left = {messages}
            {start}
            claim writer{lane}
            {used}
            epoch = [writer_parked{lane}]
            if epoch % 2 == 0: begin
            epoch = epoch + 1
            [writer_parked{lane}] = epoch
    begin:
    C1      ring [reader_bell]
    known:
            pos = [write_pos{lane}]
    next:
            if left == 0: leave
    try:
    W1      free = [read_pos{lane}]
    W1<W2   order
            if pos - free == {capacity}: park
    W2      [record{lane} + pos % {capacity}] = pos + 1
            pos = pos + 1
    W2<W3   order
    W3      [write_pos{lane}] = pos
    W4      fence
    W5      seen = [reader_parked]
            if seen % 2 == 0 or seen == rung: written
    W5      ring [reader_bell]
            rung = seen
    written:
            note acked{lane} = pos
            left = left - 1
            goto next
    except:
            left = left - 1
            goto begin
    park:
            wanted = pos + 1 - {capacity}
            {park}
    leave:
            end
"""

READER = """
            left = {messages}
            {start}
            claim reader
            epoch = [reader_parked]
            if epoch % 2 == 0: begin
            epoch = epoch + 1
            [reader_parked] = epoch
    begin:
    C1      fence
            {made_good}
    known:
            {known}
    next:
            if left == 0: leave
    try:
            {looked}
    R1<R2   order
            if {nothing}: park
            {taken}
            goto next
    except:
            left = left - 1
            goto begin
    park:
            {park}
    leave:
            end
"""

# For each lane.
MADE_GOOD = """
    C1      seen = [writer_parked{lane}]
            if seen % 2 == 0: good{lane}
    C1      ring [writer_bell{lane}]
    good{lane}:
"""
LOOKED = """
            end{lane} = pos{lane}
            if used{lane}: used{lane}
            new = [lane_used{lane}]
            if new == 0: looked{lane}
            used{lane} = 1
    used{lane}:
    R1      end{lane} = [write_pos{lane}]
    looked{lane}:
"""
TAKEN = """
    more{lane}:
            if pos{lane} == end{lane} or left == 0: taken{lane}
    R2      copy = [record{lane} + pos{lane} % {capacity}]
            check copy == pos{lane} + 1
            pos{lane} = pos{lane} + 1
    R2<R3   order
    R3      [read_pos{lane}] = pos{lane}
    R4      fence
    R5      seen = [writer_parked{lane}]
            if seen % 2 == 0 or seen == rung{lane}: freed{lane}
    epoch<wanted order
            wanted = [writer_wanted{lane}]
            if pos{lane} < wanted: freed{lane}
    R5      ring [writer_bell{lane}]
            rung{lane} = seen
    freed{lane}:
            note freed{lane} = pos{lane}
            left = left - 1
            goto more{lane}
    taken{lane}:
"""
LOOKED_AGAIN = """
            if used{lane}: again{lane}
    S4      new = [lane_used{lane}]
            if new: awake
            goto empty{lane}
    again{lane}:
    S4      end{lane} = [write_pos{lane}]
            if end{lane} != pos{lane}: awake
    empty{lane}:
"""

# Two threads of one handle: what they share they share under its monitors, as notes.
PARKED_THREAD = """
            lock parking
    S1      noted = [{me}_bell{lane}]
            note needs{thread} = {needs}
            {announce}
    <S2     order
            note epoch = epoch + 1 | 1
    S2      [{me}_parked{lane}] = epoch
            unlock parking
    S3      membarrier
            {look}
    S5      wait [{me}_bell{lane}] noted
    awake:
            lock parking
            note needs{thread} = 0
            if needs{other}: left
            note epoch = epoch + 1
    S6      [{me}_parked{lane}] = epoch
    left:
            unlock parking
            goto next
"""
WRITING_THREAD = """
    next:
            lock side
    W1      free = [read_pos0]
    W1<W2   order
            if pos + {size} - free > 2: park
            {record}
            note pos = pos + {size}
    W2<W3   order
    W3      [write_pos0] = pos
    W4      fence
    W5      seen = [reader_parked]
            if seen % 2 == 0 or seen == rung: written
    W5      ring [reader_bell]
            note rung = seen
    written:
            note acked0 = pos
            unlock side
            end
    park:
            wanted = pos + {size} - 2
            unlock side
            {park}
"""
READING_THREAD = """
    next:
            lock side
    R1      end = [write_pos0]
    R1<R2   order
            if pos == end: park
    R2      copy = [record0 + pos % 2]
            check copy == pos + 1
            note pos = pos + 1
    R2<R3   order
    R3      [read_pos0] = pos
            unlock side
            end
    park:
            unlock side
            {park}
"""


def fill(program, **parts):
    for name, part in parts.items():
        program = program.replace("{" + name + "}", str(part))
    return program


def each(lanes, program, **parts):
    return "".join(fill(program, lane=lane, **parts) for lane in range(lanes))


def writer(messages=1, lane=0, capacity=1, claims=False):
    """A process that writes so many messages; it has its lane, or claims it first."""
    park = fill(
        PARK, me="writer", announce="[writer_wanted{lane}] = wanted", look="S4 free = [read_pos{lane}]\nif free >= wanted: awake"
    )  # fmt: skip
    used = "\n".join(f"[lane_used{number}] = 1" for number in range(lane + 1))
    start = "" if claims else "goto known"
    return fill(WRITER, park=park, messages=messages, start=start, used=used, lane=lane, capacity=capacity)


def reader(messages=9, lanes=1, capacity=1, claims=False, known=1, park=PARK):
    """A process that reads up to so many messages; it has the role and knows so many lanes, or claims first."""
    return fill(
        READER,
        messages=messages,
        start="" if claims else each(known, "used{lane} = 1\n") + "goto known",
        made_good=each(lanes, MADE_GOOD),
        known=each(lanes, "pos{lane} = [read_pos{lane}]\n"),
        looked=each(lanes, LOOKED),
        nothing=" and ".join(f"pos{lane} == end{lane}" for lane in range(lanes)),
        taken=each(lanes, TAKEN, capacity=capacity),
        park=fill(park, me="reader", lane="", announce="", look=each(lanes, LOOKED_AGAIN)),
    )


def writing_thread(thread, size):
    """One of two threads that write one message each in lane 0, which holds 2 units and has 2."""
    least = "needs0 if needs0 and (needs0 < needs1 or needs1 == 0) else needs1"
    announce = f"least = {least}\n[writer_wanted0] = least"
    look = "S4 free = [read_pos0]\nif free >= wanted: awake"
    record = "".join(f"W2 [record0 + (pos + {unit}) % 2] = pos + {unit + 1}\n" for unit in range(size))
    park = fill(PARKED_THREAD, me="writer", lane=0, announce=announce, look=look, needs="wanted")
    return fill(WRITING_THREAD, park=park, thread=thread, other=1 - thread, size=size, record=record)


def reading_thread(thread):
    """One of two threads that read one message each."""
    look = "S4 end = [write_pos0]\nif end != pos: awake"
    park = fill(PARKED_THREAD, me="reader", lane="", announce="", look=look, needs=1)
    return fill(READING_THREAD, park=park, thread=thread, other=1 - thread)


class Scenario(NamedTuple):
    """Who does what, on which memory at first, and what may happen to them."""

    programs: dict
    start: dict
    events: dict


def scenario(programs, lanes=1, capacity=1, start=None, **events):
    """Each lane's first writer has the lane, and the first reader the role, if it does not claim it."""
    cells = {f"record{lane}": [0] * capacity for lane in range(lanes)}
    cells["lane_used0"] = 1
    for i, (name, program) in enumerate(programs.items()):
        if "goto known" in program[:100]:
            cells[name] = i + 1
    return Scenario(programs, {**cells, **(start or {})}, events)


TWO_WRITERS = {"writer0": writer(), "writer1": writer(lane=1), "reader": reader(lanes=2, known=2)}
NEW_LANE = {"writer1": writer(lane=1, claims=True), "reader": reader(lanes=2)}
BOTH_USED = {"lane_used1": 1}

FULL = {"record0": [1], "write_pos0": 1, "acked0": 1}

SCENARIOS = {
    "both sides sleep": scenario({"writer0": writer(2), "reader": reader()}, early=1),
    "one of both dies": scenario({"writer0": writer(2), "reader": reader()}, halts=1),
    "a reader that gives up": scenario({"writer0": writer(2), "reader": reader(1)}, early=1),
    "two writers": scenario(TWO_WRITERS, 2, start=BOTH_USED),
    "two writers, and one dies": scenario(TWO_WRITERS, 2, start=BOTH_USED, halts=1),
    "a new lane": scenario(NEW_LANE, 2, halts=1, early=1),
    "a writer comes after a dead one": scenario(
        {"writer0": writer(capacity=2), "writer0 b": writer(capacity=2, claims=True), "reader": reader(capacity=2)},
        capacity=2, halts=1, mortal=["writer0"],
    ),
    "a writer comes after a dead one that slept": scenario(
        {"writer0": writer(), "writer0 b": writer(claims=True), "reader": reader()}, start=FULL, halts=1, mortal=["writer0"]
    ),
    "a reader comes after a dead one": scenario(
        {"writer0": writer(), "reader": reader(), "reader b": reader(claims=True)}, start=FULL, halts=1, mortal=["reader"]
    ),
    "an exception in a writer": scenario({"writer0": writer(2, capacity=2), "reader": reader(capacity=2)}, capacity=2, raises=1),
    "an exception in a reader": scenario({"writer0": writer(2), "reader": reader(1)}, raises=1),
    "two threads read": scenario(
        {"writer0": writer(2, capacity=2), "reader a": reading_thread(0), "reader b": reading_thread(1)}, capacity=2
    ),
    "two threads write": scenario(
        {"writer0 a": writing_thread(0, 2), "writer0 b": writing_thread(1, 1), "reader": reader(1, capacity=2)},
        start={"record0": [1, 2], "write_pos0": 2, "acked0": 2, "pos": 2}, capacity=2, early=1,
    ),
    # What takes minutes.
    "both sides sleep, and anything happens": scenario({"writer0": writer(2), "reader": reader()}, early=2, halts=1, raises=1),
    "three messages": scenario({"writer0": writer(3), "reader": reader()}, early=1, halts=1),
    "one of two lanes is new": scenario(
        {"writer0": writer(), "writer1": writer(lane=1, claims=True), "reader": reader(lanes=2)}, 2, early=1, halts=1
    ),
    "two writers, two messages": scenario(
        {"writer0": writer(2), "writer1": writer(lane=1), "reader": reader(lanes=2, known=2)}, 2, start=BOTH_USED, halts=1
    ),
    "two readers in turn": scenario(
        {"writer0": writer(2), "reader": reader(), "reader b": reader(claims=True)}, halts=1, early=1, mortal=["reader"]
    ),
    "two threads read, and are woken for nothing": scenario(
        {"writer0": writer(2, capacity=2), "reader a": reading_thread(0), "reader b": reading_thread(1)}, capacity=2, early=2
    ),
}  # fmt: skip
LONG = list(SCENARIOS)[list(SCENARIOS).index("both sides sleep, and anything happens") :]


# ---------------------------------------------------------------- nothing is lost

FENCES = "each fences for itself", lambda program: program.replace("membarrier", "fence")
MEMBARRIER = "sleepers fence for all", lambda program: re.sub(r"(W4|R4|C1) +fence", "", program)
SLOW = {  # on "free" memory
    "two writers, and one dies", "two writers", "a reader comes after a dead one", "a writer comes after a dead one that slept",
}  # fmt: skip


def explore(programs, memory, start, events):
    result = Model(programs, memory, start, **events).explore()
    print(f"{result.states:,} states. {result.loss}", *result.trace, sep="\n    ")
    return result


def slow(name, memory, mode):
    return name in LONG or (memory == "free" and mode is MEMBARRIER and name in SLOW)


@pytest.mark.parametrize(
    ("name", "memory", "mode"),
    [
        pytest.param(name, memory, mode, id=f"{name}, {memory}, {mode[0]}", marks=[pytest.mark.stress] * slow(name, memory, mode))
        for name in SCENARIOS
        for memory in ("tso", "free")
        for mode in (FENCES, MEMBARRIER)
    ],
)
def test_nothing_is_lost(name, memory, mode):
    """In no interleaving is a message unread or room unused while the side concerned sleeps, nor a message torn."""
    programs, start, events = SCENARIOS[name]
    result = explore({who: mode[1](program) for who, program in programs.items()}, memory, start, events)
    assert not result.loss and result.states > 1000


# ---------------------------------------------------------------- what is lost without each part


def cut(label, who=""):
    """Leave out what stands under a label, in the programs of those whose name begins so."""

    def edit(name, program):
        if not name.startswith(who):
            return program
        kept = [line for line in program.splitlines() if not re.match(rf"\s*{label}\s", line)]
        assert len(kept) < len(program.splitlines()) or not who, f"{name} has no {label}"
        return "\n".join(kept)

    return edit


def change(old, new, who=""):
    """Put one piece of text in another's place."""

    def edit(name, program):
        if not name.startswith(who):
            return program
        assert old in program, f"{name} has no {old}"
        return program.replace(old, new)

    return edit


def move(label, before, who=""):
    """Put the one line under a label before the line that begins so."""

    def edit(name, program):
        if not name.startswith(who):
            return program
        (line,) = re.findall(rf"^\s*{label}\s.*\n", program, re.M)
        program = program.replace(line, "")
        at = re.search(rf"^\s*{before}\s", program, re.M).start()
        return program[:at] + line + program[at:]

    return edit


def nothing_else(name, program):
    return program


# A sleeper that waits on its own word, which the waker clears.
FLAG_PARK = """
    S2      [reader_parked] = 1
    S3      membarrier
            {look}
    S5      wait [reader_parked] 1
    awake:
    S6      [reader_parked] = 0
            goto next
"""
FLAG_READER = reader(lanes=2, known=2, park=FLAG_PARK)


def flags(first, second):
    """Two writers that clear the reader's word and wake it, in this order."""

    def edit(name, program):
        if name == "reader":
            return FLAG_READER
        program = program.replace("seen % 2 == 0 or seen == rung", "seen == 0")
        return program.replace("W5      ring [reader_bell]", f"W5 {first}\nW5 {second}")

    return edit


CLEAR, WAKE = "[reader_parked] = 0", "wake [reader_parked]"
RESTART = "epoch = [reader_parked]\n            if epoch % 2 == 0: begin\n            epoch = epoch + 1\n"
STAYS = "    left:\n            unlock parking"


class Loss(NamedTuple):
    """A change of the protocol that loses something: in a scenario, on these memories, with these fences."""

    change: str
    edit: object
    scenario: str
    memories: str = "tso free"
    modes: tuple = (FENCES, MEMBARRIER)
    mended: object = None  # by this, the loss would not be there


LOSSES = [
    Loss("clear, then wake", flags(CLEAR, WAKE), "two writers, and one dies"),
    Loss("wake, then clear", flags(WAKE, CLEAR), "two writers"),
    Loss("ring by a plain wake", change("ring [reader_bell]", "wake [reader_bell]", "writer"), "both sides sleep"),
    Loss("free by a plain wake", change("ring [writer_bell0]", "wake [writer_bell0]", "reader"), "two threads write"),
    # Each fence.
    Loss("no W4", cut("W4"), "both sides sleep", modes=(FENCES,)),
    Loss("no R4", cut("R4"), "both sides sleep", modes=(FENCES,)),
    Loss("no S3 of the reader", cut("S3", "reader"), "both sides sleep"),
    Loss("no S3 of the writer", cut("S3", "writer"), "both sides sleep"),
    Loss("the reader's membarrier reaches nobody", change("membarrier", "fence", "reader"), "both sides sleep", modes=(MEMBARRIER,)),
    Loss("the writer's membarrier reaches nobody", change("membarrier", "fence", "writer"), "both sides sleep", modes=(MEMBARRIER,)),
    Loss("no order W1<W2", cut("W1<W2"), "both sides sleep", "free"),
    Loss("no order W2<W3", cut("W2<W3"), "both sides sleep", "free"),
    Loss("no order R1<R2", cut("R1<R2"), "both sides sleep", "free"),
    Loss("no order R2<R3", cut("R2<R3"), "both sides sleep", "free"),
    Loss("no order <S2 of the reader", cut("<S2", "reader"), "both sides sleep", "free"),
    Loss("no order <S2 of the writer", cut("<S2", "writer"), "two threads write", "free"),
    Loss("no order epoch<wanted", cut("epoch<wanted"), "two threads write", "free"),
    # Each other step.
    Loss("no C1 of the writer", cut("C1", "writer"), "a writer comes after a dead one"),
    Loss("no C1 of the reader", cut("C1", "reader"), "a reader comes after a dead one"),
    Loss("no C1 after an exception in the writer", cut("C1", "writer"), "an exception in a writer"),
    Loss("no C1 after an exception in the reader", cut("C1", "reader"), "an exception in a reader"),
    Loss("no S2 of the reader", cut("S2", "reader"), "both sides sleep"),
    Loss("no S2 of the writer", cut("S2", "writer"), "both sides sleep"),
    Loss("no S4 of the reader", cut("S4", "reader"), "both sides sleep"),
    Loss("no S4 of the writer", cut("S4", "writer"), "both sides sleep"),
    Loss("no look for a new lane in S4", change("S4      new = [lane_used", "S4      new = [none", "reader"), "a new lane"),
    Loss("a lane is marked as used after C1", move(r"\[lane_used1\]", "pos", "writer"), "a new lane"),
    Loss("S1 after S2", move("S1", "S3", "reader"), "both sides sleep"),
    Loss("S1 after S4", move("S1", "S5", "reader"), "both sides sleep"),
    Loss("W5 before W3", move("W3", "written:", "writer"), "both sides sleep"),
    Loss("R5 before R3", move("R3", "freed0:", "reader"), "both sides sleep"),
    Loss("the epoch is as good as rung although the room does not suffice",
         lambda name, program: program.replace("rung0 = seen", "").replace("epoch<wanted order", "rung0 = seen"), "two threads write"),
    Loss("a claimant begins with a new epoch", change(RESTART, "epoch = 0\n", "reader b"), "a reader comes after a dead one"),
    Loss("the first of two threads that leaves makes parked even", lambda name, program: re.sub(r"if needs\d: left", "", program), "two threads read"),
    Loss("a thread asks for what it needs, not for the least", change("= least", "= wanted", "writer"), "two threads write"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "memory", "mode"),
    [
        pytest.param(loss, memory, mode, id=f"{loss.change}, {memory}, {mode[0]}")
        for loss in LOSSES
        for memory in loss.memories.split()
        for mode in loss.modes
    ],
)
def test_the_checker_finds_what_is_lost(loss, memory, mode):
    """Every part of the protocol is needed: a message, room, or a message's bytes are lost without it."""
    programs, start, events = SCENARIOS[loss.scenario]
    edited = {who: mode[1](loss.edit(who, program)) for who, program in programs.items()}
    assert edited != {who: mode[1](program) for who, program in programs.items()}
    result = explore(edited, memory, start, events)
    assert result.loss
