from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from map_bo.errors import EvaluationError, MissingDependencyError
from map_bo.evaluators.sources.files import read_file, read_idx
from map_bo.evaluators.sources.table import EncodedImage


def written(path: Path, text: str | bytes) -> Path:
    content = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def columns(path: Path, split: str | None = None) -> dict[str, list[object]]:
    table = read_file(path, split, "utf-8")
    return {name: list(table.column(name)) for name in table.names}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '\ufefftext,label\n"good, and\nlong",1\nbad,0\n'),
        ("a.tsv", 'text\tlabel\n"good, and\nlong"\t1\nbad\t0\n'),
        ("a.jsonl", '{"text": "good, and\\nlong", "label": "1"}\n\n{"label": "0", "text": "bad"}'),
        ("a.json", '[{"text": "good, and\\nlong", "label": "1"}, {"text": "bad", "label": "0"}]'),
        ("b.json", '{"text": ["good, and\\nlong", "bad"], "label": ["1", "0"]}'),
    ],
)
def test_every_format_gives_the_same_columns(
    tmp_path: Path, name: str, text: str, ending: str
) -> None:
    path = written(tmp_path / (name + ending), text)
    assert columns(path) == {"text": ["good, and\nlong", "bad"], "label": ["1", "0"]}


def test_lines_of_text(tmp_path: Path) -> None:
    path = written(tmp_path / "stsa.binary.dev", "0 one long string\r\n\r\n1 fine  thing\n1")
    assert columns(path) == {
        "line": ["0 one long string", "1 fine  thing", "1"],
        "label": ["0", "1", "1"],
        "rest": ["one long string", "fine  thing", ""],
    }


def test_splits_of_json(tmp_path: Path) -> None:
    content = {"train": [["a", "x"]], "test": [["b", "y"], ["c", "z"]]}
    path = written(tmp_path / "d.json.gz", json.dumps(content))
    assert columns(path, "test") == {"0": ["b", "c"], "1": ["y", "z"]}
    with pytest.raises(EvaluationError, match="has no split 'dev'; it has train, test"):
        read_file(path, "dev", "utf-8")


def test_long_documents_and_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = written(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(str(columns(path)["text"][0])) == 200_000
    assert csv.field_size_limit() == before


def test_arrays_of_numpy(tmp_path: Path) -> None:
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    np.savez(tmp_path / "whole.npz", images=images, labels=np.array([1, 0]))
    found = columns(tmp_path / "whole.npz")
    assert found["labels"] == [1, 0]
    assert np.array_equal(np.stack([np.asarray(one) for one in found["images"]]), images)
    np.savez(tmp_path / "parts.npz", train_x2000=images, train_labels=[1, 0], test_x2000=images[:1])
    assert columns(tmp_path / "parts.npz", "train")["labels"] == [1, 0]
    with pytest.raises(EvaluationError, match="has the splits train, test, and none was chosen"):
        read_file(tmp_path / "parts.npz", None, "utf-8")


def test_parquet_and_the_images_in_it(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "text": ["a", "b"],
            "image": [{"bytes": b"PNG", "path": None}, {"bytes": b"x", "path": ""}],
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    found = columns(tmp_path / "a.parquet")
    assert found == {"text": ["a", "b"], "image": [EncodedImage(b"PNG"), EncodedImage(b"x")]}
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_file(written(tmp_path / "b.parquet", b"PAR1 no"), None, "utf-8")


def test_parquet_without_pyarrow_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("map_bo.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pyarrow") as found:
        read_file(written(tmp_path / "a.parquet", b""), None, "utf-8")
    assert found.value.hint == 'pip install "map-bo[data]"'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,text\na,b\n", "two columns called 'text'"),
        ("a.csv", "text,label\na,1\nb\n", "line 3 of .* has 1 values; the first line names 2"),
        ("a.csv", 'text\n"a\n', "cannot be read"),
        ("a.csv", b"text\n\xe9t\xe9\n", "is not utf-8: line 2 holds the byte 0xe9"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2 of .* is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n{"b": 2}\n', "row 2 of .* has no 'a', which other rows have"),
        ("a.jsonl", "1\n", "row 1 of .* is a int, not an object"),
        ("a.json", "1", "holds neither rows nor columns"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"a": [1], "b": [1, 2]}', "different numbers of rows"),
        ("a.txt", b"a\0b", "is not a file of text"),
        ("a.csv.gz", "text", None),
        ("a.pkl", b"x", "is a pickle, which can run code"),
        ("a.py", b"x", "is a program"),
        ("a.npz", b"x", "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, name: str, text: str | bytes, message: str | None
) -> None:
    path = written(tmp_path / name, text)
    if message is None:
        path.write_bytes(path.read_bytes()[:-9])
        message = "cannot be read"
    with pytest.raises(EvaluationError, match=message) as found:
        columns(path)
    assert found.value.hint


def test_a_missing_file_and_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path / "reviews.csv", "a\n1\n")
    with pytest.raises(EvaluationError, match=r"there is no file .*review.csv") as found:
        read_file(tmp_path / "review.csv", None, "utf-8")
    assert found.value.hint == "did you mean 'reviews.csv'?"


class Harm:
    """Says whether it was unpickled."""

    done = False

    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Harm, "done", True))


def test_objects_in_arrays_are_not_unpickled(tmp_path: Path) -> None:
    array = np.empty(1, dtype=object)
    array[0] = Harm()
    content = io.BytesIO()
    np.save(content, array)
    assert pickle.dumps(array)
    np.savez(tmp_path / "a.npz", text=array)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_file(tmp_path / "a.npz", None, "utf-8")
    assert not Harm.done


def test_idx_files(tmp_path: Path) -> None:
    content = bytes((0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4))
    for name in ("a", "a.gz"):
        found = read_idx(written(tmp_path / name, content))
        assert found.tolist() == [[[1, 2], [3, 4]]]
    for bad in (content[:-1], b"\x1f\x8bno", b"", b"1" * 40):
        with pytest.raises(EvaluationError, match="cannot be read"):
            read_idx(written(tmp_path / "b", bad))
