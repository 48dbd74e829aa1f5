"""A run on a terminal: readable in 80 columns, without colour, and when piped to a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from torch import Tensor

from map_bo.data import Metric
from map_bo.report.normalised import OwnScores, normalised_rows, normalised_words
from map_bo.report.numbers import (
    coefficients,
    distinct,
    interval,
    metric_value,
    ratio,
    share,
    volume,
)
from map_bo.report.run.certainty import (
    has_corrected,
    has_feasible,
    has_probability,
    hypervolume_words,
    optimism_rows,
    optimism_words,
)
from map_bo.report.run.content import (
    facts,
    failure_rows,
    hypervolume_rows,
    hypervolume_scale,
    metric_rows,
    notes,
)
from map_bo.report.run.verdict import confirmed_tables, verdict_lines
from map_bo.report.view import RunView, representative_rows
from map_bo.space import CoefficientSpace

__all__ = ["print_choice", "print_summary"]

_SHOWN_FAILURES = 3
_MANY = 5


def print_summary(view: RunView, console: Console) -> None:
    """Print the settings of a run, its results, its baselines, and a few points to choose from.

    Predicted and real values have separate columns.
    """
    _heading(console, f"Run {view.title}")
    about = _table(console, show_header=False)
    about.add_column(style="dim", no_wrap=True)
    about.add_column(overflow="fold")
    for label, text in facts(view):
        about.add_row(_text(console, label), _text(console, text))
    console.print(about)

    nested = view.summary.get("nested")
    if nested:
        _heading(console, "Merge tree")
        console.print(_text(console, str(nested["drawn"])))

    _heading(console, "Metrics")
    metrics = _table(console)
    for title in ("metric", "better", "reference", "best expert", "optimism"):
        metrics.add_column(title, justify="left" if title in ("metric", "better") else "right")
    for row in metric_rows(view):
        metrics.add_row(*(_text(console, part.removesuffix(" is better")) for part in row))
    console.print(metrics)
    if bool(view.front.verified.any()) and not optimism_rows(view):
        console.print(
            _text(
                console,
                "Optimism: predicted minus real; positive means a prediction that was too good.",
            )
        )

    _heading(console, "Hypervolume")
    console.print(_text(console, hypervolume_scale(view)))
    volumes = _table(console)
    volumes.add_column("of")
    volumes.add_column("predicted", justify="right")
    volumes.add_column("real", justify="right")
    for name, kind, value in hypervolume_rows(view):
        shown = "not measured" if value is None else volume(value)
        cells = ("", shown) if kind == "real" else (shown, "")
        volumes.add_row(_text(console, name), *(_text(console, cell) for cell in cells))
    console.print(volumes)
    if hypervolume_words(view):
        console.print(_text(console, hypervolume_words(view)))
    _print_optimism(view, console)

    _print_points(view, console)
    _print_verdict(view, console)
    _print_normalised(view, console)
    failures = failure_rows(view)
    if failures:
        _heading(console, "Failed evaluations")
        for number, reason in failures[:_SHOWN_FAILURES]:
            first = (reason.strip().splitlines() or [""])[0]
            console.print(_text(console, f"evaluation {number}: {first}"))
        if len(failures) > _SHOWN_FAILURES:
            rest = len(failures) - _SHOWN_FAILURES
            console.print(_text(console, f"and {rest} more, see evaluations.csv"))
    if notes(view):
        _heading(console, "Notes")
        for note in notes(view):
            console.print(_text(console, f"- {note}"))


def _print_optimism(view: RunView, console: Console) -> None:
    rows = optimism_rows(view)
    if not rows:
        return
    _heading(console, "Optimism")
    table = _table(console)
    table.add_column("metric", overflow="fold")
    for title in ("estimated", "measured", "corrected"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(_text(console, cell) for cell in row))
    console.print(table)
    console.print(_text(console, optimism_words(view)))


def _print_verdict(view: RunView, console: Console) -> None:
    lines = verdict_lines(view)
    if lines:
        _heading(console, "Verdict")
        for line in lines:
            console.print(_text(console, f"- {line}"))
    for one in confirmed_tables(view):
        _heading(console, f"Confirmed on {one.where}")
        table = _table(console)
        for j, title in enumerate(one.head):
            table.add_column(title, justify="right" if j else "left", overflow="fold")
        for row in one.rows:
            table.add_row(*(_text(console, cell) for cell in row))
        console.print(table)
        for line in one.lines:
            console.print(_text(console, f"- {line}"))


def _print_normalised(view: RunView, console: Console) -> None:
    if not view.normalised:
        return
    _heading(console, "Normalised by each expert's own")
    table = _table(console)
    table.add_column("model", no_wrap=True)
    table.add_column("values", no_wrap=True)
    for name in (*distinct([metric.name for metric in view.metrics], 14), "mean"):
        table.add_column(_text(console, name), justify="right")
    for label, kind, shares in normalised_rows(view):
        table.add_row(_text(console, label), kind, *(ratio(value) for value in shares))
    console.print(table)
    own = OwnScores.of(view.seen, view.space)
    console.print(_text(console, normalised_words(view.metrics, own)))


def print_choice(
    console: Console,
    *,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    x: Tensor,
    mean: Tensor,
    lower: Tensor,
    upper: Tensor,
    real: Tensor,
    corrected: Tensor | None = None,
    own: OwnScores | None = None,
) -> None:
    """Print one chosen point: its coefficients, and its predicted and measured metrics.

    Args:
        console: Where to print.
        space: The coefficients' names.
        metrics: The ``m`` metrics.
        x: ``d`` coefficients.
        mean: ``m`` predicted metrics, own units.
        lower: ``m`` lower ends of their 95 % intervals.
        upper: ``m`` upper ends.
        real: ``m`` measured metrics, NaN where the point was not verified.
        corrected: ``m`` metrics predicted with the verified points among the data; NaN or None
            where there are none, and then their column is left out.
        own: Scores of the tasks' own experts, to show shares of; None for none.
    """
    chosen = _table(console)
    chosen.add_column("coefficient", overflow="fold")
    chosen.add_column("value", justify="right")
    for name, value in space.named(x.tolist()).items():
        shown = _text(console, value) if isinstance(value, str) else f"{value:.4f}"
        chosen.add_row(_text(console, name), shown)
    console.print(chosen)
    console.print()
    values = _table(console)
    values.add_column("metric", overflow="fold")
    known = corrected is not None and bool(corrected.isfinite().any())
    again = corrected if corrected is not None and known else real
    titles = ["predicted", "95 % interval", *(["corrected"] if known else []), "real"]
    shares = None
    if own is not None:
        best_known = torch.where(again.isfinite(), again, mean) if known else mean
        shares = own.normalise(torch.where(real.isfinite(), real, best_known))
        titles.append("normalised")
    for title in titles:
        values.add_column(title, justify="right", no_wrap=True)
    columns = (t.tolist() for t in (mean, lower, upper, again, real))
    for j, (metric, value, low, high, later, measured) in enumerate(
        zip(metrics, *columns, strict=True)
    ):
        values.add_row(
            _text(console, metric.name),
            metric_value(value, metric),
            interval(low, high, metric),
            *([metric_value(later, metric)] if known else []),
            metric_value(measured, metric, missing="not measured"),
            *([] if shares is None else [ratio(float(shares[j]))]),
        )
    console.print(values)
    if own is not None:
        console.print(_text(console, normalised_words(metrics, own)))


def _print_points(view: RunView, console: Console) -> None:
    front = view.front
    rows = representative_rows(view, 7 if len(view.metrics) <= _MANY else 4)
    if len(front) == 1:
        _heading(console, "The point of the front")
    elif len(rows) == len(front):
        _heading(console, f"All {len(front)} points of the front")
    else:
        _heading(console, f"{len(rows)} of the {len(front)} points of the front")
    wide = _matrix(view, console, rows)
    fits = Measurement.get(console, console.options.update(width=10_000), wide).maximum
    wide_enough = fits <= console.width
    console.print(wide if wide_enough else _blocks(view, console, rows))
    if bool(front.verified.any()):
        console.print(_text(console, "Only points that were measured have real values."))
    else:
        console.print(_text(console, "No point was measured: all values are predictions."))
    if has_corrected(view):
        text = "Corrected: predicted again, with the measured points among the data."
        console.print(_text(console, text))
    if has_probability(view):
        where = "prob." if wide_enough else "Under a point's number"
        text = "the probability that no other point, of the front or evaluated, dominates it."
        console.print(_text(console, f"{where}: {text}"))
    if has_feasible(view):
        text = "the probability that its evaluation works and keeps the constraints."
        console.print(_text(console, f"feas.: {text}"))


def _matrix(view: RunView, console: Console, rows: Iterable[int]) -> Table:
    """Return one line per point: coefficients, predicted values, real values."""
    front, table = view.front, _table(console)
    table.add_column("point", justify="right", vertical="bottom")
    titles = distinct(view.space.names, 12)
    names = distinct([metric.name for metric in view.metrics], 14)
    corrected, probability = has_corrected(view), has_probability(view)
    for head, title in (
        *(("coeff.", title) for title in titles),
        *(("predicted", name) for name in names),
        *(("corrected", name) for name in names if corrected),
        *(("real", name) for name in names),
    ):
        table.add_column(_text(console, f"{head}\n{title}"), justify="right", no_wrap=True)
    if probability:
        table.add_column("prob.", justify="right", vertical="bottom", no_wrap=True)
    if has_feasible(view):
        table.add_column("feas.", justify="right", vertical="bottom", no_wrap=True)
    sign = "+-" if console.options.ascii_only else "\u00b1"
    for row in rows:
        predicted = []
        ends = (front.mean[row].tolist(), front.lower[row].tolist(), front.upper[row].tolist())
        for metric, value, low, high in zip(view.metrics, *ends, strict=True):
            text = metric_value(value, metric)
            half = metric_value((high - low) / 2, metric)
            predicted.append(f"{text} {sign}{half}" if half else text)
        later = zip(front.corrected[row].tolist(), view.metrics, strict=True)
        real = zip(front.real[row].tolist(), view.metrics, strict=True)
        table.add_row(
            str(row),
            *(_text(console, text) for text in coefficients(front.X[row].tolist(), view.space)),
            *predicted,
            *(metric_value(value, metric) for value, metric in later if corrected),
            *(metric_value(value, metric) for value, metric in real),
            *([share(float(front.probability[row]))] if probability else []),
            *([share(float(front.feasible[row]))] if has_feasible(view) else []),
        )
    return table


def _blocks(view: RunView, console: Console, rows: Iterable[int]) -> Table:
    """Return one block of lines per point, for runs too wide for one line per point.

    The probabilities are under the number of the point. Where there are corrected values, the
    prediction is followed by half its interval, and the interval has no column.
    """
    front, table = view.front, _table(console)
    table.add_column("point", justify="right", no_wrap=True)
    table.add_column("coefficients", overflow="fold")  # what is long there leaves room for numbers
    table.add_column("metric", no_wrap=True)
    corrected, probability = has_corrected(view), has_probability(view)
    for title in ("predicted", "corrected" if corrected else "95 % interval", "real"):
        table.add_column(title, justify="right", no_wrap=True)
    titles = distinct(view.space.names, 12 if corrected else 14)
    wide = max(map(len, titles))
    names = distinct([metric.name for metric in view.metrics], 12 if corrected else 14)
    for row in rows:
        scales = [
            f"{name:<{wide}} {text:>5}"
            for name, text in zip(
                titles, coefficients(front.X[row].tolist(), view.space), strict=True
            )
            if text
        ]
        left = [str(row), *([share(float(front.probability[row]))] if probability else [])]
        left += ["feas.", share(float(front.feasible[row]))] if has_feasible(view) else []
        for line in range(max(len(scales), len(names), len(left))):
            cells = [""] * 4
            if line < len(names):
                metric = view.metrics[line]
                values = (front.mean, front.lower, front.upper, front.corrected, front.real)
                mean, low, high, later, real = (float(value[row, line]) for value in values)
                between = interval(low, high, metric)
                predicted = metric_value(mean, metric)
                if corrected:
                    half = metric_value((high - low) / 2, metric)
                    predicted, between = f"{predicted} \u00b1{half}", metric_value(later, metric)
                cells = [names[line], predicted, between, metric_value(real, metric)]
            table.add_row(
                left[line] if line < len(left) else "",
                _text(console, scales[line] if line < len(scales) else ""),
                *(_text(console, cell) for cell in cells),
            )
        table.add_section()
    return table


def _table(console: Console, *, show_header: bool = True) -> Table:
    look = box.ASCII2 if console.options.ascii_only else box.SIMPLE
    return Table(
        box=look if show_header else None,
        show_header=show_header,
        header_style="bold",
        show_edge=False,
        pad_edge=False,
    )


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(_text(console, text, style="bold"))


def _text(console: Console, text: str, *, style: str = "") -> Text:
    """Return ``text`` as it is: without markup, and without characters that cannot be shown."""
    if console.options.ascii_only:
        text = (
            text.replace("\u2026", "~")
            .replace("\u00b1", "+-")
            .encode("ascii", "backslashreplace")
            .decode()
        )
    return Text(text.encode("utf-8", "backslashreplace").decode(), style=style)
