"""Driving a run: ask, evaluate, tell, refit; record every step, and resume after any break."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch

from map_bo.constraints import check_constraints
from map_bo.data import Observations
from map_bo.errors import BudgetError, StoreError, SurrogateError
from map_bo.evaluators.isolation.world import callers_world, own_maths
from map_bo.examples.sets import Part
from map_bo.loop import growth
from map_bo.loop.driving.scoring import Scoring, tell_cost
from map_bo.loop.driving.steps import Steps, closing_workers, open_workers, together
from map_bo.loop.identity import refuse_another, refuse_other_examples, run_identity
from map_bo.loop.outcomes import check_told
from map_bo.loop.posterior.expected_gain import check_stopping
from map_bo.loop.posterior.front_posterior import with_uncertainty
from map_bo.loop.progress import Progress, Reporter, follow, silent
from map_bo.loop.recommend import Recommendation, corrections, recommend
from map_bo.loop.result import Result
from map_bo.loop.settings import Settings
from map_bo.loop.state import RunState, advance, refuse_outcome, replay
from map_bo.loop.stopping import refuse_failures
from map_bo.loop.summary import (
    ObservedVolume,
    last_set_aside,
    notes_on_anchors,
    notes_on_bounds,
    notes_on_former_surrogate,
    outliers_of,
    summary_of,
    versions,
)
from map_bo.loop.transfer.completing import completing
from map_bo.problems.problem import Preparable, Problem
from map_bo.rng import child, make_generator
from map_bo.samplers.sampler import proposed
from map_bo.surrogates.outliers import Screening
from map_bo.tracking.codec import encode_observations, encode_parts, encode_tensor
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event, RunStore, SharedStore
from map_bo.tracking.tracker import Tracker, Trackers
from map_bo.values import whole_number
from map_bo.workers.attempts import Attempts, Ended
from map_bo.workers.evaluation import refuse_another_problem
from map_bo.workers.flights import Flights
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.workers import Workers

__all__ = ["ObservedVolume", "Run"]

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
        self.generator: torch.Generator = make_generator(settings.seed)
        self.notes: list[str] = []
        settings.check_reference([metric.name for metric in problem.metrics])
        check_constraints(settings.requirements.constraints, problem.metrics)
        settings.check_space(problem.space)
        self.notes += notes_on_anchors(settings, problem.space)
        self._volume = self._observed_volume()
        self._trackers = Trackers([] if tracker is None else [tracker])
        self._count, self._driving = 0, False
        self._scoring: Scoring | None = None
        self._spent_up = False
        events = list(store.read())
        over, changes = growth.is_over(events), False
        identity = run_identity(problem, settings, finished=over)
        with ExitStack() as turn:
            if not events and isinstance(store, SharedStore):  # another may create it just now
                turn.enter_context(store.turn())
                events = store.after(0)
            recorded: Mapping[str, Any] | None = growth.created_in_force(events)
            if recorded is not None:  # first: what is of another run cannot be replayed as this one
                refuse_another({"nested": recorded.get("nested")}, {"nested": None})
                recorded, changes = growth.recorded_as(recorded, identity)
                if over and changes:  # something may be measured after all
                    identity = run_identity(problem, settings)
                refuse_another(recorded, identity)
            self.state: RunState = replay(events, problem.metrics, problem.space.d)
            self._aside = last_set_aside(events)  # by the fit behind the last proposal
            self._count = len(events)
            if recorded is None:
                self._record("created", {**identity, "versions": versions(), "config": config})
                return
        self.notes += notes_on_former_surrogate(self.state, settings.sampler)
        for event in events:
            self._trackers.observe(event)
        if changes:
            self._extend(growth.keep_grown_budget(settings, self.state))

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
        if event.kind == "extended":
            self.settings = growth.adopt(self.settings, event.data)
            self._volume = self._observed_volume()
        self._aside = last_set_aside([event], self._aside)
        self._count += 1
        self._trackers.observe(event)

    def _record(self, kind: str, data: Mapping[str, Any]) -> None:
        event = Event(kind, data)
        with self._turn():
            after = advance(self.state, event)  # before writing: the record must be replayable
            self.store.append(event)
            self._take(event, after)

    def extend(self, *, config: Mapping[str, Any] | None = None, **changes: Any) -> None:
        """Change settings of the run, whether it has finished or not; nothing is evaluated.

        Where the search had ended and its budget grows, it goes on with all that was measured, the
        verified points of its front included, and the front is solved anew.

        Args:
            config: Changes of the recorded configuration: key -> ``from`` and ``to``.
            **changes: Those of :data:`.growth.MAY_CHANGE`, such as ``budget=48``.

        Raises:
            ConfigError: On a setting that may not change, or a value that is not possible.
            BudgetError: When less is left for the search than what has been paid for.
        """
        growth.refuse_unchangeable(changes)
        self._extend(dataclasses.replace(self.settings, **changes), config)

    def _extend(self, settings: Settings, config: Mapping[str, Any] | None = None) -> None:
        with self._turn():
            if (data := growth.extension(settings, self.state, config)) is not None:
                refuse_other_examples(data, self.store.read(), self.problem)
                growth.remove_old_report(data, self.store)
                self._record("extended", data)
            self.settings = settings

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
                    hint="extend it: run.extend(budget=N), or `map-bo resume RUN loop.budget=N`",
                )
            begun = sum(i in self.state.planned for i in self.state.pending)
            room = self.settings.search - self.state.committed - begun
            if room < 1:
                raise BudgetError(
                    f"all {self.settings.search} evaluations of the search have been proposed, "
                    f"and {len(self.state.pending)} of them wait for an outcome",
                    hint="tell the outcomes of `state.pending`, then call `drive()` for the front",
                )
            return self._propose(min(n, room))

    def _propose(self, n: int, parts: Sequence[Part] = ()) -> list[int]:
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
        about: dict[str, Any] = {"surrogate": dict(scores)} if scores else {}
        if parts:
            about["parts"] = encode_parts(parts)
        self._record("proposed", {"X": encode_tensor(X), "seconds": seconds, **about})
        return list(range(first, first + len(X)))

    @own_maths()
    def tell(self, index: int, outcome: Observations | Mapping[str, Any]) -> None:
        """Record the outcome of the proposed row ``index``: one row, or its values by name.

        Raises:
            DataError: When it is neither :class:`~map_bo.data.Observations` nor what
                :func:`map_bo.loop.outcomes.outcome_of` reads.
            StoreError: When the row was not proposed or has its outcome already, when the outcome
                belongs to another problem or another point, or when another process drives the
                run.
        """
        with self._turn():
            index, outcome = check_told(index, outcome, self.state)
            refuse_another_problem(index, outcome, self.problem)
            refuse_outcome(self.state, index, outcome)
            # What was proposed is what was measured, in whatever precision.
            outcome = dataclasses.replace(outcome, X=self.state.X[index : index + 1])
            data = {"index": index, "observation": encode_observations(outcome)}
            if self._scoring is not None and (parts := self._scoring.flying.pop(index, ())):
                share = self._scoring.share(parts, self.state)
                data |= {"parts": encode_parts(parts), "share": share}
            seen = self.state.seen.append(outcome)
            self._record("observed", {**data, **self._volume.after(seen, self._aside)})

    @own_maths()
    def reopen_failures(self) -> int:
        """Queue every failed evaluation of the search again; return how many there are.

        Raises:
            StoreError: When the front has been solved, because it rests on the evaluations.
        """
        with self._turn():
            if self.state.front is not None:
                raise StoreError(
                    "the front has been solved, so failed evaluations cannot be repeated",
                    hint="extend it too: `map-bo resume RUN loop.budget=N --retry-failed`",
                )
            failed = [i for i, out in self.state.outcomes.items() if out.failures[0] is not None]
            if failed:
                self._record("reopened", {"indices": failed})
                self._volume = self._observed_volume()
            return len(failed)

    @own_maths()
    def drive(self, progress: Progress = silent, *, workers: Workers | None = None) -> Result:
        """Do what is left of the run and return its result.

        Args:
            progress: Shows what is being done.
            workers: Who evaluates; by default those of the settings, opened for this run.

        Raises:
            EvaluationError: When too large a share of the evaluations failed.
            StoreError: When the record cannot be written.
            WorkersError: When workers cannot be started, or are out of reach.
        """
        with self.alone():
            total = self.settings.search + self.settings.verifications
            with self._opened(workers) as held, follow(progress, total) as report:
                flights = Flights(held)
                [recommendation] = together([self.steps(flights, report)], flights, report)
            spent = {} if self._scoring is None else self._scoring.describe(self.state)
            return self.conclude(recommendation, **flights.describe(), **spent)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Drive the run in the block: no other process does, and others' writing is refused."""
        with ExitStack() as stack:
            if isinstance(self.store, SharedStore):
                stack.enter_context(self.store.lock())
            with self._turn():
                self._driving = True
            stack.callback(setattr, self, "_driving", False)
            yield

    @contextmanager
    def _opened(self, workers: Workers | None) -> Iterator[Workers]:
        if not self.state.outcomes:
            self.settings.rehearse(self.problem.space, self.problem.metrics)
        given = self.settings.workers
        assert not isinstance(given, int)  # settings of workers, since they were read
        if workers is not None or given is None or self.state.summary is not None:
            here = InlineWorkers(completing(self.problem, self.state))
            held: Workers = here if workers is None else workers
            if held.local and self.state.summary is None and isinstance(self.problem, Preparable):
                with callers_world():
                    self.problem.prepare()
            yield held
            return
        with callers_world():
            held = open_workers(given, self.problem)
        with closing_workers(held):
            yield held

    def steps(
        self, flights: Flights, report: Reporter, *, node: str = ""
    ) -> Steps[Recommendation | None]:
        """Do what is left of the run up to the verification of its front, step by step.

        It yields whenever it waits for evaluations, so that other runs can use the same workers
        meanwhile; see :func:`map_bo.loop.driving.steps.together`.

        Returns:
            The front that was solved; None where it had been solved before.
        """
        settings = self.settings
        attempts = Attempts(
            completing(self.problem, self.state),
            flights,
            generator=self.generator,
            record=self._record,
            retries=settings.retries,
            timeout=settings.timeout,
            node=node,
        )
        if settings.scores_parts and self.state.summary is None:
            self._scoring, self._spent_up = Scoring(self.problem, settings), False
        try:
            report.done(len(self.state.outcomes) + len(self.state.verified))
            tell_cost(report, self.state, self._scoring)
            while self._searching(report, attempts) or attempts.in_flight("index"):
                self._begin_evaluations(attempts, report)
                yield
                self._settle(attempts, report)
            recommendation = None
            if self.state.front is None:
                report.evaluating("solving for the front")
                recommendation = self._recommend()
            chosen: list[int] = self.state.front_data["verify"]
            while waiting := [row for row in chosen if row not in self.state.verified]:
                flying = attempts.in_flight("verify")
                for row in [row for row in waiting if row not in flying][: attempts.free]:
                    report.evaluating(f"verifying front point {row}")
                    self._begin(attempts, "verify", row)
                yield
                self._settle(attempts, report)
        except BaseException as error:
            if not isinstance(error, StoreError):  # what has been measured meanwhile is kept
                with suppress(Exception):
                    self._settle(attempts, report)
            attempts.interrupt()
            raise
        return recommendation

    def _begin_evaluations(self, attempts: Attempts, report: Reporter) -> None:
        """Begin attempts while workers are free: of rows that wait, then of new ones."""
        while attempts.free and self._goes_on:
            flying = attempts.in_flight("index")
            waiting = [row for row in self.state.pending if row not in flying]
            if not waiting and self._scoring is not None:
                if not self._begin_scoring(attempts, report, self._scoring):
                    return
                continue
            if not waiting:
                room = self.settings.search - len(self.state.X)
                together = self.settings.is_asynchronous(attempts.flights.workers.size)
                n = min(attempts.free if together else self.settings.batch, room)
                if n < 1 or (flying and not together):
                    return
                report.evaluating(f"proposing evaluation {len(self.state.X) + 1}")
                begun = time.perf_counter()
                waiting = self.ask(n)
                attempts.flights.look_ahead(time.perf_counter() - begun if together else 0.0)
            for row in waiting[: attempts.free]:
                report.evaluating(f"evaluation {row + 1}")
                self._begin(attempts, "index", row)

    def _begin_scoring(self, attempts: Attempts, report: Reporter, scoring: Scoring) -> bool:
        """Begin what the allocation says comes next; return whether there was anything."""
        flying = attempts.in_flight("index")
        together = self.settings.is_asynchronous(attempts.flights.workers.size)
        if flying and not together:
            return False
        begun = 0
        while attempts.free and (together or begun < self.settings.batch):
            report.evaluating("choosing examples")
            action = scoring.next(self.state, self.generator)
            if action is None:
                self._spent_up = not scoring.flying
                break
            row = self._propose(1, action.parts)[0] if action.row is None else action.row
            report.evaluating(action.words(row))
            self._begin(attempts, "index", row, action.parts)
            begun += 1
        return begun > 0 and together

    def _begin(
        self,
        attempts: Attempts,
        kind: Literal["index", "verify"],
        row: int,
        parts: Sequence[Part] = (),
    ) -> None:
        state, scoring = self.state, self._scoring
        searching = kind == "index"
        assert searching or state.front is not None
        if scoring is not None:
            parts = parts or (scoring.first(state, row) if searching else scoring.everything)
            if searching:
                scoring.flying[row] = tuple(parts)
        attempts.begin(
            kind,
            row,
            state.X[row] if state.front is None or searching else state.front.X[row],
            attempt=(state.attempts if searching else state.verify_attempts).get(row, 0),
            deaths=(state.deaths if searching else state.verify_deaths).get(row, 0),
            parts=parts or None,
            metrics=scoring.metrics(parts) if scoring is not None else None,
            order=self.settings.seed,
        )

    def _settle(self, attempts: Attempts, report: Reporter) -> None:
        """Record the attempts that have ended, as outcomes or as ones to be repeated."""
        told: list[tuple[Sequence[str | None], Observations]] = []
        for ended in attempts.ended():
            if ended.kind == "index" and ended.row in self.state.outcomes:
                self._take_more(ended)
                report.measured(ended.outcome)
                continue
            outcome = self._outcome(ended)
            if outcome is None:
                continue
            if ended.kind == "index":
                self.tell(int(ended.row), outcome)
                if len(self.state.outcomes) == 1:  # in time to do something about it
                    for note in notes_on_bounds(outcome):
                        logger.warning("%s", note)
            else:
                data = {"row": ended.row, "observation": encode_observations(outcome)}
                self._record("verified", data)
            report.measured(outcome)
            if ended.kind == "index":
                told.append((self.state.seen.failures, outcome))
        tell_cost(report, self.state, self._scoring)
        for failures, outcome in told:  # once everything that has ended is recorded
            refuse_failures(failures, outcome, self.settings.max_failure_share)

    def _outcome(self, ended: Ended) -> Observations | None:
        """Return the outcome of a row whose attempt has ended; None where it is tried again."""
        state, row, searching = self.state, int(ended.row), ended.kind == "index"
        attempt = (state.attempts if searching else state.verify_attempts).get(row, 0)
        before = (state.attempted if searching else state.verify_attempted).get(row)
        outcome = ended.outcome if before is None else before.completed_by(ended.outcome)
        reason = outcome.failures[0]
        # One death of a worker alone never costs a point.
        retries = max(1, self.settings.retries) if ended.lost else self.settings.retries
        if reason is None or ended.given_up or attempt >= retries:
            return outcome
        what = f"evaluation {row + 1}" if searching else f"verifying front point {row}"
        logger.warning("%s failed and is tried again: %s", what, reason)
        self._record("attempt", {ended.kind: row, "reason": reason, **_kept(outcome)})
        return None

    def _take_more(self, ended: Ended) -> None:
        """Record that a row was measured on further examples, or that this failed."""
        assert self._scoring is not None
        row, least = int(ended.row), 1 if ended.lost else 0
        again = self.state.attempts.get(row, 0) < max(least, self.settings.retries)
        again = again and not ended.given_up
        self._record(*self._scoring.more(row, self.state, ended.outcome, again=again))

    @property
    def _goes_on(self) -> bool:
        """Whether the search has neither been stopped nor used up its budget."""
        state = self.state
        done = self._spent_up or (
            self._scoring is None and len(state.outcomes) >= self.settings.search
        )
        return state.front is None and not state.stopped and not done

    def _searching(self, report: Reporter, attempts: Attempts) -> bool:
        """Return whether the search goes on; check the stopping rule first if a check is due."""
        if not self._goes_on:
            return False
        state, stop, space = self.state, self.settings.stop, self.problem.space
        done = len(state.outcomes)
        due = not any(check["evaluations"] == done for check in state.checks)
        # Asynchronously, something is always being evaluated.
        waiting = len(state.pending) > len(attempts.in_flight("index")) or (
            state.pending and not self.settings.is_asynchronous(attempts.flights.workers.size)
        )
        if stop is None or not due or waiting or int(state.seen.ok.sum()) < stop.first(space):
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

    def _recommend(self) -> Recommendation:
        seen, space = self.state.seen, self.problem.space
        found = recommend(seen, space, self.settings, generator=self.generator)
        found = with_uncertainty(found, found.kept, space, self.settings, generator=self.generator)
        self._record("front", found.describe())
        return found

    def _correct(self) -> Screening | None:
        """Record the corrections of the front; return the fit, or None where there is none."""
        again, found, note = corrections(self.state, self.problem.space, self.settings)
        if note is not None:
            self.notes.append(note)
        if found:
            self._record("corrected", found)
        return again

    def conclude(self, found: Recommendation | None, **told: Any) -> Result:
        """Return the result when all steps are done, and record the summary.

        Args:
            found: What the steps returned.
            told: What else the summary holds.
        """
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
        summary = summary_of(result, state, self.settings, self.notes, aside)
        summary |= told | result.brief_verdict()
        self._record("finished", {"summary": summary})
        return dataclasses.replace(result, summary=summary)


def _kept(outcome: Observations) -> dict[str, Any]:
    """Return what an attempt that failed has measured all the same, for its event."""
    if not bool(outcome.partial.any()):
        return {}
    return {"observation": encode_observations(outcome)}
