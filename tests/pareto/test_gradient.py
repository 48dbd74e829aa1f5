from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import ConfigError
from map_bo.pareto.dominance import dominates, non_dominated
from map_bo.pareto.evolution import NSGA2
from map_bo.pareto.gradient import GradientSolver, simplex_directions, thin
from map_bo.pareto.indicators import hypervolume
from map_bo.pareto.solver import FrontSolver
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.contracts.solver_contract import SPACES, SolverContract, solve


class TestGradientSolver(SolverContract):
    @pytest.fixture
    def solver(self) -> FrontSolver:
        return GradientSolver(points=60)

    @pytest.fixture
    def most(self) -> int:
        return 60


@pytest.mark.parametrize("name", ["points", "steps", "learning_rate", "starts", "surplus"])
def test_settings_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        GradientSolver(**{name: 0})


def test_returns_as_many_points_as_asked_for() -> None:
    space = CoefficientSpace.box("abc")
    X = GradientSolver(points=200).solve(_conflict(3), space, generator=make_generator(1))
    assert len(X) == 200


def test_one_point_is_enough() -> None:
    space = CoefficientSpace.box("abc")
    X = GradientSolver(points=1).solve(_conflict(3), space, generator=make_generator(1))
    assert len(X) == 1


@pytest.mark.parametrize("m", [3, 8])
def test_covers_more_than_evolution_with_the_same_evaluations(m: int) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(m)])
    asked = 0
    mean = _conflict(m)

    def counted(X: Tensor) -> Tensor:
        nonlocal asked
        asked += len(X)
        return mean(X)

    ours = GradientSolver(points=60, steps=50).solve(counted, space, generator=make_generator(1))
    rival = NSGA2(population=60, generations=-(-asked // 60))
    theirs = rival.solve(mean, space, generator=make_generator(1))
    reference = torch.zeros(m, dtype=torch.float64)
    assert hypervolume(mean(ours), reference) > hypervolume(mean(theirs), reference)


def test_the_front_is_exact_where_it_is_known() -> None:
    X = solve(GradientSolver(points=60), SPACES["box"], 2)
    assert torch.allclose(X[:, 0] + X[:, 1], torch.ones(60, dtype=torch.float64), atol=1e-2)
    assert X[:, 2].max() < 1e-6
    on_simplex = solve(GradientSolver(points=60), SPACES["simplex"], 3)
    assert (on_simplex.amax(0) > 0.999).all()


def test_escapes_local_optima() -> None:
    # Two hills for each metric; the lower ones, around (.1, .9) and (.9, .1), cover far more
    # ground, so that most starts are on their slopes.
    space = CoefficientSpace.box("ab")
    high = torch.tensor([[0.85, 0.7], [0.7, 0.85]], dtype=torch.float64)
    low = torch.tensor([[0.1, 0.9], [0.9, 0.1]], dtype=torch.float64)

    def mean(X: Tensor) -> Tensor:
        Z = X.unsqueeze(-2)
        sharp = torch.exp(-(Z - high).square().sum(-1) / 0.02)
        return sharp + 0.3 * torch.exp(-(Z - low).square().sum(-1) / 0.3)

    X = GradientSolver(points=50).solve(mean, space, generator=make_generator(0))
    Y = mean(X)
    assert Y.amax(0).min() > 1.0
    best = torch.rand(20000, 2, generator=make_generator(1), dtype=torch.float64)
    reference = torch.zeros(2, dtype=torch.float64)
    assert hypervolume(Y, reference) > 0.99 * hypervolume(mean(best), reference)


def test_the_optimum_on_a_tilted_constraint_is_the_nearest_point() -> None:
    # Adam's own scaling of the coordinates must not move the optimum along the constraint: with
    # curvatures 1, 10 and 100 the constrained optimum is far from the projected free one.
    space = CoefficientSpace.box("abc", simplex=True)
    curvature = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    target = torch.full((3,), 0.9, dtype=torch.float64)

    def mean(X: Tensor) -> Tensor:
        return -(curvature * (X - target).square()).sum(-1, keepdim=True)

    X = GradientSolver(points=5, steps=400).solve(mean, space, generator=make_generator(0))
    # Lagrange: x_i = target - multiplier / curvature_i, multiplier from the sum; x_1 hits 0.
    multiplier = (1.8 - 1.0) / (1 / 10 + 1 / 100)
    expected = torch.tensor([0.0, 0.9 - multiplier / 10, 0.9 - multiplier / 100])
    assert torch.allclose(X[0], expected.double(), atol=5e-3)


def test_rows_that_predict_nan_are_never_returned() -> None:
    space = CoefficientSpace.box("abc")
    mean = _conflict(3)

    def holed(X: Tensor) -> Tensor:
        return torch.where(X[:, :1] > 0.6, torch.nan, mean(X))

    X = GradientSolver(points=40).solve(holed, space, generator=make_generator(0))
    assert torch.isfinite(holed(X)).all()
    assert len(X) > 3


@given(n=st.integers(1, 200), m=st.integers(1, 9), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_directions_lie_on_the_simplex(n: int, m: int, seed: int) -> None:
    D = simplex_directions(n, m, seed=seed)
    assert D.shape == (n, m)
    assert (D >= 0).all()
    assert torch.allclose(D.sum(-1), torch.ones(n, dtype=torch.float64))


def test_directions_reach_corners_faces_and_the_middle() -> None:
    D = simplex_directions(400, 5, seed=0)
    assert (D.amax(0) == 1).all()
    zeros = (D == 0).sum(-1)
    assert set(range(5)) <= set(zeros.tolist())
    assert D.amin(-1).max() > 0.1


@given(n=st.integers(1, 40), points=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_thinning_keeps_the_extremes(n: int, points: int, seed: int) -> None:
    Y = torch.rand(n, 3, generator=make_generator(seed), dtype=torch.float64)
    kept = thin(Y, Y, points)
    assert len(kept) == min(n, points)
    if points >= 3:
        assert torch.equal(kept.amax(0), Y.amax(0))


def test_thinning_is_even() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64).unsqueeze(-1) ** 3  # crowded near 0
    kept = thin(t, torch.cat([t, -t], -1), 9)
    gaps = kept.flatten().sort().values.diff()
    assert gaps.max() < 0.2
    assert gaps.min() > 0.03


def test_no_random_point_dominates_the_front_by_much() -> None:
    space = CoefficientSpace.box("abcd")
    mean = _conflict(4)
    front = mean(GradientSolver(points=150).solve(mean, space, generator=make_generator(2)))
    others = mean(space.sample(3000, generator=make_generator(9)))
    assert not dominates(others.unsqueeze(1), front + 1e-3).any()
    assert non_dominated(front).all()


def _conflict(m: int) -> Callable[[Tensor], Tensor]:
    """Sigmoids of ``m`` concave quadratics, each with a maximum and a shape of its own."""
    generator = make_generator(m)
    centre = 0.25 * torch.rand(m, m, generator=generator, dtype=torch.float64)
    centre = centre + 0.6 * torch.eye(m, dtype=torch.float64)
    root = torch.randn(m, m, m, generator=generator, dtype=torch.float64) / m**0.5
    shape = root @ root.mT + 0.5 * torch.eye(m, dtype=torch.float64)

    def mean(X: Tensor) -> Tensor:
        Z = X.unsqueeze(-2) - centre
        return torch.sigmoid(2 - 3 * torch.einsum("bmi,mij,bmj->bm", Z, shape, Z))

    return mean
