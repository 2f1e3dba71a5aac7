"""`python -m shmring`: what it says is so, who is looked at does not notice, and shells get what they expect."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DARWIN, DEADLINE, KILLED, ROOT, WINDOWS, wait_until
from support import kill_yourself, popen

from shmring import Ring, RingTimeout, _cli, _doctor, _layout, _view
from shmring._backend import os_backend

LINUX = sys.platform == "linux" and not DARWIN

needs_kept = pytest.mark.skipif(WINDOWS, reason="rings cannot be kept here")
needs_files = pytest.mark.skipif(not LINUX, reason="rings are no files in a folder that everybody has, here")
needs_signals = pytest.mark.skipif(WINDOWS, reason="Ctrl-C cannot be sent to one process here")


@pytest.fixture
def run(capsysbinary):
    """Run the command line in this process; its exit code, what it printed, and what it said on stderr."""

    def run(*args):
        try:
            code = _cli.main([str(arg) for arg in args])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsysbinary.readouterr()
        return code, out.replace(b"\r\n", b"\n"), err.decode()

    return run


@pytest.fixture
def stdin(monkeypatch):
    """Give it a standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def start(children):
    """Start the command line in a process of its own, with pipes for bytes."""

    def start(*args, **kwargs):
        begin = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import support; " if DARWIN else ""
        code = f"{begin}import sys; from shmring._cli import main; sys.exit(main(sys.argv[1:]))"
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = popen([sys.executable, "-c", code, *map(str, args)], env=env, **pipes)
        children._others.append(process)
        return process

    return start


@pytest.fixture
def apart(monkeypatch, name):
    """A folder of its own for rings: what others have is not to be removed, nor to be seen."""
    if not LINUX:
        yield  # the stand-in's folder is the tests' own already
        return
    folder = Path("/dev/shm") / f"shmring-{name}"
    folder.mkdir()
    monkeypatch.setattr(os_backend, "DIRECTORY", str(folder))
    yield folder
    for entry in folder.iterdir():
        entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    folder.rmdir()


def facts_of(run, name):
    code, out, err = run("stat", name, "--json", "--interval", 0)
    assert (code, err) == (0, "")
    return json.loads(out)


def leave(children, name, keep=False):
    """What a crash of everybody leaves, with a message in it."""

    def create_and_die():
        ring = Ring.create(name, 4096, writers=2, keep=keep)
        ring.write(b"left")
        kill_yourself()

    assert children.join(children.start(create_and_die)) == KILLED


# ---------------------------------------------------------------- ls and stat


def test_ls_and_stat_say_what_a_ring_is_like(run, name):
    with Ring.create(name, 4096, writers=3) as ring, Ring.open(name) as other:
        for number in range(3):
            other.write(b"x" * (number + 1000))
        ring.read()
        facts = facts_of(run, name)
        expected = {
            "name": name, "state": "open", "problem": None, "layout_version": _layout.LAYOUT_VERSION, "kept": False,
            "lanes": 3, "writers_alive": 1, "readers_alive": 1, "messages": 2, "messages_in": 3, "messages_out": 1,
            "bytes_in": ring.stats().bytes_in, "bytes_out": ring.stats().bytes_out, "capacity_bytes": 4096,
            "size_bytes": ring._segment.layout.segment_bytes, "max_message_bytes": ring.max_message,
            "mode": None if WINDOWS else "0600", "fill": round(ring.stats().fill, 4),
        }  # fmt: skip
        assert {what: facts[what] for what in expected} == expected
        assert facts["machine"] in ("x86-64", "arm64") and facts["messages_in_per_s"] is None
        assert [lane["messages_in"] for lane in facts["each_lane"]] == [3] and facts["each_lane"][0]["writer_alive"]

        code, out, _ = run("ls", "--json", "--interval", 0)
        (listed,) = [each for each in json.loads(out)["rings"] if each["name"] == name]
        assert code == 0 and all(facts[what] == listed[what] for what in listed)

        code, out, _ = run("ls", "--interval", 0)
        (line,) = [line for line in out.decode().splitlines() if line.split()[0] == name]
        assert line.split()[-6:] == ["3", "1", "1", _view._percent(facts["fill"]), "2", "open"]
        code, out, _ = run("stat", name)
        for told in (f"{name}: open", "3 of 4 KiB", "1 alive", "2 there; 3 in, 1 out", " messages/s", "lane"):
            assert told in out.decode()


def test_rates_are_of_what_happened_between_two_looks_at_the_same_ring(run, name, monkeypatch):
    with Ring.create(name, 4096) as ring:

        now = 0.0

        def meanwhile(seconds):
            nonlocal now
            now += seconds
            ring.write_many([b"x" * 8] * 10)
            ring.read()

        monkeypatch.setattr(_cli, "time", SimpleNamespace(sleep=meanwhile, perf_counter=lambda: now))
        for command in (["ls"], ["stat", name]):
            document = json.loads(run(*command, "--json", "--interval", 0.5)[1])
            (facts,) = [each for each in document.get("rings", [document]) if each["name"] == name]
            assert (facts["messages_in_per_s"], facts["messages_out_per_s"]) == (20, 2)
            assert (facts["bytes_in_per_s"], facts["bytes_out_per_s"]) == (320, 32)
        monkeypatch.undo()
    before = {**dict.fromkeys(_view.RATES, 0), "nonce": "of another one"}
    after = _view.with_rates(before, {**before, "nonce": "of this one"}, 1.0)
    assert after["messages_in_per_s"] is None


