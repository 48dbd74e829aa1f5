"""Processes whose rows have noise in common, beside the formulas written out."""

from __future__ import annotations

import math
from typing import cast

import gpytorch
import pytest
import torch
from botorch.sampling.normal import SobolQMCNormalSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.correlated_noise import (
    CorrelatedNoiseLikelihood,
    noise_matrix,
    own_noise,
)
from map_bo.surrogates.processes.gp import GP, GPModel, MetricGP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.kernels import TrendRBFKernel
from map_bo.surrogates.surrogate import Surrogate, gaussian
from tests.contracts.surrogate_contract import moments

SPACE = CoefficientSpace.box(("a", "b"))
SCORES = (Metric("x", kind="unbounded"), Metric("y", kind="unbounded"))


def covariance(n: int, seed: int, *, size: float = 0.05) -> Tensor:
    """Return a covariance with much in common, and of different variances."""
    generator = make_generator(seed)
    root = torch.randn(n, 3, generator=generator, dtype=torch.float64) + 1.0
    own = 0.2 + torch.rand(n, generator=generator, dtype=torch.float64)
    return size**2 * (root @ root.mT + torch.diag(own))


def noisy(n: int = 10, seed: int = 0) -> Observations:
    X = SPACE.sample(n, generator=make_generator(seed))
    C = torch.stack([covariance(n, seed + 1), covariance(n, seed + 2)])
    normal = torch.randn(2, n, 1, generator=make_generator(seed + 3), dtype=torch.float64)
    noise = (torch.linalg.cholesky(C) @ normal).squeeze(-1).mT
    truth = torch.stack([torch.sin(3 * X).sum(-1), X[:, 0] * X[:, 1] - X[:, 1]], -1)
    return Observations(
        X, truth + noise, SCORES, Yvar=C.diagonal(dim1=-1, dim2=-2).mT, covariance=C
    )


