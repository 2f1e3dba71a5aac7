"""The bench: it goes through all parts, tells everything, and does not pass over a wrong message."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import DEADLINE, ROOT, WINDOWS, wait_until
from support import SIGKILL

from shmring import Ring, __version__, bench

SOCKETS = "localhost socket" if WINDOWS else "Unix socket"
PEERS = ("multiprocessing.Queue", "multiprocessing.Pipe", SOCKETS, "os.pipe")
BACKEND = "windows: named events" if WINDOWS else "linux: futex"
WINE = WINDOWS and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")


@pytest.fixture
def run(children):
    """Run the bench with these arguments; its exit code, what it printed and what it told on stderr."""

    def run(*args, command=("-m", "shmring.bench"), cwd=ROOT):
        process = subprocess.Popen(
            [sys.executable, *command, *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        )  # fmt: skip
        children._others.append(process)
        out, err = process.communicate(timeout=3 * DEADLINE)
        return process.returncode, out, err

    return run


def planted(tmp_path, code, limit=DEADLINE):
    """The arguments that run the bench with a fault, which every process it starts has as well."""
    script = tmp_path / "planted.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom shmring import Ring, bench\nbench.LIMIT = {limit}\n"
        + textwrap.dedent(code)
        + "\nif __name__ == '__main__':\n    sys.exit(bench.main(sys.argv[1:]))\n"
    )
    return (str(script),)


def test_it_goes_through_all_parts_and_tells_everything(run, tmp_path):
    code, out, err = run("--smoke", "--json", tmp_path / "b.json", "--svg", tmp_path / "b.svg")
    assert code == 0, err
    for told in (f"shmring {__version__}", "CPython", "GIL", "cores: ", BACKEND, "GOALS", "a ring of 1 MiB"):
        assert told in out
    for told in ("LATENCY", "THROUGHPUT", "CLIENTS", "2 idle seconds", "client 10", "memory for each client"):
        assert told in out
    assert "messages found the reader asleep" in out
    assert "measuring 64 B, blocking" in err

    told = json.loads((tmp_path / "b.json").read_text())
    assert told["environment"]["shmring"] == __version__
    check_results(told["results"])
    check_memory(told, out)
    assert told["environment"]["system"].startswith("Windows 1" if WINDOWS else "Linux")

    picture = ElementTree.parse(tmp_path / "b.svg")
    words = " ".join(text for text in picture.getroot().itertext())
    for word in ("shmring", *PEERS, "microseconds", "messages per second", told["environment"]["cpu"], "64 KiB"):
        assert word in words
    check_remarks(told["environment"], out, words)


def check_memory(told, out):
    """Only Linux tells what a process has to itself; where it is not told, that is said."""
    assert bench.TELLS_MEMORY or WINDOWS
    assert ("beyond the lanes" in out) == bench.TELLS_MEMORY
    assert ("memory for each client, shmring: not measured" in out) != bench.TELLS_MEMORY
    assert len(told["goals"]) == 22 - (not bench.TELLS_MEMORY) - WINDOWS  # a pipe is nothing for loops there


def check_remarks(environment, out, words):
    """Is it said, with the figures and in the picture, what is wrong with them?"""
    assert ("under Wine" in out.splitlines()[0]) == ("under Wine" in words) == ("wine" in environment) == WINE
    remarks = environment.get("remarks", [])
    assert bool(remarks) == WINDOWS
    assert any("no figures about Windows" in remark for remark in remarks) == WINE
    for remark in remarks:
        assert remark in out.splitlines() and remark in words


def check_results(results):
    """Is there a result, with rounds and a gain, of each mechanism in each case?"""
    found = {(result["part"], result["case"], result["who"]) for result in results}
    for who in ("shmring", *PEERS):
        for size in ("64 B", "1 KiB"):
            assert ("latency", f"{size}, blocking", who) in found
            assert ("latency", f"{size}, asleep", who) in found
        for size in ("64 B", "1 KiB", "64 KiB", "1 MiB"):
            assert ("throughput", size, who) in found
        assert ("clients", "10 clients", who) in found
        assert ("writers", "1 writer", who) in found and ("writers", "10 writers", who) in found
        assert ("cpu", "64 B, seconds per million", who) in found
    assert ("throughput", "64 B", "shmring, batched") in found
    assert ("throughput", "64 B", "shmring, iterated") in found
    assert ("throughput", "64 KiB", "shmring, by view") in found
    assert ("writers", "10 writers", "shmring, batched") in found
    for who in ("1 reader", "4 readers", "4 readers that may lose"):
        assert ("readers", "a call each", who) in found and ("readers", "batched", who) in found
    for who in ("1 reader", "4 that compete"):
        assert ("readers", "queue, a call each", who) in found and ("readers", "queue, batched", who) in found
    assert ("readers", "queue, a call each", "4 of multiprocessing.Queue") in found
    assert ("latency", "64 B, asyncio", "shmring") in found
    assert (("latency", "64 B, asyncio", "os.pipe") in found) != WINDOWS
    for result in results:
        assert result["min"] <= result["median"] <= result["max"]
        assert len(result["rounds"]) == 1  # --smoke
        if result["who"] == "shmring" and result["part"] == "latency":
            assert {"p50", "p99", "p99.9", "max", "capacity"} <= set(result["more"])
        if (result["part"], result["who"]) == ("throughput", "os.pipe"):
            assert result["gain"] > 0
        if result["case"] == "10 clients":
            assert len(result["more"]["clients"]) == 10


def test_json_on_stdout_is_nothing_but_json(run):
    code, out, err = run("--smoke", "--only", "throughput", "--repeat", "2", "--json", "-")
    assert code == 0, err
    assert {len(result["rounds"]) for result in json.loads(out)["results"]} == {2}
    assert "THROUGHPUT" in err


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--only", "latency,speed"], "no part 'speed'; choose from latency, throughput, clients, writers, readers,"),
        (["--repeat", "0"], "a number from 1 on, not '0'"),
        (["--json", "/no/such/directory/file"], "cannot write to '/no/such/directory/file'"),
        (["--json", "-", "--svg", "-"], "cannot both go to stdout"),
        (["--only", "cpu", "--svg", "x.svg"], "--svg draws latency and throughput"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(args, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(args)
    assert exit.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_tells_the_options(capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--quick", "--json FILE", "--svg FILE", "--only PART,...", "--repeat N"):
        assert option in shown
    assert "python -m shmring.bench" in shown


FLIP = """
    original = Ring.{method}

    def wrong(self, *args, _calls=[0], **kwargs):
        answer = original(self, *args, **kwargs)
        message = args[0] if args else answer  # in a buffer of the caller's, or as it is
        _calls[0] += 1
        if {when}:
            if args:
                message[-1] ^= 1
            else:
                answer = message[:-1] + bytes([message[-1] ^ 1])
        return answer

    Ring.{method} = wrong
