"""What counts as the range of a metric, whatever its unit and noise."""

from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.rng import make_generator
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = (Metric("up", kind="unbounded"), Metric("down", "min", "unbounded"))


@pytest.mark.parametrize("experts", [2, 8])
def test_a_constant_with_known_noise_has_a_range_in_one_run_of_twenty(experts: int) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)])
    X = torch.cat([space.anchors().X, space.sample(20, generator=make_generator(0))])
    source, ranged = make_generator(1), 0
    for _ in range(200):
        noise = torch.randn(len(X), 1, generator=source, dtype=torch.float64)
        Yvar = torch.full((len(X), 1), 1e-18)
        data = Observations(X, 1e-9 * (5 + noise), (METRICS[0],), Yvar=Yvar)
        ranged += bool(Scale.of(data, space).ranged)
    assert ranged <= 24


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_a_threshold_that_nothing_meets_is_said(unit: float) -> None:
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    Y = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    data = Observations(X, unit * Y, METRICS)
    notes = Scale.of(data, SPACE, {"up": 0.95 * unit}).notes()
    assert len(notes) == 1
    assert "'up'" in notes[0]
    assert "is not beaten by" in notes[0]
    assert Scale.of(data, SPACE, {"up": 0.85 * unit}).notes() == []
