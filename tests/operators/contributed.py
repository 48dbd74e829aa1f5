"""An operator of somebody else's package, as ``docs`` tells them to write one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.operators.searchable import SearchableOperator, number

__all__ = ["NearSwap"]


@dataclass(frozen=True, kw_only=True)
class NearSwap(SearchableOperator):
    """Numbers move less the further an expert has gone from the base.

    Attributes:
        strength: How far a number goes at most, for a coefficient of 1.
    """

    name: ClassVar[str] = "nearswap"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"strength": (0.1, 1.0)}

    strength: float = 0.25

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a strength that is no number above 0."""
        number("strength", settings["strength"], least=0.0)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return what merges a piece."""
        return _Swapping(self.strength)


class _Swapping(Kernel):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def at(self, settings: Mapping[str, float]) -> Kernel:
        return _Swapping(settings.get("strength", self.strength))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        moved = rows[1:].clamp(-self.strength, self.strength)
        return rows[0] + moved.t() @ c.to(rows)
