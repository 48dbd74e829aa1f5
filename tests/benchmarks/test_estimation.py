"""The benchmark of estimates: its draws, its item-response model, its tables of outcomes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality import estimation, outcome_tables
from benchmarks.quality.estimation import Draw, measure, short_table
from benchmarks.quality.item_response import item_response
from benchmarks.quality.outcome_tables import OutcomeTable, outcome_table
from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import accuracy
from map_bo.problems.cache import CACHE_VARIABLE
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator


def made_up(rows: int = 24, size: int = 120) -> OutcomeTable:
    """Outcomes by one trait, whose weight changes with the coefficient."""
    generator = make_generator(0)
    X = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    trait = torch.randn(size, generator=generator, dtype=torch.float64)
    logits = 2 * X[:, :1] + (1 + X[:, 1:]) * 4 * trait
    right = torch.rand(rows, size, generator=generator, dtype=torch.float64) < logits.sigmoid()
    return OutcomeTable(X, right.double().unsqueeze(1), (Metric("task"),), 4)


def test_a_draw_has_whole_anchors_and_sets_that_nest() -> None:
    table = made_up()
    draw = Draw.of(table, 0, None, make_generator(1))
    there = draw.scored.isfinite()
    assert bool(there[:4].all())
    assert set(there[4:].sum(-1).tolist()) <= {25, 50, 100}
    assert torch.equal(there.int().cumprod(-1).bool(), there)
    seen = draw.seen()
    torch.testing.assert_close(seen.Y[:, 0], draw.scored.nanmean(-1))
    assert torch.equal(Draw.of(table, 0, 25, make_generator(1)).counts[4:], torch.full((20,), 25))


def test_errors_are_those_of_all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(name: str, rows: int | None, *, progress: bool) -> OutcomeTable:
        return made_up()

    monkeypatch.setattr(estimation, "outcome_table", table)
    monkeypatch.setattr(estimation, "MERGES", 16)
    found = measure("digits-4", 3)

    def size(method: str, n: int) -> float:
        here = [row["square"] for row in found if (row["method"], row["n"]) == (method, n)]
        return math.sqrt(sum(here) / len(here))

    for n in (25, 50, 100):
        assert size("regression", n) < 0.95 * size("common", n)
    # The standard error of a mean of n of 120 that are 0 or 1.
    assert size("fresh", 50) == pytest.approx(math.sqrt(0.2 * (1 / 50 - 1 / 120)), rel=0.3)
    lines = short_table(found)
    assert len(lines) == 2 + 4 + 3  # 10 to 100 examples, then 25 to 100 in one design
    assert lines[2].startswith("| even | 10 | 1 |")


def test_item_response_beats_the_mean_where_the_model_holds() -> None:
    table, better, raw = made_up(), [], []
    for seed in range(6):
        draw = Draw.of(table, 0, 25, make_generator(seed))
        values, variances = item_response(draw.X, draw.scored)
        truth = draw.outcomes.mean(-1)
        torch.testing.assert_close(values[:4], truth[:4])
        assert bool((variances[:4] == 0).all())
        assert bool((variances[4:] > 0).all())
        better.append((values - truth)[4:].square().mean())
        raw.append((draw.scored.nanmean(-1) - truth)[4:].square().mean())
    assert float(sum(better)) < 0.9 * float(sum(raw))


def tiny() -> MergedModelProblem:
    """A linear classifier with two experts, two data sets."""
    generator = make_generator(3)

    def weights() -> dict[str, Tensor]:
        return {"weight": torch.randn(3, 4, generator=generator)}

    evaluators = {
        name: accuracy(
            torch.randn(40, 4, generator=generator),
            torch.randint(3, (40,), generator=generator),
        )
        for name in ("first", "second")
    }
    return MergedModelProblem(
        nn.Linear(4, 3, bias=False),
        base=weights(),
        experts={"first": weights(), "second": weights()},
        evaluators=evaluators,
        cache=False,
    )


def test_a_table_is_measured_once_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(outcome_tables, "TABLES", {"tiny": (tiny, 3)})
    calls: list[str] = []
    score = outcome_tables._score

    def counted(evaluator: object, model: nn.Module) -> Tensor:
        calls.append("")
        return score(evaluator, model)

    monkeypatch.setattr(outcome_tables, "_score", counted)
    first = outcome_table("tiny")
    assert first.outcomes.shape == (4 + 3, 2, 40)
    assert len(calls) == 7 * 2
    seen = tiny().evaluate(first.X[:5], generator=make_generator(0))
    torch.testing.assert_close(first.truth[:5], seen.Y)
    more = outcome_table("tiny", 5)
    assert len(calls) == 9 * 2
    assert torch.equal(more.outcomes[:7], first.outcomes)
    assert torch.equal(outcome_table("tiny", 1).outcomes, first.outcomes[:5])
    assert len(calls) == 9 * 2
    path = tmp_path / "outcomes" / "tiny.npz"
    with np.load(path) as file:
        kept = dict(file)
    assert kept["metrics"].tolist() == ["first", "second"]
    assert int(kept["anchors"]) == 4
    np.savez(path, **(kept | {"digest": np.array("another")}))
    with pytest.raises(DataError, match="was measured on another problem"):
        outcome_table("tiny")
