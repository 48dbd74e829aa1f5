from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import EvaluationError
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.problems.zoo.pretrained import load_pretrained
from map_bo.problems.zoo.token_scoring import (
    HeadAccuracy,
    TokenLoss,
    Tokens,
    features,
    token_losses,
)
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.problems.fake_texts import tiny_decoder, tiny_encoder

TOKENS = Tokens(((2, 5, 9), (2, 7), (2, 30, 31, 32, 33), (2, 8, 8)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_pretrained(tiny_encoder(tmp_path_factory.mktemp("encoder")), "encoder")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_pretrained(tiny_decoder(tmp_path_factory.mktemp("decoder")), "decoder")


def test_padding_is_masked() -> None:
    ids, mask = TOKENS.padded([1, 0])
    assert ids.tolist() == [[2, 7, 0], [2, 5, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_features_and_losses_do_not_depend_on_the_padding(
    encoder: nn.Module, decoder: nn.Module
) -> None:
    with torch.no_grad():
        for model, measure in ((encoder, features), (decoder, token_losses)):
            together = measure(model, *TOKENS.padded([0, 1, 2]))
            alone = torch.cat([measure(model, *TOKENS.padded([row])) for row in range(3)])
            assert torch.allclose(together, alone, atol=1e-5)


def test_the_loss_is_that_of_each_next_token(decoder: nn.Module) -> None:
    with torch.no_grad():
        logits = decoder(input_ids=torch.tensor([[2, 5, 9]])).logits[0].log_softmax(-1)
        expected = -(logits[0, 5] + logits[1, 9]) / 2
        assert float(token_losses(decoder, *TOKENS.padded([0]))) == pytest.approx(float(expected))


def head(labels: list[int], *, scale: float = 1.0) -> HeadAccuracy:
    weight = scale * torch.randn(3, 16, generator=make_generator(1))
    bias = torch.tensor([0.0, 0.3, -0.2])
    return HeadAccuracy(lambda: TOKENS, torch.tensor(labels), weight, bias, batch_size=2)


class TestHeadAccuracy(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return head([0, 1, 2, 0])

    @pytest.fixture
    def model(self, encoder: nn.Module) -> nn.Module:
        return encoder


class TestTokenLoss(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return TokenLoss(lambda: TOKENS, batch_size=2)

    @pytest.fixture
    def model(self, decoder: nn.Module) -> nn.Module:
        return decoder


def test_accuracy_is_the_mean_of_its_outcomes(encoder: nn.Module) -> None:
    given = head([0, 0, 0, 0])
    with torch.no_grad():
        own = features(encoder, *TOKENS.padded([0, 1, 2, 3]))
        classes = (own @ given.weight.T + given.bias).argmax(-1).tolist()
    evaluator = head([classes[0], classes[1], (classes[2] + 1) % 3, classes[3]])
    evaluator.prepare(encoder)
    assert evaluator.score(encoder, torch.arange(4)).tolist() == [1, 1, 0, 1]
    assert evaluator.score(encoder, torch.tensor([3, 2])).tolist() == [1, 0]
    seen = evaluator(encoder)["accuracy"]
    assert (seen.value, seen.count) == (0.75, 4)


def test_loss_is_the_mean_of_its_outcomes(decoder: nn.Module) -> None:
    evaluator = TokenLoss(lambda: TOKENS)
    evaluator.prepare(decoder)
    outcomes = evaluator.score(decoder, torch.arange(4))
    with torch.no_grad():
        alone = [float(token_losses(decoder, *TOKENS.padded([row]))) for row in range(4)]
    assert outcomes.tolist() == pytest.approx(alone, abs=1e-5)
    seen = evaluator(decoder)["loss"]
    assert seen.value == pytest.approx(float(outcomes.mean()))
    assert seen.variance == pytest.approx(float(outcomes.var() / 4))
    assert evaluator.metrics[0].direction == "min"


def test_texts_of_like_lengths_are_scored_together(decoder: nn.Module) -> None:
    lengths: list[list[int]] = []

    class Watching(TokenLoss):
        def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
            lengths.append([len(TOKENS.ids[i]) for i in items.tolist()])
            return super().outcomes(model, items)

    evaluator = Watching(lambda: TOKENS, batch_size=2)
    evaluator.prepare(decoder)
    evaluator.score(decoder, torch.arange(4))
    assert lengths == [[5, 3], [3, 2]]


def test_the_digest_tells_texts_labels_and_heads(encoder: nn.Module) -> None:
    other = HeadAccuracy(
        lambda: Tokens(TOKENS.ids[:3]), torch.tensor([0, 1, 2]), torch.ones(3, 16), torch.zeros(3)
    )
    evaluators = [head([0, 1, 2, 0]), head([0, 1, 2, 1]), head([0, 1, 2, 0], scale=2), other]
    for evaluator in evaluators:
        evaluator.prepare(encoder)
    assert len({evaluator.digest for evaluator in evaluators}) == 4


def test_refuses_what_breaks(encoder: nn.Module, decoder: nn.Module) -> None:
    nan = head([0, 0, 0, 0], scale=torch.nan)
    nan.prepare(encoder)
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        nan(encoder)
    with pytest.raises(EvaluationError, match=r"2 texts have fewer than two tokens, .* text 1"):
        TokenLoss(lambda: Tokens(((1, 2), (1,), (2,)))).prepare(decoder)
