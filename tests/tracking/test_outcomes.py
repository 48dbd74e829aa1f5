from __future__ import annotations

import base64
import json
import math
import tracemalloc
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.rng import make_generator
from map_bo.tracking.codec import decode_observations, encode_observations
from map_bo.tracking.outcomes import (
    MOST_OUTCOMES,
    as_recorded,
    decode_examples,
    encode_examples,
    map_outcomes,
    with_examples_as_recorded,
)
from map_bo.tracking.store import Event
from tests.tracking.scored import outcomes

NAN = math.nan


def of(values: list[float] | Tensor, size: int | None = None) -> ExampleOutcomes:
    column = torch.as_tensor(values, dtype=torch.float64)
    n = len(column)
    width = 1 if column.dim() == 1 else column.shape[-1]
    return ExampleOutcomes(torch.arange(n), column, n if size is None else size, (True,) * width)


def written(one: ExampleOutcomes) -> dict[str, Any]:
    """Return the plain data of outcomes, through JSON."""
    found: dict[str, Any] = json.loads(json.dumps(encode_examples([{"e": one}])))[0]["e"]
    return found


def read(data: dict[str, Any]) -> ExampleOutcomes:
    return decode_examples([{"e": data}], 1)[0]["e"]


def same(a: ExampleOutcomes, b: ExampleOutcomes) -> bool:
    return (
        torch.equal(a.items, b.items)
        and torch.equal(a.values.nan_to_num(nan=-77.0), b.values.nan_to_num(nan=-77.0))
        and (a.size, a.means, a.metrics) == (b.size, b.means, b.metrics)
    )


@given(
    values=st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, -0.0, NAN, math.inf]), st.floats()),
        min_size=1,
        max_size=12,
    ),
    missing=st.integers(0, 40),
    seed=st.integers(0, 9),
)
def test_what_is_read_back_is_what_was_said_to_be_and_twice_is_once(
    values: list[float], missing: int, seed: int
) -> None:
    size = len(values) + missing
    items = torch.randperm(size, generator=make_generator(seed))[: len(values)]
    both = torch.tensor([values, values[::-1]], dtype=torch.float64).T
    before = ExampleOutcomes(items, both, size, (True, False), ("a", "b"))
    after = as_recorded(before)
    assert same(read(written(before)), after)
    assert same(as_recorded(after), after)
    assert same(read(written(after)), after)
    assert torch.equal(after.values.isnan(), before.values.isnan())
    assert torch.equal(after.values.isinf(), before.values.isinf())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 1, 0], "bits"),
        ([0, 1, NAN, 0], "bits and nan"),
        ([0.25, 0.5, 1, 0], "float16"),
        (torch.linspace(0.5, 4, 50), "float16"),
        (100 + torch.linspace(0, 1, 50).double(), "float32"),  # steps of half precision are .06
        (torch.linspace(1, 1e5, 50), "float32"),  # beyond 65504
        (1e-8 * torch.linspace(1, 2, 50).double(), "float32"),  # below 6e-8
        ([0.1, 0.1, 0.1], "float64"),  # no spread that rounding could be small beside
        ([0.1], "float64"),
        ([1e300, -1e300], "float64"),
        ([math.inf, 2.0, 3.0], "float16"),
    ],
)
def test_precision_is_what_the_spread_of_the_outcomes_needs(
    values: list[float] | Tensor, kind: str
) -> None:
    before = of(values)
    assert written(before)["values"] == [kind]
    after, spread = as_recorded(before).values, before.values[before.values.isfinite()]
    error = (after - before.values)[before.values.isfinite()]
    assert float(error.square().mean().sqrt()) <= 2**-10 * float(spread.std(correction=0))


def test_each_metric_has_a_precision_of_its_own() -> None:
    both = torch.stack([torch.tensor([0.0, 1, 1]), torch.tensor([0.5, 2, 3])], -1)
    assert written(of(both))["values"] == ["bits", "float16"]


@pytest.mark.parametrize(
    ("items", "size", "form"),
    [
        (range(9), 9, "all"),
        (range(3, 9), 900, "range"),
        ([0, 2, 3], 30, "mask"),
        ([5, 77_000], 100_000, "list"),
        ([MOST_OUTCOMES - 2, 3], MOST_OUTCOMES, "list"),
    ],
)
def test_examples_are_named_in_the_shortest_form(items: Any, size: int, form: str) -> None:
    found = torch.tensor(list(items))
    before = ExampleOutcomes(found, found.double() % 2, size, (True,))
    data = written(before)
    assert data["items"] == form
    assert same(read(data), before)
    assert len(data["packed"]) < 60


def test_5000_zeros_and_ones_take_less_than_a_kilobyte_and_losses_two_bytes_each() -> None:
    assert len(written(outcomes(5000, kind="bits"))["packed"]) < 1000
    assert len(written(outcomes(5000))["packed"]) < 5000 * 2 * 4 / 3 + 100


def seen(rows: int = 2) -> Observations:
    metrics = (Metric("e"), Metric("f", kind="unbounded"))
    examples = tuple({"e": outcomes(20, 50, seed=i)} for i in range(rows - 1))
    return Observations(torch.rand(rows, 3), torch.rand(rows, 2), metrics, examples=(*examples, {}))


def test_observations_carry_them_and_those_without_are_as_they_were() -> None:
    before = seen()
    data = json.loads(json.dumps(encode_observations(before)))
    after = decode_observations(data, before.metrics)
    assert same(after.examples[0]["e"], as_recorded(before.examples[0]["e"]))
    assert after.examples[1] == {}
    assert same(after.examples[0]["e"], with_examples_as_recorded(before).examples[0]["e"])
    plain = before.select([1])
    assert "examples" not in encode_observations(plain)
    assert with_examples_as_recorded(plain) is plain


