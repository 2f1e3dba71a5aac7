"""What only Windows has: exceptions of signal handlers between the calls of `_windows.py`, names, and odd objects."""

from __future__ import annotations

import errno
import mmap
import sys
import threading

import pytest
from conftest import DEADLINE, wait_until

if sys.platform != "win32":
    pytest.skip("the Windows backend needs Windows", allow_module_level=True)

from shmring import Ring, RingBusy, RingCorrupted, RingIncompatible, _layout, _windows, unlink


@pytest.fixture
def interrupting(monkeypatch):
    """``interrupting(name)``: KeyboardInterrupt right after the next call of the backend's function of this name."""

    def plant(name):
        function = getattr(_windows, name)

        def interrupted(*args):
            function(*args)
            del args  # this frame is not to keep what the backend's own must not
            monkeypatch.setattr(_windows, name, function)
            raise KeyboardInterrupt

        monkeypatch.setattr(_windows, name, interrupted)

    return plant


def test_a_claim_that_was_interrupted_can_be_made_again(name, interrupting):
    """The traceback, which is kept, does not keep the event."""
    with Ring.create(name) as ring:
        interrupting("_poll")
        with pytest.raises(KeyboardInterrupt) as kept:
            ring._segment.claim(_layout.READER)
        assert ring._segment.claim(_layout.READER)
        del kept


def test_a_role_is_free_although_giving_it_back_was_interrupted(name, interrupting):
    """Nor does it here."""
    with Ring.create(name) as ring, Ring.open(name) as other:
        assert ring._segment.claim(_layout.READER)
        interrupting("_set_event")
        with pytest.raises(KeyboardInterrupt) as kept:
            ring._segment.release(_layout.READER)
        ring._segment.release(_layout.READER)
        assert other._segment.claim(_layout.READER)
        del kept


@pytest.mark.parametrize("after", ["_wait_for_one", "_set_event"])
def test_who_has_heard_a_bell_tells_the_others_when_interrupted(name, monkeypatch, endless, interrupting, after):
    """Else a thread sleeps on although its bell was rung: that signal is gone, and there is no other one."""
    with Ring.create(name) as ring:
        segment, bell = ring._segment, ring._segment.layout.readers_offset + _layout.READER_BELL
        noted = segment.note(bell)
        other = threading.Thread(target=segment.wait, args=(bell, noted, None))
        other.start()
        wait_until(lambda: segment._asleep.get(bell), "that the other thread is asleep")
        # Which of two threads hears it is the system's choice: here it is ours.
        monkeypatch.setattr(_windows, "_wait_for_one", lambda *_: _windows.WAIT_OBJECT_0 + 1)
        interrupting(after)
        with pytest.raises(KeyboardInterrupt):
            segment.wait(bell, noted, None)
        other.join(DEADLINE)
        assert not other.is_alive()


def test_who_looks_for_a_ring_makes_nothing(name):
    """In the namespace Global it may not be allowed to."""
    page = f"{_windows._prefix()}name-{name}"
    with pytest.raises(FileNotFoundError) as kept:
        Ring.open(name)
    assert not _windows._exists(page)
    with Ring.create(name):
        assert _windows._exists(page)
    assert not _windows._exists(page)
    del kept


# ---------------------------------------------------------------- namespaces


def test_a_ring_of_the_machine_is_another_one_than_the_sessions(name, monkeypatch, children):
    with Ring.create(name, 4096) as local:
        monkeypatch.setenv("SHMRING_NAMESPACE", "Global")
        with pytest.raises(FileNotFoundError):
            Ring.open(name)
        with Ring.create(name, 8192) as everybodys:
            local.write(b"local")
            assert everybodys.try_read() is None
            code = "import sys; from shmring import Ring; Ring.open(sys.argv[1]).write(b'global')"
            children.output(children.python(code, name))
            assert everybodys.read() == b"global"
            monkeypatch.setenv("SHMRING_NAMESPACE", "Local")
            with Ring.open(name) as again:
                assert again.capacity == 4096 and again.read() == b"local"
            everybodys.unlink()  # a handle stays in the namespace in which it was made
            monkeypatch.setenv("SHMRING_NAMESPACE", "Global")
            with pytest.raises(FileNotFoundError):
                Ring.open(name)


@pytest.mark.parametrize("wrong", ["", "global", "Session\\1"])
def test_another_namespace_is_refused(name, monkeypatch, wrong):
    monkeypatch.setenv("SHMRING_NAMESPACE", wrong)
    for call in (Ring.create, Ring.open, unlink):
        with pytest.raises(ValueError, match="SHMRING_NAMESPACE is Local or Global"):
            call(name)


# ---------------------------------------------------------------- memory


