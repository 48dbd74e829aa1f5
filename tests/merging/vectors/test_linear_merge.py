"""The fast path of task arithmetic; its laws are in ``test_task_arithmetic``."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.linear_merge import (
    LinearMerge,
    TaskArithmetic,
    coefficient_table,
    segments,
)
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.contracts.operator_contract import example_vectors
from tests.operators.cases import hard_vectors

BLOCKS = {"layers": r"^layer\.", "rest": "*"}


def merged(linear: LinearMerge, vectors: TaskVectors, c: torch.Tensor) -> torch.Tensor:
    out = torch.full((vectors.layout.size,), torch.nan)
    linear.write(c, out)
    return out


@pytest.mark.parametrize("blocks", [None, BLOCKS, {"odd": "0|one", "even": "*"}])
def test_segments_cover_the_layout_and_join_neighbours(blocks: dict[str, str] | None) -> None:
    vectors = hard_vectors()  # with tensors of no numbers, alone between two of another block
    found = segments(Blocks(blocks), vectors.layout)
    assert found[0][0] == 0
    assert found[-1][1] == vectors.layout.size
    assert all(start < stop for start, stop, _ in found)
    assert all(first[1] == second[0] for first, second in itertools.pairwise(found))
    for slot in vectors.layout.slots:
        if slot.numel:
            [own] = [b for start, stop, b in found if start <= slot.offset < stop]
            assert own == Blocks(blocks).of(slot.name)


def test_table_is_by_block() -> None:
    table = coefficient_table(torch.tensor([1.0, 2, 3, 4, 5, 6]), 3, 2)
    assert table.tolist() == [[1, 3, 5], [2, 4, 6]]
    with pytest.raises(MergeError, match=r"must have shape \(6,\)"):
        coefficient_table(torch.ones(5), 3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_is_the_weighted_sum_with_empty_tensors(
    dtype: torch.dtype, blocks: dict[str, str] | None
) -> None:
    vectors = hard_vectors(dtype=dtype)
    table = Blocks(blocks)
    c = torch.linspace(-1, 1.5, 3 * len(table))
    found = merged(LinearMerge(vectors, segments(table, vectors.layout), len(table)), vectors, c)
    rows = vectors.rows.double()
    for slot in vectors.layout.slots:
        own = c.view(3, len(table))[:, table.of(slot.name)].double()
        part = rows[:, slot.offset : slot.stop]
        assert torch.allclose(
            slot.of(found).flatten().double(), part[0] + own @ part[1:], atol=1e-5
        )


@given(st.integers(1, 700), st.integers(1, 700))
def test_threads_tiles_and_chunks_of_bfloat16(tile: int, chunk: int) -> None:
    vectors = hard_vectors(dtype=torch.bfloat16)
    whole = segments(Blocks(), vectors.layout)
    c = torch.tensor([0.3, -0.8, 1.2])
    expected = merged(LinearMerge(vectors, whole), vectors, c)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = merged(LinearMerge(vectors, whole, tile=tile, chunk=chunk), vectors, c)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_prepared_by_task_arithmetic() -> None:
    prepared = TaskArithmetic().prepare(example_vectors())
    assert isinstance(prepared, LinearMerge)
