from __future__ import annotations

import pytest
import torch
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.sampling.pathwise.features.generators import gen_kernel_features
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import centred, feature_groups, quadratic_features
from map_bo.surrogates.processes.gp import MetricGP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.kernels import (
    QuadraticKernel,
    TrendRBFKernel,
    squared_exponential,
    trend_features,
    trend_groups,
)
from map_bo.surrogates.surrogate import gaussian
from tests.contracts.surrogate_contract import mixed_observations


def space_of(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], lower=-1.0, upper=2.0)


def positive(k: int, seed: int) -> Tensor:
    return torch.randn(k, generator=make_generator(seed), dtype=torch.float64).exp()


def dense(kernel: QuadraticKernel, X: Tensor, Y: Tensor) -> Tensor:
    value: Tensor = kernel(X, Y).to_dense()
    return value


@given(d=st.integers(1, 5), n=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_quadratic_kernel_is_the_inner_product_of_the_features(d: int, n: int, seed: int) -> None:
    space, variances = space_of(d), positive(4, seed)
    X, Y = (space.sample(n, generator=make_generator(seed + i)) for i in range(2))
    K = dense(QuadraticKernel(space, variances), X, Y)
    prior = torch.diag(variances[feature_groups(d)])
    expected = (
        quadratic_features(centred(X, space)) @ prior @ quadratic_features(centred(Y, space)).mT
    )
    torch.testing.assert_close(K, expected, rtol=1e-10, atol=1e-10)


@given(
    d=st.integers(1, 4),
    n=st.integers(2, 15),
    seed=st.integers(0, 10**6),
    trend=st.sampled_from(["constant", "quadratic"]),
)
def test_covariances_are_symmetric_and_positive(d: int, n: int, seed: int, trend: str) -> None:
    space = space_of(d)
    X = space.sample(n, generator=make_generator(seed))
    groups = 4 if trend == "quadratic" else 1
    kernel = TrendRBFKernel(
        space,
        positive(groups, seed),
        positive(1, seed + 1)[0],
        positive(d, seed + 2),
        "quadratic" if trend == "quadratic" else "constant",
    )
    K = dense(kernel, X, X)
    torch.testing.assert_close(K, K.mT)
    values = torch.linalg.eigvalsh(K)
    assert float(values[0]) >= -1e-10 * float(values[-1])
    torch.testing.assert_close(kernel(X, diag=True), K.diagonal())


def test_hybrid_kernel_is_the_sum_of_its_parts() -> None:
    space = space_of(3)
    X, Y = (space.sample(5, generator=make_generator(i)) for i in range(2))
    variances, scale, lengthscale = positive(4, 2), torch.tensor(0.7).double(), positive(3, 3)
    both = dense(TrendRBFKernel(space, variances, scale, lengthscale), X, Y)
    trend = dense(QuadraticKernel(space, variances), X, Y)
    away = (space.normalise(X).unsqueeze(1) - space.normalise(Y)) / lengthscale
    torch.testing.assert_close(both, trend + scale * torch.exp(-0.5 * away.square().sum(-1)))


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("d", [7, 48])
def test_squared_exponential_at_coincident_points(d: int, shift: float) -> None:
    # On any BLAS |u|^2 + |v|^2 - 2 u.v is negative for some of so many pairs, and positive for
    # others, by a rounding error that grows with the shift.
    U = torch.rand(100, d, generator=make_generator(d), dtype=torch.float64) + shift
    lengthscale = torch.linspace(0.02, 0.3, d, dtype=torch.float64)
    V = U.clone().requires_grad_(True)
    values = squared_exponential(U, V, lengthscale)
    own = values.diagonal()
    torch.testing.assert_close(own, torch.ones_like(own), rtol=0, atol=0)
    torch.testing.assert_close(values, values.mT, rtol=0, atol=0)
    # Derivatives in units of 1 / l: all pairs in one product as in a fit, then pair by pair.
    (slope,) = torch.autograd.grad(own.sum(), V, create_graph=True)
    torch.testing.assert_close(slope * lengthscale, torch.zeros_like(U), rtol=0, atol=1e-9)
    bends = [torch.autograd.grad(slope[:, i].sum(), V, retain_graph=True)[0] for i in range(d)]
    unit = lengthscale * lengthscale.unsqueeze(-1)
    identity = torch.eye(d, dtype=torch.float64).expand(100, d, d)
    torch.testing.assert_close(torch.stack(bends, 1) * unit, -identity, rtol=0, atol=1e-9)

    def between(u: Tensor, v: Tensor) -> Tensor:
        return squared_exponential(u[None], v[None], lengthscale)[0, 0]

    mixed = torch.func.vmap(torch.func.jacfwd(torch.func.grad(between, 1), 0))(U, U)
    torch.testing.assert_close(mixed * unit, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [0.0, 2e4])
def test_squared_exponential_keeps_its_digits_under_a_shift(shift: float) -> None:
    # Multiples of 2^-20, so that the shifted points are exact.
    U, V = (torch.randint(2**20, (2, 40, 5), generator=make_generator(0)) / 2**20).double()
    lengthscale = torch.linspace(0.2, 0.6, 5, dtype=torch.float64)
    away = (U.unsqueeze(1) - V) / lengthscale
    expected = torch.exp(-0.5 * away.square().sum(-1))
    torch.testing.assert_close(
        squared_exponential(U + shift, V + shift, lengthscale), expected, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_squared_exponential_takes_batches(batch: tuple[int, ...]) -> None:
    source = make_generator(0)
    U = torch.rand(*batch, 4, 2, generator=source, dtype=torch.float64, requires_grad=True)
    V = torch.rand(5, 2, generator=source, dtype=torch.float64, requires_grad=True)
    lengthscale = torch.tensor([0.3, 0.7], dtype=torch.float64)
    away = (U.unsqueeze(-2) - V) / lengthscale
    expected = torch.exp(-0.5 * away.square().sum(-1))
    slopes = torch.autograd.grad(expected.sum(), (U, V))
    for W in (V, V.expand(*batch, 5, 2)):
        values = squared_exponential(U, W, lengthscale)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(torch.autograd.grad(values.sum(), (U, V)), slopes)


def test_constant_trend_is_the_first_quadratic_feature() -> None:
    U = torch.rand(4, 3, generator=make_generator(0), dtype=torch.float64)
    constant = trend_features("constant", U)
    torch.testing.assert_close(constant, trend_features("quadratic", U)[:, :1])
    assert len(trend_groups("constant", 3)) == constant.shape[-1] == 1
    assert len(trend_groups("quadratic", 3)) == trend_features("quadratic", U).shape[-1]


def test_pathwise_features_approximate_the_covariance() -> None:
    space = space_of(2)
    X = space.sample(6, generator=make_generator(0))
    lengthscale = torch.tensor([0.5, 1.5], dtype=torch.float64)
    kernel = TrendRBFKernel(space, positive(4, 1), torch.tensor(0.5).double(), lengthscale)
    with torch.random.fork_rng(devices=[]):
        features = gen_kernel_features(kernel, num_inputs=2, num_outputs=4096)
    values = features(X)
    assert values.shape == (6, features.num_outputs)
    torch.testing.assert_close(values @ values.mT, dense(kernel, X, X), rtol=0.02, atol=0.02)


def test_pathwise_samples_go_through_the_data() -> None:
    seen, space = mixed_observations(10)
    model = Hybrid().fit(seen, space)
    with torch.random.fork_rng(devices=[]):
        paths = draw_matheron_paths(model, torch.Size([200]))
    with torch.no_grad():
        values = torch.stack(list(paths(seen.X)), -1)  # 200 x n x m
    posterior = gaussian(model.posterior(seen.X))
    deviation = posterior.variance.sqrt()
    assert bool(((values.mean(0) - posterior.mean).abs() < 0.5 * deviation + 1e-3).all())
    assert isinstance(model.models[0], MetricGP)
