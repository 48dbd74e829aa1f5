from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import map_bo
from map_bo.data import Observations
from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes, ExampleSet
from map_bo.loop.reading import load_state
from map_bo.loop.transfer.embedding import Taken, embed
from map_bo.loop.transfer.examples import check_outcomes
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.tracking.outcomes import as_recorded
from tests.loop.bowls import quick
from tests.loop.transfer.grown import Growing
from tests.tracking.scored import outcomes

X = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
DIGESTS = {"x": "1", "y": "2"}


def scored(rows: tuple[Mapping[str, ExampleOutcomes], ...] | None = None) -> Observations:
    rows = rows or tuple({"x": outcomes(9, seed=i), "y": outcomes(7, seed=i)} for i in range(3))
    return dataclasses.replace(Growing().seen_at(X), examples=rows)


def taken(
    seen: Observations,
    new: Growing | None = None,
    old: Mapping[str, str] = DIGESTS,
    now: Mapping[str, str] = DIGESTS,
    **how: Any,
) -> Taken:
    source: dict[str, Any] = {"source": {"from": "test"}, "title": "old", "examples": old}
    study = Study.of(seen, Growing().space, **source)
    problem = new or Growing()
    return embed(study, problem.space, problem.metrics, StartFrom("old", **how), examples=now)


def names(found: Taken) -> list[list[str]]:
    return [sorted(row) for row in found.observations.examples]


def test_outcomes_on_the_same_examples_are_taken() -> None:
    seen = scored()
    found = taken(seen)
    assert names(found) == [["x", "y"]] * 3
    last = found.observations.examples[2]["y"]
    assert torch.equal(last.values, seen.examples[2]["y"].values)
    assert "notes" not in found.source
    assert names(taken(scored(({}, {}, {})))) == [[]] * 3


@pytest.mark.parametrize(
    ("old", "now", "how"),
    [
        ({"x": "1"}, DIGESTS, {}),
        (DIGESTS, {"x": "1"}, {}),
        ({"x": "1", "y": ""}, {"x": "1", "y": ""}, {}),
        ({"x": "1", "y": "7 examples"}, {"x": "1", "y": "7 examples"}, {}),
        (DIGESTS, {"x": "1", "y": "3"}, {"trust_data": True}),
    ],
)
def test_outcomes_on_what_may_be_other_examples_are_left_out_and_told(
    old: dict[str, str], now: dict[str, str], how: dict[str, Any]
) -> None:
    found = taken(scored(), None, old, now, **how)
    assert names(found) == [["x"]] * 3
    assert torch.equal(found.observations.Y, scored().Y), "the values are taken"
    assert "without their outcomes by example in 3 rows (x, y)" in found.source["notes"][-1]


def test_outcomes_on_a_part_of_the_examples_are_left_out() -> None:
    part = {"x": outcomes(3, 9), "y": outcomes(7)}
    assert names(taken(scored((part, {}, part)))) == [["y"], [], ["y"]]


def test_outcomes_go_by_the_names_of_the_run() -> None:
    named = dataclasses.replace(outcomes(9), metrics=("x",))
    pair = ExampleOutcomes(torch.arange(4), torch.rand(4, 2), 4, (True, True), ("x", "y"))
    rows: tuple[dict[str, ExampleOutcomes], ...] = ({"x": named}, {"both": pair}, {})
    old = {"x": "1", "both": "4"}
    swapped = {"x": "y", "y": "x"}
    found = taken(scored(rows), None, old, {"y": "1", "both": "4"}, metrics=swapped)
    assert names(found) == [["y"], ["both"], []]
    assert found.observations.examples[0]["y"].metrics == ("y",)
    assert found.observations.examples[1]["both"].metrics == ("y", "x")
    fewer = Growing(tasks=("x",))
    gone = taken(scored(rows), fewer, old, {"x": "1", "both": "4"}, metrics={"y": None})
    assert names(gone) == [["x"], [], []], "an evaluator with a metric that the run lacks"


@dataclasses.dataclass(eq=False)
class Scoring(Growing):
    """It has sets of 9 and 7 examples."""

    @property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        return {"x": ExampleSet(("x",), 9), "y": ExampleSet(("y",), 7)}

    def on_examples(self, wanted: Mapping[str, Tensor]) -> Growing:
        raise NotImplementedError

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        seen = super().evaluate(X, generator=generator)
        return dataclasses.replace(seen, examples=({"x": outcomes(9)},) * len(X))


def test_given_observations_must_be_of_the_problems_examples() -> None:
    check_outcomes(scored(), Scoring())
    check_outcomes(scored(), Growing())  # it does not tell its examples
    check_outcomes(Growing().seen_at(X), Scoring())
    with pytest.raises(DataError, match="on 8 examples of 'x', and the problem has 9"):
        check_outcomes(scored(({"x": outcomes(8)}, {}, {})), Scoring())
    with pytest.raises(DataError, match="'z', and the problem has no such evaluator"):
        check_outcomes(scored(({"z": outcomes(8)}, {}, {})), Scoring())


def test_a_run_starts_from_outcomes_and_goes_on_with_them(tmp_path: Path) -> None:
    settings = {name: vars(quick())[name] for name in ("sampler", "surrogate", "solver")}
    how: dict[str, Any] = {"progress": False, "tracking": "none", "verify": 0, **settings}
    map_bo.optimize(Scoring(), 8, known=scored(), run_dir=tmp_path / "new", **how)
    rows = load_state(tmp_path / "new")[0].seen.examples
    assert [sorted(row) for row in rows] == [["x", "y"]] * 3 + [["x"]] * 5
    wanted = as_recorded(scored().examples[1]["x"]).values
    assert torch.equal(rows[1]["x"].values, wanted)
    with pytest.raises(DataError, match="the problem has 9"):
        map_bo.optimize(Scoring(), 8, known=scored(({"x": outcomes(8)}, {}, {})), **how)
