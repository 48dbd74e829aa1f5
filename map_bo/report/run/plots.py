"""The plots of a run as PNG files, drawn without a display and without global state.

The plot of the front is in :mod:`map_bo.report.run.front_plots` and that of a merge tree in
:mod:`map_bo.report.run.tree_plot`; the plot of progress, the hypervolume of the observed points
after each evaluation, is here.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from map_bo.pareto.indicators import hypervolume
from map_bo.report.files import write_whole
from map_bo.report.marks import GREY, INK, KINDS, default_style, style_axes, title_of
from map_bo.report.numbers import better
from map_bo.report.run.front_plots import front_figure
from map_bo.report.run.tree_plot import nested_of, tree_figure, tree_words
from map_bo.report.view import RunView, anchor_values, search_rows, verification_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["describe_plot", "observed_hypervolume", "progress_figure", "write_plots"]

# Beyond five metrics a single hypervolume may take most of a second, so fewer are computed.
_EXACT_METRICS = 5
_PLACES = 25


def observed_hypervolume(view: RunView) -> tuple[list[int], list[float]]:
    """Return numbers of evaluations, and the hypervolume of all points observed up to each.

    Metrics are scaled to 0 at the reference point and 1 at the best expert; failed evaluations
    count as evaluations and add nothing.
    """
    n = len(view.seen)
    gains = view.scale.gains(view.seen.Y)
    zero = torch.zeros(gains.shape[-1], dtype=torch.float64)
    places = list(range(1, n + 1))
    if gains.shape[-1] > _EXACT_METRICS and n > _PLACES:
        places = sorted({round(place) for place in np.linspace(1, n, _PLACES)})
    volumes = []
    for place in places:
        rows = gains[:place][view.seen.ok[:place]]
        volumes.append(hypervolume(rows, zero) if len(rows) else 0.0)
    return places, volumes


def progress_figure(view: RunView) -> Figure:
    """Return the figure of progress, with the baselines and the front as horizontal lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 4.6), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    places, volumes = observed_hypervolume(view)
    axes.step(
        [0, *places],
        [0.0, *volumes],
        where="post",
        color=INK,
        linewidth=1.8,
        label="observed points (real)",
        zorder=4,
    )
    recorded = view.summary.get("hypervolume") or {}
    for name, kind, dashes in (
        ("predicted front", "predicted", (0, (6, 2))),
        ("verified points", "real", (0, (1, 1.5))),
        ("best expert", "expert", (0, (8, 2, 1, 2))),
        ("uniform blend", "blend", (0, (3, 3))),
    ):
        value = recorded.get(name)
        if value is not None:
            axes.axhline(
                value,
                color=KINDS[kind].colour,
                linestyle=dashes,
                linewidth=1.6,
                label=name if kind == "predicted" else f"{name} (real)",
                zorder=3,
            )
    checked = verification_rows(view)
    if bool(checked.any()):
        start = len(view.seen) - int(checked.sum())
        axes.axvspan(start, len(view.seen), color="#f1f1f1", zorder=1, label="verification")
    failed = view.seen.failed_rows.nonzero().flatten() + 1
    if len(failed):
        axes.plot(
            failed.numpy(),
            np.zeros(len(failed)),
            "x",
            color="#D55E00",
            markersize=7,
            markeredgewidth=1.8,
            label="failed evaluation",
            clip_on=False,
            zorder=6,
        )
    axes.set_xlim(0, max(len(view.seen), 1) + 0.5)
    lines = [value for value in recorded.values() if value is not None]
    axes.set_ylim(0, 1.08 * (max([*volumes, *lines, 0.0]) or 1.0))
    figure.suptitle(title_of(view, "Progress"), fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("evaluations")
    axes.set_ylabel("hypervolume, scaled (higher is better)")
    style_axes(axes)
    axes.spines["bottom"].set_color(GREY)
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def write_plots(view: RunView, directory: Path) -> list[Path]:
    """Draw the front and the progress of a run, and its tree, into ``directory``.

    Returns:
        The files.

    Raises:
        OSError: When a file cannot be written.
    """
    figures = [("front", front_figure), ("progress", progress_figure)]
    if nested_of(view) is not None:
        figures.append(("tree", tree_figure))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in figures:
        image = io.BytesIO()
        with default_style():
            draw(view).savefig(image, format="png")
        written.append(directory / f"{name}.png")
        write_whole(written[-1], image.getvalue())
    return written


def describe_plot(view: RunView, name: str) -> str:
    """Return in words what the plot ``name`` (a file's stem) shows, for screen readers."""
    if name == "progress":
        return (
            f"Hypervolume of the observed points after each of {len(view.seen)} evaluations, "
            "with the predicted front, the verified points, the best expert and the uniform "
            "blend as horizontal lines. The hypervolume table holds the final values."
        )
    if name == "tree":
        return tree_words(view)
    if name != "front":
        return name
    front, m = view.front, len(view.metrics)
    axes = ", ".join(f"{metric.name} ({better(metric)})" for metric in view.metrics)
    kind = {1: "Plot of one metric", 2: "Scatter plot of two metrics"}.get(
        m,
        f"Scatter plots of all pairs of {m} metrics" if m <= 5 else f"{m} parallel axes",
    )
    anchors = ", ".join(anchor.name for anchor in anchor_values(view)) or "none"
    return (
        f"{kind}: {axes}. It shows {len(front)} predicted points of the front, "
        f"{int(front.verified.sum())} of them also as measured, "
        f"{int(search_rows(view).sum())} further observed points and these anchors: {anchors}. "
        "The tables hold the values."
    )