def test_no_memory_for_a_lane_is_enospc_and_the_handle_writes_once_there_is_some(name, monkeypatch):
    with Ring.create(name, 1 << 20, writers=1) as ring:
        with monkeypatch.context() as full:
            full.setattr(_windows, "_virtual_alloc", lambda *_: None)
            with pytest.raises(OSError, match="no memory for a lane, 1,048,576 bytes") as caught:
                ring.write(b"x")
            assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name)
            assert ring.stats().lanes_in_use == 0
        ring.write(b"x")
        assert ring.read() == b"x"


def test_no_memory_for_the_control_words_leaves_nothing(name, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(_windows, "_virtual_alloc", lambda *_: None)
        with pytest.raises(OSError, match="control words") as caught:
            Ring.create(name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, name)
        del caught
    Ring.create(name).close()


def test_a_ring_that_is_larger_than_any_memory_is_refused_by_name(name):
    with pytest.raises(OSError) as caught:
        Ring.create(name, 1 << 40, writers=4096)
    assert caught.value.filename == name
    del caught
    Ring.create(name, 4096).close()


# ---------------------------------------------------------------- what else may have a ring's names


@pytest.fixture
def stranger(name):
    """Makes what a ring consists of by hand: its name's page, its presence, its segment."""
    prefix, nonce, kept = _windows._prefix(), bytes(range(16)), []

    def make(header, size=None, present=True):
        page = mmap.mmap(-1, _layout.PAGE, tagname=f"{prefix}name-{name}")
        page[:16] = nonce
        kept.append(page)
        if present:
            kept.append(_windows._create_event(None, True, False, f"{prefix}present-{nonce.hex()}"))
        if header is not None:
            segment = mmap.mmap(-1, size or _layout.PAGE, tagname=f"{prefix}ring-{nonce.hex()}")
            segment[: len(header)] = header
            kept.append(segment)

    make.nonce = nonce
    yield make
    kept.clear()


def header_of(nonce, **changes):
    layout = _layout.Layout(**{"capacity": 4096, "writers": 2, "keep": False, "nonce": nonce, **changes})
    return _layout.pack_header(layout, _windows.MACHINE)


def test_a_name_that_leads_nowhere_is_not_found_and_is_given_to_a_new_ring(name, stranger):
    stranger(None, present=False)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    with pytest.raises(FileNotFoundError):
        unlink(name)
    with Ring.create(name, 4096) as ring:
        ring.write(b"x")


def test_a_ring_that_is_there_without_its_memory_is_not_found_and_not_replaced(name, stranger):
    stranger(None)
    with pytest.raises(FileNotFoundError):
        Ring.open(name)
    with pytest.raises(FileExistsError):
        Ring.create(name)


@pytest.mark.parametrize("error, header", [
    (RingIncompatible, lambda nonce: b"something else"),
    (RingIncompatible, lambda nonce: header_of(nonce)[:8] + b"\x09" + header_of(nonce)[9:]),
    (RingCorrupted, lambda nonce: header_of(nonce)[:24] + b"\x77" + header_of(nonce)[25:]),
    (RingCorrupted, lambda nonce: header_of(bytes(16))),
    (RingCorrupted, header_of),
], ids=["no ring", "another layout", "damaged", "another nonce", "shorter than it says"])  # fmt: skip
def test_a_strange_segment_is_refused_by_name(name, stranger, error, header):
    stranger(header(stranger.nonce))
    with pytest.raises(error, match=name):
        Ring.open(name)
    with pytest.raises(RingBusy, match=name):
        Ring.create(name, replace=True)


@pytest.mark.parametrize("kind", ["name-{name}", "lock-{name}"])
def test_an_object_of_another_kind_under_a_rings_name_is_an_error_that_tells_it(name, kind):
    stranger = _windows._create_event(None, True, False, _windows._prefix() + kind.format(name=name))
    with pytest.raises(OSError) as caught:
        Ring.create(name, 4096)
    assert caught.value.filename == name
    del caught, stranger
    Ring.create(name, 4096).close()


def test_another_users_ring_is_opened_only_when_told_so(name, monkeypatch):
    """Wine's objects belong to nobody: here another one's is what is said to be one."""
    with Ring.create(name, 4096) as ring:
        monkeypatch.setattr(_windows, "_is_trusted", lambda handle: False)
        with pytest.raises(PermissionError, match="any_owner") as caught:
            Ring.open(name)
        assert caught.value.filename == name
        del caught
        with Ring.open(name, any_owner=True) as other:
            other.write(b"trusted")
        assert ring.read() == b"trusted"


def test_this_user_is_trusted_and_nobody_is_not():
    """The user's own identifiers are well-formed, and are what decides."""
    own = _windows._own_sids()
    assert own and all(sid[0] == 1 and len(sid) == 8 + 4 * sid[1] for sid in own)
    assert all(len(sid) == 8 + 4 * sid[1] for sid in (_windows.SYSTEM, _windows.ADMINISTRATORS))
