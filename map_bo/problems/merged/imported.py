"""A merged-model problem from names alone: paths of checkpoints, ``module:function`` for code.

This is what a configuration can say; in Python use
:class:`~map_bo.problems.merged.problem.MergedModelProblem` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from map_bo.data import Metric
from map_bo.errors import ConfigError, first_line
from map_bo.evaluators.evaluator import Evaluator
from map_bo.evaluators.kinds import import_callable
from map_bo.evaluators.metrics import DeclaresMetrics, metrics_of
from map_bo.extensions import installed, origin
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.conform import MissingRule, align_experts
from map_bo.merging.align.vocabulary import VocabularyRule
from map_bo.merging.checkpoints.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from map_bo.merging.vectors.blocks import HasBlocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.problems.merged.architecture import require_configuration, transformers_model
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.rebuilding import rebuilt

__all__ = ["import_callable", "imported_problem"]

_DTYPES: dict[str, StorageDtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


@rebuilt
def imported_problem(
    model: str | None,
    *,
    base: str | Checkpoint,
    experts: Mapping[str, str | Checkpoint],
    evaluators: Mapping[str, str | Evaluator],
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    operator: MergeOperator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    sum_at_most: float | None = None,
    fixed: Mapping[str, float | str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    gradients: bool = False,
    vocabulary: VocabularyRule | None = None,
    missing: MissingRule = "refuse",
    heads: Mapping[str, str] | None = None,
    recalibration: str | None = None,
    max_memory: int | str | None = None,
    cache_dir: str | None = None,
    cache: bool = True,
) -> MergedModelProblem:
    """Return the problem of merging checkpoints on disk.

    Args:
        model: ``module:callable`` that returns the architecture (weights do not matter), or None
            for a Hugging Face directory or a model of its hub, whose ``config.json`` names it; see
            `map_bo.problems.merged.architecture.transformers_model`.
        base: The base checkpoint: a path, or a model of the Hugging Face hub (see
            `map_bo.open_checkpoint`), or one that is open.
        experts: The experts by name, likewise.
        evaluators: ``module:callable`` by metric name, or the name of an evaluator that an
            installed package registers (see :mod:`map_bo.extensions`); each takes the model and
            returns a float or a :class:`~map_bo.evaluators.evaluator.Measurement`.
        metrics: Fields of :class:`~map_bo.data.Metric` by metric name, where the default (a
            proportion to maximise) does not fit.
        operator: How to merge; task arithmetic when None.
        lower: Lower bound of the coefficients.
        upper: Upper bound of the coefficients.
        sum_at_most: Bound on the sum of an expert's coefficients over the experts.
        fixed: Coefficients that are not searched, by expert or by name of the coefficient.
        dtype: Storage of the task vectors: ``float32``, ``bfloat16``, ``float16`` or ``auto``.
        device: Where the task vectors and the model live.
        gradients: Whether to measure the derivatives by the coefficients too; every evaluator must
            be differentiable (see :mod:`map_bo.evaluators.differentiable`).
        vocabulary: ``base`` or ``tokens``: how experts with another vocabulary are fitted to the
            base; by default they are refused.
        missing: ``refuse``, or ``base``: experts that lack tensors of the base leave those as they
            are in the base.
        heads: Expert name by evaluator name, where the task head that an evaluator needs is not
            that of the expert of its name.
        recalibration: ``module:callable`` that returns batches on which the statistics of
            BatchNorm layers are measured anew after each merge.
        max_memory: Cap of the memory for task vectors, in bytes or such as ``2GB``; see
            :class:`~map_bo.problems.merged.problem.MergedModelProblem`.
        cache_dir: Where task vectors that do not fit are mapped from; likewise.
        cache: Whether measurements are kept for later runs, and taken from earlier ones; likewise.

    Raises:
        EvaluationError: When gradients are asked of an evaluator that has none.
        ConfigError: On a name that cannot be imported, or metrics without evaluators.
        CheckpointError: On files that cannot be read.
        MergeError: On checkpoints that do not fit each other.
    """
    if not experts or not evaluators:
        lacking = "experts" if not experts else "evaluators"
        raise ConfigError(
            f"the problem names no {lacking}",
            hint=f"give them as +problem.{lacking}.NAME=..., one for each name",
        )
    if dtype not in _DTYPES:
        raise ConfigError(
            f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}",
            hint="set problem.dtype to one of them",
        )
    if vocabulary not in (None, *get_args(VocabularyRule)):
        raise ConfigError(
            f"vocabulary must be one of {', '.join(get_args(VocabularyRule))}, got {vocabulary!r}",
            hint="set problem.vocabulary to one of them, or leave it out",
        )
    if missing not in get_args(MissingRule):
        raise ConfigError(
            f"missing must be one of {', '.join(get_args(MissingRule))}, got {missing!r}",
            hint="set problem.missing to one of them",
        )
    if not isinstance(cache, bool):  # a path of somebody else's configuration is none of ours
        raise ConfigError(
            f"cache must be true or false, got {cache!r:.80}",
            hint="set the environment variable MAP_BO_EVALUATIONS to use another file",
        )
    measures = {
        name: _evaluator(where, f"problem.evaluators.{name}") for name, where in evaluators.items()
    }
    described = _described(measures, metrics or {})
    space = None
    if sum_at_most is not None:
        merging = TaskArithmetic() if operator is None else operator
        if isinstance(merging, HasBlocks) and isinstance(merging.blocks, str):
            raise ConfigError(
                "sum_at_most and blocks in a word were both given",
                hint="give the blocks as {block: regular expression on tensor names}, or bound "
                "the coefficients with lower and upper instead",
            )
        space = merging.space(tuple(experts), lower=lower, upper=upper).with_sum(sum_at_most)
    opened = base
    sources: dict[str, CheckpointSource] = dict(experts)
    if model is None:
        if isinstance(base, str) and Path(base).expanduser().exists():
            require_configuration(Path(base).expanduser(), base)  # before weights are looked for
        opened = open_checkpoint(base)
        aligned = {name: open_expert(source, opened) for name, source in experts.items()}
        aligned = align_experts(aligned, opened, vocabulary=vocabulary, missing=missing)
        sources = dict(aligned)
        architecture = transformers_model(opened, aligned)
    else:
        architecture = import_callable(model, "problem.model")
    return MergedModelProblem(
        architecture,
        base=opened,
        experts=sources,
        evaluators=measures,
        metrics=described,
        operator=operator,
        lower=lower,
        upper=upper,
        fixed=fixed,
        space=space,
        dtype=_DTYPES[dtype],
        device=device,
        gradients=gradients,
        vocabulary=vocabulary,
        missing=missing,
        heads=heads,
        recalibration=None
        if recalibration is None
        else import_callable(recalibration, "problem.recalibration"),
        max_memory=max_memory,
        cache_dir=cache_dir,
        cache=cache,
    )


def _described(
    evaluators: Mapping[str, Evaluator], given: Mapping[str, Mapping[str, Any]]
) -> tuple[Metric, ...]:
    """Return the metrics of evaluators, with what a configuration says of them."""
    declared = {metric.name: metric for metric in metrics_of(evaluators, None)}
    extra = sorted(set(given) - set(declared))
    if extra:
        raise ConfigError(
            f"metrics without an evaluator: {', '.join(extra)}",
            hint=f"metrics are {', '.join(declared)}",
        )
    plain = {name for name in evaluators if not isinstance(evaluators[name], DeclaresMetrics)}
    return tuple(
        metric
        if name not in given
        # With a kind, all is said anew: the bounds that were declared are of another.
        else Metric(name, **given[name])
        if name in plain or "kind" in given[name]
        else replace(metric, **given[name])
        for name, metric in declared.items()
    )


def _evaluator(where: str | Evaluator, key: str) -> Evaluator:
    if callable(where):  # built from a configuration of its own
        return where
    points = installed()["evaluator"].get(str(where), ())
    if not points:
        return import_callable(where, key)
    if len(points) > 1:
        raise ConfigError(
            f"{key} {where!r} is registered by {' and '.join(map(origin, points))}",
            hint="write it as module:function",
        )
    try:
        found: Any = points[0].load()
    except Exception as error:  # whatever the import of another package raises
        raise ConfigError(
            f"{key} {where!r} of the package {origin(points[0])} cannot be imported: "
            f"{first_line(error)}",
            hint=f"repair or uninstall {origin(points[0])}",
        ) from error
    made: Evaluator = found() if isinstance(found, type) else found
    return made
