from __future__ import annotations

import pytest
from rich.progress import Progress

from lorashear.progress import track


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records starts and stops of the bar, on what claims to be a terminal."""
    calls: list[str] = []
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(Progress, "start", lambda _: calls.append("start"))
    monkeypatch.setattr(Progress, "stop", lambda _: calls.append("stop"))
    return calls


def test_items_pass_through_and_quick_work_shows_nothing(starts: list[str]) -> None:
    assert list(track("abc", total=3, description="x")) == ["a", "b", "c"]
    assert starts == []


def test_slow_work_shows_one_bar_and_removes_it(starts: list[str]) -> None:
    items = track("abc", total=3, description="x", after=0.0)
    next(items)
    next(items)
    assert starts == ["start"]
    items.close()  # type: ignore[attr-defined]
    assert starts == ["start", "stop"]


def test_a_bar_can_be_refused(starts: list[str]) -> None:
    assert len(list(track("abc", total=3, description="x", after=0.0, show=False))) == 3
    assert starts == []
