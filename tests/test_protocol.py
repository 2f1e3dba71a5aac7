"""The sleep and wake protocol of `_words.py` in every interleaving, and the losses without each part of it.

The programs below have a step for each access to a shared word on a message's way, in the code's order and
under the code's labels, which is checked against the source. `model.py` explains how they run, and what "lost"
means. Left out are the counters of messages and parks, and the framing: a position is a number of
messages, a record a word. A bell is a futex in them; where it is an event (Windows), `with_events` says what a
program does instead. A doorbell is a FIFO that is readable or not; the programs that have one, or ring it too, are
those of `reader` and `writer` with other parts. The run of a failed test shows the shortest way to the loss; so does
``-s`` for the losses that are meant to be found.
"""

from __future__ import annotations

import ast
import re
from functools import partial
from typing import NamedTuple

import pytest
from conftest import ROOT, WINDOWS
from model import Model, lines

if WINDOWS:
    pytest.skip("runs no code of the platform; the same source is checked on Linux", allow_module_level=True)

PROTOCOL = ["_parking", "_writing", "_reading", "_competing"]  # the modules that have its steps
SOURCE = "".join((ROOT / "shmring" / f"{name}.py").read_text() for name in PROTOCOL)
EVENTS_SOURCE = (ROOT / "shmring" / "_windows.py").read_text()
DOORBELL_SOURCES = [SOURCE, *((ROOT / "shmring" / name).read_text() for name in ("_posix.py", "_loop.py", "_linux.py"))]

# ---------------------------------------------------------------- the programs

PARK = """
    S1      noted = [{me}_bell{lane}]
            {announce}
    S1<S2   order
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
    C1      fence
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
    epoch<doorbell order
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
    R5      wanted = [writer_wanted{lane}]
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
    S1<S2   order
            note its_epoch = its_epoch + 1 | 1
    S2      [{me}_parked{lane}] = its_epoch
            unlock parking
    S3      membarrier
            {look}
    S5      wait [{me}_bell{lane}] noted
    awake:
            lock parking
            note needs{thread} = 0
            if needs{other}: left
            note its_epoch = its_epoch + 1
    S6      [{me}_parked{lane}] = its_epoch
    left:
            unlock parking
            goto next
"""
WRITING_THREAD = """
    next:
            lock side
    W1      free = [read_pos0]
    W1<W2   order
            if its_pos + {size} - free > 2: park
            {record}
            note its_pos = its_pos + {size}
    W2<W3   order
    W3      [write_pos0] = its_pos
    W4      fence
    W5      seen = [reader_parked]
            if seen % 2 == 0 or seen == its_rung: written
    W5      ring [reader_bell]
            note its_rung = seen
    written:
            note acked0 = its_pos
            unlock side
            end
    park:
            wanted = its_pos + {size} - 2
            unlock side
            {park}
"""
READING_THREAD = """
    next:
            lock side
    R1      end = [write_pos0]
    R1<R2   order
            if its_pos == end: park
    R2      copy = [record0 + its_pos % 2]
            check copy == its_pos + 1
            note its_pos = its_pos + 1
    R2<R3   order
    R3      [read_pos0] = its_pos
            unlock side
            end
    park:
            unlock side
            {park}
"""

# Where a bell is an event, it lets one thread through. What such a thread waits for and tells the handle's other one.
WAIT_FOR_TWO = """
            share asleep{thread} = 1
            heard_last = shared heard
            which = 0
            if heard_last != noted: back
    S5      which = take [alarm{thread}] [{bell}]
    back:
            share asleep{thread} = 0
            if which != 2: awake
            {tell}
"""
TELL = """
            share heard = heard + 1
            there = shared asleep{other}
            if there == 0: {told}
            set [alarm{other}]
"""
# Closing a handle of which a thread reads; it waits for that thread, to see that there is an end to it.
CLOSER = """
            lock side
            note side_closed = 1
            unlock side
            lock parking
            note needs0 = 0
            note its_epoch = its_epoch + its_epoch % 2
    S6      [reader_parked] = its_epoch
            unlock parking
            lock parking
            note parking_closed = 1
            unlock parking
            {tell}
    told:
            release reader
            lock thread
            end
"""

# A waker's ring, where there may be a doorbell: one call in the programs above, of which each step counts here. `told`
# is what it returns.
RING = """
            told = 1
    {label}      door = [{me}_doorbell{lane}]
            if door % 2 == 0: bell_{mark}
            {tell}
    told_{mark}:
            if door & 2: rung_{mark}
    bell_{mark}:
    {label}      ring [{me}_bell{lane}]
    rung_{mark}:
"""
TELLS = "{label}      fill [doorbell]"
# It knows which FIFO was there under the number that it saw last. What has no name any more has nobody who waits.
TELLS_BY_NUMBER = """
            if door // 4 == number: there_{mark}
            fence
            at = shared path
            if at == 0: told_{mark}
            number = door // 4
            fifo = at
    there_{mark}:
    {label}      fill [doorbell + fifo]
"""
# There is no descriptor left for it, but for the last message.
TELLS_THE_LAST = """
            told = left == 1
            if told == 0: told_{mark}
    {label}      fill [doorbell]
"""

# The doorbell, a sleeper that does not note the bell. S5 is the selector's, or the loop's.
EPOCH = """
            {announce}
            state = state | 3
            [{me}_doorbell{lane}] = state
    S1<S2   order
            epoch = epoch + 1 | 1
    S2      [{me}_parked{lane}] = epoch
    S3      membarrier
"""
BY_HAND = """
            before = armed
            armed = 0
            rung = reset [{fifo}]
            if before == {needs} and rung == 0: still
            {epoch}
    still:
            armed = {needs}
            {look}
    S5      wait [{fifo}] 0
            goto next
    awake:
            if rung == 0: next
            fill [{fifo}]
            goto next
"""
IN_A_LOOP = """
            quick = 0
            before = armed
            armed = 0
            if before == {needs}: still
            {epoch}
    still:
            armed = {needs}
            {look}
    S5      wait [{fifo}] 0
            armed = 0
            reset [{fifo}]
            armed = 0
    awake:
            goto next
"""
ATTACH = """
            if attached: next
            fence
            share path = {inode}
            reset [{fifo}]
            state = [{me}_doorbell{lane}]
            state = (state // 4 + 1) * 4 + 1
            [{me}_doorbell{lane}] = state
            attached = 1
    next:
"""
DETACHED = """
            state = [reader_doorbell]
            state = state // 4 * 4
            [reader_doorbell] = state
"""
# A task that had not to wait lately is not to be told.
STREAM = """
            quick = quick + 1
            if quick != 2: busy
            armed = 0
            epoch = epoch + epoch % 2
    S6      [reader_parked] = epoch
            armed = 0
    busy:
"""
CLOSES_ITS_OWN = """
    leave:
            epoch = epoch + epoch % 2
    S6      [reader_parked] = epoch
            {detached}
            fence
            share path = 0
            release reader
            end
"""
# A thread of a handle whose other thread sleeps on the bell, or waits for the doorbell too: what is said of it
# outside of the monitors is shared.
DOORBELL_THREAD = """
            {put_down}
            token_then = shared token
            before = shared armed
            share armed = 0
            rung = {heard}
            if before == token_then and rung == 0: still
            lock parking
            note needs{doorbell} = 1
            {announce}
    S1<S2   order
            note its_epoch = its_epoch + 1 | 1
    S2      [reader_parked] = its_epoch
            unlock parking
    S3      membarrier
    still:
            share armed = token_then
            {look}
    S5      wait [doorbell]{told} 0
            {hear}
            goto next
    awake:
            {has_looked}
            goto next
"""
FOUND_BY_HAND = """
            if rung == 0: next
            fill [doorbell]
"""
HEAR = """
            readable = shared doorbell
            if readable == 0: next
            share token = token + 1
            reset [doorbell]
            share token = token + 1
            {wake}
"""
# A loop has the tasks of the others try again.
WAKE = """
            there = shared down{other}
            if there == 0: next
            share down{other} = 0
            fill [told{other}]
"""
PUT_DOWN = """
            reset [told{thread}]
            share down{thread} = 1
"""


