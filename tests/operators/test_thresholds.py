from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators import thresholds as module
from map_bo.operators.thresholds import TRIMS, ceilings, kept_count, sketches, thresholds
from tests.operators.cases import hard_vectors

DENSITIES = [1e-6, 0.05, 0.2, 0.5, 0.9, 0.999]


def magnitudes(vectors: TaskVectors, expert: int, slot: int, trim: str) -> Tensor:
    """Return the numbers that are ranked together, by falling magnitude."""
    slots = vectors.layout.slots if trim == "global" else [vectors.layout.slots[slot]]
    parts = [vectors.deltas[expert, s.offset : s.stop].float().abs() for s in slots]
    return torch.cat(parts).sort(descending=True).values


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def vectors(request: pytest.FixtureRequest) -> TaskVectors:
    return hard_vectors(dtype=request.param)


@pytest.mark.parametrize("trim", TRIMS)
@pytest.mark.parametrize("piece", [10, 1 << 20])
def test_are_those_of_sorting(
    vectors: TaskVectors, trim: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    for density in DENSITIES:
        low, high = thresholds(vectors, density, trim), ceilings(vectors, density, trim)
        for slot in range(len(vectors.layout.slots)):
            for expert in range(3):
                ranked = magnitudes(vectors, expert, slot, trim)
                n = len(ranked)
                if not n:
                    continue
                assert low[slot][expert] == float(ranked[max(1, int(density * n)) - 1])
                gone = int(density * n)
                assert high[slot][expert] == (float(ranked[gone]) if gone < n else 0.0)


@pytest.mark.parametrize("trim", TRIMS)
def test_nothing_and_all(vectors: TaskVectors, trim: str) -> None:
    assert set(sum(thresholds(vectors, 0.0, trim), ())) == {math.inf}
    assert set(sum(thresholds(vectors, 1.0, trim), ())) == {0.0}
    assert set(sum(ceilings(vectors, 0.0, trim), ())) == {math.inf}
    assert set(sum(ceilings(vectors, 1.0, trim), ())) == {0.0}


@pytest.mark.parametrize("trim", TRIMS)
def test_sketches_are_near_the_exact_thresholds(vectors: TaskVectors, trim: str) -> None:
    found = sketches(vectors, trim)
    assert len(found) == len(vectors.layout.slots)
    for slot, row in enumerate(found):
        for expert, sketch in enumerate(row):
            ranked = magnitudes(vectors, expert, slot, trim)
            assert sketch.total == len(ranked)
            for density in DENSITIES if len(ranked) else ():
                kept = int((ranked >= sketch.threshold(density)).sum())
                exact = kept_count(density, len(ranked))
                assert abs(kept - exact) <= sketch.error * len(ranked) + 1


def test_models_of_empty_tensors_alone() -> None:
    vectors = hard_vectors(shapes={"a": (0,), "b": (2, 3)})
    for trim in TRIMS:
        assert len(thresholds(vectors, 0.5, trim)) == 2
        assert sketches(vectors, trim)[0][0].total == (6 if trim == "global" else 0)


def test_threads_find_the_same(vectors: TaskVectors, monkeypatch: pytest.MonkeyPatch) -> None:
    # Exactly: what threads add up are counts.
    monkeypatch.setattr(module, "_PIECE", 8)
    alone = [thresholds(vectors, 0.3, trim) for trim in TRIMS]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [thresholds(vectors, 0.3, trim) for trim in TRIMS] == alone
    finally:
        torch.set_num_threads(before)
