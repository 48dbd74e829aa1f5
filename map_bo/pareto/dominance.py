"""Pareto dominance between points whose every column is to be maximised."""

from __future__ import annotations

import moocore
import torch
from torch import Tensor

from map_bo.errors import DataError

__all__ = ["dominates", "non_dominated"]


def non_dominated(Y: Tensor) -> Tensor:
    """Return which rows no other row dominates.

    Of rows that are exactly equal the first is kept and the others are not, so that the rows
    marked are the distinct points of the front. Rows that hold NaN are never marked.

    Args:
        Y: ``n x m`` values, larger is better in every column.

    Returns:
        ``n`` booleans.

    Raises:
        DataError: When ``Y`` does not have two dimensions.
    """
    if Y.dim() != 2:
        raise DataError(
            f"values must be a matrix, got shape {tuple(Y.shape)}",
            hint="give one row per point and one column per metric",
        )
    mask = torch.zeros(len(Y), dtype=torch.bool)
    known = ~torch.isnan(Y).any(-1)
    if bool(known.any()):
        # Adding zero turns -0.0 into 0.0, which compares equal but may sort apart.
        values = Y[known].detach().double().cpu() + 0.0
        if Y.shape[-1] == 1:
            kept = torch.zeros(len(values), dtype=torch.bool)
            kept[values[:, 0].argmax()] = True
        else:
            kept = torch.from_numpy(moocore.is_nondominated(values.numpy(), maximise=True))
        mask[known.cpu()] = kept
    return mask


def dominates(a: Tensor, b: Tensor) -> Tensor:
    """Return whether ``a`` is at least as good as ``b`` everywhere and better somewhere.

    Args:
        a: ``... x m`` values, larger is better.
        b: ``... x m`` values; broadcasts against ``a``.

    Returns:
        Booleans of the broadcast shape without its last dimension.
    """
    return (a >= b).all(-1) & (a > b).any(-1)
