from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression, Ridge

from map_bo.errors import EvaluationError
from map_bo.evaluators.text.heads import Head, fit_head, read_head
from map_bo.evaluators.text.pooling import all_features
from map_bo.evaluators.text.tokens import tokenise
from tests.evaluators.text.tiny_text import readable_bert, reviews, tiny_bert, word_tokenizer

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")
ROWS = reviews(48)
TOKENS_OF = [str(row["text"]) for row in ROWS]


def tokens() -> Any:
    return tokenise(
        word_tokenizer(), TOKENS_OF, model=tiny_bert(), max_length=12, where="a", rows=range(48)
    )


def fitted(cache: Path, model: Any = None, **settings: Any) -> Head:
    given: dict[str, Any] = {
        "classes": 2,
        "method": "logistic",
        "penalty": 1.0,
        "pooling": "mean",
        "batch_size": 16,
        "targets": [int(str(row["label"])) for row in ROWS],
    } | settings
    return fit_head(model or tiny_bert(), tokens(), cache_dir=cache, **given)


def test_the_same_head_is_fitted_twice_and_found_the_third_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = fitted(tmp_path / "a"), fitted(tmp_path / "b")
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.digest == second.digest
    monkeypatch.setattr("map_bo.evaluators.text.heads._fit", None)  # is not called
    assert fitted(tmp_path / "a").digest == first.digest


def test_another_base_other_data_or_settings_make_another_head(tmp_path: Path) -> None:
    for settings in (
        {},
        {"model": tiny_bert(1)},
        {"penalty": 2.0},
        {"method": "ridge"},
        {"pooling": "cls"},
        {"targets": [i // 24 for i in range(48)]},
    ):
        fitted(tmp_path, **settings)
    assert len(list((tmp_path / "heads").glob("*.safetensors"))) == 6


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_that_of_scikit_learn_on_standardised_features(
    tmp_path: Path, classes: int
) -> None:
    y = [i % classes for i in range(48)]
    X = all_features(tiny_bert(), tokens(), "mean", 16).double().numpy()
    Z = (X - X.mean(0)) / X.std(0)
    expected = LogisticRegression(C=0.5, max_iter=2000, tol=1e-5).fit(Z, y).predict_proba(Z)
    head = fitted(tmp_path, classes=classes, targets=y, penalty=2.0)
    found = head(torch.from_numpy(X).float()).softmax(-1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_numbers_are_fitted_by_ridge_regression(tmp_path: Path) -> None:
    y = [0.1 * i for i in range(48)]
    X = all_features(tiny_bert(), tokens(), "mean", 16).double().numpy()
    Z = (X - X.mean(0)) / X.std(0)
    expected = Ridge(alpha=3.0).fit(Z, y).predict(Z)
    head = fitted(tmp_path, classes=None, method="ridge", targets=y, penalty=3.0)
    assert head.weight.shape == (1, 16)
    found = head(torch.from_numpy(X).float())[:, 0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["logistic", "ridge"])
def test_a_head_tells_good_from_bad(tmp_path: Path, method: str) -> None:
    head = fitted(tmp_path, model=readable_bert(), method=method)
    outputs = head(all_features(readable_bert(), tokens(), "mean", 16))
    right = outputs.argmax(-1) == torch.tensor([row["label"] for row in ROWS])
    assert float(right.double().mean()) > 0.9


def test_a_base_that_is_broken_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="the features of the base hold NaN"):
        fitted(tmp_path, model=model)


@pytest.mark.parametrize("name", ["", "classifier."])
def test_a_head_of_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "head.safetensors"
    weight, bias = torch.ones(3, 16, dtype=torch.float16), torch.arange(3.0)
    labels = {"labels": json.dumps(["a", "b", "c"])}
    save_file({f"{name}weight": weight, f"{name}bias": bias}, path, metadata=labels)
    head = read_head(path)
    assert head.labels == ("a", "b", "c")
    assert head(torch.ones(1, 16)).tolist() == [[16.0, 17.0, 18.0]]
    save_file({"weight": weight}, path)
    assert read_head(str(path)).bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("tensors", "labels", "message"),
    [
        ({"bias": torch.ones(2)}, None, r"holds bias \[2\], not a linear head"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, None, "not a linear head"),
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, None, "not a linear head"),
        ({"weight": torch.ones(2, 3).long()}, None, "not a linear head"),
        ({}, None, "holds nothing, not a linear head"),
        ({"weight": torch.ones(2, 3)}, '["a"]', "name 1 classes, and the head has 2"),
        ({"weight": torch.ones(2, 3)}, "{", "cannot be read"),
    ],
)
def test_what_is_no_head_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], labels: str | None, message: str
) -> None:
    path = tmp_path / "head.safetensors"
    save_file(tensors, path, metadata=None if labels is None else {"labels": labels})
    with pytest.raises(EvaluationError, match=message):
        read_head(path)


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"there is no file .*head.safetensors of a head"):
        read_head(tmp_path / "head.safetensors")
    (tmp_path / "head.safetensors").write_bytes(b"no")
    with pytest.raises(EvaluationError, match=r"head.safetensors cannot be read"):
        read_head(tmp_path / "head.safetensors")
