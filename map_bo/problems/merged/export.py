"""Writing the model of a merged-model problem to disk.

Writing a point of a merged-model problem as a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from map_bo.merging.align.layout import join_ties
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.adapter import AdapterExport, export_adapter, module_kinds
from map_bo.merging.export.bounded import merged_content, streams, tied_weights
from map_bo.merging.export.draft import refuse_existing
from map_bo.merging.export.model import ExportSettings, export_merged
from map_bo.merging.export.write_shards import Pieces, merging_bar
from map_bo.merging.vectors.linear_merge import LinearOperator
from map_bo.merging.vectors.live import model_ties
from map_bo.merging.vectors.operator import MergeOperator, Weights, recipe_of
from map_bo.space import CoefficientSpace

__all__ = ["AdapterExporting", "write_merged"]


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


_Weights = Callable[[str], Mapping[str, float]]


class _Merging(Protocol):
    """What a problem needs for it."""

    _base: Checkpoint
    _experts: dict[str, Checkpoint]
    _operator: MergeOperator
    _space: CoefficientSpace

    def merged(self, x: Tensor) -> dict[str, Tensor]: ...

    def _row(self, x: Tensor) -> Tensor: ...

    def _architecture(self) -> nn.Module: ...


class AdapterExporting:
    """The ability of a problem to write its points as LoRA adapters."""

    def export_adapter(
        self: _Merging,
        x: Tensor,
        out: str | Path,
        *,
        rank: int | None = None,
        others: Literal["save", "refuse"] = "save",
        record: Mapping[str, Any] | None = None,
    ) -> AdapterExport:
        """Write the merge with ``x`` (``d``) to ``out`` as an adapter; see `export_adapter`.

        A linear operator is merged from the checkpoints; of another the merged model's change is
        approximated, which needs a rank.

        Args:
            x: ``d`` coefficients.
            out: Folder to create.
            rank: Largest rank; None keeps a linear merge of adapters exact.
            others: Whether to save what has no factors as full values, or to refuse it.
            record: Further plain data for the recipe.

        Returns:
            The folder, and what was lost by the rank.

        Raises:
            MergeError: When it cannot be written; nothing is left behind.
        """
        row = self._row(x)
        weights: _Weights = lambda name: {}  # noqa: E731 - not asked where there is a model
        merged: Checkpoint | None = None
        ties = model_ties(self._architecture())
        if isinstance(self._operator, LinearOperator):
            joined = join_ties(self._base, ties)
            weights = tied_weights(self._operator.weights(tuple(self._experts), row), joined)
        else:
            merged = open_checkpoint(self.merged(row))
        return export_adapter(
            out,
            base=self._base,
            experts=self._experts,
            weights=weights,
            operator=recipe_of(self._operator),
            coefficients=dict(zip(self._space.names, row.tolist(), strict=True)),
            rank=rank,
            others=others,
            kinds=module_kinds(self._architecture()),
            merged=merged,
            ties=ties,
            record=record,
        )
