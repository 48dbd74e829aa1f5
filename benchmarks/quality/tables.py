"""Markdown tables of the study, from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from benchmarks.quality.analysis import (
    Difference,
    needed,
    needed_interval,
    paired,
    ranking,
    reach,
    typical,
    values,
)
from benchmarks.quality.methods import CORE, METHODS
from benchmarks.quality.tidy import Row

__all__ = [
    "BAND",
    "EARLY",
    "MEASURES",
    "ablations",
    "ablations_by_noise",
    "against_default",
    "calibration",
    "costs",
    "evaluations_needed",
    "failures",
    "matrix",
    "outside",
    "overview",
    "ranks",
]

EARLY = (12, 24, 48)  # checkpoints that comparisons over several budgets are averaged over
NOTHING = ["Not measured yet."]
BAND = (0.90, 0.98)  # coverage that 95 % intervals are to have on real merges
MEASURES = (
    "regret",
    "share of hypervolume",
    "optimism in absolute terms",
    "coverage outside 90 to 98 %",
)
_SIZE = "size of optimism"
_OUTSIDE = "coverage outside its band"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a table, or a line that says that there is nothing to show."""
    lines = [f"| {' | '.join(cells)} |" for cells in body]
    if not lines:
        return NOTHING
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]


def present(rows: Iterable[Row], names: Iterable[str]) -> list[str]:
    """Return those of the methods that have rows, in the given order."""
    held = {row["method"] for row in rows}
    return [name for name in names if name in held]


def _cases(rows: Iterable[Row], *, real: bool | None = None) -> list[str]:
    return sorted({row["case"] for row in rows if real is None or bool(row["real_models"]) == real})


def overview(rows: Sequence[Row]) -> list[str]:
    """What was run: by case, its size, the methods and the seeds."""
    body = []
    for case in _cases(rows):
        own = [row for row in rows if row["case"] == case]
        searched = [n for (_, name), n in reach(own).items() if name != "direct"]
        seeds = {row["seed"] for row in own if row["method"] == "default"}
        body.append(
            [
                case,
                "yes" if own[0]["real_models"] else "no",
                str(own[0]["d"]),
                str(own[0]["m"]),
                str(len({row["method"] for row in own})),
                str(len(seeds)),
                str(max(searched, default=0)),
            ]
        )
    head = ["case", "real models", "coefficients", "metrics", "methods", "seeds", "evaluations"]
    return markdown(head, body)


def evaluations_needed(rows: Sequence[Row], *, real: bool | None = None) -> list[str]:
    """Median evaluations to 95 % of the best known hypervolume, with bootstrap intervals."""
    names = present(rows, CORE)
    found = needed([row for row in rows if row["method"] in names])
    limits = reach(rows)
    body = []
    for case in _cases(rows, real=real):
        cells = [case]
        for name in names:
            counts = found.get((case, name))
            if not counts:
                cells.append("")
                continue
            middle, low, high = needed_interval(list(counts.values()))
            told = [count(value, limits[case, name]) for value in (middle, low, high)]
            cells.append(f"{told[0]} [{told[1]}, {told[2]}]")
        body.append(cells)
    return markdown(["case", *names], body)


def count(value: float, limit: int) -> str:
    """Return a number of evaluations, ``> limit`` when it was not reached."""
    return f"> {limit}" if math.isinf(value) else f"{value:.0f}"


def matrix(
    rows: Sequence[Row], measure: str, evaluations: int, *, real: bool | None = None
) -> list[str]:
    """Mean of a measure over seeds, cases down and core methods across, the worst seed beside."""
    names = present(rows, CORE)
    found = values(rows, measure, evaluations=evaluations)
    worst: Callable[[Iterable[float]], float] = min if measure == "share" else max
    body = []
    for case in _cases(rows, real=real):
        cells = [case]
        for name in names:
            held = list(found.get((case, name), {}).values())
            cells.append(f"{mean(held):.3f} ({worst(held):.3f})" if held else "")
        if any(cells[1:]):
            body.append(cells)
    return markdown(["case", *names], body)


