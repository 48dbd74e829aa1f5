"""From configuration to objects: problem, settings, trackers; a wrong key is a clear error."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from map_bo.app.schema import Config
from map_bo.errors import ConfigError, MapBoError, did_you_mean, first_line
from map_bo.loop.mirrors import Local
from map_bo.loop.settings import Settings
from map_bo.loop.transfer.study import StartFrom
from map_bo.nested.settings import Nested
from map_bo.problems.problem import Problem
from map_bo.tracking.tracker import Tracking
from map_bo.workers.recipe import BuildsByRecipe, Recipe
from map_bo.workers.workers import KeepsLogs, WorkerSettings

__all__ = [
    "build_nested",
    "build_problem",
    "build_settings",
    "build_start",
    "build_tracking",
    "build_workers",
    "log_workers",
    "problem_of",
    "refuse_unknown",
    "working_directory",
]


def refuse_unknown(config: DictConfig) -> None:
    """Refuse options that nothing reads; a ``+`` on the command line lets them in.

    Raises:
        ConfigError: On the first of them.
    """
    known = [field.name for field in fields(Config)]
    for key in map(str, config):
        if key not in known:
            raise ConfigError(f"there is no option {key!r}", hint=did_you_mean(key, known))


def build_problem(config: DictConfig) -> Problem:
    """Build ``config.problem``.

    Raises:
        ConfigError: On a key that the problem does not take; other errors are the problem's own.
    """
    problem = _build(config, "problem")
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"problem._target_ must build a problem, and {config.problem['_target_']!r} builds a "
            f"{type(problem).__name__}",
            hint="give it `space`, `metrics` and `evaluate(X, *, generator)`, or name a problem",
        )
    return problem


def build_settings(config: DictConfig) -> Settings:
    """Build the settings of the run from ``config``."""
    loop: dict[str, Any] = _container(config, "loop")
    reference = loop.get("reference")
    if reference is not None and not _fits(reference, Mapping[str, float]):
        raise ConfigError(
            f"loop.reference must give a number per metric, got {reference!r:.80}",
            hint="write it as loop.reference={METRIC: VALUE, ...}, or leave it out",
        )
    parts = {name: _build(config, name) for name in ("surrogate", "sampler", "solver")}
    workers = build_workers(config)
    return Settings.checked(
        seed=config.get("seed", Settings.seed), workers=workers, **loop, **parts
    )


def build_workers(config: DictConfig) -> WorkerSettings | None:
    """Build ``config.workers``, which get the problem's configuration as the way to build it.

    Returns:
        None where the process of the run evaluates, as where an old record lacks the group.

    Raises:
        ConfigError: On an unknown key, or a value that is not possible.
    """
    if "workers" not in config or not config.workers:
        return None
    built = _build(config, "workers")
    if not isinstance(built, WorkerSettings):
        raise ConfigError(
            f"workers must build settings of workers, and builds a {type(built).__name__}",
            hint="choose them with workers=inline, workers=4, or workers=processes",
        )
    if isinstance(built, BuildsByRecipe):
        return built.with_recipe(Recipe.configured({"problem": _container(config, "problem")}))
    return built


def problem_of(tree: Mapping[str, Any]) -> Problem:
    """Build the problem of a resolved configuration, as workers do.

    Args:
        tree: Its group ``problem``, as plain data.

    Raises:
        ConfigError: As :func:`build_problem`.
    """
    return build_problem(OmegaConf.create(dict(tree)))


def log_workers(settings: Settings, directory: Path) -> Settings:
    """Return settings whose workers, where they are others, keep their logs in a run directory."""
    if isinstance(settings.workers, KeepsLogs):
        return replace(settings, workers=settings.workers.with_logs(directory / "workers"))
    return settings


def build_start(config: DictConfig) -> StartFrom | None:
    """Build ``config.start_from``: a path, or the fields of `StartFrom`; None where it is empty.

    Raises:
        ConfigError: On an unknown key, or a value that is not possible.
    """
    given = config.get("start_from")
    if isinstance(given, DictConfig):
        given = OmegaConf.to_container(given, resolve=True)
    if given is None or isinstance(given, str):
        return StartFrom(given) if given else None
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"start_from must be a path or a mapping, got {given!r:.80}",
            hint="write start_from=PATH, or start_from.source=PATH and its other options",
        )
    known = [field.name for field in fields(StartFrom)]
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, before="start_from.")
            raise ConfigError(f"there is no option start_from.{key}", hint=hint)
    source = given.get("source")
    if not isinstance(source, str | None):
        raise ConfigError(
            f"start_from.source must be a path, got {source!r:.80}",
            hint="name the directory of a run, a CSV file, or an SQLite file of Ax",
        )
    if not source:
        if any(value for key, value in given.items() if key != "source"):
            raise ConfigError(
                "start_from has options and no source",
                hint="name the older study with start_from.source=PATH",
            )
        return None
    return StartFrom(**{str(key): value for key, value in given.items()})


def build_nested(config: DictConfig) -> Nested | None:
    """Build ``config.nested``; None where all experts are merged at once.

    Raises:
        ConfigError: On an unknown key, or a value that is not possible.
    """
    if "nested" not in config or not config.nested:
        return None
    built = _build(config, "nested")
    if not isinstance(built, Nested):
        raise ConfigError(
            f"nested must build a Nested, and builds a {type(built).__name__}",
            hint="choose one with nested=fronts, surrogates, preferences, published or by_hand",
        )
    return built


def build_tracking(config: DictConfig) -> list[Tracking]:
    """Build the settings of the trackers in ``config.tracking``.

    A run whose recorded configuration lacks this group has only the local files.

    Raises:
        ConfigError: On an unknown key, or a part that is not the settings of a tracker.
    """
    if "tracking" not in config:
        return [Local()]
    found = []
    several: Any = config.tracking
    if not isinstance(several, DictConfig | None):
        raise ConfigError(
            f"tracking must be a mapping, got {several!r:.80}",
            hint="choose trackers with tracking=none, local, wandb or [local,wandb]",
        )
    for name in config.tracking or {}:
        part = _build(config.tracking, name, f"tracking.{name}")
        if not isinstance(part, Tracking):
            raise ConfigError(
                f"tracking.{name} must build a tracker, and builds a {type(part).__name__}",
                hint="choose one with tracking=none, local, wandb or [local,wandb]; settings of a "
                "tracker have `open(directory)`",
            )
        found.append(part)
    return found


@contextmanager
def working_directory(path: str | Path | None) -> Iterator[None]:
    """Enter ``path`` for the block, so that relative paths mean the same as in the original run."""
    if path is None or not Path(path).is_dir():
        yield
        return
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def _build(config: DictConfig, key: str, group: str = "") -> Any:
    group = group or key
    node = config.get(key)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise ConfigError(
            f"the configuration of {group} has no _target_",
            hint=f"choose one with {group.partition('.')[0]}=NAME; `map-bo run --help` lists the "
            "names",
        )
    try:
        OmegaConf.resolve(node)
        _check_keys(_plain(node), group)
        return instantiate(node, _convert_="all")
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{group} cannot be resolved: {error}",
            hint=f"see its options with `map-bo run {group.partition('.')[0]}=NAME --cfg job`",
        ) from error
    except MapBoError:
        raise
    except Exception as error:  # whatever a class makes of its values; Hydra wraps most of it
        cause = error.__cause__
        if isinstance(cause, MapBoError):
            raise cause from error
        reason = first_line(cause or error)
        raise ConfigError(
            f"{group} cannot be built: {reason}",
            hint=f"check the values below {group} in the configuration",
        ) from error


def _check_keys(node: Mapping[str, Any], path: str) -> None:
    """Refuse an unknown key of the target before anything is built."""
    try:
        target = get_object(node["_target_"])
    except Exception as error:
        raise ConfigError(
            f"{path}._target_ {node['_target_']!r} cannot be imported: {error}",
            hint="write it as package.module.Name",
        ) from error
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}._target_ {node['_target_']!r} cannot be called: {first_line(error)}",
            hint="name a class or a function",
        ) from error
    hints = _hints(target)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key, value in node.items():
        if key.startswith("_"):
            continue
        if key not in parameters:
            raise ConfigError(
                f"{path} has no option {key!r}",
                hint=did_you_mean(key, parameters, before=f"{path}."),
            )
        if not _fits(value, hints.get(key, Any)):
            raise ConfigError(
                f"{path}.{key} must be {_words(hints[key])}, got {value!r:.80}",
                hint="give such a value, or leave it out for the default",
            )
        # A part, or several by name, such as the options of a choice.
        parts = {key: value} if _is_part(value) else value if isinstance(value, Mapping) else {}
        for name, part in parts.items():
            if _is_part(part):
                _check_keys(part, f"{path}.{key}" if part is value else f"{path}.{key}.{name}")


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _hints(target: Any) -> Mapping[str, Any]:
    """Return the types of a target's parameters; none where they cannot be told."""
    plain = isinstance(target, type) and not is_dataclass(target)
    try:
        return get_type_hints(target.__init__ if plain else target)
    except Exception:  # of types that are only there for type checkers
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether plain data can be a value of a type, as far as it can be told.

    Words of a `Literal` and the ranges of numbers are left to the classes, which say more.
    """
    if value is None or value == _LACKING:
        return True  # which many take for a default, and others tell when they are built
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint in (None, NoneType):
        return False
    if get_origin(hint) is Literal:
        return type(value) in {type(word) for word in get_args(hint)}
    if hint in _PLAIN:
        return isinstance(value, _PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
    kind = get_origin(hint) or hint
    if not isinstance(kind, type) or (isinstance(value, Mapping) and "_target_" in value):
        return True
    if issubclass(kind, Mapping):
        inside = (*get_args(hint), Any, Any)[1]
        return isinstance(value, Mapping) and all(_fits(part, inside) for part in value.values())
    if issubclass(kind, Collection):
        inside = (*get_args(hint), Any)[0]
        several = isinstance(value, list | tuple)
        alike = kind is not tuple or get_args(hint)[1:] == (...,)
        return several and (not alike or all(_fits(part, inside) for part in value))
    return not kind.__module__.startswith("map_bo.")  # ours are built from nodes with a target


def _words(hint: Any) -> str:
    """Return what a value of a type is called."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in get_args(hint)))
    if hint in (None, NoneType):
        return "null"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    kind = get_origin(hint) or hint
    if hint in _WORDS:
        return _WORDS[hint]
    if not isinstance(kind, type):
        return "another value"
    if issubclass(kind, Mapping):
        return "a mapping"
    return "a list" if issubclass(kind, Collection) else "settings with a _target_"


_PLAIN: Mapping[Any, Any] = {bool: bool, int: int, float: int | float, str: str, Path: str}
_LACKING = "???"
_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}


def _plain(node: DictConfig) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(node)
    return {str(key): value for key, value in found.items()}


def _container(config: DictConfig, key: str) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(config[key], resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(
            f"{key} cannot be resolved: {first_line(error)}",
            hint=f"see the options of {key} with `map-bo run --cfg job`",
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{key} must be a mapping, got {found!r:.80}", hint="leave it out")
    return {str(name): value for name, value in found.items()}
