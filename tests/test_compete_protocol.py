"""What `test_protocol.py` does, for readers that compete: by turns, which one takes over from another.

The programs are of one lane. A reader "x" has a slot of its own, with the cells `inside_x`, `reader_parked_x` and so
on; the role is `reader_x`, so a successor in the same slot has the same ones. Its `ours` is (joined, slot, 1) in a
number. A message is taken where R3 is: the checker keeps count there, so that one that is taken twice, or out of
order, is "torn" too; and so is any look at a message while another living reader is inside.

What a process remembers between its turns is old by the next one, and so it is loaded anew in the programs. A reader
that finds that it is not its turn takes it over at once, as for a request; who has patience does T1 to T3 a few times
more before. A waker rings the first reader that sleeps, from the same slot on each time.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import test_protocol
from conftest import WINDOWS
from test_protocol import FENCES, PARK, case, change, cut, editing, fill, scenario

if WINDOWS:
    pytest.skip("runs no code of the platform; the same source is checked on Linux", allow_module_level=True)

# ---------------------------------------------------------------- the programs

WRITER = """
            left = {messages}
            goto known
    known:
            pos = [write_pos0]
    next:
            if left == 0: leave
    W1      free = [read_pos0]
    W1<W2   order
            if pos - free == {capacity}: park
    W2      [record0 + pos % {capacity}] = pos + 1
            pos = pos + 1
    W2<W3   order
    W3      [write_pos0] = pos
    W4      fence
            {ring}
            note acked0 = pos
            left = left - 1
            goto next
    park:
            wanted = pos + 1 - {capacity}
            {park}
    leave:
            end
"""
# One that sleeps; `rung` is where it goes on.
RING = """
    {asleep}
    W5      seen = [reader_parked_{x}]
            if seen % 2 == 0 or seen == last_{x}: not_{x}_{mark}
    epoch<doorbell order
    W5      ring [reader_bell_{x}]
            last_{x} = seen
            goto rung_{mark}
    not_{x}_{mark}:
"""
READER = """
            waits = {waits}
            left = {messages}
            {start}
    known:
    try:
    next:
            if left == 0: {done}
            pos = [read_pos0]
            end = [write_pos0]
            if pos == end: park
            {ahead}
            {take}
    T3<R1   order
            check {alone}
            note within_{x} = 1
            {taken}
    R3<T4   order
    T4      [inside_{x}] = 0
    T5      fence
            {free}
            {passes}
            goto next
    park:
            if waits == 0: leave
            waits = waits - 1
            {park}
    except:
            {handler}
            {good}
    leave:
    S3      membarrier
            {passes_on}
    done:
            end
"""
# To `refused`, or on.
TAKE = """
    {again}:
    T1      [inside_{x}] = 1
    T2      fence
    T3      now = [turn]
            if now == {ours}: {mine}
    not_{mine}:
            [inside_{x}] = 0
            {take_over}
            goto {again}
    {mine}:
"""
TAKE_OVER = """
    over_{mark}:
    X1      claimed = try claim
            if claimed == 0: {refused}
    X2      now = [turn]
            if now % 2 == 0: half_{mark}
    X2      [turn_before] = now
    turn_before<turn order
    half_{mark}:
    X2      [turn] = {ours} - 1
    X3      membarrier
    X4      now = [turn_before]
            {inside}
    X5      release claim
            claimed = 0
            {still}
            goto {refused}
    free_{mark}:
    X4<R1   order
    X4      [turn] = {ours}
    X5      release claim
            claimed = 0
"""
# Of each other slot: to `free`, or on if that one is inside.
INSIDE = """
            if now // 2 % 4 != {slot}: not_{y}_{free}
    {label}      there = [inside_{y}]
            if there == 0: {free}
            {joined}
    {label}      there = held reader_{y}
            if there: inside_{free}
            {dead}
            goto {free}
    not_{y}_{free}:
"""
JOINED = """
    {label}      there = [joined_{y}]
            if there != now // 8: {free}
"""
TAKEN = """
            pos = [read_pos0]
            {copied}
    R1      end = [write_pos0]
    R1<R2   order
            if pos == end: nothing
    R2      copy = [record0 + pos % {capacity}]
    R2<R3   order
    copied:
            check copy == pos + 1 and taken0 == pos
            pos = pos + 1
    R3      [read_pos0] = pos
            note taken0 = pos
            left = left - 1
    nothing:
            note within_{x} = 0
