"""What scoring some of the examples saves: the cost of the default's quality, in examples scored.

python -m benchmarks.quality.items --out benchmarks/results/items.json
python -m benchmarks.quality.items --methods full auto --seeds 3     some methods, fewer seeds
python -m benchmarks.quality.items --tables --out ...    run nothing, write what there is
python -m benchmarks.quality.items --overhead            only how long a decision takes
python -m benchmarks.quality.items --smoke               tiny: does it run?

Real merges of digit, image and text experts are scored on real examples, so that outcomes on the
same example are as alike as they are. A run may spend what ``3 N`` evaluations of all examples
cost, ``N`` experts; after several shares of that, the answer of the default surrogate to what has
been scored until then is worked out and scored on the truth, the accuracy on all examples. The
target of a case is the mean regret, over the seeds, of the default on all examples at the end. What
counts is the cost from which on a run's regret stays at or below it, between two shares by linear
interpolation. Seeds are paired: order of the examples, anchors and preferences.

Finished runs are kept under ``.bench_cache/items``; an interrupted study goes on. The image and
text cases need ``MAP_BO_DATA``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from benchmarks.quality import kept
from benchmarks.quality.analysis import Difference, paired
from benchmarks.quality.items_baselines import Fidelities, Fixed, Policy, Step, play
from benchmarks.quality.items_cases import ItemCase, item_case, missing
from benchmarks.quality.items_overhead import overhead, overhead_table
from benchmarks.quality.methods import METHODS
from benchmarks.quality.protocol import answer_after
from benchmarks.quality.scoring import best_attained, weights_of
from benchmarks.quality.tables import markdown
from benchmarks.record import RESULTS, finish
from map_bo.data import Observations
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.state import advance, replay
from map_bo.samplers.allocation.front_doubt import FrontDoubt
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event

__all__ = [
    "CASES",
    "METHODS_OF",
    "SETTLED",
    "SHARES",
    "Reached",
    "answers",
    "by_run",
    "cost_of",
    "curves",
    "reach",
    "reached",
    "table",
]

Row = dict[str, Any]
Curve = Sequence[tuple[float, float]]

CACHE = Path(".bench_cache") / "items"
VERSION = 1
"""Raise it with the allocation or the estimates: what was recorded before does not count."""
CASES = ("digits-mlp-4", "images-4", "text-4")
"""Cases that are reported; nothing about the use of examples was settled on them."""
SETTLED = ("digits-mlp-2", "digits-mlp-8", "text-4-other")
"""Cases on which the allocation and its defaults were tried out."""
SHARES = (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1.0)
"""When answers are worked out, in shares of what a run may spend."""
GOAL = 1 / 6
LIMIT = 600.0
"""Seconds after which a run by hand decides nothing more."""
MEASURE = "regret"
BASELINE = "full"
RESAMPLES = 2000
_DIRECT = 3000
_SMALLEST = 3  # budget of a run
_LARGEST = 1.0  # evaluations that one action costs at most


def cost_of(seen: Observations) -> float:
    """Return the examples that were scored, in evaluations of all examples of all metrics."""
    return sum(
        mean(len(outcomes) / outcomes.size for outcomes in row.values()) if row else 0.0
        for row in seen.examples
    )


@dataclass(frozen=True)
class Arm:
    """One way of spending examples.

    Attributes:
        label: What tables call it.
        trail: Case, seed, what it may spend in evaluations of all examples -> the run's steps.
        anytime: Whether one run serves all costs. Otherwise what it does depends on what it may
            spend, and it starts anew for each of them that is a whole number, from 2 on.
    """

    label: str
    trail: Callable[[ItemCase, int, float], Iterator[Step]]
    anytime: bool = True


def _by_hand(policy: Policy) -> Callable[[ItemCase, int, float], Iterator[Step]]:
    def trail(case: ItemCase, seed: int, most: float) -> Iterator[Step]:
        return play(case, policy, seed, most, until=time.monotonic() + LIMIT)

    return trail


class _Clock:
    """Remembers when each event of a run was recorded."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def observe(self, event: Event) -> None:
        self.times.append(time.perf_counter())

    def finish(self, *, whole: bool) -> None:
        pass


