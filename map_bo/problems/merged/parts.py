"""The parts of a merged-model problem: what is demanded of them, and what is decided from them.

Model, space, operator and evaluators are checked before anything is read. Decided are how important
each coefficient is, where task vectors are kept, whether ties of the model matter to an export, and
the plain data by which a run recognises the problem.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MergeError, listed
from map_bo.evaluators.differentiable import check_differentiable
from map_bo.evaluators.evaluator import (
    Evaluator,
    Prepares,
    ReadsHead,
    prepare_evaluators,
)
from map_bo.evaluators.isolation.world import callers_dtype, isolated
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.blocks import Blocks, HasBlocks, block_norms, relative_importance
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.live import LiveModel
from map_bo.merging.vectors.operator import (
    HasDerivatives,
    Linear,
    MergeOperator,
    PreparedMerge,
    PreparesDerivatives,
)
from map_bo.merging.vectors.storage import Storage, StorageDtype
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.searchable import each_operator
from map_bo.operators.statistics.known_statistics import NeedsStatistics
from map_bo.plain import identity_of
from map_bo.problems.cache import cache_root
from map_bo.problems.merged.heads import TaskHeads
from map_bo.rng import child_seed, make_generator
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import encode_metric

__all__ = [
    "blocks_to_weigh",
    "build_model",
    "check_gradients",
    "check_model",
    "check_space",
    "check_statistics",
    "choose_storage",
    "describe_problem",
    "prepare_on_base",
    "require_derivatives",
    "ties_matter",
    "watched",
    "weigh_space",
]

logger = logging.getLogger(__name__)


def check_model(model: object) -> None:
    """Refuse a model that is neither a module nor a function.

    Raises:
        MergeError: When it is not callable.
    """
    if not callable(model):
        raise MergeError(
            f"the model must be a module or a function, got a {type(model).__name__}",
            hint="give a torch.nn.Module, or a function that returns one",
        )


def build_model(source: nn.Module | Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Return the model: the one that was given, or what the function returns, on a device.

    Raises:
        MergeError: When the function returns something else.
    """
    model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise MergeError(
            f"the model function must return a module, got a {type(model).__name__}",
            hint="return a torch.nn.Module",
        )
    return model if model is source else model.to(device)


def check_space(space: CoefficientSpace, natural: CoefficientSpace) -> None:
    """Refuse a space of other coefficients than the operator's own, ``natural``.

    Raises:
        MergeError: When names or owners differ.
    """
    given = (space.names, space.owner, space.choice)
    if given != (natural.names, natural.owner, natural.choice):
        raise MergeError(
            f"the space has the coefficients {', '.join(space.names)}; the operator takes "
            f"{', '.join(natural.names)}",
            hint="build the space from the same experts and blocks, in the same order",
        )


def check_statistics(operator: MergeOperator, experts: Mapping[str, Checkpoint]) -> None:
    """Check that the statistics that an operator merges by belong to these weights.

    Raises:
        MergeError: For those of another model.
    """
    for one in each_operator(operator):
        if isinstance(one, NeedsStatistics):
            one.check_experts(experts)


def check_gradients(
    evaluators: Mapping[str, Evaluator], operator: MergeOperator, *, recalibrated: bool
) -> None:
    """Refuse gradients where metrics are not a differentiable function of the coefficients.

    Raises:
        MergeError: For an operator that is not linear in its coefficients and prepares no
            derivatives, and with recalibration.
        EvaluationError: For an evaluator without gradients.
    """
    known = isinstance(operator, PreparesDerivatives) and operator.prepares_derivatives()
    if not known and not isinstance(operator, Linear):
        raise MergeError(
            f"gradients were asked for, and {type(operator).__name__} is not linear in its "
            "coefficients",
            hint="use TaskArithmetic, or pass gradients=False",
        )
    if recalibrated:
        raise MergeError(
            "gradients were asked for together with recalibration, and they would leave out how "
            "the statistics follow the coefficients",
            hint="leave recalibration out, or pass gradients=False",
        )
    for name, evaluator in evaluators.items():
        check_differentiable(name, evaluator)


def require_derivatives(prepared: PreparedMerge, operator: MergeOperator) -> HasDerivatives:
    """Return a prepared merge that knows its derivatives by the coefficients.

    Raises:
        MergeError: When it does not.
    """
    if not isinstance(prepared, HasDerivatives):
        raise MergeError(
            f"gradients were asked for, and what {type(operator).__name__} prepares has no "
            "derivatives by its coefficients",
            hint="use TaskArithmetic, or pass gradients=False",
        )
    return prepared


def blocks_to_weigh(space: CoefficientSpace, operator: MergeOperator) -> Blocks | None:
    """Return the operator's blocks, where there are some and nobody said how important they are.

    Args:
        space: The coefficients.
        operator: The operator; its ``blocks`` are patterns.
    """
    blocks = Blocks(operator.blocks if isinstance(operator, HasBlocks) else None)
    if len(blocks) == 1 or space.importance or space.blocks != len(blocks):
        return None
    return blocks


