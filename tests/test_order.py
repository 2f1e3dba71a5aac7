"""The order of loads and stores, access by access, on a segment that logs them.

W1 to W5, R1 to R5, S1 to S6 and C1 are the labels of the diagram in `_words.py`.
"""

from __future__ import annotations

import struct
import time

import pytest
from fakes import FakeSegment, ask, batch, hooks_end  # noqa: F401 - a fixture

from shmring import _layout
from shmring._layout import PADDING, record_bytes
from shmring._monitor import MonitorClosed
from shmring._reading import Reader
from shmring._requests import ReadBatch, ReadOne
from shmring._words import make_fence
from shmring._writing import Writer

SIZES = [0, 1, 8, 64, 1024, 1025, 2000]  # on both sides of PACKED


def follows(log, *events):
    """Do these events happen in this order (others in between are fine), each as the first of its kind?"""
    at = [log.index(event) for event in events]
    return at == sorted(at)


def record(message):
    return struct.pack("=Q", len(message)) + message


def payload(size, number=0):
    return bytes((number + i) % 255 + 1 for i in range(size))


WRITES = [pytest.param(lambda m: m, id="one"), pytest.param(lambda m: batch([m]), id="batch")]
READS = [
    pytest.param(lambda: None, id="one"),
    pytest.param(lambda: ReadBatch(100), id="batch"),
    pytest.param(lambda: ReadOne(4096), id="limit"),
    pytest.param(lambda: ReadOne(4096, memoryview(bytearray(4096))), id="into"),
]


# ---------------------------------------------------------------- the writer


@pytest.mark.parametrize("request_for", WRITES)
@pytest.mark.parametrize("size", SIZES)
def test_room_is_looked_for_before_the_record_is_stored(size, request_for):
    """W1 before W2."""
    segment = FakeSegment(order=True)
    writer = Writer(segment)
    looked = []
    segment.hooks["load read_pos"] = lambda: looked.append(segment.lane_bytes(0, 4096))
    ask(writer, request_for(payload(size)))
    assert looked and set(looked) == {bytes(4096)}
    log = segment.log[segment.log.index("ring reader_bell") :]  # after the claim, which looks as well
    assert follows(log, "load read_pos", "order", "store write_pos")


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("request_for", WRITES)
@pytest.mark.parametrize("size", SIZES)
def test_a_record_is_whole_before_write_pos_covers_it(size, request_for, order):
    """W2 before W3; where stores may overtake each other, `order` comes between."""
    segment = FakeSegment(order=order)
    writer = Writer(segment)
    at_order, at_publish = [], []
    whole = record(payload(size))
    segment.hooks["order"] = lambda: at_order.append(segment.lane_bytes(0, len(whole)))
    segment.hooks["store write_pos"] = lambda: at_publish.append(segment.lane_bytes(0, len(whole)))
    ask(writer, request_for(payload(size)))
    assert at_publish == [whole]
    assert segment.peek("write_pos") == record_bytes(size)
    if order:
        assert segment.log[segment.log.index("store write_pos") - 1] == "order" and at_order[-1] == whole


def test_a_batch_is_whole_before_write_pos_covers_it():
    """W2 before W3, for many records at once."""
    segment = FakeSegment(order=True)
    messages = [payload(size, size) for size in (3, 3, 3, 100, 0, 1500, 7)]
    whole = b"".join(record(m).ljust(record_bytes(len(m)), b"\0") for m in messages)
    seen = []
    segment.hooks["store write_pos"] = lambda: seen.append(segment.lane_bytes(0, len(whole)))
    request = batch(messages)
    assert ask(Writer(segment), request) is None and request.done == 7
    assert seen[-1] == whole
    stores = [i for i, event in enumerate(segment.log) if event == "store write_pos"]
    assert all(segment.log[i - 1] == "order" for i in stores)


