"""The operations that are killed, stopped and interrupted before every bytecode, and what is to hold after that.

Without pytest: this is imported by processes that are forked from thousands of times.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from harness import NEVER, Case, Ledger, Sleeper, Stage, is_asleep, message
from harness import main as main  # it is called by who starts it
from support import WINDOWS, wait_until

from shmring import Ring, RingBusy, RingTimeout, _layout, unlink
from shmring._requests import PROBE

# ---------------------------------------------------------------- writing


class Writing(Case):
    """The victim has the ring's only lane, and one message in it."""

    role = "writer"

    def prepare(self, me):
        me.open()
        me.write()

    def go_on(self, me):
        me.write()


class Write(Writing):
    """Messages up to PACKED and beyond, and the last one by try_write."""

    def operate(self, me):
        me.write(40)
        me.write(40)
        me.write(1500)
        assert me.try_write(16)


class WriteMany(Writing):
    """A batch of one size, then a mixed one. A batch may be there in part, up to some message of it."""

    def operate(self, me):
        me.write_many(40, 40, 40)
        me.write_many(16, 600, 16)


class WriteManyLong(Writing):
    """Messages so long that they are not joined, each published on its own; and both after a lap."""

    capacity = 65536

    def prepare(self, me):
        me.open()
        me.write(40_000)
        with Ring.open(me.name) as reader:
            me.took(*reader.read_many())

    def operate(self, me):
        me.write_many(20_000, 20_000)


class WriteGathered(Writing):
    """A message of several buffers: joined, and too long for that."""

    capacity = 65536

    def operate(self, me):
        me.write_gathered(40)
        me.write_gathered(20_000)


class WriteInPlace(Writing):
    """Published at the end of the block, and before it with less than was reserved."""

    def operate(self, me):
        me.write_in_place(40)
        me.write_in_place(40, spare=100)
        me.write(40)


class WritePads(Writing):
    """A message that does not fit before the lane's end: the padding is published first, on its own."""

    size = 600

    def prepare(self, me):
        me.open()
        me.write_many(1300, 1300, 1300)
        with Ring.open(me.name) as reader:
            me.took(*reader.read_many())

    def operate(self, me):
        me.write(self.size)


class WriteManyPads(WritePads):
    """The same in the middle of a batch: the first fits before the lane's end."""

    def operate(self, me):
        me.write_many(100, 600, 40)


class WriteOnlyPads(WritePads):
    """Padding and message together are longer than the lane: the padding goes alone, and the call says "no room"."""

    def operate(self, me):
        assert not me.try_write(4000)

    def go_on(self, me):
        if not me.try_write(4000):
            with Ring.open(me.name) as reader:
                assert reader.try_read() is None  # it goes over the padding
            assert me.try_write(4000)


class WriteFindsSleeper(Writing):
    """A reader sleeps. Killed or stopped, the victim may not have rung; then another writer's message wakes it."""

    writers = 2

    def scene(self, stage):
        stage.other = stage.actor("s")
        stage.other.write()  # it has its lane already, so that no claim rings the reader

    def ready(self, stage):
        reader = stage.actor("z")

        def read_to_the_end():
            while len(reader.read()) != 99:
                pass
            reader.close()

        stage.sleeper(read_to_the_end)

    def operate(self, me):
        me.write()

    def meanwhile(self, stage):
        super().meanwhile(stage)
        stage.other.write()
        stage.all_read("s")

    def end(self, stage):
        if stage.finished:
            stage.all_read("v")
        stage.other.write()
        stage.all_read("s")
        stage.other.write(99)
        stage.wake()
        stage.other.close()
        stage.recover()


class WriteManyFindsSleeper(WriteFindsSleeper):
    """The same with a batch."""

    def operate(self, me):
        me.write_many(40, 16, 40)


class FirstWrite(WriteFindsSleeper):
    """The first write claims the lane and rings everybody; killed in between, it leaves the lane to the next one."""

    role = None

    def prepare(self, me):
        me.open()


class BlockedWrite(Writing):
    """The lane is full, the victim sleeps until somebody has read a message."""

    def prepare(self, me):
        me.open()
        me.fill(500)

    def operate(self, me):
        me.write(500)

    def asleep(self, stage):
        reader = stage.actor("y")
        reader.read()
        reader.close()

    def go_on(self, me):
        me.write(500)


class BlockedWriteInPlace(BlockedWrite):
    """The same in place."""

    def operate(self, me):
        me.write_in_place(500)


class BlockedWriteMany(BlockedWrite):
    """The same with a batch, of which the first fits."""

    def prepare(self, me):
        me.open()
        me.write_many(*[500] * 7)

    def operate(self, me):
        me.write_many(500, 500)


# ---------------------------------------------------------------- reading


