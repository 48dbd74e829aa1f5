"""From observations to a front: fit the surrogate, solve it, choose points to verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Front, Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import ascend
from map_bo.pareto.solver import solve_front
from map_bo.pareto.trust import Coverage, guard, penalise
from map_bo.rng import child
from map_bo.scale import Scale, farthest_rows, same_points, varied_metrics
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility, Requirements
from map_bo.surrogates.outliers import Outlier, Screening, fit_screened
from map_bo.surrogates.prediction import predict, predicted_mean
from map_bo.surrogates.surrogate import DescribesSelection, Surrogate, SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, validate
from map_bo.tracking.codec import encode_front, encode_scale, encode_tensor

__all__ = [
    "Recommendation",
    "corrections",
    "front_without_outliers",
    "notes_on_constraints",
    "notes_on_feasibility",
    "objectives",
    "of_columns",
    "recommend",
    "refit",
]


@dataclass(frozen=True, eq=False)
class Recommendation:
    """A predicted front and how it came about.

    Attributes:
        front: The predicted front, nothing verified.
        model: The fitted surrogate.
        verify: Rows of the front to measure, the most informative first.
        scale: The scale of the metrics.
        surrogate: What is recorded about the fit, as plain data.
        seconds: Time for fitting, for solving, and for assessing how certain the front is.
        kept: What the surrogate was fitted to: the observations without outliers.
        uncertainty: What the posterior says about the front as a whole, as plain data; see
            :class:`map_bo.loop.posterior.front_posterior.FrontUncertainty`.
    """

    front: Front
    model: SurrogateModel
    verify: list[int]
    scale: Scale
    surrogate: dict[str, Any]
    seconds: dict[str, float]
    kept: Observations
    uncertainty: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return all but the model as plain data, as it is recorded."""
        return {
            "front": encode_front(self.front),
            "verify": self.verify,
            "reference": encode_scale(self.scale),
            "surrogate": self.surrogate,
            "seconds": self.seconds,
            "uncertainty": dict(self.uncertainty),
        }


def _of(seen: Observations, columns: Tensor) -> tuple[Metric, ...]:
    """Return the metrics of some columns (``m`` booleans)."""
    return tuple(metric for metric, on in zip(seen.metrics, columns.tolist(), strict=True) if on)


def recommend(
    seen: Observations,
    space: CoefficientSpace,
    settings: Settings,
    *,
    generator: Generator,
) -> Recommendation:
    """Fit the surrogate to ``seen`` and solve it for the whole front.

    With ``settings.guard`` the front is kept where the data support the surrogate, and with
    ``settings.failures == "learn"`` where evaluations are likely to work. Metrics that
    never varied take no part in it. Where another one has no range, the front also holds the
    trade-offs without it, so that it can be a constraint and hides none of them.

    Raises:
        SurrogateError: When nothing succeeded.
    """
    start = time.perf_counter()
    screening = fit_screened(settings.run_surrogate, seen, space)
    fitted = time.perf_counter()
    model, every, seen = screening.model, seen, screening.kept
    scale = Scale.of(seen, space, settings.reference, settings.requirements.constraints)
    mean: Callable[[Tensor], Tensor] = predicted_mean(model)
    coverage = Coverage.of(seen.with_any().X, space) if settings.guard else None
    guarded = mean if coverage is None else guard(mean, coverage, scale=scale.width)
    feasibility = settings.requirements.given(every, space, model)
    if feasibility is not None:
        guarded = penalise(guarded, feasibility.excess, scale=scale.width)
    varied = objectives(seen, scale)
    likeliest = feasibility is not None and bool(scale.constrained.all())
    if feasibility is not None and likeliest:  # no objective is left but to keep the constraints
        searched = _likeliest(feasibility, coverage)
    else:
        searched = of_columns(guarded, varied)
    objective = seen.metrics[:1] if likeliest else _of(seen, varied)
    source = child(generator, "solve")
    X = solve_front(settings.solver, searched, space, metrics=objective, generator=source)
    ranged = scale.ranged & varied
    if bool(ranged.any()) and not torch.equal(ranged, varied) and not likeliest:
        searched = of_columns(guarded, ranged)
        source = child(generator, "solve", "ranged")
        objective = _of(seen, ranged)
        more = solve_front(settings.solver, searched, space, metrics=objective, generator=source)
        X = torch.cat([X, more])
    if coverage is not None:
        X = coverage.shrink(X)
    if feasibility is not None:
        X = _feasible(X, feasibility, coverage)
    if not likeliest:
        X = X[non_dominated(of_columns(mean, varied)(X).detach())]
    prediction = predict(model, X, seen)
    front = Front(
        X=X,
        mean=prediction.mean,
        std=prediction.std,
        lower=prediction.lower,
        upper=prediction.upper,
        metrics=seen.metrics,
    )
    if feasibility is not None:
        front = replace(front, feasible=feasibility.probability(X).detach())
    # A point measured before adds nothing, and an end of the front is often an expert.
    measured = same_points(X, seen.succeeded().X, space, tolerance=0.01)
    fresh = (~measured.any(-1)).nonzero().flatten()
    chosen = farthest_rows(scale.gains(front.mean[fresh]), settings.verifications)
    rows = [int(fresh[i]) for i in chosen]
    about: dict[str, Any] = {"settings": repr(settings.surrogate), "model": type(model).__name__}
    if isinstance(model, DescribesSelection):
        about["selection"] = model.describe_selection()
    if isinstance(model, LeavesOneOut):
        about["validation"] = validate(model).describe()
    if screening.outliers:
        about["outliers"] = [outlier.describe() for outlier in screening.outliers]
    seconds = {"fit": fitted - start, "solve": time.perf_counter() - fitted}
    return Recommendation(front, model, rows, scale, about, seconds, seen)


