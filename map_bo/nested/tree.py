"""Merge trees: which experts are merged together, and in which order.

A tree is plain data. Its leaves are names of experts, its inner nodes are groups of any size of
leaves and further groups. A node's *stage* is its height: the groups of experts alone are merged in
stage 1, and the root is merged last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from map_bo.errors import TreeError

__all__ = ["Group", "Path", "Plain", "drawn", "path_name"]

Path: TypeAlias = tuple[int, ...]
"""Where a node stands: the number of the child to take at each group, from the root down."""

Plain: TypeAlias = "str | list[Plain]"

_LABEL = 40


@dataclass(frozen=True)
class Group:
    """An inner node: what is merged together.

    Attributes:
        children: Names of experts, and groups; two or more, except that a tree of one expert is
            a group of one.

    Raises:
        TreeError: When there are too few children.
    """

    children: tuple[Group | str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "children", tuple(self.children))
        if not self.children:
            raise TreeError("a group of the tree is empty", hint="leave it out")
        inner = [child for child in self.children if isinstance(child, Group)]
        alone = [child for child in inner if len(self.children) == 1 or len(child.children) == 1]
        if alone:
            raise TreeError(
                f"the group of {', '.join(alone[0].leaves)} has one child only",
                hint="leave out the pair of brackets around it",
            )

    @classmethod
    def of(cls, plain: object, experts: Sequence[str] | None = None) -> Group:
        """Return the tree that nested lists of names stand for.

        Args:
            plain: For example ``[["a", "b"], ["c", "d"]]``.
            experts: The experts that the tree must hold, each once; not checked when None.

        Raises:
            TreeError: When it is no tree, or lacks, repeats or invents an expert.
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
        """The experts below in one short word."""
        leaves = self.leaves
        whole = "+".join(leaves)
        return whole if len(whole) <= _LABEL else f"{leaves[0]}+..+{leaves[-1]} ({len(leaves)})"

    def nodes(self, at: Path = ()) -> Iterator[tuple[Path, Group]]:
        """Yield every group below and this one, each after all that it is made of."""
        for i, child in enumerate(self.children):
            if isinstance(child, Group):
                yield from child.nodes((*at, i))
        yield at, self

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
                    hint=f"each of these stands in it once: {', '.join(experts)}",
                )


def _group(plain: object) -> Group:
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        raise TreeError(
            f"a tree is a list of lists of names, not {plain!r}",
            hint="for example [[a, b], [c, d]]",
        )
    children: list[Group | str] = []
    for child in plain:
        if isinstance(child, str):
            children.append(child)
        elif isinstance(child, Sequence):
            children.append(_group(child))
        else:
            raise TreeError(
                f"{child!r} stands in the tree where a name or a list belongs",
                hint="for example [[a, b], [c, d]]",
            )
    return Group(tuple(children))


def path_name(path: Path) -> str:
    """Return the name of a node: ``root``, or numbers of children as in ``0.1``."""
    return ".".join(map(str, path)) or "root"


def drawn(tree: Group, notes: dict[Path, str] | None = None) -> str:
    """Return the tree as lines of text, with a note behind each group.

    Args:
        tree: The tree.
        notes: What to write behind the groups, by their paths.
    """
    said = notes or {}

    def lines(node: Group | str, at: Path, before: str, joint: str, after: str) -> Iterator[str]:
        if isinstance(node, str):
            yield f"{before}{joint}{node}"
            return
        note = f"  {said[at]}" if at in said else ""
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
