from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from map_bo.errors import EvaluationError
from map_bo.evaluators.language.models import (
    check_vocabulary,
    load_tokenizer,
    longest_input,
    pad_id,
    plain_ids,
    pretrained,
    starts_with_bos,
)
from tests.evaluators.tiny_language import tiny_decoder, tiny_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_modules_of_others_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(EvaluationError, match=r"needs a model of transformers, got a Linear"):
        pretrained(nn.Linear(2, 2), by="perplexity")


def test_a_tokenizer_is_found_where_the_model_was_loaded_from(
    tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_decoder(len(tokenizer))
    with pytest.raises(EvaluationError, match="not loaded from a folder") as found:
        load_tokenizer(None, model)
    assert "tokenizer='path/or/id'" in (found.value.hint or "")
    assert load_tokenizer(tokenizer, model) is tokenizer
    tokenizer.save_pretrained(tmp_path / "model")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "model")
    own = load_tokenizer(None, model)
    assert own.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "nothing"), model)


@pytest.mark.parametrize(("rows", "fits"), [(0, True), (100, True), (-1, False), (9000, False)])
def test_a_tokenizer_of_another_size_is_refused(tokenizer: Any, rows: int, fits: bool) -> None:
    model = tiny_decoder(len(tokenizer) + rows)
    if fits:
        check_vocabulary(tokenizer, model)
        return
    with pytest.raises(EvaluationError, match=f"tokens, and the model embeds {122 + rows}"):
        check_vocabulary(tokenizer, model)


def test_a_tokenizer_of_other_numbers_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_decoder(len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    model.name_or_path = str(tmp_path)
    check_vocabulary(tokenizer, model)
    other = tiny_tokenizer(bos=False)  # each token but two has the number before
    with pytest.raises(EvaluationError, match="2 of the tokenizer's 121 tokens have the number"):
        check_vocabulary(other, model)


def test_the_longest_input_is_what_the_model_says(tokenizer: Any) -> None:
    assert longest_input(tiny_decoder(len(tokenizer), positions=48)) == 48
    assert longest_input(tiny_decoder(len(tokenizer), kind="gpt2", positions=48)) == 48


def test_tokens_that_tokenizers_add_are_told_apart() -> None:
    adding, plain = tiny_tokenizer(adds_bos=True), tiny_tokenizer()
    assert starts_with_bos(adding)
    assert not starts_with_bos(plain)
    assert plain_ids(adding, ["the cat"]) == plain_ids(plain, ["the cat"])
    assert pad_id(plain) == plain.pad_token_id
