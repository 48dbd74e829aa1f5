from __future__ import annotations

import dataclasses

import pytest
import torch

from map_bo.data import Observations
from map_bo.loop.known import begin_with
from map_bo.loop.run import Run
from map_bo.loop.transfer.completing import Completing, completing
from map_bo.loop.transfer.sources import take
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import quick
from tests.loop.transfer.grown import Growing

OLD = Growing()
ANCHORS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.3, 0.6]], dtype=torch.float64)


def begun(problem: Growing) -> Run:
    """A run that starts from three points of an older study."""
    store, settings = MemoryStore(), quick(12)
    state = Run(problem, settings, store).state
    begin_with(take(OLD.seen_at(ANCHORS), problem), store, state, settings.search)
    return Run(problem, settings, store)


def test_a_run_without_imported_rows_has_its_own_problem() -> None:
    problem = Growing()
    assert completing(problem, Run(problem, quick(), MemoryStore()).state) is problem


def test_only_what_is_lacking_is_measured() -> None:
    problem = Growing(tasks=("x", "y", "z"))
    run = begun(problem)
    whole = completing(problem, run.state)
    assert isinstance(whole, Completing)
    assert whole.metrics == problem.metrics
    assert whole.space == problem.space
    points = torch.tensor([[1.0, 0.0], [0.2, 0.2]], dtype=torch.float64)
    seen = whole.evaluate(points, generator=torch.Generator())
    assert problem.calls == [((1.0, 0.0), ("z",)), ((0.2, 0.2), ("x", "y", "z"))]
    assert torch.allclose(seen.Y, problem.true_values(points))
    assert bool(seen.ok.all())


def test_workers_are_asked_for_what_is_lacking() -> None:
    problem = Growing(tasks=("x", "y", "z"))
    whole = completing(problem, begun(problem).state)
    assert isinstance(whole, Completing)
    x = ANCHORS[1]
    assert whole.request(x)[1] == ("z",)
    assert whole.request(torch.full((2,), 0.4, dtype=torch.float64))[1] == ("x", "y", "z")
    part = problem.restricted(["z"]).seen_at(x.unsqueeze(0))
    row = whole.receive(x, dataclasses.replace(part, cost=torch.tensor([3.0])))
    assert torch.allclose(row.Y, problem.true_values(x.unsqueeze(0)))
    assert float(row.cost) == 3.0


def test_a_failure_keeps_what_the_older_study_measured() -> None:
    problem = Growing(tasks=("x", "y", "z"), fails=frozenset({"z"}))
    whole = completing(problem, begun(problem).state)
    seen = whole.evaluate(ANCHORS[:1], generator=torch.Generator())
    assert seen.failures == ("z failed",)
    assert seen.measured.tolist() == [[True, True, False]]


def test_what_cannot_be_divided_is_measured_anew() -> None:
    class Whole(Growing):
        restricted = None  # type: ignore[assignment]

    problem = Whole(tasks=("x", "y", "z"))
    assert not isinstance(completing(problem, begun(problem).state), Completing)


@pytest.mark.parametrize("fails", [frozenset(), frozenset({"z"})])
def test_gradients_are_put_together(fails: frozenset[str]) -> None:
    problem = Growing(tasks=("x", "y", "z"))
    held = Observations(
        ANCHORS[:1], torch.tensor([[1.0, 2.0, torch.nan]]), problem.metrics,
        gradients=torch.tensor([[[1.0, 1.0], [2.0, 2.0], [torch.nan] * 2]]),
    )  # fmt: skip
    whole = Completing(problem, problem, {tuple(ANCHORS[0].tolist()): held})
    part = Observations(
        ANCHORS[:1], torch.tensor([[torch.nan if fails else 3.0]]), problem.metrics[2:],
        failures=("broke" if fails else None,), gradients=torch.full((1, 1, 2), 3.0),
    )  # fmt: skip
    row = whole.receive(ANCHORS[0], part)
    assert row.gradients is not None
    assert row.gradients[0, :2].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert bool(row.gradients[0, 2].isnan().all()) == bool(fails)
