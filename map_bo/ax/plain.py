"""Settings such as samplers as plain data, and back without running anything but this package."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from map_bo.errors import SamplerError

__all__ = ["from_plain", "to_plain"]

_PACKAGE = "map_bo."


def to_plain(value: Any) -> Any:
    """Return data classes of this package, and plain values in them, as JSON data.

    Raises:
        SamplerError: When it is, or holds, something else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [to_plain(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [to_plain(part) for part in value]}
    if isinstance(value, Mapping):
        return {"mapping": [[str(key), to_plain(part)] for key, part in value.items()]}
    kind = type(value)
    if not dataclasses.is_dataclass(value) or not kind.__module__.startswith(_PACKAGE):
        raise SamplerError(
            f"{kind.__module__}.{kind.__qualname__} cannot be stored in an Ax database",
            hint="use a sampler and a surrogate of map_bo, or a client without a database",
        )
    fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(kind) if f.init}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}


def from_plain(data: Any) -> Any:
    """Return what :func:`to_plain` wrote.

    Raises:
        SamplerError: When it names something else than a data class of this package.
    """
    if isinstance(data, list):
        return [from_plain(part) for part in data]
    if not isinstance(data, Mapping):
        return data
    if "tuple" in data:
        return tuple(from_plain(part) for part in data["tuple"])
    if "mapping" in data:
        return {key: from_plain(part) for key, part in data["mapping"]}
    try:
        module, _, name = str(data["class"]).partition(":")
        if not module.startswith(_PACKAGE):
            raise ValueError("it is not a class of map_bo")
        kind = getattr(sys.modules.get(module) or import_module(module), name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ValueError("it is not a dataclass")
        return kind(**{key: from_plain(part) for key, part in data["fields"].items()})
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise SamplerError(
            f"the stored settings {data.get('class')!r} cannot be built: {error}",
            hint="read them with the version of map_bo that stored them",
        ) from error
