from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import map_bo
from map_bo.errors import BudgetError, ConfigError, MapBoError, MergeError, StoreError
from map_bo.tracking.fresh import leaving_nothing, remove_hydra_files
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event
from tests.nested.hills import Hills


def refuse(run: Path, kinds: Sequence[str], error: MapBoError, *, fresh: bool = True) -> None:
    with leaving_nothing(run, fresh=fresh):
        store = JsonlStore.create(run)
        for kind in kinds:
            store.append(Event(kind, {}))
        raise error


@pytest.mark.parametrize("kinds", [(), ("created",), ("created", "planned", "begun", "proposed")])
def test_what_was_begun_goes_with_the_folder(kinds: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        refuse(tmp_path / "all" / "runs" / "run", kinds, BudgetError("too small"))
    assert not any(tmp_path.iterdir())


def test_files_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError):
        refuse(tmp_path, ("created",), ConfigError("wrong"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("fresh", [True, False])
def test_measurements_and_runs_that_go_on_are_never_touched(fresh: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kinds = ("created", "observed") if fresh else ("created",)
    with pytest.raises(ConfigError):
        refuse(run, kinds, ConfigError("wrong"), fresh=fresh)
    assert len(list(JsonlStore.open(run).read())) == (2 if fresh else 1)


def test_the_record_of_somebody_else_is_not_removed(tmp_path: Path) -> None:
    with pytest.raises(StoreError):  # another process was the first to create it
        refuse(tmp_path / "run", ("created",), StoreError("it already holds a run"))
    assert (tmp_path / "run" / "events.jsonl").exists()


def test_hydra_leaves_go_only_where_nothing_else_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("a: 1")
    (run / "main.log").touch()
    remove_hydra_files(run)
    assert not run.exists()
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "events.jsonl").touch()
    remove_hydra_files(tmp_path)
    assert (tmp_path / ".hydra").exists()


def test_what_was_logged_before_a_refusal_keeps_no_directory(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "now"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").touch()
    (run / "run.log").write_text("expert 'a': names read as the base's")
    remove_hydra_files(run)
    assert not (tmp_path / "runs").exists()
    own = tmp_path / "own"
    own.mkdir()
    for name in ("run.log", "notes.txt"):
        (own / name).write_text("mine")
    remove_hydra_files(own)
    assert sorted(path.name for path in own.iterdir()) == ["notes.txt", "run.log"]


def test_a_budget_that_is_too_small_leaves_no_directory(tmp_path: Path) -> None:
    problem = Hills()
    with pytest.raises(BudgetError):
        map_bo.optimize_nested(problem, 5, run_dir=tmp_path / "nested", progress=False)
    with pytest.raises(BudgetError):
        map_bo.optimize(problem, 1, run_dir=tmp_path / "flat", progress=False)
    assert not any(tmp_path.iterdir())


def test_checkpoints_that_do_not_fit_leave_no_directory(tmp_path: Path) -> None:
    problem = map_bo.MergedModelProblem(
        nn.Linear(3, 3),
        base=nn.Linear(3, 3),
        experts={"a": {"weight": torch.ones(4, 4), "bias": torch.ones(3)}},
        evaluators={"a": lambda model: 0.5},
    )
    with pytest.raises(MergeError):
        map_bo.optimize(problem, 8, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
