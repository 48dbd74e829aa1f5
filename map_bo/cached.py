"""Files of tensors kept for later runs: where they are, complete or not there at all."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = ["CACHE_VARIABLE", "cache_root", "digest_of", "kept", "read_tensors", "write_tensors"]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MAP_BO_CACHE"


def cache_root(given: str | Path | None = None) -> Path:
    """Return the folder under which what is computed once is kept.

    Args:
        given: The folder itself; otherwise the environment variable ``MAP_BO_CACHE``, and
            otherwise the user's cache directory of this system.
    """
    chosen = given or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("map_bo"))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file, or None when it is missing, truncated or altered."""
    try:
        with safe_open(str(path), framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if digest == digest_of(tensors) else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file in one step: it is there complete, or not at all."""
    content = save(dict(tensors), metadata={"digest": digest_of(tensors)})
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a file; make them, and keep them there, where there are none.

    Where the folder cannot be written, they are not kept, and a warning says so.
    """
    found = read_tensors(path)
    if found is not None:
        return found
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, made)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), and what was computed will be computed again; set %s to a "
            "folder that can be written",
            path.parent,
            error.strerror or error,
            CACHE_VARIABLE,
        )
    return made


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors of any dtype: names, dtypes, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
