"""Tables and the plot of nested against flat merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.quality.plots import save_figure
from map_bo.report.comparison.bootstrap import mean_interval

__all__ = ["TARGET", "figure", "fitted", "needed", "short", "tables"]

TARGET = 0.02
"""Regret that counts as good enough, in units of the best expert."""

Row = Mapping[str, Any]
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#999999")
_MARKS = "osD^vP*X"


def _held(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _methods(rows: Sequence[Row]) -> list[str]:
    return sorted({row["method"] for row in rows}, key=lambda name: (name != "flat", name))


def needed(rows: Sequence[Row], n: int, method: str) -> tuple[float, bool] | None:
    """Return the fewest data sets at which the mean regret over seeds is at most the target.

    Returns:
        The number, and whether it is only a bound, being the smallest that was tried; None where
        the target was not reached.
    """
    tried: dict[float, float] = {}
    for budget in {row["budget"] for row in rows}:
        own = _held(rows, experts=n, method=method, budget=budget)
        if own:
            cost = float(np.mean([row["data_sets"] for row in own]))
            tried[cost] = _mean(own)
    reached = [cost for cost, regret in tried.items() if regret <= TARGET]
    return (min(reached), min(reached) == min(tried)) if reached else None


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Return ``a`` and its share of explained variance for ``cost = a N log2 N``.

    Least squares on logarithms, so that every N counts the same; None below two points.
    """
    held = [(n, cost) for n, cost in points if n > 1]
    if len(held) < 2:
        return None
    logs = np.array([math.log(cost / (n * math.log2(n))) for n, cost in held])
    whole = np.log([cost for _, cost in held])
    spread = float(((whole - whole.mean()) ** 2).sum())
    left = float(((logs - logs.mean()) ** 2).sum())
    return math.exp(float(logs.mean())), 1 - left / spread if spread else 1.0


def short(rows: Sequence[Row]) -> list[str]:
    """Return what README.md shows: flat and nested at equal cost, and who has the lower regret."""
    lines = [
        "| experts | budget | flat | best nested that keeps a front | lower in "
        "| published, one preference (data sets) |",
        "|---:|---:|---:|---:|---|---:|",
    ]
    won, pairs = 0, 0
    for n in sorted({row["experts"] for row in rows if row["experts"] > 2}):
        published = _held(rows, experts=n, method="published")
        told = "-"
        if published:
            cost = np.mean([row["data_sets"] for row in published])
            told = f"{_mean(published):.3f} ({cost:.0f})"
        for budget in sorted({row["budget"] for row in _held(rows, experts=n, method="flat")}):
            here = _held(rows, experts=n, budget=budget)
            flat = {row["seed"]: row["regret"] for row in _held(here, method="flat")}
            kept = [m for m in _methods(here) if m.startswith(("fronts", "surrogates"))]
            if not kept:
                continue
            best = min(kept, key=lambda name: _mean(_held(here, method=name)))
            own = [row for row in _held(here, method=best) if row["seed"] in flat]
            lower = sum(row["regret"] < flat[row["seed"]] for row in own)
            won, pairs = won + lower, pairs + len(own)
            lines.append(
                f"| {n} | {budget} | {_mean(_held(here, method='flat')):.3f} | "
                f"{_mean(own):.3f} ({best}) | {lower} of {len(own)} | {told} |"
            )
    said = (
        f"Mean regret at equal cost. The best of the nested variants that keep a front has a lower "
        f"regret than the flat run in {won} of {pairs} paired runs."
    )
    return [said, "", *lines]


def _mean(rows: Sequence[Row]) -> float:
    return float(np.mean([row["regret"] for row in rows]))


def tables(rows: Sequence[Row]) -> list[str]:
    """Return all tables as lines of Markdown."""
    if not rows:
        return ["nothing measured yet"]
    return [*_regrets(rows), "", *_differences(rows), "", *_costs(rows)]


