"""What evaluators of language models share: the tokenizer, and whether it and the model fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from map_bo.errors import EvaluationError, first_line, require
from map_bo.evaluators.isolation.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_vocabulary",
    "load_tokenizer",
    "longest_input",
    "pad_id",
    "plain_ids",
    "pretrained",
    "starts_with_bos",
]

_FULLEST, _PADDING = 0.75, 2400  # least share of rows in use, and most rows that pad any model
_SAME = 0.9  # share of tokens that another version of a model's tokenizer keeps
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
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


def load_tokenizer(given: object, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Return a tokenizer: the one that was given, of a folder or the hub, or the model's own.

    Args:
        given: A tokenizer, the folder or hub id of one, or None for the folder or hub id that the
            model was loaded from.
        model: The model.

    Raises:
        EvaluationError: When there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    source = model.name_or_path if given is None else str(given)
    if not source:
        raise EvaluationError(
            "the model was not loaded from a folder or the hub, so its tokenizer is not known",
            hint="give the folder or hub id of the tokenizer: tokenizer='path/or/id'",
        )
    try:
        with quiet("transformers"):
            found = AutoTokenizer.from_pretrained(source)
    # It raises whatever a missing, foreign or damaged file makes of the code that reads it.
    except Exception as error:
        raise EvaluationError(
            f"the tokenizer of {source!r} cannot be loaded: {first_line(error)}",
            hint="give the folder or hub id of the tokenizer: tokenizer='path/or/id'",
        ) from error
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Refuse a tokenizer of another vocabulary than the model's.

    A model may have more rows than its tokenizer has tokens (they are padded to round numbers), but
    never fewer, nor thousands more. Where the model was loaded from a folder with a tokenizer, the
    numbers of its tokens are compared too.

    Raises:
        EvaluationError: When it is one.
    """
    hint = "give the tokenizer of this model: tokenizer='path/or/id'"
    embeddings: Any = model.get_input_embeddings()  # transformers says no more than a module
    rows = len(embeddings.weight)
    tokens = len(tokenizer)
    if tokens > rows or (tokens < _FULLEST * rows and rows - tokens > _PADDING):
        raise EvaluationError(
            f"the tokenizer has {tokens} tokens, and the model embeds {rows}", hint=hint
        )
    folder = Path(model.name_or_path or "")
    if not model.name_or_path or not any((folder / name).is_file() for name in _FILES):
        return
    own = load_tokenizer(None, model).get_vocab()
    given = tokenizer.get_vocab()
    same = sum(own.get(token) == number for token, number in given.items())
    if same < _SAME * min(len(own), len(given)):
        raise EvaluationError(
            f"{same} of the tokenizer's {len(given)} tokens have the number that they have in the "
            f"tokenizer of {folder}",
            hint=hint,
        )


def longest_input(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read at once; None where it does not say."""
    settings: dict[str, Any] = model.config.get_text_config(decoder=True).to_dict()
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
