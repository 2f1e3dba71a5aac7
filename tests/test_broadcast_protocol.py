"""What `test_protocol.py` does, for rings that broadcast: several readers, who come and go, and one that lags.

The programs are of one lane. A reader "x" has cells of its own, `read_pos0_x` and so on; the role is `reader_x`, so a
successor in the same slot has the same ones.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import test_protocol
from conftest import WINDOWS
from test_protocol import FENCES, FULL, MEMBARRIER, PARK, case, change, cut, editing, fill, move, scenario

if WINDOWS:
    pytest.skip("runs no code of the platform; the same source is checked on Linux", allow_module_level=True)

# ---------------------------------------------------------------- writers wait for the slowest

WRITER = """
            left = {messages}
            room = {room}
            goto known
    known:
            pos = [write_pos0]
    next:
            if left == 0: leave
            if pos < room: write
    look:
            free = pos
            {slowest}
    W1<W2   order
            room = free + {capacity}
            if pos < room: write
            buried = 0
            {bury}
            if buried: look
            goto park
    write:
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
SLOWEST = """
    W1      seen{x} = [joined_{x}]
            if seen{x} % 2 == 0 or seen{x} == gone{x}: looked{x}
    joined<read_pos order
    W1      its = [read_pos0_{x}]
            free = its if its < free else free
    looked{x}:
"""
BURY = """
            now{x} = [joined_{x}]
            if now{x} % 2 == 0 or now{x} == gone{x}: lives{x}
            alive = held reader_{x}
            if alive: lives{x}
            gone{x} = now{x}
            buried = 1
    lives{x}:
"""
# What tells that nobody sleeps is a word for all of them; a store of it and one of the epoch may be seen in any order.
RING = """
    W5      asleep = [asleep_{x}]
            if asleep == 0: rung{x}
    W5      seen = [reader_parked_{x}]
            if seen % 2 == 0 or seen == last{x}: rung{x}
    W5      ring [reader_bell_{x}]
            last{x} = seen
    rung{x}:
"""
READER = """
            left = {messages}
            epoch = {epoch}
            {join}
    next:
            if left == 0: leave
            end = [write_pos0]
    R1<R2   order
            if pos == end: park
    R2      copy = [record0 + pos % {capacity}]
            check copy == pos + 1
            pos = pos + 1
    R2<R3   order
    R3      [read_pos0_{x}] = pos
    R4      fence
            {free}
            note freed0_{x} = pos
            left = left - 1
            goto next
    park:
            {park}
    leave:
            {leave}
            end
"""
FREE = """
    R5      seen = [writer_parked0]
            if seen % 2 == 0 or seen == last: {freed}
    epoch<wanted order
    R5      wanted = [writer_wanted0]
            if pos < wanted: {freed}
    R5      ring [writer_bell0]
            last = seen
    {freed}:
"""
JOIN = """
            claim reader_{x}
            its = [joined_{x}]
            if its % 2 == 0: even
            its = its + 1
            [joined_{x}] = its
    even:
            epoch = [reader_parked_{x}]
            if epoch % 2 == 0: slot
            epoch = epoch + 1
            [reader_parked_{x}] = epoch
    slot:
            its = its + 1
    J1      [joined_{x}] = its
    J2      membarrier
    J3      pos = [write_pos0]
    J3      [read_pos0_{x}] = pos
            note freed0_{x} = pos
    C1      fence
    C1      seen = [writer_parked0]
            if seen % 2 == 0: next
    C1      ring [writer_bell0]
"""
LEAVE = """
            [joined_{x}] = its + 1
    R4      fence
    R5      seen = [writer_parked0]
            if seen % 2 == 0: gone
    R5      ring [writer_bell0]
    gone:
            release reader_{x}
"""


# Who takes a dead one's lane rings all readers.
CLAIM = """
            claim writer0
            epoch = [writer_parked0]
            if epoch % 2 == 0: begin
            epoch = epoch + 1
            [writer_parked0] = epoch
    begin:
    C1      fence
            {ring_all}
    known:
"""


