"""Plots of the study: anytime curves with bands, and mean ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality.analysis import bootstrap, ranking, values
from benchmarks.quality.methods import CORE
from benchmarks.quality.protocol import CHECKPOINTS
from benchmarks.quality.tables import present
from benchmarks.quality.tidy import Row

__all__ = ["LARGEST", "draw", "save_figure"]

LARGEST = 100_000  # bytes of a plot, so that repositories stay light
_MOST = 9  # cases in one figure
# Okabe and Ito's palette, told apart by every kind of colour vision; line styles repeat it.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
_STYLES = ("-", "--", ":")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all plots of the rows into a folder and return the files; none without rows."""
    found = []
    for measure, label in (
        ("regret", "mean regret over 60 preferences"),
        ("share", "share of the best known hypervolume"),
    ):
        figure = _curves(rows, measure, label)
        if figure is not None:
            found.append(save_figure(figure, folder / f"{measure}.png"))
    figure = _ranks(rows)
    if figure is not None:
        found.append(save_figure(figure, folder / "ranks.png"))
    return found


def _curves(rows: Sequence[Row], measure: str, label: str) -> Figure | None:
    held = [row for row in rows if row.get(measure) is not None and row["method"] in CORE]
    real = sorted({row["case"] for row in held if row["real_models"]})
    cases = (real or sorted({row["case"] for row in held}))[:_MOST]
    if not cases:
        return None
    names = present(held, CORE)
    across = min(3, len(cases))
    down = -(-len(cases) // across)
    figure = Figure(figsize=(3.6 * across, 2.6 * down + 0.9), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, case in zip(axes, cases, strict=False):
        for i, name in enumerate(names):
            line = [row for row in held if (row["case"], row["method"]) == (case, name)]
            _line(axis, line, measure, i, name)
        axis.set_title(case, fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks([6, 12, 24, 48, 96], ["6", "12", "24", "48", "96"])
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        if measure == "regret":
            axis.set_yscale("log")
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.supxlabel("evaluations", fontsize=9)
    figure.supylabel(label, fontsize=9)
    return figure


def _line(axis: Any, rows: Sequence[Row], measure: str, i: int, name: str) -> None:
    points, means, lows, highs = [], [], [], []
    for n in CHECKPOINTS:
        held = [row[measure] for row in rows if row["evaluations"] == n]
        if not held:
            continue
        low, high = bootstrap([held], resamples=1000)
        points.append(n)
        means.append(float(np.mean(held)))
        lows.append(low)
        highs.append(high)
    colour = _COLOURS[i % len(_COLOURS)]
    style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
    width = 2.2 if name == "default" else 1.1
    axis.plot(points, means, style, color=colour, linewidth=width, label=name)
    axis.fill_between(points, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _ranks(rows: Sequence[Row]) -> Figure | None:
    lines = []
    for n in (12, 24, 48):
        names = present(rows, CORE)
        held = values(rows, "regret", evaluations=n)
        cases = {case for case, _ in held}
        everywhere = [name for name in names if all((case, name) in held for case in cases)]
        found = ranking(rows, everywhere, "regret", evaluations=n)
        if found is not None:
            lines.append((n, found.ranks))
    if not lines:
        return None
    names = sorted(lines[-1][1], key=lambda name: lines[-1][1][name])
    figure = Figure(figsize=(6.5, 0.32 * len(names) + 1.2), layout="constrained")
    axis = figure.subplots()
    for i, (n, ranks) in enumerate(lines):
        there = [(ranks[name], j) for j, name in enumerate(names) if name in ranks]
        axis.plot(*zip(*there, strict=True), "os^"[i], color=_COLOURS[i], label=f"{n} evaluations")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("mean rank by regret over cases, 1 is best", fontsize=9)
    axis.grid(alpha=0.3, linewidth=0.5)
    figure.legend(loc="outside upper right", ncols=len(lines), fontsize=8, frameon=False)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure, coarser until it is small enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    for dots in (110, 90, 70, 50):
        figure.savefig(path, dpi=dots, metadata={"Software": None}, pil_kwargs={"optimize": True})
        if path.stat().st_size <= LARGEST:
            break
    return path
