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
- `names`, `Look` and `collect` are for who looks at rings and tidies up: what is seen stays as it is, and what is
  collected was nobody's. `strays` is what there is of rings that have no name any more, and nobody either.
"""

from __future__ import annotations

import mmap
import sys
from typing import Protocol

from . import _words
from ._layout import Layout
from ._words import Fence

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

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles, from `first` on, other handles hold now."""

    def unlink(self) -> None:
        """Remove the name if it still is this ring's."""

    def leave(self) -> None:
        """Be present no more, and remove the name if nobody else is; the roles stay."""

    def close(self, keep: bool = False) -> None:
        """Leave, and give up everything but the memory; with `keep` the name stays."""


class Look(Protocol):
    """A ring as who has no part in it sees it. Nobody notices: it locks, writes and keeps nothing.

    Who makes one gets FileNotFoundError if nothing has the name, PermissionError if it is not to be read, another
    OSError or an empty `header` if it is no ring. Is the ring removed meanwhile, this one is still what is seen.

    Attributes:
        where: Its path, or what the system calls its memory.
        header: Its first 512 bytes, or as many as there are.
        size, memory: Bytes of the segment, and how much memory they take; None where the system does not tell.
        owner, mode: User and permissions; None on Windows.
        layout, map, words: There since `attach`, for reading.
    """

    name: str
    where: str
    header: bytes
    size: int | None
    memory: int | None
    owner: int | None
    mode: int | None
    layout: Layout
    map: mmap.mmap
    words: memoryview

    def attach(self, layout: Layout, nbytes: int) -> None:
        """Map the first `nbytes` of a ring that has this layout."""

    def is_open(self) -> bool:
        """Has anybody the ring open?"""

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles are held now."""

    def order_fence(self) -> Fence:
        """What keeps loads in order; None where the machine does."""

    def close(self) -> None:
        """Look no more."""


__all__ = ["Look", "Segment", "os_backend"]
