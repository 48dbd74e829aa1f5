from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Front, Metric, Observations, to_maximisation
from map_bo.errors import DataError, StoreError
from map_bo.scale import Scale
from map_bo.tracking.codec import (
    SCHEMA,
    decode_event,
    decode_front,
    decode_metric,
    decode_observations,
    decode_scale,
    decode_tensor,
    encode_event,
    encode_front,
    encode_metric,
    encode_observations,
    encode_scale,
    encode_tensor,
)
from map_bo.tracking.store import Event
from tests.contracts.store_contract import strict

METRICS = (
    Metric("acc", resampling="same"),
    Metric("loss", "min", "loss", resampling="fresh"),
    Metric("z", kind="unbounded"),
)


def through_json(data: Any) -> Any:
    """Write as strict JSON and read back, as a store does."""
    return json.loads(json.dumps(data, allow_nan=False))


def identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(
        (a.view(torch.int64) == b.view(torch.int64)).logical_or(a.isnan() & b.isnan()).all()
    )


@given(
    rows=st.integers(0, 4).flatmap(
        lambda d: st.lists(st.lists(st.floats(), min_size=d, max_size=d), min_size=1, max_size=4)
    )
)
def test_tensors_come_back_to_the_last_bit(rows: list[list[float]]) -> None:
    tensor = torch.tensor(rows, dtype=torch.float64)
    assert identical(decode_tensor(through_json(encode_tensor(tensor))), tensor)


def test_a_number_is_a_tensor_too() -> None:
    assert encode_tensor(torch.tensor(float("nan"))) is None
    assert decode_tensor(0.25).shape == ()


def test_a_tensor_is_written_as_other_tools_expect() -> None:
    tensor = torch.tensor([[0.1, float("nan")], [float("inf"), -float("inf")]], dtype=torch.float64)
    assert encode_tensor(tensor) == [[0.1, None], ["Infinity", "-Infinity"]]


