"""What docs/architectures.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.merging.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "architectures.md").read_text()


def test_the_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = re.findall(r"<!-- example -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(examples) == TEXT.count("```python") > 0
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for example in examples:
            exec(example, names)
    assert (tmp_path / "recalibrated" / "README.md").exists()


def test_the_table_names_what_is_tested() -> None:
    table = TEXT.split("## What is tested")[1].split("\n## ")[0]
    assert {chosen.kind for chosen in ARCHITECTURES.values()} == {
        name for name in re.findall(r"`(\w+)`", table) if re.search(r"For[A-Z]|LMHead|Model$", name)
    }


def test_every_linked_file_exists() -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (ROOT / "docs" / link).exists(), link
