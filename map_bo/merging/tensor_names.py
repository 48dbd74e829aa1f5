"""Names of tensors: which are refused, because no program writes them in good faith."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from map_bo.errors import CheckpointError

__all__ = ["name_problem", "refuse_odd_names"]

_LONGEST = 1024
# Control characters, lone surrogates, and the separators of lines and paragraphs.
_REFUSED = {"Cc", "Cs", "Zl", "Zp"}


def name_problem(name: str) -> str | None:
    """Return what is wrong with a tensor's name, or None.

    Names go into messages, recipes, JSON and other programs' file names, so they must be text
    that is printed as it reads and leads to no other folder. Slashes within are allowed.
    """
    if not name:
        return "is empty"
    if len(name) > _LONGEST:
        return f"has {len(name)} characters"
    if not name.isascii() or not name.isprintable():
        for character in name:
            if unicodedata.category(character) in _REFUSED:
                return f"holds the character {character!a}"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return "reads as a path that leads elsewhere"
    return None


def refuse_odd_names(names: Iterable[str], source: str) -> None:
    """Refuse names that are empty, unprintable, overlong or parts of a path.

    Raises:
        CheckpointError: For the first such name.
    """
    for name in names:
        problem = name_problem(name)
        if problem is not None:
            shown = ascii(name) if len(name) <= 80 else ascii(name[:80]) + "..."
            raise CheckpointError(
                f"{source}: the tensor name {shown} {problem}",
                hint="a model's own names are short printable text; save the state dict again, "
                "and do not trust a file that came with such names",
            )
