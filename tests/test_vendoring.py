"""A copy in somebody's package works as it is, also beside another copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from conftest import DEADLINE, ROOT

from shmring import Ring

PACKAGE = ROOT / "shmring"


@pytest.fixture(scope="module")
def vendored(tmp_path_factory):
    """A directory with ``myapp/_vendor/shmring``."""
    top = tmp_path_factory.mktemp("vendored")
    vendor = top / "myapp" / "_vendor"
    shutil.copytree(PACKAGE, vendor / "shmring", ignore=shutil.ignore_patterns("__pycache__"))
    for directory in (vendor, vendor.parent):
        (directory / "__init__.py").write_text("")
    return top


def run(vendored, *command, script=None):
    """Run Python there, isolated from the checkout and with warnings as errors; its output."""
    if script:
        path = vendored / f"script{os.getpid()}.py"
        path.write_text(textwrap.dedent(script))
        command = (str(path), *command)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["PYTHONPATH"] = str(vendored)
    result = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=vendored,
        env=env,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_vendored_copy_spawns_and_pickles(vendored, name):
    out = run(vendored, name, script="""
        import multiprocessing, sys
        from myapp._vendor.shmring import Ring

        def work(ring, back):
            with ring, back:
                for message in ring.messages(timeout=30):
                    if message == b"end":
                        break
                    back.write(message.upper())

        if __name__ == "__main__":
            with Ring.create(sys.argv[1], 4096) as ring, Ring.create(sys.argv[1] + "-back", 4096) as back:
                child = multiprocessing.get_context("spawn").Process(target=work, args=(ring, back))
                child.start()
                ring.write_many([b"hello", b"end"])
                print(back.read(timeout=30))
                child.join(30)
                print(child.exitcode, type(ring).__module__)
                assert "shmring" not in sys.modules
        """)  # fmt: skip
    assert out.split() == ["b'HELLO'", "0", "myapp._vendor.shmring._ring"]


@pytest.mark.skipif(not (PACKAGE / "bench.py").exists(), reason="bench.py is not written yet")
def test_the_bench_of_a_vendored_copy_starts(vendored):
    assert "--quick" in run(vendored, "-m", "myapp._vendor.shmring.bench", "--help")


def test_two_copies_talk_through_one_ring(vendored, name):
    with Ring.create(name, 4096) as ring:
        run(vendored, name, script="""
            import sys
            from myapp._vendor import shmring

            with shmring.Ring.open(sys.argv[1]) as ring:
                ring.write(b"from the copy")
                assert ring.stats().lanes_in_use == 1
            """)  # fmt: skip
        assert ring.read(timeout=0) == b"from the copy"


def test_two_copies_in_one_process_are_two_packages_whose_errors_share_builtins(vendored, name):
    run(vendored, name, script=f"""
        import sys
        sys.path.append({str(ROOT)!r})
        import shmring, pickle
        from myapp._vendor import shmring as copy

        with shmring.Ring.create(sys.argv[1], 4096) as one, copy.Ring.open(sys.argv[1]) as two:
            two.write(b"x")
            assert one.read() == b"x"
            try:
                two.write("text")
            except TypeError:
                pass
            try:
                one.read(timeout=0)
            except TimeoutError as error:
                assert not isinstance(error, copy.RingTimeout) and isinstance(error, shmring.RingTimeout)
            assert type(pickle.loads(pickle.dumps(copy.RingBusy("x")))) is copy.RingBusy
            with pickle.loads(pickle.dumps(two)) as three:
                assert type(three) is copy.Ring
        """)  # fmt: skip


def test_importing_starts_nothing_and_opens_nothing(vendored):
    out = run(vendored, script="""
        import os, signal, sys, threading

        def opened():
            if sys.platform == "win32":
                return handles()
            return (
                sorted(os.listdir("/proc/self/fd")), os.listdir("/dev/shm").count("shmring"),
                open("/proc/self/status").read().count("SigBlk:"),
            )

        def state():
            return (
                opened(), threading.active_count(),
                [signal.getsignal(number) for number in sorted(signal.valid_signals())],
                os.getcwd(), dict(os.environ), sys.getswitchinterval(),
            )

        if sys.platform == "win32":
            import ctypes, mmap, sysconfig  # what these open is not of the package's doing
            sysconfig.get_platform()
            ctypes.WinDLL("advapi32"), ctypes.PyDLL("kernel32")
            this = ctypes.WinDLL("kernel32")

            def handles():
                flags = ctypes.c_uint32()
                valid = lambda number: this.GetHandleInformation(ctypes.c_void_p(number), ctypes.byref(flags))
                return [number for number in range(4, 8000, 4) if valid(number)]

        before = state()
        import myapp._vendor.shmring
        assert state() == before, (before, state())
        for heavy in ("multiprocessing", "asyncio", "logging", "typing_extensions"):
            assert heavy not in sys.modules or heavy == "typing_extensions", heavy
        """)  # fmt: skip
    assert out == ""


def test_the_license_and_the_type_marker_travel_along(vendored):
    copy = vendored / "myapp" / "_vendor" / "shmring"
    assert "MIT" in (copy / "LICENSE").read_text() and (copy / "py.typed").exists()
    assert {path.suffix for path in copy.iterdir() if path.is_file()} <= {".py", ".typed", ""}