def _regrets(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| experts | budget | method | data sets | regret | volume | seconds | seeds |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for n in sorted({row["experts"] for row in rows}):
        for budget in sorted({row["budget"] for row in _held(rows, experts=n)}):
            for method in _methods(rows):
                own = _held(rows, experts=n, budget=budget, method=method)
                if not own:
                    continue
                sides = [row["side"] for row in own if row["side"] is not None]
                lines.append(
                    f"| {n} | {budget} | {method} | "
                    f"{np.mean([row['data_sets'] for row in own]):.0f} | "
                    f"{np.mean([row['regret'] for row in own]):.4f} | "
                    f"{f'{np.mean(sides):.3f}' if sides else '-'} | "
                    f"{np.median([row['seconds'] for row in own]):.0f} | {len(own)} |"
                )
    return lines


def _differences(rows: Sequence[Row]) -> list[str]:
    """Return the regrets of nested methods less that of the flat run, paired by seed."""
    lines = [
        "| experts | budget | method | regret less flat's (95 % interval) | pairs |",
        "|---:|---:|---|---:|---:|",
    ]
    for n in sorted({row["experts"] for row in rows}):
        for budget in sorted({row["budget"] for row in _held(rows, experts=n)}):
            flat = {
                row["seed"]: row["regret"]
                for row in _held(rows, experts=n, budget=budget, method="flat")
            }
            for method in _methods(rows):
                own = _held(rows, experts=n, budget=budget, method=method)
                gaps = [row["regret"] - flat[row["seed"]] for row in own if row["seed"] in flat]
                if method == "flat" or len(gaps) < 2:
                    continue
                gap = mean_interval(gaps)
                assert gap is not None
                lines.append(
                    f"| {n} | {budget} | {method} | {gap.mean:+.4f} [{gap.low:+.4f}, "
                    f"{gap.high:+.4f}] {gap.reading} | {gap.count} |"
                )
    return lines


def _costs(rows: Sequence[Row]) -> list[str]:
    experts = sorted({row["experts"] for row in rows})
    lines = [
        f"| data sets to a regret of {TARGET:g} | {' | '.join(f'N={n}' for n in experts)} |",
        f"|---|{'---:|' * len(experts)}",
    ]
    for method in _methods(rows):
        cells = []
        for n in experts:
            own, cost = _held(rows, experts=n, method=method), needed(rows, n, method)
            most = max((row["data_sets"] for row in own), default=0)
            if cost is None:
                cells.append(f"> {most}" if own else "-")
            else:
                cells.append(f"<= {cost[0]:.0f}" if cost[1] else f"{cost[0]:.0f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    spent = [
        (
            n,
            float(
                np.mean([row["data_sets"] for row in _held(rows, experts=n, method="published")])
            ),
        )
        for n in experts
        if _held(rows, experts=n, method="published")
    ]
    fit = fitted(spent)
    if fit is not None:
        lines += [
            "",
            f"What the published method spends on one preference is {fit[0]:.1f} N log2 N data "
            f"sets (least squares on logarithms, R2 {fit[1]:.3f}), whatever the regret: it has a "
            "fixed number of evaluations per node.",
        ]
    return lines


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw regret against data sets, one panel for each number of experts."""
    experts = [n for n in sorted({row["experts"] for row in rows}) if n > 2]
    if not experts:
        return
    drawn = Figure(figsize=(3.4 * len(experts), 3.4), layout="constrained")
    axes = drawn.subplots(1, len(experts), squeeze=False)[0]
    for axis, n in zip(axes, experts, strict=True):
        for i, method in enumerate(_methods(rows)):
            own = _held(rows, experts=n, method=method)
            places = sorted({row["budget"] for row in own})
            if not places:
                continue
            points = [_held(own, budget=budget) for budget in places]
            axis.plot(
                [float(np.mean([row["data_sets"] for row in held])) for held in points],
                [float(np.mean([row["regret"] for row in held])) for held in points],
                marker=_MARKS[i % len(_MARKS)],
                color=_COLOURS[i % len(_COLOURS)],
                markersize=5,
                linewidth=1.2,
                label=method,
            )
        axis.set_title(f"{n} experts", fontsize=9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, linewidth=0.5)
    lines = {
        label: line
        for axis in axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(
        list(lines.values()),
        list(lines),
        loc="outside upper center",
        ncols=4,
        fontsize=7,
        frameon=False,
    )
    drawn.supxlabel("data sets (one task measured at one point)", fontsize=9)
    drawn.supylabel("mean regret", fontsize=9)
    save_figure(drawn, path)
