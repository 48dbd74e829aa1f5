"""The form of a mergekit recipe: its models, its base and the parameters of each.

Parameters are numbers, or lists of filters on tensor names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from map_bo.errors import ConfigError, first_line
from map_bo.foreign import read_yaml

__all__ = ["Entries", "Recipe", "as_bool", "as_number", "blocks_of", "content_of", "entries"]

Entries = tuple[tuple[str | None, float], ...]
"""Filter (a part of tensor names; None takes all) and value; the first match counts."""

_NEEDED = {"merge_method", "models"}
_READ = _NEEDED | {"base_model", "parameters"}
_PASSED_OVER = {"dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"}


def as_number(name: str, value: Any) -> float:
    """Return the value of a parameter as a number.

    Raises:
        ConfigError: When it is none, or is a gradient over layers.
    """
    if isinstance(value, list):
        raise ConfigError(
            f"{name} is a gradient over layers: {value}",
            hint="give one value, or filters for groups of layers; with blocks each group of "
            "layers has coefficients of its own",
        )
    try:
        # YAML reads 1e-5, without a point, as text.
        number = float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be a number, got {value!r}", hint="give a finite number")
    return number


def as_bool(name: str, value: Any) -> bool:
    """Return the value of a parameter that is true or false.

    Raises:
        ConfigError: When it is neither.
    """
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    raise ConfigError(
        f"{name} must be true or false, got {value!r}", hint="give one for the whole merge"
    )


def entries(name: str, settings: Sequence[Any]) -> Entries:
    """Return the filters and values of a parameter.

    Args:
        name: The parameter, for messages.
        settings: What is given for it, the one that counts first; None is nothing.

    Raises:
        ConfigError: When nothing is given, or something that is neither a number nor filters.
    """
    found: list[tuple[str | None, float]] = []
    for setting in settings:
        if setting is None:
            continue
        conditional = isinstance(setting, Mapping) or (
            isinstance(setting, list) and any(isinstance(item, Mapping) for item in setting)
        )
        items = [setting] if isinstance(setting, Mapping) or not conditional else setting
        for item in items:
            text = None
            if conditional:
                if not isinstance(item, Mapping) or "value" not in item:
                    raise ConfigError(
                        f"{name} has the entry {item!r}", hint="write - filter: TEXT, value: NUMBER"
                    )
                text, item = item.get("filter"), item["value"]
            text = None if text in (None, "*") else str(text)
            value = as_number(name, item)
            # Where an earlier filter is a part of this one it takes all that this would.
            if not any(earlier is not None and earlier in (text or "") for earlier, _ in found):
                found.append((text, value))
            if text is None:
                return tuple(found)
    if not found:
        raise ConfigError(f"the recipe gives no {name}", hint=f"set {name} under parameters:")
    return tuple(found)


def blocks_of(columns: Sequence[Entries]) -> tuple[dict[str, str] | None, list[list[float]]]:
    """Return blocks of tensors that have the same values, and the values of each column there.

    Args:
        columns: Parameters; those that have filters must have the same ones.

    Returns:
        Patterns by block as `Blocks` takes them, None where there are no filters; and a row of
        values, one for each column, by block.

    Raises:
        ConfigError: When the filters differ.
    """
    uneven = [column for column in columns if column[0][0] is not None]
    if not uneven:
        return None, [[column[0][1] for column in columns]]
    texts = [text for text, _ in uneven[0] if text is not None]
    if any([text for text, _ in column if text is not None] != texts for column in uneven):
        raise ConfigError(
            "filters differ between models or parameters",
            hint="give the same filters in the same order wherever there are some",
        )
    blocks = {text: _pattern(text, texts[:i]) for i, text in enumerate(texts)}
    rows = [[dict(column).get(text, column[-1][1]) for column in columns] for text in texts]
    if all(column[-1][0] is None for column in uneven):
        blocks["rest" if "rest" not in blocks else "all the rest"] = "*"
        rows.append([column[-1][1] for column in columns])
    return blocks, rows


def _pattern(text: str, earlier: Sequence[str]) -> str:
    if not earlier:
        return re.escape(text)
    others = "|".join(map(re.escape, earlier))
    return f"^(?!.*(?:{others})).*{re.escape(text)}"


def content_of(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a recipe: read from a file, or as given.

    Raises:
        ConfigError: When the file cannot be read or is not a recipe.
    """
    if isinstance(config, Mapping):
        return config
    file = Path(os.path.expanduser(config))  # unlike pathlib's, no error for any name
    try:
        content = read_yaml(file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}", hint="give the path of a mergekit recipe"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{file} is not YAML: {first_line(error)}", hint="give the path of a mergekit recipe"
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} is not a mergekit recipe", hint="it must say merge_method: ...")
    return content


