"""The frozen data that flows through a run: metrics, observations, fronts.

Shapes: ``n`` evaluations, ``d`` coefficients, ``m`` metrics, ``k`` front points. All tensors
are float64 on the CPU. Metrics keep their own unit and direction everywhere; the one function
that turns them to maximisation is :func:`to_maximisation`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.moved import under_old_name
from map_bo.observed import (
    check_noise,
    checked_covariance,
    checked_examples,
    checked_gradients,
    checked_like,
    checked_recalled,
    double,
    joined_covariance,
    joined_examples,
)

__all__ = [
    "Front",
    "Metric",
    "Observations",
    "directions",
    "is_at",
    "to_maximisation",
]

_PRECISION = 1e-6  # problems may work in single precision

Direction = Literal["max", "min"]
Kind = Literal["proportion", "loss", "unbounded"]
Resampling = Literal["same", "fresh"]


@dataclass(frozen=True, init=False)
class Metric:
    """One task metric: what it is called, which way is better, and what values it can take.

    Attributes:
        name: Unique among the metrics of a problem; usually the task's name.
        direction: ``"max"`` when larger is better (accuracy), ``"min"`` when smaller is.
        kind: ``"proportion"`` (a mean of values in ``[lower, upper]``, such as an accuracy),
            ``"loss"`` (bounded below by ``lower``, no upper bound) or ``"unbounded"``.
        lower: Smallest possible value; defaults to 0 for proportions and losses.
        upper: Largest possible value; defaults to 1 for proportions.
        resampling: ``"same"`` when every evaluation measures it on the same examples, as a test set
            does; ``"fresh"`` when each draws its own. ``None`` says nothing and is taken for
            ``"fresh"``, the more cautious of the two; a problem that knows fills it in.
            In version 0.1 it was called ``examples``; that name goes in version 0.3.

    Raises:
        DataError: On a value that is not possible.
    """

    name: str
    direction: Direction = "max"
    kind: Kind = "proportion"
    lower: float | None = None
    upper: float | None = None
    resampling: Resampling | None = None

    # Written out for the old keyword alone: as an InitVar it would be read by dataclasses.replace.
    def __init__(
        self,
        name: str,
        direction: Direction = "max",
        kind: Kind = "proportion",
        lower: float | None = None,
        upper: float | None = None,
        resampling: Resampling | None = None,
        *,
        examples: Resampling | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "name", name)
        put(self, "direction", direction)
        put(self, "kind", kind)
        put(self, "lower", lower)
        put(self, "upper", upper)
        resampling = under_old_name("Metric", "examples", "resampling", examples, resampling)
        put(self, "resampling", resampling)
        self.__post_init__()

    def __post_init__(self) -> None:
        if not self.name:
            raise DataError("a metric has no name", hint="give each metric a name of its own")
        if self.direction not in ("max", "min"):
            raise DataError(
                f"direction of metric {self.name!r} must be 'max' or 'min', got {self.direction!r}",
                hint="give 'max' if larger is better, else 'min'",
            )
        if self.kind not in ("proportion", "loss", "unbounded"):
            raise DataError(
                f"metric {self.name!r} has the unknown kind {self.kind!r}",
                hint="choose 'proportion', 'loss' or 'unbounded'",
            )
        if self.resampling not in ("same", "fresh", None):
            raise DataError(
                f"resampling of metric {self.name!r} must be 'same' or 'fresh', got "
                f"{self.resampling!r}",
                hint="leave it out when neither is known",
            )
        if self.kind in ("proportion", "loss") and self.lower is None:
            object.__setattr__(self, "lower", 0.0)
        if self.kind == "proportion" and self.upper is None:
            object.__setattr__(self, "upper", 1.0)
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise DataError(
                f"lower must be smaller than upper, got [{self.lower}, {self.upper}] for metric "
                f"{self.name!r}",
                hint="swap the bounds, or leave out the one that does not exist",
            )

    @property
    def examples(self) -> Resampling | None:
        """The name of :attr:`resampling` in version 0.1."""
        warnings.warn(
            "Metric.examples is now Metric.resampling; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.resampling


def directions(metrics: Sequence[Metric]) -> Tensor:
    """Return ``m`` signs: +1 where larger is better, -1 where smaller is."""
    signs = [1.0 if metric.direction == "max" else -1.0 for metric in metrics]
    return torch.tensor(signs, dtype=torch.float64, device="cpu")


def to_maximisation(Y: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """Turn metric values (``... x m``, own units) so that larger is better in every column.

    It is its own inverse.
    """
    return Y * directions(metrics).to(Y)


def is_at(x: Tensor, proposed: Tensor) -> bool:
    """Return whether ``x`` is the ``proposed`` point (``d`` each), to single precision."""
    return torch.allclose(x.double(), proposed, rtol=_PRECISION, atol=_PRECISION)


def check_metrics(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Return ``metrics`` as a tuple, or raise when empty or when two share a name."""
    names = [metric.name for metric in metrics]
    if not names:
        raise DataError("there are no metrics", hint="give at least one metric to optimise")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"metric names appear twice: {', '.join(twice)}",
            hint="give each metric a name of its own",
        )
    return tuple(metrics)


