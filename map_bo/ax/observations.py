"""The trials of an Ax experiment as observations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from map_bo.ax.experiment import KEY
from map_bo.ax.names import Names, names_for
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, MapBoError
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import decode_observations

if TYPE_CHECKING:
    from ax.core.base_trial import BaseTrial
    from ax.core.data import Data
    from ax.core.experiment import Experiment

__all__ = ["Found", "LeftOut", "Origin", "names_in", "observations_of", "weights_in"]


@dataclass(frozen=True)
class Origin:
    """Where an observation comes from.

    Attributes:
        trial: Index of the trial.
        arm: Name of its arm.
        kept: What an export of a run keeps with a trial; empty for trials that Ax made.
    """

    trial: int
    arm: str
    kept: Mapping[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """An arm that is not an observation, and the reason."""

    trial: int
    arm: str
    reason: str


@dataclass(frozen=True, eq=False)
class Found:
    """What an experiment holds.

    Attributes:
        observations: ``n`` observations, in the order of their trials.
        origins: ``n`` origins.
        left_out: What could not be taken.
    """

    observations: Observations
    origins: tuple[Origin, ...]
    left_out: tuple[LeftOut, ...]

    def without(self, known: Sequence[bool], reason: str) -> Found:
        """Return this without the rows that are ``known``, which are left out for ``reason``."""
        rows = [row for row, there in enumerate(known) if not there]
        gone = (origin for origin, there in zip(self.origins, known, strict=True) if there)
        left_out = (*self.left_out, *(LeftOut(it.trial, it.arm, reason) for it in gone))
        return Found(
            self.observations.select(rows), tuple(self.origins[row] for row in rows), left_out
        )


def observations_of(
    experiment: Experiment,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    *,
    data: Data | None = None,
) -> Found:
    """Return the observations that ``experiment`` holds of ``metrics`` in ``space``.

    Completed trials are evaluations, failed and abandoned ones are failures. A standard error
    becomes a variance; where there is none the variance is unknown. Trials of an exported run
    have their exact values back, as long as what Ax holds of them is still the same.

    Args:
        experiment: The experiment.
        space: The space of the run.
        metrics: The metrics of the run.
        data: What was measured; by default all that is attached to the experiment.

    Raises:
        DataError: When the experiment has other parameters or metrics, or other directions.
    """
    metrics, rows, origins, left_out = tuple(metrics), [], [], []
    with quiet():
        names = names_in(experiment, space, metrics)
        values = _values(data if data is not None else experiment.lookup_data(), names)
        for index, trial in sorted(experiment.trials.items()):
            kept = trial._properties.get(KEY) or {}
            for arm in trial.arms:
                try:
                    x = _point(arm.parameters, names, space)
                    measured = values.get((index, arm.name), {})
                    rows.append(_row(trial, x, measured, kept, metrics, names))
                    origins.append(Origin(index, arm.name, kept))
                except _LeftOutError as reason:
                    left_out.append(LeftOut(index, arm.name, str(reason)))
    found = Observations.joined(rows, space.d, metrics)
    return Found(found, tuple(origins), tuple(left_out))


def names_in(experiment: Experiment, space: CoefficientSpace, metrics: Sequence[Metric]) -> Names:
    """Return what coefficients and metrics are called in ``experiment``.

    They have their own names, or those that an export gives them.

    Raises:
        DataError: When the experiment has other parameters or metrics, or other directions.
    """
    given, own = names_for(space, metrics), [metric.name for metric in metrics]
    parameters = _matching("parameters", experiment.parameters, given.parameters, space.names)
    if extra := sorted(set(experiment.parameters) - set(parameters)):
        raise DataError(
            f"the experiment has parameters that the run lacks: {', '.join(extra)}",
            hint=f"keep only the coefficients of the run: {', '.join(space.names)}",
        )
    found = _matching("metrics", experiment.metrics, given.metrics, own)
    weights = weights_in(experiment)
    for name, metric in zip(found, metrics, strict=True):
        lower = experiment.metrics[name].lower_is_better
        if name in weights:
            lower = weights[name] < 0
        if lower is not None and lower != (metric.direction == "min"):
            raise DataError(
                f"metric {metric.name!r} is {'minimised' if lower else 'maximised'} in the "
                "experiment, but not in the run",
                hint="rename it in the experiment: its values mean something else",
            )
    return Names(parameters, found)


def weights_in(experiment: Experiment) -> dict[str, float]:
    """Return the weight of each metric in the objective; negative ones are minimised."""
    config = experiment.optimization_config
    if config is None:
        return {}
    weights = (weight for _, weight in config.objective.metric_weights)
    return dict(zip(config.objective.metric_names, weights, strict=True))


def _matching(
    what: str, present: Mapping[str, Any], exported: Sequence[str], own: Sequence[str]
) -> tuple[str, ...]:
    for names in (exported, own):
        if set(names) <= set(present):
            return tuple(names)
    missing = [name for name in own if name not in present]
    raise DataError(
        f"the experiment lacks the {what} {', '.join(missing)} of the run",
        hint=f"it has {', '.join(present) or 'none'}; name them as the run does, or as an export "
        f"does: {', '.join(exported)}",
    )


class _LeftOutError(Exception):
    """The reason why an arm is not an observation."""


def _values(data: Data, names: Names) -> dict[tuple[int, str], dict[str, tuple[float, float]]]:
    """Return trial and arm -> metric -> mean and standard error, the last ones attached."""
    values: dict[tuple[int, str], dict[str, tuple[float, float]]] = {}
    for row in data.df.itertuples(index=False):
        if row.metric_name in names.metrics:
            place = values.setdefault((int(row.trial_index), str(row.arm_name)), {})
            place[str(row.metric_name)] = (float(row.mean), float(row.sem))
    return values


def _point(parameters: Mapping[str, Any], names: Names, space: CoefficientSpace) -> Tensor:
    """Return ``1 x d`` coefficients."""
    numbers = []
    for name in names.parameters:
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _LeftOutError(f"{name} is {value!r}, which is not a number")
        numbers.append(float(value))
    x = torch.tensor([numbers], dtype=torch.float64)
    if not bool(x.isfinite().all()) or not bool(space.contains(x).all()):
        raise _LeftOutError(
            "it lies outside the space: "
            + ", ".join(f"{n}={v:g}" for n, v in zip(names.parameters, numbers, strict=True))
        )
    return x


def _row(
    trial: BaseTrial,
    x: Tensor,
    measured: Mapping[str, tuple[float, float]],
    kept: Mapping[str, Any],
    metrics: tuple[Metric, ...],
    names: Names,
) -> Observations:
    status = trial.status
    original = _original(kept, x, metrics)
    if status.is_failed or status.is_abandoned:
        if status.is_failed and original is not None and original.failures[0] is not None:
            return original
        reason = trial.status_reason or f"{status.name.lower()} in Ax"
        return Observations.failed(x, metrics, reason)
    if not status.is_completed:
        raise _LeftOutError(f"it is {status.name.lower().replace('_', ' ')}")
    if missing := [name for name in names.metrics if name not in measured]:
        if original is not None and bool(original.incomplete.any()) and measured:
            return original
        raise _LeftOutError(f"it has no value for {', '.join(missing)}")
    means, sems = zip(*(measured[name] for name in names.metrics), strict=True)
    Y = torch.tensor([means], dtype=torch.float64)
    errors = torch.tensor([sems], dtype=torch.float64)
    if original is not None and original.failures[0] is None and _close(original.Y, Y):
        # Ax's storage rounds to ten digits, and knows no counts, seconds and gradients.
        if bool(((errors - original.Yvar.sqrt()).abs() > 1e-9).any()):
            Yvar = torch.where(errors.isnan(), original.Yvar, errors.square())
            return dataclasses.replace(original, Yvar=Yvar)
        return original
    for name, metric, value in zip(names.metrics, metrics, means, strict=True):
        low = -math.inf if metric.lower is None else metric.lower
        high = math.inf if metric.upper is None else metric.upper
        if not math.isfinite(value) or not low <= value <= high:
            raise _LeftOutError(f"{name} is {value:g}, which is not in [{low:g}, {high:g}]")
    if bool(errors.isinf().any()):
        raise _LeftOutError("a standard error is infinite")
    return Observations(x, Y, metrics, Yvar=errors.square())


def _original(
    kept: Mapping[str, Any], x: Tensor, metrics: tuple[Metric, ...]
) -> Observations | None:
    """Return the observation that an export has kept with a trial, if it is of these metrics."""
    try:
        original = decode_observations(kept["observation"], metrics)
    except (KeyError, TypeError, ValueError, MapBoError):
        return None
    return original if original.X.shape == x.shape and _close(original.X, x) else None


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
