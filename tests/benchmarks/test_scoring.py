"""Measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality.scoring import (
    Known,
    attained,
    best_attained,
    choices,
    coverage,
    front_of,
    measures,
    representatives,
    weights_of,
)
from map_bo.pareto.gradient import thin
from map_bo.pareto.indicators import hypervolume
from map_bo.rng import make_generator

WEIGHTS = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]).double()


def points(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_choices_are_made_by_prediction_and_pay_what_is_real() -> None:
    predicted = points((1.0, 0.0), (0.6, 0.7), (0.0, 1.0))
    real = points((0.5, 0.1), (0.4, 0.4), (0.2, 0.9))
    rows = choices(predicted, WEIGHTS)
    assert rows.tolist() == [0, 1, 2]
    assert attained(real[rows], WEIGHTS).tolist() == pytest.approx([0.5, 0.4, 0.9])
    assert best_attained(real, WEIGHTS).tolist() == pytest.approx([0.5, 0.55, 0.9])


def test_measures_by_hand() -> None:
    predicted, real = points((1.0, 0.5), (0.5, 1.0)), points((0.8, 0.5), (0.5, 0.8))
    chosen = real[choices(predicted, WEIGHTS)]
    found = measures(predicted, real, chosen, None, WEIGHTS)
    # Two rectangles of .4 that share the square of .25.
    assert found["hypervolume"] == pytest.approx(0.8 * 0.5 + 0.5 * 0.8 - 0.25)
    assert found["exact"] == 1
    assert found["utility"] == pytest.approx((0.8 + 0.65 + 0.8) / 3)
    assert found["optimism"] == pytest.approx((0.2 + 0 + 0 + 0.2) / 4)
    assert "utility_solved" not in found
    better = measures(predicted, real, chosen, chosen + 0.1, WEIGHTS)
    assert better["utility_solved"] == pytest.approx(found["utility"] + 0.1)


def test_points_behind_the_reference_have_no_hypervolume() -> None:
    real = points((-0.1, 2.0), (2.0, -0.1))
    assert measures(real, real, real[[0, 0, 0]], None, WEIGHTS)["hypervolume"] == 0


def test_coverage_counts_metrics_and_points() -> None:
    real, zero = points((0.5, 0.5), (0.0, 2.0)), torch.zeros(2, 2).double()
    assert coverage(real, zero, zero + 1) == pytest.approx(0.75)


def test_regret_share_and_distance_to_the_best_known() -> None:
    known = Known(2.0, {3: torch.tensor([1.0, 2.0]).double()}, points((1.0, 1.0)))
    assert known.share(1.5) == 0.75
    assert known.regret(3, 1.2) == pytest.approx(0.3)
    assert known.regret(3, 1.5 + 1e-9) == 0
    assert known.distance(points((0.4, 1.0))) == pytest.approx(0.6)
    assert known.distance(points((2.0, 2.0))) == 0
    assert Known(0.0, {}).share(0.0) == 1
    assert Known(1.0, {}).distance(points((1.0, 1.0))) is None


def test_weights_depend_on_the_seed_alone() -> None:
    assert torch.equal(weights_of(2, 3), weights_of(2, 3))
    assert not torch.equal(weights_of(2, 3), weights_of(1, 3))
    assert weights_of(0, 3).sum(-1).tolist() == pytest.approx([1.0] * 60)


def test_representatives_keep_the_hypervolume() -> None:
    source = make_generator(0)
    sphere = torch.randn(400, 6, generator=source, dtype=torch.float64).abs()
    sphere = sphere / sphere.norm(dim=-1, keepdim=True)
    zero = torch.zeros(6).double()
    rows = representatives(sphere, 60)
    assert len(set(rows.tolist())) == 60
    kept, whole = hypervolume(sphere[rows], zero), hypervolume(sphere, zero)
    assert kept > (1 - 1 / math.e) * whole
    assert kept > 1.1 * hypervolume(thin(sphere, sphere, 60), zero)
    assert representatives(sphere[:7]).tolist() == list(range(7))


def test_the_first_representative_is_the_largest_box() -> None:
    front = points((1.0, 0.1), (0.7, 0.7), (0.1, 1.0), (0.72, 0.6))
    assert representatives(front, 1).tolist() == [1]
    assert representatives(front, 3).tolist() == [0, 1, 2]


def test_what_is_behind_the_reference_is_taken_last() -> None:
    behind = points(*((-0.01 * i, 1.0 + 0.01 * i) for i in range(20)))
    rows = representatives(torch.cat([behind, points((0.5, 0.5), (0.6, 0.4))]), 5)
    assert {20, 21} <= set(rows.tolist())
    assert len(set(rows.tolist())) == 5
    assert len(set(representatives(behind, 5).tolist())) == 5


def test_the_best_known_front_joins_parts() -> None:
    found = front_of([points((1.0, 0.0), (0.5, 0.5)), points((0.0, 0.4), (0.6, 0.6), (0.6, 0.6))])
    assert sorted(found.tolist()) == [[0.6, 0.6], [1.0, 0.0]]
