"""The summary of a run: what it cost, what it found, and how that compares."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.constraints import Constraint, plain_constraints
from map_bo.data import Front, Observations
from map_bo.loop.growth import notes_on_extensions
from map_bo.loop.known import imported_of, notes_on_imported
from map_bo.loop.recommend import notes_on_constraints, notes_on_feasibility
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState
from map_bo.loop.stopping import notes_on, stop_record
from map_bo.pareto.indicators import hypervolume
from map_bo.samplers.sampler import Sampler, SeesThroughSurrogate
from map_bo.scale import Scale, anchor_rows
from map_bo.space import CoefficientSpace
from map_bo.surrogates.outliers import Outlier, without
from map_bo.tracking.store import Event

__all__ = [
    "ObservedVolume",
    "commit",
    "comparison",
    "last_set_aside",
    "notes_on_anchors",
    "notes_on_bounds",
    "notes_on_former_surrogate",
    "outliers_of",
    "summarise",
    "summary_of",
    "versions",
]


class ObservedVolume:
    """Hypervolume of the measured points (real) after each evaluation, as in a run's summary.

    It begins once the base and the experts have been evaluated, because no later evaluation moves
    the scale; earlier hypervolumes would not be comparable. A run whose design leaves them out has
    none.

    One thing moves it later. That the value of an expert diverged cannot be seen in the anchors
    alone; once the sampler's fit sets it aside, the scale is that of the others, as in the summary,
    and hypervolumes from then on are. Those recorded before stay as they were.

    Args:
        space: The space of the run.
        given: The reference point of the settings, if any.
        constraints: What metrics have to keep.
    """

    def __init__(
        self,
        space: CoefficientSpace,
        given: Mapping[str, float] | None = None,
        constraints: Sequence[Constraint] = (),
    ) -> None:
        self._space, self._given, self._constraints = space, given, constraints
        self._scale: Scale | None = None
        self._aside: set[tuple[int, str]] = set()

    def after(self, seen: Observations, outliers: Sequence[Outlier] = ()) -> dict[str, float]:
        """Return ``hypervolume`` of all that was ``seen``; nothing before the scale is known.

        Args:
            seen: All evaluations so far.
            outliers: Values that the last fit set aside; what is not (any more) among ``seen`` at
                its place is passed over.
        """
        if outliers:
            outliers = tuple(one for one in outliers if _is_there(one, seen))
            seen = without(seen, outliers) if outliers else seen
        aside = {(one.row, one.metric) for one in outliers}
        if aside != self._aside or seen.covariance is not None:  # estimates may all move
            self._scale, self._aside = None, aside
        if self._scale is None:
            self._scale = self._settled(seen)
        if self._scale is None:
            return {}
        gains = self._scale.gains(seen.succeeded().Y)
        zero = torch.zeros(gains.shape[-1], dtype=torch.float64)
        return {"hypervolume": hypervolume(gains, zero)}

    def _settled(self, seen: Observations) -> Scale | None:
        if not bool(seen.ok.any()):
            return None
        tried = anchor_rows(seen.X, self._space).any(-1).tolist()
        kinds = self._space.anchors().kinds
        if not all(there for there, kind in zip(tried, kinds, strict=True) if kind != "blend"):
            return None
        found = Scale.of(seen, self._space, self._given, self._constraints)
        return None if found.is_observed else found


def _is_there(one: Outlier, seen: Observations) -> bool:
    names = [metric.name for metric in seen.metrics]
    if one.metric not in names or not 0 <= one.row < len(seen):
        return False
    return float(seen.Y[one.row, names.index(one.metric)]) == one.value


def versions() -> dict[str, str]:
    """Return the versions of everything that numbers depend on."""
    names = ("map-bo", "torch", "botorch", "gpytorch", "moocore", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """Return the commit of the checkout that map_bo runs from, or None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def comparison(
    front: Front, seen: Observations, space: CoefficientSpace, scale: Scale
) -> dict[str, float | None]:
    """Return the hypervolume of the front and those of its baselines.

    Metrics are scaled to 0 at the reference point and 1 at the best expert. Only the first entry
    is predicted; the others are measured, and None where nothing was.
    """

    def volume(values: Tensor) -> float | None:
        if not len(values):
            return None
        gains = scale.gains(values)
        return hypervolume(gains, torch.zeros(gains.shape[-1], dtype=torch.float64))

    seen = seen.succeeded()
    rows = anchor_rows(seen.X, space)

    def measured(kind: str) -> list[Tensor]:
        return [
            y.unsqueeze(0)
            for anchor_kind, here in zip(space.anchors().kinds, rows, strict=True)
            if anchor_kind == kind
            for y in seen.Y[here]
        ]

    def best(points: list[Tensor]) -> float | None:
        volumes = [value for y in points if (value := volume(y)) is not None]
        return max(volumes) if volumes else None

    return {
        "predicted front": volume(front.mean),
        "verified points": volume(front.real[front.verified]),
        "observed points": volume(seen.Y),
        "uniform blend": best(measured("blend")),
        "best expert": best(measured("expert")),
    }


