"""The shared words: what one access of them gives, and what the two sides of a ring do with them, in which order.

The steps below are taken, under their labels, in `_parking`, `_reading`, `_competing` and `_writing`. Besides these
`_lanes`, `_requests` and `_looking` load a word, and a backend a bell; nobody else does.

What one aligned 8-byte access through ``memoryview.cast("Q")`` gives:

                     x86-64                            arm64
    whole            yes                               yes
    store, store     in order                          nothing: `order` between them
    load, load       in order                          nothing: `order`
    load, store      in order                          nothing: `order`
    store, load      nothing: `full`, or the other     the same
                     side's membarrier

Python has no compare-and-swap and no fence of its own, only calls that imply one. `order` and `full`
are one cycle of a ``threading.Lock`` on x86-64 (a locked instruction; `order` is None there, nothing
to do). On arm64 a cycle is a full barrier from CPython 3.13.1 on, two compare-and-swaps that are
sequentially consistent; before, glibc acquires and then releases, so two cycles in a row are needed
(derived from the sources, not run). ``struct.pack_into`` clears its target before it packs, so it
never touches a word that the other side may be reading; it does write records nobody may look at yet.

A message's way, and how the two sides fall asleep and wake each other. Everything is drawn for a
reader that sleeps; a writer that waits for room is the same with the columns changed:

    writer                                     reader
    W1  look at read_pos: is there room        R1  look at write_pos: is there a record
    W2  store the record                       R2  copy the record
    W3  store write_pos: it is published       R3  store read_pos: its bytes are free
    W4  fence                                  R4  fence
    W5  reader_parked odd? ring its bell       R5  writer_parked odd? ring its bell

                                               S1  note bell
                                               S2  make reader_parked odd: a new epoch
                                               S3  fence, and make every waker fence
                                               S4  look again at every lane
                                               S5  sleep while bell is as noted
                                               S6  make reader_parked even

W3 before R1 before R2, W2 before W3: the reader copies only whole records. R2 before R3 before W1
before W2: the writer never writes over bytes that are still being copied. W3 W4 W5 against S2 S3 S4:
either the writer sees the epoch, or the reader sees the record; take one fence away and both can
miss. A waker never writes the sleeper's word, it adds to `bell`: if it cleared the word, a kill
between clearing and waking, or a late clear that hits the next epoch, would lose a wake-up. It rings
once per epoch and remembers which. A waker that dies between W3 and W5 is made good by whoever takes
its role next: a claimant first rings everybody parked on the other side (C1).

A broadcast ring has several readers, each with a cursor on every lane. The writer's W1 is then the least
read_pos of those that have joined, and its W5 looks at each. Who comes:

    J1  make `joined` odd: another number than all before (its second bit says, after J3, that it is there)
    J2  fence, and make every writer fence
    J3  look at write_pos, and store that as its read_pos: what it reads begins there

A writer that does not see J1 in its W1 looked before J2, and what it had published by then J3 finds; it
takes its room from there, so it ends within a lane's length of what the reader begins with. One that sees J1
but not yet J3 sees an old read_pos, and waits until it is rung, as whoever claims a role rings (C1). Who leaves
makes `joined` even and rings the writers that sleep (R4, R5). Of one that was killed a writer asks the kernel when it
has no room: `joined` is stored while the claim is held, so an odd one without a claim is a dead one's, and its number
is remembered. Nobody rings then, so such a writer looks again after a while.

Where writers do not wait (``lag="drop"``) a reader finds out that what it has copied was being written over:

    writer                                     reader
    D1  store given_up: what lies a lane's     R1  look at write_pos
        length before this is lost             R2  copy the record
    W2  store the record                       D2  look at given_up: is the record behind it still?
    W3  store write_pos

D1 before W2, R2 before D2: a reader that has copied one byte of the new record sees the new given_up. It grows by a
part of the lane at a time. For the first record that begins in a part the writer stores a mark after D1, so that a
reader that was overtaken finds the oldest record that was not given up, and how many there were before it: the
mark's place is used again only after its part was given up, so a mark that lies behind given_up is whole.

Where readers compete (``readers="compete"``) they share one cursor on every lane, and take one at a time: whose turn
it is. It stays the same reader's until another one takes it over, which costs that one much, and who has it almost
nothing: it says that it is inside, and looks whether it still is its turn.

    who has it                                 who takes it over
    T1  inside is 1                            X1  claim the right to: one at a time
    T2  fence, unless others make us           X2  the one before is noted, and turn is ours, but not yet to be had
    T3  turn is ours: else leave               X3  fence, and make every reader fence
    R1 to R3, by what the words say now        X4  the one before not inside, or dead: turn is to be had
    T4  inside is 0                            X5  give the claim back
    T5  fence                                  X6  it is not, but the one before is not inside any more? once more
    R5, and T6: a message left, and a reader
        asleep? ring one

T1 T2 T3 against X2 X3 X4: either who takes over sees the other one inside, or that one sees that it is its turn no
more. Nobody waits: who is refused, because somebody is inside or takes over, has nothing to read for now. A turn that
was taken over half (its taker was refused at X4, or killed) is nobody's; who comes next takes it over from the same
one before. So a dead reader needs no mending: if it was inside, the kernel's word lets the next one go on from what
R3 says.

Who sleeps in such a ring does T7 after S6: fence, and make every waker fence. A writer that saw the epoch then has
published what it rings for, so T6 sees it, if it is not for the one that wakes.

A reader that was refused may fall asleep: S3 before S4, where it is refused once more, and T4 T5 before T6, so either
nobody is inside any more, or whoever was sees the epoch. If it was refused at X1, who had the claim comes to T6, or to
X6, and either finds that nobody is inside, or leaves it to whoever is. W5 rings one reader that sleeps and that this
writer has not rung yet, T6 the next one as long as there are messages; so as many are awake as there is work for. Who
was rung and leaves without a message (its time is up, its task was cancelled, it closes) makes every waker fence and
does T6 for others. Who was rung and was killed, or stopped, cannot; nor does a writer that waits for room hear of it
when its reader was killed between R3 and R5. So all who sleep here look again after a while.

The locked instruction of W4 and R4 would cost more than all the rest, so where the system can make
the other side fence (S3: Linux, membarrier) wakers that have registered leave theirs out.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, Optional, Protocol

from ._layout import Layout

WORD: Final = (1 << 64) - 1
POSITIONS: Final = 1 << 63  # no ring lives as long: a position from here on is damage

Fence = Optional[Callable[[], None]]


class Doorbell(Protocol):
    """What an event loop can wait for. `_backend.py` says what it promises."""

    def fileno(self) -> int: ...
    def ring(self) -> bool: ...
    def heard(self) -> bool: ...
    def remove(self) -> None: ...
    def close(self) -> None: ...


class Segment(Protocol):
    """What the protocol needs of the operating system. `_backend.py` says what it promises."""

    name: str
    layout: Layout
    map: mmap.mmap
    words: memoryview

    def claim(self, byte: int) -> bool: ...
    def release(self, byte: int) -> None: ...
    def is_claimed(self, byte: int) -> bool: ...
    def reserve(self, offset: int, nbytes: int) -> None: ...
    def back(self, offset: int, nbytes: int) -> None: ...
    def order_fence(self) -> Fence: ...
    def waker_fence(self) -> Fence: ...
    def sleeper_fence(self) -> bool: ...
    def ring(self, bell: int) -> bool: ...
    def note(self, bell: int) -> object: ...
    def wait(self, bell: int, noted: Any, deadline: float | None) -> None: ...
    def wake(self, bell: int) -> object: ...
    def doorbell(self, bell: int) -> Doorbell: ...


def make_fence(tso: bool) -> Callable[[], None]:
    """A full barrier for one thread at a time (a lock of its own: nobody can hold it meanwhile)."""
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def once() -> None:
        # Never waits: if an exception once came between the two, the release alone is the barrier.
        acquire(False)
        release()

    def twice() -> None:
        once()
        once()

    return once if tso or sys.version_info >= (3, 13, 1) else twice


def can_be(read_pos: int, write_pos: int, capacity: int) -> bool:
    """Can a lane have been read and written so far? Else its words are damaged, or were not loaded at one time."""
    return read_pos <= write_pos <= read_pos + capacity and not (read_pos | write_pos) & 7 and write_pos < POSITIONS
