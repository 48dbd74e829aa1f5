from __future__ import annotations

import dataclasses

from map_bo.report.run.certainty import (
    has_corrected,
    has_probability,
    hypervolume_words,
    optimism_rows,
    optimism_words,
    stop_words,
)
from tests.report.fake_views import make_view


def test_a_run_that_does_not_say_how_sure_it_is_has_no_rows() -> None:
    view = make_view(2)
    assert not has_corrected(view)
    assert not has_probability(view)
    assert hypervolume_words(view) == optimism_words(view) == stop_words(view) == ""
    assert optimism_rows(view) == []


def test_optimism_is_told_with_its_error() -> None:
    view = make_view(3, verify=2, certain=True)
    assert has_corrected(view)
    assert has_probability(view)
    assert optimism_rows(view)[1] == (
        "invert",
        "+0.013 \u00b1 0.0042",
        "+0.012 \u00b1 0.003",
        "+0.010",
    )
    assert "fell, on average, when the verified points were added" in optimism_words(view)


def test_one_verified_point_has_no_error() -> None:
    assert optimism_rows(make_view(2, verify=1, certain=True))[0][2] == "+0.012"


def test_what_was_not_verified_is_only_estimated() -> None:
    view = make_view(2, verify=0, certain=True)
    assert not has_corrected(view)
    assert optimism_rows(view)[0][1:] == ("+0.013 \u00b1 0.0042", "", "")
    assert "Nothing was verified" in optimism_words(view)


def test_the_reason_of_the_end_is_told() -> None:
    view = make_view(2, certain=True)
    assert stop_words(view).endswith("(0.004, 0.003); 5 evaluations of the budget unused")
    stop = {**view.summary["stop"], "reason": None, "unused": 0}
    spent = dataclasses.replace(view, summary={**view.summary, "stop": stop})
    assert stop_words(spent).startswith("not before the budget was spent: the expected regret")
    assert "was at least 0.003, the tolerance is 0.005" in stop_words(spent)
