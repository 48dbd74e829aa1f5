"""Tiny models on disk, each a folder that transformers loads, and data for their tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.rng import make_generator
from tests.evaluators.text.tiny_text import (
    reviews,
    rows_file,
    tiny_bert,
    tiny_classifier,
    word_tokenizer,
)
from tests.evaluators.tiny_language import WORDS, tiny_decoder, tiny_tokenizer

__all__ = ["CLASSES", "moved", "save", "write_classifiers", "write_decoders", "write_tower"]

CLASSES = {"film": ["bad", "good"], "topic": ["acting", "plot", "music"]}
DOMAINS = {"cats": WORDS[:5], "dogs": WORDS[5:]}


def write_decoders(folder: Path) -> None:
    """Write a decoder, two experts for words of their own, and texts of these words."""
    tokenizer = tiny_tokenizer()
    base = tiny_decoder(len(tokenizer))
    save(base, folder / "base", tokenizer)
    for seed, (name, words) in enumerate(DOMAINS.items()):
        lines = _lines(random.Random(seed), words, 40)
        expert = tiny_decoder(len(tokenizer))
        batches = [tokenizer(lines[i::4], return_tensors="pt", padding=True) for i in range(4)]
        optimiser = torch.optim.Adam(expert.parameters(), 2e-2)
        for step in range(12):
            batch = batches[step % 4]
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = expert(**batch, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        save(expert, folder / name)
        text = "\n".join(_lines(random.Random(10 + seed), words, 24))
        (folder / f"{name}.txt").write_text(text)


def _lines(chance: random.Random, words: list[str], count: int) -> list[str]:
    return [" ".join(chance.choice(words) for _ in range(8)) for _ in range(count)]


def save(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Save a model, and the tokenizer beside it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def moved(model: Any, other: Any, seed: int) -> Any:
    """Return ``other`` with the weights of ``model``, moved a little by chance."""
    generator = make_generator(seed)
    known = model.state_dict()
    with torch.no_grad():
        for name, parameter in other.state_dict().items():
            at = known.get(name, parameter)
            if parameter.is_floating_point():
                parameter.copy_(at + 0.05 * torch.randn(at.shape, generator=generator))
    return other


def write_classifiers(folder: Path) -> None:
    """Write an encoder, two experts with heads of their own, and reviews for each."""
    base = tiny_bert()
    save(base, folder / "bert", word_tokenizer())
    for seed, (name, classes) in enumerate(CLASSES.items()):
        expert = tiny_classifier(seed=9 + seed, classes=classes)
        moved(base, expert.bert, seed)
        save(expert, folder / name)
        rows = reviews(24, seed)
        for i, row in enumerate(rows):
            row["label"] = classes[i % len(classes)]
        rows_file(folder / f"{name}.jsonl", rows)


def write_tower(base: Any, folder: Path, seed: int) -> None:
    """Write the image tower of a CLIP, moved a little, with the names of the files of the hub."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    tower = transformers.CLIPVisionModel(base.config.vision_config)
    tower.load_state_dict(base.vision_model.state_dict())
    state = {f"vision_model.{key}": v for key, v in moved(tower, tower, seed).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(state, folder / "model.safetensors")
    tower.config.architectures = ["CLIPVisionModel"]
    tower.config.projection_dim = base.config.projection_dim
    tower.config.save_pretrained(folder)
