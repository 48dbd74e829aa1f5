from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, SpaceError
from map_bo.examples.sets import Part
from map_bo.problems.outcome_table import OutcomeTable
from map_bo.problems.problem import Divisible, HasExamples, Problem, on_parts
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.tracking.jsonl import MemoryStore
from tests.contracts.problem_contract import ProblemContract
from tests.loop.bowls import quick

G = make_generator(0)
SPACE = CoefficientSpace.box(("a", "b"))
X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
RIGHT = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
LOSS = torch.tensor([[2.0, 1.0], [3.0, torch.nan], [1.0, 4.0]])
METRICS = (Metric("loss", "min", "loss"), Metric("right"))


def table(**settings: Any) -> OutcomeTable:
    given: dict[str, Any] = {"metrics": METRICS, "labels": {"right": list("xyxy")}, **settings}
    return OutcomeTable(X, {"right": RIGHT, "loss": LOSS}, SPACE, **given)


def evaluate(problem: Problem, x: Tensor = X) -> Observations:
    return problem.evaluate(x, generator=G)


class TestContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return table(nearest=True)


def test_metrics_are_means_of_outcomes_with_their_noise() -> None:
    problem = table()
    assert isinstance(problem, HasExamples)
    assert isinstance(problem, Divisible)
    seen = evaluate(problem)
    assert [metric.name for metric in seen.metrics] == ["loss", "right"]
    assert all(metric.resampling == "same" for metric in seen.metrics)
    assert seen.Y.tolist() == [[1.5, 0.75], [3.0, 0.25], [2.5, 1.0]]
    assert seen.counts[:, 1].tolist() == [4.0, 4.0, 4.0]
    assert float(seen.Yvar[0, 0]) == 0.25
    assert seen.failures == (None, None, None)
    assert torch.equal(problem.true_values(X), seen.Y)
    assert torch.equal(seen.examples[1]["right"].values[:, 0], RIGHT[1].double())
    assert seen.examples[1]["loss"].values.isnan().flatten().tolist() == [False, True]


def test_parts_are_looked_up_alone() -> None:
    problem = table()
    seen = evaluate(problem.on_examples({"right": torch.tensor([3, 1])}))
    assert [metric.name for metric in seen.metrics] == ["right"]
    assert seen.Y.tolist() == [[0.5], [0.0], [1.0]]
    assert seen.examples[0]["right"].items.tolist() == [1, 3]
    assert seen.examples[0]["right"].size == 4
    only = problem.restricted(("right",))
    assert list(only.example_sets) == ["right"]
    assert torch.equal(evaluate(only).Y, evaluate(problem).Y[:, 1:])
    assert evaluate(only.on_examples({"right": torch.tensor([0])})).Y.tolist() == [
        *([1.0], [0.0], [1.0])
    ]
    with pytest.raises(DataError, match="no evaluator 'loss'"):
        only.on_examples({"loss": torch.tensor([0])})
    with pytest.raises(DataError, match="must be different ones of 4"):
        problem.on_examples({"right": torch.tensor([4])})


def test_orders_are_stratified_by_labels() -> None:
    problem = table()
    strata = problem.example_sets["right"].strata
    assert strata is not None
    assert strata.tolist() == [0, 1, 0, 1]
    half = evaluate(on_parts(problem, [Part("right", 0, 2)], 3)).examples[0]["right"]
    assert sorted(i % 2 for i in half.items.tolist()) == [0, 1]


def test_more_than_half_failed_is_a_failed_metric() -> None:
    seen = evaluate(table().on_examples({"loss": torch.tensor([1]), "right": torch.tensor([0])}))
    assert seen.failures[0] is None
    assert "1 of 1 examples failed" in (seen.failures[1] or "")
    assert seen.Y[1].isfinite().tolist() == [False, True]
    assert list(seen.examples[1]) == ["right"]


def test_points_that_were_not_recorded() -> None:
    x = torch.tensor([[0.4, 0.5], [1.0, 0.0]], dtype=torch.float64)
    seen = evaluate(table(), x)
    assert seen.failures == ("this point is not in the table; the nearest is 0.1 away", None)
    assert seen.examples[0] == {}
    near = evaluate(table(nearest=True), x)
    assert near.Y.tolist() == [[2.5, 1.0], [3.0, 0.25]]
    assert torch.equal(near.X, x)
    assert evaluate(table(tolerance=0.2), x).failures == (None, None)
    with pytest.raises(SpaceError):
        evaluate(table(), torch.tensor([[2.0, 0.0]]))


def test_any_run_can_be_driven_on_a_table() -> None:
    result = map_bo.Run(table(nearest=True), quick(budget=5), MemoryStore()).drive()
    assert bool(result.seen.ok.all())


def test_it_travels_and_says_what_it_is() -> None:
    problem = table()
    again = pickle.loads(pickle.dumps(problem))
    assert again.describe() == problem.describe()
    assert torch.equal(evaluate(again).Y, evaluate(problem).Y)
    other = OutcomeTable(X, {"right": 1 - RIGHT, "loss": LOSS}, SPACE, metrics=METRICS)
    assert other.describe() != problem.describe()
    assert other.example_sets["right"].digest != problem.example_sets["right"].digest


@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        ({"X": X[:0]}, "X of shape"),
        ({"X": torch.zeros(3, 3)}, "3 coefficients and the space 2"),
        ({"outcomes": {}}, "0 tasks"),
        ({"outcomes": {"right": RIGHT[:2]}}, r"shape \(2, 4\) for 3 rows"),
        ({"outcomes": {"right": RIGHT[:, :0]}}, r"shape \(3, 0\) for 3 rows"),
        ({"outcomes": {"right": RIGHT / 0}}, "some are infinite"),
        ({"metrics": [Metric("left")]}, "of left; tasks are right"),
        ({"labels": {"left": [1]}}, "of right, left; tasks are right"),
        ({"labels": {"right": [1]}}, "1 labels of 4 examples"),
        ({"tolerance": -1}, "tolerance must be"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], verdict: str) -> None:
    given: dict[str, Any] = {"X": X, "outcomes": {"right": RIGHT}, "space": SPACE, **settings}
    with pytest.raises(DataError, match=verdict):
        OutcomeTable(**given)
