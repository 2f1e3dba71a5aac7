"""What only Windows has: exceptions of signal handlers between the calls of `_windows.py`, and names."""

from __future__ import annotations

import sys
import threading

import pytest
from conftest import DEADLINE, wait_until

if sys.platform != "win32":
    pytest.skip("the Windows backend needs Windows", allow_module_level=True)

from shmring import Ring, _layout, _windows


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
