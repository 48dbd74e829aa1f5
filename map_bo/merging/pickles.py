"""State dicts in pickles: read with torch's restricted unpickler, which runs no code."""

from __future__ import annotations

import builtins
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import CheckpointError
from map_bo.merging.messages import first_line, listed

__all__ = ["read_pickle", "state_dict"]

# The keys under which training scripts keep the state dict beside optimiser state and counters.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a ``.pt``, ``.pth`` or ``.bin`` file without running its code.

    The file may hold the state dict itself or a dict with one under ``state_dict``,
    ``model_state_dict`` or ``model``. Files in torch's zip format are memory-mapped.

    Raises:
        CheckpointError: For a file that is damaged, would run code, or holds no state dict.
    """
    try:
        with warnings.catch_warnings():
            # torch warns of pickles that it did not write; what it cannot read, it refuses.
            warnings.simplefilter("ignore")
            content: Any = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    # A damaged pickle can raise nearly anything, from EOFError to UnicodeDecodeError.
    except Exception as error:
        unsafe = _would_run(path, str(error))
        if unsafe:
            raise CheckpointError(
                f"{path} was refused: {unsafe}",
                hint="convert it to safetensors in a place you trust, "
                "or save model.state_dict() alone",
            ) from error
        raise CheckpointError(
            f"{path} cannot be read: {_pickle_problem(error)}",
            hint="the file is truncated, damaged or not written by torch.save; fetch it again",
        ) from error
    return state_dict(content, origin=str(path))


def _would_run(path: Path, problem: str) -> str | None:
    """Return why a pickle that torch refused is unsafe, or None when it is only damaged."""
    for pattern in (
        r"Unsupported global: GLOBAL (\S+)",
        r"Trying to (?:load unsupported GLOBAL|instantiate|call|set) (\S+)",
        r"Unsupported class (\S+)",
    ):
        found = re.search(pattern, problem)
        # A name that is neither dotted nor a builtin is a pickle cut off in the middle of it.
        if found and (re.search(r"\w\.\w", found.group(1)) or hasattr(builtins, found.group(1))):
            return f"it is a pickle that would run code ({found.group(1)})"
    with path.open("rb") as file:
        start = file.read(2)
    # torch.save writes protocol 2; a plain pickle.dump writes a later one.
    if len(start) == 2 and start[0] == 0x80 and start[1] > 2:
        return "it is a plain pickle, not written by torch.save, and could run code"
    return None


def _pickle_problem(error: Exception) -> str:
    # The first line of torch's message advises to load without weights_only; it is left out.
    found = re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error))
    if found:
        return found.group(1)[:300]
    if str(error).startswith("Weights only load failed"):
        return "it is not a pickle of tensors"
    return first_line(error)


def state_dict(content: object, *, origin: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict, or of the one nested in a training checkpoint.

    Entries named ``*_extra_state`` that are no tensors are left out: modules use them for
    private settings that are no weights.

    Raises:
        CheckpointError: When there is no state dict, or it holds other things than tensors.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{origin} holds a {type(content).__name__}, not a state dict",
            hint="save model.state_dict()",
        )
    if not all(isinstance(value, Tensor) for value in content.values()):
        for key in NESTED_KEYS:
            if isinstance(content.get(key), Mapping):
                return state_dict(content[key], origin=f"{origin}[{key!r}]")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(value, Tensor) or not str(name).endswith("_extra_state")
    }
    strange = [
        repr(name)
        for name, value in tensors.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise CheckpointError(
            f"{origin} is not a state dict of names and tensors; see the "
            f"entr{'y' if len(strange) == 1 else 'ies'} {listed(strange)}",
            hint="give model.state_dict(), or a dict that holds it under 'state_dict' or 'model'",
        )
    return tensors