def of_all(readers, program):
    return "".join(fill(program, x=x) for x in readers)


def writer(messages, readers="ab", capacity=1, room=0, claims=False):
    """Writes so many messages; `room` is what it knows of at first. It has its lane, or claims it first."""
    again = of_all(readers, SLOWEST).replace("looked", "seen").replace("W1 ", "S4 ")
    look = f"free = pos\n{again}\nif free >= wanted: awake"
    park = fill(PARK, me="writer", lane=0, announce="[writer_wanted0] = wanted", look=look)
    parts = {"slowest": of_all(readers, SLOWEST), "bury": of_all(readers, BURY), "ring": of_all(readers, RING)}
    program = WRITER
    if claims:
        rings = of_all(readers, "C1 ring [reader_bell_{x}]\n")
        program = re.sub(r" *goto known\n *known:\n", fill(CLAIM, ring_all=rings), program)
    return fill(fill(program, park=park, **parts), messages=messages, capacity=capacity, room=room)


def reader(x, messages=9, capacity=1, joins=False, leaves=False):
    """Reads up to so many messages; it is there from the beginning, or joins; then it stays, or leaves."""
    park = fill(PARK, me="reader", lane="_" + x, announce="", look="S4 end = [write_pos0]\nif end != pos: awake")
    park = re.sub(r"^( *S2 .*\n)", rf"\1[asleep_{x}] = 1\n", park, flags=re.M)
    park = re.sub(r"^( *S6 .*\n)", rf"\1[asleep_{x}] = 0\n", park, flags=re.M)
    known = f"goto known\nknown:\nits = [joined_{x}]\npos = [read_pos0_{x}]"
    program = fill(
        READER, join=JOIN if joins else known, leave=LEAVE if leaves else "", park=park, free=fill(FREE, freed="free")
    )
    return fill(program, x=x, messages=messages, capacity=capacity, epoch=0)


def there(*readers):
    """What is to begin with where these have joined."""
    return {f"joined_{x}": 1 for x in readers}


def broadcast(programs, capacity=1, start=None, roles=(), **events):
    """The cells of `scenario`, and the roles of those readers that are there already."""
    made = scenario(programs, 1, capacity, start, **events)
    names = list(programs)
    for x in roles:
        made.start[f"reader_{x}"] = 1 + next(i for i, name in enumerate(names) if name.startswith(f"reader {x}"))
    return made


def both(messages):
    return {"writer0": writer(messages), "reader a": reader("a", messages), "reader b": reader("b", messages)}


JOINS = {"writer0": writer(3, "b", 2), "reader b": reader("b", 9, 2, joins=True)}
KNOWS_ROOM = {"writer0": writer(3, "b", 2, room=2), "reader b": reader("b", 9, 2, joins=True)}
ONE_JOINS = {"writer0": writer(1), "reader a": reader("a", 1), "reader b": reader("b", 1, joins=True)}
LEAVES = {"writer0": writer(3, "b"), "reader b": reader("b", 1, leaves=True)}
DIES = {"writer0": writer(2, "b"), "reader b": reader("b"), "reader b, later b": reader("b", joins=True)}

LEAVES_A_PLACE = {
    "writer0": writer(2, "b"), "reader b": reader("b", 1, leaves=True), "reader b, later b": reader("b", joins=True)
}  # fmt: skip
NEXT_WRITER = {
    "writer0": writer(1),
    "writer0 later": writer(0, claims=True),
    "reader a": reader("a", 1),
    "reader b": reader("b", 1),
}

# ---------------------------------------------------------------- who lags loses

