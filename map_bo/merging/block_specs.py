"""Blocks said in a word, such as ``layers:4``, made of the tensors of a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from map_bo.errors import MergeError
from map_bo.merging.blocks import balanced_blocks, kind_blocks, layer_blocks
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.importance import block_norms
from map_bo.merging.layout import FlatLayout, joined_ties

__all__ = ["blocks_of", "with_known_blocks"]

Operator = TypeVar("Operator")

_HINT = "write layers:K, kinds or balanced:K, or {block: regular expression on tensor names}"


def blocks_of(
    spec: str,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    ties: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the patterns of blocks that are said in a word.

    Args:
        spec: ``"layers:K"``, ``K`` runs of neighbouring layers and the rest (`layer_blocks`);
            ``"kinds"``, kinds of modules (`kind_blocks`); ``"balanced:K"``, ``K`` runs of
            neighbouring tensors with task vectors of like norm (`balanced_blocks`), for which the
            checkpoints are read once.
        base: The base checkpoint.
        experts: Name -> checkpoint.
        ties: Further ties of the base.

    Raises:
        MergeError: When the word is unknown, or the model has too few layers or tensors.
    """
    found = re.fullmatch(r"(layers|balanced):(\d+)|kinds", spec.strip())
    if found is None:
        raise MergeError(f"blocks are {spec!r}", hint=_HINT)
    layout = FlatLayout.of(base, joined_ties(base, ties or {}))
    names = sorted((slot.name for slot in layout.slots), key=_natural)
    if found.group(1) is None:
        return kind_blocks(names)
    count = int(found.group(2))
    if found.group(1) == "layers":
        return layer_blocks(names, count)
    index = {name: i for i, name in enumerate(names)}
    norms = block_norms(base, experts, index.__getitem__, len(names), ties=layout.ties)
    squares = norms.square().sum(0).tolist()
    return balanced_blocks(dict(zip(names, squares, strict=True)), count)


def with_known_blocks(
    operator: Operator, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Operator:
    """Return the operator with patterns in place of a word, where its blocks are said in one."""
    spec = getattr(operator, "blocks", None)
    if not isinstance(spec, str):
        return operator
    settings: Any = operator
    return dataclasses.replace(settings, blocks=blocks_of(spec, base, experts))  # type: ignore[no-any-return]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key in whose order layer 2 comes before layer 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
