"""A merged-model problem of models and data alone: a base, its experts, and a task for each.

This is ``problem=hf`` of the configuration. Nobody writes Python for it: a task is an evaluator by
its kind (:mod:`map_bo.evaluators.kinds`), and the architecture is what the base's folder says.
Everything that is wrong with it is said at once, before anything is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from map_bo.errors import ConfigError, MapBoError
from map_bo.evaluators.evaluator import Evaluator
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import evaluator_from, refuse_all
from map_bo.merging.adapters.adapter import AdapterCheckpoint, open_expert
from map_bo.merging.align.conform import MissingRule, align_experts
from map_bo.merging.align.vocabulary import VocabularyRule, require_shapes
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.problems.merged.imported import imported_problem
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.rebuilding import rebuilt

__all__ = ["hf_problem"]

_PLACES = ("data", "train", "path", "tokenizer", "processor")  # settings of tasks
_BESIDE_WEIGHTS: Mapping[str, tuple[str, ...]] = {  # setting of evaluators -> files it is read from
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
    ),
    "processor": ("preprocessor_config.json", "processor_config.json", "open_clip_config.json"),
}


@rebuilt
def hf_problem(
    *,
    base: str,
    experts: Mapping[str, str],
    tasks: Mapping[str, Any],
    root: str | None = None,
    model: str | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
    operator: MergeOperator | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    sum_at_most: float | None = None,
    fixed: Mapping[str, float] | None = None,
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
    """Return the problem of merging models that are measured by ready evaluators.

    Args:
        base: The base: a folder, a weight file, or a model of the Hugging Face hub. Its folder has
            the tokenizer and the processor of every task that needs one and names no other; where
            it has none, that is the folder of the task's expert.
        experts: The experts by name, likewise, or LoRA adapters.
        tasks: Task name -> ``{kind: ..., data: ..., ...}``; see
            :func:`map_bo.evaluators.kinds.evaluator_from`. A task is measured with the head of
            the expert of its name, where that has one.
        root: Folder in which models and data sets of the hub lie, each in the folder of its name
            (``root/organisation/name``) or of its last part (``root/name``). What does not lie
            there is fetched from the hub.
        model: As for :func:`~map_bo.problems.merged.imported.imported_problem`, like all that
            follow.
        metrics: Fields of :class:`~map_bo.data.Metric` by metric name, where what the evaluators
            declare does not fit.
        operator: How to merge; task arithmetic when None.
        lower: Lower bound of the coefficients.
        upper: Upper bound of the coefficients.
        sum_at_most: Bound on the sum of an expert's coefficients over the experts.
        fixed: Coefficients that are not searched.
        dtype: Storage of the task vectors.
        device: Where the task vectors and the model live.
        gradients: Whether to measure the derivatives by the coefficients too.
        vocabulary: How experts with another vocabulary are fitted to the base.
        missing: ``refuse``, or ``base``.
        heads: Task name -> expert whose head the task is measured with.
        recalibration: ``module:callable`` that returns batches.
        max_memory: Cap of the memory for task vectors.
        cache_dir: Where task vectors that do not fit are mapped from.
        cache: Whether measurements are kept for later runs, and taken from earlier ones.

    Raises:
        ConfigError: Naming everything that is wrong with base, experts and tasks, what the
            evaluators refuse included; a single trouble is raised as it is.
    """
    troubles: list[MapBoError] = []
    for name, given in (("experts", experts), ("tasks", tasks)):
        if not given:
            troubles.append(
                ConfigError(
                    f"the problem names no {name}",
                    hint=f"give them as +problem.{name}.NAME=..., one for each name",
                )
            )
    if root is not None:
        folder = Path(root).expanduser()
        _require_some(folder, [base, *(experts or {}).values(), *_places(tasks or {})])
        base = _in_folder(base, folder)
        experts = {name: _in_folder(one, folder) for name, one in (experts or {}).items()}
        tasks = {name: _with_folder(one, folder) for name, one in (tasks or {}).items()}
    opened, aligned = _open(base, experts or {}, vocabulary, missing, troubles)
    evaluators: dict[str, Evaluator] = {}
    for name, settings in (tasks or {}).items():
        try:
            evaluators[name] = evaluator_from(
                f"problem.tasks.{name}",
                settings,
                defaults=_beside(opened, aligned.get((heads or {}).get(name, name))),
            )
        except MapBoError as error:
            troubles.append(error)
    if troubles:
        lost = set(experts or {}) - set(aligned)
        _ask_evaluators(model, opened, aligned, evaluators, heads or {}, lost, missing, troubles)
    refuse_all(troubles)
    assert opened is not None
    return imported_problem(
        model,
        base=opened,
        experts=aligned,
        evaluators=evaluators,
        metrics=metrics,
        operator=operator,
        lower=lower,
        upper=upper,
        sum_at_most=sum_at_most,
        fixed=fixed,
        dtype=dtype,
        device=device,
        gradients=gradients,
        vocabulary=vocabulary,
        missing=missing,
        heads=heads,
        recalibration=recalibration,
        max_memory=max_memory,
        cache_dir=cache_dir,
        cache=cache,
    )


def _open(
    base: str,
    experts: Mapping[str, str],
    vocabulary: VocabularyRule | None,
    missing: MissingRule,
    troubles: list[MapBoError],
) -> tuple[Checkpoint | None, dict[str, Checkpoint]]:
    """Open base and experts; return what can be used, and add what is wrong to ``troubles``."""
    try:
        opened = open_checkpoint(base)
    except MapBoError as error:
        troubles.append(_at("problem.base", error))
        return None, {}
    found: dict[str, Checkpoint] = {}
    for name, source in experts.items():
        try:
            found[name] = open_expert(source, opened)
        except MapBoError as error:
            troubles.append(_at(f"problem.experts.{name}", error))
    together: MapBoError | None = None
    aligned: dict[str, Checkpoint] = {}
    try:
        aligned = align_experts(found, opened, vocabulary=vocabulary, missing=missing)
    except MapBoError as error:
        together = error
    fitting: dict[str, Checkpoint] = {}
    for name, expert in found.items():
        try:
            one = (
                aligned.get(name)
                or align_experts({name: expert}, opened, vocabulary=vocabulary, missing=missing)[
                    name
                ]
            )
            if not isinstance(one, AdapterCheckpoint):
                require_shapes(opened, one, name, {n: n for n in opened.names if n in one.names})
            fitting[name] = one
        except MapBoError as error:
            troubles.append(_at(f"problem.experts.{name}", error))
    if together is not None and len(fitting) == len(found):
        troubles.append(_at("problem.experts", together))  # they do not fit each other
    return opened, fitting


def _in_folder(place: str, root: Path) -> str:
    """Return a place in the folder, where it is there, or as it was given."""
    name = place.partition("@")[0]
    for path in (root / name, root / name.rpartition("/")[2]):
        if path.exists():
            return str(path)
    return place


def _places(settings: Any) -> Iterator[str]:
    """Yield where the settings of tasks say that data, tokenizers and processors are."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key in _PLACES and isinstance(value, str):
            yield value
        else:
            yield from _places(value)


