from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.posterior.front_posterior import (
    FrontUncertainty,
    assess,
    expected_optimism,
    front_probabilities,
    hypervolume_interval,
    left_out_optimism,
)
from map_bo.loop.posterior.joint_posterior import plausible_points
from map_bo.loop.recommend import recommend
from map_bo.pareto.dominance import dominates
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.indicators import hypervolume
from map_bo.problems.synthetic import SigmoidQuadratics
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from tests.loop.bowls import quick


def measured(
    m: int, n: int, seed: int = 0, count: int = 400
) -> tuple[Observations, CoefficientSpace]:
    problem = SigmoidQuadratics(d=m, m=m, seed=seed, count=count)
    empty = Observations.empty(m, problem.metrics)
    X = Sobol().propose(empty, problem.space, n, generator=make_generator(seed))
    return problem.evaluate(X, generator=make_generator(seed)), problem.space


def assessed(
    m: int, n: int, points: int, surrogate: Surrogate | None = None, seed: int = 0
) -> FrontUncertainty:
    seen, space = measured(m, n, seed)
    surrogate = surrogate or Quadratic()
    solver = GradientSolver(points=points)
    settings = quick(50, surrogate=surrogate, solver=solver)
    found = recommend(seen, space, settings, generator=make_generator(seed))
    return assess(
        found.front,
        found.model,
        seen,
        space,
        found.scale,
        guarded=True,
        generator=make_generator(seed),
    )


@given(s=st.integers(1, 4), k=st.integers(1, 6), n=st.integers(0, 3), seed=st.integers(0, 100))
def test_a_probability_is_the_share_of_draws_without_a_dominating_point(
    s: int, k: int, n: int, seed: int
) -> None:
    everything = torch.rand(s, k + n, 2, generator=make_generator(seed), dtype=torch.float64)
    found = front_probabilities(everything[:, :k], everything[:, k:])
    for i in range(k):
        free = [not bool(dominates(draw, draw[i].expand_as(draw)).any()) for draw in everything]
        assert float(found[i]) == pytest.approx(sum(free) / s)


def test_an_evaluated_point_can_dominate_and_an_equal_one_does_not() -> None:
    front = torch.tensor([[[1.0, 0.0], [0.4, 0.4]]], dtype=torch.float64)
    evaluated = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    assert front_probabilities(front, evaluated).tolist() == [1.0, 0.0]


def draws_around(predicted: Tensor, spread: float, count: int = 200) -> Tensor:
    shape = (count, 1, predicted.shape[-1])
    normal = torch.randn(shape, generator=make_generator(0), dtype=torch.float64)
    return predicted + spread * normal


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_interval_of_draws_that_agree_is_their_hypervolume(m: int) -> None:
    predicted = torch.rand(30, m, generator=make_generator(1), dtype=torch.float64)
    zero = torch.zeros(m, dtype=torch.float64)
    found = hypervolume_interval(
        draws_around(predicted, 0.0), predicted, generator=make_generator(0)
    )
    exact = hypervolume(predicted, zero)
    for name in ("lower", "median", "upper", "predicted"):
        assert found[name] == pytest.approx(exact, rel=1e-6)
    assert found["kind"].startswith("exact" if m <= 4 else "scalarised on 512 directions")


@pytest.mark.parametrize("m", [2, 6])
def test_the_interval_is_wide_where_the_draws_differ(m: int) -> None:
    predicted = 0.5 + 0.5 * torch.rand(20, m, generator=make_generator(1), dtype=torch.float64)
    values = draws_around(predicted, 0.1)
    found = hypervolume_interval(values, predicted, generator=make_generator(0))
    zero = torch.zeros(m, dtype=torch.float64)
    exact = torch.tensor([hypervolume(draw, zero) for draw in values]).double()
    for name, level in (("lower", 0.025), ("median", 0.5), ("upper", 0.975)):
        assert found[name] == pytest.approx(float(exact.quantile(level)), rel=0.05)
    assert found["lower"] < 0.8 * found["median"] < 0.8 * found["upper"]


def test_a_front_that_beats_nothing_has_no_hypervolume() -> None:
    predicted = -torch.rand(4, 6, generator=make_generator(1), dtype=torch.float64)
    found = hypervolume_interval(
        draws_around(predicted, 0.0), predicted, generator=make_generator(0)
    )
    assert found["lower"] == found["upper"] == found["predicted"] == 0.0


@pytest.mark.parametrize("surrogate", [Quadratic(), Auto()])
def test_a_front_gets_probabilities_and_keeps_its_predictions(surrogate: Surrogate) -> None:
    seen, space = measured(3, 20)
    settings = quick(50, surrogate=surrogate, solver=GradientSolver(points=60))
    found = recommend(seen, space, settings, generator=make_generator(0))
    sure = assess(
        found.front, found.model, seen, space, found.scale, guarded=True,
        generator=make_generator(0),
    )  # fmt: skip
    assert torch.equal(sure.front.mean, found.front.mean)
    assert torch.equal(sure.front.X, found.front.X)
    p = sure.front.probability
    assert p.shape == (len(found.front),)
    assert bool(((p >= 0) & (p <= 1)).all())
    assert float(p.mean()) > 0.5, "most of a front from 20 good evaluations belongs there"
    volume = sure.hypervolume
    assert volume["lower"] < volume["median"] < volume["upper"]
    assert volume["lower"] < volume["predicted"] < volume["upper"]
    assert set(sure.left_out) == set(sure.simulated) == {metric.name for metric in seen.metrics}


