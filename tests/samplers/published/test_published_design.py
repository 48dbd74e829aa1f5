from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.published.public_code import PublishedDesign
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured


def design(n: int, d: int, *, points: int | None = None, seed: int = 0, **box: float) -> Tensor:
    space = CoefficientSpace.box([f"e{i}" for i in range(d)], **box)  # type: ignore[arg-type]
    return PublishedDesign(points).propose(
        Observations.empty(d, METRICS), space, n, generator=make_generator(seed)
    )


class TestPublishedDesign(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return PublishedDesign()


@pytest.mark.parametrize(
    ("d", "points", "levels"),
    # g = ceil((2 (points - d))^(1/d)): 20^(1/2), 34^(1/3), 52^(1/4), 64^(1/3), 580^(1/16)
    [(2, None, 5), (3, None, 4), (4, None, 3), (3, 35, 4), (3, 36, 5), (16, None, 2), (4, 2, 2)],
)
def test_levels_of_the_grid(d: int, points: int | None, levels: int) -> None:
    assert PublishedDesign(points).levels(d) == levels


@pytest.mark.parametrize("d", [2, 3, 4, 16])
def test_the_design_is_one_hots_and_a_part_of_the_grid(d: int) -> None:
    total = (d + 1) * (d + 2)
    X = design(total, d)
    assert torch.equal(X[:d], torch.eye(d, dtype=torch.float64))
    rest = X[d:] * (PublishedDesign().levels(d) - 1)
    assert torch.allclose(rest, rest.round())
    assert not torch.isclose(X[d:].sum(-1), torch.tensor(1.0, dtype=torch.float64)).any()
    assert not (X[d:] == X[d:, :1]).all(-1).any()
    assert len(torch.unique(X, dim=0)) == (total if d > 2 else len(X))


def test_the_grid_stays_in_the_unit_cube_of_a_larger_box() -> None:
    assert torch.equal(design(20, 3, lower=-3.0, upper=3.0), design(20, 3))


def test_after_the_design_come_the_rest_of_the_grid_and_uniform_points() -> None:
    grid = {
        point
        for point in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=2)
        if sum(point) != 1 and point[0] != point[1]
    }
    X = [tuple(row) for row in design(2 + len(grid) + 10, 2).tolist()]
    assert set(X[2 : 2 + len(grid)]) == grid
    assert all(0 <= min(x) and max(x) <= 1 and x not in grid for x in X[2 + len(grid) :])


def test_the_random_part_depends_on_the_seed_and_continues() -> None:
    assert not torch.equal(design(20, 3, seed=1), design(20, 3, seed=2))
    space = CoefficientSpace.box(("a", "b", "c"))
    whole, seen = design(30, 3), Observations.empty(3, METRICS)
    for _ in range(10):
        X = PublishedDesign().propose(seen, space, 3, generator=make_generator(0))
        seen = seen.append(measured(X))
    assert torch.equal(seen.X, whole)


def test_a_design_smaller_than_the_experts_is_their_one_hots() -> None:
    assert torch.equal(design(2, 4, points=2), torch.eye(4, dtype=torch.float64)[:2])


def test_anchors_in_front_leave_the_rest_as_it_is() -> None:
    space = CoefficientSpace.box(("a", "b", "c"))
    X = PublishedDesign(anchors=True).propose(
        Observations.empty(3, METRICS), space, 15, generator=make_generator(0)
    )
    assert torch.equal(X[:5], space.anchors().X)
    assert torch.equal(X[5:], design(13, 3)[3:])


def test_one_expert_leaves_nothing_of_the_grid() -> None:
    X = design(6, 1)
    assert float(X[0]) == 1.0
    assert len(torch.unique(X)) == 6


def test_a_design_of_no_points_is_refused() -> None:
    with pytest.raises(SamplerError, match="has 0 points"):
        PublishedDesign(0)


def test_settings_have_a_grid_over_their_bounds() -> None:
    space = SPACES["settings"]
    empty = measured(torch.zeros(0, space.d, dtype=torch.float64))
    X = PublishedDesign(points=30).propose(empty, space, 20, generator=make_generator(0))
    assert X[:2].tolist() == [[1, 0, 0.2, 2.0], [0, 1, 0.2, 2.0]]
    levels = PublishedDesign(points=30).levels(4)
    for column in range(4):
        steps = space.normalise(X)[2:, column] * (levels - 1)
        assert torch.allclose(steps, steps.round(), atol=1e-9)
        assert len(torch.unique(X[2:, column])) == levels
    # What is left out of the grid is said of the experts alone.
    sums = X[2:, :2].sum(-1)
    assert not bool((sums == 1).any())
    assert not bool((X[2:, 0] == X[2:, 1]).any())