def test_who_is_looked_at_does_not_notice(run, name, monkeypatch):
    """No byte changes, no role is taken, nobody is present who was not, and no lock is taken for a moment."""
    with Ring.create(name, 4096, writers=2) as ring:
        ring.write_many([b"one", b"two"])
        before = ring._segment.map[:]
        asked = []
        if LINUX:
            fcntl = os_backend.fcntl

            def watched(fd, command, *args):
                asked.append(command)
                return real(fd, command, *args)

            real = fcntl.fcntl
            monkeypatch.setattr(fcntl, "fcntl", watched)
            locks = Path("/proc/locks").read_text()
        for command in (["ls"], ["stat", name], ["stat", name, "--json"], ["tail", name], ["rm", name]):
            assert run(*command)[0] == (command[0] == "rm")
        monkeypatch.undo()
        assert ring._segment.map[:] == before
        assert (ring.writers_alive(), ring.readers_alive()) == (1, 0)
        if LINUX:
            inode = f":{os.stat(os_backend._path(name)).st_ino} "
            ours = [[line.split(" ", 1)[1] for line in text.splitlines() if inode in line]
                    for text in (locks, Path("/proc/locks").read_text())]  # fmt: skip
            assert ours[0] == ours[1] and ours[0]
            looks = asked.index(fcntl.F_OFD_SETLK) if fcntl.F_OFD_SETLK in asked else len(asked)
            assert looks >= 12 and set(asked[:looks]) == {fcntl.F_OFD_GETLK}, "`rm` alone, the last, asks for a lock"
        with Ring.open(name) as other:
            assert other.read_many() == [b"one", b"two"]


def test_a_ring_goes_with_its_last_handle_also_while_somebody_watches(start, name):
    with Ring.create(name, 4096):
        watching = start("stat", name, "--watch", "--interval", 0.01, "--json")
        for _ in range(3):
            assert json.loads(watching.stdout.readline())["state"] == "open"
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    _, err = watching.communicate(timeout=DEADLINE)
    assert (watching.returncode, err) == (0, b"")


def test_watching_ends_after_so_many_looks_and_prints_a_line_for_each(run, name):
    with Ring.create(name, 4096):
        code, out, _ = run("stat", name, "--watch", "--count", 3, "--interval", 0, "--json")
        assert code == 0 and [json.loads(line)["name"] for line in out.splitlines()] == [name] * 3
        code, out, _ = run("stat", name, "--watch", "--count", 2, "--interval", 0.01)
        assert out.count(b": open") == 2 and b"\033" not in out, "escape sequences are for terminals"


def test_a_ring_that_goes_while_the_list_is_made_is_left_out(run, name, monkeypatch):
    ring = Ring.create(name, 4096)
    monkeypatch.setattr(os_backend, "names", lambda: [name, f"{name}-never"])
    assert [each["name"] for each in json.loads(run("ls", "--json", "--interval", 0)[1])["rings"]] == [name]
    monkeypatch.setattr(_cli.time, "sleep", lambda seconds: ring.close())
    assert json.loads(run("ls", "--json")[1]) == {"rings": []}
    code, out, err = run("stat", name)
    assert (code, out) == (1, b"") and err == f"shmring: there is no ring of this name: {name}\n"


def test_a_ring_that_loses_its_name_while_it_is_looked_at_is_told_of_as_it_was(run, name, monkeypatch):
    with Ring.create(name, 4096) as ring:
        real = os_backend.Look.attach

        def attach(look, *args):
            ring.unlink()
            return real(look, *args)

        monkeypatch.setattr(os_backend.Look, "attach", attach)
        assert facts_of(run, name)["state"] == "open"
        assert run("stat", name)[0] == 1


