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


if __name__ == "__main__":
    import sys, time
    for name, s in SCENARIOS.items():
        if sys.argv[1:] == ["long"]:
            if name not in LONG: continue
        elif name in LONG: continue
        for memory in ("tso","free"):
            for mode in ("fences","membarrier"):
                progs={k:(v.replace("membarrier","fence") if mode=="fences" else re.sub(r"(W4|R4|C1) +fence","",v)) for k,v in s.programs.items()}
                t=time.perf_counter()
                r=Model(progs, memory, s.start, **s.events).explore()
                print(f"{name:32} {memory:5} {mode:10} {r.states:8} {time.perf_counter()-t:6.2f} {r.loss}",flush=True)
                if r.loss: print("   "+"\n   ".join(r.trace))
