from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from map_bo.pareto.indicators import hypervolume
from map_bo.report.run.plots import observed_hypervolume, progress_figure
from tests.report.fake_views import make_view


@pytest.mark.parametrize("m", [1, 2, 3])
def test_hypervolume_never_falls_and_ends_at_that_of_all_points(m: int) -> None:
    view = make_view(m, d=3, failures=(3, 6), evaluations=14)
    places, volumes = observed_hypervolume(view)
    assert places == list(range(1, len(view.seen) + 1))
    assert all(a <= b + 1e-12 for a, b in pairwise(volumes))
    assert volumes[3] == volumes[2]  # a failure adds nothing
    whole = hypervolume(view.scale.gains(view.seen.succeeded().Y), torch.zeros(m).double())
    assert volumes[-1] == pytest.approx(whole)


def test_many_metrics_are_computed_at_fewer_places() -> None:
    view = make_view(6, evaluations=40, points=10)
    places, volumes = observed_hypervolume(view)
    assert len(places) == len(volumes) == 25
    assert (places[0], places[-1]) == (1, len(view.seen))


def test_failures_and_comparisons_are_in_the_legend() -> None:
    figure = progress_figure(make_view(2, failures=(7,)))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "observed points (real)",
        "predicted front",
        "verified points (real)",
        "best expert (real)",
        "uniform blend (real)",
        "verification",
        "failed evaluation",
    ]


def test_what_was_not_measured_has_no_line() -> None:
    figure = progress_figure(make_view(2, verify=0))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "verified points (real)" not in labels
    assert "verification" not in labels
    assert "failed evaluation" not in labels
