"""What a node may spend: one budget, counted in data sets, split over the nodes of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from map_bo.errors import BudgetError, TreeError
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, Path, path_name

__all__ = ["NodeSize", "Purse", "fewest", "node_sizes"]


@dataclass(frozen=True)
class NodeSize:
    """What an evaluation of a node is.

    Attributes:
        coefficients: Number of coefficients that it searches.
        data_sets: Metrics that an evaluation measures.
        runs: How many runs it has: one a preference that its children are merged for.
    """

    coefficients: int
    data_sets: int
    runs: int = 1


def fewest(size: NodeSize) -> int:
    """Return the smallest number of evaluations of a node: its anchors and one more a run."""
    return size.runs * (size.coefficients + 3)


def node_sizes(
    tree: Group, nested: Nested, below: Mapping[Path, int], blocks: int, everything: int
) -> dict[Path, NodeSize]:
    """Return the sizes of all nodes, each after those below it.

    Args:
        tree: The tree.
        nested: The settings.
        below: Node -> number of metrics below it; the root may be left out.
        blocks: Coefficients of an expert.
        everything: Metrics in all, which the root measures.
    """
    sizes: dict[Path, NodeSize] = {}
    for path, node in tree.nodes():
        inner = [child for child in node.children if isinstance(child, Group)]
        outer = len(node.children) - len(inner)
        if nested.hand_up == "surrogate":
            coefficients = blocks * len(node.leaves)
        else:
            handed = [
                min(nested.points, sizes[*path, i].coefficients + 1)
                if nested.hand_up == "points"
                else 1
                for i, child in enumerate(node.children)
                if isinstance(child, Group)
            ]
            coefficients = blocks * outer + sum(handed)
        metrics = below[path] if path else everything
        runs = max(1, len(nested.preferences)) if inner and nested.hand_up == "point" else 1
        sizes[path] = NodeSize(coefficients, metrics, runs)
    return sizes


class Purse:
    """Gives each node its number of evaluations when its turn has come.

    Args:
        tree: The tree.
        nested: The settings.
        sizes: Sizes of the nodes.
        total: Data sets in all.
        aside: Evaluations of all metrics that the run makes besides, for the hint of an error.

    Raises:
        BudgetError: When some node would have too few evaluations, or all together more than there
            are.
        TreeError: When ``nested.budgets`` names a node that there is not.
    """

    def __init__(
        self,
        tree: Group,
        nested: Nested,
        sizes: Mapping[Path, NodeSize],
        total: int,
        *,
        aside: int = 0,
    ) -> None:
        self._nested, self._sizes, self._total = nested, dict(sizes), total
        self._left = list(sizes)
        by_name = {path_name(path): path for path in sizes}
        for name in nested.budgets:
            if name not in by_name:
                raise TreeError(
                    f"nested.budgets names the node {name!r}",
                    hint=f"nodes are {', '.join(by_name)}",
                )
        stages = {path: node.stage for path, node in tree.nodes()}
        if nested.stage_budgets and len(nested.stage_budgets) != tree.stage:
            raise BudgetError(
                f"nested.stage_budgets has {len(nested.stage_budgets)} numbers for "
                f"{tree.stage} stages",
                hint="give the evaluations of a node for each stage, the first merged first",
            )
        self._fixed: dict[Path, int] = {}
        if nested.stage_budgets:
            self._fixed = {path: nested.stage_budgets[stages[path] - 1] for path in sizes}
        self._fixed |= {by_name[name]: count for name, count in nested.budgets.items()}
        planned = self.planned()
        short = [path for path in sizes if planned[path] < fewest(sizes[path])]
        if short:
            raise self._too_little(short[0], planned[short[0]], aside)
        cost = self._cost(planned)
        if cost > total:
            raise BudgetError(
                f"nested.budgets and nested.stage_budgets come to {cost} measurements of one task, "
                f"more than {total}",
                hint=f"lower them, or raise the budget to {self._budget(cost, aside)}",
            )

    def _too_little(self, path: Path, count: int, aside: int) -> BudgetError:
        """Return the error that a node with so many evaluations is."""
        size = self._sizes[path]
        needed = self._cost({p: self._fixed.get(p, fewest(s)) for p, s in self._sizes.items()})
        return BudgetError(
            f"node {path_name(path)} would have {count} evaluations and needs {fewest(size)}: "
            "its anchors and one more"
            + ("" if size.runs == 1 else f" for each of {size.runs} preferences"),
            hint="give it more in nested.budgets or nested.stage_budgets"
            if path in self._fixed
            else f"the tree as a whole needs {needed} measurements of one task, a budget of "
            f"{self._budget(needed, aside)}; raise the budget, or take fewer stages or preferences",
        )

    def _cost(self, counts: Mapping[Path, int]) -> int:
        return sum(count * self._sizes[path].data_sets for path, count in counts.items())

    def _budget(self, data_sets: int, aside: int) -> int:
        """Return the budget of the run that holds so many data sets."""
        return math.ceil(data_sets / self._sizes[()].data_sets) + aside

    def planned(self) -> dict[Path, int]:
        """Return the evaluations of all nodes, were nothing left over or saved."""
        return self._shares(list(self._sizes), self._total)

    def take(self, path: Path, spent: int) -> int:
        """Return the evaluations of a node whose turn it is.

        Args:
            path: The node.
            spent: Data sets measured so far by all nodes before it. What they left is split over
                those that are left.
        """
        shares = self._shares(self._left, self._total - spent)
        self._left.remove(path)
        if path in self._fixed:
            return self._fixed[path]
        # Never less than was planned: what others overspent is theirs to answer for.
        share = shares[path] if self._nested.budget_split == "adaptive" else self.planned()[path]
        return max(share, fewest(self._sizes[path]))

    def _shares(self, paths: list[Path], total: int) -> dict[Path, int]:
        fixed = {path: self._fixed[path] for path in paths if path in self._fixed}
        free = [path for path in paths if path not in fixed]
        left = total - self._cost(fixed)
        split = self._equal if self._nested.budget_split == "equal" else self._by_size
        return {**fixed, **split(free, left)}

    def _equal(self, paths: list[Path], total: int) -> dict[Path, int]:
        """Return equal numbers, but for nodes that need more."""
        needy: dict[Path, int] = {}
        while True:
            rest = [path for path in paths if path not in needy]
            left = total - self._cost(needy)
            cost = sum(self._sizes[path].data_sets for path in rest)
            each = max(0, left // cost) if cost else 0
            more = {p: fewest(self._sizes[p]) for p in rest if fewest(self._sizes[p]) > each}
            if not more or len(more) == len(rest):
                return {**needy, **dict.fromkeys(rest, each)}
            needy |= more

    def _by_size(self, paths: list[Path], total: int) -> dict[Path, int]:
        """Return what each needs, and of what is left numbers in proportion to their sizes."""
        sizes = self._sizes
        least = {path: fewest(sizes[path]) for path in paths}
        weight = {path: sizes[path].runs * (sizes[path].coefficients + 2) for path in paths}
        left = total - self._cost(least)
        if left < 0:  # too little for all, and the caller says so
            share = total / max(1, self._cost(least))
            return {path: math.floor(count * share) for path, count in least.items()}
        cost = sum(weight[path] * sizes[path].data_sets for path in paths)
        unit = left / cost if cost else 0.0
        return {path: least[path] + math.floor(weight[path] * unit + 1e-9) for path in paths}
