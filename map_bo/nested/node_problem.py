"""The problem of a node: its own small space, and the metrics of the tasks below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError
from map_bo.nested.ledger import Ledger
from map_bo.problems.problem import Divisible, Preparable, Problem
from map_bo.space import CoefficientSpace

__all__ = ["ChildMean", "NodeProblem", "selected"]


def selected(problem: Problem, names: Sequence[str]) -> Problem:
    """Return the problem with these metrics alone.

    One that cannot measure a part (:class:`Divisible`) measures all, and the others are dropped.
    """
    if isinstance(problem, Divisible):
        return problem.restricted(names)
    return _Selected(problem, tuple(names))


class _Selected:
    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        self.problem = problem
        all_names = [metric.name for metric in problem.metrics]
        self._columns = [all_names.index(name) for name in names]

    @property
    def space(self) -> CoefficientSpace:
        return self.problem.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(self.problem.metrics[j] for j in self._columns)

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        seen = self.problem.evaluate(X, generator=generator)
        return dataclasses.replace(
            seen,
            Y=seen.Y[:, self._columns],
            metrics=self.metrics,
            Yvar=seen.Yvar[:, self._columns],
            counts=seen.counts[:, self._columns],
            gradients=None,
            gradient_variance=None,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ChildMean:
    """One number a child, as published: the weighted mean of the metrics of its tasks.

    Attributes:
        metrics: One metric a child.
        weights: ``children x tasks``, each row adding up to 1.
        children: Label of a child -> names of its metrics.
    """

    metrics: tuple[Metric, ...]
    weights: Tensor
    children: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(
        cls,
        tasks: Sequence[Metric],
        children: Mapping[str, Sequence[str]],
        weight: Mapping[str, float],
    ) -> ChildMean:
        """Return the means of children.

        Args:
            tasks: The metrics below the node.
            children: Label of a child -> names of its metrics.
            weight: Weights of metrics; where those of a child are all zero they count alike.

        Raises:
            ConfigError: When the metrics of a child are of different kinds.
        """
        names = [metric.name for metric in tasks]
        found, rows = [], []
        for label, own in children.items():
            kinds = {(m.direction, m.kind, m.lower, m.upper) for m in tasks if m.name in own}
            if len(kinds) > 1:
                raise ConfigError(
                    f"the mean of {', '.join(own)} means nothing: they are metrics of different "
                    "kinds or directions",
                    hint="set nested.measure=tasks",
                )
            first = next(metric for metric in tasks if metric.name in own)
            found.append(dataclasses.replace(first, name=label))
            row = torch.tensor(
                [weight.get(name, 0.0) if name in own else 0.0 for name in names]
            ).double()
            if not bool(row.any()):
                row = torch.tensor([float(name in own) for name in names]).double()
            rows.append(row / row.sum())
        named = {label: tuple(own) for label, own in children.items()}
        return cls(tuple(found), torch.stack(rows), named)

    def of_rows(self, seen: Observations) -> Observations:
        """Return observations of the tasks as observations of the children."""
        ok = seen.ok.unsqueeze(-1)
        Y = torch.where(ok, seen.Y.nan_to_num() @ self.weights.T, torch.nan)
        # Where one variance is unknown, so is that of the mean; weights of 0 do not count.
        W = self.weights
        terms = torch.where(W > 0, W.square() * seen.Yvar.unsqueeze(-2), torch.zeros(()).double())
        return Observations(
            seen.X, Y, self.metrics, terms.sum(-1), cost=seen.cost, failures=seen.failures
        )


class NodeProblem:
    """Merging what a node's children hand up, and measuring the tasks below the node.

    What was measured before, by whatever node, is looked up and not measured again.

    Args:
        whole: The problem of all experts.
        names: Metrics that the node measures.
        space: The node's space, ``k`` coefficients.
        directions: ``k x d``: what a unit of each is in the full space.
        ledger: All that was measured; what is measured here is added to it.
        means: What the node looks at in place of the metrics themselves.
    """

    def __init__(
        self,
        whole: Problem,
        names: Sequence[str],
        space: CoefficientSpace,
        directions: Tensor,
        ledger: Ledger,
        means: ChildMean | None = None,
    ) -> None:
        self._whole, self.names, self._ledger = whole, tuple(names), ledger
        self.space, self.directions, self.means = space, directions, means
        known = {metric.name: metric for metric in whole.metrics}
        self.tasks = tuple(known[name] for name in self.names)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the node looks at."""
        return self.tasks if self.means is None else self.means.metrics

    def prepare(self) -> None:
        """Read checkpoints, if there are any."""
        if isinstance(self._whole, Preparable):
            self._whole.prepare()

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same node is recognised."""
        return {
            "kind": "node",
            "directions": [[float(f"{v:.12g}") for v in row] for row in self.directions.tolist()],
            "tasks": list(self.names),
            "means": None if self.means is None else self.means.weights.tolist(),
        }

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure what is not known yet at every row of ``X`` (``n x k``)."""
        U = self.space.check(X)
        parts = [self._row(u, generator) for u in U]
        found = Observations.joined(parts, self.space.d, self.tasks)
        return found if self.means is None else self.means.of_rows(found)

    def full(self, U: Tensor) -> Tensor:
        """Return what points (``n x k``) are in the full space (``n x d``)."""
        return self._whole.space.project(U @ self.directions)

    def _row(self, u: Tensor, generator: Generator) -> Observations:
        [x] = self.full(u.unsqueeze(0))
        missing = self._ledger.missing(x, self.names)
        cost = torch.zeros(1, dtype=torch.float64)
        if missing:
            part = selected(self._whole, missing)
            seen = part.evaluate(x.unsqueeze(0), generator=generator)
            reason = seen.failures[0]
            self._ledger.add(dataclasses.replace(seen, X=x.unsqueeze(0)))
            if reason is not None:
                return Observations.failed(u.unsqueeze(0), self.tasks, reason)
            cost = seen.cost
        known = self._ledger.rows(x.unsqueeze(0), self.names)
        return dataclasses.replace(known, X=u.unsqueeze(0), cost=cost)
