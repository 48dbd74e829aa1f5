from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.summary import _recalled, notes_on_bounds
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import Bowls, quick


class Synergy(Bowls):
    """Bowls whose merges are better in the first metric than any expert."""

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        found = super().evaluate(X, generator=generator)
        bonus = torch.stack([6 * X.prod(-1), torch.zeros(len(X))], -1)
        return Observations(found.X, found.Y + bonus, found.metrics)


@pytest.fixture(scope="module")
def result() -> Result:
    return Run(Synergy(), quick(10), MemoryStore()).drive()


def test_the_best_expert_is_an_expert_however_good_the_merges_are(result: Result) -> None:
    assert float(result.seen.Y[:, 0].max()) > 1.5
    assert result.summary["reference_best"] == {"near a": 1.0, "far from b": pytest.approx(0.1)}
    volumes = result.summary["hypervolume"]
    # Expert a is best in the one metric and worst in the other, expert b the other way round.
    assert volumes["best expert"] == pytest.approx(0.0, abs=1e-9)
    assert volumes["observed points"] > volumes["uniform blend"] > 0


@pytest.mark.parametrize("threshold", [0.2, 0.05])
def test_a_hypervolume_of_nothing_says_why(threshold: float) -> None:
    given = {"near a": -10.0, "far from b": threshold}
    found = Run(Bowls(), quick(8, reference=given), MemoryStore()).drive()
    volumes, notes = found.summary["hypervolume"], found.summary["notes"]
    zero = [name for name in ("predicted front", "observed points") if volumes[name] == 0]
    said = [note for note in notes if "the hypervolume of the" in note]
    assert len(said) >= len(zero)
    assert bool(zero) == (threshold == 0.05) == bool(said)
    if zero:
        assert f"of far from b ({threshold:.4g})" in said[0]
        assert any("'far from b' (0.05) is not beaten by" in note for note in notes)


@pytest.mark.parametrize(
    ("metric", "values", "said"),
    [
        (Metric("x"), [45.2, 0.5, 61.0], "a proportion from 0 to 1, and 2 of 3 values lie outside"),
        (Metric("x", "min", "loss"), [-0.5, 0.1, 0.2], "a loss of at least 0, and 1 of 3"),
        (Metric("x", upper=100), [45.2, 0.5, 101.0], "from 0 to 100, and 1 of 3"),
        (Metric("x"), [1 + 1e-12, 1.0, -1e-9], None),
        (Metric("x", kind="unbounded"), [45.2, -3.0, 0.0], None),
    ],
)
def test_values_that_a_metric_cannot_have_are_told(
    metric: Metric, values: list[float], said: str | None
) -> None:
    Y = torch.tensor(values).unsqueeze(-1)
    notes = notes_on_bounds(Observations(torch.rand(3, 2), Y, (metric,)))
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_the_summary_says_what_came_from_the_cache() -> None:
    metrics = (Metric("a"), Metric("b"))
    seen = Observations(
        torch.rand(3, 2),
        torch.rand(3, 2),
        metrics,
        recalled=torch.tensor([[True, True], [True, False], [False, False]]),
        saved=torch.tensor([4.0, 0.5, 0.0]),
    )
    empty = Observations.empty(2, metrics)
    assert _recalled(seen, empty) == {
        "cache": {"evaluations": 1, "metrics": 3, "seconds_saved": 4.5}
    }
    assert _recalled(seen.select([2]), empty) == {}
