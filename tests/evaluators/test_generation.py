from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.generation import Generation, fill
from map_bo.evaluators.kinds import code_in, evaluator_from
from map_bo.evaluators.perplexity import Perplexity
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.surroundings import surroundings
from tests.evaluators.tiny_language import (
    draw_weights,
    tiny_decoder,
    tiny_encoder_decoder,
    tiny_tokenizer,
)

PROMPTS = ["the cat", "a dog ran far away on", "y", "two or three", "mat!"]


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> nn.Module:
    return tiny_decoder(len(tokenizer))  # type: ignore[no-any-return]


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return written(tmp_path, [{"prompt": one, "target": "yes"} for one in PROMPTS])


def writes(text: str, after: str, tokenizer: Any, *, end: bool = True) -> Any:
    """A decoder that writes a text of different characters after a character, and then ends."""
    rows = len(tokenizer)
    model = tiny_decoder(rows)
    ids = tokenizer(after + text)["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.zero_()  # the layers pass on what they get
        width = model.config.hidden_size
        codes = torch.randn(rows, width, generator=make_generator(1))
        codes = codes / codes.norm(dim=-1, keepdim=True)
        model.get_input_embeddings().weight.copy_(codes)
        head = torch.zeros(rows, width)
        for now, then in itertools.pairwise(ids):
            head[then] += codes[now]
        model.lm_head.weight.copy_(head * 10)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
class TestGeneration(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, path: str, tokenizer: Any, temperature: float) -> ExampleEvaluator:
        return Generation(
            data=path,
            tokenizer=tokenizer,
            max_new_tokens=5,
            batch_size=2,
            temperature=temperature,
            grader=lambda answer, target: (len(answer) % 7) / 7,
        )

    @pytest.fixture
    def model(self, tokenizer: Any) -> nn.Module:
        return tiny_decoder(len(tokenizer))  # type: ignore[no-any-return]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_batch_changes_no_answer(
    kind: str, temperature: float, tokenizer: Any, path: str
) -> None:
    rows = len(tokenizer)
    model = tiny_encoder_decoder(rows) if kind == "t5" else tiny_decoder(rows, kind=kind)
    found = []
    for batch_size in (1, 2, 5):
        evaluator = Generation(
            data=path, tokenizer=tokenizer, temperature=temperature, max_new_tokens=6,
            batch_size=batch_size,
        )  # fmt: skip
        evaluator.prepare(model)
        found.append([(one.text, one.tokens) for one in evaluator.answers(model, range(5))])
    assert found[0] == found[1] == found[2]
    assert len({text for text, _ in found[0]}) > 1


