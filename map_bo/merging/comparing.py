"""Comparing tensors of checkpoints piece by piece, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint

__all__ = ["pieces_of", "require_same_fixed", "require_tied", "same_values"]

_PIECE = 1 << 20  # numbers


def pieces_of(count: int) -> Iterator[tuple[int, int]]:
    """Yield first and last index of the pieces in which so many numbers are read."""
    for start in range(0, count, _PIECE):
        yield start, min(start + _PIECE, count)


def same_values(one: Checkpoint, name: str, two: Checkpoint, other: str) -> bool:
    """Return whether two tensors have the same shape and values; dtypes may differ.

    Raises:
        CheckpointError: When a file cannot be read.
    """
    if one.shape(name) != two.shape(other):
        return False
    return all(
        torch.equal(one.read(name, start, stop), two.read(other, start, stop))
        for start, stop in pieces_of(one.shape(name).numel())
    )


def require_tied(checkpoint: Checkpoint, ties: Mapping[str, str], label: str) -> None:
    """Refuse a checkpoint in which tensors that are one in the model differ.

    Args:
        checkpoint: The checkpoint.
        ties: Alias -> canonical name, under the checkpoint's own names.
        label: What to call it.

    Raises:
        MergeError: When they differ.
    """
    for alias, canonical in ties.items():
        if alias not in checkpoint.names or alias == canonical:
            continue
        if checkpoint.ties.get(alias, alias) == checkpoint.ties.get(canonical, canonical):
            continue
        if not same_values(checkpoint, alias, checkpoint, canonical):
            raise MergeError(
                f"{canonical!r} and {alias!r} are one tensor in the model but differ in {label}",
                hint="use checkpoints that keep them tied, or untie them in the base and model",
            )


def require_same_fixed(
    base: Checkpoint, name: str, expert: Checkpoint, own: str, label: str
) -> None:
    """Refuse an expert that differs in a tensor that is not merged, by more than a counter.

    Args:
        base: The base.
        name: The tensor.
        expert: The expert.
        own: What the expert calls it.
        label: The expert's name.

    Raises:
        MergeError: When a tensor of more than one element differs.
    """
    if base.shape(name).numel() <= 1 or same_values(base, name, expert, own):
        return
    raise MergeError(
        f"tensor {name!r} ({base.dtype(name)}) differs between the base and expert {label!r}, "
        "and only floating tensors can be merged",
        hint="quantised weights are expanded before merging; index tables must be those of the "
        "base",
    )
