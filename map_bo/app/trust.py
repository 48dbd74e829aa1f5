"""What a recorded configuration would run, and whether the user trusts it.

A run directory may come from somebody else, and its record names classes and functions. Without a
word of the user only parts of map_bo, and what installed packages register as entry points
(:mod:`map_bo.extensions`), are built from it; neither is the recorded working directory entered,
nor are its modules found. ``--trust PACKAGE`` lets the record name the code of a package, and
``--trust`` alone all that it names. See ``docs/security.md``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from map_bo.app.build import working_directory
from map_bo.errors import ConfigError, first_line, listed
from map_bo.evaluators.kinds import code_in
from map_bo.extensions import installed, is_registered
from map_bo.moved import with_current_targets
from map_bo.plain import EVERYTHING, Trust, is_settings_class, trusted

__all__ = ["Foreign", "foreign_code", "recorded_configuration", "trust_words"]

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FUNCTION = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_IMPORTED = "map_bo.problems.merged.imported.imported_problem"
_HF = "map_bo.problems.merged.hf.hf_problem"
_PARTS = frozenset(  # of map_bo that configurations build besides settings: problems and trackers
    {
        _HF,
        _IMPORTED,
        "map_bo.loop.mirrors.Local",
        "map_bo.problems.told.told_problem",
        "map_bo.problems.zoo.decoder.decoder_problem",
        "map_bo.problems.zoo.digits.digits_problem",
        "map_bo.problems.zoo.images.images_problem",
        "map_bo.problems.zoo.text.text_problem",
        "map_bo.tracking.wandb.mirror.Wandb",
    }
)
_GETTERS = frozenset(
    f"hydra.utils.get_{what}" for what in ("class", "method", "object", "static_method")
)
_CODE = frozenset({"model", "recalibration", "evaluators"})  # of an imported problem
_DATA = frozenset(  # of an imported problem: text that names no code, whatever it looks like
    {"base", "experts", "cache_dir", "metrics", "dtype", "device", "max_memory", "vocabulary"}
)
_OPTIONS = frozenset({"_target_", "_convert_", "_recursive_"})
_PATHS = ("base", "cache_dir", "root", "experts", "statistics")  # what may be relative paths
# ... where they are text
_PATHS_OF_TASKS = ("data", "train", "path", "tokenizer", "processor", "head", "include_path")
_OF_HARNESS = ("include_path", "unsafe_code")  # tasks in a folder may name functions there
_DEEPEST = 50


@dataclass(frozen=True)
class Foreign:
    """Code of others that a configuration names.

    Attributes:
        where: Key of the configuration.
        named: What it names.
        package: The package, or the module of a single file, whose code it is; empty where no
            package can be trusted for it.
    """

    where: str
    named: str
    package: str


def foreign_code(tree: Any, parts: Collection[str] | None = None) -> list[Foreign]:
    """Return what a configuration would run besides parts of map_bo and registered classes.

    Nothing that is found is imported or called.

    Args:
        tree: A resolved configuration, with the names of today.
        parts: Its groups to look at; all of them by default.

    Raises:
        ConfigError: When it is nested too deeply.
    """
    found: list[Foreign] = []
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if parts is None or key in parts:
            found += _below(value, str(key), "", _DEEPEST)
    return found


def _below(value: Any, where: str, rule: str, left: int) -> Iterator[Foreign]:
    """Yield what a value names.

    Args:
        value: The value.
        where: Its key.
        rule: What its text may name: ``"code"``, where all text does, ``"maybe"``, where text of
            the form module:name may, or nothing.
        left: How many levels may follow.
    """
    if not left:
        raise ConfigError(
            f"the recorded configuration is nested too deeply at {where[:80]}",
            hint="map_bo records none such; the record was not written by it",
        )
    if isinstance(value, str):
        yield from _in_text(value, where, rule)
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _below(part, f"{where}[{i}]", rule, left - 1)
    elif isinstance(value, Mapping):
        yield from _in_mapping(value, where, rule, left)


def _in_text(text: str, where: str, rule: str) -> Iterator[Foreign]:
    if "${" in text:  # such as ${oc.env:NAME}; a record is resolved and has none
        yield Foreign(where, text[:80], "")
    elif rule == "code" or (rule == "maybe" and _FUNCTION.fullmatch(text)):
        if rule == "code" and text in installed()["evaluator"] and ".evaluators" in where:
            return
        yield Foreign(where, text[:80], _package(text))


def _in_mapping(node: Mapping[Any, Any], where: str, rule: str, left: int) -> Iterator[Foreign]:
    target = node.get("_target_")
    if target is not None:
        yield from _of_target(target, node, f"{where}._target_")
    target = target if isinstance(target, str) else None
    for key, value in node.items():
        name, here = str(key), f"{where}.{key}"
        if target and name.startswith("_") and name.endswith("_") and name not in _OPTIONS:
            yield Foreign(here, f"the option {name} of Hydra", "")
        if name == "trust_remote_code" and value not in (False, None):
            yield Foreign(here, "code in the folder of a model", "")
        if name in _OF_HARNESS and value not in (False, None):
            yield Foreign(here, "code of tasks of the evaluation harness", "")
        if "${" in name:
            yield Foreign(here[:200], name[:80], "")
        if name != "_target_" and not (target in _GETTERS and name == "path"):
            yield from _below(value, here, _rule(target, name, rule), left - 1)
            if target == _HF and name == "tasks" and isinstance(value, Mapping):
                for task, settings in value.items():
                    for place, text in code_in(f"{here}.{task}", settings):
                        yield Foreign(place[:200], text[:80], _package(text))


def _rule(target: Any, key: str, above: str) -> str:
    """Return what the text below a key may name."""
    if target is None:
        return above
    if target == _HF and key == "tasks":
        return ""  # what their kinds would import is found by the kinds
    if target in (_IMPORTED, _HF):
        return "code" if key in _CODE else "" if key in _DATA or key == "operator" else "maybe"
    if key == "factory" and str(target).startswith("map_bo.workers."):
        return "code"
    return "" if str(target).startswith("map_bo.") else "maybe"


def _of_target(target: object, node: Mapping[Any, Any], where: str) -> Iterator[Foreign]:
    if isinstance(target, str) and target in _GETTERS:
        target, where = node.get("path"), f"{where.removesuffix('._target_')}.path"
        if not _is_known(target, settings=False):
            yield Foreign(where, str(target)[:80], _package(target))
    elif not _is_known(target, settings=True):
        yield Foreign(where, str(target)[:80], _package(target))


def _is_known(name: Any, *, settings: bool) -> bool:
    """Return whether a dotted name is a part of map_bo, or registered by an installed package."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return False
    if name.partition(".")[0] == "map_bo":
        return settings and (name in _PARTS or is_settings_class(":".join(_split(name))))
    words = name.split(".")
    return any(
        is_registered(".".join(words[:i]), ".".join(words[i:])) for i in range(1, len(words))
    )


