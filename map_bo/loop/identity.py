"""Whether a record belongs to the run that wants to go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from map_bo.errors import AnotherRunError

__all__ = ["difference", "refuse_another"]


def difference(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Return in words the first way in which a record differs from ``identity``, or None.

    Files may have moved, but their digests must be the same.
    """
    before = _flat({part: recorded.get(part) for part in identity})
    now = _flat(identity)
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not different:
        return None
    key = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{key} was {before.get(key)!r} and is {now.get(key)!r}{more}"


def refuse_another(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Compare what a run recorded of itself with what it would record now.

    Raises:
        AnotherRunError: When they differ; the message names the first difference.
    """
    found = difference(recorded, identity)
    if found is not None:
        raise AnotherRunError(
            f"the run directory belongs to another run: {found}",
            hint="use another run directory, or the settings that the run was started with",
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif key != "source":  # files may move; their digests tell whether they are the same
            flat[f"{prefix}{key}"] = value
    return flat
