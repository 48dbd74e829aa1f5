from __future__ import annotations

import pytest
import torch

from map_bo.data import Observations
from map_bo.loop.run import ObservedVolume, Run
from map_bo.loop.summary import last_set_aside
from map_bo.rng import make_generator
from map_bo.samplers.posterior.variance import IntegratedVariance
from map_bo.space import CoefficientSpace
from map_bo.surrogates.outliers import Outlier
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, SafeBowls, quick


def volumes(problem: Bowls, budget: int = 12, **changes: object) -> tuple[Run, list[float | None]]:
    run = Run(problem, quick(budget, **changes), MemoryStore())
    run.drive()
    told = [e.data.get("hypervolume") for e in run.store.read() if e.kind == "observed"]
    return run, told


def test_it_begins_with_base_and_experts_and_ends_as_the_summary_says() -> None:
    run, told = volumes(Bowls())
    known = [value for value in told if value is not None]
    assert told[:2] == [None, None]  # base, a, b
    assert len(known) == len(told) - 2
    assert known == sorted(known)
    assert run.state.summary is not None
    assert known[-1] == pytest.approx(run.state.summary["hypervolume"]["observed points"])


def test_a_failed_expert_does_not_hold_it_back_and_failures_add_nothing() -> None:
    _, told = volumes(Bowls(fails=lambda number, x: "broken" if number in (3, 6) else None))
    assert told[2] is not None
    assert told[5] == told[4]


def test_a_given_reference_point_is_taken() -> None:
    run, told = volumes(Bowls(), reference={"near a": -3.0, "far from b": 5.0})
    assert run.state.summary is not None
    assert told[-1] == pytest.approx(run.state.summary["hypervolume"]["observed points"])


def test_a_metric_without_a_range_changes_nothing() -> None:
    _, told = volumes(SafeBowls())
    assert told[2:] == pytest.approx(volumes(Bowls())[1][2:])


def test_going_on_says_the_same() -> None:
    whole, told = volumes(Bowls(noise=0.01))
    store = MemoryStore()
    for event in [*whole.store.read()][:12]:
        store.append(event)
    again = Run(Bowls(noise=0.01), quick(12), store)
    again.drive()
    assert [e.data.get("hypervolume") for e in store.read() if e.kind == "observed"] == told


def test_an_expert_that_failed_and_is_measured_after_all_sets_the_scale() -> None:
    run = Run(Bowls(), quick(10), MemoryStore())
    rows = run.ask(5)
    lost = Observations.failed(run.state.X[1:2], run.problem.metrics, "broken")  # expert a
    for index in rows:
        x = run.state.X[index : index + 1]
        run.tell(index, lost if index == 1 else Bowls().evaluate(x, generator=make_generator(0)))
    assert run.reopen_failures() == 1
    summary = run.drive().summary
    told = [e.data.get("hypervolume") for e in run.store.read() if e.kind == "observed"]
    assert told[-1] == pytest.approx(summary["hypervolume"]["observed points"])


def test_without_experts_there_is_no_scale() -> None:
    problem = Bowls()
    seen = problem.evaluate(torch.full((3, 2), 0.3), generator=torch.Generator())
    assert ObservedVolume(CoefficientSpace.box(("a", "b"))).after(seen) == {}
    lost = Bowls(fails=lambda number, x: "broken")
    seen = lost.evaluate(torch.eye(2, dtype=torch.float64), generator=torch.Generator())
    assert ObservedVolume(CoefficientSpace.box(("a", "b"))).after(seen) == {}


class DivergedExpert(Bowls):
    """The loss of expert a, evaluation 2, returns a thousand."""

    def true_values(self, X: torch.Tensor) -> torch.Tensor:
        Y = super().true_values(X)
        a = torch.tensor([1.0, 0.0], dtype=torch.float64)
        Y[(X == a).all(-1), 1] = 1e3
        return Y


def test_the_diverged_value_of_an_expert_flattens_it_only_until_it_is_set_aside() -> None:
    sampler = IntegratedVariance(restarts=1, raw_samples=16, steps=5)
    whole, told = volumes(DivergedExpert(), 12, sampler=sampler, verify=0)
    summary = whole.state.summary
    assert summary is not None
    assert [one["evaluation"] for one in summary["outliers"]] == [2]
    assert told[-1] == pytest.approx(summary["hypervolume"]["observed points"])
    store = MemoryStore()
    events = [*whole.store.read()]
    last = max(i for i, event in enumerate(events) if event.kind == "proposed")
    for event in events[: last + 1]:
        store.append(event)
    Run(DivergedExpert(), quick(12, sampler=sampler, verify=0), store).drive()
    assert [e.data.get("hypervolume") for e in store.read() if e.kind == "observed"] == told


def test_what_is_set_aside_has_to_be_there() -> None:
    space = CoefficientSpace.box(("a", "b"))
    X = torch.cat([space.anchors().X, torch.full((1, 2), 0.3, dtype=torch.float64)])
    seen = DivergedExpert().evaluate(X, generator=make_generator(0))
    one = Outlier(1, "far from b", 1e3, 1.0, 0.1)
    plain = ObservedVolume(space).after(seen)
    assert ObservedVolume(space).after(seen, [one]) != plain
    others = [Outlier(9, "far from b", 1e3, 1.0, 0.1), Outlier(1, "no", 1e3, 1.0, 0.1)]
    others.append(Outlier(1, "far from b", 2.0, 1.0, 0.1))
    assert ObservedVolume(space).after(seen, others) == plain


@pytest.mark.parametrize("recorded", [None, 3, [3], [{}], [{"evaluation": "x"}], {"a": 1}])
def test_a_record_without_sense_sets_nothing_aside(recorded: object) -> None:
    assert last_set_aside([Event("proposed", {"surrogate": {"outliers": recorded}})]) == ()
    assert last_set_aside([Event("proposed", {"surrogate": recorded})]) == ()
