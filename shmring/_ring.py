"""`Ring`: what a caller sees, the waiting, and the life of a handle.

How messages move is in `_words`. A handle has a `Writer` and a `Reader`, each a monitor that
one thread enters at a time and that never waits; so everything that waits is here, outside of them.
"""

from __future__ import annotations

import atexit
import errno
import gc
import sys
import time
import types
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

from . import _layout
from ._backend import Segment, os_backend
from ._competing import CompetingReader
from ._errors import MessageTooLarge, RingClosed, RingError, RingTimeout, naming
from ._lanes import PACKED
from ._looking import joined_slots, survey
from ._monitor import BUSY, Monitor, MonitorClosed, no_steps
from ._parking import Parking
from ._reading import Reader
from ._requests import (
    RESERVED,
    Borrow,
    Gather,
    GiveBack,
    ReadBatch,
    ReadOne,
    ReadRequest,
    Reserve,
    WriteBatch,
    WriteRequest,
)
from ._writing import Writer

if TYPE_CHECKING:
    from ._loop import Watch

    if sys.version_info >= (3, 12):
        from collections.abc import Buffer
    else:
        from typing import Any as Buffer

# Seconds that a handle spins before it parks, where there is more than one processor: about what falling
# asleep and being woken costs on a virtual machine, so that a wait costs at most twice the best choice.
SPIN: Final = 100e-6
# Seconds of it that it spins without a pause. From then on it yields the processor after each look, because
# the other side may be waiting for this very processor.
TIGHT: Final = 5e-6
# Looks that the reader's steps take at a time meanwhile: to go round for each makes a tenth of a message's latency.
# Not longer, because a signal handler that comes in the middle of the steps cannot use the handle.
LOOKS: Final = range(32)
# A writer that finds its lane full waits at first for this share of it to be free: for the room of one message it would
# have to be woken, and its reader to wake it, with each message. But no longer than so many seconds: then for what it
# needs. It is never more than what is free when the reader has taken everything, and the reader rings before it parks.
ROOM: Final = 4
PATIENCE: Final = 0.01
MOURNING: Final = 0.1  # seconds after which who waits for several readers looks whether one has died
GATHERED: Final = 16384  # bytes; a shorter message of several buffers is quicker joined, and written as one of one
AT_ONCE: Final = 64  # messages after which a task that never has to wait for room lets the others run
ONE: Final = str, bytes, bytearray, memoryview  # no sequence of messages, though one can iterate over it
OPEN_AGAIN: Final = 0.002  # seconds between two tries of `open` with a timeout, or two looks for somebody to come

_open_rings: dict[int, weakref.ref[Ring]] = {}
_hooks: set[str] = set()  # that are set
_NOBODY: Final = Monitor(no_steps)
_NOBODY.close()


class _Spin:
    """How long to look again and again before going to sleep: as long as it has paid lately.

    Each time in vain halves it, down to nothing; each sixteenth wait tries the whole of it, and a time that
    pays restores it. So a busy stream does not park, and on a crowded machine nobody burns the
    processor that the other side waits for.
    """

    __slots__ = ("_most", "_now", "_waits")

    def __init__(self, most: float) -> None:
        self._most = self._now = most
        self._waits = 0

    def seconds(self) -> float:
        """How long this time."""
        self._waits += 1
        return self._now if self._waits & 15 else self._most

    def learn(self, paid: bool) -> None:
        """It paid, or not."""
        self._now = self._most if paid else self._now / 2 if self._now > 1e-6 else 0.0


class RingStats(NamedTuple):
    """What `Ring.stats` returns. Of the whole ring, not of one handle.

    Bytes are positions: payloads with their framing (8 bytes and up to 7 of padding a message, and the
    rest of a lane where a message did not fit). They are exact; messages may lag by one for each
    process that was killed, and all are read one after another while the ring goes on. What is out of a
    broadcast ring is what its slowest reader has read (or lost); with no reader, all of it.
    """

    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    fill: float  # of the fullest lane, 0.0 to 1.0
    lanes_in_use: int  # lanes that have a living writer
    lanes: int
    readers: int  # living readers
    writers_parked: int  # lanes whose writer sleeps until there is room
    readers_parked: int
    writer_parks: int  # times a writer went to sleep
    reader_parks: int


