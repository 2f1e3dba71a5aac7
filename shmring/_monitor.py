"""One thread at a time: a generator as a monitor.

The state that belongs to one side of a handle (a cached position, a half-eaten burst) lives in the
local variables of a generator, and every operation is one ``send``. The interpreter itself lets a
single thread into a generator and refuses the next one, which is all that a lock would do, and:

- there is no locked instruction, which on a message's way costs more than its own time (it waits
  for the stores before it); measured, the generator is as fast as no lock at all, a ``Lock`` or a
  token in a list costs 10 to 40 % more;
- an exception at any instruction leaves nothing locked, because there is nothing to unlock;
- re-entry from a signal handler is refused as well, instead of hanging.

So such a generator never blocks, and never ends before `Monitor.close`: it catches what is raised
inside, reloads its state from the shared words, and hands the exception out as a `Raised`.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator
from typing import Any


class Raised:
    """An exception on its way out of a monitor."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error: BaseException | None = error

    def take(self) -> BaseException:
        """The exception, once: the monitor must not keep it, nor the frames that hang on it."""
        error, self._error = self._error, None
        assert error is not None
        return error


def unwrap(answer: Any) -> Any:
    """An answer of a monitor, or the exception in it."""
    if type(answer) is Raised:
        raise answer.take()
    return answer


class _Locked:
    """A generator where there is no GIL to keep a second thread out."""

    def __init__(self, generator: Generator[Any, Any, None]) -> None:
        self._generator = generator
        self._lock = threading.RLock()  # re-entrant, so that the generator itself refuses re-entry

    @property
    def gi_frame(self) -> Any:
        return getattr(self._generator, "gi_frame")  # noqa: B009 - not in Generator's type

    def send(self, request: Any) -> Any:
        with self._lock:
            return self._generator.send(request)

    def close(self) -> None:
        with self._lock:
            self._generator.close()

    def __iter__(self) -> _Locked:
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._generator)


class Monitor:
    """A started generator, entered by one thread at a time.

    Attributes:
        steps: The generator. ``steps.send(request)`` enters at once or raises ValueError because a
            thread is inside, StopIteration because the monitor is closed; iterating sends None.
    """

    def __init__(self, generator: Generator[Any, Any, None]) -> None:
        next(generator)
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        self.steps: Any = generator if gil else _Locked(generator)

    def enter(self, request: Any) -> Any:
        """Send `request`, waiting while another thread is inside (it never stays).

        Raises:
            RuntimeError: This very thread is inside: called from a signal handler, or the like.
            StopIteration: The monitor is closed.
        """
        while True:
            try:
                return self.steps.send(request)
            except ValueError:
                self._let_go()

    def close(self) -> None:
        """End the generator once nobody is inside. Closing again does nothing."""
        while True:
            try:
                self.steps.close()
                return
            except ValueError:
                self._let_go()

    def _let_go(self) -> None:
        inside = self.steps.gi_frame
        frame = sys._getframe()
        while frame is not None:
            if frame is inside:
                raise RuntimeError(
                    "a ring was used again by the thread that is inside one of its operations (from a signal handler?)"
                ) from None
            frame = frame.f_back  # type: ignore[assignment]
        time.sleep(0)
