from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.data import Data, Examples

ROLES = ("text", "label")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    rows = "".join(f"text {i},{'good' if i % 3 else 'bad'},{i}\n" for i in range(20))
    path.write_text("body,label,stars\n" + rows)
    return path


def data(path: Path | str, **settings: Any) -> Data:
    return Data(path=str(path), **settings)


def test_columns_by_role(reviews: Path) -> None:
    found = data(reviews, columns={"text": "body"}).read(ROLES)
    assert (found.size, found.where) == (20, str(reviews))
    assert found.texts("text")[:2] == ["text 0", "text 1"]
    assert found.label_names == ("bad", "good")
    assert found.classes()[:4] == [0, 1, 1, 0]
    assert found.sources == {"text": "body", "label": "label"}


def test_a_plural_is_found_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"texts": "a", "labels": 1}\n')
    assert data(path).read(ROLES).classes() == [1]
    path.write_text("{}\n")
    with pytest.raises(EvaluationError, match="has no column 'text'; it has none"):
        data(path).read(ROLES)
    path.write_text('{"sentence": "a", "labels": 1}\n')
    with pytest.raises(EvaluationError, match="has no column 'text'; it has sentence, labels") as e:
        data(path).read(ROLES)
    assert e.value.hint == "say which column is the text: columns={'text': 'sentence'}"


def test_a_column_that_is_not_there(reviews: Path) -> None:
    with pytest.raises(EvaluationError, match="has no column 'bodi'; it has body, label, st") as e:
        data(reviews, columns={"text": "bodi"}).read(ROLES)
    assert e.value.hint == "did you mean 'body'?"
    with pytest.raises(EvaluationError, match="the role 'txt', which does not exist") as e:
        data(reviews, columns={"txt": "body"}).read(ROLES)
    assert e.value.hint == "did you mean 'text'?"


def test_lines_with_and_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "custrev.all.gz"
    path.write_bytes(gzip.compress(b"1 caf\xe9 is good\n0 bad\n"))
    with pytest.raises(EvaluationError, match="is not utf-8") as e:
        data(path).read(ROLES)
    assert "latin-1" in (e.value.hint or "")
    found = data(path, encoding="latin-1").read(ROLES)
    assert found.texts("text") == ["café is good", "bad"]
    assert found.classes() == [1, 0]
    assert data(path, encoding="latin-1").read(["text"]).texts("text")[1] == "0 bad"
    rest = data(path, encoding="latin-1", columns={"text": "rest"}).read(["text"])
    assert rest.texts("text")[1] == "bad"


def test_limits_nest_and_follow_the_seed(reviews: Path) -> None:
    def rows(**settings: Any) -> tuple[int, ...]:
        return data(reviews, columns={"text": "body"}, **settings).read(ROLES).rows

    small, large = rows(limit=5, seed=1), rows(limit=12, seed=1)
    assert large[:5] == small
    assert sorted(rows(limit=100)) == list(range(20))
    assert rows(limit=5, seed=2) != small
    assert rows(limit=5, seed=1) == small
    assert rows() == tuple(range(20))


def test_a_part_of_the_rows(reviews: Path) -> None:
    settings = {"columns": {"text": "body"}}
    train = data(reviews, split="[:80%]", **settings).read(ROLES)
    test = data(reviews, split="[80%:]", **settings).read(ROLES)
    assert train.rows + test.rows == tuple(range(20))
    with pytest.raises(EvaluationError, match=r"'\[20:\]' of .* takes none of its 20 rows"):
        data(reviews, split="[20:]", **settings).read(ROLES)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    with pytest.raises(EvaluationError, match=r"a.csv is empty"):
        data(path).read(ROLES)


def test_a_missing_file_is_told_from_a_name_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no file"):
        data(tmp_path / "absent.csv").read(ROLES)
    with pytest.raises(EvaluationError, match="there is no file"):
        data("absent.csv").read(ROLES)


