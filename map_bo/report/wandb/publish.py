"""Publishing a W&B Report: the only part that needs the library, a key and a network.

The library (``wandb-workspaces``) is imported when it is needed. Its objects can be made without
a network; only saving contacts the server, which looks up the projects of the runs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from map_bo.errors import MissingDependencyError, PublishError
from map_bo.report.wandb.spec import (
    Bars,
    Block,
    Column,
    FrontTable,
    Grid,
    Heading,
    Images,
    Lines,
    Panel,
    Parallel,
    ReportSpec,
    RunSet,
    Scatter,
    Text,
)
from map_bo.tracking.wandb.run import has_key
from map_bo.tracking.wandb.service import end_service

__all__ = ["Account", "account", "report_of", "save_report"]

_PATIENCE = 20  # seconds to wait for the server
_COLUMNS = 24  # width of a grid on the server's pages
_LINES = 100  # lines of a plot, beyond which the page is slow


@dataclass(frozen=True)
class Account:
    """The user who is logged in, and the server.

    Attributes:
        entity: The default owner of runs and reports.
        site: Address of the server's pages.
    """

    entity: str
    site: str


def account(environment: Mapping[str, str] | None = None) -> Account:
    """Return the user who is logged in, by the server's answer.

    Args:
        environment: Where to look for a key; that of this process by default.

    Raises:
        MissingDependencyError: Without ``wandb-workspaces``.
        PublishError: Without a key, with a refused one, or without an answer of the server.
    """
    _library()
    if not has_key(os.environ if environment is None else environment):
        raise PublishError(
            "a W&B Report needs a login, and no key was found",
            hint="run `wandb login`, or set WANDB_API_KEY; then repeat the command",
        )
    import wandb

    ready = wandb.setup(settings=wandb.Settings(silent=True))  # otherwise it prints greetings
    try:
        entity = wandb.Api(timeout=_PATIENCE).default_entity
    except Exception as error:
        if wandb.run is None:  # a run that still records ends the service itself
            end_service()
        raise PublishError(
            f"the W&B Report cannot be made: {_reason(error)}",
            hint="check the network, or the key (`wandb login --relogin`); then repeat the command",
        ) from error
    if not entity:
        raise PublishError(
            "the key belongs to no user or team, so the W&B Report has no owner",
            hint="name the owner of the runs: --wandb-project ENTITY/PROJECT",
        )
    return Account(str(entity), str(ready.settings.app_url).rstrip("/"))


def save_report(spec: ReportSpec) -> str:
    """Save the report on the server.

    Returns:
        Its address.

    Raises:
        MissingDependencyError: Without ``wandb-workspaces``.
        PublishError: When the server does not take it.
    """
    report = report_of(spec)
    try:
        with _quiet():
            report.save()
            return str(report.url)
    except Exception as error:
        raise PublishError(
            f"the W&B Report cannot be saved: {_reason(error)}",
            hint="upload runs that were recorded offline with `wandb sync`; name the project of "
            "runs that were moved with --wandb-project ENTITY/PROJECT",
        ) from error


def report_of(spec: ReportSpec) -> Any:
    """Return the library's object of a report; the server is not contacted.

    Raises:
        MissingDependencyError: Without ``wandb-workspaces``.
    """
    library = _library()
    with _quiet():
        return library.Report(
            project=spec.project,
            entity=spec.entity,
            title=spec.title,
            description=spec.description,
            width="fluid",
            blocks=[_block(block, library) for block in spec.blocks],
        )


def _library() -> Any:
    try:
        with _quiet():
            return import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise MissingDependencyError(
            "a W&B Report needs the package wandb-workspaces",
            hint="pip install 'map-bo[wandb-report]'",
        ) from error


def _quiet() -> AbstractContextManager[Any]:
    """Return a context without the library's warnings about its use of old pydantic."""
    return warnings.catch_warnings(action="ignore", category=DeprecationWarning)


def _reason(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _block(block: Block, library: Any) -> Any:
    if isinstance(block, Heading):
        return library.H2(block.text)
    if isinstance(block, Text):
        return library.MarkdownBlock(block.markdown)
    return _grid(block, library)


def _grid(grid: Grid, library: Any) -> Any:
    wide = len(grid.panels) == 1
    panels = [_panel(panel, grid, library) for panel in grid.panels]
    for panel in panels:
        panel.layout = library.Layout(w=_COLUMNS if wide else _COLUMNS // 2, h=9)
    return library.PanelGrid(
        runsets=[_run_set(runs, grid.grouped, library) for runs in grid.runs],
        panels=panels,
        custom_run_colors=_group_colours(grid, library) if grid.grouped else {},
    )


def _run_set(runs: RunSet, grouped: bool, library: Any) -> Any:
    wanted = f'Metric("ID") in {list(runs.ids)!r}'
    if runs.groups:
        wanted = f'Metric("Group") in {list(runs.groups)!r} and {wanted}'
    return library.Runset(
        entity=runs.entity,
        project=runs.project,
        name=runs.name,
        filters=wanted,
        groupby=["group"] if grouped else [],
        run_settings={}
        if grouped
        else {run: library.RunSettings(color=runs.colour) for run in runs.ids},
    )


def _group_colours(grid: Grid, library: Any) -> dict[Any, str]:
    return {
        library.RunsetGroup(
            runset_name=runs.name,
            keys=(library.RunsetGroupKey(library.Metric("Group"), group),),
        ): runs.colour
        for runs in grid.runs
        for group in runs.groups
    }


def _panel(panel: Panel, grid: Grid, library: Any) -> Any:
    makers: dict[type[Any], Callable[[Any], Any]] = {
        Lines: lambda given: _lines(given, grid, library),
        Scatter: lambda given: library.ScatterPlot(
            title=given.title,
            x=library.SummaryMetric(given.x),
            y=library.SummaryMetric(given.y),
        ),
        Bars: lambda given: library.BarPlot(
            title=given.title, metrics=[library.SummaryMetric(name) for name in given.names]
        ),
        Parallel: lambda given: library.ParallelCoordinatesPlot(
            title=given.title, columns=[_column(column, library) for column in given.columns]
        ),
        FrontTable: lambda given: library.CustomChart(
            query={"summaryTable": {"tableKey": given.table}},
            chart_name="wandb/scatter/v0",
            chart_fields={"x": given.x, "y": given.y},
            chart_strings={"title": given.title},
        ),
        Images: lambda given: library.MediaBrowser(title=given.title, media_keys=list(given.names)),
    }
    return makers[type(panel)](panel)


def _lines(panel: Lines, grid: Grid, library: Any) -> Any:
    runs = [run for one in grid.runs for run in one.ids]
    look: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
    if not panel.mean:
        look = {"line_marks": {f"{run}:{name}": "points" for run in runs for name in panel.y}}
    return library.LinePlot(
        title=panel.title,
        x=panel.x,
        y=list(panel.y),
        title_x=panel.x,
        title_y=panel.y[0],
        max_runs_to_show=min(max(len(runs), 10), _LINES),
        **look,
    )


def _column(column: Column, library: Any) -> Any:
    kind = library.Config if column.setting else library.SummaryMetric
    return library.ParallelCoordinatesPlotColumn(kind(column.name), display_name=column.title)
