from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.pareto.dominance import dominates, non_dominated
from map_bo.problems.problem import Problem
from map_bo.problems.synthetic import ConcaveQuadratics, MultiBump, SigmoidQuadratics
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**20)
Known = ConcaveQuadratics | SigmoidQuadratics | MultiBump


class TestConcaveQuadraticsContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return ConcaveQuadratics(3, 2)


class TestNoisyConcaveQuadraticsContract(ProblemContract):
    noise_free = False

    @pytest.fixture
    def problem(self) -> Problem:
        return ConcaveQuadratics(2, 3, noise=0.1)


class TestSigmoidQuadraticsContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return SigmoidQuadratics(2, 3)


class TestCountedSigmoidQuadraticsContract(ProblemContract):
    noise_free = False

    @pytest.fixture
    def problem(self) -> Problem:
        return SigmoidQuadratics(2, 3, count=50)


class TestMultiBumpContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return MultiBump(2, 2)


class TestNoisyMultiBumpContract(ProblemContract):
    noise_free = False

    @pytest.fixture
    def problem(self) -> Problem:
        return MultiBump(2, 2, noise=0.05)


def everywhere(problem: Known, n: int = 4000) -> Tensor:
    return problem.space.sample(n, generator=make_generator(5))


@given(d=sizes, m=sizes, seed=seeds, conditioning=st.floats(1, 20))
def test_the_pareto_set_lies_inside_the_cube(
    d: int, m: int, seed: int, conditioning: float
) -> None:
    problem = ConcaveQuadratics(d, m, seed, conditioning=conditioning)
    found = problem.pareto_set(300, generator=make_generator(seed))
    assert found.shape == (300, d)
    assert bool(problem.space.contains(found).all())
    assert bool(((found > 0.05) & (found < 0.95)).all())


@given(d=sizes, m=sizes, seed=seeds)
def test_no_point_dominates_the_pareto_set(d: int, m: int, seed: int) -> None:
    problem = ConcaveQuadratics(d, m, seed)
    front = problem.pareto_front(40, generator=make_generator(seed))
    others = problem.true_values(everywhere(problem, 1500))
    better = dominates(others.unsqueeze(1), front.unsqueeze(0) + 1e-9)
    assert not bool(better.any())


@given(d=sizes, m=sizes, seed=seeds)
def test_some_point_of_the_pareto_set_is_at_least_as_good_as_any_point_for_its_weights(
    d: int, m: int, seed: int
) -> None:
    problem = ConcaveQuadratics(d, m, seed)
    weights = torch.rand(6, m, generator=make_generator(seed), dtype=torch.float64) + 0.01
    best = problem.true_values(problem._optima(weights, problem.centres))
    others = problem.true_values(everywhere(problem, 1500))
    assert bool(((weights * best).sum(-1) >= (others @ weights.T).amax(0) - 1e-9).all())


def test_isotropic_quadratics_have_the_hull_of_their_centres_as_pareto_set() -> None:
    problem = ConcaveQuadratics(5, 3, conditioning=1)
    found = problem.pareto_set(100, generator=make_generator(0))
    # Barycentric coordinates with respect to the three centres.
    corners = torch.cat([problem.centres.T, torch.ones(1, 3, dtype=torch.float64)])
    target = torch.cat([found.T, torch.ones(1, 100, dtype=torch.float64)])
    shares = torch.linalg.lstsq(corners, target).solution
    torch.testing.assert_close(corners @ shares, target)
    assert bool((shares > -1e-9).all())


