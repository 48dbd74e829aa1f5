"""Tiny transformers models with random PEFT LoRA adapters, and what peft itself makes of them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.rng import make_generator

TOKENS = torch.arange(6)[None]


def language_model(kind: str, seed: int = 0) -> nn.Module:
    """Return a model of a few hundred weights: ``gpt2``, ``llama`` or ``bert``."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        build = transformers.GPT2LMHeadModel
    elif kind == "llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=8, intermediate_size=12, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=11, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        build = transformers.LlamaForCausalLM
    else:
        config = transformers.BertConfig(
            num_hidden_layers=1, hidden_size=8, intermediate_size=12, num_attention_heads=2,
            vocab_size=11, max_position_embeddings=8,
        )  # fmt: skip
        build = transformers.BertForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = build(config)
    return model.eval()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def trained(model: nn.Module, folder: Path, seed: int = 1, **settings: Any) -> nn.Module:
    """Save a random adapter of ``model`` in ``folder``; return the model with it merged, by peft.

    ``model`` stays as it is.
    """
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # peft warns of Conv1D, tied weights and its own use of transformers.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 2, **settings})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            adapted = peft.get_peft_model(copy.deepcopy(model), config)
        generator = make_generator(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.3 * noise.to(parameter.dtype)
        adapted.save_pretrained(folder)
        merged: nn.Module = adapted.merge_and_unload().eval()
    return merged


def with_settings(folder: Path, **changes: Any) -> None:
    """Change the saved configuration of an adapter."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
