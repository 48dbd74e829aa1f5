from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Generator, Tensor

from map_bo.data import Observations
from map_bo.errors import MergeError, PreferenceError, StoreError
from map_bo.loop.reading import created_of, load_result, read_runs
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.preferences import Preference, utility
from map_bo.pareto.trust import Coverage
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import holding_probability, predict
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, SafeBowls, quick
from tests.unsealed import unseal


@pytest.fixture(scope="module")
def result() -> Result:
    return Run(Bowls(), quick(12), MemoryStore()).drive()


def test_a_preference_moves_the_choice(result: Result) -> None:
    towards_a = result.choose({"near a": 5, "far from b": 1})
    towards_b = result.choose({"near a": 1, "far from b": 5})
    a, b = (float(choice.coefficients["a"]) for choice in (towards_a, towards_b))
    assert a > b + 0.3
    assert towards_a.mean[0] > towards_b.mean[0]


def test_bounds_are_honoured_in_the_metrics_own_units(result: Result) -> None:
    choice = result.choose({"near a": 1}, at_most={"far from b": 0.6})
    assert float(choice.expected[1]) <= 0.6
    with pytest.raises(PreferenceError, match="far from b"):
        result.choose(at_most={"far from b": 0.01})


@pytest.mark.parametrize("where", ["prefer", "at_least", "at_most"])
@pytest.mark.parametrize("fitted", [True, False])
def test_an_unknown_metric_is_refused_wherever_it_is_named(
    result: Result, where: str, fitted: bool
) -> None:
    found = result if fitted else replace(result, model=None, refitted=None)
    given: dict[str, Any] = {where: {"near b": 0.5}}
    with pytest.raises(PreferenceError, match="there is no metric 'near b'") as caught:
        found.choose(**given)
    assert "near a" in str(caught.value.hint)


def test_a_choice_is_solved_for_its_preference_when_that_promises_more() -> None:
    coarse = Run(
        Bowls(), quick(12, solver=GradientSolver(points=4, steps=20)), MemoryStore()
    ).drive()
    assert coarse.model is not None
    wanted = {"near a": 1, "far from b": 1}
    by_point = replace(coarse, model=None, refitted=None).choose(wanted, keep_blend=False)
    solved = coarse.choose(wanted, keep_blend=False)  # the blend is the best there is
    assert solved.refined
    assert not by_point.refined
    assert bool(torch.isnan(solved.real).all()), "what was not measured is not real"
    preference = Preference(weights=wanted)
    before, after = (
        float(utility(c.expected.unsqueeze(0), preference, coarse.scale))
        for c in (by_point, solved)
    )
    assert after > before
    # Where it cannot gain, the front's own point stays.
    assert not coarse.choose({"near a": 1}, keep_blend=False).refined


@pytest.fixture(scope="module")
def noisy() -> Result:
    return Run(Bowls(noise=0.4), quick(24, verify=0, seed=3), MemoryStore()).drive()


