"""What evaluations that run at the same time cost in quality, and what they save in time.

python -m benchmarks.quality.asynchronous --out benchmarks/results/asynchronous.json
python -m benchmarks.quality.asynchronous --methods hvs_nei/quadratic    another sampler
python -m benchmarks.quality.asynchronous --tables --out ...   run nothing, write what there is
python -m benchmarks.quality.asynchronous --smoke              tiny: does it run?

A run on several workers is played on a virtual clock: who finishes when depends on the durations
alone, which are drawn for each evaluation, so the order in which outcomes arrive is known
beforehand and nothing sleeps. A point is asked as soon as a worker is free, with all that is in
flight pending (asynchronous), or as many as there are workers once all of them are done (batches).
Seeds are paired: anchors, noise, durations and preferences of a seed are the same for all.

Finished runs are kept under ``.bench_cache/asynchronous``; an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from benchmarks.quality import kept
from benchmarks.quality.analysis import Difference, paired
from benchmarks.quality.cases import case as case_of
from benchmarks.quality.cases_core import Case
from benchmarks.quality.methods import METHODS, Method, matched, proposing
from benchmarks.quality.protocol import answer_after
from benchmarks.quality.tables import markdown
from benchmarks.record import RESULTS, finish
from map_bo.data import Observations
from map_bo.problems.problem import Preparable
from map_bo.rng import child, make_generator
from map_bo.samplers.sampler import Sampler, proposed

__all__ = [
    "CASES",
    "GOAL",
    "SETTLED",
    "Ask",
    "Schedule",
    "Tell",
    "at_equal_time",
    "duration",
    "plan",
    "play",
    "table",
]

Row = dict[str, Any]
Durations = Literal["fixed", "heavy-tailed"]

CACHE = Path(".bench_cache") / "asynchronous"
VERSION = 1
"""Raise it with the treatment of pending points: what was recorded before does not count."""
BUDGET = 24
CHECKPOINTS = (6, 12, 24)
GOAL = 0.003
MEASURE = "regret_solved"
"""Regret of the choice after the surrogate was solved for that preference, as `Result.choose`."""
EXACT = ("digits-mlp-4", "digits-cnn-4")
NOISY = ("digits-mlp-4-noisy", "digits-cnn-4-noisy")
CASES = (*EXACT, *NOISY)
"""Cases that are reported; nothing about pending points was settled on them."""
SETTLED = ("sigmoid-4-noisy", "digits-mlp-2-noisy")
"""Cases on which treatments of pending points were tried out."""
SMOKE = ("concave-2",)
FEW = ("digits-mlp-4", "digits-mlp-4-noisy")
"""Cases of the samplers that are not the default."""


@dataclass(frozen=True)
class Schedule:
    """How evaluations are spread over workers.

    Attributes:
        workers: How many evaluations run at a time.
        asynchronous: Whether a point is asked as soon as a worker is free.
    """

    workers: int
    asynchronous: bool = True

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.workers == 1:
            return "sequential"
        return f"{self.workers} workers, {'asynchronous' if self.asynchronous else 'batches'}"


SEQUENTIAL = Schedule(1)
WORKERS = (4, 8)
DURATIONS: tuple[Durations, ...] = ("fixed", "heavy-tailed")


def _late(maker: Any, *arguments: str) -> Any:
    return functools.partial(maker, *arguments)


_QUADRATIC = "surrogates.quadratic:Quadratic"
OTHERS = {
    "quadratic": Method("quadratic", _late(proposing, _QUADRATIC), "proposals"),
    **{
        name: Method(name, _late(matched, sampler, surrogate), "sampler")
        for name, sampler, surrogate in (
            (
                "front_uncertainty/gp",
                "samplers.posterior.front_uncertainty:FrontUncertainty",
                "surrogates.processes.gp:GP",
            ),
            (
                "front_uncertainty/hybrid",
                "samplers.posterior.front_uncertainty:FrontUncertainty",
                "surrogates.processes.hybrid:Hybrid",
            ),
            (
                "hvs_nei/quadratic",
                "samplers.posterior.scalarised:HypervolumeScalarised",
                _QUADRATIC,
            ),
            ("thompson/quadratic", "samplers.posterior.thompson:ThompsonFronts", _QUADRATIC),
            ("qlogehvi/quadratic", "samplers.posterior.hypervolume:QLogEHVI", _QUADRATIC),
            ("qlognehvi/quadratic", "samplers.posterior.hypervolume:QLogNEHVI", _QUADRATIC),
        )
    },
}
ENTRIES = {"default": METHODS["default"], **OTHERS}


@dataclass(frozen=True)
class Ask:
    """The next ``n`` rows are proposed."""

    n: int


@dataclass(frozen=True)
class Tell:
    """The outcome of a row arrives.

    Attributes:
        row: Its number, from 0.
        time: When, in mean durations of an evaluation.
    """

    row: int
    time: float


def duration(kind: Durations, seed: int, row: int) -> float:
    """Return how long a row takes, mean 1: always that, or log-normal with a sigma of 1.

    One heavy-tailed duration in 20 is above 3.1, one in 100 above 6.2. Rows of the same number
    take as long in every schedule.
    """
    if kind == "fixed":
        return 1.0
    source = child(make_generator(seed), "duration", row)
    return exp(float(torch.randn(1, generator=source, dtype=torch.float64)) - 0.5)


def plan(schedule: Schedule, kind: Durations, seed: int, budget: int) -> Iterator[Ask | Tell]:
    """Yield what happens in a run of ``budget`` rows, in order; no proposal takes time.

    Outcomes that arrive at the same moment are told in the order of their rows, and asynchronously
    a row is asked after each.
    """
    asked, now = 0, 0.0
    running: list[tuple[float, int]] = []
    while asked < budget or running:
        free = schedule.workers - len(running) if schedule.asynchronous or not running else 0
        if n := min(free, budget - asked):
            yield Ask(n)
            for row in range(asked, asked + n):
                heapq.heappush(running, (now + duration(kind, seed, row), row))
            asked += n
        now, row = heapq.heappop(running)
        yield Tell(row, now)


def play(
    case: Case, sampler: Sampler, seed: int, steps: Iterator[Ask | Tell]
) -> Iterator[tuple[float, Observations]]:
    """Yield the time and all outcomes so far, in the order of their rows, after each outcome.

    Rows that are asked at once without any in flight are one proposal; others are proposed with
    those in flight pending, as a run does.
    """
    problem, root = case.problem, make_generator(seed)
    space, metrics = problem.space, problem.metrics
    X = torch.zeros(0, space.d, dtype=torch.float64)
    outcomes: dict[int, Observations] = {}
    for step in steps:
        rows = [outcomes[i] for i in sorted(outcomes)]
        seen = Observations.joined(rows, space.d, metrics)
        if isinstance(step, Ask):
            waiting = [i for i in range(len(X)) if i not in outcomes]
            found, _ = proposed(
                sampler,
                seen,
                space,
                step.n,
                pending=X[waiting] if waiting else None,
                generator=child(root, "propose"),
            )
            X = torch.cat([X, space.check(found)])
            continue
        source = child(root, "evaluate", step.row, 0)
        outcomes[step.row] = problem.evaluate(X[step.row : step.row + 1], generator=source)
        rows = [outcomes[i] for i in sorted(outcomes)]
        yield step.time, Observations.joined(rows, space.d, metrics)


def run(
    name: str, entry: Method, schedule: Schedule, kind: Durations, seed: int, budget: int = BUDGET
) -> list[Row]:
    """Return the rows of a run, one for each checkpoint."""
    case = case_of(name)
    if isinstance(case.problem, Preparable):
        case.problem.prepare()
    sampler = entry.make(budget).run_sampler
    assert sampler is not None
    start, rows = time.perf_counter(), []
    for _, seen in play(case, sampler, seed, plan(schedule, kind, seed, budget)):
        if len(seen) not in CHECKPOINTS:
            continue
        answer = answer_after(case, entry, seen, seed)
        row: Row = {
            "case": name,
            "method": _labelled(entry.name, schedule, kind),
            "durations": kind,
            "seed": seed,
            "evaluations": len(seen),
            "seconds": round(time.perf_counter() - start, 1),
        }
        known = _known()[name]
        for measure, utility in (("regret", "utility"), ("regret_solved", "utility_solved")):
            if utility in answer.numbers:
                row[measure] = mean(known["best"][str(seed)]) - answer.numbers[utility]
        if "hypervolume" in answer.numbers:
            row["share"] = answer.numbers["hypervolume"] / known["hypervolume"]
        rows.append(row)
    return rows


@functools.cache
def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "quality_known.json").read_text())
    return found


def cells(cases: Sequence[str], names: Sequence[str], seeds: int) -> Iterator[tuple[Any, ...]]:
    """Yield what is to be run, what matters most first, so that an interruption leaves that.

    What is evaluated one after the other, or in batches, does not depend on the durations.
    """
    fixed, heavy = DURATIONS
    rounds = [
        ("default", [(SEQUENTIAL, fixed), *((Schedule(w), fixed) for w in WORKERS)]),
        ("default", [(Schedule(w), heavy) for w in WORKERS]),
        ("default", [(Schedule(w, False), fixed) for w in WORKERS]),
        *(
            (name, [(SEQUENTIAL, fixed), *((Schedule(w), fixed) for w in WORKERS)])
            for name in OTHERS
        ),
    ]
    for name, held in rounds:
        for seed in range(seeds if name in names else 0):
            for case in cases if name == "default" else [case for case in cases if case in FEW]:
                for schedule, kind in held:
                    yield case, name, schedule, kind, seed


def path_of(case: str, name: str, schedule: Schedule, kind: Durations, seed: int) -> Path:
    """Return where a run is kept."""
    what = f"{_labelled(name, schedule, kind)}-{seed}-v{VERSION}"
    return CACHE / case / f"{''.join(c if c.isalnum() or c == '-' else '_' for c in what)}.json"


def _labelled(name: str, schedule: Schedule, kind: Durations) -> str:
    varies = schedule.asynchronous and schedule.workers > 1
    return f"{name}: {schedule.name}{f', {kind}' if varies else ''}"


def measure(
    cases: Sequence[str], names: Sequence[str], seeds: int, *, until: float, known: Iterable[Row]
) -> list[Row]:
    """Return the rows of all runs: from the cache, run now, or as they were recorded.

    Args:
        cases: Names of the cases.
        names: Names of the samplers.
        seeds: How many.
        until: Time (of ``time.time``) after which no run is begun.
        known: Rows recorded before, for runs that are in no cache here.
    """
    recorded: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in known:
        recorded[row["case"], row["method"], row["seed"]].append(row)
    rows: list[Row] = []
    for case, name, schedule, kind, seed in cells(cases, names, seeds):
        path = path_of(case, name, schedule, kind, seed)
        before = recorded.get((case, _labelled(name, schedule, kind), seed))
        if not path.exists() and before is None and time.time() < until:
            found = run(case, ENTRIES[name], schedule, kind, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
            print(f"{case} {found[-1]['method']}, seed {seed}", flush=True)
        rows += json.loads(path.read_text()) if path.exists() else before or []
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Return both tables: at equal evaluations and at equal time."""
    return [
        f"Regret at equal evaluations, less that of the sequential run with the same seed (95 % "
        f"bootstrap interval over the seeds); the goal is at most {GOAL:g} at {BUDGET}:",
        "",
        *_equal_evaluations(rows),
        "",
        "At equal time, in mean durations of an evaluation: when the "
        f"{BUDGET} evaluations are done, how far the sequential run is by then, and the regrets:",
        "",
        *_equal_time(rows),
    ]


