"""When a search stops before its budget is spent: the rule, and what the summary says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.values import real_number, whole_number

if TYPE_CHECKING:
    from map_bo.data import Observations
    from map_bo.space import CoefficientSpace

__all__ = ["Criterion", "Stop", "notes_on", "refuse_failures", "stop_record"]

Criterion = Literal["regret", "hypervolume"]

_CRITERIA = ("regret", "hypervolume")


@dataclass(frozen=True)
class Stop:
    """When to stop a search before its budget is spent.

    Attributes:
        criterion: ``"regret"``: by how much the choice by the mean is expected to fall short of
            the best choice, averaged over preferences, on the scale from the reference point (0)
            to the best expert (1). ``"hypervolume"``: by how much the hypervolume of the true front
            is expected to exceed that of the mean's front, as a share of the latter; a lower
            estimate, see :func:`map_bo.loop.posterior.expected_gain.expected_gain`.
        tolerance: The search stops when the expected gain is at most this ...
        patience: ... in so many rounds in a row.
        least: Evaluations that have to succeed before the first check; ``None`` is ``2 N + 2`` for
            ``N`` experts, and at least 10.

    Raises:
        ConfigError: On an unknown criterion, or numbers out of their range.
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
        hint = (
            "give an expected gain such as 0.005; leave the criterion out to spend the whole budget"
        )
        put, value = object.__setattr__, real_number("stop.tolerance", self.tolerance, hint=hint)
        if not 0 < value < 1:
            raise ConfigError(
                f"stop.tolerance must be between 0 and 1, got {self.tolerance!r}", hint=hint
            )
        put(self, "tolerance", value)
        for name, least in (("patience", 1), ("least", 3)):
            number = getattr(self, name)
            if number is None and name == "least":
                continue
            hint = "raise it, or remove it for the default"
            put(self, name, whole_number(f"stop.{name}", number, least=least, hint=hint))

    @classmethod
    def of(cls, given: Stop | Mapping[str, Any] | None) -> Stop | None:
        """Return the rule that plain data describe; without a criterion there is no rule.

        Raises:
            ConfigError: On an unknown key, or keys without a criterion.
        """
        if given is None or isinstance(given, Stop):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"stop must be a Stop or a mapping, got {given!r}",
                hint="write it as in {'criterion': 'regret', 'tolerance': 0.005}",
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
        """Return how many evaluations have to succeed before the first check."""
        if self.least is not None:
            return self.least
        return max(2 * (len(space.experts) or space.d) + 2, 10)

    def reason(self, gains: Sequence[float]) -> str | None:
        """Return why the search stops after expected ``gains``, one per round; None to go on."""
        last = gains[-self.patience :]
        if len(last) < self.patience or max(last) > self.tolerance:
            return None
        rounds = "1 round" if self.patience == 1 else f"{self.patience} rounds"
        what = f"expected {self.criterion} still to be gained"
        shown = ", ".join(f"{gain:.2g}" for gain in last)
        return f"{what} at most {self.tolerance:g} for {rounds} ({shown})"


def refuse_failures(failures: Sequence[str | None], last: Observations, allowed: float) -> None:
    """Refuse to go on where too large a share of the evaluations has failed.

    Args:
        failures: The reason of each evaluation that failed, None of one that did not.
        last: The last of them.
        allowed: The share that may fail.

    Raises:
        EvaluationError: When the last one has failed, at least three have, and more than this.
    """
    failed, total = sum(reason is not None for reason in failures), len(failures)
    if last.failures[0] is not None and failed >= 3 and failed > allowed * total:
        raise EvaluationError(
            f"{failed} of {total} evaluations failed, more than the allowed share of "
            f"{allowed:g}; the last: {last.failures[0]}",
            hint="fix the evaluator and resume the run (--retry-failed repeats the failed "
            "evaluations); all measurements are kept",
        )


def stop_record(
    stop: Stop | None, checks: Sequence[Mapping[str, Any]], unused: int
) -> dict[str, Any] | None:
    """Return what a stopping rule did, as plain data for the summary.

    Args:
        stop: The rule.
        checks: The recorded checks, in order.
        unused: Evaluations of the search that were not spent.

    Returns:
        The rule, ``reason`` (None when the budget was spent), ``series`` of evaluations and
        expected gains, the ``least_gain``, ``floor`` and ``unused``; None without a rule.
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


def notes_on(record: Mapping[str, Any] | None) -> list[str]:
    """Return what a reader of the summary should know about a stopping rule."""
    if record is None:
        return []
    notes = []
    if record["reason"] is None:
        if record["least_gain"] is None:
            notes.append(
                "the search ended before the first check of its stopping rule; lower stop.least or "
                "raise the budget"
            )
        else:
            notes.append(
                f"the search spent its budget: the expected {record['criterion']} still to be "
                f"gained was at least {record['least_gain']:.2g}, and the rule needs at most "
                f"{record['tolerance']:g} for {record['patience']} rounds"
            )
    floor = record["floor"]
    if floor is not None and floor > record["tolerance"]:
        notes.append(
            f"the stopping tolerance of {record['tolerance']:g} is below {floor:.2g}, the gain "
            "that was expected to be left after the whole budget at the noise of the evaluations; "
            "use a larger tolerance, more examples per evaluation, or a larger budget"
        )
    return notes
