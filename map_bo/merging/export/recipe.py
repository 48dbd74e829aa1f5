"""The recipe beside merged weights: every input with its digest, and what was done."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from map_bo.errors import MergeError, first_line
from map_bo.foreign import read_yaml
from map_bo.merging.checkpoints.checkpoint import Checkpoint

__all__ = ["RECIPE", "plain", "read_recipe", "recipe_text"]

RECIPE = "recipe.yaml"
_FORMAT = 2  # in format 1 operators had names in place of classes


def plain(value: object, where: str = "record") -> Any:
    """Return a value as plain data (dict, list, str, int, float, bool, None) for YAML or JSON.

    Paths become strings, tensors and arrays lists, and numbers of numpy and torch Python numbers.

    Raises:
        MergeError: For anything that is not data, naming where it stands.
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
        changes = checkpoint.vocabulary_changes
        told = {"fitting": plain(changes)} if changes else {}
        return {"source": checkpoint.source, "sha256": checkpoint.digest(), **told}

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
    file = Path(os.path.expanduser(path))  # unlike pathlib's, no error for any name
    file = file / RECIPE if os.path.isdir(file) else file
    try:
        content = read_yaml(file)
    except OSError as error:
        raise MergeError(
            f"{file} cannot be read: {error.strerror}",
            hint="give the folder of a merged model, or its recipe.yaml",
        ) from error
    except ValueError as error:
        raise MergeError(
            f"{file} is not YAML: {first_line(error)}",
            hint="recipes are written by map_bo beside each merged model",
        ) from error
    if not isinstance(content, dict) or content.get("recipe") not in (1, _FORMAT):
        raise MergeError(
            f"{file} is not a recipe of format 1 or {_FORMAT}",
            hint="recipes are written by map_bo beside each merged model",
        )
    return content
