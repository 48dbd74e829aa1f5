from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import DataError
from map_bo.pareto.dominance import dominates, non_dominated


@st.composite
def fronts(draw: st.DrawFn, most: int = 25) -> Tensor:
    """Small integer values, so that ties and duplicates are common."""
    n, m = draw(st.integers(1, most)), draw(st.integers(1, 6))
    rows = st.lists(st.integers(-3, 3), min_size=m, max_size=m)
    return torch.tensor(draw(st.lists(rows, min_size=n, max_size=n)), dtype=torch.float64)


@given(Y=fronts())
@settings(max_examples=150, deadline=None)
def test_matches_the_definition(Y: Tensor) -> None:
    mask = non_dominated(Y)
    beaten = dominates(Y.unsqueeze(0), Y.unsqueeze(1)).any(-1)
    assert not (mask & beaten).any()
    # Every row that nothing dominates equals exactly one marked row, the first of its kind.
    for i in (~beaten).nonzero().flatten().tolist():
        same = (Y == Y[i]).all(-1).nonzero().flatten()
        assert mask[same].tolist() == [True] + [False] * (len(same) - 1)


@given(Y=fronts(), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_the_order_of_rows_does_not_matter(Y: Tensor, seed: int) -> None:
    order = torch.randperm(len(Y), generator=torch.Generator().manual_seed(seed))
    ours, theirs = Y[non_dominated(Y)], Y[order][non_dominated(Y[order])]
    assert torch.equal(torch.unique(ours, dim=0), torch.unique(theirs, dim=0))


@given(Y=fronts(), cut=st.integers(0, 25))
@settings(max_examples=80, deadline=None)
def test_the_front_of_a_union_is_the_front_of_the_fronts(Y: Tensor, cut: int) -> None:
    parts = [part for part in (Y[:cut], Y[cut:]) if len(part)]
    joined = torch.cat([part[non_dominated(part)] for part in parts])
    expected = Y[non_dominated(Y)]
    found = joined[non_dominated(joined)]
    assert torch.equal(torch.unique(found, dim=0), torch.unique(expected, dim=0))


def test_rows_with_nan_are_never_marked() -> None:
    Y = torch.tensor([[1.0, 2.0], [torch.nan, 9.0], [2.0, 1.0]])
    assert non_dominated(Y).tolist() == [True, False, True]
    assert non_dominated(torch.full((2, 2), torch.nan)).tolist() == [False, False]


@given(Y=fronts(), power=st.integers(-200, 200))
def test_the_size_of_the_values_does_not_matter(Y: Tensor, power: int) -> None:
    assert torch.equal(non_dominated(Y * 2.0**power), non_dominated(Y))


def test_signed_zeros_are_equal() -> None:
    assert non_dominated(torch.tensor([[0.0, -0.0], [-0.0, 0.0]])).tolist() == [True, False]


def test_infinities_compare_as_numbers() -> None:
    Y = torch.tensor([[torch.inf, 0.0], [0.0, 1.0], [0.0, -torch.inf]])
    assert non_dominated(Y).tolist() == [True, True, False]


def test_no_rows() -> None:
    assert non_dominated(torch.zeros(0, 3)).shape == (0,)


def test_values_need_two_dimensions() -> None:
    with pytest.raises(DataError, match="shape"):
        non_dominated(torch.zeros(3))


def test_dominates_needs_one_strict_win() -> None:
    a = torch.tensor([1.0, 1.0])
    assert dominates(a, torch.tensor([1.0, 0.0]))
    assert not dominates(a, a)
    assert not dominates(a, torch.tensor([0.0, 2.0]))
    assert dominates(a, torch.tensor([[0.0, 0.0], [2.0, 2.0]])).tolist() == [True, False]
