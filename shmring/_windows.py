"""Windows: a segment in a named file mapping; claims, bells and presence by named events.

A kernel object there has a name for as long as somebody has a handle of it, and the kernel closes the
handles of a process that dies. That is how long a ring lives, and what becomes of a dead process's roles:

    shmring-name-NAME      mapping, a page: the nonce of the ring that has this name now, or zeros
    shmring-lock-NAME      mutex: who is about to change that
    shmring-ring-NONCE     mapping: the ring's segment. It is whole before a name leads to it
    shmring-present-NONCE  event that is never set: every open handle has a handle of it
    shmring-claim-NONCE-N  event: the role with this number is taken. Its holder has taken the signal out of it
    shmring-bell-NONCE-N   event: a bell, at this offset of the segment

A ring whose nonce has no presence is not there, whatever else of it is. Who only wants to know whether an
object exists opens it as one of another kind, which fails in another way if it does: a handle, even for a
moment, would make what is there for nobody any more look taken. So claims need no lock: an event that is
created set can be taken by one only, and a process stopped in the middle of a scan is in nobody's way.

Names begin with "Local\\", that is, they belong to the session of the user who is logged in. With the
environment variable SHMRING_NAMESPACE=Global they belong to the machine, for which Windows wants a
privilege that services and administrators have (SeCreateGlobalPrivilege).
"""

from __future__ import annotations

import sys

if sys.platform != "win32":
    raise ImportError(f"this is the Windows backend of shmring, not one for {sys.platform}")

import ctypes
import errno
import math
import mmap
import os
import sysconfig
import threading
import time
from collections.abc import Callable
from ctypes import PyDLL, addressof, byref, c_char, c_int, c_size_t, c_uint32, c_void_p, c_wchar_p
from functools import partial
from typing import Any, Final

from . import _layout
from ._errors import RingBusy, RingCorrupted
from ._layout import Layout
from ._words import Fence, make_fence

# Of the interpreter, which may be emulated: then it has the memory model of the processor that is played.
MACHINE: Final = {"win-amd64": "AMD64", "win-arm64": "ARM64"}.get(sysconfig.get_platform(), "")
if not MACHINE:
    raise ImportError(f"shmring knows 64-bit AMD64 and ARM64 Windows, not {sysconfig.get_platform()}")
TSO: Final = MACHINE == "AMD64"  # stores stay in order, and loads

PREFIX: Final = "shmring-"
LOCK_SECONDS: Final = 1.0  # that a change of a name waits for another one
SLICE: float | None = 0.1  # seconds that the main thread sleeps at most before it looks for Ctrl-C

# <winerror.h>
ERROR_FILE_NOT_FOUND: Final = 2
ERROR_ACCESS_DENIED: Final = 5

# <winnt.h>
PAGE_READWRITE: Final = 0x04
SEC_RESERVE: Final = 0x04000000
MEM_COMMIT: Final = 0x00001000
READ_CONTROL: Final = 0x00020000
SYNCHRONIZE: Final = 0x00100000
FILE_MAP_WRITE: Final = 0x0002  # SECTION_MAP_WRITE
FILE_MAP_READ: Final = 0x0004  # SECTION_MAP_READ
OWNER_SECURITY_INFORMATION: Final = 0x00000001
TOKEN_QUERY: Final = 0x0008
TokenUser: Final = 1  # of enum TOKEN_INFORMATION_CLASS
TokenOwner: Final = 4

# <winbase.h>, <handleapi.h>
INFINITE: Final = 0xFFFFFFFF
WAIT_OBJECT_0: Final = 0x00000000
WAIT_ABANDONED: Final = 0x00000080
WAIT_TIMEOUT: Final = 0x00000102
INVALID_HANDLE_VALUE: Final = c_void_p(-1)

LONGEST: Final = 1 << 30  # milliseconds in a wait; twelve days, after which the ring looks again
AUTO_RESET, MANUAL_RESET = 0, 1  # bManualReset of CreateEventW
UNSET, SET = 0, 1  # bInitialState of CreateEventW

