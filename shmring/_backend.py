"""The one platform choice, and what a backend promises. The tests hold every backend to each line.

- A wait may return early, for no reason; it never returns after its deadline's time has come later
  than the system's timers do, and the ring looks again after each.
- `deadline` is on ``time.perf_counter``: the monotonic clock everywhere, and never in steps (``time.monotonic``
  goes in steps of 16 ms on Windows before CPython 3.13). A signal ends a wait, so that Python's handlers run.
- A wait returns if the bell was rung since it was noted, in all threads of the handle that has it.
- A ring with nobody asleep is harmless. Ringing and the memory of it are indivisible.
- `ring` is False where there was no descriptor left for a doorbell: it is to be rung with the next message.
- No descriptor or handle survives ``exec``.
- `create` fails if the name exists, `open` if it does not; neither leaves anything behind.
- A claim is exclusive among handles, also of one process, and ends when it is released, its segment
  is closed, or its process dies, however.
- `close` and `release` do nothing the second time.
"""

from __future__ import annotations

import sys
from typing import Protocol

from . import _words
from ._layout import Layout

if sys.platform == "linux":
    from . import _linux as os_backend
elif sys.platform == "darwin":
    from . import _darwin as os_backend
elif sys.platform == "win32":
    from . import _windows as os_backend
else:
    raise ImportError(f"shmring has no backend for {sys.platform!r}")


class Segment(_words.Segment, Protocol):
    """The memory and the claims of one handle: what `_words.Segment` lists, and its life."""

    @classmethod
    def create(cls, name: str, layout: Layout, mode: int, replace: bool) -> Segment:
        """Make a ring's memory, whole, and give it its name."""

    @classmethod
    def open(cls, name: str, any_owner: bool) -> Segment:
        """Attach to a ring that somebody has open, or that is kept."""

    def is_claimed(self, byte: int) -> bool:
        """Does another handle hold this role now?"""

    def unlink(self) -> None:
        """Remove the name if it still is this ring's."""

    def leave(self) -> None:
        """Be present no more, and remove the name if nobody else is; the roles stay."""

    def close(self, keep: bool = False) -> None:
        """Leave, and give up everything but the memory; with `keep` the name stays."""


__all__ = ["Segment", "os_backend"]
