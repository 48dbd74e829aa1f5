"""The live problem: coefficients in, a merged model, measured metrics out."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from map_bo.data import Metric, Observations
from map_bo.errors import EvaluationError, MergeError
from map_bo.evaluators.differentiable import Differentiable, measure_with_gradient
from map_bo.evaluators.evaluator import (
    Evaluator,
    check_names,
    entry_of,
    measure,
    metrics_of,
    named_metrics,
)
from map_bo.merging.adapters.checkpoint import open_expert
from map_bo.merging.align.layout import joined_ties
from map_bo.merging.align.vocabulary import VocabularyRule, fitted_experts
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint
from map_bo.merging.vectors.blocks import with_known_blocks
from map_bo.merging.vectors.linear_merge import LinearMerge, LinearOperator, TaskArithmetic
from map_bo.merging.vectors.live import LiveModel, model_ties
from map_bo.merging.vectors.memory import ExportSettings
from map_bo.merging.vectors.operator import MergeOperator, PreparedMerge
from map_bo.merging.vectors.recalibration import (
    Batches,
    Recalibration,
    require_batch_norm,
    statistics,
)
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.operators.known_statistics import NeedsStatistics
from map_bo.problems.merged.export import AdapterExporting, write_merged
from map_bo.problems.merged.parts import (
    built_model,
    check_gradients,
    check_model,
    check_space,
    described,
    storage_of,
    weighed_space,
)
from map_bo.space import CoefficientSpace

__all__ = ["MergedModelProblem"]


class MergedModelProblem(AdapterExporting):
    """Merging experts into one live model and measuring it.

    Nothing is read or trained when it is made, except names and shapes of the checkpoints; the
    task vectors are loaded once, at the first evaluation, and stay resident.

    The model may be in use elsewhere: outside `evaluate` and `load` it has its own weights.
    Evaluators get it in evaluation mode, with gradients as the caller has them. The weights are
    written anew before each evaluator, so what one does to the model reaches no other.

    Args:
        model: The architecture: a module (its weights do not matter and stay as they are), or
            a callable that returns one and is called once.
        base: The model that the experts were fine-tuned from; see `map_bo.open_checkpoint`.
        experts: Expert name -> checkpoint, or the folder of a LoRA adapter over the base.
        evaluators: Metric name -> callable that takes the model and returns a float or a
            `Measurement`. The names need not be those of experts.
        operator: How to merge; task arithmetic by default.
        metrics: One for each evaluator, by name. By default each is a proportion in [0, 1] of
            which more is better. Evaluators are taken to use the same examples every time; one
            that draws its own needs a metric with ``examples="fresh"``.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        space: The coefficients, where bounds are not enough (a constraint on their sum, bounds
            that differ); it must have the operator's coefficients in their order.
        dtype: Storage of the task vectors: float32 (default), bfloat16 or float16 (see
            `TaskVectors.load`), or ``"auto"``: bfloat16 where the cap asks for it, else float32.
        device: Where the task vectors and the model live. A model that a callable returns is
            moved there; a given one must be there.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        gradients: Whether to measure the derivatives by the coefficients too, with one backward
            pass a batch (see :mod:`map_bo.evaluators.differentiable`). Every evaluator must be
            differentiable and the operator task arithmetic.
        vocabulary: What to do with experts whose embeddings have other rows than the base's:
            refuse them (default), or match rows by position (``"base"``) or by token
            (``"tokens"``); see `map_bo.merging.align.vocabulary.fitted`.
        recalibration: Batches, or a function that returns them: after each merge the statistics of
            BatchNorm layers are measured anew on them, in what is evaluated and in what is
            exported; see `map_bo.merging.vectors.recalibration.recalibrate`. Not with gradients.
        max_memory: Cap of the memory for task vectors, in bytes or such as ``"2GB"``: what does not
            fit is stored narrower or mapped from a file, as `Storage.of` says.
        cache_dir: Where such files are, in ``rows``; by default in `cache_root`. Without a cap,
            rows are mapped where it is given.

    Raises:
        MergeError: When experts, model, operator and space do not fit each other; when gradients
            are asked of an operator that is not linear in its coefficients.
        EvaluationError: When there are no evaluators, or one cannot be called, or has no gradients
            and they are asked for.
        DataError: When metrics and evaluators have different names.
        CheckpointError: When a checkpoint cannot be read.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        *,
        base: CheckpointSource,
        experts: Mapping[str, CheckpointSource],
        evaluators: Mapping[str, Evaluator],
        operator: MergeOperator | None = None,
        metrics: Sequence[Metric] | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        space: CoefficientSpace | None = None,
        dtype: StorageDtype | None = None,
        device: torch.device | str = "cpu",
        check_base: bool = True,
        gradients: bool = False,
        vocabulary: VocabularyRule | None = None,
        recalibration: Batches | None = None,
        max_memory: int | str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        check_names(experts, "expert")
        check_names(evaluators, "evaluator")
        check_model(model)
        self._source = model
        self._evaluators = dict(evaluators)
        self._metrics = metrics_of(evaluators, metrics)
        self._base = open_checkpoint(base)
        given = {name: open_expert(source, self._base) for name, source in experts.items()}
        self._experts = fitted_experts(given, self._base, vocabulary)
        given_operator = TaskArithmetic() if operator is None else operator
        self._operator: MergeOperator = with_known_blocks(given_operator, self._base, self._experts)
        natural = self._operator.space(tuple(experts), lower=lower, upper=upper)
        if space is not None:
            check_space(space, natural)
        self._space = natural if space is None else space
        self._bounds = None if space is not None else (lower, upper)
        self._device = torch.device(device)
        kept = {"dtype": dtype, "max_memory": max_memory, "cache_dir": cache_dir}
        self._kept: dict[str, Any] = kept
        self._storage = storage_of(self._base, self._experts, device=self._device, **self._kept)
        self._check_base = check_base
        self._gradients = gradients
        if gradients:
            check_gradients(
                self._evaluators, self._operator, recalibrated=recalibration is not None
            )
        self._recalibration = None if recalibration is None else Recalibration(recalibration)
        self._model: nn.Module | None = None
        self._measured: CoefficientSpace | None = None
        self._ready: tuple[TaskVectors, PreparedMerge, LiveModel] | None = None

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients; with blocks, their importance is the norm of the part they scale.

        Those norms are read, once, when the space is first asked for: one pass over the
        checkpoints. With one coefficient an expert nothing is read.
        """
        if self._measured is None:
            self._measured = weighed_space(
                self._space, self._operator, self._base, self._experts, self._ties
            )
        return self._measured

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of the evaluators."""
        return self._metrics

    def prepare(self) -> None:
        """Read the checkpoints and build the model now instead of at the first evaluation.

        Raises:
            CheckpointError: On a file that cannot be read.
            MergeError: When checkpoints, model and operator do not fit each other.
        """
        self._prepare()

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Merge and measure every row of ``X`` (``n x d``).

        A row fails when an evaluator raises, or returns NaN, infinity, anything that is no
        number, or a value outside its metric's bounds; its remaining evaluators are not called.
        The cost of a row is the seconds that merging and measuring took. ``generator`` is not
        used: evaluators bring their own randomness, if any.

        Raises:
            SpaceError: When a row lies outside the space.
            MergeError: When checkpoints, model and operator do not fit each other.
        """
        X = self._space.check(X)
        n, m = len(X), len(self._metrics)
        Y, Yvar, counts = (torch.full((n, m), torch.nan, dtype=torch.float64) for _ in range(3))
        slopes, spread = (torch.full((n, m, X.shape[1]), torch.nan).double() for _ in range(2))
        cost = torch.zeros(n, dtype=torch.float64)
        failures: list[str | None] = [None] * n
        _, prepared, live = self._prepare()
        with live:
            for i, x in enumerate(X):
                start = time.perf_counter()
                try:
                    for j, metric in enumerate(self._metrics):
                        self._write(x)
                        evaluator = self._evaluators[metric.name]
                        if self._gradients:
                            assert isinstance(evaluator, Differentiable)
                            assert isinstance(prepared, LinearMerge)
                            seen, slopes[i, j], spread[i, j] = measure_with_gradient(
                                metric.name, evaluator, live, prepared.directional
                            )
                        else:
                            seen = measure(metric.name, evaluator, live.model)
                        Y[i, j], Yvar[i, j], counts[i, j] = entry_of(seen, metric)
                except EvaluationError as error:
                    failures[i] = error.reason
                    Y[i], Yvar[i], counts[i] = torch.nan, torch.nan, torch.nan
                cost[i] = time.perf_counter() - start
        return Observations(
            X, Y, self._metrics, Yvar, counts, cost, tuple(failures), slopes, spread
        )

    @contextmanager
    def load(self, x: Tensor) -> Iterator[nn.Module]:
        """Hold the model merged with coefficients ``x`` (``d``), in evaluation mode.

        On leaving, it has its own weights again, and nothing that was done to it remains.
        """
        row = self._row(x)
        with self._prepare()[-1]:
            yield self._write(row)

    def merged(self, x: Tensor) -> dict[str, Tensor]:
        """Return the state dict merged with ``x`` (``d``): new tensors in the base's dtypes."""
        row = self._row(x)
        vectors, prepared, _ = self._prepare()
        flat = torch.empty(vectors.layout.size, dtype=torch.float32, device=vectors.rows.device)
        prepared.write(row, flat)
        state, measured = vectors.layout.state_dict(flat, vectors.fixed), self._statistics(row)
        return {name: measured.get(name, tensor).to(tensor) for name, tensor in state.items()}

    def export(
        self,
        x: Tensor,
        out: str | Path,
        record: Mapping[str, Any] | None = None,
        *,
        settings: ExportSettings | None = None,
    ) -> Path:
        """Write the model merged with ``x`` (``d``) to the folder ``out``; see `export_merged`.

        It is merged anew from the checkpoints, piece by piece, without loss from the storage
        dtype and without loading the model.

        Args:
            x: ``d`` coefficients.
            out: Folder to create.
            record: Further plain data for the recipe.
            settings: Bounds of memory and file sizes.

        Returns:
            The absolute path of the folder.

        Raises:
            MergeError: When it cannot be written; nothing is left behind.
        """
        row = self._row(x)
        if self._ready is not None:
            self._ready[0].release()  # mapped pages would count against the bound of memory
        return write_merged(
            out,
            row,
            tensors=lambda: self.merged(row),
            base=self._base,
            experts=self._experts,
            operator=self._operator,
            space=self._space,
            ties=self._ties,
            recalibrated=lambda: self._statistics(row),
            record=record,
            check_base=self._check_base,
            settings=settings,
        )

    def restricted(self, names: Sequence[str]) -> MergedModelProblem:
        """Return the same merging with these metrics alone; only their evaluators are called.

        Checkpoints are read now if they were not yet, and shared.

        Raises:
            DataError: When there is no such metric.
        """
        metrics = named_metrics(self._metrics, names)
        self._prepare()
        part = copy.copy(self)
        part._metrics = metrics
        part._evaluators = {name: self._evaluators[name] for name in names}
        return part

    @property
    def composes(self) -> bool:
        """Whether merges of merges are merges of the experts: the operator is linear."""
        return isinstance(self._operator, LinearOperator)

    def with_experts(
        self, experts: Mapping[str, str | CheckpointSource], names: Sequence[str]
    ) -> MergedModelProblem:
        """Return the merging of other experts into the same model, with some of the metrics.

        Args:
            experts: Name -> checkpoint of what is merged; one of this problem's experts by its
                name in place of a checkpoint.
            names: Metrics, in their order.

        Raises:
            DataError: When there is no such metric.
            MergeError: When this problem's space has bounds or constraints of its own.
        """
        if self._bounds is None:
            raise MergeError(
                "a space of your own says nothing about merging other experts",
                hint="give lower and upper in place of space",
            )
        metrics = named_metrics(self._metrics, names)
        low, high = self._bounds
        return MergedModelProblem(
            self._architecture(),
            base=self._base,
            experts={
                # A merge may be called like an expert, so it is what is given that counts.
                name: self._experts.get(of, of) if isinstance(of, str) else of
                for name, of in experts.items()
            },
            evaluators={name: self._evaluators[name] for name in names},
            metrics=metrics,
            operator=self._operator,
            lower=low,
            upper=high,
            device=self._device,
            check_base=self._check_base,
            recalibration=self._recalibration.batches if self._recalibration else None,
            **self._kept,
        )

    def similarity(self) -> Tensor:
        """Return the cosines between the experts' task vectors, ``N x N``; see `cosines`."""
        return cosines(self._prepare()[0])

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised, as when a run is resumed.

        It holds the digests of all checkpoints, so they are read. Evaluators are told by name.
        """
        return described(
            base=self._base,
            experts=self._experts,
            operator=self._operator,
            space=self._space,
            metrics=self._metrics,
            dtype=self._storage.dtype,
            mapped=self._storage.cache is not None,
            gradients=self._gradients,
            recalibration=self._recalibration is not None,
        )

    def _write(self, x: Tensor) -> nn.Module:
        """Merge ``x`` (``d``) into the live model, which is entered, and recalibrate it."""
        _, prepared, live = self._prepare()
        model = live.write(prepared, x)
        if self._recalibration is not None:
            self._recalibration(model, x)
        return model

    def _statistics(self, x: Tensor) -> dict[str, Tensor]:
        """Return the recalibrated statistics of the merge with ``x`` (``d``) by name, if any."""
        if self._recalibration is None:
            return {}
        with self.load(x) as model:
            return statistics(model)

    def _row(self, x: Tensor) -> Tensor:
        x = torch.as_tensor(x, dtype=torch.float64)
        return self._space.check(x[None] if x.dim() == 1 else x.reshape(1, -1))[0]

    def _prepare(self) -> tuple[TaskVectors, PreparedMerge, LiveModel]:
        if self._ready is None:
            model = self._architecture()
            vectors = TaskVectors.load(
                self._base,
                self._experts,
                dtype=self._storage.dtype,
                device=self._device,
                check_base=self._check_base,
                ties=model_ties(model),
                cache=self._storage.cache,
                roomy=self._storage.roomy,
            )
            if isinstance(self._operator, NeedsStatistics):
                self._operator.check_experts(self._experts)
            live = LiveModel(model, vectors.layout, fixed=vectors.fixed)
            if live.device != vectors.rows.device:
                raise MergeError(
                    f"the model is on {live.device} and the task vectors on {vectors.rows.device}",
                    hint=f"move the model, or pass device={str(live.device)!r}",
                )
            if self._recalibration is not None:
                require_batch_norm(model)
            if self._gradients:
                live.require_whole()
            self._ready = vectors, self._operator.prepare(vectors), live
        return self._ready

    def _ties(self) -> dict[str, str]:
        return joined_ties(self._base, model_ties(self._architecture()))

    def _architecture(self) -> nn.Module:
        if self._model is None:
            self._model = built_model(self._source, self._device)
        return self._model
