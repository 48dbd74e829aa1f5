from __future__ import annotations

from typing import cast

import pytest
import torch
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.processes import marginal
from map_bo.surrogates.processes.gp import GP, GPModel, MetricGP
from map_bo.surrogates.processes.kernels import TrendRBFKernel, squared_exponential
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.surrogate_contract import LeaveOneOutContract, mixed_observations, moments


class TestGP(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return GP()


def box(d: int, lower: float = 0.0, upper: float = 1.0) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)], lower=lower, upper=upper)


def smooth(n: int, d: int, *, noise: float = 0.0, scale: float = 1.0) -> Observations:
    generator = make_generator(n)
    X = torch.rand(n, d, generator=generator, dtype=torch.float64)
    y = torch.sin(4 * X).sum(-1, keepdim=True)
    y = y + noise * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    Yvar = torch.full_like(y, (noise * scale) ** 2) if noise else None
    return Observations(
        X=X, Y=scale * y, metrics=(Metric("score", kind="unbounded"),), Yvar=cast(Tensor, Yvar)
    )


def without(process: MetricGP, row: int) -> MetricGP:
    """The same process, hyperparameters held, with a row fewer."""
    rest = torch.arange(len(process.train_targets)) != row
    return MetricGP(
        process.train_inputs[0][rest],
        process.train_targets[rest],
        process.likelihood.noise[rest],
        kernel=cast(TrendRBFKernel, process.covar_module),
        mean=float(process.mean_module.constant),
        metric=process.metric,
        link=process.link,
        misfit=process.misfit,
        jitter=process.jitter,
        note=None,
    )


