"""What a nested run returns: a front over all tasks, and what each node contributed to it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from map_bo.loop.result import Choice, Exportable, Result
from map_bo.merging.export.model import ExportSettings
from map_bo.nested.tree import Group, draw_tree, path_name
from map_bo.pareto.preferences import Preference

__all__ = ["Exporting", "NestedResult", "NodeRecord", "describe_tree"]


@dataclass(frozen=True)
class NodeRecord:
    """What one node did.

    Attributes:
        name: ``root``, numbers of children from the root down as in ``0.1``, or ``refine``.
        label: The experts below it.
        stage: Its stage; 0 for the refinement.
        tasks: Number of metrics that it measured.
        coefficients: Number of coefficients that it searched.
        evaluations: Points that it considered, reused ones included.
        data_sets: Measurements of one metric at one point that it made.
        promoted: For each merge that it promoted, the coefficients of the experts below it.
    """

    name: str
    label: str
    stage: int
    tasks: int
    coefficients: int
    evaluations: int
    data_sets: int
    promoted: tuple[Mapping[str, float], ...] = ()

    @property
    def handed(self) -> tuple[Mapping[str, float], ...]:
        """The name of :attr:`promoted` in version 0.1."""
        warnings.warn(
            "NodeRecord.handed is now NodeRecord.promoted; the old name goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.promoted

    def describe(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return {
            "node": self.name,
            "label": self.label,
            "stage": self.stage,
            "tasks": self.tasks,
            "coefficients": self.coefficients,
            "evaluations": self.evaluations,
            "data_sets": self.data_sets,
            "handed": [dict(one) for one in self.promoted],
        }


def describe_tree(
    tree: Group, nodes: Sequence[NodeRecord], data_sets: int, tasks: int
) -> dict[str, Any]:
    """Return the part of a run's summary that is about its tree, as plain data."""
    paths = {path_name(path): path for path, _ in tree.nodes()}
    notes = {
        paths[node.name]: f"{node.evaluations} evaluations of {node.tasks} tasks, "
        f"{node.data_sets} data sets"
        for node in nodes
        if node.name in paths
    }
    return {
        "tree": tree.plain(),
        "stages": tree.stage,
        "drawn": draw_tree(tree, notes),
        "data_sets": data_sets,
        "flat_evaluations": data_sets / tasks,
        "nodes": [node.describe() for node in nodes],
    }


@dataclass(frozen=True, eq=False)
class Exporting:
    """Writes models as the problem does, with the tree that they come from in the recipe.

    Attributes:
        problem: Writes the models.
        summary: The summary of the nested run.
    """

    problem: Exportable
    summary: Mapping[str, Any]

    def export(
        self,
        x: Tensor,
        out: str | Path,
        *,
        record: Mapping[str, Any],
        settings: ExportSettings | None = None,
    ) -> Path:
        """Write the model with coefficients ``x`` (``d``); see :class:`Exportable`."""
        nested = self.summary["nested"]
        nodes = [
            {"node": node["node"], "merges": node["label"], "handed": node["handed"]}
            for node in nested["nodes"]
        ]
        recipe = {**record, "nested": {"tree": nested["tree"], "nodes": nodes}}
        return self.problem.export(x, out, record=recipe, settings=settings)


@dataclass(frozen=True, eq=False)
class NestedResult(Result):
    """The outcome of a nested run, in the coefficients of all experts.

    It has everything that a flat :class:`Result` has; ``seen`` and ``verification`` are the
    evaluations of all tasks, made at the root.

    Attributes:
        tree: The tree that was merged.
        root: The result of the root in its own small space, in which the surrogate can be
            optimised for a preference; None where the preferences were given in advance.
        directions: ``k x d``: the coefficients of the experts per unit of each of the root's.
        nodes: What each node did, in the order in which they ran.
        choices: One merge for each preference given in advance.
    """

    tree: Group | None = None
    root: Result | None = None
    directions: Tensor | None = None
    nodes: tuple[NodeRecord, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def data_sets(self) -> int:
        """Measurements of one metric at one point, in all."""
        return int(self.summary["nested"]["data_sets"])

    def choose(
        self,
        prefer: Mapping[str, float] | None = None,
        *,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        rule: Literal["weighted_sum", "chebyshev"] = "weighted_sum",
        confidence: float | None = 0.9,
        corrected: bool = True,
        keep_blend: bool = True,
    ) -> Choice:
        """Return the merge that suits a preference best; see :meth:`Result.choose`.

        Where the root's surrogate is available it is optimised for the preference, over the merges
        of what its children promoted.
        """
        if self.root is None or self.directions is None:
            return super().choose(
                prefer,
                at_least=at_least,
                at_most=at_most,
                rule=rule,
                confidence=confidence,
                corrected=corrected,
                keep_blend=keep_blend,
            )
        inner = replace(self.root, scale=self.scale).choose(
            prefer,
            at_least=at_least,
            at_most=at_most,
            rule=rule,
            confidence=confidence,
            corrected=corrected,
            keep_blend=False,  # the blend of the root's children is not that of the experts
        )
        choice = self._outside(inner)
        return self._or_blend(choice, None) if keep_blend else choice

    def _outside(self, inner: Choice) -> Choice:
        """Return a choice of the root in the coefficients of all experts."""
        assert self.directions is not None
        if not inner.refined:
            own = self._choice(inner.point, inner.preference)
            return replace(own, notes=inner.notes, probability=inner.probability)
        x = self.space.project(inner.x.unsqueeze(0) @ self.directions)[0]
        nearest = self._choice(inner.point, inner.preference)
        return replace(inner, x=x, space=self.space, problem=self.problem, exports=nearest.exports)

    def _choice(self, row: int, preference: Preference | None) -> Choice:
        choice = super()._choice(row, preference)
        if not isinstance(self.problem, Exportable) or not self.summary:
            return choice
        return replace(choice, exports=Exporting(self.problem, self.summary))
