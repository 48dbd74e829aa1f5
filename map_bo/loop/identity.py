"""Whether a record belongs to the run that wants to continue it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from map_bo.errors import AnotherRunError, SettingsError
from map_bo.loop.growth import created_in_force, with_defaults, with_resampling
from map_bo.loop.settings import Settings
from map_bo.plain import Described, flat, identity_of, modernise, to_plain
from map_bo.problems.problem import Problem, digests_of_examples
from map_bo.tracking.codec import encode_metric
from map_bo.tracking.store import Event

__all__ = [
    "difference",
    "problem_identity",
    "refuse_another",
    "refuse_other_examples",
    "run_identity",
]


def difference(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Describe the first way in which a record differs from ``identity``; None if in no way.

    Files may have moved, but their digests must be the same.
    """
    before: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for part, value in identity.items():
        if part == "examples" and part not in recorded:  # of a record that does not tell them
            continue
        told = with_resampling(recorded.get(part), value)
        if part == "settings":
            told = with_defaults(told, value)
        before |= flat(modernise(told, value), part)
        now |= flat(value, part)
    for values in (before, now):
        for key in list(values):
            # Files may move; their digests tell whether they are the same.
            if key.rpartition(".")[2] == "source" or values[key] == {}:
                del values[key]
    different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if not different:
        return None
    key = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    return f"{key} was {before.get(key)!r} and is {now.get(key)!r}{more}"


def refuse_another(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a record of another run: one whose identity differs from ``identity``.

    Raises:
        AnotherRunError: When they differ; the message names the first difference.
    """
    found = difference(recorded, identity)
    if found is not None:
        raise AnotherRunError(
            f"the run directory belongs to another run: {found}",
            hint="use another run directory, or the settings with which the run was started",
        )


def refuse_other_examples(
    extension: Mapping[str, Any], events: Iterable[Event], problem: Problem
) -> None:
    """Refuse a problem with other examples than those of a record, where a search goes on.

    Nobody has asked for them as long as nothing was left to measure.

    Args:
        extension: The data of an event ``extended``.
        events: The record, which may tell its examples.
        problem: What would be measured next.

    Raises:
        AnotherRunError: When a digest or a number of examples differs.
    """
    recorded = created_in_force(list(events)) or {}
    if extension["reopens"] and "examples" in recorded:
        found = digests_of_examples(problem)
        refuse_another({"examples": recorded["examples"]}, {"examples": found})


def run_identity(
    problem: Problem, settings: Settings, *, finished: bool = False, **parts: Any
) -> dict[str, Any]:
    """Return what makes two runs the same run, as it is read back from a record.

    Args:
        problem: What is optimised.
        settings: How.
        finished: Whether nothing is left to measure, so that examples need not be read.
        **parts: Further parts of the identity.
    """
    examples = {} if finished else digests_of_examples(problem)
    fields = identity_of(dataclasses.replace(settings, workers=None, asynchronous=None))["fields"]
    identity = {
        "settings": {name: fields[name] for name in fields if name not in _NOT_OF_THE_RUN},
        **parts,
        "problem": problem_identity(problem),
        "space": problem.space.describe(),
        "metrics": [encode_metric(metric) for metric in problem.metrics],
        **({"examples": examples} if examples else {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


_NOT_OF_THE_RUN = ("workers", "asynchronous")  # who evaluates, and when, may change


def problem_identity(problem: Problem) -> Any:
    """Return plain data by which a problem is recognised.

    One that does not describe itself is recognised by its fields where they are settings (those
    of a frozen dataclass), and by its type alone where they are not.
    """
    if isinstance(problem, Described):
        return problem.describe()
    if dataclasses.is_dataclass(problem) and type(problem).__dataclass_params__.frozen:
        try:
            return to_plain(problem)
        except SettingsError:
            pass
    return {"type": type(problem).__name__}
