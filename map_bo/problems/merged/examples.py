"""Parts of a merged-model problem: some of its metrics, and some of its evaluators' examples."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import DataError, EvaluationError, did_you_mean
from map_bo.evaluators.evaluator import Evaluator, Measurement
from map_bo.evaluators.isolation.world import known_numerics
from map_bo.evaluators.metrics import evaluators_of, metric_names, select_metrics
from map_bo.examples.sets import ExampleOutcomes, ExampleSet
from map_bo.problems.merged.elsewhere import Placeable
from map_bo.problems.merged.loading import Loaded
from map_bo.problems.problem import check_wanted

__all__ = ["Partial"]


class Partial(Placeable):
    """What of a merged-model problem depends on which metrics and examples are measured.

    Evaluators that score by example have a set of their own; all others have one that cannot be
    divided, and are called as a whole. So are those of a problem that measures gradients.
    """

    _metrics: tuple[Metric, ...]
    _evaluators: dict[str, Evaluator]
    _wanted: Mapping[str, Tensor] = {}  # those of which not all examples are scored

    @abstractmethod
    def _load(self) -> Loaded: ...

    def restricted(self, names: Sequence[str]) -> Self:
        """Return the same merging with these metrics alone; only their evaluators are called.

        Checkpoints are read now if they were not yet, and shared.

        Raises:
            DataError: When there is no such metric.
        """
        metrics = select_metrics(self._metrics, names)
        self._load()
        part = copy.copy(self)
        part._metrics = metrics
        part._evaluators = evaluators_of(self._evaluators, metrics)
        part.made_by(Partial.restricted, self, tuple(names))
        return part

    @property
    def _whole(self) -> dict[str, Evaluator]:
        """The evaluators of which all examples are scored."""
        return {key: one for key, one in self._evaluators.items() if key not in self._wanted}

    @property
    @known_numerics()
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The examples of each evaluator, by its name, in the order of the metrics.

        Checkpoints and examples are read now if they were not yet.

        Raises:
            MapBoError: As `prepare`.
        """
        scored, mine = self._load().scored, {metric.name for metric in self._metrics}
        sets: dict[str, ExampleSet] = {}
        for key, evaluator in self._evaluators.items():
            names = tuple(n for n in metric_names(key, evaluator).values() if n in mine)
            found = scored.get(key)
            if found is None or not found.divisible:
                digest = "" if found is None else found.digest
                sets[key] = ExampleSet(names, 1, digest, divisible=False)
            else:
                sets[key] = ExampleSet(names, found.size, found.digest, found.strata)
        return sets

    def summarise(
        self, evaluator: str, outcomes: ExampleOutcomes
    ) -> Mapping[str, Measurement | EvaluationError]:
        """Return what outcomes of an evaluator make, as when its examples were scored at once.

        Args:
            evaluator: What it is called.
            outcomes: Outcomes that an evaluation gave, or several together.

        Returns:
            The name of each of its metrics in the run -> its measurement, or what is wrong.

        Raises:
            DataError: When there is no such evaluator, or it does not score by example.
        """
        scored = self._load().scored
        if evaluator not in scored or evaluator not in self._evaluators:
            mine = [name for name in scored if name in self._evaluators]
            raise DataError(
                f"no evaluator {evaluator!r} scores by example", hint=did_you_mean(evaluator, mine)
            )
        return scored[evaluator].summarise(self._metrics, outcomes)

    def on_examples(self, wanted: Mapping[str, Tensor]) -> Self:
        """Return the problem that measures some metrics on some examples.

        A model is merged once per row, as for all examples. Where all of an evaluator's examples
        are wanted, they are scored in their own order, and the numbers are those of the whole.

        Args:
            wanted: Evaluator -> ``n`` indices of its examples, in the order in which they are
                scored. Metrics of other evaluators are not measured. An evaluator that cannot be
                divided is called as a whole.

        Raises:
            DataError: When there is no such evaluator or example.
        """
        sets = self.example_sets
        checked = check_wanted(wanted, sets)
        part = copy.copy(self)
        part._metrics = tuple(
            metric
            for metric in self._metrics
            if any(metric.name in sets[key].metrics for key in checked)
        )
        part._evaluators = {k: one for k, one in self._evaluators.items() if k in checked}
        part._wanted = {k: items for k, items in checked.items() if len(items) < sets[k].size}
        part.made_by(Partial.on_examples, self, dict(checked))
        return part
