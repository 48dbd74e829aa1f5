"""Task arithmetic of 8 experts beside a copy of as many bytes, in memory and to disk.

A linear merge must read the base and every task vector and write the merged weights once. The
yardstick is a plain copy in memory that moves as many bytes, half of them read and half written.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.speed.merge_disk import bytes_needed, models_on_disk
from benchmarks.speed.merge_models import coefficients, resident
from benchmarks.speed.merge_part import (
    ABSENT,
    Copy,
    Options,
    Outcome,
    Way,
    dtype_name,
    in_turns,
    medians,
    over,
    row,
    storages,
    table_of,
    timed,
)
from benchmarks.speed.merge_peers import (
    FUSION_BENCH,
    MERGEKIT,
    Merge,
    fusion_bench_merge,
    installed,
    loop_merge,
    mergekit_merge,
    require_equal,
    states_of,
)
from benchmarks.speed.merge_shapes import LlamaShape, Size
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors

__all__ = ["measure", "scratch_bytes"]

EXPERTS = 8
GOALS = {"float32": 1.25, "bfloat16": 1.6, "float16": 1.6}
LABELS = {
    "copy": "copy of as many bytes",
    "map_bo": "map_bo",
    "loop": "dictionary of tensors, loop",
    "mergekit": "mergekit.merge_state_dicts",
    "fusion_bench": "FusionBench, TaskArithmeticAlgorithm",
    "map_bo disk": "map_bo.merge_checkpoints, disk to disk",
    "mergekit disk": "mergekit.run_merge, disk to disk",
}


def scratch_bytes(size: Size) -> int:
    """Return the space on disk that this part needs."""
    return bytes_needed(size.resident, EXPERTS, torch.float32)


def measure(options: Options) -> Outcome:
    """Measure every storage, one after the other."""
    shape, rows, lines = options.size.resident, {}, []
    for dtype in storages():
        storage = dtype_name(dtype)
        rows[storage] = result = in_memory(shape, dtype, options.size.repeats)
        gc.collect()  # one storage at a time is in memory
        disk = storage in options.size.disk_storages
        if disk:
            _add(result, on_disk(shape, dtype, options))
            gc.collect()
        for name, label in LABELS.items():
            if name.endswith("disk") and not disk:
                continue
            if name not in result["seconds"]:
                lines.append(row(storage, label, ABSENT, None, None, None))
                continue
            took = result["seconds"][name]
            # The rate of what must be moved, whatever a way moves besides.
            rate = f"{result['bytes'] / took / 1e9:.1f}"
            ratio = f"{result['over copy'][name]:.2f}"
            goal = f"<= {GOALS[storage]}" if name == "map_bo" else None
            lines.append(row(storage, label, took, rate, ratio, goal))
    million = shape.parameters / 1e6
    note = (
        f"Task arithmetic of {EXPERTS} experts of {million:.3g} M parameters on "
        f"{torch.get_num_threads()} threads; medians of {options.size.repeats} turns, to disk of "
        f"{options.size.disk_repeats}, inputs in the page cache."
    )
    heads = ("storage", "way", "seconds", "GB/s", "over copy", "goal")
    data = {
        "experts": EXPERTS,
        "parameters": shape.parameters,
        "repeats": options.size.repeats,
        "mergekit": installed(MERGEKIT),
        "fusion_bench": installed(FUSION_BENCH),
        "rows": rows,
    }
    title = f"Merge of {EXPERTS} experts x {million:.3g} M parameters"
    return Outcome(title, table_of(note, heads, lines), data)


def in_memory(shape: LlamaShape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Measure the ways that keep everything in memory."""
    vectors = resident(shape, EXPERTS, dtype)
    merge = TaskArithmetic().prepare(vectors)
    out = torch.empty(vectors.layout.size, dtype=dtype)
    copy = Copy(vectors.rows, (EXPERTS + 2) * out.numel() * out.element_size())
    ways: dict[str, Way] = {
        "copy": timed(copy),
        "map_bo": timed(lambda turn: merge.write(coefficients(EXPERTS, turn), out)),
    }
    for name, peer in _peers(vectors).items():
        c = coefficients(EXPERTS)
        if name == "fusion_bench":
            c.fill_(float(c[0]))  # it has one factor for all
        merge.write(c, out)
        require_equal(name, vectors, out, peer(c))
        ways[name] = timed(partial(_candidate, peer))
    seconds = in_turns(ways, repeats)
    return {
        "bytes": copy.nbytes,
        "seconds": medians(seconds),
        "over copy": over(seconds),
        "all seconds": seconds,
    }


def _peers(vectors: TaskVectors) -> dict[str, Merge]:
    peers = {"loop": loop_merge(vectors)}
    if installed(MERGEKIT) or installed(FUSION_BENCH):
        states = states_of(vectors)
        if installed(MERGEKIT):
            peers["mergekit"] = mergekit_merge(states)
        if installed(FUSION_BENCH):
            peers["fusion_bench"] = fusion_bench_merge(states)
    return peers


def _candidate(peer: Merge, turn: int) -> Mapping[str, torch.Tensor]:
    return peer(coefficients(EXPERTS, turn))


def on_disk(shape: LlamaShape, dtype: torch.dtype, options: Options) -> dict[str, Any]:
    """Measure the merges from disk to disk, beside a copy in memory."""
    with models_on_disk(options.scratch, shape, EXPERTS, dtype, shards=1) as merges:
        source = torch.zeros(merges.moved // 2, dtype=torch.uint8)
        ways: dict[str, Way] = {
            "copy": timed(Copy(source, merges.moved)),
            "map_bo disk": merges.way("map_bo disk", "merge"),
        }
        if installed(MERGEKIT):
            ways["mergekit disk"] = merges.way("mergekit disk", "mergekit")
        ways["copy"](0)  # its target is paged in
        seconds = in_turns(ways, options.size.disk_repeats, warm_up=False)
        return {
            "seconds": medians(seconds),
            "over copy": over(seconds),
            "all seconds": seconds,
            "peak bytes": merges.peaks,
            "cached": merges.cached,
        }


def _add(result: dict[str, Any], further: dict[str, Any]) -> None:
    """Add the merges to disk to a result; the copy beside them has a name of its own."""
    for kind in ("seconds", "over copy", "all seconds"):
        for name, value in further[kind].items():
            result[kind]["copy beside disk" if name == "copy" else name] = value
    result["peak bytes"], result["cached"] = further["peak bytes"], further["cached"]
