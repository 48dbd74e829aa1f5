"""A short campaign: readers of files raise nothing outside of the family, whatever a file holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from map_bo.errors import MapBoError
from tests.fuzz.campaign import escape, quiet, run
from tests.fuzz.mutation import mutate_bytes, mutate_value
from tests.fuzz.readers import READERS, Reader, seeds

few = settings(max_examples=12)
HOSTILE = [
    (name, seed)
    for name in READERS
    for seed in seeds(name)
    if seed.name
    in ("aliases", "itself", "deep", "hostile", "code", "torch_code", "zip_bomb", "huge")
]


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with quiet(), patch("os.fsync", lambda descriptor: None):
        yield


@pytest.mark.parametrize("name", READERS)
@few
@given(st.randoms(use_true_random=False))
def test_nothing_escapes(name: str, random: Random) -> None:
    assert escape(name, random.choice(seeds(name)), random) is None


@pytest.mark.parametrize(("name", "seed"), HOSTILE, ids=lambda value: getattr(value, "name", value))
def test_hostile_files_are_refused(name: str, seed: Path, tmp_path: Path) -> None:
    for file in seed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    refused = name not in ("sweep", "mirror", "targets", "repr", "settings")  # which say it
    try:
        READERS[name].read(tmp_path)
    except MapBoError:
        return
    assert not refused


@pytest.mark.parametrize("name", READERS)
def test_the_corpus_has_a_file_that_is_read(name: str, tmp_path: Path) -> None:
    """Changes of files that are refused at once would test nothing."""
    for seed in seeds(name):
        folder = tmp_path / seed.name
        folder.mkdir()
        for file in seed.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        try:
            READERS[name].read(folder)
        except MapBoError as error:
            # Sources that are nowhere: the recipe itself was understood.
            if name == "recipe" and "nowhere" in error.message:
                return
            continue
        return
    pytest.fail(f"no file of {name} is read")


def test_a_campaign_counts_what_escapes(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        raise KeyError("x")

    with patch.dict("tests.fuzz.campaign.READERS", {"words": Reader("vocab.txt", broken)}):
        ((name, found),) = run(3, names=["words"], keep=tmp_path)
    assert name == "words"
    assert sum(found.values()) == 3
    assert list(tmp_path.iterdir())


def test_changes_are_repeated_by_their_seed() -> None:
    content, data = b"{}" * 30, {"a": [1, {"b": 2}]}
    assert mutate_bytes(content, Random(1)) == mutate_bytes(content, Random(1))
    first, second = (mutate_value(data, Random(5)) for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert data == {"a": [1, {"b": 2}]}
