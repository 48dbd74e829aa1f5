from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.metrics import SeveralMetrics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.merged.trial import peak_memory, try_out


class Weights(ExampleEvaluator):
    """Its outcomes are weights of the model, one per example."""

    size = 40
    digest = "weights"

    def __init__(self, which: int, *, broken: bool = False) -> None:
        super().__init__(batch_size=8)
        self.which, self.broken, self.asked = which, broken, 0
        self.items: set[int] = set()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("weight", kind="unbounded"),)

    def prepare(self, model: nn.Module) -> None:
        """Nothing is read."""

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        self.asked += len(items)
        self.items |= set(items.tolist())
        if self.broken:
            raise RuntimeError("no such layer")
        return torch.full((len(items),), float(model.get_parameter("weight")[0, self.which]))


class Bare:
    """By example, without a base class."""

    size = 3

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        return items.double()

    def __call__(self, model: nn.Module) -> float:
        raise AssertionError("it is scored by example")


def problem(**evaluators: Any) -> MergedModelProblem:
    base = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    experts = {
        "left": {**base, "weight": torch.tensor([[1.0, 0.0]])},
        "up": {**base, "weight": torch.tensor([[0.0, 2.0]])},
    }
    return MergedModelProblem(
        nn.Linear(2, 1), base=base, experts=experts, evaluators=evaluators, check_base=False
    )


def test_base_and_experts_are_scored_on_a_few_examples_of_all_parts_of_the_data() -> None:
    left = Weights(0)
    found = try_out(problem(left=left, up=Weights(1)), examples=10)
    assert found.models == ("base", "left", "up")
    assert [(task.name, task.size, task.tried) for task in found.tasks] == [
        ("left", 40, 10),
        ("up", 40, 10),
    ]
    assert left.asked == 30
    assert {item // 4 for item in left.items} == set(range(10))
    assert {name: seen["left"] for name, seen in found.tasks[0].values.items()} == {
        "base": 0.0,
        "left": 1.0,
        "up": 0.0,
    }
    assert found.tasks[1].values["up"] == {"up": 2.0}
    assert found.memory > 1e7
    assert found.device_memory == 0


class InTurn(Weights):
    """Examples of three tasks in turn, of which each has a metric."""

    size = 96

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(Metric(name, kind="unbounded") for name in "abc")

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        own = nn.functional.one_hot(items % 3, 3).double()
        return torch.where(own > 0, own, torch.nan)

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        means = outcomes.nanmean(0).tolist()
        return {name: Measurement(mean) for name, mean in zip("abc", means, strict=True)}


@pytest.mark.parametrize("size", [96, 64, 99])
def test_examples_of_several_tasks_in_turn_are_all_tried(size: int) -> None:
    evaluator = InTurn(0)
    evaluator.size = size
    found = try_out(problem(turns=evaluator), examples=32)
    assert found.tasks[0].values["base"] == {f"turns_{name}": 1.0 for name in "abc"}


def test_the_time_of_an_evaluation_is_that_of_all_examples_and_merges() -> None:
    found = try_out(problem(left=Weights(0), up=Weights(1)), examples=100)
    assert found.tasks[0].tried == 40
    together = sum(task.seconds for task in found.tasks) + 2 * found.merging
    assert found.seconds == pytest.approx(together)
    assert 0 < found.seconds < 5


def test_evaluators_without_examples_are_called_once_and_others_by_example() -> None:
    calls = []

    def whole(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        return {"a": 0.25, "b": 0.5}

    found = try_out(problem(whole=SeveralMetrics(whole, ["a", "b"]), bare=Bare()))
    assert len(calls) == 1
    assert found.tasks[0].values == {"base": {"whole_a": 0.25, "whole_b": 0.5}}
    assert (found.tasks[0].size, found.tasks[0].tried) == (None, None)
    assert found.tasks[1].values["up"] == {"bare": 1.0}


def test_metrics_that_are_left_out_are_not_shown() -> None:
    whole = SeveralMetrics(lambda model: {"a": 0.25, "b": 0.5}, ["a", "b"])
    found = try_out(problem(whole=whole).restricted(["whole_b"]))
    assert found.tasks[0].values == {"base": {"whole_b": 0.5}}


def test_all_that_cannot_be_scored_is_said_together() -> None:
    def fails(model: nn.Module) -> float:
        raise ValueError("the grader is gone")

    with pytest.raises(ConfigError) as caught:
        try_out(problem(left=Weights(0, broken=True), right=fails, up=Weights(1)))
    assert "task 'left' raised RuntimeError: no such layer" in caught.value.message
    assert "evaluator 'right' raised ValueError: the grader is gone" in caught.value.message
    with pytest.raises(EvaluationError, match="the grader is gone"):
        try_out(problem(right=fails))


def test_peak_memory_is_in_bytes() -> None:
    assert 1e7 < peak_memory() < 1e12