# Well-known security identifiers, of winnt.h: who may own a ring besides this user. Root's likes.
SYSTEM: Final = bytes.fromhex("010100000000000512000000")  # S-1-5-18
ADMINISTRATORS: Final = bytes.fromhex("01020000000000052000000020020000")  # S-1-5-32-544


class Handle(c_void_p):
    """A kernel handle that is closed when the last reference to it goes.

    A function with this restype returns an instance made within the same call in C, so that no exception
    of a signal handler can come between the system's answer and its keeper. None (false) is no handle.
    """

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if self and not finalizing():  # at the end of the process the system closes it
            _close_handle(self)


# Own function objects, with own prototypes; WinDLL lets go of the interpreter, for calls that may take long.
_waiting = ctypes.WinDLL("kernel32", use_last_error=True)
_quick = PyDLL("kernel32", use_last_error=True)
_advapi = ctypes.WinDLL("advapi32", use_last_error=True)

# BOOL CloseHandle(HANDLE hObject);
_close_handle = _quick["CloseHandle"]
_close_handle.argtypes = (c_void_p,)
_close_handle.restype = c_int

# HANDLE CreateFileMappingW(HANDLE, LPSECURITY_ATTRIBUTES, DWORD flProtect, DWORD sizeHigh, DWORD sizeLow, LPCWSTR);
_create_file_mapping = _waiting["CreateFileMappingW"]
_create_file_mapping.argtypes = (c_void_p, c_void_p, c_uint32, c_uint32, c_uint32, c_wchar_p)
_create_file_mapping.restype = Handle

# HANDLE OpenFileMappingW(DWORD dwDesiredAccess, BOOL bInheritHandle, LPCWSTR lpName);
_open_file_mapping = _quick["OpenFileMappingW"]
_open_file_mapping.argtypes = (c_uint32, c_int, c_wchar_p)
_open_file_mapping.restype = Handle

# HANDLE CreateEventW(LPSECURITY_ATTRIBUTES, BOOL bManualReset, BOOL bInitialState, LPCWSTR lpName);
_create_event = _quick["CreateEventW"]
_create_event.argtypes = (c_void_p, c_int, c_int, c_wchar_p)
_create_event.restype = Handle

# HANDLE OpenEventW(DWORD dwDesiredAccess, BOOL bInheritHandle, LPCWSTR lpName);
_open_event = _quick["OpenEventW"]
_open_event.argtypes = (c_uint32, c_int, c_wchar_p)
_open_event.restype = Handle

# BOOL SetEvent(HANDLE hEvent);
_set_event = _quick["SetEvent"]
_set_event.argtypes = (c_void_p,)
_set_event.restype = c_int

# BOOL ResetEvent(HANDLE hEvent);
_reset_event = _quick["ResetEvent"]
_reset_event.argtypes = (c_void_p,)
_reset_event.restype = c_int

# HANDLE CreateMutexW(LPSECURITY_ATTRIBUTES, BOOL bInitialOwner, LPCWSTR lpName);
_create_mutex = _quick["CreateMutexW"]
_create_mutex.argtypes = (c_void_p, c_int, c_wchar_p)
_create_mutex.restype = Handle

# HANDLE OpenMutexW(DWORD dwDesiredAccess, BOOL bInheritHandle, LPCWSTR lpName);
_open_mutex = _quick["OpenMutexW"]
_open_mutex.argtypes = (c_uint32, c_int, c_wchar_p)
_open_mutex.restype = c_void_p  # not a Handle: None, and a Handle of nothing would be much work for each question

# BOOL ReleaseMutex(HANDLE hMutex);
_release_mutex = _quick["ReleaseMutex"]
_release_mutex.argtypes = (c_void_p,)
_release_mutex.restype = c_int

# DWORD WaitForSingleObject(HANDLE hHandle, DWORD dwMilliseconds);
_wait = _waiting["WaitForSingleObject"]
_wait.argtypes = (c_void_p, c_uint32)
_wait.restype = c_uint32
_poll = _quick["WaitForSingleObject"]  # with no time to wait
_poll.argtypes = (c_void_p, c_uint32)
_poll.restype = c_uint32

