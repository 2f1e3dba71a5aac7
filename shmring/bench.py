"""Measure shmring beside what the standard library has: ``python -m shmring.bench``.

The peers are `multiprocessing.Queue`, `multiprocessing.Pipe`, a Unix socket (on Windows, one of localhost)
and a raw `os.pipe`. All mechanisms do the same work in the same run, in turn, round after round; what is
printed is the median of the rounds, with the lowest and the highest. This process only directs: the measured
ones are started for it (spawn), keep one mechanism's channels ready beside the other's, and get their jobs,
which are functions of this module, through a control pipe.

Every message is checked. In the timed rounds short ones are compared whole, and of long ones the
length, the number in front and the last bytes, with the same code for all mechanisms. Before its timed
rounds each way of sending passes a run that is not timed, where every byte of every message counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import html
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import selectors
import socket
import statistics
import struct
import sys
import time
from array import array
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from multiprocessing import connection
from typing import Any, Final, NamedTuple

from . import __version__
from ._backend import os_backend
from ._errors import MessagesLost, RingTimeout
from ._ring import Ring

# ---------------------------------------------------------------- what differs between systems

if sys.platform == "win32":
    import ctypes
    import faulthandler
    import io
    import msvcrt
    import winreg
    from multiprocessing.context import get_spawning_popen

    PIPE_BUF: Final = 4096  # bytes; in fact a write of any length reaches a reader in one piece
    TELLS_MEMORY: Final = False  # how much of it a process has to itself
    ERASE: Final = " " * 78 + "\r"  # a console may not know the sequence
    set_blocking: Callable[[int, bool], None] | None = getattr(os, "set_blocking", None)  # of pipes, from 3.12 on

    if sys.version_info >= (3, 10):
        clock = time.perf_counter_ns  # the same in all processes
    else:  # before, it began with the process

        def behind() -> int:
            """The nanoseconds of the system's clock less those of this process's."""
            # BOOL QueryPerformanceFrequency(LARGE_INTEGER *lpFrequency); and for the counter the same
            kernel32, frequency, count = ctypes.WinDLL("kernel32"), ctypes.c_int64(), ctypes.c_int64()
            read = kernel32["QueryPerformanceCounter"]
            for function, value in ((kernel32["QueryPerformanceFrequency"], frequency), (read, count)):
                function.argtypes = (ctypes.c_void_p,)
                function.restype = ctypes.c_int
                function(ctypes.byref(value))
            found = []
            for _ in range(100):
                read(ctypes.byref(count))
                found.append(count.value * 1_000_000_000 // frequency.value - time.perf_counter_ns())
            return max(found)  # with the least time between the two

        BEHIND: Final = behind()

        def clock() -> int:
            return time.perf_counter_ns() + BEHIND

    class PipeEnd:
        """A descriptor of an `os.pipe` that can be given to a process which is being started."""

        def __init__(self, fd: int) -> None:
            self._fd = fd

        def fileno(self) -> int:
            return self._fd

        def close(self) -> None:
            os.close(self._fd)

        def __reduce__(self) -> tuple[Any, ...]:
            starting: Any = get_spawning_popen()
            return pipe_end, (starting.duplicate_for_child(msvcrt.get_osfhandle(self._fd)),)

    def pipe_end(handle: int) -> PipeEnd:
        return PipeEnd(msvcrt.open_osfhandle(handle, os.O_BINARY))

    def raw_pipe() -> tuple[Any, Any]:
        out, into = os.pipe()
        return PipeEnd(out), PipeEnd(into)

    def into_buffers(fd: int) -> Callable[[memoryview], int]:
        return io.FileIO(fd, closefd=False).readinto

    def end_after(seconds: int) -> None:
        """End this process after so many seconds; 0: no longer."""
        faulthandler.cancel_dump_traceback_later()
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True)

    @contextlib.contextmanager
    def without_ctrl_c() -> Iterator[None]:
        """Processes that are started meanwhile are not ended by Ctrl-C; one that comes in between is lost."""
        # BOOL SetConsoleCtrlHandler(PHANDLER_ROUTINE HandlerRoutine, BOOL Add);
        ignore = ctypes.WinDLL("kernel32")["SetConsoleCtrlHandler"]
        ignore.argtypes = (ctypes.c_void_p, ctypes.c_int)
        ignore.restype = ctypes.c_int
        ignore(None, True)
        try:
            yield
        finally:
            ignore(None, False)

    def wine_version() -> str | None:
        # const char *wine_get_version(void);
        ntdll = ctypes.WinDLL("ntdll")
        if not hasattr(ntdll, "wine_get_version"):
            return None
        wine_get_version = ntdll["wine_get_version"]
        wine_get_version.argtypes = ()
        wine_get_version.restype = ctypes.c_char_p
        return str(wine_get_version(), "ascii")

    def system() -> dict[str, Any]:
        """Not by `platform`: that asks WMI, which takes its time, and under Wine ends the process."""
        version, wine = sys.getwindowsversion(), wine_version()
        remarks = ["Windows' clock ticks every 15.6 ms: CPU time goes in such steps, and pauses may take as long."]
        if wine:
            remarks += ["Wine's kernel calls are round trips to its server: these are no figures about Windows."]
        return {
            "system": f"Windows {version.major}.{version.minor}.{version.build} {os_backend.MACHINE}",
            **({"wine": wine} if wine else {}),
            "remarks": remarks,
        }

    def cpu_model() -> str:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()

else:
    import signal
    from select import PIPE_BUF

    TELLS_MEMORY: Final = os.path.exists("/proc/self/smaps_rollup")
    ERASE: Final = "\x1b[K"
    clock = time.perf_counter_ns  # the same in all processes
    set_blocking = os.set_blocking

    def raw_pipe() -> tuple[Any, Any]:
        """Both ends of a pipe, as Connections, which can be pickled."""
        return multiprocessing.Pipe(duplex=False)

    def into_buffers(fd: int) -> Callable[[memoryview], int]:
        """Reads from a descriptor into a buffer."""
        return lambda view: os.readv(fd, [view])

    def end_after(seconds: int) -> None:
        """End this process after so many seconds; 0: no longer."""
        signal.alarm(seconds)

    @contextlib.contextmanager
    def without_ctrl_c() -> Iterator[None]:
        """Processes that are started meanwhile inherit that Ctrl-C is not for them; here it comes afterwards."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def system() -> dict[str, Any]:
        """What the system is, as a part of the environment."""
        return {"system": f"{platform.system()} {platform.release()} {platform.machine()}"}

    def cpu_model() -> str:
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or "unknown CPU"


# ---------------------------------------------------------------- what is measured, and how long

PARTS: Final = ("latency", "throughput", "clients", "writers", "readers", "cpu")
MODES: Final = ("spinning", "blocking", "asyncio", "asleep")
SMALL: Final = (64, 1024)  # bytes; the sizes whose latency is measured
SIZES: Final = (64, 1024, 1 << 16, 1 << 20)  # bytes; the sizes that are streamed
LONG: Final = 1 << 20  # bytes; from here on a ring is read into one buffer too: new memory each time costs a third
WHOLE: Final = 1024  # bytes; messages up to this are compared whole, also while the time is taken
BATCH: Final = {64: 1024, 1024: 256, 1 << 16: 4, 1 << 20: 2}  # different messages that go round; one write_many
CAPACITY: Final = {64: 1 << 20, 1024: 1 << 20, 1 << 16: (1 << 19) + 4096, 1 << 20: (1 << 22) + 4096}  # bytes of a lane
CLIENTS: Final = 10
READERS: Final = 4  # of a ring that has several
CREW: Final = 4  # writers to readers who compete
LULL: Final = 0.02  # seconds without a message, after which such a reader looks whether all were taken
CLIENT_CAPACITY: Final = 1 << 15  # bytes of a lane for requests, and of one for replies
REQUEST: Final = 64  # bytes
PAUSE: Final = 0.0005  # seconds in which a reader falls asleep, between two messages
MOST_SAMPLES: Final = 20_000  # round trips in a round
TAIL: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
LIMIT = 30.0  # seconds after which a job that has not ended is given up

SPAWN: Final = multiprocessing.get_context("spawn")
_NUMBER = struct.Struct("<Q")
_STAMPED = struct.Struct("<QQ")


class Scale(NamedTuple):
    """How long to measure."""

    rounds: int
    seconds: float  # for one mechanism in one round
    clients_seconds: float
    idle: float  # seconds that a reader is left without a message
    checked: int  # messages of which every byte is checked


NORMAL: Final = Scale(rounds=5, seconds=0.1, clients_seconds=0.25, idle=2.0, checked=2000)
QUICK: Final = Scale(rounds=3, seconds=0.02, clients_seconds=0.05, idle=0.5, checked=500)
SMOKE: Final = Scale(rounds=1, seconds=0.002, clients_seconds=0.002, idle=0.05, checked=20)


class WrongMessage(Exception):
    """A message came that is not the one that was due."""


class BenchError(Exception):
    """The run cannot go on, or does not count."""


# ---------------------------------------------------------------- messages and their checks


class Ends:
    """Equal to a long message that has this one's length, number and last bytes."""

    def __init__(self, message: bytes) -> None:
        self._size, self._head, self._tail = len(message), message[:8], message[-8:]

    def __eq__(self, other: Any) -> bool:
        return len(other) == self._size and other[:8] == self._head and other[-8:] == self._tail


