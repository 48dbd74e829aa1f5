from __future__ import annotations

import dataclasses
from typing import cast

import torch
from botorch.acquisition.knowledge_gradient import qKnowledgeGradient
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.objective import GenericMCObjective, ScalarizedPosteriorTransform
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.scalarization import get_chebyshev_scalarization
from torch import Tensor

from map_bo.data import to_maximisation
from map_bo.rng import make_generator
from map_bo.surrogates.features import feature_groups
from map_bo.surrogates.prediction import objective
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.quadratic_model import QuadraticModel
from tests.contracts.surrogate_contract import mixed_observations, moments


def literal(model: QuadraticModel, X: Tensor, rows: list[int], shift: Tensor) -> QuadraticModel:
    """Return the model refitted from its prior alone on the given rows, variances held."""
    groups = feature_groups(model.space.d)
    Z, noise = model.training_targets()
    scale = model.scale
    prior = model.log_variances[:, 1:].exp()[:, groups] * scale[:, None].square()
    precision = torch.diag_embed(1 / prior)
    weights = torch.zeros_like(model.weights)
    weights[:, 0] = shift
    empty = model.for_metrics(list(range(model.num_outputs)))
    empty._precision = precision
    empty._information = (precision @ weights.unsqueeze(-1)).squeeze(-1)
    return empty.condition_on_observations(X[rows], Z[rows], noise=noise[rows])


def test_leave_one_out_equals_refitting_without_the_row() -> None:
    seen, space = mixed_observations(9)
    model = Quadratic().fit(seen, space)
    mean, variance = model.leave_one_out()
    whole = literal(model, seen.X, list(range(9)), model.shift)
    torch.testing.assert_close(whole.weights, model.weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        whole.root @ whole.root.mT, model.root @ model.root.mT, rtol=1e-6, atol=1e-9
    )
    for i in range(9):
        without = literal(model, seen.X, [j for j in range(9) if j != i], model.shift)
        mean_i, variance_i = moments(without, seen.X[i : i + 1])
        torch.testing.assert_close(mean[i], mean_i[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(variance[i], variance_i[0], rtol=1e-6, atol=1e-8)


def test_conditioning_in_batches_equals_conditioning_alone() -> None:
    seen, space = mixed_observations()
    model = Quadratic().fit(seen, space)
    X = space.sample(6, generator=make_generator(2)).view(3, 2, 2)
    Y = torch.randn(4, 3, 2, 3, generator=make_generator(3), dtype=torch.float64)
    batch = model.condition_on_observations(X, Y)
    assert batch.batch_shape == (4, 3)
    new = space.sample(5, generator=make_generator(4))
    mean, variance = moments(batch, new)
    assert mean.shape == (4, 3, 5, 3)
    mean_1, variance_1 = moments(model.condition_on_observations(X[2], Y[1, 2]), new)
    torch.testing.assert_close(mean[1, 2], mean_1)
    torch.testing.assert_close(variance[1, 2], variance_1)
    assert bool((variance <= moments(model, new)[1] * (1 + 1e-9)).all())
    part = batch.for_metrics([1])
    torch.testing.assert_close(moments(part, new)[0][..., 0], mean[..., 1])


def test_small_units_keep_their_variance() -> None:
    seen, space = mixed_observations()
    tiny = dataclasses.replace(seen, Y=seen.Y * torch.tensor([1.0, 1.0, 1e-9]))
    whole = moments(Quadratic().fit(seen, space), seen.X)[1]
    variance = moments(Quadratic().fit(tiny, space), seen.X)[1]
    torch.testing.assert_close(variance[:, 2], 1e-18 * whole[:, 2], rtol=1e-4, atol=0)


def test_observation_noise_is_added_on_request() -> None:
    seen, space = mixed_observations()
    model = Quadratic().fit(seen, space)
    X = seen.X[:3]
    plain = moments(model, X)[1]
    noisy = cast(GPyTorchPosterior, model.posterior(X, observation_noise=True)).variance
    _, noise = model.training_targets()
    torch.testing.assert_close(noisy - plain, noise.median(0).values.expand(3, -1))
    given_noise = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    more = cast(GPyTorchPosterior, model.posterior(X, observation_noise=given_noise)).variance
    torch.testing.assert_close(more - plain, given_noise.expand(3, -1))


def test_posterior_takes_indices_and_transforms() -> None:
    seen, space = mixed_observations()
    model = Quadratic().fit(seen, space)
    mean, variance = moments(model, seen.X)
    some = cast(GPyTorchPosterior, model.posterior(seen.X, output_indices=[1]))
    torch.testing.assert_close(some.mean, mean[:, 1:2])
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    transform = ScalarizedPosteriorTransform(weights)
    scalar = cast(GPyTorchPosterior, model.posterior(seen.X, posterior_transform=transform))
    torch.testing.assert_close(scalar.mean[:, 0], mean @ weights)
    torch.testing.assert_close(scalar.variance[:, 0], variance @ weights.square())


def test_sampled_functions_have_the_posterior_moments() -> None:
    seen, space = mixed_observations()
    model = Quadratic().fit(seen, space)
    draws = model.sample_functions(4000, generator=make_generator(0))
    assert draws.explicit
    assert draws.weights.shape == (4000, 3, 6)
    values = draws(seen.X)
    torch.testing.assert_close(values, model.features(seen.X) @ draws.weights.mT)
    mean, variance = moments(model, seen.X)
    torch.testing.assert_close(values.var(0), variance, rtol=0.12, atol=1e-9)
    assert bool(((values.mean(0) - mean).abs() < 5 * (variance / 4000).sqrt()).all())
    again = model.sample_functions(4000, generator=make_generator(0))
    assert torch.equal(draws.weights, again.weights)


def test_other_acquisitions_run() -> None:
    seen, space = mixed_observations()
    model = Quadratic().fit(seen, space)
    turn = objective(model)
    chebyshev = get_chebyshev_scalarization(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), to_maximisation(seen.Y, seen.metrics)
    )

    def scalarised(samples: Tensor, X: Tensor | None = None) -> Tensor:
        return chebyshev(turn(samples, X), X)

    parego = qLogNoisyExpectedImprovement(
        model,
        seen.X,
        sampler=SobolQMCNormalSampler(torch.Size([8]), seed=0),
        objective=GenericMCObjective(scalarised),
        X_pending=seen.X[:2] / 2,
        cache_root=False,
    )
    X = space.sample(6, generator=make_generator(0)).view(3, 2, 2).requires_grad_(True)
    (gradient,) = torch.autograd.grad(parego(X).sum(), X)
    assert bool(torch.isfinite(gradient).all())
    gradient_of = qKnowledgeGradient(
        model,
        num_fantasies=3,
        sampler=SobolQMCNormalSampler(torch.Size([3]), seed=0),
        posterior_transform=ScalarizedPosteriorTransform(torch.ones(3, dtype=torch.float64)),
    )
    value = gradient_of(space.sample(8, generator=make_generator(1)).view(2, 4, 2))
    assert value.shape == (2,)
    assert bool(torch.isfinite(value).all())
