r"""What outcomes on parts of one order tell of the metrics on all examples: information matrices.

The outcomes of ``R`` rows on one example are a draw from a distribution with mean ``mu`` (the
metrics) and covariance ``S`` (``R x R``). Row ``r`` covers the first ``n_r`` examples, so the data
are monotone: with ``R_b`` the rows that cover block ``b`` of ``l_b`` examples, the Fisher
information about ``mu`` is

    I = sum_b  l_b  E_b' S_{R_b}^{-1} E_b

(Anderson, *Maximum Likelihood Estimates for a Multivariate Normal Distribution when Some
Observations are Missing*, JASA 52, 1957), and the best linear unbiased estimate has covariance
``I^{-1}``. For a finite set of ``M`` examples the target is their mean and not ``mu``, which leaves
``I^{-1} - S / M``.

If row ``r`` covers ``l`` more examples of a block, that adds ``(l / s) u u'``: the residual of its
outcomes given those of the rows that cover the block already is a new observation, with ``s`` its
variance and ``u`` the contrast of the row with its regression on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "further_information",
    "information",
    "information_of_new_rows",
    "outcome_covariance",
    "with_new_row",
]

_PULL = 100.0  # common examples that a correlation needs to count as much as the mean of all
_USUAL = 0.6  # correlation of two merges' outcomes, before any were seen; real ones have .5 to .75
_BELIEF = 25.0  # common examples that the mean correlation needs to count as much as that
_ALIKE = 0.995  # no two rows are taken to have the same outcomes on all examples


def outcome_covariance(values: Tensor, *, bounds: tuple[float, float] | None = None) -> Tensor:
    """Return the covariance of outcomes over examples, ``R x R``, positive definite.

    Each pair of rows by the examples that both cover. Correlations are pulled towards their mean,
    and that towards what real merges have, the more the fewer these are: rows that agree on two
    dozen examples do not have to agree on the others. A row whose outcomes do not vary gets the
    variance that half an outcome of another kind would give.

    Args:
        values: ``R x M`` outcomes; NaN where an example was not scored.
        bounds: Smallest and largest outcome, where there are such.
    """
    there = values.isfinite().to(values)
    own = values.nan_to_num(nan=0.0)
    centre = own.sum(-1) / there.sum(-1).clamp_min(1)
    own = (own - centre.unsqueeze(-1)) * there
    n = there @ there.T
    total = own @ there.T
    cross = own @ own.T - total * total.T / n.clamp_min(1)
    covariance = cross / (n - 1).clamp_min(1)
    counts = n.diagonal().clamp_min(1)
    variance = covariance.diagonal()
    if bounds is not None:
        low, high = bounds
        p = ((centre - low) / (high - low)).clamp(0, 1)
        p = (p * counts + 0.5) / (counts + 1)
        binomial = (high - low) ** 2 * p * (1 - p)
        right_or_wrong = ((values == low) | (values == high) | values.isnan()).all(-1)
        variance = torch.where(right_or_wrong, torch.maximum(variance, binomial), variance)
    positive = variance[variance > 0]
    floor = 1e-3 * positive.median() if len(positive) else torch.ones((), dtype=values.dtype)
    variance = torch.maximum(variance, floor)
    scale = variance.sqrt()
    found = (covariance / (scale.unsqueeze(-1) * scale)).clamp(-1, 1)
    off = ~torch.eye(len(values), dtype=torch.bool) & (n > 2)
    weight = n / (n + _PULL)
    mean = _USUAL
    if bool(off.any()):
        common = float(n[off].mean())
        seen = float((found * weight)[off].sum() / weight[off].sum())
        mean = (common * seen + _BELIEF * _USUAL) / (common + _BELIEF)
    mean = min(max(mean, 0.0), _ALIKE)
    correlation = torch.where(n > 2, weight * found + (1 - weight) * mean, mean)
    correlation = (correlation + correlation.T) / 2
    correlation.fill_diagonal_(1.0)
    level, axes = torch.linalg.eigh(correlation)
    correlation = (axes * level.clamp_min(1 - _ALIKE)) @ axes.T
    unit = correlation.diagonal().rsqrt()
    correlation = correlation * unit.unsqueeze(-1) * unit
    whole: Tensor = correlation * scale.unsqueeze(-1) * scale
    return whole


def information(S: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the information about the means of the rows, ``R x R``.

    Args:
        S: ``R x R`` covariance of outcomes over examples.
        counts: How many examples of the order each row covers; may be 0.
    """
    total = torch.zeros_like(S)
    before = 0
    n = torch.as_tensor(list(counts))
    for end in sorted({count for count in counts if count}):
        rows = (n >= end).nonzero().flatten()
        block = torch.linalg.inv(S[rows][:, rows])
        total[rows.unsqueeze(-1), rows] += (end - before) * block
        before = end
    return total


