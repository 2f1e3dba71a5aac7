"""What is known about rings by looking at them: as facts for programs, and as text for people."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from . import _layout
from ._backend import Look, os_backend
from ._errors import RingError
from ._looking import joined_slots, lanes_used, survey

MACHINES: Final = {1: "x86-64", 2: "arm64"}

FACTS: Final = (
    "name", "state", "problem", "where", "owner", "mode", "layout_version", "machine", "kept", "nonce", "size_bytes",
    "memory_bytes", "capacity_bytes", "max_message_bytes", "lanes", "writers_alive", "readers_alive", "writers_parked",
    "readers_parked", "writer_parks", "reader_parks", "messages", "messages_in", "messages_out", "bytes_in",
    "bytes_out", "fill",
)  # fmt: skip
RATES: Final = ("messages_in", "messages_out", "bytes_in", "bytes_out")


def examine(name: str, each_lane: bool = False) -> dict[str, Any]:
    """What can be told about a ring by looking at it. What cannot is None, and `problem` says why.

    Its `state`: "open"; "kept", which nobody has open; "abandoned" by processes that were killed, which counts as not
    there; "no ring"; "no access".

    Raises:
        FileNotFoundError: There is nothing of this name, or not any more.
    """
    facts: dict[str, Any] = dict.fromkeys(FACTS)
    facts["name"] = name
    try:
        look: Look = os_backend.Look(name)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        return {**facts, "state": "no access", "problem": said(error)}
    except OSError as error:
        return {**facts, "state": "no ring", "problem": said(error)}
    with contextlib.closing(look):
        mode = None if look.mode is None else f"{look.mode:04o}"
        facts.update(where=look.where, owner=look.owner, mode=mode, size_bytes=look.size, memory_bytes=look.memory)
        outline = _layout.outline(look.header)
        if outline is None:
            return {**facts, "state": "no ring", "problem": "it does not begin as a ring does"}
        version, machine, size = outline
        kept = _layout.is_kept(look.header)
        facts.update(layout_version=version, machine=MACHINES.get(machine, f"of kind {machine}"), kept=kept)
        facts["size_bytes"] = size if look.size is None else look.size
        facts["state"] = "open" if look.is_open() else "kept" if kept else "abandoned"
        try:
            layout = _layout.parse_header(look.header, look.size, os_backend.MACHINE, name)
            look.attach(layout, layout.lanes_offset)
        except (RingError, OSError, ValueError) as error:  # mmap's ValueError: it was truncated just now
            facts["problem"] = said(error)
            return facts
        facts.update(_contents(look))
        if each_lane:
            facts["each_lane"] = _each_lane(look)
        return facts


def _contents(look: Look) -> dict[str, Any]:
    layout, seen = look.layout, survey(look)
    put, taken = sum(seen.put), sum(seen.taken)
    return {
        "nonce": layout.nonce.hex(),
        "capacity_bytes": layout.capacity,
        "max_message_bytes": layout.max_message,
        "lanes": layout.writers,
        "writers_alive": look.claimed(_layout.LANE, layout.writers),
        "readers": layout.readers,
        "max_readers": layout.slots,
        "lag": "drop" if layout.drop else "block",
        "readers_alive": len(joined_slots(look)) if layout.broadcast else look.claimed(_layout.READER, layout.slots),
        "writers_parked": sum(seen.writers_parked),
        "readers_parked": seen.readers_parked,
        "writer_parks": sum(seen.writer_parks),
        "reader_parks": seen.reader_parks,
        "messages": max(0, put - taken),
        "messages_in": put,
        "messages_out": taken,
        "bytes_in": sum(seen.written),
        "bytes_out": sum(seen.read),
        "fill": round(seen.fill(layout), 4),
    }


def _each_lane(look: Look) -> list[dict[str, Any]]:
    """Those that were ever claimed, and so have memory."""
    seen, capacity = survey(look), look.layout.capacity
    return [
        {
            "lane": lane,
            "writer_alive": bool(look.claimed(_layout.LANE + lane, 1)),
            "messages_in": seen.put[lane],
            "messages_out": seen.taken[lane],
            "bytes_in": seen.written[lane],
            "bytes_out": seen.read[lane],
            "fill": round(min(1.0, max(0, seen.written[lane] - seen.read[lane]) / capacity), 4),
            "parked": bool(seen.writers_parked[lane]),
            "parks": seen.writer_parks[lane],
        }
        for lane in range(lanes_used(look))
    ]


def with_rates(before: dict[str, Any] | None, after: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The later of two looks, with what happened in between by the second; None if they were not at the same ring."""
    same = before is not None and before["nonce"] == after["nonce"] is not None and seconds > 0
    for what in RATES:
        after[f"{what}_per_s"] = round((after[what] - before[what]) / seconds, 1) if before and same else None
    return after


