"""Reinforced agent merging: sparse task vectors are averaged where they meet, else kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena, parallel_for
from map_bo.operators.searchable import SearchableOperator, number, one_of

__all__ = ["Ram", "count_regions", "merge_regions"]

OVER = ("model", "tensor")
_PIECE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Ram(SearchableOperator):
    r"""Reinforced agent merging (RAM) of task vectors that are sparse, as after RL.

    Yuan et al., *Behavior Knowledge Merge in Reinforced Agentic Models*, arXiv 2601.13572. A number
    is active for expert ``n`` where ``|v_n| > threshold``. Where one expert alone is active
    (*unique*) its number is kept, times ``lambda_n``; where several are (*shared*) those that are
    active are averaged; elsewhere the base stays. What is merged is

    ``theta_0 + [shared] (1 / |A|) sum_{n in A} c_n v_n + [unique] lambda_n c_n v_n``

    with the active experts ``A``, ``lambda_n = 1 + rescale min(rho_n, most)``, and ``rho_n`` the
    number of expert ``n``'s shared numbers over that of its unique ones. So an expert that loses
    much to averages is strengthened where it is alone. With all coefficients 1 and ``rescale=0``
    it is the paper's RAM, with ``rescale > 0`` its RAM+; the definition was taken from mergekit's
    ``ram`` and ``ramplus_tl`` (``over="tensor"``), which name the paper. The merge is linear in
    the coefficients, which are the experts' scales.

    Attributes:
        threshold: The magnitude above which a number is active; 0 for any change at all.
        rescale: ``r``, from 0 (RAM).
        most: ``alpha``, the largest ratio ``rho`` that counts, from 0.
        over: Whether ``rho`` is counted in the whole task vector (``"model"``) or in each tensor
            (``"tensor"``, as mergekit does).
    """

    name: ClassVar[str] = "ram"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {
        "rescale": (0.0, 1.0),
        "most": (0.0, 2.0),
    }

    threshold: float = 1e-5
    rescale: float = 0.1
    most: float = 0.2
    over: str = "model"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        for name in ("threshold", "rescale", "most"):
            number(name, settings[name], least=0.0)
        one_of("over", settings["over"], OVER)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Count the numbers in which each expert is active, alone and with others: one pass."""
        counts = count_regions(deltas, self.threshold)
        if self.over == "model":
            counts = counts.sum(0, keepdim=True).expand_as(counts)
        ratios = counts[..., 0] / counts[..., 1].clamp_min(1)
        return _Regions(ratios, self.threshold, self.rescale, self.most)


@dataclass(frozen=True, eq=False)
class _Regions(Kernel):
    ratios: Tensor
    threshold: float
    rescale: float
    most: float

    def at(self, settings: Mapping[str, float]) -> Kernel:
        rescale = settings.get("rescale", self.rescale)
        return replace(self, rescale=rescale, most=settings.get("most", self.most))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        extra = self.rescale * self.ratios[slot].clamp_max(self.most)
        return merge_regions(rows[1:], c, extra, self.threshold, empty=arena.empty).add_(rows[0])


def merge_regions(
    rows: Tensor, c: Tensor, extra: Tensor, threshold: float, *, empty: Empty = torch.empty
) -> Tensor:
    """Return averages where several rows are active and what is rescaled where one is; see `Ram`.

    Args:
        rows: ``N x n`` task vectors.
        c: ``N`` coefficients.
        extra: ``N`` numbers: ``lambda_n - 1``.
        threshold: Magnitude above which a number is active.
        empty: Where new tensors come from.

    Returns:
        ``n`` numbers.
    """
    size = rows.shape[1]
    like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
    active, count, own = empty(*rows.shape, **like), empty(size, **like), empty(size, **like)
    ones = torch.ones(len(rows), **like)
    torch.mv(torch.gt(torch.abs(rows, out=active), threshold, out=active).t(), ones, out=count)
    active.mul_(rows)
    average = torch.mv(active.t(), c.to(rows), out=empty(size, **like))
    torch.mv(active.t(), (c * extra).to(rows), out=own)
    own.mul_(torch.eq(count, 1.0, out=empty(size, **like)))
    return average.div_(count.clamp_min_(1.0)).add_(own)


def count_regions(deltas: Deltas, threshold: float) -> Tensor:
    """Return how many numbers of each expert are shared and how many unique; see `Ram`.

    Args:
        deltas: ``N`` task vectors of ``S`` tensors; read once.
        threshold: Magnitude above which a number is active.

    Returns:
        ``S x N x 2`` counts in float64: shared, unique.
    """
    slots = deltas.layout.slots
    result = torch.zeros(len(slots), len(deltas.experts), 2, dtype=torch.float64)

    def count(slot: int, _: None) -> None:
        for start in range(0, slots[slot].numel, _PIECE):
            part = deltas.read(slot, start, min(start + _PIECE, slots[slot].numel))[1:]
            active = part.abs() > threshold
            alone = active.sum(0) == 1
            unique = (active & alone).sum(1)
            found = torch.stack([active.sum(1) - unique, unique], dim=1)
            result[slot] += found.cpu().double()

    order = sorted(range(len(slots)), key=lambda i: -slots[i].numel)
    parallel_for(count, order, lambda: None, threads=deltas.threads)
    return result