def dense(process: MetricGP, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mean and covariance at ``X`` by the definition."""
    kernel, train = process.covar_module, process.train_inputs[0]
    K = kernel(train).to_dense() + noise_matrix(process.noise)
    cross = kernel(X, train).to_dense()
    constant = process.mean_module.constant
    mean = constant + cross @ torch.linalg.solve(K, process.train_targets - constant)
    return mean, kernel(X).to_dense() - cross @ torch.linalg.solve(K, cross.mT)


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_own_noise_is_what_the_others_do_not_tell(n: int, seed: int) -> None:
    C = covariance(n, seed)
    own = own_noise(C)
    for i in range(n):
        rest = torch.arange(n) != i
        told = C[i, rest] @ torch.linalg.solve(C[rest][:, rest], C[rest, i])
        torch.testing.assert_close(own[i], C[i, i] - told, rtol=1e-6, atol=1e-12)
    assert bool((own <= C.diagonal() * (1 + 1e-12)).all())
    assert torch.equal(own_noise(torch.diag(C.diagonal())), C.diagonal())


def test_the_likelihood_has_the_matrix_at_its_rows_and_variances_elsewhere() -> None:
    C = covariance(4, 0)
    with gpytorch.settings.min_fixed_noise(double_value=1e-300):
        likelihood = CorrelatedNoiseLikelihood(C)
        grown = likelihood.get_fantasy_likelihood(noise=torch.full((3, 2), 0.5).double())
    prior = gpytorch.distributions.MultivariateNormal(
        torch.zeros(4).double(), torch.eye(4).double()
    )
    torch.testing.assert_close(likelihood(prior).covariance_matrix, torch.eye(4).double() + C)
    one = gpytorch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    given_noise = likelihood(one, noise=torch.full((2,), 0.5).double()).covariance_matrix
    torch.testing.assert_close(given_noise, 1.5 * torch.eye(2).double())
    assert grown.matrix.shape == (3, 6, 6)
    assert torch.equal(grown.matrix[1, :4, :4], C)
    assert torch.equal(grown.matrix[2, 4:, 4:], 0.5 * torch.eye(2).double())
    assert not bool(grown.matrix[:, :4, 4:].any())
    torch.testing.assert_close(grown.noise[0, :4], likelihood.noise)


@pytest.mark.parametrize("surrogate", [GP(), Hybrid()], ids=repr)
def test_posterior_and_its_closed_forms_are_those_of_the_dense_formulas(
    surrogate: Surrogate,
) -> None:
    seen = noisy()
    model = cast(GPModel, surrogate.fit(seen, SPACE))
    X = SPACE.sample(5, generator=make_generator(9))
    with torch.no_grad():
        mean, joint = model.joint(X)
        for j, process in enumerate(model.processes):
            expected, spread = dense(process, X)
            torch.testing.assert_close(mean[:, j], expected, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(model.link_mean(X)[:, j], expected, rtol=1e-8, atol=1e-9)
            jitter = process.jitter * torch.eye(5, dtype=torch.float64)
            torch.testing.assert_close(joint[j], spread + jitter, rtol=1e-6, atol=1e-10)
        expected_noise = seen.covariance
        assert expected_noise is not None
        found = model.noise_covariance()
        assert found is not None
        nugget = model.misfit_variance()[:, None, None] * torch.eye(len(seen)).double()
        torch.testing.assert_close(found, expected_noise + nugget)


def test_the_fit_is_at_the_mode_of_the_dense_likelihood() -> None:
    """The noise in common is in the likelihood that hyperparameters are fitted by."""
    seen = noisy(14)
    process = GP().fit(seen, SPACE).processes[0]
    kernel = cast(TrendRBFKernel, process.covar_module)
    assert seen.covariance is not None
    y = seen.Y[:, 0] - seen.Y[:, 0].mean()
    unit = seen.Y[:, 0].std()

    def log_density(scale: float, nugget: float) -> float:
        trend = kernel.variances[0] * torch.ones(14, 14).double()
        smooth = kernel(seen.X).to_dense() - trend
        noise = seen.covariance[0] + nugget * process.misfit * torch.eye(14).double()  # type: ignore[index]
        K = trend + scale * smooth + noise
        fit = -0.5 * y @ torch.linalg.solve(K, y) - 0.5 * torch.logdet(2 * math.pi * K)
        a = math.log(scale * float(kernel.scale / unit**2))
        t = math.log(nugget * process.misfit / float(unit**2))
        return float(fit) - 0.5 * a**2 - 0.5 * ((t + 7) / 2) ** 2

    best = log_density(1.0, 1.0)
    for scale, nugget in ((1.15, 1.0), (0.87, 1.0), (1.0, 1.6), (1.0, 0.6)):
        assert log_density(scale, nugget) < best + 1e-3


@pytest.mark.parametrize("surrogate", [GP(), Hybrid()], ids=repr)
def test_leaving_a_row_out_is_the_gaussian_conditional(surrogate: Surrogate) -> None:
    model = cast(GPModel, surrogate.fit(noisy(), SPACE))
    mean, latent = model.leave_one_out()
    targets, own = model.training_targets()
    for j, process in enumerate(model.processes):
        K = process.covar_module(process.train_inputs[0]).to_dense() + process.noise
        constant = process.mean_module.constant
        for i in range(len(targets)):
            rest = torch.arange(len(targets)) != i
            weights = torch.linalg.solve(K[rest][:, rest], K[rest, i])
            expected = constant + weights @ (targets[rest, j] - constant)
            spread = K[i, i] - weights @ K[rest, i]
            torch.testing.assert_close(mean[i, j], expected, rtol=1e-7, atol=1e-8)
            # Latent and own noise together are the variance of the observation given all others.
            total = latent[i, j] - process.jitter + own[i, j]
            torch.testing.assert_close(total, spread, rtol=1e-6, atol=1e-10)


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_conditioning_on_further_rows_is_the_dense_posterior(seed: int, q: int) -> None:
    seen = noisy(8, seed % 50)
    model = GP().fit(seen, SPACE)
    generator = make_generator(seed)
    more = SPACE.sample(q, generator=generator)
    Y = torch.randn(q, 2, generator=generator, dtype=torch.float64)
    noise = 0.01 + 0.1 * torch.rand(q, 2, generator=generator, dtype=torch.float64)
    X = SPACE.sample(4, generator=generator)
    with torch.no_grad():
        grown = model.condition_on_observations(more, Y, noise=noise)
        mean, variance = moments(grown, X)
        for j, process in enumerate(model.processes):
            matrix = torch.zeros(8 + q, 8 + q).double()
            matrix[:8, :8], matrix[8:, 8:] = process.noise, torch.diag(noise[:, j])
            train = torch.cat([seen.X, more])
            constant = process.mean_module.constant
            target = torch.cat([process.train_targets, Y[:, j]]) - constant
            K = process.covar_module(train).to_dense() + matrix
            cross = process.covar_module(X, train).to_dense()
            expected = constant + cross @ torch.linalg.solve(K, target)
            spread = process.covar_module(X).to_dense() - cross @ torch.linalg.solve(K, cross.mT)
            torch.testing.assert_close(mean[:, j], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(variance[:, j], spread.diagonal(), rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(grown.processes[j].noise, matrix)
        torch.testing.assert_close(grown.link_mean(X), mean, rtol=1e-5, atol=1e-6)


def test_fantasies_add_a_row_of_independent_noise() -> None:
    seen = noisy(8)
    model = GP().fit(seen, SPACE)
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    X = SPACE.sample(3, generator=make_generator(5))
    with torch.no_grad():
        grown = model.processes[0].fantasize(X[:1], sampler)
        before, after = (gaussian(one.posterior(X)).variance for one in (model.processes[0], grown))
    assert after.shape == (4, 3, 1)
    assert bool((after <= before + 1e-9).all())
    assert float(after[0, 0]) < 0.9 * float(before[0])
    matrix = grown.noise
    assert matrix.shape[-2:] == (9, 9)
    torch.testing.assert_close(matrix[:8, :8], model.processes[0].noise)
    assert not bool(matrix[:8, 8:].any())
