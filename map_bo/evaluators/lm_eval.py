"""EleutherAI's evaluation harness on the merged model, in memory and example by example."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line, listed
from map_bo.evaluators.evaluator import Measurement, evaluating
from map_bo.evaluators.examples import ExampleEvaluator, check_items, tell_progress
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.isolation.world import isolated
from map_bo.evaluators.language.harness import (
    LOGGERS,
    Column,
    Plan,
    Progress,
    Unit,
    draws,
    load_tasks,
    make_plan,
    measured_by,
    model_in_memory,
    outcome_of,
    refuse_nan,
    require_harness,
)
from map_bo.evaluators.language.models import pretrained
from map_bo.evaluators.text.tokens import check_vocabulary, load_tokenizer
from map_bo.values import real_number, switch, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LMEval"]


class LMEval(ExampleEvaluator):
    """Tasks of EleutherAI's evaluation harness (lm-eval), on the model in memory.

    The harness is called once per candidate for all tasks. Each task and metric is a metric of its
    own, with the direction and kind that the harness knows: shares of right answers are proportions
    with their counts; bits per byte and perplexities are losses, with the variance of the ratio
    estimator over documents (`ratio_estimate`); a group that the harness averages is one metric. An
    example is a document; the first ones are the first of each task. With several tasks the
    outcomes of a document are NaN in the columns of other tasks.

    Tasks are loaded, and prompts with their few-shot examples written, once; so the outcome of a
    document does not depend on which others are scored with it. Metrics that are no means over
    documents (F1 and Matthews' correlation of a whole task, BLEU, medians) have no outcome per
    document: they are left out, and refused where nothing else is left.

    Args:
        tasks: Names of tasks, groups or tags of the harness, or patterns such as ``arc_*``.
        metrics: Task or group -> those of its metrics that are measured, in the harness's words
            (``acc_norm``; ``exact_match,strict-match`` with a filter). By default all.
        tokenizer: Folder or hub id of the tokenizer, or a tokenizer of transformers; None is the
            model's own.
        num_fewshot: Examples in each prompt; None is what each task says. Tasks that say 0 keep it,
            as the harness does.
        limit: At most so many documents of each task, its first; below 1 a share of them.
        samples: Task -> indices of the documents that are used, in place of ``limit``; other tasks
            use all.
        include_path: Folder, or folders, with YAML files of further tasks. What these name by
            ``!function`` is run.
        chat_template: Whether prompts are put into the tokenizer's chat template.
        system: System message.
        fewshot_as_multiturn: Whether the examples in a chat are messages of their own.
        generation: Settings of generation that replace those of the tasks.
        max_length: Longest input in tokens; None is what the model can read.
        unsafe_code: Whether tasks may run code that the model has written.
        seed: Seed of the choice of few-shot examples.
        batch_size: Requests per forward pass.

    Raises:
        ConfigError: For a setting that is not possible.
    """

    def __init__(
        self,
        *,
        tasks: str | Sequence[str],
        metrics: Mapping[str, str | Sequence[str]] | None = None,
        tokenizer: object = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
        include_path: str | Sequence[str] | None = None,
        chat_template: bool = False,
        system: str | None = None,
        fewshot_as_multiturn: bool = True,
        generation: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        unsafe_code: bool = False,
        seed: int = 1234,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.tasks = _names("tasks", tasks)
        self.wanted = {
            task: _names(f"metrics of {task!r}", names) for task, names in (metrics or {}).items()
        }
        self.tokenizer = tokenizer
        self.num_fewshot = num_fewshot
        if num_fewshot is not None:
            self.num_fewshot = whole_number("num_fewshot", num_fewshot, least=0)
        self.limit = None if limit is None else real_number("limit", limit, above=0)
        if self.limit is not None and self.limit > 1:
            whole_number("limit", limit)
        if samples is not None and limit is not None:
            raise ConfigError(
                "both limit and samples are given", hint="samples say which documents are used"
            )
        self.samples = {
            task: tuple(whole_number(f"samples of {task!r}", one, least=0) for one in indices)
            for task, indices in (samples or {}).items()
        }
        for task, indices in self.samples.items():
            if not indices:
                raise ConfigError(f"samples of {task!r} are empty", hint="leave the task out")
        paths = (include_path,) if isinstance(include_path, str) else include_path or ()
        self.include_path = tuple(str(one) for one in paths)
        self.chat_template = switch("chat_template", chat_template)
        self.system = system
        self.fewshot_as_multiturn = switch("fewshot_as_multiturn", fewshot_as_multiturn)
        self.generation = dict(generation or {})
        self.max_length = max_length
        if max_length is not None:
            self.max_length = whole_number("max_length", max_length, least=2)
        self.unsafe_code = switch("unsafe_code", unsafe_code)
        self.seed = whole_number("seed", seed, least=0)
        self._planned: Plan | None = None
        self._ready: _Ready | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The harness's tasks hold functions of files, which cannot be sent to another process.
        return {**vars(self), "_planned": None, "_ready": None}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """One metric per task and metric of the harness; its files are read once for it.

        Tasks that do not exist have a metric of their name, and are refused by `prepare`.

        Raises:
            MissingDependencyError: Without the harness.
        """
        return tuple(self._plan.columns.values()) or tuple(Metric(task) for task in self.tasks)

    @property
    def size(self) -> int:
        """The number of documents of all tasks."""
        return sum(len(leaf.requests) for leaf in self._known.leaves)

    @property
    def strata(self) -> Tensor:
        """The task of each document."""
        return self._known.strata

    @property
    def means(self) -> tuple[bool, ...]:
        """Means over documents; not so ratios, and groups whose tasks count alike."""
        tasks = [leaf.unit for leaf in self._known.leaves]
        return tuple(m for unit in self._plan.units for m in unit.means(tasks.count(unit.name)))

    @property
    def digest(self) -> str:
        """Digest of all requests to the model, and of the settings."""
        return self._known.digest

    @property
    def documents(self) -> list[tuple[str, int]]:
        """The task of each example, and its index there."""
        known = self._known
        return [(known.leaves[i].name, known.leaves[i].indices[row]) for i, row in known.places]

    @property
    def _plan(self) -> Plan:
        if self._planned is None:
            self._planned = make_plan(self.tasks, self.wanted, self.include_path)
        return self._planned

    @property
    def _known(self) -> _Ready:
        return self.require_ready(self._ready, "the tasks have not been loaded")

    def prepare(self, model: nn.Module) -> None:
        """Load the tasks, and write their prompts.

        Raises:
            EvaluationError: For tasks that the harness lacks, tasks without documents or metrics,
                documents that a task lacks, and a tokenizer of another vocabulary.
            MissingDependencyError: Without the harness.
        """
        require_harness()
        network = pretrained(model, by="the evaluation harness")
        tokenizer = load_tokenizer(self.tokenizer, network)
        check_vocabulary(tokenizer, network)
        if self.chat_template and not tokenizer.chat_template:
            raise EvaluationError(
                "the tokenizer has no chat template",
                hint="leave chat_template out, or give the tokenizer of the tuned model",
            )
        plan = self._plan
        if plan.wrong:
            raise EvaluationError(
                "; ".join(verdict for verdict, _ in plan.wrong),
                hint="; ".join(dict.fromkeys(hint for _, hint in plan.wrong)),
            )
        # The harness and what it reads data with draw from the global generators.
        with isolated("the evaluation harness", self.seed):
            leaves = self._leaves(plan, network, tokenizer)
        # Not what decides nothing, or is told by the prompts, so that folders may move.
        apart = ("tokenizer", "include_path", "batch_size")
        settings = {k: v for k, v in vars(self).items() if k[0] != "_" and k not in apart}
        content = [
            settings,
            [(leaf.name, leaf.indices, leaf.arguments, leaf.targets) for leaf in leaves],
        ]
        digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
        columns = [(unit.name, column) for unit in plan.units for column in unit.columns]
        self._ready = _Ready(tuple(leaves), tokenizer, digest, columns)
        self._repeats = not (self.unsafe_code or draws([leaf.arguments for leaf in leaves]))

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of some documents, ``b x m``, or ``b`` of a single metric."""
        rows = self._run(pretrained(model, by="the evaluation harness"), items.tolist())
        return rows[:, 0] if rows.shape[1] == 1 else rows

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcome of each document by one call of the harness; see the base class.

        Outcomes are NaN in the columns of tasks that a document does not belong to.

        Args:
            model: The model; its mode is put back.
            items: ``n`` indices of documents; see `documents`.

        Raises:
            EvaluationError: For an index that is not possible, and outcomes that are not finite.
        """
        items = check_items(items, self.size)
        with evaluating(model), torch.inference_mode():
            found = self.outcomes(model, items)
        return found.clone()  # not an inference tensor

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return what outcomes make.

        Args:
            outcomes: As `score` returns them.
            items: The documents that they belong to; None is all, in their order. Metrics of which
                none of them says anything are left out.

        Raises:
            EvaluationError: When there are more or fewer outcomes than documents, or none at all
                of a metric among all documents.
        """
        some = items is not None
        items = torch.arange(self.size) if items is None else torch.as_tensor(items)
        if len(items) != len(outcomes):
            raise EvaluationError(
                f"there are {len(outcomes)} outcomes of {len(items)} documents",
                hint="say which documents they belong to: summary(outcomes, items)",
            )
        table = outcomes.unsqueeze(-1) if outcomes.dim() == 1 else outcomes
        strata = self._known.strata[items]
        weights = self._known.weights[items]
        measured: dict[str, Measurement] = {}
        columns = [(unit, column) for unit in self._plan.units for column in unit.columns]
        for j, ((unit, column), metric) in enumerate(zip(columns, self.metrics, strict=True)):
            there = table[:, j].isfinite()
            if some and not bool(there.any()):
                continue
            if not bool(there.any()):
                raise EvaluationError(
                    f"no document has an outcome of {metric.name!r}",
                    hint="choose documents of each task, or other metrics",
                )
            values, sizes = table[there, j], weights[there, j]
            measured[metric.name] = measured_by(
                values, sizes, strata[there], column, metric, by_size=unit.by_size
            )
        return measured

    def _in_memory(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress | None = None,
    ) -> Any:
        return model_in_memory(
            model,
            tokenizer,
            batch_size=self.batch_size,
            max_length=self.max_length,
            progress=progress,
        )

    def _leaves(
        self, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[_Leaf]:
        """Load the tasks, and write their prompts."""
        loaded = load_tasks(plan)
        names = [task.task_name for tasks in loaded.values() for task in tasks]
        for name in self.samples:
            if name not in names:
                raise EvaluationError(
                    f"samples are given for {name!r}, which is not evaluated",
                    hint=did_you_mean(name, names),
                )
        with evaluating(model), quiet(*LOGGERS, streams=True):
            lm = self._in_memory(model, tokenizer)
            return [self._leaf(unit, task, lm) for unit in plan.units for task in loaded[unit.name]]

    def _leaf(self, unit: Unit, task: Any, lm: Any) -> _Leaf:
        """Write the prompts of a task."""
        name = task.task_name
        try:
            size = len(task.eval_docs)
        except ValueError:
            size = 0
        if not size:
            raise EvaluationError(
                f"the task {name!r} has no documents", hint="give it a test or validation split"
            )
        if task.get_config("unsafe_code") and not self.unsafe_code:
            raise EvaluationError(
                f"the task {name!r} runs code that the model writes",
                hint="unsafe_code=True allows it; use a machine that may be lost",
            )
        indices = sorted(set(self.samples.get(name, ()))) or list(range(size))
        if indices[-1] >= size:
            raise EvaluationError(
                f"samples of {name!r} hold {indices[-1]}, and it has {size} documents",
                hint=f"give indices from 0 to {size - 1}",
            )
        if self.limit is not None:
            most = math.ceil(self.limit * size) if self.limit < 1 else int(self.limit)
            indices = indices[:most]
        told = task.get_config("num_fewshot")
        if told is None or (self.num_fewshot is not None and told != 0):
            task.set_config("num_fewshot", self.num_fewshot or 0)
        if self.generation and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", copy.deepcopy(self.generation), update=True)
        task.set_fewshot_seed(self.seed)
        samples = None if len(indices) == size else indices
        try:
            task.build_all_requests(
                samples=samples,
                system_instruction=self.system,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                chat_template=lm.apply_chat_template if self.chat_template else None,
                tokenizer_name=lm.tokenizer_name if self.chat_template else "",
            )
            documents = [one for _, one in task.doc_iterator(samples=samples)]
        except Exception as error:  # whatever templates and functions of a task raise
            raise EvaluationError(
                f"the prompts of {name!r} cannot be written: {type(error).__name__}: "
                f"{first_line(error)}",
                hint="see its templates, and num_fewshot",
            ) from error
        requests: list[list[Any]] = [[] for _ in documents]
        for one in task.instances:
            requests[one.doc_id].append(one)
        known = [one.name for one in task._filters]
        for column in unit.columns:
            _check_column(name, task, column, known)
        return _Leaf(unit.name, name, task, tuple(indices), documents, requests)

    def _run(self, model: PreTrainedModel, items: list[int]) -> Tensor:
        """Call the harness on some documents; return their outcomes, ``n x m``."""
        known = self._known
        chosen: dict[int, list[int]] = {}
        for item in sorted(set(items)):
            leaf, place = known.places[item]
            chosen.setdefault(leaf, []).append(place)
        tasks = {known.leaves[i].name: known.leaves[i].chosen(rows) for i, rows in chosen.items()}
        samples = {
            known.leaves[i].name: [known.leaves[i].indices[row] for row in rows]
            for i, rows in chosen.items()
        }
        n = len(items)
        count = sum(one.repeats for task in tasks.values() for one in task.instances)
        progress = Progress(lambda done: tell_progress(min(n * done // count, n - 1), n))
        with quiet(*LOGGERS):
            from lm_eval import evaluator

            found = evaluator.evaluate(
                lm=self._in_memory(model, known.tokenizer, progress),
                task_dict={"tasks": tasks},
                samples=samples,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=self.system,
                apply_chat_template=self.chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                confirm_run_unsafe_code=self.unsafe_code,
            )
        tell_progress(n, n)
        table = self._table(chosen, found["samples"])
        return table[torch.tensor(items)]

    def _table(self, chosen: Mapping[int, Sequence[int]], samples: Mapping[str, Any]) -> Tensor:
        """Return what the harness has logged, ``size x m``; NaN where it has logged nothing."""
        known, columns = self._known, list(self._plan.columns)
        table = torch.full((self.size, len(columns)), torch.nan, dtype=torch.float64)
        for i, rows in chosen.items():
            leaf = known.leaves[i]
            place = {leaf.indices[row]: known.items[i, row] for row in rows}
            own = [
                (j, column)
                for j, (unit, column) in enumerate(
                    (unit.name, column) for unit in self._plan.units for column in unit.columns
                )
                if unit == leaf.unit
            ]
            seen: set[str] = set()
            for logged in samples[leaf.name]:
                seen |= set(logged["metrics"])
                refuse_nan(logged["resps"])
                for j, column in own:
                    if logged["filter"] != column.filter or column.metric not in logged:
                        continue
                    value = outcome_of(logged[column.metric], column.rule)
                    if not math.isfinite(value):
                        raise EvaluationError(
                            f"the {column.metric} of document {logged['doc_id']} of {leaf.name!r} "
                            "is NaN or infinite",
                            hint="these coefficients break the model; narrow the bounds if many do",
                        )
                    table[place[logged["doc_id"]], j] = value
            for j, column in own:
                if not bool(table[list(place.values()), j].isfinite().any()):
                    raise EvaluationError(
                        f"the harness measured no {column.key!r} of {leaf.name!r}; it measured "
                        f"{listed(sorted(seen))}",
                        hint=f"choose others: metrics={{{leaf.unit!r}: ...}}",
                    )
        return table


@dataclass(frozen=True, eq=False)
class _Leaf:
    """A task with its prompts.

    Attributes:
        unit: Name of the task or group that was asked for.
        name: Name of the task.
        task: The harness's task.
        indices: Which of its documents are used, ascending.
        documents: Those documents.
        requests: The requests of each.
    """

    unit: str
    name: str
    task: Any
    indices: tuple[int, ...]
    documents: list[Any]
    requests: list[list[Any]]

    @property
    def arguments(self) -> list[list[Any]]:
        """What the model is asked for each document."""
        return [[one.arguments for one in requests] for requests in self.requests]

    @property
    def targets(self) -> list[Any]:
        """What is right for each document, of which a request may not tell; None where unknown."""
        found: list[Any] = []
        for document in self.documents:
            try:
                found.append(self.task.doc_to_target(document))
            except Exception:  # of functions of a task that compares in a way of its own
                found.append(None)
        return found

    def size_of(self, row: int, column: Column) -> float:
        """Return the size of a document that a ratio is over; 1 for other metrics.

        Raises:
            EvaluationError: When the harness cannot tell it.
        """
        if column.rule not in ("ratio", "log_ratio"):
            return 1.0
        try:  # the size does not depend on what the model makes of the document
            logged = self.task.process_results(self.documents[row], [0.0])
            return float(logged[column.metric][1])
        except Exception as error:  # of functions of the task
            raise EvaluationError(
                f"the size of document {self.indices[row]} of {self.name!r} is not known: "
                f"{type(error).__name__}: {first_line(error)}",
                hint=f"leave {column.metric!r} out: metrics={{{self.unit!r}: ...}}",
            ) from error

    def chosen(self, rows: Sequence[int]) -> Any:
        """Return the task with the requests of some documents, as if it had no others.

        The harness writes prompts anew on each call, and draws few-shot examples one document
        after the other: so they would depend on which documents come before.
        """
        task = copy.copy(self.task)
        instances = [
            dataclasses.replace(
                one,
                arguments=copy.deepcopy(one.arguments),
                metadata=(one.task_name, place, one.repeats),
                resps=[],
                filtered_resps={},
            )
            for place, row in enumerate(rows)
            for one in self.requests[row]
        ]
        documents = [self.documents[row] for row in rows]
        task._instances = instances
        task.build_all_requests = lambda **_: None
        task.doc_iterator = lambda **_: enumerate(documents)
        task.aggregation = _Nothing  # means over documents are taken here
        return task


class _Nothing(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        return lambda values: 0.0


class _Ready:
    """What `prepare` has found.

    Examples are the first document of each task, then the second of each, and so on: so the first
    few are of all tasks.

    Args:
        leaves: Tasks with their prompts.
        tokenizer: The tokenizer.
        digest: Digest of all that decides the outcomes.
        columns: The unit of each metric, and what is measured of it.
    """

    def __init__(
        self,
        leaves: tuple[_Leaf, ...],
        tokenizer: PreTrainedTokenizerBase,
        digest: str,
        columns: Sequence[tuple[str, Column]],
    ) -> None:
        self.leaves, self.tokenizer, self.digest = leaves, tokenizer, digest
        places = [(i, row) for i, leaf in enumerate(leaves) for row in range(len(leaf.requests))]
        self.places = sorted(places, key=lambda place: (place[1], place[0]))
        self.items = {place: item for item, place in enumerate(self.places)}
        self.strata = torch.tensor([i for i, _ in self.places])
        sizes = [
            [
                leaves[i].size_of(row, column) if leaves[i].unit == unit else 1.0
                for unit, column in columns
            ]
            for i, row in self.places
        ]
        self.weights = torch.tensor(sizes, dtype=torch.float64)


def _check_column(name: str, task: Any, column: Column, filters: list[str]) -> None:
    """Refuse a metric or filter that a task certainly lacks."""
    if column.filter not in filters:
        raise EvaluationError(
            f"the task {name!r} has no filter {column.filter!r}",
            hint=did_you_mean(column.filter, filters),
        )
    known = task.aggregation()
    free = callable(task.get_config("process_results")) or any(map(callable, known))
    if column.metric not in known and not free:
        raise EvaluationError(
            f"the task {name!r} has no metric {column.metric!r}",
            hint=did_you_mean(column.metric, known),
        )


def _names(what: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple, or refuse them."""
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or not all(isinstance(one, str) and one.strip() for one in names):
        raise ConfigError(f"{what} must be names, got {given!r}", hint="such as tasks=['arc_easy']")
    return tuple(dict.fromkeys(names))
