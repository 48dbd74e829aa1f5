from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Front, Metric, Observations
from map_bo.loop.result import Result
from map_bo.nested.promotion import choose_merge, representatives, weights_of
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace

METRICS = (Metric("first"), Metric("second", direction="min", kind="loss"))
SCALE = Scale(METRICS, torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), "given by the user")


def result(
    X: list[list[float]], mean: list[list[float]], space: CoefficientSpace | None = None
) -> Result:
    """A front as given, on the scale 0..1 of ``first`` and 2..1 of ``second``."""
    space = space or CoefficientSpace.box(("a", "b"))
    points, values = (torch.tensor(rows, dtype=torch.float64) for rows in (X, mean))
    wide = torch.full_like(values, 0.1)
    front = Front(points, values, wide, values - wide, values + wide, METRICS)
    empty = Observations.empty(space.d, METRICS)
    return Result(front, empty, empty, SCALE, {}, space)


# Scaled gains: (0.9, 0.1), (0.5, 0.6), (0.1, 0.9), (0.52, 0.58).
FRONT = result(
    [[0.9, 0.0], [0.5, 0.5], [0.0, 0.9], [0.51, 0.49]],
    [[0.9, 1.9], [0.5, 1.4], [0.1, 1.1], [0.52, 1.42]],
)


def test_weights_of_metrics_are_those_of_the_preference() -> None:
    preference = {"a": 3.0, "b": 0.0, "c": 1.0}
    assert weights_of(preference, ["a", "b"]) == {"a": 3.0, "b": 0.0}
    assert weights_of({}, ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert weights_of(preference, ["b"]) == {"b": 1.0}  # none of it is below: all alike
    assert weights_of({"a": 1.0}, ["a", "d"]) == {"a": 1.0, "d": 0.0}


def test_weights_of_children_add_up() -> None:
    children = {"a+b": ("a", "b"), "c": ("c",), "d": ("d",)}
    assert weights_of({"a": 3.0, "b": 2.0, "c": 1.0}, children) == {"a+b": 5.0, "c": 1.0, "d": 0.0}
    assert weights_of({}, children) == {"a+b": 2.0, "c": 1.0, "d": 1.0}
    assert weights_of({"z": 1.0}, children) == {"a+b": 1.0, "c": 1.0, "d": 1.0}


@pytest.mark.parametrize(
    ("weights", "x"),
    [
        ({"first": 1.0, "second": 0.0}, [0.9, 0.0]),
        ({"first": 0.0, "second": 1.0}, [0.0, 0.9]),
        ({"first": 1.0, "second": 1.0}, [0.5, 0.5]),
    ],
)
def test_the_merge_that_suits_the_weights_is_chosen(
    weights: dict[str, float], x: list[float]
) -> None:
    assert choose_merge(FRONT, weights).x.tolist() == x


def test_a_merge_that_is_the_base_is_passed_over_for_the_next_best() -> None:
    # The base is best for both metrics, then the last point for the second.
    front = result([[0.0, 1e-4], [0.4, 0.1], [0.0, 0.3]], [[0.9, 1.0], [0.8, 1.9], [0.2, 1.1]])
    assert choose_merge(front, {"first": 1.0, "second": 0.0}).x.tolist() == [0.4, 0.1]
    assert choose_merge(front, {"first": 0.0, "second": 1.0}).x.tolist() == [0.0, 0.3]
    nothing = result([[0.0, 0.0], [1e-5, 0.0]], [[0.5, 1.5], [0.4, 1.4]])
    assert choose_merge(nothing, {"first": 1.0, "second": 0.0}).point == 0


def rows(found: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in found.tolist()]


def test_the_most_balanced_point_comes_first_then_the_farthest() -> None:
    # (0.52, 0.58) is most balanced_tree; (0.5, 0.6) is too near it in coefficients to count.
    assert rows(representatives(FRONT, 1, SCALE)) == [[0.51, 0.49]]
    found = rows(representatives(FRONT, 3, SCALE))
    assert found[0] == [0.51, 0.49]
    assert sorted(found[1:]) == [[0.0, 0.9], [0.9, 0.0]]
    assert len(representatives(FRONT, 9, SCALE)) == 3


def test_what_is_balanced_depends_on_the_scale() -> None:
    narrow = Scale(METRICS, SCALE.point, torch.tensor([0.55, 1.0]), "other")
    assert rows(representatives(FRONT, 1, narrow)) == [[0.5, 0.5]]


def test_at_least_one_merge_is_promoted_and_it_is_not_the_base() -> None:
    front = result([[0.0, 0.0], [1e-4, 0.0], [0.3, 0.2]], [[0.9, 1.1], [0.8, 1.0], [0.1, 1.9]])
    assert rows(representatives(front, 1, SCALE)) == [[0.3, 0.2]]
    nothing = result([[0.0, 0.0], [1e-4, 0.0]], [[0.9, 1.1], [0.8, 1.0]])
    assert rows(representatives(nothing, 2, SCALE)) == [[0.5, 0.5]]


@pytest.mark.parametrize(
    "space",
    [
        CoefficientSpace.box(("a", "b"), upper=0.2),
        CoefficientSpace.box(("a", "b"), lower=-1.0, upper=0.0),
        CoefficientSpace.box(("a", "b"), sum_at_most=0.3),
        CoefficientSpace.box(("a", "b"), simplex=True),
        CoefficientSpace.box(("a",), upper=0.2),
    ],
)
def test_what_stands_in_for_a_front_of_nothing_is_in_the_space(space: CoefficientSpace) -> None:
    nothing = result([[0.0] * space.d], [[0.9, 1.1]], space)
    found = representatives(nothing, 2, SCALE)
    assert found.shape == (1, space.d)
    assert bool(space.contains(found).all())
    assert float(found.abs().max()) > 1e-3
