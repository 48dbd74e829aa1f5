from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import HasDerivatives, MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.spectral import isotropic
from map_bo.operators.spectral.isotropic import (
    IsoC,
    IsoCTS,
    common_and_specific,
    flatten,
)
from map_bo.operators.spectral.singular import inverse_root
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.merging.adapter_files import as_dense, small_adapters, small_base
from tests.operators.cases import chunked, hard_vectors, label, merge, write
from tests.operators.spectral.naive import iso_c, iso_cts, svd

shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))


class TestIsoC(OperatorContract):
    storage_error = 2e-2

    @pytest.fixture(params=[IsoC(), IsoC(others="sum", blocks={"a": "first", "b": "*"})], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


class TestIsoCTS(OperatorContract):
    storage_error = 2e-2

    @pytest.fixture(params=[IsoCTS(), IsoCTS(common=0.5)], ids=label)
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


@settings(deadline=None, max_examples=40)
@given(shape=shapes, experts=st.integers(1, 4), seed=st.integers(0, 99))
def test_iso_c_is_that_of_the_paper(shape: tuple[int, int], experts: int, seed: int) -> None:
    vectors = hard_vectors(seed, experts, shapes={"w": shape, "b": (5,)})
    slots = {slot.name: slot for slot in vectors.layout.slots}
    deltas = [slots["w"].of(delta) for delta in vectors.deltas]
    c = torch.linspace(-0.4, 1.2, experts, dtype=torch.float64)
    s = svd(torch.stack(deltas).double().mul(c[:, None, None]).sum(0))[1]
    if float(s.min()) < 1e-3 * float(s.max()):
        return  # to which side a value near zero belongs is not determined
    found = merge(IsoC(), vectors, c)
    expected = slots["w"].of(vectors.base).double() + iso_c(deltas, c.tolist())
    torch.testing.assert_close(slots["w"].of(found).double(), expected, rtol=1e-5, atol=1e-5)
    others = torch.stack([slots["b"].of(delta) for delta in vectors.deltas]).double()
    expected = slots["b"].of(vectors.base).double() + c @ others / experts
    torch.testing.assert_close(slots["b"].of(found).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (30, 30)])
@pytest.mark.parametrize("ratio", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_spectrum_is_flat_however_steep_it_was(shape: tuple[int, int], ratio: float) -> None:
    """The exactness that is promised: relative to the level, by the condition of the matrix."""
    generator = make_generator(0)
    U = torch.linalg.qr(torch.randn(shape[0], 30, generator=generator).double()).Q
    V = torch.linalg.qr(torch.randn(shape[1], 30, generator=generator).double()).Q
    s = torch.logspace(0, torch.tensor(ratio).log10().item(), 30, dtype=torch.float64)
    found = flatten(U @ torch.diag(s) @ V.T)
    level = float(s.mean())
    torch.testing.assert_close(
        found, level * U @ V.T, rtol=0, atol=1e-15 * level / ratio**2 + 1e-12
    )


def test_a_matrix_of_low_rank_stays_in_its_span() -> None:
    generator = make_generator(0)
    X = torch.randn(20, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    found = flatten(X.double())
    U, s, Vh = svd(X)
    torch.testing.assert_close(found, s[:3].mean() * U[:, :3] @ Vh[:3], rtol=1e-5, atol=1e-6)
    nothing = torch.zeros(4, 3, dtype=torch.float64)
    assert torch.equal(flatten(nothing), nothing)


def test_adapters_are_flattened_by_their_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    c = [0.8, -0.3, 0.5]
    whole = TaskVectors.load(base, {name: as_dense(e) for name, e in adapters.items()})
    expected = merge(IsoC(), whole, c)
    for vectors in (TaskVectors.load(base, adapters), OnDiskVectors(base, adapters)):
        for chunk in (1, 10, 1000):
            found = write(chunked(IsoC().prepare(vectors), chunk), vectors, c)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    sizes = []

    def recorded(gram: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(gram))
        return inverse_root(gram)

    monkeypatch.setattr(isotropic, "inverse_root", recorded)
    merge(IsoC(), TaskVectors.load(base, adapters), c)
    # The first two are changed by one adapter of rank 2; the last by two of rank 3 and 2, and the
    # one between by a whole matrix too, of 40 x 7.
    assert sorted(sizes) == [2, 5, 7]


@given(factor=st.floats(0.1, 3.0), seed=st.integers(0, 20))
@settings(deadline=None, max_examples=15)
def test_iso_c_is_homogeneous(factor: float, seed: int) -> None:
    vectors = hard_vectors(seed)
    c = torch.tensor([0.3, -0.2, 0.8], dtype=torch.float64)
    once, more = (merge(IsoC(), vectors, k * c) - vectors.base for k in (1.0, factor))
    torch.testing.assert_close(more, factor * once, rtol=1e-4, atol=1e-5)


def test_no_singular_value_decomposition_is_made_for_a_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an SVD")

    vectors = hard_vectors(0)
    prepared = [operator.prepare(vectors) for operator in (IsoC(), IsoCTS())]
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    monkeypatch.setattr(torch, "svd", refuse)
    for each in prepared:
        out = torch.empty(vectors.layout.size)
        each.write(torch.tensor([0.3, 0.2, 0.9]), out)
        assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_pieces_of_any_length_give_the_same_bits(chunk: int) -> None:
    vectors = hard_vectors(5)
    c = [0.4, 0.1, -0.3]
    whole = write(IsoC().prepare(vectors), vectors, c)
    assert torch.equal(write(chunked(IsoC().prepare(vectors), chunk), vectors, c), whole)


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    experts=st.integers(1, 4),
    seed=st.integers(0, 99),
    common=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
)
def test_iso_cts_is_that_of_the_paper_where_coefficients_are_equal(
    shape: tuple[int, int], experts: int, seed: int, common: float
) -> None:
    generator = make_generator(seed)
    deltas = [torch.randn(shape, generator=generator) for _ in range(experts)]
    size = min(shape)
    specific = round((size - int(size * common)) / experts)
    shared = size - specific * experts
    if shared < 0:
        return
    s = svd(torch.stack(deltas).double().sum(0))[1]
    if 0 < shared < size and float(s[shared - 1] - s[shared]) < 1e-2:
        return  # which vectors are common is not determined
    U0 = svd(torch.stack(deltas).double().sum(0))[0][:, :shared]
    for delta in deltas:
        rest = svd(delta.double() - U0 @ U0.T @ delta.double())[1]
        # Of what is left of a matrix, as many values are zero as are common.
        if specific and float(rest[specific - 1]) < 1e-2:
            return
        if 0 < specific < size and float(rest[specific - 1] - rest[specific]) < 1e-2:
            return
    ready = common_and_specific(deltas, common)
    found = torch.stack([part.dense() for part in ready]).sum(0)
    torch.testing.assert_close(found, iso_cts(deltas, common), rtol=1e-4, atol=1e-4)
    as_factors = [LowRank(torch.eye(shape[0]), delta) for delta in deltas]
    again = torch.stack([part.dense() for part in common_and_specific(as_factors, common)]).sum(0)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-6)


