from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.align.conform import (
    align_experts,
    changes_told,
    conformed_of,
    head_tensors,
    is_constant,
)
from map_bo.merging.align.experts import align_names
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint

State = dict[str, Tensor]


def state(seed: int = 0, **further: Tensor) -> State:
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    shapes = {"emb.weight": (7, 4), "layers.0.fc.weight": (4, 4), "layers.1.fc.weight": (4, 4)}
    made = {n: torch.randn(s, generator=base) for n, s in shapes.items()}
    if seed:
        made = {n: v + 0.01 * torch.randn(v.shape, generator=generator) for n, v in made.items()}
    return {**made, **further}


def align(base: State, *experts: State, **settings: str) -> tuple[Checkpoint, list[Checkpoint]]:
    opened = open_checkpoint(base)
    given = {f"e{i}": open_checkpoint(expert) for i, expert in enumerate(experts)}
    return opened, list(align_experts(given, opened, **settings).values())  # type: ignore[arg-type]


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def test_what_fits_is_returned_as_it_is() -> None:
    opened = open_checkpoint(state())
    expert = open_checkpoint(state(1))
    assert align_experts({"e": expert}, opened)["e"] is expert


def test_a_prefix_is_read_away_and_the_digest_stays() -> None:
    own = state(1)
    base, (found,) = align(state(), prefixed(own, "module."))
    assert found.names == base.names
    assert torch.equal(found.load("emb.weight"), own["emb.weight"])
    assert torch.equal(found.read("emb.weight", 3, 9), own["emb.weight"].flatten()[3:9])
    assert found.digest() == open_checkpoint(prefixed(own, "module.")).digest()
    assert found.vocabulary_changes["removed"] == "module."


def test_constant_buffers_come_from_the_base_whoever_has_them() -> None:
    ids, frequencies = torch.arange(9)[None], torch.linspace(1, 0.1, 4)
    buffers = {"emb.position_ids": ids, "layers.0.rotary.inv_freq": frequencies}
    base, (found,) = align(state(0, **buffers), state(1))
    assert set(found.names) == set(base.names)
    assert torch.equal(found.load("emb.position_ids"), ids)
    base, (found,) = align(state(), state(1, **buffers))
    assert set(found.names) == set(base.names)
    assert found.vocabulary_changes["left_out"] == sorted(buffers)
    _, (found,) = align(
        state(0, **buffers), state(1, **{**buffers, "emb.position_ids": ids.half()})
    )
    assert found.dtype("emb.position_ids") == torch.int64


def test_other_rotary_frequencies_are_refused() -> None:
    name = "layers.0.rotary.inv_freq"
    with pytest.raises(MergeError, match=r"inv_freq.*rotary settings"):
        align(
            state(0, **{name: torch.tensor([1.0, 0.1])}),
            state(1, **{name: torch.tensor([1.0, 0.2])}),
        )
    rounded = torch.tensor([1.0, 0.1]).bfloat16()
    align(state(0, **{name: torch.tensor([1.0, 0.1])}), state(1, **{name: rounded}))


def test_what_only_experts_have_is_their_head() -> None:
    heads = [
        {"classifier.weight": torch.ones(n, 4), "classifier.bias": torch.ones(n)} for n in (2, 5)
    ]
    base, found = align(
        state(), *(prefixed(state(i + 1), "bert.") | h for i, h in enumerate(heads))
    )
    for expert, head in zip(found, heads, strict=True):
        assert expert.names == base.names
        got = head_tensors(expert)
        assert got.keys() == head.keys()
        assert all(torch.equal(got[name], head[name]) for name in head)


def test_an_output_layer_of_another_width_is_a_head_of_every_expert() -> None:
    def with_head(seed: int, width: int) -> State:
        return state(seed, **{"score.weight": torch.full((width, 4), float(seed))})

    base, found = align(with_head(0, 3), with_head(1, 2), with_head(2, 3))
    for seed, expert in enumerate(found, start=1):
        assert torch.equal(expert.load("score.weight"), base.load("score.weight"))
        assert float(head_tensors(expert)["score.weight"][0, 0]) == seed


