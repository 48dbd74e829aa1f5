"""Merge trees: which experts are merged together, in which order, and measured on which tasks.

A tree is plain data. Its leaves are names of experts; its inner nodes are groups, of any size, of
leaves and further groups. A node's *stage* is its height: groups of experts alone are merged in
stage 1, and the root is merged last. :class:`Tasks` says which metrics belong to which expert, and
so which of them a node measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from map_bo.data import Metric
from map_bo.errors import ConfigError, TreeError

__all__ = ["Group", "NodePath", "Plain", "Tasks", "draw_tree", "path_name"]

NodePath: TypeAlias = tuple[int, ...]
"""Position of a node: the number of the child to take at each group, from the root down."""

Plain: TypeAlias = "str | list[Plain]"

_LABEL = 40


@dataclass(frozen=True)
class Group:
    """An inner node: what is merged together.

    Attributes:
        children: Names of experts, and groups; at least two, except that the tree of a single
            expert is a group of one.

    Raises:
        TreeError: When there are too few children.
    """

    children: tuple[Group | str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", tuple(self.children))
        if not self.children:
            raise TreeError("a group of the tree is empty", hint="remove the empty brackets")
        inner = [child for child in self.children if isinstance(child, Group)]
        alone = [child for child in inner if len(self.children) == 1 or len(child.children) == 1]
        if alone:
            raise TreeError(
                f"the group of {', '.join(alone[0].leaves)} has only one child",
                hint="remove the pair of brackets around it",
            )

    @classmethod
    def of(cls, plain: object, experts: Sequence[str] | None = None) -> Group:
        """Return the tree that nested lists of names describe.

        Args:
            plain: For example ``[["a", "b"], ["c", "d"]]``.
            experts: The experts that the tree must hold, each once; not checked when None.

        Raises:
            TreeError: When it is not a tree, or lacks, repeats or invents an expert.
        """
        tree = _group(plain)
        if experts is not None:
            tree.check(experts)
        return tree

    def plain(self) -> list[Plain]:
        """Return the tree as nested lists."""
        return [c if isinstance(c, str) else c.plain() for c in self.children]

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the experts below, from left to right."""
        return tuple(
            name
            for child in self.children
            for name in ((child,) if isinstance(child, str) else child.leaves)
        )

    @property
    def stage(self) -> int:
        """Height of the node: 1 when all its children are experts."""
        return 1 + max((c.stage for c in self.children if isinstance(c, Group)), default=0)

    @property
    def label(self) -> str:
        """The experts below as one short name."""
        leaves = self.leaves
        whole = "+".join(leaves)
        return whole if len(whole) <= _LABEL else f"{leaves[0]}+..+{leaves[-1]} ({len(leaves)})"

    def nodes(self, at: NodePath = ()) -> Iterator[tuple[NodePath, Group]]:
        """Yield every group below, then this one: each after everything that it is made of."""
        for i, child in enumerate(self.children):
            if isinstance(child, Group):
                yield from child.nodes((*at, i))
        yield at, self

    def waves(self, *, alone: bool) -> list[list[tuple[NodePath, Group]]]:
        """Return the groups in waves: those of one are made of groups of earlier waves alone.

        Args:
            alone: Whether each group is a wave of its own, in the order of :meth:`nodes`.
        """
        if alone:
            return [[one] for one in self.nodes()]
        found: dict[int, list[tuple[NodePath, Group]]] = {}
        for path, group in self.nodes():
            found.setdefault(group.stage, []).append((path, group))
        return [found[stage] for stage in sorted(found)]

    def check(self, experts: Sequence[str]) -> None:
        """Refuse a tree that does not hold exactly these experts, each once.

        Raises:
            TreeError: With the names that are missing, repeated or unknown.
        """
        leaves = self.leaves
        missing = [name for name in experts if name not in leaves]
        repeated = sorted({name for name in leaves if leaves.count(name) > 1})
        unknown = sorted(set(leaves) - set(experts))
        for names, what in ((missing, "lacks"), (repeated, "repeats"), (unknown, "invents")):
            if names:
                raise TreeError(
                    f"the tree {what} {', '.join(names)}",
                    hint=f"name each of these exactly once: {', '.join(experts)}",
                )


