from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.stock import ModelStock, mean_cosine, stock_ratio
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge


class TestModelStock(OperatorContract):
    negative = False

    @pytest.fixture(params=[ModelStock(), ModelStock(each="row")], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def shell(experts: int, *, away: float, spread: float) -> tuple[Tensor, Tensor]:
    """Return task vectors on a thin shell around a centre, and the centre, as the paper has them.

    Seen from the centre, base and experts are at right angles to each other.
    """
    axes = torch.linalg.qr(torch.randn(20, 20, generator=make_generator(4), dtype=torch.float64)).Q
    centre = away * axes[0]
    return centre + spread * axes[1 : 1 + experts], centre


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("away", [0.5, 2.0])
def test_it_is_the_closest_point_to_the_centre(experts: int, away: float) -> None:
    deltas, centre = shell(experts, away=away, spread=1.3)
    base = torch.randn(20, generator=make_generator(5), dtype=torch.float64)
    vectors = flat_vectors(base.float(), deltas.float())
    for c in (torch.full((experts,), 1 / experts), torch.arange(1.0, experts + 1)):
        shares = (c / c.sum()).double()
        found = merge(ModelStock(), vectors, shares)[:20].double() - base
        average = shares @ deltas
        # The foot of the perpendicular from the centre on the line to the average.
        foot = (average @ centre) / (average @ average) * average
        assert torch.allclose(found, foot, atol=1e-5)


@pytest.mark.parametrize("experts", [2, 3, 6])
def test_equal_shares_are_the_papers_formula(experts: int) -> None:
    deltas = torch.randn(experts, 50, generator=make_generator(2)) + 0.8
    base = torch.randn(50, generator=make_generator(3))
    cosines = [
        float(torch.nn.functional.cosine_similarity(deltas[i], deltas[j], dim=0))
        for i in range(experts)
        for j in range(i)
    ]
    cosine = sum(cosines) / len(cosines)
    t = experts * cosine / (1 + (experts - 1) * cosine)
    expected = t * (base + deltas).mean(0) + (1 - t) * base
    found = merge(ModelStock(), flat_vectors(base, deltas), [1 / experts] * experts)[:50]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_have_angles_of_their_own() -> None:
    vectors = hard_vectors(zeros=0.0)
    c = torch.tensor([0.5, 0.2, 0.3])
    found = merge(ModelStock(each="row"), vectors, c)
    for slot in vectors.layout.slots:
        if slot.numel == 0:
            continue
        rows = torch.stack([slot.of(row) for row in vectors.rows])
        width = slot.shape[-1] if len(slot.shape) in (2, 3) else math.prod(slot.shape[1:])
        width = slot.numel if len(slot.shape) < 2 else width
        lines = rows.reshape(4, -1, width)
        result = slot.of(found).reshape(-1, width)
        for line in range(lines.shape[1]):
            alone = flat_vectors(lines[0, line], lines[1:, line])
            expected = merge(ModelStock(), alone, c)[:width]
            assert torch.allclose(result[line], expected, atol=1e-5), (slot.name, line)


@given(st.floats(0, 1), st.lists(st.floats(0.01, 2), min_size=1, max_size=5))
def test_the_ratio_grows_with_the_cosine_and_with_even_shares(
    cosine: float, values: list[float]
) -> None:
    c = torch.tensor(values, dtype=torch.float64)
    ratio = float(stock_ratio(torch.tensor(cosine, dtype=torch.float64), c))
    assert -1e-12 <= ratio <= 1 + 1e-12
    assert ratio >= cosine - 1e-9  # a single expert goes as far as the cosine says
    more = float(stock_ratio(torch.tensor(min(cosine + 0.1, 1.0), dtype=torch.float64), c))
    assert more >= ratio - 1e-9
    even = torch.full_like(c, float(c.mean()))
    assert float(stock_ratio(torch.tensor(cosine, dtype=torch.float64), even)) >= ratio - 1e-9


def test_where_experts_have_no_common_direction_the_base_stays() -> None:
    base = torch.randn(8, generator=make_generator(0))
    apart = torch.zeros(2, 8)
    apart[0, 0], apart[1, 0] = 1.0, -1.0
    for deltas in (apart, torch.zeros(2, 8), torch.eye(2, 8)):
        for operator in (ModelStock(), ModelStock(each="row")):
            found = merge(operator, flat_vectors(base, deltas), [0.5, 0.5])[:8]
            assert torch.equal(found, base)


def test_experts_that_are_alike_are_that_expert() -> None:
    delta = torch.randn(30, generator=make_generator(1)).expand(3, -1)
    vectors = flat_vectors(torch.zeros(30), delta)
    found = merge(ModelStock(), vectors, [0.2, 0.5, 0.3])[:30]
    torch.testing.assert_close(found, delta[0], rtol=1e-5, atol=1e-6)
    alone = flat_vectors(torch.zeros(30), delta[:1])
    torch.testing.assert_close(merge(ModelStock(), alone, [0.7])[:30], 0.7 * delta[0])


def test_mean_cosine_is_of_all_pairs() -> None:
    vectors = torch.randn(4, 9, generator=make_generator(6), dtype=torch.float64) + 1.0
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    pairs = [float(unit[i] @ unit[j]) for i in range(4) for j in range(i)]
    found = float(mean_cosine(vectors @ vectors.T))
    assert found == pytest.approx(sum(pairs) / 6)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match="each must be one of tensor, row, got 'layer'"):
        ModelStock(each="layer")
