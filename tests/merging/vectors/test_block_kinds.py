"""Kinds and depths of tensors as they are called in mixtures of experts and in towers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.blocks import (
    Blocks,
    blocks_of,
    depth_blocks,
    kind_blocks,
    layer_blocks,
)

LAYER = "model.layers.0."
# Names as the hub's files and transformers' modules have them -> kind.
MIXTRAL = {
    "model.embed_tokens.weight": "embedding",
    f"{LAYER}block_sparse_moe.gate.weight": "router",
    f"{LAYER}block_sparse_moe.experts.1.w1.weight": "experts",
    f"{LAYER}mlp.gate.weight": "router",
    f"{LAYER}mlp.experts.gate_up_proj": "experts",
    f"{LAYER}self_attn.k_proj.weight": "attention",
    f"{LAYER}input_layernorm.weight": "norm",
    "lm_head.weight": "head",
}
QWEN_MOE = {
    f"{LAYER}mlp.gate.weight": "router",
    f"{LAYER}mlp.experts.7.gate_proj.weight": "experts",
    f"{LAYER}mlp.shared_expert.gate_proj.weight": "shared_experts",
    f"{LAYER}mlp.shared_expert_gate.weight": "router",
    "model.layers.1.mlp.gate_proj.weight": "mlp",  # of a layer without experts
}
DEEPSEEK = {
    f"{LAYER}mlp.gate_proj.weight": "mlp",
    "model.layers.3.mlp.gate.weight": "router",
    "model.layers.3.mlp.gate.e_score_correction_bias": "router",
    "model.layers.3.mlp.experts.63.down_proj.weight": "experts",
    "model.layers.3.mlp.shared_experts.up_proj.weight": "shared_experts",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": "attention",
    "model.layers.3.self_attn.kv_a_layernorm.weight": "norm",
}
OTHERS = {
    "encoder.block.1.layer.1.mlp.router.classifier.weight": "router",
    "encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight": "experts",
    f"{LAYER}block_sparse_moe.input_linear.weight": "experts",
    f"{LAYER}block_sparse_moe.router.layer.weight": "router",
    f"{LAYER}shared_mlp.output_linear.weight": "shared_experts",
    f"{LAYER}feed_forward.router.weight": "router",
    f"{LAYER}feed_forward.shared_expert.up_proj.weight": "shared_experts",
    "transformer.blocks.0.ffn.experts.mlp.w1": "experts",
    "transformer.blocks.0.ffn.router.layer.weight": "router",
}
LLAVA = {
    "vision_tower.vision_model.embeddings.patch_embedding.weight": "vision",
    "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": "vision",
    "vision_tower.vision_model.post_layernorm.weight": "vision",
    "multi_modal_projector.linear_1.weight": "connector",
    "language_model.model.embed_tokens.weight": "embedding",
    "language_model.model.layers.0.mlp.up_proj.weight": "mlp",
    "language_model.model.layers.0.self_attn.q_proj.weight": "attention",
    "language_model.lm_head.weight": "head",
}
QWEN_VL = {
    "visual.patch_embed.proj.weight": "vision",
    "visual.blocks.0.attn.qkv.weight": "vision",
    "visual.merger.mlp.0.weight": "connector",
    "model.embed_tokens.weight": "embedding",
    f"{LAYER}self_attn.q_proj.bias": "attention",
    f"{LAYER}mlp.down_proj.weight": "mlp",
}
CLIP = {
    "vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
    "vision_model.embeddings.class_embedding": "vision",
    "visual_projection.weight": "connector",
    "text_projection.weight": "connector",
    "text_model.embeddings.token_embedding.weight": "embedding",
    "text_model.encoder.layers.0.mlp.fc1.weight": "mlp",
    "text_model.final_layer_norm.weight": "norm",
}
TOWER = {  # alone: a tower is a model like any other
    "vision_model.embeddings.patch_embedding.weight": "embedding",
    "vision_model.encoder.layers.0.self_attn.k_proj.weight": "attention",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "mlp",
    "vision_model.post_layernorm.weight": "norm",
}
CLASSIFIER = {**TOWER, "classifier.weight": "head"}
QWEN_AUDIO = {
    "audio_tower.layers.0.fc1.weight": "audio",
    "multi_modal_projector.linear.weight": "connector",
    "language_model.model.embed_tokens.weight": "embedding",
    "language_model.model.layers.0.mlp.up_proj.weight": "mlp",
}
MODELS = {
    "mixtral": MIXTRAL,
    "qwen_moe": QWEN_MOE,
    "deepseek": DEEPSEEK,
    "other mixtures": OTHERS,
    "llava": LLAVA,
    "qwen_vl": QWEN_VL,
    "clip": CLIP,
    "a tower alone": TOWER,
    "a tower with a head": CLASSIFIER,
    "qwen_audio": QWEN_AUDIO,
}


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS.keys())
def test_kinds_of_mixtures_and_towers(kinds: dict[str, str]) -> None:
    blocks = Blocks(kind_blocks(list(kinds)))
    found = {name: blocks.names[blocks.of(name)] for name in kinds}
    assert found == kinds


def test_kinds_are_in_an_order_of_their_own_whatever_that_of_the_names() -> None:
    names = list({**LLAVA, **MIXTRAL})
    assert list(kind_blocks(names)) == [
        "vision",
        "connector",
        "embedding",
        "norm",
        "attention",
        "mlp",
        "router",
        "experts",
        "head",
    ]
    assert kind_blocks(names) == kind_blocks(names[::-1])


def positions(names: list[str]) -> dict[str, float]:
    blocks = Blocks(depth_blocks(names))
    return {name: float(blocks.names[blocks.of(name)]) for name in names}


DEPTHS = {
    "llama": {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.up_proj.weight": 0.0,
        "model.layers.1.mlp.experts.7.up_proj.weight": 0.5,
        "model.layers.2.input_layernorm.weight": 1.0,
        "model.norm.weight": 1.0,
        "lm_head.weight": 1.0,
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": 0.0,
        "bert.embeddings.LayerNorm.weight": 0.0,
        "bert.encoder.layer.0.output.dense.weight": 0.0,
        "bert.encoder.layer.4.output.dense.weight": 1.0,
        "bert.pooler.dense.weight": 1.0,
        "classifier.weight": 1.0,
    },
    "two stacks": {
        "shared.weight": 0.0,
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": 0.0,
        "encoder.block.1.layer.0.SelfAttention.q.weight": 1.0,
        "encoder.final_layer_norm.weight": 1.0,
        "decoder.block.0.layer.0.SelfAttention.q.weight": 0.0,
        "decoder.block.1.layer.0.SelfAttention.q.weight": 0.5,
        "decoder.block.2.layer.0.SelfAttention.q.weight": 1.0,
    },
    "resnet": {
        "conv1.weight": 0.0,
        "layer1.0.conv1.weight": 0.0,
        "layer1.1.conv1.weight": 1 / 3,
        "layer2.0.conv1.weight": 2 / 3,
        "layer2.1.conv1.weight": 1.0,
        "fc.weight": 1.0,
    },
    "sequential": {"0.weight": 0.0, "2.weight": 0.5, "4.weight": 1.0},
    "clip": {
        "vision_model.pre_layrnorm.weight": 0.0,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.0,
        "vision_model.encoder.layers.11.mlp.fc1.weight": 1.0,
        "vision_model.post_layernorm.weight": 1.0,
        "visual_projection.weight": 1.0,
    },
    "one layer": {"embed.weight": 0.0, "h.0.weight": 0.0, "head.weight": 1.0},
}


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS.keys())
def test_depths_of_real_names(depths: dict[str, float]) -> None:
    assert positions(list(depths)) == pytest.approx(depths)
    assert positions(list(depths)[::-1]) == pytest.approx(depths)


@settings(max_examples=25)
@given(st.integers(1, 40), st.booleans())
def test_layers_are_equally_far_apart(count: int, other: bool) -> None:
    names = [f"h.{k}.weight" for k in range(count)]
    found = positions([*names, "classifier.1.weight"] if other and count > 1 else names)
    for k, name in enumerate(names):
        assert found[name] == pytest.approx(k / max(count - 1, 1), abs=1e-8)


def test_in_a_word() -> None:
    names = ["h.0.w", "h.1.w", "h.2.w", "head.w"]
    base = open_checkpoint({name: torch.ones(2) for name in names})
    assert list(blocks_of("depths", base, {})) == ["0", "0.5", "1"]
    assert blocks_of("depths", base, {}) == depth_blocks(names)
    with pytest.raises(MergeError, match="must be layers:K, kinds, depths, balanced:K or a map"):
        blocks_of("depth", base, {})


TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
}


def qwen_vl(t: Any) -> Any:
    text = {**TINY, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config=text, vision_config=sight, bos_token_id=0, eos_token_id=1, pad_token_id=2
        )
    )


LANGUAGE = {"embedding", "norm", "attention", "head"}
SKELETONS: Mapping[str, tuple[Callable[[Any], Any], set[str]]] = {
    "mixtral": (
        lambda t: t.MixtralForCausalLM(t.MixtralConfig(**TINY, num_local_experts=2)),
        LANGUAGE | {"router", "experts"},
    ),
    "qwen2_moe": (
        lambda t: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(**TINY, **ROUTED, num_experts=2, shared_expert_intermediate_size=8)
        ),
        LANGUAGE | {"router", "experts", "shared_experts"},
    ),
    "deepseek_v3": (
        lambda t: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(**TINY, **ROUTED, **LATENT, n_group=2, topk_group=1)
        ),
        LANGUAGE | {"mlp", "router", "experts", "shared_experts"},
    ),
    "llava": (
        lambda t: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**SIGHT), text_config=t.LlamaConfig(**TINY)
            )
        ),
        LANGUAGE | {"mlp", "vision", "connector"},
    ),
    "clip": (
        lambda t: t.CLIPModel(
            t.CLIPConfig(
                text_config={k: v for k, v in TINY.items() if k != "num_key_value_heads"},
                vision_config=SIGHT,
                projection_dim=8,
            )
        ),
        {"vision", "connector", "embedding", "norm", "attention", "mlp"},
    ),
    "clip_vision": (
        lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**SIGHT)),
        {"embedding", "norm", "attention", "mlp"},
    ),
    "qwen2_vl": (qwen_vl, LANGUAGE | {"mlp", "vision", "connector"}),
}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
@pytest.mark.parametrize("name", SKELETONS)
def test_every_tensor_of_a_skeleton_has_a_kind_and_a_depth(name: str) -> None:
    make, kinds = SKELETONS[name]
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        state = make(transformers).state_dict()
    # CLIP's temperature is the one tensor that no module's name says anything of.
    names = [key for key in state if state[key].is_floating_point() and key != "logit_scale"]
    assert set(kind_blocks(names)) == kinds
    found = positions(names)
    assert {0.0, 1.0} == set(found.values())  # of two layers each
    for key, place in found.items():
        layer = re.search(r"(?:layers|blocks)\.(\d)\.", key)
        if layer:
            assert place == float(layer.group(1)), key
        if re.search(r"embed", key):
            assert place == 0.0, key
        if re.search(r"lm_head|language_model\.norm", key):
            assert place == 1.0, key
    assert list(layer_blocks(names, 2))[:2] == ["layers1", "layers2"]
