"""Resident task vectors: all experts' deltas as rows of one matrix, laid out like the base.

Task vectors ``v_n = theta_n - theta_base`` are those of Ilharco et al., *Editing Models with
Task Arithmetic*, arXiv 2212.04089, section 2. Shapes: ``N`` experts, ``P`` numbers in the flat
layout (the floating values of the model and a little padding). Their cosines come from the matrix
in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import AdaptedTensor, LowRank
from map_bo.merging.align.layout import FlatLayout, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.row_filling import Extras, Put, adapters_among, dense_among, fill
from map_bo.merging.vectors.rows_cache import MappedRows, RowsCache, rows_key
from map_bo.merging.vectors.storage import estimate_memory, require_available, storage_dtype

__all__ = ["TaskVectors", "cosines"]

_CHUNK = 1 << 20  # numbers of all task vectors together that are held in float64 at once


@dataclass(frozen=True, eq=False)
class TaskVectors:
    """The base and the task vectors of all experts, resident on one device or mapped from a file.

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
        mapped: Where the rows are mapped from; None where they are in memory. Mapped rows are not
            to be written to, and are not copied when they are pickled.
        spare_memory: Whether what is prepared from the rows may take memory of their size too.
    """

    experts: tuple[str, ...]
    layout: FlatLayout
    rows: Tensor
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    floors: tuple[tuple[slice, Tensor], ...] = ()
    dense: tuple[int, ...] | None = None
    adapted: Mapping[int, AdaptedTensor] = field(default_factory=dict)
    mapped: MappedRows | None = None
    spare_memory: bool = True

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
        """Whether rows are in memory and there is more to take; see `Deltas`."""
        return self.spare_memory and self.mapped is None

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
        """Bytes of rows and factors; of mapped rows those of the file."""
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

    def factors(self, slot: int) -> dict[int, LowRank]:
        """Return the changes of a tensor by adapters that are factors alone; see `HasFactors`."""
        if self.dense is None:
            return {}
        known = self.adapted.get(slot)
        others = set(self.dense) | set(known.values if known is not None else ())
        shape = self.layout.slots[slot].shape
        rows = shape[0] if shape else 1
        columns = shape.numel() // max(rows, 1)
        nothing = LowRank(self.rows.new_zeros(rows, 0), self.rows.new_zeros(0, columns))
        return {
            n: nothing if known is None else known.change(n)
            for n in range(len(self.experts))
            if n not in others
        }

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

    def release(self) -> None:
        """Give the pages of mapped rows back to the system; of rows in memory nothing happens."""
        if self.mapped is not None:
            self.mapped.release()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.mapped is not None and self.rows is self.mapped.rows:
            del state["rows"]  # the other process maps them itself
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "rows" not in state:
            self.__dict__["rows"] = state["mapped"].rows

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
        cache: str | Path | None = None,
        spare_memory: bool = True,
    ) -> TaskVectors:
        """Read base and experts, piece by piece, and check that they fit each other.

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

        With ``cache`` the rows are written to a file there, once for the same inputs, and mapped
        from it; the numbers, and what is refused, are the same. See `RowsCache`.

        Args:
            base: The base checkpoint.
            experts: Name -> checkpoint of the ``N`` experts.
            dtype: Storage: float32 (default), or what halves memory: bfloat16 keeps two to three
                digits of every base weight and every delta; float16 keeps three to four of
                numbers from 6e-5 to 65504, and only steps of 6e-8 below. In float16 larger
                numbers are refused, and experts that it changes by more than 1 % of the length
                of their task vector.
            device: Where the rows live.
            check_base: Whether to refuse experts that do not look fine-tuned from the base.
            ties: Further ties, alias -> canonical name, that the model has and the base does
                not record; names that the base lacks are passed over.
            cache: Folder that rows are mapped from; None reads them into memory.
            spare_memory: See the attribute.

        Raises:
            MergeError: When a rule is broken; the message names the expert and the tensors. Also
                when there is not the memory, or not the room on disk.
        """
        dtype = storage_dtype(dtype)
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        layout = FlatLayout.of(base, join_ties(base, ties or {}))
        dense = dense_among(base, experts)
        shape = (1 + len(dense), layout.size)
        need = estimate_memory(base, experts, layout, dtype)
        mapped: MappedRows | None = None
        if cache is None:
            if torch.device(device).type == "cpu":
                require_available(need.total)
            rows = torch.zeros(shape, dtype=dtype, device=device)

            def put(row: int, start: int, piece: Tensor) -> None:
                rows[row, start : start + len(piece)].copy_(piece)

            extras = fill(
                base, experts, layout, put, dtype=dtype, device=device, check_base=check_base
            )
        else:
            if torch.device(device).type != "cpu":
                raise MergeError(
                    f"rows for {device} cannot be mapped from a file",
                    hint="use the CPU, or leave the cache out",
                )
            require_available(need.extras)
            written = False

            def write(put: Put) -> Extras:
                nonlocal written
                written = True
                return fill(base, experts, layout, put, dtype=dtype, check_base=check_base)

            mapped, extras = RowsCache(Path(cache).expanduser()).rows(
                rows_key(base, experts, layout, dtype),
                shape,
                dtype,
                write,
            )
            rows = mapped.rows
            if check_base and not written:  # perhaps it was not asked for then
                extras.judge(tuple(experts))
        slots = layout.slots
        return cls(
            tuple(experts),
            layout,
            rows,
            extras.fixed,
            tuple((slice(slots[i].offset, slots[i].stop), v) for i, v in extras.floors.items()),
            dense if adapters_among(base, experts) else None,
            extras.adapted,
            mapped,
            spare_memory,
        )


def cosines(vectors: TaskVectors) -> Tensor:
    """Return the cosine of the angle between every two task vectors, ``N x N``.

    One pass over the task vectors, summed in float64 chunk by chunk, so that the memory needed
    does not grow with the models. Adapters are compared by small products of their factors.
    """
    rows, experts = vectors.rows[1:], len(vectors.experts)
    own = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    step = max(1, _CHUNK // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step].double()
        own += (part @ part.T).cpu()
    products = torch.zeros(experts, experts, dtype=torch.float64)
    dense = torch.tensor(vectors.dense_experts, dtype=torch.long)
    products[dense[:, None], dense] = own
    for index, adapted in vectors.adapted.items():
        slot = vectors.layout.slots[index]
        products += adapted.gram(experts)
        for row, expert in zip(rows, vectors.dense_experts, strict=True):
            mixed = adapted.project(row[slot.offset : slot.stop], experts)
            products[expert] += mixed
            products[:, expert] += mixed
    norms = products.diagonal().sqrt()
    return (products / torch.outer(norms, norms)).clamp(-1.0, 1.0)
