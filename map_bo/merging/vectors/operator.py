"""What a merge operator is, what it reads, and what it may be able to do besides.

An operator prepares once, then writes a candidate for each coefficient vector. It reads base and
task vectors piece by piece, wherever they are kept. Each further ability is a protocol of its own:
here `Linear`, `HasDerivatives`, `PreparesDerivatives`, `ChecksValues`, `Chooses` and
`Followable`;
`~map_bo.merging.vectors.blocks.HasBlocks` and `~map_bo.merging.vectors.kernel.ReadsPieces` stand
with what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.align.layout import FlatLayout
from map_bo.plain import identity_of
from map_bo.space import CoefficientSpace

__all__ = [
    "ChecksValues",
    "Chooses",
    "Deltas",
    "Followable",
    "HasDerivatives",
    "HasFactors",
    "Linear",
    "MergeOperator",
    "PreparedMerge",
    "PreparesDerivatives",
    "Weights",
    "chosen_merge",
    "recipe_of",
]

Weights = Callable[[str], Mapping[str, float]]
"""Tensor name -> weight of each expert's task vector for that tensor."""


@runtime_checkable
class Deltas(Protocol):
    """A base and the task vectors of ``N`` experts in the coordinates of a flat layout.

    `TaskVectors` keeps them resident; `OnDiskVectors` reads them from checkpoints each time.
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
class HasFactors(Protocol):
    """Task vectors, some of which are known as factors of low rank."""

    def factors(self, slot: int) -> Mapping[int, LowRank]:
        """Return the changes of a tensor that are factors alone.

        Args:
            slot: Index of the tensor in ``layout.slots``.

        Returns:
            Index of the expert -> its change, of rank 0 where it is an adapter that leaves the
            tensor as it is. Experts that are whole models are not in it.
        """
        ...


@runtime_checkable
class PreparedMerge(Protocol):
    """An operator bound to task vectors, with everything precomputed that no coefficient changes.

    ``write`` is called for every candidate: it makes one pass over the resident
    deltas and allocates nothing of the model's size.
    """

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the flat merged parameters for coefficients ``c`` (``d``) into ``out`` (``P``)."""
        ...


@runtime_checkable
class MergeOperator(Protocol):
    """Settings of a merge operator: a frozen dataclass, so that recipes and records hold them."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return the coefficients that this operator takes for these experts."""
        ...

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        """Do, once, all the work that does not depend on the coefficients."""
        ...


@runtime_checkable
class Linear(Protocol):
    """An operator that is linear in its coefficients.

    A merged tensor is the base and a weighted sum of task vectors, with weights that are linear in
    the coefficients. So merges of merges are merges of the experts, and a merge can be made tensor
    by tensor in any dtype.
    """

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Weights:
        """Return the weights of the task vectors for coefficients ``c`` (``d``).

        Args:
            experts: ``N`` names, in the order of the space.
            c: ``d`` coefficients.
        """
        ...


@runtime_checkable
class HasDerivatives(Protocol):
    """A prepared merge that knows its derivatives by the coefficients."""

    def directional(self, gradient: Tensor) -> Tensor:
        """Return derivatives by the coefficients, ``d`` (float64 on the CPU).

        Args:
            gradient: ``P`` in float32 on the task vectors' device: the gradient of a metric by the
                merged numbers.
        """
        ...


@runtime_checkable
class PreparesDerivatives(Protocol):
    """An operator that is not `Linear` in task vectors, and whose merges have derivatives."""

    def prepares_derivatives(self) -> bool:
        """Return whether what it prepares from task vectors in memory is `HasDerivatives`."""
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
class Chooses(Protocol):
    """An operator whose coefficients say by which of several operators it merges."""

    def chosen(
        self, experts: tuple[str, ...], c: Tensor
    ) -> tuple[MergeOperator, tuple[str, ...], Tensor]:
        """Return the operator that merges with ``c`` (``d``), its coefficients' names and values.

        Merging by that operator with these values is the same merge.

        Args:
            experts: ``N`` names, in the order of the space.
            c: ``d`` coefficients.
        """
        ...


def chosen_merge(
    operator: MergeOperator, experts: Iterable[str], names: tuple[str, ...], c: Tensor
) -> tuple[MergeOperator, tuple[str, ...], Tensor]:
    """Return the one operator that merges with ``c`` (``d``), with names and values.

    They are the given ones, unless the operator is a choice of several (:class:`Chooses`): what is
    written, described and followed is the operator that was chosen.
    """
    if isinstance(operator, Chooses):
        return operator.chosen(tuple(experts), c)
    return operator, names, c


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
