"""How alike task vectors are: their cosines, from the flat matrix in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.merging.task_vectors import TaskVectors

__all__ = ["cosines"]

_CHUNK = 1 << 20  # numbers of each task vector that are held in float64 at once


def cosines(vectors: TaskVectors) -> Tensor:
    """Return the cosine of the angle between every two task vectors, ``N x N``.

    One pass over the ``N x P`` matrix, summed in float64 chunk by chunk, so that the memory needed
    does not grow with the models.
    """
    deltas = vectors.deltas
    products = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for start in range(0, deltas.shape[1], _CHUNK):
        part = deltas[:, start : start + _CHUNK].double()
        products += (part @ part.T).cpu()
    norms = products.diagonal().sqrt()
    return (products / torch.outer(norms, norms)).clamp(-1.0, 1.0)
