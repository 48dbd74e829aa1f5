"""Merges from disk to disk: each in a process of its own, over inputs that were just read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.merge_models import Folders, coefficients, write_folders
from benchmarks.speed.merge_part import Way
from benchmarks.speed.merge_shapes import LlamaShape

__all__ = ["DiskMerges", "bytes_needed", "models_on_disk", "require_space"]

_ROOT = Path(__file__).parents[2]
_SPARE = 1 << 28
_BUFFER = 1 << 24


def bytes_needed(shape: LlamaShape, experts: int, dtype: torch.dtype) -> int:
    """Return the space that a base, experts and one merged model take."""
    return (experts + 2) * shape.parameters * dtype.itemsize + _SPARE


def require_space(scratch: Path, needed: int) -> None:
    """Stop where there is too little space, before anything is written."""
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise SystemExit(
            f"the models need {needed / 1e9:.1f} GB and {scratch} has {free / 1e9:.1f} GB free; "
            "name another folder with --scratch"
        )


@contextmanager
def models_on_disk(
    scratch: Path, shape: LlamaShape, experts: int, dtype: torch.dtype, *, shards: int
) -> Iterator[DiskMerges]:
    """Write models to a new folder, which is removed afterwards, whatever happens."""
    require_space(scratch, bytes_needed(shape, experts, dtype))
    with tempfile.TemporaryDirectory(prefix="map-bo-merge-", dir=scratch) as folder:
        yield DiskMerges(
            write_folders(Path(folder), shape, experts, dtype, shards=shards),
            Path(folder) / "merged",
        )


class DiskMerges:
    """Ways to merge models on disk, and what was seen of memory and of the page cache.

    Attributes:
        folders: The models.
        out: Folder of the merged one; a merge begins without it.
        peaks: Name -> largest resident bytes of the processes that merged so.
        cached: Share of the inputs that was in the page cache before the merges; the least, and
            None where the system does not tell.
    """

    def __init__(self, folders: Folders, out: Path) -> None:
        self.folders = folders
        self.out = out
        self.peaks: dict[str, int] = {}
        self.cached: float | None = None

    @property
    def moved(self) -> int:
        """Bytes of weights that a merge must read and write: every model once."""
        return (len(self.folders.experts) + 2) * self.folders.nbytes

    def way(
        self,
        name: str,
        way: str,
        *,
        operator: dict[str, Any] | None = None,
        max_memory: str | None = None,
    ) -> Way:
        """Return a way of `merge_worker`; only ``digests`` leaves the last merged model there."""
        experts = list(self.folders.experts)
        c = coefficients(len(experts)).tolist()
        job = {
            "way": way,
            "base": str(self.folders.base),
            "experts": {expert: str(path) for expert, path in self.folders.experts.items()},
            "coefficients": dict(zip(experts, c, strict=True)),
            "out": str(self.out),
            "operator": operator or {"name": "task_arithmetic"},
            "max_memory": max_memory,
        }

        def run(turn: int) -> float:
            if way != "digests":
                shutil.rmtree(self.out, ignore_errors=True)
            self._settle()
            found = _work(job)
            self.peaks[name] = max(self.peaks.get(name, 0), found["peak"])
            return float(found["seconds"])

        return run

    def _settle(self) -> None:
        """Write out what earlier merges left in memory, and read the inputs into it."""
        os.sync()
        room = memoryview(bytearray(_BUFFER))
        for path in self.folders.files:
            with path.open("rb", 0) as file:
                while file.readinto(room):
                    pass
        share = _cached(self.folders.files)
        if share is not None:
            self.cached = share if self.cached is None else min(share, self.cached)


def _work(job: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.merge_worker", json.dumps(job)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"the merge {job['way']!r} failed:\n{done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _cached(files: list[Path]) -> float | None:
    """Return the share of files that is in the page cache, where ``fincore`` is there to tell."""
    command = shutil.which("fincore")
    if command is None:
        return None
    options = ["--bytes", "--noheadings", "--raw", "--output", "RES,SIZE"]
    found = subprocess.run([command, *options, *map(str, files)], capture_output=True, text=True)
    numbers = [int(word) for word in found.stdout.split() if word.isdigit()]
    if found.returncode or len(numbers) != 2 * len(files):
        return None
    # Whole pages are counted, so small files have more in it than they hold.
    return min(1.0, sum(numbers[::2]) / max(sum(numbers[1::2]), 1))
