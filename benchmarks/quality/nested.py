"""Merging in stages against merging all at once, at equal cost, on 2 to 32 real experts.

python -m benchmarks.quality.nested                         goes on where it was stopped
python -m benchmarks.quality.nested --experts 16 --seeds 5
python -m benchmarks.quality.nested --smoke                 tiny, nothing recorded
python -m benchmarks.quality.nested --tables                only write the tables again

Cost is counted in data sets: one task measured at one point. A budget of ``B`` is what a flat run
of ``B`` evaluations costs, ``B N`` data sets. Regret is the mean, over preferences, of the
best known utility less that of the choice, on real metrics scaled to 0 at the worst of base
and experts and 1 at the best expert. Volume is the side of the cube as large as what the real
front dominates, along 2,048 directions (scalarised; 1 is all experts' abilities in one model).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import kept
from benchmarks.quality.cases_models import digits_networks
from benchmarks.quality.nested_tables import figure, short, tables
from benchmarks.quality.scoring import representatives
from benchmarks.record import RESULTS, finish
from map_bo.errors import BudgetError
from map_bo.loop.optimize import optimize
from map_bo.nested.budget import BudgetAllocator, node_sizes
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.planning import balanced_tree, most_stages
from map_bo.nested.settings import Nested
from map_bo.pareto.evolution import NSGA3
from map_bo.pareto.indicators import (
    directional_hypervolume,
    inverse_directions,
    preference_weights,
)
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem
from map_bo.rng import child, make_generator
from map_bo.samplers.published.public_code import PublishedDesign
from map_bo.surrogates.published import PublishedQuadratic

__all__ = ["METHODS", "Cell", "best_known", "main"]

CACHE = Path(".bench_cache") / "nested"
TABLE = RESULTS / "nested.csv"
KNOWN = RESULTS / "nested_known.json"
PLOT = Path(__file__).parents[2] / "docs" / "evidence" / "nested.png"
PREFERENCES, GIVEN = 32, 4
PER_NODE = 20  # evaluations of a node as published
_DIRECTIONS = 2048

METHODS: dict[str, dict[str, Any] | None] = {
    "flat": None,
    "fronts, 2 stages": {"stages": 2},
    "fronts, 2 stages, informed": {"stages": 2, "inform": True},
    "fronts, pairs": {"stages": 0},
    "surrogates, 2 stages": {"stages": 2, "promote": "surrogate"},
    "fronts, 2 stages, refined": {"stages": 2, "refine": -4},
    "given preferences, 2 stages": {"stages": 2, "promote": "point"},
    "published": {
        "group_size": 2,
        "order": "score",
        "promote": "point",
        "measure": "children",
        "budget_split": "equal",
    },
}
"""Settings of each method; 0 stages are as many as there can be, a negative ``refine`` is a share
of the budget. The last two merge for preferences given in advance."""

BUDGETS = {2: (12, 24), 4: (16, 24, 48), 8: (24, 48), 16: (24, 48), 32: (36, 64)}
SEEDS = {16: 3, 32: 2}  # larger zoos have fewer, unless more are asked for


@dataclass(frozen=True)
class Cell:
    """One run."""

    experts: int
    method: str
    budget: int
    seed: int

    @property
    def path(self) -> Path:
        name = self.method.replace(", ", "-").replace(" ", "-")
        return CACHE / f"{self.experts}-{name}-{self.budget}-{self.seed}.json"


def cells(experts: Sequence[int], seeds: int | None, methods: Sequence[str]) -> Iterator[Cell]:
    """Yield all cells, seed by seed and the small zoos first."""
    for seed in range(seeds or 5):
        for n in experts:
            if seed >= (seeds or SEEDS.get(n, 5)):
                continue
            for method in methods:
                if method != "flat" and n == 2:
                    continue  # two experts have one stage: the flat run
                if method == "published":
                    yield Cell(n, method, PER_NODE * most_stages(n) + 1, seed)
                    continue
                for budget in BUDGETS[n]:
                    cell = Cell(n, method, budget, seed)
                    if affordable(cell):
                        yield cell


def settings_of(cell: Cell) -> Nested | None:
    """Return how a cell merges in stages, for one preference where it is as published."""
    given = METHODS[cell.method]
    if given is None:
        return None
    how = dict(given)
    if "stages" in how:
        how["stages"] = how["stages"] or most_stages(cell.experts)
    if how.get("refine", 0) < 0:
        how["refine"] = cell.budget // -how["refine"]
    if cell.method == "published":
        how["stage_budgets"] = (PER_NODE,) * most_stages(cell.experts)
    if how.get("promote") == "point":
        names = DigitsZoo(cell.experts).names
        wanted = preferences(cell.experts, GIVEN).tolist()
        how["preferences"] = tuple(dict(zip(names, w, strict=True)) for w in wanted)
    return Nested(**how)


def affordable(cell: Cell) -> bool:
    """Return whether every node of a cell's tree can have the evaluations that it needs."""
    how, n = settings_of(cell), cell.experts
    if how is None or cell.method == "published":
        return True
    tree = balanced_tree(DigitsZoo(n).names, how.stages or 1)
    below = {path: len(group.leaves) for path, group in tree.nodes()}
    verified = min(GIVEN, cell.budget // 10, 8) if how.preferences else 0
    try:
        BudgetAllocator(
            tree,
            how,
            node_sizes(tree, how, below, 1, n),
            (cell.budget - how.refine - verified) * n,
        )
    except BudgetError:
        return False
    return True


def preferences(n: int, count: int) -> Tensor:
    """Return the preferences that all methods are judged by, ``count x n``."""
    return preference_weights(count, n, generator=child(make_generator(0), "nested", n))


def scale(n: int) -> tuple[Tensor, Tensor]:
    """Return the worst of base and experts and the best expert, for each task."""
    networks = digits_networks(DigitsZoo(n))
    ends = networks.accuracy(torch.cat([torch.zeros(1, n), torch.eye(n)]).double())
    return ends.amin(0), ends[1:].amax(0)


def run(cell: Cell) -> dict[str, Any]:
    """Do one run and measure what it hands over on the truth."""
    torch.set_num_threads(1)
    n, start = cell.experts, time.perf_counter()
    problem = digits_problem(n)
    names = [metric.name for metric in problem.metrics]
    given = settings_of(cell)
    W = preferences(n, PREFERENCES)
    common: dict[str, Any] = {"seed": cell.seed, "progress": False, "tracking": "none"}
    if given is None:
        flat = optimize(problem, cell.budget, **common)
        spent = (len(flat.seen) + len(flat.verification)) * n
        chosen = torch.stack([flat.choose(dict(zip(names, w, strict=True))).x for w in W.tolist()])
        front = flat.front
    elif given.promote == "point":
        W = W[:GIVEN]
        chosen, spent = _given(cell, problem, given, common)
        front = None
    else:
        found = optimize_nested(problem, cell.budget, nested=given, **common)
        spent = found.data_sets
        chosen = torch.stack([found.choose(dict(zip(names, w, strict=True))).x for w in W.tolist()])
        front = found.front
    seconds = time.perf_counter() - start
    networks, (low, high) = digits_networks(DigitsZoo(n)), scale(n)
    gains = (networks.accuracy(chosen) - low) / (high - low)
    side = None
    if front is not None:
        rows = representatives((front.mean - low) / (high - low))
        side = volume_side((networks.accuracy(front.X[rows]) - low) / (high - low))
    return {
        **asdict(cell),
        "data_sets": spent,
        "side": side,
        "seconds": seconds,
        "utilities": (W * gains).sum(-1).tolist(),
    }


def _given(cell: Cell, problem: Any, how: Nested, common: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Merge for preferences given in advance: one after the other as published, or all at once."""
    if cell.method != "published":
        found = optimize_nested(problem, cell.budget, nested=how, **common)
        return torch.stack([choice.x for choice in found.choices]), found.data_sets
    chosen, spent = [], 0
    for one in how.preferences:
        found = optimize_nested(
            problem,
            cell.budget,
            nested=replace(how, preferences=(one,)),
            sampler=PublishedDesign(points=PER_NODE),
            surrogate=PublishedQuadratic(),
            solver=NSGA3(),
            guard=False,
            verify=0,
            **common,
        )
        chosen.append(found.choices[0].x)
        spent += found.data_sets
    return torch.stack(chosen), spent // len(how.preferences)  # of one preference


def volume_side(gains: Tensor) -> float:
    """Return the side of the cube that is as large as what ``k x m`` gains dominate.

    The directional hypervolume, relative to that of the point (1, ..., 1).
    """
    m = gains.shape[-1]
    source = child(make_generator(0), "directions")
    inverse = inverse_directions(m, _DIRECTIONS, generator=source)
    whole = directional_hypervolume(torch.ones(1, m, dtype=torch.float64), inverse)
    return float((directional_hypervolume(gains, inverse) / whole) ** (1 / m))


def best_known(n: int, found: Sequence[Mapping[str, Any]], direct: int) -> list[float]:
    """Return the best utility known for each preference: of all runs, and of a direct search.

    The direct search climbs the truth from the best of ``direct`` random merges, one preference at
    a time, by Gaussian steps that shrink.
    """
    networks, (low, high) = digits_networks(DigitsZoo(n)), scale(n)
    W = preferences(n, PREFERENCES)
    source = child(make_generator(1), "direct", n)
    X = torch.rand(direct, n, generator=source, dtype=torch.float64)
    X = X * torch.rand(direct, 1, generator=source, dtype=torch.float64)
    best = X[((networks.accuracy(X) - low) / (high - low) @ W.T).argmax(0)]
    value = _utility(networks, best, W, low, high)
    for step in (0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.02, 0.02, 0.02, 0.02):
        for _ in range(max(1, direct // 200)):
            noise = torch.randn(*best.shape, generator=source, dtype=torch.float64)
            tried = (best + step * noise).clamp(0.0, 1.0)
            now = _utility(networks, tried, W, low, high)
            better = now > value
            best, value = torch.where(better[:, None], tried, best), torch.maximum(now, value)
    for row in found:
        own = torch.tensor(row["utilities"], dtype=torch.float64)
        value[: len(own)] = torch.maximum(value[: len(own)], own)
    known: list[float] = value.tolist()
    return known


def _utility(networks: Any, X: Tensor, W: Tensor, low: Tensor, high: Tensor) -> Tensor:
    gains = (networks.accuracy(X) - low) / (high - low)
    total: Tensor = (W * gains).sum(-1)
    return total


def gather(experts: Sequence[int], direct: int) -> list[dict[str, Any]]:
    """Return all rows with their regrets, and record them."""
    found: list[dict[str, Any]] = [
        json.loads(path.read_text()) for path in sorted(CACHE.glob("*.json"))
    ]
    rows = {_key(row): row for row in read()}
    known: dict[str, list[float]] = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    for n in sorted({row["experts"] for row in found} & set(experts)):
        own = [row for row in found if row["experts"] == n]
        if str(n) not in known:
            known[str(n)] = best_known(n, own, direct)
        best = torch.tensor(known[str(n)], dtype=torch.float64)
        for row in own:
            values = torch.tensor(row["utilities"], dtype=torch.float64)
            best[: len(values)] = torch.maximum(best[: len(values)], values)
        known[str(n)] = best.tolist()
        for row in own:
            values = torch.tensor(row["utilities"], dtype=torch.float64)
            regret = float((best[: len(values)] - values).mean())
            plain = {key: row[key] for key in COLUMNS if key in row}
            rows[_key(row)] = {**plain, "regret": regret}
    ordered = [rows[key] for key in sorted(rows)]
    KNOWN.write_text(json.dumps(known) + "\n")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ordered)
    return ordered


COLUMNS = ("experts", "method", "budget", "seed", "data_sets", "regret", "side", "seconds")


def _key(row: Mapping[str, Any]) -> tuple[int, str, int, int]:
    return int(row["experts"]), str(row["method"]), int(row["budget"]), int(row["seed"])


def read(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the recorded rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {
                **row,
                **{k: int(row[k]) for k in ("experts", "budget", "seed", "data_sets")},
                **{k: float(row[k]) if row[k] else None for k in ("regret", "side", "seconds")},
            }
            for row in csv.DictReader(file)
        ]


def _work(cell: Cell) -> tuple[Cell, float]:
    start = time.perf_counter()
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = cell.path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(run(cell)))
    temporary.replace(cell.path)
    return cell, time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", nargs="+", type=int, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="default: 5, fewer for larger zoos")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--direct", type=int, default=300, help="evaluations of a direct search")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing recorded")
    parser.add_argument("--tables", action="store_true", help="only write the tables again")
    parser.add_argument("--out", type=Path, help="record the summary as JSON")
    options = parser.parse_args(arguments)
    if options.smoke:
        row = run(Cell(4, "fronts, 2 stages", 14, 0))
        known = best_known(4, [row], 200)
        finish("nested", [f"{row['data_sets']} data sets, {len(known)} preferences"], {}, None)
        return
    if not options.tables:
        kept.restore()
        have = {_key(row) for row in read()}
        todo = [
            cell
            for cell in cells(options.experts, options.seeds, options.methods)
            if not cell.path.exists() and _key(asdict(cell)) not in have
        ]
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            waiting = [pool.submit(_work, cell) for cell in todo]
            for number, future in enumerate(as_completed(waiting), start=1):
                try:
                    cell, seconds = future.result()
                    print(f"[{number}/{len(todo)}] {cell} in {seconds:.0f} s", flush=True)
                except Exception as error:  # the others go on
                    print(f"[{number}/{len(todo)}] failed: {error}", flush=True)
        gather(options.experts, options.direct)
    rows = read()
    figure(rows, PLOT)
    finish("nested", short(rows), {"rows": len(rows), "full": tables(rows)}, options.out)


if __name__ == "__main__":
    main()
