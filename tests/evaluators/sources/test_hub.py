from __future__ import annotations

import logging
from pathlib import Path

import pytest

from map_bo.errors import EvaluationError, MissingDependencyError
from map_bo.evaluators.sources.hub import hub_name, is_saved, read_hub, read_saved
from map_bo.evaluators.sources.table import EncodedImage


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("stanfordnlp/sst2", ("stanfordnlp/sst2", None)),
        ("imdb", ("imdb", None)),
        ("hf://datasets/a/b@main", ("a/b", "main")),
        ("a/b@refs/convert/parquet", ("a/b", "refs/convert/parquet")),
        ("a/b/c", None),
        ("/models/a", None),
        ("", None),
    ],
)
def test_names_of_the_hub(text: str, name: tuple[str, str | None] | None) -> None:
    assert hub_name(text) == name


def test_without_datasets_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"reading it from the .* needs datasets") as e:
        read_hub("a/b", None, None, None)
    assert e.value.hint == 'pip install "map-bo[data]"'


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=part, test=part.select([0])).save_to_disk(str(tmp_path / "two"))
    assert is_saved(tmp_path / "one")
    assert is_saved(tmp_path / "two")
    assert not is_saved(tmp_path)
    table = read_saved(tmp_path / "one", None)
    assert list(table.column("text")) == ["a", "b"]
    assert table.classes == {"label": ("bad", "good")}
    assert list(read_saved(tmp_path / "two", "test").column("label")) == [1]
    with pytest.raises(EvaluationError, match="has no split 'dev'; it has train, test"):
        read_saved(tmp_path / "two", "dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_saved(tmp_path / "one", None)


def test_images_are_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    pytest.importorskip("PIL")
    features = datasets.Features({"image": datasets.Image()})
    part = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"not even a picture", "path": None}]}, features=features
    )
    part.save_to_disk(str(tmp_path / "one"))
    found = list(read_saved(tmp_path / "one", None).column("image"))
    assert found == [EncodedImage(b"not even a picture")]


@pytest.mark.parametrize(
    ("said", "asked", "message", "hint"),
    [
        (
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\n"
            "Example of usage:\n\t`load_dataset('a/b', 'en')`",
            None,
            "the data set a/b has several configurations, and none was chosen; it has en, de",
            "give name, such as name='en'",
        ),
        (
            "BuilderConfig 'dee' not found. Available: ['en', 'de']",
            "dee",
            "the data set a/b has no configuration 'dee'; it has en, de",
            "did you mean 'de'?",
        ),
        (
            "Dataset scripts are no longer supported, but found b.py",
            None,
            "the data set a/b is a program, which is not run",
            "look for the branch of its Parquet files: path='NAME@refs/convert/parquet'",
        ),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, said: str, asked: str | None, message: str, hint: str
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> object:
        raise ValueError(said)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(EvaluationError) as found:
        read_hub("a/b", None, asked, None)
    assert (found.value.message, found.value.hint) == (message, hint)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    import huggingface_hub

    asked: list[object] = []

    def load(*args: object, **settings: object) -> object:
        asked.append((args, settings))
        return datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a", "b"]}))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    table = read_hub("a/b", "main", "en", None)
    assert asked == [(("a/b", "en"), {"revision": "main"})]
    assert (table.where, list(table.column("text"))) == ("a/b (en), split 'test'", ["a", "b"])


def test_a_name_that_is_neither_here_nor_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> object:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    level = logging.getLogger("datasets").level
    with pytest.raises(EvaluationError, match="no/such is no file or folder here") as found:
        read_hub("no/such", None, None, "test")
    assert "check the path" in (found.value.hint or "")
    assert datasets.config.HF_HUB_OFFLINE is False
    assert logging.getLogger("datasets").level == level
    assert capfd.readouterr().err == ""
