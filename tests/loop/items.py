"""A problem with examples of known truth: a logistic item-response model of merges."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.examples.sets import ExampleOutcomes, ExampleSet
from map_bo.space import CoefficientSpace


class ItemProblem:
    """Each task likes one expert; an example is solved where ability exceeds its difficulty."""

    def __init__(self, tasks: int = 2, size: int = 200, *, seed: int = 0) -> None:
        source = torch.Generator().manual_seed(seed)
        self.space = CoefficientSpace.box(tuple(f"e{i}" for i in range(tasks)))
        self.metrics = tuple(Metric(f"t{i}", resampling="same") for i in range(tasks))
        self.difficulty = torch.randn(tasks, size, generator=source, dtype=torch.float64)
        self.leaning = 0.3 * torch.randn(tasks, size, tasks, generator=source, dtype=torch.float64)
        self.size, self.calls = size, list[dict[str, int]]()
        self.wanted: Mapping[str, Tensor] | None = None
        self.broken: Mapping[str, int] = {}

    @property
    def example_sets(self) -> dict[str, ExampleSet]:
        """One set per task."""
        return {m.name: ExampleSet((m.name,), self.size, "truth") for m in self.metrics}

    def on_examples(self, wanted: Mapping[str, Tensor]) -> ItemProblem:
        """Return the problem that measures some examples alone."""
        part = copy.copy(self)
        part.wanted = wanted
        part.metrics = tuple(metric for metric in self.metrics if metric.name in wanted)
        return part

    def outcomes(self, x: Tensor, task: int) -> Tensor:
        """Return the outcome of every example of a task at ``x``."""
        own = x[task] * (2 - x[task]) * 2.5 - 1.2 * (x.sum() - x[task]) ** 2
        ability = own + self.leaning[task] @ x
        return (ability > self.difficulty[task]).double()

    def truth(self, x: Tensor) -> Tensor:
        """Return the metrics on all examples."""
        return torch.stack([self.outcomes(x, i).mean() for i in range(self.space.d)])

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure rows on the wanted examples."""
        rows, Y, counts = [], [], []
        names = [f"t{i}" for i in range(self.space.d)]
        for x in X:
            found = {}
            for metric in self.metrics:
                every = torch.arange(self.size)
                items = every if self.wanted is None else self.wanted[metric.name]
                values = self.outcomes(x, names.index(metric.name))[items]
                found[metric.name] = ExampleOutcomes(items, values, self.size, (True,))
            self.calls.append({name: len(one) for name, one in found.items()})
            rows.append(found)
            Y.append([float(one.values.mean()) for one in found.values()])
            counts.append([float(len(one)) for one in found.values()])
        p, n = torch.tensor(Y).double(), torch.tensor(counts).double()
        smooth = (p * n + 0.5) / (n + 1)
        return Observations(
            X, p, self.metrics, smooth * (1 - smooth) / (n + 1), n, examples=tuple(rows)
        )

    def failing(self, name: str, after: int) -> ItemProblem:
        """Return the problem whose task fails wherever more than so many examples are wanted."""
        broken = copy.copy(self)
        broken.broken = {name: after}
        return broken


def failed(seen: Observations, reason: str) -> Observations:
    """Return rows that failed."""
    return dataclasses.replace(Observations.failed(seen.X, seen.metrics, reason), cost=seen.cost)
