"""One node of a tree: its problem, its settings, and its run.

The run of a node is an ordinary run. Its problem has a small space of its own, the coefficients of
what the children promoted, and the metrics of the tasks below the node (:class:`NodeProblem`), or
one number per child (:class:`ChildMean`). :class:`Seeded` starts a run from known points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.isolation.world import callers_world, known_numerics
from map_bo.loop.driving.steps import Steps, together
from map_bo.loop.progress import Progress, Reporter, follow
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop
from map_bo.nested.composition import Part, node_space, subspace
from map_bo.nested.ledger import Ledger
from map_bo.nested.record import NodeStore
from map_bo.nested.settings import Nested
from map_bo.plain import identity_of
from map_bo.problems.problem import Preparable, Problem, select_metrics
from map_bo.rng import child_seed, make_generator
from map_bo.samplers.sampler import Sampler, SeesThroughSurrogate, proposed
from map_bo.scale import SAME_POINT
from map_bo.space import CoefficientSpace
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.surrogate import Surrogate
from map_bo.workers.flights import Flights

__all__ = [
    "ChildMean",
    "Node",
    "NodeProblem",
    "Seeded",
    "drive_nodes",
    "inform",
    "node_run",
    "node_settings",
    "promoted_part",
]


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ChildMean:
    """One number per child, as published: the weighted mean of the metrics of its tasks.

    Attributes:
        metrics: One metric per child.
        weights: ``children x tasks``; each row adds up to 1.
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
            weight: Weights of metrics; where those of a child are all zero, they weigh alike.

        Raises:
            ConfigError: When the metrics of a child are of different kinds.
        """
        names = [metric.name for metric in tasks]
        found, rows = [], []
        for label, own in children.items():
            kinds = {(m.direction, m.kind, m.lower, m.upper) for m in tasks if m.name in own}
            if len(kinds) > 1:
                raise ConfigError(
                    f"the metrics {', '.join(own)} have no mean: their kinds, directions or bounds "
                    "differ",
                    hint="set nested.measure=tasks",
                )
            first = next(metric for metric in tasks if metric.name in own)
            found.append(replace(first, name=label))
            row = torch.tensor(
                [weight.get(name, 0.0) if name in own else 0.0 for name in names]
            ).double()
            if not bool(row.any()):
                row = torch.tensor([float(name in own) for name in names]).double()
            rows.append(row / row.sum())
        named = {label: tuple(own) for label, own in children.items()}
        return cls(tuple(found), torch.stack(rows), named)

    def of_rows(self, seen: Observations) -> Observations:
        """Turn observations of the tasks into observations of the children."""
        lacking = (~seen.measured).double() @ (self.weights.T > 0).double()
        ok = lacking == 0  # all tasks of a child were measured
        Y = torch.where(ok, seen.Y.nan_to_num() @ self.weights.T, torch.nan)
        Y = torch.where(seen.ok.unsqueeze(-1) | ~ok.all(-1, keepdim=True), Y, torch.nan)
        # Where one variance is unknown, so is that of the mean; weights of 0 do not count.
        W = self.weights
        terms = torch.where(W > 0, W.square() * seen.Yvar.unsqueeze(-2), torch.zeros(()).double())
        return Observations(
            seen.X, Y, self.metrics, terms.sum(-1), cost=seen.cost, failures=seen.failures
        )


class NodeProblem:
    """Merging what a node's children promoted, and measuring the tasks below the node.

    What any node has measured before is looked up and not measured again.

    Args:
        whole: The problem of all experts.
        names: Metrics that the node measures.
        space: The node's space, ``k`` coefficients.
        directions: ``k x d``: the coefficients in the full space per unit of each.
        ledger: All measurements; those made here are added to it.
        means: What the node optimises instead of the metrics themselves.
        key: The node's name, by which the record tells what it cost beside other nodes.
    """

    def __init__(
        self,
        whole: Problem,
        names: Sequence[str],
        space: CoefficientSpace,
        directions: Tensor,
        ledger: Ledger,
        means: ChildMean | None = None,
        key: str = "",
    ) -> None:
        self._key = key
        self._whole, self.names, self._ledger = whole, tuple(names), ledger
        self.space, self.directions, self.means = space, directions, means
        known = {metric.name: metric for metric in whole.metrics}
        self.tasks = tuple(known[name] for name in self.names)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that the node optimises."""
        return self.tasks if self.means is None else self.means.metrics

    def prepare(self) -> None:
        """Read the checkpoints, if there are any."""
        if isinstance(self._whole, Preparable):
            self._whole.prepare()

    def describe(self) -> dict[str, Any]:
        """Return plain data that identifies the node."""
        return {
            "kind": "node",
            "directions": [[float(f"{v:.12g}") for v in row] for row in self.directions.tolist()],
            "tasks": list(self.names),
            "means": None if self.means is None else self.means.weights.tolist(),
        }

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure what is not yet known at every row of ``X`` (``n x k``)."""
        U = self.space.check(X)
        parts = [self._row(u, generator) for u in U]
        found = Observations.joined(parts, self.space.d, self.tasks)
        return found if self.means is None else self.means.of_rows(found)

    def full(self, U: Tensor) -> Tensor:
        """Return the points ``U`` (``n x k``) in the full space (``n x d``)."""
        return self._whole.space.project(U @ self.directions)

    def remembers(self, u: Tensor) -> bool:
        """Return whether everything at ``u`` (``k``) is known, so that evaluating only looks up."""
        return not self._ledger.missing(self.full(u.unsqueeze(0))[0], self.names)

    def request(self, u: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Return the point in the full space, and the metrics that are not known there."""
        [x] = self.full(u.unsqueeze(0))
        return x, tuple(self._ledger.missing(x, self.names))

    def receive(self, u: Tensor, seen: Observations | None) -> Observations:
        """Return the row of ``u`` (``k``), with what was measured for it in the ledger."""
        found = self._received(u, seen, by=self._key)
        return found if self.means is None else self.means.of_rows(found)

    def _row(self, u: Tensor, generator: Generator) -> Observations:
        x, missing = self.request(u)
        seen = None
        if missing:
            part = select_metrics(self._whole, missing)
            with callers_world():
                seen = part.evaluate(x.unsqueeze(0), generator=generator)
        return self._received(u, seen)

    def _received(self, u: Tensor, seen: Observations | None, *, by: str = "") -> Observations:
        [x] = self.full(u.unsqueeze(0))
        cost = torch.zeros(1, dtype=torch.float64)
        if seen is not None:
            reason = seen.failures[0]
            self._ledger.add(replace(seen, X=x.unsqueeze(0)), by=by)
            if reason is not None:
                failed = self._ledger.partial(x, self.names, reason)
                return replace(failed, X=u.unsqueeze(0), cost=seen.cost)
            cost = seen.cost
        known = self._ledger.rows(x.unsqueeze(0), self.names)
        return replace(known, X=u.unsqueeze(0), cost=cost)


