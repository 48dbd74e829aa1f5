from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from map_bo.errors import (
    AnotherRunError,
    BudgetError,
    ConfigError,
    EvaluationError,
    SpaceError,
    StoreError,
    TreeError,
)
from map_bo.nested.result import NestedResult
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.space import CoefficientSpace, LinearConstraint
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event
from tests.nested.hills import VARIANTS, Hills, nested, outcome, quick
from tests.workers.late import LateWorkers, last


@functools.cache
def finished(name: str) -> tuple[Hills, NestedResult]:
    problem = Hills()
    return problem, nested(problem, budget=48, **VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_measures_no_more_than_its_budget_and_nothing_twice(name: str) -> None:
    problem, result = finished(name)
    assert result.data_sets == len(problem.measured) <= 48 * 4
    assert len(set(problem.measured)) == len(problem.measured)
    assert result.summary["nested"]["flat_evaluations"] == result.data_sets / 4
    assert bool(result.space.contains(result.front.X).all())
    # Real values are those of the coefficients of the experts, wherever they were measured.
    assert torch.allclose(problem.truth(result.seen.X), result.seen.Y)
    at = result.front.verified
    assert torch.allclose(problem.truth(result.front.X[at]), result.front.real[at])
    assert int(at.sum()) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_front_predicts_what_its_coefficients_do(name: str) -> None:
    problem, result = finished(name)
    # The truth is a quadratic, so the surrogate of each node is right but for its prior.
    assert torch.allclose(problem.truth(result.front.X), result.front.mean, atol=0.05)


def test_a_node_measures_only_the_tasks_below_it() -> None:
    problem = Hills()
    nested(problem, stages=2)
    first = [task for task, x in problem.measured if x[2] == x[3] == 0 and (x[0] or x[1])]
    ends = [x for _, x in problem.measured if x[0] and x[2]]
    assert ends  # the root merges both halves
    alone = {task for task, x in problem.measured if x[0] > 0 and x[1] > 0 and x[2] == x[3] == 0}
    assert {"a", "b"} <= alone
    # Only the merges that are promoted are measured on the tasks of the other half.
    others = {x for task, x in problem.measured if task in "cd" and x[2] == x[3] == 0 and any(x)}
    assert len(others) <= 3
    assert len(first) > len(others)


class CrashError(StoreError):
    """Stands for SIGKILL: nothing takes it for a failed evaluation, and nothing is written on."""

    def __init__(self) -> None:
        super().__init__("the process was killed")


class CrashingStore:
    def __init__(self, inner: MemoryStore, at: int) -> None:
        self.inner, self.left = inner, at

    def append(self, event: Event) -> None:
        self.left -= 1
        if self.left < 0:
            raise CrashError
        self.inner.append(event)

    def read(self) -> Iterator[Event]:
        return self.inner.read()


def finished_kinds(store: MemoryStore) -> list[str]:
    """Return the kinds of a record without the starts of evaluations, which a kill repeats."""
    events = (event for event in store.read() if event.subject not in ("started", "interrupted"))
    return [event.kind for event in events]


def survives(name: str, deaths: int) -> None:
    """Kill a run after each of some events, go on with it, and compare."""
    how, settings = Nested(**VARIANTS[name]), quick(24)
    whole, problem = MemoryStore(), Hills()
    expected = outcome(NestedRun(problem, settings, how, whole).drive())
    count = len(list(whole.read()))
    for at in [*range(1, count, max(1, count // deaths)), count - 1]:
        store, again = MemoryStore(), Hills()
        with pytest.raises(CrashError):
            NestedRun(again, settings, how, CrashingStore(store, at)).drive()
        assert outcome(NestedRun(again, settings, how, store).drive()) == expected
        kinds = finished_kinds(store)
        assert kinds == finished_kinds(whole)
        # At most the one measurement that was not recorded yet is made again.
        assert len(again.measured) - len(problem.measured) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points", pytest.param("preferences", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_and_resumed_equals_one_never_killed(name: str) -> None:
    survives(name, deaths=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points", "informed", "published", "preferences", "refined"])
def test_every_variant_survives_being_killed_at_many_places(name: str) -> None:
    survives(name, deaths=25)


@pytest.mark.slow
def test_refinement_never_forgets_what_the_tree_found() -> None:
    problem = Hills()
    tree = nested(problem, budget=28, stages=2)
    refined = nested(Hills(), budget=34, stages=2, refine=6)
    assert len(refined.seen) > 6  # the points of the tree that were measured on all tasks, and more
    assert refined.nodes[-1].name == "refine"
    assert refined.nodes[-1].data_sets <= 6 * 4
    given = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    value = [float(problem.truth(r.choose(given).x[None]).sum()) for r in (tree, refined)]
    assert value[1] >= value[0] - 0.02


def test_constraints_hold_for_the_experts() -> None:
    box = CoefficientSpace.box(("a", "b", "c", "d"), sum_at_most=1.2)
    problem = Hills(box=box)
    result = nested(problem, budget=28, stages=2)
    assert max(sum(x) for _, x in problem.measured) <= 1.2 + 1e-6
    assert float(result.front.X.sum(-1).max()) <= 1.2 + 1e-6


def test_blocks_have_coefficients_of_their_own() -> None:
    box = CoefficientSpace.box(("a", "b", "c", "d"), blocks=("lower", "upper"))

    class Blocks(Hills):
        def truth(self, X: torch.Tensor) -> torch.Tensor:
            return super().truth(X.reshape(len(X), 4, 2).mean(-1))

        def restricted(self, names: Any) -> Blocks:
            return Blocks(self.experts, tuple(names), self.box, self.fails, self.measured)

    result = nested(Blocks(box=box), budget=40, stages=2)
    assert result.space.d == 8
    assert result.nodes[0].coefficients == 4


def test_a_failed_measurement_is_counted_and_kept_out() -> None:
    problem = Hills(fails=lambda x: "no luck" if 0.4 < float(x[0]) < 0.6 else None)
    result = nested(problem, budget=36, stages=2)
    assert result.data_sets == len(problem.measured)
    assert bool(result.front.mean.isfinite().all())


def test_a_node_that_fails_too_often_says_which() -> None:
    problem = Hills(fails=lambda x: "no luck" if float(x[2] + x[3]) else None)
    with pytest.raises(EvaluationError, match=r"node 1: .*failed"):
        nested(problem, budget=36, stages=2)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"stages": 3}, TreeError, "4 experts cannot be merged in 3 stages"),
        ({"tree": [["a", "b"], "c"]}, TreeError, "lacks d"),
        ({"tree": [["a", "b"], ["c", "a"]]}, TreeError, "lacks d"),
        ({"tree": [["a", "b"], ["c", "d", "a"]]}, TreeError, "repeats a"),
        ({"tree": [["a", "b"], ["c", "d", "x"]]}, TreeError, "invents x"),
        ({"tree": "a"}, TreeError, "a tree must be a list"),
        ({"budget": 8}, BudgetError, "its anchors and one more"),
        ({"budgets": {"0.7": 5}}, TreeError, "names a node '0.7' that does not exist"),
        ({"stage_budgets": (8,)}, BudgetError, "1 numbers for 2 stages"),
        ({"budget": 14, "verify": 8}, BudgetError, "1 evaluations for the search after 8"),
        ({"budget": 18, "refine": 3, "verify": 8}, BudgetError, "for the search after 8"),
        ({"tasks": {"z": ("a",)}}, ConfigError, "unknown experts: z"),
        ({"tasks": {"a": ("z",)}}, ConfigError, "unknown metrics z"),
        ({"order": "similarity"}, ConfigError, "how similar its experts are"),
        (
            {"promote": "point", "preferences": ({"a": 1},)},
            ConfigError,
            "does not name b, c, d",
        ),
        (
            {"promote": "point", "preferences": ({"a": 1, "b": 1, "c": 1, "d": 1, "z": 1},)},
            ConfigError,
            "names z, which are not metrics",
        ),
        (
            {"promote": "point", "preferences": ({"a": 0, "b": 0, "c": 0, "d": 0},)},
            ConfigError,
            "no weight above 0",
        ),
        ({"reference": {"a": 0.0}}, ConfigError, "reference point must name every metric"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(
    settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    problem = Hills()
    with pytest.raises(error, match=match):
        nested(problem, **settings)
    assert not problem.measured


def test_an_expert_without_a_task_is_refused() -> None:
    problem = dataclasses.replace(Hills(), experts=("a", "b", "c", "d"), only=("a", "b", "c"))
    with pytest.raises(ConfigError, match="expert d has no task"):
        nested(problem)


def test_a_space_without_zero_is_refused() -> None:
    box = CoefficientSpace.box(("a", "b", "c", "d"), lower=0.1)
    with pytest.raises(SpaceError, match="cannot"):
        nested(Hills(box=box))


def test_shares_that_add_up_to_one_can_be_nested() -> None:
    box = CoefficientSpace.box(("a", "b", "c", "d"), simplex=True)
    result = nested(Hills(box=box), budget=30, stages=2)
    assert torch.allclose(result.front.X.sum(-1), torch.ones(()).double(), atol=1e-6)


def test_constraints_with_negative_weights_compose() -> None:
    space = CoefficientSpace(
        ("a", "b", "c", "d"),
        (-0.5,) * 4,
        (1.0,) * 4,
        (LinearConstraint((1.0, -1.0, 0.0, 0.0), 0.5),),
    )
    result = nested(Hills(box=space), budget=30, stages=2)
    assert bool(space.contains(result.front.X).all())


def test_what_may_change_of_a_nested_run_and_what_may_not() -> None:
    how, store, problem = Nested(**VARIANTS["points"]), MemoryStore(), Hills()
    with pytest.raises(CrashError):
        NestedRun(problem, quick(24), how, CrashingStore(store, 30)).drive()
    before = len(list(store.read()))
    with pytest.raises(AnotherRunError, match=r"budget of a nested run .* was 24 and is 30") as e:
        NestedRun(problem, quick(30), how, store)
    assert "retries, timeout, max_failure_share" in str(e.value.hint)
    with pytest.raises(AnotherRunError, match=r"settings\.seed was 0 and is 1"):
        NestedRun(problem, quick(24, seed=1), how, store)
    assert len(list(store.read())) == before
    changed = quick(24, retries=3, timeout=60.0)
    expected = outcome(NestedRun(Hills(), quick(24), how, MemoryStore()).drive())
    assert outcome(NestedRun(Hills(), changed, how, store).drive()) == expected
    told = [event for event in store.read() if event.subject == "extended"]
    assert told[0].kind == "extended"
    assert set(told[0].data["settings"]) == {"retries", "timeout"}
    assert any(event.kind == "node" for event in told), "the node at work has them too"
    count = len(list(store.read()))
    NestedRun(Hills(), changed, how, store).drive()
    assert len(list(store.read())) == count


class TestSideBySide:
    """Nodes on workers whose results come late, in an order of their own."""

    @staticmethod
    def run(
        problem: Hills, workers: LateWorkers, store: Any = None, **settings: Any
    ) -> tuple[NestedResult, MemoryStore]:
        @dataclasses.dataclass(frozen=True)
        class Given:
            count: int | None = None

            def open(self, problem: object) -> LateWorkers:
                return workers

        kept = MemoryStore() if store is None else store
        how = {k: settings.pop(k) for k in list(settings) if k in Nested.__dataclass_fields__}
        run = NestedRun(
            problem, quick(48, workers=Given(), **settings), Nested(**how), kept
        )  # fmt: skip
        return run.drive(), kept

    def test_nodes_of_a_stage_run_at_the_same_time(self) -> None:
        problem = Hills()
        workers = LateWorkers(problem, 4, pick=last)
        result, _ = self.run(problem, workers, stages=2)
        nodes = [task.node for task in workers.tasks]
        first = [node for node in nodes if node != "root"]
        assert len(set(first[:4])) == 2
        assert nodes.index("root") > max(i for i, node in enumerate(nodes) if node != "root")
        assert workers.closed is False
        assert len(result.front) > 0
        # The driver evaluates nothing itself, and no measurement is paid twice.
        assert len(problem.measured) == result.data_sets
        assert len(set(problem.measured)) == len(problem.measured)

    def test_what_nodes_cost_adds_up(self) -> None:
        problem = Hills()
        result, store = self.run(problem, LateWorkers(problem, 3, pick=last), stages=2)
        done = [event.data for event in store.read() if event.kind == "done"]
        assert len(done) == 3
        assert sum(data["data_sets"] for data in done) == result.data_sets
        assert all(data["data_sets"] > 0 for data in done)

    @pytest.mark.slow
    @pytest.mark.parametrize("after", [20, 60, 100])
    @pytest.mark.parametrize("side_by_side", [True, False])
    def test_what_nodes_cost_adds_up_when_a_resumed_run_has_other_workers(
        self, side_by_side: bool, after: int
    ) -> None:
        problem, store = Hills(), MemoryStore()
        settings, how = quick(48), Nested(stages=2)
        if side_by_side:
            self.run(problem, LateWorkers(problem, 3, pick=last), store, stages=2)
        else:
            NestedRun(problem, settings, how, store).drive()
        again, fresh = MemoryStore(), Hills()
        for event in list(store.read())[:after]:
            again.append(event)
        if side_by_side:
            result = NestedRun(fresh, settings, how, again).drive()
        else:
            result, _ = self.run(fresh, LateWorkers(fresh, 3, pick=last), again, stages=2)
        done = [event.data for event in again.read() if event.kind == "done"]
        assert sum(data["data_sets"] for data in done) == result.data_sets

    @pytest.mark.slow
    def test_in_batches_it_is_the_run_of_one_process(self) -> None:
        alone = nested(Hills(), budget=48, stages=2)
        problem = Hills()
        workers = LateWorkers(problem, 3, pick=last)
        result, _ = self.run(problem, workers, stages=2, asynchronous=False)
        assert torch.equal(result.front.X, alone.front.X)

    @pytest.mark.parametrize("order", ["score", "conflict"])
    def test_what_the_order_needs_is_measured_by_workers_too(self, order: str) -> None:
        problem = Hills()
        workers = LateWorkers(problem, 3, pick=last)
        result, _ = self.run(problem, workers, stages=2, order=order)
        assert any(task.kind == "probe" for task in workers.tasks)
        assert len(problem.measured) == result.data_sets

    def test_given_preferences_are_verified_by_workers_too(self) -> None:
        problem = Hills()
        workers = LateWorkers(problem, 3)
        result, _ = self.run(problem, workers, **VARIANTS["preferences"], verify=2)
        assert any(task.kind == "verify" for task in workers.tasks)
        assert len(problem.measured) == result.data_sets

    @pytest.mark.slow
    @pytest.mark.parametrize("after", [4, 17, 30, 55, 80, 105])
    def test_a_killed_driver_goes_on_and_measures_nothing_twice(self, after: int) -> None:
        problem = Hills()
        _, store = self.run(problem, LateWorkers(problem, 3, pick=last), stages=2)
        events = list(store.read())[:after]
        again = MemoryStore()
        for event in events:
            again.append(event)
        known = {
            (name, tuple(event.data["observation"]["X"]["values"][0]))
            if isinstance(event.data["observation"]["X"], dict)
            else (name, str(event.data["observation"]["X"]))
            for event in events
            if event.kind == "measured"
            for name in event.data["names"]
        }
        fresh = Hills()
        result, _ = self.run(fresh, LateWorkers(fresh, 3, pick=last), again, stages=2)
        assert len(result.front) > 0
        assert len(known) + len(fresh.measured) == result.data_sets
