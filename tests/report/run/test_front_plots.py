from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from map_bo.data import Observations
from map_bo.report.run.front_plots import front_figure
from map_bo.report.view import RunView
from tests.report.fake_views import TASKS, make_view


def legend(figure: Figure) -> list[str]:
    found = [*figure.legends, *(a.get_legend() for a in figure.axes)]
    return [text.get_text() for one in found if one is not None for text in one.get_texts()]


def drawn(axes: Axes) -> list[NDArray[np.float64]]:
    return [np.asarray(c.get_offsets()) for c in axes.collections]


@pytest.mark.parametrize(("m", "axes"), [(1, 1), (2, 1), (3, 4), (6, 1)])
def test_the_number_of_metrics_decides_on_the_kind(m: int, axes: int) -> None:
    assert len(front_figure(make_view(m, evaluations=12, points=9)).axes) == axes


def test_a_scatter_shows_every_point_where_it_is() -> None:
    view = make_view(2, loss=(1,), verify=3)
    axes = front_figure(view).axes[0]
    assert axes.get_xlabel() == "rot90 (higher is better)"
    assert axes.get_ylabel() == "invert loss (lower is better)"
    offsets = drawn(axes)
    for expected in (
        view.front.mean,
        view.front.real[view.front.verified],
        view.seen.Y[1:3],
        view.scale.point[None],
    ):
        assert any(o.shape == expected.shape and np.allclose(o, expected) for o in offsets)
    names = {text.get_text() for text in axes.texts}
    assert {"rot90", "invert"} <= names


def test_predicted_and_real_of_one_point_are_joined() -> None:
    view = make_view(2, verify=2)
    lines = [line.get_xydata() for line in front_figure(view).axes[0].lines]
    for row in view.front.verified.nonzero().flatten().tolist():
        ends = np.stack([view.front.mean[row].numpy(), view.front.real[row].numpy()])
        assert any(np.shape(line) == (2, 2) and np.allclose(line, ends) for line in lines)


def astray(view: RunView) -> RunView:
    far = Observations(view.seen.X[:1] + 0.01, view.front.mean[:1] + 100.0, view.metrics)
    return dataclasses.replace(
        view,
        seen=view.seen.append(far),
        summary={**view.summary, "verification": {"points": 0}},
    )


@pytest.mark.parametrize("m", [2, 3, 6])
def test_one_evaluation_far_astray_does_not_squeeze_the_rest(m: int) -> None:
    figure = front_figure(astray(make_view(m, evaluations=12, points=9)))
    assert any("reaches beyond the axes" in label for label in legend(figure))
    low, high = figure.axes[0].get_ylim()
    assert high - low < 10


def test_the_legend_lies_outside_the_data() -> None:
    figure = front_figure(make_view(2))
    figure.draw_without_rendering()
    assert not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())


@pytest.mark.parametrize("m", [3, 6])
def test_experts_are_named_by_number_where_names_do_not_fit(m: int) -> None:
    labels = legend(front_figure(make_view(m, evaluations=12, points=9)))
    assert "expert 1: rot90" in labels
    assert f"expert {m}: {TASKS[m - 1]}" in labels


def test_parallel_axes_say_what_their_ends_are() -> None:
    view = make_view(6, loss=(0,), evaluations=12, points=9)
    labels = [text.get_text() for text in front_figure(view).axes[0].get_xticklabels()]
    assert labels[0].startswith("rot90 loss\n(lower is better)\n0: ")
    assert f"0: {float(view.scale.point[1]):.3f}" in labels[1]
