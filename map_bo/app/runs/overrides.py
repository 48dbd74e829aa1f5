"""Other settings for a run that has begun: ``map-bo resume RUN loop.budget=48 tracking=wandb``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from map_bo.app.schema import Config, LoopConfig
from map_bo.errors import ConfigError, did_you_mean, first_line
from map_bo.loop.growth import MAY_CHANGE

__all__ = ["with_overrides"]

_IN_LOOP = tuple(each.name for each in fields(LoopConfig))
_LOOP = frozenset(f"loop.{name}" for name in MAY_CHANGE if name in _IN_LOOP)
_UNRECORDED = ("progress", "loop.asynchronous")  # what settings of the run do not tell
_NONE = object()


def with_overrides(
    config: DictConfig, words: Sequence[str], choices: Mapping[str, Any] | None = None
) -> tuple[DictConfig, dict[str, dict[str, Any]]]:
    """Return the configuration of a run with other settings.

    Args:
        config: The configuration in force.
        words: Overrides as of ``map-bo run``.
        choices: Group -> the option that was chosen when the run was started.

    Returns:
        The new configuration, and what changes in it besides settings of the loop: key -> ``from``
        and ``to``.

    Raises:
        ConfigError: On a word that is no override, a key that does not exist, or one that may not
            change on a run.
    """
    found: DictConfig = config.copy()
    for override in _parsed(words):
        key, value = str(override.key_or_group), override.value()
        if key.partition(".")[0] in _changing_groups() and not isinstance(value, dict):
            _set(found, key, _composed(key, str(override.input_line)) if _is_group(key) else value)
        elif key in _LOOP or key == "progress":
            _set(found, key, value)
        elif not _is_as_before(config, key, value, choices or {}):
            raise _refusal(config, key, value, choices or {})
    changes = {}
    for key in (*_changing_groups(), *_UNRECORDED):
        before, now = (_plain(OmegaConf.select(one, key)) for one in (config, found))
        if before != now:
            changes[key] = {"from": before, "to": now}
    return found, changes


def _parsed(words: Sequence[str]) -> list[Override]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise ConfigError(
            f"the changes of the run cannot be understood: {first_line(error)}",
            hint="write them as in `map-bo resume RUN loop.budget=48 loop.timeout=600`",
        ) from error
    for override in parsed:
        if override.is_delete():
            raise ConfigError(
                f"{override.input_line} would remove a setting of the run",
                hint="give it another value, such as null",
            )
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.input_line} gives several values, and a run has one",
                hint="give one value; several runs are a sweep (`map-bo run -m`)",
            )
    return parsed


def _changing_groups() -> tuple[str, ...]:
    """Return the groups that may change: trackers, and workers where they are a group."""
    known = {field.name for field in fields(Config)}
    return tuple(name for name in ("tracking", "workers") if name in known)


def _is_group(key: str) -> bool:
    return "." not in key


def _composed(group: str, word: str) -> Any:
    """Return what a choice of options of a group stands for."""
    from hydra import compose, initialize_config_module

    from map_bo.app.schema import register

    register()
    word = word.lstrip("+")
    count = word.partition("=")[2]
    # A number of workers is short for so many processes.
    many = group == "workers" and count.isdecimal()
    words = ["workers=processes", f"workers.count={count}"] if many else [word]
    try:
        with initialize_config_module("map_bo.conf", version_base="1.3"):
            return compose(config_name="config", overrides=words)[group]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{word} cannot be chosen: {first_line(error)}",
            hint=f"`map-bo run --help` lists the options of {group}"
            + ("; workers=4 is short for four processes" if group == "workers" else ""),
        ) from error


def _set(config: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"{key} cannot be {value!r}: {first_line(error)}",
            hint="see the options with `map-bo run --cfg job`",
        ) from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _before(config: DictConfig, key: str, choices: Mapping[str, Any]) -> Any:
    """Return the value that a key has; a value of no other where it has none."""
    if key in choices:
        return choices[key]
    if "/" in key or "@" in key:
        return _NONE
    try:
        return _plain(OmegaConf.select(config, key, default=_NONE))
    except OmegaConfBaseException:
        return _NONE


def _is_as_before(config: DictConfig, key: str, value: Any, choices: Mapping[str, Any]) -> bool:
    before = _before(config, key, choices)
    return before is not _NONE and bool(before == value)


def _refusal(config: DictConfig, key: str, value: Any, choices: Mapping[str, Any]) -> ConfigError:
    may = ", ".join([*sorted(_LOOP), *_changing_groups(), "progress"])
    roots = [field.name for field in fields(Config)]
    loop = [f"loop.{name}" for name in _IN_LOOP]
    root, _, rest = key.partition(".")
    missing = root not in roots if root != "loop" else rest.partition(".")[0] not in _IN_LOOP
    if missing and key not in choices and "/" not in key:
        known = [*roots, *loop]
        said = f"loop.{key}" if f"loop.{key}" in loop else None
        hint = f"did you mean {said}?" if said else did_you_mean(key, known)
        return ConfigError(f"there is no option {key!r}", hint=f"{hint}; a run may change {may}")
    before = _before(config, key, choices)
    was = "" if before is _NONE else f" (it is {_short(before)})"
    return ConfigError(
        f"{key} cannot become {_short(value)} on a run that has begun{was}",
        hint=f"what may change is {may}; start a new run for anything else",
    )


def _short(value: Any) -> str:
    return "null" if value is None else str(value)[:60]
