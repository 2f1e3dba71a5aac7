"""Measure shmring beside other packages: ``python3 tools/peers.py``, with those installed that are to be measured.

Each package is used by its own documented calls, at the setting that suited it best here; one that is not
installed is left out. The loads, the messages and the checks are those of `shmring.bench`, as are what the standard
library has, and `os.pipe`, which all ratios are to. All take their turns in the same run, round after round, and what
is printed is the median of the rounds. Every message is checked as it comes, long ones by length, number and last
bytes; messages are copied out, also where a package could hand out a view of its memory.

Each mechanism has two processes of its own, which are killed when a job takes too long or fails: the table
then says so in that place, new ones take over for the next load, and the others do not notice.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import glob
import importlib
import importlib.metadata
import json
import math
import mmap
import os
import platform
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from shmring import bench
from shmring._lanes import PACKED, packer, record_of
from shmring._layout import RECORD_HEADER, record_bytes
from shmring.bench import BATCH, CAPACITY, SIZES, Channel, Run

if sys.platform != "win32":
    from multiprocessing import resource_tracker

STARTING: Final = 60.0  # seconds that processes may take to start, import and connect
LOST: Final = Run(0, math.inf)  # the turn of one that hangs or fails
TAG: Final = f"peers-{os.getpid()}-"  # what all names begin with that peers may leave behind
MEMORY: Final = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where the peers' files are to be, if there


class Case(NamedTuple):
    """A load: a stream of messages, a call each or batched, or round trips."""

    key: str  # for --only
    title: str
    size: int  # bytes
    batched: bool = False
    mode: str = ""  # of waiting, for round trips


CASES: Final = (
    Case("64B", "64 B, a call each", 64),
    Case("64B-batched", "64 B, batched", 64, batched=True),
    Case("1KiB", "1 KiB", 1024),
    Case("64KiB", "64 KiB", 1 << 16),
    Case("1MiB", "1 MiB", 1 << 20),
    Case("spinning", "p50, spinning", 64, mode="spinning"),
    Case("blocking", "p50, blocking", 64, mode="blocking"),
)


# ---------------------------------------------------------------- the packages


class Peer(Channel):
    """One direction of another package's. The directing process makes it; ends are opened in the measured ones.

    That takes three steps, each on both sides before the next: `listen` opens the receiving end, `connect`
    the sending one, and `settle` is for what remains to be done where messages are received.
    """

    module = ""
    how = ""  # what of it is used
    blocks = True  # there is a receiver that sleeps
    batches = False  # there is a call for many messages, at least at one end
    polled = True  # streams are received by the poller, which suits most of them best
    ahead = 0  # laps of a stream that are sent at most before the first is received; 0: the sender finds out itself

    def __init__(self, name: str, directory: str) -> None:
        self.name, self.directory = name, directory
        self.blocking = False  # the receiver sleeps in this load
        self.ins: dict[int, Any] = {}  # open ends by size of message
        self.outs: dict[int, Any] = {}

    @classmethod
    def load(cls) -> Any:
        """The package's module."""
        return importlib.import_module(cls.module)

    @classmethod
    def version(cls) -> str:
        """What is installed."""
        return importlib.metadata.version(cls.label)

    def listen(self, size: int) -> None:
        if size not in self.ins:
            self.ins[size] = self.open_in(size)

    def connect(self, size: int) -> None:
        if size not in self.outs:
            self.outs[size] = self.open_out(size)

    def settle(self, size: int) -> None:
        pass

    def open_in(self, size: int) -> Any:
        raise NotImplementedError

    def open_out(self, size: int) -> Any:
        raise NotImplementedError

    def full(self) -> tuple[type[BaseException], ...]:
        """What the sender raises when there is no room; it may also return False."""
        return ()

    def batch_sender(self, size: int) -> Callable[[list[bytes]], int | None] | None:
        """A function that sends messages and returns how many, or None for all; if there is one."""
        return None

    def batch_receiver(self, size: int) -> Callable[[int], list[Any]] | None:
        """A function that returns at most so many messages, or none; if there is one."""
        return None