def test_greedy_answers_are_the_likeliest_tokens(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    evaluator = Generation(data=path, tokenizer=tokenizer, max_new_tokens=6)
    evaluator.prepare(model)
    for prompt, answer in zip(PROMPTS, evaluator.answers(model, range(5)), strict=True):
        ids, start = tokenizer(prompt)["input_ids"], len(tokenizer(prompt)["input_ids"])
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(ids[start:])
        assert answer.tokens == 6


def test_an_answer_ends_at_its_end_and_at_stop_strings(tokenizer: Any, path: str) -> None:
    model = writes("bcdefg", "a", tokenizer)
    path_of_one = Path(path).with_name("one.jsonl")
    path_of_one.write_text('{"prompt": "a", "target": "bcdefg"}\n{"prompt": "c", "target": "de"}')

    def answers(**settings: Any) -> list[tuple[str, int]]:
        evaluator = Generation(data=str(path_of_one), tokenizer=tokenizer, **settings)
        evaluator.prepare(model)
        return [(one.text, one.tokens) for one in evaluator.answers(model, [0, 1])]

    assert answers() == [("bcdefg", 7), ("defg", 5)]  # with the token that ends it
    assert answers(stop="de") == [("bc", 4), ("", 2)]
    assert answers(stop=["x", "ef"]) == [("bcd", 5), ("d", 3)]
    assert answers(max_new_tokens=3) == [("bcd", 3), ("def", 3)]
    assert answers(stop="</s>") == [("bcdefg", 7), ("defg", 5)]


def test_one_call_measures_score_and_tokens(tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, [{"prompt": "a", "target": "bcd"}, {"prompt": "b", "target": "no"}])
    model = writes("bcd", "a", tokenizer)
    evaluator = Generation(
        data=path, tokenizer=tokenizer, metrics=["tokens", "score", "seconds"], batch_size=1
    )
    assert evaluator.metrics[0] == Metric("tokens", direction="min", kind="loss")
    evaluator.prepare(model)
    seen = evaluator(model)
    assert (seen["score"].value, seen["score"].count) == (0.5, 2)
    assert seen["tokens"].value == 3.5
    assert 0 < seen["seconds"].value < 10
    alone = Generation(data=path, tokenizer=tokenizer, metrics="score")
    alone.prepare(model)
    assert alone.score(model, torch.tensor([1, 0])).tolist() == [0.0, 1.0]


def test_answers_of_one_length_do_not_say_that_it_is_exact(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    evaluator = Generation(data=path, tokenizer=tokenizer, max_new_tokens=3)
    evaluator.prepare(model)
    assert evaluator(model)["tokens"] == Measurement(3.0, count=5)


def test_draws_are_those_of_the_distribution(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_decoder(len(tokenizer), scale=0.05)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        logits = model(input_ids=torch.tensor([tokenizer("a")["input_ids"]])).logits
    assert float(logits.abs().max()) == 0  # every token is as likely
    path = written(tmp_path, [{"prompt": "a", "target": "b"}] * 400)
    seen: dict[int | None, set[str]] = {}
    for top_k in (None, 1):
        evaluator = Generation(
            data=path, tokenizer=tokenizer, temperature=1, max_new_tokens=1, batch_size=400,
            top_p=0.5 if top_k is None else None, top_k=top_k,
        )  # fmt: skip
        evaluator.prepare(model)
        seen[top_k] = {one.text for one in evaluator.answers(model, range(400))}
    assert 50 < len(seen[None]) <= 62  # half of 122 tokens are enough for half the probability


def test_seeds_decide_the_draws(tokenizer: Any, model: nn.Module, path: str) -> None:
    def texts(seed: int) -> list[str]:
        evaluator = Generation(
            data=path, tokenizer=tokenizer, temperature=1, max_new_tokens=6, seed=seed
        )
        evaluator.prepare(model)
        return [one.text for one in evaluator.answers(model, range(5))]

    before = surroundings()
    assert texts(0) == texts(0) != texts(1)
    assert surroundings() == before


def test_penalties_of_the_model_are_not_used(tokenizer: Any, path: str) -> None:
    model = tiny_decoder(len(tokenizer))
    evaluator = Generation(data=path, tokenizer=tokenizer, max_new_tokens=6)
    evaluator.prepare(model)
    plain = [one.text for one in evaluator.answers(model, range(5))]
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    assert [one.text for one in evaluator.answers(model, range(5))] == plain


def test_templates_name_roles(tokenizer: Any, model: nn.Module, tmp_path: Path) -> None:
    assert fill("{{a}} {a}{b}", {"a": "{b}", "b": "2"}) == "{a} {b}2"
    path = written(tmp_path, [{"Q": "the cat", "hint": "sat", "A": "yes"}])
    evaluator = Generation(
        data={"path": path, "columns": {"question": "Q", "target": "A"}},
        tokenizer=tokenizer,
        template="{hint}: {question}?",
    )
    evaluator.prepare(model)
    assert tokenizer.decode(evaluator._known.ids[0]) == "sat: the cat?"
    with pytest.raises(EvaluationError, match="no column 'question'"):
        Generation(data=path, tokenizer=tokenizer, template="{question}").prepare(model)


def test_prompts_begin_as_the_tokenizer_says(model: nn.Module, path: str) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True, chat=True)
    evaluator = Generation(data=path, tokenizer=tokenizer)
    evaluator.prepare(model)
    assert tokenizer.decode(evaluator._known.ids[0]) == "<s>the cat"
    chat = Generation(data=path, tokenizer=tokenizer, chat_template=True, system="no")
    chat.prepare(model)
    assert tokenizer.decode(chat._known.ids[0]) == "[system]no[user]the cat[assistant]"
    assert chat.digest != evaluator.digest


def test_what_does_not_fit_is_refused(tokenizer: Any, model: nn.Module, path: str) -> None:
    def refused(wanted: str, model: nn.Module = model, **settings: Any) -> None:
        with pytest.raises(EvaluationError, match=wanted):
            Generation(**{"data": path, "tokenizer": tokenizer, **settings}).prepare(model)

    refused("1 of 5 prompts of .* are longer than 10 tokens, such as row 2", max_new_tokens=118)
    refused("the tokenizer has no chat template", chat_template=True)
    refused("the model embeds 90", tiny_decoder(90))
    refused("LlamaModel cannot generate", model.get_submodule("model"))
    nested = written(Path(path).parent, [{"prompt": "a", "target": {"b": 1}}])
    refused("target in row 1 of .* is a dict", data=nested)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"template": "no roles"}, "must name roles"),
        ({"template": "{prompt} {target}"}, "must name roles"),
        ({"template": 3}, "must be text"),
        ({"system": "Be brief."}, "without the chat template"),
        ({"stop": [""]}, "stop strings must be text"),
        ({"pattern": "(a"}, "not a regular expression"),
        ({"which": "second"}, "which must be one of first, last"),
        ({"pattern_seconds": 0}, "pattern_seconds must be"),
        ({"grader": "nowhere"}, "grader must be a function"),
        ({"metrics": ["score", "length"]}, "does not measure 'length'"),
        ({"metrics": []}, "metrics must be different ones"),
        ({"top_k": 5}, "the temperature is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        Generation(data="questions.jsonl", **settings)


def test_a_configuration_makes_one(path: str) -> None:
    settings = {
        "kind": "generation",
        "data": {"path": path, "limit": 3},
        "grader": "statistics:correlation",
        "stop": ["x"],
        "metrics": ["score"],
    }
    assert list(code_in("t", settings)) == [("t.grader", "statistics:correlation")]
    evaluator = evaluator_from("t", settings)
    assert isinstance(evaluator, Generation)
    grader: object = evaluator.grading.grader
    assert grader is statistics.correlation
    assert evaluator.data.limit == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen2", "Gemma2", "GPTNeoX", "OPT", "Bloom", "Mamba", "Mixtral"])
def test_batches_change_nothing_in_other_architectures(
    kind: str, tokenizer: Any, path: str
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "Gemma2": {"head_dim": 8, "sliding_window": 4, "num_key_value_heads": 1},
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "Bloom": {"n_layer": 2, "n_head": 2},
        "Mixtral": {"num_local_experts": 2, "num_key_value_heads": 1},
        "Qwen2": {"num_key_value_heads": 1},
    }
    config = transformers.AutoConfig.for_model(
        {"GPTNeoX": "gpt_neox"}.get(kind, kind.lower()),
        **{**({} if kind in ("Bloom", "Mamba") else sizes), "hidden_size": 16, **own.get(kind, {})},
        vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw_weights(model, 0, 0.3)
    texts, losses = [], []
    for batch_size in (1, 5):
        writer = Generation(data=path, tokenizer=tokenizer, max_new_tokens=6, batch_size=batch_size)
        writer.prepare(model)
        texts.append([one.text for one in writer.answers(model, range(5))])
        reader = Perplexity(
            data={"path": path, "columns": {"text": "prompt"}},
            tokenizer=tokenizer,
            batch_size=batch_size,
        )
        reader.prepare(model)
        losses.append(reader.score(model, torch.arange(5)))
    assert texts[0] == texts[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "repeats"),
    [
        ({}, True),
        ({"temperature": 0.7}, False),
        ({"metrics": ["score", "seconds"]}, False),
        ({"metrics": ["score", "tokens"]}, True),
    ],
)
def test_what_is_drawn_or_timed_does_not_repeat(settings: dict[str, Any], repeats: bool) -> None:
    assert Generation(data="prompts.csv", **settings).repeats is repeats
