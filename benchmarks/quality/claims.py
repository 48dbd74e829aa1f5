"""What the study must show, each claim met or not by the data alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.quality.analysis import needed, paired, reach, values
from benchmarks.quality.methods import CORE
from benchmarks.quality.protocol import CHECKPOINTS
from benchmarks.quality.tables import MEASURES, count, outside, present, worth
from benchmarks.quality.tidy import Row

__all__ = ["Claim", "claims", "step_seconds", "told"]

_STEP = "propose 4: "
_SEARCHES = ("optuna-tpe", "optuna-nsga3", "nsga2", "nsga3")

_ROUNDING = 1e-5  # of the recorded rows: differences below it are none


@dataclass(frozen=True)
class Claim:
    """One point: what was to be shown, whether it was, and the figures.

    Attributes:
        statement: What was to be shown.
        met: ``None`` when the rows do not tell.
        figures: One line each.
    """

    statement: str
    met: bool | None
    figures: tuple[str, ...] = ()


def claims(rows: Sequence[Row], step: Path | None = None) -> list[Claim]:
    """Return the five points in order, judged by the rows (and the recorded step times)."""
    return [
        _few_evaluations(rows),
        _never_worse(rows),
        _many_metrics(rows),
        _known_noise(rows),
        _calibrated(rows),
        _defaults(rows),
        _steps(step),
    ]


def told(found: Sequence[Claim]) -> list[str]:
    """Return claims as Markdown."""
    words = {True: "met", False: "not met", None: "not measured"}
    lines = []
    for claim in found:
        lines += [f"- **{words[claim.met]}**: {claim.statement}"]
        lines += [f"  - {figure}" for figure in claim.figures]
    return lines


def _real(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["real_models"]]


def _few_evaluations(rows: Sequence[Row]) -> Claim:
    statement = (
        "95 % of the best known hypervolume on every real-model problem in a quarter of the "
        "reference method's evaluations and half of Ax's, at the median over seeds"
    )
    rows = _real(rows)
    found = needed([row for row in rows if row["method"] in CORE])
    limits = reach(rows)
    figures, good = [], []
    for case in sorted({case for case, name in found if name == "default"}):
        own = _middle(found[case, "default"])
        parts = [f"default {count(own, limits[case, 'default'])}"]
        for name, most in (
            ("reference", 0.25),
            ("reference-kind-box", 0.25),
            ("ax", 0.5),
            *((name, math.inf) for name in (*_SEARCHES, "random")),
        ):
            if (case, name) not in found:
                continue
            other = _middle(found[case, name])
            parts.append(f"{name} {count(other, limits[case, name])}")
            # Who did not get there within the budget needs more than the budget: a bound.
            ratio = own / min(other, limits[case, name])
            good.append(ratio <= most if math.isfinite(own) else math.isinf(most))
        figures.append(f"{case}: " + ", ".join(parts))
    return Claim(statement, all(good) if good else None, tuple(figures))


def _middle(counts: dict[int, float]) -> float:
    held = sorted(counts.values())
    return held[len(held) // 2]


def _never_worse(rows: Sequence[Row]) -> Claim:
    statement = "never worse than random search or the uniform blend on a real-model problem"
    rows, figures, seen = _real(rows), [], 0
    bad = 0
    for case in sorted({row["case"] for row in rows}):
        own = [row for row in rows if row["case"] == case]
        for name in ("random", "uniform-blend"):
            for measure, larger in (("regret", False), ("share", True)):
                for n in CHECKPOINTS:
                    gap = paired(own, "default", name, measure, evaluations=n)
                    if gap is None or not gap.enough:
                        continue
                    seen += 1
                    if gap.verdict(larger_is_better=larger) == "worse":
                        bad += 1
                        figures.append(f"{case}, {n} evaluations, {measure}: {gap} to {name}")
    if not seen:
        return Claim(statement, None)
    figures.insert(0, f"clearly worse in {bad} of {seen} comparisons (case, budget, measure)")
    return Claim(statement, not bad, tuple(figures))


def _many_metrics(rows: Sequence[Row]) -> Claim:
    statement = (
        "with 8 and 16 real models the default's regret is below that of every baseline from 3 N "
        "evaluations on"
    )
    figures, good = [], []
    held = [row for row in _real(rows) if row["m"] in (8, 16)]
    for case in sorted({row["case"] for row in held}):
        own = [row for row in held if row["case"] == case]
        points = [n for n in CHECKPOINTS if n >= 3 * own[0]["m"]]
        for name in present(own, CORE):
            if name == "default":
                continue
            gaps = [paired(own, "default", name, "regret", evaluations=n) for n in points]
            there = [gap for gap in gaps if gap is not None and gap.enough]
            if not there:
                continue
            below = [gap.mean < 0 for gap in there]
            clear = sum(gap.verdict(larger_is_better=False) == "better" for gap in there)
            good += below
            figures.append(
                f"{case}, {name}: below at {sum(below)} of {len(there)} budgets, clearly at "
                f"{clear}; differences {min(gap.mean for gap in there):+.4f} to "
                f"{max(gap.mean for gap in there):+.4f}"
            )
    return Claim(statement, all(good) if good else None, tuple(figures))


def _known_noise(rows: Sequence[Row]) -> Claim:
    statement = "with 100 examples per evaluation, knowing the variance beats ignoring it"
    noisy = [row for row in rows if row["family"] == "noisy"]
    points = [n for n in CHECKPOINTS if n >= 12]
    name = "default, no known noise"
    regret = paired(noisy, "default", name, "regret", evaluations=points)
    share = paired(noisy, "default", name, "share", evaluations=points)
    if regret is None or share is None or not regret.enough:
        return Claim(statement, None)
    figures = (
        f"regret less that of ignoring it {regret}, {regret.pairs} pairs on {regret.cases} cases",
        f"share of the hypervolume less that of ignoring it {share}",
    )
    return Claim(statement, regret.high < 0, figures)


def _calibrated(rows: Sequence[Row]) -> Claim:
    statement = "95 % intervals at the front's points of real merges cover 90 to 98 %"
    points = [n for n in CHECKPOINTS if n >= 12]
    held: dict[str, list[float]] = {}
    for n in points:
        for (case, name), by_seed in values(_real(rows), "coverage", evaluations=n).items():
            if name == "default":
                held.setdefault(case, []).extend(by_seed.values())
    if not held:
        return Claim(statement, None)
    means = {case: sum(each) / len(each) for case, each in sorted(held.items())}
    inside = [not outside(mean) for mean in means.values()]
    everything = sum(means.values()) / len(means)
    figures = [f"mean over cases {everything:.3f}; inside on {sum(inside)} of {len(inside)} cases"]
    figures += [f"{case}: {mean:.3f}" for case, mean in means.items()]
    return Claim(statement, all(inside), tuple(figures))


def _defaults(rows: Sequence[Row]) -> Claim:
    statement = "each default earns its place"
    # What never differs is the default under another name, where it was run.
    found = [
        each
        for each in worth(rows)
        if each.regret.enough and any(max(-d.low, d.high) > _ROUNDING for d in each.differences)
    ]
    if not found:
        return Claim(statement, None)
    figures = []
    for i, measure in enumerate(MEASURES):
        for verdict in ("helps", "no clear difference", "hurts"):
            names = [each.name for each in found if each.verdicts[i] == verdict]
            figures.append(
                f"by {measure}, the default instead of it {verdict}: {', '.join(names) or 'none'}"
            )
    return Claim(statement, all("helps" in each.verdicts for each in found), tuple(figures))


def step_seconds(path: Path | None) -> dict[str, dict[str, float | str]]:
    """Return the recorded seconds of a step by sampler and size, ``"N n"``; none when unrecorded.

    A text in place of seconds says why there are none.
    """
    recorded = json.loads(path.read_text())["data"]["rows"] if path and path.exists() else {}
    if not isinstance(recorded, dict):
        return {}
    return {
        label.removeprefix(_STEP): row for label, row in recorded.items() if label.startswith(_STEP)
    }


def _steps(path: Path | None) -> Claim:
    statement = "time of one step (fit, propose 4, front) of every sampler, N = 2 to 16"
    rows = step_seconds(path)
    figures, good = [], []
    for sampler, row in rows.items():
        seconds = [value for value in row.values() if isinstance(value, float)]
        good.append({key.split()[0] for key in row} >= {"2", "4", "8", "16"})
        if seconds:
            figures.append(
                f"{sampler}: {len(seconds)} of {len(row)} sizes, median {median(seconds):.2f} s, "
                f"longest {max(seconds):.2f} s"
            )
    return Claim(statement, all(good) if good else None, tuple(figures))
