from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.errors import ConfigError, MissingDependencyError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.report.run import outcome_table
from map_bo.report.run.outcome_table import COLUMNS, outcome_columns, write_outcomes

ROWS: tuple[Mapping[str, ExampleOutcomes], ...] = (
    {"math": ExampleOutcomes(torch.tensor([4, 1]), torch.tensor([1.0, 0.0]), 9, (True,))},
    {},
    {
        "math": ExampleOutcomes(torch.tensor([0]), torch.tensor([float("nan")]), 9, (True,)),
        "text, of \ud800": ExampleOutcomes(
            torch.tensor([2]),
            torch.tensor([[0.1, 1e-5]], dtype=torch.float64),
            3,
            (True, False),
            ("f1", "loss"),
        ),
        "other": ExampleOutcomes(torch.tensor([0]), torch.ones(1, 2), 1, (True, True)),
    },
)  # fmt: skip
LINES = [
    ["0", "math", "math", "1", "0.0"],
    ["0", "math", "math", "4", "1.0"],
    ["2", "math", "math", "0", ""],
    ["2", "text, of \\ud800", "f1", "2", "0.1"],
    ["2", "text, of \\ud800", "loss", "2", "1e-05"],
    ["2", "other", "0", "0", "1.0"],
    ["2", "other", "1", "0", "1.0"],
]


def test_columns_hold_one_outcome_per_example_and_metric() -> None:
    found = outcome_columns(ROWS)
    assert tuple(found) == COLUMNS
    assert {len(column) for column in found.values()} == {len(LINES)}
    assert found["row"].tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert found["metric"].tolist()[2:5] == ["math", "f1", "loss"]
    assert found["example"].tolist() == [1, 4, 0, 2, 2, 0, 0]
    assert [str(found[name].dtype) for name in ("row", "outcome")] == ["int64", "float64"]


@pytest.mark.parametrize("rows", [(), ({},)])
def test_nothing_makes_empty_columns(rows: Any) -> None:
    assert [column.tolist() for column in outcome_columns(rows).values()] == [[]] * 5


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_csv_has_all_digits_and_nothing_where_an_example_failed(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    assert write_outcomes(ROWS, path) == len(LINES)
    content = path.read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    header, *lines = csv.reader(text.splitlines())
    assert header == list(COLUMNS)
    assert lines == LINES
    write_outcomes(ROWS, path)
    assert path.read_bytes() == content, "the same table makes the same file"
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_has_the_same_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write_outcomes(ROWS, tmp_path / "table.parquet") == len(LINES)
    found = parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert tuple(found) == COLUMNS
    assert [str(one) for one in found["row"]] == [line[0] for line in LINES]
    for name in ("evaluator", "metric"):
        assert found[name] == [line[COLUMNS.index(name)] for line in LINES]
    assert found["example"] == [int(line[3]) for line in LINES]
    assert found["outcome"][2] != found["outcome"][2]
    assert found["outcome"][3:5] == [0.1, 1e-5]


def test_a_format_that_is_not_known_or_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("table.xlsx", "table", "csv"):
        with pytest.raises(ConfigError, match=f"cannot be written to '{name}'"):
            write_outcomes(ROWS, tmp_path / name)
    monkeypatch.setattr("map_bo.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="Parquet needs pyarrow") as caught:
        write_outcomes(ROWS, tmp_path / "table.parquet")
    assert "map-bo[data]" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(value: float) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outcome_table, "_number", fail)
    with pytest.raises(OSError, match="No space left"):
        write_outcomes(ROWS, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