def _split(name: str) -> tuple[str, str]:
    module, _, qualname = name.rpartition(".")
    return module, qualname


def _package(named: Any) -> str:
    module = str(named).partition(":")[0]
    return module.partition(".")[0] if _NAME.fullmatch(module) else ""


def trust_words(config: Mapping[str, Any] | None, *, parts: Collection[str] | None = None) -> str:
    """Return the options with which the commands for a run are trusted, such as `` --trust mine``.

    Args:
        config: What is recorded as the run's configuration.
        parts: Its groups that the command builds; all of them by default.
    """
    tree = with_current_targets((config or {}).get("tree"))
    packages = dict.fromkeys(found.package for found in foreign_code(tree, parts))
    if "" in packages:
        return " --trust"
    return "".join(f" --trust {package}" for package in packages)


@contextmanager
def recorded_configuration(
    run: str,
    config: Mapping[str, Any] | None,
    *,
    trust: Trust = (),
    parts: Collection[str] | None = None,
) -> Iterator[DictConfig]:
    """Return the configuration of a run for building from it, where the user trusts all it names.

    When it names code of others, the working directory of the run is entered for the block and
    searched for that code; otherwise relative paths lead there and nothing else does.

    Args:
        run: The run's directory.
        config: What is recorded as its configuration.
        trust: Packages whose code may be run; True for all.
        parts: Groups that are built; all of them by default.

    Raises:
        ConfigError: When there is no configuration, or it names code that is not trusted.
    """
    tree = config.get("tree") if isinstance(config, Mapping) else None
    if not isinstance(tree, Mapping) or config is None:
        raise ConfigError(
            f"the run in {run} was not started by `map-bo run`, so its record does not say how to "
            "build its problem",
            hint="continue in Python: map_bo.optimize(problem, ..., run_dir=...) with the same "
            "problem and settings, then result.choose(...).export(...)",
        )
    tree = with_current_targets(tree)
    cwd = config.get("cwd")
    folder = Path(cwd) if isinstance(cwd, str) and os.path.isdir(cwd) else None
    foreign = foreign_code(tree, parts)
    _refuse_untrusted(run, foreign, trusted(trust), folder)
    if not foreign:
        yield _configuration(_located(tree, folder), run)
        return
    before, where = list(sys.path), folder or Path.cwd()
    if trusted(trust) == {EVERYTHING}:
        sys.path.insert(0, str(where))
    elif any(_is_missing(one.package) for one in foreign):
        sys.path.append(str(where))
    try:
        with working_directory(where):
            yield _configuration(tree, run)
    finally:
        sys.path[:] = before


