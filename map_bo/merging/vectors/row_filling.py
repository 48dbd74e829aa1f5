"""Filling the rows of task vectors from checkpoints, piece by piece, and what is refused then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import Adapter, adapter_over
from map_bo.merging.adapters.low_rank import AdaptedTensor, LowRank
from map_bo.merging.align.experts import (
    BaseSimilarity,
    ExpertReader,
    fixed_tensors,
    require_finite,
    require_tied,
    same_weights,
)
from map_bo.merging.align.layout import FlatLayout, Slot, is_variance
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import all_finite
from map_bo.merging.vectors.parallel import parallel_for

__all__ = ["STORAGE", "Extras", "Put", "adapters_among", "dense_among", "fill"]

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that rows are stored in."""

# Numbers of a piece: few enough that those of many experts and threads are small beside a model.
_PIECE = 1 << 18
# float16 has no exponents for changes below 6e-8: from this relative error on it is refused.
_LOST = 0.01

Put = Callable[[int, int, Tensor], None]
"""Takes the index of a row, the index of its first number, and numbers in the storage dtype.

It is called by several threads at once, each with numbers of its own."""


@dataclass(frozen=True, eq=False)
class Extras:
    """What is known of base and experts besides the rows.

    Attributes:
        fixed: Canonical name -> the base's value, for the tensors that are not merged.
        floors: Index of the slot of a variance -> the smallest value that the base or an expert
            has, by element, in float32.
        adapted: Index of a slot -> what the experts that are adapters change there.
        similarity: By expert that is not an adapter, the sums that `BaseSimilarity` gathered.
    """

    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    floors: Mapping[int, Tensor] = field(default_factory=dict)
    adapted: Mapping[int, AdaptedTensor] = field(default_factory=dict)
    similarity: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def judge(self, experts: Sequence[str]) -> None:
        """Refuse an expert that does not look fine-tuned from the base; see `BaseSimilarity.judge`.

        Args:
            experts: ``N`` names.

        Raises:
            MergeError: When there is one.
        """
        for index, sums in self.similarity.items():
            BaseSimilarity(experts[index], sums).judge()