def test_padding_is_stored_before_it_is_published():
    """W2 before W3, for padding that goes alone."""
    segment = FakeSegment(order=True)
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, bytes(1000))
    assert ask(reader, None) == bytes(1000)
    segment.log.clear()
    segment.hooks["store write_pos"] = lambda: seen.append(segment.lane_bytes(1008, 1016))
    seen = []
    assert ask(writer, bytes(4088)) == 4096 - 1008 + 1008
    assert seen == [struct.pack("=Q", PADDING)]
    assert follows(segment.log, "load read_pos", "store length", "store write_pos", "load reader_parked")
    assert segment.log[segment.log.index("store write_pos") - 1] == "order"


@pytest.mark.parametrize("fence", [False, True])
@pytest.mark.parametrize("request_for", WRITES)
def test_the_writer_looks_for_a_sleeper_after_it_has_published(request_for, fence):
    """W3, W4, W5: publish, fence where nobody else does it for the writer, look at reader_parked."""
    segment = FakeSegment(fence=fence)
    writer = Writer(segment)
    ask(writer, b"claims")
    for _ in range(3):
        segment.log.clear()
        ask(writer, request_for(b"x"))
        assert follows(segment.log, "store write_pos", *["fence"] * fence, "load reader_parked")
        assert segment.log.count("fence") == fence


def test_padding_alone_is_published_like_a_message():
    """W3, W4, W5 for padding, as the reader must wake to free it."""
    segment = FakeSegment(fence=True)
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, bytes(1000))
    ask(reader, None)
    segment.poke("reader_parked", 7)
    segment.log.clear()
    ask(writer, bytes(4088))
    assert follows(segment.log, "store write_pos", "fence", "load reader_parked", "ring reader_bell")


@pytest.mark.parametrize("request_for", WRITES)
def test_the_writer_rings_once_for_each_epoch(request_for):
    """W5."""
    segment = FakeSegment()
    writer = Writer(segment)
    ask(writer, b"claims")
    for epoch, rings in [(0, 0), (1, 1), (1, 0), (2, 0), (3, 1), (4, 0), (9, 1), (9, 0)]:
        segment.poke("reader_parked", epoch)
        segment.log.clear()
        ask(writer, request_for(b"x"))
        assert segment.log.count("ring reader_bell") == rings, epoch


def test_the_writer_looks_at_the_doorbell_after_the_epoch():
    """W5, on the way of one message and of a batch: who rings for an epoch has to ring what it was begun with."""
    segment = FakeSegment(order=True)
    writer = Writer(segment)
    ask(writer, b"claims")
    for epoch, request in [(1, b"x"), (3, batch([b"x"]))]:
        segment.poke("reader_parked", epoch)
        segment.log.clear()
        ask(writer, request)
        log = segment.log[segment.log.index("store write_pos") :]
        assert follows(log, "load reader_parked", "order", "ring reader_bell")


@pytest.mark.parametrize("where", ["store messages_in", "fence", "load reader_parked", "ring reader_bell"])
@pytest.mark.parametrize("request_for", WRITES)
def test_a_writer_that_is_interrupted_after_publishing_still_rings(request_for, where):
    """W5 is made up for when an exception comes after W3."""
    segment = FakeSegment(fence=True)
    writer = Writer(segment)
    ask(writer, b"claims")
    bell = segment.peek("reader_bell")
    segment.poke("reader_parked", 1)

    def interrupt():
        segment.hooks.clear()
        raise KeyboardInterrupt

    segment.hooks[where] = interrupt
    segment.log.clear()
    with pytest.raises(KeyboardInterrupt):
        ask(writer, request_for(b"x"))
    assert follows(segment.log, "store write_pos", "fence", "ring reader_bell")
    assert segment.peek("reader_bell") > bell
    assert ask(Reader(segment), ReadBatch(9)) == [b"claims", b"x"]


# ---------------------------------------------------------------- claims


def test_a_writer_that_claims_a_lane_rings_before_it_publishes():
    """C1: its predecessor may have died between W3 and W5. The lane counts as used before that."""
    segment = FakeSegment()
    ask(Writer(segment), b"x")
    log = segment.log
    assert follows(log, "claim 0", "reserve", "store used", "ring reader_bell", "store write_pos")


