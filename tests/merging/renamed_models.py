"""Small models whose files have other names than their modules, or cut their tensors otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from map_bo.rng import make_generator
from tests.merging.architectures import library

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts": 3, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 0, 1], "rope_theta": 1e4}


def _seen(text: str, vision: str, *, heads: Any = None, **settings: Any) -> Callable[[Any], Any]:
    """Return what makes the configuration of a model of images and text."""

    def config(t: Any) -> dict[str, Any]:
        return {
            "text_config": getattr(t, text)(**TEXT, **(heads or {})),
            "vision_config": getattr(t, vision)(**VISION),
            **settings,
        }

    return config


def _plain(**settings: Any) -> Callable[[Any], Any]:
    return lambda _: settings


# Name -> class of the model, class of its configuration, and the settings of that.
RENAMED: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _plain(**VISION, num_labels=3)),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        _plain(**VISION, num_labels=3),
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        _plain(
            image_size=16,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=2,
            num_labels=3,
        ),
    ),
    "beit": ("BeitForImageClassification", "BeitConfig", _plain(**VISION, num_labels=3)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _plain(**TEXT, num_local_experts=3)),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _plain(**TEXT, **MIXTURE, shared_expert_intermediate_size=8),
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _plain(**TEXT, **MIXTURE, head_dim=4)),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _plain(**TEXT, head_dim=4, num_local_experts=3),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        _seen("LlamaConfig", "CLIPVisionConfig", image_token_id=5),
    ),
    "llava-next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        _seen("LlamaConfig", "CLIPVisionConfig", image_token_index=5),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        _seen(
            "GemmaConfig",
            "SiglipVisionConfig",
            heads={"head_dim": 4},
            image_token_index=5,
            projection_dim=16,
        ),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        _seen(
            "Gemma3TextConfig", "SiglipVisionConfig", heads={"head_dim": 4}, mm_tokens_per_image=1
        ),
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        lambda _: {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 2,
                "mlp_ratio": 2,
            },
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        lambda _: {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "out_hidden_size": 16,
                "num_heads": 2,
                "patch_size": 2,
                "intermediate_size": 24,
                "fullatt_block_indexes": [0],
            },
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        _plain(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
    ),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _plain(**TEXT, tie_word_embeddings=True)),
}


def renamed(name: str) -> nn.Module:
    """Return a model of random weights, skipping where transformers lacks it."""
    import pytest

    transformers = library()
    kind, config, settings = RENAMED[name]
    if not hasattr(transformers, kind):
        pytest.skip("this transformers is older than the model")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = getattr(transformers, kind)(
            getattr(transformers, config)(**settings(transformers))
        )
    return moved(model, 7, 0.1).eval()


def moved(model: nn.Module, seed: int, scale: float) -> nn.Module:
    """Move all parameters of a model, in place."""
    generator = make_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model
