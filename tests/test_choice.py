from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.choice import ChoiceAxis, handles_choice
from map_bo.errors import SpaceError
from map_bo.rng import make_generator
from map_bo.scale import same_points
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.choices import CHOICE

BOUNDED = CHOICE.with_sum(1.2)


def cube(space: CoefficientSpace) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.floats(0, 1), min_size=space.d, max_size=space.d)
    return st.lists(row, min_size=1, max_size=5).map(lambda rows: torch.tensor(rows).double())


def around(space: CoefficientSpace) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.floats(-3, 5), min_size=space.d, max_size=space.d)
    return st.lists(row, min_size=1, max_size=5).map(lambda rows: torch.tensor(rows).double())


@given(cube(CHOICE))
def test_every_point_of_the_cube_is_a_row_and_comes_back_to_it(U: Tensor) -> None:
    X = CHOICE.unnormalise(U)
    CHOICE.check(X)
    assert torch.allclose(CHOICE.unnormalise(CHOICE.normalise(X)), X, atol=1e-12)


@pytest.mark.parametrize("space", [CHOICE, BOUNDED], ids=["box", "sum"])
@given(data=st.data())
def test_projecting_gives_rows_and_leaves_rows_alone(
    space: CoefficientSpace, data: st.DataObject
) -> None:
    X = space.project(data.draw(around(space)))
    space.check(X)
    assert torch.allclose(space.project(X), X, atol=1e-9)


@given(around(CHOICE), around(CHOICE))
def test_rows_are_the_same_point_exactly_when_they_are_the_same_merge(A: Tensor, B: Tensor) -> None:
    A, B = CHOICE.project(A), CHOICE.project(B)
    density = torch.where(A[:, None, 2] == 1, (A[:, None, 3] - B[:, 3]).abs() / 0.8, 0.0)
    gaps = torch.maximum((A[:, None, :2] - B[:, :2]).abs().amax(-1), density)
    same = (A[:, None, 2] == B[:, 2]) & (gaps <= 0.01)
    clear = (gaps - 0.01).abs() > 1e-9
    assert torch.equal(same_points(A, B, CHOICE, tolerance=0.01)[clear], same[clear])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([0.5, 0.5, 0.5, 0.2], "between two options"),
        ([0.5, 0.5, 3.0, 0.2], "an option too many"),
        ([0.5, 0.5, 0.0, 0.3], "a setting of TIES under another operator"),
    ],
)
def test_what_is_no_merge_is_no_row(row: list[float], why: str) -> None:
    with pytest.raises(SpaceError, match="1 of 1 rows leave the space"):
        CHOICE.check(torch.tensor([row]))


def test_random_rows_have_every_option_alike() -> None:
    X = CHOICE.sample(3000, generator=make_generator(0))
    placed = CHOICE.placed_choice
    assert placed is not None
    assert all(900 < count < 1100 for count in placed.counts(X).values())
    assert list(placed.counts(X)) == ["sum", "ties", "slerp"]


def test_base_and_experts_have_the_default_option_and_every_option_has_its_blend() -> None:
    anchors = CHOICE.anchors()
    blends = ("uniform blend", "uniform blend, ties", "uniform blend, slerp")
    assert anchors.names == ("base", "a", "b", *blends)
    assert anchors.kinds == ("base", "expert", "expert", "blend", "blend", "blend")
    assert anchors.X[:, 2].tolist() == [0, 0, 0, 0, 1, 2]
    assert (anchors.X[:, 3] == 0.2).all()
    CHOICE.check(anchors.X)


def test_the_space_survives_its_description_and_others_are_described_as_before() -> None:
    told = json.loads(json.dumps(CHOICE.describe()))
    assert CoefficientSpace.from_description(told) == CHOICE
    assert hash(CoefficientSpace.from_description(told)) == hash(CHOICE)
    assert "choice" not in CoefficientSpace.box(("a", "b")).describe()


def test_an_option_is_fixed_by_its_name() -> None:
    fixed = CHOICE.with_fixed({"operator": "ties"})
    assert fixed.fixed == {"operator": 1.0}
    assert set(fixed.sample(50, generator=make_generator(0))[:, 2].tolist()) == {1.0}
    assert fixed.anchors().names == ("base", "a", "b", "uniform blend")
    assert CHOICE.with_fixed({"operator": "sum"}).fixed == {"operator": 0.0, "ties.density": 0.2}
    with pytest.raises(SpaceError, match=r"operator has no option 'dare'\nhint: options are sum,"):
        CHOICE.with_fixed({"operator": "dare"})
    with pytest.raises(SpaceError, match=r"has no option 0\.5"):
        CHOICE.with_fixed({"operator": 0.5})


def test_the_spaces_of_the_options_are_the_whole_space_without_overlap() -> None:
    X = CHOICE.sample(60, generator=make_generator(1))
    inside = torch.stack([part.contains(X) for part in CHOICE.by_option])
    assert (inside.sum(0) == 1).all()
    assert torch.equal(inside.int().argmax(0).double(), X[:, 2])
    assert CHOICE.by_option[1].by_option == (CHOICE.by_option[1],)


def test_a_choice_alone_can_be_searched() -> None:
    CHOICE.with_fixed({"a": 0.5, "b": 0.5, "ties.density": 0.2}).refuse_single_point()
    with pytest.raises(SpaceError, match="holds a single point"):
        CHOICE.with_fixed({"a": 0.5, "b": 0.5, "operator": "sum"}).refuse_single_point()


def test_a_row_is_named_with_its_option_and_without_what_is_inactive() -> None:
    assert CHOICE.named([0.1, 0.2, 2.0, 0.2]) == {"a": 0.1, "b": 0.2, "operator": "slerp"}
    assert CHOICE.named([0.1, 0.2, 1.0, 0.7])["ties.density"] == 0.7


def test_importance_stretches_coefficients_and_no_option() -> None:
    sized = replace(CHOICE, importance=(4.0, 1.0, 1.0, 1.0))
    X = CHOICE.sample(20, generator=make_generator(2))
    U, V = CHOICE.normalise(X), sized.stretched(1.0).normalise(X)
    assert torch.equal(U[:, 2:], V[:, 2:])
    assert float((U[:, 0] - V[:, 0]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice": ChoiceAxis("operator", ("x", "y"))}, "go from 0 to 1"),
        ({"choice": ChoiceAxis("operator", ("x", "y", "z"), {"lambda": "x"})}, "lacks lambda"),
        ({"choice": ChoiceAxis("a", ("x", "y"))}, "lacks a"),
        ({"defaults": (0.5, 0.2)}, r"go from 0 to 2 .* got bounds \[0.0, 2.0\] and 0.5"),
        ({"constraints": (LinearConstraint((1.0, 1.0, 1.0, 0.0), 2.0),)}, "has a weight for"),
        ({"constraints": (LinearConstraint((1.0, 0.0, 0.0, 1.0), 2.0),)}, "has a weight for"),
    ],
)
def test_a_space_without_a_place_for_the_choice_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        replace(CHOICE, **changes)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (("one",), {}, "two or more options"),
        (("one", "one"), {}, "different names"),
        (("one", "two"), {"three.x": "three"}, "belongs to 'three', which is not an option"),
    ],
)
def test_an_impossible_axis_is_refused(
    options: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        ChoiceAxis("operator", options, settings)


def test_only_what_says_so_handles_a_choice() -> None:
    class Silent:
        pass

    class Refusing:
        takes_choice = False

    class Willing:
        takes_choice = True

    assert [handles_choice(one()) for one in (Silent, Refusing, Willing)] == [False, False, True]