def against_default(rows: Sequence[Row], tiers: Sequence[str]) -> list[str]:
    """Paired differences of methods to the default, averaged over 12, 24 and 48 evaluations."""
    body = []
    for name in present(rows, [n for n, m in METHODS.items() if m.tier in tiers]):
        if name == "default":
            continue
        share = paired(rows, name, "default", "share", evaluations=EARLY)
        regret = paired(rows, name, "default", "regret", evaluations=EARLY)
        if share is None or regret is None:
            continue
        body.append(
            [
                name,
                str(regret),
                regret.verdict(larger_is_better=False),
                str(share),
                share.verdict(larger_is_better=True),
                f"{regret.pairs} on {regret.cases}",
            ]
        )
    head = ["method", "regret less the default's", "", "share of hypervolume less the default's"]
    return markdown([*head, "", "pairs on cases"], body)


def ablations(rows: Sequence[Row]) -> list[str]:
    """Each default against the default without it: differences and verdicts."""
    body = []
    for each in worth(rows):
        cells = [each.name]
        for difference, verdict in zip(each.differences, each.verdicts, strict=True):
            cells += [str(difference), verdict]
        body.append([*cells, f"{each.regret.pairs} on {each.regret.cases}"])
    head = ["instead of the default"]
    for measure in MEASURES:
        head += [f"{measure}: default less this", "the default"]
    return markdown([*head, "pairs on cases"], body)


def ablations_by_noise(rows: Sequence[Row]) -> list[str]:
    """The same on real models, exact and noisy cases apart, where both were run."""
    real = [row for row in rows if row["real_models"]]
    exact = {each.name: each for each in worth(_noisy(real, wanted=False))}
    noisy = {each.name: each for each in worth(_noisy(real, wanted=True))}
    body = []
    for name in [name for name in exact if name in noisy]:
        cells = [name]
        for each in (exact[name], noisy[name]):
            cells += [str(each.regret), each.verdicts[0], str(each.share), each.verdicts[1]]
            cells.append(f"{each.regret.pairs} on {each.regret.cases}")
        body.append(cells)
    head = ["instead of the default"]
    for kind in ("exact", "noisy"):
        head += [f"{kind}, {MEASURES[0]}: default less this", "the default"]
        head += [f"{kind}, {MEASURES[1]}: default less this", "the default", "pairs on cases"]
    return markdown(head, body)


def _noisy(rows: Iterable[Row], *, wanted: bool) -> list[Row]:
    return [row for row in rows if row["case"].endswith("-noisy") is wanted]


@dataclass(frozen=True)
class Worth:
    """What a default is worth: differences of the default to an ablation.

    Attributes:
        name: What is instead of the default.
        regret: Difference in regret, less is better.
        share: Difference in the share of the hypervolume, more is better.
        optimism: Difference in the absolute value of the optimism, less is better: how far what
            is predicted of the front is from what it is.
        coverage: Difference in how far the coverage of 95 % intervals lies outside 90 to 98 %,
            less is better.
    """

    name: str
    regret: Difference
    share: Difference
    optimism: Difference
    coverage: Difference

    @property
    def differences(self) -> tuple[Difference, Difference, Difference, Difference]:
        """All four, in the order of :data:`MEASURES`."""
        return self.regret, self.share, self.optimism, self.coverage

    @property
    def verdicts(self) -> tuple[str, str, str, str]:
        """What they say."""
        return (
            word(self.regret, larger=False),
            word(self.share, larger=True),
            word(self.optimism, larger=False),
            word(self.coverage, larger=False),
        )


def worth(rows: Sequence[Row]) -> list[Worth]:
    """Return what each default is worth, by ablation."""
    names = present(rows, [n for n, m in METHODS.items() if m.tier == "ablation"])
    held = [
        {
            **row,
            _SIZE: None if row.get("optimism") is None else abs(row["optimism"]),
            _OUTSIDE: None if row.get("coverage") is None else outside(row["coverage"]),
        }
        for row in rows
        if row["method"] in ("default", *names)
    ]
    found = []
    for name in names:
        measures = [
            paired(held, "default", name, measure, evaluations=EARLY)
            for measure in ("regret", "share", _SIZE, _OUTSIDE)
        ]
        known = [difference for difference in measures if difference is not None]
        if len(known) == len(measures):
            found.append(Worth(name.removeprefix("default, "), *known))
    return found


