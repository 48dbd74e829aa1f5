"""The unit, the label and the order of metrics and experts change no run; see the benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.invariance import FACTORS, SURROGATES, Outcome, Truth, optimise, variants
from map_bo.data import Observations
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.preferences import Preference, choose
from map_bo.rng import make_generator
from map_bo.scale import Scale
from map_bo.surrogates.prediction import predict

# The published fit is the method as published: it starts from fixed weights and its link for
# losses has a unit.
OURS = sorted(set(SURROGATES) - {"published"})
QUICK = ("quadratic", "gp", "hybrid", "informed")
BUDGET = 8
SOLVER = GradientSolver(points=60, steps=40)
_first: dict[tuple[str, str, int], Outcome] = {}


def first(kind: str, surrogate: str, budget: int = BUDGET) -> Outcome:
    at = (kind, surrogate, budget)
    if at not in _first:
        _first[at] = optimise(Truth(kind), surrogate, budget, solver=SOLVER)
    return _first[at]


def check_same(truth: Truth, surrogate: str, budget: int = BUDGET) -> None:
    plain = first(truth.kind, surrogate, budget)
    found = optimise(truth, surrogate, budget, solver=SOLVER)
    torch.testing.assert_close(found.X, plain.X, rtol=0.0, atol=1e-3)
    assert found.volume == pytest.approx(plain.volume, rel=2e-3)
    # In another order, fits end within the tolerance of their optimiser, not of rounding.
    same_order = truth.in_order(torch.arange(3.0)[None]).tolist() == [[0, 1, 2]]
    same_order = same_order and truth.metric_order == (0, 1)
    assert found.inside == pytest.approx(plain.inside, abs=0.02 if same_order else 0.1)
    weights = {metric.name: float(i + 1) for i, metric in enumerate(Truth().metrics)}
    one, other = (o.result.choose(weights).x for o in (plain, found))
    torch.testing.assert_close(truth.in_order(other[None])[0], one, rtol=0.0, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", QUICK)
@pytest.mark.parametrize("factor", [1e-12, 1e9])
def test_a_loss_in_another_unit_is_the_same_run(surrogate: str, factor: float) -> None:
    check_same(Truth("loss", factor=factor), surrogate)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["quadratic", "gp"])
@pytest.mark.parametrize(
    "truth",
    [
        Truth("unbounded", factor=1e-12),
        Truth("unbounded", mirrored=True),
        Truth("unbounded", shift=10.0),
    ],
    ids=["unit", "direction", "shift"],
)
def test_an_unbounded_metric_written_differently_is_the_same_run(
    truth: Truth, surrogate: str
) -> None:
    check_same(truth, surrogate)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "surrogate"), [("accuracy", "hybrid"), ("counts", "quadratic")])
def test_an_error_rate_is_the_run_of_its_accuracy(kind: str, surrogate: str) -> None:
    check_same(Truth(kind, mirrored=True), surrogate)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("surrogate", OURS)
@pytest.mark.parametrize("kind", ["loss", "unbounded", "accuracy", "counts"])
def test_every_writing_is_the_same_run(kind: str, surrogate: str) -> None:
    for truth in variants(kind, FACTORS).values():
        check_same(truth, surrogate, 12)


def data(truth: Truth, count: int = 10) -> Observations:
    """Return evaluations at the same points, coefficients in the order of ``truth``."""
    X = Truth().space.sample(count, generator=make_generator(0))
    X = torch.cat([Truth().space.anchors().X, X])
    return truth.evaluate(X[:, list(truth.expert_order)], generator=make_generator(0))


@pytest.mark.parametrize("surrogate", [name for name in OURS if name != "sparse"])
@pytest.mark.parametrize("kind", ["loss", "unbounded", "counts"])
def test_the_order_of_metrics_and_experts_changes_no_fit(kind: str, surrogate: str) -> None:
    plain, other = Truth(kind), Truth(kind, metric_order=(1, 0), expert_order=(2, 0, 1))
    points = plain.space.sample(50, generator=make_generator(1))
    found = []
    for truth in (plain, other):
        seen = data(truth)
        model = SURROGATES[surrogate](truth.space).fit(seen, truth.space)
        told = predict(model, points[:, list(truth.expert_order)])
        back = torch.tensor(truth.metric_order).argsort()
        scale = Scale.of(seen, truth.space)
        names = [metric.name for metric in plain.metrics]
        weights = Preference(weights=dict(zip(names, (1.0, 3.0), strict=True)))
        chosen = choose(told.mean, weights, scale)
        found.append((told.mean[:, back], told.std[:, back], scale.width[back], chosen))
    (mean, std, width, row), (mean_2, std_2, width_2, row_2) = found
    torch.testing.assert_close((mean_2 - mean) / width, torch.zeros_like(mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(std_2, std, rtol=1e-2, atol=0.0)
    assert torch.equal(width_2, width)
    assert row_2 == row


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", QUICK)
@pytest.mark.parametrize(
    "orders", [{"metric_order": (1, 0)}, {"expert_order": (2, 0, 1)}], ids=["metrics", "experts"]
)
def test_the_order_of_metrics_and_experts_changes_no_run(
    surrogate: str, orders: dict[str, tuple[int, ...]]
) -> None:
    check_same(Truth("loss", **orders), surrogate)  # type: ignore[arg-type]