@pytest.mark.parametrize("data", [["one"], [True], {"a": 1}])
def test_what_is_no_number_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="which is not a number"):
        decode_tensor(data)


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(DataError, match="do not form a tensor"):
        decode_tensor([[1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    "metric",
    [
        *METRICS,
        Metric("half", lower=0.5, upper=2.0),
        Metric("open", "min", "unbounded", lower=-float("inf")),
    ],
)
def test_metrics_come_back(metric: Metric) -> None:
    assert decode_metric(through_json(encode_metric(metric))) == metric


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_come_back_with_what_is_known_of_their_examples(metric: Metric) -> None:
    assert decode_metric(through_json(encode_metric(metric))) == metric


def test_metrics_recorded_before_examples_were_still_read() -> None:
    data = encode_metric(Metric("acc"))
    del data["resampling"]
    assert decode_metric(data) == Metric("acc")


def test_metrics_recorded_under_the_old_name_of_resampling_are_still_read() -> None:
    data = encode_metric(Metric("acc", resampling="same"))
    data["examples"] = data.pop("resampling")
    assert decode_metric(data) == Metric("acc", resampling="same")


def observations() -> Observations:
    nan = float("nan")
    return Observations(
        X=torch.tensor([[0.1, 1 / 3], [0.2, 0.3]]),
        Y=torch.tensor([[0.7, 1e-300, -3.0], [nan, nan, nan]]),
        metrics=METRICS,
        Yvar=torch.tensor([[0.01, 0.0, nan], [nan, nan, nan]]),
        counts=torch.tensor([[100.0, nan, nan], [nan, nan, nan]]),
        cost=torch.tensor([1.5, 0.2]),
        failures=(None, "out of memory: \u2713"),
    )


@pytest.mark.parametrize("rows", [[0, 1], [1], []])
def test_observations_come_back(rows: list[int]) -> None:
    before = observations().select(rows)
    after = decode_observations(through_json(encode_observations(before)), METRICS)
    for name in ("X", "Y", "Yvar", "counts", "cost"):
        assert identical(getattr(after, name), getattr(before, name)), name
    assert after.failures == before.failures
    assert after.metrics == before.metrics


def test_a_scale_comes_back_with_its_metrics_without_a_range() -> None:
    point, best = torch.tensor([0.1, 2.0, -3.0]), torch.tensor([0.9, 1.0, -3.0])
    few, unit = torch.tensor([True, False, False]), torch.tensor([0.5, 1.0, 3.0])
    for kwargs in ({}, {"ranged": few}, {"unit": unit}, {"ranged": few, "unit": unit}):
        scale = Scale(METRICS, point, best, "given by the user", **kwargs)  # type: ignore[arg-type]
        again = decode_scale(through_json(encode_scale(scale)), METRICS)
        assert identical(again.point, scale.point)
        assert identical(again.best, scale.best)
        assert torch.equal(again.ranged, scale.ranged)
        assert torch.equal(again.width, scale.width)
        assert (again.unit is None) == (scale.unit is None)
        assert again.rule == scale.rule
    plain = Scale(METRICS[:1], point[:1], best[:1], "given by the user")
    assert encode_scale(plain).keys() == {"point", "best", "rule"}


@pytest.mark.parametrize("value", [0.1, 1.0, 2e7])
def test_the_billionth_that_version_0_1_wrote_for_no_range_is_understood(value: float) -> None:
    metrics = (Metric("up"), Metric("down", "min", "loss"))
    low = torch.tensor([value, -value], dtype=torch.float64)  # larger is better
    written = {
        "point": encode_tensor(to_maximisation(low, metrics)),
        "best": encode_tensor(to_maximisation(low + 1e-9, metrics)),
        "rule": "worst of base and experts",
    }
    scale = decode_scale(through_json(written), metrics)
    assert scale.rangeless == ("up", "down")
    assert torch.equal(scale.best, scale.point)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_front_comes_back(k: int) -> None:
    values = torch.rand(6, k, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std, lower, upper, real, X = values
    real = real.clone()
    real[1:] = torch.nan
    before = Front(X[:, :2], mean, std, lower, upper, METRICS, real)
    after = decode_front(through_json(encode_front(before)), METRICS)
    for name in ("X", "mean", "std", "lower", "upper", "real"):
        assert identical(getattr(after, name), getattr(before, name)), name


def test_an_event_is_one_line_of_strict_json() -> None:
    line = encode_event(Event("a\nb", {"x": float("nan"), "y": "\u2028 \ud800"}, time=1.5))
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    content = strict(line)
    assert content["v"] == SCHEMA
    assert content["kind"] == "a\nb"
    assert content["time"] == 1.5
    assert content["data"] == {"x": {"$float": "NaN"}, "y": "\u2028 \ud800"}


def test_a_tuple_becomes_a_list() -> None:
    assert decode_event(encode_event(Event("a", {"x": (1, 2)}))).data == {"x": [1, 2]}


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"v":1,"kind":3,"time":0,"data":{}}', b"3"])
def test_json_that_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises(StoreError, match="not an event"):
        decode_event(line)


def test_a_newer_format_is_refused() -> None:
    line = b'{"v":99,"kind":"a","time":0,"data":{}}'
    with pytest.raises(StoreError, match=r"format is 99.*up to 2") as caught:
        decode_event(line)
    assert caught.value.hint == "update map-bo"


@pytest.mark.parametrize("line", [b"", b"{", b"\0\0\0\0\n", b"\xff\xfe", b'{"v":NaN}'])
def test_what_is_no_json_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_event(line)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 200 deep"),
        (b'{"x":' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 200 deep"),
        (b'{"x":{"$float":[]}}', r"\$float with \[\]"),
        (b'{"x":{"$float":"nan"}}', r"\$float with 'nan'"),
        (b"[]", "not an event"),
    ],
)
def test_hostile_data_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        decode_event(b'{"v":1,"kind":"a","time":0,"data":' + data + b"}")


@pytest.mark.parametrize("time", [b"1" + b"0" * 400, b"-1", b"true", b'"0"', b"1e999"])
def test_a_time_that_is_none_is_refused(time: bytes) -> None:
    with pytest.raises(StoreError, match="not an event"):
        decode_event(b'{"v":1,"kind":"a","time":' + time + b',"data":{}}')


def test_data_that_are_too_deep_to_be_read_again_are_not_written() -> None:
    data: dict[str, Any] = {}
    for _ in range(190):
        data = {"x": data}
    assert decode_event(encode_event(Event("a", data))).data == data
    for _ in range(20):
        data = {"x": data}
    with pytest.raises(StoreError, match="nested more than 200 deep, which cannot be recorded"):
        encode_event(Event("a", data))


@pytest.mark.parametrize("bad", [10**400, [[10**400]], 1e999, True, "x", [1, [2]], {"a": 1}])
def test_numbers_that_are_none_make_no_tensor(bad: object) -> None:
    with pytest.raises(DataError, match=r"recorded (tensor holds|numbers do not form)"):
        decode_tensor(bad)


def test_gradients_are_written_only_when_there_are_any() -> None:
    plain = observations()
    written = encode_observations(plain)
    assert not {"gradients", "gradient_variance"} & written.keys()
    assert decode_observations(through_json(written), METRICS).gradients is None
    n, m, d = len(plain), len(METRICS), plain.X.shape[-1]
    slopes = torch.arange(1.0 * n * m * d).reshape(n, m, d).double() / 3
    slopes[-1, 0, 0] = torch.nan
    before = Observations(
        plain.X,
        torch.ones(n, m),
        METRICS,
        gradients=slopes,
        gradient_variance=slopes.square(),
    )
    after = decode_observations(through_json(encode_observations(before)), METRICS)
    for ours, theirs in zip(after.filled_gradients(), before.filled_gradients(), strict=True):
        assert identical(ours, theirs)


def test_a_front_comes_back_with_what_is_known_of_it_and_from_before_it_was() -> None:
    mean = torch.rand(3, 3, dtype=torch.float64)
    before = Front(
        mean[:, :2], mean, mean, mean, mean, METRICS,
        corrected=mean - 0.1, probability=torch.tensor([0.1, float("nan"), 1.0]),
        feasible=torch.tensor([0.9, 0.5, 1.0]),
    )  # fmt: skip
    written = through_json(encode_front(before))
    after = decode_front(written, METRICS)
    assert identical(after.corrected, before.corrected)
    assert identical(after.probability, before.probability)
    assert identical(after.feasible, before.feasible)
    later = ("corrected", "probability", "feasible")
    older = {name: written[name] for name in written if name not in later}
    old = decode_front(older, METRICS)
    assert identical(old.mean, mean)
    assert bool(old.corrected.isnan().all())
    assert bool(old.probability.isnan().all())
    assert bool(old.feasible.isnan().all())
    assert "feasible" not in encode_front(old), "a run in which nothing failed is as it was"


def test_what_was_recalled_is_written_only_where_something_was() -> None:
    plain = Observations(torch.rand(2, 3), torch.rand(2, 2), (Metric("a"), Metric("b")))
    assert not {"source", "recalled", "saved"} & encode_observations(plain).keys()
    marks = torch.tensor([[True, False], [False, False]])
    seen = Observations(
        plain.X, plain.Y, plain.metrics, recalled=marks, saved=torch.tensor([2.5, 0.0])
    )
    data = through_json(encode_observations(seen))
    assert data["source"] == "cache"
    back = decode_observations(data, seen.metrics)
    assert torch.equal(back.recalled, marks)
    assert back.saved.tolist() == [2.5, 0.0]
    old = decode_observations(through_json(encode_observations(plain)), plain.metrics)
    assert not bool(old.recalled.any())
    for bad in ([[True]], [[1, 0], [0, 0]], "yes", [[True, False]]):
        with pytest.raises(DataError):
            decode_observations({**data, "recalled": bad}, seen.metrics)
