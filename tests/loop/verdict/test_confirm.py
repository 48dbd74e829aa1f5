"""Confirmations as data: parts, words, the record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from map_bo.data import Metric, Observations
from map_bo.errors import StoreError
from map_bo.examples.sets import ExampleSet, Part
from map_bo.loop.verdict.confirm import (
    CHOSEN,
    CONFIRMED,
    Confirmation,
    confirmations,
    held_out_parts,
    searched_parts,
)
from map_bo.loop.verdict.verdict import BLEND, Comparison, Verdict
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.tracking.store import Event
from tests.loop.items import ItemProblem

METRICS = (Metric("acc"), Metric("loss", "min", "loss"))
UP = Comparison(CHOSEN, BLEND, "acc", 0.05, 0.01, 0.09, 0.01, "examples", "McNemar, exact", 80)
FOUND = Confirmation(
    "held-out examples",
    True,
    (CHOSEN, BLEND),
    torch.tensor([[0.8, 0.3], [0.7, torch.nan]]).double(),
    Observations(
        torch.tensor([[0.2], [0.5]]), torch.tensor([[0.75, 0.35], [0.7, 0.4]]).double(), METRICS
    ),
    Verdict((UP,), 1, "held-out examples"),
    {"point": 3},
)


def test_optimism_is_positive_where_the_search_was_too_good() -> None:
    assert FOUND.optimism() == {"acc": pytest.approx(0.05), "loss": pytest.approx(0.05)}
    unknown = replace(FOUND, search=torch.full((2, 2), torch.nan).double())
    assert unknown.optimism() == {"acc": None, "loss": None}


def test_the_table_shows_search_and_measured_side_by_side() -> None:
    head, rows = FOUND.table()
    assert head == ["merge", "acc: search", "acc: measured", "loss: search", "loss: measured"]
    assert rows == [
        [CHOSEN, "0.8", "0.75", "0.3", "0.35"],
        [BLEND, "0.7", "0.7", "-", "0.4"],
    ]
    said = FOUND.lines()
    assert said[0] == "measured on held-out examples"
    assert "acc +0.050, loss +0.050" in said[-1]


def test_it_survives_the_record_and_a_changed_one_is_refused() -> None:
    data = FOUND.describe()
    [again] = confirmations([Event("finished", {}), Event(CONFIRMED, data)], METRICS)
    assert again.verdict == FOUND.verdict
    assert again.names == FOUND.names
    assert torch.equal(again.measured.Y, FOUND.measured.Y)
    assert again.optimism() == FOUND.optimism()
    for wrong in ({**data, "names": ["one"]}, {**data, "verdict": 3}, {"where": "x"}):
        with pytest.raises(StoreError, match="a recorded confirmation cannot be read"):
            Confirmation.read(wrong, METRICS)


def test_parts_are_what_the_search_leaves_and_what_it_takes() -> None:
    problem = ItemProblem(2, 200)
    assert held_out_parts(problem, 0.0) is None
    assert held_out_parts(problem, 0.3) == (Part("t0", 140, 200), Part("t1", 140, 200))
    assert searched_parts(problem, 0.3) == (Part("t0", 0, 140), Part("t1", 0, 140))
    assert held_out_parts(ConcaveQuadratics(2, 2), 0.3) is None

    class Mixed(ItemProblem):
        @property
        def example_sets(self) -> dict[str, ExampleSet]:
            return {"t0": ExampleSet(("t0",), 10), "t1": ExampleSet(("t1",), 1, divisible=False)}

    assert held_out_parts(Mixed(), 0.5) == (Part("t0", 5, 10), Part("t1", 0, 1))
