"""The doubt about the front, and what actions take off it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import ConfigError
from map_bo.examples.information import further_information, information
from map_bo.samplers.allocation.front_doubt import FrontDoubt, _gained, _noise, _OneMetric
from tests.examples.test_information import spread


def posterior(prior: Tensor, N: Tensor, at: Tensor) -> Tensor:
    """Return the posterior covariance of a Gaussian vector after some entries were measured."""
    gain = prior[:, at] @ torch.linalg.inv(prior[at][:, at] + N)
    after: Tensor = prior - gain @ prior[at]
    return after


def test_the_precision_that_is_gained_gives_the_posterior_of_a_new_fit() -> None:
    R, p, size, misfit = 4, 3, 400, 0.01
    prior, S = spread(R + p, 7), spread(R, 8)
    counts, row, stop = [50, 50, 100, 25], 1, 200
    at = torch.arange(R)
    C = torch.linalg.inv(information(S, counts))
    after = [stop if i == row else n for i, n in enumerate(counts)]
    N = _noise(C, S, size, misfit)
    N_after = _noise(torch.linalg.inv(information(S, after)), S, size, misfit)
    H = _gained(C, torch.linalg.inv(N), *further_information(S, counts, row, stop))
    torch.testing.assert_close(
        torch.linalg.inv(N) + H @ H.T, torch.linalg.inv(N_after), rtol=1e-6, atol=1e-6
    )
    before = posterior(prior, N, at)
    cross = before[:, at] @ H
    inner = torch.eye(H.shape[-1]).double() + H.T @ before[at][:, at] @ H
    updated = before - cross @ torch.linalg.solve(inner, cross.T)
    torch.testing.assert_close(updated, posterior(prior, N_after, at), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("begin", [0.0, -1.0, 1.5])
def test_a_share_of_the_budget_is_a_share(begin: float) -> None:
    with pytest.raises(ConfigError, match="begin must be above 0"):
        FrontDoubt(begin=begin)


@pytest.mark.parametrize("noise", [0.0, float("nan")])
def test_a_metric_measured_as_a_whole_and_without_noise_has_a_worth(noise: float) -> None:
    """Variances of 1e-300 overflowed when they were inverted."""
    R, b, p = 4, 3, 5
    one = _OneMetric(
        Metric("a"),
        None,
        [1] * R,
        1,
        torch.rand(R + b, R, generator=torch.Generator().manual_seed(0)).double(),
        torch.full((R + b,), 0.2, dtype=torch.float64),
        0.0,
        spread(R + b + p, 3),
        torch.ones(p, dtype=torch.float64),
        torch.full((R,), noise, dtype=torch.float64),
    )
    drops = one.drops_at_pool(1)
    assert bool(drops.isfinite().all())
    assert bool((drops > 0).all())
