"""The content of a W&B Report of a comparison, as plain data.

It has the words and tables of the local report, and panels in place of its plots. Panels show what
the runs logged themselves (see :class:`map_bo.tracking.wandb.numbers.Numbers` for the names), so
they are updated on the server. Nothing here imports wandb or contacts a server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import TypeAlias

from map_bo.errors import PublishError
from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.page import markdown_part, sections
from map_bo.report.comparison.plots import COLOURS
from map_bo.report.comparison.runs import RunRecord
from map_bo.report.comparison.tables import Cell, Link, Table
from map_bo.tracking.wandb.run import WandbRun

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
    "require_tracked",
    "wandb_report",
]

_TITLE = 128  # longest title of a W&B Report, in characters
_PAIRS_UP_TO = 4  # metrics of which all pairs are shown, as in the local report


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """Sentences or a table, in Markdown."""

    markdown: str


@dataclass(frozen=True)
class Lines:
    """Logged numbers over time, against another logged number.

    Attributes:
        title: Its title.
        x: Logged name of the horizontal axis.
        y: Logged names of the vertical axis.
        mean: Whether the runs of a set become one line, their mean with its standard error;
            otherwise every evaluation of every run is a point.
    """

    title: str
    x: str
    y: tuple[str, ...]
    mean: bool = False


@dataclass(frozen=True)
class Scatter:
    """One point per run, by two names of its summary."""

    title: str
    x: str
    y: str


@dataclass(frozen=True)
class Bars:
    """Names of the summary as bars: means over the runs of a set."""

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
    """One line per run, through its settings and results."""

    title: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class FrontTable:
    """The fronts that runs logged as tables, overlaid, by two of their columns."""

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
        project: Their project.
        entity: Their owner.
        ids: Their ids.
        groups: The groups that they belong to; empty where there is none.
        colour: Their colour.
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
        runs: One set per variant.
        panels: The panels.
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
        description: The line below the title.
        project: The project of the report.
        entity: The owner of the report.
        blocks: Its content, from top to bottom.
    """

    title: str
    description: str
    project: str
    entity: str
    blocks: tuple[Block, ...]


def require_tracked(found: Comparison) -> None:
    """Refuse a comparison in which no finished run was tracked with wandb.

    Raises:
        PublishError: When none was.
    """
    if all(run.record.wandb is None for run in found.runs):
        raise PublishError(
            f"none of the {len(found.runs)} finished runs was tracked with wandb, so a W&B Report "
            "would be empty",
            hint="track runs from their start, with tracking=[local,wandb]",
        )


def wandb_report(
    found: Comparison,
    *,
    entity: str,
    place: str | None = None,
    site: str = "https://wandb.ai",
) -> ReportSpec:
    """Return the W&B Report of a comparison.

    Args:
        found: The comparison of the local report.
        entity: Owner of the runs that were recorded without one: the default of the key.
        place: Project of all runs, ``PROJECT`` or ``ENTITY/PROJECT``, where it is not the one
            that they were recorded in.
        site: Address of the server's pages.

    Raises:
        PublishError: When no finished run was tracked with wandb.
    """
    require_tracked(found)
    homes = _homes(found, entity, place)
    tracked = [run for run in found.runs if run.record.name in homes]
    prefix = Counter(homes[run.record.name].prefix for run in tracked).most_common(1)[0][0]
    grids = _grids(found, prefix, _run_sets(found, homes))
    blocks: list[Block] = [Text(text) for text in _opening(found, homes, prefix)]
    for anchor, title, parts in sections(found):
        blocks.append(Heading(title))
        for part in parts:
            if isinstance(part, str) and part.startswith("plot:"):
                continue
            shown = _link(part, found, homes, site) if isinstance(part, Table) else part
            blocks.append(Text("\n".join(markdown_part(shown))))
        for words, grid in grids.get(anchor, ()):
            blocks += [Text(words), grid]
    first = homes[tracked[0].record.name]
    title = f"Comparison of {found.title}"
    return ReportSpec(
        title=title if len(title) <= _TITLE else f"{title[: _TITLE - 1]}…",
        description="Written by map-bo report --wandb; the local report.html has the same content.",
        project=first.project,
        entity=first.entity or entity,
        blocks=tuple(blocks),
    )


def _homes(found: Comparison, entity: str, place: str | None) -> dict[str, WandbRun]:
    """Return the place of each tracked run by name, with owner and project filled in."""
    owner, _, project = (place or "").rpartition("/")
    homes = {}
    for record in (*(run.record for run in found.runs), *found.missing):
        if record.wandb is not None:
            homes[record.name] = replace(
                record.wandb,
                entity=owner or record.wandb.entity or entity,
                project=project or record.wandb.project,
            )
    return homes


def _run_sets(found: Comparison, homes: dict[str, WandbRun]) -> tuple[RunSet, ...]:
    sets = []
    for number, variant in enumerate(found.variants):
        runs = [homes[r.record.name] for r in found.of(variant) if r.record.name in homes]
        places = list(dict.fromkeys((run.entity or "", run.project) for run in runs))
        for entity, project in places:
            own = [run for run in runs if (run.entity or "", run.project) == (entity, project)]
            alone = any(run.group is None for run in own)
            sets.append(
                RunSet(
                    name=variant if len(places) == 1 else f"{variant} ({entity}/{project})",
                    project=project,
                    entity=entity,
                    ids=tuple(run.id for run in own),
                    groups=() if alone else tuple(dict.fromkeys(run.group or "" for run in own)),
                    colour=COLOURS[number % len(COLOURS)],
                )
            )
    return tuple(sets)


