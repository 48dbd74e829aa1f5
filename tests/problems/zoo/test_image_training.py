from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from map_bo.problems.zoo.image_sets import load_image_set
from map_bo.problems.zoo.image_training import WIDTH, ImageRecipe, encoder, select
from map_bo.rng import make_generator
from tests.problems.fake_images import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), train=40, test=30)


def test_the_encoder_depends_on_its_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, other, third = (encoder(generator=make_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.randn(3, 28 * 28, generator=make_generator(0))
    assert one(x).shape == (3, WIDTH)
    assert torch.equal(one(x), other(x))
    assert not torch.equal(one(x), third(x))


def test_a_selection_is_a_shuffle_of_the_set(images: Path) -> None:
    part = select("mnist", images)
    assert part.train.shape == (40, 28 * 28)  # all, where there are fewer than 4000
    assert part.test.shape == (30, 28 * 28)
    assert -1 <= float(part.train.min()) < 0 < float(part.train.max()) <= 1
    given = load_image_set("mnist", images).train_labels.tolist()
    assert sorted(part.train_labels.tolist()) == sorted(given)
    assert part.train_labels.tolist() != given
    assert select("mnist", images).digest == part.digest != select("fashion_mnist", images).digest


def test_the_base_makes_half_as_many_passes() -> None:
    assert [ImageRecipe(("mnist", "usps"), epochs=n).steps("base") for n in (1, 2, 8)] == [1, 1, 4]
    assert ImageRecipe(("mnist", "usps"), epochs=8).steps("mnist") == 8


def test_base_and_experts_are_trained_on_their_images(images: Path) -> None:
    recipe = ImageRecipe(("mnist", "usps"), epochs=2)
    data = [select(name, images) for name in recipe.sets]
    passes: list[int] = []
    base, heads = recipe.base(data, on_epoch=lambda: passes.append(0))
    assert len(passes) == recipe.steps("base")
    assert {name: tuple(value.shape) for name, value in heads.items()} == {
        "mnist.weight": (10, WIDTH),
        "mnist.bias": (10,),
        "usps.weight": (10, WIDTH),
        "usps.bias": (10,),
    }
    head = nn.Linear(WIDTH, 10).requires_grad_(False)
    head.load_state_dict({kind: heads[f"mnist.{kind}"] for kind in ("weight", "bias")})
    expert = recipe.expert(data[0], base, head, on_epoch=lambda: passes.append(1))
    assert passes.count(1) == recipe.steps("mnist")
    assert torch.equal(head.weight, heads["mnist.weight"])  # frozen
    assert expert.keys() == base.keys()

    def loss(weights: dict[str, torch.Tensor]) -> float:
        trunk = encoder(generator=make_generator(0))
        trunk.load_state_dict(weights)
        with torch.no_grad():
            logits = head(trunk(data[0].train))
        return float(nn.functional.cross_entropy(logits, data[0].train_labels))

    assert loss(dict(expert)) < loss(dict(base))
