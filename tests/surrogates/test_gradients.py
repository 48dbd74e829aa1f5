from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.evidence import Hyperprior
from map_bo.surrogates.features import (
    centred,
    feature_groups,
    n_features,
    quadratic_feature_gradients,
    quadratic_features,
)
from map_bo.surrogates.gradients import (
    STEEPNESS,
    RowKinds,
    WithGradients,
    feature_derivatives,
    fit_with_gradients,
    gradient_rows,
    gradient_scale,
)
from map_bo.surrogates.links import from_link, links_for
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from map_bo.surrogates.validation import log_densities
from tests.contracts.surrogate_contract import (
    METRICS,
    LeaveOneOutContract,
    mixed_observations,
    moments,
)


def with_gradients(seen: Observations, noise: float = 0.01) -> Observations:
    """Return `mixed_observations` with noisy gradients of the loss and the score."""
    a, b = seen.X[:, 0], seen.X[:, 1]
    loss = torch.stack([torch.full_like(a, 0.5), 2 * (b - 0.4)], -1)
    score = torch.stack([b - 2, a], -1)
    G = torch.stack([torch.full_like(loss, torch.nan), loss, score], 1)
    draws = torch.randn(G.shape, generator=make_generator(5), dtype=torch.float64)
    variance = torch.full_like(G, noise**2)
    variance[:, 2] = torch.nan
    return dataclasses.replace(seen, gradients=G + noise * draws, gradient_variance=variance)


class TestQuadraticWithGradients(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Quadratic()

    @pytest.fixture
    def seen(self) -> Observations:
        return with_gradients(mixed_observations()[0])


def box(d: int, lower: float = -0.5, upper: float = 1.5) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], lower=lower, upper=upper)


def exact_quadratic(d: int, n: int, seed: int, m: int = 2) -> tuple[Observations, Tensor]:
    """Return ``n`` exact values and gradients of ``m`` quadratics, and their weights."""
    space, generator = box(d), make_generator(seed)
    weights = torch.randn(m, n_features(d), generator=generator, dtype=torch.float64)
    X = space.sample(n, generator=generator)
    Y = quadratic_features(centred(X, space)) @ weights.T
    G = torch.einsum("nkD,mD->nmk", feature_derivatives(X, space), weights)  # half width is 1
    metrics = tuple(Metric(f"m{j}", kind="unbounded") for j in range(m))
    zero = torch.zeros_like
    return Observations(X, Y, metrics, Yvar=zero(Y), gradients=G, gradient_variance=zero(G)), (
        weights
    )


def test_feature_gradients_are_those_of_the_features() -> None:
    Z = torch.randn(4, 3, generator=make_generator(0), dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(quadratic_features))(Z)
    torch.testing.assert_close(quadratic_feature_gradients(Z), jacobian.mT)


@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_rank_of_values_and_gradients(d: int) -> None:
    for k in range(1, d + 2):
        X = box(d).sample(k, generator=make_generator(d))
        rows = [quadratic_features(centred(X, box(d))), *feature_derivatives(X, box(d))]
        rank = int(torch.linalg.matrix_rank(torch.cat(rows), rtol=1e-10))
        assert rank == 1 + d + d * (k - 1) - (k - 1) * (k - 2) // 2
    assert rank == n_features(d)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_one_evaluation_more_than_coefficients_identifies_a_quadratic(d: int) -> None:
    seen, weights = exact_quadratic(d, d + 1, seed=d)
    space = box(d)
    new = space.sample(100, generator=make_generator(99))
    truth = quadratic_features(centred(new, space)) @ weights.T

    def error(model_mean: Tensor) -> float:
        return float(((model_mean - truth).square().mean(0) / truth.var(0)).sqrt().max())

    # With a prior that hardly speaks, to the last digits.
    Phi = quadratic_features(centred(seen.X, space))
    slopes, _ = seen.filled_gradients()
    rows = torch.cat([Phi, feature_derivatives(seen.X, space).flatten(0, 1)])
    y = torch.cat([seen.Y.T, slopes.transpose(0, 1).flatten(1)], -1)
    kinds = torch.tensor([0] * len(Phi) + [1] * (len(rows) - len(Phi)))
    theta = torch.tensor([-30.0, -30.0, *[8.0] * 4], dtype=torch.float64).expand(2, -1)
    state = RowKinds(rows, y, torch.zeros_like(y), feature_groups(d), kinds).solve(theta)
    mean = quadratic_features(centred(new, space)) @ (state.scale * state.weights).mT
    assert error(mean) < 1e-6
    # As it comes, with the default priors; values alone do not get near.
    known = Quadratic(misfit=False)
    assert error(known.fit(seen, space).link_mean(new)) < 1e-3
    alone = dataclasses.replace(seen, gradients=None, gradient_variance=None)
    assert error(known.fit(alone, space).link_mean(new)) > 0.5
    assert error(Quadratic().fit(seen, space).link_mean(new)) < 5e-3