def pattern(number: int, size: int) -> bytes:
    """The message of this number: 8 bytes of number, then bytes that follow from it."""
    return _NUMBER.pack(number) + random.Random(number).randbytes(size - 8)


@lru_cache(8)
def messages_of(size: int, count: int) -> list[bytes]:
    """The first `count` messages."""
    return [pattern(number, size) for number in range(count)]


def expected_of(size: int, count: int, thorough: bool) -> list[Any]:
    """What to compare them with."""
    messages = messages_of(size, count)
    return list(messages) if thorough or size <= WHOLE else list(map(Ends, messages))


def complain(message: Any, expected: Any) -> None:
    """Say how a message is wrong."""
    number = _NUMBER.unpack(message[:8])[0] if len(message) >= 8 else "none"
    wanted = f"number {_NUMBER.unpack(expected[:8])[0]}" if isinstance(expected, bytes) else "another one"
    raise WrongMessage(f"a wrong message: {len(message)} bytes with number {number}; due was {wanted}")


# ---------------------------------------------------------------- the mechanisms


class Channel:
    """One direction of a mechanism. Made in the directing process, pickled to the measured ones.

    What the methods return is as bare as it can be, so that little but the mechanism is timed.
    """

    label = ""
    spins = True  # there is a poller
    awaits = False  # there is `awaited`
    shared = True  # several processes can send

    def sender(self, size: int) -> Callable[[bytes], Any]:
        """A function that sends one message."""
        raise NotImplementedError

    def receiver(self, size: int) -> Callable[[], Any]:
        """A function that waits for a message and returns it."""
        raise NotImplementedError

    def poller(self, size: int) -> Callable[[], Any]:
        """A function that returns a message, or None if none is there."""
        raise NotImplementedError

    def awaited(self, size: int) -> tuple[Callable[[bytes], Awaitable[None]], Callable[[], Awaitable[Any]]]:
        """For tasks of asyncio: what sends a message, and what waits for one and returns it."""
        raise NotImplementedError

    @classmethod
    def requests(cls, channels: Sequence[Channel], size: int) -> Iterator[Any]:
        """The messages of a server's clients, as they come. One shared channel, unless overridden."""
        return iter(channels[0].receiver(size), None)

    def close(self) -> None:
        """Give up this process's ends."""


class RingChannel(Channel):
    """A ring for each size of message."""

    label = "shmring"
    awaits = True

    def __init__(self, name: str, capacities: dict[int, int], writers: int = 1, **how: Any) -> None:
        self.rings: dict[int, Ring] = {}
        try:
            for size, capacity in capacities.items():
                self.rings[size] = Ring.create(f"{name}-{size}", capacity, writers=writers, **how)
        except BaseException:
            self.close()
            raise

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.rings[size].write

    def receiver(self, size: int) -> Callable[[], Any]:
        read = self.rings[size].read
        if size < LONG:
            return read
        buffer = bytearray(size)
        view = memoryview(buffer)
        return lambda: view[: read(buffer)]

    def poller(self, size: int) -> Callable[[], Any]:
        return self.rings[size].try_read

    def awaited(self, size: int) -> tuple[Callable[[bytes], Awaitable[None]], Callable[[], Awaitable[Any]]]:
        return self.rings[size].write_async, self.rings[size].read_async

    @classmethod
    def requests(cls, channels: Sequence[Any], size: int) -> Iterator[Any]:
        return iter(channels[0].rings[size])

    def file_bytes(self) -> int:
        """The memory that the rings' files take."""
        if sys.platform != "linux":
            raise NotImplementedError("they are no files")
        paths = [os.path.join(os_backend.DIRECTORY, os_backend.PREFIX + ring.name) for ring in self.rings.values()]
        return sum(os.stat(path).st_blocks * 512 for path in paths)

    def close(self) -> None:
        for ring in self.rings.values():
            ring.close()


class QueueChannel(Channel):
    """multiprocessing.Queue: a pickle for each message, and a thread that feeds a pipe."""

    label = "multiprocessing.Queue"
    spins = False

    def __init__(self) -> None:
        self._queue = SPAWN.Queue()

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self._queue.put

    def receiver(self, size: int) -> Callable[[], Any]:
        return self._queue.get

    def close(self) -> None:
        self._queue.close()


class PipeChannel(Channel):
    """multiprocessing.Pipe as it is by default (duplex), with send_bytes and recv_bytes."""

    label = "multiprocessing.Pipe"
    spins = shared = False

    def __init__(self) -> None:
        self.near, self.far = multiprocessing.Pipe()

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return self.near.send_bytes

    def receiver(self, size: int) -> Callable[[], Any]:
        return self.far.recv_bytes

    @classmethod
    def requests(cls, channels: Sequence[Any], size: int) -> Iterator[Any]:
        ends = [channel.far for channel in channels]
        while True:
            for end in connection.wait(ends):
                yield end.recv_bytes()  # type: ignore[union-attr]

    def close(self) -> None:
        self.near.close()
        self.far.close()


if sys.platform == "win32":

    class SocketChannel(Channel):
        """A TCP connection of 127.0.0.1: a stream without frames, so each message is received by its length."""

        label = "localhost socket"
        shared = False

        def __init__(self) -> None:
            self.stream = socket.socketpair()
            for end in self.stream:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def sender(self, size: int) -> Callable[[bytes], Any]:
            return self.stream[0].sendall

        def receiver(self, size: int) -> Callable[[], Any]:
            self.stream[1].setblocking(True)
            return filler(self.stream[1].recv_into, size)

        def poller(self, size: int) -> Callable[[], Any]:
            self.stream[1].setblocking(False)
            return unless_blocking(partial(self.stream[1].recv, size))

        @classmethod
        def requests(cls, channels: Sequence[Any], size: int) -> Iterator[Any]:
            return selected({channel.stream[1]: channel.receiver(size) for channel in channels})

        def close(self) -> None:
            for end in self.stream:
                end.close()

else:

    class SocketChannel(Channel):
        """A pair of Unix sockets: SOCK_SEQPACKET, and SOCK_STREAM for what is too long for one packet."""

        label = "Unix socket"
        shared = False

        def __init__(self) -> None:
            self.packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

        def sender(self, size: int) -> Callable[[bytes], Any]:
            return self.packets[0].send if size <= 1 << 16 else self.stream[0].sendall

        def receiver(self, size: int) -> Callable[[], Any]:
            if size <= 1 << 16:
                return partial(self.packets[1].recv, size)
            return filler(self.stream[1].recv_into, size)

        def poller(self, size: int) -> Callable[[], Any]:
            return unless_blocking(partial(self.packets[1].recv, size, socket.MSG_DONTWAIT))

        @classmethod
        def requests(cls, channels: Sequence[Any], size: int) -> Iterator[Any]:
            return selected({channel.packets[1]: channel.receiver(size) for channel in channels})

        def close(self) -> None:
            for end in (*self.packets, *self.stream):
                end.close()


def selected(receivers: dict[socket.socket, Callable[[], Any]]) -> Iterator[Any]:
    """What comes through these sockets, as it comes."""
    with selectors.DefaultSelector() as selector:
        for end, receive in receivers.items():
            selector.register(end, selectors.EVENT_READ, receive)
        while True:
            for key, _ in selector.select():
                yield key.data()


class RawPipeChannel(Channel):
    """os.pipe with os.write and os.read."""

    label = "os.pipe"
    spins = set_blocking is not None
    awaits = sys.platform != "win32"  # by add_reader

    def __init__(self) -> None:
        self._out, self._in = raw_pipe()

    def sender(self, size: int) -> Callable[[bytes], Any]:
        return partial(os.write, self._in.fileno())

    def receiver(self, size: int) -> Callable[[], Any]:
        fd = self._out.fileno()
        if set_blocking is not None:
            set_blocking(fd, True)
        return partial(os.read, fd, size) if size <= PIPE_BUF else filler(into_buffers(fd), size)

    def poller(self, size: int) -> Callable[[], Any]:
        assert set_blocking is not None
        fd = self._out.fileno()
        set_blocking(fd, False)
        return unless_blocking(partial(os.read, fd, size))

    def awaited(self, size: int) -> tuple[Callable[[bytes], Awaitable[None]], Callable[[], Awaitable[Any]]]:
        """As bare as it can be: one callback for all messages, which reads, and a future for each."""
        poll, write = self.poller(size), partial(os.write, self._in.fileno())
        waiting: list[asyncio.Future[Any]] = []

        def readable() -> None:
            if waiting:
                waiting.pop().set_result(poll())

        def receive() -> Awaitable[Any]:
            loop = asyncio.get_running_loop()
            if not waiting:
                loop.add_reader(self._out.fileno(), readable)
            waiting.append(loop.create_future())
            return waiting[0]

        async def send(message: bytes) -> None:
            write(message)

        return send, receive

    def close(self) -> None:
        self._out.close()
        self._in.close()