class Reading(Case):
    """The victim is the ring's reader, and another writer has one lane of two."""

    role = "reader"
    writers = 2
    in_a_call = 1
    sizes = [40] * 4 + [300]

    def scene(self, stage):
        stage.other = stage.actor("s")

    def prepare(self, me):
        me.open()
        assert me.try_read() is None

    def ready(self, stage):
        stage.other.write_many(*self.sizes)

    def go_on(self, me):
        me.drain()

    def end(self, stage):
        stage.other.close()
        stage.recover()


class Read(Reading):
    """A burst, single messages, into a buffer, by try_read; the last call finds nothing."""

    def operate(self, me):
        for _ in range(4):
            me.read()
        me.read_into()
        me.try_read()


class ReadInPlace(Reading):
    """A message is out of the ring at the end of the block."""

    def operate(self, me):
        me.read_in_place()
        me.read_in_place()
        me.read()


class ReadOneByOne(Reading):
    """Each message is awaited and of the same size: the shortest way through the code."""

    def ready(self, stage):
        pass

    def prepare(self, me):
        super().prepare(me)
        me.feeder = type(me)(me.name, "f", me.note).open()

    def operate(self, me):
        for _ in range(3):
            with me.aside():
                me.feeder.write()
            me.read()

    def go_on(self, me):
        me.drain()
        me.feeder.close()


class ReadOverTheEnd(Reading):
    """The next message lies behind padding."""

    sizes = [600]

    def scene(self, stage):
        super().scene(stage)
        stage.other.write_many(1300, 1300, 1300)

    def prepare(self, me):
        me.open()
        for _ in range(3):
            me.read()

    def operate(self, me):
        me.read()


class ReadManyOverTheEnd(ReadOverTheEnd):
    """The same with a batch."""

    def operate(self, me):
        me.read_many()


class ReadMany(Reading):
    """A batch from two lanes: killed, it may take with it what it had from each."""

    in_a_call = len(Reading.sizes) + 1

    def ready(self, stage):
        super().ready(stage)
        second = stage.actor("d")
        second.write(16)

    def operate(self, me):
        me.read_many()


class ReadManyButNotAll(Reading):
    """A batch with a limit, and reading on after it."""

    in_a_call = 3

    def operate(self, me):
        me.read_many(3)
        me.read()


class Iterate(Reading):
    """Only the message that was on its way may be missing; all that came out before did not come again."""

    def operate(self, me):
        me.iterate(len(self.sizes))


class ReadFreesWriter(Reading):
    """A writer sleeps in a full lane. Killed, the victim may not have rung it; then the next reader does."""

    writers = 1

    def scene(self, stage):
        pass

    def ready(self, stage):
        writer = stage.actor("b")

        def write_three():
            for _ in range(3):
                writer.write(3000)
            writer.close()

        stage.sleeper(write_three)

    def operate(self, me):
        me.read()

    def go_on(self, me):
        """Each read frees the sleeper, also if the one before was interrupted."""
        while me.seen != ("b", 2):
            me.read()

    def end(self, stage):
        if stage.finished:  # then with nobody's help but the victim's
            acked, got = stage.ledger.acked["b"], stage.ledger.got["b"]
            wait_until(lambda: len(acked) == 3 or len(acked) > len(got), "that the writer was woken")
        stage.recover()


class ReadManyFreesWriter(ReadFreesWriter):
    """The same with a batch."""

    def operate(self, me):
        me.read_many()


class FirstRead(ReadFreesWriter):
    """The first read claims the role and rings everybody; killed in between, it leaves the role to the next one."""

    role = None

    def prepare(self, me):
        me.open()


class BlockedRead(Reading):
    """Nothing there, the victim sleeps until somebody writes."""

    sizes = []

    def ready(self, stage):
        pass

    def asleep(self, stage):
        stage.other.write()

    def operate(self, me):
        me.read()

    def go_on(self, me):
        me.read()
        me.drain()


class BlockedIterate(BlockedRead):
    """The same in a loop."""

    def operate(self, me):
        me.iterate(1)


class BlockedReadMany(BlockedRead):
    """The same with a batch."""

    def operate(self, me):
        me.read_many()


# ---------------------------------------------------------------- doorbells


class WriteRingsDoorbell(WriteFindsSleeper):
    """The reader waits for its doorbell. Killed or stopped before it has rung, another writer's message is heard."""

    def ready(self, stage):
        reader = stage.actor("z")
        reader.ring.attach_doorbell()

        def read_to_the_end():
            while len(reader.read_when_rung()) != 99:
                pass
            reader.close()

        stage.sleeper(read_to_the_end)


class WriteManyRingsDoorbell(WriteManyFindsSleeper, WriteRingsDoorbell):
    """The same with a batch."""


class FirstWriteRingsDoorbell(FirstWrite, WriteRingsDoorbell):
    """The same with the claim, which opens the doorbell and rings it."""


