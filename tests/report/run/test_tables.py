from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from map_bo.data import Front, Metric, Observations
from map_bo.report.run.tables import write_evaluations_csv, write_front_csv
from map_bo.space import CoefficientSpace
from tests.report.fake_views import make_view


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluations_have_all_columns_and_every_digit(tmp_path: Path) -> None:
    view = make_view(2, loss=(1,), failures=(5,))
    write_evaluations_csv(view, view.space, tmp_path / "evaluations.csv")
    rows = read(tmp_path / "evaluations.csv")
    assert list(rows[0]) == [
        "c:rot90", "c:invert",
        "y:rot90", "var:rot90", "n:rot90",
        "y:invert loss", "var:invert loss", "n:invert loss",
        "cost", "failure",
    ]  # fmt: skip
    assert len(rows) == len(view.seen)
    for i, row in enumerate(rows):
        assert float(row["c:rot90"]) == view.seen.X[i, 0]
        assert float(row["cost"]) == view.seen.cost[i]
        if i == 5:
            assert row["y:rot90"] == ""
            assert row["failure"] == "RuntimeError: CUDA out of memory"
        else:
            assert float(row["y:invert loss"]) == view.seen.Y[i, 1]
            assert row["failure"] == ""


def test_a_view_and_its_evaluations_give_the_same_table(tmp_path: Path) -> None:
    view = make_view(2)
    write_evaluations_csv(view, view.space, tmp_path / "a.csv")
    write_evaluations_csv(view.seen, view.space, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_what_was_never_verified_stays_empty(tmp_path: Path) -> None:
    view = make_view(2, points=30, verify=2)
    write_front_csv(view.front, view.space, tmp_path / "front.csv")
    rows = read(tmp_path / "front.csv")
    assert list(rows[0])[:5] == ["point", "c:rot90", "c:invert", "predicted:rot90", "std:rot90"]
    assert [row["point"] for row in rows] == [str(i) for i in range(30)]
    for i, row in enumerate(rows):
        assert float(row["predicted:invert"]) == view.front.mean[i, 1]
        assert float(row["lower:invert"]) == view.front.lower[i, 1]
        assert float(row["upper:invert"]) == view.front.upper[i, 1]
        assert float(row["std:invert"]) == view.front.std[i, 1]
        assert row["corrected:invert"] == row["probability"] == ""
        if view.front.verified[i]:
            assert float(row["real:invert"]) == view.front.real[i, 1]
        else:
            assert row["real:invert"] == ""


@pytest.mark.parametrize("name", ['a,"b"', "two\nlines", "=1+1", "\u4e2d\u6587"])
def test_any_name_and_reason_comes_back(tmp_path: Path, name: str) -> None:
    space = CoefficientSpace.box([name])
    metrics = (Metric(name),)
    seen = Observations.failed(torch.zeros(1, 1), metrics, f"reason of {name}")
    write_evaluations_csv(seen, space, tmp_path / "e.csv")
    assert read(tmp_path / "e.csv")[0]["failure"] == f"reason of {name}"
    one = torch.ones(1, 1)
    write_front_csv(Front(one, one, one, one, one, metrics), space, tmp_path / "f.csv")
    assert read(tmp_path / "f.csv")[0][f"predicted:{name}"] == "1.0"


def test_nothing_measured_gives_the_header_alone(tmp_path: Path) -> None:
    view = make_view(2)
    empty = dataclasses.replace(view, seen=Observations.empty(2, view.metrics))
    write_evaluations_csv(empty, view.space, tmp_path / "e.csv")
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 1


def test_corrected_values_and_probabilities_have_columns_of_their_own(tmp_path: Path) -> None:
    view = make_view(2, points=30, verify=2, certain=True)
    write_front_csv(view.front, view.space, tmp_path / "front.csv")
    rows = read(tmp_path / "front.csv")
    assert list(rows[0])[-1] == "probability"
    for i, row in enumerate(rows):
        assert float(row["corrected:invert"]) == view.front.corrected[i, 1]
        assert float(row["predicted:invert"]) == view.front.mean[i, 1]
        assert float(row["probability"]) == view.front.probability[i]
