from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import quadratic_features
from map_bo.surrogates.links import from_link
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.surrogate_contract import (
    LeaveOneOutContract,
    mixed_observations,
    moments,
)


class TestQuadraticContract(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Quadratic()


class TestGaussianContract(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Quadratic(likelihood="gaussian", misfit=False)


def box(d: int, lower: float = 0.0, upper: float = 1.0) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], lower=lower, upper=upper)


def random_quadratics(d: int, m: int, seed: int) -> Tensor:
    generator = make_generator(seed)
    size = (d + 1) * (d + 2) // 2
    return torch.randn(m, size, generator=generator, dtype=torch.float64)


def unbounded(m: int) -> tuple[Metric, ...]:
    return tuple(Metric(f"m{i}", kind="unbounded") for i in range(m))


def counted(n: int, count: int, seed: int, d: int = 2) -> tuple[Observations, Tensor]:
    """Return ``n`` counted proportions of a sigmoid of a quadratic, and its true weights."""
    generator = make_generator(seed)
    weights = random_quadratics(d, 2, seed)
    X = box(d).sample(n, generator=generator)
    p = torch.sigmoid(1 + quadratic_features(2 * X - 1) @ weights.T)
    draws = torch.rand(n, 2, count, generator=generator, dtype=torch.float64)
    Y = (draws < p.unsqueeze(-1)).double().mean(-1)
    counts = torch.full_like(Y, count)
    return Observations(X, Y, (Metric("a"), Metric("b")), counts=counts), weights


# ------------------------------------------------------------------ recovery and laws


@settings(max_examples=15, deadline=None)
@given(d=st.integers(1, 4), seed=st.integers(0, 10**6), exact=st.booleans())
def test_recovers_a_quadratic_without_noise(d: int, seed: int, exact: bool) -> None:
    space = box(d, lower=-0.5, upper=1.5)
    weights = random_quadratics(d, 2, seed)
    generator = make_generator(seed)
    X = space.sample(4 * weights.shape[1], generator=generator)
    Y = quadratic_features(X) @ weights.T
    Yvar = torch.zeros_like(Y) if exact else None
    model = Quadratic().fit(Observations(X, Y, unbounded(2), Yvar=Yvar), space)  # type: ignore[arg-type]
    new = space.sample(50, generator=generator)
    truth = quadratic_features(new) @ weights.T
    error = (model.link_mean(new) - truth).abs().amax(0) / Y.std(0)
    assert float(error.max()) < 5e-3


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    factor=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
)
def test_units_of_a_metric_do_not_matter(seed: int, factor: float, offset: float) -> None:
    space = box(2)
    generator = make_generator(seed)
    X = space.sample(9, generator=generator)
    Y = torch.randn(9, 1, generator=generator, dtype=torch.float64)
    new = space.sample(5, generator=generator)
    mean, variance = moments(Quadratic().fit(Observations(X, Y, unbounded(1)), space), new)
    scaled = Observations(X, offset + factor * Y, unbounded(1))
    mean_2, variance_2 = moments(Quadratic().fit(scaled, space), new)
    torch.testing.assert_close((mean_2 - offset) / factor, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance_2 / factor**2, variance, rtol=1e-3, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(14)))
def test_order_of_rows_does_not_matter(order: list[int]) -> None:
    seen, space = mixed_observations()
    new = space.sample(5, generator=make_generator(1))
    mean, variance = moments(Quadratic().fit(seen, space), new)
    mean_2, variance_2 = moments(Quadratic().fit(seen.select(order), space), new)
    torch.testing.assert_close(mean_2, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance_2, variance, rtol=1e-4, atol=1e-6)


