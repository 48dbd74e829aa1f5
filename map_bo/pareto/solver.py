"""What a front solver is: it turns predicted metrics into a set of trade-offs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from map_bo.space import CoefficientSpace

__all__ = ["FrontSolver"]


@runtime_checkable
class FrontSolver(Protocol):
    """Settings of a solver for ``max mean(x)`` over a space, in the Pareto sense."""

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        """Return ``k x d`` points of ``space``, mutually non-dominated under ``mean``.

        Args:
            mean: Maps ``n x d`` to ``n x m``, larger is better in every column, differentiable.
            space: Where to search.
            generator: Source of all randomness.
        """
        ...
