"""Measuring a metric and its derivatives by the coefficients, with one backward pass per batch.

For a merge that is linear in its coefficients, ``theta(c) = theta_base + sum_i c_i v_i`` (``v_i``
the part of a task vector that coefficient ``i`` scales), the derivative of a metric is
``v_i . grad``: one forward and backward pass gives the gradient by the weights, and its products
with the task vectors give all ``d`` derivatives at the price of reading those once.

What is differentiated: every merged parameter and floating buffer, through whatever the model
computes with it; BatchNorm's running mean and variance too, which torch's own BatchNorm does not
differentiate. Not differentiated: that merged variances are kept positive, running statistics of
other normalisations (InstanceNorm, subclasses of BatchNorm), and buffers that reach the output
only through operations without a derivative. Tied weights count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Evaluator, Measurement, measure
from map_bo.evaluators.isolation.world import callers_world, known_numerics
from map_bo.evaluators.metrics import metric_names
from map_bo.merging.align.layout import Slot
from map_bo.merging.vectors.live import LiveModel
from map_bo.merging.vectors.operator import HasDerivatives

__all__ = ["Differentiable", "check_differentiable", "measure_with_gradient"]

_FEWEST_BATCHES = 4  # below, the spread of so few batch gradients says too little
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@runtime_checkable
class Differentiable(Protocol):
    """An evaluator of a metric that is a mean over examples and differentiable in the weights.

    :func:`~map_bo.evaluators.evaluator.mean_loss` and
    :func:`~map_bo.evaluators.evaluator.mean_probability` make such evaluators. A metric that comes
    as one scalar is a single example.
    """

    def __call__(self, model: nn.Module) -> Measurement:
        """Measure without gradients, like any evaluator."""
        ...

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        """Yield, batch by batch, the value of each example (``b``) with its graph.

        Only one batch's graph is alive at a time: it is used before the next is asked for.
        """
        ...

    def summary(self, values: Tensor) -> Measurement:
        """Return the measurement for the values (``n``, float64) of all examples: their mean."""
        ...


def check_differentiable(name: str, evaluator: Evaluator) -> Differentiable:
    """Return an evaluator that gradients can be had from.

    Raises:
        EvaluationError: When it is not :class:`Differentiable`, or measures several metrics.
    """
    if len(metric_names(name, evaluator)) > 1:
        raise EvaluationError(
            f"gradients were asked for, and evaluator {name!r} measures several metrics",
            hint="give an evaluator for each metric, or pass gradients=False",
        )
    if not isinstance(evaluator, Differentiable):
        kind = getattr(evaluator, "__name__", type(evaluator).__name__)
        raise EvaluationError(
            f"gradients were asked for, and evaluator {name!r} ({kind}) has none",
            hint="mean_loss and mean_probability have gradients, and so has any evaluator with "
            "`examples` and `summary`; for others pass gradients=False",
        )
    return evaluator


@known_numerics()
def measure_with_gradient(
    name: str, evaluator: Evaluator, live: LiveModel, merge: HasDerivatives
) -> tuple[Measurement, Tensor, Tensor]:
    """Measure a metric on the candidate that is live, and its derivatives by the coefficients.

    The noise of the derivatives is that of a mean over batches: the variance between the batches'
    derivatives over their number, with each batch weighted by its size.

    Args:
        name: The evaluator's name, for errors.
        evaluator: The evaluator; it must be `Differentiable`.
        live: The live model with the candidate's weights.
        merge: What the weights were merged by: it turns gradients by the weights into derivatives
            by the ``d`` coefficients.

    Returns:
        The measurement; ``d`` derivatives, NaN when one of them is not finite; ``d`` variances of
        their noise, NaN with fewer than 4 batches.

    Raises:
        EvaluationError: As :func:`~map_bo.evaluators.evaluator.measure`; and when the evaluator has
            no gradients, or its values do not depend on the weights.
    """
    source = check_differentiable(name, evaluator)
    sizes: list[int] = []
    gradients: list[Tensor] = []

    def run(model: nn.Module) -> Measurement:
        values: list[Tensor] = []
        with _leaves(live) as leaves, torch.inference_mode(False), torch.enable_grad():
            flat = torch.zeros(len(live.flat), dtype=torch.float32, device=live.device)
            for batch in source.examples(model):
                if not batch.requires_grad:
                    raise EvaluationError(
                        "its values do not depend on the model's weights",
                        hint="compute them without torch.no_grad, and do not detach them",
                    )
                with torch.enable_grad():  # a generator's modes reach whoever consumes it
                    total = batch.double().sum()
                leaf_tensors = [leaf for leaf, _ in leaves]
                found = torch.autograd.grad(total, leaf_tensors, allow_unused=True)
                flat.zero_()
                for part, (_, slot) in zip(found, leaves, strict=True):
                    if part is not None:
                        slot.of(flat).add_(part)
                gradients.append(merge.directional(flat))
                sizes.append(batch.numel())
                values.append(batch.detach().double().cpu().flatten())
        return source.summary(torch.cat(values))

    with callers_world(), known_numerics():  # what the evaluator switches ends here
        seen = measure(name, run, live.model)
    size = torch.tensor(sizes, dtype=torch.float64).unsqueeze(-1)
    sums = torch.stack(gradients)
    gradient = sums.sum(0) / size.sum()
    variance = torch.full_like(gradient, torch.nan)
    batches = len(sizes)
    if batches >= _FEWEST_BATCHES:
        away = (size / size.sum()) * (sums / size - gradient)
        variance = away.square().sum(0) * (batches / (batches - 1))
    if not bool(torch.isfinite(gradient).all()):
        gradient, variance = (torch.full_like(gradient, torch.nan) for _ in range(2))
    return seen, gradient, variance


@contextmanager
def _leaves(live: LiveModel) -> Iterator[list[tuple[Tensor, Slot]]]:
    """Yield the tensors to differentiate by, with their slots; leave no trace in the model."""
    merged = live.merged_tensors()
    slots = {id(tensor): slot for tensor, slot in merged}
    leaves: list[tuple[Tensor, Slot]] = []
    apart: set[int] = set()
    hooks = []
    for module in live.model.modules():
        if not isinstance(module, _NormBase):
            continue
        mean, variance = module.running_mean, module.running_var
        if mean is None or variance is None or not {id(mean), id(variance)} <= slots.keys():
            continue
        apart |= {id(mean), id(variance)}  # torch refuses running statistics with a gradient
        if type(module) in _BATCH_NORMS:
            own = [statistic.detach().clone().requires_grad_() for statistic in (mean, variance)]
            leaves += [(own[0], slots[id(mean)]), (own[1], slots[id(variance)])]
            hooks.append(module.register_forward_hook(_normalising(*own)))
    flags = [(t, t.requires_grad) for t, _ in merged if id(t) not in apart]
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(True)
        yield [*((tensor, slots[id(tensor)]) for tensor, _ in flags), *leaves]
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def _normalising(mean: Tensor, variance: Tensor) -> Callable[..., Tensor]:
    """Return a forward hook that redoes BatchNorm as a function of its running statistics."""

    def redo(module: _NormBase, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        shape = (1, -1, *(1,) * (x.dim() - 2))
        scale = (variance + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        result = (x - mean.view(shape)) * scale.view(shape)
        if module.bias is not None:
            result = result + module.bias.view(shape)
        return result.to(output.dtype)

    return redo
