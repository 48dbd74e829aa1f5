from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.ax.experiment import KEY, experiment_of
from map_bo.ax.observations import observations_of
from map_bo.errors import MissingDependencyError, StoreError
from map_bo.loop.run import Run
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.tracking.jsonl import JsonlStore
from tests.ax.exported import Bounded, unfinished
from tests.choices import CHOICE, Levels
from tests.loop.bowls import Bowls, quick


def test_trials_are_what_the_rows_are(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    experiment = experiment_of(tmp_path / "run")
    assert experiment.name == "run"
    statuses = [trial.status.name for trial in experiment.trials.values()]
    assert statuses == ["COMPLETED"] * 2 + ["FAILED"] + ["COMPLETED"] * 4 + ["RUNNING"]
    for trial, x in zip(experiment.trials.values(), run.state.X, strict=True):
        (arm,) = trial.arms
        assert [arm.parameters["c_a"], arm.parameters["c_b"]] == x.tolist()
    nodes = [t.generator_runs[0]._generation_node_name for t in experiment.trials.values()]
    assert nodes == ["anchor"] * 4 + ["Sobol"] * 4
    failed = experiment.trials[2]
    assert str(failed.status_reason).startswith("evaluation 2 ran out of memory")
    assert len(str(failed.status_reason)) == 100  # Ax's column is no wider
    assert len(failed._properties[KEY]["observation"]["failures"][0]) > 200
    took = experiment.trials[6]
    assert took.time_completed is not None
    assert took.time_run_started is not None
    assert took.time_created <= took.time_run_started <= took.time_completed


def test_noise_is_given_for_all_values_of_a_metric_or_for_none(tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    with quiet():
        table = experiment_of(tmp_path).data.df.set_index(["trial_index", "metric_name"])
    seen = run.state.seen.succeeded()
    rows = [i for i in range(7) if i != 2]
    for j, name in enumerate(("near_a", "far_from_b")):
        for row, i in enumerate(rows):
            assert table.loc[(i, name), "mean"] == seen.Y[row, j]
            sem = table.loc[(i, name), "sem"]
            if name == "near_a":
                assert sem == seen.Yvar[row, j].sqrt()
            else:  # every other one is unknown, and Ax's models refuse a mixture
                assert sem != sem
    assert len(table) == 12


def test_metrics_have_directions_and_the_reference_is_their_threshold(tmp_path: Path) -> None:
    unfinished(tmp_path, reference={"near a": -1.0, "far from b": 3.0})
    experiment = experiment_of(tmp_path)
    config = experiment.optimization_config
    assert config is not None
    assert config.objective.expression == "near_a, -far_from_b"
    assert experiment.metrics["far_from_b"].lower_is_better is True
    assert experiment.metrics["near_a"].lower_is_better is False
    told = [str(threshold) for threshold in config.all_constraints]
    assert ["near_a >= -1" in told[0], "far_from_b <= 3" in told[1]] == [True, True]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ({"lower": -0.5, "upper": 1.5}, []),
        ({"sum_at_most": 1.2}, [({"c_a": 1.0, "c_b": 1.0}, 1.2, False)]),
        ({"simplex": True}, [({"c_a": 1.0, "c_b": 1.0}, 1.0, True)]),
    ],
)
def test_the_search_space_is_the_runs(
    tmp_path: Path, box: dict[str, Any], expected: list[object]
) -> None:
    problem = Bounded(box=box)
    unfinished(tmp_path, problem=problem)
    space = experiment_of(tmp_path).search_space
    bounds = [(p.lower, p.upper) for p in space.parameters.values()]  # type: ignore[attr-defined]
    assert bounds == [(box.get("lower", 0.0), box.get("upper", 1.0))] * 2
    found = [(c.constraint_dict, c.bound, c.is_equality) for c in space.parameter_constraints]
    assert found == expected


def test_an_ordering_of_coefficients_is_a_constraint(tmp_path: Path) -> None:
    from map_bo.space import CoefficientSpace, LinearConstraint

    class Ordered(Bowls):
        @property
        def space(self) -> CoefficientSpace:
            order = LinearConstraint((1.0, -1.0), 0.0)  # a <= b
            return CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0), (order,))

    unfinished(tmp_path, problem=Ordered())
    (found,) = experiment_of(tmp_path).search_space.parameter_constraints
    assert (found.constraint_dict, found.bound) == ({"c_a": 1.0, "c_b": -1.0}, 0.0)


def test_properties_say_how_the_run_was_run(tmp_path: Path) -> None:
    unfinished(tmp_path)
    told = experiment_of(tmp_path, name="mine")._properties[KEY]
    assert told["seed"] == 5
    assert set(told["versions"]) >= {"map-bo", "torch"}
    assert told["settings"]["budget"] == 30
    assert told["problem"]["type"] == "Bowls"
    assert [metric["kind"] for metric in told["metrics"]] == ["unbounded", "loss"]


def test_verified_points_are_trials_of_a_finished_run(tmp_path: Path) -> None:
    result = Run(Bowls(), quick(), JsonlStore.create(tmp_path)).drive()
    experiment = experiment_of(tmp_path)
    last = [experiment.trials[i] for i in (6, 7)]
    last.sort(key=lambda trial: trial._properties[KEY]["verification"])  # as results have them
    assert [t.generator_runs[0]._generation_node_name for t in last] == ["verification"] * 2
    X = torch.tensor([list(t.arms[0].parameters.values()) for t in last])
    assert torch.allclose(X.double(), result.verification.X)


def test_a_run_without_evaluations_is_refused(tmp_path: Path) -> None:
    Run(Bowls(), quick(), JsonlStore.create(tmp_path)).ask(2)
    with pytest.raises(StoreError, match="no evaluation yet") as caught:
        experiment_of(tmp_path)
    assert "map-bo resume" in str(caught.value.hint)


def test_a_run_of_failures_alone_has_no_data(tmp_path: Path) -> None:
    problem = Bowls(fails=lambda number, x: "broken")
    run = Run(problem, quick(), JsonlStore.create(tmp_path))
    for i in run.ask(2):
        run.tell(i, problem.evaluate(run.state.X[[i]], generator=run.generator))
    experiment = experiment_of(tmp_path)
    assert [trial.status.name for trial in experiment.trials.values()] == ["FAILED"] * 2
    assert experiment.data.empty


def test_a_missing_ax_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    unfinished(tmp_path)
    monkeypatch.setitem(sys.modules, "ax.api.client", None)
    with pytest.raises(MissingDependencyError, match="an export to Ax needs Ax"):
        experiment_of(tmp_path)


def test_a_choice_is_a_categorical_parameter_and_comes_back(tmp_path: Path) -> None:
    from ax.core.parameter import ChoiceParameter

    run = Run(Levels(), quick(8), JsonlStore.create(tmp_path / "run"))
    run.drive()
    with quiet():
        experiment = experiment_of(tmp_path / "run")
    parameter = experiment.parameters["c_operator"]
    assert isinstance(parameter, ChoiceParameter)
    assert (parameter.values, parameter.is_ordered) == ([0, 1, 2], False)
    found = observations_of(experiment, CHOICE, run.state.metrics)
    assert not found.left_out
    X, expected = (rows.X[rows.X[:, 0].argsort()] for rows in (found.observations, run.state.data))
    assert torch.equal(X, expected)  # trials of the verification have an order of their own
