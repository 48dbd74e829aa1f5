from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.carried import find_carried, weight_stem
from map_bo.merging.export.model import merge_checkpoints

DIFFUSERS = "diffusion_pytorch_model"
TENSORS = {"fc.weight": torch.zeros(2, 2)}


def folder(
    place: Path,
    files: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    weights: str = "model.safetensors",
) -> Checkpoint:
    place.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, place / weights)
    (place / "config.json").write_text(json.dumps(config or {"model_type": "bert"}))
    for name, text in (files or {}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return open_checkpoint(place)


MODULES = json.dumps(
    [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"},
     {"path": "2_Dense", "type": "x.Dense"}]
)  # fmt: skip


class TestFiles:
    def test_folders_that_a_json_names_are_carried_with_their_weights(self, tmp_path: Path) -> None:
        base = folder(
            tmp_path / "b",
            {
                "modules.json": MODULES,
                "1_Pooling/config.json": '{"x": 1}',
                "2_Dense/config.json": json.dumps({"table": "rows/table.txt"}),
                "2_Dense/model.safetensors": "dense",
                "2_Dense/rows/table.txt": "t",
                "onnx/model.onnx": "another form of the model",
                "checkpoint-5/trainer_state.json": "{}",
            },
        )
        found = find_carried(base)
        assert set(found.files) == {
            "config.json",
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "2_Dense/model.safetensors",
            "2_Dense/rows/table.txt",
        }
        assert found.notes == ("2_Dense/model.safetensors is the base's own and not merged.",)

    def test_an_expert_with_other_weights_there_is_told(self, tmp_path: Path) -> None:
        parts = {"modules.json": MODULES, "2_Dense/model.safetensors": "base"}
        base = folder(tmp_path / "b", parts)
        experts = {
            "same": folder(tmp_path / "same", parts),
            "other": folder(tmp_path / "other", {**parts, "2_Dense/model.safetensors": "mine"}),
        }
        (note,) = find_carried(base, experts).notes
        assert "not merged; that of other differs" in note

    def test_nothing_outside_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "key").write_text("k")
        places = ["../secret", str(tmp_path / "secret"), "link", "a/../../secret/key"]
        base = folder(tmp_path / "b", {"modules.json": json.dumps([{"path": p} for p in places])})
        (tmp_path / "b" / "link").symlink_to(tmp_path / "secret")
        assert set(find_carried(base).files) == {"config.json", "modules.json"}

    def test_other_weights_traces_of_training_and_pictures_are_left(self, tmp_path: Path) -> None:
        left = ["flax_model.msgpack", "x.gguf", "optimizer.pt", "training_args.bin", "run.log",
                "rng_state_0.pth", "trainer_state.json", ".gitattributes", "README.md"]  # fmt: skip
        kept = ["spiece.model", "vocab.json", "USE_POLICY.md", "LICENSE", "qwen.tiktoken",
                "tokens.vocab", "mel.npz"]  # fmt: skip
        names = {"preprocessor_config.json": json.dumps({"filters": "mel.npz"}), "logo.png": "p"}
        base = folder(tmp_path / "b", {**dict.fromkeys([*left, *kept], "x"), **names})
        found = find_carried(base)
        assert set(found.files) == {"config.json", "preprocessor_config.json", *kept}
        assert found.notes == ("Pictures and data of the base's page were not carried: logo.png.",)

    def test_a_head_that_is_tied_by_configuration_alone_is_told(self, tmp_path: Path) -> None:
        embedding = "model.embed_tokens.weight"
        tensors = {embedding: torch.ones(3, 2), "lm_head.weight": torch.zeros(3, 2)}
        folder(tmp_path / "b", config={"model_type": "llama", "tie_word_embeddings": True})
        save_file(tensors, tmp_path / "b" / "model.safetensors")
        moved = {name: tensor + 1 for name, tensor in tensors.items()}
        out = merge_checkpoints(
            tmp_path / "b", {"e": moved}, {"e": 1.0}, tmp_path / "out", check_base=False,
            progress=False,
        )  # fmt: skip
        card = (out / "README.md").read_text()
        assert "says tie_word_embeddings, and lm_head.weight differs" in card

    def test_a_base_without_a_folder(self) -> None:
        assert find_carried(open_checkpoint(TENSORS)).files == {}


CODE = {"modeling_mine.py": "class M: pass", "parts/more.py": ""}
AUTO_MAP = {"model_type": "mine", "auto_map": {"AutoModel": "modeling_mine.M"}}


