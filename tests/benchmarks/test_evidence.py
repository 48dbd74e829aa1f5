"""The document says what the recorded rows say, and its plots stay light."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality.evidence import EVIDENCE, filled, tables
from benchmarks.quality.plots import LARGEST, draw
from benchmarks.quality.tidy import read, write
from benchmarks.record import RESULTS
from map_bo.errors import DataError
from tests.benchmarks.test_analysis import row, study

TEXT = EVIDENCE.read_text()


@pytest.mark.slow
def test_the_tables_are_the_recorded_ones() -> None:
    assert filled(TEXT) == TEXT, "run `python -m benchmarks.run --readme`"


def test_every_table_has_one_place_and_every_place_its_table() -> None:
    assert re.findall(r"<!-- table:(\S+) -->", TEXT) == re.findall(r"<!-- /table:(\S+) -->", TEXT)
    assert sorted(re.findall(r"<!-- table:(\S+) -->", TEXT)) == sorted(tables([]))


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (EVIDENCE.parent / link).exists(), link


def test_tables_follow_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "quality.csv", study(0.02))
    text = filled(TEXT, tmp_path)
    assert filled(text, tmp_path) == text
    assert "+0.0200 [+0.0200, +0.0200]" in text
    write(tmp_path / "quality.csv", study(0.01))
    assert "+0.0100 [+0.0100, +0.0100]" in filled(text, tmp_path)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "quality.csv"
    rows = [row("b", "default", 1, 6, share=0.125), row("a", "ax", 0, 6, failure='a, "b"\n| c')]
    write(path, rows)
    first, second = read(path)
    assert (first["case"], first["failure"], first["share"]) == ("a", 'a, "b" | c', None)
    assert (second["share"], second["evaluations"], second["regret"]) == (0.125, 6, None)
    path.write_text("case,method\n")
    with pytest.raises(DataError, match="other columns"):
        read(path)


def test_plots_are_drawn_and_light(tmp_path: Path) -> None:
    found = draw(study(0.02, seeds=3), tmp_path)
    assert {path.name for path in found} == {"regret.png", "share.png", "ranks.png"}
    assert all(0 < path.stat().st_size <= LARGEST for path in found)
    assert draw([], tmp_path / "empty") == []


def test_the_command_runs_small_and_records_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in RESULTS.iterdir())
    command.main(
        [
            *("--smoke", "--case-module", "tests.benchmarks.fake_cases", "--seeds", "1"),
            *("--methods", "direct", "random", "best-expert", "--out", str(tmp_path / "q.json")),
        ]
    )
    assert "3 cells, 0 of them done before" in capsys.readouterr().out
    assert (tmp_path / "q.json").exists()
    assert sorted(path.name for path in RESULTS.iterdir()) == before
    assert EVIDENCE.read_text() == TEXT


def test_the_command_names_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(
            ["--smoke", "--case-module", "tests.benchmarks.fake_cases", "--methods", "axx"]
        )
    assert "did you mean 'ax'" in str(stop.value)


def test_a_scratch_folder_keeps_everything_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in RESULTS.iterdir())
    given = ["--case-module", "tests.benchmarks.fake_cases", "--cases", "plain", "--seeds", "1"]
    given += ["--methods", "random", "--budget", "6", "--jobs", "0", "--scratch", str(tmp_path)]
    command.main(given)
    assert len(read(tmp_path / "quality.csv")) == 1
    command.main(given)
    assert "1 cells, 1 of them done before" in capsys.readouterr().out
    assert sorted(path.name for path in RESULTS.iterdir()) == before
    assert EVIDENCE.read_text() == TEXT
