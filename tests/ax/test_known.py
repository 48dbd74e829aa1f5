from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.ax.database import read_experiment, write_experiment
from map_bo.ax.known import AxDatabase, fits
from map_bo.data import Metric
from map_bo.errors import DataError, StoreError
from map_bo.loop.reading import load_state
from map_bo.loop.transfer.sources import take
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.space import CoefficientSpace
from tests.ax.exported import exported, own_client, unfinished
from tests.loop.bowls import Bowls, SafeBowls

VALUES = {"near_a": (0.5, 0.1), "far_from_b": (0.25, 0.0)}


class Named(SafeBowls):
    """Three experts and three metrics with names that Ax takes as they are."""

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace.box(("a", "b", "c"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("near_a", kind="unbounded"),
            Metric("far_from_b", "min", "loss"),
            Metric("safe", kind="unbounded"),
        )


def test_an_experiment_of_fewer_experts_and_metrics_is_taken(tmp_path: Path) -> None:
    client = own_client()
    with quiet():
        for point in ({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.5}):
            client.complete_trial(client.attach_trial(point), VALUES)
        client.mark_trial_failed(client.attach_trial({"a": 0.2, "b": 0.2}))
        client.attach_trial({"a": 0.3, "b": 0.3})  # running
    file = write_experiment(client._experiment, tmp_path / "ax.db")
    found = take(AxDatabase(file), Named())
    seen = found.observations
    assert seen.X.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.2, 0.2, 0.0]]
    assert seen.Y[:2, :2].tolist() == [[0.5, 0.25]] * 2
    assert torch.allclose(seen.Yvar[0, :2], torch.tensor([0.01, 0.0]).double())
    assert seen.incomplete.tolist() == [True, True, False]
    assert seen.failures[2] == "failed in Ax"
    assert found.source["from"] == "ax"
    assert found.source["experiment"] == "native"
    assert found.source["new_experts"] == ["c"]


def test_an_exported_run_has_its_own_names_and_problem(tmp_path: Path) -> None:
    unfinished(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    study = AxDatabase(file).study()
    assert study.names == ("a", "b")
    assert study.problem == Bowls().describe()
    state, _ = load_state(tmp_path / "run")
    assert torch.allclose(study.X, state.seen.X)


def test_what_an_experiment_has_is_compared_with_the_run(tmp_path: Path) -> None:
    experiment = own_client()._experiment
    problem = Named()
    assert fits(experiment, CoefficientSpace.box(("a", "b")), problem.metrics[:2])
    assert not fits(experiment, problem.space, problem.metrics[:2])  # it lacks an expert
    assert not fits(experiment, CoefficientSpace.box(("a",)), problem.metrics[:2])
    assert not fits(experiment, CoefficientSpace.box(("a", "b")), problem.metrics)
    # What shares nothing is refused in the words of an import.
    assert fits(experiment, CoefficientSpace.box(("p", "q")), problem.metrics[:2])


def test_what_is_no_study_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(StoreError, match="is not a database of Ax"):
        AxDatabase(tmp_path / "text").study()
    file = write_experiment(own_client()._experiment, tmp_path / "ax.db")
    with pytest.raises(DataError, match="holds no evaluation"):
        AxDatabase(file).study()
    with pytest.raises(StoreError, match="holds no experiment 'other'"):
        AxDatabase(file, "other").study()
    assert AxDatabase(file, experiment=read_experiment(file)).experiment is not None
