from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.data import Metric, Observations
from map_bo.ordering import Ordering
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace, LinearConstraint

METRICS = (Metric("b"), Metric("a", "min", "loss"))


def problem(d: int = 3) -> tuple[CoefficientSpace, Observations]:
    names = ("z", "x", "y", "density")[: d + 1]
    space = CoefficientSpace(
        names,
        (0.0, -1.0, 0.5, 0.1)[: d + 1],
        (1.0, 2.0, 0.75, 0.9)[: d + 1],
        constraints=(LinearConstraint((1.0, 2.0, 3.0, 0.0)[: d + 1], 4.0),),
        owner=(*range(d), -1),
        experts=names[:d],
        importance=(1.0, 2.0, 3.0, 4.0)[: d + 1],
        defaults=(0.5,),
    )
    generator = make_generator(0)
    X = space.sample(4, generator=generator)
    shape = (4, 2, d + 1)
    seen = Observations(
        X,
        torch.rand(4, 2, generator=generator).double(),
        METRICS,
        Yvar=torch.rand(4, 2, generator=generator).double(),
        counts=torch.tensor([[10.0, torch.nan]] * 4),
        gradients=torch.rand(shape, generator=generator).double(),
        gradient_variance=torch.rand(shape, generator=generator).double(),
        failures=(None, "boom", None, None),
    )
    return space, seen


def test_names_decide_and_settings_come_last() -> None:
    space, seen = problem()
    order = Ordering.of(space, METRICS)
    moved = order.space(space)
    assert (order.columns, order.metrics) == ((1, 2, 0, 3), (1, 0))
    assert moved.names == ("x", "y", "z", "density")
    assert moved.experts == ("x", "y", "z")
    assert (moved.owner, moved.settings, moved.defaults) == ((0, 1, 2, -1), ("density",), (0.5,))
    assert (moved.lower, moved.upper) == ((-1.0, 0.5, 0.0, 0.1), (2.0, 0.75, 1.0, 0.9))
    assert moved.importance == (2.0, 3.0, 1.0, 4.0)
    assert moved.constraints[0].weights == (2.0, 3.0, 1.0, 0.0)
    assert not order.is_given
    assert Ordering.of(moved, [METRICS[1], METRICS[0]]).is_given
    assert bool(moved.contains(order.points(seen.X)).all())


def test_evaluations_move_as_a_whole() -> None:
    space, seen = problem()
    order = Ordering.of(space, METRICS)
    moved = order.observations(seen)
    assert [metric.name for metric in moved.metrics] == ["a", "b"]
    assert torch.equal(order.back(moved.X), seen.X)
    assert torch.equal(moved.Y[:, [1, 0]], seen.Y)
    assert torch.equal(moved.Yvar[:, 1], seen.Yvar[:, 0])
    assert torch.equal(moved.counts.isnan()[:, 0], torch.ones(4, dtype=torch.bool))
    assert moved.failures == seen.failures
    assert moved.gradients is not None
    assert seen.gradients is not None
    assert torch.equal(moved.gradients[0, 0, 0], seen.gradients[0, 1, 1])
    assert moved.gradient_variance is not None
    assert seen.gradient_variance is not None
    assert torch.equal(moved.gradient_variance[2, 1, 2], seen.gradient_variance[2, 0, 0])


def test_blocks_of_an_expert_keep_their_order() -> None:
    space = CoefficientSpace.box(("q", "p"), blocks=("late", "early"))
    moved = Ordering.of(space, METRICS).space(space)
    assert moved.names == ("p/late", "p/early", "q/late", "q/early")
    assert moved.owner == (0, 0, 1, 1)
    assert moved.blocks == 2


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_the_names_does_not_depend_on_the_order_given(names: list[str]) -> None:
    space = CoefficientSpace.box(names)
    order = Ordering.of(space, [Metric(name) for name in names])
    assert order.space(space) == CoefficientSpace.box(sorted(names))
    X = space.sample(3, generator=make_generator(1))
    assert torch.equal(order.back(order.points(X)), X)
