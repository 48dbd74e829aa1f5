from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas, MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.sparse import Ties
from map_bo.operators.spectral.knots import AlignedVectors, KnOTS, align
from map_bo.rng import make_generator
from tests.contracts.operator_contract import OperatorContract
from tests.merging.adapter_files import as_dense, small_adapters, small_base
from tests.operators.cases import chunked, hard_vectors, label, merge, write
from tests.operators.spectral.naive import svd


class TestKnOTS(OperatorContract):
    storage_error = 0.1  # numbers near a threshold are kept or not

    @pytest.fixture(
        params=[
            KnOTS(),
            KnOTS(trim="tensor", weighted=False, joining="sum", search=["density", "scale"]),
        ],
        ids=label,
    )
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        made: MergeOperator = request.param
        return made


def naive(deltas: list[Tensor], c: list[float], density: float, *, weighted: bool = True) -> Tensor:
    """Return the change of one matrix by KnOTS with TIES, as the paper has it."""
    U, s, Vh = svd(torch.cat(deltas, dim=1))
    kept = s > 1e-5 * s[0]
    U, s, Vh = U[:, kept], s[kept], Vh[kept]
    parts = torch.stack((torch.diag(s) @ Vh if weighted else Vh).chunk(len(deltas), dim=1))
    flat = parts.flatten(1)
    for row in flat:
        limit = row.abs().sort(descending=True).values[max(1, int(density * len(row))) - 1]
        row[row.abs() < limit - 1e-12] = 0.0
    sign = torch.where(flat.sum(0) >= 0, 1.0, -1.0).double()
    agree = flat.sign() == sign
    merged = (torch.tensor(c).double()[:, None] * flat * agree).sum(0) / agree.sum(0).clamp_min(1)
    basis = U if weighted else U @ torch.diag(s)
    result: Tensor = basis @ merged.view(len(s), -1)
    return result


def low_rank(rows: int, columns: int, rank: int, seed: int) -> LowRank:
    generator = make_generator(seed)
    draw = [torch.randn(size, generator=generator) for size in ((rows, rank), (rank, columns))]
    return LowRank(draw[0], draw[1], 0.5)


@settings(deadline=None, max_examples=8)  # sketches of magnitudes take a while
@given(
    shape=st.tuples(st.integers(2, 14), st.integers(2, 14)),
    experts=st.integers(1, 4),
    seed=st.integers(0, 99),
    weighted=st.booleans(),
)
def test_matrices_are_merged_as_in_the_paper(
    shape: tuple[int, int], experts: int, seed: int, weighted: bool
) -> None:
    vectors = hard_vectors(seed, experts, shapes={"w": shape}, zeros=0.0)
    slot = vectors.layout.slots[0]
    c = torch.linspace(0.2, 1.2, experts).tolist()
    operator = KnOTS(density=0.4, weighted=weighted)
    aligned = AlignedVectors(vectors, weighted=weighted)
    rows = aligned.read(0, 0, aligned.layout.slots[0].numel)[1:]
    ordered = rows.abs().sort(dim=1, descending=True).values
    edge = max(1, int(0.4 * rows.shape[1]))
    at_threshold = (ordered[:, edge - 1] - ordered[:, min(edge, rows.shape[1] - 1)]).min()
    if float(at_threshold) < 1e-4 or float(rows.sum(0).abs().min()) < 1e-5:
        return  # rounding decides what is kept, or on which side
    found = slot.of(merge(operator, vectors, c)).double()
    deltas = [slot.of(delta).double() for delta in vectors.deltas]
    expected = slot.of(vectors.base).double() + naive(deltas, c, 0.4, weighted=weighted)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_basis_and_parts_make_the_changes_again(
    rows: int, columns: int, ranks: list[int], weighted: bool, seed: int
) -> None:
    changes = [low_rank(rows, columns, rank, seed + i) for i, rank in enumerate(ranks)]
    dense = [change.dense() for change in changes]
    for given_ in (changes, dense):
        basis, parts = align(given_, weighted)
        assert basis.shape[1] == parts.shape[1] <= min(rows, sum(ranks))
        for part, change in zip(parts, dense, strict=True):
            torch.testing.assert_close(basis @ part, change.double(), rtol=1e-4, atol=1e-4)
        if weighted:
            one = torch.eye(basis.shape[1], dtype=torch.float64)
            torch.testing.assert_close(basis.T @ basis, one, rtol=0, atol=1e-5)


def test_a_sum_of_everything_is_task_arithmetic() -> None:
    vectors = hard_vectors(0)
    c = torch.tensor([0.5, -0.3, 0.9])
    expected = torch.empty(vectors.layout.size)
    TaskArithmetic().prepare(vectors).write(c, expected)
    for weighted in (True, False):
        found = merge(KnOTS(density=1.0, joining="sum", weighted=weighted), vectors, c)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_matrix_is_merged_by_ties() -> None:
    vectors = hard_vectors(0, shapes={"a": (7, 2, 3), "b": (11,), "c": (5, 4)})
    c = [0.5, 0.2, 0.9]
    for skip, same in ((None, ("a", "b")), ("c", ("a", "b", "c"))):
        ties, found = (
            merge(o, vectors, c) for o in (Ties(trim="tensor"), KnOTS(trim="tensor", skip=skip))
        )
        for slot in vectors.layout.slots:
            assert torch.equal(slot.of(ties), slot.of(found)) == (slot.name in same)


@pytest.mark.parametrize("search", [(), ["density"]])
@pytest.mark.parametrize("kind", ["adapters", "dense", "short", "on disk", "dense on disk"])
def test_wherever_task_vectors_are(kind: str, search: list[str], tmp_path: Path) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    whole = {name: as_dense(e) for name, e in adapters.items()}
    vectors = TaskVectors.load(base, adapters)
    found: dict[str, Deltas] = {
        "adapters": vectors,
        "dense": TaskVectors.load(base, whole),
        "short": replace(TaskVectors.load(base, whole), spare_memory=False),
        "on disk": OnDiskVectors(base, adapters),
        "dense on disk": OnDiskVectors(base, whole),
    }
    operator = KnOTS(density=0.5, search=search)
    c = [0.8, 0.3, 0.5, 0.4][: 3 + len(search)]
    expected = merge(operator, vectors, c)
    assert not torch.allclose(expected, vectors.base, atol=1e-2)
    result = write(chunked(operator.prepare(found[kind]), 20), vectors, c)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_only_what_changes_is_ranked(tmp_path: Path) -> None:
    base = small_base()
    adapters = {"math": small_adapters(tmp_path, base)["math"]}
    for vectors in (TaskVectors.load(base, adapters), OnDiskVectors(base, adapters)):
        aligned = AlignedVectors(vectors)
        sizes = {slot.name: slot.numel for slot in aligned.layout.slots}
        assert sizes == {
            "layers.0.fc.weight": 2 * 5,
            "layers.0.fc.bias": 6,
            "layers.0.norm.running_var": 0,
            "layers.1.fc.weight": 2 * 7,
            "layers.1.conv.weight": 0,
            "head.weight": 0,
        }
        found = merge(KnOTS(), vectors, [1.0])
        for slot in vectors.layout.slots:
            if not sizes[slot.name]:
                assert torch.equal(slot.of(found), base.load(slot.name))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(MergeError, match="weighted must be true or false, got 'yes'") as caught:
        KnOTS(weighted="yes")  # type: ignore[arg-type]
    assert caught.value.hint
    with pytest.raises(MergeError, match="skip is not a regular expression"):
        KnOTS(skip="(")
    with pytest.raises(MergeError, match="density"):
        KnOTS(density=2.0)
