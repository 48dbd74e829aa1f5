"""Links in a folder of somebody else that lead out of it are refused, and never exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from map_bo.errors import CheckpointError
from map_bo.merging.adapters.adapter import open_adapter
from map_bo.merging.align.vocabulary import token_ids
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints

SECRET = json.dumps({"secret": "of this machine"})
Link = Callable[[Path, Path], None]


def model(folder: Path, shift: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    save_file({"a.weight": torch.ones(2, 3) + shift}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    return folder


def absolute(path: Path, target: Path) -> None:
    path.symlink_to(target)


def relative(path: Path, target: Path) -> None:
    path.symlink_to(Path("..") / target.relative_to(path.parents[1]))


def with_dots(path: Path, target: Path) -> None:
    (path.parent / "sub").mkdir()
    path.symlink_to(Path("sub/../sub/../../") / target.relative_to(path.parents[1]))


def chain(path: Path, target: Path) -> None:
    (path.parent / "first").symlink_to("second")
    (path.parent / "second").symlink_to(target)
    path.symlink_to("first")


def through_a_folder(path: Path, target: Path) -> None:
    (path.parent / "inside").symlink_to(target.parent)
    path.symlink_to(Path("inside") / target.name)


LINKS = [absolute, relative, with_dots, chain, through_a_folder]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "private" / "secret.json"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


def merged(base: Path, tmp_path: Path) -> Path:
    expert = model(tmp_path / "expert", 1.0)
    return merge_checkpoints(base, {"e": expert}, {"e": 0.5}, tmp_path / "out", progress=False)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja", "x.model"])
def test_a_link_out_of_the_base_is_not_exported(
    name: str, link: Link, secret: Path, tmp_path: Path
) -> None:
    base = model(tmp_path / "base")
    link(base / name, secret)
    with pytest.raises(CheckpointError, match="was refused: it is a link out of the model"):
        merged(base, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_that_is_a_link_out_of_the_base_is_not_exported(
    secret: Path, tmp_path: Path
) -> None:
    base = model(tmp_path / "base")
    secret.rename(secret.with_suffix(".jinja"))
    (base / "additional_chat_templates").symlink_to(secret.parent)
    out = merged(base, tmp_path)
    assert SECRET not in [file.read_text("latin-1") for file in out.rglob("*") if file.is_file()]


def test_links_within_the_base_and_a_base_that_is_a_link_are_exported(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (base / "parts").mkdir()
    (base / "parts" / "t").write_text("{}")
    (base / "tokenizer.json").symlink_to("parts/t")
    (tmp_path / "link").symlink_to(base)
    out = merged(tmp_path / "link", tmp_path)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()


def test_a_snapshot_of_the_hub_is_exported(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    base = model(repository / "snapshots" / ("c" * 40))
    blobs = repository / "blobs"
    blobs.mkdir()
    (blobs / "f00").write_text("{}")
    (base / "tokenizer.json").symlink_to("../../blobs/f00")
    assert (merged(base, tmp_path) / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_a_vocabulary_that_is_a_link_out_is_refused(
    name: str, link: Link, secret: Path, tmp_path: Path
) -> None:
    folder = model(tmp_path / "expert")
    link(folder / name, secret)
    with pytest.raises(CheckpointError, match="was refused: it is a link out of the model"):
        token_ids(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_a_link_out_is_refused(name: str, secret: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} was refused: it is a link out of the model"):
        open_adapter(folder, open_checkpoint(model(tmp_path / "base")))
