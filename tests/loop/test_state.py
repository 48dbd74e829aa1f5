from __future__ import annotations

import pytest
import torch

from map_bo.data import Front, Metric, Observations
from map_bo.errors import AnotherRunError, StoreError
from map_bo.loop.identity import difference, refuse_another
from map_bo.loop.state import advance, replay, replay_whole
from map_bo.scale import Scale
from map_bo.tracking.codec import (
    encode_front,
    encode_observations,
    encode_scale,
    encode_tensor,
)
from map_bo.tracking.store import Event

METRICS = (Metric("a"),)
PROPOSED = Event("proposed", {"X": encode_tensor(torch.eye(2)), "seconds": 1.0})


def outcome(value: float, *indices: int) -> dict[str, object]:
    X = torch.eye(2)[list(indices) or [0]]
    return encode_observations(Observations(X, torch.full((len(X), 1), value), METRICS))


def test_a_state_is_the_replay_of_its_events() -> None:
    observed = Event("observed", {"index": 1, "observation": outcome(0.25, 1)})
    state = replay([PROPOSED, observed], METRICS, 2)
    assert state.pending == [0]
    assert state.seen.Y.tolist() == [[0.25]]
    assert state.proposing == 1.0


def test_an_unknown_kind_is_refused_and_one_of_a_nested_run_changes_nothing() -> None:
    state = replay([PROPOSED], METRICS, 2)
    with pytest.raises(StoreError, match="there is no event 'celebrated'"):
        advance(state, Event("celebrated", {"with": "cake"}))
    assert advance(state, Event("measured", {"names": []})) is state


def test_failed_rows_that_are_reopened_wait_again_and_lose_their_checks() -> None:
    failed = Observations.failed(torch.eye(2)[:1], METRICS, "boom")
    events = [
        PROPOSED,
        Event("attempt", {"index": 0, "reason": "boom"}),
        Event("observed", {"index": 0, "observation": encode_observations(failed)}),
        Event("observed", {"index": 1, "observation": outcome(0.5, 1)}),
        Event("checked", {"evaluations": 2, "gain": 0.1, "stop": "small enough"}),
    ]
    state = replay(events, METRICS, 2)
    assert (state.stopped, state.attempts) == ("small enough", {0: 1})
    state = advance(state, Event("reopened", {"indices": [0]}))
    assert (state.stopped, state.attempts, state.pending) == (None, {}, [0])


def test_what_a_reopened_row_has_measured_is_kept() -> None:
    both = (*METRICS, Metric("b"))
    Y = torch.tensor([[0.5, torch.nan]])
    half = Observations(torch.eye(2)[:1], Y, both, failures=("boom",))
    events = [PROPOSED, Event("observed", {"index": 0, "observation": encode_observations(half)})]
    state = advance(replay(events, both, 2), Event("reopened", {"indices": [0]}))
    assert state.pending[0] == 0
    assert state.attempted[0].Y[0, 0] == 0.5


def test_imported_rows_must_continue_the_numbers_of_the_record() -> None:
    data = {"observations": outcome(0.5, 0), "source": {"from": "ax"}}
    state = replay([PROPOSED, Event("imported", {"indices": [2], **data})], METRICS, 2)
    assert state.imported == {2: {"from": "ax"}}
    with pytest.raises(StoreError, match=r"event 2 .*imported rows have numbers \[3\]"):
        replay([PROPOSED, Event("imported", {"indices": [3], **data})], METRICS, 2)


def test_an_event_without_its_data_is_named() -> None:
    with pytest.raises(StoreError, match=r"event 2 \('observed'\) of the run cannot be read"):
        replay([PROPOSED, Event("observed", {"index": 0})], METRICS, 2)


