from __future__ import annotations

import copy
import errno
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter
from map_bo.merging.export.adapter import AdapterExport, export_adapter, module_kinds
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.recipe import read_recipe
from map_bo.rng import make_generator
from tests.merging.adapter_files import small_adapters, small_base
from tests.merging.peft_models import language_model, outputs, trained

C = {"math": 0.7, "code": -0.4}


def write(
    out: Path,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    c: Mapping[str, float] = C,
    **settings: Any,
) -> AdapterExport:
    return export_adapter(
        out,
        base=base,
        experts=experts,
        weights=lambda _: c,
        operator={"name": "task_arithmetic", "blocks": None},
        coefficients=c,
        **settings,
    )


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Missing or unexpected tensors are only warned of by peft.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        loaded: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return loaded.eval()


def merged_model(
    model: nn.Module, base: Checkpoint, experts: Mapping[str, Checkpoint], c: Mapping[str, float]
) -> nn.Module:
    merged = copy.deepcopy(model)
    merged.load_state_dict(dict(merge_linearly(base, experts, lambda _: c)))
    return merged


def moved(model: nn.Module, seed: int, scale: float = 0.05) -> nn.Module:
    """Return a whole model a little away from ``model``."""
    generator = make_generator(seed)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return result


ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}, {"target_modules": ["c_fc"]}),
    "linear": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "r": 3},
    ),
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": ["embed_tokens"], "r": 1},
    ),
    "saved": (
        "llama",
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["o_proj", "lm_head"]},
    ),
    "biases": (
        "bert",
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["value"], "task_type": "SEQ_CLS"},
    ),
}


