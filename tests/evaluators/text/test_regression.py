from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.text.regression import Regression
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.text.tiny_text import (
    readable_bert,
    reviews,
    rows_file,
    tiny_bert,
    tiny_classifier,
    word_tokenizer,
)

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")
ALL = ["absolute_error", "squared_error", "pearson", "spearman"]


def stars(size: int, seed: int) -> list[dict[str, object]]:
    return [
        {"text": row["text"], "score": 4.0 * int(str(row["label"])) + len(str(row["text"])) / 50}
        for row in reviews(size, seed)
    ]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return rows_file(tmp_path / "stars.jsonl", stars(40, 0))


def evaluator(path: str, **settings: Any) -> Regression:
    return Regression(data=path, tokenizer=word_tokenizer(), batch_size=8, **settings)


class TestRegression(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, path: str) -> ExampleEvaluator:
        return evaluator(path, metrics=ALL)

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_classifier(classes=1)
        return made


def test_errors_are_those_of_the_model_called_one_by_one(path: str) -> None:
    scored, model = evaluator(path, metrics=ALL), tiny_classifier(classes=1)
    scored.prepare(model)
    found = scored.score(model, torch.arange(40))
    for row, outcome in zip(stars(40, 0), found, strict=True):
        with torch.inference_mode():
            said = float(model(**word_tokenizer()(row["text"], return_tensors="pt")).logits)
        error = said - float(str(row["score"]))
        assert outcome.tolist() == pytest.approx([abs(error), error**2, said, said], abs=1e-4)
    part = torch.tensor([1, 2, 5, 9, 30])
    assert scored.summary(found[part], part)["pearson"].value == pytest.approx(
        float(torch.corrcoef(torch.stack([found[part, 2], scored.ready.targets[part]]))[0, 1])
    )


def test_a_fitted_head_follows_the_numbers(path: str, tmp_path: Path) -> None:
    train = rows_file(tmp_path / "train.jsonl", stars(60, 1))
    scored = evaluator(path, metrics=ALL, head="fit", train=train)
    scored.prepare(readable_bert())
    found = scored(readable_bert())
    assert found["pearson"].value > 0.8
    assert found["absolute_error"].value < 1.5


def test_pairs(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"first": "good film", "second": "fine plot", "score": "0.9"},
        {"first": "good film", "second": "bad plot", "score": 0},
    ]
    path = rows_file(tmp_path / "pairs.jsonl", rows)
    scored = evaluator(path, pairs=True)
    scored.prepare(tiny_classifier(classes=1))
    assert scored.size == 2
    assert scored.ready.targets.tolist() == [0.9, 0.0]


def test_the_same_prediction_for_all_has_no_correlation(path: str) -> None:
    scored, model = evaluator(path, metrics="spearman"), tiny_classifier(classes=1)
    scored.prepare(model)
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(EvaluationError, match="all 40 predictions are 0, and have no correlation"):
        scored(model)


def test_heads_and_columns_that_do_not_fit_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="has 2 outputs, and a regression needs one"):
        evaluator(path).prepare(tiny_classifier(classes=2))
    with pytest.raises(EvaluationError, match="BertModel has no head"):
        evaluator(path).prepare(tiny_bert())
    words = rows_file(tmp_path / "words.jsonl", [{"text": "good", "score": "high"}])
    with pytest.raises(EvaluationError, match="'high', not a finite number"):
        evaluator(words).prepare(tiny_classifier(classes=1))
    with pytest.raises(ConfigError, match="there is no metric 'mse' here"):
        evaluator(path, metrics="mse")
    with pytest.raises(ConfigError, match="pairs must be true or false"):
        evaluator(path, pairs="no")
