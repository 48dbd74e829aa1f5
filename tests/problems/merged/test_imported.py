from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from map_bo.errors import CheckpointError, ConfigError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.operators.sparse import Ties
from map_bo.problems.merged.imported import import_callable, imported_problem
from map_bo.rng import make_generator
from tests.merging.hub_server import cached

OWN = """
import torch

class Nets:
    @staticmethod
    def line():
        return torch.nn.Linear(3, 1)

def score(model):
    return torch.sigmoid(model.weight.sum()).item()

not_a_function = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the working directory, with two checkpoints beside it."""
    name = "own_" + "".join(c for c in tmp_path.name if c.isalnum())
    (tmp_path / f"{name}.py").write_text(OWN)
    weights = {"weight": torch.ones(1, 3), "bias": torch.zeros(1)}
    save_file(weights, tmp_path / "base.safetensors")
    for i, expert in enumerate(("one", "two")):
        moved = weights["weight"].clone()
        moved[0, i] += 0.5
        save_file({**weights, "weight": moved}, tmp_path / f"{expert}.safetensors")
    monkeypatch.chdir(tmp_path)
    return name


def settings(own: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": f"{own}:Nets.line",
        "base": "base.safetensors",
        "experts": {"one": "one.safetensors", "two": "two.safetensors"},
        "evaluators": {"task": f"{own}:score"},
    }
    return {**values, **changes}


def test_a_problem_from_names(own: str) -> None:
    metrics = {"task": {"direction": "min", "kind": "unbounded"}}
    problem = imported_problem(**settings(own, metrics=metrics, sum_at_most=1.0))
    assert problem.metrics[0].direction == "min"
    assert problem.space.experts == ("one", "two")
    assert len(problem.space.constraints) == 1
    seen = problem.evaluate(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), generator=make_generator(0))
    assert seen.failures == (None, None)
    assert seen.Y[0, 0] == pytest.approx(float(torch.sigmoid(torch.tensor(3.0))))
    assert seen.Y[1, 0] > seen.Y[0, 0]


def test_sums_are_bounded_in_every_block_and_leave_settings_free(own: str) -> None:
    operator = Ties(blocks={"all": "*"}, search=["density", "scale"])
    space = imported_problem(**settings(own, sum_at_most=1.0, operator=operator)).space
    assert [c.weights for c in space.constraints] == [(1.0, 1.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": {}}, "names no experts"),
        ({"evaluators": {}}, "names no evaluators"),
        ({"metrics": {"other": {}}}, "metrics without an evaluator: other"),
        ({"dtype": "float8"}, "dtype must .* got 'float8'"),
        (
            {"sum_at_most": 1.0, "operator": TaskArithmetic("kinds")},
            "sum_at_most and blocks in a word",
        ),
    ],
)
def test_contradictions_are_told(own: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        imported_problem(**settings(own, **changes))


@pytest.mark.parametrize(
    ("changes", "described"),
    [
        ({"dtype": "float16"}, {"dtype": "float16"}),
        ({"dtype": "auto"}, {"dtype": "float32"}),
        ({"dtype": "auto", "max_memory": 500}, {"dtype": "bfloat16"}),
        ({"max_memory": "500 B"}, {"dtype": "float32", "mapped": True}),
    ],
)
def test_task_vectors_are_kept_as_a_configuration_says(
    own: str, tmp_path: Path, changes: dict[str, Any], described: dict[str, Any]
) -> None:
    problem = imported_problem(**settings(own, cache_dir=str(tmp_path / "cache"), **changes))
    if "max_memory" not in changes:
        described = {**described, "mapped": True}
    told = problem.describe()
    assert {name: told[name] for name in described} == described
    seen = problem.evaluate(torch.tensor([[1.0, 0.0]]), generator=make_generator(0))
    assert seen.Y[0, 0] == pytest.approx(float(torch.sigmoid(torch.tensor(3.5))))
    assert (tmp_path / "cache" / "rows").exists() == ("mapped" in described)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{own}", "write it as module:function"),
        (":score", "write it as module:function"),
        ("{own}:gone", "has no attribute 'gone'"),
        ("no_such_module_anywhere:score", "No module named"),
        ("{own}:not_a_function", "must name a function, got a int"),
    ],
)
def test_names_that_lead_nowhere_are_told(own: str, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_callable(where.format(own=own), "problem.model")
    assert message in str(caught.value)


def test_without_a_model_a_configuration_must_name_it(own: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json"):
        imported_problem(**settings(own, model=None, base=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not name an architecture"):
        imported_problem(**settings(own, model=None, base=str(tmp_path)))


def test_a_hugging_face_directory_names_its_own_model(own: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    base: nn.Module = transformers.GPT2LMHeadModel(config)
    paths = {}
    for name, shift in (("base", 0.0), ("one", 0.01), ("two", -0.02)):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(shift)
        paths[name] = str(tmp_path / name)
        base.save_pretrained(paths[name])  # type: ignore[operator]
    (tmp_path / f"{own}_gpt.py").write_text(
        "def score(model):\n    return 0.5 + model.transformer.wte.weight.mean().item()\n"
    )
    problem = imported_problem(
        None,
        base=paths["base"],
        experts={"one": paths["one"], "two": paths["two"]},
        evaluators={"task": f"{own}_gpt:score"},
    )
    seen = problem.evaluate(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), generator=make_generator(0))
    assert float(seen.Y[1, 0] - seen.Y[0, 0]) == pytest.approx(0.01, abs=1e-4)
    names = json.loads((tmp_path / "base" / "config.json").read_text())
    names["architectures"] = ["NoSuchModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match="no architecture 'NoSuchModel'"):
        imported_problem(
            None,
            base=paths["base"],
            experts={"one": paths["one"]},
            evaluators={"task": f"{own}_gpt:score"},
        ).evaluate(torch.zeros(1, 1), generator=make_generator(0))


def test_a_model_of_the_hub_names_its_own_model(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    for name in ("base", "one"):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        cached(tmp_path / "hub", f"some-org/{name}", files)
    (tmp_path / f"{own}_hub.py").write_text(
        "def score(model):\n    return 0.5 + model.transformer.wte.weight.mean().item()\n"
    )
    problem = imported_problem(
        None,
        base="some-org/base",
        experts={"one": "hf://some-org/one@main"},
        evaluators={"task": f"{own}_hub:score"},
    )
    seen = problem.evaluate(torch.tensor([[0.0], [1.0]]), generator=make_generator(0))
    for row, name in enumerate(("base", "one")):
        weights = load_file(tmp_path / name / "model.safetensors")["transformer.wte.weight"]
        assert float(seen.Y[row, 0]) == pytest.approx(0.5 + weights.mean().item(), abs=1e-6)
    with pytest.raises(CheckpointError, match="is not in the cache"):
        imported_problem(**settings(own, model=None, base="some-org/gone"))
