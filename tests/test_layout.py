"""The layout: the tables in the docstring are the constants, and nothing else is believed."""

from __future__ import annotations

import re
import struct
import zlib

import pytest

from shmring import RingCorrupted, RingIncompatible, _layout
from shmring._layout import HEADER_BYTES, Layout, check_name, new_layout, pack_header, parse_header, place, record_bytes

LAYOUT = Layout(3 * 4096, 5, True, bytes(range(16)))
MACHINE = "x86_64"


def tables():
    """``{"Header": [(offset, size, name), ...], "Lane table": ...}`` from the docstring."""
    found, rows = {}, None
    for line in _layout.__doc__.splitlines():
        heading = re.match(r"(Header|(?:Lane|Reader|Cursor|Used) table),", line)
        row = re.match(r"    (\d+) +(\d+) +(\S+)", line)
        if heading:
            rows = found.setdefault(heading[1], [])
        elif row:
            rows.append((int(row[1]), int(row[2]), row[3]))
    return found


def header(**pokes):
    """A whole header in which fields hold other values, under a checksum that fits."""
    packed = bytearray(pack_header(LAYOUT, MACHINE).ljust(HEADER_BYTES, b"\0"))
    for offset, size, name in tables()["Header"]:
        if name in pokes:
            packed[offset : offset + size] = pokes[name].to_bytes(size, "little")
    packed[120:128] = struct.pack("=Q", zlib.crc32(packed[:120]))
    return bytes(packed)


def parse(packed, size=LAYOUT.segment_bytes, machine=MACHINE):
    return parse_header(packed, size, machine, "n")


# ---------------------------------------------------------------- tables


def test_the_header_table_covers_the_header_without_gap_or_overlap():
    end = 0
    for offset, size, _ in tables()["Header"]:
        assert offset == end
        end = offset + size
    assert end == HEADER_BYTES


def test_the_header_is_packed_as_the_table_says():
    expected = {
        "magic": _layout.MAGIC,
        "layout_version": 5,
        "machine": 1,
        "segment_bytes": LAYOUT.segment_bytes,
        "capacity": 3 * 4096,
        "writers": 5,
        "readers": 0,
        "reader_slots": 1,
        "cursor_rows": 1,
        "flags": _layout.KEEP,
        "lanes_offset": LAYOUT.lanes_offset,
        "nonce": bytes(range(16)),
        "-": 0,
    }
    packed = pack_header(LAYOUT, MACHINE)
    assert len(packed) == 128
    names = set()
    for offset, size, name in tables()["Header"]:
        value = packed[offset : offset + size]
        names.add(name)
        if name == "checksum":
            assert int.from_bytes(value, "little") == zlib.crc32(packed[:offset])
        elif isinstance(expected[name], bytes):
            assert value == expected[name], name
        else:
            assert int.from_bytes(value, "little") == expected[name], name
    assert names == {*expected, "checksum"}


