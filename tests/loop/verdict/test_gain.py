"""When another point is chosen instead of the uniform blend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.verdict.gain import (
    PosteriorGain,
    joint_draws,
    measured_blend,
    posterior_gain,
    value_draws,
)
from map_bo.pareto.preferences import Preference
from map_bo.rng import make_generator
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic

SPACE = CoefficientSpace.box(("a", "b"))
METRICS = (Metric("one", resampling="same"), Metric("two", "min", resampling="same"))
SCALE = Scale(METRICS, torch.tensor([0.2, 0.8]), torch.tensor([0.9, 0.1]), "test")


def observed(Y: list[list[float]], noise: float = 0.0) -> Observations:
    X = torch.cat([SPACE.anchors().X, torch.full((len(Y) - 4, 2), 0.7).double()])
    return Observations(X, torch.tensor(Y).double(), METRICS, torch.full((len(Y), 2), noise))


def gain(seen: Observations, draws: Tensor, **weights: float) -> PosteriorGain:
    at = measured_blend(seen, SPACE)
    assert at == 3
    return posterior_gain(draws, seen, at, Preference(weights), SCALE)


ROOM = [[0.2, 0.8], [0.9, 0.5], [0.5, 0.1], [0.6, 0.4]]  # base, experts, blend
PLATEAU = [[0.2, 0.8], [0.89, 0.11], [0.9, 0.1], [0.9, 0.1]]


def test_a_gain_counts_where_experts_leave_room_and_not_on_a_plateau() -> None:
    promised = torch.tensor([[0.95, 0.05]]).double().expand(100, 2)
    assert gain(observed(ROOM), promised).counts
    found = gain(observed(PLATEAU), promised)
    assert not found.counts
    assert found.median == pytest.approx(0.0, abs=1e-12)


def test_a_promise_counts_for_no_more_than_was_measured() -> None:
    beyond = torch.tensor([[2.0, -1.0]]).double().expand(100, 2)
    found = gain(observed(ROOM), beyond)
    # The best measured are .9 and .1: gains of .3 each, of a range of .7.
    assert found.median == pytest.approx(0.3 / 0.7)
    better = gain(observed([*ROOM, [0.95, 0.1]]), beyond)
    assert better.median == pytest.approx((0.35 + 0.3) / 1.4)


def test_what_noise_alone_shows_is_no_room() -> None:
    promised = torch.tensor([[0.95, 0.05]]).double().expand(100, 2)
    lucky = [*PLATEAU, [0.93, 0.07]]
    assert gain(observed(lucky), promised).counts
    assert not gain(observed(lucky, noise=0.031**2 / 0.6), promised).counts
    # The best of many has to exceed the blend by more than the best of few.
    noise = 0.025**2 / 0.6
    assert gain(observed(lucky, noise=noise), promised).counts
    many = [*lucky, *([[0.9, 0.1]] * 40)]
    assert not gain(observed(many, noise=noise), promised).counts


def test_a_loss_never_counts_and_weights_decide() -> None:
    trade = torch.tensor([[0.8, 0.7]]).double().expand(100, 2)
    assert not gain(observed(ROOM), trade).counts
    assert gain(observed(ROOM), trade, one=1.0).counts
    assert not gain(observed(ROOM), trade, two=1.0).counts


def test_an_uncertain_gain_is_judged_by_its_median() -> None:
    mean = torch.tensor([0.65, 0.38]).double()
    draws = value_draws(mean, torch.tensor([0.2, math.nan]).double(), generator=make_generator(0))
    assert draws.shape == (1024, 2)
    assert float(draws[:, 1].std()) == 0.0
    found = gain(observed(ROOM), draws)
    assert found.lower < found.median < found.upper
    assert found.counts
    assert "of the experts' range" in str(found)
    assert found.describe()["median"] == found.median


def test_the_blend_is_found_where_all_of_it_was_measured() -> None:
    assert measured_blend(observed(ROOM), SPACE) == 3
    assert measured_blend(observed(ROOM).select([0, 1]), SPACE) is None
    assert measured_blend(Observations.empty(2, METRICS), SPACE) is None
    partial = observed([*ROOM[:3], [0.6, math.nan]])
    assert measured_blend(partial, SPACE) is None


def test_draws_have_the_posteriors_mean_and_know_what_was_measured() -> None:
    source = make_generator(1)
    X = torch.rand(12, 2, generator=source).double()
    noise = 0.02 * torch.randn(12, generator=source).double()
    Y = torch.stack([0.5 + 0.3 * X[:, 0] * X[:, 1] + noise, 0.5 - 0.2 * X[:, 0]], -1)
    seen = Observations(X, Y, METRICS, torch.full_like(Y, 1e-6))
    model = Quadratic().fit(seen, SPACE)
    new = torch.tensor([[0.4, 0.6]]).double()
    draws = joint_draws(
        model, torch.cat([new, X[:1]]), seen, SPACE, count=800, generator=make_generator(2)
    )
    assert draws.shape == (800, 2, 2)
    spread = draws.std(0)
    assert float(spread[1, 0]) < float(spread[0, 0])
    # Of other rows than it was fitted to, nothing is known.
    other = joint_draws(model, new, seen.select([0, 1]), SPACE, generator=make_generator(2))
    assert float(other[:, 0, 0].mean()) == pytest.approx(float(draws[:, 0, 0].mean()), abs=0.01)
