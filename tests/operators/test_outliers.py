"""What Breadcrumbs leaves out above."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.operators.quantiles import band_counts
from map_bo.operators.sparse import Breadcrumbs, Ties
from tests.operators.oracle import ours


@given(density=st.floats(0, 1), gamma=st.floats(0, 1), total=st.integers(0, 10_000))
def test_a_band_keeps_its_share_and_no_more_go_than_their_share(
    density: float, gamma: float, total: int
) -> None:
    outliers, kept = band_counts(density, gamma, total)
    assert 0 <= outliers
    assert outliers + kept <= total
    assert outliers <= gamma * total * (1 + 1e-9)
    if density and total:
        assert kept >= 1
        assert abs(kept - density * total) <= 1


@pytest.mark.parametrize("size", [1, 9])
def test_a_small_tensor_has_no_outliers(size: int) -> None:
    weights = torch.arange(1.0, size + 1)
    models = {"base": {"w": torch.zeros(size)}, "e0": {"w": weights}}
    merged = ours(Breadcrumbs(), models, [1.0])["w"]
    assert merged.tolist() == [0.0] * (size - 1) + [float(size)]


def test_a_share_of_the_largest_goes() -> None:
    weights = torch.arange(1.0, 1001.0)
    models = {"base": {"w": torch.zeros(1000)}, "e0": {"w": weights}}
    merged = ours(Breadcrumbs(), models, [1.0])["w"]
    assert merged.nonzero().flatten().tolist() == list(range(850, 993))


@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_tensors_without_numbers(trim: str) -> None:
    models = {
        "base": {"w": torch.zeros(4), "none": torch.zeros(0, 2)},
        "e0": {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "none": torch.zeros(0, 2)},
    }
    for operator in (Ties(density=0.5, trim=trim), Ties(density=0.5, trim=trim, search="density")):
        c = [1.0, 0.5] if operator.search else [1.0]
        merged = ours(operator, models, c)
        assert merged["w"].tolist() == [0.0, 0.0, 3.0, 4.0]
        assert merged["none"].shape == (0, 2)
