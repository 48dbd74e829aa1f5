"""How task vectors are kept under a cap: in float32, narrower, or mapped from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, is_variance, joined_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.memory import available_bytes, bytes_of, in_words
from map_bo.merging.vectors.row_filling import STORAGE, adapters_among, dense_among

__all__ = ["Needed", "Storage", "StorageDtype", "needed", "require_available", "storage_dtype"]

StorageDtype = torch.dtype | Literal["auto"]
"""A dtype that rows are stored in, or ``"auto"``: float32, or bfloat16 where a cap asks for it."""

# What operators prepare from rows takes, at most, twice the float32 rows (float64 in RegMean).
_ROOMY = 3


@dataclass(frozen=True)
class Needed:
    """Bytes that task vectors take.

    Attributes:
        rows: Of the rows, which can be mapped from a file.
        beside: Of what is always in memory: the factors and values of adapters, floors, and the
            tensors that are not merged.
    """

    rows: int
    beside: int

    @property
    def total(self) -> int:
        """Bytes of it all."""
        return self.rows + self.beside


def needed(
    base: Checkpoint, experts: Mapping[str, Checkpoint], layout: FlatLayout, dtype: torch.dtype
) -> Needed:
    """Return what the task vectors will take, from names and shapes alone.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        layout: The layout of the base.
        dtype: Storage.
    """
    rows = (1 + len(dense_among(base, experts))) * layout.size * dtype.itemsize
    beside = sum(4 * slot.numel for slot in layout.slots if is_variance(slot.name))
    beside += sum(base.layout(name).nbytes for name in layout.fixed)
    for adapter in adapters_among(base, experts).values():
        layouts = adapter.reader.layouts
        for pair in adapter.factors.values():
            A, B = layouts[pair.A].shape, layouts[pair.B].shape
            # In float32, with the owner of each rank.
            beside += 4 * (A.numel() + B.numel()) + 8 * min(A[0], *B[:2])
        for name in {*adapter.values, *adapter.biases}:
            beside += base.shape(name).numel() * dtype.itemsize
    return Needed(rows, beside)


@dataclass(frozen=True)
class Storage:
    """How task vectors are kept; see `of`.

    Attributes:
        dtype: What rows are stored in.
        cache: The folder of the cache that rows are mapped from; None keeps them in memory.
        roomy: Whether what operators prepare from the rows may take memory of their size.
    """

    dtype: torch.dtype = torch.float32
    cache: Path | None = None
    roomy: bool = True

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        *,
        dtype: StorageDtype | None = None,
        device: torch.device | str = "cpu",
        max_memory: int | str | None = None,
        cache: Path | None = None,
        ties: Mapping[str, str] | None = None,
    ) -> Storage:
        """Decide, from names and shapes alone, so that the same settings decide the same.

        Under a cap: float32 (or the given dtype) in memory where that fits; else, where ``dtype``
        is ``"auto"``, bfloat16 in memory where that fits; else rows in float32 (or the given
        dtype) that are mapped from a file in the cache, which gives the numbers that rows in
        memory give. Without a cap, rows are mapped where a cache is given, and in memory where
        none is.

        Args:
            base: The base.
            experts: Name -> checkpoint.
            dtype: Storage; None is float32, and so is ``"auto"`` without a cap.
            device: Where the rows are to live. Only those on the CPU can be mapped.
            max_memory: Bytes of memory for rows, factors of adapters and what operators prepare
                from them, or text such as ``"2GB"``. The model and what evaluators take come on
                top. Pages of a mapped file do not count: the system takes them back as needed.
            cache: Folder for mapped rows.
            ties: Further ties, alias -> canonical name.

        Raises:
            MergeError: When nothing fits; the message says what each would take.
        """
        wide = storage_dtype(dtype)
        if max_memory is None:
            return cls(wide, cache, roomy=cache is None)
        most = bytes_of(max_memory, "max_memory")
        layout = FlatLayout.of(base, joined_ties(base, ties or {}))
        takes: dict[str, int] = {}
        for kind in (wide, torch.bfloat16) if dtype == "auto" else (wide,):
            need = needed(base, experts, layout, kind)
            takes[_plain(kind)] = need.total
            if need.total <= most:
                return cls(kind, None, roomy=_ROOMY * need.total <= most)
        beside = needed(base, experts, layout, wide).beside
        mappable = torch.device(device).type == "cpu"
        if cache is not None and mappable and beside <= most:
            return cls(wide, cache, roomy=False)
        told = ", ".join(f"{in_words(size)} in {kind}" for kind, size in takes.items())
        message = f"max_memory is {in_words(most)}, and the task vectors take {told}"
        least = min(takes.values())
        if not mappable:
            hint = f"allow {in_words(least)}, or use the CPU, where rows can be mapped from a file"
        elif beside > most:
            message += f", of which {in_words(beside)} are always in memory"
            hint = f"allow {in_words(beside)}, or give fewer adapters or lower ranks"
        else:
            hint = f"allow {in_words(least)}, or give a folder that rows can be mapped from"
        if dtype in (None, torch.float32) and beside <= most:
            hint += "; dtype 'auto' may take half"
        raise MergeError(message, hint=hint)


def storage_dtype(dtype: StorageDtype | None) -> torch.dtype:
    """Return the dtype that is meant where memory does not matter.

    Raises:
        MergeError: When rows cannot be stored in it.
    """
    if dtype is None or dtype == "auto":
        return torch.float32
    if dtype not in STORAGE:
        raise MergeError(
            f"task vectors cannot be stored as {dtype}",
            hint=f"choose {', '.join(map(str, STORAGE[:-1]))} or {STORAGE[-1]}",
        )
    return dtype


def require_available(need: int) -> None:
    """Refuse to take memory that is not there: the system would end the process instead.

    Args:
        need: Bytes that are about to be taken.

    Raises:
        MergeError: When less is available.
    """
    available = available_bytes()
    if available is not None and need > available:
        raise MergeError(
            f"the task vectors take {in_words(need)} of memory, and {in_words(available)} are "
            "available",
            hint="store them as bfloat16, or set max_memory, with which rows that do not fit are "
            "mapped from a file",
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
