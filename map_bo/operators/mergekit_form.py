"""The form of a mergekit recipe: its models, its base and the parameters of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from map_bo.errors import ConfigError
from map_bo.operators.mergekit_settings import Entries, as_bool, entries

__all__ = ["Recipe", "content_of"]

_NEEDED = {"merge_method", "models"}
_READ = _NEEDED | {"base_model", "parameters"}
_PASSED_OVER = {"dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template"}


def content_of(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of a recipe: read from a file, or as given.

    Raises:
        ConfigError: When the file cannot be read or is no recipe.
    """
    if isinstance(config, Mapping):
        return config
    file = Path(config).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}", hint="give the path of a mergekit recipe"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} is no mergekit recipe", hint="it must say merge_method: ...")
    return content


class Recipe:
    """A configuration whose form was checked, and its parameters by name.

    Attributes:
        method: The merge method.
        base: Path or hub id of the base, where one is named.

    Raises:
        ConfigError: For parts that map_bo has nothing for: slices, modules, LoRA models, another
            tokenizer; and for what is no recipe.
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
            raise ConfigError("the recipe's models are no list", hint="write - model: PATH")
        self._own: dict[str, Mapping[str, Any]] = {}
        for model in models:
            if not isinstance(model, Mapping) or "model" not in model:
                raise ConfigError(f"{model!r} is no model of a recipe", hint="write - model: PATH")
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
        raise ConfigError(f"the parameters of {where} are no mapping", hint="write name: value")
    return given


def _source(reference: Any) -> str:
    """Return path or hub id of a model reference, with ``@revision`` where one is given."""
    lora = None
    if isinstance(reference, str):
        path, _, lora = reference.partition("+")
    else:
        inner = reference.get("model") if isinstance(reference, Mapping) else None
        if not isinstance(inner, Mapping) or "path" not in inner:
            raise ConfigError(f"{reference!r} is no model", hint="give a path or a hub id")
        lora = reference.get("lora")
        revision = inner.get("revision")
        path = str(inner["path"]) + (f"@{revision}" if revision else "")
    if lora:
        raise ConfigError(
            f"{path} has a LoRA adapter in the recipe", hint="merge the adapter into a model first"
        )
    return path
