"""The state of a run, rebuilt from its events alone: the same whether or not it was interrupted.

Events and their data (those of nested runs are in :mod:`map_bo.nested.record`):

``created``    settings, problem (its description), space, metrics, versions; ``examples``: the
               digests of those that ready evaluators score
``proposed``   ``X``: rows to evaluate, numbered on from the rows proposed before; ``seconds``;
               ``parts``: the examples that they are to be measured on, where not on all of them;
               ``surrogate``: the fit they were chosen by, if there was one: its ``settings``,
               ``model`` and leave-one-out scores
``started``    ``index`` (of a proposed row) or ``verify`` (row of the front), ``attempt``: an
               evaluation begins; one that neither ends nor is interrupted took its process along,
               unless a ``worker`` of another process evaluates it
``interrupted``  ``index`` or ``verify``: the process ended in good order during the evaluation
``attempt``    ``index`` (of a proposed row) or ``verify`` (row of the front), ``reason``: an
               evaluation failed and is tried again; ``observation``: what it measured all the same
``scored``     ``index`` of a row that has its outcome, ``parts``: further examples that it was
               measured on, ``share``: their cost in full evaluations; ``observation``: the row by
               all of its examples, with the outcomes of the further ones alone, or ``reason`` why
               it failed, after which the row gets no more
``observed``   ``index``, ``observation``: the outcome of a proposed row, a failure included;
               ``parts`` and ``share`` as in ``scored``, where it was not measured on everything;
               ``hypervolume`` of all points measured until then, once base and experts are known
``extended``   ``settings`` and ``config`` that were changed; ``reopens``: whether the search goes
               on where it had ended (:mod:`map_bo.tracking.extension`)
``reopened``   ``indices``: failed rows that are to be evaluated again
``imported``   ``indices``, ``observations``: outcomes from elsewhere, of rows that waited or of new
               rows; ``source``: where they come from; ``complete``: those of the rows that are to
               be completed in what they lack; ``queue``: ``X`` of further rows to evaluate
``front``      the predicted front and which of its points to verify
``verified``   ``row``, ``observation``: what was measured at a front point
``checked``    ``evaluations``, ``gain``, ``floor``, ``seconds``, ``stop``: a check of the stopping
               rule after so many evaluations; the reason to stop, or None
``corrected``  ``corrected``: the front's predictions with the verified points among the data
``finished``   the summary; ``confirmed`` (:mod:`.verdict.confirm`): points measured after it
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations, is_at
from map_bo.errors import DataError, MapBoError, StoreError
from map_bo.examples.estimates import estimated
from map_bo.examples.sets import Part, searched
from map_bo.examples.sharing import pooled
from map_bo.observed import joined_examples
from map_bo.tracking.codec import (
    decode_front,
    decode_observations,
    decode_parts,
    decode_scale,
    decode_tensor,
)
from map_bo.tracking.extension import with_extension
from map_bo.tracking.store import Event

__all__ = [
    "UNREADABLE",
    "RunState",
    "advance",
    "check_created",
    "refuse_outcome",
    "replay",
    "replay_whole",
]


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run stands.

    Attributes:
        metrics: The ``m`` metrics.
        X: ``n x d`` every row proposed so far.
        outcomes: Index of a proposed row -> its one-row observations.
        attempts: Index of a proposed row -> how often it has failed and will be tried again.
        verify_attempts: Row of the front -> how often its verification has failed.
        deaths: Index of a proposed row -> how often its evaluation began and did not end.
        verify_deaths: Row of the front -> the same of its verification.
        attempted: Index of a proposed row -> what attempts that failed have measured of it.
        verify_attempted: Row of the front -> the same of its verification.
        front: The predicted front, once it has been solved.
        front_data: What else was recorded with the front.
        verified: Row of the front -> its one-row observations.
        summary: The summary, once the run has finished.
        proposing: Seconds spent on proposals.
        checks: The checks of the stopping rule, in order.
        imported: Index of a proposed row whose outcome comes from elsewhere -> its source.
        extensions: What the events ``extended`` hold, in order; ``created`` has the settings in
            force after them.
        front_rows: Proposed rows that were measured as points of a front that was set back.
        planned: Index of a proposed row -> the examples that it is to be measured on at first.
        covered: Index of a row that was measured on parts -> evaluator -> positions that it covers.
        paid: Index of such a row -> what it has cost, in full evaluations.
        closed: Indices of rows that get no more examples, because that failed.
    """

    metrics: tuple[Metric, ...]
    X: Tensor
    created: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[int, Observations] = field(default_factory=dict)
    attempts: Mapping[int, int] = field(default_factory=dict)
    verify_attempts: Mapping[int, int] = field(default_factory=dict)
    deaths: Mapping[int, int] = field(default_factory=dict)
    verify_deaths: Mapping[int, int] = field(default_factory=dict)
    front: Front | None = None
    front_data: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[int, Observations] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    proposing: float = 0.0
    checks: tuple[Mapping[str, Any], ...] = ()
    imported: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    attempted: Mapping[int, Observations] = field(default_factory=dict)
    verify_attempted: Mapping[int, Observations] = field(default_factory=dict)
    extensions: tuple[Mapping[str, Any], ...] = ()
    front_rows: tuple[int, ...] = ()
    planned: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)
    covered: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    paid: Mapping[int, float] = field(default_factory=dict)
    closed: frozenset[int] = frozenset()

    @cached_property
    def seen(self) -> Observations:
        """All outcomes of the search, in the order they were proposed.

        Where rows were measured on parts of their examples, they are estimates for all of them.
        """
        return self.estimated(_joined([self.outcomes[i] for i in sorted(self.outcomes)], self))

    def estimated(self, measured: Observations) -> Observations:
        """Return measurements of this run as what a surrogate is fitted to."""
        if not self.covered:
            return measured
        return pooled(estimated(measured, sizes=self.sizes(measured)))

    def sizes(self, measured: Observations) -> dict[str, int]:
        """Return how many examples count as all, of each evaluator that scored some."""
        held = float(self.created.get("settings", {}).get("holdout", 0.0))
        rows = measured.examples
        return {name: searched(one.size, held) for row in rows for name, one in row.items()}

    @property
    def spent(self) -> float:
        """What the outcomes of the search have cost, in full evaluations."""
        return sum(self.paid.get(row, 1.0) for row in self.outcomes)

    @property
    def committed(self) -> int:
        """How many full evaluations the search has made or waits for, rounded up."""
        return math.ceil(self.spent - 1e-9) + sum(i not in self.planned for i in self.pending)

    @property
    def verification(self) -> Observations:
        """All outcomes of the verification, in the order of their front rows."""
        return _joined([self.verified[row] for row in sorted(self.verified)], self)

    @property
    def stopped(self) -> str | None:
        """Why the search stopped before its budget was spent; None when it did not."""
        return self.checks[-1]["stop"] if self.checks else None

    @cached_property
    def data(self) -> Observations:
        """All outcomes: the search, then the verification; estimates, as :attr:`seen`."""
        if not self.covered:
            return self.seen.append(self.verification)
        parts = [one[i] for one in (self.outcomes, self.verified) for i in sorted(one)]
        return self.estimated(_joined(parts, self))

    @property
    def pending(self) -> list[int]:
        """Indices of the rows that were proposed and have no outcome."""
        return [i for i in range(len(self.X)) if i not in self.outcomes]


