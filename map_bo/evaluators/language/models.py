"""What evaluators of language models share: how much a model reads, and how texts begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from map_bo.errors import EvaluationError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "causal",
    "longest_input",
    "pad_id",
    "plain_ids",
    "pretrained",
    "starts_with_bos",
]

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def pretrained(model: nn.Module, *, by: str) -> PreTrainedModel:
    """Return the model, where it is one of transformers.

    Args:
        model: The model.
        by: What needs it, to begin the message with.

    Raises:
        EvaluationError: When it is not.
        MissingDependencyError: Without transformers.
    """
    require("transformers", by=by, extra="huggingface")
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise EvaluationError(
            f"{by} needs a model of transformers, got a {type(model).__name__}",
            hint="give one of AutoModelForCausalLM",
        )
    return model


def causal(model: nn.Module, *, by: str) -> PreTrainedModel:
    """Return the model, where it is a causal language model of transformers.

    Raises:
        EvaluationError: When it is not.
        MissingDependencyError: Without transformers.
    """
    network = pretrained(model, by=by)
    if network.config.is_encoder_decoder or not network.can_generate():
        kind = type(network).__name__
        raise EvaluationError(
            f"{by} needs a causal language model, and {kind} is not one",
            hint="give one of AutoModelForCausalLM; models with an encoder are for the kind "
            "generation",
        )
    return network


def longest_input(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read at once; None where it does not say."""
    settings: dict[str, Any] = model.config.get_text_config(decoder=True).to_dict()
    if "relative_attention_num_buckets" in settings:
        return None  # T5 and its kin read texts of any length
    lengths = [settings[name] for name in _LENGTHS if isinstance(settings.get(name), int)]
    return lengths[0] if lengths and lengths[0] > 0 else None


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without any that the tokenizer adds."""
    found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer itself begins texts with a token for the beginning."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with; it is masked, so that any will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
