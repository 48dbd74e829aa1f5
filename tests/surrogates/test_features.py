from __future__ import annotations

import pytest
import torch

from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import (
    GROUPS,
    centred,
    feature_groups,
    n_features,
    quadratic_features,
)


def test_features_are_written_out_in_order() -> None:
    Z = torch.tensor([[2.0, 3.0, 5.0]])
    expected = [1.0, 2.0, 3.0, 5.0, 4.0, 9.0, 25.0, 6.0, 10.0, 15.0]
    assert quadratic_features(Z).tolist() == [expected]
    names = [GROUPS[i] for i in feature_groups(3).tolist()]
    assert names == ["constant", *["linear"] * 3, *["square"] * 3, *["cross"] * 3]


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_counts_agree(d: int) -> None:
    Z = torch.rand(4, 3, d, generator=make_generator(d), dtype=torch.float64)
    assert quadratic_features(Z).shape == (4, 3, n_features(d))
    assert len(feature_groups(d)) == n_features(d)


def test_the_box_is_centred() -> None:
    space = CoefficientSpace.box(("a", "b"), lower=-1.0, upper=3.0)
    corners = torch.tensor([[-1.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
    assert centred(corners, space).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
