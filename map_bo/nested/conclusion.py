"""From the root of a tree to the result of the whole run, in the coefficients of all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Observations
from map_bo.loop.posterior.front_posterior import assess
from map_bo.loop.result import Choice, Result
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState, replay
from map_bo.loop.summary import outliers_of, summarise
from map_bo.nested.nodes import Node, NodeProblem
from map_bo.nested.promotion import choose_merge
from map_bo.nested.record import NODE
from map_bo.nested.result import NestedResult, NodeRecord, describe_tree
from map_bo.nested.tree import Group
from map_bo.rng import child, make_generator
from map_bo.scale import Scale
from map_bo.surrogates.prediction import Prediction, predict
from map_bo.tracking.codec import (
    decode_observations,
    encode_front,
    encode_observations,
    encode_scale,
    encode_tensor,
)
from map_bo.tracking.store import Event
from map_bo.workers.attempts import measure_each
from map_bo.workers.evaluation import deaths_of
from map_bo.workers.flights import Flights

__all__ = ["Final", "Selection", "conclude", "select"]

_KINDS = ("proposed", "observed", "front", "verified", "corrected", "finished")


@dataclasses.dataclass(frozen=True, eq=False)
class Final:
    """The last run of a tree.

    Attributes:
        node: The root, or the refinement.
        result: What it found, in its own space.
    """

    node: Node
    result: Result


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """A merge for a preference that was given in advance.

    Attributes:
        x: ``d`` coefficients of the experts.
        prediction: The metrics of all tasks there, one row.
    """

    x: Tensor
    prediction: Prediction


def select(final: Final, weights: Mapping[str, float], settings: Settings) -> Selection:
    """Return the merge of the root's front for a preference, with its metrics task by task.

    Where the root measured one number per child, the surrogate is fitted once more, to the metrics
    of the tasks that were measured for it.
    """
    node, result = final.node, final.result
    u = choose_merge(result, weights).x.unsqueeze(0)
    model = result.model
    if node.means is not None or model is None:
        ok = result.seen.succeeded().X
        known = node.ledger.rows(node.full(ok), node.names)
        model = settings.run_surrogate.fit(dataclasses.replace(known, X=ok), node.space)
    return Selection(node.full(u)[0], predict(model, u))


def conclude(
    tree: Group,
    nodes: Sequence[NodeRecord],
    finals: Sequence[Final],
    selections: Sequence[Selection] | None,
    *,
    settings: Settings,
    verify: int,
    spent: int,
    events: Sequence[Event],
    append: Callable[[Event], None],
    directory: Path | None,
    flights: Flights | None = None,
) -> NestedResult:
    """Record the outcome of a nested run like that of a flat one; what is recorded stays.

    Args:
        tree: The tree.
        nodes: What each node did.
        finals: The last runs, one per preference; several preferences may share one.
        selections: Merges for given preferences, which then are the front; None keeps the front.
        settings: The settings of the whole run.
        verify: How many of the selections to measure.
        spent: Measurements of one metric at one point, before the selections are measured.
        events: The record, which grows with ``append``.
        append: Adds an event to the record.
        directory: The directory of the record.
        flights: Where selections are measured; None measures them here.
    """
    final = finals[0]
    node, result = final.node, final.result
    problem, ledger = node.whole, node.ledger
    space = problem.space
    before = ledger.spent

    def step(event: Event, number: int) -> None:
        done = sum(e.kind in _KINDS for e in events)
        if number >= done:
            append(event)

    different = {one.node.key: one for one in finals}.values()
    parts = [_outcomes(one.result.seen, one.node) for one in different]
    written = Observations.joined(parts, space.d, problem.metrics)
    scale = result.scale if node.means is None else Scale.of(written, space)
    front, data = _front(final, selections, scale, settings)
    step(Event("proposed", {"X": encode_tensor(written.X), "seconds": 0.0}), 0)
    count = 1
    for i in range(len(written)):
        one = {"index": i, "observation": encode_observations(written.select([i]))}
        step(Event("observed", one), count)
        count += 1
    step(Event("front", {"front": encode_front(front), **data}), count)
    count += 1
    known = {int(e.data["row"]): e for e in events if e.kind == "verified"}
    verified = _verify(final, front, selections, settings, verify, known, events, append, flights)
    for row, found in verified:
        one = {"row": row, "observation": encode_observations(found)}
        step(Event("verified", one), count)
        count += 1
    corrected = result.front.corrected
    if selections is None and len(corrected) and bool(corrected.isfinite().all()):
        step(Event("corrected", {"corrected": encode_tensor(corrected)}), count)
        count += 1
    state: RunState = replay(events, problem.metrics, space.d)
    outcome = NestedResult(
        **vars(Result.of(state, space, problem=problem, run_dir=directory)),
        tree=tree,
        root=result if selections is None else None,
        directions=node.directions,
        nodes=tuple(nodes),
    )
    if state.summary is None:
        spent += ledger.spent - before
        own = list(result.summary.get("notes") or ())
        notes = list(dict.fromkeys([*own, *outcome.scale.notes()]))
        summary = _summary(outcome, state, settings, spent, nodes, _seconds(events), notes)
        append(Event("finished", {"summary": summary}))
        outcome = dataclasses.replace(outcome, summary=summary)
    if selections is None:
        return outcome
    choices: tuple[Choice, ...] = tuple(outcome.point(i) for i in range(len(selections)))
    return dataclasses.replace(outcome, choices=choices)


def _outcomes(seen: Observations, node: Node) -> Observations:
    """Return a node's outcomes in the full space, task by task."""
    X, ledger = node.full(seen.X), node.ledger
    rows = []
    for i, reason in enumerate(seen.failures):
        at = X[i : i + 1]
        if reason is None:
            known = ledger.rows(at, [metric.name for metric in ledger.metrics])
            rows.append(dataclasses.replace(known, cost=seen.cost[i : i + 1]))
        else:
            names = [metric.name for metric in ledger.metrics]
            failed = ledger.partial(at[0], names, reason)
            rows.append(dataclasses.replace(failed, cost=seen.cost[i : i + 1]))
    return Observations.joined(rows, X.shape[-1], ledger.metrics)