class AttachDoorbell(Reading):
    """Attached and armed, it rings for what comes. Killed, it leaves a FIFO: the next one's, or gone with the ring."""

    role = None

    def prepare(self, me):
        me.open()
        me.feeder = type(me)(me.name, "f", me.note).open()

    def ready(self, stage):
        pass

    def operate(self, me):
        me.ring.attach_doorbell()
        self._read_all(me)
        self._ring(me)
        assert me.try_read()
        self._read_all(me)

    def asleep(self, stage):
        """Since it is armed it is announced as asleep, whatever it does."""

    def _read_all(self, reader):
        while reader.try_read():
            pass

    def _ring(self, me):
        with me.aside():
            me.feeder.write()
            assert select.select([me.ring], [], [], 0)[0], "it was not rung"

    def go_on(self, me):
        me.ring.attach_doorbell()
        self._read_all(me)
        self._ring(me)
        assert me.try_read()
        me.feeder.close()

    def end(self, stage):
        """The next one with a doorbell hears it, and then one without takes its place."""
        successor = stage.actor("y")
        successor.ring.attach_doorbell()
        self._read_all(successor)
        stage.other.write()
        assert select.select([successor.ring], [], [], 0)[0], "the successor's was not rung"
        successor.close()
        super().end(stage)


class ReadByDoorbell(BlockedRead):
    """It waits for its doorbell, until somebody writes. The next reader has none."""

    def prepare(self, me):
        me.open()
        me.ring.attach_doorbell()

    def operate(self, me):
        me.read_when_rung()

    def go_on(self, me):
        me.read_when_rung()
        me.drain()


class InALoop:
    """A task of asyncio waits. An interrupt ends the loop's run, and the task goes on in the next one."""

    def prepare(self, me):
        import asyncio  # after the rehearsal all who are forked have it, and only these cases' are as large

        super().prepare(me)
        me.loop = asyncio.new_event_loop()
        me.task = None

    def operate(self, me):
        me.task = me.loop.create_task(self.task(me))
        me.loop.run_until_complete(me.task)

    def go_on(self, me):
        if me.task is not None and not me.task.done():
            me.loop.run_until_complete(me.task)
        self.operate(me)
        me.ring.close()
        me.loop.close()


class ReadAsync(InALoop, BlockedRead):
    """Nothing there, a task waits until somebody writes."""

    async def task(self, me):
        await me.read_async()


class WriteAsync(InALoop, BlockedWrite):
    """The lane is full, a task waits until somebody has read a message."""

    async def task(self, me):
        await me.write_async(500)


# ---------------------------------------------------------------- several readers


class Broadcasting(Writing):
    """The victim is the only writer; another process has joined before."""

    options = {"readers": "broadcast", "max_readers": 2}

    def scene(self, stage):
        stage.audience = stage.actor("y")
        stage.audience.ring.join()

    def meanwhile(self, stage):
        assert stage.words_claimed() == (True, True), "a stopped process lost its role as a writer"

    def end(self, stage):
        stage.recover(stage.audience)


class Broadcast(Broadcasting):
    """Messages, and a batch, over the lane's end."""

    def operate(self, me):
        me.write(40)
        me.write(1500)
        me.write_many(40, 600, 40)
        me.write(900)


class BlockedBroadcast(Broadcasting):
    """The lane is full, the victim sleeps until the reader has read a message."""

    def prepare(self, me):
        me.open()
        me.fill(500)

    def operate(self, me):
        me.write(500)

    def asleep(self, stage):
        stage.audience.read()

    def go_on(self, me):
        me.write(500)

    def end(self, stage):
        stage.audience.drain()
        super().end(stage)


class BroadcastFindsSleepers(Broadcasting):
    """Both readers sleep. Killed or stopped, the victim may not have rung; then another writer's message wakes them."""

    writers = 2

    def scene(self, stage):
        super().scene(stage)
        stage.other = stage.actor("s")
        stage.other.write()  # it has its lane already, so that no claim rings
        stage.audience.drain()

    def ready(self, stage):
        """One of them is noted, which reads to its end; the other one is there to be rung as well."""
        second = stage.actor("z")
        second.note = lambda line: None
        for reader in (stage.audience, second):
            reader.ring.join()

            def read_to_the_end(reader=reader):
                while len(reader.read()) != 99:
                    pass
                if reader is second:
                    reader.close()

            stage.sleepers.append(Sleeper(read_to_the_end))
        wait_until(lambda: stage.holder.stats().readers_parked == 2, "that both sleep")

    def meanwhile(self, stage):
        super().meanwhile(stage)
        stage.other.write()
        stage.all_read("s")

    def operate(self, me):
        me.write()

    def end(self, stage):
        if stage.finished:
            stage.all_read("v")
        stage.other.write()
        stage.all_read("s")
        stage.other.write(99)
        wait_until(lambda: not any(sleeper.is_alive() for sleeper in stage.sleepers), "that both were woken")
        stage.other.close()
        super().end(stage)