def weigh_space(
    space: CoefficientSpace,
    blocks: Blocks,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    ties: Mapping[str, str],
) -> CoefficientSpace:
    """Return the space with importances: the norms of what each coefficient scales.

    A setting of the operator is taken to be as important as a coefficient is on the mean.

    Args:
        space: The coefficients.
        blocks: The blocks that they belong to.
        base: The base.
        experts: Name -> checkpoint.
        ties: Alias -> canonical name of all tensors that are one.

    Raises:
        MergeError: When experts do not fit the base.
    """
    norms = block_norms(base, experts, blocks.of, len(blocks), ties=ties)
    sizes = relative_importance(norms)
    if not sizes:
        return space
    return replace(space, importance=(*sizes, *(1.0 for _ in space.settings)))


def choose_storage(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    device: torch.device,
    dtype: StorageDtype | None,
    max_memory: int | str | None,
    cache_dir: str | Path | None,
) -> Storage:
    """Decide how task vectors are kept; see `Storage.of`.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        device: Where they live.
        dtype: A dtype, ``"auto"`` or None.
        max_memory: The cap, in bytes or as text, or None.
        cache_dir: Folder above that of mapped rows, or None for the user's cache; see
            `cache_root`. Given without a cap, rows are mapped.

    Raises:
        MergeError: When nothing fits, or a setting is not possible.
    """
    used = max_memory is not None or cache_dir is not None
    cache: Path | None = cache_root(cache_dir) / "rows" if used else None
    return Storage.of(base, experts, dtype=dtype, device=device, max_memory=max_memory, cache=cache)


def ties_matter(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    space: CoefficientSpace,
) -> bool:
    """Return whether a merge may differ by what the model ties and the base does not record."""
    if not isinstance(operator, Linear) or space.blocks > 1:
        return True
    # With one weight per expert tied tensors come out the same, where all are there.
    wanted = set(base.names) - set(base.ties)
    return any(not wanted <= set(expert.names) for expert in experts.values())


def describe_problem(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: MergeOperator,
    space: CoefficientSpace,
    metrics: Sequence[Metric],
    dtype: torch.dtype,
    **switches: bool,
) -> dict[str, Any]:
    """Return the description; it holds the digests of all checkpoints, so they are read once.

    What is off or was not needed (``switches``, changes of a vocabulary) is left out, so that
    records made before it existed stay equal.
    """

    def origin(checkpoint: Checkpoint) -> dict[str, Any]:
        changes = checkpoint.vocabulary_changes
        # "fitting" is the word of version 0.1, by which records are compared.
        told = {"fitting": dict(changes)} if changes else {}
        return {"source": checkpoint.source, "digest": checkpoint.digest(), **told}

    return {
        "kind": "merged_model",
        "base": origin(base),
        "experts": {name: origin(expert) for name, expert in experts.items()},
        "operator": identity_of(operator),
        "space": space.describe(),
        "metrics": [encode_metric(metric) for metric in metrics],
        "dtype": str(dtype).removeprefix("torch."),
        **{name: True for name, on in switches.items() if on},
    }


def prepare_on_base(
    evaluators: Mapping[str, Evaluator], live: LiveModel, vectors: TaskVectors, heads: TaskHeads
) -> None:
    """Let the evaluators that have to get ready see the base, before anything is evaluated.

    Args:
        evaluators: Name -> evaluator.
        live: The live model, not entered.
        vectors: The task vectors.
        heads: Task heads; the model has that of the evaluator's task.

    Raises:
        EvaluationError: Naming every evaluator that cannot be used, each with its reason.
    """
    if not any(isinstance(evaluator, Prepares) for evaluator in evaluators.values()):
        return
    base = TaskArithmetic().prepare(vectors)
    origin = torch.zeros(len(vectors.experts), dtype=torch.float64)

    def with_head(key: str) -> nn.Module:
        """Write the base's weights, and the head of an evaluator's task, into the model."""
        model = live.write(base, origin)
        head = heads.of_task(key)
        if head is not None:
            live.put_head(head.tensors, head.labels)
            return model
        reader = evaluators[key]
        lacking = heads.names & {name for name, _ in model.named_parameters()}
        if isinstance(reader, ReadsHead) and reader.reads_head and lacking:
            raise EvaluationError(
                f"it needs the head of its task, and no expert is called {key!r}; that of the "
                "model itself is of no task",
                hint=f"say whose head it is: heads={{{key!r}: {next(iter(heads.heads))!r}}}; those "
                f"with a head are {listed(heads.heads)}",
            )
        return model

    @contextmanager
    def lent(key: str) -> Iterator[nn.Module]:
        model = with_head(key)
        with watched(key, live, child_seed(make_generator(0), "prepare", key)):
            yield model

    live.cast_inputs = callers_dtype() != torch.float32
    with live:
        prepare_evaluators(evaluators, lent)


@contextmanager
def watched(name: str, live: LiveModel, seed: int) -> Iterator[None]:
    """Undo what an evaluator does to its surroundings and to the model.

    Raises:
        EvaluationError: When that cannot be done, and the evaluator itself raised nothing.
    """
    with isolated(f"evaluator {name!r}", seed):
        yield
    changes, troubles = live.clean()
    if changes:
        logger.info("evaluator %r changed the model, which is undone: %s", name, listed(changes))
    if troubles:
        raise EvaluationError(
            f"evaluator {name!r} changed the model, and it cannot be undone: {listed(troubles)}",
            hint="let it work on a copy of the model",
        )
