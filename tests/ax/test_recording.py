from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.ax.database import read_experiment
from map_bo.ax.experiment import experiment_of
from map_bo.ax.recording import record
from map_bo.errors import DataError, StoreError
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.tracking.jsonl import JsonlStore
from tests.ax.exported import exported, load, own_client, same, storage, unfinished
from tests.loop.bowls import Bowls, quick


def native(points: list[tuple[float, float]]) -> Any:
    with quiet():
        client = own_client()
        for a, b in points:
            index = client.attach_trial({"a": a, "b": b})
            client.complete_trial(index, {"near_a": a, "far_from_b": (b, 0.5)})
    return client._experiment


@pytest.mark.slow
def test_what_ax_adds_comes_back_to_the_run_once(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    with storage(file) as url:
        client = load(url, "run")
        values: Any = {"near_a": (0.5, 0.1), "far_from_b": 1.0}
        client.complete_trial(7, values)  # the point that waited
        client.complete_trial(client.attach_trial({"c_a": 0.3, "c_b": 0.6}), values)
        client.mark_trial_failed(client.attach_trial({"c_a": 0.4, "c_b": 0.6}), "no memory")
        client.complete_trial(client.attach_trial({"c_a": 3.0, "c_b": 0.6}), values)
    store = JsonlStore.open(tmp_path / "run")
    done = record(read_experiment(file), store)
    assert (done.taken, done.failed, done.completed, done.evaluations) == (3, 1, 1, 10)
    reasons = {left.trial: left.reason for left in done.left_out}
    assert set(reasons) == {*range(7), 10}
    assert reasons[10].startswith("it lies outside the space")
    state, _ = load_state(tmp_path / "run")
    assert not state.pending
    assert same(state.seen.select(range(7)), run.state.seen)
    assert state.seen.X[7:].tolist() == [run.state.X[7].tolist(), [0.3, 0.6], [0.4, 0.6]]
    assert state.seen.failures[9] == "no memory"
    events = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = record(read_experiment(file), store)
    assert (again.taken, again.evaluations, len(again.left_out)) == (0, 10, 11)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
    # And the run goes on to its end with all of them.
    result = Run(Bowls(), quick(30, seed=5), store).drive()
    assert len(result.seen) + len(result.verification) == 30
    assert same(result.seen.select(range(10)), state.seen)


def test_another_run_starts_from_all_of_an_export(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    other = Run(Bowls(), quick(20), JsonlStore.create(tmp_path / "other"))
    done = record(read_experiment(file), JsonlStore.open(tmp_path / "other"))
    assert (done.taken, done.failed) == (7, 1)
    state, _ = load_state(tmp_path / "other")
    assert same(state.seen, run.state.seen)
    assert other.state.created == state.created


def test_an_experiment_of_axs_own_and_one_of_the_same_name(tmp_path: Path) -> None:
    Run(Bowls(), quick(20), JsonlStore.create(tmp_path))
    store, experiment = JsonlStore.open(tmp_path), native([(0.2, 0.3), (0.4, 0.1)])
    assert record(experiment, store).taken == 2
    assert record(experiment, store).taken == 0
    from datetime import timedelta

    another = native([(0.2, 0.3)])
    another._time_created += timedelta(seconds=5)
    assert record(another, store).taken == 1  # measured again
    state, _ = load_state(tmp_path)
    assert state.seen.Yvar[:, 1].tolist() == [0.25] * 3
    assert bool(state.seen.Yvar[:, 0].isnan().all())


def test_a_run_of_another_problem_is_refused(tmp_path: Path) -> None:
    unfinished(tmp_path / "run")
    noisy = Run(Bowls(noise=0.5), quick(20), JsonlStore.create(tmp_path / "noisy"))
    events = (tmp_path / "noisy" / "events.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"run of another problem: problem.noise was 0.0") as caught:
        record(experiment_of(tmp_path / "run"), JsonlStore.open(tmp_path / "noisy"))
    assert "known=" in str(caught.value.hint)
    assert (tmp_path / "noisy" / "events.jsonl").read_bytes() == events
    assert not noisy.state.outcomes
    # Files that have moved are the same files.
    Run(Bowls(where="there"), quick(20), JsonlStore.create(tmp_path / "moved"))
    moved = JsonlStore.open(tmp_path / "moved")
    assert record(experiment_of(tmp_path / "run"), moved).taken == 7


def test_a_finished_run_takes_no_more(tmp_path: Path) -> None:
    Run(Bowls(), quick(), JsonlStore.create(tmp_path)).drive()
    with pytest.raises(StoreError, match="has been solved"):
        record(native([(0.2, 0.3)]), JsonlStore.open(tmp_path))


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    Run(Bowls(), quick(), JsonlStore.create(tmp_path))
    with (
        JsonlStore.open(tmp_path).lock(),
        pytest.raises(StoreError, match="another process"),
    ):
        record(native([(0.2, 0.3)]), JsonlStore.open(tmp_path))


def test_a_stopping_rule_and_samplers_see_what_was_recorded(tmp_path: Path) -> None:
    Run(Bowls(), quick(20), JsonlStore.create(tmp_path))
    record(native([(0.2, 0.3), (0.4, 0.1)]), JsonlStore.open(tmp_path))
    run = Run(Bowls(), quick(20), JsonlStore.open(tmp_path))
    assert run.ask(1) == [2]
    assert len(torch.unique(run.state.X, dim=0)) == 3
