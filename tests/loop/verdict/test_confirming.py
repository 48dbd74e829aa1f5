"""Choices of whole runs: judged, measured, and confirmed on examples that the search never saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import map_bo
from map_bo.errors import ConfigError, EvaluationError, MergeError
from map_bo.examples.sets import order_of
from map_bo.loop.reading import load_result
from map_bo.loop.result import Result
from map_bo.loop.verdict.confirm import CHOSEN, HELD_OUT, SEARCHED
from map_bo.loop.verdict.verdict import BLEND, OVERALL
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.workers.inline import InlineWorkers
from tests.loop.items import ItemProblem

QUICK = {"sampler": Sobol(), "surrogate": Quadratic(), "progress": False, "tracking": "none"}


def searched(folder: Path | None = None, **settings: object) -> Result:
    return map_bo.optimize(
        ItemProblem(2, 200),
        9,
        run_dir=folder,
        verify=1,
        **{**QUICK, **settings},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def held_out() -> Result:
    return searched(holdout=0.3)


def test_a_choice_is_judged_by_the_examples_that_it_shares_with_the_anchors(
    held_out: Result,
) -> None:
    choice = held_out.choose(keep_blend=False)
    verdict = held_out.verdict(choice)
    competitors = {one.competitor for one in verdict.comparisons}
    assert competitors == {BLEND, "base", "e0", "e1"}
    assert {one.metric for one in verdict.against("base")} == {"t0", "t1", OVERALL}
    point = held_out.verdict(replace(choice, x=held_out.verification.X[0]))
    assert {one.ground for one in point.comparisons} == {"examples"}
    assert {one.n for one in point.against(BLEND) if one.metric == "t0"} == {140}
    assert point.candidates > 1


def test_the_blend_is_judged_beside_the_best_other_merge(held_out: Result) -> None:
    blend = next(
        x
        for x, kind in zip(held_out.space.anchors().X, held_out.space.anchors().kinds, strict=True)
        if kind == "blend"
    )
    choice = replace(held_out.choose(), x=blend, blend=True)
    verdict = held_out.verdict(choice)
    assert verdict.kept
    assert {(one.merge, one.competitor) for one in verdict.comparisons} == {
        ("the best other merge", BLEND),
        ("the uniform blend", "base"),
        ("the uniform blend", "e0"),
        ("the uniform blend", "e1"),
    }


def test_confirming_measures_what_the_search_never_saw(held_out: Result) -> None:
    problem = ItemProblem(2, 200)
    run = replace(held_out, problem=problem)
    choice = run.choose(keep_blend=False)
    [found] = run.confirm(choice).confirmed
    assert found.names == (CHOSEN, BLEND, "base", "e0", "e1")
    assert (found.where, found.held_out) == (HELD_OUT, True)
    fresh = set(order_of(problem.example_sets["t0"], 0, "t0")[140:].tolist())
    used = {int(item) for row in held_out.seen.examples for item in row["t0"].items}
    for row in found.measured.examples:
        assert set(row["t0"].items.tolist()) == fresh
        assert not used & fresh
    outcomes = problem.outcomes(choice.x, 0)[sorted(fresh)]
    assert float(found.measured.Y[0, 0]) == pytest.approx(float(outcomes.mean()))
    assert found.optimism()["t0"] == pytest.approx(
        float(choice.expected[0] - found.measured.Y[0, 0])
    )
    assert found.verdict.candidates == 1
    assert {one.ground for one in found.verdict.comparisons} == {"examples"}
    assert len(found.measured) == 5 == len(problem.calls)


def test_measuring_takes_the_examples_of_the_search_and_only_the_choice(held_out: Result) -> None:
    problem = ItemProblem(2, 200)
    run = replace(held_out, problem=problem)
    choice = run.choose(keep_blend=False)
    [found] = run.measure(choice).confirmed
    assert len(problem.calls) == 1
    assert (found.where, found.held_out) == (SEARCHED, False)
    assert len(found.measured.examples[0]["t0"]) == 140
    assert found.names[0] == CHOSEN
    assert set(found.names[1:]) == {BLEND, "base", "e0", "e1"}
    of_chosen = [one for one in found.verdict.comparisons if one.merge == CHOSEN]
    assert {one.ground for one in of_chosen} == {"examples"}
    assert all("of several" in one.test or "one of" in one.test for one in of_chosen)


def test_confirmations_are_recorded_and_read_back(tmp_path: Path) -> None:
    result = searched(tmp_path / "run", holdout=0.25)
    once = result.confirm()
    twice = once.measure()
    assert len(twice.confirmed) == 2
    again = load_result(tmp_path / "run")
    assert [one.where for one in again.confirmed] == [HELD_OUT, SEARCHED]
    assert again.confirmed[0].verdict == once.confirmed[0].verdict
    assert torch.equal(again.confirmed[0].measured.Y, once.confirmed[0].measured.Y)
    assert again.confirmed[0].optimism() == once.confirmed[0].optimism()
    assert torch.equal(again.front.X, result.front.X)
    # The run goes on from its record as before.
    more = map_bo.optimize(
        ItemProblem(2, 200),
        9,
        run_dir=tmp_path / "run",
        verify=1,
        holdout=0.25,
        **QUICK,  # type: ignore[arg-type]
    )
    assert more.summary == result.summary


def test_other_workers_measure_the_same(held_out: Result) -> None:
    mine, theirs = ItemProblem(2, 200), ItemProblem(2, 200)
    here = replace(held_out, problem=mine).confirm()
    there = replace(held_out, problem=mine).confirm(workers=InlineWorkers(theirs))
    assert len(mine.calls) == len(theirs.calls) == 5
    assert torch.equal(here.confirmed[0].measured.Y, there.confirmed[0].measured.Y)


def test_other_examples_confirm_a_run_that_held_nothing_out() -> None:
    run = searched()
    with pytest.raises(ConfigError, match="saw all examples") as error:
        run.confirm()
    assert error.value.hint is not None
    assert "loop.holdout" in error.value.hint
    tests = ItemProblem(2, 300, seed=5)
    [found] = run.confirm(on=tests).confirmed
    assert found.held_out
    assert len(found.measured.examples[0]["t0"]) == 300
    with pytest.raises(ConfigError, match="other coefficients or metrics"):
        run.confirm(on=ItemProblem(3, 50))


def test_what_cannot_be_measured_is_refused(held_out: Result) -> None:
    with pytest.raises(MergeError, match="problem of this run is not available"):
        replace(held_out, problem=None).confirm()

    class Broken(ItemProblem):
        def outcomes(self, x: torch.Tensor, task: int) -> torch.Tensor:
            raise RuntimeError("the disk is full")

    with pytest.raises(EvaluationError, match="could not be measured: RuntimeError: the disk"):
        held_out.confirm(on=Broken(2, 40))


@pytest.mark.slow
def test_what_an_anchor_was_not_scored_on_is_not_told_as_measured() -> None:
    result = searched(items=50)
    choice = result.choose(keep_blend=False)
    found = result.measure(replace(choice, x=result.verification.X[0])).confirmed[-1]
    head, rows = found.table()
    at = [i for i, title in enumerate(head) if title.endswith("measured")]
    assert all(rows[0][i] != "-" for i in at)
    assert all(row[i] == "-" and row[i - 1] != "-" for row in rows[1:] for i in at)
    assert "the search has an estimate" in found.lines()[0]
    assert {one.n for one in found.verdict.against("base") if one.metric == "t0"} == {50}
