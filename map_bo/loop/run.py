"""Driving a run: ask, evaluate, tell, refit; record every step, and resume after any break."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator

from map_bo.constraints import check_constraints
from map_bo.data import Observations
from map_bo.errors import (
    BudgetError,
    DataError,
    EvaluationError,
    StoreError,
    SurrogateError,
)
from map_bo.evaluators.isolation.world import callers_world, own_maths
from map_bo.loop.evaluation import evaluate_recorded, refuse_another_problem
from map_bo.loop.expected_gain import check_stopping
from map_bo.loop.front_posterior import with_uncertainty
from map_bo.loop.known import begin_with, has_begun, imported_of, notes_on_imported
from map_bo.loop.mirrors import trackers
from map_bo.loop.progress import Progress, Reporter, RichProgress, follow, silent
from map_bo.loop.recommend import (
    Recommendation,
    notes_on_constraints,
    notes_on_feasibility,
    recommend,
    refit,
)
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.loop.state import (
    RunState,
    advance,
    refuse_another,
    refuse_outcome,
    replay,
    run_identity,
)
from map_bo.loop.stopping import notes_on, stop_record
from map_bo.loop.summary import (
    ObservedVolume,
    last_set_aside,
    notes_on_bounds,
    outliers_of,
    summarise,
    versions,
)
from map_bo.loop.transfer.completing import completing
from map_bo.loop.transfer.sources import Known, take
from map_bo.problems.problem import Preparable, Problem
from map_bo.rng import child, make_generator
from map_bo.samplers.sampler import SeesThroughSurrogate, proposed
from map_bo.surrogates.outliers import Screening
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.rehearsal import is_foreign, rehearse
from map_bo.tracking.codec import encode_observations, encode_tensor
from map_bo.tracking.fresh import leaving_nothing
from map_bo.tracking.jsonl import JsonlStore, MemoryStore, absolute_directory
from map_bo.tracking.store import Event, RunStore, SharedStore
from map_bo.tracking.tracker import Tracker, Trackers, Tracking
from map_bo.values import whole_number

__all__ = ["ObservedVolume", "Run", "check_surrogates", "optimize"]

logger = logging.getLogger(__name__)


class Run:
    """A run over a store: its state is the replay of the store, and every step appends to it.

    ``ask`` and ``tell`` are for evaluations that happen elsewhere; :meth:`drive` does the whole run
    with the problem's own ``evaluate``. Several processes may ask and tell over one directory: each
    step waits for its turn and begins with what the others have recorded. Only one process drives.

    Args:
        problem: What to optimise.
        settings: How to optimise it.
        store: Where events go; a run that it already holds is resumed.
        config: Extra plain data to record (for example the resolved configuration).
        tracker: Receives every event once it has been recorded, those of the store first.

    Raises:
        StoreError: When the store holds a run of another problem or other settings.
        SpaceError: When the space holds a single point.
    """

    @own_maths()
    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        store: RunStore,
        *,
        config: Mapping[str, Any] | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.problem = problem
        self.settings = settings
        self.store = store
        self.generator: Generator = make_generator(settings.seed)
        self.notes: list[str] = []
        settings.check_reference([metric.name for metric in problem.metrics])
        check_constraints(settings.requirements.constraints, problem.metrics)
        settings.check_space(problem.space)
        anchors = len(problem.space.anchors())
        if settings.search < anchors:
            self.notes.append(
                f"the budget leaves {settings.search} evaluations for the search, fewer than the "
                f"{anchors} of base, experts and uniform blend, so a design that starts with these "
                "skips the last of them"
            )
        self._volume = self._observed_volume()
        self._trackers = Trackers([] if tracker is None else [tracker])
        self._count = 0
        self._driving = False
        events = list(store.read())
        over = any(event.kind == "finished" for event in events)
        identity = run_identity(problem, settings, finished=over)
        with ExitStack() as turn:
            if not events and isinstance(store, SharedStore):  # another may create it just now
                turn.enter_context(store.turn())
                events = store.after(0)
            recorded = next((event.data for event in events if event.kind == "created"), None)
            if recorded is not None:  # first: what is of another run cannot be replayed as this one
                refuse_another({"nested": recorded.get("nested")}, {"nested": None})
                refuse_another(recorded, identity)
            self.state: RunState = replay(events, problem.metrics, problem.space.d)
            self._aside = last_set_aside(events)  # by the fit behind the last proposal
            self._count = len(events)
            if recorded is None:
                self._record("created", {**identity, "versions": versions(), "config": config})
                return
        self._note_former_surrogate()
        for event in events:
            self._trackers.observe(event)

    def _note_former_surrogate(self) -> None:
        """Say so where the sampler of a run of version 0.1 looked through another surrogate."""
        sampler, state = self.settings.sampler, self.state
        version = str(state.created.get("versions", {}).get("map-bo", ""))
        if (
            version.startswith("0.1.")
            and state.front is None
            and isinstance(sampler, SeesThroughSurrogate)
            and sampler.surrogate is None
        ):
            self.notes.append(
                f"the run was begun by map-bo {version}, whose sampler looked through a quadratic "
                f"of its own; from evaluation {len(state.X) + 1} on, it looks through the "
                "run's surrogate"
            )

    def _observed_volume(self) -> ObservedVolume:
        settings = self.settings
        return ObservedVolume(
            self.problem.space, settings.reference, settings.requirements.constraints
        )

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Keep others from writing, and begin with what they have recorded.

        Raises:
            StoreError: When another process works on the run, or has written to it although this
                one is driving it.
        """
        if not isinstance(self.store, SharedStore):
            yield
            return
        with self.store.turn():
            news = self.store.after(self._count)
            if news and self._driving:
                raise StoreError(
                    f"another process has recorded {len(news)} events in this run, which this "
                    "process drives",
                    hint="drive a run in one process alone: stop the other one, and resume",
                )
            for event in news:
                self._take(event, advance(self.state, event))
            yield

    def _take(self, event: Event, after: RunState) -> None:
        self.state = after
        self._aside = last_set_aside([event], self._aside)
        self._count += 1
        self._trackers.observe(event)

    def _record(self, kind: str, data: Mapping[str, Any]) -> None:
        event = Event(kind, data)
        with self._turn():
            after = advance(self.state, event)  # before writing: the record must be replayable
            self.store.append(event)
            self._take(event, after)

    @own_maths()
    def ask(self, n: int) -> list[int]:
        """Propose up to ``n`` rows, record them, and return their indices in ``state.X``.

        There are fewer rows where the budget of the search leaves fewer.

        Raises:
            ConfigError: When ``n`` is not a whole number of at least 1.
            BudgetError: When the budget leaves no row.
            StoreError: When another process drives the run, or its front has been solved.
        """
        n = whole_number("the number of rows to ask for", n, least=1)
        with self._turn():
            if self.state.front is not None:
                raise StoreError(
                    "the front of this run has been solved, so no row can be proposed",
                    hint="start a new run with all observations: map_bo.optimize(..., known=...)",
                )
            room = self.settings.search - len(self.state.X)
            if room < 1:
                raise BudgetError(
                    f"all {self.settings.search} evaluations of the search have been proposed, "
                    f"and {len(self.state.pending)} of them wait for an outcome",
                    hint="tell the outcomes of `state.pending`, then call `drive()` for the front",
                )
            return self._propose(min(n, room))

    def _propose(self, n: int) -> list[int]:
        start = time.perf_counter()
        waiting = self.state.pending
        X, scores = proposed(
            self.settings.run_sampler,
            self.state.seen,
            self.problem.space,
            n,
            pending=self.state.X[waiting] if waiting else None,
            generator=child(self.generator, "propose"),
            requirements=self.settings.requirements,
        )
        first = len(self.state.X)
        X = self.problem.space.check(X)
        seconds = time.perf_counter() - start
        about = {"surrogate": dict(scores)} if scores else {}
        self._record("proposed", {"X": encode_tensor(X), "seconds": seconds, **about})
        return list(range(first, first + len(X)))

    @own_maths()
    def tell(self, index: int, outcome: Observations) -> None:
        """Record the outcome (one row) of the proposed row ``index``.

        Raises:
            DataError: When the outcome is not :class:`~map_bo.data.Observations`.
            StoreError: When the row was not proposed or has its outcome already, when the outcome
                belongs to another problem or another point, or when another process drives the
                run.
        """
        if not isinstance(outcome, Observations):
            raise DataError(
                f"an outcome must be Observations, got {type(outcome).__name__}",
                hint="tell map_bo.Observations(X=..., Y=..., metrics=...) of the one row",
            )
        with self._turn():
            waits = type(index) is not bool and index in self.state.pending
            if len(outcome) != 1 or not waits:
                raise StoreError(
                    f"row {index} cannot take {len(outcome)} outcomes"
                    if waits
                    else f"row {index} does not wait for an outcome",
                    hint=f"tell one outcome for one of the rows that wait: {self.state.pending}"
                    if self.state.pending
                    else "no row waits for an outcome: ask for rows first",
                )
            index = int(index)
            refuse_another_problem(index, outcome, self.problem)
            refuse_outcome(self.state, index, outcome)
            # What was proposed is what was measured, in whatever precision.
            outcome = dataclasses.replace(outcome, X=self.state.X[index : index + 1])
            data = {"index": index, "observation": encode_observations(outcome)}
            seen = self.state.seen.append(outcome)
            self._record("observed", {**data, **self._volume.after(seen, self._aside)})

    @own_maths()
    def reopen_failures(self) -> int:
        """Queue every failed evaluation of the search again; return how many there are.

        Raises:
            StoreError: When the front has been solved, because it rests on the evaluations.
        """
        with self._turn():
            return self._reopen_failures()

    def _reopen_failures(self) -> int:
        if self.state.front is not None:
            raise StoreError(
                "the front of this run has been solved, so failed evaluations cannot be repeated",
                hint="start a new run to evaluate them",
            )
        failed = [i for i, out in self.state.outcomes.items() if out.failures[0] is not None]
        if failed:
            self._record("reopened", {"indices": failed})
            self._volume = self._observed_volume()
        return len(failed)

    @own_maths()
    def drive(self, progress: Progress = silent) -> Result:
        """Do what is left of the run and return its result.

        Raises:
            EvaluationError: When too large a share of the evaluations failed.
            StoreError: When the record cannot be written.
        """
        with ExitStack() as alone:
            if isinstance(self.store, SharedStore):
                alone.enter_context(self.store.lock())
            with self._turn():
                self._driving = True
            alone.callback(setattr, self, "_driving", False)
            return self._drive(progress)

    def _drive(self, progress: Progress) -> Result:
        if not self.state.outcomes:
            check_surrogates(self.settings, self.problem)
        if self.state.summary is None and isinstance(self.problem, Preparable):
            with callers_world():
                self.problem.prepare()
        with follow(progress, self.settings.search + self.settings.verifications) as report:
            report.done(len(self.state.outcomes) + len(self.state.verified))
            while self._searching(report):
                room = self.settings.search - len(self.state.X)
                waiting = self.state.pending or self.ask(min(self.settings.batch, room))
                for index in waiting:
                    report.evaluating(f"evaluation {index + 1}")
                    outcome = self._attempts(self.state.X[index], "index", index)
                    self.tell(index, outcome)
                    if len(self.state.outcomes) == 1:  # in time to do something about it
                        for note in notes_on_bounds(outcome):
                            logger.warning("%s", note)
                    report.measured(outcome)
                    self._stop_on_failures(outcome)
            recommendation = None
            if self.state.front is None:
                report.evaluating("solving for the front")
                recommendation = self._recommend()
            for row in self.state.front_data["verify"]:
                if row not in self.state.verified:
                    report.evaluating(f"verifying front point {row}")
                    outcome = self._verify(row)
                    report.measured(outcome)
        return self._finish(recommendation)

    def _searching(self, report: Reporter) -> bool:
        """Return whether the search goes on; check the stopping rule first if a check is due."""
        state, stop, space = self.state, self.settings.stop, self.problem.space
        done = len(state.outcomes)
        if state.front is not None or state.stopped or done >= self.settings.search:
            return False
        due = not any(check["evaluations"] == done for check in state.checks)
        if stop is None or not due or state.pending or int(state.seen.ok.sum()) < stop.first(space):
            return True
        report.evaluating("checking whether the search can stop")
        try:
            check = check_stopping(
                state.seen, state.checks, space, self.settings, generator=self.generator
            )
        except SurrogateError as error:
            logger.warning("the stopping rule could not be checked: %s", error.reason)
            return True
        self._record("checked", check)
        if check["stop"]:
            logger.info("the search stops after %d evaluations: %s", done, check["stop"])
        return check["stop"] is None

    def _verify(self, row: int) -> Observations:
        assert self.state.front is not None
        outcome = self._attempts(self.state.front.X[row], "verify", row)
        self._record("verified", {"row": row, "observation": encode_observations(outcome)})
        return outcome

    def _attempts(
        self, x: torch.Tensor, name: Literal["index", "verify"], row: int
    ) -> Observations:
        """Measure ``x`` (``d``), again where it fails, and return its outcome."""
        searching = name == "index"
        while True:
            state, retries = self.state, self.settings.retries
            attempt = (state.attempts if searching else state.verify_attempts).get(row, 0)
            deaths = (state.deaths if searching else state.verify_deaths).get(row, 0)
            outcome, final = evaluate_recorded(
                completing(self.problem, state) if searching else self.problem,
                x,
                name={name: row},
                attempt=attempt,
                deaths=deaths,
                retries=retries,
                record=self._record,
                timeout=self.settings.timeout,
                generator=child(
                    self.generator, "evaluate" if searching else "verify", row, attempt
                ),
            )
            before = (state.attempted if searching else state.verify_attempted).get(row)
            outcome = outcome if before is None else before.completed_by(outcome)
            reason = outcome.failures[0]
            if reason is None or final or attempt >= retries:
                return outcome
            what = f"evaluation {row + 1}" if searching else f"verifying front point {row}"
            logger.warning("%s failed and is tried again: %s", what, reason)
            self._record("attempt", {name: row, "reason": reason, **_kept(outcome)})

    def _stop_on_failures(self, last: Observations) -> None:
        failed = sum(reason is not None for reason in self.state.seen.failures)
        total = len(self.state.outcomes)
        allowed = self.settings.max_failure_share
        if last.failures[0] is not None and failed >= 3 and failed > allowed * total:
            raise EvaluationError(
                f"{failed} of {total} evaluations failed, more than the allowed share of "
                f"{allowed:g}; the last: {last.failures[0]}",
                hint="fix the evaluator and resume the run (--retry-failed repeats the failed "
                "evaluations); all measurements are kept",
            )

    def _recommend(self) -> Recommendation:
        seen, space = self.state.seen, self.problem.space
        found = recommend(seen, space, self.settings, generator=self.generator)
        found = with_uncertainty(found, found.kept, space, self.settings, generator=self.generator)
        self._record("front", found.describe())
        return found

    def _correct(self) -> Screening | None:
        """Fit again with the verified points among the data, and record the new predictions.

        Where something failed, the points' probabilities of being feasible are recorded too.

        Returns:
            The fit, or None when nothing was verified or it cannot be done.
        """
        state = self.state
        try:
            again = refit(state, self.problem.space, self.settings.run_surrogate)
        except SurrogateError as error:
            self.notes.append(f"the predictions could not be corrected: {error.reason}")
            return None
        front = state.front
        done = state.summary is not None or front is None or bool(front.corrected.isfinite().any())
        if front is not None and not done and len(state.verification):
            found = {}
            if again is not None:
                found["corrected"] = encode_tensor(predict(again.model, front.X).mean)
            fitted = (
                self.settings.run_surrogate.fit(state.seen, self.problem.space)
                if again is None
                else again.model
            )
            feasibility = self.settings.requirements.given(state.data, self.problem.space, fitted)
            if feasibility is not None:
                with torch.no_grad():
                    found["feasible"] = encode_tensor(feasibility.probability(front.X))
            if found:
                self._record("corrected", found)
        return again

    def _finish(self, found: Recommendation | None) -> Result:
        again = self._correct()
        state = self.state
        directory = self.store.directory if isinstance(self.store, JsonlStore) else None
        aside = outliers_of(state, None if again is None else again.outliers)
        result = Result.of(
            state,
            self.problem.space,
            problem=self.problem,
            model=self.settings.run_surrogate.fit(state.seen, self.problem.space)
            if found is None
            else found.model,
            refitted=None if again is None else again.model,
            run_dir=directory,
            outliers=aside,
        )
        if state.summary is not None:
            return result
        unused = self.settings.search - len(state.outcomes)
        stop = stop_record(self.settings.stop, state.checks, unused)
        summary = summarise(
            front=result.front,
            seen=result.seen,
            verification=result.verification,
            space=result.space,
            scale=result.scale,
            settings=self.settings,
            optimism=result.optimism(),
            uncertainty=result.uncertainty(),
            stop=stop,
            surrogate=state.front_data["surrogate"],
            seconds={
                "propose": state.proposing,
                "evaluate": float(torch.cat([result.seen.cost, result.verification.cost]).sum()),
                **state.front_data["seconds"],
                **({"stop": sum(x["seconds"] for x in state.checks)} if state.checks else {}),
            },
            notes=[
                *self.notes,
                *result.scale.notes(),
                *notes_on_constraints(self.settings.requirements),
                *notes_on_feasibility(result.front, self.settings.requirements),
                *notes_on_imported(state),
                *notes_on(stop),
                *(outlier.note() for outlier in aside),
            ],
            outliers=aside,
        )
        summary |= imported_of(state)
        self._record("finished", {"summary": summary})
        return dataclasses.replace(result, summary=summary)


