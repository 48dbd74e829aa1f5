from __future__ import annotations

import pytest
import torch

from map_bo.rng import make_generator
from map_bo.samplers.posterior.covariance import JointDraws
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from tests.samplers.posterior.test_front_uncertainty import BOX, situation


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_draws_have_the_moments_of_the_joint_posterior(surrogate: Surrogate) -> None:
    model = situation(1, surrogate).model
    X = BOX.sample(4, generator=make_generator(8))
    draws = JointDraws(model, X[:3], 6000, generator=make_generator(0))
    with torch.no_grad():
        samples = torch.cat([draws.baseline, draws.at(X[3:])], 1)  # s x 4 x m
    for i in range(2):
        exact = model.for_metrics([i]).posterior(X).distribution.covariance_matrix  # type: ignore[attr-defined]
        found = torch.cov(samples[..., i].T)
        size = float(exact.diagonal().mean())
        torch.testing.assert_close(found, exact, rtol=0.0, atol=0.08 * size)
        error = samples[..., i].mean(0) - model.link_mean(X)[:, i]
        assert float(error.abs().max()) < 0.06 * size**0.5


def test_a_draw_at_the_baseline_is_the_draw_of_the_baseline() -> None:
    model = situation(1).model
    X = BOX.sample(3, generator=make_generator(8))
    draws = JointDraws(model, X, 20, generator=make_generator(0))
    size = float((draws.baseline - model.link_mean(X)).std())
    torch.testing.assert_close(draws.at(X), draws.baseline, rtol=0.0, atol=0.02 * size)


def test_draws_depend_on_the_seed_alone() -> None:
    model = situation(1).model
    X = BOX.sample(3, generator=make_generator(8))
    source = make_generator(4)
    first = JointDraws(model, X, 5, generator=source).at(X)
    torch.rand(9, generator=source)
    assert torch.equal(JointDraws(model, X, 5, generator=source).at(X), first)
    assert not torch.equal(JointDraws(model, X, 5, generator=make_generator(5)).at(X), first)
