"""What `test_protocol.py` does, for rings that broadcast: several readers, who come and go, and one that lags.

The programs are of one lane. A reader "x" has cells of its own, `read_pos0_x` and so on; the role is `reader_x`, so a
successor in the same slot has the same ones.
"""

from __future__ import annotations

import re

import pytest
from conftest import WINDOWS
from model import Model
from test_protocol import FENCES, FULL, MEMBARRIER, PARK, case, change, cut, fill, move, scenario

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


def of_all(readers, program):
    return "".join(fill(program, x=x) for x in readers)


def writer(messages, readers="ab", capacity=1, room=0):
    """Writes so many messages; `room` is what it knows of at first."""
    again = of_all(readers, SLOWEST).replace("looked", "seen").replace("W1 ", "S4 ")
    look = f"free = pos\n{again}\nif free >= wanted: awake"
    park = fill(PARK, me="writer", lane=0, announce="[writer_wanted0] = wanted", look=look)
    parts = {"slowest": of_all(readers, SLOWEST), "bury": of_all(readers, BURY), "ring": of_all(readers, RING)}
    return fill(fill(WRITER, park=park, **parts), messages=messages, capacity=capacity, room=room)


def reader(x, messages=9, capacity=1, joins=False, leaves=False):
    """Reads up to so many messages; it is there from the beginning, or joins; then it stays, or leaves."""
    park = fill(PARK, me="reader", lane="_" + x, announce="", look="S4 end = [write_pos0]\nif end != pos: awake")
    park = re.sub(r"( *S2 .*\n)", rf"\1[asleep_{x}] = 1\n", park)
    park = re.sub(r"( *S6 .*\n)", rf"\1[asleep_{x}] = 0\n", park)
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
A_LAP = {
    "record0": [1, 2, 3, 4], "mark_pos": [0, 1, 2, 3], "mark_count": [0, 1, 2, 3], "write_pos0": 4, "given_up": 4,
}  # fmt: skip


def overtaken(messages, tries, pos=0):
    programs = {
        "writer0": fill(OVERTAKES.replace("pos = 0", "pos = 4"), messages=4 + messages),
        "reader a": fill(OVERTAKEN if pos >= 0 else COUNTS, tries=tries, pos=pos),
    }
    return broadcast(programs, 4, A_LAP)


SCENARIOS = {
    "both readers sleep": broadcast(both(1), start=there("a", "b"), roles="ab"),
    "a reader joins": broadcast(JOINS, 2),
    "a reader joins a writer that knows of room": broadcast(KNOWS_ROOM, 2),
    "a reader joins another": broadcast(ONE_JOINS, start=there("a"), roles="a"),
    "a reader leaves": broadcast(LEAVES, start=there("b"), roles="b", early=1),
    "a reader is overtaken": overtaken(3, 2),
    "a reader is overtaken while it goes on": overtaken(6, 3, 1),
    "a reader counts": overtaken(6, 1, -1),
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
SLOW = "a reader joins", "a reader joins another", "a reader joins a writer that knows of room"  # on "free" memory
MODES = FENCES, MEMBARRIER


def explore(name, memory, mode, edit=None):
    """Run a scenario, with programs that `edit` has changed."""
    made = SCENARIOS[name]
    programs = {who: mode[1](program) for who, program in made.programs.items()}
    if edit:
        edited = {who: mode[1](edit(who, program)) for who, program in made.programs.items()}
        assert edited != programs, "nothing was changed"
        programs = edited
    result = Model(programs, memory, made.start, **made.events).explore()
    print(f"{result.states:,} states. {result.loss}", *result.trace, sep="\n    ")
    return result


@pytest.mark.parametrize(
    ("name", "memory", "mode"),
    [
        case(name, memory, mode, stress=name in LONG or memory == "free" and name in SLOW)
        for name in SCENARIOS
        for memory in ("tso", "free")
        for mode in MODES
    ],
)
def test_nothing_is_lost(name, memory, mode):
    """Nothing is torn, nobody sleeps on, and each reader reads all from where it has joined."""
    result = explore(name, memory, mode)
    assert not result.loss and result.states > 1000


JOINED_WHERE_IT_LOOKED = change("J1 ", "pos = [write_pos0]\nJ1 ", "reader b")
LOOKS_ONCE = cut("J3      pos", "reader b")
LEAVES_SILENTLY = change("if seen % 2 == 0: gone", "goto gone", "reader b")
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


def test_what_is_there_for_good_measure():
    """A mark that is not seen yet is looked for again; the records after it are what this order is for."""
    assert not explore("a reader counts", "free", FENCES, cut("write_pos<mark_pos")).loss