def adapters_among(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> dict[int, Adapter]:
    """Return index -> adapter, for the experts that are adapters over this very base."""
    over = [adapter_over(base, expert) for expert in experts.values()]
    return {i: adapter for i, adapter in enumerate(over) if adapter is not None}


def dense_among(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> tuple[int, ...]:
    """Return the indices of the ``D`` other experts, which have a row each."""
    adapters = adapters_among(base, experts)
    return tuple(i for i in range(len(experts)) if i not in adapters)


def fill(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    layout: FlatLayout,
    put: Put,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    check_base: bool = True,
) -> Extras:
    """Read base and experts piece by piece on all cores, and put the rows where they belong.

    No more is in memory than a piece of each row for each core, and what adapters change by full
    values. The rules are those of `TaskVectors.load`.

    Args:
        base: The base.
        experts: Name -> checkpoint of the ``N`` experts.
        layout: Where each tensor lies.
        put: Takes the pieces: row 0 is the base, the others are the deltas of the ``D`` experts
            that are not adapters. What lies between tensors is not put.
        dtype: Storage of rows and of the full values of adapters.
        device: Where floors and adapters are kept.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.

    Raises:
        MergeError: When a rule is broken; what was put is worth nothing then.
    """
    names = tuple(experts)
    readers = [ExpertReader(base, expert, name, layout) for name, expert in experts.items()]
    require_tied(base, layout.ties, "the base")
    adapters = adapters_among(base, experts)
    _require_distinct_adapters(names, adapters)
    dense = [i for i in range(len(names)) if i not in adapters]
    distinct = _Distinct([names[i] for i in dense])
    lost = [_Lost(names[i]) for i in dense]
    locks = [threading.Lock() for _ in dense]
    floors = {
        index: torch.empty(slot.numel)
        for index, slot in enumerate(layout.slots)
        if is_variance(slot.name)
    }

    def read(item: tuple[int, int, int], _: None) -> None:
        index, start, stop = item
        slot, floor = layout.slots[index], floors.get(index)
        least = None if floor is None else floor[start:stop]
        pre = require_finite(base.read(slot.name, start, stop), slot.name, "the base")
        put(0, slot.offset + start, _narrow(pre, dtype, slot.name, "the base"))
        if least is not None:
            least.copy_(pre)
        stored: list[Tensor] | None = [] if distinct.unsure else None
        for row, i in enumerate(dense):
            tuned = readers[i].read(slot.name, start, stop)
            delta = readers[i].compare(pre, tuned)
            if len(slot.shape) >= 2:
                with locks[row]:
                    readers[i].similarity.add(pre.to(delta), delta)
            kept = _narrow(delta, dtype, slot.name, f"expert {names[i]!r}")
            put(1 + row, slot.offset + start, kept)
            if dtype == torch.float16:
                lost[row].add(delta, kept)
            if least is not None:
                torch.minimum(least, tuned.float(), out=least)
            if stored is not None:
                stored.append(kept)
        if stored is not None:
            distinct.add(stored)

    pieces = [
        (index, start, min(start + _PIECE, slot.numel))
        for index, slot in enumerate(layout.slots)
        for start in range(0, slot.numel, _PIECE)
    ]
    parallel_for(
        read, pieces, lambda: None, threads=None if torch.device(device).type == "cpu" else 1
    )
    adapted: dict[int, AdaptedTensor] = {}
    for index, slot in enumerate(layout.slots) if adapters else ():
        part = _adapt(slot, adapters, readers, dtype, device)
        if part is not None:
            adapted[index] = part
        for value in () if part is None or index not in floors else part.values.values():
            tuned = base.load(slot.name).detach().float().flatten() + value.float().cpu()
            floors[index] = torch.minimum(floors[index], tuned)
    for reader in readers:
        reader.judge(check_base)
    fixed = fixed_tensors(base, readers, layout)
    for each in lost:
        each.judge()
    distinct.judge()
    floors = {index: floor.to(device) for index, floor in floors.items()}
    return Extras(fixed, floors, adapted, {i: readers[i].similarity.sums for i in dense})


class _Distinct:
    """Tells task vectors apart from pieces of them, in one pass."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        # Those that were the same so far stand together.
        self._groups = [list(range(len(names)))]
        self._lock = threading.Lock()

    @property
    def unsure(self) -> bool:
        """Whether two are the same so far."""
        return any(len(group) > 1 for group in self._groups)

    def add(self, pieces: Sequence[Tensor]) -> None:
        """Take in the same piece of all task vectors."""
        with self._lock:
            self._groups = [part for group in self._groups for part in _part(group, pieces)]

    def judge(self) -> None:
        """Refuse two that are the same."""
        for first, second, *_ in sorted(group for group in self._groups if len(group) > 1):
            raise same_weights(self._names[first], self._names[second])


def _part(group: Sequence[int], pieces: Sequence[Tensor]) -> list[list[int]]:
    parts: list[list[int]] = []
    for i in group:
        alike = (part for part in parts if torch.equal(pieces[part[0]], pieces[i]))
        if (part := next(alike, None)) is None:
            parts.append([i])
        else:
            part.append(i)
    return parts


class _Lost:
    """The share of a task vector that float16 rounds away."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._gap = self._whole = 0.0
        self._lock = threading.Lock()

    def add(self, delta: Tensor, kept: Tensor) -> None:
        """Take in a piece and what is stored of it."""
        whole = float(torch.linalg.vector_norm(delta)) ** 2
        gap = float(torch.linalg.vector_norm(delta - kept.to(delta))) ** 2
        with self._lock:
            self._whole += whole
            self._gap += gap

    def judge(self) -> None:
        """Refuse a task vector of which too much is lost."""
        if self._gap > _LOST**2 * self._whole:
            raise MergeError(
                f"float16 would change the task vector of expert {self._label!r} by "
                f"{(self._gap / self._whole) ** 0.5:.2%} of its length: most of its numbers are "
                "below what float16 can tell apart (6e-8)",
                hint="choose torch.bfloat16, which takes the same memory, or torch.float32",
            )


def _narrow(piece: Tensor, dtype: torch.dtype, name: str, label: str) -> Tensor:
    """Return a piece in the storage dtype.

    Raises:
        MergeError: When a number is too large for it.
    """
    if piece.dtype == dtype:
        return piece
    kept = piece.to(dtype)
    if not all_finite(kept):
        largest = float(piece.abs().max())
        raise MergeError(
            f"tensor {name!r} of {label} cannot be stored as {_plain(dtype)}, which ends at "
            f"{torch.finfo(dtype).max:.5g}: it holds {largest:.5g}",
            hint="choose torch.bfloat16, which takes the same memory, or torch.float32"
            if dtype == torch.float16
            else "this model diverged in training; leave it out",
        )
    return kept


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_distinct_adapters(names: tuple[str, ...], adapters: Mapping[int, Adapter]) -> None:
    seen: dict[str, str] = {}
    for i, adapter in adapters.items() if len(adapters) > 1 else ():
        other = seen.setdefault(adapter.digest(), names[i])
        if other != names[i]:
            raise same_weights(other, names[i])


def _adapt(
    slot: Slot,
    adapters: Mapping[int, Adapter],
    readers: Sequence[ExpertReader],
    dtype: torch.dtype,
    device: torch.device | str,
) -> AdaptedTensor | None:
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
            values[i] = _narrow(value, dtype, slot.name, f"expert {readers[i].label!r}")
        if i in changes or i in values:  # never unset: tensors are read in several threads
            readers[i].moved = True
    if not changes and not values:
        return None
    return AdaptedTensor.of(changes, values, slot.shape, dtype=dtype, device=device)
