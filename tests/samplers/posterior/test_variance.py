from __future__ import annotations

import pytest
import torch

from map_bo.rng import make_generator
from map_bo.samplers.designs.optimal import box_moments
from map_bo.samplers.designs.space_filling import sobol_points
from map_bo.samplers.posterior.acquisition import first_points
from map_bo.samplers.posterior.covariance import measurement_noise
from map_bo.samplers.posterior.variance import IntegratedVariance, VarianceReduction, gain_slopes
from map_bo.samplers.sampler import Sampler
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP, GPModel
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.quadratic_model import QuadraticModel
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from tests.contracts.sampler_contract import SPACES, SamplerContract
from tests.contracts.surrogate_contract import mixed_observations, moments
from tests.samplers.posterior.test_front_uncertainty import BOX, situation


class TestIntegratedVariance(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return IntegratedVariance(
            Quadratic(), initial=5, restarts=2, raw_samples=16, mc_samples=8, steps=8, targets=32
        )

    @pytest.fixture(params=["box", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_it_is_the_drop_of_the_variance_over_the_space(surrogate: Surrogate) -> None:
    at = situation(12, surrogate)
    sampler = IntegratedVariance(targets=64)
    acquisition = sampler.acquisition(at, at.taken, make_generator(0))
    assert isinstance(acquisition, VarianceReduction)
    x = torch.tensor([[0.9, 0.9]], dtype=torch.float64)
    assert isinstance(at.model, QuadraticModel | GPModel)
    after: SurrogateModel = at.model.condition_on_observations(
        x, at.model.link_mean(x), noise=measurement_noise(at.model, at.good.X).unsqueeze(0)
    )
    T = acquisition.targets
    drop = (moments(at.model, T)[1] - moments(after, T)[1]) / at.unit.square()
    value = acquisition(x.unsqueeze(1)).exp()
    torch.testing.assert_close(value, drop.mean(0).sum().reshape(1), rtol=2e-3, atol=1e-9)


def test_for_the_quadratic_it_is_the_closed_form() -> None:
    # The variance over the box is tr(S E[phi phi']), and a measurement takes a rank-one part off S.
    at = situation(12)
    acquisition = IntegratedVariance(targets=2048).acquisition(at, at.taken, make_generator(0))
    X = BOX.sample(20, generator=make_generator(4))
    model, moments_ = at.model, box_moments(BOX)
    assert isinstance(model, QuadraticModel)
    phi = model.features(X)
    drop = torch.zeros(len(X), dtype=torch.float64)
    for i, noise in enumerate(measurement_noise(model, at.good.X)):
        S = model.root[i] @ model.root[i].mT
        for k, f in enumerate(phi):
            after = S - torch.outer(S @ f, S @ f) / (f @ S @ f + noise)
            drop[k] += torch.trace((S - after) @ moments_) / at.unit[i] ** 2
    torch.testing.assert_close(acquisition(X.unsqueeze(1)).exp(), drop, rtol=0.01, atol=0.0)


def test_targets_fill_the_space() -> None:
    at = situation(12)
    acquisition = IntegratedVariance(targets=50).acquisition(at, at.taken, make_generator(0))
    assert isinstance(acquisition, VarianceReduction)
    expected = first_points(sobol_points(BOX, generator=make_generator(0)), 50)
    assert acquisition.targets.shape == expected.shape
    assert float(acquisition.targets.mean()) == pytest.approx(0.5, abs=0.05)


def test_slopes_are_derivatives_of_the_gains() -> None:
    seen, space = mixed_observations()
    at = situation(12)
    model = Quadratic().fit(seen, space)
    at = type(at)(
        model=model,
        good=seen,
        space=space,
        taken=seen.X[:0],
        known=seen.X,
        scale=Scale.of(seen, space),
        generator=make_generator(0),
    )
    X = space.sample(5, generator=make_generator(3))
    F = model.link_mean(X)
    step = 1e-6
    numeric = (at.gains()(F + step, None) - at.gains()(F - step, None)).abs() / (2 * step)
    torch.testing.assert_close(gain_slopes(at, X), numeric, rtol=1e-5, atol=1e-8)
