"""Statistics of the digits zoo's experts, for the operators that merge by them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from map_bo.errors import CheckpointError, DataError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.operators.statistics.fisher_information import fisher
from map_bo.operators.statistics.input_products import grams
from map_bo.operators.statistics.merged_inputs import merged_grams
from map_bo.operators.statistics.statistics import Statistics, cached_statistics
from map_bo.problems.cache import CACHE_VARIABLE
from map_bo.problems.zoo.data import digits_split, transform
from map_bo.problems.zoo.training import as_inputs, network
from map_bo.rng import make_generator

__all__ = ["EXAMPLES", "digits_statistics"]

EXAMPLES = 300
"""Training images behind the statistics of each expert."""


def digits_statistics(
    arch: str, experts: Mapping[str, Path], kind: str, folder: Path, *, base: Path
) -> dict[str, Path]:
    """Return the files with the statistics of the experts, computed on their training images.

    Missing ones are computed first: some tenths of a second each. The name of a file holds the
    digest of the expert's weights (for statistics in the merged model, of base and all experts), so
    those of an expert that was trained anew are not mistaken.

    Args:
        arch: Architecture of the zoo.
        experts: Task -> trained expert.
        kind: ``"fisher"`` (the expectation over the expert's own predictions), ``"grams"``, or
            ``"merged_grams"`` (of the merge with equal coefficients that sum to 1).
        folder: Where they are kept.
        base: The base of the experts.

    Raises:
        DataError: When the folder cannot be written.
    """
    files: dict[str, Path] = {}
    together: dict[str, Statistics] = {}  # which are made of all experts at once
    everything = [open_checkpoint(path).digest() for path in (base, *experts.values())]
    for name, path in experts.items():
        expert = open_checkpoint(path)
        digest = expert.digest()
        if kind == "merged_grams":
            digest = hashlib.sha256(" ".join([*everything, *experts]).encode()).hexdigest()
        file = folder / f"{name}-{kind}-{EXAMPLES}-{digest[:12]}.safetensors"

        def make(name: str = name, expert: Checkpoint = expert) -> Statistics:
            if kind != "merged_grams":
                return _compute(arch, name, expert, kind)
            if not together:
                together.update(_compute_merged(arch, base, experts))
            return together[name]

        try:
            cached_statistics(file, make, kind=kind, model=expert)
        except CheckpointError as error:
            raise DataError(
                f"statistics of the experts cannot be kept in {folder}: {error.message}",
                hint=f"set {CACHE_VARIABLE} to a folder that can be written",
            ) from error
        files[name] = file
    return files


def _compute(arch: str, name: str, expert: Checkpoint, kind: str) -> Statistics:
    model = network(arch, generator=make_generator(0))
    model.load_state_dict({key: expert.load(key) for key in expert.names})
    data = f"{name}: {EXAMPLES} training images"
    compute = fisher if kind == "fisher" else grams
    return compute(model, _batches(name), data=data, of=expert)


def _compute_merged(arch: str, base: Path, experts: Mapping[str, Path]) -> dict[str, Statistics]:
    model = network(arch, generator=make_generator(0))
    batches = {name: _batches(name) for name in experts}
    data = f"{EXAMPLES} training images of each task"
    return merged_grams(model, base, experts, batches, data=data)


def _batches(name: str) -> list[tuple[Tensor, Tensor]]:
    images, targets, _, _ = digits_split()
    inputs = as_inputs(transform(name, images[:EXAMPLES]))
    return [(inputs, torch.from_numpy(targets[:EXAMPLES]))]
