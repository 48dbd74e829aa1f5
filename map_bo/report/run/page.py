"""A run as one page: self-contained, without scripts, for any screen, reader or printer."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from map_bo.data import Metric
from map_bo.report.files import write_whole
from map_bo.report.normalised import OwnScores, normalised_rows, normalised_words
from map_bo.report.numbers import coefficients, interval, metric_value, ratio, share, volume
from map_bo.report.page_style import STYLE, styled
from map_bo.report.run.certainty import (
    calibration_rows,
    calibration_words,
    has_corrected,
    has_feasible,
    has_probability,
    hypervolume_words,
    optimism_rows,
    optimism_words,
    pit_rows,
)
from map_bo.report.run.content import (
    facts,
    failure_rows,
    hypervolume_rows,
    hypervolume_scale,
    metric_rows,
    notes,
)
from map_bo.report.run.plots import describe_plot
from map_bo.report.run.tree_plot import tree_section
from map_bo.report.run.verdict import (
    COLUMNS,
    comparison_rows,
    confirmed_tables,
    verdict_lines,
)
from map_bo.report.view import (
    RunView,
    anchor_values,
    representative_rows,
    verification_rows,
)

__all__ = ["write_html"]

_CAPTIONS = {
    "front": "The predicted front, the measured points, and the baselines.",
    "tree": "The merge tree, with the number of points that each merge measured.",
    "progress": "Hypervolume of the observed points after each evaluation.",
}


def write_html(view: RunView, path: Path, plots: Sequence[Path]) -> None:
    """Write the page of a run.

    Everything is in the one file, plots included; nothing is fetched from anywhere.

    Args:
        view: The run.
        path: Where the page goes.
        plots: PNG files to embed, in this order; their stems name what they show.

    Raises:
        OSError: When a plot cannot be read or the page cannot be written.
    """
    trees = [plot for plot in plots if plot.stem == "tree"]
    plots = [plot for plot in plots if plot.stem != "tree"]
    sections = [
        ("run", "The run", _run(view)),
        ("front", "The front", _front(view, plots)),
        ("verdict", "Verdict", _verdict(view)),
        ("tree", "The merge tree", tree_section(view, "".join(_figures(view, trees)))),
        ("normalised", "Normalised by each expert's own", _normalised(view)),
        ("hypervolume", "Hypervolume", _hypervolume(view, plots)),
        ("evaluations", "Evaluations", _evaluations(view)),
        ("calibration", "Calibration of the surrogate", _calibration(view)),
        ("versions", "Versions", _versions(view)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{content}</section>\n'
        for name, title, content in sections
    )
    title = escape(f"Run {view.title}")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{styled(STYLE)}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n'
        f"</head>\n<body>\n<header><h1>{title}</h1>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}</main>\n</body>\n</html>\n"
    )
    write_whole(path, page)


def _run(view: RunView) -> str:
    items = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in facts(view)
    )
    said = notes(view)
    listed = "".join(f"<li>{escape(note)}</li>" for note in said)
    return f'<dl class="facts">{items}</dl>' + (f"<h3>Notes</h3><ul>{listed}</ul>" if said else "")


def _verdict(view: RunView) -> str:
    """Return whether the choice is better than what was there anyway, and what was confirmed."""

    def rows(cells: Iterable[Sequence[str]]) -> list[str]:
        return [
            f'<tr><th class="name" scope="row">{escape(row[0])}</th>'
            + "".join(f'<td class="name">{escape(cell)}</td>' for cell in row[1:])
            + "</tr>"
            for row in cells
        ]

    def head(titles: Iterable[str]) -> str:
        return "<tr>" + "".join(_column(title, name=True) for title in titles) + "</tr>"

    def listed(lines: Iterable[str]) -> str:
        return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"

    parts, lines = [], verdict_lines(view)
    if lines:
        caption = "Gains of the choice for all metrics alike; positive is better."
        table = _table(caption, head(COLUMNS), rows(comparison_rows(view)))
        parts = [f"<p><strong>{escape(lines[0])}</strong></p>", listed(lines[1:]), table]
    for one in confirmed_tables(view):
        caption = f"Measured after the run on {one.where}, beside what the search says."
        parts += [_table(caption, head(one.head), rows(one.rows)), listed(one.lines)]
    return "".join(parts)


def _front(view: RunView, plots: Sequence[Path]) -> str:
    front, rows = view.front, representative_rows(view)
    real = int(front.verified.sum())
    said = (
        f"{real} of the {len(front)} points were measured; only these have real values."
        if real
        else "No point was measured: all values are predictions."
    )
    if has_corrected(view):
        said += " Corrected values are predictions with the measured points among the data."
    if has_probability(view):
        said += (
            " The probability is that no other point, of the front or evaluated, dominates the "
            "point, under the posterior of the surrogate."
        )
    if has_feasible(view):
        said += (
            " Feasible is the probability that the evaluation of a point works and that it keeps "
            "the constraints of the run."
        )
    few = _front_table(view, rows, f"{len(rows)} representative points of the front.")
    parts = [*_figures(view, [p for p in plots if p.stem != "progress"]), f"<p>{said}</p>", few]
    if len(rows) < len(front):
        every = _front_table(view, range(len(front)), "All points, as in front.csv.")
        parts.append(f"<details><summary>All {len(front)} points</summary>{every}</details>")
    return "".join(parts)


def _normalised(view: RunView) -> str:
    if not view.normalised:
        return ""
    names = "".join(_column(metric.name) for metric in view.metrics)
    head = f"<tr>{_column('model', name=True)}{_column('values')}{names}{_column('mean')}</tr>"
    body = [
        f'<tr><th class="name" scope="row">{escape(label)}</th><td>{kind}</td>'
        + "".join(f"<td>{ratio(value)}</td>" for value in shares)
        + "</tr>"
        for label, kind, shares in normalised_rows(view)
    ]
    own = OwnScores.of(view.seen, view.space)
    said = escape(normalised_words(view.metrics, own))
    return f"<p>{said}</p>" + _table("Shares of the experts' own scores.", head, body)


def _figures(view: RunView, plots: Iterable[Path]) -> list[str]:
    figures = []
    for plot in plots:
        image = base64.b64encode(plot.read_bytes()).decode("ascii")
        caption = escape(_CAPTIONS.get(plot.stem, plot.stem))
        # On a phone many small panels would be unreadable, so they scroll instead.
        wide = ' class="wide"' if plot.stem == "front" and len(view.metrics) > 2 else ""
        figures.append(
            '<figure><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{caption}"><img{wide} src="data:image/png;base64,{image}" '
            f'alt="{escape(describe_plot(view, plot.stem))}"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return figures


def _front_table(view: RunView, rows: Iterable[int], caption: str) -> str:
    front, metrics, d = view.front, view.metrics, view.space.d
    corrected, probability = has_corrected(view), has_probability(view)
    feasible = has_feasible(view)
    groups = [
        f'<th class="group" scope="colgroup" colspan="{span}">{title}</th>'
        for title, span in (
            ("coefficients", d),
            ('<span class="predicted">predicted</span> (95 % interval)', len(metrics)),
            *([('<span class="predicted">corrected</span>', len(metrics))] if corrected else []),
            ('<span class="real">real</span>', len(metrics)),
        )
    ]
    if probability:
        groups.append('<th scope="col" rowspan="2">probability</th>')
    if feasible:
        groups.append('<th scope="col" rowspan="2">feasible</th>')
    names = [*view.space.names, *[x.name for x in metrics] * (3 if corrected else 2)]
    head = (
        f'<tr><th scope="col" rowspan="2">point</th>{"".join(groups)}</tr>'
        f"<tr>{''.join(_column(name) for name in names)}</tr>"
    )
    values = (front.X, front.mean, front.lower, front.upper, front.real)
    X, mean, lower, upper, real = (value.tolist() for value in values)
    later, chances = front.corrected.tolist(), front.probability.tolist()
    body = []
    for row in rows:
        cells = [f"<td>{escape(text)}</td>" for text in coefficients(X[row], view.space)]
        for metric, value, low, high in zip(
            metrics, mean[row], lower[row], upper[row], strict=True
        ):
            between = interval(low, high, metric)
            cells.append(
                f'<td class="predicted">{metric_value(value, metric)} <small>{between}</small></td>'
            )
        if corrected:
            cells += [
                f'<td class="predicted">{metric_value(value, metric)}</td>'
                for value, metric in zip(later[row], metrics, strict=True)
            ]
        cells += _real_cells(real[row], metrics)
        if probability:
            cells.append(f"<td>{escape(share(chances[row]))}</td>")
        if feasible:
            cells.append(f"<td>{escape(share(float(front.feasible[row])))}</td>")
        body.append(f'<tr><th scope="row">{row}</th>{"".join(cells)}</tr>')
    return _table(caption, head, body)


def _real_cells(values: Sequence[float], metrics: Sequence[Metric]) -> list[str]:
    return [
        f'<td class="real">{metric_value(value, metric)}</td>'
        for value, metric in zip(values, metrics, strict=True)
    ]


def _hypervolume(view: RunView, plots: Sequence[Path]) -> str:
    volumes = []
    for name, kind, value in hypervolume_rows(view):
        shown = "not measured" if value is None else volume(value)
        cells = ("", shown) if kind == "real" else (shown, "")
        volumes.append(
            f'<tr><th class="name" scope="row">{escape(name)}</th>'
            f'<td class="predicted">{cells[0]}</td><td class="real">{cells[1]}</td></tr>'
        )
    head = f"<tr>{_column('of', name=True)}{_column('predicted')}{_column('real')}</tr>"
    metrics = [
        f'<tr><th class="name" scope="row">{escape(row[0])}</th>'
        f'<td class="name">{row[1]}</td>'
        + "".join(f"<td>{cell}</td>" for cell in row[2:])
        + "</tr>"
        for row in metric_rows(view)
    ]
    columns = _column("metric", name=True) + _column("direction", name=True)
    columns += "".join(map(_column, ("reference point", "best expert", "optimism")))
    certain = hypervolume_words(view)
    optimism = (
        "Optimism is predicted minus real, averaged over the verified points; it is positive "
        "when the prediction was too good, whatever the direction."
    )
    measured = f"<p>{optimism}</p>" if bool(view.front.verified.any()) else ""
    return (
        f"<p>{escape(hypervolume_scale(view))}</p>"
        + _table("Hypervolumes, larger is better.", head, volumes)
        + (f"<p>{escape(certain)}</p>" if certain else "")
        + _table("The metrics and their scale, in their own units.", f"<tr>{columns}</tr>", metrics)
        + (_optimism(view) or measured)
        + "".join(_figures(view, [plot for plot in plots if plot.stem == "progress"]))
    )


def _optimism(view: RunView) -> str:
    """Return optimism as estimated, measured and corrected; empty where none is known."""
    rows = [
        f'<tr><th class="name" scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in optimism_rows(view)
    ]
    if not rows:
        return ""
    columns = "".join(map(_column, ("estimated", "measured", "corrected")))
    head = f"<tr>{_column('metric', name=True)}{columns}</tr>"
    words = f"<p>{escape(optimism_words(view))}</p>"
    return _table("Optimism of the prediction, in the metrics' own units.", head, rows) + words


def _evaluations(view: RunView) -> str:
    failures = failure_rows(view)
    parts = []
    if failures:
        rows = [
            f'<tr><th scope="row">{number}</th><td class="long">{escape(reason)}</td></tr>'
            for number, reason in failures
        ]
        head = f"<tr>{_column('evaluation')}{_column('reason', name=True)}</tr>"
        caption = "Evaluations that failed; they have no score."
        if bool((view.seen.partial & view.seen.failed_rows).any()):
            caption += " Where some metrics were measured, the surrogate is fitted to these."
        parts.append(_table(caption, head, rows))
    else:
        parts.append("<p>No evaluation failed.</p>")
    every = _evaluations_table(view)
    parts.append(f"<details><summary>All {len(view.seen)} evaluations</summary>{every}</details>")
    return "".join(parts)


def _evaluations_table(view: RunView) -> str:
    seen, metrics = view.seen, view.metrics
    anchors = {anchor.row: anchor.name for anchor in anchor_values(view)}
    checked = verification_rows(view).tolist()
    head = (
        '<tr><th scope="col" rowspan="2">evaluation</th><th class="name" scope="col" rowspan="2">'
        f'point</th><th class="group" scope="colgroup" colspan="{view.space.d}">coefficients</th>'
        f'<th class="group" scope="colgroup" colspan="{len(metrics)}">'
        '<span class="real">real</span></th><th scope="col" rowspan="2">seconds</th></tr><tr>'
        + "".join(_column(name) for name in (*view.space.names, *(x.name for x in metrics)))
        + "</tr>"
    )
    rows = []
    partial = seen.partial.tolist()
    aside = {(one["evaluation"], one["metric"]) for one in view.summary.get("outliers") or ()}
    data = zip(seen.X.tolist(), seen.Y.tolist(), seen.cost.tolist(), seen.failures, strict=True)
    for i, (x, y, cost, failure) in enumerate(data):
        what = anchors.get(i, "verification" if checked[i] else "search")
        cells = "".join(f"<td>{escape(text)}</td>" for text in coefficients(x, view.space))
        shown = [
            cell.replace("</td>", " (outlier)</td>") if (i + 1, metric.name) in aside else cell
            for cell, metric in zip(_real_cells(y, metrics), metrics, strict=True)
        ]
        if partial[i]:
            lacking = "failed" if failure is not None else "not measured"
            cells += "".join(
                f"<td>{lacking}</td>" if math.isnan(value) else cell
                for value, cell in zip(y, shown, strict=True)
            )
        elif failure is None:
            cells += "".join(shown)
        else:
            cells += f'<td colspan="{len(metrics)}">failed</td>'
        spent = "" if math.isnan(cost) else f"{cost:.2f}"
        rows.append(
            f'<tr><th scope="row">{i + 1}</th><td class="name">{escape(what)}</td>{cells}'
            f"<td>{spent}</td></tr>"
        )
    caption = "Every evaluation in order, as in evaluations.csv."
    if seen.covariance is not None:
        caption += (
            " What was scored on some of the examples is estimated for all of them; n:METRIC in "
            "that file says on how many."
        )
    return _table(caption, head, rows)


def _calibration(view: RunView) -> str:
    """Return the leave-one-out results; empty where the surrogate has none."""
    rows = calibration_rows(view)
    if not rows:
        return ""

    def body(lines: Sequence[Sequence[str]]) -> list[str]:
        return [
            f'<tr><th class="name" scope="row">{escape(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in lines
        ]

    titles = ("95 % coverage", "log density", "error")
    head = f"<tr>{_column('metric', name=True)}{''.join(map(_column, titles))}</tr>"
    words, pit = calibration_words(view), pit_rows(view)
    tenths = "".join(_column(f"{i / 10:.1f}") for i in range(len(pit[0]) - 1)) if pit else ""
    histogram = _table(
        "Evaluations by the predicted probability of a smaller value, in steps of a tenth.",
        f"<tr>{_column('metric', name=True)}{tenths}</tr>",
        body(pit),
    )
    return (
        f"<p>{escape(words)}</p>"
        + _table("Every evaluation predicted from all others, on the link scale.", head, body(rows))
        + (f"<details><summary>PIT histogram</summary>{histogram}</details>" if pit else "")
    )


def _versions(view: RunView) -> str:
    summary = view.summary
    items = [("map_bo commit", summary.get("commit") or "not in a checkout")]
    items += list((summary.get("versions") or {}).items())
    listed = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in items
    )
    whole = escape(json.dumps(_readable(summary), indent=2, ensure_ascii=False))
    return (
        f'<dl class="facts">{listed}</dl><details><summary>The whole summary</summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="Summary"><pre>{whole}</pre>'
        "</div></details>"
    )


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _readable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _column(title: str, *, name: bool = False) -> str:
    attribute = ' class="name"' if name else ""
    return f'<th{attribute} scope="col">{escape(title)}</th>'


def _table(caption: str, head: str, rows: Sequence[str]) -> str:
    """Return a table in a container of its own that scrolls, also by keyboard."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead>{head}</thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
