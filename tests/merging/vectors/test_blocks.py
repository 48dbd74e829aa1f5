from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.blocks import (
    Blocks,
    balanced_blocks,
    block_norms,
    kind_blocks,
    layer_blocks,
    named_blocks,
    relative_importance,
)
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.small_models import build, family

# Names as transformers and torchvision write them: part -> kind.
LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.#.input_layernorm.weight": "norm",
    "model.layers.#.mlp.down_proj.weight": "mlp",
    "model.layers.#.mlp.gate_proj.weight": "mlp",
    "model.layers.#.post_attention_layernorm.weight": "norm",
    "model.layers.#.self_attn.k_proj.weight": "attention",
    "model.layers.#.self_attn.o_proj.weight": "attention",
    "model.layers.#.self_attn.q_norm.weight": "norm",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
}
GPT2 = {
    "transformer.h.#.attn.c_attn.weight": "attention",
    "transformer.h.#.attn.c_proj.bias": "attention",
    "transformer.h.#.ln_1.weight": "norm",
    "transformer.h.#.mlp.c_fc.weight": "mlp",
    "transformer.h.#.mlp.c_proj.weight": "mlp",
    "transformer.ln_f.bias": "norm",
    "transformer.wpe.weight": "embedding",
    "transformer.wte.weight": "embedding",
}
BERT = {
    "bert.embeddings.LayerNorm.weight": "norm",
    "bert.embeddings.position_embeddings.weight": "embedding",
    "bert.embeddings.word_embeddings.weight": "embedding",
    "bert.encoder.layer.#.attention.output.LayerNorm.bias": "norm",
    "bert.encoder.layer.#.attention.output.dense.weight": "attention",
    "bert.encoder.layer.#.attention.self.query.weight": "attention",
    "bert.encoder.layer.#.intermediate.dense.weight": "mlp",
    "bert.encoder.layer.#.output.dense.bias": "mlp",
    "bert.pooler.dense.weight": "head",
    "classifier.dense.weight": "head",
    "classifier.out_proj.weight": "head",
}
VIT = {
    "blocks.#.attn.proj.weight": "attention",
    "blocks.#.attn.qkv.weight": "attention",
    "blocks.#.mlp.fc1.weight": "mlp",
    "blocks.#.norm1.weight": "norm",
    "cls_token": "embedding",
    "head.weight": "head",
    "patch_embed.proj.weight": "embedding",
    "pos_embed": "embedding",
    "vit.embeddings.patch_embeddings.projection.weight": "embedding",
}
T5 = {
    "decoder.block.#.layer.#.DenseReluDense.wi.weight": "mlp",
    "decoder.block.#.layer.#.EncDecAttention.k.weight": "attention",
    "decoder.block.#.layer.#.SelfAttention.relative_attention_bias.weight": "attention",
    "decoder.block.#.layer.#.layer_norm.weight": "norm",
    "encoder.block.#.layer.#.SelfAttention.q.weight": "attention",
    "encoder.final_layer_norm.weight": "norm",
    "lm_head.weight": "head",
    "shared.weight": "embedding",
}
MIXTRAL = {
    "model.layers.#.block_sparse_moe.experts.#.w1.weight": "experts",
    "model.layers.#.mlp.shared_expert.down_proj.weight": "shared_experts",
    "model.layers.#.self_attn.v_proj.weight": "attention",
    "encoder.multihead_attn.in_proj_weight": "attention",
}
RESNET = {
    "bn1.running_mean": "norm",
    "conv1.weight": "other",
    "fc.weight": "mlp",
    "resnet.encoder.stages.#.layers.#.layer.#.normalization.weight": "norm",
    "classifier.1.weight": "head",
}
ARCHITECTURES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "bert": BERT,
    "vit": VIT,
    "t5": T5,
    "mixtral": MIXTRAL,
    "resnet": RESNET,
}
every = pytest.mark.parametrize("kinds", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())


def expanded(name: str, layers: int = 12) -> list[str]:
    """Return the names of all layers."""
    parts = name.split("#")
    if len(parts) == 1:
        return [name]
    return [parts[0] + str(k) + "#".join(parts[1:]).replace("#", "1") for k in range(layers)]


def names_of(kinds: dict[str, str]) -> list[str]:
    return sorted(name for pattern in kinds for name in expanded(pattern))


@every
def test_kinds_of_real_names(kinds: dict[str, str]) -> None:
    names = names_of(kinds)
    blocks = Blocks(kind_blocks(names))
    for pattern, kind in kinds.items():
        for name in expanded(pattern):
            assert blocks.names[blocks.of(name)] == kind, name
    assert set(blocks.names) == set(kinds.values())