def _refuse_untrusted(
    run: str, foreign: Sequence[Foreign], trust: frozenset[str], folder: Path | None
) -> None:
    lacking = [one for one in foreign if not trust & {EVERYTHING, one.package or EVERYTHING}]
    if not lacking:
        return
    packages = sorted({one.package for one in lacking})
    words = " ".join(f"--trust {package}" for package in packages) if all(packages) else "--trust"
    named = listed((f"{one.where} names {one.named}" for one in lacking), most=3)
    raise ConfigError(
        f"the record of {run} names code that is not part of map_bo, and it was not run: {named}",
        hint=f"a record may come from somebody else; if you trust this code, which is looked for "
        f"among the installed packages and in {folder or Path.cwd()}, repeat the command with "
        f"{words}",
    )


def _is_missing(package: str) -> bool:
    try:
        return not package or find_spec(package) is None
    except (ImportError, ValueError):
        return True


def _configuration(tree: Mapping[str, Any], run: str) -> DictConfig:
    try:
        return OmegaConf.create(dict(tree))
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the recorded configuration of {run} cannot be read: {first_line(error)}",
            hint="restore the record from a copy if it was edited by hand",
        ) from error


def _located(tree: Mapping[str, Any], folder: Path | None) -> Mapping[str, Any]:
    """Return a configuration whose relative paths lead to where the run was started."""
    if folder is None or folder == Path.cwd():
        return tree

    def there(value: str) -> str:
        path = folder / value
        return str(path) if value and os.path.lexists(path) else value

    def located(value: Any, inside: bool) -> Any:
        if isinstance(value, Mapping):
            return {
                key: of_task(part) if key == "tasks" else located(part, inside or key in _PATHS)
                for key, part in value.items()
            }
        if inside and isinstance(value, str) and not os.path.isabs(value):
            return there(value)
        return value

    def of_task(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: there(part)
            if key in _PATHS_OF_TASKS and isinstance(part, str) and not os.path.isabs(part)
            else of_task(part)
            for key, part in value.items()
        }

    found = located({key: tree[key] for key in ("problem", "operator") if key in tree}, False)
    start = tree.get("start_from")
    if isinstance(start, Mapping):
        source = located({"experts": start.get("source")}, False)["experts"]
        start = {**start, **({"source": source} if "source" in start else {})}
    else:
        start = located({"experts": start}, False)["experts"]
    return {**tree, **found, **({"start_from": start} if "start_from" in tree else {})}
