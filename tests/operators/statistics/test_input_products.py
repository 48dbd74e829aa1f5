from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.statistics.input_products import grams, linear_layers
from map_bo.rng import make_generator
from tests.merging.small_models import build

X = torch.randn(23, 5, generator=make_generator(0))
Y = torch.zeros(23)


def test_of_a_network_they_are_those_of_each_layers_input() -> None:
    model = build("mlp").train()
    found = grams(model, [(X[:9], Y[:9]), (X[9:], Y[9:])], data="points")
    hidden = model.get_submodule("first")(X).tanh().detach()
    assert set(found.tensors.names) == {"first.weight", "last.weight"}
    for name, rows in {"first.weight": X, "last.weight": hidden}.items():
        expected = rows.T @ rows / 23
        assert torch.allclose(found.tensors.load(name), expected, rtol=1e-5, atol=1e-5)
    assert found.settings["rows"] == {"first.weight": 23, "last.weight": 23}
    assert (found.kind, found.examples, found.data) == ("grams", 23, "points")
    assert found.model == open_checkpoint(model).digest()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@given(st.integers(1, 22))
def test_batches_do_not_matter(cut: int) -> None:
    model = build("mlp")
    one, two = grams(model, [X]), grams(model, [X[:cut], X[cut:]])
    for name in one.tensors.names:
        a, b = one.tensors.load(name), two.tensors.load(name)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's own remark
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (0, 1)},
        {"kernel_size": 2, "padding": "same"},
    ],
    ids=str,
)
def test_of_a_convolution_they_tell_its_output(settings: dict[str, Any]) -> None:
    """The squared norm of what a convolution gives is that of its weight under ``G``."""
    conv = nn.Conv2d(3, 4, bias=False, **settings)
    images = torch.randn(6, 3, 7, 8, generator=make_generator(3))
    found = grams(conv, [images])
    w = conv.weight.detach().flatten(1)
    out = conv(images).detach()
    assert found.settings["rows"]["weight"] == 6 * out.shape[2] * out.shape[3]
    expected = out.square().mean((0, 2, 3))
    assert torch.allclose(
        torch.einsum("oi,ij,oj->o", w, found.tensors.load("weight"), w), expected, rtol=1e-4
    )


def test_layers_that_are_left_out() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(2, 4, 1, groups=2)
            self.reflected = nn.Conv2d(2, 4, 1, padding=1, padding_mode="reflect")
            self.used = nn.Linear(5, 5)
            self.unused = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(self.used(x))
            return result

    model = Several()
    assert set(linear_layers(model)) == {"used.weight", "unused.weight"}
    found = grams(model, [X])
    assert found.tensors.names == ("used.weight",)
    assert found.settings["rows"] == {"used.weight": 46}  # it is gone through twice
    rows = torch.cat([X, model.used(X)]).detach()
    assert torch.allclose(found.tensors.load("used.weight"), rows.T @ rows / 46, atol=1e-5)
    # An output layer that is the embedding is no regression.
    assert set(linear_layers(build("tied"))) == {"middle.weight"}


def test_fewer_layers_and_examples() -> None:
    found = grams(build("mlp"), [X], only="^last", limit=7)
    assert found.tensors.names == ("last.weight",)
    assert found.examples == 7


class TestHuggingFace:
    def model(self) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=20,
            n_positions=8,
            n_embd=8,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model

    def test_transposed_layers_and_padding(self) -> None:
        model = self.model()
        ids = torch.randint(1, 20, (3, 6), generator=make_generator(6))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        found = grams(model, [{"input_ids": ids, "attention_mask": mask}])
        block = "transformer.h.0."
        names = [
            f"{block}{x}.weight" for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ]
        assert sorted(found.tensors.names) == names
        assert sorted(found.settings["transposed"]) == names
        assert found.settings["rows"] == dict.fromkeys(names, 16)
        shapes = {name: list(found.tensors.shape(name)) for name in names}
        assert shapes == {name: [n, n] for name, n in zip(names, (8, 8, 8, 32), strict=True)}
        # Without the positions of padding, it is what the texts give alone.
        alone = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate((6, 4, 6))]
        for name in names:
            a, b = found.tensors.load(name), grams(model, alone).tensors.load(name)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_mistakes() -> None:
    model = build("mlp")

    def refused(match: str, *args: Any, **settings: Any) -> None:
        with pytest.raises(MergeError, match=match) as caught:
            grams(*args, **settings)
        assert caught.value.hint

    refused("there were no batches", model, [])
    refused("no linear layers", nn.Sequential(nn.LayerNorm(5)), [X])
    refused("no layer's weight has 'middle'", model, [X], only="middle")
    refused("NaN or infinity in first.weight, last.weight", model, [X * torch.nan])
    refused("no batch went through", model, [X], lambda model, batch: None)


class Attending(nn.Module):
    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 2) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x)[0])  # type: ignore[no-any-return]


def test_layers_that_torchs_attention_never_calls_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = [(torch.ones(2, 3, 6), torch.zeros(2))]
    with caplog.at_level(logging.WARNING, "map_bo"):
        found = grams(Attending(last=True), batches)
    assert set(found.tensors.names) == {"last.weight"}
    assert "the inputs of attention.out_proj.weight are not seen" in caplog.text
    with pytest.raises(MergeError, match="MultiheadAttention uses the weights"):
        grams(Attending(last=False), batches)
