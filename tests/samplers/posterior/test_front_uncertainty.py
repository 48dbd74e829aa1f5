from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.pareto.indicators import preference_weights
from map_bo.rng import make_generator
from map_bo.samplers.posterior.driven import Situation
from map_bo.samplers.posterior.front_uncertainty import (
    Criterion,
    FrontUncertainty,
    PreferenceGain,
    plausible_optima,
    utility_weights,
)
from map_bo.samplers.posterior.variance import VarianceReduction
from map_bo.samplers.sampler import Sampler
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.quadratic_model import QuadraticModel
from map_bo.surrogates.surrogate import Surrogate
from tests.contracts.sampler_contract import SPACES, SamplerContract, some_seen
from tests.contracts.surrogate_contract import moments

BOX = CoefficientSpace.box(("a", "b"))
PEAKS = torch.tensor([[0.9, 0.2], [0.2, 0.8]], dtype=torch.float64)


def small(**settings: Any) -> FrontUncertainty:
    sizes: dict[str, Any] = {
        "surrogate": Quadratic(),
        "restarts": 2,
        "raw_samples": 16,
        "mc_samples": 8,
        "steps": 8,
    }
    return FrontUncertainty(**{**sizes, "preferences": 6, "draws": 2, **settings})


def bowls(X: Tensor, deviation: float = 0.02) -> Observations:
    """Two concave bowls, identity link, known noise."""
    Y = 1 - (X.unsqueeze(-2) - PEAKS).square().sum(-1)
    metrics = tuple(Metric(name, kind="unbounded") for name in ("first", "second"))
    return Observations(X, Y, metrics, Yvar=torch.full_like(Y, deviation**2))


def situation(n: int, surrogate: Surrogate | None = None) -> Situation:
    seen = bowls(torch.cat([BOX.anchors().X, BOX.sample(n, generator=make_generator(3))]))
    return Situation(
        model=(surrogate or Quadratic()).fit(seen, BOX),
        good=seen,
        space=BOX,
        taken=seen.X[:0],
        known=seen.X,
        scale=Scale(seen.metrics, torch.tensor([0.2, 0.3]), torch.tensor([0.7, 2.3]), "given"),
        generator=make_generator(0),
    )


class TestRegret(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return small(initial=5)

    @pytest.fixture(params=["box", "sum", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


class TestVarianceOverAGaussianProcess(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return small(initial=5, criterion="variance", surrogate=GP())

    @pytest.fixture
    def space(self) -> CoefficientSpace:
        return SPACES["simplex"]


@pytest.mark.parametrize("criterion", ["regret", "variance"])
def test_the_gain_is_that_of_conditioning_on_each_outcome(criterion: Criterion) -> None:
    at = situation(4)
    W = preference_weights(5, 2, generator=make_generator(1))
    targets, x = BOX.sample(7, generator=make_generator(2)), torch.tensor([[0.6, 0.4]]).double()
    z = torch.randn(6, 2, generator=make_generator(4), dtype=torch.float64)
    z = torch.cat([z, -z])
    gain: VarianceReduction = PreferenceGain(at, targets, W, z, at.taken)
    if criterion == "variance":
        gain = VarianceReduction(at, targets, utility_weights(at, targets, W), at.taken)
    value = gain(x.unsqueeze(1)).exp()

    model = cast(QuadraticModel, at.model)
    mean, deviation = moments(model, x)
    noise = gain.noise
    sd = (deviation[0] + noise).sqrt()
    drops = []
    for row in z:
        after = model.condition_on_observations(
            x, (mean[0] + sd * row).unsqueeze(0), noise=noise.unsqueeze(0)
        )
        utility = ((after.link_mean(targets) - at.scale.point) / at.unit) @ W.T
        drops.append(utility.amax(0).mean())
    before = (at.mean_gains(targets) @ W.T).amax(0).mean()
    fallen = moments(model, targets)[1] - moments(after, targets)[1]
    spread = (fallen / at.unit.square() * W.square().mean(0)).sum() / len(targets)
    expected = spread if criterion == "variance" else torch.stack(drops).mean() - before
    share = 0.0 if criterion == "variance" else 1e-3 * spread
    torch.testing.assert_close(value, (expected + share).reshape(1), rtol=1e-4, atol=1e-9)


def test_measuring_again_what_is_pending_gains_less() -> None:
    at, x = situation(1), torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    W = preference_weights(5, 2, generator=make_generator(1))
    targets = BOX.sample(7, generator=make_generator(2))
    weights = utility_weights(at, targets, W)
    values = [
        float(VarianceReduction(at, targets, weights, pending)(x.unsqueeze(1)))
        for pending in (at.taken, x)
    ]
    assert values[1] < values[0] - 0.5


@pytest.mark.parametrize("surrogate", [Quadratic(), GP()], ids=repr)
def test_targets_close_in_on_the_front_as_data_come(surrogate: Surrogate) -> None:
    # The Pareto set of two round bowls is the segment between their peaks.
    W = preference_weights(12, 2, generator=make_generator(1))
    way = (PEAKS[1] - PEAKS[0]) / (PEAKS[1] - PEAKS[0]).norm()

    def distance(n: int) -> float:
        points = plausible_optima(situation(n, surrogate), W, 6, generator=make_generator(5))
        offset = points - PEAKS[0]
        away = offset - (offset @ way).unsqueeze(-1) * way
        return float(away.norm(dim=-1).mean())

    assert distance(40) < 0.05
    assert distance(40) < distance(0)


def test_more_metrics_than_boxes_could_be_cut_for_are_fine() -> None:
    seen = some_seen(SPACES["box"], 9)
    metrics = tuple(Metric(f"m{i}", kind="unbounded") for i in range(12))
    Y = torch.cat([seen.Y * (1 + 0.3 * i) + 0.1 * i * seen.X[:, :2] for i in range(6)], -1)
    many = Observations(seen.X, Y, metrics, Yvar=torch.full_like(Y, 1e-4))
    X = small(initial=5).propose(many, SPACES["box"], 2, generator=make_generator(0))
    assert X.shape == (2, 3)
    assert len(torch.unique(torch.cat([seen.X, X]), dim=0)) == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "luck"}, "no criterion 'luck'"),
        ({"preferences": 0}, "preferences is 0"),
        ({"draws": 0}, "draws is 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        dataclasses.replace(FrontUncertainty(), **settings)