def test_what_is_no_ring_or_a_damaged_one_is_listed_as_that_and_the_others_with_it(run, name, apart, children):
    if not LINUX:
        pytest.skip("rings are no files here")
    header = {}
    with Ring.create(name, 4096, writers=1) as ring:
        whole = Path(os_backend._path(name)).read_bytes()

        def patched(*changes):
            changed = bytearray(whole)
            for offset, data in changes:
                changed[offset : offset + len(data)] = data
            struct.pack_into("=Q", changed, 120, zlib.crc32(changed[:120]))
            return bytes(changed)

        made = {
            "empty": (b"", "no ring"),
            "garbage": (b"garbage" * 1000, "no ring"),
            "short": (whole[:20], "no ring"),
            "header-alone": (whole[:512], "abandoned, damaged"),
            "cut": (whole[:-1], "abandoned, damaged"),
            "longer": (whole + b"x", "abandoned, damaged"),
            "older": (patched((8, b"\2")), "abandoned, layout version 2"),
            "newer": (patched((8, b"\x63")), "abandoned, layout version 99"),
            "newer-kept": (patched((8, b"\x63"), (48, b"\1")), "kept, layout version 99"),
            "foreign": (patched((12, b"\2")), "abandoned, machine arm64"),
            "stranger": (patched((12, b"M")), "abandoned, machine of kind 77"),
            "checksum": (whole[:24] + b"x" + whole[25:], "abandoned, damaged"),
            "lanes": (patched((32, bytes(4))), "abandoned, damaged"),
            "words": (patched((512, b"\xff" * 16), (ring._segment.layout.used_offset, b"\1")), "abandoned"),
        }
        for each, (data, _) in made.items():
            (apart / f"shmring.{each}").write_bytes(data)
        (apart / "shmring.folder").mkdir()
        os.mkfifo(apart / "shmring.fifo")
        (apart / "shmring.link").symlink_to(os_backend._path(name))
        (apart / "shmring.a name").write_bytes(whole)  # no ring can have it
        expected = {each: state for each, (_, state) in made.items()}
        expected.update(dict.fromkeys(("folder", "fifo", "link"), "no ring"), **{name: "open"})

        before = {entry: entry.read_bytes() for entry in apart.iterdir() if entry.is_file()}
        code, out, err = run("ls", "--interval", 0)
        rows = [line.split() for line in out.decode().splitlines()[1:]]
        assert (code, err) == (0, "") and len(rows) == len(expected)
        assert {row[0]: re.search(r"\S+(?:, .*)?$| no ring$", " ".join(row))[0].strip() for row in rows} == {
            each: "no ring" if state == "no ring" else state for each, state in expected.items()
        }
        for each in expected:
            facts = facts_of(run, each)
            header[each] = facts["layout_version"], facts["kept"], facts["size_bytes"]
            assert (facts["problem"] is None) == (expected[each] in ("open", "abandoned"))
            assert run("stat", each, "--interval", 0)[0] == 0
            code, out, err = run("tail", each)
            assert code == (each != name), err
            assert out == b"" and (each == name or err.startswith("shmring: ")) and err.count("\n") == (each != name)
        assert header["older"] == (2, False, len(whole)) and header["newer-kept"][:2] == (99, True)
        assert before == {entry: entry.read_bytes() for entry in apart.iterdir() if entry.is_file()}
        removed = json.loads(run("gc", "--json")[1])["removed"]
        assert removed == sorted(each for each, state in expected.items() if state.startswith("abandoned"))
        left = {entry.name.partition(".")[2] for entry in apart.iterdir()}
        assert left == {*expected, "a name"} - set(removed)
        ring.write(b"it goes on")
        assert ring.read() == b"it goes on"


@needs_files
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can play another user")
def test_another_users_ring_is_listed_and_its_contents_are_not_known(run, name, children):
    with Ring.create(name, 4096):

        def as_another():
            os.setuid(65534)
            assert _view.examine(name)["state"] == "no access"
            assert _view.examine_all(os_backend.names())[name]["lanes"] is None
            assert _cli.main(["rm", name]) == 1 and not os_backend.collect(name, True)

        assert children.join(children.fork(as_another)) == 0


# ---------------------------------------------------------------- a ring that broadcasts


def test_a_ring_that_broadcasts_is_made_sent_to_received_from_and_told_of(run, start, name):
    receiver = start("recv", name, "--create", "--broadcast", "drop", "--capacity", "4096", "-n", "3")
    with Ring.open(name, timeout=DEADLINE) as ring:
        assert ring.wait_for_reader(DEADLINE)
        facts = json.loads(run("stat", name, "--json")[1])
        told = [facts[what] for what in ("readers", "max_readers", "lag", "readers_alive")]
        assert told == ["broadcast", 8, "drop", 1]
        assert run("send", name, "1", "2", "3") == (0, b"", "")
        assert receiver.communicate(timeout=DEADLINE) == (b"1\n2\n3\n", b"")
        ring.join()
        for number in range(1000):
            ring.write(b"%08d" % number)
        code, out, err = run("recv", name, "--drain")
        assert (code, out) == (3, b"") and err == ""  # it joined just now
        stats = ring.stats()
        assert (stats.readers, stats.messages_in, stats.messages_out) == (1, 1003, 3)


def test_receivers_that_compete_share_what_is_sent(run, start, name):
    receivers = [start("recv", name, "--create", "--compete", "--capacity", "4096", "-n", "1") for _ in range(3)]
    with Ring.open(name, timeout=DEADLINE) as ring:
        wait_until(lambda: ring.readers_alive() == 3, "the readers")
        facts = json.loads(run("stat", name, "--json")[1])
        assert [facts[what] for what in ("readers", "max_readers", "readers_alive")] == ["compete", 8, 3]
        assert run("send", name, "1", "2", "3") == (0, b"", "")
        assert sorted(receiver.communicate(timeout=DEADLINE) for receiver in receivers) == [
            (b"1\n", b""), (b"2\n", b""), (b"3\n", b"")
        ]  # fmt: skip
        ring.write(b"seen, not taken")
        assert run("tail", name) == (0, b"seen, not taken\n", "")
        assert ring.read(timeout=0) == b"seen, not taken"


