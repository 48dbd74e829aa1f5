"""The state of a run, rebuilt from its events alone: the same whether or not it was interrupted.

Events and their data:

``created``    settings, problem (its description), space, metrics, versions
``proposed``   ``X``: rows to evaluate, numbered on from the rows proposed before; ``seconds``;
               ``surrogate``: the fit they were chosen by, if there was one: its ``settings``,
               ``model`` and leave-one-out scores
``attempt``    ``index`` (of a proposed row) or ``verify`` (row of the front), ``reason``: an
               evaluation failed and is tried again; ``observation``: what it measured all the same
``observed``   ``index``, ``observation``: the outcome of a proposed row, a failure included;
               ``hypervolume`` of all points measured until then, once base and experts are known
``reopened``   ``indices``: failed rows that are to be evaluated again
``imported``   ``indices``, ``observations``: outcomes from elsewhere, of rows that waited or of new
               rows; ``source``: where they come from
``front``      the predicted front and which of its points to verify
``verified``   ``row``, ``observation``: what was measured at a front point
``checked``    ``evaluations``, ``gain``, ``floor``, ``seconds``, ``stop``: a check of the stopping
               rule after so many evaluations; the reason to stop, or None
``corrected``  ``corrected``: the front's predictions with the verified points among the data
``finished``   the summary

:func:`refuse_another` says whether a record belongs to the run that wants to continue it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations
from map_bo.errors import AnotherRunError, MapBoError, SettingsError, StoreError
from map_bo.loop.settings import Settings
from map_bo.plain import Described, flat, identity_of, modernise, to_plain
from map_bo.problems.problem import Problem
from map_bo.tracking.codec import (
    decode_front,
    decode_observations,
    decode_tensor,
    encode_metric,
)
from map_bo.tracking.store import Event

__all__ = [
    "RunState",
    "advance",
    "difference",
    "problem_identity",
    "refuse_another",
    "replay",
    "run_identity",
]


def difference(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Describe the first way in which a record differs from ``identity``; None if in no way.

    Files may have moved, but their digests must be the same.
    """
    before: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for part, value in identity.items():
        told = _with_resampling(recorded.get(part), value)
        if part == "settings":
            told = _with_defaults(told)
        before |= flat(modernise(told, value), part)
        now |= flat(value, part)
    for values in (before, now):
        for key in list(values):
            # Files may move; their digests tell whether they are the same.
            if key.rpartition(".")[2] == "source" or values[key] == {}:
                del values[key]
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not different:
        return None
    key = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{key} was {before.get(key)!r} and is {now.get(key)!r}{more}"


