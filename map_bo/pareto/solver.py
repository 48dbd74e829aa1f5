"""What a front solver is: it turns predicted metrics into a set of trade-offs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from map_bo.data import Metric
from map_bo.ordering import Ordering
from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.gradient import thin
from map_bo.rng import child
from map_bo.space import CoefficientSpace

__all__ = ["FrontSolver", "solve_front"]


@runtime_checkable
class FrontSolver(Protocol):
    """Settings of a solver for ``max mean(x)`` over a space, in the Pareto sense."""

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        """Return ``k x d`` points of ``space``, mutually non-dominated under ``mean``.

        Args:
            mean: Maps ``n x d`` to ``n x m``, larger is better in every column, differentiable.
            space: Where to search.
            generator: Source of all randomness.
        """
        ...


def solve_front(
    solver: FrontSolver,
    mean: Callable[[Tensor], Tensor],
    space: CoefficientSpace,
    *,
    metrics: Sequence[Metric] = (),
    generator: Generator,
) -> Tensor:
    """Return ``k x d`` points of ``space``, mutually non-dominated under ``mean``.

    The solver sees coefficients and metrics in the order of their names, so that the order in which
    they were given changes nothing.

    In a space with a choice each option is solved alone, over what is continuous, and the front is
    that of all options together: so every solver handles a choice, and none of its steps crosses
    from one option to another. There are as many points as the largest of the fronts has.

    Args:
        solver: Solves a space without a choice.
        mean: See :meth:`FrontSolver.solve`.
        space: Where to search.
        metrics: The metrics that ``mean`` is of; without them, its columns keep their order.
        generator: Source of all randomness.
    """
    order = Ordering.of(space, metrics)
    if not order.is_given:

        def ordered(X: Tensor) -> Tensor:
            Y = mean(order.back(X))
            return order.values(Y) if metrics else Y

        X = solve_front(
            solver,
            ordered,
            order.space(space),
            metrics=[metrics[j] for j in order.metrics],
            generator=generator,
        )
        return order.back(X)
    if len(space.by_option) == 1:
        return solver.solve(mean, space, generator=generator)
    parts = [
        solver.solve(mean, part, generator=child(generator, "option", code))
        for code, part in enumerate(space.by_option)
    ]
    X = torch.cat(parts)
    with torch.no_grad():
        Y = mean(X)
    front = non_dominated(Y)
    return thin(X[front], Y[front], max(map(len, parts)))
