from __future__ import annotations

import math

import pytest
import torch
from botorch.posteriors.posterior import Posterior
from torch import Tensor

from map_bo.data import Metric, to_maximisation
from map_bo.rng import make_generator
from map_bo.surrogates.links import Link, from_link, links_for
from map_bo.surrogates.prediction import (
    holding_probability,
    objective,
    predict,
    predicted_mean,
    quantile,
)
from map_bo.surrogates.quadratic_model import gaussian_posterior
from map_bo.surrogates.surrogate import SurrogateModel

METRICS = (
    Metric("accuracy"),
    Metric("loss", kind="loss", direction="min"),
    Metric("score", kind="unbounded", direction="min"),
)


class Slopes(SurrogateModel):
    """Means ``1, 2, 3`` times the first coefficient, and a given deviation."""

    metrics: tuple[Metric, ...] = METRICS
    links: tuple[Link, ...] = links_for(METRICS)

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation
        self.asked: list[int] = []

    def link_mean(self, X: Tensor) -> Tensor:
        return X[..., :1] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def posterior(self, X: Tensor, *args: object, **kwargs: object) -> Posterior:
        self.asked.append(len(X))
        mean = self.link_mean(X).mT
        return gaussian_posterior(mean, torch.diag_embed(torch.full_like(mean, self.deviation**2)))


class Honest(Slopes):
    def misfit_variance(self) -> Tensor:
        return torch.tensor([0.0, 0.0, 16.0], dtype=torch.float64)


@pytest.fixture
def X() -> Tensor:
    return torch.rand(300, 2, generator=make_generator(0), dtype=torch.float64)