def settings_of(items: str | int, seed: int, most: float) -> Settings:
    """Return the settings of a run that may spend ``most`` evaluations, without verification.

    Settings refuse a budget below three. What ``"auto"`` does with less is what it does within
    three when base, experts and blend have that much less at first.
    """
    budget = max(_SMALLEST, round(most))
    if items == "auto" and budget > most:
        begin = FrontDoubt().begin * most / budget
        return Settings(budget=budget, seed=seed, verify=0, items=FrontDoubt(begin=begin))
    return Settings(budget=budget, seed=seed, verify=0, items=items)


def by_run(items: str | int) -> Callable[[ItemCase, int, float], Iterator[Step]]:
    """Return the steps of a run of the package, without verification; it is not cut short."""

    def trail(case: ItemCase, seed: int, most: float) -> Iterator[Step]:
        settings = settings_of(items, seed, most)
        store, clock = MemoryStore(), _Clock()
        start = time.perf_counter()
        Run(case.problem, settings, store, tracker=clock).drive()
        d, metrics = case.problem.space.d, case.problem.metrics
        state = replay([], metrics, d)
        for event, moment in zip(store.read(), clock.times, strict=True):
            state = advance(state, event)
            if event.kind in ("observed", "scored"):
                yield Step(cost_of(state.seen), state.seen, moment - start)

    return trail


METHODS_OF: dict[str, Arm] = {
    "full": Arm("all examples (default)", _by_hand(Fixed())),
    "auto": Arm("`items=auto`", by_run("auto"), anytime=False),
    "fixed-100": Arm("the first 100", _by_hand(Fixed(100))),
    "halving": Arm("successive halving", by_run("halving")),
    "fixed-200": Arm("the first 200", _by_hand(Fixed(200))),
    "fixed-50": Arm("the first 50", _by_hand(Fixed(50))),
    "momf": Arm("BoTorch, MOMF", _by_hand(Fidelities("momf"))),
    "kg": Arm("BoTorch, qMFKG", _by_hand(Fidelities("kg"))),
    "hvkg": Arm("BoTorch, qMFHVKG", _by_hand(Fidelities("hvkg"))),
}
"""Name -> way, what matters most first."""


def answers(
    steps: Iterable[Step], most: float, shares: Sequence[float] = SHARES
) -> Iterator[tuple[float, Step]]:
    """Yield for each share its cost and the last step that had spent no more.

    A share that a run ended well before (by its time limit) has no answer, and neither has one
    before anything was scored.
    """
    waiting = [share * most for share in sorted(shares)]
    before: Step | None = None
    for step in steps:
        while waiting and step.cost > waiting[0] + 1e-9:
            cost = waiting.pop(0)
            if before is not None:
                yield cost, before
        before = step
    for cost in waiting:
        if before is not None and before.cost > cost - _LARGEST:
            yield cost, before


def run(name: str, method: str, seed: int, shares: Sequence[float] = SHARES) -> list[Row]:
    """Return the rows of a run, one for each share with an answer."""
    case, arm = item_case(name), METHODS_OF[method]
    whole = 3.0 * case.problem.space.d
    if arm.anytime:
        found = answers(arm.trail(case, seed, whole), whole, shares)
    else:
        found = (
            (cost, step)
            for cost in (share * whole for share in shares)
            if _whole(cost)
            for _, step in answers(arm.trail(case, seed, cost), cost, (1.0,))
        )
    rows: list[Row] = []
    last: tuple[Step, Mapping[str, float]] | None = None
    best = mean(best_of(name, seed))
    for cost, step in found:
        if last is None or last[0] is not step:  # else the same as at the share before
            last = step, answer_after(case.case, METHODS["default"], step.seen, seed).numbers
        numbers = last[1]
        row: Row = {
            "case": name,
            "method": method,
            "seed": seed,
            "evaluations": cost,
            "most": whole,
            "spent": round(step.cost, 4),
            "rows": len(step.seen),
            "seconds": round(step.seconds, 1),
        }
        for column, utility in (("regret_front", "utility"), ("regret", "utility_solved")):
            if utility in numbers:
                row[column] = best - numbers[utility]
        if "coverage" in numbers:
            row["coverage"] = numbers["coverage"]
        rows.append(row)
    return rows


