from __future__ import annotations

import pytest
import torch
from scipy.stats import qmc
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.latin_hypercube import LatinHypercube
from map_bo.samplers.designs.space_filling import is_repeat
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured


def first(sampler: Sampler, space: CoefficientSpace, n: int, seed: int = 0) -> Tensor:
    nothing = Observations.empty(space.d, METRICS)
    return sampler.propose(nothing, space, n, generator=make_generator(seed))


def cells(X: Tensor, space: CoefficientSpace, size: int) -> list[list[int]]:
    """Return for each coefficient the sorted intervals that its values lie in."""
    index = (space.normalise(X) * size).floor().long()
    return [sorted(column.tolist()) for column in index.T]


class TestLatinHypercube(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return LatinHypercube()


@pytest.mark.parametrize("optimised", [True, False])
def test_each_hypercube_has_one_point_in_every_interval(optimised: bool) -> None:
    space = SPACES["wide"]
    X = first(LatinHypercube(anchors=False, size=7, optimised=optimised), space, 21)
    for part in torch.split(X, 7):
        assert cells(part, space, 7) == [list(range(7))] * 3
    assert cells(X, space, 21) != [list(range(21))] * 3


@pytest.mark.parametrize(("experts", "size"), [(2, 8), (6, 12)])
def test_the_default_size(experts: int, size: int) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)])
    X = first(LatinHypercube(anchors=False), space, size)
    assert cells(X, space, size) == [list(range(size))] * experts


def test_optimised_hypercubes_are_more_even() -> None:
    def discrepancy(optimised: bool) -> float:
        sampler = LatinHypercube(anchors=False, optimised=optimised)
        parts = torch.split(first(sampler, SPACES["box"], 40), 8)
        return sum(float(qmc.discrepancy(part.numpy())) for part in parts)

    assert discrepancy(True) < 0.9 * discrepancy(False)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_one_sequence_however_it_is_asked_for(name: str) -> None:
    space, sampler = SPACES[name], LatinHypercube()
    whole = first(sampler, space, 30, seed=3)
    seen = measured(whole[:5], failed=(2,))
    for n in (1, 7, 2, 15):
        pending = whole[len(seen) : len(seen) + 1]
        X = sampler.propose(seen, space, n, pending=pending, generator=make_generator(3))
        expected = whole[len(seen) + 1 : len(seen) + 1 + n]
        assert torch.equal(X[: len(expected)], expected)
        seen = seen.append(measured(torch.cat([pending, X])[:n]))
    assert torch.equal(seen.X, whole)


def test_anchors_come_first_unless_they_are_turned_off() -> None:
    space = SPACES["box"]
    with_anchors = first(LatinHypercube(), space, 10)
    assert torch.equal(with_anchors[:5], space.anchors().X)
    assert torch.equal(with_anchors[5:], first(LatinHypercube(anchors=False), space, 5))
    assert not is_repeat(with_anchors[5:], space.anchors().X, space).any()


def test_what_is_remembered_cannot_be_changed_from_outside() -> None:
    space = SPACES["box"]
    X = first(LatinHypercube(anchors=False), space, 4)
    before = X.clone()
    X.zero_()
    assert torch.equal(first(LatinHypercube(anchors=False), space, 4), before)


def test_points_are_even_on_the_simplex() -> None:
    X = first(LatinHypercube(anchors=False, size=256, optimised=False), SPACES["simplex"], 256)
    assert torch.allclose(X.sum(-1), torch.ones(256, dtype=torch.float64))
    assert torch.allclose(X.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)


def test_hypercubes_of_one_point_are_points() -> None:
    assert len(torch.unique(first(LatinHypercube(size=1), SPACES["box"], 8), dim=0)) == 8


def test_a_hypercube_of_no_points_is_refused() -> None:
    with pytest.raises(SamplerError, match="has 0 points") as caught:
        LatinHypercube(size=0)
    assert "1 or more" in str(caught.value.hint)
