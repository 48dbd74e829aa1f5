"""Isotropic merging: all singular values of the merged task vector are made equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas, HasFactors
from map_bo.operators.searchable import share
from map_bo.operators.spectral.matrices import ReadyOperator, SpectralOperator, matrices_of
from map_bo.operators.spectral.shared_results import KEPT, SharedResults
from map_bo.operators.spectral.singular import (
    Change,
    add_changes,
    inverse_root,
    leading,
    length_of,
    orthogonal_factor,
    without_columns,
)

__all__ = ["IsoC", "IsoCTS", "common_and_specific", "flatten"]

_PIECE = 1 << 18  # numbers of a task vector that are in float64 at once


@dataclass(frozen=True, kw_only=True)
class IsoC(SpectralOperator):
    r"""Isotropic merging in the common subspace, Iso-C.

    Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces*, arXiv 2502.04959, Iso-C. The weighted sum of the task
    vectors of a matrix, ``D(c) = sum_n c_n V_n = U diag(s) W^T``, is replaced by
    ``mean(s) U W^T``: the directions stay, none of them dominates.

    No singular value decomposition is needed. ``U W^T = D (D^T D)^(-1/2)`` is the orthogonal factor
    of ``D``, and ``mean(s)`` comes from the same small symmetric matrix ``D^T D`` of the shorter
    side: a candidate takes two products with it and its root, in float64. Nothing is prepared,
    so task vectors need no further memory. Of adapters the factors are made orthonormal once, and
    the matrix to flatten is as small as their ranks. The mean is over the singular values that are
    not zero (`LEAST`): in a matrix of full rank, the paper's case, over all of them.

    The merge is homogeneous: twice the coefficients move the model twice as far. Only their ratios
    decide the directions.

    Attributes:
        skip: See `SpectralOperator`.
        others: See `SpectralOperator`.
        blocks: See `SearchableOperator`.
    """

    name: ClassVar[str] = "iso_c"

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return the kernel; nothing is prepared."""
        return _Flattened(self, deltas)


def flatten(change: Tensor) -> Tensor:
    """Return a matrix with all its singular values replaced by their mean; see `IsoC`.

    Args:
        change: ``rows x columns``, float64.
    """
    tall = change.shape[0] >= change.shape[1]
    root, s = inverse_root(change.mT @ change if tall else change @ change.mT)
    level = s.mean() if len(s) else s.sum()
    return level * (change @ root if tall else root @ change)


class _Flattened(Kernel):
    def __init__(self, operator: IsoC, deltas: Deltas) -> None:
        self._deltas = deltas
        self._matrices = matrices_of(deltas.layout, operator.skip)
        self._others = operator.share_of_others(len(deltas.experts))
        self._roots: SharedResults[Tensor] = SharedResults()
        self._factors = _factored(deltas, self._matrices)

    def whole(self, slot: int) -> bool:
        return slot in self._matrices and not self._is_tall(slot) and slot not in self._factors

    def unit(self, slot: int) -> int:
        return self._shape(slot)[1] if slot in self._matrices else 1

    def overhead(self, threads: int) -> int:
        sides = (min(self._shape(slot)) for slot in self._matrices - self._factors.keys())
        return 8 * max(sides, default=0) ** 2 * (KEPT + 6 * threads) + 64 * _PIECE * threads

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        if slot not in self._matrices:
            return rows.t() @ torch.cat([c.new_ones(1), self._others * c]).to(rows)
        if (factors := self._factors.get(slot)) is not None:
            right = self._roots.get((slot, *c.tolist()), lambda: factors.flattened(c))
            columns = self._shape(slot)[1]
            left = factors.left[start // columns : (start + rows.shape[1]) // columns]
            return torch.addmm(rows[0].view(-1, columns), left, right).flatten()
        if not self._is_tall(slot):
            change = _weighted(rows[1:], c).view(self._shape(slot))
            return rows[0] + flatten(change).flatten().to(rows)
        root = self._roots.get((slot, *c.tolist()), lambda: self._root(slot, c))
        change = _weighted(rows[1:], c).view(-1, self._shape(slot)[1])
        return rows[0] + (change @ root).flatten().to(rows)

    def _root(self, slot: int, c: Tensor) -> Tensor:
        """Return what a tall matrix is multiplied by, in one pass over it."""
        numel, columns = self._deltas.layout.slots[slot].numel, self._shape(slot)[1]
        step = columns * max(1, _PIECE // columns)
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=self._deltas.device)
        for start in range(0, numel, step):
            rows = self._deltas.read(slot, start, min(start + step, numel))
            part = _weighted(rows[1:], c).view(-1, columns)
            gram.addmm_(part.mT, part)
        root, s = inverse_root(gram)
        return root * (s.mean() if len(s) else s.sum())

    def _shape(self, slot: int) -> tuple[int, int]:
        shape = self._deltas.layout.slots[slot].shape
        return shape[0], shape[1]

    def _is_tall(self, slot: int) -> bool:
        rows, columns = self._shape(slot)
        return rows >= columns


@dataclass(frozen=True, eq=False)
class _Factors:
    """The changes of a matrix by adapters: ``left R_B diag(w) R_A^T right^T``, both orthonormal.

    Attributes:
        left: ``rows x k`` in float32.
        R_B: ``k x R``.
        right: ``columns x l``.
        R_A: ``l x R``.
        ranks: ``N`` numbers that sum to ``R``.
    """

    left: Tensor
    R_B: Tensor
    right: Tensor
    R_A: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, changes: Sequence[LowRank]) -> _Factors:
        B = torch.cat([each.scale * each.B.double() for each in changes], dim=1)
        A = torch.cat([each.A.double() for each in changes])
        left, R_B = torch.linalg.qr(B)
        right, R_A = torch.linalg.qr(A.mT)
        ranks = torch.tensor([each.rank for each in changes])
        return cls(left.float(), R_B, right, R_A, ranks)

    def flattened(self, c: Tensor) -> Tensor:
        """Return what ``left`` is multiplied by, ``k x columns`` in float32."""
        weights = c.repeat_interleave(self.ranks).to(self.R_B)
        small = flatten((self.R_B * weights) @ self.R_A.mT)
        return (small @ self.right.mT).float()


