"""Writing a point of a merged-model problem as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from map_bo.merging.adapter_export import AdapterExport, export_adapter, module_kinds
from map_bo.merging.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.layout import joined_ties
from map_bo.merging.live import model_ties
from map_bo.merging.operator import MergeOperator, recipe_of
from map_bo.merging.piecewise import tied_weights
from map_bo.merging.task_arithmetic import LinearOperator
from map_bo.space import CoefficientSpace

__all__ = ["AdapterExporting"]

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
            joined = joined_ties(self._base, ties)
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
