"""How merges of merges compose: the small space of a node, and its points in the full space.

With an operator that is linear in its coefficients, a merge ``theta_0 + sum_n c_n v_n`` scaled by
``u`` is the merge with coefficients ``u c``. So a node that merges its children with ``u`` is the
flat merge with ``c = u R``, where the rows of ``R`` are what each child promotes: a unit vector for
an expert, the coefficients of the child's own merge for a group. Coefficients multiply along the
path, and no model is written between stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.errors import SpaceError
from map_bo.space import CoefficientSpace, LinearConstraint

__all__ = ["Part", "check_nestable", "expert_part", "node_space", "subspace"]


@dataclass(frozen=True, eq=False)
class Part:
    """What one child promotes to its node.

    Attributes:
        label: The expert's name, or that of the group.
        names: ``r`` names of coefficients.
        rows: ``r x d``: the coefficients in the full space per unit of each.
        columns: For coefficients of experts, their columns in the full space; ``None`` for merges,
            whose coefficients are shares in [0, 1] that add up to at most 1.
    """

    label: str
    names: tuple[str, ...]
    rows: Tensor
    columns: tuple[int, ...] | None = None


def check_nestable(space: CoefficientSpace) -> None:
    """Refuse a space in which a merge could not be left out by the nodes above it.

    Raises:
        SpaceError: When a coefficient of an expert cannot be 0, or the space has a choice.
    """
    if space.choice is not None:
        raise SpaceError(
            f"nested merging needs one operator, and this space has a choice: {space.choice.name}",
            hint="choose one operator, or merge all experts at once (nested=none)",
        )
    wrong = [
        name
        for name, owner, low, high in zip(
            space.names, space.owner, space.lower, space.upper, strict=True
        )
        if owner >= 0 and (low == high or not low <= 0 <= high)
    ]
    if wrong:
        raise SpaceError(
            "nested merging needs coefficients that are free and can be 0, and "
            f"{', '.join(wrong)} cannot",
            hint="choose bounds around 0 and fix no coefficient, or merge all experts at once",
        )


def expert_part(space: CoefficientSpace, expert: str) -> Part:
    """Return an expert as a part: its own coefficient, or one per block."""
    index = space.experts.index(expert)
    columns = tuple(i for i, owner in enumerate(space.owner) if owner == index)
    rows = torch.eye(space.d, dtype=torch.float64)[list(columns)]
    return Part(expert, tuple(space.names[i] for i in columns), rows, columns)


def node_space(parts: Sequence[Part], space: CoefficientSpace) -> CoefficientSpace:
    """Return the space of a node that merges ``parts``.

    Coefficients of experts keep their bounds. Those of merges are in [0, 1], and where a child
    promotes several they add up to at most 1. Constraints of the full space are carried over.

    Args:
        parts: What the children promote.
        space: The full space.

    Raises:
        SpaceError: When no point is feasible.
    """
    names = tuple(name for part in parts for name in part.names)
    rows = torch.cat([part.rows for part in parts])
    lower: list[float] = []
    upper: list[float] = []
    owner: list[int] = []
    experts: list[str] = []
    importance: list[float] = []
    constraints: list[LinearConstraint] = []
    for part in parts:
        first, count = len(lower), len(part.names)
        if part.columns is not None:
            owner += [len(experts)] * count
            experts.append(part.label)
            lower += [space.lower[i] for i in part.columns]
            upper += [space.upper[i] for i in part.columns]
            continue
        owner += range(len(experts), len(experts) + count)
        experts += part.names
        lower += [0.0] * count
        upper += [1.0] * count
        if count > 1:
            within = [float(first <= i < first + count) for i in range(len(names))]
            constraints.append(LinearConstraint(tuple(within), 1.0))
    if space.importance:
        importance = _importance(rows, space)
    for constraint in space.constraints:
        weights = rows @ torch.tensor(constraint.weights, dtype=torch.float64)
        if bool(weights.any()):
            constraints.append(
                LinearConstraint(tuple(weights.tolist()), constraint.bound, constraint.equality)
            )
    return CoefficientSpace(
        names,
        tuple(lower),
        tuple(upper),
        tuple(constraints),
        owner=tuple(owner),
        experts=tuple(experts),
        importance=tuple(importance),
    )


def _importance(rows: Tensor, space: CoefficientSpace) -> list[float]:
    """Return how far a unit of each coefficient moves the model, taking blocks as orthogonal."""
    sizes = torch.tensor(space.importance, dtype=torch.float64)
    moved: list[float] = (rows * sizes).norm(dim=-1).clamp_min(1e-6).tolist()
    return moved


def subspace(space: CoefficientSpace, columns: Tensor) -> CoefficientSpace:
    """Return the space of the coefficients of ``columns`` (``d`` booleans) alone.

    Constraints are kept where they involve any of these; importances are kept.
    """
    kept = columns.nonzero().flatten().tolist()
    owners = sorted({space.owner[i] for i in kept})
    constraints = [
        LinearConstraint(tuple(c.weights[i] for i in kept), c.bound, c.equality)
        for c in space.constraints
        if any(c.weights[i] for i in kept)
    ]
    return CoefficientSpace(
        tuple(space.names[i] for i in kept),
        tuple(space.lower[i] for i in kept),
        tuple(space.upper[i] for i in kept),
        tuple(constraints),
        owner=tuple(owners.index(space.owner[i]) for i in kept),
        experts=tuple(space.experts[i] for i in owners),
        importance=tuple(space.importance[i] for i in kept) if space.importance else (),
    )
