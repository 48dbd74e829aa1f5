"""Which models mergekit repeats a merge of, by the mergekit.yaml that an export has."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from map_bo.merging.export.mergekit_config import FAMILIES, VERSION
from map_bo.merging.export.model import merge_checkpoints
from tests.merging.architectures import library
from tests.merging.renamed_models import VISION, moved

WORDS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED: dict[str, Any] = {**WORDS, "num_key_value_heads": 1}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
BASIC = {n: WORDS[n] for n in WORDS if n not in ("intermediate_size", "max_position_embeddings")}
DISTILLED = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", WORDS),
    "BertForSequenceClassification": ("BertConfig", WORDS),
    "BertModel": ("BertConfig", WORDS),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": WORDS, "vision_config": VISION, "projection_dim": 8},
    ),
    "CohereForCausalLM": ("CohereConfig", GROUPED),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILLED),
    "FalconForCausalLM": ("FalconConfig", BASIC),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", WORDS),
    "Gemma2ForCausalLM": ("Gemma2Config", HEADS),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", HEADS),
    "GemmaForCausalLM": ("GemmaConfig", HEADS),
    "GraniteForCausalLM": ("GraniteConfig", GROUPED),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 40, "hidden_size": 16, "state_size": 4}),
    "MistralForCausalLM": ("MistralConfig", HEADS),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "Olmo2ForCausalLM": ("Olmo2Config", GROUPED),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "PhiForCausalLM": ("PhiConfig", WORDS),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", HEADS),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**HEADS, "num_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1},
    ),
    "RobertaForSequenceClassification": ("RobertaConfig", WORDS),
    "StableLmForCausalLM": ("StableLmConfig", GROUPED),
    "Starcoder2ForCausalLM": ("Starcoder2Config", GROUPED),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {
            "vocab_size": 40,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "pad_token_id": 2,
            "max_source_positions": 8,
            "max_target_positions": 8,
        },
    ),
}


def test_every_family_of_the_table_is_tried() -> None:
    assert SETTINGS.keys() == FAMILIES.keys()


def merged(folder: Path, kind: str) -> Path:
    """Merge two experts of a small model of a class."""
    transformers = library()
    config, settings = SETTINGS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    parts = {"base": model}
    parts |= {name: moved(copy.deepcopy(model), i, 0.02) for i, name in enumerate("ab")}
    for name, part in parts.items():
        part.save_pretrained(folder / name)  # type: ignore[operator]
    return merge_checkpoints(
        folder / "base",
        {name: folder / name for name in "ab"},
        {"a": 0.5, "b": 0.7},
        folder / "ours",
        check_base=False,
        progress=False,
    )


def repeated(recipe: Path, out: Path) -> dict[str, Tensor] | None:
    """Return what mergekit makes of a recipe, or None where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mergekit imports is deprecated here and there
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge

        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        content = yaml.safe_load(recipe.read_text())
        try:
            run_merge(MergeConfiguration.model_validate(content), str(out), options)
        except Exception:
            return None
    found: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_mergekit_repeats_what_the_table_says(tmp_path: Path, kind: str) -> None:
    mergekit = pytest.importorskip("mergekit", reason="pip install 'map-bo[benchmark]'")
    del mergekit
    out = merged(tmp_path, kind)
    text = (out / "mergekit.yaml").read_text()
    promised = text.startswith("# The same merge for mergekit")
    theirs, ours = (
        repeated(out / "mergekit.yaml", tmp_path / "theirs"),
        load_file(out / "model.safetensors"),
    )
    same = (
        theirs is not None
        and theirs.keys() == ours.keys()
        and all(torch.allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-5) for n in ours)
    )
    assert (same, promised) == (FAMILIES[kind], FAMILIES[kind])
    assert promised or f"mergekit {VERSION} does not repeat merges of {kind}" in text


def test_the_version_is_the_pinned_one() -> None:
    assert f"mergekit=={VERSION}" in (Path(__file__).parents[3] / "constraints.txt").read_text()
