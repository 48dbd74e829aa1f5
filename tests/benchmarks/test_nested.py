"""The benchmark of merging in stages: its grid, its measures, and the documents it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import nested
from benchmarks.quality.nested_tables import TARGET, figure, fitted, needed, short, tables
from benchmarks.run import NESTED, filled


def row(n: int, method: str, budget: int, seed: int, regret: float, **more: Any) -> dict[str, Any]:
    return {
        "experts": n,
        "method": method,
        "budget": budget,
        "seed": seed,
        "data_sets": budget * n,
        "regret": regret,
        "side": None,
        "seconds": 1.0,
        **more,
    }


ROWS = [
    row(n, method, budget, seed, regret / budget)
    for n in (4, 8)
    for method, regret in (("flat", 0.8), ("fronts, 2 stages", 0.9), ("published", 1.6))
    for budget in (16, 48)
    for seed in range(2)
]


def test_the_document_has_the_recorded_tables() -> None:
    text = NESTED.read_text()
    assert filled(text, full=True) == text, "run `python -m benchmarks.run --readme`"


def test_every_cell_of_the_grid_can_be_paid_for() -> None:
    cells = list(nested.cells([2, 4, 8, 16, 32], 1, list(nested.METHODS)))
    assert len(cells) == len(set(cells))
    assert {cell.method for cell in cells if cell.experts == 2} == {"flat"}
    assert {cell.method for cell in cells if cell.experts == 8} == set(nested.METHODS)
    assert all(nested.affordable(cell) for cell in cells)
    assert not nested.affordable(nested.Cell(16, "fronts, 2 stages", 16, 0))


@pytest.mark.slow
def test_a_cell_measures_what_it_hands_over(zoo_cache: Path) -> None:
    found = nested.run(nested.Cell(4, "fronts, 2 stages", 14, 0))
    assert found["data_sets"] <= 14 * 4
    assert len(found["utilities"]) == nested.PREFERENCES
    assert 0 < found["side"] < 1.5
    best = torch.tensor(nested.best_known(4, [found], 200))
    assert bool((best >= torch.tensor(found["utilities"]) - 1e-12).all())


def test_the_volume_is_the_side_of_a_cube() -> None:
    point = torch.full((1, 3), 0.5, dtype=torch.float64)
    assert nested.volume_side(point) == pytest.approx(0.5, rel=1e-9)
    assert nested.volume_side(torch.cat([point, 0.4 * torch.eye(3).double()])) == pytest.approx(0.5)
    assert nested.volume_side(-point) == 0


def test_tables_follow_the_rows(tmp_path: Path) -> None:
    assert needed(ROWS, 4, "flat") == (48 * 4, False)
    assert needed([r for r in ROWS if r["budget"] == 48], 4, "flat") == (48 * 4, True)
    assert needed([r for r in ROWS if r["budget"] == 16], 4, "flat") is None
    assert f"data sets to a regret of {TARGET:g}" in "\n".join(tables(ROWS))
    said = "\n".join(short(ROWS))
    assert "in 0 of 8 paired runs" in said
    turned = [{**r, "regret": 1.0} if r["method"] == "flat" else r for r in ROWS]
    assert "in 8 of 8 paired runs" in "\n".join(short(turned))
    figure(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert tables([]) == ["nothing measured yet"]


def test_the_fit_finds_its_own_law() -> None:
    fit = fitted([(n, 7 * n * torch.tensor(float(n)).log2().item()) for n in (4, 8, 16)])
    assert fit is not None
    assert fit[0] == pytest.approx(7)
    assert fit[1] == pytest.approx(1)
    assert fitted([(4, 10.0)]) is None
