from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.quasirandom import SobolEngine

from map_bo.errors import SurrogateError
from map_bo.pareto.dominance import dominates
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.indicators import hypervolume
from map_bo.pareto.trust import Coverage, guard
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.choices import CHOICE


def box(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def default_design(d: int, n: int, seed: int) -> Tensor:
    """The anchors, then scrambled Sobol points."""
    anchors = box(d).anchors().X
    engine = SobolEngine(d, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    return torch.cat([anchors, engine.draw(n - len(anchors), dtype=torch.float64)])


def near_simplex(d: int, n: int, seed: int) -> Tensor:
    generator = make_generator(seed)
    E = -torch.rand(n, d, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    X = E / E.sum(-1, keepdim=True)
    return (X + 0.03 * torch.randn(X.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def truth(d: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Accuracies whose logit is a concave quadratic plus a wave that no quadratic can follow."""
    generator = make_generator(seed)
    centre = 0.25 * torch.rand(d, d, generator=generator, dtype=torch.float64)
    centre = centre + 0.6 * torch.eye(d, dtype=torch.float64)
    root = torch.randn(d, d, d, generator=generator, dtype=torch.float64) / d**0.5
    shape = root @ root.mT + 0.5 * torch.eye(d, dtype=torch.float64)
    wave = 3 * torch.randn(d, d, generator=generator, dtype=torch.float64)

    def mean(X: Tensor) -> Tensor:
        Z = X.unsqueeze(-2) - centre
        return torch.sigmoid(
            2 - 3 * torch.einsum("bmi,mij,bmj->bm", Z, shape, Z) + torch.sin(X @ wave)
        )

    return mean


def quadratic_fit(X: Tensor, Y: Tensor) -> Callable[[Tensor], Tensor]:
    """A ridge regression of the logits on all monomials up to the second degree."""

    def features(Z: Tensor) -> Tensor:
        i, j = torch.triu_indices(Z.shape[-1], Z.shape[-1])
        return torch.cat([torch.ones(len(Z), 1, dtype=Z.dtype), Z, Z[:, i] * Z[:, j]], -1)

    P, L = features(X), torch.logit(Y.clamp(1e-3, 1 - 1e-3))
    ridge = 1e-3 * torch.eye(P.shape[-1], dtype=torch.float64)
    W = torch.linalg.solve(P.T @ P + ridge, P.T @ L)
    return lambda Z: torch.sigmoid(features(Z) @ W)


def real_hypervolumes(X: Tensor, d: int, seed: int) -> tuple[float, float]:
    """What the true metrics make of the fronts found without and with the guard."""
    space, solver, f = box(d), GradientSolver(points=100), truth(d, seed)
    mean, coverage = quadratic_fit(X, f(X)), Coverage.of(X, space)
    reference = f(space.anchors().X[:-1]).amin(0)
    free = solver.solve(mean, space, generator=make_generator(seed))
    kept = solver.solve(guard(mean, coverage), space, generator=make_generator(seed))
    kept = kept[coverage.trusted(kept)]
    return hypervolume(f(free), reference), hypervolume(f(kept), reference)


@pytest.mark.parametrize("d", [4, 6])
def test_the_guard_saves_a_fit_to_samples_near_the_simplex(d: int) -> None:
    pairs = [real_hypervolumes(near_simplex(d, 6 * d, seed), d, seed) for seed in range(3)]
    without, guarded = (sum(values) for values in zip(*pairs, strict=True))
    assert guarded > 1.2 * without


def test_the_guard_costs_nothing_on_the_default_design() -> None:
    pairs = [real_hypervolumes(default_design(4, 12, seed), 4, seed) for seed in range(3)]
    for without, guarded in pairs:
        assert guarded > 0.99 * without


@pytest.mark.parametrize(("d", "n", "share"), [(4, 12, 0.88), (4, 30, 0.98), (8, 24, 0.93)])
def test_the_default_design_covers_practically_the_whole_box(d: int, n: int, share: float) -> None:
    X = torch.rand(4000, d, generator=make_generator(7), dtype=torch.float64)
    for seed in range(3):
        covered = Coverage.of(default_design(d, n, seed), box(d)).trusted(X, tolerance=0.0)
        assert covered.double().mean() > share


def test_samples_near_the_simplex_cover_a_thin_slab() -> None:
    coverage = Coverage.of(near_simplex(4, 30, 0), box(4))
    middle = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert coverage.trusted(middle)
    assert not coverage.trusted(middle * 2).any()  # the sum is 2
    assert not coverage.trusted(middle * 0).any()
    X = torch.rand(4000, 4, generator=make_generator(7), dtype=torch.float64)
    assert coverage.trusted(X).double().mean() < 0.15


@given(n=st.integers(1, 12), d=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_data_and_all_between_them_are_trusted(n: int, d: int, seed: int) -> None:
    generator = make_generator(seed)
    space = CoefficientSpace([f"e{i}" for i in range(d)], (-1.0,) * d, (3.0,) * d)  # type: ignore[arg-type]
    X = space.sample(n, generator=generator)
    coverage = Coverage.of(X, space)
    weights = torch.rand(20, n, generator=generator, dtype=torch.float64)
    between = (weights / weights.sum(-1, keepdim=True)) @ X
    assert (coverage.excess(torch.cat([X, between])) <= 1e-9).all()
    assert torch.isfinite(coverage.excess(space.sample(20, generator=generator))).all()


@given(d=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_shrinking_ends_inside_and_moves_nothing_that_is_inside(d: int, seed: int) -> None:
    generator, space = make_generator(seed), CoefficientSpace.box("abcdef"[:d], sum_at_most=0.9)
    coverage = Coverage.of(space.sample(8, generator=generator) * 0.5, space)
    X = space.sample(50, generator=generator)
    shrunk = coverage.shrink(X)
    assert (coverage.excess(shrunk) <= 1e-9).all()
    assert space.contains(shrunk).all()
    inside = coverage.excess(X) == 0
    assert torch.allclose(shrunk[inside], X[inside], rtol=0, atol=1e-12)


def test_units_of_the_coefficients_do_not_matter() -> None:
    narrow, X = box(3), default_design(3, 10, 0)
    wide = CoefficientSpace.box("abc", lower=-5.0, upper=15.0)
    probe = 2 * torch.rand(50, 3, generator=make_generator(1), dtype=torch.float64)
    ours = Coverage.of(X, narrow).excess(probe)
    theirs = Coverage.of(wide.unnormalise(X), wide).excess(wide.unnormalise(probe))
    assert torch.allclose(ours, theirs)
    assert ours.max() > 0


def test_excess_counts_radii() -> None:
    coverage = Coverage.of(default_design(3, 10, 0), box(3))
    inside = coverage.space.unnormalise(coverage.centre)
    away = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    far = inside + away * 100
    unit = coverage.shrink(far.unsqueeze(0)) - inside  # from the centre to the boundary
    points = torch.cat([inside + factor * unit for factor in (0.5, 1.5, 2.0, 3.0)])
    assert coverage.excess(points).tolist() == pytest.approx([0.0, 0.5, 1.0, 2.0])


def test_slack_widens_what_is_trusted() -> None:
    X = near_simplex(4, 30, 0)
    probe = torch.rand(2000, 4, generator=make_generator(7), dtype=torch.float64)
    shares = [
        float(Coverage.of(X, box(4), slack=slack).trusted(probe).double().mean())
        for slack in (0.5, 1.0, 2.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[2]


def test_one_point_is_trusted_with_a_little_room() -> None:
    X = torch.full((1, 3), 0.5, dtype=torch.float64)
    coverage = Coverage.of(X, box(3))
    assert coverage.trusted(X)
    assert coverage.trusted(X + 0.05)
    assert not coverage.trusted(X + 0.3)


def test_directions_never_explored_have_little_room() -> None:
    X = default_design(6, 20, 0)
    X[:, 5] = 0.0
    coverage = Coverage.of(X, box(6))
    away = X.mean(0, keepdim=True)
    away[0, 5] = 0.1
    assert coverage.trusted(away)
    away[0, 5] = 0.6
    assert not coverage.trusted(away)


def test_untrusted_points_are_dominated() -> None:
    coverage = Coverage.of(near_simplex(4, 30, 0), box(4))

    def rewards_leaving(X: Tensor) -> Tensor:
        return 100 * torch.stack([X.sum(-1), X.square().sum(-1)], -1)

    guarded = guard(rewards_leaving, coverage, scale=torch.tensor([5.0, 0.1]))
    X = torch.rand(500, 4, generator=make_generator(3), dtype=torch.float64)
    outside = X[coverage.excess(X) > 1e-6]
    assert len(outside) > 100
    assert dominates(guarded(coverage.shrink(outside)), guarded(outside)).all()
    inside = coverage.shrink(X)
    assert torch.allclose(guarded(inside), rewards_leaving(inside))


def test_the_guard_is_differentiable_everywhere() -> None:
    coverage = Coverage.of(near_simplex(4, 30, 0), box(4))
    X = torch.rand(50, 4, generator=make_generator(3), dtype=torch.float64)
    X[0] = coverage.space.unnormalise(coverage.centre)
    X.requires_grad_()
    values = guard(truth(4, 0), coverage)(X)
    (gradient,) = torch.autograd.grad(values.sum(), X)
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(-1) > 0).all()


def test_a_guarded_front_is_trusted() -> None:
    X, space = near_simplex(4, 24, 1), box(4)
    coverage = Coverage.of(X, space)
    mean = guard(quadratic_fit(X, truth(4, 1)(X)), coverage)
    front = GradientSolver(points=80).solve(mean, space, generator=make_generator(0))
    assert coverage.trusted(front).all()


def test_nothing_seen_covers_nothing() -> None:
    with pytest.raises(SurrogateError, match="no evaluation has succeeded"):
        Coverage.of(torch.zeros(0, 2), box(2))


def test_slack_must_be_positive() -> None:
    with pytest.raises(SurrogateError, match="slack must be positive, got 0"):
        Coverage.of(torch.zeros(1, 2), box(2), slack=0.0)


def test_with_blocks_half_the_leverage_is_trusted_and_without_all_of_it() -> None:
    blocks = CoefficientSpace.box(("a", "b"), blocks=("x", "y", "z"))
    X = default_design(6, 30, 0)
    assert Coverage.of(X, box(6)).limit == Coverage.of(X, box(6), slack=1.0).limit
    whole, half = Coverage.of(X, blocks, slack=1.0), Coverage.of(X, blocks)
    assert half.limit == pytest.approx(0.5 * whole.limit)
    assert bool(whole.trusted(X).all())
    assert not bool(half.trusted(X).all())
    inside = half.shrink(X)
    assert bool(half.trusted(inside).all())
    blocks.check(inside)


def test_with_a_choice_rows_keep_their_option_and_what_is_inactive() -> None:
    X = CHOICE.anchors().X[:5] * torch.tensor([0.6, 0.6, 1.0, 1.0]).double()
    X = torch.cat([X, torch.tensor([[0.2, 0.3, 1.0, 0.4], [0.3, 0.2, 1.0, 0.5]]).double()])
    coverage = Coverage.of(X, CHOICE)
    assert bool(coverage.trusted(X, tolerance=1e-9).all())
    points = CHOICE.sample(300, generator=make_generator(1))
    shrunk = coverage.shrink(points)
    CHOICE.check(shrunk)
    assert torch.equal(shrunk[:, 2], points[:, 2])
    assert bool(coverage.trusted(shrunk, tolerance=1e-6).all())
    # What is never varied under an option says nothing about it: all options have one ellipsoid.
    same = points.clone()
    same[:, 2], same[:, 3] = 0.0, 0.2
    other = points.clone()
    other[:, 2], other[:, 3] = 2.0, 0.2
    torch.testing.assert_close(coverage.excess(same), coverage.excess(other))