def examine_all(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rings of these names that are there, by name."""
    found = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found[name] = examine(name)
    return found


def said(error: BaseException) -> str:
    """An error in a line, without its number."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
        filename = error.filename
        return f"{reason}: {filename}" if filename is not None and str(filename) not in reason else reason
    return str(error) or type(error).__name__


# ---------------------------------------------------------------- for people to read


def quantity(number: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 1.23k, or with a unit of bytes 1.2 MiB."""
    if number is None:
        return "?"
    step, prefixes = (1024, ("", "Ki", "Mi", "Gi", "Ti")) if unit == "B" else (1000, ("", "k", "M", "G", "T"))
    power = min(len(prefixes) - 1, int(math.log(max(1.0, number), step) + 1e-9))
    scaled = number / step**power
    digits = 0 if scaled == int(scaled) or scaled >= 100 else 1 if scaled >= 10 or unit == "B" else 2
    return f"{scaled:,.{digits}f}{' ' * bool(unit)}{prefixes[power]}{unit}"


def _plain(value: Any) -> str:
    return "?" if value is None else f"{value:,}"


def _percent(fill: float | None) -> str:
    return "?" if fill is None else f"{100 * fill:.0f}%" if fill == 0 or fill >= 0.1 else f"{100 * fill:.1f}%"


def _condition(facts: dict[str, Any]) -> str:
    """State and problem in a few words."""
    state, problem = facts["state"], facts["problem"]
    if problem is None or facts["layout_version"] is None:
        return str(state)
    if facts["layout_version"] != _layout.LAYOUT_VERSION:
        return f"{state}, layout version {facts['layout_version']}"
    if facts["machine"] != MACHINES[_layout.MACHINES[os_backend.MACHINE]]:
        return f"{state}, machine {facts['machine']}"
    return f"{state}, damaged"


def table(rows: list[list[str]], left: Sequence[int]) -> str:
    """Lines with aligned columns; those in `left` begin together, the others end together."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def list_of_rings(rings: Iterable[dict[str, Any]], rates: bool) -> str:
    """What `ls` prints."""
    rows = [["NAME", "SIZE", "LANES", "WRITERS", "READERS", "FILL", "MESSAGES", "IN/s", "OUT/s", "STATE"]]
    for facts in rings:
        counts = [_plain(facts[what]) for what in ("lanes", "writers_alive", "readers_alive")]
        row = [facts["name"], quantity(facts["size_bytes"], "B"), *counts, _percent(facts["fill"])]
        row += [_plain(facts["messages"])]
        row += [quantity(facts.get(f"messages_{way}_per_s")) for way in ("in", "out")]
        rows.append([*row, _condition(facts)])
    if not rates:
        for row in rows:
            del row[7:9]
    return table(rows, left=(0, len(rows[0]) - 1))


def account_of_ring(facts: dict[str, Any]) -> str:
    """What `stat` prints."""
    mode = "" if facts["mode"] is None else f", mode {facts['mode']} of {_user(facts['owner'])}"
    lines = [
        f"{facts['name']}: {facts['state']}{', to be kept' if facts['kept'] and facts['state'] != 'kept' else ''}{mode}"
    ]

    def line(what: str, value: str) -> None:
        lines.append(f"  {what:<9} {value}")

    for what in ("where", "problem"):
        if facts[what] is not None:
            line(what, facts[what])
    if facts["layout_version"] is not None:
        line("layout", f"version {facts['layout_version']}, machine {facts['machine']}")
    taken = "" if facts["memory_bytes"] is None else f", of which {quantity(facts['memory_bytes'], 'B')} have memory"
    line("size", quantity(facts["size_bytes"], "B") + taken)
    if facts["nonce"] is None:
        return "\n".join(lines)
    most = f"messages of up to {facts['max_message_bytes']:,} bytes"
    line("lanes", f"{facts['lanes']:,} of {quantity(facts['capacity_bytes'], 'B')}, {most}")
    for side in ("writer", "reader"):
        alive, parked, parks = (facts[f"{side}{what}"] for what in ("s_alive", "s_parked", "_parks"))
        line(f"{side}s", f"{alive:,} alive, {parked:,} asleep; fell asleep {parks:,} times in all")
    line("messages", f"{facts['messages']:,} there; {facts['messages_in']:,} in, {facts['messages_out']:,} out")
    there = facts["bytes_in"] - facts["bytes_out"]
    line("bytes", f"{max(0, there):,} there; {facts['bytes_in']:,} in, {facts['bytes_out']:,} out")
    line("fill", f"{_percent(facts['fill'])} of the fullest lane")
    if facts.get("messages_in_per_s") is not None:
        for way in ("in", "out"):
            messages, nbytes = facts[f"messages_{way}_per_s"], facts[f"bytes_{way}_per_s"]
            line(way, f"{quantity(messages)} messages/s, {quantity(nbytes, 'B')}/s")
    if facts.get("each_lane"):
        rows = [["  lane", "writer", "messages", "in", "out", "fill", "parked", "times"]]
        for lane in facts["each_lane"]:
            put, taken_out = lane["messages_in"], lane["messages_out"]
            row = [f"  {lane['lane']}", "alive" if lane["writer_alive"] else "-", _plain(max(0, put - taken_out))]
            row += [_plain(put), _plain(taken_out), _percent(lane["fill"])]
            rows.append([*row, "yes" if lane["parked"] else "-", _plain(lane["parks"])])
        lines.append(table(rows, left=(0, 1)))
    return "\n".join(lines)


def _user(number: int) -> str:
    if sys.platform != "win32":
        import pwd

        with contextlib.suppress(KeyError):
            return pwd.getpwuid(number).pw_name
    return f"user {number}"