def fill(program, **parts):
    for name, part in parts.items():
        program = program.replace("{" + name + "}", str(part))
    return program


def each(lanes, program, **parts):
    return "".join(fill(program, lane=lane, **parts) for lane in range(lanes))


def writer(messages=1, lane=0, capacity=1, claims=False):
    """A process that writes so many messages; it has its lane, or claims it first."""
    look = "S4 free = [read_pos{lane}]\nif free >= wanted: awake"
    park = fill(PARK, me="writer", announce="[writer_wanted{lane}] = wanted", look=look)
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
    record = "".join(f"W2 [record0 + (its_pos + {unit}) % 2] = its_pos + {unit + 1}\n" for unit in range(size))
    park = fill(PARKED_THREAD, me="writer", lane=0, announce=announce, look=look, needs="wanted")
    return fill(WRITING_THREAD, park=park, thread=thread, other=1 - thread, size=size, record=record)


def reading_thread(thread):
    """One of two threads that read one message each."""
    look = "S4 end = [write_pos0]\nif end != its_pos: awake"
    park = fill(PARKED_THREAD, me="reader", lane="", announce="", look=look, needs=1)
    return fill(READING_THREAD, park=park, thread=thread, other=1 - thread)


def closable(program):
    """A thread that reads on and on until another one closes the handle; it has the lock `thread` until its end."""
    program = re.sub(r"^ +end$", "goto next", program, flags=re.M)
    program = re.sub(r"^ +lock (\w+)$", r"lock \1\nif \1_closed: out_of_\1", program, flags=re.M)
    return program + """
    out_of_parking:
            unlock parking
            goto gone
    out_of_side:
            unlock side
    gone:
            unlock thread
            end
    """


def rings(program, tell=TELLS):
    """A program that rings a doorbell too where the word beside a bell says so."""
    program = re.sub(
        r"^ *(\w\d) +ring \[(\w+)_bell(\d?)\]\n",
        lambda match: fill(
            fill(RING, tell=tell), label=match[1], me=match[2], lane=match[3], mark=f"{match[1]}_{match[2]}{match[3]}"
        ),
        program,
        flags=re.M,
    )
    return re.sub(r"(rung\d?) = seen", r"\1 = seen if told else 0", program)


def with_doorbell(program, park, me="reader", lane="", needs=1, announce="", fifo="doorbell", inode=1):
    """A program of `reader` or `writer` that has a doorbell before it first looks, and waits for that."""
    parts = {"me": me, "lane": lane, "needs": needs, "announce": announce, "fifo": fifo, "inode": inode}
    look = re.search(r"S3 +membarrier\n((?:.*\n)*?) *S5 ", program)[1]
    begin, end = program.index("park:"), program.index("    leave:")
    wanted = re.search(r" *wanted = pos.*\n", program[begin:end])
    park = (wanted[0] if wanted else "") + fill(park, epoch=EPOCH, look=look)
    program = program[:begin] + "park:\n" + fill(park, **parts) + program[end:]
    return program.replace("    next:\n", fill(ATTACH, **parts), 1)


def interrupted(program):
    """Exceptions may also come while it arms its doorbell and waits for it."""
    handler = re.search(r" *except:\n.*\n.*\n", program)[0]
    return program.replace(handler, "").replace("    leave:\n", handler + "    leave:\n")


def streams(program):
    """A task that does not wait for each message."""
    return program.replace("    next:\n", "    next:\n" + STREAM)


def closes(program):
    """A reader that closes its handle at its end."""
    return program.replace("    leave:\n            end\n", fill(CLOSES_ITS_OWN, detached=DETACHED))


def succeeds(program):
    """A reader that claims: the one before it may have had a doorbell."""
    return program.replace("    begin:\n", "    even:\n" + DETACHED + "begin:\n", 1).replace(": begin", ": even", 1)


def parked_thread():
    """One of two threads, which sleeps on the bell: then the doorbell is not alone."""
    return reading_thread(0).replace("note needs0 = 1\n", f"note needs0 = 1\n{ALONE_OR_NOT}\n", 1)


def doorbell_thread(doorbell=1, **parts):
    """One of two threads that waits for the doorbell: by hand, if nothing else is said."""
    program = reading_thread(0)
    look = re.search(r"S3 +membarrier\n((?:.*\n)*?) *S5 ", program)[1]
    parts = {
        "put_down": "", "heard": "reset [doorbell]", "told": "", "hear": "", "has_looked": FOUND_BY_HAND,
        "announce": ALONE_OR_NOT, **parts,
    }  # fmt: skip
    park = fill(DOORBELL_THREAD, look=look, doorbell=doorbell, **parts)
    return program[: program.index("lock parking")] + park.lstrip()


def task(thread):
    """One of two threads with a loop each, in which a task waits."""
    wake = fill(WAKE, other=1 - thread)
    return doorbell_thread(
        0, heard="0", announce="[reader_doorbell] = 7", put_down=fill(PUT_DOWN, thread=thread), told=f" [told{thread}]",
        hear=fill(HEAR, wake=wake), has_looked=wake,
    )  # fmt: skip


ALONE_OR_NOT = "[reader_doorbell] = 5 if needs0 else 7"


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


def with_events(program):
    """The same program where bells are events. `noted` is the handle's own then, and for its threads only."""
    program = program.replace("membarrier", "fence").replace("ring [", "set [")
    # An event that is a doorbell is a level as well, but to hear it takes two calls.
    program = re.sub(r"rung = reset (\[(\w+)\])", r"rung = shared \2\nif rung == 0: unset\nreset \1\nunset:", program)
    thread = re.search(r"note needs(\d) = 0", program)
    if "alarm" in program:
        return program  # it has them
    if not thread:
        program = re.sub(r".*S1 .*= \[\w+\]\n", "", program)
        return re.sub(r"wait (\[\w+\]) noted", r"take \1", program)
    program = re.sub(r"(S1 .*=) \[\w+\]", r"\1 shared heard", program)
    thread, tell = int(thread[1]), fill(TELL, told="awake")
    return re.sub(
        r" *S5 .*wait \[(\w+)\] noted\n",
        lambda match: fill(WAIT_FOR_TWO, tell=tell, bell=match[1], thread=thread, other=1 - thread),
        program,
    )


