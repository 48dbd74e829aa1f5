"""From settings to a tree, with what has to be looked at or measured on the way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Observations, to_maximisation
from map_bo.errors import ConfigError, EvaluationError
from map_bo.loop.evaluation import evaluate_row
from map_bo.loop.settings import Settings
from map_bo.nested.composition import expert_part
from map_bo.nested.ledger import Ledger
from map_bo.nested.node_problem import NodeProblem
from map_bo.nested.planner import balanced, by_affinity, by_score, most_stages, sized
from map_bo.nested.settings import Nested
from map_bo.nested.tasks import Tasks
from map_bo.nested.tree import Group
from map_bo.pareto.indicators import scaled
from map_bo.problems.problem import Problem
from map_bo.rng import child
from map_bo.samplers.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predicted_mean

__all__ = ["HasSimilarity", "conflict", "plan", "probes", "unshared"]


@runtime_checkable
class HasSimilarity(Protocol):
    """A problem that knows how alike its experts are."""

    def similarity(self) -> Tensor:
        """Return ``N x N``, larger is more alike."""
        ...


def plan(
    problem: Problem,
    tasks: Tasks,
    nested: Nested,
    settings: Settings,
    ledger: Ledger,
    *,
    generator: Generator,
    say: Callable[[str], None] = lambda text: None,
) -> Group:
    """Return the tree that the settings ask for.

    The orders ``"score"`` and ``"conflict"`` measure; what they measure goes into the ledger.

    Raises:
        TreeError: When there is no such tree.
        ConfigError: When the problem cannot say how alike its experts are.
        EvaluationError: When an expert could not be measured.
    """
    experts = problem.space.experts
    if nested.tree is not None:
        return Group.of(nested.tree, experts)
    stages, size = nested.stages, nested.group_size
    if stages is not None:
        balanced(experts, stages)  # a stage count out of range is told before anything is measured
    names = list(experts)
    if nested.order == "score" and len(experts) > 1:
        say("measuring the experts on their own tasks")
        scores = _scores(problem, tasks, settings, ledger, generator=generator)
        return by_score(scores, lambda items: size or items, stages)
    if nested.order == "similarity":
        if not isinstance(problem, HasSimilarity):
            raise ConfigError(
                f"{type(problem).__name__} does not know how alike its experts are",
                hint="choose another order: nested.order=given, score or conflict",
            )
        names = by_affinity(experts, problem.similarity())
    elif nested.order == "conflict":
        say("measuring how the experts disturb each other")
        seen = _probed(problem, tasks, nested, settings, ledger, generator=generator)
        names = by_affinity(experts, conflict(seen, problem.space, settings))
    return sized(names, size) if size is not None else balanced(names, stages or most_stages(1))


def probes(nested: Nested, experts: int) -> int:
    """Return how many evaluations of all tasks the order takes: 0 unless it is by conflict."""
    if nested.order != "conflict" or nested.tree is not None:
        return 0
    return 2 * experts + 2 if nested.probe is None else nested.probe


def unshared(nested: Nested, tasks: Tasks, space: CoefficientSpace, *, composes: bool) -> int:
    """Return how many data sets the order takes that no node measures anyway.

    The order by score measures experts by themselves. Nodes begin with the same points and look
    them up, but not where an expert by itself is outside the space, nor where merges do not compose
    and nodes share nothing.
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
    problem: Problem, tasks: Tasks, settings: Settings, ledger: Ledger, *, generator: Generator
) -> dict[str, float]:
    """Return how well each expert does its own tasks, on the mean, larger is better."""
    space, found = problem.space, {}
    for expert in space.experts:
        node = NodeProblem(problem, tasks.of[expert], space, _identity(space), ledger)
        x = space.project(_alone(space, expert).unsqueeze(0))[0]
        outcome = evaluate_row(
            node, x, timeout=settings.timeout, generator=child(generator, expert)
        )
        if outcome.failures[0] is not None:
            raise EvaluationError(
                f"expert {expert} could not be measured: {outcome.failures[0]}",
                hint="mend the evaluator, or choose nested.order=given",
            )
        found[expert] = float(to_maximisation(outcome.Y, outcome.metrics).mean())
    return found


def _probed(
    problem: Problem,
    tasks: Tasks,
    nested: Nested,
    settings: Settings,
    ledger: Ledger,
    *,
    generator: Generator,
) -> Observations:
    space = problem.space
    node = NodeProblem(problem, tasks.metrics, space, _identity(space), ledger)
    seen = Observations.empty(space.d, node.metrics)
    count = probes(nested, len(space.experts))
    X = Sobol().propose(seen, space, count, generator=child(generator, "probe"))
    for i, x in enumerate(X):
        outcome = evaluate_row(
            node, x, timeout=settings.timeout, generator=child(generator, "probe", i)
        )
        seen = seen.append(outcome)
    return seen


def conflict(seen: Observations, space: CoefficientSpace, settings: Settings) -> Tensor:
    """Return how much every two experts disturb each other as a surrogate predicts, ``N x N``.

    The absolute mixed difference of every metric ``f``, scaled to its observed range,

        f(e_i/2 + e_j/2) - f(e_i/2) - f(e_j/2) + f(0),

    summed over metrics: what merging both does beyond what each does alone.

    Args:
        seen: Evaluations of all metrics.
        space: The full space.
        settings: With the surrogate.
    """
    mean = predicted_mean(settings.surrogate.fit(seen, space))
    half = torch.stack([_part(space, name) / 2 for name in space.experts])
    base = _base(space).unsqueeze(0)
    n = len(half)
    pairs = list(itertools.combinations(range(n), 2))
    both = torch.stack([half[i] + half[j] for i, j in pairs]) if pairs else half[:0]
    gains = to_maximisation(seen.succeeded().Y, seen.metrics)
    with torch.no_grad():
        at = [
            scaled(mean(space.project(base + X)), gains.amin(0), gains.amax(0))
            for X in (both, half, torch.zeros_like(base))
        ]
    found = torch.zeros(n, n, dtype=torch.float64)
    for row, (i, j) in enumerate(pairs):
        value = float((at[0][row] - at[1][i] - at[1][j] + at[2][0]).abs().sum())
        found[i, j] = found[j, i] = value if math.isfinite(value) else 0.0
    return found


def _alone(space: CoefficientSpace, expert: str) -> Tensor:
    """Return the coefficients (``d``) of an expert by itself, wherever the bounds are."""
    return _base(space) + _part(space, expert)


def _part(space: CoefficientSpace, expert: str) -> Tensor:
    return expert_part(space, expert).rows.sum(0)


def _base(space: CoefficientSpace) -> Tensor:
    """Return the coefficients (``d``) of the base, with the operator's settings at rest."""
    row = torch.zeros(space.d, dtype=torch.float64)
    row[torch.tensor(space.owner) < 0] = torch.tensor(space.resting, dtype=torch.float64)
    return row


def _identity(space: CoefficientSpace) -> Tensor:
    return torch.eye(space.d, dtype=torch.float64)
