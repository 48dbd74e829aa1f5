"""What every surrogate keeps to; an implementation overrides `surrogate` and inherits the tests."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, cast

import pytest
import torch
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.models.model import Model
from botorch.optim.optimize import optimize_acqf
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Tensor

from map_bo.choice import handles_choice
from map_bo.data import Metric, Observations, to_maximisation
from map_bo.errors import ConfigError, SurrogateError
from map_bo.loop.settings import Settings
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import LogitLink, from_link
from map_bo.surrogates.prediction import objective, predict, predicted_mean
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel, fits_partial_rows
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out
from tests.choices import CHOICE, reordered, some_of, truth

METRICS = (
    Metric("accuracy"),
    Metric("loss", direction="min", kind="loss"),
    Metric("score", kind="unbounded"),
)

_FITTED: dict[tuple[type, str], SurrogateModel] = {}


def moments(model: SurrogateModel, X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mean and variance, ``... x q x m``."""
    posterior = cast(GPyTorchPosterior, model.posterior(X))
    return posterior.mean, posterior.variance


def mixed_observations(n: int = 14, seed: int = 0) -> tuple[Observations, CoefficientSpace]:
    """Return ``n`` evaluations of a counted proportion, a loss and an unbounded score.

    Two experts; smooth truths; the loss has a known variance and the score an unknown one.
    """
    space = CoefficientSpace.box(("a", "b"))
    generator = make_generator(seed)
    X = space.sample(n, generator=generator)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    accuracy = torch.sigmoid(1.5 - 4 * (X[:, 0] - 0.7).square() - 2 * X[:, 0] * X[:, 1])
    accuracy = (accuracy * 200 + 3 * noise[:, 0]).round().clamp(0, 200) / 200
    loss = (0.2 + (X[:, 1] - 0.4).square() + 0.5 * X[:, 0]) * (1 + 0.01 * noise[:, 1])
    score = 3 - 2 * X[:, 0] + X[:, 1] * X[:, 0] + 0.02 * noise[:, 2]
    nothing = torch.full((n,), torch.nan, dtype=torch.float64)
    seen = Observations(
        X=X,
        Y=torch.stack([accuracy, loss, score], -1),
        metrics=METRICS,
        Yvar=torch.stack([nothing, (0.01 * loss).square(), nothing], -1),
        counts=torch.stack([nothing.nan_to_num(200.0), nothing, nothing], -1),
    )
    return seen, space