ONE = {"writer0": writer(), "reader": reader()}
BOTH = {"writer0": writer(2), "reader": reader()}
TWO_WRITERS = {"writer0": writer(), "writer1": writer(lane=1), "reader": reader(lanes=2, known=2)}
ONE_MORE = {"writer0": writer(2), "writer1": writer(lane=1), "reader": reader(lanes=2, known=2)}
NEW_LANE = {"writer1": writer(lane=1, claims=True), "reader": reader(lanes=2)}
A_LATE_LANE = {"writer0": writer(), **NEW_LANE}
BOTH_USED = {"lane_used1": 1}
FULL = {"record0": [1], "write_pos0": 1, "acked0": 1}
FULL_OF_TWO = {"record0": [1, 2], "write_pos0": 2, "acked0": 2, "its_pos": 2}
NEXT_WRITER = {"writer0": writer(), "writer0 b": writer(claims=True), "reader": reader()}
READING = {"writer0": writer(2, capacity=2), "reader a": reading_thread(0), "reader b": reading_thread(1)}
WRITING = {"writer0 a": writing_thread(0, 2), "writer0 b": writing_thread(1, 1), "reader": reader(1, capacity=2)}

CLOSING = {
    "reader a": closable(reading_thread(0)),
    "closer": fill(CLOSER, tell=fill(TELL, told="told"), other=0),
    "writer0": writer(capacity=2),
    "reader b": reader(1, capacity=2, claims=True),
}

SCENARIOS = {
    "both sides sleep": scenario(BOTH, early=1),
    "one of both dies": scenario(BOTH, halts=1),
    "a reader that gives up": scenario({"writer0": writer(2), "reader": reader(1)}, early=1),
    "two writers": scenario(TWO_WRITERS, 2, start=BOTH_USED),
    "two writers, and one dies": scenario(TWO_WRITERS, 2, start=BOTH_USED, halts=1),
    "a new lane": scenario(NEW_LANE, 2, halts=1, early=1),
    "a writer comes after a dead one": scenario(NEXT_WRITER, halts=1, mortal=["writer0"]),
    "a writer comes after a dead one that slept": scenario(NEXT_WRITER, start=FULL, halts=1, mortal=["writer0"]),
    "a reader comes after a dead one": scenario(
        {**ONE, "reader b": reader(claims=True)}, start=FULL, halts=1, mortal=["reader"]
    ),
    "an exception in a writer": scenario(
        {"writer0": writer(2, capacity=2), "reader": reader(capacity=2)}, capacity=2, raises=1
    ),
    "an exception in a reader": scenario({"writer0": writer(2), "reader": reader(1)}, raises=1),
    "two threads read": scenario(READING, capacity=2),
    "two threads write": scenario(WRITING, capacity=2, start=FULL_OF_TWO, early=1),
    "a long message": scenario(
        {"writer0 a": writing_thread(0, 2), "reader": reader(capacity=2)}, capacity=2, start=FULL_OF_TWO, early=1
    ),
}
LONG = {
    "both sides sleep, and anything happens": scenario(BOTH, early=1, halts=1, raises=1),
    "both sides sleep, and are woken for nothing": scenario(BOTH, early=2, halts=1),
    "three messages": scenario({"writer0": writer(3), "reader": reader()}, halts=1, early=1),
    "a late lane": scenario(A_LATE_LANE, 2, halts=1),
    "two writers, and one is woken for nothing": scenario(TWO_WRITERS, 2, start=BOTH_USED, early=1),
    "three messages of two writers": scenario(ONE_MORE, 2, start=BOTH_USED),
    "two readers in turn": scenario({**BOTH, "reader b": reader(claims=True)}, halts=1, mortal=["reader"]),
    "two threads read, and are woken for nothing": scenario(READING, capacity=2, early=1),
}
SCENARIOS.update(LONG)
CLOSES = "a handle is closed while a thread of it reads"
EVENTS_ONLY = {
    CLOSES: scenario(CLOSING, capacity=2, start={"reader": 1, "thread": 1}),
}
SCENARIOS.update(EVENTS_ONLY)
HAND, LOOP = with_doorbell(reader(), BY_HAND), with_doorbell(reader(), IN_A_LOOP)
HAND_OF_TWO = with_doorbell(reader(capacity=2), BY_HAND)
TWO_LANES = with_doorbell(reader(lanes=2, known=2), BY_HAND)
FIRST = with_doorbell(reader(), BY_HAND, fifo="doorbell1")
WRITES_BY_NUMBER = rings(writer(2), TELLS_BY_NUMBER)
WRITES_IN_A_LOOP = with_doorbell(
    writer(2), IN_A_LOOP, "writer", 0, "wanted", "[writer_wanted0] = wanted", "doorbell"
)
FIFOS = {"doorbell": 0, "doorbell1": 0, "doorbell2": 0}
WRITES_TWO = rings(writer(2, capacity=2))
WITH_A_THREAD = {"writer0": WRITES_TWO, "reader a": parked_thread(), "reader b": doorbell_thread()}
ATTACHED = {"reader_doorbell": 5, "token": 1}
ALONE = "[reader_doorbell] = 7"
TWO_BY_HAND = {
    "writer0": WRITES_TWO,
    "reader a": doorbell_thread(0, announce=ALONE),
    "reader b": doorbell_thread(0, announce=ALONE),
}
TWO_LOOPS = {"writer0": WRITES_TWO, "reader a": task(0), "reader b": task(1)}
DOORBELLS = {
    "two threads wait for a doorbell, in loops": scenario(TWO_LOOPS, capacity=2, start=ATTACHED),
    "two threads wait for a doorbell, by hand": scenario(TWO_BY_HAND, capacity=2, start=ATTACHED),
    "a doorbell by hand": scenario({"writer0": rings(writer(2)), "reader": HAND}, early=1),
    "a doorbell by hand, and one of both dies": scenario({"writer0": rings(writer(2)), "reader": HAND}, halts=1),
    "a doorbell by hand, and an exception": scenario(
        {"writer0": rings(writer(2)), "reader": interrupted(HAND)}, raises=1
    ),
    "a doorbell and two writers, and one dies": scenario(
        {"writer0": rings(writer()), "writer1": rings(writer(lane=1)), "reader": TWO_LANES},
        2, start=BOTH_USED, halts=1, mortal=["writer0", "writer1"],
    ),
    "a doorbell in a loop": scenario({"writer0": rings(writer(2)), "reader": LOOP}, early=1),
    "a doorbell in a loop, and an exception": scenario(
        {"writer0": rings(writer(2)), "reader": interrupted(LOOP)}, raises=1
    ),
    "a doorbell in a loop with a stream": scenario({"writer0": rings(writer(2)), "reader": streams(LOOP)}),
    "a doorbell and a thread that sleeps": scenario(WITH_A_THREAD, capacity=2, start=ATTACHED),
    "a reader comes after a dead one with a doorbell": scenario(
        {"writer0": rings(writer(), TELLS_BY_NUMBER), "reader": FIRST, "reader b": succeeds(reader(claims=True))},
        start=FIFOS, halts=1, mortal=["reader"],
    ),
    "a reader comes after a dead one, both with a doorbell": scenario(
        {"writer0": rings(writer(), TELLS_BY_NUMBER), "reader": FIRST,
         "reader b": succeeds(with_doorbell(reader(claims=True), BY_HAND, fifo="doorbell1"))},
        start=FIFOS, halts=1, mortal=["reader"],
    ),
    "a reader closes, and the next one has a doorbell of its own": scenario(
        {"writer0": WRITES_BY_NUMBER, "reader": closes(with_doorbell(reader(1), BY_HAND, fifo="doorbell1")),
         "reader b": succeeds(with_doorbell(reader(claims=True), BY_HAND, fifo="doorbell2", inode=2))},
        start=FIFOS,
    ),
    "a doorbell that cannot be opened for a while": scenario(
        {"writer0": rings(writer(2, capacity=2), TELLS_THE_LAST), "reader": HAND_OF_TWO}, capacity=2
    ),
    "a doorbell of a writer": scenario({"writer0": WRITES_IN_A_LOOP, "reader": rings(reader())}, early=1),
}  # fmt: skip
SCENARIOS.update(DOORBELLS)
LONG["two threads wait for a doorbell, in loops"] = DOORBELLS["two threads wait for a doorbell, in loops"]
SLOW_DOORBELLS = {  # where not each fences for itself, or on "free" memory
    "two threads wait for a doorbell, by hand", "a doorbell by hand, and an exception",
    "a doorbell in a loop, and an exception", "a doorbell and a thread that sleeps",
    "a reader closes, and the next one has a doorbell of its own",
}  # fmt: skip


