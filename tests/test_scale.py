from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.constraints import AtLeast
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, SurrogateError
from map_bo.pareto.indicators import hypervolume
from map_bo.rng import make_generator
from map_bo.scale import (
    SAME_POINT,
    Scale,
    anchor_rows,
    farthest_rows,
    same_points,
    varied_metrics,
    widths,
)
from map_bo.space import CoefficientSpace

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = (Metric("up", kind="unbounded"), Metric("down", "min", "unbounded"))
BASE, A, B, BLEND = [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]


def seen(
    rows: Sequence[Sequence[float]],
    values: Sequence[Sequence[float]],
    metrics: tuple[Metric, ...] = METRICS,
    **known: Any,
) -> Observations:
    return Observations(
        torch.tensor(rows, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        metrics,
        **known,
    )


ORDINARY = seen(
    [BASE, A, B, BLEND, [0.9, 0.9]],
    [[0.3, 5.0], [0.9, 4.0], [0.2, 1.0], [0.6, 2.0], [0.0, 9.0]],
)


@st.composite
def runs(draw: st.DrawFn) -> Observations:
    """Base, three experts, the blend and more, of three metrics in both directions."""
    space = CoefficientSpace.box(["a", "b", "c"])
    generator = make_generator(draw(st.integers(0, 10_000)))
    X = torch.cat([space.anchors().X, space.sample(5, generator=generator)])
    Y = torch.randn(len(X), 3, generator=generator, dtype=torch.float64)
    flat = draw(st.sets(st.integers(0, 2)))
    for column in flat:  # the anchors tie, and nothing beats them
        Y[:, column] = Y[:, column].abs() + 1.0
        Y[:4, column] = 1.0
    metrics = (
        Metric("x", "max", "unbounded"),
        Metric("y", "min", "unbounded"),
        Metric("z", "max", "unbounded"),
    )
    Y[:, [j for j in flat if metrics[j].direction == "max"]] *= -1
    return Observations(X, Y, metrics)


ABC = CoefficientSpace.box(["a", "b", "c"])


def scale_of(data: Observations, **given: Any) -> Scale:
    return Scale.of(data, ABC, **given)


# --- what the scale is


def test_the_point_is_the_worst_of_base_and_experts_and_the_end_the_best_expert() -> None:
    scale = Scale.of(ORDINARY, SPACE)
    assert scale.point.tolist() == [0.2, 5.0]
    assert scale.best.tolist() == [0.9, 1.0]
    assert scale.rule == "worst of base and experts"
    assert scale.is_anchored
    assert not scale.is_observed
    assert scale.rangeless == ()
    gains = scale.gains(ORDINARY.Y)
    assert gains[2].tolist() == [0.0, 1.0]
    assert gains[1].tolist() == pytest.approx([1.0, 0.25])
    assert float(gains[4].max()) < 0, "nothing is cut off"
    assert scale.width.tolist() == pytest.approx([0.7, 4.0])


def test_failures_and_repeated_anchors_change_nothing() -> None:
    failed = Observations.failed(torch.tensor([A, B]), METRICS, "boom")
    again = ORDINARY.append(failed).append(ORDINARY.select([1]))
    one, other = Scale.of(ORDINARY, SPACE), Scale.of(again, SPACE)
    assert torch.equal(one.point, other.point)
    assert torch.equal(one.best, other.best)
    assert one.rule == other.rule


def test_the_best_expert_ends_the_scale_not_the_best_of_all() -> None:
    data = seen([BASE, A, B, BLEND], [[0.9, 1.0], [0.2, 3.0], [0.5, 2.0], [1.5, 0.5]])
    assert Scale.of(data, SPACE).best.tolist() == [0.5, 2.0]


def test_without_the_base_the_experts_make_the_scale() -> None:
    scale = Scale.of(ORDINARY.select([1, 2, 3, 4]), SPACE)
    assert scale.point.tolist() == [0.2, 4.0]
    assert scale.rule == "worst of the experts"


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([3, 4], "neither base nor experts were measured"),
        ([0, 3, 4], "of base and experts only base was measured"),
        ([2, 3, 4], "of base and experts only b was measured"),
    ],
)
def test_with_fewer_than_two_anchors_what_was_observed_stands_in(rows: list[int], why: str) -> None:
    data = ORDINARY.select(rows)
    scale = Scale.of(data, SPACE)
    assert scale.rule == f"worst observed ({why})"
    assert scale.is_observed
    assert not scale.is_anchored
    assert scale.point.tolist() == [float(data.Y[:, 0].min()), float(data.Y[:, 1].max())]
    assert scale.best.tolist() == [float(data.Y[:, 0].max()), float(data.Y[:, 1].min())]