def test_a_reader_that_claims_the_role_rings_the_writers_that_sleep():
    """C1: its predecessor may have died between R3 and R5."""
    segment = FakeSegment(writers=3)
    segment.poke("writer_parked", 5)
    segment.poke("writer_parked 1", 6)
    segment.poke("writer_parked 2", 1)
    ask(Reader(segment), None)
    assert [event for event in segment.log if event.startswith("ring")] == ["ring writer_bell", "ring writer_bell 2"]
    assert segment.log.index("claim reader") < segment.log.index("ring writer_bell")


@pytest.mark.parametrize("side", [Writer, Reader])
def test_whoever_claims_a_role_wakes_its_epoch_up_and_never_uses_one_again(side):
    """S6 for a predecessor that died asleep: the epoch's lowest byte becomes 0, the next one is a new number."""
    segment = FakeSegment()
    word = "writer_parked" if side is Writer else "reader_parked"
    segment.poke(word, 1)
    claimant = side(segment)
    ask(claimant, b"x" if side is Writer else None)
    assert segment.peek(word) == 256
    claimant.parking.park(lambda: False, 0, None)
    assert segment.peek(word) == 512


# ---------------------------------------------------------------- the reader


@pytest.mark.parametrize("request_for", READS)
@pytest.mark.parametrize("size", [0, 64, 2000])
def test_the_reader_copies_after_it_looked_and_frees_after_it_copied(size, request_for):
    """R1 before R2 before R3, with `order` between them where accesses may overtake each other."""
    segment = FakeSegment(order=True)
    ask(Writer(segment), payload(size))
    reader = Reader(segment)
    segment.hooks["store read_pos"] = lambda: segment.map.__setitem__(slice(freed, freed + 4096), bytes(4096))
    freed = segment.layout.lane_bytes(0)  # what the writer may do at that very moment
    request = request_for()
    answer = ask(reader, request)
    if getattr(request, "view", None) is not None:
        answer = bytes(request.view[:answer])
    assert answer in (payload(size), [payload(size)])
    log = segment.log[segment.log.index("claim reader") :]
    looked, freed = (len(log) - 1 - log[::-1].index(event) for event in ("load write_pos", "store read_pos"))
    assert looked < freed and log[looked:freed].count("order") == 2
    if "load record" in log:  # what goes straight into a buffer is not told
        copied = len(log) - 1 - log[::-1].index("load record")
        assert looked < log.index("order", looked) < copied < log.index("order", copied) < freed


def test_a_burst_is_freed_message_by_message_after_each_is_handed_out():
    """R3: removal is exact, although R2 copied the whole burst before."""
    segment = FakeSegment()
    ask(Writer(segment), batch([b"%08d" % i for i in range(20)]))
    reader = Reader(segment)
    for i in range(20):
        assert ask(reader, None) == b"%08d" % i
        assert segment.peek("read_pos") == 16 * (i + 1) and segment.peek("messages_out") == i + 1


@pytest.mark.parametrize("fence", [False, True])
@pytest.mark.parametrize("request_for", READS)
def test_the_reader_looks_for_a_sleeping_writer_after_it_has_freed(request_for, fence):
    """R3, R4, R5: free, fence where nobody else does it for the reader, look at writer_parked."""
    segment = FakeSegment(fence=fence)
    writer, reader = Writer(segment), Reader(segment)
    ask(reader, None)  # claims, which looks at the writers too
    for _ in range(3):
        ask(writer, b"x")
        segment.log.clear()
        ask(reader, request_for())
        assert follows(segment.log, "store read_pos", *["fence"] * fence, "load writer_parked")
        assert segment.log.count("fence") == fence


