from __future__ import annotations

from pathlib import Path

import pytest

from map_bo.errors import EvaluationError
from map_bo.evaluators.sources.table import Split, choose_split, from_columns, no_splits


@pytest.mark.parametrize(
    ("text", "name", "rows"),
    [
        (None, None, range(10)),
        ("test", "test", range(10)),
        ("train[:80%]", "train", range(8)),
        ("train[80%:]", "train", range(8, 10)),
        ("[2:4]", None, range(2, 4)),
        ("dev[-3:]", "dev", range(7, 10)),
        ("[:100]", None, range(10)),
    ],
)
def test_a_split_and_a_part_of_it(text: str | None, name: str | None, rows: range) -> None:
    split = Split.of(text)
    assert (split.name, split.rows(10)) == (name, rows)


def test_what_is_no_split_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"part of one, got 'test\[2\]'"):
        Split.of("test[2]")


def test_the_split_that_is_meant() -> None:
    assert choose_split("d", None, ["train"]) == "train"
    assert choose_split("d", "test", ["train", "test"]) == "test"
    assert choose_split("d", "validation", ["train", "dev"]) == "dev"
    with pytest.raises(EvaluationError, match="d has the splits train, test, and none was chosen"):
        choose_split("d", None, ["train", "test"])
    with pytest.raises(EvaluationError, match="d has no split 'tset'; it has train, test") as found:
        choose_split("d", "tset", ["train", "test"])
    assert found.value.hint == "did you mean 'test'?"


def test_a_file_without_splits_refuses_one() -> None:
    no_splits(Path("a.csv"), None)
    with pytest.raises(EvaluationError, match=r"a.csv has no splits, got split 'test'"):
        no_splits(Path("a.csv"), "test")


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(EvaluationError, match="'a' has 2, 'b' has 1"):
        from_columns("d", {"a": [1, 2], "b": [1]})
