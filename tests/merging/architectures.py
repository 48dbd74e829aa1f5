"""Small models of many architectures, as folders that transformers wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.rng import make_generator

EXPERTS = ("math", "code")
TOKENIZER = '{"model": {"vocab": {"a": 0}}}'
_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_WORDS: dict[str, Any] = {"vocab_size": 40, "max_position_embeddings": 16, **_SIZES}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers.

    Attributes:
        kind: Its class.
        config: Class of its configuration, and settings.
        auto: The class that finds it by its folder.
        inputs: What it is called with: names of the inputs below.
        tied: Whether it has tied weights.
        dtype: Its dtype.
    """

    kind: str
    config: tuple[str, Mapping[str, Any]]
    auto: str
    inputs: tuple[str, ...] = ("input_ids",)
    tied: bool = False
    dtype: torch.dtype = torch.float32
    shard: str = "12KB"
    settings: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "BertForSequenceClassification",
        ("BertConfig", {**_WORDS, "num_labels": 3}),
        "AutoModelForSequenceClassification",
    ),
    "bert-words": Architecture(
        "BertForMaskedLM", ("BertConfig", _WORDS), "AutoModelForMaskedLM", tied=True
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        (
            "GPT2Config",
            {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ),
        "AutoModelForCausalLM",
        tied=True,
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        ("LlamaConfig", {**_WORDS, "num_key_value_heads": 1}),
        "AutoModelForCausalLM",
    ),
    "llama-bfloat16": Architecture(
        "LlamaForCausalLM",
        ("LlamaConfig", {**_WORDS, "num_key_value_heads": 1, "tie_word_embeddings": True}),
        "AutoModelForCausalLM",
        tied=True,
        dtype=torch.bfloat16,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        ("ViTConfig", {**_SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}),
        "AutoModelForImageClassification",
        inputs=("pixel_values",),
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        (
            "ResNetConfig",
            {
                "embedding_size": 4,
                "hidden_sizes": [4, 6],
                "depths": [1, 1],
                "layer_type": "basic",
                "num_labels": 3,
            },
        ),
        "AutoModelForImageClassification",
        inputs=("pixel_values",),
    ),
    "clip": Architecture(
        "CLIPModel",
        (
            "CLIPConfig",
            {
                "text_config": {**_WORDS, **_SPECIAL},
                "vision_config": {**_SIZES, "image_size": 8, "patch_size": 4},
                "projection_dim": 8,
            },
        ),
        "AutoModel",
        inputs=("input_ids", "pixel_values"),
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        (
            "T5Config",
            {
                "vocab_size": 40,
                "d_model": 16,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 1,
                "num_heads": 2,
                "decoder_start_token_id": 0,
            },
        ),
        "AutoModelForSeq2SeqLM",
        inputs=("input_ids", "decoder_input_ids"),
        tied=True,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        (
            "MixtralConfig",
            {**_WORDS, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
        ),
        "AutoModelForCausalLM",
    ),
}


def library() -> Any:
    """Return transformers, quiet; skip the test where it is not installed."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers


def new(name: str, **changes: Any) -> nn.Module:
    """Return a model of random weights that depend on nothing."""
    transformers = library()
    chosen = ARCHITECTURES[name]
    kind, settings = chosen.config
    special = {} if "pixel_values" in chosen.inputs else _SPECIAL
    config = getattr(transformers, kind)(**{**special, **settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = getattr(transformers, chosen.kind)(config)
    scramble(model, 0, 0.3)
    # As from_pretrained does; `.to` would round buffers that no file holds.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(chosen.dtype)
    return model.eval()


def scramble(model: nn.Module, seed: int, scale: float) -> None:
    """Move all that is saved, each tied weight once; running variances stay positive."""
    generator = make_generator(seed)
    saved = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    with torch.no_grad():
        for tensor in saved.values():
            if tensor.is_floating_point() and tensor.numel():
                tensor += scale * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.abs_().add_(0.2)


def save_family(root: Path, name: str) -> dict[str, nn.Module]:
    """Write base and experts of an architecture to folders of ``root``; return the models."""
    models = {"base": new(name)}
    for seed, label in enumerate(EXPERTS, start=1):
        models[label] = new(name)
        scramble(models[label], seed, 0.05)
    for label, model in models.items():
        save: Callable[..., Any] = model.save_pretrained  # type: ignore[assignment]
        save(root / label, max_shard_size=ARCHITECTURES[name].shard)
        (root / label / "tokenizer.json").write_text(TOKENIZER)
    return models


def inputs(name: str) -> dict[str, Tensor]:
    """Return the inputs of an architecture: two examples."""
    generator = make_generator(7)
    words = torch.randint(3, 40, (2, 6), generator=generator)
    known = {
        "input_ids": words,
        "decoder_input_ids": words[:, :4].contiguous(),
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
    }
    return {kind: known[kind] for kind in ARCHITECTURES[name].inputs}


def outputs(model: nn.Module, name: str) -> Tensor:
    """Return the model's logits, or the similarity of texts and images, in float32."""
    with torch.no_grad():
        result = model(**inputs(name))
    values: Tensor = result.logits if "logits" in result else result.logits_per_text
    return values.float().clone()
