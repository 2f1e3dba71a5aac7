"""Messages written and read in place, and messages made of several buffers."""

from __future__ import annotations

import array
import struct
import sys
import threading
import time

import pytest
from conftest import DEADLINE, KILLED, Line, wait_until
from support import kill_yourself

from shmring import MessageTooLarge, Ring, RingBusy, RingClosed, RingTimeout


@pytest.fixture
def ring(name):
    with Ring.create(name, 4096, writers=2, spin=0) as ring:
        yield ring


# Some hold on to the very view, most to what it is a view of.
USES = {
    "unpacked": lambda view: struct.iter_unpack("c", view), "part": lambda view: view[1:], "view": memoryview,
    "cast": lambda view: view.cast("c"), "read-only": lambda view: view.toreadonly(),
    "NumPy": lambda view: sys.modules["numpy"].frombuffer(view, "u1"),
}  # fmt: skip


@pytest.fixture(params=USES)
def use(request):
    """Makes something that holds a view's memory."""
    if request.param == "NumPy":
        pytest.importorskip("numpy")
    return USES[request.param]


# ---------------------------------------------------------------- several buffers


@pytest.mark.parametrize("sizes", [[], [0], [1, 2, 3], [10, 0, 2000], [20_000, 30_000], [8, 60_000], [65_528]])
def test_a_message_of_several_buffers_is_their_bytes(name, sizes):
    parts = [bytes([i]) * size for i, size in enumerate(sizes)]
    with Ring.create(name, 65536, writers=1) as ring:
        for kind in (bytes, bytearray, memoryview, lambda part: array.array("B", part)):
            ring.writev([kind(part) for part in parts])
            assert ring.read() == b"".join(parts)
        ring.writev(iter(parts))
        assert ring.read() == b"".join(parts)


def test_buffers_of_wider_items_count_by_their_bytes(name):
    with Ring.create(name, 65536, writers=1) as ring:
        body = array.array("d", range(4000))
        ring.writev([b"head", body])
        assert ring.read() == b"head" + body.tobytes()


def test_wrong_buffers_write_nothing(ring):
    strided = memoryview(b"abcd")[::2]
    for wrong, error in ((b"bytes", TypeError), ([b"a", "b"], TypeError), ([b"a", strided], ValueError)):
        with pytest.raises(error):
            ring.writev(wrong)
    with pytest.raises(MessageTooLarge):
        ring.writev([bytes(4000), bytes(89)])
    assert ring.try_read() is None


def test_several_buffers_wait_for_room(name, children):
    with Ring.create(name, 65536, writers=1, spin=0) as ring:
        ring.write(bytes(60_000))
        with pytest.raises(RingTimeout):
            ring.writev([bytes(30_000), b"x"], timeout=0.01)
        pid = children.start(lambda: [ring.read() for _ in range(2)])
        ring.writev([bytes(30_000), b"x"], timeout=DEADLINE)
        assert children.join(pid) == 0


# ---------------------------------------------------------------- written in place


def test_what_is_written_in_place_is_published_at_the_end_of_the_block(ring):
    with ring.reserve(5) as view:
        assert (len(view), view.readonly, view.format, view.contiguous) == (5, False, "B", True)
        view[:] = b"12345"
        assert ring.try_read() is None and ring.stats().messages_in == 0
    assert ring.read() == b"12345"
    with pytest.raises(ValueError):
        view[0]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4088])
def test_every_size_can_be_written_and_read_in_place(ring, size):
    for turn in range(5):
        data = bytes([turn]) * size
        with ring.reserve(size) as view:
            view[:] = data
        with ring.borrow() as view:
            assert bytes(view) == data and view.readonly
    assert ring.stats().bytes_in == ring.stats().bytes_out


def test_less_than_was_reserved_can_be_published(ring):
    for size in (0, 3, 100):
        room = ring.reserve(100)
        with room as view:
            view[:size] = bytes([size]) * size
            room.commit(size)
            assert ring.read() == bytes([size]) * size, "it is there as soon as commit returns"
            with pytest.raises(ValueError):
                view[:] = b""
            with pytest.raises(ValueError, match="done already"):
                room.commit(1)
    with pytest.raises(ValueError, match="not in the block"):
        room.commit(1)


