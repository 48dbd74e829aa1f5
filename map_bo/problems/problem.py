"""What a problem is: a coefficient space, metrics, and a way to measure them.

Whatever else a problem may be able to do is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, EvaluationError, did_you_mean
from map_bo.evaluators.evaluator import Evaluator, Measurement
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.isolation.world import callers_world, known_numerics
from map_bo.examples.sets import ExampleOutcomes, ExampleSet, Part, order_of
from map_bo.merging.export.adapter import AdapterExport
from map_bo.merging.export.model import ExportSettings
from map_bo.space import CoefficientSpace

__all__ = [
    "Describable",
    "Divisible",
    "Exportable",
    "ExportsAdapters",
    "Forwards",
    "HasEvaluators",
    "HasExamples",
    "Preparable",
    "Problem",
    "SummarisesExamples",
    "check_wanted",
    "description_of",
    "digests_of_examples",
    "on_parts",
    "select_metrics",
]


@runtime_checkable
class Problem(Protocol):
    """Something to optimise. It knows nothing of samplers, surrogates or budgets.

    A recorded table, a synthetic function with a known front and a live merged model are
    interchangeable behind this protocol.
    """

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of the columns of ``Observations.Y``."""
        ...

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every metric at every row of ``X`` (``n x d``).

        A row whose measurement fails (an evaluator raises, or returns NaN) comes back as a failed
        row with its reason. What was measured of it beside that stays in ``Y``, where the others
        are NaN; the other rows keep what was measured.

        Args:
            X: ``n x d`` coefficients in the space.
            generator: Source of any randomness of the measurement.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        ...


@runtime_checkable
class Preparable(Protocol):
    """A problem with work to do before its first evaluation, such as reading checkpoints.

    A run asks for it up front, so that it neither counts against an evaluation's time limit nor
    looks like a failed evaluation when it cannot be done.
    """

    def prepare(self) -> None:
        """Do that work; doing it again costs nothing."""
        ...


@runtime_checkable
class Describable(Protocol):
    """A problem that says what it is, so that a run is not resumed with another."""

    def describe(self) -> Mapping[str, Any]:
        """Return plain data by which the same problem is recognised."""
        ...


def description_of(problem: Problem) -> Mapping[str, Any]:
    """Return what a problem says of itself; its type alone where it says nothing."""
    if isinstance(problem, Describable):
        return problem.describe()
    return {"type": type(problem).__name__}


@runtime_checkable
class HasEvaluators(Protocol):
    """A problem whose metrics are measured by evaluators of a model."""

    @property
    def evaluators(self) -> Mapping[str, Evaluator]:
        """The evaluators by name."""
        ...


def digests_of_examples(problem: Problem) -> dict[str, str]:
    """Return the digest of the examples of each evaluator that scores one by one.

    What was measured on other examples is no measurement of the same problem. They are read, so the
    problem is prepared; of a problem without such evaluators nothing is read. Where there is no
    digest, as of `Items` without one, their number stands for it.

    Args:
        problem: Any problem.

    Raises:
        MapBoError: As :meth:`Preparable.prepare`.
    """
    if not isinstance(problem, HasEvaluators):
        return {}
    mine = {n: e for n, e in problem.evaluators.items() if isinstance(e, ExampleEvaluator)}
    if mine and isinstance(problem, Preparable):
        with callers_world():
            problem.prepare()
    return {name: one.digest or f"{one.size} examples" for name, one in mine.items()}


