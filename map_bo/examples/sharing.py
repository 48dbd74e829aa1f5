"""How much of the sampling noise of a metric differs between rows that share their examples.

Two rows that are scored on the same examples err together: where their outcomes correlate by
``rho`` over the examples, the share ``rho`` of the noise of a mean is common to both and cancels
when they are compared. What is left, ``1 - rho``, is the noise of a comparison
(:mod:`map_bo.surrogates.links`). Where there are outcomes, ``rho`` is measured on them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.examples.sets import ExampleOutcomes

__all__ = ["DIFFERS", "differing_share", "pooled"]

DIFFERS = 0.3
"""Share of the sampling variance that differs between evaluations on the same examples."""

_LEAST, _MOST = 0.05, 1.0
_BETWEEN_CASES = 0.15  # standard deviation of the share from case to case: most are .1 to .7
_BETWEEN_ROWS = 0.2  # and of what one row says of it, from row to row of a case
_FEWEST = 8  # examples in common, below which a pair of rows says nothing
_ROWS, _EXAMPLES = 32, 1000  # at most about so many, evenly spaced: they are enough


def differing_share(seen: Observations) -> Tensor:
    """Return the share of the sampling variance that differs between rows, ``m``.

    With the outcomes of two rows on the examples that both have, each less its mean there, the
    correlation of a metric is pooled over all pairs of rows,
    ``rho = sum cov_ij / sum s_i s_j``: the mean of the pairwise correlations, weighted by the
    standard deviations, so that a row that gets everything wrong, and has none, has no say. With
    equal deviations it is the intraclass correlation ``ICC(3, 1)``, examples as targets and rows
    as raters (Shrout & Fleiss, *Intraclass correlations: uses in assessing rater reliability*,
    Psychological Bulletin 86, 1979, equation for case 3).

    Few rows, or few examples, say little of other rows. So ``1 - rho`` is shrunk towards
    :data:`DIFFERS` by the precision of either: from case to case the share varies by .15, and the
    estimate has the variance ``.2^2 / (r - 1) + (1 - rho^2)^2 / n`` with ``r`` rows of ``n`` common
    examples (the second term: Fisher, 1921). The result lies in [.05, 1].

    Args:
        seen: Evaluations with outcomes of their examples.

    Returns:
        NaN for a metric that is not the mean of outcomes, or has fewer than two rows with eight
        examples in common.
    """
    found = torch.full((len(seen.metrics),), torch.nan, dtype=torch.float64)
    for j in range(len(seen.metrics)):
        outcomes = _outcomes(seen, j)
        if outcomes is not None:
            found[j] = _share(outcomes)
    return found


def pooled(seen: Observations) -> Observations:
    """Return estimates whose noise has one correlation per metric in place of one per pair of rows.

    A few hundred examples say how much rows have in common, but not well enough how much each pair
    has: a surrogate that is told every pair's own takes directions of the rows for known that are
    known by chance. With one correlation, differences between merges were predicted as well or
    better (``python -m benchmarks.quality.pooling``), and levels about as well.

    The correlation is the mean over the pairs of rows that have noise in common; rows that have
    none, such as those on all examples, stay independent.

    Args:
        seen: Estimates with the covariance of their noise; others are returned as they are.
    """
    if seen.covariance is None:
        return seen
    whole = seen.covariance.clone()
    for j, covariance in enumerate(seen.covariance):
        own = covariance.diagonal()
        apart = covariance - torch.diag(own)
        rows = (apart != 0).any(-1).nonzero().flatten()
        if len(rows) < 2:
            continue
        deviation = own[rows].sqrt()
        unit = deviation.unsqueeze(-1) * deviation
        k = len(rows)
        correlation = float((apart[rows][:, rows] / unit).sum()) / (k * (k - 1))
        shared = min(max(correlation, 0.0), 1.0) * unit
        shared.diagonal().copy_(own[rows])
        whole[j, rows.unsqueeze(-1), rows] = shared
    return dataclasses.replace(seen, covariance=whole)


def _share(outcomes: Tensor) -> float:
    """Return the share by the outcomes of some rows, ``r x size`` with NaN where there is none."""
    there = (~outcomes.isnan()).double()
    centre = outcomes.nanmean(-1, keepdim=True).nan_to_num(nan=0.0)
    values = (outcomes - centre).nan_to_num(nan=0.0)
    common = there @ there.mT
    n = common.clamp_min(1.0)
    # Row i by column j: sums over the examples that both have.
    sums, squares = values @ there.mT / n, values.square() @ there.mT / n
    covariance = values @ values.mT / n - sums * sums.mT
    variance = (squares - sums.square()).clamp_min(0.0)
    deviations = (variance * variance.mT).sqrt()
    pairs = torch.ones_like(common).triu(1).bool() & (common >= _FEWEST)
    size = deviations[pairs].sum()
    varied = deviations * pairs > 0
    rows = int((varied | varied.mT).any(-1).sum())
    if rows < 2 or not float(size) > 0:
        return torch.nan
    rho = float(covariance[pairs].sum() / size)
    examples = float(common[varied].mean())
    error = _BETWEEN_ROWS**2 / (rows - 1) + (1 - rho**2) ** 2 / examples
    weight = _BETWEEN_CASES**2 / (_BETWEEN_CASES**2 + error)
    return min(max(DIFFERS + weight * (1 - rho - DIFFERS), _LEAST), _MOST)


def _outcomes(seen: Observations, column: int) -> Tensor | None:
    """Return the outcomes of a metric by row and example, NaN where one was not scored.

    Of at most 32 rows that have it, and of at most about 1,000 examples. None where the metric is
    not the mean of outcomes, or of fewer than two rows.
    """
    metric, measured = seen.metrics[column].name, seen.measured[:, column].tolist()
    found: list[tuple[ExampleOutcomes, int]] = []
    for row, has in zip(seen.examples, measured, strict=True):
        for name, one in row.items() if has else ():
            named = bool(one.metrics) or len(one.means) == 1
            k = one.columns(name).get(metric) if named else None
            if k is not None and one.means[k]:
                found.append((one, k))
    found = [(one, k) for one, k in found if one.size == found[0][0].size]
    if len(found) > _ROWS:
        found = [found[i * (len(found) - 1) // (_ROWS - 1)] for i in range(_ROWS)]
    if len(found) < 2:
        return None
    step = -(-found[0][0].size // _EXAMPLES)
    return torch.stack([one.row()[::step, k] for one, k in found])
