"""Driving a nested run: node after node, from the experts up to the root.

All nodes share one record, one budget and one progress bar.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import ConfigError
from map_bo.evaluators.isolation.world import callers_world, own_maths
from map_bo.loop.driving.steps import closing_workers, open_workers
from map_bo.loop.identity import run_identity
from map_bo.loop.progress import Progress, Reporter, follow, silent
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.nested.budget import BudgetAllocator, node_sizes
from map_bo.nested.composition import Part, check_nestable, expert_part
from map_bo.nested.conclusion import Final, conclude, select
from map_bo.nested.ledger import Ledger
from map_bo.nested.nodes import (
    ChildMean,
    Node,
    Seeded,
    drive_nodes,
    inform,
    node_run,
    node_settings,
    promoted_part,
)
from map_bo.nested.planning import order_cost, plan, probe_count
from map_bo.nested.promotion import choose_merge, representatives, weights_of
from map_bo.nested.record import NodeStore, Record
from map_bo.nested.result import NestedResult, NodeRecord
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, NodePath, Tasks, path_name
from map_bo.plain import identity_of
from map_bo.problems.problem import Preparable, Problem
from map_bo.rng import child, make_generator
from map_bo.samplers.sampler import StartsWithDesign
from map_bo.tracking.codec import decode_tensor, encode_tensor
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import RunStore
from map_bo.tracking.tracker import Tracker
from map_bo.workers.flights import Flights

__all__ = ["NestedRun", "NodeProgress", "ProgressTotals"]

REFINE = "refine"


class ProgressTotals:
    """Counts evaluations over all nodes, for the reporter of the whole run.

    Args:
        report: The reporter of the whole run.
    """

    def __init__(self, report: Reporter) -> None:
        self.report, self.count = report, 0

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`; counts of several nodes add up."""
        self.count += count
        self.report.done(self.count)

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.count += 1
        self.report.measured(outcome)


@dataclass(frozen=True)
class NodeProgress:
    """Shows a node's progress as part of that of the whole run; it is its own reporter.

    Attributes:
        totals: The counts of the whole run.
        label: The name of the node.
    """

    totals: ProgressTotals
    label: str

    @contextmanager
    def over(self, total: int) -> Iterator[NodeProgress]:
        """See :class:`map_bo.loop.progress.Progress`."""
        yield self

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.totals.done(count)

    def evaluating(self, what: str) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.totals.report.evaluating(f"{self.label}: {what}")

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.totals.measured(outcome)


