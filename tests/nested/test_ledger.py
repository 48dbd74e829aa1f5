from __future__ import annotations

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.nested.ledger import MEASURED, Ledger
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import decode_event, encode_event
from map_bo.tracking.store import Event

METRICS = (
    Metric("accuracy"),
    Metric("loss", direction="min", kind="loss"),
    Metric("score", kind="unbounded"),
)
SPACE = CoefficientSpace.box(("a", "b", "c"))
BY_NAME = {metric.name: metric for metric in METRICS}


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def measured(
    x: Tensor, values: dict[str, float] | list[str], reason: str | None = None
) -> Observations:
    metrics = tuple(BY_NAME[name] for name in values)
    if reason is not None:
        return Observations.failed(x.unsqueeze(0), metrics, reason)
    assert isinstance(values, dict)
    Y = torch.tensor([list(values.values())], dtype=torch.float64)
    return Observations(
        x.unsqueeze(0), Y, metrics, Yvar=Y.square() / 100, counts=torch.full_like(Y, 50.0)
    )


def filled() -> tuple[Ledger, list[Event]]:
    """Six points: two metrics, one failed, the lacking metric of the first, and ends."""
    events: list[Event] = []
    ledger = Ledger(METRICS, events.append)
    ledger.add(measured(at(0.5, 0.5, 0), {"accuracy": 0.6, "loss": 1.5}))
    ledger.add(measured(at(0.1, 0, 0), ["accuracy", "score"], "no luck"))
    ledger.add(measured(at(0.5, 0.5, 0), {"score": -3.0}))
    ledger.add(measured(at(0, 0, 0), {"accuracy": 0.2, "loss": 3.0, "score": 5.0}))
    ledger.add(measured(at(1, 0, 0), {"accuracy": 0.9, "loss": 0.5}))
    ledger.add(measured(at(0, 1, 0), {"accuracy": 0.1, "loss": 4.0, "score": 7.0}))
    return ledger, events


def test_what_is_known_is_not_missing() -> None:
    ledger, _ = filled()
    names = ["score", "accuracy", "loss"]
    assert ledger.missing(at(0.5, 0.5, 0), names) == []
    assert ledger.missing(at(1, 0, 0), names) == ["score"]
    assert ledger.missing(at(0.5, 0.5, 0.1), names) == names
    assert ledger.missing(at(0.1, 0, 0), names) == names  # it failed: nothing was learnt


def test_points_are_the_same_up_to_rounding_and_the_sign_of_zero() -> None:
    ledger, _ = filled()
    assert not ledger.missing(at(0.5 + 1e-12, 0.5, -1e-12), ["score"])
    assert not ledger.missing(at(-0.0, 0.0, -0.0), ["score"])
    assert ledger.missing(at(0.5 + 1e-6, 0.5, 0), ["score"])


def test_only_the_first_points_count_when_asked_for_earlier() -> None:
    ledger, _ = filled()
    x, names = at(0.5, 0.5, 0), ["accuracy", "score"]
    assert ledger.missing(x, names, before=0) == names
    assert ledger.missing(x, names, before=1) == ["score"]
    assert ledger.missing(x, names, before=2) == ["score"]
    assert ledger.missing(x, names, before=3) == []


def test_every_metric_at_every_point_is_paid_failures_too() -> None:
    ledger, events = filled()
    assert ledger.spent == 2 + 2 + 1 + 3 + 2 + 3
    assert ledger.measured == len(events) == 6
    assert {event.kind for event in events} == {MEASURED}


def test_rows_give_back_what_was_measured() -> None:
    ledger, _ = filled()
    X = torch.stack([at(0.5, 0.5, 0), at(0, 1, 0)])
    rows = ledger.rows(X, ["score", "loss"])
    assert rows.metrics == (METRICS[2], METRICS[1])
    assert torch.equal(rows.X, X)
    assert rows.Y.tolist() == [[-3.0, 1.5], [7.0, 4.0]]
    assert torch.allclose(rows.Yvar, rows.Y.square() / 100)
    assert rows.counts.tolist() == [[50.0, 50.0]] * 2
    assert len(ledger.rows(X[:0], ["score"])) == 0


def test_a_failed_measurement_forgets_nothing_and_a_later_one_counts() -> None:
    ledger, _ = filled()
    ledger.add(measured(at(0.5, 0.5, 0), ["accuracy"], "the second time"))
    assert ledger.rows(at(0.5, 0.5, 0).unsqueeze(0), ["accuracy"]).Y.tolist() == [[0.6]]
    ledger.add(measured(at(0.1, 0, 0), {"accuracy": 0.4}))
    assert not ledger.missing(at(0.1, 0, 0), ["accuracy"])


