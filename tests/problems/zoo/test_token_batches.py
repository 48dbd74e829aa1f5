from __future__ import annotations

import pytest
import torch
from torch import nn

from map_bo.problems.zoo.pretrained import load_pretrained
from map_bo.problems.zoo.token_batches import Tokens, features, token_losses
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
