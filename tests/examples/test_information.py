"""Information about means from outcomes on nested prefixes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.examples.information import (
    further_information,
    information,
    information_of_new_rows,
    outcome_covariance,
    with_new_row,
)


def spread(rows: int, seed: int) -> Tensor:
    """Return a positive definite covariance of rows."""
    source = torch.Generator().manual_seed(seed)
    root = torch.randn(rows, rows + 2, generator=source, dtype=torch.float64)
    return root @ root.T / (rows + 2)


def by_example(S: Tensor, counts: list[int]) -> Tensor:
    """Return the information, one example after another."""
    total = torch.zeros_like(S)
    for example in range(max(counts)):
        rows = torch.tensor([i for i, n in enumerate(counts) if n > example])
        total[rows.unsqueeze(-1), rows] += torch.linalg.inv(S[rows][:, rows])
    return total


COUNTS = st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(any)


@given(COUNTS, st.integers(0, 99))
def test_information_is_that_of_all_examples_together(counts: list[int], seed: int) -> None:
    S = spread(len(counts), seed)
    torch.testing.assert_close(information(S, counts), by_example(S, counts))


@given(COUNTS, st.integers(0, 99), st.integers(1, 5), st.data())
def test_more_examples_of_a_row_add_what_they_make_in_all(
    counts: list[int], seed: int, more: int, data: st.DataObject
) -> None:
    S = spread(len(counts), seed)
    row = data.draw(st.integers(0, len(counts) - 1))
    stop = counts[row] + more
    U, w = further_information(S, counts, row, stop)
    after = [stop if i == row else n for i, n in enumerate(counts)]
    expected = by_example(S, after) - by_example(S, counts)
    torch.testing.assert_close(U @ torch.diag(w) @ U.T, expected, atol=1e-7, rtol=1e-7)


def test_rows_on_the_same_examples_have_the_variance_of_their_means() -> None:
    S = spread(3, 1)
    torch.testing.assert_close(torch.linalg.inv(information(S, [50] * 3)), S / 50)


def test_a_row_is_known_better_where_another_covers_more() -> None:
    S = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    alone = torch.linalg.inv(information(S, [100, 100]))[0, 0]
    beside = torch.linalg.inv(information(S, [100, 1000]))[0, 0]
    # The regression estimator: (1 - rho^2) S / n + rho^2 S / N.
    torch.testing.assert_close(beside, torch.tensor(0.19 / 100 + 0.81 / 1000).double())
    assert beside < alone


@given(st.integers(2, 8), st.integers(3, 40), st.integers(0, 99))
def test_covariances_of_outcomes_are_positive_definite(rows: int, size: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    values = (torch.rand(rows, size, generator=source) < 0.8).double()
    for i in range(rows):
        values[i, 2 + int(torch.randint(size, (1,), generator=source)) :] = torch.nan
    S = outcome_covariance(values, bounds=(0.0, 1.0))
    assert float(torch.linalg.eigvalsh(S)[0]) > 0
    torch.testing.assert_close(S, S.T)


def test_many_examples_give_the_covariance_that_they_have() -> None:
    source = torch.Generator().manual_seed(3)
    S = spread(4, 5)
    root = torch.linalg.cholesky(S)
    values = root @ torch.randn(4, 40_000, generator=source, dtype=torch.float64)
    torch.testing.assert_close(outcome_covariance(values), S, atol=0.05, rtol=0.05)


def test_rows_that_are_right_everywhere_are_not_known_exactly() -> None:
    values = torch.ones(3, 20, dtype=torch.float64)
    S = outcome_covariance(values, bounds=(0.0, 1.0))
    assert float(S.diagonal().min()) > 1e-3


@given(st.integers(1, 6), st.integers(0, 50))
def test_a_new_row_leaves_the_covariance_positive_definite(rows: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    X = torch.rand(rows, 2, generator=source, dtype=torch.float64)
    x = torch.rand(1, 2, generator=source, dtype=torch.float64)
    S = spread(rows, seed)
    grown = with_new_row(S, torch.cdist(X, X), torch.cdist(x, X)[0])
    assert float(torch.linalg.eigvalsh(grown)[0]) > 0
    torch.testing.assert_close(grown[:-1, :-1], S)


@given(COUNTS, st.integers(0, 50), st.integers(1, 8))
def test_new_rows_side_by_side_add_what_each_adds_alone(
    counts: list[int], seed: int, stop: int
) -> None:
    R = len(counts)
    first, source = spread(R, seed), torch.Generator().manual_seed(seed)
    X = torch.rand(R, 2, generator=source, dtype=torch.float64)
    new = torch.cdist(torch.rand(3, 2, generator=source, dtype=torch.float64), X)
    S = torch.stack([with_new_row(first, torch.cdist(X, X), one) for one in new])
    U, w = information_of_new_rows(S, counts, stop)
    for i in range(3):
        alone, weights = further_information(S[i], [*counts, 0], R, stop)
        torch.testing.assert_close(U[i], alone)
        torch.testing.assert_close(w[i], weights)
