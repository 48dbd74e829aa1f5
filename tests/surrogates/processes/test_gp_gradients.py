from __future__ import annotations

import dataclasses
import math
from typing import cast

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import feature_groups
from map_bo.surrogates.gradients import STEEPNESS
from map_bo.surrogates.processes.gp import GP, GPModel, MetricGP
from map_bo.surrogates.processes.gp_gradients import (
    ConditionedKernel,
    ObservedGradients,
    _Covariance,
    fit_joint,
)
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.kernels import Trend
from map_bo.surrogates.processes.marginal import LogPrior
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.surrogate_contract import LeaveOneOutContract, mixed_observations, moments
from tests.surrogates.test_gradients import with_gradients


class TestGPWithGradients(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return GP()

    @pytest.fixture
    def seen(self) -> Observations:
        return with_gradients(mixed_observations()[0])


class TestHybridWithGradients(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Hybrid()

    @pytest.fixture
    def seen(self) -> Observations:
        return with_gradients(mixed_observations()[0])


def covariance(trend: Trend, d: int) -> _Covariance:
    size = (d + 1) * (d + 2) // 2 if trend == "quadratic" else 1
    generator = make_generator(d)
    variances = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    lengthscale = torch.rand(d, generator=generator, dtype=torch.float64) + 0.2
    return _Covariance(trend, variances, torch.tensor(0.7, dtype=torch.float64), lengthscale)


@pytest.mark.parametrize("trend", ["constant", "quadratic"])
def test_gradients_have_the_derivatives_of_the_covariance(trend: Trend) -> None:
    d, k = 3, covariance(trend, 3)
    U, V = torch.rand(2, 4, d, generator=make_generator(0), dtype=torch.float64)

    def between(u: Tensor, v: Tensor) -> Tensor:
        return k.values(u[None], v[None])[0, 0]

    axis = torch.tensor([0, 1, 2, 1])
    mixed, slopes = k.mixed(U, V, axis), k.gradients(V, axis)
    for j in range(4):
        for i in range(4):
            by_v = torch.func.grad(between, 1)(U[i], V[j])[axis[j]] / 2  # per half width
            torch.testing.assert_close(mixed[i, j], by_v)
            both = torch.func.jacfwd(torch.func.grad(between, 1), 0)(V[i], V[j])
            torch.testing.assert_close(slopes[i, j], both[axis[j], axis[i]] / 4)
    batched = k.mixed(U.expand(2, 4, d), V, axis)
    torch.testing.assert_close(batched[1], mixed)


def waves(n: int, d: int = 2) -> tuple[Observations, CoefficientSpace]:
    """Return exact values and gradients of a wave that no quadratic follows."""
    space = CoefficientSpace.box([f"e{i}" for i in range(d)], lower=-1.0, upper=2.0)
    X = space.sample(n, generator=make_generator(n))
    Y, G = wave(X), 2 * torch.cos(2 * X).unsqueeze(1)
    zero = torch.zeros_like
    metric = (Metric("wave", kind="unbounded"),)
    return Observations(
        X, Y, metric, Yvar=zero(Y), gradients=G, gradient_variance=zero(G)
    ), space  # fmt: skip


def wave(X: Tensor) -> Tensor:
    return torch.sin(2 * X).sum(-1, keepdim=True)


@pytest.mark.parametrize("surrogate", [GP(), Hybrid()])
@pytest.mark.parametrize("n", [6, 14])
def test_gradients_are_worth_evaluations(surrogate: GP | Hybrid, n: int) -> None:
    seen, space = waves(n)
    new = space.sample(200, generator=make_generator(99))
    alone = dataclasses.replace(seen, gradients=None, gradient_variance=None)
    errors = [surrogate.fit(data, space).link_mean(new) - wave(new) for data in (seen, alone)]
    assert float(errors[0].square().mean()) < 0.1 * float(errors[1].square().mean())


def test_posterior_is_the_joint_regression() -> None:
    seen, space = waves(4)
    model = GP().fit(seen, space)
    process = model.processes[0]
    kernel = cast(ConditionedKernel, process.covar_module)
    new = space.sample(6, generator=make_generator(0))
    mean, variance = moments(model, new)
    K = kernel.joint(seen.X, process.likelihood.noise)
    constant = process.mean_module.constant
    target = torch.cat([seen.Y[:, 0] - constant, kernel.observed.values])
    U = (seen.X - kernel.prior.low) / kernel.prior.width
    cross = torch.cat([kernel.prior(new, seen.X).to_dense(), kernel.with_gradients(new)], -1)
    assert len(K) == 4 + 8
    assert torch.equal(kernel.points, U.repeat_interleave(2, 0))
    expected = constant + cross @ torch.linalg.solve(K, target)
    torch.testing.assert_close(mean[:, 0], expected, rtol=1e-5, atol=1e-6)
    prior = kernel.prior(new).to_dense()
    reduced = (prior - cross @ torch.linalg.solve(K, cross.T)).diagonal()
    torch.testing.assert_close(variance[:, 0], reduced, rtol=1e-3, atol=1e-6)
    # Its gradients are those that were observed.
    X = seen.X.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(model.link_mean(X).sum(), X)
    torch.testing.assert_close(slope, seen.filled_gradients()[0][:, 0], rtol=0.05, atol=0.05)


def test_joint_likelihood_is_maximal() -> None:
    seen, space = waves(5)
    U, d = space.normalise(seen.X), space.d
    slopes = ObservedGradients.of(
        1.5 * seen.filled_gradients()[0][:, 0], torch.full((5, d), 0.01).double()
    )
    assert slopes is not None
    y, known = seen.Y[:, 0] - seen.Y.mean(), torch.full((5,), 0.02).double()
    p = 1 + 4 + 1 + d
    prior = LogPrior(torch.full((p,), -1.0).double(), torch.full((p,), 1.5).double())
    fitted, steep, _ = fit_joint(U, (y, known), slopes, "quadratic", prior, prior.mean[None])
    hyper = fitted.hyperparameters

    def cost(logs: Tensor) -> float:
        k = _Covariance(
            "quadratic", logs[1:5].exp()[feature_groups(d)], logs[5].exp(), logs[6:8].exp()
        )
        noise = torch.cat([known + logs[0].exp(), slopes.variance + logs[8].exp()])
        target = torch.cat([y, slopes.values])
        K = k.joint(U, slopes) + torch.diag(noise)
        form = target @ torch.linalg.solve(K, target) + torch.logdet(2 * math.pi * K)
        mean = torch.cat([prior.mean, prior.mean[:1] + math.log(STEEPNESS)])
        away = (logs - mean) / 1.5
        return float(0.5 * form + 0.5 * away.square().sum())

    parts = [
        hyper.nugget.view(1),
        hyper.trend,
        hyper.scale.view(1),
        hyper.lengthscale,
        steep.view(1),
    ]
    best = torch.cat(parts).log()
    for i in range(len(best)):
        for step in (-0.1, 0.1):
            moved = best.clone()
            moved[i] += step
            assert cost(moved) > cost(best)


def test_leaving_an_evaluation_out_leaves_its_gradients_out() -> None:
    seen, space = mixed_observations(6)
    model = Hybrid().fit(with_gradients(seen), space)
    mean, variance = model.leave_one_out()
    for process, j in zip(model.processes[1:], (1, 2), strict=True):
        kernel = cast(ConditionedKernel, process.covar_module)
        K, n = kernel.joint(seen.X, process.likelihood.noise), len(seen)
        constant = process.mean_module.constant
        target = torch.cat([process.train_targets - constant, kernel.observed.values])
        for i in range(n):
            owner = torch.cat([torch.arange(n), kernel.observed.owner])
            rest = (owner != i).nonzero().flatten()
            k = K[i, rest]
            expected = constant + k @ torch.linalg.solve(K[rest][:, rest], target[rest])
            torch.testing.assert_close(mean[i, j], expected, rtol=1e-5, atol=1e-6)
            left = K[i, i] - process.likelihood.noise[i]
            left = left - k @ torch.linalg.solve(K[rest][:, rest], k)
            torch.testing.assert_close(variance[i, j], left, rtol=1e-4, atol=1e-6)


def test_more_values_are_taken_in() -> None:
    seen, space = waves(5)
    model = GP().fit(seen, space)
    X = space.sample(2, generator=make_generator(3))
    noise = torch.full((2, 1), 1e-3, dtype=torch.float64)
    more = model.condition_on_observations(X, wave(X), noise=noise)
    assert isinstance(more, GPModel)
    assert isinstance(more.processes[0], MetricGP)
    new = space.sample(5, generator=make_generator(4))
    before, after = (moments(m, new)[1] for m in (model, more))
    assert bool((after <= before * (1 + 1e-6) + 1e-8).all())
    torch.testing.assert_close(more.link_mean(new), moments(more, new)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(more.link_mean(new), model.link_mean(new))


def test_unit_of_a_metric_does_not_matter() -> None:
    seen, space = waves(6)
    big = dataclasses.replace(seen, Y=1e3 * seen.Y, gradients=1e3 * seen.filled_gradients()[0])
    new = space.sample(5, generator=make_generator(4))
    mean, variance = moments(GP().fit(seen, space), new)
    mean_2, variance_2 = moments(GP().fit(big, space), new)
    torch.testing.assert_close(mean_2 / 1e3, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(variance_2 / 1e6, variance, rtol=1e-2, atol=1e-6)
