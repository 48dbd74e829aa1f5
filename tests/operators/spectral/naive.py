"""Naive statements of spectral merges, by singular value decompositions of whole matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U``, ``s`` and ``V^T`` in float64."""
    found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix.double(), full_matrices=False)
    return found


def procrustes(matrix: Tensor) -> Tensor:
    U, _, Vh = svd(matrix)
    result: Tensor = U @ Vh
    return result


def tsv_m(deltas: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    """Return the change of a matrix by TSV-M with blocks of singular values times ``c``."""
    keep = min(deltas[0].shape) // len(deltas)
    lefts, values, rights = [], [], []
    for weight, delta in zip(c, deltas, strict=True):
        U, s, Vh = svd(delta)
        lefts.append(U[:, :keep])
        values.append(weight * s[:keep])
        rights.append(Vh[:keep])
    U, V = procrustes(torch.cat(lefts, dim=1)), procrustes(torch.cat(rights))
    return U @ torch.diag(torch.cat(values)) @ V


def iso_c(deltas: Sequence[Tensor], c: Sequence[float]) -> Tensor:
    total = torch.zeros_like(deltas[0], dtype=torch.float64)
    for weight, delta in zip(c, deltas, strict=True):
        total += weight * delta.double()
    U, s, Vh = svd(total)
    return U @ torch.diag(torch.full_like(s, float(s.mean()))) @ Vh


def iso_cts(deltas: Sequence[Tensor], common: float = 0.8) -> Tensor:
    """Return the change of a matrix by Iso-CTS with the coefficient 1."""
    size, count = min(deltas[0].shape), len(deltas)
    specific = round((size - int(size * common)) / count)
    shared = size - specific * count
    U0, s0, V0 = svd(torch.stack([d.double() for d in deltas]).sum(0))
    U0, s0, V0 = U0[:, :shared], s0[:shared], V0[:shared]
    lefts, values, rights = [U0], [s0], [V0]
    for delta in deltas:
        U, s, Vh = svd(delta.double() - U0 @ U0.T @ delta.double())
        lefts.append(U[:, :specific])
        values.append(s[:specific])
        rights.append(Vh[:specific])
    level = torch.cat(values).mean()
    return level * procrustes(torch.cat(lefts, dim=1)) @ procrustes(torch.cat(rights))
