from __future__ import annotations

from typing import Any

import pytest
import torch

from map_bo.errors import DataError
from map_bo.examples.sets import Part
from map_bo.problems.problem import HasExamples, Problem, on_parts
from map_bo.problems.responses import LogisticItems
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract

X = torch.rand(16, 3, generator=make_generator(5), dtype=torch.float64)


class TestContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return LogisticItems(size=30)


def test_the_same_seed_gives_the_same_outcomes_whatever_is_asked_with_them() -> None:
    problem, again = LogisticItems(seed=3), LogisticItems(seed=3)
    assert isinstance(problem, HasExamples)
    seen = problem.evaluate(X, generator=make_generator(0))
    one = again.evaluate(X[4:5], generator=make_generator(1))
    assert torch.equal(one.examples[0]["f2"].values, seen.examples[4]["f2"].values)
    torch.testing.assert_close(seen.Y, problem.true_values(X))
    part = on_parts(problem, [Part("f1", 0, 50)], 7).evaluate(X, generator=make_generator(0))
    found = part.examples[2]["f1"]
    assert torch.equal(found.values, seen.examples[2]["f1"].values[found.items])
    other = LogisticItems(seed=4)
    assert not torch.equal(other.true_values(X), problem.true_values(X))
    assert other.example_sets["f1"].digest != problem.example_sets["f1"].digest
    assert problem.example_sets["f2"].digest != problem.example_sets["f1"].digest


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_the_share_of_right_answers_is_what_the_model_says(common: float) -> None:
    """Over many examples, so that a wrong link, scale or sign would show."""
    problem = LogisticItems(m=1, size=40_000, common=common, seed=1)
    gap = problem.true_values(X) - problem.expected(X)
    assert float(gap.abs().max()) < 4 * 0.5 / 200
    # Also of examples of like difficulty, whose share is a sigmoid of what they are ahead.
    outcomes = problem.outcomes_at(X[:1], "f1")[0]
    ahead = problem.abilities(X[:1])[0, 0] - problem.difficulties[0]
    for low in (-2.0, -0.5, 1.0):
        near = (ahead >= low) & (ahead < low + 0.2)
        share, count = float(outcomes[near].mean()), int(near.sum())
        wanted = float(torch.sigmoid(ahead[near]).mean())
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / count) ** 0.5


def test_what_merges_have_in_common_is_what_was_said() -> None:
    def correlation(**settings: Any) -> float:
        settings = {"effect": 0.0, "level": 0.0, "spread": 0.0, "size": 4000, **settings}
        outcomes = LogisticItems(**settings).outcomes_at(X, "f1")
        return float(torch.corrcoef(outcomes).fill_diagonal_(0).sum() / (len(X) * (len(X) - 1)))

    assert correlation(common=1.0) == pytest.approx(1.0)
    assert abs(correlation(common=0.0, smoothness=0.02)) < 0.05
    # Of normal variables that are cut at their mean: 2 / pi arcsin(share).
    assert correlation(common=0.5, smoothness=0.02) == pytest.approx(1 / 3, abs=0.03)
    near = LogisticItems(smoothness=0.5, effect=0.0)
    moved = near.outcomes_at(X, "f1") != near.outcomes_at((X + 0.01).clamp(max=1), "f1")
    assert float(moved.double().mean()) < 0.02


def test_without_an_effect_no_merge_is_better_but_by_its_examples() -> None:
    plateau = LogisticItems(effect=0.0, size=2000)
    assert float(plateau.expected(X).std(0).max()) < 1e-12
    assert 0 < float(plateau.true_values(X).std(0).max()) < 0.02
    best = LogisticItems(seed=2)
    at = best.centres[0].unsqueeze(0)
    assert float(best.expected(at)[0, 0]) > float(best.expected(X)[:, 0].max())


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"d": 0},
        {"m": 0},
        {"effect": -1.0},
        {"common": 1.5},
        {"smoothness": 0.0},
        {"spread": -1.0},
        {"level": float("nan")},
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        LogisticItems(**settings)