class Ring:
    """A named ring in shared memory: any number of writers, each with a lane of its own, and one or several readers.

    Make one with `Ring.create` or `Ring.open`, not with the constructor. A handle is safe for threads.
    Its roles are taken when they are first used: the first write claims a lane, the first read claims
    the reader's role, and both are held until `close`, or until the process dies. After a fork the
    child's handle works and holds no role. Pickling a handle (spawn, forkserver) opens the ring by name.
    A signal handler may use a handle, but gets RuntimeError where it came in the middle of an operation on it (or,
    if it waits for a message that competing readers take, on another handle of that ring).

    A message is in the ring when `write` returns and out of it when `read` returns. Each writer's
    messages are read in the order in which it wrote them; between writers there is no order.
    """

    _closed = True  # until it is whole, for `close` and `__del__`

    def __init__(self, segment: Segment, any_owner: bool, spin: float | None) -> None:
        self._segment = segment
        self._any_owner = any_owner
        self._spin_given = spin
        if spin is None:
            spin = SPIN if os_backend.processors() > 1 else 0.0
        self._read_spin, self._write_spin = _Spin(spin), _Spin(spin)
        self._take_up()
        self._closed = False
        _open_rings[id(self)] = weakref.ref(self)

    def _take_up(self) -> None:
        """Begin with no role; also in a forked child, where the parent's states must not be used."""
        self._reader = (CompetingReader if self._segment.layout.compete else Reader)(self._segment)
        self._writer = Writer(self._segment, self._reader)
        sides = self._writer, self._reader
        self._ending = Monitor(partial(_ending, *sides, self._segment), sides)
        self._send = self._writer.monitor.steps.send
        self._messages = self._reader.monitor.steps
        self._announcing = False  # has the reading side a doorbell, so that `try_read` is to arm it?
        self._watches: dict[Writer | Reader, Watch] = {}  # by the side that tasks wait for
        self._at_once = 0  # messages that tasks wrote, without one that had to wait

    # ------------------------------------------------------------ making and finding

    @classmethod
    def create(
        cls,
        name: str,
        capacity: int = 1 << 20,
        *,
        writers: int = 64,
        readers: str = "one",
        max_readers: int = 8,
        lag: str = "block",
        mode: int = 0o600,
        keep: bool = False,
        replace: bool = False,
        spin: float | None = None,
    ) -> Ring:
        """Create a ring and return a handle to it.

        The ring lives as long as some handle is open, here or elsewhere: the last `close` removes its
        name. What is left behind when every process that had it open was killed counts as not there.

        Args:
            name: 1 to 200 printable ASCII characters without space, "/" and "\\\\".
            capacity: Bytes for each lane, framing included; rounded up to a multiple of 4096 (see
                `capacity`). The memory of a lane is taken when the lane is first claimed.
            writers: Lanes, that is, handles that can write at a time; 1 to 4096.
            readers: "one": one handle reads, a second one that tries gets RingBusy. "compete": of several handles
                one gets each message, whoever is first: a work queue. "broadcast": each of several handles reads
                every message that is written after it has joined; see `join`.
            max_readers: Handles that can read at a time where there are several; 1 to 64 that broadcast, to 1024
                that compete.
            lag: What happens in a broadcast ring when a reader lags by a whole lane. "block": writers wait for the
                slowest living reader; for a dead one a tenth of a second at most; for nobody if there is none.
                "drop": writers never wait. A reader that was overtaken gets MessagesLost with their exact number,
                once, and goes on with the oldest message that is still there; a lane's oldest sixteenth is
                overwritten at a time, and a message is at most half of a lane long.
            mode: Permissions of the ring, whatever the umask; the owner must be able to read and write. On Windows
                they are checked and not used: its objects have the security that the process gives all it makes.
                On macOS they make no difference: the ring lies in a folder of this user's alone.
            keep: The name and the unread messages stay when nobody has the ring open, until `unlink`
                (or until the system goes down). Windows has no such thing.
            replace: Take the place of a kept ring of this name that nobody has open.
            spin: Seconds to look again and again before going to sleep in a wait, at most (less while it
                does not pay), for this handle; None is 100 microseconds, or nothing where there is one processor.
                A task that waits to read does so too, and lets the loop's others run between two looks.

        Raises:
            FileExistsError: There is a living or kept ring of this name, or something that is no ring.
            RingBusy: With `replace`: somebody has that ring open. Or another process is removing a ring of
                this name, and has not finished within a second (it was stopped?).
            ValueError: An argument is out of its range.
            NotImplementedError: ``keep=True`` on Windows.
            OSError: The system says no: ENOSPC without memory for the control words, EACCES, ...
        """
        _layout.check_name(name)
        layout = _layout.new_layout(capacity, writers, readers, keep, max_readers, lag)
        if not isinstance(mode, int) or mode & ~0o777 or mode & 0o600 != 0o600:
            raise ValueError(f"mode is permission bits of which 0o600 are set, not {mode!r}")
        _check_spin(spin)
        _set_hooks()
        with naming(name):
            segment = os_backend.Segment.create(name, layout, mode, replace)
        try:
            return cls(segment, False, spin)
        except BaseException:
            segment.unlink()
            segment.close()
            raise

    @classmethod
    def open(
        cls, name: str, *, timeout: float | None = 0.0, any_owner: bool = False, spin: float | None = None
    ) -> Ring:
        """Open a ring that exists.

        Args:
            name: As given to `create`.
            timeout: Seconds to wait for the ring to exist. None waits for ever, 0 looks once.
            any_owner: Trust a ring that belongs to another user (who may then feed or break it). Without
                it, a ring belongs to this user or to root.
            spin: As for `create`.

        Raises:
            FileNotFoundError: There is no such ring, or it was left behind by a crash of everybody.
            PermissionError: It is another user's, or its mode keeps us out.
            RingIncompatible: It has another layout version or machine, or is no ring at all.
            RingCorrupted: Its header contradicts itself or the file's size.
            OSError: What has the name is not even a regular file; or the system says no.
        """
        _layout.check_name(name)
        _check_spin(spin)
        _set_hooks()
        deadline = _deadline(timeout)
        while True:
            try:
                with naming(name):
                    segment = os_backend.Segment.open(name, any_owner)
                break
            except FileNotFoundError:
                if deadline is not None and time.perf_counter() >= deadline:
                    raise
            time.sleep(OPEN_AGAIN)
        try:
            return cls(segment, any_owner, spin)
        except BaseException:
            segment.close()
            raise

    # ------------------------------------------------------------ writing

    def write(self, data: Buffer, timeout: float | None = None) -> None:
        """Append one message, waiting while this writer's lane is full.

        With no reader alive the lane fills up, and then `write` waits for one to come.

        Args:
            data: Any C-contiguous buffer (bytes, bytearray, memoryview, array, ...); its bytes are copied.
                An empty one is a message like any other. One of references to Python objects is a TypeError.
            timeout: Seconds to wait at most. None waits for ever, 0 (or less) not at all.

        Raises:
            RingTimeout: There was no room in time; nothing was written.
            MessageTooLarge: More than `max_message` bytes.
            RingBusy: All lanes are taken by living writers.
            RingCorrupted: This writer's lane is damaged, or at the first write each that is free.
            RingClosed: The handle is closed, maybe by another thread meanwhile.
            OSError: ENOSPC, at the first write: no memory for the lane.

        If this process dies inside the call, the message is in the ring or it is not, whole.
        """
        # `timeout` would be keyword-only, here and in `read`, if that did not cost each call a twentieth.
        if type(data) is not bytes:
            data = _flat(data)
        send = self._send  # called as a method it would be looked for in the class first: a thirtieth of a call
        try:
            answer = send(data)
            if answer is None:
                return
        except StopIteration:  # an exception ended these steps, or `close`
            answer = self._enter_writer(data)
        except ValueError as error:
            if error.args != BUSY:
                raise
            answer = self._enter_writer(data)  # waits for the thread that is inside
        if answer is not None:
            self._write_when_room(data, answer, _deadline(timeout))

    def try_write(self, data: Buffer) -> bool:
        """Append one message if there is room now. Raises what `write` raises, but RingTimeout.

        Returns:
            False if there is no room, and nothing was written.
        """
        if type(data) is not bytes:
            data = _flat(data)
        return self._enter_writer(data) is None

    def write_many(self, messages: Iterable[Buffer], *, timeout: float | None = None) -> int:
        """Append messages in their order, much faster than one by one.

        Args:
            messages: Buffers, as for `write`. All are checked before the first is written.
            timeout: Seconds to wait for room, all in all; as for `write`.

        Returns:
            How many were written: all, or fewer if the time was up.

        Raises:
            RingTimeout: The time was up, and not one was written.
            MessageTooLarge: One has more than `max_message` bytes; none was written.
        """
        if isinstance(messages, ONE):
            raise TypeError(f"write_many takes an iterable of messages, not one {type(messages).__name__}")
        checked = list(messages)
        # To count in lists is a quarter faster than to make sets, and this is a third of a message's way in.
        if list(map(type, checked)).count(bytes) != len(checked):
            checked = [message if type(message) is bytes else _flat(message) for message in checked]
        sizes = list(map(len, checked))
        size = longest = sizes[0] if sizes else 0
        if sizes.count(size) != len(sizes):
            size, longest = -1, max(sizes)
        if longest > self._segment.layout.max_message:
            raise MessageTooLarge(self.name, longest, self.max_message)
        batch = WriteBatch(checked, size)
        try:
            self._write_in_time(batch, _deadline(timeout))
        except RingTimeout:
            if not batch.done:
                raise
        return batch.done

    def writev(self, buffers: Iterable[Buffer], *, timeout: float | None = None) -> None:
        """Append one message that is made of several buffers: a header and a body need no joining.

        Args:
            buffers: Buffers, as for `write`; the message is their bytes, one after the other.
            timeout: As for `write`, and so is what is raised.
        """
        if isinstance(buffers, ONE):
            raise TypeError(f"writev takes an iterable of buffers, not one {type(buffers).__name__}")
        parts = [buffer if type(buffer) is bytes else _flat(buffer) for buffer in buffers]
        size = sum(map(len, parts))
        if size <= GATHERED:
            self.write(b"".join(parts), timeout=timeout)
            return
        if size > self.max_message:
            raise MessageTooLarge(self.name, size, self.max_message)
        self._write_in_time(Gather(parts, size), _deadline(timeout))

    def reserve(self, nbytes: int, *, timeout: float | None = None) -> Reservation:
        """Write a message in place, without a copy: ``with ring.reserve(nbytes) as view: ...``.

        `view` is a writable memoryview of `nbytes` bytes in the ring, with whatever is there. Leaving the block
        publishes the message, an exception publishes nothing, and `Reservation.commit` publishes less of it.
        Meanwhile other threads that write with this handle wait, and this one gets RingBusy if it tries.

        Args:
            nbytes: Bytes of the message, 0 to `max_message`.
            timeout: Seconds to wait for room at the beginning of the block, as for `write`.

        Raises:
            MessageTooLarge: More than `max_message` bytes.
            BufferError: At the end of the block: something made from the view is still there (an array, a part
                of it). Nothing is published, and the handle writes again once it is gone.
            RingBusy, RingTimeout, RingCorrupted, RingClosed, OSError: At the beginning of the block, as for `write`.

        If this process dies inside the block, nothing of the message is in the ring.
        """
        if type(nbytes) is not int:
            nbytes = _layout.integer("nbytes is a number of bytes", nbytes)
        if nbytes < 0:
            raise ValueError(f"nbytes is a number of bytes, not {nbytes}")
        if nbytes > self._segment.layout.max_message:
            raise MessageTooLarge(self.name, nbytes, self.max_message)
        return Reservation(self, self._writer, Reserve(nbytes), timeout)

    def _enter_writer(self, data: Any) -> Any:
        """Ask the writer's monitor: None, or which read_pos is wanted."""
        try:
            return self._send(data)
        except (StopIteration, ValueError) as refusal:
            return self._enter(self._writer, data, refusal)

    def _enter(self, side: Writer | Reader, request: Any, refusal: Exception) -> Any:
        """Ask a side's monitor, of which the steps as they are known here refused it, or ended with this ValueError."""
        if isinstance(refusal, ValueError) and refusal.args != BUSY:
            raise refusal
        # An exception ended these steps, or `close`; or a thread is inside.
        try:
            return side.monitor.enter(request)
        except MonitorClosed:
            raise self._is_closed() from None
        finally:
            self._send, self._messages = self._writer.monitor.steps.send, self._reader.monitor.steps

    def _write_in_time(self, request: WriteRequest, deadline: float | None) -> None:
        wanted = self._enter_writer(request)
        if wanted is not None:
            self._write_when_room(request, wanted, deadline)

    def _write_when_room(self, data: Any, wanted: int, deadline: float | None) -> None:
        writer = self._writer
        parking = writer.parking
        if parking is None:
            raise self._is_closed()
        written = False

        def attempt() -> bool:
            nonlocal wanted, written
            if not written:
                answer = self._enter_writer(data)
                written = answer is None
                wanted = answer or 0
            return written

        if wanted != RESERVED:
            enough = min(wanted + self.capacity // ROOM, writer.write_pos)
            self._spin_for_room(writer, enough, deadline)
            now = time.perf_counter()
            if writer.nothing(enough) and (deadline is None or now < deadline):
                with suppress(MonitorClosed):  # said below
                    parking.park(lambda: writer.nothing(enough), enough, _earlier(now + PATIENCE, deadline))
        self._wait(attempt, parking, lambda: writer.nothing(wanted), lambda: wanted, deadline, "no room in")

    # ------------------------------------------------------------ reading

    @overload
    def read(self, buf: None = None, max_len: int | None = None, timeout: float | None = None) -> bytes: ...
    @overload
    def read(self, buf: Buffer, max_len: int | None = None, timeout: float | None = None) -> int: ...
    def read(
        self, buf: Buffer | None = None, max_len: int | None = None, timeout: float | None = None
    ) -> bytes | int:
        """Remove and return one message, waiting while there is none.

        Args:
            buf: A writable C-contiguous buffer that takes the message.
            max_len: Bytes of `buf` that may be used, or, without `buf`, that the message may have.
            timeout: Seconds to wait at most. None waits for ever, 0 (or less) not at all.

        Returns:
            The message, or, with `buf`, the number of bytes put there.

        Raises:
            RingTimeout: No message came in time.
            BufferTooSmall: The message is longer than allowed; its size is in `needed`, and it stays.
            RingBusy: Another handle is this ring's reader.
            RingCorrupted: A lane is damaged. Raised once for each such lane; the others are read on.
            RingClosed: The handle is closed, maybe by another thread meanwhile.

        If this process dies inside the call, the message is in the ring or it is taken; none of the
        others is affected. The next process that reads takes up after the last one taken.
        """
        message: Any = None
        deadline: float | None = None
        tight_until = spin_until = 0.0  # `spin_until`: 0.0 before and after
        reader: Reader | None = None  # once there was no message
        try:
            # A `for` and not a call of next(): between the two the interpreter (from 3.10 on) runs no
            # signal handler, whose exception would lose the message.
            while buf is None and max_len is None:
                for message in self._messages:
                    if message is not None:
                        if spin_until:
                            self._read_spin.learn(True)
                        return message  # type: ignore[no-any-return]
                    break
                else:
                    break  # an exception ended these steps, or `close`
                # Spin here, a few times faster than in _await: it is what a message waits for.
                now = time.perf_counter()
                if reader is None:
                    deadline = _deadline(timeout)
                    tight_until = now + TIGHT
                    spin_until = _earlier(now + self._read_spin.seconds(), deadline)
                reader = self._reader
                if now < spin_until or reader.was_refused:
                    if now > tight_until:
                        os_backend.yield_processor()
                    else:
                        reader.looks = LOOKS
                    continue
                if spin_until:
                    self._read_spin.learn(False)
                    spin_until = 0.0
                # Then the message is taken as above. By a request, as in `_await`, it would take three times the
                # bytecodes, and each takes several times as long as usual on a processor that has slept.
                self._sleep(reader.parking, reader.nothing, 0, deadline, "no message in")
        except BaseException as error:
            if message is not None:
                self._give_back(message)
            if not isinstance(error, ValueError) or error.args != BUSY:
                if reader is not None and not isinstance(error, RingClosed):
                    reader.pass_on()
                raise
        if buf is None and max_len is None:
            request = ReadOne(self.max_message)
        else:
            request = _read_into(buf, max_len)
        if reader is None:
            deadline = _deadline(timeout)
        try:
            answer: bytes | int = self._await(request, deadline, spun=reader is not None)
        except BaseException:
            self._reader.give_back(request)
            raise
        return answer

    def try_read(self) -> bytes | None:
        """Remove and return one message if there is one, else None. Raises what `read` raises, but RingTimeout."""
        message = self._take()
        while message is None and self._announcing and not self._arm(self._reader):
            message = self._take()
        return message

    def _take(self) -> bytes | None:
        message: Any = None
        try:
            for message in self._messages:  # as in `read`
                if message is None and self._reader.was_refused:
                    break
                return message  # type: ignore[no-any-return]
        except BaseException as error:
            if message is not None:
                self._give_back(message)
            if not isinstance(error, ValueError) or error.args != BUSY:
                raise
        request = ReadOne(self.max_message)
        try:
            answer: bytes | None = self._enter_reader(request)
        except BaseException:
            self._reader.give_back(request)
            raise
        return answer

    def read_many(self, max_messages: int | None = None, *, timeout: float | None = None) -> list[bytes]:
        """Remove and return what is there, waiting while there is nothing; much faster than one by one.

        Args:
            max_messages: How many at most; None is what all lanes hold now.
            timeout: Seconds to wait for the first one, as for `read`.

        Returns:
            At least one message. Each writer's are in their order.

        Raises:
            RingTimeout: No message came in time. And what else `read` raises.

        If this process dies inside the call, the batch is in the ring, or some lanes' share of it is taken.
        """
        request = _read_batch(max_messages)
        try:
            answer: list[bytes] = self._await(request, _deadline(timeout))
        except BaseException:
            self._reader.give_back(request)
            raise
        return answer

    def borrow(self, *, timeout: float | None = None) -> Borrowed:
        """Read a message in place, without a copy: ``with ring.borrow() as view: ...``.

        `view` is a read-only memoryview of the message in the ring. Leaving the block takes the message out,
        by an exception too. Meanwhile other threads that read with this handle wait, and this one gets RingBusy
        if it tries.

        Args:
            timeout: Seconds to wait for a message at the beginning of the block, as for `read`.

        Raises:
            BufferError: At the end of the block: something made from the view is still there (an array, a part
                of it). The message is taken out, and the handle reads again, once it is gone.
            RingBusy, RingTimeout, RingCorrupted, RingClosed: At the beginning of the block, as for `read`.

        If this process dies inside the block, the message stays in the ring; where readers compete it was taken out
        at the beginning, and is lost.
        """
        return Borrowed(self, self._reader, Borrow(), timeout)

    def messages(self, *, timeout: float | None = None) -> Iterator[bytes]:
        """Iterate over the messages as they come; each is out of the ring when it is handed out.

        It ends quietly when this handle is closed, and after `timeout` seconds without a message (None:
        never). Leaving the loop loses nothing. If this process dies in the loop, what it was handed is taken, and at
        most the message that was on its way to it; the others stay in the ring, also those that it had copied ahead.
        MessagesLost ends it, as every exception ends a generator: what follows comes in another loop.
        """
        while True:
            steps = self._messages
            try:
                for message in steps:  # as in `read`
                    if message is None:
                        break
                    yield message
                    if steps is not self._messages:
                        break  # we are in a forked child now
            except ValueError as error:
                if error.args != BUSY:
                    raise
            request = ReadOne(self.max_message)
            try:
                message = self._await(request, _deadline(timeout))
            except (RingClosed, RingTimeout):
                return
            except BaseException:
                self._reader.give_back(request)
                raise
            yield message

    def __iter__(self) -> Iterator[bytes]:
        return self.messages()

    def join(self) -> None:
        """Take a reader's role now, not with the first read: of a broadcast ring it gets what is written from now on.

        Doing it again does nothing. The role ends with `close`, or when the process dies.

        Raises:
            RingBusy: There are as many living readers as the ring was made for.
            RingClosed: The handle is closed.
        """
        self._parking_of_reader()

    # ------------------------------------------------------------ event loops

    def attach_doorbell(self) -> Doorbell:
        """Take the reader's role, and have something that any event loop can wait for.

        Its descriptor is sure to become readable when a message comes only after `try_read` has returned None (or a
        read has raised RingTimeout): that makes it unreadable, announces this reader as asleep, and looks again. So:
        take messages until there is none, then wait. It may be readable with nothing there. Where readers compete, wait
        with a time-out: the message for which another one was woken, that was killed, rings nobody. Attaching
        again does nothing. Tasks of asyncio need none of this; see `read_async`.

        Raises:
            RingBusy: Another handle is this ring's reader.
            RingClosed: The handle is closed.
            OSError: ENOSYS: the system gives writers no fence (see `backend`), so nothing could be sure. Or there is
                no descriptor left, or the like.
        """
        parking = self._parking_of_reader()
        if parking.doorbell is None:
            if not self._segment.sleeper_fence():
                raise OSError(errno.ENOSYS, f"a doorbell is not sure here ({self.backend})", self.name)
            try:
                parking.attach()
            except MonitorClosed:
                raise self._is_closed() from None
        self._announcing = True
        return Doorbell(self)

    def fileno(self) -> int:
        """The descriptor of this handle's doorbell (on Windows a handle), for selectors; attached if there is none.

        It is not for a loop of asyncio whose tasks use `read_async` too: there each replaces the other's callback.
        """
        self.attach_doorbell()
        doorbell = self._parking_of_reader().doorbell
        assert doorbell is not None
        return doorbell.fileno()

    def wait_doorbell(self, timeout: float | None = None) -> bool:
        """Wait until there is something to read, and take nothing. It needs no doorbell.

        Args:
            timeout: Seconds to wait at most. None waits for ever, 0 (or less) not at all.

        Returns:
            False if the time was up. Else there is most likely a message: True is also for what only `try_read` can
            tell, a lane that has just come into use, or the rest of one that was too short for a message.

        Raises:
            RingBusy: Another handle is this ring's reader.
            RingClosed: The handle is closed, maybe by another thread meanwhile.
        """
        deadline = _deadline(timeout)
        reader = self._reader  # first: closed by another thread in between, it refuses
        parking = self._parking_of_reader()

        def attempt() -> bool:
            try:
                return not reader.nothing()
            except MonitorClosed:
                raise self._is_closed() from None

        self._spin_on(attempt, self._read_spin, deadline)
        try:
            self._wait(attempt, parking, reader.nothing, lambda: 0, deadline, "no message in")
        except RingTimeout:
            return False
        return True

    async def read_async(self, *, timeout: float | None = None) -> bytes:
        """`read` for tasks of asyncio: others run while it waits, with no helper thread.

        For a short time (`spin`) it looks again each time the loop comes round, then it sleeps. A task that is
        cancelled has taken nothing. Any loop that has ``add_reader``; on Windows the ProactorEventLoop.

        Raises:
            RingTimeout: No message came in time. And what else `read` raises.
            NotImplementedError: On Windows, in another loop.
        """
        return await self._await_async(self._take, timeout)  # type: ignore[no-any-return]

    async def read_many_async(self, max_messages: int | None = None, *, timeout: float | None = None) -> list[bytes]:
        """`read_many` for tasks of asyncio; see `read_async`."""
        request = _read_batch(max_messages)

        def take() -> list[bytes] | None:
            try:
                batch: list[bytes] | None = self._enter_reader(request)
            except BaseException:
                self._reader.give_back(request)
                raise
            return batch

        return await self._await_async(take, timeout)  # type: ignore[no-any-return]

    async def _await_async(self, take: Callable[[], Any], timeout: float | None) -> Any:
        """What `take` gives, which is taken and returned with nothing in between that could be cancelled."""
        deadline = _deadline(timeout)
        reader = self._reader
        watch = self._watches.get(reader)
        if watch is None:
            watch = self._watch(reader, self._parking_of_reader(), lambda needs: reader.nothing())
        spin_until: float | None = None  # 0.0 once that was in vain
        answer: Any = None
        try:
            if watch.is_time_to_pause():
                await _let_others_run()
            while True:
                answer = take()
                if answer is not None:
                    if spin_until:
                        # Not by a look that came too late, because others have this processor as well.
                        self._read_spin.learn(time.perf_counter() < spin_until)
                    return answer
                now = time.perf_counter()
                if deadline is not None and now >= deadline:
                    if not self._arm(reader):  # as in `_sleep`: from now on it is sure to ring
                        continue
                    raise RingTimeout(f"no message in ring {self.name!r} within the timeout")
                if spin_until is None:
                    # Who competes is rung for a message that is its own to take, and each look may take the turn over.
                    spin_until = 0.0 if self._segment.layout.compete else now + self._read_spin.seconds()
                if now < spin_until:
                    await _let_others_run()
                    continue
                if spin_until:
                    self._read_spin.learn(False)
                    spin_until = 0.0
                try:
                    await watch.wait(0, self._look_again(watch.parking, deadline))
                except MonitorClosed:
                    raise self._is_closed() from None
        except RingClosed:
            raise
        except BaseException:
            if answer is not None:  # a signal handler's, as in `read`
                self._give_back(*(answer if isinstance(answer, list) else [answer]))
            elif spin_until:
                self._read_spin.learn(False)
            if self._segment.layout.compete:
                watch.rest()
            reader.pass_on()
            raise

    async def write_async(self, data: Buffer, *, timeout: float | None = None) -> None:
        """`write` for tasks of asyncio: others run while it waits for room. One that is cancelled has written nothing.

        Raises:
            RingTimeout: There was no room in time; nothing was written. And what else `write` raises.
            NotImplementedError: As for `read_async`.
        """
        deadline = _deadline(timeout)
        if type(data) is not bytes:
            data = _flat(data)
        writer = self._writer
        watch = self._watches.get(writer)
        if watch is None:  # no task has had to wait for room yet
            self._at_once = (self._at_once + 1) % AT_ONCE
        if not self._at_once if watch is None else watch.is_time_to_pause():
            await _let_others_run()
        while True:
            wanted = self._enter_writer(data)
            if wanted is None:
                return
            if deadline is not None and time.perf_counter() >= deadline:
                raise RingTimeout(f"no room in ring {self.name!r} within the timeout")
            if watch is None:
                if writer.parking is None:
                    raise self._is_closed()
                watch = self._watch(writer, writer.parking, writer.nothing)
            try:
                await watch.wait(wanted, self._look_again(watch.parking, deadline))
            except MonitorClosed:
                raise self._is_closed() from None

    def __aiter__(self) -> AsyncIterator[bytes]:
        """``async for message in ring``, until the handle is closed. Leaving the loop or being cancelled loses none."""
        return _AsyncMessages(self)

    def _parking_of_reader(self) -> Parking:
        """Where the reading side sleeps; the role is ours then."""
        reader = self._reader
        if reader.parking is None:
            self._enter_reader(GiveBack([]))
        if reader.parking is None:
            raise self._is_closed()
        return reader.parking

    def _arm(self, reader: Reader) -> bool:
        if reader.parking is None:
            raise self._is_closed()
        try:
            return reader.parking.arm(reader.nothing, 0)
        except MonitorClosed:
            raise self._is_closed() from None

    def _watch(self, side: Writer | Reader, parking: Parking, nothing: Callable[[int], bool]) -> Watch:
        from ._loop import Watch  # asyncio takes longer to import than all of this package

        try:
            unheard = self._reader.pass_on if side is self._reader and self._segment.layout.compete else None
            watch = self._watches.setdefault(side, Watch(parking, nothing, unheard))
        except MonitorClosed:
            raise self._is_closed() from None
        if side is self._reader:
            self._announcing = True
        return watch

    def _enter_reader(self, request: Any) -> Any:
        """Ask the reader's monitor."""
        try:
            return self._messages.send(request)
        except (StopIteration, ValueError) as refusal:
            return self._enter(self._reader, request, refusal)

    def _give_back(self, *messages: bytes) -> None:
        """An exception kept these from the caller: the next reads get them."""
        with suppress(RingClosed):  # nobody is left to get them
            self._enter_reader(GiveBack(list(messages)))

    def _await(self, request: ReadRequest | Borrow, deadline: float | None, spun: bool = False) -> Any:
        """The answer to a request, once there is one. Who calls gives it back if it gets an exception instead."""
        answer = self._enter_reader(request)
        if answer is not None:
            return answer

        def attempt() -> bool:
            nonlocal answer
            if answer is None:
                answer = self._enter_reader(request)
            return answer is not None

        reader = self._reader
        if not spun:
            self._spin_on(attempt, self._read_spin, deadline)
        self._wait(attempt, reader.parking, reader.nothing, lambda: 0, deadline, "no message in")
        return answer

    # ------------------------------------------------------------ waiting

    def _spin_on(self, attempt: Callable[[], bool], spin: _Spin, deadline: float | None) -> None:
        """Attempt for a short time. When an attempt succeeds it ends; `_wait` then sees that at once."""
        now = time.perf_counter()
        until = _earlier(now + spin.seconds(), deadline)
        paid = False
        while now < until and not paid:
            paid = attempt()
            os_backend.yield_processor()
            now = time.perf_counter()
        spin.learn(paid)

    def _spin_for_room(self, writer: Writer, enough: int, deadline: float | None) -> None:
        """Give the reader a short time. It looks seldom: a look takes the line with read_pos away from the reader."""
        now = time.perf_counter()
        until = _earlier(now + self._write_spin.seconds(), deadline)
        while now < until and writer.read_pos < enough:
            os_backend.yield_processor()
            now = time.perf_counter()
        self._write_spin.learn(writer.read_pos >= enough)

    def _wait(
        self,
        attempt: Callable[[], bool],
        parking: Parking | None,
        nothing: Callable[[], bool],
        needs: Callable[[], int],
        deadline: float | None,
        what: str,
    ) -> None:
        """Attempt until it succeeds, and sleep in between. A reader that gives up passes on what it was rung for."""
        reader = self._reader
        try:
            while not attempt():
                self._sleep(parking, nothing, needs(), deadline, what)
        except RingClosed:
            raise
        except BaseException:
            if parking is reader.parking:
                reader.pass_on()
            raise

    def _sleep(
        self, parking: Parking | None, nothing: Callable[[], bool], needs: int, deadline: float | None, what: str
    ) -> None:
        """Sleep if there is `nothing` to do, until rung, or for no reason at all. RingTimeout: `deadline` has come."""
        if parking is None:
            raise self._is_closed()
        if deadline is not None and time.perf_counter() >= deadline:
            if self._announcing and parking is self._reader.parking and not self._arm(self._reader):
                return
            raise RingTimeout(f"{what} ring {self.name!r} within the timeout")
        try:
            parking.park(nothing, needs, self._look_again(parking, deadline))
        except MonitorClosed:
            raise self._is_closed() from None

    def _look_again(self, parking: Parking, deadline: float | None) -> float | None:
        """When who parks there is to look again.

        A broadcast ring's writer is not woken by a reader that was killed, nor any by one whose doorbell was not rung.
        Where readers compete nobody takes up a dead one's part at once.
        """
        layout, writer = self._segment.layout, self._writer  # maybe of a handle that another thread is closing
        if layout.compete or parking is writer.parking and (layout.broadcast or writer.is_mute):
            return _earlier(time.perf_counter() + MOURNING, deadline)
        return deadline

    # ------------------------------------------------------------ life

    def close(self) -> None:
        """Give up this handle and its roles. The last handle's close removes the ring's name (unless `keep`).

        Where that is not allowed (another user's ring), the name stays, and counts as not there.
        Threads that wait in this handle get RingClosed. Closing again does nothing.

        Raises:
            RuntimeError: In a signal handler (or the like) that came in the middle of an operation on this very
                handle; it is not closed then. While that operation waits, closing works.
        """
        if not self._closed:
            with suppress(MonitorClosed):  # another thread was first
                self._ending.enter("close")
            for side in (self._writer, self._reader):
                self._close_doorbell(side)
            self._closed = True
            _open_rings.pop(id(self), None)
            # The memory goes now, also if somebody keeps this handle: threads that are inside have what they need.
            remains: Any = _Remains(self._segment)
            self._segment = self._writer = self._reader = remains
            self._ending, self._send, self._messages = _NOBODY, _NOBODY.steps.send, _NOBODY.steps

    def _close_doorbell(self, side: Writer | Reader) -> None:
        watch = self._watches.get(side)
        if watch is not None:
            watch.close()
            self._watches.pop(side, None)  # only now: after an exception the next `close` does it again
        elif side.parking is not None and side.parking.doorbell is not None:
            side.parking.doorbell.close()

    def unlink(self) -> None:
        """Remove the ring's name, if it still leads to this very ring. Open handles stay as they are.

        Raises:
            RingClosed: The handle is closed.
        """
        if self._closed:
            raise self._is_closed()
        try:
            self._ending.enter("unlink")
        except MonitorClosed:
            raise self._is_closed() from None

    def __enter__(self) -> Ring:
        if self._closed:
            raise self._is_closed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        try:
            self.close()
        except Exception:
            if not finalizing():  # else the modules' names may be gone, and `_leave_all` was here
                raise

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise self._is_closed()
        return _unpickle, (type(self), self.name, self._segment.layout.nonce, self._any_owner, self._spin_given)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"capacity={self.capacity}, writers={self._segment.layout.writers}"
        return f"<{type(self).__name__} {self.name!r} {state}>"

    def _is_closed(self) -> RingClosed:
        return RingClosed(f"this handle of ring {self.name!r} is closed")

    # ------------------------------------------------------------ what it is like

    @property
    def name(self) -> str:
        """The ring's name."""
        return self._segment.name

    @property
    def capacity(self) -> int:
        """Bytes in each lane, framing included: what was asked for, rounded up to a multiple of 4096."""
        return self._segment.layout.capacity

    @property
    def max_message(self) -> int:
        """Bytes in the longest message that can be written: `capacity`, with ``lag="drop"`` half of it, less 8."""
        return self._segment.layout.max_message

    @property
    def closed(self) -> bool:
        """Was this handle closed?"""
        return self._closed

    @property
    def backend(self) -> str:
        """What the ring stands on here, and, if something makes it slower, what."""
        return os_backend.describe()

    def stats(self) -> RingStats:
        """Look at the whole ring, disturbing nobody.

        Raises:
            RingClosed: The handle is closed.
        """
        segment, reader = self._segment, self._reader
        if self._closed:
            raise self._is_closed()
        seen = survey(segment, reader.slot if reader.claimed else -1)
        return RingStats(
            messages_in=sum(seen.put),
            messages_out=sum(seen.taken),
            bytes_in=sum(seen.written),
            bytes_out=sum(seen.read),
            fill=seen.fill(segment.layout),
            lanes_in_use=self.writers_alive(),
            lanes=segment.layout.writers,
            readers=self.readers_alive(),
            writers_parked=sum(seen.writers_parked),
            readers_parked=seen.readers_parked,
            writer_parks=sum(seen.writer_parks),
            reader_parks=seen.reader_parks,
        )

    # ------------------------------------------------------------ who is there

    def writers_alive(self) -> int:
        """How many handles have a lane now, this one's own included, by the kernel's word.

        A handle counts from its first write until it closes, or its process has died.

        Raises:
            RingClosed: The handle is closed.
        """
        segment, writer = self._segment, self._writer
        if self._closed:
            raise self._is_closed()
        return (writer.lane >= 0) + segment.claimed(_layout.LANE, segment.layout.writers)

    def readers_alive(self) -> int:
        """How many handles have a reader's role now, this one's own included, by the kernel's word.

        A handle counts from its first read until it closes, or its process has died; in a broadcast ring from when it
        has joined: it gets what is written after that.

        Raises:
            RingClosed: The handle is closed.
        """
        segment, reader = self._segment, self._reader
        if self._closed:
            raise self._is_closed()
        if segment.layout.broadcast:
            return len(joined_slots(segment, reader.slot if reader.claimed else -1))
        return int(reader.claimed) + segment.claimed(_layout.READER, segment.layout.slots)

    def wait_for_writer(self, timeout: float | None = None) -> bool:
        """Wait until a handle has written, or tried to, and is still there: until `writers_alive` is not 0.

        No system has an event for that, so this looks every 2 milliseconds, as `open` does.

        Args:
            timeout: Seconds to wait at most. None waits for ever, 0 (or less) looks once.

        Returns:
            False if the time was up.

        Raises:
            RingClosed: The handle is closed, maybe by another thread meanwhile.
        """
        return self._wait_for(self.writers_alive, timeout)

    def wait_for_reader(self, timeout: float | None = None) -> bool:
        """Wait until a handle reads, or has read, and is still there: `wait_for_writer`, for the other side."""
        return self._wait_for(self.readers_alive, timeout)

    def _wait_for(self, alive: Callable[[], int], timeout: float | None) -> bool:
        deadline = _deadline(timeout)
        while not alive():
            now = time.perf_counter()
            if deadline is not None and now >= deadline:
                return False
            time.sleep(OPEN_AGAIN if deadline is None else min(OPEN_AGAIN, deadline - now))
        return True


@types.coroutine
def _let_others_run() -> Generator[None, None, None]:
    """Have a task's loop run the others once."""
    yield


class Doorbell:
    """What an event loop waits for; see `Ring.attach_doorbell`. It lives as long as its ring's handle is open."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def fileno(self) -> int:
        """Its descriptor (on Windows a handle). RingClosed if the handle is closed."""
        return self._ring.fileno()

    def wait(self, timeout: float | None = None) -> bool:
        """As `Ring.wait_doorbell`."""
        return self._ring.wait_doorbell(timeout)


class _AsyncMessages:
    """The messages of a ring as they come, for ``async for``."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def __aiter__(self) -> _AsyncMessages:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._ring.read_async()
        except RingClosed:
            raise StopAsyncIteration from None


ONCE: Final = "a message in place is entered once; ask for another one"


class _InPlace:
    """A message in place, as a context manager whose view ends with the block."""

    _request: Any

    def __init__(self, ring: Ring, side: Writer | Reader, request: Reserve | Borrow, timeout: float | None) -> None:
        self._ring, self._side, self._request, self._timeout = ring, side, request, timeout

    def _begin(self, side: Writer | Reader) -> None:
        """The `side` is the handle's now: in a forked child another one than when it was asked for."""
        request = self._request
        if request.thread or request.ends:
            raise RuntimeError(ONCE)
        self._side = side
        request.thread = get_ident()
        # A signal handler's exception may come before the first instruction of `__exit__`, which then is skipped. Not a
        # `__del__`: that would run each time, and an exception that comes in it is lost.
        request.holder = weakref.ref(self, partial(_leave, side, request))

    def _end(self, enter: Callable[[Any], Any]) -> None:
        """Have its end done."""
        request = self._request
        request.ends = True
        try:
            enter(request)
        except BaseException:
            _leave(self._side, request)
            raise
        request.left, request.holder = True, None


def _leave(side: Writer | Reader, request: Reserve | Borrow, holder: object = None) -> None:
    """Have whoever comes next do what there is left to do for a message in place: nobody waits for us any longer."""
    request.left, request.holder = True, None
    if side.parking is not None:
        side.parking.wake()


class Reservation(_InPlace):
    """Room for one message that is written in place; see `Ring.reserve`."""

    def __enter__(self) -> memoryview:
        ring, request = self._ring, self._request
        self._begin(ring._writer)
        try:
            wanted = ring._enter_writer(request)
            if wanted is not None:
                ring._write_when_room(request, wanted, _deadline(self._timeout))
        except BaseException:
            _leave(self._side, request)  # in case that it is there
            raise
        view: memoryview = request.view
        return view

    def commit(self, nbytes: int) -> None:
        """Publish the first `nbytes` bytes now, as the message. The view ends, and the block may be left.

        Raises:
            ValueError, TypeError: More bytes than were reserved, no number, or not in the block; nothing is published.
        """
        request = self._request
        if not request.thread or request.left:
            raise ValueError("commit: this is not in the block, or it was done already")
        nbytes = _layout.integer("nbytes is a number of bytes", nbytes)
        if not 0 <= nbytes <= request.size:
            raise ValueError(f"commit takes 0 to {request.size:,} bytes, which were reserved, not {nbytes!r}")
        self._commit(nbytes)

    def _commit(self, nbytes: int | None) -> None:
        if self._ring._writer is not self._side:  # closed meanwhile, or in a forked child
            self._request.left = True
            raise self._ring._is_closed()
        self._request.commit = nbytes
        self._end(self._ring._enter_writer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        request = self._request
        if request.left:
            return
        if kind is None:
            self._commit(request.size)
        else:
            with suppress(RingClosed, BufferError):  # the exception says more
                self._commit(None)


class Borrowed(_InPlace):
    """A message that is read in place; see `Ring.borrow`."""

    def __enter__(self) -> memoryview:
        ring, request = self._ring, self._request
        self._begin(ring._reader)
        try:
            if ring._enter_reader(request) is None:
                ring._await(request, _deadline(self._timeout))
        except BaseException:
            _leave(self._side, request)  # in case that it is there
            raise
        view: memoryview = request.view
        request.given = True  # from here on an exception is one in the block
        return view

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ring._reader is not self._side:  # closed meanwhile, or in a forked child
            self._request.left = True
            return
        try:
            self._end(self._ring._enter_reader)
        except BufferError:
            if kind is None:  # else the exception says more
                raise


def _close_when_gone(segment: Segment, views: list[weakref.ref[Any]]) -> None:
    """Close a segment when none of these views, or what they are of, is left."""
    for view in [reference() for reference in views]:
        if view is not None:
            weakref.finalize(view, _close_when_gone, segment, [])
            return
    segment.close()


class _Remains:
    """What a closed handle has in the place of its segment and its two sides: nobody can enter, and no memory."""

    parking = None
    claimed = was_refused = False
    lane = -1

    def __init__(self, segment: Segment) -> None:
        self.name, self.layout, self.monitor = segment.name, segment.layout, _NOBODY

    def give_back(self, request: ReadRequest) -> None:
        """There is nobody to give it to."""

    def nothing(self) -> bool:
        """Nobody gets to ask."""
        return True

    def pass_on(self) -> None:
        """There is nothing to be passed on."""


def _ending(writer: Writer, reader: Reader, segment: Segment) -> Generator[None, str, None]:
    """The end of a handle and of its ring's name, as a monitor; after an exception it is begun anew."""
    while True:
        request = yield
        if request == "close":
            writer.refuse_reentry()  # all or nothing
            reader.refuse_reentry()
            views = [view for view in (writer.close(), reader.close()) if view is not None]
            if views:
                # Something may write or read there yet (an array): nobody else gets the role until that is gone.
                weakref.finalize(views.pop(), _close_when_gone, segment, [weakref.ref(view) for view in views])
            else:
                segment.close()
        elif request == "leave":
            segment.leave()
        else:
            segment.unlink()


def unlink(name: str) -> None:
    """Remove a ring's name. Handles that are open stay as they are; who opens the name later finds nothing.

    Raises:
        FileNotFoundError: There is no such name.
    """
    with naming(_layout.check_name(name)):
        os_backend.unlink(name)


# ---------------------------------------------------------------- arguments


def _deadline(timeout: float | None) -> float | None:
    """The point on time.perf_counter when `timeout` seconds are over; None is never."""
    if timeout is None:
        return None
    if timeout != timeout:
        raise ValueError("timeout is a number of seconds or None, not a NaN")
    try:
        return None if timeout > 1e9 else time.perf_counter() + max(timeout, 0)
    except TypeError:
        raise TypeError(f"timeout is a number of seconds or None, not {type(timeout).__name__}") from None


def _earlier(moment: float, deadline: float | None) -> float:
    return moment if deadline is None else min(moment, deadline)


def _check_spin(spin: float | None) -> float | None:
    try:
        if spin is None or 0 <= spin <= 1:
            return spin
    except TypeError:
        raise TypeError(f"spin is a number of seconds or None, not {type(spin).__name__}") from None
    raise ValueError(f"spin is 0 to 1 seconds or None, not {spin!r}")


def _has_objects(view: memoryview) -> bool:
    """Are there addresses of Python objects among its items? In the format (PEP 3118), but not in a field's name."""
    return "O" in view.format and "O" in "".join(view.format.split(":")[::2])


def _flat(data: Any) -> bytes | memoryview:
    """The bytes of a C-contiguous buffer, in one dimension; small ones as a copy, which is cheaper."""
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"a message is a bytes-like object, not {type(data).__name__}") from None
    if not view.c_contiguous:
        raise ValueError("a message is a C-contiguous buffer; this one is not (copy it first)")
    if _has_objects(view):
        raise TypeError(f"a message is bytes; what this {type(data).__name__} has are references to Python objects")
    if view.nbytes <= PACKED:
        return view.tobytes()
    try:
        return view.cast("B")
    except (ValueError, NotImplementedError, TypeError):  # a format that only its maker knows
        return view.tobytes()


def _read_batch(max_messages: Any) -> ReadBatch:
    if max_messages is None:
        max_messages = sys.maxsize
    else:
        max_messages = _layout.integer("max_messages is None or a number of messages", max_messages)
        if max_messages < 1:
            raise ValueError(f"max_messages is None or at least 1, not {max_messages}")
    return ReadBatch(max_messages)


def _read_into(buf: Any, max_len: Any) -> ReadOne:
    view = None
    if buf is not None:
        if isinstance(buf, int):
            raise TypeError(f"read({buf!r}): the first argument is a buffer; write read(max_len={buf!r}) for a limit")
        try:
            view = memoryview(buf)
        except TypeError:
            raise TypeError(f"buf is a writable buffer, not {type(buf).__name__}") from None
        if view.readonly:
            raise TypeError(f"buf is a writable buffer; this {type(buf).__name__} is read-only")
        if not view.c_contiguous:
            raise ValueError("buf is a C-contiguous buffer; this one is not")
        if _has_objects(view):
            raise TypeError(f"buf takes bytes; what this {type(buf).__name__} has are references to Python objects")
        view = view.cast("B") if view.nbytes else memoryview(bytearray())
    if max_len is None:
        assert view is not None
        return ReadOne(len(view), view)
    max_len = _layout.integer("max_len is a number of bytes", max_len)
    if max_len < 0:
        raise ValueError(f"max_len is a number of bytes, not {max_len}")
    return ReadOne(max_len if view is None else min(max_len, len(view)), view)


# ---------------------------------------------------------------- pickling, forks and the end of the process


def _unpickle(cls: type[Ring], name: str, nonce: bytes, any_owner: bool, spin: float | None) -> Ring:
    ring = cls.open(name, any_owner=any_owner, spin=spin)
    if ring._segment.layout.nonce != nonce:
        ring.close()
        raise RingError(f"the ring that is called {name!r} now is not the one that was pickled")
    return ring


def _set_hooks() -> None:
    """Have handles follow forks, and leave at the end of the process. Before the first of them; twice is harmless."""
    if "the system's" not in _hooks:
        os_backend.follow_forks(_take_up_all)
        atexit.register(_leave_all)
        _leave_with_multiprocessing()
        _hooks.add("the system's")


def _leave_with_multiprocessing() -> None:
    """Its children end by os._exit, without atexit, but with its own finalizers. Forked ones inherit the first."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None and "multiprocessing's" not in _hooks:
        util.register_after_fork(_leave_all, lambda _: util.Finalize(None, _leave_all, exitpriority=-1))
        util.Finalize(None, _leave_all, exitpriority=-1)
        _hooks.add("multiprocessing's")


def _rings() -> list[Ring]:
    """The open handles; a list made in one step, because other threads open and close meanwhile."""
    return [ring for ring in [reference() for reference in list(_open_rings.values())] if ring is not None]


def _take_up_all() -> None:
    """In a forked child: begin anew, with no role."""
    for ring in _rings():
        if not ring._closed:
            for side in (ring._writer, ring._reader):
                if side.parking is not None and side.parking.doorbell is not None:
                    side.parking.doorbell.close()  # the parent's; its loops' tasks are the parent's as well
            ring._take_up()
    _leave_with_multiprocessing()


def _leave_all() -> None:
    """The end of the process: names go, but other threads may still be inside, so nothing else does."""
    collecting = gc.isenabled()
    gc.disable()  # a finalizer that closes a ring would come while this thread is inside
    try:
        for ring in _rings():
            with suppress(MonitorClosed, OSError):  # another thread has just closed it; or it cannot be removed
                ring._ending.enter("leave")
    finally:
        if collecting:
            gc.enable()
