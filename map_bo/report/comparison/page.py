"""A comparison as one self-contained page without scripts or network, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from urllib.parse import quote

from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.tables import (
    Cell,
    Link,
    Table,
    difference_table,
    measure_tables,
    missing_table,
    runs_table,
    scale_table,
    scale_words,
    summary_words,
    varied_table,
    win_rate_tables,
)
from map_bo.report.page_style import STYLE, styled

__all__ = ["PLOTS", "comparison_html", "comparison_markdown", "markdown_part", "sections"]

PLOTS = {
    "progress": (
        "Hypervolume of the observed points (real) after each evaluation: mean over the seeds of "
        "each variant, with 95 % bootstrap bands. Runs that stopped early keep their last value."
    ),
    "fronts": (
        "Non-dominated observed points (real) of all seeds of each variant; dashed lines are the "
        "reference point."
    ),
    "cost": (
        "Hypervolume of the observed points (real) against evaluations and against seconds spent "
        "evaluating, choosing and fitting. Small marks are runs, large marks the means of variants."
    ),
}
"""Name of each plot -> what it shows."""

_EXTRA = """
th.name, td.name { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
thead th { white-space: normal; min-width: 5.5rem; max-width: 16rem; }
caption span { display: block; position: sticky; left: 0;
  max-width: min(44rem, calc(100vw - 2rem)); }
table.matrix thead th { min-width: 0; }
@media print {
  caption span { max-width: 18cm; }
  table.matrix { font-size: 6pt; }
  table.matrix th, table.matrix td { padding: .1rem; }
  table.matrix td { white-space: nowrap; } }
"""


def sections(found: Comparison) -> list[tuple[str, str, list[str | Table]]]:
    """Return anchor, title and content of every section; a plot is the text ``plot:NAME``."""
    varied, gaps, missing = varied_table(found), difference_table(found), missing_table(found)
    wins = win_rate_tables(found)
    quality, cost = measure_tables(found)
    same = "Only the seed varied."
    crowded = (
        [f"The win rates of {len(found.variants)} variants, each over each, are left out."]
        if len(found.variants) > 1
        else []
    )
    every: list[tuple[str, str, list[str | Table]]] = [
        (
            "compared",
            "Runs compared",
            [summary_words(found), varied if varied else same, *found.notes],
        ),
        ("quality", "Quality", [scale_words(found), quality, *([gaps] if gaps else [])]),
        ("progress", "Progress", ["plot:progress"]),
        ("fronts", "Fronts", ["plot:fronts", *(wins or crowded)]),
        ("cost", "Cost against quality", ["plot:cost", cost]),
        ("scale", "Scale", [scale_table(found)]),
        ("runs", "Runs", [runs_table(found)]),
    ]
    if missing:
        every.append(("missing", "Runs that did not finish", [missing]))
    return every


def comparison_html(found: Comparison, plots: Mapping[str, bytes]) -> str:
    """Return the page of a comparison.

    Args:
        found: The comparison.
        plots: PNG of each plot by its name in :data:`PLOTS`.
    """
    title = escape(f"Comparison of {found.title}")
    every = sections(found)
    links = "".join(f'<li><a href="#{name}">{text}</a></li>' for name, text, _ in every)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{text}</h2>'
        f"{''.join(_html(part, found, plots) for part in parts)}</section>\n"
        for name, text, parts in every
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{styled(STYLE + _EXTRA)}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n'
        f"</head>\n<body>\n<header><h1>{title}</h1>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _html(part: str | Table, found: Comparison, plots: Mapping[str, bytes]) -> str:
    if isinstance(part, Table):
        return _html_table(part)
    if not part.startswith("plot:"):
        return f"<p>{escape(part)}</p>"
    name = part.removeprefix("plot:")
    image = base64.b64encode(plots[name]).decode("ascii")
    caption = escape(PLOTS[name])
    wide = (
        ' class="wide"' if name == "cost" or (name == "fronts" and len(found.metrics) > 2) else ""
    )
    alt = escape(
        f"{PLOTS[name]} Variants: {'; '.join(found.variants)}. The tables hold the values."
    )
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f'<img{wide} src="data:image/png;base64,{image}" alt="{alt}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _html_table(table: Table) -> str:
    words = {0, *table.words}

    def kind(i: int) -> str:
        return ' class="name"' if i in words else ""

    head = "".join(
        f'<th{kind(i)} scope="col">{escape(title)}</th>' for i, title in enumerate(table.columns)
    )
    rows = []
    for row in table.rows:
        cells = "".join(
            f'<th{kind(0)} scope="row">{_html_cell(cell)}</th>'
            if i == 0
            else f"<td{kind(i)}>{_html_cell(cell)}</td>"
            for i, cell in enumerate(row)
        )
        rows.append(f"<tr>{cells}</tr>")
    caption = escape(table.caption)
    square = ' class="matrix"' if table.matrix else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table{square}>'
        f"<caption><span>{caption}</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f'<a href="{escape(cell.target)}">{escape(cell.text)}</a>'
    return escape(cell)


def comparison_markdown(found: Comparison) -> str:
    """Return the comparison as Markdown; its plots are the files ``comparison/NAME.png``."""
    lines = [f"# Comparison of {_plain(found.title)}", ""]
    for _, title, parts in sections(found):
        lines += [f"## {title}", ""]
        for part in parts:
            lines += [*markdown_part(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def markdown_part(part: str | Table) -> list[str]:
    """Return a table, a sentence or a plot (``plot:NAME``) as lines of Markdown."""
    if isinstance(part, Table):
        return [_plain(part.caption), "", *_markdown_table(part)]
    if part.startswith("plot:"):
        name = part.removeprefix("plot:")
        return [f"![{PLOTS[name]}](comparison/{name}.png)"]
    return [_plain(part)]


def _markdown_table(table: Table) -> list[str]:
    words = {0, *table.words}
    rule = [":--" if i in words else "--:" for i in range(len(table.columns))]
    rows = [[_plain(title) for title in table.columns], rule]
    rows += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in rows]


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, Link):
        return f"[{_plain(cell.text)}]({quote(cell.target, safe='/%=,+@~:')})"
    return _plain(cell)


def _plain(text: str) -> str:
    """Return ``text`` on one line, escaped so that Markdown shows it as it is."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
