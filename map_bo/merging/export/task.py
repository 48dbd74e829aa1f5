"""A merge as a model of one expert's task: its names, its head and its configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.align.conform import Conformed, conformed_of
from map_bo.merging.align.experts import pieces_of
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.tensors import Layout
from map_bo.merging.export.write_shards import Pieces, Put

__all__ = ["TaskModel"]


class _TaskReader:
    """An expert's tensors: the head its own, the merged ones with the base's values and dtypes."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, names: Mapping[str, str]) -> None:
        self._base, self._expert = base, expert
        self._of_base = {own: name for name, own in names.items()}
        self.layouts: Mapping[str, Layout] = {
            own: base.layout(self._of_base[own]) if own in self._of_base else expert.layout(own)
            for own in expert.names
        }
        self.ties: Mapping[str, str] = dict(expert.ties)

    def load(self, name: str) -> Tensor:
        merged = self._of_base.get(name)
        return self._expert.load(name) if merged is None else self._base.load(merged)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        merged = self._of_base.get(name)
        if merged is None:
            return self._expert.read(name, start, stop, out=out)
        return self._base.read(merged, start, stop, out=out)

    def version(self) -> object | None:
        return None


class TaskModel(Checkpoint):
    """The base as a model of an expert's task: what a merge for that task is written like.

    Its digest and source are those of the base; its folder, and so the configuration, is the
    expert's.

    Args:
        base: The base.
        experts: Name -> checkpoint, aligned with the base.
        task: Name of the expert whose head the model has.

    Raises:
        MergeError: When there is no such expert, it has no head, or its vocabulary was fitted.
    """

    def __init__(self, base: Checkpoint, experts: Mapping[str, Checkpoint], task: str) -> None:
        conformed = None if task not in experts else conformed_of(experts[task])
        if conformed is None or not conformed.heads:
            having = [n for n, e in experts.items() if (c := conformed_of(e)) and c.heads]
            raise MergeError(
                f"no expert {task!r} with a task head is merged",
                hint=f"experts with a head are {listed(having) or 'none'}; leave the task out to "
                "write the merge like the base",
            )
        if "vocabulary" in experts[task].vocabulary_changes:
            raise MergeError(
                f"expert {task!r} was fitted to the base's vocabulary, which its configuration "
                "does not have",
                hint="leave the task out to write the merge like the base",
            )
        self._own_names = _names(base, conformed)
        reader = _TaskReader(base, conformed.given, self._own_names)
        super().__init__(reader, source=base.source, directory=conformed.given.directory)
        self._of, self._task = base, task

    @property
    def original(self) -> Checkpoint:
        """The base."""
        return self._of

    @property
    def vocabulary_changes(self) -> Mapping[str, Any]:
        """The task."""
        return {"task": self._task}

    def digest(self) -> str:
        """Return the digest of the base."""
        return self._of.digest()

    def rename(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the base under the names of the task's model, which may lack some."""
        return {self._own_names[n]: tensor for n, tensor in tensors.items() if n in self._own_names}

    def fill(
        self, merged: Pieces | Iterable[tuple[str, Tensor]]
    ) -> Pieces | Iterator[tuple[str, Tensor]]:
        """Return a merge like the base as one of the task's model, its head included."""
        own = set(self._own_names.values())
        rest = [name for name in self.names if name not in own and name not in self.ties]
        if not callable(merged):
            return self._fill_tensors(merged, rest)
        pieces = merged

        def put_all(put: Put) -> None:
            def renamed(name: str, start: int, piece: Tensor) -> None:
                if name in self._own_names:
                    put(self._own_names[name], start, piece)

            pieces(renamed)
            for name in rest:
                for start, stop in pieces_of(self.shape(name).numel()):
                    put(name, start, self.read(name, start, stop))

        return put_all

    def _fill_tensors(
        self, merged: Iterable[tuple[str, Tensor]], rest: list[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in merged:
            if name in self._own_names:
                yield self._own_names[name], tensor
        for name in rest:
            yield name, self.load(name)


def _names(base: Checkpoint, conformed: Conformed) -> dict[str, str]:
    """Return the base's canonical name -> the expert's, of the tensors that both have."""
    names: dict[str, str] = {}
    for name, own in conformed.names_given.items():
        if name in base.names and own not in conformed.heads.values():
            names.setdefault(base.ties.get(name, name), conformed.given.ties.get(own, own))
    return names
