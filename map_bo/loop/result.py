"""What a run returns: the front, what was measured, and the way from a preference to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations, directions, to_maximisation
from map_bo.errors import MergeError, PreferenceError, StoreError
from map_bo.loop.recommend import Reference
from map_bo.loop.state import RunState
from map_bo.pareto.gradient import ascend
from map_bo.pareto.preferences import Preference, choose, shortfall, utility
from map_bo.pareto.trust import Coverage, guard
from map_bo.problems.problem import Problem
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict, predicted_mean
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.tracking.codec import decode_tensor

__all__ = ["Choice", "Exportable", "Result"]

# How much the utility of a choice (1 is the best expert) must gain to leave the front's points.
_NOTICEABLE = 2e-3


@runtime_checkable
class Exportable(Protocol):
    """A problem whose points are models that can be written to disk."""

    def export(self, x: Tensor, out: str | Path, *, record: Mapping[str, Any]) -> Path:
        """Write the model with coefficients ``x`` (``d``) into the directory ``out``."""
        ...


@dataclass(frozen=True, eq=False)
class Choice:
    """One point of a front, chosen by preference or by number.

    Attributes:
        point: Row of the front; the nearest one when ``refined``.
        x: ``d`` coefficients.
        mean: ``m`` predicted metrics, own units.
        lower: ``m`` lower ends of their 95 % intervals.
        upper: ``m`` upper ends.
        real: ``m`` measured metrics, NaN where the point was not verified.
        metrics: The metrics.
        space: The coefficients.
        preference: What it was chosen by, or None when chosen by number.
        refined: Whether the surrogate was solved for this very preference, starting from
            ``point``, because that promised more than the point itself.
        problem: The problem, needed to export.
    """

    point: int
    x: Tensor
    mean: Tensor
    lower: Tensor
    upper: Tensor
    real: Tensor
    metrics: tuple[Metric, ...]
    space: CoefficientSpace
    preference: Preference | None = None
    refined: bool = False
    problem: Problem | None = None

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients by name."""
        return dict(zip(self.space.names, self.x.tolist(), strict=True))

    def describe(self) -> dict[str, Any]:
        """Return the choice as plain data, predicted and real apart."""

        def named(values: Tensor) -> dict[str, float | None]:
            return {
                metric.name: value if value == value else None
                for metric, value in zip(self.metrics, values.tolist(), strict=True)
            }

        return {
            "point": self.point,
            "refined": self.refined,
            "coefficients": self.coefficients,
            "predicted": named(self.mean),
            "predicted_lower": named(self.lower),
            "predicted_upper": named(self.upper),
            "real": named(self.real),
            "preference": None if self.preference is None else asdict(self.preference),
        }

    def export(self, out: str | Path) -> Path:
        """Merge with these coefficients and write the model, its recipe and a mergekit file.

        Raises:
            MergeError: When the problem has no models (a table, a formula), or ``out`` exists.
        """
        if not isinstance(self.problem, Exportable):
            raise MergeError(
                f"{type(self.problem).__name__} has no models to merge",
                hint="export works for problems whose points are merged checkpoints",
            )
        return self.problem.export(self.x, out, record={"choice": self.describe()})


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a run.

    Attributes:
        front: Predicted trade-offs, with real values where they were verified.
        seen: Everything the search evaluated, failures included.
        verification: What was measured at front points at the end.
        reference: The reference point, the other end of the scale, and the rule.
        summary: Plain data, as written to ``summary.json``.
        space: The coefficients.
        problem: The problem, when it is at hand.
        model: The fitted surrogate, when it was fitted in this process.
        run_dir: Where the run was recorded, if anywhere.
        guarded: Whether the front was kept where the data support the surrogate.
    """

    front: Front
    seen: Observations
    verification: Observations
    reference: Reference
    summary: Mapping[str, Any]
    space: CoefficientSpace
    problem: Problem | None = None
    model: SurrogateModel | None = None
    run_dir: Path | None = None
    guarded: bool = True

    @classmethod
    def of(
        cls,
        state: RunState,
        space: CoefficientSpace,
        *,
        problem: Problem | None = None,
        model: SurrogateModel | None = None,
        run_dir: Path | None = None,
    ) -> Result:
        """Return the result that the state of a run stands for.

        Raises:
            StoreError: When the run has no front yet.
        """
        if state.front is None:
            raise StoreError(
                f"the run has no front yet: {len(state.outcomes)} evaluations are recorded",
                hint="finish it with `map-bo resume`",
            )
        scale = state.front_data["reference"]
        reference = Reference(
            decode_tensor(scale["point"]), decode_tensor(scale["best"]), scale["rule"]
        )
        return cls(
            front=state.front,
            seen=state.seen,
            verification=state.verification,
            reference=reference,
            summary=state.summary or {},
            space=space,
            problem=problem,
            model=model,
            run_dir=run_dir,
            guarded=bool(state.created.get("settings", {}).get("guard", True)),
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of all columns."""
        return self.front.metrics

    def choose(
        self,
        prefer: Mapping[str, float] | None = None,
        *,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        rule: Literal["weighted_sum", "chebyshev"] = "weighted_sum",
    ) -> Choice:
        """Return the merge that suits a preference best, at no further evaluation.

        The best point of the front is taken; when the surrogate is at hand and, solved for this
        very preference, promises noticeably more than that point, its solution is.

        Args:
            prefer: Weight of each metric; those not named weigh nothing, none named weighs all
                alike. Metrics are scaled between the reference point and the best expert first.
            at_least: Bounds from below on predicted metrics, in their own units.
            at_most: Bounds from above.
            rule: How weights become one number.

        Raises:
            PreferenceError: On an unknown metric, bad weights, or bounds no point satisfies.
        """
        preference = Preference(
            weights=dict(prefer or {}),
            at_least=dict(at_least or {}),
            at_most=dict(at_most or {}),
            rule=rule,
        )
        scale = {"reference": self.reference.point, "best": self.reference.best}
        row = choose(self.front.mean, self.metrics, preference, **scale)
        x = self._refined(row, preference)
        return self._choice(row, preference) if x is None else self._refinement(row, x, preference)

    def _refined(self, row: int, preference: Preference) -> Tensor | None:
        """Solve the surrogate for one preference, from the front point that suits it best.

        Returns:
            ``d`` coefficients, or None when that promises no noticeably better model: then the
            front point stays, whose metrics may have been measured.
        """
        if self.model is None:
            return None
        mean = predicted_mean(self.model)
        width = (self.reference.best - self.reference.point).abs()
        coverage = Coverage.of(self.seen.succeeded().X, self.space) if self.guarded else None
        guarded = mean if coverage is None else guard(mean, coverage, scale=width)

        def gain(X: Tensor) -> Tensor:
            values = to_maximisation(guarded(X), self.metrics)
            wanted = utility(
                values,
                self.metrics,
                preference,
                reference=self.reference.point,
                best=self.reference.best,
            )
            return wanted - 10 * shortfall(values, self.metrics, preference, scale=width)

        start = self.front.X[row : row + 1]
        x = ascend(gain, self.space, start)
        x = x if coverage is None else coverage.shrink(x)
        before, after = (float(gain(point).detach()) for point in (start, x))
        missed = shortfall(to_maximisation(mean(x), self.metrics), self.metrics, preference)
        keeps = float(missed.detach()) <= 0
        return x[0] if keeps and after > before + _NOTICEABLE else None

    def _refinement(self, row: int, x: Tensor, preference: Preference) -> Choice:
        assert self.model is not None
        prediction = predict(self.model, x.unsqueeze(0))
        return replace(
            self._choice(row, preference),
            x=x,
            mean=prediction.mean[0],
            lower=prediction.lower[0],
            upper=prediction.upper[0],
            real=torch.full((len(self.metrics),), torch.nan, dtype=torch.float64),
            refined=True,
        )

    def point(self, number: int) -> Choice:
        """Return a front point by its number (its row in ``front.csv``)."""
        if not 0 <= number < len(self.front):
            raise PreferenceError(
                f"the front has no point {number}",
                hint=f"points are numbered 0 to {len(self.front) - 1}; see front.csv",
            )
        return self._choice(number, None)

    def _choice(self, row: int, preference: Preference | None) -> Choice:
        front = self.front
        return Choice(
            point=row,
            x=front.X[row],
            mean=front.mean[row],
            lower=front.lower[row],
            upper=front.upper[row],
            real=front.real[row],
            metrics=self.metrics,
            space=self.space,
            preference=preference,
            problem=self.problem,
        )

    def optimism(self) -> dict[str, float | None]:
        """Return, for each metric, the mean of predicted minus real over the verified points.

        Positive means that the prediction was too good, whatever the metric's direction.
        """
        rows = self.front.verified
        gap = (self.front.mean - self.front.real)[rows] * directions(self.metrics)
        mean = gap.mean(0) if bool(rows.any()) else torch.full((len(self.metrics),), torch.nan)
        return {
            metric.name: value if value == value else None
            for metric, value in zip(self.metrics, mean.tolist(), strict=True)
        }
