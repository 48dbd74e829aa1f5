"""When a search stops before its budget is spent: the rule, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from map_bo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from map_bo.space import CoefficientSpace

__all__ = ["Criterion", "Stop", "notes_on", "told"]

Criterion = Literal["regret", "hypervolume"]

_CRITERIA = ("regret", "hypervolume")


@dataclass(frozen=True)
class Stop:
    """When to stop a search before its budget is spent.

    Attributes:
        criterion: ``"regret"``: what the choice by the mean is expected to fall short of the best
            choice, averaged over preferences, in units of the scale from the reference point (0)
            to the best expert (1). ``"hypervolume"``: how much hypervolume the true front is
            expected to have more than the mean's, as a share of the latter; a lower estimate,
            see :func:`map_bo.loop.expected_gain.expected_gain`.
        tolerance: The search stops when the expected gain is at most this.
        patience: For so many rounds one after the other.
        least: Evaluations that have to succeed before the first look; ``None`` is ``2 N + 2`` for
            ``N`` experts, and at least 10.

    Raises:
        ConfigError: On an unknown criterion, or numbers that mean nothing.
    """

    criterion: Criterion = "regret"
    tolerance: float = 0.005
    patience: int = 2
    least: int | None = None

    def __post_init__(self) -> None:
        if self.criterion not in _CRITERIA:
            raise ConfigError(
                f"there is no stopping criterion {self.criterion!r}",
                hint=f"{did_you_mean(self.criterion, _CRITERIA)} "
                "(no criterion spends the whole budget)",
            )
        value = self.tolerance
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            reach = "a gain that is never quite 0 cannot fall under it"
            reach = reach if _number(value) and value <= 0 else "everything is under it"
            raise ConfigError(
                f"the stopping tolerance is {value!r}"
                + (f": {reach}" if _number(value) and not math.isnan(value) else ""),
                hint="give a number between 0 and 1, such as 0.005; leave the criterion out to "
                "spend the whole budget",
            )
        for name, least in (("patience", 1), ("least", 3)):
            number = getattr(self, name)
            if number is None and name == "least":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ConfigError(
                    f"{name} of the stopping rule is {number!r}",
                    hint=f"{name} is a whole number, at least {least}",
                )

    @classmethod
    def of(cls, given: Stop | Mapping[str, Any] | None) -> Stop | None:
        """Return a rule from plain data; no criterion means no rule.

        Raises:
            ConfigError: On an unknown key, or keys without a criterion.
        """
        if given is None or isinstance(given, Stop):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"stop is {given!r}",
                hint="give a Stop, or a mapping such as {'criterion': 'regret'}",
            )
        known = {field.name: field.default for field in fields(cls)}
        for key in given:
            if key not in known:
                raise ConfigError(f"stop has no option {key!r}", hint=did_you_mean(key, known))
        if given.get("criterion") is None:
            changed = [key for key, value in given.items() if key != "criterion"]
            changed = [key for key in changed if given[key] != known[key]]
            if changed:
                raise ConfigError(
                    f"stop.{changed[0]} is given and stop.criterion is not",
                    hint="add stop.criterion=regret or stop.criterion=hypervolume",
                )
            return None
        return cls(**given)

    def first(self, space: CoefficientSpace) -> int:
        """Return how many evaluations have to succeed before the first look."""
        if self.least is not None:
            return self.least
        return max(2 * (len(space.experts) or space.d) + 2, 10)

    def reached(self, gains: Sequence[float]) -> str | None:
        """Return why the search stops after expected ``gains``, one a round; None to go on."""
        last = gains[-self.patience :]
        if len(last) < self.patience or max(last) > self.tolerance:
            return None
        rounds = "1 round" if self.patience == 1 else f"{self.patience} rounds"
        what = f"expected {self.criterion} still to be gained"
        shown = ", ".join(f"{gain:.2g}" for gain in last)
        return f"{what} at most {self.tolerance:g} for {rounds} ({shown})"


def told(
    stop: Stop | None, checks: Sequence[Mapping[str, Any]], unused: int
) -> dict[str, Any] | None:
    """Return what became of a stopping rule, as plain data for the summary.

    Args:
        stop: The rule.
        checks: The recorded looks, in order.
        unused: Evaluations of the search that were not spent.

    Returns:
        The rule, ``reason`` (None when the budget was spent), ``series`` of evaluations and
        expected gains, ``least_gain`` seen, ``floor`` and ``unused``; None without a rule.
    """
    if stop is None:
        return None
    series = [[int(check["evaluations"]), float(check["gain"])] for check in checks]
    floors = [check["floor"] for check in checks if check.get("floor") is not None]
    return {
        **asdict(stop),
        "reason": checks[-1].get("stop") if checks else None,
        "series": series,
        "least_gain": min((gain for _, gain in series), default=None),
        "floor": floors[0] if floors else None,
        "unused": unused,
    }


def notes_on(told: Mapping[str, Any] | None) -> list[str]:
    """Return what a reader of the summary should know about a stopping rule."""
    if told is None:
        return []
    notes = []
    if told["reason"] is None:
        what = f"the search spent its budget: expected {told['criterion']} still to be gained "
        if told["least_gain"] is None:
            notes.append(
                "the search ended before its stopping rule looked for the first time; lower "
                "stop.least or raise the budget"
            )
        else:
            notes.append(
                f"{what}was {told['least_gain']:.2g} at the least, over the tolerance of "
                f"{told['tolerance']:g} (or not for {told['patience']} rounds)"
            )
    floor = told["floor"]
    if floor is not None and floor > told["tolerance"]:
        notes.append(
            f"the stopping tolerance of {told['tolerance']:g} is below {floor:.2g}, which is "
            "what the whole budget was expected to leave at the noise of the evaluations; give a "
            "larger tolerance, more examples an evaluation, or a larger budget"
        )
    return notes


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