# ---------------------------------------------------------------- nothing is lost

FENCES = "each fences for itself", lambda program: program.replace("membarrier", "fence")
MEMBARRIER = "sleepers fence for all", lambda program: re.sub(r"(W4|R4|C1) +fence", "", program)
EVENTS = "bells are events", with_events
MODES = FENCES, MEMBARRIER, EVENTS
SLOW = {  # on "free" memory; on "tso", and most of it without the event, it is always tried
    FENCES: {
        "two writers, and one dies", "a writer comes after a dead one that slept",
        "two threads read", "two threads write",
    },
    MEMBARRIER: {
        "both sides sleep", "two writers", "two writers, and one dies", "a writer comes after a dead one that slept",
        "a reader comes after a dead one", "an exception in a writer", "two threads read", "two threads write",
    },
    EVENTS: {
        "two writers", "two writers, and one dies", "a writer comes after a dead one",
        "a writer comes after a dead one that slept", "a reader comes after a dead one", "an exception in a writer",
        "two threads read", "two threads write", "a long message", CLOSES,
    },
}  # fmt: skip


def case(*what, stress=False):
    names = [part if isinstance(part, str) else part[0] for part in what]
    return pytest.param(*what, id=", ".join(names), marks=[pytest.mark.stress] * stress)


def takes_long(name, memory, mode):
    if name in DOORBELLS:
        other = memory == "free" or mode is not FENCES
        return name in LONG or name in SLOW_DOORBELLS and other or memory == "free" and mode is not FENCES
    return name in LONG or memory == "free" and name in SLOW[mode]


def explore(name, memory, mode, edit=None, scenarios=SCENARIOS):
    """Run a scenario, with programs that `edit` has changed."""
    scenario = scenarios[name]
    programs = {who: mode[1](program) for who, program in scenario.programs.items()}
    if edit:
        edited = {who: mode[1](edit(who, program)) for who, program in scenario.programs.items()}
        assert edited != programs, "nothing was changed"
        programs = edited
    result = Model(programs, memory, scenario.start, **scenario.events).explore()
    print(f"{result.states:,} states. {result.loss}", *result.trace, sep="\n    ")
    return result


@pytest.mark.parametrize(
    ("name", "memory", "mode"),
    [
        case(name, memory, mode, stress=takes_long(name, memory, mode))
        for name in SCENARIOS
        for memory in ("tso", "free")
        for mode in ([EVENTS] if name in EVENTS_ONLY else MODES)
    ],
)
def test_nothing_is_lost(name, memory, mode):
    """In no interleaving is a message unread or room unused while the side concerned sleeps, nor a message torn."""
    result = explore(name, memory, mode)
    assert not result.loss and result.states > 500


# ---------------------------------------------------------------- what is lost without each part


def editing(who):
    """Make ``edit(program)`` an ``edit(name, program)`` that changes only the programs whose name begins so."""

    def decorate(edit):
        return lambda name, program: edit(program) if name.startswith(who) else program

    return decorate


def cut(label, who=""):
    """Leave out the lines under a label."""
    return editing(who)(lambda program: re.sub(rf"^\s*{label}\s.*\n", "", program, flags=re.M))


def change(old, new, who=""):
    """Put one text in another's place."""
    return editing(who)(lambda program: program.replace(old, new))


def move(label, before, who):
    """Put the one line that begins so before the first line that begins with something else."""

    @editing(who)
    def edit(program):
        (line,) = re.findall(rf"^\s*{label}\s.*\n", program, re.M)
        program = program.replace(line, "")
        at = re.search(rf"^\s*{before}\s", program, re.M).start()
        return program[:at] + line + program[at:]

    return edit


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
RING_AND_REMEMBER = "W5      ring [reader_bell]\n            rung = seen"
REMEMBER_AND_RING = "rung = seen\n    W5      ring [reader_bell]"
ROOM_OR_NOT = editing("reader")(
    lambda program: program.replace("rung0 = seen", "").replace("epoch<wanted order", "rung0 = seen")
)
EPOCHS_GO_ON = "epoch = [reader_parked]\n            if epoch % 2 == 0: begin\n            epoch = epoch + 1\n"
ALL_HAVE_LEFT = re.compile(r"if needs\d: left")


def of_events(pattern, replacement, who=""):
    """Edit what `with_events` makes of the programs."""

    def edit(name, program):
        return re.sub(pattern, replacement, with_events(program)) if name.startswith(who) else program

    return edit


RESET = "reset [reader_bell]\n"
NO_NEW_LANE = change("S4      new = [lane_used", "S4      new = [none", "reader")
REGISTER = r"( *share asleep\d = 1\n)((?:.*\n){2} *if heard_last.*\n)"
NEW_TOKEN = r"( *share heard .*\n)"
BELL_FIRST = r"take (\[alarm\d\]) (\[\w+\])((?:.*\n)*?.*which != )2", r"take \2 \1\g<3>1"
ROLE_FIRST = r"( *share heard(?:.*\n)*)( *release reader\n)", r"\2\1"
S1_LATE = r"( *S1 .*\n)((?:.*\n)*? *S2 .*\n)"


class Loss(NamedTuple):
    """A change of the protocol with which something is lost: in a scenario, on this memory, with these fences.

    What is lost on "tso" is lost on "free", unless an `order` there does what was left out; that is left to the
    stress test where no `order` is concerned. So is what is lost with any kind of bells, where they are events.
    """

    change: str
    edit: object
    scenario: str
    memory: str = "tso"
    modes: tuple = MODES
    also_on_free: bool = True


