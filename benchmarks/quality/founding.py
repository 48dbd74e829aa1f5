"""The founding comparison: the default against the method as published and against simple means.

python -m benchmarks.quality.founding [--smoke] [--out FILE.json] [--seeds 5]

Digits, N = 4 and N = 8 experts (conflicting transforms, one shared head). What counts are the
*real* metrics of all points of the returned front, measured for the comparison only and not
counted as evaluations of the method. Ground truth is a direct NSGA-II search that spends 10,000
true evaluations, one search a seed. Three rows show it: what it returns (its final population of
100); everything it ever evaluated (some thousand non-dominated points, more than any method here
returns); and that archive thinned to as many points as our front has.

Hypervolume: metrics scaled to 0 at the worst of base and experts and 1 at the best expert, per
seed relative to what the direct search returns. Regret: mean over 60 preferences of the best
scalarised value known to anyone minus the one that the choice attains when truly measured; the
choice is the front point with the best prediction, and in the last column what
``Result.choose`` gives, which solves the surrogate for the preference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from torch import Tensor

from benchmarks.record import finish
from map_bo.data import Observations, to_maximisation
from map_bo.loop.result import Result
from map_bo.loop.run import optimize
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.evolution import NSGA3, direct_search
from map_bo.pareto.gradient import thin
from map_bo.pareto.indicators import hypervolume, preference_regret, preference_weights
from map_bo.problems.merged import MergedModelProblem
from map_bo.problems.zoo import digits_problem
from map_bo.rng import child, make_generator
from map_bo.samplers.reference_design import ReferenceDesign
from map_bo.samplers.space_filling import Uniform
from map_bo.surrogates.reference import ReferenceQuadratic

CACHE = Path(".bench_cache")


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method hands over: predicted gains to choose by, and the real gains it gets."""

    predicted: Tensor
    real: Tensor
    chosen: Tensor | None = None  # real gains of the choice for each preference


