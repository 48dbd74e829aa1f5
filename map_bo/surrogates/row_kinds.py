"""Bayesian linear regression on rows of several kinds, each kind with a nugget of its own.

It is the regression of :mod:`map_bo.surrogates.evidence` where values and derivatives of one
function are observed together. A derivative has another unit than a value and another misfit: a
function that strays from the model by little may do so steeply. So ``e_i ~ N(0, v_i + t_k(i))``
with ``k(i)`` the kind of row ``i``, and ``theta = (log t_1 .. log t_T, log s_1 .. log s_G)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.surrogates.evidence import InWeightSpace

__all__ = ["RowKinds", "leave_blocks_out"]

# The least share of its own variance that a block keeps when it is left out.
_LEAST_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class RowKinds(InWeightSpace):
    """:class:`~map_bo.surrogates.evidence.Regression` with ``T`` kinds of rows.

    Through ``D x D`` matrices, also where rows are fewer than features.

    Attributes:
        kinds: ``n`` index of each row's kind, ``0 .. T-1``, every kind at least once.
    """

    kinds: Tensor

    @property
    def nuggets(self) -> int:
        """The number ``T`` of kinds."""
        return int(self.kinds.max()) + 1

    def variances(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return total noise variances (``... x n``) and log prior variances (``... x G``)."""
        nuggets = theta[..., : self.nuggets].exp()
        return self.known + nuggets[..., self.kinds], theta[..., self.nuggets :]

    def derivatives(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient and Hessian of the cost.

        With ``K_k = t_k I_k``, ``I_k`` the identity on the rows of kind ``k``, the formulas are
        those of one nugget with the sums over rows taken kind by kind.
        """
        at = self.solve(theta)
        A, N, u = at.design, at.noise, at.weights
        T = self.nuggets
        of_kind = (torch.arange(T).unsqueeze(-1) == self.kinds).to(theta)  # T x n
        groups = theta.shape[-1] - T
        member = (self.groups.unsqueeze(-1) == torch.arange(groups)).to(theta)  # D x G
        inverse = torch.cholesky_inverse(at.cholesky)
        inside = torch.eye(A.shape[-1], dtype=A.dtype) - inverse  # A' P A
        weighted = A / N.unsqueeze(-1)
        Q = inverse @ weighted.mT  # A' P
        # P = N^-1 - weighted Q, whose n x n entries are never written out.
        taken = (weighted * Q.mT).sum(-1)
        a = at.residual / N
        t = theta[..., :T].exp()
        by_group = 0.5 * (inside.diagonal(dim1=-1, dim2=-2) - u.square()) @ member
        by_nugget = 0.5 * t * ((1 / N - taken - a.square()) @ of_kind.mT)
        gradient = torch.cat([by_nugget, by_group], -1)
        block = u.unsqueeze(-1) * inside * u.unsqueeze(-2) - 0.5 * inside.square()
        block = member.mT @ block @ member
        right = (of_kind * a.unsqueeze(-2)) @ weighted  # ... x T x D, weighted' I_k a
        Qa = right @ inverse
        border = u.unsqueeze(-2) * Qa - 0.5 * (of_kind @ Q.square().mT)
        border = t.unsqueeze(-1) * (border @ member)
        parts = of_kind.unsqueeze(-1) * weighted.unsqueeze(-3)
        gram = inverse.unsqueeze(-3) @ (parts.mT @ weighted.unsqueeze(-3))
        diagonal = N.reciprocal() * (N.reciprocal() - 2 * taken)
        norms = torch.diag_embed(diagonal @ of_kind.mT)
        norms = norms + gram.flatten(-2) @ gram.mT.flatten(-2).mT
        corner = torch.diag_embed((a * a / N) @ of_kind.mT) - Qa @ right.mT - 0.5 * norms
        corner = t.unsqueeze(-1) * corner * t.unsqueeze(-2)
        hessian = torch.cat(
            [torch.cat([corner, border], -1), torch.cat([border.mT, block], -1)], -2
        )
        return gradient, hessian + torch.diag_embed(gradient)


def leave_blocks_out(
    half: Tensor, noise: Tensor, residual: Tensor, blocks: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Return what the other rows say about the first row of each block.

    With ``H = h h'`` the posterior covariance of the model at a block's rows, ``N`` their noise and
    ``r`` their residuals, the posterior without the block has residuals
    ``N^(1/2) (I - W)^-1 N^(-1/2) r`` and covariance ``N^(1/2) ((I - W)^-1 - I) N^(1/2)`` there,
    ``W = N^(-1/2) H N^(-1/2)``.

    Args:
        half: ``m x n x D``, ``h``.
        noise: ``m x n`` total noise variances.
        residual: ``m x n`` targets minus posterior means.
        blocks: Rows of each of ``b`` blocks.

    Returns:
        ``m x b`` residuals and ``m x b`` posterior variances of the first rows.
    """
    residuals, variances = [], []
    for rows in blocks:
        deviation = noise[:, rows].sqrt()
        scaled = half[:, rows] / deviation.unsqueeze(-1)
        share, axes = torch.linalg.eigh(scaled @ scaled.mT)
        kept = (1 - share).clamp_min(_LEAST_SHARE)
        first = axes[:, 0]  # the first row in terms of the axes
        r = (axes.mT @ (residual[:, rows] / deviation).unsqueeze(-1)).squeeze(-1)
        residuals.append(deviation[:, 0] * (first * r / kept).sum(-1))
        variances.append(noise[:, rows[0]] * (first.square() * (1 - kept) / kept).sum(-1))
    return torch.stack(residuals, -1), torch.stack(variances, -1)