@every
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_layers_are_shared_out_evenly_and_in_order(kinds: dict[str, str], groups: int) -> None:
    names = names_of(kinds)
    blocks = Blocks(layer_blocks(names, groups))
    runs: dict[int, list[tuple[str, int]]] = {}
    for name in names:
        block = blocks.of(name)
        found = re.match(r"(.*?)(?:^|\.)(\d+)\.", name)
        if blocks.names[block] == "rest":
            assert found is None or found.group(1) == "classifier"
        else:
            assert found is not None
            runs.setdefault(block, []).append((found.group(1), int(found.group(2))))
    sizes = [len(set(run)) for run in runs.values()]
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1
    last: dict[str, int] = {}
    for block in sorted(runs):
        for part, layer in sorted(set(runs[block])):
            assert last.get(part, -1) < layer
            last[part] = layer


@given(st.integers(1, 40), st.data())
def test_layers_of_any_number(layers: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, layers))
    names = [f"h.{k}.w" for k in range(layers)]
    made = Blocks(layer_blocks(names, groups))
    found = [made.of(name) for name in names]
    sizes = [found.count(k) for k in range(groups)]
    assert found == sorted(found)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_parts_keep_the_order_of_the_names() -> None:
    names = [f"{part}.block.{k}.w" for part in ("encoder", "decoder") for k in range(2)]
    patterns = layer_blocks([*names, "classifier.1.weight"], 2)
    blocks = Blocks(patterns)
    assert [blocks.of(name) for name in names] == [0, 0, 1, 1]
    assert blocks.names[blocks.of("classifier.1.weight")] == "rest"
    assert Blocks(layer_blocks(["model.layers.0.w", "head"], 1)).names == ("layers1", "rest")


def test_blocks_of_layers_that_there_are_not() -> None:
    with pytest.raises(MergeError, match="has 3 numbered layers and 4 blocks") as caught:
        layer_blocks([f"h.{k}.w" for k in range(3)], 4)
    assert "ask for 1 to 3" in str(caught.value.hint)
    with pytest.raises(MergeError, match="has 0 numbered layers and 1 blocks") as caught:
        layer_blocks(["weight"], 1)
    assert "give patterns" in str(caught.value.hint)
    with pytest.raises(MergeError, match="0 blocks"):
        layer_blocks(["h.0.w", "h.1.w"], 0)


def least_largest(sizes: Sequence[float], blocks: int) -> float:
    """Return the least largest sum of any partition into runs, by trying all."""
    cuts = itertools.combinations(range(1, len(sizes)), blocks - 1)
    edges = ((0, *cut, len(sizes)) for cut in cuts)
    return min(max(sum(sizes[a:b]) for a, b in itertools.pairwise(edge)) for edge in edges)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_balanced_blocks_are_the_best_partition(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    squares = {f"t{i}": float(size) for i, size in enumerate(sizes)}
    blocks = Blocks(balanced_blocks(squares, count))
    found = [blocks.of(name) for name in squares]
    assert found == sorted(found)
    assert set(found) == set(range(count))
    sums = [sum(s for s, k in zip(sizes, found, strict=True) if k == b) for b in range(count)]
    assert max(sums) == least_largest(sizes, count)


def test_more_balanced_blocks_than_tensors() -> None:
    for count in (0, 3):
        with pytest.raises(MergeError, match=f"{count} blocks were asked for of 2 tensors"):
            balanced_blocks({"a": 1.0, "b": 2.0}, count)


def test_names_with_letters_of_expressions() -> None:
    names = ["a.b", "aXb", "a+", "(", "a.b.c"]
    blocks = Blocks(named_blocks({"one": names[:1], "two": names[1:]}))
    assert [blocks.of(name) for name in names] == [0, 1, 1, 1, 1]


def layout(*names: str) -> FlatLayout:
    return FlatLayout.of(open_checkpoint({name: torch.ones(2) for name in names}), {})


def test_every_tensor_is_in_one_block() -> None:
    blocks = Blocks({"a": "^a", "rest": "*"})
    assert (len(blocks), blocks.names) == (2, ("a", "rest"))
    assert blocks.table(layout("a1", "b", "a2")) == (0, 0, 1)  # in the order of the layout
    assert Blocks().table(layout("x", "y")) == (0, 0)
    assert (len(Blocks()), Blocks().names, Blocks().of("any")) == (1, (), 0)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ({"a": "x"}, "'y' belongs to no block"),
        ({"a": "x", "b": "x|y"}, "'x' belongs to the blocks a, b"),
        ({"a": "*", "b": "*"}, "'x' belongs to the blocks a, b"),
        ({"a": "z", "b": "*"}, "no floating tensor belongs to the blocks a"),
        ({"a": "x|y", "b": "*"}, "no floating tensor belongs to the blocks b"),
    ],
)
def test_blocks_that_do_not_fit(patterns: dict[str, str], said: str) -> None:
    with pytest.raises(MergeError, match=re.escape(said)) as caught:
        Blocks(patterns).table(layout("x", "y"))
    assert caught.value.hint