@pytest.mark.parametrize(
    "further",
    [
        {"layers.2.fc.weight": torch.ones(4, 4)},  # a deeper model
        {"layers.0.fc.bias": torch.ones(4)},  # another architecture
        {"layers.0.adapter.down.weight": torch.ones(2, 4)},
        {"bare": torch.ones(4)},
    ],
)
def test_other_architectures_are_not_heads(further: State) -> None:
    base, (found,) = align(state(), state(1, **further))
    with pytest.raises(MergeError, match="has 1 tensors that the base lacks"):
        align_names(base, found, "e")


def test_missing_tensors_are_the_bases_only_on_request() -> None:
    pooler = {"pooler.weight": torch.ones(4, 4)}
    base, (found,) = align(state(0, **pooler), state(1))
    with pytest.raises(MergeError, match=r"lacks 1 of the base's tensors: pooler.weight") as caught:
        align_names(base, found, "e")
    assert "missing='base'" in str(caught.value.hint)
    base, (found,) = align(state(0, **pooler), state(1), missing="base")
    assert align_names(base, found, "e").keys() == set(base.names)
    assert torch.equal(found.load("pooler.weight"), pooler["pooler.weight"])
    with pytest.raises(MergeError, match="missing must be 'refuse' or 'base', got 'zero'"):
        align(state(), state(1), missing="zero")


def test_the_prefix_that_does_not_help_is_named() -> None:
    wrong = {f"trunk.{i}.v": torch.ones(3) for i in range(3)}
    with pytest.raises(MergeError, match=r"lacks 3 of the base's tensors: .*begin with 'trunk.'"):
        align(state(), wrong, missing="base")


def test_a_copy_of_the_tied_embedding_is_left_out() -> None:
    own = {"embed_tokens.weight": torch.ones(7, 4)}
    base, (found,) = align(
        state(0, **{"embed_tokens.weight": torch.zeros(7, 4)}),
        state(1, **own, **{"lm_head.weight": torch.ones(7, 4)}),
    )
    assert found.names == base.names
    base, (found,) = align(
        state(0, **{"embed_tokens.weight": torch.zeros(7, 4)}),
        state(1, **own, **{"lm_head.weight": torch.full((7, 4), 2.0)}),
    )
    with pytest.raises(MergeError, match=r"lm_head.weight"):
        align_names(base, found, "e")


def test_all_that_was_done_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    head = {"head.weight": torch.ones(2, 4)}
    base = state(0, position_ids=torch.arange(3), **{"pooler.weight": torch.ones(4, 4)})
    with caplog.at_level(logging.INFO, "map_bo"):
        _, (found,) = align(base, prefixed(state(1), "m.") | head, missing="base")
    for word in ("'m.' removed", "position_ids", "head.weight", "pooler.weight"):
        assert word in caplog.text
    (warned,) = (one for one in caplog.records if one.levelno >= logging.WARNING)
    assert "pooler.weight" in warned.getMessage()  # what loses nothing is a note
    assert len(list(changes_told(found.vocabulary_changes))) == 4
    again = align_experts({"e": found}, open_checkpoint(base))["e"]
    assert again is found
    assert conformed_of(again) is found


def test_constant_names() -> None:
    square, flat = torch.Size([1, 1, 8, 8]), torch.Size([8])
    assert is_constant("h.0.attn.bias", square)
    assert not is_constant("h.0.attn.bias", flat)  # a parameter of other models
    assert is_constant("bert.embeddings.position_ids", flat)
    assert not is_constant("emb.position_embeddings.weight", square)


class TestSinusoidalPositions:
    """Older files have them, newer ones of the same model leave them out."""

    def table(self) -> Tensor:
        angles = torch.arange(12.0)[:, None] / 10_000 ** (torch.arange(4) / 4)
        return torch.cat([angles.sin(), angles.cos()], 1)

    @pytest.mark.parametrize("name", ["encoder.embed_positions.weight", "pos_embed"])
    def test_they_come_from_the_base_whoever_has_them(self, name: str) -> None:
        table = self.table()
        base, (found,) = align(state() | {name: table}, state(1))
        assert found.names == base.names
        assert torch.equal(found.load(name), table)
        base, (found,) = align(state(), state(1) | {name: table})
        assert found.names == base.names

    def test_trained_positions_are_missing(self) -> None:
        table = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
        _, (found,) = align(state() | {"embed_positions.weight": table}, state(1))
        assert "embed_positions.weight" not in found.names  # and whoever merges refuses it
