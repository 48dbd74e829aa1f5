"""How far each coefficient moves the model: norms of the task vectors' blocks.

A linear merge ``theta(c) = theta_base + sum_{n,b} c_nb v_nb`` moves the model by ``|v_nb|`` for a
unit of ``c_nb``. Blocks differ in that by orders of magnitude (a matrix against a bias), which a
surrogate can know before the first evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.names import aligned_names

__all__ = ["block_norms", "relative_importance"]

# A block that an expert left as it was still has a coefficient, and a logarithm is taken of its
# importance.
_LEAST = 1e-2
_DIGITS = 4  # of a norm: sums in another order must not make another problem of the same one


def block_norms(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    block: Callable[[str], int],
    blocks: int,
    *,
    ties: Mapping[str, str] | None = None,
) -> Tensor:
    """Return the Euclidean norms ``N x B`` of all task vectors' blocks, reading tensor by tensor.

    One pass over all checkpoints; tied tensors count once, tensors that are not floating not at
    all.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint, with the same tensors as the base.
        block: Canonical tensor name -> index of its block.
        blocks: Number of blocks ``B``.
        ties: Alias -> canonical name of the tensors that are one; by default the base's own.

    Raises:
        MergeError: When an expert has missing or further tensors, or other shapes.
    """
    ties = base.ties if ties is None else ties
    names = {
        expert: aligned_names(base, checkpoint, expert, ties)
        for expert, checkpoint in experts.items()
    }
    squares = torch.zeros(len(experts), blocks, dtype=torch.float64)
    for name in base.names:
        if name in ties or not base.dtype(name).is_floating_point:
            continue
        where, pre = block(name), base.load(name).double()
        for row, (expert, checkpoint) in enumerate(experts.items()):
            gap = checkpoint.load(names[expert][name]).double() - pre
            squares[row, where] += gap.square().sum()
    return squares.sqrt()


def relative_importance(norms: Tensor) -> tuple[float, ...]:
    """Return ``N x B`` norms as importances, expert by expert, root mean square 1.

    Rounded to four digits, and at least a hundredth, so that every coefficient keeps some.
    """
    flat = norms.flatten()
    size = flat.square().mean().sqrt()
    if not bool(size > 0) or not bool(torch.isfinite(size)):
        return ()  # the merge itself says what is wrong with such experts
    return tuple(float(f"{max(s, _LEAST):.{_DIGITS}g}") for s in (flat / size).tolist())
