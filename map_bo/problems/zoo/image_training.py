"""How the image zoo trains: one encoder with a head for each set, and encoders fine-tuned from it.

The base learns all sets at once for a short while, with a head of its own for each. The heads
then stay as they are, and each expert fine-tunes the encoder alone on one set. So the task
vectors are those of an encoder, as when the vision towers of contrastive models are merged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from map_bo.errors import DataError
from map_bo.problems.zoo.image_sets import CLASSES, SIDE, ImageSet, image_folder, load_image_set
from map_bo.problems.zoo.training import train
from map_bo.rng import child, make_generator, numpy_generator

__all__ = [
    "IMAGE_TRAINING_VERSION",
    "TRAIN_EXAMPLES",
    "ImageRecipe",
    "Selection",
    "choose",
    "encoder",
    "select",
]

IMAGE_TRAINING_VERSION = 1
"""Part of the key of every cached network; raise it with any change that moves the weights."""

TRAIN_EXAMPLES = 4000
WIDTH = 48
_BASE_EXAMPLES = 1000
_RATE = 1e-3

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Selection:
    """The part of one image set that a zoo uses.

    Attributes:
        name: The set.
        train: ``n x 784`` training images in [-1, 1], float32.
        train_labels: ``n`` classes.
        test: ``t x 784`` held-out images, in an order drawn at random once for all: the first
            ``k`` are a fair sample.
        test_labels: ``t`` classes.
        digest: Of the training images and labels.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    digest: str


def select(name: str, root: str | Path | None = None) -> Selection:
    """Return 4000 training images of a set (all, where it has fewer) and its shuffled test images.

    Raises:
        DataError: See :func:`map_bo.problems.zoo.image_sets.load_image_set`.
    """
    return _select(name, str(image_folder(root).resolve()))


@lru_cache(maxsize=8)
def _select(name: str, folder: str) -> Selection:
    return choose(load_image_set(name, folder))


def choose(data: ImageSet) -> Selection:
    """Return 4000 training images of a set that was read, and its shuffled test images."""
    name = data.name
    generator = numpy_generator(make_generator(0), "images", name)
    chosen = generator.permutation(len(data.train))[:TRAIN_EXAMPLES]
    order = generator.permutation(len(data.test))
    images, labels = data.train[chosen], data.train_labels[chosen]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return Selection(
        name,
        _as_inputs(images),
        torch.from_numpy(labels),
        _as_inputs(data.test[order]),
        torch.from_numpy(data.test_labels[order]),
        digest,
    )


def _as_inputs(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).flatten(1).float() / 127.5 - 1


def encoder(*, generator: Generator) -> nn.Sequential:
    """Return an untrained encoder from 784 pixels to 48 features: two convolutions and a layer.

    Args:
        generator: Source of the initial weights; the global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Unflatten(1, (1, SIDE, SIDE)),
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, WIDTH),
            nn.ReLU(),
        )
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model.eval()


class _Joint(nn.Module):
    """The encoder with all heads; the last input column says which head an image goes to."""

    def __init__(self, trunk: nn.Module, heads: int, generator: Generator) -> None:
        super().__init__()
        self.trunk = trunk
        self.weight = nn.Parameter(
            torch.randn(heads, CLASSES, WIDTH, generator=generator) / WIDTH**0.5
        )
        self.bias = nn.Parameter(torch.zeros(heads, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        which = inputs[:, -1].long()
        features = self.trunk(inputs[:, :-1])
        return torch.einsum("bcw,bw->bc", self.weight[which], features) + self.bias[which]


@dataclass(frozen=True)
class ImageRecipe:
    """The settings of the training; each of them is part of the cache's key.

    Attributes:
        sets: Names of the image sets, one expert each.
        seed: Seed of initial weights and batch orders.
        epochs: Passes of an expert over its 4000 images. The base makes one pass for every two
            of these, over 1000 images of each set.

    Raises:
        DataError: When there are fewer than two sets, one is named twice, or there is no epoch.
    """

    sets: tuple[str, ...]
    seed: int = 0
    epochs: int = 8

    def __post_init__(self) -> None:
        if len(self.sets) < 2 or len(set(self.sets)) != len(self.sets):
            raise DataError(
                f"sets must be two or more different ones, got {', '.join(self.sets) or 'none'}",
                hint="name the image sets to train experts on",
            )
        if self.epochs < 1:
            raise DataError(
                f"epochs must be at least 1, got {self.epochs}", hint="give a number of passes"
            )

    def steps(self, name: str) -> int:
        """Return how many epochs the network ``name`` (``"base"`` or a set) takes."""
        return max(1, self.epochs // 2) if name == "base" else self.epochs

    def base(
        self, data: Sequence[Selection], *, on_epoch: Callable[[], None]
    ) -> tuple[Weights, Weights]:
        """Train the encoder and the heads on all sets; return the weights of both.

        The heads come as ``SET.weight`` (``10 x 48``) and ``SET.bias`` (``10``).
        """
        generator = child(make_generator(self.seed), "base")
        model = _Joint(encoder(generator=generator), len(data), generator)
        inputs, labels = [], []
        for i, part in enumerate(data):
            images = part.train[:_BASE_EXAMPLES]
            inputs.append(torch.cat([images, torch.full((len(images), 1), float(i))], 1))
            labels.append(part.train_labels[:_BASE_EXAMPLES])
        train(
            model,
            torch.cat(inputs),
            torch.cat(labels),
            self.steps("base"),
            _RATE,
            generator=generator,
            on_epoch=on_epoch,
        )
        heads: Weights = {}
        for i, part in enumerate(data):
            heads[f"{part.name}.weight"] = model.weight[i].detach().clone()
            heads[f"{part.name}.bias"] = model.bias[i].detach().clone()
        return _weights(model.trunk), heads

    def expert(
        self,
        data: Selection,
        base: Mapping[str, Tensor],
        head: nn.Module,
        *,
        on_epoch: Callable[[], None],
    ) -> Weights:
        """Fine-tune the base's encoder on one set under its frozen ``head``."""
        trunk = encoder(generator=make_generator(0))
        trunk.load_state_dict(dict(base))
        train(
            nn.Sequential(trunk, head),
            data.train,
            data.train_labels,
            self.epochs,
            _RATE,
            generator=child(make_generator(self.seed), "expert", data.name),
            on_epoch=on_epoch,
        )
        return _weights(trunk)


def _weights(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
