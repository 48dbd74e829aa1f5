"""The architecture of a checkpoint, where its folder says it: a class of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from map_bo.errors import CheckpointError, ConfigError, MissingDependencyError, first_line
from map_bo.merging.align.conform import conformed_of, is_constant, names_in_model
from map_bo.merging.checkpoints.checkpoint import Checkpoint, read_object
from map_bo.merging.checkpoints.saved_names import saved_as, state_tensors
from map_bo.merging.vectors.live import model_ties

__all__ = ["require_configuration", "transformers_model"]

_HINT = "give problem.model=module:function returning the architecture"


def transformers_model(
    base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Callable[[], nn.Module]:
    """Return what makes the model that a Hugging Face directory is of; weights do not matter.

    Tried are, in this order, and the first whose tensors base and experts have is taken:

    - where experts have task heads: the class that they name in ``config.json``, with the
      configuration of the first of them;
    - the class that the base names;
    - what ``AutoModel`` makes of the base's configuration: the model without a head.

    Code of the checkpoint itself (``auto_map``) is not run.

    Args:
        base: The base.
        experts: Name -> checkpoint, aligned with the base.

    Raises:
        ConfigError: When the base has no ``config.json``.
    """
    folder = require_configuration(base.directory, base.source)

    def build() -> nn.Module:
        try:
            import transformers
        except ImportError as error:
            raise MissingDependencyError(
                "a Hugging Face directory needs transformers",
                hint='pip install "map-bo[huggingface]"',
            ) from error
        heads = {name for e in experts.values() if (c := conformed_of(e)) for name in c.heads}
        candidates = list(_candidates(transformers, folder, base, experts))
        for make in candidates[:-1]:
            model = make()
            if _fits(model, base, heads):
                return model
        return candidates[-1]()

    return build


def require_configuration(folder: Path | None, source: str) -> Path:
    """Return a folder whose ``config.json`` tells what model it is of.

    Args:
        folder: The folder, or None for a checkpoint without one.
        source: What to call it.

    Raises:
        ConfigError: When there is no ``config.json``.
        CheckpointError: When it does not say what the model is.
    """
    if folder is None or not (folder / "config.json").is_file():
        raise ConfigError(
            f"problem.model is not given and {source} has no config.json to tell it by",
            hint=_HINT,
        )
    known = read_object(folder / "config.json")
    if known is None or not {"architectures", "model_type"} & known.keys():
        lacking = "not a JSON object" if known is None else "without architectures and model_type"
        raise CheckpointError(
            f"{folder / 'config.json'} does not name an architecture: it is {lacking}",
            hint=_HINT,
        )
    return folder


def _candidates(
    transformers: Any, folder: Path, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Iterator[Callable[[], nn.Module]]:
    """Yield what makes the models that may be meant; the last is made in any case."""
    with_head = [c for e in experts.values() if (c := conformed_of(e)) and c.heads and c.directory]
    for expert in with_head[:1]:
        assert expert.directory is not None
        for name in _named(expert):
            if (kind := _model_class(transformers, name)) is not None:
                yield _maker(kind, _read(transformers, expert.directory))
    config = _read(transformers, folder)
    named = _named(base)
    for name in named:
        kind = _model_class(transformers, name)
        if kind is not None:
            yield _maker(kind, config)
        else:
            raise CheckpointError(
                f"transformers has no architecture {name!r}, which {folder / 'config.json'} names",
                hint="upgrade transformers, or give problem.model=module:function",
            )
    if _has_class(transformers, config):
        yield lambda: transformers.AutoModel.from_config(config)


def _model_class(transformers: Any, name: str) -> Any:
    """Return the model class of a name in a file, which must not lead to anything else there."""
    kind = getattr(transformers, name, None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model else None


def _has_class(transformers: Any, config: Any) -> bool:
    return type(config) in transformers.MODEL_MAPPING


def _maker(kind: Any, config: Any) -> Callable[[], nn.Module]:
    return lambda: kind(config)


def _named(checkpoint: Checkpoint) -> list[str]:
    names = (checkpoint.configuration or {}).get("architectures")
    found = [str(name) for name in names] if isinstance(names, list) else []
    return [name for name in found if re.fullmatch(r"[A-Za-z]\w*", name)]


def _read(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(
            f"transformers cannot read {folder / 'config.json'}: {first_line(error)}",
            hint=f"upgrade transformers; where the model has code of its own, {_HINT}",
        ) from error


def _fits(model: nn.Module, base: Checkpoint, heads: set[str]) -> bool:
    """Return whether base and heads have all parameters of a model."""
    state, ties = state_tensors(model), model_ties(model)
    tensors = {name: part.of(state[part.name]) for name, part in saved_as(model).items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    there = set(names_in_model(shapes, base, shapes).names.values()) | heads
    there |= {kept for alias, kept in ties.items() if alias in there}
    return all(
        ties.get(name, name) in there or is_constant(name, tensor.shape)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    )
