"""The front as a picture: a scatter plot, a matrix of them, or parallel coordinates.

Labels (:func:`place_labels`) are placed so that they cover neither each other nor the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from map_bo.data import to_maximisation
from map_bo.report.marks import (
    GREY,
    INK,
    KINDS,
    axis_label,
    legend_handles,
    literal,
    points_by_kind,
    style_axes,
    title_of,
)
from map_bo.report.numbers import better, metric_value, shorten
from map_bo.report.view import RunView, anchor_values, representative_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["front_figure", "place_labels"]

_DIRECTIONS = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
_DISTANCES = (8.0, 16.0, 28.0, 42.0)
_SCATTER_MATRIX_UP_TO = 5  # metrics; beyond, there are parallel coordinates
_LINES = 60  # points of the front in parallel coordinates

Box: TypeAlias = tuple[float, float, float, float]


def place_labels(
    axes: Axes,
    names: Sequence[str],
    at: NDArray[np.float64],
    around: NDArray[np.float64],
    *,
    size: float = 9.0,
    length: int = 24,
) -> None:
    """Write each name near its point, one after another, where it covers least.

    For every name eight directions at four distances are tried; the place that overlaps the
    fewest labels, points and edges of the axes is taken, and the nearest of several such places.
    A name far from its point is joined to it by a thin line.

    Args:
        axes: Where to write; its limits must be final.
        names: ``n`` names.
        at: ``n x 2`` points, in data coordinates.
        around: ``k x 2`` all points that should stay visible, in data coordinates.
        size: Font size in points.
        length: Longest name written in full.
    """
    figure = axes.figure
    per_point = figure.get_figure(root=True).dpi / 72.0
    points = axes.transData.transform(around) if len(around) else np.zeros((0, 2))
    left, bottom, right, top = axes.get_window_extent().extents
    frame: Box = (left, bottom, right, top)
    placed: list[Box] = []
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
    pixels = axes.transData.transform(at)
    for name, (x0, y0), xy in zip(names, at, pixels, strict=True):
        text = shorten(name, length)
        # Widths of the default font: about .6 of its size a letter; enough to keep apart.
        width, height = len(text) * size * 0.6 * per_point, size * 1.25 * per_point
        best: tuple[float, tuple[float, float], Box, bool] | None = None
        for distance in _DISTANCES:
            for right, up in _DIRECTIONS:
                reach = distance * per_point / (2**0.5 if right and up else 1.0)
                x = xy[0] + right * reach - (0.5 - 0.5 * right) * width
                y = xy[1] + up * reach - (0.5 - 0.5 * up) * height
                box = (x, y, x + width, y + height)
                cost = _cost(box, placed, points, frame) + distance / 20
                if best is None or cost < best[0]:
                    offset = ((x - xy[0]) / per_point, (y - xy[1]) / per_point)
                    best = (cost, offset, box, distance > _DISTANCES[1])
        assert best is not None
        _, offset, box, far = best
        placed.append(box)
        axes.annotate(
            literal(text),
            xy=(float(x0), float(y0)),
            xytext=offset,
            textcoords="offset points",
            fontsize=size,
            color=INK,
            va="bottom",
            ha="left",
            zorder=10,
            annotation_clip=False,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.8},
            arrowprops=line if far else None,
        )


def _cost(
    box: Box,
    placed: list[Box],
    points: NDArray[np.float64],
    frame: Box,
) -> float:
    left, bottom, right, top = box
    labels = sum(left < r and right > x and bottom < t and top > b for x, b, r, t in placed)
    under = (
        (points[:, 0] > left - 3)
        & (points[:, 0] < right + 3)
        & (points[:, 1] > bottom - 3)
        & (points[:, 1] < top + 3)
    )
    outside = left < frame[0] or bottom < frame[1] or right > frame[2] or top > frame[3]
    return 20.0 * labels + float(under.sum()) + (6.0 if outside else 0.0)


def front_figure(view: RunView) -> Figure:
    """Return the figure for the number of metrics.

    With one metric it shows the evaluations in order, with two a scatter plot, with three to five
    all pairs, and with more parallel coordinates.
    """
    m = len(view.metrics)
    if m == 1:
        return _one_metric(view)
    if m == 2:
        return _scatter(view)
    return _scatter_matrix(view) if m <= _SCATTER_MATRIX_UP_TO else _parallel(view)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")


def _one_metric(view: RunView) -> Figure:
    """Draw the evaluations in order, then the predicted best with its interval."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8.0, 4.8)
    axes = figure.add_subplot()
    metric, seen, front = view.metrics[0], view.seen, view.front
    named = {anchor.row: anchor for anchor in anchor_values(view)}
    gains = to_maximisation(seen.Y, view.metrics)[:, 0].nan_to_num(nan=-torch.inf)
    so_far = to_maximisation(gains.cummax(0).values[:, None], view.metrics)[:, 0].numpy()
    known = np.isfinite(so_far)
    (line,) = axes.step(
        np.arange(1, len(seen) + 1)[known],
        so_far[known],
        where="post",
        color=GREY,
        linewidth=1.2,
        zorder=2,
        label="best so far",
    )
    rows = [i for i in seen.ok.nonzero().flatten().tolist() if i not in named]
    KINDS["observed"].scatter(axes, [i + 1 for i in rows], seen.Y[rows, 0].numpy())
    for row, anchor in named.items():
        KINDS[anchor.kind].scatter(axes, [row + 1], [float(anchor.y[0])])
    after = len(seen) + 2
    place = np.arange(len(front)) + after
    mean, low, high = (x[:, 0].numpy() for x in (front.mean, front.lower, front.upper))
    axes.vlines(place, low, high, color=KINDS["predicted"].colour, linewidth=1.2, zorder=3)
    KINDS["predicted"].scatter(axes, place, mean, size=2.5)
    done = front.verified.numpy()
    KINDS["real"].scatter(axes, place[done], front.real[:, 0].numpy()[done])
    axes.axvline(after - 1, color=GREY, linewidth=0.8)
    axes.axhline(float(view.scale.point[0]), color=INK, linestyle=(0, (4, 4)), linewidth=0.9)
    axes.set_xlabel("evaluation  |  then the predicted front, with 95 % intervals")
    axes.set_ylabel(axis_label(metric))
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.draw_without_rendering()
    points = [[row + 1, float(anchor.y[0])] for row, anchor in named.items()]
    every = np.array([*points, *([i + 1, float(seen.Y[i, 0])] for i in rows)]).reshape(-1, 2)
    experts = [i for i, anchor in enumerate(named.values()) if anchor.kind == "expert"]
    names = [anchor.name for anchor in named.values()]
    place_labels(axes, [names[i] for i in experts], every[experts], every)
    handles = legend_handles(view, without=("reference",))
    figure.suptitle(title_of(view, "Evaluations and the predicted best"), fontsize=11, color=INK)
    _legend(figure, [*handles, line, _reference_line()])
    return figure


