from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SamplerError
from map_bo.rng import make_generator
from map_bo.samplers.designs.space_filling import (
    Dirichlet,
    Sobol,
    Uniform,
    fresh_points,
    is_repeat,
    uniform_points,
)
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace, LinearConstraint
from tests.contracts.sampler_contract import METRICS, SPACES, SamplerContract, measured

KINDS = [Sobol, Uniform, Dirichlet]


def nothing(space: CoefficientSpace) -> Observations:
    return Observations.empty(space.d, METRICS)


def first(sampler: Sampler, space: CoefficientSpace, n: int, seed: int = 0) -> Tensor:
    return sampler.propose(nothing(space), space, n, generator=make_generator(seed))


class TestSobol(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return Sobol()


class TestUniform(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return Uniform()


class TestDirichlet(SamplerContract):
    @pytest.fixture
    def sampler(self) -> Sampler:
        return Dirichlet()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(SPACES))
@pytest.mark.parametrize("batch", [1, 7])
def test_one_sequence_however_it_is_asked_for(kind: type[Sobol], name: str, batch: int) -> None:
    space, generator = SPACES[name], make_generator(3)
    whole = first(kind(), space, 84, seed=3)
    seen = measured(whole[:56], failed=(3, 7))
    for _ in range(28 // batch):
        X = kind().propose(seen, space, batch, generator=generator)
        failed = (0,) if len(seen) % 5 == 0 else ()
        seen = seen.append(measured(X, failed=failed))
    assert torch.equal(seen.X, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_pending_points_stand_for_seen_ones(kind: type[Sobol]) -> None:
    space, generator = SPACES["box"], make_generator(3)
    whole = first(kind(), space, 12, seed=3)
    X = kind().propose(measured(whole[:7]), space, 3, pending=whole[7:9], generator=generator)
    assert torch.equal(X, whole[9:])


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_come_first_and_only_once(kind: type[Sobol]) -> None:
    space = SPACES["box"]
    anchors = space.anchors().X
    X = first(kind(), space, 10)
    assert torch.equal(X[:5], anchors)
    assert not is_repeat(X[5:], anchors, space).any()
    # An anchor measured out of turn, and one that failed, are left out.
    seen = measured(anchors[[1, 4]], failed=(0,))
    rest = kind().propose(seen, space, 8, generator=make_generator(0))
    assert torch.equal(rest[:3], anchors[[0, 2, 3]])
    assert torch.equal(rest[3:], X[5:])


@pytest.mark.parametrize("kind", KINDS)
def test_without_anchors_the_sequence_starts_at_once(kind: type[Sobol]) -> None:
    space = SPACES["box"]
    assert torch.equal(first(kind(anchors=False), space, 5), first(kind(), space, 10)[5:])


def test_sobol_points_are_stratified() -> None:
    X = first(Sobol(anchors=False), SPACES["wide"], 16)
    cells = ((X + 3) / 6 * 16).floor().long()
    for column in cells.T:
        assert sorted(column.tolist()) == list(range(16))


def test_sobol_beats_uniform_at_integration() -> None:
    space = SPACES["box"]
    exact = (1 - torch.tensor(1.0).neg().exp()) ** 3

    def error(sampler: Sampler) -> float:
        errors = [
            (first(sampler, space, 128, seed).neg().sum(-1).exp().mean() - exact) ** 2
            for seed in range(8)
        ]
        return float(torch.stack(errors).mean().sqrt())

    assert error(Sobol(anchors=False)) < 0.2 * error(Uniform(anchors=False))


@pytest.mark.parametrize("kind", [Sobol, Uniform])
def test_points_are_even_on_the_simplex(kind: type[Sobol]) -> None:
    X = first(kind(anchors=False), SPACES["simplex"], 512)
    assert torch.allclose(X.sum(-1), torch.ones(512, dtype=torch.float64))
    # Uniform on the triangle: coordinates have mean 1/3 and exceed 1/2 a quarter of the time.
    assert torch.allclose(X.mean(0), torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.03)
    assert float((X > 0.5).double().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("kind", [Sobol, Uniform])
@pytest.mark.parametrize(
    ("experts", "bound", "mean"),
    # Mean of the sum of d uniform numbers given that it is at most the bound: d/(d + 1) * bound
    # while no upper bound cuts in (d = 8), and half of d, less what is cut off, near the top.
    [(8, 1.0, 8 / 9), (3, 2.9, 1.5)],
)
def test_points_are_even_below_a_sum(
    kind: type[Sobol], experts: int, bound: float, mean: float
) -> None:
    space = CoefficientSpace.box([f"e{i}" for i in range(experts)], sum_at_most=bound)
    total = first(kind(anchors=False), space, 512).sum(-1)
    assert float(total.mean()) == pytest.approx(mean, abs=0.03)
    assert float((total > bound - 1e-6).double().mean()) == 0.0


@pytest.mark.parametrize("kind", [Sobol, Uniform])
@pytest.mark.parametrize(
    "constraints",
    [
        (LinearConstraint((1.0, -1.0, 0.0), 0.0, equality=True),),  # a tie of two experts
        (LinearConstraint((1.0, 2.0, 0.0), 0.3), LinearConstraint((0.0, 1.0, 1.0), 0.2)),
        (LinearConstraint((1.0, 1.0, 0.0), 0.3), LinearConstraint((0.0, 1.0, 1.0), 0.2)),
        (LinearConstraint((1.0, 1.0, 1.0), 0.0),),  # the base alone
    ],
)
def test_any_linear_constraint_is_respected(
    kind: type[Sobol], constraints: tuple[LinearConstraint, ...]
) -> None:
    space = CoefficientSpace(("a", "b", "c"), (0.0,) * 3, (1.0,) * 3, constraints)
    X = first(kind(anchors=False), space, 20)
    assert len(X) == 20
    space.check(X)
    if constraints[0].bound or constraints[0].equality:
        assert len(torch.unique(X, dim=0)) == 20


def test_a_sequence_of_too_many_dimensions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.quasirandom.SobolEngine, "MAXDIM", 2)
    with pytest.raises(SamplerError, match="has 2 dimensions and 3 are needed") as caught:
        first(Sobol(anchors=False), SPACES["box"], 1)
    assert "uniform" in str(caught.value.hint)
    assert len(first(Sobol(), SPACES["box"], 5)) == 5  # the anchors need no sequence


def test_dirichlet_points_are_blends() -> None:
    X = first(Dirichlet(anchors=False), SPACES["box"], 200)
    assert torch.allclose(X.sum(-1), torch.ones(200, dtype=torch.float64))
    balanced = first(Dirichlet(anchors=False, concentration=50.0), SPACES["box"], 200)
    sparse = first(Dirichlet(anchors=False, concentration=0.1), SPACES["box"], 200)
    assert balanced.std() < 0.3 * X.std() < 0.6 * sparse.std()


def test_dirichlet_has_weights_of_its_own_in_every_block() -> None:
    space = CoefficientSpace.box(("a", "b"), blocks=("x", "y", "z"))
    X = first(Dirichlet(anchors=False), space, 20).reshape(20, 2, 3)
    assert torch.allclose(X.sum(1), torch.ones(20, 3, dtype=torch.float64))
    assert float((X[:, 0, 0] - X[:, 0, 1]).abs().mean()) > 0.1


@pytest.mark.parametrize(
    ("space", "total", "sum_"),
    [
        (CoefficientSpace.box(("a", "b"), upper=3.0), 1.5, 1.5),
        (CoefficientSpace.box(("a", "b"), sum_at_most=0.5), 1.0, 0.5),
        (CoefficientSpace.box(("a", "b"), sum_at_most=1.5), 1.0, 1.0),
        (CoefficientSpace.box(("a", "b"), simplex=True), 3.0, 1.0),
        (CoefficientSpace.box(("a", "b"), blocks=("x", "y"), sum_at_most=0.5), 1.0, 0.5),
        (
            CoefficientSpace(
                ("a", "b"), (0.0,) * 2, (1.0,) * 2, (LinearConstraint((2.0, 2.0), 1.0),)
            ),
            1.0,
            0.5,
        ),
    ],
)
def test_the_total_of_dirichlet_weights(space: CoefficientSpace, total: float, sum_: float) -> None:
    X = first(Dirichlet(anchors=False, total=total), space, 10)
    parts = space.d // 2
    sums = X.reshape(10, 2, parts).sum(1)
    assert torch.allclose(sums, torch.full((10, parts), sum_, dtype=torch.float64))


def test_dirichlet_points_outside_are_moved_in() -> None:
    space = CoefficientSpace.box(("a", "b", "c"), lower=0.2, upper=0.6)
    X = first(Dirichlet(anchors=False, concentration=0.3), space, 30)
    space.check(X)
    assert float((X == 0.6).double().mean()) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"concentration": 0.0}, "concentration is 0.0"), ({"total": -1.0}, "total is -1.0")],
)
def test_dirichlet_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        Dirichlet(**settings)  # type: ignore[arg-type]


def test_dirichlet_needs_two_experts() -> None:
    with pytest.raises(SamplerError, match="at least two experts"):
        first(Dirichlet(), CoefficientSpace.box(("a",)), 1)


def test_points_repeat_rather_than_never_come() -> None:
    space = SPACES["box"]
    base = torch.zeros(1, 3, dtype=torch.float64)

    def base_only() -> Iterator[Tensor]:
        while True:
            yield base.expand(64, 3)

    assert torch.equal(fresh_points(base_only(), nothing(space), space, 3), base.expand(3, 3))


def test_points_recorded_in_single_steps_of_rounding_are_known() -> None:
    space = SPACES["wide"]
    X = next(uniform_points(space, generator=make_generator(0)))
    assert is_repeat(X + 1e-12, X, space).all()
    assert not is_repeat(X + 1e-3, X, space).any()
    assert is_repeat(X + 1e-3, X, space, tolerance=1e-3).all()
    assert not is_repeat(X, X[:0], space).any()