FUTEXES = FENCES, MEMBARRIER
NOBODY_REACHED = "membarrier reaches nobody"
EventLoss = partial(Loss, modes=(EVENTS,))
LOSSES = [
    Loss("clear, then wake", flags(CLEAR, WAKE), "two writers, and one dies", modes=FUTEXES),
    Loss("wake, then clear", flags(WAKE, CLEAR), "two writers", modes=FUTEXES),
    Loss("W5 is a plain wake", change("ring [reader_bell]", "wake [reader_bell]", "writer"), "both sides sleep"),
    Loss("R5 is a plain wake", change("ring [writer_bell0]", "wake [writer_bell0]", "reader"), "two threads write"),
    # Each fence.
    Loss("no W4", cut("W4"), "both sides sleep", modes=(FENCES,)),
    Loss("no R4", cut("R4"), "both sides sleep", modes=(FENCES,)),
    Loss("no S3 of the reader", cut("S3", "reader"), "both sides sleep"),
    Loss("no S3 of the writer", cut("S3", "writer"), "both sides sleep"),
    Loss("the reader's " + NOBODY_REACHED, change("membarrier", "fence", "r"), "both sides sleep", modes=(MEMBARRIER,)),
    Loss("the writer's " + NOBODY_REACHED, change("membarrier", "fence", "w"), "both sides sleep", modes=(MEMBARRIER,)),
    Loss("no order W1<W2", cut("W1<W2"), "both sides sleep", "free"),
    Loss("no order W2<W3", cut("W2<W3"), "both sides sleep", "free"),
    Loss("no order R1<R2", cut("R1<R2"), "both sides sleep", "free"),
    Loss("no order R2<R3", cut("R2<R3"), "both sides sleep", "free"),
    Loss("no order before S2 of the reader", cut("S1<S2", "reader"), "both sides sleep", "free", modes=FUTEXES),
    Loss("no order before S2 of the writer", cut("S1<S2", "writer"), "a long message", "free", modes=FUTEXES),
    # Each other step, and its place.
    Loss("no C1 of the writer", cut("C1", "writer"), "a writer comes after a dead one"),
    Loss("no C1 of the reader", cut("C1", "reader"), "a reader comes after a dead one"),
    Loss("no C1 after an exception in the writer", cut("C1", "writer"), "an exception in a writer"),
    Loss("no C1 after an exception in the reader", cut("C1", "reader"), "an exception in a reader"),
    Loss(
        "no fence in this C1",
        change("C1      fence", "", "reader"),
        "an exception in a reader",
        modes=(FENCES,),
        also_on_free=False,
    ),
    Loss("no S2 of the reader", cut("S2", "reader"), "both sides sleep"),
    Loss("no S2 of the writer", cut("S2", "writer"), "both sides sleep"),
    Loss("no S4 of the reader", cut("S4", "reader"), "both sides sleep"),
    Loss("no S4 of the writer", cut("S4", "writer"), "both sides sleep"),
    Loss("no look for a new lane in S4", NO_NEW_LANE, "a new lane", modes=FUTEXES),
    Loss("a lane counts as used only after W5", move(r"\[lane_used1\]", "written:", "writer"), "a new lane"),
    Loss("S1 after S2", move("S1", "S3", "reader"), "both sides sleep", modes=FUTEXES),
    Loss("S1 after S4", move("S1", "S5", "reader"), "both sides sleep", modes=FUTEXES),
    Loss("W5 before W3", move("W3", "written:", "writer"), "both sides sleep"),
    Loss("R5 before R3", move("R3", "freed0:", "reader"), "both sides sleep"),
    Loss("the epoch counts as rung although the room does not suffice", ROOM_OR_NOT, "a long message"),
    Loss("a claimant's epochs do not go on", change(EPOCHS_GO_ON, "epoch = 0\n", "reader b"), "two readers in turn"),
    Loss("S6 by the first that leaves", lambda name, text: ALL_HAVE_LEFT.sub("", text), "two threads write"),
    Loss("a thread asks for its own room, not the least", change("= least", "= wanted", "w"), "two threads write"),
    # Where bells are events.
    EventLoss("who hears it tells nobody", of_events("if which != 2: awake", "goto awake"), "two threads read"),
    EventLoss("the bell alone is waited for", of_events(r"which = take \[\w+\]", "take"), "two threads write"),
    EventLoss("no alarms", of_events(r"set \[alarm\d\]", ""), "two threads read"),
    EventLoss("no new token", of_events(NEW_TOKEN, ""), "two threads read"),
    EventLoss("a thread registers too late", of_events(REGISTER, r"\2\1"), "two threads read"),
    EventLoss("a new token too late", of_events(NEW_TOKEN + r"(.*\n)", r"\2\1"), "two threads read"),
    EventLoss("the token is noted after S2", of_events(S1_LATE, r"\2\1"), "two threads read"),
    EventLoss("the bell is reset after S2", of_events("(S2 .*\n)", r"\1" + RESET, "reader"), "both sides sleep"),
    EventLoss("the bell is reset, or made, for S5", of_events("( *S5 )", RESET + r"\1", "reader"), "both sides sleep"),
    EventLoss("the bell before the alarm", of_events(*BELL_FIRST), CLOSES),
    EventLoss("closing makes no new token", of_events(NEW_TOKEN, "", "closer"), CLOSES),
    EventLoss("closing sets no alarms", of_events(r"set \[alarm\d\]", "", "closer"), CLOSES),
    EventLoss("the role is free before the threads know", of_events(*ROLE_FIRST, "closer"), CLOSES),
]

# Of doorbells. One kind of fences will do, but where it is said otherwise.
HELD, LOOPED = "a doorbell by hand", "a doorbell in a loop"
EXCEPTION = "a doorbell by hand, and an exception"
STREAMED = "a doorbell in a loop with a stream"
THREADED = "a doorbell and a thread that sleeps"
SUCCEEDED = "a reader comes after a dead one with a doorbell"
ANOTHER = "a reader closes, and the next one has a doorbell of its own"
UNOPENED = "a doorbell that cannot be opened for a while"
TWO_WAIT, TWO_LOOP = "two threads wait for a doorbell, by hand", "two threads wait for a doorbell, in loops"


def of_reader(pattern, replacement):
    return editing("reader")(lambda program: re.sub(pattern, replacement, program))


