"""Time to merge one candidate: 8 experts of 86 M parameters, beside a copy of the same bytes.

python -m benchmarks.speed.merge [--smoke] [--out FILE.json]

A linear merge must read the base and every task vector and write the merged weights once. The
yardstick is a plain copy (``dst.copy_(src)``) that moves as many bytes, half of them read and
half written. All ways of merging and the copy take turns in one process; the seconds are
medians, and "over copy" is the median of the quotients within a turn, so that what else runs on
the machine disturbs both alike. The weights are synthetic, in the shapes of a ViT-B/16.

The other ways are a loop over a dictionary of resident task vectors, tensor by tensor, and
``mergekit.merge_state_dicts`` where mergekit is installed (``pip install "map-bo[benchmark]"``).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.record import finish
from map_bo.merging.checkpoint import open_checkpoint
from map_bo.merging.layout import FlatLayout
from map_bo.merging.task_arithmetic import TaskArithmetic
from map_bo.merging.task_vectors import TaskVectors
from map_bo.rng import make_generator

EXPERTS = 8
GOAL = 1.25
ABSENT = "not installed"


def shapes(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of a vision transformer with 16 x 16 patches."""
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attention.qkv.weight": (3 * width, width),
        "attention.qkv.bias": (3 * width,),
        "attention.out.weight": (width, width),
        "attention.out.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    return {
        "patches.weight": (width, 3, 16, 16),
        "patches.bias": (width,),
        "positions": (197, width),
        **{f"layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def synthetic(width: int, layers: int, dtype: torch.dtype) -> TaskVectors:
    """Return a base and experts of random weights, laid out as `TaskVectors.load` does."""
    generator: Generator = make_generator(0)
    names = {name: torch.empty(s, dtype=dtype) for name, s in shapes(width, layers).items()}
    layout = FlatLayout.of(open_checkpoint(names), {})
    rows = torch.empty(1 + EXPERTS, layout.size, dtype=dtype)
    for i, row in enumerate(rows):
        # A short random piece, repeated: memory does not care, and it is made in no time.
        piece = torch.randn(1 << 16, generator=generator) * (0.02 if i == 0 else 0.002)
        row.copy_(piece.repeat(-(-layout.size // len(piece)))[: layout.size])
    return TaskVectors(tuple(f"e{i}" for i in range(EXPERTS)), layout, rows)


def mergekit_version() -> str | None:
    """Return the version of mergekit, or None where it cannot be imported."""
    try:
        import mergekit.merge_methods  # noqa: F401

        return metadata.version("mergekit")
    except (ImportError, metadata.PackageNotFoundError):
        return None


def tensors(vectors: TaskVectors, flat: Tensor) -> dict[str, Tensor]:
    return {slot.name: slot.of(flat) for slot in vectors.layout.slots}


def loop_merge(vectors: TaskVectors, c: list[float]) -> Callable[[], dict[str, Tensor]]:
    """Return a merge over dictionaries of tensors, with new tensors for every candidate."""
    base = tensors(vectors, vectors.base)
    deltas = [tensors(vectors, delta) for delta in vectors.deltas]

    def run() -> dict[str, Tensor]:
        merged = {}
        for name, tensor in base.items():
            total = tensor.clone()
            for weight, delta in zip(c, deltas, strict=True):
                total.add_(delta[name], alpha=weight)
            merged[name] = total
        return merged

    return run


def mergekit_merge(vectors: TaskVectors, c: list[float]) -> Callable[[], dict[str, Tensor]]:
    """Return mergekit's merge of the same experts, as state dicts in memory."""
    from mergekit.merge_methods import merge_state_dicts

    states = {"base": tensors(vectors, vectors.base)}
    for name, delta in zip(vectors.experts, vectors.deltas, strict=True):
        states[name] = tensors(vectors, vectors.base + delta)
    parameters = {"weight": dict(zip(vectors.experts, c, strict=True))}

    def run() -> dict[str, Tensor]:
        result: dict[str, Tensor] = merge_state_dicts(
            states, "task_arithmetic", base="base", parameters=parameters
        )
        return result

    return run


def measure(width: int, layers: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    vectors = synthetic(width, layers, dtype)
    c = torch.linspace(0.1, 0.8, EXPERTS, dtype=torch.float64)
    merge = TaskArithmetic().prepare(vectors)
    out = torch.empty(vectors.layout.size, dtype=dtype)
    # The copy reads half of the bytes and writes the other half.
    half = (EXPERTS + 2) * vectors.layout.size // 2
    source, target = vectors.rows.view(-1)[:half], torch.empty(half, dtype=dtype)
    ways: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "map_bo": lambda: merge.write(c, out),
        "loop": loop_merge(vectors, c.tolist()),
    }
    if mergekit_version() is not None:
        ways["mergekit"] = mergekit_merge(vectors, c.tolist())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            took = time.perf_counter() - start
            if turn:
                seconds[name].append(took)
            elif name in ("loop", "mergekit"):
                require_equal(name, vectors, out, result)
            del result
    return {
        "parameters": sum(slot.numel for slot in vectors.layout.slots),
        "bytes": 2 * half * vectors.rows.element_size(),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "over copy": {
            name: median(a / b for a, b in zip(values, seconds["copy"], strict=True))
            for name, values in seconds.items()
        },
        "all seconds": seconds,
    }


def require_equal(name: str, vectors: TaskVectors, out: Tensor, other: dict[str, Tensor]) -> None:
    """Stop when a way of merging does not compute the same model: its time would mean nothing."""
    for slot in vectors.layout.slots:
        ours, theirs = slot.of(out).float(), other[slot.name].float()
        # The others round every partial sum to bfloat16, so they are held to its precision.
        tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
        if float((ours - theirs).norm()) > tolerance * float(ours.norm()):
            raise SystemExit(f"{name} merges {slot.name} otherwise than map_bo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="a small model, two repetitions")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--repeats", type=int, default=9, help="repetitions (default 9)")
    arguments = parser.parse_args()
    width, layers, repeats = (64, 2, 2) if arguments.smoke else (768, 12, arguments.repeats)
    labels = {
        "copy": "copy of as many bytes",
        "map_bo": "map_bo",
        "loop": "dictionary of tensors, loop",
        "mergekit": "mergekit.merge_state_dicts",
    }
    version = mergekit_version()
    table = [
        "| storage | way | seconds | GB/s | over copy | goal |",
        "|---|---|---|---|---|---|",
    ]
    rows: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        storage = str(dtype).removeprefix("torch.")
        result = rows[storage] = measure(width, layers, dtype, repeats)
        for name, label in labels.items():
            if name not in result["seconds"]:
                table.append(f"| {storage} | {label} | {ABSENT} | | | |")
                continue
            took = result["seconds"][name]
            # The rate of what must be moved, whatever a way moves besides.
            rate = result["bytes"] / took / 1e9
            goal = f"<= {GOAL}" if (name, dtype) == ("map_bo", torch.float32) else ""
            table.append(
                f"| {storage} | {label} | {took:.3f} | {rate:.1f} "
                f"| {result['over copy'][name]:.2f} | {goal} |"
            )
        gc.collect()  # one storage at a time is in memory
    size = rows["float32"]["parameters"] / 1e6
    data = {"experts": EXPERTS, "parameters": size * 1e6, "mergekit": version, "rows": rows}
    finish(f"Merge of {EXPERTS} experts x {size:.3g} M parameters", table, data, arguments.out)


if __name__ == "__main__":
    main()
