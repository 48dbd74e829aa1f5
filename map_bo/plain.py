"""Settings objects as plain data, and back: one form, and one list of what may be built from it.

Settings are dataclasses. As plain data, for recipes, records and databases, they are

``{"class": "module:qualname", "fields": {name: value, ...}}``

where values are settings again, None, booleans, numbers, text, lists (of tuples and lists alike;
they come back as tuples) and mappings with text as keys. What JSON and YAML have no word for is a
mapping with one of the keys of ``_TAGS``.

A file may come from somebody else, so building from it (:func:`from_plain`) imports and calls
nothing but dataclasses of three origins: settings of map_bo, those that installed packages register
as entry points (:mod:`map_bo.extensions`), and those of packages that the caller trusts by name.

Records of version 0.1 hold settings in other forms: the text of ``repr``, bare fields, fields with
a ``name`` or ``kind``, and the ``_target_`` of Hydra. :func:`from_plain` builds from the last;
:func:`modernise` turns any of them into today's form where today's settings are at hand.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from numbers import Integral, Real
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from map_bo.errors import MapBoError, SettingsError, did_you_mean, first_line
from map_bo.extensions import is_registered
from map_bo.moved import CLASSES, current, current_class, field_today

__all__ = [
    "EVERYTHING",
    "Described",
    "Trust",
    "flat",
    "from_name",
    "from_plain",
    "identity_of",
    "is_settings",
    "is_settings_class",
    "modernise",
    "name_of",
    "read_repr",
    "to_plain",
    "trusted",
]

Trust = bool | str | Collection[str]
"""What of a file's code is trusted: packages by name; True is all that the file names."""

EVERYTHING = "*"
"""Stands for every package where packages are trusted by name."""

_TAGS = frozenset(
    {"class", "fields", "mapping", "tuple", "path", "dtype", "tensor", "words", "_target_"}
    | {"$float"}  # of the record's own format, see map_bo.tracking.codec
)
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LARGEST = 64  # numbers of a tensor that an identity spells out; of a larger one it has a digest
_ROOMS = (  # of map_bo that hold settings: what else is a dataclass may write files when it is made
    "map_bo",  # the public names, which lead to the others
    "map_bo.choice",
    "map_bo.constraints",
    "map_bo.data",
    "map_bo.loop.settings",
    "map_bo.loop.stopping",
    "map_bo.merging.vectors.linear_merge",
    "map_bo.nested.settings",
    "map_bo.operators",
    "map_bo.pareto",
    "map_bo.problems.botorch_functions",
    "map_bo.problems.synthetic",
    "map_bo.samplers",
    "map_bo.space",
    "map_bo.surrogates",
    "map_bo.workers.dask",
    "map_bo.workers.processes",
    "map_bo.workers.ray",
)
_OPTIONS_OF_HYDRA = ("_convert_", "_recursive_")


@runtime_checkable
class Described(Protocol):
    """What says itself by which it is recognised, because its fields cannot.

    Such as statistics that are recognised by their content, wherever their file lies.
    """

    def describe(self) -> dict[str, Any]:
        """Return plain data that are the same for the same settings."""
        ...


def to_plain(value: Any) -> Any:
    """Return settings, or what may stand in their fields, as plain data.

    Raises:
        SettingsError: When it is, or holds, something that plain data cannot say.
    """
    return _plain(value, identity=False)


def identity_of(value: Any) -> Any:
    """Return plain data by which the same settings are recognised, in every process.

    They are those of :func:`to_plain` where there are any. What describes itself (see
    :class:`Described`) does so; anything else is put in words, and cannot be built again.
    """
    return _plain(value, identity=True)


