"""Do bounds hold as often as a choice says, when the chosen merge is measured?

python -m benchmarks.quality.confidence --out benchmarks/results/confidence.json
python -m benchmarks.quality.confidence --problems 40       fewer of them, nothing recorded
python -m benchmarks.quality.confidence --smoke             three problems: does it run?

Every problem has functions, noise, a budget and a bound of its own, all drawn from its number. The
bound lies where it decides: between the middle and the best of its metric over the true front. The
choice is then measured as a run would measure it. Finished problems are kept under
``.bench_cache/confidence``, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import map_bo
from benchmarks.record import finish
from map_bo.errors import PreferenceError
from map_bo.problems.synthetic import ConcaveQuadratics, MultiBump, SigmoidQuadratics
from map_bo.rng import child, make_generator

CACHE = Path(".bench_cache") / "confidence"
PROBLEMS = 200
LEVELS = (None, 0.5, 0.8, 0.9, 0.95)

Truth = ConcaveQuadratics | MultiBump | SigmoidQuadratics


@dataclass(frozen=True)
class Trial:
    """One problem with its budget, and the bound on one of its metrics."""

    truth: Truth
    budget: int
    metric: int
    bound: float

    @classmethod
    def drawn(cls, number: int) -> Trial:
        """Return the trial of a number; the same everywhere."""
        generator = child(make_generator(20260714), "trial", number)

        def among(options: Sequence[Any]) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=generator))]

        d, m = among((2, 3, 4)), among((2, 3))
        truth: Truth = among(
            (
                ConcaveQuadratics(d, m, seed=number, noise=among((0.0, 0.02, 0.05))),
                MultiBump(d, m, seed=number, noise=among((0.0, 0.02)), width=among((0.3, 0.5))),
                SigmoidQuadratics(d, m, seed=number, count=among((None, 200, 1000))),
            )
        )
        front = truth.true_values(truth.pareto_set(400, generator=child(generator, "front")))
        metric = among(range(m))
        share = 0.5 + 0.45 * float(torch.rand(1, generator=generator))
        bound = float(front[:, metric].quantile(share))
        return cls(truth, among((12, 16, 24)), metric, bound)

    def run(self, number: int) -> list[dict[str, Any]]:
        """Return, for each level, what the choice promised and whether the bound held."""
        result = map_bo.optimize(
            self.truth, self.budget, seed=number, progress=False, tracking="none"
        )
        name = self.truth.metrics[self.metric].name
        rows = []
        for level in LEVELS:
            about: dict[str, Any] = {"number": number, "level": level}
            try:
                choice = result.choose(at_least={name: self.bound}, confidence=level)
            except PreferenceError:
                rows.append(about | {"promised": None})
                continue
            generator = child(make_generator(number), "measured again")
            seen = self.truth.evaluate(choice.x.unsqueeze(0), generator=generator)
            ideal = self.truth.true_values(choice.x.unsqueeze(0))[0, self.metric]
            rows.append(
                about
                | {
                    "promised": choice.probability,
                    "kept": float(seen.Y[0, self.metric]) >= self.bound,
                    "kept_truly": float(ideal) >= self.bound,
                    "sure": level is None or (choice.probability or 0.0) >= level,
                }
            )
        return rows


def measure(problems: int) -> list[dict[str, Any]]:
    """Return the rows of all trials, from the cache where they were run before."""
    rows = []
    for number in range(problems):
        path = CACHE / f"{number}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(Trial.drawn(number).run(number)))
        rows += json.loads(path.read_text())
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: a row per level."""
    lines = [
        "| confidence | choices | promised, on average | kept when measured | kept by the truth | "
        "choices without the confidence asked for |",
        "|---|---|---|---|---|---|",
    ]
    for level in LEVELS:
        made = [row for row in rows if row["level"] == level and row["promised"] is not None]
        good = [row for row in made if row["sure"]]
        if not good:
            continue
        kept = mean(row["kept"] for row in good)
        error = sqrt(kept * (1 - kept) / len(good))
        lines.append(
            f"| {'prediction alone' if level is None else level} | {len(good)} | "
            f"{mean(row['promised'] for row in good):.3f} | {kept:.3f} (se {error:.3f}) | "
            f"{mean(row['kept_truly'] for row in good):.3f} | {len(made) - len(good)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(3 if options.smoke else options.problems)
    finish("Bounds that hold when measured", table(rows), {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
