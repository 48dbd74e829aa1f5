from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators import shared_regions as module
from map_bo.operators.shared_regions import Ram, count_regions
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge


class TestRam(OperatorContract):
    storage_error = 5e-2  # which numbers are active may change

    @pytest.fixture(
        params=[Ram(threshold=0.2), Ram(over="tensor", search=["rescale", "most"])], ids=label
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def sparse(experts: int, size: int, share: float, seed: int = 0) -> Tensor:
    """Return task vectors in which a share of the numbers is not 0."""
    generator = make_generator(seed)
    values = torch.randn(experts, size, generator=generator)
    return values * (torch.rand(experts, size, generator=generator) < share)


def number_by_number(deltas: Tensor, c: list[float], operator: Ram) -> Tensor:
    """Return what RAM adds to the base, from its statement in words."""
    experts, size = deltas.shape
    active = [
        [abs(float(deltas[n, i])) > operator.threshold for i in range(size)] for n in range(experts)
    ]
    users = [sum(active[n][i] for n in range(experts)) for i in range(size)]
    factors = []
    for n in range(experts):
        shared = sum(active[n][i] and users[i] > 1 for i in range(size))
        unique = sum(active[n][i] and users[i] == 1 for i in range(size))
        ratio = shared / unique if unique else 0.0
        factors.append(1 + operator.rescale * min(ratio, operator.most))
    result = torch.zeros(size, dtype=torch.float64)
    for i in range(size):
        for n in range(experts):
            if active[n][i]:
                part = factors[n] if users[i] == 1 else 1 / users[i]
                result[i] += part * c[n] * float(deltas[n, i])
    return result


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("experts", [1, 2, 4])
@pytest.mark.parametrize("operator", [Ram(rescale=0.0), Ram(), Ram(rescale=1.0, most=3.0)])
def test_shared_numbers_are_averaged_and_unique_ones_rescaled(
    operator: Ram, experts: int, share: float
) -> None:
    deltas = sparse(experts, 150, share)
    base = torch.randn(150, generator=make_generator(9))
    c = torch.linspace(1.2, -0.4, experts).tolist()
    found = merge(operator, flat_vectors(base, deltas), c)[:150] - base
    expected = number_by_number(deltas, c, operator)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_experts_that_never_meet_are_kept_whole() -> None:
    # Averages would halve them, which is what the method is for.
    deltas = torch.zeros(2, 40)
    deltas[0, :20], deltas[1, 20:] = 1.0, -2.0
    base = torch.zeros(40)
    found = merge(Ram(rescale=0.5, most=1.0), flat_vectors(base, deltas), [1.0, 1.0])
    assert torch.equal(found[:40], deltas.sum(0))


def test_ratios_are_counted_in_the_model_or_in_each_tensor() -> None:
    vectors = hard_vectors(zeros=0.5)
    whole = merge(Ram(rescale=1.0, most=9.0), vectors, [1.0] * 3)
    each = merge(Ram(rescale=1.0, most=9.0, over="tensor"), vectors, [1.0] * 3)
    spots = torch.cat([torch.arange(s.offset, s.stop) for s in vectors.layout.slots])
    operator = Ram(rescale=1.0, most=9.0)
    expected = number_by_number(vectors.deltas[:, spots], [1.0] * 3, operator)
    found = (whole - vectors.base)[spots].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for slot in vectors.layout.slots:
        part = vectors.deltas[:, slot.offset : slot.stop]
        alone = number_by_number(part, [1.0] * 3, operator)
        found = (each - vectors.base)[slot.offset : slot.stop].double()
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5, msg=slot.name)
    assert not torch.allclose(whole, each)


@pytest.mark.parametrize("piece", [5, 1 << 20])
def test_counts_do_not_depend_on_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    vectors = hard_vectors(zeros=0.4)
    found = count_regions(vectors, 0.0)
    for counts, slot in zip(found, vectors.layout.slots, strict=True):
        active = vectors.deltas[:, slot.offset : slot.stop] != 0
        alone = active.sum(0) == 1
        assert counts[:, 1].tolist() == (active & alone).sum(1).tolist()
        assert counts.sum(1).tolist() == active.sum(1).tolist()


@given(st.integers(0, 1000), st.floats(0.0, 2.0))
def test_only_unique_numbers_are_rescaled(seed: int, rescale: float) -> None:
    deltas = sparse(3, 30, 0.4, seed)
    vectors = flat_vectors(torch.zeros(30), deltas)
    plain = merge(Ram(rescale=0.0), vectors, [1.0] * 3)[:30]
    found = merge(Ram(rescale=rescale, most=1.0), vectors, [1.0] * 3)[:30]
    users = (deltas.abs() > 1e-5).sum(0)
    assert torch.equal(found[users != 1], plain[users != 1])
    assert bool((found.abs() >= plain.abs() - 1e-6).all())


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match="threshold must be a number of at least 0, got -1"):
        Ram(threshold=-1)
    with pytest.raises(MergeError, match="over must be one of model, tensor, got 'layer'"):
        Ram(over="layer")
