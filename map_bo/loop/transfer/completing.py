"""Measuring only what an imported row lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.state import RunState
from map_bo.problems.problem import Divisible, Problem
from map_bo.space import CoefficientSpace

__all__ = ["Completing", "completing"]


def completing(problem: Problem, state: RunState) -> Problem:
    """Return ``problem``, or what spares it the metrics that imported rows have already.

    Those rows wait to be completed: anchors that an older study measured on other tasks. A problem
    that is not :class:`~map_bo.problems.problem.Divisible` measures all metrics anew.
    """
    held = {
        _key(state.X[row]): state.attempted[row]
        for row in state.imported
        if row not in state.outcomes and row in state.attempted
    }
    if not held or not isinstance(problem, Divisible):
        return problem
    return Completing(problem, problem, held)


def _key(x: Tensor) -> tuple[float, ...]:
    return tuple(x.double().tolist())


class Completing:
    """A problem some of whose points have been measured in part.

    Args:
        problem: The problem.
        parts: The same, as what measures some of its metrics.
        held: What was measured before, one row by its coefficients.
    """

    def __init__(
        self, problem: Problem, parts: Divisible, held: Mapping[tuple[float, ...], Observations]
    ) -> None:
        self._problem, self._parts, self._held = problem, parts, dict(held)

    @property
    def space(self) -> CoefficientSpace:
        """The problem's coefficients."""
        return self._problem.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The problem's metrics."""
        return self._problem.metrics

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every row of ``X`` (``n x d``), and only what is lacking where a part is held."""
        rows = []
        for x in X:
            point, names = self.request(x)
            if names == tuple(metric.name for metric in self.metrics):
                rows.append(self._problem.evaluate(point.unsqueeze(0), generator=generator))
                continue
            part = self._parts.restricted(names)
            seen = part.evaluate(point.unsqueeze(0), generator=generator)
            rows.append(self.receive(x, seen))
        return Observations.joined(rows, X.shape[-1], self.metrics)

    def request(self, x: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return the point ``x`` (``d``) and the metrics that are to be measured there."""
        before = self._held.get(_key(x))
        names = tuple(metric.name for metric in self.metrics)
        if before is None:
            return x, names
        there = before.measured[0].tolist()
        lacking = tuple(n for n, known in zip(names, there, strict=True) if not known)
        return x, lacking or names

    def receive(self, x: Tensor, seen: Observations | None) -> Observations:
        """Return the whole row of ``x`` (``d``): what was held and what was measured now."""
        assert seen is not None
        before = self._held.get(_key(x))
        if before is None or len(seen.metrics) == len(self.metrics):
            return seen
        columns = {metric.name: j for j, metric in enumerate(seen.metrics)}

        def fill(old: Tensor, new: Tensor, counted: Tensor) -> Tensor:
            whole = old.clone()
            for j, metric in enumerate(self.metrics):
                if metric.name in columns:
                    k = columns[metric.name]
                    whole[:, j] = torch.where(counted[:, k], new[:, k], torch.nan)
            return whole

        there = seen.measured  # of a failed attempt, only what its reason does not take back
        gradients = noise = None
        if before.gradients is not None or seen.gradients is not None:
            both = zip(before.filled_gradients(), seen.filled_gradients(), strict=True)
            gradients, noise = (fill(old, new, there.unsqueeze(-1)) for old, new in both)
        return dataclasses.replace(
            before,
            X=x.unsqueeze(0),
            Y=fill(before.Y, seen.Y, there),
            Yvar=fill(before.Yvar, seen.Yvar, there),
            counts=fill(before.counts, seen.counts, there),
            cost=before.cost + seen.cost,
            failures=seen.failures,
            gradients=gradients,
            gradient_variance=noise,
        )
