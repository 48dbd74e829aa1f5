"""Examples: the sets that metrics are measured on, and the outcome of each example.

An evaluator that scores example by example has a *set* of them. Every run puts each set into one
random order; an evaluation covers the examples up to some position of it, so those of two rows
nest, and what two rows have in common is all that the smaller one has. Sets are numbered as their
evaluators number them; the order only says which come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from map_bo.errors import DataError
from map_bo.rng import child, make_generator

__all__ = ["ExampleOutcomes", "ExampleSet", "Part", "check_parts", "order_of", "searched"]


class Part(NamedTuple):
    """Which examples of an evaluator are to be scored: positions ``[start, stop)`` of its order.

    An evaluator that cannot score some of its examples has a set of size 1: all of them.
    """

    evaluator: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class ExampleSet:
    """The examples that one evaluator scores.

    Attributes:
        metrics: Names in the run of the metrics that are measured on them.
        size: How many there are; 1 where the evaluator can only be called as a whole.
        digest: Digest of the examples; empty where the evaluator has none.
        strata: ``size`` integers, the label of each example where labels are known.
        divisible: Whether some of them can be scored without the others.
    """

    metrics: tuple[str, ...]
    size: int
    digest: str = ""
    strata: Tensor | None = None
    divisible: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or (self.strata is not None and self.strata.shape != (self.size,)):
            shape = None if self.strata is None else tuple(self.strata.shape)
            raise DataError(
                f"a set of {self.size} examples has strata of shape {shape}",
                hint="give at least one example, and one stratum per example or none",
            )


def order_of(examples: ExampleSet, seed: int, key: str) -> Tensor:
    """Return the random order of a set: ``size`` indices, each once.

    With strata, every stretch of it holds each stratum in about its share: the ``k``-th of the
    ``n`` examples of a stratum comes at about ``k / n`` of the way.

    Args:
        examples: The set.
        seed: Seed of the run.
        key: Name of the evaluator, so that sets of equal size have orders of their own.
    """
    source = child(make_generator(seed), "examples", key, examples.size, examples.digest)
    shuffled = torch.randperm(examples.size, generator=source)
    if examples.strata is None:
        return shuffled
    labels = examples.strata[shuffled]
    at = torch.empty(examples.size, dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().flatten()
        within = torch.rand(len(rows), generator=source, dtype=torch.float64)
        at[rows] = (torch.arange(len(rows)) + within) / len(rows)
    return shuffled[at.argsort(stable=True)]


def searched(size: int, holdout: float) -> int:
    """Return how many positions of an order a search uses; those after them are held out.

    Args:
        size: Examples of the set; a set of one, such as that of an evaluator that cannot be
            divided, is never held out.
        holdout: Share of the examples that is held out: at least one of a set, if it is not 0.
    """
    if size == 1 or not holdout > 0:
        return size
    return max(1, size - max(1, round(holdout * size)))


@dataclass(frozen=True, eq=False)
class ExampleOutcomes:
    """Outcomes of one evaluator on some of its examples, of one row.

    Attributes:
        items: ``n`` indices of examples, ascending, each once.
        values: ``n x k`` outcomes, one column for each of the evaluator's ``k`` metrics; NaN where
            an example failed.
        size: How many examples the set has in all.
        means: Whether each of the metrics is the mean of its outcomes; ``k`` booleans.
        metrics: Names in the run of the ``k`` metrics; empty where they are not told, which is
            enough for an evaluator that measures a single metric under its own name.
    """

    items: Tensor
    values: Tensor
    size: int
    means: tuple[bool, ...]
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        items, values = self.items.detach().cpu().long(), self.values.detach().cpu().double()
        values = values.unsqueeze(-1) if values.dim() == 1 else values
        if items.dim() != 1 or values.shape != (len(items), len(self.means)):
            raise DataError(
                f"{tuple(items.shape)} examples have outcomes of shape {tuple(values.shape)} for "
                f"{len(self.means)} metrics",
                hint="give one outcome per example and metric",
            )
        put(self, "metrics", tuple(self.metrics))
        if self.metrics and len(set(self.metrics)) != len(self.means):
            raise DataError(
                f"outcomes in {len(self.means)} columns are of the metrics "
                f"{', '.join(self.metrics)}",
                hint="name one metric per column, each once, or none",
            )
        sorts = bool((items[1:] < items[:-1]).any())
        order = items.argsort() if sorts else slice(None)
        # Copies of their own, whatever becomes of those that were given.
        items, values = items[order].clone(), values[order].clone()
        inside = len(items) and 0 <= int(items[0]) and int(items[-1]) < self.size
        if not inside or bool((items[1:] == items[:-1]).any()):
            raise DataError(
                f"the examples of an outcome are not different ones of {self.size}",
                hint="score each example at most once, and at least one",
            )
        put(self, "items", items)
        put(self, "values", values)

    def __repr__(self) -> str:
        """Return how many there are; thousands of outcomes would hide all else that is shown."""
        named = f" of {', '.join(self.metrics)}" if self.metrics else ""
        return f"<outcomes of {len(self)} of {self.size} examples{named}>"

    def __len__(self) -> int:
        return len(self.items)

    @property
    def complete(self) -> bool:
        """Whether all examples of the set were scored."""
        return len(self.items) == self.size

    def joined(self, more: ExampleOutcomes) -> ExampleOutcomes:
        """Return these outcomes and ``more`` of the same set; of an example in both, the latter.

        Raises:
            DataError: When they are of different sets.
        """
        if (more.size, more.means) != (self.size, self.means):
            raise DataError(
                f"outcomes on {self.size} examples cannot be joined with some on {more.size}",
                hint="the data of an evaluator must stay the same throughout a run",
            )
        if self.metrics and more.metrics and more.metrics != self.metrics:
            raise DataError(
                f"outcomes of {', '.join(self.metrics)} cannot be joined with those of "
                f"{', '.join(more.metrics)}",
                hint="the metrics of an evaluator must stay the same throughout a run",
            )
        covered = torch.zeros(self.size, dtype=torch.bool)
        spread = self.values.new_empty(self.size, len(self.means))
        for one in (self, more):
            covered[one.items] = True
            spread[one.items] = one.values
        items = covered.nonzero().flatten()
        return ExampleOutcomes(
            items, spread[items], self.size, self.means, more.metrics or self.metrics
        )

    def columns(self, evaluator: str) -> dict[str, int]:
        """Return the name in the run of each metric -> its column.

        Args:
            evaluator: What the evaluator is called; it names a single metric that has no other.

        Raises:
            DataError: When there are several metrics, and none of them has a name.
        """
        if not self.metrics and len(self.means) > 1:
            raise DataError(
                f"evaluator {evaluator!r} gives outcomes of {len(self.means)} metrics without "
                "their names",
                hint="give ExampleOutcomes the names in `metrics`",
            )
        return {name: j for j, name in enumerate(self.metrics or (evaluator,))}

    def row(self) -> Tensor:
        """Return the outcomes by example, ``size x k``, NaN where an example was not scored."""
        spread = self.values.new_full((self.size, len(self.means)), torch.nan)
        spread[self.items] = self.values
        return spread


def check_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return parts as a tuple, or refuse them.

    Raises:
        DataError: When one is empty, or an evaluator appears twice.
    """
    names = [part.evaluator for part in parts]
    if len(set(names)) < len(names) or any(not 0 <= p.start < p.stop for p in parts):
        raise DataError(
            f"parts of examples must not be empty, and of different evaluators, got {list(parts)}",
            hint="give one range of positions per evaluator",
        )
    return tuple(Part(*part) for part in parts)
