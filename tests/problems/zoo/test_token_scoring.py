from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from map_bo.errors import DataError, EvaluationError
from map_bo.problems.zoo.pretrained import load_pretrained
from map_bo.problems.zoo.token_scoring import (
    HeadAccuracy,
    TokenLoss,
    Tokens,
    features,
    token_losses,
)
from map_bo.rng import make_generator
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


def test_batches_hold_every_text_once_the_longest_first() -> None:
    batches = list(TOKENS.batches([3, 1, 2], size=2))
    assert batches == [[2, 0], [1]]  # places in what was asked for
    rows = [row for batch in TOKENS.batches(range(4), size=3) for row in batch]
    assert sorted(rows) == [0, 1, 2, 3]


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


def head(encoder: nn.Module, labels: list[int]) -> HeadAccuracy:
    weight = torch.randn(3, 16, generator=make_generator(1))
    return HeadAccuracy(TOKENS, torch.tensor(labels), weight, torch.tensor([0.0, 0.3, -0.2]))


def test_accuracy_is_the_mean_of_its_outcomes(encoder: nn.Module) -> None:
    with torch.no_grad():
        own = features(encoder, *TOKENS.padded([0, 1, 2, 3]))
        given = head(encoder, [0, 0, 0, 0])
        classes = (own @ given.weight.T + given.bias).argmax(-1)
    wrong = (int(classes[2]) + 1) % 3
    evaluator = head(encoder, [int(classes[0]), int(classes[1]), wrong, int(classes[3])])
    assert evaluator.score(encoder, torch.arange(4)).tolist() == [1, 1, 0, 1]
    assert evaluator.score(encoder, torch.tensor([2, 3])).tolist() == [0, 1]
    seen = evaluator(encoder)
    assert (seen.value, seen.count) == (0.75, 4)


def test_loss_is_the_mean_of_its_outcomes(decoder: nn.Module) -> None:
    evaluator = TokenLoss(TOKENS)
    outcomes = evaluator.score(decoder, torch.arange(4))
    some = evaluator.score(decoder, torch.tensor([3, 1]))
    assert some.tolist() == pytest.approx(outcomes[[3, 1]].tolist(), abs=1e-6)
    seen = evaluator(decoder)
    assert seen.value == pytest.approx(float(outcomes.mean()))
    assert seen.variance == pytest.approx(float(outcomes.var() / 4))
    assert seen.count == 4


def test_scoring_leaves_the_model_as_it_was(encoder: nn.Module) -> None:
    encoder.train()
    head(encoder, [0, 0, 0, 0])(encoder)
    assert all(module.training for module in encoder.modules())
    encoder.eval()


def test_refuses_what_breaks(encoder: nn.Module, decoder: nn.Module, tmp_path: Path) -> None:
    broken = load_pretrained(tiny_decoder(tmp_path), "decoder")
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        TokenLoss(TOKENS)(broken)
    given = head(encoder, [0, 0, 0, 0])
    nan = HeadAccuracy(TOKENS, given.labels, given.weight * torch.nan, given.bias)
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        nan(encoder)
    with pytest.raises(DataError, match=r"2 texts have fewer than two tokens, .* text 1"):
        TokenLoss(Tokens(((1, 2), (1,), (2,))))
