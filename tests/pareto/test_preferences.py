from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import PreferenceError
from map_bo.pareto.preferences import Preference, choose, numbers_by_name, shortfall
from map_bo.scale import Scale

METRICS = (Metric("math"), Metric("code"), Metric("loss", direction="min", kind="loss"))
VALUES = torch.tensor(
    [[0.9, 0.2, 1.0], [0.2, 0.9, 1.0], [0.6, 0.6, 1.2], [0.4, 0.4, 0.2]], dtype=torch.float64
)
SCALE = Scale(METRICS, torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]), "given")


def pick(values: Tensor = VALUES, **preference: Any) -> int:
    return choose(values, Preference(**preference), SCALE)


def test_weights_decide() -> None:
    assert pick(weights={"math": 1}) == 0
    assert pick(weights={"code": 5}) == 1
    assert pick(weights={"loss": 1}) == 3  # smaller is better
    assert pick(weights={"math": 1, "code": 1}) == 2


def test_no_weights_are_equal_weights() -> None:
    assert pick() == pick(weights={"math": 1, "code": 1, "loss": 1}) == 3


def test_metrics_are_compared_on_the_scale_of_reference_and_best() -> None:
    metrics = (Metric("points", kind="unbounded"), Metric("accuracy"))
    values = torch.tensor([[100.0, 0.1], [50.0, 0.9]], dtype=torch.float64)
    scale = Scale(metrics, torch.zeros(2), torch.tensor([1000.0, 1.0]), "given")
    assert choose(values, Preference(), scale) == 1  # .05 + .9 against .1 + .1, whatever the unit


def test_chebyshev_prefers_balance() -> None:
    values = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.45, 0.45, 0.9]])
    weights = {"math": 1, "code": 1}
    assert pick(values, weights=weights) == 0
    assert pick(values, weights=weights, rule="chebyshev") == 2


def test_chebyshev_breaks_ties_towards_efficiency() -> None:
    values = torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.8, 1.0]])
    assert pick(values, weights={"math": 1, "code": 1}, rule="chebyshev") == 1


def test_ties_go_to_the_first_point() -> None:
    assert pick(VALUES[[2, 2, 2]]) == 0


def test_constraints_are_in_the_metrics_own_units() -> None:
    assert pick(weights={"math": 1}, at_least={"code": 0.5}) == 2
    assert pick(weights={"math": 1}, at_most={"loss": 0.5}) == 3
    assert pick(weights={"math": 1}, at_least={"loss": 1.1}) == 2  # as it says, though worse
    assert pick(weights={"loss": 1}, at_least={"math": 0.5}, at_most={"math": 0.7}) == 2
    assert pick(weights={"math": 1}, at_least={"math": 0.9}) == 0  # equality satisfies


def test_infeasible_constraints_say_what_is_missed_and_what_is_attainable() -> None:
    with pytest.raises(PreferenceError) as caught:
        pick(at_least={"math": 0.7, "code": 0.7}, at_most={"loss": 1.1})
    text = str(caught.value)
    # Shares of the ranges: row 2 misses .1/.7 twice and .1/1 once, the others .5/.7 or more.
    assert "math = 0.6 misses at least 0.7 by 0.1" in text
    assert "code = 0.6 misses at least 0.7 by 0.1" in text
    assert "loss = 1.2 misses at most 1.1 by 0.1" in text
    assert "the largest math alone is 0.9" in text
    assert "largest code alone is 0.9" in text
    assert "smallest loss alone is 0.2" in text
    assert "together, point 2 has math = 0.6, code = 0.6, loss = 1.2" in text


def test_a_bound_beyond_every_point() -> None:
    with pytest.raises(PreferenceError, match=r"math = 0\.9 misses at least 0\.95 by 0\.05"):
        pick(at_least={"math": 0.95})


@pytest.mark.parametrize("where", ["weights", "at_least", "at_most"])
def test_unknown_metrics_are_told_the_nearest_or_the_known(where: str) -> None:
    with pytest.raises(PreferenceError, match="there is no metric 'maths'") as caught:
        pick(VALUES, **{where: {"maths": 1.0}})
    assert caught.value.hint == "did you mean 'math'?"
    with pytest.raises(PreferenceError, match="there is no metric 'x'") as caught:
        pick(VALUES, **{where: {"x": 1.0}})
    assert caught.value.hint == "choose from math, code, loss"


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_must_be_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(PreferenceError, match="weight of math must be finite and at least 0"):
        Preference(weights={"math": weight})


def test_weights_must_not_all_be_zero() -> None:
    with pytest.raises(PreferenceError, match="all weights are 0"):
        Preference(weights={"math": 0, "code": 0})


