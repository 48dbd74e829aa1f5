"""Nearswap: numbers in which base and expert nearly agree are taken over, others hardly move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import Empty, arena
from map_bo.operators.averages import products
from map_bo.operators.searchable import SearchableOperator, number, one_of

__all__ = ["NearSwap", "near"]

UNITS = ("rms", "absolute")


@dataclass(frozen=True, kw_only=True)
class NearSwap(SearchableOperator):
    r"""Each number moves towards the expert's by at most ``strength``.

    ``theta_0 + sum_n c_n clip(v_n, -t_n, t_n)``. Of one expert with the coefficient 1 it is
    mergekit's ``nearswap``, which interpolates each number by ``min(1, t / |v|)``. It comes not
    from a paper but from a merge, huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
    Coefficients are the experts' scales after the clipping, so that 1 moves a number by ``t_n`` at
    most.

    Attributes:
        strength: ``t``: how far a number moves at most for a coefficient of 1, from 0 (the base).
        unit: What a strength of 1 is. ``"rms"``: the root mean square of the expert's task vector
            in the tensor, so that one strength suits experts and tensors that moved by different
            amounts. ``"absolute"``: the weights' own unit, as in mergekit; the bounds of a search
            are then to be given.

    Raises:
        MergeError: When a setting is not possible, or bounds are missing.
    """

    name: ClassVar[str] = "nearswap"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"strength": (0.1, 3.0)}

    strength: float = 1.0
    unit: str = "rms"

    def __post_init__(self) -> None:
        if self.unit == "absolute" and self.search and not isinstance(self.search, Mapping):
            raise MergeError(
                "the strength is searched in the weights' own unit, and its bounds are not given",
                hint="give them, such as search={strength: [1e-5, 1e-3]}, or set unit to rms",
            )
        super().__post_init__()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that are not possible; see `SearchableOperator`."""
        number("strength", settings["strength"], least=0.0)
        one_of("unit", settings["unit"], UNITS)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Measure the task vectors where the strength is relative to them: one pass."""
        slots, experts = deltas.layout.slots, len(deltas.experts)
        sizes = torch.ones(len(slots), experts, dtype=torch.float64)
        if self.unit == "rms":
            squares = products(deltas).diagonal(dim1=1, dim2=2)[:, 1:]
            counts = torch.tensor([max(slot.numel, 1) for slot in slots], dtype=torch.float64)
            sizes = (squares / counts[:, None]).sqrt()
        return _Near(tuple(tuple(row) for row in sizes.tolist()), self.strength)


@dataclass(frozen=True)
class _Near(Kernel):
    sizes: tuple[tuple[float, ...], ...]
    strength: float

    def at(self, settings: Mapping[str, float]) -> Kernel:
        return replace(self, strength=settings.get("strength", self.strength))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        limits = [self.strength * size for size in self.sizes[slot]]
        clipped = near(rows[1:], limits, empty=arena.empty)
        out = arena.empty(rows.shape[1], device=rows.device)
        return torch.mv(clipped.t(), c.to(rows), out=out).add_(rows[0])


def near(rows: Tensor, limits: list[float], *, empty: Empty = torch.empty) -> Tensor:
    """Return rows (``N x n``) of which each is limited to its own magnitude.

    Args:
        rows: ``N x n``.
        limits: ``N`` magnitudes from 0.
        empty: Where new tensors come from.
    """
    result = empty(*rows.shape, dtype=rows.dtype, device=rows.device)
    for row, out, limit in zip(rows, result, limits, strict=True):
        torch.clamp(row, -limit, limit, out=out)
    return result
