"""Task arithmetic: the base plus a weighted sum of task vectors, at memory bandwidth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.messages import listed
from map_bo.merging.task_vectors import FlatLayout, TaskVectors
from map_bo.space import CoefficientSpace

__all__ = ["LinearMerge", "LinearOperator", "TaskArithmetic"]

# Measured on 2 cores for N = 2, 4, 8: tiles of 2^13 to 2^18 are within a tenth of each other.
_TILE = 1 << 15
# Rows in a narrower storage are widened chunk by chunk; on a GPU a longer one hides the launches.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}
_REST = "*"


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
            for each expert.

    Raises:
        MergeError: When a pattern is no regular expression, or there are no blocks in ``blocks``.
    """

    blocks: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.blocks is None:
            return
        object.__setattr__(self, "blocks", dict(self.blocks))
        if not self.blocks:
            raise MergeError(
                "there are no blocks", hint="leave out blocks for one coefficient an expert"
            )
        for block, pattern in self.blocks.items():
            if pattern == _REST:
                continue
            try:
                re.compile(pattern)
            except re.error as error:
                raise MergeError(
                    f"the pattern {pattern!r} of block {block!r} is no regular expression: {error}",
                    hint="write a Python regular expression, or '*' for all other tensors",
                ) from None

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        """Return a box with one coefficient for each expert, or each expert and block."""
        return CoefficientSpace.box(
            experts, blocks=tuple(self.blocks or ()), lower=lower, upper=upper
        )

    def prepare(self, deltas: TaskVectors) -> LinearMerge:
        """Find the runs of neighbouring tensors that share a block.

        Raises:
            MergeError: When a tensor belongs to no block or to several, or a block has none.
        """
        return LinearMerge(deltas, self._segments(deltas.layout), len(self.blocks or (0,)))

    def describe(self) -> dict[str, Any]:
        """Return name and settings as plain data."""
        return {
            "name": "task_arithmetic",
            "blocks": None if self.blocks is None else dict(self.blocks),
        }

    def block(self, name: str) -> int:
        """Return the index of the block of a tensor; 0 where there are no blocks.

        Raises:
            MergeError: When no pattern matches the name, or several do.
        """
        if self.blocks is None:
            return 0
        patterns = list(self.blocks.items())
        found = [
            i for i, (_, p) in enumerate(patterns) if p != _REST and re.search(p, name) is not None
        ]
        found = found or [i for i, (_, pattern) in enumerate(patterns) if pattern == _REST]
        if len(found) != 1:
            taken = listed(patterns[i][0] for i in found)
            raise MergeError(
                f"tensor {name!r} belongs to the blocks {taken}"
                if found
                else f"tensor {name!r} belongs to no block",
                hint="make the patterns exclude each other; the pattern '*' takes the tensors "
                "that no other pattern takes",
            )
        return found[0]

    def weights(self, experts: tuple[str, ...], c: Tensor) -> Callable[[str], Mapping[str, float]]:
        """Return tensor name -> weight of each expert, as `merge_streamed` wants it.

        Args:
            experts: ``N`` names, in the order of the space.
            c: ``d`` coefficients.
        """
        table = _table(c, len(experts), len(self.blocks or (0,)))

        def of(name: str) -> Mapping[str, float]:
            return dict(zip(experts, table[self.block(name)].tolist(), strict=True))

        return of

    def _segments(self, layout: FlatLayout) -> tuple[tuple[int, int, int], ...]:
        blocks = [self.block(slot.name) for slot in layout.slots]
        empty = [b for i, b in enumerate(self.blocks or ()) if i not in blocks]
        if empty:
            raise MergeError(
                f"no floating tensor belongs to the blocks {listed(empty)}",
                hint=f"tensors are called, for example, "
                f"{listed(slot.name for slot in layout.slots)}",
            )
        starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1]]
        edges = [layout.slots[i].offset for i in starts] + [layout.size]
        return tuple(
            (edges[k], edges[k + 1], blocks[i])
            for k, i in enumerate(starts)
            if edges[k] < edges[k + 1]
        )


