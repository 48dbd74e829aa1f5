"""One progress bar over all nodes of a tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from map_bo.data import Observations
from map_bo.loop.progress import Reporter

__all__ = ["Tally", "Under"]


class Tally:
    """Counts over all nodes, for a reporter of the whole run.

    Args:
        report: Shows the whole run.
    """

    def __init__(self, report: Reporter) -> None:
        self.report, self.count = report, 0

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`; counts add up."""
        self.count += count
        self.report.done(self.count)

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.count += 1
        self.report.measured(outcome)


@dataclass(frozen=True)
class Under:
    """Shows a node's progress in that of the whole run; it is its own reporter.

    Attributes:
        whole: The tally of the whole run.
        label: What the node is called.
    """

    whole: Tally
    label: str

    @contextmanager
    def over(self, total: int) -> Iterator[Under]:
        """See :class:`map_bo.loop.progress.Progress`."""
        yield self

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.done(count)

    def evaluating(self, what: str) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.report.evaluating(f"{self.label}: {what}")

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.measured(outcome)
