"""Made-up texts in the formats of the real sets, and tiny models to read them."""

from __future__ import annotations

import csv
import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = tuple(f"w{i}" for i in range(40))


def texts(n: int, classes: int, seed: int) -> list[tuple[int, str]]:
    """Return ``n`` different texts of words that are likelier in one class than in others."""
    draw = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < n:
        label = len(found) % classes
        own = [WORDS[(7 * seed + 3 * label + i) % len(WORDS)] for i in range(3)]
        words = [draw.choice(own if draw.random() < 0.6 else WORDS) for _ in range(6)]
        found.setdefault(" ".join(words), label)
    return [(label, text) for text, label in found.items()]


def write_texts(root: Path, *, train: int = 24, test: int = 16) -> Path:
    """Write sst2, trec, subj, snips, banking77, clinc150 and tweeteval_emotion into ``root``.

    The first test text of trec is a training text.
    """

    def rows(name: str, classes: int, seed: int) -> list[tuple[int, str]]:
        (root / name).mkdir(parents=True)
        return texts(train + test, classes, seed)

    def lines(found: list[tuple[int, str]]) -> str:
        return "".join(f"{label} {text}\n" for label, text in found)

    two = rows("sst2", 2, 1)
    (root / "sst2" / "stsa.binary.train.gz").write_bytes(gzip.compress(lines(two[:train]).encode()))
    (root / "sst2" / "stsa.binary.test").write_text(lines(two[train:]))
    six = rows("trec", 3, 2)
    six[train] = six[0]
    (root / "trec" / "TREC.train.all").write_text(lines(six[:train]), encoding="latin-1")
    (root / "trec" / "TREC.test.all").write_text(lines(six[train:]), encoding="latin-1")
    (root / "subj" / "subj.all").write_text(lines(rows("subj", 2, 3)))
    names = ("play", "book", "rate")
    spoken = rows("snips", 3, 4)
    for part, chosen in (("train", spoken[:train]), ("test", spoken[train:])):
        (root / "snips" / part).mkdir()
        (root / "snips" / part / "seq.in").write_text("".join(f"{t}\n" for _, t in chosen))
        (root / "snips" / part / "label").write_text("".join(f"{names[i]}\n" for i, _ in chosen))
    asked = rows("banking77", 3, 5)
    for part, chosen in (("train", asked[:train]), ("test", asked[train:])):
        with (root / "banking77" / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("text", "category"), *((f"{t}, {t}", names[i]) for i, t in chosen)])
    said = [[text, names[label]] for label, text in rows("clinc150", 3, 6)]
    parts = {"train": said[:train], "test": said[train:], "oos_test": [["w1", "oos"]]}
    (root / "clinc150" / "data_full.json").write_text(json.dumps(parts))
    felt = rows("tweeteval_emotion", 2, 7)
    folder = root / "tweeteval_emotion"
    (folder / "mapping.txt").write_text("0\tanger\n1\tjoy")
    for part, chosen in (("train", felt[:train]), ("test", felt[train:])):
        (folder / f"{part}_text.txt").write_text("".join(f"{t} \n" for _, t in chosen))
        (folder / f"{part}_labels.txt").write_text("".join(f"{i}\n" for i, _ in chosen))
    return root


def _tokenizer(begin: str | None) -> Any:
    transformers: Any = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[BOS]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token=begin
    )


def _write_model(model: Any, tokenizer: Any, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _configurations() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    size = len(WORDS) + 3
    encoder = transformers.BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    decoder = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    return encoder, decoder


def tiny_encoder(folder: Path) -> Path:
    """Write a BERT of some thousand random weights, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        model = transformers.BertModel(_configurations()[0])
    return _write_model(model, _tokenizer(None), folder)


def tiny_decoder(folder: Path) -> Path:
    """Write a Llama of some thousand random weights, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        model = transformers.LlamaForCausalLM(_configurations()[1])
    return _write_model(model, _tokenizer("[BOS]"), folder)
