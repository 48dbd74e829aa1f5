"""Resident task vectors: all experts' deltas as rows of one matrix, laid out like the base.

Task vectors ``v_n = theta_n - theta_base`` are those of Ilharco et al., *Editing Models with
Task Arithmetic*, arXiv 2212.04089, section 2. Shapes: ``N`` experts, ``P`` numbers in the flat
layout (the floating values of the model and a little padding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapted import Adapted
from map_bo.merging.adapter_checkpoint import adapter_over
from map_bo.merging.adapters import Adapter
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.comparing import require_tied
from map_bo.merging.expert_reader import ExpertReader, finite, fixed_tensors
from map_bo.merging.layout import FlatLayout, Slot, is_variance, joined_ties
from map_bo.merging.low_rank import LowRank

__all__ = ["TaskVectors"]

_STORAGE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The base and the task vectors of all experts, resident on one device.

    Attributes:
        experts: ``N`` names, in the order of the rows of ``deltas``.
        layout: Where each tensor lies.
        rows: ``(1 + D) x P``; row 0 is the base, the others are the deltas of the ``D`` experts
            that are whole models, of all ``N`` where none is an adapter. They are one matrix so
            that a linear merge is one product that reads each number once.
        fixed: Canonical name -> the base's value, for the tensors that are not merged.
        floors: For each variance the slice that it has in the flat layout and the smallest value
            that the base or an expert has, by element.
        dense: ``D`` indices of the experts that the rows after the first belong to; None where
            they are all experts.
        adapted: Index of a slot -> what the experts that are adapters change there. They have no
            row: they stay factors of low rank.
    """

    experts: tuple[str, ...]
    layout: FlatLayout
    rows: Tensor
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    floors: tuple[tuple[slice, Tensor], ...] = ()
    dense: tuple[int, ...] | None = None
    adapted: Mapping[int, Adapted] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the rows live."""
        return self.rows.device

    @property
    def threads(self) -> int | None:
        """One for another device than the CPU; see `Deltas`."""
        return None if self.rows.device.type == "cpu" else 1

    @property
    def resident(self) -> bool:
        """True; see `Deltas`."""
        return True

    @property
    def in_place(self) -> bool:
        """Whether pieces are views; see `Deltas`."""
        return self.dense is None and self.rows.dtype == torch.float32

    @property
    def dense_experts(self) -> tuple[int, ...]:
        """``D`` indices of the experts that have a row of their own."""
        return tuple(range(len(self.experts))) if self.dense is None else self.dense

    @property
    def nbytes(self) -> int:
        """Bytes of rows and factors."""
        rows = self.rows.numel() * self.rows.element_size()
        return rows + sum(part.nbytes for part in self.adapted.values())

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a piece of a tensor in float32, a view where it can be; see `Deltas`."""
        offset = self.layout.slots[slot].offset
        part = self.rows[:, offset + start : offset + stop]
        if self.dense is None:
            if part.dtype == torch.float32:
                return part
            return part.float() if out is None else out.copy_(part)
        if out is None:
            out = part.new_empty(1 + len(self.experts), stop - start, dtype=torch.float32)
        out.zero_()
        out[0].copy_(part[0])
        for row, expert in zip(part[1:], self.dense, strict=True):
            out[1 + expert].copy_(row)
        adapted = self.adapted.get(slot)
        for expert in () if adapted is None else adapted.experts:
            assert adapted is not None
            adapted.read(expert, start, stop, out[1 + expert])
        return out

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `Deltas`."""
        offset = self.layout.slots[slot].offset
        for where, floor in self.floors:
            if where.start == offset:
                part = floor[start : start + len(piece)]
                torch.maximum(piece, part.to(piece.dtype), out=piece)

    @property
    def base(self) -> Tensor:
        """``P``: the base, in the storage dtype."""
        return self.rows[0]

    @property
    def deltas(self) -> Tensor:
        """``N x P``: the task vectors, in the storage dtype.

        With adapters they are new memory, as large as those of whole models: for small models
        and tests.
        """
        if self.dense is None:
            return self.rows[1:]
        deltas = self.rows.new_zeros(len(self.experts), self.layout.size)
        for index, slot in enumerate(self.layout.slots):
            deltas[:, slot.offset : slot.stop].copy_(self.read(index, 0, slot.numel)[1:])
        return deltas

    def keep_variances(self, out: Tensor) -> None:
        """Raise every merged variance in ``out`` (``P``) to the least of its models.

        Deltas add up: with coefficients that sum to more than 1 a ``running_var`` can come out
        negative or near zero, and batch normalisation would then return NaN or explode. Every
        operator ends its ``write`` with this. It changes neither the base nor an expert.
        """
        for where, floor in self.floors:
            part = out[where]
            torch.maximum(part, floor.to(out.dtype), out=part)

    @classmethod
    def load(
        cls,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        check_base: bool = True,
        ties: Mapping[str, str] | None = None,
    ) -> TaskVectors:
        """Read base and experts, one tensor at a time, and check that they fit each other.

        The rules:

        - All have the same tensor names and shapes. Where several names are one tensor (tied),
          it is merged once, and a checkpoint may leave out all but one of its names.
        - Floating tensors are merged, buffers such as BatchNorm's running mean and variance
          included, for which see `keep_variances`. The dtypes of base and expert may differ:
          deltas are taken in float32 (float64 where one of them is) and stored in ``dtype``.
        - Other tensors come from the base. Experts may differ in counters (integers with one
          element, such as ``num_batches_tracked``), in nothing larger.
        - Adapters over this base (`adapter_over`) keep their factors, in float32; what they
          change by full values (modules to save, biases) is stored in ``dtype``.
        - An expert that equals the base, or another expert, is refused: its coefficient would
          mean nothing.
        - With ``check_base``, so is an expert that was not fine-tuned from this base. Over all
          tensors of two or more dimensions, two unrelated trainings have a cosine similarity
          near 0 and a difference longer than the base; an expert is refused where the cosine
          is below 0.1 and the difference longer than the base. Below 1000 numbers, where
          chance could decide, and for a base of zeros nothing is refused.

        Args:
            base: The base checkpoint.
            experts: Name -> checkpoint of the ``N`` experts.
            dtype: Storage: float32 (default) or bfloat16, which halves memory and keeps three
                digits of every base weight and every delta.
            device: Where the rows live.
            check_base: Whether to refuse experts that do not look fine-tuned from the base.
            ties: Further ties, alias -> canonical name, that the model has and the base does
                not record; names that the base lacks are passed over.

        Raises:
            MergeError: When a rule is broken; the message names the expert and the tensors.
        """
        dtype = dtype or torch.float32
        if dtype not in _STORAGE:
            raise MergeError(
                f"task vectors cannot be stored as {dtype}",
                hint="choose torch.float32 or torch.bfloat16",
            )
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        layout = FlatLayout.of(base, joined_ties(base, ties or {}))
        readers = [ExpertReader(base, expert, name, layout) for name, expert in experts.items()]
        require_tied(base, layout.ties, "the base")
        over = [adapter_over(base, expert) for expert in experts.values()]
        adapters = {i: adapter for i, adapter in enumerate(over) if adapter is not None}
        _require_distinct_adapters(tuple(experts), adapters)
        dense = tuple(i for i in range(len(experts)) if i not in adapters)
        rows = torch.zeros(1 + len(dense), layout.size, dtype=dtype, device=device)
        floors: list[tuple[slice, Tensor]] = []
        adapted: dict[int, Adapted] = {}
        for index, slot in enumerate(layout.slots):
            pre = finite(base.load(slot.name), slot.name, "the base")
            where = slice(slot.offset, slot.stop)
            rows[0, where].copy_(pre.flatten())
            least = pre.float().flatten()
            for row, i in zip(rows[1:], dense, strict=True):
                tuned = readers[i].load(slot.name)
                row[where].copy_(readers[i].compare(pre, tuned).flatten())
                least = torch.minimum(least, tuned.float().flatten())
            part = _adapted(slot, adapters, readers, rows)
            if part is not None:
                adapted[index] = part
            if is_variance(slot.name):
                for value in () if part is None else part.values.values():
                    least = torch.minimum(least, pre.float().flatten() + value.float().cpu())
                floors.append((where, least.to(device)))
        for reader in readers:
            reader.judge(check_base)
        vectors = cls(
            tuple(experts),
            layout,
            rows,
            fixed_tensors(base, readers, layout),
            tuple(floors),
            dense if adapters else None,
            adapted,
        )
        vectors._require_distinct()
        return vectors

    def _require_distinct(self) -> None:
        rows, names = self.rows[1:], [self.experts[i] for i in self.dense_experts]
        sums = [float(row.sum(dtype=torch.float64)) for row in rows]
        for i, first in enumerate(names):
            for j in range(i):
                if sums[i] == sums[j] and torch.equal(rows[i], rows[j]):
                    raise _same(names[j], first)


def _same(first: str, second: str) -> MergeError:
    return MergeError(
        f"experts {first!r} and {second!r} have the same weights",
        hint="leave one of them out, or check the paths",
    )


def _require_distinct_adapters(names: tuple[str, ...], adapters: Mapping[int, Adapter]) -> None:
    seen: dict[str, str] = {}
    for i, adapter in adapters.items() if len(adapters) > 1 else ():
        other = seen.setdefault(adapter.digest(), names[i])
        if other != names[i]:
            raise _same(other, names[i])


def _adapted(
    slot: Slot, adapters: Mapping[int, Adapter], readers: list[ExpertReader], rows: Tensor
) -> Adapted | None:
    """Return what adapters change in a tensor, or None where they leave it as it is."""
    changes: dict[int, LowRank] = {}
    values: dict[int, Tensor] = {}
    for i, adapter in adapters.items():
        own = readers[i].own[slot.name]
        name = adapter.base.ties.get(own, own)
        change, value = adapter.low_rank(name), adapter.dense(name)
        if change is not None and bool(change.B.any()) and bool(change.A.any()) and change.scale:
            changes[i] = change
        if value is not None and bool(value.any()):
            values[i] = value
        readers[i].moved |= i in changes or i in values
    if not changes and not values:
        return None
    return Adapted.of(changes, values, slot.shape, dtype=rows.dtype, device=rows.device)
