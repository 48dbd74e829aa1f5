"""The evaluations of an older study as observations of a new run's problem.

The old points get 0 for an expert that the old study did not have: it took no part. A coefficient
that the old study knew for a whole expert stands for all of the expert's blocks. Settings of the
operator have no such neutral value: what the old study recorded or what the user says is taken, and
they are refused where there is neither. Metrics that the old study lacks are *not measured*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, MapBoError, SpaceError, did_you_mean, listed
from map_bo.loop.transfer.examples import note_on_outcomes, outcomes_taken
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.plain import flat, modernise
from map_bo.space import CoefficientSpace

__all__ = ["Taken", "embed"]

_UNREAD = ("base", "experts", "operator", "space", "metrics", "kind", "dtype")
"""Parts of a problem's description that are compared on their own, or change no value."""
_GROWING = ("zoo.experts", "zoo.sets", "zoo.tasks")


@dataclass(frozen=True, eq=False)
class Taken:
    """What a run takes over from an older study.

    Attributes:
        observations: Observations of the run's metrics at points of its space.
        source: Plain data for the record: where they come from, what names were mapped, which
            metrics were not measured, and ``notes`` for the summary.
    """

    observations: Observations
    source: Mapping[str, Any]


def embed(
    study: Study,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    how: StartFrom,
    *,
    problem: Any = None,
    examples: Mapping[str, str] | None = None,
) -> Taken:
    """Return a study as observations of ``metrics`` in ``space``.

    Args:
        study: The study.
        space: The space of the new run.
        metrics: Its metrics.
        how: How names are mapped, and what is to be trusted or left out.
        problem: The description of its problem, for comparing bases, experts and operators.
        examples: Digests of the examples of its evaluators.

    Raises:
        DataError: When the study does not fit, with what would make it fit.
        SpaceError: When rows lie outside the space and are not to be left out.
    """
    mapped = _Names.of(study, space, metrics, how)
    _refuse_other_metrics(study, metrics, mapped)
    _refuse_other_problem(study, mapped, how, space, problem)
    _refuse_other_examples(study, mapped, how, examples or {})
    X = _points(study, space, mapped, how)
    wrong = _wrong_rows(study, space, metrics, mapped, X)
    if wrong and not how.skip:
        row, (reason, error) = next(iter(wrong.items()))
        raise error(
            f"{len(wrong)} of {len(study.X)} rows of {study.title} cannot be taken; the first is "
            f"{study.rows[row]}: {reason}",
            hint="correct them, or leave such rows out: start_from.skip=true, in Python "
            "map_bo.StartFrom(..., skip=True)",
        )
    kept = [i for i in range(len(study.X)) if i not in wrong]
    if not kept:
        raise DataError(
            f"no row of {study.title} can be taken; the first, {study.rows[0]}: {wrong[0][0]}"
            if wrong
            else f"{study.title} holds no evaluation",
            hint="start the run without it",
        )
    study_kept = study.select(kept)
    found = _observations(study_kept, metrics, mapped, X[kept])
    told = _told(study, space, metrics, mapped, found, wrong)
    if study.outcomes:
        own = {metric.name for metric in metrics}
        pairs = zip(study.metric_names, mapped.metrics, strict=True)
        names = {old: new if new in own else None for old, new in pairs}
        outcomes = outcomes_taken(study_kept, names, how, examples or {})
        found = replace(found, examples=outcomes)
        note = note_on_outcomes(study_kept.outcomes, outcomes)
        told |= {} if note is None else {"notes": [*told.get("notes", ()), note]}
    return Taken(found, told)


