"""An item-response model of right and wrong, to compare the regression estimates with.

Row ``i`` gets example ``t`` right with the probability ``sigma(a_i + l_i' f_t)``: each example has
``k`` traits ``f_t ~ N(0, I)``, each row an ability ``a_i`` and what it makes of the traits,
``l_i`` (the multidimensional two-parameter model; Reckase, *Multidimensional Item Response Theory*,
2009). Both are functions of the coefficients, linear in them, plus a deviation of each row that is
shrunk by its own fitted variance. What was not scored is predicted from the traits that the
outcomes of all other rows give an example.

The fit is variational expectation maximisation with the quadratic bound of Jaakkola & Jordan
(*Bayesian parameter estimation via variational methods*, Statistics and Computing 10, 2000).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["item_response"]

_ROUNDS = 30


def item_response(X: Tensor, outcomes: Tensor, traits: int = 3) -> tuple[Tensor, Tensor]:
    """Return estimates of the means over all examples and their variances, ``r`` each.

    For the rows of ``n`` examples, traits are those that the outcomes of all rows with more give
    an example, so that what is predicted is as good for the examples scored as for the others. The
    estimate is the mean prediction over all examples, corrected by the mean residual of what was
    scored (the model-assisted difference estimator), with the variance of these residuals. Rows
    that nothing has more examples than keep their means.

    Args:
        X: ``r x d`` coefficients.
        outcomes: ``r x M`` outcomes of 0 and 1, NaN where an example was not scored; sets nest.
        traits: How many traits an example has, ``k``.
    """
    there = outcomes.isfinite()
    y = torch.where(there, outcomes - 0.5, 0.0)
    M, n = outcomes.shape[1], there.sum(-1)
    theta = _fit(X, y, there, traits)
    estimates, variances = outcomes.nanmean(-1), torch.zeros(len(X), dtype=torch.float64)
    smoothed = (n * estimates + 0.5) / (n + 1)
    for count in sorted(set(n.tolist()), reverse=True):
        rows, more = n == count, n > count
        predicted = estimates[rows].unsqueeze(-1).expand(-1, M)
        if bool(more.any()):
            mean, covariance = _traits(theta[more], y[more], there[more])
            predicted = _probability(theta[rows], mean, covariance)
        residuals = torch.where(there[rows], outcomes[rows].nan_to_num() - predicted, 0.0)
        shift = residuals.sum(-1) / count
        estimates[rows] = (predicted.mean(-1) + shift).clamp(0, 1)
        squares = (residuals - shift.unsqueeze(-1) * there[rows]).square().sum(-1)
        left = squares + smoothed[rows] * (1 - smoothed[rows])
        variances[rows] = left / count * (1 - count / M) / max(count - 2, 0.5)
    return estimates, variances


def _traits(theta: Tensor, y: Tensor, there: Tensor, rounds: int = 4) -> tuple[Tensor, Tensor]:
    """Return means (``M x k``) and covariances of the traits, given the outcomes of rows.

    Args:
        theta: ``r x (k + 1)``: what a row makes of the traits, then its ability.
        y: ``r x M`` outcomes less 1/2, 0 where there is none.
        there: ``r x M`` booleans: where there is one.
        rounds: How often the bound is made to touch where the means are.
    """
    k, M = theta.shape[1] - 1, y.shape[1]
    loadings, ability = theta[:, :k], theta[:, k:]
    outer = (loadings.unsqueeze(-1) * loadings.unsqueeze(-2)).flatten(1)
    bound = 0.125 * there.double()
    eye = torch.eye(k, dtype=torch.float64)
    for _ in range(rounds):
        covariance = torch.linalg.inv(eye + 2 * (bound.mT @ outer).view(M, k, k))
        pull = (y - 2 * bound * ability).mT @ loadings
        mean = (covariance @ pull.unsqueeze(-1)).squeeze(-1)
        bound = _bound(theta, _moments(mean, covariance)) * there
    return mean, covariance


def _moments(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the second moments of ``(f_t, 1)``, ``M x (k + 1) x (k + 1)``."""
    full = torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], -1)
    moments = full.unsqueeze(-1) * full.unsqueeze(-2)
    moments[:, :-1, :-1] += covariance
    return moments


def _bound(theta: Tensor, moments: Tensor) -> Tensor:
    """Return ``lambda(xi)`` of the bound where it is tightest, ``r x M``."""
    squares = (theta.unsqueeze(-1) * theta.unsqueeze(-2)).flatten(1) @ moments.flatten(1).mT
    xi = squares.clamp_min(1e-12).sqrt()
    return torch.tanh(xi / 2) / (4 * xi)


def _probability(theta: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return the probability of being right, ``r x M``, over the doubt about the traits."""
    loadings, ability = theta[:, :-1], theta[:, -1:]
    spread = torch.einsum("ia,tab,ib->it", loadings, covariance, loadings)
    return torch.sigmoid((ability + loadings @ mean.mT) / (1 + math.pi / 8 * spread).sqrt())


def _fit(X: Tensor, y: Tensor, there: Tensor, traits: int) -> Tensor:
    """Return what each row makes of the traits, and its ability: ``r x (k + 1)``."""
    r, n = len(X), there.sum(-1)
    p = (y.sum(-1) + n / 2 + 0.5) / (n + 1)
    # Start with the principal axes of what all rows have.
    common = there.all(0)
    values = y[:, common] - y[:, common].mean(-1, keepdim=True)
    axes, sizes, _ = torch.linalg.svd(values / math.sqrt(int(common.sum())), full_matrices=False)
    start = 4 * axes[:, :traits] * sizes[:traits]
    theta = torch.cat([start, (p / (1 - p)).log().unsqueeze(-1)], -1)
    design = torch.cat([torch.ones(r, 1, dtype=torch.float64), X - X.mean(0)], -1)
    weight = n.double().sqrt().unsqueeze(-1)
    for _ in range(_ROUNDS):
        mean, covariance = _traits(theta, y, there)
        moments = _moments(mean, covariance)
        bound = _bound(theta, moments) * there
        k = theta.shape[1]
        information = 2 * (bound @ moments.flatten(1)).view(r, k, k)
        target = y @ torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], -1)
        # What coefficients of this kind have, and how far rows deviate from it.
        smooth = design @ torch.linalg.lstsq(design * weight, theta * weight).solution
        deviation = (theta - smooth).square().mean(0) + 1e-3
        theta = torch.linalg.solve(
            information + torch.diag(1 / deviation), (target + smooth / deviation).unsqueeze(-1)
        ).squeeze(-1)
    return theta
