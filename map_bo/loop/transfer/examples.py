"""Outcomes of single examples from elsewhere: which of them a new run can use.

A new run compares outcomes example by example, so it takes over those of an evaluator only where
it is known that they are of the same examples: where both studies tell their digest, and it is the
same. It takes those that cover all examples; a part is one of another run's order, which the new
run does not go on with. The values that were measured are taken in any case.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from map_bo.data import Observations
from map_bo.errors import DataError, listed
from map_bo.examples.sets import ExampleOutcomes
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.problems.problem import HasExamples, Problem

__all__ = ["check_outcomes", "note_on_outcomes", "outcomes_taken"]


def outcomes_taken(
    study: Study,
    names: Mapping[str, str | None],
    how: StartFrom,
    digests: Mapping[str, str],
) -> tuple[dict[str, ExampleOutcomes], ...]:
    """Return the outcomes that a new run takes over, row by row.

    Args:
        study: The older study.
        names: Old name of each metric -> its name in the run; None for one that it lacks.
        how: How names are mapped.
        digests: Digests of the examples of the run's evaluators.
    """
    return tuple(_row(row, study, names, how, digests) for row in study.outcomes)


def _row(
    row: Mapping[str, ExampleOutcomes],
    study: Study,
    names: Mapping[str, str | None],
    how: StartFrom,
    digests: Mapping[str, str],
) -> dict[str, ExampleOutcomes]:
    found = {}
    for evaluator, one in row.items():
        # As for digests, an evaluator is mapped by the name of its metric.
        to = how.metrics.get(evaluator, evaluator)
        digest = study.examples.get(evaluator, "")
        # Their number stands for a digest where there is none.
        told = digest not in ("", f"{one.size} examples")
        if to is None or not told or digests.get(to) != digest or not one.complete:
            continue
        new = [names.get(metric) for metric in one.metrics or (evaluator,)]
        if any(name is None for name in new):
            continue
        renamed = tuple(str(name) for name in new) if one.metrics else ()
        found[to] = dataclasses.replace(one, metrics=renamed)
    return found


def note_on_outcomes(
    before: Sequence[Mapping[str, ExampleOutcomes]], after: Sequence[Mapping[str, ExampleOutcomes]]
) -> str | None:
    """Return what the summary says of outcomes that were not taken; None where all were.

    Args:
        before: Those of the older study, row by row.
        after: Those that were taken.
    """
    rows = [len(after[i]) < len(before[i]) for i in range(len(before))]
    if not any(rows):
        return None
    names = dict.fromkeys(
        name for row, lacks in zip(before, rows, strict=True) if lacks for name in row
    )
    return (
        f"values were imported without their outcomes by example in {sum(rows)} rows "
        f"({listed(names)}): only outcomes on all of the same examples are compared one by one"
    )


def check_outcomes(given: Observations, problem: Problem) -> None:
    """Refuse observations whose outcomes are not those of a problem's examples.

    Args:
        given: Observations of the problem's metrics.
        problem: The problem; its examples are read only where there are outcomes to compare.

    Raises:
        DataError: When an evaluator is not known, or has another number of examples.
    """
    if not any(given.examples) or not isinstance(problem, HasExamples):
        return
    sets = problem.example_sets
    for row in given.examples:
        for name, one in row.items():
            size = sets[name].size if name in sets else None
            if size != one.size:
                raise DataError(
                    f"the observations have outcomes on {one.size} examples of {name!r}, and the "
                    f"problem has {'no such evaluator' if size is None else size}",
                    hint="measure on the same examples, or give the values alone: "
                    "dataclasses.replace(observations, examples=None)",
                )
