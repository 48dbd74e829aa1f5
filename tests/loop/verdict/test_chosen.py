"""A chosen merge as data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from map_bo.data import Metric
from map_bo.errors import MergeError
from map_bo.loop.verdict.chosen import Choice, with_probability
from map_bo.loop.verdict.gain import PosteriorGain
from map_bo.pareto.preferences import Preference
from map_bo.space import CoefficientSpace

METRICS = (Metric("math"), Metric("code"))
UNKNOWN = torch.full((2,), math.nan).double()
MEAN = torch.tensor([0.7, 0.6]).double()
CHOICE = Choice(
    2,
    torch.tensor([0.3, 0.6]).double(),
    MEAN,
    MEAN - 0.1,
    MEAN + 0.1,
    UNKNOWN,
    UNKNOWN,
    METRICS,
    CoefficientSpace.box(("a", "b")),
)


def test_it_says_when_it_is_the_blend_and_what_was_gained() -> None:
    assert "blend" not in CHOICE.describe()
    kept = replace(CHOICE, blend=True, gain=PosteriorGain(0.0, -0.1, 0.1))
    assert kept.describe()["blend"] is True
    assert kept.describe()["gain_over_blend"] == {"median": 0.0, "lower": -0.1, "upper": 0.1}


def test_what_is_expected_is_corrected_where_that_is_known() -> None:
    assert torch.equal(CHOICE.expected, MEAN)
    assert torch.equal(replace(CHOICE, corrected=MEAN - 0.05).expected, MEAN - 0.05)


def test_the_probability_of_bounds_comes_with_a_note() -> None:
    bounded = replace(CHOICE, preference=Preference(at_least={"math": 0.65}))
    sure = with_probability(bounded, 0.95)
    assert sure.probability == 0.95
    assert "hold with probability 0.950" in sure.notes[0]
    assert "no merge was found that keeps them" in with_probability(bounded, 0.5).notes[0]


def test_without_models_nothing_is_exported(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="has no models to merge"):
        CHOICE.export(tmp_path / "out")
