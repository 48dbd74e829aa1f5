from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.evaluators.evaluator import mean_loss
from map_bo.rng import make_generator

X = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.123, 0.456]], dtype=torch.float64)


def problem(operator: object = None) -> map_bo.MergedModelProblem:
    draws = make_generator(0)
    base = {
        "weight": torch.randn(16, 64, generator=draws),
        "bias": torch.randn(16, generator=draws),
    }

    def expert() -> dict[str, Tensor]:
        return {
            name: value + 0.1 * torch.randn(value.shape, generator=draws)
            for name, value in base.items()
        }

    inputs = torch.randn(40, 64, generator=draws)
    labels = torch.randint(3, (40,), generator=draws)
    return map_bo.MergedModelProblem(
        nn.Linear(64, 16),
        base=base,
        experts={"a": expert(), "b": expert()},
        evaluators={"loss": mean_loss(inputs, labels)},
        operator=operator,  # type: ignore[arg-type]
        metrics=[map_bo.Metric("loss", direction="min", kind="loss")],
    )


@pytest.mark.parametrize("operator", [None, map_bo.Ties(), map_bo.Slerp()])
def test_mapped_rows_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: object
) -> None:
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path))
    mine = problem(operator)
    mapped = mine.with_mapped_rows()
    seen = mapped.evaluate(X, generator=make_generator(1))
    assert list((tmp_path / "rows").iterdir())  # it has indeed mapped them
    assert torch.equal(seen.Y, mine.evaluate(X, generator=make_generator(1)).Y)


def test_on_another_device_nothing_is_mapped_or_loaded(tmp_path: Path) -> None:
    there = problem().with_mapped_rows().on("meta")
    assert there.device == torch.device("meta")
    assert there._storage.cache is None
    assert there.with_mapped_rows() is there


def test_what_is_released_is_loaded_again() -> None:
    mine = problem()
    before = mine.evaluate(X, generator=make_generator(1))
    mine.release()
    assert mine._loaded is None
    assert torch.equal(mine.evaluate(X, generator=make_generator(1)).Y, before.Y)


def test_memory_counts_rows_and_model() -> None:
    one = (64 * 16 + 16) * 4
    assert problem().memory() == 4 * one  # two experts; the weights and the buffer of a merge