class Cloudtoid(Peer):
    label = "cloudtoid-interprocess"
    module = "cloudtoid_interprocess"
    how = "try_send again and again, try_receive (blocking: receive); try_send_batch"
    batches = True

    def open_in(self, size: int) -> Any:
        return self.load().Subscriber(f"{self.name}-{size}", CAPACITY[size], self.directory)

    def open_out(self, size: int) -> Any:
        return self.load().Publisher(f"{self.name}-{size}", CAPACITY[size], self.directory)

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.outs[size].try_send  # type: ignore[no-any-return]

    def receiver(self, size: int) -> Callable[[], Any]:
        return self.ins[size].receive  # type: ignore[no-any-return]

    def poller(self, size: int) -> Callable[[], Any]:
        return self.ins[size].try_receive  # type: ignore[no-any-return]

    def batch_sender(self, size: int) -> Callable[[list[bytes]], int | None] | None:
        return self.outs[size].try_send_batch  # type: ignore[no-any-return]


class Kickmsg(Peer):
    """It overwrites what is not read in time, so the sender has to wait for a receipt now and then."""

    label = module = "kickmsg"
    how = "a PubSub region, send, try_receive (blocking: receive); a receipt for each lap of a stream"
    ahead = 2

    def _region(self, size: int) -> Any:
        kickmsg = self.load()
        config = kickmsg.Config()
        config.max_payload_size = size
        config.max_subscribers = 1
        config.sub_ring_capacity = self.ahead * BATCH[size]  # messages; a power of two
        config.pool_size = config.sub_ring_capacity + 4  # the queue keeps its slots until it overwrites them
        return kickmsg.SharedRegion.create_or_open(self._name(size), kickmsg.ChannelType.PubSub, config)

    def _name(self, size: int) -> str:
        return f"/{self.name}-{size}"

    def open_in(self, size: int) -> Any:
        return self.load().Subscriber(self._region(size))

    def open_out(self, size: int) -> Any:
        return self.load().Publisher(self._region(size))

    def full(self) -> tuple[type[BaseException], ...]:
        return (BlockingIOError,)

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.outs[size].send  # type: ignore[no-any-return]

    def receiver(self, size: int) -> Callable[[], Any]:
        return partial(self.ins[size].receive, 1.0)

    def poller(self, size: int) -> Callable[[], Any]:
        return self.ins[size].try_receive  # type: ignore[no-any-return]

    def close(self) -> None:
        for size in SIZES:
            self.load().unlink_shm(self._name(size))


