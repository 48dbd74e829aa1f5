"""Joining sparse task vectors: their sum, or the mean of those that agree on a sign.

Pure functions on pieces ``N x n`` in float32, made of few operations on whole pieces.
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
    weighted = election == "weighted_mass"
    side = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    signed = empty(*rows.shape, dtype=rows.dtype, device=rows.device)
    if weighted:
        torch.mv(rows.t(), c, out=side)
    elif election == "mass":
        torch.mv(rows.t(), torch.ones_like(c), out=side)
    else:
        torch.mv(torch.sign(rows, out=signed).t(), torch.ones_like(c), out=side)
    # +1 where the mass is at least zero and else -1. Selecting by a mask of booleans is ten times
    # slower than any of these.
    torch.ge(side, 0.0, out=side).mul_(2.0).sub_(1.0)
    # What is positive here agrees. sign(c t) is the side where sign t is sign(c) times the side;
    # c t is zero where c is, and agrees with nobody.
    toward = c.sign() if weighted else torch.ones_like(c)
    torch.mul(rows, side, out=signed)
    if weighted and not bool((c > 0).all()):
        signed.mul_(toward[:, None])
    signed.clamp_min_(0.0)
    total = weighted_sum(signed, c * toward, empty=empty).mul_(side)
    if normalisation == "none":
        return total
    signed.sign_()
    share = torch.mv(signed.t(), c if normalisation == "weights" else torch.ones_like(c), out=side)
    # Where nobody agrees, or weights cancel, there is nothing to divide by.
    if normalisation == "agreeing":
        return total.div_(share.clamp_min_(1.0))
    some = empty(rows.shape[1], dtype=rows.dtype, device=rows.device)
    torch.gt(torch.abs(share, out=some), _LEAST, out=some)
    return total.div_(share.mul_(some).sub_(some.sub_(1.0)))