# A record is a unit, and so is a part; a message's count is its position.
OVERTAKES = """
            pos = 0
    next:
            if pos == {messages}: leave
    D1      [given_up] = pos + 1
    D1<W2   order
            [mark_count + pos % 4] = pos
    mark_count<mark_pos order
            [mark_pos + pos % 4] = pos
    W2      [record0 + pos % 4] = pos + 1
            pos = pos + 1
    W2<W3   order
    W3      [write_pos0] = pos
            goto next
    leave:
            end
"""
OVERTAKEN = """
            left = {tries}
            pos = {pos}
    next:
            if left == 0: leave
            left = left - 1
    R1      end = [write_pos0]
    R1<R2   order
            if pos == end: next
    R2      copy = [record0 + pos % 4]
    R2<D2   order
    D2      lost = [given_up]
            if lost > pos + 4: behind
            check copy == pos + 1
            pos = pos + 1
            goto next
    behind:
            lost = [given_up]
    given_up<mark_pos order
            place = [mark_pos + lost % 4]
            count = [mark_count + lost % 4]
    R2<D2   order
            now = [given_up]
            if now > lost: behind
            check place == count and place >= lost - 4 and place > pos
            pos = place
            goto next
    leave:
            end
"""
# Who joins, or was interrupted, counts the messages before a position from the last mark on.
COUNTS = """
            left = {tries}
    next:
            if left == 0: leave
            left = left - 1
            pos = [write_pos0]
    write_pos<mark_pos order
            place = [mark_pos + pos % 4]
    mark_pos<mark_count order
            count = [mark_count + pos % 4]
            if place == pos: found
            place = [mark_pos + (pos + 3) % 4]
    mark_pos<mark_count order
            count = [mark_count + (pos + 3) % 4]
            if place != pos - 1: next
            count = count + 1
    found:
    R2<D2   order
    D2      lost = [given_up]
            if lost > place + 4: next
            check count == pos
            goto next
    leave:
            end
"""
# Records of one part or two in a lane of four, with padding, and a writer that may die. A length is the message's
# number and a size, or 7 for padding; a longer record's other word ends with 7 as well, so it looks like padding.
ANNOUNCE = """
            given = [given_up]
            if given >= {until}: marks{n}
    D1      [given_up] = {until}
    D1<W2   order
    marks{n}:
            if marked >= pos: announced{n}
            marked = marked + 1
            [mark_count + marked % 4] = count
    mark_count<mark_pos order
            [mark_pos + marked % 4] = pos
            goto marks{n}
    announced{n}:
"""
TAKE_UP = """
            claim writer0
            pos = [write_pos0]
            marked = pos
    find:
            place = [mark_pos + marked % 4]
            if place >= marked and place <= pos: found
            marked = marked - 1
            check marked >= 0 and marked > pos - 4
            goto find
    found:
            count = [mark_count + marked % 4]
    more:
            if place >= pos: taken
            size = [record0 + place % 4]
            if size % 8 == 7: padding
            place = place + size % 8
            count = count + 1
            goto more
    padding:
            place = place + 4 - place % 4
            goto more
    taken:
            check place == pos
"""
LONG_RECORDS = """
            left = {messages}
            {start}
    next:
            if left == 0: leave
            size = {size}
            tail = 4 - pos % 4
            if size <= tail: fits
            {announce_padding}
    W2      [record0 + pos % 4] = 7
            pos = pos + tail
    W2<W3   order
    W3      [write_pos0] = pos
    fits:
            {announce}
    W2      [record0 + pos % 4] = count * 8 + size
            if size == 1: stored
    W2      [record0 + (pos + size - 1) % 4] = count * 8 + 7
    stored:
            pos = pos + size
    W2<W3   order
    W3      [write_pos0] = pos
            count = count + 1
            [messages_in] = count
            left = left - 1
            goto next
    leave:
            end
"""
READS_LONG_RECORDS = """
            left = {tries}
            pos = {pos}
            count = {pos}
    next:
            if left == 0: leave
            left = left - 1
    R1      end = [write_pos0]
    R1<R2   order
            if pos == end: next
    R2      length = [record0 + pos % 4]
            copy = count * 8 + 7
            if length % 8 == 1 or length % 8 == 7: copied
    R2      copy = [record0 + (pos + length % 8 - 1) % 4]
    copied:
    R2<D2   order
    D2      lost = [given_up]
            if lost > pos + 4: behind
            if length % 8 == 7: padding
            check length // 8 == count and copy == count * 8 + 7
            pos = pos + length % 8
            count = count + 1
            goto next
    padding:
            pos = pos + 4 - pos % 4
            goto next
    behind:
            lost = [given_up]
    given_up<mark_pos order
            place = [mark_pos + lost % 4]
            number = [mark_count + lost % 4]
    R2<D2   order
            now = [given_up]
            if now > lost: behind
            check place > pos and place <= lost and number >= count
            pos = place
            count = number
            goto next
    leave:
            end
"""
FOUR_SHORT = {
    "record0": [1, 9, 17, 25], "mark_pos": [0, 1, 2, 3], "mark_count": [0, 1, 2, 3], "write_pos0": 4, "given_up": 4,
    "messages_in": 4,
}  # fmt: skip
A_LAP = {
    "record0": [1, 2, 3, 4], "mark_pos": [0, 1, 2, 3], "mark_count": [0, 1, 2, 3], "write_pos0": 4, "given_up": 4,
}  # fmt: skip


