"""EleutherAI's evaluation harness: what its tasks measure, and a model in memory for it.

What a task measures stands in its YAML file, so that metrics are known before any data are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import EvaluationError, did_you_mean, first_line, listed, require
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import mean_of, ratio_estimate
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.language.decoding import RefusesNaN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LOGGERS",
    "Column",
    "Plan",
    "Progress",
    "Unit",
    "draws",
    "load_tasks",
    "make_plan",
    "measured_by",
    "model_in_memory",
    "outcome_of",
    "refuse_nan",
    "require_harness",
]

Rule = Literal["mean", "brier", "log_mean", "ratio", "log_ratio"]
"""How the outcomes of documents make the metric: their mean; the exponential of the mean of their
logarithms; the ratio of sums; the exponential of such a ratio."""

LOGGERS = (
    "lm_eval",
    "lm-eval",
    "datasets",
    "evaluate",
    "transformers",
    "huggingface_hub",
    "filelock",
)
"""Loggers that the harness speaks through."""

_RULES: Mapping[str, Rule] = {
    "mean": "mean",
    "nanmean": "mean",
    "brier_score": "brier",
    "perplexity": "log_mean",
    "bits_per_byte": "ratio",
    "weighted_perplexity": "log_ratio",
}
_PAIRS = frozenset({"likelihood"})  # a mean in name only: of pairs that are no numbers
_SHARES = ("acc", "exact_match", "pass@")  # how shares of right answers begin


@dataclass(frozen=True)
class Column:
    """One metric of one task or group.

    Attributes:
        metric: The harness's name of it.
        filter: The filter of the answers that it is measured on.
        rule: How the outcomes of documents make it.
        higher: Whether more is better.
    """

    metric: str
    filter: str
    rule: Rule
    higher: bool

    @property
    def key(self) -> str:
        """The harness's key, such as ``exact_match,strict-match``."""
        return f"{self.metric},{self.filter}"

    def named(self, name: str) -> Metric:
        """Return the metric under a name, with direction, kind and bounds."""
        direction: Literal["max", "min"] = "max" if self.higher else "min"
        if self.rule in ("log_mean", "log_ratio"):
            return Metric(name, direction, "loss", lower=1.0)
        if self.rule in ("ratio", "brier"):
            return Metric(name, direction, "loss")
        share = self.metric.startswith(_SHARES) or self.metric.endswith("_acc")
        return Metric(name, direction, "proportion" if share and self.higher else "unbounded")


@dataclass(frozen=True)
class Unit:
    """A task, or a group that the harness averages.

    Attributes:
        name: Its name.
        columns: What is measured of it; empty where its file does not say it.
        dropped: Metrics that are no mean over documents, and are left out.
        by_size: Whether each document of a group counts the same; else each task does.
    """

    name: str
    columns: tuple[Column, ...]
    dropped: tuple[str, ...] = ()
    by_size: bool = True

    def means(self, tasks: int) -> tuple[bool, ...]:
        """Return which metrics are means over the documents of so many tasks."""
        alike = self.by_size or tasks == 1
        return tuple(alike and column.rule in ("mean", "brier") for column in self.columns)


@dataclass(frozen=True, eq=False)
class Plan:
    """What was asked of the harness.

    Attributes:
        manager: The harness's index of tasks.
        units: Tasks and groups.
        wrong: What cannot be measured: verdicts with their hints.
    """

    manager: Any
    units: tuple[Unit, ...]
    wrong: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> dict[tuple[str, str], Metric]:
        """Unit and the harness's key -> the metric, under the evaluator's own name."""
        pairs = [(unit, column) for unit in self.units for column in unit.columns]
        found: dict[tuple[str, str], Metric] = {}
        for unit, column in pairs:
            name = column.metric
            if len({one.filter for one in unit.columns}) > 1:
                name += f"_{column.filter}"
            if len(self.units) > 1:
                name = f"{unit.name}_{name}"
            found[unit.name, column.key] = column.named(name)
        return found


def draws(arguments: object) -> bool:
    """Return whether any of the requests, or their settings of generation, ask for random draws."""
    if isinstance(arguments, Mapping):
        if arguments.get("do_sample") is True:
            return True
        return any(map(draws, arguments.values()))
    return isinstance(arguments, list | tuple) and any(map(draws, arguments))


def require_harness() -> None:
    """Refuse to go on without the harness.

    Raises:
        MissingDependencyError: With the install line.
    """
    require("lm_eval", by="the evaluation harness", extra="lm-eval")


