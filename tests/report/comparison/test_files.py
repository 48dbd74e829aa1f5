from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from map_bo.report.comparison.comparison import compare
from map_bo.report.comparison.files import results_csv, write_comparison
from map_bo.report.comparison.runs import MEASURES
from tests.report.fake_runs import comparison, failed, record


def test_the_table_has_every_run_and_every_digit() -> None:
    found = comparison(seeds=2, more=[failed()])
    rows = list(csv.DictReader(io.StringIO(results_csv(found))))
    assert [row["status"] for row in rows] == ["finished"] * 4 + ["failed"]
    assert {row["surrogate"] for row in rows[:4]} == {"gp", "quadratic"}
    first = found.of(found.baseline)[0]
    for measure in MEASURES:
        assert float(rows[0][measure.name]) == first.values[measure.name]
        assert rows[-1][measure.name] == ""
    assert rows[-1]["reason"] == "out of memory"
    assert float(rows[0]["reference:rot90"]) == float(found.scale.point[0])


def test_runs_that_are_told_apart_by_sweep_have_one_column_of_it() -> None:
    one = [record({"seed": "0"}, sweep=name, name=f"{name}/job") for name in ("a", "b")]
    found = compare(one, title="a and b")
    assert found.keys == ("sweep",)
    header, *rows = csv.reader(io.StringIO(results_csv(found)))
    assert header.count("sweep") == 1
    assert [row[header.index("sweep")] for row in rows] == ["a", "b"]


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_all_files_are_written_for_any_number_of_metrics(m: int, tmp_path: Path) -> None:
    out = tmp_path / "new"
    write_comparison(comparison(m, seeds=2), out)
    for name in ("report.html", "report.md", "results.csv"):
        assert (out / name).stat().st_size > 500
    assert sorted(path.stem for path in (out / "comparison").iterdir()) == [
        "cost",
        "fronts",
        "progress",
    ]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (out / "comparison").iterdir())
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 3


def test_many_variants_with_strange_names_are_drawn(tmp_path: Path) -> None:
    names = [f"$x_{i}^{{2}}$ 合并 {'long' * 20}" for i in range(12)]
    found = compare(
        [record({"name": name, "seed": "0"}, verify=0, evaluations=8) for name in names], title="x"
    )
    write_comparison(found, tmp_path)
    assert len(found.variants) == 12
