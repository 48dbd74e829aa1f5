"""Writing the model of a merged-model problem to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.export import export_merged, merge_streamed
from map_bo.merging.merge_checkpoints import merged_pieces, merging_bar, streams
from map_bo.merging.operator import MergeOperator
from map_bo.merging.recipe import Weights
from map_bo.merging.shards import Pieces
from map_bo.merging.sizes import ExportSettings
from map_bo.merging.task_arithmetic import LinearOperator
from map_bo.space import CoefficientSpace

__all__ = ["tied_weights", "write_merged"]


def write_merged(
    out: str | Path,
    x: Tensor,
    *,
    tensors: Callable[[], Mapping[str, Tensor]],
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    space: CoefficientSpace,
    ties: Callable[[], Mapping[str, str]],
    recalibrated: Mapping[str, Tensor],
    record: Mapping[str, Any] | None,
    check_base: bool = True,
    settings: ExportSettings | None = None,
) -> Path:
    """Write the model merged with ``x`` (``d``) to the folder ``out``; see `export_merged`.

    Args:
        out: Folder to create.
        x: ``d`` coefficients.
        tensors: Returns the merged tensors, for a merge that cannot be made from the files.
        base: The base.
        experts: Name -> checkpoint.
        operator: The operator.
        space: The coefficients.
        ties: Returns alias -> canonical name of the tensors that the model ties; called where
            weights differ between tensors.
        recalibrated: Statistics that take the place of merged ones.
        record: Further plain data for the recipe.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        settings: Bounds of memory and file sizes.

    Raises:
        MergeError: When it cannot be written; nothing is left behind.
    """
    weights: Weights | None = None
    if isinstance(operator, LinearOperator):
        weights = tied_weights(operator.weights(tuple(experts), x), space, ties)
    settings = settings or ExportSettings()
    with merging_bar(base, shown=settings.progress) as advance:
        merged: Pieces | Iterable[tuple[str, Tensor]]
        if streams(base, operator):
            # With one weight an expert for all tensors, tied tensors come out the same anyway.
            same = weights is not None and space.blocks == 1
            merged = merged_pieces(
                base,
                experts,
                operator,
                x,
                ties=None if same else ties(),
                check_base=check_base,
                max_memory=settings.memory,
                advance=advance,
            )
        elif weights is not None:
            merged = merge_streamed(base, experts, weights)
        else:
            merged = tensors().items()
        return export_merged(
            out,
            tensors=merged,
            base=base,
            experts=experts,
            operator=operator.describe(),
            coefficients=dict(zip(space.names, x.tolist(), strict=True)),
            record=dict(record or {}),
            shard_bytes=settings.shard_bytes,
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
