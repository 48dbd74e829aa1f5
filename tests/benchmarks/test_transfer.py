from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import transfer
from benchmarks.quality.transfer import Growth, answers, regrets, saved, table
from tests.loop.transfer.grown import Growing


@pytest.mark.parametrize(
    ("target", "expected"), [(0.5, 1.0), (0.25, 3.0), (0.15, 5.0), (0.05, None)]
)
def test_equal_quality_must_last(target: float, expected: float | None) -> None:
    pairs = [(1.0, 0.4), (3.0, 0.2), (4.0, 0.22), (5.0, 0.1)]
    assert saved(pairs, target) == expected


def test_regret_is_to_the_best_that_anybody_found() -> None:
    best, worse = [[1.0, 1.0]], [[0.5, 0.5]]

    def cell(cost: float, real: list[list[float]]) -> dict[str, object]:
        return {"answers": [{"cost": cost, "worth": [sum(real[0]) / 2], "real": real}]}

    cells = {"over 0": cell(6.0, worse), "grown 0": cell(2.0, best)}
    found = regrets(cells, 2)
    assert found["grown"][0] == [[2.0, 0.0]]
    assert found["over"][0][0][1] == pytest.approx(0.5)


def test_a_row_of_the_table_says_what_equal_quality_costs() -> None:
    found = {
        "over": {0: [[6.0, 0.2], [12.0, 0.1]], 1: [[6.0, 0.2], [12.0, 0.1]]},
        "grown": {0: [[2.0, 0.05]], 1: [[2.0, 0.3], [4.0, 0.1]]},
    }
    over, grown = table("case", found, (12,))
    assert over.endswith("| 12.0 |")
    assert grown.endswith("| 3.0 |")
    del found["grown"][1][1]
    assert table("case", found, (12,))[1].endswith("| not reached (1 of 2 not) |")


@pytest.mark.slow
@pytest.mark.parametrize("arm", transfer.ARMS)
def test_costs_count_what_was_measured(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "COSTS", (4.0, 6.0))
    new = Growing(tasks=("x", "y", "z"))
    growth = Growth("bowls", Growing(), new)
    found = answers(growth, arm, 0, 8, 6)
    costs = [one["cost"] for one in found]
    assert costs == sorted(costs)
    assert all(math.isfinite(value) for one in found for value in one["worth"])
    if arm == "grown":  # four anchors, a third of an evaluation each
        whole = torch.tensor(costs, dtype=torch.float64) - 4 / 3
        assert (whole - whole.round()).abs().max() < 1e-6
