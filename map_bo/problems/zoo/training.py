"""How the digits zoo trains its networks: one base, and experts fine-tuned from it.

Everything random comes from generators made of the seed and a name, so the weights of an expert
depend neither on which other experts were trained nor on the global random state. They are the
same bits on the same machine with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from map_bo.errors import DataError
from map_bo.problems.zoo.data import BASE_TASKS, digits_split, transform
from map_bo.rng import child, make_generator

__all__ = ["ARCHITECTURES", "TRAINING_VERSION", "Recipe", "as_inputs", "network", "train"]

TRAINING_VERSION = 1
"""Part of the key of every cached network; raise it with any change that moves the weights."""

ARCHITECTURES = ("mlp", "cnn")

Weights = dict[str, Tensor]

_BATCH = 100
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Recipe:
    """The settings of the training; each of them is part of the cache's key.

    The base learns the plain digits and then sees sixteen tasks for a short while: it
    is a weak but not a hopeless start for each, as pre-trained models are, and its experts are
    true fine-tunings, with task vectors that are small beside the base.

    Attributes:
        arch: ``"mlp"`` (64-64-10) or ``"cnn"`` (two convolutions with BatchNorm, so that there
            are buffers to merge).
        seed: Seed of initial weights and batch orders.
        epochs: Passes of an expert over its 1000 images; the base gets half as many on the
            plain digits. By default 20 for the MLP and 10 for the CNN.

    Raises:
        DataError: When there is no such architecture, or no epoch.
    """

    arch: str = "mlp"
    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise DataError(
                f"the digits zoo has no architecture {self.arch!r}",
                hint=f"architectures are {', '.join(ARCHITECTURES)}",
            )
        if self.epochs is None:
            object.__setattr__(self, "epochs", 20 if self.arch == "mlp" else 10)
        if self.passes < 1:
            raise DataError(
                f"epochs must be at least 1, got {self.epochs}", hint="give a number of passes"
            )

    @property
    def passes(self) -> int:
        """Epochs of an expert, with the default filled in."""
        assert self.epochs is not None
        return self.epochs

    def steps(self, name: str) -> int:
        """Return how many epochs the network ``name`` (``"base"`` or a task) takes."""
        return self._pretraining + 1 if name == "base" else self.passes

    @property
    def _pretraining(self) -> int:
        return max(1, self.passes // 2)

    def base(self, *, on_epoch: Callable[[], None]) -> Weights:
        """Train the base: plain digits, then one pass over sixteen tasks at once."""
        images, targets, _, _ = digits_split()
        labels = torch.from_numpy(targets)
        generator = child(make_generator(self.seed), "base", self.arch)
        model = network(self.arch, generator=generator)
        plain = as_inputs(images)
        train(model, plain, labels, self._pretraining, 3e-3, generator=generator, on_epoch=on_epoch)
        every = torch.cat([plain, *(as_inputs(transform(n, images)) for n in BASE_TASKS)])
        train(
            model,
            every,
            labels.repeat(1 + len(BASE_TASKS)),
            1,
            3e-3,
            generator=generator,
            on_epoch=on_epoch,
        )
        return _weights(model)

    def expert(
        self, name: str, base: Mapping[str, Tensor], *, on_epoch: Callable[[], None]
    ) -> Weights:
        """Fine-tune the base on the task ``name``."""
        images, targets, _, _ = digits_split()
        model = network(self.arch, generator=make_generator(0))
        model.load_state_dict(dict(base))
        train(
            model,
            as_inputs(transform(name, images)),
            torch.from_numpy(targets),
            self.passes,
            1e-3,
            generator=child(make_generator(self.seed), "expert", name, self.arch),
            on_epoch=on_epoch,
        )
        return _weights(model)


def as_inputs(images: object) -> Tensor:
    """Return images (``n x 8 x 8`` array) as the networks want them: ``n x 64``, float32."""
    return torch.as_tensor(images, dtype=torch.float32).flatten(1) * 2 - 1


def network(arch: str, *, generator: Generator) -> nn.Module:
    """Return an untrained network from 64 pixels to the logits of 10 digits.

    Args:
        arch: ``"mlp"`` or ``"cnn"``.
        generator: Source of the initial weights; the global random state stays as it is.
    """
    # The layers draw initial weights of their own when they are made; those are thrown away.
    with torch.random.fork_rng(devices=[]):
        model: nn.Sequential = _mlp() if arch == "mlp" else _cnn()
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model.eval()


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    epochs: int,
    rate: float,
    *,
    generator: Generator,
    on_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Fit ``model`` in place by Adam on the cross-entropy, in batches of 100.

    Kingma and Ba, *Adam*, arXiv 1412.6980, algorithm 1. It runs on one flat buffer that the
    parameters are views of: a network this small is otherwise all overhead, and importing
    ``torch.optim`` alone takes longer than the training.

    Args:
        model: Network from ``inputs`` to logits; left in evaluation mode. Parameters that
            require no gradient stay as they are.
        inputs: ``n x p`` images.
        labels: ``n`` classes.
        epochs: Passes over the images.
        rate: Learning rate.
        generator: Source of the batch orders.
        on_epoch: Called after each pass.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.cat([p.detach().flatten() for p in parameters])
    gradient, mean, square = (torch.zeros_like(weights) for _ in range(3))
    start = 0
    for p in parameters:
        stop = start + p.numel()
        p.data = weights[start:stop].view_as(p)
        p.grad = gradient[start:stop].view_as(p)
        start = stop
    step = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for rows in torch.split(order, _BATCH):
            gradient.zero_()
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            torch.autograd.backward(loss)
            step += 1
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            scale = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-8)
            weights.addcdiv_(mean, scale, value=-rate / (1 - _BETAS[0] ** step))
        on_epoch()
    model.eval()


def _weights(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
