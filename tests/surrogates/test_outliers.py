from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.loop.optimize import optimize
from map_bo.loop.settings import Settings
from map_bo.rng import make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.space import CoefficientSpace
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.outliers import (
    Outlier,
    Screened,
    SetsAside,
    fit_screened,
    screened,
    without,
)
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate, fits_partial_rows, has_uncertainty
from map_bo.surrogates.validation import LeavesOneOut, promises_leave_one_out, validate
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import LeaveOneOutContract
from tests.loop.bowls import Bowls, quick

SPACE = CoefficientSpace.box(("a", "b"))
LOSSES = (Metric("x", "min", "loss"), Metric("y", "min", "loss"))
SURROGATES = [Quadratic(), GP(), Hybrid()]


def losses(X: Tensor) -> Tensor:
    centres = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    return (X.unsqueeze(1) - centres).square().sum(-1) + 0.1


def evaluations(n: int = 16, seed: int = 0, noise: float = 0.0) -> Observations:
    generator = make_generator(seed)
    X = torch.cat([SPACE.anchors().X, SPACE.sample(n - 4, generator=generator)])
    Y = losses(X)
    drawn = torch.randn(Y.shape, generator=make_generator(seed + 1), dtype=torch.float64)
    return Observations(X, Y * (noise * drawn).exp(), LOSSES)


def spoilt(seen: Observations, values: dict[int, float], column: int = 0) -> Observations:
    Y = seen.Y.clone()
    for row, value in values.items():
        Y[row, column] = value
    return dataclasses.replace(seen, Y=Y)


def rows_of(seen: Observations, surrogate: Surrogate, space: CoefficientSpace = SPACE) -> set[int]:
    return {one.row for one in Screened(surrogate).screen(seen, space).outliers}


class TestScreened(LeaveOneOutContract):
    """It keeps to the whole contract of what it wraps."""

    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Screened(Quadratic())


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_clean_evaluations_are_fitted_as_they_are(surrogate: Surrogate, noise: float) -> None:
    seen = evaluations(noise=noise)
    found = Screened(surrogate).screen(seen, SPACE)
    assert found.outliers == ()
    assert found.kept is seen
    X = SPACE.sample(5, generator=make_generator(9))
    with torch.no_grad():
        assert torch.equal(found.model.link_mean(X), surrogate.fit(seen, SPACE).link_mean(X))


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    "values", [{5: 5.0}, {9: 1e3}, {5: 50.0, 9: 1e3}, {4: 1e-6}], ids=lambda v: str(list(v))
)
def test_what_diverged_is_set_aside_and_nothing_else(
    surrogate: Surrogate, values: dict[int, float]
) -> None:
    clean = evaluations()
    seen = spoilt(clean, values)
    found = Screened(surrogate).screen(seen, SPACE)
    assert {(one.row, one.metric) for one in found.outliers} == {(row, "x") for row in values}
    assert torch.equal(found.kept.measured[:, 1], torch.ones(16, dtype=torch.bool))
    X = SPACE.sample(50, generator=make_generator(9))
    with torch.no_grad():
        gap = found.model.link_mean(X).exp() - losses(X)
        worse = surrogate.fit(seen, SPACE).link_mean(X).exp() - losses(X)
    assert float(gap.abs().mean()) < 0.2
    assert float(gap[:, 0].abs().mean()) < 0.5 * float(worse[:, 0].abs().mean())
    for one in found.outliers:
        expected = float(clean.Y[one.row, 0])
        assert abs(one.expected - expected) < 4 * one.deviation + 0.05


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_outliers_do_not_depend_on_the_unit(factor: float) -> None:
    seen = spoilt(evaluations(), {5: 5.0, 9: 50.0})
    metrics = tuple(Metric(one.name, "max", "unbounded") for one in LOSSES)
    plain = Observations(seen.X, -seen.Y, metrics)
    scaled = Observations(seen.X, -factor * seen.Y, metrics)
    assert rows_of(plain, Quadratic()) == rows_of(scaled, Quadratic()) != set()


def test_a_count_that_is_stuck_at_zero_is_set_aside() -> None:
    X = torch.cat([SPACE.anchors().X, SPACE.sample(16, generator=make_generator(3))])
    p = 0.9 - 0.3 * (X - 0.6).square().sum(-1, keepdim=True)
    Y = (200 * p).round() / 200
    seen = Observations(X, Y, (Metric("safe"),), counts=torch.full_like(Y, 200.0))
    assert rows_of(seen, Quadratic()) == set()
    Y[7] = 0.0
    seen = Observations(X, Y, (Metric("safe"),), counts=torch.full_like(Y, 200.0))
    assert rows_of(seen, Quadratic()) == {7}


def test_few_evaluations_are_all_kept() -> None:
    seen = spoilt(evaluations(7), {5: 1e3})
    assert Screened(Quadratic()).screen(seen, SPACE).kept is seen