def _names(rows: Iterable[Row]) -> list[tuple[str, Schedule, Durations, str]]:
    """Return all but the sequential runs that there are: sampler, schedule, durations, label."""
    held = {row["method"] for row in rows}
    every = [
        (name, Schedule(workers, together), kind)
        for name in ENTRIES
        for together in (True, False)
        for workers in WORKERS
        for kind in (DURATIONS if together else DURATIONS[:1])
    ]
    found = [(*one, _labelled(*one)) for one in every]
    return [one for one in found if one[-1] in held]


def _cases(rows: Iterable[Row]) -> list[str]:
    held = {row["case"] for row in rows}
    return [case for case in (*CASES, *SETTLED, *SMOKE) if case in held]


def _against(rows: Sequence[Row], label: str, n: int, cases: Sequence[str]) -> Difference | None:
    baseline = _labelled(label.split(":")[0], SEQUENTIAL, "fixed")
    return paired(rows, label, baseline, MEASURE, evaluations=n, cases=cases)


def within(difference: Difference) -> str:
    """Return whether a difference of regrets keeps to the goal, by its interval."""
    if not difference.enough:
        return "too few seeds"
    if difference.high <= GOAL:
        return "yes"
    if difference.low > GOAL:
        return "no"
    return f"mean {'yes' if difference.mean <= GOAL else 'no'}, interval wider"


