from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from botorch.posteriors.gpytorch import GPyTorchPosterior
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations, to_maximisation
from map_bo.loop.posterior.joint_posterior import (
    JointPosterior,
    plausible_points,
    real_draws,
    root,
    volumes,
)
from map_bo.pareto.indicators import hypervolume
from map_bo.pareto.trust import Coverage
from map_bo.rng import child, make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.links import from_link
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = (Metric("accuracy"), Metric("loss", "min", "loss"))
SURROGATES = [Quadratic(), GP(), Hybrid(), Auto()]


def data(n: int = 14, seed: int = 0, noise: float = 0.02) -> Observations:
    X = torch.cat([SPACE.anchors().X, SPACE.sample(n, generator=make_generator(seed))])[:n]
    gap = (X.unsqueeze(1) - torch.eye(2, dtype=torch.float64)).square().sum(-1)
    Y = torch.stack([torch.sigmoid(2 - 3 * gap[:, 0]), 0.2 + gap[:, 1]], -1)
    normal = torch.randn(Y.shape, generator=child(make_generator(seed), "e"), dtype=torch.float64)
    return Observations(X, Y + noise * normal, METRICS, Yvar=torch.full_like(Y, noise**2))


def grid(count: int, seed: int = 1) -> Tensor:
    return SPACE.sample(count, generator=make_generator(seed))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_draws_have_the_moments_of_the_posterior(surrogate: Surrogate) -> None:
    model, X = surrogate.fit(data(), SPACE), grid(40)
    joint = JointPosterior.of(model, X)
    F = joint.draw(4000, generator=make_generator(0))
    assert F.shape == (4000, 40, 2)
    posterior = cast(GPyTorchPosterior, model.posterior(X))
    deviation = posterior.variance.sqrt()
    assert float(((F.mean(0) - posterior.mean) / deviation).abs().max()) < 0.08
    assert float((F.std(0) / deviation - 1).abs().max()) < 0.08
    for j in range(2):
        expected = joint.covariance[j] / (deviation[:, j, None] * deviation[:, j])
        assert float((torch.corrcoef(F[:, :, j].mT) - expected).abs().max()) < 0.1


def test_more_points_than_features_are_drawn_in_silence() -> None:
    model = Quadratic().fit(data(), SPACE)
    F = JointPosterior.of(model, grid(300)).draw(16, generator=make_generator(0))
    # Six features: every draw lies in the span of the quadratics.
    phi = model.features(grid(300))
    weights = torch.linalg.lstsq(phi, F[..., 0].mT).solution
    assert float((phi @ weights - F[..., 0].mT).abs().max()) < 1e-3 * float(F[..., 0].std())


def test_a_fit_without_uncertainty_draws_its_mean() -> None:
    model = PublishedQuadratic().fit(data(), SPACE)
    values, known = real_draws(
        model, grid(10), data().X, SPACE, count=8, generator=make_generator(0)
    )
    mean = to_maximisation(predict(model, grid(10)).mean, METRICS)
    assert float((values - mean).abs().max()) < 1e-4
    assert known.shape == (8, 14, 2)


@given(q=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 100))
def test_a_root_gives_the_covariance_back(q: int, rank: int, seed: int) -> None:
    half = torch.randn(q, rank, generator=make_generator(seed), dtype=torch.float64)
    covariance = half @ half.mT
    found = root(covariance)
    size = float(covariance.diagonal().mean()) + 1e-12
    assert float((found @ found.mT - covariance).abs().max()) < 1e-5 * size


def test_an_indefinite_covariance_gets_the_root_of_its_positive_part() -> None:
    found = root(torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)))
    expected = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(found @ found.mT, expected)


def bent(n: int = 20) -> Observations:
    """What no quadratic follows, measured without noise: a large misfit."""
    X = grid(n, 3)
    wave = torch.sin(9 * X[:, :1]) * torch.cos(7 * X[:, 1:])
    metrics = (Metric("wave", kind="unbounded"),)
    return Observations(X, wave, metrics, Yvar=torch.full_like(wave, 1e-6))


def test_draws_hold_the_misfit_as_intervals_do() -> None:
    seen = bent()
    model = Quadratic().fit(seen, SPACE)
    X = grid(30, 5)
    values, known = real_draws(model, X, seen.X, SPACE, count=3000, generator=make_generator(0))
    prediction = predict(model, X)
    assert float((values.std(0) / prediction.std - 1).abs().max()) < 0.1
    assert float(((values.mean(0) - prediction.mean) / prediction.std).abs().max()) < 0.1
    # Where it was measured, the metric is known to its noise however bad the quadratic is.
    assert float((known - seen.Y).abs().max()) < 0.01
    assert float(model.misfit_variance()) > 0.05


