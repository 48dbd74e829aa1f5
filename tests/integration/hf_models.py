"""Tiny models on disk, each a folder that transformers loads, and data for their tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from tests.evaluators.tiny_language import WORDS, tiny_decoder, tiny_tokenizer

__all__ = ["write_decoders"]

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