def _reference_line() -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, linestyle=(0, (4, 4)), linewidth=0.9, label="reference point")


def _legend(figure: Figure, handles: list[Line2D], *, columns: int = 4) -> None:
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_color(INK)


def _pair(axes: Axes, view: RunView, i: int, j: int, *, size: float = 1.0) -> None:
    """Draw metric ``j`` against metric ``i``: all points, with verified ones joined."""
    front = view.front
    for kind, values in points_by_kind(view).items():
        KINDS[kind].scatter(axes, values[:, i].numpy(), values[:, j].numpy(), size=size)
    for row in front.verified.nonzero().flatten().tolist():
        axes.plot(
            [float(front.mean[row, i]), float(front.real[row, i])],
            [float(front.mean[row, j]), float(front.real[row, j])],
            color=KINDS["real"].colour,
            linewidth=1.1,
            zorder=5,
        )
    for draw, k in ((axes.axvline, i), (axes.axhline, j)):
        bounds = [one.bound for one in view.scale.constraints if one.metric == view.metrics[k].name]
        for value in bounds or [float(view.scale.point[k])]:
            colour, dashes = (INK, (5, 2)) if bounds else (GREY, (2, 3))
            draw(value, color=colour, linestyle=(0, dashes), linewidth=0.9, zorder=2)
    style_axes(axes)
    limits = _limits(view)
    axes.set_xlim(*limits[i].tolist())
    axes.set_ylim(*limits[j].tolist())


