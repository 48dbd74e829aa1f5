from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import f1_score
from torch import nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.text.classification import TextClassification, TextPairs
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.text.tiny_text import (
    readable_bert,
    reviews,
    rows_file,
    tiny_bert,
    tiny_classifier,
    tiny_gpt2,
    word_tokenizer,
)

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return rows_file(tmp_path / "reviews.jsonl", reviews())


@pytest.fixture
def train(tmp_path: Path) -> str:
    return rows_file(tmp_path / "train.jsonl", reviews(60, seed=1))


def evaluator(path: str, **settings: Any) -> TextClassification:
    return TextClassification(data=path, tokenizer=word_tokenizer(), batch_size=8, **settings)


class TestOwnHead(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, path: str) -> ExampleEvaluator:
        return evaluator(path, metrics=["accuracy", "f1", "loss"])

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_classifier()
        return made


class TestFittedHead(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, path: str, train: str) -> ExampleEvaluator:
        return evaluator(path, head="fit", train=train)

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_bert()
        return made


class TestPairs(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, tmp_path: Path) -> ExampleEvaluator:
        rows = reviews(12)
        other = [
            {"first": r["text"], "second": s["text"], "label": r["label"]}
            for r, s in zip(rows, reviews(12, 5), strict=True)
        ]
        return TextPairs(
            data=rows_file(tmp_path / "pairs.jsonl", other), tokenizer=word_tokenizer()
        )

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_classifier()
        return made


def test_the_outcomes_are_those_of_the_model_called_one_by_one(path: str) -> None:
    scored, model = evaluator(path, metrics=["accuracy", "f1", "loss"]), tiny_classifier()
    scored.prepare(model)
    found = scored.score(model, torch.arange(40))
    tokenizer, right, predictions = word_tokenizer(), [], []
    for row, outcome in zip(reviews(), found, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        label, predicted = int(str(row["label"])), int(logits.argmax())
        assert outcome[:2].tolist() == [float(predicted == label), predicted]
        assert float(outcome[2]) == pytest.approx(-float(logits.log_softmax(-1)[label]), abs=1e-5)
        right.append(label)
        predictions.append(predicted)
    summary = scored(model)
    assert summary["accuracy"].count == 40
    assert summary["f1"].value == pytest.approx(f1_score(right, predictions, average="macro"))
    part = torch.tensor([3, 30, 7, 8])
    assert scored.summary(found[part], part)["f1"].value == pytest.approx(
        f1_score([right[i] for i in part], [predictions[i] for i in part], average="macro")
    )


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": r["text"], "label": "good" if r["label"] else "bad"} for r in reviews()
    ]
    path = rows_file(tmp_path / "named.jsonl", rows)
    straight, turned = tiny_classifier(classes=["bad", "good"]), tiny_classifier(classes=["x", "y"])
    turned.config.id2label = {0: "Good", 1: "Bad"}
    first, second = evaluator(path), evaluator(path)
    first.prepare(straight)
    second.prepare(turned)
    there, here = first.score(straight, torch.arange(40)), second.score(turned, torch.arange(40))
    assert torch.equal(there, 1 - here)
    assert first.digest != second.digest
    with pytest.raises(EvaluationError, match="the classes 'bad', 'good', which the head of Bert"):
        evaluator(path).prepare(tiny_classifier(classes=["no", "yes"]))
    with pytest.raises(EvaluationError, match="has 2 classes without names"):
        evaluator(path).prepare(tiny_classifier())
    evaluator({"path": path, "labels": ["bad", "good"]}).prepare(tiny_classifier())  # type: ignore[arg-type]


def test_a_fitted_head_is_good_and_matched_by_name(path: str, train: str) -> None:
    def accuracy(data: object, of_train: object) -> float:
        scored = evaluator(data, head="fit", train=of_train)  # type: ignore[arg-type]
        scored.prepare(readable_bert())
        return scored(readable_bert())["accuracy"].value

    def named(path: str, labels: object) -> dict[str, object]:
        return {"path": path, "labels": labels}

    usual = accuracy(path, train)
    assert usual > 0.9
    # Other numbers for the same names of the two files: they are matched by name.
    names, turned = {"0": 0, "1": 1}, ["bad", "good"]
    assert accuracy(named(path, names), named(train, turned)) == usual
    swapped = rows_of(train, lambda label: "good" if label else "bad")
    assert accuracy(named(path, turned), named(swapped, {"good": 0, "bad": 1})) == usual
    # And other numbers without names are other classes.
    assert accuracy(named(path, {"0": 1, "1": 0}), train) == pytest.approx(1 - usual)


