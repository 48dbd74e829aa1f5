from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import CheckpointError
from map_bo.merging.align.vocabulary import token_ids


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_mapping_with_added_tokens(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 2, "content": "<eos>"}, {"id": 0, "content": "a"}],
    }
    ids = token_ids(write(tmp_path, tokenizer__json=tokenizer, vocab__json={"z": 9}))
    assert ids == {"a": 0, "b": 1, "<eos>": 2}


def test_a_unigram_list(tmp_path: Path) -> None:
    tokenizer = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["▁a", -1.5]]}}
    assert token_ids(write(tmp_path, tokenizer__json=tokenizer)) == {"<pad>": 0, "▁a": 1}


def test_a_slow_tokenizer(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "vocab__json": {"a": 0, "b": 1},
        "added_tokens__json": {"<tool>": 2},
        "tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "<end>"}}},
    }
    assert token_ids(write(tmp_path, **files)) == {"a": 0, "b": 1, "<tool>": 2, "<end>": 3}


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_list_of_lines(tmp_path: Path, end: str) -> None:
    ids = token_ids(write(tmp_path, vocab__txt="[PAD]\n\u2028\nb" + end))
    assert ids == {"[PAD]": 0, "\u2028": 1, "b": 2}


def test_no_tokenizer(tmp_path: Path) -> None:
    assert token_ids(None) is None
    assert token_ids(write(tmp_path, tokenizer_config__json={}, added_tokens__json={})) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": []},
        {"tokenizer__json": {"model": {}}},
        {"tokenizer__json": {"model": {"vocab": {"a": "x"}}}},
        {"tokenizer__json": {"model": {"vocab": [[]]}}},
        {"tokenizer__json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}},
        {"vocab__json": {"a": None}},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"json cannot be read as a vocabulary: ") as caught:
        token_ids(write(tmp_path, **files))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