def _limits(view: RunView) -> NDArray[np.float64]:
    """Return ``m x 2`` limits of the axes, own units.

    They contain the front, the anchors and the reference point. Observed points do not count,
    because a single bad evaluation would squeeze everything else into a corner.
    """
    every = np.concatenate(
        [y.numpy() for kind, y in points_by_kind(view).items() if kind != "observed"]
    )
    low, high = every.min(0), every.max(0)
    width = np.where(high > low, high - low, 0.1)
    return np.stack([low - 0.07 * width, high + 0.07 * width], axis=-1)


def _beyond(values: NDArray[np.float64], limits: NDArray[np.float64]) -> int:
    """Return how many rows of ``values`` (``n x m``) leave ``limits`` (``m x 2``) anywhere."""
    return int(((values < limits[:, 0]) | (values > limits[:, 1])).any(-1).sum())


def _observed(view: RunView) -> NDArray[np.float64]:
    return points_by_kind(view).get("observed", view.front.mean[:0]).numpy()


def _scatter(view: RunView) -> Figure:
    from matplotlib.lines import Line2D

    figure = _figure(7.4, 6.6)
    axes = figure.add_subplot()
    _pair(axes, view, 0, 1)
    done = view.front.select(view.front.verified)
    for row in range(len(done)):
        (x, y), (left, bottom), (right, top) = (
            values[row].tolist() for values in (done.mean, done.lower, done.upper)
        )
        blue = KINDS["predicted"].colour
        axes.plot([left, right], [y, y], color=blue, linewidth=0.9, alpha=0.6, zorder=3)
        axes.plot([x, x], [bottom, top], color=blue, linewidth=0.9, alpha=0.6, zorder=3)
    axes.set_xlabel(axis_label(view.metrics[0]), fontsize=10.5)
    axes.set_ylabel(axis_label(view.metrics[1]), fontsize=10.5)
    handles = legend_handles(view, beyond=_beyond(_observed(view), _limits(view)))
    if len(done):
        label = "95 % interval of prediction"
        handles.append(Line2D([], [], color=blue, linewidth=0.9, alpha=0.6, label=label))
    figure.suptitle(title_of(view, "Pareto front"), fontsize=11, color=INK)
    _legend(figure, handles, columns=3)
    figure.draw_without_rendering()
    experts = [anchor for anchor in anchor_values(view) if anchor.kind == "expert"]
    if experts:
        every = np.concatenate([values.numpy() for values in points_by_kind(view).values()])
        at = np.array([anchor.y.tolist() for anchor in experts])
        place_labels(axes, [anchor.name for anchor in experts], at, every)
    return figure


def _numbered(axes: Axes, xy: NDArray[np.float64], *, size: float = 7.0) -> None:
    """Write each expert's number (from 1) on its mark at ``xy`` (``n x 2``)."""
    for number, (x, y) in enumerate(xy, start=1):
        axes.text(
            x,
            y,
            str(number),
            fontsize=size,
            color="white",
            fontweight="bold",
            ha="center",
            va="center_baseline",
            zorder=KINDS["expert"].order + 0.5,
        )


def _expert_handles(view: RunView, beyond: int) -> list[Line2D]:
    """Return the legend with every expert by its number."""
    handles = legend_handles(view, without=("expert",), beyond=beyond)
    for number, anchor in enumerate(
        (a for a in anchor_values(view) if a.kind == "expert"), start=1
    ):
        label = f"expert {number}: {literal(shorten(anchor.name, 26))}"
        handles.append(KINDS["expert"].handle(label))
    return handles


