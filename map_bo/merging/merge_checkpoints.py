"""Merging checkpoints into a new one on disk, in memory that is bounded whatever their size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from map_bo.merging.chunked import ChunkedMerge
from map_bo.merging.export import export_merged
from map_bo.merging.operator import MergeOperator
from map_bo.merging.shards import Pieces, Put
from map_bo.merging.streamed import StreamedVectors
from map_bo.merging.task_arithmetic import LinearOperator, TaskArithmetic

__all__ = ["memory_bytes", "merge_checkpoints", "merged_pieces", "resident_bytes"]

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_UNKNOWN_RESIDENT = 500_000_000  # taken where the system does not say
_SPARE = 64_000_000  # what a program needs besides, such as buffers of files and threads
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
    the storage, and rounded once to the base's dtype. What is written, and how, is said at
    `export_merged`.

    Args:
        base: The model that the experts were fine-tuned from; see `open_checkpoint`.
        experts: Expert name -> checkpoint.
        coefficients: Coefficient name -> value: the experts' names, or ``expert/block`` with
            blocks, and the settings that the operator searches. One that is left out is 0.
        out: Folder to create.
        operator: How to merge; task arithmetic by default.
        max_memory: Bytes of resident memory that the process may have in all, or text such as
            ``"2GB"``; None leaves the size of pieces to the operator (some hundred MB in all).
        shard_size: Largest size of one weight file, in bytes or such text.
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
    from map_bo.merging.adapter_checkpoint import open_expert

    operator = TaskArithmetic() if operator is None else operator
    opened = open_checkpoint(base)
    checkpoints = {name: open_expert(source, opened) for name, source in experts.items()}
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
    total = sum(opened.layout(n).shape.numel() for n in opened.names if n not in opened.ties)
    with _bar(total, "merging", shown=progress) as advance:
        return export_merged(
            out,
            tensors=merged_pieces(
                opened,
                checkpoints,
                operator,
                c,
                ties=ties,
                check_base=check_base,
                max_memory=memory_bytes(max_memory, "max_memory"),
                advance=advance,
            ),
            base=opened,
            experts=checkpoints,
            operator=operator.describe(),
            coefficients=dict(zip(space.names, c.tolist(), strict=True)),
            record=record,
            shard_bytes=memory_bytes(shard_size, "shard_size") or 5_000_000_000,
            weights=operator.weights(tuple(checkpoints), c)
            if isinstance(operator, LinearOperator)
            else None,
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
    deltas = StreamedVectors(base, experts, ties=ties, check_base=check_base)
    deltas.require_same_fixed()
    prepared = operator.prepare(deltas)
    if not isinstance(prepared, ChunkedMerge):
        raise MergeError(
            f"the operator {operator.describe().get('name')} cannot merge by pieces",
            hint="export the merge of a loaded problem instead",
        )
    if max_memory is not None:
        room = max_memory - resident_bytes() - _SPARE
        prepared.limit(room, torch.get_num_threads())
    slots = deltas.layout.slots

    def put_all(put: Put) -> None:
        aliases = _own_aliases(base, deltas.layout.ties)

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


def _own_aliases(base: Checkpoint, ties: Mapping[str, str]) -> dict[str, list[str]]:
    """Return canonical name -> further names that the base stores as tensors of their own."""
    aliases: dict[str, list[str]] = {}
    for alias, canonical in ties.items():
        if alias not in base.ties:
            aliases.setdefault(canonical, []).append(alias)
    return aliases


def memory_bytes(text: int | str | None, name: str) -> int | None:
    """Return a number of bytes from a number or from text such as ``"1.5GB"`` or ``"512MiB"``.

    Raises:
        MergeError: For text that is no size, and for sizes that are not positive.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*([\d_.]+)\s*([kmg]i?)?b?\s*", str(text).lower())
    try:
        size = float(found.group(1)) * _UNITS[found.group(2) or ""] if found else 0.0
    except ValueError:
        size = 0.0
    if size < 1:
        raise MergeError(
            f"{name} is {text!r}", hint="give a number of bytes, or such as 500MB, 2GB or 1.5GiB"
        )
    return int(size)


def resident_bytes() -> int:
    """Return the resident memory of this process, or a guess where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return _UNKNOWN_RESIDENT
    import resource

    return pages * resource.getpagesize()


@contextmanager
def _bar(total: int, what: str, *, shown: bool) -> Iterator[Advance | None]:
    if not shown:
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Left())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
