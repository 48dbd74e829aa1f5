from __future__ import annotations

import pytest

from map_bo.nested.record import NODE, NodeStore
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event, RunStore
from tests.contracts.store_contract import StoreContract


class TestNodeStore(StoreContract):
    @pytest.fixture
    def store(self) -> RunStore:
        whole = MemoryStore()
        return NodeStore("0.1", whole.append, whole.read())


def test_nodes_share_a_record_and_see_only_their_own() -> None:
    whole = MemoryStore()
    first, second = (NodeStore(key, whole.append, ()) for key in ("0", "0@1"))
    whole.append(Event("planned", {"tree": ["a", "b"]}))
    first.append(Event("created", {"seed": 3}, time=1.5))
    second.append(Event("created", {"seed": 4}))
    first.append(Event("observed", {"index": 0, "kind": "told", "node": "1"}, time=2.5))
    assert [event.data for event in first.read()] == [
        {"seed": 3},
        {"index": 0, "kind": "told", "node": "1"},
    ]
    written = list(whole.read())
    assert [event.kind for event in written] == ["planned", NODE, NODE, NODE]
    assert written[1].data == {"node": "0", "kind": "created", "data": {"seed": 3}}
    for store, key in ((first, "0"), (second, "0@1")):
        again = NodeStore(key, whole.append, written)
        assert list(again.read()) == list(store.read())
    assert list(NodeStore("1", whole.append, written).read()) == []


def test_an_event_that_could_not_be_written_is_not_there() -> None:
    def full(event: Event) -> None:
        raise OSError("no space left")

    store = NodeStore("root", full, ())
    with pytest.raises(OSError, match="no space"):
        store.append(Event("created", {}))
    assert list(store.read()) == []
