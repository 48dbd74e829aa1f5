"""Parts of a merged-model problem: some of its metrics, and some of its evaluators' examples."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import DataError, did_you_mean
from map_bo.evaluators.evaluator import Evaluator
from map_bo.evaluators.metrics import evaluators_of, metric_names, select_metrics
from map_bo.examples.sets import ExampleSet
from map_bo.problems.merged.elsewhere import Placeable
from map_bo.problems.merged.loading import Loaded

__all__ = ["Partial", "check_wanted"]


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
