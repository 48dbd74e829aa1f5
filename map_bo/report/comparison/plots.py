"""The plots of a comparison: progress with bands, overlaid fronts, quality against cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from map_bo.report.comparison.comparison import Comparison
from map_bo.report.marks import GREY, INK, axis_label, literal, style_axes
from map_bo.report.numbers import distinct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["COLOURS", "cost_figure", "front_overlay", "progress_bands"]

# Okabe and Ito, "Color Universal Design" (2008); shapes and dashes also distinguish variants.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_DASHES = ((0, ()), (0, (6, 2)), (0, (2, 2)), (0, (8, 2, 1, 2)))
_PAIRS_UP_TO = 4
_LABEL = 44
_LINE = 0.19  # inches that a line of the legend takes


@dataclass(frozen=True)
class _Look:
    """How a variant is drawn everywhere."""

    label: str
    colour: str
    shape: str
    dashes: tuple[int, tuple[int, ...]]

    def handle(self) -> Line2D:
        from matplotlib.lines import Line2D

        return Line2D(
            [],
            [],
            color=self.colour,
            marker=self.shape,
            linestyle=self.dashes,
            markersize=6,
            label=self.label,
        )


def _looks(found: Comparison) -> dict[str, _Look]:
    names = distinct(found.variants, _LABEL)
    return {
        variant: _Look(
            literal(name),
            COLOURS[i % len(COLOURS)],
            _SHAPES[i % len(_SHAPES)],
            _DASHES[i // len(COLOURS) % len(_DASHES)],
        )
        for i, (variant, name) in enumerate(zip(found.variants, names, strict=True))
    }


def progress_bands(found: Comparison) -> Figure:
    """Return the hypervolume of observed points by evaluations, one band per variant."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8.0, 5.0)
    axes = figure.add_subplot()
    looks = _looks(found)
    for variant, look in looks.items():
        curve = found.curve(variant)
        if len(found.of(variant)) > 1:
            axes.fill_between(
                curve.places,
                curve.low,
                curve.high,
                step="post",
                color=look.colour,
                alpha=0.14,
                linewidth=0,
            )
        axes.step(
            curve.places,
            curve.mean,
            where="post",
            color=look.colour,
            linestyle=look.dashes,
            marker=look.shape,
            markersize=4,
            markevery=max(1, len(curve.places) // 8),
            linewidth=1.7,
        )
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("hypervolume of observed points, scaled\n(real, higher is better)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    style_axes(axes)
    _finish(figure, "Progress: mean over seeds, 95 % bootstrap bands", looks)
    return figure


def front_overlay(found: Comparison) -> Figure:
    """Return the non-dominated observed points (real) of all seeds, with variants overlaid.

    With one metric it shows the best value of each run, with two to four all pairs, and with more
    parallel coordinates.
    """
    m = len(found.metrics)
    looks = _looks(found)
    if m == 1:
        figure = _figure(8.0, 4.6)
        _best(figure.add_subplot(), found, looks)
    elif m <= _PAIRS_UP_TO:
        pairs = list(combinations(range(m), 2))
        columns = min(len(pairs), 3)
        lines = -(-len(pairs) // columns)
        figure = _figure(max(8.0, 3.8 * columns), 4.0 * lines + 1.2 if m > 2 else 5.6)
        for number, (i, j) in enumerate(pairs, start=1):
            _pair(figure.add_subplot(lines, columns, number), found, looks, i, j)
    else:
        figure = _figure(1.35 * m + 1.2, 5.6)
        _parallel(figure.add_subplot(), found, looks)
    _finish(figure, "Non-dominated observed points (real), all seeds", looks)
    return figure


def cost_figure(found: Comparison) -> Figure:
    """Return quality against evaluations and against seconds, one point per run."""
    figure = _figure(9.0, 4.8)
    looks = _looks(found)
    quality = "observed_hypervolume_real"
    for number, what in enumerate(("evaluations", "seconds"), start=1):
        axes = figure.add_subplot(1, 2, number)
        for variant, look in looks.items():
            runs = found.of(variant)
            costs = [_cost(run.values, what) for run in runs]
            values = [run.values[quality] for run in runs]
            axes.scatter(
                costs, values, color=look.colour, marker=look.shape, s=22, alpha=0.5, linewidths=0
            )
            axes.scatter(
                [float(np.mean(costs))],
                [float(np.mean(values))],
                color=look.colour,
                marker=look.shape,
                s=90,
                edgecolors="white",
                linewidths=0.8,
                zorder=5,
            )
        axes.set_xlabel(what if what == "evaluations" else "seconds in all")
        if number == 1:
            axes.set_ylabel("hypervolume of observed points, scaled\n(real, higher is better)")
        style_axes(axes)
    _finish(figure, "Quality against cost: a small mark per run, a large one for the mean", looks)
    return figure


def _cost(values: Mapping[str, float], what: str) -> float:
    if what == "evaluations":
        return values["evaluations"]
    return values["seconds_evaluating"] + values["seconds_choosing"]


def _pair(axes: Axes, found: Comparison, looks: dict[str, _Look], i: int, j: int) -> None:
    for variant, look in looks.items():
        for run in found.of(variant):
            order = run.points[:, i].argsort()
            axes.plot(
                run.points[order, i].numpy(),
                run.points[order, j].numpy(),
                color=look.colour,
                marker=look.shape,
                markersize=5,
                linewidth=0.8 if len(found.metrics) == 2 else 0.0,
                linestyle=look.dashes,
                alpha=0.65,
            )
    for draw, k in ((axes.axvline, i), (axes.axhline, j)):
        draw(float(found.scale.point[k]), color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_xlabel(axis_label(found.metrics[i], length=26))
    axes.set_ylabel(axis_label(found.metrics[j], length=26))
    style_axes(axes)


def _best(axes: Axes, found: Comparison, looks: dict[str, _Look]) -> None:
    for number, (variant, look) in enumerate(looks.items()):
        values = [float(run.points[0, 0]) for run in found.of(variant) if len(run.points)]
        axes.plot([number] * len(values), values, look.shape, color=look.colour, alpha=0.65)
    axes.axhline(float(found.scale.point[0]), color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_xticks([])
    axes.set_ylabel(axis_label(found.metrics[0]))
    style_axes(axes)


def _parallel(axes: Axes, found: Comparison, looks: dict[str, _Look]) -> None:
    x = np.arange(len(found.metrics))
    for variant, look in looks.items():
        for run in found.of(variant):
            lines = found.scale.gains(run.points).numpy()
            for line in lines:
                axes.plot(
                    x, line, color=look.colour, linestyle=look.dashes, linewidth=0.8, alpha=0.35
                )
                axes.plot(x, line, look.shape, color=look.colour, markersize=3, alpha=0.6)
    axes.axhline(0.0, color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    for i in range(len(found.metrics)):
        axes.axvline(i, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xticks(x, distinct([literal(metric.name) for metric in found.metrics], 16))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("scaled: 0 is the reference point, 1 the best expert")
    style_axes(axes)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _finish(figure: Figure, title: str, looks: dict[str, _Look]) -> None:
    figure.suptitle(title, fontsize=11, color=INK)
    columns = 2 if max(len(look.label) for look in looks.values()) > 24 else 3
    lines = -(-len(looks) // columns)
    figure.set_figheight(figure.get_figheight() + _LINE * max(0, lines - 2))  # the axes keep theirs
    legend = figure.legend(
        handles=[look.handle() for look in looks.values()],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    for text in legend.get_texts():
        text.set_color(INK)
