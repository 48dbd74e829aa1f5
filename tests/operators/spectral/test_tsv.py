from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.vectors.operator import HasDerivatives, MergeOperator
from map_bo.operators.spectral.tsv import TSVM, task_singular_vectors
from tests.contracts.operator_contract import OperatorContract
from tests.operators.cases import hard_vectors, label, merge
from tests.operators.spectral.naive import svd, tsv_m


class TestTSVM(OperatorContract):
    storage_error = 1e-2

    @pytest.fixture(
        params=[TSVM(), TSVM(share=0.5, others="sum", blocks={"a": "first", "b": "*"})], ids=label
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    experts=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_matrices_are_merged_as_in_the_paper(
    shape: tuple[int, int], experts: int, seed: int
) -> None:
    if min(shape) < experts:  # the paper would keep no vector at all
        return
    vectors = hard_vectors(seed, experts, shapes={"w": shape, "b": (5,)})
    c = torch.linspace(-0.4, 1.2, experts, dtype=torch.float64)
    found = merge(TSVM(), vectors, c)
    slots = {slot.name: slot for slot in vectors.layout.slots}
    deltas = [slots["w"].of(delta) for delta in vectors.deltas]
    lengths = torch.stack([svd(d)[1] for d in deltas])
    keep = min(shape) // experts
    gaps = lengths[:, keep - 1] - lengths[:, keep] if keep < min(shape) else torch.ones(1)
    if float(gaps.min()) < 1e-3 or float(lengths[:, keep - 1].min()) < 1e-3:
        return  # which vectors are the leading ones is not determined
    expected = slots["w"].of(vectors.base).double() + tsv_m(deltas, c.tolist())
    torch.testing.assert_close(slots["w"].of(found).double(), expected, rtol=1e-4, atol=1e-4)
    others = torch.stack([slots["b"].of(delta) for delta in vectors.deltas]).double()
    expected = slots["b"].of(vectors.base).double() + c @ others / experts
    torch.testing.assert_close(slots["b"].of(found).double(), expected, rtol=1e-5, atol=1e-6)


def test_one_expert_is_merged_as_it_is() -> None:
    vectors = hard_vectors(0, 1)
    expected = vectors.base + 0.7 * vectors.deltas[0]
    torch.testing.assert_close(merge(TSVM(), vectors, [0.7]), expected, rtol=1e-4, atol=1e-5)


def test_merges_are_linear_in_the_coefficients() -> None:
    vectors = hard_vectors(1)
    prepared = TSVM(others="sum").prepare(vectors)
    out = torch.empty(4, vectors.layout.size)
    rows = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.3, -0.5, 0.9])
    for row, c in zip(out, rows, strict=True):
        prepared.write(torch.tensor(c), row)
    base = vectors.base
    expected = base + torch.tensor(rows[3]) @ (out[:3] - base)
    torch.testing.assert_close(out[3], expected, rtol=1e-5, atol=1e-5)
    assert isinstance(prepared, HasDerivatives)
    gradient = torch.linspace(-1, 1, vectors.layout.size)
    slopes = prepared.directional(gradient)
    expected = (out[:3] - base).double() @ gradient.double()
    torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-4)


def test_ready_matrices_are_orthogonal_to_each_other() -> None:
    vectors = hard_vectors(2, 3, shapes={"w": (12, 18)})
    slot = vectors.layout.slots[0]
    ready = [part.dense() for part in task_singular_vectors([slot.of(d) for d in vectors.deltas])]
    for i, first in enumerate(ready):
        assert int((svd(first)[1] > 1e-6).sum()) == 4  # 12 / 3
        for second in ready[:i]:
            assert float((first.T @ second).abs().max()) < 1e-9
            assert float((first @ second.T).abs().max()) < 1e-9


def test_a_smaller_share_keeps_fewer_vectors() -> None:
    vectors = hard_vectors(2, 2, shapes={"w": (20, 10)})
    slot = vectors.layout.slots[0]
    deltas = [slot.of(d) for d in vectors.deltas]
    assert [part.rank for part in task_singular_vectors(deltas, 0.3)] == [3, 3]
    assert [part.rank for part in task_singular_vectors(deltas, 0.0)] == [1, 1]
    assert [part.rank for part in task_singular_vectors(deltas)] == [5, 5]


def test_skipped_matrices_are_averaged() -> None:
    vectors = hard_vectors(3)
    found = merge(TSVM(skip=r"layer\.0"), vectors, [0.9, 0.3, 0.6])
    plain = merge(TSVM(), vectors, [0.9, 0.3, 0.6])
    mean = vectors.base + torch.tensor([0.3, 0.1, 0.2]) @ vectors.deltas
    for slot in vectors.layout.slots:
        if slot.name == "layer.0.weight":
            torch.testing.assert_close(slot.of(found), slot.of(mean), rtol=1e-5, atol=1e-6)
            assert not torch.allclose(slot.of(plain), slot.of(mean), atol=1e-3)
        else:
            assert torch.equal(slot.of(found), slot.of(plain))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 1.5}, "share must be a number between 0 and 1, got 1.5"),
        ({"others": "median"}, "others must be one of mean, sum, got 'median'"),
        ({"skip": "("}, "skip is not a regular expression"),
        ({"skip": 3}, "skip must be a regular expression, got 3"),
        ({"search": ["share"]}, "tsv_m cannot search 'share'"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(MergeError, match=message.replace("(", r"\(")) as caught:
        TSVM(**wrong)  # type: ignore[arg-type]
    assert caught.value.hint
