from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.published.angles import angles_of, evenly
from map_bo.samplers.published.bins import Bins, grow_bins, pooled_residuals
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured, some_seen

PLANE = CoefficientSpace.box(("a", "b"))


def box(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def proposals(sampler: Sampler, seen: Observations, space: CoefficientSpace, n: int) -> Tensor:
    """Return the next point for each of ``n`` seeds, ``n x d``."""
    return torch.cat(
        [sampler.propose(seen, space, 1, generator=make_generator(seed)) for seed in range(n)]
    )


def angle(X: Tensor) -> Tensor:
    return torch.atan2(X[:, 1], X[:, 0])


class TestBins(SamplerContract):
    telling = 8

    @pytest.fixture
    def sampler(self) -> Sampler:
        return Bins(Quadratic(), initial=5)


def rough(X: Tensor) -> Observations:
    """Return a metric that is a quadratic below the diagonal and rugged above it."""
    smooth = 1 - X.square().sum(-1)
    rugged = torch.sin(40 * X[:, 0]) + torch.cos(37 * X[:, 1])
    Y = torch.where(X[:, 1] > X[:, 0], smooth + rugged, smooth)
    return Observations(X, Y.unsqueeze(-1), (Metric("one", kind="unbounded"),))


def test_directions_that_are_predicted_ill_get_more_points() -> None:
    X = PLANE.sample(30, generator=make_generator(1))
    X = X[(X[:, 0] - X[:, 1]).abs() > 0.05]
    found = proposals(Bins(Quadratic()), rough(X), PLANE, 60)
    above = float((found[:, 1] > found[:, 0]).double().mean())
    assert above > 0.62


def test_bins_get_points_in_proportion_to_the_standard_deviation_of_their_residuals() -> None:
    # Two bins that mirror each other, and pairs of opposite errors around a flat fit: twice as
    # large above the diagonal, which deserves two thirds of all points (by their squares, 4/5).
    theta = torch.linspace(3, 42, 20, dtype=torch.float64).repeat_interleave(2) * math.pi / 180
    theta = torch.cat([theta, math.pi / 2 - theta])
    X = 0.7 * torch.stack([theta.cos(), theta.sin()], -1)
    errors = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(40)
    errors[40:] *= 2
    seen = Observations(X, errors.unsqueeze(-1), (Metric("one", kind="unbounded"),))
    sampler = Bins(capacity=40, strength=2.1)
    shares = []
    for seed in range(2):
        found = sampler.propose(seen, PLANE, 70, generator=make_generator(seed))
        above = angle(torch.cat([X, found])) > math.pi / 4
        shares.append(float(above.double().mean()))
    assert float(np.mean(shares)) == pytest.approx(2 / 3, abs=0.03)


def test_residuals_are_fresh_every_round() -> None:
    X = PLANE.sample(16, generator=make_generator(1))
    seen = rough(X)
    mirrored = rough(PLANE.sample(20, generator=make_generator(2)))
    # What is learnt later, that the other side is rugged too, moves the proposals.
    later = seen.append(Observations(mirrored.X.flip(-1), 5 * mirrored.Y, seen.metrics))
    before = proposals(Bins(Quadratic()), seen, PLANE, 40)
    after = proposals(Bins(Quadratic()), later, PLANE, 40)
    below = [float((found[:, 0] > found[:, 1]).double().mean()) for found in (before, after)]
    assert below[1] > below[0] + 0.1


def test_empty_bins_are_reached() -> None:
    # Everything so far lies within 30 degrees of the first axis.
    source = make_generator(0)
    theta = torch.rand(14, generator=source, dtype=torch.float64) * math.pi / 6
    radius = 0.3 + 0.7 * torch.rand(14, generator=source, dtype=torch.float64)
    X = torch.stack([radius * theta.cos(), radius * theta.sin()], -1)
    found = proposals(Bins(Quadratic(), initial=4), measured(X), PLANE, 40)
    beyond = angle(found) > math.pi / 3
    assert float(beyond.double().mean()) > 0.3


def test_the_points_of_one_call_even_out() -> None:
    # Eight bins of one evaluation each, and a prior that holds their residuals to be alike.
    theta = (torch.arange(8, dtype=torch.float64) + 0.5) * math.pi / 16
    seen = measured(torch.stack([theta.cos(), theta.sin()], -1) * 0.7)
    sampler = Bins(Quadratic(), initial=4, capacity=1, strength=1e9)
    found = sampler.propose(seen, PLANE, 24, generator=make_generator(0))
    assert torch.histc(angle(found), 8, 0, math.pi / 2).tolist() == [3.0] * 8


def test_pending_points_count_in_their_bin() -> None:
    seen = some_seen(PLANE, 14)
    steep = torch.rand(30, 1, generator=make_generator(3), dtype=torch.float64) * 0.9 + 0.05
    waiting = torch.cat([0.2 * steep, steep], -1)  # many points near the second axis
    sampler = Bins(Quadratic(), initial=4)
    free = proposals(sampler, seen, PLANE, 30)
    held = torch.cat(
        [
            sampler.propose(seen, PLANE, 1, pending=waiting, generator=make_generator(seed))
            for seed in range(30)
        ]
    )
    limit = math.pi / 3
    assert int((angle(held) > limit).sum()) < int((angle(free) > limit).sum())


def test_radii_follow_the_good_points() -> None:
    source = make_generator(0)
    theta = torch.rand(40, generator=source, dtype=torch.float64) * math.pi / 2
    X = torch.rand(40, 1, generator=source, dtype=torch.float64)
    X = X * torch.stack([theta.cos(), theta.sin()], -1)

    def peaked(at: float) -> Observations:
        # Two metrics that agree on the radius and trade the directions.
        radius, phi = X.norm(dim=-1), torch.atan2(X[:, 1], X[:, 0])
        Y = torch.stack([phi.cos(), phi.sin()], -1) - 9 * (radius - at).square().unsqueeze(-1)
        return Observations(X, Y, (Metric("a", kind="unbounded"), Metric("b", kind="unbounded")))

    inner = proposals(Bins(Quadratic()), peaked(0.2), PLANE, 40).norm(dim=-1)
    outer = proposals(Bins(Quadratic()), peaked(0.9), PLANE, 40).norm(dim=-1)
    assert float(outer.mean()) > float(inner.mean()) + 0.15
    assert float(inner.max()) > 0.6  # the prior is wide
    assert float(outer.min()) < 0.4


@pytest.mark.parametrize("d", [1, 2, 12])
def test_any_number_of_coefficients(d: int) -> None:
    space = box(d)
    seen = some_seen(space, 3 * d + 8)
    X = Bins(Quadratic(), initial=3).propose(seen, space, 4, generator=make_generator(0))
    space.check(X)
    design = Sobol().propose(seen, space, 4, generator=make_generator(0))
    assert not torch.equal(X, design)


def test_directions_are_even_where_residuals_are_even() -> None:
    # In 6 coefficients angles that are uniform would leave the last one six times less.
    space = box(6)
    X = torch.cat([space.sample(30, generator=make_generator(seed)) for seed in range(2)])
    one = (Metric("one", kind="unbounded"),)
    noise = torch.randn(60, 1, generator=make_generator(5), dtype=torch.float64)
    found = proposals(Bins(Quadratic()), Observations(X, noise, one), space, 60)
    mean = (found / found.norm(dim=-1, keepdim=True)).mean(0)
    assert float(mean.max() / mean.min()) < 2.0


def test_a_surrogate_that_cannot_leave_out_is_refused() -> None:
    with pytest.raises(SamplerError, match="PublishedQuadratic does not leave eval") as caught:
        Bins(surrogate=PublishedQuadratic())
    assert "bins_published" in str(caught.value.hint)
    assert "sampler.surrogate=quadratic" in str(caught.value.hint)
    with pytest.raises(SamplerError, match="PublishedQuadratic does not leave evaluations out"):
        Bins().with_surrogate(PublishedQuadratic())


def test_a_broken_promise_to_leave_out_is_told() -> None:
    @dataclass(frozen=True)
    class Promising(PublishedQuadratic):
        leaves_one_out: ClassVar[bool] = True
        certain: ClassVar[bool] = False

    with pytest.raises(SamplerError, match="PublishedModel cannot leave evaluations out"):
        Bins(Promising()).propose(some_seen(PLANE, 12), PLANE, 1, generator=make_generator(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "capacity of a bin is 0"),
        ({"strength": 2.0}, "prior strength is 2.0"),
        ({"initial": -1}, "initial is -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        Bins(**settings)


def test_where_everything_is_known_the_design_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("map_bo.samplers.published.bins.NEAREST", 1.0)
    seen, generator = some_seen(PLANE, 9), make_generator(0)
    X = Bins(Quadratic()).propose(seen, PLANE, 1, generator=generator)
    assert torch.equal(X, Sobol().propose(seen, PLANE, 1, generator=generator))
    assert "the design goes on" in caplog.text


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 40),
    k=st.integers(0, 6),
    capacity=st.integers(1, 6),
)
def test_bins_cover_the_directions_and_hold_each_evaluation_once(
    seed: int, n: int, k: int, capacity: int
) -> None:
    source = make_generator(seed)
    U = torch.rand(n, k, generator=source, dtype=torch.float64)
    squares = torch.rand(n, generator=source, dtype=torch.float64)
    bins = grow_bins(U, squares, capacity=capacity, strength=4.0)
    assert sum(b.volume for b in bins) == pytest.approx(1.0)
    assert sorted(torch.cat([b.rows for b in bins]).tolist()) == list(range(n))
    for b in bins:
        assert b.holds(U).nonzero().flatten().tolist() == sorted(b.rows.tolist())
        small = k == 0 or float((b.upper - b.lower).max()) < 0.125
        assert small or len(b.rows) <= capacity


def test_bins_are_cut_where_residuals_differ() -> None:
    # Large residuals in the upper half of the second of three directions.
    U = torch.rand(8, 3, generator=make_generator(0), dtype=torch.float64)
    U[:, 1] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    squares = torch.tensor([0.01] * 4 + [2.0] * 4, dtype=torch.float64)
    bins = grow_bins(U, squares, capacity=4, strength=4.0)
    assert len(bins) == 2
    assert {tuple((b.upper - b.lower).tolist()) for b in bins} == {(1.0, 0.5, 1.0)}


def test_evaluations_in_one_direction_end_the_cutting() -> None:
    U = torch.full((30, 2), 0.3, dtype=torch.float64)
    bins = grow_bins(U, torch.ones(30).double(), capacity=2, strength=4.0)
    assert max(len(b.rows) for b in bins) == 30
    assert len(bins) < 20


def test_residuals_are_pooled_in_units_of_each_metric() -> None:
    residuals = torch.tensor([[1.0, 300.0, 0.0], [3.0, 100.0, 0.0]], dtype=torch.float64)
    # Squares over their means: (0.2, 1.8), (1.8, 0.2), and nothing to say.
    assert torch.allclose(pooled_residuals(residuals), torch.ones(2).double())
    assert torch.allclose(
        pooled_residuals(residuals[:, :1]), torch.tensor([0.2, 1.8], dtype=torch.float64)
    )


def test_points_in_the_upper_corner_of_the_cube_have_a_bin() -> None:
    theta = angles_of(torch.eye(3, dtype=torch.float64))[1]
    bins = grow_bins(evenly(theta), torch.ones(3).double(), capacity=1, strength=4.0)
    assert np.array([b.holds(evenly(theta)).numpy() for b in bins]).sum(0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["sum", "simplex", "wide"])
def test_points_fill_spaces_of_any_shape(name: str) -> None:
    space = SPACES[name]
    X = Bins(Quadratic(), initial=5).propose(
        some_seen(space, 12), space, 16, generator=make_generator(0)
    )
    space.check(X)
    assert float(space.normalise(X).std(0).min()) > 0.1
