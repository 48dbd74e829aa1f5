from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.adapters.low_rank import LowRank
from map_bo.operators.spectral.singular import (
    add_changes,
    inverse_root,
    leading,
    length_of,
    orthogonal_factor,
    without_columns,
)
from map_bo.rng import make_generator
from tests.operators.spectral.naive import procrustes, svd

sides = st.integers(1, 12)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=make_generator(seed), dtype=torch.float64)


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    return LowRank(matrix(rows, rank, seed), matrix(rank, columns, seed + 1), 0.5)


@given(sides, sides, st.integers(0, 99))
def test_vectors_and_values_make_the_matrix_again(rows: int, columns: int, seed: int) -> None:
    X = matrix(rows, columns, seed)
    found = leading(X)
    torch.testing.assert_close(found.s, svd(X)[1])
    torch.testing.assert_close(found.U @ torch.diag(found.s) @ found.V.T, X)
    one = torch.eye(len(found.s), dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, one, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.V.T @ found.V, one, rtol=0, atol=1e-7)


@given(sides, sides, st.integers(0, 4), st.integers(0, 99))
def test_factors_have_the_vectors_of_their_product(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    change = factors(rows, columns, rank, seed)
    found = leading(change, 2)
    assert len(found.s) == min(2, rank, rows, columns)
    U, s, Vh = svd(change.dense())
    keep = len(found.s)
    expected = U[:, :keep] @ torch.diag(s[:keep]) @ Vh[:keep]
    torch.testing.assert_close(found.U @ torch.diag(found.s) @ found.V.T, expected)
    assert length_of(change) == pytest.approx(float(change.dense().norm()), abs=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_what_is_zero_has_no_vectors(dense: bool) -> None:
    change = factors(9, 7, 3)
    assert len(leading(change.dense() if dense else change).s) == 3
    nothing = LowRank(torch.zeros(9, 2), torch.zeros(2, 7))
    assert len(leading(nothing.dense() if dense else nothing).s) == 0
    # What is left of a matrix after its own vectors were taken out is rounding.
    X = matrix(6, 8)
    rest = without_columns(X, leading(X, 4).U)
    assert len(leading(rest, scale=length_of(X)).s) == 2
    assert len(leading(without_columns(X, leading(X).U), scale=length_of(X)).s) == 0


@given(sides, sides, st.integers(0, 99))
def test_the_orthogonal_factor_is_that_of_procrustes(rows: int, columns: int, seed: int) -> None:
    X = matrix(rows, columns, seed)
    if svd(X)[1].min() < 1e-3 * svd(X)[1].max():
        return  # near a singular matrix the factor itself is not determined
    torch.testing.assert_close(orthogonal_factor(X), procrustes(X), rtol=0, atol=1e-8)


def test_no_direction_is_made_up() -> None:
    X = factors(9, 7, 3).dense()
    found = orthogonal_factor(X)
    torch.testing.assert_close(svd(found)[1], torch.tensor([1.0] * 3 + [0.0] * 4).double())
    U, _, Vh = svd(X)
    torch.testing.assert_close(found, U[:, :3] @ Vh[:3])
    root, s = inverse_root(torch.zeros(4, 4, dtype=torch.float64))
    assert not bool(root.any())
    assert len(s) == 0
    assert orthogonal_factor(torch.zeros(4, 0, dtype=torch.float64)).shape == (4, 0)


def test_sums_of_changes() -> None:
    low, other, full = factors(5, 4, 2), factors(5, 4, 1, 7), matrix(5, 4, 3)
    both = add_changes([low, other])
    assert isinstance(both, LowRank)
    torch.testing.assert_close(both.dense(), low.dense() + other.dense())
    mixed = add_changes([low, full.float()])
    assert isinstance(mixed, Tensor)
    torch.testing.assert_close(mixed, low.dense() + full.float().double())
    U = leading(full, 2).U
    left = without_columns(low, U)
    assert isinstance(left, LowRank)
    torch.testing.assert_close(left.dense(), low.dense() - U @ U.T @ low.dense())
