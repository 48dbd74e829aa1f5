"""What is written beside merged weights: how they came about, for people and for mergekit."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.layout import is_variance

__all__ = [
    "RECIPE",
    "Weights",
    "filters_for",
    "mergekit_text",
    "plain",
    "read_recipe",
    "recipe_text",
]

RECIPE = "recipe.yaml"
_FORMAT = 1

Weights = Callable[[str], Mapping[str, float]]
"""Tensor name -> weight of each expert's task vector for that tensor."""


def plain(value: object, where: str = "record") -> Any:
    """Return a value as plain data (dict, list, str, int, float, bool, None) for YAML or JSON.

    Paths become strings, tensors and arrays lists, and numbers of numpy and torch Python numbers.

    Raises:
        MergeError: For anything that is no data, naming where it stands.
    """
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (numpy.float64, enums of str or int) are not plain to YAML.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (Sequence, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(items)]
    if isinstance(value, Path):
        return str(value)
    raise MergeError(
        f"{where} is a {type(value).__name__}, which a recipe cannot hold",
        hint="give plain data: numbers, text, lists and dicts",
    )


def _dump(data: object) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return text


def _own_version() -> str:
    try:
        return metadata.version("map-bo")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def recipe_text(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    merged: Mapping[str, Any],
    record: Mapping[str, Any],
) -> str:
    """Return the text of ``recipe.yaml``: every input with its digest, and what was done."""

    def origin(checkpoint: Checkpoint) -> dict[str, Any]:
        fitting = {"fitting": plain(checkpoint.fitting)} if checkpoint.fitting else {}
        return {"source": checkpoint.source, "sha256": checkpoint.digest(), **fitting}

    content = {
        "recipe": _FORMAT,
        "base": origin(base),
        "experts": {name: origin(expert) for name, expert in experts.items()},
        "operator": plain(operator, "operator"),
        "coefficients": plain(coefficients, "coefficients"),
        "merged": plain(merged, "merged"),
        "versions": {
            "map_bo": _own_version(),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "record": plain(record),
    }
    return "# How this model was merged; each sha256 is over names, shapes and values.\n" + _dump(
        content
    )


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the recipe of a merged model.

    Args:
        path: The folder of the merged model, or its ``recipe.yaml``.

    Raises:
        MergeError: When there is no recipe, or the file is none.
    """
    file = Path(path).expanduser()
    file = file / RECIPE if file.is_dir() else file
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MergeError(
            f"{file} cannot be read: {error.strerror}",
            hint="give the folder of a merged model, or its recipe.yaml",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(
            f"{file} is not YAML: {str(error).splitlines()[0]}",
            hint="recipes are written by map_bo beside each merged model",
        ) from error
    if not isinstance(content, dict) or content.get("recipe") != _FORMAT:
        raise MergeError(
            f"{file} is not a recipe of format {_FORMAT}",
            hint="recipes are written by map_bo beside each merged model",
        )
    return content


class _NotExpressible(Exception):
    """Why a merge cannot be written as a mergekit configuration."""


def mergekit_text(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
    recalibrated: bool = False,
) -> str:
    """Return the text of ``mergekit.yaml``: the same merge as a mergekit configuration.

    mergekit's ``task_arithmetic`` computes ``base + lambda * sum_n w_n (expert_n - base)``,
    divided by the sum of the weights unless ``normalize`` is false. It works in ``dtype``, so
    that is float32 (float64 for float64 weights) and the base's dtype goes to ``out_dtype``.

    Weights that differ between tensors are written with mergekit's filters. A filter there is a
    substring of a tensor's name and the first match counts, so a filter per tensor, longest name
    first, expresses any assignment; shorter filters are used where they give the same. What
    mergekit leaves out, keeping variances and recalibration (``recalibrated``), is a comment.

    Where mergekit cannot express the merge, the text is a comment that says why.
    """
    try:
        content = _mergekit(base, experts, operator, coefficients, weights)
    except _NotExpressible as reason:
        return f"# No mergekit configuration gives this merge: {reason}.\n"
    head = "# The same merge for mergekit: mergekit-yaml mergekit.yaml OUT\n"
    if recalibrated:
        head += "# mergekit does not measure the statistics of batch normalisation anew.\n"
    elif any(is_variance(name) for name in base.names):
        head += "# mergekit does not keep running variances above the least of the models.\n"
    return head + _dump(content)


def _mergekit(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> dict[str, Any]:
    weight_of = _settings(base, experts, operator, coefficients, weights)
    checkpoints = {"the base": base, **{f"expert {name!r}": e for name, e in experts.items()}}
    for label, checkpoint in checkpoints.items():
        if checkpoint.directory is None:
            raise _NotExpressible(f"{label} is not a Hugging Face directory")
        if checkpoint.fitting:
            raise _NotExpressible(f"{label} was fitted to the base's vocabulary")
    folders = [checkpoint.directory for checkpoint in checkpoints.values()]
    if len(set(folders)) < len(folders):
        raise _NotExpressible(
            "two of the models are the same directory, and mergekit takes one once"
        )
    floats = Counter(base.dtype(name) for name in base.names if base.dtype(name).is_floating_point)
    if len(floats) > 1:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in floats))
        raise _NotExpressible(f"the base mixes dtypes ({kinds}), and mergekit writes one")
    dtype = next(iter(floats), torch.float32)
    return {
        "merge_method": "task_arithmetic",
        "base_model": _reference(base),
        "models": [
            {"model": _reference(expert), "parameters": {"weight": weight_of[name]}}
            for name, expert in experts.items()
        ],
        "parameters": {"normalize": False, "lambda": 1.0},
        "dtype": "float64" if dtype == torch.float64 else "float32",
        "out_dtype": str(dtype).removeprefix("torch."),
    }


def _reference(checkpoint: Checkpoint) -> Any:
    path = str(checkpoint.directory)
    # mergekit reads "a+b" as model and adapter, and "a@b" as model and revision.
    return {"model": {"path": path}} if re.search(r"[+@]", path) else path


def _settings(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> dict[str, Any]:
    """Return mergekit's weight setting of every expert: a number, or a list with filters."""
    if weights is None:
        name = str(operator.get("name", operator.get("kind", ""))).lower()
        if not re.fullmatch(r"task[ _-]?arithmetic", name):
            raise _NotExpressible(f"the operator {name or 'without a name'} is not task arithmetic")
        if set(coefficients) != set(experts):
            raise _NotExpressible("the coefficients are not one for each expert")
        return {expert: float(coefficients[expert]) for expert in experts}
    names = [name for name in base.names if base.dtype(name).is_floating_point]
    by_tensor = {name: weights(base.ties.get(name, name)) for name in names}
    settings: dict[str, Any] = {}
    for expert in experts:
        wanted = {name: float(by_tensor[name].get(expert, 0.0)) for name in names}
        if len(set(wanted.values())) <= 1:
            settings[expert] = next(iter(wanted.values()), 0.0)
        else:
            settings[expert] = [
                {"filter": text, "value": value} for text, value in filters_for(wanted)
            ]
    return settings


def filters_for(wanted: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return filters, the first match counting, that give every tensor its wanted weight.

    A dotted prefix such as ``transformer.h.1.`` stands for all its tensors where they agree;
    the full name stands where they do not.
    """
    uniform: dict[str, bool] = {}
    chosen: dict[str, float] = {}
    for name, value in wanted.items():
        parts = name.split(".")
        for text in (".".join(parts[:k]) + "." for k in range(1, len(parts))):
            if text not in uniform:
                uniform[text] = len({v for other, v in wanted.items() if text in other}) == 1
            if uniform[text]:
                chosen[text] = value
                break
        else:
            chosen[name] = value
    short = _longest_first(chosen)
    if all(_first_match(short, name) == value for name, value in wanted.items()):
        return short
    return _longest_first(wanted)


def _longest_first(filters: Mapping[str, float]) -> list[tuple[str, float]]:
    # A text that contains another is longer, hence earlier: the shorter cannot shadow it.
    return sorted(filters.items(), key=lambda item: (-len(item[0]), item[0]))


def _first_match(filters: Sequence[tuple[str, float]], name: str) -> float:
    return next(value for text, value in filters if text in name)
