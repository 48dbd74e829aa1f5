from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.operators.random_mask import LEVELS, uniform_levels
from map_bo.operators.sparsify import drop, keep_band, keep_largest, magnitude_ranks, rank_drop
from map_bo.rng import make_generator

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