def test_points_of_some_coefficients_where_all_metrics_are_known() -> None:
    ledger, _ = filled()
    everywhere = torch.ones(3, dtype=torch.bool)
    first = torch.tensor([True, False, False])
    assert ledger.whole(["accuracy", "score"], everywhere).tolist() == [
        [0.5, 0.5, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
    ]
    assert ledger.whole(["accuracy"], first).tolist() == [[0, 0, 0], [1, 0, 0]]
    assert ledger.whole(["accuracy"], first, before=4).tolist() == [[0, 0, 0]]
    assert ledger.whole(["accuracy"], everywhere, before=0).shape == (0, 3)


def test_what_is_known_about_some_coefficients_metric_by_metric() -> None:
    ledger, _ = filled()
    found = ledger.about(["accuracy", "loss", "score"], torch.tensor([True, False, False]))
    assert {name: seen.X.tolist() for name, seen in found.items()} == {
        "accuracy": [[0.0], [1.0]],
        "loss": [[0.0], [1.0]],
        "score": [[0.0]],
    }
    assert found["loss"].Y.tolist() == [[3.0], [0.5]]
    assert found["loss"].counts.tolist() == [[50.0], [50.0]]
    assert found["loss"].metrics == (METRICS[1],)
    last = torch.tensor([False, False, True])
    assert "score" not in ledger.about(["score"], last, before=3)


def test_the_events_make_the_same_ledger() -> None:
    ledger, events = filled()
    nodes = [Event("begun", {"node": "0"}), Event(MEASURED, {**events[0].data, "node": "0"})]
    read = [decode_event(encode_event(event)) for event in (*nodes, *events)]
    again = Ledger(METRICS, before=read)
    assert (again.spent, again.measured) == (ledger.spent, ledger.measured)
    columns = torch.ones(3, dtype=torch.bool)
    for name in BY_NAME:
        for before in (None, 1, 3, 5):
            X = ledger.whole([name], columns, before=before)
            assert torch.equal(again.whole([name], columns, before=before), X)
            assert torch.equal(again.rows(X, [name]).Y, ledger.rows(X, [name]).Y)
            assert torch.equal(again.rows(X, [name]).Yvar, ledger.rows(X, [name]).Yvar)
    again.add(measured(at(1, 1, 1), {"score": 0.0}))
    assert again.missing(at(1, 1, 1), ["score"], before=ledger.measured) == ["score"]


def test_the_reference_is_the_worst_of_base_and_experts_each_in_its_direction() -> None:
    ledger, _ = filled()
    found = ledger.scale(SPACE, ["accuracy", "loss", "score"])
    assert found is not None
    # Of the base, a and b: accuracies .2 .9 .1, losses 3 .5 4, and scores 5 - 7.
    assert found.point.tolist() == [0.1, 4.0, 5.0]
    assert found.best.tolist() == [0.9, 0.5, 7.0]
    assert "where they were measured" in found.rule


def test_where_the_only_expert_is_worse_than_the_base_the_base_ends_the_scale() -> None:
    ledger = Ledger(METRICS)
    ledger.add(measured(at(0, 0, 0), {"accuracy": 0.8, "loss": 1.0}))
    ledger.add(measured(at(0, 0, 1), {"accuracy": 0.3, "loss": 2.0}))
    found = ledger.scale(SPACE, ["loss", "accuracy"])
    assert found is not None
    assert found.point.tolist() == [2.0, 0.3]
    assert found.best.tolist() == [1.0, 0.8]


def test_a_metric_on_which_the_anchors_tie_has_no_range() -> None:
    ledger = Ledger(METRICS)
    ledger.add(measured(at(0, 0, 0), {"accuracy": 0.8, "loss": 1.0}))
    ledger.add(measured(at(0, 0, 1), {"accuracy": 0.8, "loss": 0.5}))
    found = ledger.scale(SPACE, ["loss", "accuracy"])
    assert found is not None
    assert found.rangeless == ("accuracy",)
    assert found.point.tolist() == [1.0, 0.8]


def test_there_is_no_reference_without_an_expert_or_before_it_was_measured() -> None:
    ledger, _ = filled()
    assert ledger.scale(SPACE, ["accuracy"], before=4) is None
    earlier = ledger.scale(SPACE, ["accuracy"], before=5)
    assert earlier is not None
    assert earlier.point.tolist() == [0.2]
    blend = Ledger(METRICS)
    blend.add(measured(at(1 / 3, 1 / 3, 1 / 3), {"score": 9.0}))
    assert blend.scale(SPACE, ["score"]) is None


def test_what_a_failed_row_measured_is_kept_and_only_the_rest_is_missing() -> None:
    events: list[Event] = []
    ledger = Ledger(METRICS, events.append)
    x, names = at(0.5, 0, 0), [metric.name for metric in METRICS]
    row = Observations(
        x.unsqueeze(0),
        torch.tensor([[0.5, torch.nan, -1.0]]),
        METRICS,
        failures=("loss: no",),
    )
    ledger.add(row)
    assert ledger.missing(x, names) == ["loss"]
    assert ledger.spent == 3
    kept = ledger.partial(x, names, "loss: no")
    assert kept.Y.nan_to_num(-9).tolist() == [[0.5, -9.0, -1.0]]
    assert kept.partial.tolist() == [True]
    again = Ledger(METRICS, before=[decode_event(encode_event(event)) for event in events])
    assert again.missing(x, names) == ["loss"]
