"""Checks of what observations hold beside their values.

Derivatives, what was recalled, outcomes of examples, and noise that rows have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes

__all__ = [
    "check_noise",
    "checked_covariance",
    "checked_examples",
    "checked_gradients",
    "checked_like",
    "checked_recalled",
    "double",
    "joined_covariance",
    "joined_examples",
    "stacked_covariance",
]

Outcomes = Mapping[str, ExampleOutcomes]


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


def checked_like(name: str, given: Tensor | None, Y: Tensor) -> Tensor:
    """Return numbers in the shape of ``Y`` (``n x m``); NaN where None is given.

    Raises:
        DataError: When they have another shape.
    """
    value = torch.full_like(Y, torch.nan) if given is None else double(given)
    if value.shape != Y.shape:
        raise DataError(
            f"{name} has shape {tuple(value.shape)}, and Y {tuple(Y.shape)}",
            hint=f"give {name} the shape of Y",
        )
    return value


def check_noise(Yvar: Tensor, counts: Tensor) -> None:
    """Refuse variances that are negative or infinite, and counts that are not positive.

    Raises:
        DataError: When there are such.
    """
    if bool(((Yvar < 0) | torch.isinf(Yvar)).any()):
        raise DataError(
            "Yvar holds negative or infinite variances",
            hint="use NaN where the variance is not known",
        )
    if bool((counts <= 0).any()):
        raise DataError(
            "counts must be positive, and some are not",
            hint="use NaN where nothing was counted",
        )


def checked_examples(given: Sequence[Outcomes] | None, n: int) -> tuple[Outcomes, ...]:
    """Return outcomes of examples as observations keep them: ``n`` mappings.

    Raises:
        DataError: When there is not one for each row, or one is something else.
    """
    rows = ({},) * n if given is None else tuple(dict(row) for row in given)
    if len(rows) != n or not all(
        isinstance(one, ExampleOutcomes) for row in rows for one in row.values()
    ):
        raise DataError(
            f"examples must be {n} mappings from evaluators to ExampleOutcomes, got {len(rows)}",
            hint="give one mapping per evaluation, empty where no example was scored",
        )
    return rows


def joined_examples(before: Sequence[Outcomes], after: Sequence[Outcomes]) -> tuple[Outcomes, ...]:
    """Return the outcomes of two attempts at the same rows; where both have one, the latter's."""
    return tuple(
        {
            **old,
            **{name: old[name].joined(one) if name in old else one for name, one in new.items()},
        }
        for old, new in zip(before, after, strict=True)
    )


def checked_covariance(given: Tensor | None, measured: Tensor) -> Tensor | None:
    """Return a covariance of noise among rows as observations keep it, ``m x n x n``.

    Args:
        given: The covariance; None where the noise of the rows is independent.
        measured: ``n x m`` booleans: where a metric was not measured, the covariance becomes 0.

    Raises:
        DataError: When it has another shape, is not finite, or not symmetric.
    """
    if given is None:
        return None
    value, (n, m) = double(given), measured.shape
    if value.shape != (m, n, n) or not bool(value.isfinite().all()):
        raise DataError(
            f"covariance must be finite and of shape {(m, n, n)}, got {tuple(value.shape)}",
            hint="give one matrix among the rows per metric, 0 where nothing was measured",
        )
    size = value.diagonal(dim1=-1, dim2=-2).abs().amax(-1) if n else value.new_zeros(m)
    if n and bool(((value - value.mT).abs().amax((-1, -2)) > 1e-8 * size).any()):
        raise DataError(
            "covariance is not symmetric", hint="give the covariance of row i with row j, and back"
        )
    there = measured.mT
    if bool(there.all()):
        return value
    return value.masked_fill(~(there.unsqueeze(-1) & there.unsqueeze(-2)), 0.0)


def joined_covariance(parts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Return the covariance of the rows of several parts, which have nothing in common.

    Args:
        parts: Covariance (None where rows are independent) and ``n x m`` variances of each.
    """
    if all(covariance is None for covariance, _ in parts):
        return None
    blocks = [_full(*part) for part in parts]
    n, at = sum(block.shape[-1] for block in blocks), 0
    whole = blocks[0].new_zeros(len(blocks[0]), n, n)
    for block in blocks:
        end = at + block.shape[-1]
        whole[:, at:end, at:end] = block
        at = end
    return whole


def stacked_covariance(parts: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    """Return the covariance of several parts, of the same rows with other metrics each.

    Args:
        parts: Covariance (None where rows are independent) and ``n x m`` variances of each.
    """
    if all(covariance is None for covariance, _ in parts):
        return None
    return torch.cat([_full(*part) for part in parts])


def _full(covariance: Tensor | None, variance: Tensor) -> Tensor:
    """Return a covariance, or that of independent rows with ``n x m`` variances."""
    if covariance is not None:
        return covariance
    return torch.diag_embed(variance.mT.nan_to_num(nan=0.0))
