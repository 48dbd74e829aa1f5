"""Noise that rows have in common, in every surrogate and in what looks through them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.sampling.normal import SobolQMCNormalSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations, Resampling
from map_bo.loop.posterior.front_posterior import expected_optimism
from map_bo.loop.posterior.joint_posterior import real_draws
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.posterior.driven import PosteriorDriven
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.posterior.hypervolume import QLogNEHVI
from map_bo.samplers.posterior.scalarised import HypervolumeScalarised
from map_bo.samplers.posterior.thompson import ThompsonFronts
from map_bo.samplers.posterior.variance import IntegratedVariance
from map_bo.samplers.published.bins import Bins
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.features import group_sizes, space_features, space_groups
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.links import as_fitted, covariance_on_link, links_for, observed_on_link
from map_bo.surrogates.outliers import Screened
from map_bo.surrogates.prediction import objective
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.sparse import Sparse
from map_bo.surrogates.quadratic import Quadratic, QuadraticModel, noise_on_link
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, noise_covariance, validate

SPACE = CoefficientSpace.box(("a", "b"))
METRICS = (Metric("right"), Metric("loss", "min", "loss"), Metric("score", kind="unbounded"))
SURROGATES = [Quadratic(), GP(), Hybrid(), Sparse(taus=(0.1,)), Auto()]
EVERY = pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)


def examples_noise(n: int, seed: int, size: float = 0.02) -> Tensor:
    """Return covariances of three metrics: much in common, and unequal variances."""
    generator = make_generator(seed)
    own = size**2 * (0.3 + torch.rand(3, n, generator=generator, dtype=torch.float64))
    shared = torch.rand(3, n, 2, generator=generator, dtype=torch.float64) + 0.5
    return torch.diag_embed(own) + size**2 * shared @ shared.mT


def noisy(n: int = 12, seed: int = 0) -> Observations:
    """Return evaluations of a proportion, a loss and a score whose noise has a covariance."""
    X = SPACE.sample(n, generator=make_generator(seed))
    C = examples_noise(n, seed + 1)
    normal = torch.randn(3, n, 1, generator=make_generator(seed + 2), dtype=torch.float64)
    noise = (torch.linalg.cholesky(C) @ normal).squeeze(-1).mT
    right = torch.sigmoid(1 - 2 * (X[:, 0] - 0.6).square() + X[:, 1] * X[:, 0])
    loss = 0.5 + (X[:, 1] - 0.3).square() + 0.2 * X[:, 0]
    score = 1 + X[:, 0] - X[:, 1].square()
    Y = torch.stack([right, loss, score], -1) + noise
    return Observations(X, Y, METRICS, Yvar=C.diagonal(dim1=-1, dim2=-2).mT, covariance=C)


def points() -> Tensor:
    return SPACE.sample(5, generator=make_generator(77))


def said(model: SurrogateModel, X: Tensor) -> list[Tensor]:
    """Return what a model says at ``X`` and of its rows."""
    assert isinstance(model, LeavesOneOut)
    with torch.no_grad():
        return [*model.joint(X), *model.leave_one_out(), *model.training_targets()]


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float, atol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


# ------------------------------------------------------------------ invariances


@EVERY
def test_a_diagonal_covariance_is_independent_noise(surrogate: Surrogate) -> None:
    seen = noisy()
    assert seen.covariance is not None
    diagonal = torch.diag_embed(seen.Yvar.mT)
    plain = dataclasses.replace(seen, covariance=None)
    found = said(surrogate.fit(dataclasses.replace(seen, covariance=diagonal), SPACE), points())
    assert_same(found, said(surrogate.fit(plain, SPACE), points()), 1e-6, 1e-9)
    full = said(surrogate.fit(seen, SPACE), points())
    assert float((full[0] - found[0]).abs().max()) > 1e-4  # and noise in common is something else


@EVERY
def test_order_of_rows_does_not_matter(surrogate: Surrogate) -> None:
    seen = noisy(9)
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    one, other = (surrogate.fit(rows, SPACE) for rows in (seen, seen.select(order)))
    first, second = said(one, points()), said(other, points())
    assert_same(second[:2], first[:2], 1e-4, 1e-5)
    assert_same(second[2:], [rows[order] for rows in first[2:]], 1e-3, 1e-4)


@settings(max_examples=5, deadline=None)
@given(power=st.integers(-6, 6), surrogate=st.sampled_from([Quadratic(), GP()]))
def test_the_unit_of_a_metric_does_not_matter(power: int, surrogate: Surrogate) -> None:
    seen = noisy(9).columns([2], torch.ones(9, dtype=torch.bool))
    assert seen.covariance is not None
    unit = 10.0**power
    scaled = dataclasses.replace(
        seen, Y=unit * seen.Y, Yvar=unit**2 * seen.Yvar, covariance=unit**2 * seen.covariance
    )
    mean, joint, *_ = said(surrogate.fit(seen, SPACE), points())
    other_mean, other_joint, *_ = said(surrogate.fit(scaled, SPACE), points())
    torch.testing.assert_close(other_mean / unit, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_joint / unit**2, joint, rtol=1e-4, atol=1e-8)


@EVERY
def test_partial_rows_have_the_noise_of_the_rows_that_have_the_metric(
    surrogate: Surrogate,
) -> None:
    seen = noisy(10)
    lacking = torch.zeros_like(seen.measured)
    lacking[2, 0] = lacking[5, 0] = lacking[7, 2] = True
    partial = seen.without(lacking, "not measured")
    assert partial.covariance is not None
    assert not bool(partial.covariance[0, 2].any())
    assert bool(partial.covariance[1].all())
    model = surrogate.fit(partial, SPACE)
    found = said(model, points())
    for j, metric in enumerate(METRICS):
        alone = said(surrogate.fit(partial.of(metric.name), SPACE), points())
        torch.testing.assert_close(found[0][:, j], alone[0][:, 0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found[1][j], alone[1][0], rtol=1e-4, atol=1e-9)
        there = ~lacking[:, j]
        torch.testing.assert_close(found[2][there, j], alone[2][:, 0], rtol=1e-5, atol=1e-7)
        assert bool(found[2][~there, j].isnan().all())
    matrix = noise_covariance(model)
    assert matrix is not None
    there = ~lacking.mT
    assert torch.equal(~matrix.isnan(), there.unsqueeze(-1) & there.unsqueeze(-2))


# ------------------------------------------------------------------ exactness


def quadratic_parts(model: QuadraticModel, seen: Observations) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets, prior covariance and noise of each metric's rows, ``m x n (x n)``."""
    links = links_for(seen.metrics)
    fitted = as_fitted(seen)
    targets = observed_on_link(fitted, links)[0].mT - model.shift.unsqueeze(-1)
    noise = noise_on_link(fitted, links, SPACE)
    assert noise is not None
    squared = model.scale.square()[:, None, None]
    Phi = space_features(seen.X, SPACE)
    prior = model.log_variances[:, 1:].exp()[:, space_groups(SPACE)]
    K = (Phi * prior.unsqueeze(-2)) @ Phi.mT * squared
    nugget = model.log_variances[:, 0].exp()[:, None, None] * squared
    return targets, K, noise + nugget * torch.eye(len(seen)).double()


