"""``map-bo init``: a configuration from models and data, tried out before anything is spent.

It writes a commented file that ``map-bo run FILE`` takes, then loads the models, lets the tasks
score a few examples with base and experts, and says what an evaluation and the whole run will cost.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from map_bo.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from map_bo.data import Metric
    from map_bo.loop.settings import Settings
    from map_bo.problems.merged.problem import MergedModelProblem
    from map_bo.problems.merged.trial import TaskTrial, Trial

__all__ = ["check_task", "init_options", "is_file", "parse_expert", "parse_task", "written_file"]

_GROUPS = ("operator", "surrogate", "sampler", "solver", "nested", "tracking")
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_EXAMPLES = 32


def init_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments and options of ``map-bo init``."""
    parser.add_argument(
        "base",
        metavar="BASE",
        help="the base: a folder or a model of the Hugging Face hub; or a configuration that was "
        "written before (FILE.yaml), to try it out again",
    )
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="an expert: a folder, a LoRA adapter, or a model of the hub; it is called like the "
        "folder where no name is given (repeatable)",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=KIND:DATA[,SETTING=VALUE...]",
        help="a task: its kind (text_classification, perplexity, lm_eval ...), its data (a file, a "
        "folder, a data set of the hub), and further settings such as split=test, "
        "columns.text=sentence, batch_size=64 (repeatable)",
    )
    parser.add_argument("--kind", help="kind of the tasks for which none is given")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score at most N examples of each task"
    )
    parser.add_argument(
        "--budget", type=int, metavar="N", help="evaluations in all (default: by the experts)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting, such as problem.missing=base or operator=ties (repeatable)",
    )
    parser.add_argument(
        "--out",
        default="map_bo.yaml",
        metavar="FILE",
        help="the configuration to write (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument("--no-check", action="store_true", help="write the file and do no more")
    parser.add_argument(
        "--examples",
        type=int,
        default=_EXAMPLES,
        metavar="N",
        help="examples of each task to try out (default: %(default)s)",
    )


def is_file(base: str) -> bool:
    """Return whether what was given as the base is a configuration."""
    return base.endswith((".yaml", ".yml"))


def written_file(options: argparse.Namespace) -> Path:
    """Write the configuration that the options describe, and return its path.

    Raises:
        ConfigError: When an option cannot be understood, or the file is there.
    """
    out = Path(options.out)
    if not is_file(str(out)):
        raise ConfigError(f"--out must be a .yaml file, got {options.out!r}", hint="map_bo.yaml")
    if out.exists() and not options.force:
        raise ConfigError(
            f"{out} is there already",
            hint=f"try it out with `map-bo init {shlex.quote(str(out))}`, write over it with "
            "--force, or choose another name with --out",
        )
    text = _text(options, str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def parse_expert(text: str) -> tuple[str, str]:
    """Return name and place of an expert.

    Args:
        text: ``NAME=PLACE``, or a place, by whose last part the expert is called.

    Raises:
        ConfigError: When there is no name.
    """
    name, separator, place = text.partition("=")
    if not separator or not _NAME.fullmatch(name):
        place = text
        name = re.sub(r"\W+", "_", text.partition("@")[0].rstrip("/").rpartition("/")[2]).strip("_")
    if not name or not place:
        raise ConfigError(
            f"--expert must be NAME=PATH, got {text!r}", hint="as in --expert math=models/math"
        )
    return name, place


def parse_task(text: str, *, kind: str | None = None) -> tuple[str, Any]:
    """Return name and settings of a task.

    Args:
        text: ``NAME=KIND:DATA,SETTING=VALUE,...``, ``NAME={kind: ..., ...}``, or
            ``NAME=module:function``.
        kind: The kind where none is given.

    Raises:
        ConfigError: When it is of another form, or the kind is not known.
    """
    from map_bo.evaluators.kinds import KINDS, known_kinds, main_setting

    name, separator, rest = text.partition("=")
    if not separator or not _NAME.fullmatch(name) or not rest:
        raise ConfigError(
            f"--task must be NAME=KIND:DATA, got {text!r}",
            hint="as in --task sst2=text_classification:sst2.csv",
        )
    if rest.startswith("{"):
        return name, _value(rest, name)
    first, *more = _split(rest)
    head, _, data = first.partition(":")
    if head not in KINDS and head not in known_kinds():
        hint = did_you_mean(head, known_kinds())
        misspelt = hint.startswith("did you mean")
        if kind is None and _FUNCTION.fullmatch(first) and not misspelt:
            head, data = first, ""
        elif kind is None:
            raise ConfigError(f"the kind of task {name!r} is not known: {head!r}", hint=hint)
        else:
            head, _colon, data = kind, ":", first
    settings: dict[str, Any] = {"kind": head}
    if data:
        main = main_setting(head) if head in KINDS else "data"
        if main is None:
            raise ConfigError(
                f"task {name!r} is of the kind {head}, which takes no data by itself: {data!r}",
                hint=f"give its settings by name: --task '{name}={head},SETTING=VALUE'",
            )
        settings[main] = {"path": data} if main == "data" else _several(data)
    for part in more:
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"task {name!r} has the setting {part!r}, which is no KEY=VALUE",
                hint="as in split=test or columns.text=sentence",
            )
        _put(settings, _place(head, key.strip(), settings), _value(value, f"{name}.{key}"))
    return name, settings


def _several(text: str) -> Any:
    return text.split("+") if "+" in text else text


def _place(kind: str, key: str, settings: Mapping[str, Any]) -> list[str]:
    """Return where a setting goes: into the data block, where that has one of the name."""
    from dataclasses import fields

    from map_bo.evaluators.data import Data
    from map_bo.evaluators.kinds import KINDS, settings_of

    words = key.split(".")
    own = settings_of(kind) if kind in KINDS else []
    of_data = isinstance(settings.get("data"), Mapping)
    if of_data and words[0] not in own and words[0] in {field.name for field in fields(Data)}:
        return ["data", *words]
    return words


def _put(tree: dict[str, Any], words: Sequence[str], value: Any) -> None:
    """Put a value below some keys; a mapping joins the one that is there, as in Hydra."""
    for word in words[:-1]:
        inner = tree.setdefault(word, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{'.'.join(words)} cannot be set below {word}, which is {inner!r}",
                hint="give one of the two",
            )
        tree = inner
    last = words[-1]
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        for key, one in value.items():
            _put(tree[last], [key], one)
    else:
        tree[last] = value


def _value(text: str, what: str) -> Any:
    """Return what a value is in YAML; what is in no brackets and no quotes is never a structure."""
    import yaml

    plain = text.strip()[:1] not in ("{", "[", "'", '"')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if plain:
            return text
        raise ConfigError(
            f"the value of {what} cannot be read: {text} ({first_line(error)})",
            hint="close its brackets and quotes; inside of brackets, put text in quotes",
        ) from error
    return text if plain and isinstance(value, dict | list) else value


def _split(text: str) -> list[str]:
    """Split at commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _text(options: argparse.Namespace, out: str) -> str:
    """Return the configuration as commented YAML."""
    experts = _named((parse_expert(text) for text in options.expert), "expert")
    tasks = _named((parse_task(text, kind=options.kind) for text in options.task), "task")
    for name, found in (("expert", experts), ("task", tasks)):
        if not found:
            raise ConfigError(
                f"no {name} was given",
                hint="map-bo init BASE --expert math=models/math --task math=KIND:DATA",
            )
    if options.limit is not None:
        for settings in tasks.values():
            if isinstance(settings, dict) and isinstance(settings.get("data"), dict):
                settings["data"].setdefault("limit", options.limit)
            elif isinstance(settings, dict) and "data" not in settings:
                settings.setdefault("limit", options.limit)
    budget = options.budget or max(24, 3 * (len(experts) + 2))
    tree = {
        "problem": {"base": options.base, "experts": experts, "tasks": tasks},
        "loop": {"budget": budget},
    }
    return _page(out, _set(tree, options.set), tree)


def _named(pairs: Any, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"the {what} {name!r} was given twice", hint="give each its own name")
        found[name] = value
    return found


def _set(tree: dict[str, Any], given: Sequence[str]) -> dict[str, str]:
    """Put settings into the tree, and return the choices of groups among them."""
    chosen: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set must be KEY=VALUE, got {text!r}", hint="problem.upper=1.2")
        if key in _GROUPS and not value.startswith("{"):
            chosen[key] = value
        else:
            _put(tree, key.split("."), _value(value, key))
    return chosen


_HEAD = """\
# Which models are merged, how the merges are measured, and what may be spent.
#   map-bo run {file}                       find the front
#   map-bo run {file} loop.budget=60 seed=1 ... with other settings than those of this file
#   map-bo init {file}                      try it out again after a change
# Paths are relative to where the command is given.
"""
_OTHERS = """\
  # Settings that may be needed; these are their defaults:
  # lower: 0.0           # bounds of the coefficients
  # upper: 1.0
  # dtype: float32       # storage of the task vectors; bfloat16 takes half
  # max_memory: null     # cap of the memory for task vectors, such as 8GB
  # device: cpu          # or cuda
  # missing: refuse      # base: tensors that an expert lacks stay the base's
  # vocabulary: null     # base or tokens: experts with other embedding rows
  # heads: null          # {task: expert}, where the head is not that of the expert of its name
  # metrics: null        # {metric: {direction: min, kind: loss}}, where it is not as declared
"""
_LOOP = """\
  # stop: {criterion: regret}    # end the search when choices stop getting better
  # constraints: {safe: ">= 0.9"}  # what a metric has to keep
"""


def _page(out: str, chosen: Mapping[str, str], tree: Mapping[str, Any]) -> str:
    file = shlex.quote(out)
    parts = [_HEAD.format(file=file), "defaults:", "  - config", "  - override problem: hf"]
    parts += [f"  - override {group}: {name}" for group, name in chosen.items()]
    parts += ["  - _self_        # what stands below counts more than the defaults", ""]
    if "operator" not in chosen:
        after = "  # - override operator: ties     # task_arithmetic by default; see conf/operator"
        parts.insert(-2, after)
    parts += [_dumped({"problem": tree["problem"]}) + _OTHERS]
    parts += [_dumped({"loop": tree["loop"]}) + _LOOP]
    rest = {key: value for key, value in tree.items() if key not in ("problem", "loop")}
    return "\n".join(parts) + (f"\n{_dumped(rest)}" if rest else "")


def _dumped(tree: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True, width=100)
    return text


def check_task(config: DictConfig, *, file: str, examples: int = _EXAMPLES) -> None:
    """Build what a configuration describes, try it out, and print what was found.

    Args:
        config: The composed configuration, as a run would have it.
        file: Its file, for the messages.
        examples: Examples of each task to score.

    Raises:
        MapBoError: For everything that a run would refuse.
    """
    from rich.console import Console

    from map_bo.app.build import (
        build_nested,
        build_problem,
        build_settings,
        build_tracking,
        refuse_unknown,
    )
    from map_bo.problems.merged.problem import MergedModelProblem
    from map_bo.problems.merged.trial import try_out

    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    refuse_unknown(config)
    settings = build_settings(config)
    build_nested(config)
    build_tracking(config)
    problem = build_problem(config)
    if not isinstance(problem, MergedModelProblem):
        raise ConfigError(
            f"{file} describes a {type(problem).__name__}, and only merges of models are tried out",
            hint="choose problem=hf or problem=checkpoints",
        )
    trial = try_out(problem, examples=examples)
    width = None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)
    _print(Console(width=width), problem, settings, trial, file)


def _print(
    console: Console,
    problem: MergedModelProblem,
    settings: Settings,
    trial: Trial,
    file: str,
) -> None:
    from rich import box
    from rich.table import Table

    from map_bo.report.numbers import metric_value

    metrics = {metric.name: metric for metric in problem.metrics}
    experts = [name for name in trial.models if name != "base"]
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for title, justify in (
        ("metric", "left"),
        ("better", "left"),
        ("tried", "right"),
        ("base", "right"),
        ("own expert", "right"),
        ("other experts", "right"),
        ("s per evaluation", "right"),
    ):
        table.add_column(title, justify=justify, no_wrap=title == "metric")  # type: ignore[arg-type]
    notes: list[str] = []
    for task in trial.tasks:
        tried = "whole" if task.size is None else f"{task.tried} of {task.size}"
        for i, name in enumerate(task.values["base"]):
            metric = metrics[name]
            values = {model: seen[name] for model, seen in task.values.items()}
            own = task.name if task.name in values else ""
            others = [values[one] for one in experts if one != own and one in values]
            table.add_row(
                name,
                "more" if metric.direction == "max" else "less",
                tried if not i else "",
                metric_value(values["base"], metric),
                metric_value(values[own], metric) if own else "",
                " to ".join(
                    dict.fromkeys(metric_value(f(others), metric) for f in (min, max) if others)
                ),
                f"{task.seconds:.2g}" if not i else "",
            )
            notes += _notes_on(task, metric, values, own)
    console.print(table)
    evaluations = settings.search + settings.verifications
    each = trial.seconds
    lines = [
        f"One evaluation takes about {_duration(each)}: {len(trial.tasks)} merges of "
        f"{_duration(trial.merging)} each, and scoring.",
        f"{evaluations} evaluations take about {_duration(each * evaluations)}, and each proposal "
        "a second or so.",
        f"Peak resident memory so far: {trial.memory / 1e9:.2f} GB"
        + (f", on the device {trial.device_memory / 1e9:.2f} GB." if trial.device_memory else "."),
        *(f"note: {note}" for note in notes),
        "",
        "Next",
        f"  map-bo run {shlex.quote(file)}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _notes_on(task: TaskTrial, metric: Metric, values: Mapping[str, float], own: str) -> list[str]:
    """Return what should make a user look twice."""
    if not own:
        if len(values) > 1:
            return [f"no expert is called {task.name!r}, so none is taken to be good at it"]
        return []
    gain = values[own] - values["base"]
    if (gain if metric.direction == "max" else -gain) > 0:
        return []
    return [
        f"expert {own!r} does not beat the base on {metric.name!r} on the {task.tried} examples "
        "that were tried: is it the right model, label map and column?"
    ]


def _duration(seconds: float) -> str:
    """Return a duration to read."""
    if seconds < 0.095:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