@dataclass(frozen=True, eq=False)
class Seeded:
    """Proposes given points first, in order, and then those of a sampler.

    Attributes:
        points: ``n x d`` points to begin with.
        sampler: Proposes all further points.
    """

    points: Tensor
    sampler: Sampler

    def __repr__(self) -> str:
        return f"Seeded({len(self.points)} points, {self.sampler!r})"

    @property
    def surrogate(self) -> Surrogate | None:
        """What the sampler looks through; see `SeesThroughSurrogate`."""
        return self.sampler.surrogate if isinstance(self.sampler, SeesThroughSurrogate) else None

    def with_surrogate(self, surrogate: Surrogate) -> Seeded:
        """Return the same; a sampler that looks through a surrogate has this one."""
        if not isinstance(self.sampler, SeesThroughSurrogate):
            return self
        return replace(self, sampler=self.sampler.with_surrogate(surrogate))

    def describe(self) -> dict[str, Any]:
        """Return plain data by which it is recognised; the points follow from the run itself."""
        content = {"points": len(self.points), "sampler": identity_of(self.sampler)}
        return {"class": f"{Seeded.__module__}:{Seeded.__qualname__}", "fields": content}

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        """Return up to ``n x d`` points to evaluate next; see :class:`Sampler`.

        The batch in which the given points end is shorter, so that the sampler sees them all.
        """
        return self.propose_and_tell(seen, space, n, pending=pending, generator=generator)[0]

    def propose_and_tell(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the points and the sampler's scores of its fit; see :class:`TellsFit`."""
        count = len(seen) + (0 if pending is None else len(pending))
        if count < len(self.points):
            return space.project(self.points[count : count + n]), {}
        return proposed(self.sampler, seen, space, n, pending=pending, generator=generator)


@dataclass(frozen=True, eq=False)
class Node:
    """A node whose children have promoted their merges.

    Attributes:
        key: Name of its run in the record.
        parts: What its children promoted.
        names: Metrics that it measures.
        space: Its space.
        directions: ``k x d``: the coefficients in the full space per unit of each of its own.
        is_root: Whether it is the root.
        whole: The problem of all experts, whose space is the full one.
        ledger: All measurements of that problem.
        means: What the node optimises instead of its metrics.
    """

    key: str
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    space: CoefficientSpace
    directions: Tensor
    is_root: bool
    whole: Problem
    ledger: Ledger
    means: ChildMean | None = None

    @classmethod
    def of(
        cls,
        key: str,
        parts: Sequence[Part],
        names: Sequence[str],
        whole: Problem,
        ledger: Ledger,
        *,
        is_root: bool,
        means: ChildMean | None = None,
    ) -> Node:
        """Return the node that merges ``parts``; with all experts, its space is the full one."""
        full = whole.space
        directions = torch.cat([part.rows for part in parts])
        columns = [i for part in parts if part.columns is not None for i in part.columns]
        entire = columns == list(range(full.d)) and len(directions) == full.d
        space = full if entire else node_space(parts, full)
        return cls(
            key, tuple(parts), tuple(names), space, directions, is_root, whole, ledger, means
        )

    @property
    def columns(self) -> Tensor:
        """``d`` booleans: which coefficients of the full space the node can change from 0."""
        return self.directions.abs().sum(0) > 0

    def problem(self) -> NodeProblem:
        """Return the problem that the node optimises."""
        return NodeProblem(
            self.whole,
            self.names,
            self.space,
            self.directions,
            self.ledger,
            self.means,
            self.key,
        )

    def full(self, U: Tensor) -> Tensor:
        """Return the points ``U`` (``n x k``) in the full space (``n x d``)."""
        return self.whole.space.project(U @ self.directions)

    def same_as(self, other: Node) -> bool:
        """Return whether two nodes would make the same run."""
        parts = [part.names for part in self.parts], [part.names for part in other.parts]
        if parts[0] != parts[1] or self.names != other.names:
            return False
        alike = torch.allclose(self.directions, other.directions, rtol=0.0, atol=SAME_POINT)
        if self.means is None or other.means is None:
            return alike and self.means is other.means
        return alike and torch.allclose(self.means.weights, other.means.weights)


def inform(surrogate: Surrogate, node: Node, before: int) -> Informed:
    """Return the surrogate that is also fitted to what was measured below a node.

    Args:
        surrogate: The surrogate of the run.
        node: The node.
        before: How many points had been measured when the node began; its own points are in its
            record.
    """
    columns = node.columns
    return Informed(
        surrogate,
        subspace(node.whole.space, columns),
        node.directions[:, columns],
        node.ledger.about(node.names, columns, before=before),
    )


def node_settings(
    settings: Settings, nested: Nested, node: Node, evaluations: int, *, verify: int | None
) -> Settings:
    """Return the settings of a node's own run.

    Args:
        settings: Those of the whole run.
        nested: How experts are merged in stages.
        node: The node.
        evaluations: Number of points that it may evaluate.
        verify: How many of these are points of its front, measured at the end.
    """
    seed = settings.seed
    if not node.is_root:
        seed = child_seed(make_generator(settings.seed), "node", node.key)
    stop = settings.stop
    least = node.space.d + 3
    if nested.budget_split == "adaptive" and not node.is_root:
        stop = Stop("regret", nested.tolerance, patience=1, least=least)
    search = evaluations - (min(8, evaluations // 10) if verify is None else verify)
    if stop is not None and max(stop.least or 0, least) >= search:
        stop = None
    reference = settings.reference
    if reference is not None:
        names = [] if node.means is not None else node.names
        reference = {name: reference[name] for name in names} or None
    return replace(
        settings,
        budget=evaluations,
        seed=seed,
        verify=verify,
        verify_extra=settings.verify_extra and node.is_root,
        reference=reference,
        stop=stop,
    )


def node_run(
    node: Node,
    settings: Settings,
    store: NodeStore,
    *,
    inform: Callable[[Surrogate], Surrogate] | None = None,
    sampler: Sampler | None = None,
) -> Run:
    """Return the run of a node, from where its record ends.

    Args:
        node: The node.
        settings: Those of :func:`node_settings`.
        store: Its record.
        inform: Turns a surrogate into one that knows more; applied to that of the settings, and
            to that of the sampler where it has its own.
        sampler: Replaces that of the settings.

    Raises:
        StoreError: When the record belongs to other settings.
    """
    if sampler is not None:
        settings = replace(settings, sampler=sampler)
    if inform is not None:
        settings = replace(
            settings,
            surrogate=inform(settings.surrogate),
            sampler=_informed_sampler(settings.sampler, inform),
        )
    return Run(node.problem(), settings, store)


def drive_nodes(
    runs: Sequence[tuple[Node, Run, Progress]], flights: Flights | None, report: Reporter
) -> list[Result]:
    """Do the runs of nodes to their ends, and return their results.

    Args:
        runs: Each node, its run, and what shows its progress.
        flights: Where they are evaluated side by side; None evaluates here, one run after another.
        report: That of the whole run.

    Raises:
        EvaluationError: When too many evaluations of a node failed.
        StoreError: When the record cannot be written.
    """
    if flights is None:
        results = []
        for node, run, progress in runs:
            with _told(node):
                results.append(run.drive(progress))
        return results
    with ExitStack() as stack:
        steps = []
        for node, run, progress in runs:
            stack.enter_context(run.alone())
            total = run.settings.search + run.settings.verifications
            shown = stack.enter_context(follow(progress, total))
            steps.append(_named(node, run.steps(flights, shown, node=node.key)))
        found = together(steps, flights, report)
        return [run.conclude(one) for (_, run, _), one in zip(runs, found, strict=True)]


def _named(node: Node, steps: Steps[T]) -> Steps[T]:
    with _told(node):
        return (yield from steps)


@contextmanager
def _told(node: Node) -> Iterator[None]:
    """Name the node in the error that too many failures are."""
    try:
        yield
    except EvaluationError as error:
        if node.key == "root":
            raise
        raise EvaluationError(f"node {node.key}: {error.message}", hint=error.hint) from error


def _informed_sampler(sampler: Sampler, inform: Callable[[Surrogate], Surrogate]) -> Sampler:
    """Return a sampler whose surrogate knows more; one without its own takes the node's."""
    if isinstance(sampler, SeesThroughSurrogate) and sampler.surrogate is not None:
        return sampler.with_surrogate(inform(sampler.surrogate))
    return sampler


def promoted_part(label: str, rows: Tensor) -> Part:
    """Return merges of a node (``r x d``, full space) as the part that it promotes."""
    count = len(rows)
    names = (label,) if count == 1 else tuple(f"{label} #{i + 1}" for i in range(count))
    return Part(label, names, rows)