def _group(plain: object) -> Group:
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        raise TreeError(
            f"a tree must be a list of lists of names, got {plain!r}",
            hint="write it as in [[a, b], [c, d]]",
        )
    children: list[Group | str] = []
    for child in plain:
        if isinstance(child, str):
            children.append(child)
        elif isinstance(child, Sequence):
            children.append(_group(child))
        else:
            raise TreeError(
                f"every item of a tree must be a name or a list, got {child!r}",
                hint="write the tree as in [[a, b], [c, d]]",
            )
    return Group(tuple(children))


def path_name(path: NodePath) -> str:
    """Return the name of a node: ``root``, or numbers of children as in ``0.1``."""
    return ".".join(map(str, path)) or "root"


def draw_tree(tree: Group, notes: dict[NodePath, str] | None = None) -> str:
    """Return the tree as lines of text, with a note after each group.

    Args:
        tree: The tree.
        notes: What to write after a group, by its path.
    """
    notes = notes or {}

    def lines(
        node: Group | str, at: NodePath, before: str, joint: str, after: str
    ) -> Iterator[str]:
        if isinstance(node, str):
            yield f"{before}{joint}{node}"
            return
        note = f"  {notes[at]}" if at in notes else ""
        yield f"{before}{joint}[stage {node.stage}]{note}"
        for i, child in enumerate(node.children):
            last = i == len(node.children) - 1
            yield from lines(
                child,
                (*at, i),
                before + after,
                "└─ " if last else "├─ ",
                "   " if last else "│  ",
            )

    return "\n".join(lines(tree, (), "", "", ""))


@dataclass(frozen=True)
class Tasks:
    """The metrics of every expert.

    Attributes:
        metrics: Names of all metrics, in the problem's order.
        of: Expert -> names of its metrics. A metric may belong to several experts; one that
            belongs to none is measured only at the root.
    """

    metrics: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]]

    @classmethod
    def assign(
        cls,
        experts: Sequence[str],
        metrics: Sequence[Metric],
        named: Mapping[str, Sequence[str]],
    ) -> Tasks:
        """Give each expert the tasks that were named for it, or else the one that has its name.

        Raises:
            ConfigError: When an expert has no task, or a name is unknown.
        """
        names = tuple(metric.name for metric in metrics)
        unknown = sorted(set(named) - set(experts))
        if unknown:
            raise ConfigError(
                f"nested.tasks names unknown experts: {', '.join(unknown)}",
                hint=f"experts are {', '.join(experts)}",
            )
        found: dict[str, tuple[str, ...]] = {}
        for expert in experts:
            own = tuple(named.get(expert, (expert,) if expert in names else ()))
            wrong = [name for name in own if name not in names]
            if wrong:
                raise ConfigError(
                    f"nested.tasks gives expert {expert} the unknown metrics {', '.join(wrong)}",
                    hint=f"metrics are {', '.join(names)}",
                )
            if not own:
                raise ConfigError(
                    f"expert {expert} has no task: there is no metric of that name",
                    hint=f"choose its metrics with nested.tasks.{expert}=[...], out of "
                    f"{', '.join(names)}",
                )
            found[expert] = own
        return cls(names, found)

    def below(self, node: Group | str) -> tuple[str, ...]:
        """Return the metrics of an expert, or of all experts below a node, in order."""
        leaves = (node,) if isinstance(node, str) else node.leaves
        wanted = {name for leaf in leaves for name in self.of[leaf]}
        return tuple(name for name in self.metrics if name in wanted)

    def check_preference(self, weights: Mapping[str, float], number: int) -> None:
        """Refuse a preference that does not name every metric.

        Raises:
            ConfigError: With what is missing or unknown.
        """
        missing = [name for name in self.metrics if name not in weights]
        unknown = sorted(set(weights) - set(self.metrics))
        bad = [name for name, weight in weights.items() if not 0 <= float(weight) < float("inf")]
        if missing or unknown or bad or not any(weights.values()):
            fault = (
                f"does not name {', '.join(missing)}"
                if missing
                else f"names {', '.join(unknown)}, which are not metrics"
                if unknown
                else f"has weights that are not finite and at least 0: {', '.join(bad)}"
                if bad
                else "has no weight above 0"
            )
            raise ConfigError(
                f"preference {number} of nested.preferences {fault}",
                hint=f"give a weight to each of {', '.join(self.metrics)}; 0 leaves a task out",
            )