def test_fewer_evaluations_still_gain() -> None:
    seen, weights = exact_quadratic(6, 4, seed=1)
    new = box(6).sample(100, generator=make_generator(99))
    truth = quadratic_features(centred(new, box(6))) @ weights.T
    alone = dataclasses.replace(seen, gradients=None, gradient_variance=None)
    errors = [
        (Quadratic().fit(data, box(6)).link_mean(new) - truth).square().mean(0).sqrt()
        for data in (seen, alone)
    ]
    assert bool((errors[0] < 0.7 * errors[1]).all())


@pytest.mark.parametrize("metric", [Metric("p"), Metric("l", "min", "loss"), METRICS[2]])
def test_rows_are_derivatives_on_the_link_scale(metric: Metric) -> None:
    space = box(2, lower=-1.0, upper=4.0)
    links = links_for([metric])
    X = space.sample(5, generator=make_generator(0))

    def latent(x: Tensor) -> Tensor:
        return 0.3 * (x[..., :1] * x[..., 1:] - x[..., :1])

    def value(x: Tensor) -> Tensor:
        return from_link(latent(x), links)

    G = torch.func.vmap(torch.func.jacrev(value))(X)
    rows = gradient_rows(Observations(X, value(X), (metric,), gradients=G), links, space)
    assert rows is not None
    by_half_width = torch.func.vmap(torch.func.jacrev(latent))(X) * 2.5
    torch.testing.assert_close(rows.gradients, by_half_width)
    assert bool(rows.variance.isnan().all())


def test_noise_of_gradients_goes_through_the_link() -> None:
    space = box(1, lower=0.0, upper=2.0)
    metric = Metric("l", "min", "loss")
    y, g, sd_y, sd_g = 2.0, 0.7, 0.05, 0.03
    column = torch.full((2, 1), y, dtype=torch.float64)
    seen = Observations(
        torch.tensor([[0.5], [1.0]]),
        column,
        (metric,),
        Yvar=torch.full_like(column, sd_y**2),
        gradients=torch.full((2, 1, 1), g),
        gradient_variance=torch.full((2, 1, 1), sd_g**2, dtype=torch.float64),
    )
    rows = gradient_rows(seen, links_for([metric]), space)
    assert rows is not None
    draws = torch.randn(200_000, 2, generator=make_generator(0), dtype=torch.float64)
    sampled = (g + sd_g * draws[:, 0]) / (y + sd_y * draws[:, 1])
    assert float(rows.gradients[0]) == pytest.approx(float(sampled.mean()), rel=2e-3)
    assert float(rows.variance[0]) == pytest.approx(float(sampled.var()), rel=2e-2)


def test_gradients_at_a_bound_are_left_out() -> None:
    space = box(1, lower=0.0, upper=1.0)
    Y = torch.tensor([[0.0], [0.4], [1.0]])
    seen = Observations(Y, Y, (Metric("p"),), gradients=torch.ones(3, 1, 1))
    rows = gradient_rows(seen, links_for(seen.metrics), space)
    assert rows is not None
    assert rows.present.flatten().tolist() == [False, True, False]
    assert gradient_rows(seen.select([0, 2]), links_for(seen.metrics), space) is None
    assert float(gradient_scale(rows)[0]) == pytest.approx(0.5 / 0.24 / 3**0.5)


