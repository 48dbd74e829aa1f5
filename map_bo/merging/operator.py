"""What a merge operator is: it prepares once, then writes a candidate per coefficient vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from map_bo.space import CoefficientSpace

if TYPE_CHECKING:
    from map_bo.merging.deltas import Deltas

__all__ = ["ChecksValues", "Followable", "MergeOperator", "PreparedMerge", "recipe_of"]


@runtime_checkable
class PreparedMerge(Protocol):
    """An operator bound to task vectors, with everything precomputed that no coefficient changes.

    ``write`` is called for every candidate: it makes one streaming pass over the resident
    deltas and allocates nothing of the model's size.
    """

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the flat merged parameters for coefficients ``c`` (``d``) into ``out`` (``P``)."""
        ...


@runtime_checkable
class MergeOperator(Protocol):
    """Settings of a merge operator.

    One that has ``streams = True`` reads the deltas by pieces alone and prepares a `ChunkedMerge`,
    so that it also merges checkpoints that do not fit into memory.
    """

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return the coefficients that this operator takes for these experts."""
        ...

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        """Do, once, all the work that does not depend on the coefficients."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the operator as plain data, for recipes and the run's record."""
        ...


@runtime_checkable
class ChecksValues(Protocol):
    """An operator that does not take every value of its coefficients."""

    def check_values(self, values: Mapping[str, float]) -> None:
        """Refuse values, by the names of the operator's space, that it cannot merge with.

        Raises:
            MergeError: Naming them.
        """
        ...


@runtime_checkable
class Followable(Protocol):
    """An operator that needs more than its description to be made once more, such as files."""

    def recipe(self) -> dict[str, Any]:
        """Return the description with all that is needed, as plain data."""
        ...


def recipe_of(operator: MergeOperator) -> dict[str, Any]:
    """Return what a recipe says of an operator."""
    return operator.recipe() if isinstance(operator, Followable) else operator.describe()