def test_nothing_succeeded_is_an_error() -> None:
    failed = Observations.failed(torch.zeros(2, 2), METRICS, "boom")
    with pytest.raises(SurrogateError, match="no evaluation succeeded"):
        Scale.of(failed, SPACE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"point": torch.zeros(3)}, r"the point of a scale is \[0\.0, 0\.0, 0\.0\]"),
        ({"best": torch.tensor([1.0, math.nan])}, r"the best of a scale is \[1\.0, nan\]"),
        ({"best": torch.tensor([1.0, 3.0])}, "worse than the reference point in down"),
        ({"unit": torch.tensor([1.0, math.inf])}, r"the unit of a scale is \[1\.0, inf\]"),
        ({"unit": torch.tensor([-1.0, 1.0])}, "worse than the reference point in up"),
        ({"ranged": torch.ones(3, dtype=torch.bool)}, r"ranged has shape \(3,\)"),
    ],
)
def test_ends_that_make_no_scale_are_refused(arguments: dict[str, Any], message: str) -> None:
    good = {"point": torch.tensor([0.0, 2.0]), "best": torch.tensor([1.0, 1.0]), "rule": "given"}
    Scale(METRICS, **good)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        Scale(METRICS, **{**good, **arguments})


# --- a reference point that the user gives


def test_a_given_point_worse_than_the_default_widens_the_scale() -> None:
    scale = Scale.of(ORDINARY, SPACE, {"up": 0.0, "down": 9.0})
    assert scale.point.tolist() == [0.0, 9.0]
    assert scale.best.tolist() == [0.9, 1.0]
    assert scale.unit is None
    assert scale.rule == "given by the user"
    assert scale.gains(scale.best).tolist() == [1.0, 1.0]


def test_values_that_are_not_given_keep_the_default() -> None:
    scale = Scale.of(ORDINARY, SPACE, {"down": 6.0})
    assert scale.point.tolist() == [0.2, 6.0]
    assert scale.rule == "given by the user for down, else worst of base and experts"


@pytest.mark.parametrize("threshold", [0.5, 0.89, 0.9, 0.95, 7.0])
def test_a_threshold_moves_the_zero_and_not_the_unit(threshold: float) -> None:
    default, scale = (
        Scale.of(ORDINARY, SPACE, given) for given in (None, {"up": threshold, "down": 6.0})
    )
    assert scale.point.tolist() == [threshold, 6.0]
    assert scale.best.tolist() == [0.9, 1.0], "the best expert is what it is"
    assert scale.width.tolist() == pytest.approx([0.7, 5.0])
    gains, before = scale.gains(ORDINARY.Y)[:, 0], default.gains(ORDINARY.Y)[:, 0]
    assert gains.diff().tolist() == pytest.approx(before.diff().tolist())
    beaten = ORDINARY.Y[:, 0] > threshold
    assert torch.equal(gains > 0, beaten)
    assert scale.gains(scale.end).tolist() == pytest.approx([1.0, 1.0])
    assert scale.rule.endswith("one unit of up is the range that was measured")


