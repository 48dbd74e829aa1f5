from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.errors import SpaceError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.nested.composition import (
    Part,
    check_nestable,
    expert_part,
    node_space,
    subspace,
)
from map_bo.nested.nodes import promoted_part
from map_bo.nested.tree import Group
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.merging.small_models import build, family
from tests.nested.trees import trees

BLOCKS = {
    "mlp": TaskArithmetic({"first": "^first", "last": "*"}),
    "tied": TaskArithmetic({"ends": "embed|output", "middle": "^middle"}),
}


def half(model: nn.Module) -> float:
    return 0.5


@cache
def problem(kind: str, experts: int, blocks: bool) -> MergedModelProblem:
    base, tuned = family(kind, experts)
    return MergedModelProblem(
        build(kind, 5),
        base=base,
        experts=tuned,
        evaluators=dict.fromkeys(tuned, half),
        operator=BLOCKS[kind] if blocks else None,
        lower=-0.5,
        upper=1.5,
    )


def in_box(space: CoefficientSpace, rows: int, seed: int) -> Tensor:
    return space.sample(rows, generator=make_generator(seed))


def composed(group: Group, whole: MergedModelProblem, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Merge a tree twice: its coefficients in the full space, and the models step by step.

    Experts get coefficients anywhere in the box, merges get shares in [0, 1].
    """
    parts: list[Part] = []
    sources: dict[str, Any] = {}
    for i, child in enumerate(group.children):
        if isinstance(child, str):
            parts.append(expert_part(whole.space, child))
            sources[child] = child
        else:
            row, tensors = composed(child, whole, 31 * seed + i + 1)
            parts.append(promoted_part(child.label, row.unsqueeze(0)))
            sources[child.label] = tensors
    space = node_space(parts, whole.space)
    u = in_box(space, 1, seed)[0]
    node = whole.with_experts(sources, [metric.name for metric in whole.metrics])
    # Blocks of a merge have one share in common, so each is given to all of its coefficients.
    width = node.space.d // len(node.space.experts)
    counts = [width if part.columns is None else 1 for part in parts for _ in part.names]
    own = u.repeat_interleave(torch.tensor(counts))
    rows = torch.cat([part.rows for part in parts])
    return u @ rows, node.merged(own)


@pytest.mark.parametrize("blocks", [False, True], ids=["one", "blocks"])
@pytest.mark.parametrize("kind", ["mlp", "tied"])
def test_merging_merges_is_the_flat_merge_at_the_composed_coefficients(
    kind: str, blocks: bool
) -> None:
    @given(trees(fewest=2, most=5), st.integers(0, 1000))
    def law(tree: Group, seed: int) -> None:
        whole = problem(kind, len(tree.leaves), blocks)
        c, tensors = composed(tree, whole, seed)
        assert bool(whole.space.contains(c.unsqueeze(0)).all())
        flat = whole.merged(c)
        assert set(flat) == set(tensors)
        for name, tensor in flat.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=2e-5, atol=2e-5)

    law()


SUM = LinearConstraint((1.0, 2.0, 0.0, -1.0), 0.2)
EVEN = LinearConstraint((1.0, 1.0, 1.0, 1.0), 1.0, equality=True)


def full(*constraints: LinearConstraint, importance: tuple[float, ...] = ()) -> CoefficientSpace:
    return CoefficientSpace(
        ("a", "b", "c", "d"),
        (-0.5, 0.0, 0.0, 0.0),
        (1.0, 1.0, 2.0, 1.5),
        constraints,
        importance=importance,
    )


ROWS = torch.tensor([[0.5, 0.25, 0.0, 0.0], [0.2, 0.1, 0.0, 0.0]], dtype=torch.float64)


def test_experts_keep_their_bounds_and_merges_are_shares() -> None:
    space = full()
    found = node_space(
        [promoted_part("a+b", ROWS), expert_part(space, "d"), expert_part(space, "c")], space
    )
    assert found.names == found.experts == ("a+b #1", "a+b #2", "d", "c")
    assert found.lower == (0.0, 0.0, 0.0, 0.0)
    assert found.upper == (1.0, 1.0, 1.5, 2.0)
    # Several points of one front: between them and the base.
    assert found.constraints == (LinearConstraint((1.0, 1.0, 0.0, 0.0), 1.0),)
    alone = node_space([promoted_part("a+b", ROWS[:1]), expert_part(space, "a")], space)
    assert alone.names == ("a+b", "a")
    assert alone.lower == (0.0, -0.5)
    assert not alone.constraints


def test_each_front_has_a_sum_of_its_own() -> None:
    space = full()
    other = torch.tensor([[0.0, 0.0, 0.3, 0.2]] * 3, dtype=torch.float64)
    found = node_space([promoted_part("a+b", ROWS), promoted_part("c+d", other)], space)
    assert [c.weights for c in found.constraints] == [(1, 1, 0, 0, 0), (0, 0, 1, 1, 1)]
    # The corner where everything is taken from one point of each front.
    assert bool(found.contains(torch.tensor([[1.0, 0, 0, 1, 0]]).double()).all())


@given(st.integers(0, 10_000))
def test_constraints_hold_for_the_node_exactly_where_they_do_for_the_experts(seed: int) -> None:
    space = full(SUM)
    parts = [promoted_part("a+b", ROWS[:1]), expert_part(space, "c"), expert_part(space, "d")]
    found = node_space(parts, space)
    U = found.unnormalise(torch.rand(40, 3, generator=make_generator(seed), dtype=torch.float64))
    rows = torch.cat([part.rows for part in parts])
    assert torch.equal(found.contains(U), space.contains(U @ rows))
    assert not bool(found.contains(U).all())


def test_equalities_are_kept_and_constraints_on_others_dropped() -> None:
    others = LinearConstraint((0.0, 0.0, 1.0, 1.0), 0.5)
    space = full(EVEN, others)
    row = torch.tensor([[0.4, 0.6, 0.0, 0.0]], dtype=torch.float64)
    [equality] = node_space([promoted_part("a+b", row)], space).constraints
    assert equality == LinearConstraint((1.0,), 1.0, equality=True)
    found = node_space([expert_part(space, name) for name in "ab"], space)
    assert found.constraints == (LinearConstraint((1.0, 1.0), 1.0, equality=True),)


def test_a_node_without_a_point_is_refused() -> None:
    space = full(LinearConstraint((1.0, 1.0, 1.0, 1.0), 5.5, equality=True))
    with pytest.raises(SpaceError, match="no point of the box"):
        node_space([expert_part(space, name) for name in "ab"], space)


def test_blocks_belong_to_their_expert_and_a_merge_is_one() -> None:
    space = CoefficientSpace.box(("a", "b", "c"), blocks=("x", "y"))
    part = expert_part(space, "b")
    assert part.names == ("b/x", "b/y")
    assert part.columns == (2, 3)
    assert torch.equal(part.rows, torch.eye(6, dtype=torch.float64)[2:4])
    row = torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.3, 0.4]], dtype=torch.float64)
    found = node_space([part, promoted_part("a+c", row)], space)
    assert found.names == ("b/x", "b/y", "a+c")
    assert found.experts == ("b", "a+c")
    assert found.owner == (0, 0, 1)


def test_importance_is_how_far_a_unit_moves_the_model() -> None:
    space = full(importance=(3.0, 4.0, 1.0, 2.0))
    row = torch.tensor([[1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)
    found = node_space([promoted_part("a+b", row), expert_part(space, "d")], space)
    assert found.importance == pytest.approx((13**0.5, 2.0))
    assert not node_space([promoted_part("a+b", row)], full()).importance


def test_a_subspace_has_what_belongs_to_its_coefficients() -> None:
    space = full(SUM, LinearConstraint((0.0, 0.0, 1.0, 0.0), 1.2), importance=(3.0, 4.0, 1.0, 2.0))
    found = subspace(space, torch.tensor([True, False, False, True]))
    assert found.names == found.experts == ("a", "d")
    assert (found.lower, found.upper) == ((-0.5, 0.0), (1.0, 1.5))
    assert found.importance == (3.0, 2.0)
    # b is 0, so the constraint holds for the two alone; that on c is gone.
    assert found.constraints == (LinearConstraint((1.0, -1.0), 0.2),)
    blocks = CoefficientSpace.box(("a", "b", "c"), blocks=("x", "y"))
    part = subspace(blocks, torch.tensor([False, False, True, True, False, True]))
    assert part.names == ("b/x", "b/y", "c/y")
    assert part.owner == (0, 0, 1)
    assert part.experts == ("b", "c")


@given(st.integers(0, 10_000))
def test_a_subspace_is_the_space_where_all_else_is_zero(seed: int) -> None:
    space = full(SUM)
    columns = torch.tensor([True, True, False, True])
    found = subspace(space, columns)
    V = found.unnormalise(torch.rand(40, 3, generator=make_generator(seed), dtype=torch.float64))
    X = torch.zeros(40, 4, dtype=torch.float64)
    X[:, columns] = V
    assert torch.equal(found.contains(V), space.contains(X))


def test_coefficients_that_cannot_be_zero_are_refused() -> None:
    check_nestable(full(SUM))
    check_nestable(CoefficientSpace.box(("a", "b"), lower=-1.0, upper=0.0))
    space = CoefficientSpace(("a", "b", "c"), (0.0, 0.1, -1.0), (1.0, 1.0, -0.1))
    with pytest.raises(SpaceError, match="can be 0, and b, c cannot") as caught:
        check_nestable(space)
    assert "bounds around 0" in str(caught.value.hint)
