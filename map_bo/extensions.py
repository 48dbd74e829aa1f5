"""What other packages bring: classes that they register as entry points.

A package that has, in its ``pyproject.toml``,

.. code-block:: toml

    [project.entry-points."map_bo.samplers"]
    halton = "their_package.halton:Halton"

adds a sampler that configurations name as ``sampler=halton``, and that records and recipes may
name without further trust: whoever installed the package has trusted its code already.
Looking for entry points imports nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

__all__ = ["GROUPS", "installed", "is_registered", "origin"]

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "evaluator": "map_bo.evaluators",
        "operator": "map_bo.operators",
        "problem": "map_bo.problems",
        "sampler": "map_bo.samplers",
        "solver": "map_bo.solvers",
        "surrogate": "map_bo.surrogates",
        "tracking": "map_bo.trackers",
    }
)
"""Group of the configuration -> group of entry points."""


def installed() -> dict[str, dict[str, tuple[EntryPoint, ...]]]:
    """Return the entry points by group of the configuration and by name.

    A name with several is registered by several packages.
    """
    found: dict[str, dict[str, tuple[EntryPoint, ...]]] = {group: {} for group in GROUPS}
    points = entry_points()  # all groups at once: every package is looked at each time
    for group, theirs in GROUPS.items():
        for point in sorted(points.select(group=theirs), key=lambda point: point.name):
            same = found[group].get(point.name, ())
            if point.value not in [other.value for other in same]:  # a package may be found twice
                found[group][point.name] = (*same, point)
    return found


def origin(point: EntryPoint) -> str:
    """Return the package that an entry point is of, for messages."""
    return point.module.partition(".")[0] if point.dist is None else point.dist.name


def is_registered(module: str, qualname: str) -> bool:
    """Return whether an installed package registers this class.

    A class may be registered under another name than that of the module that defines it; only
    entry points of the same top-level package are loaded to find out.
    """
    package = module.partition(".")[0]
    candidates = [
        point
        for names in installed().values()
        for same in names.values()
        for point in same
        if point.module.partition(".")[0] == package
    ]
    if any((point.module, point.attr) == (module, qualname) for point in candidates):
        return True
    return any(_leads_to(point, module, qualname) for point in candidates)


def _leads_to(point: EntryPoint, module: str, qualname: str) -> bool:
    try:
        found = point.load()
    except Exception:  # one that is broken leads nowhere
        return False
    return isinstance(found, type) and (found.__module__, found.__qualname__) == (module, qualname)
