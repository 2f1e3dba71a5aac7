"""The command line, ``python -m shmring``: see rings, use them in a shell, tidy up.

`ls`, `stat`, `tail` and `doctor` look by `_backend.Look`, which no ring notices: what they print is read from memory
that goes on meanwhile. `send` and `recv` are a writer and a reader like any other. `rm` and `gc` remove a name in the
way in which `create` makes room for a new ring.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Final

from . import _layout
from ._backend import Look, os_backend
from ._doctor import FAIL, checks
from ._errors import MessagesLost, MessageTooLarge, RingError, RingTimeout
from ._looking import lanes_used, peek, survey
from ._ring import OPEN_AGAIN, Ring, unlink
from ._view import account_of_ring, examine, examine_all, list_of_rings, said, with_rates

# Exit codes. argparse ends with 2.
DONE: Final = 0
FAILED: Final = 1
NOTHING: Final = 3
INTERRUPTED: Final = 130  # as a shell has it for what SIGINT ended
CLOSED: Final = 141  # and for SIGPIPE

# What stdout says when nobody reads it any more.
UNREAD: Final = (errno.EPIPE, errno.EINVAL) if sys.platform == "win32" else (errno.EPIPE,)

CODES: Final = """\
exit codes:
  0    done
  1    it failed, or there is no such ring (stderr has a line that says why)
  2    wrong usage
  3    the time was up: nothing was received, or fewer than asked for; or not all was sent, or taken
  130  Ctrl-C
  141  nobody reads the output any more (as in `| head`)
