"""Tiny language models with random weights, and tokenizers made on the spot."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.rng import make_generator

__all__ = ["draw_weights", "tiny_decoder", "tiny_encoder_decoder", "tiny_tokenizer"]

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "far", "yes", "no", "two", "three"]


def tiny_tokenizer(*, bos: bool = True, adds_bos: bool = False, chat: bool = False) -> Any:
    """Return a tokenizer of characters and a few words; decoding gives back the text."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    special = ["<pad>", "</s>", *(["<s>"] if bos else [])]
    byte = [*string.ascii_letters, *string.digits, *string.punctuation, "Ġ", "Ċ"]
    vocabulary = {token: i for i, token in enumerate([*special, *byte])}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)))
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if adds_bos:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="</s>",
        pad_token="<pad>",
        **({"bos_token": "<s>"} if bos else {}),
    )
    if chat:
        found.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return found


def draw_weights(model: nn.Module, seed: int, scale: float) -> None:
    """Draw all matrices of a model from a normal distribution."""
    generator = make_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_decoder(
    rows: int, *, kind: str = "llama", seed: int = 0, positions: int = 128, scale: float = 0.3
) -> Any:
    """Return a causal language model of a few thousand weights, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=rows, n_positions=positions, n_embd=16, n_layer=2, n_head=2,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions,
            bos_token_id=2, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    draw_weights(model, seed, scale)
    return model.eval()


def tiny_encoder_decoder(rows: int, *, seed: int = 0) -> Any:
    """Return a T5 of a few thousand weights, in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=rows, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    draw_weights(model, seed, 0.3)
    return model.eval()