def _notes_on_nothing(
    volumes: Mapping[str, float | None], front: Front, seen: Observations, scale: Scale
) -> list[str]:
    """Return why hypervolumes of the run's own points are 0, in a sentence each."""
    points = {
        "predicted front": front.mean,
        "verified points": front.real[front.verified],
        "observed points": seen.succeeded().Y,
    }
    notes = []
    for name, values in points.items():
        if volumes.get(name) != 0 or not len(values):
            continue
        gains = scale.gains(values)
        never = [
            f"{metric.name} ({point:.4g})"
            for metric, point, best in zip(
                scale.metrics, scale.point.tolist(), gains.amax(0).tolist(), strict=True
            )
            if best <= 0
        ]
        beaten = f"of {', '.join(never)}" if never else "in all metrics at once"
        notes.append(
            f"the hypervolume of the {name} is 0: none is better than the reference point {beaten}"
        )
    return notes


def last_set_aside(
    events: Sequence[Event], before: tuple[Outlier, ...] = ()
) -> tuple[Outlier, ...]:
    """Return the values that the fit behind the last proposal set aside, as they are recorded.

    Args:
        events: Of a run, in order.
        before: The answer where there is no proposal among them.
    """
    proposals = [event for event in events if event.kind == "proposed"]
    if not proposals:
        return before
    fit = proposals[-1].data.get("surrogate")
    recorded = fit.get("outliers") if isinstance(fit, Mapping) else None
    if not isinstance(recorded, list):
        return ()
    try:
        return tuple(Outlier.read(one) for one in recorded)
    except (KeyError, TypeError, ValueError, OverflowError):  # edited; it is the picture alone
        return ()


def notes_on_anchors(settings: Settings, space: CoefficientSpace) -> list[str]:
    """Return that a search is too short for the base, the experts and their blend, if it is."""
    anchors = len(space.anchors())
    if settings.search >= anchors or settings.items != "full":  # parts of it buy more rows
        return []
    return [
        f"the budget leaves {settings.search} evaluations for the search, fewer than the "
        f"{anchors} of base, experts and uniform blend, so a design that starts with these "
        "skips the last of them"
    ]


def notes_on_bounds(seen: Observations) -> list[str]:
    """Return which metrics have values that they cannot have, in a sentence each.

    On its link such a value lies at the bound, so that a fit learns nothing from it.
    """
    notes = []
    for metric, values, there in zip(seen.metrics, seen.Y.T, seen.measured.T, strict=True):
        low, high = metric.lower, metric.upper
        ends = [abs(end) for end in (low, high) if end is not None]
        slack = 1e-6 * max([*ends, 1.0 if high is not None else 0.0], default=0.0)
        out = torch.zeros_like(there)
        if low is not None:
            out |= values < low - slack
        if high is not None:
            out |= values > high + slack
        if metric.kind != "unbounded" and bool((out & there).any()):
            span = f"from {low:g} to {high:g}" if high is not None else f"of at least {low:g}"
            notes.append(
                f"metric {metric.name!r} is declared as a {metric.kind} {span}, and "
                f"{int((out & there).sum())} of {int(there.sum())} values lie outside (such as "
                f"{float(values[out & there][0]):.4g}): they are fitted as if they lay at the "
                "bound; declare its bounds as they are, or kind='unbounded'"
            )
    return notes


def outliers_of(state: RunState, again: Sequence[Outlier] | None) -> tuple[Outlier, ...]:
    """Return the values that were set aside, by the last judgement.

    Args:
        state: The run, whose front was solved.
        again: Those of the fit to search and verification together, if there was one; the rows of
            the verification come after those of the search.
    """
    if again is not None:
        return tuple(again)
    recorded = state.front_data.get("surrogate", {}).get("outliers", ())
    return tuple(Outlier.read(one) for one in recorded)


def _of_its_own(settings: Settings) -> str | None:
    """Return the surrogate that the sampler looks through in place of the run's, if it does."""
    sampler = settings.sampler
    if not isinstance(sampler, SeesThroughSurrogate) or sampler.surrogate is None:
        return None
    own = repr(sampler.surrogate)
    return None if own == repr(settings.surrogate) else own


def _options(front: Front, seen: Observations, space: CoefficientSpace) -> dict[str, Any]:
    """Return how many points each option of a choice has; nothing where there is no choice."""
    placed = space.placed_choice
    if placed is None:
        return {}
    counts = {"front": placed.counts(front.X), "search": placed.counts(seen.X)}
    return {"choice": {"name": placed.axis.name, **counts}}


