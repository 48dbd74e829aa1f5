"""What a merge operator is: it prepares once, then writes a candidate per coefficient vector.

What operators read: base and task vectors, piece by piece, wherever they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.merging.align.layout import FlatLayout
from map_bo.plain import identity_of
from map_bo.space import CoefficientSpace

__all__ = ["ChecksValues", "Deltas", "Followable", "MergeOperator", "PreparedMerge", "recipe_of"]


@runtime_checkable
class Deltas(Protocol):
    """A base and the task vectors of ``N`` experts in the coordinates of a flat layout.

    `TaskVectors` keeps them resident; `StreamedVectors` reads them from checkpoints each time.
    Pieces may be read from several threads at once.
    """

    @property
    def experts(self) -> tuple[str, ...]:
        """``N`` names, in the order of the rows."""
        ...

    @property
    def layout(self) -> FlatLayout:
        """The tensors, in their order; only ``size`` and ``offset`` say where they would lie."""
        ...

    @property
    def device(self) -> torch.device:
        """Where pieces are."""
        ...

    @property
    def threads(self) -> int | None:
        """How many threads may go through the pieces at once; None for as many as torch uses."""
        ...

    @property
    def resident(self) -> bool:
        """Whether it is all in memory, so that what is prepared from it may take memory too."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether pieces are views of what is in memory, so that ``read`` needs no room."""
        ...

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return the elements ``start`` to ``stop`` of a tensor, row-major, in float32.

        Args:
            slot: Index of the tensor in ``layout.slots``.
            start: First element.
            stop: After the last element.
            out: ``(1 + N) x (stop - start)`` float32 memory that may be used for the result.

        Returns:
            ``(1 + N) x (stop - start)``: the base, then the task vectors. Not to be written to,
            unless it is ``out``.
        """
        ...

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `TaskVectors`."""
        ...


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
    """Settings of a merge operator: a frozen dataclass, so that recipes and records hold them.

    One that has ``streams = True`` reads the deltas by pieces alone and prepares a `ChunkedMerge`,
    so that it also merges checkpoints that do not fit into memory.
    """

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return the coefficients that this operator takes for these experts."""
        ...

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        """Do, once, all the work that does not depend on the coefficients."""
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
    """An operator that needs more than its fields to be made once more, such as files."""

    def recipe(self) -> dict[str, Any]:
        """Return its plain data (see :mod:`map_bo.plain`) with all that is needed."""
        ...


def recipe_of(operator: MergeOperator) -> dict[str, Any]:
    """Return what a recipe says of an operator: plain data that it is built from again.

    One that plain data cannot say is put in words; its recipe then cannot be followed.
    """
    if isinstance(operator, Followable):
        return operator.recipe()
    told: dict[str, Any] = identity_of(operator)
    return told