@pytest.mark.parametrize("where", ["at_least", "at_most"])
def test_bounds_must_be_finite(where: str) -> None:
    with pytest.raises(PreferenceError, match=r"math must be at (least|most) a finite number"):
        Preference(**{where: {"math": float("nan")}})  # type: ignore[arg-type]


def test_bounds_must_not_contradict_each_other() -> None:
    with pytest.raises(PreferenceError, match=r"at least 0\.8 and at most 0\.2"):
        Preference(at_least={"math": 0.8}, at_most={"math": 0.2})


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(PreferenceError, match="no rule 'best'"):
        Preference(rule="best")  # type: ignore[arg-type]


def test_an_empty_front_is_refused() -> None:
    with pytest.raises(PreferenceError, match="non-empty matrix of 3 metrics, got"):
        pick(VALUES[:0])


@pytest.mark.parametrize("rule", ["weighted_sum", "chebyshev"])
def test_a_metric_without_a_range_decides_nothing_but_its_bounds_hold(rule: str) -> None:
    ranged = torch.tensor([True, True, False])
    scale = Scale(METRICS, SCALE.point, SCALE.best, "given", ranged=ranged)
    weights = {"math": 1.0, "code": 0.5, "loss": 1000.0}
    without = {"math": 1.0, "code": 0.5}

    def row(weights: dict[str, float], **bounds: dict[str, float]) -> int:
        return choose(VALUES, Preference(weights=weights, rule=rule, **bounds), scale)  # type: ignore[arg-type]

    assert row(weights) == row(without)
    assert row(weights, at_most={"loss": 0.5}) == 3


@given(seed=st.integers(0, 999), factor=st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_only_the_ratio_of_weights_matters(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(12, 3, generator=generator, dtype=torch.float64)
    weights = dict(
        zip(("math", "code", "loss"), torch.rand(3, generator=generator).tolist(), strict=True)
    )
    longer = {name: factor * weight for name, weight in weights.items()}
    assert pick(values, weights=weights) == pick(values, weights=longer)


@given(seed=st.integers(0, 999), rule=st.sampled_from(["weighted_sum", "chebyshev"]))
@settings(max_examples=50, deadline=None)
def test_no_point_dominates_the_choice(seed: int, rule: str) -> None:
    values = torch.rand(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = values[pick(values, rule=rule)] * torch.tensor([1.0, 1.0, -1.0])
    assert not (values * torch.tensor([1.0, 1.0, -1.0]) > chosen).all(-1).any()


class TestConfidence:
    probability = torch.tensor([0.95, 0.9, 0.6, 0.2], dtype=torch.float64)

    def pick(self, probability: Tensor, **preference: Any) -> int:
        return choose(VALUES, Preference(**preference), SCALE, probability=probability)

    def test_points_that_keep_the_bounds_too_rarely_are_out(self) -> None:
        wanted = {"weights": {"math": 1, "code": 1}, "at_least": {"math": 0.2}}
        assert self.pick(self.probability, **wanted, confidence=0.5) == 2
        assert self.pick(self.probability, **wanted, confidence=0.9) == 0
        assert self.pick(self.probability, **wanted, confidence=None) == 2

    def test_without_a_point_that_is_sure_enough_the_most_probable_is_taken(self) -> None:
        # Of those that are predicted to keep the bound: the first is not.
        wanted = {"weights": {"math": 1}, "at_least": {"code": 0.5}}
        assert self.pick(self.probability, **wanted, confidence=0.99) == 1

    def test_without_bounds_probabilities_decide_nothing(self) -> None:
        assert self.pick(torch.zeros(4).double(), weights={"loss": 1}) == 3

    @pytest.mark.parametrize("confidence", [0, 1, 90, -0.1, float("nan"), "high", True])
    def test_what_is_no_probability_is_refused(self, confidence: Any) -> None:
        with pytest.raises(PreferenceError, match="confidence must be") as caught:
            Preference(confidence=confidence)
        assert "0.9" in str(caught.value.hint)


@pytest.mark.parametrize("given", [5, ["x"], [("x", 0.5)], {"x": None}, {"x": "high"}, {"x": [1]}])
def test_what_is_no_mapping_to_numbers_is_refused(given: object) -> None:
    with pytest.raises(PreferenceError, match=r"must (be a number|map metrics)") as caught:
        numbers_by_name("at_least", given)
    assert "at_least={'" in str(caught.value.hint)
    assert numbers_by_name("at_least", None) == {}
    assert numbers_by_name("at_least", {"x": 1}) == {"x": 1.0}


def test_a_shortfall_of_an_unknown_metric_is_refused() -> None:
    with pytest.raises(PreferenceError, match="there is no metric 'maths'"):
        shortfall(VALUES, METRICS, Preference(at_most={"maths": 1.0}))