class Subetha(Peer):
    """The queue of it that can wait carries at most 52 bytes, and so is not among these."""

    label, module = "subetha-ipc", "subetha"
    how = "SpscRing; 1 KiB: frames of a Ring; longer ones: blocks of a FrameRegion, whose numbers go through a SpscRing"
    blocks = False
    batches = True
    SLOT = 64  # bytes of a SpscRing's
    FRAMED = 8192  # bytes; the longest that a Ring sends in frames
    SLOTS = 4096
    BLOCKS = 4

    def _open(self, size: int, make: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What carries messages of this size: `make` returns how to get something of a class."""
        subetha, path = self.load(), os.path.join(self.directory, f"{self.name}-{size}")
        if self.SLOT < size <= self.FRAMED:
            return make(subetha.Ring)(path, self.SLOTS), None
        region = make(subetha.FrameRegion)(f"{path}-blocks", size, self.BLOCKS) if size > self.SLOT else None
        return make(subetha.SpscRing)(path, self.SLOTS), region

    def open_in(self, size: int) -> Any:
        ring, region = self._open(size, lambda kind: kind)
        return ring, region or (ring.register_consumer() if size > self.SLOT else None)

    def open_out(self, size: int) -> Any:
        ring, region = self._open(size, lambda kind: kind.open)
        return ring, region or (ring.register_producer() if size > self.SLOT else None)

    def sender(self, size: int) -> Callable[[bytes], Any]:
        ring, other = self.outs[size]
        if size <= self.SLOT:
            return ring.push  # type: ignore[no-any-return]
        if size <= self.FRAMED:
            return partial(ring.send_frame, other)
        push, write = ring.push, other.write_new

        def send(message: bytes) -> bool:
            block = write(message)
            if block is None:
                return False
            while not push(block.to_bytes(8, "little")):
                pass
            return True

        return send

    def poller(self, size: int) -> Callable[[], Any]:
        ring, other = self.ins[size]
        if size <= self.SLOT:
            return ring.pop  # type: ignore[no-any-return]
        if size <= self.FRAMED:
            return partial(ring.recv_frame, other)
        pop, take = ring.pop, other.take_block

        def receive() -> Any:
            number = pop()
            return None if number is None else take(int.from_bytes(number[:8], "little"), size)

        return receive

    def batch_sender(self, size: int) -> Callable[[list[bytes]], int | None] | None:
        return self.outs[size][0].push_many  # type: ignore[no-any-return]

    def batch_receiver(self, size: int) -> Callable[[int], list[Any]] | None:
        return self.ins[size][0].pop_many  # type: ignore[no-any-return]


class Tachyon(Peer):
    """The room that a receiver has freed is told every 32 messages: with less room than that both sides wait."""

    label, module = "tachyon-ipc", "tachyon"
    how = "send again and again, recv_zero_copy (spins, then sleeps) and a copy; room for 64 messages; drain_batch"
    batches = True
    polled = False  # there is no poller; each wait spins, and then sleeps

    def open_in(self, size: int) -> Any:
        """`listen` returns when the sender has come, which is in the next step."""
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        least = max(CAPACITY[size], 64 * (size + 64))
        args = self._path(size), 1 << (least - 1).bit_length()
        threading.Thread(target=lambda: ends.put(self.load().Bus.listen(*args)), daemon=True).start()
        return ends

    def settle(self, size: int) -> None:
        if isinstance(self.ins[size], queue.SimpleQueue):
            self.ins[size] = self.ins[size].get()

    def open_out(self, size: int) -> Any:
        while not os.path.exists(self._path(size)):
            time.sleep(0.001)
        for _ in range(100):  # the socket may be there before somebody listens
            with contextlib.suppress(OSError):
                return self.load().Bus.connect(self._path(size))
            time.sleep(0.01)
        return self.load().Bus.connect(self._path(size))

    def _path(self, size: int) -> str:
        return os.path.join(self.directory, f"{self.name}-{size}.sock")

    def full(self) -> tuple[type[BaseException], ...]:
        return (self.load().TachyonError,)

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.outs[size].send  # type: ignore[no-any-return]

    def receiver(self, size: int) -> Callable[[], Any]:
        acquire = self.ins[size].recv_zero_copy

        def receive() -> bytes:
            with acquire() as message:
                return bytes(message)

        return receive

    poller = receiver

    def batch_receiver(self, size: int) -> Callable[[int], list[Any]] | None:
        drain = self.ins[size].drain_batch

        def receive(most: int) -> list[bytes]:
            with drain(most) as batch:
                return list(map(bytes, batch))

        return receive


class Iceoryx2(Peer):
    """Publish and subscribe does not wake anybody: a receiver that sleeps waits for an event."""

    label = module = "iceoryx2"
    how = "a slice of bytes, loaned and filled; full queues hold the sender up; blocking: an event for each message"
    PLACES = 64  # of the receiver's queue, at most

    def _service(self, size: int) -> tuple[Any, Any]:
        """The services of messages and of events."""
        iox = self.load()
        iox.set_log_level(iox.LogLevel.Error)
        config = iox.config.default()
        config.global_cfg.prefix = iox.FileName.new(f"{self.name}_")
        config.global_cfg.root_path = iox.Path.new(self.directory)
        self.node = iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)
        builder = self.node.service_builder(iox.ServiceName.new(f"messages of {size}"))
        builder = builder.publish_subscribe(iox.Slice[ctypes.c_uint8])
        builder = builder.enable_safe_overflow(False).subscriber_max_buffer_size(self._places(size))
        events = self.node.service_builder(iox.ServiceName.new(f"events of {size}")).event()
        return builder.open_or_create(), events.open_or_create()

    def _places(self, size: int) -> int:
        return max(2, min(self.PLACES, CAPACITY[size] // size))

    def open_in(self, size: int) -> Any:
        messages, events = self._service(size)
        subscriber = messages.subscriber_builder().buffer_size(self._places(size)).create()
        return subscriber, events.listener_builder().create()

    def open_out(self, size: int) -> Any:
        messages, events = self._service(size)
        wait = self.load().BackpressureStrategy.RetryUntilDelivered
        publisher = messages.publisher_builder().initial_max_slice_len(size).backpressure_strategy(wait).create()
        return publisher, events.notifier_builder().create()

    def settle(self, size: int) -> None:
        """What is sent before the first `receive` is lost without a word."""
        self.ins[size][0].receive()

    def sender(self, size: int) -> Callable[[bytes], Any]:
        publisher, notifier = self.outs[size]
        loan, copy = publisher.loan_slice_uninit, ctypes.memmove

        def send(message: bytes) -> None:
            sample = loan(size)
            copy(sample.payload_ptr, message, size)
            sample.assume_init().send()

        def send_and_wake(message: bytes) -> None:
            send(message)
            notifier.notify()

        return send_and_wake if self.blocking else send

    def poller(self, size: int) -> Callable[[], Any]:
        take, copy = self.ins[size][0].receive, ctypes.string_at

        def receive() -> bytes | None:
            sample = take()
            if sample is None:
                return None
            message = copy(sample.payload_ptr, size)
            sample.delete()
            return message

        return receive

    def receiver(self, size: int) -> Callable[[], Any]:
        poll, wait = self.poller(size), self.ins[size][1].blocking_wait

        def receive() -> bytes:
            while (message := poll()) is None:
                wait()
            return message  # type: ignore[no-any-return]

        return receive


class FasterFifo(Peer):
    label, module = "faster-fifo", "faster_fifo"
    how = "bytes instead of pickles (loads=, dumps=); put, get (spinning: get_nowait); put_many, get_many"
    batches = True
    polled = False

    def __init__(self, name: str, directory: str) -> None:
        super().__init__(name, directory)
        make = self.load().Queue
        self.queues = {size: make(2 * CAPACITY[size], loads=bytes, dumps=bytes) for size in SIZES}

    def open_in(self, size: int) -> Any:
        return self.queues[size]

    open_out = open_in

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.queues[size].put  # type: ignore[no-any-return]

    def receiver(self, size: int) -> Callable[[], Any]:
        return self.queues[size].get  # type: ignore[no-any-return]

    def poller(self, size: int) -> Callable[[], Any]:
        return unless(queue.Empty, self.queues[size].get_nowait)

    def batch_sender(self, size: int) -> Callable[[list[bytes]], int | None] | None:
        return self.queues[size].put_many  # type: ignore[no-any-return]

    def batch_receiver(self, size: int) -> Callable[[int], list[Any]] | None:
        get = self.queues[size].get_many
        return lambda most: get(max_messages_to_get=most)


class PyZmq(Peer):
    label, module = "pyzmq", "zmq"
    how = "PUSH and PULL over ipc; from 64 KiB on copy=False"
    polled = False

    def _socket(self, kind: str, size: int) -> Any:
        zmq = self.load()
        end = zmq.Context.instance().socket(getattr(zmq, kind))
        end.set_hwm(max(4, min(1000, (1 << 22) // size)))  # messages that may wait, on either side
        return end

    def _address(self, size: int) -> str:
        return f"ipc://{self.directory}/{self.name}-{size}"

    def open_in(self, size: int) -> Any:
        end = self._socket("PULL", size)
        end.bind(self._address(size))
        return end

    def open_out(self, size: int) -> Any:
        end = self._socket("PUSH", size)
        end.connect(self._address(size))
        return end

    def sender(self, size: int) -> Callable[[bytes], Any]:
        send = self.outs[size].send
        return partial(send, copy=False) if size >= 1 << 16 else send

    def receiver(self, size: int) -> Callable[[], Any]:
        receive = self.ins[size].recv
        return (lambda: receive(copy=False).buffer) if size >= 1 << 16 else receive

    def poller(self, size: int) -> Callable[[], Any]:
        zmq = self.load()
        return unless(zmq.Again, partial(self.ins[size].recv, zmq.NOBLOCK))


class Bare(Peer):
    """What is left of a ring when all promises are: the most that Python can do, for the table to show what they cost.

    One writer, messages of one size, nobody ever sleeps, and who is killed leaves it as it is. Only on x86 do its
    stores arrive in order.
    """

    label, module = "bare ring", "mmap"
    how = "fifty lines of tools/peers.py, with nothing safe and nobody woken: slots of one size, two counters"
    blocks = False
    HEAD = 4096  # bytes before the slots
    WRITTEN, READ = 0, 64  # the words with how many messages were

    @classmethod
    def version(cls) -> str:
        return f"of Python {platform.python_version()}"

    def _open(self, size: int) -> tuple[mmap.mmap, memoryview, int]:
        """The memory, as it is and by words, and how many slots it has."""
        slots = CAPACITY[size] // record_bytes(size)
        path = os.path.join(self.directory, f"{self.name}-{size}")
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            file.truncate(self.HEAD + slots * record_bytes(size))
            memory = mmap.mmap(file.fileno(), 0)
        return memory, memoryview(memory).cast("Q"), slots

    open_in = open_out = _open

    def sender(self, size: int) -> Callable[[bytes], Any]:
        memory, words, slots = self.outs[size]
        head, step, written, read = self.HEAD, record_bytes(size), self.WRITTEN, self.READ
        pack = packer(size) if size <= PACKED else None
        count = words[written]
        full = words[read] + slots

        def send(message: bytes) -> bool:
            nonlocal count, full
            if count == full:
                full = words[read] + slots
                if count == full:
                    return False
            at = head + count % slots * step
            if pack:
                pack(memory, at, size, message)
            else:
                words[at >> 3] = size
                memory[at + RECORD_HEADER : at + RECORD_HEADER + size] = message
            words[written] = count = count + 1
            return True

        return send

    def poller(self, size: int) -> Callable[[], Any]:
        memory, words, slots = self.ins[size]
        head, step, written, read = self.HEAD, record_bytes(size), self.WRITTEN, self.READ
        unpack = record_of(size) if size <= PACKED else None
        count = words[read]
        end = count

        def receive() -> bytes | None:
            nonlocal count, end
            if count == end:
                end = words[written]
                if count == end:
                    return None
            at = head + count % slots * step
            if unpack:
                length, message = unpack(memory, at)
            else:
                length = words[at >> 3]
                message = memory[at + RECORD_HEADER : at + RECORD_HEADER + length]
            words[read] = count = count + 1
            return message

        return receive


PEERS: tuple[type[Peer], ...] = (Cloudtoid, Kickmsg, Subetha, Tachyon, Iceoryx2, FasterFifo, PyZmq, Bare)
PIPE: Final = bench.RawPipeChannel.label


def unless(error: type[BaseException], receive: Callable[[], Any]) -> Callable[[], Any]:
    """`receive`, but None instead of this exception."""

    def poll() -> Any:
        try:
            return receive()
        except error:
            return None

    return poll


def first_line(error: BaseException) -> str:
    return f"{error}".partition("\n")[0] or type(error).__name__


def can(kind: type[Channel], case: Case) -> bool:
    """Whether a mechanism has what this load needs."""
    if case.mode == "spinning":
        return kind.spins
    if case.mode:
        return getattr(kind, "blocks", True)
    return not case.batched or kind is bench.RingChannel or getattr(kind, "batches", False)


# ---------------------------------------------------------------- what the measured processes do


def take_step(step: str, label: str, index: int, size: int, blocking: bool) -> None:
    """Open an end, or settle it: that of the channel with this index."""
    channel = bench._channels[label][index]
    channel.blocking = blocking
    getattr(channel, step)(size)


def batch_ends(channel: Channel) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """What makes a sender and a receiver of many messages at once."""
    if isinstance(channel, bench.RingChannel):
        rings = channel.rings
        return lambda size: rings[size].write_many, lambda size: rings[size].read_many
    assert isinstance(channel, Peer)
    return channel.batch_sender, channel.batch_receiver


def ahead_of(channel: Channel) -> int:
    """How many laps of a stream may be on their way; 0 if the mechanism itself keeps that within bounds."""
    return channel.ahead if isinstance(channel, Peer) else 0


def stream_out(label: str, case: Case, laps: int) -> int:
    """Send the messages of this size, laps times over; returns when it began, in nanoseconds."""
    channel = bench._channels[label][0]
    messages = bench.messages_of(case.size, BATCH[case.size])
    full = channel.full() if isinstance(channel, Peer) else ()
    send_many = batch_ends(channel)[0](case.size) if case.batched else None
    if send_many:
        start = bench.clock()
        for _ in range(laps):
            left = messages
            while left:
                sent = send_many(left)
                left = left[len(left) if sent is None else sent :]
        return start
    send = channel.sender(case.size)
    ahead = ahead_of(channel)
    receipt = bench._channels[label][1].poller(case.size) if ahead else None
    start = bench.clock()
    for lap in range(laps):
        if receipt and lap >= ahead:
            while receipt() is None:
                pass
        for message in messages:
            while True:  # in here, for a function around it would cost the packages that do not wait
                try:
                    if send(message) is not False:
                        break
                except full:
                    pass
    for _ in range(min(laps, ahead)):  # the last ones, or the next stream would find them
        while receipt and receipt() is None:
            pass
    return start


def stream_in(label: str, case: Case, laps: int) -> int:
    """Receive and check what `stream_out` sends; returns when it ended, in nanoseconds."""
    channel = bench._channels[label][0]
    due = bench.expected_of(case.size, BATCH[case.size], False)
    receive_many = batch_ends(channel)[1](case.size) if case.batched else None
    if receive_many:
        return bench.batches_in(receive_many, due, laps)
    polled = isinstance(channel, Peer) and channel.polled
    receive = (channel.poller if polled else channel.receiver)(case.size)
    receipt = bench._channels[label][1].sender(case.size) if ahead_of(channel) else None
    for _ in range(laps):
        for expected in due:
            while (message := receive()) is None:
                pass
            if message != expected:
                bench.complain(message, expected)
        if receipt:
            receipt(b"received")
    return bench.clock()


# ---------------------------------------------------------------- directing them


class Pair:
    """Two measured processes with a channel in each direction of one mechanism, killed when something goes wrong."""

    def __init__(self, kind: type[Channel], directory: str, limit: float) -> None:
        self.kind = kind
        self.wrong = ""  # what went wrong with the present load
        self._directory = directory
        self._limit = limit
        self._stack = contextlib.ExitStack()
        self._fleet: bench.Fleet | None = None
        self._made = 0

    def close(self) -> None:
        """End the processes first, then the channels."""
        self._fleet = None
        self._stack.close()

    def _make(self) -> Channel:
        if not issubclass(self.kind, Peer):
            return bench.make(self.kind.label, self._stack)  # type: ignore[no-any-return]
        self._made += 1
        channel = self.kind(f"{TAG}{PEERS.index(self.kind)}-{self._made}", self._directory)
        self._stack.callback(channel.close)
        return channel

    def _start(self) -> bench.Fleet:
        channels = {self.kind.label: (self._make(), self._make())}
        fleet = self._fleet = self._stack.enter_context(bench.Fleet())
        self._left, self._right = fleet.hire(channels), fleet.hire(channels)
        fleet.run((self._left, bench.cpu_seconds), (self._right, bench.cpu_seconds))  # they are there
        return fleet

    @contextlib.contextmanager
    def _watched(self, limit: float) -> Iterator[None]:
        """Give each job in here so many seconds; note what goes wrong, and end the processes then."""
        bench.LIMIT = limit
        start = time.monotonic()
        try:
            yield
        except Exception as error:  # a package's own ones, too
            self.wrong = f"{'hung' if time.monotonic() - start >= limit else 'failed'}: {first_line(error)}"
            self.close()

    def prepare(self, case: Case) -> None:
        """Have two processes, and the ends open that the load needs."""
        self.wrong = ""
        with self._watched(STARTING):
            fleet = self._fleet or self._start()
            if not issubclass(self.kind, Peer):
                return
        if self.wrong:
            return
        rest = case.size, case.mode == "blocking"
        with self._watched(max(self._limit, 10.0)):
            for step in ("listen", "connect", "settle"):
                near, far = (self._left, self._right) if step == "connect" else (self._right, self._left)
                jobs = [(worker, take_step, step, self.kind.label, i, *rest) for i, worker in enumerate((near, far))]
                fleet.run(*jobs)

    def measure(self, case: Case, messages: int) -> Run:
        """One turn, with so many messages; LOST if it did not come to its end, or an earlier one did not."""
        run = LOST
        if self.wrong or self._fleet is None:
            return run
        label = self.kind.label
        with self._watched(self._limit):
            if case.mode:
                count, start = min(messages, bench.MOST_SAMPLES), bench.clock()
                job = label, case.size, case.mode, count
                _, trips = self._fleet.run((self._right, bench.pong, *job), (self._left, bench.ping, *job))
                run = Run(count, (bench.clock() - start) / 1e9, samples=[trip / 2 for trip in trips])
            else:
                laps = max(1, round(messages / BATCH[case.size]))
                end, start = self._fleet.run(
                    (self._right, stream_in, label, case, laps), (self._left, stream_out, label, case, laps)
                )
                run = Run(laps * BATCH[case.size], (end - start) / 1e9)
        return run


def sweep() -> None:
    """Remove what killed processes left behind."""
    for directory in {MEMORY or tempfile.gettempdir(), tempfile.gettempdir()}:
        for path in glob.glob(os.path.join(glob.escape(directory), f"*{TAG}*")):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def installed(kinds: Sequence[type[Peer]]) -> dict[str, str]:
    """The versions of those that can be imported, by label; the others are told."""
    found = {}
    for kind in kinds:
        try:
            kind.load()
            found[kind.label] = kind.version()
        except ModuleNotFoundError:  # or its metadata
            print(f"{kind.label}: not installed", flush=True)
        except Exception as error:  # whatever a package may raise that is not for this system or this Python
            print(f"{kind.label}: not installed so that it can be imported: {first_line(error)}", flush=True)
    return found


# ---------------------------------------------------------------- the table


class Table:
    """Results by mechanism and load, and how they are told."""

    def __init__(self, cases: Sequence[Case], rows: Sequence[tuple[type[Channel], str]]) -> None:
        self.cases = cases
        self.rows = rows
        self.rounds: dict[tuple[str, str], list[float]] = {}  # messages a second, or microseconds
        self.wrong: dict[tuple[str, str], str] = {}

    def median(self, who: str, case: Case) -> float | None:
        return statistics.median(rounds) if (rounds := self.rounds.get((who, case.key))) else None

    def ratio(self, who: str, case: Case) -> float | None:
        """How many times better than os.pipe, whose batches are a call each: a higher rate or a shorter time."""
        plain = next((other for other in CASES if other.size == case.size and not other.mode), case)
        figure, pipe = self.median(who, case), self.median(PIPE, plain if case.batched else case)
        if not figure or not pipe:
            return None
        return pipe / figure if case.mode else figure / pipe

    def cell(self, who: str, case: Case) -> str:
        if (who, case.key) in self.wrong:
            return self.wrong[who, case.key].partition(":")[0]
        figure = self.median(who, case)
        if figure is None:
            return "-"
        if case.mode:
            text = f"{bench.digits(figure)} us"
        elif case.size >= 1 << 16:
            text = f"{bench.digits(figure * case.size / 1e9)} GB/s"
        else:
            text = f"{bench.rate(figure)}/s"
        ratio = self.ratio(who, case)
        return text if ratio is None or who == PIPE else f"{text} ({bench.digits(ratio)}x)"

    def lines(self, markdown: bool) -> list[str]:
        """The table, aligned or in Markdown."""
        cells = [["one way, 1 to 1", *(case.title for case in self.cases)]]
        cells += [[kind.label, *(self.cell(kind.label, case) for case in self.cases)] for kind, _ in self.rows]
        if markdown:
            cells.insert(1, ["---"] * len(cells[0]))
            return [f"| {' | '.join(row)} |" for row in cells]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]

    def notes(self) -> list[str]:
        """What went wrong, and how each package was used."""
        titles = {case.key: case.title for case in self.cases}
        found = [f"{who}, {titles[key]}: {what}" for (who, key), what in self.wrong.items()]
        return found + [f"{kind.label} {version}: {kind.how}" for kind, version in self.rows if issubclass(kind, Peer)]

    def as_json(self, env: dict[str, Any], scale: bench.Scale) -> str:
        """Everything that was measured."""
        results = []
        for kind, case in ((kind, case) for kind, _ in self.rows for case in self.cases):
            who = kind.label
            told = {"who": who, "case": case.key, "unit": "us" if case.mode else "messages/s", "size": case.size}
            rounds = self.rounds.get((who, case.key), [])
            more = {"median": self.median(who, case), "to os.pipe": self.ratio(who, case), "rounds": rounds}
            results.append({**told, **more, "wrong": self.wrong.get((who, case.key))})
        peers = {kind.label: version for kind, version in self.rows if issubclass(kind, Peer)}
        return json.dumps({"environment": env, "scale": scale._asdict(), "peers": peers, "results": results}, indent=1)


def measure(table: Table, scale: bench.Scale, limit: float) -> None:
    """Measure all there is, and leave no process and no file behind."""
    run = bench.Bench(scale, sys.stdout)
    if sys.platform != "win32":  # or it starts with the first process, and lets Ctrl-C through to that one
        resource_tracker.ensure_running()
    with contextlib.ExitStack() as stack:
        stack.callback(sweep)
        directory = tempfile.mkdtemp(prefix=TAG, dir=MEMORY)
        pairs = []
        for kind, _ in table.rows:
            pairs.append(Pair(kind, directory, limit))
            stack.callback(pairs[-1].close)
        for case in table.cases:
            ready = {pair.kind.label: pair for pair in pairs if can(pair.kind, case)}
            for label, pair in ready.items():
                run.progress.show(case.title, f"starting {label}")
                pair.prepare(case)
            ways = {label: partial(pair.measure, case) for label, pair in ready.items()}
            turns = run.rounds(case.title, ways, scale.seconds, bench.MOST_SAMPLES if case.mode else 1 << 40)
            for label, pair in ready.items():
                if pair.wrong:
                    table.wrong[label, case.key] = pair.wrong
                elif case.mode:
                    table.rounds[label, case.key] = [bench.tail([turn.samples])["p50"] for turn in turns[label]]
                else:
                    table.rounds[label, case.key] = [turn.messages / turn.seconds for turn in turns[label]]
        run.progress.clear()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Measure shmring beside {', '.join(kind.label for kind in PEERS)}, as far as they are installed, "
        "and beside what the standard library has. Exit code 1: shmring itself failed."
    )
    scale = parser.add_mutually_exclusive_group()
    scale.set_defaults(scale=bench.NORMAL)
    rough = "shorter rounds, and fewer, for rough figures"
    scale.add_argument("--quick", dest="scale", action="store_const", const=bench.QUICK, help=rough)
    scale.add_argument("--smoke", dest="scale", action="store_const", const=bench.SMOKE, help=argparse.SUPPRESS)
    keys = ", ".join(case.key for case in CASES)
    only = f"measure only these mechanisms, by the names in the table, or loads ({keys}); shmring and {PIPE} always are"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=only)
    parser.add_argument("--repeats", type=bench.positive, metavar="N", help="rounds, of which the medians are printed")
    late = "seconds after which a turn that has not ended is given up (%(default)g)"
    parser.add_argument("--limit", type=float, default=20.0, metavar="S", help=late)
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--json", type=bench.target, metavar="FILE", help="write all rounds' figures")
    options = parser.parse_args(arguments)
    names = {kind.label for kind in (*bench.KINDS, *PEERS)} | {case.key for case in CASES}
    for name in options.only:
        if name not in names:
            parser.error(f"--only: there is no {name!r}; choose from {', '.join(sorted(names))}")
    if options.repeats:
        options.scale = options.scale._replace(rounds=options.repeats)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parse(arguments)
    cases = [case for case in CASES if case.key in options.only] or list(CASES)
    kinds: list[type[Channel]] = [*bench.KINDS, *PEERS]
    named = [kind for kind in kinds if kind.label in options.only]
    if named:
        kinds = [kind for kind in kinds if kind in named or kind.label in (bench.OURS, PIPE)]
    env = bench.environment()
    print(*bench.describe(env), "", sep="\n", flush=True)
    versions = installed([kind for kind in kinds if issubclass(kind, Peer)])
    rows = [
        (kind, versions.get(kind.label, "")) for kind in kinds if not issubclass(kind, Peer) or kind.label in versions
    ]
    table = Table(cases, rows)
    try:
        measure(table, options.scale, options.limit)
    except KeyboardInterrupt:
        return 130
    print(*table.lines(options.markdown), "", sep="\n")
    print(f"In brackets: how many times better than {PIPE}, with a call each.", "", sep="\n")
    for note in table.notes():
        print(f"- {note}" if options.markdown else note)
    if options.json:
        bench.write(options.json, table.as_json(env, options.scale))
    return int(any(who == bench.OURS for who, _ in table.wrong))


if __name__ == "__main__":
    sys.exit(main())
