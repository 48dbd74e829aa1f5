"""Other ways to merge the same models in memory, where their libraries are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.merge_models import tensors
from map_bo.merging.vectors.task_vectors import TaskVectors

__all__ = [
    "FUSION_BENCH",
    "MERGEKIT",
    "Merge",
    "fusion_bench_merge",
    "installed",
    "loop_merge",
    "mergekit_merge",
    "module_of",
    "require_equal",
    "states_of",
]

MERGEKIT, FUSION_BENCH = "mergekit", "fusion-bench"

Merge = Callable[[Tensor], Mapping[str, Tensor]]
"""Takes ``N`` coefficients and returns the merged model."""


def installed(distribution: str) -> str | None:
    """Return the version of a library, or None where there is none."""
    module = distribution.replace("-", "_")
    # FusionBench, once imported, has no spec, and is not found any more.
    if module not in sys.modules and util.find_spec(module) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def loop_merge(vectors: TaskVectors) -> Merge:
    """Return a merge over dictionaries of task vectors, with new tensors for every candidate."""
    base = tensors(vectors, vectors.base)
    deltas = [tensors(vectors, delta) for delta in vectors.deltas]

    def merge(c: Tensor) -> dict[str, Tensor]:
        merged = {}
        for name, tensor in base.items():
            total = tensor.clone()
            for weight, delta in zip(c.tolist(), deltas, strict=True):
                total.add_(delta[name], alpha=weight)
            merged[name] = total
        return merged

    return merge


def states_of(vectors: TaskVectors) -> dict[str, dict[str, Tensor]]:
    """Return ``base`` and every expert as state dicts; those of experts are new memory."""
    states = {"base": tensors(vectors, vectors.base)}
    for name, delta in zip(vectors.experts, vectors.deltas, strict=True):
        states[name] = tensors(vectors, vectors.base + delta)
    return states


def mergekit_merge(
    states: Mapping[str, Mapping[str, Tensor]],
    method: str = "task_arithmetic",
    parameters: Mapping[str, float] | None = None,
) -> Merge:
    """Return mergekit's merge of state dicts in memory (see `states_of`)."""
    from mergekit.merge_methods import merge_state_dicts

    experts = [name for name in states if name != "base"]

    def merge(c: Tensor) -> Mapping[str, Tensor]:
        weights = dict(zip(experts, c.tolist(), strict=True))
        merged: Mapping[str, Tensor] = merge_state_dicts(
            states, method, base="base", parameters={"weight": weights, **(parameters or {})}
        )
        return merged

    return merge


def fusion_bench_merge(states: Mapping[str, Mapping[str, Tensor]]) -> Merge:
    """Return FusionBench's merge of modules in memory: all coefficients are the first one."""
    from fusion_bench.method import TaskArithmeticAlgorithm

    pool = {
        ("_pretrained_" if name == "base" else name): module_of(s) for name, s in states.items()
    }

    def merge(c: Tensor) -> Mapping[str, Tensor]:
        algorithm = TaskArithmeticAlgorithm(scaling_factor=float(c[0]), inplace=False)
        merged: Mapping[str, Tensor] = algorithm.run(pool).state_dict()
        return merged

    return merge


def module_of(state: Mapping[str, Tensor]) -> nn.Module:
    """Return a module whose state dict is this one."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module: Any = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def require_equal(
    name: str,
    vectors: TaskVectors,
    out: Tensor,
    other: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
) -> None:
    """Stop when a way of merging does not compute the same model: its time would mean nothing.

    Args:
        name: What to call the other way.
        vectors: What was merged.
        out: ``P`` merged by map_bo.
        other: The same merged otherwise.
        tolerance: Largest norm of a tensor's difference over that of the tensor; by default what
            rounding experts and every partial sum to the storage allows for.
    """
    if tolerance is None:
        tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    for slot in vectors.layout.slots:
        ours, theirs = slot.of(out).float(), other[slot.name].float()
        if not float((ours - theirs).norm()) <= tolerance * float(ours.norm()):
            raise SystemExit(f"{name} merges {slot.name} otherwise than map_bo")