"""
# Two records, of which others may take the first one, or both.
AHEAD = """
            many = 0
            at = pos
            if end > pos + {capacity}: ahead
            many = end - pos
    R1<R2   order
    R2      first = [record0 + pos % {capacity}]
            if end == pos + 1: ahead
    R2      second = [record0 + (pos + 1) % {capacity}]
    ahead:
    R2<read_pos order
"""
COPIED = """
            if pos < at or pos >= at + many: look
            copy = first if pos == at else second
            goto copied
    look:
"""
FREE = """
    R5      seen = [writer_parked0]
            if seen % 2 == 0 or seen == last: freed
    epoch<wanted order
    R5      wanted = [writer_wanted0]
            if pos < wanted: freed
    R5      ring [writer_bell0]
            last = seen
    freed:
            note freed0 = pos
"""
PASSES = """
    T6      read = [read_pos0]
    T6      end = [write_pos0]
            if read == end: rung_{mark}
            {ring}
"""
LOOK = """
    S4      read = [read_pos0]
    S4      end = [write_pos0]
            if read == end: refused
    T3      now = [turn]
            if now != {ours}: not_found
            {take}
    R3<T4   order
    T4      [inside_{x}] = 0
    T5      fence
            {passes}
            goto awake
    refused:
"""
HANDLER = """
    R3<T4   order
            note within_{x} = 0
            [inside_{x}] = 0
            if claimed == 0: mend
    X5      release claim
    mend:
            epoch = epoch + epoch % 2
    S6      [reader_parked_{x}] = epoch
"""
MADE_GOOD = """
    C1      fence
    C1      seen = [writer_parked0]
            if seen % 2 == 0: good
    C1      ring [writer_bell0]
    good:
"""
JOIN = """
            claim reader_{x}
            note within_{x} = 0
            [inside_{x}] = 0
            [joined_{x}] = {number}
            epoch = [reader_parked_{x}]
            if epoch % 2 == 0: known
            epoch = epoch + 1
            [reader_parked_{x}] = epoch
"""
ASLEEP = """
    {label}      there = [asleep_{x}]
            if there == 0: not_{x}_{mark}
