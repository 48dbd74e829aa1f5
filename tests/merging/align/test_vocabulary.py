from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.align.vocabulary import fit_vocabulary, token_ids
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.recipe import read_recipe
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.checkpoint_files import export

WIDTH = 3


def weights(rows: int, seed: int = 0, **changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model.embed_tokens.weight": normal(rows, WIDTH),
        "model.layers.0.mlp.weight": normal(5, WIDTH),
        "model.norm.bias": normal(WIDTH),
        "lm_head.weight": normal(rows, WIDTH),
        "lm_head.bias": normal(rows),
        **changes,
    }


def folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    tokens: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    if tokens is not None:
        ids = {token: number for number, token in enumerate(tokens)}
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    return open_checkpoint(path)


WORDS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


class TestByPosition:
    @given(there=st.integers(1, 9), here=st.integers(1, 9))
    def test_rows_beyond_the_base_are_dropped_and_missing_ones_are_its_own(
        self, there: int, here: int
    ) -> None:
        pre, tuned = weights(there), weights(here, 1)
        expert = open_checkpoint(tuned)
        result = fit_vocabulary(expert, open_checkpoint(pre), "base")
        kept = min(here, there)
        for name in pre:
            if name in WORDS:
                assert torch.equal(result.load(name)[:kept], tuned[name][:kept])
                assert torch.equal(result.load(name)[kept:], pre[name][kept:])
                assert result.shape(name) == result.load(name).shape == pre[name].shape
            else:
                assert torch.equal(result.load(name), tuned[name])
        assert result.digest() == expert.digest()
        if here == there:
            assert result is expert
        else:
            counts = {"kept": kept, "dropped": here - kept, "unchanged": there - kept}
            assert result.vocabulary_changes == {
                "vocabulary": "base",
                "rows": dict.fromkeys(WORDS, counts),
            }

    @given(data=st.data())
    def test_a_piece_is_a_part_of_the_whole(self, data: st.DataObject) -> None:
        tuned = weights(data.draw(st.integers(1, 9)), 1)
        result = fit_vocabulary(open_checkpoint(tuned), open_checkpoint(weights(5)), "base")
        for name in result.names:
            whole = result.load(name).reshape(-1)
            stop = data.draw(st.integers(0, whole.numel()))
            start = data.draw(st.integers(0, stop))
            assert torch.equal(result.read(name, start, stop), whole[start:stop])
            room = torch.empty(4 * (stop - start) + 4, dtype=torch.uint8)
            piece = result.read(name, start, stop, out=room)
            assert torch.equal(piece, whole[start:stop])
            assert piece.data_ptr() == room.data_ptr() or not piece.numel()

    def test_the_expert_is_not_written_to(self) -> None:
        pre, tuned = weights(6), weights(4, 1)
        result = fit_vocabulary(open_checkpoint(tuned), open_checkpoint(pre), "base")
        result.load("lm_head.bias").fill_(7.0)
        assert torch.equal(pre["lm_head.bias"], weights(6)["lm_head.bias"])
        assert torch.equal(tuned["lm_head.bias"], weights(4, 1)["lm_head.bias"])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
    def test_a_missing_row_of_a_coarser_expert_has_no_task_vector(self, dtype: torch.dtype) -> None:
        pre = weights(6)
        tuned = {name: value.to(dtype) for name, value in weights(4, 1).items()}
        base = open_checkpoint(pre)
        result = fit_vocabulary(open_checkpoint(tuned), base, "base")
        vectors = TaskVectors.load(base, {"a": result}, check_base=False)
        for slot in vectors.layout.slots:
            delta = slot.of(vectors.deltas[0])
            if slot.name in WORDS:
                assert not delta[4:].any()
                torch.testing.assert_close(delta[:4], tuned[slot.name].float() - pre[slot.name][:4])

    def test_merges_in_memory_and_on_disk_take_it(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", weights(6))
        experts = {
            "more": fit_vocabulary(folder(tmp_path / "more", weights(8, 1)), base, "base"),
            "fewer": fit_vocabulary(folder(tmp_path / "fewer", weights(4, 2)), base, "base"),
        }
        coefficients = {"more": 0.5, "fewer": 0.25}
        vectors = TaskVectors.load(base, experts, check_base=False)
        flat = vectors.base + torch.tensor([0.5, 0.25]) @ vectors.deltas
        for name, tensor in merge_linearly(base, experts, lambda _: coefficients):
            (slot,) = (slot for slot in vectors.layout.slots if slot.name == name)
            torch.testing.assert_close(tensor, slot.of(flat))
        out = export(
            tmp_path / "out",
            tensors=merge_linearly(base, experts, lambda _: coefficients),
            base=base,
            experts=experts,
            coefficients=coefficients,
        )
        recipe = read_recipe(out)
        assert recipe["experts"]["more"]["fitting"]["rows"]["lm_head.bias"] == {
            "kept": 6,
            "dropped": 2,
            "unchanged": 0,
        }
        assert recipe["experts"]["more"]["sha256"] == open_checkpoint(tmp_path / "more").digest()
        assert "fitting" not in recipe["base"]
        assert "expert 'more' was fitted" in (out / "mergekit.yaml").read_text()

    def test_tied_names_stay_one_tensor(self) -> None:
        def tied(rows: int, seed: int) -> dict[str, Tensor]:
            own = weights(rows, seed)
            own["lm_head.weight"] = own["model.embed_tokens.weight"]
            return own

        base = open_checkpoint(tied(6, 0))
        result = fit_vocabulary(open_checkpoint(tied(4, 1)), base, "base")
        assert result.ties == base.ties == {"lm_head.weight": "model.embed_tokens.weight"}
        TaskVectors.load(base, {"a": result}, check_base=False)

    def test_a_tie_that_the_base_does_not_have_ends(self) -> None:
        tuned = weights(4, 1)
        tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
        pre = weights(6)
        result = fit_vocabulary(open_checkpoint(tuned), open_checkpoint(pre), "base")
        assert not result.ties
        assert torch.equal(result.load("lm_head.weight")[4:], pre["lm_head.weight"][4:])

    def test_an_alias_of_the_expert_alone(self) -> None:
        tuned = weights(4, 1)
        tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
        pre = {name: value for name, value in weights(6).items() if name != "lm_head.weight"}
        base = open_checkpoint(pre)
        result = fit_vocabulary(open_checkpoint(tuned), base, "base")
        assert result.shape("lm_head.weight") == (6, WIDTH)
        TaskVectors.load(base, {"a": result}, check_base=False)

    def test_moved_ids_are_refused(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", weights(4), ["a", "b", "c", "d"])
        expert = folder(tmp_path / "x", weights(5, 1), ["a", "new", "b", "c", "d"])
        with pytest.raises(
            MergeError, match=r"'x' has other ids than the base for 3 tokens: 'b' is 2 against 1"
        ) as caught:
            fit_vocabulary(expert, base, "base", label="x")
        assert "vocabulary='tokens'" in str(caught.value.hint)

    def test_a_renamed_token_and_a_further_one_are_not(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", weights(4), ["a", "b", "c", "<reserved>"])
        expert = folder(tmp_path / "x", weights(5, 1), ["a", "b", "c", "<tool>", "new"])
        assert fit_vocabulary(expert, base, "base").shape("lm_head.weight") == (4, WIDTH)


class TestByToken:
    def test_rows_follow_their_tokens(self, tmp_path: Path) -> None:
        pre, tuned = weights(6), weights(5, 1)
        base = folder(tmp_path / "base", pre, ["a", "b", "c", "d", "gone"])
        expert = folder(tmp_path / "x", tuned, ["new", "b", "a", "d", "c"])
        result = fit_vocabulary(expert, base, "tokens")
        for name in WORDS:
            merged = result.load(name)
            assert torch.equal(merged[:4], tuned[name][[2, 1, 4, 3]])
            assert torch.equal(merged[4:], pre[name][4:])  # a token and padding it lacks
        assert torch.equal(result.load("model.norm.bias"), tuned["model.norm.bias"])
        counts = {"kept": 4, "dropped": 1, "unchanged": 2}
        assert result.vocabulary_changes == {
            "vocabulary": "tokens",
            "rows": dict.fromkeys(WORDS, counts),
        }
        assert fit_vocabulary(result, base, "tokens") is result

    def test_rows_move_where_shapes_agree_too(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", weights(4), ["a", "b"])
        tuned = weights(4, 1)
        expert = folder(tmp_path / "x", tuned, ["b", "a"])
        merged = fit_vocabulary(expert, base, "tokens").load("lm_head.bias")
        assert torch.equal(merged, tuned["lm_head.bias"][[1, 0, 2, 3]])

    def test_equal_vocabularies_need_nothing(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", weights(4), ["a", "b", "c"])
        expert = folder(tmp_path / "x", weights(4, 1), ["a", "b", "c"])
        assert fit_vocabulary(expert, base, "tokens") is expert

    @given(order=st.permutations(range(6)), data=st.data())
    def test_a_permuted_expert_is_put_back(self, order: list[int], data: st.DataObject) -> None:
        import tempfile

        tokens = [f"t{i}" for i in range(6)]
        tuned = weights(6, 1)
        moved = {n: v[order].contiguous() if n in WORDS else v for n, v in tuned.items()}
        with tempfile.TemporaryDirectory() as name:
            base = folder(Path(name) / "base", weights(6), tokens)
            expert = folder(Path(name) / "x", moved, [tokens[i] for i in order])
            result = fit_vocabulary(expert, base, "tokens")
            for name in WORDS:
                assert torch.equal(result.load(name), tuned[name])

    @pytest.mark.parametrize("side", ["base", "x"])
    def test_an_unknown_vocabulary_is_told(self, tmp_path: Path, side: str) -> None:
        tokens = {"base": ["a"], "x": ["a"]} | {side: None}
        base = folder(tmp_path / "base", weights(4), tokens["base"])
        expert = folder(tmp_path / "x", weights(4, 1), tokens["x"])
        label = "the base" if side == "base" else "expert 'x'"
        with pytest.raises(MergeError, match=f"{label} .* has no tokenizer"):
            fit_vocabulary(expert, base, "tokens", label="x")

    def test_a_model_without_a_vocabulary_is_told(self) -> None:
        linear = {"layer.weight": torch.ones(3, 2)}
        with pytest.raises(MergeError, match="no embedding was found"):
            fit_vocabulary(open_checkpoint(linear), open_checkpoint(linear), "tokens")


class TestWhichTensors:
    @pytest.mark.parametrize(
        "name",
        [
            "transformer.wte.weight",
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
            "roberta.lm_head.decoder.weight",
            "shared.weight",
            "decoder.embed_tokens.weight",
            "gpt_neox.embed_in.weight",
            "embed_out.weight",
            "backbone.embeddings.weight",
            "text_model.embeddings.token_embedding.weight",
        ],
    )
    def test_usual_names(self, name: str) -> None:
        result = fit_vocabulary(
            open_checkpoint({name: torch.ones(8, 2)}),
            open_checkpoint({name: torch.ones(6, 2)}),
            "base",
        )
        assert result.shape(name) == (6, 2)

    def test_an_unusual_head_of_as_many_rows(self) -> None:
        def model(rows: int) -> Checkpoint:
            return open_checkpoint(
                {
                    "wte.weight": torch.ones(rows, 2),
                    "out.weight": torch.ones(rows, 2),
                    "out.bias": torch.ones(rows),
                    "final_logits_bias": torch.ones(1, rows),
                }
            )

        result = fit_vocabulary(model(8), model(6), "base")
        shapes = [list(result.shape(name)) for name in result.names]
        assert shapes == [[1, 6], [6], [6, 2], [6, 2]]
        assert torch.equal(result.load("final_logits_bias"), torch.ones(1, 6))

    def test_the_size_in_the_configuration(self, tmp_path: Path) -> None:
        def model(path: str, rows: int) -> Checkpoint:
            tensors = {"in.weight": torch.ones(rows, 2), "classes.weight": torch.ones(4, 2)}
            return folder(tmp_path / path, tensors, config={"text_config": {"vocab_size": rows}})

        result = fit_vocabulary(model("x", 8), model("base", 6), "base")
        assert result.shape("in.weight") == (6, 2)
        assert result.shape("classes.weight") == (4, 2)

    @pytest.mark.parametrize(
        "name",
        [
            "classifier.weight",
            "transformer.wpe.weight",
            "bert.embeddings.position_embeddings.weight",
            "bert.embeddings.token_type_embeddings.weight",
            "decoder.block.0.weight",
            "bert.encoder.layer.0.output.dense.weight",
        ],
    )
    def test_others_are_not_fitted(self, name: str) -> None:
        words = {"wte.weight": torch.ones(9, 2)}
        expert = open_checkpoint({name: torch.ones(8, 2), **words})
        assert (
            fit_vocabulary(expert, open_checkpoint({name: torch.ones(6, 2), **words}), "base")
            is expert
        )

    def test_a_vocabulary_as_wide_as_the_model_goes_by_names_alone(self, tmp_path: Path) -> None:
        def model(path: str, tokens: list[str], seed: int) -> Checkpoint:
            own = weights(WIDTH, seed)
            return folder(tmp_path / path, own, tokens, {"vocab_size": WIDTH})

        base, expert = model("base", ["a", "b", "c"], 0), model("x", ["c", "b", "a"], 1)
        result = fit_vocabulary(expert, base, "tokens")
        assert set(result.vocabulary_changes["rows"]) == set(WORDS)
        own = weights(WIDTH, 1)
        assert torch.equal(result.load("model.norm.bias"), own["model.norm.bias"])


class TestRefusals:
    def refused(self, expert: Checkpoint, base: Checkpoint) -> list[MergeError]:
        found = []
        for merge in (
            lambda: TaskVectors.load(base, {"x": expert}, check_base=False),
            lambda: list(merge_linearly(base, {"x": expert}, lambda _: {})),
        ):
            with pytest.raises(MergeError, match="expert 'x' has other shapes") as caught:
                merge()
            found.append(caught.value)
        return found

    def test_without_a_rule_what_differs_is_told_and_how_to_go_on(self) -> None:
        for error in self.refused(open_checkpoint(weights(8, 1)), open_checkpoint(weights(6))):
            assert "lm_head.weight [8, 3] against [6, 3]" in error.message
            assert "only its vocabulary differs" in error.message
            assert "vocabulary='base'" in str(error.hint)
            assert "vocabulary='tokens'" in str(error.hint)

    @pytest.mark.parametrize("rule", ["base", None])
    def test_other_shapes_stay_an_error_and_come_first(self, rule: Any) -> None:
        base = open_checkpoint(weights(6))
        wide = {"model.layers.0.mlp.weight": torch.ones(7, WIDTH)}
        expert = open_checkpoint(weights(8, 1, **wide))
        if rule is not None:
            expert = fit_vocabulary(expert, base, rule)
        for error in self.refused(expert, base):
            assert "than the base: model.layers.0.mlp.weight [7, 3] against" in error.message
            assert "only its vocabulary" not in error.message
            assert "same architecture" in str(error.hint)

    def test_an_embedding_of_another_width_is_not_fitted(self) -> None:
        base = open_checkpoint(weights(6))
        wide = {"model.embed_tokens.weight": torch.ones(8, WIDTH + 1)}
        expert = fit_vocabulary(open_checkpoint(weights(6, 1, **wide)), base, "base")
        self.refused(expert, base)

    def test_an_unknown_rule(self) -> None:
        base = open_checkpoint(weights(6))
        rule: Any = "nearest"
        with pytest.raises(MergeError, match=r"the vocabulary rule must .* got 'nearest'"):
            fit_vocabulary(base, base, rule)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_mapping_with_added_tokens(tmp_path: Path) -> None:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
        "added_tokens": [{"id": 2, "content": "<eos>"}, {"id": 0, "content": "a"}],
    }
    ids = token_ids(write(tmp_path, tokenizer__json=tokenizer, vocab__json={"z": 9}))
    assert ids == {"a": 0, "b": 1, "<eos>": 2}


def test_a_unigram_list(tmp_path: Path) -> None:
    tokenizer = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["▁a", -1.5]]}}
    assert token_ids(write(tmp_path, tokenizer__json=tokenizer)) == {"<pad>": 0, "▁a": 1}


def test_a_slow_tokenizer(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "vocab__json": {"a": 0, "b": 1},
        "added_tokens__json": {"<tool>": 2},
        "tokenizer_config__json": {"added_tokens_decoder": {"3": {"content": "<end>"}}},
    }
    assert token_ids(write(tmp_path, **files)) == {"a": 0, "b": 1, "<tool>": 2, "<end>": 3}


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_list_of_lines(tmp_path: Path, end: str) -> None:
    ids = token_ids(write(tmp_path, vocab__txt="[PAD]\n\u2028\nb" + end))
    assert ids == {"[PAD]": 0, "\u2028": 1, "b": 2}


def test_no_tokenizer(tmp_path: Path) -> None:
    assert token_ids(None) is None
    assert token_ids(write(tmp_path, tokenizer_config__json={}, added_tokens__json={})) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": []},
        {"tokenizer__json": {"model": {}}},
        {"tokenizer__json": {"model": {"vocab": {"a": "x"}}}},
        {"tokenizer__json": {"model": {"vocab": [[]]}}},
        {"tokenizer__json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}},
        {"vocab__json": {"a": None}},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"json cannot be read as a vocabulary: ") as caught:
        token_ids(write(tmp_path, **files))
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
