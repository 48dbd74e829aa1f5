"""Writing the weight files of a merged model, tensor by tensor or piece by piece.

One file, or shards with their index; and a bar that shows how much is written.
"""

from __future__ import annotations

import errno
import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter, shard_layouts
from map_bo.merging.checkpoints.tensors import Layout, exceeds_range, raw_bytes
from map_bo.merging.vectors.parallel import parallel_for

__all__ = ["Advance", "Pieces", "Put", "Written", "merging_bar", "write_weights", "writing"]

_CHUNK = 1 << 23  # bytes that are read at once

Put = Callable[[str, int, Tensor], None]
"""Takes a canonical name, a first element and the elements from there on (1-D, on the CPU)."""

Pieces = Callable[[Put], None]
"""Gives every element of every tensor that is not an alias to a `Put` once, from any threads."""

Advance = Callable[[int], None]
"""Takes a number of elements that are done, from any thread."""


@dataclass
class Written:
    """What was meant to be written: a checksum (CRC-32) of every piece that was handed over.

    Attributes:
        pieces: Name of the tensor, first element, number of elements, checksum of their bytes.
    """

    pieces: list[tuple[str, int, int, int]] = field(default_factory=list)

    def add(self, name: str, start: int, piece: Tensor) -> None:
        """Note a piece, from any thread."""
        self.pieces.append((name, start, piece.numel(), zlib.crc32(raw_bytes(piece))))

    def compare(self, found: Checkpoint) -> None:
        """Read everything back and compare it with what was meant.

        Args:
            found: The checkpoint that was written.

        Raises:
            MergeError: When a tensor differs.
            CheckpointError: When it cannot be read.
        """

        def check(piece: tuple[str, int, int, int], _: None) -> None:
            name, start, count, wanted = piece
            step = max(1, _CHUNK // found.dtype(name).itemsize)
            total = 0
            for first in range(start, start + count, step):
                last = min(first + step, start + count)
                total = zlib.crc32(raw_bytes(found.read(name, first, last)), total)
            if total != wanted:
                raise MergeError(
                    f"{name!r} was written, and what is read back is not what was merged",
                    hint="check the disk and its file system, and export again",
                )

        parallel_for(check, sorted(self.pieces), lambda: None)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says of a write into a `MergeError` that names the target."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise MergeError(
            f"{target} cannot be written: {error.strerror or error}",
            hint="free some space or export to another disk; nothing was left behind"
            if full
            else "check that the folder above it exists and can be written to",
        ) from error


def write_weights(
    draft: Path,
    tensors: Iterable[tuple[str, Tensor]] | Pieces,
    layouts: Mapping[str, Layout],
    base: Checkpoint,
    shard_bytes: int,
    *,
    instead: Mapping[str, Tensor] | None = None,
    advance: Advance | None = None,
    stem: str = "model",
) -> Written:
    """Write ``model.safetensors``, or shards with their index, into a folder.

    Args:
        draft: The folder.
        tensors: All tensors of the base with their names, or a function that puts their pieces.
        layouts: Layouts of the tensors that are not aliases.
        base: The base checkpoint.
        shard_bytes: Largest size of one file.
        instead: Name -> tensor to write in place of the one that is given.
        advance: Called with a number of elements whenever they are written.
        stem: What files are called in place of ``model``.

    Returns:
        What was meant, to be compared with what is read back.

    Raises:
        MergeError: When tensors are missing, given twice, unknown or of another shape, or the disk
            is full.
    """
    groups = list(shard_layouts(layouts, shard_bytes))
    home: dict[str, SafetensorsWriter] = {}
    for i, group in enumerate(groups, start=1):
        file = f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"
        aliases = {alias: kept for alias, kept in base.ties.items() if kept in group}
        with writing(draft.parent):
            writer = SafetensorsWriter(
                draft / (file if len(groups) > 1 else f"{stem}.safetensors"),
                group,
                {"format": "pt", **aliases},
            )
        home.update(dict.fromkeys(group, writer))
    done = advance or (lambda count: None)
    written = Written()
    if callable(tensors):
        seen = _put_pieces(tensors, home, layouts, draft, instead or {}, done, written)
    else:
        placed = ((name, (instead or {}).get(name, tensor)) for name, tensor in tensors)
        seen = _put_tensors(placed, home, base, draft, done, written)
    missing = sorted(set(layouts) - seen)
    if missing:
        raise MergeError(
            f"the merged model lacks {len(missing)} of the base's tensors: {listed(missing)}",
            hint="pass every tensor of the base, buffers included",
        )
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(layout.nbytes for layout in layouts.values())},
            "weight_map": {name: home[name].path.name for name in sorted(home)},
        }
        text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
        with writing(draft.parent):
            (draft / _index_name(stem)).write_text(text, encoding="utf-8")
    return written


