from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from linear_operator.utils.errors import NotPSDError
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError, SurrogateError
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import Sobol, Uniform, is_repeat
from map_bo.samplers.posterior.acquisition import _constraints
from map_bo.samplers.posterior.driven import PosteriorDriven, Situation, with_reference
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.posterior.hypervolume import QLogEHVI, QLogNEHVI
from map_bo.samplers.posterior.scalarised import HypervolumeScalarised, QLogNParEGO, ScalarisedUCB
from map_bo.samplers.posterior.thompson import ThompsonFronts
from map_bo.samplers.posterior.variance import IntegratedVariance, gain_slopes
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace, LinearConstraint
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured, some_seen

BOX = CoefficientSpace.box(("a", "b"))


def small(**settings: Any) -> QLogNEHVI:
    """Return the sampler in a size that takes a tenth of a second."""
    sizes: dict[str, Any] = {
        "surrogate": Quadratic(),
        "restarts": 2,
        "raw_samples": 16,
        "mc_samples": 8,
        "steps": 10,
    }
    return QLogNEHVI(**{**sizes, **settings})


def five_metrics(X: Tensor) -> Observations:
    names = tuple(Metric(f"m{i}") for i in range(5))
    return Observations(X, torch.full((len(X), 5), 0.5), names)


class TestQLogNEHVI(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return small(initial=5)

    @pytest.fixture(params=["box", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.parametrize(("experts", "count"), [(2, 6), (4, 8), (8, 14)])
def test_initial_points_by_default(experts: int, count: int) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)], blocks=("x", "y", "z"))
    assert QLogNEHVI().initial_points(space) == count
    assert QLogNEHVI(initial=3).initial_points(space) == 3


@pytest.mark.parametrize(("seen", "waiting"), [(0, 0), (3, 0), (2, 3)])
def test_the_design_comes_first(seen: int, waiting: int) -> None:
    design, generator = Sobol(), make_generator(0)
    points = design.propose(measured(torch.zeros(0, 2)), BOX, 6, generator=generator)
    before, pending = measured(points[:seen]), points[seen : seen + waiting]
    X = small().propose(before, BOX, 1, pending=pending, generator=generator)
    assert torch.equal(X, points[seen + waiting : seen + waiting + 1])


def test_a_batch_finishes_the_design_and_goes_on_with_the_acquisition() -> None:
    generator = make_generator(0)
    points = Sobol().propose(measured(torch.zeros(0, 2)), BOX, 8, generator=generator)
    X = small().propose(measured(points[:4]), BOX, 4, generator=generator)
    assert torch.equal(X[:2], points[4:6])
    assert not is_repeat(X[2:], points, BOX).any()


def test_proposals_of_one_call_keep_apart() -> None:
    X = small().propose(some_seen(BOX, 12), BOX, 3, generator=make_generator(0))
    assert float(torch.pdist(X).min()) > 0.02