def test_it_is_the_same_for_the_same_seed() -> None:
    one, two = assessed(2, 12, 30), assessed(2, 12, 30)
    assert torch.equal(one.front.probability, two.front.probability)
    assert one.describe() == two.describe()


def test_a_surrogate_that_cannot_leave_out_estimates_no_optimism() -> None:
    sure = assessed(2, 12, 20, PublishedQuadratic())
    assert all(found["mean"] is None for found in (*sure.left_out.values(),))
    assert all(found["mean"] is None for found in (*sure.simulated.values(),))
    assert bool(sure.front.probability.isfinite().all())


def test_of_a_very_large_front_only_some_points_have_a_probability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("map_bo.loop.posterior.front_posterior._MOST_POINTS", 25)
    sure = assessed(2, 12, 60)
    assert int(sure.front.probability.isfinite().sum()) == 25


@pytest.mark.slow
def test_the_interval_covers_the_real_hypervolume_where_the_surrogate_is_right() -> None:
    inside = 0
    for seed in range(12):
        problem = SigmoidQuadratics(d=2, m=2, seed=seed, count=400)
        seen, space = measured(2, 14, seed)
        settings = quick(50, solver=GradientSolver(points=60))
        found = recommend(seen, space, settings, generator=make_generator(seed))
        sure = assess(
            found.front, found.model, seen, space, found.scale, guarded=True,
            generator=make_generator(seed),
        )  # fmt: skip
        low = found.scale.point
        gains = (problem.true_values(found.front.X) - low) / (found.scale.best - low)
        real = hypervolume(gains, torch.zeros(2, dtype=torch.float64))
        inside += sure.hypervolume["lower"] <= real <= sure.hypervolume["upper"]
    # Of 12 with coverage .95 fewer than 9 has probability .002.
    assert inside >= 9


def test_noise_makes_the_simulated_optimism_uncertain() -> None:
    spreads = []
    for count in (50, 5000):
        seen, space = measured(2, 14, 1, count)
        model = Quadratic().fit(seen, space)
        X = space.sample(30, generator=make_generator(2))
        pool = plausible_points(X, space, None, count=60, generator=make_generator(3))
        found = expected_optimism(model, X, seen.X, pool, generator=make_generator(4))
        assert found is not None
        spreads.append(float(found[1].mean()))
        assert float(found[0].abs().max()) < 3 * float(found[1].max())
    assert spreads[0] > 3 * spreads[1]


def test_choosing_among_noise_is_optimistic() -> None:
    # Nothing to learn: one metric that is the same everywhere, so every gain is noise.
    space = CoefficientSpace.box(["a", "b"])
    X = space.sample(30, generator=make_generator(0))
    noise = torch.randn(30, 2, generator=make_generator(1), dtype=torch.float64)
    metrics = (Metric("up", kind="unbounded"), Metric("down", "min", "unbounded"))
    seen = Observations(X, noise, metrics, Yvar=torch.ones_like(noise))
    model = Quadratic().fit(seen, space)
    pool = space.sample(300, generator=make_generator(2))
    found = expected_optimism(model, X, X, pool, generator=make_generator(3), count=200)
    assert found is not None
    standard_error = found[1] / 200**0.5
    assert bool((found[0] > 2 * standard_error).all()), "positive for both directions"


def test_a_surrogate_that_misleads_shows_when_evaluations_are_left_out() -> None:
    # The metric falls off where few points are: predicted from the others, it looks too good.
    space = CoefficientSpace.box(["a", "b"])
    X = torch.cat([0.3 + 0.1 * space.sample(12, generator=make_generator(0)), torch.ones(1, 2)])
    gain = 1 - 5 * (X.mean(-1, keepdim=True) - 0.5).clamp_min(0.0)
    metrics = (Metric("up", kind="unbounded"), Metric("down", "min", "unbounded"))
    seen = Observations(X, torch.cat([gain, -gain], -1), metrics)
    found = left_out_optimism(Quadratic().fit(seen, space), seen)
    assert found is not None
    assert float(found[0][0]) > 0.05
    assert float(found[0][0]) == pytest.approx(float(found[0][1]), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "limit"), [(4, 24, 1.0), (8, 48, 2.0)])
def test_five_hundred_points_take_no_more_than_they_may(m: int, n: int, limit: float) -> None:
    seen, space = measured(m, n)
    settings = quick(50, surrogate=Auto(), solver=GradientSolver(points=500))
    found = recommend(seen, space, settings, generator=make_generator(0))
    start = time.process_time()
    assess(
        found.front, found.model, seen, space, found.scale, guarded=True,
        generator=make_generator(0),
    )  # fmt: skip
    assert time.process_time() - start < limit