KINDS: Final[tuple[type[Channel], ...]] = (RingChannel, QueueChannel, PipeChannel, SocketChannel, RawPipeChannel)
LABELS: Final = tuple(kind.label for kind in KINDS)
OURS, *PEERS = LABELS
BATCHED: Final = f"{OURS}, batched"
ITERATED: Final = f"{OURS}, iterated"
VIEWED: Final = f"{OURS}, by view"
WAYS: Final = (OURS, BATCHED, ITERATED, VIEWED, *PEERS)  # to stream
CALLED: Final = (OURS, BATCHED, *PEERS)  # those of them that are measured in other parts too


def filler(read_into: Callable[[memoryview], int], size: int) -> Callable[[], bytearray]:
    """A receiver of long messages from a stream of bytes: fills the same buffer each time."""
    buffer = bytearray(size)
    view = memoryview(buffer)

    def receive() -> bytearray:
        got = 0
        while got < size:
            count = read_into(view[got:])
            if not count:
                raise EOFError("the other side is gone")
            got += count
        return buffer

    return receive


def unless_blocking(receive: Callable[[], bytes]) -> Callable[[], bytes | None]:
    """`receive`, but None instead of BlockingIOError."""

    def poll() -> bytes | None:
        try:
            return receive()
        except BlockingIOError:
            return None

    return poll


# ---------------------------------------------------------------- what the measured processes do

_channels: dict[str, Any] = {}  # by label; each job says what it expects there


def work(control: Any, channels: dict[str, Any]) -> None:
    """The life of a measured process: one job after another, until the directing process is gone."""
    _channels.update(channels)
    while True:
        try:
            function, args = control.recv()
        except EOFError:
            return
        end_after(math.ceil(LIMIT) * 2)  # should the directing process have been killed meanwhile
        try:
            answer = True, function(*args)
        except WrongMessage as error:
            answer = False, str(error)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        end_after(0)
        control.send(answer)


class Stream(NamedTuple):
    """A one-way stream: the first `length` messages of this `size`, `laps` times over."""

    label: str
    size: int
    way: str
    length: int
    laps: int
    thorough: bool


def stream_out(job: Stream) -> int:
    """Send a stream; returns when it began."""
    channel = _channels[job.label][0]
    messages = messages_of(job.size, job.length)
    if job.way == BATCHED:
        write_many = channel.rings[job.size].write_many
        start = clock()
        for _ in range(job.laps):
            write_many(messages)
        return start
    if job.way == VIEWED:
        reserve = channel.rings[job.size].reserve
        start = clock()
        for _ in range(job.laps):
            for message in messages:
                with reserve(job.size) as view:
                    view[:] = message
        return start
    send = channel.sender(job.size)
    start = clock()
    for _ in range(job.laps):
        for message in messages:
            send(message)
    return start


def stream_in(job: Stream) -> int:
    """Receive a stream and check it; returns when it ended."""
    channel = _channels[job.label][0]
    due = expected_of(job.size, job.length, job.thorough)
    if job.way == BATCHED:
        return batches_in(channel.rings[job.size].read_many, due, job.laps)
    if job.way == ITERATED:
        return iterated_in(iter(channel.rings[job.size]), due, job.laps)
    if job.way == VIEWED:
        borrow = channel.rings[job.size].borrow
        for _ in range(job.laps):
            for expected in due:
                with borrow() as view:
                    if view != expected:
                        complain(view, expected)
        return clock()
    receive = channel.receiver(job.size)
    for _ in range(job.laps):
        for expected in due:
            message = receive()
            if message != expected:
                complain(message, expected)
    return clock()


def iterated_in(messages: Iterator[bytes], due: list[Any], laps: int) -> int:
    for _ in range(laps):
        for expected, message in zip(due, messages):
            if message != expected:
                complain(message, expected)
    return clock()


def batches_in(read_many: Callable[[int], list[bytes]], due: list[Any], laps: int) -> int:
    most, at, left = len(due), 0, len(due) * laps
    due = due * 2
    while left:
        batch = read_many(min(left, most))
        if batch != due[at : at + len(batch)]:
            for message, expected in zip(batch, due[at:]):
                if message != expected:
                    complain(message, expected)
        at = (at + len(batch)) % most
        left -= len(batch)
    return clock()


def ping(label: str, size: int, mode: str, count: int) -> array[int]:
    """Send messages and wait for each to come back; the nanoseconds of the round trips."""
    if mode == "asyncio":
        return asyncio.run(ping_in_loop(label, size, count))
    forth, back = _channels[label]
    send, receive = forth.sender(size), (back.poller if mode == "spinning" else back.receiver)(size)
    samples = array("q")
    for message in itertools.islice(itertools.cycle(messages_of(size, BATCH[size])), count):
        start = clock()
        send(message)
        while (answer := receive()) is None:
            pass
        samples.append(clock() - start)
        if answer != message:
            complain(answer, message)
    return samples


def pong(label: str, size: int, mode: str, count: int) -> None:
    """Send back what `ping` sends."""
    if mode == "asyncio":
        return asyncio.run(pong_in_loop(label, size, count))
    forth, back = _channels[label]
    send, receive = back.sender(size), (forth.poller if mode == "spinning" else forth.receiver)(size)
    for expected in itertools.islice(itertools.cycle(messages_of(size, BATCH[size])), count):
        while (message := receive()) is None:
            pass
        send(message)
        if message != expected:
            complain(message, expected)


async def ping_in_loop(label: str, size: int, count: int) -> array[int]:
    forth, back = _channels[label]
    (send, _), (_, receive) = forth.awaited(size), back.awaited(size)
    samples = array("q")
    for message in itertools.islice(itertools.cycle(messages_of(size, BATCH[size])), count):
        start = clock()
        await send(message)
        answer = await receive()
        samples.append(clock() - start)
        if answer != message:
            complain(answer, message)
    return samples


async def pong_in_loop(label: str, size: int, count: int) -> None:
    forth, back = _channels[label]
    (_, receive), (send, _) = forth.awaited(size), back.awaited(size)
    for expected in itertools.islice(itertools.cycle(messages_of(size, BATCH[size])), count):
        message = await receive()
        await send(message)
        if message != expected:
            complain(message, expected)


def call(label: str, size: int, mode: str, count: int) -> None:
    """Send messages with pauses in which the reader falls asleep, each with the time of its sending."""
    send, rest = _channels[label][0].sender(size), pattern(0, size)[16:]
    for number in range(count):
        time.sleep(PAUSE)
        send(_STAMPED.pack(number, clock()) + rest)


def listen(label: str, size: int, mode: str, count: int) -> array[int]:
    """Receive what `call` sends; the nanoseconds that each message took."""
    receive, rest = _channels[label][0].receiver(size), pattern(0, size)[16:]
    samples = array("q")
    for number in range(count):
        message = receive()
        now = clock()
        came, sent = _STAMPED.unpack(message[:16])
        if came != number or message[16:] != rest:
            complain(message, _NUMBER.pack(number))
        samples.append(now - sent)
    return samples


def cpu_seconds() -> float:
    """What this process has used so far, user and system time of all its threads."""
    return time.process_time()


def idle(label: str) -> float:
    """Wait for one message; the CPU seconds it took."""
    receive = _channels[label][0].receiver(SMALL[0])
    before = cpu_seconds()
    message = receive()
    used = cpu_seconds() - before
    if message != pattern(0, SMALL[0]):
        complain(message, pattern(0, SMALL[0]))
    return used


def wake(seconds: float) -> None:
    """Leave everybody idle for a while, then send each a message."""
    time.sleep(seconds)
    for forth, _ in _channels.values():
        forth.sender(SMALL[0])(pattern(0, SMALL[0]))


class Talk(NamedTuple):
    """What a client has to tell: when it began and ended, and the nanoseconds of its requests."""

    start: int
    end: int
    samples: array[int]


def converse(send: Callable[[bytes], Any], receive: Callable[[], Any], client: int, count: int) -> Talk:
    """Send requests, and wait for the reply to each, which is to be the same."""
    samples, rest = array("q"), pattern(client, REQUEST)[16:]
    began = clock()
    for number in range(count):
        request = _STAMPED.pack(number, client) + rest
        start = clock()
        send(request)
        reply = receive()
        samples.append(clock() - start)
        if reply != request:
            complain(reply, request)
    return Talk(began, clock(), samples)


def answer(requests: Iterable[bytes], send: Sequence[Callable[[bytes], Any]], count: int) -> None:
    """Send each request back to the client whose number is in it."""
    for request in itertools.islice(requests, count):
        send[request[8]](request)


def be_client(label: str, client: int, count: int, start: int) -> Talk:
    requests, replies = _channels[label]
    send, receive = requests.sender(REQUEST), replies.receiver(REQUEST)
    time.sleep(max(0, start - clock()) / 1e9)
    return converse(send, receive, client, count)


def be_server(label: str, count: int) -> None:
    requests, replies = _channels[label]
    answer(type(requests[0]).requests(requests, REQUEST), [channel.sender(REQUEST) for channel in replies], count)


def lap_of(client: int, count: int) -> list[bytes]:
    """What a writer sends, over and over."""
    rest = pattern(client, REQUEST)[16:]
    return [_STAMPED.pack(number, client) + rest for number in range(count)]


