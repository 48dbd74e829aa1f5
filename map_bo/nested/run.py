"""Driving a nested run: node after node, from the experts up to the root, in one record.

One progress bar over all nodes of a tree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import ConfigError
from map_bo.loop.progress import Progress, Reporter, silent
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.loop.state import run_identity
from map_bo.nested.budget import Purse, node_sizes
from map_bo.nested.composition import Part, check_nestable, expert_part
from map_bo.nested.conclusion import Final, conclude, pick
from map_bo.nested.ledger import Ledger
from map_bo.nested.nodes import (
    ChildMean,
    Node,
    Seeded,
    handed_part,
    informed,
    node_settings,
    run_node,
)
from map_bo.nested.planning import plan, probes, unshared
from map_bo.nested.promotion import chosen, representatives, weights_of
from map_bo.nested.record import NodeStore, Record
from map_bo.nested.result import NestedResult, NodeRecord
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, Path, Tasks, path_name
from map_bo.plain import identity_of
from map_bo.problems.problem import Preparable, Problem
from map_bo.rng import child, make_generator
from map_bo.samplers.posterior.driven import FitsSurrogate
from map_bo.tracking.codec import decode_tensor, encode_tensor
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import RunStore
from map_bo.tracking.tracker import Tracker

__all__ = ["NestedRun", "Tally", "Under"]


class Tally:
    """Counts over all nodes, for a reporter of the whole run.

    Args:
        report: Shows the whole run.
    """

    def __init__(self, report: Reporter) -> None:
        self.report, self.count = report, 0

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`; counts add up."""
        self.count += count
        self.report.done(self.count)

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.count += 1
        self.report.measured(outcome)


@dataclass(frozen=True)
class Under:
    """Shows a node's progress in that of the whole run; it is its own reporter.

    Attributes:
        whole: The tally of the whole run.
        label: What the node is called.
    """

    whole: Tally
    label: str

    @contextmanager
    def over(self, total: int) -> Iterator[Under]:
        """See :class:`map_bo.loop.progress.Progress`."""
        yield self

    def done(self, count: int) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.done(count)

    def evaluating(self, what: str) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.report.evaluating(f"{self.label}: {what}")

    def measured(self, outcome: Observations) -> None:
        """See :class:`map_bo.loop.progress.Reporter`."""
        self.whole.measured(outcome)


REFINE = "refine"


