"""Statistics of the digits zoo's experts, for the operators that merge by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from map_bo.errors import CheckpointError, DataError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.operators.statistics.fisher_information import fisher
from map_bo.operators.statistics.input_products import grams
from map_bo.operators.statistics.statistics import Statistics, cached_statistics
from map_bo.problems.cache import CACHE_VARIABLE
from map_bo.problems.zoo.data import digits_split, transform
from map_bo.problems.zoo.training import as_inputs, network
from map_bo.rng import make_generator

__all__ = ["EXAMPLES", "digits_statistics"]

EXAMPLES = 300
"""Training images behind the statistics of each expert."""


def digits_statistics(
    arch: str, experts: Mapping[str, Path], kind: str, folder: Path
) -> dict[str, Path]:
    """Return the files with the statistics of the experts, computed on their training images.

    Missing ones are computed first: some tenths of a second each. The name of a file holds the
    digest of the expert's weights, so those of an expert that was trained anew are not mistaken.

    Args:
        arch: Architecture of the zoo.
        experts: Task -> trained expert.
        kind: ``"fisher"`` (the expectation over the expert's own predictions) or ``"grams"``.
        folder: Where they are kept.

    Raises:
        DataError: When the folder cannot be written.
    """
    files: dict[str, Path] = {}
    for name, path in experts.items():
        expert = open_checkpoint(path)
        file = folder / f"{name}-{kind}-{EXAMPLES}-{expert.digest()[:12]}.safetensors"

        def make(name: str = name, expert: Checkpoint = expert) -> Statistics:
            return _compute(arch, name, expert, kind)

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
    images, targets, _, _ = digits_split()
    inputs = as_inputs(transform(name, images[:EXAMPLES]))
    batches = [(inputs, torch.from_numpy(targets[:EXAMPLES]))]
    data = f"{name}: {EXAMPLES} training images"
    compute = fisher if kind == "fisher" else grams
    return compute(model, batches, data=data, of=expert)
