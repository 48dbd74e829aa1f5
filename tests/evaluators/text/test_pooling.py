from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.text.pooling import (
    all_features,
    check_pooling,
    encoder_of,
    features,
    pool,
    pooling_of_folder,
)
from map_bo.evaluators.text.tokens import Tokens, tokenise
from tests.evaluators.text.tiny_text import tiny_bert, tiny_classifier, word_tokenizer

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def some() -> Tokens:
    texts = ["good film", "bad", "the plot was very very poor", "fine"]
    return tokenise(
        word_tokenizer(), texts, model=tiny_bert(), max_length=12, where="a.csv", rows=range(4)
    )


def test_three_ways_to_pool() -> None:
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "cls").tolist() == [[0, 1], [6, 7]]
    assert pool(hidden, mask, "last").tolist() == [[2, 3], [10, 11]]
    assert pool(hidden, mask, "mean").tolist() == [[1, 2], [8, 9]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_what_fills_up_a_batch_changes_no_features(pooling: Any) -> None:
    model, tokens = tiny_bert(), some()
    with torch.inference_mode():
        together = features(model, tokens, torch.arange(4), pooling)
        alone = torch.cat([features(model, tokens, torch.tensor([i]), pooling) for i in range(4)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(all_features(model, tokens, pooling, 3), together)


def test_a_head_is_left_out() -> None:
    model = tiny_classifier()
    assert encoder_of(model) is model.bert
    assert encoder_of(nn.Linear(1, 1)).in_features == 1
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=21,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    assert encoder_of(t5) is t5.encoder
    with torch.inference_mode():
        assert features(t5, some(), torch.arange(4), "mean").shape == (4, 8)


class Own(nn.Module):
    """A module of one's own that returns a tensor, of hidden states or of pooled ones."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(21, 4)
        self.shape = shape

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> object:
        hidden: Tensor = self.embedding(input_ids)
        return {"hidden": hidden, "pooled": hidden[:, 0], "flat": hidden[0, 0, 0], "none": None}[
            self.shape
        ]


def test_modules_of_ones_own() -> None:
    tokens = some()
    with torch.inference_mode():
        assert features(Own("hidden"), tokens, torch.arange(4), "mean").shape == (4, 4)
        assert features(Own("pooled"), tokens, torch.arange(4), "mean").shape == (4, 4)
        for shape in ("flat", "none"):
            with pytest.raises(EvaluationError, match="neither hidden states nor one vector"):
                features(Own(shape), tokens, torch.arange(4), "mean")


def test_a_folder_says_how_to_pool(tmp_path: Path) -> None:
    assert pooling_of_folder(None) == pooling_of_folder(tmp_path) == "mean"
    (tmp_path / "1_Pooling").mkdir()

    def said(**modes: object) -> None:
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))

    said(word_embedding_dimension=8, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert pooling_of_folder(tmp_path) == "cls"
    said(pooling_mode_mean_tokens=True)
    assert pooling_of_folder(str(tmp_path)) == "mean"
    said(embedding_dimension=8, pooling_mode="lasttoken", include_prompt=True)
    assert pooling_of_folder(tmp_path) == "last"
    said(pooling_mode="weightedmean")
    with pytest.raises(EvaluationError, match="weightedmean, which is not one of"):
        pooling_of_folder(tmp_path)
    said(pooling_mode_max_tokens=True)
    with pytest.raises(EvaluationError, match="pooling_mode_max_tokens, which is not one of"):
        pooling_of_folder(tmp_path)
    said(pooling_mode_mean_tokens=True, pooling_mode_cls_token=True)
    with pytest.raises(EvaluationError, match="which is not one of"):
        pooling_of_folder(tmp_path)


def test_another_way_to_pool_is_refused() -> None:
    assert check_pooling("last") == "last"
    assert check_pooling(None) is None
    with pytest.raises(
        ConfigError, match="pooling must be one of mean, cls, last, got 'maen'"
    ) as e:
        check_pooling("maen")
    assert e.value.hint == "did you mean 'mean'?"