class NestedRun(Record):
    """A nested run over a store; a store that holds a part of it goes on where it was.

    All nodes share one record. Besides their own events (kind ``node``) it holds ``created``, the
    tree (``planned``), every measurement (``measured``), what each node was given (``begun``) and
    handed up (``handed``), and at the end what a flat run would have recorded, in the coefficients
    of all experts: whatever reads runs reads this one.

    Args:
        problem: What to optimise.
        settings: How; ``budget`` is that of a flat run of equal cost, so there are ``budget`` times
            the number of metrics to measure at single points.
        nested: In which stages.
        store: Where events go.
        config: Extra plain data to record.
        tracker: Is told every event.

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
                f"{', '.join(space.settings)} cannot be searched where merges of merges are "
                "merges of the experts: every stage would have a value of its own",
                hint="leave it out of the operator's search, or merge all experts at once",
            )
        self.tasks = Tasks.given(space.experts, problem.metrics, nested.tasks)
        for number, preference in enumerate(nested.preferences, start=1):
            self.tasks.check_preference(preference, number)
        if settings.reference is not None and set(settings.reference) != set(self.tasks.metrics):
            raise ConfigError(
                f"the reference point names {sorted(settings.reference)}",
                hint=f"give one value for each of {', '.join(self.tasks.metrics)}",
            )
        self.preferences: tuple[Mapping[str, float], ...] = nested.preferences or ({},)
        super().__init__(store, self._identity(), config=config, tracker=tracker)
        self.ledger = Ledger(problem.metrics, self._append, tuple(self._events))

    def _identity(self) -> dict[str, Any]:
        nested = identity_of(self.nested)["fields"]
        return run_identity(self.problem, self.settings, nested=nested)

    composes = True
    """Whether coefficients multiply along the path, so that nodes measure points of one space."""

    @property
    def shares(self) -> bool:
        """Whether nodes use what was measured elsewhere."""
        return self.nested.informed

    def _coordinates(self, node: Node) -> tuple[str, ...]:
        """Return the names of the coefficients in which a node hands up."""
        return self.problem.space.names

    def _before_conclusion(self, final: Final) -> None:
        """Record what the outcome needs to be read."""

    def drive(self, progress: Progress = silent) -> NestedResult:
        """Do all that is left of the run and return its result.

        Raises:
            BudgetError: When a node would have too few evaluations.
            EvaluationError: When too large a share of a node's evaluations failed.
            TreeError: When there is no such tree.
            StoreError: When the record cannot be written.
        """
        if isinstance(self.problem, Preparable) and self._recorded("finished") is None:
            self.problem.prepare()
        tree = self._tree()
        purse = self._purse(tree)
        handed: dict[Path, list[Part]] = {}
        records: list[NodeRecord] = []
        finals: list[Final] = []
        total = sum(purse.planned().values()) + self.nested.refine
        with progress.over(total) as report:
            shown = Tally(report)
            for path, group in tree.nodes():
                begun = self._begin(path_name(path), purse.take, path)
                nodes, of = self._nodes(path, group, handed)
                done = self._recorded("done", path_name(path))
                if path and done is not None:  # what it handed up is all that is needed of it
                    handed[path] = self._handed(path, group, nodes)
                    shown.done(int(done["evaluations"]))
                else:
                    each = int(begun["evaluations"]) // len(nodes)
                    results = [self._run(n, each, Under(shown, group.label)) for n in nodes]
                    found = [Final(nodes[i], results[i]) for i in of]
                    finals = self._scaled(path_name(path), found)
                    if path:
                        self._hand_up(path, group, finals)
                        handed[path] = self._handed(path, group, nodes)
                    self._finish(path_name(path), results, begun)
                records.append(self._told(path_name(path), group, nodes[0], handed.get(path, [])))
            if self.nested.refine:
                begun = self._begin(REFINE, lambda path, spent: self.nested.refine, ())
                node, result = self._refine(int(begun["evaluations"]), Under(shown, "all experts"))
                finals = self._scaled(REFINE, [Final(node, result)]) * len(self.preferences)
                whole = Group(tree.leaves)
                self._finish(REFINE, [result], begun)
                records.append(self._told(REFINE, whole, node, []))
            report.evaluating("the front of all tasks")
            self._before_conclusion(finals[0])
            picks = None
            if self.nested.hand_up == "point" and not self.nested.refine:
                picks = [
                    pick(one, self._weights(one.node, preference), self.settings)
                    for one, preference in zip(finals, self.preferences, strict=True)
                ]
            return conclude(
                tree,
                records,
                finals,
                picks,
                settings=self.settings,
                verify=self._verifications(),
                spent=self.spent,
                events=self._events,
                append=self._append,
                directory=self.store.directory if isinstance(self.store, JsonlStore) else None,
            )

    def _tree(self) -> Group:
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
        )
        tree.check(self.problem.space.experts)
        self._purse(tree)  # a budget that is too small is told before anything is merged
        self._record("planned", tree=tree.plain())
        return tree

    def _purse(self, tree: Group) -> Purse:
        metrics, space = len(self.tasks.metrics), self.problem.space
        sizes = node_sizes(
            tree,
            self.nested,
            {path: len(self.tasks.below(group)) for path, group in tree.nodes() if path},
            space.blocks,
            metrics,
        )
        aside = self.nested.refine + probes(self.nested, len(space.experts))
        aside += self._verifications()
        lost = unshared(self.nested, self.tasks, space, composes=self.composes)
        total = (self.settings.budget - aside) * metrics - lost
        purse = Purse(tree, self.nested, sizes, total, aside=aside + math.ceil(lost / metrics))
        if self.nested.hand_up != "point":  # refuses a root with nothing left after verification
            dataclasses.replace(self.settings, budget=purse.planned()[()], stop=None)
        return purse

    def _verifications(self) -> int:
        """Return how many merges for given preferences are measured at the end."""
        if self.nested.hand_up != "point" or self.nested.refine:
            return 0
        return min(self.settings.verifications, len(self.preferences))

    def _nodes(
        self, path: Path, group: Group, handed: Mapping[Path, Sequence[Part]]
    ) -> tuple[list[Node], list[int]]:
        """Return a node's runs, and for each preference which of them is its own.

        Preferences for which the children hand up the same share a run.
        """
        nodes: list[Node] = []
        of: list[int] = []
        for number in range(len(self.preferences)):
            suffix = f"@{len(nodes)}" if nodes else ""
            node = self._node(path, group, handed, number, path_name(path) + suffix)
            same = [i for i, other in enumerate(nodes) if node.same_as(other)]
            of.append(same[0] if same else len(nodes))
            if not same:
                nodes.append(node)
        return nodes, of

    def _node(
        self,
        path: Path,
        group: Group,
        handed: Mapping[Path, Sequence[Part]],
        number: int,
        key: str,
    ) -> Node:
        space = self.problem.space
        if self.nested.hand_up == "surrogate":
            parts = [expert_part(space, name) for name in space.experts if name in group.leaves]
        else:
            parts = [
                expert_part(space, item) if isinstance(item, str) else handed[*path, i][number]
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

    def _run(self, node: Node, evaluations: int, progress: Progress) -> Result:
        free, known = self._found(node)
        fronts = node.is_root and self.nested.hand_up != "point"
        verify = self.settings.verify if fronts else 0
        settings = node_settings(
            self.settings, self.nested, node, evaluations + free, verify=verify
        )
        surrogate = (
            informed(self.settings.surrogate, node, known)
            if self.shares and node.means is None
            else None
        )
        store = NodeStore(node.key, self._append, self._events)
        return run_node(node, settings, store, progress, surrogate=surrogate)

    def _found(self, node: Node) -> tuple[int, int]:
        """Return what a run of a node found when it began.

        How many of its anchors were known before and so cost nothing, and how many points had been
        measured.
        """
        recorded = self._recorded("found", node.key)
        if recorded is None:
            X = node.full(node.space.anchors().X)
            free = sum(not node.ledger.missing(x, node.names) for x in X)
            self._record("found", node=node.key, free=free, measured=node.ledger.measured)
            return free, node.ledger.measured
        return int(recorded["free"]), int(recorded["measured"])

    def _scaled(self, name: str, finals: Sequence[Final]) -> list[Final]:
        """Return the runs of a node on the scale that the base and the experts give."""
        done = self._recorded("done", name)
        before = None if done is None else int(done["measured"])
        scaled = []
        for final in finals:
            node, result = final.node, final.result
            reference = None
            if node.means is None:
                reference = node.ledger.reference(node.whole.space, node.names, before=before)
            if reference is not None:
                result = dataclasses.replace(result, reference=reference)
            scaled.append(Final(node, result))
        return scaled

    def _hand_up(self, path: Path, group: Group, finals: Sequence[Final]) -> None:
        """Record for each preference what a node hands up."""
        if self._recorded("handed", path_name(path)) is None:
            found = zip(finals, self._merges(finals), strict=True)
            parts = [handed_part(group.label, self._in_record(one, U)) for one, U in found]
            self._record(
                "handed",
                node=path_name(path),
                parts=[{"names": list(p.names), "rows": encode_tensor(p.rows)} for p in parts],
            )

    def _in_record(self, final: Final, U: Tensor) -> Tensor:
        """Return merges of a node (``r x k``) as they are recorded: in the full space."""
        return final.node.full(U)

    def _merges(self, finals: Sequence[Final]) -> list[Tensor]:
        """Return the merges that a node hands up, in its own space: ``r x k`` a preference."""
        if self.nested.hand_up == "point":
            return [
                chosen(final.result, self._weights(final.node, preference)).x.unsqueeze(0)
                for final, preference in zip(finals, self.preferences, strict=True)
            ]
        result = finals[0].result
        return [representatives(result, self.nested.points, result.reference)]

    def _handed(self, path: Path, group: Group, nodes: Sequence[Node]) -> list[Part]:
        """Return for each preference what a node handed up, as recorded."""
        recorded = self._recorded("handed", path_name(path))
        assert recorded is not None
        return [
            Part(group.label, tuple(part["names"]), decode_tensor(part["rows"]))
            for part in recorded["parts"]
        ]

    def _told(self, name: str, group: Group, node: Node, handed: Sequence[Part]) -> NodeRecord:
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
            handed=tuple(
                {n: value for n, value in zip(names, row.tolist(), strict=True) if value}
                for part in handed
                for row in part.rows
            ),
        )

    def _refine(self, evaluations: int, progress: Progress) -> tuple[Node, Result]:
        """Go on in the full space from all that was measured of all tasks."""
        space = self.problem.space
        parts = [expert_part(space, name) for name in space.experts]
        node = Node.of(REFINE, parts, self.tasks.metrics, self.problem, self.ledger, is_root=False)
        surrogate = informed(self.settings.surrogate, node, self._found(node)[1])
        recorded = self._recorded("seeds")
        if recorded is None:
            known = self.ledger.whole(node.names, torch.ones(space.d, dtype=torch.bool))
            self._record("seeds", points=encode_tensor(known))
            recorded = self._recorded("seeds")
        assert recorded is not None
        points = decode_tensor(recorded["points"]).reshape(-1, space.d)
        sampler = self.settings.sampler
        if isinstance(sampler, FitsSurrogate):
            sampler = sampler.fitting(surrogate, initial=0)
        settings = node_settings(
            self.settings,
            self.nested,
            node,
            evaluations + len(points),
            verify=min(self.settings.verifications, evaluations // 2),
        )
        result = run_node(
            node,
            dataclasses.replace(settings, stop=None),
            NodeStore(REFINE, self._append, self._events),
            progress,
            surrogate=surrogate,
            sampler=Seeded(points, sampler),
        )
        return node, result
