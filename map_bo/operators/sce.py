"""SCE: select where the experts differ, calculate their shares, erase what the minority wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena, parallel_for
from map_bo.operators.searchable import SearchableOperator, share
from map_bo.operators.sparsify import KeptEffects
from map_bo.operators.thresholds import MagnitudeSketch, Scores, sketches, thresholds

__all__ = ["Sce", "energy_shares", "erased_sum", "variances"]

_PIECE = 1 << 18
_FEW = 0.25  # densities up to which what is kept takes less memory than the task vectors
_LEAST = 1e-30  # below every sum of shares that somebody has


@dataclass(frozen=True, kw_only=True)
class Sce(SearchableOperator):
    r"""SCE: select, calculate, erase, tensor by tensor.

    Wan et al., *FuseChat: Knowledge Fusion of Chat Models*, arXiv 2408.07990. *Select*: of each
    tensor the ``density`` of the numbers whose variance over the experts is largest moves, the
    others stay. *Calculate*: expert ``n`` has the share ``eta_n = |v_n|^2 / sum_k |v_k|^2`` of
    what was selected in the tensor. *Erase*: numbers against the sign of ``sum_n v_n`` are left
    out. What is merged is ``theta_0 + sum_{n in A} c_n eta_n v_n / sum_{n in A} eta_n`` over the
    experts ``A`` that agree with the sign. With all coefficients 1 it is mergekit's ``sce``, from
    which the definition was taken, but for its equal shares where squares are tiny. Coefficients
    are the experts' scales, and the merge is linear in them.

    Attributes:
        density: Share of each tensor's numbers that moves, of those in which the experts differ;
            1 selects all. A searched density costs a second pass per candidate, since the shares
            depend on what is selected.
    """

    name: ClassVar[str] = "sce"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.05, 1.0)}

    density: float = 0.1

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        share("density", settings["density"])

    def kernel(self, deltas: Deltas) -> Kernel:
        """Rank the variances, and measure the experts' shares of what is selected."""
        scores = Scores(deltas, ("variance",), lambda rows: variances(rows[1:])[None])
        counts = _count_different(scores)
        if "density" in self.search:
            found = tuple(row[0] for row in sketches(scores, "tensor"))
            kernel = _Selected(deltas, counts, found, (), torch.empty(0))
            return kernel.at({"density": self.density})
        limits = tuple(row[0] for row in thresholds(scores, self.density, "tensor", counts=counts))
        limits = _bounded(limits, counts, self.density)
        kernel = _Selected(deltas, counts, None, limits, energy_shares(deltas, limits))
        # Adapters take far less memory than what they change, so pieces are merged as they are.
        if deltas.resident and deltas.in_place and self.density <= _FEW:
            return KeptEffects(deltas, kernel.effects)
        return kernel


@dataclass(frozen=True, eq=False)
class _Selected(Kernel):
    deltas: Deltas
    counts: tuple[int, ...]
    found: tuple[MagnitudeSketch, ...] | None
    limits: tuple[float, ...]
    shares: Tensor

    def at(self, settings: Mapping[str, float]) -> Kernel:
        if self.found is None or "density" not in settings:
            return self
        density = settings["density"]
        limits = tuple(
            sketch.threshold(density * count / max(sketch.total, 1))
            for sketch, count in zip(self.found, self.counts, strict=True)
        )
        limits = _bounded(limits, self.counts, density)
        return replace(self, limits=limits, shares=energy_shares(self.deltas, limits))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        limit, empty = self.limits[slot], arena.empty
        out = arena.empty(rows.shape[1], device=rows.device)
        if limit == math.inf:
            return out.copy_(rows[0])
        chosen = self._chosen(rows[1:], limit)
        return torch.add(erased_sum(chosen, c, self.shares[slot], empty=empty), rows[0], out=out)

    def effects(self, rows: Tensor, slot: int) -> Tensor:
        """Return what each expert adds for a coefficient of 1, ``N x n``."""
        if self.limits[slot] == math.inf:
            return torch.zeros_like(rows[1:])
        chosen = self._chosen(rows[1:], self.limits[slot])
        experts = torch.eye(len(chosen), dtype=torch.float64)
        parts = [erased_sum(chosen, each, self.shares[slot]) for each in experts]
        return torch.stack(parts)

    def _chosen(self, deltas: Tensor, limit: float) -> Tensor:
        if limit <= 0:
            return deltas
        mask = variances(deltas, empty=arena.empty)
        torch.ge(mask, limit, out=mask)
        return torch.mul(deltas, mask, out=arena.empty(*deltas.shape, device=deltas.device))


