from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators import thresholds as module
from map_bo.operators.thresholds import (
    TRIMS,
    MagnitudeSketch,
    Scores,
    bins_within,
    ceilings,
    kept_count,
    locate,
    magnitude_bins,
    magnitude_of,
    sketches,
    thresholds,
)
from map_bo.rng import make_generator
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


def distributions() -> dict[str, Tensor]:
    generator = make_generator(0)
    normal = torch.randn(5000, generator=generator)
    return {
        "normal": normal,
        "heavy tails": normal / torch.randn(5000, generator=generator).abs(),
        "ties": (normal * 4).round() / 4,
        "bfloat16": (normal * 1e-3).bfloat16().float(),
        "mostly zeros": normal * (torch.rand(5000, generator=generator) < 0.1),
        "zeros": torch.zeros(100),
        "negative zeros": -torch.zeros(10),
        "all equal": torch.full((1000,), -0.3),
        "one": torch.tensor([0.7]),
        "two": torch.tensor([-0.7, 0.1]),
        "denormals": normal * 1e-41,
        "tiny and huge": torch.cat([normal * 1e-30, normal[:50] * 1e37]),
        "largest": torch.tensor([3.4028235e38, -3.4028235e38, 1.0, 0.0]),
        "few bins": 1 + torch.rand(5000, generator=generator) * 1e-3,
    }


every = pytest.mark.parametrize("values", distributions().values(), ids=distributions().keys())
SHARES = [0.0, 1e-9, 1e-4, 0.007, 0.05, 0.143, 0.2, 0.5, 0.731, 0.99, 0.9999, 1.0]
numbers = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60
)


def largest(values: Tensor, k: int, pieces: int = 1) -> float:
    parts = values.chunk(pieces)
    bin_, left = locate(sum((magnitude_bins(part) for part in parts), torch.zeros(1)), k)
    within = sum((bins_within(part, bin_) for part in parts), torch.zeros(1))
    return magnitude_of(bin_, locate(within, left)[0])


@every
def test_exact_magnitudes_are_those_of_sorting(values: Tensor) -> None:
    ranked = values.abs().sort(descending=True).values
    n = len(values)
    for k in {1, 2, n // 7, n // 2, n - 1, n}:
        if 1 <= k <= n:
            assert largest(values, k, 3) == float(ranked[k - 1])


@given(numbers, st.data())
def test_exact_magnitudes_of_any_numbers(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    tensor = torch.tensor(values, dtype=torch.float32)
    assert largest(tensor, k, 2) == float(tensor.abs().topk(k).values[-1])


@every
def test_the_stated_error_bounds_what_is_kept(values: Tensor) -> None:
    sketch = MagnitudeSketch.of(magnitude_bins(values))
    assert sketch.total == len(values)
    for density in [*SHARES, *torch.linspace(0, 1, 201).tolist()]:
        kept = float((values.abs() >= sketch.threshold(density)).double().mean())
        assert abs(kept - density) <= sketch.error + 1e-9
        gone = float((values.abs() > sketch.ceiling(density)).double().mean())
        assert abs(gone - density) <= sketch.error + 1e-9


def test_the_error_is_small_where_numbers_differ() -> None:
    found = {
        name: MagnitudeSketch.of(magnitude_bins(values)).error
        for name, values in distributions().items()
    }
    assert found["normal"] < 3e-3
    assert found["heavy tails"] < 3e-3
    assert found["all equal"] == 1.0


@every
def test_thresholds_fall_and_sizes_are_bounded(values: Tensor) -> None:
    sketch = MagnitudeSketch.of(magnitude_bins(values))
    densities = sorted([*SHARES, *torch.linspace(0, 1, 301).tolist()])
    for found in (sketch.threshold, sketch.ceiling):
        limits = [found(density) for density in densities]
        assert limits == sorted(limits, reverse=True)
    assert sketch.threshold(0.0) == sketch.ceiling(0.0) == math.inf
    assert sketch.threshold(1.0) == 0.0
    assert len(sketch.knots) == len(sketch.shares) <= 1025


def test_a_ceiling_leaves_equal_numbers() -> None:
    sketch = MagnitudeSketch.of(magnitude_bins(torch.full((1000,), 0.3)))
    assert sketch.ceiling(0.01) >= 0.3
    alone = MagnitudeSketch.of(magnitude_bins(torch.tensor([0.3])))
    assert alone.ceiling(0.01) == math.inf


def test_sketch_of_nothing() -> None:
    sketch = MagnitudeSketch.of(magnitude_bins(torch.zeros(0)))
    assert (sketch.total, sketch.error) == (0, 0.0)
    assert sketch.threshold(0.5) == 0.0
    assert sketch.ceiling(0.5) == math.inf


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_kept_count_is_the_floor_and_at_least_one(total: int, density: float) -> None:
    kept = kept_count(density, total)
    assert 0 <= kept <= total
    assert (kept == 0) == (total == 0 or density == 0)
    if kept > 1:
        assert kept <= density * total * (1 + 1e-9) < kept + 1.0001
    assert kept_count(density, total, least=0) in (kept, 0)


def test_kept_count_of_products_just_below_whole_numbers() -> None:
    assert kept_count(0.29, 100) == 29
    assert kept_count(0.07, 100) == 7
    assert kept_count(0.001, 100) == 1
    assert kept_count(0.001, 100, least=0) == 0
    assert kept_count(1.0, 3) == 3


@given(numbers)
def test_bins_count_all_numbers(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    counts = magnitude_bins(tensor)
    assert int(counts.sum()) == len(values)
    assert torch.equal(counts, magnitude_bins(-tensor))


class TestScores:
    def test_thresholds_of_scores_are_those_of_the_numbers_that_they_are(self) -> None:
        vectors = hard_vectors(zeros=0.0)
        scores = Scores(vectors, ("sum", "first"), lambda r: torch.stack([r[1:].sum(0), r[1]]))
        assert scores.experts == ("sum", "first")
        for slot, found in zip(
            vectors.layout.slots, thresholds(scores, 0.3, "tensor"), strict=True
        ):
            part = vectors.deltas[:, slot.offset : slot.stop]
            for row, limit in zip((part.sum(0), part[0]), found, strict=True):
                if slot.numel:
                    count = max(1, int(0.3 * slot.numel))
                    kept = row.abs().sort(descending=True).values[count - 1]
                    assert limit == pytest.approx(float(kept), rel=1e-6)

    def test_shares_may_be_of_fewer_numbers(self) -> None:
        vectors = hard_vectors(zeros=0.5)
        counts = [
            int((vectors.deltas[0, s.offset : s.stop] != 0).sum()) for s in vectors.layout.slots
        ]
        one = Scores(vectors, ("first",), lambda rows: rows[1:2])
        found = thresholds(one, 0.4, "tensor", counts=counts)
        for slot, count, (limit,) in zip(vectors.layout.slots, counts, found, strict=True):
            row = vectors.deltas[0, slot.offset : slot.stop].abs()
            if count:
                kept = row.sort(descending=True).values[max(1, int(0.4 * count)) - 1]
                assert limit == float(kept), slot.name
