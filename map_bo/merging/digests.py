"""Digests of several checkpoints at once."""

from __future__ import annotations

from collections.abc import Sequence

from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.workers import spread

__all__ = ["digest_all"]


def digest_all(checkpoints: Sequence[Checkpoint]) -> None:
    """Compute the digests of checkpoints on all cores; each is then kept by its checkpoint.

    Raises:
        CheckpointError: When a file cannot be read.
    """

    def digest(checkpoint: Checkpoint, _: None) -> None:
        checkpoint.digest()

    spread(digest, checkpoints, lambda: None)