def variances(rows: Tensor, *, empty: Empty = torch.empty) -> Tensor:
    """Return the variance of each column of ``N x n`` numbers (``n``).

    Exactly 0 where all are equal: deviations are taken from the first row.
    """
    like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    result, total = empty(rows.shape[1], **like).zero_(), empty(rows.shape[1], **like).zero_()
    gap = empty(rows.shape[1], **like)
    for row in rows[1:]:
        torch.sub(row, rows[0], out=gap)
        total.add_(gap)
        result.addcmul_(gap, gap)
    total.div_(len(rows))
    return result.div_(len(rows)).addcmul_(total, total, value=-1.0).clamp_min_(0.0)


def erased_sum(rows: Tensor, c: Tensor, shares: Tensor, *, empty: Empty = torch.empty) -> Tensor:
    """Return the weighted mean of the rows that have the sign of their sum; see `Sce`.

    Args:
        rows: ``N x n`` selected task vectors.
        c: ``N`` coefficients.
        shares: ``N`` shares of the experts, float64.
        empty: Where temporary tensors come from.

    Returns:
        ``n`` numbers; 0 where no row has the sign.
    """
    size = rows.shape[1]
    like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    side, agreeing = empty(size, **like), empty(*rows.shape, **like)
    torch.mv(rows.t(), torch.ones(len(rows), **like), out=side)
    torch.ge(side, 0.0, out=side).mul_(2.0).sub_(1.0)
    torch.mul(rows, side, out=agreeing).clamp_min_(0.0)
    total = torch.mv(agreeing.t(), (c * shares).to(rows), out=empty(size, **like)).mul_(side)
    torch.mv(agreeing.sign_().t(), shares.to(rows), out=side)
    return total.div_(side.clamp_min_(_LEAST))


def energy_shares(deltas: Deltas, limits: Sequence[float]) -> Tensor:
    """Return the experts' shares of the squares of what is selected, ``S x N`` in float64.

    Args:
        deltas: ``N`` task vectors of ``S`` tensors; read once.
        limits: For each tensor the variance from which numbers are selected.

    Returns:
        Rows that sum to 1; equal shares where nothing moves.
    """
    slots, experts = deltas.layout.slots, len(deltas.experts)
    squares = torch.zeros(len(slots), experts, dtype=torch.float64)

    def measure(slot: int, _: None) -> None:
        for start in range(0, slots[slot].numel, _PIECE):
            if limits[slot] == math.inf:
                return
            part = deltas.read(slot, start, min(start + _PIECE, slots[slot].numel))[1:]
            chosen = part * (variances(part) >= limits[slot])
            squares[slot] += chosen.double().square().sum(1).cpu()

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(measure, order, lambda: None, threads=deltas.threads)
    totals = squares.sum(1, keepdim=True)
    return torch.where(totals > 0, squares / totals, 1 / experts)


def _bounded(limits: Sequence[float], counts: Sequence[int], density: float) -> tuple[float, ...]:
    """Return limits that select nothing where no number differs between the experts."""
    if density >= 1:
        return (0.0,) * len(limits)
    pairs = zip(limits, counts, strict=True)
    # A limit of 0 would take numbers without a variance, too.
    tiny = torch.finfo(torch.float32).tiny
    return tuple(max(limit, tiny) if count else math.inf for limit, count in pairs)


def _count_different(scores: Scores) -> tuple[int, ...]:
    """Return how many numbers of each tensor have a variance."""
    slots = scores.layout.slots
    counts = [0] * len(slots)

    def count(slot: int, _: None) -> None:
        for start in range(0, slots[slot].numel, _PIECE):
            part = scores.read(slot, start, min(start + _PIECE, slots[slot].numel))[1]
            counts[slot] += int(torch.count_nonzero(part))

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(count, order, lambda: None, threads=scores.threads)
    return tuple(counts)
