"""Progress of a run: what is being evaluated, how much is done, how long the rest may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from map_bo.data import Observations

__all__ = ["Progress", "Reporter", "RichProgress", "Silent", "silent"]


class Reporter(Protocol):
    """Is notified of what happens while a run is driven."""

    def done(self, count: int) -> None:
        """``count`` evaluations were recorded before the run was resumed."""
        ...

    def evaluating(self, what: str) -> None:
        """A step begins; ``what`` describes it."""
        ...

    def measured(self, outcome: Observations) -> None:
        """An evaluation has ended; ``outcome`` is its one row, which may be a failed one."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens a reporter over a number of evaluations."""

    def over(self, total: int) -> AbstractContextManager[Reporter]:
        """Return a context in which progress towards ``total`` evaluations is reported."""
        ...


class Silent:
    """Reports nothing; it is its own reporter."""

    @contextmanager
    def over(self, total: int) -> Iterator[Reporter]:
        """See :class:`Progress`."""
        yield self

    def done(self, count: int) -> None:
        """See :class:`Reporter`."""

    def evaluating(self, what: str) -> None:
        """See :class:`Reporter`."""

    def measured(self, outcome: Observations) -> None:
        """See :class:`Reporter`."""


silent = Silent()


class RichProgress:
    """A progress bar on standard error, with the last measured metrics and the time left."""

    @contextmanager
    def over(self, total: int) -> Iterator[Reporter]:
        """See :class:`Progress`."""
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        with bar:
            yield _BarReporter(bar, bar.add_task("starting", total=total, last=""))


class _BarReporter:
    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def done(self, count: int) -> None:
        self._bar.update(self._task, completed=count)

    def evaluating(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def measured(self, outcome: Observations) -> None:
        if outcome.failures[0] is not None:
            last = f"failed: {outcome.failures[0]}"[:60]
        else:
            pairs = zip(outcome.metrics, outcome.Y[0].tolist(), strict=True)
            last = " ".join(f"{metric.name} {value:.4g}" for metric, value in list(pairs)[:4])
        self._bar.update(self._task, advance=1, last=last)