def objectives(seen: Observations, scale: Scale) -> Tensor:
    """Return ``m`` booleans: the objectives that ever varied; all objectives where none did."""
    found = varied_metrics(seen) & ~scale.constrained
    return found if bool(found.any()) else ~scale.constrained


def notes_on_constraints(requirements: Requirements) -> list[str]:
    """Return what a reader must know of the constraints."""
    if not requirements.constraints:
        return []
    return [
        f"constraints: {', '.join(map(str, requirements.constraints))}; constrained metrics are "
        "no objectives: they take no part in hypervolumes and preferences"
    ]


def notes_on_feasibility(front: Front, requirements: Requirements) -> list[str]:
    """Return what a reader must know of a front without points that are likely feasible."""
    constraints, notes = requirements.constraints, list[str]()
    likely = front.feasible
    if len(front) and bool((likely < requirements.least).all()):
        row = int(likely.argmax())
        names = [metric.name for metric in front.metrics]
        values = ", ".join(
            f"{name} = {float(front.mean[row, names.index(name)]):.4g}"
            for name in dict.fromkeys(one.metric for one in constraints)
        )
        notes.append(
            f"no point was found that is feasible with probability {requirements.least:g}: the "
            f"front is what comes nearest, feasible with probability {float(likely[row]):.2g}"
            + (f" (predicted {values})" if values else "")
        )
    return notes


def _likeliest(feasibility: Feasibility, coverage: Coverage | None) -> Callable[[Tensor], Tensor]:
    def likely(X: Tensor) -> Tensor:
        return feasibility.log_probability(X).unsqueeze(-1)

    return likely if coverage is None else guard(likely, coverage)


def _feasible(X: Tensor, feasibility: Feasibility, coverage: Coverage | None) -> Tensor:
    """Return the rows that a front may hold, those beyond its edge drawn in.

    Where there are none, it is the one that comes nearest.
    """
    allowed = feasibility.allows(X)
    if not bool(allowed.all()):
        moved = ascend(lambda Z: -feasibility.excess(Z), X=X[~allowed], space=feasibility.space)
        X = torch.cat([X[allowed], moved])
        allowed = feasibility.allows(X)
    if bool(allowed.any()):
        return X[allowed]
    some = X[:: max(1, len(X) // 16)]
    nearer = ascend(lambda Z: _likeliest(feasibility, coverage)(Z)[:, 0], feasibility.space, some)
    X = torch.cat([X, nearer if coverage is None else coverage.shrink(nearer)])
    with torch.no_grad():
        return X[feasibility.log_probability(X).argmax()].unsqueeze(0)


def of_columns(mean: Callable[[Tensor], Tensor], columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``mean`` (``n x d`` to ``n x m``) of the metrics in ``columns`` (``m`` booleans)."""
    if bool(columns.all()):
        return mean
    return lambda X: mean(X)[:, columns]


def front_without_outliers(state: RunState, outliers: Sequence[Outlier]) -> Front:
    """Return the front of a run without the real values that were set aside."""
    assert state.front is not None
    front, done, searched = state.front, sorted(state.verified), len(state.outcomes)
    names, real = [metric.name for metric in front.metrics], front.real.clone()
    for outlier in outliers:
        if searched <= outlier.row < searched + len(done) and outlier.metric in names:
            real[done[outlier.row - searched], names.index(outlier.metric)] = torch.nan
    return replace(front, real=real)


def refit(state: RunState, space: CoefficientSpace, surrogate: Surrogate) -> Screening | None:
    """Return the fit of the surrogate to the search and the verification together.

    None when no verification succeeded.

    Raises:
        SurrogateError: When it cannot be fitted.
    """
    if not bool(state.verification.ok.any()):
        return None
    return fit_screened(surrogate, state.data, space)


def corrections(
    state: RunState, space: CoefficientSpace, settings: Settings
) -> tuple[Screening | None, dict[str, Any], str | None]:
    """Fit again with the verified points among the data, for new predictions of the front.

    Returns:
        The fit, or None when nothing was verified or it cannot be done; what is to be recorded:
        the predictions and, where something failed, the points' probabilities of being feasible;
        and why it cannot be done.
    """
    try:
        again = refit(state, space, settings.run_surrogate)
    except SurrogateError as error:
        return None, {}, f"the predictions could not be corrected: {error.reason}"
    front, found = state.front, {}
    done = state.summary is not None or front is None or bool(front.corrected.isfinite().any())
    if front is not None and not done and len(state.verification):
        if again is not None:
            found["corrected"] = encode_tensor(predict(again.model, front.X).mean)
        fitted = settings.run_surrogate.fit(state.seen, space) if again is None else again.model
        feasibility = settings.requirements.given(state.data, space, fitted)
        if feasibility is not None:
            with torch.no_grad():
                found["feasible"] = encode_tensor(feasibility.probability(front.X))
    return again, found, None
