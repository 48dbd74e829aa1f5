"""Merging checkpoints into a new one on disk, in memory that is bounded whatever their size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.layout import joined_ties
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint
from map_bo.merging.export.bounded import merged_content, tied_weights
from map_bo.merging.export.draft import refuse_existing
from map_bo.merging.export.model import export_merged
from map_bo.merging.export.recipe import Weights
from map_bo.merging.export.shards import merging_bar
from map_bo.merging.vectors.blocks import with_known_blocks
from map_bo.merging.vectors.linear_merge import LinearOperator, TaskArithmetic
from map_bo.merging.vectors.memory import ExportSettings
from map_bo.merging.vectors.operator import ChecksValues, MergeOperator, recipe_of
from map_bo.space import CoefficientSpace

__all__ = ["merge_checkpoints"]


def merge_checkpoints(
    base: CheckpointSource,
    experts: Mapping[str, CheckpointSource],
    coefficients: Mapping[str, float],
    out: str | Path,
    *,
    operator: MergeOperator | None = None,
    max_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Merge checkpoints that need not fit into memory, and write the merged one.

    Tensors are read, merged and written piece by piece on all cores, summed in float32 whatever
    the storage, and rounded once to the base's dtype. (Linear merges of float64 and complex
    tensors keep their precision and go tensor by tensor, on one core.) What is written, and how,
    is said at `export_merged`.

    Args:
        base: The model that the experts were fine-tuned from; see `open_checkpoint`.
        experts: Expert name -> checkpoint, or LoRA adapter over the base.
        coefficients: Coefficient name -> value: the experts' names, or ``expert/block`` with
            blocks, and the settings that the operator searches. One that is left out is 0.
        out: Folder to create.
        operator: How to merge; task arithmetic by default.
        max_memory: See `ExportSettings`.
        shard_size: See `ExportSettings`.
        ties: Further ties of the base, alias -> canonical name, that its files do not record.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        record: Further plain data for the recipe.
        progress: Show a progress bar.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When the inputs do not fit each other, or memory or disk do not suffice.
        CheckpointError: When a file cannot be read.
    """
    settings = ExportSettings(max_memory, shard_size, progress)
    refuse_existing(out)
    if not experts:
        raise MergeError("there are no experts", hint="give at least one fine-tuned model")
    operator = TaskArithmetic() if operator is None else operator
    opened = open_checkpoint(base)
    checkpoints = {name: open_expert(source, opened) for name, source in experts.items()}
    operator = with_known_blocks(operator, opened, checkpoints)
    space = operator.space(tuple(checkpoints), lower=0.0, upper=1.0)
    c = _coefficients(operator, space, coefficients)
    joined = joined_ties(opened, ties or {})
    weights: Weights | None = None
    if isinstance(operator, LinearOperator):
        weights = tied_weights(operator.weights(tuple(checkpoints), c), joined)
    with merging_bar(opened, shown=progress) as advance:
        return export_merged(
            out,
            tensors=merged_content(
                opened,
                checkpoints,
                operator,
                c,
                weights=weights,
                ties=joined,
                check_base=check_base,
                max_memory=settings.memory,
            ),
            base=opened,
            experts=checkpoints,
            operator=recipe_of(operator),
            coefficients=dict(zip(space.names, c.tolist(), strict=True)),
            record=record,
            shard_bytes=settings.shard_bytes,
            weights=weights,
            ties=joined,
            advance=advance,
        )


def _coefficients(
    operator: MergeOperator, space: CoefficientSpace, given: Mapping[str, float]
) -> Tensor:
    """Return the coefficients of a merge, ``d``, checked.

    Raises:
        MergeError: When one is unknown, missing, or no value that the operator takes.
    """
    unknown = [name for name in given if name not in space.names]
    if unknown:
        raise MergeError(
            f"there are no coefficients {listed(map(repr, unknown))}",
            hint=f"this merge takes {listed(space.names, 20)}",
        )
    lacking = [name for name in space.settings if name not in given]
    if lacking:
        raise MergeError(
            f"no value is given for {listed(lacking)}",
            hint="give every setting that the operator searches",
        )
    wrong = [name for name, value in given.items() if not math.isfinite(value)]
    if wrong:
        raise MergeError(
            f"the coefficients {listed(wrong)} are not finite", hint="give finite numbers"
        )
    values = {name: float(given.get(name, 0.0)) for name in space.names}
    if isinstance(operator, ChecksValues):
        operator.check_values(values)
    return torch.tensor(list(values.values()), dtype=torch.float64)
