from __future__ import annotations

import pytest
import torch
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import (
    qLogExpectedHypervolumeImprovement,
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.acquisition.multi_objective.objective import (
    GenericMCMultiOutputObjective,
    IdentityMCMultiOutputObjective,
)
from botorch.exceptions.errors import UnsupportedError
from botorch.models import SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.box_decompositions import NondominatedPartitioning
from botorch.utils.multi_objective.hypervolume import Hypervolume
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.samplers.posterior.hypervolume import (
    LogImprovement,
    LogNoisyImprovement,
    _no_compiler,
    non_dominated_cells,
    positive_part,
)

# Points that are known well are nearly dependent, and the Cholesky factor takes some jitter.
pytestmark = pytest.mark.filterwarnings("ignore:A not p.d.")


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=make_generator(seed), dtype=torch.float64)


def volume_below(cells: Tensor, y: Tensor) -> Tensor:
    sides = (torch.minimum(cells[1], y) - cells[0]).clamp_min(0.0)
    return sides.prod(-1).sum(-1)


@pytest.mark.parametrize("width", [1e-5, 1e-2])
def test_positive_part_is_smooth_also_at_zero(width: float) -> None:
    x = width * torch.tensor([-1e3, -2.0, -1e-9, 0.0, 1e-9, 2.0, 1e3], dtype=torch.float64)
    x.requires_grad_(True)
    value = positive_part(x, width)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    t = (x / width).detach()
    root = (t.square() + 4).sqrt()
    large = (t.abs() + root) / 2  # of the two solutions of y^2 - |t| y - 1 = 0
    torch.testing.assert_close(value / width, torch.where(t > 0, large, 1 / large))
    torch.testing.assert_close(slope, torch.where(t > 0, large, 1 / large) / root)
    torch.testing.assert_close(bend * width, 2 / root**3, rtol=1e-4, atol=1e-9)


