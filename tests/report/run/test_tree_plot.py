from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from map_bo.nested.planning import balanced_tree, most_stages
from map_bo.nested.result import NodeRecord, describe_tree
from map_bo.nested.tree import Group, path_name
from map_bo.report.run.tree_plot import nested_of, tree_figure, tree_section, tree_words
from map_bo.report.view import RunView
from tests.report.fake_views import make_view


def view_of(tree: Group, refined: bool = False) -> RunView:
    """A run over a tree, whose nodes promoted half of each expert."""
    names = tree.leaves
    nodes = [
        NodeRecord(
            path_name(path),
            node.label,
            node.stage,
            len(node.leaves),
            len(node.children),
            10 + number,
            7 * number,
            (dict.fromkeys(node.leaves, 0.5),) * 2 if path else (),
        )
        for number, (path, node) in enumerate(tree.nodes())
    ]
    if refined:
        nodes.append(NodeRecord("refine", tree.label, 0, len(names), len(names), 33, 44))
    view = make_view(2)
    summary = {**view.summary, "nested": describe_tree(tree, nodes, 321, len(names))}
    return dataclasses.replace(view, summary=summary)


class Cells(HTMLParser):
    """The rows of a table as text; fails on markup that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def cells(section: str) -> list[list[str]]:
    parser = Cells()
    parser.feed(section)
    assert not parser.open
    return parser.rows


TREE = Group.of([["a", "b"], ["c", "d"], "e"])


def test_the_section_has_a_row_for_every_merge_in_order() -> None:
    section = tree_section(view_of(TREE, refined=True), "<figure></figure>")
    assert section.startswith("<figure></figure>")
    assert "321 measurements of one task at one point" in section
    assert "a flat run makes in 64.2 evaluations" in section
    head, *rows = cells(section)
    assert head == [
        "merge of", "stage", "tasks", "coefficients", "points", "data sets", "promoted",
    ]  # fmt: skip
    assert [row[:6] for row in rows] == [
        ["a+b", "1", "2", "2", "10", "0"],
        ["c+d", "1", "2", "2", "11", "7"],
        ["a+b+c+d+e", "2", "5", "3", "12", "14"],
        ["refinement", "", "5", "5", "33", "44"],
    ]
    assert rows[0][6] == "a 0.5, b 0.5" * 2
    assert rows[2][6] == ""


def test_names_are_escaped() -> None:
    tree = Group(("<script>alert(1)</script>", 'a & "b"'))
    section = tree_section(view_of(Group((tree, "<b>"))), "")
    assert "<script" not in section
    assert "<b>" not in section
    rows = cells(section)
    assert rows[1][0].startswith('<script>alert(1)</script>+a & "b"')
    assert '<script>alert(1)</script> 0.5, a & "b" 0.5' in rows[1][6]


def test_words_say_how_large_the_tree_is() -> None:
    assert tree_words(view_of(TREE, refined=True)) == (
        "Tree of 3 merges in 2 stages over 2 experts. The table below lists its nodes."
    )


def test_a_flat_run_has_neither_section_nor_tree() -> None:
    view = make_view(2)
    assert nested_of(view) is None
    assert tree_section(view, "<figure></figure>") == ""
    assert tree_words(view) == "merge tree"
    with pytest.raises(ValueError, match="a flat run has no tree"):
        tree_figure(view)
    other = dataclasses.replace(view, summary={**view.summary, "nested": None})
    assert tree_section(other, "") == ""


SHAPES = [
    Group(("a", "b")),
    Group(("only",)),
    Group.of([[["a", "b"], "c"], "d"]),
    Group((r"$\frac{1}$", "x" * 60, "<b>", "100%", "日本")),
    *(balanced_tree([f"e{i}" for i in range(n)], s) for n in (3, 8) for s in (1, most_stages(n))),
    balanced_tree([f"expert {i}" for i in range(16)], 4),
]


@pytest.mark.filterwarnings("ignore:Glyph")  # a font need not have every script
@pytest.mark.parametrize("tree", SHAPES, ids=lambda tree: f"{len(tree.leaves)}-{tree.stage}")
def test_the_figure_draws_every_expert_and_merge(tree: Group) -> None:
    figure = tree_figure(view_of(tree))
    out = BytesIO()
    figure.savefig(out, format="png", dpi=40)
    assert out.getvalue().startswith(b"\x89PNG")
    [axes] = figure.axes
    merges = len(list(tree.nodes()))
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(tree.leaves) + merges
    assert sum("points\n" in text for text in texts) == merges
    marks = [line.get_marker() for line in axes.lines]
    assert marks.count("o") == len(tree.leaves)
    assert marks.count("s") == merges
    # Experts stand at 0, one below the other, and a merge right of all that it merges.
    places: dict[str, list[list[float]]] = {"o": [], "s": []}
    for line in axes.lines:
        if line.get_marker() in places:
            places[str(line.get_marker())] += np.asarray(line.get_xydata()).tolist()
    assert places["o"] == [[0.0, -float(i)] for i in range(len(tree.leaves))]
    merged = [x for x, _ in places["s"]]
    assert merged == [float(node.stage) for _, node in tree.nodes()]
    assert max(len(text.split("\n")[0]) for text in texts) <= 24
