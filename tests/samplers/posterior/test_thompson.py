from __future__ import annotations

import dataclasses

import pytest
import torch

from map_bo.errors import SamplerError
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.posterior.thompson import ThompsonFronts
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract
from tests.samplers.posterior.test_front_uncertainty import PEAKS, situation
from tests.samplers.posterior.test_scalarised import situation as of_metrics

SOLVER = GradientSolver(points=24, steps=20)


class TestFunctions(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return ThompsonFronts(Quadratic(), initial=5, solver=SOLVER, rays=32)

    @pytest.fixture(params=["box", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


class TestPool(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return ThompsonFronts(initial=5, solver=SOLVER, rays=32, pool=64, surrogate=GP())

    @pytest.fixture
    def space(self) -> CoefficientSpace:
        return SPACES["sum"]


@pytest.mark.parametrize("surrogate", [None, GP()], ids=repr)
def test_with_much_data_it_samples_the_front(surrogate: GP | None) -> None:
    # The Pareto set of two round bowls is the segment between their peaks.
    at = situation(40, surrogate)
    X = ThompsonFronts(solver=SOLVER).choose(at, 6)
    way = (PEAKS[1] - PEAKS[0]) / (PEAKS[1] - PEAKS[0]).norm()
    offset = X - PEAKS[0]
    away = (offset - (offset @ way).unsqueeze(-1) * way).norm(dim=-1)
    assert len(X) == 6
    assert float(away.mean()) < 0.08
    assert float(torch.pdist(X).max()) > 0.2


@pytest.mark.parametrize("surrogate", [None, GP()], ids=repr)
@pytest.mark.parametrize("m", [1, 8])
def test_one_metric_and_many_are_chosen_for(surrogate: GP | None, m: int) -> None:
    at = of_metrics(m, 12)
    if surrogate is not None:
        at = dataclasses.replace(at, model=surrogate.fit(at.good, at.space))
    X = ThompsonFronts(solver=SOLVER, rays=64, pool=64).choose(at, 2)
    at.space.check(X)
    assert X.shape == (2, at.space.d)
    if m == 1:
        assert float((X[:1] - 0.8).abs().max()) < 0.1  # the peak


@pytest.mark.parametrize("name", ["pool", "rays"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(SamplerError, match=f"{name} is 0"):
        ThompsonFronts(**{name: 0})  # type: ignore[arg-type]


def test_draws_differ_from_point_to_point() -> None:
    at = situation(0)
    X = ThompsonFronts(solver=SOLVER).choose(at, 4)
    again = ThompsonFronts(solver=SOLVER).choose(at, 4)
    assert torch.equal(X, again)
    assert float(torch.pdist(X).min()) > 1e-3
    assert make_generator(0).initial_seed() == at.generator.initial_seed()
