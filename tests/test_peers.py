"""The comparison with other packages: a missing one is left out, one that hangs is killed, the others have a row."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
from conftest import DEADLINE, ROOT, WINDOWS
from support import load_tool

# Stand-ins for packages, over pipes of the standard library. Processes that are started read this as well.
FAKES = """
    import contextlib, os, sys, time
    sys.path.insert(0, {tools!r})
    import peers
    from multiprocessing import Pipe

    class Fake(peers.Peer):
        label = module = "fake"
        how = "a pipe"
        spins = polled = False

        def __init__(self, name, directory):
            super().__init__(name, directory)
            self.near, self.far = Pipe()
            open(os.path.join(directory, name), "wb").close()

        @classmethod
        def load(cls):
            return contextlib

        @classmethod
        def version(cls):
            return "1.2"

        def listen(self, size):
            assert size == 64

        connect = listen

        def sender(self, size):
            return self.near.send_bytes

        def receiver(self, size):
            return self.far.recv_bytes

        def close(self):
            self.near.close()
            self.far.close()

    class Missing(peers.Peer):
        label, module = "missing", "a_package_that_nobody_has"

    class Broken(Fake):
        label = "broken"

        @classmethod
        def load(cls):
            raise OSError("no such library")

    class Hanging(Fake):
        label = "hanging"

        def receiver(self, size):
            with open({pid!r}, "w") as file:
                file.write(str(os.getpid()))
            return lambda: time.sleep(1000)

    class Wrong(Fake):
        label = "wrong"

        def receiver(self, size):
            return lambda: self.far.recv_bytes()[:-1]

    class Dying(Fake):
        label = "dying"

        def receiver(self, size):
            return lambda: os._exit(1)

    class Full(Fake):
        label = "full"
        batches, blocks = True, False

        def full(self):
            return (BlockingIOError,)

        def sender(self, size):
            calls = []

            def send(message):
                calls.append(message)
                if len(calls) % 3 == 1:
                    return False
                if len(calls) % 3 == 2:
                    raise BlockingIOError
                return self.near.send_bytes(message)

            return send

        def batch_sender(self, size):
            def send(messages):
                self.near.send_bytes(b"".join(messages[:100]))
                return len(messages[:100])

            return send

        def batch_receiver(self, size):
            rest = []

            def receive(most):
                if not rest:
                    joined = self.far.recv_bytes()
                    rest.extend(joined[i : i + 64] for i in range(0, len(joined), 64))
                batch, rest[:] = rest[:most], rest[most:]
                return batch

            return receive

    class Lossy(Fake):
        label = "lossy"
        ahead = 1
        poller = Fake.receiver

    class Bare(peers.Bare):
        label = "bare"

    class Pair(peers.Pair):
        # Who hangs has little time, so that the test ends soon; the others have what they need on a busy machine.
        def __init__(self, kind, directory, limit):
            super().__init__(kind, directory, 2.0 if kind is Hanging else limit)

    peers.Pair = Pair
    peers.PEERS = ({kinds},)

    if __name__ == "__main__":
        sys.exit(peers.main(sys.argv[1:]))
