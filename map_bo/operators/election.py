"""Joining sparse task vectors: their sum, or the mean of those that agree on a sign.

Pure functions on pieces ``N x n`` in float32. For coefficients ``c`` and rows ``t_n`` the sum of
the rows whose sign is ``s = +-1`` needs no mask, since ``[sign t = s] t = (t + s |t|) / 2``:

    ``sum_n c_n t_n [sign t_n = s] = (sum_n c_n t_n + s sum_n c_n |t_n|) / 2``

so all that is done is products of a short vector with the piece, its magnitudes and its signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.merging.arena import Empty

__all__ = ["ELECTIONS", "NORMALISATIONS", "elected_sum", "weighted_sum"]

ELECTIONS = ("mass", "weighted_mass", "count")
NORMALISATIONS = ("agreeing", "weights", "none")
_LEAST = 1e-6


def weighted_sum(rows: Tensor, c: Tensor, *, empty: Empty = torch.empty) -> Tensor:
    """Return ``sum_n c_n t_n`` (``n``) of rows ``N x n``."""
    out = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.mv(rows.t(), c.to(rows), out=out)


def elected_sum(
    rows: Tensor, c: Tensor, election: str, normalisation: str, *, empty: Empty = torch.empty
) -> Tensor:
    r"""Return the merge of the rows that agree with the elected sign, by element.

    TIES, Yadav et al., *TIES-Merging*, arXiv 2306.01708, section 4 (elect sign, disjoint merge):
    ``gamma = sign(sum_n t_n)``, and the mean over ``A = {n : sign t_n = gamma}``. With
    coefficients the mean is ``(1 / |A|) sum_{n in A} c_n t_n``, which for ``c_n = lambda`` is the
    paper's ``lambda tau_m``.

    Args:
        rows: ``N x n`` trimmed task vectors. Zeros agree with nobody.
        c: ``N`` coefficients.
        election: Whose mass decides: ``"mass"`` of the rows themselves (the paper's, so that
            signs depend on no coefficient), ``"weighted_mass"`` of ``c_n t_n`` (mergekit's), or
            ``"count"``, the more frequent sign. Ties go to plus.
        normalisation: Divide by the number of rows that agree (``"agreeing"``, the paper's), by
            the sum of their coefficients (``"weights"``, mergekit's ``normalize``), or by nothing
            (``"none"``).
        empty: Where temporary tensors come from.

    Returns:
        ``n`` numbers.
    """
    c = c.to(rows)
    ones = torch.ones_like(c)
    n = rows.shape[1]
    total = weighted_sum(rows, c, empty=empty)
    part = empty(n, dtype=rows.dtype, device=rows.device)
    side = empty(n, dtype=rows.dtype, device=rows.device)
    spare = empty(*rows.shape, dtype=rows.dtype, device=rows.device)
    weighted = election == "weighted_mass"
    if weighted:
        mass = total
    elif election == "mass":
        mass = torch.mv(rows.t(), ones, out=part)
    else:
        mass = torch.mv(torch.sign(rows, out=spare).t(), ones, out=part)
    # +1 where the mass is at least zero and else -1: -0 becomes 0 by adding it.
    torch.copysign(side.fill_(1.0), mass.add_(0.0), out=side)
    # sign(c t) is the side where sign t is sign(c) times the side.
    toward = c.abs() if weighted else c
    torch.mv(torch.abs(rows, out=spare).t(), toward, out=part)
    total.addcmul_(part, side).mul_(0.5)
    if normalisation == "none":
        return total
    # [sign t = s] = (|sign t| + s sign t) / 2, summed with the weights to divide by.
    by = c if normalisation == "weights" else ones
    toward = by * c.sign() if weighted else by
    if weighted:
        by = by * c.sign().abs()  # c t is zero where c is, and agrees with nobody
    torch.sign(rows, out=spare)
    torch.mv(spare.t(), toward, out=part)
    side.mul_(part)
    torch.mv(spare.abs_().t(), by, out=part)
    share = side.add_(part).mul_(0.5)
    # Where nobody agrees, or weights cancel, there is nothing to divide by.
    if normalisation == "agreeing":
        return total.div_(share.clamp_min_(1.0))
    return total.div_(torch.where(share.abs() > _LEAST, share, 1.0))
