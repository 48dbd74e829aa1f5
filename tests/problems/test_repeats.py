from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import DataError, EvaluationError
from map_bo.evaluators.items import Items
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.outcome_table import OutcomeTable
from map_bo.problems.repeats import RepeatNoise, repeat_noise
from map_bo.problems.responses import LogisticItems
from map_bo.space import CoefficientSpace
from tests.merging.small_models import build, family

X = torch.tensor([0.3, 0.1, 0.6], dtype=torch.float64)


def merged(**evaluators: Items) -> MergedModelProblem:
    base, experts = family("mlp")
    return MergedModelProblem(build("mlp", 5), base=base, experts=experts, evaluators=evaluators)


def drifting() -> Items:
    """Return an evaluator of which two examples come out otherwise at each second measurement."""
    seen = dict.fromkeys(range(20), 0)

    def score(model: nn.Module, items: Tensor) -> list[int]:
        for item in items.tolist():
            seen[item] += 1
        return [int(seen[item] % 2) if item < 2 else 1 for item in items.tolist()]

    return Items(score, 20)


def neighbourly() -> Items:
    """Return an evaluator whose outcomes depend on which examples are scored together."""

    def score(model: nn.Module, items: Tensor) -> Tensor:
        return (items + 1) / items.sum() + torch.zeros(len(items))

    return Items(score, 20, batch_size=4, metric=Metric("a", kind="unbounded"))


def test_chance_and_batches_are_told_apart() -> None:
    steady = Items(lambda model, items: (items % 3).clamp(max=1), 20, digest="steady")
    found = repeat_noise(merged(a=drifting(), b=neighbourly(), c=steady), X, 4)
    assert set(found) == {"a", "b", "c"}
    assert (found["a"].repeated, found["a"].regrouped) == (2, 2)
    assert found["a"].deviation == pytest.approx(0.1 * (8 / 28) ** 0.5)  # half of them .1 lower
    assert found["b"].repeated == 0
    assert found["b"].regrouped > 10
    # Also of what a cache of evaluations would have known.
    assert found["c"] == RepeatNoise(20, 0, 0, 0.0)


def test_it_needs_no_more_of_a_problem_than_its_examples() -> None:
    found = repeat_noise(LogisticItems(size=30), X)
    assert found == {name: RepeatNoise(30, 0, 0, 0.0) for name in ("f1", "f2")}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="times must be"):
        repeat_noise(LogisticItems(size=30), X, 1)
    space = CoefficientSpace.box(("a",))
    single = OutcomeTable(torch.zeros(1, 1), {"a": torch.ones(1, 1)}, space)
    with pytest.raises(DataError, match="no evaluator scores its examples one by one"):
        repeat_noise(single, torch.zeros(1))
    failed = OutcomeTable(torch.zeros(1, 1), {"a": torch.full((1, 4), torch.nan)}, space)
    with pytest.raises(EvaluationError, match="a measurement failed: 2 of 2 examples failed"):
        repeat_noise(failed, torch.zeros(1))