KEEPS_EPOCH = r"armed = 0\n( *reset .doorbell.\n) *armed = 0\n", r"\1"
STAYS_ARMED = r"( *if quick != 2: busy\n) *armed = 0\n((?:.*\n){2}) *armed = 0\n", r"\1\2"
HEARS_LATE = r"( *S5 .*\n *armed = 0\n)( *reset \[doorbell\]\n)", r"\2\1"
TOLD_LATE = r"( *\[reader_doorbell\] = [57].*\n)((?:.*\n)*? *S2 .*\n)", r"\2\1"
PUT_DOWN_LATE = r"( *reset \[told\d\]\n *share down\d = 1\n)((?:.*\n)*?)( *S5 )", r"\2\1\3"
BellLoss = partial(Loss, modes=(FENCES,), also_on_free=False)
LOSSES += [
    BellLoss("no byte for the doorbell", change("fill [doorbell]", "reset [another]", "writer"), HELD, modes=MODES),
    BellLoss("the doorbell is heard after S4", move("rung = reset", "S5", "reader"), HELD, modes=FUTEXES),
    BellLoss("the doorbell is heard after S2", move("rung = reset", "S3", "reader"), HELD, modes=FUTEXES),
    BellLoss("no S3 of the doorbell", cut("S3", "reader"), HELD, modes=MODES),
    BellLoss("no S4 of the doorbell", cut("S4", "reader"), HELD, modes=MODES),
    BellLoss("it was rung, and no epoch is begun", change(" and rung == 0: still", ": still", "reader"), HELD),
    BellLoss("it counts as armed meanwhile", of_reader(r"armed = 0\n( *rung = )", r"\1"), EXCEPTION),
    BellLoss("no order epoch<doorbell", cut("epoch<doorbell"), HELD, "free", modes=MODES),
    BellLoss("no fence in the writer's C1", change("C1      fence", "", "writer"), EXCEPTION),
    BellLoss("the loop hears after S4", of_reader(*HEARS_LATE), LOOPED),
    BellLoss("hearing ends no epoch", of_reader(*KEEPS_EPOCH), LOOPED),
    BellLoss("it stays armed when its epoch is ended", of_reader(*STAYS_ARMED), STREAMED),
    BellLoss("alone, although a thread sleeps", change("5 if needs0 else 7", "7", "reader"), THREADED),
    BellLoss("it is told after S2 that it is not alone", of_reader(*TOLD_LATE), THREADED),
    BellLoss("S6 by a thread, with a doorbell", lambda name, text: ALL_HAVE_LEFT.sub("", text), THREADED),
    BellLoss("who heard and found something keeps it", change(FOUND_BY_HAND, "", "reader"), TWO_WAIT),
    BellLoss("who hears wakes no other loop's tasks", change("fill [told", "fill [another", "reader"), TWO_LOOP),
    BellLoss("a task is put down after it is armed", of_reader(*PUT_DOWN_LATE), TWO_LOOP),
    BellLoss("hearing changes no token", of_reader(r" *share token = token \+ 1\n", ""), TWO_LOOP),
    BellLoss("the next reader has the same number", change("state // 4 + 1", "state // 4", "reader b"), ANOTHER),
    BellLoss("what is said of a doorbell outlives it", change(DETACHED, "", "reader b"), SUCCEEDED),
    BellLoss("it counts as rung although it was not", change("seen if told else 0", "seen", "writer"), UNOPENED),
]


@pytest.mark.parametrize(
    ("loss", "memory", "mode"),
    [
        case(
            loss, memory, mode,
            stress=memory != loss.memory or mode is EVENTS and loss.modes is MODES or loss.scenario == TWO_LOOP,
        )
        for loss in LOSSES
        for memory in sorted({loss.memory, "free" if loss.also_on_free else loss.memory})
        for mode in loss.modes
    ],
)  # fmt: skip
def test_the_checker_finds_what_is_lost(loss, memory, mode):
    """Every part of the protocol is needed: a message, room, or a message's bytes are lost without it."""
    assert explore(loss.scenario, memory, mode, loss.edit).loss


# What the checker says is not needed. It stays: it costs little, and its absence would take explaining.
SPARE = [
    Loss("no order epoch<wanted", cut("epoch<wanted"), "two threads write", "free"),
    # Events are remembered when nobody sleeps, also the one of C1, and what is noted is no word in the memory.
    EventLoss("no look for a new lane in S4", NO_NEW_LANE, "a new lane"),
    EventLoss("no order before S2 of the reader", cut("S1<S2", "reader"), "both sides sleep", "free"),
    EventLoss("no order before S2 of the writer", cut("S1<S2", "writer"), "a long message", "free"),
    Loss("no order epoch<wanted, one thread", cut("epoch<wanted"), "a long message", "free"),
    Loss("wanted after the order", move(r"\[writer_wanted0\]", "note its_epoch", "w"), "a long message", "free"),
    # To wait again a writer wants more than before, which is another epoch.
    BellLoss("no order epoch<wanted, with a doorbell", cut("epoch<wanted"), "a doorbell of a writer", "free"),
    BellLoss("one new token where a loop hears", of_reader(r"( *reset \[doorbell\]\n) *share .*\n", r"\1"), TWO_LOOP),
    Loss("rung before the ring", change(RING_AND_REMEMBER, REMEMBER_AND_RING, "writer"), "an exception in a writer"),
]


@pytest.mark.parametrize(
    ("spare", "mode"),
    [
        case(spare, mode, stress=spare.memory == "free" or spare.scenario == TWO_LOOP)
        for spare in SPARE
        for mode in spare.modes
    ],
)
def test_what_is_there_for_good_measure(spare, mode):
    """Without it nothing is lost either. A failure says that a change made it needed."""
    assert not explore(spare.scenario, spare.memory, mode, spare.edit).loss


# ---------------------------------------------------------------- the code does what the programs do

# The labels in each method, in the order in which they stand there; the first of `_ring` and `_make_good` is
# in their docstring.
METHODS = {
    "Parking._steps": "S6 S1 S1<S2 S2",
    "Parking.park": "S3 S4 S5 T7",
    "Parking.arm": "S3 S4",
    "ReaderBells.ring": "W5 epoch<doorbell",
    "Writer._publish": "W2<W3 W3 W4 W5",
    "Writer._slowest": "joined<read_pos",
    "Writer._room": "W1 W1<W2 W2",
    "Writer._give_up": "W2",
    "Writer._announce": "D1 D1<W2 mark_count<mark_pos",
    "Writer._gather": "W2 W2",
    "Writer._write_batch": "W2",
    "Writer._store": "W2 W2",
    "Writer._make_good": "C1",
    "Writer._steps": "W2 W2 W2 W2<W3 W3 W4 W5",
    "Reader._join": "J1 J2 J3",
    "Reader._end_of": "J3",
    "Reader._count": "write_pos<mark_pos",
    "Reader._lapped": "R2<D2 D2",
    "Reader._pass_over": "given_up<mark_pos",
    "Reader._make_good": "C1",
    "Reader._look": "R1 R1<R2",
    "Reader._free": "R2<R3 R3 R4 R5",
    "Reader._ring": "R5 epoch<wanted",
    "Reader._read_one": "R2 R2",
    "Reader._borrow": "R2",
    "Reader._read_batch": "R2 R2",
    "Reader._steps": "R1 R1 R1<R2 R2 R2<R3 R3 R4 R5 R2 R2 R2<R3 R3 R4 R5",
    "CompetingReader._take": "T1 T2 T3 T3<R1",
    "CompetingReader._take_over": "X1 X2 turn_before<turn X2 X3 X4 X4<R1 X4 X5 X6",
    "CompetingReader._give": "R3<T4 T4 T5 T6",
    "CompetingReader._end_turn": "R3<T4 T4 X5",
    "CompetingReader._copy_ahead": "R1 R1<R2 R2 R2 R2 R2<read_pos",
    "CompetingReader._look_inside": "R1 R1<R2",
    "CompetingReader._steps": "T1 T2 T3 T3<R1 R3 R3<T4 T4 T5 R5 T6",
}
# The ways through them, along their calls, are the ways through the programs.
WAYS = [
    # _make_good, _room, _steps, ReaderBells.ring; or _make_good, _room, _write_batch, _publish, ReaderBells.ring
    (WRITER, "C1 W1 W1<W2 W2 W2<W3 W3 W4 W5 epoch<doorbell W5"),
    # _make_good, _look; or _make_good, _steps
    (READER.replace("{made_good}", MADE_GOOD).replace("{looked}", LOOKED), "C1 R1 R1<R2"),
    # _steps, _ring; or _read_one, _free, _ring; or _read_batch, _free, _ring
    (TAKEN, "R2 R2<R3 R3 R4 R5 epoch<wanted R5"),
    # _steps, park, _steps
    (PARK.replace("{look}", "S4 look"), "S1 S1<S2 S2 S3 S4 S5 S6"),
]
LABEL = re.compile(
    r"# (?:(?P<label>[WRSJDTX]\d|C1)\b|ORDER (?:(?!before)(?P<before>\w+) )?(?:.*? )??before (?P<after>\w+))"
)

