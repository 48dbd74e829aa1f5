"""A region that always fails: the front, the choice and what the record says of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.optimize import optimize
from map_bo.loop.recommend import recommend
from map_bo.loop.result import Result, recorded_requirements
from map_bo.loop.state import RunState, advance
from map_bo.rng import make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import proposed
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.store import Event
from tests.loop.bowls import quick

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = (Metric("u", kind="unbounded"), Metric("v", kind="unbounded"))
CENTRES = torch.tensor([[0.95, 0.75], [0.75, 0.95]], dtype=torch.float64)
EDGE = 1.3


class Diverging:
    """Two bowls whose best points lie where the coefficients add up to too much."""

    space, metrics = SPACE, METRICS

    def evaluate(self, X: Tensor, *, generator: torch.Generator) -> Observations:
        bad = X.sum(-1) > EDGE
        Y = 1 - (X.unsqueeze(1) - CENTRES).square().sum(-1)
        return Observations(
            X,
            Y.masked_fill(bad.unsqueeze(-1), torch.nan),
            METRICS,
            failures=tuple("diverged" if one else None for one in bad.tolist()),
        )


def evaluated(n: int = 20) -> Observations:
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(n, generator=make_generator(0))])
    return Diverging().evaluate(rows, generator=make_generator(0))


def test_the_front_stays_where_evaluations_work_and_says_how_likely_they_do() -> None:
    seen = evaluated()
    settings = quick(24)
    found = recommend(seen, SPACE, settings, generator=make_generator(0)).front
    assert float((found.X.sum(-1) > EDGE + 0.1).double().mean()) == 0.0
    assert float(found.feasible.min()) >= 0.7
    ignoring = quick(24, failures="ignore")
    before = recommend(seen, SPACE, ignoring, generator=make_generator(0)).front
    assert float((before.X.sum(-1) > EDGE + 0.1).double().mean()) > 0.9
    assert bool(before.feasible.isnan().all())


def test_a_design_leaves_out_points_that_are_to_fail() -> None:
    seen = evaluated()
    free, _ = proposed(
        Sobol(), seen, SPACE, 40, pending=None, generator=make_generator(1),
        requirements=Requirements("ignore"),
    )  # fmt: skip
    kept, _ = proposed(Sobol(), seen, SPACE, 40, pending=None, generator=make_generator(1))
    assert kept.shape == (40, 2)
    assert float((free.sum(-1) > EDGE).double().mean()) > 0.2
    assert float((kept.sum(-1) > EDGE).double().mean()) < 0.1
    assert bool((kept.unsqueeze(1) == free).all(-1).any()), "the others stay, in their order"


def test_anchors_are_evaluated_wherever_they_are() -> None:
    X = torch.full((6, 2), 0.05, dtype=torch.float64) * torch.arange(1, 7).unsqueeze(-1)
    nothing = Observations.failed(X, METRICS, "diverged")
    first, _ = proposed(Sobol(), nothing, SPACE, 4, pending=None, generator=make_generator(0))
    assert torch.equal(first, SPACE.anchors().X)


def test_a_proposal_keeps_away_from_what_fails() -> None:
    seen = evaluated()
    sampler = FrontUncertainty(surrogate=Quadratic(), restarts=2, raw_samples=32, steps=10)
    near = sampler.propose(seen, SPACE, 2, generator=make_generator(3))
    assert float(near.sum(-1).max()) < EDGE + 0.15
    ignoring = sampler.with_requirements(Requirements("ignore"))
    far = ignoring.propose(seen, SPACE, 2, generator=make_generator(3))
    assert float(far.sum(-1).max()) > EDGE + 0.15


def test_a_choice_is_made_among_points_that_work() -> None:
    seen, settings = evaluated(), quick(24)
    found = recommend(seen, SPACE, settings, generator=make_generator(0))
    front = found.front
    bad = torch.zeros(len(front), dtype=torch.float64)
    last = int(front.mean.sum(-1).argmax())
    likely = torch.where(torch.arange(len(front)) == last, bad, 0.9)
    state = RunState(METRICS, seen.X, outcomes={i: seen.select([i]) for i in range(len(seen))})
    state = advance(state, Event("front", found.describe()))
    assert state.front is not None
    unsure = advance(state, Event("corrected", {"feasible": likely.tolist()}))
    choice = Result.of(unsure, SPACE).choose()
    assert choice.point != last
    assert choice.describe()["feasible"] == 0.9
    hopeless = advance(state, Event("corrected", {"feasible": [0.1] * len(front)}))
    assert Result.of(hopeless, SPACE).choose().feasible == 0.1
    refined = Result.of(state, SPACE, model=found.model).choose({"u": 1})
    assert float(refined.x.sum()) < EDGE + 0.1


def test_requirements_are_read_from_a_record() -> None:
    assert recorded_requirements({}) == Requirements()
    assert recorded_requirements({"failures": "ignore"}) == Requirements("ignore")
    assert Adaptive() == quick(24, sampler=Adaptive()).sampler
    handed = quick(24, sampler=Adaptive(), failures="ignore").sampler
    assert isinstance(handed, Adaptive)
    assert handed.acquisition.requirements == Requirements("ignore")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_wastes_little_on_a_region_that_fails(seed: int) -> None:
    result = optimize(
        Diverging(), 24, seed=seed, retries=0, max_failure_share=1.0, progress=False,
        surrogate=Quadratic(),
    )  # fmt: skip
    assert sum(reason is not None for reason in result.seen.failures) <= 8
    assert float((result.front.X.sum(-1) > EDGE).double().mean()) < 0.3
