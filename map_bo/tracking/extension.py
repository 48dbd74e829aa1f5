"""The event ``extended``: settings of a run that were changed after it had begun.

Its data:

``settings``  name of a setting -> ``from`` and ``to``, as plain data
``config``    key of the recorded configuration (with dots) -> ``from`` and ``to``
``reopens``   whether the search goes on where it had ended: the front and the summary are set
              back, and what was measured at points of that front counts as part of the search
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from map_bo.errors import StoreError

__all__ = ["check_extension", "with_extension"]


def check_extension(data: Mapping[str, Any]) -> None:
    """Refuse data that an event ``extended`` does not hold.

    Raises:
        StoreError: When a part is missing or of another type.
    """
    for part in ("settings", "config"):
        changes = data.get(part)
        if not isinstance(changes, Mapping) or not all(
            isinstance(change, Mapping) and {"from", "to"} <= set(change)
            for change in changes.values()
        ):
            raise StoreError(
                f"an extension of the run holds {part} = {str(changes)[:40]!r}, which are no "
                "changes",
                hint="see `map-bo check RUN`; if it was edited by hand, restore it from a copy",
            )
    if not isinstance(data.get("reopens"), bool):
        raise StoreError(
            f"an extension of the run holds reopens = {str(data.get('reopens'))[:40]!r}",
            hint="see `map-bo check RUN`; if it was edited by hand, restore it from a copy",
        )


def with_extension(created: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is recorded of a run's start with the settings that are in force afterwards.

    Args:
        created: The data of the event ``created``, with the extensions before this one.
        data: Those of the event ``extended``.

    Raises:
        StoreError: When they are of another form.
    """
    check_extension(data)
    changed = {name: change["to"] for name, change in data["settings"].items()}
    found = {**created, "settings": {**created.get("settings", {}), **changed}}
    config = created.get("config")
    tree = config.get("tree") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(tree, Mapping):
        return found
    loop = tree.get("loop")
    plain = {name: value for name, value in changed.items() if not isinstance(value, Mapping)}
    if isinstance(loop, Mapping):
        tree = {**tree, "loop": {**loop, **plain}}
    for key, change in data["config"].items():
        tree = _with_value(tree, key.split("."), change["to"])
    return {**found, "config": {**config, "tree": tree}}


def _with_value(tree: Any, way: list[str], value: Any) -> Any:
    if not way:
        return value
    before = tree if isinstance(tree, Mapping) else {}
    return {**before, way[0]: _with_value(before.get(way[0]), way[1:], value)}
