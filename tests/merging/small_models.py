"""Models of a few hundred weights, with the parts that make merging hard."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from map_bo.rng import make_generator


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x).tanh())
        return result


class Cnn(nn.Module):
    """With BatchNorm: floating statistics and an integer counter; and a hidden buffer."""

    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.conv(x)).relu().mean((-1, -2)))
        return result


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.middle = nn.Linear(4, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output(self.middle(self.embed(x)))
        return result


MODELS: dict[str, type[nn.Module]] = {"mlp": Mlp, "cnn": Cnn, "tied": Tied}
SHAPES = {"mlp": (2, 5), "cnn": (2, 1, 6, 6), "tied": (2, 3)}


def inputs(kind: str) -> Tensor:
    generator = make_generator(9)
    if kind == "tied":
        return torch.randint(0, 6, SHAPES[kind], generator=generator)
    return torch.randn(SHAPES[kind], generator=generator)


def build(kind: str, seed: int = 0) -> nn.Module:
    """Return a model with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = MODELS[kind]()
    scramble(model, make_generator(seed), 1.0)
    return model.eval()


def scramble(model: nn.Module, generator: Generator, scale: float) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data += scale * noise
    for name, tensor in model.named_buffers():
        if name.endswith("running_var"):
            tensor.data.abs_().add_(0.1)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(int(torch.randint(1, 100, (), generator=generator)))


def tuned(base: nn.Module, kind: str, seed: int) -> nn.Module:
    """Return a model a little away from ``base``, as fine-tuning leaves it."""
    model = build(kind, seed)
    model.load_state_dict(base.state_dict())
    scramble(model, make_generator(1000 + seed), 0.2)
    return model


def family(kind: str, experts: int = 3) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return a base and its experts ``e0``, ``e1``, ..."""
    base = build(kind)
    return base, {f"e{i}": tuned(base, kind, i) for i in range(experts)}