# DWORD WaitForMultipleObjects(DWORD nCount, const HANDLE *lpHandles, BOOL bWaitAll, DWORD dwMilliseconds);
_wait_for_one = _waiting["WaitForMultipleObjects"]
_wait_for_one.argtypes = (c_uint32, c_void_p, c_int, c_uint32)
_wait_for_one.restype = c_uint32
_Two = c_void_p * 2

# BOOL ProcessIdToSessionId(DWORD dwProcessId, DWORD *pSessionId);
_session_of = _quick["ProcessIdToSessionId"]
_session_of.argtypes = (c_uint32, c_void_p)
_session_of.restype = c_int

# LPVOID VirtualAlloc(LPVOID lpAddress, SIZE_T dwSize, DWORD flAllocationType, DWORD flProtect);
_virtual_alloc = _waiting["VirtualAlloc"]
_virtual_alloc.argtypes = (c_void_p, c_size_t, c_uint32, c_uint32)
_virtual_alloc.restype = c_void_p

# HANDLE GetCurrentProcess(void); a constant that need not be closed
_current_process = _quick["GetCurrentProcess"]
_current_process.argtypes = ()
_current_process.restype = c_void_p

# BOOL OpenProcessToken(HANDLE ProcessHandle, DWORD DesiredAccess, PHANDLE TokenHandle);
_open_process_token = _advapi["OpenProcessToken"]
_open_process_token.argtypes = (c_void_p, c_uint32, c_void_p)
_open_process_token.restype = c_int

# BOOL GetTokenInformation(HANDLE, TOKEN_INFORMATION_CLASS, LPVOID information, DWORD length, PDWORD returnLength);
_get_token_information = _advapi["GetTokenInformation"]
_get_token_information.argtypes = (c_void_p, c_int, c_void_p, c_uint32, c_void_p)
_get_token_information.restype = c_int

# BOOL GetKernelObjectSecurity(HANDLE, SECURITY_INFORMATION, PSECURITY_DESCRIPTOR, DWORD length, LPDWORD lengthNeeded);
_get_kernel_object_security = _advapi["GetKernelObjectSecurity"]
_get_kernel_object_security.argtypes = (c_void_p, c_uint32, c_void_p, c_uint32, c_void_p)
_get_kernel_object_security.restype = c_int


_last_error = partial(ctypes.get_last_error)


def describe() -> str:
    """What `Ring.backend` says."""
    return "windows: named events and mappings; a fence with every message"


yield_processor = partial(time.sleep, 0)  # Sleep(0): whoever waits for this processor goes first


def processors() -> int:
    """How many this process may run on."""
    return os.cpu_count() or 1


def follow_forks(take_up: Callable[[], None]) -> None:
    """There are no forks."""


def _failure(what: str, name: str, number: int | None = None) -> OSError:
    """The error of the last call, or with this number, as an exception that names the ring."""
    if number is None:
        number = ctypes.get_last_error()
    reason = ctypes.FormatError(number).strip() if number else "the system gives no reason"
    return OSError(0, f"{what}: {reason}", name, number)


def _prefix() -> str:
    """What the names of all objects begin with."""
    namespace = os.environ.get("SHMRING_NAMESPACE", "Local")
    if namespace not in ("Local", "Global"):
        raise ValueError(f"the environment variable SHMRING_NAMESPACE is Local or Global, not {namespace!r}")
    return f"{namespace}\\{PREFIX}"


def _exists(name: str) -> bool:
    """Is there an event of this name? In doubt, yes. Opens nothing, because as a mutex it cannot be opened."""
    # Both calls in one go in C: no signal handler's own calls come between, and leave an error of theirs.
    mutex, error = map(partial.__call__, (partial(_open_mutex, SYNCHRONIZE, False, name), _last_error))
    if mutex:
        _close_handle(mutex)  # a stranger's
    return bool(mutex) or error != ERROR_FILE_NOT_FOUND


def _sid(data: bytes, offset: int) -> bytes:
    """A security identifier, <winnt.h>: revision, count of what follows after 8 bytes, 4 bytes each."""
    return data[offset : offset + 8 + 4 * data[offset + 1]]


