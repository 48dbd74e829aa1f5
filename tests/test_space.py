from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from map_bo.errors import SpaceError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace, LinearConstraint

SETTINGS = CoefficientSpace(
    ("a/x", "a/y", "b/x", "b/y", "density", "scale"),
    (0.0,) * 4 + (0.05, 0.5),
    (1.0,) * 4 + (0.9, 2.0),
    (LinearConstraint((1.0, 0.0, 1.0, 0.0, 0.0, 0.0), 1.5),),
    owner=(0, 0, 1, 1, -1, -1),
    experts=("a", "b"),
    defaults=(0.2, 1),
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": (), "lower": (), "upper": ()}, "at least one"),
        ({"names": tuple("cabcc"), "lower": (0,) * 5, "upper": (1,) * 5}, r"appear twice: c\n"),
        ({"names": tuple("bbaa"), "lower": (0,) * 4, "upper": (1,) * 4}, r"appear twice: a, b\n"),
        ({"names": ("a",), "lower": (0, 0), "upper": (1,)}, "2 lower"),
        ({"names": ("a",), "lower": (1,), "upper": (0,)}, "at most its upper bound, got"),
        (
            {"names": ("a",), "lower": (0,), "upper": (float("inf"),)},
            "at most its upper bound, got",
        ),
        ({"names": ("a",), "lower": (0,), "upper": (1,), "owner": (1,)}, "owner"),
        (
            {
                "names": ("a",),
                "lower": (0,),
                "upper": (1,),
                "constraints": (LinearConstraint((0.0,), 1.0),),
            },
            "not all of them 0",
        ),
        (
            {
                "names": ("a",),
                "lower": (0,),
                "upper": (1,),
                "constraints": (LinearConstraint((1.0,), -1.0),),
            },
            "no point of the box",
        ),
        (
            {
                "names": ("a", "b"),
                "lower": (0, 0),
                "upper": (1, 1),
                "constraints": (LinearConstraint((1.0, 1.0), 2.5, equality=True),),
            },
            "no point of the box",
        ),
    ],
)
def test_an_ill_formed_space_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        CoefficientSpace(**arguments)


def test_a_space_holds_tuples_of_floats_whatever_it_was_made_from() -> None:
    numbers = {"lower": [0, -1], "upper": [1, 2], "importance": [2, 1]}
    space = CoefficientSpace(
        ["a", "s"],  # type: ignore[arg-type]
        **numbers,  # type: ignore[arg-type]
        owner=(0, -1),
        experts=("a",),
        defaults=[1],  # type: ignore[arg-type]
    )
    assert (space.names, space.lower, space.upper) == (("a", "s"), (0.0, -1.0), (1.0, 2.0))
    assert (space.importance, space.defaults) == ((2.0, 1.0), (1.0,))
    values = space.lower + space.upper + space.importance + space.defaults
    assert {type(value) for value in values} == {float}
    assert hash(space) == hash(replace(space))


def spaces() -> list[CoefficientSpace]:
    crossed = CoefficientSpace(
        ("a", "b", "c"),
        (-1.0, 0.0, 0.0),
        (1.0, 2.0, 1.0),
        (LinearConstraint((1.0, 1.0, 1.0), 1.5), LinearConstraint((1.0, -2.0, 0.5), 0.2)),
    )
    return [
        CoefficientSpace.box(["a", "b", "c"]),
        CoefficientSpace.box(["a", "b", "c"], lower=-3.0, upper=3.0),
        CoefficientSpace.box(["a", "b", "c"], sum_at_most=1.5),
        CoefficientSpace.box(["a", "b", "c"], sum_at_most=2.9),  # cuts a corner off
        CoefficientSpace.box(["a", "b", "c"], simplex=True),
        CoefficientSpace.box(["a", "b", "c"], blocks=["x", "y"], simplex=True),
        crossed,
        SETTINGS,  # some coefficients are in no constraint
    ]


