from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from map_bo.errors import CheckpointError, MapBoError, MergeError
from map_bo.merging.adapters.adapter import AdapterCheckpoint, adapter_checkpoint, open_expert
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from tests.merging.peft_models import language_model, trained, with_settings

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Conv1D: weights are in x out, and c_proj is square.
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "lora_alpha": 5,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "down_proj": 1},
            "alpha_pattern": {"v_proj": 7, r"layers.1.mlp.*": 2},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "lora_alpha": 3}),
    "saved": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "own_biases": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "head": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "added_bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "lora_alpha": 3}),
}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_checkpoint_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    base = language_model(kind)
    merged = trained(base, tmp_path, **settings)
    found = adapter_checkpoint(tmp_path, open_checkpoint(base))
    wanted = open_checkpoint(merged)
    assert found.names == wanted.names
    moved = 0
    for name in wanted.names:
        close(found.load(name), wanted.load(name))
        moved += not torch.equal(wanted.load(name), open_checkpoint(base).load(name))
    assert moved >= len(found.adapter.names)


def linear_adapter(folder: Path, **tensors: Tensor) -> Path:
    """Write a hand-made adapter of rank 1 of a linear layer ``fc`` (3 -> 2)."""
    folder.mkdir(exist_ok=True)
    weights = {
        "base_model.model.fc.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0]]),
        "base_model.model.fc.lora_B.weight": torch.tensor([[1.0], [-1.0]]),
        **{name.replace("__", "."): tensor for name, tensor in tensors.items()},
    }
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    return folder


