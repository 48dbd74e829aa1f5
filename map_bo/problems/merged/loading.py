"""What evaluating needs, made once: the operator bound to the task vectors, and the live model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from map_bo.errors import MergeError
from map_bo.evaluators.evaluator import Evaluator
from map_bo.merging.vectors.live import LiveModel
from map_bo.merging.vectors.operator import HasDerivatives, MergeOperator, PreparedMerge
from map_bo.merging.vectors.recalibration import require_batch_norm
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.problems.merged.heads import TaskHeads
from map_bo.problems.merged.parts import prepare_on_base, require_derivatives

__all__ = ["Loaded", "make_live"]


@dataclass(frozen=True, eq=False)
class Loaded:
    """What evaluating needs: the task vectors, the operator bound to them, and the live model.

    Attributes:
        vectors: The task vectors.
        prepared: The operator, bound to them.
        live: The live model.
        derivatives: The prepared operator where gradients were asked for, else None.
    """

    vectors: TaskVectors
    prepared: PreparedMerge
    live: LiveModel
    derivatives: HasDerivatives | None


def make_live(
    model: nn.Module,
    vectors: TaskVectors,
    operator: MergeOperator,
    evaluators: Mapping[str, Evaluator],
    heads: TaskHeads,
    *,
    recalibrated: bool,
    gradients: bool,
) -> Loaded:
    """Bind the model and the operator to task vectors, and let the evaluators get ready.

    Args:
        model: The model.
        vectors: The task vectors.
        operator: The operator.
        evaluators: Name -> evaluator.
        heads: The task heads.
        recalibrated: Whether statistics of BatchNorm layers are measured anew after each merge.
        gradients: Whether derivatives by the coefficients are measured.

    Raises:
        MergeError: When they do not fit each other.
        EvaluationError: Naming every evaluator that cannot be used.
    """
    live = LiveModel(
        model, vectors.layout, fixed=vectors.fixed, heads=heads.names, spare=heads.spare
    )
    if live.device != vectors.rows.device:
        raise MergeError(
            f"the model is on {live.device} and the task vectors on {vectors.rows.device}",
            hint=f"move the model, or pass device={str(live.device)!r}",
        )
    if recalibrated:
        require_batch_norm(model)
    if gradients:
        live.require_whole()
    prepared = operator.prepare(vectors)
    derivatives = require_derivatives(prepared, operator) if gradients else None
    prepare_on_base(evaluators, live, vectors, heads)
    return Loaded(vectors, prepared, live, derivatives)
