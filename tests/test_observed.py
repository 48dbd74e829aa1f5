from __future__ import annotations

import pytest
import torch

from map_bo.errors import DataError
from map_bo.observed import (
    checked_covariance,
    checked_gradients,
    checked_recalled,
    double,
    joined_covariance,
    stacked_covariance,
)

Y = torch.tensor([[0.1, 0.2], [0.3, torch.nan]], dtype=torch.float64)


def test_numbers_become_doubles_without_a_graph() -> None:
    found = double(torch.ones(2, dtype=torch.float16, requires_grad=True))
    assert found.dtype == torch.float64
    assert not found.requires_grad


def test_gradients_of_what_was_not_measured_are_none() -> None:
    measured = Y.isfinite()
    gradients, noise = checked_gradients(torch.ones(2, 2, 3), None, (2, 2, 3), measured)
    assert gradients is not None
    assert noise is not None
    assert bool(gradients[1, 1].isnan().all())
    assert bool(noise.isnan().all())
    assert checked_gradients(None, None, (2, 2, 3), measured) == (None, None)
    with pytest.raises(DataError, match="must have shape"):
        checked_gradients(torch.ones(2, 2), None, (2, 2, 3), measured)


def test_nothing_is_recalled_unless_it_is_said() -> None:
    marks, seconds = checked_recalled(None, None, Y)
    assert not bool(marks.any())
    assert seconds.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("marks", "seconds"),
    [
        (torch.ones(2, 2), None),
        (torch.ones(2, 1).bool(), None),
        (None, torch.ones(3)),
        (None, torch.ones(2, 1)),
    ],
)
def test_other_shapes_are_refused(marks: torch.Tensor | None, seconds: torch.Tensor | None) -> None:
    with pytest.raises(DataError, match="recalled must be booleans in the shape of Y"):
        checked_recalled(marks, seconds, Y)


def test_what_was_not_measured_has_no_noise_in_common() -> None:
    C = torch.ones(2, 2, 2, dtype=torch.float64)
    found = checked_covariance(C, Y.isfinite())
    assert found is not None
    assert torch.equal(found[0], C[0])
    assert found[1].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert checked_covariance(None, Y.isfinite()) is None


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (torch.ones(2, 2), "must be finite and of shape"),
        (torch.full((2, 2, 2), torch.nan), "must be finite and of shape"),
        (torch.tensor([[[1.0, 0.5], [0.4, 1.0]]] * 2), "not symmetric"),
    ],
)
def test_what_is_no_covariance_is_refused(given: torch.Tensor, wrong: str) -> None:
    with pytest.raises(DataError, match=wrong):
        checked_covariance(given, Y.isfinite())


def test_covariances_are_joined_by_rows_and_by_metrics() -> None:
    C, independent = torch.full((1, 2, 2), 0.5).double(), torch.tensor([[0.2], [torch.nan]])
    parts = [(C, torch.full((2, 1), 0.5)), (None, independent.double())]
    rows, metrics = joined_covariance(parts), stacked_covariance(parts)
    assert rows is not None
    assert metrics is not None
    expected = torch.zeros(4, 4).double()
    expected[:2, :2], expected[2, 2] = 0.5, 0.2
    torch.testing.assert_close(rows[0], expected)
    torch.testing.assert_close(metrics[0], C[0])
    torch.testing.assert_close(metrics[1], torch.diag(torch.tensor([0.2, 0.0])).double())
    assert joined_covariance([(None, independent)]) is None
    assert stacked_covariance([(None, independent)]) is None
