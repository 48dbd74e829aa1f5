"""From observations to a front: fit the surrogate, solve it, choose points to verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Front, Metric, Observations, to_maximisation
from map_bo.errors import DataError, SurrogateError
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.trust import Coverage, guard
from map_bo.rng import child
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict, predicted_mean
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, validate
from map_bo.tracking.codec import encode_front, encode_tensor

__all__ = [
    "Recommendation",
    "Reference",
    "recommend",
    "reference_of",
    "refit",
    "scaled_gains",
    "spread_rows",
]


@dataclass(frozen=True, eq=False)
class Reference:
    """The two ends that metrics are scaled between, in the metrics' own units.

    Attributes:
        point: ``m`` values; only what beats all of them earns hypervolume.
        best: ``m`` values of the best single experts, the other end of the scale.
        rule: Where the point comes from, for the reader.
    """

    point: Tensor
    best: Tensor
    rule: str


def reference_of(
    seen: Observations, space: CoefficientSpace, given: Mapping[str, float] | None = None
) -> Reference:
    """Return the reference point of a run.

    By default it is, for each metric, the worst value among the base model and the experts as
    they were measured in the run, and the other end of the scale is the best of the experts.
    Where a run measured none of them, the worst and best observed values stand in, and the rule
    says so.

    Raises:
        DataError: When ``given`` does not name exactly the metrics.
        SurrogateError: When no evaluation succeeded.
    """
    metrics = seen.metrics
    seen = seen.succeeded()
    if not len(seen):
        raise SurrogateError(
            "no evaluation succeeded, so there is nothing to fit",
            hint="look at the reasons of the failures in events.jsonl",
        )
    gains = to_maximisation(seen.Y, metrics)
    anchors = space.anchors()
    kinds = {
        kind: [
            row
            for row, x in enumerate(seen.X)
            for name_kind, anchor in zip(anchors.kinds, anchors.X, strict=True)
            if name_kind == kind and torch.allclose(x, anchor, rtol=0.0, atol=1e-9)
        ]
        for kind in ("base", "expert")
    }
    ends = kinds["base"] + kinds["expert"]
    experts = kinds["expert"] or list(range(len(seen)))
    best = gains[experts].amax(0)
    if given is not None:
        names = [metric.name for metric in metrics]
        if set(given) != set(names):
            raise DataError(
                f"the reference point names {sorted(given)}, the metrics are {names}",
                hint="give one value for every metric",
            )
        point = to_maximisation(
            torch.tensor([float(given[name]) for name in names], dtype=torch.float64), metrics
        )
        rule = "given by the user"
    elif ends:
        point = gains[ends].amin(0)
        rule = "worst of base and experts" if kinds["base"] else "worst of the experts"
        if not kinds["expert"]:
            point, rule = gains.amin(0), "worst observed (no expert was measured)"
    else:
        point, rule = gains.amin(0), "worst observed (neither base nor experts were measured)"
    # A metric on which every expert ties with the reference has no scale of its own.
    best = torch.where(best > point, best, torch.maximum(gains.amax(0), point + 1e-9))
    return Reference(to_maximisation(point, metrics), to_maximisation(best, metrics), rule)


def scaled_gains(values: Tensor, metrics: tuple[Metric, ...], reference: Reference) -> Tensor:
    """Scale values (``... x m``, own units) to 0 at the reference and 1 at the best expert."""
    low = to_maximisation(reference.point, metrics)
    high = to_maximisation(reference.best, metrics)
    return (to_maximisation(values, metrics) - low) / (high - low)


@dataclass(frozen=True, eq=False)
class Recommendation:
    """A predicted front and how it came about.

    Attributes:
        front: The predicted front, nothing verified.
        model: The fitted surrogate.
        verify: Rows of the front to measure, the most informative first.
        reference: The scale of the metrics.
        surrogate: What is recorded about the fit, as plain data.
        seconds: Time for fitting, for solving, and for assessing how certain the front is.
        uncertainty: What the posterior says about the front as a whole, as plain data; see
            :class:`map_bo.loop.front_posterior.FrontUncertainty`.
    """

    front: Front
    model: SurrogateModel
    verify: list[int]
    reference: Reference
    surrogate: dict[str, Any]
    seconds: dict[str, float]
    uncertainty: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return all but the model as plain data, as it is recorded."""
        return {
            "front": encode_front(self.front),
            "verify": self.verify,
            "reference": {
                "point": encode_tensor(self.reference.point),
                "best": encode_tensor(self.reference.best),
                "rule": self.reference.rule,
            },
            "surrogate": self.surrogate,
            "seconds": self.seconds,
            "uncertainty": dict(self.uncertainty),
        }