@pytest.mark.parametrize("threshold", [0.999, 1.0, 2.0])
def test_a_threshold_on_a_metric_on_which_the_anchors_tie_has_the_observed_range(
    threshold: float,
) -> None:
    Y = ORDINARY.Y.clone()
    Y[:, 0] = torch.tensor([1.0, 1.0, 1.0, 0.8, 0.6])
    scale = Scale.of(replace(ORDINARY, Y=Y), SPACE, {"up": threshold, "down": 6.0})
    assert bool(scale.ranged.all())
    assert float(scale.width[0]) == pytest.approx(0.4)
    Y[:, 0] = 1.0
    scale = Scale.of(replace(ORDINARY, Y=Y), SPACE, {"up": threshold, "down": 6.0})
    assert scale.rangeless == ("up",)
    [note] = scale.notes()
    assert note.startswith(f"metric 'up' does not vary (1; reference point {threshold:g})")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"uo": 1.0}, "unknown metrics: uo"), ({"up": math.nan}, "the reference point is")],
)
def test_a_wrong_reference_point_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scale.of(ORDINARY, SPACE, wrong)


# --- metrics without a range


@pytest.mark.parametrize("value", [1.0, 0.0, 2e7, -3e12, 1e-12])
@pytest.mark.parametrize("direction", ["max", "min"])
def test_a_metric_on_which_base_and_experts_tie_has_no_range(value: float, direction: Any) -> None:
    safe = Metric("safe", direction, "unbounded")
    metrics = (METRICS[0], safe)
    Y = ORDINARY.Y.clone()
    Y[:, 1] = value
    Y[4, 1] -= (1.0 + abs(value)) * (1 if direction == "max" else -1)  # a merge may be worse
    data = replace(ORDINARY, Y=Y, metrics=metrics)
    scale = Scale.of(data, SPACE)
    assert scale.rangeless == ("safe",)
    assert scale.point[1] == scale.best[1] == value
    gains = scale.gains(data.Y)
    assert bool((gains[:, 1] == 1).all())
    assert bool(torch.isfinite(gains).all())
    alone = Scale.of(Observations(data.X, Y[:, :1], metrics[:1]), SPACE)
    zero = torch.zeros(2, dtype=torch.float64)
    assert hypervolume(gains, zero) == hypervolume(alone.gains(Y[:, :1]), zero[:1])
    assert bool((scale.width > 0).all())
    [note] = scale.notes()
    assert note.startswith(f"metric 'safe' does not differ between base and experts ({value:.4g})")
    assert note.endswith("it still works as a constraint")


def test_what_differs_by_rounding_alone_has_no_range() -> None:
    data = seen([BASE, A, B], [[0.1 + 0.2, 1e9], [0.3, 1e9 + 0.1], [0.3, 1e9]])
    assert Scale.of(data, SPACE).rangeless == ("up", "down")


def test_where_the_base_is_better_than_every_expert_it_ends_the_scale() -> None:
    space = CoefficientSpace.box(["a"])
    data = seen([[0.0], [1.0]], [[0.9, 2.0], [0.5, 1.0]])  # the expert forgot, and learned
    scale = Scale.of(data, space)
    assert scale.point.tolist() == [0.5, 2.0]
    assert scale.best.tolist() == [0.9, 1.0]
    assert bool(scale.ranged.all())
    assert "(up)" in scale.rule


def test_where_only_merges_beat_the_anchors_the_best_of_them_ends_the_scale() -> None:
    data = seen([BASE, A, B, BLEND], [[0.0, 2.0], [0.0, 1.0], [0.0, 1.5], [0.4, 1.0]])
    scale = Scale.of(data, SPACE)
    assert scale.best.tolist() == [0.4, 1.0]
    assert bool(scale.ranged.all())