def _front(
    final: Final,
    selections: Sequence[Selection] | None,
    scale: Scale,
    settings: Settings,
) -> tuple[Front, dict[str, Any]]:
    """Return the front in the full space, not verified yet, and the data recorded with it."""
    node, result = final.node, final.result
    uncertainty: Mapping[str, Any] = {}
    if selections is None:
        own = dataclasses.replace(
            result.front,
            real=torch.full_like(result.front.real, torch.nan),
            corrected=torch.full_like(result.front.corrected, torch.nan),
        )
        uncertainty = result.posterior
        if not _same_scale(scale, result.scale) and result.model is not None:
            sure = assess(
                own,
                result.model,
                result.seen,
                result.space,
                scale,
                guarded=settings.guard,
                generator=child(make_generator(settings.seed), "conclusion"),
            )
            uncertainty = sure.describe()
        front = dataclasses.replace(own, X=node.full(own.X))
    else:
        values = [one.prediction for one in selections]
        front = Front(
            X=torch.stack([one.x for one in selections]),
            mean=torch.cat([v.mean for v in values]),
            std=torch.cat([v.std for v in values]),
            lower=torch.cat([v.lower for v in values]),
            upper=torch.cat([v.upper for v in values]),
            metrics=node.problem().tasks,
        )
    return front, {
        "verify": [],
        "reference": encode_scale(scale),
        "surrogate": dict(result.summary.get("surrogate") or {}),
        "seconds": {
            key: value
            for key, value in (result.summary.get("seconds") or {}).items()
            if key in ("fit", "solve", "uncertainty")
        },
        "uncertainty": dict(uncertainty),
    }


def _same_scale(one: Scale, other: Scale) -> bool:
    return (
        one.metrics == other.metrics
        and torch.allclose(one.point, other.point, atol=0.0)
        and torch.allclose(one.width, other.width, atol=0.0)
        and torch.equal(one.ranged, other.ranged)
    )


def _verify(
    final: Final,
    front: Front,
    selections: Sequence[Selection] | None,
    settings: Settings,
    verify: int,
    known: Mapping[int, Event],
    events: Sequence[Event],
    append: Callable[[Event], None],
    flights: Flights | None,
) -> list[tuple[int, Observations]]:
    """Return the measurements at points of the front, in the full space.

    Points that are recorded already (``known``) are not measured again, even where they failed.
    """
    node, result = final.node, final.result
    if selections is None:
        outcomes = _outcomes(result.verification, node)
        gaps = torch.cdist(result.verification.X, result.front.X)
        rows = gaps.argmin(-1).tolist() if len(outcomes) else []
        return [(row, outcomes.select([i])) for i, row in enumerate(rows)]
    names = [metric.name for metric in node.whole.metrics]
    eye = torch.eye(node.whole.space.d, dtype=torch.float64)
    whole = NodeProblem(node.whole, names, node.whole.space, eye, node.ledger)
    chosen = range(min(verify, len(front)))
    generator = make_generator(settings.seed)
    measured = measure_each(
        whole,
        "verify",
        {
            row: (front.X[row], child(generator, "verify", row))
            for row in chosen
            if row not in known
        },
        flights=flights,
        record=lambda kind, data: append(Event(kind, data)),
        deaths=lambda row: deaths_of(events, {"verify": row}),
        retries=settings.retries,
        timeout=settings.timeout,
    )
    return [
        (
            row,
            decode_observations(known[row].data["observation"], whole.metrics)
            if row in known
            else measured[row],
        )
        for row in chosen
    ]


def _summary(
    outcome: NestedResult,
    state: RunState,
    settings: Settings,
    spent: int,
    nodes: Sequence[NodeRecord],
    seconds: Mapping[str, float],
    notes: list[str],
) -> dict[str, Any]:
    assert outcome.tree is not None
    names = [metric.name for metric in outcome.metrics]  # a node may have judged means of them
    aside = [one for one in outliers_of(state, None) if one.metric in names]
    summary = summarise(
        front=outcome.front,
        seen=outcome.seen,
        verification=outcome.verification,
        space=outcome.space,
        scale=outcome.scale,
        settings=settings,
        optimism=outcome.optimism(),
        uncertainty=outcome.uncertainty(),
        stop=None,
        surrogate=state.front_data["surrogate"],
        seconds=seconds,
        notes=notes,
        outliers=aside,
    )
    return {
        **summary,
        "nested": describe_tree(outcome.tree, nodes, spent, len(outcome.metrics)),
    }


def _seconds(events: Sequence[Event]) -> dict[str, float]:
    """Return the seconds of each phase, over all nodes."""
    total: dict[str, float] = {}
    for event in events:
        if event.kind == NODE and event.data["kind"] == "finished":
            for name, value in (event.data["data"]["summary"].get("seconds") or {}).items():
                total[name] = total.get(name, 0.0) + float(value)
    return total
