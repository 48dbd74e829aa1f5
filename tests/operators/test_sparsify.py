from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.kernel import KernelMerge
from map_bo.merging.vectors.parallel import arena
from map_bo.operators import sparsify as module
from map_bo.operators.random_mask import LEVELS, uniform_levels
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude
from map_bo.operators.sparsify import (
    KeptEffects,
    RankDrop,
    drop,
    element_keys,
    keep_band,
    keep_largest,
    magnitude_ranks,
    rank_all,
    rank_drop,
    row_width,
)
from map_bo.rng import make_generator
from tests.operators.cases import hard_vectors, write

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows_of = st.lists(floats, min_size=1, max_size=20).map(lambda v: torch.tensor(v)[None])
limits = st.one_of(floats.map(abs), st.just(math.inf))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed))


@given(rows_of, limits)
def test_keep_largest(rows: Tensor, limit: float) -> None:
    expected = torch.where(rows.abs() >= limit, rows, 0.0)
    assert torch.equal(keep_largest(rows, [limit]), expected)
    among = float(rows[0, 0].abs())  # what equals the threshold stays
    assert torch.equal(keep_largest(rows, [among]), rows.where(rows.abs() >= among, 0.0))


@given(rows_of, limits, limits)
def test_keep_band(rows: Tensor, low: float, high: float) -> None:
    sizes = rows.abs()
    expected = torch.where((sizes >= low) & (sizes <= high), rows, 0.0)
    assert torch.equal(keep_band(rows, [low], [high]), expected)


def test_every_row_has_its_own_limits() -> None:
    rows = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert keep_largest(rows, [2.0, 3.0]).tolist() == [[0, 2, 3], [0, 0, 3]]
    assert keep_band(rows, [0.0, 2.0], [1.0, 2.5]).tolist() == [[1, 0, 0], [0, 2, 0]]


