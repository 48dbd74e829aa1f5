from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.statistics.fisher_information import fisher, next_tokens
from map_bo.operators.statistics.statistics import Statistics
from map_bo.rng import make_generator
from tests.merging.small_models import build

X = torch.randn(23, 5, generator=make_generator(0))
Y = torch.randint(0, 3, (23,), generator=make_generator(1))


def tensors(found: Statistics) -> dict[str, Tensor]:
    return {name: found.tensors.load(name) for name in found.tensors.names}


def close(found: Statistics, expected: dict[str, Tensor], tolerance: float = 1e-4) -> bool:
    assert tensors(found).keys() == expected.keys()
    return all(
        torch.allclose(tensor, expected[name], rtol=tolerance, atol=1e-3 * tolerance)
        for name, tensor in tensors(found).items()
    )


def by_hand(model: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the Fisher from one gradient an example and class, with ``weights`` (``n x K``)."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(len(x)):
        for k in range(weights.shape[1]):
            model.zero_grad()
            model(x[i : i + 1]).log_softmax(-1)[0, k].backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                total[name] += weights[i, k] * p.grad**2 / len(x)
    return total


def test_of_softmax_regression_it_is_the_formula() -> None:
    model = nn.Linear(5, 3)
    p = model(X).softmax(-1).detach()
    # d log p_k / d W_jl = (1[k = j] - p_j) x_l, whose square has the mean p_j (1 - p_j) x_l^2.
    spread = p * (1 - p)
    expected = {
        "weight": torch.einsum("nj,nl->jl", spread, X**2) / len(X),
        "bias": spread.mean(0),
    }
    assert close(fisher(model, [X[:10], X[10:]]), expected)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("labels", ["exact", "given"])
def test_it_is_the_mean_square_of_single_gradients(labels: str, chunk: int | None) -> None:
    model = build("mlp")
    weights = model(X).softmax(-1).detach() if labels == "exact" else torch.eye(3)[Y]
    found = fisher(model, [(X, Y)], labels=labels, chunk=chunk)
    assert close(found, by_hand(model, X, weights))
    assert found.settings["labels"] == labels
    assert found.examples == 23
    assert found.model == open_checkpoint(model).digest()


@given(st.lists(st.integers(1, 22), max_size=4), st.sampled_from(["exact", "given"]))
def test_batches_do_not_matter(cuts: list[int], labels: str) -> None:
    model = build("mlp")
    edges = [0, *sorted(set(cuts)), 23]
    batches = [(X[a:b], Y[a:b]) for a, b in pairwise(edges)]
    expected = tensors(fisher(model, [(X, Y)], labels=labels))
    assert close(fisher(model, batches, labels=labels), expected)


def test_sampled_labels_estimate_the_expectation() -> None:
    model = build("mlp")
    before = torch.random.get_rng_state()
    found = fisher(model, [X], labels="sampled", samples=2000, generator=make_generator(4), limit=5)
    expected = tensors(fisher(model, [X], limit=5))
    for name, tensor in tensors(found).items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 0.05
    again, other = (
        fisher(model, [X], labels="sampled", generator=make_generator(seed)).content()
        for seed in (5, 6)
    )
    same = fisher(model, [X], labels="sampled", generator=make_generator(5)).content()
    assert again == same != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_where_labels_are_certain_the_empirical_fisher_vanishes_first() -> None:
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.mul_(40)
    own = model(X).argmax(-1)
    exact, empirical = (fisher(model, [(X, own)], labels=s) for s in ("exact", "given"))
    assert float(tensors(empirical)["weight"].sum()) < float(tensors(exact)["weight"].sum())


def test_any_likelihood() -> None:
    model = nn.Linear(5, 1)
    y = torch.randn(23, generator=make_generator(2))

    def gaussian(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        result: Tensor = -0.5 * (y - model(x)[:, 0]) ** 2
        return result

    residual = (y - model(X)[:, 0]).detach()
    expected = {
        "weight": (residual[:, None] * X).square().mean(0, keepdim=True),
        "bias": residual.square().mean(0, keepdim=True),
    }
    found = fisher(model, [(X, y)], gaussian)
    assert close(found, expected)
    assert found.settings["labels"] == "given"
    assert "gaussian" in found.settings["log_likelihood"]


def test_the_model_is_left_as_it_was() -> None:
    model = build("cnn").train()
    model.get_parameter("head.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(5, 1, 6, 6, generator=make_generator(3))
    found = fisher(model, [images])
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # Frozen parameters are merged too, so they have a Fisher; buffers have none.
    assert set(found.tensors.names) == {name for name, _ in model.named_parameters()}
    assert close(fisher(model, [images], chunk=1), tensors(found))
    model.eval()
    assert close(fisher(model, [images]), tensors(found))


class Stubborn(nn.Module):
    """Looks at its values, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(x) * (2.0 if float(x.sum()) > -1e9 else 1.0)
        return result


def test_a_model_that_vmap_cannot_transform_goes_one_by_one() -> None:
    model = Stubborn()
    assert close(fisher(model, [X]), by_hand(model, X, model(X).softmax(-1).detach()))


def test_at_most_so_many_examples() -> None:
    model = build("mlp")
    found = fisher(model, [X[:10], X[10:], torch.full((3, 5), torch.nan)], limit=14)
    assert found.examples == 14
    assert close(found, tensors(fisher(model, [X[:14]])))


class TestHuggingFace:
    def model(self, kind: str) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        small = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            if kind == "gpt2":
                config = transformers.GPT2Config(
                    vocab_size=20,
                    n_positions=8,
                    n_embd=8,
                    n_layer=1,
                    n_head=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
                model: nn.Module = transformers.GPT2LMHeadModel(config)
            elif kind == "llama":
                config = transformers.LlamaConfig(
                    **small, hidden_size=8, intermediate_size=12, max_position_embeddings=8
                )
                model = transformers.LlamaForCausalLM(config)
            else:
                config = transformers.BertConfig(
                    **small, hidden_size=8, intermediate_size=12, max_position_embeddings=8
                )
                model = transformers.BertForSequenceClassification(config)
        return model.eval()

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_language_model(self, kind: str) -> None:
        model = self.model(kind)
        ids = torch.randint(1, 20, (3, 6), generator=make_generator(6))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        found = fisher(model, [{"input_ids": ids, "attention_mask": mask}], next_tokens)
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i, length in enumerate((6, 4, 6)):
            model.zero_grad()
            text = ids[i : i + 1, :length]
            # The library's own loss is the mean over the predicted tokens.
            (-model(input_ids=text, labels=text).loss * (length - 1)).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    expected[name] += p.grad**2 / 3
        assert close(found, expected, 1e-3)
        labels = torch.where(mask.bool(), ids, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        assert close(fisher(model, [batch], next_tokens), tensors(found), 1e-3)

    def test_classifier(self) -> None:
        model = self.model("bert")
        ids = torch.randint(1, 20, (4, 6), generator=make_generator(6))
        found = fisher(model, [{"input_ids": ids, "labels": torch.zeros(4).long()}])

        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Tensor) -> Tensor:
                return self.model(input_ids=ids).logits  # type: ignore[no-any-return]

        weights = model(input_ids=ids).logits.softmax(-1).detach()
        expected = by_hand(Logits(), ids, weights)
        assert close(found, {n.removeprefix("model."): t for n, t in expected.items()}, 1e-3)


def test_mistakes() -> None:
    model = build("mlp")

    def refused(match: str, batches: Any, *args: Any, **settings: Any) -> None:
        with pytest.raises(MergeError, match=match) as caught:
            fisher(model, batches, *args, **settings)
        assert caught.value.hint

    refused("there were no batches", [])
    refused("there were no batches", iter([X[:0]]))
    refused("mapping, got a int", [3])
    refused("a batch is empty", [()])
    refused(r"entry 'texts' of a batch is a list", [{"texts": ["a", "b"]}])
    refused(r"same number of rows, got \[3, 5\]", [(X[:5], Y[:3])])
    refused("a batch has no labels", [X], labels="given")
    refused("do not name one of 3 classes", [(X, Y + 1)], labels="given")
    refused("labels must .* got 'best'", [X], labels="best")
    refused("without a generator", [X], labels="sampled")
    refused("samples and chunk must be at least 1, got 0", [X], samples=0)
    refused("limit must .* got 0", [X], limit=0)
    refused("NaN or infinite", [torch.full((2, 5), torch.nan)])
    refused("the log-likelihood of 2 examples is", [X[:2]], lambda model, batch: model(*batch))
    refused(
        "the log-likelihood of 2 examples is", [X[:2]], lambda model, batch: model(*batch).mean()
    )
    refused("needs the logits", [X], lambda model, batch: model(*batch)[:, 0], labels="exact")
    for chunk in (None, 1):
        refused("depends on the weights", [X], lambda model, batch: batch[0].sum(1), chunk=chunk)
    refused("NaN or infinity in", [X], lambda model, batch: (model(*batch) * 0).sum(1).sqrt())
    with pytest.raises(MergeError, match=r"returns \[1, 4, 6\]"):
        fisher(build("tied"), [torch.zeros(1, 4).long()])