def overtaken(messages, tries, pos=0):
    programs = {
        "writer0": fill(OVERTAKES.replace("pos = 0", "pos = 4"), messages=4 + messages),
        "reader a": fill(OVERTAKEN if pos >= 0 else COUNTS, tries=tries, pos=pos),
    }
    return broadcast(programs, 4, A_LAP)


LONG_OVERTAKE = "a reader is overtaken by records of two parts"
LATER_OVERTAKES = "a reader is overtaken by a writer who comes after a dead one"
A_PLACE_IS_TAKEN = "a reader leaves, and another takes its place"
COMES_AFTER = "a writer comes after a dead one"


def long_records(messages, tries, pos, then=0):
    """A writer of records of 2, 1, 2, ... parts, and a reader; then the writer may die, and another one comes."""

    def writes(messages, start):
        announce = {"announce_padding": fill(ANNOUNCE, until="pos + tail", n=0)}
        announce["announce"] = fill(ANNOUNCE, until="pos + size", n=1)
        return fill(fill(LONG_RECORDS, **announce, start=start), size="1 + left % 2", messages=messages)

    programs = {
        "writer0": writes(messages, "goto known\nknown:\npos = 4\ncount = 4\nmarked = 3"),
        "reader a": fill(READS_LONG_RECORDS, tries=tries, pos=pos),
    }
    if then:
        programs["writer0 later"] = writes(then, TAKE_UP)
        return broadcast(programs, 4, FOUR_SHORT, halts=1, mortal=["writer0"])
    return broadcast(programs, 4, FOUR_SHORT)


SCENARIOS = {
    "both readers sleep": broadcast(both(1), start=there("a", "b"), roles="ab"),
    "a reader joins": broadcast(JOINS, 2),
    "a reader joins a writer that knows of room": broadcast(KNOWS_ROOM, 2),
    "a reader joins another": broadcast(ONE_JOINS, start=there("a"), roles="a"),
    "a reader leaves": broadcast(LEAVES, start=there("b"), roles="b", early=1),
    "a reader is overtaken": overtaken(3, 2),
    "a reader is overtaken while it goes on": overtaken(6, 3, 1),
    "a reader counts": overtaken(6, 1, -1),
    LONG_OVERTAKE: long_records(3, 4, 1),
    LATER_OVERTAKES: long_records(2, 3, 2, then=3),
    A_PLACE_IS_TAKEN: broadcast(LEAVES_A_PLACE, start={**there("b"), **FULL}, roles="b"),
    COMES_AFTER: broadcast(NEXT_WRITER, start=there("a", "b"), roles="ab", halts=1, mortal=["writer0"]),
}
TWO = "both readers sleep, two messages"
LONG = {
    TWO: broadcast(both(2), start=there("a", "b"), roles="ab"),
    "both readers sleep, and are woken for nothing": broadcast(both(1), start=there("a", "b"), roles="ab", early=1),
    "a reader joins, and is woken for nothing": broadcast(JOINS, 2, early=1),
    "a reader dies, and another takes its place": broadcast(
        DIES, start={**FULL, **there("b")}, roles="b", halts=1, mortal=["reader b"], early=1
    ),
}
SCENARIOS.update(LONG)
SLOW = (  # on "free" memory
    "a reader joins", "a reader joins another", "a reader joins a writer that knows of room", COMES_AFTER
)  # fmt: skip
NEVER = LATER_OVERTAKES, A_PLACE_IS_TAKEN  # it takes hours
MODES = FENCES, MEMBARRIER
explore = partial(test_protocol.explore, scenarios=SCENARIOS)


