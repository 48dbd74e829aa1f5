"""Checks of what observations hold beside their values: derivatives, and what was recalled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from map_bo.errors import DataError

__all__ = ["checked_gradients", "checked_recalled", "double"]


def double(value: Tensor | Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
    """Return numbers as a float64 tensor on the CPU, without a graph."""
    where = value.device if isinstance(value, Tensor) else "cpu"  # never the default device
    return torch.as_tensor(value, dtype=torch.float64, device=where).detach().cpu()


def checked_gradients(
    gradients: Tensor | None,
    variance: Tensor | None,
    shape: tuple[int, ...],
    measured: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients and the variances of their noise as observations keep them.

    Args:
        gradients: Derivatives; None where there are none.
        variance: Variances of their noise, in the same shape; None where they are not known.
        shape: ``n, m, d``: what their shape must be.
        measured: ``n x m`` booleans: which metrics of which rows were measured.

    Raises:
        DataError: When shapes disagree, or numbers are not possible.
    """
    if gradients is None:
        if variance is not None:
            raise DataError(
                "gradient_variance was given without gradients", hint="give gradients as well"
            )
        return None, None
    gradients = double(gradients)
    noise = torch.full_like(gradients, torch.nan) if variance is None else double(variance)
    for name, value in (("gradients", gradients), ("gradient_variance", noise)):
        if value.shape != shape:
            raise DataError(
                f"{name} must have shape {shape}, got {tuple(value.shape)}",
                hint="give one derivative per evaluation, metric and coefficient",
            )
    if bool(torch.isinf(gradients).any()):
        raise DataError("gradients hold infinity", hint="use NaN where there is no gradient")
    if bool(((noise < 0) | torch.isinf(noise)).any()):
        raise DataError(
            "gradient_variance holds negative or infinite variances",
            hint="use NaN where the variance is not known",
        )
    nowhere = gradients.isnan() | ~measured.unsqueeze(-1)
    if bool(nowhere.all()):
        return None, None
    return gradients.masked_fill(nowhere, torch.nan), noise.masked_fill(nowhere, torch.nan)


def checked_recalled(
    recalled: Tensor | None, saved: Tensor | None, Y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return which values were recalled, and the seconds that this saved, as observations keep it.

    Args:
        recalled: ``n x m`` booleans; None for none of them.
        saved: ``n`` seconds; None for zeros.
        Y: ``n x m`` values.

    Raises:
        DataError: When shapes or kinds disagree.
    """
    marks = torch.zeros_like(Y).bool() if recalled is None else recalled.detach().cpu()
    seconds = double([0.0] * len(Y) if saved is None else saved)
    if marks.dtype == torch.bool and not bool(marks.any()) and not bool(seconds.any()):
        # Nothing was recalled, so a part of the metrics or rows needs to say nothing of it.
        return torch.zeros_like(Y).bool(), double([0.0] * len(Y))
    if marks.shape != Y.shape or marks.dtype != torch.bool or seconds.shape != (len(Y),):
        raise DataError(
            f"recalled must be booleans in the shape of Y, {tuple(Y.shape)}, and saved {len(Y)} "
            f"seconds; got {marks.dtype} of shape {tuple(marks.shape)} and {tuple(seconds.shape)}",
            hint="leave both out where nothing came from a cache of evaluations",
        )
    return marks, seconds