def rows_of(path: str, label: Callable[[int], str]) -> str:
    """Write the rows of a file again, with other labels; return the path."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rows = [{"text": row["text"], "label": label(row["label"])} for row in lines]
    return rows_file(Path(path).with_suffix(".again.jsonl"), rows)


def test_a_head_is_fitted_below_the_models_own(path: str, train: str) -> None:
    model = tiny_classifier()
    scored, bare = evaluator(path, head="fit", train=train), tiny_bert()
    bare.load_state_dict(model.bert.state_dict())
    scored.prepare(model)
    again = evaluator(path, head="fit", train=train)
    again.prepare(bare)
    assert scored.digest == again.digest


def test_a_head_stays_while_the_encoder_changes(path: str, train: str) -> None:
    scored = evaluator(path, head="fit", train=train)
    scored.prepare(readable_bert())
    assert scored(readable_bert(7))["accuracy"].value < 0.9


def test_a_head_of_a_file(tmp_path: Path, path: str) -> None:
    file = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(2, 16), "bias": torch.tensor([0.0, 1.0])}, file)
    scored = evaluator(path, head=file, metrics=["accuracy", "loss"])
    scored.prepare(tiny_bert())
    found = scored(tiny_bert())
    assert found["accuracy"].value == 0.5
    chance = torch.tensor([0.0, 1.0]).log_softmax(-1)
    assert found["loss"].value == pytest.approx(-float(chance.mean()), abs=1e-6)
    save_file({"weight": torch.zeros(2, 8)}, file)
    with pytest.raises(EvaluationError, match="is for 8 features, and BertModel has 16"):
        evaluator(path, head=file).prepare(tiny_bert())
    save_file({"weight": torch.zeros(1, 16)}, file)
    with pytest.raises(EvaluationError, match="has 1 output"):
        evaluator(path, head=file).prepare(tiny_bert())


def test_a_decoder_that_knows_no_padding(path: str) -> None:
    scored, model = evaluator(path), tiny_gpt2()
    scored.prepare(model)
    together = scored.score(model, torch.arange(40))
    assert model.config.pad_token_id is None
    alone = evaluator(path)
    alone.batch_size = 1
    alone.prepare(model)
    assert torch.equal(alone.score(model, torch.arange(40)), together)


def test_a_model_that_breaks_fails_with_its_reason(path: str) -> None:
    scored, model = evaluator(path), tiny_classifier()
    scored.prepare(model)
    with torch.no_grad():
        model.classifier.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="the outcomes of 8 of 8 examples are NaN"):
        scored(model)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda: tiny_classifier(classes=1), {}, "has 1 output, which tells no classes apart"),
        (lambda: tiny_bert(), {}, "BertModel has no head: it returned a"),
        (lambda: nn.Linear(2, 2), {}, "Linear cannot be called on a text: TypeError"),
        (lambda: tiny_classifier(vocab_size=5000), {}, "has 21 tokens, and the model embeds 5000"),
        (lambda: tiny_classifier(), {"max_length": 99}, "max_length is 99, and the model reads"),
        (lambda: nn.Linear(2, 2), {"head": "no.safetensors"}, "Linear cannot be called on a text"),
        (lambda: tiny_bert(), {"head": "no.safetensors"}, "there is no file"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    path: str, model: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message) as found:
        evaluator(path, **settings).prepare(model())
    assert found.value.hint


def test_training_data_without_a_class_are_refused(tmp_path: Path, path: str) -> None:
    rows: list[dict[str, object]] = [{"text": "good", "label": 2}, {"text": "bad", "label": 0}]
    lacking = rows_file(tmp_path / "lacking.jsonl", rows)
    with pytest.raises(EvaluationError, match="no example of the classes 1"):
        evaluator(path, head="fit", train=lacking).prepare(tiny_bert())
    one = rows_file(tmp_path / "one.jsonl", [{"text": "good", "label": 0}])
    with pytest.raises(EvaluationError, match="has one class alone"):
        evaluator(path, head="fit", train=one).prepare(tiny_bert())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": "acuracy"}, "there is no metric 'acuracy' here"),
        ({"metrics": []}, "metrics must be different names"),
        ({"metrics": ["f1", "f1"]}, "metrics must be different names"),
        ({"head": "fit"}, "head='fit' needs the data"),
        ({"train": "a.csv"}, "train was given, and head is None"),
        ({"head": 3}, "head must be a file or 'fit', got 3"),
        ({"head": "fit", "train": "a.csv", "fit": "lasso"}, "fit must be one of logistic, ridge"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"penalty": 0}, "penalty must be"),
        ({"max_length": 1}, "max_length must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"data": {"pth": "a"}}, "a data block has no setting 'pth'"),
        (
            {"head": "fit", "train": "a.csv", "fit": "ridge", "metrics": "loss"},
            "the metric 'loss' needs probabilities",
        ),
    ],
)
def test_settings_that_are_not_possible_are_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        TextClassification(**{"data": "a.csv"} | settings)
    assert found.value.hint
