from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.merging.vectors.parallel import arena
from map_bo.operators.random_mask import LEVELS, element_key, uniform_levels

WORD = (1 << 64) - 1
keys = st.integers(0, WORD)


def splitmix64(key: int, index: int) -> int:
    """Return the word at an index: Steele, Lea and Flood, OOPSLA 2014, figure 16."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def level(key: int, element: int) -> int:
    return (splitmix64(key, element // 4) >> (16 * (element % 4))) & 0xFFFF


def levels(key: int, count: int) -> Tensor:
    return uniform_levels([key], 0, count)[0].to(torch.int64) + LEVELS // 2


@given(keys, st.integers(0, 1 << 40), st.integers(0, 13))
def test_is_splitmix64(key: int, start: int, count: int) -> None:
    found = uniform_levels([key], start, start + count)[0]
    # int16 bits of the level, read as a signed number: uniform, whatever number it is called.
    expected = [level(key, start + i) for i in range(count)]
    signed = [v - LEVELS if v >= LEVELS // 2 else v for v in expected]
    assert found.dtype == torch.int16
    assert found.tolist() == signed


@given(keys, st.integers(0, 300), st.integers(0, 300))
def test_start_and_stop_do_not_matter(key: int, start: int, length: int) -> None:
    whole = uniform_levels([key], 0, 700)[0]
    part = uniform_levels([key], start, start + length)[0]
    assert torch.equal(part, whole[start : start + length])
    arena.reset()
    assert torch.equal(uniform_levels([key], start, start + length, empty=arena.empty)[0], part)


def test_is_the_same_in_long_pieces() -> None:
    long = uniform_levels([3], 5, 200_000)[0]
    assert torch.equal(long[-4:], uniform_levels([3], 199_996, 200_000)[0])


def chi_square(counts: Tensor) -> float:
    """Return how many standard deviations the statistic is from its mean."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    statistic = float(((counts - expected).square() / expected).sum())
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("key", [0, 1, WORD, element_key(0, "e", "w")])
def test_levels_are_uniform(key: int) -> None:
    found = levels(key, 1 << 20)
    assert abs(chi_square(torch.bincount(found // 16, minlength=LEVELS // 16).double())) < 4
    assert abs(chi_square(torch.bincount(found % 256, minlength=256).double())) < 4
    for bit in range(16):
        assert abs(float(((found >> bit) & 1).double().mean()) - 0.5) < 4 * 0.5 / 1024


def test_neighbours_experts_tensors_and_seeds_are_uncorrelated() -> None:
    n = 1 << 18
    names = itertools.product((0, 1), ("a", "b"), ("w", "v"))
    columns = [levels(element_key(*name), n).double() for name in names]
    shifted = [columns[0].roll(k) for k in (1, 2, 3, 4, 5, 8)]
    matrix = torch.stack([*columns, *shifted])
    correlations = torch.corrcoef(matrix) - torch.eye(len(matrix)).double()
    assert float(correlations.abs().max()) < 5 / n**0.5
    # Neither are their highest bits, which decide at a drop rate of one half.
    bits = torch.corrcoef((matrix >= LEVELS // 2).double()) - torch.eye(len(matrix)).double()
    assert float(bits.abs().max()) < 5 / n**0.5


def test_key_depends_on_every_part() -> None:
    seen = Counter(
        element_key(seed, expert, tensor)
        for seed in (-1, 0, 1, 10)
        for expert in ("", "a", "b", "ab", "1")
        for tensor in ("", "a", "b", "ab", "1")
    )
    assert len(seen) == 100
    assert element_key(1, "a", "bc") != element_key(1, "ab", "c")
    assert element_key(5, "e", "w") == element_key(5, "e", "w") < 1 << 64
