from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import EvaluationError
from map_bo.evaluators.data import Data
from map_bo.evaluators.text.labels import Classes, classes_of_model, rows_of
from tests.evaluators.text.tiny_text import rows_file, tiny_classifier

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def rows(
    tmp_path: Path,
    values: list[object],
    names: tuple[str, ...] | None,
    size: int,
    labels: Any = None,
) -> list[int]:
    path = rows_file(tmp_path / "a.jsonl", [{"label": value} for value in values])
    data = Data(path=path, labels=labels)
    found = data.read(["label"])
    return rows_of(found, Classes(size, names, "the head"), explicit=labels is not None)


def test_the_names_of_a_model() -> None:
    assert classes_of_model(tiny_classifier(classes=["bad", "good"]), 2).names == ("bad", "good")
    assert classes_of_model(tiny_classifier(classes=2), 2).names is None  # LABEL_0, LABEL_1
    assert classes_of_model(tiny_classifier(classes=["bad", "good"]), 3).names is None
    assert classes_of_model(tiny_classifier(classes=["0", "1"]), 2).names is None


def test_names_are_matched_in_any_order_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert rows(tmp_path, ["bad", "good"], ("GOOD", "BAD"), 2) == [1, 0]
    assert "are matched with those of the head by name: 'bad' is 1, 'good' is 0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert rows(tmp_path, ["bad", "good"], ("bad", "good"), 2) == [0, 1]
        # A split may lack a class of the head.
        assert rows(tmp_path, ["good"], ("bad", "good", "so so"), 3) == [1]
    assert "'bad'" not in caplog.text


def test_names_that_differ_in_capitals_alone_stay_apart(tmp_path: Path) -> None:
    assert rows(tmp_path, ["A", "a"], ("a", "A"), 2) == [1, 0]


@pytest.mark.parametrize("labels", [["bad", "good"], {"bad": 0, "good": 1}])
def test_a_label_map_gives_indices_where_the_head_has_other_names(
    tmp_path: Path, labels: Any
) -> None:
    assert rows(tmp_path, ["good", "bad"], ("NEGATIVE", "POSITIVE"), 2, labels) == [0, 1]
    assert rows(tmp_path, ["good", "bad"], ("good", "bad"), 2, labels) == [1, 0]


@pytest.mark.parametrize(
    ("values", "names", "size", "labels", "message"),
    [
        (["bad", "fair"], ("bad", "good"), 2, None, "has the classes 'fair', which the head lacks"),
        (["bad", "fair"], ("bad", "good"), 2, ["bad", "fair"], "has the classes 'fair', which"),
        (["bad", "good"], None, 2, None, "has the classes 'bad', 'good', and the head has 2 clas"),
        ([0, 2], None, 2, None, "has classes up to 2, and the head has 2"),
        ([0, 1], None, 3, ["bad", "good"], "has 2 classes, and the head has 3"),
        ([0, 1, 2], None, 2, ["a", "b", "c"], "has 3 classes, and the head has 2"),
        (["x", "y"], None, 2, {"x": 0, "y": 5}, "has classes up to 5, and the head has 2"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    tmp_path: Path,
    values: list[object],
    names: tuple[str, ...] | None,
    size: int,
    labels: Any,
    message: str,
) -> None:
    with pytest.raises(EvaluationError, match=message) as found:
        rows(tmp_path, values, names, size, labels)
    assert "labels=" in (found.value.hint or "")


def test_whole_numbers_are_rows_and_fewer_than_the_head_has_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert rows(tmp_path, [1, 0], ("bad", "good"), 2) == [0, 1]
    assert caplog.text == ""
    assert rows(tmp_path, [1, 0], None, 3) == [0, 1, 2]
    assert "has classes up to 1, and the head has 3" in caplog.text
