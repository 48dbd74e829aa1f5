"""``map-bo merge`` of runs and of recipes: what it writes, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import map_bo
from map_bo.app.main import main
from map_bo.loop.reading import load_result
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.operators.sparse import Della, Ties
from tests.integration.mistakes import failing
from tests.merging.adapter_files import write_adapter
from tests.merging.hard_checkpoints import everything, hard_family, loaded, saved
from tests.merging.large_checkpoints import write_family

# What each expert is good at grows with how far it moves its layer from the base.
TASK = """
import torch
from safetensors.torch import load_file


def build_model():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def moved(model, layer):
    gap = model[layer].weight.detach() - load_file("base.safetensors")[f"{layer}.weight"]
    return gap.norm().tanh().item()


def first(model):
    return moved(model, 0)


def last(model):
    return moved(model, 2)
"""
SHAPES = {"0.weight": (8, 6), "0.bias": (8,), "2.weight": (4, 8), "2.bias": (4,)}


def run_in(folder: Path, kind: str, *further: str) -> Path:
    """Find a front of two experts, adapters or whole models, by the command line."""
    folder.mkdir()
    name = f"merging_task_{kind}"
    (folder / f"{name}.py").write_text(TASK)
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    paths = {}
    for seed, expert in enumerate(("first", "last")):
        if kind == "adapters":
            modules = ["0", "2"] if expert == "first" else ["2"]
            paths[expert] = write_adapter(folder / expert, SHAPES, seed=seed, modules=modules)
        else:
            paths[expert] = folder / f"{expert}.safetensors"
            tuned = {
                key: value + 0.1 * torch.randn(value.shape, generator=generator)
                for key, value in base.items()
            }
            save_file(tuned, paths[expert])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                "run",
                "problem=checkpoints",
                f"problem.model={name}:build_model",
                "problem.base=base.safetensors",
                *(f"+problem.experts.{e}={p.name}" for e, p in paths.items()),
                *(f"+problem.evaluators.{e}={name}:{e}" for e in paths),
                "surrogate=quadratic",
                "sampler=sobol",
                "solver.points=20",
                "loop.budget=7",
                "progress=false",
                "hydra.run.dir=run",
                *further,
            ]
        )
    return folder / "run"


@pytest.fixture(scope="module")
def of_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("runs") / "adapters", "adapters")


@pytest.fixture(scope="module")
def of_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in(tmp_path_factory.mktemp("runs") / "models", "models", "operator=ties")


TRUST = ("--trust", "merging_task_models", "--trust", "merging_task_adapters")
"""The packages of the models and metrics that the records name."""


class TestRuns:
    def test_a_model_in_small_files_within_bounded_memory(
        self, of_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "m"
        arguments = ["merge", str(of_models), *TRUST, "--point", "0", "--out", str(out)]
        main([*arguments, "--max-memory", "20GB", "--shard-size", "100B"])
        said = capsys.readouterr()
        assert said.out == f"merged model written to {out}\n"
        assert said.err == ""
        assert len(list(out.glob("model-*.safetensors"))) > 1
        recipe = yaml.safe_load((out / "recipe.yaml").read_text())
        assert recipe["operator"]["class"] == "map_bo.operators.sparse:Ties"

    @pytest.mark.parametrize("rank", ["4", "1"])
    def test_an_adapter_of_whole_models(
        self, of_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: str
    ) -> None:
        out = tmp_path / "a"
        arguments = ["merge", str(of_models), *TRUST, "--point", "0", "--out", str(out)]
        main([*arguments, "--lora-rank", rank])
        assert f"adapter of rank {rank} written to {out}; its error is" in capsys.readouterr().out
        assert json.loads((out / "adapter_config.json").read_text())["r"] == int(rank)
        assert "is the recipe of an adapter" in failing(
            capsys, "merge", str(out), "--out", str(tmp_path / "again")
        )

    def test_an_adapter_of_adapters_is_the_merge(
        self, of_adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert float(load_result(of_adapters).front.X[0].min()) > 0.1
        for rank in ("4", "0"):
            arguments = ["merge", str(of_adapters), *TRUST, "--point", "0"]
            main([*arguments, "--out", str(tmp_path / f"a{rank}"), "--lora-rank", rank])
            assert "its error is 0.00%" in capsys.readouterr().out
        main(["merge", str(of_adapters), *TRUST, "--point", "0", "--out", str(tmp_path / "m")])
        base = of_adapters.parent / "base.safetensors"
        merge_checkpoints(
            base, {"a": tmp_path / "a4"}, {"a": 1.0}, tmp_path / "whole", progress=False
        )
        whole = loaded(tmp_path / "whole")
        for name, value in loaded(tmp_path / "m").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--max-memory", "abc"], "max_memory must be a size of at least one byte, got 'abc'"),
            (["--max-memory", "-1"], "max_memory must be a size of at least one byte, got '-1'"),
            (["--max-memory", "1MB"], "max_memory is 1 MB, and this merge needs"),
            (["--shard-size", "0"], "shard_size must be a size of at least one byte, got '0'"),
            (["--lora-rank", "-2"], "rank must be at least 1, got -2"),
        ],
    )
    def test_settings_that_cannot_be(
        self,
        of_models: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        out = tmp_path / "new" / "m"
        said = failing(capsys, "merge", str(of_models), *TRUST, "--point", "0", "--out", str(out),
                       *(f"{arguments[0]}={arguments[1]}",))  # fmt: skip
        assert message in said
        assert "hint: " in said
        assert everything(tmp_path) == []

    def test_exact_factors_of_whole_models_are_refused(
        self, of_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["merge", str(of_models), *TRUST, "--point", "0", "--out", str(tmp_path / "a")]
        assert "give a rank" in failing(capsys, *arguments, "--lora-rank", "0")
        assert everything(tmp_path) == []

    def test_a_target_in_use_is_seen_before_anything_else(
        self,
        of_models: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        (tmp_path / "x").write_text("x")
        monkeypatch.setattr("map_bo.app.main._choice_of", lambda options: pytest.fail("chosen"))
        for out, message in ((tmp_path, "is not empty"), (tmp_path / "x", "is not a folder")):
            assert message in failing(capsys, "merge", str(of_models), "--out", str(out))


@pytest.fixture
def first(tmp_path: Path) -> Path:
    base, experts = hard_family(tmp_path / "in")
    return merge_checkpoints(
        base,
        experts,
        {"math": 0.5, "code": 1.0},
        tmp_path / "first",
        operator=Ties(),
        progress=False,
    )


class TestRecipes:
    @pytest.mark.parametrize("of", [lambda folder: folder, lambda folder: folder / "recipe.yaml"])
    def test_the_same_bytes(
        self,
        first: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        of: Callable[[Path], Path],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        main(["merge", str(of(first)), "--out", "again"])
        said = capsys.readouterr()
        assert said.out == f"merged model written to {tmp_path / 'again'}\n"
        assert said.err == ""
        for name in ("model.safetensors", "recipe.yaml"):
            assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--point", "0"], "is a recipe, and a preference, bound or point was given"),
            (["--prefer", "a=1"], "is a recipe, and a preference, bound or point was given"),
            (["--lora-rank", "4"], "a recipe cannot be written as an adapter"),
            (["--max-memory", "10MB"], "max_memory is 10 MB, and this merge needs"),
            (
                ["--max-memory", "much"],
                "max_memory must be a size of at least one byte, got 'much'",
            ),
        ],
    )
    def test_what_does_not_go_with_a_recipe(
        self,
        first: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        before = everything(tmp_path)
        out = tmp_path / "again"
        assert message in failing(capsys, "merge", str(first), "--out", str(out), *arguments)
        assert everything(tmp_path) == before

    @pytest.mark.parametrize("text", ["{", "recipe: 1\n", "recipe: 1\nmerged: {}\nbase: 3\n"])
    def test_damaged_recipes(
        self, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        (first / "recipe.yaml").write_text(text)
        said = failing(capsys, "merge", str(first), "--out", str(tmp_path / "again"))
        assert "is not YAML" in said or "incomplete or damaged" in said

    def test_changed_and_broken_inputs(
        self, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "in" / "math"
        tensors = loaded(folder)
        tensors["scalar"].fill_(float("nan"))
        shutil.rmtree(folder)
        saved(folder, tensors)
        said = failing(capsys, "merge", str(first), "--out", str(tmp_path / "again"))
        assert "has other weights than when" in said
        recipe = yaml.safe_load((first / "recipe.yaml").read_text())
        recipe["experts"]["math"]["sha256"] = open_checkpoint(folder).digest()
        (first / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        before = everything(tmp_path)
        said = failing(capsys, "merge", str(first), "--out", str(tmp_path / "new" / "again"))
        assert "'scalar' of expert 'math' holds NaN or infinity" in said
        assert everything(tmp_path) == before

    def test_what_is_neither_a_run_nor_a_recipe(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for path in (tmp_path, tmp_path / "gone", tmp_path / "gone.yaml"):
            said = failing(capsys, "merge", str(path), "--out", str(tmp_path / "m"))
            assert "hint: " in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """SIGINT ends it with 130 and nothing left; what a killed one leaves the next removes."""
    given: dict[str, Any] = write_family(tmp_path / "in", 60)

    recipe = merge_checkpoints(
        given["base"],
        given["experts"],
        given["coefficients"],
        tmp_path / "first",
        operator=Della(),
        progress=False,
    )
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "map_bo.app.main", "merge", str(recipe)]
    path = f"{Path(map_bo.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [*command, "--out", str(folder / "m")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with process:
        deadline = time.monotonic() + 90
        while not any(p.stat().st_blocks > 200 for p in folder.glob(".m.*/*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert everything(folder) == []
        return
    assert process.returncode == -signal.SIGKILL
    assert [p.suffix for p in folder.iterdir()] == [".partial"]
    main(["merge", str(recipe), "--out", str(folder / "m")])
    assert [p.name for p in folder.iterdir()] == ["m"]
