"""Local tasks of the evaluation harness, written into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

__all__ = ["write_tasks"]

QUESTIONS = ["the cat sat?", "a dog?", "ran far?", "two?", "mat on?"]
TEXTS = ["the cat sat on the mat", "yes no", "a dog ran far away, two or three dogs"]


def write_tasks(folder: Path) -> str:
    """Write tasks of every kind of request, and groups of them; return the folder."""

    def task(name: str, rows: list[dict[str, Any]], **settings: Any) -> None:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        files = {"test": str(folder / f"{name}.jsonl")}
        if settings.get("training_split"):
            files["train"] = files["test"]
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            **settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))

    choices = [
        {"question": one, "choices": ["yes", "no", "far away"], "answer": i % 3}
        for i, one in enumerate(QUESTIONS)
    ]
    choice = {
        "output_type": "multiple_choice",
        "training_split": "train",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    task("choice", choices, **choice)
    task("choice_few", choices[:3], **choice, num_fewshot=2)
    texts = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task("texts", [{"text": one} for one in TEXTS], **texts)
    answer = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
    }
    shares = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    take = {"function": "take_first"}
    letter = {"function": "regex", "regex_pattern": "([a-zA-Z])"}
    task(
        "answer",
        [{"question": one, "answer": "y"} for one in QUESTIONS],
        **answer,
        metric_list=shares,
        filter_list=[
            {"name": "letter", "filter": [letter, take]},
            {"name": "whole", "filter": [take]},
        ],
    )
    last = {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " yes",
    }
    task("last", choices, **last)
    task("corpus", choices, **{**choice, "metric_list": [{"metric": "mcc"}]})
    task(
        "half_corpus", choices, **{**choice, "metric_list": [{"metric": "mcc"}, {"metric": "acc"}]}
    )
    task("brier", choices, **{**choice, "metric_list": [{"metric": "brier_score"}]})
    task("empty", [], **choice)
    task("unsafe", choices, **choice, unsafe_code=True)
    task("lost", choices, **{**choice, "doc_to_text": "{{question.nothing.at.all}}"})
    for name, by_size in (("by_size", True), ("by_task", False)):
        group = {
            "group": name,
            "task": ["choice", "choice_few"],
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": by_size}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    plain = {"group": "plain", "task": ["choice", "texts"]}
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    (folder / "no_tasks.yaml").write_text(yaml.safe_dump({"group": "no_tasks", "task": []}))
    return str(folder)
