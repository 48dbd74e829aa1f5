from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import BudgetError, ConfigError, EvaluationError, TreeError
from map_bo.nested.ledger import Ledger
from map_bo.nested.planning import HasSimilarity, conflict, order_cost, plan, probe_count
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, Tasks
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.tracking.jsonl import MemoryStore
from tests.nested.hills import Hills, quick

EXPERTS = ("a", "b", "c", "d", "e", "f")
# Who disturbs whom, and how much, in each of two metrics.
FIRST = {("a", "d"): 4.0, ("b", "f"): -3.0}
SECOND = {("c", "e"): 50.0, ("a", "d"): 10.0}
METRICS = (Metric("up", kind="unbounded"), Metric("down", direction="min", kind="unbounded"))


@dataclass
class Interacting:
    """Two quadratics, the second on another scale and to be minimised."""

    space: CoefficientSpace = field(default_factory=lambda: CoefficientSpace.box(EXPERTS))
    metrics: tuple[Metric, ...] = METRICS
    measured: list[Tensor] = field(default_factory=list)

    def matrix(self, pairs: dict[tuple[str, str], float]) -> Tensor:
        A = torch.zeros(6, 6, dtype=torch.float64)
        for (one, other), value in pairs.items():
            A[EXPERTS.index(one), EXPERTS.index(other)] = value
        return A

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        self.measured += list(X)
        slope = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
        first = X @ slope - X.square().sum(-1) + ((X @ self.matrix(FIRST)) * X).sum(-1)
        second = 10 * (X @ slope.flip(0)) + ((X @ self.matrix(SECOND)) * X).sum(-1)
        Y = torch.stack([first, second], -1)
        return Observations(X, Y, self.metrics, Yvar=torch.zeros_like(Y))


def test_conflict_is_the_interaction_of_a_quadratic() -> None:
    problem = Interacting()
    X = problem.space.sample(60, generator=make_generator(0))
    seen = problem.evaluate(X, generator=make_generator(0))
    found = conflict(seen, problem.space, quick())
    # f(e_i/2 + e_j/2) - f(e_i/2) - f(e_j/2) + f(0) = A_ij / 4, on the range of the metric.
    width = seen.Y.amax(0) - seen.Y.amin(0)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for pairs, unit in ((FIRST, width[0]), (SECOND, width[1])):
        expected += problem.matrix(pairs).abs() / 4 / unit
    expected = expected + expected.T
    assert torch.equal(found, found.T)
    assert torch.equal(found.diagonal(), torch.zeros(6).double())
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.05)


def test_conflict_does_not_depend_on_units_or_failed_rows() -> None:
    problem = Interacting()
    seen = problem.evaluate(
        problem.space.sample(60, generator=make_generator(0)), generator=make_generator(0)
    )
    failed = Observations.failed(torch.full((3, 6), 0.5), METRICS, "no luck")
    scaled = Observations(seen.X, seen.Y * 1000.0, METRICS, seen.Yvar)
    found = conflict(seen, problem.space, quick())
    torch.testing.assert_close(conflict(failed.append(seen), problem.space, quick()), found)
    other = conflict(scaled, problem.space, quick())
    torch.testing.assert_close(other, found, atol=1e-3, rtol=0.02)


def test_blocks_of_an_expert_count_together() -> None:
    space = CoefficientSpace.box(("a", "b", "c"), blocks=("x", "y"))
    X = space.sample(60, generator=make_generator(0))
    metrics = METRICS[:1]
    Y = (X[:, 1] * X[:, 4] + X[:, 2]).unsqueeze(-1)  # a/y with c/x
    seen = Observations(X, Y, metrics, Yvar=torch.zeros_like(Y))
    found = conflict(seen, space, quick())
    assert found.shape == (3, 3)
    assert float(found[0, 2]) == pytest.approx(0.25 / float(Y.max() - Y.min()), rel=0.1)
    assert float(found[0, 1]) < 0.01
    assert float(found[1, 2]) < 0.01


def one_expert() -> Tensor:
    space = CoefficientSpace.box(("a",))
    X = torch.linspace(0, 1, 5).unsqueeze(-1).double()
    return conflict(Observations(X, X, METRICS[:1], torch.zeros(5, 1)), space, quick())


