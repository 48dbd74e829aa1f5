from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.ax.database import read_experiment
from map_bo.ax.experiment import experiment_of
from map_bo.ax.observations import names_in, observations_of
from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.loop.reading import load_state
from map_bo.loop.run import Run
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.space import CoefficientSpace
from map_bo.tracking.jsonl import JsonlStore
from tests.ax.exported import exported, own_client, same, unfinished
from tests.loop.bowls import Bowls, quick

BOWLS = Bowls()


def read(client: Any, metrics: tuple[Metric, ...] = BOWLS.metrics) -> Any:
    return observations_of(client._experiment, BOWLS.space, metrics)


def test_a_run_comes_back_in_every_digit(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    for experiment in (experiment_of(tmp_path / "run"), read_experiment(file)):
        found = observations_of(experiment, BOWLS.space, BOWLS.metrics)
        assert same(found.observations, run.state.seen)
        assert [origin.trial for origin in found.origins] == list(range(7))
        ((waits),) = found.left_out
        assert (waits.trial, waits.reason) == (7, "it is running")


def test_a_finished_run_comes_back_with_its_verification(tmp_path: Path) -> None:
    Run(BOWLS, quick(), JsonlStore.create(tmp_path / "run")).drive()
    state, _ = load_state(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    found = observations_of(read_experiment(file), BOWLS.space, BOWLS.metrics).observations
    # Trials of the verification have an order of their own.
    assert same(in_order(found), in_order(state.data))


def in_order(seen: Observations) -> Observations:
    return seen.select(seen.X[:, 0].argsort().tolist())


def test_what_was_changed_in_ax_counts(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    experiment = experiment_of(tmp_path)
    with quiet():
        experiment.trials[0].update_trial_data({"near_a": (0.7, 0.2), "far_from_b": 0.9})  # type: ignore[attr-defined]
        first = run.state.seen.Y[1].tolist()
        experiment.trials[1].update_trial_data({"near_a": (first[0], 0.5)})  # type: ignore[attr-defined]
    found = observations_of(experiment, BOWLS.space, BOWLS.metrics).observations
    assert found.Y[0].tolist() == [0.7, 0.9]
    assert found.Yvar[0, 0] == pytest.approx(0.04)
    assert found.Yvar[0, 1].isnan()
    assert found.counts[0].isnan().all()
    assert found.Y[1].tolist() == first
    assert found.Yvar[1, 0] == pytest.approx(0.25)
    assert found.counts[1, 1] == run.state.seen.counts[1, 1]


def test_an_experiment_of_axs_own_is_read() -> None:
    with quiet():
        client = own_client()
        for sem in (0.1, None, 0.0):
            index = client.attach_trial({"a": 0.5, "b": 0.25})
            value = 0.75 if sem is None else (0.75, sem)
            client.complete_trial(index, {"near_a": value, "far_from_b": 2.0})
        failed = client.attach_trial({"a": 1.0, "b": 1.0})
        client.mark_trial_failed(failed, "no memory")
        abandoned = client.attach_trial({"a": 0.0, "b": 1.0})
        client.mark_trial_abandoned(abandoned)
    found = read(client)
    seen: Observations = found.observations
    assert seen.X.tolist() == [[0.5, 0.25]] * 3 + [[1.0, 1.0], [0.0, 1.0]]
    assert seen.Y[:3].tolist() == [[0.75, 2.0]] * 3
    assert seen.Yvar[0, 0] == pytest.approx(0.01)
    assert seen.Yvar[1, 0].isnan()
    assert seen.Yvar[2, 0] == 0
    assert seen.failures == (None,) * 3 + ("no memory", "abandoned in Ax")
    assert not found.left_out


def test_what_cannot_be_taken_is_told() -> None:
    data: Any
    whole: dict[str, Any] = {"near_a": 0.5, "far_from_b": 1.0}
    with quiet():
        client = own_client()
        client.attach_trial({"a": 0.5, "b": 0.5})
        for parameters, data in (
            ({"a": 1.5, "b": 0.5}, whole),
            ({"a": 0.5, "b": 0.5}, {"near_a": 0.5}),
            ({"a": 0.5, "b": 0.5}, {**whole, "far_from_b": -1.0}),
            ({"a": 0.5, "b": 0.5}, {**whole, "near_a": float("nan")}),
            ({"a": 0.5, "b": 0.5}, {**whole, "near_a": (0.5, float("inf"))}),
            ({"a": 0.5, "b": None}, whole),
        ):
            index = client.attach_trial({"a": 0.5, "b": 0.5})
            client._experiment.trials[index].arms[0]._parameters = parameters  # type: ignore[assignment]
            client.complete_trial(index, data)
        index = client.attach_trial({"a": 0.5, "b": 0.5})
        client.attach_data(index, whole)
        client.mark_trial_early_stopped(index)
    found = read(client)
    assert len(found.observations) == 0
    assert {left.trial: left.reason for left in found.left_out} == {
        0: "it is running",
        1: "it lies outside the space: a=1.5, b=0.5",
        2: "it has no value for far_from_b",
        3: "far_from_b is -1, which is not in [0, inf]",
        4: "near_a is nan, which is not in [-inf, inf]",
        5: "a standard error is infinite",
        6: "b is None, which is not a number",
        7: "it is early stopped",
    }


def test_names_may_be_the_runs_or_those_of_an_export() -> None:
    metrics = (Metric("x", kind="unbounded"), Metric("y", "min", "unbounded"))
    with quiet():
        own = own_client(objective="x, -y")._experiment
        assert names_in(own, BOWLS.space, metrics).parameters == ("a", "b")
        exported_names = own_client(names=("c_a", "c_b"), objective="x, -y")._experiment
        assert names_in(exported_names, BOWLS.space, metrics).parameters == ("c_a", "c_b")


@pytest.mark.parametrize(
    ("names", "objective", "message"),
    [
        (("a", "z"), "near_a, -far_from_b", "lacks the parameters b of the run"),
        (("a", "b", "z"), "near_a, -far_from_b", "parameters that the run lacks: z"),
        (("a", "b"), "near_a, -other", "lacks the metrics near a, far from b of the run"),
        (("a", "b"), "near_a, far_from_b", "'far from b' is maximised in the experiment"),
        (("a", "b"), "-near_a, -far_from_b", "'near a' is minimised in the experiment"),
    ],
)
def test_another_experiment_is_refused(
    names: tuple[str, ...], objective: str, message: str
) -> None:
    with quiet():
        client = own_client(names=names, objective=objective)
    with pytest.raises(DataError, match=message) as caught:
        read(client)
    assert caught.value.hint is not None


def test_directions_come_from_the_metrics_where_there_is_no_objective() -> None:
    from ax.core.experiment import Experiment
    from ax.core.metric import Metric as AxMetric

    with quiet():
        space = own_client()._experiment.search_space
        metrics = [AxMetric("near_a"), AxMetric("far_from_b", lower_is_better=False)]
        experiment = Experiment(space, "plain", metrics=metrics)
    with pytest.raises(DataError, match="'far from b' is maximised"):
        names_in(experiment, BOWLS.space, BOWLS.metrics)


def test_every_arm_of_a_batch_is_an_observation() -> None:
    from ax.core.arm import Arm
    from ax.core.data import Data
    from ax.core.generator_run import GeneratorRun
    from pandas import DataFrame

    with quiet():
        experiment = own_client()._experiment
        batch = experiment.new_batch_trial(
            GeneratorRun([Arm({"a": 0.25, "b": 0.5}), Arm({"a": 0.75, "b": 0.5})])
        )
        batch.mark_running(no_runner_required=True)
        rows = [
            {"trial_index": 0, "arm_name": arm.name, "metric_name": name, "mean": value, "sem": 0.0}
            for arm in batch.arms
            for name, value in (("near_a", 0.5), ("far_from_b", 1.0))
        ]
        experiment.attach_data(
            Data(df=DataFrame(rows).assign(metric_signature=lambda t: t.metric_name))
        )
        batch.mark_completed()
    found = observations_of(experiment, BOWLS.space, BOWLS.metrics)
    assert found.observations.X.tolist() == [[0.25, 0.5], [0.75, 0.5]]
    assert [origin.arm for origin in found.origins] == ["0_0", "0_1"]


def test_what_is_known_goes_to_the_left_out() -> None:
    space = CoefficientSpace.box(("a", "b"))
    with quiet():
        client = own_client()
        for a in (0.25, 0.75):
            index = client.attach_trial({"a": a, "b": 0.5})
            client.complete_trial(index, {"near_a": a, "far_from_b": 1.0})
    found = observations_of(client._experiment, space, BOWLS.metrics)
    rest = found.without([True, False], "known")
    assert torch.equal(rest.observations.X, found.observations.X[1:])
    assert [origin.trial for origin in rest.origins] == [1]
    assert [(left.trial, left.reason) for left in rest.left_out] == [(0, "known")]
