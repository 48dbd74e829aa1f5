from __future__ import annotations

from typing import Any

import pytest
import torch
from botorch.posteriors.ensemble import EnsemblePosterior
from torch import Tensor

from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.surrogate import DescribesSelection, Surrogate, SurrogateModel, gaussian
from map_bo.surrogates.validation import LeavesOneOut
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import SurrogateContract, mixed_observations


class TestTheSmallestSurrogate(SurrogateContract):
    takes_fixed = False

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
