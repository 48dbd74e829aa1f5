from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.surrogates.evidence import Hyperprior, InWeightSpace, maximise_evidence
from map_bo.surrogates.features import feature_groups, quadratic_features
from map_bo.surrogates.gradients import RowKinds, leave_blocks_out


def mixed_rows(n: int, d: int, seed: int = 0, kinds: int = 2) -> tuple[RowKinds, Tensor]:
    generator = make_generator(seed)
    Phi = quadratic_features(2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1)
    y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    known = 0.1 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    theta = torch.randn(2, kinds + 4, generator=generator, dtype=torch.float64)
    return RowKinds(Phi, y, known, feature_groups(d), torch.arange(n) % kinds), theta


@pytest.mark.parametrize(("n", "d"), [(4, 3), (15, 2)])
def test_evidence_is_the_gaussian_density(n: int, d: int) -> None:
    problem, theta = mixed_rows(n, d)
    cost = problem.cost(theta)
    for j in range(2):
        K = (problem.Phi * theta[j, 2:].exp()[problem.groups]) @ problem.Phi.T
        K = K + torch.diag(problem.known[j] + theta[j, :2].exp()[problem.kinds])
        form = problem.y[j] @ torch.linalg.solve(K, problem.y[j])
        torch.testing.assert_close(cost[j], 0.5 * (form + torch.logdet(2 * math.pi * K)))


@pytest.mark.parametrize("kinds", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(4, 3), (15, 2)])
def test_derivatives_are_those_of_the_cost(n: int, d: int, kinds: int) -> None:
    problem, theta = mixed_rows(n, d, kinds=kinds)
    gradient, hessian = problem.derivatives(theta)
    size = theta.shape[-1]

    def total(flat: Tensor) -> Tensor:
        return problem.cost(flat.view(2, size)).sum()

    torch.testing.assert_close(gradient.flatten(), torch.func.grad(total)(theta.flatten()))
    full = torch.func.hessian(total)(theta.flatten()).view(2, size, 2, size)
    torch.testing.assert_close(hessian, torch.stack([full[0, :, 0], full[1, :, 1]]))


def test_equal_nuggets_are_one_nugget() -> None:
    problem, theta = mixed_rows(12, 2)
    theta[:, 1] = theta[:, 0]
    one = InWeightSpace(problem.Phi, problem.y, problem.known, problem.groups)
    torch.testing.assert_close(problem.cost(theta), one.cost(theta[:, 1:]))


def test_each_kind_finds_its_own_noise() -> None:
    generator = make_generator(0)
    X = 2 * torch.rand(300, 1, generator=generator, dtype=torch.float64) - 1
    kinds = torch.arange(300) % 2
    noise = torch.tensor([0.01, 0.3], dtype=torch.float64)[kinds]
    y = (X[:, 0] + noise * torch.randn(300, generator=generator, dtype=torch.float64))[None]
    problem = RowKinds(quadratic_features(X), y, torch.zeros_like(y), feature_groups(1), kinds)
    # One coefficient has no cross features; their variance is its prior's.
    hyper = Hyperprior(torch.full((1, 6), -3.0).double(), torch.full((1, 6), 3.0).double())
    theta = maximise_evidence(problem, hyper, nuggets=2)[0]
    assert theta[:2].exp().sqrt().tolist() == pytest.approx([0.01, 0.3], rel=0.15)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 3))
def test_leaving_blocks_out_is_a_literal_refit(seed: int, d: int) -> None:
    problem, theta = mixed_rows(3 * (1 + d), d, seed)
    state = problem.solve(theta)
    eye = torch.eye(state.design.shape[-1], dtype=torch.float64)
    half = state.design @ torch.linalg.solve_triangular(state.cholesky, eye, upper=False).mT
    blocks = [list(range(i * (1 + d), (i + 1) * (1 + d))) for i in range(3)]
    residual, variance = leave_blocks_out(half, state.noise, state.residual, blocks)
    for b, block in enumerate(blocks):
        rest = [i for i in range(3 * (1 + d)) if i not in block]
        for j in range(2):
            S = theta[j, 2:].exp()[problem.groups]
            noise = problem.known[j] + theta[j, :2].exp()[problem.kinds]
            A, x = problem.Phi[rest], problem.Phi[block[0]]
            K = (A * S) @ A.T + torch.diag(noise[rest])
            k = (A * S) @ x
            mean = k @ torch.linalg.solve(K, problem.y[j, rest])
            torch.testing.assert_close(residual[j, b], problem.y[j, block[0]] - mean)
            torch.testing.assert_close(variance[j, b], (x * S) @ x - k @ torch.linalg.solve(K, k))
