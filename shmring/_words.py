"""The shared words: the only file that loads or stores one, and the owner of every ordering claim.

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
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, Final, NamedTuple, Optional, Protocol

from . import _layout
from ._errors import BufferTooSmall, MessagesLost, MessageTooLarge, RingBusy, RingCorrupted
from ._layout import MARKS, PADDING, RECORD_HEADER, Layout, place, record_bytes, round_up
from ._monitor import Monitor, MonitorClosed

PACKED: Final = 1024  # bytes; messages up to this go in by struct, one call for length and payload
JOINED: Final = 16384  # bytes; longer ones are not worth joining, which copies them once more
BURST: Final = 65536  # bytes that are published, or copied out, in one go at most
COUNTED: Final = 100  # times that a reader who joins tries to have a position and a count that belong together
PATIENCE: Final = 200  # times that a competing reader leaves the turn to another one, one after another
IDLE: Final = 10  # of these, each time that the other one has not taken anything meanwhile
AHEAD: Final = 64  # messages that a competing reader copies before it knows whether it gets them
BLOCKS: Final = (64, 8, 1)  # records that one struct takes apart: many take a quarter of the time of one at a time

WORD: Final = (1 << 64) - 1
RESERVED: Final = WORD  # the read_pos that is wanted where another thread's reservation is what stands in the way
POSITIONS: Final = 1 << 63  # no ring lives as long: a position from here on is damage

_LENGTH = struct.Struct("=Q")
_GAPS = tuple(bytes(-size & 7) for size in range(8))

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


# ---------------------------------------------------------------- requests to the two monitors


class WriteRequest:
    """What is asked of a writer besides to write one message as it comes."""

    # No message is as long: it leaves the writer's fast path by its length. In C, because it is asked for twice.
    __len__ = sys.maxsize.__index__


class WriteBatch(WriteRequest):
    """Write these messages, as many as there is room for. `done` counts them.

    `size` is their size, or -1 if they have several.
    """

    def __init__(self, messages: list[Any], size: int) -> None:
        self.messages = messages
        self.size = size
        self.done = 0


class Gather(WriteRequest):
    """Write these buffers, of so many bytes together, as one message."""

    def __init__(self, buffers: list[Any], size: int) -> None:
        self.buffers = buffers
        self.size = size


class InPlace:
    """A message's bytes in the ring, as a view that a caller has for a while.

    Meanwhile the side of the handle that it belongs to does nothing else: other threads wait. If the view
    cannot be released in the end, because something else still uses it, the side is refused to everybody.

    Attributes:
        ends: It was asked for, and this is its end. To ask for that again is harmless.
        left: The caller has left: with an end that is done, or without one, and then only the view stands in the way.
        thread: Whose it is, once it was asked for. That one must not wait for itself.
    """

    view: memoryview | None = None
    ends = left = False
    thread = 0

    def released(self) -> bool:
        """Release the view; was it possible? Else something still uses it."""
        try:
            if self.view is not None:
                self.view.release()
        except BufferError:
            return False
        return True

    def is_over(self, name: str) -> bool:
        """Has its caller left, and is the view released? False: another thread still works on it.

        Raises:
            RingBusy: The view cannot be released, or it is this very thread's.
        """
        if not self.left:
            if self.thread == threading.get_ident():
                raise RingBusy(f"this thread has a message of ring {name!r} in place; leave its `with` block first")
            return False
        if not self.released():
            raise RingBusy(_still_used(name))
        return True


def _still_used(name: str) -> str:
    what = "delete what was made from it (an array, another view) before leaving the `with` block"
    return f"the view of a message in place in ring {name!r} is still in use: {what}"


class Reserve(WriteRequest, InPlace):
    """Make room for a message of `size` bytes and give a `view` of it, at the lane's `pos`.

    At the end: publish the first `commit` bytes, or, if it is None, nothing.
    """

    pos = at = 0
    commit: int | None = None

    def __init__(self, size: int) -> None:
        self.size = size


class ReadRequest:
    """What a read asks for, and what it got out of the ring: noted before it happens.

    So nothing is lost if an exception keeps the answer from the caller; see `Reader.give_back`.

    Attributes:
        taken: What each lane's read_pos comes to, and the messages that are out of the ring once it has.
        owed: The list of owed messages before, and those taken from it.
    """

    __slots__ = ("owed", "taken")

    def __init__(self) -> None:
        self.taken: list[tuple[int, int, list[bytes]]] = []
        self.owed: tuple[list[bytes] | None, list[bytes]] = None, []

    def settle(self, words: memoryview, owed: list[bytes]) -> None:
        """Forget what did not happen, while nobody else can make it happen."""
        self.taken = [entry for entry in self.taken if words[entry[0]] >= entry[1]]
        if self.owed[0] is owed:
            self.owed = None, []


class ReadBatch(ReadRequest):
    """Take up to so many messages, from every lane what it had when looked at."""

    __slots__ = ("most",)

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most


class ReadOne(ReadRequest):
    """Take one message of at most `room` bytes, into `view` if there is one."""

    __slots__ = ("room", "view")

    def __init__(self, room: int, view: memoryview | None = None) -> None:
        super().__init__()
        self.room = room
        self.view = view


class Borrow(InPlace):
    """Give a `view` of the next message; it stays in its `lane`, or owed.

    Attributes:
        given: The caller has the view: it is consumed in the end, whatever comes. Else it stays.
        pos, count: What is read of the lane, and how many messages, once it is consumed.
    """

    lane: _Lane | None = None
    pos = count = 0
    owed: bytes | None = None
    given = False


PROBE: Final = object()  # to a competing reader's monitor: is it nobody's turn?


class GiveBack(NamedTuple):
    """Messages that are out of the ring but did not reach the caller."""

    messages: list[bytes]


# ---------------------------------------------------------------- framing, of bytes nobody else looks at


def join_run(messages: list[Any], size: int) -> bytes:
    """Messages that all have this `size`, as records. In C, at some 30 ns a message."""
    header, gap = _LENGTH.pack(size), _GAPS[size & 7]
    return header + (gap + header).join(messages) + gap


def join_mixed(messages: list[Any], start: int, room: int) -> tuple[bytes, int]:
    """As many of ``messages[start:]`` as fit into `room` bytes, as records, and how many these are."""
    parts: list[Any] = []
    taken = 0
    for message in islice(messages, start, None):
        size = len(message)
        room -= record_bytes(size)
        if room < 0:
            break
        parts += _LENGTH.pack(size), message, _GAPS[size & 7]
        taken += 1
    return b"".join(parts), taken


def split_run(buffer: Any, at: int, run: int, size: int) -> list[bytes]:
    """The messages in `run` records from `at` on that all have this `size`. In C, at some 25 ns a message."""
    messages: list[bytes] = []
    step = record_bytes(size)
    for number in BLOCKS:
        if run >= number:
            unpack = _records(size, number)
            while run >= number:
                messages += unpack(buffer, at)
                at += number * step
                run -= number
    return messages


def split_mixed(words: memoryview, buffer: Any, at: int, stop: int, most: int) -> tuple[list[bytes], int]:
    """The messages in the records from `at` on, at most `most`, and how many bytes they take.

    It ends before `stop`, and before what is no record that ends there.
    """
    messages: list[bytes] = []
    start = at
    while at < stop and len(messages) < most:
        size = words[at >> 3]
        after = at + RECORD_HEADER + (size + 7 & ~7)  # written out, as this is done for each message
        if after > stop:
            break
        step = after - at
        fourth = at + 3 * step
        # A run of fewer than four is quicker one by one. What is no header at `fourth` is for run_of to find out.
        if fourth < stop and words[after >> 3] == size == words[fourth >> 3]:
            run = run_of(words, at, size, min(most - len(messages), (stop - at) // step))
            messages += split_run(buffer, at, run, size)
            at += run * step
        else:
            messages.append(buffer[at + RECORD_HEADER : at + RECORD_HEADER + size])
            at = after
    return messages, at - start


def run_of(words: memoryview, at: int, size: int, most: int) -> int:
    """How many records from `at` on, at most `most`, have this `size`, as the first one has."""
    start, stride, looked_at = at >> 3, record_bytes(size) >> 3, 8
    if most < 2 or words[start + stride] != size:
        return 1
    while True:
        # A few first: most runs are long, or short.
        looked_at = min(looked_at, most)
        sizes = words[start : start + looked_at * stride : stride].tolist()
        if sizes.count(size) != looked_at:
            return next(i for i, other in enumerate(sizes) if other != size)
        if looked_at == most:
            return most
        looked_at *= 16


@lru_cache(maxsize=PACKED + 1)
def _packer(size: int) -> Callable[..., None]:
    """What puts a record's length and payload in, in one call instead of two stores: a fifth of a small write."""
    return struct.Struct(f"=Q{size}s").pack_into


@lru_cache(maxsize=256)
def _record_of(size: int) -> Callable[[mmap.mmap, int], tuple[int, bytes]]:
    """What takes a record's length and payload out, in one call."""
    return struct.Struct(f"=Q{size}s").unpack_from


@lru_cache(maxsize=256)
def _records(size: int, number: int) -> Callable[[Any, int], tuple[bytes, ...]]:
    return struct.Struct(f"{RECORD_HEADER}x{size}s{-size & 7}x" * number).unpack_from


# ---------------------------------------------------------------- falling asleep and waking up


ATTACH: Final = object()  # to a `Parking`'s monitor


# An epoch is odd while somebody sleeps. It goes up by 256, so that one byte of it tells: to load that and see whether
# it is zero takes half of what the whole word does, which is a number of its own to make and to mask.


def _make_even(words: memoryview, epoch: int) -> None:
    words[epoch] = words[epoch] + 255 & ~255 & WORD


