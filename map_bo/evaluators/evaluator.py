"""Evaluators: what is measured on a merged model, how sure that is, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from map_bo.cached import digest_of
from map_bo.errors import EvaluationError, MapBoError
from map_bo.evaluators.isolation.world import stops_the_process

__all__ = [
    "Accuracy",
    "Evaluator",
    "HasDigest",
    "Inputs",
    "ItemEvaluator",
    "MeanLoss",
    "MeanProbability",
    "Measurement",
    "Prepares",
    "ReadsHead",
    "Repeats",
    "Returned",
    "accuracy",
    "binomial_variance",
    "call_model",
    "called",
    "device_of",
    "evaluating",
    "logits_of",
    "mean_loss",
    "mean_probability",
    "measure",
    "measurement_of",
    "measuring",
    "number_of",
    "prepare_evaluators",
]

_measuring: ContextVar[str | None] = ContextVar("measuring", default=None)
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


Returned = float | Measurement | Mapping[str, float | Measurement]
"""What an evaluator returns: one metric, or several by the names that it declares."""

Evaluator = Callable[[nn.Module], Returned]
"""Measures one metric on a model, or several under the names that it declares
(`DeclaresMetrics`). The model is in evaluation mode; gradients are not switched off. What it does
to the model, to torch and to the process is undone afterwards."""


@runtime_checkable
class Prepares(Protocol):
    """An evaluator with work to do once, before anything is evaluated.

    It reads its data, fits a head on the frozen base, and refuses what does not fit the model.
    """

    def prepare(self, model: nn.Module) -> None:
        """Get ready.

        What this does to the model, to torch and to the process is undone, as after a measurement,
        and the global generators are seeded alike in every run.

        Args:
            model: The model with the weights of the base, in evaluation mode.

        Raises:
            EvaluationError: When it could not score such a model, with the reason.
        """
        ...


@runtime_checkable
class ReadsHead(Protocol):
    """An evaluator that may score the outputs of the model's own head."""

    @property
    def reads_head(self) -> bool:
        """Whether it does, so that the model must have the head of its task."""
        ...


@runtime_checkable
class ItemEvaluator(Protocol):
    """An evaluator that knows the outcome of each of its examples."""

    @property
    def size(self) -> int:
        """The number of examples."""
        ...

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Score some examples.

        Args:
            model: The model, in evaluation mode.
            items: ``n`` indices of examples, integers in ``[0, size)``.

        Returns:
            ``n`` outcomes, float64, or ``n x m`` of an evaluator with ``m`` metrics; NaN where an
            example failed, or says nothing of a metric, as a document of another task does.
        """
        ...


@runtime_checkable
class HasDigest(Protocol):
    """An evaluator whose measurements may be kept for later runs: it says what it depends on.

    It promises that the same weights give the same measurement as long as its digest is the same.
    A function has one when it is given one: ``score.digest = "version 2 of my examples"``.
    """

    @property
    def digest(self) -> str:
        """Text that changes with the examples and with every setting that decides the outcome.

        It is asked for before each evaluation, after `Prepares.prepare`.
        """
        ...


@runtime_checkable
class Repeats(Protocol):
    """An evaluator that says whether the same weights always give the same measurement."""

    @property
    def repeats(self) -> bool:
        """Whether they do; not so where it measures times or draws anew."""
        ...


def prepare_evaluators(
    evaluators: Mapping[str, Evaluator],
    model: Callable[[str], AbstractContextManager[nn.Module]],
) -> None:
    """Let every evaluator get ready, and refuse all that cannot at once.

    Args:
        evaluators: Name -> evaluator; those that do not prepare are left alone.
        model: Gives the model with the weights of the base for a while, to the evaluator of a name.

    Raises:
        EvaluationError: Naming every evaluator that cannot be used, each with its reason:
            whatever it raised, as in `measure`.
    """
    troubles: list[tuple[str, str, str | None]] = []
    cause: BaseException | None = None
    for name, evaluator in evaluators.items():
        if not isinstance(evaluator, Prepares):
            continue
        try:
            with model(name) as base:
                evaluator.prepare(base)
        except MapBoError as error:
            troubles.append((name, error.message, error.hint))
            cause = cause or error
        except BaseException as error:
            if stops_the_process(error):
                raise
            text = f"its prepare raised {type(error).__name__}: {error}".rstrip(": ")
            troubles.append((name, text, "call it with the base model to find out why"))
            cause = cause or error
    if len(troubles) == 1:
        (name, message, hint) = troubles[0]
        raise EvaluationError(f"evaluator {name!r} cannot be used: {message}", hint=hint) from cause
    if troubles:
        lines = [
            f"{name!r}: {message}" + (f" ({hint})" if hint else "")
            for name, message, hint in troubles
        ]
        raise EvaluationError(
            f"{len(troubles)} evaluators cannot be used:\n  - " + "\n  - ".join(lines),
            hint="nothing was evaluated; correct them all and run again",
        ) from cause


def measure(name: str, evaluator: Evaluator, model: nn.Module) -> Measurement:
    """Call an evaluator of one metric and check what it returns.

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
    return measurement_of(f"evaluator {name!r}", called(name, evaluator, model))