"""

RATE: Final = 0.2  # seconds between the two looks that a rate needs
LOOK_AGAIN: Final = 0.01  # seconds between two looks of `tail --follow`
WRITERS_GONE: Final = 0.05  # seconds between two looks of `recv --eof` for who still writes
CHUNK: Final = 1 << 16  # bytes


class Failure(Exception):
    """What is told in a line on stderr, and ends the command with 1."""


# ---------------------------------------------------------------- looking


def show(document: Any) -> None:
    """Print JSON: a document, or a line of several."""
    print(json.dumps(document), flush=True)


def run_ls(options: argparse.Namespace) -> int:
    """All rings."""
    before = examine_all(os_backend.names()) if options.interval else {}
    began = time.perf_counter()
    if before:
        time.sleep(options.interval)
    rings = []
    for name, facts in examine_all(before if options.interval else os_backend.names()).items():
        rings.append(with_rates(before.get(name), facts, time.perf_counter() - began))
    if options.json:
        show({"rings": rings})
    elif rings:
        print(list_of_rings(rings, bool(options.interval)))
    return DONE


def run_stat(options: argparse.Namespace) -> int:
    """Everything about one ring, once or again and again."""
    before, began = None, 0.0
    live = options.watch and sys.stdout.isatty()
    if live and sys.platform == "win32":
        os.system("")  # has the console understand the escape sequences below
    if options.interval:
        before, began = examine(options.name), time.perf_counter()
    shown = 0
    while True:
        time.sleep(options.interval)
        try:
            facts, now = examine(options.name, each_lane=True), time.perf_counter()
        except FileNotFoundError:
            if shown:
                return DONE  # it has gone
            raise
        before, began, facts = facts, now, with_rates(before, facts, now - began)
        if options.json:
            show(facts)
        elif live:
            print(f"\033[H\033[J{account_of_ring(facts)}", flush=True)  # to the top left, and clear from there on
        else:
            print(account_of_ring(facts), flush=True)
        shown += 1
        if not options.watch or shown == options.count:
            return DONE


def run_tail(options: argparse.Namespace) -> int:
    """What is in a ring, and with --follow what comes."""
    missed: list[int] = []
    put = _putter(options)
    try:
        for message in passing(options.name, options.number, options.follow, missed):
            put(message)
    finally:
        if missed:
            _tell(f"{sum(missed):,} messages were gone before they could be shown")
    return DONE


def passing(name: str, last: int, follow: bool, missed: list[int]) -> Iterator[bytes]:
    """The `last` messages of each lane, and with `follow` what comes; `missed` gets how many others there were.

    A ring is looked at from outside. Where readers have cursors of their own we are one of them.
    """
    with contextlib.closing(os_backend.Look(name)) as look:
        layout = _layout.parse_header(look.header, look.size, os_backend.MACHINE, name)
        if layout.broadcast:
            yield from _what_is_broadcast(name, missed)
        look.attach(layout, layout.segment_bytes)
        seen = survey(look)
        places, counts = seen.read, seen.taken  # of each lane: where to look from, and how many come before that

        def news(lane: int) -> list[bytes]:
            peeked = peek(look, lane, places[lane])
            places[lane] = peeked.pos
            if peeked.missed:
                missed.append(max(1, peeked.consumed - counts[lane]))
                counts[lane] = max(counts[lane], peeked.consumed)
            counts[lane] += len(peeked.messages)
            return peeked.messages

        for lane in range(lanes_used(look)):
            kept: deque[bytes] = deque(maxlen=last)
            while places[lane] < seen.written[lane]:
                kept += news(lane)
            yield from kept
        while follow:
            over = _has_gone(look)  # before the look: what it was the last to have is there
            found = False
            for lane in range(lanes_used(look)):
                for message in news(lane):
                    found = True
                    yield message
            if not found:
                if over:
                    return
                time.sleep(LOOK_AGAIN)


def _what_is_broadcast(name: str, missed: list[int]) -> Iterator[bytes]:
    """What comes from now on, for ever."""
    with Ring.open(name) as ring:
        ring.join()
        while True:
            try:
                yield from ring
            except MessagesLost as error:
                missed.append(error.count)


def _has_gone(look: Look) -> bool:
    """Has nobody the ring any more, and it is not kept under its name?"""
    if look.is_open():
        return False
    if look.layout.keep:
        with contextlib.suppress(OSError), contextlib.closing(os_backend.Look(look.name)) as again:
            return _layout.nonce_of(again.header) != look.layout.nonce
    return True


# ---------------------------------------------------------------- both ends of a pipe


def run_send(options: argparse.Namespace) -> int:
    """Messages from the arguments or from stdin."""
    if options.messages:
        messages: Iterable[bytes] = map(os.fsencode, options.messages)
    elif sys.stdin is None:
        raise Failure("there is no stdin to take messages from")
    else:
        messages = _pieces(sys.stdin.buffer, options)
    ring, made = _open_ring(options)
    sent = 0
    with ring:
        try:
            ring.write_many([])  # to have been there, for `recv --eof`, also if nothing comes
        except OSError:
            if made and options.keep and not ring.stats().messages_in:
                ring.close()
                os_backend.collect(options.name, True)  # empty, for want of memory; unless somebody else has it by now
            raise
        try:
            for message in messages:
                ring.write(message, timeout=options.timeout)
                sent += 1
            if made and not options.keep and sent:
                _await_taken(ring, options.timeout)
        except RingTimeout as error:
            _tell(f"{error}; {sent:,} messages were sent")
            return NOTHING
        except MessageTooLarge as error:
            raise Failure(f"{error}; {sent:,} messages were sent") from error
    return DONE


def _await_taken(ring: Ring, timeout: float | None) -> None:
    """Stay until a reader has taken all of ours: who makes a ring and is the last to have it takes it along."""
    writer, deadline = ring._writer, math.inf if timeout is None else time.perf_counter() + timeout
    end = writer.write_pos
    while writer.read_pos < end:
        if time.perf_counter() >= deadline:
            raise RingTimeout(f"nobody has taken all messages from ring {ring.name!r} within the timeout")
        time.sleep(OPEN_AGAIN)


def _pieces(stream: IO[bytes], options: argparse.Namespace) -> Iterator[bytes]:
    """The messages that a stream is made of."""
    if options.raw:
        return iter([stream.read()])
    if options.size:
        return iter(lambda: stream.read(options.size), b"")
    return split(stream, b"\0" if options.null else b"\n")


def split(stream: Any, separator: bytes) -> Iterator[bytes]:
    """What is between separators, as soon as it is there; after the last one only if there is something."""
    parts: list[bytes] = []
    while True:
        chunk = stream.read1(CHUNK)
        if not chunk:
            break
        first, *more = chunk.split(separator)
        parts.append(first)
        if more:
            yield b"".join(parts)
            yield from more[:-1]
            parts = [more[-1]]
    rest = b"".join(parts)
    if rest:
        yield rest


def run_recv(options: argparse.Namespace) -> int:
    """Messages to stdout."""
    put = _putter(options)
    ring, made = _open_ring(options)
    timeout = 0.0 if options.drain else options.timeout
    got, came, since = 0, False, time.perf_counter()
    with ring:
        before = 0 if made else _lanes_used(ring)
        while got != options.number:
            patience, gone = timeout, False
            if options.eof:
                alive = ring.writers_alive() > 0  # before the look: what they wrote is there then
                came = came or alive or got > 0 or _lanes_used(ring) > before  # one may have come and gone meanwhile
                gone = came and not alive
                patience = 0.0 if gone else WRITERS_GONE if timeout is None else min(timeout, WRITERS_GONE)
            try:
                _take(ring, put, patience)
            except MessagesLost as error:
                _tell(str(error))
                continue
            except RingTimeout as error:
                if gone:
                    break
                if options.eof and (timeout is None or time.perf_counter() - since < timeout):
                    continue
                if not options.drain and not got:
                    _tell(str(error))
                return NOTHING if options.number or not got else DONE
            got, since = got + 1, time.perf_counter()
    return DONE


def _lanes_used(ring: Ring) -> int:
    """How many lanes have ever had a writer."""
    segment = ring._segment
    return segment.map[segment.layout.used_offset : segment.layout.used_offset + segment.layout.writers].count(1)


def _take(ring: Ring, put: Callable[[Any], None], timeout: float | None) -> None:
    """Take a message out once it has been written: if nobody reads the output any more, it stays in the ring."""
    borrowed = ring.borrow(timeout=timeout)
    with borrowed as message:
        try:
            put(message)
        except OSError:
            borrowed._request.given = False  # as if it had never been handed out
            raise


def _putter(options: argparse.Namespace) -> Callable[[Any], None]:
    """What writes a message to stdout, and does not keep it there."""
    out, end = sys.stdout.buffer, b"" if options.raw else b"\0" if options.null else b"\n"

    def put(message: Any) -> None:
        written = 0
        while written < len(message):
            # With `python -u` this is the pipe itself, which takes a part before it says that nobody reads it.
            with memoryview(message)[written:] as rest:
                written += out.write(rest)
        out.write(end)
        out.flush()

    return put


def _open_ring(options: argparse.Namespace) -> tuple[Ring, bool]:
    """The ring of that name, and whether it is a new one."""
    while options.create:
        with contextlib.suppress(FileExistsError):
            how: dict[str, Any] = {"readers": "broadcast", "lag": options.broadcast} if options.broadcast else {}
            if options.compete:
                how = {"readers": "compete"}
            return Ring.create(options.name, options.capacity, writers=options.writers, keep=options.keep, **how), True
        with contextlib.suppress(FileNotFoundError):  # it has gone in between
            return Ring.open(options.name, any_owner=options.any_owner), False
        time.sleep(OPEN_AGAIN)
    return Ring.open(options.name, timeout=options.wait, any_owner=options.any_owner), False


# ---------------------------------------------------------------- tidying up


def run_rm(options: argparse.Namespace) -> int:
    """Remove names."""
    code = DONE
    for name in options.names:
        try:
            if options.force:
                unlink(name)
                continue
            state = examine(name)["state"]
            if not os_backend.collect(name, True):
                refused = {"no ring": "is no ring", "no access": "belongs to another user"}
                raise Failure(f"ring {name!r} {refused.get(state, 'is open')}; --force removes its name all the same")
        except (Failure, RingError, OSError) as error:
            _tell(said(error))
            code = FAILED
    return code


def run_gc(options: argparse.Namespace) -> int:
    """Remove what nobody has any more."""
    if sys.platform == "win32":
        if options.json:
            show({"removed": [], "strays": [], "dry_run": options.dry_run})
        else:
            print("nothing to remove: on Windows a ring goes with the last process that has it open")
        return DONE
    removed, code = [], DONE
    states = {"abandoned", "kept"} if options.kept else {"abandoned"}
    for name, facts in examine_all(os_backend.names()).items():
        try:
            # Whether somebody has come meanwhile is seen under the lock that a new ring's creator would take.
            if facts["state"] in states and (options.dry_run or os_backend.collect(name, options.kept)):
                removed.append(name)
        except OSError as error:
            _tell(said(error))
            code = FAILED
    strays = os_backend.strays(options.dry_run)
    if options.json:
        show({"removed": removed, "strays": strays, "dry_run": options.dry_run})
        return code
    verb = "would remove" if options.dry_run else "removed"
    for what in [*(f"ring {name}" for name in removed), *strays]:
        print(f"{verb} {what}")
    return code


def run_doctor(options: argparse.Namespace) -> int:
    """What this machine supports."""
    found = list(checks())
    failed = any(check.status == FAIL for check in found)
    if options.json:
        show({"ok": not failed, "checks": [check._asdict() for check in found]})
        return FAILED if failed else DONE
    for check in found:
        print(f"{check.status:<5} {check.what:<14} {check.found}")
        if check.advice:
            print(f"{'':20} {check.advice}")
    return FAILED if failed else DONE


# ---------------------------------------------------------------- the command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; `run` of it is the command's function."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Rings in shared memory: see what goes on in them, use them in a shell, tidy up.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], what: str, more: str = "") -> Any:
        made = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}. {more}".strip(),
            epilog=CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    as_json = "print JSON, for programs"
    ls = command("ls", run_ls, "list all rings", "What cannot be read, or is none, is listed with what is known.")
    ls.add_argument("--interval", type=seconds, default=RATE, metavar="SECONDS",
                    help=f"look twice, so far apart, for the rates ({RATE}); 0: once, without them")  # fmt: skip
    ls.add_argument("--json", action="store_true", help=as_json)

    stat = command("stat", run_stat, "tell everything about a ring", "Nobody who uses the ring notices.")
    stat.add_argument("name", type=ring_name, metavar="NAME")
    stat.add_argument("--watch", action="store_true", help="again and again, until the ring has gone")
    stat.add_argument("--interval", type=seconds, metavar="SECONDS",
                      help=f"between two looks, for the rates ({RATE}; with --watch 1)")  # fmt: skip
    stat.add_argument("--count", type=positive, metavar="N", help="with --watch: so often, and no more")
    stat.add_argument("--json", action="store_true", help=f"{as_json}; with --watch a line each time")

    tail = command(
        "tail", run_tail, "show messages without taking them",
        "The reader goes on meanwhile: what it\n"
        "has taken before it could be shown is counted, and said on stderr in the end. Of a ring that\n"
        "broadcasts it is one more reader: it shows what comes, until Ctrl-C.",
    )  # fmt: skip
    tail.add_argument("name", type=ring_name, metavar="NAME")
    tail.add_argument("-n", "--number", type=natural, default=10, metavar="N",
                      help="the last N messages of each writer's lane (10)")  # fmt: skip
    tail.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until the ring has gone")
    _add_framing(tail, "write messages one after the other, with nothing in between", "end messages with a zero byte")

    send = command(
        "send", run_send, "write messages",
        "Without MESSAGE they are the lines of stdin. They are\n"
        "read in this order; there is none between several writers, which is what two `send` are.\n\n"
        "A ring goes with the last process that has it open, unless it is kept, and so do its\n"
        "messages. Who makes one by --create, without --keep, stays until all are taken.",
    )  # fmt: skip
    send.add_argument("name", type=ring_name, metavar="NAME")
    send.add_argument("messages", nargs="*", metavar="MESSAGE")
    framing = _add_framing(send, "all of stdin is one message", "messages end with a zero byte, not with a line")
    framing.add_argument("--size", type=size, metavar="BYTES", help="messages have so many bytes; the last, the rest")
    send.add_argument("--timeout", type=seconds, metavar="SECONDS", help="to wait for room, at most")
    _add_opening(send)

    recv = command(
        "recv", run_recv, "take messages out, and print them",
        "It goes on until Ctrl-C, or as said below.\n\n"
        "A message is out of the ring when it has been written to stdout. What a pipe holds is lost\n"
        "if nobody reads it: `recv NAME -n 1` takes one, `recv NAME | head -n 1` may take more.",
    )  # fmt: skip
    recv.add_argument("name", type=ring_name, metavar="NAME")
    recv.add_argument("-n", "--number", type=positive, metavar="N", help="end after N messages")
    ending = recv.add_mutually_exclusive_group()
    ending.add_argument("--timeout", type=seconds, metavar="SECONDS", help="end when nothing has come for so long")
    ending.add_argument("--drain", action="store_true", help="take what is there, and end")
    eof = "end as a pipe does: when writers have been there, all have gone, and all is taken"
    recv.add_argument("--eof", action="store_true", help=eof)
    _add_framing(recv, "write messages one after the other, with nothing in between", "end messages with a zero byte")
    _add_opening(recv)

    rm = command("rm", run_rm, "remove rings", "A ring that somebody has open stays.")
    rm.add_argument("names", type=ring_name, nargs="+", metavar="NAME")
    rm.add_argument("--force", action="store_true", help="remove the name all the same; who has it open goes on")

    gc = command("gc", run_gc, "remove what killed processes left", "Nobody has it, by the kernel's word.")
    gc.add_argument("--kept", action="store_true", help="also rings that are to be kept, with their messages")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--json", action="store_true", help=as_json)

    doctor = command("doctor", run_doctor, "tell what this machine supports", "Exit code 1: rings do not work here.")
    doctor.add_argument("--json", action="store_true", help=as_json)

    options, rest = parser.parse_known_args(arguments)
    if options.run is run_send:
        # Up to CPython 3.12 argparse leaves over what comes after an option: `send NAME --create MESSAGE`.
        at = rest.index("--") if "--" in rest else len(rest)
        if not any(word.startswith("-") and word != "-" for word in rest[:at]):
            options.messages, rest = [*options.messages, *rest[:at], *rest[at + 1 :]], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.run is run_stat and options.interval is None:
        options.interval = 1.0 if options.watch else RATE
    if options.run is run_send and options.messages and (options.raw or options.null or options.size):
        parser.error("send: --raw, --null and --size are for what comes from stdin")
    return options


def _add_framing(parser: Any, raw: str, null: str) -> Any:
    framing = parser.add_mutually_exclusive_group()
    framing.add_argument("--raw", action="store_true", help=raw)
    framing.add_argument("-0", "--null", action="store_true", help=null)
    return framing


def _add_opening(parser: Any) -> None:
    parser.add_argument("--wait", type=seconds, default=0.0, metavar="SECONDS", help="for the ring to be there")
    parser.add_argument("--any-owner", action="store_true", help="trust a ring of another user")
    making = parser.add_argument_group("if there is no such ring")
    making.add_argument("--create", action="store_true", help="make it")
    making.add_argument("--capacity", type=size, default=1 << 20, metavar="BYTES", help="of each lane (1M)")
    making.add_argument("--writers", type=positive, default=64, metavar="N", help="lanes (64)")
    making.add_argument("--keep", action="store_true", help="it stays, with its messages, until `rm`")
    several = making.add_mutually_exclusive_group()
    several.add_argument("--compete", action="store_true", help="several readers; one of them gets each message")
    several.add_argument("--broadcast", choices=_layout.LAGS, help="each reader gets all; who lags blocks, or loses")


def ring_name(text: str) -> str:
    """An argument that is a ring's name."""
    try:
        return _layout.check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """An argument that is a time."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds, not {text!r}")
    return number


def natural(text: str) -> int:
    """An argument that is a number from 0 on."""
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"a number from 0 on, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An argument that is a number from 1 on."""
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("a number from 1 on, not 0")
    return number


def size(text: str) -> int:
    """An argument that is a number of bytes: 4096, 64K, 1M, 2G."""
    power = "KMG".find(text[-1:].upper()) + 1 if text else 0
    with contextlib.suppress(argparse.ArgumentTypeError):
        return positive(text[:-1] if power else text) << 10 * power
    raise argparse.ArgumentTypeError(f"a number of bytes from 1 on (4096, 64K, 1M, 2G), not {text!r}")


def _tell(what: str) -> None:
    if sys.stderr is not None:  # it was closed
        print(f"shmring: {what}", file=sys.stderr)


def _leave_stdout() -> None:
    """Nobody reads it any more. The interpreter flushes it once more at its end, and would complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments ask for, and return the exit code."""
    options = parse(arguments)
    if sys.stdout is None:  # it was closed
        _tell("there is no stdout to write to")
        return FAILED
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Failure, RingError, OSError, NotImplementedError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in UNREAD and error.filename is None:
            _leave_stdout()
            return CLOSED
        _tell(said(error))
        return FAILED
