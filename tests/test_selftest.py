"""`python -m shmring.selftest`: it holds here, and it can fail."""

from __future__ import annotations

import pytest

from shmring import selftest
from shmring._backend import os_backend


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(selftest, "ROUNDS", 100)
    monkeypatch.setattr(selftest, "KILLS", 1)
    monkeypatch.setattr(selftest, "SECONDS", 0.2)


def test_the_whole_of_it_holds_and_prints_a_paragraph(capsys):
    assert selftest.main() == 0
    output = capsys.readouterr().out
    assert output.count("\n") == 2 and output.endswith("All held.\n")
    for part in ("shmring ", os_backend.describe(), "round trips", "killed", "the fence held", "constants"):
        assert part in output


def test_what_does_not_hold_is_told_and_the_others_are_checked_all_the_same(monkeypatch, capsys):
    def fails():
        raise AssertionError("it does not hold")

    monkeypatch.setattr(selftest, "CHECKS", [fails, selftest.check_constants])
    assert selftest.main() == 1
    output = capsys.readouterr().out
    assert "FAILED fails: AssertionError: it does not hold" in output and "constants as in" in output


def test_a_constant_that_is_not_the_systems_is_found(monkeypatch):
    monkeypatch.setattr(os_backend, "EACCES", 12345, raising=False)
    with pytest.raises(AssertionError, match="EACCES is 13 here, not 12345"):
        selftest.check_constants()


def test_a_fence_that_does_nothing_is_noticed_by_the_litmus(monkeypatch):
    """Played: without one it happens too rarely to wait for."""

    def misses(ring, back, side, seconds):
        return 1000, 3

    monkeypatch.setattr(selftest, "_store_and_load", misses)
    with pytest.raises(AssertionError, match="3 of 1,000 times"):
        selftest.check_fence()