class TestBoundsHoldWhenMeasured:
    wanted: ClassVar = {"near a": 1.0}
    bound: ClassVar = {"far from b": 1.0}

    @pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
    def test_the_choice_keeps_them_as_surely_as_was_asked(
        self, noisy: Result, confidence: float
    ) -> None:
        choice = noisy.choose(self.wanted, at_most=self.bound, confidence=confidence)
        assert choice.probability is not None
        assert choice.probability >= confidence
        assert noisy.model is not None
        again = holding_probability(noisy.model, choice.x.unsqueeze(0), at_most=self.bound)
        assert choice.probability == pytest.approx(float(again))
        assert choice.describe()["probability"] == choice.probability

    def test_more_confidence_is_a_larger_margin(self, noisy: Result) -> None:
        predicted = [
            float(noisy.choose(self.wanted, at_most=self.bound, confidence=level).expected[1])
            for level in (None, 0.8, 0.99)
        ]
        assert predicted[0] > predicted[1] + 0.02 > predicted[2] + 0.04

    def test_the_note_states_probability_and_margin(self, noisy: Result) -> None:
        choice = noisy.choose(self.wanted, at_most=self.bound)
        [note] = choice.notes
        margin = 1.0 - float(choice.expected[1])
        assert f"hold with probability {choice.probability:.3f} when measured" in note
        assert f"far from b <= 1 by {margin:.2g}" in note

    def test_where_nothing_is_sure_enough_the_most_probable_is_taken_and_said(
        self, noisy: Result
    ) -> None:
        least = float(noisy.front.mean[:, 1].min())
        choice = noisy.choose(self.wanted, at_most={"far from b": least * 1.02}, confidence=0.999)
        assert choice.probability is not None
        assert choice.probability < 0.999
        assert "no merge was found that keeps them with the probability 0.999" in choice.notes[0]
        assert float(choice.expected[1]) <= least * 1.02

    def test_without_bounds_there_is_no_probability(self, noisy: Result) -> None:
        choice = noisy.choose(self.wanted)
        assert choice.probability is None
        assert "probability" not in choice.describe()

    def test_the_record_alone_knows_the_probability_nearly_as_well(self, noisy: Result) -> None:
        recorded = replace(noisy, model=None, refitted=None)
        by_point = recorded.choose(self.wanted, at_most=self.bound)
        assert by_point.probability is not None
        assert by_point.probability >= 0.9
        assert noisy.model is not None
        exact = holding_probability(noisy.model, by_point.x.unsqueeze(0), at_most=self.bound)
        assert by_point.probability == pytest.approx(float(exact), abs=0.02)

    def test_a_point_that_was_measured_and_missed_the_bound_is_not_chosen(
        self, noisy: Result
    ) -> None:
        recorded = replace(noisy, model=None, refitted=None)
        first = recorded.choose(self.wanted, at_most=self.bound)
        front = noisy.front
        real = front.mean[first.point].clone()
        real[1] = 1.01
        measured = replace(recorded, front=front.with_real([first.point], real.unsqueeze(0)))
        again = measured.choose(self.wanted, at_most=self.bound)
        assert again.point != first.point
        assert float(front.mean[again.point, 1]) <= 1.0

    def test_what_was_measured_on_the_same_examples_is_certain(self, noisy: Result) -> None:
        same = tuple(replace(metric, resampling="same") for metric in noisy.metrics)
        front = replace(noisy.front, metrics=same)
        row = noisy.choose(self.wanted, at_most=self.bound, confidence=0.5).point
        real = front.mean[row].clone()
        real[1] = 0.999
        scale = replace(noisy.scale, metrics=same)
        known = replace(
            noisy,
            front=front.with_real([row], real.unsqueeze(0)),
            scale=scale,
            model=None,
            refitted=None,
        )
        choice = known.choose(self.wanted, at_most=self.bound)
        assert choice.point == row
        assert choice.probability == 1.0


def test_a_solved_choice_keeps_its_bounds() -> None:
    coarse = Run(
        Bowls(), quick(12, solver=GradientSolver(points=6, steps=20)), MemoryStore()
    ).drive()
    choice = coarse.choose({"near a": 1}, at_most={"far from b": 1.0})
    assert float(choice.expected[1]) <= 1.0 + 1e-6


class NearTheBase:
    """A sampler that never leaves a corner of the space."""

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        return 0.3 * space.sample(len(seen) + n, generator=generator)[len(seen) :]


@pytest.mark.parametrize("verify", [0, 2])
def test_a_solved_choice_stays_where_the_data_are_and_is_the_best_there(verify: int) -> None:
    def run(guard: bool) -> Result:
        coarse = GradientSolver(points=3, steps=20)
        parts = {"sampler": NearTheBase(), "solver": coarse, "guard": guard}
        return Run(Bowls(), quick(12, seed=2, verify=verify, **parts), MemoryStore()).drive()

    guarded, free = run(guard=True), run(guard=False)
    model = guarded.refitted if verify else guarded.model
    assert model is not None
    coverage = Coverage.of(guarded.seen.X, guarded.space)
    covered = coverage.shrink(guarded.space.sample(2000, generator=make_generator(0)))
    for weight in (1.0, 2.0):
        wanted = {"near a": weight, "far from b": 1.0}
        chosen = guarded.choose(wanted)
        assert chosen.refined
        assert float(coverage.excess(chosen.x.unsqueeze(0))) < 1e-9
        values = torch.cat([chosen.expected.unsqueeze(0), predict(model, covered).mean])
        scores = utility(values, Preference(weights=wanted), guarded.scale)
        assert float(scores[0]) > float(scores[1:].max()) - 1e-3
        # Without the guard the surrogate is believed anywhere.
        assert float(coverage.excess(free.choose(wanted).x.unsqueeze(0))) > 0.1


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["weighted_sum", "chebyshev"])
def test_a_metric_without_a_range_decides_no_choice(
    drop: float, rule: Literal["weighted_sum", "chebyshev"]
) -> None:
    found = Run(SafeBowls(drop=drop), quick(12, verify=0), MemoryStore()).drive()
    weights = {"near a": 1000.0, "far from b": 300.0}
    choice = found.choose({**weights, "safe": 1e6}, rule=rule)
    assert choice.point == found.choose(weights, rule=rule).point
    assert torch.allclose(choice.x, found.choose(weights, rule=rule).x, atol=0.02)
    [note] = choice.notes
    assert note.startswith("metric 'safe' does not differ between base and experts (1)")
    assert choice.describe()["notes"] == [note]
    assert found.point(0).notes == ()