def be_writer(label: str, way: str, client: int, count: int, lap: int, start: int) -> int:
    """Send so many messages as one of several writers, the first `lap` over and over; returns when it began."""
    requests, messages = _channels[label][0], lap_of(client, min(lap, count))
    send, most = requests.sender(REQUEST), BATCH[REQUEST]
    batches = [messages[at : at + most] for at in range(0, len(messages), most)]
    left = count
    time.sleep(max(0, start - clock()) / 1e9)
    began = clock()
    while left > 0:
        if way == BATCHED:
            for batch in batches:
                left -= requests.rings[REQUEST].write_many(batch[:left])
        else:
            for message in messages[:left]:
                send(message)
            left -= len(messages)
    return began


def be_reader_of(label: str, way: str, writers: int, count: int) -> int:
    """Receive what these writers send, each one lap of BATCH over and over; returns when it ended."""
    requests, left, lap = _channels[label][0], writers * count, min(count, BATCH[REQUEST])
    laps = [lap_of(client, lap) for client in range(writers)]
    done = [0] * writers
    if way == BATCHED:
        while left > 0:
            batch = requests[0].rings[REQUEST].read_many(BATCH[REQUEST])
            left -= len(batch)
            check_batch(batch, laps, done)
        end = clock()
    else:
        messages = itertools.islice(type(requests[0]).requests(requests, REQUEST), left)
        received = list(map(bytes, messages))  # a copy of what is received in one buffer, else the thing itself
        end = clock()
        for message in received:
            client = _STAMPED.unpack(message[:16])[1]
            if client >= writers or message != laps[client][done[client] % lap]:
                complain(message, pattern(0, REQUEST))
            done[client] += 1
    if done != [count] * writers:
        raise WrongMessage(f"messages of each writer: {done}; due were {count:,}")
    return end


def check_batch(batch: list[bytes], laps: list[list[bytes]], done: list[int]) -> None:
    """Is each message the next one of its writer? Those of one come together in batches: lists are compared quickly."""
    at = 0
    while at < len(batch):
        client = _STAMPED.unpack(batch[at][:16])[1]
        if client >= len(laps):
            complain(batch[at], pattern(0, REQUEST))
        lap = laps[client]
        due = lap[done[client] % len(lap) :][: len(batch) - at]
        same = len(due)
        if batch[at : at + same] != due:
            same = next(i for i, expected in enumerate(due) if batch[at + i] != expected)
            if not same:
                complain(batch[at], due[0])
        done[client] += same
        at += same


def join(audience: str) -> None:
    """Be a reader from now on."""
    _channels[audience].join()


def be_broadcaster(audience: str, way: str, count: int, start: int) -> int:
    """Send so many messages to all readers; returns how many nanoseconds that took."""
    ring, most = _channels[audience], BATCH[REQUEST]
    messages = messages_of(REQUEST, most)
    time.sleep(max(0, start - clock()) / 1e9)
    began = clock()
    for left in range(count, 0, -most):
        if way == BATCHED:
            ring.write_many(messages[:left])
        else:
            for message in messages[:left]:
                ring.write(message)
    return clock() - began


def be_one_of_all(audience: str, way: str, count: int) -> int:
    """Receive so many messages as one of several readers; returns how many of them were lost."""
    ring, most = _channels[audience], BATCH[REQUEST]
    due = messages_of(REQUEST, most) * 2
    seen = lost = 0
    while seen < count:
        try:
            if way == BATCHED:
                batch = ring.read_many(most)
                if batch != due[seen % most :][: len(batch)]:
                    raise WrongMessage("a broadcast message came twice, or in another order, or is another one")
                seen += len(batch)
            else:
                message = ring.read()
                if message != due[seen % most]:
                    complain(message, due[seen % most])
                seen += 1
        except MessagesLost as error:
            lost += error.count
            seen += error.count
    return lost


def be_one_of_crew(crew: str, way: str, count: int, before: int) -> tuple[int, array[int]]:
    """Take messages that others take too, until these writers' are all taken; returns when, and which.

    Each of the writers sends so many, and there were so many messages before.
    """
    channel = _channels[crew][0]
    received: list[bytes] = []
    if isinstance(channel, RingChannel):
        ring = channel.rings[REQUEST]
        stop = before + CREW * count
        while ring.stats().messages_out < stop:
            with contextlib.suppress(RingTimeout):
                if way == BATCHED:
                    while True:
                        received += ring.read_many(BATCH[REQUEST], timeout=LULL)
                else:
                    while True:
                        received.append(ring.read(timeout=LULL))
        end = clock() - int(LULL * 1e9)
    else:
        receive, ends = channel.receiver(REQUEST), 0
        while ends < CREW:
            message = receive()
            if message is None:
                ends += 1
            else:
                received.append(message)
        end = clock()
    taken = array("q")
    due = [0] * CREW
    for message in received:
        number, client = _STAMPED.unpack(message[:16])
        if client >= CREW or number < due[client] or message[16:] != pattern(client, REQUEST)[16:]:
            complain(message, pattern(0, REQUEST))
        due[client] = number + 1
        taken.append(number * CREW + client)
    return end, taken


def be_writer_and_end(crew: str, way: str, client: int, count: int, lap: int, start: int) -> int:
    """`be_writer`, of what is no ring: then tell each of the readers that this writer has written all."""
    began = be_writer(crew, way, client, count, lap, start)
    for _ in range(READERS):
        _channels[crew][0].sender(REQUEST)(None)
    return began


def rehearse(channel: RingChannel, count: int) -> None:
    """Do once, on a ring of its own that stays open, all that a server and a client do."""
    _channels["rehearsal"] = channel
    ring = channel.rings[REQUEST]
    converse(ring.write, ring.read, 0, count)
    ring.write(bytes(REQUEST))
    answer(ring, [ring.write], count)
    ring.read()
    with contextlib.suppress(RingTimeout):
        ring.read(timeout=0.01)
    gc.collect()


def connect(label: str, *channels: Any) -> None:
    """Keep these channels; a ring's were opened when they arrived."""
    _channels[label] = channels


# ---------------------------------------------------------------- directing them


class Worker(NamedTuple):
    """A measured process, and the pipe that its jobs go through."""

    process: Any
    control: Any  # a Connection