@pytest.mark.parametrize(("failed", "warns"), [((), False), ((0, 1, 2, 3, 4), True)])
def test_outcomes_that_are_on_their_way_are_no_failures(
    failed: tuple[int, ...], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    points = Sobol().propose(measured(torch.zeros(0, 2)), BOX, 8, generator=make_generator(0))
    sampler = small(initial=4)
    seen, pending = measured(points[:5], failed=failed), points[5:]
    if not failed:
        seen, pending = seen.select([0]), points[1:]
    X = sampler.propose(seen, BOX, 1, pending=pending, generator=make_generator(0))
    assert not is_repeat(X, points, BOX).any()
    assert ("evaluations succeeded" in caplog.text) == warns


def test_pending_points_and_their_surroundings_are_avoided() -> None:
    seen = some_seen(BOX, 12)
    pending = small().propose(seen, BOX, 1, generator=make_generator(0))
    X = small().propose(seen, BOX, 1, pending=pending, generator=make_generator(0))
    assert float((X - pending).norm()) > 0.02


def test_a_failed_point_and_its_surroundings_are_avoided() -> None:
    seen, generator = some_seen(BOX, 12), make_generator(0)
    for _ in range(3):
        X = small().propose(seen, BOX, 1, generator=generator)
        failed = seen.X[~seen.ok]
        assert not is_repeat(X, failed, BOX, tolerance=0.02).any()
        seen = seen.append(measured(X, failed=(0,)))


@pytest.mark.parametrize("succeeded", [0, 1, 2])
def test_too_few_successes_leave_it_to_the_design(
    succeeded: int, caplog: pytest.LogCaptureFixture
) -> None:
    points = Sobol().propose(measured(torch.zeros(0, 2)), BOX, 9, generator=make_generator(0))
    seen = measured(points[:8], failed=tuple(range(succeeded, 8)))
    sampler = small(requirements=Requirements("ignore"))  # learning, it would leave points out
    X = sampler.propose(seen, BOX, 1, generator=make_generator(0))
    assert torch.equal(X, points[8:])
    assert f"{succeeded} of 8 evaluations succeeded" in caplog.text


class Broken:
    """A surrogate that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def fit(self, seen: Observations, space: CoefficientSpace) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [SurrogateError("cannot fit"), NotPSDError("not positive"), FloatingPointError("overflow")],
)
def test_numerical_failures_leave_it_to_the_design(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    seen, generator = some_seen(BOX, 9), make_generator(0)
    X = small(surrogate=Broken(error)).propose(seen, BOX, 2, generator=generator)
    assert torch.equal(X, Sobol().propose(seen, BOX, 2, generator=generator))
    assert caplog.records[0].levelno == logging.WARNING
    assert f"the design goes on: {type(error).__name__}: {error}" in caplog.text


def test_mistakes_are_not_taken_for_numerical_failures() -> None:
    sampler = small(surrogate=Broken(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"):
        sampler.propose(some_seen(BOX, 9), BOX, 1, generator=make_generator(0))


class Nowhere:
    """A quadratic surrogate whose posterior is NaN everywhere."""

    def fit(self, seen: Observations, space: CoefficientSpace) -> Any:
        nowhere = seen.succeeded()
        model = Quadratic().fit(nowhere, space)
        posterior = model.posterior

        def broken(X: Tensor, *args: Any, **kwargs: Any) -> Any:
            return posterior(X * torch.nan if X.dim() > 2 else X, *args, **kwargs)

        model.posterior = broken  # type: ignore[method-assign]
        return model


def test_an_acquisition_that_is_not_finite_leaves_it_to_the_design(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen, generator = some_seen(BOX, 9), make_generator(0)
    X = small(surrogate=Nowhere()).propose(seen, BOX, 1, generator=generator)
    assert torch.equal(X, Sobol().propose(seen, BOX, 1, generator=generator))
    assert "the design goes on" in caplog.text


def test_where_everything_is_known_the_design_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("map_bo.samplers.posterior.acquisition.NEAREST", 1.0)
    seen, generator = some_seen(BOX, 9), make_generator(0)
    X = small().propose(seen, BOX, 1, generator=generator)
    assert torch.equal(X, Sobol().propose(seen, BOX, 1, generator=generator))
    assert "best at points known already" in caplog.text


@pytest.mark.parametrize("seen", [0, 12])
def test_more_than_four_metrics_are_refused_at_once(seen: int) -> None:
    X = BOX.sample(seen, generator=make_generator(0))
    with pytest.raises(SamplerError, match="up to 4 metrics and there are 5") as caught:
        QLogNEHVI().propose(five_metrics(X), BOX, 1, generator=make_generator(0))
    assert "front_uncertainty" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restarts": 0}, "restarts is 0"),
        ({"raw_samples": 0}, "raw_samples is 0"),
        ({"mc_samples": -1}, "mc_samples is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"initial": -1}, "initial is -1"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        QLogNEHVI(**settings)  # type: ignore[arg-type]


def test_an_unknown_metric_in_the_reference_is_refused() -> None:
    sampler = small(reference={"frist": 0.1})
    with pytest.raises(SamplerError, match="unknown metrics: frist") as caught:
        sampler.propose(some_seen(BOX, 1), BOX, 1, generator=make_generator(0))
    assert caught.value.hint == "the metrics are first, second"


SMALL: dict[str, Any] = {"restarts": 2, "raw_samples": 16, "mc_samples": 8, "steps": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        QLogNEHVI(**SMALL),
        QLogEHVI(**SMALL),
        HypervolumeScalarised(**SMALL),
        QLogNParEGO(**SMALL),
        ScalarisedUCB(**SMALL),
        IntegratedVariance(**SMALL),
        FrontUncertainty(**SMALL),
        FrontUncertainty(criterion="regret", **SMALL),
        ThompsonFronts(),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("value", [1.0, 2e7])
def test_a_metric_without_a_range_disturbs_no_acquisition(
    sampler: PosteriorDriven,
    value: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = some_seen(BOX, 9)
    metrics = (*seen.metrics, Metric("safe", kind="unbounded"))
    flat = torch.full((len(seen), 1), value)
    seen = Observations(seen.X, torch.cat([seen.Y, flat], -1), metrics)
    chosen: list[Situation] = []

    choose = type(sampler).choose

    def watched(self: PosteriorDriven, situation: Situation, n: int) -> Tensor:
        chosen.append(situation)
        return choose(self, situation, n)

    monkeypatch.setattr(type(sampler), "choose", watched)
    with caplog.at_level(logging.WARNING):
        X = sampler.propose(seen, BOX, 1, generator=make_generator(0))
    assert not caplog.records, "the design did not have to go on"
    assert bool(BOX.contains(X).all())
    [situation] = chosen
    assert bool((situation.observed[:, 2] == 1).all())
    assert bool((gain_slopes(situation, seen.X)[:, 2] == 0).all())
    assert bool((gain_slopes(situation, seen.X)[:, :2] > 0).all())


class _AsBefore(Uniform):
    """A sampler that was written for version 0.1."""

    def above(self, reference: Mapping[str, float]) -> Sampler:
        return Uniform(anchors="second" not in reference)


def test_samplers_take_the_reference_point_under_the_old_name_too() -> None:
    given = {"first": 0.1, "second": 0.2}
    with pytest.warns(DeprecationWarning, match="_AsBefore.above is now with_reference"):
        assert with_reference(_AsBefore(), given) == Uniform(anchors=False)
    assert with_reference(Sobol(), given) == Sobol()
    assert with_reference(small(), given) == small(reference=given)
    own = small(reference={"first": 0.3})
    assert with_reference(own, given) == own


def test_constraints_turn_into_botorchs_form() -> None:
    space = CoefficientSpace(
        ("a", "b", "c"),
        (0.0,) * 3,
        (1.0,) * 3,
        (LinearConstraint((1.0, 0.0, 2.0), 1.5), LinearConstraint((0.0, 1.0, 1.0), 1.0, True)),
    )
    inequalities, equalities = _constraints(space)
    assert inequalities is not None
    assert equalities is not None
    ((indices, weights, bound),) = inequalities
    assert (indices.tolist(), weights.tolist(), bound) == ([0, 2], [-1.0, -2.0], -1.5)
    ((indices, weights, bound),) = equalities
    assert (indices.tolist(), weights.tolist(), bound) == ([1, 2], [1.0, 1.0], 1.0)
    assert _constraints(BOX) == (None, None)


def test_a_constraint_holds_the_proposals_back() -> None:
    # Both metrics grow with every coefficient, so the best point is on the bound of the sum.
    space = CoefficientSpace.box(("a", "b"), sum_at_most=0.8)
    X = torch.cat([space.anchors().X, space.sample(10, generator=make_generator(0))])
    metrics = (Metric("first", kind="unbounded"), Metric("second", kind="unbounded"))
    Y = torch.stack([X @ torch.tensor([2.0, 1.0]).double(), X @ torch.tensor([1.0, 2.0]).double()])
    seen = Observations(X, Y.T, metrics, Yvar=torch.full((len(X), 2), 1e-6))
    found = small().propose(seen, space, 1, generator=make_generator(0))
    assert float(found.sum()) == pytest.approx(0.8, abs=1e-4)


def test_one_metric_is_optimised_too() -> None:
    X = torch.cat([BOX.anchors().X, BOX.sample(10, generator=make_generator(0))])
    Y = 0.3 + (X - torch.tensor([0.3, 0.7]).double()).square().sum(-1, keepdim=True)
    metric = Metric("loss", direction="min", kind="unbounded")
    seen = Observations(X, Y, (metric,), Yvar=torch.full_like(Y, 1e-8))
    found = small().propose(seen, BOX, 1, generator=make_generator(0))
    assert torch.allclose(found, torch.tensor([[0.3, 0.7]]).double(), atol=0.03)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_batches_stay_in_every_space(name: str) -> None:
    space = SPACES[name]
    X = small().propose(some_seen(space, 12), space, 2, generator=make_generator(0))
    space.check(X)
    assert not is_repeat(X, some_seen(space, 12).X, space).any()


def narrow(X: Tensor) -> Observations:
    """Return two narrow peaks, each far from every anchor."""
    peaks = torch.tensor([[0.72, 0.45], [0.45, 0.72]], dtype=torch.float64)
    Y = torch.sigmoid(3 - 40 * (X.unsqueeze(1) - peaks).square().sum(-1))
    return Observations(X, Y, (Metric("first"), Metric("second")), Yvar=torch.full_like(Y, 1e-6))


def hypervolume_after(sampler: Sampler, budget: int, seed: int) -> float:
    generator = make_generator(seed)
    seen = narrow(torch.zeros(0, 2, dtype=torch.float64))
    while len(seen) < budget:
        X = sampler.propose(seen, BOX, 1, generator=generator)
        seen = seen.append(narrow(X))
    better = seen.Y[(seen.Y > 0.01).all(-1)]
    return float(Hypervolume(torch.tensor([0.01, 0.01]).double()).compute(better))


@pytest.mark.slow
def test_it_beats_uniform_sampling_at_an_equal_budget() -> None:
    def median(sampler: Sampler) -> float:
        volumes = [hypervolume_after(sampler, 14, seed) for seed in range(5)]
        return float(torch.tensor(volumes).median())

    assert median(small()) > 1.05 * median(Uniform())