def pieces(method: str) -> list[tuple[float, ...]]:
    """Return the shares that are run together: all of them, or one by one where runs start anew."""
    return [SHARES] if METHODS_OF[method].anytime else [(share,) for share in SHARES]


def _whole(cost: float) -> bool:
    return abs(cost - round(cost)) < 1e-9 and round(cost) > 1


@functools.cache
def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "quality_known.json").read_text())
    return found


@functools.cache
def best_of(name: str, seed: int) -> tuple[float, ...]:
    """Return the best that is known for each preference of a seed: of the study, or of a search."""
    known = _known().get(name, {}).get("best", {}).get(str(seed))
    if known is not None:
        return tuple(known)
    case = item_case(name).case
    gains = case.direct(_DIRECT, seed % 3)
    return tuple(best_attained(gains, weights_of(seed, case.m)).tolist())


def curves(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, list[tuple[float, float]]]]:
    """Return (case, method) -> seed -> pairs of cost and regret, by cost."""
    found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in sorted(rows, key=lambda row: float(row["evaluations"])):
        if row.get(MEASURE) is not None:
            held = found[row["case"], row["method"]][row["seed"]]
            held.append((row["evaluations"], row[MEASURE]))
    return {key: dict(by_seed) for key, by_seed in found.items()}


def reach(curve: Curve, target: float) -> float:
    """Return the cost from which on the regret stays at or below a target; infinity for never.

    Between the last cost with a larger regret and the next one it is interpolated linearly. A curve
    that begins below the target has reached it where it begins.

    Args:
        curve: Costs, ascending, with their regrets.
        target: The regret to reach.
    """
    above = [i for i, (_, regret) in enumerate(curve) if regret > target]
    if not above:
        return curve[0][0] if curve else math.inf
    last = above[-1]
    if last + 1 == len(curve):
        return math.inf
    (left, high), (right, low) = curve[last], curve[last + 1]
    return left + (right - left) * (high - target) / (high - low)


@dataclass(frozen=True)
class Reached:
    """What a method needs to reach the target, in shares of what the default spends for it.

    Attributes:
        share: The median, over seeds; of several cases, the median of their medians.
        low: Lower end of its 95 % bootstrap interval over the seeds.
        high: Upper end.
        never: How many runs never reach it.
        pairs: Of how many.
        mean: Share at which the mean regret over the seeds reaches it; of several cases the median.
            Single runs scatter about a target that the default itself meets but on the mean.
        mean_low: Lower end of its 95 % bootstrap interval.
        mean_high: Upper end.
    """

    share: float
    low: float
    high: float
    never: int
    pairs: int
    mean: float
    mean_low: float
    mean_high: float

    @property
    def of_mean(self) -> str:
        """The share of the mean curve and its interval for a table."""
        return f"{_told(self.mean)} [{_told(self.mean_low)}, {_told(self.mean_high)}]"

    def __str__(self) -> str:
        """Return median and interval for a table."""
        return f"{_told(self.share)} [{_told(self.low)}, {_told(self.high)}]"


def _told(share: float) -> str:
    return "not" if math.isinf(share) else f"{share:.2f}"


