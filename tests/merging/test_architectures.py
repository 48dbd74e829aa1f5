"""Merging many architectures: what is live is what is exported, and what an expert is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.recipe import read_recipe
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.live import model_ties
from map_bo.merging.vectors.recalibration import statistics
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.merging.architectures import (
    ARCHITECTURES,
    EXPERTS,
    TOKENIZER,
    inputs,
    library,
    new,
    outputs,
    save_family,
    scramble,
)

# The others are in the slow job.
_QUICK = ("bert-words", "gpt2", "vit", "mixtral")
NAMES = [
    pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in ARCHITECTURES
]
C = torch.tensor([0.6, 0.3], dtype=torch.float64)


def problem(root: Path, name: str, **changes: Any) -> MergedModelProblem:
    settings: dict[str, Any] = {
        "base": root / "base",
        "experts": {label: root / label for label in EXPERTS},
        "evaluators": {"mean": lambda model: float(outputs(model, name).sigmoid().mean())},
        **changes,
    }
    return MergedModelProblem(settings.pop("model", lambda: new(name)), **settings)


def loaded(folder: Path, name: str) -> nn.Module:
    auto = getattr(library(), ARCHITECTURES[name].auto)
    model: nn.Module = auto.from_pretrained(folder, dtype="auto").eval()
    return model


def alike(one: Tensor, other: Tensor, name: str) -> bool:
    coarse = ARCHITECTURES[name].dtype == torch.bfloat16
    # Sums in another order round a few weights of bfloat16 to their other neighbour.
    rtol, atol = (1e-1, 1e-1) if coarse else (1e-4, 1e-5)
    return one.shape == other.shape and torch.allclose(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
class TestEveryArchitecture:
    def test_what_is_live_is_what_is_exported(self, tmp_path: Path, name: str) -> None:
        models = save_family(tmp_path, name)
        tested = problem(tmp_path, name)
        with tested.load(C) as model:
            live = outputs(model, name)
        out = tested.export(C, tmp_path / "out")
        exported = loaded(out, name)
        assert alike(outputs(exported, name), live, name)
        assert not alike(live, outputs(models["base"], name), name)
        # The same by hand, in the module's own names.
        hand = new(name)
        pre = models["base"].state_dict()
        hand.load_state_dict(
            {
                k: v
                + sum(
                    c * (models[e].state_dict()[k] - v)
                    for c, e in zip(C.tolist(), EXPERTS, strict=True)
                )
                if v.is_floating_point()
                else v
                for k, v in pre.items()
            }
        )
        assert alike(live, outputs(hand, name), name)

    def test_one_hot_is_the_expert_and_zero_the_base(self, tmp_path: Path, name: str) -> None:
        models = save_family(tmp_path, name)
        tested = problem(tmp_path, name)
        for label, x in (("base", [0.0, 0.0]), ("math", [1.0, 0.0]), ("code", [0.0, 1.0])):
            with tested.load(torch.tensor(x)) as model:
                assert alike(outputs(model, name), outputs(models[label], name), name)

    def test_files_and_ties(self, tmp_path: Path, name: str) -> None:
        save_family(tmp_path, name)
        out = problem(tmp_path, name).export(C, tmp_path / "out")
        base, merged = open_checkpoint(tmp_path / "base"), open_checkpoint(out)
        assert merged.names == base.names
        assert {merged.dtype(n) for n in merged.names} == {base.dtype(n) for n in base.names}
        assert (out / "config.json").read_text() == (tmp_path / "base/config.json").read_text()
        assert (out / "tokenizer.json").read_text() == TOKENIZER
        assert read_recipe(out)["base"]["sha256"] == base.digest()
        head = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
        assert head["library_name"] == "transformers"
        assert "merge_method: task_arithmetic" in (out / "mergekit.yaml").read_text()
        ties = model_ties(loaded(out, name))
        assert ties == model_ties(new(name))
        assert bool(ties) == ARCHITECTURES[name].tied


class TestLanguageModels:
    @pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
    def test_text_is_generated_alike(self, tmp_path: Path, name: str) -> None:
        save_family(tmp_path, name)
        tested = problem(tmp_path, name)

        def text(model: Any) -> Tensor:
            words = inputs(name)["input_ids"]
            mask = torch.ones_like(words)
            generated: Tensor = model.generate(
                words, attention_mask=mask, max_new_tokens=5, do_sample=False
            )
            return generated

        with tested.load(C) as model:
            live = text(model)
        assert torch.equal(text(loaded(tested.export(C, tmp_path / "out"), name)), live)
        assert live.shape[1] > 6

    @pytest.mark.parametrize("rows", [37, 64])
    def test_another_vocabulary(self, tmp_path: Path, rows: int) -> None:
        models = save_family(tmp_path, "gpt2")
        resized: Any = models["math"]
        resized.resize_token_embeddings(rows, mean_resizing=False)
        resized.save_pretrained(tmp_path / "math")
        tested = problem(tmp_path, "gpt2")
        with pytest.raises(MergeError, match="only its vocabulary differs"):
            tested.prepare()
        fitted = problem(tmp_path, "gpt2", vocabulary="base")
        out = fitted.export(C, tmp_path / "out")
        with fitted.load(C) as model:
            assert alike(outputs(loaded(out, "gpt2"), "gpt2"), outputs(model, "gpt2"), "gpt2")
        with fitted.load(torch.tensor([1.0, 0.0])) as model:
            kept = min(rows, 40)
            live = outputs(model, "gpt2")[..., :kept]
        words = inputs("gpt2")["input_ids"]
        if rows > int(words.max()):
            assert alike(live, outputs(resized, "gpt2")[..., :kept], "gpt2")
        assert "was fitted to the base's names and shapes" in (out / "mergekit.yaml").read_text()

    def test_blocks_are_told_by_the_names_in_the_files(self, tmp_path: Path) -> None:
        """The experts of a mixture are one tensor live and one each in files, and for blocks."""
        save_family(tmp_path, "mixtral")
        operator = TaskArithmetic({"first": r"experts\.0\.", "rest": "*"})
        tested = problem(tmp_path, "mixtral", operator=operator)
        c = torch.tensor([0.9, 0.1, 0.2, 0.4])
        with tested.load(c) as model:
            live = outputs(model, "mixtral")
        exported = loaded(tested.export(c, tmp_path / "out"), "mixtral")
        assert alike(outputs(exported, "mixtral"), live, "mixtral")

    def test_gradients_by_regrouped_weights_are_refused(self, tmp_path: Path) -> None:
        class Mean:
            def __call__(self, model: nn.Module) -> Any:
                raise AssertionError

            def examples(self, model: nn.Module) -> Any:
                raise AssertionError

            def summary(self, values: Tensor) -> Any:
                raise AssertionError

        save_family(tmp_path, "mixtral")
        tested = problem(tmp_path, "mixtral", evaluators={"mean": Mean()}, gradients=True)
        with pytest.raises(MergeError, match="gradients by those are not known"):
            tested.evaluate(C[None], generator=make_generator(0))

    def test_models_in_memory_have_the_names_of_their_modules(self, tmp_path: Path) -> None:
        models = {"base": new("vit")}
        for seed, label in enumerate(EXPERTS, start=1):
            models[label] = new("vit")
            scramble(models[label], seed, 0.05)
        tested = problem(
            tmp_path, "vit", base=models["base"], experts={e: models[e] for e in EXPERTS}
        )
        with tested.load(torch.tensor([1.0, 0.0])) as model:
            assert alike(outputs(model, "vit"), outputs(models["math"], "vit"), "vit")


class TestBatchNorm:
    def test_recalibrated_statistics_are_exported(self, tmp_path: Path) -> None:
        save_family(tmp_path, "resnet")
        generator = make_generator(3)
        batches = [{"pixel_values": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(3)]
        tested = problem(tmp_path, "resnet", recalibration=batches)
        with tested.load(C) as model:
            live, measured = outputs(model, "resnet"), statistics(model)
        with problem(tmp_path, "resnet").load(C) as model:
            assert not alike(live, outputs(model, "resnet"), "resnet")
        out = tested.export(C, tmp_path / "out")
        exported = loaded(out, "resnet")
        assert alike(outputs(exported, "resnet"), live, "resnet")
        assert all(torch.equal(v, measured[k]) for k, v in statistics(exported).items())
        assert "does not measure the statistics" in (out / "mergekit.yaml").read_text()


class Odd(nn.Module):
    """Names with digits and dots that end alike, a module used twice, a hidden buffer, bfloat16."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        twice = nn.Linear(4, 4)
        self.layers = nn.ModuleDict(
            {"10": nn.Linear(4, 4), "1": nn.Linear(4, 4), "1_weight": twice, "weight": twice}
        )
        self.coarse = nn.Linear(4, 4).bfloat16()
        self.weight = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("scale", torch.full((4,), 0.5), persistent=False)
        self.register_buffer("table", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        result: Tensor = self.coarse(x.bfloat16()).float() * self.scale * self.weight
        return result


def test_a_module_of_odd_parts(tmp_path: Path) -> None:
    def made(seed: int, scale: float) -> Odd:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = Odd()
        scramble(model, seed, scale)
        return model.eval()

    base, experts = made(0, 0.0), {e: made(i + 1, 0.2) for i, e in enumerate(EXPERTS)}
    x = torch.randn(3, 4, generator=make_generator(0))
    tested = MergedModelProblem(
        made(0, 0.0), base=base, experts=experts, evaluators={"m": lambda model: 0.5}
    )
    with tested.load(C) as model:
        live = model(x).detach().clone()
        assert model.layers["weight"] is model.layers["1_weight"]  # type: ignore[index]
    out = tested.export(C, tmp_path / "out")
    stored = open_checkpoint(out)
    other = Odd().eval()
    other.load_state_dict({name: stored.load(name) for name in stored.names}, strict=True)
    torch.testing.assert_close(other(x), live, rtol=2e-2, atol=2e-2)
    assert stored.dtype("coarse.weight") == torch.bfloat16
    assert stored.ties == open_checkpoint(base).ties
    assert not torch.allclose(live, base(x), atol=2e-2)
    for label, hot in (("math", [1.0, 0.0]), ("code", [0.0, 1.0])):
        with tested.load(torch.tensor(hot)) as model:
            torch.testing.assert_close(model(x), experts[label](x), rtol=2e-2, atol=2e-2)