def recommend(
    seen: Observations,
    space: CoefficientSpace,
    settings: Settings,
    *,
    generator: Generator,
) -> Recommendation:
    """Fit the surrogate to ``seen`` and solve it for the whole front.

    With ``settings.guard`` the front is kept where the data support the surrogate.

    Raises:
        SurrogateError: When nothing succeeded.
    """
    reference = reference_of(seen, space, settings.reference)
    start = time.perf_counter()
    model = settings.surrogate.fit(seen, space)
    fitted = time.perf_counter()
    mean: Callable[[Tensor], Tensor] = predicted_mean(model)
    coverage = Coverage.of(seen.succeeded().X, space) if settings.guard else None
    scale = (reference.best - reference.point).abs()
    searched = mean if coverage is None else guard(mean, coverage, scale=scale)
    X = settings.solver.solve(searched, space, generator=child(generator, "solve"))
    if coverage is not None:
        X = coverage.shrink(X)
    X = X[non_dominated(mean(X).detach())]
    prediction = predict(model, X)
    front = Front(
        X=X,
        mean=prediction.mean,
        std=prediction.std,
        lower=prediction.lower,
        upper=prediction.upper,
        metrics=seen.metrics,
    )
    # A point measured before adds nothing, and an end of the front is often an expert.
    distance = torch.cdist(space.normalise(X), space.normalise(seen.succeeded().X), p=torch.inf)
    fresh = (distance.amin(-1) > 0.01).nonzero().flatten()
    gains = scaled_gains(front.mean[fresh], seen.metrics, reference)
    spread = spread_rows(gains, min(settings.verifications, len(fresh)))
    rows = [int(fresh[i]) for i in spread]
    about: dict[str, Any] = {"settings": repr(settings.surrogate), "model": type(model).__name__}
    selection = getattr(model, "describe_selection", None)
    if selection is not None:
        about["selection"] = selection()
    if isinstance(model, LeavesOneOut):
        about["validation"] = validate(model).describe()
    seconds = {"fit": fitted - start, "solve": time.perf_counter() - fitted}
    return Recommendation(front, model, rows, reference, about, seconds)


def refit(state: RunState, space: CoefficientSpace, surrogate: Surrogate) -> SurrogateModel | None:
    """Return the surrogate fitted to the search and the verification together.

    None when no verification succeeded.

    Raises:
        SurrogateError: When it cannot be fitted.
    """
    return surrogate.fit(state.data, space) if bool(state.verification.ok.any()) else None


def spread_rows(gains: Tensor, count: int) -> list[int]:
    """Return ``count`` rows of ``gains`` (``k x m``, scaled) that represent the whole set.

    The first is the most balanced point (largest worst gain); each next one is the point farthest
    from those already taken.
    """
    if count <= 0 or not len(gains):
        return []
    rows = [int(gains.amin(-1).argmax())]
    distance = torch.cdist(gains, gains[rows]).squeeze(-1)
    while len(rows) < count:
        rows.append(int(distance.argmax()))
        distance = torch.minimum(distance, torch.cdist(gains, gains[rows[-1:]]).squeeze(-1))
    return rows