def _recalled(seen: Observations, verification: Observations) -> dict[str, Any]:
    """Return what came from the cache of evaluations; nothing where nothing did."""
    every = seen.append(verification)
    marks = every.recalled & every.measured
    if not bool(marks.any()):
        return {}
    return {
        "cache": {
            "evaluations": int((marks == every.measured).all(-1).logical_and(marks.any(-1)).sum()),
            "metrics": int(marks.sum()),
            "seconds_saved": round(float(every.saved.sum()), 4),
        }
    }


def summarise(
    *,
    front: Front,
    seen: Observations,
    verification: Observations,
    space: CoefficientSpace,
    scale: Scale,
    settings: Settings,
    optimism: Mapping[str, float | None],
    uncertainty: Mapping[str, Any],
    stop: Mapping[str, Any] | None,
    surrogate: Mapping[str, Any],
    seconds: Mapping[str, float],
    notes: list[str],
    outliers: Sequence[Outlier] = (),
) -> dict[str, Any]:
    """Return the summary as plain data, as it is written to ``summary.json``.

    Hypervolumes of what was measured leave out the values that were set aside (``outliers``).
    """
    own = [outlier for outlier in outliers if outlier.row < len(seen)]
    kept = without(seen, own) if own else seen
    names = [metric.name for metric in front.metrics]
    volumes = comparison(front, kept, space, scale)
    return {
        "evaluations": len(seen) + len(verification),
        "budget": settings.budget,
        "verification": {
            "points": len(verification),
            "counted": "on top of the budget" if settings.verify_extra else "inside the budget",
        },
        "failures": sum(r is not None for r in seen.failures + verification.failures),
        "partial": sum(int((x.partial & x.failed_rows).sum()) for x in (seen, verification)),
        **_recalled(seen, verification),
        "outliers": [outlier.describe() for outlier in outliers],
        "seed": settings.seed,
        "front_points": len(front),
        **_options(front, seen, space),
        "hypervolume": volumes,
        "reference_point": dict(zip(names, scale.point.tolist(), strict=True)),
        "reference_best": dict(zip(names, scale.best.tolist(), strict=True)),
        "reference_rule": scale.rule,
        **({"constraints": plain_constraints(scale.constraints)} if scale.constraints else {}),
        "optimism": dict(optimism),
        "uncertainty": dict(uncertainty),
        "stop": None if stop is None else dict(stop),
        "surrogate": dict(surrogate),
        "sampler": repr(settings.run_sampler),
        "sampler_surrogate": _of_its_own(settings),
        "solver": repr(settings.solver),
        "guard": settings.guard,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "notes": list(
            dict.fromkeys(
                [
                    *notes,
                    *notes_on_bounds(seen.append(verification)),
                    *_notes_on_nothing(volumes, front, kept, scale),
                ]
            )
        ),
        "versions": versions(),
        "commit": commit(),
    }


def notes_on_former_surrogate(state: RunState, sampler: Sampler) -> list[str]:
    """Return a note where the sampler of a run of version 0.1 looked through another surrogate."""
    version = str(state.created.get("versions", {}).get("map-bo", ""))
    if (
        not version.startswith("0.1.")
        or state.front is not None
        or not isinstance(sampler, SeesThroughSurrogate)
        or sampler.surrogate is not None
    ):
        return []
    return [
        f"the run was begun by map-bo {version}, whose sampler looked through a quadratic of its "
        f"own; from evaluation {len(state.X) + 1} on, it looks through the run's surrogate"
    ]


def summary_of(
    result: Result,
    state: RunState,
    settings: Settings,
    notes: Sequence[str],
    outliers: Sequence[Outlier],
) -> dict[str, Any]:
    """Return the summary of a run whose steps are done.

    Args:
        result: What it found.
        state: Where it stands.
        settings: How it was done.
        notes: What was noticed on the way.
        outliers: Values that the last fit set aside.
    """
    unused = settings.search - len(state.outcomes)
    if settings.scores_parts:
        unused = max(0, math.floor(settings.search - state.spent + 1e-9))
    stop = stop_record(settings.stop, state.checks, unused)
    return summarise(
        front=result.front,
        seen=result.seen,
        verification=result.verification,
        space=result.space,
        scale=result.scale,
        settings=settings,
        optimism=result.optimism(),
        uncertainty=result.uncertainty(),
        stop=stop,
        surrogate=state.front_data["surrogate"],
        seconds={
            "propose": state.proposing,
            "evaluate": float(torch.cat([result.seen.cost, result.verification.cost]).sum()),
            **state.front_data["seconds"],
            **({"stop": sum(x["seconds"] for x in state.checks)} if state.checks else {}),
        },
        notes=[
            *notes,
            *result.scale.notes(),
            *notes_on_constraints(settings.requirements),
            *notes_on_feasibility(result.front, settings.requirements),
            *notes_on_imported(state),
            *notes_on_extensions(state.extensions),
            *notes_on(stop),
            *(outlier.note() for outlier in outliers),
        ],
        outliers=outliers,
    ) | imported_of(state)
