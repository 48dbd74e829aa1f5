"""What an allocation is: it says which examples of which row are scored next.

The cost of a run is the examples that it scores. An action is a new row or one that was measured
before, and the positions of each evaluator's order up to which it is to be covered; evaluators that
are not named are not called. The unit of cost is a full evaluation: all examples of all evaluators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self, runtime_checkable

from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.examples.sets import ExampleSet, Part
from map_bo.space import CoefficientSpace

__all__ = ["LEAST", "Action", "Allocation", "Standing", "prefix"]

LEAST = 25
"""Examples that a row is measured on at least, where there are so many."""

_NOTHING = 1e-9  # of a full evaluation


class Action(NamedTuple):
    """What is to be scored next.

    Attributes:
        row: Number of a row that was measured before; None for a new point.
        parts: Positions of the evaluators' orders, each from where the row is covered.
    """

    row: int | None
    parts: tuple[Part, ...]

    def words(self, row: int) -> str:
        """Return what is done, of the row with this number, as progress shows it."""
        if self.row is None:
            return f"evaluation {row + 1}"
        said = ", ".join(f"{one.evaluator} {one.start + 1}-{one.stop}" for one in self.parts)
        return f"evaluation {row + 1}, examples {said}"


@dataclass(frozen=True, eq=False)
class Standing:
    """Where the search of a run stands when the next action is to be chosen.

    Attributes:
        seen: Estimates for all examples of the rows that have outcomes.
        rows: The numbers of those rows.
        X: ``n x d`` all rows that were proposed.
        space: The coefficients.
        sets: The set of each evaluator.
        sizes: How many positions of each order count as all of it; the rest is held out.
        covered: Row -> evaluator -> how many positions are covered, those in flight included.
        busy: Rows that are in flight, and those that are not to be topped up.
        budget: Full evaluations that the search has.
        weights: Evaluator -> its share in the cost of a full evaluation.
        wasted: Full evaluations that were spent on examples without an outcome, since they failed.
    """

    seen: Observations
    rows: tuple[int, ...]
    X: Tensor
    space: CoefficientSpace
    sets: Mapping[str, ExampleSet]
    sizes: Mapping[str, int]
    covered: Mapping[int, Mapping[str, int]]
    busy: frozenset[int] = frozenset()
    budget: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    wasted: float = 0.0

    def __post_init__(self) -> None:
        if not self.weights:
            object.__setattr__(self, "weights", shares(self.sets, self.sizes))

    @cached_property
    def spent(self) -> float:
        """Full evaluations that were spent or are in flight."""
        return self.wasted + sum(
            self.weights[name] * count / self.sizes[name]
            for covered in self.covered.values()
            for name, count in covered.items()
        )

    @property
    def left(self) -> float:
        """Full evaluations that are left."""
        return self.budget - self.spent

    def cost(self, parts: tuple[Part, ...]) -> float:
        """Return what parts cost, in full evaluations."""
        return sum(
            self.weights[part.evaluator] * (part.stop - part.start) / self.sizes[part.evaluator]
            for part in parts
        )

    def affords(self, parts: tuple[Part, ...]) -> bool:
        """Return whether the budget has room for parts."""
        return self.cost(parts) <= self.left + _NOTHING

    def after(self, action: Action) -> Self:
        """Return the standing with an action in flight; a new row is numbered on from the last."""
        row = len(self.covered) if action.row is None else action.row
        own = {**self.covered.get(row, {}), **{p.evaluator: p.stop for p in action.parts}}
        return replace(self, covered={**self.covered, row: own}, busy=self.busy | {row})


def shares(sets: Mapping[str, ExampleSet], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the share that each evaluator has in the cost of a full evaluation.

    They are as its examples; one that cannot be divided counts as the mean of those that can.
    """
    divisible = [sizes[name] for name, one in sets.items() if one.divisible]
    usual = sum(divisible) / len(divisible) if divisible else 1.0
    costs = {name: sizes[name] if one.divisible else usual for name, one in sets.items()}
    total = sum(costs.values())
    return {name: cost / total for name, cost in costs.items()}


def prefix(standing: Standing, share: float, *, least: int = LEAST) -> tuple[Part, ...]:
    """Return the first examples of every evaluator: a share of each, and at least ``least``."""
    parts = []
    for name, size in standing.sizes.items():
        stop = size
        if standing.sets[name].divisible:
            stop = min(size, max(least, round(share * size)))
        parts.append(Part(name, 0, stop))
    return tuple(parts)


@runtime_checkable
class Allocation(Protocol):
    """Settings of an allocation; like a sampler's, its state is rebuilt from what was seen."""

    def first(self, standing: Standing) -> tuple[Part, ...]:
        """Return what a new row is measured on."""
        ...

    def next(self, standing: Standing, *, generator: Generator) -> Action | None:
        """Return what to score next; None when the budget has room for nothing more.

        Args:
            standing: Where the search stands, with everything in flight.
            generator: Source of all randomness; read, never advanced.
        """
        ...
