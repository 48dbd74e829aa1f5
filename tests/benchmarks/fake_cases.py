"""Cases of formulas that cost nothing, count their evaluations and break when they are told to.

``FAKE_LOG`` names a file that gets a line an evaluation, ``FAKE_EXIT_AFTER`` the number of lines at
which the process dies on the spot.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.pareto.evolution import direct_search
from map_bo.problems.problem import Problem
from map_bo.problems.synthetic import SigmoidQuadratics
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace

DIGEST = "1"


@dataclass(frozen=True)
class Logged:
    """A problem that writes down every evaluation."""

    inner: SigmoidQuadratics
    broken: bool = False

    @property
    def space(self) -> CoefficientSpace:
        return self.inner.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.inner.metrics

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        log = os.environ.get("FAKE_LOG")
        if log:
            path = Path(log)
            with path.open("a") as file:
                file.write("evaluated\n" * len(X))
            limit = os.environ.get("FAKE_EXIT_AFTER")
            if limit and len(path.read_text().splitlines()) >= int(limit):
                os._exit(9)
        result = self.inner.evaluate(X, generator=generator)
        if self.broken:
            return Observations.failed(X, self.metrics, "it never works")
        return result


@dataclass(frozen=True, eq=False)
class FakeCase:
    name: str
    family: str
    problem: Problem
    inner: SigmoidQuadratics
    low: Tensor
    high: Tensor
    known_front: Tensor | None
    real_models: bool

    @property
    def digest(self) -> str:
        return DIGEST

    def truth(self, X: Tensor) -> Tensor:
        return self.inner.true_values(X)

    def gains(self, Y: Tensor) -> Tensor:
        return (Y - self.low) / (self.high - self.low)

    def wide(self) -> Problem | None:
        return None

    def direct(self, evaluations: int, seed: int) -> Tensor:
        _, Y = direct_search(
            lambda X: self.gains(self.truth(X)),
            self.inner.space,
            evaluations=evaluations,
            population=20,
            generator=make_generator(seed),
        )
        return Y


def case(name: str) -> FakeCase:
    if name == "missing-data":
        raise FileNotFoundError("the folder is gone")
    if name == "deadly" and parent_process() is not None:
        os._exit(11)
    inner = SigmoidQuadratics(2, 2, seed=1, count=100 if name == "noisy" else None)
    anchors = inner.space.anchors()
    values = inner.true_values(anchors.X)
    ends = torch.tensor([kind != "blend" for kind in anchors.kinds])
    experts = torch.tensor([kind == "expert" for kind in anchors.kinds])
    low = values[ends].amin(0) - 0.1
    front = inner.pareto_front(50, generator=make_generator(0))
    high = torch.maximum(values[experts].amax(0), low + 0.1)
    return FakeCase(
        name,
        "noisy" if name == "noisy" else "synthetic",
        Logged(inner, broken=name == "broken"),
        inner,
        low,
        high,
        (front - low) / (high - low) if name == "plain" else None,
        name != "plain",
    )


def available(name: str) -> str | None:
    return "its data are not here" if name == "absent" else None


def names(suite: str) -> Sequence[str]:
    return ("plain",) if suite == "smoke" else ("plain", "noisy", "absent")