def outside(coverage: float) -> float:
    """Return how far a coverage lies outside 90 to 98 %; 0 inside."""
    low, high = BAND
    return max(low - coverage, coverage - high, 0.0)


def word(difference: Difference, *, larger: bool) -> str:
    """Return whether a default ``helps`` or ``hurts``, by the interval of its gain alone."""
    verdict = difference.verdict(larger_is_better=larger)
    return {"better": "helps", "worse": "hurts"}.get(verdict, verdict)


def ranks(rows: Sequence[Row], evaluations: int) -> list[str]:
    """Mean ranks by regret with tests, and on how many cases each beats each."""
    names = present(rows, CORE)
    found = ranking(rows, names, "regret", evaluations=evaluations)
    while found is None and len(names) > 2:  # leave out who ran on the fewest cases
        held = values(rows, "regret", evaluations=evaluations)
        others = [name for name in names if name != "default"]
        names.remove(min(others, key=lambda n: sum(method == n for _, method in held)))
        found = ranking(rows, names, "regret", evaluations=evaluations)
    if found is None:
        return NOTHING
    order = sorted(names, key=lambda name: found.ranks[name])
    body = [
        [
            name,
            f"{found.ranks[name]:.2f}",
            f"{found.against[name]:.3f}" if name in found.against else "",
            *("" if a == name else str(found.wins[name, a]) for a in order),
        ]
        for name in order
    ]
    test = "" if found.friedman is None else f"Friedman p = {found.friedman:.2g}; "
    caption = f"{test}{len(found.cases)} cases, {evaluations} evaluations."
    head = ["method", "mean rank", "p against the default (Holm)", *(f"beats {n}" for n in order)]
    return [*markdown(head, body), "", caption]


def calibration(rows: Sequence[Row]) -> list[str]:
    """Coverage of 95 % intervals and optimism of the default's front, by case."""
    checkpoints = (12, 24, 48, 96)
    body = []
    for case in _cases(rows):
        own = [r for r in rows if (r["case"], r["method"]) == (case, "default")]
        cells = [case]
        for measure, form in (("coverage", "{:.2f}"), ("optimism", "{:+.3f}")):
            for n in checkpoints:
                held = [
                    row[measure]
                    for row in own
                    if row["evaluations"] == n and row[measure] is not None
                ]
                cells.append(form.format(mean(held)) if held else "")
        if any(cells[1:]):
            body.append(cells)
    head = [f"{what}, {n}" for what in ("coverage", "optimism") for n in checkpoints]
    return markdown(["case", *head], body)


def costs(rows: Sequence[Row]) -> list[str]:
    """Median seconds outside evaluation, by method: all proposals so far, one fit, one front."""
    checkpoints = (24, 48, 96)
    body = []
    for name in present(rows, METHODS):
        own = [row for row in rows if row["method"] == name]
        cells = [name]
        for n in checkpoints:
            at = [row for row in own if row["evaluations"] == n]
            told = [typical(row[part] for row in at) for part in ("propose_s", "fit_s", "solve_s")]
            cells.append(
                " / ".join("" if value is None else f"{value:.2f}" for value in told)
                if any(value is not None for value in told)
                else ""
            )
        if any(cells[1:]):
            body.append(cells)
    head = [f"{n} evaluations: proposals / fit / front" for n in checkpoints]
    return markdown(["method", *head], body)


def failures(rows: Sequence[Row]) -> list[str]:
    """Runs and answers that failed, by method and case, with a reason."""
    held: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["failure"]:
            held.setdefault((row["method"], row["case"]), []).append(row["failure"])
    body = [
        [method, case, str(len(reasons)), reasons[0][:120].replace("|", "/")]
        for (method, case), reasons in sorted(held.items())
    ]
    if not body and rows:
        return ["Nothing failed."]
    return markdown(["method", "case", "answers or runs", "first reason"], body)