@pytest.mark.parametrize("wrong", [-1, 101, 1.0, None, True])
def test_a_wrong_commit_publishes_nothing_and_can_be_corrected(ring, wrong):
    room = ring.reserve(100)
    with room as view:
        view[:2] = b"ok"
        with pytest.raises((ValueError, TypeError), match="100" if type(wrong) is int else "nbytes"):
            room.commit(wrong)
        room.commit(2)
    assert ring.read_many() == [b"ok"]


def test_an_exception_in_the_block_publishes_nothing(ring):
    for error in (KeyError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            with ring.reserve(8) as view:
                view[:] = b"never..."
                raise error
        with pytest.raises(ValueError):
            view[0]
    ring.write(b"next")
    assert ring.read_many() == [b"next"]


def test_wrong_sizes_are_refused_before_the_block(ring):
    for wrong, error in ((-1, ValueError), (4089, MessageTooLarge), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error):
            ring.reserve(wrong)
    with ring.reserve(4088) as view:
        assert len(view) == 4088
    room = ring.reserve(1)
    ring.read()
    with room:
        pass
    with pytest.raises(RuntimeError, match="once"), room:
        pass


def test_a_message_in_place_that_was_left_before_it_was_entered_is_of_no_use_any_more(ring):
    ring.write(b"stays")
    for place in (ring.reserve(5), ring.borrow()):
        place.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="once"), place:
            pass
    assert ring.read() == b"stays"
    assert ring.try_read() is None


def test_room_is_waited_for(ring):
    ring.write(bytes(4000))
    with pytest.raises(RingTimeout):
        with ring.reserve(1000, timeout=0.01):
            raise AssertionError
    timer = threading.Timer(0.05, ring.read)
    timer.start()
    with ring.reserve(1000, timeout=DEADLINE) as view:
        view[:4] = b"room"
    timer.join()
    assert ring.read()[:4] == b"room"


def test_the_same_thread_is_refused_what_it_would_wait_for_itself(ring):
    with ring.reserve(4) as view:
        for write in (
            lambda: ring.write(b"x"), lambda: ring.try_write(b"x"), lambda: ring.write_many([b"x"]),
            lambda: ring.writev([b"x"]), lambda: ring.reserve(1).__enter__(),
        ):  # fmt: skip
            with pytest.raises(RingBusy, match="in place"):
                write()
        view[:] = b"mine"
    ring.write(b"x")
    assert ring.read_many(1) == [b"mine"]
    with ring.borrow() as view:
        for read in (
            ring.read, ring.try_read, ring.read_many, lambda: next(iter(ring)), lambda: ring.borrow().__enter__(),
        ):  # fmt: skip
            with pytest.raises(RingBusy, match="in place"):
                read()
        assert view == b"x"
    assert ring.try_read() is None


def test_other_threads_wait_until_the_block_is_left(ring):
    done = []

    def write():
        ring.write(b"2")
        done.append(ring.stats().messages_in)

    def read():
        done.append(ring.read())

    with ring.reserve(1) as view:
        threads = [threading.Thread(target=write) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: ring.stats().writers_parked)
        time.sleep(0.02)
        assert not done
        view[:] = b"1"
    for thread in threads:
        thread.join(DEADLINE)
    assert len(done) == 3
    done.clear()
    with ring.borrow() as view:
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: ring.stats().readers_parked)
        time.sleep(0.02)
        assert not done and view == b"1"
    for thread in threads:
        thread.join(DEADLINE)
    assert done == [b"2"] * 3


def test_threads_that_write_and_read_in_place_lose_nothing(ring):
    each, got = 300, []

    def write(which):
        for number in range(each):
            room = ring.reserve(64)
            with room as view:
                data = b"%d %d" % (which, number)
                view[: len(data)] = data
                room.commit(len(data))

    def read():
        while True:
            with ring.borrow() as view:
                if view == b"end":
                    return
                got.append(tuple(map(int, bytes(view).split())))

    writers = [threading.Thread(target=write, args=(which,)) for which in range(3)]
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join(DEADLINE)
    for _ in readers:
        ring.write(b"end")
    for thread in readers:
        thread.join(DEADLINE)
    assert sorted(got) == [(which, number) for which in range(3) for number in range(each)]