def noisy(gap: float, sd: float, **metric: Any) -> Observations:
    metrics = (METRICS[0], Metric("safe", **metric))
    values = [[0.1, 0.8], [0.9, 0.8 + gap], [0.5, 0.8]]
    return seen([BASE, A, B], values, metrics, Yvar=torch.tensor([[0.0, sd**2]] * 3))


def test_a_range_within_the_noise_of_a_difference_is_none() -> None:
    within, beyond = noisy(0.13, 0.1), noisy(0.35, 0.1)  # 2.39 sqrt(2) sd is .339
    scale = Scale.of(within, SPACE)
    assert scale.rangeless == ("safe",)
    assert scale.best.tolist() == pytest.approx([0.9, 0.93]), "the ends are what was measured"
    assert "differs by no more than its noise between base and experts (0.8, 0.93)" in str(
        scale.notes()
    )
    assert Scale.of(beyond, SPACE).rangeless == ()
    assert Scale.of(noisy(0.13, math.nan), SPACE).rangeless == (), "unknown noise is none"


def test_noise_of_the_same_examples_cancels() -> None:
    assert Scale.of(noisy(0.13, 0.1, resampling="same"), SPACE).rangeless == ()


@pytest.mark.parametrize(("correct", "rangeless"), [(19, ("safe",)), (18, ())])
def test_one_example_of_twenty_is_no_range(correct: int, rangeless: tuple[str, ...]) -> None:
    metrics = (METRICS[0], Metric("safe", resampling="same"))
    counts = torch.tensor([[math.nan, 20.0]] * 3)
    values = [[0.1, 1.0], [0.9, correct / 20], [0.5, 1.0]]
    data = seen([BASE, A, B], values, metrics, counts=counts)
    assert Scale.of(data, SPACE).rangeless == rangeless


def test_without_anchors_the_notes_speak_of_evaluations() -> None:
    scale = Scale.of(seen([BLEND, [0.2, 0.2]], [[1.0, 1.0], [1.0, 2.0]]), SPACE)
    assert "does not differ between the evaluations (1)" in scale.notes()[0]


def test_gains_are_differentiable_with_and_without_a_range() -> None:
    scale = replace(Scale.of(ORDINARY, SPACE), ranged=torch.tensor([True, False]))
    values = ORDINARY.Y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(scale.gains(values).sum(), values)
    assert slope[0].tolist() == pytest.approx([1 / 0.7, 0.0])


# --- laws


@given(data=runs(), order=st.permutations(range(10)))
def test_the_order_of_rows_does_not_matter(data: Observations, order: list[int]) -> None:
    one, other = scale_of(data), scale_of(data.select(order))
    assert torch.equal(one.gains(data.Y), other.gains(data.Y))
    assert one.rule == other.rule


@given(data=runs(), order=st.permutations(range(3)))
def test_the_order_of_metrics_does_not_matter(data: Observations, order: list[int]) -> None:
    metrics = tuple(data.metrics[j] for j in order)
    one, other = scale_of(data), scale_of(Observations(data.X, data.Y[:, order], metrics))
    assert torch.equal(one.gains(data.Y)[:, order], other.gains(data.Y[:, order]))
    assert torch.equal(one.select(order).gains(data.Y[:, order]), other.gains(data.Y[:, order]))
    assert set(one.rangeless) == set(other.rangeless)


@given(data=runs())
def test_the_order_of_experts_does_not_matter(data: Observations) -> None:
    other = scale_of(replace(data, X=data.X.flip(-1)))
    assert torch.equal(scale_of(data).gains(data.Y), other.gains(data.Y))


@given(data=runs(), flipped=st.sets(st.integers(0, 2)))
def test_the_direction_is_a_label(data: Observations, flipped: set[int]) -> None:
    Y, metrics = data.Y.clone(), list(data.metrics)
    for j in flipped:
        Y[:, j] *= -1
        other_way: Any = "min" if metrics[j].direction == "max" else "max"
        metrics[j] = replace(metrics[j], direction=other_way)
    other = scale_of(Observations(data.X, Y, tuple(metrics)))
    assert torch.equal(scale_of(data).gains(data.Y), other.gains(Y))