@pytest.mark.parametrize("request_for", READS)
def test_padding_alone_is_freed_like_a_message(request_for):
    """R3, R4, R5 for padding: the writer sleeps until just that is consumed."""
    segment = FakeSegment(fence=True)
    writer, reader = Writer(segment), Reader(segment)
    ask(writer, bytes(1000))
    ask(reader, None)
    wanted = ask(writer, bytes(4088))
    segment.poke("writer_wanted", wanted)
    segment.poke("writer_parked", 1)
    segment.log.clear()
    assert ask(reader, request_for()) is None
    assert segment.peek("read_pos") == wanted == 4096
    assert follows(segment.log, "store read_pos", "fence", "load writer_parked", "ring writer_bell")


@pytest.mark.parametrize("request_for", [None, ReadOne(99), ReadBatch(1)])
def test_the_reader_rings_once_for_each_epoch_and_only_when_there_is_the_room_that_is_wanted(request_for):
    """R5; `order` between the epoch and what it waits for, which were stored in the other order."""
    segment = FakeSegment(order=True)
    writer, reader = Writer(segment), Reader(segment)
    ask(reader, None)
    ask(writer, batch([b"12345678"] * 8))
    steps = [(1, 1000, 0), (3, 48, 0), (3, 48, 1), (3, 48, 0), (4, 0, 0), (5, 96, 1), (5, 0, 0)]
    for taken, (epoch, wanted, rings) in enumerate(steps, 1):
        segment.poke("writer_parked", epoch)
        segment.poke("writer_wanted", wanted)
        segment.log.clear()
        assert ask(reader, request_for) in (b"12345678", [b"12345678"])
        assert segment.peek("read_pos") == 16 * taken
        assert segment.log.count("ring writer_bell") == rings, (epoch, wanted)
        if epoch & 1 and "load writer_wanted" in segment.log:
            assert (
                "order"
                in segment.log[segment.log.index("load writer_parked") : segment.log.index("load writer_wanted")]
            )


@pytest.mark.parametrize(
    "where", ["store messages_out", "fence", "load writer_parked", "load writer_wanted", "ring writer_bell"]
)
@pytest.mark.parametrize("request_for", READS[:3])
def test_a_reader_that_is_interrupted_after_freeing_loses_no_message(request_for, where):
    """R3 to R5: what is out of the ring, but did not reach the caller, comes with the next call."""
    segment = FakeSegment(fence=True)
    ask(Writer(segment), batch([b"12345678"]))
    reader = Reader(segment)
    segment.poke("writer_parked", 1)

    def interrupt():
        segment.hooks.clear()
        raise KeyboardInterrupt

    segment.hooks[where] = interrupt
    request = request_for()
    with pytest.raises(KeyboardInterrupt):
        ask(reader, request)
    if request is not None:
        reader.give_back(request)
    assert not reader.nothing()
    assert ask(reader, request_for()) in (b"12345678", [b"12345678"])
    assert ask(reader, request_for()) is None and reader.nothing()


# ---------------------------------------------------------------- falling asleep


def parked_reader(**kwargs):
    segment = FakeSegment(**kwargs)
    reader = Reader(segment)
    assert ask(reader, None) is None
    segment.log.clear()
    return segment, reader


def sleep(reader, deadline=None):
    reader.parking.park(reader.nothing, 0, deadline)


def test_the_sleeper_notes_announces_fences_looks_again_sleeps_and_takes_it_back():
    """S1, S2, S3, S4, S5, S6, in this order."""
    segment, reader = parked_reader()
    epochs = []
    segment.hooks["sleeper_fence"] = segment.hooks["wait reader_bell"] = lambda: epochs.append(
        segment.peek("reader_parked")
    )
    sleep(reader)
    order = ["load reader_bell", "store reader_parked", "sleeper_fence", "load used", "wait reader_bell"]
    assert follows(segment.log, *order)
    assert segment.log[-1] == "store reader_parked"  # S6
    assert epochs == [1, 1] and segment.peek("reader_parked") == 256
    assert segment.peek("reader_parks") == 1


def test_the_bell_is_noted_before_the_announcement_on_memory_that_keeps_no_order():
    """S1 before S2 on arm64: a ring for this epoch must not be taken for an old one."""
    segment, reader = parked_reader(order=True)
    sleep(reader)
    assert follows(segment.log, "load reader_bell", "order", "store reader_parked", "sleeper_fence")


