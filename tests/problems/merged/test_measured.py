from __future__ import annotations

import torch

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.problems.merged.measured import MeasuredRows

X = torch.tensor([[0.1], [0.2]], dtype=torch.float64)


def test_rows_hold_what_was_put_and_nothing_else() -> None:
    rows = MeasuredRows(X, [Metric("a"), Metric("b")])
    assert rows.put(0, {"a": Measurement(0.5, count=10), "other": Measurement(0.1)}) == []
    reasons = rows.put(0, {"b": EvaluationError("no answer", hint="ask again")})
    rows.end(0, reasons, 2.0)
    rows.put(1, {"a": Measurement(0.25), "b": Measurement(0.75, variance=0.01)})
    rows.put_gradient(1, "b", torch.tensor([3.0]), torch.tensor([0.5]))
    rows.end(1, [], 1.0)
    seen = rows.observations()
    assert seen.ok.tolist() == [False, True]
    assert seen.partial.tolist() == [True, False]
    assert seen.cost.tolist() == [2.0, 1.0]
    assert "no answer" in str(seen.failures[0])
    assert float(seen.counts[0, 0]) == 10
    assert seen.Y[1].tolist() == [0.25, 0.75]
    assert seen.gradients is not None
    assert seen.gradients[1, 1].tolist() == [3.0]
    assert bool(seen.gradients[1, 0].isnan().all())


def test_a_value_outside_its_bounds_is_a_reason() -> None:
    rows = MeasuredRows(X, [Metric("a")])
    (reason,) = rows.put(0, {"a": Measurement(1.5)})
    assert "outside the metric's bounds" in reason