"""
SLOTS = "abc"


def ring(mark, readers, label="W5", asleep=False):
    asks = fill(ASLEEP, label=label) if asleep else ""
    return "".join(fill(fill(RING, asleep=asks), x=x, mark=mark) for x in readers) + f"rung_{mark}:\n"


def passes(mark, readers, asleep):
    return fill(PASSES, ring=ring(mark, readers, "T6", asleep), mark=mark)


def sleeps(park, x):
    """A byte for each reader tells that it sleeps, beside its epoch."""
    park = re.sub(r"^( *S2 .*\n)", rf"\1[asleep_{x}] = 1\n", park, flags=re.M)
    return re.sub(r"^( *S6 .*\n)", rf"\1[asleep_{x}] = 0\n", park, flags=re.M)


def writer(messages=1, capacity=2, readers="ab", asleep=False):
    look = "S4 free = [read_pos{lane}]\nif free >= wanted: awake"
    park = fill(PARK, me="writer", announce="[writer_wanted0] = wanted", look=look, lane=0)
    parts = {"messages": messages, "capacity": capacity}
    return fill(WRITER, park=park, ring=ring("w", readers, "W5", asleep), **parts)


def ours(x, number=1):
    return number * 8 + SLOTS.index(x) * 2 + 1


def reader(x, messages=9, waits=9, capacity=2, readers="ab", number=1, joins=False, **parts):
    """Takes up to so many messages, and sleeps for one so many times; then its time is up.

    Args:
        ahead: It copies messages before its turn.
        waited: A writer may wait for the room.
        asleep: Wakers look first at a byte for each.
        slots_pass: X4 is to tell readers of one slot from each other.
        raises: Exceptions come.
    """

    def has(part):
        return parts.get(part, False)

    others = [y for y in readers if y != x]

    def inside(label, free, dead=""):
        asks = JOINED if has("slots_pass") else ""
        each = (fill(fill(INSIDE, joined=asks, dead=dead), y=y, slot=SLOTS.index(y)) for y in others)
        return fill("".join(each) + "goto {free}\ninside_{free}:\n", label=label, free=free)

    def take(again, mine, refused):
        looks = {"inside": inside("X4", "free_" + mine, "note within_{y} = 0"), "still": inside("X6", "over_" + mine)}
        return fill(TAKE, take_over=fill(fill(TAKE_OVER, **looks), mark=mine, refused=refused), again=again, mine=mine)

    first = take("take", "have", "park")
    look = fill(LOOK, take=take("probe", "found", "refused"), passes=passes("s", readers, has("asleep")))
    park = fill(PARK, me="reader", lane="_" + x, announce="", look=look)
    park = re.sub(r"^( *S6 .*\n)", r"\1    T7      membarrier\n", park, flags=re.M)
    program = fill(
        READER,
        start=fill(JOIN, number=number) if joins else "goto known",
        ahead=AHEAD if has("ahead") else "",
        take=first,
        alone=" and ".join(f"within_{y} == 0" for y in others),
        taken=fill(TAKEN, copied=COPIED if has("ahead") else ""),
        free=FREE if has("waited") else "",
        passes=passes("t", others, has("asleep")),
        park=sleeps(park, x) if has("asleep") else park,
        handler=HANDLER if has("raises") else "",
        good=MADE_GOOD if has("raises") and has("waited") else "",
        passes_on=passes("p", others, has("asleep")),
        done=parts.get("done", "done"),
    )
    if not has("raises"):
        program = program.replace("    try:\n", "").replace("    except:\n", "")
    if messages == 9:
        program = re.sub(r".*\bleft\b.*\n", "", program)
    if not has("ahead"):
        program = program.replace("pos = [read_pos0]", "pos = taken0", 1)  # a hint
    if not has("kills"):
        program = brief(program)
    return fill(program, x=x, ours=ours(x, number), messages=messages, waits=waits, capacity=capacity)


def brief(program):
    """Without steps that nobody can come between, as nobody dies: what is only looked at while the claim is held."""
    program = re.sub(r"X2 +now = \[turn\]", "now = turn", program)
    program = re.sub(r"X2 +\[turn_before\] =", "note turn_before =", program)
    program = re.sub(r"X4 +now = \[turn_before\]", "now = turn_before", program)
    return re.sub(r"X\d +there = held .*", "there = 1", program)


def published(messages):
    """There are so many messages already."""
    return {"record0": [n + 1 for n in range(messages)], "write_pos0": messages, "acked0": messages}


def turns(programs, capacity=2, start=None, **events):
    """The cells of `scenario`; it is a's turn, and all readers that do not join are there."""
    begin = {"turn": ours("a"), **{f"joined_{x}": 1 for x in SLOTS}, **(start or {})}
    made = scenario(programs, 1, capacity, begin, **events)
    for i, (name, program) in enumerate(programs.items()):
        if name.startswith("reader") and "claim reader" not in program:
            made.start[f"reader_{name[-1]}"] = i + 1
    return made


def both(a=None, b=None, **parts):
    return {"reader a": reader("a", **{**parts, **(a or {})}), "reader b": reader("b", **{**parts, **(b or {})})}


KILLS = {"kills": True}
EVERYTHING = reader("a", ahead=True, waited=True, asleep=True, slots_pass=True, raises=True, joins=True, **KILLS)


def three(**parts):
    return {f"reader {x}": reader(x, 1, 0, 3, "abc", **parts) for x in "abc"}


