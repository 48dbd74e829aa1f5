"""The page on growing a study says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import map_bo
from benchmarks.run import GROW, filled
from map_bo.loop.transfer.table import read_table

TEXT = GROW.read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_snippet_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    zoo_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAP_BO_CACHE", str(zoo_cache))
    (code,) = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, map_bo.Result] = {}
    exec(code, names)
    assert "'not_measured': {'permute': 10}" in capsys.readouterr().out
    assert len(names["new"].seen) + len(names["new"].verification) == 16


def test_the_table_by_hand_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"\n    (math,code,.*?)\n\n", TEXT, flags=re.DOTALL)
    (tmp_path / "old.csv").write_text("\n".join(line.strip() for line in text.splitlines()))
    study = read_table(tmp_path / "old.csv", ("math", "code"), ("gsm8k", "humaneval"))
    assert study.Y.isnan().tolist() == [[False, False], [False, True]]


def test_every_option_is_told() -> None:
    for name in vars(map_bo.StartFrom("old")):
        assert f"`start_from.{name}=" in TEXT


def test_the_recorded_table_is_in_the_page() -> None:
    assert filled(TEXT) == TEXT
