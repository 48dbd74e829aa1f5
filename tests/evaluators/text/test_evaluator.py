from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import EvaluationError
from map_bo.evaluators.text.classification import TextClassification
from map_bo.evaluators.text.evaluator import by_length, trial
from tests.evaluators.text.tiny_text import (
    reviews,
    rows_file,
    tiny_bert,
    tiny_classifier,
    word_tokenizer,
)

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def evaluator(tmp_path: Path, **settings: Any) -> TextClassification:
    path = rows_file(tmp_path / "reviews.jsonl", reviews())
    given = {"data": path, "tokenizer": word_tokenizer()} | settings
    return TextClassification(**given)


def test_nothing_is_read_before_it_is_prepared(tmp_path: Path) -> None:
    scored = evaluator(tmp_path, data="absent.csv", head="absent.safetensors")
    with pytest.raises(EvaluationError, match="there is no file"):
        scored.prepare(tiny_bert())


def test_texts_of_like_lengths_make_a_batch(tmp_path: Path) -> None:
    scored = evaluator(tmp_path, batch_size=10)
    scored.prepare(tiny_classifier())
    lengths, seen = scored.ready.tokens.lengths, []

    def score(model: object, items: Tensor) -> Tensor:
        seen.append(lengths[items].tolist())
        return items.double()

    items = torch.tensor([3, 0, 7, 12])
    found = by_length(score, scored.ready.tokens, tiny_classifier(), items)
    assert found.tolist() == [3, 0, 7, 12]
    assert seen == [sorted(lengths[items].tolist(), reverse=True)]


def test_the_mode_of_the_model_comes_back_after_preparing(tmp_path: Path) -> None:
    model = tiny_classifier().train()
    evaluator(tmp_path).prepare(model)
    assert model.training


def test_it_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scored, model = evaluator(tmp_path, max_length=4), tiny_classifier()
    scored.prepare(model)
    scored(model)
    assert capfd.readouterr() == ("", "")


def test_it_crosses_processes(tmp_path: Path) -> None:
    scored, model = evaluator(tmp_path), tiny_classifier()
    scored.prepare(model)
    again = pickle.loads(pickle.dumps(scored))
    assert again.digest == scored.digest
    assert again(model) == scored(model)
    fresh = pickle.loads(pickle.dumps(evaluator(tmp_path)))
    fresh.prepare(model)
    assert fresh.digest == scored.digest


def test_the_digest_follows_data_head_and_settings(tmp_path: Path) -> None:
    def digest(**settings: Any) -> str:
        scored = evaluator(tmp_path, **settings)
        scored.prepare(tiny_classifier())
        return scored.digest

    path = str(tmp_path / "reviews.jsonl")
    train = {"head": "fit", "train": rows_file(tmp_path / "train.jsonl", reviews(30, 3))}
    others = [
        digest(),
        digest(metrics="f1"),
        digest(max_length=4),
        digest(data={"path": path, "limit": 5}),
        digest(data={"path": path, "labels": {"0": 1, "1": 0}}),
        digest(**train),
        digest(**train, pooling="cls"),
        digest(**train, penalty=9.0),
    ]
    assert len(set(others)) == len(others)
    assert digest(batch_size=3) == digest()


def test_a_trial_says_why_a_model_cannot_be_called(tmp_path: Path) -> None:
    scored, model = evaluator(tmp_path), tiny_classifier()
    scored.prepare(model)
    tokens = scored.ready.tokens
    assert trial(model, tokens, None, "mean").shape == (2,)
    with pytest.raises(EvaluationError, match="Identity cannot be called on a text: TypeError"):
        trial(torch.nn.Identity(), tokens, None, "mean")