def _scatter_matrix(view: RunView) -> Figure:
    m = len(view.metrics)
    side = 2.9 if m <= 4 else 2.5
    figure = _figure(side * (m - 1) + 0.7, side * (m - 1) + 0.4)
    grid = figure.subplots(m - 1, m - 1, squeeze=False, sharex="col", sharey="row")
    experts = np.array([a.y.tolist() for a in anchor_values(view) if a.kind == "expert"])
    for row in range(m - 1):
        for column in range(m - 1):
            axes = grid[row][column]
            if column > row:
                axes.set_axis_off()
                continue
            _pair(axes, view, column, row + 1, size=0.8)
            if len(experts):
                KINDS["expert"].scatter(axes, experts[:, column], experts[:, row + 1], size=1.7)
                _numbered(axes, experts[:, [column, row + 1]])
            if row == m - 2:
                axes.set_xlabel(axis_label(view.metrics[column], length=24, lines=2), fontsize=9.5)
            if column == 0:
                axes.set_ylabel(axis_label(view.metrics[row + 1], length=24, lines=2), fontsize=9.5)
    figure.suptitle(title_of(view, "Pareto front, all pairs of metrics"), fontsize=11, color=INK)
    corner = grid[0][1]
    legend = corner.legend(
        handles=_expert_handles(view, _beyond(_observed(view), _limits(view))),
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9,
    )
    legend.set_in_layout(False)
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def _parallel(view: RunView) -> Figure:
    """Draw one vertical axis per metric, up is better; each line is a point of the front."""
    m = len(view.metrics)
    wide = 1.35
    figure = _figure(wide * m + 1.2, 6.4)
    axes = figure.add_subplot()
    x = np.arange(m)
    gains = {
        kind: view.scale.gains(values).numpy() for kind, values in points_by_kind(view).items()
    }
    mark = KINDS["predicted"]
    for line in gains["predicted"][representative_rows(view, _LINES)]:
        axes.plot(x, line, color=mark.colour, linewidth=0.9, alpha=0.35, zorder=mark.order)
        axes.plot(x, line, "o", color=mark.colour, markersize=2.6, alpha=0.6, zorder=mark.order)
    for kind, width in (("real", 1.6), ("base", 1.1), ("blend", 1.6)):
        for line in gains.get(kind, ()):
            axes.plot(x, line, color=KINDS[kind].colour, linewidth=width, zorder=KINDS[kind].order)
            KINDS[kind].scatter(axes, x, line, size=0.7)
    for line in gains.get("observed", ()):
        KINDS["observed"].scatter(axes, x, line, size=0.7)
    # Experts are drawn side by side on every axis, so that none hides another of equal value.
    experts = gains.get("expert", np.zeros((0, m)))
    reach = min(0.4, 0.055 * max(len(experts) - 1, 0))
    aside = np.linspace(-reach, reach, len(experts))
    side = min(8.5, 2 * reach / max(len(experts) - 1, 1) * wide * 72) if len(experts) > 1 else 8.5
    for i in range(m):
        at = np.stack([i + aside, experts[:, i]], axis=-1)
        KINDS["expert"].scatter(axes, at[:, 0], at[:, 1], size=side**2 / KINDS["expert"].size)
        if side > 5:
            _numbered(axes, at, size=0.72 * side)
    axes.axhline(0.0, color=INK, linestyle=(0, (4, 4)), linewidth=0.9, zorder=2)
    for i in range(m):
        axes.axvline(i, color=GREY, linewidth=0.9, zorder=1)
    kept = np.concatenate([values for kind, values in gains.items() if kind != "observed"])
    low, high = min(0.0, float(kept.min())), max(1.0, float(kept.max()))
    axes.set_xlim(-0.5, m - 0.5)
    limits = np.array([[low - 0.06 * (high - low), high + 0.06 * (high - low)]])
    axes.set_ylim(*limits[0].tolist())
    axes.set_ylabel("scaled: 0 is the reference point, 1 the best expert")
    style_axes(axes)
    axes.grid(False, axis="x")
    axes.set_xticks(range(m), _scales(view))
    axes.tick_params(axis="x", length=0, labelsize=8)
    title = "Pareto front, one axis per metric, up is better"
    figure.suptitle(title_of(view, title), fontsize=11, color=INK)
    handles = _expert_handles(view, _beyond(gains.get("observed", experts[:0]), limits))
    kept_handles = [h for h in handles if h.get_label() != KINDS["reference"].label]
    _legend(figure, [*kept_handles, _reference_line()])
    return figure


def _scales(view: RunView) -> list[str]:
    """Return each metric's name, its direction, and the values of 0 and 1 in its own unit."""
    said = []
    for metric, low, high in zip(
        view.metrics, view.scale.point.tolist(), view.scale.end.tolist(), strict=True
    ):
        ends = f"0: {metric_value(low, metric)}   1: {metric_value(high, metric)}"
        held = [str(one) for one in view.scale.constraints if one.metric == metric.name]
        if held:
            ends = "constraint: " + ", ".join(one.removeprefix(metric.name).strip() for one in held)
        if metric.name in view.scale.rangeless:
            ends = f"no range: {metric_value(low, metric)}"
        said.append(f"{literal(shorten(metric.name, 17))}\n({better(metric)})\n{ends}")
    return said
