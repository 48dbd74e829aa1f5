from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import evaluator_from
from map_bo.evaluators.perplexity import Perplexity, windows
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.tiny_language import tiny_decoder, tiny_encoder_decoder, tiny_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ran far, far away", "yes", "two or three, no? " * 9]


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> nn.Module:
    return tiny_decoder(len(tokenizer), positions=64)  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return str(tmp_path / "texts.txt")


def by_hand(model: nn.Module, ids: list[int]) -> Tensor:
    """The losses of all tokens but the first, read at once."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("measure", ["loss", "perplexity", "bits_per_byte"])
class TestPerplexity(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, measure: Any, path: str, tokenizer: Any) -> ExampleEvaluator:
        unit: Any = "document" if measure == "perplexity" else "token"
        return Perplexity(
            data=path, tokenizer=tokenizer, measure=measure, unit=unit, batch_size=3, max_length=32
        )

    @pytest.fixture
    def model(self, tokenizer: Any) -> nn.Module:
        return tiny_decoder(len(tokenizer))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_are_those_of_the_model(kind: str, tokenizer: Any, path: str) -> None:
    model = tiny_decoder(len(tokenizer), kind=kind, positions=256)
    evaluator = Perplexity(data=path, tokenizer=tokenizer)
    evaluator.prepare(model)
    outcomes = evaluator.score(model, torch.arange(4))
    for text, outcome in zip(TEXTS, outcomes.tolist(), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        assert outcome == pytest.approx(float(by_hand(model, ids).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_changes_nothing(kind: str, tokenizer: Any, path: str) -> None:
    model = tiny_decoder(len(tokenizer), kind=kind, positions=64)
    found = []
    for batch_size in (1, 3, 100):
        evaluator = Perplexity(data=path, tokenizer=tokenizer, batch_size=batch_size)
        evaluator.prepare(model)
        found.append(evaluator.score(model, torch.arange(4)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)


def test_long_documents_are_read_in_windows_with_context(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    evaluator = Perplexity(data=path, tokenizer=tokenizer, max_length=20, stride=15)
    evaluator.prepare(model)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXTS[3])["input_ids"]]
    assert len(ids) > 64  # more than the model can read
    expected, start, done = [], 0, 1
    while done < len(ids):
        part = ids[start : start + 20]
        expected += by_hand(model, part)[done - start - 1 :].tolist()
        start, done = start + 15, start + len(part)
    assert len(expected) == len(ids) - 1
    losses = evaluator.token_losses(model, 3)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)
    assert int(evaluator.tokens[3]) == len(losses)
    assert float(evaluator.score(model, torch.tensor([3]))) == pytest.approx(float(losses.mean()))


@pytest.mark.parametrize(("most", "stride"), [(2, 1), (5, 4), (6, 3), (6, 1), (100, 50)])
@pytest.mark.parametrize("length", [2, 3, 6, 7, 30])
def test_windows_score_every_token_once(length: int, most: int, stride: int) -> None:
    found = windows(length, most=most, stride=stride)
    scored = [token for one in found for token in range(one.first, one.stop)]
    assert scored == list(range(1, length))
    for one in found:
        assert one.stop - one.start <= most
        assert one.first - one.start >= (most - stride if one.start else 1)


def test_every_token_counts_the_same_or_every_document(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    by_token = Perplexity(data=path, tokenizer=tokenizer)
    by_document = Perplexity(data=path, tokenizer=tokenizer, unit="document")
    for evaluator in (by_token, by_document):
        evaluator.prepare(model)
    losses = [by_token.token_losses(model, item) for item in range(4)]
    seen = by_token(model)["loss"]
    assert seen.value == pytest.approx(float(torch.cat(losses).mean()))
    assert seen.count == 4
    means = torch.stack([one.mean() for one in losses])
    assert by_document(model)["loss"].value == pytest.approx(float(means.mean()))
    assert by_document(model)["loss"].variance == pytest.approx(float(means.var()) / 4)


def test_perplexity_and_bits_follow_from_the_loss(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    found = {}
    measures: list[Any] = ["loss", "perplexity", "bits_per_byte"]
    for measure in measures:
        evaluator = Perplexity(data=path, tokenizer=tokenizer, measure=measure)
        evaluator.prepare(model)
        found[measure] = evaluator(model)[measure]
        tokens = float(evaluator.tokens.sum())
        assert evaluator.metrics[0].direction == "min"
    loss, perplexity = found["loss"], found["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(loss.value))
    assert loss.variance is not None
    assert perplexity.variance == pytest.approx(perplexity.value**2 * loss.variance)
    size = sum(len(text.encode()) for text in TEXTS)
    bits = loss.value * tokens / math.log(2) / size
    assert found["bits_per_byte"].value == pytest.approx(bits)


def test_without_a_token_for_the_beginning_the_first_is_not_scored(
    model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("the cat sat\nyes no")
    tokenizer = tiny_tokenizer(bos=False)
    evaluator = Perplexity(data=str(path), tokenizer=tokenizer)
    evaluator.prepare(model)
    ids = tokenizer("the cat sat")["input_ids"]
    assert evaluator.tokens.tolist()[0] == len(ids) - 1
    losses = evaluator.token_losses(model, 0)
    torch.testing.assert_close(losses, by_hand(model, ids), rtol=1e-4, atol=1e-5)
    bits = Perplexity(data=str(path), tokenizer=tokenizer, measure="bits_per_byte")
    bits.prepare(model)
    outcome = float(bits.score(model, torch.tensor([0])))
    assert outcome == pytest.approx(float(losses.sum()) / math.log(2) / len(" cat sat"))
    with pytest.raises(EvaluationError, match="no token for the beginning"):
        Perplexity(data=str(path), tokenizer=tokenizer, bos=True).prepare(model)
    off = Perplexity(data=str(path), tokenizer=tiny_tokenizer(), bos=False)
    off.prepare(model)
    assert off.tokens.tolist() == evaluator.tokens.tolist()


def test_some_outcomes_need_to_say_whose_they_are(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    evaluator = Perplexity(data=path, tokenizer=tokenizer)
    evaluator.prepare(model)
    items = torch.tensor([3, 0])
    some = evaluator.score(model, items)
    with pytest.raises(EvaluationError, match="2 outcomes of 4 documents"):
        evaluator.summary(some)
    losses = [evaluator.token_losses(model, item) for item in (3, 0)]
    assert evaluator.summary(some, items)["loss"].value == pytest.approx(
        float(torch.cat(losses).mean())
    )


def test_what_does_not_fit_is_refused(tokenizer: Any, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": ""}\n{"text": "yes"}')

    def refused(wanted: str, model: nn.Module = model, **settings: Any) -> None:
        with pytest.raises(EvaluationError, match=wanted):
            Perplexity(data=str(path), tokenizer=tokenizer, **settings).prepare(model)

    refused("1 of 3 documents of .* have no token to predict, such as row 2")
    refused("max_length is 65, and the model reads 64", max_length=65)
    refused("stride is 64, and a window has 64 tokens", stride=64)
    refused("the model embeds 100", tiny_decoder(100))
    refused("T5ForConditionalGeneration is not one", tiny_encoder_decoder(len(tokenizer)))
    refused("LlamaModel is not one", model.get_submodule("model"))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"unit": "word"}, "unit must be one of token, document, got 'word'"),
        ({"measure": "bits"}, "measure must be one of"),
        ({"max_length": 1}, "max_length must be"),
        ({"max_length": 8, "stride": 8}, "stride must be a whole number from 1 to 7, got 8"),
        ({"bos": "yes"}, "bos must be true or false"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        Perplexity(data="texts.txt", **settings)


def test_the_digest_follows_what_decides_the_measurement(
    tokenizer: Any, model: nn.Module, path: str
) -> None:
    digests = []
    changes: list[dict[str, Any]] = [
        {},
        {"unit": "document"},
        {"max_length": 32},
        {"measure": "perplexity"},
    ]
    for settings in changes:
        evaluator = Perplexity(data=path, tokenizer=tokenizer, **settings)
        evaluator.prepare(model)
        digests.append(evaluator.digest)
    assert len(set(digests)) == len(changes)


def test_a_configuration_makes_one() -> None:
    evaluator = evaluator_from(
        "t", {"kind": "perplexity", "data": "texts.txt", "unit": "document", "bos": False}
    )
    assert isinstance(evaluator, Perplexity)
    assert (evaluator.data.path, evaluator.unit, evaluator.bos) == ("texts.txt", "document", False)