class OneOfAll(Case):
    """The victim is one of two readers. What the other one gets is none of its business."""

    options = {"readers": "broadcast", "max_readers": 2}
    role = "reader"
    in_a_call = NEVER  # what a dead reader has not read is nobody's
    sizes = [40] * 4 + [300, 1500, 600]

    def scene(self, stage):
        stage.audience = stage.actor("y")
        stage.theirs = Ledger()
        stage.audience.note = stage.theirs.note
        stage.audience.ring.join()
        stage.other = stage.actor("s")
        note = stage.other.note
        stage.other.note = lambda line: (note(line), stage.theirs.note(line))

    def prepare(self, me):
        me.open()
        me.ring.join()

    def ready(self, stage):
        stage.other.write_many(*self.sizes)

    def meanwhile(self, stage):
        """A stopped reader holds the writers up, but not the other reader."""
        stage.audience.drain()
        assert stage.holder.stats().readers == 2, "a stopped process lost its role as a reader"

    def operate(self, me):
        for _ in range(2):
            me.read()
        me.read_into()
        me.read_in_place()
        me.read_many()
        me.try_read()

    def go_on(self, me):
        me.drain()

    def end(self, stage):
        stage.audience.drain()
        stage.wake(stage.audience)
        stage.other.write(16)
        for size in (1500, 40, 1500, 1500):  # more than a lane: nobody waits for who is gone
            stage.audience.drain()
            stage.other.write(size)
        stage.audience.drain()
        stage.theirs.check()
        for actor in (stage.audience, stage.other):
            actor.close()
        stage.may_be_lost = NEVER
        stage.ledger.check(NEVER)
        late = stage.actor("x")
        late.ring.join()
        stage.recover(late)


class Join(OneOfAll):
    """The first read joins. A writer has written a lap before, and goes on meanwhile."""

    role = None
    in_a_call = 0

    def scene(self, stage):
        super().scene(stage)
        for size in (1500, 1500, 600):
            stage.other.write(size)
            stage.audience.drain()

    def prepare(self, me):
        me.open()

    def ready(self, stage):
        """Whatever the victim comes to, the writer has not to wait for it before it has joined."""

    def operate(self, me):
        me.try_read()

    def meanwhile(self, stage):
        stage.other.write(40)
        stage.audience.drain()


class LeaveFreesWriter(OneOfAll):
    """A writer sleeps in a full lane, and waits for the victim alone, which closes its handle. Killed, it is found."""

    def ready(self, stage):
        def write_four():
            for _ in range(4):
                stage.other.write(1900)

        stage.sleeper(write_four)
        stage.audience.drain()

    def meanwhile(self, stage):
        """Everybody waits for it."""

    def operate(self, me):
        me.ring.close()

    def go_on(self, me):
        me.ring.close()
        assert me.ring.closed


class Losing(Broadcasting):
    """Writers do not wait: the reader gets all that is not said to be lost, in order."""

    options = {"readers": "broadcast", "max_readers": 2, "lag": "drop"}

    def prepare(self, me):
        me.open()
        for size in (1500, 300, 1500, 700, 40):
            me.write(size)

    def operate(self, me):
        me.write(300)
        me.write(1500)
        me.write_many(40, 40, 300, 600)
        me.write_in_place(100, spare=300)
        me.write(250)

    def end(self, stage):
        told = stage.ledger
        came, lost = stage.audience.drain_or_lose()
        missing = len(told.acked["v"] - set(told.got["v"]))
        perhaps = sum(map(len, told.calls["v"])) - len(told.acked["v"])  # written when it was killed
        assert came and missing <= lost <= missing + perhaps
        stage.may_be_lost = missing
        stage.recover(stage.audience)


class Lost(OneOfAll):
    """The victim was overtaken: it says so once, with the exact number, and goes on."""

    options = {"readers": "broadcast", "max_readers": 2, "lag": "drop"}
    sizes = [40, 1500, 300, 1500, 40, 700, 1500, 40, 16]

    def ready(self, stage):
        for size in self.sizes:
            stage.other.write(size)
            stage.audience.drain()

    def operate(self, me):
        came, lost = me.drain_or_lose()
        assert came and lost and came + lost == len(self.sizes)

    def go_on(self, me):
        me.drain_or_lose()

    def end(self, stage):
        stage.ledger.acked["s"].clear()  # some are lost
        super().end(stage)


# ---------------------------------------------------------------- readers that compete