class Parking:
    """Where the threads of one handle sleep that wait for the other side of a ring.

    They all sleep on one bell; `parked` is odd while there is one. An entry that an exception left
    behind in `_sleepers` keeps it odd, which costs each waker one ring and nothing else.

    A doorbell is one sleeper more, for all that wait in event loops: S1 to S4 are `arm`, S5 is theirs, S6 is
    `disarm`. It is rung as the bell is, once per epoch by each waker. Whether it was is known by the doorbell alone,
    and is asked before an epoch is begun: what is heard after that is of the new one, or for nothing.

    Attributes:
        doorbell: There is one since `attach`.
        fenced: Wakers could be made to fence when the doorbell was armed. Else it may stay silent; look again soon.
    """

    def __init__(self, segment: Segment, parked: int, parks: int, bell: int, wanted: int = 0, asleep: int = 0) -> None:
        """Offsets in the segment; without `wanted` or `asleep` there is no such thing."""
        self._segment = segment
        self._parked, self._parks, self._bell, self._wanted = parked >> 3, parks >> 3, bell, wanted >> 3
        self._sleepers: dict[object, int] = {}  # what each needs
        self.doorbell: Doorbell | None = None
        self.fenced = True
        # What the doorbell's epoch was begun for, and the token of that time. The token changes with all that ends an
        # epoch, before and after: a thread that arms meanwhile has another one, and its epoch does not count.
        self._token = object()
        self._armed: tuple[int, object] = -1, None
        # The last one here may have died asleep, or with a doorbell; the numbers go on from there.
        _make_even(segment.words, self._parked)
        self._asleep = asleep
        if asleep:
            segment.map[asleep] = 0
        self._state = (bell + _layout.DOORBELL) >> 3
        segment.words[self._state] = segment.words[self._state] & ~3 & WORD
        self._monitor = Monitor(self._steps)

    def _steps(self) -> Generator[Any, Any, None]:
        words, note, sleepers = self._segment.words, self._segment.note, self._sleepers
        order = self._segment.order_fence()
        parked, state, asleep = self._parked, self._state, self._asleep
        noted: object = None
        while True:
            sleeper, needs = yield noted
            if sleeper is ATTACH:
                if self.doorbell is None:
                    doorbell = self._segment.doorbell(self._bell)
                    doorbell.heard()  # what was rung for who had it before
                    # Another number each time: wakers open it anew.
                    words[state] = (words[state] >> 2) + 1 << 2 & WORD | _layout.ATTACHED
                    self.doorbell = doorbell
                continue
            if needs is None:
                sleepers.pop(sleeper, None)
                if not sleepers:
                    _make_even(words, parked)  # S6
                    if asleep:
                        self._segment.map[asleep] = 0
                continue
            noted = note(self._bell)  # S1
            sleepers[sleeper] = needs
            if self._wanted:
                words[self._wanted] = min(sleepers.values())
            if self.doorbell is not None:
                alone = _layout.ALONE if len(sleepers) == 1 and self.doorbell in sleepers else 0
                words[state] = words[state] & ~_layout.ALONE & WORD | alone
            # Else the bell that is noted may be one that was rung for this epoch already, by a waker that
            # will not ring again; and who sees the epoch might not see what it waits for.
            if order:
                order()  # ORDER S1 before S2
            words[self._parks] = words[self._parks] + 1 & WORD
            words[parked] = (words[parked] + 255 & ~255 | 1) & WORD  # S2: the next odd epoch
            if asleep:
                # No order between the two: who does not see either of them published before S4 looks.
                self._segment.map[asleep] = 1

    def park(self, nothing: Callable[[], bool], needs: int, deadline: float | None) -> None:
        """Sleep if there is `nothing` to do, until rung, or `deadline`, or for no reason at all."""
        sleeper = object()  # not the thread: a signal handler may park while its thread does
        try:
            noted = self._monitor.enter((sleeper, needs))
            fenced = self._segment.sleeper_fence()  # S3
            if nothing():  # S4
                if not fenced:
                    # Wakers that count on our membarrier cannot be made to fence: look again soon.
                    soon = time.perf_counter() + 0.001
                    deadline = soon if deadline is None else min(soon, deadline)
                self._segment.wait(self._bell, noted, deadline)  # S5
        finally:
            try:
                self._monitor.enter((sleeper, None))
            except MonitorClosed:
                pass  # who waits finds out; here it would replace what a signal handler raised
            except BaseException:
                with suppress(MonitorClosed):  # else who competes with this handle's reader would not be rung
                    self._monitor.enter((sleeper, None))
                raise
            if self._asleep and self._segment.layout.compete:
                self._segment.sleeper_fence()  # T7: a waker that saw the epoch has published before T6 looks

    def attach(self) -> Doorbell:
        """Have a doorbell, if there is none yet."""
        self._monitor.enter((ATTACH, None))
        assert self.doorbell is not None
        return self.doorbell

    def arm(self, nothing: Callable[[], bool], needs: int, heard: bool | None = None) -> bool:
        """Have the doorbell ring for all that comes from now on. False: there is something already.

        Who is told when the doorbell rings, and calls `hear` then, says that it was not `heard`: that spares a look.
        """
        doorbell = self.doorbell
        assert doorbell is not None
        # An exception in here, or another thread, makes the next one begin an epoch; one too many harms nobody.
        token = self._token
        armed, self._armed = self._armed, (-1, None)
        rung = doorbell.heard() if heard is None else heard
        if rung or armed != (needs, token):
            self._monitor.enter((doorbell, needs))  # begins an epoch, by S1 and S2
            self.fenced = self._segment.sleeper_fence()  # S3
        self._armed = needs, token
        if nothing():  # S4
            return True
        if rung:
            doorbell.ring()  # it may have been for another thread or task of this handle as well
        return False

    def hear(self) -> None:
        """The doorbell was rung: make it silent. It is armed no more."""
        self._token = object()
        try:
            if self.doorbell is not None:
                self.doorbell.heard()
        finally:
            self._token = object()

    def disarm(self) -> None:
        """Have nobody ring the doorbell until it is armed again: what comes will be looked for."""
        self._token = object()
        try:
            with suppress(MonitorClosed):
                self._monitor.enter((self.doorbell, None))  # ends the epoch, if no thread sleeps, by S6
        finally:
            self._token = object()

    def wake(self) -> None:
        """Have this handle's own threads and loops look again, if any sleeps."""
        if self._sleepers:
            self._segment.wake(self._bell)
            if self.doorbell is not None:
                self.doorbell.ring()

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        self._monitor.refuse_reentry()

    def close(self) -> None:
        """Wake this handle's threads, and never write the words again. The doorbell stays open, for who waits."""
        try:
            self._sleepers.clear()
            self._monitor.enter((None, None))
        except MonitorClosed:
            pass
        self._monitor.close()
        if self.doorbell is not None:
            self._segment.words[self._state] = self._segment.words[self._state] & ~3 & WORD
            self.doorbell.remove()  # while the role is ours
        self._segment.wake(self._bell)


class ReaderBells:
    """The bells of a ring's readers, for one waker. It rings who sleeps, once for each time that it fell asleep.

    Attributes:
        ours: The index of the waker's own epoch, if it is a reader: it is awake, whatever it says for its doorbell.
    """

    def __init__(self, segment: Segment) -> None:
        layout = segment.layout
        self._segment = segment
        self._order = segment.order_fence()
        # For each reader: the index of its epoch, its bell, the epoch that was last rung. Worked out here, because a
        # reader that sleeps waits for each bytecode of `ring`. Where they compete, who was not rung longest is first.
        blocks = map(layout.reader_block, range(layout.slots))
        self._entries = [[(block + _layout.READER_PARKED) >> 3, block + _layout.READER_BELL, 0] for block in blocks]
        self._one = layout.compete
        self.ours = -1

    @property
    def are_mute(self) -> bool:
        """Was there no descriptor left for a doorbell? Then it is to be rung with what comes next, be it a wait."""
        return any(rung < 0 for _, _, rung in self._entries)

    def asleep(self) -> tuple[Any, int]:
        """What tells by one load that no reader sleeps, and where: an epoch's lowest byte, or a byte for each."""
        layout = self._segment.layout
        if layout.readers == "one":
            return self._segment.map, layout.readers_offset + _layout.READER_PARKED
        if layout.slots <= 8:
            return self._segment.words, layout.asleep_offset >> 3
        return _Any(self._segment.map, layout.asleep_offset, layout.asleep_offset + layout.slots), 0

    def ring(self) -> None:
        """W5, when a reader is asleep: all of them, or, where they compete, one."""
        segment, entries, ours = self._segment, self._entries, self.ours
        for entry in entries:
            parked, bell, rung = entry
            epoch = segment.words[parked]
            if epoch & 1 and epoch != rung and parked != ours:
                if self._order:
                    self._order()  # ORDER epoch before doorbell, as they were stored
                rung = segment.ring(bell)
                entry[2] = epoch if rung else -1  # after it: an exception in between rings twice, harmlessly
                if rung and self._one:
                    after = entries.index(entry) + 1
                    self._entries = entries[after:] + entries[:after]
                    return


# ---------------------------------------------------------------- writing