def make_plan(
    tasks: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
    include_path: tuple[str, ...],
) -> Plan:
    """Find tasks and what they measure; no data are read.

    Args:
        tasks: Names of tasks, groups and tags, or patterns such as ``arc_*``.
        metrics: Name of a task or group -> those of its metrics that are wanted.
        include_path: Folders of further tasks.

    Raises:
        MissingDependencyError: Without the harness.
        EvaluationError: When its files cannot be read.
    """
    require_harness()
    try:
        with quiet(*LOGGERS, streams=True):
            manager = _manager(tuple(tasks), include_path)
            names = _expanded(tasks, manager)
            wrong = [
                (f"the harness has no task {name!r}", did_you_mean(name, manager.all_tasks))
                for name in names
                if name not in manager.task_index
            ]
            units: dict[str, Unit] = {}
            for name in names:
                if name in manager.task_index:
                    found = list(_units(name, manager.task_index, metrics))
                    units |= {unit.name: unit for unit in found}
                    if not found:
                        hint = "name the tasks themselves"
                        wrong.append((f"the group {name!r} has no tasks", hint))
    except Exception as error:  # of files in any state
        raise EvaluationError(
            f"the tasks of the harness cannot be read: {type(error).__name__}: {first_line(error)}",
            hint="check include_path and the YAML files in it",
        ) from error
    for name in metrics:
        if name not in units and not wrong:
            hint = did_you_mean(name, units)
            wrong.append((f"metrics are given for {name!r}, which is not evaluated", hint))
    for unit in units.values():
        if not unit.columns:
            said = f" ({listed(unit.dropped)} are no means over documents)" if unit.dropped else ""
            hint = f"name one that is a mean over documents: metrics={{{unit.name!r}: ...}}"
            wrong.append((f"no metric of {unit.name!r} can be measured{said}", hint))
    return Plan(manager, tuple(units.values()), tuple(wrong))


def _manager(names: tuple[str, ...], include_path: tuple[str, ...]) -> Any:
    """Return the harness's index; of the given folders alone, where they hold all that is named.

    The harness's own index takes many seconds to read.
    """
    from lm_eval.tasks import TaskManager

    if include_path:
        own = TaskManager(include_path=list(include_path), include_defaults=False)
        if all(_is_closed(name, own.task_index) for name in names):
            return own
    return _whole_manager(include_path)


