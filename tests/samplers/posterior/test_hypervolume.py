from __future__ import annotations

import pytest
import torch
from botorch.acquisition.multi_objective.logei import qLogExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import NondominatedPartitioning

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.rng import child_seed, make_generator
from map_bo.samplers.posterior.hypervolume import QLogEHVI
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract
from tests.samplers.posterior.test_front_uncertainty import BOX, situation


class TestQLogEHVI(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return QLogEHVI(Quadratic(), initial=5, restarts=2, raw_samples=16, mc_samples=8, steps=8)

    @pytest.fixture(params=["box", "sum"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.slow
def test_its_values_are_those_of_botorch() -> None:
    at, generator = situation(6), make_generator(1)
    ours = QLogEHVI(mc_samples=64).acquisition(at, at.taken, generator)
    zero = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        front = at.mean_gains(at.good.X)
    theirs = qLogExpectedHypervolumeImprovement(
        at.model,
        ref_point=zero,
        partitioning=NondominatedPartitioning(ref_point=zero, Y=front),
        sampler=SobolQMCNormalSampler(torch.Size([64]), seed=child_seed(generator, "noise")),
        objective=GenericMCMultiOutputObjective(at.gains()),
    )
    X = BOX.sample(30, generator=make_generator(2)).unsqueeze(1)
    with torch.no_grad():
        torch.testing.assert_close(ours(X).exp(), theirs(X).exp(), rtol=0.05, atol=2e-4)


def test_a_pending_point_joins_the_front() -> None:
    at, x = situation(1), torch.tensor([[0.55, 0.5]], dtype=torch.float64)
    sampler = QLogEHVI()
    alone = sampler.acquisition(at, at.taken, make_generator(0))(x.unsqueeze(1))
    after = sampler.acquisition(at, x, make_generator(0))(x.unsqueeze(1))
    assert float(after) < float(alone)


def test_more_than_four_metrics_are_refused_with_the_alternatives() -> None:
    metrics = tuple(Metric(f"m{i}") for i in range(5))
    seen = Observations.empty(2, metrics)
    with pytest.raises(SamplerError, match="QLogEHVI takes up to 4 metrics") as caught:
        QLogEHVI().propose(seen, BOX, 1, generator=make_generator(0))
    assert "hvs_nei" in str(caught.value.hint)


def test_one_metric_is_optimised_too() -> None:
    X = torch.cat([BOX.anchors().X, BOX.sample(10, generator=make_generator(0))])
    Y = 0.3 - (X - torch.tensor([0.3, 0.7]).double()).square().sum(-1, keepdim=True)
    seen = Observations(X, Y, (Metric("gain", kind="unbounded"),), Yvar=torch.full_like(Y, 1e-8))
    found = QLogEHVI().propose(seen, BOX, 1, generator=make_generator(0))
    assert torch.allclose(found, torch.tensor([[0.3, 0.7]]).double(), atol=0.03)