class TestCode:
    def test_it_is_named_and_not_carried(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder(tmp_path / "b", CODE, AUTO_MAP)
        with caplog.at_level(logging.WARNING):
            out = merge_checkpoints(
                tmp_path / "b", {"e": {"fc.weight": torch.ones(2, 2)}}, {"e": 1.0},
                tmp_path / "out", check_base=False, progress=False,
            )  # fmt: skip
        assert not list(out.rglob("*.py"))
        for text in (caplog.text, (out / "README.md").read_text()):
            assert "not carried: modeling_mine.py, parts/more.py" in text.replace("\\", "")

    def test_it_is_carried_by_the_users_word(self, tmp_path: Path) -> None:
        folder(tmp_path / "b", CODE, AUTO_MAP)
        out = merge_checkpoints(
            tmp_path / "b", {"e": {"fc.weight": torch.ones(2, 2)}}, {"e": 1.0},
            tmp_path / "out", check_base=False, progress=False, code=True,
        )  # fmt: skip
        assert (out / "modeling_mine.py").read_text() == "class M: pass"
        assert (out / "parts/more.py").is_file()
        assert "was carried: modeling_mine.py" in (out / "README.md").read_text().replace("\\", "")


class TestWeightStem:
    @pytest.mark.parametrize(
        ("weights", "config", "stem"),
        [
            ("model.safetensors", {"model_type": "bert"}, "model"),
            ("mine.safetensors", {"model_type": "bert"}, "model"),
            ("mine.safetensors", {"architecture": "of another library"}, "mine"),
            (f"{DIFFUSERS}.safetensors", {"_class_name": "U"}, DIFFUSERS),
            (f"{DIFFUSERS}.fp16.safetensors", {"_class_name": "U"}, f"{DIFFUSERS}.fp16"),
        ],
    )
    def test_it_is_what_the_library_looks_for(
        self, tmp_path: Path, weights: str, config: dict[str, Any], stem: str
    ) -> None:
        assert weight_stem(folder(tmp_path / "b", config=config, weights=weights)) == stem

    def test_shards_have_it_too(self, tmp_path: Path) -> None:
        tensors = {"a": torch.zeros(4), "b": torch.ones(4)}
        folder(tmp_path / "b", config={"_class_name": "U"}, weights=f"{DIFFUSERS}.safetensors")
        save_file(tensors, tmp_path / "b" / f"{DIFFUSERS}.safetensors")
        moved = {name: tensor + 1 for name, tensor in tensors.items()}
        out = merge_checkpoints(
            tmp_path / "b", {"e": moved}, {"e": 1.0}, tmp_path / "out", check_base=False,
            progress=False, shard_size=16,
        )  # fmt: skip
        found = open_checkpoint(out)
        assert all(torch.equal(found.load(name), tensor) for name, tensor in moved.items())
        names = {path.name for path in out.iterdir() if "safetensors" in path.name}
        assert names == {
            f"{DIFFUSERS}.safetensors.index.json",
            f"{DIFFUSERS}-00001-of-00002.safetensors",
            f"{DIFFUSERS}-00002-of-00002.safetensors",
        }


class TestWithTheirLibraries:
    def test_sentence_transformers(self, tmp_path: Path) -> None:
        library = pytest.importorskip("sentence_transformers")
        parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
        transformers = pytest.importorskip("transformers")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        config = transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=12, max_position_embeddings=16,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            transformers.BertModel(config).save_pretrained(tmp_path / "hf")
            transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(
                tmp_path / "hf"
            )
            model = library.SentenceTransformer(
                modules=[
                    parts.Transformer(str(tmp_path / "hf")),
                    parts.Pooling(16, pooling_mode="cls"),
                    parts.Dense(16, 8),
                    parts.Normalize(),
                ]
            )
            model.save(str(tmp_path / "base"))
            expert = library.SentenceTransformer(str(tmp_path / "base"))
            with torch.no_grad():
                for parameter in expert[0].parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)
            expert.save(str(tmp_path / "e"))
        out = merge_checkpoints(
            tmp_path / "base", {"e": tmp_path / "e"}, {"e": 1.0}, tmp_path / "out", progress=False
        )
        found = library.SentenceTransformer(str(out)).encode(["a b c"])
        assert abs(found - expert.encode(["a b c"])).max() < 1e-5
        assert abs(found - model.encode(["a b c"])).max() > 1e-4

    def test_diffusers(self, tmp_path: Path) -> None:
        library = pytest.importorskip("diffusers")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = library.UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                block_out_channels=(4, 8), norm_num_groups=2, attention_head_dim=2,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            model.save_pretrained(tmp_path / "base")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn(parameter.shape)
            model.save_pretrained(tmp_path / "e")
        out = merge_checkpoints(
            tmp_path / "base", {"e": tmp_path / "e"}, {"e": 1.0}, tmp_path / "out", progress=False,
            shard_size="4kB",
        )  # fmt: skip
        found = library.UNet2DModel.from_pretrained(out).state_dict()
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor)


def test_the_index_of_a_variant_is_weights(tmp_path: Path) -> None:
    made = folder(tmp_path / "b", config={}, weights="model.safetensors")
    (tmp_path / "b" / "model.safetensors.index.fp16.json").write_text("{}")
    assert "model.safetensors.index.fp16.json" not in find_carried(made).files