def test_a_view_that_something_still_uses_is_an_error_and_nothing_is_published(ring, use):
    with pytest.raises(BufferError, match="still in use"):
        with ring.reserve(4) as view:
            array_like = use(view)
    with pytest.raises(RingBusy, match="still in use"):
        ring.write(b"x")
    del array_like
    ring.write(b"x")
    assert ring.read_many() == [b"x"]


# ---------------------------------------------------------------- read in place


def test_what_is_read_in_place_is_out_of_the_ring_at_the_end_of_the_block(ring):
    ring.write_many([b"one", b"two"])
    with ring.borrow() as view:
        assert view == b"one" and view.readonly and ring.stats().messages_out == 0
        with pytest.raises(TypeError):
            view[0] = 1
    assert ring.stats().messages_out == 1
    with pytest.raises(ValueError):
        view[0]
    with pytest.raises(KeyError), ring.borrow() as view:
        raise KeyError  # it is taken all the same: else it would come again and again
    assert ring.try_read() is None
    with pytest.raises(RingTimeout), ring.borrow(timeout=0):
        raise AssertionError


def test_reading_in_place_goes_with_the_other_ways(ring):
    ring.write_many([b"%d" % number for number in range(12)])
    got = [ring.read()]
    for _ in range(2):
        with ring.borrow() as view:
            got.append(bytes(view))
        got.append(ring.try_read())
        got += ring.read_many(2)
    got += [message for _, message in zip(range(3), ring.messages(timeout=0))]
    assert got == [b"%d" % number for number in range(12)]


def test_the_room_of_a_message_in_place_is_not_written_over(ring):
    ring.write(b"a" * 2000)
    with ring.borrow() as view:
        assert ring.try_write(b"b" * 2000)
        assert not ring.try_write(b"c" * 2000)
        assert view == b"a" * 2000
    assert ring.try_write(b"c" * 2000)


def test_a_borrowed_view_that_something_still_uses_keeps_its_message(ring, use):
    ring.write_many([b"one", b"two"])
    with pytest.raises(BufferError, match="still in use"):
        with ring.borrow() as view:
            array_like = use(view)
    with pytest.raises(RingBusy, match="still in use"):
        ring.read()
    held = array_like.tobytes() if hasattr(array_like, "tobytes") else next(array_like)[0]
    assert held in (b"one", b"ne", b"o") and ring.stats().messages_out == 0
    del array_like
    assert ring.read() == b"two"


def test_a_message_that_was_handed_back_can_be_borrowed(ring):
    """One that an exception kept from a caller is owed to the next."""
    ring._enter_writer(b"")
    ring.read()
    ring._give_back(b"owed")
    ring.write(b"next")
    with ring.borrow() as view:
        assert view == b"owed"
    with ring.borrow() as view:
        assert view == b"next"


@pytest.mark.parametrize("back", [[b"back"], [b"o"], [b"o", b"back"]])
def test_a_message_that_is_borrowed_goes_alone_though_others_are_handed_back_meanwhile(ring, back):
    """Also if they are the same object, as messages of one byte are."""
    ring._enter_writer(b"")
    ring.read()
    ring._give_back(b"o", b"owed")
    with ring.borrow() as view:
        ring._give_back(*back)
        assert view == b"o"
    assert ring.read_many() == [*back, b"owed"]


def test_a_message_that_was_handed_back_is_borrowed_by_one_thread(ring):
    ring._enter_writer(b"")
    ring.read()
    ring._give_back(b"owed")
    ring.write(b"next")
    done = []
    readers = [lambda: ring.read(), lambda: ring.read_many(1)[0], lambda: bytes(4)[: ring.read(bytearray(4))]]
    for read in readers:
        with ring.borrow() as view:
            thread = threading.Thread(target=lambda read=read: done.append(read()))
            thread.start()
            wait_until(lambda: ring.stats().readers_parked)
            assert view in (b"owed", b"next") and not done
        thread.join(DEADLINE)
        assert len(done.pop()) == 4 and ring.try_read() is None
        ring._give_back(b"owed")
        ring.write(b"next")