def test_a_bell_rung_after_the_announcement_is_newer_than_the_one_noted():
    """S1 before S2: whoever sees the epoch rings a bell that this sleep still notices."""
    segment, reader = parked_reader()
    segment.hooks["sleeper_fence"] = lambda: segment.ring(segment.layout.readers_offset + _layout.READER_BELL)
    sleep(reader)
    ((seen, now, _),) = segment.waits
    assert now == seen + 1


@pytest.mark.parametrize("where", ["load reader_bell", "store reader_parked", "sleeper_fence", "load used"])
def test_the_sleeper_does_not_sleep_over_what_came_while_it_announced_itself(where):
    """S4 comes after S2 and S3, and looks at every lane, also at one that was never used before."""
    segment, reader = parked_reader(writers=3)
    other = FakeSegment(peer=segment)
    segment.hooks[where] = lambda: (
        segment.hooks.clear(),
        other.claims.update({_layout.LANE: segment}),
        ask(Writer(other), b"x"),
    )
    sleep(reader)
    assert segment.peek("write_pos 1") == 16
    assert not segment.waits and segment.peek("reader_parked") == 256
    assert ask(reader, None) == b"x"


def test_without_the_others_fences_a_sleep_is_a_nap():
    """S3: wakers that count on a membarrier which fails cannot be made to fence, so it looks again soon."""
    segment, reader = parked_reader(others_fence=False)
    before = time.perf_counter()
    sleep(reader)
    sleep(reader, before - 1)
    (_, _, nap), (_, _, earlier) = segment.waits
    assert before < nap <= time.perf_counter() + 0.001 and earlier == before - 1


def test_the_bell_that_is_waited_for_is_the_one_that_is_rung():
    """S5 of a reader and W5 of a writer mean one word; R5 and a writer's S5 another."""
    segment, reader = parked_reader()
    writer = Writer(segment)
    ask(writer, b"x")
    sleep(reader)
    segment.log.clear()
    segment.poke("reader_parked", 11)
    ask(writer, b"x")
    assert "ring reader_bell" in segment.log
    segment.log.clear()
    writer.parking.park(lambda: True, 8, None)
    assert "wait writer_bell" in segment.log


def test_a_writer_says_what_it_waits_for_before_it_announces_itself():
    """S2: who sees the epoch sees writer_wanted of that epoch."""
    segment = FakeSegment(order=True)
    writer = Writer(segment)
    ask(writer, b"x")
    segment.log.clear()
    wanted = []
    segment.hooks["wait writer_bell"] = lambda: wanted.append(
        (segment.peek("writer_wanted"), segment.peek("writer_parked"))
    )
    writer.parking.park(lambda: True, 4096, None)
    assert wanted == [(4096, 1)]
    assert follows(
        segment.log, "load writer_bell", "store writer_wanted", "order", "store writer_parked", "sleeper_fence"
    )


def test_threads_that_sleep_in_one_handle_are_all_announced_until_the_last_has_left():
    """S2 makes a new epoch for each, S6 comes with the last one; the least that one of them wants is asked for."""
    segment = FakeSegment()
    writer = Writer(segment)
    ask(writer, b"x")
    monitor = writer.parking._monitor
    seen = []
    for request in [(1, 300), (2, 100), (3, 200), (2, None), (1, None), (3, None), (3, None)]:
        monitor.enter(request)
        seen.append((segment.peek("writer_parked"), segment.peek("writer_wanted")))
    assert [epoch for epoch, _ in seen] == [1, 257, 513, 513, 513, 768, 768]
    assert [wanted for _, wanted in seen[:3]] == [300, 100, 100]


def test_an_interrupted_sleep_is_taken_back():
    """S6, whatever is raised in between."""
    for where in ("sleeper_fence", "load used", "wait reader_bell"):
        segment, reader = parked_reader()

        def interrupt(segment=segment):
            segment.hooks.clear()
            raise KeyboardInterrupt

        segment.hooks[where] = interrupt
        with pytest.raises(KeyboardInterrupt):
            sleep(reader)
        assert segment.peek("reader_parked") == 256


