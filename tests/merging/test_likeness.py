"""Whether an expert is of a base."""

from __future__ import annotations

import logging

import pytest
import torch

from map_bo.errors import MergeError
from map_bo.merging.likeness import Likeness
from map_bo.rng import make_generator


def judged(far: float, *, size: int = 4000, shared: float = 1.0) -> None:
    """Judge an expert that keeps ``shared`` of the base and is ``far`` norms of it away beside."""
    generator = make_generator(0)
    base, noise = (torch.randn(size, generator=generator) for _ in range(2))
    expert = shared * base + far * noise * base.norm() / noise.norm()
    likeness = Likeness("math")
    for start in range(0, size, 1000):  # in pieces
        part = slice(start, start + 1000)
        likeness.add(base[part], (expert - base)[part])
    likeness.judge()


def test_a_fine_tuned_model_passes_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judged(0.1)
    assert not caplog.records


def test_one_that_went_far_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judged(0.8)
    assert "'math' differs from the base by 0.80 times" in caplog.text


def test_an_unrelated_one_is_refused() -> None:
    with pytest.raises(MergeError, match=r"'math' does not look fine-tuned.*-?0\.0\d\d") as caught:
        judged(1.0, shared=0.0)
    assert caught.value.hint is not None
    assert "check_base=False" in caught.value.hint


def test_few_numbers_decide_nothing() -> None:
    judged(1.0, shared=0.0, size=999)
