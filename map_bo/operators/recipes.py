"""Merging once more what a recipe says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from map_bo.errors import MergeError
from map_bo.merging.adapter_checkpoint import open_expert
from map_bo.merging.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.digests import digest_all
from map_bo.merging.merge_checkpoints import merge_checkpoints
from map_bo.merging.operator import MergeOperator
from map_bo.merging.recipe import read_recipe

__all__ = ["merge_again", "operator_of"]

_HOME = {
    "task_arithmetic": ("map_bo.merging.task_arithmetic", "TaskArithmetic"),
    "weighted_average": ("map_bo.operators.averages", "WeightedAverage"),
    "slerp": ("map_bo.operators.averages", "Slerp"),
    "magnitude": ("map_bo.operators.sparse", "Magnitude"),
    "ties": ("map_bo.operators.sparse", "Ties"),
    "dare": ("map_bo.operators.sparse", "Dare"),
    "della": ("map_bo.operators.sparse", "Della"),
    "breadcrumbs": ("map_bo.operators.sparse", "Breadcrumbs"),
    "consensus": ("map_bo.operators.consensus", "Consensus"),
}


def operator_of(description: Mapping[str, Any]) -> MergeOperator:
    """Return the operator of a recipe or of a run's record; see `MergeOperator.describe`.

    Raises:
        MergeError: When it is unknown, or is not known by its settings alone.
    """
    name = str(description.get("name"))
    if name not in _HOME:
        raise MergeError(
            f"the operator {name!r} is not known by its settings alone",
            hint=f"known are {', '.join(_HOME)}; make another one in Python and call "
            "map_bo.merge_checkpoints",
        )
    module, kind = _HOME[name]
    settings = {key: value for key, value in description.items() if key != "name"}
    target = getattr(import_module(module), kind)
    unknown = sorted(set(settings) - {field.name for field in fields(target)})
    if unknown:
        raise MergeError(
            f"the operator {name} has no settings {', '.join(unknown)}",
            hint="the recipe is of a newer version of map_bo",
        )
    made: MergeOperator = target(**settings)
    return made


def merge_again(
    recipe: str | Path,
    out: str | Path,
    *,
    max_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    progress: bool = True,
) -> Path:
    """Merge what a recipe says, from the same inputs; see `merge_checkpoints`.

    Args:
        recipe: A ``recipe.yaml``, or the folder of a merged model.
        out: Folder to create.
        max_memory: See `merge_checkpoints`.
        shard_size: See `merge_checkpoints`.
        progress: Show a progress bar.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When an input has other weights than the recipe says, or the recipe cannot be
            followed.
    """
    content = read_recipe(recipe)
    try:
        base_of, experts_of = content["base"], content["experts"]
        operator = operator_of(content["operator"])
        coefficients = {str(k): float(v) for k, v in content["coefficients"].items()}
        base = open_checkpoint(base_of["source"])
        experts = {name: open_expert(part["source"], base) for name, part in experts_of.items()}
        wanted = [base_of["sha256"], *(part["sha256"] for part in experts_of.values())]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MergeError(
            f"the recipe {recipe} is incomplete: {error}",
            hint="recipes are written by map_bo beside each merged model",
        ) from error
    if content["merged"].get("recalibrated"):
        raise MergeError(
            "the statistics of this model's batch normalisation were measured anew, which a "
            "recipe cannot repeat",
            hint="merge from the run that it came from",
        )
    inputs: list[Checkpoint] = [base, *experts.values()]
    digest_all(inputs)
    for checkpoint, digest in zip(inputs, wanted, strict=True):
        if checkpoint.digest() != digest:
            raise MergeError(
                f"{checkpoint.source} has other weights than when the recipe was written",
                hint="fetch the weights whose sha256 the recipe names",
            )
    return merge_checkpoints(
        base,
        experts,
        coefficients,
        out,
        operator=operator,
        max_memory=max_memory,
        shard_size=shard_size,
        check_base=False,  # it was checked, or waived, when the recipe was made
        record=content.get("record"),
        progress=progress,
    )