@lru_cache(maxsize=2)
def _whole_manager(include_path: tuple[str, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(include_path) or None)


def _is_closed(name: str, index: Mapping[str, Any]) -> bool:
    """Return whether an index holds a task, or a group with all of its members."""
    if name not in index:
        return False
    return all(
        child is None or _is_closed(child, index) for child, _ in _members(index[name].cfg or {})
    )


def _members(settings: Mapping[str, Any]) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Yield the members of a group: a name, None where it is written in place; and settings."""
    members = settings.get("task") if "group" in settings else None
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member, {}
            continue
        name = member.get("group", member.get("task"))
        in_place = "dataset_path" in member or isinstance(member.get("task"), list)
        yield (None if in_place else str(name)), member


def _expanded(tasks: Sequence[str], manager: Any) -> list[str]:
    found: list[str] = []
    for task in tasks:
        matches = manager.match_tasks([task]) if any(one in task for one in "*?[") else []
        found += sorted(matches) or [task]
    return list(dict.fromkeys(found))


def _units(
    name: str,
    index: Mapping[str, Any],
    metrics: Mapping[str, Sequence[str]],
    change: Mapping[str, Any] | None = None,
) -> Iterator[Unit]:
    """Yield a task; a group that is averaged; or what else a group or tag stands for."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for task in sorted(entry.tags):
            yield from _units(task, index, metrics)
        return
    settings = {**(entry.cfg or {}), **(change or {})}
    if entry.kind.name != "GROUP":
        yield _task(name, settings, metrics.get(name))
    elif settings.get("aggregate_metric_list"):
        yield _group(name, settings, index, metrics.get(name))
    else:
        for child, own in _members(settings):
            if child is None:
                inner = f"{name}::{own.get('task')}"
                yield _task(inner, own, metrics.get(inner))
            else:
                changed = {k: v for k, v in own.items() if k not in ("task", "group")}
                yield from _units(child, index, metrics, changed)


def _task(name: str, settings: Mapping[str, Any], wanted: Sequence[str] | None) -> Unit:
    """Return what a task measures, by its settings."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    filters = [str(one["name"]) for one in settings.get("filter_list") or []] or ["none"]
    told = settings.get("metric_list")
    if told is None:
        told = [
            {"metric": one} for one in DEFAULT_METRIC_REGISTRY.get(settings.get("output_type"), [])
        ]
    columns: list[Column] = []
    dropped: list[str] = []
    for one in told:
        metric = str(one["metric"])
        if "/" in metric:  # a function in a file
            metric = metric.rpartition(".")[2]
        rule, higher = _rule(metric, one.get("aggregation")), _higher(metric, one)
        if rule is None:
            dropped.append(metric)
        else:
            columns += [Column(metric, one_filter, rule, higher) for one_filter in filters]
    if wanted is None:
        return Unit(name, tuple(columns), tuple(dropped))
    return Unit(name, tuple(_chosen(wanted, columns, filters, dropped)), tuple(dropped))


def _group(
    name: str, settings: Mapping[str, Any], index: Mapping[str, Any], wanted: Sequence[str] | None
) -> Unit:
    """Return what a group measures: means over its tasks."""
    plain: dict[str, Sequence[str]] = {}
    leaf = next(_leaves(settings, index, plain), None)
    told = settings["aggregate_metric_list"]
    columns: list[Column] = []
    dropped: list[str] = []
    by_size = True
    for one in [told] if isinstance(told, Mapping) else told:
        metric, filters = str(one["metric"]), one.get("filter_list")
        by_size &= bool(one.get("weight_by_size", True))
        known = [column for column in leaf.columns if column.metric == metric] if leaf else []
        if isinstance(filters, str):
            filters = [filters]
        found = [column for column in known if filters is None or column.filter in filters]
        columns += [column for column in found if column.rule == "mean"]
        if not any(column.rule == "mean" for column in found):
            dropped.append(metric)
    if wanted is not None:
        columns = list(_chosen(wanted, columns, sorted({one.filter for one in columns}), dropped))
    return Unit(name, tuple(columns), tuple(dropped), by_size)


def _leaves(
    settings: Mapping[str, Any], index: Mapping[str, Any], metrics: Mapping[str, Sequence[str]]
) -> Iterator[Unit]:
    """Yield the tasks of a group, also those of groups in it."""
    for child, own in _members(settings):
        if child is None:
            yield from [_task("", own, None)] if "dataset_path" in own else _leaves(own, index, {})
        elif index[child].kind.name == "GROUP":
            yield from _leaves(index[child].cfg or {}, index, metrics)
        else:
            changed = {k: v for k, v in own.items() if k not in ("task", "group")}
            yield from _units(child, index, metrics, changed)


def _chosen(
    wanted: Sequence[str], columns: Sequence[Column], filters: Sequence[str], dropped: Sequence[str]
) -> Iterator[Column]:
    """Yield the metrics that are wanted; one that the file does not name is taken for a mean."""
    for key in wanted:
        metric, _, one_filter = key.partition(",")
        found = [
            column
            for column in columns
            if column.metric == metric and one_filter in ("", column.filter)
        ]
        yield from found
        if not found and metric not in dropped:
            for each in [one_filter] if one_filter else filters:
                yield Column(metric, each, "mean", _higher(metric, {}))


def _rule(metric: str, aggregation: object) -> Rule | None:
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_AGGREGATION_REGISTRY

    if metric in _PAIRS:
        return None
    if aggregation is None and metric in METRIC_AGGREGATION_REGISTRY:
        of = METRIC_AGGREGATION_REGISTRY.get(metric)
        aggregation = next((name for name, one in AGGREGATION_REGISTRY.items() if one is of), None)
    return _RULES.get(str(aggregation))


def _higher(metric: str, settings: Mapping[str, Any]) -> bool:
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY

    if "higher_is_better" in settings or metric not in HIGHER_IS_BETTER_REGISTRY:
        return bool(settings.get("higher_is_better", True))
    return bool(HIGHER_IS_BETTER_REGISTRY.get(metric))


def load_tasks(plan: Plan) -> dict[str, list[Any]]:
    """Load tasks with their data.

    Args:
        plan: The plan.

    Returns:
        Name of each unit -> its tasks.

    Raises:
        EvaluationError: When one cannot be loaded, has no documents, or is there twice.
    """
    found: dict[str, list[Any]] = {}
    owner: dict[str, str] = {}
    for unit in plan.units:
        try:
            with quiet(*LOGGERS, streams=True):
                tasks = list(plan.manager.load([unit.name])["tasks"].values())
        except Exception as error:  # whatever missing data, files and packages raise
            raise EvaluationError(
                f"the task {unit.name!r} cannot be loaded: {type(error).__name__}: "
                f"{first_line(error)}",
                hint="check its YAML file and its templates; its data come from the hub unless "
                "dataset_path says otherwise",
            ) from error
        if not tasks:  # such as a group with a metric
            raise EvaluationError(
                f"the group {unit.name!r} has no tasks", hint="name the tasks themselves"
            )
        for task in tasks:
            other = owner.setdefault(task.task_name, unit.name)
            if other != unit.name:
                raise EvaluationError(
                    f"the task {task.task_name!r} is in {other!r} and in {unit.name!r}",
                    hint="leave one of them out",
                )
        found[unit.name] = tasks
    return found


class Progress:
    """Hears of every answered request, where the harness would put it into its cache.

    Args:
        report: Is told how many have been answered.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self._done, self._report = 0, report

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Hear of an answer; see ``CacheHook`` of the harness."""
        self._done += 1
        self._report(self._done)


def model_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int | None,
    progress: Progress | None = None,
) -> Any:
    """Return a model in memory as the harness takes it, without progress bars."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LogitsProcessorList

    class LiveModel(HFLM):  # type: ignore[misc]  # the harness has no types
        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, **_: Any) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **settings: Any) -> Any:
            settings["disable_tqdm"] = True
            return super()._loglikelihood_tokens(requests, *args[1:], **settings)

        def _model_generate(self, *args: Any, **settings: Any) -> Any:
            settings.setdefault("logits_processor", LogitsProcessorList([RefusesNaN()]))
            return super()._model_generate(*args, **settings)

    found = LiveModel(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
    )
    if progress is not None:
        found.set_cache_hook(progress)
    return found


