"""Changes of low rank: ``scale * B @ A``, never multiplied out unless asked for.

Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["LowRank", "approximated", "exact_products", "stacked", "truncated"]

# Up to this length of its shorter side a matrix is decomposed whole, in float64.
_WHOLE = 512
_OVERSAMPLED, _POWER = 16, 4


@dataclass(frozen=True, eq=False)
class LowRank:
    """A change ``scale * B @ A`` of one tensor, seen as a matrix ``rows x columns``.

    A tensor of more dimensions (a convolution) is flattened from its second one on.

    Attributes:
        B: ``rows x r``.
        A: ``r x columns``.
        scale: What the product is multiplied by.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The bound ``r`` of the rank."""
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """Return the change multiplied out, ``rows x columns``."""
        return (self.scale * self.B) @ self.A

    def piece(self, start: int, stop: int) -> Tensor:
        """Return the elements ``start`` to ``stop``, row-major; only their rows are multiplied."""
        columns = self.A.shape[1]
        if start >= stop or not self.rank:
            return self.A.new_zeros(stop - start)
        top, bottom = start // columns, -(-stop // columns)
        B, A = self.scale * self.B[top:bottom], self.A
        where = slice(start - top * columns, stop - top * columns)
        if bottom - top == 1:  # of one long row no more than the piece
            A, where = A[:, where], slice(None)
        product = B @ A if exact_products(B.device) else (B.double() @ A.double()).to(B.dtype)
        return product.reshape(-1)[where]


def exact_products(device: torch.device) -> bool:
    """Return whether float32 products on this device keep float32's precision.

    A user may have allowed TF32 or bfloat16 inside products, which must not reach the weights.
    """
    if device.type == "cuda":
        return not torch.backends.cuda.matmul.allow_tf32
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("none", "ieee")


def stacked(parts: Sequence[LowRank]) -> LowRank:
    """Return the sum of changes of one tensor as one change; its rank is the sum of theirs."""
    B = torch.cat([part.scale * part.B for part in parts], dim=1)
    return LowRank(B, torch.cat([part.A for part in parts]))


def truncated(change: LowRank, rank: int | None) -> tuple[LowRank, float, float]:
    """Return the best approximation of a change by one of at most ``rank``, with its error.

    By Eckart and Young that is the truncated singular value decomposition. It is found without
    multiplying out: with ``B = Q R`` and ``A^T = P S`` the singular values of ``B A`` are those of
    the small ``R S^T``. In float64. The singular values are shared out evenly: both factors get
    their roots.

    Args:
        change: What to approximate.
        rank: Largest rank; None keeps all singular values above rounding.

    Returns:
        The approximation with scale 1, in float32, of rank at least 1; the Frobenius norm of what
        was cut off; and that of the whole change.
    """
    Q, R = torch.linalg.qr(change.scale * change.B.double())
    P, S = torch.linalg.qr(change.A.double().T)
    U, values, Vh = torch.linalg.svd(R @ S.T, full_matrices=False)
    # What float32 factors cannot tell from zero is no rank.
    least = float(values[0]) * torch.finfo(torch.float32).eps if len(values) else 0.0
    keep = max(1, int((values > least).sum()))
    keep = keep if rank is None else min(keep, rank)
    roots = values[:keep].sqrt()
    B = (Q @ (U[:, :keep] * roots)).float()
    A = ((roots[:, None] * Vh[:keep]) @ P.T).float()
    return LowRank(B, A), float(values[keep:].norm()), float(values.norm())


def approximated(
    matrix: Tensor, rank: int, *, generator: Generator
) -> tuple[LowRank, float, float]:
    """Return an approximation of a matrix by one of at most ``rank``, with its error.

    Small matrices go through their singular value decomposition. Large ones, of which few
    singular vectors are wanted, go through a randomised range finder with power iterations
    (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). The error is measured
    either way.

    Args:
        matrix: ``rows x columns``.
        rank: Largest rank.
        generator: Draws the random directions, where there are any.

    Returns:
        The approximation with scale 1, in float32; the Frobenius norm of the error; and that of
        the matrix.
    """
    wide = matrix.double() if min(matrix.shape) <= _WHOLE else matrix.float()
    size = rank + _OVERSAMPLED
    if min(matrix.shape) <= _WHOLE or 4 * size > min(matrix.shape):
        U, values, Vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        draws = torch.randn(wide.shape[1], size, generator=generator, dtype=wide.dtype)
        Q = torch.linalg.qr(wide @ draws.to(wide.device)).Q
        for _ in range(_POWER):
            Q = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ Q).Q).Q
        small, values, Vh = torch.linalg.svd(Q.T @ wide, full_matrices=False)
        U = Q @ small
    roots = values[:rank].sqrt()
    change = LowRank((U[:, :rank] * roots).float(), (roots[:, None] * Vh[:rank]).float())
    return change, float((wide - change.dense()).norm()), float(wide.norm())
