"""How well a surrogate predicts from examples, by what it is told of the noise of its rows.

python -m benchmarks.quality.pooling                digits-mlp-2 and, with ``MAP_BO_DATA``, texts
python -m benchmarks.quality.pooling --seeds 2      fewer

Fourteen merges at random, base, experts and blend are scored on 50 examples each (*even*), or on
50, 100 or 200 in turn (*mixed*). The quadratic is fitted to the estimates for all examples with the
covariance of their noise as estimated pair by pair, with one correlation per metric, and with
none; its predictions at 150 other merges are compared with the truth: the root mean square error,
the same less each metric's mean error (which no choice between merges depends on), and the share of
95 % intervals that hold the truth. The cases are those on which the use of examples was settled.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from benchmarks.quality.items_baselines import Ledger, Scoring
from benchmarks.quality.items_cases import item_case, missing
from benchmarks.quality.tables import markdown
from map_bo.data import Observations
from map_bo.examples.estimates import estimated
from map_bo.examples.sharing import pooled
from map_bo.rng import child, make_generator
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.quadratic import Quadratic

__all__ = ["CASES", "compare", "table"]

CASES = ("digits-mlp-2", "text-4-other")
DESIGNS = {"even": (50,), "mixed": (50, 100, 200)}


def compare(case: str, counts: Sequence[int], seed: int) -> dict[str, tuple[float, float, float]]:
    """Return, for each kind of noise, error, error less the mean, and coverage."""
    problem = item_case(case)
    space = problem.problem.space
    source = make_generator(seed)
    X = torch.cat([space.anchors().X, space.sample(14, generator=child(source, "rows"))])
    others = space.sample(150, generator=child(source, "others"))
    truth = problem.case.truth(others)
    ledger = Ledger(problem, seed)
    for i, x in enumerate(X):
        ledger.take(Scoring(counts[i % len(counts)], x))
    told = estimated(ledger.seen)
    kinds: dict[str, Observations] = {
        "pair by pair": told,
        "one correlation": pooled(told),
        "independent": dataclasses.replace(told, covariance=None),
    }
    found = {}
    for name, seen in kinds.items():
        prediction = predict(Quadratic().fit(seen, space), others)
        error = prediction.mean.detach() - truth
        inside = (truth >= prediction.lower) & (truth <= prediction.upper)
        found[name] = (
            float(error.square().mean().sqrt()),
            float((error - error.mean(0)).square().mean().sqrt()),
            float(inside.double().mean()),
        )
    return found


def table(cases: Sequence[str] = CASES, seeds: int = 4) -> str:
    """Return the comparison as a table, means over the seeds."""
    rows = []
    for case in cases:
        for design, counts in DESIGNS.items():
            runs = [compare(case, counts, seed) for seed in range(seeds)]
            for kind in runs[0]:
                values = torch.tensor([run[kind] for run in runs]).mean(0).tolist()
                rows.append(
                    [case, design, kind, f"{values[0]:.4f}", f"{values[1]:.4f}", f"{values[2]:.2f}"]
                )
    head = ["case", "examples", "noise", "error", "less its mean", "coverage"]
    return "\n".join(markdown(head, rows))


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    seeds = parser.parse_args().seeds
    cases = [case for case in CASES if missing(case) is None]
    print(table(cases, seeds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