class Recipe:
    """A configuration whose form was checked, and its parameters by name.

    Attributes:
        method: The merge method.
        base: Path or hub id of the base, where one is named.

    Raises:
        ConfigError: For parts that map_bo has nothing for: slices, modules, LoRA models, another
            tokenizer; and for what is not a recipe.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        for part in ("slices", "modules"):
            if content.get(part):
                raise ConfigError(
                    f"the recipe has {part}, and map_bo merges whole models",
                    hint="list whole models under models:, with filters for parts of them",
                )
        unknown = set(content) - _READ - _PASSED_OVER
        missing = _NEEDED - set(content)
        if unknown or missing:
            what = f"lacks {', '.join(sorted(missing))}" if missing else ""
            more = f"has the unknown {', '.join(map(str, sorted(unknown, key=str)))}"
            raise ConfigError(
                f"the recipe {what or more}", hint="give one mergekit configuration, not several"
            )
        _check_tokenizer(content)
        self.method = str(content["merge_method"])
        self._shared = _parameters(content.get("parameters"), "the recipe")
        self.base = None if content.get("base_model") is None else _source(content["base_model"])
        models = content["models"]
        if not isinstance(models, Sequence) or not models or isinstance(models, str):
            raise ConfigError("the recipe's models are not a list", hint="write - model: PATH")
        self._own: dict[str, Mapping[str, Any]] = {}
        for model in models:
            if not isinstance(model, Mapping) or "model" not in model:
                raise ConfigError(
                    f"{model!r} is not a model of a recipe", hint="write - model: PATH"
                )
            source = _source(model["model"])
            if source in self._own:
                raise ConfigError(f"the recipe lists {source} twice", hint="list it once")
            self._own[source] = _parameters(model.get("parameters"), source)

    @property
    def models(self) -> list[str]:
        """All models, the base too where it is listed."""
        return list(self._own)

    def others(self) -> list[str]:
        """Return the models other than the base.

        Raises:
            ConfigError: When there are none.
        """
        found = [source for source in self._own if source != self.base]
        if not found:
            raise ConfigError("the recipe has no models but the base", hint="list the experts")
        return found

    def required_base(self) -> str:
        """Return the base.

        Raises:
            ConfigError: When there is none.
        """
        if self.base is None:
            raise ConfigError(f"{self.method} needs a base_model", hint="name it in the recipe")
        return self.base

    def own(self, name: str, sources: Sequence[str], default: float | None = None) -> list[Entries]:
        """Return a parameter of each model; without a default it must be given."""
        return [
            entries(name, [self._own.get(s, {}).get(name), self._shared.get(name), default])
            for s in sources
        ]

    def shared(self, name: str, default: float | None = None) -> Entries:
        """Return a parameter of the whole merge."""
        return entries(name, [self._shared.get(name), default])

    def number(self, name: str, default: float, sources: Sequence[str] = ()) -> float:
        """Return a parameter that must be one number for all tensors and models."""
        columns = self.own(name, sources, default) if sources else [self.shared(name, default)]
        values = {value for column in columns for _, value in column}
        if len(values) > 1:
            raise ConfigError(
                f"{name} is not one number for all models and tensors",
                hint="map_bo takes one; it can be searched",
            )
        return values.pop()

    def flag(self, name: str, default: bool) -> bool:
        """Return a parameter that is true or false."""
        value = self._shared.get(name)
        return default if value is None else as_bool(name, value)


def _check_tokenizer(content: Mapping[str, Any]) -> None:
    tokenizer = content.get("tokenizer")
    plain = tokenizer is None or (
        isinstance(tokenizer, Mapping) and dict(tokenizer) == {"source": "base"}
    )
    if content.get("tokenizer_source") not in (None, "base") or not plain:
        raise ConfigError(
            "the recipe builds another tokenizer, and map_bo keeps the base's",
            hint="set tokenizer_source to base, or leave it out",
        )


def _parameters(given: Any, where: str) -> Mapping[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"the parameters of {where} are not a mapping", hint="write name: value")
    return given


def _source(reference: Any) -> str:
    """Return path or hub id of a model reference, with ``@revision`` where one is given."""
    lora = None
    if isinstance(reference, str):
        path, _, lora = reference.partition("+")
    else:
        inner = reference.get("model") if isinstance(reference, Mapping) else None
        if not isinstance(inner, Mapping) or "path" not in inner:
            raise ConfigError(f"{reference!r} is not a model", hint="give a path or a hub id")
        lora = reference.get("lora")
        revision = inner.get("revision")
        path = str(inner["path"]) + (f"@{revision}" if revision else "")
    if lora:
        raise ConfigError(
            f"{path} has a LoRA adapter in the recipe", hint="merge the adapter into a model first"
        )
    return path