def test_a_closed_side_is_not_announced_any_more_and_its_sleepers_are_rung():
    """S6 and the bell, at close; nobody parks there afterwards."""
    segment, reader = parked_reader()
    reader.parking._monitor.enter((1, 0))
    reader.close()
    assert segment.peek("reader_parked") == 256 and segment.log[-1] == "wake reader_bell"
    with pytest.raises(MonitorClosed):
        sleep(reader)
    assert segment.peek("reader_parked") == 256


# ---------------------------------------------------------------- both sides


def sleeps_for_ever(segment, rung_by_now):
    """Would its last sleep have gone on, with the bell as it is at the end?"""
    return any(seen == rung_by_now for seen, _, _ in segment.waits)


@pytest.mark.parametrize("request_for", WRITES)
def test_wherever_a_write_falls_into_a_readers_way_to_sleep_it_is_seen_or_rings(request_for):
    """W3 W4 W5 against S1 to S6, at each access of the sleeper."""
    for point in range(1, 100):
        segment, reader = parked_reader()
        writer = Writer(FakeSegment(peer=segment))
        ask(writer, request_for(b"claims"))
        assert ask(reader, None) == b"claims" and ask(reader, None) is None
        segment.log.clear()
        segment.hooks[point] = lambda writer=writer, segment=segment: (
            segment.hooks.clear(),
            ask(writer, request_for(b"x")),
        )
        sleep(reader)
        assert not sleeps_for_ever(segment, segment.peek("reader_bell")) or segment.hooks, point
        if segment.hooks:
            break
    assert 7 < point < 99


@pytest.mark.parametrize("request_for", WRITES)
def test_wherever_a_reader_falls_asleep_within_a_write_it_is_rung(request_for):
    """S1 to S5 against W2 to W5, at each access of the writer."""
    for point in range(1, 100):
        segment, reader = parked_reader()
        other = FakeSegment(peer=segment)
        writer = Writer(other)
        ask(writer, request_for(b"claims"))
        assert ask(reader, None) == b"claims" and ask(reader, None) is None
        other.log.clear()
        # The announcement stays: the sleeper is still asleep when the write goes on.
        other.hooks[point] = lambda reader=reader, other=other: (other.hooks.clear(), fall_asleep(reader))
        ask(writer, request_for(b"x"))
        if other.hooks:
            break
        assert not sleeps_for_ever(segment, segment.peek("reader_bell")), point
    assert 2 < point < 99


@pytest.mark.parametrize("request_for", READS)
def test_wherever_a_writer_falls_asleep_within_a_read_it_is_rung(request_for):
    """S1 to S5 of a writer against R2 to R5, at each access of the reader."""
    for point in range(1, 100):
        segment = FakeSegment()
        other = FakeSegment(peer=segment)
        writer, reader = Writer(segment), Reader(other)
        request = batch([bytes(2040)] * 3)
        wanted = ask(writer, request)
        assert wanted == 2048 and request.done == 2
        other.log.clear()
        other.hooks[point] = lambda w=writer, o=other, n=wanted: (
            o.hooks.clear(),
            fall_asleep(w, lambda: w.read_pos < n, n),
        )
        try:
            ask(reader, request_for())
        except StopIteration:
            raise AssertionError from None
        if other.hooks:
            break
        assert not sleeps_for_ever(segment, segment.peek("writer_bell")), point
    assert 5 < point < 99


def fall_asleep(side, nothing=None, needs=0):
    """`Parking.park` up to the sleep, without the waking up."""
    parking = side.parking
    seen = parking._monitor.enter((1, needs))
    segment = parking._segment
    segment.sleeper_fence()
    if (nothing or side.nothing)():
        segment.wait(parking._bell, seen, None)


@pytest.mark.parametrize("tso", [False, True])
def test_a_fence_never_waits_and_outlives_an_exception_between_its_halves(tso):
    fence = make_fence(tso)
    for _ in range(3):
        fence()