def test_a_path_below_a_folder_that_exists_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "sst2.csv").write_text("text\na\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EvaluationError, match="there is no file sets/sst2") as found:
        data("sets/sst2").read(["text"])
    assert found.value.hint == "did you mean 'sst2.csv'?"


def labels(tmp_path: Path, values: list[str], **settings: Any) -> Examples:
    path = tmp_path / "l.jsonl"
    path.write_text("".join(f'{{"text": "a", "label": {value}}}\n' for value in values))
    return data(path, **settings).read(ROLES)


@pytest.mark.parametrize(
    ("values", "given", "classes", "names"),
    [
        (["1", "0", "2"], None, [1, 0, 2], None),
        (['"1"', "0.0"], None, [1, 0], None),
        (['"2.0"', '"10.0"', '"0.0"'], None, [2, 10, 0], None),
        (['"1.0"', '"2"'], ["1", "2"], [0, 1], ("1", "2")),
        (["true", "false"], None, [1, 0], None),
        (['"b"', '"a"', '"b"'], None, [1, 0, 1], ("a", "b")),
        (['"b"', '"a"'], ["b", "a"], [0, 1], ("b", "a")),
        (["1", "0"], ["no", "yes"], [1, 0], ("no", "yes")),
        (['"b"', '"a"'], {"a": 1, "b": 0}, [0, 1], ("b", "a")),
        (["2", "1"], {2: 1, 1: 0}, [1, 0], None),
        (["-1", "1"], {-1: 0, 1: 1}, [0, 1], None),
        (['"a"', '"b"', '"c"'], {"a": 0, "b": 0, "c": 1}, [0, 0, 1], None),
    ],
)
def test_label_maps(
    tmp_path: Path,
    values: list[str],
    given: Any,
    classes: list[int],
    names: tuple[str, ...] | None,
) -> None:
    found = labels(tmp_path, values, labels=given)
    assert found.classes() == classes
    assert found.label_names == names


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        (['"a"', '"c"'], {"a": 0, "b": 1}, "holds the label 'c', which the label map lacks"),
        (['"a"', '"c"'], ["a", "b"], "holds the label 'c', which the label map lacks; it has a, b"),
        (["0", "2"], ["a", "b"], "holds the class 2, and labels name 2 classes"),
        (["-1", "0"], None, "holds negative labels"),
        (["0.5", "1"], None, "holds 0.5, which is not a class"),
        (["0", "2"], ["1", "2"], "holds the label 0, and labels name 1, 2"),
        (['"a"', '" "'], None, "row 2 of .* has no value in column 'label'"),
        (["0", "null"], None, "row 2 of .* has no value in column 'label'"),
    ],
)
def test_labels_that_do_not_fit(
    tmp_path: Path, values: list[str], given: Any, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message) as found:
        labels(tmp_path, values, labels=given)
    assert found.value.hint


def test_names_of_the_hub_are_mapped_by_name(tmp_path: Path) -> None:
    for name in ("bad", "good"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(name.encode())
    roles = ("image", "label")
    assert data(tmp_path).read(roles).label_names == ("bad", "good")
    assert data(tmp_path, labels=["good", "bad"]).read(roles).classes() == [1, 0]
    assert data(tmp_path, labels={"good": 0, "bad": 1}).read(roles).classes() == [1, 0]


def test_the_digest_follows_what_is_read(reviews: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"columns": {"text": "body"}}
    first = data(reviews, **settings).read(ROLES).digest
    copy = tmp_path / "copy.csv"
    copy.write_text(reviews.read_text())
    assert data(copy, **settings).read(ROLES).digest == first
    assert data(copy, labels=["good", "bad"], **settings).read(ROLES).digest != first
    assert data(copy, limit=3, **settings).read(ROLES).digest != first
    copy.write_text(reviews.read_text().replace("text 7", "text seven"))
    assert data(copy, **settings).read(ROLES).digest != first


def test_images_are_told_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"1")
    first = data(tmp_path).read(("image", "label")).digest
    (tmp_path / "a" / "1.png").write_bytes(b"22")
    assert data(tmp_path).read(("image", "label")).digest != first


def test_a_file_is_read_once_while_it_is_in_use(reviews: Path) -> None:
    settings: dict[str, Any] = {"columns": {"text": "body"}}
    first = data(reviews, **settings).read(ROLES)
    assert data(reviews, **settings).read(ROLES) is first
    assert data(reviews, seed=1, **settings).read(ROLES) is not first
    reviews.write_text(reviews.read_text() + "more,good,1\n")
    assert data(reviews, **settings).read(ROLES).size == 21


def test_numbers_and_texts_of_a_wrong_kind(reviews: Path, tmp_path: Path) -> None:
    found = data(reviews, columns={"score": "stars", "text": "body"}).read(["text", "score"])
    assert found.numbers("score")[:3] == [0.0, 1.0, 2.0]
    with pytest.raises(EvaluationError, match=r"row 1 of column 'body' of .* 'text 0', not a fin"):
        found.numbers("text")
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud800"}\n')
    with pytest.raises(EvaluationError, match=r"row 1 of column 'text' of .* half of a character"):
        data(path).read(["text"]).texts("text")
    path.write_text('{"text": 3}\n')
    with pytest.raises(EvaluationError, match=r"row 1 of column 'text' of .* is a int, not text"):
        data(path).read(["text"]).texts("text")


@pytest.mark.parametrize(
    "settings",
    [
        {"path": ""},
        {"path": None},
        {"path": "a", "split": 3},
        {"path": "a", "columns": {"text": 1}},
        {"path": "a", "columns": "text"},
        {"path": "a", "labels": ["a", "a"]},
        {"path": "a", "labels": {"a": "b"}},
        {"path": "a", "labels": "ab"},
        {"path": "a", "limit": 0},
        {"path": "a", "seed": -1},
        {"path": "a", "colums": {}},
        {"split": "test"},
    ],
)
def test_settings_of_a_wrong_kind_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as found:
        Data.of(settings)
    assert found.value.hint


def test_the_forms_of_a_block(reviews: Path) -> None:
    block = Data.of({"path": str(reviews), "limit": 3})
    assert block == Data(path=str(reviews), limit=3)
    assert Data.of(block) is block
    assert Data.of(reviews) == Data.of(str(reviews)) == Data(path=str(reviews))
    with pytest.raises(ConfigError, match="must be a data block, got a int"):
        Data.of(3)  # type: ignore[arg-type]