def refuse_another(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a record of another run: one whose identity differs from ``identity``.

    Raises:
        AnotherRunError: When they differ; the message names the first difference.
    """
    found = difference(recorded, identity)
    if found is not None:
        raise AnotherRunError(
            f"the run directory belongs to another run: {found}",
            hint="use another run directory, or the settings with which the run was started",
        )


def run_identity(problem: Problem, settings: Settings, **parts: Any) -> dict[str, Any]:
    """Return what makes two runs the same run, as it is read back from a record.

    Args:
        problem: What is optimised.
        settings: How.
        **parts: Further parts of the identity.
    """
    identity = {
        "settings": identity_of(settings)["fields"],
        **parts,
        "problem": problem_identity(problem),
        "space": problem.space.describe(),
        "metrics": [encode_metric(metric) for metric in problem.metrics],
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def problem_identity(problem: Problem) -> Any:
    """Return plain data by which a problem is recognised.

    One that does not describe itself is recognised by its fields where they are settings (those
    of a frozen dataclass), and by its type alone where they are not.
    """
    if isinstance(problem, Described):
        return problem.describe()
    if dataclasses.is_dataclass(problem) and type(problem).__dataclass_params__.frozen:
        try:
            return to_plain(problem)
        except SettingsError:
            pass
    return {"type": type(problem).__name__}


def _with_defaults(recorded: Any) -> Any:
    """Return recorded settings with the defaults of those that their version did not know."""
    if not isinstance(recorded, Mapping):
        return recorded
    simple = {
        each.name: identity_of(each.default)
        for each in dataclasses.fields(Settings)
        if each.default is not dataclasses.MISSING
    }
    return {**simple, **recorded}


def _with_resampling(recorded: Any, now: Any) -> Any:
    """Return the description of a problem with what version 0.1 left out of its metrics.

    That a metric draws new examples was recorded with the run's own metrics, and is compared there.
    """
    if not isinstance(recorded, Mapping) or not isinstance(now, Mapping):
        return recorded
    ours, theirs = now.get("metrics"), recorded.get("metrics")
    if not isinstance(ours, list) or not isinstance(theirs, list) or len(ours) != len(theirs):
        return recorded
    both = zip(ours, theirs, strict=True)
    return {
        **recorded,
        "metrics": [{"resampling": a.get("resampling"), **modernise(b, a)} for a, b in both],
    }


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run stands.

    Attributes:
        metrics: The ``m`` metrics.
        X: ``n x d`` every row proposed so far.
        outcomes: Index of a proposed row -> its one-row observations.
        attempts: Index of a proposed row -> how often it has failed and will be tried again.
        verify_attempts: Row of the front -> how often its verification has failed.
        attempted: Index of a proposed row -> what attempts that failed have measured of it.
        verify_attempted: Row of the front -> the same of its verification.
        front: The predicted front, once it has been solved.
        front_data: What else was recorded with the front.
        verified: Row of the front -> its one-row observations.
        summary: The summary, once the run has finished.
        proposing: Seconds spent on proposals.
        checks: The checks of the stopping rule, in order.
        imported: Index of a proposed row whose outcome comes from elsewhere -> its source.
    """

    metrics: tuple[Metric, ...]
    X: Tensor
    created: Mapping[str, Any] = field(default_factory=dict)
    outcomes: Mapping[int, Observations] = field(default_factory=dict)
    attempts: Mapping[int, int] = field(default_factory=dict)
    verify_attempts: Mapping[int, int] = field(default_factory=dict)
    front: Front | None = None
    front_data: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[int, Observations] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    proposing: float = 0.0
    checks: tuple[Mapping[str, Any], ...] = ()
    imported: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    attempted: Mapping[int, Observations] = field(default_factory=dict)
    verify_attempted: Mapping[int, Observations] = field(default_factory=dict)

    @property
    def seen(self) -> Observations:
        """All outcomes of the search, in the order they were proposed."""
        return _joined([self.outcomes[i] for i in sorted(self.outcomes)], self)

    @property
    def verification(self) -> Observations:
        """All outcomes of the verification, in the order of their front rows."""
        return _joined([self.verified[row] for row in sorted(self.verified)], self)

    @property
    def stopped(self) -> str | None:
        """Why the search stopped before its budget was spent; None when it did not."""
        return self.checks[-1]["stop"] if self.checks else None

    @property
    def data(self) -> Observations:
        """All outcomes: the search, then the verification."""
        return self.seen.append(self.verification)

    @property
    def pending(self) -> list[int]:
        """Indices of the rows that were proposed and have no outcome."""
        return [i for i in range(len(self.X)) if i not in self.outcomes]


def _joined(rows: list[Observations], state: RunState) -> Observations:
    return Observations.joined(rows, state.X.shape[-1], state.metrics)


def advance(state: RunState, event: Event) -> RunState:
    """Return the state after ``event``. Unknown kinds change nothing."""
    data, new = event.data, dataclasses.replace
    match event.kind:
        case "created":
            return new(state, created=data)
        case "proposed":
            rows = decode_tensor(data["X"]).reshape(-1, state.X.shape[-1])
            seconds = state.proposing + data["seconds"]
            return new(state, X=torch.cat([state.X, rows]), proposing=seconds)
        case "attempt" if "verify" in data:
            tried = state.verify_attempts.get(data["verify"], 0) + 1
            return new(
                state,
                verify_attempts={**state.verify_attempts, data["verify"]: tried},
                verify_attempted=_with_attempt(state.verify_attempted, data["verify"], data, state),
            )
        case "attempt":
            tried = state.attempts.get(data["index"], 0) + 1
            return new(
                state,
                attempts={**state.attempts, data["index"]: tried},
                attempted=_with_attempt(state.attempted, data["index"], data, state),
            )
        case "observed":
            outcome = decode_observations(data["observation"], state.metrics)
            return new(state, outcomes={**state.outcomes, data["index"]: outcome})
        case "reopened":
            again = set(data["indices"])
            return new(
                state,
                outcomes={i: out for i, out in state.outcomes.items() if i not in again},
                attempts={i: tried for i, tried in state.attempts.items() if i not in again},
                checks=(),  # they were made on other data
                imported={i: source for i, source in state.imported.items() if i not in again},
            )
        case "imported":
            return _with_imported(state, data)
        case "front":
            return new(state, front=decode_front(data["front"], state.metrics), front_data=data)
        case "verified":
            outcome = decode_observations(data["observation"], state.metrics)
            front = state.front
            if (
                front is not None
                and outcome.failures[0] is None
                and torch.allclose(outcome.X[0], front.X[data["row"]], rtol=0.0, atol=1e-6)
            ):
                front = front.with_real([data["row"]], outcome.Y)
            return new(state, verified={**state.verified, data["row"]: outcome}, front=front)
        case "checked":
            return new(state, checks=(*state.checks, {"stop": data["stop"], **data}))
        case "corrected" if state.front is not None:
            values = decode_tensor(data["corrected"])
            return new(state, front=dataclasses.replace(state.front, corrected=values))
        case "finished":
            return new(state, summary=data["summary"])
    return state


def _with_attempt(
    before: Mapping[int, Observations], row: int, data: Mapping[str, Any], state: RunState
) -> Mapping[int, Observations]:
    if "observation" not in data:
        return before
    return {**before, row: decode_observations(data["observation"], state.metrics)}


def _with_imported(state: RunState, data: Mapping[str, Any]) -> RunState:
    found = decode_observations(data["observations"], state.metrics)
    indices, first = [int(index) for index in data["indices"]], len(state.X)
    added = [row for row, index in enumerate(indices) if index >= first]
    if [indices[row] for row in added] != list(range(first, first + len(added))):
        raise StoreError(
            f"imported rows have numbers {indices}, and the record holds {first} rows before them",
            hint="restore the record from a copy: it was edited by hand",
        )
    return dataclasses.replace(
        state,
        X=torch.cat([state.X, found.X[added]]),
        outcomes={
            **state.outcomes,
            **{i: found.select([row]) for row, i in enumerate(indices)},
        },
        imported={**state.imported, **dict.fromkeys(indices, data["source"])},
    )


def replay(events: Iterable[Event], metrics: tuple[Metric, ...], d: int) -> RunState:
    """Return the state after all ``events``.

    Raises:
        StoreError: When an event does not hold what its kind promises.
    """
    state = RunState(metrics=metrics, X=torch.zeros(0, d, dtype=torch.float64))
    for number, event in enumerate(events, start=1):
        try:
            state = advance(state, event)
        except (MapBoError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise StoreError(
                f"event {number} ({event.kind!r}) of the run cannot be read: {error!r}",
                hint="restore the record from a copy if it was edited by hand, or read it with the "
                "version of map-bo that wrote it",
            ) from error
    return state
