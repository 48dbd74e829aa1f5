"""Scoring a model example by example: what all ready-made evaluators share.

An evaluator of this kind owns its examples. `ExampleEvaluator.score` gives the outcome of each of
those that it is asked for, in batches of a fixed size, so that the outcomes of two models on the
same examples can be compared one by one; calling it scores all of them and gives the metrics with
their noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement, evaluating
from map_bo.values import whole_number

__all__ = [
    "ExampleEvaluator",
    "ProgressListener",
    "check_items",
    "listening",
    "mean_of",
    "ratio_estimate",
    "tell_progress",
]

ProgressListener = Callable[[int, int], None]
"""Is told how many examples have been scored, and of how many."""

T = TypeVar("T")

_listener: ContextVar[ProgressListener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: ProgressListener) -> Iterator[None]:
    """Tell a listener of the examples that are scored inside, after each batch."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_progress(done: int, of: int) -> None:
    """Tell the listener, where there is one, how many examples have been scored."""
    listener = _listener.get()
    if listener is not None:
        listener(done, of)


def check_items(items: Tensor, size: int) -> Tensor:
    """Return indices of examples, on the CPU, or refuse them.

    Args:
        items: ``n`` indices.
        size: The number of examples.

    Raises:
        EvaluationError: When there are none, or one is not possible.
    """
    items = torch.as_tensor(items, device="cpu")
    if items.dim() != 1 or not len(items) or items.is_floating_point():
        raise EvaluationError(
            f"items must be one or more indices, got {items.dtype} of shape {tuple(items.shape)}",
            hint=f"give integers from 0 to {size - 1}",
        )
    if not (0 <= int(items.min()) and int(items.max()) < size):
        raise EvaluationError(
            f"there are {size} examples, got items from {int(items.min())} to {int(items.max())}",
            hint=f"give integers from 0 to {size - 1}",
        )
    return items


