from __future__ import annotations

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import AnotherRunError, StoreError
from map_bo.loop.state import advance, difference, refuse_another, replay
from map_bo.tracking.codec import encode_observations, encode_tensor
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


def test_imported_rows_must_continue_the_numbers_of_the_record() -> None:
    data = {"observations": outcome(0.5, 0), "source": {"from": "ax"}}
    state = replay([PROPOSED, Event("imported", {"indices": [2], **data})], METRICS, 2)
    assert state.imported == {2: {"from": "ax"}}
    with pytest.raises(StoreError, match=r"event 2 .*imported rows have numbers \[3\]"):
        replay([PROPOSED, Event("imported", {"indices": [3], **data})], METRICS, 2)


def test_an_event_without_its_data_is_named() -> None:
    with pytest.raises(StoreError, match=r"event 2 \('observed'\) of the run cannot be read"):
        replay([PROPOSED, Event("observed", {"index": 0})], METRICS, 2)


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