class Competing(Case):
    """The victim is one of two readers, and another writer has one lane of two. A stranger needs the victim's place."""

    options = {"readers": "compete", "max_readers": 2}
    writers = 2
    role = "reader"
    in_a_call = 1
    slot = 1  # the victim's, among the readers'
    has_the_turn = True  # else it takes it over
    sizes = [40] * 3

    def scene(self, stage):
        stage.mate = stage.actor("y")
        if self.slot:
            stage.mate.ring.join()
        stage.other = stage.actor("s")
        stage.other.write()  # it has its lane already, so that no claim rings

    def prepare(self, me):
        me.open()
        me.read()  # from now on it copies ahead

    def ready(self, stage):
        stage.other.write_many(*self.sizes)
        stage.mate.ring.join()
        if not self.has_the_turn:
            assert stage.mate.ring._reader.monitor.enter(PROBE)

    def epoch(self, stage):
        layout = stage.holder._segment.layout
        epoch = stage.holder._segment.words[(layout.reader_block(self.slot) + _layout.READER_PARKED) >> 3]
        return epoch if epoch & 1 else 0

    def asleep(self, stage):
        """Others were faster, or have the turn; they ring it."""

    def meanwhile(self, stage):
        assert stage.holder.stats().readers == self.options["max_readers"], "a stopped process lost its role"

    def go_on(self, me):
        me.drain()

    def doze(self, stage, *mates):
        """Mates fall asleep that take one message each, and as if refused where there are messages: nobody rang."""
        segment = stage.holder._segment
        turn = (segment.layout.turn_offset + _layout.TURN) >> 3
        assert segment.claim(_layout.TURN_CLAIM)
        before, segment.words[turn] = segment.words[turn], 0
        for mate in mates or (stage.mate,):
            stage.sleepers.append(Sleeper(mate.read))
            parking, thread = mate.ring._reader.parking, stage.sleepers[-1].native_id
            wait_until(lambda parking=parking, thread=thread: parking._sleepers and is_asleep(thread), "a mate's sleep")
        segment.words[turn] = before
        segment.release(_layout.TURN_CLAIM)
        stage.out = stage.holder.stats().bytes_out

    def settle(self, stage):
        """Nothing is left while a mate sleeps."""

        def settled():
            stats = stage.holder.stats()
            return stats.bytes_in == stats.bytes_out or not any(sleeper.is_alive() for sleeper in stage.sleepers)

        wait_until(settled, "that a mate gets what is left")

    def end(self, stage):
        self.settle(stage)
        sleeping = sum(sleeper.is_alive() for sleeper in stage.sleepers)
        if sleeping:
            stage.other.write_many(*[40] * sleeping)
            stage.wake()
        stage.other.close()
        stage.recover()


class CompeteRead(Competing):
    """By the fast way, and copied ahead; messages of several sizes, up to PACKED and beyond. The mate takes one."""

    sizes = [40] * 5 + [300, 1500, 16, 16]

    def operate(self, me):
        for _ in range(7):
            me.read()
        me.read_into()
        me.try_read()

    def meanwhile(self, stage):
        super().meanwhile(stage)
        stage.mate.try_read()  # refused, where the victim has the turn


class CompeteReadLanes(CompeteRead):
    """From two lanes in turn."""

    sizes = [40] * 4

    def scene(self, stage):
        super().scene(stage)
        stage.second = stage.actor("d")

    def ready(self, stage):
        super().ready(stage)
        stage.second.write_many(40, 40, 1500, 40, 40)

    def end(self, stage):
        stage.second.close()
        super().end(stage)


class CompeteReadMany(CompeteReadLanes):
    """A batch of both lanes."""

    in_a_call = 9

    def operate(self, me):
        me.read_many(3)
        me.read_many()


class CompeteReadOverTheEnd(Competing):
    """The next message lies behind padding."""

    sizes = [600]

    def scene(self, stage):
        super().scene(stage)
        stage.other.write_many(1300, 1300, 1200)

    def prepare(self, me):
        me.open()
        for _ in range(4):
            me.read()

    def operate(self, me):
        me.read()


class CompeteIterate(CompeteRead):
    """Only the message that was on its way may be missing."""

    sizes = [40] * 4 + [1500, 16]

    def operate(self, me):
        me.iterate(5)


class CompeteBorrow(CompeteRead):
    """A message is out of the ring from the beginning of the block."""

    sizes = [40] * 4 + [1500, 16]

    def operate(self, me):
        for _ in range(5):
            me.read_in_place()


class CompeteReadWakes(Competing):
    """A mate sleeps; the victim takes one message, and rings for the others."""

    def ready(self, stage):
        super().ready(stage)
        self.doze(stage)

    def operate(self, me):
        me.read()

    def interrupted(self, stage):
        if stage.holder.stats().bytes_out != stage.out:  # else it had no turn yet, or gave it back and has rung
            self.settle(stage)

    def go_on(self, me):
        if me.seen == ("s", 0):
            self.operate(me)


class CompeteReadLongWakes(CompeteReadWakes):
    """The same with messages longer than PACKED."""

    sizes = [1100, 1100, 1100]


class CompeteReadManyWakes(CompeteReadWakes):
    """The same with a part of what is there."""

    in_a_call = 2
    sizes = [40] * 5

    def operate(self, me):
        me.read_many(2)


class CompeteBorrowWakes(CompeteReadWakes):
    """The same with a view: the mate goes on before the block is left."""

    def operate(self, me):
        me.read_in_place()


