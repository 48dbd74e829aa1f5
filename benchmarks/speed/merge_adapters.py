"""Task arithmetic of LoRA adapters that stay factors, beside the same task vectors in full.

The yardstick is the copy of as many bytes as the merge of the full task vectors moves.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

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
from map_bo.merging.adapters.low_rank import AdaptedTensor, LowRank
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.rng import make_generator

__all__ = ["adapters", "in_full", "measure"]

EXPERTS, RANK = 8, 16
LABELS = {"copy": "copy of as many bytes", "factors": "factors", "full": "full task vectors"}


def measure(options: Options) -> Outcome:
    """Measure every storage, one after the other."""
    shape, rows, lines = options.size.resident, {}, []
    for dtype in storages():
        storage = dtype_name(dtype)
        rows[storage] = found = measure_storage(shape, dtype, options.size.repeats)
        gc.collect()
        for name, label in LABELS.items():
            kept = found["resident"].get(name)
            lines.append(
                row(
                    storage,
                    label,
                    None if kept is None else f"{kept / 1e9:.3f}",
                    None if kept is None else f"{kept / found['resident']['full']:.2f}",
                    found["seconds"][name],
                    f"{found['over copy'][name]:.2f}",
                )
            )
    million = shape.parameters / 1e6
    note = (
        f"Task arithmetic of {EXPERTS} adapters of rank {RANK} on all linear layers of a model of "
        f"{million:.3g} M parameters, on {torch.get_num_threads()} threads; medians of "
        f"{options.size.repeats} turns. The base is resident too."
    )
    heads = ("storage", "kept as", "resident GB", "of full", "seconds", "over copy")
    data = {
        "experts": EXPERTS,
        "rank": RANK,
        "parameters": shape.parameters,
        "repeats": options.size.repeats,
        "rows": rows,
    }
    title = f"Merge of {EXPERTS} adapters over {million:.3g} M parameters"
    return Outcome(title, table_of(note, heads, lines), data)


def measure_storage(shape: LlamaShape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Measure factors and full task vectors of the same adapters."""
    factors = adapters(shape, EXPERTS, RANK, dtype)
    full = in_full(factors)
    merges = {"factors": TaskArithmetic().prepare(factors), "full": TaskArithmetic().prepare(full)}
    outs = {name: torch.empty(full.layout.size, dtype=dtype) for name in merges}
    for name, merge in merges.items():
        merge.write(coefficients(EXPERTS), outs[name])
    difference = float((outs["full"].float() - outs["factors"].float()).norm())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    if not difference <= tolerance * float(outs["full"].float().norm()):
        raise SystemExit("factors are merged otherwise than the full task vectors")
    out = outs.pop("full")
    copy = Copy(full.rows, (EXPERTS + 2) * out.numel() * out.element_size())
    ways = {
        "copy": timed(copy),
        "factors": timed(
            lambda turn: merges["factors"].write(coefficients(EXPERTS, turn), outs["factors"])
        ),
        "full": timed(lambda turn: merges["full"].write(coefficients(EXPERTS, turn), out)),
    }
    seconds = in_turns(ways, repeats)
    return {
        "resident": {"factors": factors.nbytes, "full": full.nbytes},
        "seconds": medians(seconds),
        "over copy": over(seconds),
        "all seconds": seconds,
    }


def adapters(shape: LlamaShape, experts: int, rank: int, dtype: torch.dtype) -> TaskVectors:
    """Return a base with adapters on all its linear layers, as `TaskVectors.load` keeps them."""
    base = resident(shape, 0, dtype)
    generator = make_generator(7)
    linear = shape.linear()
    adapted = {}
    for index, slot in enumerate(base.layout.slots):
        if slot.name not in linear:
            continue
        height, width = linear[slot.name]
        changes = {
            expert: LowRank(
                torch.randn(height, rank, generator=generator) * 0.02,
                torch.randn(rank, width, generator=generator) * 0.02,
                2.0,
            )
            for expert in range(experts)
        }
        adapted[index] = AdaptedTensor.of(changes, {}, slot.shape, dtype=dtype, device="cpu")
    names = tuple(f"e{i}" for i in range(experts))
    return TaskVectors(names, base.layout, base.rows, dense=(), adapted=adapted)


def in_full(vectors: TaskVectors) -> TaskVectors:
    """Return the same task vectors as rows, multiplied out."""
    layout = vectors.layout
    rows = torch.zeros(1 + len(vectors.experts), layout.size, dtype=vectors.rows.dtype)
    for index, slot in enumerate(layout.slots):
        rows[:, slot.offset : slot.stop].copy_(vectors.read(index, 0, slot.numel))
    return TaskVectors(vectors.experts, layout, rows)