def test_a_metric_without_a_range_still_works_as_a_constraint() -> None:
    found = Run(SafeBowls(drop=0.3), quick(12, verify=0), MemoryStore()).drive()
    wanted = {"near a": 1.0, "far from b": 1.0}
    assert found.scale.rangeless == ("safe",)
    worst = float(found.front.mean[:, 2].min())
    assert worst < 0.9, "points that lose some of it are on the front"
    assert float(found.choose(wanted, at_least={"safe": 0.99}).expected[2]) >= 0.99
    with pytest.raises(PreferenceError, match="safe"):
        found.choose(wanted, at_least={"safe": 1.5})


def test_the_old_name_of_the_scale_still_works(result: Result) -> None:
    with pytest.warns(DeprecationWarning, match="now Result.scale"):
        assert result.reference is result.scale


def test_a_run_recorded_by_version_0_1_opens_with_its_scale(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = Run(SafeBowls(), quick(10, verify=0), JsonlStore.create(run)).drive()
    unseal(run)
    lines = []
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "front":
            reference = event["data"]["reference"]
            assert reference.pop("rangeless") == ["safe"]
            reference["best"][2] = 1.0 + 1e-9  # as it was written then
        lines.append(json.dumps(event, separators=(",", ":")))
    (run / "events.jsonl").write_text("\n".join(lines) + "\n")
    read = load_result(run)
    assert read.scale.rangeless == ("safe",)
    assert torch.equal(read.scale.best, done.scale.best)
    assert torch.equal(read.scale.gains(read.front.mean), done.scale.gains(done.front.mean))


def test_points_are_chosen_by_number(result: Result) -> None:
    assert result.point(0).point == 0
    with pytest.raises(PreferenceError, match="has no point 999"):
        result.point(999)


def test_a_choice_says_what_is_predicted_and_what_is_real(result: Result) -> None:
    verified = int(result.front.verified.nonzero()[0])
    unverified = int((~result.front.verified).nonzero()[0])
    assert result.point(verified).describe()["real"]["near a"] is not None
    assert result.point(unverified).describe()["real"]["near a"] is None
    assert set(result.point(0).describe()["coefficients"]) == {"a", "b"}


def test_a_problem_without_models_cannot_export(result: Result, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="Bowls has no models"):
        result.choose().export(tmp_path / "out")
    with pytest.raises(MergeError, match="a merge of Bowls cannot be written as an adapter"):
        result.choose().export_adapter(tmp_path / "adapter")


def test_an_unfinished_run_has_no_result(tmp_path: Path) -> None:
    run = Run(Bowls(), quick(8), JsonlStore.create(tmp_path / "run"))
    run.ask(1)
    with pytest.raises(StoreError, match="no front yet: 0 evaluations"):
        load_result(tmp_path / "run")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        created_of(tmp_path / "nothing")
    store = JsonlStore.create(tmp_path / "odd")
    store.append(Event("note", {}))
    with pytest.raises(StoreError, match="does not begin with a run"):
        created_of(tmp_path / "odd")


def test_a_record_changed_by_hand_is_refused(tmp_path: Path) -> None:
    run = Run(Bowls(), quick(8), JsonlStore.create(tmp_path / "run"))
    run.store.append(Event("observed", {"index": 0}))
    with pytest.raises(StoreError, match=r"event 2 .'observed'."):
        load_result(tmp_path / "run")


def test_verified_points_correct_the_predictions_and_overwrite_none(tmp_path: Path) -> None:
    store = JsonlStore.create(tmp_path / "run")
    result = Run(Bowls(noise=0.3), quick(10, verify=3), store).drive()
    assert result.model is not None
    assert result.refitted is not None
    joined = Quadratic().fit(result.seen.append(result.verification), result.space)
    assert torch.equal(result.front.corrected, predict(joined, result.front.X).mean)
    assert torch.equal(result.front.mean, predict(result.model, result.front.X).mean)
    assert not torch.allclose(result.front.corrected, result.front.mean)
    wanted = {"near a": 1.0, "far from b": 2.0}
    read = load_result(tmp_path / "run", surrogate=Quadratic())
    for corrected in (True, False):
        chosen = result.choose(wanted, corrected=corrected)
        assert torch.equal(read.choose(wanted, corrected=corrected).x, chosen.x)
    values = result.front.corrected
    bare = replace(result, model=None, refitted=None)
    scores = utility(values, Preference(weights=wanted), result.scale)
    assert bare.choose(wanted).point == int(scores.argmax())
    scores = utility(result.front.mean, Preference(weights=wanted), result.scale)
    assert bare.choose(wanted, corrected=False).point == int(scores.argmax())
    assert result.choose(wanted).describe()["corrected"]["near a"] is not None


def test_a_verified_value_that_was_set_aside_is_not_taken_for_real(tmp_path: Path) -> None:
    class Diverges(Bowls):
        def true_values(self, X: Tensor) -> Tensor:
            Y = super().true_values(X)
            if len(self.calls) == 18:
                Y[0, 1] = 60.0
            return Y

    store = JsonlStore.create(tmp_path / "run")
    result = Run(Diverges(noise=0.01), quick(20, verify=4), store).drive()
    (outlier,) = result.summary["outliers"]
    assert outlier["evaluation"] > 16, "one of the verification"
    assert outlier["value"] == pytest.approx(60.0, abs=0.1)
    measured = result.verification.Y[:, 1]
    assert float(measured.max()) > 50, "the record keeps it"
    for found in (result, load_result(tmp_path / "run", surrogate=Quadratic())):
        real = found.front.real[:, 1]
        assert int(real.isfinite().sum()) == 3
        assert float(real[real.isfinite()].max()) < 5
        assert abs(found.optimism()["far from b"] or 0) < 1
    page = read_runs([tmp_path / "run"], beside=tmp_path)[0].outcome
    assert page is not None
    assert int(page.front.verified.sum()) == 3
    assert len(page.outliers) == 1


def test_optimism_is_told_as_estimated_measured_and_corrected() -> None:
    result = Run(Bowls(noise=0.3), quick(10, verify=3), MemoryStore()).drive()
    told = result.summary["uncertainty"]
    gap = (result.front.mean - result.front.real)[result.front.verified]
    measured = told["optimism"]["measured"]
    assert measured["near a"]["mean"] == pytest.approx(float(gap[:, 0].mean()))
    assert measured["far from b"]["mean"] == pytest.approx(-float(gap[:, 1].mean()))
    assert measured["near a"]["se"] == pytest.approx(float(gap[:, 0].std()) / 3**0.5)
    assert measured["near a"]["points"] == 3
    shift = float((result.front.mean - result.front.corrected)[:, 1].mean())
    assert told["optimism"]["corrected"]["far from b"] == pytest.approx(-shift)
    assert told["optimism"]["left_out"]["near a"]["se"] > 0
    assert told["hypervolume"]["lower"] < told["hypervolume"]["upper"]


def test_without_verification_nothing_is_corrected() -> None:
    result = Run(Bowls(), quick(8, verify=0), MemoryStore()).drive()
    assert not result.is_corrected
    assert result.refitted is None
    assert bool(torch.isnan(result.choose().corrected).all())
    assert torch.equal(result.choose().expected, result.choose().mean)
    told = result.summary["uncertainty"]["optimism"]
    assert told["measured"]["near a"] == {"mean": None, "se": None, "points": 0}
    assert told["corrected"]["near a"] is None
    assert told["left_out"]["near a"]["mean"] is not None
    one = Run(Bowls(), quick(8, verify=1), MemoryStore()).drive()
    assert one.summary["uncertainty"]["optimism"]["measured"]["near a"]["se"] is None
