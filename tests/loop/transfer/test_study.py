from __future__ import annotations

import pytest
import torch

from map_bo.errors import ConfigError
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.space import CoefficientSpace
from tests.loop.transfer.grown import Growing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": ["a"]}, "experts of start_from must map old names"),
        ({"metrics": {"x": 3}}, "metrics of start_from must map old names"),
        ({"values": ["density"]}, "values of start_from must map coefficients"),
        ({"values": {"density": "much"}}, "the value of density"),
        ({"skip": "yes"}, "skip of start_from must be true or false"),
    ],
)
def test_wrong_options_are_told(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StartFrom("old", **given)  # type: ignore[arg-type]


def test_nothing_is_no_mapping() -> None:
    how = StartFrom("old", experts=None, metrics=None, values=None)  # type: ignore[arg-type]
    assert (how.experts, how.metrics, how.values) == ({}, {}, {})


def test_a_study_knows_whose_its_coefficients_are() -> None:
    space = CoefficientSpace.box(("a", "b"), blocks=("early", "late"))
    seen = Growing(("a", "b", "c", "d"), ("x",)).seen_at(torch.rand(2, 4).double())
    study = Study.of(seen, space, source={}, title="old")
    assert study.names == ("a/early", "a/late", "b/early", "b/late")
    assert study.owner == ("a", "a", "b", "b")
    assert study.metric_names == ("x",)
    assert Study.of(seen, None, source={}, title="old").names == ()
