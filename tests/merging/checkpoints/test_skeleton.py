from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.checkpoints.skeleton import module_tensors, skeleton
from tests.merging.renamed_models import renamed


def folder(tmp_path: Path, name: str = "vit") -> Path:
    renamed(name).save_pretrained(tmp_path / name)  # type: ignore[operator]
    return tmp_path / name


@pytest.mark.parametrize("name", ["vit", "mixtral"])
def test_the_modules_tensors_are_found_in_the_files(tmp_path: Path, name: str) -> None:
    base, model = open_checkpoint(folder(tmp_path, name)), renamed(name)
    found = module_tensors(base)
    assert found is not None
    state = model.state_dict()
    assert found.parts.keys() == state.keys()
    for own, parts in found.parts.items():
        assert all(torch.equal(part.of(state[own]), base.load(n)) for n, part in parts)
        assert sum(base.shape(n).numel() for n, _ in parts) == state[own].numel()


def test_it_has_no_weights(tmp_path: Path) -> None:
    model = skeleton(open_checkpoint(folder(tmp_path)))
    assert model is not None
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "of-nobody"},
        {"model_type": None},
        {"num_hidden_layers": 10**9},  # would take for ever to build
        {"hidden_size": "wide"},
    ],
)
def test_what_cannot_be_built_is_unknown(tmp_path: Path, change: dict[str, object]) -> None:
    place = folder(tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **change}))
    assert skeleton(open_checkpoint(place)) is None


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    place = folder(tmp_path)
    config = json.loads((place / "config.json").read_text())
    mine = {"auto_map": {"AutoModel": "mine.M"}, "architectures": ["Mine"]}
    (place / "config.json").write_text(json.dumps({**config, **mine}))
    (place / "mine.py").write_text("raise SystemExit('it was run')\n")
    model = skeleton(open_checkpoint(place))
    assert type(model).__name__ == "ViTModel"


def test_without_transformers_or_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path)
    assert skeleton(open_checkpoint({"a": torch.ones(1)})) is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert skeleton(open_checkpoint(place)) is None