ONES = torch.ones(2, 1)
FRONT = {
    "front": encode_front(Front(torch.eye(2), ONES, ONES, ONES, ONES, METRICS)),
    "verify": [1],
    "reference": encode_scale(Scale(METRICS, torch.zeros(1), torch.ones(1), "given")),
    "surrogate": {},
    "seconds": {},
}
HUGE = 10**400
NO_INDEX = [2, -1, HUGE, 1.0, True, "0", None, [0]]


@pytest.mark.parametrize("index", NO_INDEX)
@pytest.mark.parametrize("kind", ["observed", "started", "interrupted", "attempt"])
def test_an_index_that_was_not_proposed_is_refused(kind: str, index: object) -> None:
    data = {"index": index, "observation": outcome(0.5, 0), "reason": "boom"}
    with pytest.raises(StoreError, match=rf"event 2 \('{kind}'\)"):
        replay([PROPOSED, Event(kind, data)], METRICS, 2)


@pytest.mark.parametrize("row", NO_INDEX)
@pytest.mark.parametrize("solved", [True, False])
def test_a_verified_row_that_is_not_in_the_front_is_refused(row: object, solved: bool) -> None:
    events = [PROPOSED, *[Event("front", FRONT)] * solved]
    for event in (
        Event("verified", {"row": row, "observation": outcome(0.5, 0)}),
        Event("started", {"verify": row, "attempt": 0}),
    ):
        with pytest.raises(StoreError, match=r"is not one of . front points"):
            replay([*events, event], METRICS, 2)


def test_no_outcome_is_overwritten_and_none_is_of_another_point() -> None:
    first = Event("observed", {"index": 1, "observation": outcome(0.25, 1)})
    with pytest.raises(StoreError, match="it has one, and no outcome is overwritten"):
        replay([PROPOSED, first, first], METRICS, 2)
    other = Event("observed", {"index": 0, "observation": outcome(0.25, 1)})
    with pytest.raises(
        StoreError, match=r"measured at \[0.0, 1.0\], and \[1.0, 0.0\] was proposed"
    ):
        replay([PROPOSED, other], METRICS, 2)
    two = Event("observed", {"index": 0, "observation": outcome(0.25, 0, 1)})
    with pytest.raises(StoreError, match="an outcome has 2 rows"):
        replay([PROPOSED, two], METRICS, 2)
    imported = {"indices": [1], "observations": outcome(0.5, 1), "source": {}}
    with pytest.raises(StoreError, match="no outcome is overwritten"):
        replay([PROPOSED, first, Event("imported", imported)], METRICS, 2)
    verified = Event("verified", {"row": 1, "observation": outcome(0.25, 1)})
    with pytest.raises(StoreError, match="verified a second time"):
        replay([PROPOSED, Event("front", FRONT), verified, verified], METRICS, 2)


@pytest.mark.parametrize(
    "event",
    [
        Event("created", {"settings": None}),
        Event("created", {"config": 5}),
        Event("created", {"config": {"tree": 5}}),
        Event("created", {"config": {"cwd": 5}}),
        Event("created", {"nested": 5}),
        Event("created", {"versions": []}),
        Event("proposed", {"X": [[HUGE, 0]], "seconds": 0}),
        Event("proposed", {"X": [[None, 0]], "seconds": 0}),
        Event("proposed", {"X": [[0, 0, 0]], "seconds": 0}),
        Event("proposed", {"X": [[0, 0]], "seconds": HUGE}),
        Event("proposed", {"X": [[0, 0]], "seconds": "1"}),
        Event("observed", {"index": 0, "observation": 5}),
        Event("observed", {"index": 0, "observation": {**outcome(0.5, 0), "d": None}}),
        Event("reopened", {"indices": [0]}),
        Event("reopened", {"indices": 0}),
        Event("imported", {"indices": [0, 0], "observations": outcome(0.5, 0, 0), "source": {}}),
        Event("imported", {"indices": [0], "observations": outcome(0.5, 0), "source": 5}),
        Event("front", {**FRONT, "reference": "x"}),
        Event("front", {**FRONT, "reference": None}),
        Event("front", {**FRONT, "verify": [2]}),
        Event("front", {**FRONT, "verify": 1}),
        Event("front", {**FRONT, "surrogate": "x"}),
        Event("front", {**FRONT, "seconds": None}),
        Event("corrected", {"corrected": [[1.0], [1.0]]}),
        Event("checked", {"evaluations": 0, "stop": 5}),
        Event("checked", {"evaluations": "0", "stop": None}),
        Event("finished", {"summary": 5}),
    ],
)
def test_an_event_that_does_not_hold_what_its_kind_promises_is_named(event: Event) -> None:
    given = [event] if event.kind == "created" else [PROPOSED, event]
    with pytest.raises(StoreError, match=rf"event {len(given)} \('{event.kind}'\)") as caught:
        replay(given, METRICS, 2)
    assert len(caught.value.message) < 700