@pytest.mark.parametrize("pattern", ["(", "[a", "*a"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(MergeError, match="is not a regular expression") as caught:
        Blocks({"a": pattern})
    assert "Python regular expression" in str(caught.value.hint)


def test_patterns_of_other_kinds() -> None:
    with pytest.raises(MergeError, match="there are no blocks"):
        Blocks({})
    for wrong in ({"a": 3}, {"a": None}, {"a": ["x"]}, ["a"], 3):
        with pytest.raises(MergeError, match="block"):
            Blocks(wrong)  # type: ignore[arg-type]


def test_copies() -> None:
    given_ = {"a": "^a", "rest": "*"}
    blocks = Blocks(given_)
    blocks.of("a")
    given_["a"] = "("
    assert blocks.of("abc") == 0
    assert pickle.loads(pickle.dumps(blocks)) == blocks


FIRST_LAST = TaskArithmetic(blocks={"first": r"^first", "last": r"^last"})


def opened(kind: str) -> tuple[object, dict[str, object]]:
    base, experts = family(kind)
    return open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}


def test_norms_are_those_of_the_resident_task_vectors() -> None:
    base, experts = opened("mlp")
    norms = block_norms(base, experts, FIRST_LAST.block, 2)  # type: ignore[arg-type]
    vectors = TaskVectors.load(base, experts)  # type: ignore[arg-type]
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for slot in vectors.layout.slots:
        for row, delta in enumerate(vectors.deltas):
            expected[row, FIRST_LAST.block(slot.name)] += slot.of(delta).double().square().sum()
    torch.testing.assert_close(norms, expected.sqrt(), rtol=1e-5, atol=1e-8)


def test_statistics_count_and_counters_do_not() -> None:
    base, experts = opened("cnn")
    asked: list[str] = []

    def block(name: str) -> int:
        asked.append(name)
        return 0

    norms = block_norms(base, experts, block, 1)  # type: ignore[arg-type]
    assert norms.shape == (3, 1)
    assert "norm.running_var" in asked
    assert not [name for name in asked if name.endswith("num_batches_tracked")]


def test_tied_tensors_count_once() -> None:
    base, experts = opened("tied")
    every = {"all": ".*"}
    operator = TaskArithmetic(blocks=every)
    norms = block_norms(base, experts, operator.block, 1)  # type: ignore[arg-type]
    vectors = TaskVectors.load(base, experts)  # type: ignore[arg-type]
    torch.testing.assert_close(
        norms[:, 0], vectors.deltas.double().norm(dim=-1), rtol=1e-5, atol=1e-8
    )


def test_another_architecture_is_refused() -> None:
    base, experts = opened("mlp")
    with pytest.raises(MergeError, match="lacks"):
        block_norms(
            base,  # type: ignore[arg-type]
            {**experts, "odd": open_checkpoint(build("cnn"))},  # type: ignore[dict-item]
            lambda name: 0,
            1,
        )


@given(st.lists(st.floats(0.01, 1e3), min_size=2, max_size=8), st.floats(1e-3, 1e3))
def test_importances_are_relative(norms: list[float], unit: float) -> None:
    values = torch.tensor([norms], dtype=torch.float64)
    sizes = torch.tensor(relative_importance(values), dtype=torch.float64)
    torch.testing.assert_close(
        sizes.clamp_min(0.011),
        (values / values.square().mean().sqrt())[0].clamp_min(0.011),
        rtol=1e-3,
        atol=0.0,
    )
    scaled = torch.tensor(relative_importance(unit * values), dtype=torch.float64)
    torch.testing.assert_close(scaled, sizes, rtol=1e-3, atol=0.0)


def test_blocks_that_did_not_move_keep_a_little_and_rounding_hides_noise() -> None:
    norms = torch.tensor([[0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    sizes = relative_importance(norms)
    assert sizes[0] == 0.01
    assert relative_importance(norms * (1 + 1e-12)) == sizes
    assert relative_importance(torch.zeros(2, 2)) == ()


def test_an_expert_may_lack_a_name_that_the_model_ties() -> None:
    base, experts = family("tied")
    apart = open_checkpoint({k: v.clone() for k, v in base.state_dict().items()})
    lacking = {
        label: open_checkpoint(
            {k: v for k, v in model.state_dict().items() if k != "output.weight"}
        )
        for label, model in experts.items()
    }
    ties = {"output.weight": "embed.weight"}
    found = block_norms(apart, lacking, lambda name: 0, 1, ties=ties)
    expected = block_norms(
        open_checkpoint(base),
        {label: open_checkpoint(model) for label, model in experts.items()},
        lambda name: 0,
        1,
    )
    torch.testing.assert_close(found, expected)
