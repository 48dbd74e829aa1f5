from __future__ import annotations

import dataclasses

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.report.view import (
    anchor_values,
    representative_rows,
    search_rows,
    verification_rows,
)
from map_bo.space import CoefficientSpace
from tests.report.fake_views import make_view


def test_anchors_are_found_with_what_was_measured_there() -> None:
    view = make_view(4)
    found = anchor_values(view)
    assert [a.name for a in found] == [
        "base", "rot90", "invert", "flip", "permute", "uniform blend",
    ]  # fmt: skip
    assert [a.kind for a in found] == ["base", *["expert"] * 4, "blend"]
    assert [a.row for a in found] == list(range(6))
    for anchor in found:
        assert torch.equal(anchor.y, view.seen.Y[anchor.row])


def test_an_anchor_is_matched_within_a_billionth_and_no_further() -> None:
    view = make_view(2)
    X = view.seen.X.clone()
    X[1] += 0.5e-9
    X[2] += 2e-9
    moved = dataclasses.replace(view, seen=dataclasses.replace(view.seen, X=X))
    assert [a.name for a in anchor_values(moved)] == ["base", "rot90", "uniform blend"]


def test_a_failed_anchor_counts_only_through_a_later_success() -> None:
    view = make_view(2, failures=(0, 1))
    assert [a.name for a in anchor_values(view)] == ["invert", "uniform blend"]
    again = view.seen.append(
        Observations(torch.zeros(1, 2), torch.tensor([[0.25, 0.5]]), view.metrics)
    )
    base = anchor_values(dataclasses.replace(view, seen=again))[0]
    assert (base.name, base.row, base.y.tolist()) == ("base", len(view.seen), [0.25, 0.5])


def test_rows_are_search_anchors_verification_or_failures() -> None:
    view = make_view(2, evaluations=12, verify=3, failures=(7,))
    assert verification_rows(view).nonzero().flatten().tolist() == [12, 13, 14]
    assert search_rows(view).nonzero().flatten().tolist() == [4, 5, 6, 8, 9, 10, 11]
    bare = dataclasses.replace(view, summary={})
    assert not bool(verification_rows(bare).any())


def test_representatives_hold_the_verified_points_and_spread() -> None:
    view = make_view(2, points=100, verify=3)
    rows = representative_rows(view, 7)
    assert len(set(rows)) == 7
    assert set(view.front.verified.nonzero().flatten().tolist()) <= set(rows)
    first = view.front.mean[rows, 0]
    assert torch.equal(first, first.sort(descending=True).values)
    spread = first.max() - first.min()
    assert spread > 0.8 * (view.front.mean[:, 0].max() - view.front.mean[:, 0].min())


@pytest.mark.parametrize(("points", "expected"), [(1, 1), (3, 3), (50, 7)])
def test_there_are_never_more_representatives_than_points(points: int, expected: int) -> None:
    view = make_view(2, points=points, verify=0)
    assert len(set(representative_rows(view, 7))) == expected


def test_a_view_of_different_metrics_is_refused() -> None:
    view = make_view(2)
    other = Observations(view.seen.X, view.seen.X, (Metric("a"), Metric("b")))
    with pytest.raises(DataError, match="the evaluations"):
        dataclasses.replace(view, seen=dataclasses.replace(other))
    with pytest.raises(DataError, match=r"the scale \['rot90'\]"):
        dataclasses.replace(view, scale=view.scale.select([0]))


def test_a_view_of_different_spaces_is_refused() -> None:
    view = make_view(2)
    with pytest.raises(DataError, match="space has 3 coefficients, the front 2"):
        dataclasses.replace(view, space=CoefficientSpace.box(["a", "b", "c"]))
