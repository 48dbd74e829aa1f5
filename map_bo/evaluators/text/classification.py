"""Classification of texts and of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, listed
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import mean_of
from map_bo.evaluators.logits import LOGIT_METRICS, need_labels, prediction_entropy
from map_bo.evaluators.text.evaluator import HeadSettings, TextEvaluator, chosen_metrics
from map_bo.evaluators.text.heads import FitMethod, Head
from map_bo.evaluators.text.labels import Classes, classes_of_model, rows_of
from map_bo.evaluators.text.measures import macro_f1
from map_bo.evaluators.text.pooling import Pooling

__all__ = ["TextClassification", "TextPairs"]

_METRICS = {
    "accuracy": Metric("accuracy"),
    "f1": Metric("f1"),
    "loss": Metric("loss", direction="min", kind="loss"),
    "entropy": LOGIT_METRICS["entropy"],
}


class _Classification(TextEvaluator):
    """Texts, or pairs of texts, with a class each."""

    def __init__(
        self,
        *,
        metrics: str | Sequence[str],
        roles: tuple[str, ...],
        head: HeadSettings,
        **rest: Any,
    ) -> None:
        self._names = chosen_metrics(metrics, tuple(_METRICS))
        labelled = need_labels(self._names)
        super().__init__(roles=roles, target="label", labelled=labelled, head=head, **rest)
        of_chances = [name for name in self._names if name in ("loss", "entropy")]
        if of_chances and head.head == "fit" and head.fit == "ridge":
            raise ConfigError(
                f"the metric {of_chances[0]!r} needs probabilities, and a head that is fitted by "
                "ridge regression gives none",
                hint="give fit='logistic'",
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were asked for: ``accuracy``, macro ``f1``; ``loss``, ``entropy`` in nats."""
        return tuple(_METRICS[name] for name in self._names)

    @property
    def means(self) -> tuple[bool, ...]:
        """All but macro F1, whose outcomes are the predicted classes."""
        return tuple(name != "f1" for name in self._names)

    @property
    def strata(self) -> Tensor | None:
        """The class of each example; None where only the entropy is measured."""
        return self.ready.targets if self.labelled else None

    def targets_of(
        self, examples: Examples, outputs: int, head: Head | None, model: nn.Module
    ) -> Tensor:
        """Return the row of the head for each example's class, ``n``, int64."""
        if outputs < 2:
            raise EvaluationError(
                f"the head of {type(model).__name__} has {outputs} output, which tells no classes "
                "apart",
                hint="it is one of regression: kind=regression, or map_bo.evaluators.Regression",
            )
        if not self.labelled:
            return torch.zeros(examples.size, dtype=torch.long)
        if head is None:
            classes = classes_of_model(model, outputs)
        else:
            classes = Classes(outputs, head.labels, f"the head {self.head.head}")
        # The classes of a fitted head are those of its own data, in their order.
        explicit = self.data.labels is not None
        rows = rows_of(examples, classes, explicit=explicit)
        return torch.tensor([rows[label] for label in examples.classes()])

    def fitted_to(self, examples: Examples) -> tuple[list[float], tuple[str, ...] | None, int]:
        """Return the classes of a training split.

        Raises:
            EvaluationError: When there is one class alone, or none of another is among the
                examples.
        """
        found, names = examples.classes(), examples.label_names
        count = max(len(names or ()), max(found) + 1)
        absent = sorted(set(range(count)) - set(found))
        if absent:
            told = [repr(names[i]) if names else str(i) for i in absent]
            raise EvaluationError(
                f"{examples.where} has no example of the classes {listed(told)}, and no head can "
                "be fitted for them",
                hint="raise the limit of train, or give a label map without them",
            )
        if count < 2:
            raise EvaluationError(
                f"{examples.where} has one class alone, and no head can be fitted",
                hint="give train with examples of every class",
            )
        return [float(label) for label in found], names, count

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of one batch, ``b``, or ``b x m`` with several metrics.

        For ``accuracy`` that is 1 where the class is right, else 0; for ``loss`` the negative log
        probability of the right class; for ``f1`` the predicted class.
        """
        logits, right = self.outputs(model, items), self.ready.targets[items]
        predicted = logits.argmax(-1)
        found = {
            "accuracy": (predicted == right).double(),
            "f1": predicted.double(),
            "loss": F.cross_entropy(logits.double(), right, reduction="none"),
            "entropy": prediction_entropy(logits),
        }
        table = torch.stack([found[name] for name in self._names], -1)
        # Of NaN there is a largest class too.
        table[~torch.isfinite(logits).all(-1)] = torch.nan
        return table.squeeze(-1) if len(self._names) == 1 else table

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return accuracy and loss as means; F1 as `macro_f1` says.

        Args:
            outcomes: As `score` returns them.
            items: Which examples they are of; by default all, in their order.
        """
        table = outcomes.unsqueeze(-1) if outcomes.dim() == 1 else outcomes
        right = self.ready.targets if items is None else self.ready.targets[items]
        return {
            metric.name: macro_f1(column, right) if metric.name == "f1" else mean_of(column, metric)
            for metric, column in zip(self.metrics, table.unbind(-1), strict=True)
        }