def test_neighbours_share_their_misfit_and_strangers_do_not() -> None:
    seen = bent()
    model = Quadratic().fit(seen, SPACE)
    X = torch.tensor([[0.3, 0.3], [0.31, 0.3], [0.9, 0.9]], dtype=torch.float64)
    values, _ = real_draws(model, X, seen.X, SPACE, count=2000, generator=make_generator(0))
    correlation = torch.corrcoef(values[..., 0].mT)
    assert float(correlation[0, 1]) > 0.97
    assert float(correlation[0, 2].abs()) < 0.5


def test_a_point_that_was_evaluated_takes_the_draw_of_its_evaluation() -> None:
    seen = bent()
    model = Quadratic().fit(seen, SPACE)
    X = torch.cat([grid(2, 8), seen.X[4:5]])
    values, known = real_draws(model, X, seen.X, SPACE, count=50, generator=make_generator(0))
    assert torch.equal(values[:, 2], known[:, 4])
    assert not torch.equal(values[:, 1], known[:, 4])


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_scalarised_volumes_are_those_of_the_exact_algorithm(m: int) -> None:
    Y = torch.rand(3, 12, m, generator=make_generator(m), dtype=torch.float64)
    Y[2] -= 0.3  # some points lie behind the reference
    found = volumes(Y, generator=make_generator(0))
    exact = torch.tensor([hypervolume(y, torch.zeros(m, dtype=torch.float64)) for y in Y])
    assert float((found / exact - 1).abs().max()) < 0.12
    behind = volumes(-Y.abs(), generator=make_generator(0))
    assert bool((behind == 0).all())


def test_plausible_points_lie_in_the_space_where_it_is_covered() -> None:
    seen = data()
    coverage = Coverage.of(0.4 * seen.X, SPACE)
    front = 0.2 + 0.1 * grid(6)
    free = plausible_points(front, SPACE, None, count=200, generator=make_generator(0))
    assert torch.equal(SPACE.check(free), free)
    kept = plausible_points(front, SPACE, coverage, count=200, generator=make_generator(0))
    assert bool(coverage.trusted(kept).all())
    assert not bool(coverage.trusted(free).all())
    near = torch.cdist(free, front).amin(-1)
    assert 0.0 < float(near.median()) < 0.2


def test_a_direction_is_turned_and_a_link_is_undone() -> None:
    model = Quadratic().fit(data(), SPACE)
    joint = JointPosterior.of(model, grid(5))
    gains = joint.gains(joint.mean)
    own = from_link(joint.mean, model.links)
    assert torch.equal(gains, torch.stack([own[:, 0], -own[:, 1]], -1))
    narrow = replace(joint, covariance=0 * joint.covariance)
    drawn = narrow.draw(3, generator=make_generator(0))
    assert float((drawn - joint.mean).abs().max()) < math.sqrt(1e-290) + 1e-12


def test_the_misfit_that_rows_with_noise_in_common_tell_is_the_gaussian_conditional() -> None:
    seen = data(12)
    common = seen.Yvar.mean(0)[:, None, None] * (torch.eye(12) + 8 * torch.ones(12, 12)).double()
    seen = replace(seen, Yvar=common.diagonal(dim1=-1, dim2=-2).mT, covariance=common)
    model = Quadratic().fit(seen, SPACE)
    count = 6000
    values = real_draws(model, grid(1), seen.X, SPACE, count=count, generator=make_generator(0))[1]
    drawn = from_link(model.link_mean(seen.X), model.links)  # for its shape alone
    assert values.shape == (count, *drawn.shape)
    N, misfit = model.noise_covariance(), model.misfit_variance()
    assert N is not None
    targets, _ = model.training_targets()
    mean, spread = model.joint(seen.X)
    # f + e given the data, e being the misfit: its mean is f's, moved by what the residuals say.
    accuracy = torch.logit(values[..., 0])
    weights = misfit[0] * torch.linalg.inv(N[0])
    expected = mean[:, 0] + weights @ (targets[:, 0] - mean[:, 0])
    rest = torch.eye(12).double() - weights
    left = misfit[0] * torch.eye(12).double() - misfit[0] * weights
    total = rest @ spread[0] @ rest.mT + left
    deviation = total.diagonal().sqrt()
    assert float(((accuracy.mean(0) - expected) / deviation).abs().max()) < 0.06
    assert float((torch.cov(accuracy.mT) - total).abs().max()) < 0.06 * float(total.max())