def _equal_evaluations(rows: Sequence[Row]) -> list[str]:
    body = []
    for name, _, _, label in _names(rows):
        cases = _cases(row for row in rows if row["method"] == label)
        groups: dict[str, tuple[str, ...]] = {case: (case,) for case in cases}
        for kind, some in (("exact", EXACT), ("noisy", NOISY), ("all", CASES)):
            if len(set(cases) & set(some)) > 1:
                groups[f"{kind} cases"] = some
        for group, held in groups.items():
            found = {n: _against(rows, label, n, held) for n in CHECKPOINTS[1:]}
            last = found[BUDGET]
            if last is not None:
                told = ["" if one is None else str(one) for one in found.values()]
                what = label.split(": ")[1]
                body.append([name, group, what, *told, within(last), str(last.pairs)])
    head = ["sampler", "cases", "schedule"]
    head += [f"at {n} evaluations" for n in CHECKPOINTS[1:]]
    return markdown([*head, f"within {GOAL:g}", "pairs"], body)


def at_equal_time(
    schedule: Schedule, kind: Durations, seed: int, budget: int = BUDGET
) -> tuple[float, int]:
    """Return when a run is done, and how many evaluations a sequential one has done by then."""
    times, alone = (
        [step.time for step in plan(one, kind, seed, budget) if isinstance(step, Tell)]
        for one in (schedule, SEQUENTIAL)
    )
    return times[-1], sum(moment <= times[-1] for moment in alone)


