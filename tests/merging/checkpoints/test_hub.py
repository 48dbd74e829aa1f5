from __future__ import annotations

import builtins
import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from map_bo.errors import CheckpointError, MissingDependencyError
from map_bo.merging.adapters.adapter import adapter_checkpoint, open_expert
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.checkpoints.hub import hub_model
from tests.merging.adapter_files import SHAPES, small_base, write_adapter
from tests.merging.checkpoint_files import export
from tests.merging.checkpoints.test_checkpoint import some_tensors
from tests.merging.damaged import refused
from tests.merging.hub_server import COMMIT, OTHER, Hub, cached, running

constants: Any = pytest.importorskip("huggingface_hub.constants")

NAME = "some-org/some.model_1"
TENSORS = some_tensors()
SHARDS = {
    f"model-0000{i}-of-00002.safetensors": dict(list(TENSORS.items())[i - 1 :: 2]) for i in (1, 2)
}
INDEX = {"weight_map": {name: shard for shard, part in SHARDS.items() for name in part}}
BESIDE = {
    "config.json": b'{"architectures": ["GPT2LMHeadModel"]}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"x",
    "merges.txt": b"y",
    "chat_template.jinja": b"z",
    "LICENSE": b"mit",
    "additional_chat_templates/tool.jinja": b"t",
}
FILES = {
    **BESIDE,
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **{shard: save(part) for shard, part in SHARDS.items()},
}
OTHERS = {
    "README.md": b"readme",
    "modeling.py": b"import os",
    "consolidated.safetensors": save(TENSORS),
    "pytorch_model.bin": b"old",
    "onnx/model.safetensors": b"onnx",
    "original/params.json": b"{}",
    "model-00001-of-00002.fp16.safetensors": b"half",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an empty folder to work in."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(Hub({NAME: {**FILES, **OTHERS}})) as hub:
        point_to(hub.address, monkeypatch)
        yield hub


class TestNames:
    @pytest.mark.parametrize(
        ("text", "name", "revision"),
        [
            ("org/name", "org/name", None),
            ("org/name@v1.0", "org/name", "v1.0"),
            ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
            ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", None),
            ("hf://org/name", "org/name", None),
            ("hf://org/name@main", "org/name", "main"),
            ("hf://gpt2", "gpt2", None),
        ],
    )
    def test_of_models(self, cache: Path, text: str, name: str, revision: str | None) -> None:
        model = hub_model(text)
        assert model is not None
        assert (model.name, model.revision) == (name, revision)
        assert model.explicit == text.startswith("hf://")

    @pytest.mark.parametrize(
        "text",
        [
            "name",
            "./org/name",
            "../name",
            "/org/name",
            "~/name",
            "a/b/c",
            "org/",
            "org/name/",
            "org/model.safetensors",
            "org/model.pt",
            "org/name.index.json",
            "org/a..b",
            "org/a--b",
            "org/a b",
            "org/name@",
            "org/name@-x",
            "org/" + "a" * 100,
            "C:/name",
        ],
    )
    def test_of_paths(self, cache: Path, text: str) -> None:
        assert hub_model(text) is None

    def test_what_exists_here_is_a_path(self, cache: Path) -> None:
        Path("runs/old").mkdir(parents=True)
        assert hub_model("runs/old") is None
        assert hub_model("runs/typo") is None
        error = refused("runs/typo", f"{Path.cwd() / 'runs/typo'} does not exist")
        assert "hf://organisation/name" in str(error.hint)
        assert hub_model("hf://runs/old") is not None

    @pytest.mark.parametrize("text", ["hf://", "hf://a/b/c", "hf://datasets/a/b", "hf://a b"])
    def test_a_scheme_with_something_else_behind_it(self, text: str) -> None:
        refused(text, f"{text} names no model of the Hugging Face hub")

    def test_a_path_object_is_a_path(self, cache: Path) -> None:
        refused(Path("org/name"), "org/name does not exist")


class TestCache:
    """Without a network, from a cache in the library's own layout."""

    @pytest.mark.parametrize(
        "text", [NAME, f"{NAME}@main", f"hf://{NAME}", f"{NAME}@{COMMIT}", f"hf://{NAME}@main"]
    )
    def test_a_cached_model(self, offline: Path, text: str) -> None:
        snapshot = cached(offline, NAME, FILES)
        checkpoint = open_checkpoint(text)
        assert checkpoint.source == f"{NAME}@{COMMIT}"
        assert checkpoint.directory == snapshot
        assert checkpoint.digest() == open_checkpoint(TENSORS).digest()
        assert pickle.loads(pickle.dumps(checkpoint)).digest() == checkpoint.digest()
        # What a recipe records opens the same again.
        assert open_checkpoint(checkpoint.source).digest() == checkpoint.digest()

    def test_a_revision(self, offline: Path) -> None:
        cached(offline, NAME, {"model.safetensors": FILES[next(iter(SHARDS))]}, revision="v2")
        assert open_checkpoint(f"{NAME}@v2").names == tuple(sorted(next(iter(SHARDS.values()))))
        refused(NAME, f"{NAME} does not exist on this machine", "is not in the cache")

    def test_old_weights(self, offline: Path, tmp_path: Path) -> None:
        torch.save(TENSORS, tmp_path / "x.bin")
        content = (tmp_path / "x.bin").read_bytes()
        cached(offline, NAME, {"config.json": b"{}", "pytorch_model.bin": content})
        assert open_checkpoint(NAME).digest() == open_checkpoint(TENSORS).digest()

    def test_its_small_files_are_carried_as_files(self, offline: Path, tmp_path: Path) -> None:
        cached(offline, NAME, FILES)
        base = open_checkpoint(NAME)
        tensors = ((name, base.load(name)) for name in base.names)
        out = export(tmp_path / "m", tensors=tensors, base=base, experts={}, coefficients={})
        for name, content in BESIDE.items():
            assert (out / name).read_bytes() == content
            assert not (out / name).is_symlink()

    def test_nothing_cached(self, offline: Path) -> None:
        error = refused(NAME, f"{NAME} does not exist on this machine", "HF_HUB_OFFLINE is set")
        assert f"hf download {NAME}" in str(error.hint)
        error = refused(f"hf://{NAME}", f"{NAME} is not in the cache", "HF_HUB_OFFLINE is set")
        assert "exist" not in error.message

    @pytest.mark.parametrize(
        ("gone", "part"),
        [
            (next(iter(SHARDS)), "names the shard 'model-00001-of-00002.safetensors', which is"),
            ("model.safetensors.index.json", "holds 2 weight files"),
        ],
    )
    def test_a_copy_that_is_not_complete(self, offline: Path, gone: str, part: str) -> None:
        cached(offline, NAME, {n: c for n, c in FILES.items() if n != gone})
        error = refused(NAME, f"the copy of {NAME} in the cache cannot be used", part)
        assert f"hf download {NAME}" in str(error.hint)

    def test_a_blob_that_is_missing(self, offline: Path) -> None:
        snapshot = cached(offline, NAME, FILES)
        (snapshot / next(iter(SHARDS))).resolve().unlink()
        refused(NAME, "cannot be used", "it is a link to ../../blobs/", "which does not exist")

    def test_no_connection_is_as_good_as_offline(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            point_to(f"http://127.0.0.1:{free.getsockname()[1]}", monkeypatch)
        refused(NAME, f"{NAME} does not exist on this machine", "which cannot be reached")
        cached(cache, NAME, FILES)
        assert open_checkpoint(NAME).source == f"{NAME}@{COMMIT}"


class TestFetching:
    """From a hub on this machine."""

    def test_the_weights_and_what_makes_them_a_model_are_fetched_once(self, hub: Hub) -> None:
        checkpoint = open_checkpoint(NAME)
        assert checkpoint.source == f"{NAME}@{COMMIT}"
        assert checkpoint.digest() == open_checkpoint(TENSORS).digest()
        assert sorted(hub.asked) == sorted(FILES)
        assert checkpoint.directory is not None
        assert (checkpoint.directory / "config.json").read_bytes() == BESIDE["config.json"]
        again = open_checkpoint(f"hf://{NAME}")
        assert again.source == checkpoint.source
        assert len(hub.asked) == len(FILES)

    def test_what_was_fetched_serves_offline(
        self, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = open_checkpoint(NAME).digest()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert open_checkpoint(NAME).digest() == digest

    def test_an_adapter(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        base = small_base()
        folder = write_adapter(tmp_path / "adapter", SHAPES, seed=1, modules=["head"])
        hub.files["org/adapter"] = {file.name: file.read_bytes() for file in folder.iterdir()}
        found = open_expert("org/adapter", base)
        assert found.source == f"org/adapter@{COMMIT}"
        assert found.digest() == adapter_checkpoint(folder, base).digest()
        assert open_expert(NAME, base).digest() == open_checkpoint(NAME).digest()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert open_expert("org/adapter", base).digest() == found.digest()

    def test_another_revision(self, hub: Hub) -> None:
        hub.commits["v1"] = hub.commits[OTHER] = OTHER
        assert open_checkpoint(f"{NAME}@v1").source == f"{NAME}@{OTHER}"
        refused(f"{NAME}@v2", f"the model {NAME} of the Hugging Face hub has no revision 'v2'")

    @pytest.mark.parametrize(
        ("files", "wanted"),
        [
            ({"model.safetensors": save(TENSORS), **FILES}, "model.safetensors"),
            ({"weights.safetensors": save(TENSORS), "pytorch_model.bin": b"x"}, "weights.safe"),
        ],
    )
    def test_one_form_of_the_weights_is_enough(
        self, hub: Hub, files: dict[str, bytes], wanted: str
    ) -> None:
        hub.files[NAME] = files
        assert open_checkpoint(NAME).digest() == open_checkpoint(TENSORS).digest()
        (weights,) = [name for name in hub.asked if name.endswith((".safetensors", ".bin"))]
        assert weights.startswith(wanted)

    def test_old_weights_where_there_are_no_others(self, hub: Hub, tmp_path: Path) -> None:
        torch.save(TENSORS, tmp_path / "x.bin")
        old = (tmp_path / "x.bin").read_bytes()
        hub.files[NAME] = {"config.json": b"{}", "pytorch_model.bin": old, "model.gguf": b"GGUF"}
        assert open_checkpoint(NAME).digest() == open_checkpoint(TENSORS).digest()
        assert sorted(hub.asked) == ["config.json", "pytorch_model.bin"]

    @pytest.mark.parametrize(
        ("files", "part"),
        [
            ({"q4.gguf": b"GGUF"}, "holds no weights that can be read, but q4.gguf"),
            ({"README.md": b""}, "holds no weights that can be read"),
            ({"a.safetensors": b"", "b.safetensors": b""}, "holds 2 weight files"),
        ],
    )
    def test_nothing_is_fetched_that_could_not_be_used(
        self, hub: Hub, files: dict[str, bytes], part: str
    ) -> None:
        hub.files[NAME] = files
        refused(NAME, NAME, part)
        assert hub.asked == []

    @pytest.mark.parametrize(
        ("answer", "part", "hint"),
        [
            ((404, "RepoNotFound"), f"hub shows no model {NAME}", "hf auth login"),
            ((401, "RepoNotFound"), f"hub shows no model {NAME}", "hf auth login"),
            ((401, ""), f"hub shows no model {NAME}", "hf auth login"),
            ((403, "GatedRepo"), f"the model {NAME} of the Hugging Face hub is gated", "access"),
            ((500, ""), f"answered with the error 500 for {NAME}", "later"),
        ],
    )
    def test_refusals_of_the_hub(
        self, hub: Hub, cache: Path, answer: tuple[int, str], part: str, hint: str
    ) -> None:
        hub.refused[NAME] = answer
        error = refused(NAME, f"{NAME} does not exist on this machine", part)
        assert hint in str(error.hint)
        error = refused(f"hf://{NAME}", part)
        assert hint in str(error.hint)
        assert "exist" not in error.message
        cached(cache, NAME, FILES)
        assert open_checkpoint(NAME).source == f"{NAME}@{COMMIT}"


@pytest.mark.parametrize("text", [NAME, f"hf://{NAME}"])
def test_without_the_library(cache: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match="huggingface_hub") as caught:
        open_checkpoint(text)
    assert caught.value.hint == 'pip install "map-bo[huggingface]"'
    assert ("does not exist on this machine" in caught.value.message) == (text == NAME)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("no/such/path")
