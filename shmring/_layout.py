"""The shared bytes: where everything lies, and who writes it. Pure functions over ints and bytes.

A segment is a header, three tables of control words, and the lanes. All numbers are in the byte
order of the machine that made the ring; `machine` says which, and another kind is refused.

Header, at 0, 512 bytes. Written once by the creator before the ring has its name, `magic` last;
`checksum` covers bytes 0 to 120 (with `checksum` itself left out: it comes after them).

    offset  size  name             writer   meaning
    0       8     magic            creator  b"shmring" and a zero: the ring is complete
    8       4     layout_version   creator  LAYOUT_VERSION
    12      4     machine          creator  MACHINES: byte order and memory model
    16      8     segment_bytes    creator  size of the whole segment
    24      8     capacity         creator  bytes in a lane, a multiple of 4096
    32      4     writers          creator  lanes
    36      4     readers          creator  0 one, 1 compete, 2 broadcast
    40      4     reader_slots     creator  rows in the reader table
    44      4     cursor_rows      creator  rows in the cursor table
    48      4     flags            creator  bit 0: keep; bit 1: who lags loses messages
    52      4     -                -        zero
    56      8     lanes_offset     creator  where lane 0 begins, a multiple of 4096
    64      16    nonce            creator  tells this ring from others of the same name
    80      40    -                -        zero
    120     8     checksum         creator  CRC-32 of bytes 0 to 120
    128     384   -                -        zero

Lane table, at 512: 256 bytes for each of `writers` lanes. The first line changes with every
message, the second when the lane's writer parks; a line is 128 bytes, because processors fetch the
64-byte lines of such a pair together.

    offset  size  name             writer       meaning
    0       8     write_pos        lane writer  bytes ever published in this lane
    8       8     messages_in      lane writer  messages ever published; may lag by one per kill
    16      8     writer_parks     lane writer  times a writer of this lane went to sleep
    24      8     given_up         lane writer  where who lags loses: a lane's length before this, nothing can be read
    128     8     writer_parked    lane writer  epoch; its lowest byte is 1: asleep or about to be, 0: awake
    136     8     writer_wanted    lane writer  the sleeper has room once read_pos has come to this
    144     4     writer_bell      the kernel   futex: FUTEX_WAKE_OP adds 1 and wakes, in one call; else zero
    148     4     -                -            zero
    152     8     writer_doorbell  lane writer  bit 0: ring a doorbell too; bit 1: that one only; and a number

Reader table, after the lanes' table: 256 bytes for each of `reader_slots` readers.

    offset  size  name             writer       meaning
    0       8     reader_parked    reader       epoch; its lowest byte is 1: asleep or about to be, 0: awake
    8       8     reader_parks     reader       times a reader in this slot went to sleep
    16      8     joined           reader       broadcast: bit 0: a reader joins, or has; bit 1: it has; and a number
                                                compete: a number that no reader before had in this slot
    24      8     inside           reader       compete: 1 while it takes, or finds out whether it may
    128     4     reader_bell      the kernel   futex, as writer_bell
    132     4     -                -            zero
    136     8     reader_doorbell  reader       as writer_doorbell

Cursor table, after the readers' table: `cursor_rows` rows of `writers` cursors, 128 bytes each.
Readers that share a cursor (one, compete) have one row; broadcast readers have a row each.

    offset  size  name             writer       meaning
    0       8     read_pos         reader       bytes ever consumed in this lane
    8       8     messages_out     reader       messages ever consumed, or lost; may lag by one per kill

Used table, after the cursors: one byte for each lane, and one that stays zero.

    offset  size  name             writer       meaning
    0       1     lane_used        claimants    1 once this lane or a later one was claimed, for ever

Where there are several readers: asleep table after it, with a byte for each of `reader_slots` readers, so that a waker
tells by one load that nobody sleeps:

    offset  size  name             writer       meaning
    0       1     reader_asleep    reader       1 while its reader_parked is odd, and a little longer

Where readers compete: whose turn it is, 128 bytes after that:

    offset  size  name             writer       meaning
    0       8     turn             TURN         a reader: its `joined` and slot; bit 0: it has it, else wants it
    8       8     turn_before      TURN         the one before, who may be inside while bit 0 of `turn` is 0

Where who lags loses: marks table after that, MARKS marks of 16 bytes for each lane. A lane is given up in as many
parts; the mark of a part tells where the first message is that begins in it (or after it, if none does):

    offset  size  name             writer       meaning
    0       8     mark_count       lane writer  messages before it
    8       8     mark_pos         lane writer  its position, stored after mark_count

Then, from `lanes_offset`, the lanes, `capacity` bytes each. A position is a count of bytes that
only grows; the byte it speaks of lies at ``lanes_offset + lane * capacity + pos % capacity``. Between
read_pos and write_pos of a lane lie whole records, 8-byte aligned:

    +----------------+---------------------------+---------+
    | length, 8 bytes| payload, `length` bytes   | 0-7 pad |
    +----------------+---------------------------+---------+

A record never wraps: where the next one does not fit before the lane's end, a length of PADDING
says that the lane goes on at its beginning.

Claims are locks on bytes of the segment file, far beyond what the layout needs; the kernel takes
them back when their holder dies. Where a segment is no file, what has these numbers in its name takes the
place of the locks: files on macOS, events on Windows. The numbers are the same in every layout version:

    byte             kind       held by
    PRESENCE         shared     every open handle
    PRESENCE         exclusive  whoever removes the name because nobody else has the ring open
    NAME             exclusive  whoever is about to remove the name (elsewhere: to change it)
    TURN             exclusive  the reader that takes the turn over, where readers compete
    READER + slot    exclusive  the reader in this slot
    LANE + lane      exclusive  the writer of this lane
"""

