"""How a model's tensors are called, and cut, in the files that its library writes.

transformers renames and regroups weights between files and modules: the experts of a mixture are
one tensor in the module and one per piece in the files. Checkpoints and merges go by the files, so
that a merged model can be read by whatever reads the base; the live model goes by its modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed

__all__ = ["Saved", "saved_as", "state_tensors"]


@dataclass(frozen=True)
class Saved:
    """What a tensor in a file is of the module: one of its tensors, or a piece of one.

    Attributes:
        name: Name of the module's tensor in its state dict.
        shape: Shape of the piece; None for the whole tensor, as it is.
        stride: Strides of the piece in the memory of the tensor.
        offset: Index of its first number in that memory.
    """

    name: str
    shape: torch.Size | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return the module's ``tensor`` itself, or the piece as a view of its memory."""
        if self.shape is None:
            return tensor
        start = tensor.storage_offset() + self.offset
        return tensor.detach().as_strided(self.shape, self.stride, start)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict, the module's own objects, tied names included."""
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }


def saved_as(model: nn.Module, known: Collection[str] | None = None) -> dict[str, Saved]:
    """Return what each tensor in a file of ``model`` is of the module, by its name in the file.

    Args:
        model: The model. Where its library has no other form for files, names are those of the
            state dict.
        known: Names of a checkpoint: when the state dict has them all, they are its own, as in a
            checkpoint of the module in memory.

    Raises:
        MergeError: When a checkpoint with names of files is given, and a tensor there is computed
            from the module's, so that no view of these is it. Without one such are left out.
    """
    named = state_tensors(model)
    plain = {name: Saved(name) for name in named}
    if known is not None and named.keys() >= set(known):
        return plain
    revert = _reverter(model)
    if revert is None or any(tensor.is_meta for tensor in named.values()):
        return plain
    given = {name: tensor.detach().as_subclass(_Uncopied) for name, tensor in named.items()}
    found = revert(model, given)
    if found.keys() == named.keys():
        return plain
    parts = {name: _origin(name, tensor, named) for name, tensor in found.items()}
    computed = [name for name, part in parts.items() if part is None]
    if computed and known is not None:
        raise MergeError(
            f"the files of {type(model).__name__} hold what is computed from its weights: "
            f"{listed(computed)}",
            hint="give base and experts as models in memory, whose names are those of the modules",
        )
    return {name: part for name, part in parts.items() if part is not None}


def _reverter(model: nn.Module) -> Callable[..., Mapping[str, Tensor]] | None:
    """Return transformers' own way from modules to files; None for other models."""
    library: Any = sys.modules.get("transformers")
    kind = getattr(library, "PreTrainedModel", None)
    if kind is None or not isinstance(model, kind):
        return None
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 files and modules had the same names
        return None
    revert: Callable[..., Mapping[str, Tensor]] = revert_weight_conversion
    return revert


class _Uncopied(Tensor):
    """A tensor whose pieces stay views, so that they tell where they come from."""

    def contiguous(self, *args: Any, **settings: Any) -> Tensor:
        return self


def _origin(name: str, tensor: Tensor, named: Mapping[str, Tensor]) -> Saved | None:
    tensor = tensor.detach().as_subclass(Tensor)
    start = tensor.data_ptr()
    own = named.get(name)
    candidates = {name: own, **named} if own is not None else named
    for owner, whole in candidates.items():
        first = whole.data_ptr()
        if not first <= start < first + max(1, whole.numel() * whole.element_size()):
            continue
        if tensor.dtype != whole.dtype:
            continue
        if (start, tensor.shape, tensor.stride()) == (first, whole.shape, whole.stride()):
            return Saved(owner)
        return Saved(owner, tensor.shape, tensor.stride(), (start - first) // whole.element_size())
    return None
