"""A choice of a run judged, measured and confirmed: what verdicts and confirmations rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import ConfigError, MergeError
from map_bo.examples.sets import Part
from map_bo.loop.verdict.chosen import Choice
from map_bo.loop.verdict.confirm import (
    CHOSEN,
    HELD_OUT,
    SEARCHED,
    Confirmation,
    held_out_parts,
    measure_points,
    searched_parts,
)
from map_bo.loop.verdict.gain import measured_blend
from map_bo.loop.verdict.verdict import BLEND, Merge, Verdict, judge
from map_bo.pareto.preferences import Preference
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from map_bo.scale import Scale, same_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.surrogate import SurrogateModel
from map_bo.workers.workers import Workers

__all__ = ["Searched", "confirm_choice", "judge_choice", "measure_choice"]

_OTHER = "the best other merge"
_THE_BLEND = f"the {BLEND}"


class Searched(Protocol):
    """What a search has left to judge a choice by; see :class:`map_bo.loop.result.Result`."""

    @property
    def seen(self) -> Observations:
        """Every evaluation of the search."""
        ...

    @property
    def verification(self) -> Observations:
        """The measurements of front points at the end."""
        ...

    @property
    def scale(self) -> Scale:
        """The scale of the metrics."""
        ...

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        ...

    @property
    def problem(self) -> Problem | None:
        """The problem, when it is available."""
        ...

    @property
    def model(self) -> SurrogateModel | None:
        """The surrogate that was fitted to the search."""
        ...

    @property
    def refitted(self) -> SurrogateModel | None:
        """The surrogate that was fitted to search and verification."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the run as plain data."""
        ...


def judge_choice(
    run: Searched, choice: Choice, other: Choice, more: Observations | None = None
) -> Verdict:
    """Return the verdict on a choice by what the search has measured.

    Args:
        run: What the search has left.
        choice: The choice.
        other: The choice for the same preference whether or not the blend is as good.
        more: What was measured after the run on the examples of the search.
    """
    at, kept = measured_blend(run.seen, run.space), choice.blend
    merges = [Merge(CHOSEN, choice.x)]
    if at is not None:
        kept = bool(same_points(choice.x[None], run.seen.X[at : at + 1], run.space))
    if kept:
        merges = [Merge(_OTHER, other.x, (BLEND,)), Merge(_THE_BLEND, choice.x)]
    data = run.seen.append(run.verification)
    return judge(
        merges,
        data if more is None else data.append(more),
        run.space,
        run.scale,
        choice.preference or Preference(),
        generator=make_generator(0),
        model=run.refitted or run.model,
        fitted=run.seen if run.refitted is None else data,
        kept=kept,
        expected=not kept and choice.gain is not None,
    )


def measure_choice(
    run: Searched, choice: Choice, other: Choice, *, workers: Workers | None = None
) -> Confirmation:
    """Measure a choice on the examples of the search; the anchors were measured there.

    Args:
        run: What the search has left.
        choice: The choice.
        other: See :func:`judge_choice`.
        workers: Who evaluates; None evaluates here.

    Raises:
        MergeError: When the problem is not available.
        EvaluationError: When it cannot be measured.
    """
    problem = _available(run)
    parts = searched_parts(problem, _holdout(run))
    found = _measure(run, problem, choice.x[None], parts, workers)
    names, X = _anchors(run.space, choice.x)
    rows = {name: _row(run.seen, x, run.space) for name, x in zip(names, X, strict=True)}
    known = {name: row for name, row in rows.items() if row is not None}
    beside = replace(run.seen.select(list(known.values())), covariance=None)
    return Confirmation(
        SEARCHED,
        False,
        (CHOSEN, *known),
        torch.cat([choice.expected[None], beside.Y]),
        found.append(beside),
        judge_choice(run, choice, other, found),
        choice.describe(),
    )


def confirm_choice(
    run: Searched,
    choice: Choice,
    *,
    on: Problem | None = None,
    workers: Workers | None = None,
) -> Confirmation:
    """Measure a choice and all anchors on examples that the search never saw.

    Args:
        run: What the search has left.
        choice: The choice.
        on: The same problem with other examples; by default the run's own on what was held out.
        workers: Who evaluates, holding that problem; None evaluates here.

    Raises:
        MergeError: When the problem is not available.
        ConfigError: When nothing was held out, or the other problem does not fit.
        EvaluationError: When the choice cannot be measured.
    """
    problem, parts, where = _available(run) if on is None else on, None, "other examples"
    if on is None:
        parts, where = held_out_parts(problem, _holdout(run)), HELD_OUT
        if parts is None:
            raise ConfigError(
                "the search saw all examples of this run, so none are left to confirm by",
                hint="hold some out from the start (loop.holdout=.3), name other examples "
                "(confirm(on=PROBLEM), map-bo confirm RUN --on KEY=VALUE), or measure the choice "
                "on the same ones (map-bo choose RUN --measure)",
            )
    elif (problem.space, problem.metrics) != (run.space, run.scale.metrics):
        raise ConfigError(
            "the problem to confirm on has other coefficients or metrics than the run",
            hint="give the same experts and tasks, with other examples",
        )
    names, X = _anchors(run.space, choice.x)
    found = _measure(run, problem, torch.cat([choice.x[None], X]), parts, workers)
    search = torch.full((len(found), len(found.metrics)), math.nan, dtype=torch.float64)
    search[0] = choice.expected
    for i, x in enumerate(X, 1):
        row = _row(run.seen, x, run.space)
        if row is not None:
            search[i] = run.seen.Y[row]
    kept = BLEND in run.space.anchors().names and BLEND not in names
    verdict = judge(
        [Merge(_THE_BLEND if kept else CHOSEN, choice.x)],
        found,
        run.space,
        run.scale,
        choice.preference or Preference(),
        generator=make_generator(0),
        chosen_here=False,
        where=where,
        kept=kept,
    )
    told = (CHOSEN, *names)
    return Confirmation(where, True, told, search, found, verdict, choice.describe())


def _anchors(space: CoefficientSpace, chosen: Tensor) -> tuple[list[str], Tensor]:
    """Return names and points of the anchors that are not the chosen point, the blend first."""
    anchors = space.anchors()
    order = sorted(range(len(anchors)), key=lambda i: (anchors.kinds[i] != "blend", i))
    other = (~same_points(anchors.X, chosen[None], space)[:, 0]).tolist()
    kept = [i for i in order if other[i]]
    return [anchors.names[i] for i in kept], anchors.X[kept]


def _row(seen: Observations, x: Tensor, space: CoefficientSpace) -> int | None:
    """Return the last row at a point that has all metrics."""
    at = same_points(x[None], seen.X, space)[0] & seen.ok
    return int(at.nonzero()[-1]) if bool(at.any()) else None


def _available(run: Searched) -> Problem:
    if run.problem is None:
        raise MergeError(
            "the problem of this run is not available, so nothing can be measured",
            hint="open the run with its problem: load_result(RUN, problem=...)",
        )
    return run.problem


def _holdout(run: Searched) -> float:
    return float(run.settings.get("holdout", 0.0))


def _measure(
    run: Searched,
    problem: Problem,
    X: Tensor,
    parts: Sequence[Part] | None,
    workers: Workers | None,
) -> Observations:
    seed = int(run.settings.get("seed", 0))
    timeout = run.settings.get("timeout")
    return measure_points(
        problem,
        X,
        generator=make_generator(seed),
        parts=parts,
        order=seed,
        timeout=timeout,
        workers=workers,
    )
