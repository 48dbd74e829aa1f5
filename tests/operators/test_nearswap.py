from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.nearswap import NearSwap, near
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge


class TestNearSwap(OperatorContract):
    @pytest.fixture(
        params=[NearSwap(strength=0.5), NearSwap(unit="absolute", search={"strength": (0.1, 0.4)})],
        ids=label,
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def interpolated(base: float, expert: float, t: float) -> float:
    """Return what nearswap says of one number: the expert's part is t over their distance."""
    gap = abs(expert - base)
    part = 1.0 if gap == 0 else min(1.0, t / gap)
    return part * expert + (1 - part) * base


@pytest.mark.parametrize("t", [0.0, 0.1, 0.7, 5.0])
def test_one_expert_is_interpolated_number_by_number(t: float) -> None:
    base = torch.randn(60, generator=make_generator(0))
    delta = torch.randn(1, 60, generator=make_generator(1))
    delta[0, ::7] = 0.0
    found = merge(NearSwap(strength=t, unit="absolute"), flat_vectors(base, delta), [1.0])
    pairs = zip(base.tolist(), (base + delta[0]).tolist(), strict=True)
    expected = torch.tensor([interpolated(pre, tuned, t) for pre, tuned in pairs])
    torch.testing.assert_close(found[:60], expected, rtol=1e-5, atol=1e-6)


def test_a_relative_strength_is_in_units_of_each_tensors_own_change() -> None:
    vectors = hard_vectors()
    found = merge(NearSwap(strength=0.8), vectors, [0.5, -0.2, 1.1])
    for slot in vectors.layout.slots:
        rows = torch.stack([slot.of(row).flatten() for row in vectors.rows]).double()
        if slot.numel == 0:
            continue
        limits = 0.8 * rows[1:].square().mean(1).sqrt()
        parts = [
            c * row.clamp(-t, t)
            for c, row, t in zip((0.5, -0.2, 1.1), rows[1:], limits, strict=True)
        ]
        expected = rows[0] + torch.stack(parts).sum(0)
        assert torch.allclose(slot.of(found).flatten().double(), expected, atol=1e-5), slot.name


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
    st.floats(0, 3, width=32),
    st.floats(0, 3, width=32),
)
def test_a_larger_strength_never_moves_a_number_less(
    values: list[float], one: float, other: float
) -> None:
    row = torch.tensor([values])
    small, large = (near(row, [t]).abs() for t in sorted((one, other)))
    assert bool((small <= large).all())
    assert bool((large <= row.abs()).all())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match="strength must be a number of at least 0, got -1"):
        NearSwap(strength=-1)
    with pytest.raises(MergeError, match="unit must be one of rms, absolute, got 'percent'"):
        NearSwap(unit="percent")
    with pytest.raises(MergeError, match="its bounds are not given") as caught:
        NearSwap(unit="absolute", search=["strength"])
    assert "search={strength:" in str(caught.value.hint)