class TestWithPeft:
    @pytest.mark.parametrize("case", sorted(ADAPTERS))
    def test_a_merge_of_adapters_is_the_merged_model(self, tmp_path: Path, case: str) -> None:
        kind, *adapters = ADAPTERS[case]
        model = language_model(kind)
        base = open_checkpoint(model)
        for seed, (name, settings) in enumerate(zip(C, adapters, strict=True)):
            trained(model, tmp_path / name, seed=seed + 1, **settings)
        experts = {name: adapter_checkpoint(tmp_path / name, base) for name in C}
        result = write(tmp_path / "out", base, experts)
        assert result.error < 1e-6
        assert all(error < 1e-6 for error in result.errors.values())
        loaded = with_peft(model, result.path)
        wanted = outputs(merged_model(model, base, experts, C))
        torch.testing.assert_close(outputs(loaded), wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs(model), wanted, atol=1e-3)
        again = adapter_checkpoint(result.path, base)
        for name, tensor in merge_linearly(base, experts, lambda _: C):
            torch.testing.assert_close(again.load(name), tensor, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
    def test_whole_models_of_full_rank(self, tmp_path: Path, kind: str) -> None:
        model = language_model(kind)
        if kind == "gpt2":  # untied
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # type: ignore[union-attr,operator]
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        base = open_checkpoint(model)
        experts = {name: open_checkpoint(moved(model, seed)) for seed, name in enumerate(C)}
        result = write(tmp_path / "out", base, experts, rank=12, kinds=module_kinds(model))
        assert result.error < 1e-5
        loaded = with_peft(model, result.path)
        wanted = outputs(merged_model(model, base, experts, C))
        torch.testing.assert_close(outputs(loaded), wanted, rtol=1e-4, atol=1e-5)

    def test_names_that_end_alike_are_told_apart(self, tmp_path: Path) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(5, 4)
                self.deep = nn.Sequential()
                self.deep.add_module("fc", nn.Linear(4, 4))
                self.norm = nn.LayerNorm(4)
                self.deep.add_module("norm", nn.LayerNorm(4))

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.norm(self.deep(self.fc(x)))
                return result

        with torch.random.fork_rng(devices=[]):
            model = Twice()
        expert = moved(model, 1)
        expert.get_submodule("deep").load_state_dict(model.deep.state_dict())
        base, experts = open_checkpoint(model), {"math": open_checkpoint(expert)}
        result = write(
            tmp_path / "out", base, experts, {"math": 1.0}, rank=4, kinds=module_kinds(model)
        )
        x = torch.linspace(-1, 1, 5)[None]
        torch.testing.assert_close(with_peft(model, result.path)(x), expert(x))


class TestRank:
    def experts(self, folder: Path) -> tuple[Checkpoint, dict[str, Checkpoint]]:
        base = small_base()
        adapters = small_adapters(folder, base)
        return base, {name: adapters[name] for name in C}

    def test_it_is_at_most_the_sum_of_ranks(self, tmp_path: Path) -> None:
        base, experts = self.experts(tmp_path)
        result = write(tmp_path / "out", base, experts)
        assert result.rank == 5
        assert json.loads((result.path / "adapter_config.json").read_text())["r"] == 5

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_the_error_is_that_of_the_best_approximation(self, tmp_path: Path, rank: int) -> None:
        base, experts = self.experts(tmp_path)
        result = write(tmp_path / "out", base, experts, rank=rank)
        assert result.rank == rank
        found = adapter_checkpoint(result.path, base)
        cut, whole = 0.0, 0.0
        for name, tensor in merge_linearly(base, experts, lambda _: C):
            delta = (tensor - base.load(name)).flatten(1) if tensor.dim() > 1 else None
            if name not in result.errors or delta is None:
                continue
            values = torch.linalg.svdvals(delta.double())
            wanted = float(values[rank:].norm() / values.norm())
            assert result.errors[name] == pytest.approx(wanted, abs=1e-5)
            lost = float((found.load(name) - tensor).norm() / delta.norm())
            assert lost == pytest.approx(wanted, abs=1e-5)
            cut, whole = cut + float(values[rank:].square().sum()), whole + float(delta.norm()) ** 2
        assert result.error == pytest.approx((cut / whole) ** 0.5, abs=1e-5)

    def test_large_whole_models_go_through_a_sketch(self, tmp_path: Path) -> None:
        generator = make_generator(0)
        left, right = (torch.randn(700, 4, generator=generator) for _ in range(2))
        noise = 1e-3 * torch.randn(700, 700, generator=generator)
        base = open_checkpoint({"fc.weight": torch.zeros(700, 700)})
        experts = {"a": open_checkpoint({"fc.weight": left @ right.T + noise})}
        results = [
            write(tmp_path / str(i), base, experts, {"a": 1.0}, rank=4,
                  kinds={"fc.weight": "linear"})
            for i in range(2)
        ]  # fmt: skip
        values = torch.linalg.svdvals(left @ right.T + noise)
        wanted = float(values[4:].norm() / values.norm())
        assert results[0].error == pytest.approx(wanted, rel=0.01)
        files = [load_file(result.path / "adapter_model.safetensors") for result in results]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    def test_the_recipe_tells_it(self, tmp_path: Path) -> None:
        base, experts = self.experts(tmp_path)
        result = write(tmp_path / "out", base, experts, rank=2, record={"run": "mine"})
        recipe = read_recipe(result.path)
        adapter = recipe["merged"]["adapter"]
        assert adapter["rank"] == 2
        assert adapter["relative_error"] == result.error > 0.01
        assert adapter["relative_errors"] == result.errors
        assert adapter["full_values"] == ["layers.0.fc.bias", "layers.0.norm.running_var"]
        assert recipe["merged"]["sha256"] == adapter_checkpoint(result.path, base).digest()
        assert recipe["experts"]["math"]["sha256"] == experts["math"].digest()
        assert recipe["record"] == {"run": "mine"}


class TestTied:
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_tied_embedding_changes_under_both_names(self, tmp_path: Path, kind: str) -> None:
        """As a full value: factors of both would change it twice when peft merges them."""
        model = language_model(kind)
        if kind == "llama":
            model.config.tie_word_embeddings = True  # type: ignore[union-attr]
            model.tie_weights()  # type: ignore[operator]
        name = {"gpt2": "wte", "llama": "embed_tokens"}[kind]
        further = {"gpt2": "c_attn", "llama": "q_proj"}[kind]
        merged = trained(model, tmp_path / "a", target_modules=[name, further])
        base = open_checkpoint(model)
        experts = {"a": adapter_checkpoint(tmp_path / "a", base)}
        result = write(tmp_path / "out", base, experts, {"a": 1.0}, model=model)
        loaded = with_peft(model, result.path)
        # Before anything is merged: the output layer has the change too.
        torch.testing.assert_close(outputs(loaded), outputs(merged), rtol=1e-4, atol=1e-5)
        at_once = loaded.merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(outputs(at_once), outputs(merged), rtol=1e-4, atol=1e-5)

    def test_a_name_that_no_module_is_known_of_is_refused(self, tmp_path: Path) -> None:
        base = open_checkpoint({"e.weight": torch.zeros(3, 2), "fc.weight": torch.zeros(2, 2)})
        experts = {"a": open_checkpoint({n: base.load(n) + 1 for n in base.names})}
        with pytest.raises(MergeError, match=r"tied to head\.weight, of a module that is not"):
            write(tmp_path / "out", base, experts, {"a": 1.0}, rank=2,
                  kinds={"e.weight": "embedding"}, ties={"head.weight": "e.weight"})  # fmt: skip


class TestNonlinear:
    def test_the_merged_model_is_written(self, tmp_path: Path) -> None:
        model = language_model("bert")
        merged = moved(model, 3)
        base = open_checkpoint(model)
        result = write(
            tmp_path / "out",
            base,
            {name: open_checkpoint(moved(model, seed)) for seed, name in enumerate(C)},
            rank=12,
            kinds=module_kinds(model),
            merged=open_checkpoint(merged),
        )
        found = outputs(with_peft(model, result.path))
        torch.testing.assert_close(found, outputs(merged), rtol=1e-4, atol=1e-5)


class TestRefused:
    def refused(self, out: Path, message: str, *args: Any, **settings: Any) -> None:
        before = sorted(out.parent.iterdir())
        with pytest.raises(MergeError, match=message) as caught:
            write(out, *args, **settings)
        assert caught.value.hint
        assert sorted(out.parent.iterdir()) == before  # nothing is left behind

    def test_what_it_needs(self, tmp_path: Path) -> None:
        model = language_model("bert")
        base = open_checkpoint(model)
        experts = {name: open_checkpoint(moved(model, seed)) for seed, name in enumerate(C)}
        out, kinds = tmp_path / "out", module_kinds(model)
        self.refused(out, "exact change is not of low rank", base, experts, kinds=kinds)
        self.refused(out, "linear layer or of an embedding is unknown", base, experts, rank=2)
        self.refused(out, "which have no factors", base, experts, rank=2, kinds=kinds,
                     others="refuse")  # fmt: skip
        self.refused(out, "rank must be at least 1, got 0", base, experts, rank=0)
        still = dict.fromkeys(C, 0.0)
        self.refused(out, "the merge is the base", base, experts, still, kinds=kinds)
        self.refused(out, "unknown experts other", base, experts, {"other": 1.0}, kinds=kinds)

    def test_changes_without_factors_alone(self, tmp_path: Path) -> None:
        base = open_checkpoint({"norm.weight": torch.ones(3)})
        experts = {"a": open_checkpoint({"norm.weight": torch.zeros(3)})}
        self.refused(tmp_path / "out", "no tensor changes by a product of low rank", base, experts,
                     {"a": 1.0}, rank=2, kinds={})  # fmt: skip

    def test_a_folder_that_is_not_empty(self, tmp_path: Path) -> None:
        base = small_base()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        self.refused(tmp_path / "out", "exists and is not empty", base, {})

    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = small_base()
        experts: dict[str, Checkpoint] = dict(small_adapters(tmp_path / "in", base))

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(SafetensorsWriter, "write", full)
        c = {"math": 1.0, "code": 0.0, "chat": 0.0}
        self.refused(tmp_path / "out", "cannot be written: No space left", base, experts, c)


@pytest.mark.parametrize("kind", ["mamba", "resnet"])
def test_layers_that_peft_refuses_and_counters_are_written_as_full_values(
    tmp_path: Path, kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if kind == "mamba":
            config = transformers.MambaConfig(
                hidden_size=8, num_hidden_layers=1, vocab_size=11, state_size=2, time_step_rank=2
            )
            model: nn.Module = transformers.MambaForCausalLM(config)
        else:
            config = transformers.ResNetConfig(
                embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
            )
            model = transformers.ResNetForImageClassification(config)
    base = open_checkpoint(model)
    expert = open_checkpoint(moved(model, 1))
    write(tmp_path / "out", base, {"e": expert}, {"e": 0.5}, rank=8, model=model)
    found = with_peft(model, tmp_path / "out").merge_and_unload()  # type: ignore[operator]
    wanted = dict(merge_linearly(base, {"e": expert}, lambda _: {"e": 0.5}))
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)
