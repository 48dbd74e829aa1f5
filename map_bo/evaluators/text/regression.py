"""Regression: a number per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import mean_of
from map_bo.evaluators.text.evaluator import HeadSettings, TextEvaluator, chosen_metrics
from map_bo.evaluators.text.heads import Head
from map_bo.evaluators.text.measures import correlation
from map_bo.evaluators.text.pooling import Pooling
from map_bo.values import switch

__all__ = ["Regression"]

_METRICS = {
    "absolute_error": Metric("absolute_error", direction="min", kind="loss"),
    "squared_error": Metric("squared_error", direction="min", kind="loss"),
    "pearson": Metric("pearson", kind="unbounded", lower=-1.0, upper=1.0),
    "spearman": Metric("spearman", kind="unbounded", lower=-1.0, upper=1.0),
}

_CORRELATIONS: Mapping[str, Literal["pearson", "spearman"]] = {
    "pearson": "pearson",
    "spearman": "spearman",
}


class Regression(TextEvaluator):
    """A number per text, or per pair; in a configuration ``kind: regression``.

    Args:
        data: The examples, with the roles ``text`` (or ``first`` and ``second``) and ``score``; see
            :class:`~map_bo.evaluators.data.Data`.
        pairs: Whether the texts are pairs.
        tokenizer: As for :class:`~map_bo.evaluators.text.classification.TextClassification`, like
            all that follow but the metrics.
        metrics: Of ``absolute_error`` (mean, in the unit of the scores), ``squared_error`` (mean,
            in its square), ``pearson`` and ``spearman`` (correlations in [-1, 1]; see
            :func:`~map_bo.evaluators.text.measures.correlation` for their variance).
        head: None for the model's own head of one output, a file, or ``"fit"``, which is by ridge
            regression.
        train: The examples that a head is fitted on.
        pooling: ``mean``, ``cls`` or ``last``.
        penalty: How strongly the weights of a fitted head are drawn to 0.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts per forward pass.
        cache_dir: Folder above what is kept on disk.

    Raises:
        ConfigError: For settings that are not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        pairs: bool = False,
        tokenizer: object = None,
        metrics: str | Sequence[str] = "squared_error",
        head: str | Path | None = None,
        train: Data | Mapping[str, Any] | str | None = None,
        pooling: Pooling | None = None,
        penalty: float = 10.0,
        max_length: int | None = None,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            roles=("first", "second") if switch("pairs", pairs) else ("text",),
            target="score",
            head=HeadSettings.of(head, train, pooling, "ridge", penalty),
            data=data,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            cache_dir=cache_dir,
        )
        self._names = chosen_metrics(metrics, tuple(_METRICS))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were asked for."""
        return tuple(_METRICS[name] for name in self._names)

    @property
    def means(self) -> tuple[bool, ...]:
        """The errors; the outcomes of correlations are the predictions."""
        return tuple(name not in _CORRELATIONS for name in self._names)

    def targets_of(
        self, examples: Examples, outputs: int, head: Head | None, model: nn.Module
    ) -> Tensor:
        """Return the true numbers, ``n``, float64."""
        if outputs != 1:
            whose = f"the head of {type(model).__name__}" if head is None else self.head.head
            raise EvaluationError(
                f"{whose} has {outputs} outputs, and a regression needs one",
                hint="it is one of classes: kind=text_classification; or fit one: head='fit'",
            )
        return torch.tensor(examples.numbers("score"), dtype=torch.float64)

    def fitted_to(self, examples: Examples) -> tuple[list[float], None, int]:
        """Return the numbers of a training split."""
        return examples.numbers("score"), None, 0

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of one batch, ``b``, or ``b x m`` with several metrics.

        They are the errors of the examples, and for correlations the predictions.
        """
        predicted = self.outputs(model, items)[:, 0].double()
        error = predicted - self.ready.targets[items]
        found = {
            "absolute_error": error.abs(),
            "squared_error": error**2,
            "pearson": predicted,
            "spearman": predicted,
        }
        table = torch.stack([found[name] for name in self._names], -1)
        return table.squeeze(-1) if len(self._names) == 1 else table

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return errors as means, and correlations with the true numbers.

        Args:
            outcomes: As `score` returns them.
            items: Which examples they are of; by default all, in their order.

        Raises:
            EvaluationError: For a correlation where all predictions are the same.
        """
        table = outcomes.unsqueeze(-1) if outcomes.dim() == 1 else outcomes
        true = self.ready.targets if items is None else self.ready.targets[items]
        found: dict[str, Measurement] = {}
        for name, column in zip(self._names, table.unbind(-1), strict=True):
            if name in _CORRELATIONS:
                found[name] = correlation(column, true, _CORRELATIONS[name])
            else:
                found[name] = mean_of(column, _METRICS[name])
        return found