def reached(
    rows: Iterable[Row],
    method: str,
    cases: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Reached | None:
    """Return what a method needs to reach the target on some cases.

    The bootstrap draws seeds, of each case apart and the same for both methods, and takes the
    target from the drawn seeds too.

    Args:
        rows: Rows of the table.
        method: The method.
        cases: Cases to look at; those without a pair of runs are left out.
        resamples: Number of bootstrap samples.
        seed: Of the draws.
    """
    found, source = curves(rows), np.random.default_rng(seed)
    medians, means, never, pairs = [], [], 0, 0
    drawn: list[list[float]] = []
    drawn_means: list[list[float]] = []
    for case in cases:
        base, own = found.get((case, BASELINE), {}), found.get((case, method), {})
        seeds = sorted(base.keys() & own.keys())
        if not seeds:
            continue
        most = max(cost for curve in base.values() for cost, _ in curve)
        last = np.array([base[one][-1][1] for one in seeds])
        target = float(last.mean())
        costs = [reach(own[one], target) for one in seeds]
        medians.append(median(costs) / most)
        never, pairs = never + sum(map(math.isinf, costs)), pairs + len(costs)
        means.append(reach(_mean([own[one] for one in seeds]), target) / most)
        picks = source.integers(len(seeds), size=(resamples, len(seeds)))
        drawn.append(
            [
                median(reach(own[seeds[i]], float(last[pick].mean())) for i in pick) / most
                for pick in picks
            ]
        )
        drawn_means.append(
            [
                reach(_mean([own[seeds[i]] for i in pick]), float(last[pick].mean())) / most
                for pick in picks
            ]
        )
    if not medians:
        return None
    low, high = _interval(drawn)
    mean_low, mean_high = _interval(drawn_means)
    return Reached(median(medians), low, high, never, pairs, median(means), mean_low, mean_high)


def _interval(drawn: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval of the median over cases, of ``cases x resamples`` values."""
    each = sorted(median(one) for one in zip(*drawn, strict=True))
    return each[int(0.025 * len(each))], each[min(int(0.975 * len(each)), len(each) - 1)]


def _mean(held: Sequence[Curve]) -> list[tuple[float, float]]:
    """Return the mean curve, at the costs that all of them have."""
    by_cost: dict[float, list[float]] = defaultdict(list)
    for curve in held:
        for cost, regret in curve:
            by_cost[cost].append(regret)
    return [(cost, mean(own)) for cost, own in sorted(by_cost.items()) if len(own) == len(held)]


def table(rows: Sequence[Row]) -> list[str]:
    """Return all tables."""
    cases = [case for case in (*CASES, *SETTLED) if any(row["case"] == case for row in rows)]
    held = [name for name in METHODS_OF if any(row["method"] == name for row in rows)]
    reported = [case for case in cases if case in CASES]
    lines = [
        "Cost of the regret that the default has after 3N evaluations of all examples, as a share "
        "of what those cost: where the mean over the seeds reaches it, and the median of the runs "
        "(95 % bootstrap intervals over the seeds; *not*: not within the budget). The goal is "
        f"{GOAL:.2f}.",
        "",
    ]
    body = []
    for name in held:
        for group, some in (*((case, (case,)) for case in cases), ("all reported", reported)):
            own = reached(rows, name, some) if len(some) else None
            if own is not None:
                told = [own.of_mean, str(own), f"{own.never} of {own.pairs}"]
                body.append([METHODS_OF[name].label, group, *told, *_size(rows, name, some)])
    head = ["examples", "case", "of the mean curve", "median of the runs", "runs that never do"]
    lines += markdown([*head, "rows", "seconds per row"], body)
    lines += ["", "Mean regret at each cost (in evaluations of all examples):", ""]
    lines += _regrets(rows, cases, held)
    lines += [
        "",
        "Regret less that of all examples at equal cost (mean paired difference, 95 % bootstrap "
        "interval over the seeds), and the share of full-set metrics inside their 95 % intervals:",
        "",
    ]
    return lines + _differences(rows, reported, held)


def _size(rows: Sequence[Row], method: str, cases: Sequence[str]) -> list[str]:
    """Return the rows of a run at its last answer, and how long one takes; both are means."""
    last: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = row["case"], row["seed"]
        if row["method"] == method and row["case"] in cases:
            last[key] = max(row, last.get(key, row), key=lambda one: float(one["evaluations"]))
    each = [row["seconds"] / max(row["rows"], 1) for row in last.values()]
    return [f"{mean(row['rows'] for row in last.values()):.0f}", f"{mean(each):.1f}"]


def _regrets(rows: Sequence[Row], cases: Sequence[str], held: Sequence[str]) -> list[str]:
    found, body = curves(rows), []
    for case in cases:
        for name in held:
            own = found.get((case, name), {})
            if own:
                most = max(row["most"] for row in rows if row["case"] == case)
                at = dict(_mean(list(own.values())))
                told = [f"{at[share * most]:.4f}" if share * most in at else "" for share in SHARES]
                body.append([case, METHODS_OF[name].label, *told, str(len(own))])
    head = [f"{share:.2f} of 3N" for share in SHARES]
    return markdown(["case", "examples", *head, "seeds"], body)


def _differences(rows: Sequence[Row], cases: Sequence[str], held: Sequence[str]) -> list[str]:
    # Costs differ between cases of other sizes; shares of the budget do not.
    shared = [{**row, "evaluations": _permille(row["evaluations"] / row["most"])} for row in rows]
    body = []
    for name in held:
        told = []
        for share in (1 / 6, 1 / 3, 1 / 2, 1.0):
            one: Difference | None = paired(
                shared, name, BASELINE, MEASURE, evaluations=_permille(share), cases=cases
            )
            told.append("" if one is None or name == BASELINE else str(one))
        covered = [
            row["coverage"]
            for row in rows
            if row["method"] == name and row["case"] in cases and "coverage" in row
        ]
        body.append(
            [METHODS_OF[name].label, *told, f"{100 * mean(covered):.0f} %" if covered else ""]
        )
    head = ["at 1/6", "at 1/3", "at 1/2", "at the end", "coverage"]
    return markdown(["examples", *head], body)


def _permille(share: float) -> int:
    return round(1000 * share)


def path_of(case: str, method: str, seed: int, shares: Sequence[float] = SHARES) -> Path:
    """Return where a run is kept."""
    part = "" if tuple(shares) == SHARES else f"-{_permille(shares[0])}"
    return CACHE / case / f"{method}-{seed}{part}-v{VERSION}.json"


def measure(
    cases: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    until: float,
    known: Iterable[Row],
    largest: float = 1.0,
) -> list[Row]:
    """Return the rows of all runs: from the cache, run now, or as they were recorded.

    Args:
        cases: Names of the cases.
        methods: Names of the methods.
        seeds: Which.
        until: Time (of ``time.time``) after which no run is begun.
        known: Rows recorded before, for runs that are in no cache here.
        largest: Share of the budget above which no run that starts anew is begun.
    """
    recorded: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in known:
        recorded[row["case"], row["method"], row["seed"]].append(row)
    rows: list[Row] = []
    for seed in seeds:
        for case in cases:
            reason = missing(case)
            for method in methods:
                before = recorded.get((case, method, seed), [])
                for shares in pieces(method):
                    path = path_of(case, method, seed, shares)
                    costs = {_permille(share) for share in shares}
                    old = [r for r in before if _permille(r["evaluations"] / r["most"]) in costs]
                    wanted = not old and not path.exists() and time.time() < until
                    if wanted and not reason and shares[0] <= largest:
                        found = run(case, method, seed, shares)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(found))
                        told = " ".join(f"{row.get(MEASURE, math.nan):.4f}" for row in found)
                        if found:
                            print(f"{case} {method}, seed {seed}: {told}", flush=True)
                    rows += json.loads(path.read_text()) if path.exists() else old
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS_OF), choices=list(METHODS_OF))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--largest", type=float, default=1.0, help="share of the budget of runs that start anew"
    )
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds; then it records")
    parser.add_argument("--tables", action="store_true", help="run nothing, write what there is")
    parser.add_argument("--overhead", action="store_true", help="only how long a decision takes")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, path = time.time(), RESULTS / "items.json"
    before = json.loads(path.read_text())["data"] if path.exists() and not options.smoke else {}
    timed: list[Row] = before.get("overhead", [])
    if options.overhead or not (options.smoke or options.tables or timed):
        timed = overhead()
    if options.overhead:
        print("\n".join(overhead_table(timed)))
        rows = before.get("rows", [])
    elif options.smoke:
        timed = overhead((4,), experts=2, size=100, repeats=1)
        rows = [
            row for method in ("full", "auto") for row in run("digits-mlp-2", method, 0, (1.0,))
        ]
    else:
        kept.restore()
        until = 0.0 if options.tables else start + options.deadline
        seeds = range(options.first, options.first + options.seeds)
        rows = measure(
            options.cases,
            options.methods,
            seeds,
            until=until,
            known=before.get("rows", []),
            largest=options.largest,
        )
    data = {"rows": rows, "overhead": timed, "goal": GOAL, "settled": SETTLED, "cases": CASES}
    lines = [*table(rows), *(["", *overhead_table(timed)] if timed else [])]
    finish("items", lines, data, options.out)


if __name__ == "__main__":
    main()
