"""Metrics of whole sets, such as those of torchmetrics, and what each example makes of them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.data import Metric, check_metrics
from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line

__all__ = ["SetMetric", "declare", "metric_from", "outcomes_of", "set_metrics"]


@runtime_checkable
class SetMetric(Protocol):
    """A metric that gathers batches and is computed from all of them, as those of torchmetrics."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        ...

    def compute(self) -> Any:
        """Return the value of all that was added."""
        ...

    def reset(self) -> None:
        """Forget what was added."""
        ...


@runtime_checkable
class _Bounded(Protocol):
    """What metrics of torchmetrics say of themselves."""

    higher_is_better: bool | None
    plot_lower_bound: float | None
    plot_upper_bound: float | None


@runtime_checkable
class _Collection(Protocol):
    """Several metrics by name, as torchmetrics collects them."""

    def items(self) -> Iterable[tuple[str, SetMetric]]: ...


def metric_from(given: str | Metric | Mapping[str, Any]) -> Metric:
    """Return a metric from its name, its fields, or itself.

    Raises:
        ConfigError: When there is no such field.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return Metric(given)
    try:
        return Metric(**given)
    except TypeError as error:
        raise ConfigError(
            f"a metric cannot be made of {dict(given)!r:.200}: {first_line(error)}",
            hint="give name, direction, kind, lower, upper",
        ) from error


_GROUPS = 200  # how many leave-outs the jackknife makes at most
_SAME = 1e-5  # torchmetrics computes in float32
# Between -1 and 1, though their bounds for plots say 0 and 1.
_SIGNED = ("MatthewsCorrCoef", "CohenKappa")


def set_metrics(outcome: object) -> dict[str, SetMetric] | None:
    """Return copies of metrics by name; None where the outcome is something else."""
    if isinstance(outcome, SetMetric) and not isinstance(outcome, _Collection):
        return {type(outcome).__name__: copy.deepcopy(outcome)}
    if not isinstance(outcome, _Collection):
        return None
    found = dict(outcome.items())
    wrong = [name for name, one in found.items() if not isinstance(one, SetMetric)]
    if wrong or not found:
        raise ConfigError(
            f"{wrong[0]!r} is a {type(found[wrong[0]]).__name__}, not a metric"
            if wrong
            else "the collection has no metrics",
            hint="give metrics with update, compute and reset, as those of torchmetrics",
        )
    return {name: copy.deepcopy(one) for name, one in found.items()}


def declare(
    sets: Mapping[str, SetMetric], given: Sequence[str | Metric | Mapping[str, Any]] | None
) -> tuple[Metric, ...]:
    """Return what metrics of whole sets are, by what was given or by what they say."""
    told = {one.name: one for one in map(metric_from, given or ())}
    if len(sets) == len(told) == 1:  # there is one, and so it is meant
        return tuple(told.values())
    unknown = sorted(set(told) - set(sets))
    if unknown:
        raise ConfigError(
            f"there is no metric {unknown[0]!r} in the collection",
            hint=did_you_mean(unknown[0], sets),
        )
    return check_metrics([told.get(name) or _said(name, one) for name, one in sets.items()])


def _said(name: str, metric: SetMetric) -> Metric:
    better = metric.higher_is_better if isinstance(metric, _Bounded) else None
    if not isinstance(metric, _Bounded) or better is None:
        raise ConfigError(
            f"metric {name!r} does not say whether more is better",
            hint="say it: metrics=[{name: ..., direction: max or min, kind: ...}]",
        )
    kind = type(metric)
    low, high = metric.plot_lower_bound, metric.plot_upper_bound
    signed = kind.__name__.endswith(_SIGNED)
    # Elsewhere the bounds are those of plots alone: an explained variance may be negative.
    if kind.__module__.startswith("torchmetrics.classification") and (low, high) == (0.0, 1.0):
        return Metric(name, "max" if better else "min", lower=-1.0 if signed else 0.0)
    if not better and low is not None and low >= 0:
        return Metric(name, "min", "loss")
    return Metric(name, "max" if better else "min", "unbounded")


def outcomes_of(metric: SetMetric, preds: Tensor, targets: Tensor, name: str) -> Tensor:
    """Return outcomes (``n``, float64) whose mean is the metric of all ``n`` examples.

    Where the metric is the mean of what it is of each example alone, these are the outcomes. Else
    they are jackknife pseudo-values (Tukey, 1958) around the metric, such that the variance of
    their mean is that of the jackknife. With more than 200 examples it leaves out 200 groups.

    Args:
        metric: The metric; it is reset.
        preds: ``n x ...`` predictions, on the CPU.
        targets: ``n x ...`` targets, on the CPU.
        name: The metric's name, for errors.

    Raises:
        EvaluationError: When it cannot be computed from these, or is no finite number.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of single examples torchmetrics has much to say
        return _outcomes(metric, preds.clone(), targets.clone(), name)


def _outcomes(metric: SetMetric, preds: Tensor, targets: Tensor, name: str) -> Tensor:
    n = len(preds)
    value = _value(metric, preds, targets, name)
    if n == 1:
        return torch.tensor([value], dtype=torch.float64)
    alone = _alone(metric, preds, targets, name)
    if alone is not None:
        size = max(abs(value), float(alone.abs().mean()))
        if abs(float(alone.mean()) - value) <= _SAME * size:
            return alone
    groups = min(n, _GROUPS)
    group = torch.arange(n) % groups
    without = torch.tensor(
        [_value(metric, preds[group != g], targets[group != g], name) for g in range(groups)],
        dtype=torch.float64,
    )
    # Pseudo-values but for a constant. An example of a group of k counts for the root of k, so that
    # the mean of n outcomes varies by what the jackknife of groups says.
    k = n / groups
    pseudo = -(groups - 1) * math.sqrt(k) * without[group]
    return pseudo - pseudo.mean() + value


def _alone(metric: SetMetric, preds: Tensor, targets: Tensor, name: str) -> Tensor | None:
    """Return the metric of each example alone; None where it has none."""
    values = []
    for i in range(len(preds)):
        try:
            values.append(_value(metric, preds[i : i + 1], targets[i : i + 1], name))
        except EvaluationError:
            return None
    return torch.tensor(values, dtype=torch.float64)


def _value(metric: SetMetric, preds: Tensor, targets: Tensor, name: str) -> float:
    try:
        metric.reset()
        metric.update(preds, targets)
        found = metric.compute()
    except Exception as error:  # torchmetrics raises many kinds
        raise EvaluationError(
            f"metric {name!r} raised {type(error).__name__}: {first_line(error)}",
            hint=f"predictions have shape {tuple(preds.shape)} and targets "
            f"{tuple(targets.shape)}; predictions=module:function turns outputs into what it takes",
        ) from error
    finally:
        metric.reset()
    several = isinstance(found, Tensor) and found.numel() != 1
    if several or not isinstance(found, int | float | Tensor):
        told = f"{found.numel()} values" if several else f"a {type(found).__name__}"
        raise EvaluationError(
            f"metric {name!r} must be one number, got {told}",
            hint="average it, such as average='macro'",
        )
    value = float(found)
    if not math.isfinite(value):
        raise EvaluationError(
            f"metric {name!r} of {len(preds)} examples is {value}",
            hint="it is not defined on these examples; give more of them",
        )
    return value
