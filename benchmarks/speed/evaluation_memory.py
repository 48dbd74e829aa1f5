"""Memory of evaluating merged models under a cap: rows that fit it, and rows mapped from a file.

python -m benchmarks.speed.evaluation_memory [--smoke] [--cap 1GB] [--out FILE.json]

Each model is evaluated in a process of its own. Its evaluator reads every weight once. Anonymous
memory is what the process itself needs; resident memory also counts pages of the mapped file, which
the system takes back whenever others need them. The models are synthetic, in the shapes of a Llama,
and stand in float32 in files, as fine-tuned encoders do.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import finish
from benchmarks.speed.merge_disk import bytes_needed, require_space
from benchmarks.speed.merge_models import coefficients, write_folders
from benchmarks.speed.merge_part import row, table_of
from benchmarks.speed.merge_peers import module_of
from benchmarks.speed.merge_shapes import SIZES, LlamaShape
from benchmarks.speed.merge_worker import peak_resident

__all__ = ["evaluate", "main", "watch_anonymous"]

EXPERTS, EVALUATIONS = 8, 3
_SMOKE = LlamaShape(width=64, layers=1, intermediate=96, vocabulary=50)
_ROOT = Path(__file__).parents[2]


@contextmanager
def watch_anonymous(every: float = 0.01) -> Iterator[list[int]]:
    """Collect how much anonymous memory this process has, in bytes, until the block ends."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            seen.append(anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(anonymous())


def anonymous() -> int:
    """Return the anonymous resident memory of this process in bytes; 0 where it is not told."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s*(\d+) kB", status)
    return int(found.group(1)) * 1024 if found else 0


def evaluate(job: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate a few merges, and return seconds and bytes.

    Args:
        job: ``base``, ``experts`` (name -> folder), ``cap``, ``cache`` (folder of mapped rows) and
            ``shapes`` (name -> shape).
    """
    from map_bo import MergedModelProblem
    from map_bo.rng import make_generator

    shapes = {name: tuple(shape) for name, shape in job["shapes"].items()}

    def read_weights(model: nn.Module) -> float:
        total = sum(float(weight.abs().mean()) for weight in model.parameters())
        return min(total / len(shapes), 1.0)

    names = list(job["experts"])
    before = anonymous()
    with watch_anonymous() as seen:
        problem = MergedModelProblem(
            lambda: module_of({name: torch.empty(shape) for name, shape in shapes.items()}),
            base=job["base"],
            experts=job["experts"],
            evaluators={"size": read_weights},
            max_memory=job["cap"],
            cache_dir=job["cache"] if job["mapped"] else None,
        )
        start = time.perf_counter()
        problem.prepare()
        preparing = time.perf_counter() - start
        took = []
        for turn in range(EVALUATIONS):
            start = time.perf_counter()
            found = problem.evaluate(
                coefficients(len(names), turn).unsqueeze(0), generator=make_generator(turn)
            )
            took.append(time.perf_counter() - start)
            if found.failures[0] is not None:
                raise SystemExit(f"the evaluation failed: {found.failures[0]}")
    mapped = bool(list(Path(job["cache"]).rglob("*"))) if job["mapped"] else False
    return {
        "mapped": mapped,
        "before": before,
        "anonymous": max(seen),
        "resident": peak_resident(),
        "preparing": preparing,
        "evaluation": sorted(took)[len(took) // 2],
    }


def measure(shape: LlamaShape, cap: str, scratch: Path, *, mapped: bool) -> dict[str, Any]:
    """Write the models to a new folder, evaluate in a process of its own, and remove them."""
    rows = (1 + EXPERTS) * shape.parameters * 4
    require_space(scratch, bytes_needed(shape, EXPERTS, torch.float32) + mapped * rows)
    with tempfile.TemporaryDirectory(prefix="map-bo-memory-", dir=scratch) as folder:
        found = write_folders(Path(folder), shape, EXPERTS, torch.float32, shards=4)
        job = {
            "base": str(found.base),
            "experts": {name: str(path) for name, path in found.experts.items()},
            "cap": cap,
            "cache": str(Path(folder) / "cache"),
            "mapped": mapped,
            "shapes": shape.tensors(),
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.evaluation_memory", "--job", json.dumps(job)],
            cwd=_ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"the evaluation failed:\n{done.stderr.strip()[-2000:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"parameters": shape.parameters, "rows": rows, "model": rows // (1 + EXPERTS), **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models: does it run?")
    parser.add_argument("--cap", help="max_memory of the task vectors (1GB; 5MB with --smoke)")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="folder for checkpoints and mapped rows, 11 GB; they are removed (%(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        print(json.dumps(evaluate(json.loads(options.job))))
        return
    cap = options.cap or ("5MB" if options.smoke else "1GB")
    small = _SMOKE if options.smoke else SIZES["middle"].resident
    large = SIZES["smoke" if options.smoke else "full"].resident
    found = [
        measure(small, cap, options.scratch, mapped=False),
        measure(large, cap, options.scratch, mapped=True),
    ]
    heads = (
        *("parameters", "rows GB", "storage", "model GB", "preparing s", "evaluation s"),
        *("anonymous GB, before", "anonymous GB, peak", "resident GB, peak"),
    )
    lines = [
        row(
            f"{one['parameters'] / 1e6:.4g} M",
            f"{one['rows'] / 1e9:.2f}",
            "mapped" if one["mapped"] else "in memory",
            f"{one['model'] / 1e9:.2f}",
            one["preparing"],
            one["evaluation"],
            *(f"{one[name] / 1e9:.2f}" for name in ("before", "anonymous", "resident")),
        )
        for one in found
    ]
    note = (
        f"{EXPERTS} experts in float32 under max_memory={cap}; the model itself is not part of "
        f"the cap. Medians of {EVALUATIONS} evaluations."
    )
    data = {"experts": EXPERTS, "cap": cap, "cases": found}
    finish("Memory of evaluations under a cap", table_of(note, heads, lines), data, options.out)


if __name__ == "__main__":
    main()