def _joined(rows: list[Observations], state: RunState) -> Observations:
    return Observations.joined(rows, state.X.shape[-1], state.metrics)


_NESTED = frozenset({
    "node", "measured", "planned", "found", "begun", "handed", "done", "seeds", "space", "confirmed"
})  # fmt: skip
"""Kinds that the state of the whole run does not depend on: most only nested runs have."""

UNREADABLE = (
    MapBoError, KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError,
    ArithmeticError,
)  # fmt: skip
"""What data of other types than promised raise; deep nesting is a `RuntimeError`."""

_EDITED = "see `map-bo check RUN`; if it was edited by hand, restore it from a copy"


def advance(state: RunState, event: Event) -> RunState:
    """Return the state after ``event``.

    Raises:
        StoreError: When the event cannot follow this state: an unknown kind, an index that was
            not proposed, a second outcome, an outcome of another point.
        KeyError, TypeError, ValueError, MapBoError: When it does not hold what its kind promises.
    """
    data, new = event.data, dataclasses.replace
    match event.kind:
        case "created":
            return new(state, created=_checked(data, state))
        case "proposed":
            rows = decode_tensor(data["X"]).reshape(-1, state.X.shape[-1])
            if not bool(rows.isfinite().all()):
                raise StoreError("a proposed row holds NaN or infinity", hint=_EDITED)
            seconds = state.proposing + _number(data["seconds"])
            parts = decode_parts(data)
            planned = {len(state.X) + i: parts for i in range(len(rows))} if parts else {}
            return new(
                state,
                X=torch.cat([state.X, rows]),
                proposing=seconds,
                planned={**state.planned, **planned},
            )
        case "started" | "interrupted" | "attempt":
            return _with_attempt(state, event.kind, data)
        case "observed":
            index = _row(data["index"], len(state.X), "proposed rows")
            outcome = _outcome(data["observation"], state)
            refuse_outcome(state, index, outcome)
            return new(
                state,
                outcomes={**state.outcomes, index: outcome},
                deaths=_without(state.deaths, [index]),
                **_with_parts(state, index, data),
            )
        case "scored":
            return _scored(state, data)
        case "reopened":
            return _reopened(state, data)
        case "extended":
            return _extended(state, data)
        case "imported":
            return _with_imported(state, data)
        case "front":
            return _with_front(state, data)
        case "verified":
            return _with_verified(state, data)
        case "checked":
            check = {"stop": data["stop"], **data}
            if not isinstance(check["stop"], str | None):
                raise StoreError(f"the reason to stop is {check['stop']!r}", hint=_EDITED)
            _row(data["evaluations"], len(state.X) + 1, "evaluations")
            return new(state, checks=(*state.checks, check))
        case "corrected":
            return _with_correction(state, data)
        case "finished":
            summary = _mapping(data["summary"], "the summary")
            if state.summary is not None:
                raise StoreError("the run finishes a second time", hint=_EDITED)
            return new(state, summary=summary)
    if event.kind in _NESTED:
        return state
    raise StoreError(
        f"there is no event {event.kind!r} in a run",
        hint="read the run with the version of map-bo that wrote it",
    )


