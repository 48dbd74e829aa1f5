from __future__ import annotations

import pytest
import torch

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.consensus import Consensus, task_masks
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import flat_vectors, label, merge


class TestConsensus(OperatorContract):
    storage_error = 5e-2

    @pytest.fixture(params=[Consensus(), Consensus(agreement=3, search=["strictness"])], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


@pytest.mark.parametrize("strictness", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_masks_and_consensus_are_those_of_the_paper(strictness: float, experts: int) -> None:
    # Multiples of 1/8: sums are exact, so that equality is decided alike.
    deltas = (torch.randn(experts, 200, generator=make_generator(0)) * 8).round() / 8
    masks = torch.zeros(experts, 200)
    for n in range(experts):
        for i in range(200):
            others = float(deltas[:, i].sum() - deltas[n, i])
            limit = torch.tensor(abs(others)) * strictness
            masks[n, i] = float(abs(deltas[n, i]) >= limit)
    assert torch.equal(task_masks(deltas, strictness), masks)
    base = torch.randn(200, generator=make_generator(1))
    c = torch.linspace(-0.5, 1.0, experts)
    for agreement in range(1, experts + 1):
        operator = Consensus(strictness=strictness, agreement=agreement)
        chosen = masks.sum(0) >= agreement
        expected = base + chosen * (c[:, None] * deltas).sum(0)
        found = merge(operator, flat_vectors(base, deltas), c)
        assert torch.allclose(found[:200], expected, atol=1e-6)
        assert torch.equal(found[:200][~chosen], base[~chosen])