def called(name: str, evaluator: Evaluator, model: nn.Module) -> object:
    """Call an evaluator; what it raises becomes an `EvaluationError`, as `measure` says."""
    token = _measuring.set(name)
    try:
        return evaluator(model)
    except BaseException as error:
        if stops_the_process(error):
            raise
        text, hint = str(error), None
        if isinstance(error, MapBoError):
            text, hint = error.message, error.hint
        elif isinstance(error, TypeError) and "required positional argument: 'items'" in text:
            hint = "a function of the model and indices is map_bo.Items(score, size=len(data))"
        reason = f"evaluator {name!r} raised {type(error).__name__}: {text}"
        raise EvaluationError(
            reason.rstrip(": "), hint=hint or "call it on the base model to find out why"
        ) from error
    finally:
        _measuring.reset(token)


def measuring() -> str | None:
    """Return the name of the evaluator that is being called; None outside of one."""
    return _measuring.get()


def measurement_of(what: str, result: object) -> Measurement:
    """Return what was returned as a `Measurement`, or raise when it is no finite number."""
    if isinstance(result, Measurement):
        return result
    value = _number(result, what, verb="returned")
    if not math.isfinite(value):
        raise EvaluationError(f"{what} returned {value}", hint=_HINT)
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
        hint = _HINT
        if isinstance(value, Mapping):
            hint = "map_bo.SeveralMetrics(function, metrics=[...]) says which metrics it returns"
        raise EvaluationError(f"{what} {verb} {text}, not a number", hint=hint)
    return float(value)


Inputs = Tensor | Mapping[str, Tensor]
"""What a model is called with: a tensor, or tensors by keyword, with one example per row."""


def number_of(inputs: Inputs) -> int:
    """Return the number of examples.

    Raises:
        EvaluationError: When the tensors of a mapping disagree, or there are none.
    """
    if isinstance(inputs, Tensor):
        return len(inputs)
    sizes = {name: len(tensor) for name, tensor in inputs.items()}
    if len(set(sizes.values())) != 1:
        raise EvaluationError(
            f"inputs must be tensors with one row per example, got {sizes or 'none'}",
            hint="give each input the same number of rows",
        )
    return next(iter(sizes.values()))


def call_model(
    model: nn.Module, inputs: Inputs, rows: slice | Tensor, device: torch.device
) -> object:
    """Call a model on some rows of its inputs, moved to a device; return what it returns."""
    if isinstance(inputs, Tensor):
        return model(inputs[rows].to(device))
    return model(**{name: tensor[rows].to(device) for name, tensor in inputs.items()})


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are; the CPU for one without any."""
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


_SMALL = 1 << 20  # bytes of examples whose digest is taken anew each time
_digests: WeakKeyDictionary[object, tuple[object, str]] = WeakKeyDictionary()
"""Evaluator -> the state of its tensors, and the digest that they had in it."""


@runtime_checkable
class _HasLogits(Protocol):
    logits: Tensor


_HEADED = (
    "AutoModel makes models without a head, also where experts bring one; make the model by "
    "AutoModelForSequenceClassification, AutoModelForImageClassification or AutoModelForCausalLM, "
    "or score the encoder under a head of the evaluator's own (head=FILE, head='fit')"
)


def logits_of(output: object) -> Tensor:
    """Return the logits of a model's output: the output itself, or what it has as ``logits``.

    Raises:
        EvaluationError: When it is no tensor and has none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, _HasLogits):
        return output.logits
    raise EvaluationError(
        f"the model returned a {type(output).__name__}, which has no logits",
        hint=_HEADED
        if type(output).__module__.startswith("transformers.")
        else "evaluate a model with a classification head",
    )