class ExampleEvaluator(ABC):
    """An evaluator that scores its examples one by one.

    It is an :class:`~map_bo.evaluators.evaluator.ItemEvaluator`, it declares its metrics, and it
    prepares: what is read, tokenised or fitted is so once, before anything is evaluated. Making one
    reads nothing, so that everything that does not fit is found together.

    Args:
        batch_size: Examples per forward pass. It is fixed because outcomes in reduced precision
            depend on it.

    Raises:
        ConfigError: When the batch size is no whole number from 1.
    """

    _repeats: bool = True

    def __init__(self, *, batch_size: int = 32) -> None:
        self.batch_size = whole_number("batch_size", batch_size, least=1)

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, under names of the evaluator's own; known before `prepare`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of examples.

        Raises:
            EvaluationError: Before `prepare`.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of the examples and of whatever else decides the outcomes, such as a head.

        Raises:
            EvaluationError: Before `prepare`.
        """

    @property
    def strata(self) -> Tensor | None:
        """The label of each example, ``size`` integers; None where labels are not known.

        A part of the examples is drawn so that it holds each label in about its share.

        Raises:
            EvaluationError: Before `prepare`.
        """
        return None

    @property
    def means(self) -> tuple[bool, ...]:
        """Whether each metric is the mean of its outcomes.

        Not so where `summary` is another than that of this class, unless it is said.
        """
        plain = type(self).summary is ExampleEvaluator.summary
        return (plain,) * len(self.metrics)

    @property
    def divisible(self) -> bool:
        """Whether the metrics can be measured on a part of the examples."""
        return True

    @property
    def repeats(self) -> bool:
        """Whether the same weights always have the same outcomes; false where times are measured.

        Only then may measurements be kept for later runs.
        """
        return self._repeats

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Get ready, once; see :class:`~map_bo.evaluators.evaluator.Prepares`.

        Args:
            model: The model with the weights of the base.

        Raises:
            EvaluationError: When the examples cannot be read or do not fit the model.
        """

    @staticmethod
    def require_ready(found: T | None, said: str) -> T:
        """Return what `prepare` has found, or refuse what needs it.

        Args:
            found: What it has found; None before.
            said: What is lacking, such as "the texts have not been read".

        Raises:
            EvaluationError: Before `prepare`.
        """
        if found is None:
            raise EvaluationError(
                said, hint="call prepare(model) of the evaluator on the base first"
            )
        return found

    def check_data(self) -> None:  # noqa: B027  # most have data, and some have none
        """Read the examples alone, where there is no model to get ready with.

        So what is wrong with the data is said beside what is wrong with the models.

        Raises:
            EvaluationError: When the examples cannot be read.
        """

    @abstractmethod
    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of one batch.

        Args:
            model: The model, in evaluation mode and without gradients.
            items: ``b`` indices of examples, at most ``batch_size``.

        Returns:
            ``b``, or ``b x m`` with several metrics.
        """

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each example: ``n``, or ``n x m`` with ``m > 1`` metrics, float64.

        Args:
            model: The model; its mode is put back.
            items: ``n`` indices of examples.

        Raises:
            EvaluationError: For an index that is not possible, and outcomes that are not finite.
        """
        parts = self.each_batch(
            model, items, lambda batch: self._checked(self.outcomes(model, batch), len(batch))
        )
        return torch.cat(parts).clone()  # not an inference tensor

    def each_batch(
        self, model: nn.Module, items: Tensor, function: Callable[[Tensor], T]
    ) -> list[T]:
        """Return what a function returns for each batch, and tell the listener how far it is.

        Args:
            model: The model; it is in evaluation mode meanwhile, and gradients are off.
            items: ``n`` indices of examples.
            function: Called with the indices of each batch in turn, at most ``batch_size``.

        Raises:
            EvaluationError: For an index that is not possible.
        """
        items = check_items(items, self.size)
        parts: list[T] = []
        with evaluating(model), torch.inference_mode():
            for start in range(0, len(items), self.batch_size):
                parts.append(function(items[start : start + self.batch_size]))
                tell_progress(min(start + self.batch_size, len(items)), len(items))
        return parts

    def _checked(self, outcomes: Tensor, n: int) -> Tensor:
        """Return the outcomes of ``n`` examples in float64 on the CPU, or refuse them."""
        part = outcomes.double().cpu()
        wanted = (n,) if len(self.metrics) == 1 else (n, len(self.metrics))
        if part.shape != wanted:
            raise EvaluationError(
                f"the outcomes of {n} examples have shape {tuple(part.shape)}",
                hint=f"return {' x '.join(map(str, wanted))}",
            )
        if not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part)).reshape(n, -1).any(-1).sum())
            raise EvaluationError(
                f"the outcomes of {bad} of {n} examples are NaN or infinite",
                hint="these coefficients break the model; narrow the bounds if many do",
            )
        return part

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return what outcomes make, by the evaluator's own names of its metrics.

        Each metric is the mean over the examples, with the variance of that mean; a proportion of
        right and wrong answers has its count in place of it.

        Args:
            outcomes: As `score` returns them.
            items: The examples that they belong to; None for all of them in order.
        """
        table = outcomes.unsqueeze(-1) if outcomes.dim() == 1 else outcomes
        return {
            metric.name: mean_of(column, metric)
            for metric, column in zip(self.metrics, table.unbind(-1), strict=True)
        }

    def __call__(self, model: nn.Module) -> Mapping[str, Measurement]:
        """Score all examples; return the measurements by the evaluator's own names."""
        return self.summary(self.score(model, torch.arange(self.size)))


def mean_of(outcomes: Tensor, metric: Metric) -> Measurement:
    """Return the mean of ``n`` outcomes as a measurement of a metric."""
    n = len(outcomes)
    value = float(outcomes.mean())
    right_or_wrong = all(one in (metric.lower, metric.upper) for one in set(outcomes.tolist()))
    if metric.kind == "proportion" and right_or_wrong:
        return Measurement(value, count=n)
    variance = float(outcomes.var()) / n if n > 1 else None
    if metric.kind == "proportion":  # a count would say that outcomes are right or wrong
        return Measurement(value, variance=variance)
    return Measurement(value, variance=variance, count=n)


def ratio_estimate(totals: Tensor, sizes: Tensor) -> tuple[float, float | None]:
    """Return the ratio of two sums over ``n`` units, and the variance of that ratio.

    The ratio is ``R = sum(y) / sum(x)``, and its variance ``n / (n - 1) * sum((y - R x)^2) /
    sum(x)^2``: the ratio estimator (Cochran 1977, Sampling Techniques, equation 6.13, without the
    correction for finite populations). The units are what is sampled independently: documents, not
    their tokens.

    Args:
        totals: ``n`` sums ``y``, such as the loss of all tokens of a document.
        sizes: ``n`` sizes ``x``, such as the number of those tokens.

    Returns:
        The ratio; its variance, None of a single unit.
    """
    n, size = len(totals), sizes.sum()
    ratio = totals.sum() / size
    if n < 2:
        return float(ratio), None
    spread = (totals - ratio * sizes).square().sum()
    return float(ratio), float(spread / size.square() * (n / (n - 1)))
