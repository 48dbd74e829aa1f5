"""The batches of a data loader, read once and kept in memory.

Whatever a loader does by chance (its order, augmentations) is drawn from a fixed seed while it is
read, so that every candidate sees the same examples in the same batches, in every process.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from map_bo.errors import EvaluationError, MapBoError, first_line
from map_bo.evaluators.isolation.global_state import seed_everything

__all__ = ["LABELS", "LoadedBatches", "call_with", "in_order"]

LABELS = ("labels", "label")
"""Under which keys a batch that is a dictionary has its labels."""


@dataclass(frozen=True, eq=False)
class LoadedBatches:
    """The batches of a loader, in memory.

    Attributes:
        batches: Inputs and targets of each, on the CPU.
        where: ``n x 2``: the batch of each example, and its row there.
        digest: SHA-256 of all of them.
    """

    batches: tuple[tuple[Any, Any], ...]
    where: Tensor
    digest: str

    @classmethod
    def read(
        cls,
        loader: Iterable[Any] | Callable[..., Any],
        *,
        labels: Sequence[str] = LABELS,
        limit: int | None = None,
        seed: int = 0,
    ) -> LoadedBatches:
        """Read a loader to its end, or to ``limit`` examples.

        Args:
            loader: The loader, or a function that returns it.
            labels: Keys of the labels in batches that are mappings; the first that is there.
            limit: Read at most so many examples.
            seed: Seed of the global generators meanwhile; they are put back.

        Raises:
            EvaluationError: When it has neither a length nor a limit, is empty, fails, or gives
                something else than batches.
        """
        with _seeded(seed):
            found = loader() if callable(loader) else loader
            if not isinstance(found, Iterable):
                raise EvaluationError(
                    f"the loader is a {type(found).__name__}, which gives no batches",
                    hint="return a torch.utils.data.DataLoader",
                )
            if limit is None and not _has_length(found):
                raise EvaluationError(
                    "the loader has no length, so it may have no end",
                    hint="give limit, the number of examples to use",
                )
            try:
                batches = list(_read(found, labels, limit))
            except MapBoError:
                raise
            except Exception as error:  # whatever a data set of others raises
                raise EvaluationError(
                    f"the loader raised {type(error).__name__}: {first_line(error)}",
                    hint="iterate over it by itself to find out why",
                ) from error
        if not batches:
            raise EvaluationError("the loader gave no examples", hint="give at least one batch")
        with_targets = {targets is not None for _, targets in batches}
        if len(with_targets) > 1:
            raise EvaluationError(
                "some batches of the loader have targets and some have not",
                hint="give all batches the same form",
            )
        sizes = [_length(inputs) for inputs, _ in batches]
        where = torch.cat(
            [torch.stack([torch.full((n,), i), torch.arange(n)], -1) for i, n in enumerate(sizes)]
        )
        total = hashlib.sha256()
        for batch in batches:
            for piece in _pieces(batch):
                total.update(piece)
        return cls(tuple(batches), where, total.hexdigest())

    @property
    def size(self) -> int:
        """The number of examples."""
        return len(self.where)

    @property
    def largest(self) -> int:
        """The number of examples of the largest batch."""
        return max(_length(inputs) for inputs, _ in self.batches)

    @property
    def targets(self) -> Tensor | None:
        """All targets, flattened; None where there are none, or they are no single tensors."""
        parts = [targets for _, targets in self.batches]
        if not all(isinstance(part, Tensor) for part in parts):
            return None
        return torch.cat([part.flatten() for part in parts])

    def parts(self, items: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Any, Any]]:
        """Yield places among ``items`` (``b`` indices), with inputs and targets of these examples.

        Examples of the same shape come together. Those of a whole batch are that batch.
        """
        where = self.where[items]
        forms: dict[object, list[int]] = {}
        for place, number in enumerate(where[:, 0].tolist()):
            forms.setdefault(_form(self.batches[number]), []).append(place)
        for places in forms.values():
            chosen = where[places]
            pieces = []
            for number in dict.fromkeys(chosen[:, 0].tolist()):
                rows = chosen[chosen[:, 0] == number, 1]
                pieces.append((number, rows))
            order = torch.cat(
                [torch.nonzero(chosen[:, 0] == number).flatten() for number, _ in pieces]
            )
            inputs, targets = _joined([_rows(self.batches[n], rows) for n, rows in pieces])
            yield torch.tensor(places)[order], _moved(inputs, device), _moved(targets, device)


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Call a model with the inputs of a batch: by keyword, by position, or with one tensor."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def in_order(parts: Sequence[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Return rows in the order of their places."""
    places = torch.cat([one for one, _ in parts])
    try:
        rows = torch.cat([rows for _, rows in parts])
    except RuntimeError as error:
        raise EvaluationError(
            f"outputs of examples do not go together: {first_line(error)}",
            hint="give an outcome function",
        ) from error
    ordered = torch.empty_like(rows)
    ordered[places] = rows
    assert len(ordered) == n
    return ordered


