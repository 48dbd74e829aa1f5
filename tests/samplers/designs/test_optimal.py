from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.optimal import (
    Criterion,
    Goal,
    OptimalDesign,
    box_moments,
    local_moves,
    optimal_design,
)
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import quadratic_features
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured


def box(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def first(sampler: Sampler, space: CoefficientSpace, n: int, seed: int = 0) -> Tensor:
    nothing = Observations.empty(space.d, METRICS)
    return sampler.propose(nothing, space, n, generator=make_generator(seed))


def log_determinant(X: Tensor) -> float:
    """Return ``log det F'F`` of a design in the unit box, without a prior."""
    F = quadratic_features(2 * X - 1)
    return float(torch.linalg.slogdet(F.mT @ F).logabsdet)


def goal(criterion: Criterion, space: CoefficientSpace) -> Goal:
    return Goal(criterion, space, box_moments(space))


class TestDOptimal(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return OptimalDesign(points=8)

    @pytest.fixture(params=["box", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


class TestIOptimal(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return OptimalDesign("i", points=6, anchors=False)

    @pytest.fixture(params=["wide", "simplex"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


def test_three_points_of_one_coefficient_are_its_ends_and_its_middle() -> None:
    X = first(OptimalDesign(anchors=False), box(1), 3)
    assert X.flatten().sort().values.tolist() == [0.0, 0.5, 1.0]


def test_six_points_of_two_coefficients_reach_the_known_optimum() -> None:
    # Box and Draper, On minimum-point second-order designs (1974): |F'F| / 6^6 = 5.74e-3.
    X = first(OptimalDesign(anchors=False), box(2), 6)
    assert math.exp(log_determinant(X)) / 6**6 == pytest.approx(5.74e-3, rel=0.015)


def test_nine_points_of_two_coefficients_are_the_factorial() -> None:
    X = first(OptimalDesign(points=9, anchors=False), box(2), 9)
    factorial = set(itertools.product((0.0, 0.5, 1.0), repeat=2))
    assert {(a, b) for a, b in X.tolist()} == factorial


@pytest.mark.parametrize(("criterion", "other"), [("d", "i"), ("i", "d")])
def test_each_criterion_is_best_at_its_own(criterion: Criterion, other: Criterion) -> None:
    space, g = box(3), goal(criterion, box(3))
    value = g.value(first(OptimalDesign(criterion, anchors=False), space, 10))
    assert value > g.value(first(OptimalDesign(other, anchors=False), space, 10))
    assert value > g.value(first(Sobol(anchors=False), space, 10))


def test_anchors_are_members_and_the_rest_goes_with_them() -> None:
    space = box(3)
    X = first(OptimalDesign(), space, 10)
    anchors = space.anchors().X
    assert torch.equal(X[:5], anchors)
    alone = first(OptimalDesign(anchors=False), space, 5)
    assert log_determinant(X) > log_determinant(torch.cat([anchors, alone])) + 0.5


@pytest.mark.parametrize("criterion", ["d", "i"])
def test_no_small_move_of_a_point_gains(criterion: Criterion) -> None:
    space, g = box(2), goal(criterion, box(2))
    X = first(OptimalDesign(criterion, points=8, anchors=False), space, 8)
    for i in range(8):
        others = torch.cat([X[:i], X[i + 1 :]])
        options = torch.cat([X[i : i + 1], local_moves(X[i], space, 0.01)])
        options = torch.cat([options[:1], options[1:][~g.near(options[1:], others)]])
        gains = g.gains(g.information(others), g.features(options))
        assert float(gains.max() - gains[0]) < 5e-5


@pytest.mark.parametrize(("criterion", "name"), [("d", "simplex"), ("i", "box"), ("d", "sum")])
def test_one_sequence_however_it_is_asked_for(criterion: Criterion, name: str) -> None:
    space, sampler = SPACES[name], OptimalDesign(criterion, points=8)
    whole = first(sampler, space, 19, seed=3)
    seen = measured(whole[:2], failed=(1,))
    for n in (1, 5, 2, 8):
        pending = whole[len(seen) : len(seen) + 1]
        X = sampler.propose(seen, space, n, pending=pending, generator=make_generator(3))
        expected = whole[len(seen) + 1 : len(seen) + 1 + n]
        assert torch.equal(X[: len(expected)], expected)
        seen = seen.append(measured(torch.cat([pending, X])[:n]))
    assert torch.equal(seen.X, whole[:18])


def test_a_remembered_design_cannot_be_changed_from_outside() -> None:
    sampler = OptimalDesign(points=8)
    X = first(sampler, SPACES["box"], 7)
    before = X.clone()
    X.zero_()
    assert torch.equal(first(sampler, SPACES["box"], 7), before)


def test_points_beyond_the_design_extend_it() -> None:
    space = box(3)
    X = first(OptimalDesign(points=8), space, 24)
    assert torch.equal(X[:8], first(OptimalDesign(points=8), space, 8))
    extended = goal("d", space).value(X)
    with_sobol = torch.cat([X[:8], first(Sobol(anchors=False), space, 16)])
    assert extended > goal("d", space).value(with_sobol) + 1.0


def test_when_no_more_points_fit_sobol_points_follow() -> None:
    space = box(1)
    X = first(OptimalDesign(), space, 40)
    assert len(torch.unique(X)) == 40
    gaps = torch.cdist(X, X).fill_diagonal_(1.0)
    assert float(gaps[:10, :10].min()) >= 0.05 - 1e-12
    assert float(gaps.min()) < 0.05


def test_the_order_is_greedy() -> None:
    g = goal("d", box(2))
    X = first(OptimalDesign(points=9, anchors=False), box(2), 9)
    for i in range(9):
        gains = g.gains(g.information(X[:i]), g.features(X[i:]))
        assert float(gains[0]) == pytest.approx(float(gains.max()), rel=1e-6)


def test_half_of_a_design_beats_half_of_a_sobol_sequence() -> None:
    space, g = box(4), goal("i", box(4))
    X = first(OptimalDesign("i"), space, 10)
    assert g.value(X) > g.value(first(Sobol(), space, 10))


def test_constraints_shape_the_i_criterion() -> None:
    space = SPACES["sum"]
    X = first(OptimalDesign("i", anchors=False, points=10), space, 10)
    assert bool((X.sum(-1) > 1.5 - 1e-9).any())


def test_large_designs_are_cut_short() -> None:
    # 33 coefficients have 595 features: exchange is not affordable, the greedy choice is.
    space = box(33)
    X = first(OptimalDesign(points=40), space, 40)
    assert torch.equal(X[:35], space.anchors().X)
    others = first(Sobol(), space, 40)
    assert goal("d", space).value(X) > goal("d", space).value(others) + 1.0


def test_as_many_as_fit_are_returned() -> None:
    found = optimal_design(goal("d", box(1)), box(1).anchors().X, 50, generator=make_generator(0))
    assert 10 < len(found) < 20


def test_settings_are_checked() -> None:
    with pytest.raises(SamplerError, match="no criterion 'a'"):
        OptimalDesign("a")  # type: ignore[arg-type]
    with pytest.raises(SamplerError, match="has 0 points"):
        OptimalDesign(points=0)