class SurrogateContract:
    """Tests for any :class:`Surrogate`; override the fixture ``surrogate``."""

    takes_fixed: ClassVar[bool] = True
    """Whether it takes a space with a fixed coefficient; one made for its space may not."""

    beside_covariance: ClassVar[float] = 1e-8
    """How far noise on a diagonal leads from the same noise without a covariance, link scale."""

    @pytest.fixture
    def surrogate(self) -> Surrogate:
        raise NotImplementedError

    @pytest.fixture
    def seen(self) -> Observations:
        return mixed_observations()[0]

    @pytest.fixture
    def space(self) -> CoefficientSpace:
        return mixed_observations()[1]

    @pytest.fixture
    def model(
        self, surrogate: Surrogate, seen: Observations, space: CoefficientSpace
    ) -> SurrogateModel:
        # One fit serves all tests of a class: none of them changes the model.
        key = (type(self), repr(surrogate))
        if key not in _FITTED:
            _FITTED[key] = surrogate.fit(seen, space)
        return _FITTED[key]

    @pytest.fixture
    def X(self, space: CoefficientSpace) -> Tensor:
        return space.sample(6, generator=make_generator(99))

    def test_settings_are_a_frozen_surrogate(self, surrogate: Surrogate) -> None:
        assert isinstance(surrogate, Surrogate)
        assert dataclasses.is_dataclass(surrogate)
        names = [field.name for field in dataclasses.fields(surrogate)] or ["anything"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(surrogate, names[0], None)

    def test_model_knows_its_metrics_and_links(self, model: SurrogateModel) -> None:
        assert isinstance(model, Model)
        assert model.metrics == METRICS
        assert len(model.links) == model.num_outputs == 3
        assert isinstance(model.links[0], LogitLink)

    def test_every_metric_is_fitted_to_the_rows_that_have_it(
        self, surrogate: Surrogate, seen: Observations, space: CoefficientSpace, X: Tensor
    ) -> None:
        lacking = torch.zeros_like(seen.measured)
        lacking[2:4, 1] = lacking[4, 2] = True
        partial = seen.without(lacking, "it failed")
        if not fits_partial_rows(surrogate):
            alike = (surrogate.fit(one, space) for one in (partial, partial.succeeded()))
            both, one = (moments(model, X)[0] for model in alike)
            torch.testing.assert_close(both, one)
            return
        model = surrogate.fit(partial, space)
        for j, metric in enumerate(METRICS):
            alone = surrogate.fit(partial.of(metric.name), space)
            for both, one in zip(moments(model, X), moments(alone, X), strict=True):
                torch.testing.assert_close(both[:, j], one[:, 0], rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                mean = model.link_mean(X)[:, j]
            torch.testing.assert_close(mean, moments(model, X)[0][:, j], rtol=1e-5, atol=1e-6)
        if isinstance(model, LeavesOneOut):
            found = (*model.leave_one_out(), *model.training_targets())
            assert all(torch.equal(value.isnan(), lacking) for value in found)

    def test_posterior_has_the_shape_of_its_points(self, model: SurrogateModel, X: Tensor) -> None:
        for points in (X, X.unsqueeze(1), X.view(2, 3, 2)):
            mean, variance = moments(model, points)
            assert mean.shape == variance.shape == (*points.shape[:-1], 3)
            assert bool((variance >= 0).all())

    def test_batches_of_points_are_independent(self, model: SurrogateModel, X: Tensor) -> None:
        joint, alone = moments(model, X), moments(model, X.unsqueeze(1))
        torch.testing.assert_close(alone[0].squeeze(1), joint[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[1].squeeze(1), joint[1], rtol=1e-4, atol=1e-6)

    def test_link_mean_is_the_posterior_mean(self, model: SurrogateModel, X: Tensor) -> None:
        with torch.no_grad():
            mean = moments(model, X)[0]
            torch.testing.assert_close(model.link_mean(X), mean, rtol=1e-6, atol=1e-6)

    def test_link_mean_has_the_right_gradient(self, model: SurrogateModel, X: Tensor) -> None:
        points = X.clone().requires_grad_(True)
        assert torch.autograd.gradcheck(model.link_mean, (points,), eps=1e-5, atol=1e-4, rtol=1e-3)

    def test_posterior_is_differentiable(self, model: SurrogateModel, X: Tensor) -> None:
        points = X.clone().requires_grad_(True)
        mean, variance = moments(model, points)
        (gradient,) = torch.autograd.grad(mean.sum() + variance.sum(), points)
        assert bool(torch.isfinite(gradient).all())
        assert float(gradient.abs().max()) > 0

    @pytest.mark.slow
    def test_more_points_than_features_can_be_sampled(
        self, model: SurrogateModel, space: CoefficientSpace
    ) -> None:
        X = space.sample(40, generator=make_generator(5))
        sampler = SobolQMCNormalSampler(torch.Size([4]), seed=0)
        with torch.no_grad():
            samples = sampler(model.posterior(X))
        assert samples.shape == (4, 40, 3)
        assert bool(torch.isfinite(samples).all())

    def test_subset_of_outputs(self, model: SurrogateModel, X: Tensor) -> None:
        mean, variance = moments(model, X)
        part = cast(GPyTorchPosterior, model.subset_output([2, 0]).posterior(X))
        torch.testing.assert_close(part.mean, mean[:, [2, 0]], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part.variance, variance[:, [2, 0]], rtol=1e-5, atol=1e-8)

    def test_the_rest_of_botorch_knows_which_metrics_are_left(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        part = model.for_metrics([2, 0])
        assert part.metrics == (METRICS[2], METRICS[0])
        assert part.links == (model.links[2], model.links[0])
        assert part.num_outputs == 2
        assert part.one_metric(0).metrics == (METRICS[2],)
        mean, _ = moments(model, X)
        torch.testing.assert_close(part.link_mean(X), mean[:, [2, 0]], rtol=1e-6, atol=1e-6)
        alone = model.one_metric(1)
        assert alone.metrics == (METRICS[1],)
        torch.testing.assert_close(alone.link_mean(X), mean[:, 1:2], rtol=1e-6, atol=1e-6)

    def test_joint_is_the_posterior_metric_by_metric(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        points = X.clone().requires_grad_(True)
        mean, covariance = model.joint(points)
        assert mean.shape == (6, 3)
        assert covariance.shape == (3, 6, 6)
        with torch.no_grad():
            expected, variance = moments(model, X)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
        size = float(variance.max())
        diagonal = covariance.diagonal(dim1=-1, dim2=-2).T
        torch.testing.assert_close(diagonal, variance, rtol=1e-4, atol=1e-6 * size)
        torch.testing.assert_close(covariance, covariance.mT, rtol=1e-6, atol=1e-8 * size)
        (gradient,) = torch.autograd.grad(mean.sum() + covariance.sum(), points)
        assert bool(torch.isfinite(gradient).all())

    def test_covariances_with_points_are_those_of_the_joint_posterior(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        joint = model.joint(X)[1].detach()
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6 * float(joint.abs().max()))
        covariances = model.covariances_with(X[:4])
        close(covariances.among().detach(), joint[:, :4, :4])
        points = X[4:].clone().requires_grad_(True)
        cross, variance = covariances.to(points)
        close(cross.detach(), joint[:, 4:, :4])
        diagonal = joint.diagonal(dim1=-1, dim2=-2)[:, 4:]
        close(variance.detach(), diagonal)
        total = cross.sum() + variance.sum() + 0.0 * points.sum()  # constants are differentiable
        (gradient,) = torch.autograd.grad(total, points)
        assert bool(torch.isfinite(gradient).all())

    def test_sampled_functions_have_the_posterior_moments(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        generator = make_generator(3)
        state = generator.get_state()
        functions = model.sample_functions(3000, generator=generator)
        assert torch.equal(generator.get_state(), state)
        with torch.no_grad():
            values = functions(X[:2])
            mean, variance = moments(model, X[:2])
            again = model.sample_functions(3000, generator=make_generator(3))(X[:2])
        assert values.shape == (3000, 2, 3)
        assert torch.equal(values, again)
        error = values.mean(0) - mean
        assert bool((error.abs() < 5 * (variance / 3000).sqrt() + 1e-9).all())
        torch.testing.assert_close(values.var(0), variance, rtol=0.15, atol=1e-9)

    def test_sampled_functions_are_the_same_at_every_call(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        functions = model.sample_functions(200, generator=make_generator(3))
        with torch.no_grad():
            first, later = functions(X[:3]), functions(X)
            deviation = moments(model, X)[1].sqrt()
            covariance = model.joint(X)[1]
        assert later.shape == (200, 6, 3)
        gap = (later[:, :3] - first).abs()
        assert bool((gap < 0.01 * deviation[:3] + 1e-3).all())
        # What is asked for later belongs to the same functions: neighbours go together.
        size = covariance.diagonal(dim1=-1, dim2=-2).sqrt()
        wanted = covariance / (size.unsqueeze(-1) * size.unsqueeze(-2))
        for j in (deviation.amin(0) > 1e-3).nonzero().flatten().tolist():
            found = torch.corrcoef(torch.cat([first[:, :, j], later[:, 3:, j]], -1).T)
            assert float((found - wanted[j]).abs().max()) < 0.25

    def test_each_row_can_have_a_function_of_its_own(
        self, model: SurrogateModel, X: Tensor
    ) -> None:
        functions = model.sample_functions(4, generator=make_generator(3))
        which = torch.tensor([3, 0, 2, 2, 1, 0])
        with torch.no_grad():
            values, rows = functions(X), functions.each(X, which)
            deviation = moments(model, X)[1].sqrt()
        expected = values[which, torch.arange(6)]
        assert bool(((rows - expected).abs() < 0.01 * deviation + 1e-3).all())

    def test_explicit_functions_can_be_climbed(self, model: SurrogateModel, X: Tensor) -> None:
        functions = model.sample_functions(2, generator=make_generator(3))
        if functions.explicit:
            points = X.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(functions(points).sum(), points)
            assert float(gradient.abs().max()) > 0

    def test_misfit_is_a_variance_per_metric(self, model: SurrogateModel) -> None:
        assert model.misfit_variance().shape == (3,)
        assert bool((model.misfit_variance() >= 0).all())
        torch.testing.assert_close(
            model.for_metrics([2]).misfit_variance(), model.misfit_variance()[2:]
        )

    def test_settings_keep_what_they_promise(
        self, surrogate: Surrogate, model: SurrogateModel
    ) -> None:
        assert promises_leave_one_out(surrogate) == isinstance(model, LeavesOneOut)

    def test_refit_gives_the_same_model(
        self,
        surrogate: Surrogate,
        model: SurrogateModel,
        seen: Observations,
        space: CoefficientSpace,
        X: Tensor,
    ) -> None:
        first = moments(model, X)
        with torch.random.fork_rng(devices=[]):
            torch.rand(7)
            state = torch.random.get_rng_state()
            second = moments(surrogate.fit(seen, space), X)
            assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])

    def test_failed_rows_are_left_out(
        self,
        surrogate: Surrogate,
        model: SurrogateModel,
        seen: Observations,
        space: CoefficientSpace,
        X: Tensor,
    ) -> None:
        failed = Observations.failed(X[:2], METRICS, "out of memory")
        again = surrogate.fit(failed.append(seen), space)
        torch.testing.assert_close(again.link_mean(X), model.link_mean(X))

    def test_a_covariance_of_the_noise_is_taken(
        self, surrogate: Surrogate, seen: Observations, space: CoefficientSpace, X: Tensor
    ) -> None:
        # A diagonal one is independent noise; beside it, what was counted plays no part.
        seen = seen.select(range(9))
        unit = torch.tensor([0.02, 0.01, 0.02], dtype=torch.float64)
        plain = dataclasses.replace(
            seen,
            Yvar=unit.square().expand(len(seen), 3),
            counts=torch.full_like(seen.counts, torch.nan),
        )
        diagonal = torch.diag_embed(plain.Yvar.mT)
        expected = moments(surrogate.fit(plain, space), X)
        alone = surrogate.fit(dataclasses.replace(plain, covariance=diagonal), space)
        for one, other in zip(moments(alone, X), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=self.beside_covariance)
        common = diagonal + 4 * (unit.square())[:, None, None]
        together = dataclasses.replace(
            seen, Yvar=common.diagonal(dim1=-1, dim2=-2).mT, covariance=common
        )
        model = surrogate.fit(together, space)
        mean, variance = moments(model, X)
        assert bool(mean.isfinite().all())
        assert bool((variance >= 0).all())
        with torch.no_grad():
            torch.testing.assert_close(model.link_mean(X), mean, rtol=1e-6, atol=1e-6)
        if isinstance(model, LeavesOneOut):
            left_out, latent = model.leave_one_out()
            targets, own = model.training_targets()
            assert left_out.shape == targets.shape == seen.Y.shape
            assert bool((latent >= 0).all() & (own > 0).all())

    def test_a_fixed_coefficient_does_no_harm(
        self,
        surrogate: Surrogate,
        model: SurrogateModel,
        seen: Observations,
        space: CoefficientSpace,
        X: Tensor,
    ) -> None:
        if not self.takes_fixed:
            pytest.skip("made for spaces without a fixed coefficient")
        wider = CoefficientSpace((*space.names, "fixed"), (*space.lower, 0.4), (*space.upper, 0.4))
        still = {
            name: torch.full((len(rows), 1), 0.4).double()
            for name, rows in (("seen", seen.X), ("X", X))
        }
        gradients, noise = seen.filled_gradients()
        more = dataclasses.replace(
            seen,
            X=torch.cat([seen.X, still["seen"]], -1),
            gradients=torch.nn.functional.pad(gradients, (0, 1)),
            gradient_variance=torch.nn.functional.pad(noise, (0, 1)),
        )
        found = surrogate.fit(more, wider).link_mean(torch.cat([X, still["X"]], -1)).detach()
        expected = model.link_mean(X).detach()
        extent = expected.amax(0) - expected.amin(0)
        assert float(((found - expected).abs() / extent).max()) < 0.25

    def test_nothing_succeeded_is_an_error(
        self, surrogate: Surrogate, space: CoefficientSpace, X: Tensor
    ) -> None:
        with pytest.raises(SurrogateError, match="succeeded"):
            surrogate.fit(Observations.failed(X, METRICS, "no"), space)
        with pytest.raises(SurrogateError, match="succeeded"):
            surrogate.fit(Observations.empty(2, METRICS), space)

    def test_a_choice_is_handled_or_refused_before_anything_is_evaluated(
        self, surrogate: Surrogate
    ) -> None:
        if not handles_choice(surrogate):
            with pytest.raises(ConfigError, match="does not handle a choice"):
                Settings(budget=9, sampler=Sobol(), surrogate=surrogate).check_space(CHOICE)
            return
        seen, points = some_of(CHOICE, 24), some_of(CHOICE, 40, seed=5).X[6:]
        model = surrogate.fit(seen, CHOICE)
        with torch.no_grad():
            found = model.link_mean(points)
        error = (found - truth(points)).square().mean(0)
        assert bool((error < 0.35 * truth(points).var(0)).all())
        torch.testing.assert_close(moments(model, points)[0], found, atol=1e-6, rtol=1e-6)
        covariance = model.joint(points)[1].detach()
        assert bool((torch.linalg.eigvalsh(covariance) > -1e-6 * covariance.amax()).all())
        # What is inactive moves nothing, and no gradient leads from one option to another.
        free = points.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(model.link_mean(free).sum(), free)
        assert not bool(gradient[:, 2].any())
        assert not bool(gradient[points[:, 2] != 1, 3].any())
        assert bool(gradient[points[:, 2] == 1, 3].any())
        # Options have no order: under other codes it is the same model.
        X, other = reordered(seen.X, [2, 0, 1])
        moved = surrogate.fit(dataclasses.replace(seen, X=X), other)
        with torch.no_grad():
            again = moved.link_mean(reordered(points, [2, 0, 1])[0])
        assert float((again - found).abs().max()) < 0.02 * float(found.std())

    def test_follows_the_data_in_both_directions(
        self, model: SurrogateModel, seen: Observations
    ) -> None:
        # Better than the mean of the data at the data itself, and turned for maximisation.
        values = from_link(model.link_mean(seen.X), model.links)
        error = (values - seen.Y).square().mean(0)
        assert bool((error < 0.5 * seen.Y.var(0)).all())
        turned = predicted_mean(model)(seen.X)
        torch.testing.assert_close(turned, to_maximisation(values, METRICS))
        torch.testing.assert_close(turned[:, 1], -values[:, 1])

    def test_prediction_keeps_to_the_bounds(self, model: SurrogateModel, X: Tensor) -> None:
        prediction = predict(model, X)
        assert prediction.mean.shape == (6, 3)
        assert bool((prediction.lower <= prediction.mean).all())
        assert bool((prediction.mean <= prediction.upper).all())
        assert bool((prediction.std >= 0).all())
        assert bool((prediction.lower[:, 0] >= 0).all() & (prediction.upper[:, 0] <= 1).all())
        assert bool((prediction.lower[:, 1] >= 0).all())

    @pytest.mark.slow
    def test_noisy_hypervolume_improvement_runs(
        self, model: SurrogateModel, seen: Observations, space: CoefficientSpace
    ) -> None:
        turned = to_maximisation(seen.Y, METRICS)
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=turned.amin(0).tolist(),
            X_baseline=seen.X,
            sampler=SobolQMCNormalSampler(torch.Size([8]), seed=1),
            objective=objective(model),
            X_pending=seen.X[:1] * 0.9,
            prune_baseline=True,
        )
        best, value = optimize_acqf(
            acquisition,
            bounds=space.bounds,
            q=2,
            num_restarts=1,
            raw_samples=4,
            options={"maxiter": 3, "seed": 2},
            sequential=True,
        )
        assert best.shape == (2, 2)
        assert bool(space.contains(best).all())
        assert value is not None
        assert bool(torch.isfinite(value).all())


class LeaveOneOutContract(SurrogateContract):
    """Tests for the models that can leave one evaluation out in closed form."""

    def test_leaving_out_never_adds_certainty(
        self, model: SurrogateModel, seen: Observations
    ) -> None:
        mean, variance = model.leave_one_out()  # type: ignore[operator]
        inside_mean, inside_variance = moments(model, seen.X)
        targets, noise = model.training_targets()  # type: ignore[operator]
        assert mean.shape == variance.shape == targets.shape == noise.shape == seen.Y.shape
        assert bool((variance >= inside_variance * (1 - 1e-6) - 1e-9).all())
        assert bool((noise > 0).all())
        # Without its own row the prediction is further from it, on the whole.
        inside = (targets - inside_mean).square().mean(0)
        outside = (targets - mean).square().mean(0)
        assert bool((outside >= inside * (1 - 1e-9)).all())
