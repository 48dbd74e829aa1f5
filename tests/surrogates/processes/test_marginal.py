from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.surrogates.processes import marginal
from map_bo.surrogates.processes.kernels import (
    Trend,
    squared_exponential,
    trend_features,
    trend_groups,
)
from map_bo.surrogates.processes.marginal import (
    LOWEST_NUGGET,
    LogPrior,
    fit,
    negative_log_posterior,
)

TRENDS: tuple[Trend, ...] = ("constant", "quadratic")


def problem(
    n: int, d: int, trend: Trend, seed: int
) -> tuple[Tensor, Tensor, Tensor, LogPrior, Tensor]:
    generator = make_generator(seed)
    U = torch.rand(n, d, generator=generator, dtype=torch.float64)
    y = torch.sin(3 * U).sum(-1)
    y = (y - y.mean()) / y.std()
    known = 0.01 * torch.rand(n, generator=generator, dtype=torch.float64)
    p = 2 + (1 if trend == "constant" else 4) + d
    mean = torch.randn(p, generator=generator, dtype=torch.float64) - 0.5
    prior = LogPrior(mean, torch.full((p,), 1.3, dtype=torch.float64))
    theta = mean + 0.5 * torch.randn(p, generator=generator, dtype=torch.float64)
    return U, y, known, prior, theta


def by_distribution(
    theta: Tensor, U: Tensor, y: Tensor, known: Tensor, trend: Trend, prior: LogPrior
) -> Tensor:
    """The same by torch's own distributions, differentiable by autograd."""
    groups = trend_groups(trend, U.shape[-1])
    G = int(groups[-1]) + 1
    value = theta.exp()
    Phi = trend_features(trend, U)
    K = (Phi * value[1 : 1 + G][groups]) @ Phi.mT
    K = K + value[1 + G] * squared_exponential(U, U, value[2 + G :])
    K = K + torch.diag(known + value[0])
    likelihood = torch.distributions.MultivariateNormal(torch.zeros_like(y), K)
    normal = torch.distributions.Normal(prior.mean, prior.spread)
    value_of: Tensor = -likelihood.log_prob(y) - normal.log_prob(theta).sum()  # type: ignore[no-untyped-call]
    return value_of


@settings(max_examples=20)
@given(
    n=st.integers(2, 12),
    d=st.integers(1, 4),
    trend=st.sampled_from(TRENDS),
    seed=st.integers(0, 10**6),
)
def test_value_and_gradient_are_those_of_the_definition(
    n: int, d: int, trend: Trend, seed: int
) -> None:
    U, y, known, prior, theta = problem(n, d, trend, seed)
    result = negative_log_posterior(theta, U, y, known, trend, prior)
    assert result is not None
    leaf = theta.clone().requires_grad_(True)
    expected = by_distribution(leaf, U, y, known, trend, prior)
    (gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(result[0], expected.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result[1], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trend", TRENDS)
def test_fit_ends_at_a_mode(trend: Trend) -> None:
    U, y, known, prior, theta = problem(20, 2, trend, 3)
    fitted = fit(U, y, known, trend, prior, torch.stack([prior.mean, theta]))
    assert fitted.note is None
    h = fitted.hyperparameters
    found = torch.cat([h.nugget.view(1), h.trend, h.scale.view(1), h.lengthscale]).log()
    end = negative_log_posterior(found, U, y, known, trend, prior)
    assert end is not None
    bounds = torch.tensor(prior.bounds(), dtype=torch.float64)
    inside = (found > bounds[:, 0] + 1e-6) & (found < bounds[:, 1] - 1e-6)
    assert float(end[1][inside].abs().max()) < 0.05
    for start in (prior.mean, theta):
        begin = negative_log_posterior(start, U, y, known, trend, prior)
        assert begin is not None
        assert float(end[0]) <= float(begin[0])


def test_more_starts_are_never_worse() -> None:
    U, y, known, prior, theta = problem(15, 2, "quadratic", 5)

    def value(starts: Tensor) -> float:
        h = fit(U, y, known, "quadratic", prior, starts).hyperparameters
        at = torch.cat([h.nugget.view(1), h.trend, h.scale.view(1), h.lengthscale]).log()
        result = negative_log_posterior(at, U, y, known, "quadratic", prior)
        assert result is not None
        return float(result[0])

    assert value(torch.stack([prior.mean, theta])) <= value(prior.mean.view(1, -1)) + 1e-9


def test_bounds_keep_the_nugget_off_zero() -> None:
    prior = LogPrior(
        torch.tensor([-13.0, 11.0], dtype=torch.float64),
        torch.tensor([2.0, 2.0], dtype=torch.float64),
    )
    low, high = zip(*prior.bounds(), strict=True)
    assert math.isclose(low[0], math.log(LOWEST_NUGGET))
    assert high[1] == 12.0


def test_no_finite_likelihood_falls_back_to_the_priors() -> None:
    U, y, known, prior, _ = problem(6, 2, "constant", 1)
    y = y.clone()
    y[0] = torch.inf
    fitted = fit(U, y, known, "constant", prior, prior.mean.view(1, -1))
    assert fitted.note is not None
    assert "priors' values" in fitted.note
    torch.testing.assert_close(fitted.hyperparameters.lengthscale, prior.mean[3:].exp())


def test_covariance_that_cannot_be_factorised_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    U, y, known, prior, theta = problem(6, 2, "constant", 1)
    assert negative_log_posterior(theta, U, y, known - 100.0, "constant", prior) is None
    monkeypatch.setattr(marginal, "negative_log_posterior", lambda *_: None)
    assert fit(U, y, known, "constant", prior, theta.view(1, -1)).note is not None
