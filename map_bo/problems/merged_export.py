"""Writing the model of a merged-model problem to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.export import export_merged, merge_streamed
from map_bo.merging.operator import MergeOperator
from map_bo.merging.recipe import Weights
from map_bo.merging.task_arithmetic import LinearOperator
from map_bo.space import CoefficientSpace

__all__ = ["tied_weights", "write_merged"]


def write_merged(
    out: str | Path,
    x: Tensor,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    space: CoefficientSpace,
    ties: Callable[[], Mapping[str, str]],
    recalibrated: Mapping[str, Tensor],
    record: Mapping[str, Any] | None,
) -> Path:
    """Write the model merged with ``x`` (``d``) to the folder ``out``; see `export_merged`.

    Args:
        out: Folder to create.
        x: ``d`` coefficients.
        tensors: The merged tensors; None for a linear operator, whose merge is streamed from the
            checkpoints.
        base: The base.
        experts: Name -> checkpoint.
        operator: The operator.
        space: The coefficients.
        ties: Returns alias -> canonical name of the tensors that the model ties; called where
            weights differ between tensors.
        recalibrated: Statistics that take the place of merged ones.
        record: Further plain data for the recipe.

    Raises:
        MergeError: When it cannot be written; nothing is left behind.
    """
    weights: Weights | None = None
    if isinstance(operator, LinearOperator):
        weights = tied_weights(operator.weights(tuple(experts), x), space, ties)
    if tensors is None:
        assert weights is not None
        tensors = merge_streamed(base, experts, weights)
    return export_merged(
        out,
        tensors=tensors,
        base=base,
        experts=experts,
        operator=operator.describe(),
        coefficients=dict(zip(space.names, x.tolist(), strict=True)),
        record=dict(record or {}),
        weights=weights,
        recalibrated=recalibrated,
    )


def tied_weights(
    weights: Weights, space: CoefficientSpace, ties: Callable[[], Mapping[str, str]]
) -> Weights:
    """Return the weights with every tied name under that of its tensor."""
    if space.blocks == 1:
        return weights  # they are the same for all tensors
    canonical = ties()
    return lambda name: weights(canonical.get(name, name))
