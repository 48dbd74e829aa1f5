"""Evaluators of a user's own that say the outcome of each example."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from map_bo.data import Metric, check_metrics
from map_bo.errors import ConfigError, EvaluationError, MapBoError, did_you_mean, first_line
from map_bo.evaluators.evaluator import (
    Evaluator,
    HasDigest,
    ItemEvaluator,
    Measurement,
    Prepares,
    ReadsHead,
    Repeats,
    measuring,
)
from map_bo.evaluators.examples import ExampleEvaluator, mean_of
from map_bo.evaluators.loaders.set_metrics import metric_from
from map_bo.evaluators.metrics import (
    DeclaresMetrics,
    measurements_of,
    metric_names,
    scores_items,
)
from map_bo.values import whole_number

__all__ = [
    "HasStrata",
    "Items",
    "Summarises",
    "TellsMeans",
    "TellsParts",
    "callable_evaluators",
    "means_over_scored",
    "numbered",
    "read_outcomes",
    "refuse_another_size",
]

logger = logging.getLogger(__name__)

Score = Callable[[nn.Module, Tensor], Any]
"""From the model and ``n`` indices of examples to one outcome per example, or one per metric."""

_ALL = sys.maxsize
_NUMBERS = "biuf"  # kinds of numpy's numbers that are outcomes


@runtime_checkable
class HasStrata(Protocol):
    """An evaluator that knows the labels of its examples."""

    @property
    def strata(self) -> Tensor | None:
        """``size`` integers; None where labels are not known."""
        ...


@runtime_checkable
class Summarises(Protocol):
    """An evaluator whose metrics are something else than the means of outcomes."""

    def summary(
        self, outcomes: Tensor, items: Tensor | None = None
    ) -> float | Measurement | Mapping[str, float | Measurement]:
        """Return what outcomes make; ``items`` are their examples, None for all in order."""
        ...


@runtime_checkable
class TellsMeans(Protocol):
    """An evaluator that says which of its metrics are the means of their outcomes."""

    @property
    def means(self) -> tuple[bool, ...]:
        """One boolean per metric."""
        ...


@runtime_checkable
class TellsParts(Protocol):
    """An evaluator that says whether its metrics can be measured on a part of its examples."""

    @property
    def divisible(self) -> bool:
        """Whether they can."""
        ...


class Items(ExampleEvaluator):
    """A function that scores examples, as an evaluator; in a configuration ``kind: items``.

    .. code-block:: python

        def right(model, items):  # indices, on the CPU
            return model(images[items]).argmax(-1) == labels[items]

        map_bo.Items(right, size=len(images), labels=labels, digest="test set of 2026-11")

    Because the framework decides which examples are scored, it can spend less on a row than all of
    them, compare merges on the same examples, and say how sure a difference is.

    An outcome is 0 or 1, a loss, a grade, or NaN where an example failed, such as an answer that
    could not be read. The metric is the mean of the others, and the log tells how many failed; when
    more than half did, the evaluation fails.

    Args:
        score: Called with the model, in evaluation mode and without gradients, and ``n`` indices of
            examples (integers on the CPU); returns ``n`` outcomes, or ``n x k`` of ``k`` metrics,
            or a mapping from their names: tensors, arrays or lists of numbers or booleans. An
            object with a method ``score`` of that kind will do; what else it has of an evaluator
            by example is used: ``size``, ``metrics``, ``digest``, ``prepare(model)``, ``summary``.
        size: The number of examples, or a function that returns it, which is asked when the
            evaluator is prepared; it must stay the same. By default that of ``score``.
        metrics: What the outcomes are: names, or :class:`~map_bo.data.Metric` where more is to be
            said (a mapping of its fields in a configuration). By default one proportion.
        metric: The same for a single metric.
        kind: The kind of metrics that are given by name: ``"proportion"`` (default), ``"loss"`` or
            ``"unbounded"``. In a configuration it is a field of the metric.
        direction: Their direction: ``"max"``, or ``"min"``, which is the default of a loss.
        batch_size: ``score`` is called with at most so many indices at a time; None calls it once
            with all. It is fixed because outcomes in reduced precision depend on it.
        labels: A label per example, of any kind, or a function that returns them: a part of the
            examples then holds each label in about its share.
        digest: Text that changes with the examples and with whatever else decides the outcomes. A
            run is not resumed with another, and with one measurements are kept for later runs.

    Raises:
        ConfigError: For a setting that is not possible.
        DataError: For a kind or direction that does not exist.
    """

    def __init__(
        self,
        score: Score | ItemEvaluator,
        size: int | Callable[[], int] | None = None,
        *,
        metrics: Sequence[str | Metric | Mapping[str, Any]] | str | Metric | None = None,
        metric: str | Metric | Mapping[str, Any] | None = None,
        kind: Literal["proportion", "loss", "unbounded"] | None = None,
        direction: Literal["max", "min"] | None = None,
        batch_size: int | None = 32,
        labels: Sequence[Hashable] | Tensor | Callable[[], Any] | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__(batch_size=_ALL if batch_size is None else batch_size)
        self._score = _made(score)
        self._asked = size if callable(size) else None
        self._size: int | None = None
        if size is None:
            if not scores_items(self._score):
                raise ConfigError(
                    "the number of examples is not known",
                    hint="give it: Items(score, size=len(data))",
                )
            self._asked = self._size_of_score
        elif not callable(size):
            self._size = whole_number("size", size, least=1)
        self._metrics = self._declared(metrics, metric, kind, direction)
        self._given_labels = labels
        self._strata: Tensor | None = None
        if digest is not None and not (isinstance(digest, str) and digest.strip()):
            raise ConfigError(
                f"digest must be text, got {digest!r:.80}",
                hint="such as the name and version of the examples",
            )
        self._digest = digest
        self._told: set[str] = set()
        if labels is not None and not callable(labels) and self._size is not None:
            self._strata = numbered(labels, self._size, ConfigError)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics."""
        return self._metrics

    @property
    def scorer(self) -> object:
        """What scores: the function or object that was given."""
        return self._score

    @property
    def size(self) -> int:
        """The number of examples."""
        return self.require_ready(self._size, "the number of examples is not known yet")

    @property
    def digest(self) -> str:
        """The text that was given, or that of ``score``; empty where there is none."""
        _ = self.size
        if self._digest is not None:
            return self._digest
        if not isinstance(self._score, HasDigest):
            return ""
        said: object = self._score.digest
        return str(said() if callable(said) else said)

    @property
    def strata(self) -> Tensor | None:
        """The label of each example, as numbers."""
        return self._strata

    @property
    def means(self) -> tuple[bool, ...]:
        """All metrics are means, unless ``score`` summarises outcomes itself."""
        if isinstance(self._score, TellsMeans):
            return tuple(self._score.means)
        return (not isinstance(self._score, Summarises),) * len(self._metrics)

    @property
    def divisible(self) -> bool:
        """Whether ``score`` can be asked for a part of the examples; so it is taken."""
        return not isinstance(self._score, TellsParts) or bool(self._score.divisible)

    @property
    def repeats(self) -> bool:
        """Whether ``score`` does; so it is taken, unless it says otherwise."""
        return not isinstance(self._score, Repeats) or bool(self._score.repeats)

    @property
    def reads_head(self) -> bool:
        """Whether ``score`` says that it scores the outputs of the model's own head."""
        return isinstance(self._score, ReadsHead) and self._score.reads_head

    def prepare(self, model: nn.Module) -> None:
        """Let ``score`` get ready, and ask for the number of examples and their labels.

        Raises:
            EvaluationError: When these are not possible.
        """
        if isinstance(self._score, Prepares):
            self._score.prepare(model)
        if self._asked is not None:
            found = whole_number("size", self._asked(), least=1, error=EvaluationError)
            refuse_another_size(self._size or found, found)
            self._size = found
        given: Any = self._given_labels
        if given is None and isinstance(self._score, HasStrata):
            given = self._score.strata
        if given is not None:
            labels = given() if callable(given) else given
            self._strata = numbered(labels, self.size, EvaluationError)

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return what ``score`` returns for one batch: ``b``, or ``b x k``, float64."""
        call = self._score.score if isinstance(self._score, _Scores) else self._score
        names = [metric.name for metric in self._metrics]
        table = read_outcomes(call(model, items.clone()), len(items), names)
        return table.squeeze(-1) if len(names) == 1 else table

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each example: ``n``, or ``n x k``, NaN where it failed.

        Args:
            model: The model; its mode is put back.
            items: ``n`` indices of examples.

        Raises:
            EvaluationError: For an index that is not possible; when ``score`` returns something
                else than an outcome for each example, or infinity; when the number of examples has
                changed.
        """
        if self._asked is not None and self._size is not None:
            refuse_another_size(self._size, self._asked())
        return super().score(model, items)

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return the mean of each metric over the examples that did not fail.

        Raises:
            EvaluationError: When more than half of them failed.
        """
        if isinstance(self._score, Summarises):
            found = self._score.summary(outcomes, items)
            told = measurements_of("score", self, found)
            return {own: _sound(told[name]) for own, name in metric_names("score", self).items()}
        table = outcomes.unsqueeze(-1) if outcomes.dim() == 1 else outcomes
        return means_over_scored(table, self._metrics, measuring() or "score", self._told)

    def _checked(self, outcomes: Tensor, n: int) -> Tensor:
        return outcomes  # which `outcomes` has done, and NaN is an example that failed

    def _size_of_score(self) -> int:
        assert isinstance(self._score, ItemEvaluator)
        return self._score.size

    def _declared(
        self,
        metrics: Sequence[str | Metric | Mapping[str, Any]] | str | Metric | None,
        metric: str | Metric | Mapping[str, Any] | None,
        kind: Literal["proportion", "loss", "unbounded"] | None,
        direction: Literal["max", "min"] | None,
    ) -> tuple[Metric, ...]:
        if metrics is not None and metric is not None:
            raise ConfigError("both metric and metrics are given", hint="give metrics=[...] alone")
        given: Sequence[Any] | None = None
        if metric is not None:
            given = [metric]
        elif metrics is not None:
            given = [metrics] if isinstance(metrics, str | Metric | Mapping) else list(metrics)
        elif isinstance(self._score, DeclaresMetrics):
            given = list(self._score.metrics)
        given = ["score"] if given is None else given
        named = [one for one in given if isinstance(one, str)]
        if not named and (kind is not None or direction is not None):
            raise ConfigError(
                "kind and direction are of metrics given by name",
                hint="say them in the metric: map_bo.Metric(name, direction, kind)",
            )
        way = direction or ("min" if kind == "loss" else "max")
        return check_metrics(
            [
                Metric(one, way, kind or "proportion")
                if isinstance(one, str)
                else metric_from({"name": "score", **one} if isinstance(one, Mapping) else one)
                for one in given
            ]
        )


def callable_evaluators(
    evaluators: Mapping[str, Evaluator | ItemEvaluator],
) -> dict[str, Evaluator]:
    """Return evaluators all of which can be called: those that only score examples as `Items`."""
    return {
        name: one if callable(one) else Items(one, batch_size=None)
        for name, one in evaluators.items()
    }


@runtime_checkable
class _Scores(Protocol):
    def score(self, model: nn.Module, items: Tensor) -> Any: ...


def _sound(found: Measurement | EvaluationError) -> Measurement:
    if isinstance(found, EvaluationError):
        raise found
    return found


def _made(score: object) -> Score | _Scores:
    """Return what scores; of a class, as a configuration names it, an object."""
    if isinstance(score, type):
        kind = score
        try:
            score = kind()
        except TypeError as error:
            raise ConfigError(
                f"score is the class {kind.__name__}, which cannot be made: {first_line(error)}",
                hint="give an object, or a function of the model and indices of examples",
            ) from error
    if isinstance(score, _Scores) or callable(score):
        return score
    raise ConfigError(
        f"score must be a function of the model and indices of examples, got {score!r:.80}",
        hint="give score(model, items), which returns one outcome per example",
    )


def read_outcomes(found: object, n: int, names: Sequence[str]) -> Tensor:
    """Return what a function gave for ``n`` examples as ``n x k`` outcomes, float64, on the CPU.

    Args:
        found: A tensor, an array, or lists; or a mapping from names to such, of several metrics.
        n: How many examples were asked for.
        names: The ``k`` metrics.

    Raises:
        EvaluationError: When there is not one real number, or NaN, for each example and metric.
    """
    k = len(names)
    shape = f"{n} outcomes" if k == 1 else f"{n} x {k} outcomes"
    if isinstance(found, Mapping):
        lacking = [name for name in names if name not in found]
        if lacking:
            raise EvaluationError(
                f"there are no outcomes of {lacking[0]!r}",
                hint=did_you_mean(lacking[0], [str(name) for name in found]),
            )
        return torch.cat([read_outcomes(found[name], n, [name]) for name in names], -1)
    given = _numbers(found, shape)
    table = given.unsqueeze(-1) if given.dim() == 1 and k == 1 else given
    if table.shape != (n, k):
        many, shaped = f"{given.numel()} outcomes", f"outcomes of shape {tuple(given.shape)}"
        raise EvaluationError(
            f"{many if given.dim() == 1 else shaped} came back for {n} examples",
            hint=f"return {shape}, in the order of the items",
        )
    infinite = int(table.isinf().any(-1).sum())
    if infinite:
        raise EvaluationError(
            f"the outcomes of {infinite} of {n} examples are infinite",
            hint="return NaN for an example that failed, or a bounded outcome",
        )
    return table


def _numbers(found: object, shape: str) -> Tensor:
    """Return real numbers as a float64 tensor on the CPU, in the shape that they have."""
    if isinstance(found, list | tuple) and any(isinstance(one, Tensor) for one in found):
        try:
            found = torch.stack([torch.as_tensor(one).detach().cpu() for one in found])
        except (RuntimeError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"outcomes do not go together: {first_line(error)}", hint=f"return {shape}"
            ) from error
    if isinstance(found, Tensor):
        if found.is_complex():
            raise EvaluationError("outcomes are complex numbers", hint="return real ones")
        return found.detach().double().cpu().clone()  # which the function may go on using
    try:
        array = np.asarray(found)
    except (ValueError, TypeError) as error:  # of lists of several lengths
        raise EvaluationError(
            f"outcomes do not go together: {first_line(error)}", hint=f"return {shape}"
        ) from error
    if array.dtype.kind == "c":
        raise EvaluationError("outcomes are complex numbers", hint="return real ones")
    if array.dtype.kind not in _NUMBERS or array.ndim == 0:
        told = type(found).__name__ if array.ndim == 0 else f"{type(found).__name__} of others"
        raise EvaluationError(
            f"outcomes must be numbers, one per example, got a {told}: {found!r:.60}",
            hint=f"return {shape}; NaN is an example that failed",
        )
    return torch.as_tensor(array.astype(np.float64), device="cpu")


def means_over_scored(
    table: Tensor, metrics: Sequence[Metric], evaluator: str, told: set[str]
) -> dict[str, Measurement]:
    """Return the mean of each metric over the examples that did not fail.

    Args:
        table: ``n x k`` outcomes, NaN where an example failed.
        metrics: The ``k`` metrics.
        evaluator: What the evaluator is called, for the log.
        told: Names of metrics whose failed examples the log has told; added to.

    Raises:
        EvaluationError: When more than half of the examples failed.
    """
    found: dict[str, Measurement] = {}
    for metric, column in zip(metrics, table.unbind(-1), strict=True):
        good = column[~column.isnan()]
        failed, n = len(column) - len(good), len(column)
        of = f" in {metric.name!r}" if len(metrics) > 1 else ""
        if 2 * failed > n:
            raise EvaluationError(
                f"{failed} of {n} examples failed{of}: their outcomes are NaN",
                hint="these coefficients break the model, or score returns NaN too often",
            )
        if failed and metric.name not in told:
            told.add(metric.name)
            logger.warning(
                "evaluator %r: %d of %d examples failed%s (NaN), and the metric is the mean of the "
                "others; further ones are not told",
                evaluator,
                failed,
                n,
                of,
            )
        found[metric.name] = mean_of(good, metric)
    return found


def numbered(labels: object, size: int, error: type[MapBoError]) -> Tensor:
    """Return the label of each example as a number, ``size`` integers.

    Args:
        labels: One label of any kind per example.
        size: How many examples there are.
        error: What is raised.

    Raises:
        MapBoError: An ``error`` when there is not one label per example.
    """
    hint = "give one label per example: a number, a text or whatever tells it from others"
    if isinstance(labels, Tensor | np.ndarray):
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise error(f"labels must be one per example, got {labels!r:.60}", hint=hint)
    given = list(labels)
    if len(given) != size:
        raise error(f"there are {len(given)} labels of {size} examples", hint=hint)
    try:
        numbers = {label: i for i, label in enumerate(dict.fromkeys(given))}
    except TypeError as unhashable:
        raise error(f"labels cannot be compared: {unhashable}", hint=hint) from unhashable
    return torch.tensor([numbers[label] for label in given], device="cpu")


def refuse_another_size(known: int, found: object) -> None:
    """Refuse a number of examples that has changed.

    Raises:
        EvaluationError: When it is another than it was, or no number.
    """
    if whole_number("size", found, least=1, error=EvaluationError) != known:
        raise EvaluationError(
            f"there were {known} examples, and now there are {found}",
            hint="the examples of an evaluator must stay the same throughout a run; make a new one "
            "for others",
        )
