"""How a budget is split over the nodes of a tree.

The unit is one *data set*: one metric measured at one point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from map_bo.errors import BudgetError, TreeError
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, NodePath, path_name

__all__ = ["BudgetAllocator", "NodeSize", "least_evaluations", "node_sizes"]


@dataclass(frozen=True)
class NodeSize:
    """What decides the cost of a node.

    Attributes:
        coefficients: Number of coefficients that it searches.
        data_sets: Number of metrics that one evaluation measures.
        runs: Number of runs: one per preference that its children are merged for.
    """

    coefficients: int
    data_sets: int
    runs: int = 1


def least_evaluations(size: NodeSize) -> int:
    """Return the smallest number of evaluations of a node: its anchors and one more per run."""
    return size.runs * (size.coefficients + 3)


def node_sizes(
    tree: Group, nested: Nested, below: Mapping[NodePath, int], blocks: int, everything: int
) -> dict[NodePath, NodeSize]:
    """Return the sizes of all nodes, each after those below it.

    Args:
        tree: The tree.
        nested: The settings.
        below: Node -> number of metrics below it; the root may be left out.
        blocks: Coefficients of an expert.
        everything: Number of all metrics, which the root measures.
    """
    sizes: dict[NodePath, NodeSize] = {}
    for path, node in tree.nodes():
        inner = [child for child in node.children if isinstance(child, Group)]
        outer = len(node.children) - len(inner)
        if nested.promote == "surrogate":
            coefficients = blocks * len(node.leaves)
        else:
            promoted = [
                min(nested.points, sizes[*path, i].coefficients + 1)
                if nested.promote == "points"
                else 1
                for i, child in enumerate(node.children)
                if isinstance(child, Group)
            ]
            coefficients = blocks * outer + sum(promoted)
        metrics = below[path] if path else everything
        runs = max(1, len(nested.preferences)) if inner and nested.promote == "point" else 1
        sizes[path] = NodeSize(coefficients, metrics, runs)
    return sizes


class BudgetAllocator:
    """Gives each node its number of evaluations when its turn has come.

    Args:
        tree: The tree.
        nested: The settings.
        sizes: Sizes of the nodes.
        total: Data sets in all.
        reserved: Evaluations of all metrics that the run makes outside the nodes; they are counted
            in the hint of an error.

    Raises:
        BudgetError: When some node would have too few evaluations, or all together would have more
            than the budget.
        TreeError: When ``nested.budgets`` names a node that does not exist.
    """

    def __init__(
        self,
        tree: Group,
        nested: Nested,
        sizes: Mapping[NodePath, NodeSize],
        total: int,
        *,
        reserved: int = 0,
    ) -> None:
        self._nested, self._sizes, self._total = nested, dict(sizes), total
        self._left = list(sizes)
        by_name = {path_name(path): path for path in sizes}
        for name in nested.budgets:
            if name not in by_name:
                raise TreeError(
                    f"nested.budgets names a node {name!r} that does not exist",
                    hint=f"nodes are {', '.join(by_name)}",
                )
        stages = {path: node.stage for path, node in tree.nodes()}
        if nested.stage_budgets and len(nested.stage_budgets) != tree.stage:
            raise BudgetError(
                f"nested.stage_budgets has {len(nested.stage_budgets)} numbers for "
                f"{tree.stage} stages",
                hint="give the evaluations per node of each stage, in the order of merging",
            )
        self._fixed: dict[NodePath, int] = {}
        if nested.stage_budgets:
            self._fixed = {path: nested.stage_budgets[stages[path] - 1] for path in sizes}
        self._fixed |= {by_name[name]: count for name, count in nested.budgets.items()}
        planned = self.plan()
        short = [path for path in sizes if planned[path] < least_evaluations(sizes[path])]
        if short:
            raise self._too_little(short[0], planned[short[0]], reserved)
        cost = self._cost(planned)
        if cost > total:
            raise BudgetError(
                f"nested.budgets and nested.stage_budgets add up to {cost} measurements of one "
                f"task, more than {total}",
                hint=f"lower them, or raise the budget to {self._budget(cost, reserved)}",
            )

    def _too_little(self, path: NodePath, count: int, reserved: int) -> BudgetError:
        """Return the error for a node that would have only ``count`` evaluations."""
        size = self._sizes[path]
        least = least_evaluations(size)
        needed = self._cost(
            {p: self._fixed.get(p, least_evaluations(s)) for p, s in self._sizes.items()}
        )
        return BudgetError(
            f"node {path_name(path)} would have {count} evaluations and needs {least}: its anchors "
            "and one more" + ("" if size.runs == 1 else f" for each of {size.runs} preferences"),
            hint="give it more in nested.budgets or nested.stage_budgets"
            if path in self._fixed
            else f"raise the budget (the whole tree needs {needed} measurements of one task, which "
            f"is a budget of {self._budget(needed, reserved)}), or use fewer stages or preferences",
        )

    def _cost(self, counts: Mapping[NodePath, int]) -> int:
        return sum(count * self._sizes[path].data_sets for path, count in counts.items())

    def _budget(self, data_sets: int, reserved: int) -> int:
        """Return the budget of the run that holds so many data sets."""
        return math.ceil(data_sets / self._sizes[()].data_sets) + reserved

    def plan(self) -> dict[NodePath, int]:
        """Return the evaluations of all nodes, assuming that each spends exactly its share."""
        return self._shares(list(self._sizes), self._total)

    def allocate(self, path: NodePath, spent: int) -> int:
        """Return the evaluations of the node whose turn it is.

        Args:
            path: The node.
            spent: Data sets measured so far by all nodes before it. What they did not use is split
                over the nodes that remain.
        """
        shares = self._shares(self._left, self._total - spent)
        self._left.remove(path)
        if path in self._fixed:
            return self._fixed[path]
        # Never less than the minimum: that other nodes overspent must not starve this one.
        share = shares[path] if self._nested.budget_split == "adaptive" else self.plan()[path]
        return max(share, least_evaluations(self._sizes[path]))

    def _shares(self, paths: list[NodePath], total: int) -> dict[NodePath, int]:
        fixed = {path: self._fixed[path] for path in paths if path in self._fixed}
        free = [path for path in paths if path not in fixed]
        left = total - self._cost(fixed)
        split = self._equal if self._nested.budget_split == "equal" else self._by_size
        return {**fixed, **split(free, left)}

    def _equal(self, paths: list[NodePath], total: int) -> dict[NodePath, int]:
        """Return equal numbers, except for nodes that need more."""
        needy: dict[NodePath, int] = {}
        while True:
            rest = [path for path in paths if path not in needy]
            left = total - self._cost(needy)
            cost = sum(self._sizes[path].data_sets for path in rest)
            each = max(0, left // cost) if cost else 0
            more = {
                p: least_evaluations(self._sizes[p])
                for p in rest
                if least_evaluations(self._sizes[p]) > each
            }
            if not more or len(more) == len(rest):
                return {**needy, **dict.fromkeys(rest, each)}
            needy |= more

    def _by_size(self, paths: list[NodePath], total: int) -> dict[NodePath, int]:
        """Return the minimum of each node plus a share of the rest in proportion to its size."""
        sizes = self._sizes
        least = {path: least_evaluations(sizes[path]) for path in paths}
        weight = {path: sizes[path].runs * (sizes[path].coefficients + 2) for path in paths}
        left = total - self._cost(least)
        if left < 0:  # too little for all: the caller raises the error
            share = total / max(1, self._cost(least))
            return {path: math.floor(count * share) for path, count in least.items()}
        cost = sum(weight[path] * sizes[path].data_sets for path in paths)
        unit = left / cost if cost else 0.0
        return {path: least[path] + math.floor(weight[path] * unit + 1e-9) for path in paths}