class Fleet:
    """Measured processes that are ended, whatever happens, when the `with` block is left."""

    def __init__(self) -> None:
        self._workers: list[Worker] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # they hold nothing that the kernel does not take back
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.control.close()

    def hire(self, channels: dict[str, Any]) -> Worker:
        """Start a process with these channels. Ctrl-C is for the directing one alone."""
        ours, theirs = multiprocessing.Pipe()
        process = SPAWN.Process(target=work, args=(theirs, channels), daemon=True)
        try:
            with without_ctrl_c():
                process.start()
                self._workers.append(Worker(process, ours))
        finally:
            theirs.close()
        return self._workers[-1]

    def run(self, *jobs: tuple[Any, ...]) -> list[Any]:
        """Have each job, ``(worker, function, *args)``, done at the same time; what the functions return."""
        for worker, function, *args in jobs:
            worker.control.send((function, args))
        answers: dict[Any, Any] = {}
        waiting: list[Any] = [worker.control for worker, *_ in jobs]
        ends = [worker.process.sentinel for worker in self._workers]
        deadline = time.monotonic() + LIMIT
        while waiting:
            ready: list[Any] = connection.wait([*waiting, *ends], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchError(f"no end after {LIMIT:g} seconds; was a message lost?")
            for control in ready:
                if control in ends:
                    raise BenchError("a measured process died")
                waiting.remove(control)
                try:
                    fine, answers[control] = control.recv()
                except EOFError:
                    raise BenchError("a measured process died") from None
                if not fine:
                    raise BenchError(answers[control])
        return [answers[worker.control] for worker, *_ in jobs]


_numbers = itertools.count()


def make(label: str, channels: contextlib.ExitStack, capacities: dict[int, int] = CAPACITY, writers: int = 1) -> Any:
    """Make a channel of a mechanism, which is closed with `channels`."""
    kind: Any = KINDS[LABELS.index(label)]
    args = (f"bench-{os.getpid()}-{next(_numbers)}", capacities, writers) if kind is RingChannel else ()
    channel = kind(*args)
    channels.callback(channel.close)
    return channel


class Run(NamedTuple):
    """One mechanism's turn in one round."""

    messages: int
    seconds: float
    cpu: float = 0.0
    samples: Sequence[float] = ()  # nanoseconds
    talks: Sequence[Talk] = ()
    parks: int = 0  # times that the ring's reader fell asleep
    lost: float = 0.0  # messages, to a reader
    share: float = 0.0  # of all messages, what that reader took who took the least


class Pair:
    """Two measured processes with a channel in each direction of each mechanism."""

    def __init__(self, fleet: Fleet, channels: contextlib.ExitStack) -> None:
        self._run = fleet.run
        links = {label: (make(label, channels), make(label, channels)) for label in LABELS}
        self._rings = links[OURS][0].rings
        self._left, self._right = fleet.hire(links), fleet.hire(links)

    def stream(self, size: int, way: str, messages: int, thorough: bool = False) -> Run:
        """Stream some `messages` from left to right."""
        length = messages if thorough else BATCH[size]
        job = Stream(way.partition(",")[0], size, way, length, max(1, round(messages / length)), thorough)
        end, start = self._run((self._right, stream_in, job), (self._left, stream_out, job))
        return Run(job.length * job.laps, (end - start) / 1e9)

    def stream_and_cpu(self, size: int, way: str, messages: int) -> Run:
        """`stream`, and the CPU seconds that both processes took for it."""
        both = (self._left, cpu_seconds), (self._right, cpu_seconds)
        before = self._run(*both)
        run = self.stream(size, way, messages)
        return run._replace(cpu=sum(self._run(*both)) - sum(before))

    def latency(self, label: str, size: int, mode: str, messages: int) -> Run:
        """One-way times of some `messages`."""
        stats, start = self._rings[size].stats, clock()
        parks = stats().reader_parks
        job = label, size, mode, messages
        if mode == "asleep":
            samples, _ = self._run((self._right, listen, *job), (self._left, call, *job))
        else:
            _, trips = self._run((self._right, pong, *job), (self._left, ping, *job))
            samples = [trip / 2 for trip in trips]
        return Run(messages, (clock() - start) / 1e9, samples=samples, parks=stats().reader_parks - parks)


class Office:
    """A server and its clients, each a process."""

    def __init__(self, fleet: Fleet, channels: contextlib.ExitStack) -> None:
        self._run = fleet.run
        self._channels = channels
        links = {label: self._links(label) for label in PEERS}
        self._server = fleet.hire(links)
        self._clients = [
            fleet.hire({label: self._of(client, link) for label, link in links.items()}) for client in range(CLIENTS)
        ]

    def _links(self, label: str, capacity: int = CLIENT_CAPACITY) -> tuple[list[Any], list[Any]]:
        """Channels for requests, one for all or one each, as the mechanism needs; and one each for replies."""
        size = {REQUEST: capacity}
        many = 1 if KINDS[LABELS.index(label)].shared else CLIENTS
        requests = [make(label, self._channels, size, CLIENTS) for _ in range(many)]
        return requests, [make(label, self._channels, size) for _ in range(CLIENTS)]

    def _of(self, client: int, link: tuple[list[Any], list[Any]]) -> tuple[Any, Any]:
        """The ends that one client needs."""
        requests, replies = link
        return requests[client % len(requests)], replies[client]

    def talk(self, label: str, messages: int) -> Run:
        """Some requests, as many from each client, all at the same time."""
        each = max(1, messages // CLIENTS)
        start = clock() + 10_000_000
        jobs = [(worker, be_client, label, client, each, start) for client, worker in enumerate(self._clients)]
        _, *talks = self._run((self._server, be_server, label, each * CLIENTS), *jobs)
        seconds = max(talk.end for talk in talks) - min(talk.start for talk in talks)
        return Run(each * CLIENTS, seconds / 1e9, talks=talks)

    def crowd(self, way: str, writers: int, messages: int) -> Run:
        """So many writers send to the server, as much each, all at the same time."""
        label, each = way.partition(",")[0], max(1, messages // writers)
        start = clock() + 10_000_000
        jobs = [
            (worker, be_writer, label, way, number, each, BATCH[REQUEST], start)
            for number, worker in enumerate(self._clients)
        ]
        end, *began = self._run((self._server, be_reader_of, label, way, writers, each), *jobs[:writers])
        return Run(each * writers, (end - min(began)) / 1e9)

    def _connect(self, link: tuple[list[Any], list[Any]]) -> None:
        jobs = [(worker, connect, OURS, *self._of(client, link)) for client, worker in enumerate(self._clients)]
        self._run((self._server, connect, OURS, *link), *jobs)

    def connect_wide_lanes(self, capacity: int) -> None:
        """Open rings with lanes for streams in the place of those with short ones."""
        self._connect(self._links(OURS, capacity))

    def connect_rings(self, rehearsals: int) -> dict[str, float]:
        """Open the rings and use them; by how many bytes the memory for each client grew, and where, if that is told.

        Everybody has used a ring before, which stays open: so neither the interpreter's memory for
        code that runs for the first time counts, nor is memory there that another ring gave back.
        """
        everybody = [self._server, *self._clients]
        stages = [make(OURS, self._channels, {REQUEST: CLIENT_CAPACITY}) for _ in everybody]
        self._run(*((worker, rehearse, stage, rehearsals) for worker, stage in zip(everybody, stages)))
        before = private_bytes(everybody)
        (requests,), replies = link = self._links(OURS)
        self._connect(link)
        self.talk(OURS, rehearsals * CLIENTS)
        self._run(*((worker, gc.collect) for worker in everybody))
        if not TELLS_MEMORY:
            return {}
        server, *clients = [late - early for late, early in zip(private_bytes(everybody), before)]
        files = requests.file_bytes() + sum(reply.file_bytes() for reply in replies)
        growth = {
            "the client's lane for requests": CLIENT_CAPACITY,
            "the lane of its ring for replies": CLIENT_CAPACITY,
            "the rest of the rings' files": files / CLIENTS - 2 * CLIENT_CAPACITY,
            "memory of the server's own": server / CLIENTS,
            "memory of the client's own": sum(clients) / CLIENTS,
        }
        growth["together"] = sum(growth.values())
        growth["beyond the lanes"] = growth["together"] - 2 * CLIENT_CAPACITY
        return growth


class Hall:
    """Writers and readers, each a process. One writer to one reader, or to all of a ring that broadcasts; some
    writers to one reader, or to several of which one gets each message."""

    AUDIENCES: Final[dict[str, tuple[int, dict[str, Any]]]] = {
        "1 reader": (1, {}),
        f"{READERS} readers": (READERS, {"readers": "broadcast"}),
        f"{READERS} readers that may lose": (READERS, {"readers": "broadcast", "lag": "drop"}),
    }
    CREWS: Final[dict[str, tuple[int, dict[str, Any] | None]]] = {
        "1 reader": (1, {}),
        f"{READERS} that compete": (READERS, {"readers": "compete"}),
        f"{READERS} of {QueueChannel.label}": (READERS, None),
    }

    def __init__(self, fleet: Fleet, channels: contextlib.ExitStack) -> None:
        self._run = fleet.run
        rings = {
            audience: channels.enter_context(
                Ring.create(f"bench-{os.getpid()}-{next(_numbers)}", CAPACITY[REQUEST], writers=1, **how)
            )
            for audience, (_, how) in self.AUDIENCES.items()
        }
        crews = {crew: (self._crew(channels, how),) for crew, (_, how) in self.CREWS.items()}
        self._sent = dict.fromkeys(crews, 0)
        # A crew is called as an audience may be.
        links = {**rings, **{f"crew, {crew}": channel for crew, channel in crews.items()}}
        workers = [fleet.hire(links) for _ in range(CREW + READERS)]
        self._writers, self._readers = workers[:CREW], workers[CREW:]
        for audience, (readers, _) in self.AUDIENCES.items():
            self._run(*((worker, join, audience) for worker in self._readers[:readers]))

    def broadcast(self, audience: str, way: str, messages: int) -> Run:
        """Send some `messages` to all of an audience; how long the writer took, and what was lost."""
        readers = self._readers[: self.AUDIENCES[audience][0]]
        start = clock() + 10_000_000
        jobs = [(worker, be_one_of_all, audience, way, messages) for worker in readers]
        took, *lost = self._run((self._writers[0], be_broadcaster, audience, way, messages, start), *jobs)
        return Run(messages, took / 1e9, lost=sum(lost) / len(readers))

    def _crew(self, channels: contextlib.ExitStack, how: dict[str, Any] | None) -> Channel:
        name = f"bench-{os.getpid()}-{next(_numbers)}"
        channel = QueueChannel() if how is None else RingChannel(name, {REQUEST: CAPACITY[REQUEST]}, CREW, **how)
        channels.callback(channel.close)
        return channel

    def compete(self, crew: str, way: str, messages: int) -> Run:
        """All writers send, together some `messages`, each of which one of the readers takes."""
        count, label = max(1, messages // CREW), f"crew, {crew}"
        size, how = self.CREWS[crew]
        start = clock() + 10_000_000
        be = be_writer_and_end if how is None else be_writer
        writing = [(worker, be, label, way, number, count, count, start) for number, worker in enumerate(self._writers)]
        jobs = [(worker, be_one_of_crew, label, way, count, self._sent[crew]) for worker in self._readers[:size]]
        done = self._run(*writing, *jobs)
        self._sent[crew] += CREW * count
        shares = [taken for _, taken in done[CREW:]]
        if sorted(itertools.chain(*shares)) != list(range(CREW * count)):
            raise WrongMessage("a message was taken twice, or by nobody")
        seconds = (max(end for end, _ in done[CREW:]) - min(done[:CREW])) / 1e9
        return Run(CREW * count, seconds, share=min(map(len, shares)) / count / CREW)


def private_bytes(workers: Sequence[Worker]) -> list[int]:
    """What each takes without shared memory: its share (PSS) of anonymous pages and of files. Empty if not told."""
    found = []
    for worker in workers if TELLS_MEMORY else ():
        with open(f"/proc/{worker.process.pid}/smaps_rollup") as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Pss")}
        found.append(sizes["Pss_Anon"] + sizes["Pss_File"] if "Pss_Anon" in sizes else sizes["Pss"])
    return found


# ---------------------------------------------------------------- results, and how they are told


class Result(NamedTuple):
    """A figure: of each round, and what else is known."""

    part: str
    case: str
    who: str
    unit: str
    rounds: list[float]
    more: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


Columns = dict[str, Callable[[Result], str]]


class Progress:
    """Says on stderr what goes on: in one line on a terminal, else in a line for each case."""

    def __init__(self) -> None:
        self.doing = "start"
        self._tty = sys.stderr.isatty()
        self._case = ""

    def show(self, case: str, detail: str = "") -> None:
        self.doing = f"{case}: {detail}" if detail else case
        if self._tty:
            print(f"\r{ERASE}{self.doing[:78]}", end="", file=sys.stderr, flush=True)
        elif case != self._case:
            print(f"measuring {case}", file=sys.stderr, flush=True)
        self._case = case

    def clear(self) -> None:
        if self._tty:
            print(f"\r{ERASE}", end="", file=sys.stderr, flush=True)


class Bench:
    """One run: its scale, its results, and where they are told."""

    def __init__(self, scale: Scale, out: Any) -> None:
        self.scale = scale
        self.results: list[Result] = []
        self.progress = Progress()
        self._out = out

    def say(self, *lines: str) -> None:
        """Print lines, and an empty one."""
        self.progress.clear()
        print(*lines, "", sep="\n", file=self._out, flush=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], *notes: str) -> None:
        """Print columns, the first aligned left and the others right."""
        lines = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        widths[0] = max(widths[0], 32)
        cells = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        self.say(*("  ".join(row).rstrip() for row in cells), *notes)

    def show(self, part: str, case: str, everybody: Iterable[str], columns: Columns, *notes: str) -> None:
        """Print a case's results, a line for each mechanism."""
        found = [(who, self.find(part, case, who)) for who in everybody]
        rows = [[f"  {who}", *(cell(result) if result else "-" for cell in columns.values())] for who, result in found]
        self.table([case, *columns], rows, *notes)

    def note(self, part: str, case: str, who: str, unit: str, rounds: Iterable[float], **more: Any) -> None:
        """Keep a result."""
        self.results.append(Result(part, case, who, unit, list(rounds), more))

    def find(self, part: str, case: str, who: str) -> Result | None:
        """The result of this part, case and mechanism, if it was measured."""
        return next((result for result in self.results if result[:3] == (part, case, who)), None)

    def gain(self, result: Result, way: str = OURS) -> float | None:
        """How many times better than this peer's result shmring's is: a higher rate, or less of something."""
        ours = self.find(result.part, result.case, way)
        if ours is None or result.who.startswith(OURS) or not ours.median or not result.median:
            return None
        return ours.median / result.median if result.unit.endswith("/s") else result.median / ours.median

    def gain_cell(self, result: Result, way: str = OURS) -> str:
        gain = self.gain(result, way)
        return "" if gain is None else f"{digits(gain)}x"

    def rounds(
        self, case: str, ways: Mapping[str, Callable[[int], Run]], seconds: float, most: int = 1 << 40
    ) -> dict[str, list[Run]]:
        """Let each way have its turn in each round, with as many messages as it does in `seconds`.

        Two rounds that do not count come first, a tiny and a short one, to find out how many that are.
        """
        counts = dict.fromkeys(ways, min(100, self.scale.checked))
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for number in range(-1, self.scale.rounds + 1):
            for way, measure in ways.items():
                self.progress.show(case, f"round {max(number, 0)} of {self.scale.rounds}, {way}")
                run = measure(counts[way])
                aim = seconds if number >= 0 else seconds / 10
                counts[way] = max(10, min(most, int(run.messages / run.seconds * aim)))
                if number > 0:
                    runs[way].append(run)
        return runs


def digits(number: float) -> str:
    """Three significant digits, or more before the point."""
    if number >= 99.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}" if number >= 0.0995 else f"{number:.2g}"


def rate(number: float) -> str:
    """So many a second."""
    return f"{digits(number / 1e6)} M" if number >= 1e6 else f"{digits(number / 1e3)} k"


def bytes_of(size: int) -> str:
    """64 B, 32 KiB, 1 MiB."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


def figure(name: str, shown: Callable[[float], str] = digits) -> Columns:
    """The columns of a median and its range."""

    def spread(result: Result) -> str:
        return f"{shown(min(result.rounds))}..{shown(max(result.rounds))}" if len(result.rounds) > 1 else "-"

    return {name: lambda result: shown(result.median), "min..max": spread}


def further(*names: str) -> Columns:
    """Columns of what else is known."""
    return {name: lambda result, name=name: digits(result.more[name]) for name in names}  # type: ignore[misc]


def tail(samples: Iterable[Sequence[float]]) -> dict[str, float]:
    """What all these samples together do not, or seldom, exceed; in microseconds."""
    ordered = sorted(itertools.chain.from_iterable(samples))
    return {name: ordered[math.ceil(share * len(ordered)) - 1] / 1e3 for name, share in TAIL.items()}


# ---------------------------------------------------------------- the parts


def run_latency(bench: Bench, pair: Pair) -> None:
    """How long one message takes."""
    bench.say(
        "LATENCY, one way, in microseconds: p50 of each round, their median and range; beyond it, of all rounds",
        "together. Spinning, blocking, asyncio (tasks on both sides): half of a round trip. Asleep: the reader gets",
        f"a pause to fall asleep in before each message ({PAUSE * 1e3:g} ms), from before sending to after receiving.",
    )
    for mode, size in itertools.product(MODES, SMALL):
        case = f"{bytes_of(size)}, {mode}"
        needs = {"spinning": "spins", "asyncio": "awaits"}.get(mode, "label")
        labels = [kind.label for kind in KINDS if getattr(kind, needs)]
        ways = {label: partial(pair.latency, label, size, mode) for label in labels}
        runs = bench.rounds(case, ways, bench.scale.seconds, MOST_SAMPLES)
        for label in labels:
            samples = [run.samples for run in runs[label]]
            p50s = [tail([of_one])["p50"] for of_one in samples]
            more = {**tail(samples), "samples": sum(map(len, samples)), **about(label, size)}
            bench.note("latency", case, label, "us", p50s, **more)
        note = f"  shmring: rings of {bytes_of(CAPACITY[size])}"
        if mode == "asleep":
            found = sum(min(run.parks, run.messages) for run in runs[OURS])
            note += f"; {found:,} of {sum(run.messages for run in runs[OURS]):,} messages found the reader asleep"
        columns = {**figure("p50"), **further("p99", "p99.9", "max"), "gain": bench.gain_cell}
        bench.show("latency", case, labels if mode == "asyncio" else LABELS, columns, note)


def about(label: str, size: int) -> dict[str, int]:
    """What belongs to every result about messages of this size."""
    ring = {"capacity": CAPACITY[size], "batch": BATCH[size]} if label.startswith(OURS) else {}
    return {"size": size, **ring}


def run_throughput(bench: Bench, pair: Pair) -> None:
    """How many messages pass in a second."""
    bench.say(
        "THROUGHPUT, one writer to one reader, in messages a second. Batched: write_many and read_many; iterated:",
        "write, and `for message in ring`; by view: reserve, one copy into it, borrow; all else is a call for each",
        "message. Gains: of shmring with a call for each message, batched, and by view, over the peer.",
    )
    for size in SIZES:
        case = bytes_of(size)
        ways = [way for way in WAYS if {ITERATED: size == SIZES[0], VIEWED: size > WHOLE}.get(way, True)]
        checked = max(4, min(bench.scale.checked, (1 << 23) // size))
        for way in ways:
            bench.progress.show(case, f"every byte, {way}")
            pair.stream(size, way, checked, thorough=True)
        runs = bench.rounds(case, {way: partial(pair.stream, size, way) for way in ways}, bench.scale.seconds)
        for way in ways:
            rates = [run.messages / run.seconds for run in runs[way]]
            more = {"GB/s": statistics.median(rates) * size / 1e9, "checked": checked, **about(way, size)}
            bench.note("throughput", case, way, "messages/s", rates, **more)
        columns = {**figure("messages/s", rate), **further("GB/s"), "gain": bench.gain_cell}
        columns["batched"] = lambda result: bench.gain_cell(result, BATCHED)
        if VIEWED in ways:
            columns["by view"] = lambda result: bench.gain_cell(result, VIEWED)
        note = f"  shmring: a ring of {bytes_of(CAPACITY[size])}, batches of {BATCH[size]:,}"
        bench.show("throughput", case, ways, columns, f"{note}; of each, every byte of {checked:,} messages checked")


def run_clients(bench: Bench, office: Office, growth: dict[str, float]) -> None:
    """Some clients ask one server, all at the same time."""
    bench.say(
        f"CLIENTS, {CLIENTS} of one server: each sends {REQUEST} B and waits for the same as a reply, over and over.",
        "Replies a second, to all together; microseconds from request to reply. shmring: one ring for all",
        f"requests, a ring each for replies, lanes of {bytes_of(CLIENT_CAPACITY)}. Gain: of the rate.",
    )
    case = f"{CLIENTS} clients"
    runs = bench.rounds(case, {label: partial(office.talk, label) for label in LABELS}, bench.scale.clients_seconds)
    for label in LABELS:
        each = [of_client(talks) for talks in zip(*(run.talks for run in runs[label]))]
        rates = [client["rate"] for client in each]
        more: dict[str, Any] = tail(talk.samples for run in runs[label] for talk in run.talks)
        more.update({"slowest/fastest": min(rates) / max(rates), "clients": each, "size": REQUEST})
        more.update({"capacity": CLIENT_CAPACITY} if label == OURS else {})
        bench.note("clients", case, label, "replies/s", [run.messages / run.seconds for run in runs[label]], **more)
    columns = {**figure("replies/s", rate), **further("p50", "p99", "slowest/fastest"), "gain": bench.gain_cell}
    bench.show("clients", case, LABELS, columns)
    show_each_client(bench, case)
    if not growth:
        bench.say("memory for each client, shmring: not measured, for the system does not tell it")
        return
    bench.note("clients", "memory", OURS, "B/client", [growth["beyond the lanes"]], **growth)
    rows = [[f"  {what}", digits(size / 1e3)] for what, size in growth.items()]
    bench.table(["memory for each client, shmring", "KB of 1,000"], rows, "  files: st_blocks; own: growth of the PSS")


def run_writers(bench: Bench, office: Office) -> None:
    """One reader of some writers, who do nothing but write."""
    size = CAPACITY[REQUEST]
    office.connect_wide_lanes(size)
    bench.say(f"WRITERS, messages of {REQUEST} B a second to one reader; shmring: a lane of {bytes_of(size)} each.")
    for writers in (1, CLIENTS):
        case = f"{writers} writer{'s' * (writers > 1)}"
        runs = bench.rounds(case, {way: partial(office.crowd, way, writers) for way in CALLED}, bench.scale.seconds)
        for way in CALLED:
            rates = [run.messages / run.seconds for run in runs[way]]
            bench.note("writers", case, way, "messages/s", rates, size=REQUEST, capacity=size)
        columns = {**figure("messages/s", rate), "gain": bench.gain_cell}
        bench.show("writers", case, CALLED, {**columns, "batched": lambda result: bench.gain_cell(result, BATCHED)})


def run_readers(bench: Bench, hall: Hall) -> None:
    """One writer to several readers, of which each gets all."""
    bench.say(
        f"READERS, messages of {REQUEST} B a second that a writer writes for one reader, and for {READERS} of which",
        f"each gets all: it waits for the slowest, or (may lose) for nobody. A lane of {bytes_of(CAPACITY[REQUEST])}.",
    )
    for way in (OURS, BATCHED):
        case = way.partition(", ")[2] or "a call each"
        ways = {audience: partial(hall.broadcast, audience, way) for audience in Hall.AUDIENCES}
        runs = bench.rounds(case, ways, bench.scale.seconds)
        for audience in ways:
            rates = [run.messages / run.seconds for run in runs[audience]]
            lost = sum(run.lost for run in runs[audience]) / sum(run.messages for run in runs[audience])
            bench.note("readers", case, audience, "messages/s", rates, lost=lost, size=REQUEST)
        columns: Columns = {"% lost": lambda result: digits(result.more["lost"] * 100)}
        bench.show("readers", case, list(ways), {**figure("messages/s", rate), **columns})
    bench.say(
        f"WORK QUEUE, messages of {REQUEST} B a second that {CREW} writers write and one reader, or {READERS}, take;",
        "the least is the share of the reader that got the fewest.",
    )
    for way in (OURS, BATCHED):
        case = f"queue, {way.partition(', ')[2] or 'a call each'}"
        crews = [crew for crew, (_, how) in Hall.CREWS.items() if way == OURS or how is not None]
        runs = bench.rounds(case, {crew: partial(hall.compete, crew, way) for crew in crews}, bench.scale.seconds)
        for crew in crews:
            rates = [run.messages / run.seconds for run in runs[crew]]
            least = statistics.median(run.share for run in runs[crew])
            bench.note("readers", case, crew, "messages/s", rates, least=least, size=REQUEST)
        columns = {"least": lambda result: f"{digits(result.more['least'] * 100)} %"}
        bench.show("readers", case, crews, {**figure("messages/s", rate), **columns})


def of_client(talks: Sequence[Talk]) -> dict[str, float]:
    """One client's figures, of all rounds together."""
    more = tail(talk.samples for talk in talks)
    seconds = sum(talk.end - talk.start for talk in talks) / 1e9
    return {"p50": more["p50"], "p99": more["p99"], "rate": sum(len(talk.samples) for talk in talks) / seconds}


def show_each_client(bench: Bench, case: str) -> None:
    results = [result for result in bench.results if result[:2] == ("clients", case)]
    rows = [
        [f"  client {client + 1}", *(f"{digits(each['p50'])} {digits(each['p99'])}" for each in of_all)]
        for client, of_all in enumerate(zip(*(result.more["clients"] for result in results)))
    ]
    bench.table(["p50 and p99 of each", *(result.who.replace("multiprocessing", "mp") for result in results)], rows)


def run_cpu(bench: Bench, pair: Pair, fleet: Fleet, channels: contextlib.ExitStack) -> None:
    """What a message costs, and what waiting costs."""
    bench.say("CPU, user and system time: of both processes for a stream, of a reader without a message")
    size = SIZES[0]
    case = f"{bytes_of(size)}, seconds per million"
    runs = bench.rounds(case, {way: partial(pair.stream_and_cpu, size, way) for way in CALLED}, bench.scale.seconds)
    for way in CALLED:
        costs = [run.cpu / run.messages * 1e6 for run in runs[way]]
        bench.note("cpu", case, way, "s/million", costs, **about(way, size))
    bench.show("cpu", case, CALLED, {**figure("CPU"), "gain": bench.gain_cell})
    seconds = bench.scale.idle
    case = "2 idle seconds, milliseconds" + (f" (from {seconds:g} s)" if seconds != 2 else "")
    bench.progress.show(case)
    links = {label: (make(label, channels, {size: CAPACITY[size]}), None) for label in LABELS}
    idlers = [(fleet.hire({label: links[label]}), idle, label) for label in LABELS]
    used = fleet.run(*idlers, (fleet.hire(links), wake, seconds))
    for label, cpu in zip(LABELS, used):
        bench.note("cpu", case, label, "ms", [cpu * 1e3 * 2 / seconds], seconds=seconds, **about(label, size))
    bench.show("cpu", case, LABELS, figure("CPU"))


class Goal(NamedTuple):
    """What shmring is to reach: at least, or (`less`) under, `asked`."""

    what: str
    measured: float
    unit: str
    asked: float
    less: bool

    @property
    def met(self) -> bool:
        return self.measured < self.asked if self.less else self.measured >= self.asked


def goals(bench: Bench) -> list[Goal]:
    """Those of which the figures were measured."""
    found = []
    for mode, asked in (("blocking", 3.5), ("spinning", 0.9)):
        latency = bench.find("latency", f"64 B, {mode}", OURS)
        if latency:
            found.append(Goal(f"latency, 64 B, {mode}, p50", latency.median, "us", asked, True))
    ratios = [
        ("latency", "64 B, asyncio", OURS, "os.pipe", 1 / 1.5),
        ("throughput", "64 B", OURS, "multiprocessing.Queue", 25),
        ("throughput", "64 B", OURS, "multiprocessing.Pipe", 7),
        ("throughput", "64 B", OURS, "os.pipe", 1.5),
        ("throughput", "64 B", BATCHED, "os.pipe", 9),
        ("throughput", "1 KiB", OURS, "os.pipe", 2),
        ("throughput", "64 KiB", OURS, "os.pipe", 7),
        ("throughput", "64 KiB", VIEWED, "os.pipe", 10),
        ("throughput", "1 MiB", OURS, SocketChannel.label, 3.5),
        ("throughput", "1 MiB", VIEWED, SocketChannel.label, 4.5),
    ]
    for part, case, way, peer, asked in ratios:
        result = bench.find(part, case, peer)
        if result:
            how = way.partition(", ")[2] or "a call each"
            found.append(Goal(f"{case}, {how}, to {peer}", bench.gain(result, way) or 0, "x", asked, False))
    one, ten = (bench.find("writers", case, OURS) for case in ("1 writer", f"{CLIENTS} writers"))
    batched = bench.find("writers", f"{CLIENTS} writers", BATCHED)
    if one and ten and batched:
        found.append(Goal(f"{CLIENTS} writers, to one of them", ten.median / one.median, "x", 0.85, False))
        found.append(Goal(f"{CLIENTS} writers, batched", batched.median / 1e6, "M/s", 5, False))
    for case, audience in itertools.product(("a call each", "batched"), list(Hall.AUDIENCES)[1:]):
        one, all_ = bench.find("readers", case, "1 reader"), bench.find("readers", case, audience)
        if one and all_:
            found.append(Goal(f"{audience}, {case}, to one", all_.median / one.median, "x", 0.75, False))
    crews = list(Hall.CREWS)
    one, four, queue = (bench.find("readers", "queue, a call each", crew) for crew in crews)
    together = bench.find("readers", "queue, batched", crews[1])
    if one and four and queue and together:
        found.append(Goal(f"{crews[1]}, to one", four.median / one.median, "x", 0.5, False))
        found.append(Goal(f"{crews[1]}, to {crews[2]}", four.median / queue.median, "x", 5, False))
        found.append(Goal(f"{crews[1]}, batched", together.median / 1e6, "M/s", 2, False))
    memory = bench.find("clients", "memory", OURS)
    if memory:
        found.append(Goal("a client's memory beyond the lanes", memory.median / 1e3, "KB", 38, True))
    return found


def show_goals(bench: Bench) -> None:
    rows = [
        [
            f"  {goal.what}",
            f"{digits(goal.measured)} {goal.unit}",
            f"{'under' if goal.less else 'at least'} {goal.asked:.2g}",
            "met" if goal.met else "not met here",
        ]
        for goal in goals(bench)
    ]
    if rows:
        bench.table(["GOALS", "measured", "asked", ""], rows)


# ---------------------------------------------------------------- the environment, JSON and the picture


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    with Ring.create(f"bench-{os.getpid()}-backend", 1, writers=1) as ring:
        ring.write(b"")  # only then it is known what the kernel grants
        backend = ring.backend
    return {
        "shmring": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": "on" if getattr(sys, "_is_gil_enabled", lambda: True)() else "off",
        **system(),
        "cpu": cpu_model(),
        "cores": os_backend.processors(),
        "backend": backend,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def describe(env: dict[str, Any]) -> list[str]:
    """The environment in two lines, and what is to be known about its figures."""
    wine = f", under Wine {env['wine']}" if "wine" in env else ""
    return [
        f"shmring {env['shmring']} ({env['backend']}); {env['python']}, GIL {env['gil']}{wine}",
        f"{env['system']}; {env['cpu']}, cores: {env['cores']}; {env['date']}",
        *env.get("remarks", ()),
    ]


def as_json(bench: Bench, env: dict[str, Any]) -> str:
    """Everything that was measured."""
    results = []
    for result in bench.results:
        summary = {"median": result.median, "min": min(result.rounds), "max": max(result.rounds)}
        results.append({**result._asdict(), **summary, "gain": bench.gain(result)})
    reached = [{**goal._asdict(), "met": goal.met} for goal in goals(bench)]
    everything = {"environment": env, "scale": bench.scale._asdict(), "results": results, "goals": reached}
    return json.dumps(everything, indent=1)


PALETTE: Final = ("#d1480a", "#f0a070", "#f7cbb0", "#b0752a", "#8a6fb0", "#4c86c6", "#3f9e8f", "#8c8c8c")
WIDTH, LEFT, RIGHT, BAR = 900, 130, 730, 15  # the picture's width, where bars begin and end at most, a bar's height


def as_svg(bench: Bench, env: dict[str, Any]) -> str:
    """One picture of latency and throughput. It brings its own background, so that it can lie on any."""
    body: list[str] = []
    lines = describe(env)
    legend = 54 + 17 * len(lines)
    bottom = draw_panel(
        body, legend + 36, [result for result in bench.results if result.part == "latency"],
        "Latency of one message, one way: median in microseconds (log scale; shorter is better)", "",
    )  # fmt: skip
    bottom = draw_panel(
        body, bottom, [result for result in bench.results if result.part == "throughput"],
        "Throughput, one writer to one reader: messages per second (log scale; longer is better)", "/s",
    )  # fmt: skip
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222222">',
        "<title>shmring beside what the standard library has</title>",
        f'<rect width="{WIDTH}" height="{bottom}" rx="8" fill="#ffffff"/>',
        words(20, 32, "shmring: messages between two Python processes", 'font-size="18" font-weight="bold"'),
        *(words(20, 54 + 17 * row, line, 'fill="#555555"') for row, line in enumerate(lines)),
    ]
    drawn, x = {result.who for result in bench.results}, 20.0
    for color, who in zip(PALETTE, WAYS):
        if who in drawn:
            head.append(f'<rect x="{x:.0f}" y="{legend}" width="11" height="11" fill="{color}"/>')
            head.append(words(x + 16, legend + 10, who))
            x += 32 + 6.4 * len(who)
    return "\n".join([*head, *body, "</svg>", ""])


def words(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(text)}</text>'


def draw_panel(body: list[str], top: int, results: list[Result], title: str, unit: str) -> int:
    """Add a title, a scale, and a group of bars for each case; returns where it ends."""
    if not results:
        return top
    medians = [result.median for result in results]
    low = math.floor(math.log10(min(medians)) - 0.1)  # the decades of the scale
    high = math.ceil(math.log10(max(medians)))
    place = {decade: LEFT + (RIGHT - LEFT) * (decade - low) / (high - low) for decade in range(low, high + 1)}
    y, bars = top + 42, []
    for case, group in itertools.groupby(results, key=lambda result: result.case):
        bars.append(words(LEFT - 8, y + BAR - 4, case, 'text-anchor="end" font-weight="bold"'))
        for result in group:
            end = LEFT + (RIGHT - LEFT) * (math.log10(result.median) - low) / (high - low)
            color = PALETTE[WAYS.index(result.who)]
            bars.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{color}"/>')
            value = digits(result.median)
            if unit:
                value = f"{rate(result.median)}{unit}, {digits(result.more['GB/s'])} GB/s"
            bars.append(words(end + 5, y + BAR - 4, value, 'font-size="11"'))
            y += BAR
        y += 10
    body.append(words(20, top + 14, title, 'font-weight="bold"'))
    for decade, x in place.items():
        body.append(f'<line x1="{x:.1f}" y1="{top + 38}" x2="{x:.1f}" y2="{y - 8}" stroke="#dddddd"/>')
        label = rate(10.0**decade).replace(".00", "").replace(".0", "") if unit else f"{10.0**decade:g}"
        body.append(words(x, top + 34, label, 'text-anchor="middle" font-size="11" fill="#555555"'))
    body += bars
    return y + 14


# ---------------------------------------------------------------- the command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.bench",
        description=f"Measure shmring beside {', '.join(PEERS[:-2])}, a {PEERS[-2]} and {PEERS[-1]}. "
        "Exit code 1: a message was wrong or lost, or a process failed.",
    )
    scale = parser.add_mutually_exclusive_group()
    scale.set_defaults(scale=NORMAL)
    rough = "take some 15 seconds instead of 60, for rough figures"
    scale.add_argument("--quick", dest="scale", action="store_const", const=QUICK, help=rough)
    scale.add_argument("--smoke", dest="scale", action="store_const", const=SMOKE, help=argparse.SUPPRESS)
    only = f"measure only some of: {', '.join(PARTS)}"
    parser.add_argument("--only", type=parts, default=PARTS, metavar="PART,...", help=only)
    parser.add_argument("--repeat", type=positive, metavar="N", help="rounds, of which the medians are printed")
    parser.add_argument("--json", type=target, metavar="FILE", help="write everything as JSON; - is stdout")
    parser.add_argument("--svg", type=target, metavar="FILE", help="draw latency and throughput; - is stdout")
    options = parser.parse_args(arguments)
    if options.json == options.svg == "-":
        parser.error("--json and --svg cannot both go to stdout")
    if options.svg and not {"latency", "throughput"} & set(options.only):
        parser.error("--svg draws latency and throughput; --only leaves out both")
    if options.repeat:
        options.scale = options.scale._replace(rounds=options.repeat)
    return options


def parts(text: str) -> list[str]:
    """An argument of --only."""
    chosen = [word.strip() for word in text.split(",")]
    for word in chosen:
        if word not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {word!r}; choose from {', '.join(PARTS)}")
    return chosen


def positive(text: str) -> int:
    """An argument of --repeat."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number from 1 on, not {text!r}")
    return int(text)


def target(path: str) -> str:
    """A file to write to; better to know now that it cannot be than after a minute."""
    if path != "-" and (os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK)):
        raise argparse.ArgumentTypeError(f"cannot write to {path!r}")
    return path


def measure(bench: Bench, only: Sequence[str]) -> None:
    """Measure these parts. Whatever happens: first the processes end, then the channels go."""
    if set(only) - {"clients", "writers", "readers"}:
        with contextlib.ExitStack() as channels, Fleet() as fleet:
            pair = Pair(fleet, channels)
            if "latency" in only:
                run_latency(bench, pair)
            if "throughput" in only:
                run_throughput(bench, pair)
            if "cpu" in only:
                run_cpu(bench, pair, fleet, channels)
    if {"clients", "writers"} & set(only):
        with contextlib.ExitStack() as channels, Fleet() as fleet:
            bench.progress.show("clients", "starting them")
            office = Office(fleet, channels)
            growth = office.connect_rings(bench.scale.checked)
            if "clients" in only:
                run_clients(bench, office, growth)
            if "writers" in only:
                run_writers(bench, office)
    if "readers" in only:
        with contextlib.ExitStack() as channels, Fleet() as fleet:
            bench.progress.show("readers", "starting them")
            run_readers(bench, Hall(fleet, channels))
    show_goals(bench)


def write(path: str, content: str) -> None:
    """Write an output file, or to stdout."""
    if path == "-":
        print(content)
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parse(arguments)
    bench = Bench(options.scale, sys.stderr if "-" in (options.json, options.svg) else sys.stdout)
    try:
        env = environment()
        bench.say(*describe(env))
        measure(bench, options.only)
    except KeyboardInterrupt:
        bench.progress.clear()
        return 130
    except (BenchError, OSError, EOFError) as error:
        bench.progress.clear()
        print(f"failed at {bench.progress.doing}: {error}", file=sys.stderr)
        return 1
    if options.json:
        write(options.json, as_json(bench, env))
    if options.svg:
        write(options.svg, as_svg(bench, env))
    return 0


if __name__ == "__main__":
    sys.exit(main())
