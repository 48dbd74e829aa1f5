"""Nested merging with operators that are not linear: a node promotes models, not coefficients.

Coefficients then do not multiply along the path. So the merges that a node promotes are made, kept
in memory as long as they fit and otherwise in safetensors files, and used as experts by the parent.
The coefficients of the result are those of the models that the root merged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from map_bo.errors import ConfigError, StoreError
from map_bo.loop.result import Exportable
from map_bo.loop.settings import Settings
from map_bo.merging.checkpoints.checkpoint import CheckpointSource
from map_bo.nested.composition import Part
from map_bo.nested.conclusion import Final
from map_bo.nested.ledger import Ledger
from map_bo.nested.nodes import ChildMean, Node
from map_bo.nested.reading import load_nested
from map_bo.nested.result import Exporting, NestedResult
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, NodePath, path_name
from map_bo.problems.problem import Problem
from map_bo.tracking.codec import decode_tensor
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event, RunStore
from map_bo.tracking.tracker import Tracker

__all__ = [
    "Composing",
    "MaterialisedRun",
    "Mergeable",
    "Models",
    "composes",
    "nested_exporter",
    "rebuild_root",
]

_FOLDER = "merged"


@runtime_checkable
class Composing(Protocol):
    """A problem that says whether coefficients multiply along the path of a tree."""

    @property
    def composes(self) -> bool:
        """Whether merges of merges are merges of the experts."""
        ...


@runtime_checkable
class Mergeable(Composing, Protocol):
    """A problem of real models, whose merges can be experts of another merge."""

    def with_experts(self, experts: Mapping[str, Any], names: Sequence[str]) -> Any:
        """Return the problem of merging other experts, with some of the metrics."""
        ...

    def merged(self, x: Tensor) -> dict[str, Tensor]:
        """Return the state dict merged with ``x`` (``d``)."""
        ...


def composes(problem: Problem) -> bool:
    """Return whether coefficients of a problem multiply along the path of a tree.

    They do unless the problem says otherwise: a table or a formula has no merges besides its
    coefficients.
    """
    return not isinstance(problem, Composing) or problem.composes


class Models:
    """The merges that nodes promoted: in memory up to a limit, then in files.

    Args:
        directory: Where files go; None keeps everything in memory.
        limit: Bytes that may be kept in memory.
    """

    def __init__(self, directory: Path | None, limit: float) -> None:
        self._directory, self._left = directory, limit
        self._held: dict[str, CheckpointSource] = {}

    def __getitem__(self, name: str) -> CheckpointSource:
        return self._held[name]

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a merge under a name.

        Raises:
            StoreError: When its file cannot be written.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size <= self._left or self._directory is None:
            self._left -= size
            self._held[name] = dict(tensors)
            return
        folder = self._directory / _FOLDER
        path = folder / f"{len(self._held)}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Tied tensors share memory, which the format does not allow.
            save_file({key: value.clone() for key, value in tensors.items()}, temporary)
            temporary.replace(path)
        except OSError as error:
            raise StoreError(
                f"a merge cannot be written to {path}: {error.strerror or error}",
                hint="free some disk space and resume; no measurement is lost",
            ) from error
        self._held[name] = path


class MaterialisedRun(NestedRun):
    """A nested run whose nodes promote models; in all else it is a :class:`NestedRun`.

    Every node searches the coefficients of the models that it merges, and measures the tasks below
    it. Nodes do not share measurements.

    Raises:
        ConfigError: When the settings need coefficients that compose.
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
        if not isinstance(problem, Mergeable):
            raise ConfigError(
                f"{type(problem).__name__} has no models to merge in stages",
                hint="merge all experts at once: leave out nested=...",
            )
        for wrong, name in (
            (nested.promote == "surrogate", "nested.promote=surrogate"),
            (nested.refine > 0, f"nested.refine={nested.refine}"),
            (bool(nested.inform), "nested.inform=true"),
        ):
            if wrong:
                raise ConfigError(
                    f"{name} needs an operator that is linear in its coefficients",
                    hint="use operator=task_arithmetic, or nested.promote=points without it",
                )
        if settings.workers is not None:
            raise ConfigError(
                "workers cannot evaluate a nested run of this operator: the merges that nodes "
                "promote, which they would have to hold, are made during the run",
                hint="leave out workers, use operator=task_arithmetic, or merge all experts at "
                "once with nested=none",
            )
        if len(nested.preferences) > 1:
            # Each has experts of its own at the root, and a result is in the space of one root.
            raise ConfigError(
                f"{len(nested.preferences)} preferences need an operator that is linear in its "
                "coefficients",
                hint="run once for each preference, or keep fronts with nested.promote=points",
            )
        super().__init__(problem, settings, nested, store, config=config, tracker=tracker)
        self._mergeable: Mergeable = problem
        directory = store.directory if isinstance(store, JsonlStore) else None
        self._models = Models(directory, nested.memory * 1e9)
        self._ledgers: dict[str, Ledger] = {}

    composes = False

    @property
    def spent(self) -> int:
        """Measurements of one metric at one point so far."""
        return self.ledger.spent + sum(ledger.spent for ledger in self._ledgers.values())

    @property
    def shares(self) -> bool:
        """Whether nodes use measurements of other nodes: never."""
        return False

    def _rescale(self, name: str, finals: Sequence[Final]) -> list[Final]:
        """Return the runs as they are: experts are measured only by their own node."""
        return list(finals)

    def _ledger_of(self, key: str) -> Ledger:
        if key not in self._ledgers:

            def append(event: Event) -> None:
                self._append(Event(event.kind, {**event.data, "node": key}, event.time))

            before = [
                Event(e.kind, {k: v for k, v in e.data.items() if k != "node"})
                for e in self._events
                if e.data.get("node") == key
            ]
            self._ledgers[key] = Ledger(self.problem.metrics, append, before)
        return self._ledgers[key]

    def _node(
        self,
        path: NodePath,
        group: Group,
        promoted: Mapping[NodePath, Sequence[Part]],
        number: int,
        key: str,
    ) -> Node:
        parts: list[Part] = []
        experts: dict[str, Any] = {}
        for i, item in enumerate(group.children):
            if isinstance(item, str):
                parts.append(Part(item, (item,), torch.zeros(1, 0)))
                experts[item] = item
            else:
                part = promoted[*path, i][number]
                parts.append(part)
                experts |= {name: self._models[name] for name in part.names}
        names = self.tasks.below(group) if path else self.tasks.metrics
        whole = self._mergeable.with_experts(experts, names)
        means = None
        if self.nested.measure == "children":
            means = ChildMean.of(whole.metrics, self._children(group), self.preferences[number])
        eye = torch.eye(whole.space.d, dtype=torch.float64)
        return Node(
            key, tuple(parts), names, whole.space, eye, not path, whole, self._ledger_of(key), means
        )

    def _in_record(self, final: Final, U: Tensor) -> Tensor:
        """Return merges as they are recorded: in the node's own coefficients."""
        return U

    def _parts(self, path: NodePath, group: Group, nodes: Sequence[Node]) -> list[Part]:
        """Return what a node promoted, and make its merges."""
        parts = super()._parts(path, group, nodes)
        [part], [node] = parts, nodes  # there is one preference at most
        assert isinstance(node.whole, Mergeable)
        for name, u in zip(part.names, part.rows, strict=True):
            self._models.keep(name, node.whole.merged(u))
        return parts

    def _coordinates(self, node: Node) -> tuple[str, ...]:
        """Return the names of the coefficients of a promoted merge: those of its node."""
        return node.space.names

    def _before_conclusion(self, final: Final) -> None:
        """Record the space of the result: that of the models that the root merges."""
        if self._recorded("space") is None:
            self._record("space", space=final.node.space.describe())


