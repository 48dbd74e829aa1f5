from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.published.public_code import PublishedBins, PublishedDesign, bin_scores
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured, some_seen

PLANE = CoefficientSpace.box(("a", "b"))


def box(d: int, **sides: float) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], **sides)  # type: ignore[arg-type]


def at_angles(*degrees: float, radius: float = 0.5) -> Tensor:
    theta = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return radius * torch.stack([theta.cos(), theta.sin()], -1)


def angle(X: Tensor) -> Tensor:
    return torch.atan2(X[:, 1], X[:, 0]) * 180 / math.pi


class TestPublishedBins(SamplerContract):
    telling = 8

    @pytest.fixture
    def sampler(self) -> Sampler:
        return PublishedBins(initial=5, surrogate=Quadratic())


class TestWithThePublishedFit(SamplerContract):
    telling = 8

    @pytest.fixture
    def sampler(self) -> Sampler:
        return PublishedBins(initial=6)

    @pytest.fixture(params=["box", "wide"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_published_design_comes_first(d: int) -> None:
    space, size = box(d), n_features(d)
    nothing = measured(torch.zeros(0, d))
    X = PublishedBins().propose(nothing, space, size, generator=make_generator(0))
    design = PublishedDesign(size).propose(nothing, space, size, generator=make_generator(0))
    assert torch.equal(X, design)


def test_only_bins_with_evaluations_are_visited() -> None:
    # Of the four bins of 22.5 degrees the second and the last hold evaluations.
    seen = measured(at_angles(25, 30, 40, 70, 80, 88))
    sampler = PublishedBins(initial=6)
    X = sampler.propose(seen, PLANE, 60, generator=make_generator(0))
    theta, radius = angle(X), X.norm(dim=-1)
    second, last = (theta >= 22.5) & (theta <= 45), theta >= 67.5
    assert (second | last).all()
    assert 10 < int(second.sum()) < 50
    assert 0.2 <= float(radius.min()) < 0.25
    assert 0.75 < float(radius.max()) <= 0.8


def test_two_bins_an_angle_from_four_coefficients_on() -> None:
    space = box(4)
    seen = measured(torch.tensor([[0.6, 0.1, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1]], dtype=torch.float64))
    X = PublishedBins(initial=2).propose(seen, space, 30, generator=make_generator(0))
    theta = torch.atan2(X[:, 1:].norm(dim=-1), X[:, 0]) * 180 / math.pi
    assert (theta <= 45).all()  # one of two bins; of four it would be a quarter of that
    assert float(theta.max()) > 35


def test_scores_are_stale() -> None:
    generator, sampler = make_generator(0), PublishedBins(initial=6)
    first = measured(at_angles(25, 30, 40, 70, 80, 88))
    later = at_angles(1, 5, 50, 60, radius=0.3)
    one, other = measured(later), measured(later.flip(0))
    other = Observations(later, 1 - 0.9 * one.Y, one.metrics)
    X = sampler.propose(first.append(one), PLANE, 8, generator=generator)
    assert torch.equal(X, sampler.propose(first.append(other), PLANE, 8, generator=generator))
    # Bins that only later evaluations lie in are not visited either.
    theta = angle(X)
    assert (((theta >= 22.5) & (theta <= 45)) | (theta >= 67.5)).all()


def test_a_batch_is_what_comes_one_at_a_time() -> None:
    sampler, generator = PublishedBins(initial=6), make_generator(0)
    seen = some_seen(PLANE, 4)
    whole = sampler.propose(seen, PLANE, 8, generator=generator)
    seen = seen.append(measured(whole[:2]))
    batch = sampler.propose(seen, PLANE, 6, generator=generator)
    for i in range(6):
        X = sampler.propose(seen, PLANE, 1, pending=batch[:i], generator=generator)
        assert torch.equal(X, batch[i : i + 1])
    part = sampler.propose(seen.append(measured(batch[:3])), PLANE, 3, generator=generator)
    assert torch.equal(part, batch[3:])


def test_tasks_take_turns() -> None:
    # One task errs in the second bin alone and the other in the last: both are unlearnable there.
    X = at_angles(24, 28, 32, 36, 40, 44, 69, 72, 75, 78, 81, 84)
    noise = torch.tensor([9.0, -9.0] * 6, dtype=torch.float64)
    low = torch.arange(12) < 6
    Y = torch.stack([torch.where(low, noise, 0.0), torch.where(low, 0.0, noise)], -1)
    seen = Observations(X, Y, (Metric("a", kind="unbounded"), Metric("b", kind="unbounded")))
    sampler = PublishedBins(initial=12, surrogate=Quadratic())
    theta = angle(sampler.propose(seen, PLANE, 12, generator=make_generator(0)))
    assert ((theta < 45) == torch.tensor([True, False] * 6)).all()


def test_points_outside_are_moved_in() -> None:
    space = box(2, lower=0.3, upper=1.0)
    seen = measured(torch.tensor([[0.9, 0.31], [0.8, 0.3], [0.3, 1.0]], dtype=torch.float64))
    X = PublishedBins(initial=3).propose(seen, space, 20, generator=make_generator(0))
    space.check(X)
    assert bool((X == 0.3).any())


def test_failures_leave_it_to_the_design(caplog: pytest.LogCaptureFixture) -> None:
    generator = make_generator(0)
    sampler = PublishedBins(initial=3, design=Sobol())
    points = Sobol().propose(measured(torch.zeros(0, 2)), PLANE, 4, generator=generator)
    seen = measured(points[:3], failed=(0, 1, 2))
    X = sampler.propose(seen, PLANE, 1, generator=generator)
    assert torch.equal(X, points[3:])
    assert "the design goes on: 0 of 0 evaluations" in caplog.text


def test_where_everything_is_known_the_design_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("map_bo.samplers.published.public_code.NEAREST", 1.0)
    seen, generator = some_seen(PLANE, 9), make_generator(0)
    sampler = PublishedBins(initial=6, design=Sobol())
    X = sampler.propose(seen, PLANE, 1, generator=generator)
    assert torch.equal(X, Sobol().propose(seen, PLANE, 1, generator=generator))
    assert "hold points known already" in caplog.text


def deviation(values: list[float]) -> float:
    mean = statistics.fmean(values)
    return math.sqrt(statistics.fmean((value - mean) ** 2 for value in values))


def published_spread(squares: list[float], source: random.Random) -> float:
    """The published rule, restated: what is left of a bin shrinks from round to round."""
    left, means = list(squares), []
    for _ in range(30):
        for dropped in source.sample(left, int(0.2 * len(left))):
            left.remove(dropped)
        means.append(statistics.fmean(left))
    return deviation(means)


@pytest.mark.parametrize("rows", [1, 4, 5, 6, 9, 25])
def test_the_spread_is_that_of_the_published_rule(rows: int) -> None:
    squares = [float(i) ** 2 for i in range(rows)]
    others = [1000.0 * i for i in range(20)]  # of another bin, which must not matter
    bins = [(0,)] * rows + [(1,)] * len(others)
    mean, values = statistics.fmean(squares), np.array(squares + others)
    ours, theirs = np.random.default_rng(0), random.Random(1)
    found = [2 * (bin_scores(values, bins, ours)[0,] - mean) for _ in range(300)]
    expected = [published_spread(squares, theirs) for _ in range(1000)]
    if rows <= 5:
        assert found == pytest.approx([0.0] * 300, abs=1e-12)
        assert expected == pytest.approx([0.0] * 1000, abs=1e-12)
        return
    # The order in which rows are dropped is random: the distributions are compared.
    assert statistics.fmean(found) == pytest.approx(statistics.fmean(expected), rel=0.1)
    assert deviation(found) == pytest.approx(deviation(expected), rel=0.15)
    if rows == 6:  # any of the six goes first, any of the other five next, and no more
        assert {round(spread, 6) for spread in found} == {round(spread, 6) for spread in expected}


def test_a_score_is_the_mean_of_the_bin_and_half_its_spread() -> None:
    squares = np.array([1.0, 2.0, 2.0, 60.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    bins = [(0,), (1,), (1,)] + [(2,)] * 6
    scores = bin_scores(squares, bins, np.random.default_rng(0))
    assert (scores[0,], scores[1,]) == (1.0, 2.0)
    # The large row is dropped in the first round, in the second, or never.
    means = [[0.0] * 30, [12.0] + [0.0] * 29, [12.0] + [15.0] * 29]
    possible = [10.0 + 0.5 * deviation(one) for one in means]
    assert scores[2,] in [pytest.approx(one) for one in possible]
    assert set(scores) == {(0,), (1,), (2,)}


def test_a_lone_evaluation_has_a_score() -> None:
    assert bin_scores(np.array([4.0]), [()], np.random.default_rng(0)) == {(): 4.0}


def test_settings_are_checked() -> None:
    with pytest.raises(SamplerError, match="initial is 0"):
        PublishedBins(initial=0)
