"""Names beside points, placed so that they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from map_bo.report.marks import INK, plain
from map_bo.report.numbers import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["place_labels"]

_DIRECTIONS = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
_DISTANCES = (8.0, 16.0, 28.0, 42.0)

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
    """Write each name near its point, one after another where it covers least.

    For every name eight directions at four distances are tried; the place that overlaps the
    fewest labels, points and edges of the axes wins, the nearest among equals. Names that end
    far from their point are joined to it by a thin line.

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
        text = shortened(name, length)
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
            plain(text),
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