_BY_ROW = (
    *("X", "Y", "Yvar", "counts", "cost", "recalled", "saved"),
    *("gradients", "gradient_variance"),
)


@dataclass(frozen=True, eq=False)
class Observations:
    """What has been evaluated: ``n`` coefficient vectors and what was measured at each.

    A failed evaluation is a row with a reason in ``failures``; it is kept and never receives a
    score. Where some of its metrics were measured before or after the one that failed, their
    values stay in ``Y`` and the others are NaN: a *partial* row. Each metric is fitted to the rows
    that have it (:attr:`measured`, :meth:`of`); dominance, hypervolume and whatever else compares
    whole rows takes the rows without a reason (:meth:`succeeded`). A failed row without any NaN is
    one that its reason takes back as a whole: none of its values counts as measured.

    A row without a reason that has some of its metrics, and NaN for the others, is *incomplete*:
    those were not measured there, such as a task that a study gained later. It has not failed.

    Attributes:
        X: ``n x d`` coefficients.
        Y: ``n x m`` measured metrics in their own units and directions; NaN where a metric was not
            measured.
        metrics: The ``m`` metrics.
        Yvar: ``n x m`` variance of the measurement noise (metric units squared); 0 where it is
            known to be exact, NaN where it is unknown.
        counts: ``n x m`` number of examples that a proportion was measured on; NaN elsewhere.
        cost: ``n`` seconds that each evaluation took.
        failures: ``n`` reasons, ``None`` where the evaluation did not fail.
        gradients: ``n x m x d`` derivatives of the metrics by the coefficients (metric unit per
            unit of the coefficient); NaN where there is none, and where the metric was not
            measured. None when there is none at all, also when all that was given is NaN.
        gradient_variance: ``n x m x d`` variance of the noise of ``gradients``; 0 where it is
            known to be exact, NaN where it is unknown. None exactly when ``gradients`` is.
        recalled: ``n x m`` booleans: which values were not measured, but come from a cache of
            earlier evaluations.
        saved: ``n`` seconds that measuring those had taken; 0 where there are none.
        examples: ``n`` mappings from an evaluator's name to the outcomes of the examples that it
            scored; empty where there are none.
        covariance: ``m x n x n`` covariance of the measurement noise among the rows (metric units
            squared), whose diagonal is ``Yvar``; 0 where a metric was not measured. None where
            the noise of the rows is independent.

    Raises:
        DataError: When shapes disagree, or a row that has not failed holds infinity or nothing.
    """

    X: Tensor
    Y: Tensor
    metrics: tuple[Metric, ...]
    Yvar: Tensor = None  # type: ignore[assignment]
    counts: Tensor = None  # type: ignore[assignment]
    cost: Tensor = None  # type: ignore[assignment]
    failures: tuple[str | None, ...] = None  # type: ignore[assignment]
    gradients: Tensor | None = None
    gradient_variance: Tensor | None = None
    recalled: Tensor = None  # type: ignore[assignment]
    saved: Tensor = None  # type: ignore[assignment]
    examples: tuple[Mapping[str, ExampleOutcomes], ...] = None  # type: ignore[assignment]
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "metrics", check_metrics(self.metrics))
        put(self, "X", double(self.X))
        put(self, "Y", double(self.Y))
        if self.X.dim() != 2 or self.Y.dim() != 2:
            raise DataError(
                f"X has shape {tuple(self.X.shape)} and Y {tuple(self.Y.shape)}; "
                "both need two dimensions",
                hint="give X as n x d and Y as n x m, with one row per evaluation and one column "
                "per metric of Y",
            )
        n, m = len(self.X), len(self.metrics)
        if self.Y.shape != (n, m):
            raise DataError(
                f"Y has shape {tuple(self.Y.shape)} for {n} evaluations of {m} metrics",
                hint=f"return one row per evaluation and one column for each of "
                f"{', '.join(metric.name for metric in self.metrics)}",
            )
        for name in ("Yvar", "counts"):
            put(self, name, checked_like(name, getattr(self, name), self.Y))
        put(self, "cost", double([0.0] * n if self.cost is None else self.cost))
        put(self, "failures", (None,) * n if self.failures is None else tuple(self.failures))
        if self.cost.shape != (n,) or len(self.failures) != n:
            raise DataError(
                f"cost has {len(self.cost)} and failures {len(self.failures)} entries for {n} "
                "evaluations",
                hint="give one entry per evaluation",
            )
        if not bool(torch.isfinite(self.X).all()):
            raise DataError("X holds NaN or infinity", hint="give finite coefficients")
        finite = torch.isfinite(self.Y)
        bad = (torch.isinf(self.Y).any(-1) | ~finite.any(-1)) & ~self.failed_rows
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()
            raise DataError(
                f"row {rows[0]} of Y holds NaN or infinity: {self.Y[rows[0]].tolist()}",
                hint="record the row as a failed one: put the reason in `failures`; the values of "
                "the other metrics are kept. NaN among other values is a metric not measured",
            )
        check_noise(self.Yvar, self.counts)
        recalled, saved = checked_recalled(self.recalled, self.saved, self.Y)
        put(self, "recalled", recalled)
        put(self, "saved", saved)
        gradients, noise = checked_gradients(
            self.gradients, self.gradient_variance, (*self.Y.shape, self.X.shape[-1]), self.measured
        )
        put(self, "gradients", gradients)
        put(self, "gradient_variance", noise)
        put(self, "examples", checked_examples(self.examples, n))
        put(self, "covariance", checked_covariance(self.covariance, self.measured))

    def __len__(self) -> int:
        return len(self.X)

    @property
    def ok(self) -> Tensor:
        """``n`` booleans: which evaluations succeeded, with all of their metrics."""
        return ~self.failed_rows & torch.isfinite(self.Y).all(-1)

    @property
    def failed_rows(self) -> Tensor:
        """``n`` booleans: which evaluations failed; an incomplete one did not."""
        return torch.tensor(
            [reason is not None for reason in self.failures], dtype=torch.bool, device="cpu"
        )

    @property
    def incomplete(self) -> Tensor:
        """``n`` booleans: which rows did not fail, and lack metrics that were not measured."""
        return ~self.failed_rows & ~torch.isfinite(self.Y).all(-1)

    @property
    def measured(self) -> Tensor:
        """``n x m`` booleans: which metrics of which rows were measured."""
        finite = torch.isfinite(self.Y)
        return finite & (self.ok | ~finite.all(-1)).unsqueeze(-1)

    @property
    def partial(self) -> Tensor:
        """``n`` booleans: which rows have some of their metrics, but not all."""
        return ~self.ok & self.measured.any(-1)

    def of(self, metric: str) -> Observations:
        """Return the rows that have a metric, as evaluations of that metric alone.

        Raises:
            DataError: When there is no such metric.
        """
        names = [each.name for each in self.metrics]
        if metric not in names:
            raise DataError(
                f"there is no metric {metric!r}", hint=f"the metrics are {', '.join(names)}"
            )
        column = names.index(metric)
        return self.columns([column], self.measured[:, column])

    def columns(self, columns: Sequence[int], rows: Tensor) -> Observations:
        """Return some metrics of rows that have all of them, as evaluations that succeeded.

        Args:
            columns: Positions of the metrics.
            rows: ``n`` booleans.
        """
        index, chosen = rows.nonzero().flatten(), list(columns)
        gradients, noise = self.gradients, self.gradient_variance
        return Observations(
            X=self.X[index],
            Y=self.Y[index][:, chosen],
            metrics=tuple(self.metrics[j] for j in chosen),
            Yvar=self.Yvar[index][:, chosen],
            counts=self.counts[index][:, chosen],
            cost=self.cost[index],
            gradients=None if gradients is None else gradients[index][:, chosen],
            gradient_variance=None if noise is None else noise[index][:, chosen],
            recalled=self.recalled[index][:, chosen],
            saved=self.saved[index],
            examples=tuple(self.examples[i] for i in index.tolist()),
            covariance=None
            if self.covariance is None
            else self.covariance[chosen][:, index][:, :, index],
        )

    def with_any(self) -> Observations:
        """Return the rows that have at least one of their metrics, the partial ones included.

        Without partial rows they are those of :meth:`succeeded`.
        """
        return self.select(self.measured.any(-1))

    def patterns(self) -> list[tuple[list[int], Tensor]]:
        """Return the metrics that the same rows have, together, and those rows (``n`` booleans)."""
        found: dict[bytes, list[int]] = {}
        measured = self.measured
        for j in range(len(self.metrics)):
            found.setdefault(measured[:, j].contiguous().numpy().tobytes(), []).append(j)
        return [(columns, measured[:, columns[0]]) for columns in found.values()]

    def without(self, values: Tensor, reason: str) -> Observations:
        """Return the rows with some values taken back, for a reason.

        Args:
            values: ``n x m`` booleans: which.
            reason: Recorded with the rows that had not failed.
        """
        hit = values.any(-1).tolist()
        taken = values | ~self.measured
        return dataclasses.replace(
            self,
            Y=torch.where(taken, torch.nan, self.Y),
            Yvar=torch.where(taken, torch.nan, self.Yvar),
            counts=torch.where(taken, torch.nan, self.counts),
            failures=tuple(
                reason if own is None and here else own
                for own, here in zip(self.failures, hit, strict=True)
            ),
        )

    def completed_by(self, again: Observations) -> Observations:
        """Return a further attempt (the same rows), with what only this one had measured.

        A value of the further attempt counts where it has one. A row that has all of its metrics
        by both together has not failed; its cost is that of both.
        """
        lacks = ~again.ok.unsqueeze(-1) & ~again.measured & self.measured
        if not bool(lacks.any()):
            return again

        def fill(before: Tensor, after: Tensor, where: Tensor = lacks) -> Tensor:
            return torch.where(where, before, after)

        gradients, noise = None, None
        if self.gradients is not None or again.gradients is not None:
            both = zip(self.filled_gradients(), again.filled_gradients(), strict=True)
            gradients, noise = (fill(a, b, lacks.unsqueeze(-1)) for a, b in both)
        whole = (again.measured | lacks).all(-1).tolist()
        more = lacks.any(-1)
        return dataclasses.replace(
            again,
            Y=fill(self.Y, again.Y),
            Yvar=fill(self.Yvar, again.Yvar),
            counts=fill(self.counts, again.counts),
            cost=torch.where(more, self.cost + again.cost, again.cost),
            failures=tuple(
                None if done and here else reason
                for reason, done, here in zip(again.failures, whole, more.tolist(), strict=True)
            ),
            gradients=gradients,
            gradient_variance=noise,
            recalled=torch.where(lacks, self.recalled, again.recalled),
            saved=torch.where(more, self.saved + again.saved, again.saved),
            examples=joined_examples(self.examples, again.examples),
        )

    def select(self, rows: Tensor | Sequence[int]) -> Observations:
        """Return the given rows (indices or a boolean mask) as observations."""
        index = torch.as_tensor(rows)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        parts = {name: getattr(self, name) for name in _BY_ROW}
        return dataclasses.replace(
            self,
            failures=tuple(self.failures[i] for i in index.tolist()),
            examples=tuple(self.examples[i] for i in index.tolist()),
            covariance=None if self.covariance is None else self.covariance[:, index][:, :, index],
            **{name: part[index] for name, part in parts.items() if part is not None},
        )

    def succeeded(self) -> Observations:
        """Return the rows that did not fail."""
        return self.select(self.ok)

    def append(self, other: Observations) -> Observations:
        """Return these rows followed by those of ``other``; the metrics must be the same."""
        if other.metrics != self.metrics or other.X.shape[-1] != self.X.shape[-1]:
            raise DataError(
                "observations of different problems cannot be joined: metrics "
                f"{[x.name for x in self.metrics]} with {self.X.shape[-1]} coefficients and "
                f"{[x.name for x in other.metrics]} with {other.X.shape[-1]}",
                hint="join observations with the same metrics and coefficients",
            )
        return Observations.joined([self, other], self.X.shape[-1], self.metrics)

    @classmethod
    def joined(
        cls, parts: Sequence[Observations], d: int, metrics: Sequence[Metric]
    ) -> Observations:
        """Return the rows of all ``parts`` (of ``metrics`` in ``d`` coefficients), in order."""
        if not parts:
            return cls.empty(d, metrics)
        gradients = (
            [part.filled_gradients() for part in parts]
            if any(part.gradients is not None for part in parts)
            else []
        )
        every = {name: [getattr(part, name) for part in parts] for name in _BY_ROW[:-2]}
        return cls(
            metrics=tuple(metrics),
            failures=tuple(reason for part in parts for reason in part.failures),
            gradients=torch.cat([value for value, _ in gradients]) if gradients else None,
            gradient_variance=torch.cat([noise for _, noise in gradients]) if gradients else None,
            examples=tuple(row for part in parts for row in part.examples),
            covariance=joined_covariance([(part.covariance, part.Yvar) for part in parts]),
            **{name: torch.cat(values) for name, values in every.items()},
        )

    def slopes(self) -> tuple[Tensor, Tensor]:
        """Return :meth:`filled_gradients`; its name in version 0.1."""
        warnings.warn(
            "Observations.slopes is now filled_gradients; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.filled_gradients()

    def filled_gradients(self) -> tuple[Tensor, Tensor]:
        """Return gradients and their variances, ``n x m x d`` each, NaN where there are none."""
        if self.gradients is None or self.gradient_variance is None:
            nothing = self.Y.new_full((*self.Y.shape, self.X.shape[-1]), torch.nan)
            return nothing, nothing
        return self.gradients, self.gradient_variance

    @classmethod
    def empty(cls, d: int, metrics: Sequence[Metric]) -> Observations:
        """Return observations with no rows in ``d`` coefficients."""
        return cls(
            X=torch.zeros(0, d, device="cpu"),
            Y=torch.zeros(0, len(metrics), device="cpu"),
            metrics=tuple(metrics),
        )

    @classmethod
    def failed(cls, X: Tensor, metrics: Sequence[Metric], reason: str) -> Observations:
        """Return rows for evaluations (``n x d``) that all failed for ``reason``."""
        return cls(
            X=X,
            Y=torch.full((len(X), len(metrics)), torch.nan, dtype=torch.float64, device="cpu"),
            metrics=tuple(metrics),
            failures=(reason,) * len(X),
        )


_FRONT_FIELDS = (
    *("X", "mean", "std", "lower", "upper", "real", "corrected", "probability", "feasible"),
)
_OF_POINTS = ("probability", "feasible")


@dataclass(frozen=True, eq=False)
class Front:
    """The answer of a run: ``k`` trade-offs, as predicted and, where verified, as measured.

    Predicted and real values live in fields of their own and are never mixed.

    Attributes:
        X: ``k x d`` coefficients.
        mean: ``k x m`` predicted metrics (posterior median, own units and directions).
        std: ``k x m`` predicted standard deviation of the metric, measurement noise excluded.
        lower: ``k x m`` lower end of the 95 % interval of what would be measured.
        upper: ``k x m`` upper end.
        real: ``k x m`` measured metrics; NaN where the point was not verified.
        corrected: ``k x m`` predicted metrics once the verified points are among the data; NaN
            where nothing was verified.
        probability: ``k`` posterior probabilities that nothing else in the front and nothing
            evaluated dominates the point; NaN where they were not computed.
        feasible: ``k`` probabilities that the point can be had: that its evaluation works, and
            that it keeps the constraints of the run, if any. NaN where there was nothing to judge
            it by: nothing failed, and there are no constraints.
        metrics: The ``m`` metrics.
    """

    X: Tensor
    mean: Tensor
    std: Tensor
    lower: Tensor
    upper: Tensor
    metrics: tuple[Metric, ...]
    real: Tensor = None  # type: ignore[assignment]
    corrected: Tensor = None  # type: ignore[assignment]
    probability: Tensor = None  # type: ignore[assignment]
    feasible: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "metrics", check_metrics(self.metrics))
        put(self, "X", double(self.X))
        k, m = len(self.X), len(self.metrics)
        for name in _FRONT_FIELDS[1:]:
            shape = (k,) if name in _OF_POINTS else (k, m)
            value = getattr(self, name)
            if value is None and name in ("real", "corrected", *_OF_POINTS):
                value = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            put(self, name, double(value))
            if getattr(self, name).shape != shape:
                raise DataError(
                    f"{name} of a front must have shape {shape}, got "
                    f"{tuple(getattr(self, name).shape)}",
                    hint="give one row per point and one column per metric",
                )
        for name in _OF_POINTS:
            value = getattr(self, name)
            if bool(((value < 0) | (value > 1)).any()):
                raise DataError(
                    f"probabilities of a front must be between 0 and 1, and some of {name} are not",
                    hint="use NaN where the probability is not known",
                )

    def __len__(self) -> int:
        return len(self.X)

    @property
    def verified(self) -> Tensor:
        """``k`` booleans: which points have been measured."""
        return torch.isfinite(self.real).all(-1)

    def with_real(self, rows: Sequence[int], values: Tensor) -> Front:
        """Return this front with measured ``values`` (``len(rows) x m``) at ``rows``."""
        real = self.real.clone()
        real[torch.as_tensor(list(rows), dtype=torch.long)] = double(values)
        return dataclasses.replace(self, real=real)

    def select(self, rows: Tensor | Sequence[int]) -> Front:
        """Return the given points (indices or a boolean mask)."""
        index = torch.as_tensor(rows)
        values = {name: getattr(self, name)[index] for name in _FRONT_FIELDS}
        return dataclasses.replace(self, **values)
