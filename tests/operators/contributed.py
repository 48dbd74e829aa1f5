"""An operator of somebody else's package, as ``docs`` tells them to write one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from map_bo.merging.vectors.kernel import Kernel
from map_bo.merging.vectors.operator import Deltas
from map_bo.operators.searchable import SearchableOperator, number

__all__ = ["Shrink"]


@dataclass(frozen=True, kw_only=True)
class Shrink(SearchableOperator):
    """Numbers of the task vectors are moved towards 0, so that small ones vanish.

    Attributes:
        strength: How far, in units of the weights.
    """

    name: ClassVar[str] = "shrink"
    searchable: ClassVar[Mapping[str, tuple[float, float]]] = {"strength": (0.0, 1.0)}

    strength: float = 0.25

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a strength that is not a number from 0."""
        number("strength", settings["strength"], least=0.0)

    def kernel(self, deltas: Deltas) -> Kernel:
        """Return what merges a piece."""
        return _Shrinking(self.strength)


class _Shrinking(Kernel):
    def __init__(self, strength: float) -> None:
        self.strength = strength

    def at(self, settings: Mapping[str, float]) -> Kernel:
        return _Shrinking(settings.get("strength", self.strength))

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        moved = torch.nn.functional.softshrink(rows[1:], self.strength)
        return rows[0] + moved.t() @ c.to(rows)
