"""Statistics of the contract's experts, of any size, that the tests of operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.rng import child, make_generator


def fishers(vectors: TaskVectors, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Return a positive Fisher for every tensor but the variance, over some orders of magnitude."""
    generator = make_generator(seed)
    return {
        expert: {
            slot.name: torch.rand(slot.shape, generator=generator).square_().square_()
            for slot in vectors.layout.slots
            if not slot.name.endswith("running_var")
        }
        for expert in vectors.experts
    }


def inputs(expert: str, rows: int, width: int, *, seed: int = 0) -> Tensor:
    """Return ``rows x width`` inputs of a layer, correlated and in another place an expert."""
    generator = child(make_generator(seed), expert)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    centre = torch.randn(width, generator=generator)
    result: Tensor = torch.randn(rows, width, generator=generator) @ mixing + centre
    return result


def products(vectors: TaskVectors, rows: int = 90) -> dict[str, dict[str, Tensor]]:
    """Return the inner products of 30 inputs for the first layer."""
    found = {expert: inputs(expert, rows, 30) for expert in vectors.experts}
    return {expert: {"first.weight": x.T @ x / rows} for expert, x in found.items()}
