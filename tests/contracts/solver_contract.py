"""What every front solver must do, whatever its method."""

from __future__ import annotations

import base64
import pickle
import random
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from map_bo.errors import SurrogateError
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.indicators import hypervolume
from map_bo.pareto.solver import FrontSolver
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace

SPACES = {
    "box": CoefficientSpace.box("abc"),
    "wide box": CoefficientSpace(tuple("abc"), (-3.0, 0.0, 0.5), (3.0, 0.1, 2.0)),
    "fixed": CoefficientSpace(tuple("abc"), (0.0, 0.4, 0.0), (1.0, 0.4, 1.0)),
    "bounded sum": CoefficientSpace.box("abc", sum_at_most=0.8),
    "simplex": CoefficientSpace.box("abc", simplex=True),
    "blocks": CoefficientSpace.box("abc", blocks=("lower", "upper"), sum_at_most=1.0),
    "one coefficient": CoefficientSpace.box("a"),
}


def peaks(space: CoefficientSpace, m: int) -> Callable[[Tensor], Tensor]:
    """Concave quadratics with known maxima: the ``m`` corners of the box that lie nearest 1."""
    corners = torch.eye(max(m, space.d), dtype=torch.float64)[:m, : space.d]
    targets = space.normalise(space.unnormalise(corners))

    def mean(X: Tensor) -> Tensor:
        return -(space.normalise(X).unsqueeze(-2) - targets).square().sum(-1)

    return mean


def solve(solver: FrontSolver, space: CoefficientSpace, m: int, seed: int = 0) -> Tensor:
    return solver.solve(peaks(space, m), space, generator=make_generator(seed))


IN_A_FRESH_PROCESS = """
import base64, pickle, sys, torch
torch.set_num_threads(int(sys.argv[2]))
from tests.contracts.solver_contract import SPACES, solve
solver = pickle.loads(base64.b64decode(sys.argv[1]))
front = solve(solver, SPACES["bounded sum"], 3, seed=5)
print(base64.b64encode(pickle.dumps(front.tolist())).decode())
"""


