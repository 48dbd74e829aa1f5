from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.baselines.cma import CMAES, chebyshev_cost
from map_bo.samplers.designs.space_filling import Sobol, Uniform, is_repeat
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured

BOX = CoefficientSpace.box(("a", "b", "c"))
ONE = (Metric("m", direction="min", kind="loss"),)


def bowl(X: Tensor, *, failed: tuple[int, ...] = ()) -> Observations:
    """Return one loss with its optimum at (0.63, 0.27, 0.81)."""
    target = torch.tensor([0.63, 0.27, 0.81], dtype=torch.float64)
    Y = (X - target).square().sum(-1, keepdim=True)
    Y[list(failed)] = torch.nan
    reasons = tuple("it broke" if i in failed else None for i in range(len(X)))
    return Observations(X, Y, ONE, failures=reasons)


def run(sampler: Sampler, evaluate: Any, n: int, batch: int = 1, seed: int = 0) -> Observations:
    seen = evaluate(torch.zeros(0, 3, dtype=torch.float64))
    while len(seen) < n:
        seen = seen.append(
            evaluate(sampler.propose(seen, BOX, batch, generator=make_generator(seed)))
        )
    return seen  # type: ignore[no-any-return]


class TestCMAES(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return CMAES(initial=5, weights=2)


def test_the_design_comes_first() -> None:
    whole = Sobol().propose(
        measured(BOX.sample(0, generator=make_generator(0))), BOX, 8, generator=make_generator(0)
    )
    seen = measured(whole[:6], failed=(1,))
    assert CMAES().initial_points(BOX) == 7
    X = CMAES().propose(seen, BOX, 2, generator=make_generator(0))
    assert torch.equal(X, whole[6:8])


@pytest.mark.slow
def test_it_finds_an_optimum() -> None:
    best = run(CMAES(), bowl, 120).Y.min()
    drawn = run(Uniform(), bowl, 120).Y.min()
    assert best < 1e-3
    assert best < 0.1 * drawn


def test_batches_ask_for_the_same_points_as_single_proposals() -> None:
    single = run(CMAES(weights=2, initial=6), measured, 30)
    batched = run(CMAES(weights=2, initial=6), measured, 30, batch=6)
    assert torch.equal(single.X, batched.X)


def test_every_weighting_has_its_turn() -> None:
    # The generations of 4 of the two searches alternate; each gathers around a point of its own.
    seen = run(CMAES(weights=2, initial=6, population=4), measured, 6 + 48, seed=3)
    turns = seen.X[6:].reshape(6, 2, 4, 3)
    own = (turns[-1] - turns[-1].mean(1, keepdim=True)).norm(dim=-1).mean()
    apart = (turns[-1, 0].mean(0) - turns[-1, 1].mean(0)).norm()
    assert apart > own


def test_what_no_search_asked_for_is_passed_over() -> None:
    sampler, generator = CMAES(weights=2, initial=6), make_generator(0)
    seen = run(sampler, measured, 15)
    foreign = measured(Uniform(anchors=False).propose(seen, BOX, 5, generator=make_generator(9)))
    first = sampler.propose(seen, BOX, 3, generator=generator)
    assert torch.equal(sampler.propose(seen.append(foreign), BOX, 3, generator=generator), first)
    # Another design altogether starts the searches, too.
    X = sampler.propose(foreign.append(foreign), BOX, 3, generator=generator)
    BOX.check(X)
    assert not is_repeat(X, foreign.X, BOX).any()


def test_what_others_measured_where_a_search_asks_is_used() -> None:
    sampler, generator = CMAES(weights=1, initial=6), make_generator(0)
    seen = run(sampler, measured, 6)
    generation = sampler.propose(seen, BOX, 7, generator=generator)
    shuffled = seen.append(measured(generation[torch.tensor([3, 0, 6, 1, 2, 5, 4])]))
    straight = seen.append(measured(generation))
    second = sampler.propose(straight, BOX, 7, generator=generator)
    assert torch.equal(sampler.propose(shuffled, BOX, 7, generator=generator), second)


def test_the_order_in_which_outcomes_arrive_changes_no_search() -> None:
    sampler, generator = CMAES(weights=2, initial=6), make_generator(0)
    design = run(sampler, measured, 6).X
    design = Sobol().propose(measured(design), BOX, 2, generator=generator)
    design = torch.cat([run(sampler, measured, 6).X, design])
    # Seven have an outcome, and the third, one of the first six, has none: the design goes on.
    late = design[2:3]
    seen = measured(design[[0, 1, 3, 4, 5, 6, 7]])
    X = sampler.propose(seen, BOX, 2, pending=late, generator=generator)
    following = Sobol().propose(measured(design), BOX, 2, generator=generator)
    assert torch.equal(X, following)
    # One that comes after the first six may be late: what is asked is what is asked with it.
    seen, late = measured(design[:7]), design[7:]
    first = sampler.propose(seen, BOX, 5, pending=late, generator=generator)
    assert torch.equal(first, sampler.propose(measured(design), BOX, 5, generator=generator))
    # Outcomes of a generation arrive in any order; the next one is asked when it is complete.
    generation = sampler.propose(measured(design), BOX, 14, generator=generator)
    some, rest = generation[:7][[5, 0, 3]], generation[:7][[1, 2, 4, 6]]
    seen = measured(torch.cat([design, some, rest]))
    straight = measured(torch.cat([design, generation[:7]]))
    after = sampler.propose(straight, BOX, 7, pending=generation[7:], generator=generator)
    assert torch.equal(
        sampler.propose(seen, BOX, 7, pending=generation[7:], generator=generator), after
    )


def test_pending_generations_let_the_others_go_on_then_the_design() -> None:
    sampler, generator = CMAES(weights=2, initial=6, population=5), make_generator(0)
    seen = run(sampler, measured, 6)
    both = sampler.propose(seen, BOX, 10, generator=generator)
    first = sampler.propose(seen, BOX, 5, generator=generator)
    second = sampler.propose(seen, BOX, 5, pending=first, generator=generator)
    assert torch.equal(torch.cat([first, second]), both)
    more = sampler.propose(seen, BOX, 3, pending=both, generator=generator)
    design = Sobol().propose(seen, BOX, 3, pending=both, generator=generator)
    assert torch.equal(more, design)


@pytest.mark.parametrize(("failed", "told"), [((7,), True), ((6, 7, 8, 9), False)])
def test_failures_are_left_out_of_the_ranking(failed: tuple[int, ...], told: bool) -> None:
    sampler, generator = CMAES(initial=6, population=6), make_generator(0)
    design = run(sampler, bowl, 6).X
    generation = sampler.propose(bowl(design), BOX, 6, generator=generator)
    seen = bowl(torch.cat([design, generation]), failed=failed)
    X = CMAES(1, 6, initial=6).propose(seen, BOX, 6, generator=generator)
    BOX.check(X)
    assert not is_repeat(X, seen.X, BOX).any()
    # The values of those that succeeded decide what comes next, unless too few have one.
    Y = torch.cat([seen.Y[:6], 2 - seen.Y[6:]])
    turned = Observations(seen.X, Y, ONE, failures=seen.failures)
    other = CMAES(1, 6, initial=6).propose(turned, BOX, 6, generator=generator)
    assert torch.equal(other, X) != told


def test_flat_metrics_do_not_stop_it() -> None:
    def flat(X: Tensor) -> Observations:
        return Observations(X, torch.full((len(X), 2), 0.5), (Metric("a"), Metric("b")))

    seen = run(CMAES(weights=2), flat, 80, batch=8)
    assert len(torch.unique(seen.X, dim=0)) == 80


@pytest.mark.slow
def test_it_goes_on_after_convergence() -> None:
    # A basin of a single value: the search stops on it and starts again elsewhere.
    def flat(X: Tensor) -> Observations:
        return Observations(X, torch.full((len(X), 1), 0.5), ONE)

    seen = run(CMAES(weights=1, step=0.01, population=4, initial=3), flat, 120, batch=4)
    BOX.check(seen.X)
    assert len(torch.unique(seen.X, dim=0)) == 120
    generations = seen.X[4:].reshape(-1, 4, 3)
    spread = (generations - generations.mean(1, keepdim=True)).norm(dim=-1)
    starts = generations.mean(1)
    assert float(spread.max()) < 0.1
    assert float((starts - starts[0]).norm(dim=-1).max()) > 0.4


@given(st.integers(0, 10_000))
def test_the_scalarisation_respects_dominance(seed: int) -> None:
    source = make_generator(seed)
    regrets = torch.rand(1, 3, generator=source, dtype=torch.float64) - 0.5
    weights = torch.rand(3, generator=source, dtype=torch.float64) + 0.01
    better = regrets.clone()
    better[0, seed % 3] -= 0.1
    assert chebyshev_cost(better, weights) < chebyshev_cost(regrets, weights)
    one = chebyshev_cost(torch.ones(1, 3).double(), weights)
    assert float(one) == pytest.approx(float(weights.max() + 0.05 * weights.sum()))


@pytest.mark.parametrize("name", ["sum", "simplex", "blocks"])
def test_constraints_hold_all_the_way(name: str) -> None:
    space, generator = SPACES[name], make_generator(1)
    sampler = CMAES(weights=1, initial=6)
    seen = measured(torch.zeros(0, space.d, dtype=torch.float64))
    while len(seen) < 40:
        X = sampler.propose(seen, space, 4, generator=generator)
        space.check(X)
        seen = seen.append(measured(X))
    assert not is_repeat(seen.X[20:], seen.X[:20], space).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 0}, "weights is 0"),
        ({"population": 3}, "population is 3"),
        ({"initial": 0}, "initial is 0"),
        ({"step": 0.0}, "initial step is 0.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        CMAES(**settings)