def further_information(
    S: Tensor, counts: Sequence[int], row: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return what a row adds by covering examples up to ``stop``.

    Args:
        S: ``R x R`` covariance of outcomes over examples.
        counts: How many examples each row covers now.
        row: The row.
        stop: How many it is to cover.

    Returns:
        ``U`` (``R x b``) and ``w`` (``b``), so that the information grows by ``U diag(w) U'``.
    """
    ends = sorted({count for count in counts if counts[row] < count < stop} | {stop})
    before = counts[row]
    n = torch.as_tensor(list(counts))
    contrasts, weights = [], []
    for end in ends:
        rows = [int(i) for i in (n >= end).nonzero().flatten() if int(i) != row]
        u = S.new_zeros(len(S))
        u[row], left = 1.0, S[row, row]
        if rows:
            slope = torch.linalg.solve(S[rows][:, rows], S[rows, row])
            u[rows] = -slope
            left = (left - slope @ S[rows, row]).clamp_min((1 - _ALIKE) * S[row, row] / 10)
        contrasts.append(u)
        weights.append((end - before) / left)
        before = end
    return torch.stack(contrasts, -1), torch.stack(weights)


def information_of_new_rows(S: Tensor, counts: Sequence[int], stop: int) -> tuple[Tensor, Tensor]:
    """Return what new rows would add, each alone, if they covered the first ``stop`` examples.

    Args:
        S: ``b x (R + 1) x (R + 1)`` covariances that differ in the last row alone, the new one.
        counts: How many examples each of the ``R`` rows covers now.
        stop: How many a new row is to cover.

    Returns:
        ``U`` (``b x (R + 1) x c``) and ``w`` (``b x c``), as `further_information`.
    """
    n, before = torch.as_tensor(list(counts)), 0
    contrasts, weights = [], []
    for end in sorted({count for count in counts if 0 < count < stop} | {stop}):
        rows = (n >= end).nonzero().flatten()
        u = torch.zeros_like(S[:, 0])
        u[:, -1], left = 1.0, S[:, -1, -1]
        if len(rows):
            cross = S[:, -1, :-1][:, rows]
            slopes = torch.linalg.solve(S[0][rows][:, rows], cross.T).T
            u[:, rows] = -slopes
            left = torch.maximum(left - (slopes * cross).sum(-1), (1 - _ALIKE) * left / 10)
        contrasts.append(u)
        weights.append((end - before) / left)
        before = end
    return torch.stack(contrasts, -1), torch.stack(weights, -1)


def with_new_row(S: Tensor, distances: Tensor, new: Tensor) -> Tensor:
    """Return the covariance with a row of which nothing was scored, ``(R + 1) x (R + 1)``.

    Its outcomes are taken to be those of the nearest row, to the degree to which that row's
    outcomes are those of its own nearest row, by the distances; with the same variance.

    Args:
        S: ``R x R`` covariance of outcomes over examples.
        distances: ``R x R`` distances between the rows.
        new: ``R`` distances of the new row.
    """
    near = int(new.argmin())
    others = distances[near].clone()
    others[near] = torch.inf
    alike = 0.5
    if len(S) > 1:
        next_to = int(others.argmin())
        scale = (S[near, near] * S[next_to, next_to]).sqrt()
        correlation = float(S[near, next_to] / scale)
        share = float((new[near] / others[next_to].clamp_min(1e-12)).clamp(0, 1))
        alike = 1 - (1 - correlation) * share
    alike = min(max(alike, 0.0), _ALIKE)
    grown = S.new_zeros(len(S) + 1, len(S) + 1)
    grown[:-1, :-1] = S
    grown[-1, :-1] = grown[:-1, -1] = alike * S[near]
    grown[-1, -1] = S[near, near]
    return grown
