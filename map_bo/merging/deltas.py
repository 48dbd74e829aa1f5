"""What operators read: base and task vectors, piece by piece, wherever they are kept."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.merging.layout import FlatLayout

__all__ = ["Deltas"]


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