@given(
    m=st.integers(2, 4),
    n=st.integers(0, 7),
    coarse=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_cells_hold_exactly_what_a_point_adds(m: int, n: int, coarse: bool, seed: int) -> None:
    Y = uniform(3, n + 1, m, seed=seed)
    if coarse:  # ties in single metrics and equal points
        Y = (Y * 4).round() / 4
    reference = torch.full((m,), 0.2, dtype=torch.float64)
    y, Y = Y[:, -1], Y[:, :-1]
    added = volume_below(non_dominated_cells(Y, reference), y.unsqueeze(1))
    for s in range(3):
        measure = Hypervolume(reference)
        known = Y[s][(Y[s] > reference).all(-1)]
        more = torch.cat([known, y[s].unsqueeze(0)]) if (y[s] > reference).all() else known
        before = measure.compute(known) if len(known) else 0.0
        after = measure.compute(more) if len(more) else 0.0
        assert float(added[s]) == pytest.approx(after - before, abs=1e-12)


@given(m=st.integers(2, 5), n=st.integers(0, 10), seed=st.integers(0, 10_000))
def test_cells_are_disjoint_and_cover_what_is_not_dominated(m: int, n: int, seed: int) -> None:
    Y, reference = uniform(2, n, m, seed=seed), torch.zeros(m, dtype=torch.float64)
    cells = non_dominated_cells(Y, reference)
    probes = uniform(50, m, seed=seed + 1) * 1.2
    for s in range(2):
        lower, upper = cells[0, s], cells[1, s]
        inside = ((probes.unsqueeze(1) > lower) & (probes.unsqueeze(1) < upper)).all(-1)
        dominated = (probes.unsqueeze(1) <= Y[s]).all(-1).any(-1)
        assert torch.equal(inside.sum(-1), (~dominated).long())


def model_of(seed: int) -> tuple[SingleTaskGP, Tensor]:
    X = uniform(8, 2, seed=seed)
    Y = torch.stack([-(X - 0.2).square().sum(-1), -(X - 0.8).square().sum(-1), X[:, 0]], -1)
    return SingleTaskGP(X, Y, torch.full_like(Y, 1e-2)).eval(), X


def acquisition_of(model: SingleTaskGP, X: Tensor, pending: Tensor | None) -> LogNoisyImprovement:
    return LogNoisyImprovement(
        model,
        torch.full((3,), -1.0, dtype=torch.float64),
        X,
        sampler=SobolQMCNormalSampler(torch.Size([16]), seed=3),
        objective=IdentityMCMultiOutputObjective(),
        X_pending=pending,
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("waiting", [0, 2])
def test_values_are_those_of_botorch(seed: int, waiting: int) -> None:
    model, X = model_of(seed)
    pending = uniform(waiting, 2, seed=seed + 5) if waiting else None
    probes = uniform(6, 1, 2, seed=seed + 9)
    with _no_compiler(), torch.no_grad():
        theirs = qLogNoisyExpectedHypervolumeImprovement(
            model,
            [-1.0] * 3,
            X,
            sampler=SobolQMCNormalSampler(torch.Size([16]), seed=3),
            X_pending=pending,
            cache_root=False,
        )(probes)
        ours = acquisition_of(model, X, pending)(probes)
    # Both smooth the positive part, each in its own way.
    assert torch.allclose(ours, theirs, atol=0.02)


def test_pending_points_can_be_added_later() -> None:
    model, X = model_of(0)
    pending, probes = uniform(2, 2, seed=4), uniform(3, 1, 2, seed=5)
    late = acquisition_of(model, X, None)
    before = late(probes)
    late.set_X_pending(pending)
    assert torch.allclose(late(probes), acquisition_of(model, X, pending)(probes), atol=0.2)
    at_pending = late(pending[:1].unsqueeze(0))
    assert float(at_pending.detach()) < float(before.min().detach())


def test_there_is_a_gradient_where_nothing_is_gained() -> None:
    X = uniform(8, 2, seed=0)
    Y = torch.full((8, 3), 0.9, dtype=torch.float64)
    sure = SingleTaskGP(X, Y + 0.01 * X[:, :1], torch.full_like(Y, 1e-6)).eval()
    acquisition = acquisition_of(sure, X, None)
    probe = X[:1].clone().unsqueeze(0).requires_grad_()
    value = acquisition(probe)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert probe.grad is not None
    assert torch.isfinite(probe.grad).all()
    assert float(probe.grad.abs().max()) > 0


def test_several_points_at_once_are_refused() -> None:
    model, X = model_of(0)
    with pytest.raises(UnsupportedError, match="of one point"):
        acquisition_of(model, X, None)(uniform(1, 2, 2, seed=0))


def above(samples: Tensor, X: Tensor | None = None) -> Tensor:
    """Move the outcomes above 0, where the reference point is."""
    return samples + 1.0


ABOVE = GenericMCMultiOutputObjective(above)


def over_front_of(model: SingleTaskGP, front: Tensor, pending: Tensor | None) -> LogImprovement:
    return LogImprovement(
        model,
        front,
        sampler=SobolQMCNormalSampler(torch.Size([32]), seed=3),
        objective=ABOVE,
        X_pending=pending,
    )


@pytest.mark.parametrize("n", [0, 1, 6])
def test_values_over_a_front_are_those_of_botorch(n: int) -> None:
    model, _ = model_of(1)
    front, probes = uniform(n, 3, seed=2), uniform(6, 1, 2, seed=9)
    zero = torch.zeros(3, dtype=torch.float64)
    with _no_compiler(), torch.no_grad():
        theirs = qLogExpectedHypervolumeImprovement(
            model,
            zero,
            NondominatedPartitioning(zero, Y=front),
            sampler=SobolQMCNormalSampler(torch.Size([32]), seed=3),
            objective=ABOVE,
        )(probes)
        ours = over_front_of(model, front, None)(probes)
    # Where next to nothing is gained, each smooths in its own way.
    assert float(theirs.max()) > -5
    assert torch.allclose(ours.exp(), theirs.exp(), rtol=0.01, atol=1e-4)


def test_pending_points_join_a_front_at_their_means() -> None:
    model, _ = model_of(0)
    front, pending = uniform(4, 3, seed=2), uniform(2, 2, seed=4)
    with torch.no_grad():
        mean = model.posterior(pending).mean + 1.0
        late = over_front_of(model, front, None)
        probes = uniform(3, 1, 2, seed=5)
        before = late(probes)
        late.set_X_pending(pending)
        expected = over_front_of(model, torch.cat([front, mean]), None)(probes)
        assert torch.equal(late(probes), expected)
        late.set_X_pending(None)
        assert torch.equal(late(probes), before)


def test_over_a_front_too_there_is_a_gradient_where_nothing_is_gained() -> None:
    model, _ = model_of(0)
    probe = uniform(1, 1, 2, seed=5).requires_grad_()
    acquisition = over_front_of(model, torch.full((1, 3), 9.0, dtype=torch.float64), None)
    value = acquisition(probe)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert probe.grad is not None
    assert torch.isfinite(probe.grad).all()
    assert float(probe.grad.abs().max()) > 0
    with pytest.raises(AssertionError, match="q=1"):
        acquisition(uniform(1, 2, 2, seed=0))


def test_no_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*args: object, **kwargs: object) -> None:
        raise AssertionError("a kernel was compiled")

    monkeypatch.setattr(logei, "_load_attempted", False)
    monkeypatch.setattr("torch.utils.cpp_extension.load", compiled)
    acquisition_of(*model_of(0), None)  # a compilation that fails would warn
    assert logei._load_attempted is False


def test_a_botorch_without_the_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(logei, "_load_attempted")
    with _no_compiler():
        assert not hasattr(logei, "_load_attempted")
    assert not hasattr(logei, "_load_attempted")