def test_gradients_may_be_partial_and_differ_between_metrics() -> None:
    seen, _ = exact_quadratic(2, 4, seed=3, m=3)
    G = seen.filled_gradients()[0].clone()
    G[1, 0] = torch.nan
    G[:, 2] = torch.nan
    G[2, 1, 0] = torch.nan
    data = dataclasses.replace(seen, gradients=G)
    model = Quadratic().fit(data, box(2))
    new = box(2).sample(5, generator=make_generator(0))
    mean, variance = moments(model, new)
    for j in range(3):
        gradients = None if j == 2 else G[:, j : j + 1]
        noise = None if gradients is None else torch.zeros_like(gradients)
        alone = Observations(
            seen.X,
            seen.Y[:, j : j + 1],
            seen.metrics[j : j + 1],
            Yvar=seen.Yvar[:, j : j + 1],
            gradients=gradients,
            gradient_variance=noise,
        )
        single = moments(Quadratic().fit(alone, box(2)), new)
        torch.testing.assert_close(mean[:, j], single[0][:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance[:, j], single[1][:, 0], rtol=1e-4, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(1e-3, 1e3), width=st.floats(0.1, 10), seed=st.integers(0, 10**6))
def test_units_of_metric_and_coefficients_do_not_matter(
    factor: float, width: float, seed: int
) -> None:
    generator = make_generator(seed)
    X = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    Y = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    G = torch.randn(5, 1, 2, generator=generator, dtype=torch.float64)
    new = torch.rand(4, 2, generator=generator, dtype=torch.float64)
    metric = (METRICS[2],)
    first = Quadratic().fit(Observations(X, Y, metric, gradients=G), box(2, 0.0, 1.0))
    second = Quadratic().fit(
        Observations(width * X, factor * Y, metric, gradients=G * factor / width),
        box(2, 0.0, width),
    )
    mean, variance = moments(first, new)
    scaled_mean, scaled_variance = moments(second, width * new)
    torch.testing.assert_close(scaled_mean / factor, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled_variance / factor**2, variance, rtol=1e-3, atol=1e-6)


def test_known_gradient_noise_weighs_the_rows() -> None:
    seen, weights = exact_quadratic(2, 4, seed=7, m=1)
    wrong = seen.filled_gradients()[0].clone()
    wrong[0] += 20.0
    noise = torch.zeros_like(wrong)
    noise[0] = 400.0
    new = box(2).sample(50, generator=make_generator(0))
    truth = quadratic_features(centred(new, box(2))) @ weights.T

    def error(variance: Tensor | None) -> float:
        data = dataclasses.replace(seen, gradients=wrong, gradient_variance=variance)
        return float((Quadratic().fit(data, box(2)).link_mean(new) - truth).abs().max())

    assert error(noise) < 0.05 * error(None)


def test_leaving_an_evaluation_out_leaves_its_gradient_out() -> None:
    seen, _ = exact_quadratic(2, 4, seed=5)
    space = box(2)
    Z = centred(seen.X, space)
    features = quadratic_features(Z), feature_groups(2)
    derivatives = feature_derivatives(seen.X, space)
    slopes = seen.filled_gradients()[0].transpose(0, 1) + 0.1
    where = torch.ones(4, 2, dtype=torch.bool)
    where[3, 0] = False
    values, nothing = seen.Y.T, torch.zeros(2, 4, dtype=torch.float64)
    hyper = Hyperprior(torch.full((2, 6), -1.0).double(), torch.ones(2, 6).double())

    def fit(rows: list[int]) -> WithGradients:
        return fit_with_gradients(
            [0, 1],
            where[rows],
            (values[:, rows], nothing[:, rows]),
            (slopes[:, rows], torch.zeros_like(slopes[:, rows])),
            (features[0][rows], features[1]),
            derivatives[rows],
            held if rows != [0, 1, 2, 3] else hyper,
            torch.tensor([True, False]),
        )

    every = fit([0, 1, 2, 3])
    nuggets = every.log_variances[:, :2].exp()
    assert float(every.misfit[0]) == max(float(nuggets[0, 0]), float(nuggets[0, 1]) / STEEPNESS)
    assert float(every.misfit[1]) == float(nuggets[1, 0])
    # A prior so narrow that the variances stay where they were.
    held = Hyperprior(every.log_variances, torch.full((2, 6), 1e-5).double())
    for i in range(4):
        state = fit([j for j in range(4) if j != i]).state
        mean = ((features[0][i] * state.scale) * state.weights).sum(-1)
        torch.testing.assert_close(values[:, i] - every.left_out[:, i], mean, rtol=1e-4, atol=1e-5)
        half = features[0][i] * state.scale
        own = torch.linalg.solve_triangular(state.cholesky, half.unsqueeze(-1), upper=False)
        torch.testing.assert_close(
            every.left_out_variance[:, i], own.square().sum((-1, -2)), rtol=1e-3, atol=1e-6
        )


def test_a_fit_with_gradients_can_be_validated() -> None:
    seen, space = mixed_observations(10)
    densities = log_densities(Quadratic().fit(with_gradients(seen), space))
    assert densities.shape == seen.Y.shape
    assert bool(torch.isfinite(densities).all())