BASE = {"fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}
DELTA = torch.tensor([[2.0, 4.0, 6.0], [-2.0, -4.0, -6.0]])


class TestNames:
    @pytest.mark.parametrize("prefix", ["", "model.", "a.b."])
    def test_the_base_may_have_a_longer_prefix(self, tmp_path: Path, prefix: str) -> None:
        base = open_checkpoint({prefix + name: tensor for name, tensor in BASE.items()})
        found = adapter_checkpoint(linear_adapter(tmp_path), base)
        assert torch.equal(found.load(f"{prefix}fc.weight"), DELTA)

    def test_the_base_may_have_a_shorter_prefix(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(
            {name.replace("fc", "deep.er.fc"): tensor for name, tensor in weights.items()},
            folder / "adapter_model.safetensors",
        )
        assert torch.equal(
            adapter_checkpoint(folder, open_checkpoint(BASE)).load("fc.weight"), DELTA
        )

    def test_the_adapter_may_be_named(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        weights = load_file(folder / "adapter_model.safetensors")
        renamed = {name.replace(".weight", ".math.weight"): t for name, t in weights.items()}
        save_file(renamed, folder / "adapter_model.safetensors")
        assert torch.equal(
            adapter_checkpoint(folder, open_checkpoint(BASE)).load("fc.weight"), DELTA
        )
        two = {**renamed, **{n.replace("math", "code"): t.clone() for n, t in renamed.items()}}
        save_file(two, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="several adapters: code, math"):
            adapter_checkpoint(folder, open_checkpoint(BASE))

    def test_ambiguous_missing_and_mixed_names(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        twice = {f"{side}.{name}": t for side in ("left", "right") for name, t in BASE.items()}
        with pytest.raises(
            MergeError, match=r"'fc\.weight', which could be left\.fc\.weight, right"
        ):
            adapter_checkpoint(folder, open_checkpoint(twice))
        with pytest.raises(MergeError, match=r"changes 'fc\.weight', which the base lacks"):
            adapter_checkpoint(folder, open_checkpoint({"other.weight": torch.zeros(2, 3)}))
        linear_adapter(
            folder,
            base_model__model__x__head__lora_A__weight=torch.ones(1, 3),
            base_model__model__x__head__lora_B__weight=torch.ones(2, 1),
        )
        base = {"model.fc.weight": torch.zeros(2, 3), "head.weight": torch.zeros(2, 3)}
        with pytest.raises(MergeError, match=r"different prefixes: fc\.weight, x\.head\.weight"):
            adapter_checkpoint(folder, open_checkpoint(base))

    def test_another_base_is_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = linear_adapter(tmp_path)
        adapter_checkpoint(folder, open_checkpoint(BASE))
        assert not caplog.records
        with_settings(folder, base_model_name_or_path="org/some-model")
        with caplog.at_level(logging.WARNING):
            adapter_checkpoint(folder, open_checkpoint(BASE))
        assert "was trained from org/some-model" in caplog.text


class TestTies:
    def base(self) -> nn.Module:
        return language_model("gpt2")

    def test_an_adapted_embedding_that_is_tied_changes_both_names_as_peft_does(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = self.base()
        merged = open_checkpoint(trained(base, tmp_path, target_modules=["wte"]))
        found = adapter_checkpoint(tmp_path, open_checkpoint(base))
        assert "which the base ties to lm_head.weight: merged, both change" in caplog.text
        assert found.ties == {"lm_head.weight": "transformer.wte.weight"}
        for name in ("lm_head.weight", "transformer.wte.weight"):
            close(found.load(name), merged.load(name))

    def test_two_values_of_a_tied_tensor_are_refused(self, tmp_path: Path) -> None:
        tied = torch.zeros(2, 3)
        base = open_checkpoint({"fc.weight": tied, "head.weight": tied})
        folder = linear_adapter(
            tmp_path,
            base_model__model__head__lora_A__weight=torch.ones(1, 3),
            base_model__model__head__lora_B__weight=torch.ones(2, 1),
        )
        with pytest.raises(MergeError, match=r"tied tensor 'fc\.weight' under two names"):
            adapter_checkpoint(folder, base)
        save_file({"fc.weight": torch.ones(2, 3), "head.weight": torch.ones(2, 3)},
                  folder / "adapter_model.safetensors")  # fmt: skip
        assert bool((adapter_checkpoint(folder, base).load("head.weight") == 1).all())
        save_file({"fc.weight": torch.ones(2, 3), "head.weight": torch.zeros(2, 3)},
                  folder / "adapter_model.safetensors")  # fmt: skip
        with pytest.raises(MergeError, match=r"gives the tied tensor 'fc\.weight' two values"):
            adapter_checkpoint(folder, base)


class TestSquareWeights:
    """What way round a square weight lies is told by the modules around it."""

    @pytest.mark.parametrize("said", [True, False])
    @pytest.mark.parametrize("kind", ["gpt2", "bert"])
    def test_the_configuration_may_be_wrong(self, tmp_path: Path, kind: str, said: bool) -> None:
        base = language_model(kind)
        module = "attn.c_proj" if kind == "gpt2" else "query"
        merged = open_checkpoint(trained(base, tmp_path, target_modules=[module]))
        with_settings(tmp_path, fan_in_fan_out=said)
        found = adapter_checkpoint(tmp_path, open_checkpoint(base))
        for name in found.adapter.names:
            close(found.load(name), merged.load(name))

    @pytest.mark.parametrize("said", [True, False])
    def test_without_neighbours_the_configuration_counts(self, tmp_path: Path, said: bool) -> None:
        base = open_checkpoint({"fc.weight": torch.zeros(3, 3)})
        folder = linear_adapter(
            tmp_path, base_model__model__fc__lora_B__weight=torch.tensor([[1.0], [0.0], [0.0]])
        )
        with_settings(folder, fan_in_fan_out=said)
        row = torch.zeros(3, 3)
        row[0] = torch.tensor([2.0, 4.0, 6.0])
        found = adapter_checkpoint(folder, base).load("fc.weight")
        assert torch.equal(found, row.T if said else row)


class TestConvolutions:
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_as_peft_merges_them(self, tmp_path: Path, kernel: int) -> None:
        base = nn.Sequential(nn.Conv2d(3, 4, kernel), nn.Conv2d(4, 5, 2))
        merged = open_checkpoint(trained(base, tmp_path, target_modules=["0", "1"]))
        found = adapter_checkpoint(tmp_path, open_checkpoint(base))
        assert len(found.adapter.names) == 2
        for name in found.names:
            close(found.load(name), merged.load(name))

    def test_groups_are_refused(self, tmp_path: Path) -> None:
        # What peft writes for a convolution of four channels in two groups.
        folder = linear_adapter(
            tmp_path,
            base_model__model__fc__lora_A__weight=torch.ones(2, 2, 3, 3),
            base_model__model__fc__lora_B__weight=torch.ones(4, 1, 1, 1),
        )
        base = open_checkpoint({"fc.weight": torch.zeros(4, 2, 3, 3)})
        with pytest.raises(MergeError, match=r"changes 'fc\.weight'.* by factors"):
            adapter_checkpoint(folder, base)


def test_the_counter_of_a_batchnorm_that_was_saved_whole_is_the_bases(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    base = Net()
    merged = trained(base, tmp_path, target_modules=["fc"], modules_to_save=["norm"])
    assert "base_model.model.norm.num_batches_tracked" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    found = adapter_checkpoint(tmp_path, open_checkpoint(base))
    for name in ("fc.weight", "norm.weight", "norm.running_mean"):
        close(found.load(name), open_checkpoint(merged).load(name))
    assert found.load("norm.num_batches_tracked") == 0


class TestPrecision:
    def test_a_bfloat16_base_does_not_round_the_change_away(self, tmp_path: Path) -> None:
        base = {"fc.weight": torch.full((2, 3), 100.0, dtype=torch.bfloat16),
                "fc.bias": torch.ones(2, dtype=torch.bfloat16)}  # fmt: skip
        found = adapter_checkpoint(linear_adapter(tmp_path), open_checkpoint(base))
        assert found.dtype("fc.weight") == torch.float32
        assert found.dtype("fc.bias") == torch.bfloat16
        assert torch.equal(found.load("fc.weight"), 100 + DELTA)

    def test_adapters_in_pickles_and_in_bfloat16(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(
            {name: t.bfloat16() for name, t in weights.items()}, folder / "adapter_model.bin"
        )
        found = adapter_checkpoint(folder, open_checkpoint(BASE))
        assert torch.equal(found.load("fc.weight"), DELTA)


class TestDigest:
    def test_of_the_adapter_alone_whatever_its_file(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path / "a")
        found = adapter_checkpoint(folder, open_checkpoint(BASE)).digest()
        other = open_checkpoint({**BASE, "fc.bias": torch.ones(2)})
        assert adapter_checkpoint(folder, other).digest() == found
        second = linear_adapter(tmp_path / "b")
        weights = load_file(second / "adapter_model.safetensors")
        (second / "adapter_model.safetensors").unlink()
        torch.save(weights, second / "adapter_model.bin")
        assert adapter_checkpoint(second, other).digest() == found

    @pytest.mark.parametrize("change", ["scale", "values"])
    def test_it_changes_with_the_adapter(self, tmp_path: Path, change: str) -> None:
        folder = linear_adapter(tmp_path)
        first = adapter_checkpoint(folder, open_checkpoint(BASE)).digest()
        if change == "scale":
            with_settings(folder, lora_alpha=3)
        else:
            linear_adapter(folder, base_model__model__fc__lora_B__weight=torch.ones(2, 1))
        assert adapter_checkpoint(folder, open_checkpoint(BASE)).digest() != first


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"use_dora": True}, "is DoRA"),
            ({"use_qalora": True}, "is QALoRA"),
            ({"layer_replication": [[0, 2]]}, "replicates layers"),
            ({"target_parameters": "weight"}, "unusable target_parameters"),
            ({"trainable_token_indices": [1]}, "single rows of the embedding"),
            ({"alora_invocation_tokens": [1]}, "acts on some tokens only"),
            ({"peft_type": "IA3"}, "of the kind IA3; only LoRA"),
            ({"peft_type": "LOHA"}, "of the kind LOHA; only LoRA"),
            ({"peft_type": "PREFIX_TUNING"}, "of the kind PREFIX_TUNING"),
            ({"peft_type": None}, "only LoRA"),
            ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4'"),
            ({"r": 0}, "must be positive numbers, got 0 and"),
            ({"r": 2}, "has rank 1 in 'fc', and 2 by its configuration"),
            ({"lora_alpha": None}, "must be positive numbers, got 1 and None"),
            ({"rank_pattern": {"(": 1}}, "unusable rank_pattern"),
            ({"rank_pattern": {"fc": 0}}, "unusable rank_pattern"),
            ({"alpha_pattern": ["fc"]}, "unusable alpha_pattern"),
            ({"alpha_pattern": {"(?i)fc": 1}}, "unusable alpha_pattern"),
            ({"rank_pattern": {"(a+)+b": 1}}, "unusable rank_pattern.*repeats what holds"),
            ({"alpha_pattern": {"(a|.)" * 40: 1}}, "matched in too many ways"),
        ],
    )
    def test_settings(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        folder = linear_adapter(tmp_path)
        with_settings(folder, **settings)
        self.refused(folder, message)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("base_model.model.fc.lora_magnitude_vector", "is DoRA"),
            ("base_model.model.fc.lora_E", "not a tensor of a plain LoRA adapter"),
            ("base_model.model.fc.lora_A.bias", "not a tensor of a plain LoRA adapter"),
            ("base_model.model.e.token_adapter.trainable_tokens_delta", "not a tensor of a plain"),
            ("base_model.model.bias.lora_A.weight", "which the base lacks"),
            ("base_model.model.gone.weight", "changes 'gone.weight', which the base lacks"),
            ("base_model.model.fc.bias", r"of \[2, 1\], and 'fc.bias' is \[2\]"),
        ],
    )
    def test_tensors(self, tmp_path: Path, name: str, message: str) -> None:
        self.refused(linear_adapter(tmp_path, **{name: torch.ones(2, 1)}), message)

    def test_a_real_dora_adapter(self, tmp_path: Path) -> None:
        base = language_model("llama")
        trained(base, tmp_path, target_modules=["q_proj"], use_dora=True)
        with pytest.raises(CheckpointError, match="is DoRA"):
            adapter_checkpoint(tmp_path, open_checkpoint(base))
        with_settings(tmp_path, use_dora=False)
        with pytest.raises(CheckpointError, match="is DoRA"):
            adapter_checkpoint(tmp_path, open_checkpoint(base))

    def test_shapes(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        base = {"fc.weight": torch.zeros(5, 3)}
        with pytest.raises(MergeError, match=r"'fc.weight', which is \[5, 3\], by factors"):
            adapter_checkpoint(folder, open_checkpoint(base))

    def test_a_base_of_integers(self, tmp_path: Path) -> None:
        base = {"fc.weight": torch.zeros(2, 3, dtype=torch.int8)}
        with pytest.raises(MergeError, match=r"the base's tensor is torch\.int8"):
            adapter_checkpoint(linear_adapter(tmp_path), open_checkpoint(base))

    def test_factors_of_integers(self, tmp_path: Path) -> None:
        whole = torch.ones(2, 1, dtype=torch.int32)
        folder = linear_adapter(tmp_path, base_model__model__fc__lora_B__weight=whole)
        self.refused(folder, "lora_B.weight' of the adapter .* is torch.int32")

    def test_half_a_pair(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        save_file({"fc.lora_A.weight": torch.ones(1, 3)}, folder / "adapter_model.safetensors")
        self.refused(folder, "lacks a factor of module 'fc': it has only lora_A")

    def test_factors_that_are_not_finite(self, tmp_path: Path) -> None:
        bad = torch.tensor([[1.0], [torch.nan]])
        folder = linear_adapter(tmp_path, base_model__model__fc__lora_B__weight=bad)
        found = adapter_checkpoint(folder, open_checkpoint(BASE))
        with pytest.raises(MergeError, match=r"lora_B\.weight' of the adapter .* holds NaN"):
            found.load("fc.weight")

    def test_files(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "holds no adapter weights")
        folder = linear_adapter(tmp_path / "a")
        (folder / "adapter_config.json").write_text("[")
        self.refused(folder, "adapter_config.json cannot be read")
        (folder / "adapter_config.json").write_text("[]")
        self.refused(folder, "adapter_config.json holds no settings")
        (folder / "adapter_config.json").unlink()
        self.refused(folder, "adapter_config.json cannot be read")

    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(MapBoError, match=message.replace("(", r"\(")) as caught:
            adapter_checkpoint(folder, open_checkpoint(BASE))
        assert caught.value.hint
        assert not re.search("Traceback", str(caught.value))


class TestOpenExpert:
    def test_adapters_and_checkpoints(self, tmp_path: Path) -> None:
        base = open_checkpoint(BASE)
        folder = linear_adapter(tmp_path / "adapter")
        for source in (folder, str(folder), folder / "adapter_model.safetensors"):
            assert isinstance(open_expert(source, base), AdapterCheckpoint)
        save_file(BASE, tmp_path / "model.safetensors")
        assert open_expert(tmp_path, base).digest() == base.digest()
        found = open_expert(folder, base)
        assert open_expert(found, base) is found

    def test_a_whole_model_beside_an_adapter_is_the_expert(self, tmp_path: Path) -> None:
        folder = linear_adapter(tmp_path)
        save_file(BASE, folder / "model.safetensors")
        assert not isinstance(open_expert(folder, open_checkpoint(BASE)), AdapterCheckpoint)

    def test_alone_an_adapter_is_refused_with_a_hint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="as an expert beside its base"):
            open_checkpoint(linear_adapter(tmp_path))


def test_adapters_are_merged_on_disk_like_any_expert(tmp_path: Path) -> None:
    base = open_checkpoint({**BASE, "fc.weight": torch.ones(2, 3)})
    adapter = adapter_checkpoint(linear_adapter(tmp_path), base)
    full = open_checkpoint({"fc.weight": torch.full((2, 3), 3.0), "fc.bias": torch.ones(2)})
    merged = dict(merge_linearly(base, {"a": adapter, "b": full}, lambda _: {"a": 0.5, "b": 2.0}))
    torch.testing.assert_close(merged["fc.weight"], 1 + 0.5 * DELTA + 2 * 2)
    torch.testing.assert_close(merged["fc.bias"], torch.full((2,), 2.0))
