"""Features of texts: an encoder's last hidden states, pooled to one vector per text.

``mean`` averages over the tokens, ``cls`` takes the first, ``last`` the last one. Sentence encoders
are trained for one of them, which their folder says (Reimers and Gurevych 2019, section 3).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.evaluators.evaluator import evaluating
from map_bo.evaluators.text.tokens import Tokens
from map_bo.merging.checkpoints.checkpoint import read_object

__all__ = ["Pooling", "check_pooling", "encoder_of", "features", "pool", "pooling_of_folder"]

Pooling = Literal["mean", "cls", "last"]
"""How hidden states become one vector."""

_KEYS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@runtime_checkable
class _HasHiddenState(Protocol):
    last_hidden_state: Tensor


def check_pooling(pooling: str | None) -> Pooling | None:
    """Return a way of pooling, or None where the model's folder is to say it.

    Raises:
        ConfigError: When there is no such way.
    """
    for known in get_args(Pooling):
        if pooling == known:
            found: Pooling = known
            return found
    if pooling is None:
        return None
    raise ConfigError(
        f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}",
        hint=did_you_mean(pooling, get_args(Pooling)),
    )


def pooling_of_folder(folder: object) -> Pooling:
    """Return the pooling that a folder of sentence-transformers says; else ``mean``.

    Args:
        folder: The folder; anything that is none says nothing.

    Raises:
        EvaluationError: When it says one that is not known here.
    """
    if not isinstance(folder, str | Path):
        return "mean"
    file = Path(folder).expanduser() / "1_Pooling" / "config.json"
    said = read_object(file) if file.is_file() else None
    if said is None:
        return "mean"
    on = [key for key, value in said.items() if key.startswith("pooling_mode") and value is True]
    named = said.get("pooling_mode")
    modes = [_KEYS[key] for key in on if key in _KEYS]
    modes += [mode for name, mode in _NAMES.items() if named == name]
    for known in get_args(Pooling):
        if modes == [known] and len(on) <= 1:
            found: Pooling = known
            return found
    raise EvaluationError(
        f"{file} says {', '.join(on) or named}, which is not one of {', '.join(get_args(Pooling))}",
        hint="say how to pool: pooling='mean'",
    )


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the part of a model whose hidden states are pooled.

    Of a model of transformers it is the one without a head, and its encoder where it has a decoder
    too; any other module is used as it is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return model
    inner: nn.Module = model.base_model
    if model.config.is_encoder_decoder and isinstance(inner, PreTrainedModel):
        encoder: nn.Module = inner.get_encoder()
        return encoder
    return inner


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per text, ``b x width``, float32.

    Args:
        hidden: ``b x tokens x width`` hidden states.
        mask: ``b x tokens``, 1 where there is a token; texts stand on the left.
        pooling: How.
    """
    hidden = hidden.float()
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def features(model: nn.Module, tokens: Tokens, items: Tensor, pooling: Pooling) -> Tensor:
    """Return the features of one batch of texts, ``b x width``, float32, on the model's device.

    Args:
        model: The model, in evaluation mode; without gradients if none are wanted.
        tokens: All texts.
        items: ``b`` indices of texts.
        pooling: How hidden states are pooled; a model that returns ``b x width`` pools by itself.

    Raises:
        EvaluationError: When the model returns no hidden states.
    """
    encoder = encoder_of(model)
    batch = tokens.batch(items, encoder)
    if _is_sentence_model(encoder):
        pooled: Tensor = encoder(dict(batch))["sentence_embedding"]
        return pooled.float()
    output = encoder(**batch)
    hidden = output.last_hidden_state if isinstance(output, _HasHiddenState) else output
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        return pool(hidden, batch["attention_mask"], pooling)
    if isinstance(hidden, Tensor) and hidden.dim() == 2:
        return hidden.float()
    what = f"a tensor of shape {list(hidden.shape)}" if isinstance(hidden, Tensor) else ""
    raise EvaluationError(
        f"{type(encoder).__name__} returned {what or f'a {type(output).__name__}'}, which is "
        "neither hidden states nor one vector per text",
        hint="give an encoder such as one of AutoModel",
    )


def _is_sentence_model(model: nn.Module) -> bool:
    """Return whether a module is one of sentence-transformers, which pools by itself."""
    library: Any = sys.modules.get("sentence_transformers")  # a model of it has loaded it
    return library is not None and isinstance(model, library.SentenceTransformer)


def all_features(model: nn.Module, tokens: Tokens, pooling: Pooling, batch_size: int) -> Tensor:
    """Return the features of all texts, ``n x width``, float32, on the CPU.

    Args:
        model: The model; its mode is put back.
        tokens: All texts; those of like lengths make a batch.
        pooling: How hidden states are pooled.
        batch_size: Texts per forward pass.
    """
    order = tokens.lengths.argsort(descending=True, stable=True)
    with evaluating(model), torch.inference_mode():
        parts = [
            features(model, tokens, items, pooling).cpu()
            for items in torch.split(order, batch_size)
        ]
        found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, order, found).clone()
