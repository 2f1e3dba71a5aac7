"""Waiting in event loops: the tasks that wait for one side of a handle, and its doorbell in their loops.

A task that finds nothing puts itself down, arms the doorbell, and sleeps; whoever hears the doorbell wakes all that
are put down, and each tries again. What a task waits for is taken by itself, when it runs: one that is
cancelled has taken nothing. The doorbell is heard, that is emptied, before any of them looks: what comes after that
rings it again once they have found nothing and armed it.

This module is imported with the first task that waits, because asyncio takes longer to import than all the rest.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from ._monitor import MonitorClosed
from ._parking import Parking
from ._words import Doorbell

BURST: Final = 64  # messages that a task gets, or writes, without letting the loop's others run
BUSY: Final = 4  # messages after which it is a stream: the other side need not ring until there is nothing
LOOK_AGAIN: Final = 0.001  # seconds, where wakers cannot be made to fence; see `Parking.park`

_Waiting = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]", int]


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Watch:
    """The tasks that wait for a side of a handle, in any number of loops, whose doorbell is attached."""

    def __init__(
        self, parking: Parking, nothing: Callable[[int], bool], unheard: Callable[[], None] | None = None
    ) -> None:
        """`nothing` says whether there is nothing for who needs so much; `unheard` is for a ring that no task heard."""
        self.parking = parking
        self._nothing = nothing
        self._unheard = unheard
        self._doorbell: Doorbell = parking.attach()
        self._waiting: list[_Waiting] = []
        self._listening: list[asyncio.AbstractEventLoop] = []
        self._quick = 0  # times that nobody had to wait, one after another
        self.closed = False

    def is_time_to_pause(self) -> bool:
        """To be asked by each task before it tries: one that never has to wait would keep the loop to itself."""
        self._quick = quick = self._quick + 1
        if quick < BUSY:
            return False
        if quick == BUSY:
            self.rest()
        elif quick > BURST:
            self._quick = BUSY
            return True
        return False

    def rest(self) -> None:
        """Have nobody ring while no task waits."""
        if not self._waiting:
            self.parking.disarm()
            self._wake()  # those of another thread's loop that came in between look again

    async def wait(self, needs: int, deadline: float | None) -> None:
        """Sleep while there is nothing, until `deadline` (time.perf_counter), or for no reason at all.

        Raises:
            MonitorClosed: The handle is closed.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        entry = loop, future, needs
        timer = None
        self._quick = 0
        # First put down, then armed: who hears the doorbell in another thread's loop wakes those who are.
        try:
            self._waiting.append(entry)
            self._listen(loop)
            if len(self._waiting) > 1:
                needs = min([needs, *(other for _, _, other in list(self._waiting))])
            if not self.parking.arm(partial(self._nothing, needs), needs, False) or self.closed:
                self._wake()  # there is something for one of them, maybe not for us: let all of them run
            if not self.parking.fenced:
                soon = time.perf_counter() + LOOK_AGAIN
                deadline = soon if deadline is None else min(soon, deadline)
            if deadline is not None:
                timer = loop.call_later(max(0.0, deadline - time.perf_counter()), _set, future)
            await future
        except OSError:
            if self.closed:
                raise MonitorClosed from None  # by another thread, and its doorbell with it
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if entry in self._waiting:
                with suppress(ValueError):
                    self._waiting.remove(entry)

    def _wake(self, here: asyncio.AbstractEventLoop | None = None) -> None:
        for entry in list(self._waiting):
            loop, future, _ = entry
            if loop is here:
                _set(future)
            else:
                with suppress(RuntimeError):  # it is closed
                    loop.call_soon_threadsafe(_set, future)
            # Told first: an exception in between tells it again. No `suppress`: the message has come already.
            try:
                self._waiting.remove(entry)
            except ValueError:
                pass  # by another thread

    def _heard(self) -> None:
        if not self.closed:
            try:
                try:
                    self.parking.hear()
                finally:
                    if self._unheard is not None and not self._waiting:
                        self.parking.disarm()
                        self._unheard()
                    self._wake(asyncio._get_running_loop())
            except BaseException:
                self._doorbell.ring()  # a signal handler's: who has not been told yet is told when it is heard again
                raise

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the loop call `_heard` when the doorbell was rung."""
        if loop in self._listening:
            return
        for other in list(self._listening):
            if other.is_closed():
                with suppress(ValueError):
                    self._listening.remove(other)
        if sys.platform == "win32":
            self._listen_once(loop)
        else:
            loop.add_reader(self._doorbell.fileno(), self._heard)
        self._listening.append(loop)

    def _listen_once(self, loop: asyncio.AbstractEventLoop) -> None:
        """On Windows a handle can be waited for by the proactor alone, once, and by a call of its own."""
        wait_for_handle = getattr(getattr(loop, "_proactor", None), "wait_for_handle", None)
        if wait_for_handle is None:
            kind = type(loop).__name__
            raise NotImplementedError(f"on Windows a ring waits in asyncio's ProactorEventLoop, not in a {kind}")
        doorbell = self._doorbell

        def heard(_: Any) -> None:
            with suppress(ValueError):
                self._listening.remove(loop)
            if self.closed:
                if not self._listening:
                    doorbell.close()  # no loop waits for it any more
            else:
                self._heard()

        wait_for_handle(doorbell.fileno()).add_done_callback(heard)

    def _unlisten(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._doorbell.fileno())
        with suppress(ValueError):
            self._listening.remove(loop)
        if not self._listening:
            self._doorbell.close()

    def close(self) -> None:
        """Wake all tasks, and close the doorbell as soon as no loop has it."""
        self.closed = True
        self._wake()
        loops = [loop for loop in self._listening if not loop.is_closed()]
        if not loops:
            self._doorbell.close()
        elif sys.platform == "win32":
            self._doorbell.ring()
        else:
            here = asyncio._get_running_loop()
            for loop in loops:
                if loop is here or not loop.is_running():
                    self._unlisten(loop)
                else:
                    with suppress(RuntimeError):  # it has just been closed
                        loop.call_soon_threadsafe(self._unlisten, loop)
