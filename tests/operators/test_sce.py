from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators import sce as module
from map_bo.operators.sce import Sce, energy_shares, variances
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge


class TestSce(OperatorContract):
    same_bits_mapped = False  # what resident task vectors add is kept
    storage_error = 1e-1  # ranks, and signs of sums, may change

    @pytest.fixture(params=[Sce(), Sce(density=0.4), Sce(search=["density"])], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def in_three_steps(deltas: Tensor, c: list[float], density: float) -> Tensor:
    """Return what SCE adds to the base, step by step and number by number."""
    experts, size = deltas.shape
    values = deltas.double().tolist()
    # Select: the numbers with the largest variances over the experts.
    spread = [torch.tensor([row[i] for row in values]).var(unbiased=False) for i in range(size)]
    different = [i for i in range(size) if len({row[i] for row in values}) > 1]
    kept = set(range(size))
    if density < 1:
        count = min(max(1, int(density * len(different))), len(different))
        kept = set(sorted(different, key=lambda i: -float(spread[i]))[:count])
    # Calculate: shares of the squares of what was selected.
    squares = [sum(row[i] ** 2 for i in kept) for row in values]
    shares = [s / sum(squares) if sum(squares) else 1 / experts for s in squares]
    # Erase: numbers against the sign of their sum.
    result = torch.zeros(size, dtype=torch.float64)
    for i in kept:
        side = 1 if sum(row[i] for row in values) >= 0 else -1
        agree = [n for n in range(experts) if values[n][i] * side > 0]
        if agree:
            total = sum(c[n] * shares[n] * values[n][i] for n in agree)
            result[i] = total / sum(shares[n] for n in agree)
    return result


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("zeros", [0.0, 0.6])
def test_it_is_the_three_steps(experts: int, density: float, zeros: float) -> None:
    generator = make_generator(experts)
    deltas = torch.randn(experts, 80, generator=generator)
    deltas *= torch.rand(1, 80, generator=generator) >= zeros
    base = torch.randn(80, generator=make_generator(9))
    c = torch.linspace(1.3, -0.5, experts).tolist()
    found = merge(Sce(density=density), flat_vectors(base, deltas), c)[:80] - base
    expected = in_three_steps(deltas, c, density)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_tensors_are_selected_apart() -> None:
    vectors = hard_vectors(zeros=0.0)
    c = [0.8, 0.3, -0.2]
    found = merge(Sce(density=0.25), vectors, c)
    for slot in vectors.layout.slots:
        rows = torch.stack([slot.of(row).flatten() for row in vectors.rows])
        if slot.numel:
            alone = merge(Sce(density=0.25), flat_vectors(rows[0], rows[1:]), c)
            assert torch.allclose(slot.of(found).flatten(), alone[: slot.numel], atol=1e-6)


def test_where_the_experts_agree_nothing_is_selected() -> None:
    deltas = torch.randn(1, 20, generator=make_generator(0)).expand(3, -1)
    vectors = flat_vectors(torch.zeros(20), deltas)
    assert not bool(merge(Sce(density=0.5), vectors, [1.0] * 3).any())
    assert not bool(merge(Sce(search=["density"]), vectors, [1.0] * 3 + [0.5]).any())
    torch.testing.assert_close(merge(Sce(density=1.0), vectors, [1.0] * 3)[:20], deltas[0])


def test_a_searched_density_selects_about_as_many() -> None:
    deltas = torch.randn(3, 4000, generator=make_generator(1))
    vectors = flat_vectors(torch.zeros(4000), deltas)
    prepared = Sce(search=["density"])
    for density in (0.1, 0.5, 1.0):
        moved = merge(prepared, vectors, [1.0] * 3 + [density])[:4000] != 0
        exact = merge(Sce(density=density), vectors, [1.0] * 3)[:4000] != 0
        assert abs(float(moved.double().mean() - exact.double().mean())) < 5e-3


@given(st.integers(0, 1000), st.integers(1, 5))
def test_variances_are_those_of_torch(seed: int, experts: int) -> None:
    rows = torch.randn(experts, 17, generator=make_generator(seed)) + 3.0
    expected = rows.double().var(0, unbiased=False)
    torch.testing.assert_close(variances(rows).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-9, 3.7e20])
def test_equal_numbers_have_no_variance_at_all(value: float) -> None:
    assert not bool(variances(torch.full((3, 5), value)).any())


@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_shares_sum_to_one_and_do_not_depend_on_pieces(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    vectors = hard_vectors()
    shares = energy_shares(vectors, [0.5] * len(vectors.layout.slots))
    assert torch.allclose(shares.sum(1), torch.ones(len(shares), dtype=torch.float64))
    slot = vectors.layout.slots[4]
    part = vectors.deltas[:, slot.offset : slot.stop].double()
    chosen = part * (part.var(0, unbiased=False) >= 0.5)
    squares = chosen.square().sum(1)
    assert torch.allclose(shares[4], squares / squares.sum())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match=r"density must .* got 1\.5"):
        Sce(density=1.5)