def _is_trusted(handle: Handle) -> bool:
    """Does a kernel object belong to this user, or to the system? Wine has objects that belong to nobody."""
    buffer, needed = ctypes.create_string_buffer(1024), c_uint32()
    if not _get_kernel_object_security(handle, OWNER_SECURITY_INFORMATION, buffer, len(buffer), byref(needed)):
        return False
    # SECURITY_DESCRIPTOR_RELATIVE, <winnt.h>: 4 bytes, then the offset of the owner
    offset = int.from_bytes(buffer.raw[4:8], "little")
    return not offset or _sid(buffer.raw, offset) in {SYSTEM, ADMINISTRATORS, *_own_sids()}


def _own_sids() -> set[bytes]:
    """The security identifiers of this user, and of who owns what this process makes, which may be a group."""
    token, found = Handle(), set()
    if _open_process_token(_current_process(), TOKEN_QUERY, byref(token)):
        for kind in (TokenUser, TokenOwner):
            buffer, needed = ctypes.create_string_buffer(1024), c_uint32()
            if _get_token_information(token, kind, buffer, len(buffer), byref(needed)):
                # TOKEN_USER and TOKEN_OWNER begin with a pointer to what lies in the same buffer
                found.add(_sid(buffer.raw, int.from_bytes(buffer.raw[:8], "little") - addressof(buffer)))
    return found


def unlink(name: str) -> None:
    """Remove a ring's name; FileNotFoundError if there is none. Open handles stay as they are."""
    passing = Segment(name)
    passing._open_name(make=False)

    def forget() -> None:
        nonce = passing._named()
        if nonce is None:
            raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", name)
        passing._forget(nonce)

    passing._change_the_name(forget)


class Doorbell:
    """An event that stays set from when a bell is rung until it is heard: event loops can wait for it."""

    def __init__(self, event: Handle) -> None:
        self._event: Handle | None = event

    def fileno(self) -> int:
        """The event's handle, for WaitForSingleObject and the like.

        Raises:
            OSError: EBADF: it is closed.
        """
        if self._event is None:
            raise OSError(errno.EBADF, "this doorbell is closed")
        return int(self._event.value or 0)

    def ring(self) -> bool:
        """Set it; False if it is closed."""
        event = self._event
        return event is not None and bool(_set_event(event))

    def heard(self) -> bool:
        """Reset it; was it set? One that is set in between is of before: who hears announces itself anew after it."""
        event = self.fileno()
        heard = bool(_poll(event, 0) == WAIT_OBJECT_0)
        if heard:
            _reset_event(event)
        return heard

    def remove(self) -> None:
        """It has no name that outlives it."""

    def close(self) -> None:
        """Close it."""
        self._event = None