def test_leave_one_out_is_a_literal_refit_at_fixed_hyperparameters() -> None:
    seen, space = mixed_observations(9)
    model = GP().fit(seen, space)
    mean, variance = model.leave_one_out()
    with torch.no_grad():
        for i in range(len(seen)):
            refit = GPModel(*[without(process, i) for process in model.processes])
            expected = moments(refit, seen.X[i : i + 1])
            torch.testing.assert_close(mean[i], expected[0][0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(variance[i], expected[1][0], rtol=1e-4, atol=1e-7)


def test_box_of_the_space_scales_the_inputs() -> None:
    seen = smooth(12, 2)
    wide = Observations(X=10 * seen.X - 5, Y=seen.Y, metrics=seen.metrics)
    X = torch.rand(5, 2, generator=make_generator(1), dtype=torch.float64)
    narrow_mean, narrow_variance = moments(GP().fit(seen, box(2)), X)
    wide_mean, wide_variance = moments(GP().fit(wide, box(2, -5.0, 5.0)), 10 * X - 5)
    torch.testing.assert_close(wide_mean, narrow_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wide_variance, narrow_variance, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6, 1e12])
def test_unit_of_a_metric_does_not_matter(scale: float) -> None:
    X = torch.rand(5, 2, generator=make_generator(1), dtype=torch.float64)
    one = predict(GP().fit(smooth(12, 2, noise=0.1), box(2)), X)
    other = predict(GP().fit(smooth(12, 2, noise=0.1, scale=scale), box(2)), X)
    torch.testing.assert_close(other.mean / scale, one.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.std / scale, one.std, rtol=1e-4, atol=1e-6)


def test_noise_is_known_or_fitted() -> None:
    seen, space = mixed_observations()
    model = GP().fit(seen, space)
    misfit = model.misfit_variance()
    assert misfit.shape == (3,)
    # Counted and given variances are known; the third metric's is not.
    assert float(misfit[0]) > 0
    assert float(misfit[1]) > 0
    assert float(misfit[2]) == 0
    noise = model.training_targets()[1]
    assert float(noise[:, 0].std()) > 0
    torch.testing.assert_close(noise[:, 2], noise[:1, 2].expand(len(seen)))


def test_noisier_rows_count_for_less() -> None:
    seen = smooth(10, 1, noise=0.05)
    loud = seen.Yvar.clone()
    loud[0] = 25.0
    Y = seen.Y.clone()
    Y[0] += 5.0
    seen = Observations(X=seen.X, Y=Y, metrics=seen.metrics, Yvar=loud)
    with torch.no_grad():
        fitted = GP().fit(seen, box(1)).link_mean(seen.X)
    assert float((fitted[0] - Y[0]).abs()) > 4.0
    assert float((fitted[1:] - Y[1:]).abs().max()) < 0.3


def test_failed_search_leaves_a_note_and_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, space = mixed_observations()
    assert GP().fit(seen, space).notes == (None, None, None)
    monkeypatch.setattr(marginal, "negative_log_posterior", lambda *_: None)
    model = GP().fit(seen, space)
    assert all(note is not None and "priors" in note for note in model.notes)
    assert bool(torch.isfinite(moments(model, seen.X)[1]).all())


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_constant_metric(value: float) -> None:
    X = box(2).sample(5, generator=make_generator(0))
    seen = Observations(X=X, Y=torch.full((5, 1), value), metrics=(Metric("accuracy"),))
    prediction = predict(GP().fit(seen, box(2)), X)
    torch.testing.assert_close(prediction.mean, seen.Y, rtol=0, atol=1e-3)


def test_repeated_points_and_as_few_as_two() -> None:
    seen = smooth(2, 3)
    assert bool(torch.isfinite(moments(GP().fit(seen, box(3)), seen.X)[0]).all())
    twice = seen.append(seen).append(seen)
    mean, variance = moments(GP().fit(twice, box(3)), twice.X)
    assert bool(torch.isfinite(mean).all())
    assert bool((variance > 0).all())


def test_one_evaluation_is_too_few() -> None:
    with pytest.raises(SurrogateError, match="1 of 1 evaluations succeeded") as caught:
        GP().fit(smooth(1, 2), box(2))
    assert caught.value.hint is not None


def test_unknown_link_is_refused() -> None:
    with pytest.raises(SurrogateError, match="no link kind 'probit'"):
        GP(link="probit")  # type: ignore[arg-type]


def test_identity_link_fits_the_metric_itself() -> None:
    seen, space = mixed_observations()
    targets = GP(link="identity").fit(seen, space).training_targets()[0]
    torch.testing.assert_close(targets, seen.Y)


def test_conditioning_is_a_fit_to_all_rows_at_fixed_hyperparameters() -> None:
    seen, space = mixed_observations(10)
    model = GP().fit(seen, space)
    full = model.training_targets()
    shorter = GPModel(*[without(process, 9) for process in model.processes])
    more = shorter.condition_on_observations(seen.X[9:], full[0][9:], full[1][9:])
    X = space.sample(5, generator=make_generator(4))
    with torch.no_grad():
        torch.testing.assert_close(more.link_mean(X), model.link_mean(X), rtol=1e-5, atol=1e-6)
        for got, expected in zip(moments(more, X), moments(model, X), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # Without a noise of their own the new rows are as noisy as the old ones on average.
    assert more.metrics == model.metrics
    typical = shorter.condition_on_observations(seen.X[9:], full[0][9:])
    assert bool((moments(typical, seen.X[9:])[1] < moments(shorter, seen.X[9:])[1]).all())


def test_fantasies_keep_metrics_and_shapes() -> None:
    seen, space = mixed_observations(8)
    model = GP().fit(seen, space)
    X = space.sample(2, generator=make_generator(3))
    sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
    fantasies = model.fantasize(X, sampler)
    assert isinstance(fantasies, GPModel)
    assert fantasies.metrics == model.metrics
    with torch.no_grad():
        mean, variance = moments(fantasies, X)
        assert mean.shape == (4, 2, 3)
        assert bool((variance < moments(model, X)[1]).all())
        torch.testing.assert_close(fantasies.link_mean(X), mean)


def test_intervals_cover_a_truth_that_is_a_gaussian_process() -> None:
    inside = []
    for seed in range(12):
        generator = make_generator(seed)
        X = torch.rand(60, 2, generator=generator, dtype=torch.float64)
        K = squared_exponential(X, X, torch.tensor([0.4, 0.7], dtype=torch.float64))
        root = torch.linalg.cholesky(K + 1e-8 * torch.eye(60))
        f = root @ torch.randn(60, 1, generator=generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(20, 1, generator=generator, dtype=torch.float64)
        seen = Observations(
            X=X[:20],
            Y=f[:20] + noise,
            metrics=(Metric("score", kind="unbounded"),),
            Yvar=torch.full((20, 1), 0.01),
        )
        prediction = predict(GP().fit(seen, box(2)), X[20:])
        inside.append(((prediction.lower <= f[20:]) & (f[20:] <= prediction.upper)).double())
    assert 0.85 <= float(torch.stack(inside).mean()) <= 0.995
