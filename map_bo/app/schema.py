"""The typed part of the configuration, which the YAML files under ``conf/`` must fit.

Importing this is cheap: no tensor library is loaded for ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop

__all__ = ["Config", "LoopConfig", "StopConfig", "register"]

_MANDATORY = "???"
_ELSEWHERE = (
    "seed",
    "sampler",
    "surrogate",
    "solver",
    "workers",
)  # of the settings: not below ``loop``


_START_FROM: Mapping[str, Any] = {
    "source": None,
    "experts": None,
    "metrics": None,
    "values": None,
    "trust_data": False,
    "skip": False,
}  # the fields of map_bo.loop.transfer.study.StartFrom, which is not loaded for --help


def _mirror(name: str, of: type, *, without: tuple[str, ...] = (), **changes: Any) -> Any:
    """Return a dataclass with the fields and defaults of settings, in types that Hydra knows.

    Args:
        name: Its name.
        of: The settings.
        without: Fields to leave out.
        **changes: Type and default of fields that a configuration says in another way.
    """
    content = []
    for one in fields(of):
        if one.name in without:
            continue
        if one.name in changes:
            content.append((one.name, *changes[one.name]))
            continue
        # Of this field alone: the types of others are not there before the parts are loaded.
        told = {"__annotations__": {one.name: one.type}, "__module__": of.__module__}
        hint = _known(get_type_hints(type(name, (), told))[one.name])
        default = _MANDATORY if one.default is MISSING else one.default
        content.append((one.name, hint, field(default=default)))
    return make_dataclass(name, content, namespace={"__module__": __name__})


def _known(hint: Any) -> Any:
    """Return a type as Hydra knows it."""
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_known(part) for part in get_args(hint))]  # noqa: UP007
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is Mapping:
        return Any  # a mapping in place of a typed one that is null ends in an error of OmegaConf
    return hint


if TYPE_CHECKING:
    StopConfig: TypeAlias = Any
    LoopConfig: TypeAlias = Any
else:
    # No criterion is no rule, so that the other settings of a rule can be given before it.
    StopConfig = _mirror("StopConfig", Stop, criterion=(str | None, field(default=None)))
    LoopConfig = _mirror(
        "LoopConfig",
        Settings,
        without=_ELSEWHERE,
        stop=(StopConfig | None, field(default_factory=StopConfig)),
        constraints=(Any, field(default=None)),
        items=(Any, field(default="full")),
    )


@dataclass
class Config:
    """The whole configuration; groups with a ``_target_`` stay free-form."""

    seed: int = Settings.seed
    progress: bool = True
    drive: bool = True
    start_from: Any = field(default_factory=lambda: dict(_START_FROM))
    loop: LoopConfig = field(default_factory=LoopConfig)
    problem: dict[str, Any] = field(default_factory=dict)
    operator: dict[str, Any] = field(default_factory=dict)
    surrogate: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    nested: dict[str, Any] = field(default_factory=dict)
    workers: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Make the schema known to Hydra as ``base_config``, and what installed packages bring."""
    from hydra.core.config_store import ConfigStore

    from map_bo.app.installed import register_installed

    register_installed()
    ConfigStore.instance().store(name="base_config", node=Config)
