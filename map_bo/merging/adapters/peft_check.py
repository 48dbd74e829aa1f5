"""Whether peft, where it is installed, loads an adapter as it was meant."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, first_line, listed

__all__ = ["load_with_peft", "without_weights"]

_PREFIX = "base_model.model."


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors are each one number, repeated without memory for it.

    Not on the meta device: peft moves what it loads to the device of the weights.
    """
    tensors: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        tensors[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad and tensor.is_floating_point())
            if isinstance(tensor, nn.Parameter)
            else empty
        )
    return copy.deepcopy(model, dict(tensors))


def load_with_peft(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Load an adapter with peft over a model without weights, and compare what it took.

    Args:
        model: The model; it stays as it is.
        folder: The adapter's folder.
        tensors: The adapter's tensors, by their names in the file.

    Returns:
        Whether it was compared: False where peft is not installed.

    Raises:
        MergeError: When peft does not load it, leaves something out, or takes it for other values.
    """
    try:
        import peft
    except ImportError:
        return False
    hint = "export the merged model instead, and please report this"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = peft.PeftModel.from_pretrained(
                without_weights(model), folder, low_cpu_mem_usage=True
            )
            taken = _plain_names(loaded.state_dict())
    # peft and transformers raise what they like; whatever it is, the adapter cannot be used.
    except Exception as error:
        raise MergeError(f"peft cannot load the adapter: {first_line(error)}", hint=hint) from error
    lacking = [name for name in tensors if name.removeprefix(_PREFIX) not in taken]
    if lacking:
        raise MergeError(f"peft leaves out {listed(lacking)} of the adapter", hint=hint)
    # peft rounds what it loads to the dtype of the weights.
    kinds = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    rounding = 2 * max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    for name, tensor in tensors.items():
        found = taken[name.removeprefix(_PREFIX)]
        if found.shape != tensor.shape or _distance(found, tensor) > rounding:
            raise MergeError(f"peft takes {name!r} of the adapter for other values", hint=hint)
    scales = {
        float(scale)
        for module in loaded.modules()
        if isinstance(found := vars(module).get("scaling"), dict)
        for scale in found.values()
    }
    if scales - {1.0}:
        raise MergeError(
            f"peft scales the adapter's factors by {listed(map(str, sorted(scales)))}", hint=hint
        )
    return True


def _distance(one: Tensor, two: Tensor) -> float:
    """Return how far two tensors are from each other, relative to the second."""
    norm = float(two.double().norm())
    gap = float((one.double() - two.double()).norm())
    return gap / norm if norm else gap


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names that peft saves them under, without its adapter's name."""
    return {
        name.removeprefix(_PREFIX)
        .replace(".modules_to_save.default", "")
        .replace(".default", ""): tensor
        for name, tensor in state.items()
        if ".original_module." not in name
    }
