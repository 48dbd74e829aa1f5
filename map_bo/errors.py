"""The one family of errors that ``map_bo`` raises for a user's mistake or a broken input.

Every error carries a message that says what is wrong and, where there is one, a hint that
says what to do. The command line prints both and exits with status 2; it never shows a
traceback for them. ``assert`` is kept for the package's own invariants.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec


class MapBoError(Exception):
    """Base of all errors of the package.

    Args:
        message: What is wrong, in terms of what the user gave.
        hint: What to do about it; shown on a line of its own.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")

    @property
    def reason(self) -> str:
        """Message and hint on one line, as a failed evaluation records them."""
        return self.message if self.hint is None else f"{self.message} (hint: {self.hint})"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default, and these
        # cross process boundaries when a sweep runs its jobs in workers.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[MapBoError], message: str, hint: str | None) -> MapBoError:
    return kind(message, hint=hint)


class DataError(MapBoError):
    """Observations, metrics or a front that contradict themselves (shapes, names, NaN)."""


class SpaceError(MapBoError):
    """Coefficients outside their space, or a space that is empty or ill-formed."""


class CheckpointError(MapBoError):
    """A checkpoint that is missing, truncated, unsafe or of an unknown format."""


class MergeError(MapBoError):
    """Checkpoints that do not fit each other, or an operator that cannot merge them."""


class EvaluationError(MapBoError):
    """Evaluations that fail more often than allowed, or an evaluator that returns nonsense."""


class SurrogateError(MapBoError):
    """Too few or degenerate observations for the surrogate that was asked for."""


class SamplerError(MapBoError):
    """A sampler that cannot work with this space, these metrics or this surrogate."""


class PreferenceError(MapBoError):
    """A preference or constraint that names no metric or that no front point satisfies."""


class BudgetError(MapBoError):
    """A budget too small for what was asked of it."""


class TreeError(MapBoError):
    """A merge tree that lacks, repeats or invents experts, or cannot have so many stages."""


class StoreError(MapBoError):
    """A run directory that is locked, corrupt, full or of another configuration."""


class AnotherRunError(StoreError):
    """A run directory that holds a run of other settings than those it is to go on with."""


class WorkersError(MapBoError):
    """Workers cannot be started, are out of reach, or hold something else than the driver."""


class ConfigError(MapBoError):
    """A configuration that names something unknown or has a value of the wrong kind."""


class SettingsError(MapBoError):
    """Settings that plain data cannot say, or plain data from which no settings are built."""


class PublishError(MapBoError):
    """A service that would not take a report; what was written locally stands."""


class MissingDependencyError(MapBoError):
    """An optional package is needed here and is not installed; the hint is the install line."""


def did_you_mean(word: object, known: Iterable[str], *, before: str = "") -> str:
    """Return a hint that names the word that was probably meant, or else all there are.

    Args:
        word: What was given.
        known: The words that are known.
        before: What the user writes before the word, such as ``"nested."``.
    """
    words = [str(one) for one in known]
    near = get_close_matches(str(word), words, n=1)
    if near:
        return f"did you mean {before + near[0]!r}?"
    return f"choose from {', '.join(before + one for one in words)}" if words else "there are none"


def require(package: str, *, by: str, extra: str) -> None:
    """Refuse to go on where an optional package is not installed.

    Args:
        package: The package, as it is imported.
        by: What needs it, to begin the message with.
        extra: The extra of map-bo that installs it.

    Raises:
        MissingDependencyError: With the install line as its hint.
    """
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"{by} needs {package}, which is not installed", hint=f'pip install "map-bo[{extra}]"'
        )


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are, for an error."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind when it says nothing."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
