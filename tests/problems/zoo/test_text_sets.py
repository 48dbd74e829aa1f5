from __future__ import annotations

import os
from pathlib import Path

import pytest

from map_bo.errors import DataError
from map_bo.problems.zoo.text_sets import (
    TEXT_SETS,
    check_sets,
    load_text_set,
    select_texts,
    text_folder,
)
from tests.problems.fake_texts import write_texts

FAKE = ("sst2", "trec", "subj", "snips", "banking77", "clinc150", "tweeteval_emotion")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def real_texts() -> Path | None:
    """Return the folder of the real sets, where ``MAP_BO_DATA`` names one that has them."""
    given = os.environ.get("MAP_BO_DATA")
    folder = text_folder(given) if given and Path(given).is_dir() else None
    return folder if folder is not None and (folder / "trec").is_dir() else None


@pytest.mark.parametrize("name", FAKE)
def test_every_format_gives_texts_and_classes(name: str, root: Path) -> None:
    found = load_text_set(name, root)
    assert len(found.train) == len(found.train_labels)
    assert len(found.test) == len(found.test_labels) > 0
    assert set(found.train_labels) == set(range(len(found.classes)))
    assert all(text == text.strip() and text[0] == "w" for text in found.train + found.test)
    assert not set(found.train) & set(found.test)


def test_labels_are_named_as_in_the_files(root: Path) -> None:
    assert load_text_set("snips", root).classes == ("book", "play", "rate")
    assert load_text_set("tweeteval_emotion", root).classes == ("anger", "joy")
    first = load_text_set("snips", root)
    assert first.classes[first.train_labels[0]] == "play"


def test_repeats_of_training_texts_and_blank_texts_are_left_out(tmp_path: Path) -> None:
    folder = write_texts(tmp_path)
    trec = load_text_set("trec", folder)
    assert (trec.repeats, trec.blank) == (1, 0)
    assert len(trec.test) == 15
    path = folder / "trec" / "TREC.train.all"
    path.write_text(path.read_text() + "1 \n")
    assert load_text_set("trec", folder).blank == 1


def test_a_set_without_a_split_gives_every_fifth_row_to_testing(root: Path) -> None:
    given = [
        line.split(" ", 1)[1] for line in (root / "subj" / "subj.all").read_text().splitlines()
    ]
    assert load_text_set("subj", root).test == tuple(given[4::5])


def test_texts_are_utf_8_or_else_latin_1(tmp_path: Path) -> None:
    folder = write_texts(tmp_path)
    path = folder / "trec" / "TREC.train.all"
    plain = path.read_bytes()
    for encoding in ("utf-8", "latin-1"):
        # U+0085 ends a line for str.splitlines, and does not here.
        path.write_bytes(plain + "0 crème\u0085brûlée\n".encode(encoding))
        assert load_text_set("trec", folder).train[-1] == "crème\u0085brûlée"


def test_a_selection_has_every_class_and_shuffled_tests(root: Path) -> None:
    part = select_texts("snips", root, examples=3)
    assert sorted(part.train_labels) == [0, 1, 2]
    larger = select_texts("snips", root, examples=10)
    assert larger.train[:3] == part.train
    assert len(set(larger.train)) == 10
    full = load_text_set("snips", root)
    assert part.test != full.test
    assert sorted(part.test) == sorted(full.test)
    pairs = dict(zip(full.test, full.test_labels, strict=True))
    assert [pairs[text] for text in part.test] == list(part.test_labels)
    assert part.digest != larger.digest
    with pytest.raises(DataError, match="3 classes, and 2 training texts"):
        select_texts("snips", root, examples=2)


def test_says_what_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAP_BO_DATA", raising=False)
    with pytest.raises(DataError, match="no folder of text sets is given") as caught:
        load_text_set("trec")
    assert "MAP_BO_DATA" in str(caught.value.hint)
    with pytest.raises(DataError, match="there is no folder"):
        load_text_set("trec", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no file .*TREC\.train\.all"):
        load_text_set("trec", tmp_path)
    with pytest.raises(DataError, match="no text set 'imdb'"):
        load_text_set("imdb", tmp_path)
    folder = write_texts(tmp_path / "texts")
    (folder / "trec" / "TREC.train.all").write_text("what is this ?\n")
    with pytest.raises(DataError, match="line without a label: 'what"):
        load_text_set("trec", folder)
    (folder / "trec" / "TREC.train.all").write_text("")
    with pytest.raises(DataError, match=r"test labels that no training text has: 0, 1, 2"):
        load_text_set("trec", folder)
    (folder / "sst2" / "stsa.binary.train.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        load_text_set("sst2", folder)
    (folder / "snips" / "test" / "label").write_text("play\n")
    with pytest.raises(DataError, match="cannot be read"):
        load_text_set("snips", folder)
    (folder / "clinc150" / "data_full.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_text_set("clinc150", folder)


def test_the_folder_may_be_the_one_above(root: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "text")
    assert text_folder(tmp_path) == tmp_path / "text"
    assert text_folder(root) == root


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("trec",), "two or more different ones, got trec"),
        (("trec", "trec"), "two or more different ones, got trec, trec"),
        (("trec", "imdb"), "no text set 'imdb'"),
        ("trec", "two or more different ones, got trec"),
        (None, "two or more different ones, got None"),
        ((), "two or more different ones, got none"),
        (("trec", 3), "no text set 3"),
    ],
)
def test_a_zoo_has_two_sets_or_more(sets: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_sets(sets)


@pytest.mark.data
@pytest.mark.parametrize("name", TEXT_SETS)
def test_real_sets_have_their_published_sizes(name: str) -> None:
    folder = real_texts()
    if folder is None:
        pytest.skip("no text sets: set MAP_BO_DATA to their folder")
    classes, train, test, repeats, blank = {
        "trec": (6, 5452, 490, 10, 0),
        "sst2": (2, 6920, 1819, 2, 0),
        "tweeteval_emotion": (4, 3257, 1421, 0, 0),
        "subj": (2, 8000, 2000, 0, 0),
        "cr": (2, 3017, 751, 3, 4),
        "snips": (7, 13084, 674, 26, 0),
        "banking77": (77, 10003, 3074, 6, 0),
        "mpqa": (2, 8483, 1517, 603, 3),
        "clinc150": (150, 15000, 4498, 2, 0),
    }[name]
    found = load_text_set(name, folder)
    assert (len(found.classes), len(found.train), len(found.test)) == (classes, train, test)
    assert (found.repeats, found.blank) == (repeats, blank)