def test_iso_cts_is_linear_and_experts_differ_in_their_own_part() -> None:
    vectors = hard_vectors(1, shapes={"w": (24, 20)})
    base = vectors.base
    one, other, both, mean = (
        merge(IsoCTS(), vectors, c) - base
        for c in ([1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, 0], [1.0, 1.0, 1.0])
    )
    torch.testing.assert_close(one + other, both, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-3)
    slot = vectors.layout.slots[0]
    flat = svd(slot.of(mean))[1]
    torch.testing.assert_close(flat, flat.mean().expand_as(flat), rtol=1e-4, atol=1e-5)
    # 0.8 of 20 are 16, and the other 4 are rounded to 1 each: 17 common ones, a third of each.
    values = svd(slot.of(one))[1] / flat.mean()
    expected = torch.tensor([1.0] + [1 / 3] * 17 + [0.0] * 2, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
    assert isinstance(IsoCTS().prepare(vectors), HasDerivatives)
    assert not isinstance(IsoC().prepare(vectors), HasDerivatives)


def test_equal_experts_have_nothing_of_their_own() -> None:
    delta = torch.randn(8, 6, generator=make_generator(0))
    ready = common_and_specific([delta, delta], 0.5)
    found = torch.stack([part.dense() for part in ready]).sum(0)
    # What is outside the common vectors is the same for both: half of it is left out.
    assert bool(torch.isfinite(found).all())
    one = common_and_specific([delta, delta], 1.0)
    total = torch.stack([part.dense() for part in one]).sum(0)
    torch.testing.assert_close(total, iso_c([delta, delta], [1.0, 1.0]), rtol=1e-6, atol=1e-6)


def test_common_is_a_share() -> None:
    with pytest.raises(
        MergeError, match="common must be a number between 0 and 1, got 2"
    ) as caught:
        IsoCTS(common=2.0)
    assert caught.value.hint


@pytest.mark.parametrize(("size", "experts"), [(3, 2), (7, 4), (6, 4)])
def test_iso_cts_has_no_more_vectors_than_the_matrix(size: int, experts: int) -> None:
    """The experts' shares, rounded up, are more than there is room for without a common one."""
    generator = make_generator(size)
    changes = [torch.randn(size, size, generator=generator) for _ in range(experts)]
    for ready in common_and_specific(changes, 0.0):
        assert ready.rank == size % experts + size // experts  # common, then its own
