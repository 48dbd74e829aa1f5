"""Kernels: merging piece by piece, the same for resident models and for models on disk.

A kernel merges a piece of a tensor. The driver here, `KernelMerge`, cuts tensors into pieces, gives
them to threads, and puts the results where they belong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.parallel import arena, parallel_for

__all__ = ["Kernel", "KernelMerge", "ReadsPieces", "SpanKernel", "check_coefficients"]

# Numbers of a piece in all rows. Threads wait for each other between any two operations, so on 2
# cores with 1 MiB of second-level cache each, shorter pieces cost more in calls than they gain in
# locality; much longer ones leave the third-level cache. On a GPU length hides the launches.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
_NOTHING = 1e-6  # a coefficient this little below 0 is rounding, which spaces let pass too

_SHORTEST = 1 << 12

Sink = Callable[[int, int, Tensor], None]
"""Takes the index of a tensor, the first element of a merged piece, and the piece (float32)."""


def check_coefficients(c: Tensor, d: int) -> Tensor:
    """Return ``c`` (``d``) in float64 on the CPU.

    Raises:
        MergeError: When it has another shape or is not finite.
    """
    c = torch.as_tensor(c).detach().to(device="cpu", dtype=torch.float64)
    if c.shape != (d,):
        raise MergeError(
            f"coefficients must have shape ({d},), got {tuple(c.shape)}",
            hint="give one vector, not a batch",
        )
    if not bool(torch.isfinite(c).all()):
        raise MergeError(
            f"coefficients must be finite, got {c.tolist()}", hint="give finite numbers"
        )
    return c


class Kernel(ABC):
    """How an operator merges one piece of a tensor, with all that no coefficient changes ready."""

    def at(self, settings: Mapping[str, float]) -> Kernel:
        """Return the kernel for values of the settings that are searched, by name."""
        return self

    def whole(self, slot: int) -> bool:
        """Return whether this tensor must not be cut."""
        return False

    def room(self, experts: int) -> int:
        """Return how many bytes of temporary memory each number of a piece takes, at most."""
        return 64 + 40 * experts

    def overhead(self, threads: int) -> int:
        """Return how many bytes are taken beside the pieces, whatever their length."""
        return 0

    def unit(self, slot: int) -> int:
        """Return a number of elements: this tensor is cut at its multiples only."""
        return 1

    @abstractmethod
    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        """Merge a piece.

        Args:
            rows: ``(1 + N) x n`` in float32: the piece of the base and of the task vectors. Not
                to be written to.
            slot: Index of the tensor in the layout.
            start: First element of the piece; 0 where the tensor is ``whole``.
            c: ``N`` coefficients of the tensor's block in float64 on the CPU, not all zero.

        Returns:
            ``n`` merged numbers in float32, in memory of their own or in the thread's `arena`,
            which is used again for the next piece.
        """


class SpanKernel(Kernel):
    """A kernel whose result is a combination of base and task vectors, by tensor."""

    @abstractmethod
    def weights(self, slot: int, c: Tensor) -> Tensor:
        """Return ``1 + N`` weights in float64 of the rows of a tensor for ``c`` (``N``)."""

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        """Return the weighted sum of the rows."""
        out = arena.empty(rows.shape[1], device=rows.device)
        return torch.mv(rows.t(), self.weights(slot, c).to(rows), out=out)


class KernelMerge:
    """A kernel bound to task vectors: a :class:`~map_bo.merging.vectors.operator.PreparedMerge`.

    Args:
        deltas: Where the pieces come from.
        kernel: How one is merged.
        blocks: Block of every slot.
        count: Number of blocks ``B``; coefficients are ordered expert by expert.
        settings: Names of the settings that follow the ``N B`` coefficients.
        signed: Whether coefficients may be negative.
        chunk: Numbers of a piece; by default what suits the device.
    """

    def __init__(
        self,
        deltas: Deltas,
        kernel: Kernel,
        blocks: tuple[int, ...],
        count: int = 1,
        *,
        settings: tuple[str, ...] = (),
        signed: bool = True,
        chunk: int | None = None,
    ) -> None:
        self.deltas = deltas
        self.kernel = kernel
        self._blocks = blocks
        self._count = count
        self._settings = settings
        self._signed = signed
        self._threads = deltas.threads
        longest = _CHUNK.get(deltas.device.type, _CHUNK["cuda"])
        self._chunk = chunk or max(1, longest // (1 + len(deltas.experts)))

    def write(self, c: Tensor, out: Tensor) -> None:
        """Write the merged numbers for ``c`` (``d``) into ``out`` (``P``, any floating dtype).

        Raises:
            MergeError: When ``c`` or ``out`` has another shape, ``c`` is not finite or negative
                where it must not be, or ``out`` lives on another device.
        """
        layout, device = self.deltas.layout, self.deltas.device
        c = self._check(c)
        if out.shape != (layout.size,) or out.device != device or not out.is_contiguous():
            raise MergeError(
                f"the merged model would be written to {tuple(out.shape)} on {out.device}; the "
                f"task vectors are ({layout.size},) on {device}",
                hint="give a contiguous flat tensor of the layout's size on the same device",
            )

        def put(slot: int, start: int, piece: Tensor) -> None:
            first = layout.slots[slot].offset + start
            out[first : first + len(piece)].copy_(piece)

        with torch.no_grad():
            end = 0
            for slot in layout.slots:  # the padding between tensors
                out[end : slot.offset].zero_()
                end = slot.stop
            out[end:].zero_()
            self.run(c, put)

    def run(self, c: Tensor, sink: Sink) -> None:
        """Merge all pieces and give them to ``sink``, from several threads.

        Args:
            c: ``d`` coefficients.
            sink: Takes every piece, in any order.
        """
        c = self._check(c)
        d = c.numel() - len(self._settings)
        settings = dict(zip(self._settings, c[d:].tolist(), strict=True))
        table = self.table(c[:d])
        kernel, device = self.kernel.at(settings), self.deltas.device

        def work(item: tuple[int, int, int], _: None) -> None:
            slot, start, stop = item
            weights = table[self._blocks[slot]]
            room = None
            arena.reset()
            if not self.deltas.in_place:
                room = arena.empty(1 + len(self.deltas.experts), stop - start, device=device)
            rows = self.deltas.read(slot, start, stop, room)
            if bool(weights.any()):
                piece = kernel.piece(rows, slot, start, weights)
                self.deltas.floor_piece(slot, start, piece)
            else:
                piece = rows[0]
            sink(slot, start, piece)

        with torch.no_grad():
            parallel_for(work, self._items(kernel), lambda: None, threads=self._threads)

    def table(self, c: Tensor) -> Tensor:
        """Return the coefficients by block, ``B x N``, of ``c`` (``N B``, expert by expert)."""
        return c.view(-1, self._count).T.contiguous()

    def least_memory(self) -> int:
        """Return how many bytes a single thread needs, with pieces as short as they may be."""
        return self._each() * self._shortest() + self.kernel.overhead(1)

    def limit(self, room: int, threads: int) -> None:
        """Choose threads and lengths of pieces that need no more than ``room`` bytes in all.

        Args:
            room: Bytes.
            threads: How many threads there should be; there are fewer where pieces would be too
                short.

        Raises:
            MergeError: When it is less than `least_memory`.
        """
        each, shortest = self._each(), self._shortest()
        for count in range(threads, 0, -1):
            chunk = (room - self.kernel.overhead(count)) // count // each
            if chunk >= shortest:
                self._threads, self._chunk = count, min(self._chunk, chunk)
                return
        raise MergeError(
            f"merging needs {self.least_memory() / 1e6:.0f} MB besides what the program itself "
            f"takes, and {max(room, 0) / 1e6:.0f} MB are allowed",
            hint="allow more memory, or choose an operator that merges number by number",
        )

    def _each(self) -> int:
        """Return how many bytes each number of a piece takes: in rows, read, and for the kernel."""
        count = len(self.deltas.experts)
        return 4 * (1 + count) + 8 + self.kernel.room(count)

    def _shortest(self) -> int:
        units = (
            slot.numel if self.kernel.whole(i) else self.kernel.unit(i)
            for i, slot in enumerate(self.deltas.layout.slots)
        )
        return max(_SHORTEST, *units)

    def _check(self, c: Tensor) -> Tensor:
        d = len(self.deltas.experts) * self._count
        c = check_coefficients(c, d + len(self._settings))
        if self._signed:
            return c
        if bool((c[:d] < -_NOTHING).any()):
            raise MergeError(
                f"coefficients must not be negative, got {c[:d].tolist()}",
                hint="this operator takes coefficients from 0 on",
            )
        return torch.cat([c[:d].clamp_min(0.0), c[d:]])

    def _items(self, kernel: Kernel) -> list[tuple[int, int, int]]:
        items: list[tuple[int, int, int]] = []
        for index, slot in enumerate(self.deltas.layout.slots):
            unit = slot.numel if kernel.whole(index) else kernel.unit(index)
            step = unit * max(1, self._chunk // max(unit, 1))
            items += [
                (index, start, min(start + step, slot.numel))
                for start in range(0, slot.numel, max(step, 1))
            ]
        return items


@runtime_checkable
class ReadsPieces(Protocol):
    """An operator that reads task vectors by pieces alone, so that models may stay on disk."""

    def prepare_pieces(self, deltas: Deltas) -> KernelMerge:
        """Do, once, all the work that does not depend on the coefficients."""
        ...
