"""A comparison as tables and sentences; the page and the Markdown only lay them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from map_bo.report.comparison.bootstrap import LEAST, Estimate
from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.runs import MEASURES, Measure
from map_bo.report.numbers import better, fixed, metric_value

__all__ = [
    "Cell",
    "Link",
    "Table",
    "difference_table",
    "measure_tables",
    "missing_table",
    "runs_table",
    "scale_table",
    "scale_words",
    "summary_words",
    "varied_table",
    "win_rate_tables",
]

_NAMED = 6  # variants beyond which columns of the win-rate matrix have numbers instead of names
_HELD = 24  # variants beyond which the win-rate matrix would be unreadable


@dataclass(frozen=True)
class Link:
    """A cell with a link.

    Attributes:
        text: Its text.
        target: Its target, relative to the report.
    """

    text: str
    target: str


Cell: TypeAlias = str | Link


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        caption: What it holds.
        columns: Titles, as many as every row has cells.
        rows: The cells.
        words: Columns besides the first that hold words instead of numbers.
        matrix: Whether the columns are the same items as the rows, however many these are.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: tuple[int, ...] = ()
    matrix: bool = False


def summary_words(found: Comparison) -> str:
    """Return what was compared, in a sentence."""
    seeds = sorted({run.seed for run in found.runs})
    variants = len(found.variants)
    text = (
        f"{len(found.runs)} finished runs of {variants} "
        f"{'variant' if variants == 1 else 'variants'} with {len(seeds)} "
        f"{'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))})."
    )
    if found.missing:
        text += f" {len(found.missing)} did not finish; they are listed below and not counted."
    return text


def scale_words(found: Comparison) -> str:
    """Return the sentence that states the reference point of every hypervolume."""
    point = ", ".join(
        f"{metric.name} {metric_value(value, metric)}"
        for metric, value in zip(found.metrics, found.scale.point.tolist(), strict=True)
    )
    return (
        f"All hypervolumes have the reference point {point} ({found.scale.rule}). Metrics are "
        "scaled to 0 there and to 1 at the best expert; larger is better."
    )


def varied_table(found: Comparison) -> Table | None:
    """Return the settings that vary and their values; ``None`` where only the seed varies."""
    if not found.keys:
        return None
    rows = tuple((key, ", ".join(found.values[key])) for key in found.keys)
    return Table("The settings that vary, except for the seed.", ("setting", "values"), rows, (1,))


def measure_tables(found: Comparison) -> list[Table]:
    """Return the means of quality and the means of cost of each variant."""
    groups = (
        ("Quality: means over the runs, with 95 % bootstrap intervals.", MEASURES[:4]),
        ("Cost: means over the runs, with 95 % bootstrap intervals.", MEASURES[4:]),
    )
    tables = []
    for caption, measures in groups:
        kept = [m for m in measures if any(found.mean(v, m.name) for v in found.variants)]
        rows = tuple(
            (
                variant,
                str(len(found.of(variant))),
                *(_estimate(found.mean(variant, m.name), m) for m in kept),
            )
            for variant in found.variants
        )
        tables.append(Table(caption, ("variant", "runs", *(_title(m) for m in kept)), rows))
    return tables


def difference_table(found: Comparison) -> Table | None:
    """Return the differences from the baseline, paired by seed; ``None`` for a single variant."""
    if len(found.variants) < 2:
        return None
    kept = [
        measure
        for measure in MEASURES
        if any(found.difference(variant, measure.name) for variant in found.variants[1:])
    ]
    rows = []
    for variant in found.variants[1:]:
        gaps = [found.difference(variant, measure.name) for measure in kept]
        pairs = max((gap.count for gap in gaps if gap is not None), default=0)
        cells = (_difference(gap, measure) for gap, measure in zip(gaps, kept, strict=True))
        rows.append((variant, str(pairs), *cells))
    return Table(
        f"Differences from the baseline ({found.baseline}), paired by seed, with 95 % bootstrap "
        "intervals over the pairs. Those whose interval excludes 0 are marked higher or lower, "
        f"unless there are fewer than {LEAST} pairs.",
        ("variant", "pairs", *(_title(measure) for measure in kept)),
        tuple(rows),
    )


def win_rate_tables(found: Comparison) -> list[Table]:
    """Return the win rates by both definitions, row over column; empty for a single variant."""
    if not 1 < len(found.variants) <= _HELD:
        return []
    what = "of the observed points (real) of the row over those of the column, means over seeds"
    definitions: tuple[tuple[str, Literal["per objective", "dominance"], str], ...] = (
        (
            "Per-objective win rate",
            "per objective",
            "The share of all pairs of front points, over all metrics, in which the row's point is "
            "better; ties count half, so .5 is even.",
        ),
        (
            "Dominance win rate",
            "dominance",
            "The share of pairs of front points in which the row's point dominates the column's.",
        ),
    )
    numbers = [str(number) for number in range(1, len(found.variants) + 1)]
    few = len(found.variants) <= _NAMED
    rows = (
        found.variants
        if few
        else [f"{n}: {name}" for n, name in zip(numbers, found.variants, strict=True)]
    )
    return [
        Table(
            f"{title} {what}. {definition}",
            ("variant", *(found.variants if few else numbers)),
            tuple(
                (
                    name,
                    *(
                        "" if row == column else _rate(found.win_rate(row, column, kind))
                        for column in found.variants
                    ),
                )
                for name, row in zip(rows, found.variants, strict=True)
            ),
            matrix=True,
        )
        for title, kind, definition in definitions
    ]


def scale_table(found: Comparison) -> Table:
    """Return the metrics with their direction and both ends of the scale, in their own units."""
    ends = zip(found.metrics, found.scale.point.tolist(), found.scale.best.tolist(), strict=True)
    return Table(
        "The metrics and their scale, in their own units.",
        ("metric", "direction", "reference point (0)", "best expert (1)"),
        tuple(
            (metric.name, better(metric), metric_value(low, metric), metric_value(high, metric))
            for metric, low, high in ends
        ),
        (1,),
    )


def runs_table(found: Comparison) -> Table:
    """Return every finished run with a link to it."""
    shown = [MEASURES[0], MEASURES[2], MEASURES[4], MEASURES[6]]
    rows: list[tuple[Cell, ...]] = []
    for variant in found.variants:
        for run in found.of(variant):
            values = (
                f"{run.values[m.name]:.0f}"
                if m.name == "evaluations"
                else fixed(run.values[m.name], m.digits)
                for m in shown
            )
            rows.append((Link(f"{variant}, seed {run.seed}", run.record.link), *values))
    return Table(
        "Every finished run.",
        ("run", *(m.title for m in shown)),
        tuple(rows),
    )


def missing_table(found: Comparison) -> Table | None:
    """Return the runs that did not finish, with the reasons; ``None`` where all finished."""
    if not found.missing:
        return None
    rows = tuple(
        (Link(record.name, record.link), record.status, record.reason) for record in found.missing
    )
    return Table("Runs that did not finish.", ("run", "status", "reason"), rows, (1, 2))


def _title(measure: Measure) -> str:
    return f"{measure.title}, {measure.better} is better" if measure.better else measure.title


def _estimate(value: Estimate | None, measure: Measure, *, sign: bool = False) -> str:
    if value is None:
        return "none"
    mean, low, high = (
        fixed(x, measure.digits, sign=sign) for x in (value.mean, value.low, value.high)
    )
    return mean if value.low != value.low else f"{mean} [{low}, {high}]"


def _difference(gap: Estimate | None, measure: Measure) -> str:
    text = _estimate(gap, measure, sign=True)
    return f"{text} {gap.reading}" if gap and gap.reading in ("higher", "lower") else text


def _rate(value: float | None) -> str:
    return "no pair" if value is None else f"{value:.3f}"