def test_moments_are_those_of_the_transformed_gaussian(X: Tensor) -> None:
    prediction = predict(Slopes(0.5), X)
    f = X[:, 0]
    torch.testing.assert_close(prediction.mean[:, 0], torch.sigmoid(f))
    # The exact deviation of a log-normal and of a Gaussian; that of the logit-normal by sampling.
    exact = (2 * f).exp() * math.sqrt((math.exp(0.25) - 1) * math.exp(0.25))
    torch.testing.assert_close(prediction.std[:, 1], exact, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(prediction.std[:, 2], torch.full_like(f, 0.5), rtol=1e-5, atol=0)
    draws = torch.randn(200_000, generator=make_generator(1), dtype=torch.float64)
    sampled = torch.sigmoid(f[0] + 0.5 * draws).std()
    torch.testing.assert_close(prediction.std[0, 0], sampled, rtol=0.01, atol=0)
    torch.testing.assert_close(
        prediction.lower[:, 1], (2 * f - 1.96 * 0.5).exp(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        prediction.upper[:, 0], torch.sigmoid(f + 1.96 * 0.5), rtol=1e-4, atol=0
    )


def test_no_variance_is_no_deviation(X: Tensor) -> None:
    prediction = predict(Slopes(0.0), X)
    assert float(prediction.std.max()) < 1e-5
    torch.testing.assert_close(prediction.lower, prediction.upper, rtol=1e-5, atol=1e-5)


def test_misfit_widens_the_intervals(X: Tensor) -> None:
    assert not Slopes(3.0).misfit_variance().any()
    plain, honest = predict(Slopes(3.0), X), predict(Honest(3.0), X)
    torch.testing.assert_close(honest.std[:, 2], torch.full_like(X[:, 0], 5.0), rtol=1e-5, atol=0)
    torch.testing.assert_close(honest.std[:, 0], plain.std[:, 0])
    assert torch.equal(honest.mean, plain.mean)


def test_many_points_are_asked_for_in_parts(X: Tensor) -> None:
    model = Slopes(1.0)
    predict(model, X)
    assert sum(model.asked) == 300
    assert max(model.asked) <= 128
    assert predict(model, X[:0]).mean.shape == (0, 3)


def test_predicted_mean_is_turned_and_differentiable(X: Tensor) -> None:
    model = Slopes(1.0)
    points = X.clone().requires_grad_(True)
    values = predicted_mean(model)(points)
    torch.testing.assert_close(to_maximisation(values.detach(), METRICS), predict(model, X).mean)
    (gradient,) = torch.autograd.grad(values[:, 1].sum(), points)
    torch.testing.assert_close(gradient[:, 0], -2 * (2 * X[:, 0]).exp())
    assert model.asked  # only by `predict`: the mean itself asks for no posterior
    assert len(model.asked) == 3


def test_objective_turns_samples_as_predicted_mean_turns_means(X: Tensor) -> None:
    model = Slopes(1.0)
    samples = torch.randn(2, 4, 5, 3, generator=make_generator(2), dtype=torch.float64)
    values = objective(model)(samples)
    assert values.shape == samples.shape
    expected = from_link(samples, model.links) * torch.tensor([1.0, -1.0, -1.0])
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(objective(model)(model.link_mean(X)), predicted_mean(model)(X))


class TestBounds:
    def test_the_probability_is_the_share_of_draws_that_keep_all_bounds(self, X: Tensor) -> None:
        model, rows = Honest(0.5), X[:5]
        bounds = {"accuracy": 0.55, "score": 1.0}, {"loss": 2.0, "accuracy": 0.7}
        found = holding_probability(model, rows, at_least=bounds[0], at_most=bounds[1])
        # 300,000 measurements: the deviation of the posterior, and the misfit of the last metric.
        deviation = torch.tensor([0.5, 0.5, math.sqrt(0.25 + 16)], dtype=torch.float64)
        draws = torch.randn(300_000, 1, 3, generator=make_generator(2), dtype=torch.float64)
        Y = from_link(model.link_mean(rows) + deviation * draws, model.links)
        kept = (Y[..., 0] >= 0.55) & (Y[..., 0] <= 0.7) & (Y[..., 1] <= 2) & (Y[..., 2] >= 1)
        torch.testing.assert_close(found, kept.double().mean(0), rtol=0, atol=0.005)
        assert float(found.max()) > 0.1

    def test_what_no_value_can_break_holds_and_what_all_break_does_not(self, X: Tensor) -> None:
        model = Slopes(5.0)
        assert bool((holding_probability(model, X) == 1).all())
        sure = holding_probability(
            model, X, at_least={"accuracy": 0.0, "loss": -1.0}, at_most={"accuracy": 1.5}
        )
        assert bool((sure == 1).all())
        assert bool((holding_probability(model, X, at_least={"score": 1e9}) == 0).all())

    def test_without_doubt_it_is_zero_or_one(self, X: Tensor) -> None:
        found = holding_probability(Slopes(0.0), X, at_least={"score": 1.5})
        torch.testing.assert_close(found, (3 * X[:, 0] >= 1.5).double())

    def test_a_bound_at_a_quantile_is_kept_with_its_probability(self, X: Tensor) -> None:
        model, z = Slopes(0.5), 1.2815515655446004
        low, high = quantile(model, X[:7], -z), quantile(model, X[:7], z)
        for row in range(7):
            for j, metric in enumerate(METRICS):
                bounds = {metric.name: float(low[row, j])}, {metric.name: float(high[row, j])}
                above = holding_probability(model, X[row : row + 1], at_least=bounds[0])
                below = holding_probability(model, X[row : row + 1], at_most=bounds[1])
                assert float(above) == pytest.approx(0.9, abs=1e-6)
                assert float(below) == pytest.approx(0.9, abs=1e-6)

    def test_more_rows_than_are_asked_for_at_once(self, X: Tensor) -> None:
        model = Slopes(0.5)
        found = holding_probability(model, X, at_least={"accuracy": 0.6})
        parts = torch.split(X, 50)
        again = torch.cat(
            [holding_probability(model, part, at_least={"accuracy": 0.6}) for part in parts]
        )
        torch.testing.assert_close(found, again)
        assert max(model.asked) < len(X)