class Segment:
    """The shared memory of one handle, and its kernel objects. See `_backend.Segment` for what it promises."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Layout
        self.map: mmap.mmap
        self.words: memoryview
        self._prefix = _prefix()
        self._name_page: mmap.mmap | None = None  # keeps the name
        self._present: Handle | None = None
        self._claims: dict[int, Handle] = {}
        # Waiting. Each thread that waits has an event of its own, its alarm, besides the bell that they share.
        self._bells: dict[int, Handle] = {}
        self._doorbells: dict[int, Doorbell] = {}  # by bell; of its sleeper
        self._heard: dict[int, object] = {}  # by bell; another object each time that it was heard
        self._asleep: dict[int, dict[int, Handle]] = {}  # by bell; the alarms of who may be waiting, by number
        self._alarms: list[Handle] = []  # that nobody uses now

    @classmethod
    def create(cls, name: str, layout: Layout, mode: int, replace: bool) -> Segment:
        """Make the ring's mapping, and have its name lead to it. `mode` has no meaning here."""
        if layout.keep:
            what = "keep=True: Windows has no such thing; a ring lives there as long as somebody has it open"
            raise NotImplementedError(what)
        self = cls(name)
        self.layout = layout
        try:
            self._open_name(make=True)
            size, access = layout.segment_bytes, PAGE_READWRITE | SEC_RESERVE
            reserved = _create_file_mapping(
                INVALID_HANDLE_VALUE, None, access, size >> 32, size & 0xFFFFFFFF, self._of("ring")
            )
            if not reserved:
                raise _failure(f"cannot create a mapping of {size:,} bytes", name)
            self._attach()
            self._commit(0, layout.lanes_offset, "the ring's control words")
            header = _layout.pack_header(layout, MACHINE)
            self.map[8 : len(header)] = header[8:]
            self.map[0:8] = header[:8]
            self._present = _create_event(None, MANUAL_RESET, UNSET, self._of("present"))
            if not self._present:
                raise _failure("cannot create the event of the ring's presence", name)
            self._change_the_name(lambda: self._take_the_name(replace))
            return self
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, name: str, any_owner: bool) -> Segment:
        """Attach to a ring that somebody has open."""
        self = cls(name)
        try:
            self._open_name(make=False)
            nonce = self._named()
            if nonce is None:
                raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", name)
            access = FILE_MAP_READ | FILE_MAP_WRITE | READ_CONTROL
            section = _open_file_mapping(access, False, self._of("ring", nonce))
            if section:
                # Now it cannot go any more, or it is gone. With the section, so that presence always has memory.
                self._present = _open_event(SYNCHRONIZE, False, self._of("present", nonce))
            if not self._present:
                if ctypes.get_last_error() != ERROR_FILE_NOT_FOUND:
                    raise _failure("cannot open the ring", name)
                raise FileNotFoundError(errno.ENOENT, "the ring of this name was just removed", name)
            if not any_owner and not _is_trusted(section):
                what = "the ring belongs to another user; any_owner=True (--any-owner) trusts that user"
                raise PermissionError(errno.EPERM, what, name)
            with mmap.mmap(-1, _layout.HEADER_BYTES, tagname=self._of("ring", nonce)) as header:
                self.layout = layout = _layout.parse_header(header[:], None, MACHINE, name)
            if layout.nonce != nonce:
                raise RingCorrupted(f"ring {name!r}: its nonce is not the one in its name")
            self._attach()
        except BaseException:
            self.close()
            raise
        return self

    def _of(self, kind: str, nonce: bytes | None = None) -> str:
        """The name of this ring's object of a kind."""
        return f"{self._prefix}{kind}-{(nonce or self.layout.nonce).hex()}"

    def _attach(self) -> None:
        """Map the segment, which exists. So mmap does not create it, and it stays SEC_RESERVE."""
        size = self.layout.segment_bytes
        try:
            self.map = mmap.mmap(-1, size, tagname=self._of("ring"))
        except OSError as error:
            if error.winerror == ERROR_ACCESS_DENIED:
                raise RingCorrupted(f"ring {self.name!r} is shorter than the {size:,} bytes that it says") from error
            raise _failure(f"cannot map the ring's {size:,} bytes", self.name, error.winerror) from error
        self.words = memoryview(self.map).cast("Q")
        self._address = addressof(c_char.from_buffer(self.map))

    def _commit(self, offset: int, nbytes: int, what: str) -> None:
        if not _virtual_alloc(self._address + offset, nbytes, MEM_COMMIT, PAGE_READWRITE):
            # The same errno as elsewhere; what Windows calls it is in the text.
            reason = ctypes.FormatError(ctypes.get_last_error()).strip()
            raise OSError(errno.ENOSPC, f"no memory for {what}, {nbytes:,} bytes: {reason}", self.name)

    # ------------------------------------------------------------ the name

    def _open_name(self, make: bool) -> None:
        """Keep the page that says which ring has this name; made of zeros if there is none and `make` says so."""
        page = f"{self._prefix}name-{self.name}"
        # In the namespace Global it takes a privilege to make one, but none to find that there is none.
        there = make or _open_file_mapping(FILE_MAP_READ, False, page)
        if not there and ctypes.get_last_error() == ERROR_FILE_NOT_FOUND:
            raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", self.name)
        try:
            self._name_page = mmap.mmap(-1, _layout.PAGE, tagname=page)
        except OSError as error:
            raise _failure("cannot open the page of the ring's name", self.name, error.winerror) from error

    def _named(self) -> bytes | None:
        """The nonce of the ring that has this name now, if that one is there.

        Without the lock it may be half of one and half of another, which is none.
        """
        assert self._name_page is not None
        nonce = self._name_page[:16]
        return nonce if any(nonce) and _exists(self._of("present", nonce)) else None

    def _take_the_name(self, replace: bool) -> None:
        """With the lock: have the name lead to this ring if it leads nowhere."""
        if self._named() is not None:
            if replace:
                raise RingBusy(f"ring {self.name!r} cannot be replaced: somebody has it open")
            raise FileExistsError(errno.EEXIST, "a ring of this name exists and somebody has it open", self.name)
        assert self._name_page is not None
        self._name_page[: len(self.layout.nonce)] = self.layout.nonce

    def _forget(self, nonce: bytes) -> None:
        """With the lock: have the name lead nowhere if it leads to this ring."""
        assert self._name_page is not None
        if self._name_page[: len(nonce)] == nonce:
            self._name_page[: len(nonce)] = bytes(len(nonce))

    def _change_the_name(self, change: Callable[[], None]) -> None:
        """Call this with the lock of the name. If its last holder died in the middle, there is nothing to repair.

        No context manager: a signal handler's exception as it is entered would leave the lock to the traceback.
        """
        mutex = _create_mutex(None, False, f"{self._prefix}lock-{self.name}")
        if not mutex:
            raise _failure("cannot open the mutex of the ring's name", self.name)
        outcome: list[int] = []
        try:
            # One call in C waits and notes: an exception of a signal handler cannot lose that we have it.
            outcome.extend(map(_wait, [mutex], [math.ceil(LOCK_SECONDS * 1000)]))
            if outcome == [WAIT_TIMEOUT]:
                raise RingBusy(
                    f"the name of ring {self.name!r} is being changed by another process, which does not get on with it"
                )
            if outcome not in ([WAIT_OBJECT_0], [WAIT_ABANDONED]):
                raise _failure("cannot wait for the mutex of the ring's name", self.name)
            change()
        finally:
            if outcome in ([WAIT_OBJECT_0], [WAIT_ABANDONED]):
                _release_mutex(mutex)

    def unlink(self) -> None:
        """Remove the ring's name if it still is this ring's."""
        if self._name_page is not None:
            self._change_the_name(lambda: self._forget(self.layout.nonce))

    # ------------------------------------------------------------ claims

    def _claim_name(self, byte: int) -> str:
        return f"{self._of('claim')}-{byte - _layout.PRESENCE}"

    def claim(self, byte: int) -> bool:
        """Take a role for this handle, if no living handle has it. Taking it again is fine."""
        if byte in self._claims:
            return True
        name = self._claim_name(byte)
        if _exists(name):
            return False
        event = None
        try:
            event = _create_event(None, AUTO_RESET, SET, name)
            if not event:
                raise _failure("cannot create the event of a claim", self.name)
            # Of several who come here at once, with handles of the same event, one gets the signal.
            if _poll(event, 0) != WAIT_OBJECT_0:
                return False
            self._claims[byte] = event
            return True
        finally:
            del event  # else the traceback of a signal handler's exception has it, and the role looks taken

    def release(self, byte: int) -> None:
        """Give a role back. Not held: nothing happens."""
        if byte in self._claims:
            # The signal is for who has a handle of it this very moment. It is in no variable, as in `claim`.
            _set_event(self._claims.pop(byte))

    def is_claimed(self, byte: int) -> bool:
        """Does another handle hold this role now, by the kernel's word?"""
        return byte not in self._claims and _exists(self._claim_name(byte))

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles other handles hold now, by the kernel's word."""
        return sum(map(self.is_claimed, range(first, first + count)))

    def reserve(self, offset: int, nbytes: int) -> None:
        """Have memory for these bytes of the segment, for good; ENOSPC if there is none."""
        self._commit(offset, nbytes, "a lane")

    def back(self, offset: int, nbytes: int) -> None:
        """See that these bytes can be used, which a lane's words say were reserved.

        If the words are damaged they may not be, and a single look would end the process. Where they were, nothing
        changes.
        """
        self.reserve(offset, nbytes)

    # ------------------------------------------------------------ sleeping and waking

    def order_fence(self) -> Fence:
        """What keeps loads and stores in order, for one monitor; None where the machine does."""
        return None if TSO else make_fence(TSO)

    def waker_fence(self) -> Fence:
        """What a waker does between publishing and looking for sleepers."""
        return make_fence(TSO)

    def sleeper_fence(self) -> bool:
        """A full barrier here; wakers have their own."""
        make_fence(TSO)()
        return True

    def _bell(self, bell: int) -> Handle:
        event = self._bells.get(bell)
        if event is None:
            new = _create_event(None, AUTO_RESET, UNSET, f"{self._of('bell')}-{bell}")
            if not new:
                raise _failure("cannot create the event of a bell", self.name)
            event = self._bells.setdefault(bell, new)
        return event

    def ring(self, bell: int) -> bool:
        """Wake who sleeps on a bell, or the next one who will; the event remembers it."""
        state = self.words[(bell + _layout.DOORBELL) >> 3]
        if not state & _layout.ALONE:
            _set_event(self._bell(bell))
        if state & _layout.ATTACHED:
            doorbell = self._doorbells.get(bell)
            if doorbell is None:
                try:
                    doorbell = self._doorbells.setdefault(bell, self.doorbell(bell))
                except OSError:  # the message is published: to raise now would have its writer write it again
                    return False
            doorbell.ring()
        return True

    def doorbell(self, bell: int) -> Doorbell:
        """Make what event loops can wait for, and `ring` rings too while the word beside the bell says so."""
        event = _create_event(None, MANUAL_RESET, UNSET, f"{self._of('doorbell')}-{bell}")
        if not event:
            raise _failure("cannot create the event of a doorbell", self.name)
        return Doorbell(event)

    def note(self, bell: int) -> object:
        """To be given to `wait`, which then returns also if the bell is heard before it is called."""
        self._bell(bell)  # it exists before anybody is asked to ring it
        return self._heard.setdefault(bell, None)

    def wait(self, bell: int, noted: object, deadline: float | None) -> None:
        """Sleep until the bell is rung, or `deadline` (time.perf_counter), or less.

        The event wakes one thread, who wakes this handle's others: all of them wait for what it is about.
        """
        try:
            alarm = self._alarms.pop()
        except IndexError:
            alarm = _create_event(None, AUTO_RESET, UNSET, None)
            if not alarm:
                raise _failure("cannot create an event", self.name) from None
        number: Any = alarm.value
        asleep = self._asleep.setdefault(bell, {})
        heard = False
        try:
            asleep[number] = alarm  # before the look at `_heard`, as `wake` does the two the other way round
            if self._heard.get(bell) is noted:
                # The alarm first: who is woken by both, as a closing handle's threads may be, leaves the signal
                # in the bell to the next handle's.
                both = _Two(number, self._bell(bell).value)
                milliseconds = _milliseconds(deadline)
                heard = True  # an exception after the call would hide that the signal was taken
                outcome = _wait_for_one(2, both, False, milliseconds)
                heard = outcome == WAIT_OBJECT_0 + 1
                if outcome not in (WAIT_OBJECT_0, WAIT_OBJECT_0 + 1, WAIT_TIMEOUT):
                    raise _failure("cannot wait for an event", self.name)
            asleep.pop(number, None)
            if heard:
                self.wake(bell)
        except BaseException:
            asleep.pop(number, None)
            if heard:
                self.wake(bell)  # once more, if a signal handler's exception came in the middle of it
            raise
        self._alarms.append(alarm)

    def wake(self, bell: int) -> None:
        """Have this handle's own threads return from `wait`, now or when they come to it."""
        self._heard[bell] = object()
        for alarm in list(self._asleep.get(bell, {}).values()):
            _set_event(alarm)

    # ------------------------------------------------------------ life and death

    def leave(self) -> None:
        """Be present no more; if nobody else is, the ring is gone. The roles and the memory stay with us."""
        self._present = None

    def close(self, keep: bool = False) -> None:
        """Leave, and give up all claims. `keep` has no meaning here.

        The memory goes when the last reference to the map does: a thread may still be about to wait.
        """
        self.leave()
        for byte in list(self._claims):
            self.release(byte)
        page, self._name_page = self._name_page, None
        if page is not None:
            page.close()


