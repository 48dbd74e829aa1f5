from __future__ import annotations

import math

import pytest
import torch
from botorch.posteriors.posterior import Posterior
from torch import Tensor

from map_bo.data import Metric, Observations, to_maximisation
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import Link, from_link, links_for
from map_bo.surrogates.prediction import objective, predict, predicted_mean
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.quadratic_model import gaussian_posterior
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel

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


@pytest.mark.parametrize("surrogate", [Quadratic(), Hybrid()], ids=repr)
def test_intervals_reach_a_bound_that_measurements_reach(surrogate: Surrogate) -> None:
    space = CoefficientSpace.box(("a",))
    X = torch.linspace(0, 1, 15, dtype=torch.float64).unsqueeze(-1)
    share = (1.02 - 0.5 * (X - 0.6).square()).clamp(max=1.0)
    metrics = (Metric("passed"), Metric("failed", direction="min"))
    Y = (50 * torch.cat([share, 1 - share], -1)).round() / 50
    seen = Observations(X, Y, metrics, counts=torch.full_like(Y, 50.0))
    told = predict(surrogate.fit(seen, space), X, seen)
    assert bool((told.lower <= Y).all())
    assert bool((told.upper >= Y).all())
    assert float(told.upper[0, 0]) < 1.0, "where it does not, the interval ends before"


def test_a_loss_that_was_never_0_has_no_interval_from_0() -> None:
    space = CoefficientSpace.box(("a",))
    X = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(-1)
    Y = 1e-9 * (X - 0.4).square()
    for offset, reaches in ((0.0, True), (1e-9, False)):
        seen = Observations(X, torch.where(X == 0.375, 0.0, Y) + offset, (METRICS[1],))
        told = predict(Hybrid().fit(seen, space), X, seen)
        assert bool((told.lower == 0).any()) == reaches