# The parts of batches.


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and put them back."""
    found = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        seed_everything(seed)
        yield
    finally:
        torch.set_rng_state(found[0])
        np.random.set_state(found[1])  # noqa: NPY002
        random.setstate(found[2])


def _has_length(loader: object) -> bool:
    if not isinstance(loader, Sized):
        return False
    try:
        len(loader)
    except TypeError:  # as a data loader of a data set without one
        return False
    return True


def _read(
    loader: Iterable[Any], labels: Sequence[str], limit: int | None
) -> Iterator[tuple[Any, Any]]:
    left = math.inf if limit is None else limit
    for batch in loader:
        inputs, targets = _divided(batch, labels)
        n = _length(inputs)
        if targets is not None and _length(targets) != n:
            raise EvaluationError(
                f"a batch of the loader has {n} inputs and {_length(targets)} targets",
                hint="give one target per example",
            )
        if n > left:
            inputs, targets = _rows((inputs, targets), torch.arange(int(left)))
        if n:
            yield inputs, targets
        left -= n
        if left <= 0:
            return


def _divided(batch: object, labels: Sequence[str]) -> tuple[Any, Any]:
    """Return the inputs of a batch and its targets, or None."""
    if isinstance(batch, Mapping):
        own = _normal(batch)
        key = next((name for name in labels if name in own), None)
        targets = None if key is None else own.pop(key)
        return own, targets
    if isinstance(batch, list | tuple):
        parts = tuple(_normal(part) for part in batch)
        if len(parts) == 1:
            return parts[0], None
        return (parts[0] if len(parts) == 2 else parts[:-1]), parts[-1]
    return _normal(batch), None


def _normal(value: object) -> Any:
    """Return a part of a batch in tensors on the CPU, lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, Mapping):
        return {str(name): _normal(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        if any(isinstance(part, Tensor | np.ndarray | Mapping) for part in value):
            return tuple(_normal(part) for part in value)
        if value and all(isinstance(part, int | float) for part in value):
            return torch.as_tensor(value)
        return list(value)
    raise EvaluationError(
        f"a batch of the loader holds a {type(value).__name__}",
        hint="batches are tensors, and tuples and dictionaries of them",
    )


def _length(value: Any) -> int:
    """Return the number of rows of a part of a batch."""
    if isinstance(value, Tensor):
        if not value.dim():
            raise EvaluationError(
                "a batch of the loader holds a tensor without rows",
                hint="give tensors with one row per example",
            )
        return len(value)
    if isinstance(value, list):
        return len(value)
    sizes = {_length(part) for part in (value.values() if isinstance(value, dict) else value)}
    if len(sizes) != 1:
        raise EvaluationError(
            f"the parts of a batch of the loader have {sorted(sizes) or 'no'} rows",
            hint="give all of them one row per example",
        )
    return sizes.pop()


def _rows(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value if torch.equal(rows, torch.arange(len(value))) else value[rows]
    if isinstance(value, list):
        return [value[i] for i in rows.tolist()]
    if isinstance(value, dict):
        return {name: _rows(part, rows) for name, part in value.items()}
    return None if value is None else tuple(_rows(part, rows) for part in value)


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, list):
        return [one for part in parts for one in part]
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    return tuple(_joined(column) for column in zip(*parts, strict=True))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return tuple(_moved(part, device) for part in value) if isinstance(value, tuple) else value


def _form(value: Any) -> object:
    """Return what batches that can be put together have in common."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape[1:])
    if isinstance(value, dict):
        return tuple((name, _form(part)) for name, part in value.items())
    return tuple(map(_form, value)) if isinstance(value, tuple) else type(value).__name__


def _pieces(value: Any) -> Iterator[bytes]:
    """Yield bytes that tell a part of a batch from others."""
    if isinstance(value, Tensor):
        whole = value.contiguous()
        yield f"{whole.dtype} {tuple(whole.shape)} ".encode()
        yield whole.flatten().view(torch.uint8).numpy().tobytes() if whole.numel() else b""
    elif isinstance(value, dict):
        for name, part in value.items():
            yield f"{name}=".encode()
            yield from _pieces(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from _pieces(part)
    else:
        yield f"{value!r};".encode()
