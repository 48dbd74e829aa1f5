"""The model that a folder of weights belongs to, without its weights: for its names alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.saved_names import ModuleTensors

__all__ = ["module_tensors", "says_tied", "skeleton"]

# What a configuration file may have, and how many numbers of a configuration are looked through.
_LARGEST = 1 << 22
_REPEATS = ("layer", "depth", "block", "stage", "expert", "num_hidden")


def skeleton(checkpoint: Checkpoint) -> nn.Module | None:
    """Build the model of a Hugging Face directory on the meta device, by its ``config.json``.

    Only classes of the installed transformers are built, never code of the folder. It takes no
    memory for weights, and the names of its modules are those that adapters go by.

    Returns:
        The model; None where the folder has no configuration, transformers is not installed or
        does not know the model, or the configuration does not fit the number of tensors.
    """
    config = _read_config(checkpoint)
    if config is None or not isinstance(config.get("model_type"), str):
        return None
    most = len(checkpoint.names)
    if any(count > max(most, 256) for count in _repeats(config)):
        return None  # a model of more layers than tensors would take for ever to build
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
            model = _class_of(transformers, config)(settings)
    # Whatever a foreign configuration makes transformers raise: its names stay unknown.
    except Exception:
        return None
    if not isinstance(model, nn.Module):
        return None
    _note_conversions(model, checkpoint)
    return model


def module_tensors(checkpoint: Checkpoint, model: nn.Module | None = None) -> ModuleTensors | None:
    """Return the tensors of the modules that a checkpoint's tensors make up.

    Args:
        checkpoint: The checkpoint.
        model: The model, where it is known; its weights do not matter. By default `skeleton`.

    Returns:
        None where the model is unknown or not of this checkpoint.
    """
    model = skeleton(checkpoint) if model is None else model
    return None if model is None else ModuleTensors.of(model, checkpoint.names)


def says_tied(checkpoint: Checkpoint) -> bool:
    """Return whether the configuration beside a checkpoint ties embedding and output layer."""
    config = _read_config(checkpoint) or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _read_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.directory is None:
        return None
    file = checkpoint.directory / "config.json"
    try:
        if file.stat().st_size > _LARGEST:
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _repeats(config: object) -> Iterator[int]:
    """Yield the numbers in a configuration that say how often something is repeated."""
    pending: list[object] = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, Mapping):
            for key, value in part.items():
                if isinstance(value, (Mapping, list)):
                    pending.append(value)
                elif isinstance(value, int) and any(word in str(key) for word in _REPEATS):
                    yield value
        elif isinstance(part, list):
            pending += part


def _class_of(library: Any, config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that the configuration names, by default the bare model."""
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        kind = vars(library).get(name) if isinstance(name, str) else None
        if kind is None and isinstance(name, str) and name in dir(library):
            kind = library.__getattr__(name)  # transformers imports its classes when asked
        if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel):
            return kind
    return library.AutoModel.from_config


def _note_conversions(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Let the model know by which of transformers' conversions these files were read.

    ``from_pretrained`` notes those that it used, and saving reverts them. So a folder of an older
    layout has its own names, not those that a new file would have.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # before version 5 files and modules had the same names
        return
    known: Any = model
    try:
        conversions = get_model_conversion_mapping(known)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        prefix, state = known.base_model_prefix, known.state_dict()
        for name in checkpoint.names:
            rename_source_key(name, renamings, converters, prefix, state)
        used = [each for each in conversions if each.was_used()]
    except Exception:
        return
    known._weight_conversions = used