"""


@pytest.mark.parametrize(
    ("part", "method", "when"),
    [
        ("latency", "read", "_calls[0] == 7"),
        ("throughput", "read", "_calls[0] == 7"),
        ("throughput", "read", "_calls[0] == 1500 and len(message) == 64"),
        ("throughput", "read", "len(message) > 70000 and _calls[0] % 3 == 0"),
        ("clients", "read", "_calls[0] >= 30"),
    ],
)
@pytest.mark.once
def test_a_wrong_message_ends_in_exit_code_1(part, method, when, run, tmp_path):
    command = planted(tmp_path, FLIP.format(method=method, when=when))
    code, _, err = run("--smoke", "--only", part, command=command)
    assert code == 1
    assert re.search(r"failed at .*shmring.*: a wrong message: \d+ bytes with number \d+", err) or part == "clients"
    assert "a wrong message" in err


@pytest.mark.once
def test_a_wrong_byte_in_the_middle_is_found_where_every_byte_is_checked(run, tmp_path):
    command = planted(
        tmp_path,
        """
        original = Ring.read

        def wrong(self, *args, **kwargs):
            message = original(self, *args, **kwargs)
            return message[:40000] + b"?!" + message[40002:] if len(message) == 65536 else message

        Ring.read = wrong
        """,
    )
    code, _, err = run("--smoke", "--only", "throughput", command=command)
    assert code == 1
    assert "failed at 64 KiB: every byte, shmring: a wrong message" in err


@pytest.mark.once
def test_a_wrong_batch_is_found(run, tmp_path):
    command = planted(
        tmp_path,
        """
        original = Ring.read_many
        Ring.read_many = lambda self, *args: [*original(self, *args)[:-1], bytes(64)]
        """,
    )
    code, _, err = run("--smoke", "--only", "throughput", command=command)
    assert code == 1
    assert "failed at 64 B: every byte, shmring, batched: a wrong message: 64 bytes with number 0" in err


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.once
def test_a_lost_or_repeated_message_ends_in_exit_code_1(times, run, tmp_path):
    command = planted(
        tmp_path,
        f"""
        original = Ring.write

        def write(self, data, _calls=[0]):
            _calls[0] += 1
            for _ in range({times} if _calls[0] == 12 else 1):
                original(self, data)

        Ring.write = write
        """,
    )
    code, _, err = run("--smoke", "--only", "throughput", command=command)
    assert code == 1
    assert "a wrong message" in err


@pytest.mark.once
def test_a_last_message_that_is_lost_does_not_hang(run, tmp_path):
    command = planted(
        tmp_path,
        """
        original = Ring.write

        def write(self, data, _calls=[0]):
            _calls[0] += 1
            if _calls[0] != 20:
                original(self, data)

        Ring.write = write
        """,
        limit=5.0,
    )
    code, _, err = run("--smoke", "--only", "throughput", command=command)
    assert code == 1
    assert "no end after 5 seconds; was a message lost?" in err


@pytest.mark.once
def test_a_measured_process_that_dies_ends_in_exit_code_1(run, tmp_path):
    command = planted(
        tmp_path,
        f"""
        import os
        original = Ring.read_many
        Ring.read_many = lambda self, *args: os.kill(os.getpid(), {SIGKILL})
        """,
    )
    code, _, err = run("--smoke", "--only", "throughput", command=command)
    assert code == 1
    assert "failed at 64 B: every byte, shmring, batched: a measured process died" in err


# Ctrl-C for the directing process alone, where the system has no way to send it to a group of processes.
INTERRUPTED_BY_STDIN = """
    import signal, threading

    def obey():
        sys.stdin.read(1)
        signal.raise_signal(signal.SIGINT)

    if __name__ == '__main__':
        threading.Thread(target=obey, daemon=True).start()