def outcome_of(raw: Any, rule: Rule) -> float:
    """Return what the harness logs of a document as one number: the metric of that document.

    Args:
        raw: A number; a log-likelihood and the size of the text for ratios; the index of the right
            choice and the probabilities for Brier scores.
        rule: How the outcomes make the metric.

    Raises:
        EvaluationError: When it is anything else.
    """
    try:
        if rule in ("ratio", "log_ratio"):
            loss = -float(raw[0]) / float(raw[1])
            return loss / math.log(2) if rule == "ratio" else math.exp(loss)
        if rule == "brier":
            right, shares = int(raw[0]), [float(one) for one in raw[1]]
            return sum((one - (i == right)) ** 2 for i, one in enumerate(shares))
        return math.exp(-float(raw)) if rule == "log_mean" else float(raw)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise EvaluationError(
            f"the harness logs {str(raw)[:80]} for a document, which is not a number",
            hint="choose other metrics of the task",
        ) from error


def measured_by(
    values: Tensor, sizes: Tensor, strata: Tensor, column: Column, metric: Metric, *, by_size: bool
) -> Measurement:
    """Return what the outcomes of ``n`` documents make.

    Args:
        values: ``n`` outcomes.
        sizes: ``n`` weights of the ratios.
        strata: ``n`` numbers of their tasks.
        column: What is measured.
        metric: The metric.
        by_size: Whether each document counts the same; else each task does.
    """
    tasks = sorted(set(strata.tolist()))
    if column.rule in ("mean", "brier") and (by_size or len(tasks) == 1):
        return mean_of(values, metric)
    count = len(values)
    if column.rule in ("mean", "brier"):
        parts = [values[strata == one] for one in tasks]
        value = sum(float(part.mean()) for part in parts) / len(parts)
        variance: float | None = None
        if all(len(part) > 1 for part in parts):
            variance = sum(float(part.var()) / len(part) for part in parts) / len(parts) ** 2
        return Measurement(value, variance=variance)
    if column.rule == "ratio":
        value, variance = ratio_estimate(values * sizes, sizes)
        return Measurement(value, variance=variance, count=count)
    losses = values.log()
    value, variance = ratio_estimate(losses * sizes, sizes)
    value = math.exp(value)
    # By the delta method.
    variance = None if variance is None else value**2 * variance
    return Measurement(value, variance=variance, count=count)


def refuse_nan(answers: Any) -> None:
    """Refuse likelihoods that are NaN: the largest of them would still be some choice."""
    if isinstance(answers, list | tuple):
        for one in answers:
            refuse_nan(one)
    elif isinstance(answers, float) and math.isnan(answers):
        raise EvaluationError(
            "the model's outputs hold NaN",
            hint="these coefficients break the model; narrow the bounds if many do",
        )
