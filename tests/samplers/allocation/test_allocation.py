"""Laws of every allocation: budgets are kept, parts go on where rows are covered."""

from __future__ import annotations

import pytest
import torch

from map_bo.data import Observations
from map_bo.examples.sets import Part
from map_bo.rng import make_generator
from map_bo.samplers.allocation.allocation import LEAST, Allocation, Standing, prefix, shares
from map_bo.samplers.allocation.fixed import Fixed, Full, SuccessiveHalving
from map_bo.samplers.allocation.front_doubt import FrontDoubt
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.surrogates.quadratic import Quadratic
from tests.loop.items import ItemProblem

ALLOCATIONS: dict[str, Allocation] = {
    "full": Full(),
    "fixed": Fixed(60),
    "halving": SuccessiveHalving(),
    "auto": FrontDoubt(FrontUncertainty(surrogate=Quadratic(), draws=2, preferences=8)),
}


def start(problem: ItemProblem, budget: float) -> Standing:
    """Return the standing before anything was measured."""
    sets = problem.example_sets
    return Standing(
        seen=Observations.empty(problem.space.d, problem.metrics),
        rows=(),
        X=torch.zeros(0, problem.space.d, dtype=torch.float64),
        space=problem.space,
        sets=sets,
        sizes={name: one.size for name, one in sets.items()},
        covered={},
        budget=budget,
    )


def play(problem: ItemProblem, allocation: Allocation, budget: float) -> Standing:
    """Return the standing once the budget is spent; rows are drawn at random."""
    standing, source = start(problem, budget), torch.Generator().manual_seed(5)
    done: dict[int, dict[str, int]] = {}
    X, most = problem.space.anchors().X, 60
    for _ in range(most):
        action = allocation.next(standing, generator=make_generator(3))
        if action is None:
            return standing
        row = len(done) if action.row is None else action.row
        for part in action.parts:
            assert part.start == done.get(row, {}).get(part.evaluator, 0)
            assert part.stop <= standing.sizes[part.evaluator]
        done[row] = {**done.get(row, {}), **{p.evaluator: p.stop for p in action.parts}}
        if row == len(X):
            drawn = torch.rand(1, problem.space.d, generator=source, dtype=torch.float64)
            X = torch.cat([X, drawn])
        parts = []
        for i in sorted(done):
            wanted = {name: torch.arange(stop) for name, stop in done[i].items()}
            one = problem.on_examples(wanted)
            parts.append(one.evaluate(X[i : i + 1], generator=make_generator(0)))
        seen = Observations.joined(parts, problem.space.d, problem.metrics)
        standing = Standing(
            seen=seen,
            rows=tuple(sorted(done)),
            X=X[: max(len(done), 1)],
            space=problem.space,
            sets=standing.sets,
            sizes=standing.sizes,
            covered=done,
            budget=budget,
        )
        assert standing.spent <= budget + 1e-9
    pytest.fail(f"the budget was not spent after {most} actions")


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_budget_is_spent_and_never_overrun(name: str) -> None:
    end = play(ItemProblem(2, 120), ALLOCATIONS[name], 3.0)
    assert end.spent > 3.0 - 1.0  # less than the cheapest action is left
    for covered in end.covered.values():
        assert set(covered) == set(end.sets)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_what_is_in_flight_counts_as_spent(name: str) -> None:
    standing = start(ItemProblem(2, 120), 2.0)
    for _ in range(200):
        action = ALLOCATIONS[name].next(standing, generator=make_generator(0))
        if action is None:
            break
        standing = standing.after(action)
    assert 0 < standing.spent <= 2.0 + 1e-9


def test_halving_promotes_the_better_rows() -> None:
    problem = ItemProblem(2, 160)
    end = play(problem, SuccessiveHalving(share=0.25, factor=2), 6.0)
    anchors = len(problem.space.anchors().X)
    most = [row for row, covered in end.covered.items() if covered["t0"] == 160]
    assert most
    blends = [i for i in range(len(end.X)) if i >= anchors]
    kept = [problem.truth(end.X[i]).mean() for i in blends if i in most]
    left = [problem.truth(end.X[i]).mean() for i in blends if i not in most]
    if kept and left:
        assert torch.stack(kept).mean() > torch.stack(left).mean()


def test_shares_follow_the_examples_and_whole_evaluators_count_as_the_mean() -> None:
    problem = ItemProblem(2, 100)
    sets = dict(problem.example_sets)
    sets["whole"] = type(sets["t0"])(("whole",), 1, divisible=False)
    assert shares(sets, {"t0": 300, "t1": 100, "whole": 1}) == {
        "t0": 0.5,
        "t1": pytest.approx(1 / 6),
        "whole": pytest.approx(1 / 3),
    }


def test_a_prefix_has_a_least_size() -> None:
    standing = start(ItemProblem(1, 100), 3.0)
    assert prefix(standing, 0.01) == (Part("t0", 0, LEAST),)
    assert prefix(standing, 0.5) == (Part("t0", 0, 50),)
    assert prefix(standing, 1.0) == (Part("t0", 0, 100),)
