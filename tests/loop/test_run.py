from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, EvaluationError, SpaceError, StoreError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_result
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop
from map_bo.pareto.indicators import hypervolume
from map_bo.problems.zoo.digits import digits_problem
from map_bo.rng import child, child_seed, make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.space import CoefficientSpace
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event
from tests.loop.bowls import Bowls, SafeBowls, quick


class CrashError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class CrashingStore:
    """A store whose process dies just before or just after its k-th append."""

    def __init__(self, inner: MemoryStore, at: int, *, after: bool) -> None:
        self.inner, self.left, self.after = inner, at, after

    def append(self, event: Event) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise CrashError
        self.inner.append(event)
        if self.left == 0:
            raise CrashError

    def read(self) -> Iterator[Event]:
        return self.inner.read()


def outcome(result: Result) -> list[Any]:
    front, seen = result.front, result.seen
    tensors = [seen.X, seen.Y, front.X, front.mean, front.std, front.real, result.verification.Y]
    tensors += [front.corrected, front.probability]
    told = [result.summary[name] for name in ("uncertainty", "stop", "notes")]
    return [tensor.nan_to_num(-99.0).tolist() for tensor in tensors] + [seen.failures, told]


@pytest.mark.parametrize(
    ("after", "batch"),
    [
        (True, 1),
        pytest.param(False, 3, marks=pytest.mark.slow),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_any_event_and_resumed_equals_one_never_killed(
    batch: int, after: bool
) -> None:
    settings = quick(8, batch=batch, retries=1)

    def problem() -> Bowls:
        first_attempt = child_seed(make_generator(settings.seed), "evaluate", 3, 0)
        return Bowls(noise=0.05, flaky=frozenset({first_attempt}))

    whole = MemoryStore()
    expected = outcome(Run(problem(), settings, whole).drive())
    events = len(list(whole.read()))
    assert events > 8
    for at in range(1, events + 1):
        inner = MemoryStore()
        with pytest.raises(CrashError):
            Run(problem(), settings, CrashingStore(inner, at, after=after)).drive()
        # Killed again right after it goes on, then left alone.
        remaining = events - len(list(inner.read()))
        if remaining > 1:
            with pytest.raises(CrashError):
                Run(problem(), settings, CrashingStore(inner, 1, after=True)).drive()
        assert outcome(Run(problem(), settings, inner).drive()) == expected


@pytest.mark.parametrize(
    ("stop", "stops"),
    [
        (Stop(tolerance=0.2, patience=2, least=3), True),  # two bowls are plain by then
        pytest.param(
            Stop("hypervolume", tolerance=1e-9, patience=1, least=3), False, marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_killed_around_a_check_of_its_stopping_rule_equals_one_never_killed(
    stop: Stop, stops: bool
) -> None:
    settings = quick(9, batch=2, stop=stop)
    whole = MemoryStore()
    result = Run(Bowls(noise=0.05), settings, whole).drive()
    assert (result.summary["stop"]["reason"] is not None) == stops
    kinds = [event.kind for event in whole.read()]
    assert kinds.count("checked") == 2
    assert kinds.count("corrected") == 1
    for kind in ("checked", "corrected"):
        at = len(kinds) - kinds[::-1].index(kind)  # the last of them, counted from 1
        for after in (False, True):
            inner = MemoryStore()
            with pytest.raises(CrashError):
                Run(Bowls(noise=0.05), settings, CrashingStore(inner, at, after=after)).drive()
            again = Run(Bowls(noise=0.05), settings, inner).drive()
            assert outcome(again) == outcome(result)
            assert [event.kind for event in inner.read()] == kinds


def test_nothing_finished_is_evaluated_again(tmp_path: Path, bowls: Bowls) -> None:
    settings = quick(8)
    first = Run(bowls, settings, JsonlStore.create(tmp_path / "run")).drive()
    calls = len(bowls.calls)
    again = Run(bowls, settings, JsonlStore.open(tmp_path / "run")).drive()
    assert calls == 8
    assert len(bowls.calls) == calls
    assert outcome(again) == outcome(first)
    assert outcome(load_result(tmp_path / "run")) == outcome(first)


def test_the_front_is_true_on_two_bowls(bowls: Bowls) -> None:
    result = Run(bowls, quick(12), MemoryStore()).drive()
    # The Pareto set of two equal bowls is the segment between their centres.
    assert float((result.front.X.sum(-1) - 1).abs().max()) < 0.15
    assert float(result.front.X[:, 0].max() - result.front.X[:, 0].min()) > 0.8
    hypervolume = result.summary["hypervolume"]
    assert hypervolume["predicted front"] > hypervolume["uniform blend"]
    assert hypervolume["predicted front"] > hypervolume["best expert"]
    assert abs(result.optimism()["near a"] or 0.0) < 0.02


def test_predicted_and_real_are_apart_and_verification_is_counted(bowls: Bowls) -> None:
    inside = Run(bowls, quick(8, verify=3), MemoryStore()).drive()
    assert (len(inside.seen), len(inside.verification)) == (5, 3)
    assert int(inside.front.verified.sum()) == 3
    assert inside.summary["evaluations"] == 8
    assert inside.summary["verification"]["counted"] == "inside the budget"
    extra = Run(Bowls(), quick(8, verify=3, verify_extra=True), MemoryStore()).drive()
    assert (len(extra.seen), len(extra.verification)) == (8, 3)
    assert extra.summary["verification"]["counted"] == "on top of the budget"
    assert not torch.equal(
        inside.front.mean[inside.front.verified], inside.front.real[inside.front.verified]
    )


def test_failures_are_recorded_retried_left_out_and_never_scored(tmp_path: Path) -> None:
    problem = Bowls(fails=lambda number, x: "boom" if x.tolist() == [1.0, 0.0] else None)
    result = optimize(
        problem, 9, run_dir=tmp_path / "run", progress=False, **_parts(), retries=2, verify=0
    )
    assert problem.calls.count([1.0, 0.0]) == 3
    row = result.seen.X.tolist().index([1.0, 0.0])
    assert result.seen.failures[row] == "boom"
    assert bool(torch.isnan(result.seen.Y[row]).all())
    assert result.summary["failures"] == 1
    kinds = [event.kind for event in JsonlStore.open(tmp_path / "run").read()]
    assert kinds.count("attempt") == 2


def _parts() -> dict[str, Any]:
    settings = quick()
    return {name: getattr(settings, name) for name in ("sampler", "surrogate", "solver")}


class SlowToPrepare(Bowls):
    """Reads its checkpoints in the first evaluation, unless asked to before."""

    ready = False

    def prepare(self) -> None:
        if not self.ready:
            time.sleep(0.3)
        self.ready = True

    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        self.prepare()
        return super().evaluate(X, generator=generator)


def test_reading_checkpoints_does_not_count_against_the_time_limit() -> None:
    problem = SlowToPrepare()
    result = Run(problem, quick(6, timeout=0.2), MemoryStore()).drive()
    assert result.summary["failures"] == 0
    finished = MemoryStore()
    Run(Bowls(), quick(6), finished).drive()
    untouched = SlowToPrepare()
    Run(untouched, quick(6), finished).drive()
    assert not untouched.ready, "a finished run reads no checkpoints"


def test_too_many_failures_stop_the_run_and_keep_what_was_measured(tmp_path: Path) -> None:
    broken = Bowls(fails=lambda number, x: "no GPU" if number > 2 else None)
    settings = quick(10)
    store = JsonlStore.create(tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"3 of 5 evaluations failed.*no GPU"):
        Run(broken, settings, store).drive()
    run = Run(Bowls(), settings, JsonlStore.open(tmp_path / "run"))
    assert int(run.state.seen.ok.sum()) == 2
    assert run.reopen_failures() == 3
    result = run.drive()
    assert result.summary["failures"] == 0
    assert len(result.seen) == 8


def test_a_run_stops_only_above_the_allowed_share_of_failures() -> None:
    def failing(*numbers: int) -> Bowls:
        return Bowls(fails=lambda number, x: "no GPU" if number in numbers else None)

    half = Run(failing(2, 4, 6), quick(10), MemoryStore()).drive()  # at 6 it is exactly half
    assert (len(half.seen), half.summary["failures"]) == (8, 3)
    with pytest.raises(EvaluationError, match="4 of 7 evaluations failed"):
        Run(failing(2, 4, 6, 7), quick(10), MemoryStore()).drive()


def test_reopened_failures_end_the_checks_that_were_made_without_them() -> None:
    store = MemoryStore()
    rule = Stop(tolerance=1e-6, patience=2, least=5)  # never reached in so few evaluations
    settings = quick(12, stop=rule, max_failure_share=0.3)
    broken = Bowls(noise=0.1, fails=lambda number, x: "no GPU" if number in (6, 7, 8) else None)
    with pytest.raises(EvaluationError):
        Run(broken, settings, store).drive()
    run = Run(Bowls(noise=0.1), settings, store)
    before = run.state.checks
    assert [check["evaluations"] for check in before] == [5, 6, 7]
    assert run.reopen_failures() == 3
    assert len(run.state.checks) == 0
    stop = run.drive().summary["stop"]
    assert [count for count, _ in stop["series"]] == [8, 9]
    assert stop["floor"] != before[0]["floor"], "the floor is that of the first check that counts"


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda X, m: Observations(X, torch.full((1, 2), torch.nan), m), "NaN or infinity"),
        (
            lambda X, m: Observations(X, torch.tensor([[1.0, torch.nan]]), m),
            "returned NaN without a reason",
        ),
        (lambda X, m: Observations(X, torch.zeros(1, 3), m), "1 evaluations of 2 metrics"),
        (lambda X, m: Observations(X, torch.zeros(1, 1), m[:1]), "rows of"),
        (lambda X, m: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_problem_that_returns_nonsense_fails_and_the_run_goes_on(
    returned: Any, reason: str, bowls: Bowls, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bowls.evaluate

    def evaluate(X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        if X.tolist() == [[0.0, 0.0]]:
            return returned(X, bowls.metrics)  # type: ignore[no-any-return]
        return good(X, generator=generator)

    monkeypatch.setattr(bowls, "evaluate", evaluate)
    result = Run(bowls, quick(8), MemoryStore()).drive()
    assert reason in (result.seen.failures[0] or "")
    assert int(result.seen.ok.sum()) == len(result.seen) - 1


def test_another_run_directory_is_refused(tmp_path: Path, bowls: Bowls) -> None:
    optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **_parts())
    with pytest.raises(StoreError, match=r"settings.seed was 0 and is 1"):
        optimize(bowls, 8, seed=1, run_dir=tmp_path / "run", progress=False, **_parts())
    with pytest.raises(StoreError, match=r"problem.noise"):
        optimize(Bowls(noise=1.0), 8, run_dir=tmp_path / "run", progress=False, **_parts())


def test_files_may_move_between_the_parts_of_a_run(tmp_path: Path) -> None:
    first = optimize(Bowls(), 8, run_dir=tmp_path / "run", progress=False, **_parts())
    moved = Bowls(where="there")
    again = optimize(moved, 8, run_dir=tmp_path / "run", progress=False, **_parts())
    assert not moved.calls
    assert outcome(again) == outcome(first)


def test_a_wrong_reference_is_told_before_anything_is_evaluated(bowls: Bowls) -> None:
    for reference in ({"near a": 0.0}, {"near a": float("nan"), "far from b": 1.0}):
        with pytest.raises(ConfigError, match=r"must give one finite value|finite number, got nan"):
            Run(bowls, quick(8, reference=reference), MemoryStore())
    assert not bowls.calls


def test_failures_cannot_be_reopened_under_a_front() -> None:
    problem = Bowls(fails=lambda number, x: "boom" if x.tolist() == [1.0, 0.0] else None)
    run = Run(problem, quick(8), MemoryStore())
    run.drive()
    with pytest.raises(StoreError, match="so failed evaluations cannot be repeated"):
        run.reopen_failures()


def test_what_cannot_be_replayed_is_never_written(bowls: Bowls) -> None:
    store = MemoryStore()
    run = Run(bowls, quick(8), store)
    (index,) = run.ask(1)
    before = len(list(store.read()))
    other = Observations(torch.zeros(1, 2), torch.zeros(1, 1), (Metric("other"),))
    with pytest.raises(StoreError, match="belongs to another problem: it has"):
        run.tell(index, other)
    assert len(list(store.read())) == before
    run.tell(index, bowls.evaluate(run.state.X[:1], generator=torch.Generator()))
    with pytest.raises(StoreError, match="row 0 does not wait for an outcome"):
        run.tell(index, bowls.evaluate(run.state.X[:1], generator=torch.Generator()))


def test_a_verification_that_fails_is_tried_again_and_recorded(bowls: Bowls) -> None:
    tries: list[list[float]] = []

    def after_the_search(number: int, x: torch.Tensor) -> str | None:
        tries.append(x.tolist())
        return "late" if len(tries) == 7 else None

    store = MemoryStore()
    problem = Bowls(fails=after_the_search)
    result = Run(problem, quick(8, verify=2, retries=1), store).drive()
    assert [e.data["reason"] for e in store.read() if e.kind == "attempt"] == ["late"]
    assert int(result.front.verified.sum()) == 2


class Plain:
    """A user's sampler without a representation of its own."""

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: torch.Tensor | None = None,
        generator: torch.Generator,
    ) -> torch.Tensor:
        return space.sample(len(seen) + n, generator=child(generator, "plain"))[len(seen) :]


def test_a_plain_class_of_the_users_can_be_resumed(tmp_path: Path, bowls: Bowls) -> None:
    settings = {**_parts(), "sampler": Plain()}
    first = optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **settings)
    settings = {**_parts(), "sampler": Plain()}
    again = optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **settings)
    assert outcome(again) == outcome(first)
    assert again.model is not None, "choices are solved for their preference after a resume too"


def test_a_second_process_is_refused(tmp_path: Path, bowls: Bowls) -> None:
    store = JsonlStore.create(tmp_path / "run")
    with store.lock(), pytest.raises(StoreError, match="another process"):
        optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **_parts())


def test_a_run_directory_holds_what_people_look_for(tmp_path: Path, bowls: Bowls) -> None:
    optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **_parts())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"events.jsonl", "evaluations.csv", "front.csv", "summary.json", "report.html"} <= names
    assert list((tmp_path / "run" / "plots").glob("*.png"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reference_rule"] == "worst of base and experts"
    assert summary["reference_point"].keys() == {"near a", "far from b"}
    assert summary["versions"]["torch"] == torch.__version__


def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path, bowls: Bowls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("map_bo.loop.mirrors.write_report", broken)
    result = optimize(bowls, 8, run_dir=tmp_path / "run", progress=False, **_parts())
    assert len(result.front) > 0
    assert "no space left" in caplog.text


def test_a_budget_below_the_anchors_is_explained(bowls: Bowls) -> None:
    result = Run(bowls, quick(3, verify=0), MemoryStore()).drive()
    assert len(result.seen) == 3
    assert "fewer than the 4 of base" in result.summary["notes"][0]


@pytest.mark.parametrize("batch", [4, 100])
def test_the_last_batch_keeps_to_the_budget(bowls: Bowls, batch: int) -> None:
    result = Run(bowls, quick(9, verify=2, batch=batch), MemoryStore()).drive()
    assert (len(result.seen), len(result.verification)) == (7, 2)
    assert len(bowls.calls) == 9


def test_ask_and_tell_by_hand_equals_driving(bowls: Bowls) -> None:
    settings = quick(6, verify=0)
    driven = Run(bowls, settings, MemoryStore()).drive()
    by_hand = Run(bowls, settings, MemoryStore())
    for _ in range(6):
        (index,) = by_hand.ask(1)
        x = by_hand.state.X[index : index + 1]
        by_hand.tell(index, bowls.evaluate(x, generator=torch.Generator()))
    assert torch.equal(by_hand.drive().front.X, driven.front.X)
    with pytest.raises(StoreError, match="row 99 does not wait for an outcome"):
        by_hand.tell(99, by_hand.state.seen.select([0]))


def test_the_reference_point_can_be_given(bowls: Bowls) -> None:
    given = {"near a": -1.0, "far from b": 2.0}
    result = Run(bowls, quick(8, reference=given), MemoryStore()).drive()
    assert result.summary["reference_point"] == given
    assert result.scale.rule.startswith("given by the user")


@pytest.mark.parametrize("safe", [1.0, 2e7, -1e-9])
def test_a_metric_without_a_range_is_told_and_counts_in_no_hypervolume(safe: float) -> None:
    whole = Run(SafeBowls(safe=safe), quick(8), MemoryStore()).drive().summary
    without = Run(Bowls(), quick(8), MemoryStore()).drive().summary
    assert whole["hypervolume"] == pytest.approx(without["hypervolume"], rel=1e-6)
    assert whole["hypervolume"]["observed points"] > 0
    [note] = [note for note in whole["notes"] if "safe" in note]
    assert f"does not differ between base and experts ({safe:.4g})" in note
    assert not [note for note in without["notes"] if "differ" in note]


def test_a_threshold_above_the_best_expert_leaves_the_other_metrics_their_say() -> None:
    given = {"near a": 5.0, "far from b": 3.0}
    found = Run(Bowls(), quick(10, reference=given, verify=0), MemoryStore()).drive()
    assert found.summary["reference_point"] == given
    assert "is the range that was measured" in found.summary["reference_rule"]
    towards_b = found.choose({"near a": 1.0, "far from b": 20.0})
    assert float(towards_b.coefficients["b"]) > 0.8


def test_the_default_way_needs_no_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cma", "pymoo", "peft", "transformers", "huggingface_hub", "wandb_workspaces"):
        monkeypatch.setitem(sys.modules, package, None)
    result = optimize(digits_problem(2, epochs=1), 6, progress=False)
    assert len(result.front) > 0


@pytest.mark.parametrize(
    ("surrogate", "version", "said"),
    [(None, "0.1.0", 1), (None, "0.2.0", 0), (Quadratic(), "0.1.0", 0)],
)
def test_a_run_of_version_0_1_says_that_its_sampler_looks_through_another_surrogate_now(
    surrogate: Quadratic | None, version: str, said: int
) -> None:
    settings = Settings(budget=8, sampler=Adaptive(surrogate=surrogate))
    Run(Bowls(), settings, new := MemoryStore())
    [created] = new.read()
    old = MemoryStore()
    old.append(Event("created", {**created.data, "versions": {"map-bo": version}}))
    notes = [note for note in Run(Bowls(), settings, old).notes if "begun by map-bo 0.1.0" in note]
    assert len(notes) == said


class HalfBowls(Bowls):
    """One of the two metrics fails at some calls; the other is measured all the same."""

    lacks: dict[int, int] = {}  # noqa: RUF012

    def evaluate(self, X: torch.Tensor, *, generator: torch.Generator) -> Observations:
        seen = super().evaluate(X, generator=generator)
        column = self.lacks.get(len(self.calls))
        if column is None:
            return seen
        lacking = torch.zeros_like(seen.measured)
        lacking[0, column] = True
        return seen.without(lacking, f"{self.metrics[column].name}: RuntimeError: no")


def test_what_was_measured_of_a_failed_row_is_recorded_and_fitted(tmp_path: Path) -> None:
    problem = HalfBowls()
    problem.lacks = {5: 1, 6: 0}
    result = optimize_quickly(problem, tmp_path)
    assert result.seen.partial.tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert result.seen.Y[4, 0] == problem.true_values(result.seen.X)[4, 0]
    assert result.summary["failures"] == result.summary["partial"] == 2
    again = load_result(tmp_path)
    torch.testing.assert_close(again.seen.Y, result.seen.Y, equal_nan=True)
    assert result.model is not None
    whole = Quadratic().fit(result.seen.succeeded(), result.space)
    X = problem.space.sample(3, generator=make_generator(1))
    assert not torch.allclose(result.model.link_mean(X), whole.link_mean(X))
    text = (tmp_path / "evaluations.csv").read_text().splitlines()
    assert "near a: RuntimeError: no" in text[6]
    assert text[5].split(",")[2] == repr(float(result.seen.Y[4, 0]))


def optimize_quickly(problem: Bowls, path: Path) -> Result:
    settings = quick(8)
    return optimize(
        problem,
        8,
        run_dir=path,
        progress=False,
        sampler=settings.sampler,
        surrogate=settings.surrogate,
        solver=settings.solver,
        verify=0,
        retries=0,
    )


@pytest.mark.parametrize("killed", [False, True])
def test_a_retry_keeps_what_the_attempt_before_it_measured(killed: bool) -> None:
    problem = HalfBowls()
    problem.lacks = {5: 1, 6: 0}  # of the same point: together the attempts have both
    store, settings = MemoryStore(), quick(8, retries=1, verify=0)
    if killed:
        crashing = CrashingStore(store, 16, after=True)  # the attempt is the last event
        with pytest.raises(CrashError):
            Run(problem, settings, crashing).drive()
        assert [event.kind for event in store.read()][-1] == "attempt"
    seen = Run(problem, settings, store).drive().seen
    assert bool(seen.ok.all())
    assert torch.equal(seen.Y, problem.true_values(seen.X))
    assert len(problem.calls) == 9


class FixedBowls(Bowls):
    """The bowls with a third coefficient, which is fixed where the middle one is."""

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace(("a", "still", "b"), (0, 0.25, 0), (1, 0.25, 1))

    def true_values(self, X: Tensor) -> Tensor:
        assert bool((X[:, 1] == 0.25).all())
        return super().true_values(X[:, [0, 2]])


def test_a_run_with_a_fixed_coefficient_is_as_good_as_one_without_it() -> None:
    free = Run(Bowls(), quick(12), MemoryStore()).drive()
    fixed = Run(FixedBowls(), quick(12), MemoryStore()).drive()
    zero = torch.zeros(2).double()
    real = [
        hypervolume(free.scale.gains(Bowls().true_values(X)), zero)
        for X in (free.front.X, fixed.front.X[:, [0, 2]])
    ]
    assert real[1] == pytest.approx(real[0], rel=0.01)
    assert fixed.choose({"near a": 1}).coefficients["still"] == 0.25


def test_a_space_of_one_point_is_refused() -> None:
    class Still(Bowls):
        @property
        def space(self) -> CoefficientSpace:
            return CoefficientSpace.box(self.names, fixed={"a": 1, "b": 0.5})

    with pytest.raises(SpaceError, match=r"single point, \[1.0, 0.5\]") as caught:
        Run(Still(), quick(12), MemoryStore())
    assert "free" in str(caught.value.hint)