@given(data=runs(), powers=st.lists(st.floats(-12, 12), min_size=3, max_size=3))
def test_the_unit_of_a_metric_changes_no_gain(data: Observations, powers: list[float]) -> None:
    factor = 10 ** torch.tensor(powers, dtype=torch.float64)
    one, other = scale_of(data), scale_of(replace(data, Y=data.Y * factor))
    assert one.rangeless == other.rangeless
    torch.testing.assert_close(
        other.gains(data.Y * factor), one.gains(data.Y), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        other.gains(data.Y * factor, unit=other.observed_unit(data.Y * factor)),
        one.gains(data.Y, unit=one.observed_unit(data.Y)),
        rtol=1e-9,
        atol=1e-9,
    )


@given(data=runs(), power=st.floats(-12, 12))
def test_the_unit_of_noise_goes_with_that_of_the_metric(data: Observations, power: float) -> None:
    factor = 10**power
    noise = torch.full_like(data.Y, 0.5)
    one = scale_of(replace(data, Yvar=noise))
    other = scale_of(replace(data, Y=factor * data.Y, Yvar=factor**2 * noise))
    assert one.rangeless == other.rangeless


@given(data=runs(), threshold=st.floats(-5, 5))
def test_ends_have_gains_0_and_1_whatever_the_threshold(
    data: Observations, threshold: float
) -> None:
    for scale in (scale_of(data), scale_of(data, given={"x": threshold})):
        assert bool((scale.gains(scale.point)[scale.ranged] == 0).all())
        torch.testing.assert_close(scale.gains(scale.end), torch.ones(3, dtype=torch.float64))
        assert bool((scale.width > 0).all())
        assert bool((scale.observed_unit(data.Y) > 0).all())


@given(data=runs())
def test_a_metric_without_a_range_changes_no_volume_and_no_distance(data: Observations) -> None:
    scale = scale_of(data)
    kept = scale.ranged.nonzero().flatten().tolist()
    if not kept:
        return
    gains, fewer = scale.gains(data.Y), scale.select(kept).gains(data.Y[:, kept])
    zeros = torch.zeros(3, dtype=torch.float64)
    assert hypervolume(gains, zeros) == pytest.approx(
        hypervolume(fewer, zeros[: len(kept)]), rel=1e-12
    )
    assert farthest_rows(gains, 5, first=[0]) == farthest_rows(fewer, 5, first=[0])


