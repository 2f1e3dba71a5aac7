"""Windows: the names of the kernel's objects, which only ntdll lists.

User mode has no header for it, so that `tools/check_abi.py` has nothing to hold this against. The prototypes are those
that Microsoft documents: ZwOpenDirectoryObject for drivers, NtQueryDirectoryObject among the API of "winternl".
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    raise ImportError(f"ntdll is a library of Windows, not of {sys.platform}")

import ctypes
from collections.abc import Iterator
from ctypes import Structure, addressof, byref, c_int32, c_uint8, c_uint16, c_uint32, c_void_p, c_wchar_p, sizeof
from typing import Final

DIRECTORY_QUERY: Final = 0x0001
STATUS_NO_MORE_ENTRIES: Final = 0x8000001A - (1 << 32)

_ntdll = ctypes.WinDLL("ntdll")


class _UnicodeString(Structure):
    """UNICODE_STRING: lengths in bytes, without the final zero."""

    _fields_ = (("Length", c_uint16), ("MaximumLength", c_uint16), ("Buffer", c_wchar_p))


class _ObjectAttributes(Structure):
    """OBJECT_ATTRIBUTES."""

    _fields_ = (
        ("Length", c_uint32),
        ("RootDirectory", c_void_p),
        ("ObjectName", c_void_p),
        ("Attributes", c_uint32),
        ("SecurityDescriptor", c_void_p),
        ("SecurityQualityOfService", c_void_p),
    )


class _Entry(Structure):
    """OBJECT_DIRECTORY_INFORMATION, and the text that it points to behind it."""

    _fields_ = (("Name", _UnicodeString), ("TypeName", _UnicodeString), ("text", c_uint8 * 4096))


# NTSTATUS NtOpenDirectoryObject(PHANDLE, ACCESS_MASK, POBJECT_ATTRIBUTES);
_open_directory = _ntdll["NtOpenDirectoryObject"]
_open_directory.argtypes = (c_void_p, c_uint32, c_void_p)
_open_directory.restype = c_int32

# NTSTATUS NtQueryDirectoryObject(HANDLE, PVOID buffer, ULONG length, BOOLEAN ReturnSingleEntry, BOOLEAN RestartScan,
#     PULONG context, PULONG returnLength);
_query_directory = _ntdll["NtQueryDirectoryObject"]
_query_directory.argtypes = (c_void_p, c_void_p, c_uint32, c_uint8, c_uint8, c_void_p, c_void_p)
_query_directory.restype = c_int32

# NTSTATUS NtClose(HANDLE);
_close = _ntdll["NtClose"]
_close.argtypes = (c_void_p,)
_close.restype = c_int32


def names_of_objects(directory: str) -> Iterator[str]:
    """The names in a directory of the object manager, one by one.

    Raises:
        OSError: Windows does not tell: a sandbox, for one, may not look there.
    """
    name = _UnicodeString(2 * len(directory), 2 * len(directory) + 2, directory)
    attributes = _ObjectAttributes(sizeof(_ObjectAttributes), None, addressof(name), 0, None, None)
    handle, entry, context, length = c_void_p(), _Entry(), c_uint32(), c_uint32()
    status = _open_directory(byref(handle), DIRECTORY_QUERY, byref(attributes))
    if status < 0:
        raise _refused(directory, status)
    try:
        while True:
            # One at a time: Wine, as of 8.0, knows no other way.
            status = _query_directory(handle, byref(entry), sizeof(entry), 1, 0, byref(context), byref(length))
            if status == STATUS_NO_MORE_ENTRIES:
                return
            if status < 0:
                raise _refused(directory, status)
            yield entry.Name.Buffer or ""
    finally:
        _close(handle)


def _refused(directory: str, status: int) -> OSError:
    what = f"Windows does not list the objects in {directory} (status {status & 0xFFFFFFFF:#010x})"
    return OSError(0, what)
