"""One thread at a time: a generator as a monitor.

The state that belongs to one side of a handle (a cached position, a half-eaten burst) lives in the
local variables of a generator, and every operation is one ``send``. The interpreter itself lets a
single thread into a generator and refuses the next one, which is all that a lock would do, and:

- there is no locked instruction, which on a message's way costs more than its own time (it waits
  for the stores before it); measured, the generator is as fast as no lock at all, a ``Lock`` or a
  token in a list costs 10 to 40 % more;
- an exception at any instruction leaves nothing locked, because there is nothing to unlock;
- re-entry from a signal handler is refused as well, instead of hanging.

Such a generator never blocks. An exception that leaves it ends it, and the next operation starts
another one from the same function, which reads what it needs from the shared words, exactly as
the process that comes after a killed one does. So there is one kind of recovery, not two.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final
from weakref import ref


class MonitorClosed(Exception):
    """The monitor was closed: there is nothing left to enter."""


def _what_a_running_generator_says() -> tuple[Any, ...]:
    def steps() -> Generator[None, None, None]:
        yield
        next(generator)

    generator = steps()
    next(generator)
    try:
        next(generator)
    except ValueError as error:
        return error.args
    raise AssertionError("a generator was entered twice")


def no_steps() -> Generator[None, Any, None]:
    """What a monitor comes to that is closed."""
    yield


STAY: Final = 0.001  # seconds that a thread waits for another one to leave before it looks whether it may

BUSY: Final = _what_a_running_generator_says()


def _nobody(answer: Any) -> None:
    """What a closed generator gave cannot be taken back."""


class _Locked:
    """A generator where there is no GIL to keep a second thread out. It is BUSY as any other, if not at once."""

    def __init__(self, generator: Generator[Any, Any, None], take_back: Callable[[Any], None]) -> None:
        self._generator = generator
        self._take_back = take_back
        self._lock = threading.RLock()  # re-entrant, so that the generator itself refuses re-entry

    def is_ours(self) -> bool:
        """Is this thread inside, further up its stack, or just coming or going?"""
        return bool(getattr(self._lock, "_is_owned")())  # noqa: B009 - not in RLock's type

    def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        entered = False
        try:
            # Not by a call: between one and its result's use a signal handler may run, whose exception would leave it
            # locked. And not for ever: who is inside may wait for this thread, which is to be refused then.
            (entered,) = map(self._lock.acquire, (True,), (STAY,))
            if entered:
                return call(*arguments)
        finally:
            if entered:
                self._lock.release()
        raise ValueError(*BUSY)

    def send(self, request: Any) -> Any:
        return self._run(self._generator.send, request)

    def close(self) -> None:
        self._run(self._generator.close)
        self._take_back = _nobody  # it was a method of who has this one: a cycle

    def __iter__(self) -> _Locked:
        return self

    def __next__(self) -> Any:
        answers: list[Any] = []  # from the generator into it in one step, so that none is lost
        try:
            self._run(answers.extend, islice(self._generator, 1))
            if not answers:
                raise StopIteration
            return answers[0]
        except BaseException:
            for answer in answers:
                if answer is not None:
                    self._take_back(answer)
            raise


class Monitor:
    """A generator that one thread enters at a time, and that is started anew after an exception.

    Attributes:
        steps: The generator of now, for who is in a hurry: ``send`` enters at once, or raises ValueError
            with the arguments BUSY because a thread is inside, or StopIteration because the generator
            has ended; iterating sends None. `enter` is the answer to both.
    """

    def __init__(
        self,
        function: Callable[[], Generator[Any, Any, None]],
        within: Sequence[Any] = (),
        undo: Callable[[Any], Any] | None = None,
    ) -> None:
        """`undo` makes the request that takes back an answer to None: an exception kept it from who iterates."""
        self._undo = undo
        self._function = function
        self._within = within  # whose `close` the generator calls: a thread that is in there must not wait here
        self._heirs: dict[ref[Any], Any] = {}  # which generator came after which, while a thread has the dead one
        self._closed = False
        self.steps = self._start()

    def _start(self) -> Any:
        generator = self._function()
        next(generator)
        if getattr(sys, "_is_gil_enabled", lambda: True)():
            return generator
        return _Locked(generator, self._take_back if self._undo else _nobody)

    def enter(self, request: Any) -> Any:
        """Send `request`, waiting while another thread is inside (it never stays).

        Raises:
            MonitorClosed: `close` was called.
            RuntimeError: This very thread is inside: it is in a signal handler, or the like.
        """
        while True:
            steps = self.steps
            try:
                return steps.send(request)
            except StopIteration:
                self._start_anew(steps)
            except ValueError as error:
                if error.args != BUSY:
                    raise
                if self._closed:  # after a fork a lock may be held by a thread that is not there
                    raise MonitorClosed from None
                self._let_go()

    def _take_back(self, answer: Any) -> None:
        assert self._undo is not None
        with suppress(MonitorClosed):  # nobody is left to get it
            self.enter(self._undo(answer))

    def close(self) -> None:
        """End the generator once nobody is inside. Closing again does nothing.

        Raises:
            RuntimeError: As `enter`; it is not closed then.
        """
        self.refuse_reentry()
        self._closed = True
        steps = self.steps  # maybe one that is dead, set back by a slow thread: its heirs lead to the last one
        while steps is not None:
            try:
                steps.close()
            except ValueError as error:
                if error.args != BUSY:
                    raise
                self._let_go()
            else:
                steps = self._heirs.get(ref(steps))
        self._function = no_steps  # the old one may be a method of who has this monitor: a cycle

    def _start_anew(self, dead: Any) -> None:
        if not self._closed:
            # setdefault is one step: of several threads that come here, one is first, and the others take its heir.
            # Its entry goes with the dead one, in C: no exception of a signal handler is lost in there.
            heir = self._heirs.setdefault(ref(dead, self._heirs.pop), self._start())
            if not self._closed:  # looked at after the heir is where `close` finds it
                self.steps = heir
                return
            try:
                heir.close()
            except ValueError as error:  # somebody is inside, who came before `close`, which waits for him
                if error.args != BUSY:
                    raise
        raise MonitorClosed

    def refuse_reentry(self) -> None:
        """Raise RuntimeError if this thread is inside, further up its stack."""
        if self._is_ours():
            raise RuntimeError(
                "a ring was used by a thread that is inside an operation on it already (from a signal handler?)"
            ) from None
        for other in self._within:
            other.refuse_reentry()

    def _is_ours(self) -> bool:
        steps = self.steps
        if isinstance(steps, _Locked):
            return steps.is_ours()
        inside = steps.gi_frame
        frame: Any = sys._getframe()
        while frame is not None:
            if frame is inside:
                return True
            frame = frame.f_back
        return False

    def _let_go(self) -> None:
        """Let the thread that is inside go on, unless it is this one."""
        self.refuse_reentry()
        time.sleep(0)
