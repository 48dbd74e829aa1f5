"""From configuration to objects: problem, settings, trackers; a wrong key is a clear error."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from map_bo.app.schema import Config
from map_bo.errors import ConfigError, MapBoError, did_you_mean
from map_bo.loop.mirrors import Local
from map_bo.loop.settings import Settings
from map_bo.nested.settings import Nested
from map_bo.problems.problem import Problem
from map_bo.tracking.tracker import Tracking

__all__ = [
    "build_nested",
    "build_problem",
    "build_settings",
    "build_tracking",
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
    loop: dict[str, Any] = OmegaConf.to_container(config.loop, resolve=True)  # type: ignore[assignment]
    parts = {name: _build(config, name) for name in ("surrogate", "sampler", "solver")}
    return Settings.checked(seed=int(config.seed), **loop, **parts)


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
    node = config[key]
    if node is None or "_target_" not in node:
        raise ConfigError(
            f"the configuration of {group} has no _target_",
            hint=f"choose one with {group.partition('.')[0]}=NAME; `map-bo run --help` lists the "
            "names",
        )
    try:
        OmegaConf.resolve(node)
        _check_keys(node, group)
        return instantiate(node, _convert_="all")
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{group} cannot be resolved: {error}",
            hint=f"see its options with `map-bo run {group.partition('.')[0]}=NAME --cfg job`",
        ) from error
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MapBoError):
            raise cause from error
        reason = next(iter(str(cause or error).splitlines()), "") or type(cause).__name__
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
    parameters = inspect.signature(target).parameters
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
        if isinstance(value, Mapping) and "_target_" in value:
            _check_keys(value, f"{path}.{key}")