class NestedRun(Record):
    """A nested run over a store; when the store holds a part of the run, it goes on from there.

    All nodes share one record. Besides their own events (kind ``node``) it holds ``created``, the
    tree (``planned``), every measurement (``measured``), what each node was given (``begun``) and
    promoted (``handed``), and at the end what a flat run would have recorded, in the coefficients
    of all experts: whatever reads runs can read this one.

    Args:
        problem: What to optimise.
        settings: How to optimise it; ``budget`` is that of a flat run of equal cost, so the run may
            make ``budget`` times the number of metrics measurements of one metric.
        nested: How to merge in stages.
        store: Where events go.
        config: Extra plain data to record.
        tracker: Receives every event.

    Raises:
        ConfigError: When tasks, preferences or the reference do not fit the problem.
        SpaceError: When a coefficient cannot be 0.
        StoreError: When the store holds another run.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        nested: Nested,
        store: RunStore,
        *,
        config: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.problem, self.settings, self.nested = problem, settings, nested
        space = problem.space
        check_nestable(space)
        if self.composes and space.settings:
            raise ConfigError(
                f"{', '.join(space.settings)} cannot be searched in a nested run of this operator: "
                "every stage would choose its own value, and merges of merges would not compose",
                hint="leave it out of the operator's search, or merge all experts at once",
            )
        self.tasks = Tasks.assign(space.experts, problem.metrics, nested.tasks)
        for number, preference in enumerate(nested.preferences, start=1):
            self.tasks.check_preference(preference, number)
        if settings.scores_parts:
            raise ConfigError(
                f"loop.items is {settings.items!r} and loop.holdout {settings.holdout:g}, and the "
                "nodes of a nested run measure all examples",
                hint="leave both out, or search without nesting: nested=none",
            )
        if settings.constraints:
            raise ConfigError(
                "a nested run cannot keep constraints: its nodes measure some of the metrics, and "
                "none of them sees what its merge becomes at the root",
                hint="merge all experts at once (without nested=...), or give bounds to `choose`",
            )
        if settings.reference is not None and set(settings.reference) != set(self.tasks.metrics):
            raise ConfigError(
                f"the reference point must name every metric, got {sorted(settings.reference)}",
                hint=f"give one value for each of {', '.join(self.tasks.metrics)}",
            )
        self.preferences: tuple[Mapping[str, float], ...] = nested.preferences or ({},)
        super().__init__(store, self._identity(store), config=config, tracker=tracker)
        self.ledger = Ledger(problem.metrics, self._append, tuple(self._events))

    def _identity(self, store: RunStore) -> dict[str, Any]:
        nested = identity_of(self.nested)["fields"]
        over = any(event.kind == "finished" for event in store.read())
        return run_identity(self.problem, self.settings, finished=over, nested=nested)

    composes = True
    """Whether coefficients multiply along the path, so that nodes measure points of one space."""

    @property
    def shares(self) -> bool:
        """Whether nodes use measurements of other nodes."""
        return self.nested.informed

    def _coordinates(self, node: Node) -> tuple[str, ...]:
        """Return the names of the coefficients of a merge that a node promoted."""
        return self.problem.space.names

    def _before_conclusion(self, final: Final) -> None:
        """Record what a reader needs to understand the result."""

    @own_maths()
    def drive(self, progress: Progress = silent) -> NestedResult:
        """Do what is left of the run and return its result.

        Raises:
            BudgetError: When a node would have too few evaluations.
            EvaluationError: When too large a share of a node's evaluations failed.
            TreeError: When the tree does not fit the experts.
            StoreError: When the record cannot be written.
        """
        if self._recorded("planned") is None:
            self.settings.rehearse(self.problem.space, self.problem.metrics)
        with self._flights() as flights:
            return self._drive(progress, flights)

    @contextmanager
    def _flights(self) -> Iterator[Flights | None]:
        """Open the workers that all nodes share; None where rows are evaluated here."""
        over = self._recorded("finished") is not None
        given = self.settings.workers
        assert not isinstance(given, int)  # settings of workers, since they were read
        if given is None or over:
            if isinstance(self.problem, Preparable) and not over:
                with callers_world():
                    self.problem.prepare()
            yield None
            return
        with callers_world():
            workers = open_workers(given, self.problem)
        with closing_workers(workers):
            yield Flights(workers)

    def _drive(self, progress: Progress, flights: Flights | None) -> NestedResult:
        tree = self._tree(flights)
        allocator = self._allocator(tree)
        promoted: dict[NodePath, list[Part]] = {}
        records: dict[NodePath, NodeRecord] = {}
        finals: list[Final] = []
        total = sum(allocator.plan().values()) + self.nested.refine
        with follow(progress, total) as report:
            totals = ProgressTotals(report)
            for groups in tree.waves(alone=flights is None):
                begun = {
                    path: self._begin(path_name(path), allocator.allocate, path)
                    for path, _ in groups
                }
                nodes = {path: self._nodes(path, group, promoted) for path, group in groups}
                open_ones = []
                for path, group in groups:
                    done = self._recorded("done", path_name(path))
                    if path and done is not None:  # only what it promoted is needed of it
                        promoted[path] = self._parts(path, group, nodes[path][0])
                        totals.done(int(done["evaluations"]))
                    else:
                        open_ones.append((path, group))
                shares = []
                for path, group in open_ones:
                    own, _ = nodes[path]
                    each = int(begun[path]["evaluations"]) // len(own)
                    shares += [(node, each, NodeProgress(totals, group.label)) for node in own]
                every = iter(self._run_nodes(shares, flights, report))
                for path, group in open_ones:
                    own, of = nodes[path]
                    results = [next(every) for _ in own]
                    found = [Final(own[i], results[i]) for i in of]
                    finals = self._rescale(path_name(path), found)
                    if path:
                        self._promote(path, group, finals)
                        promoted[path] = self._parts(path, group, own)
                    self._finish(path_name(path), results, begun[path], alone=flights is None)
                for path, group in groups:
                    own, parts = nodes[path][0], promoted.get(path, [])
                    records[path] = self._node_record(path_name(path), group, own[0], parts)
            done_nodes = [records[path] for path, _ in tree.nodes()]
            if self.nested.refine:
                started = self._begin(REFINE, lambda path, spent: self.nested.refine, ())
                shown = NodeProgress(totals, "all experts")
                node, run = self._refine(int(started["evaluations"]))
                [result] = drive_nodes([(node, run, shown)], flights, report)
                finals = self._rescale(REFINE, [Final(node, result)]) * len(self.preferences)
                whole = Group(tree.leaves)
                self._finish(REFINE, [result], started)
                done_nodes.append(self._node_record(REFINE, whole, node, []))
            report.evaluating("the front of all tasks")
            self._before_conclusion(finals[0])
            selections = None
            if self.nested.promote == "point" and not self.nested.refine:
                selections = [
                    select(one, self._weights(one.node, preference), self.settings)
                    for one, preference in zip(finals, self.preferences, strict=True)
                ]
            return conclude(
                tree,
                done_nodes,
                finals,
                selections,
                settings=self.settings,
                verify=self._verifications(),
                spent=self.spent,
                events=self._events,
                append=self._append,
                directory=self.store.directory if isinstance(self.store, JsonlStore) else None,
                flights=flights,
            )

    def _tree(self, flights: Flights | None) -> Group:
        planned = self._recorded("planned")
        if planned is not None:
            return Group.of(list(planned["tree"]))
        generator = child(make_generator(self.settings.seed), "plan")
        tree = plan(
            self.problem,
            self.tasks,
            self.nested,
            self.settings,
            self.ledger,
            generator=generator,
            flights=flights,
        )
        tree.check(self.problem.space.experts)
        self._allocator(tree)  # refuses a budget that is too small before anything is merged
        self._record("planned", tree=tree.plain())
        return tree

    def _allocator(self, tree: Group) -> BudgetAllocator:
        metrics, space = len(self.tasks.metrics), self.problem.space
        sizes = node_sizes(
            tree,
            self.nested,
            {path: len(self.tasks.below(group)) for path, group in tree.nodes() if path},
            space.blocks,
            metrics,
        )
        reserved = self.nested.refine + probe_count(self.nested, len(space.experts))
        reserved += self._verifications()
        lost = order_cost(self.nested, self.tasks, space, composes=self.composes)
        total = (self.settings.budget - reserved) * metrics - lost
        allocator = BudgetAllocator(
            tree, self.nested, sizes, total, reserved=reserved + math.ceil(lost / metrics)
        )
        if self.nested.promote != "point":  # refuses a root with nothing left after verification
            dataclasses.replace(self.settings, budget=allocator.plan()[()], stop=None)
        return allocator

    def _verifications(self) -> int:
        """Return how many merges for given preferences are measured at the end."""
        if self.nested.promote != "point" or self.nested.refine:
            return 0
        return min(self.settings.verifications, len(self.preferences))

    def _nodes(
        self, path: NodePath, group: Group, promoted: Mapping[NodePath, Sequence[Part]]
    ) -> tuple[list[Node], list[int]]:
        """Return a node's runs, and for each preference the number of its run.

        Preferences for which the children promoted the same merges share a run.
        """
        nodes: list[Node] = []
        of: list[int] = []
        for number in range(len(self.preferences)):
            suffix = f"@{len(nodes)}" if nodes else ""
            node = self._node(path, group, promoted, number, path_name(path) + suffix)
            same = [i for i, other in enumerate(nodes) if node.same_as(other)]
            of.append(same[0] if same else len(nodes))
            if not same:
                nodes.append(node)
        return nodes, of

    def _node(
        self,
        path: NodePath,
        group: Group,
        promoted: Mapping[NodePath, Sequence[Part]],
        number: int,
        key: str,
    ) -> Node:
        space = self.problem.space
        if self.nested.promote == "surrogate":
            parts = [expert_part(space, name) for name in space.experts if name in group.leaves]
        else:
            parts = [
                expert_part(space, item) if isinstance(item, str) else promoted[*path, i][number]
                for i, item in enumerate(group.children)
            ]
        names = self.tasks.below(group) if path else self.tasks.metrics
        means = None
        if self.nested.measure == "children":
            metrics = [metric for metric in self.problem.metrics if metric.name in names]
            means = ChildMean.of(metrics, self._children(group), self.preferences[number])
        return Node.of(key, parts, names, self.problem, self.ledger, is_root=not path, means=means)

    def _children(self, group: Group) -> dict[str, tuple[str, ...]]:
        return {
            item if isinstance(item, str) else item.label: self.tasks.below(item)
            for item in group.children
        }

    @staticmethod
    def _weights(node: Node, preference: Mapping[str, float]) -> dict[str, float]:
        return weights_of(preference, node.names if node.means is None else node.means.children)

    def _run_nodes(
        self,
        shares: Sequence[tuple[Node, int, NodeProgress]],
        flights: Flights | None,
        report: Reporter,
    ) -> list[Result]:
        """Run nodes with their shares of evaluations: side by side, or each as the last ends."""
        if flights is None:
            return [
                result
                for node, each, shown in shares
                for result in drive_nodes([(node, self._run(node, each), shown)], None, report)
            ]
        runs = [(node, self._run(node, each), shown) for node, each, shown in shares]
        return drive_nodes(runs, flights, report)

    def _run(self, node: Node, evaluations: int) -> Run:
        free, known = self._start(node)
        fronts = node.is_root and self.nested.promote != "point"
        verify = self.settings.verify if fronts else 0
        settings = node_settings(
            self.settings, self.nested, node, evaluations + free, verify=verify
        )
        informing = partial(inform, node=node, before=known)
        store = NodeStore(node.key, self._append, self._events)
        shares = self.shares and node.means is None
        return node_run(node, settings, store, inform=informing if shares else None)

    def _start(self, node: Node) -> tuple[int, int]:
        """Return the state in which a run of a node began, and record it the first time.

        It is the number of its anchors that were known before and so cost nothing, and the number
        of points that had been measured.
        """
        recorded = self._recorded("found", node.key)
        if recorded is None:
            X = node.full(node.space.anchors().X)
            free = sum(not node.ledger.missing(x, node.names) for x in X)
            self._record("found", node=node.key, free=free, measured=node.ledger.measured)
            return free, node.ledger.measured
        return int(recorded["free"]), int(recorded["measured"])

    def _rescale(self, name: str, finals: Sequence[Final]) -> list[Final]:
        """Return the runs of a node on the scale of the base and the experts."""
        done = self._recorded("done", name)
        before = None if done is None else int(done["measured"])
        scaled = []
        for final in finals:
            node, result = final.node, final.result
            scale = None
            if node.means is None:
                scale = node.ledger.scale(node.whole.space, node.names, before=before)
            if scale is not None:
                result = dataclasses.replace(result, scale=scale)
            scaled.append(Final(node, result))
        return scaled

    def _promote(self, path: NodePath, group: Group, finals: Sequence[Final]) -> None:
        """Record for each preference what a node promotes."""
        if self._recorded("handed", path_name(path)) is None:
            found = zip(finals, self._merges(finals), strict=True)
            parts = [promoted_part(group.label, self._in_record(one, U)) for one, U in found]
            self._record(
                "handed",
                node=path_name(path),
                parts=[{"names": list(p.names), "rows": encode_tensor(p.rows)} for p in parts],
            )

    def _in_record(self, final: Final, U: Tensor) -> Tensor:
        """Return merges of a node (``r x k``) as they are recorded: in the full space."""
        return final.node.full(U)

    def _merges(self, finals: Sequence[Final]) -> list[Tensor]:
        """Return the merges that a node promotes, in its own space: ``r x k`` per preference."""
        if self.nested.promote == "point":
            return [
                choose_merge(final.result, self._weights(final.node, preference)).x.unsqueeze(0)
                for final, preference in zip(finals, self.preferences, strict=True)
            ]
        result = finals[0].result
        return [representatives(result, self.nested.points, result.scale)]

    def _parts(self, path: NodePath, group: Group, nodes: Sequence[Node]) -> list[Part]:
        """Return for each preference what a node promoted, as recorded."""
        recorded = self._recorded("handed", path_name(path))
        assert recorded is not None
        return [
            Part(group.label, tuple(part["names"]), decode_tensor(part["rows"]))
            for part in recorded["parts"]
        ]

    def _node_record(
        self, name: str, group: Group, node: Node, parts: Sequence[Part]
    ) -> NodeRecord:
        done = self._recorded("done", name)
        assert done is not None
        names = self._coordinates(node)
        return NodeRecord(
            name=name,
            label=group.label,
            stage=group.stage if name != REFINE else 0,
            tasks=len(node.names),
            coefficients=node.space.d,
            evaluations=int(done["evaluations"]),
            data_sets=int(done["data_sets"]),
            promoted=tuple(
                {n: value for n, value in zip(names, row.tolist(), strict=True) if value}
                for part in parts
                for row in part.rows
            ),
        )

    def _refine(self, evaluations: int) -> tuple[Node, Run]:
        """Return a search on in the full space, from all points that were measured on all tasks."""
        space = self.problem.space
        parts = [expert_part(space, name) for name in space.experts]
        node = Node.of(REFINE, parts, self.tasks.metrics, self.problem, self.ledger, is_root=False)
        informing = partial(inform, node=node, before=self._start(node)[1])
        recorded = self._recorded("seeds")
        if recorded is None:
            known = self.ledger.whole(node.names, torch.ones(space.d, dtype=torch.bool))
            self._record("seeds", points=encode_tensor(known))
            recorded = self._recorded("seeds")
        assert recorded is not None
        points = decode_tensor(recorded["points"]).reshape(-1, space.d)
        sampler = self.settings.sampler
        if isinstance(sampler, StartsWithDesign):
            sampler = sampler.without_design()
        settings = node_settings(
            self.settings,
            self.nested,
            node,
            evaluations + len(points),
            verify=min(self.settings.verifications, evaluations // 2),
        )
        run = node_run(
            node,
            dataclasses.replace(settings, stop=None),
            NodeStore(REFINE, self._append, self._events),
            inform=informing,
            sampler=Seeded(points, sampler),
        )
        return node, run
