"""What every problem keeps to; an implementation overrides `problem` and inherits the tests."""

from __future__ import annotations

import json
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SpaceError
from map_bo.loop.identity import problem_identity
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator


def same(a: Observations, b: Observations) -> bool:
    """Return whether two observations are equal in everything but their cost."""
    pairs = ((a.X, b.X), (a.Y, b.Y), (a.Yvar, b.Yvar), (a.counts, b.counts))
    alike = all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in pairs)
    return alike and a.failures == b.failures and a.metrics == b.metrics


def global_random_state() -> tuple[object, ...]:
    """Return the global random states of torch, numpy and Python, to be compared."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - to see that nobody drew from it
    return torch.get_rng_state().tolist(), repr(legacy), random.getstate()


class ProblemContract:
    """Override `problem`; override `points` where not every point can be evaluated."""

    noise_free: ClassVar[bool] = True

    @pytest.fixture
    def problem(self) -> Problem:
        raise NotImplementedError

    @pytest.fixture
    def points(self, problem: Problem) -> Tensor:
        """Five points that the problem can evaluate."""
        return problem.space.sample(5, generator=make_generator(11))

    def test_is_a_problem(self, problem: Problem) -> None:
        assert isinstance(problem, Problem)

    def test_metrics_are_a_tuple_with_unique_names(self, problem: Problem) -> None:
        assert isinstance(problem.metrics, tuple)
        assert problem.metrics
        assert all(isinstance(metric, Metric) for metric in problem.metrics)
        names = [metric.name for metric in problem.metrics]
        assert len(set(names)) == len(names)

    def test_space_and_metrics_stay_the_same(self, problem: Problem, points: Tensor) -> None:
        before = problem.space.describe(), problem.metrics
        problem.evaluate(points, generator=make_generator(0))
        assert (problem.space.describe(), problem.metrics) == before

    def test_returns_one_row_a_point_and_one_column_a_metric(
        self, problem: Problem, points: Tensor
    ) -> None:
        seen = problem.evaluate(points, generator=make_generator(0))
        assert torch.equal(seen.X, points)
        assert seen.Y.shape == (len(points), len(problem.metrics))
        assert seen.metrics == problem.metrics
        assert seen.Y.dtype == torch.float64

    def test_values_are_finite_and_within_the_metrics_bounds(
        self, problem: Problem, points: Tensor
    ) -> None:
        seen = problem.evaluate(points, generator=make_generator(0)).succeeded()
        assert len(seen) == len(points)
        for column, metric in zip(seen.Y.T, problem.metrics, strict=True):
            assert bool(torch.isfinite(column).all())
            assert metric.lower is None or bool((column >= metric.lower).all())
            assert metric.upper is None or bool((column <= metric.upper).all())

    def test_the_same_generator_measures_the_same(self, problem: Problem, points: Tensor) -> None:
        first = problem.evaluate(points, generator=make_generator(3))
        assert same(first, problem.evaluate(points, generator=make_generator(3)))

    def test_noise_is_there_exactly_when_announced(self, problem: Problem, points: Tensor) -> None:
        first = problem.evaluate(points, generator=make_generator(3))
        second = problem.evaluate(points, generator=make_generator(4))
        assert same(first, second) == self.noise_free

    def test_rows_do_not_influence_each_other(self, problem: Problem, points: Tensor) -> None:
        if not self.noise_free:
            pytest.skip("the noise of a row depends on where it stands")
        together = problem.evaluate(points, generator=make_generator(0))
        for i in reversed(range(len(points))):
            alone = problem.evaluate(points[i : i + 1], generator=make_generator(0))
            torch.testing.assert_close(alone.Y[0], together.Y[i], rtol=1e-6, atol=1e-6)
            assert alone.failures == together.failures[i : i + 1]

    def test_global_random_state_and_default_dtype_are_left_alone(
        self, problem: Problem, points: Tensor
    ) -> None:
        before, dtype = global_random_state(), torch.get_default_dtype()
        problem.evaluate(points, generator=make_generator(0))
        assert global_random_state() == before
        assert torch.get_default_dtype() == dtype

    def test_no_points_give_no_rows(self, problem: Problem) -> None:
        nothing = torch.zeros(0, problem.space.d, dtype=torch.float64)
        seen = problem.evaluate(nothing, generator=make_generator(0))
        assert len(seen) == 0
        assert seen.metrics == problem.metrics

    def test_refuses_points_outside_the_space(self, problem: Problem) -> None:
        outside = problem.space.bounds[1:] + 0.5
        with pytest.raises(SpaceError, match="1 of 1 rows leave the space"):
            problem.evaluate(outside, generator=make_generator(0))

    def test_refuses_points_of_another_width(self, problem: Problem) -> None:
        wide = torch.zeros(2, problem.space.d + 1)
        with pytest.raises(SpaceError, match="coefficients have shape"):
            problem.evaluate(wide, generator=make_generator(0))

    def test_describes_itself_as_plain_data(self, problem: Problem) -> None:
        described = problem_identity(problem)
        assert json.loads(json.dumps(described)) == described
        assert described == problem_identity(problem) != {"type": type(problem).__name__}
