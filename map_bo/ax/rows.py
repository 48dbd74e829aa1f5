"""The rows of a run as an outside system wants them: point, outcome, origin and times."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from map_bo.data import Observations
from map_bo.loop.state import RunState
from map_bo.plain import name_of
from map_bo.scale import anchor_rows
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import encode_event
from map_bo.tracking.store import Event

__all__ = ["Row", "rows_of", "run_id"]


@dataclass(frozen=True, eq=False)
class Row:
    """A point that was proposed or is to be verified.

    Attributes:
        x: ``d`` coefficients.
        outcome: Its one-row observations; None while it waits.
        method: Where the point comes from: ``"anchor"``, the sampler's name, ``"imported"`` or
            ``"verification"``.
        origin: Plain data: its ``row`` among the proposed rows, or its ``verification`` (a row of
            the front); the ``anchor``'s name.
        created: Seconds since the epoch when it was proposed.
        finished: When its outcome was recorded.
    """

    x: Tensor
    outcome: Observations | None
    method: str
    origin: Mapping[str, Any]
    created: float
    finished: float | None


def run_id(events: Sequence[Event]) -> str:
    """Return what tells this run from all others: a digest of how and when it was started."""
    return hashlib.sha256(encode_event(events[0])).hexdigest()[:16] if events else ""


def rows_of(state: RunState, space: CoefficientSpace, events: Sequence[Event]) -> list[Row]:
    """Return all rows of a run: those proposed, in order, then those to verify."""
    times, names = _times(events), space.anchors().names
    is_anchor = anchor_rows(state.X, space)
    sampler = name_of(state.created.get("settings", {}).get("sampler", "")) or "sampler"
    rows = []
    for i, x in enumerate(state.X):
        origin: dict[str, Any] = {"row": i}
        method = "imported" if i in state.imported else sampler
        method = "verification" if i in state.front_rows else method  # of an earlier front
        if method == sampler:
            for name, here in zip(names, is_anchor[:, i].tolist(), strict=True):
                if here:
                    method, origin["anchor"] = "anchor", name
        created, finished = times.proposed.get(i, 0.0), times.observed.get(i)
        rows.append(Row(x, state.outcomes.get(i), method, origin, created, finished))
    for k in state.front_data.get("verify", ()):
        assert state.front is not None
        rows.append(
            Row(
                state.front.X[k],
                state.verified.get(k),
                "verification",
                {"verification": k},
                times.solved,
                times.verified.get(k),
            )
        )
    return rows


@dataclass
class _Times:
    proposed: dict[int, float] = field(default_factory=dict)
    observed: dict[int, float] = field(default_factory=dict)
    verified: dict[int, float] = field(default_factory=dict)
    solved: float = 0.0


def _times(events: Sequence[Event]) -> _Times:
    times = _Times()
    for event in events:
        match event.kind:
            case "proposed":
                first = len(times.proposed)
                for i in range(len(event.data["X"])):
                    times.proposed[first + i] = event.time
            case "observed":
                times.observed[event.data["index"]] = event.time
            case "imported":
                for i in event.data["indices"]:
                    times.proposed.setdefault(i, event.time)
                    times.observed[i] = event.time
                for i in event.data.get("complete", ()):
                    del times.observed[i]
                first = len(times.proposed)
                for i in range(len(event.data.get("queue", ()))):
                    times.proposed[first + i] = event.time
            case "front":
                times.solved = event.time
            case "extended" if event.data["reopens"]:
                first = len(times.proposed)
                for i, row in enumerate(sorted(times.verified)):
                    times.proposed[first + i] = times.solved
                    times.observed[first + i] = times.verified[row]
                times.verified.clear()
            case "verified":
                times.verified[event.data["row"]] = event.time
    return times
