from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.rng import make_generator
from map_bo.samplers.published.angles import angles_of, directions_of, evenly, from_evenly, reach
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.contracts.sampler_contract import SPACES


@given(seed=st.integers(0, 10**6), d=st.integers(1, 16))
def test_angles_and_radius_give_the_vector_back(seed: int, d: int) -> None:
    V = torch.rand(20, d, generator=make_generator(seed), dtype=torch.float64)
    radius, theta = angles_of(V)
    assert theta.shape == (20, d - 1)
    assert torch.allclose(radius.unsqueeze(-1) * directions_of(theta), V)
    assert torch.allclose(from_evenly(evenly(theta)), theta, atol=1e-6)


def test_angles_of_axes_and_of_nothing() -> None:
    V = torch.cat([torch.eye(3), torch.zeros(1, 3), torch.tensor([[-1.0, 2.0, 0.0]])]).double()
    radius, theta = angles_of(V)
    half = torch.pi / 2
    assert radius.tolist() == [1, 1, 1, 0, 2]
    expected = [[0, 0], [half, 0], [half, half], [0, 0], [half, 0]]
    assert torch.allclose(theta, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("d", [2, 3, 8])
def test_even_points_are_even_directions(d: int) -> None:
    # Directions of normal vectors are uniform on the sphere; their coordinates in the cube too.
    normal = torch.randn(4000, d, generator=make_generator(0), dtype=torch.float64)
    U = evenly(angles_of(normal.abs())[1])
    quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for column in U.T:
        assert torch.allclose(torch.quantile(column, quantiles), quantiles, atol=0.03)
    correlation = torch.corrcoef(U.T).reshape(d - 1, d - 1).fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 0.06


@given(seed=st.integers(0, 10**6), name=st.sampled_from(["box", "wide", "sum"]))
def test_rays_end_where_the_space_does(seed: int, name: str) -> None:
    space = SPACES[name]
    V = torch.rand(20, space.d, generator=make_generator(seed), dtype=torch.float64)
    V = V / V.norm(dim=-1, keepdim=True)
    shortest, longest = reach(space, V)
    assert (shortest == 0).all()
    ends = space.unnormalise(longest.unsqueeze(-1) * V)
    assert space.contains(ends).all()
    assert not space.contains(space.unnormalise(1.001 * longest.unsqueeze(-1) * V)).any()


def test_rays_meet_a_simplex_in_one_point() -> None:
    space = SPACES["simplex"]
    V = torch.rand(20, 3, generator=make_generator(0), dtype=torch.float64)
    shortest, longest = reach(space, V)
    assert torch.allclose(shortest, longest)
    assert space.contains(longest.unsqueeze(-1) * V).all()


@pytest.mark.parametrize(
    ("constraint", "shortest", "longest"),
    [
        # Rays along (0, 1), (1, 0) and the diagonal, all of length 1 in every coefficient.
        (LinearConstraint((1.0, 0.0), 0.5), (0, 0, 0), (1, 0.5, 0.5)),
        (LinearConstraint((-1.0, 0.0), -0.5), (torch.inf, 0.5, 0.5), (1, 1, 1)),
        (LinearConstraint((1.0, -1.0), 0.0, equality=True), (0, 0, 0), (0, 0, 1)),
        (
            LinearConstraint((0.0, 1.0), 0.25, equality=True),
            (0.25, torch.inf, 0.25),
            (0.25, 1, 0.25),
        ),
    ],
)
def test_rays_and_one_constraint(
    constraint: LinearConstraint, shortest: tuple[float, ...], longest: tuple[float, ...]
) -> None:
    space = CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0), (constraint,))
    V = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    found = reach(space, V)
    assert torch.allclose(found[0], torch.tensor(shortest, dtype=torch.float64))
    assert torch.allclose(found[1], torch.tensor(longest, dtype=torch.float64))
