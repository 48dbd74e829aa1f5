from __future__ import annotations

from typing import Any

import pytest
import torch

from map_bo.evaluators.language.decoding import Drawing, Stopping, ends_of, greedy
from map_bo.rng import child, make_generator
from tests.evaluators.tiny_language import tiny_decoder, tiny_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_each_row_ends_by_itself(tokenizer: Any) -> None:
    stopping = Stopping(tokenizer, ["on m"], [tokenizer.eos_token_id], 1, 3)
    end = tokenizer.eos_token_id
    sat, on, mat = (tokenizer(text)["input_ids"] for text in (" sat", " on", " mat"))
    rows = [[5, *sat, *on, *mat], [5, *sat, end, 0, 0, 0, 0], [5] + [7] * 6]
    width = len(rows[0])
    table = torch.tensor([row[:width] for row in rows])
    seen = [stopping(table[:, :stop], None).tolist() for stop in range(2, width + 1)]
    assert seen[-1] == [True, True, False]
    assert not any(one[2] for one in seen)
    assert stopping.lengths(table) == [len(sat + on + mat), len(sat) + 1, width - 1]
    assert stopping.texts(table)[:2] == [" sat ", " sat"]


def test_draws_follow_the_probabilities() -> None:
    n, probabilities = 4000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().expand(n, 4)
    parent = make_generator(0)

    def frequencies(temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
        generators = [child(parent, i) for i in range(n)]
        drawn = Drawing(generators, temperature, top_k, top_p)(scores, scores).argmax(-1)
        return torch.bincount(drawn, minlength=4) / n

    torch.testing.assert_close(frequencies(1, None, None), probabilities, atol=0.03, rtol=0)
    squared = probabilities.square() / probabilities.square().sum()
    torch.testing.assert_close(frequencies(0.5, None, None), squared, atol=0.03, rtol=0)
    two = torch.tensor([0.625, 0.375, 0, 0])
    torch.testing.assert_close(frequencies(1, 2, None), two, atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(1, None, 0.7), two, atol=0.03, rtol=0)
    assert frequencies(1, None, 0.01)[0] == 1  # the likeliest always stays


def test_a_text_ends_where_the_model_or_the_tokenizer_says(tokenizer: Any) -> None:
    model = tiny_decoder(len(tokenizer))
    assert ends_of(model, tokenizer) == [1]
    model.generation_config.eos_token_id = [1, 7, 0]
    assert ends_of(model, tokenizer) == [0, 1, 7]
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokenizer) == [1]


def test_greedy_settings_say_everything_that_would_change_it() -> None:
    pytest.importorskip("transformers")
    settings = greedy(5, ends=[1], pad=0)
    assert (settings.do_sample, settings.num_beams, settings.repetition_penalty) == (False, 1, 1.0)
    assert (settings.max_new_tokens, settings.eos_token_id, settings.pad_token_id) == (5, [1], 0)
