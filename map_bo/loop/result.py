"""What a run returns: the front, all measurements, and the way from a preference to a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan, sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from map_bo.constraints import AtLeast, AtMost
from map_bo.data import Front, Metric, Observations, directions, to_maximisation
from map_bo.errors import MapBoError, PreferenceError, StoreError
from map_bo.evaluators.isolation.world import own_maths
from map_bo.loop.recommend import front_without_outliers, notes_on_feasibility
from map_bo.loop.state import RunState
from map_bo.loop.verdict.bounds import holding, holding_by_interval, missed_bounds
from map_bo.loop.verdict.chosen import Choice, with_probability
from map_bo.loop.verdict.confirm import CONFIRMED, Confirmation
from map_bo.loop.verdict.confirming import confirm_choice, judge_choice, measure_choice
from map_bo.loop.verdict.gain import (
    PosteriorGain,
    joint_draws,
    measured_blend,
    posterior_gain,
    value_draws,
)
from map_bo.loop.verdict.verdict import Verdict
from map_bo.pareto.gradient import ascend
from map_bo.pareto.preferences import (
    Preference,
    check_names,
    choose,
    numbers_by_name,
    shortfall,
    utility,
)
from map_bo.pareto.trust import Coverage, guard, penalise
from map_bo.plain import from_plain
from map_bo.problems.problem import Exportable, Problem
from map_bo.rng import make_generator
from map_bo.scale import Scale, same_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility, Requirements
from map_bo.surrogates.outliers import Outlier
from map_bo.surrogates.prediction import NORMAL_975, predict, predicted_mean
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.tracking.codec import decode_scale
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event
from map_bo.workers.workers import Workers

__all__ = ["Choice", "Exportable", "Result", "recorded_requirements"]

# Gain in utility (1 is the best expert) from which a solution is preferred to the front's points.
_NOTICEABLE = 2e-3


def recorded_requirements(settings: Mapping[str, Any]) -> Requirements:
    """Return what the points of a recorded run have to fulfil, by its settings as plain data."""
    default = Requirements()
    return Requirements(
        failures=settings.get("failures", default.failures),
        least=settings.get("least_feasible", default.least),
        constraints=tuple(map(from_plain, settings.get("constraints") or ())),
    )


@dataclass(frozen=True, eq=False)
class Result:
    """The outcome of a run.

    Attributes:
        front: Predicted trade-offs, with real values where they were verified.
        seen: Every evaluation of the search, failures included.
        verification: The measurements of front points at the end.
        scale: The reference point, the other end of the scale, and the rule.
        summary: Plain data, as written to ``summary.json``.
        space: The coefficients.
        problem: The problem, when it is available.
        model: The surrogate that predicted the front, when it was fitted in this process.
        refitted: The surrogate fitted to the search and the verification together, when anything
            was verified and it was fitted in this process.
        run_dir: Where the run was recorded, if anywhere.
        guarded: Whether the front was kept where the data support the surrogate.
        posterior: The uncertainty that was recorded with the front.
        requirements: What the points of the run have to fulfil.
        confirmed: Points that were measured for real after the run, in their order.
        settings: The settings of the run as plain data.
    """

    front: Front
    seen: Observations
    verification: Observations
    scale: Scale
    summary: Mapping[str, Any]
    space: CoefficientSpace
    problem: Problem | None = None
    model: SurrogateModel | None = None
    run_dir: Path | None = None
    guarded: bool = True
    refitted: SurrogateModel | None = None
    posterior: Mapping[str, Any] = field(default_factory=dict)
    requirements: Requirements = field(default_factory=Requirements)
    confirmed: tuple[Confirmation, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        state: RunState,
        space: CoefficientSpace,
        *,
        problem: Problem | None = None,
        model: SurrogateModel | None = None,
        refitted: SurrogateModel | None = None,
        run_dir: Path | None = None,
        outliers: Sequence[Outlier] | None = None,
    ) -> Result:
        """Return the result of a run by its state.

        A verified value that was set aside as an outlier is no real value of the front; it stays
        among the measurements. Which these are is ``outliers``, or what the summary says.

        Raises:
            StoreError: When the run has no front yet.
        """
        if state.front is None:
            raise StoreError(
                f"the run has no front yet: {len(state.outcomes)} evaluations are recorded",
                hint="finish it with `map-bo resume`",
            )
        if outliers is None:
            listed = (state.summary or {}).get("outliers", ())
            outliers = [Outlier.read(one) for one in listed]
        return cls(
            front=front_without_outliers(state, outliers),
            seen=state.seen,
            verification=state.verification,
            scale=decode_scale(state.front_data["reference"], state.metrics),
            summary=state.summary or {},
            space=space,
            problem=problem,
            model=model,
            refitted=refitted,
            run_dir=run_dir,
            guarded=bool(state.created.get("settings", {}).get("guard", True)),
            posterior=state.front_data.get("uncertainty", {}),
            requirements=recorded_requirements(state.created.get("settings", {})),
            settings=state.created.get("settings", {}),
        )

    @property
    def reference(self) -> Scale:
        """The name of :attr:`scale` in version 0.1."""
        warnings.warn(
            "Result.reference is now Result.scale; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.scale

    @property
    def is_corrected(self) -> bool:
        """Whether the front has corrected predictions."""
        return len(self.front) > 0 and bool(torch.isfinite(self.front.corrected).all())

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of all columns."""
        return self.front.metrics

    @own_maths()
    def choose(
        self,
        prefer: Mapping[str, float] | None = None,
        *,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        rule: Literal["weighted_sum", "chebyshev"] = "weighted_sum",
        confidence: float | None = 0.9,
        corrected: bool = True,
        keep_blend: bool = True,
    ) -> Choice:
        """Return the merge that suits a preference best, without a further evaluation.

        It is the best point of the front; or, if optimising the surrogate (when it is available)
        for exactly this preference gives a noticeably better merge, that merge. Unless that is
        clearly better than the uniform blend (:mod:`map_bo.loop.verdict.gain`), the choice is the
        uniform blend, where it was measured and keeps the bounds. Where points were verified, all
        are judged by the corrected predictions. Points that are likely to be infeasible
        (:attr:`map_bo.data.Front.feasible`) are chosen only where there are no others.

        Bounds are to hold when the merge is measured, not only in the prediction: the choice keeps
        them with probability ``confidence`` under the posterior, measurement noise included, and
        states that probability. A point that was measured on the examples of every evaluation is
        judged by what was measured. Where nothing keeps them so surely, the most probable point
        is returned, with a note. The constraints of the run are such bounds, unless others are
        given for the same metric.

        Args:
            prefer: Weight of each metric; metrics that are not named have no weight, and when none
                is named all weigh alike. Metrics are first scaled between the reference point and
                the best expert.
            at_least: Lower bounds on metrics, in their own units.
            at_most: Upper bounds.
            rule: How the weighted metrics become one number.
            confidence: Probability with which the bounds are to hold together; None for bounds on
                the predictions alone.
            corrected: Whether to use the corrected predictions where there are any, instead of
                those that the front was solved with.
            keep_blend: Whether the uniform blend stays where nothing is clearly better.

        Raises:
            PreferenceError: On an unknown metric, bad weights, or bounds that no point satisfies.
        """
        least, most = self._bounds()
        preference = Preference(
            weights=numbers_by_name("prefer", prefer),
            at_least={**least, **numbers_by_name("at_least", at_least)},
            at_most={**most, **numbers_by_name("at_most", at_most)},
            rule=rule,
            confidence=confidence,
        )
        check_names(preference, [metric.name for metric in self.metrics])
        corrected = corrected and self.is_corrected
        values = self.front.corrected if corrected else self.front.mean
        model = self.refitted if corrected else self.model
        holds = self._holds(values, preference, model) if preference.bounded else None
        rows = self._usable()
        likely = None if holds is None else holds[rows]
        row = rows[choose(values[rows], preference, self.scale, probability=likely)]
        x = self._refined(row, preference, model)
        if x is None:
            choice = self._choice(row, preference)
            likely = None if holds is None else holds[row]
        else:
            choice = self._refinement(row, x, preference)
            likely = None if holds is None or model is None else holding(model, x[None], preference)
        if likely is not None:
            choice = with_probability(choice, float(likely))
        return self._or_blend(choice, model) if keep_blend else choice

    def _or_blend(self, choice: Choice, model: SurrogateModel | None) -> Choice:
        """Return a choice, or the uniform blend where the choice is not clearly better."""
        at, preference = measured_blend(self.seen, self.space), choice.preference
        if at is None or preference is None:
            return choice
        blend = self.seen.select([at])
        bounded, width = preference.bounded, self.front.upper - self.front.lower
        half = width[choice.point] / 2
        likely = self._blend_holds(blend, preference, model, half) if bounded else 1.0
        if likely < (preference.confidence or 0.5):
            return choice
        if bool(same_points(choice.x[None], blend.X, self.space)):
            return replace(choice, blend=True)
        source, known = make_generator(0), self.seen.append(self.verification)
        same = same_points(choice.x[None], known.X, self.space)[0] & known.ok
        if bool(same.any()):  # judged by what was measured, whatever a fit without it predicts
            draws = known.Y[same].mean(0).expand(2, -1)
        elif model is None:
            real = torch.where(torch.isfinite(choice.real), choice.real, choice.expected)
            draws = value_draws(real, self.front.std[choice.point], generator=source)
        else:
            fitted = self.seen if model is self.model else self.seen.append(self.verification)
            X = choice.x[None]
            draws = joint_draws(model, X, fitted, self.space, generator=source)[:, 0]
        gain = posterior_gain(draws, known, at, preference, self.scale)
        unsure = choice.probability is not None and choice.probability < (
            preference.confidence or 0.0
        )
        if gain.counts and not unsure:
            return replace(choice, gain=gain)
        return self._blend(blend, choice, gain, likely if bounded else None)

    def _blend_holds(
        self,
        blend: Observations,
        preference: Preference,
        model: SurrogateModel | None,
        half: Tensor,
    ) -> float:
        """Return the probability that the measured blend keeps the bounds when measured again.

        Without the surrogate its interval is as wide as those of the front: ``half`` (``m``) of it.
        """
        if float(shortfall(blend.Y, self.metrics, preference)) > 0:
            return 0.0
        bounded = {*preference.at_least, *preference.at_most}
        if all(m.resampling == "same" for m in self.metrics if m.name in bounded):
            return 1.0
        if model is not None:
            return float(holding(model, blend.X, preference))
        low, high = blend.Y - half, blend.Y + half
        return float(holding_by_interval(blend.Y, low, high, preference, self.metrics))

    def _blend(
        self, blend: Observations, choice: Choice, gain: PosteriorGain, likely: float | None
    ) -> Choice:
        """Return the uniform blend as a choice, in place of another."""
        real = blend.Y[0]
        half = NORMAL_975 * blend.Yvar[0].nan_to_num(0.0).sqrt()
        mean, lower, upper, again = real, real - half, real + half, real
        if self.model is not None:
            told = predict(self.model, blend.X, self.seen)
            mean, lower, upper = told.mean[0], told.lower[0], told.upper[0]
            again = torch.full_like(real, nan)
        if self.refitted is not None:
            again = predict(self.refitted, blend.X).mean[0]
        note = (
            "keep the uniform blend: nothing that was measured or predicted is clearly better; "
            "--no-blend (keep_blend=False) gives the best other merge for this preference"
        )
        kept = replace(
            self._choice(choice.point, choice.preference),
            x=blend.X[0],
            mean=mean,
            lower=lower,
            upper=upper,
            real=real,
            corrected=again,
            feasible=nan,
            gain=gain,
            blend=True,
        )
        kept = replace(kept, notes=(*kept.notes, note))
        return kept if likely is None else with_probability(kept, likely)

    def _holds(
        self, values: Tensor, preference: Preference, model: SurrogateModel | None
    ) -> Tensor:
        """Return the probability that the bounds hold at each point of the front (``k``)."""
        front = self.front
        if model is None:
            shift = values - front.mean
            likely = holding_by_interval(
                values, front.lower + shift, front.upper + shift, preference, self.metrics
            )
        else:
            likely = holding(model, front.X, preference)
        known = torch.isfinite(front.real).all(-1)
        missed = shortfall(front.real.nan_to_num(), self.metrics, preference) > 0
        same = all(
            metric.resampling == "same"
            for metric in self.metrics
            if metric.name in {*preference.at_least, *preference.at_most}
        )
        # What is measured again on the same examples comes out the same.
        likely = torch.where(known & missed, torch.zeros_like(likely), likely)
        return torch.where(known & ~missed, torch.ones_like(likely), likely) if same else likely

    def feasibility(self) -> Feasibility | None:
        """Return how likely any point is feasible, by all that was measured; None where all are."""
        seen = self.seen.append(self.verification)
        return self.requirements.given(seen, self.space, self.refitted or self.model)

    def _bounds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the constraints of the run as lower and upper bounds; none if none can be kept."""
        likely = self.front.feasible
        if bool((likely < self.requirements.least).all()) and len(likely):
            return {}, {}
        constraints = self.requirements.constraints
        return (
            {one.metric: one.bound for one in constraints if isinstance(one, AtLeast)},
            {one.metric: one.bound for one in constraints if isinstance(one, AtMost)},
        )

    def _usable(self) -> list[int]:
        """Return the rows of the front to choose among: those that are likely to be feasible."""
        feasible = self.front.feasible
        usable = feasible.isnan() | (feasible >= self.requirements.least)
        if not bool(usable.any()) and len(feasible):
            usable = feasible == feasible.max()
        return [int(row) for row in usable.nonzero().flatten()]

    def _refined(
        self, row: int, preference: Preference, model: SurrogateModel | None
    ) -> Tensor | None:
        """Optimise the surrogate for one preference, from the front point that suits it best.

        Returns:
            ``d`` coefficients, or None when no noticeably better model is predicted: then the
            front point is kept, whose metrics may have been measured.
        """
        if model is None:
            return None
        mean = predicted_mean(model)
        width = self.scale.width
        # The search alone: the front was kept inside what it covers, and verification lies there.
        coverage = Coverage.of(self.seen.with_any().X, self.space) if self.guarded else None
        guarded = mean if coverage is None else guard(mean, coverage, scale=width)
        feasibility = self.feasibility()
        region = None if feasibility is None else feasibility.region
        if feasibility is not None:
            guarded = penalise(guarded, feasibility.excess, scale=width)

        def missed(X: Tensor) -> Tensor:
            return missed_bounds(model, X, preference, width)

        def gain(X: Tensor) -> Tensor:
            values = to_maximisation(guarded(X), self.metrics)
            wanted = utility(values, preference, self.scale) - 10 * missed(X)
            # A model that cannot be had is worth nothing, so one that may fail is worth less.
            return wanted if region is None else wanted + region.log_probability(X)

        start = self.front.X[row : row + 1]
        x = ascend(gain, self.space, start)
        x = x if coverage is None else coverage.shrink(x)
        if feasibility is not None and not bool(feasibility.allows(x)):
            return None
        before, after = (float(gain(point).detach()) for point in (start, x))
        keeps = float(missed(x).detach()) <= 0
        return x[0] if keeps and after > before + _NOTICEABLE else None

    def _refinement(self, row: int, x: Tensor, preference: Preference) -> Choice:
        best = self.model or self.refitted
        assert best is not None
        prediction = predict(best, x.unsqueeze(0), self.seen)
        unknown = torch.full((len(self.metrics),), torch.nan, dtype=torch.float64)
        again = None if self.refitted is None else predict(self.refitted, x.unsqueeze(0))
        feasibility = self.feasibility()
        return replace(
            self._choice(row, preference),
            x=x,
            mean=prediction.mean[0],
            lower=prediction.lower[0],
            upper=prediction.upper[0],
            real=unknown,
            feasible=nan if feasibility is None else float(feasibility.probability(x[None])),
            corrected=unknown if again is None else again.mean[0],
            refined=True,
        )

    @own_maths()
    def verdict(self, choice: Choice | None = None) -> Verdict:
        """Return whether a choice is better than the uniform blend, the base and each expert.

        Where the choice is the uniform blend, the best other merge is compared with it, so that
        the verdict says whether anything is distinguishable from the blend.

        Args:
            choice: The choice; by default that for all metrics alike.
        """
        choice = self.choose() if choice is None else choice
        return judge_choice(self, choice, self._beside(choice))

    def brief_verdict(self) -> dict[str, Any]:
        """Return the verdict on the choice for all metrics alike, as part of a summary.

        Empty where there is nothing to choose, or nothing to judge it by: what was measured is
        recorded whatever comes of that.
        """
        try:
            found = self.verdict()
        except (MapBoError, ArithmeticError, RuntimeError, ValueError):
            return {}
        return {"verdict": found.describe()} if found.comparisons else {}

    def _beside(self, choice: Choice) -> Choice:
        """Return the choice for the same preference whether or not the blend is as good."""
        preference = choice.preference
        if preference is None or not choice.blend:
            return choice
        return self.choose(
            preference.weights or None,
            at_least=preference.at_least,
            at_most=preference.at_most,
            rule=preference.rule,
            confidence=preference.confidence,
            keep_blend=False,
        )

    @own_maths()
    def measure(self, choice: Choice | None = None, *, workers: Workers | None = None) -> Result:
        """Return the result with a choice measured for real on the examples of the search.

        The measurement is recorded where the run is, and is the last of :attr:`confirmed`.

        Args:
            choice: The choice; by default that for all metrics alike.
            workers: Who evaluates; None evaluates here.

        Raises:
            MergeError: When the problem is not available.
            EvaluationError: When it cannot be measured.
        """
        choice = self.choose() if choice is None else choice
        return self._recorded(measure_choice(self, choice, self._beside(choice), workers=workers))

    @own_maths()
    def confirm(
        self,
        choice: Choice | None = None,
        *,
        on: Problem | None = None,
        workers: Workers | None = None,
    ) -> Result:
        """Return the result with a choice, the blend, the experts and the base confirmed.

        All of them are measured on examples that the search never saw, and recorded where the run
        is; the confirmation is the last of :attr:`confirmed`.

        Args:
            choice: The choice; by default that for all metrics alike.
            on: The same problem with other examples, such as those of test sets; by default the
                run's own problem on what its ``holdout`` has kept from the search.
            workers: Who evaluates, holding that problem; None evaluates here.

        Raises:
            MergeError: When the problem is not available.
            ConfigError: When nothing was held out and no other problem is given.
            EvaluationError: When the choice cannot be measured.
        """
        choice = self.choose() if choice is None else choice
        return self._recorded(confirm_choice(self, choice, on=on, workers=workers))

    def _recorded(self, found: Confirmation) -> Result:
        """Return the result with a confirmation, once it is recorded."""
        if self.run_dir is not None:
            store = JsonlStore.open(self.run_dir)
            with store.lock():
                store.append(Event(CONFIRMED, found.describe()))
        return replace(self, confirmed=(*self.confirmed, found))

    def point(self, number: int) -> Choice:
        """Return a front point by its number (its row in ``front.csv``)."""
        if not 0 <= number < len(self.front):
            raise PreferenceError(
                f"the front has no point {number}",
                hint=f"choose a point from 0 to {len(self.front) - 1}; front.csv lists them",
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
            corrected=front.corrected[row],
            metrics=self.metrics,
            space=self.space,
            feasible=float(front.feasible[row]),
            preference=preference,
            notes=()
            if preference is None
            else (*self.scale.notes(), *notes_on_feasibility(front, self.requirements)),
            problem=self.problem,
        )

    @own_maths()
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

    @own_maths()
    def uncertainty(self) -> dict[str, Any]:
        """Return how certain the front is, as plain data, as in ``summary.json``.

        ``hypervolume`` is the posterior of the real hypervolume of the front's points. ``optimism``
        holds four values per metric, positive when the prediction was too good: ``left_out``
        (leaving evaluations out) and ``simulated`` (assuming that the surrogate is right) are
        estimates without verification; ``measured`` is :meth:`optimism` with its standard error,
        which includes measurement noise; ``corrected`` is by how much the corrected predictions
        lie below those of the front, on average over all its points.
        """
        front, names = self.front, [metric.name for metric in self.metrics]
        gap = (front.mean - front.real)[front.verified] * directions(self.metrics)
        count = len(gap)
        error = gap.std(0) / sqrt(count) if count > 1 else gap.new_full((len(names),), nan)
        shift = ((front.mean - front.corrected) * directions(self.metrics)).mean(0)
        optimism = dict(self.posterior.get("optimism", {}))
        optimism["measured"] = {
            name: {"mean": mean, "se": se if se == se else None, "points": count}
            for (name, mean), se in zip(self.optimism().items(), error.tolist(), strict=True)
        }
        optimism["corrected"] = {
            name: value if value == value else None
            for name, value in zip(names, shift.tolist(), strict=True)
        }
        return {"hypervolume": self.posterior.get("hypervolume"), "optimism": optimism}
