from __future__ import annotations

from typing import Any

import pytest
import torch
from botorch.posteriors.ensemble import EnsemblePosterior
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import DescribesSelection, Surrogate, SurrogateModel, gaussian
from map_bo.surrogates.validation import LeavesOneOut
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import SurrogateContract, mixed_observations


class TestTheSmallestSurrogate(SurrogateContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Plain()


def test_further_abilities_are_not_pretended() -> None:
    model = Plain().fit(*mixed_observations())
    assert not isinstance(model, LeavesOneOut)
    assert not isinstance(model, DescribesSelection)


def test_some_metrics_take_the_noise_that_is_theirs() -> None:
    seen, space = mixed_observations()
    whole = GP().fit(seen, space)  # a ModelListGP: noise is given for all of its outputs
    part = SurrogateModel.for_metrics(whole, [2, 0])
    X = space.sample(3, generator=make_generator(0))
    noise = torch.tensor([[0.5, 2.0]], dtype=torch.float64).expand(3, 2)
    added = (
        gaussian(part.posterior(X, observation_noise=noise)).variance - part.gaussian(X).variance
    )
    torch.testing.assert_close(added, noise)


def test_a_posterior_that_is_not_gaussian_is_refused_by_name() -> None:
    class Ensemble(SurrogateModel):
        def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> EnsemblePosterior:
            return EnsemblePosterior(X.new_zeros(4, len(X), 1))

    with pytest.raises(SurrogateError, match="a EnsemblePosterior, which is not Gaussian") as error:
        Ensemble().link_mean(torch.zeros(2, 2))
    assert "GPyTorchPosterior" in str(error.value.hint)
    model = Plain().fit(*mixed_observations())
    posterior = model.posterior(torch.zeros(1, 2, dtype=torch.float64))
    assert gaussian(posterior) is posterior


def test_draws_of_a_minimised_metric_mirror_those_of_its_negative() -> None:
    space = CoefficientSpace.box(("a", "b"))
    X = space.sample(12, generator=make_generator(0))
    Y = X.sin().sum(-1, keepdim=True)
    for surrogate in (Quadratic(), Hybrid()):
        drawn = []
        for sign, direction in ((1.0, "max"), (-1.0, "min")):
            metric = Metric("y", direction, "unbounded")  # type: ignore[arg-type]
            model = surrogate.fit(Observations(X, sign * Y, (metric,)), space)
            functions = model.sample_functions(4, generator=make_generator(1))
            drawn.append(sign * torch.cat([functions(X[:3] / 2), functions(X[3:6] / 3)], 1))
        torch.testing.assert_close(drawn[1], drawn[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("surrogate", [GP(), Hybrid(), Auto()], ids=repr)
@pytest.mark.filterwarnings("error")
def test_uncertainty_is_in_the_unit_of_the_metric(surrogate: Surrogate) -> None:
    space = CoefficientSpace.box(("a", "b"))
    X = space.sample(12, generator=make_generator(0))
    Y = X.sin() + X.flip(-1).cos()
    metrics = (Metric("x", kind="unbounded"), Metric("y", kind="unbounded"))
    at, found = space.sample(5, generator=make_generator(1)), []
    for unit in (1.0, 2.0**-40):
        model = surrogate.fit(Observations(X, unit * Y, metrics), space)
        part = SurrogateModel.for_metrics(model, [1])
        told = [model.gaussian(at), part.gaussian(at)]
        found.append([one.variance.sqrt() / unit for one in told])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=0.0)
