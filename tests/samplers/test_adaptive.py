from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.blocks import TiedSobol
from map_bo.samplers.designs.optimal import OptimalDesign
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from tests.choices import CHOICE, Levels
from tests.contracts.sampler_contract import SPACES, SamplerContract, measured, some_seen

SMALL = FrontUncertainty(
    surrogate=Quadratic(),
    initial=5,
    restarts=2,
    raw_samples=16,
    mc_samples=8,
    steps=8,
    preferences=6,
    draws=2,
)


class TestAdaptive(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return Adaptive(SMALL)

    @pytest.fixture(params=["sum", "blocks"])
    def space(self, request: pytest.FixtureRequest) -> CoefficientSpace:
        return SPACES[request.param]


@pytest.mark.parametrize(("name", "design"), [("box", Sobol()), ("blocks", TiedSobol())])
def test_the_design_suits_the_space(name: str, design: Sampler) -> None:
    space, generator = SPACES[name], make_generator(0)
    nothing = measured(torch.zeros(0, space.d, dtype=torch.float64))
    X = Adaptive(SMALL).propose(nothing, space, 5, generator=generator)
    assert torch.equal(X, design.propose(nothing, space, 5, generator=generator))


def test_after_the_anchors_the_posterior_decides() -> None:
    space, generator = SPACES["box"], make_generator(0)
    seen = some_seen(space, len(space.anchors()))
    chosen = Adaptive(SMALL).propose(seen, space, 1, generator=generator)
    assert torch.equal(chosen, SMALL.propose(seen, space, 1, generator=generator))
    assert not torch.equal(chosen, Sobol().propose(seen, space, 1, generator=generator))


def test_the_reference_of_the_run_reaches_the_acquisition() -> None:
    given = {"first": 0.2, "second": 0.9}
    assert Adaptive().with_reference(given).acquisition.reference == given
    own = Adaptive(FrontUncertainty(reference={"first": 0.1}))
    assert own.with_reference(given) == own


def test_it_tells_the_scores_of_the_fit_that_it_chose_by() -> None:
    space, generator = SPACES["box"], make_generator(0)
    sampler = Adaptive(SMALL)
    nothing = measured(torch.zeros(0, space.d, dtype=torch.float64))
    X, fit = sampler.propose_and_tell(nothing, space, 2, generator=generator)
    assert fit == {}
    seen = some_seen(space, len(space.anchors()))
    X, fit = sampler.propose_and_tell(seen, space, 2, generator=generator)
    assert torch.equal(X, sampler.propose(seen, space, 2, generator=generator))
    assert fit["n"] == len(seen.succeeded())
    assert set(fit["metrics"]) == {metric.name for metric in seen.metrics}
    assert fit["settings"] == repr(Quadratic())
    assert fit["model"] == "QuadraticModel"


def test_its_surrogate_is_handed_on_to_the_acquisition() -> None:
    assert Adaptive().surrogate is None
    assert Adaptive().acquisition.surrogate is None
    assert Adaptive(surrogate=GP()).acquisition.surrogate == GP()
    assert Adaptive(SMALL).surrogate == Quadratic()
    assert Adaptive(SMALL, surrogate=GP()).acquisition.surrogate == GP()
    assert Adaptive().with_surrogate(GP()) == Adaptive(surrogate=GP())
    assert Adaptive(SMALL).without_design().acquisition.initial == 0


def test_the_name_of_version_0_1_works_and_warns() -> None:
    for sampler in (Adaptive(SMALL), SMALL):
        with pytest.warns(DeprecationWarning, match="fitting is now with_surrogate"):
            found = sampler.fitting(GP(), initial=0)
        assert found == sampler.with_surrogate(GP()).without_design()


def test_a_name_is_not_the_settings_of_a_surrogate() -> None:
    with pytest.raises(SamplerError, match="settings of a surrogate, got 'gp'") as caught:
        Adaptive(surrogate="gp")  # type: ignore[arg-type]
    assert caught.value.hint is not None


def test_an_option_that_always_fails_is_left_alone() -> None:
    X = torch.cat([CHOICE.anchors().X, CHOICE.sample(14, generator=make_generator(1))])
    seen = Levels(broken=("ties",)).evaluate(X, generator=make_generator(0))
    sampler = Adaptive(SMALL).with_requirements(Requirements())
    found = sampler.propose(seen, CHOICE, 2, generator=make_generator(2))
    assert 1.0 not in found[:, 2].tolist()


def test_it_handles_a_choice_where_its_parts_do() -> None:
    assert Adaptive().takes_choice
    assert not Adaptive(SMALL, blocks=OptimalDesign()).takes_choice
    assert not Adaptive(replace(SMALL, design=OptimalDesign())).takes_choice


def test_every_option_has_its_blend_before_the_first_fit() -> None:
    first = FrontUncertainty().initial_points(CHOICE)
    assert first == len(CHOICE.anchors()) == 6
    assert FrontUncertainty().initial_points(SPACES["box"]) == 5
