"""TSV-M: the leading singular vectors of all task vectors, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from map_bo.merging.adapters.low_rank import LowRank
from map_bo.operators.searchable import share as require_share
from map_bo.operators.spectral.matrices import ReadyOperator
from map_bo.operators.spectral.singular import Change, leading, orthogonal_factor

__all__ = ["TSVM", "task_singular_vectors"]


@dataclass(frozen=True, kw_only=True)
class TSVM(ReadyOperator):
    r"""Task Singular Vectors, merged.

    Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*, arXiv
    2412.00081, TSV-Merge. Of each task vector ``V_n`` of a matrix only the
    leading ``k`` singular vectors stay, ``U_n diag(s_n) W_n^T``. Those of all experts side by side
    are made orthonormal by the nearest such matrix (Procrustes), ``U' = [U_1' .. U_N']`` and
    ``W'``, and the merge is ``theta_0 + sum_n c_n U_n' diag(s_n) W_n'^T``. With all coefficients
    equal it is the paper's, whose coefficient is 1.

    The vectors depend on no coefficient, so candidates cost what task arithmetic costs. A single
    coefficient of 1 is not that expert, of which no more than ``k`` vectors are left.

    Attributes:
        share: Share of the singular vectors of each task vector that stays, at least one; None is
            ``1 / N``, the paper's, with which all of them fit into the matrix.
        skip: See `SpectralOperator`.
        others: See `SpectralOperator`.
        blocks: See `SearchableOperator`.
    """

    name: ClassVar[str] = "tsv_m"

    share: float | None = None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        super().check(settings)
        if settings["share"] is not None:
            require_share("share", settings["share"])

    def ready(self, changes: Sequence[Change]) -> list[LowRank]:
        """Return the ready matrices; see `task_singular_vectors`."""
        return task_singular_vectors(changes, self.share)


def task_singular_vectors(changes: Sequence[Change], share: float | None = None) -> list[LowRank]:
    """Return ``U_n' diag(s_n) W_n'^T`` for each of ``N`` changes of a matrix; see `TSVM`.

    Singular vectors to the value zero are none, and are left out: a decomposition would return
    any, and they would turn the others.

    Args:
        changes: ``N`` changes, ``rows x columns``.
        share: Share of the singular vectors that stays; None is ``1 / N``.
    """
    size = min(_shape(changes[0]))
    keep = size // len(changes) if share is None else int(share * size)
    found = [leading(change, max(1, keep)) for change in changes]
    U = orthogonal_factor(torch.cat([each.U for each in found], dim=1))
    V = orthogonal_factor(torch.cat([each.V for each in found], dim=1))
    counts = [len(each.s) for each in found]
    parts = zip(found, torch.split(U, counts, dim=1), torch.split(V, counts, dim=1), strict=True)
    return [LowRank(u * each.s, v.mT) for each, u, v in parts]


def _shape(change: Change) -> tuple[int, int]:
    if isinstance(change, LowRank):
        return change.B.shape[0], change.A.shape[1]
    return change.shape[0], change.shape[1]