@runtime_checkable
class Forwards(Protocol):
    """A problem whose rows another one measures, such as a node of a nested run.

    ``evaluate`` does it all in one step; workers that hold the other problem do it in two.
    """

    def request(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return the point of the other problem, and which of its metrics are to be measured.

        None are where everything at ``x`` (``d``) is known.
        """
        ...

    def receive(self, x: Tensor, seen: Observations | None) -> Observations:
        """Return the row of ``x`` (``d``), given what the other problem has measured for it."""
        ...


@runtime_checkable
class HasExamples(Protocol):
    """A problem whose metrics are measured on examples, and that can score some of them alone.

    What it evaluates has the outcome of every example in ``Observations.examples``.
    """

    @property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The set of each evaluator, by its name, in the order of the metrics; prepared."""
        ...

    def on_examples(self, wanted: Mapping[str, Tensor]) -> Problem:
        """Return the problem that measures some metrics on some examples.

        Args:
            wanted: Evaluator -> ``n`` indices of its examples. Its metrics are measured on these,
                and those of evaluators that are not named are not measured. One that is not
                divisible is called as a whole.

        Raises:
            DataError: When there is no such evaluator or example.
        """
        ...


@runtime_checkable
class SummarisesExamples(Protocol):
    """A problem some of whose metrics are not the mean of the outcomes of their examples."""

    def summarise(
        self, evaluator: str, outcomes: ExampleOutcomes
    ) -> Mapping[str, Measurement | EvaluationError]:
        """Return what outcomes make: metric of the run -> its measurement, or what is wrong."""
        ...


def check_wanted(wanted: Mapping[str, Tensor], sets: Mapping[str, ExampleSet]) -> dict[str, Tensor]:
    """Return the examples that are wanted, or refuse them.

    Args:
        wanted: Evaluator -> indices.
        sets: Evaluator -> what it has.

    Raises:
        DataError: When there is no such evaluator, no evaluator at all, or examples are not
            different ones of its set.
    """
    if not wanted:
        raise DataError("no examples are wanted", hint="name at least one evaluator")
    found: dict[str, Tensor] = {}
    for key, given in wanted.items():
        if key not in sets:
            raise DataError(f"there is no evaluator {key!r}", hint=did_you_mean(key, sets))
        size = sets[key].size
        items = torch.as_tensor(given, device="cpu")
        usual = items.dim() == 1 and len(items) > 0 and not items.is_floating_point()
        if usual and items.dtype != torch.bool and sets[key].divisible:
            inside = 0 <= int(items.min()) and int(items.max()) < size
            usual = inside and len(set(items.tolist())) == len(items)
        if not usual or items.dtype == torch.bool:
            raise DataError(
                f"the examples of {key!r} must be different ones of {size}, got {given!r:.80}",
                hint=f"give each index from 0 to {size - 1} at most once",
            )
        found[key] = items.long()
    return found


def on_parts(problem: Problem, parts: Sequence[Part], seed: int) -> Problem:
    """Return the problem that measures parts of its examples alone.

    Args:
        problem: A problem that has examples.
        parts: Positions in the order of each evaluator.
        seed: What the orders are drawn by.

    Raises:
        DataError: When the problem cannot, or has no such evaluator or position.
    """
    if not isinstance(problem, HasExamples):
        raise DataError(
            f"{type(problem).__name__} cannot measure some of its examples alone",
            hint="leave loop.items out, or let it have `example_sets` and `on_examples`",
        )
    sets, wanted = problem.example_sets, {}
    for part in parts:
        if part.evaluator not in sets or part.stop > sets[part.evaluator].size:
            known = {name: one.size for name, one in sets.items()}
            raise DataError(
                f"there are no examples {part.start} to {part.stop} of {part.evaluator!r}",
                hint=f"the sizes are {known}",
            )
        order = order_of(sets[part.evaluator], seed, part.evaluator)
        wanted[part.evaluator] = order[part.start : part.stop]
    return problem.on_examples(wanted)


@runtime_checkable
class Divisible(Protocol):
    """A problem that can measure some of its metrics and spare itself the others."""

    def restricted(self, names: Sequence[str]) -> Problem:
        """Return the problem in the same space with these metrics alone, in this order.

        Raises:
            DataError: When there is no such metric.
        """
        ...


def select_metrics(problem: Problem, names: Sequence[str]) -> Problem:
    """Return the problem with these metrics alone.

    A problem that is not :class:`Divisible` measures all metrics, and the others are dropped.
    """
    if isinstance(problem, Divisible):
        return problem.restricted(names)
    return _MetricSubset(problem, tuple(names))


class _MetricSubset:
    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        self.problem = problem
        all_names = [metric.name for metric in problem.metrics]
        self._columns = [all_names.index(name) for name in names]

    @property
    def space(self) -> CoefficientSpace:
        return self.problem.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(self.problem.metrics[j] for j in self._columns)

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        with callers_world():
            seen = self.problem.evaluate(X, generator=generator)
        return replace(
            seen,
            Y=seen.Y[:, self._columns],
            metrics=self.metrics,
            Yvar=seen.Yvar[:, self._columns],
            counts=seen.counts[:, self._columns],
            recalled=seen.recalled[:, self._columns],
            gradients=None,
            gradient_variance=None,
        )


@runtime_checkable
class Exportable(Protocol):
    """A problem whose points are models that can be written to disk."""

    def export(
        self,
        x: Tensor,
        out: str | Path,
        *,
        record: Mapping[str, Any],
        settings: ExportSettings | None = None,
    ) -> Path:
        """Write the model with coefficients ``x`` (``d``) into the directory ``out``."""
        ...


@runtime_checkable
class ExportsAdapters(Protocol):
    """A problem whose points can be written as LoRA adapters over their base."""

    def export_adapter(
        self,
        x: Tensor,
        out: str | Path,
        *,
        rank: int | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> AdapterExport:
        """Write the merge with ``x`` (``d``) to ``out`` as an adapter of at most ``rank``."""
        ...
