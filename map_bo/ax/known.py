"""An Ax experiment as an older study that a new run starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from map_bo.ax.database import read_experiment
from map_bo.ax.experiment import KEY
from map_bo.ax.names import names_for
from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.loop.transfer.study import Study
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.space import CoefficientSpace

if TYPE_CHECKING:
    from ax.core.experiment import Experiment

__all__ = ["AxDatabase", "fits"]


@dataclass(frozen=True, eq=False)
class AxDatabase:
    """An SQLite file of Ax, as the start of a new run: ``optimize(..., known=AxDatabase(file))``.

    Completed trials are evaluations, failed and abandoned ones are failures; others are left out.
    Of an experiment that was exported from a run, coefficients and metrics have the run's names
    again. A metric that a trial has no value of was not measured there.

    Attributes:
        path: The file.
        name: Name of the experiment; may be left out when the file holds one.
        experiment: The experiment, where it has been read already.
    """

    path: str | Path
    name: str | None = None
    experiment: Experiment | None = None

    def study(self) -> Study:
        """Read the study.

        Raises:
            StoreError: When the file, or the experiment in it, cannot be read.
            DataError: When it holds no evaluation, or a parameter is not a number.
            MissingDependencyError: When the extra ``ax-sql`` is not installed.
        """
        experiment = self.experiment or read_experiment(self.path, self.name)
        with quiet():
            return _study(experiment, Path(self.path))


def fits(experiment: Experiment, space: CoefficientSpace, metrics: Sequence[Metric]) -> bool:
    """Return whether an experiment has the run's coefficients and metrics, or none of either.

    One that has none is refused by what reads it as the run's own.
    """
    given = names_for(space, metrics)
    own = [metric.name for metric in metrics]
    for present, exported, names in (
        (experiment.parameters, given.parameters, space.names),
        (experiment.metrics, given.metrics, own),
    ):
        some = set(present) & {*exported, *names}
        if not some:
            return True
        if not (set(exported) <= set(present) or set(names) <= set(present)):
            return False
    return not set(experiment.parameters) - {*given.parameters, *space.names}


def _study(experiment: Experiment, path: Path) -> Study:
    about = experiment._properties.get(KEY) or {}
    parameters, metrics = list(experiment.parameters), list(experiment.metrics)
    values: dict[tuple[int, str], dict[str, tuple[float, float]]] = {}
    for row in experiment.lookup_data().df.itertuples(index=False):
        place = values.setdefault((int(row.trial_index), str(row.arm_name)), {})
        place[str(row.metric_name)] = (float(row.mean), float(row.sem))
    points, rows, noise, reasons, names = [], [], [], [], []
    for index, trial in sorted(experiment.trials.items()):
        status = trial.status
        ended = status.is_failed or status.is_abandoned
        if not ended and not status.is_completed:
            continue
        for arm in trial.arms:
            numbers = [arm.parameters.get(name) for name in parameters]
            for name, value in zip(parameters, numbers, strict=True):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise DataError(
                        f"trial {index} of {path} has {value!r} as {name}, which is not a number",
                        hint="start from a CSV file of its numbers",
                    )
            told = {} if ended else values.get((index, arm.name), {})
            nothing = (math.nan, math.nan)
            points.append([float(value) for value in numbers])  # type: ignore[arg-type]
            rows.append([told.get(name, nothing)[0] for name in metrics])
            noise.append([told.get(name, nothing)[1] ** 2 for name in metrics])
            reason = trial.status_reason or f"{status.name.lower()} in Ax"
            reasons.append(reason if ended else None)
            names.append(f"trial {index}")
    if not points:
        raise DataError(f"{path} holds no evaluation", hint="start the run without it")
    Y = torch.tensor(rows, dtype=torch.float64)
    exported = bool(about)
    return Study(
        names=tuple(_own(name, "c_", exported) for name in parameters),
        X=torch.tensor(points, dtype=torch.float64),
        metrics=tuple(_own(name, "m_", exported) for name in metrics),
        Y=torch.where(Y.isfinite(), Y, torch.nan),
        Yvar=torch.tensor(noise, dtype=torch.float64),
        counts=torch.full_like(Y, torch.nan),
        cost=torch.zeros(len(Y), dtype=torch.float64),
        failures=tuple(reasons),
        rows=tuple(names),
        source={"from": "ax", "path": str(path.absolute()), "experiment": experiment.name},
        title=f"the experiment in {path}",
        problem=about.get("problem"),
    )


def _own(name: str, prefix: str, exported: bool) -> str:
    """Return the name that an export has given another one, as far as it can be told."""
    return name.removeprefix(prefix) if exported else name
