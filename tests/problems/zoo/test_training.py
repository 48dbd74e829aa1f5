from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.problems.zoo.training import Recipe, network, train
from map_bo.rng import make_generator


@pytest.mark.parametrize("arch", ["mlp", "cnn"])
def test_networks_start_from_the_generator_alone(arch: str) -> None:
    before = torch.get_rng_state()
    first, second, other = (
        nn.utils.parameters_to_vector(network(arch, generator=make_generator(seed)).parameters())
        for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 4000 < len(first) < 8000


def test_the_cnn_has_buffers_to_merge() -> None:
    state = network("cnn", generator=make_generator(0)).state_dict()
    assert state["2.running_var"].is_floating_point()
    assert not state["2.num_batches_tracked"].is_floating_point()


def trained(rate: float, epochs: int) -> tuple[list[Tensor], int]:
    """Return the parameters of a small network after training, and how often it reported."""
    generator = make_generator(0)
    model = network("mlp", generator=generator)
    inputs = torch.randn(150, 64, generator=generator)
    labels = torch.randint(10, (150,), generator=generator)
    reports: list[None] = []
    train(
        model,
        inputs,
        labels,
        epochs,
        rate,
        generator=generator,
        on_epoch=lambda: reports.append(None),
    )
    assert not model.training
    return [p.detach() for p in model.parameters()], len(reports)


def test_the_first_step_of_the_training_is_the_sign_of_the_gradient() -> None:
    generator = make_generator(0)
    model = network("mlp", generator=generator)
    inputs = torch.randn(100, 64, generator=generator)
    labels = torch.randint(10, (100,), generator=generator)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    train(model, inputs, labels, 1, 0.01, generator=generator)
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    clear = gradient.abs() > 1e-4
    torch.testing.assert_close(moved[clear], -0.01 * gradient[clear].sign(), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_training_is_adam() -> None:
    generator = make_generator(0)
    model = network("mlp", generator=generator)
    inputs = torch.randn(150, 64, generator=generator)
    labels = torch.randint(10, (150,), generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(5):
        for rows in torch.split(torch.randperm(150, generator=generator), 100):
            optimiser.zero_grad()
            F.cross_entropy(model(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    found, reports = trained(0.003, 5)
    assert reports == 5
    for ours, theirs in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-5)


def test_an_expert_depends_on_the_seed_and_its_name_alone() -> None:
    recipe = Recipe(epochs=1)
    before = torch.get_rng_state()
    base = recipe.base(on_epoch=lambda: None)
    flip = recipe.expert("flip", base, on_epoch=lambda: None)
    recipe.expert("invert", base, on_epoch=lambda: None)
    again = recipe.expert("flip", base, on_epoch=lambda: None)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(flip[name], again[name]) for name in flip)
    other = Recipe(seed=1, epochs=1).base(on_epoch=lambda: None)
    assert not torch.equal(base["0.weight"], other["0.weight"])
