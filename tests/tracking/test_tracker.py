from __future__ import annotations

import logging
from pathlib import Path

import pytest

from map_bo.tracking.store import Event
from map_bo.tracking.tracker import Tracker, Trackers, Tracking
from map_bo.tracking.wandb.mirror import Wandb


class Notes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str | bool] = []

    def observe(self, event: Event) -> None:
        self.told.append(event.kind)

    def finish(self, *, whole: bool) -> None:
        self.told.append(whole)


class Broken(Notes):
    """Fails at the event of one kind, or at the end."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def observe(self, event: Event) -> None:
        super().observe(event)
        if event.kind == self.at:
            raise OSError("no space left")

    def finish(self, *, whole: bool) -> None:
        raise RuntimeError("it would not end")


def test_the_parts_fulfil_their_protocols() -> None:
    assert isinstance(Trackers(), Tracker)
    assert isinstance(Notes(), Tracker)
    assert isinstance(Wandb(), Tracking)
    assert isinstance(Wandb().open(Path("somewhere")), Tracker)


def test_all_are_told_in_order_and_finished_once() -> None:
    several = (Notes(), Notes())
    with Trackers(several) as trackers:
        trackers.observe(Event("created", {}))
        trackers.observe(Event("proposed", {}))
    trackers.finish(whole=False)
    assert [notes.told for notes in several] == [["created", "proposed", True]] * 2


def test_a_run_that_breaks_off_is_not_whole() -> None:
    notes = Notes()
    with pytest.raises(KeyboardInterrupt), Trackers([notes]):
        raise KeyboardInterrupt
    assert notes.told == [False]


@pytest.mark.parametrize("at", ["created", "observed", "never"])
def test_one_that_fails_is_logged_once_and_removed(
    at: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, notes = Broken(at), Notes()
    with Trackers([broken, notes]) as trackers:
        for kind in ("created", "observed", "observed"):
            trackers.observe(Event(kind, {}))
    assert notes.told == ["created", "observed", "observed", True]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the tracker Broken failed and is removed; the run" in record.getMessage()
    assert broken.told == {"created": ["created"], "observed": ["created", "observed"]}.get(
        at, notes.told[:-1]
    )