def test_one_expert_disturbs_nobody() -> None:
    assert one_expert().tolist() == [[0.0]]


def planned(
    problem: Any, nested: Nested, tasks: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[Group, Ledger]:
    ledger = Ledger(problem.metrics)
    of = Tasks.assign(problem.space.experts, problem.metrics, tasks or {})
    tree = plan(problem, of, nested, quick(), ledger, generator=make_generator(1))
    return tree, ledger


def test_the_order_by_conflict_merges_those_first_that_disturb_each_other_most() -> None:
    problem = Interacting()
    of = dict.fromkeys(EXPERTS, ("up", "down"))
    tree, ledger = planned(problem, Nested(group_size=2, order="conflict", probe=40), of)
    pairs = {frozenset(node.leaves) for _, node in tree.nodes() if node.stage == 1}
    assert pairs == {frozenset("ad"), frozenset("bf"), frozenset("ce")}
    assert len(problem.measured) == 40
    assert ledger.spent == 80


def test_probes_are_paid_for_the_order_by_conflict_alone() -> None:
    assert probe_count(Nested(order="conflict"), 6) == 14
    assert probe_count(Nested(order="conflict", probe=9), 6) == 9
    assert probe_count(Nested(order="score", probe=9), 6) == 0
    assert probe_count(Nested(order="conflict", tree=["a", "b"]), 2) == 0


SCORES = {"a": 0.1, "b": 0.55, "c": 0.5, "d": 0.9, "base": 0.3}


@dataclass
class Scored(Hills):
    """Experts are as good on their own tasks as ``SCORES`` says, and no good on others."""

    def truth(self, X: Tensor) -> Tensor:
        values = torch.tensor([SCORES[name] for name in self.experts], dtype=torch.float64)
        return (X * values)[:, [self.experts.index(m.name) for m in self.metrics]]

    def restricted(self, names: Sequence[str]) -> Scored:
        return Scored(self.experts, tuple(names), self.box, self.fails, self.measured)


def test_the_order_by_score_measures_each_expert_on_its_own_tasks() -> None:
    problem = Scored()
    tree, ledger = planned(problem, Nested(group_size=2, order="score"))
    assert tree.plain() == [["a", "d"], ["c", "b"]]  # b and c are closest; means are .5 and .525
    assert sorted(task for task, _ in problem.measured) == ["a", "b", "c", "d"]
    for task, x in problem.measured:
        assert x == tuple(float(name == task) for name in problem.experts)
    assert ledger.spent == 4
    assert planned(Scored(), Nested(stages=1, order="score"))[0].plain() == ["a", "c", "b", "d"]
    assert planned(Scored(), Nested(stages=2, order="score"))[0].stage == 2


def test_scores_of_several_tasks_are_their_mean_the_right_way_round() -> None:
    problem = Interacting()
    of = dict.fromkeys(EXPERTS, ("up",)) | {"a": ("up", "down")}
    tree, ledger = planned(problem, Nested(stages=1, order="score"), of)
    own = problem.evaluate(torch.eye(6, dtype=torch.float64), generator=make_generator(0)).Y
    scores = dict(zip(EXPERTS, own[:, 0].tolist(), strict=True))
    scores["a"] = (scores["a"] - float(own[0, 1])) / 2
    assert list(tree.leaves) == sorted(scores, key=scores.__getitem__)
    assert ledger.spent == 7


@pytest.mark.parametrize(
    "box",
    [
        CoefficientSpace.box(("a", "b", "c", "d"), simplex=True),
        CoefficientSpace.box(("a", "b", "c", "d"), upper=0.8),
        CoefficientSpace.box(("a", "b", "c", "d"), lower=-0.5),
    ],
)
def test_experts_are_scored_in_any_space(box: CoefficientSpace) -> None:
    problem = Scored(box=box)
    tree, _ = planned(problem, Nested(group_size=2, order="score"))
    assert tree.plain() == [["a", "d"], ["c", "b"]]
    scale = min(1.0, box.upper[0])
    for task, x in problem.measured:
        assert x == tuple(scale * float(name == task) for name in problem.experts)


@pytest.mark.slow
def test_scores_that_no_node_uses_again_are_paid_for() -> None:
    score, names = Nested(order="score"), ("a", "b", "c", "d")
    tasks = Tasks.assign(names, Hills().metrics, {"a": ("a", "b")})
    box, low = CoefficientSpace.box(names), CoefficientSpace.box(names, upper=0.8)
    assert order_cost(score, tasks, box, composes=True) == 0
    assert order_cost(score, tasks, low, composes=True) == 5
    assert order_cost(score, tasks, box, composes=False) == 5
    assert order_cost(Nested(), tasks, low, composes=False) == 0
    assert order_cost(Nested(order="score", tree=["a"]), tasks, low, composes=False) == 0
    for budget in (21, 22):
        problem = Scored(box=low)
        how = Nested(group_size=2, order="score", promote="point", budget_split="equal")
        result = NestedRun(problem, quick(budget), how, MemoryStore()).drive()
        assert result.data_sets == len(problem.measured) <= budget * 4
    with pytest.raises(BudgetError, match="evaluations and needs") as caught:
        NestedRun(Scored(box=low), quick(4), how, MemoryStore()).drive()
    needed = int(re.findall(r"a budget of (\d+)", str(caught.value.hint))[0])
    NestedRun(Scored(box=low), quick(needed), how, MemoryStore()).drive()
    with pytest.raises(BudgetError):
        NestedRun(Scored(box=low), quick(needed - 1), how, MemoryStore()).drive()


def test_an_expert_named_like_the_base_is_scored_by_itself() -> None:
    problem = Scored(experts=("base", "a", "b"))
    assert planned(problem, Nested(stages=1, order="score"))[0].leaves == ("a", "base", "b")


def test_an_expert_that_cannot_be_measured_ends_the_plan() -> None:
    problem = Scored(fails=lambda x: "no luck" if float(x[2]) else None)
    with pytest.raises(EvaluationError, match="expert c could not be measured: no luck"):
        planned(problem, Nested(group_size=2, order="score"))


@dataclass
class Alike(Hills):
    """``a`` is like ``c``, and ``b`` like ``d``."""

    def similarity(self) -> Tensor:
        same = torch.tensor([0, 1, 0, 1])
        return (same[:, None] == same[None]).double() * 0.6 + 0.2 * torch.eye(4).double()


def test_the_order_by_similarity_measures_nothing() -> None:
    problem = Alike()
    assert isinstance(problem, HasSimilarity)
    tree, ledger = planned(problem, Nested(stages=2, order="similarity"))
    assert {frozenset(n.leaves) for _, n in tree.nodes() if n.stage == 1} == {
        frozenset("ac"),
        frozenset("bd"),
    }
    assert not problem.measured
    assert ledger.spent == 0
    with pytest.raises(ConfigError, match="Hills does not know how similar its experts are"):
        planned(Hills(), Nested(order="similarity"))


def test_given_orders_and_trees_are_kept() -> None:
    assert planned(Hills(), Nested(stages=2))[0].plain() == [["a", "b"], ["c", "d"]]
    assert planned(Hills(), Nested(group_size=3))[0].plain() == [["a", "b"], ["c", "d"]]
    tree = ["d", ["a", "c", "b"]]
    problem = Scored()
    assert planned(problem, Nested(tree=tree, order="score"))[0].plain() == tree
    assert not problem.measured


@pytest.mark.parametrize("order", ["given", "score", "similarity", "conflict"])
def test_one_expert_is_a_plan(order: Any) -> None:
    @dataclass
    class Alone(Hills):
        def similarity(self) -> Tensor:
            return torch.ones(1, 1)

        def restricted(self, names: Sequence[str]) -> Alone:
            return Alone(self.experts, tuple(names))

        def truth(self, X: Tensor) -> Tensor:
            return X

    problem = Alone(experts=("a",))
    assert planned(problem, Nested(stages=1, order=order))[0] == Group(("a",))


@pytest.mark.parametrize("order", ["score", "conflict"])
def test_a_number_of_stages_that_cannot_be_is_told_before_anything_is_measured(order: Any) -> None:
    problem = Scored()
    with pytest.raises(TreeError, match="cannot be merged in 3 stages"):
        planned(problem, Nested(stages=3, order=order))
    assert not problem.measured