class CompeteFirstRead(CompeteReadWakes):
    """The first read takes a role, and the mate's one message is there."""

    role = None

    def scene(self, stage):
        super().scene(stage)
        stage.mate.read()

    def prepare(self, me):
        me.open()

    def operate(self, me):
        me.read()

    def meanwhile(self, stage):
        """It may have the role or not."""

    def go_on(self, me):
        if me.seen is None:
            me.read()


class CompeteFirstBorrow(CompeteFirstRead):
    """The same in place: it is out of the ring, or the mate would get it as well."""

    def operate(self, me):
        me.read_in_place()

    def go_on(self, me):
        if me.seen is None:
            self.operate(me)


class CompeteReadFreesWriter(CompeteReadWakes):
    """A mate sleeps, and a writer in a full lane. Killed, the victim may have rung neither; both look again."""

    writers = 1

    def scene(self, stage):
        stage.mate = stage.actor("y")
        stage.mate.ring.join()
        stage.other = stage.actor("b")

    def prepare(self, me):
        me.open()
        me.ring.join()

    def ready(self, stage):
        def write_three():
            for _ in range(3):
                stage.other.write(self.capacity - 8)  # a whole lane

        stage.sleepers.append(Sleeper(write_three))
        wait_until(lambda: stage.holder.stats().writers_parked, "that the writer sleeps")
        self.doze(stage)

    def settle(self, stage):
        """As many are written as there is room for; and one of them is the mate's."""

        def settled():
            stats = stage.holder.stats()
            written = stats.bytes_in == min(3 * self.capacity, stats.bytes_out + self.capacity)
            return written and not stage.sleepers[1].is_alive()

        wait_until(settled, "that the writer gets its room, and the mate a message")

    def go_on(self, me):
        if me.seen is None:
            self.operate(me)

    def end(self, stage):
        self.settle(stage)
        reader = stage.actor("x")
        stage.wake(reader)
        stage.other.close()
        stage.recover(reader)


class CompeteReadManyFreesWriter(CompeteReadFreesWriter):
    """The same with a batch."""

    def operate(self, me):
        me.read_many()


class CompeteBlockedRead(Competing):
    """Both readers sleep, and the victim is rung for a message. If it does not take it, the mate gets it."""

    slot = 0
    sizes = []

    def ready(self, stage):
        stage.mate.ring.join()
        self.doze(stage)

    def asleep(self, stage):
        """If an interrupt has cost it the first message (before 3.11), the mate may be rung for the next one."""
        stage.other.write_many(*[40] * (1 + (stage.out != stage.holder.stats().bytes_out)))

    def operate(self, me):
        me.read()

    def interrupted(self, stage):
        self.settle(stage)

    def go_on(self, me):
        if me.seen == ("s", 0):
            self.operate(me)


class CompeteBlockedReadAsSecond(CompeteBlockedRead):
    """The mate is rung for two messages, and rings the victim for the other one."""

    slot = 1

    def asleep(self, stage):
        stage.other.write_many(40, 40)


class CompeteBlockedReadMany(CompeteBlockedRead):
    """The same with a batch."""

    def operate(self, me):
        me.read_many()


class CompeteBlockedIterate(CompeteBlockedRead):
    """The same in a loop."""

    def operate(self, me):
        me.iterate(1)


class CompeteWait(CompeteBlockedRead):
    """The victim waits, and takes nothing; what comes is taken by its next call, or by the mate."""

    def operate(self, me):
        me.ring.wait_doorbell()

    def go_on(self, me):
        """If it does not take what it was rung for, it has to look again like everybody."""
        me.drain()


class CompeteProbe(CompeteReadWakes):
    """The victim only asks whether there is something, for which it takes the turn: a mate may have been refused."""

    in_a_call = 0

    def operate(self, me):
        assert me.ring.wait_doorbell()


class CompeteTimeOut(Competing):
    """Another one has the turn; the time of the victim's read is up. Whoever gives the turn back rings the mate."""

    options = {"readers": "compete", "max_readers": 3}
    slot = 2

    def scene(self, stage):
        super().scene(stage)
        stage.third = stage.actor("t")
        stage.third.ring.join()

    def ready(self, stage):
        super().ready(stage)
        taken, stage.over = threading.Event(), threading.Event()

        def have_the_turn():
            reader = stage.third.ring._reader
            assert reader._take()
            taken.set()
            stage.over.wait()
            reader._give()

        self.doze(stage)
        stage.third_thread = Sleeper(have_the_turn)
        taken.wait()

    def operate(self, me):
        with contextlib.suppress(RingTimeout):
            me.took(me.ring.read(timeout=0.001))

    def interrupted(self, stage):
        stage.over.set()
        stage.third_thread.join()
        self.settle(stage)

    def go_on(self, me):
        """The mate is to get what is there, by who has the turn."""

    def end(self, stage):
        stage.over.set()
        stage.third_thread.join()
        super().end(stage)


