"""A run as an Ax experiment."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from map_bo.ax.names import Names, names_for
from map_bo.ax.rows import Row, rows_of, run_id
from map_bo.errors import StoreError
from map_bo.loop.reading import load_state
from map_bo.loop.state import RunState
from map_bo.samplers.baselines.ax_library import import_ax, quiet
from map_bo.space import CoefficientSpace, LinearConstraint
from map_bo.tracking.codec import encode_metric, encode_observations
from map_bo.tracking.jsonl import JsonlStore

if TYPE_CHECKING:
    from ax.core.experiment import Experiment

__all__ = ["KEY", "experiment_of"]

KEY = "map_bo"
"""Where an experiment, and each of its trials, keep what Ax has no place for."""

_LONGEST = 100  # Ax's columns of names and reasons


def experiment_of(run_dir: str | Path, *, name: str | None = None) -> Experiment:
    """Return the recorded run in ``run_dir`` as an Ax experiment.

    Evaluations are completed trials, failures failed ones, points that wait running ones. A
    metric's standard errors are given where the variance of every one of its values is known, and
    are NaN for all of them otherwise: Ax's models refuse a mixture. What Ax has no place for
    (exact variances, counts, seconds, gradients, reasons in full) is kept with each trial.

    Args:
        run_dir: The run's directory.
        name: Name of the experiment; the directory's by default.

    Raises:
        StoreError: When there is no run, or nothing was evaluated in it.
        MissingDependencyError: When Ax is not installed.
    """
    directory = Path(run_dir)
    state, space = load_state(directory)
    events = list(JsonlStore.open(directory).read())
    rows = rows_of(state, space, events)
    if not any(row.outcome is not None for row in rows):
        raise StoreError(
            f"the run in {directory} has no evaluation yet",
            hint=f"continue it with `map-bo resume {directory}`",
        )
    import_ax("an export to Ax")
    with quiet():
        names, run = names_for(space, state.metrics), run_id(events)
        called = (name or directory.resolve().name)[:_LONGEST]
        experiment = _without_trials(state, space, names, called, run)
        for row in rows:
            _add(experiment, row, names, run)
        _attach(experiment, rows, names)
    return experiment


def _without_trials(
    state: RunState, space: CoefficientSpace, names: Names, name: str, run: str
) -> Experiment:
    from ax.api.client import Client
    from ax.core.experiment import Experiment
    from ax.core.parameter import (
        ChoiceParameter,
        FixedParameter,
        ParameterType,
        RangeParameter,
    )
    from ax.core.search_space import SearchSpace

    created, settings = state.created, state.created.get("settings", {})
    told = {
        "run": run,
        "seed": settings.get("seed"),
        "versions": created.get("versions"),
        "settings": settings,
        "problem": created.get("problem"),
        "space": space.describe(),
        "metrics": [encode_metric(metric) for metric in state.metrics],
        "parameter_names": list(names.parameters),
        "metric_names": list(names.metrics),
    }
    parameters: list[Any] = [
        RangeParameter(name, ParameterType.FLOAT, lower, upper)
        if lower < upper
        else FixedParameter(name, ParameterType.FLOAT, lower)
        for name, lower, upper in zip(names.parameters, space.lower, space.upper, strict=True)
    ]
    placed = space.placed_choice
    if placed is not None and placed.free:
        parameters[placed.column] = ChoiceParameter(
            names.parameters[placed.column],
            ParameterType.INT,
            list(range(placed.count)),
            is_ordered=False,
            sort_values=False,
        )
    experiment = Experiment(
        SearchSpace(
            parameters,
            [_constraint(constraint, names.parameters) for constraint in space.constraints_on_free],
        ),
        name=name,
        description="A search for the Pareto front of merging models, exported by map-bo",
        properties={KEY: told},
    )
    signs = ["" if metric.direction == "max" else "-" for metric in state.metrics]
    reference = settings.get("reference") or {}
    thresholds = [
        f"{name} {'>=' if metric.direction == 'max' else '<='} {reference[metric.name]!r}"
        for name, metric in zip(names.metrics, state.metrics, strict=True)
        if metric.name in reference and len(state.metrics) > 1
    ]
    client = Client()
    client.set_experiment(experiment)
    client.configure_optimization(
        ", ".join(sign + name for sign, name in zip(signs, names.metrics, strict=True)), thresholds
    )
    return experiment


def _constraint(constraint: LinearConstraint, names: tuple[str, ...]) -> Any:
    from ax.core.parameter_constraint import ParameterConstraint

    weighted = " + ".join(
        f"{weight!r} * {name}"
        for weight, name in zip(constraint.weights, names, strict=True)
        if weight
    )
    if constraint.equality:
        return ParameterConstraint(equality=f"{weighted} == {constraint.bound!r}")
    return ParameterConstraint(inequality=f"{weighted} <= {constraint.bound!r}")


def _add(experiment: Experiment, row: Row, names: Names, run: str) -> None:
    from ax.core.arm import Arm
    from ax.core.generator_run import GeneratorRun
    from ax.core.parameter import ChoiceParameter

    values: dict[str, Any] = dict(zip(names.parameters, row.x.tolist(), strict=True))
    for name, value in values.items():
        if isinstance(experiment.parameters[name], ChoiceParameter):
            values[name] = round(value)  # the code of an option
    trial = experiment.new_trial(
        GeneratorRun(
            [Arm(values)],
            generator_key=row.method[:_LONGEST],
            generation_node_name=row.method[:_LONGEST],
        )
    )
    kept = {"run": run, **row.origin}
    created = datetime.fromtimestamp(row.created)
    trial._time_created = created
    if row.outcome is None:
        trial.mark_running(no_runner_required=True, started_time=created)
        trial._properties[KEY] = kept
        return
    # Outcomes of single examples stay in the record of the run: Ax has no use for them.
    observation = encode_observations(dataclasses.replace(row.outcome, examples=({},)))
    trial._properties[KEY] = {**kept, "observation": observation}
    finished = datetime.fromtimestamp(row.finished or row.created)
    began = finished - timedelta(seconds=float(row.outcome.cost[0]))
    trial.mark_running(no_runner_required=True, started_time=max(began, created))
    reason = row.outcome.failures[0]
    if reason is None:
        trial.mark_completed()
    else:
        trial.mark_failed(reason=reason[:_LONGEST])
    trial._time_completed = finished


def _attach(experiment: Experiment, rows: list[Row], names: Names) -> None:
    """Attach what was measured; trials are numbered like ``rows``."""
    import pandas as pd
    from ax.core.data import Data

    measured = [
        (trial, row.outcome)
        for trial, row in enumerate(rows)
        if row.outcome is not None and row.outcome.failures[0] is None
    ]
    if not measured:
        return
    errors = torch.cat([outcome.Yvar for _, outcome in measured]).sqrt()
    there = torch.cat([outcome.measured for _, outcome in measured])
    errors[:, (errors.isnan() & there).any(0)] = torch.nan
    table = [
        {
            "trial_index": trial,
            "arm_name": experiment.trials[trial].arms[0].name,
            "metric_name": name,
            "metric_signature": name,
            "mean": value,
            "sem": sem,
        }
        for (trial, outcome), spread in zip(measured, errors.tolist(), strict=True)
        for name, value, sem in zip(names.metrics, outcome.Y[0].tolist(), spread, strict=True)
        if not math.isnan(value)
    ]
    experiment.attach_data(Data(df=pd.DataFrame(table)))
