"""Where evaluations work: regions are closed by failures that lie together, not by chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Feasibility, Requirements, WorkingRegion
from tests.choices import CHOICE


def space_of(d: int) -> CoefficientSpace:
    return CoefficientSpace.box([f"e{i}" for i in range(d)])


def tried(X: Tensor, works: Tensor) -> Observations:
    return Observations(
        X=X,
        Y=torch.where(works.unsqueeze(-1), 0.5, torch.nan).double(),
        metrics=(Metric("a"),),
        failures=tuple(None if ok else "diverged" for ok in works.tolist()),
    )


def points(n: int, d: int, seed: int) -> Tensor:
    X = torch.rand(n, d, generator=make_generator(seed), dtype=torch.float64)
    return torch.cat([space_of(d).anchors().X, X])


def below(X: Tensor) -> Tensor:
    return X.sum(-1) < 0.65 * X.shape[-1]


def test_nothing_failed_is_no_region() -> None:
    X = points(5, 2, 0)
    seen = tried(X, torch.ones(len(X), dtype=torch.bool))
    assert WorkingRegion.of(seen, space_of(2)) is None
    assert Requirements().given(seen, space_of(2), None) is None


@pytest.mark.parametrize("d", [2, 4])
def test_failures_that_lie_together_close_their_region(d: int) -> None:
    X, test = points(40, d, 1), points(1000, d, 2)
    region = WorkingRegion.of(tried(X, below(X)), space_of(d))
    assert region is not None
    assert region.weight > 0.95
    p, works = region.probability(test), below(test)
    assert float(((p > 0.5) != works).double().mean()) < 0.15
    assert float((p[works] < 0.5).double().mean()) < 0.05
    assert float((p - works.double()).square().mean()) < 0.1  # a constant rate has .2


@pytest.mark.parametrize("d", [2, 4])
@pytest.mark.parametrize("n", [16, 35])
def test_failures_by_chance_close_nothing(d: int, n: int) -> None:
    for seed in range(6):
        X, test = points(n, d, seed), points(500, d, 100 + seed)
        works = torch.rand(len(X), generator=make_generator(seed)) > 0.1
        region = WorkingRegion.of(tried(X, works), space_of(d))
        if region is None:
            continue
        assert float((region.probability(test) < 0.5).double().mean()) < 0.05
        assert 0.02 < region.chance < 0.3


def test_chance_and_a_region_are_told_apart() -> None:
    X, test = points(60, 2, 3), points(1000, 2, 4)
    works = below(X) & (torch.rand(len(X), generator=make_generator(3)) > 0.1)
    region = WorkingRegion.of(tried(X, works), space_of(2))
    assert region is not None
    wrong = (region.probability(test) > 0.5) != below(test)
    assert float(wrong.double().mean()) < 0.12


def test_probabilities_are_calibrated() -> None:
    found, true = [], []
    for seed in range(12):
        X, test = points(15, 2, seed), points(200, 2, 100 + seed)
        region = WorkingRegion.of(tried(X, below(X)), space_of(2))
        if region is not None:
            found.append(region.probability(test))
            true.append(below(test).double())
    p, y = torch.cat(found), torch.cat(true)
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):  # the prior says that points work
        inside = (p >= low) & (p <= high)
        assert abs(float(p[inside].mean() - y[inside].mean())) < 0.3


def test_probability_depends_on_nothing_but_the_data_and_has_gradients() -> None:
    X = points(20, 3, 5)
    order = torch.randperm(len(X), generator=make_generator(0))
    test = points(20, 3, 6)[:, :].requires_grad_()
    one = WorkingRegion.of(tried(X, below(X)), space_of(3))
    two = WorkingRegion.of(tried(X[order], below(X[order])), space_of(3))
    assert one is not None
    assert two is not None
    p = one.log_probability(test)
    assert torch.allclose(p, two.log_probability(test), atol=1e-5)
    (slope,) = torch.autograd.grad(p.sum(), test)
    assert bool(slope.isfinite().all())
    assert float(slope.sum(-1).mean()) < 0  # away from large sums


def test_everything_failed_and_many_rows_are_no_trouble() -> None:
    X = points(250, 2, 7)
    assert WorkingRegion.of(tried(X, torch.zeros(len(X), dtype=torch.bool)), space_of(2))
    region = WorkingRegion.of(tried(X, below(X)), space_of(2))
    assert region is not None
    assert bool(region.probability(X).isfinite().all())


def test_a_front_may_lie_where_evaluations_work() -> None:
    X = points(40, 2, 1)
    feasibility = Requirements().given(tried(X, below(X)), space_of(2), None)
    assert isinstance(feasibility, Feasibility)
    ends = torch.tensor([[0.1, 0.1], [1.0, 1.0]], dtype=torch.float64)
    assert feasibility.allows(ends).tolist() == [True, False]
    excess = feasibility.excess(ends)
    assert float(excess[0]) == 0.0
    assert float(excess[1]) > 0.5
    assert Requirements("ignore").given(tried(X, below(X)), space_of(2), None) is None


def test_a_front_is_as_sure_to_work_as_the_run_can_tell() -> None:
    def ball(X: Tensor) -> Tensor:  # 39 % of the space
        return (X - 0.4).square().sum(-1) < 0.3

    known, unsure = points(80, 2, 1), points(12, 4, 2)
    sharp = WorkingRegion.of(tried(known, below(known)), space_of(2))
    vague = WorkingRegion.of(tried(unsure, ball(unsure)), space_of(4))
    assert sharp is not None
    assert vague is not None
    assert 0.75 < sharp.sure < 0.85
    assert vague.sure < 0.65
    # Where nothing is sure to work, what did work is allowed, and not only its surroundings.
    worked = unsure[ball(unsure)]
    assert 3 <= len(worked) < len(unsure) / 2
    allowed = Feasibility(space_of(4), vague).allows(worked)
    assert float(allowed.double().mean()) > 0.5
    nothing = WorkingRegion.of(tried(known, known[:, 0] < -1), space_of(2))
    assert nothing is not None
    assert nothing.sure == 0.0


def test_the_doubt_about_the_edge_falls_most_at_the_edge() -> None:
    X = points(25, 2, 8)
    region = WorkingRegion.of(tried(X, below(X)), space_of(2))
    assert region is not None
    target = torch.tensor([[0.65, 0.65]], dtype=torch.float64)
    upward = torch.ones(1, 1, 2, dtype=torch.float64)
    doubt = region.doubt(target, upward, target[:0])
    places = torch.tensor([[0.65, 0.65], [0.1, 0.1], [1.0, 1.0]], dtype=torch.float64)
    drop = doubt.drop(places)
    assert int(drop.argmax()) == 0
    assert float(drop[0]) > 5 * float(drop[1])
    waiting = region.doubt(target, upward, target)
    assert float(waiting.drop(places)[0]) < float(drop[0])
    flat = region.doubt(target, torch.zeros(1, 1, 2, dtype=torch.float64), target[:0])
    assert float(flat.drop(places).abs().max()) == 0.0  # no utility depends on where the edge is


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"failures": "forget"}, "learn"), ({"least": 0.0}, "between"), ({"least": True}, "between")],
)
def test_requirements_that_are_not_possible_are_refused(
    wrong: dict[str, object], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        Requirements(**wrong)  # type: ignore[arg-type]


def test_an_option_that_fails_closes_no_other() -> None:
    X = torch.cat([CHOICE.anchors().X, CHOICE.sample(18, generator=make_generator(3))])
    region = WorkingRegion.of(tried(X, X[:, 2] != 1), CHOICE)
    assert region is not None
    points = CHOICE.sample(200, generator=make_generator(4))
    likely = region.probability(points)
    assert float(likely[points[:, 2] == 1].max()) < 0.4
    assert float(likely[points[:, 2] != 1].min()) > 0.6
    # 0 and 2 stand on either side of 1, and are as far from it as from each other.
    first, last = (likely[points[:, 2] == code].mean() for code in (0, 2))
    assert float((first - last).abs()) < 0.1


def test_what_was_not_measured_says_nothing_of_where_evaluations_fail() -> None:
    space = CoefficientSpace.box(("a", "b"))
    metrics = (Metric("x", kind="unbounded"), Metric("z", kind="unbounded"))
    X = torch.rand(12, 2, generator=make_generator(0), dtype=torch.float64)
    Y = torch.stack([X.sum(-1), X.prod(-1)], -1)
    Y[:6, 1] = torch.nan
    seen = Observations(X, Y, metrics)
    assert WorkingRegion.of(seen, space) is None
    reasons = tuple("broke" if i in (7, 8) else None for i in range(12))
    Y = torch.where(torch.tensor([r is not None for r in reasons]).unsqueeze(-1), torch.nan, Y)
    failing = Observations(X, Y, metrics, failures=reasons)
    region = WorkingRegion.of(failing, space)
    alone = WorkingRegion.of(failing.select(range(6, 12)), space)
    assert region is not None
    assert alone is not None
    assert torch.equal(region.probability(X), alone.probability(X))