READERS = ["reader a", "reader b"]
AHEAD_OF = {"ahead": True, "waited": True}
REUSE = {"slots_pass": True, **KILLS}
READERS = ["reader a", "reader b"]
SPINS = writer(1, 2).replace("{capacity}: park", "2: next").replace("2: park", "2: next")
FAST = {"ahead": True, "waits": 0}
LATER = {"reader b": reader("b", 9, 0, slots_pass=True, **KILLS)}
LATER["reader b, later a"] = reader("a", 9, 0, number=2, joins=True, slots_pass=True, **KILLS)
A_PLACE_IS_TAKEN = {"reader a": reader("a", 1, 0, slots_pass=True, **KILLS), **LATER}
FIND_ONE, FIND_TWO, THREE = "two find a message", "two find two messages", "three take over"
WAIT, DIES = "two wait for a message", "two find a message, and one dies"
PLACE = "one dies, and another takes its place"
COPIES, TIME, ONE_TAKES = "two copy ahead", "two wait for a message, and time is up", "one takes one and leaves"
RAISES, ROOM = "an exception in a reader", "a writer waits for room"
TWO = "two wait, and one takes the first of two messages"
SCENARIOS = {
    FIND_ONE: turns(both(waits=1), start=published(1)),
    FIND_TWO: turns(both(waits=1), start=published(2)),
    "two find two messages, and a byte says that they sleep": turns(both(waits=1, asleep=True), start=published(2)),
    ONE_TAKES: turns(both(a={"messages": 1}, waits=1), start=published(2)),
    THREE: turns(three(), capacity=3, start=published(3)),
    DIES: turns(both({"waits": 0}, waits=2, **KILLS), start=published(1), halts=1, looks=1, mortal=READERS[:1]),
    PLACE: turns(A_PLACE_IS_TAKEN, start=published(2), halts=1, mortal=["reader a"]),
    COPIES: turns({"writer0": SPINS, **both(**FAST)}, start=published(2)),
    RAISES: turns(both(waits=1, raises=True), start=published(1), raises=1),
}
LONG = {
    WAIT: turns({"writer0": writer(1), **both(waits=1)}),
    TIME: turns({"writer0": writer(1), **both(waits=1)}, early=1),
    ROOM: turns({"writer0": writer(1, 1), **both(waits=1, capacity=1, waited=True)}, 1, start=published(1)),
    "three take over, and one dies": turns(three(**KILLS), capacity=3, start=published(3), halts=1),
    TWO: turns({"writer0": writer(2, 3), **both(a={"messages": 1}, waits=1, capacity=3)}, 3),
    "two find a message, and any one dies": turns(both(waits=2, **KILLS), start=published(1), halts=1, looks=1),
    "two find two messages, and one dies": turns(both(waits=2, **KILLS), start=published(2), halts=1, looks=1),
    "two wait for a message, and one dies": turns(
        {"writer0": writer(1), **both(waits=2, **KILLS)}, halts=1, looks=1, mortal=READERS
    ),
}
SCENARIOS.update(LONG)


# ---------------------------------------------------------------- nothing is lost

MEMBARRIER = (
    "who takes over, and who sleeps, fences for all",
    lambda program: re.sub(r"(W4|R4|C1|T2|T5) +fence", "", program),
)
MODES = FENCES, MEMBARRIER
QUICK_ON_FREE = (FIND_ONE,)
QUICK_WITH_MEMBARRIER = FIND_ONE, ONE_TAKES, PLACE
explore = partial(test_protocol.explore, scenarios=SCENARIOS)


def takes_long(name, memory, mode):
    if memory == "free":
        return name not in QUICK_ON_FREE or mode is MEMBARRIER
    return name in LONG or mode is MEMBARRIER and name not in QUICK_WITH_MEMBARRIER


@pytest.mark.parametrize(
    ("name", "memory", "mode"),
    [
        case(name, memory, mode, stress=takes_long(name, memory, mode))
        for name in SCENARIOS
        for memory in ("tso", "free")
        for mode in MODES
        if memory == "tso" or name not in LONG  # it takes hours
    ],
)
def test_nothing_is_lost(name, memory, mode):
    """Nobody is inside with another one, each message is taken once, and nobody sleeps on while there is one."""
    result = explore(name, memory, mode)
    assert not result.loss and result.states > 1000


@pytest.mark.parametrize(
    ("program", "way"),
    [
        # _steps; or _take, _free, _give. Whether it is inside at once or takes over, it comes to T1 first.
        (TAKE, "T1 T2 T3"),
        (READER.replace("{taken}", TAKEN), "T3<R1 R1 R1<R2 R2 R2<R3 R3 R3<T4 T4 T5 S3"),
        (PASSES, "T6"),
        (TAKE_OVER, "X1 X2 turn_before<turn X2 X3 X4 X5 X4<R1 X4 X5"),  # X6 is in `inside`, after the first X5
    ],
    ids=["has it", "takes", "passes on", "takes over"],
)
def test_the_programs_have_the_labels_in_the_codes_order(program, way):
    """The methods' labels, put together along the calls, are a program."""
    test_protocol.test_the_programs_have_the_labels_in_the_codes_order(program, way)


def of_reader(pattern, replacement, who="reader"):
    return editing(who)(lambda program: re.sub(pattern, replacement, program))


def not_passed(mark):
    return change(f"if read == end: rung_{mark}", f"goto rung_{mark}", "reader")


