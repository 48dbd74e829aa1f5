"""Merges on a GPU as a share of the rate at which it copies its own memory."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.merge_models import coefficients, resident
from benchmarks.speed.merge_part import (
    Copy,
    Options,
    Outcome,
    dtype_name,
    in_turns,
    medians,
    over,
    row,
    storages,
    table_of,
    timed,
)
from benchmarks.speed.merge_shapes import LlamaShape
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator, PreparedMerge
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.sparse import Ties

__all__ = ["measure", "measure_on"]

EXPERTS = 8
GOAL = "80 %"
HEADS = ("storage", "merge", "seconds", "GB/s", "of copy's rate", "goal")
OPERATORS: dict[str, MergeOperator] = {"task arithmetic": TaskArithmetic(), "Ties": Ties()}


def measure(options: Options) -> Outcome:
    """Measure on the GPU, or say that there is none."""
    title = "Merge on a GPU"
    if not torch.cuda.is_available():
        lines = [row(None, "no GPU at hand", *(None,) * 4)]
        return Outcome(title, table_of("", HEADS, lines)[2:], {"device": None})
    shape = options.size.resident
    rows, lines = {}, []
    for dtype in storages():
        storage = dtype_name(dtype)
        rows[storage] = found = measure_on("cuda", shape, dtype, options.size.repeats)
        gc.collect()
        torch.cuda.empty_cache()
        lines += lines_of(storage, found)
    name, million = torch.cuda.get_device_name(), shape.parameters / 1e6
    note = (
        f"{EXPERTS} experts of {million:.3g} M parameters on one {name}; medians of "
        f"{options.size.repeats} turns."
    )
    data = {"device": name, "parameters": shape.parameters, "experts": EXPERTS, "rows": rows}
    return Outcome(title, table_of(note, HEADS, lines), data)


def measure_on(device: str, shape: LlamaShape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Let candidates and a copy on the device of as many bytes take turns."""
    made = resident(shape, EXPERTS, dtype)
    vectors = TaskVectors(made.experts, made.layout, made.rows.to(device))
    out = torch.empty(made.layout.size, dtype=dtype, device=device)
    copy = Copy(vectors.rows, (EXPERTS + 2) * out.numel() * out.element_size())
    ways = {"copy": timed(copy, device)}
    for name, operator in OPERATORS.items():
        ways[name] = timed(partial(_write, operator.prepare(vectors), out), device)
    seconds = in_turns(ways, repeats)
    return {
        "bytes": copy.nbytes,
        "seconds": medians(seconds),
        "share": {name: 1 / ratio for name, ratio in over(seconds).items()},
        "all seconds": seconds,
    }


def _write(merge: PreparedMerge, out: Tensor, turn: int) -> None:
    merge.write(coefficients(EXPERTS, turn), out)


def lines_of(storage: str, found: dict[str, Any]) -> list[str]:
    """Return the lines of a storage."""
    lines = []
    for name, took in found["seconds"].items():
        merges = name != "copy"
        lines.append(
            row(
                storage,
                name if merges else "copy on the device",
                f"{took:.2g}",
                f"{found['bytes'] / took / 1e9:.0f}",
                f"{100 * found['share'][name]:.0f} %",
                f">= {GOAL}" if merges else None,
            )
        )
    return lines