@pytest.mark.parametrize("space", spaces())
@given(seed=st.integers(0, 10**6))
def test_projection_lands_inside_and_leaves_the_inside_alone(
    space: CoefficientSpace, seed: int
) -> None:
    X = torch.randn(6, space.d, generator=make_generator(seed), dtype=torch.float64) * 3
    projected = space.project(X)
    assert bool(space.contains(projected).all())
    assert torch.allclose(space.project(projected), projected, atol=1e-7)


@pytest.mark.parametrize("space", spaces())
def test_projection_is_the_nearest_point(space: CoefficientSpace) -> None:
    X = torch.randn(4, space.d, generator=make_generator(1), dtype=torch.float64) * 2
    projected = space.project(X)
    for x, p in zip(X, projected, strict=True):
        solved = minimize(
            lambda z, x=x: float(((z - x.numpy()) ** 2).sum()),
            projected[0].numpy(),
            bounds=list(zip(space.lower, space.upper, strict=True)),
            constraints=[_scipy(c) for c in space.constraints],
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert float((p - x).square().sum()) <= solved.fun + 1e-5


def test_projection_onto_a_cut_corner() -> None:
    space = CoefficientSpace.box(["a", "b", "c"], sum_at_most=2.9)
    X = torch.tensor([[2.0, 1.2, 1.0]], dtype=torch.float64)
    assert space.project(X)[0].tolist() == pytest.approx([1.0, 1.0, 0.9])


def test_the_boundary_belongs_to_the_space_and_the_tolerance_is_a_distance() -> None:
    space = CoefficientSpace.box(["a", "b"], sum_at_most=1.5)
    X = torch.tensor([[0, 0], [1, 0.5], [0.5, 1]], dtype=torch.float64)
    assert bool(space.contains(X, tolerance=0.0).all())
    # However its weights are scaled, a constraint allows about as large a distance.
    for weight in (1.0, 1000.0):
        plane = LinearConstraint((weight, 0.0), 0.5 * weight)
        half = CoefficientSpace(("a", "b"), (0, 0), (1, 1), (plane,))
        near, far = torch.tensor([[[0.5 + 0.9e-3, 0.0]], [[0.5 + 1.1e-3, 0.0]]])
        assert bool(half.contains(near.double(), tolerance=1e-3))
        assert not bool(half.contains(far.double(), tolerance=1e-3))


@pytest.mark.parametrize("space", spaces())
def test_points_keep_their_type_and_none_are_none(space: CoefficientSpace) -> None:
    X = 2 * torch.randn(6, space.d, generator=make_generator(2))
    for moved in (space.project, space.normalise, space.unnormalise):
        assert moved(X).dtype == torch.float32
    assert space.project(X.double()[:0]).shape == (0, space.d)


def _scipy(constraint: LinearConstraint) -> dict[str, Any]:
    weights = torch.tensor(constraint.weights, dtype=torch.float64).numpy()
    return {
        "type": "eq" if constraint.equality else "ineq",
        "fun": lambda z: constraint.bound - weights @ z,
    }


@pytest.mark.parametrize("space", spaces())
def test_samples_and_anchors_lie_inside(space: CoefficientSpace) -> None:
    X = space.sample(20, generator=make_generator(0))
    assert (X.shape, X.dtype) == ((20, space.d), torch.float64)
    assert bool(space.contains(X).all())
    assert torch.equal(space.sample(20, generator=make_generator(0)), X)
    assert not torch.equal(space.sample(20, generator=make_generator(1)), X)
    assert bool(space.contains(space.anchors().X).all())


@pytest.mark.parametrize("space", spaces())
def test_the_description_rebuilds_the_space(space: CoefficientSpace) -> None:
    assert CoefficientSpace.from_description(space.describe()) == space


def test_anchors_are_base_experts_and_blend() -> None:
    anchors = CoefficientSpace.box(["a", "b"]).anchors()
    assert anchors.names == ("base", "a", "b", "uniform blend")
    assert anchors.kinds == ("base", "expert", "expert", "blend")
    assert anchors.X.tolist() == [[0, 0], [1, 0], [0, 1], [0.5, 0.5]]
    assert CoefficientSpace.box(["a", "b", "c"]).anchors().X[-1].tolist() == [1 / 3] * 3
    simplex = CoefficientSpace.box(["a", "b"], simplex=True).anchors()
    assert simplex.names == ("a", "b", "uniform blend")
    assert CoefficientSpace.box(["a"]).anchors().names == ("base", "a")


def test_block_anchors_set_every_block_of_an_expert() -> None:
    space = CoefficientSpace.box(["a", "b"], blocks=["x", "y"])
    assert space.names == ("a/x", "a/y", "b/x", "b/y")
    anchors = space.anchors()
    assert anchors.X[anchors.names.index("b")].tolist() == [0, 0, 1, 1]


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_normalise_and_back(values: list[float]) -> None:
    space = CoefficientSpace(("a", "b", "c"), (-1.0, 0.0, 2.0), (1.0, 5.0, 3.0))
    U: Tensor = torch.tensor([values], dtype=torch.float64)
    assert torch.allclose(space.normalise(space.unnormalise(U)), U, atol=1e-12)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(2), "shape"),
        (torch.zeros(2, 3), "the space has 2 of them"),
        (torch.full((1, 2), torch.nan), "NaN"),
        (
            torch.tensor([[0.5, 0.5], [2.0, 0.0]]),
            r"1 of 2 rows leave the space; the first is \[2.0, 0.0\]",
        ),
    ],
)
def test_points_that_do_not_fit_are_refused(X: Tensor, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        CoefficientSpace.box(["a", "b"]).check(X)


def test_checked_points_come_back_as_float64() -> None:
    space = CoefficientSpace.box(["a", "b"])
    assert space.check(torch.zeros(1, 2, dtype=torch.float32)).dtype == torch.float64


def weighed(importance: tuple[float, ...]) -> CoefficientSpace:
    return CoefficientSpace(
        ("a/x", "a/y", "b/x", "b/y"),
        (0.0, 0.0, -1.0, 0.0),
        (1.0, 1.0, 3.0, 1.0),
        owner=(0, 0, 1, 1),
        experts=("a", "b"),
        importance=importance,
    )


def test_importances_are_recorded_only_where_there_are_any() -> None:
    plain, told = weighed(()), weighed((1.0, 0.5, 2.0, 0.1))
    assert "importance" not in plain.describe()
    assert CoefficientSpace.from_description(plain.describe()) == plain
    described = json.loads(json.dumps(told.describe()))
    assert described.pop("importance") == [1.0, 0.5, 2.0, 0.1]
    assert CoefficientSpace.from_description(told.describe()) == told
    assert CoefficientSpace.from_description(described) == plain


@pytest.mark.parametrize(
    "importance", [(1.0,), (1.0, 0.0, 1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (1.0, 1.0, 1.0, torch.inf)]
)
def test_importances_are_positive_and_one_a_coefficient(importance: tuple[float, ...]) -> None:
    with pytest.raises(SpaceError, match="importance") as caught:
        weighed(importance)
    assert caught.value.hint is not None


def test_a_stretched_space_is_the_space_without_importances_or_power() -> None:
    assert weighed(()).stretched(1.0) == weighed(())
    told = weighed((1.0, 0.5, 2.0, 0.1))
    assert told.stretched(0.0) is told


@given(
    st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    st.floats(0.1, 2.0),
    st.floats(0.01, 100),
)
def test_stretching_moves_each_coefficient_by_its_relative_importance(
    sizes: list[float], power: float, unit: float
) -> None:
    space = weighed(tuple(sizes))
    box = space.stretched(power)
    middle = space.bounds.mean(0)
    torch.testing.assert_close(box.bounds.mean(0), middle)
    X = space.bounds[1:]  # the upper corner: 1 in every centred coefficient of the space
    Z = 2 * box.normalise(X) - 1
    wanted = torch.tensor(sizes, dtype=torch.float64) ** power
    torch.testing.assert_close(Z[0] / Z[0, 0], wanted / wanted[0])
    assert float(Z.square().mean().sqrt()) == pytest.approx(1.0)
    other = weighed(tuple(unit * size for size in sizes)).stretched(power)
    torch.testing.assert_close(other.bounds, box.bounds, rtol=1e-9, atol=1e-9)


def test_settings_belong_to_no_expert() -> None:
    assert SETTINGS.settings == ("density", "scale")
    assert SETTINGS.groups == (0, 0, 1, 1, 2, 3)
    assert (SETTINGS.d, SETTINGS.blocks) == (6, 2)
    assert SETTINGS.defaults == (0.2, 1.0)
    with pytest.warns(DeprecationWarning, match="is now CoefficientSpace.defaults"):
        assert SETTINGS.resting == (0.2, 1.0)
    plain = CoefficientSpace.box(("a", "b"))
    assert (plain.settings, plain.groups, plain.blocks) == ((), (0, 1), 1)
    # Wherever they stand among the others.
    mixed = CoefficientSpace(
        ("s", "a", "t", "b"),
        (0,) * 4,
        (1,) * 4,
        owner=(-1, 0, -1, 1),
        experts=("a", "b"),
        defaults=(0, 1),
    )
    assert mixed.groups == (2, 0, 3, 1)
    assert mixed.anchors().X.tolist() == [
        [0, 0, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
        [0, 0.5, 1, 0.5],
    ]


def test_anchors_hold_the_settings_at_rest() -> None:
    anchors = SETTINGS.anchors()
    assert anchors.names == ("base", "a", "b", "uniform blend")
    assert anchors.X[:, 4:].tolist() == [[0.2, 1.0]] * 4
    assert anchors.X[3, :4].tolist() == [0.5] * 4
    SETTINGS.check(anchors.X)


def test_settings_survive_the_description_and_stay_out_of_others() -> None:
    described = json.loads(json.dumps(SETTINGS.describe()))
    assert CoefficientSpace.from_description(described) == SETTINGS
    assert "resting" not in CoefficientSpace.box(("a",)).describe()
    X = SETTINGS.sample(50, generator=make_generator(0))
    SETTINGS.check(X)
    assert torch.allclose(SETTINGS.unnormalise(SETTINGS.normalise(X)), X)


@pytest.mark.parametrize(
    ("owner", "defaults", "message"),
    [
        ((0, -1), (), "1 coefficients belong to no expert, and 0 have a default"),
        ((0, -1), (0.1, 0.2), "and 2 have"),
        ((0, 0), (0.1,), "0 coefficients belong to no expert, and 1"),
        ((0, -1), (2.0,), "default 2.0 of s is not in"),
        ((0, -1), (float("nan"),), "default nan of s is not in"),
        ((-1, -1), (0.1, 0.2), "owner"),
        ((0, -2), (), "owner"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    owner: tuple[int, ...], defaults: tuple[float, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message):
        CoefficientSpace(("a", "s"), (0, 0), (1, 1), owner=owner, experts=("a",), defaults=defaults)


def test_a_bound_on_the_sum_leaves_settings_out() -> None:
    free = replace(SETTINGS, constraints=())
    bounded = free.with_sum(1.5)
    assert [c.weights for c in bounded.constraints] == [
        (1.0, 0.0, 1.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 1.0, 0.0, 0.0),
    ]
    assert bounded.with_sum(1.0, equality=True).constraints[-1].equality
    box = CoefficientSpace.box(("a", "b"), blocks=("x", "y"))
    assert box.with_sum(0.7) == CoefficientSpace.box(("a", "b"), blocks=("x", "y"), sum_at_most=0.7)
    with pytest.raises(SpaceError, match="no point of the box"):
        free.with_sum(-1.0)


class TestFixedCoefficients:
    space = CoefficientSpace.box(tuple("abc"), blocks=("x", "y")).with_fixed({"b": 0.3, "c/y": 1.5})

    def test_a_name_of_an_expert_fixes_all_its_coefficients(self) -> None:
        assert self.space.fixed == {"b/x": 0.3, "b/y": 0.3, "c/y": 1.5}
        assert CoefficientSpace.box(tuple("ab")).fixed == {}
        assert CoefficientSpace.box(tuple("ab"), fixed={"a": 1}).fixed == {"a": 1.0}

    def test_every_point_of_the_space_has_them(self) -> None:
        for X in (self.space.sample(20, generator=make_generator(0)), self.space.anchors().X):
            assert bool((X[:, 2:4] == 0.3).all())
            assert bool((X[:, 5] == 1.5).all())
            assert bool(self.space.contains(X).all())
        U = self.space.normalise(X)
        assert bool(torch.isfinite(U).all())
        torch.testing.assert_close(self.space.unnormalise(U), X)
        assert not bool(self.space.contains(X + torch.tensor([0, 0, 0.1, 0, 0, 0])).any())

    def test_anchors_are_made_of_what_is_free(self) -> None:
        anchors = self.space.anchors()
        assert anchors.names == ("base", "a", "c", "uniform blend")  # of b, nothing is free
        assert anchors.X[1].tolist() == [1, 1, 0.3, 0.3, 0, 1.5]
        assert anchors.X[3].tolist() == [0.5, 0.5, 0.3, 0.3, 0.5, 1.5]
        one = CoefficientSpace.box(tuple("ab"), fixed={"b": 1}).anchors()
        assert one.names == ("base", "a")  # the blend of one expert is that expert

    def test_a_setting_is_fixed_with_its_default(self) -> None:
        space = CoefficientSpace(
            ("a", "density"), (0, 0.1), (1, 0.9), owner=(0, -1), experts=("a",), defaults=(0.2,)
        ).with_fixed({"density": 0.5})
        assert space.defaults == (0.5,)
        assert bool((space.anchors().X[:, 1] == 0.5).all())

    def test_constraints_on_what_is_free_have_the_same_points(self) -> None:
        space = CoefficientSpace.box(tuple("abc"), fixed={"b": 0.4}, sum_at_most=1.0)
        [found] = space.constraints_on_free
        assert found == LinearConstraint((1.0, 0.0, 1.0), 0.6)
        X = torch.rand(50, 3, generator=make_generator(0), dtype=torch.float64)
        X[:, 1] = 0.4
        torch.testing.assert_close(space.constraints[0].slack(X), found.slack(X))
        free = CoefficientSpace.box(tuple("abc"), sum_at_most=1.0)
        assert free.constraints_on_free == free.constraints

    @pytest.mark.parametrize(
        ("values", "message", "hint"),
        [
            ({"d": 1.0}, "no coefficient 'd' to fix", "choose from"),
            ({"b/z": 1.0}, "no coefficient 'b/z' to fix", "did you mean 'b/"),
            ({"a": "one"}, "fixed value of a must be a finite number, got 'one'", "number"),
            ({"a": float("nan")}, "fixed value of a must be a finite number, got nan", "number"),
            (5, "fixed must map names of coefficients to values, got 5", "by name"),
        ],
    )
    def test_what_cannot_be_fixed_is_refused(self, values: Any, message: str, hint: str) -> None:
        with pytest.raises(SpaceError, match=message) as caught:
            self.space.with_fixed(values)
        assert hint in str(caught.value.hint)

    @pytest.mark.parametrize(
        ("space", "single"),
        [
            (CoefficientSpace.box(tuple("ab"), fixed={"a": 1, "b": 0}), True),
            (CoefficientSpace.box(tuple("ab"), sum_at_most=0.0), True),
            (CoefficientSpace.box(("a",), simplex=True), True),
            (CoefficientSpace.box(tuple("ab"), fixed={"a": 1}, sum_at_most=1.0), True),
            (CoefficientSpace.box(tuple("ab"), fixed={"a": 1}), False),
            (CoefficientSpace.box(tuple("ab"), simplex=True), False),
            (CoefficientSpace(("a",), (1e6,), (1e6 + 1e-3,)), False),
        ],
    )
    def test_a_space_of_one_point_is_known(self, space: CoefficientSpace, single: bool) -> None:
        assert space.is_single_point == single
