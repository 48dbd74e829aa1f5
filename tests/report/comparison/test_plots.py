from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure

from map_bo.report.comparison.comparison import Comparison, compare
from map_bo.report.comparison.plots import cost_figure, front_overlay, progress_bands
from tests.report.fake_runs import comparison, record


def test_progress_shows_one_curve_and_one_band_a_variant() -> None:
    found = comparison(seeds=3)
    (axes,) = progress_bands(found).axes
    assert len(axes.lines) == 2
    assert len(axes.collections) == 2
    curve = found.curve(found.baseline)
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == list(curve.mean)
    assert "real" in axes.get_ylabel()


def test_a_single_seed_has_no_band() -> None:
    (axes,) = progress_bands(comparison(seeds=1)).axes
    assert not axes.collections


@pytest.mark.parametrize("draw", [progress_bands, front_overlay, cost_figure])
def test_axes_keep_their_size_whatever_the_number_of_variants(
    draw: Callable[[Comparison], Figure],
) -> None:
    def height(variants: int) -> float:
        names = [f"sampler number {i}, a long name" for i in range(variants)]
        runs = [record({"s": name, "seed": "0"}, verify=0, evaluations=5) for name in names]
        figure = draw(compare(runs, title="x"))
        figure.savefig(io.BytesIO(), format="png")  # warns when there is no room
        return figure.axes[0].get_window_extent().height

    assert height(30) > 0.85 * height(2)


def test_fronts_of_three_metrics_are_drawn_in_all_pairs() -> None:
    assert len(front_overlay(comparison(3, seeds=2)).axes) == 3
    (axes,) = front_overlay(comparison(2, seeds=2)).axes
    assert len(axes.lines) == 4 + 2  # runs, and the two lines of the reference point
    assert len(front_overlay(comparison(6, seeds=1)).axes) == 1


def test_cost_is_in_evaluations_and_in_seconds() -> None:
    left, right = cost_figure(comparison(seeds=2)).axes
    assert left.get_xlabel() == "evaluations"
    assert "seconds" in right.get_xlabel()
    assert len(left.collections) == 4
