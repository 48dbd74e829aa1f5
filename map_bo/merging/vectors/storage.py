"""How much memory there is, and how task vectors are kept within a cap.

They are in float32, narrower, or mapped from a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, is_variance, join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.row_filling import STORAGE, adapters_among, dense_among

__all__ = [
    "MemoryNeed",
    "Storage",
    "StorageDtype",
    "available_bytes",
    "estimate_memory",
    "format_bytes",
    "parse_bytes",
    "require_available",
    "resident_bytes",
    "storage_dtype",
]

StorageDtype = torch.dtype | Literal["auto"]
"""A dtype that rows are stored in, or ``"auto"``: float32, or bfloat16 where a cap asks for it."""

# What operators prepare from rows takes, at most, twice the float32 rows (float64 in RegMean).
_SPARE_FACTOR = 3

_UNITS = {
    "": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_UNKNOWN_RESIDENT = 500_000_000  # taken where the system does not say


def parse_bytes(size: float | str, name: str) -> int:
    """Return a number of bytes from a number or from text such as ``"1.5GB"`` or ``"512MiB"``.

    Args:
        size: The size.
        name: What to call it in an error.

    Raises:
        MergeError: For text that is not a size, and for sizes that are not positive.
    """
    number = 0.0
    if isinstance(size, int | float) and not isinstance(size, bool):
        number = float(size)
    elif found := re.fullmatch(r"\s*([\d_.]+)\s*([kmgt]i?)?b?\s*", str(size).lower()):
        with suppress(ValueError):
            number = float(found.group(1)) * _UNITS[found.group(2) or ""]
    if not 1 <= number < math.inf:
        raise MergeError(
            f"{name} must be a size of at least one byte, got {size!r}",
            hint="give a number of bytes, or text such as 500MB, 2GB or 1.5GiB",
        )
    return int(number)


def format_bytes(size: float) -> str:
    """Return a number of bytes in the unit that suits it, such as ``1.5 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return how much memory this process may still take without swapping or being killed.

    That is ``MemAvailable`` of ``/proc/meminfo``, or less where a control group (version 2: a
    container, a job of a cluster) has less left. None where the system does not say.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    found: list[int] = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        entries = dict(line.split(":", 1) for line in lines if ":" in line)
        found.append(1024 * int(entries["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError, IndexError):
        pass
    top = root / "sys/fs/cgroup"
    try:
        (own,) = (
            line.removeprefix("0::").strip("/")
            for line in (root / "proc/self/cgroup").read_text().splitlines()
            if line.startswith("0::")
        )
        folder = top / own
        groups = [folder, *folder.parents[: len(folder.relative_to(top).parts)]]
    except (OSError, ValueError):
        groups = []
    for group in groups:
        try:
            most = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            lines = (group / "memory.stat").read_text().splitlines()
            spare = dict(line.split() for line in lines).get("inactive_file", "0")
            found.append(max(0, most - used + int(spare)))
        except (OSError, ValueError):
            continue  # a group without a bound says "max", and the top one says nothing
    return min(found, default=None)


def resident_bytes() -> int:
    """Return the resident memory of this process, or a guess where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return _UNKNOWN_RESIDENT
    import resource

    return pages * resource.getpagesize()


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that task vectors take.

    Attributes:
        rows: Of the rows, which can be mapped from a file.
        extras: Of what is always in memory: the factors and values of adapters, floors, and the
            tensors that are not merged.
    """

    rows: int
    extras: int

    @property
    def total(self) -> int:
        """Bytes of it all."""
        return self.rows + self.extras


def estimate_memory(
    base: Checkpoint, experts: Mapping[str, Checkpoint], layout: FlatLayout, dtype: torch.dtype
) -> MemoryNeed:
    """Return what the task vectors will take, from names and shapes alone.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        layout: The layout of the base.
        dtype: Storage.
    """
    rows = (1 + len(dense_among(base, experts))) * layout.size * dtype.itemsize
    extras = sum(4 * slot.numel for slot in layout.slots if is_variance(slot.name))
    extras += sum(base.layout(name).nbytes for name in layout.fixed)
    for adapter in adapters_among(base, experts).values():
        layouts = adapter.reader.layouts
        for pair in adapter.factors.values():
            A, B = layouts[pair.A].shape, layouts[pair.B].shape
            # In float32, with the owner of each rank.
            extras += (4 * (A.numel() + B.numel()) + 8 * min(A[0], *B[:2])) // pair.sharing
        for name in {*adapter.values, *adapter.biases}:
            extras += base.shape(name).numel() * dtype.itemsize
    return MemoryNeed(rows, extras)


@dataclass(frozen=True)
class Storage:
    """How task vectors are kept; see `of`.

    Attributes:
        dtype: What rows are stored in.
        cache: The folder of the cache that rows are mapped from; None keeps them in memory.
        spare_memory: Whether what operators prepare from the rows may take memory of their size.
    """

    dtype: torch.dtype = torch.float32
    cache: Path | None = None
    spare_memory: bool = True

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
            return cls(wide, cache, spare_memory=cache is None)
        most = parse_bytes(max_memory, "max_memory")
        layout = FlatLayout.of(base, join_ties(base, ties or {}))
        takes: dict[str, int] = {}
        for kind in (wide, torch.bfloat16) if dtype == "auto" else (wide,):
            need = estimate_memory(base, experts, layout, kind)
            takes[_plain(kind)] = need.total
            if need.total <= most:
                return cls(kind, None, spare_memory=_SPARE_FACTOR * need.total <= most)
        extras = estimate_memory(base, experts, layout, wide).extras
        mappable = torch.device(device).type == "cpu"
        if cache is not None and mappable and extras <= most:
            return cls(wide, cache, spare_memory=False)
        told = ", ".join(f"{format_bytes(size)} in {kind}" for kind, size in takes.items())
        message = f"max_memory is {format_bytes(most)}, and the task vectors take {told}"
        least = min(takes.values())
        if not mappable:
            hint = (
                f"allow {format_bytes(least)}, or use the CPU, where rows can be mapped from a file"
            )
        elif extras > most:
            message += f", of which {format_bytes(extras)} are always in memory"
            hint = f"allow {format_bytes(extras)}, or give fewer adapters or lower ranks"
        else:
            hint = f"allow {format_bytes(least)}, or give a folder that rows can be mapped from"
        if dtype in (None, torch.float32) and extras <= most:
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
            f"the task vectors take {format_bytes(need)} of memory, and "
            f"{format_bytes(available)} are available",
            hint="store them as bfloat16, or set max_memory, with which rows that do not fit are "
            "mapped from a file",
        )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
