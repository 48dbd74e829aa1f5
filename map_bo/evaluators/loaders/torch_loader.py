"""A model scored on any data loader: outcomes by a function, or by metrics of torchmetrics.

A loader is read once, when the evaluator is prepared, and its examples are kept. So one that
shuffles may be used as it is: its order is drawn then. What it may not be is without an end; where
it has no length, a ``limit`` is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric, check_metrics
from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line
from map_bo.evaluators.evaluator import device_of, evaluating, logits_of
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.loaders.batches import LABELS, LoadedBatches, call_with, in_order
from map_bo.evaluators.loaders.set_metrics import (
    SetMetric,
    declare,
    metric_from,
    outcomes_of,
    set_metrics,
)
from map_bo.evaluators.logits import LOGIT_METRICS, prediction_entropy
from map_bo.values import whole_number

__all__ = ["TorchLoader"]

Outcome = Callable[[Any, Any], Tensor]
"""From the model's output and the targets of a batch to one outcome, or ``m``, per example."""


class TorchLoader(ExampleEvaluator):
    """The kind ``torch``: a model scored on the batches of any torch data loader.

    A batch may be ``(inputs, ..., targets)``, called as ``model(inputs, ...)``; a mapping, such as
    a ``BatchEncoding``, called by keyword without its labels, which are the targets; or a tensor,
    which has no targets.

    Metrics of torchmetrics are used as they are. They get the logits, where the output has any, and
    the targets, all of them at once: the value is theirs. The outcome of an example is the metric
    of this example alone, where the metric is the mean of these (accuracy, losses); of others
    (F1, AUROC, correlations) it is the jackknife pseudo-value (Tukey, 1958), which says how much
    the value depends on the example. Pseudo-values are of the examples that were scored together;
    their mean is the metric of these, and the variance of that mean is the jackknife's. With more
    than 200 examples the jackknife leaves out groups, every 200th example together.

    Args:
        loader: A data loader, or a function that returns one and is called once. Any iterable of
            batches will do that begins anew each time, or has a ``limit``.
        outcome: A function from outputs and targets to one outcome per example, or ``m``; a metric
            of torchmetrics, a collection or a mapping of some; a class of such metrics, made with
            ``arguments``; or one of ``accuracy``, ``probability`` (of the right class),
            ``cross_entropy`` (nats, to minimise), ``squared_error``, ``absolute_error``, and
            ``entropy`` (of the prediction, nats), which needs no targets.
        metrics: What the outcomes are: names, `Metric`, or fields of `Metric`. Without, a function
            gives one proportion to maximise, and metrics of torchmetrics say it themselves.
        arguments: Keyword arguments of a class given as ``outcome``.
        predictions: From the model's output to what torchmetrics takes; its logits by default.
        labels: Key of the labels in batches that are mappings; ``labels`` or ``label`` by default.
        limit: Use at most so many examples, the first.
        batch_size: Examples per forward pass; by default those of the loader's batches.
        seed: Seed of what the loader does by chance.

    Raises:
        ConfigError: When a setting is not possible.
    """

    def __init__(
        self,
        *,
        loader: Iterable[Any] | Callable[..., Any],
        outcome: str | Outcome | SetMetric | Mapping[str, SetMetric] = "accuracy",
        metrics: Sequence[str | Metric | Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        predictions: Callable[[Any], Tensor] | None = None,
        labels: str | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=1 if batch_size is None else batch_size)
        if isinstance(loader, str) or not (callable(loader) or isinstance(loader, Iterable)):
            raise ConfigError(
                f"loader must be a data loader or a function that returns one, got {loader!r:.80}",
                hint="give a torch.utils.data.DataLoader; in a configuration, module:function",
            )
        self._loader = loader
        self._own_batches = batch_size is None
        self._labels = LABELS if labels is None else (labels,)
        self._limit = None if limit is None else whole_number("limit", limit, least=1)
        self._seed = whole_number("seed", seed, least=0)
        self._predictions = predictions
        given = _made(outcome, arguments)
        self._sets = set_metrics(given)
        self._function: Outcome | None = None
        if self._sets is None:
            self._function, default = _function(given)
            self._metrics = check_metrics(
                [default] if metrics is None else list(map(metric_from, metrics))
            )
        else:
            self._metrics = declare(self._sets, metrics)
        self._batches: LoadedBatches | None = None
        self._digest = ""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics."""
        return self._metrics

    @property
    def size(self) -> int:
        """The number of examples."""
        return self._known.size

    @property
    def strata(self) -> Tensor | None:
        """The class of each example, where the targets are one integer per example."""
        found = self._known.targets
        whole = found is not None and not (found.is_floating_point() or found.is_complex())
        return found if found is not None and whole and len(found) == self.size else None

    @property
    def means(self) -> tuple[bool, ...]:
        """Those of a function; those of torchmetrics may be something else."""
        return (self._sets is None,) * len(self.metrics)

    @property
    def divisible(self) -> bool:
        """Not with torchmetrics: the outcome of an example may depend on the others."""
        return self._sets is None

    @property
    def digest(self) -> str:
        """A digest of the examples and of the names of the metrics."""
        _ = self._known
        return self._digest

    @property
    def _known(self) -> LoadedBatches:
        return self.require_ready(self._batches, "the loader has not been read")

    def prepare(self, model: nn.Module) -> None:
        """Read the loader, once, and score a batch of it.

        Raises:
            EvaluationError: When it cannot be read, or does not fit the model.
        """
        if self._batches is None:
            loaded = LoadedBatches.read(
                self._loader, labels=self._labels, limit=self._limit, seed=self._seed
            )
            if self._own_batches:
                self.batch_size = loaded.largest
            names = ",".join(metric.name for metric in self.metrics)
            self._digest = hashlib.sha256(f"{loaded.digest} {names}".encode()).hexdigest()
            self._batches = loaded
            self._loader = ()  # it may hold what cannot be sent to other processes
        loaded = self._batches
        if loaded.targets is None and (self._sets is not None or self._function in _NEED_TARGETS):
            raise EvaluationError(
                "the batches of the loader have no targets",
                hint="give (inputs, targets), or a mapping with labels; labels='KEY' says which",
            )
        first = torch.arange(min(self.batch_size, loaded.size))
        with evaluating(model), torch.inference_mode():
            if self._sets is None:
                self._checked(self.outcomes(model, first), len(first))
            else:
                self._of_set([self._predict(model, first)])
            if self._function in _CLASSES:
                self._check_classes(model, first[:1])

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return ``b`` outcomes, or ``b x m``."""
        if self._sets is not None:
            return self._of_set([self._predict(model, items)])
        function, n = self._function, len(items)
        assert function is not None
        found: list[tuple[Tensor, Tensor]] = []
        for places, inputs, targets in self._known.parts(items, device_of(model)):
            part = function(call_with(model, inputs), targets)
            if not isinstance(part, Tensor) or part.shape[:1] != (len(places),):
                told = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise EvaluationError(
                    f"the outcome function returned {told} for {len(places)} examples",
                    hint="return a tensor with one outcome per example, or m",
                )
            found.append((places, part.double().cpu()))
        return in_order(found, n)

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each example; see the class for those of torchmetrics."""
        if self._sets is None:
            return super().score(model, items)
        parts = self.each_batch(model, items, lambda batch: self._predict(model, batch))
        return self._checked(self._of_set(parts), len(items)).clone()

    def _predict(self, model: nn.Module, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and targets of a batch, on the CPU."""
        found: list[tuple[Tensor, Tensor]] = []
        wanted: list[tuple[Tensor, Tensor]] = []
        for places, inputs, targets in self._known.parts(items, device_of(model)):
            output = call_with(model, inputs)
            part = logits_of(output) if self._predictions is None else self._predictions(output)
            if not isinstance(targets, Tensor):
                raise EvaluationError(
                    f"the targets are a {type(targets).__name__}, and torchmetrics takes tensors",
                    hint="give an outcome function",
                )
            if part.dim() == targets.dim() + 1 and part.shape[-1] == 1:
                part = part.squeeze(-1)  # a regression head has one output
            part = part.float() if part.is_floating_point() else part
            found.append((places, part.cpu()))
            wanted.append((places, targets.cpu()))
        return in_order(found, len(items)), in_order(wanted, len(items))

    def _of_set(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        assert self._sets is not None
        preds, targets = (torch.cat(side) for side in zip(*parts, strict=True))
        columns = [outcomes_of(one, preds, targets, name) for name, one in self._sets.items()]
        return columns[0] if len(columns) == 1 else torch.stack(columns, -1)

    def _check_classes(self, model: nn.Module, items: Tensor) -> None:
        """Refuse targets that are no classes of the model."""
        loaded = self._known
        (_, inputs, _), *_ = loaded.parts(items, device_of(model))
        width = logits_of(call_with(model, inputs)).shape[-1]
        targets = loaded.targets
        assert targets is not None
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= width:
            raise EvaluationError(
                f"the labels go from {low} to {high}, and the model has {width} classes",
                hint="give class indices from 0; the head or the data are of another task",
            )


# What a function gives, and the functions that have names.


def _probability(output: Any, targets: Tensor) -> Tensor:
    chosen = logits_of(output).float().softmax(-1)
    return chosen.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)


def _right(output: Any, targets: Tensor) -> Tensor:
    logits = logits_of(output)
    right = (logits.argmax(-1) == targets).double()
    # Of NaN there is a largest class too.
    return right.masked_fill(~torch.isfinite(logits).all(-1), torch.nan)


def _entropy(output: Any, targets: object) -> Tensor:
    return prediction_entropy(logits_of(output))


def _cross_entropy(output: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_of(output).float(), targets.long(), reduction="none")


def _error(output: Any, targets: Tensor) -> Tensor:
    values = logits_of(output).float()
    if values.dim() == targets.dim() + 1 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    if values.shape != targets.shape:
        raise EvaluationError(
            f"the model gives {tuple(values.shape)} and the targets are {tuple(targets.shape)}",
            hint="give one target for each output",
        )
    difference = values - targets.float()
    return difference if difference.dim() == 1 else difference.flatten(1)


def _squared_error(output: Any, targets: Tensor) -> Tensor:
    error = _error(output, targets).square()
    return error if error.dim() == 1 else error.mean(-1)


def _absolute_error(output: Any, targets: Tensor) -> Tensor:
    error = _error(output, targets).abs()
    return error if error.dim() == 1 else error.mean(-1)


_NAMED: Mapping[str, tuple[Outcome, Metric]] = {
    "accuracy": (_right, Metric("accuracy")),
    "probability": (_probability, Metric("probability")),
    "cross_entropy": (_cross_entropy, Metric("cross_entropy", "min", "loss")),
    "squared_error": (_squared_error, Metric("squared_error", "min", "loss")),
    "entropy": (_entropy, LOGIT_METRICS["entropy"]),
    "absolute_error": (_absolute_error, Metric("absolute_error", "min", "loss")),
}
_NEED_TARGETS = tuple(function for function, _ in _NAMED.values() if function is not _entropy)
_CLASSES = (_right, _probability, _cross_entropy)


def _made(outcome: object, arguments: Mapping[str, Any] | None) -> object:
    """Return an outcome; where it is a class, one made with the arguments."""
    if isinstance(outcome, type):
        try:
            return outcome(**(arguments or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"outcome {outcome.__name__} cannot be made: {first_line(error)}",
                hint="give what it takes as arguments={...}",
            ) from error
    if arguments:
        raise ConfigError(
            "arguments were given, and the outcome is no class",
            hint="leave arguments out, or name a class of metrics",
        )
    return outcome


def _function(outcome: object) -> tuple[Outcome, Metric]:
    if isinstance(outcome, str):
        if outcome not in _NAMED:
            raise ConfigError(
                f"there is no outcome {outcome!r}", hint=did_you_mean(outcome, _NAMED)
            )
        return _NAMED[outcome]
    if not callable(outcome):
        raise ConfigError(
            f"outcome must be a function, a metric or a name, got a {type(outcome).__name__}",
            hint=f"give a function of outputs and targets, or one of {', '.join(_NAMED)}",
        )
    return outcome, Metric("outcome")
