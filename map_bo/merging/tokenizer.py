"""The vocabulary of a tokenizer, read from its files as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError
from map_bo.merging.messages import first_line

__all__ = ["token_ids"]


def token_ids(folder: Path | None) -> dict[str, int] | None:
    """Return token -> id of the tokenizer in a folder, added tokens included.

    Read are, in this order, the first that there is: ``tokenizer.json`` (its ``model.vocab``,
    whether a mapping or the list of a unigram model), ``vocab.json``, ``vocab.txt`` (one token a
    line). Added tokens come from ``added_tokens`` of ``tokenizer.json``, from
    ``added_tokens.json`` and from ``added_tokens_decoder`` of ``tokenizer_config.json``. A
    sentencepiece ``tokenizer.model`` alone is not read.

    Args:
        folder: The folder, or None for a checkpoint without one.

    Returns:
        The ids, or None where there is none of these files.

    Raises:
        CheckpointError: When a file is damaged.
    """
    if folder is None:
        return None
    ids = _fast(folder)
    if ids is None:
        ids = _mapping(folder / "vocab.json")
    if ids is None:
        ids = _lines(folder / "vocab.txt")
    if ids is None:
        return None
    ids |= _mapping(folder / "added_tokens.json") or {}
    further = (_json(folder / "tokenizer_config.json") or {}).get("added_tokens_decoder")
    if isinstance(further, Mapping):
        for number, token in further.items():
            if isinstance(token, Mapping) and str(number).isdecimal():
                ids[str(token.get("content"))] = int(number)
    return ids


def _fast(folder: Path) -> dict[str, int] | None:
    file = folder / "tokenizer.json"
    content = _json(file)
    if content is None:
        return None
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    try:
        if isinstance(vocabulary, Mapping):
            ids = {str(token): int(number) for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):  # unigram: pairs of token and score, by id
            ids = {str(pair[0]): number for number, pair in enumerate(vocabulary)}
        else:
            raise TypeError("it has no model.vocab")
        added = content.get("added_tokens") or []
        return ids | {str(token["content"]): int(token["id"]) for token in added}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise _damaged(file, error) from error


def _mapping(file: Path) -> dict[str, int] | None:
    content = _json(file)
    if content is None:
        return None
    try:
        return {str(token): int(number) for token, number in content.items()}
    except (TypeError, ValueError) as error:
        raise _damaged(file, error) from error


def _lines(file: Path) -> dict[str, int] | None:
    if not file.is_file():
        return None
    try:
        # Not read_text and splitlines: a token may be any other separator of lines.
        lines = file.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error
    return {token.removesuffix("\r"): number for number, token in enumerate(lines)}


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise _damaged(file, TypeError("it is no JSON object"))
    return content


def _damaged(file: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read as a vocabulary: {first_line(error)}",
        hint="fetch the tokenizer's files again, or merge without a vocabulary rule",
    )
