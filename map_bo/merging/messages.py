"""Wording shared by the errors of this package."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["first_line", "listed"]


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are, for an error."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind when it says nothing."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
