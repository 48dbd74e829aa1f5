from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.processes import marginal as closed_form
from map_bo.surrogates.processes.kernels import TrendRBFKernel
from map_bo.surrogates.processes.marginal import ClosedFormMean, leave_one_out


@given(n=st.integers(2, 10), seed=st.integers(0, 10**6))
def test_leave_one_out_is_a_literal_refit(n: int, seed: int) -> None:
    generator = make_generator(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    latent = root @ root.mT
    noise = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    mean, variance = leave_one_out(latent + torch.diag(noise), y, noise)
    for i in range(n):
        rest = torch.arange(n) != i
        others = latent[rest][:, rest] + torch.diag(noise[rest])
        weights = torch.linalg.solve(others, latent[rest, i])
        torch.testing.assert_close(mean[i], weights @ y[rest], rtol=1e-6, atol=1e-8)
        expected = latent[i, i] - weights @ latent[rest, i]
        torch.testing.assert_close(variance[i], expected, rtol=1e-6, atol=1e-8)


def processes(
    d: int, N: int, m: int
) -> list[tuple[TrendRBFKernel, Tensor, Tensor, Tensor, Tensor]]:
    space = CoefficientSpace.box([f"e{i}" for i in range(d)], lower=-1.0, upper=3.0)
    X = space.sample(N, generator=make_generator(0))
    result = []
    for j in range(m):
        g = make_generator(j + 1)
        kernel = TrendRBFKernel(
            space,
            torch.rand(4, generator=g, dtype=torch.float64),
            torch.rand((), generator=g, dtype=torch.float64),
            0.3 + torch.rand(d, generator=g, dtype=torch.float64),
        )
        y = torch.randn(N, generator=g, dtype=torch.float64)
        noise = 0.1 + torch.rand(N, generator=g, dtype=torch.float64)
        result.append((kernel, X, y, noise, torch.tensor(0.5 * j, dtype=torch.float64)))
    return result


def test_mean_is_the_definition_and_its_gradient_is_right() -> None:
    parts = processes(3, 7, 2)
    mean = ClosedFormMean.of(parts)
    X = torch.rand(5, 3, generator=make_generator(9), dtype=torch.float64) * 4 - 1
    for j, (kernel, train, y, noise, constant) in enumerate(parts):
        K = kernel(train).to_dense() + torch.diag(noise)
        expected = constant + kernel(X, train).to_dense() @ torch.linalg.solve(K, y - constant)
        torch.testing.assert_close(mean(X)[:, j], expected)
    assert torch.autograd.gradcheck(mean, (X.requires_grad_(True),))


def test_slices_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = ClosedFormMean.of(processes(2, 6, 3))
    X = torch.rand(11, 2, generator=make_generator(9), dtype=torch.float64).requires_grad_(True)
    whole = mean(X)
    (gradient,) = torch.autograd.grad(whole.square().sum(), X)
    monkeypatch.setattr(closed_form, "_ENTRIES", 13)
    sliced = mean(X)
    torch.testing.assert_close(sliced, whole)
    torch.testing.assert_close(torch.autograd.grad(sliced.square().sum(), X)[0], gradient)
