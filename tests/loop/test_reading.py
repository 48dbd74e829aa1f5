from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import AnotherRunError, StoreError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import (
    clear_failure,
    load_state,
    outcomes_table,
    read_runs,
    record_failure,
)
from map_bo.loop.run import Run
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore, MemoryStore, is_run
from tests.loop.bowls import Bowls, quick
from tests.tracking.scored import ScoredBowls
from tests.unsealed import unseal


def run(directory: Path, seed: int = 0, budget: int = 8, **config: object) -> Path:
    optimize(
        Bowls(),
        budget,
        seed=seed,
        run_dir=directory,
        progress=False,
        sampler=Sobol(),
        surrogate=Quadratic(),
        verify=1,
        config=config or None,
    )
    return directory


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    for seed in (0, 1):
        tree = {"seed": seed, "progress": True, "surrogate": {"link": "auto"}}
        run(
            directory / f"seed={seed}",
            seed,
            tree=tree,
            overrides=[f"seed={seed}", "+surrogate@x=gp"],
            choices={"surrogate": "gp", "experiment": None},
        )
    return directory


def test_runs_are_read_from_their_stores_alone(sweep: Path, tmp_path: Path) -> None:
    for name in ("report.html", "summary.json", "front.csv"):
        (sweep / "seed=0" / name).unlink(missing_ok=True)
    first, second = read_runs([sweep], beside=sweep)
    assert (first.name, first.seed, first.status) == ("seed=0", 0, "finished")
    assert first.settings == {
        "seed": "0",
        "surrogate.link": "auto",
        "surrogate": "gp",
    }
    assert first.named == ("seed", "surrogate")
    assert first.outcome is not None
    assert second.outcome is not None
    assert len(first.outcome.seen) == 8
    assert not torch.equal(first.outcome.seen.X, second.outcome.seen.X)
    assert set(first.outcome.seconds) >= {"propose", "evaluate"}
    assert first.link == "seed%3D0/"
    assert second.link == "seed%3D1/report.html"


def test_a_run_made_in_python_is_told_by_its_settings(tmp_path: Path) -> None:
    (record,) = read_runs([run(tmp_path / "one")], beside=tmp_path)
    assert record.name == "one"
    assert record.settings["budget"] == "8"
    assert record.seed == 0


def test_a_run_that_was_killed_is_unfinished(sweep: Path, tmp_path: Path) -> None:
    job = tmp_path / "sweep" / "job"
    job.mkdir(parents=True)
    lines = (sweep / "seed=0" / "events.jsonl").read_text().splitlines(keepends=True)
    (job / "events.jsonl").write_text("".join(lines[:6]))
    (record,) = read_runs([tmp_path / "sweep"], beside=tmp_path)
    assert record.status == "unfinished"
    assert "of 8 evaluations are recorded" in record.reason
    assert record.outcome is None
    record_failure(job, ValueError("no space"))
    (record,) = read_runs([tmp_path / "sweep"], beside=tmp_path)
    assert record.status == "failed"
    assert record.reason.startswith("ValueError: no space (")


def test_failures_are_recorded_read_and_cleared(tmp_path: Path) -> None:
    job = tmp_path / "job"
    record_failure(job, StoreError("the disk is full", hint="free some"))
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert (record.status, record.reason) == ("failed", "the disk is full (hint: free some)")
    assert json.loads((job / "failure.json").read_text())["hint"] == "free some"
    (job / "failure.json").write_text("torn")
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert "cannot be read" in record.reason
    clear_failure(job)
    clear_failure(job)
    with pytest.raises(StoreError, match="holds no run"):
        read_runs([tmp_path], beside=tmp_path)


def test_a_job_that_was_killed_before_its_first_event_is_listed(tmp_path: Path) -> None:
    (tmp_path / "job" / ".hydra").mkdir(parents=True)
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert (record.status, record.reason) == ("unfinished", "nothing was recorded")


def test_a_job_that_was_refused_is_not_the_run_that_lies_there(tmp_path: Path) -> None:
    run(tmp_path / "job")
    record_failure(tmp_path / "job", ValueError("the report could not be drawn"))
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert record.status == "finished"
    record_failure(tmp_path / "job", AnotherRunError("seed was 0 and is 1"))
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert (record.status, record.reason) == ("failed", "seed was 0 and is 1")
    assert record.outcome is None


def test_what_only_shows_a_run_is_no_setting(tmp_path: Path) -> None:
    tree = {
        "seed": 0,
        "progress": True,
        "problem": {"progress": True, "experts": 4},
        "tracking": {"wandb": {"group": "study"}},
    }
    run(tmp_path / "job", tree=tree, overrides=["tracking=wandb"], choices={"tracking": "wandb"})
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert record.settings == {"seed": "0", "problem.experts": "4"}