class CompeteClose(Competing):
    """A mate sleeps, and there are messages: it may be that the victim was rung for them, and it leaves."""

    in_a_call = 0

    def ready(self, stage):
        super().ready(stage)
        self.doze(stage)

    def operate(self, me):
        me.ring.close()

    def meanwhile(self, stage):
        """It may have its role or not."""

    def go_on(self, me):
        me.ring.close()
        assert me.ring.closed


class CompeteWriteFindsSleepers(Competing):
    """Two readers sleep, and the victim rings one of them. Killed or stopped, another writer's message wakes them."""

    options = {"readers": "compete", "max_readers": 3}
    role = "writer"
    in_a_call = 0

    def scene(self, stage):
        super().scene(stage)
        stage.second = stage.actor("z")
        stage.second.ring.join()
        stage.mate.drain()

    def prepare(self, me):
        me.open()
        me.write()

    def ready(self, stage):
        stage.mate.drain()
        self.doze(stage, stage.mate, stage.second)

    def epoch(self, stage):
        return 0

    def operate(self, me):
        me.write()

    def meanwhile(self, stage):
        assert stage.words_claimed() == (True, True), "a stopped process lost its role as a writer"
        stage.other.write()
        self.settle(stage)

    def interrupted(self, stage):
        self.settle(stage)

    def go_on(self, me):
        me.write()


class CompeteWriteManyFindsSleepers(CompeteWriteFindsSleepers):
    """The same with a batch: the one that is rung rings the other one."""

    def operate(self, me):
        me.write_many(40, 16, 40)


class CompeteFirstWrite(CompeteWriteFindsSleepers):
    """The first write claims the lane, which rings."""

    role = None

    def prepare(self, me):
        me.open()

    def meanwhile(self, stage):
        stage.other.write()
        self.settle(stage)


class CompeteByDoorbell(CompeteBlockedRead):
    """The victim waits for its doorbell, which is rung for a message."""

    def prepare(self, me):
        super().prepare(me)
        me.ring.attach_doorbell()

    def operate(self, me):
        me.read_when_rung()

    def interrupted(self, stage):
        """It may be rung, and has not looked."""


class CompeteCloseDoorbell(CompeteClose):
    """The victim has been rung for the messages, does not look, and leaves."""

    def prepare(self, me):
        super().prepare(me)
        me.ring.attach_doorbell()
        assert me.try_read() is None


class CompeteReadAsync(InALoop, CompeteBlockedRead):
    """The victim's task waits."""

    async def task(self, me):
        await me.read_async()

    def interrupted(self, stage):
        """It may be rung, and its loop does not run."""

    def go_on(self, me):
        if me.task is not None and not me.task.done():
            me.loop.run_until_complete(me.task)
        if me.seen == ("s", 0):
            self.operate(me)
        me.ring.close()
        me.loop.close()


# ---------------------------------------------------------------- life


class Create(Case):
    """Killed, it leaves nothing: the name can be created at once."""

    holder = False
    keep = replace = False

    def prepare(self, me):
        pass

    def operate(self, me):
        me.ring = Ring.create(me.name, 4096, writers=1, keep=self.keep, replace=self.replace, spin=0)

    def meanwhile(self, stage):
        with contextlib.suppress(FileNotFoundError):
            rival = stage.actor("r")
            rival.write()
            rival.drain()
            rival.close()

    def go_on(self, me):
        if me.ring is None:
            try:
                self.operate(me)
            except FileExistsError:
                assert self.keep
                me.open()
        me.drain()
        me.write()
        me.read()

    def end(self, stage):
        try:
            stage.holder = Ring.open(stage.name, spin=0)
        except FileNotFoundError:
            assert not (self.keep and stage.finished)
            stage.holder = Ring.create(stage.name, 4096, writers=1, spin=0)
        else:
            assert self.keep
            stage.kept = True
        stage.recover()


class CreateOverAbandoned(Create):
    """The same in the place of what a crash of everybody left behind."""

    def prepare(self, me):
        pid = os.fork()
        if not pid:
            try:
                ring = Ring.create(me.name, 8192)
                ring.write(b"nobody can want this")
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


class CreateReplaces(Create):
    """In the place of a kept ring: killed, it leaves that one with its message, or the new one, or nothing."""

    keep = replace = True

    def prepare(self, me):
        with Ring.create(me.name, 4096, writers=1, keep=True) as old:
            old.write(message("old", 0, 40))

    def read_old(self, ring):
        return ring.stats().messages_in and ring.try_read() == message("old", 0, 40)

    def meanwhile(self, stage):
        """Nobody may have the old ring open, or it would not be replaced."""

    def end(self, stage):
        with contextlib.suppress(FileNotFoundError), Ring.open(stage.name) as ring:
            stats = ring.stats()
            if stats.messages_in > stats.messages_out:
                assert not stage.finished
                assert ring.read_many() == [message("old", 0, 40)]
        super().end(stage)


class Open(Case):
    """The ring is what it was."""

    def prepare(self, me):
        pass

    def operate(self, me):
        me.open()

    def go_on(self, me):
        if me.ring is None:
            me.open()
        me.write()
        me.drain()


