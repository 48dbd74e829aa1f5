"""Evaluators by a word: the kinds that a configuration names, each built from plain data.

``{"kind": "text_classification", "data": {"path": "sst2.csv"}}`` becomes the evaluator of that kind
with these settings. A kind is one of `KINDS`, what an installed package registers as an evaluator
(:mod:`map_bo.extensions`), or ``module:name``. Settings are plain data; where an evaluator takes a
function, ``module:function`` names it.

What is imported is exactly what `code_in` finds, so that a configuration of somebody else can be
judged before anything of it runs.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from map_bo.errors import ConfigError, MapBoError, did_you_mean, first_line
from map_bo.evaluators.evaluator import Evaluator
from map_bo.evaluators.metrics import scores_items
from map_bo.extensions import installed, origin

__all__ = [
    "KINDS",
    "code_in",
    "evaluator_from",
    "import_callable",
    "known_kinds",
    "main_setting",
    "refuse_all",
    "settings_of",
]

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "embeddings": "map_bo.evaluators.embeddings:Embeddings",
        "entropy": "map_bo.evaluators.entropy:Entropy",
        "generation": "map_bo.evaluators.generation:Generation",
        "images": "map_bo.evaluators.images.classification:ImageClassification",
        "items": "map_bo.evaluators.items:Items",
        "lm_eval": "map_bo.evaluators.lm_eval:LMEval",
        "perplexity": "map_bo.evaluators.perplexity:Perplexity",
        "regression": "map_bo.evaluators.text.regression:Regression",
        "text_classification": "map_bo.evaluators.text.classification:TextClassification",
        "text_pairs": "map_bo.evaluators.text.classification:TextPairs",
        "torch": "map_bo.evaluators.loaders.torch_loader:TorchLoader",
        "zero_shot": "map_bo.evaluators.images.zero_shot:ZeroShot",
    }
)
"""Kind -> ``module:Class`` of map_bo, imported when it is first asked for."""

_FUNCTION = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LIKELY_MISSED = "write it as module:function"


def known_kinds() -> list[str]:
    """Return the kinds of map_bo, and those that installed packages bring."""
    return sorted({*KINDS, *installed()["evaluator"]})


def settings_of(kind: str) -> list[str]:
    """Return the names of the settings that a kind of map_bo takes."""
    return list(inspect.signature(_of_map_bo(kind)).parameters)


def main_setting(kind: str) -> str | None:
    """Return the setting that a kind of map_bo is of no use without: its data, as a rule."""
    names = settings_of(kind)
    return "data" if "data" in names else _alone(_of_map_bo(kind))


def evaluator_from(
    key: str, settings: object, *, defaults: Mapping[str, Any] | None = None
) -> Evaluator:
    """Build an evaluator from plain data.

    Args:
        key: Key of the settings in the configuration, for errors, such as ``problem.tasks.sst2``.
        settings: ``{"kind": ..., setting: value, ...}``; text is a kind without settings, or
            ``module:function`` of a function that takes the model; what can be called stays as
            it is.
        defaults: Values of settings that were not given, for an evaluator that takes them.

    Raises:
        ConfigError: Naming the key of everything that is wrong.
    """
    if not isinstance(settings, Mapping | str) and callable(settings):
        return settings
    if isinstance(settings, str):
        settings = {"kind": settings}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{key} must be a mapping with a kind, got {settings!r:.80}",
            hint=f"give it as {{kind: KIND, data: ..., ...}}; {_kinds_there_are()}",
        )
    kind = settings.get("kind")
    if not isinstance(kind, str):
        said = "has no kind" if kind is None else f"has the kind {kind!r:.80}, which is not text"
        others = [one for one in settings if one != "kind"]
        near = [one for one in others if did_you_mean(one, ["kind"]).startswith("did")]
        hint = f"did you mean {key + '.kind'!r} by {near[0]!r}?" if near else _kinds_there_are()
        raise ConfigError(f"{key} {said}", hint=hint)
    target = _target(kind, key)
    code = {
        path: import_callable(text, path)
        for path, text in code_in(key, settings)
        if path != f"{key}.kind"
    }
    given = {str(name): value for name, value in settings.items() if name != "kind"}
    if not isinstance(target, type) and not given:
        made: object = target  # a function that takes the model
    else:
        made = _built(target, given, key, code, defaults or {})
    if not callable(made) and scores_items(made):
        from map_bo.evaluators.items import Items  # imported with what it needs, when asked for

        score: Any = made
        made = Items(score, batch_size=None)
    if isinstance(made, type) or not callable(made):
        raise ConfigError(
            f"{key}.kind {kind!r} makes a {type(made).__name__}, which cannot be called",
            hint="name a function that takes the model, or a class of such evaluators; a function "
            "of the model and indices of examples is {kind: items, score: module:function}",
        )
    return made


def code_in(key: str, settings: object) -> Iterator[tuple[str, str]]:
    """Yield what an evaluator's settings name to be imported, besides parts of map_bo.

    What installed packages register is left out. Nothing that is found is imported.

    Args:
        key: Key of the settings in the configuration.
        settings: As for `evaluator_from`.

    Yields:
        The key, and the text.
    """
    if isinstance(settings, str):
        settings = {"kind": settings}
    if not isinstance(settings, Mapping):
        return
    kind = settings.get("kind")
    known = isinstance(kind, str) and kind in KINDS
    if isinstance(kind, str) and not known and kind not in installed()["evaluator"]:
        yield f"{key}.kind", kind
    hints = _hints(_of_map_bo(str(kind))) if known else None
    for name, value in settings.items():
        if name == "kind":
            continue
        # Of a class of others the types are not known before it is imported.
        hint = Callable if hints is None else hints.get(str(name))
        yield from _code(f"{key}.{name}", value, hint, everywhere=hints is None)


def refuse_all(troubles: Sequence[MapBoError]) -> None:
    """Raise what is wrong in several places at once; nothing where nothing is.

    Raises:
        MapBoError: The trouble itself, or a `ConfigError` of all of them.
    """
    if len(troubles) == 1:
        raise troubles[0]
    if troubles:
        said = [one.message + (f" ({one.hint})" if one.hint else "") for one in troubles]
        raise ConfigError(
            f"{len(troubles)} parts of the configuration cannot be used:\n  - "
            + "\n  - ".join(said),
            hint="nothing was evaluated; correct them all and run again",
        )


def import_callable(where: str, key: str) -> Callable[..., Any]:
    """Import ``module:attribute``, looking in the working directory too.

    It is not called for what a file names, unless the user trusts the file.

    Raises:
        ConfigError: When there is no such thing, or it cannot be called.
    """
    module, separator, attribute = str(where).partition(":")
    if not separator or not module or not attribute:
        raise ConfigError(f"{key} must name a function, got {where!r}", hint=_LIKELY_MISSED)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key} {where!r} cannot be imported: {error}",
            hint="modules are looked for in the working directory and the installed packages",
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{key} must name a function, got a {type(found).__name__} ({where})",
            hint="name a function or a class",
        )
    return found  # type: ignore[no-any-return]


def _kinds_there_are() -> str:
    return f"kinds are {', '.join(known_kinds())}"


def _target(kind: str, key: str) -> Any:
    """Return the class, or the function, that a kind names."""
    if kind in KINDS:
        return _of_map_bo(kind)
    points = installed()["evaluator"].get(kind, ())
    if not points and ":" not in kind:
        raise ConfigError(
            f"{key}.kind {kind!r} is not known", hint=did_you_mean(kind, known_kinds())
        )
    if not points:
        return import_callable(kind, f"{key}.kind")
    if len(points) > 1:
        raise ConfigError(
            f"{key}.kind {kind!r} is registered by {' and '.join(map(origin, points))}",
            hint=_LIKELY_MISSED,
        )
    try:
        return points[0].load()
    except Exception as error:  # whatever the import of another package raises
        raise ConfigError(
            f"{key}.kind {kind!r} of the package {origin(points[0])} cannot be imported: "
            f"{first_line(error)}",
            hint=f"repair or uninstall {origin(points[0])}",
        ) from error


def _of_map_bo(kind: str) -> Any:
    module, _, name = KINDS[kind].partition(":")
    return getattr(import_module(module), name)


def _hints(target: Any) -> Mapping[str, Any]:
    """Return the types of a target's parameters; none where they cannot be told."""
    made_by: Any = vars(target).get("__init__", target) if isinstance(target, type) else target
    try:
        return get_type_hints(made_by)
    except Exception:  # of types that are only there for type checkers
        return {}