def _put_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    home: Mapping[str, SafetensorsWriter],
    base: Checkpoint,
    draft: Path,
    done: Advance,
    written: Written,
) -> set[str]:
    first: dict[str, tuple[str, Tensor]] = {}
    seen: set[str] = set()
    for name, given in tensors:
        tensor = _conform(name, given, base, seen)
        seen.add(name)
        canonical = base.ties.get(name, name)
        if canonical in base.ties.values():
            _require_tied(canonical, name, tensor, first)
        if name == canonical:
            with writing(draft.parent):
                home[name].write(name, tensor)
            written.add(name, 0, tensor)
            done(tensor.numel())
    return seen


def _put_pieces(
    pieces: Pieces,
    home: Mapping[str, SafetensorsWriter],
    layouts: Mapping[str, Layout],
    draft: Path,
    instead: Mapping[str, Tensor],
    done: Advance,
    written: Written,
) -> set[str]:
    """Return the names of the tensors that were put as a whole."""
    lock, counts = threading.Lock(), Counter[str]()

    def put(name: str, start: int, piece: Tensor) -> None:
        if name in instead:
            piece = instead[name].flatten()[start : start + len(piece)].to(piece)
        with writing(draft.parent):
            home[name].write_piece(name, start, piece)
        written.add(name, start, piece)
        with lock:
            counts[name] += piece.numel()
        done(piece.numel())

    pieces(put)
    return {n for n, layout in layouts.items() if counts[n] == layout.shape.numel()}


def _conform(name: str, tensor: Tensor, base: Checkpoint, seen: set[str]) -> Tensor:
    if name not in base.names or name in seen:
        problem = "was given twice" if name in seen else "is not in the base"
        raise MergeError(
            f"tensor {name!r} {problem}", hint="pass each tensor of the base once, and no other"
        )
    if tensor.shape != base.shape(name):
        raise MergeError(
            f"tensor {name!r} is {list(tensor.shape)} and {list(base.shape(name))} in the base",
            hint="a merged model has the base's shapes",
        )
    dtype = base.dtype(name)
    if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
        raise MergeError(
            f"tensor {name!r} is {tensor.dtype} and {dtype} in the base",
            hint="only floating dtypes are converted to the base's",
        )
    rounded = tensor.detach().to(device="cpu", dtype=dtype)
    if exceeds_range(tensor, rounded):
        raise MergeError(
            f"merged values of tensor {name!r} are beyond the range of {dtype}, the base's",
            hint="choose smaller coefficients, or convert the base to bfloat16 or float32",
        )
    return rounded


def _require_tied(
    canonical: str, name: str, tensor: Tensor, first: dict[str, tuple[str, Tensor]]
) -> None:
    """Hold the first of tied tensors, and refuse a later one that differs from it."""
    other, held = first.setdefault(canonical, (name, tensor))
    if held is not tensor and raw_bytes(held) != raw_bytes(tensor):
        raise MergeError(
            f"{other!r} and {name!r} are one tensor in the base but differ in the merged model",
            hint="give tied tensors the same coefficients, or untie them in the base",
        )


@contextmanager
def merging_bar(base: Checkpoint, *, shown: bool) -> Iterator[Advance | None]:
    """Show on stderr, where that is a terminal, how much of a model is written.

    Args:
        base: The base, whose elements are counted.
        shown: Whether to show anything.

    Yields:
        What takes the number of elements that were written; None where nothing is shown.
    """
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    total = sum(base.shape(name).numel() for name in base.names if name not in base.ties)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    lock, written = threading.Lock(), 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"merging {total / 1e6:.4g} M numbers", total=total)

        def advance(count: int) -> None:
            nonlocal written
            with lock:
                written += count
                bar.advance(task, count)
                if written == total:
                    bar.update(task, description="hashing inputs and result")

        yield advance


def _index_name(stem: str) -> str:
    """Return what libraries call the index of shards; a variant (``model.fp16``) stands behind."""
    name, _, variant = stem.partition(".")
    if variant and name in ("model", "pytorch_model", "diffusion_pytorch_model"):
        return f"{name}.safetensors.index.{variant}.json"
    return f"{stem}.safetensors.index.json"
