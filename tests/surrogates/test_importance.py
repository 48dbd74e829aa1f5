"""What every surrogate makes of the importances of a space."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from botorch.posteriors.gpytorch import GPyTorchPosterior

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import quadratic_features
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import SurrogateModel

D = 12
NAMES = tuple(f"e{i}" for i in range(D))
SIZES = tuple(3.0 if i < 3 else 0.05 for i in range(D))
TOLD = CoefficientSpace(NAMES, (0.0,) * D, (1.0,) * D, importance=SIZES)
PLAIN = CoefficientSpace(NAMES, (0.0,) * D, (1.0,) * D)
KINDS = [Quadratic, GP, Hybrid]


def data(n: int = 30, *, offset: int = 0) -> Observations:
    """Return a quadratic in the first three coefficients."""
    X = PLAIN.sample(300, generator=make_generator(4))[offset : offset + n]
    y = 2 * X[:, 0] - X[:, 1] + 1.5 * X[:, 0] * X[:, 2] + X[:, 2].square()
    return Observations(X, y.unsqueeze(-1), (Metric("y", kind="unbounded"),))


def rmse(model: SurrogateModel) -> float:
    truth = data(200, offset=100)
    return float((model.link_mean(truth.X) - truth.Y).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_true_importances_help_and_false_ones_hurt(kind: type[Quadratic]) -> None:
    false = CoefficientSpace(NAMES, (0.0,) * D, (1.0,) * D, importance=SIZES[::-1])
    right, none, wrong = (
        rmse(kind(importance=1.0).fit(data(), space)) for space in (TOLD, PLAIN, false)
    )
    assert right < 0.5 * none
    assert none < wrong


@pytest.mark.parametrize("kind", KINDS)
def test_power_zero_and_equal_importances_change_nothing(kind: type[Quadratic]) -> None:
    X = PLAIN.sample(5, generator=make_generator(0))
    plain = kind().fit(data(), PLAIN).link_mean(X)
    assert torch.equal(kind(importance=0.0).fit(data(), TOLD).link_mean(X), plain)
    equal = CoefficientSpace(NAMES, (0.0,) * D, (1.0,) * D, importance=(7.0,) * D)
    torch.testing.assert_close(kind().fit(data(), equal).link_mean(X), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_mean_posterior_and_gradient_agree(kind: type[Quadratic]) -> None:
    model = kind().fit(data(), TOLD)
    X = PLAIN.sample(5, generator=make_generator(0)).requires_grad_()
    posterior = cast(GPyTorchPosterior, model.posterior(X))
    torch.testing.assert_close(model.link_mean(X), posterior.mean, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(model.link_mean, (X,), eps=1e-5, atol=1e-4, rtol=1e-3)


def test_drawn_quadratics_live_on_the_models_own_features() -> None:
    model = Quadratic(importance=1.0).fit(data(), TOLD)
    X = PLAIN.sample(6, generator=make_generator(0))
    draws = model.sample_functions(4000, generator=make_generator(1))
    torch.testing.assert_close(draws(X).mean(0), model.link_mean(X), rtol=0.0, atol=0.05)
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    sizes = sizes / sizes.square().mean().sqrt()
    torch.testing.assert_close(model.features(X), quadratic_features((2 * X - 1) * sizes))


def test_prior_variances_of_weights_go_with_the_importances() -> None:
    # With one far too noisy evaluation pair the posterior is the prior.
    seen = data(2)
    noisy = Observations(seen.X, seen.Y, seen.metrics, Yvar=torch.full_like(seen.Y, 1e8))
    model = Quadratic(importance=1.0).fit(noisy, TOLD)
    weights = (model.root @ model.root.mT)[0].diagonal()[1 : 1 + D].sqrt()
    # In centred coefficients of the space itself the weight is multiplied by the importance.
    scaled = weights * torch.tensor(SIZES)
    torch.testing.assert_close(scaled[3:] / scaled[0], torch.full((D - 3,), 0.05 / 3.0).double())
