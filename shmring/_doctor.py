"""What this machine supports, for ``python -m shmring doctor``: each point with what was found, and with advice."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Final, NamedTuple

from . import __version__
from ._backend import os_backend
from ._errors import RingError, RingTimeout
from ._ring import Ring
from ._view import examine_all, quantity, said

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "fail"

SCARCE: Final = 64 << 20  # bytes; what one ring with the default capacity and number of lanes may come to
FEW: Final = 256  # descriptors; a handle takes 2 to 3, and some more for each role
SLEEP: Final = 0.05  # seconds that a reader is given to fall asleep
PATIENCE: Final = 10.0  # seconds that it may take to wake up


class Check(NamedTuple):
    """One point: "ok", "warn" or "fail", what was looked at, what was found, and what to do if it is not ok."""

    status: str
    what: str
    found: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """Look at everything, one after the other."""
    yield _python()
    yield _system()
    if sys.platform == "linux":
        yield from _shared_memory("/dev/shm")
    yield from _rings()
    yield from _descriptors()
    if sys.platform == "linux":
        yield from _memory_limits()
        yield from _remove_ipc()
    yield from _abandoned()


def _python() -> Check:
    implementation = platform.python_implementation()
    gil = "GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "no GIL"
    found = f"{implementation} {platform.python_version()}, {gil}; shmring {__version__}"
    if implementation != "CPython":
        return Check(WARN, "Python", found, "shmring is tested on CPython: run its selftest and its tests")
    return Check(OK, "Python", found)


def _system() -> Check:
    processors = os_backend.processors()
    found = f"{sys.platform}, {os_backend.MACHINE}, {processors} processor{'s' * (processors != 1)} for this process"
    if processors == 1:
        return Check(WARN, "system", found, "nobody spins here: each wait is a sleep, some 50 us longer")
    return Check(OK, "system", found)


def _shared_memory(directory: str) -> Iterator[Check]:
    if sys.platform == "win32":
        return
    what = "shared memory"
    try:
        space, status = os.statvfs(directory), os.stat(directory)
    except OSError as error:
        yield Check(FAIL, what, said(error), f"mount a tmpfs there: mount -t tmpfs -o mode=1777 tmpfs {directory}")
        return
    total, free = space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail
    found = f"{directory} has {quantity(total, 'B')}, of which {quantity(free, 'B')} are free"
    if free < SCARCE:
        advice = f"see what is in it, or make it larger: mount -o remount,size=1G {directory}; docker run --shm-size=1g"
        yield Check(WARN, what, found, advice)
    else:
        yield Check(OK, what, found)
    mode = stat.S_IMODE(status.st_mode)
    found = f"{directory} has mode {mode:04o} and belongs to user {status.st_uid}"
    if not os.access(directory, os.W_OK | os.X_OK):
        yield Check(FAIL, "permissions", found, f"this user cannot make rings: chmod 1777 {directory}")
    elif mode & 0o002 and not mode & stat.S_ISVTX:
        advice = f"without the sticky bit users can remove each other's rings: chmod 1777 {directory}"
        yield Check(WARN, "permissions", found, advice)
    else:
        yield Check(OK, "permissions", found)


def _rings() -> Iterator[Check]:
    """A small ring, from its creation to its end, with a second handle that looks at the first one's claims."""
    done = "create"
    try:
        with Ring.create(f"doctor-{uuid.uuid4().hex}", 4096, writers=2, spin=0.0) as ring:
            done = "open"
            with Ring.open(ring.name, spin=0.0) as other:
                done = "write and read"
                ring.write(b"doctor", timeout=PATIENCE)
                if other.read(timeout=PATIENCE) != b"doctor":
                    raise RingError("what was read is not what was written")
                yield Check(OK, "a ring", "created, opened, written to and read from")
                done = "locks"
                if (other.writers_alive(), ring.readers_alive()) != (1, 1) or ring.stats().lanes_in_use != 1:
                    raise RingError("handles do not see each other's claims")
                yield Check(OK, "claims", "handles see which roles others have")
                done = "sleep and wake up"
                yield Check(OK, "waking", f"a reader that slept was woken in {_time_to_wake(ring, other) * 1e6:.0f} us")
                backend = ring.backend
    except (RingError, OSError, NotImplementedError) as error:
        yield Check(FAIL, "a ring", f"{done}: {said(error)}", f"rings do not work here; try {__package__}.selftest")
        return
    slower = re.search(r"no membarrier[^;]*: ([^;]*)", backend)
    advice = "allow the system call membarrier (seccomp?); Linux has it from 4.16 on" if slower else ""
    yield Check(WARN if slower else OK, "backend", backend, advice)


