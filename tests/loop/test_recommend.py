from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from map_bo.loop.recommend import recommend
from map_bo.pareto.trust import Coverage
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predict
from tests.loop.bowls import Bowls, SafeBowls, quick

SPACE = CoefficientSpace.box(["a", "b"])


def test_what_was_measured_is_not_verified_again() -> None:
    problem = Bowls()
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(6, generator=make_generator(0))])
    data = problem.evaluate(rows, generator=make_generator(0))
    found = recommend(data, SPACE, quick(20, verify=8), generator=make_generator(0))
    assert len(found.verify) == 8
    gaps = torch.cdist(found.front.X[found.verify], data.X, p=torch.inf).amin(-1)
    assert float(gaps.min()) > 0.01


def test_a_front_is_found_where_no_evaluation_has_every_metric() -> None:
    problem = Bowls()
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(8, generator=make_generator(0))])
    data = problem.evaluate(rows, generator=make_generator(0))
    gone = torch.arange(len(rows)).unsqueeze(-1) % 2 == torch.arange(2)
    found = recommend(
        data.without(gone, "half"), SPACE, quick(20, verify=3), generator=make_generator(0)
    )
    assert len(found.front) > 0
    assert len(found.verify) == min(3, len(found.front))


def test_a_metric_that_never_varies_changes_no_front() -> None:
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(6, generator=make_generator(0))])
    fronts = []
    for problem in (Bowls(), SafeBowls(safe=2e7)):
        data = problem.evaluate(rows, generator=make_generator(0))
        fronts.append(recommend(data, SPACE, quick(20, verify=5), generator=make_generator(0)))
    without, with_it = fronts
    assert torch.allclose(with_it.front.X, without.front.X, atol=1e-6)
    assert with_it.verify == without.verify
    assert with_it.scale.rangeless == ("safe",)


def test_a_metric_that_has_no_range_but_varies_hides_no_trade_off_and_can_be_kept() -> None:
    problem = SafeBowls(drop=0.3)
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(6, generator=make_generator(0))])
    data = problem.evaluate(rows, generator=make_generator(0))
    front = recommend(data, SPACE, quick(20), generator=make_generator(0)).front
    both = recommend(
        Bowls().evaluate(rows, generator=make_generator(0)), SPACE, quick(20),
        generator=make_generator(0),
    ).front  # fmt: skip
    gaps = torch.cdist(both.mean, front.mean[:, :2]).amin(-1)
    assert float(gaps.max()) < 0.3, "what can be had without the metric is there"
    assert float(front.mean[:, 2].min()) < 0.8, "at its cost"
    keeping = front.mean[front.mean[:, 2] > 0.98]
    assert float(keeping[:, 0].max() - keeping[:, 0].min()) > 1.0, "and so is what keeps it"


def test_the_guard_keeps_the_front_where_the_data_are() -> None:
    problem = Bowls()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    line = torch.stack([0.3 * t, 0.3 * (1 - t)], -1)  # near x + y = 0.3 only
    data = problem.evaluate(line, generator=make_generator(0))
    guarded = recommend(data, SPACE, quick(12), generator=make_generator(0))
    free = recommend(data, SPACE, quick(12, guard=False), generator=make_generator(0))
    assert float(guarded.front.X.sum(-1).max()) < float(free.front.X.sum(-1).max())
    assert float((guarded.front.X.sum(-1) - 0.3).abs().max()) < 0.2


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
