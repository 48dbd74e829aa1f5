"""How alike task vectors are: their cosines, from the flat matrix in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.merging.task_vectors import TaskVectors

__all__ = ["cosines"]

_CHUNK = 1 << 20  # numbers of all task vectors together that are held in float64 at once


def cosines(vectors: TaskVectors) -> Tensor:
    """Return the cosine of the angle between every two task vectors, ``N x N``.

    One pass over the task vectors, summed in float64 chunk by chunk, so that the memory needed
    does not grow with the models. Adapters are compared by small products of their factors.
    """
    rows, experts = vectors.rows[1:], len(vectors.experts)
    own = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    step = max(1, _CHUNK // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step].double()
        own += (part @ part.T).cpu()
    products = torch.zeros(experts, experts, dtype=torch.float64)
    dense = torch.tensor(vectors.dense_experts, dtype=torch.long)
    products[dense[:, None], dense] = own
    for index, adapted in vectors.adapted.items():
        slot = vectors.layout.slots[index]
        products += adapted.gram(experts)
        for row, expert in zip(rows, vectors.dense_experts, strict=True):
            mixed = adapted.project(row[slot.offset : slot.stop], experts)
            products[expert] += mixed
            products[:, expert] += mixed
    norms = products.diagonal().sqrt()
    return (products / torch.outer(norms, norms)).clamp(-1.0, 1.0)
