"""Random merge trees, for laws that hold for all of them."""

from __future__ import annotations

from hypothesis import strategies as st

from map_bo.nested.tree import Group


def names_of(count: int) -> tuple[str, ...]:
    """Return ``count`` names of experts."""
    return tuple(f"e{i}" for i in range(count))


@st.composite
def trees(draw: st.DrawFn, fewest: int = 2, most: int = 9) -> Group:
    """Draw a tree over ``e0``, ``e1``, ...: neighbours are merged until one group is left."""
    items: list[Group | str] = list(
        draw(st.permutations(names_of(draw(st.integers(fewest, most)))))
    )
    while len(items) > 1:
        size = draw(st.integers(2, len(items)))
        at = draw(st.integers(0, len(items) - size))
        items[at : at + size] = [Group(tuple(items[at : at + size]))]
    [root] = items
    return root if isinstance(root, Group) else Group((root,))
