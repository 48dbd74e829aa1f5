"""Regular expressions from files of others: refused where matching them could take for ever.

Python's engine goes back over every choice that it made. So an expression of a few letters, such
as ``(a+)+b``, takes time that doubles with every letter of a name that it does not match. How many
ways there are to go is counted before anything is matched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

__all__ = ["ending_pattern", "require_quick"]

_MOST_STEPS = 1e9  # some ten seconds
_MOST_PATTERNS = 10_000
_LONGEST = 1_000  # characters of an expression
_PARTS = re.compile(
    r"(?P<repeat>(?:[*+?]|\{\d*,?\d*\})[?+]?)|(?P<open>\((?:\?(?::|=|!|<=|<!|>|P<\w+>)|(?!\?)))"
    r"|(?P<close>\))|(?P<either>\|)|(?P<back>\(\?|\\[1-9])"
    r"|(?P<one>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)",
    re.DOTALL,
)


@lru_cache(maxsize=_MOST_PATTERNS)
def ending_pattern(text: str) -> re.Pattern[str]:
    """Return the expression of names whose end ``text`` matches, from a dot on, as peft has it.

    Raises:
        re.error: When it is no regular expression.
    """
    return re.compile(rf"(.*\.)?({text})$")


def require_quick(patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse expressions with which comparing all names could take more than some seconds.

    Args:
        patterns: Regular expressions, for `ending_pattern`.
        names: What they are compared with.

    Raises:
        ValueError: When there are too many, or one repeats what holds repetitions or alternatives,
            refers back, or leaves too many choices; the message names it.
    """
    given, lengths = list(patterns), [len(name) for name in names]
    if len(given) > _MOST_PATTERNS:
        raise ValueError(f"{len(given)} expressions, and {_MOST_PATTERNS} are the most")
    steps = 0.0
    for text in given:
        if len(text) > _LONGEST:
            raise ValueError(f"an expression of {len(text)} characters, {text[:40]!r}...")
        choices, repeats = _count(text)
        # One more of each for what stands before the end.
        ways = 2 * choices / math.factorial(repeats + 1)
        steps += sum(ways * float(length) ** (repeats + 1) + len(text) for length in lengths)
        if steps > _MOST_STEPS:
            raise ValueError(f"{text!r} can be matched in too many ways")


@dataclass
class _Group:
    """What was seen of a group so far: factors of its ways, and its alternatives."""

    choices: float = 1.0
    repeats: int = 0
    plain: bool = True  # no group, repetition or choice inside
    alternatives: list[str] = field(default_factory=lambda: [""])

    def close(self) -> float:
        """Return in how many ways its alternatives can be chosen."""
        if len(self.alternatives) == 1:
            return self.choices
        # Of plain alternatives only those can both match of which one begins with the other.
        if self.plain and all(re.fullmatch(r"[\w-]*", each) for each in self.alternatives):
            both = max(
                sum(one.startswith(two) for two in self.alternatives) for one in self.alternatives
            )
            return self.choices * both
        return self.choices * len(self.alternatives)


def _count(text: str) -> tuple[float, int]:
    """Return the number of choices that an expression leaves, and of its unbounded repetitions.

    Raises:
        ValueError: When they multiply with the length of a name more than once.
    """
    stack = [_Group()]
    last: _Group | None = None  # the group that ends right before
    for part in _PARTS.finditer(text):
        kind, found = part.lastgroup, part.group()
        if kind == "back":
            raise ValueError(f"{text!r} refers back, or has flags of its own")
        if kind == "open":
            stack[-1].plain = False
            stack.append(_Group())
            last = None
        elif kind == "close" and len(stack) > 1:
            last = stack.pop()
            stack[-1].choices *= last.close()
            stack[-1].repeats += last.repeats
        elif kind == "repeat":
            stack[-1].plain = False
            if found[0] == "?":
                stack[-1].choices *= 2
                continue
            if last is not None and (last.repeats or last.choices > 1 or last.close() > 1):
                raise ValueError(f"{text!r} repeats what holds repetitions or alternatives")
            stack[-1].repeats += 1
            last = None
        elif kind == "either":
            stack[-1].alternatives.append("")
            last = None
        else:
            stack[-1].alternatives[-1] += found
            last = None
    if len(stack) > 1:
        return 1.0, 0  # no regular expression, which compiling it says
    return stack[0].close(), stack[0].repeats