@dataclass(frozen=True)
class _Names:
    """New names of what the old study has.

    Attributes:
        coefficients: New name of each old column; None for one that is left out.
        metrics: The same of each old metric.
    """

    coefficients: tuple[str | None, ...]
    metrics: tuple[str | None, ...]

    @classmethod
    def of(
        cls, study: Study, space: CoefficientSpace, metrics: Sequence[Metric], how: StartFrom
    ) -> _Names:
        names = study.names or space.names[: study.X.shape[-1]]
        if study.X.shape[-1] > len(names):
            raise DataError(
                f"{study.title} has {study.X.shape[-1]} coefficients, and the run {space.d}: "
                f"{listed(space.names)}",
                hint="give observations of the run's own coefficients, or a run or a table, whose "
                "coefficients have names",
            )
        owners = [owner for owner in study.owner if owner is not None]
        _check_mapping("experts", how.experts, [*names, *owners], [*space.names, *space.experts])
        own = [metric.name for metric in metrics]
        _check_mapping("metrics", how.metrics, study.metric_names, own)
        coefficients = []
        for i, name in enumerate(names):
            expert = study.owner[i] if study.owner else None
            new: str | None = how.experts.get(name, name)
            if name not in how.experts and expert is not None and expert in how.experts:
                to = how.experts[expert]
                new = None if to is None else f"{to}{name.removeprefix(expert)}"
            coefficients.append(new)
        found = cls(
            tuple(coefficients), tuple(how.metrics.get(name, name) for name in study.metric_names)
        )
        for what, kept in (("coefficients", found.coefficients), ("metrics", found.metrics)):
            twice = next((one for one in kept if one is not None and kept.count(one) > 1), None)
            if twice is not None:
                raise DataError(
                    f"two {what} of {study.title} become {twice!r}",
                    hint="map them to different names, or leave one out with null",
                )
        if not set(found.metrics) & set(own):
            raise DataError(
                f"{study.title} has none of the metrics of the run: it has "
                f"{listed(study.metric_names)}, and the run {listed(own)}",
                hint="map their names: start_from.metrics={OLD: NEW}",
            )
        parted = tuple(
            f"{expert}/" for expert in space.experts
        )  # refused further on, by its blocks
        if not any(
            one in space.names or one in space.experts or one.startswith(parted)
            for one in found.coefficients
            if one is not None
        ):
            raise DataError(
                f"{study.title} has none of the coefficients of the run: it has {listed(names)}, "
                f"and the run {listed(space.names)}",
                hint="map their names: start_from.experts={OLD: NEW}",
            )
        return found


def _check_mapping(
    what: str, given: Mapping[str, str | None], old: Sequence[str], new: Sequence[str]
) -> None:
    for before, after in given.items():
        if before not in old:
            raise DataError(
                f"start_from.{what} names {before!r}, which the old study does not have",
                hint=did_you_mean(before, dict.fromkeys(old)),
            )
        if after is not None and after not in new:
            raise DataError(
                f"start_from.{what} maps {before!r} to {after!r}, which the run does not have",
                hint=did_you_mean(after, dict.fromkeys(new)),
            )


def _refuse_other_metrics(study: Study, metrics: Sequence[Metric], mapped: _Names) -> None:
    own = {metric.name: metric for metric in metrics}
    for old, name in zip(study.metrics, mapped.metrics, strict=True):
        if isinstance(old, str) or name not in own:
            continue
        new = own[name]
        for part in ("direction", "kind", "lower", "upper"):
            before, now = getattr(old, part), getattr(new, part)
            if before != now:
                raise DataError(
                    f"metric {old.name!r} has {part} {before!r} in {study.title}, and "
                    f"{now!r} in the run",
                    hint="its values mean something else: leave them out with "
                    f"start_from.metrics={{{old.name}: null}}",
                )


def _refuse_other_problem(
    study: Study, mapped: _Names, how: StartFrom, space: CoefficientSpace, problem: Any
) -> None:
    """Refuse the values of another base, other experts or another operator."""
    old = study.problem
    if not isinstance(old, Mapping) or not isinstance(problem, Mapping):
        return
    if _digest(old.get("base")) != _digest(problem.get("base")):
        raise DataError(
            f"{study.title} merged into another base: its digest was "
            f"{_short(_digest(old.get('base')))} and is {_short(_digest(problem.get('base')))}",
            hint="values of another base say nothing of this one: start the run without them",
        )
    theirs, ours = old.get("experts"), problem.get("experts")
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name, about in theirs.items():
            new = how.experts.get(name, name)
            if new in ours and _digest(about) != _digest(ours[new]):
                raise DataError(
                    f"expert {name!r} of {study.title} has other weights: its digest was "
                    f"{_short(_digest(about))} and is {_short(_digest(ours[new]))}",
                    hint="give the new expert a name of its own, or leave the old one out with "
                    f"start_from.experts={{{name}: null}}, and the rows that use it with "
                    "start_from.skip=true",
                )
    ignored = {"blocks", *space.settings}
    changed = _differences(old.get("operator"), problem.get("operator"), "operator")
    for key, before, now in changed:
        if key.rpartition(".")[2] in ignored or ".search" in key:
            continue
        raise DataError(
            f"{study.title} merged by another operator: {key} was {before!r} and is {now!r}",
            hint="values of another operator are those of another function: use the same one",
        )
    before_now = [
        {key: value for key, value in one.items() if key not in _UNREAD} for one in (old, problem)
    ]
    for key, before, now in _differences(before_now[0], before_now[1], "problem"):
        part = key.removeprefix("problem.")
        if how.trust_data or part in _GROWING or part.rpartition(".")[2] == "source":
            continue
        raise DataError(
            f"{study.title} measured another problem: {part} was {before!r} and is {now!r}",
            hint="if its values mean the same all the same: start_from.trust_data=true, in Python "
            "map_bo.StartFrom(..., trust_data=True)",
        )


