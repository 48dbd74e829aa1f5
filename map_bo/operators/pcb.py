"""PCB: the numbers of the task vectors compete, within each expert and between the experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena, parallel_for
from map_bo.operators.searchable import SearchableOperator, share
from map_bo.operators.sparsify import KeptEffects
from map_bo.operators.thresholds import Scores, sketches, thresholds

__all__ = ["Pcb", "competition"]

_OUTLIERS = 1e-4  # share of the smallest and of the largest magnitudes that are limited
_LINEAR = 2e-4  # below, tanh(x) is x to a relative 1.4e-8
_FEW = 0.25  # densities up to which what is kept takes less memory than the task vectors
_PIECE = 1 << 18
_TINY = float(torch.finfo(torch.float32).tiny)

Limits = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Pcb(SearchableOperator):
    r"""Parameter competition balancing.

    Du et al., *Parameter Competition Balancing for Model Merging*, arXiv 2410.02396. Each number of
    each task vector has a score: by its magnitude within the expert (intra-balancing) and by its
    agreement with the others (inter-balancing). The ``density`` of the numbers with the highest
    scores is kept, by expert over the whole task vector, and their scores become weights. As in the
    authors' published code (github.com/duguodong7/pcb-merging):

    ``beta_n = exp(N norm(|v_n|)^2) tanh(v_n sum_k v_k)``, where ``norm`` takes the smallest
    magnitude of the task vector to 0 and the largest to 1; ``w_n`` is ``beta_n`` with the lowest
    score that the density keeps taken to 0 and the highest to 1; and the merge is
    ``theta_0 + sum_n c_n w_n v_n / sum_n w_n``. The smallest and the largest 0.01 % of the
    magnitudes are limited for the scores, the largest also in the merge. Scores below 0, of numbers
    against the sum, are never kept.

    Coefficients are the paper's ``lambda_n``, which it searches too; all equal they are its
    ``lambda``. The merge is linear in them.

    Where task vectors are resident in float32 and the density is fixed and at most a quarter, what
    each number adds is kept (8 bytes for each), and a candidate adds it up.

    Attributes:
        density: Share of each task vector's numbers that is kept, the paper's ``r``.
    """

    name: ClassVar[str] = "pcb"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"density": (0.02, 0.5)}

    density: float = 0.1

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        share("density", settings["density"])

    def kernel(self, deltas: Deltas) -> Kernel:
        """Find the limits of magnitudes and scores, or sketches of the scores."""
        if not deltas.layout.slots:
            return _Competing((), (), (), (), None)
        low = thresholds(deltas, 1 - _OUTLIERS, "global")[0]
        high = thresholds(deltas, _OUTLIERS, "global")[0]

        def score(rows: Tensor) -> Tensor:
            return competition(rows[1:], low, high)

        scores = Scores(deltas, deltas.experts, score)
        best = _largest(scores)
        if "density" in self.search:
            found = sketches(scores, "global")[0]

            def limits(density: float) -> Limits:
                return tuple(sketch.threshold(density) for sketch in found)

            return _Competing(low, high, limits(self.density), best, limits)
        kernel = _Competing(low, high, thresholds(scores, self.density, "global")[0], best, None)
        # Adapters take far less memory than what they change, so pieces are merged as they are.
        if deltas.resident and deltas.in_place and self.density <= _FEW:
            return KeptEffects(deltas, kernel.effects)
        return kernel


@dataclass(frozen=True)
class _Competing(Kernel):
    low: Limits
    high: Limits
    limits: Limits
    best: Limits
    find: Callable[[float], Limits] | None

    def at(self, settings: Mapping[str, float]) -> Kernel:
        if self.find is None or "density" not in settings:
            return self
        return replace(self, limits=self.find(settings["density"]))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        shares, total = self._weighted(rows[1:])
        out = torch.mv(shares.t(), c.to(rows), out=arena.empty(rows.shape[1], device=rows.device))
        return out.div_(total).add_(rows[0])

    def effects(self, rows: Tensor, slot: int) -> Tensor:
        """Return what each expert adds for a coefficient of 1, ``N x n``."""
        shares, total = self._weighted(rows[1:])
        return shares.div_(total)

    def _weighted(self, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Return the task vectors times their weights (``N x n``), and the sums of weights."""
        weights = competition(deltas, self.low, self.high, empty=arena.empty)
        result = arena.empty(*deltas.shape, device=deltas.device)
        for n, (row, weight, out) in enumerate(zip(deltas, weights, result, strict=True)):
            span = self.best[n] - self.limits[n]
            if span > _TINY:
                weight.sub_(self.limits[n]).clamp_min_(0.0).mul_(1 / span)
            else:  # one number is kept, or several that are alike
                torch.ge(weight, max(self.limits[n], _TINY), out=weight)
            torch.clamp(row, -self.high[n], self.high[n], out=out)
        total = arena.empty(deltas.shape[1], device=deltas.device)
        torch.mv(weights.t(), torch.ones(len(deltas), device=deltas.device), out=total)
        return result.mul_(weights), total.clamp_min_(_TINY)


def competition(rows: Tensor, low: Limits, high: Limits, *, empty: Empty = torch.empty) -> Tensor:
    """Return the scores of ``N x n`` numbers in their competition; see `Pcb`.

    Args:
        rows: ``N x n`` task vectors.
        low: Of each task vector the smallest magnitude that counts; smaller ones count as it.
        high: The largest magnitude that counts.
        empty: Where new tensors come from.

    Returns:
        ``N x n`` scores times ``exp(-N)``, which no weight depends on; 0 where they were negative.
    """
    like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    result, spare = empty(*rows.shape, **like), empty(rows.shape[1], **like)
    total = torch.mv(rows.t(), torch.ones(len(rows), **like), out=empty(rows.shape[1], **like))
    for n, (row, out) in enumerate(zip(rows, result, strict=True)):
        torch.abs(row, out=out).clamp_(low[n], high[n]).sub_(low[n])
        out.mul_(len(rows) ** 0.5 / max(high[n] - low[n], _TINY)).square_().sub_(len(rows)).exp_()
        torch.mul(row, total, out=spare).clamp_min_(0.0)
        # Task vectors are mostly so small that the tangent changes no digit, and it is dear.
        if spare.numel() and float(spare.amax()) > _LINEAR:
            spare.tanh_()
        out.mul_(spare)
    return result


def _largest(scores: Scores) -> Limits:
    """Return the largest of each expert's scores."""
    slots = scores.layout.slots
    best = torch.zeros(len(slots), len(scores.experts))

    def find(slot: int, _: None) -> None:
        for start in range(0, slots[slot].numel, _PIECE):
            part = scores.read(slot, start, min(start + _PIECE, slots[slot].numel))[1:]
            best[slot] = torch.maximum(best[slot], part.amax(1).cpu())

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(find, order, lambda: None, threads=scores.threads)
    return tuple(best.amax(0).tolist())
