"""What this process has of everything that can leak. Without pytest, for scripts in interpreters of their own too."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path

from support import WINDOWS

from shmring import _ring
from shmring._backend import os_backend

MEMORY = 4 << 20  # bytes that the process may grow for other reasons

if WINDOWS:
    MEM_MAPPED = 0x40000  # <winnt.h>
    MEM_FREE = 0x10000
    GAP = 256  # numbers without a handle, after which there are none
    _kernel32 = ctypes.WinDLL("kernel32")
    # BOOL GetProcessHandleCount(HANDLE hProcess, PDWORD pdwHandleCount);
    _get_process_handle_count = _kernel32["GetProcessHandleCount"]
    _get_process_handle_count.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    # BOOL GetHandleInformation(HANDLE hObject, LPDWORD lpdwFlags);
    _get_handle_information = _kernel32["GetHandleInformation"]
    _get_handle_information.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    # BOOL K32GetProcessMemoryInfo(HANDLE Process, PPROCESS_MEMORY_COUNTERS ppsmemCounters, DWORD cb);
    _get_process_memory_info = _kernel32["K32GetProcessMemoryInfo"]
    _get_process_memory_info.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)

    # SIZE_T VirtualQuery(LPCVOID lpAddress, PMEMORY_BASIC_INFORMATION lpBuffer, SIZE_T dwLength);
    _virtual_query = _kernel32["VirtualQuery"]
    _virtual_query.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _virtual_query.restype = ctypes.c_size_t

    class _MemoryRegion(ctypes.Structure):
        """MEMORY_BASIC_INFORMATION, <winnt.h>, 64-bit."""

        _fields_ = (
            ("BaseAddress", ctypes.c_void_p),
            ("AllocationBase", ctypes.c_void_p),
            ("AllocationProtect", ctypes.c_uint32),
            ("PartitionId", ctypes.c_uint32),
            ("RegionSize", ctypes.c_size_t),
            ("State", ctypes.c_uint32),
            ("Protect", ctypes.c_uint32),
            ("Type", ctypes.c_uint32),
        )

    class _MemoryCounters(ctypes.Structure):
        """PROCESS_MEMORY_COUNTERS, <psapi.h>."""

        _fields_ = (
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("WorkingSetSize", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 6),
        )

    def _mapped_views():
        """How many views of sections this process has: of rings, and of files that are not programs."""
        found, address, region = set(), 0, _MemoryRegion()
        while _virtual_query(address, ctypes.byref(region), ctypes.sizeof(region)):
            if region.State != MEM_FREE and region.Type == MEM_MAPPED:
                found.add(region.AllocationBase)
            address = (region.BaseAddress or 0) + region.RegionSize
        return len(found)

    def _handles():
        count = ctypes.c_uint32()
        assert _get_process_handle_count(os_backend._current_process(), ctypes.byref(count))
        return count.value or _handles_one_by_one()

    def _handles_one_by_one():
        """Wine says 0; but its handles, too, are multiples of 4, and the lowest that are free."""
        flags, count, number, last = ctypes.c_uint32(), 0, 0, 0
        while number < last + GAP:
            number += 1
            if _get_handle_information(4 * number, ctypes.byref(flags)):
                count, last = count + 1, number
        return count

    def _memory():
        counters = _MemoryCounters(cb=ctypes.sizeof(_MemoryCounters))
        assert _get_process_memory_info(os_backend._current_process(), ctypes.byref(counters), counters.cb)
        return counters.WorkingSetSize


def mappings():
    """How many mappings of rings this process has; on Windows also what it has besides."""
    return _mapped_views() if WINDOWS else Path("/proc/self/maps").read_text().count(" /dev/shm/")


def opened():
    """What a handle's end gives back at once: how many descriptors, or kernel handles, and mappings there are."""
    return _handles() if WINDOWS else len(os.listdir("/proc/self/fd")), mappings()


def is_left(name):
    """Is there anything of a ring's name: its file, or on Windows, where that has no name, the page of it?"""
    if WINDOWS:
        page = f"{os_backend._prefix()}name-{name}"
        return bool(os_backend._open_file_mapping(os_backend.FILE_MAP_READ, False, page))
    return os.path.exists(f"/dev/shm/shmring.{name}")


def counts():
    """How much there is of everything, by name, after a garbage collection."""
    gc.collect()
    common = {
        "thread objects": threading.active_count(),
        "open rings": len(_ring._open_rings),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
    }
    if WINDOWS:
        segments = [ring._segment for ring in _ring._rings()]
        return {
            **common,
            "handles": _handles(),
            "mappings": mappings(),
            "threads": len(sys._current_frames()),
            "alarms": sum(len(segment._alarms) for segment in segments),
            "asleep": sum(len(asleep) for segment in segments for asleep in segment._asleep.values()),
            "claims": sum(len(segment._claims) for segment in segments),
            "memory": _memory(),
        }
    return {
        **common,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": mappings(),
        "threads": len(os.listdir("/proc/self/task")),
        "segments": len(os_backend._segments),
        "owners": len(os_backend._owners),
        "forking": len(os_backend._forking),
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
    }


def grown(work, times, warm_up=30):
    """What there is more of each time `work()` was done so many times, after a warm-up; {} is as it should be."""
    for _ in range(warm_up):
        work()
    for _ in range(3):  # what leaks does so each time, what only settles does not
        before = counts()
        for _ in range(times):
            work()
        found = leaked(before, times)
        if not found:
            break
    return found


def leaked(before, times):
    """What there is more of now than `before`, if it is as much as something that was done so many times leaves."""
    after = counts()
    slack = {"objects": times // 4, "blocks": times * 9 // 10, "memory": MEMORY}
    return {
        what: f"{before[what]:,} to {after[what]:,} after {times:,} times"
        for what in after
        if after[what] - before[what] > slack.get(what, 0)
    }
