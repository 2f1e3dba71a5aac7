"""Messages between Python processes on one machine, through shared memory, in pure Python."""

from ._errors import (
    BufferTooSmall,
    MessagesLost,
    MessageTooLarge,
    RingBusy,
    RingClosed,
    RingCorrupted,
    RingError,
    RingIncompatible,
    RingTimeout,
)
from ._ring import Borrowed, Doorbell, Reservation, Ring, RingStats, unlink

__version__ = "0.1.0"

__all__ = [
    "Borrowed",
    "BufferTooSmall",
    "Doorbell",
    "MessageTooLarge",
    "MessagesLost",
    "Reservation",
    "Ring",
    "RingBusy",
    "RingClosed",
    "RingCorrupted",
    "RingError",
    "RingIncompatible",
    "RingStats",
    "RingTimeout",
    "unlink",
]
