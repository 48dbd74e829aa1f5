"""Tiny models of images, their folders and their images, made here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from map_bo.rng import make_generator

SIDE = 8
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "dark_blue": (20, 20, 180)}
WORDS = (
    "[PAD]",
    "[UNK]",
    "[BOS]",
    "[EOS]",
    "a",
    "photo",
    "of",
    "the",
    *["red", "green", "dark", "blue"],
)


def draw(module: nn.Module, seed: int, scale: float = 0.3) -> None:
    """Give a module weights by a seed of its own."""
    generator = make_generator(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.dim() > 1 or "embedding" in name:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def clip(seed: int = 0) -> Any:
    """Return a CLIP model of a few thousand weights."""
    transformers = pytest.importorskip("transformers")
    common = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config={
            **common,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 12,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**common, "image_size": SIDE, "patch_size": 4},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    draw(model, seed)
    return model


def vit(seed: int = 0, classes: int = 3, *, head: bool = True) -> Any:
    """Return a vision transformer of a few thousand weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        num_labels=classes,
    )
    kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    model = kind(config).eval()
    draw(model, seed)
    return model


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> str:
    """Write a tokenizer of words that begins and ends texts as CLIP's does."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    known = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        special_tokens=[("[BOS]", known["[BOS]"]), ("[EOS]", known["[EOS]"])],
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    made.save_pretrained(str(folder))
    return str(folder)


def write_processor(folder: Path, side: int = SIDE, kind: str = "CLIP") -> str:
    """Write how images are prepared."""
    folder.mkdir(parents=True, exist_ok=True)
    edges: Mapping[str, int] = (
        {"shortest_edge": side} if kind == "CLIP" else {"height": side, "width": side}
    )
    about = {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": edges,
        "crop_size": {"height": side, "width": side},
        "do_resize": True,
        "do_center_crop": kind == "CLIP",
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.5],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return str(folder)


def picture(colour: Sequence[int], seed: int, size: tuple[int, int] = (14, 10)) -> Any:
    """Return an image of about one colour; ``size`` is width and height."""
    images = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return images.fromarray((np.asarray(colour) + noise).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, each: int = 4) -> str:
    """Write a few images of each colour, one folder per colour, in several sizes."""
    for k, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            size = (10 + 2 * i, 12 - i)
            picture(colour, 10 * k + i, size).save(folder / name / f"{i}.png")
    return str(folder)