class Truth:
    """A digits problem with its scale, and its direct search for ground truth."""

    def __init__(self, experts: int, evaluations: int) -> None:
        self.n, self.evaluations = experts, evaluations
        self.problem = digits_problem(experts)
        self.wide = digits_problem(experts, lower=-3.0, upper=3.0)
        anchors = self.problem.space.anchors()
        values = to_maximisation(self.measure(anchors.X), self.problem.metrics)
        kinds = torch.tensor([kind != "blend" for kind in anchors.kinds])
        experts_only = torch.tensor([kind == "expert" for kind in anchors.kinds])
        self.low, self.high = values[kinds].amin(0), values[experts_only].amax(0)
        self.blend = self.gains(self.measure(anchors.X[~kinds]))
        self.experts = self.gains(self.measure(anchors.X[experts_only]))

    def measure(self, X: Tensor, problem: MergedModelProblem | None = None) -> Tensor:
        chosen = problem or self.problem
        return chosen.evaluate(X, generator=make_generator(0)).Y

    def gains(self, Y: Tensor) -> Tensor:
        return (to_maximisation(Y, self.problem.metrics) - self.low) / (self.high - self.low)

    def volume(self, gains: Tensor) -> float:
        return hypervolume(gains, torch.zeros(gains.shape[-1], dtype=torch.float64))

    def direct(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the gains of all evaluations of the direct search and of its final population."""
        what = json.dumps([self.problem.describe(), self.evaluations, seed], sort_keys=True)
        path = CACHE / f"direct-{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
        if not path.exists():
            X, Y = direct_search(
                lambda X: to_maximisation(self.measure(X), self.problem.metrics),
                self.problem.space,
                evaluations=self.evaluations,
                population=100,
                generator=child(make_generator(seed), "direct"),
            )
            CACHE.mkdir(exist_ok=True)
            torch.save({"X": X, "Y": Y}, path)
        Y = torch.load(path, weights_only=True)["Y"]
        gains = (Y - self.low) / (self.high - self.low)
        return gains, final_population(gains, 100)


def final_population(gains: Tensor, size: int) -> Tensor:
    """Return what survives of an NSGA-II search, replayed from its evaluations in their order."""
    survival, everything = RankAndCrowding(), Problem(n_var=1, n_obj=gains.shape[-1])
    alive = Population.new("F", -gains[:size].numpy())
    for start in range(size, len(gains), size):
        born = Population.new("F", -gains[start : start + size].numpy())
        alive = survival.do(
            everything,
            Population.merge(alive, born),
            n_survive=size,
            random_state=np.random.default_rng(0),
        )
    return torch.from_numpy(-alive.get("F"))


def front_answer(truth: Truth, result: Result, problem: MergedModelProblem) -> Answer:
    real = truth.gains(truth.measure(result.front.X, problem))
    return Answer(truth.gains(result.front.mean), real)


def default(truth: Truth, budget: int, seed: int, weights: Tensor) -> Answer:
    result = optimize(truth.problem, budget, seed=seed, progress=False)
    names = [metric.name for metric in result.metrics]
    choices = [result.choose(dict(zip(names, w, strict=True))) for w in weights.tolist()]
    chosen = truth.gains(truth.measure(torch.stack([choice.x for choice in choices])))
    return replace(front_answer(truth, result, truth.problem), chosen=chosen)


def reference(truth: Truth, budget: int, seed: int, weights: Tensor, *, wide: bool) -> Answer:
    problem = truth.wide if wide else truth.problem
    result = optimize(
        problem,
        budget,
        seed=seed,
        progress=False,
        sampler=ReferenceDesign(points=budget),
        surrogate=ReferenceQuadratic(),
        solver=NSGA3(population=100, generations=25),
        verify=0,
        guard=False,
    )
    return front_answer(truth, result, problem)


def random_search(truth: Truth, budget: int, seed: int, weights: Tensor) -> Answer:
    X = Uniform(anchors=False).propose(
        Observations.empty(truth.n, truth.problem.metrics),
        truth.problem.space,
        budget,
        generator=child(make_generator(seed), "random"),
    )
    gains = truth.gains(truth.measure(X))
    best = gains[non_dominated(gains)]
    return Answer(best, best)


def score(truth: Truth, answer: Answer, known: Tensor, weights: Tensor) -> dict[str, float]:
    regret = preference_regret(answer.predicted, answer.real, known, weights)
    scores = {
        "hypervolume": truth.volume(answer.real),
        "points": len(answer.real),
        "regret": float(regret.mean()),
        "optimism": float((answer.predicted - answer.real).mean()),
    }
    if answer.chosen is not None:
        attained = (weights * answer.chosen).sum(-1)
        best = torch.maximum((weights @ known.T).amax(-1), attained)
        scores["regret of choices"] = float((best - attained).mean())
    return scores


def compare(
    experts: int, budgets: list[int], references: list[int], seeds: int, evaluations: int
) -> dict[str, Any]:
    truth = Truth(experts, evaluations)
    methods: list[tuple[str, int, Callable[[int, Tensor], Answer]]] = []
    for budget in budgets:
        methods.append(("map_bo default", budget, partial(default, truth, budget)))
    for wide, box in ((True, "[-3, 3]"), (False, "[0, 1]")):
        for budget in references:
            method = partial(reference, truth, budget, wide=wide)
            methods.append((f"reference method, box {box}", budget, method))
    for budget in budgets:
        methods.append(("random search", budget, partial(random_search, truth, budget)))
    best_expert = truth.experts[truth.experts.mean(-1).argmax()].unsqueeze(0)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        archive, population = truth.direct(seed)
        kept = archive[non_dominated(archive)]
        weights = preference_weights(60, experts, generator=child(make_generator(seed), "weights"))
        answers = [(name, budget, make(seed, weights)) for name, budget, make in methods]
        thinned = thin(kept, kept, len(answers[0][2].real))
        answers += [
            ("uniform blend", 1, Answer(truth.blend, truth.blend)),
            ("best expert", experts, Answer(best_expert, best_expert)),
            ("direct NSGA-II: final population", evaluations, Answer(population, population)),
            ("direct NSGA-II: archive, thinned", evaluations, Answer(thinned, thinned)),
            ("direct NSGA-II: whole archive", evaluations, Answer(kept, kept)),
        ]
        # Everybody's regret is measured against the best that anybody of this seed has reached.
        known = [kept, *[answer.real for _, _, answer in answers]]
        known += [answer.chosen for _, _, answer in answers if answer.chosen is not None]
        returned = truth.volume(population)
        for name, budget, answer in answers:
            scores = score(truth, answer, torch.cat(known), weights)
            about = {"experts": experts, "method": name, "evaluations": budget, "seed": seed}
            rows.append({**about, **scores, "share": scores["hypervolume"] / returned})
        print(f"N = {experts}, seed {seed} done", flush=True)
    scale = {"low": truth.low.tolist(), "high": truth.high.tolist()}
    return {"experts": experts, "rows": rows, **scale}


def table(outcome: dict[str, Any]) -> list[str]:
    lines = [
        f"N = {outcome['experts']}: mean over seeds, worst seed in brackets; reference point "
        + ", ".join(f"{value:.3f}" for value in outcome["low"])
        + "; best experts "
        + ", ".join(f"{value:.3f}" for value in outcome["high"]),
        "",
        "| method | evaluations | points | hypervolume / direct search | regret, front's points "
        "| regret, solved for the preference | optimism |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["method"], row["evaluations"]) for row in outcome["rows"])
    for key in keys:
        rows = [row for row in outcome["rows"] if (row["method"], row["evaluations"]) == key]
        share = [row["share"] for row in rows]
        regret = [row["regret"] for row in rows]
        solved = [row["regret of choices"] for row in rows if "regret of choices" in row]
        optimism = statistics.mean(row["optimism"] for row in rows)
        lines.append(
            f"| {key[0]} | {key[1]:,} | {statistics.mean(row['points'] for row in rows):,.0f} "
            f"| {statistics.mean(share):.2f} ({min(share):.2f}) "
            f"| {statistics.mean(regret):.4f} ({max(regret):.4f}) | "
            + (f"{statistics.mean(solved):.4f} ({max(solved):.4f})" if solved else "")
            + f" | {optimism:+.3f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one seed, tiny search")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=10_000, help="of the direct search")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.perf_counter()
    seeds, evaluations = (1, 300) if options.smoke else (options.seeds, options.evaluations)
    four = compare(4, [12, 24], [12] if options.smoke else [12, 20, 30, 60], seeds, evaluations)
    outcomes = [four]
    if not options.smoke:
        outcomes.append(compare(8, [12, 24], [12, 24, 60], seeds, evaluations))
    lines = [line for outcome in outcomes for line in [*table(outcome), ""]]
    finish(
        "founding",
        lines,
        {"outcomes": outcomes, "seconds": time.perf_counter() - start},
        options.out,
    )


if __name__ == "__main__":
    main()