def _with_parts(state: RunState, index: int, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes in the state by the parts that a row was measured on."""
    parts = decode_parts(data)
    if not parts:
        return {}
    covered = dict(state.covered.get(index, {}))
    for part in parts:
        if part.start != covered.get(part.evaluator, 0):
            raise StoreError(
                f"row {index} covers {covered.get(part.evaluator, 0)} examples of "
                f"{part.evaluator!r} before those from {part.start}",
                hint=_EDITED,
            )
        covered[part.evaluator] = part.stop
    paid = {**state.paid, index: state.paid.get(index, 0.0) + _number(data["share"], 1)}
    return {"covered": {**state.covered, index: covered}, "paid": paid}


def _scored(state: RunState, data: Mapping[str, Any]) -> RunState:
    """Return the state after a row that has its outcome was measured on more examples."""
    index = _row(data["index"], len(state.X), "proposed rows")
    before = state.outcomes.get(index)
    if before is None or before.failures[0] is not None:
        raise StoreError(f"row {index} gets more examples, and has failed or none", hint=_EDITED)
    new, alive = dataclasses.replace, _without(state.deaths, [index])
    if "reason" in data:
        paid = {**state.paid, index: state.paid.get(index, 1.0) + _number(data["share"], 1)}
        return new(state, paid=paid, closed=state.closed | {index}, deaths=alive)
    after = _outcome(data["observation"], state)
    if not is_at(after.X[0], state.X[index]):
        raise StoreError(f"more examples of row {index} belong to another point", hint=_EDITED)
    try:
        examples = joined_examples(before.examples, after.examples)
    except DataError as error:
        raise StoreError(f"more examples of row {index}: {error.message}", hint=_EDITED) from error
    outcomes = {**state.outcomes, index: new(after, examples=examples)}
    more = {"attempts": _without(state.attempts, [index]), **_with_parts(state, index, data)}
    return new(state, outcomes=outcomes, deaths=alive, **more)


def refuse_outcome(state: RunState, index: int, outcome: Observations) -> None:
    """Refuse an outcome that a proposed row cannot take.

    Raises:
        StoreError: When the row has its outcome already, or this one was measured elsewhere.
    """
    if index in state.outcomes:
        raise StoreError(
            f"row {index} does not wait for an outcome: it has one, and no outcome is overwritten",
            hint=f"tell one outcome for one of the rows that wait: {state.pending}",
        )
    if not is_at(outcome.X[0], state.X[index]):
        raise StoreError(
            f"the outcome of row {index} belongs to another point: it was measured at "
            f"{_rounded(outcome.X[0])}, and {_rounded(state.X[index])} was proposed",
            hint="measure the proposed row as it is; results of other points are taken by "
            "map_bo.optimize(..., known=observations)",
        )


def _rounded(x: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in x.tolist()]


def _row(value: Any, count: int, what: str) -> int:
    """Return a number of the record that must be one of ``count``.

    Raises:
        StoreError: When it is not.
    """
    if type(value) is not int or not 0 <= value < count:
        raise StoreError(f"{str(value)[:40]!r} is not one of {count} {what}", hint=_EDITED)
    return value


def _rows(values: Any, count: int, what: str) -> list[int]:
    """Return different numbers, each one of ``count``."""
    if not isinstance(values, list | tuple):
        raise StoreError(f"numbers of {what} are not a list", hint=_EDITED)
    rows = [_row(value, count, what) for value in values]
    if len(set(rows)) < len(rows):
        raise StoreError(f"one of the {what} is named twice", hint=_EDITED)
    return rows


def _number(value: Any, most: float = math.inf) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most + 1e-6:
        raise StoreError(f"{str(value)[:40]!r} is not a number from 0 to {most}", hint=_EDITED)
    return float(value)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise StoreError(f"{what} is not a mapping but {str(value)[:40]!r}", hint=_EDITED)
    return value


def _without(counts: Mapping[int, Any], rows: Iterable[int]) -> dict[int, Any]:
    gone = set(rows)
    return {row: count for row, count in counts.items() if row not in gone}


def _outcome(data: Any, state: RunState) -> Observations:
    outcome = decode_observations(_mapping(data, "an observation"), state.metrics)
    if len(outcome) != 1 or outcome.X.shape[-1] != state.X.shape[-1]:
        raise StoreError(
            f"an outcome has {len(outcome)} rows of {outcome.X.shape[-1]} coefficients instead of "
            f"one of {state.X.shape[-1]}",
            hint=_EDITED,
        )
    return outcome


def check_created(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the data of ``created`` after checking the types of what readers rely on.

    Raises:
        StoreError: When one is of another type.
    """
    config = data.get("config")
    for part, value in (
        ("settings", data.get("settings", {})),
        ("versions", data.get("versions", {})),
        ("config", {} if config is None else config),
    ):
        _mapping(value, f"{part!r} of the run")
    if config is not None:
        _mapping(config.get("tree", {}), "'config.tree' of the run")
        if not isinstance(config.get("cwd"), str | None):
            raise StoreError("'config.cwd' of the run is not a path", hint=_EDITED)
    if not isinstance(data.get("nested"), Mapping | None):
        raise StoreError("'nested' of the run is not a mapping", hint=_EDITED)
    return data


def _checked(data: Mapping[str, Any], state: RunState) -> Mapping[str, Any]:
    if state.created or len(state.X):
        raise StoreError("the run is created a second time", hint=_EDITED)
    return check_created(data)


def _with_attempt(state: RunState, kind: str, data: Mapping[str, Any]) -> RunState:
    """Return the state after an evaluation has begun, or ended without an outcome."""
    if "probe" in data:  # of a nested run, before its nodes
        return state
    if "verify" in data:
        row = _row(data["verify"], 0 if state.front is None else len(state.front), "front points")
        done, name = row in state.verified, "verify_"
        attempts, deaths = state.verify_attempts, state.verify_deaths
    else:
        row, name = _row(data["index"], len(state.X), "proposed rows"), ""
        done, attempts, deaths = row in state.outcomes, state.attempts, state.deaths
    if done and (name or row not in state.covered):
        raise StoreError(f"{kind!r} after the outcome of row {row}", hint=_EDITED)
    # The driver's end says nothing of what workers were evaluating; their own deaths are outcomes.
    change = -1 if kind != "started" else 0 if data.get("worker") else 1
    begun = {**deaths, row: max(0, deaths.get(row, 0) + change)}
    changes: dict[str, Any] = {f"{name}deaths": begun}
    if kind == "attempt":
        changes[f"{name}attempts"] = {**attempts, row: attempts.get(row, 0) + 1}
        if "observation" in data:
            before = state.verify_attempted if name else state.attempted
            measured = _outcome(data["observation"], state)
            changes[f"{name}attempted"] = {**before, row: measured}
    return dataclasses.replace(state, **changes)


def _with_correction(state: RunState, data: Mapping[str, Any]) -> RunState:
    front = state.front
    if front is None:
        raise StoreError("a front is corrected before it was solved", hint=_EDITED)
    new = dataclasses.replace
    if "corrected" in data:
        values = decode_tensor(data["corrected"]).reshape(front.mean.shape)
        front = new(front, corrected=values)
    if "feasible" in data:
        front = new(front, feasible=decode_tensor(data["feasible"]).reshape(len(front)))
    return new(state, front=front)


def _reopened(state: RunState, data: Mapping[str, Any]) -> RunState:
    again = _rows(data["indices"], len(state.X), "proposed rows")
    for index in again:
        if index not in state.outcomes or bool(state.outcomes[index].ok[0]):
            raise StoreError(f"row {index} has not failed, and is to be repeated", hint=_EDITED)
    # What they have measured all the same is kept, as between two attempts.
    halves = {index: state.outcomes[index] for index in again}
    kept = {index: row for index, row in halves.items() if bool(row.partial.any())}
    anew = ("outcomes", "attempts", "deaths", "covered", "paid")
    changes: dict[str, Any] = {name: _without(getattr(state, name), again) for name in anew}
    return dataclasses.replace(
        state,
        **changes,
        attempted={**_without(state.attempted, again), **kept},
        checks=(),  # they were made on other data
        imported=_without(state.imported, [i for i in again if not halves[i].incomplete.any()]),
    )


def _extended(state: RunState, data: Mapping[str, Any]) -> RunState:
    new, extensions = dataclasses.replace, (*state.extensions, data)
    state = new(state, created=with_extension(state.created, data), extensions=extensions)
    if not data["reopens"]:
        return state
    found = {len(state.X) + i: state.verified[row] for i, row in enumerate(sorted(state.verified))}
    return new(
        state,
        X=torch.cat([state.X, *(row.X for row in found.values())]),
        outcomes={**state.outcomes, **found},
        front_rows=(*state.front_rows, *found),
        front=None,
        front_data={},
        verified={},
        verify_attempts={},
        verify_deaths={},
        verify_attempted={},
        summary=None,
        checks=() if state.stopped else state.checks,  # the rule is asked again
    )


def _with_front(state: RunState, data: Mapping[str, Any]) -> RunState:
    if state.front is not None:
        raise StoreError("the front is solved a second time", hint=_EDITED)
    front = decode_front(_mapping(data["front"], "the front"), state.metrics)
    if front.X.shape[-1] != state.X.shape[-1]:
        raise StoreError(f"the front has {front.X.shape[-1]} coefficients", hint=_EDITED)
    _rows(data["verify"], len(front), "front points")
    decode_scale(_mapping(data["reference"], "'reference' of the front"), state.metrics)
    for part in ("surrogate", "seconds", "uncertainty"):
        _mapping(data.get(part, {}), f"{part!r} of the front")
    return dataclasses.replace(state, front=front, front_data=data)


def _with_verified(state: RunState, data: Mapping[str, Any]) -> RunState:
    front = state.front
    row = _row(data["row"], 0 if front is None else len(front), "front points")
    assert front is not None
    if row in state.verified:
        raise StoreError(f"front point {row} is verified a second time", hint=_EDITED)
    outcome = _outcome(data["observation"], state)
    if outcome.failures[0] is None and is_at(outcome.X[0], front.X[row]):
        front = front.with_real([row], outcome.Y)
    return dataclasses.replace(
        state,
        verified={**state.verified, row: outcome},
        front=front,
        verify_deaths=_without(state.verify_deaths, [row]),
    )


def _with_imported(state: RunState, data: Mapping[str, Any]) -> RunState:
    found = decode_observations(_mapping(data["observations"], "observations"), state.metrics)
    first = len(state.X)
    indices = _rows(data["indices"], 2**31, "rows")
    if len(indices) != len(found) or found.X.shape[-1] != state.X.shape[-1]:
        raise StoreError(
            f"{len(indices)} imported rows have {len(found)} outcomes of "
            f"{found.X.shape[-1]} coefficients",
            hint=_EDITED,
        )
    for row, index in enumerate(indices):
        if index < first:
            refuse_outcome(state, index, found.select([row]))
    source = _mapping(data["source"], "'source' of imported rows")
    added = [row for row, index in enumerate(indices) if index >= first]
    if [indices[row] for row in added] != list(range(first, first + len(added))):
        raise StoreError(
            f"imported rows have numbers {indices}, and the record holds {first} rows before them",
            hint=_EDITED,
        )
    queue = decode_tensor(data.get("queue", [])).reshape(-1, state.X.shape[-1])
    if not bool(queue.isfinite().all()):
        raise StoreError("a queued row holds NaN or infinity", hint=_EDITED)
    after = dataclasses.replace(
        state,
        X=torch.cat([state.X, found.X[added], queue]),
        outcomes={
            **state.outcomes,
            **{i: found.select([row]) for row, i in enumerate(indices)},
        },
        imported={**state.imported, **dict.fromkeys(indices, source)},
    )
    return _reopened(after, {"indices": data["complete"]}) if "complete" in data else after


def replay(events: Iterable[Event], metrics: tuple[Metric, ...], d: int) -> RunState:
    """Return the state after all ``events``.

    Raises:
        StoreError: When an event does not hold what its kind promises.
    """
    return replay_whole(events, metrics, d)[0]


def replay_whole(
    events: Iterable[Event], metrics: tuple[Metric, ...], d: int, *, partly: bool = False
) -> tuple[RunState, int, StoreError | None]:
    """Return the state after all ``events``, or after as many as can be read.

    Args:
        events: Events in their order.
        metrics: The ``m`` metrics.
        d: Number of coefficients.
        partly: Whether to stop before the first event that cannot be read, instead of raising.

    Returns:
        The state, the number of events that it is made from, and what is wrong with the next.

    Raises:
        StoreError: When an event does not hold what its kind promises.
    """
    state, count = RunState(metrics=metrics, X=torch.zeros(0, d, dtype=torch.float64)), 0
    for event in events:
        try:
            state = advance(state, event)
        except UNREADABLE as error:
            what = error.message if isinstance(error, StoreError) else repr(error)
            refusal = StoreError(
                f"event {count + 1} ({event.kind[:40]!r}) of the run cannot be read: {what[:500]}",
                hint="`map-bo check RUN` says what is whole, and `map-bo repair RUN` keeps it; or "
                "read the run with the version of map-bo that wrote it",
            )
            if partly:
                return state, count, refusal
            raise refusal from error
        count += 1
    return state, count, None