def _require_some(root: Path, places: Sequence[str]) -> None:
    """Refuse a folder in which nothing of what is named lies, though it lies nowhere else here."""
    elsewhere = [one for one in places if not Path(one).expanduser().exists()]
    if not root.is_dir():
        raise ConfigError(
            f"problem.root is {root}, which is not a folder",
            hint="give the folder that holds the models and data sets, or leave it out",
        )
    if elsewhere and all(_in_folder(one, root) == one for one in places):
        raise ConfigError(
            f"problem.root is {root}, which holds none of the {len(elsewhere)} models and data "
            f"sets that are named, such as {elsewhere[0]}",
            hint=f"put them there, as {root / elsewhere[0].partition('@')[0]}; without "
            "problem.root they are taken from the hub",
        )


def _with_folder(settings: Any, root: Path) -> Any:
    """Return the settings of a task whose data, tokenizer and processor lie in the folder."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        key: _in_folder(value, root)
        if key in _PLACES and isinstance(value, str)
        else _with_folder(value, root)
        for key, value in settings.items()
    }


def _beside(base: Checkpoint | None, expert: Checkpoint | None) -> dict[str, str]:
    """Return what evaluators read beside the weights, of the base or else of the expert."""
    folders = [one.directory for one in (base, expert) if one is not None and one.directory]
    found: dict[str, str] = {}
    for setting, files in _BESIDE_WEIGHTS.items():
        having = [folder for folder in folders if any((folder / file).is_file() for file in files)]
        if having or folders:
            found[setting] = str((having or folders)[0])
    return found


def _at(key: str, error: MapBoError) -> MapBoError:
    return type(error)(f"{key}: {error.message}", hint=error.hint)


def _ask_evaluators(
    model: str | None,
    base: Checkpoint | None,
    experts: Mapping[str, Checkpoint],
    evaluators: Mapping[str, Evaluator],
    heads: Mapping[str, str],
    lost: set[str],
    missing: MissingRule,
    troubles: list[MapBoError],
) -> None:
    """Add what evaluators refuse of the parts that can be used, so that it is said with the rest.

    Of a task whose head is that of an expert which cannot be used only the data are looked at:
    without its head there is nothing to judge the rest by.
    """
    asked: dict[str, Evaluator] = {}
    for name, one in evaluators.items():
        if base is not None and experts and heads.get(name, name) not in lost:
            asked[name] = one
        elif isinstance(one, ExampleEvaluator):
            try:
                one.check_data()
            except MapBoError as error:
                troubles.append(_at(f"problem.tasks.{name}", error))
    if not asked or base is None:
        return
    given = {task: name for task, name in heads.items() if task in asked and name in experts}
    try:
        imported_problem(
            model, base=base, experts=experts, evaluators=asked, heads=given, missing=missing
        ).prepare()
    except MapBoError as error:
        troubles.append(error)
