"""The features of a quadratic: ``[1 | z_i | z_i^2 | z_i z_j]`` with ``z`` in ``[-1, 1]``.

Centring the box on zero makes the constant, linear and cross features orthogonal over it, so
that one prior variance for each group says what it seems to say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.space import CoefficientSpace

__all__ = [
    "GROUPS",
    "centred",
    "feature_groups",
    "n_features",
    "quadratic_feature_gradients",
    "quadratic_features",
]

GROUPS = ("constant", "linear", "square", "cross")


def n_features(d: int) -> int:
    """Return ``D = (d + 1)(d + 2) / 2``, the number of coefficients of a quadratic."""
    return (d + 1) * (d + 2) // 2


def feature_groups(d: int) -> Tensor:
    """Return for each of the ``D`` features the index of its group in :data:`GROUPS`."""
    sizes = torch.tensor([1, d, d, d * (d - 1) // 2])
    return torch.repeat_interleave(torch.arange(len(GROUPS)), sizes)


def centred(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return ``X`` (``... x d``) with the box of ``space`` mapped onto ``[-1, 1]^d``."""
    return 2 * space.normalise(X) - 1


def quadratic_features(Z: Tensor) -> Tensor:
    """Return the features (``... x D``) of centred coefficients ``Z`` (``... x d``)."""
    d = Z.shape[-1]
    first, second = torch.triu_indices(d, d, offset=1, device=Z.device)
    return torch.cat(
        [torch.ones_like(Z[..., :1]), Z, Z.square(), Z[..., first] * Z[..., second]], dim=-1
    )


def quadratic_feature_gradients(Z: Tensor) -> Tensor:
    """Return the derivatives of the features by ``Z`` (``... x d``), ``... x d x D``."""
    d = Z.shape[-1]
    first, second = torch.triu_indices(d, d, offset=1, device=Z.device)
    eye = torch.eye(d, dtype=Z.dtype, device=Z.device)
    linear = eye.expand(*Z.shape, d)
    square = 2 * eye * Z.unsqueeze(-2)
    by_first = eye[:, first] * Z[..., second].unsqueeze(-2)
    by_second = eye[:, second] * Z[..., first].unsqueeze(-2)
    zeros = torch.zeros_like(Z).unsqueeze(-1)
    return torch.cat([zeros, linear, square, by_first + by_second], dim=-1)
