"""macOS's system library, as two handles of our own. `_darwin` takes its functions out of them.

This is all of the macOS backend that only macOS has, in a module of its own: so that the tests can run
`_darwin` itself on another system, by putting a stand-in for this module in its place.
"""

from __future__ import annotations

import sys
from ctypes import CDLL, PyDLL
from typing import Any

waiting: Any  # lets go of the interpreter: for calls that may sleep
quick: Any  # keeps it: nothing in this process happens meanwhile

if sys.platform != "darwin":
    raise ImportError(f"this is the system library of macOS, not of {sys.platform}")

waiting = CDLL(None, use_errno=True)
quick = PyDLL(None, use_errno=True)