class Writer:
    """The writing side of a handle: a lane of its own, claimed at the first request.

    Requests to `monitor`: a message (bytes, or a flat memoryview of bytes), or a `WriteRequest`. Answers:
    None when all of it is done, or the read_pos that is wanted for more room, an int (maybe `RESERVED`).
    """

    def __init__(self, segment: Segment, reader: Reader | None = None) -> None:
        """`reader` is the same handle's, whose claim is no other handle's."""
        self._segment = segment
        self._reader = reader
        self._lane = -1  # also while a claim is tried: an exception right after it must not lose it
        self._bells = ReaderBells(segment)
        self._asleep, self._asleep_at = self._bells.asleep()
        self._gone = [0] * segment.layout.slots  # `joined` of each reader that was found dead
        self._marked = -1  # the last part of the lane that has its mark
        # Of the claimed lane: where its bytes begin, and the indices of its words.
        self._first = self._write_pos = self._messages_in = self._read_pos = 0
        self._bytes = memoryview(segment.map)
        self._free = 0  # up to here messages in place may go without another look
        self._reserved: Reserve | None = None  # nothing else is written meanwhile
        self._fence: Fence = None
        self._order = segment.order_fence()
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps)

    @property
    def lane(self) -> int:
        """The lane claimed, -1 if none is."""
        return self._lane if self.parking is not None else -1

    @property
    def read_pos(self) -> int:
        """How far the reader, or the slowest, has come in the claimed lane, in bytes."""
        if self._segment.layout.broadcast:
            return self._slowest(self._lane, self.write_pos)
        return self._segment.words[self._read_pos]

    @property
    def write_pos(self) -> int:
        """How far the claimed lane is written, in bytes."""
        return self._segment.words[self._write_pos]

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        self.monitor.refuse_reentry()
        if self.parking is not None:
            self.parking.refuse_reentry()

    def nothing(self, wanted: int) -> bool:
        """Is there still no room? For S4, which looks from outside the monitor; in doubt it says no."""
        return self._reserved is not None if wanted == RESERVED else self.read_pos < wanted

    def close(self) -> memoryview | None:
        """Wait until no thread is inside, end it, and give the lane back.

        Returns:
            What may still be written to, so that the lane is kept: a view that cannot be released.
        """
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        reserved, self._reserved = self._reserved, None
        if reserved is not None and not reserved.released():
            return reserved.view
        if self._lane >= 0:
            self._segment.release(_layout.LANE + self._lane)
        return None

    def _claim(self) -> None:
        """Take the emptiest free lane, rather one that has its memory."""
        segment, layout = self._segment, self._segment.layout
        ranked = []
        for lane in range(layout.writers):
            read_pos, write_pos = self._positions(lane)
            ranked.append((lane != self._lane, write_pos - read_pos, write_pos == 0, lane))
        damaged = 0
        failure: OSError | None = None
        for _, _, _, lane in sorted(ranked):
            self._lane = lane
            if not segment.claim(_layout.LANE + lane):
                continue
            # Only now do they stand still enough to be judged. read_pos first: it may still grow.
            read_pos, write_pos = self._positions(lane)
            if not can_be(read_pos, write_pos, layout.capacity):
                damaged += 1
            else:
                try:
                    # Memory first: without any the first store would be a crash, this is ENOSPC.
                    (segment.back if write_pos else segment.reserve)(layout.lane_bytes(lane), layout.capacity)
                    break
                except OSError as error:
                    failure = error
            segment.release(_layout.LANE + lane)
        else:
            self._lane = -1
            if failure is not None:
                raise failure
            if damaged:
                raise RingCorrupted(
                    f"ring {segment.name!r}: {damaged} of its {layout.writers} lanes are damaged, the others are taken"
                )
            raise RingBusy(
                f"ring {segment.name!r}: each of its {layout.writers} lanes has a living writer; "
                f"close one, or create the ring with a larger writers= (it was writers={layout.writers})"
            )
        self._fence = segment.waker_fence()
        # Before the first W3, and from lane 0 on: the reader looks for the first 0 here, and no further.
        for number in range(lane + 1):
            segment.map[layout.used_offset + number] = 1
        block = layout.lane_block(lane)
        self._first = layout.lane_bytes(lane)
        self._write_pos, self._messages_in = (block + _layout.WRITE_POS) >> 3, (block + _layout.MESSAGES_IN) >> 3
        self._read_pos = (layout.cursor(lane) + _layout.READ_POS) >> 3
        self.parking = Parking(
            segment,
            block + _layout.WRITER_PARKED,
            block + _layout.WRITER_PARKS,
            block + _layout.WRITER_BELL,
            block + _layout.WRITER_WANTED,
        )

    def _positions(self, lane: int) -> tuple[int, int]:
        """The read_pos and then the write_pos of any lane."""
        words, layout = self._segment.words, self._segment.layout
        write_pos = (layout.lane_block(lane) + _layout.WRITE_POS) >> 3
        if layout.broadcast:
            pos = words[write_pos]
            return self._slowest(lane, pos), pos
        read_pos = words[(layout.cursor(lane) + _layout.READ_POS) >> 3]
        return read_pos, words[write_pos]

    @property
    def is_mute(self) -> bool:
        """Was there no descriptor left for a doorbell? Then it is to be rung with what comes next, be it a wait."""
        return self._bells.are_mute

    def _slowest(self, lane: int, pos: int) -> int:
        """Of a broadcast ring: how far its slowest reader has come in a lane that is written to `pos`."""
        words, layout = self._segment.words, self._segment.layout
        slowest = pos  # with nobody there, nobody misses anything
        if not layout.drop:
            for slot, gone in enumerate(self._gone):
                joined = words[(layout.reader_block(slot) + _layout.JOINED) >> 3]
                if joined & 1 and joined != gone:
                    if self._order:
                        self._order()  # ORDER joined before read_pos, as they were stored
                    read_pos = words[(layout.cursor(lane, slot) + _layout.READ_POS) >> 3]
                    slowest = min(slowest, read_pos)
        # One that takes a dead one's place has that one's read_pos for a moment.
        return max(slowest, pos - layout.capacity)

    def _bury(self) -> bool:
        """Find out which readers have died, to wait for them no more. Was there one?"""
        words, layout = self._segment.words, self._segment.layout
        found = False
        for slot in range(layout.slots):
            joined = words[(layout.reader_block(slot) + _layout.JOINED) >> 3]
            ours = self._reader is not None and (self._reader.slot, self._reader.joined | 2) == (slot, joined | 2)
            if joined & 1 and joined != self._gone[slot] and not ours:
                # It joined with the claim in hand, and gives it up after it has left.
                if not self._segment.is_claimed(_layout.READER + slot):
                    # Or our descriptor was closed behind our back: this says so, in an OSError.
                    self._segment.claim(_layout.LANE + self._lane)
                    self._gone[slot] = joined
                    found = True
        return found

    def _make_good(self) -> None:
        """C1: the writer before, or this one before an exception, may have ended between W3 and W5."""
        if self._fence:
            self._fence()  # the doorbell's state is looked at after what was published
        layout = self._segment.layout
        for slot in range(layout.slots):
            self._segment.ring(layout.reader_block(slot) + _layout.READER_BELL)

    def _publish(self, pos: int, messages: int) -> None:
        """W3 to W5: all before `pos` may be read, `messages` more than before."""
        words = self._segment.words
        if self._order:
            self._order()  # ORDER W2 before W3, else the reader copies what was never written
        words[self._write_pos] = pos  # W3
        words[self._messages_in] = words[self._messages_in] + messages & WORD
        if self._fence:
            self._fence()  # W4
        if self._asleep[self._asleep_at]:  # W5
            self._bells.ring()

    def _room(self, pos: int, step: int) -> tuple[int, int, int]:
        """Look for room at `pos` for a record of `step` bytes, after padding where the lane ends.

        Returns:
            Where the record goes; up to where this lap is free; 0, or the read_pos that is wanted.
        """
        segment, capacity = self._segment, self._segment.layout.capacity
        if self._reserved is not None:
            if not self._reserved.is_over(segment.name):
                return pos, pos, RESERVED
            self._reserved = None
        if segment.layout.drop:
            return self._give_up(pos, step)
        read_pos = self.read_pos  # W1, STALE OK: too small only makes us wait once more
        if self._order:
            self._order()  # ORDER W1 before W2, else we write over what is still being copied
        if not can_be(read_pos, pos, capacity):
            raise RingCorrupted(
                f"ring {segment.name!r}: lane {self._lane} was written to {pos:,} and read to {read_pos:,}, "
                f"which a capacity of {capacity:,} does not allow"
            )
        padding, wanted = place(pos, read_pos, step, capacity)
        if wanted:
            if segment.layout.broadcast and self._bury():
                return self._room(pos, step)
            if self.is_mute:
                self._bells.ring()
        if padding:
            segment.words[(self._first + pos % capacity) >> 3] = PADDING  # W2
            pos += padding
            self._publish(pos, 0)
        return pos, min(read_pos + capacity, pos - pos % capacity + capacity), wanted

    def _give_up(self, pos: int, step: int) -> tuple[int, int, int]:
        """`_room` where writers do not wait: what was written a lane's length before is no more."""
        capacity, part = self._segment.layout.capacity, self._segment.layout.part
        given_up = self._segment.words[(self._segment.layout.lane_block(self._lane) + _layout.GIVEN_UP) >> 3]
        if not pos <= given_up <= pos + capacity or pos & 7 or pos >= POSITIONS:
            raise RingCorrupted(
                f"ring {self._segment.name!r}: lane {self._lane} was written to {pos:,} and given up to {given_up:,}, "
                f"which a capacity of {capacity:,} does not allow"
            )
        tail = capacity - pos % capacity
        if step > tail:
            self._announce(pos, tail)
            self._segment.words[(self._first + pos % capacity) >> 3] = PADDING  # W2
            pos += tail
            self._publish(pos, 0)
        self._announce(pos, step)
        # Who begins in another part comes here again: for its mark.
        return pos, max(pos + step, round_up(pos + 1, part)), 0

    def _announce(self, pos: int, nbytes: int) -> None:
        """Before so many bytes at `pos` are written: give up what was there, and mark the part that begins here."""
        words, layout, order = self._segment.words, self._segment.layout, self._order
        given_up = (layout.lane_block(self._lane) + _layout.GIVEN_UP) >> 3
        until = round_up(pos + nbytes, layout.part)
        if words[given_up] < until:
            words[given_up] = until  # D1
            if order:
                order()  # ORDER D1 before W2 and the marks, else a reader takes what is new for what was there
        number = pos // layout.part
        while self._marked < number:
            mark = (layout.marks(self._lane) + (self._marked + 1) % MARKS * _layout.MARK_BYTES) >> 3
            words[mark + (_layout.MARK_COUNT >> 3)] = words[self._messages_in]
            if order:
                order()  # ORDER mark_count before mark_pos, by which a reader knows the mark
            words[mark + (_layout.MARK_POS >> 3)] = pos
            self._marked += 1

    def _take_up_marks(self) -> None:
        """Go on where the lane's last writer ended, wherever that was: with its marks, and with an exact count."""
        words, layout = self._segment.words, self._segment.layout
        pos = words[self._write_pos]
        self._marked, mark_pos, count = find_mark(words, layout, self._lane, pos)
        more = count_records(words, layout, self._lane, mark_pos, pos)
        if self._marked < 0 or more < 0 or count + more >= POSITIONS:
            raise RingCorrupted(f"ring {self._segment.name!r}: lane {self._lane} has no mark before {pos:,}")
        words[self._messages_in] = count + more

    def _serve(self, request: Any) -> int | None:
        """Requests that are not one message as it comes."""
        if type(request) is WriteBatch:
            return self._write_batch(request)
        assert type(request) is Gather
        return self._gather(request)

    def _gather(self, request: Gather) -> int | None:
        pos, _, wanted = self._room(self._segment.words[self._write_pos], record_bytes(request.size))
        if wanted:
            return wanted
        at = self._first + pos % self._segment.layout.capacity
        self._segment.words[at >> 3] = request.size  # W2
        at += RECORD_HEADER
        for buffer in request.buffers:
            self._segment.map[at : at + len(buffer)] = buffer  # W2
            at += len(buffer)
        self._publish(pos + record_bytes(request.size), 1)
        return None

    def _write_batch(self, batch: WriteBatch) -> int | None:
        segment, messages = self._segment, batch.messages
        first, capacity = self._first, segment.layout.capacity
        pos = segment.words[self._write_pos]
        while batch.done < len(messages):
            size = len(messages[batch.done])
            step = record_bytes(size)
            pos, free, wanted = self._room(pos, step)
            if wanted:
                return wanted
            at = first + pos % capacity
            room = min(free - pos, BURST)
            if size > JOINED:
                taken, nbytes = 1, step
                segment.words[at >> 3] = size
                segment.map[at + RECORD_HEADER : at + RECORD_HEADER + size] = messages[batch.done]  # W2
            else:
                if batch.size >= 0:
                    run = messages[batch.done : batch.done + room // step]
                    records, taken = join_run(run, size), len(run)
                else:
                    records, taken = join_mixed(messages, batch.done, room)
                nbytes = len(records)
                segment.map[at : at + nbytes] = records  # W2
            pos += nbytes
            self._publish(pos, taken)
            batch.done += taken
        return None

    def _steps(self) -> Generator[Any, Any, None]:
        segment = self._segment
        layout, words, ring, order = segment.layout, segment.words, segment.map, self._order
        capacity, max_message = layout.capacity, layout.max_message
        sleepers, asleep = self._asleep, self._asleep_at
        memory = self._bytes
        data = yield
        try:
            if self.parking is None:
                self._claim()
            assert self.parking is not None
            if layout.drop:
                self._take_up_marks()
            self._make_good()
            fence = self._fence
            write_pos, messages_in, first = self._write_pos, self._messages_in, self._first
            while True:
                if type(data) is Reserve:
                    # Written out, because little but this is a message's time that is written in place.
                    wanted = 0
                    if not data.ends:
                        pos, size = words[write_pos], data.size
                        if pos + RECORD_HEADER + size > self._free or self._reserved is not None:
                            pos, free, wanted = self._room(pos, record_bytes(size))
                            # Less may be published, and then the next part begin there.
                            self._free = 0 if layout.drop else free
                        if not wanted:
                            data.pos, data.at = pos, at = pos, first + pos % capacity
                            data.view = memory[at + RECORD_HEADER : at + RECORD_HEADER + size]
                            self._reserved = data
                    elif self._reserved is data:
                        if not data.released():
                            raise BufferError(_still_used(segment.name))
                        if data.commit is not None:
                            words[data.at >> 3] = data.commit  # W2 is this, and what the caller did to the view
                            self._publish(data.pos + record_bytes(data.commit), 1)
                        self._reserved = None
                        self.parking.wake()  # this handle's other threads, which waited for it
                    data = None
                    data = yield wanted or None
                    continue
                if isinstance(data, WriteRequest):
                    answer = self._serve(data)
                    data = None
                    data = yield answer
                    continue
                pos, count = words[write_pos], words[messages_in] & WORD >> 1
                at = stop = first + pos % capacity  # records go from here to there: no room until looked for
                base = pos - at  # the position that the segment's byte 0 would have in this lap
                size = -1
                while True:
                    if len(data) != size:
                        if isinstance(data, WriteRequest):
                            break
                        if len(data) > max_message:
                            raise MessageTooLarge(segment.name, len(data), max_message)
                        size = len(data)
                        step = record_bytes(size)
                        pack = _packer(size) if size <= PACKED else None
                    end = at + step
                    if end > stop:
                        pos, free, wanted = self._room(base + at, step)
                        at = first + pos % capacity
                        base = pos - at
                        stop = free - base
                        if wanted:
                            data = None  # the caller's buffer is not ours to hold meanwhile
                            data = yield wanted
                            continue
                        end = at + step
                    if pack is not None:
                        pack(ring, at, size, data)  # W2
                    else:
                        words[at >> 3] = size
                        ring[at + RECORD_HEADER : at + RECORD_HEADER + size] = data  # W2
                    if order:
                        order()  # ORDER W2 before W3, as in _publish
                    words[write_pos] = base + end  # W3
                    at = end
                    words[messages_in] = count = count + 1
                    if fence:
                        fence()  # W4
                    if sleepers[asleep]:  # W5
                        self._bells.ring()
                    data = None
                    data = yield None
        except (GeneratorExit, MessageTooLarge, RingBusy):
            raise
        except BaseException:
            # It may have come between W3 and W5. If another one comes here, the next operation does C1.
            if self.parking is not None:
                self._make_good()
            raise


class _Any:
    """Is one of these bytes not zero? To be asked by a subscript."""

    def __init__(self, buffer: mmap.mmap, start: int, stop: int) -> None:
        self._buffer, self._start, self._stop = buffer, start, stop

    def __getitem__(self, _: int) -> bool:
        return self._buffer.find(b"\1", self._start, self._stop) >= 0


# ---------------------------------------------------------------- marks, where who lags loses messages


def find_mark(words: memoryview, layout: Layout, lane: int, pos: int, order: Fence = None) -> tuple[int, int, int]:
    """The last mark of a lane that is at `pos` or before it: the number of its part, its position, and its count."""
    marks = layout.marks(lane) >> 3
    for number in range(pos // layout.part, max(-1, pos // layout.part - MARKS), -1):
        mark = marks + number % MARKS * (_layout.MARK_BYTES >> 3)
        mark_pos = words[mark + (_layout.MARK_POS >> 3)]
        if order:
            order()  # ORDER mark_pos before mark_count, as they were stored
        if number * layout.part <= mark_pos <= pos:
            return number, mark_pos, words[mark + (_layout.MARK_COUNT >> 3)]
    return -1, pos, 0


def count_records(words: memoryview, layout: Layout, lane: int, start: int, stop: int) -> int:
    """How many messages lie from one position in a lane to another; -1 if these are no records."""
    count, first, capacity = 0, layout.lane_bytes(lane), layout.capacity
    while start < stop:
        size = words[(first + start % capacity) >> 3]
        if size == PADDING:
            start += capacity - start % capacity
        else:
            start += record_bytes(size)
            count += 1
    return count if start == stop else -1


# ---------------------------------------------------------------- reading


class _Lane:
    """One lane as its reader sees it: where its words are, and how far it has been read."""

    __slots__ = (
        "backed", "bell", "count", "damage", "end", "first", "given_up", "held", "messages_out", "number", "parked",
        "pos", "read_pos", "rung", "seen", "top", "wanted", "write_pos",
    )  # fmt: skip

    def __init__(self, layout: Layout, number: int, slot: int = 0) -> None:
        block, cursor = layout.lane_block(number), layout.cursor(number, slot if layout.broadcast else 0)
        self.number = number
        self.write_pos = (block + _layout.WRITE_POS) >> 3
        self.given_up = (block + _layout.GIVEN_UP) >> 3
        self.parked = (block + _layout.WRITER_PARKED) >> 3
        self.wanted = (block + _layout.WRITER_WANTED) >> 3
        self.bell = block + _layout.WRITER_BELL
        self.read_pos = (cursor + _layout.READ_POS) >> 3
        self.messages_out = (cursor + _layout.MESSAGES_OUT) >> 3
        self.first = layout.lane_bytes(number)
        self.top = self.first + layout.capacity
        self.rung = 0  # the writer's epoch that this handle last rang
        self.damage = ""  # what is wrong with it; it is left alone then
        self.backed = False  # it is sure to have memory
        self.seen = self.held = 0  # the writer's epoch that waits for more than there was, and for how much
        self.pos = self.end = self.count = 0


class Reader:
    """The reading side of a handle, for all lanes. The role is claimed at the first request.

    Requests to `monitor`: None takes one message, or see `ReadOne`, `ReadBatch`, `GiveBack`. Answers: the
    message (bytes; its size if it went to a view; a list for `ReadBatch`), or None when there is nothing.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._lanes: list[_Lane] = []  # those that have ever been claimed, from the first on
        self._last = 0  # the lane that was served last
        self._owed: list[bytes] = []  # out of the ring, but not handed over; replaced, never changed
        self._untold: tuple[_Lane, int, int] | None = None  # where a lane goes on after that many lost; not said yet
        self._bytes = memoryview(segment.map).toreadonly()
        self._borrowed: Borrow | None = None  # nothing else is read meanwhile
        self._fence: Fence = None
        self._order = segment.order_fence()
        self._drops = segment.layout.drop
        self.slot = -1  # also while a claim is tried
        self.joined = 0  # with which number we did; no reader before or after has it
        self.parking: Parking | None = None
        self.monitor = Monitor(self._steps)

    @property
    def claimed(self) -> bool:
        """Is the reader's role ours?"""
        return self.parking is not None

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        self.monitor.refuse_reentry()
        if self.parking is not None:
            self.parking.refuse_reentry()

    def close(self) -> memoryview | None:
        """Wait until no thread is inside, end it, and give the role back.

        Returns:
            What may still be read, so that the role is kept: a view that cannot be released.
        """
        self.monitor.close()
        if self.parking is not None:
            self.parking.close()
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None and not borrowed.released():
            return borrowed.view
        if self.slot >= 0:
            self._leave()
            self._segment.release(_layout.READER + self.slot)
        return None

    def nothing(self) -> bool:
        """Is there nothing to take? For S4, which looks from outside the monitor; in doubt it says no."""
        borrowed = self._borrowed
        if borrowed is not None:
            return not borrowed.left
        return not self._owed and not self._can_take()

    def _can_take(self) -> bool:
        """Is there something in the ring? For `nothing`."""
        words = self._segment.words
        return self._another_used() or not all(
            lane.damage or words[lane.write_pos] in (lane.pos, words[lane.read_pos]) for lane in self._lanes
        )

    def _another_used(self) -> bool:
        """Has a lane come into use that is not known yet?"""
        layout, known = self._segment.layout, len(self._lanes)
        return known < layout.writers and self._segment.map[layout.used_offset + known] != 0

    def was_refused(self) -> bool:
        """Was it another one's turn, of those that compete, and is it to be left to that one for a little longer?"""
        return False

    def pass_on(self) -> None:
        """Who calls leaves a wait without a message. Readers that compete have another one woken for it."""

    def give_back(self, request: ReadRequest) -> None:
        """An exception kept the answer to `request` from the caller: the next one gets it."""
        words = self._segment.words
        before, owed = request.owed
        lost = owed if before is not None and before is not self._owed else []
        for read_pos, pos, messages in request.taken:
            if words[read_pos] >= pos:
                lost = lost + [bytes(message) for message in messages]  # from the caller's buffer, or as it is
        if lost:
            with suppress(MonitorClosed):  # nobody is left to get them
                self.monitor.enter(GiveBack(lost))

    def _take_owed(self, request: ReadRequest, most: int) -> list[bytes]:
        before = self._owed
        owed = before[:most]
        request.owed = before, owed
        self._owed = before[most:]
        return owed

    def _claim(self) -> None:
        segment, layout = self._segment, self._segment.layout
        for slot in range(max(0, self.slot), layout.slots):
            self.slot = slot
            if segment.claim(_layout.READER + slot):
                break
        else:
            self.slot = -1
            if layout.readers == "one":
                raise RingBusy(f"ring {segment.name!r} has a living reader, and was made for one (readers='one')")
            raise RingBusy(
                f"ring {segment.name!r} has {layout.slots} living readers; "
                f"close one, or create the ring with a larger max_readers= (it was max_readers={layout.slots})"
            )
        self._fence = segment.waker_fence()
        if layout.readers != "one":
            self._join()
        reader = layout.reader_block(self.slot)
        asleep = layout.asleep_offset + self.slot if layout.readers != "one" else 0
        self.parking = Parking(
            segment,
            reader + _layout.READER_PARKED,
            reader + _layout.READER_PARKS,
            reader + _layout.READER_BELL,
            asleep=asleep,
        )

    def _join(self) -> None:
        """Have the writers of a broadcast ring wait for us, for what is published from now on."""
        segment, layout, words = self._segment, self._segment.layout, self._segment.words
        joined = (layout.reader_block(self.slot) + _layout.JOINED) >> 3
        self.joined = (words[joined] | 3) + 2 & WORD
        words[joined] = self.joined  # J1
        if not segment.sleeper_fence():  # J2
            time.sleep(0.01)  # nobody can make the writers fence: what they have stored has arrived after that
        for number in range(layout.writers):
            lane = _Lane(layout, number, self.slot)
            pos, count = self._end_of(lane)
            with suppress(RingCorrupted):  # said when it is read
                while self._drops:
                    count = self._count(lane, pos)
                    if count >= 0:
                        break
                    before, pos = pos, words[lane.write_pos]
                    if pos == before:
                        break  # damage: nobody gives up the last mark before write_pos
            words[lane.messages_out] = max(0, count)
            words[lane.read_pos] = pos  # J3
        words[joined] = self.joined | 2  # only now are we there, for who waits for us to write

    def _end_of(self, lane: _Lane) -> tuple[int, int]:
        """Where a lane ends, and how many messages came before; with a writer that never pauses, maybe a few more."""
        words = self._segment.words
        messages_in = (self._segment.layout.lane_block(lane.number) + _layout.MESSAGES_IN) >> 3
        pos = count = 0
        for _ in range(COUNTED):
            pos = words[lane.write_pos]  # J3
            count = words[messages_in]
            if pos == words[lane.write_pos]:
                break
        return pos, count

    def _count(self, lane: _Lane, pos: int) -> int:
        """Where writers do not wait: how many messages there were before `pos`, exactly; -1 if that is lost already."""
        words, layout = self._segment.words, self._segment.layout
        if self._order:
            self._order()  # ORDER write_pos before mark_pos
        number, mark_pos, count = find_mark(words, layout, lane.number, pos, self._order)
        more = count_records(words, layout, lane.number, mark_pos, pos)
        if self._lapped(lane, mark_pos):
            given_up = words[lane.given_up]
            if self._order:
                self._order()  # given_up before write_pos: the one is never a lane ahead of the other
            if given_up > words[lane.write_pos] + layout.capacity:
                raise self._damaged(lane, pos, f"it was given up to {given_up:,}")
            return -1
        if number < 0 or more < 0 or count + more >= POSITIONS:
            raise self._damaged(lane, pos, "it has no mark before")
        return count + more

    def _recount(self) -> None:
        """An exception may have come between a read_pos and the count of it."""
        words = self._segment.words
        for lane in self._lanes:
            if not lane.damage:
                try:
                    count = self._count(lane, words[lane.read_pos])
                except RingCorrupted:
                    lane.damage = ""  # who reads it finds out, and says so
                else:
                    if count >= 0:
                        words[lane.messages_out] = count

    def _leave(self) -> None:
        """Have no writer of a broadcast ring wait for us any longer."""
        words = self._segment.words
        joined = (self._segment.layout.reader_block(self.slot) + _layout.JOINED) >> 3
        if self.joined:
            if words[joined] | 2 == self.joined | 2:  # else this is done again, and the slot may be another's by now
                words[joined] = (self.joined | 3) + 1 & WORD
            self._make_good()  # also if an exception came before it the last time

    def _lapped(self, lane: _Lane, pos: int) -> bool:
        """Where writers do not wait: may what lies at `pos` have been written over, when it had been copied?"""
        if self._order:
            self._order()  # ORDER R2 before D2
        return self._segment.words[lane.given_up] > pos + self._segment.layout.capacity  # D2

    def _pass_over(self, lane: _Lane, pos: int, count: int) -> bool:
        """Go on with the oldest message that is there, if what lies at `pos` is not. Was that so?

        Raises:
            MessagesLost: There were messages in between.
        """
        if not self._lapped(lane, pos):
            return False
        layout, words = self._segment.layout, self._segment.words
        while True:
            given_up = words[lane.given_up]
            if self._order:
                self._order()  # ORDER given_up before mark_pos; the mark is stored anew once it was given up as well
            mark = (layout.marks(lane.number) + given_up // layout.part % MARKS * _layout.MARK_BYTES) >> 3
            mark_pos, mark_count = words[mark + (_layout.MARK_POS >> 3)], words[mark + (_layout.MARK_COUNT >> 3)]
            if not self._lapped(lane, given_up - layout.capacity):
                break
        if not pos < mark_pos <= given_up or not count <= mark_count < POSITIONS or mark_pos & 7:
            raise self._damaged(lane, pos, f"its mark at {mark_pos:,} cannot be")
        if mark_count > count:
            self._untold = lane, mark_pos, mark_count - count
        self._free(lane, mark_pos, mark_count)
        if mark_count > count:
            raise MessagesLost(self._segment.name, mark_count - count, lane.number)
        return True

    def _make_good(self) -> None:
        """C1: the reader before, or this one before an exception, may have ended between R3 and R5."""
        segment, layout = self._segment, self._segment.layout
        if self._fence:
            self._fence()
        for number in range(layout.writers):
            block = layout.lane_block(number)
            if segment.words[(block + _layout.WRITER_PARKED) >> 3] & 1:
                segment.ring(block + _layout.WRITER_BELL)
        if self._owed and self.parking is not None:
            self.parking.wake()

    def _damaged(self, lane: _Lane, pos: int, what: str) -> RingCorrupted:
        """Leave this lane alone from now on, which is to be said once."""
        lane.damage = what
        return RingCorrupted(
            f"ring {self._segment.name!r}: lane {lane.number} is damaged at position {pos:,}: {what}. "
            f"It is skipped from now on, the other lanes are read on"
        )

    def _look(self) -> list[_Lane]:
        """R1 for every lane: those that have something, the first to be served at the end."""
        words = self._segment.words
        while self._another_used():
            lane = _Lane(self._segment.layout, len(self._lanes), self.slot)
            lane.pos, lane.count = words[lane.read_pos], words[lane.messages_out] & WORD >> 1
            self._lanes.append(lane)
        if self._untold is not None:
            lane, pos, lost = self._untold
            if words[lane.read_pos] >= pos:
                raise MessagesLost(self._segment.name, lost, lane.number)
            self._untold = None  # it did not come to R3, and is found out once more
        turns = []
        for lane in self._lanes:
            lane.end = words[lane.write_pos]  # R1
            if lane.end != lane.pos and not lane.damage:
                while self._drops and self._pass_over(lane, lane.pos, lane.count):
                    lane.end = words[lane.write_pos]  # it may have been overtaken again by now
                self._check(lane, lane.pos)
                turns.append(lane)
        if len(turns) > 1:
            self._take_turns(turns)
        if self._order:
            self._order()  # ORDER R1 before R2, else we copy what was there before the record
        return turns

    def _take_turns(self, lanes: list[_Lane]) -> None:
        """Sort these, so that the first after the one that was served last is at the end."""
        lanes.sort(key=lambda lane: (lane.number <= self._last, lane.number), reverse=True)

    def _check(self, lane: _Lane, pos: int) -> None:
        """Raise RingCorrupted if the lane cannot have been published so far."""
        capacity = self._segment.layout.capacity
        if not can_be(pos, lane.end, capacity):
            what = f"its write_pos is {lane.end:,}, which a capacity of {capacity:,} does not allow"
            raise self._damaged(lane, pos, what)
        if not lane.backed:
            self._segment.back(lane.first, capacity)
            lane.backed = True

    def _record(self, lane: _Lane, pos: int) -> tuple[int, int]:
        """The position and size of the record at `pos`, after padding; position ``lane.end`` if there is none.

        A size of -1 is damage: say `_bad_length` once everything before it has been handed over.
        """
        capacity = self._segment.layout.capacity
        while pos != lane.end:
            offset = pos % capacity
            room = min(lane.end - pos, capacity - offset)
            size = self._segment.words[(lane.first + offset) >> 3]
            if RECORD_HEADER + (size + 7 & ~7) <= room:  # as in split_mixed
                return pos, size
            if size != PADDING or room != capacity - offset:
                return pos, -1
            pos += room
        return pos, 0

    def _bad_length(self, lane: _Lane, pos: int) -> RingCorrupted:
        length = self._segment.words[(lane.first + pos % self._segment.layout.capacity) >> 3]
        return self._damaged(lane, pos, f"a length of {length:,} where {lane.end - pos:,} bytes were published")

    def _free(self, lane: _Lane, pos: int, count: int) -> None:
        """R3 to R5: everything before `pos` is consumed."""
        words = self._segment.words
        if self._order:
            self._order()  # ORDER R2 before R3, else the writer overwrites what is still being copied
        words[lane.read_pos] = lane.pos = pos  # R3
        words[lane.messages_out] = lane.count = count
        if self._fence:
            self._fence()  # R4
        if words[lane.parked] & 1:  # R5
            self._ring(lane, pos)

    def _ring(self, lane: _Lane, pos: int) -> None:
        """R5, when the lane's writer is asleep and has the room it waits for."""
        words = self._segment.words
        epoch = words[lane.parked]
        if epoch & 1 and epoch != lane.rung:
            if self._order:
                self._order()  # ORDER epoch before wanted, as they were stored
            wanted = words[lane.wanted]
            if pos >= wanted:
                rung = self._segment.ring(lane.bell)
                lane.rung = epoch if rung else 0
            else:
                lane.seen, lane.held = epoch, wanted

    def _first(self) -> tuple[_Lane, int, int] | None:
        """The lane whose turn it is and that has a record, with the record's position and size; padding is consumed."""
        lanes = self._lanes
        if len(lanes) == 1 and not self._drops and not lanes[0].damage:
            # To look no further takes a quarter of a borrow's time.
            pos, size = self._record(lanes[0], lanes[0].pos)
            if size >= 0 and pos != lanes[0].end:
                return lanes[0], pos, size
        for lane in reversed(self._look()):
            pos, size = self._record(lane, lane.pos)
            if self._drops and self._lapped(lane, lane.pos):
                return self._first()
            if size < 0:
                raise self._bad_length(lane, pos)
            if pos != lane.end:
                return lane, pos, size
            self._free(lane, pos, lane.count)  # nothing but padding
        return None

    def _read_one(self, request: ReadOne) -> bytes | int | None:
        segment, capacity = self._segment, self._segment.layout.capacity
        if self._owed:
            return self._read_owed(request)
        found = self._first()
        if found is None:
            return None
        lane, pos, size = found
        if size > request.room:
            raise BufferTooSmall(segment.name, size, request.room)
        body = lane.first + pos % capacity + RECORD_HEADER
        message: Any
        if request.view is None:
            message = segment.map[body : body + size]  # R2
        else:
            message = request.view[:size]
            message[:] = self._bytes[body : body + size]  # R2
        if self._drops and self._lapped(lane, lane.pos):
            return self._read_one(request)
        pos += record_bytes(size)
        request.taken.append((lane.read_pos, pos, [message]))
        self._last = lane.number
        self._free(lane, pos, lane.count + 1)
        return message if request.view is None else size

    def _is_borrowed(self) -> bool:
        """Does another thread have a message in place? RingBusy if this one has."""
        borrowed = self._borrowed
        if borrowed is not None:
            if not borrowed.is_over(self._segment.name):
                return True
            self._return(borrowed)
        return False

    def _borrow(self, request: Borrow) -> memoryview | None:
        """What the caller does with the view is the copy of the record that comes before R3."""
        capacity = self._segment.layout.capacity
        if self._owed:
            request.owed = self._owed[0]
            request.view = memoryview(request.owed)
            self._borrowed = request
            return request.view
        found = self._first()
        if found is None:
            return None
        lane, pos, size = found
        body = lane.first + pos % capacity + RECORD_HEADER
        request.lane, request.pos, request.count = lane, pos + record_bytes(size), lane.count + 1
        request.view = self._bytes[body : body + size]
        if self._drops:
            request.view = memoryview(bytes(request.view))  # R2: a copy, because nobody waits for the end of the block
            if self._lapped(lane, lane.pos):
                return self._borrow(request)
        self._borrowed = request
        self._last = lane.number
        return request.view

    def _return(self, borrowed: Borrow) -> None:
        """Doing it again, because an exception came in between, is harmless."""
        if self._borrowed is not borrowed:
            return
        if not borrowed.released():
            raise BufferError(_still_used(self._segment.name))
        if borrowed.given and borrowed.lane is not None:
            self._free(borrowed.lane, borrowed.pos, borrowed.count)
        elif borrowed.given and self._owed and self._owed[0] is borrowed.owed:
            self._owed = self._owed[1:]
        self._borrowed = None
        assert self.parking is not None
        self.parking.wake()  # this handle's other threads, which waited for it

    def _read_owed(self, request: ReadOne) -> bytes | int:
        message = self._owed[0]
        if len(message) > request.room:
            raise BufferTooSmall(self._segment.name, len(message), request.room)
        if request.view is not None:
            request.view[: len(message)] = message
        self._take_owed(request, 1)
        return message if request.view is None else len(message)

    def _read_batch(self, request: ReadBatch) -> list[bytes] | None:
        segment, capacity, most = self._segment, self._segment.layout.capacity, request.most
        batch = self._take_owed(request, most) if self._owed else []
        taken = []
        for lane in reversed(self._look()):
            if len(batch) >= most:
                break
            pos, count = lane.pos, lane.count
            messages: list[bytes] = []
            size = 0
            while len(batch) + len(messages) < most:
                start = pos
                pos, size = self._record(lane, pos)
                if self._drops and self._lapped(lane, start):
                    pos, size = start, 0  # what was taken for padding, or for damage, may be a message's bytes
                    break
                if pos == lane.end or size < 0:
                    break
                at = lane.first + pos % capacity
                stop = at + min(lane.end - pos, lane.top - at, max(BURST, record_bytes(size)))
                room = most - len(batch) - len(messages)
                if self._drops:
                    # Writers wait for nobody: copied as it is first, which takes a hundredth of the time.
                    records = segment.map[at:stop]  # R2
                    if self._lapped(lane, start):
                        pos = start
                        break
                    several, nbytes = split_mixed(memoryview(records).cast("Q"), records, 0, stop - at, room)
                else:
                    several, nbytes = split_mixed(segment.words, segment.map, at, stop, room)  # R2
                messages += several
                pos += nbytes
                count += len(several)
            if self._drops and self._lapped(lane, pos) and not batch and not messages:
                return self._read_batch(request)
            if size < 0 and not batch and not messages:
                raise self._bad_length(lane, pos)  # only once everything whole has been handed over
            batch = batch + messages
            taken.append((lane, pos, count))
            request.taken.append((lane.read_pos, pos, messages))
        for lane, pos, count in taken:
            self._last = lane.number
            self._free(lane, pos, count)
        return batch or None

    def _serve(self, request: Any) -> Any:
        """Requests that are not for one message as it comes."""
        kind = type(request)
        if kind is Borrow and request.ends:
            return self._return(request)
        if self._borrowed is not None and kind is not GiveBack and self._is_borrowed():
            return None
        if kind is Borrow:
            return self._borrow(request)
        if kind is ReadBatch:
            return self._read_batch(request)
        if kind is ReadOne:
            return self._read_one(request)
        assert kind is GiveBack
        self._owed = self._owed + request.messages
        self._make_good()
        return None

    def _steps(self) -> Generator[Any, Any, None]:
        segment, capacity = self._segment, self._segment.layout.capacity
        words, ring, order = segment.words, segment.map, self._order
        another_used = segment.layout.used_offset + 1  # a byte that stays zero where there is one lane
        none = lane = _Lane(segment.layout, 0)
        drops = self._drops
        turns: list[_Lane] = []
        answer: list[Any] = []
        alone = False  # there is one lane in use, and it is `lane`: no need to go round
        # Of the lane that is being read: its words, and how far it is read, published and handed over.
        write_pos = read_pos = messages_out = parked = 0
        pos = end = given = count = base = last = 0
        limit = 0  # where the records end that are published in this lap, once that was checked
        size, step = -1, 0  # of the last record
        unpack: Any = None  # what takes one of that size out, once a second one is there
        nowhere = -capacity  # below every `at`, also where `pos` goes back to padding before `base`
        message = yield
        try:
            if self.parking is None:
                self._claim()
            self._make_good()
            fence = self._fence
            for known in self._lanes:
                known.pos, known.count = words[known.read_pos], words[known.messages_out] & WORD >> 1
            while True:
                if message is not None:
                    if lane is not none:
                        lane.pos, lane.count = pos, count
                        lane, pos, alone = none, end, False
                    turns = []
                    answer.append(self._serve(message))
                    message = None  # the caller's buffer is not ours to hold meanwhile, nor is the answer
                    message = yield answer.pop()
                    continue
                if pos == end:
                    if alone:
                        end, limit = words[write_pos], 0  # R1
                        if order:
                            order()  # ORDER R1 before R2, as in _look
                        if ring[another_used]:
                            alone = False
                        elif pos == end:
                            lane.pos, lane.count = pos, count
                            message = yield None
                            continue
                    if not alone:
                        lane.pos, lane.count = pos, count
                        lane, pos = none, end
                        if self._borrowed is not None and self._is_borrowed():
                            message = yield None
                            continue
                        if self._owed:
                            message, self._owed = self._owed[0], self._owed[1:]
                            message = yield message
                            continue
                        if not turns:
                            turns = self._look()
                            if not turns:
                                message = yield None
                                continue
                        lane = turns.pop()
                        self._last = lane.number
                        alone = len(self._lanes) == 1
                        pos = given = lane.pos
                        end, limit, count = lane.end, 0, lane.count
                        write_pos, read_pos, messages_out, parked = (
                            lane.write_pos, lane.read_pos, lane.messages_out, lane.parked << 3
                        )  # fmt: skip
                        base = pos - pos % capacity - lane.first  # the position of the segment's byte 0 in this lap
                        last = nowhere if drops else lane.top - step  # up to here a record like the last one fits
                at = pos - base
                if end - pos == step:
                    following = end
                elif size > PACKED and step < end - pos <= capacity:
                    following = pos + step
                else:
                    following = 0
                if following and at <= last:
                    # One more like the last one, and that is all there is, or it is too long for bursts: the way of a
                    # message that is awaited, written out for its latency. What is no such record is looked at below.
                    if unpack is None:
                        unpack = _record_of(size)
                    length, message = unpack(ring, at)  # R2
                    if length == size:
                        if order:
                            order()  # ORDER R2 before R3, as in _free
                        words[read_pos] = pos = following  # R3
                        words[messages_out] = count = count + 1
                        if fence:
                            fence()  # R4
                        if ring[parked]:  # R5
                            self._ring(lane, pos)
                        given = pos
                        message = yield message
                        continue
                    message = None
                if drops and self._pass_over(lane, pos, count):
                    lane, pos, turns, alone = none, end, [], False
                    continue
                start = pos
                if not limit:
                    lane.end = end
                    self._check(lane, pos)
                    limit = min(lane.top, end - base)
                found = PADDING if drops or at >= limit else words[at >> 3]
                after = at + RECORD_HEADER + (found + 7 & ~7)
                if after > limit:
                    # Padding, or damage, or what may have been written over meanwhile.
                    pos, found = self._record(lane, pos)
                    if drops and self._lapped(lane, start):
                        pos = start
                        continue
                    if found < 0:
                        raise self._bad_length(lane, pos)
                    if pos == end:
                        given = pos
                        self._free(lane, pos, count)  # nothing but padding
                        size, step = -1, 0  # what comes next is not like the last one
                        continue
                    base = pos - pos % capacity - lane.first
                    at, limit = pos - base, min(lane.top, end - base)
                    after = at + record_bytes(found)
                if found != size:
                    size, step, unpack = found, after - at, None
                last = nowhere if drops else lane.top - step
                stop, fourth = min(limit, at + BURST), at + 3 * step  # as in split_mixed
                if fourth < stop and words[after >> 3] == size == words[fourth >> 3]:
                    run = run_of(words, at, size, (stop - at) // step)
                    burst: Sequence[bytes] = split_run(ring, at, run, size)  # R2
                else:
                    burst = (ring[at + RECORD_HEADER : at + RECORD_HEADER + size],)  # R2
                if drops and self._lapped(lane, start):
                    pos = start
                    continue
                for message in burst:
                    if order:
                        order()  # ORDER R2 before R3, as in _free
                    words[read_pos] = pos = pos + step  # R3
                    words[messages_out] = count = count + 1
                    if fence:
                        fence()  # R4
                    if ring[parked] and (pos >= lane.held or words[lane.parked] != lane.seen):  # R5
                        self._ring(lane, pos)
                    given = pos
                    message = yield message
                    if message is not None:
                        break
        except MessagesLost:
            self._untold = None
            raise
        except (GeneratorExit, BufferTooSmall, RingBusy):
            raise
        except BaseException:
            if lane is not none and words[lane.read_pos] != given and type(message) is bytes:
                self._owed = [*self._owed, message]  # out of the ring, but not handed over
            if isinstance(message, ReadRequest):
                message.settle(words, self._owed)
            # It may have come between R3 and R5. If another one comes here, the next operation does C1.
            if self.parking is not None:
                self._make_good()
                if drops:
                    self._recount()
            raise


NOWHERE: Final = WORD + 1  # no lane comes to it, however damaged
HAS: Final = 1  # in `turn`: who wanted it has it


class CompetingReader(Reader):
    """One of several readers that share a cursor on every lane, and take by turns; T1 to T6, X1 to X6.

    What it knows of a lane may be old when it takes again: read_pos tells, which is loaded each time.
    """

    def __init__(self, segment: Segment) -> None:
        layout = segment.layout
        self._turn = (layout.turn_offset + _layout.TURN) >> 3
        self._before = (layout.turn_offset + _layout.TURN_BEFORE) >> 3
        self._inside = -1
        self._ours = 0  # `turn` when it is ours
        self._refused = 0  # how often, one time after another, and without trying hard
        self._bells = ReaderBells(segment)
        self._asleep, self._asleep_at = self._bells.asleep()
        super().__init__(segment)

    def _join(self) -> None:
        layout, words = self._segment.layout, self._segment.words
        block = layout.reader_block(self.slot)
        self._inside = (block + _layout.INSIDE) >> 3
        words[self._inside] = 0
        self._bells.ours = (block + _layout.READER_PARKED) >> 3
        self.joined = words[(block + _layout.JOINED) >> 3] % (POSITIONS // _layout.MAX_COMPETING // 2) + 1
        words[(block + _layout.JOINED) >> 3] = self.joined
        self._ours = (self.joined * _layout.MAX_COMPETING + self.slot) << 1 | HAS

    def _can_take(self) -> bool:
        """Is there something, and our turn to be had?"""
        self._refused = PATIENCE  # who falls asleep has had it: the message that it is rung for is its own to take
        if not self._is_left():
            return False
        if self.monitor.enter(PROBE):
            return True
        self._refuse_reentry()
        return False

    def _refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside by another handle, further up its stack, and waits for itself."""
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code is CompetingReader._steps.__code__:
                reader = frame.f_locals["self"]
                if reader is not self and reader._segment.layout.nonce == self._segment.layout.nonce:
                    name = self._segment.name
                    raise RuntimeError(f"this thread is inside a read of ring {name!r} already, by another handle")
            frame = frame.f_back

    def was_refused(self) -> bool:
        """As for other readers."""
        return 0 < self._refused < PATIENCE

    def _is_left(self) -> bool:
        """Is there a message in a lane, or a lane that is not known yet? Whosever turn it is."""
        return self._another_used() or any(map(self._holds, self._lanes))

    def _holds(self, lane: _Lane) -> bool:
        """Is there a message in this lane, as far as can be told from outside of a turn?"""
        words = self._segment.words
        return words[lane.read_pos] != words[lane.write_pos] and not lane.damage

    def pass_on(self) -> None:
        """T6, for who leaves a wait without a message, and may have been rung for one."""
        if self.parking is not None:
            self._segment.sleeper_fence()  # a waker that saw us asleep had published before; have it arrive
            if self._is_left():
                self._bells.ring()

    def _leave(self) -> None:
        self.pass_on()

    def _take(self) -> bool:
        """T1 to T3: is it our turn, or can it be? Then we are inside."""
        words = self._segment.words
        while words[self._turn] == self._ours or self._take_over():
            words[self._inside] = 1  # T1
            if self._fence:
                self._fence()  # T2
            if words[self._turn] == self._ours:  # T3
                if self._order:
                    self._order()  # ORDER T3 before R1
                self._refused = 0
                return True
            words[self._inside] = 0
        return False

    def _take_over(self) -> bool:
        """X1 to X6: have the turn, unless somebody is inside, or takes it over as well."""
        segment, words = self._segment, self._segment.words
        self._refused = 0
        while segment.claim(_layout.TURN_CLAIM):  # X1
            try:
                if words[self._turn] & HAS:
                    words[self._before] = words[self._turn]  # X2
                    if self._order:
                        self._order()  # ORDER turn_before before turn
                words[self._turn] = self._ours & ~HAS  # X2
                if not segment.sleeper_fence():  # X3
                    time.sleep(0.01)  # nobody can make the others fence: what they have stored has arrived after that
                before = words[self._before]
                if not self._is_inside(before):  # X4
                    if self._order:
                        self._order()  # ORDER X4 before R1
                    words[self._turn] = self._ours  # X4
                    return True
            finally:
                segment.release(_layout.TURN_CLAIM)  # X5
            if self._is_inside(before):  # X6
                break
        return False

    def _is_inside(self, turn: int) -> bool:
        """Is the reader whose turn this was inside, as far as can be told, and alive?"""
        segment, layout, words = self._segment, self._segment.layout, self._segment.words
        joined, slot = divmod(turn >> 1, _layout.MAX_COMPETING)
        if slot >= layout.slots or slot == self.slot:
            return False
        block = layout.reader_block(slot)
        if words[(block + _layout.INSIDE) >> 3] == 0 or words[(block + _layout.JOINED) >> 3] != joined:
            return False
        return segment.is_claimed(_layout.READER + slot)

    def _give(self) -> None:
        """T4 to T6."""
        if self._order:
            self._order()  # ORDER R3 before T4
        self._segment.words[self._inside] = 0  # T4
        if self._fence:
            self._fence()  # T5
        if self._asleep[self._asleep_at] and self._is_left():  # T6
            self._bells.ring()

    def _end_turn(self) -> None:
        """Have neither the turn nor the claim to it, if an exception has left us one of them."""
        if self._order:
            self._order()  # ORDER R3 before T4
        self._segment.words[self._inside] = 0  # T4
        self._segment.release(_layout.TURN_CLAIM)  # X5

    def _candidates(self) -> list[_Lane]:
        """The lanes that seem to have something, the first to be served at the end."""
        lanes = self._lanes
        while self._another_used():
            lanes.append(_Lane(self._segment.layout, len(lanes)))
        found = list(filter(self._holds, lanes))
        if len(found) > 1:
            self._take_turns(found)
        return found

    def _copy_ahead(self, lane: _Lane, most: int) -> tuple[int, Sequence[bytes], int]:
        """R2 before T1, so that a turn is short: copy up to so many messages that may come to be ours.

        What is taken of them is what read_pos then says: as long as it does not go beyond a message's position, nothing
        was written over that record, so it was whole when it was copied. What others take in the meantime may be torn.

        Returns:
            The position of the first, the messages, and the bytes that each takes, or 0 if these are not the same.
            No message where there is something else, or nothing: `_look_inside` tells.
        """
        layout, words, ring = self._segment.layout, self._segment.words, self._segment.map
        pos = words[lane.read_pos]
        end = words[lane.write_pos]  # R1
        if self._order:
            self._order()  # ORDER R1 before R2
        if not lane.backed or pos == end or not can_be(pos, end, layout.capacity):
            return pos, (), 0
        at = lane.first + pos % layout.capacity
        limit = min(at + end - pos, lane.top)
        size = words[at >> 3]
        step = record_bytes(size)
        after = at + step
        messages: Sequence[bytes]
        if after > limit:
            return pos, (), 0
        if after == limit or size > PACKED or most == 1:
            messages = (ring[at + RECORD_HEADER : at + RECORD_HEADER + size],)  # R2
        else:
            limit = min(limit, at + JOINED)
            run = run_of(words, at, size, min(most, (limit - at) // step))
            if run > 1:
                messages = split_run(ring, at, run, size)  # R2
            else:
                messages, _ = split_mixed(words, ring, at, limit, most)  # R2
                step = 0
        if self._order:
            self._order()  # ORDER R2 before read_pos, by which they are taken
        return pos, messages, step

    def _look_inside(self, lane: _Lane) -> None:
        """What there is instead of a message, while nobody else takes: padding, which is consumed, or damage."""
        words = self._segment.words
        pos, lane.end = words[lane.read_pos], words[lane.write_pos]  # R1
        if self._order:
            self._order()  # ORDER R1 before R2
        if pos != lane.end:
            self._check(lane, pos)
            after, size = self._record(lane, pos)
            if size < 0:
                raise self._bad_length(lane, after)
            if after != pos:
                self._free(lane, after, words[lane.messages_out] & WORD >> 1)

    def _serve(self, request: Any) -> Any:
        """Requests that are not for one message as it comes. An exception leaves us inside, for who catches it."""
        if request is PROBE:
            if not self._take():
                return False
            self._give()  # somebody may have been refused in between
            return True
        if type(request) is GiveBack or type(request) is Borrow and request.ends:
            return super()._serve(request)
        if self._borrowed is not None and self._is_borrowed():
            return None
        if self._owed:
            # It needs nobody's turn.
            return self._take_owed(request, request.most) if type(request) is ReadBatch else super()._serve(request)
        if type(request) is Borrow:
            return None  # another thread has just left its message; asked again, there is one taken out
        if not self._is_left() or not self._take():
            return None
        words = self._segment.words
        for lane in self._lanes:
            lane.pos, lane.count = words[lane.read_pos], words[lane.messages_out] & WORD >> 1
            lane.end = lane.pos  # it is looked at anew: whether that is so, and whether it has memory
        answer = super()._serve(request)
        self._give()
        return answer

    def _steps(self) -> Generator[Any, Any, None]:
        words, ring, order = self._segment.words, self._segment.map, self._order
        sleepers, asleep, turn = self._asleep, self._asleep_at, self._turn
        lane = _Lane(self._segment.layout, 0)
        turns: list[_Lane] = []
        held = True  # maybe there is a message owed, or in place
        answer: list[Any] = []
        message: Any = None
        seen = -1  # how far the lane was read when it was another one's turn
        until = NOWHERE  # how far `lane` is read once `message` is out of it, and not handed over
        request = yield
        try:
            if self.parking is None:
                self._claim()
            self._refused = 0  # else `was_refused` would say so until there is something to be refused
            self._end_turn()  # an exception may have come while the last one was dealt with
            self._make_good()
            fence, inside, ours = self._fence, self._inside, self._ours
            while True:
                if request is not None:
                    # What is borrowed is taken out first: nobody can have a message in place while the others go on.
                    if type(request) is Borrow and not request.ends:
                        held = self._borrowed is not None and self._is_borrowed() or bool(self._owed)
                    else:
                        held = True
                    if held:
                        answer.append(self._serve(request))
                        request = None
                        held = bool(self._owed) or self._borrowed is not None
                        request = yield answer.pop()
                        continue
                elif held:
                    if self._borrowed is not None and self._is_borrowed():
                        request = yield None
                        continue
                    if self._owed:
                        message, self._owed = self._owed[0], self._owed[1:]
                        request = yield message
                        continue
                    held = False
                if not turns:
                    turns = self._candidates()
                    if not turns:
                        self._refused = 0  # there is nothing left that we could be refused
                        request = yield None
                        continue
                lane = turns[-1]
                if words[turn] != ours:  # a first look, which T3 repeats
                    if not self._holds(lane):
                        turns.pop()  # others were faster
                        continue
                    pos = words[lane.read_pos]
                    self._refused += 1 if pos != seen else IDLE
                    seen = pos
                    if request is None and self._refused < PATIENCE or not self._take():
                        request = yield None
                        continue
                most = AHEAD if request is None else 1
                pos, copies, step = self._copy_ahead(lane, most)
                if not copies:
                    if not self._take():
                        self._give()  # who had taken over was inside already, and another one may wait for that
                        turns.pop()
                        request = yield None
                        continue
                    self._look_inside(lane)
                    pos, copies, step = self._copy_ahead(lane, most)
                    if not copies:
                        turns.pop()
                        self._give()
                        continue
                read_pos, messages_out, parked = lane.read_pos, lane.messages_out, lane.parked << 3
                count = -1
                for message in copies:
                    words[inside] = 1  # T1
                    if fence:
                        fence()  # T2
                    mine = words[turn] == ours  # T3
                    if order:
                        order()  # ORDER T3 before R1
                    if not mine or words[read_pos] != pos:
                        self._give()  # others have taken it, or are about to
                        break
                    if count < 0:
                        count = words[messages_out] & WORD >> 1
                    until = pos + (step or record_bytes(len(message)))
                    words[read_pos] = pos = until  # R3
                    words[messages_out] = count = count + 1
                    if order:
                        order()  # ORDER R3 before T4
                    words[inside] = 0  # T4
                    if fence:
                        fence()  # T5, R4
                    if ring[parked] and (pos >= lane.held or words[lane.parked] != lane.seen):  # R5
                        self._ring(lane, pos)
                    if sleepers[asleep] and self._is_left():  # T6
                        self._bells.ring()
                    if request is not None:
                        self._owed, until, held = [message], NOWHERE, True
                        break
                    until = NOWHERE
                    request = yield message
                    if request is not None:
                        break
                if count >= 0:  # the others come next, however many were taken
                    turns.pop()
                    self._last = lane.number
        except (GeneratorExit, RingBusy):
            raise
        except BaseException:
            # While nobody else can be inside: if we were, then nobody else has moved read_pos.
            if type(message) is bytes and words[lane.read_pos] >= until and not self._owed:
                self._owed = [message]  # out of the ring, but not handed over; nothing is taken while there is one
            if isinstance(request, ReadRequest):
                request.settle(words, self._owed)
            # It may have come between T1 and T4, R3 and R5, or T4 and T6.
            if self.parking is not None:
                self._end_turn()
                self._make_good()
                self.pass_on()
            raise


# ---------------------------------------------------------------- looking, by who has no part in it


class Seen(Protocol):
    """What a look needs: memory that is only read, and no role. A `Segment` will do as well."""

    name: str
    layout: Layout
    map: mmap.mmap
    words: memoryview

    def order_fence(self) -> Fence: ...
    def claimed(self, first: int, count: int) -> int: ...


class Survey(NamedTuple):
    """All words that tell what a ring is like. Lists have an entry for each lane."""

    written: list[int]  # write_pos
    put: list[int]  # messages_in
    read: list[int]  # read_pos, of the slowest reader; of a broadcast ring with none, write_pos
    taken: list[int]  # messages_out, likewise
    writers_parked: list[int]  # 1: asleep or about to be
    writer_parks: list[int]
    readers_parked: int
    reader_parks: int

    def fill(self, layout: Layout) -> float:
        """How full the fullest lane is, 0.0 to 1.0."""
        return min(1.0, max(0, *(end - pos for pos, end in zip(self.read, self.written))) / layout.capacity)


def joined_slots(segment: Seen, ours: int = -1) -> list[int]:
    """Those of a broadcast ring's living readers that have joined; `ours` is the slot of our own."""
    layout, words = segment.layout, segment.words
    return [
        slot
        for slot in range(layout.slots)
        if words[(layout.reader_block(slot) + _layout.JOINED) >> 3] & 2
        and (slot == ours or segment.claimed(_layout.READER + slot, 1))
    ]


def survey(segment: Seen, ours: int = -1) -> Survey:
    """Look at the whole ring, one word after the other while it goes on; `ours` is the slot of our own reader."""
    layout, words = segment.layout, segment.words
    lanes = [layout.lane_block(lane) for lane in range(layout.writers)]
    readers = [layout.reader_block(slot) for slot in range(layout.slots)]
    slots = joined_slots(segment, ours) if layout.broadcast else [0]

    def column(blocks: Iterable[int], offset: int) -> list[int]:
        return [words[(block + offset) >> 3] for block in blocks]

    def consumed(offset: int) -> list[int]:
        rows = [column((layout.cursor(lane, slot) for lane in range(layout.writers)), offset) for slot in slots]
        return list(map(min, zip(*rows)))

    # What is consumed first: what is written may have grown since then, and never falls below.
    read, taken = consumed(_layout.READ_POS), consumed(_layout.MESSAGES_OUT)
    written, put = column(lanes, _layout.WRITE_POS), column(lanes, _layout.MESSAGES_IN)
    return Survey(
        written=written,
        put=put,
        read=read or written,
        taken=taken or put,
        writers_parked=[epoch & 1 for epoch in column(lanes, _layout.WRITER_PARKED)],
        writer_parks=column(lanes, _layout.WRITER_PARKS),
        readers_parked=sum(epoch & 1 for epoch in column(readers, _layout.READER_PARKED)),
        reader_parks=sum(column(readers, _layout.READER_PARKS)),
    )


def lanes_used(segment: Seen) -> int:
    """How many lanes there are up to the last one that was ever claimed."""
    used, writers = segment.layout.used_offset, segment.layout.writers
    unused = segment.map.find(b"\0", used, used + writers)
    return unused - used if unused >= 0 else writers


class Peeked(NamedTuple):
    """What `peek` saw of a lane."""

    messages: list[bytes]
    pos: int  # where to go on
    missed: int  # bytes that were consumed before they could be copied
    consumed: int  # messages_out then. If some were missed, so many messages come before these, give or take a few


def peek(segment: Seen, lane: int, pos: int) -> Peeked:
    """Copy what a lane holds from `pos` on, some 64 KiB or one message, and take nothing.

    `pos` is a read_pos, or where an earlier look ended. Nobody waits for a look: while it copies the reader may
    consume the records and the writer write over them. So what was copied counts only if read_pos is not beyond it
    afterwards; nothing that is torn is returned.

    Raises:
        RingCorrupted: What was published is no run of records.
    """
    layout, words, order = segment.layout, segment.words, segment.order_fence()
    capacity, first = layout.capacity, layout.lane_bytes(lane)
    read_pos, messages_out = (
        (layout.cursor(lane) + offset) >> 3 for offset in (_layout.READ_POS, _layout.MESSAGES_OUT)
    )
    end = words[(layout.lane_block(lane) + _layout.WRITE_POS) >> 3]  # R1
    if order:
        order()  # ORDER R1 before R2; and before read_pos, which then is no older: the two are at most a lane apart
    free = words[read_pos]
    if max(end, free) >= POSITIONS or (end | free) & 7 or end - free > capacity:
        what = f"was written to {end:,} and read to {free:,}, which a capacity of {capacity:,} does not allow"
        raise RingCorrupted(f"ring {segment.name!r}: lane {lane} {what}")
    start = at = max(pos, free)
    found: list[tuple[int, bytes | None]] = []  # each record's position; None is padding
    length = 0
    while at < end and at - start < BURST:
        offset = at % capacity
        room = min(end - at, capacity - offset)
        length = words[(first + offset) >> 3]
        if length == PADDING and room == capacity - offset:
            found.append((at, None))
            at += room
        elif length <= room - RECORD_HEADER and record_bytes(length) <= room:
            body = first + offset + RECORD_HEADER
            found.append((at, segment.map[body : body + length]))  # R2
            at += record_bytes(length)
        else:
            break
    if order:
        order()  # ORDER R2 before this load: a writer that wrote over what we copied had seen its R3 before (W1)
    free, consumed = words[read_pos], words[messages_out]
    if free > start:
        # Lengths before it may be of other records already, and so lead anywhere. It is where a record begins itself:
        # what was found there, and by going on from there, is whole.
        places = [place for place, _ in found]
        found = found[places.index(free) :] if free in places else []
        if not found:
            at = free
    elif at < end and at - start < BURST:
        what = f"a length of {length:,} where {end - at:,} bytes were published"
        raise RingCorrupted(f"ring {segment.name!r}: lane {lane} is damaged at position {at:,}: {what}")
    messages = [message for _, message in found if message is not None]
    return Peeked(messages, at, max(0, max(start, free) - pos), consumed)
