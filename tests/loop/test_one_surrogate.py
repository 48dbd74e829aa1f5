from __future__ import annotations

import dataclasses

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import SamplerError, SurrogateError
from map_bo.loop.optimize import optimize
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.pareto.gradient import GradientSolver
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.published.bins import Bins
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.outliers import Screened
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from map_bo.tracking.jsonl import MemoryStore
from tests.contracts.smallest_surrogate import Plain
from tests.loop.bowls import Bowls, quick

SMALL = FrontUncertainty(restarts=1, raw_samples=16, mc_samples=8, steps=5, preferences=6, draws=2)


def test_the_sampler_looks_through_the_surrogate_of_the_run() -> None:
    settings = Settings(budget=12, surrogate=GP())
    assert settings.run_sampler == Adaptive(surrogate=Screened(GP()))
    other = dataclasses.replace(settings, surrogate=Quadratic())  # nothing of the old one is left
    assert other.run_sampler == Adaptive(surrogate=Screened(Quadratic()))
    own = Settings(budget=12, surrogate=GP(), sampler=Adaptive(surrogate=Quadratic()))
    assert own.run_sampler == Adaptive(surrogate=Screened(Quadratic()))
    kept = dataclasses.replace(own, outliers="keep")
    assert kept.run_sampler == own.sampler
    assert kept.run_surrogate == GP()
    assert Settings(budget=12, surrogate=GP(), sampler=Sobol()).run_sampler == Sobol()
    assert Settings(budget=12).surrogate == Auto()


def test_an_ability_that_a_sampler_needs_is_checked_before_the_run() -> None:
    with pytest.raises(SamplerError, match="Plain does not leave evaluations out") as caught:
        Settings(budget=12, surrogate=Plain(), sampler=Bins())
    assert "sampler.surrogate=quadratic" in str(caught.value.hint)
    Settings(budget=12, surrogate=Plain(), sampler=Bins(GP()))
    with pytest.raises(SamplerError, match="the fit of PublishedQuadratic has no uncert") as caught:
        Settings(budget=12, surrogate=PublishedQuadratic())
    assert "sampler=sobol" in str(caught.value.hint)
    Settings(budget=12, surrogate=PublishedQuadratic(), sampler=Sobol())
    Settings(budget=12, surrogate=PublishedQuadratic(), sampler=Adaptive(surrogate=GP()))


def test_surrogates_propose_different_points() -> None:
    runs = [
        Run(Bowls(noise=0.1), quick(7, sampler=SMALL, surrogate=surrogate), MemoryStore()).drive()
        for surrogate in (Quadratic(), GP())
    ]
    first, second = (run.seen.X for run in runs)
    anchors = len(Bowls().space.anchors())
    assert torch.equal(first[:anchors], second[:anchors])
    assert not torch.allclose(first[anchors:], second[anchors:], atol=1e-3)


def test_the_record_says_what_was_looked_through() -> None:
    run = Run(Bowls(), quick(7, sampler=SMALL, surrogate=GP(), verify=0), store := MemoryStore())
    result = run.drive()
    fits = [event.data.get("surrogate") for event in store.read() if event.kind == "proposed"]
    assert {fit["settings"] for fit in fits if fit} == {repr(GP())}
    assert {fit["model"] for fit in fits if fit} == {"GPModel"}
    assert result.summary["sampler_surrogate"] is None
    own = quick(7, sampler=Adaptive(SMALL, surrogate=Quadratic()), surrogate=GP(), verify=0)
    result = Run(Bowls(), own, store := MemoryStore()).drive()
    fits = [event.data.get("surrogate") for event in store.read() if event.kind == "proposed"]
    assert {fit["settings"] for fit in fits if fit} == {repr(Quadratic())}
    assert result.summary["sampler_surrogate"] == repr(Quadratic())


@pytest.mark.parametrize("sampler", [SMALL, Sobol()], ids=["posterior", "design"])
def test_the_smallest_surrogate_carries_a_whole_run(sampler: FrontUncertainty | Sobol) -> None:
    result = optimize(
        Bowls(),
        9,
        surrogate=Plain(),
        sampler=sampler,
        stop={"criterion": "regret", "tolerance": 1e-9, "least": 6},
        verify=2,
        solver=GradientSolver(points=10, steps=5),
        progress=False,
        tracking="none",
    )
    assert len(result.front) > 0
    assert int(result.front.verified.sum()) == 2
    assert result.summary["stop"]["least_gain"] > 0
    assert result.summary["uncertainty"]["hypervolume"]["median"] > 0
    choice = result.choose({"near a": 2.0})
    assert result.space.check(choice.x.unsqueeze(0)).shape == (1, 2)


def test_a_surrogate_that_is_not_legal_is_refused_before_anything_is_evaluated() -> None:
    class Illegal:
        def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
            return torch.nn.Linear(1, 1)  # type: ignore[return-value]

    def through(surrogate: Surrogate, sampler: FrontUncertainty | Sobol) -> Bowls:
        problem = Bowls()
        with pytest.raises(SurrogateError, match=r"Illegal\.fit returns a Linear"):
            optimize(problem, 8, surrogate=surrogate, sampler=sampler, progress=False)
        return problem

    assert through(Illegal(), Sobol()).calls == []
    assert through(Quadratic(), SMALL.with_surrogate(Illegal())).calls == []
