from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.surrogates.evidence import (
    Hyperprior,
    InRowSpace,
    InWeightSpace,
    maximise_evidence,
    regression,
)
from map_bo.surrogates.features import feature_groups, quadratic_features


def evidence_problem(
    n: int, d: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = make_generator(seed)
    Phi = quadratic_features(2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1)
    y = torch.randn(2, n, generator=generator, dtype=torch.float64)
    known = 0.1 * torch.rand(2, n, generator=generator, dtype=torch.float64)
    theta = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return Phi, y, known, feature_groups(d), theta


@pytest.mark.parametrize("kind", [InWeightSpace, InRowSpace])
@pytest.mark.parametrize(("n", "d"), [(4, 3), (15, 2), (6, 1)])
def test_evidence_is_the_gaussian_density(
    kind: type[InWeightSpace] | type[InRowSpace], n: int, d: int
) -> None:
    Phi, y, known, groups, theta = evidence_problem(n, d)
    cost = kind(Phi, y, known, groups).cost(theta)
    for j in range(2):
        K = (Phi * theta[j, 1:].exp()[groups]) @ Phi.T
        K = K + torch.diag(known[j] + theta[j, 0].exp())
        quadratic_form = y[j] @ torch.linalg.solve(K, y[j])
        log_density = -0.5 * (quadratic_form + torch.logdet(2 * math.pi * K))
        torch.testing.assert_close(cost[j], -log_density)


@pytest.mark.parametrize("kind", [InWeightSpace, InRowSpace])
@pytest.mark.parametrize(("n", "d"), [(4, 3), (15, 2), (6, 1)])
def test_evidence_derivatives_are_those_of_the_cost(
    kind: type[InWeightSpace] | type[InRowSpace], n: int, d: int
) -> None:
    Phi, y, known, groups, theta = evidence_problem(n, d)
    problem = kind(Phi, y, known, groups)
    gradient, hessian = problem.derivatives(theta)

    def total(flat: Tensor) -> Tensor:
        return problem.cost(flat.view(2, 5)).sum()

    by_autograd = torch.func.grad(total)(theta.flatten())
    torch.testing.assert_close(gradient.flatten(), by_autograd)
    full = torch.func.hessian(total)(theta.flatten()).view(2, 5, 2, 5)
    torch.testing.assert_close(hessian, torch.stack([full[0, :, 0], full[1, :, 1]]))


def test_both_spaces_agree_and_the_smaller_is_taken() -> None:
    Phi, y, known, groups, theta = evidence_problem(4, 3)
    assert isinstance(regression(Phi, y, known, groups), InRowSpace)
    for ours, theirs in zip(
        InWeightSpace(Phi, y, known, groups).fitted(theta),
        InRowSpace(Phi, y, known, groups).fitted(theta),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    Phi, y, known, groups, _ = evidence_problem(15, 2)
    assert isinstance(regression(Phi, y, known, groups), InWeightSpace)


def test_evidence_is_maximal_and_each_output_is_alone() -> None:
    Phi, y, known, groups, _ = evidence_problem(20, 2, seed=3)
    hyper = Hyperprior(torch.full((2, 5), -1.0).double(), torch.full((2, 5), 1.5).double())
    problem = regression(Phi, y, known, groups)
    best = maximise_evidence(problem, hyper)

    def cost(theta: Tensor) -> Tensor:
        return problem.cost(theta) + 0.5 * ((theta + 1) / 1.5).square().sum(-1)

    for i in range(5):
        for step in (-0.01, 0.01):
            moved = best.clone()
            moved[:, i] += step
            assert bool((cost(moved) > cost(best)).all())
    first = maximise_evidence(
        regression(Phi, y[:1], known[:1], groups), Hyperprior(hyper.mean[:1], hyper.spread[:1])
    )
    torch.testing.assert_close(first[0], best[0], atol=1e-6, rtol=1e-6)
    again = maximise_evidence(problem, hyper, start=best)
    torch.testing.assert_close(again, best)
