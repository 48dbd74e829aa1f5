from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import ConfigError
from map_bo.loop.mirrors import Local, trackers
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, quick


class Notes:
    """Settings and tracker in one: keeps what it is told, and what it finds at the end."""

    def __init__(self) -> None:
        self.told: list[str | bool] = []
        self.found: set[str] = set()
        self.directory: Path | None = None

    def open(self, directory: Path | None) -> Notes:
        self.directory = directory
        return self

    def observe(self, event: Event) -> None:
        self.told.append(event.kind)

    def finish(self, *, whole: bool) -> None:
        self.told.append(whole)
        if self.directory is not None:
            self.found = {path.name for path in self.directory.iterdir()}


def optimized(directory: Path | None, **changes: Any) -> None:
    settings = quick(7)
    optimize(
        Bowls(),
        7,
        run_dir=directory,
        progress=False,
        sampler=settings.sampler,
        surrogate=settings.surrogate,
        solver=settings.solver,
        verify=2,
        **changes,
    )


LOCAL = {"evaluations.csv", "front.csv", "summary.json", "plots", "report.html"}


@pytest.mark.parametrize("given", [{}, {"tracking": "local"}, {"tracking": [Local()]}])
def test_local_files_are_written_by_default(tmp_path: Path, given: dict[str, Any]) -> None:
    optimized(tmp_path, **given)
    assert {path.name for path in tmp_path.iterdir()} - {"run.lock"} == {"events.jsonl", *LOCAL}


@pytest.mark.parametrize("given", ["none", [], ["none"]])
def test_without_trackers_there_is_the_record_alone(tmp_path: Path, given: Any) -> None:
    optimized(tmp_path, tracking=given)
    assert {path.name for path in tmp_path.iterdir()} - {"run.lock"} == {"events.jsonl"}


def test_a_tracker_is_told_the_whole_record_in_order(tmp_path: Path) -> None:
    notes, again = Notes(), Notes()
    optimized(tmp_path, tracking=[notes, "local"])
    assert notes.told[0] == "created"
    assert notes.told.count("observed") == 5
    assert notes.told[-2:] == ["finished", True]
    assert notes.found >= LOCAL  # others come after the local files
    optimized(tmp_path, tracking=again)
    assert again.told == notes.told


def test_a_run_that_only_asks_and_tells_is_tracked_too() -> None:
    notes = Notes()
    run = Run(Bowls(), quick(7), MemoryStore(), tracker=notes)
    run.ask(1)
    assert notes.told == ["created", "proposed"]


def test_a_run_that_breaks_off_leaves_no_local_files(tmp_path: Path) -> None:
    notes = Notes()

    def interrupt(number: int, x: object) -> None:
        if number == 3:
            raise KeyboardInterrupt

    settings = quick(7)
    with pytest.raises(KeyboardInterrupt):
        optimize(
            Bowls(fails=interrupt),
            7,
            run_dir=tmp_path,
            progress=False,
            sampler=settings.sampler,
            tracking=["local", notes],
        )
    assert notes.told[-1] is False
    assert not notes.found & LOCAL


def test_a_tracker_that_fails_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Notes):
        def observe(self, event: Event) -> None:
            raise RuntimeError("no network")

    optimized(tmp_path, tracking=["local", Broken()])
    state, _ = load_state(tmp_path)
    assert state.summary is not None
    assert (tmp_path / "report.html").exists()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "Broken" in told[0].getMessage()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wandbb", "did you mean 'wandb'?"), ("tensorboard", "none, local, wandb"), (3, "open")],
)
def test_an_unknown_tracker_is_told_before_anything_is_written(
    tmp_path: Path, name: Any, hint: str
) -> None:
    with pytest.raises(ConfigError, match="there is no tracker") as caught:
        optimized(tmp_path / "run", tracking=[name])
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


def test_settings_are_opened_for_the_directory(tmp_path: Path) -> None:
    notes = Notes()
    with trackers([notes, "none"], tmp_path) as tracker:
        tracker.observe(Event("created", {}))
    assert notes.directory == tmp_path
    assert notes.told == ["created", True]