# How the code says what a program's step is.
# In an index; without any it is a record.
WORDS = (
    "write_pos", "read_pos", "parked", "asleep", "wanted", "used", "bell", "joined", "given_up", "mark_pos",
    "mark_count", "before", "turn", "inside",
)  # fmt: skip
CALLS = {
    "order": "order", "_order": "order", "fence": "fence", "_fence": "fence", "sleeper_fence": "membarrier",
    "ring": "ring bell", "note": "load bell", "wait": "wait bell", "nothing": "look", "pack": "store record",
    "unpack": "load record", "split_run": "load record", "split_mixed": "load record", "bytes": "load record",
    "claim": "claimed = try claim", "release": "release claim", "_is_inside": "load inside",
    "_make_even": "store parked", "_ring": "load parked",
}  # fmt: skip


def access(what, text):
    return f"{what} {next((name for name in WORDS if name in text.lower()), 'record')}"


def steps(program):
    """(label, access) for each line of a program that has a label or remembers what was rung."""
    forms = {
        "store": r"\[(.*?)\] = ", "load": r"[\w{}]+ = \[(.*?)\]", "ring": r"ring \[(.*)\]", "wait": r"wait \[(.*)\]",
    }  # fmt: skip
    for _, label, text in lines(program):
        matches = [(what, re.match(form, text)) for what, form in forms.items()]
        found = [access(what, match[1]) for what, match in matches if match]
        if re.match(r"rung\S* = seen", text):
            yield "", "rung"
        elif label:
            yield label, found[0] if found else text


def last_name(node):
    return getattr(node, "attr", getattr(node, "id", ""))


MEMORY = "words", "bells", "map", "ring", "_bytes", "sleepers", "_asleep"


def accesses(node):
    """What a statement does with shared memory, in the order of the text: a whole method, else without its body."""
    body = [] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
    left_out = {id(n) for child in body for n in ast.walk(child)}
    found = []
    for n in ast.walk(node):
        what = None
        store = isinstance(getattr(n, "ctx", None), ast.Store)
        if isinstance(n, ast.Subscript) and last_name(n.value) in MEMORY:
            what = access("store" if store else "load", ast.unparse(n))
        elif isinstance(n, ast.Subscript) and last_name(n.value) == "entry" and store:
            what = "rung"
        elif isinstance(n, ast.Call):
            what = CALLS.get(last_name(n.func))
        elif isinstance(n, ast.Attribute) and store and n.attr == "rung":
            what = "rung"
        elif isinstance(n, ast.Attribute) and n.attr == "read_pos" and last_name(n.value) == "self":
            what = "load read_pos"
        if what and id(n) not in left_out:
            found.append((n.lineno, n.col_offset, what))
    return [what for _, _, what in sorted(found)]


FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef


def methods(source):
    """The name and the tree of each method."""
    classes = [part for part in ast.parse(source).body if isinstance(part, ast.ClassDef)]
    return {f"{c.name}.{f.name}": f for c in classes for f in c.body if isinstance(f, FUNCTIONS)}


def labelled(source):
    """For each method with labels: (label, statement) for each, as they stand there."""
    source_lines = source.splitlines()
    found = {}
    for name, method in methods(source).items():
        whole = re.match(r"(C1|[WR]5)[:,] ", ast.get_docstring(method) or "")
        labels = [(whole[1], method)] if whole else []
        for number in range(method.lineno + 1, method.end_lineno + 1):
            match = LABEL.search(source_lines[number - 1])
            if match:
                alone = source_lines[number - 1].strip().startswith("#")  # then it belongs to the next line
                statements = [n for n in ast.walk(method) if isinstance(n, ast.stmt) and n.lineno <= number + alone]
                before, after = match["before"] or "", match["after"]
                labels.append((match["label"] or f"{before}<{after}", max(statements, key=lambda n: n.lineno)))
        if labels:
            found[name] = labels
    return found


def drift(source):
    """Where the source does not do what the programs do."""
    wrong = []
    known = {}
    import test_broadcast_protocol as several  # these two have the rest from here
    import test_compete_protocol as competing

    others = several.JOIN, several.SLOWEST, several.OVERTAKES, several.OVERTAKEN, several.COUNTS, several.RING
    for program in (WRITER, READER, PARK, MADE_GOOD, LOOKED, TAKEN, "S4 look", *others, competing.EVERYTHING):
        for label, what in steps(program):
            known.setdefault(label, set()).add(what)
    found = labelled(source)
    for name in sorted({*METHODS, *found}):
        labels = " ".join(label for label, _ in found.get(name, []))
        if labels != METHODS.get(name, ""):
            wrong.append(f"{name} has the labels {labels}, not {METHODS.get(name, '')}")
        for label, statement in found.get(name, []):
            what = accesses(statement)
            if not known.get(label, set()) & set(what):
                wrong.append(f"{name}, line {statement.lineno}: {label} is {what}, in the programs {known.get(label)}")
    # Between its look and its ring a waker does more than the labels say.
    for name, program, label in (("ReaderBells.ring", WRITER, "W5"), ("Reader._ring", TAKEN, "R5")):
        rest = list(steps(program))
        rest = [what for _, what in rest[[found for found, _ in rest].index(label) :]]
        rest = rest[: rest.index("rung") + 1]
        done = accesses(methods(source)[name])
        if done != rest:
            wrong.append(f"{name} does {done}, the program does {rest}")
    return wrong


def test_the_code_has_the_steps_of_the_programs():
    """Every label stands where a program has it, at a statement that does what the program's step does."""
    assert drift(SOURCE) == []


@pytest.mark.parametrize(("program", "way"), WAYS, ids=["writer", "reader looks", "reader takes", "sleeper"])
def test_the_programs_have_the_labels_in_the_codes_order(program, way):
    """The methods' labels, put together along the calls, are a program."""
    labels = [label for label, _ in steps(program) if label]
    assert [label for i, label in enumerate(labels) if label not in labels[i - 1 : i]] == way.split()


# What `WAIT_FOR_TWO` and `TELL` say, in the methods of the backend whose bells are events.
EVENT_STEPS = {
    "Segment.wait": [
        "asleep[number] = alarm",
        "if self._heard.get(bell) is noted",
        "both = _Two(number, self._bell(bell).value)",  # the alarm first
        "_wait_for_one(2, both, False, ",
        "asleep.pop(number, None)",
        "if heard",
        "self.wake(bell)",
    ],
    "Segment.wake": [
        "self._heard[bell] = object()",
        "in list(self._asleep.get(bell, {}).values())",
        "_set_event(alarm)",
    ],
}
EVENT_CALLS = {  # what the other programs' steps come to
    "Segment.note": "self._bell(bell)",  # made before S2: what is rung from then on is remembered
    "Segment.ring": "_set_event(self._bell(bell))",
    "Segment.sleeper_fence": "make_fence(TSO)()",
    "Segment.waker_fence": "make_fence(TSO)",
}


