"""`tools/check_abi.py`: that the backends are right by the headers of every system, and that it would see if not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys

import pytest
from support import ROOT, load_tool

PACKAGE = ROOT / "shmring"


check_abi = load_tool("check_abi")
ZIG = check_abi.find_zig()
BACKENDS = {platform: name for platform, name in check_abi.BACKENDS.items() if (PACKAGE / f"{name}.py").exists()}
TARGETS = [target for target in check_abi.TARGETS if target.platform in BACKENDS]

# It runs the source of other systems' backends, with what the standard library has here.
can_read = pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="the POSIX backends need fcntl")
needs_zig = pytest.mark.skipif(
    ZIG is None, reason="the package ziglang is not installed, and SHMRING_ZIG does not say how to call zig"
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("zig")


@pytest.fixture
def verdict(cache, capsys):
    """``verdict(package, target)``: the exit code and what is printed."""

    def run(package, target=""):
        status = check_abi.main(["--package", str(package), "--target", target, "--cache", str(cache)])
        return status, capsys.readouterr().out

    return run


# ---------------------------------------------------------------- the backends as they are


def test_every_system_that_the_package_chooses_a_backend_for_is_checked():
    chosen = re.findall(
        r'sys\.platform == "(\w+)":\s+from \. import (\w+) as os_backend', (PACKAGE / "_backend.py").read_text()
    )
    assert chosen and dict(chosen).items() <= check_abi.BACKENDS.items()
    for platform, _ in chosen:
        assert any(target.platform == platform for target in TARGETS)


@needs_zig
@can_read
def test_the_backends_are_right_on_every_target(verdict):
    status, said = verdict(PACKAGE)
    assert status == 0, said
    for target in TARGETS:
        assert re.search(rf"_\w+\.py on {re.escape(target.zig)}: \d+ constants, .* functions: right\n", said), said


@can_read
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.zig)
def test_no_block_under_a_header_and_no_structure_and_no_function_is_left_out(target):
    """Counted here once more, in another way: by what the lines look like."""
    text = (PACKAGE / f"{BACKENDS[target.platform]}.py").read_text()
    blocks = [block for block in re.split(r"\n\s*\n", text) if re.search(r"^# .*<[\w/.]+\.h>", block, re.MULTILINE)]
    constants = [name for block in blocks for name in re.findall(r"^(\w+): Final", block, re.MULTILINE)]
    formats = [name for block in blocks for name in re.findall(r"^(\w+) = struct\.Struct", block, re.MULTILINE)]
    structures = re.findall(r"^ *class (\w+)\((?:ctypes\.)?Structure\)", text, re.MULTILINE)
    functions = re.findall(r'= .*\["(\w+)"\]$', re.sub(" +#.*", "", text), re.MULTILINE)
    checked = check_abi.check(PACKAGE, target)
    assert sorted(checked.constants) == sorted(constants) and constants
    assert sorted(checked.structures) == sorted(formats + structures)
    assert sorted(function.symbol for function in checked.functions) == sorted(functions) and functions
    assert not checked.problems


@can_read
def test_each_machine_has_its_own_numbers_of_system_calls():
    said = {target.machine: check_abi.check(PACKAGE, target).text() for target in TARGETS if target.platform == "linux"}
    assert "SYS_futex) == 202LL" in said["x86_64"] and "SYS_futex) == 98LL" in said["aarch64"]


@can_read
def test_reading_leaves_this_process_as_it_was():
    import ctypes

    before = sys.platform, ctypes.CDLL, set(sys.modules)
    for target in TARGETS:
        check_abi.check(PACKAGE, target)
    assert before == (sys.platform, ctypes.CDLL, set(sys.modules))


def test_without_zig_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(check_abi, "find_zig", lambda: None)
    with pytest.raises(SystemExit) as end:
        check_abi.main([])
    assert end.value.code == 2 and "pip install ziglang" in capsys.readouterr().err


# ---------------------------------------------------------------- planted mistakes

GLIBC, MUSL, MAC, WINDOWS = "aarch64-linux-gnu", "x86_64-linux-musl", "aarch64-macos", "x86_64-windows"

# target, what is there, what is planted (`§`: in the line that is to be named), what is said of it
PLANTED = {
    # Linux
    "a constant": (
        MUSL, "FUTEX_WAKE_OP: Final = 5", "§FUTEX_WAKE_OP: Final = 6",
        "FUTEX_WAKE_OP is 6 here, 5 in the header",
    ),
    "a constant that one machine has otherwise": (
        GLIBC, '"aarch64": 98}', '§"aarch64": 99}', "SYS_futex is 99 here, 98 in the header",
    ),
    "a constant of no header": (
        MUSL, "# <limits.h>", "# <limits.h>\n§FUTEX_WAIT_BITTEN: Final = 9",
        "use of undeclared identifier 'FUTEX_WAIT_BITTEN'",
    ),
    "a constant that is no number": (
        MUSL, "# <limits.h>", '# <limits.h>\n§UINT_MAX: Final = "4294967295"',
        "UINT_MAX is under <limits.h>, but is no number",
    ),
    "a constant that is not final": (
        MUSL, "# <limits.h>", "# <limits.h>\n§UINT_MAX = 4294967295", "UINT_MAX is under <limits.h>, but not Final",
    ),
    "a constant in no header's block": (
        MUSL, "# <limits.h>", "§FUTEX_LOCK_PI: Final = 6\n\n# <limits.h>",
        "FUTEX_LOCK_PI is a name of the headers, but stands in no block with a header's name",
    ),
    "an offset in a format": (
        GLIBC, '_FLOCK = struct.Struct("hhqqi4x")', '§_FLOCK = struct.Struct("hhiqi4x")',
        "the offset of struct flock.l_start is 4 here, 8 in the header",
    ),
    "a sign in a format": (
        GLIBC, '_FLOCK = struct.Struct("hhqqi4x")', '§_FLOCK = struct.Struct("HhqqI4x")',
        "struct flock.l_type is 'H' here, an unsigned integer of 2 bytes; in C it is a signed integer of 2 bytes",
    ),
    "the size of a format": (
        GLIBC, '_FLOCK = struct.Struct("hhqqi4x")', '§_FLOCK = struct.Struct("hhqqi")',
        "the size of struct flock (_FLOCK) is 28 here, 32 in the header",
    ),
    "a field that a format's comment has otherwise": (
        GLIBC, "off_t l_start, l_len; pid_t l_pid\n_", "off_t l_start, l_len; off_t l_pid\n§_",
        "struct flock.l_pid is not what the comment declares, off_t",
    ),
    "the order of a structure's fields": (
        MUSL, '_fields_ = (("tv_sec", c_long), ("tv_nsec", c_long))',
        '§_fields_ = (("tv_nsec", c_long), ("tv_sec", c_long))',
        "the offset of struct timespec.tv_sec is 8 here, 0 in the header",
    ),
    "the size of a structure's field": (
        MUSL, '("tv_nsec", c_long))', '§("tv_nsec", c_int))', "the size of struct timespec.tv_nsec is 4 here, 8 in",
    ),
    "a structure of no header": (
        MUSL, '"""struct timespec of <time.h>, 64-bit:', '"""Time, 64-bit:',
        "_Timespec: its docstring does not begin with <header.h>, or with struct name of <header.h>",
    ),
    "an argument's type": (
        GLIBC, "_quick_open = Py", "§_quick_open = Py", "argument 2 of open, int flags, is c_",
        ("_open.argtypes = (c_char_p, c_int)", "_open.argtypes = (c_char_p, c_long)"),
    ),
    "another string": (
        GLIBC, "_quick_open = Py", "§_quick_open = Py",
        "argument 1 of open, const char *pathname, is c_wchar_p here; in C it is no pointer to wchar_t",
        ("_open.argtypes = (c_char_p, c_int)", "_open.argtypes = (c_wchar_p, c_int)"),
        ("from ctypes import CDLL,", "from ctypes import c_wchar_p, CDLL,"),
    ),
    "a ready-made argument's type": (
        GLIBC, "_waiting(_FUTEX, address, _WAIT, value", "§_waiting(_FUTEX, address, _WAIT, value",
        "argument 1 of syscall, _FUTEX, is c_int ",
        ("_FUTEX = c_long(", "_FUTEX = c_int("),
    ),
    "an argument that nobody converts": (
        GLIBC, "_waiting(_FUTEX, address, _WAIT, value", "§_waiting(_FUTEX, self._address + bell, _WAIT, value",
        "argument 2 of syscall, self._address + bell, is no ready-made object of ctypes",
    ),
    "an argument shorter than int after the fixed ones": (
        GLIBC, "_waiting(_MEMBARRIER, _REGISTER, c_int(0), c_int(0))",
        "§_waiting(_MEMBARRIER, _REGISTER, c_char(0), c_int(0))",
        "argument 3 of syscall, c_char(0), is c_char: C passes nothing shorter than int there",
    ),
    "a result's type": (
        MUSL, '_quick = PyDLL(None, use_errno=True)["syscall"]', '§_quick = PyDLL(None, use_errno=True)["syscall"]',
        "the result of syscall is c_int here, a signed integer of 4 bytes; in C it is a signed integer of 8 bytes",
        ("_quick.restype = c_long", "_quick.restype = c_int"),
    ),
    "no result's type": (
        MUSL, '_quick = PyDLL(None, use_errno=True)["syscall"]', '§_quick = PyDLL(None, use_errno=True)["syscall"]',
        "syscall has no restype", ("_quick.restype = c_long\n", ""),
    ),
    "a variadic function declared as another": (
        GLIBC, "# int open(const char *pathname, int flags, ...);", "§# int open(const char *pathname, int flags);",
        "conflicting types for 'open'",
    ),
    "a variadic function with more than its fixed arguments": (
        GLIBC, "_quick_open = Py", "§_quick_open = Py", "open has 2 fixed arguments, it is variadic, but 3 argtypes",
        ("_open.argtypes = (c_char_p, c_int)", "_open.argtypes = (c_char_p, c_int, c_int)"),
    ),
    "a function without a declaration": (
        MUSL, "# int open(const char *pathname, int flags, ...); the mode", "# The mode",
        "open: no comment has its declaration",
    ),
    "a function that is in no header": (
        GLIBC, '["open"]', '§["opem"]', "use of undeclared identifier 'opem'", ("# int open(", "# int opem("),
    ),
    "a symbol that the library does not have": (
        GLIBC, "# <limits.h>", '# pid_t gettid(void);\n§_tid = CDLL(None)["gettid"]\n_tid.restype = c_int\n'
        "_tid.argtypes = ()\n\n# <limits.h>", "gettid is not in the library c",
        ("from ctypes import CDLL", "# <unistd.h>\nfrom ctypes import CDLL"),
    ),
    "a library in a function": (
        MUSL, "    return len(os.sched_getaffinity(0))", "§    return int(CDLL(None).get_nprocs())",
        "CDLL in a function: its uses are not seen",
    ),
    # Windows
    "a constant of Windows": (
        WINDOWS, "WAIT_TIMEOUT: Final = 0x00000102", "§WAIT_TIMEOUT: Final = 0x00000103",
        "WAIT_TIMEOUT is 259 here, 258 in the header",
    ),
    "a constant that is a pointer": (
        WINDOWS, "INVALID_HANDLE_VALUE: Final = c_void_p(-1)", "§INVALID_HANDLE_VALUE: Final = c_void_p(0)",
        "INVALID_HANDLE_VALUE is 0 here, -1 in the header",
    ),
    "an enumerator": (WINDOWS, "TokenUser: Final = 1", "§TokenUser: Final = 2", "TokenUser is 2 here, 1 in the header"),
    "an argument's size": (
        WINDOWS, '_virtual_alloc = _waiting["', '§_virtual_alloc = _waiting["',
        "argument 2 of VirtualAlloc, SIZE_T dwSize, is c_uint here, an unsigned integer of 4 bytes; "
        "in C it is an unsigned integer of 8 bytes",
        ("_alloc.argtypes = (c_void_p, c_size_t,", "_alloc.argtypes = (c_void_p, c_uint32,"),
    ),
    "a handle as an int": (
        WINDOWS, '_set_event = _quick["', '§_set_event = _quick["',
        "argument 1 of SetEvent, HANDLE hEvent, is c_int here, a signed integer of 4 bytes; in C it is a pointer",
        ("_set_event.argtypes = (c_void_p,)", "_set_event.argtypes = (c_int,)"),
    ),
    "a string of bytes": (
        WINDOWS, '_open_event = _quick["', '§_open_event = _quick["',
        "argument 3 of OpenEventW, LPCWSTR lpName, is c_char_p here; in C it is no pointer to char",
        (
            "_open_event.argtypes = (c_uint32, c_int, c_wchar_p)",
            "_open_event.argtypes = (c_uint32, c_int, ctypes.c_char_p)",
        ),
    ),
    "a result's sign": (
        WINDOWS, '_wait = _waiting["', '§_wait = _waiting["',
        "the result of WaitForSingleObject is c_int here, a signed integer of 4 bytes; "
        "in C it is an unsigned integer of 4 bytes",
        ("_wait.restype = c_uint32", "_wait.restype = c_int"),
    ),
    "a handle as the default result": (
        WINDOWS, '_current_process = _quick["', '§_current_process = _quick["',
        "the result of GetCurrentProcess is c_int here, a signed integer of 4 bytes; in C it is a pointer",
        ("_current_process.restype = c_void_p", "_current_process.restype = c_int"),
    ),
    "a declaration that is not the header's": (
        WINDOWS, "# BOOL SetEvent(HANDLE hEvent);", "§# BOOL SetEvent(DWORD hEvent);",
        "conflicting types for 'SetEvent'",
    ),
    "too few arguments": (
        WINDOWS, '_set_event = _quick["', '§_set_event = _quick["', "SetEvent has 1 arguments, but 0 argtypes",
        ("_set_event.argtypes = (c_void_p,)", "_set_event.argtypes = ()"),
    ),
    "another library": (
        WINDOWS, '_advapi["OpenProcessToken"]', '§_quick["OpenProcessToken"]',
        "OpenProcessToken is not in the library kernel32",
    ),
    "no such function": (
        WINDOWS, '_quick["SetEvent"]', '§_quick["SetEvenW"]', "SetEvenW is not in the library kernel32",
        ("# BOOL SetEvent(", "# BOOL SetEvenW("),
    ),
    # macOS
    "a constant of macOS": (
        MAC, "EV_CLEAR: Final = 0x0020", "§EV_CLEAR: Final = 0x0010", "EV_CLEAR is 16 here, 32 in the header",
    ),
    "Linux's constant on macOS": (
        MAC, "SEM_FAILED: Final = -1", "§SEM_FAILED: Final = 0", "SEM_FAILED is 0 here, -1 in the header",
    ),
    "the size and sign of a field": (
        MAC, '("filter", c_int16),', '§("filter", c_uint16),',
        "struct kevent.filter is c_ushort here, an unsigned integer of 2 bytes; in C it is a signed integer of 2 bytes",
    ),
    "an offset": (
        MAC, '("flags", c_uint16),', '§("flags", c_uint32),',
        "the size of struct kevent.flags is 4 here, 2 in the header",
    ),
    "a field that is not there": (
        MAC, '("data", c_int64),', "", "the offset of struct kevent.udata is 16 here, 24 in the header",
    ),
    "an argument's type on macOS": (
        MAC, '_sem_trywait = _libsystem.quick["', '§_sem_trywait = _libsystem.quick["',
        "argument 1 of sem_trywait, sem_t *sem, is c_int here, a signed integer of 4 bytes; in C it is a pointer",
        ("_sem_trywait.argtypes = (c_void_p,)", "_sem_trywait.argtypes = (c_int,)"),
    ),
    "a pointer cut to an int": (
        MAC, '_sem_open = _libsystem.quick["', '§_sem_open = _libsystem.quick["',
        "the result of sem_open is c_int here, a signed integer of 4 bytes; in C it is a pointer",
        ("_sem_open.restype = c_ssize_t", "_sem_open.restype = c_int"),
    ),
    "the mode as a fixed argument": (
        MAC, '_shm_open = _libsystem.quick["', '§_shm_open = _libsystem.quick["',
        "shm_open has 2 fixed arguments, it is variadic, but 3 argtypes",
        ("_shm_open.argtypes = (c_char_p, c_int)", "_shm_open.argtypes = (c_char_p, c_int, c_uint)"),
    ),
    "Linux's declaration of a variadic function": (
        MAC, "# int shm_open(const char *name, int oflag, ...);",
        "§# int shm_open(const char *name, int oflag, mode_t mode);",
        "conflicting types for 'shm_open'",
    ),
    "a bare number after the fixed arguments": (
        MAC, "os.O_CREAT, c_uint(0o600), c_uint(1))", "§os.O_CREAT, 0o600, c_uint(1))",
        "argument 3 of sem_open, 384, is no ready-made object of ctypes",
    ),
    "a function that macOS does not have": (
        MAC, '_sem_post = _libsystem.quick["sem_post"]', '§_sem_post = _libsystem.quick["sem_timedwait"]',
        "sem_timedwait is not in the library c", ("# int sem_post(", "# int sem_timedwait("),
    ),
}  # fmt: skip


@needs_zig
@can_read
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_seen(mistake, tmp_path, verdict):
    asked, before, after, message, *more = PLANTED[mistake]
    target = next(target for target in check_abi.TARGETS if target.zig.startswith(asked))
    if target.platform not in BACKENDS:
        pytest.skip(f"there is no backend for {target.platform} yet")
    package = tmp_path / "shmring"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    module = package / f"{BACKENDS[target.platform]}.py"
    text = module.read_text(encoding="utf-8")
    for old, new in [*more, (before, after)]:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    line = text[: text.index("§")].count("\n") + 1 if "§" in text else None
    module.write_text(text.replace("§", ""), encoding="utf-8")
    status, said = verdict(package, target.zig)
    assert status == 1 and f"on {target.zig}: " in said and "WRONG" in said, said
    where = rf"shmring/{module.name}:{line or '[0-9]+'}: "
    assert re.search(where + re.escape(message), said), said