@pytest.mark.parametrize("n", [5, 12])  # fewer rows than features, and more
def test_the_quadratic_is_the_dense_gaussian(n: int) -> None:
    seen, X = noisy(n), points()
    model = Quadratic().fit(seen, SPACE)
    targets, K, N = quadratic_parts(model, seen)
    prior = model.log_variances[:, 1:].exp()[:, space_groups(SPACE)]
    prior = prior * model.scale.square().unsqueeze(-1)
    mean, joint = model.joint(X)
    loo_mean, loo_variance = model.leave_one_out()
    fitted, own = model.training_targets()
    for j in range(3):
        phi, Phi = space_features(X, SPACE), space_features(seen.X, SPACE)
        cross = (phi * prior[j]) @ Phi.mT
        whole = K[j] + N[j]
        expected = model.shift[j] + cross @ torch.linalg.solve(whole, targets[j])
        torch.testing.assert_close(mean[:, j], expected, rtol=1e-8, atol=1e-8)
        spread = (phi * prior[j]) @ phi.mT - cross @ torch.linalg.solve(whole, cross.mT)
        torch.testing.assert_close(joint[j], spread, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(fitted[:, j], targets[j] + model.shift[j])
        for i in range(n):
            rest = torch.arange(n) != i
            weights = torch.linalg.solve(whole[rest][:, rest], whole[rest, i])
            told = model.shift[j] + weights @ targets[j, rest]
            torch.testing.assert_close(loo_mean[i, j], told, rtol=1e-6, atol=1e-7)
            total = whole[i, i] - weights @ whole[rest, i]
            torch.testing.assert_close(loo_variance[i, j] + own[i, j], total, rtol=1e-6, atol=1e-9)
            alone = N[j, i, i] - N[j, i, rest] @ torch.linalg.solve(
                N[j][rest][:, rest], N[j, rest, i]
            )
            torch.testing.assert_close(own[i, j], alone, rtol=1e-6, atol=1e-10)
    matrix = noise_covariance(model)
    assert matrix is not None
    torch.testing.assert_close(matrix, N)


def test_the_quadratic_is_fitted_at_the_mode_of_the_dense_evidence() -> None:
    seen = noisy()
    model = Quadratic().fit(seen, SPACE)
    targets, _, _ = quadratic_parts(model, seen)
    noise = noise_on_link(as_fitted(seen), links_for(METRICS), SPACE)
    assert noise is not None
    y = targets / model.scale.unsqueeze(-1)
    C = noise / model.scale.square()[:, None, None]
    Phi = space_features(seen.X, SPACE)
    groups, sizes = space_groups(SPACE), group_sizes(SPACE)
    hyper = Quadratic()._hyperprior(torch.zeros(3, dtype=torch.bool), sizes)

    def cost(theta: Tensor) -> Tensor:
        K = (Phi * theta[:, 1:].exp()[:, groups].unsqueeze(-2)) @ Phi.mT + C
        K = K + theta[:, 0].exp()[:, None, None] * torch.eye(len(seen)).double()
        fit = (y * torch.linalg.solve(K, y.unsqueeze(-1)).squeeze(-1)).sum(-1)
        away = ((theta - hyper.mean) / hyper.spread).square().sum(-1)
        total: Tensor = 0.5 * (fit + torch.logdet(K) + away).sum()
        return total

    slope = cast(Tensor, torch.func.grad(cost)(model.log_variances))
    inside = (model.log_variances > -15.9) & (model.log_variances < 9.9)
    assert float(slope[inside].abs().max()) < 1e-5


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**4), st.integers(1, 3))
def test_a_conditioned_quadratic_is_the_dense_posterior(seed: int, q: int) -> None:
    seen = noisy(8, seed % 50)
    model = Quadratic().fit(seen, SPACE)
    generator = make_generator(seed)
    more = SPACE.sample(q, generator=generator)
    Y = torch.randn(q, 3, generator=generator, dtype=torch.float64)
    noise = 0.01 + torch.rand(q, 3, generator=generator, dtype=torch.float64)
    X = points()
    grown = model.condition_on_observations(more, Y, noise=noise)
    targets, _, N = quadratic_parts(model, seen)
    Phi = space_features(torch.cat([seen.X, more]), SPACE)
    prior = model.log_variances[:, 1:].exp()[:, space_groups(SPACE)]
    prior = prior * model.scale.square().unsqueeze(-1)
    for j in range(3):
        matrix = torch.zeros(8 + q, 8 + q).double()
        matrix[:8, :8], matrix[8:, 8:] = N[j], torch.diag(noise[:, j])
        target = torch.cat([targets[j], Y[:, j] - model.shift[j]])
        K = (Phi * prior[j]) @ Phi.mT + matrix
        cross = (space_features(X, SPACE) * prior[j]) @ Phi.mT
        expected = model.shift[j] + cross @ torch.linalg.solve(K, target)
        torch.testing.assert_close(grown.link_mean(X)[:, j], expected, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------ what it is for


def shifted(n: int = 14, common: float = 1.0, own: float = 0.01) -> Observations:
    """Return evaluations that all err by the same large amount, and each by a little."""
    X = SPACE.sample(n, generator=make_generator(3))
    truth = 1 + X[:, :1] - X[:, 1:] * X[:, :1]
    normal = torch.randn(n, 1, generator=make_generator(4), dtype=torch.float64)
    Y = truth + 0.8 * common + own * normal
    C = common**2 * torch.ones(n, n).double() + own**2 * torch.eye(n).double()
    return Observations(
        X,
        Y,
        (Metric("score", kind="unbounded"),),
        Yvar=C.diagonal().unsqueeze(-1),
        covariance=C.unsqueeze(0),
    )


@pytest.mark.parametrize("surrogate", [Quadratic(), GP(), Hybrid()], ids=repr)
def test_what_all_rows_err_by_leaves_contrasts_sharp(surrogate: Surrogate) -> None:
    """The level is known to about the common error only, as far as the prior allows at all."""
    seen = shifted()
    model = surrogate.fit(seen, SPACE)
    X = points()
    with torch.no_grad():
        _, joint = model.joint(X)
        independent = surrogate.fit(dataclasses.replace(seen, covariance=None), SPACE)
        _, blurred = independent.joint(X)
    difference = torch.tensor([1.0, -1.0, 0, 0, 0]).double()
    contrast = float((difference @ joint[0] @ difference).sqrt())
    level = float(joint[0].mean().sqrt())
    assert contrast < 0.05
    assert level > 5 * contrast
    assert float((difference @ blurred[0] @ difference).sqrt()) > 3 * contrast
    truth = X[:, 0] - X[:, 1] * X[:, 0]
    found = model.link_mean(X)[:, 0].detach()
    assert float(((found - found.mean()) - (truth - truth.mean())).abs().max()) < 0.05
    # Left-out rows are predicted with what the others tell of the common error.
    assert isinstance(model, LeavesOneOut)
    mean, latent = model.leave_one_out()
    targets, own = model.training_targets()
    assert float((mean - targets).abs().max()) < 0.1
    assert float((latent + own).max()) < 0.05
    checked = validate(model)
    assert checked.coverage[0] > 0.7


def test_levels_are_known_to_the_variance_of_the_common_error() -> None:
    """With a wide prior the level's variance is the common one's, and contrasts have none of it."""
    seen = shifted(common=0.1, own=0.001)
    model = Quadratic().fit(seen, SPACE)
    _, joint = model.joint(points())
    assert 0.3 < float(joint[0].mean().sqrt()) / 0.1 < 1.05


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_outliers_are_judged_beside_the_common_error(surrogate: Surrogate) -> None:
    seen = shifted(16)
    screened = Screened(surrogate)
    assert screened.screen(seen, SPACE).outliers == ()
    Y = seen.Y.clone()
    Y[6] += 3.0  # three times the common error, and hundreds of times what differs
    found = screened.screen(dataclasses.replace(seen, Y=Y), SPACE)
    assert [one.row for one in found.outliers] == [6]
    assert abs(found.outliers[0].expected - float(seen.Y[6, 0])) < 0.3
    assert found.kept.covariance is not None
    assert not bool(found.kept.covariance[0, 6].any())


def test_counts_and_shares_play_no_part_beside_a_covariance() -> None:
    seen = noisy()
    counted = dataclasses.replace(
        seen,
        counts=torch.full_like(seen.Y, 50.0),
        metrics=tuple(dataclasses.replace(one, resampling="same") for one in METRICS),
    )
    fitted = as_fitted(counted)
    assert bool(fitted.counts.isnan().all())
    torch.testing.assert_close(fitted.Yvar, seen.Yvar)
    first = said(Quadratic().fit(seen, SPACE), points())
    assert_same(said(Quadratic().fit(counted, SPACE), points()), first, 0.0, 0.0)


def test_unknown_noise_of_some_rows_stays_unknown() -> None:
    """Rows that joined without a covariance have the variances they state, counts among them."""
    seen = noisy(6)
    more = Observations(
        SPACE.sample(3, generator=make_generator(8)),
        torch.tensor([[0.6, 0.7, 1.1], [0.7, 0.6, 1.2], [0.5, 0.8, 1.4]]),
        METRICS,
        counts=torch.tensor([[100.0, math.nan, math.nan]] * 3),
    )
    fitted = as_fitted(seen.append(more))
    p = (0.6 * 100 + 0.5) / 101
    assert float(fitted.Yvar[6, 0]) == pytest.approx(p * (1 - p) / 101)
    assert bool(fitted.Yvar[6:, 1:].isnan().all())
    for surrogate in (Quadratic(), GP()):
        model = surrogate.fit(seen.append(more), SPACE)
        misfit = model.misfit_variance()
        assert float(misfit[0]) > 0
        assert not bool(misfit[1:].any())


def test_a_matrix_that_is_no_covariance_is_made_one() -> None:
    seen = noisy(4).of("score")
    assert seen.covariance is not None
    C = seen.covariance.clone()
    C[0, 0, 1] = C[0, 1, 0] = 3 * float(C[0].max())
    broken = dataclasses.replace(seen, covariance=C)
    found = covariance_on_link(broken, links_for(broken.metrics))
    assert found is not None
    assert float(torch.linalg.eigvalsh(found).min()) > -1e-12 * float(found.max())
    model = GP().fit(broken, SPACE)
    with torch.no_grad():
        assert bool(model.link_mean(points()).isfinite().all())


def test_covariances_go_through_links_by_the_delta_method() -> None:
    seen = noisy()
    links = links_for(METRICS)
    Z, variance = observed_on_link(as_fitted(seen), links)
    found = covariance_on_link(as_fitted(seen), links)
    assert found is not None
    assert seen.covariance is not None
    torch.testing.assert_close(found.diagonal(dim1=-1, dim2=-2).mT, variance)
    p, loss = seen.Y[:, 0], seen.Y[:, 1]
    torch.testing.assert_close(
        found[0, 2, 5], seen.covariance[0, 2, 5] / (p[2] * (1 - p[2]) * p[5] * (1 - p[5]))
    )
    torch.testing.assert_close(found[1, 2, 5], seen.covariance[1, 2, 5] / (loss[2] * loss[5]))
    torch.testing.assert_close(found[2], seen.covariance[2])
    assert covariance_on_link(dataclasses.replace(seen, covariance=None), links) is None
    assert Z.shape == variance.shape


def test_slopes_are_those_of_a_first_fit_with_independent_noise() -> None:
    seen = noisy()
    links = links_for(METRICS)
    at = Quadratic().fit(dataclasses.replace(seen, covariance=None), SPACE).link_mean(seen.X)
    found = noise_on_link(as_fitted(seen), links, SPACE)
    assert found is not None
    assert seen.covariance is not None
    for j, link in enumerate(links):
        slope = link.slope(at[:, j])
        if j == 0:  # the variance of a proportion goes with the slope of the logit
            slope = (slope * link.slope(link.forward(seen.Y[:, j]))).sqrt()
        expected = seen.covariance[j] / (slope * slope.unsqueeze(-1))
        torch.testing.assert_close(found[j], expected, rtol=1e-6, atol=1e-12)
    diagonal = dataclasses.replace(seen, covariance=torch.diag_embed(seen.Yvar.mT))
    independent = noise_on_link(diagonal, links, SPACE)
    assert independent is not None
    variance = observed_on_link(seen, links)[1]
    torch.testing.assert_close(independent, torch.diag_embed(variance.mT))


@pytest.mark.parametrize("surrogate", [Quadratic(), GP(), Hybrid()], ids=repr)
def test_a_fit_does_not_leave_the_data_for_a_common_error(surrogate: Surrogate) -> None:
    """Slopes at the observed values make the smallest ones err most, and all of them too small."""
    X = SPACE.sample(12, generator=make_generator(0))
    y = torch.tensor([0.8, 1.25, 1.0, 0.85, 1.2, 1.0] * 2).double()
    C = 0.5**2 * torch.ones(12, 12).double() + 0.05**2 * torch.eye(12).double()
    naive = torch.linalg.solve(C / (y * y.unsqueeze(-1)), torch.ones(12).double())
    level = naive @ y.log() / naive.sum()
    assert not float(y.log().min()) < float(level) < float(y.log().max())
    metrics = (Metric("loss", "min", "loss"),)
    seen = Observations(
        X, y.unsqueeze(-1), metrics, Yvar=C.diagonal().unsqueeze(-1), covariance=C.unsqueeze(0)
    )
    with torch.no_grad():
        found = surrogate.fit(seen, SPACE).link_mean(X)
    assert float(y.log().min()) < float(found.mean()) < float(y.log().max())


def test_many_coefficients_are_smoothed_by_a_plane() -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(36)])
    X = space.sample(10, generator=make_generator(0))
    C = examples_noise(10, 1)[:1]
    Y = torch.sigmoid(X[:, :1] + 0.5)
    seen = Observations(X, Y, METRICS[:1], Yvar=C[0].diagonal().unsqueeze(-1), covariance=C)
    found = noise_on_link(seen, links_for(METRICS[:1]), space)
    assert found is not None
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    slope = (C[0].diagonal() / found[0].diagonal()).sqrt()
    assert bool((slope < 0.2501).all() & (slope > 0.05).all())