def _built(
    target: Any,
    given: Mapping[str, Any],
    key: str,
    code: Mapping[str, object],
    defaults: Mapping[str, Any],
) -> Any:
    """Call a class, or a function, with settings from plain data, and say all that is wrong."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    troubles: list[MapBoError] = []
    for name in given:
        if name not in parameters and not free:
            hint = did_you_mean(name, parameters, before=f"{key}.")
            troubles.append(ConfigError(f"{key} has no setting {name!r}", hint=hint))
    settings = {name: defaults[name] for name in parameters if name in defaults} | dict(given)
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty
        needed &= parameter.kind is not inspect.Parameter.VAR_KEYWORD
        if needed and name not in settings and not _is_meant(name, given, parameters):
            troubles.append(ConfigError(f"{key} lacks {name!r}", hint=f"give {key}.{name}"))
    hints, ready = _hints(target), {}
    for name, value in settings.items():
        try:
            ready[name] = _value(value, hints.get(name), f"{key}.{name}", code)
        except MapBoError as error:
            troubles.append(error)
    _refuse(troubles)
    try:
        return target(**ready)
    except MapBoError as error:
        raise type(error)(f"{key}: {error.message}", hint=error.hint) from error
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{key} cannot be built: {first_line(error)}", hint=f"check the values below {key}"
        ) from error


def _is_meant(name: str, given: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Return whether a setting that is lacking was given under a misspelt name."""
    wrong = [one for one in given if one not in parameters]
    return any(did_you_mean(one, parameters) == f"did you mean {name!r}?" for one in wrong)


