"""Task arithmetic: the base plus a weighted sum of task vectors, at memory bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from map_bo.merging.blocks import Blocks
from map_bo.merging.chunked import ChunkedMerge, SpanKernel
from map_bo.merging.deltas import Deltas
from map_bo.merging.linear_merge import LinearMerge, coefficient_table, segments
from map_bo.merging.task_vectors import TaskVectors
from map_bo.space import CoefficientSpace

__all__ = ["LinearOperator", "TaskArithmetic"]


@runtime_checkable
class LinearOperator(Protocol):
    """An operator whose merged tensor is a weighted sum, so that it can also be streamed."""

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Callable[[str], Mapping[str, float]]:
        """Return, for coefficients ``c`` (``d``), tensor name -> weight of each expert."""
        ...


@dataclass(frozen=True)
class TaskArithmetic:
    r"""``theta(c) = theta_base + sum_n c_n v_n``, with one coefficient an expert or a block.

    Ilharco et al., *Editing Models with Task Arithmetic*, arXiv 2212.04089, section 2.

    Attributes:
        blocks: Block name -> regular expression that is searched for in tensor names (for
            example ``r"layers\.[0-5]\."``). Every tensor must belong to exactly one block; the
            pattern ``"*"`` takes the tensors that no other pattern takes. There is then one
            coefficient for each expert and block, ordered expert by expert. Without it, one
            for each expert. In words: ``"layers:K"``, ``"kinds"`` or ``"balanced:K"``, see
            `map_bo.merging.block_specs.blocks_of`.

    Raises:
        MergeError: When a pattern is no regular expression, or there are no blocks in ``blocks``.
    """

    streams: ClassVar[bool] = True

    blocks: Mapping[str, str] | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", Blocks(self.blocks).patterns)

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with one coefficient for each expert, or each expert and block."""
        return CoefficientSpace.box(
            experts, blocks=Blocks(self.blocks).names, lower=lower, upper=upper
        )

    @overload
    def prepare(self, deltas: TaskVectors) -> LinearMerge: ...

    @overload
    def prepare(self, deltas: Deltas) -> LinearMerge | ChunkedMerge: ...

    def prepare(self, deltas: Deltas) -> LinearMerge | ChunkedMerge:
        """Find the runs of neighbouring tensors that share a block.

        Raises:
            MergeError: When a tensor belongs to no block or to several, or a block has none.
        """
        blocks = Blocks(self.blocks)
        if isinstance(deltas, TaskVectors):
            return LinearMerge(deltas, segments(blocks, deltas.layout), len(blocks))
        return ChunkedMerge(deltas, _Sum(), blocks.table(deltas.layout), len(blocks))

    def describe(self) -> dict[str, Any]:
        """Return name and settings as plain data."""
        return {
            "name": "task_arithmetic",
            "blocks": dict(self.blocks) if isinstance(self.blocks, Mapping) else self.blocks,
        }

    def block(self, name: str) -> int:
        """Return the index of the block of a tensor; 0 where there are no blocks.

        Raises:
            MergeError: When no pattern matches the name, or several do.
        """
        return Blocks(self.blocks).of(name)

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Callable[[str], Mapping[str, float]]:
        """Return tensor name -> weight of each expert, as `merge_streamed` wants it.

        Args:
            experts: ``N`` names, in the order of the space.
            c: ``d`` coefficients.
        """
        blocks = Blocks(self.blocks)
        table = coefficient_table(c, len(experts), len(blocks))

        def of(name: str) -> Mapping[str, float]:
            return dict(zip(experts, table[blocks.of(name)].tolist(), strict=True))

        return of


class _Sum(SpanKernel):
    """The base plus the weighted task vectors."""

    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c])