def test_weights_of_metrics_without_a_range_do_not_count() -> None:
    scale = replace(Scale.of(ORDINARY, SPACE), ranged=torch.tensor([True, False]))
    W = torch.tensor([[0.2, 0.8], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert scale.weights(W).tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert Scale.of(ORDINARY, SPACE).weights(W) is W


def test_the_unit_of_observations_reaches_from_the_worst_to_the_best() -> None:
    scale = Scale.of(ORDINARY, SPACE)
    assert scale.observed_unit(ORDINARY.Y).tolist() == pytest.approx([0.9, 8.0])
    # From the reference point, where nothing observed is worse.
    assert scale.observed_unit(ORDINARY.Y[[1, 3]]).tolist() == pytest.approx([0.7, 3.0])


def test_a_shared_scale_keeps_the_widest_unit_apart_from_thresholds() -> None:
    scales = [
        Scale(METRICS, torch.tensor([0.8, 5.0]), torch.tensor([0.9, 1.0]), "", torch.ones(2)),
        Scale(METRICS, torch.tensor([0.7, 5.0]), torch.tensor([0.9, 2.0]), "other"),
    ]
    both = Scale.common(scales, "both")
    assert both.point.tolist() == pytest.approx([0.7, 5.0])
    assert both.width.tolist() == pytest.approx([1.0, 3.0])
    assert both.select([1]).width.tolist() == pytest.approx([3.0])


def test_the_scale_of_one_is_that_scale() -> None:
    ends = torch.tensor([0.2, 5.0]), torch.tensor([0.9, 1.0])
    one = Scale(METRICS, *ends, "one", constraints=(AtLeast("up", 0.5),))
    same = Scale.common([one], "one")
    assert (same.point.tolist(), same.best.tolist()) == (one.point.tolist(), one.best.tolist())
    assert (same.unit, same.constraints) == (None, one.constraints)


def test_several_scales_share_the_worst_points_and_the_best_ends() -> None:
    one = Scale(METRICS, torch.tensor([0.2, 5.0]), torch.tensor([0.9, 5.0]), "one")
    other = Scale(METRICS, torch.tensor([0.1, 6.0]), torch.tensor([0.8, 6.0]), "other")
    both = Scale.common([one, other], "both")
    assert both.point.tolist() == pytest.approx([0.1, 6.0])
    assert both.best.tolist() == pytest.approx([0.9, 5.0])
    assert both.rangeless == ("down",), "that runs differ from each other is no range"
    assert both.rule == "both"


# --- what never varied


def test_only_metrics_that_varied_can_be_traded() -> None:
    Y = ORDINARY.Y.clone()
    Y[:, 1] = 0.1 + 0.2
    Y[2, 1] = 0.3
    failed = Observations.failed(torch.tensor([A]), METRICS, "boom")
    data = replace(ORDINARY, Y=Y).append(failed)
    assert varied_metrics(data).tolist() == [True, False]
    Y[:, 0] = 1.0
    assert varied_metrics(replace(ORDINARY, Y=Y)).tolist() == [True, True], "none: all count"
    assert varied_metrics(Observations.empty(2, METRICS)).tolist() == [True, True]


def test_widths_are_those_of_what_varies() -> None:
    low = torch.tensor([0.0, 1e9, 0.0, 1e-12], dtype=torch.float64)
    high = torch.tensor([2.0, 1e9 + 1e-3, 0.0, 3e-12], dtype=torch.float64)
    assert widths(low, high).tolist() == pytest.approx([2.0, 1.0, 1.0, 2e-12])


# --- points


def test_anchors_are_matched_within_a_billionth_of_the_range_and_no_further() -> None:
    space = CoefficientSpace(("a", "b"), (0.0, -1.0), (1.0, 99.0))
    X = torch.tensor(
        [BASE, [1.0 + 0.9e-9, 90e-9], [1.0, 1.0], B, [1.1e-9, 0.0], BLEND], dtype=torch.float64
    )
    rows = anchor_rows(X, space)
    assert space.anchors().names == ("base", "a", "b", "uniform blend")
    assert rows.nonzero().tolist() == [[0, 0], [1, 1], [2, 3], [3, 5]]
    assert anchor_rows(X[:0], space).shape == (4, 0)


def test_the_tolerance_of_points_can_be_wider() -> None:
    X = torch.tensor([[0.2, 0.2], [0.25, 0.2]], dtype=torch.float64)
    assert same_points(X, X, SPACE).tolist() == [[True, False], [False, True]]
    assert bool(same_points(X, X, SPACE, tolerance=0.06).all())


# --- farthest rows


def by_hand(gains: Tensor, count: int, first: list[int]) -> list[int]:
    """The definition, in exact order: the row whose nearest taken row is farthest."""
    rows = list(dict.fromkeys(first))[:count] or [int(gains.amin(-1).argmax())]
    while len(rows) < min(count, len(gains)):
        left = [i for i in range(len(gains)) if i not in rows]
        rows.append(max(left, key=lambda i: (min(math.dist(gains[i], gains[j]) for j in rows), -i)))
    return rows


@given(
    k=st.integers(1, 9),
    m=st.integers(1, 3),
    count=st.integers(1, 12),
    first=st.lists(st.integers(0, 8), max_size=3),
    seed=st.integers(0, 999),
)
def test_farthest_rows_are_those_of_the_definition(
    k: int, m: int, count: int, first: list[int], seed: int
) -> None:
    gains = torch.rand(k, m, generator=make_generator(seed), dtype=torch.float64)
    first = [row for row in first if row < k]
    rows = farthest_rows(gains, count, first=first)
    assert rows == by_hand(gains, count, first)
    assert len(set(rows)) == len(rows) == min(count, k)


@settings(max_examples=25)
@given(count=st.integers(2, 4), seed=st.integers(0, 999))
def test_they_cover_at_most_twice_as_wide_as_the_best_choice(count: int, seed: int) -> None:
    gains = torch.rand(9, 2, generator=make_generator(seed), dtype=torch.float64)
    distance = torch.cdist(gains, gains)

    def radius(rows: Sequence[int]) -> float:
        return float(distance[:, list(rows)].amin(-1).max())

    best = min(radius(rows) for rows in itertools.combinations(range(9), count))
    assert radius(farthest_rows(gains, count)) <= 2 * best + 1e-12


def test_equal_rows_are_taken_once_each() -> None:
    gains = torch.zeros(4, 2, dtype=torch.float64)
    assert farthest_rows(gains, 3) == [0, 1, 2]
    assert farthest_rows(gains, 9, first=[2, 2]) == [2, 0, 1, 3]
    assert farthest_rows(gains, 0) == farthest_rows(gains[:0], 3) == []
    assert farthest_rows(gains, 1, first=[3, 1]) == [3]


# --- one home


ELSEWHERE = [
    path
    for path in sorted((Path(__file__).parents[1] / "map_bo").rglob("*.py"))
    if path.name != "scale.py"
]


def value_of(node: ast.expr | None) -> float | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    return None


def own_ways(tree: ast.AST) -> list[str]:
    """What a module does by itself that :mod:`map_bo.scale` does for all.

    Comparing within an absolute tolerance as small as that of one point, a constant of that
    size under the name of sameness, and loops that take the farthest row of those left.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            given = {word.arg: value_of(word.value) for word in node.keywords}
            least = given.get("atol")
            if name in ("allclose", "isclose") and given.get("rtol") == 0.0 and least is not None:
                found += ["a tolerance of its own"] * (least <= 10 * SAME_POINT)
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            size = value_of(node.value)
            if any("SAME" in name.upper() for name in names) and size is not None:
                found += ["a constant of its own"] * (size <= 10 * SAME_POINT)
        elif isinstance(node, ast.While | ast.For):
            calls = {
                inner.func.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)
            }
            # A loop that appends the argmax of distances: the farthest-point rule again.
            if {"argmax", "append"} <= calls and calls & {"cdist", "norm", "square"}:
                found.append("a choice of the farthest rows of its own")
    return found


@pytest.mark.parametrize(
    ("code", "ways"),
    [
        ("torch.allclose(x, anchor, rtol=0.0, atol=1e-9)", 1),
        ("torch.allclose(x, row, rtol=0.0, atol=1e-6)", 0),
        ("_SAME = 1e-9", 1),
        ("_SAME = 0.01", 0),
        ("while left:\n    rows.append(int(d.argmax()))\n    d = torch.cdist(X, X[rows])", 1),
        ("for x in X:\n    rows.append(int(d.argmax()))", 0),
    ],
)
def test_the_search_for_own_ways_finds_them(code: str, ways: int) -> None:
    assert len(own_ways(ast.parse(code))) == ways


def test_no_other_module_matches_points_or_takes_farthest_rows_by_itself() -> None:
    found = {path.name: own_ways(ast.parse(path.read_text())) for path in ELSEWHERE}
    assert {name: ways for name, ways in found.items() if ways} == {}
