from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.sparse import Sparse, SparseModel, _HalfCauchyPrior, _process
from map_bo.surrogates.surrogate import Surrogate, gaussian
from map_bo.surrogates.validation import validate
from tests.contracts.surrogate_contract import (
    METRICS,
    LeaveOneOutContract,
    mixed_observations,
    moments,
)


class TestSparse(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Sparse()


def few_of_many(
    n: int, d: int = 20, seed: int = 0
) -> tuple[Observations, Observations, CoefficientSpace]:
    """Return evaluations of a bump in 2 of ``d`` coefficients, and others to test on."""
    space = CoefficientSpace.box(tuple(f"e{i}" for i in range(d)))
    X = space.sample(n + 200, generator=make_generator(seed))
    y = torch.sin(4 * X[:, 3]) + 2 * (X[:, 11] - 0.4).square()
    seen = Observations(X, y.unsqueeze(-1), (Metric("y", kind="unbounded"),))
    return seen.select(range(n)), seen.select(range(n, n + 200)), space


def rmse(model: SparseModel, truth: Observations) -> float:
    return float((model.link_mean(truth.X) - truth.Y).square().mean().sqrt())


def test_few_that_matter_are_found_among_many() -> None:
    seen, truth, space = few_of_many(40)
    model = Sparse().fit(seen, space)
    found = model.shrinkage()[0]
    assert set(found.topk(2).indices.tolist()) == {3, 11}
    dense = GP().fit(seen, space)
    dense_rmse = float((dense.link_mean(truth.X) - truth.Y).square().mean().sqrt())
    assert rmse(model, truth) < 0.7 * dense_rmse
    assert validate(model).coverage[0] >= 0.85


@pytest.mark.parametrize("tau", [1.0, 0.01])
def test_the_prior_is_a_density_with_the_gradient_it_says(tau: float) -> None:
    prior = _process(tau).on(2, known_noise=True)
    assert isinstance(prior, _HalfCauchyPrior)
    theta = torch.tensor([-6.0, 0.3, -0.2, 1.1, -0.7], dtype=torch.float64)
    leaf = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(prior.cost(leaf)[0], leaf)
    torch.testing.assert_close(prior.cost(theta)[1], slope)
    # Over the log lengthscale of one coefficient, all else held, it integrates to 1.
    line = torch.linspace(-40.0, 40.0, 80001, dtype=torch.float64)
    at = prior.mean.repeat(3, 1)
    at[1, -1], at[2, -1] = 5.0, -3.0
    costs = torch.stack([prior.cost(row)[0] for row in at])
    bell = -torch.log(math.pi / 2 * torch.cosh(-2 * line - math.log(tau)))
    assert float(torch.trapezoid(bell.exp(), line)) == pytest.approx(1.0, abs=1e-6)
    own = -torch.log(math.pi / 2 * torch.cosh(-2 * at[:, -1] - math.log(tau)))
    torch.testing.assert_close(costs - costs[0], own[0] - own)


def test_weights_are_a_distribution_over_the_processes_of_each_metric() -> None:
    seen, space = mixed_observations()
    model = Sparse().fit(seen, space)
    torch.testing.assert_close(model.weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert bool(((model.weights > 0).sum(0) == 1).all())
    names = [metric.name for metric in model.processes.metrics]
    for j, metric in enumerate(METRICS):
        assert {names[p] for p in model._members(j)} == {metric.name}


def test_disagreement_is_uncertainty() -> None:
    seen, space = mixed_observations(8)
    model = Sparse().fit(seen, space)
    X = space.sample(5, generator=make_generator(3))
    _, variance = moments(model, X)
    own = gaussian(model.processes.posterior(X))
    means, variances = own.mean @ model.weights.mT, own.variance @ model.weights.mT
    spread = own.mean.square() @ model.weights.mT - means.square()
    torch.testing.assert_close(variance, variances + spread, rtol=1e-3, atol=1e-6)
    assert float(spread.max()) > 0


def test_one_level_is_one_process() -> None:
    seen, space = mixed_observations()
    model = Sparse(taus=(0.1,)).fit(seen, space)
    assert model.weights.tolist() == torch.eye(3).tolist()
    X = space.sample(4, generator=make_generator(3))
    torch.testing.assert_close(model.link_mean(X), model.processes.link_mean(X))


def test_conditioning_is_felt_where_it_happened() -> None:
    seen, space = mixed_observations()
    model = Sparse().fit(seen, space)
    X = torch.tensor([[0.9, 0.9]], dtype=torch.float64)
    before, variance = moments(model, X)
    Y: Tensor = before + 1.0
    more = model.condition_on_observations(X, Y, noise=torch.full_like(Y, 1e-6))
    after, less = moments(more, X)
    torch.testing.assert_close(after, Y, atol=0.1, rtol=0.0)
    assert bool((less < 0.5 * variance).all())
    torch.testing.assert_close(more.link_mean(X), after, rtol=1e-6, atol=1e-6)


def test_importance_shortens_lengthscales_before_anything_is_seen() -> None:
    seen, _, space = few_of_many(12, d=12)
    sizes = tuple(10.0 if i in (3, 11) else 0.1 for i in range(12))
    told = CoefficientSpace(space.names, space.lower, space.upper, importance=sizes)
    truth = few_of_many(12, d=12)[1]
    knows, guesses = Sparse().fit(seen, told), Sparse().fit(seen, space)
    assert rmse(knows, truth) < 0.7 * rmse(guesses, truth)
    ignores = Sparse(importance=0.0).fit(seen, told)
    torch.testing.assert_close(ignores.link_mean(truth.X), guesses.link_mean(truth.X))


@pytest.mark.parametrize("taus", [(), (0.1, 0.0), (-1.0,), (float("nan"),)])
def test_shrinkages_are_positive(taus: tuple[float, ...]) -> None:
    with pytest.raises(SurrogateError, match="shrinkages"):
        Sparse(taus=taus)
