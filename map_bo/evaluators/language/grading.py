"""Whether what a model wrote is right."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line
from map_bo.values import real_number, switch

__all__ = ["Grader", "Grading", "Which", "texts_of"]

Grader = Callable[[str, Any], float]
"""Takes an answer and what the data have as the target; returns a number in [0, 1]."""

Which = Literal["first", "last"]


@dataclass(frozen=True)
class Grading:
    """How the text that a model wrote becomes a score in [0, 1].

    Attributes:
        pattern: Regular expression (Python's syntax) that finds the answer in the text: its first
            group, or all of it where it has none. None takes the whole text.
        which: Which of its matches.
        pattern_seconds: Longest time that it may take on a text.
        ignore_case: Whether upper and lower case are the same.
        ignore_punctuation: Whether punctuation is left out.
        grader: Says how right an answer is; None compares it with the target.

    Raises:
        ConfigError: For a setting that is not possible.
    """

    pattern: str | None = None
    which: Which = "first"
    pattern_seconds: float = 1.0
    ignore_case: bool = False
    ignore_punctuation: bool = False
    grader: Grader | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, TypeError) as error:
                raise ConfigError(
                    f"the pattern {self.pattern!r} is not a regular expression: {error}",
                    hint="such as pattern='answer is (-?[0-9]+)'",
                ) from error
        if self.which not in get_args(Which):
            raise ConfigError(
                f"which must be one of {', '.join(get_args(Which))}, got {self.which!r}",
                hint=did_you_mean(self.which, get_args(Which)),
            )
        real_number("pattern_seconds", self.pattern_seconds, above=0)
        switch("ignore_case", self.ignore_case)
        switch("ignore_punctuation", self.ignore_punctuation)
        if self.grader is not None and not callable(self.grader):
            raise ConfigError(
                f"the grader must be a function, got {self.grader!r}",
                hint="give a function of the answer and the target, in a configuration as "
                "module:function",
            )

    def score(self, text: str, target: object) -> float:
        """Return how right a text is, in [0, 1]; 0 where the pattern finds no answer.

        Args:
            text: What the model wrote.
            target: What the data have: without a grader text, a number, or a list of them of which
                any is right.

        Raises:
            EvaluationError: When the pattern takes too long, or the grader returns anything else.
        """
        answer = self._extract(text)
        if answer is None:
            return 0.0
        if self.grader is None:
            return float(self._plain(answer) in {self._plain(one) for one in texts_of(target)})
        grade = self.grader(answer, target)
        try:
            score = float(grade)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 1:
            raise EvaluationError(
                f"the grader returned {grade!r} for the answer {answer[:80]!r}",
                hint="return a number between 0 and 1",
            )
        return score

    def _extract(self, text: str) -> str | None:
        """Return the answer in a text; None where the pattern finds none."""
        if self.pattern is None:
            return text
        import regex  # comes with transformers; it can be stopped, which Python's own cannot

        try:
            found = None
            for match in regex.compile(self.pattern).finditer(text, timeout=self.pattern_seconds):
                found = match
                if self.which == "first":
                    break
        except TimeoutError:
            raise EvaluationError(
                f"the pattern {self.pattern!r} took longer than {self.pattern_seconds:g} s on a "
                f"text of {len(text)} characters",
                hint="avoid nested repetition, such as (a+)+, or raise pattern_seconds",
            ) from None
        except regex.error as error:
            raise EvaluationError(
                f"the pattern {self.pattern!r} cannot be used: {first_line(error)}",
                hint="such as pattern='answer is (-?[0-9]+)'",
            ) from error
        if found is None:
            return None
        answer = found[1] if found.re.groups else found[0]
        return None if answer is None else str(answer)

    def _plain(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        return text.strip()


def texts_of(target: object) -> list[str]:
    """Return the texts that an answer may be equal to; none where the target is of another kind."""
    if isinstance(target, str | int | float):
        return [str(target)]
    if isinstance(target, Sequence) and all(isinstance(one, str | int | float) for one in target):
        return [str(one) for one in target]
    return []