def _equal_time(rows: Sequence[Row]) -> list[str]:
    """Return regrets when a run is done; the sequential one has up to its next checkpoint."""
    held: dict[tuple[str, str], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        if row.get(MEASURE) is not None:
            held[row["case"], row["method"]][row["seed"], row["evaluations"]] = row[MEASURE]
    body = []
    for name, schedule, own_kind, label in _names(rows):
        for kind in (own_kind,) if schedule.asynchronous else DURATIONS:
            what = f"{schedule.name}, {kind}"
            for case in _cases(rows):
                alone = held[case, _labelled(name, SEQUENTIAL, "fixed")]
                pairs = []
                for (seed, evaluations), regret in sorted(held[case, label].items()):
                    done, count = at_equal_time(schedule, kind, seed)
                    n = min(n for n in CHECKPOINTS if n >= count)
                    if evaluations == BUDGET and (seed, n) in alone:
                        pairs.append((done, count, regret, alone[seed, n]))
                if pairs:
                    means = [mean(column) for column in zip(*pairs, strict=True)]
                    told = [f"{value:.1f}" for value in means[:2]]
                    told += [f"{value:.4f}" for value in means[2:]]
                    body.append([name, case, what, *told, str(len(pairs))])
    head = ["sampler", "case", "schedule", f"time of {BUDGET} evaluations", "sequential has done"]
    return markdown([*head, "regret", "regret of the sequential run", "pairs"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--methods", nargs="+", default=["default"], choices=list(ENTRIES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds; then it records")
    parser.add_argument("--tables", action="store_true", help="run nothing, write what there is")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    if options.smoke:
        entry, budget = ENTRIES["quadratic"], 6
        rows = [
            row
            for schedule in (SEQUENTIAL, Schedule(4), Schedule(4, False))
            for row in run(SMOKE[0], entry, schedule, "fixed", 0, budget)
        ]
    else:
        kept.restore()
        path = RESULTS / "asynchronous.json"
        known = json.loads(path.read_text())["data"]["rows"] if path.exists() else []
        names = list(ENTRIES) if options.tables else options.methods
        until = 0.0 if options.tables else start + options.deadline
        rows = measure(options.cases, names, options.seeds, until=until, known=known)
    data = {"rows": rows, "goal": GOAL, "settled": SETTLED, "cases": CASES}
    finish("asynchronous", table(rows), data, options.out)


if __name__ == "__main__":
    main()