def cliff(X: Tensor) -> Tensor:
    """The losses with a narrow region in which merges break."""
    middle = torch.tensor([0.55, 0.75], dtype=torch.float64)
    broken = (X - middle).norm(dim=-1) < 0.12
    Y = losses(X)
    Y[broken, 0] += 30.0
    return Y


@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)
def test_a_value_is_taken_back_once_another_bears_it_out(surrogate: Surrogate) -> None:
    sample = SPACE.sample(60, generator=make_generator(5))
    good = sample[(cliff(sample) < 2).all(-1)][:12]
    inside = torch.tensor([[0.53, 0.77], [0.58, 0.72], [0.55, 0.8]], dtype=torch.float64)
    X = torch.cat([SPACE.anchors().X, good, inside[:1]])
    assert rows_of(Observations(X, cliff(X), LOSSES), surrogate) <= {16}
    for more in (2, 3):
        X = torch.cat([SPACE.anchors().X, good, inside[:more]])
        assert rows_of(Observations(X, cliff(X), LOSSES), surrogate) == set()


def test_half_a_space_that_breaks_is_structure() -> None:
    seen = evaluations(20)
    broken = seen.X[:, 0] > 0.6
    assert 3 <= int(broken.sum()) <= 12
    Y = seen.Y + 40.0 * broken.unsqueeze(-1)
    assert rows_of(dataclasses.replace(seen, Y=Y), Quadratic()) == set()


def test_the_wrapper_has_the_abilities_of_what_it_wraps() -> None:
    inner = Quadratic()
    outer = screened(inner)
    assert isinstance(outer, SetsAside)
    assert repr(outer) == repr(inner)
    assert screened(outer) is outer
    for asked in (promises_leave_one_out, fits_partial_rows, has_uncertainty):
        assert asked(outer) == asked(inner)
    eye = torch.eye(2, dtype=torch.float64)
    assert promises_leave_one_out(screened(Informed(inner, SPACE, eye)))
    for none in (Plain(), PublishedQuadratic()):
        assert screened(none) is none
        assert fit_screened(none, evaluations(), SPACE).outliers == ()
    assert Settings(budget=12, outliers="keep").run_surrogate == Settings(budget=12).surrogate


def test_validation_is_about_what_was_fitted() -> None:
    found = Screened(Quadratic()).screen(spoilt(evaluations(), {5: 50.0}), SPACE)
    assert isinstance(found.model, LeavesOneOut)
    rmse = validate(found.model).rmse
    assert max(rmse) < 1.0
    kept = validate(Quadratic().fit(spoilt(evaluations(), {5: 50.0}), SPACE)).rmse
    assert kept[0] > 1.0


def test_an_outlier_says_itself_and_is_read_back() -> None:
    one = Outlier(5, "x", 50.0, 0.42, 0.025)
    assert one.note() == (
        "evaluation 6: x = 50 is set aside as an outlier: the other evaluations predict "
        "0.42 +- 0.05; outliers=keep fits it all the same"
    )
    assert Outlier.read(one.describe()) == one
    seen = without(evaluations(8), [one])
    assert seen.partial.tolist() == [False] * 5 + [True] + [False] * 2


class Diverging(Bowls):
    """One evaluation of the second metric returns a thousand."""

    def true_values(self, X: Tensor) -> Tensor:
        Y = super().true_values(X)
        if len(self.calls) == 9:
            Y[:, 1] = 1e3
        return Y


def test_a_run_says_what_it_set_aside_and_records_it_all_the_same() -> None:
    values = {
        field.name: getattr(quick(16), field.name)
        for field in dataclasses.fields(Settings)
        if field.name in ("sampler", "surrogate", "solver", "verify", "retries")
    }
    told = optimize(Diverging(), 16, progress=False, tracking="none", **values)
    assert float(told.seen.Y[8, 1]) == 1e3
    assert bool(told.seen.ok.all())
    [one] = told.summary["outliers"]
    assert (one["evaluation"], one["metric"], one["value"]) == (9, "far from b", 1e3)
    assert any("far from b = 1000 is set aside" in note for note in told.summary["notes"])
    clean = optimize(Bowls(), 16, progress=False, tracking="none", **values)
    torch.testing.assert_close(told.scale.point, clean.scale.point)
    assert clean.summary["outliers"] == []
    kept = optimize(Diverging(), 16, progress=False, tracking="none", outliers="keep", **values)
    assert kept.summary["outliers"] == []
    [gap, worse] = [
        float((run.front.mean - Bowls().true_values(run.front.X)).abs().max())
        for run in (told, kept)
    ]
    assert gap < 0.3 * worse


def test_the_sampler_does_not_see_an_outlier_either() -> None:
    seen = spoilt(evaluations(12), {5: 1e3})
    sampler = Settings(budget=20, surrogate=Quadratic(), sampler=Adaptive()).run_sampler
    assert isinstance(sampler, Adaptive)
    X, told = sampler.propose_and_tell(seen, SPACE, 1, generator=make_generator(0))
    assert [one["evaluation"] for one in told["outliers"]] == [6]
    assert len(X) == 1
    assert Settings(budget=12, sampler=Sobol()).run_sampler == Sobol()