def test_where_a_run_is_on_wandb_is_known(tmp_path: Path) -> None:
    told = {"id": "abc", "events": 9, "project": "merging", "entity": "team"}
    (run(tmp_path / "job") / "wandb.json").write_text(json.dumps(told))
    (record,) = read_runs([tmp_path], beside=tmp_path)
    assert record.wandb is not None
    assert (record.wandb.id, record.wandb.entity) == ("abc", "team")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["best", "reference"])
def test_a_record_of_another_version_does_not_hide_the_others(tmp_path: Path, part: str) -> None:
    run(tmp_path / "good")
    unseal(run(tmp_path / "old"), lambda text: text.replace(f'"{part}"', '"other"'))
    good, old = read_runs([tmp_path], beside=tmp_path)
    assert (good.status, old.status) == ("finished", "unreadable")
    assert "('front') of the run cannot be read" in old.reason


def test_a_store_that_cannot_be_read_does_not_hide_the_others(sweep: Path, tmp_path: Path) -> None:
    job = tmp_path / "bad"
    job.mkdir()
    (job / "events.jsonl").write_text("nothing\nof the kind\n")
    records = read_runs([sweep, tmp_path], beside=tmp_path)
    assert [record.status for record in records] == ["finished", "finished", "unreadable"]
    assert records[-1].reason
    assert records[0].name.startswith(f"{sweep.name}/")


def test_hidden_directories_and_empty_stores_are_passed_over(tmp_path: Path) -> None:
    run(tmp_path / ".submitit" / "job")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "events.jsonl").touch()
    assert not is_run(tmp_path / "job")
    with pytest.raises(StoreError, match="holds no run"):
        read_runs([tmp_path], beside=tmp_path)


def test_what_is_no_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere is not a directory"):
        read_runs([tmp_path / "nowhere"], beside=tmp_path)


def test_sweeps_of_the_same_name_are_told_apart_by_their_path(sweep: Path, tmp_path: Path) -> None:
    for part in ("a", "b"):
        run(tmp_path / part / "sweep" / "job")
    records = read_runs([tmp_path / "a" / "sweep", tmp_path / "b" / "sweep"], beside=tmp_path)
    assert len({record.sweep for record in records}) == 2


def same_examples(ours: Observations, theirs: Observations) -> bool:
    for row, other in zip(ours.examples, theirs.examples, strict=True):
        if list(row) != list(other):
            return False
        for name, one in row.items():
            if not torch.equal(one.items, other[name].items):
                return False
            if not torch.equal(one.values, other[name].values):
                return False
    return True


def test_outcomes_that_a_run_decides_by_are_those_that_are_read_back(tmp_path: Path) -> None:
    """Rounding after they were used would let a resumed run propose other points."""
    problem = ScoredBowls(size=4000)
    driven = Run(problem, quick(8), JsonlStore.create(tmp_path / "run"))
    driven.drive()
    read, _ = load_state(tmp_path / "run")
    assert len(read.data) == 8
    assert all(len(row) == 2 for row in read.data.examples)
    assert same_examples(read.data, driven.state.data)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    again = Run(problem, quick(8), JsonlStore.open(tmp_path / "copy"))
    assert same_examples(again.state.data, driven.state.data)
    in_memory = Run(problem, quick(8), MemoryStore())
    in_memory.drive()
    assert same_examples(in_memory.state.data, driven.state.data)


def test_outcomes_of_front_points_stay_when_a_run_is_extended(tmp_path: Path) -> None:
    problem, store = ScoredBowls(size=4000), JsonlStore.create(tmp_path)
    Run(problem, quick(8), store).drive()
    before, _ = load_state(tmp_path)
    Run(problem, quick(10), JsonlStore.open(tmp_path)).drive()
    after, _ = load_state(tmp_path)
    rows = list(after.front_rows)
    assert len(rows) == 2
    assert same_examples(after.seen.select(rows), before.verification)
    assert all(len(row) == 2 for row in after.data.examples)


def test_what_was_told_from_outside_keeps_its_outcomes(tmp_path: Path) -> None:
    problem = ScoredBowls(size=50)
    run = Run(problem, quick(8), JsonlStore.create(tmp_path))
    [by_value, by_name] = run.ask(2)
    x = run.state.X[[by_value]]
    told = problem.evaluate(x, generator=make_generator(0))
    run.tell(by_value, told)
    run.tell(by_name, {"near a": 0.5, "far from b": 0.25})
    rows = load_state(tmp_path)[0].seen.examples
    assert (len(rows[0]), len(rows[1])) == (2, 0)
    table = outcomes_table(tmp_path)
    assert len(table["row"]) == 100
    assert set(table["row"].tolist()) == {0}
