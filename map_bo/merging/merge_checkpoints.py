"""Merging checkpoints into a new one on disk, in memory that is bounded whatever their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapter_checkpoint import open_expert
from map_bo.merging.block_specs import with_known_blocks
from map_bo.merging.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from map_bo.merging.chunked import ChunkedMerge
from map_bo.merging.export import export_merged
from map_bo.merging.operator import MergeOperator
from map_bo.merging.shards import Pieces, Put
from map_bo.merging.sizes import ExportSettings, resident_bytes
from map_bo.merging.streamed import StreamedVectors
from map_bo.merging.streaming import merge_streamed
from map_bo.merging.task_arithmetic import LinearOperator, TaskArithmetic

__all__ = ["merge_checkpoints", "merged_pieces", "merging_bar", "streams"]

_SPARE = 64_000_000  # what a program needs besides, such as buffers of files and threads
_WIDE = (torch.float64, torch.complex64, torch.complex128)
Advance = Callable[[int], None]


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
    operator = TaskArithmetic() if operator is None else operator
    opened = open_checkpoint(base)
    checkpoints = {name: open_expert(source, opened) for name, source in experts.items()}
    operator = with_known_blocks(operator, opened, checkpoints)
    space = operator.space(tuple(checkpoints), lower=0.0, upper=1.0)
    unknown = [name for name in coefficients if name not in space.names]
    if unknown:
        raise MergeError(
            f"there are no coefficients {', '.join(map(repr, unknown))}",
            hint=f"this merge takes {', '.join(space.names)}",
        )
    lacking = [name for name in space.settings if name not in coefficients]
    if lacking:
        raise MergeError(
            f"no value is given for {', '.join(lacking)}",
            hint="give every setting that the operator searches",
        )
    c = torch.tensor([float(coefficients.get(n, 0.0)) for n in space.names], dtype=torch.float64)
    weights = (
        operator.weights(tuple(checkpoints), c) if isinstance(operator, LinearOperator) else None
    )
    with merging_bar(opened, shown=progress) as advance:
        tensors: Pieces | Iterator[tuple[str, Tensor]]
        if weights is not None and not streams(opened, operator):
            tensors = merge_streamed(opened, checkpoints, weights)
        else:
            tensors = merged_pieces(
                opened,
                checkpoints,
                operator,
                c,
                ties=ties,
                check_base=check_base,
                max_memory=settings.memory,
                advance=advance,
            )
        return export_merged(
            out,
            tensors=tensors,
            base=opened,
            experts=checkpoints,
            operator=operator.describe(),
            coefficients=dict(zip(space.names, c.tolist(), strict=True)),
            record=record,
            shard_bytes=settings.shard_bytes,
            weights=weights,
        )


def streams(base: Checkpoint, operator: MergeOperator) -> bool:
    """Return whether a merge can be made by pieces, in float32."""
    return getattr(operator, "streams", False) and not any(
        base.dtype(name) in _WIDE for name in base.names
    )


def merged_pieces(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    c: Tensor,
    *,
    ties: Mapping[str, str] | None = None,
    check_base: bool = True,
    max_memory: int | None = None,
    advance: Advance | None = None,
) -> Pieces:
    """Return what puts the merged model of checkpoints, piece by piece.

    Everything that can be wrong with the inputs but their values is told now, and everything that
    no coefficient changes is prepared.

    Args:
        base: The base checkpoint.
        experts: Name -> checkpoint.
        operator: How to merge.
        c: ``d`` coefficients.
        ties: Further ties of the base, alias -> canonical name.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        max_memory: Bytes of resident memory for the whole process.
        advance: Called with a number of elements whenever they are done.

    Raises:
        MergeError: When the inputs do not fit each other, or the memory does not suffice.
    """
    if not getattr(operator, "streams", False):
        raise MergeError(
            f"the operator {operator.describe().get('name')} cannot merge by pieces",
            hint="export the merge of a loaded problem instead",
        )
    deltas = StreamedVectors(base, experts, ties=ties, check_base=check_base)
    deltas.require_same_fixed()
    prepared = operator.prepare(deltas)
    assert isinstance(prepared, ChunkedMerge)
    if max_memory is not None:
        prepared.limit(max_memory - resident_bytes() - _SPARE, torch.get_num_threads())
    slots = deltas.layout.slots
    # Names that are one tensor in the model and that the base stores apart are written apart.
    aliases: dict[str, list[str]] = {}
    for alias, canonical in deltas.layout.ties.items():
        if alias not in base.ties:
            aliases.setdefault(canonical, []).append(alias)

    def put_all(put: Put) -> None:
        def sink(slot: int, start: int, piece: Tensor) -> None:
            values = piece.to(slots[slot].dtype)
            for name in (slots[slot].name, *aliases.get(slots[slot].name, ())):
                put(name, start, values)

        prepared.run(c, sink, done=advance)
        for name in deltas.layout.fixed:
            if name not in base.ties:
                value = base.load(name).flatten()
                put(name, 0, value)
                if advance is not None:
                    advance(value.numel())

    return put_all


@contextmanager
def merging_bar(base: Checkpoint, *, shown: bool) -> Iterator[Advance | None]:
    """Show a progress bar over the elements of a model while the block runs."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    total = sum(base.shape(name).numel() for name in base.names if name not in base.ties)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"merging {total / 1e6:.4g} M numbers", total=total)
        yield lambda count: bar.advance(task, count)
