"""Messages through a ring, in one process and one thread."""

from __future__ import annotations

import array
import ctypes
import gc
import math
import mmap
import pickle
import threading
import time

import pytest
from conftest import DEADLINE, wait_until
from support import in_place

import shmring
from shmring import (
    BufferTooSmall,
    MessagesLost,
    MessageTooLarge,
    Ring,
    RingBusy,
    RingClosed,
    RingCorrupted,
    RingError,
    RingIncompatible,
    RingTimeout,
)

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture
def ring(name):
    with Ring.create(name, 4096, writers=4) as ring:
        yield ring


@pytest.fixture
def other(ring):
    """A second handle in this process."""
    with Ring.open(ring.name) as other:
        yield other


def drain(ring):
    return list(iter(ring.try_read, None))


PATTERN = bytes(range(251))


def payload(size, number=0):
    start = number * 7 % 251
    return (PATTERN * ((start + size) // 251 + 1))[start : start + size]


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1023, 1024, 1025, 4087, 4088])
def test_a_message_comes_out_as_it_went_in(ring, other, size):
    for _ in range(3):  # from several places of the lane
        while not other.try_write(payload(size)):
            assert ring.try_read() is None
        assert ring.read(timeout=0) == payload(size)
        other.write(b"", timeout=0)
        assert ring.read(timeout=0) == b""
    assert ring.try_read() is None


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_double))


def anonymous_map(data):
    mapped = mmap.mmap(-1, max(1, len(data)))
    mapped[: len(data)] = data
    return mapped