def test_recv_says_what_was_lost_and_goes_on(run, name, monkeypatch):
    with Ring.create(name, 4096, readers="broadcast", lag="drop") as ring:
        borrow = Ring.borrow

        def lagging(self, *, timeout):
            self.join()
            if not ring.stats().messages_in:
                for number in range(1000):
                    ring.write(b"%08d" % number)
            return borrow(self, timeout=timeout)

        monkeypatch.setattr(Ring, "borrow", lagging)
        code, out, err = run("recv", name, "--drain")
        lost = int(re.fullmatch(r"shmring: (\d+) messages of lane 0 .* overwritten before they were read\n", err)[1])
        assert code == 0 and out == b"".join(b"%08d\n" % number for number in range(lost, 1000))


def test_tail_is_one_more_reader_of_a_ring_that_broadcasts(start, name):
    with Ring.create(name, 4096, readers="broadcast") as ring:
        ring.write(b"before")
        tail = start("tail", name)
        assert ring.wait_for_reader(DEADLINE)
        ring.write(b"after")
        assert tail.stdout.readline().rstrip() == b"after"
        tail.kill()
        tail.communicate(timeout=DEADLINE)


# ---------------------------------------------------------------- tail


def test_tail_shows_the_last_messages_of_each_lane_and_takes_none(run, name):
    with Ring.create(name, 8192) as ring, Ring.open(name) as other:
        for number in range(20):
            ring.write(b"%d" % number)
        other.write(b"of another lane\0\n")
        for args, expected in {
            ("-n", "2"): b"18\n19\nof another lane\0\n\n",
            (): b"".join(b"%d\n" % number for number in range(10, 20)) + b"of another lane\0\n\n",
            ("-n", "1", "--null"): b"19\0of another lane\0\n\0",
            ("-n", "1", "--raw"): b"19of another lane\0\n",
            ("-n", "0"): b"",
        }.items():
            assert run("tail", name, *args) == (0, expected, "")
        assert ring.stats().messages_out == 0 and ring.readers_alive() == 0
        assert len(other.read_many()) == 21
        assert run("tail", name) == (0, b"", "")


def test_tail_follows_until_the_ring_has_gone_and_counts_what_the_reader_took_first(run, name, monkeypatch):
    ring = Ring.create(name, 4096)
    ring.write(b"0")
    steps = iter([
        lambda: ring.write_many([b"%d" % number for number in range(1, 6)]),
        lambda: (ring.write_many([b"6", b"7", b"8"]), ring.read_many(7)),
        lambda: ring.read_many(),
        lambda: (ring.write(b"9"), ring.close()),
    ])  # fmt: skip
    monkeypatch.setattr(_cli.time, "sleep", lambda seconds: next(steps)())
    code, out, err = run("tail", name, "--follow")
    assert (code, out) == (0, b"0\n1\n2\n3\n4\n5\n7\n8\n9\n")
    assert err == "shmring: 1 messages were gone before they could be shown\n"


@needs_kept
def test_tail_follows_a_kept_ring_that_nobody_has_until_it_is_removed(run, name, monkeypatch):
    Ring.create(name, 4096, keep=True).close()

    def come_and_go():
        with Ring.open(name) as ring:
            ring.write(b"x")

    steps = iter([come_and_go, lambda: None, come_and_go, lambda: run("rm", name)])
    monkeypatch.setattr(_cli.time, "sleep", lambda seconds: next(steps)())
    shown = list(_cli.passing(name, 10, True, []))
    assert shown == [b"x", b"x"] and next(steps, None) is None


def test_tail_shows_nothing_torn_beside_a_fast_writer_and_reader(name):
    """Each message has its checksum; the reader takes whatever there is once the lane is half full."""
    missed, done = [], threading.Event()
    with Ring.create(name, 16384) as ring, Ring.open(name) as other:

        def write():
            number = 0
            while not done.is_set():
                number += 1
                body = b"%d" % number * (number % 97)
                with contextlib.suppress(RingTimeout):
                    other.write(struct.pack("=I", zlib.crc32(body)) + body, timeout=0.1)

        def read():
            while not done.is_set():
                if ring.stats().fill > 0.5:
                    ring.read_many()

        threads = [threading.Thread(target=work) for work in (write, read)]
        for thread in threads:
            thread.start()
        try:
            shown = 0
            for message in _cli.passing(name, 10, True, missed):
                assert zlib.crc32(message[4:]) == int.from_bytes(message[:4], sys.byteorder)
                shown += 1
                if shown == (500 if WINDOWS else 5000):
                    break
        finally:
            done.set()
            for thread in threads:
                thread.join(DEADLINE)
    assert all(number > 0 for number in missed)


# ---------------------------------------------------------------- send and recv


def test_lines_go_in_and_come_out(run, stdin, name):
    with Ring.create(name, 4096):
        stdin(b"one\n\ntwo\r\nthree")
        assert run("send", name) == (0, b"", "")
        assert run("recv", name, "-n", 2) == (0, b"one\n\n", "")
        assert run("recv", name, "--drain", "--null") == (0, b"two\r\0three\0", "")
        option, five = ["--timeout", 1], "f\u00fcnf"
        for args in (["four", five], ["four", *option, five], [*option, "four", five], ["four", five, *option]):
            assert run("send", name, *args) == (0, b"", "")
            assert run("recv", name, "-n", 2) == (0, b"four\n" + os.fsencode(five) + b"\n", "")
        assert run("send", name, "--timeout", 1, "--", "-x", "--") == (0, b"", "")
        assert run("recv", name, "-n", 2) == (0, b"-x\n--\n", "")


