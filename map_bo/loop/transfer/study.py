"""What an older study has measured, in its own names, and how a new run is to take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.result import Result
from map_bo.space import CoefficientSpace
from map_bo.values import real_number

__all__ = ["HasStudy", "StartFrom", "Study"]


@dataclass(frozen=True, eq=False)
class Study:
    """The evaluations of an older study: ``n`` rows, ``d`` coefficients, ``m`` metrics.

    Attributes:
        names: ``d`` names of the coefficients; empty where they have none and the first ones of
            the new space are meant.
        X: ``n x d`` coefficients.
        metrics: ``m`` metrics; a name alone where direction and kind are not known.
        Y: ``n x m`` measured metrics, own units; NaN where one was not measured.
        Yvar: ``n x m`` noise variances, NaN where unknown.
        counts: ``n x m`` numbers of examples, NaN where there are none.
        cost: ``n`` seconds.
        failures: ``n`` reasons, None where the evaluation did not fail.
        rows: ``n`` words by which a row is found again, such as ``"line 3"``.
        source: Plain data on where it comes from; ``from`` is its kind.
        title: What it is called in messages.
        owner: For each coefficient the name of the expert that it scales; None for a setting.
        problem: The description of its problem, as it was recorded; None where it is not known.
        examples: Digests of the examples of its evaluators, by their names.
        gradients: ``n x m x d`` derivatives, or None.
        gradient_variance: ``n x m x d`` variances of their noise, or None.
        outcomes: For each row, evaluator -> the outcomes of its examples; empty where there are
            none in any row.
    """

    names: tuple[str, ...]
    X: Tensor
    metrics: tuple[Metric | str, ...]
    Y: Tensor
    Yvar: Tensor
    counts: Tensor
    cost: Tensor
    failures: tuple[str | None, ...]
    rows: tuple[str, ...]
    source: Mapping[str, Any]
    title: str
    owner: tuple[str | None, ...] = ()
    problem: Mapping[str, Any] | None = None
    examples: Mapping[str, str] = field(default_factory=dict)
    gradients: Tensor | None = None
    gradient_variance: Tensor | None = None
    outcomes: tuple[Mapping[str, ExampleOutcomes], ...] = ()

    @classmethod
    def of(
        cls,
        seen: Observations,
        space: CoefficientSpace | None,
        *,
        source: Mapping[str, Any],
        title: str,
        problem: Mapping[str, Any] | None = None,
        examples: Mapping[str, str] | None = None,
    ) -> Study:
        """Return observations as a study.

        Args:
            seen: The observations.
            space: Their space; None where it is not known.
            source: Plain data on where they come from.
            title: What they are called in messages.
            problem: The description of their problem.
            examples: Digests of the examples that they were measured on.
        """
        owner: tuple[str | None, ...] = ()
        if space is not None:
            owner = tuple(None if i < 0 else space.experts[i] for i in space.owner)
        return cls(
            names=() if space is None else space.names,
            X=seen.X,
            metrics=seen.metrics,
            Y=torch.where(seen.measured, seen.Y, torch.nan),
            Yvar=seen.Yvar,
            counts=seen.counts,
            cost=seen.cost,
            failures=seen.failures,
            rows=tuple(f"row {i + 1}" for i in range(len(seen))),
            source=source,
            title=title,
            owner=owner,
            problem=problem,
            examples=examples or {},
            gradients=seen.gradients,
            gradient_variance=seen.gradient_variance,
            outcomes=seen.examples if any(seen.examples) else (),
        )

    def select(self, rows: Sequence[int]) -> Study:
        """Return the study with these rows alone."""
        index = list(rows)
        slopes, noise = self.gradients, self.gradient_variance
        return replace(
            self,
            X=self.X[index],
            Y=self.Y[index],
            Yvar=self.Yvar[index],
            counts=self.counts[index],
            cost=self.cost[index],
            failures=tuple(self.failures[i] for i in index),
            rows=tuple(self.rows[i] for i in index),
            gradients=None if slopes is None else slopes[index],
            gradient_variance=None if noise is None else noise[index],
            outcomes=tuple(self.outcomes[i] for i in index) if self.outcomes else (),
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(one if isinstance(one, str) else one.name for one in self.metrics)


@runtime_checkable
class HasStudy(Protocol):
    """Where a study is read from, such as a database of another library."""

    def study(self) -> Study:
        """Read the study.

        Raises:
            MapBoError: When it cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class StartFrom:
    """An older study as the start of a new run, and how its names are to be read.

    Attributes:
        source: The directory of a run, a CSV file, a :class:`~map_bo.loop.result.Result`,
            observations, or what reads a study (:class:`HasStudy`, such as
            :class:`map_bo.ax.known.AxDatabase`).
        experts: Old name of an expert or coefficient -> its new name; None leaves it out, and with
            it the rows in which it is not 0. What is not named keeps its name.
        metrics: Old name of a metric -> its new name; None leaves its values out.
        values: Value that a setting of the operator had in the old study, where it says nothing
            of it, by the name of the coefficient.
        trust_data: Whether to take values that were measured on other examples, or by a problem
            that is described in another way.
        skip: Whether to leave out rows that cannot be taken, instead of refusing all.
    """

    source: Observations | Result | HasStudy | str | Path
    experts: Mapping[str, str | None] = field(default_factory=dict)
    metrics: Mapping[str, str | None] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    trust_data: bool = False
    skip: bool = False

    def __post_init__(self) -> None:
        for name in ("experts", "metrics"):
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, {})
                continue
            if not isinstance(given, Mapping) or not all(
                isinstance(key, str) and isinstance(value, str | None)
                for key, value in given.items()
            ):
                raise ConfigError(
                    f"{name} of start_from must map old names to new ones, got {given!r:.80}",
                    hint=f"write {name}={{old: new}}; null leaves an old one out",
                )
        if self.values is None:
            object.__setattr__(self, "values", {})
        if not isinstance(self.values, Mapping):
            raise ConfigError(
                f"values of start_from must map coefficients to numbers, got {self.values!r:.80}",
                hint="write values={density: 0.2}",
            )
        read = {
            str(name): float(real_number(f"the value of {name} in start_from", value))
            for name, value in self.values.items()
        }
        object.__setattr__(self, "values", read)
        for name in ("trust_data", "skip"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} of start_from must be true or false, got {getattr(self, name)!r:.80}",
                    hint=f"write {name}=true or leave it out",
                )
