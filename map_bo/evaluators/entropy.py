"""The mean entropy of predictions, where labels are missing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.evaluators.data import Data
from map_bo.evaluators.evaluator import ReadsHead
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.images.classification import ImageClassification
from map_bo.evaluators.images.pixels import Processor
from map_bo.evaluators.images.zero_shot import ZeroShot
from map_bo.evaluators.loaders.torch_loader import TorchLoader
from map_bo.evaluators.text.classification import TextClassification, TextPairs
from map_bo.evaluators.text.heads import FitMethod
from map_bo.evaluators.text.pooling import Pooling
from map_bo.values import whole_number

__all__ = ["Entropy"]

Inputs = Literal["text_classification", "text_pairs", "images", "zero_shot", "torch"]

_SLACK = 1e-6

_FOLDERS = ("tokenizer", "processor")  # which the base's folder stands for where they are used


class Entropy(ExampleEvaluator):
    """The mean entropy of predictions on unlabelled inputs; ``kind: entropy``.

    It is in nats, from 0 (every prediction is certain) to the logarithm of the number of classes,
    and less is better: merged models that are sure of their predictions are more often right. It is
    what AdaMerging minimises (Yang et al., 2024, arXiv 2310.02575), here as a metric of its own. A
    model that always predicts the same class has no entropy either, so it stands in for the
    accuracy of models near the experts, not for that of any model.

    The settings are those of the kind whose inputs and classifier it uses, without its metrics.

    Args:
        of: That kind: ``text_classification``, ``text_pairs``, ``images``, ``zero_shot``, or
            ``torch``. By default ``torch`` where a loader is given.
        data: The inputs; no labels are read. Not for ``torch``.
        loader: A data loader, or a function that returns one, for ``torch`` alone; targets that its
            batches have are left out of account.
        classes: How many classes there are, which bounds the metric above; for ``zero_shot`` their
            names. Without, the metric has no bound above.
        tokenizer: See the kind.
        processor: See the kind.
        head: See the kind.
        train: See the kind; a head is fitted to labels.
        pooling: See the kind.
        fit: See the kind.
        penalty: See the kind.
        max_length: See the kind.
        templates: See the kind.
        prototypes: See the kind.
        labels: See the kind: the key of the labels in the batches of a loader.
        limit: See the kind ``torch``; data have a limit of their own.
        batch_size: Examples per forward pass.
        cache_dir: See the kind.

    Raises:
        ConfigError: For settings that are not possible, or that the kind does not have.
    """

    def __init__(
        self,
        *,
        of: Inputs | None = None,
        data: Data | Mapping[str, Any] | str | None = None,
        loader: Iterable[Any] | Callable[..., Any] | None = None,
        classes: int | Sequence[str] | None = None,
        tokenizer: object = None,
        processor: Processor | None = None,
        head: str | Path | None = None,
        train: Data | Mapping[str, Any] | str | None = None,
        pooling: Pooling | None = None,
        fit: FitMethod | None = None,
        penalty: float | None = None,
        max_length: int | None = None,
        templates: Sequence[str] | str | None = None,
        prototypes: Literal["auto", "base", "candidate"] | None = None,
        labels: str | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if of is None and loader is not None:
            of = "torch"
        if of not in get_args(Inputs):
            kinds = ", ".join(get_args(Inputs))
            raise ConfigError(
                f"of must be one of {kinds}, got {of!r}",
                hint="say whose inputs and classifier are used, such as of='zero_shot'"
                if of is None
                else did_you_mean(of, get_args(Inputs)),
            )
        settings = {
            "data": data,
            "loader": loader,
            "tokenizer": tokenizer,
            "processor": processor,
            "head": head,
            "train": train,
            "pooling": pooling,
            "fit": fit,
            "penalty": penalty,
            "max_length": max_length,
            "templates": templates,
            "prototypes": prototypes,
            "labels": labels,
            "limit": limit,
            "batch_size": batch_size,
            "cache_dir": cache_dir,
        }
        self._classes: int | None = None
        if isinstance(classes, int):
            self._classes = whole_number("classes", classes, least=2)
        elif classes is not None:
            if isinstance(classes, str) or of != "zero_shot":
                raise ConfigError(
                    f"classes must be their number, got {classes!r:.80}",
                    hint="such as classes=10; names are for of='zero_shot'",
                )
            settings["classes"] = classes
            self._classes = len(classes)
        self._task = _task(
            str(of), {name: one for name, one in settings.items() if one is not None}
        )
        super().__init__(batch_size=self._task.batch_size)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The entropy, in nats, to minimise."""
        if self._classes is None:
            return (Metric("entropy", "min", "loss"),)
        return (Metric("entropy", "min", lower=0.0, upper=math.log(self._classes)),)

    @property
    def reads_head(self) -> bool:
        """Whether the model's own head is scored, and not a frozen one."""
        return isinstance(self._task, ReadsHead) and self._task.reads_head

    @property
    def size(self) -> int:
        """The number of inputs."""
        return self._task.size

    @property
    def strata(self) -> Tensor | None:
        """What the kind that is used knows of labels."""
        return self._task.strata

    @property
    def digest(self) -> str:
        """A digest of the inputs and of the classifier's fixed parts."""
        return self._task.digest

    @property
    def repeats(self) -> bool:
        """Whether the kind that is used does."""
        return self._task.repeats

    def prepare(self, model: nn.Module) -> None:
        """Get ready as the kind does, without labels.

        Raises:
            EvaluationError: As the kind says; when the model has more classes than were told.
        """
        self._task.prepare(model)
        self.batch_size = self._task.batch_size
        self._check(self._task.score(model, torch.zeros(1, dtype=torch.long)))

    def check_data(self) -> None:
        """Read the inputs; see the kind."""
        self._task.check_data()

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the entropy of each prediction: ``n``, float64."""
        found = self._task.score(model, items)
        self._check(found)
        return found

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the entropy of each prediction of a batch: ``b``."""
        return self._task.outcomes(model, items)

    def _check(self, found: Tensor) -> None:
        """Refuse more than so many classes can have."""
        if self._classes is None:
            return
        most = math.log(self._classes)
        if float(found.max()) > most + _SLACK:
            raise EvaluationError(
                f"an entropy is {float(found.max()):.4g} nats, and {self._classes} classes have at "
                f"most {most:.4g}",
                hint="give the number of the model's classes, or leave classes out",
            )


def _task(of: str, settings: Mapping[str, Any]) -> ExampleEvaluator:
    """Return the evaluator whose inputs and classifier are used, with entropy as its metric."""
    kinds: dict[str, type[ExampleEvaluator]] = {
        "text_classification": TextClassification,
        "text_pairs": TextPairs,
        "images": ImageClassification,
        "zero_shot": ZeroShot,
        "torch": TorchLoader,
    }
    kind: Any = kinds[of]  # each takes settings of its own
    known = set(inspect.signature(kind).parameters)
    ready = {name: one for name, one in settings.items() if name in known or name not in _FOLDERS}
    unknown = sorted(set(ready) - known)
    if unknown:
        raise ConfigError(
            f"the kind {of} has no setting {unknown[0]!r}",
            hint=did_you_mean(unknown[0], sorted(known - {"metrics", "outcome"})),
        )
    needed = "loader" if of == "torch" else "data"
    if needed not in ready:
        raise ConfigError(f"of={of!r} needs {needed}", hint=f"give {needed}")
    if of == "torch":
        return TorchLoader(outcome="entropy", **ready)
    made: ExampleEvaluator = kind(metrics="entropy", **ready)
    return made
