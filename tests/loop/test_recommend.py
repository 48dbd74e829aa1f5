from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, SurrogateError
from map_bo.loop.recommend import recommend, reference_of, scaled_gains, spread_rows
from map_bo.pareto.trust import Coverage
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict
from tests.loop.bowls import Bowls, quick

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = (Metric("up"), Metric("down", "min", "loss"))


def seen(rows: list[list[float]], values: list[list[float]]) -> Observations:
    return Observations(torch.tensor(rows), torch.tensor(values), METRICS)


def test_the_reference_is_the_worst_of_base_and_experts() -> None:
    data = seen(
        [[0, 0], [1, 0], [0, 1], [0.5, 0.5], [0.9, 0.9]],
        [[0.3, 5.0], [0.9, 4.0], [0.2, 1.0], [0.6, 2.0], [0.0, 9.0]],
    )
    reference = reference_of(data, SPACE)
    assert reference.point.tolist() == pytest.approx([0.2, 5.0])
    assert reference.best.tolist() == pytest.approx([0.9, 1.0])
    gains = scaled_gains(data.Y, METRICS, reference)
    assert gains[2].tolist() == pytest.approx([0.0, 1.0])
    assert float(gains[4].max()) < 0


def test_only_experts_set_the_best_end_of_the_scale() -> None:
    # The blend is better than both experts in the first metric, the base in the second.
    data = seen([[0, 0], [1, 0], [0, 1], [0.5, 0.5]], [[0.3, 0.5], [0.9, 4], [0.2, 1], [0.99, 6]])
    for point in (None, {"up": 0.1, "down": 7.0}):
        best = reference_of(data, SPACE, point).best
        assert best.tolist() == pytest.approx([0.9, 1.0])


def test_without_anchors_the_rule_says_so() -> None:
    reference = reference_of(seen([[0.2, 0.4], [0.3, 0.1]], [[0.3, 5], [0.9, 4]]), SPACE)
    assert "neither base nor experts" in reference.rule
    assert reference.point.tolist() == pytest.approx([0.3, 5.0])


def test_a_metric_on_which_all_tie_keeps_a_positive_scale() -> None:
    reference = reference_of(seen([[0, 0], [1, 0]], [[0.5, 1.0], [0.5, 1.0]]), SPACE)
    gains = scaled_gains(torch.tensor([[0.5, 1.0]]), METRICS, reference)
    assert bool(torch.isfinite(gains).all())


def test_a_given_reference_must_name_the_metrics() -> None:
    data = seen([[0, 0]], [[0.5, 1.0]])
    with pytest.raises(DataError, match="the metrics are"):
        reference_of(data, SPACE, {"up": 0.1})


def test_nothing_succeeded_is_an_error() -> None:
    failed = Observations.failed(torch.zeros(2, 2), METRICS, "boom")
    with pytest.raises(SurrogateError, match="no evaluation succeeded"):
        reference_of(failed, SPACE)


@given(k=st.integers(1, 12), count=st.integers(0, 12), seed=st.integers(0, 1000))
def test_spread_rows_are_distinct_and_start_balanced(k: int, count: int, seed: int) -> None:
    gains = torch.rand(k, 3, generator=make_generator(seed), dtype=torch.float64)
    rows = spread_rows(gains, min(k, count))
    assert len(set(rows)) == len(rows) == min(k, count)
    if rows:
        assert rows[0] == int(gains.amin(-1).argmax())


def test_what_was_measured_is_not_verified_again() -> None:
    problem = Bowls()
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(6, generator=make_generator(0))])
    data = problem.evaluate(rows, generator=make_generator(0))
    found = recommend(data, SPACE, quick(20, verify=8), generator=make_generator(0))
    assert len(found.verify) == 8
    gaps = torch.cdist(found.front.X[found.verify], data.X, p=torch.inf).amin(-1)
    assert float(gaps.min()) > 0.01


def test_the_guard_keeps_the_front_where_the_data_are() -> None:
    problem = Bowls()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    line = torch.stack([0.3 * t, 0.3 * (1 - t)], -1)  # near x + y = 0.3 only
    data = problem.evaluate(line, generator=make_generator(0))
    guarded = recommend(data, SPACE, quick(12), generator=make_generator(0))
    free = recommend(data, SPACE, quick(12, guard=False), generator=make_generator(0))
    assert float(guarded.front.X.sum(-1).max()) < float(free.front.X.sum(-1).max())
    assert float((guarded.front.X.sum(-1) - 0.3).abs().max()) < 0.2


class Everywhere:
    """A solver that ignores what it is asked to solve."""

    def solve(
        self,
        mean: Callable[[Tensor], Tensor],
        space: CoefficientSpace,
        *,
        generator: Generator,
    ) -> Tensor:
        return space.sample(64, generator=generator)


def test_no_solver_gets_a_front_outside_the_covered_region() -> None:
    X = 0.3 * SPACE.sample(9, generator=make_generator(2))
    data = Bowls().evaluate(X, generator=make_generator(0))
    found = recommend(data, SPACE, quick(12, solver=Everywhere()), generator=make_generator(0))
    coverage = Coverage.of(X, SPACE)
    assert float(coverage.excess(found.front.X).max()) < 1e-9
    assert float(coverage.excess(SPACE.sample(64, generator=make_generator(0))).max()) > 0.1
    # What is predicted of a point is predicted of where it ended.
    assert torch.equal(found.front.mean, predict(found.model, found.front.X).mean)
    free = quick(12, solver=Everywhere(), guard=False)
    anywhere = recommend(data, SPACE, free, generator=make_generator(0)).front.X
    assert float(coverage.excess(anywhere).max()) > 0.1


def test_how_well_the_surrogate_predicts_is_recorded_with_the_front() -> None:
    problem = Bowls()
    X = problem.space.sample(12, generator=make_generator(3))
    data = problem.evaluate(X, generator=make_generator(0))
    found = recommend(data, problem.space, quick(), generator=make_generator(1))
    recorded = found.surrogate["validation"]
    assert recorded["n"] == 12
    assert set(recorded["metrics"]) == {metric.name for metric in data.metrics}
    for results in recorded["metrics"].values():
        assert sum(results["pit"]) == 12
        assert 0 <= results["coverage"] <= 1
