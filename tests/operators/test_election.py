from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.parallel import arena
from map_bo.operators.sparse import ELECTIONS, NORMALISATIONS, elected_sum, weighted_sum
from map_bo.rng import make_generator

# Multiples of 1/8 and coefficients of 1/4: sums are exact, so that ties are ties in any order.
eighths = st.integers(-16, 16).map(lambda k: k / 8)
quarters = st.integers(-8, 8).map(lambda k: k / 4)


def by_loops(rows: Tensor, c: list[float], election: str, normalisation: str) -> list[float]:
    """Elect and average one number after another, as the papers write it."""
    merged = []
    for column in rows.t().tolist():
        weighted = [weight * t for weight, t in zip(c, column, strict=True)]
        if election == "mass":
            mass = sum(column)
        elif election == "weighted_mass":
            mass = sum(weighted)
        else:
            mass = sum((t > 0) - (t < 0) for t in column)
        sign = 1 if mass >= 0 else -1
        voters = weighted if election == "weighted_mass" else column
        agree = [n for n, vote in enumerate(voters) if vote * sign > 0]
        total = sum(weighted[n] for n in agree)
        if normalisation == "agreeing":
            total /= max(1, len(agree))
        elif normalisation == "weights":
            by = sum(c[n] for n in agree)
            total /= by if abs(by) > 1e-6 else 1.0
        merged.append(total)
    return merged


@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@given(st.data())
def test_is_the_disjoint_merge_of_the_paper(
    election: str, normalisation: str, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, 5))
    columns = data.draw(st.integers(0, 6))
    values = data.draw(st.lists(eighths, min_size=n * columns, max_size=n * columns))
    c = data.draw(st.lists(quarters, min_size=n, max_size=n))
    rows = torch.tensor(values, dtype=torch.float32).view(n, columns)
    before = rows.clone()
    found = elected_sum(rows, torch.tensor(c, dtype=torch.float64), election, normalisation)
    expected = torch.tensor(by_loops(rows, c, election, normalisation), dtype=torch.float32)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rows, before)
    arena.reset()
    again = elected_sum(rows, torch.tensor(c).double(), election, normalisation, empty=arena.empty)
    assert torch.equal(again, found)


def test_equal_coefficients_are_the_papers_lambda() -> None:
    rows = torch.randn(4, 50, generator=make_generator(0))
    rows[rows.abs() < 0.5] = 0
    ones = torch.ones(4, dtype=torch.float64)
    mean = elected_sum(rows, ones, "mass", "agreeing")
    assert torch.allclose(elected_sum(rows, 0.3 * ones, "mass", "agreeing"), 0.3 * mean)
    # Divided by the sum of equal coefficients it is the mean itself.
    for election in ("mass", "weighted_mass"):
        assert torch.allclose(elected_sum(rows, 0.3 * ones, election, "weights"), mean, atol=1e-6)


def test_ties_go_to_plus_and_zeros_agree_with_nobody() -> None:
    rows = torch.tensor([[1.0, -2.0, 0.0, -0.0, 3.0], [-1.0, 2.0, 0.0, 0.0, 0.0]])
    c = torch.ones(2, dtype=torch.float64)
    for election in ELECTIONS:
        found = elected_sum(rows, c, election, "agreeing")
        assert found.tolist() == [1.0, 2.0, 0.0, 0.0, 3.0]


def test_weighted_sum() -> None:
    rows = torch.randn(3, 20, generator=make_generator(1))
    c = torch.tensor([0.5, -2.0, 0.1], dtype=torch.float64)
    expected = (c[:, None] * rows.double()).sum(0).float()
    assert torch.allclose(weighted_sum(rows, c), expected, atol=1e-6)
