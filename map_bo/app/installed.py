"""Options of the configuration that installed packages bring; see :mod:`map_bo.extensions`.

They are found by Hydra as options of our groups: ``sampler=theirs`` takes them, and ``--help`` and
completion list them. Their packages are imported only when they are chosen.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from importlib import resources
from importlib.metadata import EntryPoint
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, OmegaConf

from map_bo.errors import ConfigError, first_line
from map_bo.extensions import installed, origin

__all__ = ["Installed", "hidden", "register_installed"]

_SCHEME = "installed"
_PLAIN = (bool, int, float, str)
_HANDED_ON = ("operator", "progress")  # what problems take from the rest of the configuration


class Installed(ConfigSource):
    """The entry points of installed packages as a source of Hydra's configurations."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self._groups = {group: names for group, names in installed().items() if names}

    @staticmethod
    def scheme() -> str:
        """Return ``"installed"``."""
        return _SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        """Import what an option names and return its configuration.

        Raises:
            ConfigError: When it cannot be imported, or two packages have the same name for it.
        """
        group, name = self._split(config_path)
        points = self._groups[group][name]
        if len(points) > 1:
            packages = " and ".join(origin(point) for point in points)
            raise ConfigError(
                f"{group}={name} is registered by {packages}",
                hint=f"name the class itself: {group}._target_=PACKAGE.MODULE.CLASS",
            )
        return ConfigResult(
            provider=origin(points[0]),
            path=f"{_SCHEME}://{points[0].value}",
            config=OmegaConf.create(dict(_node(group, points[0]))),
            header={"package": None},
        )

    def available(self) -> bool:
        """Return True."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Return whether an installed package brings options of this group."""
        return config_path.strip("/") in ("", *self._groups)

    def is_config(self, config_path: str) -> bool:
        """Return whether an installed package brings this option."""
        group, name = self._split(config_path)
        return name in self._groups.get(group, {})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the groups, or the options of one."""
        group = config_path.strip("/")
        if group == "":
            return [] if results_filter == ObjectType.CONFIG else sorted(self._groups)
        return [] if results_filter == ObjectType.GROUP else sorted(self._groups.get(group, {}))

    @staticmethod
    def _split(config_path: str) -> tuple[str, str]:
        group, _, name = config_path.strip("/").removesuffix(".yaml").rpartition("/")
        return group, name


class _SearchInstalled(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("installed", f"{_SCHEME}://")  # after our own, which come first


def register_installed() -> None:
    """Make the options of installed packages known to Hydra."""
    plugins = Plugins.instance()
    plugins.register(Installed)
    plugins.register(_SearchInstalled)


def hidden() -> list[str]:
    """Return a sentence for every option that has the name of one of ours, which is taken."""
    ours = resources.files("map_bo.conf")
    return [
        f"{group}={name} is map_bo's own; that of {', '.join(map(origin, points))} is "
        f"{group}._target_={points[0].value.replace(':', '.')}"
        for group, names in installed().items()
        for name, points in names.items()
        if (ours / group / f"{name}.yaml").is_file()
    ]


def _node(group: str, point: EntryPoint) -> Mapping[str, Any]:
    try:
        target = point.load()
    except Exception as error:  # whatever the import of another package raises
        raise ConfigError(
            f"{group}={point.name} of the package {origin(point)} cannot be imported: "
            f"{first_line(error)}",
            hint=f"repair or uninstall {origin(point)}; all other options work without it",
        ) from error
    if not callable(target):
        raise ConfigError(
            f"{group}={point.name} of the package {origin(point)} names {target!r:.60}",
            hint="an entry point names a class, or a function that returns an object",
        )
    dotted = point.value.replace(":", ".")
    if group == "evaluator" and not isinstance(target, type):  # it takes the model: not called yet
        return {"_target_": "hydra.utils.get_method", "path": dotted}
    node = {"_target_": dotted, **_defaults(target)}
    if group == "problem":
        given = inspect.signature(target).parameters
        node |= {name: f"${{{name}}}" for name in _HANDED_ON if name in given}
    return {point.name: node} if group == "tracking" else node


def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the settings that can be written in a configuration, with their defaults."""
    if isinstance(target, type) and dataclasses.is_dataclass(target):
        given = {f.name: _default(f) for f in dataclasses.fields(target) if f.init}
    else:
        given = {
            name: MISSING if parameter.default is parameter.empty else parameter.default
            for name, parameter in inspect.signature(target).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
    return {name: value for name, value in given.items() if _is_plain(value)}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is dataclasses.MISSING:
        return MISSING
    return field.default_factory() if field.default_factory in (dict, list, tuple) else object()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, _PLAIN)