@pytest.mark.parametrize(
    "framing, data, messages",
    [
        ([], b"a\n\nb", [b"a", b"", b"b"]), ([], b"a\n", [b"a"]), ([], b"", []), ([], b"\n", [b""]),
        (["--raw"], b"a\n\0b\n", [b"a\n\0b\n"]), (["--raw"], b"", [b""]),
        (["--null"], b"a\nb\0\0c", [b"a\nb", b"", b"c"]),
        (["--size", "3"], b"abcdefgh", [b"abc", b"def", b"gh"]), (["--size", "1K"], b"x" * 2048, [b"x" * 1024] * 2),
    ],
)  # fmt: skip
def test_stdin_is_taken_apart_as_is_asked(run, stdin, name, framing, data, messages):
    with Ring.create(name, 8192) as ring:
        stdin(data)
        assert run("send", name, *framing) == (0, b"", "")
        assert list(ring.messages(timeout=0)) == messages


def test_what_comes_in_any_pieces_is_split_the_same_way(seed):
    data = b"one\n\n\nfour" + b"x" * 100 + b"\n\n"
    for step in range(1, 20):
        pieces = iter([*(data[at : at + step] for at in range(0, len(data), step)), b""])
        stream = type("Stream", (), {"read1": lambda self, size, pieces=pieces: next(pieces)})()
        assert list(_cli.split(stream, b"\n")) == data[:-1].split(b"\n")


def test_binary_data_goes_through_real_pipes_as_it_is(start, name):
    data = bytes(range(256)) * 2000 + b"\n\n\0\r\n"
    with Ring.create(name, 1 << 20):
        for framing in ([["--null"]] if WINDOWS else [["--null"], []]):
            recv = start("recv", name, "--eof", *framing)
            send = start("send", name, *framing, stdin=subprocess.PIPE)
            separator = b"\0" if framing else b"\n"
            _, err = send.communicate(data, timeout=DEADLINE)
            assert (send.returncode, err) == (0, b"")
            out, err = recv.communicate(timeout=DEADLINE)
            assert (recv.returncode, err) == (0, b"")
            assert out == data + (b"" if data.endswith(separator) else separator)
        send = start("send", name, "--raw", stdin=subprocess.PIPE)
        send.communicate(data, timeout=DEADLINE)
        out, err = start("recv", name, "-n", 1, "--raw").communicate(timeout=DEADLINE)
        assert (out, err) == (data, b"")


def test_what_waits_for_the_end_of_a_pipe_ends_also_if_nothing_came(start, name):
    recv = start("recv", name, "--create", "--eof")
    send = start("send", name, "--wait", DEADLINE)
    assert send.communicate(timeout=DEADLINE) == (b"", b"") and send.returncode == 0
    assert recv.communicate(timeout=DEADLINE) == (b"", b"") and recv.returncode == 0


def test_streams_that_are_closed_are_an_error_and_no_traceback(run, name, monkeypatch):
    with Ring.create(name, 4096) as ring:
        ring.write(b"stays")
        monkeypatch.setattr(sys, "stdin", None)
        assert run("send", name) == (1, b"", "shmring: there is no stdin to take messages from\n")
        monkeypatch.setattr(sys, "stdout", None)
        assert _cli.main(["recv", name]) == _cli.main(["ls"]) == 1
        monkeypatch.setattr(sys, "stderr", None)
        assert _cli.main(["tail", name]) == 1
        assert ring.read() == b"stays"


def test_who_makes_a_ring_for_its_messages_stays_until_they_are_taken(run, start, stdin, name):
    sending = start("send", name, "--create", "--capacity", "4K", "--writers", 1, "one", "two")
    assert run("recv", name, "--wait", DEADLINE, "-n", 1) == (0, b"one\n", "")
    assert sending.poll() is None
    assert run("recv", name, "-n", 1) == (0, b"two\n", "")
    assert sending.wait(DEADLINE) == 0
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    code, _, err = run("send", name, "--create", "--timeout", 0.02, "x")
    assert code == 3 and "nobody has taken" in err and "1 messages were sent" in err


@needs_kept
def test_a_kept_ring_has_its_messages_after_who_made_it(run, name):
    for _ in range(2):
        assert run("send", name, "--create", "--keep", "--capacity", 4096, "--writers", 2, "x") == (0, b"", "")
    assert facts_of(run, name)["state"] == "kept" and facts_of(run, name)["lanes"] == 2
    assert run("recv", name, "--create", "--drain") == (0, b"x\nx\n", "")
    assert run("rm", name) == (0, b"", "")


