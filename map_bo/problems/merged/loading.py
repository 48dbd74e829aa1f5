"""What evaluating needs, made once: the operator bound to the task vectors, and the live model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MergeError
from map_bo.evaluators.evaluator import Evaluator, Measurement
from map_bo.evaluators.metrics import measure_all
from map_bo.evaluators.scoring import Scored
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
        scored: The evaluators that score by example; none where gradients were asked for.
    """

    vectors: TaskVectors
    prepared: PreparedMerge
    live: LiveModel
    derivatives: HasDerivatives | None
    scored: Mapping[str, Scored]

    def measure(
        self,
        key: str,
        evaluator: Evaluator,
        model: nn.Module,
        metrics: Sequence[Metric],
        items: Tensor | None,
    ) -> tuple[dict[str, Measurement | EvaluationError], Tensor | None]:
        """Return what an evaluator measures, and the outcomes of its examples, if it scores such.

        Args:
            key: What it is called.
            evaluator: The evaluator.
            model: The model, merged.
            metrics: The metrics of the problem.
            items: Which examples; None for all.

        Raises:
            EvaluationError: As :func:`~map_bo.evaluators.metrics.measure_all`.
        """
        if key in self.scored:
            return self.scored[key].measure(model, metrics, items)
        return measure_all(key, evaluator, model), None


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
        EvaluationError: Naming every evaluator that cannot be used; when one says something of
            its examples that cannot be.
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
    found = {} if gradients else {name: Scored.of(name, one) for name, one in evaluators.items()}
    scored = {name: one for name, one in found.items() if one is not None}
    return Loaded(vectors, prepared, live, derivatives, scored)
