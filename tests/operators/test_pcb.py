from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.pcb import Pcb, competition
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, hard_vectors, label, merge


class TestPcb(OperatorContract):
    same_bits_mapped = False  # what resident task vectors add is kept
    storage_error = 5e-2  # which numbers are kept may change

    @pytest.fixture(params=[Pcb(), Pcb(density=0.3), Pcb(search=["density"])], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def by_sorting(deltas: Tensor, c: list[float], density: float) -> Tensor:
    """Return what PCB adds to the base: scores in full, sorted, in float64."""
    v = deltas.double()
    experts, size = v.shape
    magnitudes, limited = v.abs(), v.clone()
    for n in range(experts):
        order = magnitudes[n].sort().values
        low = float(order[size - max(1, int(size * (1 - 1e-4)))])
        high = float(order[size - max(1, int(size * 1e-4))])
        magnitudes[n].clamp_(low, high)
        limited[n].clamp_(-high, high)
    least, most = magnitudes.amin(1, keepdim=True), magnitudes.amax(1, keepdim=True)
    own = torch.exp(experts * ((magnitudes - least) / (most - least)) ** 2)
    scores = own * torch.tanh(v * v.sum(0))
    weights = torch.zeros_like(v)
    for n in range(experts):
        kept = float(scores[n].sort(descending=True).values[max(1, int(density * size)) - 1])
        kept = max(kept, 0.0) if density < 1 else 0.0
        weights[n] = ((scores[n] - kept) / (scores[n].max() - kept)).clamp_min(0)
    total = weights.sum(0)
    joined = (torch.tensor(c).double()[:, None] * weights * limited).sum(0)
    return torch.where(total > 0, joined / total.clamp_min(1e-300), 0.0)


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_it_is_the_published_rule(experts: int, density: float, size: float) -> None:
    deltas = size * torch.randn(experts, 400, generator=make_generator(experts))
    base = torch.zeros(400)
    c = torch.linspace(1.3, -0.5, experts).tolist()
    found = merge(Pcb(density=density), flat_vectors(base, deltas), c)[:400]
    expected = by_sorting(deltas, c, density)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4 * size)


def test_tensors_compete_with_each_other() -> None:
    vectors = hard_vectors(zeros=0.0)
    spots = torch.cat([torch.arange(s.offset, s.stop) for s in vectors.layout.slots])
    found = (merge(Pcb(density=0.3), vectors, [1.0, 0.5, 0.2]) - vectors.base)[spots]
    expected = by_sorting(vectors.deltas[:, spots], [1.0, 0.5, 0.2], 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)


def test_numbers_against_the_sum_never_move() -> None:
    deltas = torch.randn(3, 300, generator=make_generator(2))
    vectors = flat_vectors(torch.zeros(300), deltas)
    for n in range(3):
        moved = merge(Pcb(density=1.0), vectors, torch.eye(3)[n])[:300] != 0
        assert not bool((moved & (deltas[n] * deltas.sum(0) <= 0)).any())


@given(st.integers(0, 500), st.floats(0.05, 1.0))
def test_a_common_coefficient_stays_between_the_experts(seed: int, density: float) -> None:
    # Weights are shares, so that what moves lies within the range of the experts.
    deltas = torch.randn(3, 40, generator=make_generator(seed))
    found = merge(Pcb(density=density), flat_vectors(torch.zeros(40), deltas), [1.0] * 3)[:40]
    assert bool((found.abs() <= deltas.abs().amax(0) + 1e-5).all())


def test_many_experts_do_not_overflow() -> None:
    deltas = torch.randn(120, 30, generator=make_generator(3))
    found = merge(Pcb(), flat_vectors(torch.zeros(30), deltas), [1.0] * 120)
    assert bool(torch.isfinite(found).all())
    assert bool(found.any())


def test_an_expert_that_did_not_move_has_no_weight() -> None:
    deltas = torch.randn(2, 50, generator=make_generator(4))
    deltas[1] = 0
    vectors = flat_vectors(torch.zeros(50), deltas)
    assert torch.equal(
        merge(Pcb(density=0.5), vectors, [1.0, 0.0]), merge(Pcb(density=0.5), vectors, [1.0, 7.0])
    )


def test_scores_grow_with_magnitude_and_agreement() -> None:
    rows = torch.tensor([[0.1, 0.5, 1.0, 0.5], [0.1, 0.5, 1.0, -0.9]])
    scores = competition(rows, (0.0, 0.0), (1.0, 1.0))
    assert 0 < float(scores[0, 0]) < float(scores[0, 1]) < float(scores[0, 2])
    assert float(scores[0, 3]) == 0  # against the sum
    assert float(scores[0, 2]) == pytest.approx(math.tanh(2.0))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match=r"density must .* got -0\.1"):
        Pcb(density=-0.1)
