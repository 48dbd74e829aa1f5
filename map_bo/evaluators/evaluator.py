"""Evaluators: what is measured on a merged model, how sure that is, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from map_bo.data import Metric, check_metrics
from map_bo.errors import DataError, EvaluationError, MapBoError, MergeError, did_you_mean
from map_bo.evaluators.world import stops_the_process

__all__ = [
    "Accuracy",
    "Evaluator",
    "MeanLoss",
    "MeanProbability",
    "Measurement",
    "accuracy",
    "binomial_variance",
    "check_names",
    "entry_of",
    "mean_loss",
    "mean_probability",
    "measure",
    "metrics_of",
    "select_metrics",
]

_HINT = "return a float, or map_bo.Measurement(value, variance=..., count=...)"


@dataclass(frozen=True)
class Measurement:
    """One measured metric and the noise that it carries.

    Attributes:
        value: The metric, in its own unit.
        variance: Variance of the measurement noise (unit squared); 0 where the value is known
            to be exact, None where it is unknown. For a proportion with a ``count`` it may be
            left out: it follows from the count.
        count: Number of examples that the value was averaged over.

    Raises:
        EvaluationError: When the value is not finite, or variance or count cannot be.
    """

    value: float
    variance: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "value", _number(self.value, "a measurement's value"))
        if not math.isfinite(self.value):
            raise EvaluationError(
                f"a measurement's value must be finite, got {self.value}", hint=_HINT
            )
        if self.variance is not None:
            put(self, "variance", _number(self.variance, "a measurement's variance"))
            if not (math.isfinite(self.variance) and self.variance >= 0):
                raise EvaluationError(
                    f"a measurement's variance must not be negative, got {self.variance}",
                    hint="give a finite number, or None where it is unknown",
                )
        if self.count is not None:
            count = _number(self.count, "a measurement's count")
            if not (count >= 1 and count.is_integer()):
                raise EvaluationError(
                    f"a measurement's count must be a whole number from 1, got {self.count}",
                    hint="give the number of examples, or None where nothing was counted",
                )
            put(self, "count", int(count))


Evaluator = Callable[[nn.Module], float | Measurement]
"""Measures one metric on a model. The model is in evaluation mode; gradients are not switched
off. What it does to the model, to torch and to the process is undone afterwards."""


def measure(name: str, evaluator: Evaluator, model: nn.Module) -> Measurement:
    """Call an evaluator and check what it returns.

    Args:
        name: The evaluator's name, for errors.
        evaluator: Returns a real number (Python, numpy, or a tensor or array without dimensions)
            or a `Measurement`.
        model: The model to measure.

    Raises:
        EvaluationError: When the evaluator raises (``SystemExit`` of a ``sys.exit()`` as well;
            what it raised is the cause), or returns anything else, NaN or infinity. What is meant
            for the process, such as ``KeyboardInterrupt``, passes through.
    """
    try:
        result = evaluator(model)
    except BaseException as error:
        if stops_the_process(error):
            raise
        text, hint = str(error), None
        if isinstance(error, MapBoError):
            text, hint = error.message, error.hint
        reason = f"evaluator {name!r} raised {type(error).__name__}: {text}"
        raise EvaluationError(
            reason.rstrip(": "), hint=hint or "call it on the base model to find out why"
        ) from error
    if isinstance(result, Measurement):
        return result
    value = _number(result, f"evaluator {name!r}", verb="returned")
    if not math.isfinite(value):
        raise EvaluationError(f"evaluator {name!r} returned {value}", hint=_HINT)
    return Measurement(value)


def binomial_variance(
    value: float, count: float, *, lower: float = 0.0, upper: float = 1.0
) -> float:
    """Return the variance of a proportion in ``[lower, upper]`` measured on ``count`` examples.

    The proportion is smoothed, ``p = (k + 1/2) / (n + 1)`` with ``k`` successes among ``n``
    examples, and the variance is ``p (1 - p) / (n + 1)``. So it is never 0, also where all
    examples were right: that all of 100 were right does not say that no error is possible.
    """
    width = upper - lower
    p = (count * (value - lower) / width + 0.5) / (count + 1)
    return width**2 * p * (1 - p) / (count + 1)


def _number(value: Any, what: str, *, verb: str = "is") -> float:
    if isinstance(value, Tensor | np.ndarray):
        if value.ndim:
            kind = "tensor" if isinstance(value, Tensor) else "array"
            raise EvaluationError(
                f"{what} {verb} {kind} of shape {tuple(value.shape)}",
                hint="average it to one number",
            )
        value = value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        text = "None" if value is None else f"a {type(value).__name__}"
        raise EvaluationError(f"{what} {verb} {text}, not a number", hint=_HINT)
    return float(value)


@dataclass(frozen=True, eq=False)
class _Classification:
    """Labelled examples that a classifier is scored on, batch by batch."""

    inputs: Tensor
    labels: Tensor
    batch_size: int = 256

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels) or not len(self.labels):
            raise EvaluationError(
                f"there must be one label per input, got {len(self.inputs)} inputs and "
                f"{len(self.labels)} labels",
                hint="give as many labels as inputs, and at least one",
            )
        if self.labels.dim() != 1 or self.labels.is_floating_point():
            raise EvaluationError(
                f"labels must be one integer per example, got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}",
                hint="give class indices",
            )
        if self.batch_size < 1:
            raise EvaluationError(
                f"batch_size must be at least 1, got {self.batch_size}",
                hint="give the number of examples per forward pass",
            )

    def _batches(self, model: nn.Module, *, graph: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits (``b x classes``, float32) and labels (``b``) of each batch."""
        device = next((tensor.device for tensor in model.parameters()), self.inputs.device)
        with _evaluating(model):
            for start in range(0, len(self.labels), self.batch_size):
                batch = slice(start, start + self.batch_size)
                # Not around the yield: a generator's modes would reach whoever consumes it.
                with torch.inference_mode(not graph), torch.set_grad_enabled(graph):
                    output = model(self.inputs[batch].to(device))
                    logits = getattr(output, "logits", output).float()
                if not bool(torch.isfinite(logits).all()):
                    raise EvaluationError(
                        "the model's outputs hold NaN or infinity",
                        hint="these coefficients break the model; narrow the bounds if many do",
                    )
                yield logits, self.labels[batch].to(device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Accuracy(_Classification):
    """The share of examples classified right; made by `accuracy`."""

    def __call__(self, model: nn.Module) -> Measurement:
        """Return the accuracy in [0, 1] with the number of examples."""
        right = sum(
            int((logits.argmax(-1) == labels).sum()) for logits, labels in self._batches(model)
        )
        return Measurement(right / len(self.labels), count=len(self.labels))


class _MeanOverExamples(_Classification):
    """A mean over examples of something differentiable in the weights.

    It is a :class:`~map_bo.evaluators.differentiable.Differentiable` evaluator.
    """

    def __call__(self, model: nn.Module) -> Measurement:
        """Return the mean, the variance of that mean, and the number of examples."""
        parts = [self._each(*batch).double().cpu() for batch in self._batches(model)]
        return self.summary(torch.cat(parts))

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield, batch by batch, the value of each example (``b``) with its graph."""
        for batch in self._batches(model, graph=True):
            yield self._each(*batch)

    def summary(self, values: Tensor) -> Measurement:
        """Return the measurement that the values (``n``) of all examples make."""
        n = len(values)
        variance = float(values.var()) / n if n > 1 else None
        return Measurement(float(values.mean()), variance=variance, count=n)

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class MeanLoss(_MeanOverExamples):
    """The mean cross-entropy in nats; made by `mean_loss`."""

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")


class MeanProbability(_MeanOverExamples):
    """The mean probability of the right class; made by `mean_probability`."""

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)

    def summary(self, values: Tensor) -> Measurement:
        """Return mean and variance; no count, as the values are not successes and failures."""
        seen = super().summary(values)
        return Measurement(seen.value, variance=seen.variance)


def accuracy(inputs: Tensor, labels: Tensor, batch_size: int = 256) -> Accuracy:
    """Return an evaluator: the share of examples that a classifier gets right.

    The model runs in evaluation mode without gradients, and its mode is put back. Its output is
    the logits, or has them as ``.logits``.

    Args:
        inputs: ``n x ...`` model inputs; they are moved to the model's device batch by batch.
        labels: ``n`` class indices.
        batch_size: Examples per forward pass.

    Raises:
        EvaluationError: When inputs and labels do not fit; when called, for outputs that are
            not finite.
    """
    return Accuracy(inputs, labels, batch_size)


def mean_loss(inputs: Tensor, labels: Tensor, batch_size: int = 256) -> MeanLoss:
    """Return an evaluator: the mean cross-entropy of a classifier, in nats; smaller is better.

    Give the problem ``Metric(name, direction="min", kind="loss")`` with it. Otherwise as
    `accuracy`.
    """
    return MeanLoss(inputs, labels, batch_size)


def mean_probability(inputs: Tensor, labels: Tensor, batch_size: int = 256) -> MeanProbability:
    """Return an evaluator: the mean probability that a classifier gives to the right class.

    A proportion in [0, 1] to maximise, smooth where an accuracy has steps. Otherwise as
    `accuracy`.
    """
    return MeanProbability(inputs, labels, batch_size)


def metrics_of(
    evaluators: Mapping[str, Evaluator], metrics: Sequence[Metric] | None
) -> tuple[Metric, ...]:
    """Return one metric for each evaluator, or raise when names differ."""
    if metrics is None:
        return tuple(Metric(name, resampling="same") for name in evaluators)
    given = check_metrics(metrics)
    names = {metric.name for metric in given}
    if names != set(evaluators):
        raise DataError(
            f"metrics are {', '.join(sorted(names))}; evaluators are "
            f"{', '.join(sorted(evaluators))}",
            hint="give one metric for each evaluator, with its name",
        )
    # An evaluator is given a model and no source of chance, so it has examples of its own to use.
    return tuple(
        replace(metric, resampling="same") if metric.resampling is None else metric
        for metric in given
    )


def select_metrics(metrics: Sequence[Metric], names: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics of these names, in their order.

    Raises:
        DataError: When there is no such metric.
    """
    known = {metric.name: metric for metric in metrics}
    for name in names:
        if name not in known:
            raise DataError(f"there is no metric {name!r}", hint=did_you_mean(name, known))
    return tuple(known[name] for name in names)


def entry_of(seen: Measurement, metric: Metric) -> tuple[float, float, float]:
    """Return value, variance and count as `Observations` keeps them, or raise out of bounds."""
    low = -torch.inf if metric.lower is None else metric.lower
    high = torch.inf if metric.upper is None else metric.upper
    slack = 1e-6 * max([1.0, *(abs(x) for x in (low, high) if math.isfinite(x))])
    if not low - slack <= seen.value <= high + slack:
        raise EvaluationError(
            f"evaluator {metric.name!r} returned {seen.value}, outside the metric's bounds "
            f"[{low}, {high}]",
            hint="give the metric its own kind and bounds: metrics=[Metric(name, ...)]",
        )
    value = min(max(seen.value, low), high)
    variance = torch.nan if seen.variance is None else seen.variance
    count = torch.nan
    if seen.count is not None and metric.kind == "proportion":
        count = float(seen.count)
        if seen.variance is None:
            variance = binomial_variance(value, count, lower=low, upper=high)
    return value, variance, count


def check_names(given: object, kind: str) -> None:
    """Refuse what is not a mapping from names to experts or to evaluators."""
    error = MergeError if kind == "expert" else EvaluationError
    if not isinstance(given, Mapping):
        raise error(
            f"{kind}s must be a mapping, got a {type(given).__name__}",
            hint=f"give a mapping from {kind} names to {kind}s",
        )
    if not given:
        raise error(f"there are no {kind}s", hint=f"give at least one {kind}")
    for name, value in given.items():
        if not isinstance(name, str) or not name.strip():
            raise error(
                f"the name of an {kind} must be text, got {name!r}",
                hint="give it a name that is not empty",
            )
        if kind == "evaluator" and not callable(value):
            raise error(
                f"evaluator {name!r} is a {type(value).__name__}, which cannot be called",
                hint="give a function that takes the model and returns a number",
            )
