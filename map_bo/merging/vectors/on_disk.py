"""Base and task vectors that stay on disk, read piece by piece: for models larger than memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_over
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.align.experts import (
    align_names,
    not_finite,
    require_alike,
    require_same_fixed,
    require_tied,
)
from map_bo.merging.align.layout import FlatLayout, is_variance, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite
from map_bo.merging.vectors.parallel import parallel_for

__all__ = ["OnDiskVectors"]


class OnDiskVectors:
    """Base and task vectors on disk: a :class:`~map_bo.merging.vectors.operator.Deltas`.

    A piece is read with positioned reads into memory that each thread uses again, so that no more
    is in memory than what is being merged. Values of any floating dtype are widened to float32;
    float8 are taken as plain values.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        ties: Further ties of the base, alias -> canonical name.
        check_base: Whether to refuse experts that do not look fine-tuned from the base, by a
            sample of their largest tensors; the rule is that of `TaskVectors.load`.
        threads: How many threads may read at once; by default those of torch.

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
        threads: int | None = None,
    ) -> None:
        if not experts:
            raise MergeError("there are no experts", hint="give at least one fine-tuned model")
        self.base = base
        self.checkpoints = dict(experts)
        self.threads = threads
        for name in base.names:
            dtype = base.dtype(name)
            if dtype == torch.float64 or dtype.is_complex:
                raise MergeError(
                    f"tensor {name!r} is {dtype}, and pieces are merged in float32",
                    hint="merge it with task arithmetic, which keeps its precision, or convert "
                    "the base to float32",
                )
        self.layout = FlatLayout.of(base, join_ties(base, ties or {}))
        self._names = {
            label: align_names(base, expert, label, self.layout.ties)
            for label, expert in experts.items()
        }
        self._adapters = {label: adapter_over(base, each) for label, each in experts.items()}
        self._raw = _Raw()
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
        name = self.layout.slots[slot].name
        rows = torch.empty(1 + len(self.checkpoints), stop - start) if out is None else out
        self._values(self.base, name, name, "the base", start, stop, rows[0])
        for row, (label, checkpoint) in zip(rows[1:], self.checkpoints.items(), strict=True):
            own, adapter = self._names[label][name], self._adapters[label]
            if adapter is None:
                self._values(checkpoint, own, name, f"expert {label!r}", start, stop, row)
                row.sub_(rows[0])
                continue
            # What an adapter adds is its task vector, whose digits are not lost beside the base's.
            change = adapter.piece(self.base.ties.get(own, own), start, stop)
            if change is None:
                row.zero_()
            else:
                row.copy_(change)
        return rows

    def factors(self, slot: int) -> dict[int, LowRank]:
        """Return the changes of a tensor by adapters that are factors alone; see `HasFactors`.

        Raises:
            MergeError: When a factor holds NaN or infinity.
        """
        name, shape = self.layout.slots[slot].name, self.layout.slots[slot].shape
        rows = shape[0] if shape else 1
        columns = shape.numel() // max(rows, 1)
        found: dict[int, LowRank] = {}
        for index, label in enumerate(self.checkpoints):
            adapter, own = self._adapters[label], self._names[label][name]
            if adapter is None:
                continue
            own = self.base.ties.get(own, own)
            change = adapter.low_rank(own)
            if adapter.dense(own) is None:
                nothing = LowRank(torch.zeros(rows, 0), torch.zeros(0, columns))
                found[index] = nothing if change is None else change
        return found

    def floor_piece(self, slot: int, start: int, piece: Tensor) -> None:
        """Raise a merged piece of a variance to the least of its models; see `Deltas`."""
        if not is_variance(self.layout.slots[slot].name):
            return
        rows = self.read(slot, start, start + len(piece))
        rows[1:].add_(rows[0])
        torch.maximum(piece, rows.amin(0), out=piece)

    def require_consistent(self) -> None:
        """Check, as `TaskVectors.load` does, tied tensors and those that are not merged.

        Raises:
            MergeError: When tensors that are tied differ in a checkpoint, or one that is not merged
                and has more than one element differs from the base's.
        """
        layout = self.layout
        require_tied(self.base, layout.ties, "the base")
        for label, checkpoint in self.checkpoints.items():
            own = self._names[label]
            ties = {alias: own[kept] for alias, kept in layout.ties.items()}
            require_tied(checkpoint, ties, f"expert {label!r}")
            for name in layout.fixed:
                if name not in layout.ties:
                    require_same_fixed(self.base, name, checkpoint, own[name], label)

    def _check_base(self) -> None:
        def check(label: str, _: None) -> None:
            require_alike(self.base, self.checkpoints[label], self._names[label], label)

        whole = [label for label in self.checkpoints if self._adapters[label] is None]
        parallel_for(check, whole, lambda: None, threads=self.threads)

    def _values(
        self,
        checkpoint: Checkpoint,
        own: str,
        name: str,
        label: str,
        start: int,
        stop: int,
        row: Tensor,
    ) -> None:
        dtype = checkpoint.dtype(own)
        if dtype == torch.float32:
            checkpoint.read(own, start, stop, out=row)
        else:
            raw = self._room((stop - start) * dtype.itemsize)
            row.copy_(checkpoint.read(own, start, stop, out=raw))
        if not all_finite(row):
            raise not_finite(row, name, label)

    def _room(self, size: int) -> Tensor:
        if len(self._raw.memory) < size:
            with torch.inference_mode(False):
                self._raw.memory = torch.empty(size, dtype=torch.uint8)
        return self._raw.memory[:size]


class _Raw(threading.local):
    """Memory of one thread, into which files are read as they are."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(0, dtype=torch.uint8)