def _factored(deltas: Deltas, matrices: frozenset[int]) -> dict[int, _Factors]:
    """Return the matrices that all experts change by factors alone."""
    if not isinstance(deltas, HasFactors):
        return {}
    found: dict[int, _Factors] = {}
    for index in sorted(matrices):
        changes = deltas.factors(index)
        if len(changes) == len(deltas.experts):
            found[index] = _Factors.of([changes[n] for n in range(len(changes))])
    return found


def _weighted(deltas: Tensor, c: Tensor) -> Tensor:
    """Return ``sum_n c_n v_n`` (``n``) of ``N x n`` in float64."""
    result = torch.zeros(deltas.shape[1], dtype=torch.float64, device=deltas.device)
    for row, weight in zip(deltas, c.tolist(), strict=True):
        result.add_(row, alpha=weight)
    return result


@dataclass(frozen=True, kw_only=True)
class IsoCTS(ReadyOperator):
    r"""Isotropic merging in common and task-specific subspaces, Iso-CTS.

    Marczak et al., arXiv 2502.04959, Iso-CTS. Of the sum of the task vectors of
    a matrix the leading ``k`` singular vectors span the common subspace; each expert adds the
    leading ``(r - k) / N`` of what its task vector has outside it, ``V_n - U_k U_k^T V_n``. All of
    them side by side are made orthonormal, ``U' = [U_0' U_1' .. U_N']`` and ``W'``, and all
    singular values are replaced by their mean ``m``: ``theta_0 + a m U' W'^T``.

    The paper has one coefficient ``a`` for all experts. Here the task-specific part of each expert
    has its own, and the common part their mean:
    ``theta_0 + m sum_n c_n (U_n' W_n'^T + U_0' W_0'^T / N)``, which is the paper's where all are
    equal. So vectors depend on no coefficient, and candidates cost what task arithmetic costs.

    Attributes:
        common: ``k`` as a share of the shorter side ``r`` of a matrix, before the rest is rounded
            to a multiple of ``N``. The authors use 0.8.
        skip: See `SpectralOperator`.
        others: See `SpectralOperator`.
        blocks: See `SearchableOperator`.
    """

    name: ClassVar[str] = "iso_cts"

    common: float = 0.8

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        super().check(settings)
        share("common", settings["common"])

    def ready(self, changes: Sequence[Change]) -> list[LowRank]:
        """Return the ready matrices; see `common_and_specific`."""
        return common_and_specific(changes, self.common)


def common_and_specific(changes: Sequence[Change], common: float) -> list[LowRank]:
    """Return ``m (U_n' W_n'^T + U_0' W_0'^T / N)`` for ``N`` changes of a matrix; see `IsoCTS`.

    Directions in which there is no change are no singular vectors, and are left out.

    Args:
        changes: ``N`` changes, ``rows x columns``.
        common: Share of the shorter side that is common.
    """
    total = add_changes(changes)
    rows, columns = (
        (total.B.shape[0], total.A.shape[1]) if isinstance(total, LowRank) else total.shape
    )
    size, experts = min(rows, columns), len(changes)
    # Rounded up, they may be more than there is room for.
    each = min(round((size - int(size * common)) / experts), size // experts)
    shared = leading(total, size - each * experts)
    own = [
        leading(without_columns(change, shared.U), each, scale=length_of(change))
        for change in changes
    ]
    parts = [shared, *own]
    s = torch.cat([part.s for part in parts])
    level = s.mean() if len(s) else s.sum()
    U = orthogonal_factor(torch.cat([part.U for part in parts], dim=1))
    V = orthogonal_factor(torch.cat([part.V for part in parts], dim=1))
    counts = [len(part.s) for part in parts]
    lefts, rights = torch.split(U, counts, dim=1), torch.split(V, counts, dim=1)
    return [
        LowRank(
            level * torch.cat([lefts[0] / experts, left], dim=1),
            torch.cat([rights[0], right], dim=1).mT,
        )
        for left, right in zip(lefts[1:], rights[1:], strict=True)
    ]
