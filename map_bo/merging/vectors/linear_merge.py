"""Task arithmetic: the base plus a weighted sum of resident task vectors, at memory bandwidth."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import AdaptedTensor
from map_bo.merging.align.layout import FlatLayout, Slot
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.kernel import KernelMerge, SpanKernel, check_coefficients
from map_bo.merging.vectors.operator import Deltas, Weights
from map_bo.merging.vectors.parallel import parallel_for
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.space import CoefficientSpace

__all__ = ["LinearMerge", "TaskArithmetic", "coefficient_table", "segments"]

# Measured on 2 cores for N = 2, 4, 8: tiles of 2^13 to 2^18 are within a tenth of each other, and
# the longer ones lose less where the machine is busy.
_TILE = 1 << 17
# Rows in a narrower storage are widened chunk by chunk, on a CPU into this many numbers in all;
# on a GPU a longer chunk hides the launches.
_ROOM = 9 << 18
_CHUNK = 1 << 23
_PIECE = {"cpu": 1 << 19, "cuda": 1 << 26}  # numbers of an adapted tensor that are merged at once


def segments(blocks: Blocks, layout: FlatLayout) -> tuple[tuple[int, int, int], ...]:
    """Return ``(start, stop, block)`` of the runs of neighbouring tensors that share a block.

    Raises:
        MergeError: When a tensor belongs to no block or to several, or a block has none.
    """
    table = blocks.table(layout)
    starts = [i for i in range(len(table)) if i == 0 or table[i] != table[i - 1]]
    edges = [layout.slots[i].offset for i in starts] + [layout.size]
    return tuple(
        (edges[k], edges[k + 1], table[i]) for k, i in enumerate(starts) if edges[k] < edges[k + 1]
    )


def coefficient_table(c: Tensor, experts: int, blocks: int) -> Tensor:
    """Return the coefficients as ``blocks x N`` in float64 on the CPU."""
    c = check_coefficients(c, experts * blocks)
    return c.view(experts, blocks).T


def _without(
    segments: Iterable[tuple[int, int, int]], slots: Iterable[Slot]
) -> Iterator[tuple[int, int, int]]:
    """Yield what the slots, in their order, leave of the segments."""
    rest = list(slots)
    for start, stop, block in segments:
        while rest and rest[0].offset < stop:
            slot = rest.pop(0)
            if start < slot.offset:
                yield start, slot.offset, block
            start = slot.stop
        if start < stop:
            yield start, stop, block


def _rows_of(part: AdaptedTensor) -> int:
    """Return how many rows of an adapted tensor are merged at once."""
    numbers = _PIECE.get(part.A.device.type, _PIECE["cuda"])
    return max(1, numbers // max(part.A.shape[1], 1))


class LinearMerge:
    """Weighted sums of resident rows, in one pass. Made by an operator's ``prepare``.

    Sums are in float32 whatever the storage. Float32 rows on a CPU go through a batched matrix
    product over tiles, which reads every row once and writes ``out`` once; a matrix-vector
    product of the whole, and a loop of additions, were slower on the machine that this was
    measured on. Other storage is widened to float32 chunk by chunk on a CPU and multiplied there;
    on a GPU rows are added one by one. The only memory taken is one chunk of each row.

    Adapters have no rows. Their factors are multiplied some rows of a tensor at a time, on all
    cores: into ``out`` where that is float32; where it is narrower, the tensors that they change
    are merged apart in float32 and rounded once.

    Args:
        vectors: The resident task vectors.
        segments: ``(start, stop, block)`` of the flat layout, without gaps.
        blocks: Number of blocks ``B``; coefficients are ordered expert by expert, ``d = N B``.
        tile: Numbers per tile of the batched product.
        chunk: Numbers per chunk of what is not one product; by default what suits the device.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        segments: tuple[tuple[int, int, int], ...],
        blocks: int = 1,
        *,
        tile: int = _TILE,
        chunk: int | None = None,
    ) -> None:
        self._vectors = vectors
        self._segments = segments
        self._blocks = blocks
        self._tile = tile
        cpu = vectors.rows.device.type == "cpu"
        self._chunk = chunk or (max(_ROOM // len(vectors.rows), 1 << 14) if cpu else _CHUNK)
        slots = [vectors.layout.slots[index] for index in vectors.adapted]
        starts = [start for start, _, _ in segments]
        self._adapted = [
            (slot, part, segments[bisect_right(starts, slot.offset) - 1][2])
            for slot, part in zip(slots, vectors.adapted.values(), strict=True)
        ]
        self._pieces = [
            (slot, part, block, first)
            for slot, part, block in self._adapted
            for first in range(0, part.B.shape[0], _rows_of(part))
        ]
        self._gaps = tuple(_without(segments, slots))

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merged numbers for ``c`` (``d``) into ``out`` (``P``, any floating dtype).

        Where all coefficients are 0 the base is copied, bit for bit. Variances are kept positive
        as `TaskVectors.keep_variances` says.

        Raises:
            MergeError: When ``c`` or ``out`` has another shape, ``c`` is not finite, or ``out``
                lives on another device.
        """
        rows = self._vectors.rows
        table = coefficient_table(c, len(self._vectors.experts), self._blocks)
        dense = list(self._vectors.dense_experts)
        if out.shape != rows.shape[1:] or out.device != rows.device or not out.is_contiguous():
            raise MergeError(
                f"the merged model would be written to {tuple(out.shape)} on {out.device}; the "
                f"task vectors are {tuple(rows.shape[1:])} on {rows.device}",
                hint="give a contiguous flat tensor of the layout's size on the same device",
            )
        # A lower precision that the user set for products must not reach the weights.
        exact = torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        product = rows.device.type == "cpu" and exact
        whole = rows.dtype == out.dtype == torch.float32
        together = out.dtype == torch.float32
        with torch.no_grad():
            for start, stop, block in self._segments if together else self._gaps:
                source, target, weights = rows[:, start:stop], out[start:stop], table[block, dense]
                if not bool(weights.any()):
                    target.copy_(source[0])
                elif product and whole:
                    self._multiply(source, weights, target)
                elif product:
                    self._widen(source, weights, target)
                else:
                    self._add(source, weights.tolist(), target)
            if self._pieces:
                self._add_adapters(table, out, together)
            self._vectors.keep_variances(out)

    def directional(self, gradient: Tensor) -> Tensor:
        """Return the derivatives by the coefficients, ``d`` (float64 on the CPU).

        The merge is linear, so the derivative by the coefficient of an expert and a block is the
        product of that part of its task vector with the gradient by the merged numbers. One pass
        over the task vectors. That variances are kept positive is not differentiated.

        Args:
            gradient: ``P`` in float32 on the task vectors' device: the gradient of a metric by the
                merged numbers, wherever they are.

        Raises:
            MergeError: When ``gradient`` has another shape, dtype or device.
        """
        rows, experts = self._vectors.rows, len(self._vectors.experts)
        wrong = gradient.shape != rows.shape[1:] or gradient.dtype != torch.float32
        if wrong or gradient.device != rows.device:
            raise MergeError(
                f"a gradient has shape {tuple(gradient.shape)} of {gradient.dtype} on "
                f"{gradient.device}; the task vectors are {tuple(rows.shape[1:])} on {rows.device}",
                hint="give a flat float32 tensor of the layout's size on the same device",
            )
        deltas, dense = rows[1:], list(self._vectors.dense_experts)
        result = torch.zeros(experts, self._blocks, dtype=torch.float64)
        with torch.no_grad():
            for start, stop, block in self._segments:
                for at in range(start, stop, self._chunk):
                    part = slice(at, min(at + self._chunk, stop))
                    # Chunks are summed in float64, so the length of a model costs no digits.
                    slopes = deltas[:, part].float() @ gradient[part]
                    result[dense, block] += slopes.cpu().double()
            for slot, adapted, block in self._adapted:
                result[:, block] += adapted.project(gradient[slot.offset : slot.stop], experts)
        return result.flatten()

    def _add_adapters(self, table: Tensor, out: Tensor, together: bool) -> None:
        rows, dense = self._vectors.rows, list(self._vectors.dense_experts)

        def merge(item: tuple[Slot, AdaptedTensor, int, int], _: None) -> None:
            slot, part, block, first = item
            columns, weights = part.A.shape[1], table[block]
            start = slot.offset + first * columns
            stop = min(start + _rows_of(part) * columns, slot.stop)
            target, source = out[start:stop], rows[:, start:stop]
            if together:
                part.add(weights, target, first)
            elif not bool(weights.any()):
                target.copy_(source[0])
            else:
                total = torch.empty_like(target, dtype=torch.float32)
                self._add(source, weights[dense].tolist(), total)
                part.add(weights, total, first)
                target.copy_(total)

        threads = None if rows.device.type == "cpu" else 1
        parallel_for(merge, self._pieces, lambda: None, threads=threads)

    def _multiply(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        n, tile = len(rows), self._tile
        left = torch.cat([weights.new_ones(1), weights]).to(rows.dtype)
        tiles = rows.shape[1] // tile
        whole = tiles * tile
        if tiles:
            torch.bmm(
                left.expand(tiles, 1, n),
                rows[:, :whole].view(n, tiles, tile).transpose(0, 1),
                out=out[:whole].view(tiles, 1, tile),
            )
        if whole < rows.shape[1]:
            torch.mm(left[None], rows[:, whole:], out=out[None, whole:])

    def _widen(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        size = min(self._chunk, rows.shape[1])
        left = torch.cat([weights.new_ones(1), weights]).float()

        def merge(start: int, room: tuple[Tensor, Tensor]) -> None:
            part = rows[:, start : start + size]
            width = part.shape[1]
            wide, sums = room[0][:, :width], room[1][:width]
            wide.copy_(part)
            torch.mv(wide.t(), left, out=sums)
            out[start : start + width].copy_(sums)

        parallel_for(
            merge,
            range(0, rows.shape[1], size),
            lambda: (torch.empty(len(rows), size), torch.empty(size)),
        )

    def _add(self, rows: Tensor, weights: list[float], out: Tensor) -> None:
        used = [(i, weight) for i, weight in enumerate(weights, start=1) if weight]
        for start in range(0, rows.shape[1], self._chunk):
            part = rows[:, start : start + self._chunk].unbind()
            target = out[start : start + self._chunk]
            if out.dtype == torch.float32:
                total = target.copy_(part[0])
            else:
                total = part[0].to(torch.float32, copy=True)
            for i, weight in used:
                total.add_(part[i], alpha=weight)
            if total is not target:
                target.copy_(total)


@dataclass(frozen=True)
class TaskArithmetic:
    r"""``theta(c) = theta_base + sum_n c_n v_n``, with one coefficient per expert or block.

    Ilharco et al., *Editing Models with Task Arithmetic*, arXiv 2212.04089, section 2.

    Attributes:
        blocks: Block name -> regular expression that is searched for in tensor names (for
            example ``r"layers\.[0-5]\."``). Every tensor must belong to exactly one block; the
            pattern ``"*"`` takes the tensors that no other pattern takes. There is then one
            coefficient for each expert and block, ordered expert by expert. Without it, one
            for each expert. In words: ``"layers:K"``, ``"kinds"`` or ``"balanced:K"``, see
            `map_bo.merging.vectors.blocks.blocks_of`.

    Raises:
        MergeError: When a pattern is no regular expression, or there are no blocks in ``blocks``.
    """

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
    def prepare(self, deltas: Deltas) -> LinearMerge | KernelMerge: ...

    def prepare(self, deltas: Deltas) -> LinearMerge | KernelMerge:
        """Find the runs of neighbouring tensors that share a block.

        Raises:
            MergeError: When a tensor belongs to no block or to several, or a block has none.
        """
        if not isinstance(deltas, TaskVectors):
            return self.prepare_pieces(deltas)
        blocks = Blocks(self.blocks)
        return LinearMerge(deltas, segments(blocks, deltas.layout), len(blocks))

    def prepare_pieces(self, deltas: Deltas) -> KernelMerge:
        """Prepare a merge that reads pieces alone; see `ReadsPieces`.

        Raises:
            MergeError: When a tensor belongs to no block or to several, or a block has none.
        """
        blocks = Blocks(self.blocks)
        return KernelMerge(deltas, _Sum(), blocks.table(deltas.layout), len(blocks))

    def with_blocks(self, patterns: Mapping[str, str]) -> TaskArithmetic:
        """Return task arithmetic with these blocks; see `HasBlocks`."""
        return replace(self, blocks=patterns)

    def block(self, name: str) -> int:
        """Return the index of the block of a tensor; 0 where there are no blocks.

        Raises:
            MergeError: When no pattern matches the name, or several do.
        """
        return Blocks(self.blocks).of(name)

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Weights:
        """Return tensor name -> weight of each expert; see `Linear`."""
        blocks = Blocks(self.blocks)
        table = coefficient_table(c, len(experts), len(blocks))

        def of(name: str) -> Mapping[str, float]:
            return dict(zip(experts, table[blocks.of(name)].tolist(), strict=True))

        return of


class _Sum(SpanKernel):
    """The base plus the weighted task vectors."""

    def weights(self, slot: int, c: Tensor) -> Tensor:
        return torch.cat([c.new_ones(1), c])
