from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from map_bo.errors import EvaluationError
from map_bo.evaluators.language.models import (
    causal,
    longest_input,
    pad_id,
    plain_ids,
    pretrained,
    starts_with_bos,
)
from tests.evaluators.tiny_language import tiny_decoder, tiny_encoder_decoder, tiny_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_modules_of_others_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EvaluationError, match=r"needs a model of transformers, got a Linear"):
        pretrained(nn.Linear(2, 2), by="perplexity")


def test_models_that_do_not_write_from_left_to_right_are_refused(tokenizer: Any) -> None:
    rows = len(tokenizer)
    model = tiny_decoder(rows)
    assert causal(model, by="perplexity") is model
    for other in (model.get_submodule("model"), tiny_encoder_decoder(rows)):
        with pytest.raises(EvaluationError, match=f"and {type(other).__name__} is not one"):
            causal(other, by="perplexity")


def test_the_longest_input_is_what_the_model_says(tokenizer: Any) -> None:
    assert longest_input(tiny_decoder(len(tokenizer), positions=48)) == 48
    assert longest_input(tiny_decoder(len(tokenizer), kind="gpt2", positions=48)) == 48
    assert longest_input(tiny_encoder_decoder(len(tokenizer))) is None


def test_tokens_that_tokenizers_add_are_told_apart() -> None:
    adding, plain = tiny_tokenizer(adds_bos=True), tiny_tokenizer()
    assert starts_with_bos(adding)
    assert not starts_with_bos(plain)
    assert plain_ids(adding, ["the cat"]) == plain_ids(plain, ["the cat"])
    assert pad_id(plain) == plain.pad_token_id
