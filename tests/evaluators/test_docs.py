"""The examples of docs/evaluators.md run."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import map_bo
from map_bo.evaluators.data import Data
from map_bo.evaluators.kinds import evaluator_from
from tests.evaluators.text.tiny_text import readable_bert, reviews, rows_file, word_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "evaluators.md").read_text()
pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def written(name: str, seed: int) -> None:
    with Path(name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["review", "mood"])
        table.writerows(
            [row["text"], ["bad", "good"][int(str(row["label"]))]] for row in reviews(60, seed)
        )


def test_the_configuration_is_built() -> None:
    block = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)[0]
    tasks = yaml.safe_load(block)
    assert len(tasks) == 5
    for name, settings in tasks.items():
        found: Any = evaluator_from(
            f"problem.tasks.{name}", settings, defaults={"tokenizer": "base"}
        )
        assert found.tokenizer == "base"
        assert isinstance(found.data, Data)


@pytest.mark.slow
def test_the_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "mood", "stars")):
        model = readable_bert()
        change = readable_bert(seed).state_dict()
        moved = {k: v + 0.1 * change[k] for k, v in model.state_dict().items()}
        model.load_state_dict(moved if seed else model.state_dict())
        model.save_pretrained(name)
        word_tokenizer().save_pretrained(name)
    written("mood.csv", 0)
    written("mood_train.csv", 1)
    rows_file(
        Path("similar.jsonl"),
        [
            {"first": a["text"], "second": b["text"], "score": i}
            for i, (a, b) in enumerate(zip(reviews(20), reviews(20, 4), strict=True))
        ],
    )
    snippets = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert TEXT.count("```python") == len(snippets) == 4
    code, *others = snippets
    for other in others:
        exec(other, {})
    names: dict[str, object] = {}
    exec(code, names)
    result = names["result"]
    assert isinstance(result, map_bo.Result)
    assert len(result.front.X) > 0
