"""What a problem is: a coefficient space, metrics, and a way to measure them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.space import CoefficientSpace

__all__ = ["Problem"]


@runtime_checkable
class Problem(Protocol):
    """Something to optimise. It knows nothing of samplers, surrogates or budgets.

    A recorded table, a synthetic function with a known front and a live merged model are
    interchangeable behind this protocol.
    """

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of the columns of ``Observations.Y``."""
        ...

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``).

        A row whose measurement fails (an evaluator raises, or returns NaN) comes back as a failed
        row with its reason; the other rows keep what was measured.

        Args:
            X: ``n x d`` coefficients in the space.
            generator: Source of any randomness of the measurement.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        ...
