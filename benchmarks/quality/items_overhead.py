"""How long it takes to decide what to score next: eight experts, 2,000 examples per task.

What a run does before each action is timed on rows whose examples were scored in part: estimates
for all examples, the choice of the action, and the point of a new row. Outcomes are drawn: example
``i`` of a task is right where its difficulty, disturbed a little for each row, lies below the row's
accuracy, so outcomes of two rows are correlated as those of merges are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.quality.items_cases import observed
from benchmarks.quality.tables import markdown
from map_bo.data import Metric, Observations
from map_bo.examples.estimates import estimated
from map_bo.examples.sets import ExampleSet, order_of
from map_bo.loop.settings import Settings
from map_bo.rng import child, make_generator
from map_bo.samplers.allocation.allocation import Standing
from map_bo.space import CoefficientSpace

__all__ = ["measured_rows", "overhead", "overhead_table"]

EXPERTS = 8
SIZE = 2000
ROWS = (12, 24, 48)
REPEATS = 3
_SHARES = (0.05, 0.1, 0.2, 0.4)


def measured_rows(
    n: int, *, experts: int = EXPERTS, size: int = SIZE, seed: int = 0
) -> tuple[Observations, list[int], CoefficientSpace, dict[str, ExampleSet]]:
    """Return rows that were scored in part, how many examples of each, the space and the sets.

    Args:
        n: Number of rows; the first are base, experts and blend.
        experts: Number of experts, and of tasks.
        size: Examples per task.
        seed: Of points and outcomes.
    """
    names = tuple(f"expert{j}" for j in range(experts))
    space = CoefficientSpace.box(names)
    source = make_generator(seed)
    anchors = space.anchors().X
    more = space.sample(max(0, n - len(anchors)), generator=child(source, "points"))
    X = torch.cat([anchors, more])[:n]
    metrics = tuple(Metric(f"task{j}", resampling="same") for j in range(experts))
    sets = {metric.name: ExampleSet((metric.name,), size, metric.name) for metric in metrics}
    orders = {name: order_of(one, seed, name) for name, one in sets.items()}
    # Each task gains by its own expert and loses by the others.
    accuracy = 0.6 + 0.3 * X - 0.05 * (X.sum(-1, keepdim=True) - X)
    difficulty = torch.rand(experts, size, generator=child(source, "difficulty")).double()
    stops = [round(_SHARES[i % len(_SHARES)] * size) for i in range(n)]
    rows = []
    for i in range(n):
        noise = torch.randn(experts, size, generator=child(source, "noise", i)).double()
        right = difficulty + 0.15 * noise < accuracy[i].unsqueeze(-1)
        items = {name: order[: stops[i]] for name, order in orders.items()}
        outcomes = {name: right[j : j + 1, items[name]] for j, name in enumerate(orders)}
        rows.append(observed(X[i : i + 1], metrics, outcomes, items, size))
    return Observations.joined(rows, space.d, metrics), stops, space, sets


def overhead(
    rows: Sequence[int] = ROWS,
    *,
    experts: int = EXPERTS,
    size: int = SIZE,
    repeats: int = REPEATS,
) -> list[dict[str, Any]]:
    """Return, for each number of rows, the median processor seconds of each step before an action.

    Args:
        rows: Numbers of rows.
        experts: Number of experts, and of tasks.
        size: Examples per task.
        repeats: Decisions that are timed; one more is not, which warms up.
    """
    found = []
    for n in rows:
        seen, stops, space, sets = measured_rows(n, experts=experts, size=size)
        budget = sum(stops) / size + 12
        settings = Settings(budget=round(budget), verify=0, items="auto")
        allocation, sampler = settings.allocation, settings.run_sampler
        covered = {i: dict.fromkeys(sets, stop) for i, stop in enumerate(stops)}
        times: dict[str, list[float]] = {"estimate": [], "allocate": [], "propose": []}
        for repeat in range(repeats + 1):
            source = child(make_generator(repeat), "overhead")
            start = time.process_time()
            known = estimated(seen)
            told = time.process_time()
            standing = Standing(
                seen=known,
                rows=tuple(range(n)),
                X=seen.X,
                space=space,
                sets=sets,
                sizes=dict.fromkeys(sets, size),
                covered=covered,
                budget=budget,
            )
            allocation.next(standing, generator=source)
            chosen = time.process_time()
            sampler.propose(known, space, 1, generator=source)
            proposed = time.process_time()
            if repeat:
                times["estimate"].append(told - start)
                times["allocate"].append(chosen - told)
                times["propose"].append(proposed - chosen)
        found.append({"rows": n, **{name: median(own) for name, own in times.items()}})
    return found


def overhead_table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table."""
    body = [
        [str(one["rows"]), *(f"{one[name]:.2f}" for name in ("estimate", "allocate", "propose"))]
        for one in found
    ]
    return [
        f"Processor seconds before an action, {EXPERTS} experts and {SIZE} examples per task "
        "(goal: an action is chosen in less than one; a new row's point is proposed as ever):",
        "",
        *markdown(["rows", "estimates", "choice of the action", "point of a new row"], body),
    ]
