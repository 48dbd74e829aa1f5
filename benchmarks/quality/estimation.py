"""How far is a metric on some examples from the one on all of them, and do intervals say so?

python -m benchmarks.quality.estimation --out benchmarks/results/estimation.json
python -m benchmarks.quality.estimation --only text-4 --draws 4    a part of it, nothing recorded
python -m benchmarks.quality.estimation --smoke                    a small table: does it run?

The outcomes are those of real merges (`benchmarks.quality.outcome_tables`), all of them known, so
every estimate can be compared with the truth. One draw takes one random order of the examples and
40 random merges beside the anchors (the base, the experts and their mean), which are always scored
on all examples. In the *even* design each merge is scored on the first ``n`` examples; in the
*mixed* one, as when rows are topped up, on 25, 50, 100 or 200 of them, at random.

- fresh: the mean over ``n`` examples of the row's own, as without a common order;
- common: the mean over the first ``n`` of the order (`estimated` with ``method="plain"``);
- regression: `map_bo.examples.estimates.estimated`;
- item response: `benchmarks.quality.item_response`, for outcomes of 0 and 1.

*Contrasts* are differences between two merges; their root mean square error is divided by the
square root of 2, so that it is the one of a value whose errors are its own. Coverage is the share
of values (or contrasts) that lie within 1.96 standard errors of their estimate. Errors of one draw
are far from independent; the standard errors of coverage are taken over draws and metrics.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.quality.item_response import item_response
from benchmarks.quality.outcome_tables import TABLES, OutcomeTable, outcome_table
from benchmarks.record import finish
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, MissingDependencyError
from map_bo.examples.estimates import Method, estimated
from map_bo.examples.sets import ExampleOutcomes
from map_bo.rng import child, make_generator

COUNTS = (10, 25, 50, 100, 200)
MIXED = (25, 50, 100, 200)
MERGES = 40
DRAWS = 12
METHODS = ("fresh", "common", "regression", "item response")


@dataclass(frozen=True, eq=False)
class Draw:
    """One metric of some merges, each scored on a part of the examples.

    Attributes:
        X: ``r x d`` coefficients, the anchors first.
        outcomes: ``r x M`` outcomes in the order of the examples.
        counts: ``r`` numbers of examples scored.
        metric: The metric.
        anchors: How many rows are anchors.
    """

    X: Tensor
    outcomes: Tensor
    counts: Tensor
    metric: Metric
    anchors: int

    @classmethod
    def of(cls, table: OutcomeTable, column: int, n: int | None, generator: Generator) -> Draw:
        """Return a draw; ``n`` is None for the mixed design."""
        size, others = table.outcomes.shape[-1], len(table.X) - table.anchors
        chosen = table.anchors + torch.randperm(others, generator=generator)[:MERGES]
        rows = torch.cat([torch.arange(table.anchors), chosen])
        order = torch.randperm(size, generator=generator)
        if n is None:
            levels = torch.tensor([count for count in MIXED if count < size])
            counts = levels[torch.randint(len(levels), (len(rows),), generator=generator)]
        else:
            counts = torch.full((len(rows),), n)
        counts[: table.anchors] = size
        outcomes = table.outcomes[rows, column][:, order]
        return cls(table.X[rows], outcomes, counts, table.metrics[column], table.anchors)

    @property
    def scored(self) -> Tensor:
        """``r x M`` outcomes, NaN where an example was not scored."""
        there = torch.arange(self.outcomes.shape[1]) < self.counts.unsqueeze(-1)
        return torch.where(there, self.outcomes, torch.nan)

    def seen(self) -> Observations:
        """Return what a run would have seen."""
        rows = []
        for outcomes, count in zip(self.outcomes, self.counts.tolist(), strict=True):
            items = torch.arange(count)
            one = ExampleOutcomes(items, outcomes[:count], len(outcomes), (True,))
            rows.append({self.metric.name: one})
        Y = self.scored.nanmean(-1).unsqueeze(-1)
        return Observations(self.X, Y, (self.metric,), examples=tuple(rows))

    def estimates(self, method: str, generator: Generator) -> tuple[Tensor, Tensor | None] | None:
        """Return estimates and the covariance of their errors, if known; None if not possible."""
        if method == "fresh":
            r, size = self.outcomes.shape
            keys = torch.rand(r, size, generator=generator).argsort(-1).argsort(-1)
            own = torch.where(keys < self.counts.unsqueeze(-1), self.outcomes, torch.nan)
            return own.nanmean(-1), None
        if method == "item response":
            if self.metric.kind != "proportion":
                return None
            values, variances = item_response(self.X, self.scored)
            return values, torch.diag(variances)
        how: Method = "plain" if method == "common" else "regression"
        found = estimated(self.seen(), method=how, roughness=False)
        assert found.covariance is not None
        return found.Y[:, 0], found.covariance[0]


def _cell(draw: Draw, method: str, generator: Generator) -> Iterator[dict[str, Any]]:
    """Yield the errors of a draw, by the number of examples."""
    found = draw.estimates(method, generator)
    if found is None:
        return
    values, covariance = found
    errors = values - draw.outcomes.mean(-1)
    for n in sorted(set(draw.counts[draw.anchors :].tolist())):
        rows = (draw.counts == n).nonzero().flatten()
        rows = rows[rows >= draw.anchors]
        first, second = torch.triu_indices(len(rows), len(rows), 1)
        apart = errors[rows][first] - errors[rows][second]
        cell: dict[str, Any] = {
            "n": n,
            "square": float(errors[rows].square().mean()),
            "contrast": float(apart.square().mean() / 2) if len(apart) else None,
        }
        if covariance is not None:
            own = covariance[rows][:, rows]
            variance = own.diagonal()
            cell["covered"] = float((errors[rows].abs() <= 1.96 * variance.sqrt()).double().mean())
            cell["variance"] = float(variance.mean())
            if len(apart) and method != "item response":
                both = variance[first] + variance[second] - 2 * own[first, second]
                inside = apart.abs() <= 1.96 * both.clamp_min(0.0).sqrt()
                cell["contrasts covered"] = float(inside.double().mean())
        yield cell


def measure(name: str, draws: int, rows: int | None = None) -> list[dict[str, Any]]:
    """Return the errors of all draws of a table."""
    table = outcome_table(name, rows, progress=True)
    size, found = table.outcomes.shape[-1], []
    for j, metric in enumerate(table.metrics):
        for n in [*(count for count in COUNTS if count < size), None]:
            for number in range(draws):
                generator = child(make_generator(20261201), name, metric.name, n or 0, number)
                draw = Draw.of(table, j, n, generator)
                about = {
                    "table": name,
                    "metric": metric.name,
                    "draw": number,
                    "design": "mixed" if n is None else "even",
                    "size": size,
                }
                for method in METHODS:
                    found += [
                        about | {"method": method} | cell for cell in _cell(draw, method, generator)
                    ]
    return found


def _seconds() -> float:
    """Return the processor time of one call: 200 rows of 8 metrics on up to 2,000 examples."""
    generator = make_generator(0)
    names, size = [f"task {j}" for j in range(8)], 2000
    levels = torch.tensor([size, 50, 100, 200, 400, 800])
    counts = levels[torch.randint(len(levels), (200,), generator=generator)]
    common = torch.randn(8, size, generator=generator)
    rows, Y = [], torch.zeros(200, 8)
    for i, n in enumerate(counts.tolist()):
        own = (common + 0.6 * torch.randn(8, size, generator=generator) > 0).double()
        Y[i] = own[:, :n].mean(-1)
        rows.append(
            {
                name: ExampleOutcomes(torch.arange(n), own[j, :n], size, (True,))
                for j, name in enumerate(names)
            }
        )
    X = torch.rand(200, 8, generator=generator)
    seen = Observations(X, Y, tuple(Metric(name) for name in names), examples=tuple(rows))
    start = time.process_time()
    estimated(seen)
    return time.process_time() - start


Rows = Sequence[dict[str, Any]]


def _root(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    return f"{sqrt(mean(values)):.4f}" if values else ""


def _share(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows if row.get(key) is not None]
    if len(values) < 2:
        return ""
    return f"{mean(values):.3f} ({stdev(values) / sqrt(len(values)):.3f})"


def _groups(rows: Rows) -> Iterator[tuple[str, Callable[[str], Rows]]]:
    keys = dict.fromkeys((row["table"], row["size"], row["design"], row["n"]) for row in rows)
    for key in sorted(keys, key=lambda key: (list(TABLES).index(key[0]), *key[2:])):
        held = [row for row in rows if (row["table"], row["size"], row["design"], row["n"]) == key]

        def of(method: str, held: Rows = tuple(held)) -> Rows:
            return [row for row in held if row["method"] == method]

        name, size, design, n = key
        yield f"| {name} | {size} | {design} | {n} |", of


def full_tables(rows: Rows) -> list[str]:
    """Return two Markdown tables by case: root mean square errors, and coverage."""
    lines = [
        "Root mean square error of the metric on all examples:",
        "",
        "| merges | examples | design | n | fresh | common | regression | item response | "
        "contrasts, common | contrasts, regression |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for start, of in _groups(rows):
        cells = [_root(of(method), "square") for method in METHODS]
        cells += [_root(of(method), "contrast") for method in ("common", "regression")]
        lines.append(f"{start} {' | '.join(cells)} |")
    lines += [
        "",
        "Share of 95 % intervals that hold the metric on all examples (standard error):",
        "",
        "| merges | examples | design | n | common | regression | item response | "
        "contrasts, common | contrasts, regression |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for start, of in _groups(rows):
        cells = [_share(of(method), "covered") for method in METHODS[1:]]
        cells += [_share(of(method), "contrasts covered") for method in METHODS[1:3]]
        lines.append(f"{start} {' | '.join(cells)} |")
    return lines


def short_table(rows: Rows) -> list[str]:
    """Return a Markdown table: root mean square errors as shares of common's, and coverage.

    Shares are geometric means over the cases, coverage that of the case with the least and of the
    one with the most.
    """
    lines = [
        "| design | n | common | fresh | regression | item response | contrasts, common | "
        "contrasts, regression | coverage | coverage of contrasts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for design, n in sorted({(row["design"], row["n"]) for row in rows}):
        here = [row for row in rows if (row["design"], row["n"]) == (design, n)]
        cases: dict[str, Rows] = {
            name: [row for row in here if row["table"] == name]
            for name in dict.fromkeys(row["table"] for row in here)
        }

        def mean_of(name: str, method: str, key: str, cases: dict[str, Rows] = cases) -> float:
            values = [row.get(key) for row in cases[name] if row["method"] == method]
            known = [value for value in values if value is not None]
            return mean(known) if known else nan

        def share(method: str, key: str, cases: dict[str, Rows] = cases) -> str:
            ratios = [
                sqrt(mean_of(name, method, key) / mean_of(name, "common", "square"))
                for name in cases
            ]
            known = [ratio for ratio in ratios if ratio == ratio]
            return f"{geometric_mean(known):.2f}" if known else ""

        cells = [share(m, "square") for m in ("fresh", "regression", "item response")]
        cells += [share(m, "contrast") for m in ("common", "regression")]
        for key in ("covered", "contrasts covered"):
            values = [mean_of(name, "regression", key) for name in cases]
            cells.append(f"{min(values):.2f} to {max(values):.2f}")
        lines.append(f"| {design} | {n} | 1 | {' | '.join(cells)} |")
    return lines


def _missing(name: str) -> str | None:
    """Return why a table cannot be had here, or None."""
    try:
        outcome_table(name, 0)
    except (DataError, MissingDependencyError) as error:
        return error.message
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--draws", type=int, default=DRAWS, help="orders of the examples")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        found = measure("digits-4", 1, rows=12)
        lines = [*short_table(found), "", *full_tables(found)]
        finish("Estimates from some examples", lines, {}, None)
        return
    found, absent = [], {}
    for name in options.only:
        reason = _missing(name)
        if reason is None:
            found += measure(name, options.draws)
        else:
            absent[name] = reason
            print(f"{name} is left out: {reason}")
    seconds = _seconds()
    lines = [
        *short_table(found),
        "",
        f"One call for 200 rows of 8 metrics with 50 to 2,000 examples: {seconds:.2f} s.",
    ]
    full = full_tables(found)
    print("\n".join(full))
    data = {"seconds": seconds, "absent": absent, "full": full, "cells": _means(found)}
    finish("Estimates from some examples", lines, data, options.out)


def _means(rows: Rows) -> list[dict[str, Any]]:
    """Return the means over draws, by table, metric, design, number of examples and method."""
    keys = ("table", "metric", "size", "design", "n", "method")
    held: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        held.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for key, those in held.items():
        cell = dict(zip(keys, key, strict=True)) | {"draws": len(those)}
        for what in ("square", "contrast", "covered", "variance", "contrasts covered"):
            values = [row[what] for row in those if row.get(what) is not None]
            if values:
                cell[what] = round(mean(values), 8)
        found.append(cell)
    return found


if __name__ == "__main__":
    main()