# ---------------------------------------------------------------- close, forks, crashes


def test_close_in_the_block_ends_the_view_and_frees_the_roles(name):
    with Ring.create(name, 4096, writers=1) as other:
        ring = Ring.open(name)
        ring.write(b"kept")
        with pytest.raises(RingClosed):
            with ring.reserve(4) as view:
                ring.close()
                with pytest.raises(ValueError):
                    view[0]
        ring = Ring.open(name)
        with ring.borrow() as view:
            ring.close()
            with pytest.raises(ValueError):
                view[0]
        other.write(b"mine")
        assert other.read_many() == [b"kept", b"mine"]


def test_a_lane_that_may_still_be_written_to_stays_claimed_after_close(name, use):
    with Ring.create(name, 4096, writers=1) as other:
        ring = Ring.open(name)
        room = ring.reserve(4)
        array_like = use(room.__enter__())
        ring.close()
        assert ring.closed
        with pytest.raises(RingBusy):
            other.write(b"x")
        del array_like, room
        other.write(b"x")
        assert other.read_many() == [b"x"]


def test_both_roles_stay_while_both_views_are_in_use(name, use):
    with Ring.create(name, 4096, writers=1) as other:
        ring = Ring.open(name)
        ring.write(b"message")
        reserved, borrowed = ring.reserve(4), ring.borrow()
        both = [use(reserved.__enter__()), use(borrowed.__enter__())]
        ring.close()
        del reserved, borrowed
        for _ in range(2):
            with pytest.raises(RingBusy):
                other.write(b"x")
            with pytest.raises(RingBusy):
                other.read()
            both.pop()
        other.write(b"x")
        assert other.read_many() == [b"message", b"x"]


def test_a_process_that_dies_in_the_block_leaves_nothing_of_its_message(name, children, shared):
    line = shared(Line)
    with Ring.create(name, 4096, writers=1) as ring:

        def die():
            ring.write(b"whole")
            with ring.reserve(100) as view:
                view[:] = bytes(100)
                line.say()
                kill_yourself()

        pid = children.start(die)
        line.hear()
        assert children.join(pid) == KILLED
        ring.write(b"next")
        assert ring.read_many() == [b"whole", b"next"]



def test_a_process_that_dies_while_it_reads_in_place_leaves_the_message(name, children):
    with Ring.create(name, 4096, writers=1) as ring:
        ring.write(b"stays")

        def die():
            with ring.borrow():
                kill_yourself()

        assert children.join(children.start(die)) == KILLED
        assert ring.read_many() == [b"stays"]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_neither_publishes_nor_takes_what_its_parent_has_in_place(name, children):
    with Ring.create(name, 4096, writers=2) as ring:
        ring.write(b"parent's")

        def child(reserved, borrowed):
            with pytest.raises(RingClosed):
                reserved.__exit__(None, None, None)
            borrowed.__exit__(None, None, None)
            ring.write(b"child's")

        reserved, borrowed = ring.reserve(4), ring.borrow()
        with reserved as room, borrowed as view:
            assert children.join(children.fork(child, reserved, borrowed)) == 0
            room[:] = b"more"
            assert view == b"parent's"
        assert sorted(ring.read_many()) == [b"child's", b"more"]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_what_was_asked_for_before_a_fork_can_be_entered_after_it(name, children):
    with Ring.create(name, 4096, writers=2) as ring:
        reserved, borrowed = ring.reserve(7), ring.borrow()

        def child():
            with reserved as room:
                room[:] = b"child's"
            with borrowed as view:
                assert view == b"child's"

        assert children.join(children.fork(child)) == 0
        with reserved as room:
            room[:] = b"another"
        assert ring.read_many() == [b"another"]
