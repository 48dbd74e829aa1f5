"""How a model's tensors are called, and cut, in the files that its library writes.

transformers renames and regroups weights between files and modules: the experts of a mixture are
one tensor in the module and one per piece in the files. Checkpoints and merges go by the files, so
that a merged model can be read by whatever reads the base; the live model goes by its modules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed

__all__ = ["ModuleTensors", "Saved", "left_out_of_files", "saved_as", "state_tensors"]


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


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of a model's modules, and what a checkpoint calls each of them.

    Adapters go by the names of modules, checkpoints by those of files; this is the way between.

    Attributes:
        parts: Module's tensor -> the checkpoint's tensors that it consists of: name there, and what
            that is of the module's. In the order in which modules register their parameters; a
            tied tensor under each of its names.
        shapes: Module's tensor -> its shape.
        modules: Names of all modules.
        in_by_out: Modules that say of their three-dimensional weights that they are stored
            ``in x out`` (``is_transposed``, as transformers' experts do).
        parents: Modules that have modules with tensors inside.
    """

    parts: Mapping[str, tuple[tuple[str, Saved], ...]]
    shapes: Mapping[str, torch.Size]
    modules: frozenset[str] = frozenset()
    in_by_out: frozenset[str] = frozenset()
    parents: frozenset[str] = field(default=frozenset())

    @classmethod
    def of(cls, model: nn.Module, names: Collection[str]) -> ModuleTensors | None:
        """Return them for a checkpoint with these names, or None when the model has none of them.

        The model may be on the meta device. What it lacks, and what files hold that is computed
        from several of its tensors, is left out.
        """
        named, known = state_tensors(model), set(names)
        saved = {name: Saved(name) for name in named}
        if not saved.keys() >= known:
            in_files = saved_as(model)
            if len(in_files.keys() & known) > len(saved.keys() & known):
                saved = in_files
        placed = sorted(saved.keys() & known)
        if not placed:
            return None
        groups: dict[object, list[str]] = {}
        for name, tensor in named.items():
            groups.setdefault(_identity(tensor), []).append(name)
        parts: dict[str, list[tuple[str, Saved]]] = {}
        for name in placed:
            parts.setdefault(saved[name].name, []).append((name, saved[name]))
        for group in groups.values():
            # Of tied names the files may have any; one that they have is its own.
            first = next((parts[own] for own in group if own in parts), None)
            if first is not None:
                parts |= {own: first for own in group if own not in parts}
        modules = dict(model.named_modules())
        return cls(
            {name: tuple(parts[name]) for name in named if name in parts},
            {name: tensor.shape for name, tensor in named.items()},
            frozenset(modules),
            frozenset(n for n, m in modules.items() if vars(m).get("is_transposed") is True),
            _parents(named),
        )

    @classmethod
    def plain(cls, shapes: Mapping[str, torch.Size]) -> ModuleTensors:
        """Return those of a model whose modules' tensors are called as the checkpoint's are."""
        modules = {".".join(n.split(".")[:k]) for n in shapes for k in range(n.count(".") + 1)}
        return cls(
            {name: ((name, Saved(name)),) for name in shapes},
            dict(shapes),
            frozenset(modules),
            parents=_parents(shapes),
        )

    def on_one_module(self, name: str) -> list[str]:
        """Return the tensors that the module of a tensor has itself, in their order."""
        module = name.rpartition(".")[0]
        return [other for other in self.shapes if other.rpartition(".")[0] == module]


def _parents(names: Iterable[str]) -> frozenset[str]:
    paths = (name.split(".")[:-1] for name in names)
    return frozenset(".".join(path[:k]) for path in paths for k in range(len(path)))


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
    if revert is None:
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


def left_out_of_files(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of a model's tensors that its library does not save, since they are computed.

    A model of transformers says so itself (the sinusoidal positions of Marian).
    """
    library: Any = sys.modules.get("transformers")
    kind = getattr(library, "PreTrainedModel", None)
    if kind is None or not isinstance(model, kind):
        return set()
    patterns = [str(each) for each in model._keys_to_ignore_on_save or ()]
    return {n for n in names if any(re.search(each, n) for each in patterns)}


class _Uncopied(Tensor):
    """A tensor whose pieces stay views, so that they tell where they come from."""

    def contiguous(self, *args: Any, **settings: Any) -> Tensor:
        return self


def _origin(name: str, tensor: Tensor, named: Mapping[str, Tensor]) -> Saved | None:
    tensor = tensor.detach().as_subclass(Tensor)
    own = named.get(name)
    candidates = {name: own, **named} if own is not None else named
    for owner, whole in candidates.items():
        if tensor.dtype != whole.dtype or tensor.is_meta != whole.is_meta:
            continue
        offset = _offset_in(tensor, whole)
        if offset is None:
            continue
        if (offset, tensor.shape, tensor.stride()) == (0, whole.shape, whole.stride()):
            return Saved(owner)
        return Saved(owner, tensor.shape, tensor.stride(), offset)
    return None


def _offset_in(tensor: Tensor, whole: Tensor) -> int | None:
    """Return the index of a tensor's first number in the memory of another; None outside it."""
    if whole.is_meta:  # without memory, but views still share what stands for it
        if tensor.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return None
        offset = int(tensor.storage_offset()) - int(whole.storage_offset())
    else:
        offset, rest = divmod(tensor.data_ptr() - whole.data_ptr(), whole.element_size())
        if rest:
            return None
    return offset if 0 <= offset < max(1, whole.numel()) else None


def _identity(tensor: Tensor) -> object:
    """Return what two tensors have in common exactly when they are one tensor."""
    if not tensor.numel():
        return id(tensor)
    storage = tensor.untyped_storage()._cdata
    return (storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
