"""JSON from files that are not trusted: no key twice, no numbers that JSON does not have."""

from __future__ import annotations

import json
from typing import Any, NoReturn

__all__ = ["strict_json"]


def strict_json(content: bytes) -> Any:
    """Return what UTF-8 JSON says.

    Raises:
        ValueError: For anything else, for an object with one key twice (of which Python would
            keep the last and another reader the first), for ``NaN`` and ``Infinity``, and for
            nesting or numbers too large to read.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {twice[:200]!r} twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