@pytest.mark.parametrize("keep", [pytest.param(["--keep"], marks=needs_kept), []], ids=["kept", "not kept"])
def test_a_ring_without_memory_for_a_lane_does_not_stay(run, name, monkeypatch, keep):
    def reserve(self, offset, nbytes):
        raise OSError(errno.ENOSPC, "no memory for a lane", self.name)

    monkeypatch.setattr(os_backend.Segment, "reserve", reserve)
    code, _, err = run("send", name, "--create", *keep, "x")
    assert (code, err) == (1, f"shmring: no memory for a lane: {name}\n")
    with pytest.raises(FileNotFoundError):
        Ring.open(name)


@needs_kept
def test_a_ring_without_memory_for_a_lane_stays_with_who_has_come_meanwhile(run, name, monkeypatch):
    come = []

    def reserve(self, offset, nbytes):
        come.append(Ring.open(self.name))
        raise OSError(errno.ENOSPC, "no memory for a lane", self.name)

    monkeypatch.setattr(os_backend.Segment, "reserve", reserve)
    assert run("send", name, "--create", "--keep", "--writers", 1, "x")[0] == 1
    monkeypatch.undo()
    with come[0], Ring.open(name) as ring:
        come[0].write(b"y")
        assert ring.read(timeout=0) == b"y"
    assert run("rm", name) == (0, b"", "")


def test_no_number_of_bytes_is_said_to_be_none(run, name):
    for text in ("x", "0", "K", "-1", "1.5M"):
        code, _, err = run("send", name, f"--size={text}")
        assert code == 2 and f"a number of bytes from 1 on (4096, 64K, 1M, 2G), not {text!r}" in err, err


def test_exit_codes_of_recv(run, name):
    with Ring.create(name, 4096) as ring:
        assert run("recv", name, "--drain") == (3, b"", "")
        code, out, err = run("recv", name, "--timeout", 0.02)
        assert (code, out) == (3, b"") and err == f"shmring: no message in ring {name!r} within the timeout\n"
        ring.write_many([b"1", b"2"])
        assert run("recv", name, "-n", 3, "--timeout", 0.02) == (3, b"1\n2\n", "")
        ring.write(b"3")
        assert run("recv", name, "--timeout", 0.02) == (0, b"3\n", "")
        assert run("recv", name, "--eof", "--timeout", 0.02)[0] == 3, "there is a writer yet: this very handle"
        with Ring.open(name) as other:
            assert other.try_read() is None
            code, out, err = run("recv", name, "--drain")
            assert code == 1 and "has a living reader" in err
    with Ring.create(name, 4096) as ring, Ring.open(name) as other:
        other.write(b"4")
        other.close()
        assert run("recv", name, "--eof") == (0, b"4\n", "")
        assert run("recv", name, "--eof", "--timeout", 0.02)[0] == 3, "nobody has ever come"


def test_exit_codes_of_send_and_of_what_cannot_be(run, stdin, name):
    code, out, err = run("send", name, "x")
    assert (code, out, err) == (1, b"", f"shmring: there is no ring of this name: {name}\n")
    with Ring.create(name, 4096, writers=1):
        stdin(b"fits\n" + b"x" * 5000 + b"\n")
        code, _, err = run("send", name)
        assert code == 1 and "at most max_message=4,088" in err and "1 messages were sent" in err
        code, _, err = run("send", name, "--timeout", 0.02, "x" * 3000, "y" * 3000)
        assert code == 3 and "no room in ring" in err and "1 messages were sent" in err
        with Ring.open(name) as other:
            other.try_write(b"")  # the only lane
            code, _, err = run("send", name, "x")
            assert code == 1 and "living writer" in err
    wrong = [
        [], ["no-command"], ["stat"], ["stat", "no name"], ["recv", name, "-n", "0"], ["recv", name, "-n", "x"],
        ["tail", name, "-n", "-1"], ["send", name, "--raw", "x"], ["send", name, "--raw", "--null"],
        ["send", name, "--no-option", "x"], ["send", name, "--capacity", "1X"], ["ls", name],
        ["ls", "--interval", "-1"], ["ls", "--interval", "nan"],
        ["recv", name, "--drain", "--timeout", "1"], ["rm"],
    ]  # fmt: skip
    for args in wrong:
        code, out, err = run(*args)
        assert code == 2 and out == b"" and "error:" in err, args


