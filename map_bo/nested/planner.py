"""Which experts are merged together: the shape of a tree, and the order of its leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from torch import Tensor

from map_bo.errors import TreeError
from map_bo.nested.tree import Group

__all__ = ["balanced", "by_affinity", "by_score", "most_stages", "sized"]

Item = Group | str


def most_stages(experts: int) -> int:
    """Return how many stages ``N`` experts can have: ``ceil(log2 N)``, at least 1."""
    return max(1, math.ceil(math.log2(experts)))


def balanced(names: Sequence[str], stages: int) -> Group:
    """Return a tree of so many stages over neighbours in ``names``.

    In each stage, the smallest group size whose power reaches the number of items left:
    ``N ** (1 / S)``, rounded up. One stage is the flat merge of all, ``ceil(log2 N)`` merges pairs.

    Raises:
        TreeError: When so many experts cannot have so many stages.
    """
    _check(names)
    most = most_stages(len(names))
    if not 1 <= stages <= most:
        raise TreeError(
            f"{len(names)} experts cannot be merged in {stages} stages",
            hint=f"choose from 1 (all at once) to {most} (pairs)",
        )
    items: list[Item] = list(names)
    for left in range(stages, 0, -1):
        items = _grouped(items, _size(len(items), left))
    return _root(items)


def sized(names: Sequence[str], size: int) -> Group:
    """Return a tree of groups of at most ``size`` neighbours, until one is left.

    Raises:
        TreeError: When ``size`` is less than 2.
    """
    _check(names)
    if size < 2:
        raise TreeError(f"groups of {size} do not merge anything", hint="give 2 or more")
    items: list[Item] = list(names)
    while True:
        items = _grouped(items, size)
        if len(items) == 1:
            return _root(items)


def by_score(
    scores: Mapping[str, float], shape: Callable[[int], int], stages: int | None = None
) -> Group:
    """Return a tree that merges, in every stage, what scores alike.

    Pairs are taken closest first, as published (Li et al., arXiv 2406.07529, section 3.3); larger
    groups are neighbours in the order of their scores. A group's score is the mean of its experts'.

    Args:
        scores: Expert -> how well it does its own task, larger is better.
        shape: Number of items left -> size of the groups; not used where ``stages`` are given.
        stages: Stages to make; until one group is left when None.
    """
    _check(list(scores))

    def score(item: Item) -> float:
        names = [item] if isinstance(item, str) else item.leaves
        return sum(scores[name] for name in names) / len(names)

    items: list[Item] = list(scores)
    stage = 0
    while len(items) > 1 or stage == 0:
        stage += 1
        size = shape(len(items)) if stages is None else _size(len(items), stages - stage + 1)
        items.sort(key=score)
        items = _pairs(items, score) if size == 2 else _grouped(items, size)
    return _root(items)


def by_affinity(names: Sequence[str], affinity: Tensor) -> list[str]:
    """Return the names such that those with much affinity stand together.

    Average linkage, then the order of the dendrogram's leaves in which neighbours are closest
    (Bar-Joseph, Gifford & Jaakkola, *Fast optimal leaf ordering for hierarchical clustering*,
    2001).

    Args:
        names: ``N`` names.
        affinity: ``N x N``, symmetric.
    """
    if len(names) < 3:
        return list(names)
    values = np.asarray(affinity, dtype=float)
    distance = values.max() - (values + values.T) / 2
    np.fill_diagonal(distance, 0.0)
    condensed = squareform(distance, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    return [names[i] for i in leaves_list(tree)]


def _check(names: Sequence[str]) -> None:
    if not names:
        raise TreeError("there are no experts to merge", hint="give at least one")


def _size(items: int, stages: int) -> int:
    """Return the smallest whole number whose ``stages``-th power is at least ``items``."""
    size = max(1, int(items ** (1 / stages)))
    while size**stages < items:
        size += 1
    return size


def _grouped(items: list[Item], size: int) -> list[Item]:
    """Return neighbours in groups of at most ``size``, as even as can be."""
    count = math.ceil(len(items) / size)
    ends = [round(i * len(items) / count) for i in range(count + 1)]
    return [_group(items[a:b]) for a, b in pairwise(ends)]


def _pairs(items: list[Item], score: Callable[[Item], float]) -> list[Item]:
    """Return the items in pairs, closest scores first; an odd one stays alone."""
    left, pairs = list(items), []
    while len(left) > 1:
        gaps = [abs(score(a) - score(b)) for a, b in pairwise(left)]
        i = int(np.argmin(gaps))
        pairs.append(_group(left[i : i + 2]))
        del left[i : i + 2]
    return [*pairs, *left]


def _group(items: list[Item]) -> Item:
    return items[0] if len(items) == 1 else Group(tuple(items))


def _root(items: list[Item]) -> Group:
    [item] = items
    return item if isinstance(item, Group) else Group((item,))