def _kept(outcome: Observations) -> dict[str, Any]:
    """Return what an attempt that failed has measured all the same, for its event."""
    if not bool(outcome.partial.any()):
        return {}
    return {"observation": encode_observations(outcome)}


def check_surrogates(settings: Settings, problem: Problem) -> None:
    """Try out the surrogates of somebody else's that a run is to use; see `rehearse`.

    Raises:
        SurrogateError: When one of them would fail once the evaluations were paid for.
    """
    used = [settings.surrogate]
    if isinstance(settings.sampler, SeesThroughSurrogate) and settings.sampler.surrogate:
        used.append(settings.sampler.surrogate)
    for surrogate in used:
        if is_foreign(surrogate):
            rehearse(surrogate, problem.space, problem.metrics)


@own_maths()
def optimize(
    problem: Problem,
    budget: int,
    *,
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: bool | Progress = True,
    known: Known | None = None,
    config: Mapping[str, Any] | None = None,
    tracking: str | Tracking | Sequence[str | Tracking] = "local",
    **settings: Any,
) -> Result:
    """Find the Pareto front of a problem in ``budget`` evaluations.

    Args:
        problem: What to optimise.
        budget: Number of evaluations. It includes the final verification of front points (10 %,
            at most 8); see ``verify`` and ``verify_extra`` of :class:`Settings`.
        seed: The same seed gives the same run.
        run_dir: Where to record the run. When it already holds this same run, the run is resumed,
            or returned if it had finished. None keeps the record in memory.
        progress: Whether to show a progress bar.
        known: What an older study has measured, recorded at the start of a new run; its rows count
            in the budget. Observations, a :class:`Result`, the directory of a run, a CSV file, or
            :class:`map_bo.StartFrom` with a mapping of names. Experts and metrics may have been
            added since: old points have 0 for a new expert, and a new metric was not measured
            there. Anchors that the study lacks are measured first.
        config: Extra plain data to record with the run.
        tracking: Mirrors of the record: ``"none"``, ``"local"`` (tables, plots and a page in
            ``run_dir``), ``"wandb"``, settings such as
            :class:`map_bo.tracking.wandb.mirror.Wandb`, or several of these.
        **settings: Any other field of :class:`Settings`: ``sampler``, ``surrogate``, ``solver``,
            ``batch``, ``verify``, ``guard``, ``retries``, ``timeout`` ...

    Returns:
        The front and all measurements.

    Raises:
        ConfigError: On an unknown setting, or a value of the wrong type.
        BudgetError: When the budget is too small for a front.
        EvaluationError: When too many evaluations failed.
        StoreError: When ``run_dir`` holds another run, is in use, or cannot be written.
    """
    chosen = Settings.checked(budget=budget, seed=seed, **settings)
    bar = progress if isinstance(progress, Progress) else (RichProgress() if progress else silent)

    # Before the store: refused observations leave no run behind.
    begun = run_dir is not None and has_begun(absolute_directory(run_dir))
    taken = None if known is None or begun else take(known, problem)

    def run(store: RunStore, tracker: Tracker) -> Result:
        if taken is not None:
            state = Run(problem, chosen, store, config=config).state
            begin_with(taken, store, state, problem.space, chosen.search)
        return Run(problem, chosen, store, config=config, tracker=tracker).drive(bar)

    if run_dir is None:
        with trackers(tracking, None) as tracker:
            return run(MemoryStore(), tracker)
    directory = absolute_directory(run_dir)
    mirrors = trackers(tracking, directory)  # before the store: a wrong name leaves no run behind
    exists = (directory / "events.jsonl").exists()
    with leaving_nothing(directory, fresh=not exists):
        store = JsonlStore.open(directory) if exists else JsonlStore.create(directory)
        with store.lock(), mirrors as tracker:
            return run(store, tracker)
