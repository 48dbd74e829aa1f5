"""The study measures what users get: the same front and the same choices as a run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Generator, Tensor

from benchmarks.quality.methods import METHODS
from benchmarks.quality.protocol import hidden, run
from benchmarks.quality.scoring import choices, representatives, weights_of
from map_bo.data import Metric, Observations
from map_bo.loop.optimize import optimize
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.benchmarks import fake_cases


@pytest.mark.slow
def test_the_default_is_what_optimize_does() -> None:
    case = fake_cases.case("noisy")
    *_, record = run(case, METHODS["default"], seed=3, budget=12)
    result = optimize(case.problem, 12, seed=3, verify=0, progress=False)
    assert record.seen is not None
    assert torch.equal(record.seen.X, result.seen.X)
    assert torch.equal(record.seen.Y, result.seen.Y)
    answer = record.checkpoints[12]
    assert answer.numbers["points"] == len(result.front)
    predicted = case.gains(result.front.mean)
    assert torch.equal(answer.predicted, predicted[representatives(predicted)])


@pytest.mark.slow
def test_solved_choices_are_those_of_a_result() -> None:
    case = fake_cases.case("plain")
    *_, record = run(case, METHODS["default"], seed=0, budget=8)
    result = optimize(case.problem, 8, seed=0, verify=0, progress=False)
    result = replace(result, scale=replace(result.scale, point=case.low, best=case.high))
    solved = record.checkpoints[8].solved
    assert solved is not None
    weights = weights_of(0, 2)
    for row in (0, 7, 23):
        names = [metric.name for metric in case.problem.metrics]
        choice = result.choose(dict(zip(names, weights[row].tolist(), strict=True)))
        gains = case.gains(case.truth(choice.x.unsqueeze(0)))[0]
        assert gains.tolist() == pytest.approx(solved[row].tolist(), abs=0.02)


def test_choices_are_made_among_all_points_though_few_are_scored() -> None:
    case = fake_cases.case("plain")
    *_, record = run(case, METHODS["random+surrogate"], seed=0, budget=6)
    answer = record.checkpoints[6]
    assert answer.numbers["points"] > 100
    assert len(answer.real) == 100
    picked = answer.real[choices(answer.predicted, weights_of(0, 2))]
    assert not torch.equal(picked, answer.chosen)


def test_hidden_noise_is_unknown() -> None:
    case = fake_cases.case("noisy")
    X = torch.rand(3, 2, generator=make_generator(0), dtype=torch.float64)
    seen = case.problem.evaluate(X, generator=make_generator(0))
    assert bool(torch.isfinite(seen.counts).all())
    found = hidden(seen)
    assert isinstance(found, Observations)
    assert bool(found.Yvar.isnan().all())
    assert bool(found.counts.isnan().all())
    assert torch.equal(found.Y, seen.Y)


def test_fixed_answers_need_few_evaluations() -> None:
    case = fake_cases.case("plain")
    *_, blend = run(case, METHODS["uniform-blend"], seed=0, budget=12)
    *_, expert = run(case, METHODS["best-expert"], seed=0, budget=12)
    assert blend.seen is not None
    assert expert.seen is not None
    assert (len(blend.seen), len(expert.seen)) == (0, 2)
    anchors = case.problem.space.anchors()
    gains = case.gains(case.truth(anchors.X))
    assert torch.equal(blend.checkpoints[6].real, gains[-1:])
    assert torch.equal(expert.checkpoints[12].real, gains[1:3][gains[1:3].mean(-1).argmax()][None])


def test_the_published_design_starts_anew_for_every_budget() -> None:
    case = fake_cases.case("plain")
    records = list(run(case, METHODS["reference-kind-box"], seed=0, budget=12))
    assert [len(record.checkpoints) for record in records] == [1, 2, 3]
    assert records[-1].seen is None
    assert all(len(answer.real) for answer in records[-1].checkpoints.values())


@dataclass(frozen=True, eq=False)
class _Wide:
    """The noisy case's problem, stretched over [-3, 3]."""

    inner: Problem

    @property
    def space(self) -> CoefficientSpace:
        return CoefficientSpace(self.inner.space.names, (-3.0, -3.0), (3.0, 3.0))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.inner.metrics

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        X = self.space.check(X)
        return replace(self.inner.evaluate((X + 3) / 6, generator=generator), X=X)


class _WideCase(fake_cases.FakeCase):
    def wide(self) -> Problem | None:
        return _Wide(self.problem)

    def truth(self, X: Tensor) -> Tensor:
        return super().truth((X + 3) / 6)


@pytest.mark.slow
def test_intervals_are_checked_in_the_box_that_was_searched() -> None:
    plain = fake_cases.case("noisy")
    case = _WideCase(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    # A method that hands over intervals, in the wide box.
    entry = replace(METHODS["default"], name="default in the wide box", box="wide")
    *_, record = run(case, entry, seed=0, budget=8)
    answer = record.checkpoints[8]
    assert answer.failure is None
    assert record.seen is not None
    assert float(record.seen.X.abs().max()) > 1  # outside the case's own box
    assert 0 <= answer.numbers["coverage"] <= 1
