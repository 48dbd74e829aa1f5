"""Outcomes by the names of their metrics, as they are told: ``{"math": 0.41, "code": 0.3}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, EvaluationError, StoreError, did_you_mean
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.metrics import entry_of
from map_bo.loop.state import RunState
from map_bo.values import real_number

__all__ = ["check_told", "outcome_of"]

_FAILED, _SECONDS = "failed", "seconds"
_PARTS = ("value", "variance", "count", "n")
_FAILURE = 'an evaluation that failed is told as {"failed": "the reason"}'


def outcome_of(told: Mapping[str, Any], x: Tensor, metrics: Sequence[Metric]) -> Observations:
    """Return what was measured at one point, from values by the names of the metrics.

    Args:
        told: Metric -> a number, a :class:`~map_bo.evaluators.evaluator.Measurement` or a mapping
            with ``value`` and, where known, ``variance`` (of the noise) and ``n`` (how many
            examples; also ``count``). Besides, where no metric is called so: ``failed``, the
            reason why the evaluation failed, with which metrics may be missing; and ``seconds``
            that it took.
        x: ``d`` coefficients.
        metrics: The ``m`` metrics.

    Returns:
        One row.

    Raises:
        DataError: On an unknown metric, one that is missing, or a value that is not possible.
    """
    names = [metric.name for metric in metrics]
    special = [name for name in (_FAILED, _SECONDS) if name not in names]
    for name in told:
        if name not in (*names, *special):
            hint = did_you_mean(name, [*names, *special])
            raise DataError(f"there is no metric {str(name)!r}", hint=hint)
    reason = told.get(_FAILED) if _FAILED in special else None
    if reason is not None and (not isinstance(reason, str) or not reason.strip()):
        raise DataError(f"the reason of a failure must be text, got {reason!r}", hint=_FAILURE)
    missing = [name for name in names if name not in told]
    if missing and reason is None:
        raise DataError(
            f"the outcome lacks {', '.join(map(repr, missing))}",
            hint=f"tell every metric: {', '.join(names)}; {_FAILURE}",
        )
    rows = torch.full((3, 1, len(metrics)), torch.nan, dtype=torch.float64)
    for j, metric in enumerate(metrics):
        if metric.name in told:
            rows[:, 0, j] = torch.tensor(_entry(told[metric.name], metric), dtype=torch.float64)
    cost = 0.0
    if _SECONDS in special and told.get(_SECONDS) is not None:
        cost = real_number("seconds", told[_SECONDS], least=0, error=DataError)
    if reason is not None and not missing:
        rows[0] = torch.nan  # a reason takes all of it back
    return Observations(
        x.reshape(1, -1), rows[0], tuple(metrics), rows[1], rows[2], torch.tensor([cost]), (reason,)
    )


def _entry(given: Any, metric: Metric) -> tuple[float, float, float]:
    """Return value, variance and count of one metric."""
    what = f"metric {metric.name!r}"
    try:
        if isinstance(given, Measurement):
            return entry_of(given, metric)
        if isinstance(given, Mapping):
            return entry_of(_measurement(given, what), metric)
        return entry_of(Measurement(_number(given, what)), metric)
    except EvaluationError as error:
        bounds = f" (it lies in {_bounds(metric)})" if "bounds" in error.message else ""
        told = given.get("value") if isinstance(given, Mapping) else given
        raise DataError(
            f"{what} cannot be {told!r}{bounds}" if bounds else f"{what}: {error.message}",
            hint=f"tell what was measured, in the metric's own unit; {_FAILURE}",
        ) from error


def _measurement(given: Mapping[str, Any], what: str) -> Measurement:
    for key in given:
        if key not in _PARTS:
            raise DataError(f"{what} has no part {str(key)!r}", hint=did_you_mean(key, _PARTS))
    if "value" not in given:
        raise DataError(f"{what} has no value", hint='tell it as {"value": 0.41, "n": 200}')
    if "n" in given and "count" in given:
        raise DataError(f"{what} has both n and count", hint="they are the same: tell one")
    parts = {
        name: None if given.get(name) is None else _number(given[name], f"{what}: {name}")
        for name in _PARTS
    }
    count = parts["n"] if parts["count"] is None else parts["count"]
    whole = count if count is None or not count.is_integer() else int(count)
    return Measurement(_number(given["value"], what), parts["variance"], whole)  # type: ignore[arg-type]


def _number(given: Any, what: str) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise DataError(f"{what} must be a number, got {given!r:.80}", hint=_FAILURE)
    return float(given)


def _bounds(metric: Metric) -> str:
    low = "-inf" if metric.lower is None else f"{metric.lower:g}"
    high = "inf" if metric.upper is None else f"{metric.upper:g}"
    return f"[{low}, {high}]"


def check_told(
    index: int, outcome: Observations | Mapping[str, Any], state: RunState
) -> tuple[int, Observations]:
    """Return the number of a row that waits, and the outcome that it is told.

    Args:
        index: The number that was given.
        outcome: What was given as its outcome, by name where it is a mapping.
        state: Where the run stands.

    Raises:
        DataError: When the outcome is neither, or of other metrics.
        StoreError: When the row does not wait, or there is not exactly one outcome.
    """
    if not isinstance(outcome, Observations | Mapping):
        raise DataError(
            f"an outcome must be Observations, got {type(outcome).__name__}",
            hint='tell {"metric": value, ...}, or map_bo.Observations(X=..., Y=..., metrics=...) '
            "of the one row",
        )
    waiting = state.pending
    waits = type(index) is not bool and index in waiting
    several = not isinstance(outcome, Mapping) and len(outcome) != 1
    if several or not waits:
        raise StoreError(
            f"row {index} cannot take {len(outcome)} outcomes"
            if waits
            else f"row {index} does not wait for an outcome",
            hint=f"tell one outcome for one of the rows that wait: {waiting}"
            if waiting
            else "no row waits for an outcome: ask for rows first",
        )
    index = int(index)
    if isinstance(outcome, Mapping):
        return index, outcome_of(outcome, state.X[index], state.metrics)
    return index, outcome
