"""Singular vectors and orthogonal factors of matrices, through the smaller of their Gram matrices.

Of ``rows x columns`` the symmetric matrix of the shorter side is decomposed, in float64: two to
three times faster than a singular value decomposition of the whole. Singular values that are small
beside the largest one lose digits by that: one of ``10^-k`` of it is known to ``10^(2k - 16)``.
Float32 weights tell no more, so what lies below ``LEAST`` counts as zero, and has no vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.merging.adapters.low_rank import LowRank, stack

__all__ = [
    "LEAST",
    "Change",
    "Spectrum",
    "add_changes",
    "inverse_root",
    "leading",
    "length_of",
    "orthogonal_factor",
    "without_columns",
]

LEAST = 1e-5
"""Share of the largest singular value below which one is what rounding left of zero."""

Change = Tensor | LowRank
"""A change of a matrix: the matrix itself (any floating dtype), or its factors."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values and vectors: the matrix is ``U diag(s) V^T``.

    Attributes:
        U: ``rows x k``, orthonormal columns, float64.
        s: ``k``, descending.
        V: ``columns x k``, orthonormal columns.
    """

    U: Tensor
    s: Tensor
    V: Tensor


def leading(change: Change, most: int | None = None, *, scale: float = 0.0) -> Spectrum:
    """Return the largest singular values that are not zero, and their vectors.

    Args:
        change: ``rows x columns``.
        most: How many at most; by default all.
        scale: A length beside which singular values are judged to be zero, where it is larger than
            the largest of them: that of what this is a remainder of.
    """
    if isinstance(change, LowRank):
        return _leading_of_factors(change, most, scale)
    matrix = change.double()
    tall = matrix.shape[0] >= matrix.shape[1]
    matrix = matrix if tall else matrix.mT
    values, vectors = torch.linalg.eigh(matrix.mT @ matrix)
    s = values.clamp_min(0).sqrt().flip(0)
    keep = _counted(s, most, scale)
    s, V = s[:keep], vectors.flip(1)[:, :keep]
    U = (matrix @ V) / s
    return Spectrum(U, s, V) if tall else Spectrum(V, s, U)


def _leading_of_factors(change: LowRank, most: int | None, scale: float) -> Spectrum:
    Q, R = torch.linalg.qr(change.scale * change.B.double())
    P, S = torch.linalg.qr(change.A.double().mT)
    U, s, Vh = torch.linalg.svd(R @ S.mT, full_matrices=False)
    keep = _counted(s, most, scale)
    return Spectrum(Q @ U[:, :keep], s[:keep], P @ Vh[:keep].mT)


def _counted(s: Tensor, most: int | None, scale: float) -> int:
    found = int((s > LEAST * max(float(s[0]), scale)).sum()) if len(s) else 0
    return found if most is None else min(found, most)


def inverse_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse square root of a Gram matrix ``X^T X``, and the singular values of ``X``.

    ``X (X^T X)^(-1/2)`` is the orthogonal factor ``U V^T`` of ``X``. Directions in which ``X`` is
    zero get no inverse and stay zero.

    Args:
        gram: ``k x k``, symmetric, float64.

    Returns:
        ``k x k``, and the singular values that are not zero.
    """
    values, vectors = torch.linalg.eigh(gram)
    s = values.clamp_min(0).sqrt()
    kept = s > LEAST * s.max() if len(s) else s > 0
    s, V = s[kept], vectors[:, kept]
    return (V / s) @ V.mT, s


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return ``U V^T`` of a matrix ``U diag(s) V^T``: the nearest with orthonormal columns or rows.

    That is the solution of the orthogonal Procrustes problem (Schoenemann, *A generalized solution
    of the orthogonal Procrustes problem*, Psychometrika 31, 1966). Directions in which the matrix
    is zero stay zero.

    Args:
        matrix: ``rows x columns`` in float64.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return matrix @ inverse_root(matrix.mT @ matrix)[0]
    return inverse_root(matrix @ matrix.mT)[0] @ matrix


def add_changes(changes: Sequence[Change]) -> Change:
    """Return the sum of changes of one matrix; of factors as factors."""
    factors = [change for change in changes if isinstance(change, LowRank)]
    if len(factors) == len(changes):
        return stack(factors)
    return torch.stack([_dense(change) for change in changes]).sum(0)


def length_of(change: Change) -> float:
    """Return the Frobenius norm of a change."""
    if isinstance(change, LowRank):
        B, A = change.B.double(), change.A.double()
        square = float(((B.mT @ B) * (A @ A.mT)).sum())
        return abs(change.scale) * math.sqrt(max(square, 0.0))
    return float(change.double().norm())


def without_columns(change: Change, U: Tensor) -> Change:
    """Return a change without its part in the span of orthonormal columns: ``X - U U^T X``."""
    if isinstance(change, LowRank):
        B = change.B.double()
        return LowRank(B - U @ (U.mT @ B), change.A.double(), change.scale)
    matrix = change.double()
    return matrix - U @ (U.mT @ matrix)


def _dense(change: Change) -> Tensor:
    if isinstance(change, LowRank):
        return LowRank(change.B.double(), change.A.double(), change.scale).dense()
    return change.double()