def _table(c: Tensor, experts: int, blocks: int) -> Tensor:
    """Return the coefficients as ``blocks x N`` in float64 on the CPU."""
    c = torch.as_tensor(c).detach().to(device="cpu", dtype=torch.float64)
    if c.shape != (experts * blocks,):
        raise MergeError(
            f"coefficients have shape {tuple(c.shape)}; this merge takes {experts * blocks}",
            hint="give one vector, not a batch",
        )
    if not bool(torch.isfinite(c).all()):
        raise MergeError(f"coefficients are not finite: {c.tolist()}")
    return c.view(experts, blocks).T


class LinearMerge:
    """Weighted sums of resident rows, in one streaming pass. Made by an operator's ``prepare``.

    Sums are in float32 whatever the storage. Float32 rows on a CPU go through a batched matrix
    product over tiles, which reads every row once and writes ``out`` once; a matrix-vector
    product of the whole, and a loop of additions, were slower on the machine that this was
    measured on. Other storage is widened to float32 chunk by chunk on a CPU and multiplied there;
    on a GPU rows are added one by one. The only memory taken is one chunk of each row.

    Args:
        vectors: The resident task vectors.
        segments: ``(start, stop, block)`` of the flat layout, without gaps.
        blocks: Number of blocks ``B``; coefficients are ordered expert by expert, ``d = N B``.
        tile: Numbers a tile of the batched product.
        chunk: Numbers a chunk of what is not one product; by default what suits the device.
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
        self._chunk = chunk or _CHUNK.get(vectors.rows.device.type, _CHUNK["cuda"])

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merged numbers for ``c`` (``d``) into ``out`` (``P``, any floating dtype).

        Where all coefficients are 0 the base is copied, bit for bit. Variances are kept positive
        as `TaskVectors.keep_variances` says.

        Raises:
            MergeError: When ``c`` or ``out`` has another shape, ``c`` is not finite, or ``out``
                lives on another device.
        """
        rows = self._vectors.rows
        table = _table(c, len(rows) - 1, self._blocks)
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
        with torch.no_grad():
            for start, stop, block in self._segments:
                source, target, weights = rows[:, start:stop], out[start:stop], table[block]
                if not bool(weights.any()):
                    target.copy_(source[0])
                elif product and whole:
                    self._multiply(source, weights, target)
                elif product:
                    self._widen(source, weights, target)
                else:
                    self._add(source, weights.tolist(), target)
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
        deltas = self._vectors.deltas
        wrong = gradient.shape != deltas.shape[1:] or gradient.dtype != torch.float32
        if wrong or gradient.device != deltas.device:
            raise MergeError(
                f"a gradient has shape {tuple(gradient.shape)} of {gradient.dtype} on "
                f"{gradient.device}; the task vectors are {tuple(deltas.shape)} on {deltas.device}",
                hint="give a flat float32 tensor of the layout's size on the same device",
            )
        result = torch.zeros(len(deltas), self._blocks, dtype=torch.float64)
        with torch.no_grad():
            for start, stop, block in self._segments:
                for at in range(start, stop, self._chunk):
                    part = slice(at, min(at + self._chunk, stop))
                    # Chunks are summed in float64, so the length of a model costs no digits.
                    result[:, block] += (deltas[:, part].float() @ gradient[part]).cpu().double()
        return result.flatten()

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
        left = torch.cat([weights.new_ones(1), weights]).float()[None]
        wide, sums = torch.empty(len(rows), size), torch.empty(1, size)
        for start in range(0, rows.shape[1], size):
            part = rows[:, start : start + size]
            width = part.shape[1]
            wide[:, :width].copy_(part)
            torch.mm(left, wide[:, :width], out=sums[:, :width])
            out[start : start + size].copy_(sums[0, :width])

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
