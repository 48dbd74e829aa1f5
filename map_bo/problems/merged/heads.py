"""Task heads: what only experts have, and the evaluators of their tasks need.

Experts tuned for tasks of their own have an output layer that their base lacks, each another one.
It is not merged: the model has it while the evaluator of its task is called, and loses it
afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from map_bo.errors import MergeError, listed
from map_bo.merging.align.conform import head_tensors
from map_bo.merging.checkpoints.checkpoint import Checkpoint

__all__ = ["TaskHead", "TaskHeads"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TaskHead:
    """The head of one expert.

    Attributes:
        expert: The expert's name.
        tensors: Name in a model of the task -> tensor.
        labels: Label names by row of the output layer, where the expert's configuration has them.
    """

    expert: str
    tensors: Mapping[str, Tensor]
    labels: Mapping[int, str]


@dataclass(frozen=True, eq=False)
class TaskHeads:
    """The heads of all experts, and which evaluator measures with which.

    Attributes:
        heads: Expert name -> head.
        by_task: Name of an evaluator -> expert name.
        spare: Names of the base's tensors that no expert changes, which a model of a task may lack.
    """

    heads: Mapping[str, TaskHead] = field(default_factory=dict)
    by_task: Mapping[str, str] = field(default_factory=dict)
    spare: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        experts: Mapping[str, Checkpoint],
        tasks: Sequence[str],
        given: Mapping[str, str] | None = None,
    ) -> TaskHeads:
        """Read the heads of aligned experts.

        Args:
            experts: Name -> checkpoint, as `align_experts` returns them.
            tasks: Names of the evaluators, each of which may measure several metrics.
            given: Evaluator -> expert; by default each evaluator has its namesake's.

        Raises:
            MergeError: When ``given`` names an unknown evaluator, or an expert without a head.
            CheckpointError: When a head cannot be read.
        """
        heads = {
            name: TaskHead(name, tensors, _labels(expert))
            for name, expert in experts.items()
            if (tensors := head_tensors(expert))
        }
        unknown = sorted(set(given or {}) - set(tasks))
        if unknown:
            raise MergeError(
                f"heads are given for {listed(map(repr, unknown))}, and no evaluator is called so",
                hint=f"evaluators are {listed(tasks)}",
            )
        lacking = sorted({name for name in (given or {}).values() if name not in heads})
        if lacking:
            raise MergeError(
                f"the experts {listed(map(repr, lacking))} have no task head",
                hint=f"experts with a head are {listed(heads) or 'none'}; a head is what an expert "
                "has and the base lacks",
            )
        chosen = {task: task for task in tasks if task in heads} | dict(given or {})
        without = [task for task in tasks if task not in chosen]
        if heads and without:
            logger.warning(
                "%s are measured without a task head: no expert of that name has one; "
                "heads={evaluator: expert} says whose",
                listed(map(repr, without)),
            )
        left = [frozenset(_left(expert)) for expert in experts.values()] if heads else []
        return cls(heads, chosen, frozenset.intersection(*left) if left else frozenset())

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors of heads."""
        return frozenset(name for head in self.heads.values() for name in head.tensors)

    def of_task(self, task: str) -> TaskHead | None:
        """Return the head that the evaluator of this name measures with, if any."""
        expert = self.by_task.get(task)
        return None if expert is None else self.heads[expert]


def _left(expert: Checkpoint) -> Iterator[str]:
    """Yield the names of the base's tensors that an expert leaves as they are."""
    for key in ("missing", "buffers", "heads_of_base"):
        yield from expert.vocabulary_changes.get(key, ())


def _labels(expert: Checkpoint) -> dict[int, str]:
    given = (expert.configuration or {}).get("id2label")
    if not isinstance(given, Mapping):
        return {}
    return {int(k): str(v) for k, v in given.items() if str(k).isdecimal()}
