"""What an older study saves a run that has an expert or a task more: paired with starting over.

python -m benchmarks.quality.transfer --out benchmarks/results/transfer.json
python -m benchmarks.quality.transfer --smoke      one seed, few evaluations: does it run?

On the digits zoo: from 4 experts with their tasks to 5, and from 3 to 4 tasks of 4 experts. The
older study has 20 evaluations, verification included, and the new run goes on from it
(``known=``); the other run starts over with the same seed. All use the default sampler and, to
keep ten seeds cheap, the quadratic surrogate. Answers are the fronts that are predicted after so
many evaluations of the new run. What an evaluation of fewer tasks costs is its share of the tasks:
completing the base in one of five is a fifth. ``completed`` measures the new task at all old points
first. Regret is the mean, over 60 preferences, of what the chosen merges are worth below the best
that any answer of the case is, in units of the range between the worst anchor and the best expert.
Cells are kept under ``.bench_cache/transfer``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases_core import anchored
from benchmarks.quality.scoring import attained, best_attained, choices, weights_of
from benchmarks.record import finish
from map_bo.data import Observations, to_maximisation
from map_bo.errors import SurrogateError
from map_bo.loop.optimize import optimize
from map_bo.loop.recommend import recommend
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.loop.transfer.sources import take
from map_bo.problems.problem import Divisible, Problem
from map_bo.problems.zoo.digits import digits_problem
from map_bo.rng import child, make_generator
from map_bo.surrogates.quadratic import Quadratic

__all__ = ["ARMS", "Growth", "answers", "growths", "saved", "table"]

CACHE = Path(".bench_cache") / "transfer"
OLD = 20
COSTS = (2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
ARMS = ("over", "grown", "completed")


@dataclass(frozen=True, eq=False)
class Growth:
    """A study and the one that it becomes.

    Attributes:
        name: What tables call it.
        old: The problem of the older study.
        new: That of the new run.
    """

    name: str
    old: Problem
    new: Problem


def growths() -> Iterator[Growth]:
    """Return the two cases."""
    four = digits_problem(4)
    yield Growth("4 to 5 experts and tasks", four, digits_problem(5))
    names = [metric.name for metric in four.metrics]
    yield Growth("3 to 4 tasks of 4 experts", four.restricted(names[:3]), four)


def answers(growth: Growth, arm: str, seed: int, old: int, most: int) -> list[dict[str, Any]]:
    """Return what a run promises and is really worth after each of its own evaluations.

    Args:
        growth: The case.
        arm: One of ``ARMS``.
        seed: Of both studies.
        old: Evaluations of the older study.
        most: What the new run may cost, in evaluations of all tasks.

    Returns:
        For each answer its ``cost`` and the ``worth`` of its choices (60 numbers).
    """
    problem, space, m = growth.new, growth.new.space, len(growth.new.metrics)
    known: Observations | None = None
    cost = 0.0
    if arm != "over":
        known = take(_older(growth, old, seed), problem).observations
        if arm == "completed":
            known, cost = _completed(known, problem, seed)
    count = 0 if known is None else len(known)
    budget = count + most - int(cost)
    settings = Settings(budget=budget, seed=seed, verify=0, surrogate=Quadratic())
    result = optimize(
        problem,
        budget,
        seed=seed,
        verify=0,
        surrogate=Quadratic(),
        known=known,
        progress=False,
        tracking="none",
    )
    seen = result.seen
    if arm == "grown" and known is not None:  # anchors that were completed in what they lacked
        cost += float((seen.measured[:count] & ~known.measured).double().sum()) / m
    scale = anchored(problem, lambda X: problem.evaluate(X, generator=make_generator(0)).Y)
    weights = weights_of(seed, m)
    found = []
    for n in range(count, len(seen) + 1):
        spent = cost + n - count
        if not any(0 <= stop - spent < 1 for stop in COSTS):
            continue
        try:
            front = recommend(
                seen.select(range(n)), space, settings, generator=make_generator(seed)
            ).front
        except SurrogateError:  # too few evaluations for a fit
            continue

        def gains(Y: Tensor) -> Tensor:
            return (to_maximisation(Y, problem.metrics) - scale.low) / (scale.high - scale.low)

        rows = choices(gains(front.mean), weights)
        real = gains(problem.evaluate(front.X[rows], generator=make_generator(0)).Y)
        found.append(
            {"cost": spent, "worth": attained(real, weights).tolist(), "real": _best(real)}
        )
    return found


@lru_cache(maxsize=2)
def _older(growth: Growth, evaluations: int, seed: int) -> Result:
    return optimize(
        growth.old, evaluations, seed=seed, surrogate=Quadratic(), progress=False, tracking="none"
    )


def _best(gains: Tensor) -> list[list[float]]:
    return torch.unique(gains, dim=0).tolist()  # type: ignore[no-any-return]


def _completed(known: Observations, problem: Problem, seed: int) -> tuple[Observations, float]:
    """Return observations with what they lack measured, and what that cost in evaluations."""
    assert isinstance(problem, Divisible)
    names = [metric.name for metric in problem.metrics]
    Y, spent = known.Y.clone(), 0
    for i in known.incomplete.nonzero().flatten().tolist():
        lacking = [j for j, there in enumerate(known.measured[i].tolist()) if not there]
        part = problem.restricted([names[j] for j in lacking])
        source = child(make_generator(seed), "complete", i)
        Y[i, lacking] = part.evaluate(known.X[i : i + 1], generator=source).Y[0]
        spent += len(lacking)
    whole = Observations(known.X, Y, known.metrics, cost=known.cost, failures=known.failures)
    return whole, spent / len(names)


def regrets(cells: dict[str, dict[str, Any]], m: int) -> dict[str, dict[int, list[list[float]]]]:
    """Return for each arm and seed pairs of cost and regret.

    Args:
        cells: Arm and seed, such as ``"over 3"`` -> its answers.
        m: Number of metrics.
    """
    every = torch.tensor(
        [row for cell in cells.values() for answer in cell["answers"] for row in answer["real"]],
        dtype=torch.float64,
    )
    found: dict[str, dict[int, list[list[float]]]] = {}
    for key, cell in cells.items():
        arm, seed = key.rsplit(" ", 1)
        best = float(best_attained(every, weights_of(int(seed), m)).mean())
        pairs = [[one["cost"], max(0.0, best - mean(one["worth"]))] for one in cell["answers"]]
        found.setdefault(arm, {})[int(seed)] = pairs
    return found


def _at(pairs: Sequence[Sequence[float]], cost: float) -> float | None:
    """Return the regret of the last answer that cost no more."""
    paid = [regret for spent, regret in pairs if spent <= cost + 1e-9]
    return paid[-1] if paid else None


def saved(pairs: Sequence[Sequence[float]], target: float) -> float | None:
    """Return the least cost from which on the regret stays at most ``target``."""
    enough = None
    for spent, regret in pairs:
        if regret > target:
            enough = None
        elif enough is None:
            enough = spent
    return enough


def table(
    name: str, found: dict[str, dict[int, list[list[float]]]], goals: Sequence[float]
) -> list[str]:
    """Return the rows of a case: median regret at each cost, and the cost of equal quality."""
    lines = []
    seeds = sorted(found["over"])
    for arm in (arm for arm in ARMS if arm in found):
        cells = [name, {"over": "starting over", "grown": "`known=`"}.get(arm, "and completed")]
        for cost in COSTS:
            held = [_at(found[arm][seed], cost) for seed in seeds if seed in found[arm]]
            there = [value for value in held if value is not None]
            cells.append(f"{median(there):.4f}" if len(there) == len(seeds) else "")
        for goal in goals:
            paid = []
            for seed in seeds:
                target = _at(found["over"][seed], goal)
                own = None if target is None else saved(found[arm][seed], target)
                paid.append(float("inf") if own is None else own)
            middle = median(paid)
            never = sum(value == float("inf") for value in paid)
            text = "not reached" if middle == float("inf") else f"{middle:.1f}"
            cells.append(text + (f" ({never} of {len(paid)} not)" if never else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--case", type=int, choices=(0, 1), help="one of the two cases alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    old, most, seeds = (8, 8, 1) if given.smoke else (OLD, int(COSTS[-1]), given.seeds)
    cache = CACHE.with_name("transfer-smoke") if given.smoke else CACHE
    cases = list(growths())
    if not given.tables:
        for seed in range(seeds):
            for growth in cases if given.case is None else cases[given.case : given.case + 1]:
                for arm in ARMS:
                    file = cache / _file(growth.name, arm, seed)
                    if not file.exists():
                        cell = {"answers": answers(growth, arm, seed, old, most)}
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_text(json.dumps(cell))
                        print(file.name, [round(a["cost"], 1) for a in cell["answers"]], flush=True)
    goals = (most,) if given.smoke else (12, 16)
    header = ["case", "run", *(f"regret at {cost:g}" for cost in COSTS)]
    header += [f"cost of the quality of {goal} evaluations anew" for goal in goals]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    data: dict[str, Any] = {"old": old, "most": most}
    for growth in cases:
        cells = {}
        whole = [
            seed
            for seed in range(seeds)
            if all((cache / _file(growth.name, arm, seed)).exists() for arm in ARMS)
        ]
        for arm in ARMS:
            for seed in whole:
                cells[f"{arm} {seed}"] = json.loads(
                    (cache / _file(growth.name, arm, seed)).read_text()
                )
        if whole:
            found = regrets(cells, len(growth.new.metrics))
            lines += table(growth.name, found, goals)
            data[growth.name] = {"seeds": whole, "regret": found}
    finish("Transfer", lines, data, given.out)


def _file(name: str, arm: str, seed: int) -> str:
    return f"{name} {arm} {seed}.json".replace(" ", "-")


if __name__ == "__main__":
    main()
