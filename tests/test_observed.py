from __future__ import annotations

import pytest
import torch

from map_bo.errors import DataError
from map_bo.observed import checked_gradients, checked_recalled, double

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
