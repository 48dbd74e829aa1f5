"""Base and task vectors read from checkpoints piece by piece, for models larger than memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapter_checkpoint import adapter_over
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.layout import FlatLayout, is_variance, joined_ties
from map_bo.merging.likeness import Likeness
from map_bo.merging.streaming import aligned_names

__all__ = ["StreamedVectors"]

_SAMPLED_TENSORS = 8
_SAMPLED_NUMBERS = 1 << 18


class StreamedVectors:
    """Base and task vectors on disk: a :class:`~map_bo.merging.deltas.Deltas`.

    A piece is read with positioned reads into memory that each thread uses again, so that no more
    is in memory than what is being merged. Values of any floating dtype are widened to float32;
    float8 are taken as plain values.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        ties: Further ties of the base, alias -> canonical name.
        check_base: Whether to refuse experts that do not look fine-tuned from the base, by a
            sample of their largest tensors; the rule is that of `TaskVectors.load`.

    Raises:
        MergeError: When an expert has missing or further tensors, other shapes or kinds of dtype,
            or is of another base.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        ties: Mapping[str, str] | None = None,
        check_base: bool = True,
    ) -> None:
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        self.base = base
        self.checkpoints = dict(experts)
        self.layout = FlatLayout.of(base, joined_ties(base, ties or {}))
        self._names = {name: aligned_names(base, expert, name) for name, expert in experts.items()}
        for slot in self.layout.slots:
            if slot.dtype == torch.float64:
                raise MergeError(
                    f"tensor {slot.name!r} is float64, and pieces are merged in float32",
                    hint="merge it resident, or with task arithmetic, which keeps float64",
                )
        self._raw = threading.local()
        if check_base:
            self._check_base()

    @property
    def experts(self) -> tuple[str, ...]:
        """``N`` names, in the order of the rows."""
        return tuple(self.checkpoints)

    @property
    def device(self) -> torch.device:
        """The CPU: pieces are read there."""
        return torch.device("cpu")

    @property
    def resident(self) -> bool:
        """False; see `Deltas`."""
        return False

    @property
    def in_place(self) -> bool:
        """False; see `Deltas`."""
        return False

    def read(self, slot: int, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a piece of base and task vectors in float32; see `Deltas`.

        Raises:
            MergeError: When a value is NaN or infinite.
            CheckpointError: When a file cannot be read.
        """
        rows = torch.empty(1 + len(self.checkpoints), stop - start) if out is None else out
        for row, (checkpoint, name, label) in zip(rows, self._sources(slot), strict=True):
            adapter = adapter_over(self.base, checkpoint)
            if adapter is None:
                self._values(checkpoint, name, label, start, stop, row)
                continue
            row.copy_(rows[0])  # an adapter is read beside the base, not with it
            change = adapter.piece(self.base.ties.get(name, name), start, stop)
            if change is not None:
                row.add_(change)
        rows[1:].sub_(rows[0])
        return rows

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `Deltas`."""
        if not is_variance(self.layout.slots[slot].name):
            return
        rows = self.read(slot, start, start + len(piece))
        rows[1:].add_(rows[0])
        torch.maximum(piece, rows.amin(0), out=piece)

    def require_same_fixed(self) -> None:
        """Check, as `TaskVectors.load` does, that tensors which are not merged agree.

        Raises:
            MergeError: When one with more than one element differs from the base's.
        """
        for name in self.layout.fixed:
            if name in self.layout.ties or self.base.shape(name).numel() <= 1:
                continue
            value = self.base.load(name)
            for label, checkpoint in self.checkpoints.items():
                if not torch.equal(value, checkpoint.load(self._names[label][name])):
                    raise MergeError(
                        f"tensor {name!r} ({value.dtype}) differs between the base and expert "
                        f"{label!r}, and only floating tensors can be merged",
                        hint="quantised weights are expanded before merging; index tables must "
                        "be those of the base",
                    )

    def _sources(self, slot: int) -> list[tuple[Checkpoint, str, str]]:
        name = self.layout.slots[slot].name
        own = [
            (checkpoint, self._names[label][name], f"expert {label!r}")
            for label, checkpoint in self.checkpoints.items()
        ]
        return [(self.base, name, "the base"), *own]

    def _values(
        self, checkpoint: Checkpoint, name: str, label: str, start: int, stop: int, row: Tensor
    ) -> None:
        dtype = checkpoint.dtype(name)
        if dtype == torch.float32:
            values = checkpoint.read(name, start, stop, out=row)
            if values.data_ptr() != row.data_ptr():
                row.copy_(values)
        else:
            raw = self._room((stop - start) * dtype.itemsize)
            row.copy_(checkpoint.read(name, start, stop, out=raw))
        # The largest magnitude is NaN or infinite where a value is, at the cost of one reading.
        if len(row) and not math.isfinite(float(torch.linalg.vector_norm(row, math.inf))):
            raise MergeError(
                f"tensor {name!r} of {label} holds NaN or infinity",
                hint="this model diverged in training or its file is damaged; leave it out",
            )

    def _room(self, size: int) -> Tensor:
        held: Tensor | None = getattr(self._raw, "memory", None)
        if held is None or len(held) < size:
            with torch.inference_mode(False):
                held = self._raw.memory = torch.empty(size, dtype=torch.uint8)
        return held[:size]

    def _check_base(self) -> None:
        matrices = [i for i, slot in enumerate(self.layout.slots) if len(slot.shape) >= 2]
        matrices.sort(key=lambda i: -self.layout.slots[i].numel)
        seen = {label: Likeness(label) for label in self.checkpoints}
        for slot in matrices[:_SAMPLED_TENSORS]:
            rows = self.read(slot, 0, min(self.layout.slots[slot].numel, _SAMPLED_NUMBERS))
            for likeness, row in zip(seen.values(), rows[1:], strict=True):
                likeness.add(rows[0], row)
        for likeness in seen.values():
            likeness.judge()
