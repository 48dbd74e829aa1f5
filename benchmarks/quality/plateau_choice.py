"""Is the default choice ever worse than the uniform blend, and does keeping the blend cost much?

python -m benchmarks.quality.plateau_choice --out benchmarks/results/plateau_choice.json
python -m benchmarks.quality.plateau_choice --cases plateau-4 --seeds 2     nothing recorded
python -m benchmarks.quality.plateau_choice --settle                        the cases of the rule
python -m benchmarks.quality.plateau_choice --verdicts 100                  what runs of 8 advise
python -m benchmarks.quality.plateau_choice --smoke                         does it run?

Whole runs of 6, 8 and 12 evaluations, then ``Result.choose`` for all tasks alike and for seven
random preferences, once as it is by default and once with ``keep_blend=False``, which is what it
was before the rule. What a choice is worth is measured without noise; regret is against the blend,
so positive is worse than the blend. Seeds are the same for both. The rule
(:mod:`map_bo.loop.verdict.gain`) was settled on :data:`SETTLED`, never on :data:`CASES`. Finished
runs are kept under ``.bench_cache/plateau_choice``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import map_bo
from benchmarks.quality.analysis import bootstrap
from benchmarks.quality.cases import case as case_of
from benchmarks.quality.cases_core import Case
from benchmarks.quality.cases_plateau import PLATEAUS
from benchmarks.quality.scoring import weights_of
from benchmarks.record import finish

CACHE = Path(".bench_cache") / "plateau_choice"
BUDGETS = (6, 8, 12)
PREFERENCES = 7
CASES = ("plateau-4", "digits-mlp-4", "digits-mlp-4-noisy")
SETTLED = (
    *("plateau-4@5", "plateau-4@10", "plateau-4@40"),
    *("digits-cnn-4", "digits-mlp-2", "digits-cnn-4-noisy"),
)
"""Cases that the rule was settled on; ``@`` gives the epochs that a plateau's experts train for."""

_ROWS = ("blend", "before", "default")


def made(name: str) -> Case:
    """Return a case by its name, with other epochs after ``@``."""
    known, _, epochs = name.partition("@")
    return PLATEAUS[known](name, epochs=int(epochs)) if epochs else case_of(name)


def cell(name: str, seed: int, budget: int) -> dict[str, Any]:
    """Return what the choices of one run are worth: utility by preference, and how many are kept.

    Args:
        name: The case.
        seed: Seed of the run and of its preferences.
        budget: Evaluations.
    """
    case = made(name)
    file = CACHE / f"{name}-{case.digest}-{seed}-{budget}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    result = map_bo.optimize(case.problem, budget, seed=seed, progress=False, tracking="none")
    names = [metric.name for metric in case.problem.metrics]
    even = torch.full((1, case.m), 1 / case.m, dtype=torch.float64)
    weights = torch.cat([even, weights_of(seed, case.m)[:PREFERENCES]])
    anchors = case.problem.space.anchors()
    blend = anchors.X[[kind == "blend" for kind in anchors.kinds]][:1]
    found = {row: [] for row in (*_ROWS, "kept")}
    for own in weights:
        prefer = dict(zip(names, own.tolist(), strict=True))
        before, default = (result.choose(prefer, keep_blend=keep) for keep in (False, True))
        X = torch.cat([blend, before.x[None], default.x[None]])
        worth = (case.gains(case.truth(X)) @ own).tolist()
        for row, value in zip(_ROWS, worth, strict=True):
            found[row].append(value)
        found["kept"].append(default.blend)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def table(cases: Sequence[str], seeds: int, budgets: Sequence[int]) -> list[str]:
    """Return the table: regret to the blend before and with the rule, mean and 95 % interval."""
    lines = [
        "| case | evaluations | regret to the blend, before | by default | blend kept |",
        "|---|---|---|---|---|",
    ]
    for name in cases:
        for budget in budgets:
            cells = [cell(name, seed, budget) for seed in range(seeds)]
            parts = []
            for row in _ROWS[1:]:
                regrets = [mean(one["blend"]) - mean(one[row]) for one in cells]
                low, high = bootstrap([regrets])
                parts.append(f"{mean(regrets):+.4f} [{low:+.4f}, {high:+.4f}]")
            kept = mean(float(own) for one in cells for own in one["kept"])
            lines.append(f"| {name} | {budget} | {parts[0]} | {parts[1]} | {kept:.0%} |")
            print(lines[-1], flush=True)
    return lines


def advice(name: str, seeds: int, budget: int = 8) -> list[str]:
    """Return how often the verdicts of runs advise to keep the blend, as rows of a table."""
    case, kept = made(name), 0
    for seed in range(seeds):
        file = CACHE / "verdicts" / f"{name}-{case.digest}-{seed}-{budget}.json"
        if not file.exists():
            result = map_bo.optimize(
                case.problem, budget, seed=seed, progress=False, tracking="none"
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result.summary["verdict"]["advice"]))
        kept += json.loads(file.read_text()).startswith("keep the uniform blend")
    line = f"| {name} | {budget} | {kept} of {seeds} |"
    print(line, flush=True)
    return [line]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--settle", action="store_true", help="the cases of the rule instead")
    parser.add_argument("--verdicts", type=int, metavar="N", help="the advice of N runs instead")
    parser.add_argument("--smoke", action="store_true", help="one run, nothing recorded")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = SETTLED if given.settle else given.cases
    if given.smoke:
        table(["digits-mlp-2"], 1, [6])
        return
    if given.verdicts:
        lines = ["| case | evaluations | keep the blend |", "|---|---|---|"]
        lines += [line for name in cases for line in advice(name, given.verdicts)]
        finish("What verdicts advise", lines, {"runs": given.verdicts}, given.out)
        return
    lines = table(cases, given.seeds, BUDGETS)
    data = {"cases": list(cases), "seeds": given.seeds}
    finish("The default choice against the uniform blend", lines, data, given.out)


if __name__ == "__main__":
    main()
