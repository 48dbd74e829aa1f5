"""Small runs on disk, and Ax's client on the databases that they become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from map_bo.ax.database import require_storage, write_experiment
from map_bo.ax.experiment import experiment_of
from map_bo.data import Observations
from map_bo.loop.run import Run
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.space import CoefficientSpace
from map_bo.tracking.jsonl import JsonlStore
from tests.loop.bowls import Bowls, quick

if TYPE_CHECKING:
    from ax.api.client import Client


@dataclass
class Bounded(Bowls):
    """Bowls in another space."""

    box: dict[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace.box(self.names, **self.box)


def outcome(problem: Bowls, x: Tensor, number: int, *, failed: bool = False) -> Observations:
    """Return what a careful evaluator would: one variance known, one known at times, and more."""
    if failed:
        reason = f"evaluation {number} ran out of memory " + "on and on " * 20
        return Observations.failed(x.unsqueeze(0), problem.metrics, reason)
    a, b = torch.eye(2, dtype=torch.float64)
    Y = torch.stack([1 - (x - a).square().sum(), 0.1 + (x - b).square().sum()])
    return Observations(
        x.unsqueeze(0),
        Y.unsqueeze(0) / 3,
        problem.metrics,
        Yvar=torch.tensor([[0.001 / (number + 3), torch.nan if number % 2 else 0.002]]),
        counts=torch.tensor([[torch.nan, 7.0 + number]]),
        cost=torch.tensor([0.25 * number]),
        gradients=torch.full((1, 2, 2), 0.1 * number),
    )


def unfinished(
    directory: Path, *, problem: Bowls | None = None, rows: int = 8, **settings: Any
) -> Run:
    """Start a run in which row 2 failed and the last row waits."""
    problem = problem or Bowls()
    run = Run(problem, quick(30, **{"seed": 5, **settings}), JsonlStore.create(directory))
    for i in run.ask(rows)[:-1]:
        run.tell(i, outcome(problem, run.state.X[i], i, failed=i == 2))
    return run


def exported(directory: Path, database: Path) -> Path:
    """Export the run in ``directory``."""
    return write_experiment(experiment_of(directory), database)


@contextmanager
def storage(database: Path) -> Iterator[str]:
    """Make ``database`` the one that Ax works on; its only one for the process, otherwise."""
    require_storage()
    from ax.storage.sqa_store import db

    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setattr(db, "SESSION_FACTORY", None)
        try:
            yield f"sqlite:///{database}"
        finally:
            if db.SESSION_FACTORY is not None:
                db.get_session().close()
                db.get_engine().dispose()


def load(url: str, name: str) -> Client:
    """Load an experiment as a user of Ax does."""
    from ax.api.client import Client
    from ax.api.configs import StorageConfig

    return Client.load_from_database(name, storage_config=StorageConfig(url=url))


def same(a: Observations, b: Observations) -> bool:
    """Return whether two sets of observations agree in every digit of every part."""

    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return torch.equal(x.nan_to_num(-9.0), y.nan_to_num(-9.0))

    parts = ("X", "Y", "Yvar", "counts", "cost", "gradients", "gradient_variance")
    return (
        a.metrics == b.metrics
        and a.failures == b.failures
        and all(equal(getattr(a, part), getattr(b, part)) for part in parts)
    )


def own_client(**experiment: Any) -> Client:
    """Return an experiment that Ax's client made, over Bowls' names for everything."""
    require_storage()
    from ax.api.client import Client
    from ax.api.configs import RangeParameterConfig

    names = experiment.pop("names", ("a", "b"))
    objective = experiment.pop("objective", "near_a, -far_from_b")
    storage_config = experiment.pop("storage_config", None)
    with quiet():
        client = Client(storage_config=storage_config, random_seed=0)
        client.configure_experiment(
            [
                RangeParameterConfig(name=n, bounds=(0.0, 1.0), parameter_type="float")
                for n in names
            ],
            name="native",
            **experiment,
        )
        client.configure_optimization(objective)
    return client