@pytest.mark.parametrize("table, block", [("Lane", "LANE"), ("Reader", "READER"), ("Cursor", "CURSOR")])
def test_each_word_of_a_table_has_a_constant_and_lies_alone(table, block):
    rows = tables()[f"{table} table"]
    end = 0
    for offset, size, name in rows:
        assert offset >= end and offset % size == 0, name
        end = offset + size
        if name != "-":
            assert getattr(_layout, name.upper()) == offset
            assert size == (4 if name.endswith("_bell") else 8)
    assert end <= getattr(_layout, f"{block}_BYTES")
    # What one side stores with each message shares no pair of cache lines with what is stored when parking.
    assert {offset // 128 for offset, _, name in rows if name in ("write_pos", "messages_in")} <= {0}
    assert {offset // 128 for offset, _, name in rows if name in ("writer_parked", "reader_bell")} <= {1}


def test_every_constant_of_a_word_is_in_the_tables():
    documented = {name.upper() for rows in tables().values() for _, _, name in rows}
    words = {"WRITE_POS", "MESSAGES_IN", "WRITER_PARKS", "WRITER_PARKED", "WRITER_WANTED", "WRITER_BELL"}
    words |= {"READER_PARKED", "READER_PARKS", "READER_BELL", "READER_DOORBELL", "WRITER_DOORBELL"}
    words |= {"GIVEN_UP", "JOINED", "READER_ASLEEP", "MARK_COUNT", "MARK_POS"}
    assert words | {"READ_POS", "MESSAGES_OUT"} <= documented


@pytest.mark.parametrize("slots, drop, compete", [
    (0, False, False), (1, False, False), (3, True, False), (64, False, False), (1, False, True), (1024, False, True),
])  # fmt: skip
@pytest.mark.parametrize("writers", [1, 2, 3, 64, 4096])
def test_tables_and_lanes_follow_each_other_without_overlap(writers, slots, drop, compete):
    layout = Layout(8192, writers, False, bytes(16), slots, drop, compete)
    spans = [(0, HEADER_BYTES)]
    spans += [(layout.lane_block(lane), _layout.LANE_BYTES) for lane in range(writers)]
    spans += [(layout.reader_block(slot), _layout.READER_BYTES) for slot in range(layout.slots)]
    for slot in range(1 if compete else layout.slots):
        spans += [(layout.cursor(lane, slot), _layout.CURSOR_BYTES) for lane in range(writers)]
    spans += [(layout.used_offset, writers)]
    end = 0
    for start, size in spans:
        assert start == end
        end = start + size
    if slots:
        assert end < layout.asleep_offset <= end + _layout.ASLEEP_BYTES
        end = layout.asleep_offset + -(-slots // 128) * 128
    if compete:
        assert layout.turn_offset == end
        end += _layout.TURN_BYTES
    if drop:
        for lane in range(writers):
            assert layout.marks(lane) == end
            end += _layout.MARKS * _layout.MARK_BYTES
    assert end <= layout.lanes_offset < end + 4096 and layout.lanes_offset % 4096 == 0
    assert [layout.lane_bytes(lane) for lane in range(writers)] == [
        layout.lanes_offset + lane * 8192 for lane in range(writers)
    ]
    assert layout.segment_bytes == layout.lane_bytes(writers - 1) + 8192


def test_claims_lie_beyond_the_largest_segment_and_apart():
    largest = Layout(_layout.MAX_CAPACITY, _layout.MAX_WRITERS, False, bytes(16))
    claims = [_layout.PRESENCE, _layout.NAME, _layout.READER, _layout.LANE, _layout.LANE + _layout.MAX_WRITERS]
    assert largest.segment_bytes < claims[0] and claims == sorted(set(claims)) and claims[-1] < 1 << 63
    assert _layout.NAME < _layout.TURN_CLAIM < _layout.READER
    assert _layout.READER + max(_layout.MAX_READERS, _layout.MAX_COMPETING) <= _layout.LANE


# ---------------------------------------------------------------- header


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("machine", _layout.MACHINES)
@pytest.mark.parametrize("readers", [
    ("one",), ("broadcast", 3, "block"), ("broadcast", 64, "drop"),
    ("compete", 1), ("compete", 1024),
])  # fmt: skip
@pytest.mark.parametrize("capacity, writers", [(1, 1), (4097, 64), (1 << 40, 4096)])
def test_a_header_comes_back_as_it_was_packed(capacity, writers, readers, keep, machine):
    layout = new_layout(capacity, writers, readers[0], keep, *readers[1:])
    packed = pack_header(layout, machine).ljust(HEADER_BYTES, b"\0")
    found = parse(packed, layout.segment_bytes, machine)
    assert all(getattr(found, name) == getattr(layout, name) for name in Layout.__slots__)
    assert _layout.is_kept(packed) is keep


def test_two_layouts_never_have_the_same_nonce():
    assert new_layout(1, 1, "one", False).nonce != new_layout(1, 1, "one", False).nonce


@pytest.mark.parametrize("pokes, error, text", [
    ({"magic": 0}, RingIncompatible, "no shmring ring"),
    ({"layout_version": 2}, RingIncompatible, "layout version 2, .* version 5"),
    ({"machine": 2}, RingIncompatible, "machine kind 2, this is 1"),
    ({"machine": 99}, RingIncompatible, "machine kind 99"),
    ({"readers": 3}, RingIncompatible, "readers of kind 3"),
    ({"readers": 2, "reader_slots": 3, "cursor_rows": 3}, RingCorrupted, "sizes do not fit"),
    ({"readers": 2, "reader_slots": 2}, RingCorrupted, "2 readers with 1 rows"),
    ({"readers": 2, "reader_slots": 65, "cursor_rows": 65}, RingCorrupted, "65 readers"),
    ({"flags": 2}, RingIncompatible, "readers of kind 0"),
    ({"readers": 1, "flags": 2}, RingIncompatible, "readers of kind 1"),
    ({"readers": 1, "reader_slots": 1025}, RingCorrupted, "1,025 readers"),
    ({"readers": 1, "reader_slots": 2, "cursor_rows": 2}, RingCorrupted, "2 readers with 2 rows"),
    ({"readers": 1, "reader_slots": 1024}, RingCorrupted, "sizes do not fit"),
    ({"reader_slots": 2}, RingCorrupted, "2 readers"),
    ({"cursor_rows": 0}, RingCorrupted, "0 rows"),
    ({"capacity": 0}, RingCorrupted, "capacity 0 with 5 lanes"),
    ({"capacity": 4097}, RingCorrupted, "capacity 4,097"),
    ({"capacity": 1 << 63}, RingCorrupted, "capacity"),
    ({"capacity": 4096}, RingCorrupted, "sizes do not fit"),
    ({"writers": 0}, RingCorrupted, "0 lanes"),
    ({"writers": 4097}, RingCorrupted, "4,097 lanes"),
    ({"writers": 6}, RingCorrupted, "sizes do not fit"),
    ({"lanes_offset": 0}, RingCorrupted, "sizes do not fit"),
    ({"segment_bytes": LAYOUT.segment_bytes + 4096}, RingCorrupted, "sizes do not fit"),
])  # fmt: skip
def test_a_bad_header_gives_its_own_error_even_under_a_good_checksum(pokes, error, text):
    with pytest.raises(error, match=text):
        parse(header(**pokes))


def test_any_changed_byte_of_the_header_is_noticed():
    for offset in range(16, 128):
        packed = bytearray(header())
        packed[offset] ^= 0x10
        with pytest.raises(RingCorrupted, match="checksum"):
            parse(bytes(packed))


@pytest.mark.parametrize(
    "length, error", [(0, RingIncompatible), (15, RingIncompatible), (16, RingCorrupted), (511, RingCorrupted)]
)
def test_a_cut_header_is_refused(length, error):
    with pytest.raises(error):
        parse(header()[:length], length)


@pytest.mark.parametrize("size", [512, LAYOUT.segment_bytes - 1, LAYOUT.segment_bytes + 1])
def test_a_file_of_another_size_than_the_header_says_is_refused(size):
    with pytest.raises(RingCorrupted, match=f"{size:,} bytes long"):
        parse(header(), size)


@pytest.mark.parametrize("arguments, error", [
    ((0, 1, "one"), ValueError), ((-1, 1, "one"), ValueError), (((1 << 40) + 1, 1, "one"), ValueError),
    ((1, 0, "one"), ValueError), ((1, 4097, "one"), ValueError), ((1, 1, "several"), ValueError),
    ((1.0, 1, "one"), TypeError), (("1", 1, "one"), TypeError), ((True, 1, "one"), TypeError),
    ((1, None, "one"), TypeError),
])  # fmt: skip
def test_a_shape_that_cannot_be_is_refused_with_its_value(arguments, error):
    with pytest.raises(error, match=r"capacity|writers|readers"):
        new_layout(*arguments, False)


@pytest.mark.parametrize("asked, given", [(1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)])
def test_capacity_is_rounded_up_to_pages(asked, given):
    layout = new_layout(asked, 1, "one", False)
    assert layout.capacity == given and layout.max_message == given - 8


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["a", "A-z_0.9~!", "x" * 200, ".", "..", "%", "a:b", '"'])
def test_a_name_of_printable_ascii_is_taken_as_it_is(name):
    assert check_name(name) == name


@pytest.mark.parametrize("name, quoted", [
    ("", "''"), ("x" * 201, "xxx"), ("/a", "'/a'"), ("a/b", "'a/b'"), ("../a", "'../a'"), ("a\\b", r"'a\\\\b'"),
    ("a b", "'a b'"), ("a\0b", r"'a\\x00b'"), ("a\n", r"'a\\n'"), ("\x7f", r"'\\x7f'"), ("häh", "'häh'"),
    ("\ud800", r"ud800"),
])  # fmt: skip
def test_another_name_is_refused_and_quoted(name, quoted):
    with pytest.raises(ValueError, match="a ring's name") as caught:
        check_name(name)
    assert re.search(quoted, str(caught.value))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", [None, b"a", 1])
def test_a_name_that_is_no_str_is_a_type_error(name):
    with pytest.raises(TypeError, match=type(name).__name__):
        check_name(name)


# ---------------------------------------------------------------- records


def test_a_record_takes_its_length_and_payload_in_eights():
    assert [record_bytes(size) for size in (0, 1, 8, 9, 16, 17)] == [8, 16, 16, 24, 24, 32]
    for size in range(5000):
        assert record_bytes(size) % 8 == 0 and 0 <= record_bytes(size) - size - 8 < 8


@pytest.mark.parametrize("capacity", [8, 16, 24, 32, 48])
def test_place_never_wraps_never_overwrites_and_never_waits_for_ever(capacity):
    """Every position, every fill and every record, against what a lane allows."""
    for pos in range(0, 2 * capacity, 8):
        for read_pos in range(max(0, pos - capacity), pos + 1, 8):
            for step in range(8, capacity + 1, 8):
                case = pos, read_pos, step
                tail = capacity - pos % capacity
                padding, wanted = place(pos, read_pos, step, capacity)
                start = pos + padding
                assert padding in (0, tail), case
                assert start <= read_pos + capacity, case
                if padding:
                    assert step > tail, case
                if not wanted:
                    assert start % capacity + step <= capacity, case
                    assert start + step <= read_pos + capacity, case
                    continue
                # No room: what is waited for has not come yet, and comes when all that is published is read.
                assert read_pos < wanted <= start, case
                if padding:
                    assert tail + step > capacity, case
                # Nothing changes before, and at `wanted` it goes on.
                for later in range(read_pos, wanted, 8):
                    assert place(start, later, step, capacity) == (0, wanted), case
                padding, after = place(start, wanted, step, capacity)
                assert not after or padding, case
                if after:
                    assert place(start + padding, after, step, capacity) == (0, 0), case