@pytest.mark.parametrize(
    ("name", "memory", "mode"),
    [
        case(name, memory, mode, stress=name in LONG or memory == "free" and name in SLOW)
        for name in SCENARIOS
        for memory in ("tso", "free")
        for mode in MODES
        if memory == "tso" or name not in NEVER
    ],
)
def test_nothing_is_lost(name, memory, mode):
    """Nothing is torn, nobody sleeps on, and each reader reads all from where it has joined."""
    result = explore(name, memory, mode)
    assert not result.loss and result.states > 1000


LOOKS_FOR_D2 = (
    "    R2<D2   order\n    D2      lost = [given_up]\n            if lost > pos + 4: behind\n"
)
IS_PADDING = "            if length % 8 == 7: padding\n"
JOINED_WHERE_IT_LOOKED = change("J1 ", "pos = [write_pos0]\nJ1 ", "reader b")
LOOKS_ONCE = cut("J3      pos", "reader b")
LEAVES_SILENTLY = change("if seen % 2 == 0: gone", "goto gone", "reader b")
@editing("reader")
def asleep_first(program):
    program = re.sub(r"( *S2 .*= epoch\n)(\[asleep_\w\] = 1\n)", r"\2\1", program)
    return re.sub(r"( *S6 .*= epoch\n)(\[asleep_\w\] = 0\n)", r"\2\1", program)


@editing("reader b")
def leaves_late(program):
    left = re.search(r" *\[joined_b\] = its \+ 1\n", program)
    if not left:
        return program
    program = program.replace(left[0], "")
    return re.sub(r"( *release reader_b\n)", rf"\1{left[0]}", program)


BELIEVES_PADDING = change(LOOKS_FOR_D2 + IS_PADDING, IS_PADDING + LOOKS_FOR_D2, "reader")
COUNT_FIRST = re.compile(r"( *\[mark_count \+ marked % 4\].*\n)(.*order\n)( *\[mark_pos \+ marked % 4\].*\n)")
BELIEVES_THE_WORD = change("check place == pos", "count = [messages_in]", "writer0 later")
NO_D1_OF_PADDING = editing("writer")(lambda program: re.sub(r" *D1 .*= pos \+ tail\n", "", program))
ONE_PART = change("[given_up] = pos + size", "[given_up] = pos + 1", "writer")
MORE_THAN_HALF = change("1 + left % 2", "3 if left % 3 else 1", "writer")
DIES_NAMELESS = change("or seenb == goneb", "or goneb", "writer")