@dataclass(frozen=True, eq=False)
class _Classification:
    """Labelled examples that a classifier is scored on, batch by batch."""

    inputs: Inputs
    labels: Tensor
    batch_size: int = 256
    means: ClassVar[tuple[bool, ...]] = (True,)

    def __post_init__(self) -> None:
        sizes = number_of(self.inputs)
        if sizes != len(self.labels) or not len(self.labels):
            raise EvaluationError(
                f"there must be one label per input, got {sizes} inputs and "
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

    @property
    def digest(self) -> str:
        """A digest of inputs, labels and batch size."""
        tensors = {"labels": self.labels}
        inputs = {"": self.inputs} if isinstance(self.inputs, Tensor) else self.inputs
        tensors |= {f"input {name}": tensor for name, tensor in inputs.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) <= _SMALL:
            return f"{digest_of(tensors)} {self.batch_size}"
        state = tuple(
            (id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
            for tensor in tensors.values()
        )
        known = _digests.get(self)
        if known is None or known[0] != state:
            known = _digests[self] = state, f"{digest_of(tensors)} {self.batch_size}"
        return known[1]

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @property
    def strata(self) -> Tensor:
        """The class of each example, ``size``."""
        return self.labels

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each of ``n`` examples, float64; see `ItemEvaluator`."""
        some = None if torch.equal(items, torch.arange(self.size, device="cpu")) else items
        batches = self._batches(model, items=some)
        return torch.cat([self._each(*batch).double().cpu() for batch in batches]).clone()

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def _batches(
        self, model: nn.Module, *, graph: bool = False, items: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits (``b x classes``, float32) and labels (``b``) of each batch."""
        device = device_of(model)
        with evaluating(model):
            for start in range(0, len(self.labels if items is None else items), self.batch_size):
                batch: slice | Tensor = slice(start, start + self.batch_size)
                batch = batch if items is None else items[batch]
                # Not around the yield: a generator's modes would reach whoever consumes it.
                with torch.inference_mode(not graph), torch.set_grad_enabled(graph):
                    logits = logits_of(call_model(model, self.inputs, batch, device)).float()
                if not bool(torch.isfinite(logits).all()):
                    raise EvaluationError(
                        "the model's outputs hold NaN or infinity",
                        hint="these coefficients break the model; narrow the bounds if many do",
                    )
                yield logits, self.labels[batch].to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, and put the modes of its modules back."""
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

    def summary(self, values: Tensor, items: Tensor | None = None) -> Measurement:
        """Return the share of the ``n`` examples that are right."""
        return Measurement(int(values.sum()) / len(values), count=len(values))

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


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

    def summary(self, values: Tensor, items: Tensor | None = None) -> Measurement:
        """Return the measurement that the values of ``n`` examples make."""
        n = len(values)
        variance = float(values.var()) / n if n > 1 else None
        return Measurement(float(values.mean()), variance=variance, count=n)


class MeanLoss(_MeanOverExamples):
    """The mean cross-entropy in nats; made by `mean_loss`."""

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")


class MeanProbability(_MeanOverExamples):
    """The mean probability of the right class; made by `mean_probability`."""

    def _each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)

    def summary(self, values: Tensor, items: Tensor | None = None) -> Measurement:
        """Return mean and variance; no count, as the values are not successes and failures."""
        seen = super().summary(values)
        return Measurement(seen.value, variance=seen.variance)


def accuracy(inputs: Inputs, labels: Tensor, batch_size: int = 256) -> Accuracy:
    """Return an evaluator: the share of examples that a classifier gets right.

    The model runs in evaluation mode without gradients, and its mode is put back. Its output is
    the logits, or has them as ``.logits``.

    Args:
        inputs: ``n x ...`` model inputs, or a mapping of several (such as a ``BatchEncoding`` of
            transformers), which the model is called with by keyword; they are moved to the
            model's device batch by batch.
        labels: ``n`` class indices.
        batch_size: Examples per forward pass.

    Raises:
        EvaluationError: When inputs and labels do not fit; when called, for outputs that are
            not finite.
    """
    return Accuracy(inputs, labels, batch_size)


def mean_loss(inputs: Inputs, labels: Tensor, batch_size: int = 256) -> MeanLoss:
    """Return an evaluator: the mean cross-entropy of a classifier, in nats; smaller is better.

    Give the problem ``Metric(name, direction="min", kind="loss")`` with it. Otherwise as
    `accuracy`.
    """
    return MeanLoss(inputs, labels, batch_size)


def mean_probability(inputs: Inputs, labels: Tensor, batch_size: int = 256) -> MeanProbability:
    """Return an evaluator: the mean probability that a classifier gives to the right class.

    A proportion in [0, 1] to maximise, smooth where an accuracy has steps. Otherwise as
    `accuracy`.
    """
    return MeanProbability(inputs, labels, batch_size)