def test_outcomes_beyond_all_bounds_are_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    many = ExampleOutcomes(torch.tensor([0]), torch.ones(1), MOST_OUTCOMES + 1, (True,))
    few = outcomes(3)
    metrics = (Metric("e", kind="unbounded"),)
    before = Observations(
        torch.rand(1, 2), torch.rand(1, 1), metrics, examples=({"e": many, "f": few},)
    )
    assert list(with_examples_as_recorded(before).examples[0]) == ["f"]
    assert "16777217 examples of 'e' are not kept" in caplog.text
    data = encode_observations(before)
    assert list(data["examples"][0]) == ["f"]
    alone = Observations(torch.rand(1, 2), torch.rand(1, 1), metrics, examples=({"e": many},))
    assert "examples" not in encode_observations(alone)


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"size": 2**40, "items": "mask"}, "1099511627776 examples are more than"),
        ({"size": 2**40, "items": "all", "n": 2**40}, "1099511627776 examples are more than"),
        ({"n": 2**40}, "are 1099511627776 of 797 examples"),
        ({"n": 0}, "are 0 of 797"),
        ({"n": True}, "are True of 797"),
        ({"n": 99}, "which 99 of 797 examples they are is not told"),
        ({"n": 300}, "do not have the"),
        ({"size": 90}, "are 100 of 90"),
        ({"size": 1000}, "do not have the"),
        ({"items": "all"}, "do not have the"),
        ({"items": "range", "first": 790}, "do not have the"),
        ({"items": "none"}, "named by 'none'"),
        ({"items": ["all"]}, "named by"),
        ({"values": ["bits", "bits"]}, "kinds of their columns"),
        ({"values": ["int4"]}, "kinds of their columns"),
        ({"values": "bits"}, "kinds of their columns"),
        ({"means": [1]}, "kinds of their columns"),
        ({"means": []}, "kinds of their columns"),
        ({"metrics": [3]}, "kinds of their columns"),
        ({"metrics": ["a", "b"]}, "are of the metrics a, b"),
        ({"packed": None}, "not packed as text"),
        ({"packed": "é"}, "cannot be read"),
        ({"packed": "no base64!"}, "cannot be read"),
        ({"packed": base64.b64encode(b"no zlib").decode()}, "cannot be read"),
        ({"packed": packed(b"")}, "do not have the 113 bytes"),
        ({"packed": packed(bytes(10**6))}, "do not have the 113 bytes"),
        ({"packed": packed(bytes(113))}, "which 100 of 797"),
        ({"packed": {"offset": 0, "length": 5, "sha256": "x"}}, "in a file beside the record"),
    ],
)
def test_lies_are_refused(lie: dict[str, Any], said: str) -> None:
    data = written(outcomes(100, 797, kind="bits"))
    assert read(data) is not None
    with pytest.raises(DataError, match=said) as caught:
        read({**data, **lie})
    assert caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("first", [-1, 4, None, "0", 2**70])
def test_a_range_that_leaves_the_set_is_refused(first: Any) -> None:
    data = written(of([0, 1, 1], size=6))
    assert data["items"] == "range"
    with pytest.raises(DataError, match="which 3 of 6"):
        read({**data, "first": first})


def test_a_list_that_leaves_the_set_is_refused() -> None:
    data = written(ExampleOutcomes(torch.tensor([5, 77_000]), torch.ones(2), 100_000, (True,)))
    with pytest.raises(DataError, match="not different ones of 77000"):
        read({**data, "size": 77_000})


def test_a_bomb_is_refused_before_it_is_expanded() -> None:
    n = MOST_OUTCOMES
    data = {"size": n, "n": n, "items": "all", "values": ["float64"], "means": [True]}
    bomb = {**data, "packed": packed(bytes(8 * n // 1000))}
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="bytes cannot hold"):
            read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_honest_outcomes_that_are_all_the_same_are_no_bomb() -> None:
    """What readers refuse to expand must not be written."""
    for value in (1.0, 0.1):
        before = of(torch.full((100_000,), value, dtype=torch.float64))
        assert same(read(written(before)), before)


@pytest.mark.parametrize("data", [None, "x", {}, [], [{}, {}], [3], [{"e": 3}], [{"e": None}]])
def test_what_is_no_outcomes_is_refused(data: Any) -> None:
    with pytest.raises(DataError):
        decode_examples(data, 1)


def test_events_are_changed_in_their_outcomes_alone() -> None:
    inner = {"observation": encode_observations(seen())}
    event = Event("node", {"node": "x", "kind": "observed", "data": inner}, 5.0)
    assert map_outcomes(event, lambda name, one: one) is event

    def short(name: str, one: Any) -> dict[str, Any]:
        return {**one, "packed": name}

    found = map_outcomes(event, short)
    assert (found.kind, found.time) == ("node", 5.0)
    rows = found.data["data"]["observation"]["examples"]
    assert (rows[0]["e"]["packed"], rows[1]) == ("e", {})
    assert inner["observation"]["examples"][0]["e"]["packed"] != "e", "the event itself stays"
    gone = map_outcomes(event, lambda name, one: None).data["data"]["observation"]
    assert "examples" not in gone
    assert gone["X"] == inner["observation"]["X"]


@pytest.mark.parametrize(
    "data",
    [
        {"observation": 3},
        {"observation": {"examples": 3}},
        {"observation": {"examples": [3, None, {"e": 3}]}},
        {"kind": "observed", "data": [1]},
        {"examples": {"e": "digest"}},  # of the event that creates a run
    ],
)
def test_events_of_another_form_are_left_alone(data: dict[str, Any]) -> None:
    event = Event("observed", data)
    assert map_outcomes(event, lambda name, one: None) is event
