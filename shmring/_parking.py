"""Falling asleep and waking up: S1 to S6, and the bells of W5."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any, Final

from . import _layout
from ._monitor import Monitor, MonitorClosed
from ._words import WORD, Doorbell, Segment

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
        self._segment = segment
        self._order = segment.order_fence()
        self._entries: list[list[int]] = []  # of each reader, once one is rung
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

    def _all(self) -> list[list[int]]:
        """Of each reader: the index of its epoch, its bell, the epoch that was last rung.

        Worked out once, as a reader that sleeps waits for each bytecode of `ring`; not before one does, because with a
        thousand of them it takes half of what it takes to open a ring. Where they compete, who was rung last is last.
        """
        blocks = map(self._segment.layout.reader_block, range(self._segment.layout.slots))
        return [[(block + _layout.READER_PARKED) >> 3, block + _layout.READER_BELL, 0] for block in blocks]

    def ring(self) -> None:
        """W5, when a reader is asleep: all of them, or, where they compete, one."""
        segment, entries, ours = self._segment, self._entries, self.ours
        if not entries:
            entries = self._entries = self._all()
        for entry in entries:
            parked, bell, rung = entry
            epoch = segment.words[parked]
            if epoch & 1 and epoch != rung and parked != ours:
                if self._order:
                    self._order()  # ORDER epoch before doorbell, as they were stored
                rung = segment.ring(bell)
                entry[2] = epoch if rung else -1  # after it: an exception in between rings twice, harmlessly
                if rung and segment.layout.compete:
                    after = entries.index(entry) + 1
                    self._entries = entries[after:] + entries[:after]
                    return


class _Any:
    """Is one of these bytes not zero? To be asked by a subscript."""

    def __init__(self, buffer: mmap.mmap, start: int, stop: int) -> None:
        self._buffer, self._start, self._stop = buffer, start, stop

    def __getitem__(self, _: int) -> bool:
        return self._buffer.find(b"\1", self._start, self._stop) >= 0
