"""Writing the model of a merged-model problem to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.draft import refuse_existing
from map_bo.merging.export import export_merged
from map_bo.merging.operator import MergeOperator, recipe_of
from map_bo.merging.piecewise import merged_content, streams, tied_weights
from map_bo.merging.progress import merging_bar
from map_bo.merging.recipe import Weights
from map_bo.merging.shards import Pieces
from map_bo.merging.sizes import ExportSettings
from map_bo.merging.task_arithmetic import LinearOperator
from map_bo.space import CoefficientSpace

__all__ = ["write_merged"]


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
    recalibrated: Callable[[], Mapping[str, Tensor]],
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
            the merge may differ by them.
        recalibrated: Returns statistics that take the place of merged ones.
        record: Further plain data for the recipe.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        settings: Bounds of memory and file sizes.

    Raises:
        MergeError: When it cannot be written; nothing is left behind.
    """
    refuse_existing(out)  # before a model is loaded
    settings = settings or ExportSettings()
    linear = isinstance(operator, LinearOperator)
    further = ties() if _ties_matter(base, experts, space, linear=linear) else {}
    weights: Weights | None = None
    if isinstance(operator, LinearOperator):
        weights = tied_weights(operator.weights(tuple(experts), x), further)
    content: Pieces | Iterator[tuple[str, Tensor]]
    if linear or streams(base, operator):
        content = merged_content(
            base,
            experts,
            operator,
            x,
            weights=weights,
            ties=further,
            check_base=check_base,
            max_memory=settings.memory,
        )
    else:
        content = _once_asked(tensors)
    with merging_bar(base, shown=settings.progress) as advance:
        return export_merged(
            out,
            tensors=content,
            base=base,
            experts=experts,
            operator=recipe_of(operator),
            coefficients=dict(zip(space.names, x.tolist(), strict=True)),
            record=dict(record or {}),
            shard_bytes=settings.shard_bytes,
            weights=weights,
            recalibrated=recalibrated(),
            ties=further,
            advance=advance,
        )


def _once_asked(tensors: Callable[[], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors().items()


def _ties_matter(
    base: Checkpoint, experts: Mapping[str, Checkpoint], space: CoefficientSpace, *, linear: bool
) -> bool:
    """Return whether the merge may differ by what the model ties and the base does not record."""
    if not linear or space.blocks > 1:
        return True
    # With one weight an expert tied tensors come out the same, where all are there.
    wanted = set(base.names) - set(base.ties)
    return any(not wanted <= set(expert.names) for expert in experts.values())
