"""Progress of a run: what is being evaluated, how much is done, how long the rest may take."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
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
from rich.table import Column

from map_bo.data import Observations
from map_bo.evaluators.evaluator import measuring
from map_bo.evaluators.examples import listening
from map_bo.workers.workers import Task

__all__ = [
    "CountsExamples",
    "Progress",
    "Reporter",
    "RichProgress",
    "ShowsWorkers",
    "Silent",
    "follow",
    "silent",
]

logger = logging.getLogger(__name__)

_WIDE = 100  # columns of a terminal with room for a long bar


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
class CountsExamples(Protocol):
    """A reporter that is also told how far an evaluation has come."""

    def scored(self, evaluator: str | None, done: int, total: int) -> None:
        """An evaluator has scored ``done`` of its ``total`` examples."""
        ...


@runtime_checkable
class CountsCost(Protocol):
    """A reporter of evaluations some of which are of few examples."""

    def paid(self, done: float) -> None:
        """As many examples have been scored as ``done`` full evaluations score."""
        ...


@runtime_checkable
class ShowsWorkers(Protocol):
    """A reporter that is also told, about once a second, what each worker does."""

    def working(self, running: Sequence[tuple[str, Task, float]], queued: int) -> None:
        """Each of ``running`` is a worker, its task, and the seconds since that began."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens a reporter over a number of evaluations."""

    def over(self, total: int) -> AbstractContextManager[Reporter]:
        """Return a context in which progress towards ``total`` evaluations is reported."""
        ...


@contextmanager
def follow(progress: Progress, total: int) -> Iterator[Reporter]:
    """Open a reporter over ``total`` evaluations, which hears of examples too where it counts them.

    Examples that other processes score are not heard of.
    """
    with progress.over(total) as report:
        if not isinstance(report, CountsExamples):
            yield report
            return
        counting: CountsExamples = report
        with listening(lambda done, total: counting.scored(measuring(), done, total)):
            yield report


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
    """A progress bar on standard error, with the last measured metrics and the time left.

    Where standard error is no terminal, the log gets a line now and then.

    Args:
        interval: Seconds between two lines of the log, at least.
    """

    def __init__(self, *, interval: float = 60.0) -> None:
        self._interval = interval

    @contextmanager
    def over(self, total: int) -> Iterator[Reporter]:
        """See :class:`Progress`."""
        console = Console(file=sys.stderr)  # this one, whatever an evaluator makes of sys.stderr
        if not console.is_terminal:
            yield _LogReporter(total, self._interval)
            return
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20 if console.width >= _WIDE else 8),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # Only what is said last is cut where the terminal is narrow.
            TextColumn(
                "{task.fields[examples]}{task.fields[last]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            transient=True,
            expand=True,
        )
        with bar:
            task = bar.add_task("starting", total=total, last="", examples="")
            yield _BarReporter(bar, task)


class _BarReporter:
    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._begun = time.monotonic()
        self._counts_rows = True  # until it is said that rows cost less than a full evaluation

    def done(self, count: int) -> None:
        self._bar.update(self._task, completed=count)

    def evaluating(self, what: str) -> None:
        self._begun = time.monotonic()
        self._bar.update(self._task, description=what, examples="")

    def scored(self, evaluator: str | None, done: int, total: int) -> None:
        left = (time.monotonic() - self._begun) * (total - done) / done
        said = f"{evaluator or 'examples'} {done}/{total}"
        said += f", {_duration(left)} left" if left else ""
        self._bar.update(self._task, examples=f"{said}  ")
        if done == total:  # the next evaluator begins
            self._begun = time.monotonic()

    def measured(self, outcome: Observations) -> None:
        if outcome.failures[0] is not None:
            last = f"failed: {outcome.failures[0]}"[:60]
        else:
            pairs = zip(outcome.metrics, outcome.Y[0].tolist(), strict=True)
            last = " ".join(f"{metric.name} {value:.4g}" for metric, value in list(pairs)[:4])
        last = f"{last}{_from_the_cache(outcome)}"
        self._bar.update(self._task, advance=int(self._counts_rows), last=last, examples="")

    def paid(self, done: float) -> None:
        self._counts_rows = False
        self._bar.update(self._task, completed=done)

    def working(self, running: Sequence[tuple[str, Task, float]], queued: int) -> None:
        if running:
            self._bar.update(
                self._task, description=_workers(running), examples=_each(running, queued)
            )


class _LogReporter:
    """Writes a line to the log where the last one is long enough ago."""

    def __init__(self, total: int, interval: float) -> None:
        self._total, self._interval = total, interval
        self._begun = self._said = time.monotonic()
        self._before = self._here = 0  # evaluations recorded earlier, and measured since
        self._recalled = 0  # of the latter, those that come from the cache
        self._paid: float | None = None  # full evaluations, where rows are measured on parts
        self._paid_before = 0.0  # of these, those that were recorded earlier
        self._what = "starting"

    def done(self, count: int) -> None:
        self._before = count - self._here

    def evaluating(self, what: str) -> None:
        self._what = what
        self._say("")

    def working(self, running: Sequence[tuple[str, Task, float]], queued: int) -> None:
        if running:
            self._what = f"{_workers(running)}: {_each(running, queued).strip()}"
            self._say("")

    def scored(self, evaluator: str | None, done: int, total: int) -> None:
        self._say(f", {evaluator or 'an evaluator'}: {done} of {total} examples")

    def measured(self, outcome: Observations) -> None:
        self._here += 1
        self._recalled += int(bool(outcome.recalled.all()))

    def paid(self, done: float) -> None:
        if self._paid is None and not self._here:
            self._paid_before = done
        self._paid = done

    def _say(self, more: str) -> None:
        now = time.monotonic()
        if now - self._said < self._interval:
            return
        self._said = now
        done, here = float(self._before + self._here), float(self._here)
        said = f"{done:.0f} of {self._total} evaluations done"
        if self._paid is not None:
            done, here = self._paid, self._paid - self._paid_before
            said = f"{done:.1f} of {self._total} full evaluations done"
        left = ""
        if here > 0 and done < self._total:
            seconds = (now - self._begun) / here * (self._total - done)
            left = f", about {_duration(seconds)} left"
        kept = f" ({self._recalled} from the cache)" if self._recalled else ""
        logger.info("%s%s; %s%s%s", self._what, more, said, kept, left)


def _from_the_cache(outcome: Observations) -> str:
    """Return how much of an outcome was not measured, in words that follow it."""
    recalled, m = int(outcome.recalled.sum()), len(outcome.metrics)
    if not recalled:
        return ""
    return " (from the cache)" if recalled == m else f" ({recalled} of {m} from the cache)"


def _workers(running: Sequence[tuple[str, Task, float]]) -> str:
    """Return how many workers are at work."""
    return f"{len(running)} worker{'s' if len(running) > 1 else ''} at work"


def _each(running: Sequence[tuple[str, Task, float]], queued: int) -> str:
    """Return what each worker evaluates and since when, the longest first, and what waits."""
    longest = sorted(running, key=lambda one: -one[2])
    words = [f"{task.words} on {name} for {_duration(seconds)}" for name, task, seconds in longest]
    return ", ".join([*words, *([f"{queued} waiting"] if queued else [])]) + "  "


def _duration(seconds: float) -> str:
    """Return a duration to read, such as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
