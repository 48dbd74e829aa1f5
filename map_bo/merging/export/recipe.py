"""What is written beside merged weights: how they came about, for people and for mergekit."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.layout import is_variance
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.export.mergekit_config import NotExpressible as _NotExpressible
from map_bo.merging.export.mergekit_config import Weights, expressed

__all__ = [
    "RECIPE",
    "Weights",
    "mergekit_text",
    "plain",
    "read_recipe",
    "recipe_text",
]

RECIPE = "recipe.yaml"
_FORMAT = 2  # in format 1 operators had names in place of classes


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
    if not isinstance(content, dict) or content.get("recipe") not in (1, _FORMAT):
        raise MergeError(
            f"{file} is not a recipe of format 1 or {_FORMAT}",
            hint="recipes are written by map_bo beside each merged model",
        )
    return content


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

    mergekit works in ``dtype``, so that is float32 (float64 for float64 weights) and the base's
    dtype goes to ``out_dtype``. Where its definition can give another number the text has a
    comment.

    Weights that differ between tensors are written with mergekit's filters. A filter there is a
    substring of a tensor's name and the first match counts, so a filter per tensor, longest name
    first, expresses any assignment; shorter filters are used where they give the same. What
    mergekit leaves out, keeping variances and recalibration (``recalibrated``), is a comment.

    Where mergekit cannot express the merge, the text is a comment that says why.
    """
    try:
        content, notes = _mergekit(base, experts, operator, coefficients, weights)
    except _NotExpressible as reason:
        return f"# No mergekit configuration gives this merge: {reason}.\n"
    head = "# The same merge for mergekit: mergekit-yaml mergekit.yaml OUT\n"
    if recalibrated:
        head += "# mergekit does not measure the statistics of batch normalisation anew.\n"
    elif any(is_variance(name) for name in base.names):
        head += "# mergekit does not keep running variances above the least of the models.\n"
    head += "".join(f"# {note}\n" for note in notes)
    return head + _dump(content)


def _mergekit(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    config = expressed(base, experts, operator, coefficients, weights)
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
    content = {
        "merge_method": config.method,
        **({} if config.base is None else {"base_model": _reference(config.base)}),
        "models": [
            {"model": _reference(model), **({"parameters": dict(own)} if own else {})}
            for model, own in config.models
        ],
        "parameters": dict(config.parameters),
        "dtype": "float64" if dtype == torch.float64 else "float32",
        "out_dtype": str(dtype).removeprefix("torch."),
    }
    return content, config.notes


def _reference(checkpoint: Checkpoint) -> Any:
    path = str(checkpoint.directory)
    # mergekit reads "a+b" as model and adapter, and "a@b" as model and revision.
    return {"model": {"path": path}} if re.search(r"[+@]", path) else path
