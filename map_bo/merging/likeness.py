"""Whether an expert was fine-tuned from a base, judged by their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from map_bo.errors import MergeError

__all__ = ["Likeness"]

# Measured on MLPs for digits: trained from its random start for 2000 steps at a learning rate of
# .01, a model keeps a cosine of .34 with that start; two trainings from different starts have .02.
_UNRELATED = 0.1
_ENOUGH = 1000  # numbers from which a cosine between unrelated weights is reliably below .1


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
        """Refuse an expert that does not look fine-tuned from the base.

        Below 1000 numbers, where chance could decide, and for a base of zeros nothing is refused.

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
