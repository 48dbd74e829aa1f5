"""How an evaluator is scored by example: all that it has, or some of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import (
    HasDigest,
    ItemEvaluator,
    Measurement,
    called,
)
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.items import (
    HasStrata,
    Items,
    Summarises,
    TellsMeans,
    TellsParts,
    means_over_scored,
    numbered,
    read_outcomes,
    refuse_another_size,
)
from map_bo.evaluators.metrics import DeclaresMetrics, measurements_of, metric_names
from map_bo.examples.sets import ExampleOutcomes
from map_bo.values import whole_number

__all__ = ["Scored"]

_SLACK = 1e-6  # of bounds


@dataclass(frozen=True, eq=False)
class Scored:
    """An evaluator, ready, that scores its examples one by one.

    Attributes:
        name: What it is called.
        evaluator: The evaluator.
        size: How many examples it has.
        metrics: Names in the run of its ``k`` metrics.
        means: Whether each of them is the mean of its outcomes.
        strata: The label of each example, if labels are known.
        divisible: Whether the metrics can be measured on a part of the examples.
        digest: Its digest; empty where it has none.
    """

    name: str
    evaluator: ItemEvaluator
    size: int
    metrics: tuple[str, ...]
    means: tuple[bool, ...]
    strata: Tensor | None
    divisible: bool
    digest: str
    _told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, name: str, evaluator: object) -> Scored | None:
        """Return how an evaluator is scored by example; None where it is called as a whole.

        Called is also what derives from :class:`~map_bo.evaluators.examples.ExampleEvaluator` and
        has a ``__call__`` of its own.

        Raises:
            EvaluationError: When it says something of itself that cannot be.
        """
        if not isinstance(evaluator, ItemEvaluator):
            return None
        ours = isinstance(evaluator, ExampleEvaluator)
        if ours and type(evaluator).__call__ is not ExampleEvaluator.__call__:
            return None
        what = f"the size of evaluator {name!r}"
        size = whole_number(what, evaluator.size, least=1, error=EvaluationError)
        names = tuple(metric_names(name, evaluator).values())
        plain = not isinstance(evaluator, Summarises)
        said = evaluator.means if isinstance(evaluator, TellsMeans) else (plain,) * len(names)
        if len(said) != len(names):
            raise EvaluationError(
                f"evaluator {name!r} says of {len(said)} metrics whether they are means, and has "
                f"{len(names)}",
                hint="give `means` one boolean per metric",
            )
        strata = evaluator.strata if isinstance(evaluator, HasStrata) else None
        if strata is not None:
            strata = numbered(strata, size, EvaluationError)
        divisible = not isinstance(evaluator, TellsParts) or bool(evaluator.divisible)
        means, digest = tuple(map(bool, said)), _digest(evaluator)
        return cls(name, evaluator, size, names, means, strata, divisible, digest)

    def measure(
        self, model: nn.Module, metrics: Sequence[Metric], items: Tensor | None = None
    ) -> tuple[dict[str, Measurement | EvaluationError], Tensor]:
        """Score examples; return the measurements by their names in the run, and the outcomes.

        Args:
            model: The model, in evaluation mode.
            metrics: What the metrics of the run are; others of the evaluator are as it says.
            items: ``n`` indices; None for all in order, which gives what calling it gives.

        Returns:
            The measurements, as :func:`~map_bo.evaluators.metrics.measure_all` gives them; and
            ``n x k`` outcomes.

        Raises:
            EvaluationError: As `measure_all`; when an outcome is outside the bounds of its metric.
        """
        tables: list[Tensor] = []

        def scored(model: nn.Module) -> Any:
            refuse_another_size(self.size, self.evaluator.size)
            asked = torch.arange(self.size, device="cpu") if items is None else items
            outcomes = self.evaluator.score(model, asked)
            if isinstance(self.evaluator, ExampleEvaluator) and not isinstance(
                self.evaluator, Items
            ):
                tables.append(outcomes.reshape(len(asked), -1))
            else:
                own = list(metric_names(self.name, self.evaluator))
                tables.append(read_outcomes(outcomes, len(asked), own))
                self._refuse_out_of_bounds(tables[0], metrics)
            return self._summed(outcomes, tables[0], items, metrics)

        found = measurements_of(self.name, self.evaluator, called(self.name, scored, model))
        return found, tables[0]

    def outcomes(self, table: Tensor, items: Tensor | None = None) -> ExampleOutcomes:
        """Return outcomes (``n x k``) of some examples, or of all in order, as they are kept."""
        which = torch.arange(self.size, device="cpu") if items is None else items
        # They outlive the evaluation, and may come from inference mode.
        which, table = (one.clone() if one.is_inference() else one for one in (which, table))
        return ExampleOutcomes(which, table, self.size, self.means, self.metrics)

    def summarise(
        self, metrics: Sequence[Metric], outcomes: ExampleOutcomes
    ) -> dict[str, Measurement | EvaluationError]:
        """Return what outcomes that were kept make, by the names in the run.

        Args:
            metrics: What the metrics of the run are.
            outcomes: Those of this evaluator.
        """
        items = None if outcomes.complete else outcomes.items
        table = outcomes.values
        given = table.squeeze(-1) if table.shape[1] == 1 else table

        def summed(model: nn.Module) -> Any:
            return self._summed(given, table, items, metrics)

        try:  # no model is needed, but whatever a summary raises is told as of a call
            found = called(self.name, summed, nn.Identity())
            return measurements_of(self.name, self.evaluator, found)
        except EvaluationError as error:
            return dict.fromkeys(self.metrics, error)

    def _summed(
        self, outcomes: Tensor, table: Tensor, items: Tensor | None, metrics: Sequence[Metric]
    ) -> Any:
        if not isinstance(self.evaluator, Summarises):
            return self._means(table, metrics)
        return self.evaluator.summary(*((outcomes,) if items is None else (outcomes, items)))

    def _means(self, table: Tensor, metrics: Sequence[Metric]) -> Any:
        """Return what an evaluator without a summary of its own has measured."""
        known = {metric.name: metric for metric in metrics}
        declares = self.evaluator if isinstance(self.evaluator, DeclaresMetrics) else None
        own = (Metric(self.name),) if declares is None else declares.metrics
        kinds = [
            known.get(name, replace(metric, name=name))
            for name, metric in zip(self.metrics, own, strict=True)
        ]
        found = means_over_scored(table, kinds, self.name, self._told)
        names = metric_names(self.name, self.evaluator)
        if declares is None:
            return found[self.name]
        return {one: found[name] for one, name in names.items()}

    def _refuse_out_of_bounds(self, table: Tensor, metrics: Sequence[Metric]) -> None:
        """Refuse outcomes whose mean may be within the bounds of a metric, and they are not."""
        known = {metric.name: metric for metric in metrics}
        for name, mean, column in zip(self.metrics, self.means, table.unbind(-1), strict=True):
            values = column[~column.isnan()]
            if name not in known or not mean or not len(values):
                continue
            low, high = known[name].lower, known[name].upper
            least, most = float(values.min()), float(values.max())
            slack = _SLACK * max(1.0, abs(low or 0.0), abs(high or 0.0))
            if (low is not None and least < low - slack) or (
                high is not None and most > high + slack
            ):
                raise EvaluationError(
                    f"outcomes of {name!r} go from {least:.6g} to {most:.6g}, and the metric's "
                    f"bounds are [{low}, {'inf' if high is None else high}]",
                    hint="say what they are: metric=map_bo.Metric(name, kind=..., upper=...)",
                )


def _digest(evaluator: object) -> str:
    """Return what an evaluator says of its examples; nothing where it says nothing."""
    try:
        said: object = evaluator.digest if isinstance(evaluator, HasDigest) else ""
        text = said() if callable(said) else said
    except Exception:  # whatever a property of somebody else's raises
        return ""
    return text if isinstance(text, str) else ""
