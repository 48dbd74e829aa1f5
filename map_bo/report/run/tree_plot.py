"""The merge tree of a nested run: as a picture, in words, and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from map_bo.report.marks import GREY, INK, KINDS, literal
from map_bo.report.view import RunView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["nested_of", "tree_figure", "tree_section", "tree_words"]

_LABEL = 22


def nested_of(view: RunView) -> Mapping[str, Any] | None:
    """Return the part of the summary that is about the tree; None for a flat run."""
    nested = view.summary.get("nested")
    return nested if isinstance(nested, Mapping) and nested.get("tree") else None


def tree_words(view: RunView) -> str:
    """Return in words what the picture of the tree shows, for screen readers."""
    nested = nested_of(view)
    if nested is None:
        return "merge tree"
    nodes = [node for node in nested["nodes"] if node["stage"]]
    return (
        f"Tree of {len(nodes)} merges in {nested['stages']} stages over "
        f"{len(view.space.experts)} experts. The table below lists its nodes."
    )


def tree_figure(view: RunView) -> Figure:
    """Return the tree: experts on the left, each merge to the right of what it merges.

    Raises:
        ValueError: When the run is flat.
    """
    from matplotlib.figure import Figure

    nested = nested_of(view)
    if nested is None:
        raise ValueError("a flat run has no tree")
    nodes = {node["node"]: node for node in nested["nodes"]}
    leaves = sum(1 for _ in _leaves(nested["tree"]))
    stages = int(nested["stages"])
    figure = Figure(
        figsize=(max(6.0, 2.6 + 1.9 * stages), max(2.2, 0.6 + 0.3 * leaves)),
        dpi=150,
        layout="constrained",
        facecolor="white",
    )
    axes = figure.add_subplot()
    row = 0

    def draw(item: Any, path: tuple[int, ...]) -> tuple[float, float]:
        """Draw everything below, then the item itself; return its position."""
        nonlocal row
        if isinstance(item, str):
            axes.plot(0, -row, "o", color=KINDS["expert"].colour, markersize=6)
            shown = item if len(item) <= _LABEL else item[: _LABEL - 1] + "\u2026"
            axes.text(-0.08, -row, literal(shown), ha="right", va="center", fontsize=8, color=INK)
            row += 1
            return 0.0, -(row - 1.0)
        places = [draw(child, (*path, i)) for i, child in enumerate(item)]
        x = 1.0 + max(x for x, _ in places)
        y = sum(y for _, y in places) / len(places)
        for child_x, child_y in places:
            axes.plot(
                [child_x, x - 0.5, x], [child_y, child_y, y], color=GREY, linewidth=1.2, zorder=1
            )
        node = nodes.get(".".join(map(str, path)) or "root")
        axes.plot(x, y, "s", color=KINDS["predicted"].colour, markersize=8, zorder=3)
        if node is not None:
            said = f"{node['evaluations']} points\n{node['tasks']} tasks"
            axes.text(x + 0.08, y, said, ha="left", va="center", fontsize=7, color=INK)
        return x, y

    draw(nested["tree"], ())
    axes.set_xlim(-1.1, stages + 0.9)
    axes.set_ylim(-leaves + 0.3, 0.7)
    axes.set_xticks(range(stages + 1), ["experts", *(f"stage {s}" for s in range(1, stages + 1))])
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return figure


def _leaves(tree: Any) -> Sequence[str]:
    if isinstance(tree, str):
        return [tree]
    return [name for child in tree for name in _leaves(child)]


def tree_section(view: RunView, figures: str) -> str:
    """Return the section of the page on the tree; empty for a flat run.

    Args:
        view: The run.
        figures: The picture, as HTML.
    """
    nested = nested_of(view)
    if nested is None:
        return ""
    cells = ("label", "stage", "tasks", "coefficients", "evaluations", "data_sets")
    heads = ("merge of", "stage", "tasks", "coefficients", "points", "data sets", "promoted")
    head = "".join(f'<th scope="col">{title}</th>' for title in heads)
    rows = []
    for node in nested["nodes"]:
        shown = ["refinement", ""] if not node["stage"] else [node["label"], node["stage"]]
        shown += [node[name] for name in cells[2:]]
        promoted = "<br>".join(
            escape(", ".join(f"{name} {value:.3g}" for name, value in one.items()))
            for one in node.get("handed") or ()
        )
        first, *rest = (escape(str(value)) for value in shown)
        rows.append(
            f'<tr><th scope="row">{first}</th>'
            + "".join(f"<td>{value}</td>" for value in rest)
            + f"<td>{promoted}</td></tr>"
        )
    caption = "Merges in the order in which they were made"
    said = (
        f"{nested['data_sets']} measurements of one task at one point, as many as a flat run makes "
        f"in {float(nested['flat_evaluations']):.1f} evaluations. A merge measures only the tasks "
        "below it."
    )
    return (
        f"{figures}<p>{said}</p>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
