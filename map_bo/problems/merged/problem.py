"""The live problem: coefficients in, a merged model, measured metrics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from map_bo.data import Metric, Observations
from map_bo.errors import EvaluationError, MergeError
from map_bo.evaluators.differentiable import measure_with_gradient
from map_bo.evaluators.evaluator import Evaluator, ItemEvaluator
from map_bo.evaluators.isolation.world import callers_dtype, callers_world, known_numerics
from map_bo.evaluators.items import callable_evaluators
from map_bo.evaluators.metrics import (
    check_names,
    evaluator_of,
    evaluators_of,
    metrics_of,
    select_metrics,
)
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.conform import MissingRule, align_experts
from map_bo.merging.align.layout import join_ties
from map_bo.merging.align.vocabulary import VocabularyRule
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint
from map_bo.merging.export.adapter import AdapterExport, export_adapter
from map_bo.merging.export.bounded import Merge, merges_files, tie_weights
from map_bo.merging.export.draft import refuse_existing
from map_bo.merging.export.model import ExportSettings, export_model
from map_bo.merging.vectors.blocks import with_known_blocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.live import LiveModel, ties_of_base
from map_bo.merging.vectors.operator import (
    Linear,
    MergeOperator,
    Weights,
    chosen_merge,
    recipe_of,
)
from map_bo.merging.vectors.recalibration import Batches, Recalibration, statistics
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.problems.evaluation_cache import EvaluationCache, read_cache
from map_bo.problems.merged.examples import Partial
from map_bo.problems.merged.heads import TaskHeads
from map_bo.problems.merged.loading import Loaded, make_live
from map_bo.problems.merged.measured import MeasuredRows
from map_bo.problems.merged.parts import (
    blocks_to_weigh,
    build_model,
    check_gradients,
    check_model,
    check_space,
    check_statistics,
    choose_storage,
    describe_problem,
    ties_matter,
    watched,
    weigh_space,
)
from map_bo.problems.merged.recalled import Recall
from map_bo.rng import child_seed
from map_bo.space import CoefficientSpace

__all__ = ["MergedModelProblem"]


class MergedModelProblem(Partial):
    """Merging experts into one live model and measuring it.

    Nothing is read or trained when it is made, except names and shapes of the checkpoints; the
    task vectors are loaded once, at the first evaluation, and stay resident.

    The model may be in use elsewhere: outside `evaluate` and `load` it has its own weights.
    Evaluators get it in evaluation mode, with gradients as the caller has them. The weights are
    merged once per candidate, and again after an evaluator that changed them. What one does to the
    model, to torch or to the process is undone, so it reaches no other; see
    :func:`map_bo.evaluators.isolation.world.isolated`.

    Args:
        model: The architecture: a module (its weights do not matter and stay as they are), or
            a callable that returns one and is called once.
        base: The model that the experts were fine-tuned from; see `map_bo.open_checkpoint`.
        experts: Expert name -> checkpoint, or the folder of a LoRA adapter over the base.
        evaluators: Metric name -> callable that takes the model and returns a float or a
            `Measurement`, or a mapping where it declares several metrics; see
            :mod:`map_bo.evaluators.metrics`. Or what scores examples one by one: any ready
            evaluator, `map_bo.Items`, an object with ``size`` and ``score(model, items)``. The
            names need not be those of experts.
        operator: How to merge; task arithmetic by default.
        metrics: One for each evaluator, by name. By default each is a proportion in [0, 1] of
            which more is better. Evaluators are taken to use the same examples every time; one
            that draws its own needs a metric with ``resampling="fresh"``.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        fixed: Coefficients that are not searched, by expert or by name of the coefficient: with
            ``{"math": 1.0}`` the others are added to base and math; see `with_fixed`.
        space: The coefficients, where bounds are not enough (a constraint on their sum, bounds
            that differ); it must have the operator's coefficients in their order.
        dtype: Storage of the task vectors: float32 (default), bfloat16 or float16 (see
            `TaskVectors.load`), or ``"auto"``: bfloat16 where the cap asks for it, else float32.
        device: Where the task vectors and the model live. A model that a callable returns is
            moved there; a given one must be there.
        check_base: Whether to refuse experts that do not look fine-tuned from the base.
        gradients: Whether to measure the derivatives by the coefficients too, with one backward
            pass per batch (see :mod:`map_bo.evaluators.differentiable`). Every evaluator must be
            differentiable and the operator linear, as task arithmetic is.
        vocabulary: What to do with experts whose embeddings have other rows than the base's: refuse
            them (default), or match rows by position (``"base"``) or token (``"tokens"``).
        missing: What to do with experts that lack tensors of the base: refuse them (default), or
            leave those as they are in the base (``"base"``); see `align_experts`.
        heads: Evaluator name -> name of the expert whose task head the model has for it; by
            default that of the expert which is called like the evaluator. Task heads are what only
            experts have; they are not merged.
        recalibration: Batches, or a function that returns them: after each merge the statistics of
            BatchNorm layers are measured anew on them, for evaluation and export; see `recalibrate`
            in `map_bo.merging.vectors.recalibration`. Not with gradients.
        max_memory: Cap of the memory for task vectors, in bytes or such as ``"2GB"``: what does not
            fit is stored narrower or mapped from a file, as `Storage.of` says.
        cache_dir: Where such files are; by default in `cache_root`. Given alone, rows are mapped.
        cache: Whether measurements are kept for later runs and taken from earlier ones, where all
            that they depend on has a digest; or the file or `EvaluationCache` that they are in.

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
        evaluators: Mapping[str, Evaluator | ItemEvaluator],
        operator: MergeOperator | None = None,
        metrics: Sequence[Metric] | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        fixed: Mapping[str, float | str] | None = None,
        space: CoefficientSpace | None = None,
        dtype: StorageDtype | None = None,
        device: torch.device | str = "cpu",
        check_base: bool = True,
        gradients: bool = False,
        vocabulary: VocabularyRule | None = None,
        missing: MissingRule = "refuse",
        heads: Mapping[str, str] | None = None,
        recalibration: Batches | None = None,
        max_memory: int | str | None = None,
        cache_dir: str | Path | None = None,
        cache: EvaluationCache | str | Path | bool | None = True,
    ) -> None:
        check_names(experts, "expert")
        check_names(evaluators, "evaluator")
        check_model(model)
        self._source = model
        called = callable_evaluators(evaluators)
        self._metrics = metrics_of(called, metrics)
        self._evaluators = evaluators_of(called, self._metrics)
        self._base = open_checkpoint(base)
        known = model if isinstance(model, nn.Module) else None
        given = {
            name: open_expert(source, self._base, model=known) for name, source in experts.items()
        }
        self._experts = align_experts(given, self._base, vocabulary=vocabulary, missing=missing)
        self._heads = TaskHeads.of(self._experts, tuple(self._evaluators), heads)
        given_operator = TaskArithmetic() if operator is None else operator
        self._operator: MergeOperator = with_known_blocks(given_operator, self._base, self._experts)
        natural = self._operator.space(tuple(experts), lower=lower, upper=upper)
        if space is not None:
            check_space(space, natural)
        self._space = (natural if space is None else space).with_fixed(fixed)
        self._bounds = None if space is not None else (lower, upper)
        self._device = torch.device(device)
        self._dtype, self._max_memory, self._cache_dir = dtype, max_memory, cache_dir
        self._storage = choose_storage(
            self._base,
            self._experts,
            device=self._device,
            dtype=dtype,
            max_memory=max_memory,
            cache_dir=cache_dir,
        )
        self._check_base, self._missing, self._gradients = check_base, missing, gradients
        if gradients:
            check_gradients(
                self._evaluators, self._operator, recalibrated=recalibration is not None
            )
        self._recalibration = None if recalibration is None else Recalibration(recalibration)
        self._measured: CoefficientSpace | None = None
        self._loaded: Loaded | None = None
        self._cache = read_cache(cache)
        self._recall: Recall | None = None

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients; with blocks, their importance is the norm of the part they scale.

        Those norms are read, once, when the space is first asked for: one pass over the
        checkpoints. With one coefficient per expert nothing is read.
        """
        if self._measured is None:
            blocks = blocks_to_weigh(self._space, self._operator)
            self._measured = (
                self._space
                if blocks is None
                else weigh_space(self._space, blocks, self._base, self._experts, self._ties())
            )
        return self._measured

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, in the order of the evaluators."""
        return self._metrics

    @property
    def evaluators(self) -> Mapping[str, Evaluator]:
        """The evaluators by name."""
        return dict(self._evaluators)

    @known_numerics()
    def prepare(self) -> None:
        """Read the checkpoints and build the model now instead of at the first evaluation.

        Raises:
            CheckpointError: On a file that cannot be read.
            MergeError: When checkpoints, model and operator do not fit each other.
        """
        self._load()

    @known_numerics()
    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Merge and measure every row of ``X`` (``n x d``).

        A row fails when an evaluator raises, or returns NaN, infinity, anything but a
        number, or a value outside its metric's bounds. Its other evaluators are called all the
        same, and what they measured is kept: the row is a partial one.
        The cost of a row is the seconds that merging and measuring took. ``generator`` seeds the
        global random states of torch, numpy and Python before each evaluator.

        The outcomes of the examples of evaluators that score by example come along.

        What an evaluator changes, in the model, in torch or in the process, is undone before the
        next; where that cannot be done, its measurement fails.

        Raises:
            SpaceError: When a row lies outside the space.
            MergeError: When checkpoints, model and operator do not fit each other.
        """
        X = self._space.check(X)
        loaded = self._load()
        measured = MeasuredRows(X, self._metrics, loaded.scored)
        # Under another default dtype, models and inputs come in different ones.
        loaded.live.cast_inputs = callers_dtype() != torch.float32
        with loaded.live as live:
            recall = self._recalls(live)
            for i, x in enumerate(X):
                start, again = time.perf_counter(), False
                known, reasons = recall.fill(measured, i, x, self._whole)
                others = [key for key in self._evaluators if key not in known]
                for key in others:
                    evaluator, begun = self._evaluators[key], time.perf_counter()
                    items, outcomes = self._wanted.get(key), None
                    try:
                        model = self._write(x, key, again=again, hold=key != others[-1])
                        again = True
                        with watched(key, live, child_seed(generator, key, i)):
                            if loaded.derivatives is None:
                                found, outcomes = loaded.measure(
                                    key, evaluator, model, self._metrics, items
                                )
                            else:
                                seen, *slopes = measure_with_gradient(
                                    key, evaluator, live, loaded.derivatives
                                )
                                measured.put_gradient(i, key, *slopes)
                                found = {key: seen}
                    except EvaluationError as error:
                        reasons.append(error.reason)
                        continue
                    wrong = measured.put(i, found)
                    reasons += wrong
                    measured.put_outcomes(i, key, outcomes, items)
                    if not wrong:
                        recall.keep(key, evaluator, found, time.perf_counter() - begun, outcomes)
                measured.end(i, reasons, time.perf_counter() - start)
                recall.save()
        return measured.observations()

    @contextmanager
    def load(self, x: Tensor, *, metric: str | None = None) -> Iterator[nn.Module]:
        """Hold the model merged with coefficients ``x`` (``d``), in evaluation mode.

        On leaving, it has its own weights again, and nothing that was done to it remains.

        Args:
            x: ``d`` coefficients.
            metric: Metric whose task head the model is to have, where experts have heads.
        """
        with known_numerics():
            row = self._row(x)
            with self._load().live:
                model = self._write(row, metric and evaluator_of(metric, self._evaluators))
                with callers_world():
                    yield model

    @known_numerics()
    def merged(self, x: Tensor) -> dict[str, Tensor]:
        """Return the state dict merged with ``x`` (``d``): new tensors in the base's dtypes."""
        row, loaded = self._row(x), self._load()
        vectors = loaded.vectors
        flat = torch.empty(vectors.layout.size, dtype=torch.float32, device=vectors.rows.device)
        loaded.prepared.write(row, flat)
        state, measured = vectors.layout.state_dict(flat, vectors.fixed), self._statistics(row)
        return {name: measured.get(name, tensor).to(tensor) for name, tensor in state.items()}

    @known_numerics()
    def export(
        self,
        x: Tensor,
        out: str | Path,
        record: Mapping[str, Any] | None = None,
        *,
        settings: ExportSettings | None = None,
    ) -> Path:
        """Write the model merged with ``x`` (``d``) to the folder ``out``; see `export_model`.

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
        refuse_existing(out)  # before a model is loaded
        merge = self._merge(row)
        if self._loaded is not None:
            self._loaded.vectors.release()  # mapped pages would count against the bound of memory
        return export_model(merge, out, settings=settings, record=record)

    @known_numerics()
    def export_adapter(
        self,
        x: Tensor,
        out: str | Path,
        *,
        rank: int | None = None,
        others: Literal["save", "refuse"] = "save",
        record: Mapping[str, Any] | None = None,
    ) -> AdapterExport:
        """Write the merge with ``x`` (``d``) to ``out`` as an adapter; see `export_adapter`.

        A linear operator is merged from the checkpoints; of another the merged model's change is
        approximated, which needs a rank.

        Args:
            x: ``d`` coefficients.
            out: Folder to create.
            rank: Largest rank; None keeps a linear merge of adapters exact.
            others: Whether to save what has no factors as full values, or to refuse it.
            record: Further plain data for the recipe.

        Returns:
            The folder, and what was lost by the rank.

        Raises:
            MergeError: When it cannot be written; nothing is left behind.
        """
        row, model = self._row(x), self._architecture()
        ties = ties_of_base(model, self._base.names)
        weights: Weights | None = None
        operator, names, c = chosen_merge(self._operator, self._experts, self._space.names, row)
        if isinstance(operator, Linear):
            joined = join_ties(self._base, ties)
            weights = tie_weights(operator.weights(tuple(self._experts), c), joined)
        merged = open_checkpoint(self.merged(row)) if weights is None else None
        return export_adapter(
            out,
            base=self._base,
            experts=self._experts,
            weights=weights,
            operator=recipe_of(operator),
            coefficients=dict(zip(names, c.tolist(), strict=True)),
            rank=rank,
            others=others,
            model=model,
            merged=merged,
            ties=ties,
            record=record,
        )

    @property
    def composes(self) -> bool:
        """Whether merges of merges are merges of the experts: the operator is linear."""
        return isinstance(self._operator, Linear)

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
        metrics = select_metrics(self._metrics, names)
        low, high = self._bounds
        problem = MergedModelProblem(
            self._architecture(),
            base=self._base,
            experts={
                # A merge may be called like an expert, so it is what is given that counts.
                name: self._experts.get(of, of) if isinstance(of, str) else of
                for name, of in experts.items()
            },
            evaluators=evaluators_of(self._evaluators, metrics),
            operator=self._operator,
            lower=low,
            upper=high,
            device=self._device,
            check_base=self._check_base,
            recalibration=self._recalibration.batches if self._recalibration else None,
            dtype=self._dtype,
            max_memory=self._max_memory,
            cache_dir=self._cache_dir,
            missing=self._missing,
            cache=self._cache or False,
        )
        problem._metrics = metrics  # of an evaluator of several, perhaps not all
        problem.made_by(MergedModelProblem.with_experts, self, dict(experts), tuple(names))
        problem._heads = self._heads  # merges of experts have none of their own
        return problem

    @known_numerics()
    def similarity(self) -> Tensor:
        """Return the cosines between the experts' task vectors, ``N x N``; see `cosines`."""
        return cosines(self._load().vectors)

    @known_numerics()
    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised, as when a run is resumed.

        It holds the digests of all checkpoints, so they are read. Evaluators are told by name.
        """
        return describe_problem(
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

    def _merge(self, row: Tensor) -> Merge:
        """Return the merge with ``row`` (``d``): what its files follow from."""
        operator, names, c = chosen_merge(self._operator, self._experts, self._space.names, row)
        from_files = merges_files(self._base, operator)
        matter = ties_matter(self._base, self._experts, operator, self._space)
        return Merge(
            base=self._base,
            experts=self._experts,
            operator=operator,
            names=names,
            c=c,
            ties=self._ties() if matter else {},
            check_base=self._check_base,
            tensors=None if from_files else self.merged(row),
            recalibrated=self._statistics(row),
        )

    def _write(
        self, x: Tensor, key: str | None = None, *, again: bool = False, hold: bool = False
    ) -> nn.Module:
        """Merge ``x`` (``d``) into the live model, with the head of an evaluator's task, if any.

        ``again``: it may still be there from before; ``hold``: it will be wanted again.
        """
        loaded = self._load()
        live, model = loaded.live, loaded.live.model
        kept = again and live.rewind()
        if not kept:
            live.write(loaded.prepared, x)
        head = None if key is None else self._heads.of_task(key)
        if head is not None:
            live.put_head(head.tensors, head.labels)
        if self._recalibration is not None:
            self._recalibration(model, x)  # of one that is kept, the same numbers once more
        if hold and (not kept or self._recalibration is not None):
            live.hold()
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

    def _recalls(self, live: LiveModel) -> Recall:
        """Return what looks measurements up; it does nothing where none may have been kept."""
        if self._recall is None:
            self._recall = Recall.of(
                None if self._gradients else self._cache,
                live,
                self._evaluators,
                self._metrics,
                self._heads,
                self._recalibration,
                base=self._base,
                experts=self._experts,
                operator=self._operator,
                names=self._space.names,
                missing=self._missing,
                storage=(self._storage.dtype, self._storage.cache is not None),
                ties=ties_of_base(live.model, self._base.names),
            )
        return self._recall

    def _load(self) -> Loaded:
        """Read the checkpoints and build the model, once."""
        if self._loaded is not None:
            return self._loaded
        model = self._architecture()
        vectors = TaskVectors.load(
            self._base,
            self._experts,
            dtype=self._storage.dtype,
            device=self._device,
            check_base=self._check_base,
            ties=ties_of_base(model, self._base.names),
            cache=self._storage.cache,
            spare_memory=self._storage.spare_memory,
        )
        check_statistics(self._operator, self._experts)
        self._loaded = make_live(
            model,
            vectors,
            self._operator,
            self._evaluators,
            self._heads,
            recalibrated=self._recalibration is not None,
            gradients=self._gradients,
        )
        return self._loaded

    def _ties(self) -> dict[str, str]:
        return join_ties(self._base, ties_of_base(self._architecture(), self._base.names))

    def _architecture(self) -> nn.Module:
        if self._model is None:
            with callers_world():
                self._model = build_model(self._source, self._device)
        return self._model