def test_what_the_output_does_not_take_stays_in_the_ring(run, name, monkeypatch):
    with Ring.create(name, 4096) as ring:
        ring.write_many([b"one", b"two", b"three"])
        written = []

        class Full(io.BytesIO):
            def write(self, data):
                if bytes(data) == b"two":
                    raise OSError(errno.ENOSPC, "No space left on device")
                written.append(bytes(data))
                return len(data)

        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full()))
        assert _cli.main(["recv", name]) == 1
        monkeypatch.undo()
        assert written == [b"one", b"\n"]
        assert ring.read_many() == [b"two", b"three"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_the_output_that_goes_away_ends_it_quietly(start, name, monkeypatch, unbuffered):
    """As `| head` does. More than a pipe holds: the message that it did not take stays."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    size = 1 << 20
    with Ring.create(name, 4 * size) as ring:
        ring.write_many([bytes([number]) * size for number in range(3)])
        recv = start("recv", name, "--raw")
        assert recv.stdout.read(size + 1) == bytes(size) + b"\1"
        recv.stdout.close()
        recv.stdout = None  # for `communicate`
        _, err = recv.communicate(timeout=DEADLINE)
        assert (recv.returncode, err) == (141, b"")
        assert [message[:1] for message in ring.messages(timeout=0)] == [b"\1", b"\2"]
        reading, writing = os.pipe()
        os.close(reading)
        ls = start("ls", "--interval", 0, stdout=writing)
        os.close(writing)
        _, err = ls.communicate(timeout=DEADLINE)
        assert (ls.returncode, err) == (141, b"")


@needs_signals
@pytest.mark.parametrize("command", ["recv", "tail", "stat"])
def test_ctrl_c_ends_it_quietly(start, name, command):
    more = {"recv": [], "tail": ["--follow"], "stat": ["--watch", "--interval", "0.01"]}[command]
    with Ring.create(name, 4096) as ring:
        ring.write(b"here")
        process = start(command, name, *more)
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (130, b"")


# ---------------------------------------------------------------- rm and gc


def test_rm_refuses_what_is_open_unless_it_is_forced(run, name):
    with Ring.create(name, 4096) as ring:
        code, _, err = run("rm", name)
        assert code == 1 and err == f"shmring: ring {name!r} is open; --force removes its name all the same\n"
        assert run("rm", "--force", name) == (0, b"", "")
        ring.write(b"who has it goes on")
        for force in ([], ["--force"]):
            code, _, err = run("rm", name, *force)
            assert code == 1 and err == f"shmring: there is no ring of this name: {name}\n"


@needs_files
def test_rm_goes_on_after_what_it_cannot_remove_and_leaves_alone_what_is_no_ring(run, name, apart):
    Ring.create(name, 4096, keep=True).close()
    (apart / "shmring.no-ring").write_bytes(b"something else")
    code, _, err = run("rm", "no-ring", "nothing", name)
    assert code == 1 and err.splitlines() == [
        "shmring: ring 'no-ring' is no ring; --force removes its name all the same",
        "shmring: there is no ring of this name: nothing",
    ]
    assert [entry.name for entry in apart.iterdir()] == ["shmring.no-ring"]
    assert run("rm", "--force", "no-ring")[0] == 0


@needs_kept
def test_gc_removes_what_nobody_has_and_nothing_else(run, name, apart, children):
    with Ring.create(f"{name}-open", 4096) as ring, Ring.create(f"{name}-kept-open", 4096, keep=True) as kept:
        Ring.create(f"{name}-kept", 4096, keep=True).close()
        leave(children, f"{name}-left")
        for args, expected in [
            (["--dry-run"], [f"{name}-left"]),
            (["--dry-run", "--kept"], [f"{name}-kept", f"{name}-left"]),
            ([], [f"{name}-left"]),
            ([], []),
            (["--kept"], [f"{name}-kept"]),
        ]:
            code, out, err = run("gc", "--json", *args)
            assert (code, err) == (0, "")
            assert json.loads(out) == {"removed": expected, "strays": [], "dry_run": "--dry-run" in args}
        assert os_backend.names() == [f"{name}-kept-open", f"{name}-open"]
        assert run("gc") == (0, b"", "")
        leave(children, f"{name}-left")
        assert run("gc", "--dry-run")[1] == b"would remove ring %s-left\n" % name.encode()
        assert run("gc")[1] == b"removed ring %s-left\n" % name.encode()
        for each in (ring, kept):
            each.write(b"")
            assert each.read() == b""
        kept.unlink()


@needs_kept
def test_who_opens_or_makes_a_ring_between_gcs_look_and_its_deed_keeps_it(run, name, apart, children, monkeypatch):
    leave(children, name)
    real = os_backend.collect

    def collect(*args):
        monkeypatch.setattr(os_backend, "collect", real)
        with Ring.create(name, 4096) as made:
            assert not real(*args)
            made.write(b"")
        return False

    monkeypatch.setattr(os_backend, "collect", collect)
    assert run("gc") == (0, b"", "")


@needs_files
def test_gc_removes_doorbells_whose_ring_has_gone(run, name, apart, children):
    def ring_unlink_and_die():
        ring = Ring.create(name, 4096)
        ring.attach_doorbell()
        ring.unlink()
        kill_yourself()

    assert children.join(children.start(ring_unlink_and_die)) == KILLED
    with Ring.create(f"{name}-used", 4096) as ring:
        ring.attach_doorbell()
        (stray,) = [str(entry) for entry in apart.iterdir() if entry.name.startswith(f"shmbell.{name}.")]
        assert run("gc", "--dry-run")[1].decode() == f"would remove {stray}\n"
        assert run("gc")[1].decode() == f"removed {stray}\n"
        assert run("gc")[1] == b"" and len(list(apart.iterdir())) == 2


@pytest.mark.skipif(not WINDOWS, reason="elsewhere there is something to remove")
def test_gc_says_that_there_is_nothing_to_remove_on_windows(run):
    code, out, err = run("gc")
    assert (code, err) == (0, "") and out.startswith(b"nothing to remove")
    assert json.loads(run("gc", "--json", "--dry-run")[1]) == {"removed": [], "strays": [], "dry_run": True}


# ---------------------------------------------------------------- doctor


def test_doctor_finds_that_rings_work_here(run, apart):
    code, out, err = run("doctor", "--json")
    told = json.loads(out)
    assert (code, err, told["ok"]) == (0, "", True)
    points = {check["what"]: check for check in told["checks"]}
    assert {"Python", "system", "a ring", "claims", "waking", "backend", "rings"} <= set(points)
    assert points["backend"]["found"].startswith(os_backend.describe()[:5])
    assert all(check["advice"] for check in told["checks"] if check["status"] != "ok")
    code, out, _ = run("doctor")
    assert code == 0 and all(what in out.decode() for what in points)


def test_doctor_fails_where_rings_do_not_work(run, monkeypatch):
    def create(*args, **kwargs):
        raise OSError(errno.ENOSPC, "no memory", "doctor")

    monkeypatch.setattr(Ring, "create", create)
    code, out, _ = run("doctor")
    assert code == 1 and "fail  a ring         create: no memory: doctor" in out.decode()
    assert json.loads(run("doctor", "--json")[1])["ok"] is False


def test_doctor_notices_a_reader_that_is_not_woken_and_claims_that_are_not_seen(monkeypatch):
    def until_it_has_given_up(seconds):
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(DEADLINE)

    monkeypatch.setattr(_doctor, "PATIENCE", 0.05)
    clock = SimpleNamespace(sleep=until_it_has_given_up, perf_counter=time.perf_counter)
    monkeypatch.setattr(_doctor, "time", clock)
    assert [check.status for check in _doctor._rings()][-1] == "fail"
    monkeypatch.setattr(Ring, "writers_alive", lambda self: 0)
    assert [check.found.partition(":")[0] for check in _doctor._rings()][-1] == "locks"


@needs_files
def test_doctor_advises_on_shared_memory(monkeypatch, tmp_path):
    def statuses(directory):
        return {check.what: check.status for check in _doctor._shared_memory(str(directory))}

    monkeypatch.setattr(_doctor, "SCARCE", 0)
    tmp_path.chmod(0o1777)
    assert statuses(tmp_path) == {"shared memory": "ok", "permissions": "ok"}
    tmp_path.chmod(0o777)
    monkeypatch.setattr(_doctor, "SCARCE", 1 << 62)
    assert statuses(tmp_path) == {"shared memory": "warn", "permissions": "warn"}
    assert statuses(tmp_path / "nothing") == {"shared memory": "fail"}
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert statuses(tmp_path)["permissions"] == "fail"


@needs_files
@pytest.mark.parametrize(
    "files, expected",
    [
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/memory.max": "max\n"}, []),
        ({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/memory.max": "1073741824\n"}, ["ok"]),
        ({"/proc/self/cgroup": "0::/not-seen-here\n", "/sys/fs/cgroup/memory.max": "1048576\n"}, ["warn"]),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "268435456",
          "/sys/fs/cgroup/memory.current": "268000000"}, ["warn"]),
        ({"/proc/self/cgroup": "7:cpu:/x\n4:memory:/x\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "1000000"},
         ["warn"]),
        ({"/proc/self/cgroup": "4:memory:/\n",
          "/sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096)}, []),
        ({"/proc/self/cgroup": "nonsense\n"}, []), ({}, []),
    ],
)  # fmt: skip
def test_doctor_reads_the_memory_limit_of_either_kind_of_cgroup(monkeypatch, files, expected):
    monkeypatch.setattr(_doctor, "_read", lambda path: files.get(path.replace("//", "/")))
    assert [check.status for check in _doctor._memory_limits()] == expected


# ---------------------------------------------------------------- all of it


def test_each_exit_code_is_in_the_help(run):
    codes = {str(code) for code in (_cli.DONE, _cli.FAILED, 2, _cli.NOTHING, _cli.INTERRUPTED, _cli.CLOSED)}
    code, out, _ = run("--help")
    assert code == 0 and set(re.findall(r"^  (\d+) ", out.decode(), re.MULTILINE)) == codes
    for command in ("ls", "stat", "tail", "send", "recv", "rm", "gc", "doctor"):
        code, more, _ = run(command, "--help")
        assert code == 0 and command in out.decode() and "exit codes:" in more.decode()


def test_it_is_what_python_runs_for_the_package(children):
    process = popen([sys.executable, "-W", "error", "-m", "shmring", "ls", "--json"], cwd=ROOT,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    children._others.append(process)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, b"") and "rings" in json.loads(out)


@pytest.mark.parametrize(
    "number, unit, text",
    [(None, "", "?"), (0, "", "0"), (999, "", "999"), (1000, "", "1k"), (1234, "", "1.23k"), (12345, "", "12.3k"),
     (5e6, "", "5M"), (0, "B", "0 B"), (1023, "B", "1,023 B"), (1536, "B", "1.5 KiB"), (1 << 20, "B", "1 MiB"),
     (64 << 30, "B", "64 GiB"), (1 << 50, "B", "1,024 TiB")],
)  # fmt: skip
def test_quantities_are_short(number, unit, text):
    assert _view.quantity(number, unit) == text

