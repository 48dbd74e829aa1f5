"""A problem that has outcomes of examples, without a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.examples.sets import ExampleOutcomes
from map_bo.rng import make_generator
from tests.loop.bowls import Bowls

__all__ = ["ScoredBowls", "outcomes"]


def outcomes(
    n: int, size: int | None = None, *, seed: int = 0, kind: str = "float"
) -> ExampleOutcomes:
    """Return the outcomes of ``n`` random examples of ``size``: losses, or zeros and ones."""
    generator = make_generator(seed)
    items = torch.randperm(n if size is None else size, generator=generator)[:n]
    values = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 3
    values = (values > 1).double() if kind == "bits" else values
    return ExampleOutcomes(items, values, n if size is None else size, (True,))


@dataclass
class ScoredBowls(Bowls):
    """Bowls with two evaluators: ``size`` losses of one, and as many zeros and ones of the other.

    Outcomes are drawn anew for each point, by the point.
    """

    size: int = 6000

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        seen = super().evaluate(X, generator=generator)
        names = [metric.name for metric in self.metrics]
        rows = tuple(
            {
                names[0]: outcomes(self.size, seed=int(1e6 * float(x.sum())), kind="bits"),
                names[1]: outcomes(self.size, seed=int(1e6 * float(x[0]))),
            }
            for x in seen.X
        )
        return dataclasses.replace(seen, examples=rows)