def test_the_centres_come_first_and_are_best_at_one() -> None:
    problem = ConcaveQuadratics(4, 3)
    found = problem.pareto_set(10, generator=make_generator(0))
    torch.testing.assert_close(found[:3], problem.centres)
    front = problem.pareto_front(10, generator=make_generator(0))
    torch.testing.assert_close(front[:3].diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(front.max()) <= 1 + 1e-12


def test_conditioning_is_the_ratio_of_eigenvalues() -> None:
    values = torch.linalg.eigvalsh(ConcaveQuadratics(4, 3, conditioning=9.0).curvatures)
    torch.testing.assert_close(values[:, -1] / values[:, 0], torch.full_like(values[:, 0], 9.0))


def test_settings_alone_make_the_function() -> None:
    X = everywhere(ConcaveQuadratics(), 10)
    first = ConcaveQuadratics(seed=4).true_values(X)
    assert torch.equal(first, ConcaveQuadratics(seed=4, noise=0.3).true_values(X))
    assert not torch.equal(first, ConcaveQuadratics(seed=5).true_values(X))


@pytest.mark.parametrize("problem", [ConcaveQuadratics(2, 2, noise=0.2), MultiBump(noise=0.2)])
def test_noise_is_known_and_as_large_as_announced(problem: Known) -> None:
    X = everywhere(problem)
    seen = problem.evaluate(X, generator=make_generator(1))
    assert bool((seen.Yvar == 0.2**2).all())
    gap = seen.Y - problem.true_values(X)
    assert abs(float(gap.std()) - 0.2) < 0.01
    assert abs(float(gap.mean())) < 0.01


def test_exact_values_have_no_variance() -> None:
    X = everywhere(MultiBump(), 5)
    for problem in (ConcaveQuadratics(2, 2), SigmoidQuadratics(2, 2), MultiBump()):
        seen = problem.evaluate(X, generator=make_generator(1))
        assert torch.equal(seen.Y, problem.true_values(X))
        assert bool((seen.Yvar == 0).all())
        assert bool(torch.isnan(seen.counts).all())


def test_the_sigmoid_keeps_the_pareto_set() -> None:
    problem = SigmoidQuadratics(3, 3, seed=2)
    quadratics = ConcaveQuadratics(3, 3, seed=2)
    found = problem.pareto_set(50, generator=make_generator(0))
    assert torch.equal(found, quadratics.pareto_set(50, generator=make_generator(0)))
    X = everywhere(problem)
    assert torch.equal(
        non_dominated(problem.true_values(X)), non_dominated(quadratics.true_values(X))
    )
    front = problem.pareto_front(50, generator=make_generator(0))
    torch.testing.assert_close(front, problem.true_values(found))
    assert float(front.max()) == pytest.approx(1 / (1 + math.exp(-2)))
    assert all(metric == Metric(f"f{i + 1}") for i, metric in enumerate(problem.metrics))


def test_counted_proportions_are_binomial() -> None:
    problem = SigmoidQuadratics(2, 2, count=40)
    X = torch.full((3000, 2), 0.5, dtype=torch.float64)
    seen = problem.evaluate(X, generator=make_generator(0))
    truth = problem.true_values(X)
    assert bool((seen.counts == 40).all())
    torch.testing.assert_close((seen.Y * 40).round(), seen.Y * 40)
    torch.testing.assert_close(seen.Y.mean(0), truth[0], atol=0.01, rtol=0)
    torch.testing.assert_close(seen.Y.var(0), truth[0] * (1 - truth[0]) / 40, atol=3e-4, rtol=0.1)
    torch.testing.assert_close(seen.Yvar.mean(0), seen.Y.var(0), rtol=0.15, atol=0)


def test_the_variance_of_a_count_is_never_zero() -> None:
    problem = SigmoidQuadratics(2, 2, count=1)
    seen = problem.evaluate(everywhere(problem, 50), generator=make_generator(0))
    assert set(seen.Y.flatten().tolist()) == {0.0, 1.0}
    assert bool((seen.Yvar > 0).all())


def test_bumps_peak_at_their_centres() -> None:
    problem = MultiBump(2, 2, bumps=1)
    peaks = problem.true_values(problem.centres[:, 0])
    torch.testing.assert_close(peaks.diagonal(), torch.ones(2, dtype=torch.float64))
    shifted = problem.true_values(problem.centres[:, 0] + torch.tensor([0.2, 0.0]))
    expected = torch.full((2,), math.exp(-0.5), dtype=torch.float64)
    torch.testing.assert_close(shifted.diagonal(), expected, rtol=1e-5, atol=0)


def test_bumps_have_several_local_optima() -> None:
    problem = MultiBump(1, 1, seed=1, width=0.05)
    line = problem.true_values(torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None])[:, 0]
    peaks = (line[1:-1] > line[:-2]) & (line[1:-1] > line[2:])
    assert int(peaks.sum()) > 1


def test_the_dense_front_is_not_dominated_by_a_fine_grid() -> None:
    problem = MultiBump(2, 2, seed=3)
    X, Y = problem.dense_front
    torch.testing.assert_close(problem.true_values(X), Y)
    assert bool(problem.space.contains(X).all())
    assert bool(non_dominated(Y).all())
    axis = torch.linspace(0, 1, 400, dtype=torch.float64)
    grid = problem.true_values(torch.cartesian_prod(axis, axis))
    grid = grid[non_dominated(grid)]
    assert not bool(dominates(grid.unsqueeze(1), Y.unsqueeze(0) + 1e-5).any())
    # And it covers the grid's front: nothing on that is better than all of it by much.
    shortfall = (grid.unsqueeze(1) - Y.unsqueeze(0)).amax(-1).amin(-1)
    assert float(shortfall.max()) < 1e-3


def test_the_dense_front_is_the_same_every_time_and_searched_once() -> None:
    problem = MultiBump(1, 2, seed=7)
    assert torch.equal(problem.dense_front[0], MultiBump(1, 2, seed=7).dense_front[0])
    assert problem.dense_front is problem.dense_front


def test_bump_fronts_are_random_parts_of_the_dense_front() -> None:
    problem = MultiBump(1, 2)
    found = problem.pareto_set(20, generator=make_generator(0))
    assert found.shape == (20, 1)
    assert bool((torch.cdist(found, problem.dense_front[0]).amin(-1) == 0).all())
    front = problem.pareto_front(20, generator=make_generator(0))
    torch.testing.assert_close(front, problem.true_values(found))
    everything = problem.pareto_set(10**6, generator=make_generator(0))
    assert len(everything) == len(problem.dense_front[0])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ConcaveQuadratics, {"d": 0}, "d must .* got 0"),
        (ConcaveQuadratics, {"m": 0}, "m must .* got 0"),
        (ConcaveQuadratics, {"noise": -1.0}, "noise must .* got -1.0"),
        (ConcaveQuadratics, {"noise": math.inf}, "noise must .* got inf"),
        (ConcaveQuadratics, {"conditioning": 0.5}, "conditioning must .* got 0.5"),
        (SigmoidQuadratics, {"d": 0}, "d must .* got 0"),
        (SigmoidQuadratics, {"count": 0}, "count must .* got 0"),
        (SigmoidQuadratics, {"conditioning": math.inf}, "conditioning must .* got inf"),
        (MultiBump, {"m": -1}, "m must .* got -1"),
        (MultiBump, {"bumps": 0}, "bumps must .* got 0"),
        (MultiBump, {"width": 0.0}, "width must .* got 0.0"),
        (MultiBump, {"noise": math.nan}, "noise must .* got nan"),
    ],
)
def test_impossible_settings_are_refused(
    kind: type[Known], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        kind(**settings)
