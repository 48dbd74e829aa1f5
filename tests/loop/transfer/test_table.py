from __future__ import annotations

from pathlib import Path

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.loop.transfer.table import read_table
from map_bo.report.run.tables import write_evaluations_csv
from map_bo.space import CoefficientSpace

METRICS = (Metric("x"), Metric("y", "min", "loss"))


def test_a_runs_own_table_comes_back(tmp_path: Path) -> None:
    space = CoefficientSpace.box(("a", "x"))  # an expert and a metric of one name
    seen = Observations(
        torch.tensor([[0.1, 0.2], [1 / 3, 1.0], [0.5, 0.5]]),
        torch.tensor([[0.5, 2.5], [torch.nan, 1.0], [torch.nan, torch.nan]]),
        METRICS,
        Yvar=torch.tensor([[0.01, torch.nan], [torch.nan, 0.0], [torch.nan, torch.nan]]),
        counts=torch.tensor([[100.0, torch.nan], [torch.nan] * 2, [torch.nan] * 2]),
        cost=torch.tensor([1.0, 2.0, 3.0]),
        failures=(None, None, "it, broke"),
    )
    write_evaluations_csv(seen, space, tmp_path / "evaluations.csv")
    study = read_table(tmp_path / "evaluations.csv", space.names, ("x", "y"))
    assert study.names == space.names
    assert study.metrics == ("x", "y")
    assert torch.equal(study.X, seen.X)
    for name in ("Y", "Yvar", "counts", "cost"):
        found, before = getattr(study, name), getattr(seen, name)
        assert torch.equal(found.nan_to_num(nan=-1), before.nan_to_num(nan=-1)), name
    assert study.failures == seen.failures
    assert study.rows == ("line 2", "line 3", "line 4")


def test_a_table_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "old.csv"
    file.write_text("\ufeffa, b ,acc\n\n0,1,0.5\n1,0, \n", encoding="utf-8")
    study = read_table(file, ("a", "b", "c"), ("acc", "new"))
    assert study.names == ("a", "b")
    assert study.metrics == ("acc",)
    assert torch.equal(study.X, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert study.Y.isnan().tolist() == [[False], [True]]
    assert study.rows == ("line 3", "line 4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no evaluation"),
        ("a,acc\n", "holds no evaluation"),
        ("b,acc\n1,2\n", "column 'b' of .* is neither"),
        ("a,b,c\n1,2,3\n", "column 'b' of .* is neither"),
        ("acc\n1\n", "has no column of a coefficient"),
        ("a\n1\n", "has no column of a metric"),
        ("a,acc\n1,good\n", "line 2 of .* has 'good' as acc, which is not a number"),
        ("a,acc\n1,1e999\n", "line 2 of .* has an infinite acc"),
        ("a,acc\n,1\n", "line 2 of .* has no value of the coefficient 'a'"),
        ("a,acc\n1,2\n1\n", "line 3 of .* has 1 cells, and the header 2"),
        ("a,c:a,acc\n1,1,2\n", "two columns of the coefficient 'a'"),
        ("both,acc\n1,2\n", "may be a coefficient or a metric"),
        ('a,acc\n"1,2\n', "cannot be read as CSV"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "old.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "old.csv", ("a", "both"), ("acc", "both"))


@pytest.mark.parametrize("content", [b"a,acc\n\xff\xfe,1\n", None])
def test_what_is_no_text_is_told(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "old.csv").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_table(tmp_path / "old.csv", ("a",), ("acc",))