def _time_to_wake(writing: Ring, reading: Ring) -> float:
    """Seconds from a write until the reader, asleep in a thread, has the message."""
    woken: list[float] = []

    def read() -> None:
        with contextlib.suppress(RingTimeout):
            reading.read(timeout=PATIENCE)
            woken.append(time.perf_counter())

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(SLEEP)
    began = time.perf_counter()
    writing.write(b"wake up", timeout=PATIENCE)
    thread.join()
    if not woken:
        raise RingError(f"a sleeping reader was not woken in {PATIENCE:.0f} seconds")
    return max(0.0, woken[0] - began)


def _descriptors() -> Iterator[Check]:
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,} for this process"
    if 0 <= limit <= FEW:
        yield Check(WARN, "descriptors", found, "a handle takes 2 to 3, and some for its roles: ulimit -n 4096")
    else:
        yield Check(OK, "descriptors", found)


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return None


def _memory_limits() -> Iterator[Check]:
    """cgroups(7): the container's, which shared memory counts against; version 2 and, where there is none, 1."""
    ways = []
    for line in (_read("/proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not controllers:
            ways += [(f"/sys/fs/cgroup{place}", "memory.max", "memory.current") for place in (path, "")]
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            ways += [(f"/sys/fs/cgroup/memory{place}", *names) for place in (path, "")]
    for directory, limit, usage in ways:
        most, used = ((_read(f"{directory}/{name}") or "").strip() for name in (limit, usage))
        if not most.isdecimal() or int(most) >= 1 << 62:  # "max", and what version 1 has for it
            continue
        free = int(most) - int(used) if used.isdecimal() else int(most)
        found = f"the cgroup may have {quantity(int(most), 'B')}, and has {quantity(free, 'B')} left"
        if free < SCARCE:
            yield Check(WARN, "memory limit", found, "shared memory counts against it: give the container more")
        else:
            yield Check(OK, "memory limit", f"{found}; shared memory counts against it")
        return


def _remove_ipc() -> Iterator[Check]:
    """logind.conf(5): RemoveIPC, which is yes unless it is said, where systemd runs at all; never for root's."""
    if sys.platform == "win32" or not os.geteuid() or not os.path.isdir("/run/systemd/system"):
        return
    files = ["/etc/systemd/logind.conf"]
    for directory in ("/usr/lib", "/run", "/etc"):
        files += sorted(glob.glob(f"{directory}/systemd/logind.conf.d/*.conf"))
    contents = [text for text in map(_read, files) if text is not None]
    said_last = re.findall(r"^\s*RemoveIPC\s*=\s*(\S+)", "\n".join(contents), re.MULTILINE)
    if not contents or (said_last and said_last[-1].lower() in ("no", "false", "off", "0")):
        return
    found = "RemoveIPC=yes: systemd removes a user's rings at the end of the last session"
    yield Check(WARN, "logind", found, "for services: run as a system user, or set RemoveIPC=no in logind.conf")


def _abandoned() -> Iterator[Check]:
    try:
        rings = examine_all(os_backend.names())
    except OSError as error:
        yield Check(WARN, "rings", said(error), "ls and gc do not work here")
        return
    left = sum(facts["state"] == "abandoned" for facts in rings.values())
    found = f"{len(rings):,} there, {left:,} of them abandoned"
    advice = f"remove what killed processes left: python -m {__package__} gc"
    yield Check(WARN, "rings", found, advice) if left else Check(OK, "rings", found)
