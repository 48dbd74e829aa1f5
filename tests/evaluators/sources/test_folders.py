from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from map_bo.errors import EvaluationError
from map_bo.evaluators.sources.folders import read_folder
from map_bo.evaluators.sources.table import Table


def tree(root: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".").replace("_DASH_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def read(folder: Path, split: str | None = None, wanted: tuple[str, ...] = ("image",)) -> Table:
    return read_folder(folder, split, "utf-8", wanted)


def test_images_by_class(tmp_path: Path) -> None:
    root = tree(tmp_path, dog__b_DOT_png=b"b", dog__a_DOT_PNG=b"a", cat__c_DOT_jpg=b"c")
    table = read(root)
    assert table.classes == {"label": ("cat", "dog")}
    assert list(table.column("label")) == [0, 1, 1]
    assert [Path(str(one)).name for one in table.column("image")] == ["c.jpg", "a.PNG", "b.png"]
    with pytest.raises(EvaluationError, match="has no splits, got split 'test'"):
        read(root, "test")


def test_images_by_split_and_class(tmp_path: Path) -> None:
    root = tree(tmp_path, train__a__1_DOT_png=b"", test__a__2_DOT_png=b"", test__b__3_DOT_png=b"")
    assert list(read(root, "test").column("label")) == [0, 1]
    with pytest.raises(EvaluationError, match="has no split 'dev'; it has test, train"):
        read(root, "dev")


def test_one_file_per_split(tmp_path: Path) -> None:
    root = tree(tmp_path, train_DOT_csv="a\n1\n", test_DOT_csv="a\n2\n3\n", README_DOT_md="x")
    assert list(read(root, "test").column("a")) == ["2", "3"]
    with pytest.raises(EvaluationError, match="has the splits test, train, and none was chosen"):
        read(root)


def test_several_files_per_split_as_on_the_hub(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        data__train_DASH_00000_DASH_of_DASH_00002_DOT_jsonl='{"a": 1}\n',
        data__train_DASH_00001_DASH_of_DASH_00002_DOT_jsonl='{"a": 2}\n',
        data__validation_DASH_00000_DASH_of_DASH_00001_DOT_jsonl='{"a": 3}\n',
    )
    assert list(read(root, "train").column("a")) == [1, 2]
    assert list(read(root, "dev").column("a")) == [3]
    tree(root, data__train_DASH_00001_DASH_of_DASH_00002_DOT_jsonl='{"b": 2}\n')
    with pytest.raises(EvaluationError, match=r"has the columns b; .* has a"):
        read(root, "train")


def test_one_file_of_lines_per_column(tmp_path: Path) -> None:
    root = tree(tmp_path, seq_DOT_in="play this\nstop\n", label="Play\nStop\n")
    table = read(root, wanted=("seq.in", "label"))
    assert list(table.column("seq.in")) == ["play this", "stop"]
    assert list(table.column("label")) == ["Play", "Stop"]
    tree(root, label="Play\n")
    with pytest.raises(EvaluationError, match=r"'seq.in' has 2, 'label' has 1"):
        read(root, wanted=("seq.in", "label"))


def test_idx_files_by_split(tmp_path: Path) -> None:
    head = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1))
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 2, 7, 3))
    tree(
        tmp_path,
        t10k_DASH_images_DASH_idx3_DASH_ubyte=head + bytes((5, 6)),
        t10k_DASH_labels_DASH_idx1_DASH_ubyte=labels,
    )
    table = read(tmp_path, "test")
    assert list(table.column("label")) == [7, 3]
    assert [np.asarray(one).item() for one in table.column("image")] == [5, 6]


@pytest.mark.parametrize("files", [{}, {"a_DOT_docx": "x"}, {"sub__a_DOT_docx": "x"}])
def test_a_folder_without_data_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(EvaluationError, match=r"holds no (data|images)") as found:
        read(tree(tmp_path, **files))
    assert found.value.hint
