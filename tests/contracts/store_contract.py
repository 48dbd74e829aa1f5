"""What every run store keeps to. Subclass, and give a fixture that makes an empty store."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from map_bo.errors import StoreError
from map_bo.tracking.codec import encode_observations
from map_bo.tracking.store import Event, RunStore
from tests.tracking.scored import ScoredBowls

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8).filter(lambda k: k != "$float"), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Return whether two pieces of plain data are equal to the last bit; NaN equals NaN."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class StoreContract:
    @pytest.fixture
    def store(self) -> RunStore:
        raise NotImplementedError

    def test_is_a_run_store(self, store: RunStore) -> None:
        assert isinstance(store, RunStore)

    def test_starts_empty(self, store: RunStore) -> None:
        assert list(store.read()) == []

    def test_keeps_kind_data_time_and_order(self, store: RunStore) -> None:
        events = [
            Event(f"kind {i}", {"i": i, "x": [0.1 * i, None]}, time=i + 0.25) for i in range(9)
        ]
        for event in events:
            store.append(event)
        assert list(store.read()) == events

    def test_reading_twice_gives_the_same(self, store: RunStore) -> None:
        store.append(Event("a", {}))
        assert list(store.read()) == list(store.read())

    def test_what_was_appended_does_not_change_afterwards(self, store: RunStore) -> None:
        data = {"x": [1.0]}
        store.append(Event("a", data))
        data["x"].append(2.0)
        assert next(store.read()).data == {"x": [1.0]}

    def test_a_reader_sees_what_is_appended_after_it_started(self, store: RunStore) -> None:
        store.append(Event("a", {}))
        reader = store.read()
        assert next(reader).kind == "a"
        store.append(Event("b", {}))
        assert [event.kind for event in store.read()] == ["a", "b"]

    # One store serves all examples on purpose, and every subclass runs this test.
    @settings(
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
            HealthCheck.too_slow,
        ]
    )
    @given(data=st.dictionaries(st.just("x") | st.text(max_size=4), PLAIN, max_size=3))
    def test_plain_data_come_back_to_the_last_bit(
        self, store: RunStore, data: dict[str, Any]
    ) -> None:
        if set(data) == {"$float"}:
            return
        store.append(Event("a", data))
        *_, last = store.read()
        assert same(dict(last.data), data)

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            ({"x": {1, 2}}, "data.x of an event holds a set"),
            ({"x": [0, {1: 2}]}, r"data.x\[1\] of an event holds the key 1"),
            ({"x": {"$float": "NaN"}}, r"holds the key '\$float'"),
        ],
    )
    def test_refuses_what_is_not_plain(
        self, store: RunStore, data: dict[str, Any], what: str
    ) -> None:
        store.append(Event("before", {}))
        with pytest.raises(StoreError, match=what):
            store.append(Event("a", data))
        assert [event.kind for event in store.read()] == ["before"]

    def test_outcomes_of_examples_come_back_large_and_small(self, store: RunStore) -> None:
        seen = ScoredBowls(size=5000).evaluate(torch.full((1, 2), 0.5), generator=torch.Generator())
        data = encode_observations(seen)
        for kind, held in (
            ("observed", {"index": 0, "observation": data}),
            ("scored", {"index": 0, "observation": data, "parts": [["near a", 0, 5000]]}),
            ("imported", {"indices": [0], "observations": data}),
            ("node", {"node": "x", "kind": "observed", "data": {"observation": data}}),
            ("measured", {"names": ["near a"], "observation": data}),
        ):
            store.append(Event(kind, held))
            *_, last = store.read()
            assert (last.kind, last.data) == (kind, held)


def strict(line: bytes) -> Any:
    """Parse a line as another tool would: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> Any:
        raise ValueError(constant)

    return json.loads(line, parse_constant=refuse)
