from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
import torch

from map_bo.data import Metric
from map_bo.report.run.plots import describe_plot, write_plots
from map_bo.report.view import RunView
from tests.report.fake_views import make_view

VIEWS: dict[str, Callable[[], RunView]] = {
    "one metric": lambda: make_view(1, d=3, points=1, verify=1),
    "two": lambda: make_view(2, failures=(7,)),
    "two, a loss, unverified": lambda: make_view(2, loss=(1,), verify=0),
    "three": lambda: make_view(3, points=20),
    "eight": lambda: make_view(8, evaluations=30, points=30, loss=(2,)),
    "one point": lambda: make_view(2, points=1, verify=1),
    "no anchors": lambda: make_view(2, failures=(0, 1, 2, 3)),
    "one expert, one metric": lambda: make_view(1, d=1, points=1, verify=0),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_kind_of_run_can_be_drawn(name: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    written = write_plots(VIEWS[name](), tmp_path / "plots")
    assert [path.name for path in written] == ["front.png", "progress.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "front.png",
        "progress.png",
    ]
    for path in written:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.02  # something was drawn
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("names", [("$x_{", '<b>&"x'), ("a" * 200, "\u4e2d\u6587 two\nlines")])
def test_any_name_can_be_drawn(names: tuple[str, str], tmp_path: Path) -> None:
    metrics = (Metric(names[0]), Metric(names[1], "min", "loss"))
    write_plots(make_view(2, metrics=metrics, points=5, title=names[0]), tmp_path)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_plots_are_described_in_words(m: int) -> None:
    view = make_view(m, loss=(0,), evaluations=12, points=12, verify=2)
    text = describe_plot(view, "front")
    assert "rot90 loss (lower is better)" in text
    assert f"{len(view.front)} predicted points" in text
    assert "base, rot90" in text
    assert f"{len(view.seen)} evaluations" in describe_plot(view, "progress")
    assert describe_plot(view, "other") == "other"


def test_drawing_leaves_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_plots(make_view(2, points=5), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