from __future__ import annotations

import operator
import os
import struct
import zlib
from contextlib import suppress
from typing import Any, Final

from ._errors import RingCorrupted, RingIncompatible

LAYOUT_VERSION: Final = 5
MAGIC: Final = b"shmring\0"
MACHINES: Final = {"x86_64": 1, "AMD64": 1, "aarch64": 2, "arm64": 2, "ARM64": 2}
READERS: Final = {"one": 0, "compete": 1, "broadcast": 2}
LAGS: Final = ("block", "drop")
KEEP: Final = 1
DROP: Final = 2

PAGE: Final = 4096
HEADER_BYTES: Final = 512
LANE_BYTES: Final = 256
READER_BYTES: Final = 256
CURSOR_BYTES: Final = 128
ASLEEP_BYTES: Final = 128
TURN_BYTES: Final = 128
MARK_BYTES: Final = 16
MARKS: Final = 16  # for each lane

# Offsets within a block of the lane table, the reader table and the cursor table.
WRITE_POS: Final = 0
MESSAGES_IN: Final = 8
WRITER_PARKS: Final = 16
GIVEN_UP: Final = 24
WRITER_PARKED: Final = 128
WRITER_WANTED: Final = 136
WRITER_BELL: Final = 144
WRITER_DOORBELL: Final = 152
READER_PARKED: Final = 0
READER_PARKS: Final = 8
JOINED: Final = 16
INSIDE: Final = 24
READER_BELL: Final = 128
READER_DOORBELL: Final = 136
DOORBELL: Final = 8  # from a bell to what is said of its doorbell: these bits, and from 4 on a number
ATTACHED: Final = 1
ALONE: Final = 2
READ_POS: Final = 0
MESSAGES_OUT: Final = 8
MARK_COUNT: Final = 0
MARK_POS: Final = 8
TURN: Final = 0
TURN_BEFORE: Final = 8

RECORD_HEADER: Final = 8
PADDING: Final = (1 << 64) - 1

# Locked bytes of the segment file.
PRESENCE: Final = 1 << 60
NAME: Final = PRESENCE + 1
TURN_CLAIM: Final = PRESENCE + 2
READER: Final = PRESENCE + (1 << 20)
LANE: Final = PRESENCE + (1 << 21)

MAX_WRITERS: Final = 1 << 12
MAX_READERS: Final = 64  # each with cursors of its own
MAX_COMPETING: Final = 1 << 10
MAX_CAPACITY: Final = 1 << 40
MAX_NAME: Final = 200

_HEADER = struct.Struct("=8sIIQQIIIIIIQ16s40x")
_CHECKSUM = struct.Struct("=Q")


