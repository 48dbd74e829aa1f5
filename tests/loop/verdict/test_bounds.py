"""Whether bounds hold: by the posterior, and by recorded intervals."""

from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.loop.verdict.bounds import holding, holding_by_interval, missed_bounds
from map_bo.pareto.preferences import Preference
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import SurrogateModel

METRICS = (Metric("gain", kind="unbounded"), Metric("loss", "min", "unbounded"))
SPACE = CoefficientSpace.box(("a", "b"))


@pytest.fixture(scope="module")
def model() -> SurrogateModel:
    X = torch.rand(20, 2, generator=make_generator(0)).double()
    Y = torch.stack([X[:, 0], X[:, 1]], -1)
    return Quadratic().fit(Observations(X, Y, METRICS, torch.full_like(Y, 0.01)), SPACE)


def test_intervals_give_the_normal_probability_on_the_side_of_the_bound() -> None:
    mean = torch.tensor([[0.5, 0.5]]).double()
    lower, upper = mean - 1.959964 * 0.1, mean + 1.959964 * 0.2
    likely = holding_by_interval(
        mean, lower, upper, Preference(at_least={"gain": 0.4}, at_most={"loss": 0.7}), METRICS
    )
    assert float(likely) == pytest.approx(0.8413**2, abs=1e-3)
    missing = holding_by_interval(mean, lower, upper, Preference(at_least={"gain": 0.7}), METRICS)
    assert float(missing) == pytest.approx(0.1587, abs=1e-3)


def test_a_point_misses_a_bound_by_its_quantile(model: SurrogateModel) -> None:
    X, width = torch.tensor([[0.6, 0.4]]).double(), torch.ones(2).double()
    inside = Preference(at_least={"gain": 0.55}, confidence=None)
    assert float(missed_bounds(model, X, inside, width)) == 0
    surely = Preference(at_least={"gain": 0.55}, confidence=0.95)
    assert float(missed_bounds(model, X, surely, width)) > 0
    assert 0.5 < float(holding(model, X, surely)) < 0.95
    assert not missed_bounds(model, X, Preference(), width).any()
