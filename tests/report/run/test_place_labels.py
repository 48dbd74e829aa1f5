from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from map_bo.report.run.front_plots import place_labels


def placed(at: list[tuple[float, float]], names: list[str]) -> list[Annotation]:
    figure = Figure(figsize=(6, 5), dpi=100)
    axes = figure.add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    figure.draw_without_rendering()
    points = np.array(at, dtype=float)
    place_labels(axes, names, points, points)
    figure.draw_without_rendering()
    return [child for child in axes.get_children() if isinstance(child, Annotation)]


@pytest.mark.parametrize("count", [1, 4, 8])
def test_names_of_points_in_one_place_do_not_cover_each_other(count: int) -> None:
    labels = placed([(0.5, 0.5 + 0.001 * i) for i in range(count)], ["expert"] * count)
    boxes = [Text.get_window_extent(label) for label in labels]  # without its line
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            overlap = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(overlap) < 2.0  # pixels


@pytest.mark.parametrize("corner", [(0.01, 0.01), (0.99, 0.01), (0.01, 0.99), (0.99, 0.99)])
def test_names_at_the_edge_stay_inside(corner: tuple[float, float]) -> None:
    (label,) = placed([corner], ["a name"])
    frame = label.axes.get_window_extent()  # type: ignore[union-attr]
    box = label.get_window_extent()
    assert box.x0 >= frame.x0 - 2
    assert box.x1 <= frame.x1 + 2
    assert box.y0 >= frame.y0 - 2
    assert box.y1 <= frame.y1 + 2


def test_long_names_are_shortened() -> None:
    (label,) = placed([(0.5, 0.5)], ["x" * 100])
    assert len(label.get_text()) == 24
