"""Evaluators of several metrics in a merged-model problem: in part, failing, and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import AnotherRunError, DataError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.metrics import SeveralMetrics
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_state
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic

X = torch.tensor([[0.25, 0.5]]).double()
METRICS = (Metric("acc"), Metric("loss", direction="min", kind="loss"))


class Harness:
    """Measures two metrics in one call, and counts its calls."""

    def __init__(self, metrics: tuple[Metric, ...] = METRICS) -> None:
        self.metrics, self.calls = metrics, 0
        self.broken: str | None = None

    def __call__(self, model: nn.Module) -> Mapping[str, float | Measurement]:
        self.calls += 1
        weight = model.get_parameter("weight").detach()[0]
        found: dict[str, float | Measurement] = {
            "acc": Measurement(float(torch.sigmoid(weight[0] - weight[1])), count=50),
            "loss": float(1 + weight[1] ** 2),
        }
        if self.broken is not None:
            found[self.broken] = float("nan")
        return found


def up(model: nn.Module) -> float:
    return float(torch.sigmoid(model.get_parameter("weight").detach()[0, 1]))


def problem(**evaluators: Any) -> MergedModelProblem:
    base = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    experts = {
        "left": {**base, "weight": torch.tensor([[1.0, 0.0]])},
        "up": {**base, "weight": torch.tensor([[0.0, 2.0]])},
    }
    return MergedModelProblem(
        nn.Linear(2, 1), base=base, experts=experts, evaluators=evaluators, check_base=False
    )


def evaluate(of: Any) -> Any:
    return of.evaluate(X, generator=make_generator(0))


def test_one_call_gives_all_metrics_of_an_evaluator() -> None:
    harness = Harness()
    found = evaluate(problem(lm=harness, up=up))
    assert [metric.name for metric in found.metrics] == ["lm_acc", "lm_loss", "up"]
    assert harness.calls == 1
    sigmoid = torch.sigmoid(torch.tensor([-0.75, 1.0])).tolist()
    assert found.Y[0].tolist() == pytest.approx([sigmoid[0], 2.0, sigmoid[1]])
    assert found.counts[0, 0] == 50
    assert torch.isnan(found.counts[0, 1:]).all()


def test_a_part_of_the_metrics_calls_only_their_evaluators() -> None:
    harness, whole = Harness(), problem(lm=Harness(), up=up)
    part = problem(lm=harness, up=up).restricted(["up", "lm_loss"])
    found = evaluate(part)
    assert [metric.name for metric in found.metrics] == ["up", "lm_loss"]
    assert found.Y[0].tolist() == evaluate(whole).Y[0, [2, 1]].tolist()
    evaluate(part.restricted(["up"]))
    assert harness.calls == 1
    with pytest.raises(DataError, match="there is no metric 'lm'"):
        part.restricted(["lm"])


def test_a_metric_that_fails_leaves_the_others() -> None:
    harness = Harness()
    harness.broken = "acc"
    found = evaluate(problem(lm=harness, up=up))
    assert found.Y[0].isnan().tolist() == [True, False, False]
    assert "evaluator 'lm', metric 'acc', returned nan" in str(found.failures[0])
    assert bool(found.partial[0])


def test_a_run_is_resumed_by_what_the_problem_says_of_its_metrics(tmp_path: Path) -> None:
    def run(of: MergedModelProblem, budget: int) -> Any:
        return optimize(
            of, budget, verify=0, run_dir=tmp_path / "run", progress=False, tracking="none",
            surrogate=Quadratic(), sampler=Sobol(),
        )  # fmt: skip

    harness = Harness()
    run(problem(lm=harness, up=up), 6)
    assert harness.calls == 6
    again = Harness()
    assert run(problem(lm=again, up=up), 6).summary["hypervolume"]
    assert again.calls == 0
    other = Harness((METRICS[0], Metric("loss", direction="max", kind="loss")))
    with pytest.raises(AnotherRunError, match="lm_loss"):
        run(problem(lm=other, up=up), 6)
    state, _ = load_state(tmp_path / "run")
    assert [metric.name for metric in state.seen.metrics] == ["lm_acc", "lm_loss", "up"]


def test_names_that_the_metrics_do_not_have_are_refused() -> None:
    with pytest.raises(DataError, match="two evaluators measure a metric called 'lm_acc'"):
        problem(lm=Harness(), lm_acc=up)
    several = SeveralMetrics(lambda model: {"a": 0.5, "b": 0.5}, ["a", "b"])
    assert [metric.name for metric in problem(x=several).metrics] == ["x_a", "x_b"]