def test_what_happens_once_does_not_happen_twice() -> None:
    for event in (Event("created", {"seed": 1}), Event("front", FRONT)):
        with pytest.raises(StoreError, match="a second time"):
            replay([event, event], METRICS, 2)
    end = Event("finished", {"summary": {}})
    with pytest.raises(StoreError, match="finishes a second time"):
        replay([end, end], METRICS, 2)


def test_deaths_are_starts_that_neither_ended_nor_were_interrupted() -> None:
    begun, failed = Event("started", {"index": 0, "attempt": 0}), {"index": 0, "reason": "boom"}
    events = [PROPOSED, begun, Event("interrupted", {"index": 0}), begun, begun]
    assert replay(events, METRICS, 2).deaths == {0: 2}
    state = replay([*events, begun, Event("attempt", failed)], METRICS, 2)
    assert (state.deaths, state.attempts) == ({0: 2}, {0: 1})
    done = Event("observed", {"index": 0, "observation": outcome(0.5, 0)})
    assert replay([*events, done], METRICS, 2).deaths == {}
    with pytest.raises(StoreError, match="'started' after the outcome of row 0"):
        replay([*events, done, begun], METRICS, 2)
    verifying = Event("started", {"verify": 1, "attempt": 0})
    assert replay([PROPOSED, Event("front", FRONT), verifying], METRICS, 2).verify_deaths == {1: 1}


def test_a_part_of_a_record_is_replayed_as_far_as_it_goes() -> None:
    state, count, refusal = replay_whole(
        [PROPOSED, Event("observed", {"index": 9}), PROPOSED], METRICS, 2, partly=True
    )
    assert (len(state.X), count) == (2, 1)
    assert refusal is not None
    assert refusal.message.startswith("event 2 ('observed')")


def test_another_run_is_refused_by_its_first_difference() -> None:
    recorded = {"settings": {"seed": 0, "budget": 8}, "problem": {"source": "here"}, "more": 1}
    same = {"settings": {"seed": 0, "budget": 8}, "problem": {"source": "there"}}
    assert difference(recorded, same) is None
    refuse_another(recorded, same)
    other = {"settings": {"seed": 1, "budget": 9}, "problem": {"source": "there"}}
    assert difference(recorded, other) == "settings.budget was 8 and is 9 and 1 more"
    with pytest.raises(AnotherRunError, match=r"settings\.budget was 8 and is 9"):
        refuse_another(recorded, other)


def test_metrics_under_the_old_name_of_resampling_are_compared_by_their_meaning() -> None:
    def of(**known: str) -> dict[str, object]:
        return {"problem": {"metrics": [{"name": "a", **known}]}, "metrics": [known]}

    now = of(resampling="same")
    assert difference(of(examples="same"), now) is None
    # Problems of version 0.1 did not describe it; the run's own metrics did.
    early = {"problem": {"metrics": [{"name": "a"}]}, "metrics": [{"examples": "same"}]}
    assert difference(early, now) is None
    found = difference(of(examples="fresh"), now)
    assert found is not None
    assert "'resampling': 'fresh'}] and is [{'resampling': 'same'" in found