def is_settings(data: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether plain data are those of a settings object."""
    return isinstance(data, Mapping) and "class" in data and "fields" in data


def name_of(data: Any) -> str:
    """Return the name of a settings' class, without its module; empty for other data.

    Args:
        data: Plain data, or the text of ``repr`` as in records of version 0.1.
    """
    if is_settings(data):
        return str(data["class"]).rpartition(":")[2]
    text = data.get("words", "") if isinstance(data, Mapping) else data
    return text.partition("(")[0].rpartition(".")[2] if isinstance(text, str) else ""


def trusted(trust: Trust) -> frozenset[str]:
    """Return the names of the packages that are trusted; ``{"*"}`` is every one."""
    if isinstance(trust, bool):
        return frozenset({EVERYTHING} if trust else ())
    names = frozenset({trust} if isinstance(trust, str) else trust)
    return frozenset({EVERYTHING}) if EVERYTHING in names else names


def from_plain(data: Any, *, trust: Trust = ()) -> Any:
    """Return what :func:`to_plain` wrote.

    Args:
        data: Plain data. A mapping with ``_target_``, as Hydra's configurations have, is read too.
        trust: Names of packages or modules whose dataclasses may be built too; True for all.

    Raises:
        SettingsError: When the data name something that is not known or not trusted, which is
            then neither imported nor called, or do not fit it.
        MapBoError: When the settings refuse their values.
    """
    try:
        return _built(data, trusted(trust))
    except RecursionError as error:
        raise SettingsError(
            "the settings are nested too deeply",
            hint="no settings of map_bo are; the file was not written by it",
        ) from error


def _plain(value: Any, *, identity: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(part, identity=identity) for part in value]
    if isinstance(value, Mapping):
        items = [(key, _plain(part, identity=identity)) for key, part in value.items()]
        if all(isinstance(key, str) and key not in _TAGS for key, _ in items):
            return dict(items)
        return {"mapping": [[_plain(key, identity=identity), part] for key, part in items]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor) and not (identity and value.numel() > _LARGEST):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    kind = type(value)
    if identity and isinstance(value, Described) and not isinstance(value, type):
        return value.describe()
    if is_dataclass(kind) and (_can_be_named(kind) or not identity):
        if not _can_be_named(kind):
            raise SettingsError(
                f"{kind.__module__}.{kind.__qualname__} cannot be written as plain data: it can "
                "only be imported where it was defined",
                hint="define it in a module, not in a script or a function",
            )
        content = {
            field.name: _plain(getattr(value, field.name), identity=identity)
            for field in fields(kind)
            if field.init
        }
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": content}
    if identity:
        return {"words": _in_words(value)}
    what = value.__name__ if isinstance(value, type) else kind.__name__
    raise SettingsError(
        f"{kind.__module__}.{what} cannot be written as plain data",
        hint="settings are dataclasses whose fields are numbers, text, None, lists, mappings, "
        "tensors or settings",
    )


def _can_be_named(kind: type) -> bool:
    return kind.__module__ != "__main__" and bool(_NAME.fullmatch(kind.__qualname__))


def _in_words(value: Any) -> str:
    """Return what tells a value from others and is the same in every process."""
    kind = type(value)
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        digest = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy().tobytes())
        return f"tensor{tuple(value.shape)} of {value.dtype}, sha256 {digest.hexdigest()}"
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if kind.__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
        return f"{kind.__module__}.{kind.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _built(data: Any, trust: frozenset[str]) -> Any:
    if isinstance(data, list | tuple):
        return tuple(_built(part, trust) for part in data)
    if not isinstance(data, Mapping):
        return data
    if "class" in data or "fields" in data:
        return _object(data.get("class"), data.get("fields"), trust)
    if "_target_" in data:
        name = current(str(data["_target_"]))
        given = {key: v for key, v in data.items() if key not in ("_target_", *_OPTIONS_OF_HYDRA)}
        return _object(":".join(name.rpartition(".")[::2]), given, trust)
    if len(data) <= 2 and not _TAGS.isdisjoint(data):
        return _tagged(data, trust)
    return {key: _built(part, trust) for key, part in data.items()}


def _tagged(data: Mapping[str, Any], trust: frozenset[str]) -> Any:
    try:
        match data:
            case {"mapping": pairs}:
                return {_built(key, trust): _built(part, trust) for key, part in pairs}
            case {"tuple": parts}:  # of databases of version 0.1
                return tuple(_built(part, trust) for part in parts)
            case {"path": str(path)}:
                return Path(path)
            case {"tensor": values, "dtype": name}:
                return torch.tensor(values, dtype=_dtype(name))
            case {"dtype": name}:
                return _dtype(name)
            case {"words": words}:
                raise SettingsError(
                    f"{words} was recorded in words alone and cannot be built from them",
                    hint="give it in Python, as when the run was started; settings that are "
                    "dataclasses in a module of their own are recorded in full",
                )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise SettingsError(
            f"a value of the settings cannot be read: {first_line(error)}",
            hint="the file was changed by hand, or was not written by map_bo",
        ) from error
    raise SettingsError(
        f"a value of the settings is {dict(data)!r:.200}, which map_bo does not write",
        hint="the file was changed by hand, or was written by a newer version",
    )


def _dtype(name: Any) -> torch.dtype:
    found = vars(torch).get(str(name))
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}")
    return found


def _object(name: Any, given: Any, trust: frozenset[str]) -> Any:
    kind = _class_named(name, trust)
    try:
        values = {str(key): _built(part, trust) for key, part in given.items()}
    except AttributeError as error:
        raise SettingsError(
            f"the fields of {name} are {given!r:.100}, not a mapping",
            hint="the file was changed by hand, or was not written by map_bo",
        ) from error
    known = [field.name for field in fields(kind) if field.init]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise SettingsError(
            f"{name} has no field {unknown[0]!r}",
            hint=did_you_mean(unknown[0], known)
            or "it was written by another version of its package",
        )
    try:
        return kind(**values)
    except MapBoError:
        raise
    except Exception as error:  # whatever the class of another package raises
        raise SettingsError(
            f"the settings {name} cannot be built: {first_line(error)}",
            hint="they were changed by hand, or written by another version of their package",
        ) from error


def _class_named(name: Any, trust: frozenset[str]) -> Any:
    """Return the dataclass that plain data name, if it may be built."""
    module, _, qualname = str(name).partition(":")
    module, qualname = current_class(module, qualname)
    if not (_NAME.fullmatch(module) and _NAME.fullmatch(qualname)):
        raise SettingsError(
            f"the settings {name!r} cannot be built: that is not the name of a class",
            hint="classes are named module:Name",
        )
    _refuse_untrusted(module, qualname, trust)
    try:
        found: Any = sys.modules.get(module) or import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the import of another package raises
        lacks = isinstance(error, AttributeError)
        what = f"{module} has no {qualname}" if lacks else first_line(error)
        raise SettingsError(
            f"the settings {name} cannot be built: {what}",
            hint="they were written by another version of map_bo"
            if _is_ours(module)
            else f"install the package, or make {module} importable from here",
        ) from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise SettingsError(
            f"the settings {name} cannot be built: it is not a dataclass",
            hint="nothing else is built from a file",
        )
    if found.__module__ != module:  # a module may hold what it only imported
        _refuse_untrusted(found.__module__, found.__qualname__, trust)
    built: Any = found
    if _is_ours(module) and not built.__dataclass_params__.frozen:  # settings are
        raise SettingsError(
            f"the settings {name} cannot be built: it does not hold settings",
            hint="the file was changed by hand, or was not written by map_bo",
        )
    return found


def is_settings_class(name: str) -> bool:
    """Return whether ``module:Name`` is a class that is built from files without further trust."""
    try:
        _class_named(name, frozenset())
    except SettingsError:
        return False
    return True


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "map_bo"


def _refuse_untrusted(module: str, qualname: str, trust: frozenset[str]) -> None:
    if _is_ours(module) and not any(
        module == room or (room != "map_bo" and module.startswith(f"{room}.")) for room in _ROOMS
    ):
        raise SettingsError(
            f"the settings {module}:{qualname} cannot be built: {module} has no settings",
            hint="the file was changed by hand, or was not written by map_bo",
        )
    above = module.split(".")
    named = any(".".join(above[: i + 1]) in trust for i in range(len(above)))
    given = named or EVERYTHING in trust
    if not (_is_ours(module) or given or is_registered(module, qualname)):
        package = above[0]
        raise SettingsError(
            f"the settings {module}:{qualname} cannot be built: {package} is not a package whose "
            "code is run on the word of a file",
            hint=f"if you trust it, add --trust {package} (in Python: trust=[{package!r}]); "
            "packages that register the class as an entry point need no such word",
        )


def from_name(data: Any) -> Any:
    """Return plain data in today's form where version 0.1 told the class by a name.

    Operators were told as ``{"name": "ties", "density": 0.2, ...}``. Data of another form, or of
    a name that no class of map_bo had, are returned as they are.
    """
    if not isinstance(data, Mapping) or is_settings(data) or str(data.get("name")) not in CLASSES:
        return data
    given = {key: value for key, value in data.items() if key != "name"}
    return {"class": CLASSES[str(data["name"])], "fields": to_plain(given)}


def modernise(recorded: Any, now: Any) -> Any:
    """Return what a record says of settings in today's form.

    Names that have moved are replaced, and fields that the record does not know have their
    defaults: so a record is equal to ``now`` exactly when it means the same.

    Args:
        recorded: Plain data of any version.
        now: Today's plain data of what it is to be compared with (:func:`identity_of`).
    """
    if is_settings(now):
        return _modern_settings(recorded, now)
    if isinstance(now, Mapping) and isinstance(recorded, Mapping):
        named = {field_today(key, now): part for key, part in recorded.items()}
        return {key: modernise(part, now.get(key)) for key, part in named.items()}
    if isinstance(now, list) and isinstance(recorded, list) and len(now) == len(recorded):
        return [modernise(a, b) for a, b in zip(recorded, now, strict=True)]
    if isinstance(now, Mapping) and "words" in now and isinstance(recorded, str):
        return {"words": recorded}
    return recorded


def _modern_settings(recorded: Any, now: Mapping[str, Any]) -> Any:
    told = read_repr(recorded) if isinstance(recorded, str) else recorded
    if not isinstance(told, Mapping):
        return recorded
    short = name_of(now)
    if is_settings(told):
        module, _, name = str(told["class"]).rpartition(":")
        home = module or str(now["class"]).partition(":")[0]
        same = ":".join(current_class(home, name)) == now["class"]
        given = told["fields"]
    elif told.keys() == {"type"}:  # problems that said nothing else of themselves
        return now if told["type"] == short else recorded
    else:
        key = next((key for key in ("kind", "name") if str(told.get(key)) in CLASSES), None)
        same = key is None or CLASSES[str(told[key])] == now["class"]
        given = {name: value for name, value in told.items() if name != key}
    if not (same and isinstance(given, Mapping)):
        return told
    today = now["fields"]
    # `repr` may name the first of them by place alone.
    given = {_name_today(name, today): value for name, value in given.items()}
    content = {name: modernise(value, today.get(name)) for name, value in given.items()}
    for name in today.keys() - content.keys():
        default = _default(str(now["class"]), name)
        if default is not MISSING:
            content[name] = identity_of(default)
    modern = {"class": now["class"], "fields": content}
    try:  # the class itself says what its fields mean together
        return identity_of(from_plain(modern))
    except (MapBoError, TypeError, ValueError, AttributeError):
        return modern  # its identity is not its fields, or holds what is only told in words


def _name_today(name: str | int, today: Mapping[str, Any]) -> str:
    """Return the name of a field that is given by its name or its place."""
    if isinstance(name, int) and name < len(today):
        return list(today)[name]
    return field_today(str(name), today)


def _default(name: str, field: str) -> Any:
    """Return the default of a field of a class that is in use already."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = None if found is None else vars(found).get(part)
    for one in fields(found) if is_dataclass(found) else ():
        if one.name == field:
            return one.default_factory() if one.default_factory is not MISSING else one.default
    return MISSING


def read_repr(text: str) -> Any:
    """Return what the ``repr`` of settings says, as plain data whose classes have no module.

    Nothing is run: only the form of the text is read. A text of another form is returned as it is.
    """
    text = re.sub(r"\bSeeded\((\d+) points, ", r"Seeded(\1, ", text)
    try:
        return _said(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def _said(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return [_said(part) for part in parts]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {_said(key): _said(value) for key, value in pairs if key is not None}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _said(operand)
            if isinstance(value, int | float):
                return -value
        case ast.Name(id="inf" | "nan" as number):
            return float(number)
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return {"dtype": name}
        case ast.Call(func=ast.Name(id="mappingproxy"), args=[inside], keywords=[]):
            return _said(inside)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            given: dict[Any, Any] = {i: _said(arg) for i, arg in enumerate(args)}
            given |= {keyword.arg: _said(keyword.value) for keyword in keywords}
            return {"class": name, "fields": given}
    raise ValueError("it is not the repr of settings")


def flat(data: Any, prefix: str, *, modules: bool = True) -> dict[str, Any]:
    """Return plain data as dotted names and values, for comparing them.

    Args:
        data: Plain data.
        prefix: Name of the whole.
        modules: Whether the values that are classes have their modules.
    """
    if is_settings(data):
        name = str(data["class"]) if modules else name_of(data)
        parts = {prefix: name}
        for key, value in data["fields"].items():
            parts |= flat(value, f"{prefix}.{key}", modules=modules)
        return parts
    if isinstance(data, Mapping) and data.keys() == {"words"}:
        return {prefix: data["words"]}
    if isinstance(data, Mapping) and data:
        parts = {}
        for key, value in data.items():
            parts |= flat(value, f"{prefix}.{key}", modules=modules)
        return parts
    return {prefix: data}
