"""KnOTS: task vectors are turned into one basis, merged there, and turned back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.align.layout import FlatLayout, Slot
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas, HasFactors
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.operators.sparse import Ties
from map_bo.operators.spectral.matrices import changes_of, is_matrix, require_pattern
from map_bo.operators.spectral.shared_results import KEPT, SharedResults
from map_bo.operators.spectral.singular import Change, leading

__all__ = ["AlignedVectors", "KnOTS", "align"]

_PIECE = 1 << 20
_ANEW = 2  # matrices whose bases and parts are made anew, and then kept for a while


@dataclass(frozen=True, kw_only=True)
class KnOTS(Ties):
    r"""TIES in the basis that the task vectors share: for LoRA adapters above all.

    Stoica et al., *Model Merging with SVD to Tie the KnOTS*, arXiv 2410.19735. The task vectors of
    a matrix side by side, ``[V_1 .. V_N] = U diag(s) [W_1 .. W_N]^T``, have one basis ``U`` and a
    part ``diag(s) W_n^T`` each. Those parts, in which equal directions lie at equal places, are
    merged as TIES merges task vectors (`joining="elect"`), or are only trimmed and summed
    (`joining="sum"`), and the merge is ``theta_0 + U`` times the result. With ``joining="sum"`` and
    a density of 1 it is task arithmetic, since turning is linear.

    The basis and the parts depend on no coefficient and are kept. Those of adapters are made from
    their factors and stay of low rank; tensors that no expert changes are not ranked. All tensors
    that are no matrices are merged by TIES as they are.

    Attributes:
        weighted: Whether parts are multiplied by the singular values before they are merged (as
            the authors' code does: parts are then on the scale of the task vectors) or after.
        skip: Regular expression that is searched for in names of tensors: matrices that are merged
            by TIES as they are. None skips none.
        density: See `Ties`; of the numbers of the parts.
        trim: See `Ties`.
        joining: See `Ties`.
        election: See `Ties`.
        normalisation: See `Ties`.
        scale: See `Ties`.
        blocks: See `SearchableOperator`.
        search: See `SearchableOperator`.
    """

    name: ClassVar[str] = "knots"

    weighted: bool = True
    skip: str | None = None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        super().check(settings)
        require_pattern("skip", settings["skip"])
        if not isinstance(settings["weighted"], bool):
            raise MergeError(
                f"weighted must be true or false, got {settings['weighted']!r}",
                hint="true is what the authors' code does",
            )

    def kernel(self, deltas: Deltas) -> Kernel:
        """Find the bases, then thresholds or sketches of the parts."""
        aligned = AlignedVectors(deltas, self.skip, self.weighted)
        return _Turned(super().kernel(aligned), aligned)


def align(changes: Sequence[Change], weighted: bool = True) -> tuple[Tensor, Tensor]:
    """Return the shared basis of changes of a matrix, and their parts in it; see `KnOTS`.

    Args:
        changes: ``N`` changes, ``rows x columns``.
        weighted: Whether the singular values are with the parts, or with the basis.

    Returns:
        ``rows x R`` and ``N x R x columns``, in float64: the changes are their products. ``R``
        counts the singular values that are not zero.
    """
    factors = [change for change in changes if isinstance(change, LowRank)]
    if len(factors) == len(changes):
        U, s = _basis_of_factors(factors)
        parts = torch.stack([_part(U, change) for change in factors])
    else:
        dense = [_dense(change) for change in changes]
        found = leading(torch.cat(dense, dim=1))
        U, s = found.U, found.s
        parts = torch.stack([U.mT @ change for change in dense])
    return (U, parts) if weighted else (U * s, parts / s[:, None])


def _basis_of_factors(changes: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    # Side by side the changes are [B_1 .. B_N] times the A_n on a diagonal, Q R times them.
    Q, R = torch.linalg.qr(torch.cat([each.scale * each.B.double() for each in changes], dim=1))
    parts = torch.split(R, [each.rank for each in changes], dim=1)
    both = zip(parts, changes, strict=True)
    spread = [r @ torch.linalg.qr(each.A.double().mT).R.mT for r, each in both]
    small = leading(torch.cat(spread, dim=1))
    return Q @ small.U, small.s


def _part(U: Tensor, change: LowRank) -> Tensor:
    return (change.scale * (U.mT @ change.B.double())) @ change.A.double()


def _dense(change: Change) -> Tensor:
    if isinstance(change, LowRank):
        return (change.scale * change.B.double()) @ change.A.double()
    return change.double()


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix in its basis, ``rows x R``, and its parts, ``N x (R columns)``, where kept."""

    rank: int
    columns: int
    kept: tuple[Tensor, Tensor] | None


class AlignedVectors:
    """Task vectors in their shared bases: a :class:`~map_bo.merging.vectors.operator.Deltas`.

    The tensors are those of the given task vectors, in their order: of a matrix ``R x columns``
    parts over a base of zeros; of a tensor that no expert changes nothing; all else as it is. Parts
    are kept where the task vectors are resident, and where they take less than the matrix does (as
    those of adapters); else they are made anew for every use.

    Args:
        deltas: The task vectors.
        skip: Regular expression of matrices that stay as they are.
        weighted: See `KnOTS`.
    """

    def __init__(self, deltas: Deltas, skip: str | None = None, weighted: bool = True) -> None:
        self._deltas, self._weighted = deltas, weighted
        self.threads = deltas.threads
        self.aligned: dict[int, _Matrix] = {}
        self._anew: SharedResults[tuple[Tensor, Tensor]] = SharedResults(_ANEW)
        self.given = deltas.layout
        given = self.given.slots
        slots: list[Slot] = list(given)

        def find(index: int, _: None) -> None:
            slot = given[index]
            shape = torch.Size((0,))
            if is_matrix(slot, skip):
                self.aligned[index] = found = self._find(index)
                shape = torch.Size((found.rank, slot.shape[1]))
            elif self._changes(index):
                return
            slots[index] = Slot(slot.name, shape, 0, torch.float32)

        order = sorted(range(len(given)), key=lambda i: -given[i].numel)
        parallel_for(find, order, lambda: None, threads=deltas.threads)
        self.layout = FlatLayout(tuple(slots))

    @property
    def experts(self) -> tuple[str, ...]:
        """``N`` names."""
        return self._deltas.experts

    @property
    def device(self) -> torch.device:
        """Where pieces are."""
        return self._deltas.device

    @property
    def resident(self) -> bool:
        """As the task vectors; see `Deltas`."""
        return self._deltas.resident

    @property
    def in_place(self) -> bool:
        """False; see `Deltas`."""
        return False

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the elements ``start`` to ``stop`` of parts, or of what is no matrix."""
        found = self.aligned.get(slot)
        if found is None:
            return self._deltas.read(slot, start, stop, out)
        rows = out
        if rows is None:
            rows = torch.empty(1 + len(self.experts), stop - start, device=self.device)
        rows[0].zero_()
        rows[1:].copy_(self.basis_and_parts(slot)[1][:, start:stop])
        return rows

    def basis_and_parts(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return ``rows x R`` and ``N x (R columns)`` of a matrix, in float32."""
        kept = self.aligned[slot].kept
        return self._anew.get((slot,), lambda: self._parts(slot)) if kept is None else kept

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Do nothing: no part is a variance; see `Deltas`."""

    def _find(self, index: int) -> _Matrix:
        slot = self._deltas.layout.slots[index]
        basis, parts = self._parts(index)
        small = basis.numel() + parts.numel() <= slot.numel
        kept = (basis, parts) if self._deltas.resident or small else None
        return _Matrix(basis.shape[1], slot.shape[1], kept)

    def _parts(self, index: int) -> tuple[Tensor, Tensor]:
        basis, parts = align(changes_of(self._deltas, index), self._weighted)
        return basis.float(), parts.flatten(1).float()

    def _changes(self, index: int) -> bool:
        """Return whether any expert changes a tensor."""
        slot, deltas = self._deltas.layout.slots[index], self._deltas
        if isinstance(deltas, HasFactors):
            factors = deltas.factors(index)
            if len(factors) == len(self.experts) and not any(f.rank for f in factors.values()):
                return False
        return any(
            bool(deltas.read(index, at, min(at + _PIECE, slot.numel))[1:].any())
            for at in range(0, slot.numel, _PIECE)
        )


class _Turned(Kernel):
    """A kernel on parts, whose results are turned back."""

    def __init__(self, inner: Kernel, vectors: AlignedVectors) -> None:
        self._inner, self._vectors = inner, vectors
        self._merged: SharedResults[Tensor] = SharedResults()

    def at(self, settings: Mapping[str, float]) -> Kernel:
        if not settings:
            return self
        other = copy.copy(self)
        other._inner, other._merged = self._inner.at(settings), SharedResults()
        return other

    def unit(self, slot: int) -> int:
        found = self._vectors.aligned.get(slot)
        return self._inner.unit(slot) if found is None else found.columns

    def room(self, experts: int) -> int:
        return self._inner.room(experts)

    def overhead(self, threads: int) -> int:
        experts, slots = len(self._vectors.experts), self._vectors.given.slots
        aligned = self._vectors.aligned
        parts = max((each.rank * each.columns for each in aligned.values()), default=0)
        # Parts that are merged, with what that takes in each thread, and results that are kept;
        # where parts are made anew also those, and whole matrices in float64.
        each = (self._inner.room(experts) + 4 * (1 + experts)) * threads + 4 * KEPT
        anew = max((slots[i].numel for i, each in aligned.items() if each.kept is None), default=0)
        return parts * each + anew * (1 + experts) * (4 * _ANEW + 32 * threads)

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        found = self._vectors.aligned.get(slot)
        if found is None:
            if not self._vectors.layout.slots[slot].numel:
                return rows[0].clone()
            return self._inner.piece(rows, slot, start, c)
        merged = self._merged.get((slot, *c.tolist()), lambda: self._merge(slot, found, c))
        top = start // found.columns
        basis = self._vectors.basis_and_parts(slot)[0]
        basis = basis[top : top + rows.shape[1] // found.columns]
        return torch.addmm(rows[0].view(len(basis), -1), basis, merged).flatten()

    def _merge(self, slot: int, found: _Matrix, c: Tensor) -> Tensor:
        numel = found.rank * found.columns
        if not numel:
            return torch.zeros(0, found.columns, device=self._vectors.device)
        parts = self._vectors.read(slot, 0, numel)
        return self._inner.piece(parts, slot, 0, c).clone().view(-1, found.columns)
