"""The coefficients of a merged-model problem, with what the task vectors say of their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from map_bo.merging.blocks import Blocks
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.importance import block_norms, relative_importance
from map_bo.merging.operator import MergeOperator
from map_bo.space import CoefficientSpace

__all__ = ["weighed_space"]


def weighed_space(
    space: CoefficientSpace,
    operator: MergeOperator,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    ties: Callable[[], Mapping[str, str]],
) -> CoefficientSpace:
    """Return the space with importances, where the operator has blocks and nobody gave any.

    A setting of the operator is taken to be as important as a coefficient is on the mean.

    Args:
        space: The coefficients.
        operator: The operator; its ``blocks`` are patterns.
        base: The base.
        experts: Name -> checkpoint.
        ties: Returns alias -> canonical name of all tensors that are one.

    Raises:
        MergeError: When experts do not fit the base.
    """
    blocks = Blocks(getattr(operator, "blocks", None))
    if len(blocks) == 1 or space.importance or space.blocks != len(blocks):
        return space
    norms = block_norms(base, experts, blocks.of, len(blocks), ties=ties())
    sizes = relative_importance(norms)
    if not sizes:
        return space
    return replace(space, importance=(*sizes, *(1.0 for _ in space.settings)))
