"""Merging once more what a recipe says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError, MergeError, first_line
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.conform import align_experts
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.checkpoints.hub import hub_model
from map_bo.merging.export.draft import refuse_existing
from map_bo.merging.export.model import ExportSettings, digest_all, merge_checkpoints
from map_bo.merging.export.recipe import plain, read_recipe
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.statistics.known_statistics import NeedsStatistics
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.plain import from_name, from_plain, is_settings, name_of

__all__ = ["merge_again", "operator_of"]

_WRITTEN = "recipes are written by map_bo beside each merged model"


def operator_of(description: Mapping[str, Any], *, trust: Collection[str] = ()) -> MergeOperator:
    """Return the operator of a recipe; see `recipe_of`.

    Statistics are read from the files that the recipe names, and must be the same.

    Args:
        description: Plain data, also those of version 0.1.
        trust: Packages whose operators the recipe may name; see `map_bo.plain.from_plain`.

    Raises:
        SettingsError: When it is not known or not trusted, or a setting is unknown.
        MergeError: When a setting is not possible; when statistics were not in a file, or that
            file holds others now.
        CheckpointError: When a file of statistics cannot be read.
    """
    told = _of_today(description)
    settings = dict(told["fields"])
    if "statistics" in settings:
        name, parts = name_of(told), from_plain(settings["statistics"])
        settings["statistics"] = {e: _statistics_file(name, e, part) for e, part in parts.items()}
    made = from_plain({"class": told["class"], "fields": settings}, trust=trust)
    if not isinstance(made, MergeOperator):
        raise MergeError(f"{told['class']} is not a merge operator", hint=_WRITTEN)
    return made


def _of_today(description: Mapping[str, Any]) -> Mapping[str, Any]:
    told: Mapping[str, Any] = from_name(description)
    if is_settings(told):
        return told
    if "words" in told:
        from_plain(told)  # which says why it cannot be built
    raise MergeError(
        f"the operator {description.get('name')!r} is not known by its settings alone",
        hint="make it in Python and call map_bo.merge_checkpoints; recipes of today name the "
        "class, which --trust and the name of its package let them build",
    )


def _statistics_file(operator: str, expert: str, told: Mapping[str, Any]) -> str:
    if "source" not in told:
        raise MergeError(
            f"the statistics of {expert!r}, which {operator} merges by, were in no file",
            hint="keep them with `save_statistics`, and merge from the run or in Python",
        )
    known = load_statistics(told["source"])
    if known.content() != told["content"]:
        raise MergeError(
            f"{told['source']} holds other statistics than when the recipe was written",
            hint=f"fetch those of {expert!r} whose digest the recipe names",
        )
    return str(told["source"])


def merge_again(
    recipe: str | Path,
    out: str | Path,
    *,
    max_memory: int | str | None = None,
    shard_size: int | str = "5GB",
    progress: bool = True,
    trust: Collection[str] = (),
    code: bool = False,
) -> Path:
    """Merge what a recipe says, from the same inputs; see `merge_checkpoints`.

    Args:
        recipe: A ``recipe.yaml``, or the folder of a merged model.
        out: Folder to create.
        max_memory: See `merge_checkpoints`.
        shard_size: See `merge_checkpoints`.
        progress: Show a progress bar.
        trust: Packages whose operators the recipe may name; see `map_bo.plain.from_plain`.
        code: See `merge_checkpoints`.

    Returns:
        The absolute path of the folder.

    Raises:
        MergeError: When an input has other weights than the recipe says, or the recipe cannot be
            followed.
        SettingsError: When its operator is not known or not trusted.
        CheckpointError: When an input cannot be read.
    """
    # What would be refused in the end is refused before all inputs are read for their digests.
    refuse_existing(out)
    ExportSettings(max_memory, shard_size)
    content = read_recipe(recipe)
    try:
        merged = dict(content["merged"])
        _refuse_unrepeatable(merged)
        operator = operator_of(content["operator"], trust=trust)
        coefficients = {str(k): float(v) for k, v in content["coefficients"].items()}
        ties = {str(alias): str(kept) for alias, kept in merged.get("ties", {}).items()}
        base = open_checkpoint(_source(content["base"]))
        task = dict(content["base"].get("fitting", {})).get("task")
        experts = {
            str(name): _expert(str(name), part, base) for name, part in content["experts"].items()
        }
        wanted = [content["base"]["sha256"], *(p["sha256"] for p in content["experts"].values())]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise MergeError(
            f"the recipe {recipe} is incomplete or damaged: {said}", hint=_WRITTEN
        ) from error
    inputs: list[Checkpoint] = [base, *experts.values()]
    digest_all(inputs)
    for checkpoint, digest in zip(inputs, wanted, strict=True):
        if checkpoint.digest() != digest:
            raise MergeError(
                f"{checkpoint.source} has other weights than when the recipe was written",
                hint="fetch the weights whose sha256 the recipe names",
            )
    if isinstance(operator, NeedsStatistics):
        operator.check_experts(experts)
    return merge_checkpoints(
        base,
        experts,
        coefficients,
        out,
        operator=operator,
        max_memory=max_memory,
        shard_size=shard_size,
        code=code,
        ties=ties,
        task=task,
        check_base=False,  # it was checked, or waived, when the recipe was made
        record=content.get("record"),
        progress=progress,
    )


def _refuse_unrepeatable(merged: Mapping[str, Any]) -> None:
    if merged.get("recalibrated"):
        raise MergeError(
            "the statistics of this model's batch normalisation were measured anew, which a "
            "recipe cannot repeat",
            hint="merge from the run that it came from",
        )
    if merged.get("adapter"):
        raise MergeError(
            "this is the recipe of an adapter, and recipes are followed to whole models",
            hint="write the adapter from the run that it came from, with --lora-rank",
        )


def _source(part: Mapping[str, Any]) -> str:
    """Return where a checkpoint of the recipe is."""
    source = part["source"]
    if not isinstance(source, str):
        raise TypeError(f"a source is {source!r}")
    if Path(source).is_absolute():
        return source
    of_hub = f"hf://{source}"  # a folder of that name is something else
    try:
        hub_model(of_hub)
    except CheckpointError as error:
        raise MergeError(
            f"{source!r} was merged from memory, and a recipe can only open files",
            hint="save that model, and merge from its file",
        ) from error
    return of_hub


def _expert(name: str, part: Mapping[str, Any], base: Checkpoint) -> Checkpoint:
    expert = open_expert(_source(part), base)
    if "fitting" not in part:
        return expert
    told = part["fitting"]
    aligned = align_experts(
        {name: expert},
        base,
        vocabulary=told.get("vocabulary"),
        missing="base" if "missing" in told else "refuse",
        heads=told.get("modules", ()),
    )
    expert = aligned[name]
    if plain(expert.vocabulary_changes) != told:
        raise MergeError(
            f"expert {name!r} is fitted to the base in another way than when the recipe was "
            "written",
            hint="fetch the tokenizers of that time, and the weights; the recipe says what was "
            "kept",
        )
    return expert