LOSSES = [
    ("no J1", cut("J1"), "a reader joins", "tso", MODES),
    ("no J2", cut("J2"), "a reader joins a writer that knows of room", "tso", MODES),
    (
        "J2 reaches no writer", change("J2      membarrier", "J2 fence", "reader"),
        "a reader joins a writer that knows of room", "tso", (MEMBARRIER,),
    ),
    (
        "it begins where it looked before J1",
        lambda who, program: LOOKS_ONCE(who, JOINED_WHERE_IT_LOOKED(who, program)),
        "a reader joins a writer that knows of room", "tso", MODES,
    ),
    ("its read_pos is not stored", cut(r"J3      \[read_pos0_b\] =", "reader b"), "a reader joins", "tso", MODES),
    ("who leaves does not ring", LEAVES_SILENTLY, "a reader leaves", "tso", MODES),
    ("no order mark_count<mark_pos", cut("mark_count<mark_pos"), "a reader counts", "free", MODES),
    ("no order mark_pos<mark_count", cut("mark_pos<mark_count"), "a reader counts", "free", MODES),
    ("no D2 after the count", change("if lost > place + 4: next", "", "reader"), "a reader counts", "tso", MODES),
    ("D1 after W2", move("D1 ", "W2<W3", "writer"), "a reader is overtaken", "tso", MODES),
    ("D2 before R2", move("D2 ", "R2 ", "reader"), "a reader is overtaken", "tso", MODES),
    ("no order D1<W2", cut("D1<W2"), "a reader is overtaken", "free", MODES),
    ("no order R2<D2", cut("R2<D2"), "a reader is overtaken", "free", MODES),
    ("no order given_up<mark_pos", cut("given_up<mark_pos"), "a reader is overtaken while it goes on", "free", MODES),
    (
        "given_up is not looked at again", change("if now > lost: behind", "", "reader"),
        "a reader is overtaken while it goes on", "tso", MODES,
    ),
    ("one reader's bell alone is rung", cut(r"W5      ring \[reader_bell_b\]"), "both readers sleep", "tso", MODES),
    ("the slowest is not waited for", change("its if its < free else free", "its", "writer"), TWO, "tso", MODES),
    ("one that died is known by its place", DIES_NAMELESS, "a reader dies, and another takes its place", "tso", MODES),
    ("who leaves does it when the slot is free", leaves_late, A_PLACE_IS_TAKEN, "tso", MODES),
    ("a new writer rings one reader", cut(r"C1 ring \[reader_bell_b\]", "writer0 l"), COMES_AFTER, "tso", MODES),
    ("a new writer does not count anew", BELIEVES_THE_WORD, LATER_OVERTAKES, "tso", MODES),
    (
        "mark_pos before mark_count", editing("writer")(lambda program: COUNT_FIRST.sub(r"\3\2\1", program)),
        LATER_OVERTAKES, "tso", MODES,
    ),
    ("what looks like padding is believed", BELIEVES_PADDING, LONG_OVERTAKE, "tso", MODES),
    ("padding is not announced", NO_D1_OF_PADDING, LONG_OVERTAKE, "tso", MODES),
    ("a part is given up where two are written", ONE_PART, LONG_OVERTAKE, "tso", MODES),
    ("messages of more than half a lane", MORE_THAN_HALF, LONG_OVERTAKE, "tso", MODES),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "name", "memory", "mode"),
    [
        pytest.param(edit, name, memory, mode, id=f"{what}, {mode[0]}")
        for what, edit, name, memory, modes in LOSSES
        for mode in modes
    ],
)
def test_the_checker_finds_what_is_lost(edit, name, memory, mode):
    """Every part of the protocol is needed."""
    assert explore(name, memory, mode, edit).loss


@pytest.mark.parametrize(
    ("edit", "name", "memory"),
    [
        # A mark that is not seen yet is looked for again; the records after it are what this order is for.
        pytest.param(cut("write_pos<mark_pos"), "a reader counts", "free", id="no order write_pos<mark_pos"),
        pytest.param(asleep_first, "both readers sleep", "tso", id="asleep before the epoch, tso"),
        pytest.param(asleep_first, "both readers sleep", "free", id="asleep before the epoch, free"),
    ],
)
def test_what_is_there_for_good_measure(edit, name, memory):
    """Without it, or the other way round, nothing is lost either."""
    assert not explore(name, memory, FENCES, edit).loss
