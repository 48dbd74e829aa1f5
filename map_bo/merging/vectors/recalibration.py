"""Recalibrating batch normalisation: running statistics measured anew on data.

The statistics that a merged network's layers see are not the merge of those that its models saw:
averaging weights shrinks the variance of activations (Jordan et al., *REPAIR: REnormalizing
Permuted Activations for Interpolation Repair*, arXiv 2211.08403, section 3), and running
statistics have to be computed again for averaged weights (Izmailov et al., *Averaging Weights
Leads to Wider Optima and Better Generalization*, arXiv 1803.05407, section 3.2). torch's own
``torch.optim.swa_utils.update_bn`` does the latter with the whole model in training mode, dropout
included; here only the normalising layers train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from map_bo.errors import EvaluationError, MergeError, first_line, listed
from map_bo.merging.checkpoints.saved_names import saved_as

__all__ = ["Batches", "Recalibration", "recalibrate", "require_batch_norm", "statistics"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches for `recalibrate`, or a function that returns them anew each time."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(model: nn.Module, batches: Iterable[Any], *, momentum: float | None = None) -> int:
    """Measure the running statistics of all BatchNorm layers anew on ``batches``.

    The statistics are reset, then the batches are run without gradients, with the BatchNorm layers
    (all kinds and subclasses, SyncBatchNorm too, however deep) in training mode and everything
    else in evaluation mode. Modes and momenta are put back afterwards. A layer that the batches do
    not reach, such as that of a head used in training alone, keeps its statistics.

    Args:
        model: The model; its parameters are not changed.
        batches: Each one is a tensor or another input of the model; a tuple or list whose first
            item is that (inputs and labels); or a mapping of keyword arguments. Tensors are moved
            to the model's device.
        momentum: Weight of each new batch in an exponential average; by default the plain average
            over batches, whatever their sizes.

    Returns:
        How many batches were run.

    Raises:
        MergeError: When the model has no BatchNorm layers with running statistics, there are no
            batches, they reach none of the layers, or the momentum is not in (0, 1].
        EvaluationError: When the model raises, or the statistics come out as NaN or infinity.

    After any error the statistics are as before.
    """
    if momentum is not None and not 0 < momentum <= 1:
        raise MergeError(
            f"momentum must be above 0 and at most 1, got {momentum}",
            hint="give the weight of a new batch, or None for the average",
        )
    layers = require_batch_norm(model)
    before = {name: _copies(layer) for name, layer in layers.items()}
    try:
        with _training(model, layers.values(), momentum):
            count = _run(model, batches)
        missed = [name for name, layer in layers.items() if not _is_reached(layer)]
        if not count or len(missed) == len(layers):
            raise MergeError(
                "there are no batches to recalibrate with"
                if not count
                else f"the batches reach none of the BatchNorm layers {listed(missed)}",
                hint="give at least one batch of the data that the model will see",
            )
        for name in missed:
            _restore(layers[name], before[name])
        _require_finite(layers)
    except BaseException:
        for name, layer in layers.items():
            _restore(layer, before[name])
        raise
    return count


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all running statistics and batch counters.

    Names are those of the state dict, and those in the model's files where they differ.
    """
    found = {
        f"{name}.{kind}" if name else kind: value
        for name, layer in _layers(model, every_name=True).items()
        for kind, value in _copies(layer).items()
    }
    parts = saved_as(model)
    return found | {name: found[p.name] for name, p in parts.items() if p.name in found}


def require_batch_norm(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of a model that have running statistics, by name.

    Raises:
        MergeError: When there are none.
    """
    layers = _layers(model)
    if not layers:
        raise MergeError(
            f"{type(model).__name__} has no BatchNorm layers with running statistics",
            hint="leave recalibration out: other normalisations keep no statistics of data",
        )
    return layers


class Recalibration:
    """Recalibrates each candidate of a merge once, however often it is written.

    Args:
        batches: The batches of every recalibration; see `recalibrate`.

    Raises:
        MergeError: When they are not batches, or can be gone through only once.
    """

    def __init__(self, batches: Batches) -> None:
        if not callable(batches) and not isinstance(batches, Iterable):
            raise MergeError(
                f"recalibration must be batches or a function, got a {type(batches).__name__}",
                hint="give a list of batches, a data loader, or a function that returns one",
            )
        if isinstance(batches, Iterator):
            raise MergeError(
                "recalibration must be batches that can be gone through again, got an iterator",
                hint="give a list of batches, a data loader, or a function that returns them anew",
            )
        self.batches = batches
        self._last: tuple[Tensor, dict[str, dict[str, Tensor]]] | None = None

    def __call__(self, model: nn.Module, c: Tensor) -> None:
        """Recalibrate the model merged with coefficients ``c`` (``d``), or repeat what that gave.

        Raises:
            MergeError: As `recalibrate`.
            EvaluationError: As `recalibrate`.
        """
        layers = require_batch_norm(model)
        if self._last is not None and torch.equal(self._last[0], c):
            for name, layer in layers.items():
                _restore(layer, self._last[1][name])
            return
        # A loader draws from torch's global state even where it keeps the order.
        with torch.random.fork_rng(devices=[]):
            recalibrate(model, self.batches() if callable(self.batches) else self.batches)
        self._last = c.clone(), {name: _copies(layer) for name, layer in layers.items()}


def _layers(model: nn.Module, *, every_name: bool = False) -> dict[str, _BatchNorm]:
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=not every_name)
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }


def _copies(layer: _BatchNorm) -> dict[str, Tensor]:
    found = {kind: getattr(layer, kind) for kind in _STATISTICS}
    return {kind: value.detach().clone() for kind, value in found.items() if value is not None}


def _restore(layer: _BatchNorm, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for kind, value in values.items():
            getattr(layer, kind).copy_(value)


def _is_reached(layer: _BatchNorm) -> bool:
    return layer.num_batches_tracked is not None and bool(layer.num_batches_tracked)


@contextmanager
def _training(
    model: nn.Module, layers: Iterable[_BatchNorm], momentum: float | None
) -> Iterator[None]:
    """Reset the layers and let them, and nothing else, train."""
    layers = list(layers)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers:
            layer.training = True
            layer.momentum = momentum
            layer.reset_running_stats()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for layer, found in zip(layers, momenta, strict=True):
            layer.momentum = found


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    tensors = (*model.parameters(), *model.buffers())
    device = next(tensor.device for tensor in tensors)
    count = 0
    with torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
            try:
                if isinstance(inputs, Mapping):
                    model(**{name: _move(value, device) for name, value in inputs.items()})
                else:
                    model(_move(inputs, device))
            except Exception as error:
                raise EvaluationError(
                    f"recalibration: on batch {count} the model raised {type(error).__name__}: "
                    f"{first_line(error)}",
                    hint="a batch is the model's input, a tuple that begins with it, or a mapping "
                    "of keyword arguments; layers over vectors need two examples or more",
                ) from error
            count += 1
    return count


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _require_finite(layers: Mapping[str, _BatchNorm]) -> None:
    broken = [
        name
        for name, layer in layers.items()
        if not all(bool(torch.isfinite(value).all()) for value in _copies(layer).values())
    ]
    if broken:
        raise EvaluationError(
            f"recalibration: the statistics of {listed(broken)} are NaN or infinite",
            hint="these coefficients break the model, or the batches hold NaN; narrow the bounds "
            "if many do",
        )