def _refuse(troubles: Sequence[MapBoError]) -> None:
    if len(troubles) == 1:
        raise troubles[0]
    if troubles:
        raise ConfigError(
            "; ".join(one.message for one in troubles),
            hint="; ".join(one.hint for one in troubles if one.hint) or None,
        )


def _value(value: Any, hint: Any, key: str, code: Mapping[str, object]) -> Any:
    """Return plain data as a parameter of a type takes them."""
    options = _options(hint)
    if isinstance(value, str):
        if key in code and _takes_functions(options):
            return code[key]
        if _takes_functions(options) and not _takes_text(options):
            # Never imported: what `code_in` does not find was not judged.
            raise ConfigError(f"{key} must name a function, got {value!r}", hint=_LIKELY_MISSED)
    for kind in options:
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__.startswith("map_bo."):
            if isinstance(value, Mapping):
                named = {str(name): part for name, part in value.items()}
                return _built(kind, named, key, code, {})
            if isinstance(value, str | int | float) and (name := _alone(kind)) is not None:
                return _built(kind, {name: value}, key, code, {})
    if isinstance(value, Mapping):
        return {
            name: _value(part, _inner(options, Mapping), f"{key}.{name}", code)
            for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        inner = _inner(options, Sequence)
        return [_value(part, inner, f"{key}[{i}]", code) for i, part in enumerate(value)]
    return value


def _code(
    key: str, value: object, hint: Any, *, everywhere: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield the key and the text of what names a function below a value.

    Args:
        key: The value's key.
        value: Plain data.
        hint: The type of the parameter.
        everywhere: Whether any text of that form may be meant, because types are not known.
    """
    options = _options(hint)
    if isinstance(value, str):
        if _FUNCTION.fullmatch(value) and (everywhere or _takes_functions(options)):
            yield key, value
    elif isinstance(value, Mapping):
        ours = [kind for kind in options if isinstance(kind, type) and is_dataclass(kind)]
        fields: Mapping[str, Any] = _hints(ours[0]) if ours else {}
        inner = _inner(options, Mapping)
        for name, part in value.items():
            told = fields.get(str(name)) if ours else inner
            yield from _code(f"{key}.{name}", part, told, everywhere=everywhere)
    elif isinstance(value, list | tuple):
        inner = _inner(options, Sequence)
        for i, part in enumerate(value):
            yield from _code(f"{key}[{i}]", part, inner, everywhere=everywhere)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type is a union of."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for one in get_args(hint) for part in _options(one))
    return (hint,)


def _takes_functions(options: Sequence[Any]) -> bool:
    return any(one is Callable or get_origin(one) is _CALLABLE for one in options)


def _takes_text(options: Sequence[Any]) -> bool:
    return any(one in (str, Path, Any, object) for one in options) or any(
        get_args(one) and all(isinstance(word, str) for word in get_args(one)) for one in options
    )


_CALLABLE = get_origin(Callable[..., Any])


def _inner(options: Sequence[Any], kind: type) -> Any:
    """Return the type of what a collection among these types holds; None where it is unknown."""
    for one in options:
        outer = get_origin(one)
        if isinstance(outer, type) and issubclass(outer, kind) and outer is not str:
            parts = [part for part in get_args(one) if part is not ...]
            return parts[-1] if parts else None
    return None


def _alone(kind: type) -> str | None:
    """Return the only field that settings cannot do without, which text alone stands for."""
    parameters = inspect.signature(kind).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    return needed[0] if len(needed) == 1 else None
