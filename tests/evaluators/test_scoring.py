from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement, accuracy, mean_loss, mean_probability
from map_bo.evaluators.items import Items
from map_bo.evaluators.scoring import Scored
from map_bo.rng import make_generator

MODEL = nn.Linear(3, 2)


class Bare:
    size = 4
    digest: Any = "four"

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        return (items % 2).double()


class Several(Bare):
    metrics = (Metric("a"), Metric("b", "min", "loss"))

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        return torch.stack([items % 2, 1 + items], -1).double()


class Summing(Several):
    strata = torch.tensor([3, 3, 1, 1])
    divisible = False

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, float]:
        assert outcomes.shape == (4 if items is None else len(items), 2)
        return {"a": 0.5, "b": 0.25}


def scored(evaluator: object) -> Scored:
    found = Scored.of("task", evaluator)
    assert found is not None
    return found


def test_functions_are_not_scored_by_example() -> None:
    assert Scored.of("task", len) is None


def test_what_an_evaluator_says_of_itself() -> None:
    bare = scored(Bare())
    assert (bare.size, bare.metrics, bare.means, bare.divisible) == (4, ("task",), (True,), True)
    assert (bare.digest, bare.strata) == ("four", None)
    assert scored(Several()).metrics == ("task_a", "task_b")
    assert scored(Several()).means == (True, True)
    summing = scored(Summing())
    assert summing.means == (False, False)
    assert not summing.divisible
    assert summing.strata is not None
    assert summing.strata.tolist() == [0, 0, 1, 1]


def test_measurements_have_the_names_and_kinds_of_the_run() -> None:
    metrics = [Metric("task_a", kind="loss"), Metric("task_b", "min", "loss")]
    found, table = scored(Several()).measure(MODEL, metrics)
    assert found == {
        # As a loss it is no count of right answers, though all of them are 0 or 1.
        "task_a": Measurement(0.5, variance=1 / 12, count=4),
        "task_b": Measurement(2.5, variance=5 / 12, count=4),
    }
    assert table.tolist() == [[0.0, 1.0], [1.0, 2.0], [0.0, 3.0], [1.0, 4.0]]
    found, table = scored(Several()).measure(MODEL, metrics[:1], torch.tensor([3, 0]))
    assert found["task_b"] == Measurement(2.5, variance=2.25, count=2)
    assert table.tolist() == [[1.0, 4.0], [0.0, 1.0]]


def test_a_summary_is_asked_for_some_examples_with_their_indices() -> None:
    found, _ = scored(Summing()).measure(MODEL, [], torch.tensor([3, 0]))
    assert found == {"task_a": Measurement(0.5), "task_b": Measurement(0.25)}


def test_outcomes_as_they_are_kept() -> None:
    one = scored(Several())
    _, table = one.measure(MODEL, [], torch.tensor([3, 0]))
    kept = one.outcomes(table, torch.tensor([3, 0]))
    assert kept.items.tolist() == [0, 3]
    assert kept.values.tolist() == [[0.0, 1.0], [1.0, 4.0]]
    assert (kept.size, kept.metrics) == (4, ("task_a", "task_b"))
    assert one.outcomes(torch.zeros(4, 2)).complete


@pytest.mark.parametrize("make", [accuracy, mean_loss, mean_probability])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_classifiers_measure_what_calling_them_does(make: Any, batch_size: int) -> None:
    inputs = torch.randn(10, 3, generator=make_generator(0))
    labels = torch.tensor([0, 1] * 5)
    evaluator = make(inputs, labels, batch_size)
    one = scored(evaluator)
    assert one.means == (True,)
    found, table = one.measure(MODEL, [Metric("task", kind="loss")])
    assert found["task"] == evaluator(MODEL)
    items = torch.tensor([9, 2, 2, 0])
    _, some = one.measure(MODEL, [], items)
    torch.testing.assert_close(some, table[items], rtol=1e-5, atol=1e-6)


def test_a_digest_that_cannot_be_told_is_none() -> None:
    class Broken(Bare):
        @property
        def digest(self) -> str:
            raise RuntimeError("gone")

    assert scored(Broken()).digest == ""
    called = Bare()
    called.digest = lambda: "by a method"
    assert scored(called).digest == "by a method"
    called.digest = 7
    assert scored(called).digest == ""


def test_a_summary_that_raises_is_told_of_each_metric() -> None:
    class Broken(Several):
        def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, float]:
            return {"a": 1 / 0, "b": 0.0}

    one = scored(Broken())
    found = one.summarise([], one.outcomes(torch.zeros(4, 2)))
    assert list(found) == ["task_a", "task_b"]
    assert all("'task' raised ZeroDivisionError" in str(each) for each in found.values())
    good = scored(Several())
    found = good.summarise([], good.outcomes(torch.ones(2, 2), torch.tensor([0, 2])))
    assert found["task_a"] == Measurement(1.0, count=2)


def test_as_many_means_as_metrics() -> None:
    class Wrong(Several):
        means = (True,)

    with pytest.raises(
        EvaluationError, match="says of 1 metrics whether they are means, and has 2"
    ):
        Scored.of("task", Wrong())


def test_bounds_are_those_of_the_run() -> None:
    low = scored(Items(lambda model, items: -1.0 - items, 3, kind="unbounded"))
    found, _ = low.measure(MODEL, [Metric("task", kind="unbounded")])
    assert found["task"] == Measurement(-2.0, variance=1 / 3, count=3)
    with pytest.raises(EvaluationError, match=r"go from -3 to -1, .* bounds are \[0.0, inf\]"):
        low.measure(MODEL, [Metric("task", kind="loss")])
