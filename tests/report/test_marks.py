from __future__ import annotations

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure

from map_bo.data import Metric
from map_bo.report.marks import (
    KINDS,
    axis_label,
    default_style,
    legend_handles,
    literal,
    points_by_kind,
    title_of,
)
from tests.report.fake_views import make_view


def test_kinds_differ_in_colour_and_in_shape() -> None:
    assert len({mark.colour for mark in KINDS.values()}) == len(KINDS)
    assert len({mark.shape for mark in KINDS.values()}) == len(KINDS)
    assert len({mark.label for mark in KINDS.values()}) == len(KINDS)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("kind", KINDS)
def test_marks_stand_out_from_the_paper(kind: str) -> None:
    # The reddish purple of Okabe and Ito has 2.8; its mark is by far the largest.
    least = 2.7 if kind == "blend" else 3.0
    assert 1.05 / (luminance(KINDS[kind].colour) + 0.05) >= least


def test_the_points_of_each_kind_are_the_run_s() -> None:
    view = make_view(3, failures=(8,))
    points = points_by_kind(view)
    assert list(points) == [
        "observed", "predicted", "real", "expert", "base", "blend", "reference",
    ]  # fmt: skip
    assert torch.equal(points["predicted"], view.front.mean)
    assert torch.equal(points["real"], view.front.real[view.front.verified])
    assert torch.equal(points["expert"], view.seen.Y[1:4])
    assert torch.equal(points["reference"][0], view.scale.point)
    for values in points.values():
        assert bool(torch.isfinite(values).all())


def test_what_a_run_lacks_is_not_in_its_legend() -> None:
    view = make_view(2, verify=0, failures=(0,))
    labels = [handle.get_label() for handle in legend_handles(view)]
    assert "base" not in labels
    assert "front, real (verified)" not in labels
    assert "uniform blend" in labels
    assert "expert" not in [h.get_label() for h in legend_handles(view, without=("expert",))]


@pytest.mark.parametrize(
    ("beyond", "label"),
    [
        (0, "observed"),
        (1, "observed (1 reaches beyond the axes)"),
        (3, "observed (3 reach beyond the axes)"),
    ],
)
def test_the_legend_says_what_the_axes_leave_out(beyond: int, label: str) -> None:
    assert legend_handles(make_view(2), beyond=beyond)[0].get_label() == label


def test_labels_say_which_way_is_better() -> None:
    assert axis_label(Metric("acc")) == "acc (higher is better)"
    assert axis_label(Metric("nll", "min", "loss"), lines=2) == "nll\n(lower is better)"


def test_names_are_drawn_letter_by_letter() -> None:
    assert literal("$a$") == r"\$a\$"
    assert title_of(make_view(2, title="$a$"), "Front") == r"Front: \$a\$"


def test_marks_draw_what_they_are_given() -> None:
    axes = Figure().add_subplot()
    for mark in KINDS.values():
        mark.scatter(axes, [0.0, 1.0], [0.0, 1.0])
    assert len(axes.collections) == len(KINDS)


def test_settings_from_a_folder_of_others_are_not_used() -> None:
    with matplotlib.rc_context({"text.usetex": True, "savefig.dpi": 5}):
        with default_style():
            assert not matplotlib.rcParams["text.usetex"]
            assert matplotlib.rcParams["savefig.dpi"] == "figure"
        assert matplotlib.rcParams["text.usetex"]
