"""Whether an expert was fine-tuned from a base, judged by their weights.

Comparing tensors of checkpoints piece by piece, in bounded memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint

__all__ = [
    "Likeness",
    "pieces_of",
    "require_alike",
    "require_same_fixed",
    "require_tied",
    "same_values",
]

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


# Measured on MLPs for digits: trained from its random start for 2000 steps at a learning rate of
# .01, a model keeps a cosine of .34 with that start; two trainings from different starts have .02.
_UNRELATED = 0.1
_FAR = 0.5
_SAMPLED_TENSORS = 8
_SAMPLED_NUMBERS = 1 << 18
_ENOUGH = 1000  # numbers from which a cosine between unrelated weights is reliably below .1


logger = logging.getLogger(__name__)


class Likeness:
    """The cosine of base and expert, and their distance, gathered piece by piece.

    Over tensors of two or more dimensions: two unrelated trainings have a cosine near 0 and a
    difference longer than the base.

    Args:
        label: Name of the expert.
        sums: What was gathered before, as `sums` returned it.
    """

    def __init__(self, label: str, sums: Sequence[float] = (0, 0.0, 0.0, 0.0, 0.0)) -> None:
        self.label = label
        self._size, self._pre, self._tuned, self._both, self._gap = sums

    @property
    def sums(self) -> tuple[float, ...]:
        """What was gathered so far: five numbers, to go on with or to judge by later."""
        return (self._size, self._pre, self._tuned, self._both, self._gap)

    def add(self, pre: Tensor, delta: Tensor) -> None:
        """Take in a piece of the base and of the expert's task vector (``n`` each)."""
        pre, delta = pre.flatten(), delta.flatten()
        inner, square, gap = float(pre @ delta), float(pre @ pre), float(delta @ delta)
        self._size += pre.numel()
        self._pre += square
        self._both += square + inner
        self._tuned += square + 2 * inner + gap
        self._gap += gap

    def judge(self) -> None:
        """Refuse an expert that does not look fine-tuned from the base, and warn of a doubtful one.

        Below 1000 numbers, where chance could decide, and for a base of zeros nothing is refused.
        A warning is logged where the expert is more than half the norm of the base away from it:
        fine-tuning seldom moves a model that far.

        Raises:
            MergeError: When the cosine is below 0.1 and the difference longer than the base.
        """
        if self._size < _ENOUGH or not self._pre:
            return
        cosine = self._both / math.sqrt(self._pre * self._tuned) if self._tuned > 0 else 0.0
        reach = math.sqrt(self._gap / self._pre)
        if cosine < _UNRELATED and reach > 1:
            raise MergeError(
                f"expert {self.label!r} does not look fine-tuned from this base: the cosine "
                f"similarity of their weights is {cosine:.3f}, and they differ by {reach:.2f} "
                "times the norm of the base",
                hint="fine-tuning leaves the similarity near 1; give the base that the expert "
                "was trained from, or pass check_base=False",
            )
        if reach > _FAR:
            logger.warning(
                "expert %r differs from the base by %.2f times the base's norm (cosine %.3f), "
                "which is far for fine-tuning: is it of this base?",
                self.label,
                reach,
                cosine,
            )


def require_alike(
    base: Checkpoint, expert: Checkpoint, names: Mapping[str, str], label: str
) -> None:
    """Refuse an expert that does not look fine-tuned from the base, by a sample of its weights.

    The sample is the beginning of the largest tensors of two or more dimensions.

    Args:
        base: The base.
        expert: The expert.
        names: The base's name -> the expert's name of the same tensor.
        label: The expert's name.

    Raises:
        MergeError: See `Likeness.judge`.
    """
    floating = [name for name in names if base.dtype(name).is_floating_point]
    matrices = [name for name in floating if len(base.shape(name)) >= 2]
    matrices.sort(key=lambda name: (-base.shape(name).numel(), name))
    likeness = Likeness(label)
    for name in matrices[:_SAMPLED_TENSORS]:
        count = min(base.shape(name).numel(), _SAMPLED_NUMBERS)
        pre = base.read(name, 0, count).to(torch.float32)
        likeness.add(pre, expert.read(names[name], 0, count).to(torch.float32) - pre)
    likeness.judge()
