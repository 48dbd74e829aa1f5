"""What a problem is: a coefficient space, metrics, and a way to measure them.

Whatever else a problem may be able to do is a protocol of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.evaluators.evaluator import Evaluator
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.isolation.world import callers_world
from map_bo.merging.export.adapter import AdapterExport
from map_bo.merging.export.model import ExportSettings
from map_bo.space import CoefficientSpace

__all__ = [
    "Describable",
    "Divisible",
    "Exportable",
    "ExportsAdapters",
    "HasEvaluators",
    "Preparable",
    "Problem",
    "description_of",
    "digests_of_examples",
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
    problem is prepared; of a problem without such evaluators nothing is read.

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
    return {name: evaluator.digest for name, evaluator in mine.items()}


@runtime_checkable
class Divisible(Protocol):
    """A problem that can measure some of its metrics and spare itself the others."""

    def restricted(self, names: Sequence[str]) -> Problem:
        """Return the problem in the same space with these metrics alone, in this order.

        Raises:
            DataError: When there is no such metric.
        """
        ...


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
