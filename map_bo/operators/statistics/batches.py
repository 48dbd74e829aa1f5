"""Going through a user's batches, with the model as it is used and not as it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, device, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint

__all__ = ["Batch", "call", "digest_of", "each_batch", "evaluating", "map_batch", "targets_of"]

Batch = tuple[Tensor, ...] | dict[str, Tensor]
"""``(inputs..., targets)``, or the keyword arguments of a Hugging Face model."""

_TARGETS = ("labels", "label")


def each_batch(
    batches: Iterable[Any], where: device, limit: int | None
) -> Iterator[tuple[Batch, int]]:
    """Yield the batches on the model's device, each with its number of examples.

    Args:
        batches: Tuples, lists, mappings or single tensors; examples are rows of all tensors.
        where: The model's device.
        limit: Stop after so many examples; None for all.

    Raises:
        MergeError: On a batch that is something else, or whose tensors differ in length.
    """
    if limit is not None and limit < 1:
        raise MergeError(
            f"limit must be at least 1, got {limit}",
            hint="give a number of examples, or None for all",
        )
    left = limit
    for given in batches:
        batch = _batch(given)
        lengths = {len(tensor) for tensor in _tensors(batch)}
        if len(lengths) != 1:
            raise MergeError(
                f"the tensors of a batch must have the same number of rows, got {sorted(lengths)}",
                hint="the first dimension of each is the example",
            )
        n = lengths.pop()
        if left is not None:
            n = min(n, left)
            left -= n
        if n:
            yield map_batch(lambda tensor, n=n: tensor[:n].to(where), batch), n  # type: ignore[misc]
        if left == 0:
            return


def _batch(given: Any) -> Batch:
    batch: Batch
    if isinstance(given, Tensor):
        batch = (given,)
    elif isinstance(given, Mapping):
        batch = {str(name): value for name, value in given.items()}
    elif isinstance(given, (tuple, list)):
        batch = tuple(given)
    else:
        raise MergeError(
            f"a batch must be a tensor, tuple, list or mapping, got a {type(given).__name__}",
            hint="give (inputs, targets), or a mapping for a Hugging Face model",
        )
    parts = batch.items() if isinstance(batch, dict) else enumerate(batch)
    for name, value in parts:
        if not isinstance(value, Tensor) or not value.dim():
            kind = type(value).__name__
            raise MergeError(
                f"entry {name!r} of a batch is a {kind}, not a tensor with one row per example",
                hint="leave out of the loader what the model does not take",
            )
    if not batch:
        raise MergeError("a batch is empty", hint="give (inputs, targets), or a mapping")
    return batch


def map_batch(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Return the batch with every tensor changed."""
    if isinstance(batch, dict):
        return {name: change(tensor) for name, tensor in batch.items()}
    return tuple(change(tensor) for tensor in batch)


def _tensors(batch: Batch) -> Iterable[Tensor]:
    return batch.values() if isinstance(batch, dict) else batch


def call(model: nn.Module, batch: Batch) -> Any:
    """Return what the model makes of the inputs: all of a batch but its targets."""
    if isinstance(batch, dict):
        return model(**{name: value for name, value in batch.items() if name not in _TARGETS})
    return model(*(batch[:-1] if len(batch) > 1 else batch))


def targets_of(batch: Batch) -> Tensor:
    """Return the targets of a batch.

    Raises:
        MergeError: When it has none.
    """
    if isinstance(batch, dict):
        for name in _TARGETS:
            if name in batch:
                return batch[name]
    elif len(batch) > 1:
        return batch[-1]
    raise MergeError(
        "a batch has no labels",
        hint="give (inputs, labels) or a mapping with 'labels', or choose labels from the model's "
        "own predictions",
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode: statistics are those of the model that is used."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def digest_of(model: nn.Module, of: CheckpointSource | None) -> str:
    """Return the digest of the expert's checkpoint, by default of the model itself."""
    return open_checkpoint(model if of is None else of).digest()
