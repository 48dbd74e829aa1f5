from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.errors import EvaluationError, MissingDependencyError
from map_bo.evaluators.text.tokens import (
    Tokens,
    check_vocabulary,
    load_tokenizer,
    longest_text,
    tokenise,
)
from tests.evaluators.text.tiny_text import WORDS, tiny_bert, tiny_gpt2, word_tokenizer

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def tokens(*texts: list[str], **settings: Any) -> Tokens:
    given: dict[str, Any] = {
        "model": tiny_bert(),
        "max_length": 8,
        "where": "a.csv",
        "rows": range(len(texts[0])),
    } | settings
    return tokenise(word_tokenizer(), *texts, **given)


def test_texts_become_batches_that_are_filled_up_on_the_right() -> None:
    found = tokens(["good film", "bad"])
    assert found.lengths.tolist() == [4, 3]
    batch = found.batch(torch.tensor([1, 0]), tiny_bert())
    good, bad, film = (5 + WORDS.index(word) for word in ("good", "bad", "film"))
    assert batch["input_ids"].tolist() == [[2, bad, 3, 0], [2, good, film, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 4, [0] * 4]


def test_pairs_say_which_text_a_token_is_of() -> None:
    found = tokens(["good film", "bad"], ["a plot", "the"])
    batch = found.batch(torch.tensor([0]), tiny_bert())
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert "token_type_ids" not in found.batch(torch.tensor([0]), torch.nn.Linear(2, 2))


def test_long_texts_are_cut_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = tokens(["good " * 20, "bad"], max_length=6)
    assert found.lengths.tolist() == [6, 3]
    assert "1 of 2 texts of a.csv have 6 tokens" in caplog.text


def test_texts_that_cannot_be_cut_so_short_are_refused() -> None:
    with pytest.raises(EvaluationError, match="max_length is 2, which leaves no room"):
        tokens(["good film", "bad"], ["a plot", "the"], max_length=2)


def test_a_text_without_tokens_is_refused() -> None:
    bare = word_tokenizer()
    bare.backend_tokenizer.post_processor = None  # adds no tokens of its own
    with pytest.raises(EvaluationError, match=r"row 8 of a.csv is a text without any token"):
        tokenise(bare, ["good", " "], model=tiny_bert(), max_length=8, where="a.csv", rows=[3, 7])


def test_texts_of_which_no_word_is_known_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EvaluationError, match=r"no word of a.csv: all 3 tokens are '\[UNK\]'"):
        tokens(["xyzzy plugh", "qwertz"])
    tokens(["xyzzy plugh", "good"])
    assert "less than half of a.csv: 2 of 3 tokens" in caplog.text
    caplog.clear()
    tokens(["good plugh", "good"])
    assert not caplog.text


def test_many_texts_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.evaluators.text.tokens._COSTLY", 3)
    first = tokens(["good film", "bad"], cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    again = tokens(["good film", "bad"], cache_dir=tmp_path)
    assert again.digest == first.digest
    tokens(["good film", "bad"], cache_dir=tmp_path, max_length=3)
    tokens(["good film", "poor"], cache_dir=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    sides = []
    for side in ("right", "left"):
        cutting = word_tokenizer()
        cutting.truncation_side = side
        given: Any = {"max_length": 3, "where": "a.csv", "rows": [0], "cache_dir": tmp_path}
        sides.append(tokenise(cutting, ["good film"], model=tiny_bert(), **given))
    assert sides[0].digest != sides[1].digest


def test_a_tokenizer_of_a_folder_of_the_model_or_as_it_is(tmp_path: Path) -> None:
    model, own = tiny_bert(), word_tokenizer()
    own.save_pretrained(tmp_path)
    assert load_tokenizer(own, model) is own
    assert load_tokenizer(tmp_path, model).get_vocab() == own.get_vocab()
    model.config._name_or_path = str(tmp_path)
    loaded = type(model)(model.config)
    assert loaded.name_or_path == str(tmp_path)
    assert load_tokenizer(None, loaded).get_vocab() == own.get_vocab()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "does not say which folder it is of"),
        ("/no/such/folder", "there is no folder /no/such/folder with a tokenizer"),
        (3, "must be a folder, a hub id or a tokenizer, got a int"),
    ],
)
def test_no_tokenizer_is_refused(given: object, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as found:
        load_tokenizer(given, tiny_bert())
    assert "tokenizer=" in (found.value.hint or "")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(tmp_path, tiny_bert())


def test_without_transformers_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    monkeypatch.setattr("map_bo.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as found:
        load_tokenizer(None, model)
    assert found.value.hint == 'pip install "map-bo[huggingface]"'


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    check_vocabulary(word_tokenizer(), model)
    larger = word_tokenizer([*WORDS, "more"])
    with pytest.raises(EvaluationError, match="has 22 tokens, and the model embeds 21"):
        check_vocabulary(larger, model)
    check_vocabulary(larger, torch.nn.Linear(2, 2))  # embeds nothing
    with pytest.raises(EvaluationError, match="has 21 tokens, and the model embeds 3000"):
        check_vocabulary(word_tokenizer(), tiny_bert(vocab_size=3000))
    # The same size, and other words: only the model's own tokenizer tells.
    word_tokenizer().save_pretrained(tmp_path)
    model.config._name_or_path = str(tmp_path)
    known = type(model)(model.config)
    check_vocabulary(word_tokenizer(), known)
    with pytest.raises(EvaluationError, match="of the tokenizer's 21 tokens have the number"):
        check_vocabulary(word_tokenizer(WORDS[::-1]), known)


def test_how_long_texts_may_be(tmp_path: Path) -> None:
    model = tiny_bert()
    assert longest_text(word_tokenizer(), model, None) == 24
    assert longest_text(word_tokenizer(model_max_length=10), model, None) == 10
    assert longest_text(word_tokenizer(), model, 7) == 7
    assert longest_text(word_tokenizer(), torch.nn.Linear(2, 2), None) == 1_000_000
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    assert longest_text(load_tokenizer(tmp_path, model), model, None) == 9
    with pytest.raises(EvaluationError, match="max_length is 25, and the model reads at most 24"):
        longest_text(word_tokenizer(), model, 25)


def test_positions_of_roberta_start_behind_the_padding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        vocab_size=21,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=26,
        pad_token_id=1,
    )
    model = transformers.RobertaModel(config).eval()
    longest = longest_text(word_tokenizer(), model, None)
    assert longest == 24
    ids = torch.full((1, longest), 5)
    assert model(input_ids=ids).last_hidden_state.shape == (1, 24, 8)  # one more does not fit


def test_a_decoder_is_filled_up_with_what_it_skips() -> None:
    model = tiny_gpt2()
    model.config.pad_token_id = 4
    batch = tokens(["good film", "bad"], model=model).batch(torch.tensor([1, 0]), model)
    assert batch["input_ids"][0, 3] == 4
    model.config.pad_token_id = -1  # as some say that have none
    assert tokens(["good"], model=model).pad == 0
