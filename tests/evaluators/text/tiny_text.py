"""Tiny BERTs with random weights, a tokenizer of words, and data that they can learn from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.rng import make_generator

__all__ = [
    "GOOD_AND_BAD",
    "WORDS",
    "drawn",
    "readable_bert",
    "reviews",
    "rows_file",
    "tiny_bert",
    "tiny_classifier",
    "tiny_gpt2",
    "word_tokenizer",
]

WORDS = [
    *("good", "fine", "great", "bad", "poor", "awful"),
    *("film", "plot", "the", "a", "is", "was", "very", "not", "and", "of"),
]
GOOD_AND_BAD = (("good", "fine", "great"), ("bad", "poor", "awful"))
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer(words: Sequence[str] = WORDS, **settings: Any) -> Any:
    """Return a tokenizer of whole words that marks begin, end and the two texts of a pair."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{
            "unk_token": "[UNK]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        }
        | settings,
    )


def drawn(model: nn.Module, seed: int, scale: float = 0.3) -> Any:
    """Return a model with all its matrices drawn anew, in evaluation mode."""
    generator = make_generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def _settings(**settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    given: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 24,
    }
    return transformers.BertConfig(**given | settings)


def tiny_bert(seed: int = 0, **settings: Any) -> Any:
    """Return a BERT without a head."""
    transformers = pytest.importorskip("transformers")
    return drawn(transformers.BertModel(_settings(**settings)), seed)


def readable_bert(seed: int = 0) -> Any:
    """Return a BERT whose features say which words a text holds: a head can be fitted on them."""
    transformers = pytest.importorskip("transformers")
    return drawn(transformers.BertModel(_settings(hidden_size=64)), seed, scale=0.1)


def tiny_classifier(seed: int = 0, classes: Sequence[str] | int = 2, **settings: Any) -> Any:
    """Return a BERT with a head, of classes by name or number."""
    transformers = pytest.importorskip("transformers")
    names = dict(enumerate(classes)) if not isinstance(classes, int) else {}
    of_head: dict[str, Any] = {"num_labels": classes}
    if names:
        of_head = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = _settings(**settings, **of_head)
    return drawn(transformers.BertForSequenceClassification(config), seed)


def tiny_gpt2(seed: int = 0, classes: int = 2) -> Any:
    """Return a decoder with a head that does not know which token fills texts up."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=24,
        bos_token_id=2,
        eos_token_id=3,
        num_labels=classes,
    )
    config.pad_token_id = None
    return drawn(transformers.GPT2ForSequenceClassification(config), seed)


def reviews(size: int = 40, seed: int = 0) -> list[dict[str, object]]:
    """Return texts of different lengths that hold a good word or a bad one, with their label."""
    generator = make_generator(seed)

    def pick(words: Sequence[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=generator))]

    found: list[dict[str, object]] = []
    for i in range(size):
        filler = [pick(WORDS[6:]) for _ in range(1 + i % 5)]
        found.append({"text": " ".join([*filler, pick(GOOD_AND_BAD[i % 2])]), "label": 1 - i % 2})
    return found


def rows_file(path: Path, rows: Sequence[dict[str, object]]) -> str:
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