def rebuild_root(problem: Problem, result: NestedResult, events: Sequence[Event]) -> Problem:
    """Return the problem of the root of a finished run, with its experts merged once more.

    Args:
        problem: The problem of all experts.
        result: The result of the run.
        events: Its record.

    Raises:
        StoreError: When the record does not say what was promoted.
    """
    assert isinstance(problem, Mergeable)
    assert result.tree is not None
    promoted = {e.data["node"]: e.data for e in events if e.kind == "handed"}
    models = Models(None, float("inf"))
    names = [metric.name for metric in problem.metrics]

    def rebuild(path: NodePath, group: Group) -> Any:
        experts: dict[str, Any] = {}
        for i, item in enumerate(group.children):
            if isinstance(item, str):
                experts[item] = item
                continue
            part = promoted[path_name((*path, i))]["parts"][0]
            below = rebuild((*path, i), item)
            for name, u in zip(part["names"], decode_tensor(part["rows"]), strict=True):
                models.keep(name, below.merged(u))
                experts[name] = models[name]
        return problem.with_experts(experts, names)

    try:
        return rebuild((), result.tree)  # type: ignore[no-any-return]
    except (KeyError, IndexError) as error:
        raise StoreError(
            f"the record does not say what node {error} promoted",
            hint="finish the run with `map-bo resume`",
        ) from error


def nested_exporter(problem: Problem, run_dir: str | Path) -> Exportable | None:
    """Return what writes the models of a recorded nested run; None when it has no models.

    Args:
        problem: The problem of all experts.
        run_dir: The run's directory.

    Raises:
        StoreError: When the record does not say what was merged.
    """
    result = load_nested(run_dir)
    if not composes(problem):
        problem = rebuild_root(problem, result, list(JsonlStore.open(Path(run_dir)).read()))
    return Exporting(problem, result.summary) if isinstance(problem, Exportable) else None