def test_the_events_code_has_the_steps_of_the_programs():
    """They stand there once each in this order, but for what is done again after an exception."""
    found = methods(EVENTS_SOURCE)
    for name, steps in EVENT_STEPS.items():
        text = ast.unparse(found[name]).split("except BaseException")[0]
        places = [text.find(step) for step in steps]
        assert -1 not in places and places == sorted(places), name
        assert [text.count(step) for step in steps] == [1] * len(steps), name
    for name, call in EVENT_CALLS.items():
        assert call in ast.unparse(found[name]), name


# What the programs with a doorbell say, in the methods that have it: each of these as often as here, in this order.
NEW = "self._token = object()"
DOORBELL_STEPS = {
    "Parking.__init__": ["_make_even(segment.words, self._parked)", "segment.words[self._state] = "],  # DETACHED
    "Parking._steps": [
        "doorbell = self._segment.doorbell(self._bell)",  # ATTACH
        "doorbell.heard()",
        "words[state] = (words[state] >> 2) + 1 << 2 & WORD | _layout.ATTACHED",
        "words[self._wanted] = ",  # EPOCH
        "if len(sleepers) == 1 and self.doorbell in sleepers",
        "words[state] = words[state] & ~_layout.ALONE & WORD | alone",
        "order()",
        "words[parked] = ",
    ],
    "Parking.arm": [  # BY_HAND, IN_A_LOOP, DOORBELL_THREAD
        "token = self._token",
        "armed, self._armed = (self._armed, (-1, None))",
        "rung = doorbell.heard() if heard is None else heard",
        "if rung or armed != (needs, token)",
        "self._monitor.enter((doorbell, needs))",
        "self._segment.sleeper_fence()",
        "self._armed = (needs, token)",
        "if nothing()",
        "return True",
        "if rung:",
        "doorbell.ring()",
    ],
    "Parking.hear": [NEW, "try:", "self.doorbell.heard()", "finally:", NEW],  # HEAR
    "Parking.disarm": [NEW, "try:", "self._monitor.enter((self.doorbell, None))", "finally:", NEW],  # STREAM
    "Parking.close": [  # CLOSES_ITS_OWN
        "self._sleepers.clear()",
        "self._monitor.enter((None, None))",
        "self._segment.words[self._state] = ",
        "self.doorbell.remove()",
    ],
    "Reader.close": ["self.parking.close()", "self._segment.release(_layout.READER + self.slot)"],
    "ReaderBells.ring": ["rung = segment.ring(", "entry[2] = epoch if rung else -1"],  # RING
    "Segment.ring": [
        "state = self.words[bell + _layout.DOORBELL >> 3]",
        "if state & _layout.ATTACHED:",
        "rung = self._doorbells.ring(bell, state >> 2, ",
        "if state & _layout.ALONE:",
        "return rung",
        "_quick(_FUTEX, ",
        "return rung",
    ],
    "Doorbells.ring": [  # TELLS_BY_NUMBER, TELLS_THE_LAST
        "known != number or (not doorbell.ring())",
        "doorbell = Doorbell(*where(bell))",
        "return error.errno not in ",
        "self._open[bell] = (number, doorbell)",
    ],
    "Watch.wait": [  # PUT_DOWN, WAKE
        "self._waiting.append(entry)",
        "if not self.parking.arm(",
        "self._wake()",
        "await future",
    ],
    "Watch._heard": ["self.parking.hear()", "finally:", "self._wake("],
}


def test_the_doorbells_code_has_the_steps_of_the_programs():
    """In the methods that the programs with a doorbell were made from."""
    found = {}
    for source in DOORBELL_SOURCES:
        found.update(methods(source))
    for name, steps in DOORBELL_STEPS.items():
        text = ast.unparse(found[name])
        assert re.search(".*".join(map(re.escape, steps)), text, re.DOTALL), name
        assert [text.count(step) for step in steps] == [steps.count(step) for step in steps], name


PLANTED = [
    ("Writer._steps", "# W2", "# ORDER W2"),
    ("Writer._steps", "# ORDER W2", "# W3"),
    ("Writer._steps", "# W3", "# W4"),
    ("Writer._publish", "# ORDER W2", "# W3"),
    ("Writer._publish", "# W3", "# W4"),
    ("Writer._publish", "# W3", "self._bells.ring()"),
    ("Writer._room", "# W1", "# ORDER W1"),
    ("ReaderBells.ring", ".ring(", "entry[2] = epoch"),
    ("Reader._look", "# R1", "# ORDER R1"),
    ("Reader._steps", "# R1", "# ORDER R1"),
    ("Reader._steps", "# R2", "# R3"),
    ("Reader._free", "# ORDER R2", "# R3"),
    ("Reader._free", "# R3", "# R4"),
    ("Reader._ring", "# ORDER", ".ring("),
    ("Reader._ring", ".ring(", "lane.rung = epoch"),
    ("CompetingReader._steps", "# T1", "# T2"),
    ("CompetingReader._steps", "# R3", "# T4"),
    ("CompetingReader._steps", "# T4", "# T5"),
    ("CompetingReader._take", "# T1", "# T2"),
    ("CompetingReader._give", "# T4", "# T5"),
    ("CompetingReader._take_over", "before turn", "# X2"),
    ("CompetingReader._take_over", "# X2", "before turn"),
    ("Parking._steps", "# S1", "# S2"),
    ("Parking._steps", "before S2", "# S2"),
    ("Parking.park", "# S3", "# S5"),
]


@pytest.mark.parametrize("comments", [True, False], ids=["with their labels", "without their labels"])
@pytest.mark.parametrize(("method", "first", "second"), PLANTED)
def test_lines_that_were_swapped_are_noticed(method, first, second, comments):
    """Swap two lines of the source, or what they do and not their labels."""
    source = SOURCE.splitlines(keepends=True)
    node = methods(SOURCE)[method]
    inside = range(node.lineno, node.end_lineno)
    a, b = (next(i for i in inside if part in source[i]) for part in (first, second))
    texts = [re.fullmatch(r"(\s*)(.*?)(\s*(?:#.*)?\n)", source[i]).groups() for i in (a, b)]
    (space_a, code_a, end_a), (space_b, code_b, end_b) = texts
    source[a] = space_a + code_b + (end_b if comments else end_a)
    source[b] = space_b + code_a + (end_a if comments else end_b)
    assert drift("".join(source))


def test_each_labelled_line_that_is_left_out_is_noticed():
    """Put `pass` in the place of each statement that has a label, one after another."""
    planted = 0
    for labels in labelled(SOURCE).values():
        for _, statement in labels:
            if not isinstance(statement, (ast.If, ast.While, ast.FunctionDef)):
                source = SOURCE.splitlines(keepends=True)
                line = source[statement.lineno - 1]
                source[statement.lineno - 1] = line.replace(line.split("#")[0].strip(), "pass")
                assert drift("".join(source)), f"line {statement.lineno}"
                planted += 1
    assert planted > 30