class TextClassification(_Classification):
    """Classification of texts; in a configuration ``kind: text_classification``.

    The head is the model's own (that of a task's expert, or the model's), a linear layer from a
    file, or one that is fitted once on the base's features of a training split and then kept.

    Args:
        data: The examples, with the roles ``text`` and ``label``; see
            :class:`~map_bo.evaluators.data.Data`.
        tokenizer: Folder or hub id of a tokenizer, or a tokenizer; by default that of the folder
            which the model was made from.
        metrics: ``accuracy``, ``f1`` (the mean over the classes), ``loss`` (cross-entropy, nats)
            and ``entropy`` (of the prediction, nats). With entropy alone no classes are read.
        head: None for the model's own head, a safetensors file with ``weight`` (classes x width)
            and ``bias``, or ``"fit"``.
        train: The examples that a head is fitted on; only with ``head="fit"``.
        pooling: ``mean``, ``cls`` or ``last`` hidden states below a frozen head; by default what
            the tokenizer's folder says (``1_Pooling/config.json``), else ``mean``.
        fit: ``logistic`` or ``ridge`` regression, on standardised features.
        penalty: How strongly the weights of a fitted head are drawn to 0; see `fit_head`.
        max_length: Longer texts are cut to so many tokens; by default to what the model reads.
        batch_size: Texts per forward pass.
        cache_dir: Folder above ``heads`` and ``tokens``, which are kept on disk; by default the
            user's cache, see `map_bo.cached.cache_root`.

    Raises:
        ConfigError: For settings that are not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        tokenizer: object = None,
        metrics: str | Sequence[str] = "accuracy",
        head: str | Path | None = None,
        train: Data | Mapping[str, Any] | str | None = None,
        pooling: Pooling | None = None,
        fit: FitMethod = "logistic",
        penalty: float = 10.0,
        max_length: int | None = None,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            metrics=metrics,
            roles=("text",),
            head=HeadSettings.of(head, train, pooling, fit, penalty),
            data=data,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            cache_dir=cache_dir,
        )


class TextPairs(_Classification):
    """Classification of pairs of texts, such as entailment; ``kind: text_pairs``.

    Everything is as in `TextClassification`, with the roles ``first``, ``second`` and ``label``;
    what is too long is cut from the longer text of a pair.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        tokenizer: object = None,
        metrics: str | Sequence[str] = "accuracy",
        head: str | Path | None = None,
        train: Data | Mapping[str, Any] | str | None = None,
        pooling: Pooling | None = None,
        fit: FitMethod = "logistic",
        penalty: float = 10.0,
        max_length: int | None = None,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            metrics=metrics,
            roles=("first", "second"),
            head=HeadSettings.of(head, train, pooling, fit, penalty),
            data=data,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            cache_dir=cache_dir,
        )
