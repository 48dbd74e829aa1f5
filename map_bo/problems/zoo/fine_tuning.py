"""Fine-tuning that goes on where it was killed: the same weights as if it had never stopped.

What the optimiser knows is kept in a file beside the weights to be, every now and then. Batch
orders come from the seed and the number of the pass alone, and models train without dropout, so
nothing else has to be kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from map_bo.problems.cache import read_network, write_network
from map_bo.rng import child

__all__ = ["Schedule", "fine_tune"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_MEAN, _SQUARE, _STEP = "mean ", "square ", "step"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    The rate rises linearly in the first tenth of the steps, and falls linearly to 0 after it.

    Attributes:
        steps: Number of steps.
        batch: Examples per step.
        rate: The highest learning rate.
    """

    steps: int
    batch: int
    rate: float

    def rate_of(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = max(1, self.steps // 10)
        if step < rising:
            return self.rate * (step + 1) / rising
        return self.rate * (self.steps - step) / max(1, self.steps - rising)

    def rows(self, step: int, examples: int, generator: Generator) -> list[int]:
        """Return the examples of a step: each once per pass, in an order drawn for the pass."""
        per_pass = max(1, math.ceil(examples / self.batch))
        order = torch.randperm(examples, generator=child(generator, "pass", step // per_pass))
        at = step % per_pass * self.batch
        return [int(row) for row in order[at : at + self.batch]]


def fine_tune(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Sequence[int]], Tensor],
    examples: int,
    schedule: Schedule,
    *,
    generator: Generator,
    state: Path,
    every: float = 60.0,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Minimise a loss in place by Adam, going on from ``state`` where there is such a file.

    Kingma and Ba, *Adam*, arXiv 1412.6980, algorithm 1, with gradients clipped to norm 1 (Pascanu
    et al., arXiv 1211.5063). The file holds parameters and moments and is gone at the end.

    Args:
        parameters: What is trained, by name.
        loss: Rows of a batch -> mean loss, with its graph.
        examples: Number of examples.
        schedule: How long and how fast.
        generator: Source of the batch orders; it is only read.
        state: File to go on from. Its name should hold everything that the weights depend on.
        every: Seconds between two writings of that file; 0 writes it after each step.
        on_step: Called after each step, and at once for each that the file has.

    Raises:
        OSError: When the file cannot be written.
    """
    means = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    done = _restore(state, parameters, means, squares)
    for _ in range(done):
        on_step()
    written = time.monotonic()
    for step in range(done, schedule.steps):
        for p in parameters.values():
            p.grad = None
        torch.autograd.backward(loss(schedule.rows(step, examples, generator)))
        _adam(parameters, means, squares, step, schedule.rate_of(step))
        if step + 1 < schedule.steps and time.monotonic() - written >= every:
            _keep(state, parameters, means, squares, step + 1)
            written = time.monotonic()
        on_step()
    for p in parameters.values():
        p.grad = None


def _adam(
    parameters: Mapping[str, nn.Parameter],
    means: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    step: int,
    rate: float,
) -> None:
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    shrink = float(torch.clamp(1 / (norm + 1e-6), max=1.0))
    with torch.no_grad():
        for name, gradient in gradients.items():
            gradient.mul_(shrink)
            means[name].lerp_(gradient, 1 - _BETAS[0])
            squares[name].lerp_(gradient.square(), 1 - _BETAS[1])
            scale = (squares[name] / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(_EPS)
            parameters[name].addcdiv_(
                means[name], scale, value=-rate / (1 - _BETAS[0] ** (step + 1))
            )


def _keep(
    state: Path,
    parameters: Mapping[str, nn.Parameter],
    means: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    done: int,
) -> None:
    tensors = {name: p.detach() for name, p in parameters.items()}
    tensors |= {_MEAN + name: value for name, value in means.items()}
    tensors |= {_SQUARE + name: value for name, value in squares.items()}
    write_network(state, {**tensors, _STEP: torch.tensor(done)})


def _restore(
    state: Path,
    parameters: Mapping[str, nn.Parameter],
    means: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
) -> int:
    """Return how many steps are done, after putting back what the file has."""
    kept = read_network(state)
    if kept is None:
        return 0
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(kept[name])
            means[name].copy_(kept[_MEAN + name])
            squares[name].copy_(kept[_SQUARE + name])
    return int(kept[_STEP])