def test_metrics_are_fitted_apart() -> None:
    seen, space = mixed_observations()
    together = Quadratic().fit(seen, space)
    alone = Quadratic().fit(
        dataclasses.replace(
            seen,
            Y=seen.Y[:, 1:2],
            metrics=seen.metrics[1:2],
            Yvar=seen.Yvar[:, 1:2],
            counts=seen.counts[:, 1:2],
        ),
        space,
    )
    torch.testing.assert_close(alone.weights[0], together.weights[1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ few and odd data


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_evaluations_give_a_wide_posterior(n: int) -> None:
    seen, space = mixed_observations(n)
    model = Quadratic().fit(seen, space)
    few = moments(model, space.bounds.mean(0, keepdim=True))[1]
    full, _ = mixed_observations(40)
    many = moments(Quadratic().fit(full, space), space.bounds.mean(0, keepdim=True))[1]
    assert bool(torch.isfinite(few).all())
    assert float((many[0, :2] / few[0, :2]).max()) < 1


def test_one_evaluation_is_too_few() -> None:
    seen, space = mixed_observations(3)
    failed = Observations.failed(seen.X[1:], seen.metrics, "lost")
    with pytest.raises(SurrogateError, match=r"1 of 3 evaluations succeeded.*\n.*more points"):
        Quadratic().fit(seen.select([0]).append(failed), space)


def test_settings_name_what_they_take() -> None:
    with pytest.raises(SurrogateError, match="no likelihood 'poisson'"):
        Quadratic(likelihood="poisson")  # type: ignore[arg-type]
    with pytest.raises(SurrogateError, match="no link kind 'probit'"):
        Quadratic(link="probit")  # type: ignore[arg-type]


def test_constant_metrics_and_repeated_rows() -> None:
    space = box(3)
    X = space.sample(4, generator=make_generator(0)).repeat(2, 1)
    Y = torch.tensor([[0.5, 1.0, 7.0]]).repeat(8, 1)
    counts = torch.full_like(Y, torch.nan)
    counts[:, 1] = 100
    metrics = (Metric("half"), Metric("all"), Metric("seven", kind="unbounded"))
    model = Quadratic().fit(Observations(X, Y, metrics, counts=counts), space)
    prediction = predict(model, X)
    torch.testing.assert_close(prediction.mean[:, 0], Y[:, 0].double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(prediction.mean[:, 2], Y[:, 2].double(), atol=1e-6, rtol=0)
    # Eight times 100 of 100 says "nearly 1" and leaves room below.
    assert float(prediction.mean[:, 1].min()) > 0.98
    assert float(prediction.lower[:, 1].max()) < 1.0


def test_exact_observations_are_interpolated() -> None:
    space = box(2)
    X = space.sample(5, generator=make_generator(3))
    Y = torch.rand(5, 1, generator=make_generator(4), dtype=torch.float64)
    seen = Observations(X, Y, unbounded(1), Yvar=torch.zeros_like(Y))
    model = Quadratic(misfit=False).fit(seen, space)
    torch.testing.assert_close(model.link_mean(X), Y, atol=1e-3, rtol=0)


def test_known_noise_weighs_the_rows() -> None:
    space = box(1)
    X = torch.tensor([[0.0], [0.0], [0.5], [1.0]])
    Y = torch.tensor([[0.0], [1.0], [0.5], [0.5]])
    Yvar = torch.tensor([[1e-6], [1.0], [0.01], [0.01]])
    model = Quadratic(misfit=False).fit(Observations(X, Y, unbounded(1), Yvar=Yvar), space)
    assert abs(float(model.link_mean(space.bounds[:1]))) < 0.02


def test_many_coefficients_and_few_rows() -> None:
    space = box(20)  # 231 features
    X = space.sample(12, generator=make_generator(0))
    Y = X[:, :1] - X[:, 1:2]
    model = Quadratic().fit(Observations(X, Y, unbounded(1)), space)
    assert float((model.link_mean(X) - Y).square().mean()) < float(Y.var())


# ------------------------------------------------------------------ what it claims


def coverage(fit: Quadratic, bend: float, seeds: int = 4) -> float:
    """Return how often the true metric lies in the 95 % interval, 1000 examples an evaluation."""
    space, inside = box(2), []
    for seed in range(seeds):
        generator = make_generator(seed)
        weights = random_quadratics(2, 2, seed)

        def truth(X: Tensor, weights: Tensor = weights) -> Tensor:
            wave = bend * torch.sin(9 * X.sum(-1, keepdim=True))
            return torch.sigmoid(1 + wave + quadratic_features(2 * X - 1) @ weights.T)

        X = space.sample(25, generator=generator)
        p = truth(X)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        Y = ((p + (p * (1 - p) / 1000).sqrt() * noise) * 1000).round().clamp(0, 1000) / 1000
        counts = torch.full_like(Y, 1000)
        model = fit.fit(Observations(X, Y, (Metric("a"), Metric("b")), counts=counts), space)
        new = space.sample(100, generator=generator)
        prediction = predict(model, new)
        real = truth(new)
        inside.append(((prediction.lower <= real) & (real <= prediction.upper)).double().mean())
    return float(torch.stack(inside).mean())


def test_intervals_cover_a_quadratic_truth() -> None:
    assert coverage(Quadratic(), bend=0.0) > 0.88


def test_misfit_keeps_intervals_honest_when_the_truth_is_no_quadratic() -> None:
    assert coverage(Quadratic(), bend=0.6) > 0.85
    assert coverage(Quadratic(misfit=False), bend=0.6) < 0.6


def test_misfit_is_only_told_where_noise_is_known() -> None:
    seen, space = mixed_observations()
    misfit = Quadratic().fit(seen, space).misfit_variance()
    assert float(misfit[0]) > 0
    assert float(misfit[1]) > 0
    assert float(misfit[2]) == 0


def test_binomial_likelihood_is_used_where_every_row_is_counted() -> None:
    seen, _ = counted(10, 20, seed=5)
    space = box(2)
    both = Quadratic().fit(seen, space)
    gaussian = Quadratic(likelihood="gaussian").fit(seen, space)
    assert not torch.allclose(both.weights, gaussian.weights)
    counts = seen.counts.clone()
    counts[0, 0] = torch.nan
    partly = Quadratic().fit(dataclasses.replace(seen, counts=counts), space)
    torch.testing.assert_close(partly.weights[1], both.weights[1], rtol=1e-5, atol=1e-6)
    Z = partly.training_targets()[0]
    torch.testing.assert_close(
        Z[1:, 0], torch.logit((20 * seen.Y[1:, 0] + 0.5) / 21), rtol=1e-9, atol=1e-9
    )


def test_binomial_beats_a_gaussian_near_one() -> None:
    # 20 examples each near 1: most cells read 20 of 20.
    space = box(2)
    worst = []
    for seed in range(5):
        generator = make_generator(seed)
        X = space.sample(30, generator=generator)
        new = space.sample(200, generator=generator)

        def truth(X: Tensor) -> Tensor:
            return torch.sigmoid(4.5 - 6 * (X - 0.6).square().sum(-1, keepdim=True))

        draws = torch.rand(30, 20, generator=generator, dtype=torch.float64)
        Y = (draws < truth(X)).double().mean(-1, keepdim=True)
        seen = Observations(X, Y, (Metric("a"),), counts=torch.full_like(Y, 20))
        errors = [
            float((from_link(model.link_mean(new), model.links) - truth(new)).square().mean())
            for model in (
                Quadratic().fit(seen, space),
                Quadratic(likelihood="gaussian").fit(seen, space),
            )
        ]
        worst.append(errors)
    ours, theirs = (math.sqrt(sum(column)) for column in zip(*worst, strict=True))
    assert ours < theirs
