"""Vocabularies of tokenizers that are not JSON: sentencepiece, tiktoken, and Mistral's tekken.

Their ids need not be the rows of an embedding (XLM-R shifts them by one), so they are compared with
files of the same name and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from map_bo.foreign import MOST_BYTES, read_text
from map_bo.merging.checkpoints.read_sharded import require_inside

__all__ = ["piece_files", "piece_ids"]

_FILES = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "source.spm", "target.spm", "tekken.json",
)  # fmt: skip
_TIKTOKEN = "*.tiktoken"


def piece_files(folder: Path) -> list[str]:
    """Return the names of the files of this kind in a folder."""
    found = [name for name in _FILES if (folder / name).is_file()]
    return found + sorted(path.name for path in folder.glob(_TIKTOKEN) if path.is_file())


def piece_ids(file: Path) -> dict[str, int]:
    """Return piece -> its place in a file of `piece_files`.

    Raises:
        CheckpointError: When the file is a link that leads out of its folder.
        OSError: When it cannot be read.
        ValueError: When it has not the form of its kind.
    """
    require_inside(file)
    if file.suffix == ".tiktoken":
        return dict(_lines(read_text(file)))
    if file.suffix == ".json":
        return _tekken(json.loads(read_text(file)))
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, and {MOST_BYTES} are the most")
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        content = stream.read(MOST_BYTES)
    try:
        return _pieces(content)
    except ValueError:  # Llama 3 has lines of tiktoken under the name of sentencepiece
        return dict(_lines(content.decode("utf-8")))


def _lines(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        if line.strip():
            token, _, rank = line.strip().rpartition(" ")
            yield token, int(rank)


def _tekken(content: object) -> dict[str, int]:
    entries = content.get("vocab") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError("it has no list of tokens")
    return {str(e.get("token_bytes") or e.get("token_str")): i for i, e in enumerate(entries)}


def _pieces(content: bytes) -> dict[str, int]:
    """Return the pieces of sentencepiece's ``ModelProto``: field 1, whose field 1 is the text."""
    pieces: dict[str, int] = {}
    count = 0
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            texts = [v for n, v in _fields(value) if n == 1 and isinstance(v, bytes)]
            if len(texts) != 1:
                raise ValueError("a piece has no text")
            pieces[texts[0].decode("utf-8", "surrogateescape")] = count
            count += 1
    if not pieces:
        raise ValueError("it holds no pieces")
    return pieces


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field of a message of protocol buffers."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind, value = key & 7, 0
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"it has a field of the kind {kind}")
        if at + size > len(content):
            raise ValueError("it ends within a field")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it ends within a number")
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number has no end")