class Layout:
    """The shape of one ring. Sizes and offsets are in bytes, and made once: they are asked for with each message.

    Attributes:
        slots: Readers at a time.
        broadcast: Each of them reads all messages, with cursors of its own.
        compete: One of them gets each message; they share the cursors.
        drop: Writers do not wait for readers.
        part: Bytes that a writer gives up at a time, with `drop`.
    """

    __slots__ = (
        "asleep_offset", "broadcast", "capacity", "compete", "cursors_offset", "drop", "keep", "lanes_offset",
        "marks_offset", "max_message", "nonce", "part", "readers_offset", "rows", "segment_bytes", "slots",
        "turn_offset", "used_offset", "writers",
    )  # fmt: skip

    def __init__(
        self,
        capacity: int,
        writers: int,
        keep: bool,
        nonce: bytes,
        slots: int = 0,
        drop: bool = False,
        compete: bool = False,
    ) -> None:
        """`slots` are those of a ring with several readers; 0 is one reader."""
        self.capacity = capacity
        self.writers = writers
        self.keep = keep
        self.nonce = nonce
        self.compete = compete
        self.broadcast = slots > 0 and not compete
        self.slots = slots or 1
        self.rows = slots if self.broadcast else 1
        self.drop = drop
        self.part = capacity // MARKS
        self.readers_offset = HEADER_BYTES + writers * LANE_BYTES
        self.cursors_offset = self.readers_offset + self.slots * READER_BYTES
        self.used_offset = self.cursors_offset + self.rows * writers * CURSOR_BYTES
        self.asleep_offset = round_up(self.used_offset + writers + 1, ASLEEP_BYTES)
        self.turn_offset = self.asleep_offset + round_up(slots, ASLEEP_BYTES)
        self.marks_offset = self.turn_offset + (TURN_BYTES if compete else 0)
        self.lanes_offset = round_up(self.marks_offset + (writers * MARKS * MARK_BYTES if drop else 0), PAGE)
        self.segment_bytes = self.lanes_offset + writers * capacity
        # What is given up for a message has to leave the one before it, and a part.
        self.max_message = (capacity // 2 if drop else capacity) - RECORD_HEADER

    @property
    def readers(self) -> str:
        """Which of `READERS`."""
        return "broadcast" if self.broadcast else "compete" if self.compete else "one"

    def lane_block(self, lane: int) -> int:
        return HEADER_BYTES + lane * LANE_BYTES

    def reader_block(self, slot: int) -> int:
        return self.readers_offset + slot * READER_BYTES

    def cursor(self, lane: int, slot: int = 0) -> int:
        return self.cursors_offset + (slot * self.writers + lane) * CURSOR_BYTES

    def marks(self, lane: int) -> int:
        return self.marks_offset + lane * MARKS * MARK_BYTES

    def lane_bytes(self, lane: int) -> int:
        return self.lanes_offset + lane * self.capacity


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def record_bytes(size: int) -> int:
    """Bytes that a message of `size` bytes takes in a lane."""
    return (size + RECORD_HEADER + 7) & -8


def check_name(name: str) -> str:
    """Return `name` if every system can carry it, else raise ValueError (TypeError for no str)."""
    if not isinstance(name, str):
        raise TypeError(f"a ring's name is a str, not {type(name).__name__}")
    if not 1 <= len(name) <= MAX_NAME:
        raise ValueError(f"a ring's name has 1 to {MAX_NAME} characters, this has {len(name)}: {name[:80]!r}")
    for character in name:
        if not "!" <= character <= "~" or character in "/\\":
            raise ValueError(
                f"a ring's name is of printable ASCII characters without space, '/' and '\\'; {character!r} in {name!r}"
            )
    return name


def is_name(name: str) -> bool:
    """Can this be a ring's name?"""
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def integer(what: str, value: Any) -> int:
    """An argument that is a whole number, also one of NumPy's. True is none."""
    if not isinstance(value, bool):
        with suppress(TypeError):
            return operator.index(value)
    raise TypeError(f"{what}, not {type(value).__name__}")


def new_layout(
    capacity: int, writers: int, readers: str, keep: bool, max_readers: int = 8, lag: str = "block"
) -> Layout:
    """Check what a caller of `create` asked for, and give the ring a shape and a nonce."""
    numbers = []
    for what, value, most in (
        ("capacity", capacity, MAX_CAPACITY),
        ("writers", writers, MAX_WRITERS),
        ("max_readers", max_readers, MAX_COMPETING if readers == "compete" else MAX_READERS),
    ):
        number = integer(f"{what} is an int", value)
        if not 1 <= number <= most:
            raise ValueError(f"{what} is 1 to {most:,}, not {number:,}")
        numbers.append(number)
    capacity, writers, max_readers = numbers
    if readers not in tuple(READERS):
        raise ValueError(f"readers={readers!r}: this version knows {', '.join(map(repr, READERS))}")
    if lag not in LAGS:
        raise ValueError(f"lag={lag!r}: it is one of {', '.join(map(repr, LAGS))}")
    if lag == "drop" and readers != "broadcast":
        raise ValueError(f"lag='drop' is for readers='broadcast'; with readers={readers!r} writers wait")
    slots, compete = 0 if readers == "one" else max_readers, readers == "compete"
    return Layout(round_up(capacity, PAGE), writers, bool(keep), os.urandom(16), slots, lag == "drop", compete)


def pack_header(layout: Layout, machine: str) -> bytes:
    """The header's first 128 bytes. Whoever stores them stores the first 8, the magic, last."""
    fixed = _HEADER.pack(
        MAGIC,
        LAYOUT_VERSION,
        MACHINES[machine],
        layout.segment_bytes,
        layout.capacity,
        layout.writers,
        READERS[layout.readers],
        layout.slots,
        layout.rows,
        (KEEP if layout.keep else 0) | (DROP if layout.drop else 0),
        0,
        layout.lanes_offset,
        layout.nonce,
    )
    return fixed + _CHECKSUM.pack(zlib.crc32(fixed))


def parse_header(header: bytes, segment_bytes: int | None, machine: str, name: str) -> Layout:
    """Read what `pack_header` wrote, trusting nothing.

    `segment_bytes` is the real size, None where the system does not tell it and mapping the segment has to show it.

    Raises:
        RingIncompatible: No ring, another layout version or another kind of machine.
        RingCorrupted: The checksum or a size does not fit.
    """
    if len(header) < 16 or header[:8] != MAGIC:
        raise RingIncompatible(f"{name!r} is no shmring ring: it begins with {header[:8]!r}, not {MAGIC!r}")
    version, kind = struct.unpack_from("=II", header, 8)
    if version != LAYOUT_VERSION:
        raise RingIncompatible(
            f"ring {name!r} has layout version {version}, this copy of shmring knows version {LAYOUT_VERSION}"
        )
    if kind != MACHINES[machine]:
        raise RingIncompatible(f"ring {name!r} is of machine kind {kind}, this is {MACHINES[machine]} ({machine})")
    if len(header) < HEADER_BYTES:
        raise RingCorrupted(f"ring {name!r} has {len(header):,} bytes, too few for a header")
    (checksum,) = _CHECKSUM.unpack_from(header, _HEADER.size)
    if checksum != zlib.crc32(header[: _HEADER.size]):
        raise RingCorrupted(f"ring {name!r}: the checksum over its header does not fit")
    fields = _HEADER.unpack_from(header)
    _, _, _, size, capacity, writers, readers, slots, rows, flags, _, lanes_offset, nonce = fields
    broadcast, compete = readers == READERS["broadcast"], readers == READERS["compete"]
    if readers not in READERS.values() or flags & DROP and not broadcast:
        raise RingIncompatible(f"ring {name!r} has readers of kind {readers}, unknown to this copy of shmring")
    if capacity % PAGE or not (0 < capacity <= MAX_CAPACITY and 0 < writers <= MAX_WRITERS):
        raise RingCorrupted(f"ring {name!r}: capacity {capacity:,} with {writers:,} lanes cannot be")
    most = MAX_COMPETING if compete else MAX_READERS if broadcast else 1
    if not 0 < slots <= most or rows != (slots if broadcast else 1):
        raise RingCorrupted(f"ring {name!r}: {slots:,} readers with {rows:,} rows of cursors cannot be")
    several = slots if broadcast or compete else 0
    layout = Layout(capacity, writers, bool(flags & KEEP), nonce, several, bool(flags & DROP), compete)
    if (size, lanes_offset) != (layout.segment_bytes, layout.lanes_offset):
        raise RingCorrupted(f"ring {name!r}: its header's sizes do not fit together")
    if segment_bytes is not None and size != segment_bytes:
        raise RingCorrupted(f"ring {name!r} is {segment_bytes:,} bytes long, its header says {size:,}")
    return layout


def outline(header: bytes) -> tuple[int, int, int] | None:
    """What a header of whatever version says: layout version, machine, bytes of the segment. None: it is no ring's."""
    if len(header) < 24 or header[:8] != MAGIC:
        return None
    version, machine, segment_bytes = struct.unpack_from("=IIQ", header, 8)
    return version, machine, segment_bytes


def is_kept(header: bytes) -> bool:
    """Does this header, of whatever version, ask for its name to stay? One that is too short may have done."""
    return len(header) < 52 or bool(struct.unpack_from("=I", header, 48)[0] & KEEP)


def nonce_of(header: bytes) -> bytes:
    """The nonce in a header, which no version has elsewhere."""
    return header[64:80]


def place(pos: int, read_pos: int, step: int, capacity: int) -> tuple[int, int]:
    """Where a record of `step` bytes goes in a lane that is written up to `pos`.

    Returns:
        ``(padding, wanted)``. `padding` bytes are to be published first, because the record does not
        fit before the lane's end. The record fits after that if `wanted` is 0; else it has room once
        read_pos has come to `wanted`.
    """
    tail = capacity - pos % capacity
    if step <= tail:
        end = pos + step
        return 0, end - capacity if end > read_pos + capacity else 0
    end = pos + tail + step
    if end <= read_pos + capacity:
        return tail, 0
    if tail + step <= capacity:
        return 0, end - capacity
    # Both together are longer than the lane: the padding goes alone, and has to be consumed first.
    if pos + tail <= read_pos + capacity:
        return tail, end - capacity
    return 0, pos + tail - capacity