"""


@pytest.mark.parametrize("part", ["latency", "clients"])
def test_ctrl_c_leaves_nothing(part, children, tmp_path):
    groups = hasattr(os, "killpg")
    command = ("-m", "shmring.bench") if groups else planted(tmp_path, INTERRUPTED_BY_STDIN)
    process = subprocess.Popen(
        [sys.executable, *command, "--only", part, "--repeat", "100"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=groups,
    )  # fmt: skip
    children._others.append(process)
    wait_until(lambda: len(rings_of(process.pid)) > 3, "the bench's rings")
    time.sleep(0.5)  # it may be anywhere by then
    if groups:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    _, err = process.communicate(None if groups else "x", timeout=DEADLINE)
    assert process.returncode == 130
    # On Windows a thread of multiprocessing's that hands a socket over tells of it when the one it is for is gone.
    where = re.findall(r'Traceback \(most recent call last\):\n  File "(.*?)"', err)
    assert len(where) == err.count("Traceback") and (not where or WINDOWS), err
    assert all(file.endswith("resource_sharer.py") for file in where), err
    assert not rings_of(process.pid)
    if not WINDOWS:  # there a ring is gone when all processes are that have it open
        wait_until(lambda: not group_lives(process.pid), "the end of the measured processes")


def rings_of(pid):
    """The names of a bench's rings that are there."""
    if not WINDOWS:
        return [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"shmring.bench-{pid}-")]
    names = [f"bench-{pid}-{number}-{size}" for number in range(8) for size in bench.SIZES]
    return [name for name in names if is_there(name)]


def is_there(name):
    try:
        Ring.open(name).close()
    except FileNotFoundError:
        return False
    return True


def group_lives(group):
    """Are there processes of this group? Those that only wait for init to take note of their end do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(path)
    return found