def _milliseconds(deadline: float | None) -> int:
    """How long to wait, rounded up; in the main thread not beyond the slice."""
    milliseconds = INFINITE
    if deadline is not None:
        milliseconds = min(max(0, math.ceil((deadline - time.perf_counter()) * 1000)), LONGEST)
    if SLICE is not None and threading.get_ident() == threading.main_thread().ident:
        milliseconds = min(milliseconds, math.ceil(SLICE * 1000))
    return milliseconds


# ---------------------------------------------------------------- looking from outside


def names() -> list[str]:
    """The names that rings of this namespace have, or have had that somebody still knows, in alphabetical order."""
    from . import _ntdll  # for who lists rings alone

    directory, session = "\\BaseNamedObjects", c_uint32()
    if _prefix().startswith("Local") and _session_of(os.getpid(), byref(session)) and session.value:
        directory = f"\\Sessions\\{session.value}{directory}"
    page = f"{PREFIX}name-"
    found = [name[len(page) :] for name in _ntdll.names_of_objects(directory) if name.startswith(page)]
    return sorted(filter(_layout.is_name, found))


class Look:
    """A ring as it is seen from outside; see `_backend.Look`. By a handle of its memory, which keeps nothing alive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout: Layout
        self.map: mmap.mmap
        self.words: memoryview
        self.size: int | None = None
        self.memory: int | None = None
        self.owner: int | None = None
        self.mode: int | None = None
        self.header = b""
        passing = Segment(name)
        try:
            passing._open_name(make=False)
            nonce = passing._named()
        finally:
            passing.close()
        if nonce is None:
            raise FileNotFoundError(errno.ENOENT, "there is no ring of this name", name)
        self.where = passing._of("ring", nonce)
        self._present, self._claim = passing._of("present", nonce), passing._of("claim", nonce)
        self._section: Handle | None = _open_file_mapping(FILE_MAP_READ, False, self.where)
        if not self._section:
            if ctypes.get_last_error() == ERROR_FILE_NOT_FOUND:
                raise FileNotFoundError(errno.ENOENT, "the ring of this name was just removed", name)
            raise _failure("cannot open the ring", name)
        with self._map(_layout.HEADER_BYTES) as header:
            self.header = header[:]

    def _map(self, nbytes: int) -> mmap.mmap:
        """It exists, because we have a handle of it: so it is not made by this."""
        try:
            return mmap.mmap(-1, nbytes, tagname=self.where, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.winerror == ERROR_ACCESS_DENIED:
                raise RingCorrupted(f"ring {self.name!r} is shorter than the {nbytes:,} bytes that it says") from error
            raise _failure(f"cannot map the ring's {nbytes:,} bytes", self.name, error.winerror) from error

    def attach(self, layout: Layout, nbytes: int) -> None:
        """Map the first `nbytes` for reading."""
        self.layout = layout
        self.map = self._map(nbytes)
        self.words = memoryview(self.map).cast("Q")

    def is_open(self) -> bool:
        """Has anybody the ring open?"""
        return _exists(self._present)

    def claimed(self, first: int, count: int) -> int:
        """How many of `count` roles are held now, by the kernel's word."""
        numbers = range(first - _layout.PRESENCE, first - _layout.PRESENCE + count)
        return sum(_exists(f"{self._claim}-{number}") for number in numbers)

    def order_fence(self) -> Fence:
        """What keeps loads in order; None where the machine does."""
        return None if TSO else make_fence(TSO)

    def close(self) -> None:
        """Look no more."""
        self._section = None


def collect(name: str, kept: bool) -> bool:
    """Nothing outlives the processes that have it open, so there is never anything to remove: False."""
    return False


def strays(dry: bool) -> list[str]:
    """Nothing outlives the processes that have it open."""
    return []
