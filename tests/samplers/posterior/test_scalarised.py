from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.pareto.indicators import hypervolume
from map_bo.rng import child, make_generator
from map_bo.samplers.posterior.acquisition import AcquisitionDriven
from map_bo.samplers.posterior.driven import Situation
from map_bo.samplers.posterior.hypervolume import QLogNEHVI
from map_bo.samplers.posterior.scalarised import (
    HypervolumeScalarised,
    QLogNParEGO,
    ScalarisedImprovement,
    ScalarisedUCB,
    UpperBound,
    log_improvements,
    ray_lengths,
    sphere_directions,
    unit_volume,
)
from map_bo.samplers.sampler import Sampler
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract

SIZES: dict[str, Any] = {"restarts": 2, "raw_samples": 16, "mc_samples": 8, "steps": 8}


class TestHypervolumeScalarised(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return HypervolumeScalarised(Quadratic(), initial=5, rays=16, **SIZES)

    @pytest.fixture(params=["box", "sum"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


class TestQLogNParEGO(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return QLogNParEGO(Quadratic(), initial=5, **SIZES)

    @pytest.fixture
    def space(self) -> CoefficientSpace:
        return SPACES["box"]


class TestScalarisedUCB(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return ScalarisedUCB(initial=5, surrogate=GP(), **SIZES)

    @pytest.fixture
    def space(self) -> CoefficientSpace:
        return SPACES["simplex"]


def situation(m: int, n: int = 10) -> Situation:
    """``m`` concave bowls with optima on the axes, identity link."""
    space = CoefficientSpace.box([f"e{i}" for i in range(m)])
    X = torch.cat([space.anchors().X, space.sample(n, generator=make_generator(1))])
    Y = 1 - (X.unsqueeze(1) - 0.8 * torch.eye(m, dtype=torch.float64)).square().sum(-1) / m
    metrics = tuple(Metric(f"m{i}", kind="unbounded") for i in range(m))
    seen = Observations(X, Y, metrics, Yvar=torch.full_like(Y, 1e-4))
    return Situation(
        model=Quadratic().fit(seen, space),
        good=seen,
        space=space,
        taken=X[:0],
        known=X,
        scale=Scale(metrics, Y.amin(0), Y.amax(0), "given"),
        generator=make_generator(0),
    )


@pytest.mark.parametrize(("m", "n"), [(1, 5), (2, 20), (4, 20), (8, 12)])
def test_rays_measure_the_hypervolume(m: int, n: int) -> None:
    Y = torch.rand(n, m, generator=make_generator(m), dtype=torch.float64)
    rays = sphere_directions(1 << 14, m, seed=3)
    best = ray_lengths(Y.unsqueeze(1), rays).amax(0)
    volume = unit_volume(m) * float(best.pow(m).mean())
    assert volume == pytest.approx(hypervolume(Y, torch.zeros(m).double()), rel=0.03)


@given(t=st.floats(-2, 3), b=st.floats(0, 3), m=st.sampled_from([1, 2, 5, 16]))
def test_improvements_are_differences_of_powers(t: float, b: float, m: int) -> None:
    value = log_improvements(torch.tensor(t).double(), torch.tensor(b).double(), m)
    assert math.isfinite(value)
    exact = max(t, b) ** m - b**m
    slack = 2e-4 * m * (max(t, b) + 1e-3) ** (m - 1)
    assert exact * (1 - 1e-6) - 1e-8 <= float(value.exp()) <= exact * (1 + 1e-6) + slack + 1e-8


def test_improvement_has_a_gradient_where_nothing_is_gained() -> None:
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        log_improvements(t, torch.tensor(0.9, dtype=torch.float64), 16), t
    )
    assert math.isfinite(gradient)
    assert float(gradient) > 0


def test_it_agrees_with_the_improvement_over_boxes() -> None:
    at = situation(3)
    X = at.space.sample(60, generator=make_generator(5)).unsqueeze(1)
    rays = sphere_directions(512, 3, seed=0)
    ours = ScalarisedImprovement(at, rays, at.taken, make_generator(2))
    boxes = QLogNEHVI(mc_samples=64).acquisition(at, at.taken, make_generator(3))
    with torch.no_grad():
        pair = torch.stack([ours(X).exp(), boxes(X).exp()])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.95
    assert float(pair[0].mean() / pair[1].mean()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("m", [8, 16])
def test_many_metrics_stay_finite(m: int) -> None:
    at = situation(m, 4)
    acquisition = HypervolumeScalarised(rays=64).acquisition(at, at.taken, make_generator(0))
    X = at.space.sample(6, generator=make_generator(5)).unsqueeze(1).requires_grad_()
    values = acquisition(X)
    (gradient,) = torch.autograd.grad(values.sum(), X)
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) > 0


def test_pending_points_are_part_of_the_baseline() -> None:
    at = situation(2)
    rays = sphere_directions(64, 2, seed=0)
    x = torch.tensor([[0.45, 0.45]], dtype=torch.float64)
    alone, after = (
        float(ScalarisedImprovement(at, rays, pending, make_generator(2))(x.unsqueeze(1)))
        for pending in (at.taken, x)
    )
    assert after < alone - 1


@pytest.mark.parametrize("scalarisation", ["linear", "chebyshev"])
def test_ucb_without_doubt_is_the_optimum_of_the_mean(scalarisation: Any) -> None:
    at = situation(2, 30)
    sampler = ScalarisedUCB(beta=0.0, scalarisation=scalarisation, restarts=4, steps=60)
    generator = make_generator(4)
    x = sampler.choose(at, 1)
    acquisition = sampler.acquisition(at, at.taken, at.generator)
    grid = at.space.sample(4000, generator=child(generator, "grid"))
    with torch.no_grad():
        assert float(acquisition(x.unsqueeze(1))) >= float(acquisition(grid.unsqueeze(1)).max())


def test_every_point_of_a_batch_has_its_own_scalarisation() -> None:
    at = situation(2, 30)
    X = ScalarisedUCB(beta=0.0, **SIZES).choose(at, 4)
    assert float(torch.pdist(X).min()) > 1e-3


@pytest.mark.parametrize("scalarisation", ["linear", "chebyshev"])
def test_weights_whose_best_point_is_pending_are_drawn_again(scalarisation: Any) -> None:
    at, generator = situation(2, 30), make_generator(4)
    sampler = ScalarisedUCB(scalarisation=scalarisation, restarts=4, steps=60)
    alone = sampler.acquisition(at, at.taken, generator)
    grid = at.space.sample(2000, generator=make_generator(5)).unsqueeze(1)
    with torch.no_grad():
        best, worst = (grid[getattr(alone(grid), which)()] for which in ("argmax", "argmin"))
    assert isinstance(alone, UpperBound)
    for pending, same in ((worst, True), (best, False)):
        after = sampler.acquisition(at, pending, generator)
        assert isinstance(after, UpperBound)
        assert torch.equal(after.weights, alone.weights) == same
        with torch.no_grad():
            assert float(after(pending.unsqueeze(1))) < float(after(grid).max())


@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize(
    "sampler",
    [
        HypervolumeScalarised(rays=32, **SIZES),
        QLogNParEGO(**SIZES),
        ScalarisedUCB(**SIZES),
        ScalarisedUCB(scalarisation="linear", **SIZES),
    ],
    ids=["hvs_nei", "qlognparego", "ucb", "ucb_linear"],
)
def test_one_metric_and_many_are_chosen_for(sampler: AcquisitionDriven, m: int) -> None:
    at = situation(m, 12)
    X = sampler.choose(at, 2)  # not `propose`, whose design would stand in for a failure
    at.space.check(X)
    assert len(X) == 2
    assert float(torch.pdist(X)) > 1e-4
    if m == 1:
        assert float((X[:1] - 0.8).abs().max()) < 0.1  # the peak


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"beta": -1.0}, "beta is -1"), ({"scalarisation": "cubic"}, "no scalarisation 'cubic'")],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        ScalarisedUCB(**settings)
