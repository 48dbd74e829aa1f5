"""What the README says is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.run import CLUSTER_TRIALS, CLUSTERS, MODULES, PROMISES, RELIABILITY, filled
from map_bo.app.jobs import RENAMED

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "recipe.yaml").exists()
    assert (tmp_path / "runs" / "mine" / "report.html").exists()


def test_the_tables_are_the_recorded_ones() -> None:
    assert filled(TEXT) == TEXT, "run `python -m benchmarks.run --readme`"


def test_the_tables_of_the_promises_are_the_recorded_ones() -> None:
    text = RELIABILITY.read_text()
    assert filled(text) == text, "run `python -m benchmarks.run --readme`"
    for name in (*PROMISES, "kill"):
        assert f"<!-- table:{name} -->\n" in text
        assert f"<!-- /table:{name} -->" in text


def test_the_tables_of_the_trials_of_clusters_are_the_recorded_ones() -> None:
    text = CLUSTERS.read_text()
    assert filled(text) == text, "run `python -m benchmarks.run --readme`"
    for name in CLUSTER_TRIALS:
        assert f"<!-- table:{name} -->\n" in text
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


def test_every_benchmark_has_its_table_and_its_record() -> None:
    for name in MODULES:
        assert f"<!-- table:{name} -->" in TEXT
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", TEXT)) - {"demo", "and"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert re.search(r"^demo:", makefile, flags=re.MULTILINE)


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_the_configuration_names_in_the_table_are_the_files() -> None:
    for group in ("sampler", "surrogate", "solver", "nested"):
        (row,) = (line for line in TEXT.splitlines() if line.startswith(f"| {group} | `"))
        named = set(re.findall(r"`([a-z0-9_]+)`", row))
        options = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
        assert named == {name for name in options if (group, name) not in RENAMED}