HANDLED = r"(except:\n)(?: *\n)* *R3<T4 +order\n", r"\1"
STAYS_INSIDE = r"(except:(?:.*\n){1,4}?) *\[inside_.\] = 0\n", r"\1"
ANY_COPY = r"if pos < at or pos >= at \+ many: look", "if many == 0: look"
LOSSES = [
    ("no T1", cut("T1"), FIND_TWO, "tso", MODES),
    ("no T2", cut("T2"), FIND_TWO, "tso", (FENCES,)),
    ("no T3", of_reader(r"if now == \d+: (have|found)", r"goto \1"), FIND_TWO, "tso", MODES),
    ("no order T3<R1", cut("T3<R1"), FIND_TWO, "free", (FENCES,)),
    ("no order R3<T4", cut("R3<T4"), FIND_TWO, "free", (MEMBARRIER,)),
    ("no T4", cut("T4"), ONE_TAKES, "tso", MODES),
    ("no T5", cut("T5"), ONE_TAKES, "tso", (FENCES,)),
    ("no T6", not_passed("t"), ONE_TAKES, "tso", MODES),
    ("X1 is had by all", change("claimed = try claim", "claimed = 1", "reader"), THREE, "tso", (FENCES,)),
    ("no X2", of_reader(r" *X2 +\[turn\] = .*\n", ""), FIND_TWO, "tso", MODES),
    ("X2 is X4", of_reader(r"(X2 +\[turn\] = \d+) - 1", r"\1"), FIND_TWO, "tso", MODES),
    ("who took over half is the one before", of_reader(r"if now % 2 == 0: half_\w+", ""), THREE, "tso", (FENCES,)),
    ("no X3", cut("X3"), FIND_TWO, "tso", MODES),
    ("X3 reaches nobody", of_reader(r"X3 +membarrier", "X3 fence"), FIND_TWO, "tso", (MEMBARRIER,)),
    ("the one before may be inside", of_reader(r"X4 +there = \[inside.*", "there = 0"), FIND_TWO, "tso", MODES),
    ("the kernel is not asked who lives", of_reader(r"X\d +there = held.*", "there = 1"), DIES, "tso", MODES),
    ("no order X4<R1", cut("X4<R1"), FIND_TWO, "free", (FENCES,)),
    ("no X5", cut("X5"), FIND_TWO, "tso", MODES),
    ("no X6", of_reader(r"X6 +there = .*", "there = 1"), FIND_TWO, "tso", MODES),
    ("S4 takes nothing over", of_reader(r"(if now != \d+): not_found", r"\1: refused"), ONE_TAKES, "tso", MODES),
    ("S4 finds nothing", of_reader(r"(S4 .*\n.*S4 .*\n *)if read == end:", r"\1goto"), WAIT, "tso", MODES),
    ("an exception leaves it inside", of_reader(*STAYS_INSIDE), RAISES, "tso", MODES),
    ("an exception leaves it the claim", of_reader("if claimed == 0: mend", "goto mend"), RAISES, "tso", MODES),
    ("no order after an exception", of_reader(*HANDLED), RAISES, "free", (MEMBARRIER,)),
    ("no T7", cut("T7"), TWO, "tso", (MEMBARRIER,)),
    ("time is up, and it passes nothing on", not_passed("p"), TIME, "tso", MODES),
    ("copies count wherever it is", of_reader(*ANY_COPY), COPIES, "tso", (FENCES,)),
    ("more is copied than a lane holds", of_reader(r"if end > pos \+ 2: ahead", ""), COPIES, "tso", (FENCES,)),
    ("a writer is not rung", cut("R5", "reader"), ROOM, "tso", (FENCES,)),
]
SLOW_LOSSES = WAIT, TIME, TWO, ROOM, RAISES, COPIES, THREE


@pytest.mark.parametrize(
    ("edit", "name", "memory", "mode"),
    [
        pytest.param(
            edit, name, memory, mode, id=f"{what}, {mode[0]}",
            marks=[pytest.mark.stress] * (name in SLOW_LOSSES or memory == "free" or mode is not modes[0]),
        )
        for what, edit, name, memory, modes in LOSSES
        for mode in modes
    ],
)  # fmt: skip
def test_the_checker_finds_what_is_lost(edit, name, memory, mode):
    """Every part of the protocol is needed."""
    assert explore(name, memory, mode, edit).loss


@pytest.mark.parametrize(
    ("edit", "name", "memory"),
    [
        # Nobody looks at it without the claim, and the kernel gives that only after what a dead one has stored.
        pytest.param(cut("turn_before<turn"), FIND_ONE, "free", id="no order turn_before<turn"),
        # Else it is refused by the next one in that place, until that has joined.
        pytest.param(of_reader(r"X4 +there = \[joined.*", "there = now // 8"), PLACE, "tso", id="joined is not asked"),
    ],
)
def test_what_is_there_for_good_measure(edit, name, memory):
    """Without it nothing is lost either."""
    assert not explore(name, memory, FENCES, edit).loss
