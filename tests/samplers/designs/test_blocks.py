from __future__ import annotations

import pytest
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.blocks import TiedSobol, tied_space
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured

BLOCKS = CoefficientSpace.box(("a", "b", "c"), blocks=("w", "x", "y", "z"))


def first(sampler: Sampler, space: CoefficientSpace, n: int, seed: int = 0) -> Tensor:
    nothing = Observations.empty(space.d, METRICS)
    return sampler.propose(nothing, space, n, generator=make_generator(seed))


def apart(X: Tensor, space: CoefficientSpace) -> Tensor:
    """Return how far the blocks of each expert are apart at most, one number a point."""
    return X.view(len(X), len(space.experts), -1).diff(dim=-1).abs().amax((-1, -2))


class TestTiedSobol(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return TiedSobol()


def test_anchors_then_tied_points_then_deviations() -> None:
    X = first(TiedSobol(), BLOCKS, 40)
    anchors = BLOCKS.anchors().X
    torch.testing.assert_close(X[: len(anchors)], anchors)
    start = len(anchors)
    distances = apart(X, BLOCKS)
    assert bool((distances[: start + 3] == 0).all())  # one tied point an expert
    assert bool((distances[start + 3 :] > 0.01).all())


def test_deviations_keep_to_their_spread_and_use_it() -> None:
    X = first(TiedSobol(anchors=False, tied=0, spread=0.1), BLOCKS, 200)
    shared = X.view(200, 3, 4)
    reach = shared.amax(-1) - shared.amin(-1)
    assert float(reach.max()) <= 0.2 + 1e-9
    assert float(reach.max()) > 0.17
    BLOCKS.check(X)


def test_the_shared_coefficients_fill_their_box_evenly() -> None:
    X = first(TiedSobol(anchors=False, tied=128), BLOCKS, 128)
    assert bool((apart(X, BLOCKS) == 0).all())
    counts = (X[:, ::4] * 8).long().clamp(0, 7)
    for expert in counts.T:
        assert expert.bincount(minlength=8).tolist() == [16] * 8


def test_with_one_coefficient_an_expert_it_is_sobol() -> None:
    space = SPACES["sum"]
    assert tied_space(space) is None
    assert torch.equal(first(TiedSobol(), space, 30), first(Sobol(), space, 30))


@pytest.mark.parametrize("batch", [1, 7])
def test_one_sequence_however_it_is_asked_for(batch: int) -> None:
    generator = make_generator(3)
    whole = first(TiedSobol(), BLOCKS, 84, seed=3)
    seen = measured(whole[:56], failed=(3, 7))
    for _ in range(28 // batch):
        X = TiedSobol().propose(seen, BLOCKS, batch, generator=generator)
        seen = seen.append(measured(X))
    assert torch.equal(seen.X, whole)


def test_bounds_and_constraints_hold_for_tied_points_too() -> None:
    space = CoefficientSpace(
        BLOCKS.names,
        (0.1,) * 6 + (0.0,) * 6,
        (1.0,) * 11 + (0.5,),
        (LinearConstraint((1.0,) * 12, 3.0), LinearConstraint((1.0, *[0.0] * 11), 0.6)),
        owner=BLOCKS.owner,
        experts=BLOCKS.experts,
    )
    tied = tied_space(space)
    assert tied is not None
    assert tied.lower == (0.1, 0.1, 0.0)
    assert tied.upper == (1.0, 1.0, 0.5)
    assert {c.bound for c in tied.constraints} == {3.0, 0.6}
    X = first(TiedSobol(), space, 60)
    space.check(X)


def test_without_a_tied_point_the_whole_space_is_filled() -> None:
    space = CoefficientSpace(("a/x", "a/y"), (0.0, 0.6), (0.4, 1.0), owner=(0, 0), experts=("a",))
    assert tied_space(space) is None
    assert torch.equal(first(TiedSobol(), space, 20), first(Sobol(), space, 20))


@pytest.mark.parametrize("settings", [{"tied": -1}, {"spread": 0.0}, {"spread": 1.5}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(SamplerError) as caught:
        TiedSobol(**settings)  # type: ignore[arg-type]
    assert caught.value.hint is not None