def _opening(found: Comparison, homes: dict[str, WandbRun], prefix: str) -> list[str]:
    """Return what a reader has to know about the panels."""
    words = [
        "The tables hold the values of the local report, on one scale for all runs. The panels "
        "show what the runs logged: there hypervolumes are on the scale of each run, with its own "
        "reference point, and bands are standard errors instead of bootstrap intervals."
    ]
    lost = [run for run in found.runs if run.record.name not in homes]
    if lost:
        words.append(
            f"{len(lost)} of {len(found.runs)} finished runs were not tracked with wandb; they are "
            "in the tables but not in the panels."
        )
    others = sum(
        run.record.name in homes and homes[run.record.name].prefix != prefix for run in found.runs
    )
    if others:
        words.append(
            f"{others} runs logged under another prefix than `{prefix}`; the panels lack them."
        )
    return words


def _link(part: Table, found: Comparison, homes: dict[str, WandbRun], site: str) -> Table:
    """Return a table whose links lead to runs on the server instead of local folders."""
    records = (*(run.record for run in found.runs), *found.missing)
    targets = {record.link: _address(record, homes, site) for record in records}

    def replaced(cell: Cell) -> Cell:
        if not isinstance(cell, Link):
            return cell
        target = targets.get(cell.target)
        return cell.text if target is None else Link(cell.text, target)

    return replace(part, rows=tuple(tuple(replaced(cell) for cell in row) for row in part.rows))


def _address(record: RunRecord, homes: dict[str, WandbRun], site: str) -> str | None:
    home = homes.get(record.name)
    return None if home is None else f"{site}/{home.entity}/{home.project}/runs/{home.id}"


def _grids(
    found: Comparison, prefix: str, runs: tuple[RunSet, ...]
) -> dict[str, list[tuple[str, Grid]]]:
    """Return the panels of each section, with the sentence above them."""
    volume = f"{prefix}hypervolume"
    observed = f"{volume}/observed points"
    grids = {
        "quality": [
            (
                "Means over the runs of a variant, each on its own scale.",
                Grid(
                    runs,
                    (
                        Bars(
                            "Hypervolume, scaled",
                            (observed, f"{volume}/verified points", f"{volume}/predicted front"),
                        ),
                    ),
                    grouped=True,
                ),
            )
        ],
        "progress": [
            (
                "Hypervolume of the observed points (real) after each evaluation of the search, "
                "once base and experts were measured: mean over the runs of a variant.",
                Grid(
                    runs,
                    (
                        Lines(
                            "Hypervolume of observed points (real)",
                            f"{prefix}evaluation",
                            (observed,),
                            mean=True,
                        ),
                    ),
                    grouped=True,
                ),
            )
        ],
        "fronts": [
            (
                "All observed points (real), then the predicted fronts, of all runs.",
                Grid(runs, _front_panels(found, prefix), grouped=False),
            )
        ],
        "cost": [
            (
                "One point per run.",
                Grid(
                    runs,
                    (
                        Scatter("Quality against evaluations", f"{prefix}evaluations", observed),
                        Scatter(
                            "Quality against seconds spent evaluating",
                            f"{prefix}seconds/evaluate",
                            observed,
                        ),
                    ),
                    grouped=False,
                ),
            )
        ],
    }
    varied = [key for key in found.keys if any(key in run.record.settings for run in found.runs)]
    if varied:
        title = "hypervolume of observed points"
        columns = (*(_setting(key, found) for key in varied), Column(observed, title, False))
        grids["compared"] = [
            (
                "One line per run, from its settings to the hypervolume of its observed points.",
                Grid(runs, (Parallel("Settings that vary", columns),), grouped=False),
            )
        ]
    return grids


def _front_panels(found: Comparison, prefix: str) -> tuple[Panel, ...]:
    names = [metric.name for metric in found.metrics]
    plots = Images("Front of each run", (f"{prefix}plots/front",))
    if len(names) == 1:
        points = Lines(f"{names[0]} (real)", f"{prefix}evaluation", (f"{prefix}metric/{names[0]}",))
        return points, plots
    pairs: Sequence[tuple[str, str]] = list(
        combinations(names, 2) if len(names) <= _PAIRS_UP_TO else pairwise(names)
    )
    seen = (
        Lines(f"{y} against {x} (real)", f"{prefix}metric/{x}", (f"{prefix}metric/{y}",))
        for x, y in pairs
    )
    table = f"{prefix}front"
    fronts = (
        FrontTable(f"{y} against {x} (predicted)", table, f"predicted:{x}", f"predicted:{y}")
        for x, y in pairs
    )
    return (*seen, *fronts, plots)


def _setting(key: str, found: Comparison) -> Column:
    """Return a setting as a column, by its name in the configuration of the wandb run."""
    commanded = any("loop.budget" in run.record.settings for run in found.runs)
    if not commanded:  # runs made in Python
        return Column(f"run.settings.{key}", key, True)
    return Column(key if "." in key else f"choices.{key}", key, True)