class SolverContract:
    """Inherit, and override ``solver`` and ``most``."""

    @pytest.fixture
    def solver(self) -> FrontSolver:
        raise NotImplementedError

    @pytest.fixture
    def most(self) -> int:
        """Largest number of points that ``solver`` may return."""
        raise NotImplementedError

    def test_follows_the_protocol(self, solver: FrontSolver) -> None:
        assert isinstance(solver, FrontSolver)

    @pytest.mark.parametrize("name", SPACES)
    def test_returns_distinct_non_dominated_points_of_the_space(
        self, solver: FrontSolver, most: int, name: str
    ) -> None:
        space = SPACES[name]
        X = solve(solver, space, 3)
        assert X.dtype == torch.float64
        assert X.shape[-1] == space.d
        assert 1 <= len(X) <= most
        assert space.contains(X).all()
        assert len(torch.unique(X, dim=0)) == len(X)
        assert non_dominated(peaks(space, 3)(X)).all()

    def test_the_front_of_two_concave_quadratics_is_the_segment_between_them(
        self, solver: FrontSolver
    ) -> None:
        space = SPACES["box"]
        X = solve(solver, space, 2)
        # Maxima at (1, 0, 0) and (0, 1, 0).
        assert (X[:, 0] + X[:, 1] - 1).abs().mean() < 0.1
        assert X[:, 2].abs().mean() < 0.05
        assert X[:, 0].max() > 0.95
        assert X[:, 0].min() < 0.05
        # At (t, 1 - t, 0) the values are (-2 (1 - t)^2, -2 t^2). Beyond (-2, -2) that covers the
        # integral of (2 - 2 t^2) 4 (1 - t) over t from 0 to 1, which is 10 / 3.
        reference = torch.full((2,), -2.0, dtype=torch.float64)
        assert hypervolume(peaks(space, 2)(X), reference) == pytest.approx(10 / 3, rel=0.03)

    def test_the_front_on_the_simplex_nears_its_corners(self, solver: FrontSolver) -> None:
        X = solve(solver, SPACES["simplex"], 3)
        assert torch.allclose(X.sum(-1), torch.ones(len(X), dtype=torch.float64), atol=1e-6)
        assert (X.amax(0) > 0.75).all()

    def test_the_same_seed_gives_the_same_front(self, solver: FrontSolver) -> None:
        space = SPACES["bounded sum"]
        first = solve(solver, space, 3, seed=5)
        assert torch.equal(first, solve(solver, space, 3, seed=5))
        other = solve(solver, space, 3, seed=6)
        assert first.shape != other.shape or not torch.equal(first, other)

    @pytest.mark.slow
    def test_a_fresh_process_gives_the_same_front(self, solver: FrontSolver) -> None:
        # Other numbers of threads may end in other digits.
        given = base64.b64encode(pickle.dumps(solver)), str(torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-c", IN_A_FRESH_PROCESS, *given],
            capture_output=True,
            text=True,
            check=True,
        )
        theirs = torch.tensor(pickle.loads(base64.b64decode(done.stdout)), dtype=torch.float64)
        ours = solve(solver, SPACES["bounded sum"], 3, seed=5)
        assert theirs.shape == ours.shape
        assert torch.allclose(theirs, ours, rtol=0, atol=1e-12)

    def test_global_random_state_and_the_generator_stay_as_they_were(
        self, solver: FrontSolver, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generator = make_generator(3)
        before = (
            torch.get_rng_state(),
            generator.get_state(),
            str(np.random.get_state()),  # noqa: NPY002 - read to see that it is untouched
            random.getstate(),
        )
        solver.solve(peaks(SPACES["box"], 2), SPACES["box"], generator=generator)
        assert torch.equal(before[0], torch.get_rng_state())
        assert torch.equal(before[1], generator.get_state())
        assert before[2] == str(np.random.get_state())  # noqa: NPY002
        assert before[3] == random.getstate()
        assert capsys.readouterr().out == ""

    def test_a_single_metric_gives_its_maximiser(self, solver: FrontSolver) -> None:
        space = SPACES["box"]
        target = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)

        def mean(X: Tensor) -> Tensor:
            return -(X - target).square().sum(-1, keepdim=True)

        X = solver.solve(mean, space, generator=make_generator(0))
        assert X.shape == (1, 3)
        assert torch.allclose(X[0], target, atol=0.05)

    def test_constant_metrics_do_no_harm(self, solver: FrontSolver) -> None:
        space = SPACES["box"]

        def half(X: Tensor) -> Tensor:
            return torch.cat([peaks(space, 2)(X), torch.full((len(X), 1), 0.5)], -1)

        def wholly(X: Tensor) -> Tensor:
            return torch.full((len(X), 2), 0.5, dtype=torch.float64)

        X = solver.solve(half, space, generator=make_generator(0))
        assert len(X) > 5
        assert torch.isfinite(X).all()
        assert non_dominated(half(X)).all()
        assert solver.solve(wholly, space, generator=make_generator(0)).shape == (1, 3)

    def test_many_metrics(self, solver: FrontSolver, most: int) -> None:
        space = CoefficientSpace.box([f"e{i}" for i in range(12)])
        X = solve(solver, space, 12)
        assert 5 < len(X) <= most
        assert space.contains(X).all()
        assert non_dominated(peaks(space, 12)(X)).all()

    def test_predictions_that_are_nan_are_refused(self, solver: FrontSolver) -> None:
        def mean(X: Tensor) -> Tensor:
            return torch.full((len(X), 2), torch.nan, dtype=torch.float64)

        with pytest.raises(SurrogateError, match="NaN or infinite"):
            solver.solve(mean, SPACES["box"], generator=make_generator(0))
