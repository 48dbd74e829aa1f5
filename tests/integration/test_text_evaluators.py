"""Merged models that are scored by the ready evaluators of texts, from folders to numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import map_bo
from map_bo.errors import EvaluationError
from map_bo.evaluators.embeddings import Embeddings
from map_bo.evaluators.text.classification import TextClassification, TextPairs
from map_bo.rng import make_generator
from tests.evaluators.text.tiny_text import (
    drawn,
    readable_bert,
    reviews,
    rows_file,
    tiny_bert,
    tiny_classifier,
    word_tokenizer,
)

transformers = pytest.importorskip("transformers", reason="`huggingface` is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a base, two experts with heads of their own, and data."""
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for seed, (name, classes) in enumerate(
        {"mood": ["bad", "good"], "topic": ["film", "plot", "rest"]}.items(), start=1
    ):
        expert = tiny_classifier(classes=classes)
        change = drawn(tiny_bert(), seed, scale=0.1).state_dict()
        expert.bert.load_state_dict(
            {key: value + change[key] for key, value in base.state_dict().items()}
        )
        drawn(expert.classifier, seed)
        expert.save_pretrained(tmp_path / name)
    mood: list[dict[str, object]] = [
        {"text": r["text"], "label": "good" if r["label"] else "bad"} for r in reviews()
    ]
    rows_file(tmp_path / "mood.jsonl", mood)
    topic: list[dict[str, object]] = [
        {"text": r["text"], "label": ["rest", "plot", "film"][i % 3]}
        for i, r in enumerate(reviews(30, 2))
    ]
    rows_file(tmp_path / "topic.jsonl", topic)
    pairs: list[dict[str, object]] = [
        {"first": a["text"], "second": b["text"], "label": a["label"], "score": i}
        for i, (a, b) in enumerate(zip(reviews(20), reviews(20, 4), strict=True))
    ]
    rows_file(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def problem(
    folder: Path, evaluators: Mapping[str, Any], heads: Mapping[str, str] | None = None
) -> map_bo.MergedModelProblem:
    def architecture() -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(folder / "mood")
        made: nn.Module = transformers.BertForSequenceClassification(config)
        return made

    return map_bo.MergedModelProblem(
        architecture,
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in ("mood", "topic")},
        evaluators=evaluators,
        check_base=False,
        heads=heads,
    )


def evaluators(folder: Path, cache: Path) -> dict[str, Any]:
    tokenizer = str(folder / "base")
    pairs = str(folder / "pairs.jsonl")
    return {
        "mood": TextClassification(
            data=str(folder / "mood.jsonl"), tokenizer=tokenizer, metrics=["accuracy", "loss"]
        ),
        "topic": TextClassification(data=str(folder / "topic.jsonl"), tokenizer=tokenizer),
        "entailed": TextPairs(
            data=pairs, tokenizer=tokenizer, head="fit", train=pairs, cache_dir=cache
        ),
        "similar": Embeddings(data=pairs, tokenizer=tokenizer),
    }


def test_experts_are_scored_as_their_own_models_are(folder: Path, tmp_path: Path) -> None:
    merged = problem(folder, evaluators(folder, tmp_path))
    assert [metric.name for metric in merged.metrics] == [
        "mood_accuracy",
        "mood_loss",
        "topic",
        "entailed",
        "similar",
    ]
    seen = merged.evaluate(torch.eye(2).double(), generator=make_generator(0))
    assert list(seen.failures) == [None, None]
    alone = evaluators(folder, tmp_path)
    for row, name in enumerate(("mood", "topic")):
        kind = transformers.BertForSequenceClassification
        expert = kind.from_pretrained(folder / name).eval()
        alone[name].prepare(expert)
        expected = next(iter(alone[name](expert).values())).value
        assert float(seen.Y[row, 0 if name == "mood" else 2]) == pytest.approx(expected, abs=1e-6)
        alone["similar"].prepare(expert)
        similar = alone["similar"](expert)["spearman"].value
        assert float(seen.Y[row, 4]) == pytest.approx(similar, abs=1e-4)
    again = problem(folder, evaluators(folder, tmp_path))
    assert torch.equal(again.evaluate(torch.eye(2).double(), generator=make_generator(0)).Y, seen.Y)


def test_a_task_without_a_head_is_not_scored_by_one_of_chance(folder: Path) -> None:
    tokenizer = str(folder / "base")
    named = {
        "sentiment": TextClassification(data=str(folder / "mood.jsonl"), tokenizer=tokenizer),
        "topic": TextClassification(data=str(folder / "topic.jsonl"), tokenizer=tokenizer),
        "similar": Embeddings(data=str(folder / "pairs.jsonl"), tokenizer=tokenizer),
    }
    with pytest.raises(EvaluationError, match="'sentiment' cannot be used: it needs the head") as e:
        problem(folder, named).prepare()
    assert "heads={'sentiment': 'mood'}" in (e.value.hint or "")
    problem(folder, named, heads={"sentiment": "mood"}).prepare()


@pytest.mark.slow
def test_a_run_finds_a_front(folder: Path, tmp_path: Path) -> None:
    given = evaluators(folder, tmp_path)
    merged = problem(folder, {name: given[name] for name in ("topic", "similar")})
    result = map_bo.optimize(merged, budget=5, seed=0, progress=False)
    assert len(result.front.X) > 0


def test_everything_that_does_not_fit_is_said_at_once(folder: Path) -> None:
    tokenizer = str(folder / "base")
    word_tokenizer([f"word{i}" for i in range(40)]).save_pretrained(folder / "other")
    wrong = {
        "mood": TextClassification(data=str(folder / "topic.jsonl"), tokenizer=tokenizer),
        "topic": TextClassification(
            data={"path": str(folder / "topic.jsonl"), "columns": {"text": "body"}},
            tokenizer=tokenizer,
        ),
        "other": TextPairs(
            data=str(folder / "pairs.jsonl"),
            tokenizer=str(folder / "other"),
            head="fit",
            train=str(folder / "pairs.jsonl"),
        ),
        "fine": Embeddings(data=str(folder / "pairs.jsonl"), tokenizer=tokenizer),
    }
    with pytest.raises(EvaluationError, match="3 evaluators cannot be used") as found:
        problem(folder, wrong).prepare()
    for part in (
        "'mood': ",
        "which the head of BertForSequenceClassification lacks",
        "has no column 'body'",
        "the tokenizer has 45 tokens, and the model embeds 21",
    ):
        assert part in found.value.message
    assert "fine" not in found.value.message


def test_a_head_is_fitted_on_the_base_alone(folder: Path, tmp_path: Path) -> None:
    readable_bert().save_pretrained(folder / "base")
    train = rows_file(folder / "train.jsonl", reviews(60, 1))
    path = rows_file(folder / "test.jsonl", reviews())
    near = {name: tensor * 1.001 for name, tensor in readable_bert().state_dict().items()}
    far = readable_bert(5).state_dict()
    scored = TextClassification(
        data=path, tokenizer=str(folder / "base"), head="fit", train=train, cache_dir=tmp_path
    )
    merged = map_bo.MergedModelProblem(
        lambda: transformers.AutoModel.from_config(readable_bert().config),
        base=str(folder / "base"),
        experts={"far": far, "near": near},
        evaluators={"mood": scored},
        check_base=False,
    )
    X = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    scores = merged.evaluate(X, generator=make_generator(0)).Y[:, 0].tolist()
    assert scores[0] == scores[1] > 0.9
    assert scores[2] < 0.9
