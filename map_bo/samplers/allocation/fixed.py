"""Allocations that ask nothing of a surrogate: all examples, a fixed subset, successive halving."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from map_bo.data import to_maximisation
from map_bo.errors import ConfigError
from map_bo.examples.sets import Part
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import child
from map_bo.samplers.allocation.allocation import Action, Standing, prefix
from map_bo.scale import Scale, anchor_rows
from map_bo.values import real_number, whole_number

__all__ = ["Fixed", "Full", "SuccessiveHalving"]


@dataclass(frozen=True)
class Full:
    """Every row on all examples."""

    def first(self, standing: Standing) -> tuple[Part, ...]:
        """Return all examples."""
        return prefix(standing, 1.0)

    def next(self, standing: Standing, *, generator: Generator) -> Action | None:
        """Return a new row; None when the budget has no room for one."""
        parts = self.first(standing)
        return Action(None, parts) if standing.affords(parts) else None


@dataclass(frozen=True)
class Fixed:
    """Every row on the same first examples of each set.

    Attributes:
        examples: How many; all of a set that has fewer.
    """

    examples: int

    def __post_init__(self) -> None:
        number = whole_number("examples of a fixed subset", self.examples, least=1)
        object.__setattr__(self, "examples", number)

    def first(self, standing: Standing) -> tuple[Part, ...]:
        """Return the first examples of every set."""
        sets = standing.sets
        return tuple(
            Part(name, 0, min(size, self.examples) if sets[name].divisible else size)
            for name, size in standing.sizes.items()
        )

    def next(self, standing: Standing, *, generator: Generator) -> Action | None:
        """Return a new row; None when the budget has no room for one."""
        parts = self.first(standing)
        return Action(None, parts) if standing.affords(parts) else None


@dataclass(frozen=True)
class SuccessiveHalving:
    """Rows begin on few examples, and the better part of them goes on to more.

    Jamieson and Talwalkar, *Non-stochastic Best Arm Identification and Hyperparameter
    Optimization*, 2016: of the rows on a rung the share ``1 / factor`` is promoted to ``factor``
    times as many examples, as soon as there are enough to say which (Li et al., *A System for
    Massively Parallel Hyperparameter Tuning*, 2020). The better rows are those that are best for
    more of the preferences. Base, experts and blend are promoted first, as scales rest on them.

    Attributes:
        share: Share of the examples that a row begins on.
        factor: By how much a rung is larger than the one below.
        preferences: Weights drawn to compare rows by.
    """

    share: float = 1 / 16
    factor: int = 4
    preferences: int = 64

    def __post_init__(self) -> None:
        if not 0 < real_number("share", self.share) <= 1:
            raise ConfigError(
                f"share must be between 0 and 1, got {self.share}", hint="such as 0.0625"
            )
        whole_number("factor", self.factor, least=2)

    def first(self, standing: Standing) -> tuple[Part, ...]:
        """Return the examples of the lowest rung."""
        return prefix(standing, self.share)

    def next(self, standing: Standing, *, generator: Generator) -> Action | None:
        """Return a promotion where one is due, from the highest rung down; else a new row."""
        good = standing.seen.ok
        rows = [row for row, ok in zip(standing.rows, good.tolist(), strict=True) if ok]
        if rows:
            order = self._ranked(standing, good, generator)
            ranked = [rows[i] for i in order.tolist()]
            for share in self._rungs()[::-1][1:]:
                above = prefix(standing, min(1.0, share * self.factor))
                here = [r for r in ranked if self._reaches(standing, r, prefix(standing, share))]
                there = [row for row in here if self._reaches(standing, row, above)]
                for row in here[: len(here) // self.factor]:
                    if row in there or row in standing.busy:
                        continue
                    parts = tuple(
                        Part(p.evaluator, standing.covered[row].get(p.evaluator, 0), p.stop)
                        for p in above
                        if standing.covered[row].get(p.evaluator, 0) < p.stop
                    )
                    if parts and standing.affords(parts):
                        return Action(row, parts)
        parts = self.first(standing)
        return Action(None, parts) if standing.affords(parts) else None

    def _rungs(self) -> list[float]:
        count = math.ceil(-math.log(self.share) / math.log(self.factor) - 1e-9)
        return [min(1.0, self.share * self.factor**i) for i in range(count + 1)]

    def _reaches(self, standing: Standing, row: int, parts: tuple[Part, ...]) -> bool:
        covered = standing.covered.get(row, {})
        return all(covered.get(part.evaluator, 0) >= part.stop for part in parts)

    def _ranked(self, standing: Standing, good: Tensor, generator: Generator) -> Tensor:
        """Return the order of the rows that succeeded, the better first."""
        seen = standing.seen.select(good)
        scale = Scale.of(seen, standing.space)
        gains = scale.gains(to_maximisation(seen.Y, seen.metrics), maximised=True)
        source = child(generator, "halving")
        W = scale.weights(preference_weights(self.preferences, len(seen.metrics), generator=source))
        utility = gains @ W.T
        rank = utility.argsort(0, descending=True).argsort(0).double().amin(-1)
        rank = rank - anchor_rows(seen.X, standing.space).any(0).to(rank) * len(seen)
        return torch.argsort(rank + utility.mean(-1).argsort(descending=True).argsort() * 1e-6)
