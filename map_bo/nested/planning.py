"""Planning a tree: its shape, the order of its leaves, and what has to be measured to decide.

:func:`plan` follows the settings. The other functions are its parts: trees of a given shape over
experts in a given order, orders by score, similarity and conflict, and the cost of finding these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform
from torch import Generator, Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.errors import ConfigError, EvaluationError, TreeError
from map_bo.loop.settings import Settings
from map_bo.nested.composition import expert_part
from map_bo.nested.ledger import Ledger
from map_bo.nested.nodes import NodeProblem
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, Tasks
from map_bo.problems.problem import Problem
from map_bo.rng import child
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import proposed
from map_bo.scale import widths
from map_bo.space import CoefficientSpace
from map_bo.surrogates.outliers import fit_screened
from map_bo.surrogates.prediction import predicted_mean
from map_bo.workers.attempts import measure_each
from map_bo.workers.evaluation import deaths_of
from map_bo.workers.flights import Flights

__all__ = [
    "HasSimilarity",
    "balanced_tree",
    "conflict",
    "grouped_tree",
    "most_stages",
    "order_by_affinity",
    "order_cost",
    "plan",
    "probe_count",
    "tree_by_score",
]

Item = Group | str


def most_stages(experts: int) -> int:
    """Return how many stages ``N`` experts can have: ``ceil(log2 N)``, at least 1."""
    return max(1, math.ceil(math.log2(experts)))


def balanced_tree(names: Sequence[str], stages: int) -> Group:
    """Return a tree with ``stages`` stages that merges neighbours in ``names``.

    Each stage has the smallest group size whose power reaches the number of items left:
    ``N ** (1 / S)``, rounded up. One stage is the flat merge of all; ``ceil(log2 N)`` merge pairs.

    Raises:
        TreeError: When the experts are too few for the stages.
    """
    _check(names)
    most = most_stages(len(names))
    if not 1 <= stages <= most:
        raise TreeError(
            f"{len(names)} experts cannot be merged in {stages} stages",
            hint=f"choose from 1 (all at once) to {most} (pairs)",
        )
    items: list[Item] = list(names)
    for left in range(stages, 0, -1):
        items = _grouped(items, _size(len(items), left))
    return _root(items)


def grouped_tree(names: Sequence[str], size: int) -> Group:
    """Return a tree that merges groups of at most ``size`` neighbours until one is left.

    Raises:
        TreeError: When ``size`` is less than 2.
    """
    _check(names)
    if size < 2:
        raise TreeError(
            f"the size of a group must be at least 2, got {size}", hint="give 2 or more"
        )
    items: list[Item] = list(names)
    while True:
        items = _grouped(items, size)
        if len(items) == 1:
            return _root(items)


def tree_by_score(
    scores: Mapping[str, float], shape: Callable[[int], int], stages: int | None = None
) -> Group:
    """Return a tree that merges, in every stage, items with similar scores.

    Pairs are taken closest first, as published (Li et al., arXiv 2406.07529, section 3.3); larger
    groups are neighbours in the order of their scores. The score of a group is the mean over its
    experts.

    Args:
        scores: Expert -> how well it does its own task, larger is better.
        shape: Number of items left -> size of the groups; not used when ``stages`` is given.
        stages: Number of stages; None merges until one group is left.
    """
    _check(list(scores))

    def score(item: Item) -> float:
        names = [item] if isinstance(item, str) else item.leaves
        return sum(scores[name] for name in names) / len(names)

    items: list[Item] = list(scores)
    stage = 0
    while len(items) > 1 or stage == 0:
        stage += 1
        size = shape(len(items)) if stages is None else _size(len(items), stages - stage + 1)
        items.sort(key=score)
        items = _pairs(items, score) if size == 2 else _grouped(items, size)
    return _root(items)


def order_by_affinity(names: Sequence[str], affinity: Tensor) -> list[str]:
    """Return the names in an order in which those with much affinity are neighbours.

    Average linkage, then the order of the dendrogram's leaves in which neighbours are closest
    (Bar-Joseph, Gifford & Jaakkola, *Fast optimal leaf ordering for hierarchical clustering*,
    2001).

    Args:
        names: ``N`` names.
        affinity: ``N x N``, symmetric.
    """
    if len(names) < 3:
        return list(names)
    values = np.asarray(affinity, dtype=float)
    distance = values.max() - (values + values.T) / 2
    np.fill_diagonal(distance, 0.0)
    condensed = squareform(distance, checks=False)
    tree = optimal_leaf_ordering(linkage(condensed, "average"), condensed)
    return [names[i] for i in leaves_list(tree)]


def _check(names: Sequence[str]) -> None:
    if not names:
        raise TreeError("there are no experts to merge", hint="give at least one expert")


def _size(items: int, stages: int) -> int:
    """Return the smallest whole number whose ``stages``-th power is at least ``items``."""
    size = max(1, int(items ** (1 / stages)))
    while size**stages < items:
        size += 1
    return size


def _grouped(items: list[Item], size: int) -> list[Item]:
    """Return neighbours in groups of at most ``size``, as even as possible."""
    count = math.ceil(len(items) / size)
    ends = [round(i * len(items) / count) for i in range(count + 1)]
    return [_group(items[a:b]) for a, b in pairwise(ends)]


def _pairs(items: list[Item], score: Callable[[Item], float]) -> list[Item]:
    """Return the items in pairs, closest scores first; with an odd number, one stays alone."""
    left, pairs = list(items), []
    while len(left) > 1:
        gaps = [abs(score(a) - score(b)) for a, b in pairwise(left)]
        i = int(np.argmin(gaps))
        pairs.append(_group(left[i : i + 2]))
        del left[i : i + 2]
    return [*pairs, *left]


def _group(items: list[Item]) -> Item:
    return items[0] if len(items) == 1 else Group(tuple(items))


def _root(items: list[Item]) -> Group:
    [item] = items
    return item if isinstance(item, Group) else Group((item,))


@runtime_checkable
class HasSimilarity(Protocol):
    """A problem that knows how similar its experts are."""

    def similarity(self) -> Tensor:
        """Return ``N x N``; larger is more similar."""
        ...


def plan(
    problem: Problem,
    tasks: Tasks,
    nested: Nested,
    settings: Settings,
    ledger: Ledger,
    *,
    generator: Generator,
    flights: Flights | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Group:
    """Return the tree that the settings ask for.

    The orders ``"score"`` and ``"conflict"`` need measurements, which go into the ledger. They are
    made by the workers of ``flights``, or here.

    Raises:
        TreeError: When the experts cannot have such a tree.
        ConfigError: When the problem does not know how similar its experts are.
        EvaluationError: When an expert could not be measured.
    """
    experts = problem.space.experts
    if nested.tree is not None:
        return Group.of(nested.tree, experts)
    stages, size = nested.stages, nested.group_size
    if stages is not None:
        balanced_tree(experts, stages)  # refuses a wrong number before anything is measured
    names = list(experts)
    if nested.order == "score" and len(experts) > 1:
        say("measuring the experts on their own tasks")
        scores = _scores(problem, tasks, settings, ledger, flights, generator=generator)
        return tree_by_score(scores, lambda items: size or items, stages)
    if nested.order == "similarity":
        if not isinstance(problem, HasSimilarity):
            raise ConfigError(
                f"{type(problem).__name__} does not know how similar its experts are",
                hint="choose another order: nested.order=given, score or conflict",
            )
        names = order_by_affinity(experts, problem.similarity())
    elif nested.order == "conflict":
        say("measuring how the experts disturb each other")
        seen = _probe(problem, tasks, nested, settings, ledger, flights, generator=generator)
        names = order_by_affinity(experts, conflict(seen, problem.space, settings))
    if size is not None:
        return grouped_tree(names, size)
    return balanced_tree(names, stages or most_stages(1))


def probe_count(nested: Nested, experts: int) -> int:
    """Return how many evaluations of all tasks the order needs: 0 unless it is by conflict."""
    if nested.order != "conflict" or nested.tree is not None:
        return 0
    return 2 * experts + 2 if nested.probe is None else nested.probe


def order_cost(nested: Nested, tasks: Tasks, space: CoefficientSpace, *, composes: bool) -> int:
    """Return how many data sets the order costs beyond what nodes measure anyway.

    The order by score measures each expert alone. Nodes begin with the same points and reuse these
    measurements, except where an expert alone lies outside the space, or where merges do not
    compose and so nodes share nothing.
    """
    if nested.order != "score" or nested.tree is not None or len(space.experts) < 2:
        return 0
    alone = torch.stack([_alone(space, expert) for expert in space.experts])
    inside = space.contains(alone).tolist()
    return sum(
        len(tasks.of[expert])
        for expert, within in zip(space.experts, inside, strict=True)
        if not (within and composes)
    )


def _scores(
    problem: Problem,
    tasks: Tasks,
    settings: Settings,
    ledger: Ledger,
    flights: Flights | None,
    *,
    generator: Generator,
) -> dict[str, float]:
    """Return how well each expert does its own tasks on average; larger is better."""
    space, found = problem.space, {}
    for expert in space.experts:
        node = NodeProblem(problem, tasks.of[expert], space, _identity(space), ledger)
        x = space.project(_alone(space, expert).unsqueeze(0))[0]
        rows: dict[str | int, tuple[Tensor, Generator]] = {expert: (x, child(generator, expert))}
        outcome = _measure(node, rows, settings, ledger, flights)
        if outcome.failures[0] is not None:
            raise EvaluationError(
                f"expert {expert} could not be measured: {outcome.failures[0]}",
                hint="fix the evaluator, or choose nested.order=given",
            )
        found[expert] = float(to_maximisation(outcome.Y, outcome.metrics).mean())
    return found


def _probe(
    problem: Problem,
    tasks: Tasks,
    nested: Nested,
    settings: Settings,
    ledger: Ledger,
    flights: Flights | None,
    *,
    generator: Generator,
) -> Observations:
    space = problem.space
    node = NodeProblem(problem, tasks.metrics, space, _identity(space), ledger)
    seen = Observations.empty(space.d, node.metrics)
    count = probe_count(nested, len(space.experts))
    X, _ = proposed(Sobol(), seen, space, count, pending=None, generator=child(generator, "probe"))
    rows: dict[str | int, tuple[Tensor, Generator]] = {
        str(i): (x, child(generator, "probe", i)) for i, x in enumerate(X)
    }
    return _measure(node, rows, settings, ledger, flights)


def _measure(
    node: NodeProblem,
    rows: Mapping[str | int, tuple[Tensor, Generator]],
    settings: Settings,
    ledger: Ledger,
    flights: Flights | None,
) -> Observations:
    """Measure rows (``d`` each) before the nodes run; names tell them apart in the record."""
    found = measure_each(
        node,
        "probe",
        rows,
        flights=flights,
        record=ledger.record,
        deaths=lambda row: deaths_of(ledger.events, {"probe": row}),
        retries=settings.retries,
        timeout=settings.timeout,
    )
    return Observations.joined(list(found.values()), node.space.d, node.metrics)


def conflict(seen: Observations, space: CoefficientSpace, settings: Settings) -> Tensor:
    """Return how much any two experts disturb each other by a surrogate's prediction, ``N x N``.

    The absolute mixed difference of every metric ``f``, scaled to its observed range,

        f(e_i/2 + e_j/2) - f(e_i/2) - f(e_j/2) + f(0),

    summed over metrics: the effect of merging both beyond that of merging each.

    Args:
        seen: Evaluations of all metrics.
        space: The full space.
        settings: With the surrogate.
    """
    screening = fit_screened(settings.run_surrogate, seen, space)
    mean, seen = predicted_mean(screening.model), screening.kept
    half = torch.stack([_part(space, name) / 2 for name in space.experts])
    base = _base(space).unsqueeze(0)
    n = len(half)
    pairs = list(itertools.combinations(range(n), 2))
    both = torch.stack([half[i] + half[j] for i, j in pairs]) if pairs else half[:0]
    gains = to_maximisation(seen.succeeded().Y, seen.metrics)
    low, width = gains.amin(0), widths(gains.amin(0), gains.amax(0))
    with torch.no_grad():
        at = [
            (mean(space.project(base + X)) - low) / width
            for X in (both, half, torch.zeros_like(base))
        ]
    found = torch.zeros(n, n, dtype=torch.float64)
    for row, (i, j) in enumerate(pairs):
        value = float((at[0][row] - at[1][i] - at[1][j] + at[2][0]).abs().sum())
        found[i, j] = found[j, i] = value if math.isfinite(value) else 0.0
    return found


def _alone(space: CoefficientSpace, expert: str) -> Tensor:
    """Return the coefficients (``d``) of an expert alone, whatever the bounds are."""
    return _base(space) + _part(space, expert)


def _part(space: CoefficientSpace, expert: str) -> Tensor:
    return expert_part(space, expert).rows.sum(0)


def _base(space: CoefficientSpace) -> Tensor:
    """Return the coefficients (``d``) of the base, with the operator's settings at defaults."""
    row = torch.zeros(space.d, dtype=torch.float64)
    row[torch.tensor(space.owner) < 0] = torch.tensor(space.defaults, dtype=torch.float64)
    return row


def _identity(space: CoefficientSpace) -> Tensor:
    return torch.eye(space.d, dtype=torch.float64)
