"""Sizes of memory and files, and how a merged model is written within them."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from map_bo.errors import MergeError

__all__ = ["ExportSettings", "available_bytes", "bytes_of", "in_words", "resident_bytes"]

_UNITS = {
    "": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
_UNKNOWN_RESIDENT = 500_000_000  # taken where the system does not say


def bytes_of(size: float | str, name: str) -> int:
    """Return a number of bytes from a number or from text such as ``"1.5GB"`` or ``"512MiB"``.

    Args:
        size: The size.
        name: What to call it in an error.

    Raises:
        MergeError: For text that is no size, and for sizes that are not positive.
    """
    number = 0.0
    if isinstance(size, int | float) and not isinstance(size, bool):
        number = float(size)
    elif found := re.fullmatch(r"\s*([\d_.]+)\s*([kmgt]i?)?b?\s*", str(size).lower()):
        with suppress(ValueError):
            number = float(found.group(1)) * _UNITS[found.group(2) or ""]
    if not 1 <= number < math.inf:
        raise MergeError(
            f"{name} is {size!r}", hint="give a number of bytes, or such as 500MB, 2GB or 1.5GiB"
        )
    return int(number)


def in_words(size: float) -> str:
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
class ExportSettings:
    """How a merged model is written.

    Attributes:
        max_memory: Bytes of resident memory that the process may have in all while it merges from
            files, or text such as ``"2GB"``; None leaves the size of pieces to the operator (some
            hundred MB in all). Files of ``torch.save`` are mapped by torch: what was read of them
            is resident too, until the system takes it back. Statistics that an operator merges by
            and adapters' factors are held.
        shard_size: Largest size of one weight file, in bytes or such text.
        progress: Show a progress bar.

    Raises:
        MergeError: When a size is none.
    """

    max_memory: int | str | None = None
    shard_size: int | str = "5GB"
    progress: bool = False

    def __post_init__(self) -> None:
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", bytes_of(self.max_memory, "max_memory"))
        object.__setattr__(self, "shard_size", bytes_of(self.shard_size, "shard_size"))

    @property
    def memory(self) -> int | None:
        """The bound of the memory in bytes, if there is one."""
        return None if self.max_memory is None else int(self.max_memory)

    @property
    def shard_bytes(self) -> int:
        """The largest size of one weight file in bytes."""
        return int(self.shard_size)