# ------------------------------------------------------------------ what looks through them


def gradients_of(seen: Observations) -> Observations:
    return dataclasses.replace(
        seen,
        gradients=torch.randn(len(seen), 3, 2, generator=make_generator(1), dtype=torch.float64),
        gradient_variance=torch.full((len(seen), 3, 2), 0.01).double(),
    )


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_metrics_with_gradients_take_the_diagonal(surrogate: Surrogate) -> None:
    seen = gradients_of(noisy(4))
    plain = dataclasses.replace(seen, covariance=None)
    found = said(surrogate.fit(seen, SPACE), points())
    assert_same(found, said(surrogate.fit(plain, SPACE), points()), 1e-9, 1e-12)
    # One of the metrics alone has gradients: the others keep all of the covariance.
    some = seen.gradients
    assert some is not None
    only = dataclasses.replace(seen, gradients=some.index_fill(1, torch.tensor([1, 2]), torch.nan))
    mixed = said(surrogate.fit(only, SPACE), points())
    without = said(surrogate.fit(noisy(4), SPACE), points())
    torch.testing.assert_close(mixed[0][:, 0], found[0][:, 0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mixed[0][:, 1:], without[0][:, 1:], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_acquisitions_of_botorch_run(surrogate: Surrogate) -> None:
    seen = noisy()
    model = surrogate.fit(seen, SPACE)
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        model=model,
        ref_point=[0.0, -2.0, 0.0],
        X_baseline=seen.X[:4],
        sampler=SobolQMCNormalSampler(torch.Size([8]), seed=1),
        objective=objective(model),
        X_pending=seen.X[:1] * 0.9,
    )
    X = points().unsqueeze(1).requires_grad_(True)
    value = acquisition(X)
    (slope,) = torch.autograd.grad(value.sum(), X)
    assert bool(value.isfinite().all())
    assert bool(slope.isfinite().all())


def test_informed_models_keep_it() -> None:
    seen = noisy()
    known = {"score": noisy(5, 9).of("score")}
    informed = Informed(Quadratic(), SPACE, torch.eye(2).double(), known)
    model = informed.fit(seen, SPACE)
    matrix = noise_covariance(model)
    assert matrix is not None
    assert matrix.shape == (3, 12, 12)
    nugget = model.misfit_variance()[2] * torch.eye(12).double()
    assert seen.covariance is not None
    torch.testing.assert_close(matrix[2], seen.covariance[2] + nugget)
    plain = Quadratic().fit(seen, SPACE)
    torch.testing.assert_close(model.link_mean(points())[:, 0], plain.link_mean(points())[:, 0])


@EVERY
def test_fronts_are_assessed_with_it(surrogate: Surrogate) -> None:
    """With a diagonal covariance, draws and optimism are those without one."""
    seen = noisy()
    diagonal = dataclasses.replace(seen, covariance=torch.diag_embed(seen.Yvar.mT))
    plain = dataclasses.replace(seen, covariance=None)
    X, pool = points(), SPACE.sample(6, generator=make_generator(6))
    optimism, told = [], []
    for rows in (diagonal, plain, seen):
        model = surrogate.fit(rows, SPACE)
        found = expected_optimism(model, X, seen.X, pool, generator=make_generator(0), count=32)
        assert found is not None
        optimism.append(found[0])
        drawn = real_draws(model, X, seen.X, SPACE, count=400, generator=make_generator(0))[1]
        told.append(torch.stack([drawn.mean(0), drawn.std(0)]))
    torch.testing.assert_close(optimism[0], optimism[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(told[0], told[1], rtol=0.1, atol=0.005)
    assert bool(optimism[2].isfinite().all())
    assert bool(told[2].isfinite().all())


def test_a_common_error_is_no_misfit_and_no_optimism() -> None:
    seen = shifted(common=1.0)
    model = Quadratic().fit(seen, SPACE)
    X = points()
    found = expected_optimism(model, X, seen.X, X, generator=make_generator(0))
    assert found is not None
    assert float(found[0].abs()) < 1.0
    with torch.no_grad():
        level = model.joint(seen.X)[1].mean().sqrt()
    _, known = real_draws(model, X, seen.X, SPACE, count=256, generator=make_generator(0))
    apart = known[:, 3] - known[:, 8]
    assert float(apart.std()) < 0.1 * float(level)


SMALL: dict[str, Any] = {"restarts": 2, "raw_samples": 8, "mc_samples": 4, "steps": 4}


@pytest.mark.parametrize(
    "kind",
    [
        partial(QLogNEHVI, **SMALL),
        partial(FrontUncertainty, **SMALL, preferences=8, draws=4),
        partial(FrontUncertainty, **SMALL, preferences=8, draws=4, criterion="regret"),
        partial(HypervolumeScalarised, **SMALL),
        partial(IntegratedVariance, **SMALL, targets=16),
        partial(ThompsonFronts, pool=16, rays=16, solver=GradientSolver(points=8, steps=4)),
        Bins,
    ],
)
@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=lambda one: type(one).__name__)
def test_samplers_run(
    kind: Callable[..., Bins | PosteriorDriven],
    surrogate: Surrogate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sampler = kind(surrogate=surrogate, initial=4)
    found = sampler.propose(noisy(), SPACE, 1, pending=points()[:1], generator=make_generator(0))
    assert found.shape == (1, 2)
    assert bool(SPACE.contains(found).all())
    assert not caplog.records  # the design would go on where the choice fails, and say so


def test_the_scale_has_a_range_where_only_common_noise_is_larger() -> None:
    """Base and experts that differ by less than the noise they have in common do differ."""
    space = CoefficientSpace.box(("a", "b"))
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    Y = torch.tensor([[0.1, 0.8], [0.9, 0.93], [0.5, 0.8]])
    common = 0.01 * torch.ones(2, 3, 3).double()
    own = 0.01 * torch.eye(3).double().expand(2, 3, 3)
    kinds: tuple[Resampling | None, ...] = (None, "same")
    for resampling in kinds:
        metrics = (Metric("x", resampling=resampling), Metric("y", resampling=resampling))
        for share, rangeless in ((0.0, ()), (0.1, ()), (1.0, ("y",))):
            covariance = (1 - share) * common + share * own
            Yvar = covariance.diagonal(dim1=-1, dim2=-2).mT
            seen = Observations(X, Y, metrics, Yvar=Yvar, covariance=covariance)
            assert Scale.of(seen, space).rangeless == rangeless


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_exact_values_at_a_bound_are_screened_with_a_covariance_of_nothing(
    surrogate: Surrogate,
) -> None:
    seen = noisy(12).columns([0], torch.ones(12, dtype=torch.bool))
    Y = (seen.Y + 0.2).clamp(0.5, 1.0).round(decimals=1)  # some are 1
    Y[7] = 0.4
    exact = torch.zeros(1, 12, 12)
    seen = dataclasses.replace(seen, Y=Y, Yvar=torch.zeros_like(Y), covariance=exact)
    found = Screened(surrogate).screen(seen, SPACE)
    with torch.no_grad():
        assert bool(found.model.link_mean(points()).isfinite().all())