def _refuse_other_examples(
    study: Study, mapped: _Names, how: StartFrom, examples: Mapping[str, str]
) -> None:
    if how.trust_data:
        return
    for name, digest in study.examples.items():
        new = how.metrics.get(name, name)
        if new is not None and new in examples and examples[new] != digest:
            raise DataError(
                f"{name!r} was measured on other examples in {study.title}: their digest was "
                f"{_short(digest)} and is {_short(examples[new])}",
                hint="that is another measurement: leave its values out with "
                f"start_from.metrics={{{name}: null}}, or take them all the same with "
                "start_from.trust_data=true",
            )


def _digest(about: Any) -> Any:
    return about.get("digest") if isinstance(about, Mapping) else None


def _short(digest: Any) -> str:
    return str(digest)[:12]


def _differences(before: Any, now: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    old = flat(modernise(before, now), prefix) if before else {}
    new = flat(now, prefix) if now else {}
    keys = dict.fromkeys((*old, *new))
    return [
        (key, old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key) and {} not in (old.get(key), new.get(key))
    ]


def _points(study: Study, space: CoefficientSpace, mapped: _Names, how: StartFrom) -> Tensor:
    """Return the old points in the new space, ``n x d``."""
    unknown = next((name for name in how.values if name not in space.settings), None)
    if unknown is not None:
        raise DataError(
            f"start_from.values names {unknown!r}, which is no setting of the run's operator",
            hint=did_you_mean(unknown, space.settings),
        )
    before = flat((study.problem or {}).get("operator"), "operator")
    fixed = {key.rpartition(".")[2]: value for key, value in before.items()}
    columns = []
    for name, owner in zip(space.names, space.owner, strict=True):
        expert = None if owner < 0 else space.experts[owner]
        if name in mapped.coefficients:
            columns.append(study.X[:, mapped.coefficients.index(name)])
        elif expert is not None and expert in mapped.coefficients:  # the same in all blocks
            columns.append(study.X[:, mapped.coefficients.index(expert)])
        elif expert is not None:
            parts = [one for one in mapped.coefficients if one and one.startswith(f"{expert}/")]
            if parts:
                raise DataError(
                    f"{study.title} has {len(parts)} coefficients of expert {expert!r}, and the "
                    f"run has {name!r}",
                    hint="use the blocks of the old study, or start the run without it",
                )
            columns.append(torch.zeros(len(study.X), dtype=torch.float64))
        else:
            value = how.values.get(name, fixed.get(name))
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(
                    f"{study.title} says nothing of {name!r}, a setting of the operator without a "
                    "neutral value",
                    hint=f"say what it was: start_from.values={{{name}: VALUE}}",
                )
            columns.append(torch.full((len(study.X),), float(value), dtype=torch.float64))
    return torch.stack(columns, -1)


def _wrong_rows(
    study: Study,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    mapped: _Names,
    X: Tensor,
) -> dict[int, tuple[str, type[MapBoError]]]:
    """Return why rows cannot be taken, by row."""
    wrong: dict[int, tuple[str, type[MapBoError]]] = {}
    known = {*space.names, *space.experts}
    gone = [i for i, name in enumerate(mapped.coefficients) if name not in known]
    for i in gone:
        name = study.names[i]
        for row in (study.X[:, i] != 0).nonzero().flatten().tolist():
            told = f"it uses {name!r} ({float(study.X[row, i]):.4g}), which the run does not have"
            wrong.setdefault(row, (told, DataError))
    inside = space.contains(X)
    for row in (~inside).nonzero().flatten().tolist():
        wrong.setdefault(row, (_outside(X[row], space), SpaceError))
    own = {metric.name: metric for metric in metrics}
    for j, (old, new) in enumerate(zip(study.metrics, mapped.metrics, strict=True)):
        if new not in own or not isinstance(old, str):
            continue
        metric, values = own[new], study.Y[:, j]
        least = -math.inf if metric.lower is None else metric.lower
        most = math.inf if metric.upper is None else metric.upper
        for row in ((values < least) | (values > most)).nonzero().flatten().tolist():
            told = f"{old} is {float(values[row]):.6g}, which is not in [{least:g}, {most:g}]"
            wrong.setdefault(row, (told, DataError))
    shared = [j for j, name in enumerate(mapped.metrics) if name in own]
    measured = study.Y[:, shared].isfinite().any(-1)
    for row, (there, reason) in enumerate(zip(measured.tolist(), study.failures, strict=True)):
        if not there and reason is None:
            wrong.setdefault(row, ("it has no value of a metric of the run", DataError))
    if study.source.get("from") == "csv":
        first: dict[tuple[float, ...], int] = {}
        for row, values in enumerate(torch.cat([study.X, study.Y], -1).nan_to_num(nan=-1e308)):
            before = first.setdefault(tuple(values.tolist()), row)
            if before != row:
                told = f"it repeats {study.rows[before]}, point and values"
                wrong.setdefault(row, (told, DataError))
    return dict(sorted(wrong.items()))


def _outside(x: Tensor, space: CoefficientSpace) -> str:
    for name, value, low, high in zip(
        space.names, x.tolist(), space.lower, space.upper, strict=True
    ):
        if not low - 1e-6 <= value <= high + 1e-6:
            return f"{name} is {value:.6g}, which is not in [{low:g}, {high:g}]"
    return f"it breaks a constraint of the space: {[round(value, 6) for value in x.tolist()]}"


def _observations(
    study: Study, metrics: Sequence[Metric], mapped: _Names, X: Tensor
) -> Observations:
    n, m = len(X), len(metrics)
    Y, Yvar, counts = (torch.full((n, m), torch.nan, dtype=torch.float64) for _ in range(3))
    same = study.X.shape[-1] == X.shape[-1] and bool((study.X == X).all())
    gradients = noise = None
    if same and study.gradients is not None and study.gradient_variance is not None:
        gradients, noise = (torch.full((n, m, X.shape[-1]), torch.nan).double() for _ in range(2))
    shared = []
    for j, metric in enumerate(metrics):
        if metric.name not in mapped.metrics:
            continue
        old = mapped.metrics.index(metric.name)
        shared.append(j)
        Y[:, j], Yvar[:, j] = study.Y[:, old], study.Yvar[:, old]
        counts[:, j] = study.counts[:, old]
        if gradients is not None and noise is not None:
            assert study.gradients is not None
            assert study.gradient_variance is not None
            gradients[:, j] = study.gradients[:, old]
            noise[:, j] = study.gradient_variance[:, old]
    # A row that failed in metrics which the run does not have has not failed here.
    whole = Y[:, shared].isfinite().all(-1).tolist()
    failures = tuple(
        None if there else reason for there, reason in zip(whole, study.failures, strict=True)
    )
    lacking = Y.isnan()
    return Observations(
        X=X,
        Y=Y,
        metrics=tuple(metrics),
        Yvar=torch.where(lacking, torch.nan, Yvar),
        counts=torch.where(lacking, torch.nan, counts),
        cost=study.cost,
        failures=failures,
        gradients=gradients,
        gradient_variance=noise,
    )


def _told(
    study: Study,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    mapped: _Names,
    found: Observations,
    wrong: Mapping[int, tuple[str, type[MapBoError]]],
) -> dict[str, Any]:
    """Return what the record says of the source."""
    names = study.names or space.names[: study.X.shape[-1]]
    owners = {
        space.experts[owner]
        for name, owner in zip(space.names, space.owner, strict=True)
        if owner >= 0 and {name, space.experts[owner]} & set(mapped.coefficients)
    }
    new = [expert for expert in space.experts if expert not in owners]
    lacking = found.incomplete.unsqueeze(-1) & ~found.measured
    seldom = {
        metric.name: int(count)
        for metric, count in zip(metrics, lacking.sum(0).tolist(), strict=True)
        if count
    }
    dropped = [
        old
        for old, name in zip(study.metric_names, mapped.metrics, strict=True)
        if name not in {metric.name for metric in metrics}
    ]
    renamed = {
        kind: {old: to for old, to in zip(before, after, strict=True) if old != to}
        for kind, before, after in (
            ("coefficients", names, mapped.coefficients),
            ("metrics", study.metric_names, mapped.metrics),
        )
    }
    notes = []
    if not study.names and study.X.shape[-1] < space.d:
        notes.append(
            f"the imported observations have {study.X.shape[-1]} coefficients without names: they "
            f"were taken for the first ones, {', '.join(names)}"
        )
    if new:
        notes.append(f"the imported evaluations have 0 for the new experts: {', '.join(new)}")
    if seldom:
        told = ", ".join(f"{name} at {count}" for name, count in seldom.items())
        notes.append(f"not measured in the study that was imported: {told} points")
    if dropped:
        notes.append(f"metrics of the imported study that the run lacks: {', '.join(dropped)}")
    if wrong:
        row, (reason, _) = next(iter(wrong.items()))
        notes.append(
            f"{len(wrong)} of {len(study.X)} rows of the imported study were left out; the first, "
            f"{study.rows[row]}: {reason}"
        )
    return {
        **study.source,
        **{kind: pairs for kind, pairs in renamed.items() if pairs},
        **({"new_experts": new} if new else {}),
        **({"not_measured": seldom} if seldom else {}),
        **({"left_out": len(wrong)} if wrong else {}),
        **({"notes": notes} if notes else {}),
    }