BUFFERS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "slice": lambda data: memoryview(b"--" + data + b"--")[2:-2],
    "array": lambda data: array.array("d", data),
    "2-dimensional": lambda data: memoryview(data).cast("B", (len(data) // 8, 8)),
    "cast": lambda data: memoryview(data).cast("d"),
    "ctypes array": lambda data: (ctypes.c_uint16 * (len(data) // 2)).from_buffer_copy(data),
    "ctypes structures": lambda data: (Pair * (len(data) // 16)).from_buffer_copy(data),
    "mmap": anonymous_map,
    "subclass": lambda data: type("Bytes", (bytes,), {})(data),
}


@pytest.mark.parametrize("size", [16, 1024, 2048])
@pytest.mark.parametrize("kind", BUFFERS)
def test_every_kind_of_buffer_is_written(ring, kind, size):
    data = payload(size)
    buffer = BUFFERS[kind](data)
    ring.write(buffer)
    assert ring.read() == data
    assert ring.try_write(buffer)
    assert ring.read() == data
    assert ring.write_many([buffer]) == 1
    message = ring.read()
    assert message == data and type(message) is bytes


@pytest.mark.parametrize("size", [16, 2048])
@pytest.mark.parametrize("kind", ["bytearray", "array", "ctypes array", "ctypes structures", "mmap"])
def test_every_kind_of_writable_buffer_is_read_into(ring, kind, size):
    buffer = BUFFERS[kind](bytes(size))
    ring.write(payload(size))
    assert ring.read(buffer) == size
    assert memoryview(buffer).tobytes() == payload(size)


@pytest.mark.parametrize("size", [16, 2048])
@pytest.mark.parametrize("use", [
    lambda ring, data: ring.write(data),
    lambda ring, data: ring.try_write(data),
    lambda ring, data: ring.write_many([data]),
    lambda ring, data: ring.write(b"1") or ring.read(data),
    lambda ring, data: pytest.raises(BufferTooSmall, (ring.write(bytes(3000)), ring.read)[1], data) and None,
    lambda ring, data: pytest.raises(RingTimeout, ring.read, data, timeout=0) and None,
], ids=["write", "try_write", "write_many", "read", "read too small", "read nothing"])  # fmt: skip
def test_a_buffer_is_not_held_after_the_call(ring, use, size):
    data = bytearray(size)
    use(ring, data)
    gc.collect()
    data.extend(b"1")  # BufferError if somebody holds it


@pytest.mark.parametrize("bad", ["text", None, 7, 1.5, [1, 2], object()])
def test_what_is_no_buffer_is_a_type_error_that_names_its_type(ring, bad):
    for write in (ring.write, ring.try_write, lambda data: ring.write_many([b"good", data])):
        with pytest.raises(TypeError, match=rf"bytes-like.*{type(bad).__name__}"):
            write(bad)
    assert ring.try_read() is None


@pytest.mark.parametrize("size", [20, 8000])
def test_a_buffer_with_gaps_is_a_clear_error(ring, size):
    gaps = memoryview(bytearray(size))[::2]
    for write in (ring.write, ring.try_write, lambda data: ring.write_many([b"good", data])):
        with pytest.raises(ValueError, match="C-contiguous"):
            write(gaps)
    with pytest.raises(ValueError, match="C-contiguous"):
        ring.read(gaps)
    assert ring.try_read() is None


@pytest.mark.parametrize("one", ["text", b"bytes", bytearray(b"x"), memoryview(b"x")])
def test_write_many_of_one_message_is_a_type_error(ring, one):
    with pytest.raises(TypeError, match=f"not one {type(one).__name__}"):
        ring.write_many(one)


def test_a_message_that_can_never_fit_says_its_size_and_the_most(ring):
    for write in (ring.write, ring.try_write, lambda data: ring.write_many([data])):
        with pytest.raises(MessageTooLarge, match=r"4,089.*max_message=4,088") as caught:
            write(bytes(4089))
        assert (caught.value.size, caught.value.max_message) == (4089, ring.max_message)
    assert ring.try_read() is None
    ring.write(b"goes on")
    assert ring.read() == b"goes on"


# ---------------------------------------------------------------- wrap and padding


@pytest.mark.parametrize("size", [0, 8, 24, 40])
def test_an_empty_message_after_padding_alone_does_not_take_the_next_one_with_it(name, size):
    """The padding has no size: it must not make an empty record seem as long as the one before the padding."""
    with Ring.create(name, 4096, writers=2) as ring, Ring.open(name) as first, Ring.open(name) as second:
        first.write(b"")
        second.write(bytes(500))
        assert len(drain(ring)) == 2
        first.write(payload(size))
        assert ring.read() == payload(size)
        assert not second.try_write(bytes(4080))  # this publishes padding, which is read next
        messages = [b""] * (1 + (size + 7) // 8)  # together as long as the message that was read last
        first.write_many(messages)
        assert drain(ring) == messages


def test_messages_of_every_size_go_through_the_smallest_ring(ring, other):
    for size in range(4089):
        message = payload(size, size)
        while not other.try_write(message):
            assert ring.try_read() is None  # frees the padding before it
        assert ring.read() == message


@pytest.mark.parametrize("size", [8, 100, 1500, 2040])
def test_records_go_round_the_end_of_a_lane_at_every_offset(ring, other, size):
    """The lane's place moves by 8 bytes a lap, so that the end comes at every offset into a record."""
    number = 0
    for _ in range(512):
        assert other.try_write(b"")
        assert ring.try_read() == b""
        sent = []
        while other.try_write(payload(size, number)):
            sent.append(payload(size, number))
            number += 1
        assert sent and drain(ring) == sent


def test_the_longest_message_after_the_longest_message_fits_at_every_offset(ring, other):
    for offset in range(8, 4096, 8):
        other.write(bytes(offset - 8))
        assert ring.read() == bytes(offset - 8)
        for number in range(2):
            longest = payload(4088, number + offset)
            for _ in range(3):
                if other.try_write(longest):
                    break
                assert ring.try_read() is None
            else:
                pytest.fail(f"no room in an empty ring at offset {offset}")
            assert not other.try_write(b"")
            assert ring.try_read() == longest


def test_a_full_lane_is_filled_to_its_last_byte(ring):
    assert ring.write_many([bytes(8)] * 300, timeout=0) == 256
    assert ring.stats().fill == 1.0
    assert ring.read_many() == [bytes(8)] * 256


# ---------------------------------------------------------------- reading into buffers


def test_read_into_a_buffer_gives_the_size_and_leaves_the_rest_alone(ring):
    ring.write(b"12345")
    buffer = bytearray(b"-" * 10)
    assert ring.read(buffer) == 5 and buffer == b"12345-----"
    ring.write(b"")
    assert ring.read(bytearray()) == 0
    ring.write(b"x")
    view = memoryview(bytearray(8)).cast("Q")
    assert ring.read(view) == 1 and view.tobytes() == b"x" + bytes(7)


def test_max_len_bounds_what_is_used_of_the_buffer_and_of_the_result(ring):
    buffer = bytearray(10)
    for limits, needed in [
        ((buffer, 4), 5),
        ((None, 4), 5),
        ((bytearray(4),), 5),
        ((bytearray(4), 100), 5),
        ((None, 0), 5),
    ]:
        ring.write(b"12345")
        with pytest.raises(BufferTooSmall, match=f"{needed} bytes.*room") as caught:
            ring.read(*limits)
        assert caught.value.needed == needed and caught.value.room == min(4, limits[-1] if limits[0] is None else 4)
        assert ring.read(max_len=5) == b"12345"  # it stayed
    assert buffer == bytes(10)
    ring.write(b"12345")
    assert ring.read(buffer, 5) == 5
    ring.write(b"1")
    assert ring.read(max_len=1 << 40) == b"1"


class NoObject(ctypes.Structure):
    _fields_ = (("Open", ctypes.c_double), ("O", ctypes.c_int))


class WithObject(ctypes.Structure):
    _fields_ = (("O", ctypes.c_int), ("p", ctypes.py_object))


def test_addresses_of_objects_are_no_message_and_no_place_for_one(ring):
    for objects in ((ctypes.py_object * 2)(), WithObject(), (WithObject * 40)()):
        for write in (ring.write, ring.try_write, lambda data: ring.write_many([b"good", data])):
            with pytest.raises(TypeError, match="references to Python objects"):
                write(objects)
        with pytest.raises(TypeError, match="references to Python objects"):
            ring.read(objects)
    ring.write(NoObject(1.5, 2))
    ring.read(copy := NoObject())
    assert (copy.Open, copy.O, ring.try_read()) == (1.5, 2, None)


def test_a_message_that_was_too_long_is_still_the_next_for_every_way_of_reading(ring):
    for read in (ring.read, ring.try_read, lambda: next(iter(ring)), lambda: ring.read_many(1)[0]):
        ring.write(b"12345"), ring.write(b"6")
        with pytest.raises(BufferTooSmall):
            ring.read(max_len=1)
        assert read() == b"12345" and ring.read(max_len=1) == b"6"


@pytest.mark.parametrize("arguments, error, text", [
    ((100,), TypeError, r"read\(max_len=100\)"), (("x",), TypeError, "writable buffer, not str"),
    ((b"12",), TypeError, "read-only"), ((memoryview(b"12"),), TypeError, "read-only"),
    ((None, -1), ValueError, "-1"), ((None, 1.0), TypeError, "float"), ((None, True), TypeError, "bool"),
])  # fmt: skip
def test_a_wrong_argument_of_read_says_what_to_write(ring, arguments, error, text):
    ring.write(b"12345")
    with pytest.raises(error, match=text):
        ring.read(*arguments)
    assert ring.read() == b"12345"


# ---------------------------------------------------------------- many at once


def test_write_many_takes_any_iterable_and_says_how_many_it_wrote(ring):
    assert ring.write_many(bytes([i]) for i in range(5)) == 5
    assert ring.write_many([]) == 0 and ring.write_many(iter(())) == 0
    assert ring.write_many((b"x", bytearray(b"yy"), memoryview(b""))) == 3
    assert ring.read_many() == [b"\0", b"\1", b"\2", b"\3", b"\4", b"x", b"yy", b""]


@pytest.mark.parametrize("wrong, error", [("x", TypeError), (float("nan"), ValueError)], ids=["no number", "NaN"])
def test_a_wrong_timeout_is_an_error_also_where_nobody_need_wait(name, wrong, error):
    with Ring.create(name, 65536) as ring:
        parts = [b"x" * 20000] * 2
        for write in (lambda: ring.write_many([b"1"], timeout=wrong), lambda: ring.writev(parts, timeout=wrong)):
            with pytest.raises(error, match="timeout is a number of seconds or None"):
                write()
        assert ring.try_read() is None
        ring.write(b"2")
        with pytest.raises(error, match="timeout is a number of seconds or None"):
            ring.read_many(timeout=wrong)
        assert ring.try_read() == b"2"


def test_write_many_with_a_bad_one_writes_nothing(ring):
    for bad, error in [(bytes(4089), MessageTooLarge), ("text", TypeError), (memoryview(b"1234")[::2], ValueError)]:
        with pytest.raises(error):
            ring.write_many([b"good", bad])
    with pytest.raises(ZeroDivisionError):
        ring.write_many(1 // (3 - i) and b"x" for i in range(5))
    assert ring.try_read() is None and ring.stats().messages_in == 0


def test_write_many_writes_what_fits_in_time(ring):
    assert ring.write_many([bytes(size) for size in (2000, 2000, 500)], timeout=0.01) == 2
    assert len(ring.read_many()) == 2 and ring.try_write(bytes(64)) and ring.read_many()
    assert ring.write_many([bytes(1000)] * 10, timeout=0) == 4
    with pytest.raises(RingTimeout):
        ring.write_many([bytes(1000)], timeout=0)
    assert ring.write_many([b""], timeout=0) == 1  # 64 bytes are left
    assert [len(message) for message in ring.read_many()] == [1000] * 4 + [0]


@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_read_many_takes_what_is_there_up_to_its_limit(ring, most):
    messages = [payload(size) for size in (5, 5, 5, 5, 9, 9, 0, 700, 700, 1)]
    ring.write_many(messages)
    got = []
    while len(got) < 10:
        some = ring.read_many(most)
        assert 1 <= len(some) <= most
        got += some
    assert got == messages
    with pytest.raises(RingTimeout):
        ring.read_many(most, timeout=0)


TAKES = {
    "borrow": lambda ring: [in_place(ring)],
    "read": lambda ring: [ring.read()],
    "read at most": lambda ring: [ring.read(max_len=99)],
    "read and borrow": lambda ring: [ring.read(), in_place(ring)],
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("readers", ["one", "compete", "broadcast"])
def test_no_lane_is_left_behind_one_that_is_always_full(name, readers, take):
    with Ring.create(name, 4096, writers=2, readers=readers) as ring, Ring.open(name) as busy:
        ring.join()
        busy.write(b"busy")
        ring.write(b"quiet")
        got = []
        for _ in range(600):
            while busy.try_write(b"busy"):
                pass
            ring.try_write(b"quiet")
            got += take(ring)
        assert len(got) / 4 < got.count(b"quiet") < len(got) * 3 / 4


@pytest.mark.parametrize("readers", ["one", "compete", "broadcast"])
def test_small_batches_leave_no_lane_behind_one_that_is_always_full(name, readers):
    with Ring.create(name, 4096, writers=3, readers=readers) as ring, Ring.open(name) as busy, Ring.open(name) as quiet:
        ring.join()
        for writer, message in ((ring, b"first"), (busy, b"busy"), (quiet, b"quiet")):
            writer.write(message)
        got = []
        for _ in range(9):
            while busy.try_write(b"busy"):
                pass
            got += ring.read_many(3)
        assert b"quiet" in got and b"first" in got


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
def test_read_many_of_less_than_one_is_an_error(ring, bad):
    with pytest.raises(ValueError if type(bad) is int else TypeError, match="max_messages"):
        ring.read_many(bad)


def test_the_ways_of_reading_can_be_mixed_at_any_point(ring):
    messages = [b"%04d" % i for i in range(60)] + [b"%d" % i * 3 for i in range(40)]
    ring.write_many(messages)
    buffer, got = bytearray(50), []
    for message in ring:
        got.append(message)
        got += ring.read_many(3)
        got.append(bytes(buffer[: ring.read(buffer)]))
        got.append(ring.try_read())
        got.append(ring.read(max_len=50))
        if len(got) >= 98:
            break
    assert got + drain(ring) == messages


# ---------------------------------------------------------------- iteration


def test_iteration_ends_after_so_long_without_a_message(ring):
    ring.write_many([b"1", b"2"])
    assert list(ring.messages(timeout=0)) == [b"1", b"2"]
    begin = time.perf_counter()
    assert list(ring.messages(timeout=0.05)) == []
    assert time.perf_counter() - begin >= 0.05


def test_breaking_out_of_a_loop_loses_nothing(ring):
    ring.write_many([b"%d" % i for i in range(20)])
    got = []
    while len(got) < 20:
        for message in ring:
            got.append(message)
            if len(got) % 3 == 0:
                break
        if len(got) == 18:
            got += ring.read_many()
    assert got == [b"%d" % i for i in range(20)]


def test_a_loop_over_a_ring_that_is_closed_in_it_ends_quietly(ring):
    ring.write_many([b"1", b"2", b"3"])
    assert [ring.close() or message for message in ring] == [b"1"]
    assert list(ring) == [] and list(ring.messages(timeout=1)) == []


def test_two_loops_share_the_messages(ring):
    ring.write_many([b"%d" % i for i in range(10)])
    one, two = iter(ring), ring.messages()
    assert [next(loop) for _ in range(5) for loop in (one, two)] == [b"%d" % i for i in range(10)]


# ---------------------------------------------------------------- time


WAITS = {
    "read": lambda ring, **timeout: ring.read(**timeout),
    "read into": lambda ring, **timeout: ring.read(bytearray(9), **timeout),
    "read_many": lambda ring, **timeout: ring.read_many(**timeout),
    "write": lambda ring, **timeout: ring.write(bytes(4000), **timeout),
    "write_many": lambda ring, **timeout: ring.write_many([bytes(4000)], **timeout),
}


@pytest.fixture(params=WAITS)
def wait(request, ring):
    """Something that has to wait."""
    if "write" in request.param:
        ring.write(bytes(4000))
    return lambda **timeout: WAITS[request.param](ring, **timeout)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -math.inf, 0.001, 0.05])
def test_a_wait_is_never_shorter_than_asked(wait, ring, timeout):
    before = ring.stats()
    begin = time.perf_counter()
    with pytest.raises(RingTimeout, match=ring.name) as caught:
        wait(timeout=timeout)
    assert time.perf_counter() - begin >= timeout
    assert isinstance(caught.value, TimeoutError)
    after = ring.stats()
    assert (after.messages_in, after.messages_out) == (before.messages_in, before.messages_out)
    if timeout <= 0:
        assert after.reader_parks == after.writer_parks == 0
    assert after.readers_parked == after.writers_parked == 0


def test_a_timeout_that_is_no_number_is_an_error(wait):
    with pytest.raises(ValueError, match="NaN"):
        wait(timeout=math.nan)
    with pytest.raises(TypeError):
        wait(timeout="1")


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300, 10**400, 0, -5])
def test_any_timeout_is_fine_when_there_is_nothing_to_wait_for(ring, timeout):
    ring.write(b"1", timeout=timeout)
    assert ring.write_many([b"2", b"3"], timeout=timeout) == 2
    assert ring.read(timeout=timeout) == b"1"
    assert ring.read(bytearray(1), timeout=timeout) == 1
    assert ring.read_many(timeout=timeout) == [b"3"]


def test_try_never_waits(ring):
    assert ring.try_read() is None
    assert ring.try_write(bytes(4000)) is True
    assert ring.try_write(bytes(4000)) is False
    assert ring.stats()[-2:] == (0, 0)
    assert ring.try_read() == bytes(4000)


def test_a_reader_looks_as_often_as_it_was_told_until_there_is_something(ring, other):
    other.write(b"1")
    assert ring.read() == b"1"

    def looks():
        yield
        other.write(b"2")
        yield
        raise AssertionError("it went on")

    ring._reader.looks = looks()
    assert ring.try_read() == b"2"
    assert ring.try_read() is None


@pytest.mark.parametrize("spin", [-0.1, 1.1, math.nan])
def test_spin_is_checked(name, spin):
    with pytest.raises(ValueError, match="spin"):
        Ring.create(name, spin=spin)
    with pytest.raises(ValueError, match="spin"):
        Ring.open(name, spin=spin)


@pytest.mark.parametrize("spin, parks", [(0, True), (1, False)])
def test_spinning_is_part_of_the_timeout(name, spin, parks):
    with Ring.create(name, 4096, spin=spin) as ring:

        def reads():
            with pytest.raises(RingTimeout):
                ring.read(timeout=0.01)
            return bool(ring.stats().reader_parks) == parks

        def writes():
            with pytest.raises(RingTimeout):
                ring.write(bytes(4000), timeout=0.01)
            return bool(ring.stats().writer_parks) == parks

        wait_until(reads)  # not once: whose time is up before it is let run does not park
        ring.write(bytes(4000))
        wait_until(writes)


# ---------------------------------------------------------------- statistics


def test_statistics_count_exactly_and_disturb_nothing(ring, other):
    zero = ring.stats()
    assert zero == (0, 0, 0, 0, 0.0, 0, 4, 0, 0, 0, 0, 0)
    ring.write_many([b"12345678"] * 3)
    other.write(b"")
    other.write(bytes(2040))
    expected = dict(
        messages_in=5, messages_out=0, bytes_in=48 + 8 + 2048, bytes_out=0, fill=2056 / 4096, lanes_in_use=2, readers=0
    )
    for handle in (ring, other):
        assert {field: getattr(handle.stats(), field) for field in expected} == expected
    other.read()
    for handle in (ring, other):
        assert handle.stats().messages_out == 1 and handle.stats().readers == 1
    assert len(other.read_many()) == 4
    stats = ring.stats()
    assert stats.messages_in == stats.messages_out == 5 and stats.bytes_in == stats.bytes_out == 2104
    other.close()
    assert ring.stats().lanes_in_use == 1 and ring.stats().readers == 0
    assert ring.stats() == ring.stats()


# ---------------------------------------------------------------- a closed handle


METHODS = {
    "write": lambda ring: ring.write(b"x"),
    "write of a view": lambda ring: ring.write(bytearray(5000)),
    "try_write": lambda ring: ring.try_write(b"x"),
    "write_many": lambda ring: ring.write_many([b"x"]),
    "write_many of none": lambda ring: ring.write_many([]),
    "read": lambda ring: ring.read(),
    "read with timeout": lambda ring: ring.read(timeout=0),
    "read into": lambda ring: ring.read(bytearray(5)),
    "read max_len": lambda ring: ring.read(max_len=5),
    "try_read": lambda ring: ring.try_read(),
    "read_many": lambda ring: ring.read_many(),
    "stats": lambda ring: ring.stats(),
    "unlink": lambda ring: ring.unlink(),
    "with": lambda ring: ring.__enter__(),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("used", [False, True])
def test_every_method_of_a_closed_handle_raises_ring_closed(name, used):
    ring = Ring.create(name, 8192)
    if used:
        ring.write_many([b"left", b"over"])
        ring.read()
    ring.close()
    for method, call in METHODS.items():
        with pytest.raises(RingClosed, match=name):
            pytest.fail(f"{method} returned {call(ring)!r}")
    assert list(ring) == []


def test_what_a_closed_handle_still_tells(ring):
    ring.close()
    ring.close()
    assert ring.closed and "closed" in repr(ring) and ring.name in repr(ring)
    assert (ring.capacity, ring.max_message) == (4096, 4088) and ring.backend


def test_with_closes_also_after_an_exception(name):
    with pytest.raises(ZeroDivisionError), Ring.create(name) as ring:
        assert not ring.closed and f"{name!r}" in repr(ring)
        raise ZeroDivisionError
    assert ring.closed
    with pytest.raises(FileNotFoundError):
        Ring.open(name)


def test_closing_one_handle_leaves_the_other_and_the_messages(ring, other):
    other.write(b"last words")
    other.close()
    assert ring.read() == b"last words"


# ---------------------------------------------------------------- roles


def test_one_writer_too_many_is_told_the_number_and_the_argument(name):
    with Ring.create(name, 4096, writers=2) as one, Ring.open(name) as two, Ring.open(name) as three:
        one.write(b"1"), two.write(b"2")
        for write in (lambda: three.write(b"3"), lambda: three.try_write(b"3"), lambda: three.write_many([b"3"])):
            with pytest.raises(RingBusy, match=r"(?s)\b2\b.*writers="):
                write()
        assert three.stats().lanes_in_use == 2
        two.close()
        three.write(b"3")
        assert sorted(three.read_many()) == [b"1", b"2", b"3"]


def test_a_second_reader_is_refused_until_the_first_closes(ring, other):
    ring.write_many([b"1", b"2"])
    assert ring.read() == b"1"
    for read in (other.read, other.try_read, other.read_many, lambda: other.read(max_len=5), lambda: next(iter(other))):
        with pytest.raises(RingBusy, match="reader"):
            read()
    ring.close()
    assert other.read() == b"2"


# ---------------------------------------------------------------- errors


ERRORS = [
    RingError("text"), RingTimeout("text"), RingClosed("text"), RingBusy("text"), RingCorrupted("text"),
    RingIncompatible("text"), MessageTooLarge("n", 5, 4), BufferTooSmall("n", 5, 4),
    MessagesLost("n", 5, 4),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_come_through_a_pickle(error, protocol):
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_every_error_is_a_ring_error_and_the_builtin_that_one_would_expect():
    builtins = {
        RingTimeout: TimeoutError,
        RingClosed: ValueError,
        MessageTooLarge: ValueError,
        BufferTooSmall: ValueError,
    }
    for error in ERRORS:
        assert isinstance(error, RingError)
        assert isinstance(error, builtins.get(type(error), Exception))
    exported = {getattr(shmring, each) for each in shmring.__all__}
    assert {type(error) for error in ERRORS} == {
        c for c in exported if isinstance(c, type) and issubclass(c, Exception)
    }


# ---------------------------------------------------------------- who is there


def test_who_is_alive_is_counted_from_the_first_use_of_a_role_until_its_handle_closes(name):
    with Ring.create(name, 4096, writers=4) as ring:
        assert (ring.writers_alive(), ring.readers_alive()) == (0, 0)
        ring.write(b"")
        assert (ring.writers_alive(), ring.readers_alive()) == (1, 0), "this handle's own roles count"
        with Ring.open(name) as other, Ring.open(name) as third:
            assert other.writers_alive() == third.writers_alive() == 1
            third.write(b"")
            assert other.read() == b""
            for handle in (ring, other, third):
                assert (handle.writers_alive(), handle.readers_alive()) == (2, 1)
                assert handle.stats()[5:8] == (2, 4, 1)
        assert (ring.writers_alive(), ring.readers_alive()) == (1, 0)


@pytest.mark.parametrize("side", ["writer", "reader"])
def test_who_waits_for_a_role_to_be_taken_is_told_when_it_is_and_when_the_time_is_up(name, side):
    use = {"writer": lambda handle: handle.write(b""), "reader": lambda handle: handle.try_read()}[side]
    with Ring.create(name, 4096) as ring, Ring.open(name) as other:
        wait = {"writer": ring.wait_for_writer, "reader": ring.wait_for_reader}[side]
        begin = time.perf_counter()
        assert wait(0.05) is False and time.perf_counter() - begin >= 0.05
        assert wait(0) is wait(-1) is False
        answers = []
        thread = threading.Thread(target=lambda: answers.append(wait()))
        thread.start()
        thread.join(0.02)
        assert thread.is_alive()
        use(other)
        thread.join(DEADLINE)
        assert answers == [True] and wait(0) is wait() is True
        with pytest.raises(ValueError):
            wait(float("nan"))


def test_who_waits_for_somebody_to_come_ends_when_the_handle_is_closed(name):
    with Ring.create(name, 4096) as ring:
        closing = threading.Timer(0.05, ring.close)
        closing.start()
        with pytest.raises(RingClosed):
            ring.wait_for_writer()
        closing.join(DEADLINE)
        for ask in (ring.wait_for_reader, ring.readers_alive, ring.writers_alive):
            with pytest.raises(RingClosed):
                ask()


class Index:
    """A whole number that is no int, as NumPy's are."""

    def __init__(self, number):
        self._number = number

    def __index__(self):
        return self._number


def test_whole_numbers_of_other_types_are_taken(name):
    with Ring.create(name, Index(4096), writers=Index(1), readers="broadcast", max_readers=Index(2)) as ring:
        assert (ring.capacity, ring.stats().lanes) == (4096, 1)
        ring.join()
        room = ring.reserve(Index(3))
        with room as view:
            view[:] = b"123"
            room.commit(Index(2))
        assert ring.read(max_len=Index(2)) == b"12"
        ring.write(b"3")
        assert ring.read_many(Index(1)) == [b"3"]


def test_what_is_no_time_or_kind_is_said_to_be_none(name):
    with Ring.create(name, 4096, writers=1) as ring:
        for call in (ring.read, ring.read_many, ring.wait_doorbell):
            with pytest.raises(TypeError, match="timeout is a number of seconds or None, not str"):
                call(timeout="1")
        with pytest.raises(TypeError, match="spin is a number of seconds or None, not str"):
            Ring.open(name, spin="1")
    with pytest.raises(ValueError, match="readers="):
        Ring.create(name, 4096, readers=["one"])
