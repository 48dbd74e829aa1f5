from __future__ import annotations

from typing import cast

import pytest
import torch
from botorch.models.model import FantasizeMixin
from botorch.posteriors.gpytorch import GPyTorchPosterior
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.samplers.posterior.covariance import Covariances, measurement_noise
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.sampler_contract import SPACES, some_seen

BOX = SPACES["box"]


@pytest.mark.parametrize("surrogate", [Quadratic(), GP(), Auto()], ids=repr)
def test_pending_points_take_off_what_conditioning_takes_off(surrogate: Surrogate) -> None:
    model = surrogate.fit(some_seen(BOX, 14), BOX)
    X = BOX.sample(9, generator=make_generator(0))
    targets, pending, points = X[:4], X[4:6], X[6:]
    noise = torch.tensor([0.02, 0.03], dtype=torch.float64)
    cross, variance = Covariances(model, targets, noise, pending).to(points)
    variances = noise.expand(len(pending), 2)
    assert isinstance(model, FantasizeMixin)
    after = model.condition_on_observations(pending, model.link_mean(pending), noise=variances)
    for i in range(2):
        joint = cast(
            GPyTorchPosterior, after.for_metrics([i]).posterior(torch.cat([targets, points]))
        ).distribution.covariance_matrix
        torch.testing.assert_close(cross[i], joint[4:, :4], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(variance[i], joint.diagonal()[4:], rtol=1e-3, atol=1e-6)


def test_without_pending_points_it_is_the_joint_posterior() -> None:
    model = Quadratic().fit(some_seen(BOX, 14), BOX)
    X = BOX.sample(5, generator=make_generator(0))
    cross, variance = Covariances(model, X[:3], measurement_noise(model, X)).to(X[3:])
    phi = model.features(X)
    joint = phi @ (model.root @ model.root.mT) @ phi.mT
    torch.testing.assert_close(cross, joint[:, 3:, :3])
    torch.testing.assert_close(variance, joint.diagonal(dim1=-1, dim2=-2)[:, 3:])


def test_noise_is_that_of_the_fit() -> None:
    model = Quadratic().fit(some_seen(BOX, 14), BOX)
    X = BOX.sample(9, generator=make_generator(0))
    torch.testing.assert_close(
        measurement_noise(model, X), model.training_targets()[1].median(0).values
    )
    assert bool((measurement_noise(model, X) > 0).all())


@pytest.mark.parametrize("waiting", [0, 2])
def test_variance_that_rounding_takes_below_zero_is_zero(
    waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GP().fit(some_seen(BOX, 14), BOX)
    X = BOX.sample(9, generator=make_generator(0))
    covariances = Covariances(model, X[:3], measurement_noise(model, X), X[3 : 3 + waiting])
    exact = covariances._posterior.to

    def rounded(points: Tensor) -> tuple[Tensor, Tensor]:
        cross, variance = exact(points)
        return cross, -1e-12 * variance

    monkeypatch.setattr(covariances._posterior, "to", rounded)
    points = X[5:].clone().requires_grad_(True)
    _, variance = covariances.to(points)
    torch.testing.assert_close(variance, torch.zeros_like(variance), rtol=0, atol=0)
    # An upper confidence bound takes its root, and an optimiser the derivative of that.
    (slope,) = torch.autograd.grad((variance + 1e-30).sqrt().sum(), points)
    assert bool(torch.isfinite(slope).all())
