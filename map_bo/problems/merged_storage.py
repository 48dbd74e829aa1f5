"""Where a merged-model problem keeps its task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.storage import Storage
from map_bo.problems.zoo_cache import cache_root

__all__ = ["storage_of"]


def storage_of(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    *,
    device: torch.device,
    dtype: Any,
    max_memory: Any,
    cache_dir: Any,
) -> Storage:
    """Decide how task vectors are kept; see `Storage.of`.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        device: Where they live.
        dtype: A dtype, ``"auto"`` or None.
        max_memory: The cap, in bytes or as text, or None.
        cache_dir: Folder above that of mapped rows, or None for the user's cache; see
            `cache_root`. Given without a cap, rows are mapped.

    Raises:
        MergeError: When nothing fits, or a setting is not possible.
    """
    used = max_memory is not None or cache_dir is not None
    cache: Path | None = cache_root(cache_dir) / "rows" if used else None
    return Storage.of(base, experts, dtype=dtype, device=device, max_memory=max_memory, cache=cache)