@pytest.mark.parametrize("rate", [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_drop_given_the_mask(rate: float) -> None:
    rows = normal(2, 1001)
    level = min(round(rate * LEVELS), LEVELS - 1)
    found = drop(rows, [5, 6], 17, rate)
    for row, out, key in zip(rows, found, (5, 6), strict=True):
        mask = uniform_levels([key], 17, 17 + 1001)[0].int() + LEVELS // 2 >= level
        expected = torch.where(mask, row.double() * LEVELS / (LEVELS - level), 0.0)
        assert torch.allclose(out.double(), expected, rtol=1e-6)
    if rate == 0:
        assert torch.equal(found, rows)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drop_has_the_row_as_expectation(rate: float) -> None:
    n = 1 << 18
    found = drop(torch.ones(1, n), [11], 0, rate)
    assert abs(float((found == 0).double().mean()) - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    spread = (rate / (1 - rate) / n) ** 0.5
    assert abs(float(found.double().mean()) - 1) < 4 * spread


@pytest.mark.parametrize("width", [1, 2, 3, 64, 1000])
def test_ranks_are_those_of_sorting(width: int) -> None:
    rows = (normal(3, width * 5) * 4).round() / 4  # with ties, which go by the index
    ranks = magnitude_ranks(rows, width).to(torch.int64) + LEVELS // 2
    sizes = rows.abs().view(3, 5, width)
    order = sizes.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(width).expand_as(order))
    assert torch.equal(ranks.view_as(place), place * LEVELS // width)


def test_ranks_of_long_rows_and_in_inference_mode() -> None:
    rows = normal(1, 200_000)
    with torch.inference_mode():
        ranks = magnitude_ranks(rows.clone(), 200_000).to(torch.int64) + LEVELS // 2
    order = rows.abs().sort(descending=True, stable=True).indices[0]
    assert torch.equal(ranks[0, order], torch.arange(200_000) * LEVELS // 200_000)


def test_magprune_drops_by_rank() -> None:
    n, rate, width = 1 << 19, 0.6, 0.4
    row = normal(1, n)
    ranks = magnitude_ranks(row, n)
    found = rank_drop(row, ranks, [3], 0, rate, width)[0]
    order = row[0].abs().argsort(descending=True)
    parts = 16
    for k, part in enumerate(order.chunk(parts)):
        expected = rate - width / 2 + width * (k + 0.5) / parts
        dropped = float((found[part] == 0).double().mean())
        bound = 4 * (expected * (1 - expected) / len(part)) ** 0.5
        assert abs(dropped - expected) < bound
        # What stays is divided by 1 - p_r, so that the expectation is the row.
        ratio = found[part].double() / row[0, part].double()
        assert abs(float(ratio.mean()) - 1) < 4 * (expected / (1 - expected) / len(part)) ** 0.5
    kept = found != 0
    p = rate - width / 2 + width * (ranks[0].double() + LEVELS / 2) / LEVELS
    assert torch.allclose(found[kept].double(), (row[0].double() / (1 - p))[kept], rtol=1e-5)


def test_magprune_without_width_is_drop() -> None:
    rows = normal(2, 300)
    found = rank_drop(rows, magnitude_ranks(rows, 100), [1, 2], 8, 0.25, 0.0)
    assert torch.allclose(found, drop(rows, [1, 2], 8, 0.25), rtol=1e-6)


def test_width_of_rows() -> None:
    shapes = [
        (),
        (0,),
        (7,),
        (5, 6),
        (2, 5, 6),
        (8, 4, 3, 3),
        (8, 4, 1, 1),
        (3, 0),
        (2, 3, 2, 2, 2),
    ]
    assert [row_width(shape) for shape in shapes] == [1, 0, 7, 6, 6, 36, 4, 0, 24]


def test_ranks_kept_and_ranked_anew_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = hard_vectors()
    widths = tuple(row_width(slot.shape) for slot in vectors.layout.slots)
    known = rank_all(vectors, widths)
    monkeypatch.setattr(module, "_RANKED", 10)
    short = rank_all(vectors, widths)
    keys = element_keys(vectors, 1)
    for slot, where in enumerate(vectors.layout.slots):
        assert torch.equal(known[slot], short[slot])
        unit = max(widths[slot], 1)
        for start in range(0, where.numel, unit):
            rows = vectors.read(slot, start, start + unit)[1:]
            arena.reset()
            kept = RankDrop(keys, widths, known, 0.5, 0.4).apply(rows, slot, start).clone()
            anew = RankDrop(keys, widths, None, 0.5, 0.4).apply(rows, slot, start)
            assert torch.equal(kept, anew)


@pytest.mark.parametrize("trim", ["tensor", "global"])
@given(st.floats(0, 1), st.floats(0, 1))
def test_band_keeps_what_the_shares_say(trim: str, density: float, gamma: float) -> None:
    vectors = hard_vectors(shapes={"a": (20, 7), "b": (13,)}, experts=2, zeros=0.0)
    # Differing magnitudes, so that shares are exact.
    vectors.rows[1:] = torch.linspace(-1, 1.01, vectors.rows[1:].numel()).view_as(vectors.rows[1:])
    made = Breadcrumbs(density=density, gamma=gamma, trim=trim).sparsifier(vectors)
    kept, total = 0, 0
    for slot, where in enumerate(vectors.layout.slots):
        arena.reset()
        rows = vectors.read(slot, 0, where.numel)[1:]
        out = made.apply(rows, slot, 0)
        assert torch.equal(out[out != 0], rows[out != 0])
        kept, total = kept + int((out[0] != 0).sum()), total + where.numel
        if trim == "tensor":
            assert abs(int((out[0] != 0).sum()) - density * where.numel) <= 2
            sizes = rows[0].abs().sort(descending=True).values
            gone = int(min(gamma, 1 - density) * where.numel + 1e-9)
            if bool(out[0].any()):
                assert float(out[0].abs().max()) == float(sizes[gone])
    assert abs(kept - density * total) <= 4


@pytest.mark.parametrize(
    ("searched", "name"),
    [
        (Magnitude(search=["density"]), "density"),
        (Breadcrumbs(search=["density", "gamma"]), "density"),
        (Breadcrumbs(search=["density", "gamma"]), "gamma"),
    ],
)
def test_searched_shares_are_followed(searched: Magnitude, name: str) -> None:
    vectors = hard_vectors(shapes={"a": (40, 40)}, zeros=0.0)
    made = searched.sparsifier(vectors)
    rows = vectors.read(0, 0, 1600)[1:]
    counts = []
    for value in (0.0, 0.02, 0.3, 0.6, 0.9, 1.0):
        arena.reset()
        counts.append(int((made.at({name: value}).apply(rows, 0, 0)[0] != 0).sum()))
    if name == "density":
        # A fifth of the magnitudes are the same one, so that shares are no closer than that.
        for count, value in zip(counts, (0.0, 0.02, 0.3, 0.6, 0.9, 1.0), strict=True):
            assert abs(count / 1600 - value) < 0.22
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 1600)
    else:
        assert len(set(counts)) > 1
    assert made.at({}) is made or made.at({}).apply(rows, 0, 0) is not None


def test_gamma_leaves_short_tensors_and_equal_numbers() -> None:
    vectors = hard_vectors(shapes={"scalar": (), "bias": (20,), "w": (30, 30)}, zeros=0.0)
    vectors.rows[1:] = 0.25
    for operator in (
        Breadcrumbs(density=0.9, gamma=0.01),
        Breadcrumbs(density=0.9, search=["gamma"]),
    ):
        made = operator.sparsifier(vectors)
        for slot, where in enumerate(vectors.layout.slots):
            arena.reset()
            rows = vectors.read(slot, 0, where.numel)[1:]
            assert torch.equal(made.apply(rows, slot, 0), rows)


def test_masks_of_seeds_and_experts_differ() -> None:
    vectors = hard_vectors(shapes={"w": (50, 50)}, zeros=0.0)
    rows = vectors.read(0, 0, 2500)[1:]
    masks = []
    for operator in (Dare(drop_rate=0.5), Dare(drop_rate=0.5, seed=1), Della(drop_rate=0.5)):
        arena.reset()
        masks += list((operator.sparsifier(vectors).apply(rows, 0, 0) != 0).clone())
    for i, first in enumerate(masks[:6]):
        for second in masks[:i]:
            assert 0.4 < float((first == second).double().mean()) < 0.6


def rank_drop_of(rate: float, epsilon: float) -> tuple[RankDrop, Tensor]:
    vectors = hard_vectors(shapes={"a": (6, 40)}, zeros=0.0)
    widths = tuple(row_width(slot.shape) for slot in vectors.layout.slots)
    ranks = rank_all(vectors, widths)
    made = RankDrop(element_keys(vectors, 3), widths, ranks, rate, epsilon)
    return made, vectors.read(0, 0, 240)[1:]


@pytest.mark.parametrize(
    ("searched", "rate", "epsilon"),
    [
        ({"drop_rate": 0.8}, 0.8, 0.1),
        ({"epsilon": 0.4}, 0.4, 0.4),
        ({"drop_rate": 0.7, "epsilon": 0.2}, 0.7, 0.2),
        ({}, 0.4, 0.1),
    ],
)
def test_searched_drop_rates_are_those_of_a_fixed_one(
    searched: dict[str, float], rate: float, epsilon: float
) -> None:
    made, rows = rank_drop_of(0.4, 0.1)
    fixed, _ = rank_drop_of(rate, epsilon)
    arena.reset()
    wanted = fixed.apply(rows, 0, 0).clone()
    arena.reset()
    assert torch.equal(made.at(searched).apply(rows, 0, 0), wanted)


def test_seeds_of_della_tell_masks_apart() -> None:
    vectors = hard_vectors(shapes={"a": (6, 40)}, zeros=0.0)
    rows = vectors.read(0, 0, 240)[1:]
    found = []
    for seed in (0, 0, 1):
        arena.reset()
        found.append(Della(seed=seed).sparsifier(vectors).apply(rows, 0, 0).clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_ranks_are_kept_in_two_bytes() -> None:
    vectors = hard_vectors(shapes={"a": (6, 40)})
    (ranks,) = rank_all(vectors, [40]).values()
    assert (ranks.dtype, ranks.shape) == (torch.int16, (len(vectors.experts), 240))


@pytest.mark.parametrize("ranked", [7, 1 << 18])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 17])
def test_kept_effects_are_added_up(
    ranked: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RANKED", ranked)
    vectors = hard_vectors(zeros=0.6)
    scales = torch.linspace(1.0, 2.0, len(vectors.layout.slots))

    def effects(rows: Tensor, slot: int) -> Tensor:
        return scales[slot] * rows[1:]

    merge = KernelMerge(vectors, KeptEffects(vectors, effects), (0,) * len(scales), chunk=chunk)
    c = torch.tensor([0.7, 0.0, -0.3])
    found = write(merge, vectors, c)
    for scale, slot in zip(scales, vectors.layout.slots, strict=True):
        part = slice(slot.offset, slot.stop)
        expected = vectors.base[part] + scale * (c @ vectors.deltas[:, part])
        assert torch.allclose(found[part], expected, atol=1e-6), slot.name
    # The base is not touched where nothing is kept.
    still = (vectors.deltas[[0, 2]] == 0).all(0)
    assert torch.equal(found[still], vectors.base[still])
