from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.samplers.designs.optimal import (
    Criterion,
    Goal,
    box_moments,
    exchange,
    greedy,
    local_moves,
    prior_precision,
    sample_moments,
)
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features
from tests.contracts.sampler_contract import SPACES

CRITERIA: list[Criterion] = ["d", "i"]


def box(d: int, **sides: float) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], **sides)  # type: ignore[arg-type]


def goal(criterion: Criterion, space: CoefficientSpace, apart: float = 0.05) -> Goal:
    return Goal(criterion, space, box_moments(space), apart)


def some(space: CoefficientSpace, n: int, seed: int) -> Tensor:
    return space.sample(n, generator=make_generator(seed))


@pytest.mark.parametrize("importance", [(), (1.0, 0.5, 0.2)])
def test_moments_of_the_box_are_those_of_its_points(importance: tuple[float, ...]) -> None:
    space = replace(box(3, lower=-1.0, upper=2.0), importance=importance)
    # A midpoint rule of 60 points a side integrates fourth moments to 1e-3.
    u = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    X = space.unnormalise(torch.cartesian_prod(u, u, u))
    assert torch.allclose(box_moments(space), sample_moments(X, space), rtol=2e-3, atol=1e-12)


def test_the_i_criterion_is_the_variance_of_the_prediction_averaged_over_the_space() -> None:
    space = box(2)
    design = some(space, 9, 1)
    i = goal("i", space)
    # Coefficients are drawn from the posterior after the design, and the space is sampled.
    root = torch.linalg.cholesky(torch.linalg.inv(i.information(design)))
    normal = torch.randn(6, 20000, generator=make_generator(3), dtype=torch.float64)
    values = i.features(some(space, 2000, 2)) @ (root @ normal)
    assert -i.value(design) == pytest.approx(float(values.square().mean()), rel=0.05)


def test_the_d_criterion_is_the_log_determinant() -> None:
    space = box(2)
    design, d = some(space, 9, 1), goal("d", space)
    F = d.features(design)
    expected = torch.linalg.slogdet(F.mT @ F + torch.diag(prior_precision(2)))
    assert d.value(design) == pytest.approx(float(expected.logabsdet))


def test_slopes_come_before_squares_and_products_under_the_prior() -> None:
    assert (prior_precision(2)[:3] < prior_precision(2)[3:].min()).all()
    assert len(prior_precision(4)) == n_features(4)


@given(seed=st.integers(0, 10**6), d=st.integers(1, 4), n=st.integers(0, 12))
@pytest.mark.parametrize("criterion", CRITERIA)
def test_gains_are_differences_of_the_criterion(
    criterion: Criterion, seed: int, d: int, n: int
) -> None:
    # Below as many points as coefficients the prior decides, and the differences of the
    # integrated variance are those of large numbers.
    space = box(d)
    design, candidates = some(space, n + 1, seed), some(space, 3, seed + 1)
    g = goal(criterion, space)
    gains = g.gains(g.information(design), g.features(candidates))
    for gain, x in zip(gains.tolist(), candidates, strict=True):
        after = g.value(torch.cat([design, x.unsqueeze(0)]))
        assert gain == pytest.approx(after - g.value(design), rel=1e-5, abs=1e-6)
        assert gain >= 0


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(SPACES)),
    fixed=st.integers(0, 4),
    free=st.integers(1, 8),
)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_exchange_never_lowers_the_criterion_and_stays_in_the_space(
    criterion: Criterion, seed: int, name: str, fixed: int, free: int
) -> None:
    space, g = SPACES[name], goal(criterion, SPACES[name])
    held, start, pool = some(space, fixed, seed), some(space, free, seed + 1), some(space, 20, seed)
    after = exchange(g, held, start, pool, sweeps=2)
    assert after.shape == start.shape
    space.check(after)
    before = g.value(torch.cat([held, start]))
    assert g.value(torch.cat([held, after])) >= before - 1e-7 * (1 + abs(before))


def test_exchange_leaves_its_arguments_alone_and_takes_no_points_too() -> None:
    space, g = box(2), goal("d", box(2))
    start, pool = some(space, 5, 0), some(space, 20, 1)
    before = start.clone()
    assert not torch.equal(exchange(g, start[:0], start, pool, sweeps=2), before)
    assert torch.equal(start, before)
    assert torch.equal(exchange(g, start, start[:0], pool, sweeps=2), start[:0])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_greedy_takes_what_gains_most_each_time(criterion: Criterion) -> None:
    space, g = box(2), goal(criterion, box(2), apart=0.0)
    fixed, pool = some(space, 2, 0), some(space, 30, 1)
    order = greedy(g, fixed, pool, 8)
    design = fixed
    for row in order.tolist():
        gains = g.gains(g.information(design), g.features(pool))
        assert float(gains[row]) == pytest.approx(float(gains.max()), rel=1e-6)
        design = torch.cat([design, pool[row : row + 1]])


def test_greedy_keeps_points_apart_and_stops_when_none_is_left() -> None:
    g = goal("d", box(1), apart=0.3)
    pool = torch.linspace(0, 1, 101, dtype=torch.float64).unsqueeze(-1)
    chosen = pool[greedy(g, pool[:1], pool, 10)]
    together = torch.cat([pool[:1], chosen]).sort(0).values
    assert 2 <= len(chosen) <= 3
    assert float(together.diff(dim=0).min()) >= 0.3
    assert len(greedy(g, pool, pool, 3)) == 0


def test_exchange_keeps_points_apart() -> None:
    g = goal("d", box(1), apart=0.1)
    pool = torch.linspace(0, 1, 101, dtype=torch.float64).unsqueeze(-1)
    start = pool[[0, 20, 40, 60, 80]]
    after = exchange(g, start[:0], start, pool, sweeps=20).sort(0).values
    assert float(after.diff(dim=0).min()) >= 0.1 - 1e-12
    assert after[0] == 0.0
    assert after[-1] == 1.0


def test_moves_go_along_every_coefficient() -> None:
    space = box(2, upper=4.0)
    moves = local_moves(torch.tensor([1.0, 2.0], dtype=torch.float64), space, 0.25)
    expected = {(2, 2), (0, 2), (1, 3), (1, 1), (4, 2), (1, 0), (1, 4), (1, 2)} | {(2, 2), (0, 2)}
    assert {(float(a), float(b)) for a, b in moves} == {(float(a), float(b)) for a, b in expected}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_three_points_of_one_coefficient_are_the_best_of_all(criterion: Criterion) -> None:
    g = goal(criterion, box(1))
    pool = torch.linspace(0, 1, 21, dtype=torch.float64).unsqueeze(-1)
    found = exchange(g, pool[:0], pool[[3, 4, 9]], pool, sweeps=20)
    best = max(g.value(pool[list(rows)]) for rows in itertools.combinations(range(21), 3))
    assert g.value(found) == pytest.approx(best)
    assert torch.allclose(found.sort(0).values.flatten(), torch.tensor([0.0, 0.5, 1.0]).double())