class Close(Case):
    """Both roles are free afterwards, and the ring lives on."""

    def prepare(self, me):
        me.open()
        me.write()
        me.write()
        me.read()

    def operate(self, me):
        me.ring.close()

    def go_on(self, me):
        me.ring.close()
        assert me.ring.closed


class CloseDoorbell(Close):
    """Armed, and closed: its name is gone, or the next one takes it over."""

    def prepare(self, me):
        super().prepare(me)
        me.ring.attach_doorbell()
        me.drain()

    asleep = AttachDoorbell.asleep


class CloseLast(Close):
    """The last handle: the ring counts as not there afterwards, and its name can be given to a new one."""

    holder = False

    def prepare(self, me):
        me.ring = Ring.create(me.name, 4096, writers=1, spin=0)
        me.write()
        me.read()

    def meanwhile(self, stage):
        """Whoever comes while it is stopped is told, or finds the name free and keeps what he makes of it."""
        with contextlib.suppress(FileNotFoundError):
            Ring.open(stage.name).close()
        with contextlib.suppress(FileExistsError, RingBusy):
            stage.holder = Ring.create(stage.name, 4096, writers=1, spin=0)

    def end(self, stage):
        if stage.holder is None:
            try:
                Ring.open(stage.name).close()
            except FileNotFoundError:
                pass
            else:
                raise AssertionError("a ring that nobody has open counts as there")
            stage.holder = Ring.create(stage.name, 4096, writers=1, spin=0)
        stage.recover()


class Unlink(Case):
    """The name is gone or leads to this ring; who has the ring open is not affected; the name can be given anew."""

    def scene(self, stage):
        stage.spare = stage.actor("x"), stage.actor("n")

    def prepare(self, me):
        me.open()
        me.write()

    def operate(self, me):
        me.ring.unlink()

    def meanwhile(self, stage):
        """Another one that wants it gone as well."""
        with contextlib.suppress(FileNotFoundError):
            unlink(stage.name)

    def go_on(self, me):
        me.ring.unlink()
        me.write()

    def end(self, stage):
        try:
            unlink(stage.name)
        except FileNotFoundError:
            pass
        else:
            assert not stage.finished
        other = Stage(Case(), stage.name)
        other.recover()
        stage.recover(*stage.spare)


CASES = {
    case.__name__: case()
    for case in (
        Write, FirstWrite, WriteMany, WriteManyLong, WritePads, WriteManyPads, WriteOnlyPads,
        WriteGathered, WriteInPlace, WriteFindsSleeper, WriteManyFindsSleeper,
        BlockedWrite, BlockedWriteMany, BlockedWriteInPlace, ReadInPlace,
        Read, FirstRead, ReadOneByOne, ReadOverTheEnd, ReadManyOverTheEnd, ReadMany, ReadManyButNotAll, Iterate,
        ReadFreesWriter, ReadManyFreesWriter, BlockedRead, BlockedReadMany, BlockedIterate,
        Broadcast, BlockedBroadcast, BroadcastFindsSleepers, OneOfAll, Join, LeaveFreesWriter, Losing, Lost,
        CompeteRead, CompeteReadLanes, CompeteReadMany, CompeteReadOverTheEnd, CompeteIterate, CompeteBorrow,
        CompeteReadWakes, CompeteReadLongWakes, CompeteReadManyWakes, CompeteBorrowWakes,
        CompeteFirstRead, CompeteFirstBorrow,
        CompeteReadFreesWriter, CompeteReadManyFreesWriter,
        CompeteBlockedRead, CompeteBlockedReadAsSecond, CompeteBlockedReadMany, CompeteBlockedIterate, CompeteWait,
        CompeteProbe, CompeteTimeOut, CompeteClose,
        CompeteWriteFindsSleepers, CompeteWriteManyFindsSleepers, CompeteFirstWrite,
        Create, CreateOverAbandoned, CreateReplaces, Open, Close, CloseLast, Unlink,
    )
}  # fmt: skip
if not WINDOWS:  # there a doorbell is nothing for select, and a victim has no loop of its own
    CASES.update(
        {
            case.__name__: case()
            for case in (
                WriteRingsDoorbell, WriteManyRingsDoorbell, FirstWriteRingsDoorbell, AttachDoorbell, ReadByDoorbell,
                CloseDoorbell, ReadAsync, WriteAsync,
                CompeteByDoorbell, CompeteCloseDoorbell, CompeteReadAsync,
            )
        }
    )  # fmt: skip
    for case in (
        CompeteRead, CompeteReadMany, CompeteBorrow, CompeteReadWakes, CompeteFirstRead, CompeteReadFreesWriter,
        CompeteBlockedRead, CompeteTimeOut, CompeteClose,
    ):  # fmt: skip
        takes_over = type(f"{case.__name__}TakesOver", (case,), {"has_the_turn": False})
        CASES[takes_over.__name__] = takes_over()
