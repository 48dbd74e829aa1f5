"""One merge from disk to disk in a process of its own, which tells its time and its memory.

python -m benchmarks.speed.merge_worker JOB, where JOB is JSON, prints JSON. Libraries are imported
before the clock starts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Job", "peak_resident"]

Job = dict[str, Any]
"""``way``; ``base`` and ``out``, folders; ``experts``, name -> folder; ``coefficients``, name ->
value; and for a merge by map_bo ``operator`` as plain data, and ``max_memory``."""

_BUFFER = 1 << 24


def peak_resident() -> int:
    """Return the largest number of bytes that this process had resident.

    ``ru_maxrss`` would count what its parent had before this program was loaded, so Linux is asked
    for the peak of this program's own memory. Pages of files that are mapped count.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def merge(job: Job) -> Callable[[], object]:
    """Merge with map_bo."""
    from map_bo import merge_checkpoints
    from map_bo.operators.recipes import operator_of

    operator = operator_of(job["operator"])
    return lambda: merge_checkpoints(
        job["base"],
        job["experts"],
        job["coefficients"],
        job["out"],
        operator=operator,
        max_memory=job["max_memory"],
        progress=False,
    )


def digests(job: Job) -> Callable[[], object]:
    """Compute the digests of all inputs and of what was merged, as a merge does for its recipe."""
    from map_bo import open_checkpoint
    from map_bo.merging.export.model import digest_all

    folders = [job["base"], *job["experts"].values(), job["out"]]
    checkpoints = [open_checkpoint(folder) for folder in folders]
    return lambda: digest_all(checkpoints)


def mergekit(job: Job) -> Callable[[], object]:
    """Merge with mergekit, by task arithmetic."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [
        {"model": folder, "parameters": {"weight": job["coefficients"][name]}}
        for name, folder in job["experts"].items()
    ]
    dtype = json.loads((Path(job["base"]) / "config.json").read_text())["torch_dtype"]
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "task_arithmetic",
            "base_model": job["base"],
            "models": models,
            "dtype": dtype,
        }
    )
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    return lambda: run_merge(config, job["out"], options)


def copy(job: Job) -> Callable[[], object]:
    """Read every expert to nowhere and copy the base, forced to the disk."""

    def run() -> None:
        out = Path(job["out"])
        out.mkdir()
        for file in sorted(Path(job["base"]).glob("*.safetensors")):
            with file.open("rb", 0) as source, (out / file.name).open("wb", 0) as target:
                shutil.copyfileobj(source, target, _BUFFER)
                os.fsync(target.fileno())
        for folder in job["experts"].values():
            for file in sorted(Path(folder).glob("*.safetensors")):
                with file.open("rb", 0) as source, open(os.devnull, "wb", 0) as nowhere:
                    shutil.copyfileobj(source, nowhere, _BUFFER)

    return run


WAYS: dict[str, Callable[[Job], Callable[[], object]]] = {
    "copy": copy,
    "digests": digests,
    "merge": merge,
    "mergekit": mergekit,
}


def main() -> None:
    job: Job = json.loads(sys.argv[1])
    work = WAYS[job["way"]](job)
    start = time.perf_counter()
    work()
    took = time.perf_counter() - start
    print(json.dumps({"seconds": took, "peak": peak_resident()}))


if __name__ == "__main__":
    main()
