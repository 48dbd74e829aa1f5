"""A progress bar for the writing of a merged model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.shards import Advance

__all__ = ["merging_bar"]


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