"""


@pytest.fixture
def run(children, tmp_path):
    """Compare shmring and os.pipe with these stand-ins; the exit code, what was printed, and the JSON."""

    def run(*kinds, only):
        script, told = tmp_path / "fakes.py", tmp_path / "told.json"
        fakes = FAKES.format(tools=str(ROOT / "tools"), pid=str(tmp_path / "pid"), kinds=", ".join(kinds))
        script.write_text(textwrap.dedent(fakes))
        args = "--smoke", "--markdown", "--limit", DEADLINE, "--only", ",".join((only, *map(str.lower, kinds)))
        process = subprocess.Popen(
            [sys.executable, script, *map(str, args), "--json", told],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        children._others.append(process)
        out, err = process.communicate(timeout=3 * DEADLINE)
        assert process.returncode == 0, err
        assert not list_of_left(process.pid)
        return out, json.loads(told.read_text())

    return run


def list_of_left(pid):
    """The files that a run has left behind."""
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else os.environ.get("TEMP", "/tmp")
    return [name for name in os.listdir(directory) if f"peers-{pid}-" in name]


def rows(out):
    """The cells of the printed table, by the first in each row."""
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


@pytest.mark.once
def test_each_that_ran_has_a_row_and_a_missing_one_a_line(run):
    out, told = run("Missing", "Broken", "Fake", "Full", "Lossy", only="64B,64B-batched,blocking")
    assert "\nmissing: not installed\n" in out
    assert "\nbroken: not installed so that it can be imported: no such library\n" in out
    table = rows(out)
    assert set(table) == {"one way, 1 to 1", "---", "shmring", "os.pipe", "fake", "full", "lossy"}
    assert table["one way, 1 to 1"] == ["64 B, a call each", "64 B, batched", "p50, blocking"]
    assert [cell == "-" for cell in table["fake"]] == [False, True, False]
    assert [cell == "-" for cell in table["os.pipe"]] == [False, True, False]
    assert [cell == "-" for cell in table["full"]] == [False, False, True]
    compared = [cell for who in ("shmring", "fake", "full", "lossy") for cell in table[who] if cell != "-"]
    assert all(cell.endswith("x)") for cell in compared), table
    assert "- fake 1.2: a pipe" in out
    assert told["peers"] == {"fake": "1.2", "full": "1.2", "lossy": "1.2"}
    check_results(told["results"])


def check_results(results):
    found = {(result["who"], result["case"]): result for result in results}
    for case, sign in (("64B", 1), ("blocking", -1)):
        fake, pipe = found["fake", case], found["os.pipe", case]
        assert fake["wrong"] is None and len(fake["rounds"]) == 1
        assert fake["to os.pipe"] == pytest.approx((fake["median"] / pipe["median"]) ** sign)
        assert pipe["to os.pipe"] == 1
    batched = found["full", "64B-batched"]
    assert batched["to os.pipe"] == pytest.approx(batched["median"] / found["os.pipe", "64B"]["median"])
    assert found["fake", "64B-batched"]["median"] is None


@pytest.mark.once
def test_one_that_hangs_is_killed_and_told_and_the_others_go_on(run, tmp_path):
    out, told = run("Hanging", "Wrong", "Dying", "Fake", only="64B")
    table = rows(out)
    assert table["hanging"] == ["hung"]
    assert table["wrong"] == table["dying"] == ["failed"]
    assert table["fake"][0].endswith("x)") and table["shmring"][0].endswith("x)")
    assert "hanging, 64 B, a call each: hung: no end after 2 seconds" in out
    assert "wrong, 64 B, a call each: failed: a wrong message: 63 bytes with number 0" in out
    assert "dying, 64 B, a call each: failed: a measured process died" in out
    assert {result["who"]: result["wrong"] for result in told["results"]}["fake"] is None
    pid = int((tmp_path / "pid").read_text())
    if not WINDOWS:  # where os.kill would end a process
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail(f"process {pid} is still there")


@pytest.mark.once
def test_the_bare_ring_carries_each_message_of_each_size(run):
    out, told = run("Bare", only="64B,1MiB,spinning")
    assert all(cell.endswith("x)") for cell in rows(out)["bare"]), out
    assert f"- bare of Python {sys.version.split()[0]}: " in out
    assert told["peers"] == {"bare": f"of Python {sys.version.split()[0]}"}


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_a_bare_ring_that_is_full_takes_no_more(tmp_path, size):
    peers = load_tool("peers")
    bare = peers.Bare("bare", str(tmp_path))
    bare.listen(size)
    bare.connect(size)
    send, receive = bare.sender(size), bare.poller(size)
    slots = peers.CAPACITY[size] // (size + 8)
    messages = [bytes([number % 256]) * size for number in range(3 * slots // 2)]
    for message in messages[:slots]:
        assert send(message)
    assert not send(b"?" * size)
    for message in messages[: slots // 2]:
        assert receive() == message
    for message in messages[slots:]:
        assert send(message)  # in the places of those that were received
    assert not send(b"?" * size)
    assert [receive() for _ in range(slots)] == messages[-slots:]
    assert receive() is None
    for memory, words, _ in (bare.ins[size], bare.outs[size]):
        words.release()
        memory.close()


def test_what_is_not_there_to_be_chosen_is_refused():
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "peers.py"), "--only", "nothing"], capture_output=True, text=True
    )
    assert process.returncode == 2 and "there is no 'nothing'" in process.stderr
