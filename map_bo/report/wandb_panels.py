"""What a W&B Report holds, as plain data: words, panels, and of which runs.

Names are those that the runs logged themselves, see :class:`map_bo.tracking.numbers.Numbers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Bars",
    "Block",
    "Column",
    "FrontTable",
    "Grid",
    "Heading",
    "Images",
    "Lines",
    "Panel",
    "Parallel",
    "ReportSpec",
    "RunSet",
    "Scatter",
    "Text",
]


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """Words or a table, in Markdown."""

    markdown: str


@dataclass(frozen=True)
class Lines:
    """What was logged over time, against another such name.

    Attributes:
        title: What it shows.
        x: Name that was logged.
        y: Names that were logged.
        mean: Whether runs of a set become one line, their mean with its standard error; else
            every evaluation of every run is a point.
    """

    title: str
    x: str
    y: tuple[str, ...]
    mean: bool = False


@dataclass(frozen=True)
class Scatter:
    """A point each run, by two names of its summary."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class Bars:
    """Names of the summary as bars, means over the runs of a set."""

    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of parallel coordinates: a setting (of the configuration) or a number (summary)."""

    name: str
    title: str
    setting: bool


@dataclass(frozen=True)
class Parallel:
    """A line each run, through what it was set to and what it came to."""

    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class FrontTable:
    """The fronts that runs logged as a table, one over the other, by two of its columns."""

    title: str
    table: str
    x: str
    y: str


@dataclass(frozen=True)
class Images:
    """Plots that runs logged."""

    title: str
    names: tuple[str, ...]


Panel: TypeAlias = Lines | Scatter | Bars | Parallel | FrontTable | Images


@dataclass(frozen=True)
class RunSet:
    """The runs of a variant.

    Attributes:
        name: The variant.
        project: Where they are.
        entity: Whose they are.
        ids: Their ids.
        groups: The groups they belong to; empty where they belong to none.
        colour: How they are drawn.
    """

    name: str
    project: str
    entity: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    colour: str


@dataclass(frozen=True)
class Grid:
    """Panels over the runs of all variants.

    Attributes:
        runs: A set each variant.
        panels: What is shown of them.
        grouped: Whether each set is one line or bar.
    """

    runs: tuple[RunSet, ...]
    panels: tuple[Panel, ...]
    grouped: bool


Block: TypeAlias = Heading | Text | Grid


@dataclass(frozen=True)
class ReportSpec:
    """A W&B Report.

    Attributes:
        title: At most 128 characters.
        description: A line below it.
        project: Where the report will be.
        entity: Whose it will be.
        blocks: What it holds, from top to bottom.
    """

    title: str
    description: str
    project: str
    entity: str
    blocks: tuple[Block, ...]
